"""The task's side of the engine host: find this task's device and connect to its host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from cdr.engines.base import EngineSpec
from cdr.engines.client import EngineClient, connect
from cdr.engines.device import claim_device, task_gpu_addresses, visible_cuda_devices


@contextlib.contextmanager
def task_engines(specs: Sequence[EngineSpec]) -> Iterator[tuple[EngineClient, dict[str, str]]]:
    """Hold this task's device with a set of engines loaded.

    Args:
        specs: the engines the stage needs; others on the device are closed.

    Yields:
        The client, and each engine's version by its name.

    Raises:
        EngineError: the host or an engine cannot be started; the message has its log's tail.
    """
    with (
        claim_device(task_gpu_addresses(), visible_cuda_devices()) as device,
        connect(device) as client,
    ):
        status = client.set_engines(specs)
        yield client, {engine.name: engine.engine_version for engine in status.engines}
