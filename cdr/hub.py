"""Snapshots of the Hugging Face hub: a pinned commit in the hub's own cache, or why it is not.

Models, by `cdr.weights`; and the Parquet files of a data set's split.

Endpoint, token, cache and offline mode are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN,
HF_HOME, HF_HUB_OFFLINE. `cdr.weights` decides which files, and that one process at a time asks.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from cdr.errors import ModelError
from cdr.node_cache import require_space

_SET_TOKEN = (
    "set HF_TOKEN for the driver and for the executors (spark.executorEnv.HF_TOKEN; on Databricks "
    "a cluster variable that reads a secret)"
)
# Sub-folders (other formats), and a second copy of the weights in the format of Mistral's library.
_LEFT_OUT = ("*/*", "consolidated*")
_SET_HOME = (
    "set HF_HOME to a folder on a disk with room, for the driver and for the executors "
    "(spark.executorEnv.HF_HOME)"
)
_ELSEWHERE = "or put the model on S3 or a shared folder and name that in the config"

_LOOK_UP_TIMEOUT_S = 10.0
# A hub that could not be reached is not asked again for so long: a plan finds that out once, not
# for each of its models.
_OUTAGE_S = 60.0
_outage: tuple[float, Exception] | None = None


def cache_folder() -> Path:
    """Give the folder in which huggingface_hub keeps what it has downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot_folder(repo: str, revision: str) -> Path:
    """Give the folder of a commit's files, whether or not they are there."""
    return _repo_folder(repo) / "snapshots" / revision


def count_bytes(repo: str) -> int:
    """Count the bytes there are of a model, of any commit, half files included."""
    total = 0
    for file in (_repo_folder(repo) / "blobs").glob("*"):
        with contextlib.suppress(OSError):  # renamed when it is complete
            total += file.stat().st_size
    return total


def download_snapshot(
    repo: str, revision: str, patterns: Sequence[str], *, is_patient: bool
) -> Path:
    """Download the files of a commit that match; those in the cache are not asked for.

    Args:
        repo: hub id.
        revision: commit hash.
        patterns: names of files, not in sub-folders.
        is_patient: where the hub cannot be reached, try again for half a minute, and see first
            whether there is room; for weights. False: what the cache has, or an error at once.

    Raises:
        ModelError: the model is gated, missing or has no such commit, the hub cannot be reached
            and the cache lacks it, or the disk is too full.
    """
    from huggingface_hub import snapshot_download

    outage = None
    if is_patient:
        _require_space(repo, revision, patterns)
    else:
        outage = _find_outage(repo, revision, "model")
    try:
        with _without_bars():
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_LEFT_OUT),
                local_files_only=outage is not None,
            )
    except Exception as error:
        raise _explain(outage or error, repo, revision) from error
    return Path(folder)


def download_split(repo: str, revision: str, split: str) -> list[Path]:
    """Download the Parquet files of a data set's split, on the driver.

    Args:
        repo: hub id of the data set.
        revision: commit hash.
        split: name of the split; its files are `SPLIT-*.parquet`, in any folder.

    Returns:
        The files in order, at least one.

    Raises:
        ModelError: as for `download_snapshot`, or the commit has no such split.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
    outage = _find_outage(repo, revision, "dataset")
    try:
        with _without_bars():
            folder = snapshot_download(
                repo,
                revision=revision,
                repo_type="dataset",
                allow_patterns=patterns,
                local_files_only=outage is not None,
            )
    except Exception as error:
        raise _explain(outage or error, repo, revision, kind="data set") from error
    files = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
    if not files:
        raise ModelError(
            f"the data set '{repo}' has no Parquet files of the split '{split}'",
            where=f"{repo}@{revision}",
            fix="name one of its splits, or export it to a file and name that",
        )
    return files


def _repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def _find_outage(repo: str, revision: str, repo_type: str) -> Exception | None:
    """Ask the hub about a repository, once; give the error of a hub that does not answer.

    The client itself tries five times, for 23 s, and logs each of them.
    """
    global _outage
    from huggingface_hub import HfApi

    if _outage is not None and time.monotonic() - _outage[0] < _OUTAGE_S:
        return _outage[1]
    _outage = None
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=_LOOK_UP_TIMEOUT_S)
    except ValueError:
        return None  # about this repository's name; the download says so
    except Exception as error:
        # The classes raised here depend on the client's version; a refusal is an answer.
        if getattr(error, "response", None) is None:
            _outage = time.monotonic(), error
            return error
    return None


def _require_space(repo: str, revision: str, patterns: Sequence[str]) -> None:
    """Refuse a download that does not fit, where the hub tells the sizes."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception:
        # Also when there is no network: what the cache has may do. The download itself finds that
        # out and says what is wrong; the classes raised here depend on the client's version.
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    here = snapshot_folder(repo, revision)
    needed = sum(
        size
        for name, size in sizes.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in _LEFT_OUT)
        and not (here / name).exists()
    )
    cache = cache_folder()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_space(cache, needed, repo, fix=_SET_HOME)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the hub's progress bars out of logs; `cdr.weights` logs progress in lines."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _explain(error: Exception, repo: str, revision: str, *, kind: str = "model") -> ModelError:
    """Say what a user can do about an error of the hub's client."""
    from huggingface_hub import constants, errors, get_token

    endpoint, is_model = constants.ENDPOINT, kind == "model"
    page = f"{endpoint}/{repo}" if is_model else f"{endpoint}/datasets/{repo}"
    elsewhere = _ELSEWHERE if is_model else "or put its files elsewhere and name that in the config"
    known = "the token of HF_TOKEN" if get_token() else "this process, which has no token,"
    status = getattr(getattr(error, "response", None), "status_code", None)
    where = f"{repo}@{revision}"
    command = f"hf download {repo} --revision {revision}"
    command += "" if is_model else " --repo-type dataset"

    def model_error(what: str, fix: str) -> ModelError:
        return ModelError(what, where=where, fix=fix)

    if isinstance(error, errors.GatedRepoError):
        return model_error(
            f"the {kind} '{repo}' is gated, and {known} has no access",
            f"accept its licence at {page} with the token's account, and {_SET_TOKEN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return model_error(
            f"the {kind} '{repo}' has no commit {revision}",
            f"look the commit up at {page}/commits/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return model_error(
            f"there is no {kind} '{repo}' at {endpoint}, or it is private and {known} may not see "
            "it",
            f"check the name; for a private {kind} {_SET_TOKEN}",
        )
    if status in (401, 403):
        return model_error(
            f"{endpoint} refuses {known} ({status})",
            f"make a token that may read '{repo}', and {_SET_TOKEN}",
        )
    if status is not None:
        return model_error(
            f"{endpoint} answered {status} when asked for '{repo}'",
            f"try again later, {elsewhere}",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return model_error(f"the disk of {cache_folder()} is full", _SET_HOME)
    if constants.HF_HUB_OFFLINE:
        return model_error(
            f"HF_HUB_OFFLINE is set, and the cache {cache_folder()} lacks files of '{repo}'",
            f"fill the cache of every node ({command}), unset HF_HUB_OFFLINE, {elsewhere}",
        )
    return model_error(
        f"{endpoint} cannot be reached ({type(error).__name__}), and the cache {cache_folder()} "
        f"lacks files of '{repo}'",
        f"check this node's network and proxy (HTTPS_PROXY, HF_ENDPOINT), {elsewhere}",
    )
