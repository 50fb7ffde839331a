"""How often a write is tried, and whose turn it is on one machine."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from delta.exceptions import ConcurrentAppendException, ProtocolChangedException

from cdr.commits import commit
from cdr.errors import TableError

HOLD = """
import fcntl, sys
stream = open(sys.argv[1], "a")
fcntl.lockf(stream, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits after lost races, in seconds; none is really waited for."""
    waits: list[float] = []
    monkeypatch.setattr("cdr.commits.sleep", waits.append)
    return waits


def test_a_write_that_loses_every_time_ends_with_an_error_that_names_the_table(
    waits: list[float],
) -> None:
    lost = [ProtocolChangedException("created"), *[ConcurrentAppendException("added")] * 9]
    left = list(lost)

    def write() -> None:
        raise left.pop(0)

    with pytest.raises(TableError, match="write to the table 'runs'"):
        commit(write, table="runs", max_tries=4)
    assert len(lost) - len(left) == 4
    assert len(waits) == 3
    assert waits == sorted(waits), "each wait is longer than the one before"


def test_a_write_waits_for_another_processs_turn_which_ends_with_that_process(
    tmp_path: Path,
) -> None:
    lock, written = tmp_path / "lock", tmp_path / "written"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    with holder, ThreadPoolExecutor() as pool:
        try:
            assert holder.stdout.readline() == b"held\n"
            writing = pool.submit(commit, written.touch, table="runs", lock=lock)
            with pytest.raises(TimeoutError):
                writing.result(timeout=0.3)
            assert not written.exists()
        finally:
            holder.kill()
        writing.result(timeout=60)
    assert written.exists()
