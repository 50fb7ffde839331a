"""Which device a task may use: Spark's addresses, else a claimed CUDA device, else the CPU.

The CPU only where it may be meant: on one machine, or because the config says so.

Spark hands GPU addresses to tasks, not to Python workers, and sets no CUDA_VISIBLE_DEVICES. Where
it hands out none (single node, no GPU scheduling), tasks share the machine's devices by file locks,
and a device belongs to the executor that took it first for as long as that executor lives: its
models stay on the device between tasks. Nothing here imports torch: a worker that did would hold a
CUDA context of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cdr.engines.owner import Owner, find_owner
from cdr.errors import SetupError

DeviceChoice = Literal["auto", "gpu", "cpu"]
"""What engines run on: GPUs, else the CPU; GPUs; the CPU."""

_CLAIM_POLL_S = 0.25
_FOREIGN_GRACE_S = 10.0  # an executor that is being replaced may need this long to end


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

    def overlaps(self, other: Device) -> bool:
        """Tell whether two devices share an address, without being the same device."""
        shared = set(self.ids) & set(other.ids)
        return self.kind == other.kind and self != other and bool(shared)


def task_gpu_addresses() -> tuple[str, ...]:
    """Give the GPU addresses of the Spark task this code runs in; empty when there are none."""
    try:
        from pyspark import TaskContext  # clusters bring it; nothing else here needs Spark
    except ImportError:
        return ()  # a process that has no Spark is no task's

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
    addresses: Sequence[str],
    visible: Sequence[str],
    owner: Owner | None = None,
    *,
    num_gpus: int = 1,
    choice: DeviceChoice = "auto",
    lock_folder: Path | None = None,
) -> Iterator[Device]:
    """Hold a device for the life of a task.

    Args:
        addresses: what Spark gave this task (`task_gpu_addresses`); all of them are one device.
        visible: the machine's CUDA devices (`visible_cuda_devices`), claimed by tasks where Spark
            gave nothing; waits until enough of them are free.
        owner: this task's executor; None finds it (`find_owner`).
        num_gpus: GPUs that the task needs, more than one for tensor parallelism.
        choice: `gpu` refuses the CPU, `cpu` takes it whatever GPUs there are.
        lock_folder: where the locks are; None for one folder per user and machine, shared by all
            executors.

    Yields:
        The device; the CPU is shared by all tasks.

    Raises:
        SetupError: fewer GPUs than needed are here, or other executors hold them.
    """
    if choice == "cpu":
        yield Device("cpu")
    elif addresses:
        if len(set(addresses)) < num_gpus:
            raise SetupError(
                f"tensor_parallel needs {num_gpus} GPUs, but Spark gave this task "
                f"{len(set(addresses))}: {', '.join(sorted(set(addresses)))}",
                fix=f"set spark.task.resource.gpu.amount={num_gpus} (executors need as many: "
                "spark.executor.resource.gpu.amount), or a smaller tensor_parallel of the model",
            )
        yield Device("cuda", tuple(sorted(set(addresses))))
    elif visible:
        if len(visible) < num_gpus:
            raise miss_gpus(num_gpus, visible)
        folder = lock_folder or Path(tempfile.gettempdir()) / f"cdr-{os.geteuid()}-devices"
        make_private_folder(folder)
        with contextlib.ExitStack() as claim:
            # One waiter at a time looks for free devices, the others sleep at the gate.
            with _lock(folder / "gate"):
                claimed = _claim_when_free(claim, folder, visible, owner or find_owner(), num_gpus)
            yield Device("cuda", tuple(sorted(claimed)))
    elif choice == "gpu":
        raise miss_gpu(f"{socket.gethostname()}: no GPU given by Spark, none in /dev")
    else:
        yield Device("cpu")


def miss_gpu(where: str) -> SetupError:
    """Make the error of models that would run on a CPU without being told to, for hours."""
    return SetupError(
        "there is no GPU for the models, and run.device does not say that the CPU is meant",
        where=where,
        fix="use executors with GPUs, and let Spark give them out: "
        "spark.executor.resource.gpu.amount=1, spark.task.resource.gpu.amount=1 and "
        "spark.executor.resource.gpu.discoveryScript, for which there is "
        "conf/cluster/gpu-discovery.sh; to run the models on CPUs, set run.device to cpu",
    )


def miss_gpus(num_gpus: int, visible: Sequence[str], place: str = "this machine") -> SetupError:
    """Make the error of a model that is split over more GPUs than there are in a place."""
    found = f"{len(visible)}: {', '.join(visible)}" if visible else "none"
    return SetupError(
        f"tensor_parallel needs {num_gpus} GPUs, but {place} has {found}",
        fix="set a smaller tensor_parallel of the model, or use larger machines",
    )


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


def _claim_when_free(
    claim: contextlib.ExitStack,
    folder: Path,
    visible: Sequence[str],
    owner: Owner,
    num_gpus: int,
) -> list[str]:
    """Wait for devices, and lock them until `claim` ends; see `claim_device`."""
    refuse_at = time.monotonic() + _FOREIGN_GRACE_S
    while True:
        holders = {address: _holder(folder, address) for address in visible}
        # Those of this executor first: its models are there.
        ours = [address for address in visible if holders[address] == owner]
        ours += [address for address in visible if holders[address] is None]
        if len(ours) >= num_gpus:
            refuse_at = time.monotonic() + _FOREIGN_GRACE_S
            with contextlib.ExitStack() as attempt:
                claimed = []
                for address in ours:
                    with contextlib.suppress(BlockingIOError):
                        attempt.enter_context(_lock(_file(folder, address), fcntl.LOCK_NB))
                        claimed.append(address)
                    if len(claimed) == num_gpus:
                        for taken in claimed:
                            _file(folder, taken, ".owner").write_text(json.dumps(asdict(owner)))
                        claim.push(attempt.pop_all())
                        return claimed
        elif time.monotonic() > refuse_at:
            others = sorted({f"pid {holder.pid}" for holder in holders.values() if holder})
            raise SetupError(
                f"all of this machine's GPUs ({', '.join(visible)}) belong to other executors or "
                f"applications: {', '.join(others)}",
                fix="let Spark give GPUs out (spark.executor.resource.gpu.amount and "
                "spark.task.resource.gpu.amount), or run one executor per machine",
            )
        time.sleep(_CLAIM_POLL_S)


def _holder(folder: Path, address: str) -> Owner | None:
    """Give the living executor that a device belongs to."""
    try:
        holder = Owner(**json.loads(_file(folder, address, ".owner").read_text()))
    except (FileNotFoundError, ValueError):
        return None
    return holder if holder.is_alive() else None


def _file(folder: Path, address: str, suffix: str = "") -> Path:
    # Addresses may be UUIDs or MIG names: hashed, they are file names of one length.
    return folder / (hashlib.sha256(address.encode()).hexdigest()[:16] + suffix)


@contextlib.contextmanager
def _lock(path: Path, flags: int = 0) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
