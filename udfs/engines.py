"""The task's side of the engine host: find this task's device and connect to its host."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

from cdr.engines.access import hold_engines
from cdr.engines.base import EngineSpec
from cdr.engines.client import EngineClient
from cdr.engines.device import DeviceChoice
from cdr.progress import EngineLoad, EngineWork, TaskCounter


@contextlib.contextmanager
def task_engines(
    specs: Sequence[EngineSpec], choice: DeviceChoice, counter: TaskCounter
) -> Iterator[tuple[EngineClient, dict[str, str]]]:
    """Hold this task's device with a set of engines loaded.

    Args:
        specs: the engines the stage needs; others on the device are closed.
        choice: which kind of device, as `cdr.executors` has settled it.
        counter: tells the driver which engines were loaded where, how long that took, and what
            work they had.

    Yields:
        The client, and each engine's version by its name.

    Raises:
        EngineError: the host or an engine cannot be started; the message has its log's tail.
        SetupError: the task has fewer GPUs than the engines need.
    """
    with hold_engines(specs, choice) as held:
        engines, node = held.status.engines, socket.gethostname()
        counter.add_loads(
            EngineLoad(node, str(held.device), held.status.pid, engine.name, engine.load_s)
            for engine in engines
        )
        yield held.client, {engine.name: engine.engine_version for engine in engines}
        busy_s = {f"{node} {held.status.pid}": held.client.busy_s}
        counter.add_work(EngineWork(held.client.num_resubmitted, busy_s))
