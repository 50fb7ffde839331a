"""This node's cache folder: who may write to it, when what is in it is complete, what fits.

The folder is `$CDR_CACHE`, else `~/.cache/cdr`. Processes of one node that want the same thing
take its lock in turn: the first makes it and marks it complete, the others find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cdr.errors import ModelError, SetupError

SET_CACHE = (
    "set CDR_CACHE to a folder on a local disk with room, for the driver and for the executors "
    "(spark.executorEnv.CDR_CACHE)"
)
"""What to do when the cache is too small."""

_PROGRESS_S = 5.0

_log = logging.getLogger("cdr.weights")


def resolve_cache_dir() -> Path:
    """Give the folder for what can be made again: `$CDR_CACHE`, else `~/.cache/cdr`."""
    return Path(os.environ.get("CDR_CACHE") or "~/.cache/cdr").expanduser()


def make_cache_dir(name: str) -> Path:
    """Give a folder in the cache; what is made here is made for this user alone.

    Raises:
        SetupError: the place cannot be written to.
    """
    root = resolve_cache_dir()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        folder = root / name
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"the cache folder cannot be made ({error.strerror})",
            where=f"{root} on {socket.gethostname()}",
            fix=SET_CACHE,
        ) from error
    return folder


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the node's lock of a target; waits for another process that makes it."""
    # Never removed: a waiting process would then hold the lock of a file nobody else finds.
    with target.with_name(f"{target.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process, which makes %s", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mark_complete(marker: Path, folder: Path, names: Iterable[str], source: str) -> None:
    """Note that files of a folder are complete.

    Args:
        marker: the note.
        folder: where the files are.
        names: the files.
        source: where they came from, for people who look.
    """
    files = {name: (folder / name).stat().st_size for name in names}
    unfinished = marker.with_name(f"{marker.name}.new")
    unfinished.write_text(json.dumps({"source": source, "files": files}), encoding="utf-8")
    unfinished.rename(marker)


def is_complete(marker: Path, folder: Path) -> bool:
    """Tell whether all files that a marker names are in the folder in full size."""
    try:
        files = json.loads(marker.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(size_of(folder / name) == size for name, size in files.items())


def size_of(file: Path) -> int | None:
    """Give a file's size in bytes; None when there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return None


def short_hash(*parts: object) -> str:
    """Hash the texts of some values, to name a file after them; 32 hex digits."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]


def require_space(folder: Path, num_bytes: int, what: str, *, fix: str) -> None:
    """Refuse to begin what does not fit on the disk.

    Args:
        folder: an existing folder on the disk.
        num_bytes: what will be written.
        what: the model, for the message.
        fix: what to do, for the message.

    Raises:
        ModelError: says what is needed, what is free, and where.
    """
    if num_bytes > shutil.disk_usage(folder).free:
        raise no_space(folder, num_bytes, what, fix=fix)


def no_space(folder: Path, num_bytes: int, what: str, *, fix: str) -> ModelError:
    """Make the error of a full disk; see `require_space`."""
    free = shutil.disk_usage(folder).free
    return ModelError(
        f"the disk is too full for '{what}': it needs {format_gib(num_bytes)} GiB more, "
        f"there are {format_gib(free)} GiB",
        where=f"{folder} on {socket.gethostname()}",
        fix=fix,
    )


def format_gib(num_bytes: float) -> str:
    """Write a number of bytes in GiB."""
    return f"{num_bytes / 2**30:,.2f}"


@contextlib.contextmanager
def logged_progress(
    what: str, count: Callable[[], int], total: int | None = None
) -> Iterator[Callable[[], int]]:
    """Log how many bytes have come, every few seconds.

    Args:
        what: what is being fetched.
        count: gives the bytes there are.
        total: bytes to come; None where that is not known.

    Yields:
        What gives the bytes that have come meanwhile.
    """
    done, begin, before = threading.Event(), time.monotonic(), count()

    def come() -> int:
        return count() - before

    def report() -> None:
        while not done.wait(_PROGRESS_S):
            rate = come() / (time.monotonic() - begin)
            of = "" if total is None else f" of {format_gib(total)}"
            _log.info("fetching %s: %s%s GiB, %.0f MB/s", what, format_gib(come()), of, rate / 1e6)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield come
    finally:
        done.set()
        thread.join()
    seconds = time.monotonic() - begin
    _log.info("fetched %s: %s GiB in %.1f s", what, format_gib(come()), seconds)
