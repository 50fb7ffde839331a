"""The task's side of the engine host: find this task's device and connect to its host."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

from cdr.engines.base import EngineSpec
from cdr.engines.client import EngineClient, connect
from cdr.engines.device import claim_device, task_gpu_addresses, visible_cuda_devices
from cdr.progress import EngineLoad, TaskCounter


@contextlib.contextmanager
def task_engines(
    specs: Sequence[EngineSpec], counter: TaskCounter
) -> Iterator[tuple[EngineClient, dict[str, str]]]:
    """Hold this task's device with a set of engines loaded.

    Args:
        specs: the engines the stage needs; others on the device are closed.
        counter: tells the driver which engines were loaded where, and how long that took.

    Yields:
        The client, and each engine's version by its name.

    Raises:
        EngineError: the host or an engine cannot be started; the message has its log's tail.
        SetupError: the task has fewer GPUs than an engine's tensor parallelism needs.
    """
    num_gpus = max(spec.tensor_parallel for spec in specs)
    addresses, visible = task_gpu_addresses(), visible_cuda_devices()
    with (
        claim_device(addresses, visible, num_gpus=num_gpus) as device,
        connect(device) as client,
    ):
        status, node = client.set_engines(specs), socket.gethostname()
        counter.add_loads(
            EngineLoad(node, str(device), status.pid, engine.name, engine.load_s)
            for engine in status.engines
        )
        yield client, {engine.name: engine.engine_version for engine in status.engines}
