"""Whom an engine host works for: the executor's JVM, told from a later process with its pid."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Owner:
    """The process a host belongs to: it ends when its owner is gone.

    Args:
        pid: process id.
        start: when it started, in the system's own unit; tells a reused pid apart.
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Describe a living process."""
        return cls(pid, _start_time(pid))

    def is_alive(self) -> bool:
        """Tell whether the process still runs; a zombie does not."""
        try:
            is_same = _start_time(self.pid) == self.start
            return is_same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _start_time(pid: int) -> int:
    # Ticks since boot where /proc has them: unlike psutil's time of day, all processes read the
    # same number, also after the clock was set.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19])
    except OSError:
        return int(psutil.Process(pid).create_time())


def find_owner() -> Owner:
    """Give the executor this process works for (worker → daemon → JVM), else this process."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if parent.name() == "java":
                return Owner.of(parent.pid)
    return Owner.of(os.getpid())
