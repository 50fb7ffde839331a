"""The parent of an engine host: when the host is gone, nothing it started may stay.

    python -m cdr.engines.supervisor ARGUMENT ...          # those of `cdr.engines.host`

A host can be killed from outside (the kernel's memory killer, a broken CUDA driver) and has no say
then. An engine may keep its model in child processes in sessions of their own, as vLLM does; they
would hold a device's memory for good. On Linux, processes whose parent dies become children of
their nearest living ancestor that asked for them; this one asks, waits for the host and kills what
is left. It imports little, so that it costs a host's start next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

from cdr.engines.processes import find_engine_processes, kill_processes

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 20.0
_POLL_S = 0.1


def become_subreaper() -> None:
    """Take in descendants whose parent dies, where the system has such a thing (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants() -> None:
    """Kill children, and theirs, and wait until there are none.

    Trackers of multiprocessing are given time: they end with those whose shared memory they know,
    and remove it.
    """
    deadline = time.monotonic() + _GRACE_S
    while children := psutil.Process().children(recursive=True):
        is_late = time.monotonic() > deadline
        kill_processes(children if is_late else find_engine_processes())
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # grandchildren come here as well
                pass
        time.sleep(_POLL_S)


def main() -> int:
    """Run a host; see the module's first lines."""
    become_subreaper()
    arguments = sys.argv[1:]
    fds = [int(arguments[arguments.index(name) + 1]) for name in ("--ready-fd", "--lock-fd")]
    host = subprocess.Popen(
        [sys.executable, "-P", "-X", "faulthandler", "-m", "cdr.engines.host", *arguments],
        pass_fds=fds,
    )
    for fd in fds:  # open, they would say that a host is still starting
        os.close(fd)
    signal.signal(signal.SIGTERM, lambda *_: host.terminate())
    host.wait()
    kill_descendants()
    return 0


if __name__ == "__main__":
    sys.exit(main())
