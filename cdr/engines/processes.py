"""The processes that engines start below this one: found, waited for, killed.

An engine may keep its model in children of its own, also in other sessions; until their end the
device's memory is not back. The host and its supervisor are the reapers of orphans among them
(`cdr.engines.supervisor`), so that all of them stay descendants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

_GRACE_S = 20.0


def find_engine_processes() -> set[psutil.Process]:
    """Find the descendants of this process, less multiprocessing's trackers.

    A tracker ends with the last process that it serves, and removes the shared memory they left.
    """
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                found.add(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process still runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def end_processes(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Wait for processes that were asked to end, and kill those that do not.

    Returns:
        The killed ones.
    """
    _, alive = psutil.wait_procs(processes, timeout=_GRACE_S)
    kill_processes(alive)
    psutil.wait_procs(alive, timeout=_GRACE_S)
    return list(alive)


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, without waiting for their end."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
