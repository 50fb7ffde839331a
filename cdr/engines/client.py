"""Client of the engine host: what a task uses to ask a model.

    with connect(device) as client:
        client.set_engines([strong, weak])
        outcomes = client.score(strong.name, groups)

The first client on a device starts the host (`cdr.engines.host`), later ones connect to it. When
the host dies, the client starts it again and narrows the request down to the completions that
kill it: those fail, the others are scored. One client serves one thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pyarrow as pa

from cdr.engines import wire
from cdr.engines.base import EngineSpec, Sample, SamplingRequest, ScoringGroup, TokenLogprobs
from cdr.engines.device import Device, make_private_folder
from cdr.engines.host import LOCK, LOG, SOCKET, Owner
from cdr.engines.wire import Group, Head, Outcome, Value
from cdr.errors import EngineError, FailReason

_MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107
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
        max_deaths_in_a_row: deaths without a reply in between after which the client gives up;
            one bad completion causes three.
    """

    owner: Owner | None = None
    num_threads: int | None = None
    idle_timeout_s: float = 900.0
    start_timeout_s: float = 300.0
    load_timeout_s: float = 3600.0
    max_deaths_in_a_row: int = 8


@dataclass(frozen=True)
class LoadedEngine:
    """An engine of a host: its name, its version, and the seconds it took to load."""

    name: str
    engine_version: str
    load_s: float


@dataclass(frozen=True)
class HostStatus:
    """A host's process id and loaded engines."""

    pid: int
    engines: tuple[LoadedEngine, ...]


def find_owner() -> Owner:
    """Give the executor this process works for (worker → daemon → JVM), else this process."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if parent.name() == "java":
                return Owner.of(parent.pid)
    return Owner.of(os.getpid())


def connect(device: Device, options: HostOptions | None = None) -> EngineClient:
    """Give a client of the device's host, which is started when there is none.

    Raises:
        EngineError: the host cannot be started.
    """
    client = EngineClient(device, options or HostOptions())
    client.status()
    return client


class _HostDied(Exception):  # noqa: N818 - an event the client handles, not an error it reports
    """The host died, or ended, before it replied; `was_running` tells if this request ran."""

    def __init__(self, was_running: bool) -> None:
        self.was_running = was_running


class EngineClient:
    """Asks the engines of one device; see `connect`."""

    def __init__(self, device: Device, options: HostOptions) -> None:
        self.device = device
        self._options = options
        self._owner = options.owner or find_owner()
        self._folder = host_folder(device, self._owner)
        self._connection: socket.socket | None = None
        self._specs: tuple[EngineSpec, ...] = ()
        self._deaths_in_a_row = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_engines(self, specs: Sequence[EngineSpec]) -> HostStatus:
        """Declare the set of engines: others are closed, then missing ones load, one by one.

        Args:
            specs: all engines of the stage; unchanged ones stay loaded.

        Returns:
            The host's status with the set loaded.

        Raises:
            EngineError: a model cannot be loaded; the host died loading it, or took too long.
        """
        self._specs = tuple(specs)
        head = self._head("set_engines")
        reply = self._ask(head, None, timeout_s=self._options.load_timeout_s)
        if reply is None:
            names = ", ".join(spec.name for spec in specs)
            raise EngineError(f"the engine host died while it loaded {names}{self._log_tail()}")
        return _status(reply[0])

    def score(
        self, engine: str, groups: Sequence[ScoringGroup]
    ) -> list[list[Outcome[TokenLogprobs]]]:
        """Score completions; one that cannot be scored costs no other.

        Args:
            engine: name of a declared engine.
            groups: as for `LogprobEngine.score`.

        Returns:
            One list per group, one outcome per completion, in the given order: float32 log-probs
            in nats, or `ENGINE_ERROR`, `NON_FINITE_LOGPROB` or `ENGINE_DIED_TWICE`.

        Raises:
            EngineError: the engine is not declared or does not load, or the host dies whatever
                it is asked.
        """
        head = self._head("score", engine)

        def ask(part: Sequence[ScoringGroup]) -> list[list[Outcome[TokenLogprobs]]] | None:
            reply = self._ask(head, wire.encode_groups(part))
            return reply and wire.decode_scores(reply[1], part)

        return self._survive(ask, groups) if groups else []

    def generate(
        self, engine: str, requests: Sequence[SamplingRequest]
    ) -> list[list[Outcome[Sample]]]:
        """Sample completions; one outcome per seed, with errors as for `score`."""
        head = self._head("generate", engine)

        def ask(part: Sequence[SamplingRequest]) -> list[list[Outcome[Sample]]] | None:
            reply = self._ask(head, wire.encode_requests(part))
            return reply and wire.decode_samples(reply[1], part)

        return self._survive(ask, requests) if requests else []

    def status(self) -> HostStatus:
        """Ask which engines are loaded; answered at once, also while others load or run."""
        reply = self._ask({"op": "status"}, None)
        if reply is None:
            raise EngineError(f"the engine host died{self._log_tail()}")
        return _status(reply[0])

    def shutdown(self) -> None:
        """End the host, if there is one, after the requests before this one; wait until it is gone."""
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            self._connection = self._connection or _open_connection(self._folder)
            wire.send(self._connection, {"op": "shutdown"})
            while self._connection.recv(4096):
                pass
        self.close()

    def close(self) -> None:
        """Leave the host, which lives on."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def _head(self, op: str, engine: str | None = None) -> Head:
        # Every request carries the set it needs, so a new host needs no introduction.
        if engine is not None and engine not in {spec.name for spec in self._specs}:
            raise EngineError(f"engine {engine} is not declared", fix="call set_engines first")
        return {"op": op, "engine": engine, "engines": [asdict(spec) for spec in self._specs]}

    def _survive(
        self,
        ask: Callable[[Sequence[Group]], list[list[Outcome[Value]]] | None],
        groups: Sequence[Group],
        deaths: int = 0,
    ) -> list[list[Outcome[Value]]]:
        """Ask; when that kills the host, ask group by group, then completion by completion.

        Args:
            ask: gives None when the host died of the question.
            groups: at least one.
            deaths: how often the host has died with these groups in flight.
        """
        outcomes = ask(groups)
        if outcomes is not None:
            return outcomes
        deaths += 1
        self.set_engines(self._specs)  # a host that dies of loading must not be blamed on rows
        if len(groups) > 1:
            return [self._survive(ask, [group], deaths)[0] for group in groups]
        (group,) = groups
        size = wire.num_items(group)
        if size > 1:
            items = [wire.part(group, i, i + 1) for i in range(size)]
            return [[self._survive(ask, [item], deaths)[0][0] for item in items]]
        if deaths == 1:
            return self._survive(ask, groups, deaths)
        return [[Outcome(None, FailReason.ENGINE_DIED_TWICE)]]

    def _ask(
        self, head: Head, table: pa.Table | None, timeout_s: float | None = None
    ) -> tuple[Head, pa.Table] | None:
        """Exchange a request for its reply; None when the host died while it ran the request.

        A request that was still waiting when the host died is sent again.
        """
        while self._deaths_in_a_row < self._options.max_deaths_in_a_row:
            try:
                reply, result = self._exchange(head, table, timeout_s)
            except _HostDied as death:
                self._deaths_in_a_row += 1
                if death.was_running:
                    return None
                continue
            self._deaths_in_a_row = 0
            if "error" in reply:
                raise EngineError(f"{reply['error']}{self._log_tail()}")
            return reply, result
        raise EngineError(
            f"the engine host on {self.device} died {self._deaths_in_a_row} times in a row"
            f"{self._log_tail()}"
        )

    def _exchange(
        self, head: Head, table: pa.Table | None, timeout_s: float | None
    ) -> tuple[Head, pa.Table]:
        self._connection = self._connection or self._open_or_start()
        self._connection.settimeout(timeout_s)
        is_running = False
        try:
            wire.send(self._connection, head, table)
            with self._connection.makefile("rb") as stream:
                while True:
                    reply, result = wire.receive(stream)
                    if not reply.get("running"):
                        return reply, result
                    is_running = True
        except ConnectionError as error:
            self.close()
            raise _HostDied(is_running) from error
        except TimeoutError as error:
            self.close()
            raise EngineError(f"no reply within {timeout_s:.0f} s{self._log_tail()}") from error

    def _open_or_start(self) -> socket.socket:
        while True:
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                return _open_connection(self._folder)
            make_private_folder(self._folder)
            with contextlib.suppress(FileNotFoundError), _start_lock(self._folder) as lock_fd:
                if lock_fd is not None:
                    with contextlib.suppress(ConnectionError, FileNotFoundError):
                        return _open_connection(self._folder)  # started while we waited
                    self._start(lock_fd)

    def _start(self, lock_fd: int) -> None:
        """Start the host and wait until it listens.

        Args:
            lock_fd: the start lock; the host inherits it and lets go when it listens, so that no
                second one starts when this process is killed meanwhile.
        """
        _started[:] = [process for process in _started if process.poll() is None]
        num_threads = self._options.num_threads or _num_cores()
        ready_fd, ready_host_fd = os.pipe()
        arguments = {
            "--folder": self._folder,
            "--owner-pid": self._owner.pid,
            "--owner-start": self._owner.start,
            "--idle-timeout-s": self._options.idle_timeout_s,
            "--num-threads": num_threads,
            "--ready-fd": ready_host_fd,
            "--lock-fd": lock_fd,
        }
        with open(ready_fd, "rb") as ready, (self._folder / LOG).open("ab") as log:
            try:
                process = subprocess.Popen(
                    # -P: the working folder is on the import path only if it is on the worker's.
                    [sys.executable, "-P", "-X", "faulthandler", "-m", "cdr.engines.host"]
                    + [str(word) for pair in arguments.items() for word in pair],
                    env=host_environment(self.device, num_threads, os.environ, sys.path),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(ready_host_fd, lock_fd),
                    start_new_session=True,
                )
            finally:
                os.close(ready_host_fd)
            _started.append(process)
            is_readable, _, _ = select.select([ready], [], [], self._options.start_timeout_s)
            if not is_readable:
                os.killpg(process.pid, signal.SIGKILL)
                what = f"did not start within {self._options.start_timeout_s:.0f} s"
                raise EngineError(f"the engine host on {self.device} {what}{self._log_tail()}")
            if not ready.read(1):
                raise EngineError(
                    f"the engine host on {self.device} died as it started{self._log_tail()}"
                )

    def _log_tail(self) -> str:
        path = self._folder / LOG
        try:
            lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        except FileNotFoundError:
            return ""
        return "\n".join([f"; end of {path}:", *lines])


def host_folder(device: Device, owner: Owner) -> Path:
    """Give the folder of a device's host: the same for all tasks of an executor, and short."""
    key = hashlib.sha256(f"{owner.start} {device}".encode()).hexdigest()[:12]
    name = f"cdr-{os.geteuid()}-{owner.pid}-{key}"
    folder = Path(tempfile.gettempdir()) / name
    is_short = len(os.fsencode(folder / SOCKET)) <= _MAX_SOCKET_PATH_BYTES
    return folder if is_short else Path("/tmp") / name


def host_environment(
    device: Device, num_threads: int, environ: Mapping[str, str], import_path: Sequence[str]
) -> dict[str, str]:
    """Give the environment of a host: the worker's, but for threads, devices and import path."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    return {
        **environ,
        **threads,
        "CUDA_VISIBLE_DEVICES": ",".join(device.ids) if device.kind == "cuda" else "",
        # Spark's addresses are those of nvidia-smi, which counts in this order.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Spark may have put shipped code (--py-files) on the worker's path only.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in import_path),
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def _start_lock(folder: Path) -> Iterator[int | None]:
    """Wait for the folder's start lock; gives None when the folder was replaced meanwhile."""
    lock_fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        is_current = os.path.samestat(os.fstat(lock_fd), os.stat(folder / LOCK))
        yield lock_fd if is_current else None
    finally:
        os.close(lock_fd)


def _open_connection(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(folder / SOCKET))
    except OSError:
        connection.close()
        raise
    return connection


def _num_cores() -> int:
    # The cores this process may run on, where the system tells (Linux); containers limit them.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _status(head: Head) -> HostStatus:
    return HostStatus(head["pid"], tuple(LoadedEngine(**engine) for engine in head["engines"]))
