"""Hold a device with a set of engines loaded: how a task, or any other process, comes to a model.

The models live in the device's engine host (`cdr.engines.client`); here it is only decided which
device that is, and that nobody else's tasks have it meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cdr.engines.base import EngineSpec
from cdr.engines.client import EngineClient, HostStatus, connect
from cdr.engines.device import (
    Device,
    DeviceChoice,
    claim_device,
    task_gpu_addresses,
    visible_cuda_devices,
)


@dataclass(frozen=True)
class HeldEngines:
    """A client whose engines are loaded, the device they are on, and what its host says."""

    client: EngineClient
    device: Device
    status: HostStatus


@contextlib.contextmanager
def hold_engines(
    specs: Sequence[EngineSpec], choice: DeviceChoice = "auto"
) -> Iterator[HeldEngines]:
    """Hold this task's device, or this machine's outside of Spark, with a set of engines loaded.

    Args:
        specs: the engines needed, at least one; others on the device are closed.
        choice: which kind of device; see `claim_device`.

    Raises:
        EngineError: the host or an engine cannot be started; the message has its log's tail.
        SetupError: there are fewer GPUs than the engines need.
    """
    num_gpus = max(spec.tensor_parallel for spec in specs)
    addresses, visible = task_gpu_addresses(), visible_cuda_devices()
    with (
        claim_device(addresses, visible, num_gpus=num_gpus, choice=choice) as device,
        connect(device) as client,
    ):
        yield HeldEngines(client, device, client.set_engines(specs))
