"""One start at a time in a folder, and programs as its child processes, which end with it."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from cdr.cli import KEPT
from cdr.errors import SetupError, Stopped

_logger = logging.getLogger(__name__)

_BEGINS = "\n--- started at "
_TAIL_LINES = 6
_POLL_S = 0.2
_GRACE_S = 10.0


def search_path() -> str:
    """Give the PATH of child processes: this Python's folder has the programs it came with."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@contextlib.contextmanager
def work_alone(folder: Path) -> Iterator[IO[str]]:
    """Let one start at a time work in a folder.

    Args:
        folder: its file `lock` names the processes. Children that inherit the file hold the lock
            too: one that outlives a killed start keeps others out.

    Raises:
        SetupError: another one is at work.
    """
    file = folder / "lock"
    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            processes = stream.read().strip() or "?"
            raise SetupError(
                "another start, or what it left behind, is still at work in this folder",
                where=str(folder),
                fix="wait for it, or end it and give the same command again; it is of these "
                f"processes: {processes}",
            ) from None
        except OSError as error:  # some network file systems have no locks
            _logger.warning("%s cannot be locked, see that it is worked in once: %s", folder, error)
        _name_processes(stream, os.getpid())
        yield stream


def _name_processes(stream: IO[str], *processes: int) -> None:
    stream.truncate(0)
    stream.write(" ".join(map(str, processes)))
    stream.flush()


class Children:
    """Runs child processes, one at a time, and hands them the signals that this process gets.

    They have sessions of their own: a terminal's Ctrl-C would else reach them twice.

    Args:
        lock: inherited by all of them.

    Attributes:
        stopped: the signal that came; None so far.
    """

    def __init__(self, lock: IO[str]) -> None:
        self.stopped: str | None = None
        self._lock = lock
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command to its end; give its exit code, negative for a signal.

        Args:
            command: program and arguments.
            log: file to which all that it says is added.

        Raises:
            SetupError: there is no such program.
        """
        # A JVM that started this process is not the children's.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYSPARK_GATEWAY_")}
        environment["PATH"] = search_path()
        with log.open("ab") as stream:
            stream.write(f"{_BEGINS}{dt.datetime.now(dt.UTC):%F %T} UTC\n".encode())
            stream.flush()
            try:
                self._child = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(self._lock.fileno(),),
                )
            except OSError as error:
                raise SetupError(
                    f"cannot be run: {error.strerror or error}",
                    where=command[0],
                    fix="correct launch.spark and launch.train",
                ) from None
            _name_processes(self._lock, os.getpid(), self._child.pid)
            if self.stopped:  # it came while the child was being made
                self._child.send_signal(signal.SIGTERM)
            return self._child.wait()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stopped is None:
            print(f"\nstopping the stage in good order. {KEPT}", flush=True)
        self.stopped = signal.Signals(number).name
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)


def run_program(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    says: str,
    log: Path,
    stop: Callable[[], str | None],
) -> int:
    """Run a program that knows no signals of ours, alone in its folder; give its exit code.

    Args:
        command: program and arguments.
        folder: where it works. One that outlives a killed job keeps the next one out.
        environment: all its variables.
        says: what it is told on standard input.
        log: file that gets all it says, in place of what was said before.
        stop: says why to end it; None to go on.

    Raises:
        SetupError: another one is at work in the folder.
        OSError: there is no such program.
        Stopped: `stop` said so, and the program has ended.
    """
    with work_alone(folder) as lock, log.open("wb") as stream, tempfile.TemporaryFile() as told:
        told.write(says.encode())
        told.seek(0)
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=told,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
        _name_processes(lock, os.getpid(), child.pid)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(_POLL_S)
                if reason := stop():
                    raise Stopped(reason)
        except BaseException:
            _end_session(child)
            raise


def _end_session(leader: subprocess.Popen[bytes]) -> None:
    """End the processes of a session whose leader runs, in good order those that can."""
    os.killpg(leader.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # its children, and itself where it hangs
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def last_lines(log: Path) -> list[str]:
    """Give the last lines of a log's last start, from what a job says of its own failure on."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition(_BEGINS)[2]
    said = [line for line in text.splitlines()[1:] if line.strip()]
    errors = [place for place, line in enumerate(said) if line.startswith("error: ")]
    return said[errors[-1] :][:_TAIL_LINES] if errors else said[-_TAIL_LINES:]
