"""Where an engine host lives, whom it belongs to, and how it is started.

A host's folder is named after its owner and its device, so all tasks of an executor find the same
one without being told. The first of them starts the host under a file lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdr.engines.device import Device, make_private_folder
from cdr.engines.hardware import count_cores
from cdr.engines.owner import Owner, find_owner
from cdr.errors import EngineError

SOCKET, LOCK, LOG, DEVICE = "host.sock", "start.lock", "host.log", "device.json"
"""What is in a host's folder."""

_MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107
_MAX_SOCKET_NAME_BYTES = 36  # a UUID: vLLM's sockets are there too
_LOG_TAIL_LINES = 20

# Kept so that hosts that die while this process lives are reaped (at the next start).
_started: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class HostOptions:
    """How hosts are started and waited for.

    Args:
        owner: process whose end ends the host; None finds it (`find_owner`).
        num_threads: CPU threads for each engine; None takes all cores.
        idle_timeout_s: seconds without a request after which a host ends.
        start_timeout_s: seconds the process may take to listen (imports on slow disks).
        load_timeout_s: seconds the engines of `set_engines` may take, turns of others included.
        fetch_timeout_s: seconds more where weights may have to be fetched to this node first.
        max_deaths_in_a_row: deaths without a reply in between after which the client gives up;
            one bad completion causes three.
    """

    owner: Owner | None = None
    num_threads: int | None = None
    idle_timeout_s: float = 900.0
    start_timeout_s: float = 300.0
    load_timeout_s: float = 3600.0
    fetch_timeout_s: float = 6 * 3600.0
    max_deaths_in_a_row: int = 12


class HostPlace:
    """Where the host of one device is, running or not.

    Args:
        device: what the host runs on.
        options: how it is started when it does not run.
    """

    def __init__(self, device: Device, options: HostOptions) -> None:
        self._device, self._options = device, options
        self._owner = options.owner or find_owner()
        self._folder = host_folder(device, self._owner)

    def open(self) -> socket.socket:
        """Connect to the host.

        Raises:
            ConnectionError: it does not run any more.
            FileNotFoundError: it does not run.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self._folder / SOCKET))
        except OSError:
            connection.close()
            raise
        return connection

    def open_or_start(self) -> socket.socket:
        """Connect to the host, which is started if need be; others that want it wait meanwhile.

        Raises:
            EngineError: it does not start.
            SetupError: its folder is in other hands.
        """
        while True:
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                return self.open()
            make_private_folder(self._folder)
            # No file: a host that ended has just taken its folder away.
            with contextlib.suppress(FileNotFoundError), self._start_lock() as lock_fd:
                with contextlib.suppress(ConnectionError, FileNotFoundError):
                    return self.open()  # another client started it while this one waited
                if os.path.samestat(os.fstat(lock_fd), os.stat(self._folder / LOCK)):
                    self._start(lock_fd)

    def rivals(self) -> list[Device]:
        """Give the devices of this owner's other hosts that share an address with this one.

        Spark pairs addresses anew for each task that wants several, and gives one of a pair to
        the next stage's task: a host that holds them still has its models there.
        """
        found = []
        prefix, _, _ = self._folder.name.rpartition("-")
        for file in self._folder.parent.glob(f"{prefix}-*/{DEVICE}"):
            with contextlib.suppress(FileNotFoundError, ValueError):  # it just ends, or starts
                kind, ids = json.loads(file.read_text())
                found.append(Device(kind, tuple(ids)))
        return [device for device in found if device.overlaps(self._device)]

    def clear(self) -> None:
        """Remove the folder of a host that was killed; does nothing where one runs."""
        with contextlib.suppress(FileNotFoundError), self._start_lock():
            try:
                self.open().close()
            except (ConnectionError, FileNotFoundError):
                shutil.rmtree(self._folder)

    def log_tail(self) -> str:
        """Give the last lines of the host's log, to end an error message with."""
        path = self._folder / LOG
        try:
            lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        except FileNotFoundError:
            return ""
        return "\n".join([f"; the end of {path}:", *lines])

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[int]:
        lock_fd = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            yield lock_fd
        finally:
            os.close(lock_fd)

    def _start(self, lock_fd: int) -> None:
        """Start the host and wait until it listens.

        Args:
            lock_fd: the start lock; the host inherits it and lets go when it listens, so that no
                second one starts when this process is killed meanwhile.
        """
        _started[:] = [process for process in _started if process.poll() is None]
        ready_fd, host_ready_fd = os.pipe()
        with open(ready_fd, "rb") as ready:
            try:
                process = self._spawn(host_ready_fd, lock_fd)
            finally:
                os.close(host_ready_fd)
            _started.append(process)
            timeout_s = self._options.start_timeout_s
            is_readable, _, _ = select.select([ready], [], [], timeout_s)
            if not is_readable:
                os.killpg(process.pid, signal.SIGKILL)
                raise self._failure(f"did not start within {timeout_s:.0f} s")
            if not ready.read(1):
                raise self._failure("died as it started")

    def _spawn(self, ready_fd: int, lock_fd: int) -> subprocess.Popen[bytes]:
        num_threads = self._options.num_threads or count_cores()
        arguments = {
            "--folder": self._folder,
            "--owner-pid": self._owner.pid,
            "--owner-start": self._owner.start,
            "--idle-timeout-s": self._options.idle_timeout_s,
            "--num-threads": num_threads,
            "--ready-fd": ready_fd,
            "--lock-fd": lock_fd,
        }
        device = json.dumps([self._device.kind, self._device.ids])
        (self._folder / DEVICE).write_text(device)
        with (self._folder / LOG).open("ab") as log:
            return subprocess.Popen(
                # -P: the working folder is on the import path only if it is on the worker's.
                [sys.executable, "-P", "-X", "faulthandler", "-m", "cdr.engines.supervisor"]
                + [str(word) for pair in arguments.items() for word in pair],
                env=host_environment(self._device, num_threads, os.environ, import_path()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(ready_fd, lock_fd),
                start_new_session=True,
            )

    def _failure(self, what: str) -> EngineError:
        return EngineError(f"the engine host on {self._device} " + what + self.log_tail())


def host_folder(device: Device, owner: Owner) -> Path:
    """Give the folder of a device's host: the same for all tasks of an executor, and short."""
    key = hashlib.sha256(f"{owner.start} {device}".encode()).hexdigest()[:12]
    name = f"cdr-{os.geteuid()}-{owner.pid}-{key}"
    folder = Path(tempfile.gettempdir()) / name
    is_short = len(os.fsencode(folder)) + 1 + _MAX_SOCKET_NAME_BYTES <= _MAX_SOCKET_PATH_BYTES
    return folder if is_short else Path("/tmp") / name


def import_path() -> list[str]:
    """Give this process's import path, on which its own copy of this package is the first one.

    A model that MLflow loads puts the code it was registered with before all else; a host must run
    the code that asks it.
    """
    own = str(Path(__file__).resolve().parents[2])
    copies = [n for n, entry in enumerate(sys.path) if Path(entry, "cdr", "engines").is_dir()]
    first = min(copies, default=len(sys.path))
    return [*sys.path[:first], own, *sys.path[first:]]


def host_environment(
    device: Device, num_threads: int, environ: Mapping[str, str], import_path: Sequence[str]
) -> dict[str, str]:
    """Give the environment of a host: the worker's, but for threads, devices and import path."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    return {
        # Threads that wait must sleep: with another process on the cores, spinning ones burn the
        # time that the thread they wait for needs (seen: 3.5 times slower scoring).
        "OMP_WAIT_POLICY": "PASSIVE",
        **environ,
        **threads,
        "CUDA_VISIBLE_DEVICES": ",".join(device.ids) if device.kind == "cuda" else "",
        # Spark's addresses are those of nvidia-smi, which counts in this order.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Spark may have put shipped code (--py-files) on the worker's path only.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in import_path),
        "PYTHONUNBUFFERED": "1",
    }
