"""Weights where they are loaded: one complete, checked copy per node, on its local disk.

    python -m cdr.weights checksum PATH_OR_URI      # what a config's `checksum` has to say

A model's files come from one of three places:

    owner/name at a commit      the hub, into the hub's own cache (`cdr.hub`)
    s3://..., /Volumes/...      copied to `<cache>/weights/<checksum>` (`cdr.copies`)
    any other folder            used where it lies

All processes of a node (engine hosts of several executors, say) take turns at a file lock: one
fetches, the others wait and share. Only safetensors, JSON and tokenizer files are taken: other
weight formats can run code. No torch, no Spark; pyarrow and the hub's client are imported where
they are needed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdr.copies import MARKER, RemoteFolder, copy_folder
from cdr.errors import CdrError, ModelError, SetupError
from cdr.node_cache import (
    is_complete,
    locked,
    logged_progress,
    make_cache_dir,
    mark_complete,
    short_hash,
)

if TYPE_CHECKING:
    from cdr.engines.base import EngineSpec

WEIGHT_FILES = ("*.safetensors", "config.json")
"""Files of a model folder that decide its log-probs; the checksum is about these."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""The same of a LoRA adapter's folder."""
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe")
"""Config, tokenizer and chat template."""
TAKEN_FILES = ("*.safetensors", *SMALL_FILES)
"""All that is ever fetched of a model without code of its own."""
CODE_FILES = ("*.py",)
"""Code that comes with a model; fetched, and part of its checksum, only where it is to be run."""

_UNSAFE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NOTED_BYTES = 64 << 20
_SETTLED_S = 2.0
# Network mounts that look like local folders: better read once, in order, than mapped by each host.
_NETWORK_MOUNTS = ("/Volumes/", "/dbfs/")


@dataclass(frozen=True)
class Source:
    """Where the files of a model or an adapter come from.

    Args:
        path: folder, URI or hub id.
        revision: commit hash of a hub id; None for all others.
        checksum: content hash the files must have (`hash_files`); None where it is not known.
        is_adapter: they are a LoRA adapter's.
        has_code: the model's own Python code belongs to them.
    """

    path: str
    revision: str | None = None
    checksum: str | None = None
    is_adapter: bool = False
    has_code: bool = False

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision[:12]}"

    @property
    def decisive_files(self) -> tuple[str, ...]:
        """Patterns of the files that the checksum is about."""
        if self.is_adapter:
            return ADAPTER_FILES
        return WEIGHT_FILES + CODE_FILES * self.has_code

    @property
    def taken_files(self) -> tuple[str, ...]:
        """Patterns of all files that are fetched."""
        return TAKEN_FILES + CODE_FILES * self.has_code


@dataclass(frozen=True)
class Fetched:
    """Files that are on this node's disk.

    Args:
        folder: where.
        bytes_copied: 0 when they were there already.
        seconds: how long it took, waiting for another process included.
        is_verified: their content hash was computed and is the source's checksum. That happens
            when a copy is made; later calls rely on it unless they are told to verify.
    """

    folder: str
    bytes_copied: int
    seconds: float
    is_verified: bool


def is_uri(path: str) -> bool:
    """Tell a URI (`s3://bucket/prefix`) from a path or a hub id."""
    return "://" in path


def is_copied(path: str) -> bool:
    """Tell whether a source is copied to local disk: a URI, or a folder on a network mount."""
    return is_uri(path) or path.startswith(_NETWORK_MOUNTS)


# --- what engine hosts and workers call -----------------------------------------------------------


def list_sources(spec: EngineSpec) -> list[Source]:
    """Give the sources of an engine's files: the model, then its adapter; none without weights."""
    if spec.engine in ("stub", "api"):
        return []
    sources = [Source(spec.path, spec.revision, spec.checksum, has_code=spec.custom_code)]
    if spec.adapter_path is not None:
        sources.append(
            Source(spec.adapter_path, spec.adapter_revision, spec.adapter_checksum, is_adapter=True)
        )
    return sources


def may_be_fetched(spec: EngineSpec) -> bool:
    """Tell whether files may have to come from elsewhere before the engine can load."""
    return any(s.revision is not None or is_copied(s.path) for s in list_sources(spec))


def make_local(spec: EngineSpec) -> EngineSpec:
    """Bring an engine's files to this node, and give the spec with local folders in it.

    Raises:
        ModelError: as for `fetch`.
    """
    folders = [fetch(source).folder for source in list_sources(spec)]
    if not folders:
        return spec
    adapter_path = folders[1] if len(folders) > 1 else None
    return replace(
        spec, path=folders[0], revision=None, adapter_path=adapter_path, adapter_revision=None
    )


def fetch(source: Source, *, verify: bool = False) -> Fetched:
    """Bring all files of a source to this node's disk, unless they are there.

    Args:
        source: where they come from.
        verify: compute the content hash also of files that are there; reads all of them.

    Raises:
        ModelError: the source cannot be had, has no safetensors, does not fit on the disk, or is
            not what its checksum says.
        SetupError: the cache cannot be written to.
    """
    begin = time.monotonic()
    is_verified = False
    if source.revision is not None:
        folder, bytes_copied = _fetch_snapshot(source, source.taken_files, is_patient=True)
        require_safetensors(list_names(str(folder)), source)
        verify = verify or bytes_copied > 0
    elif is_copied(source.path):
        folder, bytes_copied = _fetch_copy(source)
        is_verified = bytes_copied > 0
    else:
        folder, bytes_copied = Path(source.path), 0
        require_safetensors(list_names(source.path), source)
    if verify and not is_verified and source.checksum is not None:
        check_content(source, folder)
        is_verified = True
    return Fetched(str(folder), bytes_copied, time.monotonic() - begin, is_verified)


def fetch_small_files(path: str, revision: str | None, *, is_patient: bool = True) -> Path:
    """Bring config, tokenizer and chat template to this node; never weights.

    Cheap enough for the driver and for Python workers. What is behind a URI is copied again when
    its listing (names, sizes, times) has changed.

    Args:
        path: folder, URI or hub id.
        revision: commit hash of a hub id; None for all others.
        is_patient: try again for a while where the hub cannot be reached; see `cdr.hub`.

    Raises:
        ModelError: the source cannot be had.
        SetupError: the cache cannot be written to.
    """
    if revision is not None:
        return _fetch_snapshot(Source(path, revision), SMALL_FILES, is_patient=is_patient)[0]
    if not is_copied(path):
        list_names(path)
        return Path(path)
    remote = RemoteFolder.open(path)
    names = _matching(remote.sizes, SMALL_FILES)
    target = make_cache_dir("small-files") / short_hash(path, *remote.listing(names))
    with locked(target):
        if not is_complete(target / MARKER, target):
            copy_folder(remote, names, target)
    return target


def _fetch_snapshot(
    source: Source, patterns: tuple[str, ...], *, is_patient: bool
) -> tuple[Path, int]:
    """Give the folder of a hub id's files and the bytes that came.

    A finished snapshot is noted beside its lock, so that later calls ask the hub nothing.
    """
    from cdr import hub

    assert source.revision is not None
    key = short_hash(hub.cache_folder(), source.path, source.revision, *patterns)
    note = make_cache_dir("weights") / f"hub-{key}"
    with locked(note):
        folder = hub.snapshot_folder(source.path, source.revision)
        if is_complete(note, folder):
            return folder, 0
        with logged_progress(str(source), partial(hub.count_bytes, source.path)) as count:
            folder = hub.download_snapshot(
                source.path, source.revision, patterns, is_patient=is_patient
            )
            bytes_copied = count()
        mark_complete(note, folder, _matching(list_names(str(folder)), patterns), str(source))
        return folder, bytes_copied


def _fetch_copy(source: Source) -> tuple[Path, int]:
    if source.checksum is None:
        raise ModelError(
            f"'{source}' has no checksum, so that a copy of it could not be checked",
            fix=f"print it with: {checksum_command(source.path)}",
        )
    # Named by content: places that hold the same weights share a copy.
    target = make_cache_dir("weights") / source.checksum
    with locked(target):
        if is_complete(target / MARKER, target):
            return target, 0
        remote = RemoteFolder.open(source.path)
        require_safetensors(remote.sizes, source)
        names = _matching(remote.sizes, source.taken_files)
        return target, copy_folder(remote, names, target, partial(check_content, source))


# --- content --------------------------------------------------------------------------------------


def hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hash names and contents of a folder's files that match; sha256 hex."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return _hash_streams((f.name, f.stat().st_size, partial(f.open, "rb")) for f in sorted(files))


def hash_source(source: Source) -> str:
    """Hash a source's decisive files where they lie: what `checksum` in a config has to say.

    Raises:
        ModelError: as for `fetch`.
    """
    if source.revision is not None or not is_copied(source.path):
        return _hash_folder(Path(fetch(source).folder), source.decisive_files)
    remote = RemoteFolder.open(source.path)
    require_safetensors(remote.sizes, source)
    names = sorted(_matching(remote.sizes, source.decisive_files))
    return _hash_streams((n, remote.sizes[n], partial(remote.stream, n)) for n in names)


def _hash_folder(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hash as `hash_files` does, large files once per node.

    A registered reward is planned by every task of a Spark function, and may be of gigabytes. The
    hash is noted under names, sizes and times, unless a file was written this moment: another write
    might then leave the same times.
    """
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    stats = [(file.name, file.stat()) for file in files]
    is_settled = all(time.time() - s.st_mtime > _SETTLED_S for _, s in stats)
    if sum(s.st_size for _, s in stats) < _NOTED_BYTES or not is_settled:
        return hash_files(folder, patterns)
    listing = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    try:
        note = make_cache_dir("checksums") / short_hash(folder.resolve(), *listing)
    except SetupError:  # nowhere to note it
        return hash_files(folder, patterns)
    with contextlib.suppress(OSError):
        return note.read_text(encoding="utf-8")
    found = hash_files(folder, patterns)
    with contextlib.suppress(OSError):
        unfinished = note.with_name(f"{note.name}.{os.getpid()}")
        unfinished.write_text(found, encoding="utf-8")
        unfinished.rename(note)
    return found


def check_content(source: Source, folder: Path) -> None:
    """Compare the content of a source's files with its checksum.

    Raises:
        ModelError: they differ; names both.
    """
    found = hash_files(folder, source.decisive_files)
    if found != source.checksum:
        raise wrong_checksum(source, found, folder)


def wrong_checksum(source: Source, found: str, folder: object) -> ModelError:
    """Make the error of files that are not what their source's checksum says."""
    return ModelError(
        f"'{source}' has checksum {found}, expected {source.checksum}",
        where=f"{folder} on {socket.gethostname()}",
        fix="its files have changed or are damaged; if the change is meant, put the new checksum "
        "into the config, and everything is scored anew",
    )


def list_names(path: str) -> list[str]:
    """List the files of a folder or URI by name, in order.

    Raises:
        ModelError: it is not here, or cannot be read.
    """
    if is_copied(path):
        return sorted(RemoteFolder.open(path).sizes)
    try:
        return sorted(entry.name for entry in Path(path).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"no such folder '{path}'",
            where=socket.gethostname(),
            fix="every node needs it under this path: put it on a mount that all share or on S3, "
            "or name a hub id with its revision",
        ) from None


def require_safetensors(names: Iterable[str], source: Source) -> None:
    """Refuse a source that lacks its config or has no safetensors.

    Raises:
        ModelError: says what is missing.
    """
    names = list(names)
    missing = [p for p in sorted(source.decisive_files) if not _matching(names, [p])]
    if not missing:
        return
    what = f"'{source}' lacks {' and '.join(missing)}"
    pickled = _matching(names, _UNSAFE_FILES)
    if pickled:
        raise ModelError(
            f"{what}; {', '.join(pickled[:3])} is not loaded, because pickled weights can run code",
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(FOLDER) writes safetensors",
        )
    raise ModelError(what, fix="check the path; it must be the model's own folder")


def checksum_command(path: str) -> str:
    """Give the command that prints a source's checksum."""
    return f"python -m cdr.weights checksum {path}"


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def _hash_streams(files: Iterable[tuple[str, int, Callable[[], Any]]]) -> str:
    """Hash files given as name, size in bytes, and what opens them."""
    digest = hashlib.sha256()
    for name, size, open_file in files:
        digest.update(f"{name}:{size}:".encode())
        with open_file() as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# --- command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m cdr.weights")
    commands = parser.add_subparsers(dest="command", required=True)
    checksum = commands.add_parser("checksum", help="print what a config's checksum has to say")
    checksum.add_argument("path", help="folder, URI or hub id of a model or a LoRA adapter")
    checksum.add_argument("--revision", help="commit hash of the hub id")
    checksum.add_argument(
        "--custom-code", action="store_true", help="with the model's own code, for custom_code"
    )
    fetching = commands.add_parser("fetch", help="fetch to this node: what jobs/warm_up.py runs")
    fetching.add_argument("source", type=json.loads, help="JSON of a Source")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if args.command == "fetch":
            print(json.dumps(asdict(fetch(Source(**args.source), verify=True))))
        else:
            print("\n".join(_checksum_lines(args.path, args.revision, args.custom_code)))
    except CdrError as error:
        if args.command == "fetch":
            print(json.dumps({"error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _checksum_lines(path: str, revision: str | None, has_code: bool) -> Iterator[str]:
    """Give lines for a config, by what there is: a model, an adapter, or both in one folder."""
    folder = path if revision is None else str(fetch_small_files(path, revision))
    names = list_names(folder)
    is_adapter = "adapter_config.json" in names
    if "config.json" in names or not is_adapter:
        yield f'checksum: "{hash_source(Source(path, revision, has_code=has_code))}"'
    if is_adapter:
        yield f'adapter_checksum: "{hash_source(Source(path, revision, is_adapter=True))}"'


if __name__ == "__main__":
    sys.exit(main())
