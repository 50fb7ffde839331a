"""Which device a task may use: Spark's addresses, else a claimed CUDA device, else the CPU.

Spark hands GPU addresses to tasks, not to Python workers, and sets no CUDA_VISIBLE_DEVICES. Where
it hands out none (single node, no GPU scheduling), tasks share the machine's devices by file locks.
Nothing here imports torch: a worker that did would hold a CUDA context of its own.

Known limit: the locks are held by tasks, not by engine hosts. Several executors on one node
without GPU scheduling may each end up with a host on the same device; set
`spark.executor.resource.gpu.amount` there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdr.errors import SetupError

_CLAIM_POLL_S = 0.25


@dataclass(frozen=True)
class Device:
    """What one engine host runs on.

    Args:
        kind: `cuda`, or `cpu` for all cores.
        ids: CUDA addresses, sorted; several for tensor parallelism, none for the CPU.
    """

    kind: Literal["cuda", "cpu"]
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.kind, ",".join(self.ids)] if self.ids else [self.kind])


def task_gpu_addresses() -> tuple[str, ...]:
    """Give the GPU addresses of the Spark task this code runs in; empty when there are none."""
    from pyspark import TaskContext  # clusters bring it; nothing else here needs Spark

    task = TaskContext.get()
    gpu = task.resources().get("gpu") if task else None
    return tuple(gpu.addresses) if gpu else ()


def visible_cuda_devices(
    environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")
) -> tuple[str, ...]:
    """Give the CUDA devices this process may use: CUDA_VISIBLE_DEVICES, else `/dev/nvidia<n>`."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        ids = (entry.strip() for entry in environ["CUDA_VISIBLE_DEVICES"].split(","))
        return tuple(entry for entry in ids if entry not in ("", "-1"))
    nodes = (re.fullmatch(r"nvidia(\d+)", node.name) for node in dev.glob("nvidia*"))
    return tuple(str(index) for index in sorted(int(node[1]) for node in nodes if node))


@contextlib.contextmanager
def claim_device(
    addresses: Sequence[str], visible: Sequence[str], lock_folder: Path | None = None
) -> Iterator[Device]:
    """Hold a device for the life of a task.

    Args:
        addresses: what Spark gave this task (`task_gpu_addresses`); all of them are one device.
        visible: the machine's CUDA devices (`visible_cuda_devices`), claimed one per task where
            Spark gave nothing; waits until one is free.
        lock_folder: where the locks are; None for one folder per user and machine, shared by all
            executors.

    Yields:
        The device; the CPU, shared by all tasks, where there is nothing else.
    """
    if addresses:
        yield Device("cuda", tuple(sorted(set(addresses))))
    elif visible:
        folder = lock_folder or Path(tempfile.gettempdir()) / f"cdr-{os.geteuid()}-devices"
        make_private_folder(folder)
        with contextlib.ExitStack() as claim:
            # One waiter at a time looks for a free device, the others sleep at the gate.
            with _lock(folder / "gate"):
                while (claimed := _claim_free(claim, folder, visible)) is None:
                    time.sleep(_CLAIM_POLL_S)
            yield Device("cuda", (claimed,))
    else:
        yield Device("cpu")


def make_private_folder(folder: Path) -> None:
    """Make a folder only this user can enter, or check that it is one.

    Raises:
        SetupError: the place is taken by something another user could have put there.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SetupError(
            "the folder for engine hosts must be a directory of this user with mode 0700",
            where=str(folder),
            fix="remove it, or point TMPDIR to a folder of your own",
        )


def _claim_free(claim: contextlib.ExitStack, folder: Path, visible: Sequence[str]) -> str | None:
    for address in visible:
        # Addresses may be UUIDs or MIG names: hashed, they are file names of one length.
        name = hashlib.sha256(address.encode()).hexdigest()[:16]
        with contextlib.suppress(BlockingIOError):
            claim.enter_context(_lock(folder / name, fcntl.LOCK_NB))
            return address
    return None


@contextlib.contextmanager
def _lock(path: Path, flags: int = 0) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
