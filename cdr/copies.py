"""Copies of remote folders: any URI that pyarrow can read, to a folder that appears when complete.

Files go to `NAME.partial`, which is renamed to `NAME` once its content hash is right. What a
killed process left in it is gone on with: files in full size are kept, and if the hash is then
wrong, everything is copied once more.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdr.errors import ModelError
from cdr.node_cache import (
    SET_CACHE,
    logged_progress,
    mark_complete,
    no_space,
    require_space,
    size_of,
)

MARKER = ".cdr-complete.json"
"""In a finished copy: its files and their sizes."""

_CHUNK_BYTES = 8 << 20
_FILES_AT_ONCE = 8

_log = logging.getLogger("cdr.weights")


@dataclass(frozen=True)
class RemoteFolder:
    """The files of a folder that pyarrow can read; sub-folders are left out.

    Args:
        path: as the user wrote it.
        filesystem: pyarrow's.
        root: the folder, as that file system names it.
        sizes: bytes by name.
        times_ns: time of the last change by name.
    """

    path: str
    filesystem: Any
    root: str
    sizes: Mapping[str, int]
    times_ns: Mapping[str, int]

    @classmethod
    def open(cls, path: str) -> RemoteFolder:
        """List a folder.

        Args:
            path: a URI, or an absolute path.

        Raises:
            ModelError: it cannot be read, or is empty.
        """
        from pyarrow import ArrowException, fs

        try:
            # s3a and s3n are Hadoop's names for S3.
            filesystem, root = fs.FileSystem.from_uri(re.sub(r"^s3[an]://", "s3://", path))
            entries = filesystem.get_file_info(fs.FileSelector(root))
        except (OSError, ArrowException) as error:
            raise _unreadable(path, error) from error
        files = {entry.base_name: entry for entry in entries if entry.is_file}
        if not files:
            raise ModelError(f"there are no files in '{path}'", fix="check the path")
        return cls(
            path,
            filesystem,
            root.rstrip("/"),
            {name: entry.size for name, entry in files.items()},
            {name: entry.mtime_ns or 0 for name, entry in files.items()},
        )

    def stream(self, name: str) -> Any:
        """Open a file for reading from its start."""
        return self.filesystem.open_input_stream(f"{self.root}/{name}")

    def listing(self, names: Iterable[str]) -> list[str]:
        """Describe files as their folder lists them; changes when one of them does."""
        return [f"{name}:{self.sizes[name]}:{self.times_ns[name]}" for name in sorted(names)]


def copy_folder(
    remote: RemoteFolder,
    names: Sequence[str],
    target: Path,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Copy files to a folder that appears when it is complete.

    One process at a time; the caller holds the lock.

    Args:
        remote: where they are.
        names: which.
        target: the folder; what is there is replaced.
        check: raises a ModelError when a finished folder's content is wrong.

    Returns:
        Bytes copied.

    Raises:
        ModelError: the source cannot be read, the disk is too full, or the check fails.
    """
    shutil.rmtree(target, ignore_errors=True)  # damaged, or the caller would use it
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(mode=0o700, exist_ok=True)
    kept = {name for name in names if size_of(partial / name) == remote.sizes[name]}
    for file in partial.iterdir():
        if file.name not in kept:
            file.unlink()
    missing = [name for name in names if name not in kept]
    num_bytes = sum(remote.sizes[name] for name in missing)
    require_space(partial, num_bytes, remote.path, fix=SET_CACHE)
    if kept:
        _log.info("going on with a copy of %s: %d files are here", remote.path, len(kept))
    _copy_files(remote, missing, num_bytes, partial)
    try:
        if check is not None:
            check(partial)
    except ModelError:
        shutil.rmtree(partial)
        if not kept:
            raise
        _log.warning("what was left of an earlier copy of %s is damaged; again", remote.path)
        return copy_folder(remote, names, target, check)
    mark_complete(partial / MARKER, partial, names, remote.path)
    partial.rename(target)
    return num_bytes


def _copy_files(remote: RemoteFolder, names: Sequence[str], num_bytes: int, folder: Path) -> None:
    """Copy files, several at once: one stream does not fill a node's network."""
    copied, stop = dict.fromkeys(names, 0), threading.Event()

    def copy_file(name: str) -> None:
        try:
            with remote.stream(name) as stream, (folder / name).open("wb") as file:
                while not stop.is_set() and (chunk := stream.read(_CHUNK_BYTES)):
                    file.write(chunk)
                    copied[name] += len(chunk)
        except BaseException:
            stop.set()  # the others need not go on
            raise

    # The largest first, so that none of them is left alone at the end.
    by_size = sorted(names, key=remote.sizes.__getitem__, reverse=True)
    with (
        logged_progress(remote.path, lambda: sum(copied.values()), num_bytes),
        ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
    ):
        try:
            list(pool.map(copy_file, by_size))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                left = num_bytes - sum(copied.values())
                raise no_space(folder, left, remote.path, fix=SET_CACHE) from error
            raise _unreadable(remote.path, error) from error
        finally:
            stop.set()


def _unreadable(path: str, error: Exception) -> ModelError:
    return ModelError(
        f"'{path}' cannot be read ({str(error).splitlines()[0]})",
        where=socket.gethostname(),
        fix="check the path; for s3:// the driver and every executor need credentials (instance "
        "profile, or AWS_* variables by spark.executorEnv) and, outside AWS, AWS_ENDPOINT_URL",
    )
