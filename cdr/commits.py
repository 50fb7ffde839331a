"""Writes to Delta that lost a race against another run's are made again.

Delta's writers are optimistic: a write looks at the table, makes its files, and commits if what it
looked at still stands; else it fails and no version ever names its files. Runs share tables, and
`runs` holds rows of all of them in the same files, so losing such a race is a part of ordinary
life. Doing it again is right for the writes of this package, because none of them depends on what
the table held before:

- An append does not look at other rows. It loses only when the table itself was created or changed
  meanwhile, so each try has to look at the table anew.
- A replace deletes whatever rows have its key and puts its own in their place. Made after the other
  run's commit, it leaves what the two runs one after the other would have left.

A write that was computed from the rows it replaces (a counter, say) must not come through here: its
rows would be those of before the race.

On a local disk no race is lost. Delta commits by a rename that has to fail when the version is
there already, and on a disk it does not (https://github.com/delta-io/connectors/issues/489): of two
processes that commit at the same instant one would wipe out the other's commit, and both would
report success. So there the writers of a table take turns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep

from pyspark.errors import PySparkException

from cdr.errors import TableError

MAX_TRIES = 8
"""Times a write is tried; the waits between add up to 13 to 26 s, a small commit takes one."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0

# Some network file systems cannot lock; one run at a time is all that they allow.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}

# A platform with a Delta of its own raises other classes, under these conditions all the same.
_LOST_RACE_CONDITIONS = {
    "DELTA_CONCURRENT_APPEND",
    "DELTA_CONCURRENT_DELETE_DELETE",
    "DELTA_CONCURRENT_DELETE_READ",
    "DELTA_CONCURRENT_TRANSACTION",
    "DELTA_CONCURRENT_WRITE",
    "DELTA_METADATA_CHANGED",
    "DELTA_PROTOCOL_CHANGED",
    # Another run created the table between this one's look and its own creation.
    "DELTA_TABLE_ALREADY_EXISTS",
    # Or is about to: its folder is there, its commit is not yet.
    "DELTA_CREATE_TABLE_WITH_NON_EMPTY_LOCATION",
    "TABLE_OR_VIEW_ALREADY_EXISTS",
}


def commit(
    write: Callable[[], None], *, table: str, lock: Path | None = None, max_tries: int = MAX_TRIES
) -> None:
    """Make a write that does not depend on the table's rows, again when it lost a race.

    Args:
        write: looks at the table anew, and commits once or not at all.
        table: its name, for the error.
        lock: file that the processes of this machine take turns by; None where commits are atomic.
        max_tries: tries in all.

    Raises:
        TableError: the last try lost as well. Other errors of `write` pass through at once.
    """
    # Delta's exceptions reach Python as such only once this is imported, even if not by name.
    import delta.exceptions  # noqa: F401

    for tries in range(1, max_tries + 1):
        try:
            with _turn(lock):
                write()
        except Exception as error:
            if not lost_race(error):
                raise
            if tries == max_tries:
                reason, _, _ = str(error).partition("\n")
                raise TableError(
                    f"other runs were faster to write to the table '{table}', {tries} times: "
                    f"{reason}",
                    fix="run again: what was committed before is kept",
                ) from error
        else:
            return
        # Jitter: two writers that lost to a third must not meet again.
        wait_s = min(_FIRST_WAIT_S * 2 ** (tries - 1), _LONGEST_WAIT_S)
        sleep(wait_s * random.uniform(0.5, 1.0))


@contextlib.contextmanager
def _turn(lock: Path | None) -> Iterator[None]:
    """Wait for this process's turn, which ends with the context, or with the process."""
    if lock is None:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        try:
            # Between processes only: the threads of one share the lock, and Delta sees to them.
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
        yield


def lost_race(error: BaseException) -> bool:
    """Tell whether a write failed, without a trace, because another one was committed first."""
    from delta import exceptions

    classes = (
        exceptions.ConcurrentAppendException,
        exceptions.ConcurrentDeleteDeleteException,
        exceptions.ConcurrentDeleteReadException,
        exceptions.ConcurrentTransactionException,
        exceptions.ConcurrentWriteException,
        exceptions.DeltaConcurrentModificationException,
        exceptions.MetadataChangedException,
        exceptions.ProtocolChangedException,
    )
    condition = (_condition(error) or "").partition(".")[0]
    return isinstance(error, classes) or condition in _LOST_RACE_CONDITIONS


def _condition(error: BaseException) -> str | None:
    """Give the name of Spark's error condition, as in `DELTA_CONCURRENT_APPEND.WITHOUT_HINT`."""
    if isinstance(error, PySparkException):
        # Spark 3.5 has only the older name, of which newer versions warn.
        get = getattr(error, "getCondition", None) or error.getErrorClass
        return get()
    return None
