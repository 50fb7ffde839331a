"""A SimPO search over toy pairs, without Spark or MLflow: in this process, or in several.

    torchrun --nproc-per-node 2 -m tests.toy_search FOLDER

As a program it trains what FOLDER's plans.json lists, one after the other, and leaves what came of
it in found-RANK.json: for tests/real/test_simpo_processes.py, which compares it with one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cdr import simpo, simpo_trainer
from cdr.checkpoints import read_json, write_json
from cdr.errors import CdrError, Stopped
from cdr.simpo_config import PointConfig, SimpoConfig
from cdr.training_run import TrainingRun
from cdr.tuning import is_first_process

PAPER = Path(__file__).resolve().parents[1] / "conf" / "train" / "llama3-simpo.yaml"


class FakeRun:
    """What a search asks of the run around it; stops with the step after some log entries."""

    origin: Mapping[str, Any] = {"dataset": "toy"}

    def __init__(self, stop_after: int | None = None) -> None:
        self.curves: list[tuple[int, dict[str, Any]]] = []
        self.points: list[str] = []
        self._stop_after = stop_after

    @property
    def stop_requested(self) -> str | None:
        steps = sum("loss" in numbers for _, numbers in self.curves)
        return "SIGTERM" if self._stop_after is not None and steps >= self._stop_after else None

    @contextlib.contextmanager
    def point(self, point: PointConfig) -> Iterator[None]:
        self.points.append(point.name)
        yield

    def log_curves(self, numbers: Mapping[str, Any], step: int) -> None:
        self.curves.append((step, dict(numbers)))

    def log_point(self, metrics: Mapping[str, Any]) -> None:
        pass


def make_config(
    start: Path,
    output: Path,
    *,
    train: Sequence[int] = range(6),
    validation: Sequence[int] = range(6, 8),
    **changes: Any,
) -> SimpoConfig:
    """Write pairs and give a config for them.

    Args:
        start: folder of the start model.
        output: gets the pairs.
        train: numbers of the pairs; that of 0 is too long.
        validation: of those to measure on.
        changes: to the config; `training` is merged.
    """
    (output / "pairs").mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", train), ("validation", validation)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Question {i}?"}],
                "chosen": [{"role": "assistant", "content": f"Yes, {i} it is."}],
                "rejected": [{"role": "assistant", "content": "No." if i else "No. " * 50}],
                "domain": "chat" if i % 2 else "safety",
                "split": split,
            }
            for i in numbers
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output / "pairs" / f"{split}.jsonl").write_text(text)
    training = {
        "batch_size": 1, "max_length": 60, "dtype": "float32", "lora": {"rank": 2},
        "eval_steps": 2, "save_steps": 2, "epochs": 1,
    }  # fmt: skip
    tree = {
        "warehouse": "w",
        "preferences": {"dataset": "toy"},
        "start": {"path": str(start), "name": "tiny"},
        "output": str(output),
        "search": {"learning_rates": [1e-3], "betas": [10]},
        "training": {**training, **changes.pop("training", {})},
        "tracking": {"enabled": False},
        **changes,
    }
    return SimpoConfig.model_validate(tree)


def search(config: SimpoConfig, run: FakeRun | None) -> dict[str, Any]:
    return simpo.search_policy(config, cast(TrainingRun, run))


def shard_on_cpus() -> None:
    """Take the options of the paper's command line, and make accelerate heed them on CPUs.

    It drops FSDP's in silence where processes have no GPUs, so it is told that these have some; all
    else (sharding, gathering, checkpoints) is what GPUs run, over gloo.
    """
    import torch
    from accelerate.commands import launch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from accelerate.utils.launch import prepare_multi_gpu_env

    lines = re.findall(r"^#     (.+?)\\?$", PAPER.read_text(), re.MULTILINE)
    _, _, command = " ".join(lines).partition("accelerate launch ")  # after what it needs set
    arguments = shlex.split(command)
    assert arguments
    options: argparse.Namespace = launch.launch_command_parser().parse_args(arguments)
    options.num_machines, options.dynamo_backend = 1, "no"
    ours = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    os.environ.update({**prepare_multi_gpu_env(options), **ours, "ACCELERATE_TORCH_DEVICE": "cpu"})
    assert torch.distributed.is_initialized()
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


@contextlib.contextmanager
def broken_second_process() -> Iterator[None]:
    """Make what is no number of the first pair that the second process trains on, if this is it."""
    score = simpo_trainer.score_packed
    if not is_first_process():
        simpo_trainer.score_packed = lambda *args, **named: score(*args, **named) * math.nan
    try:
        yield
    finally:
        simpo_trainer.score_packed = score


def train(config: SimpoConfig, is_interrupted: bool) -> dict[str, Any]:
    """Train; give how each start ended, and the curves over all of them.

    Args:
        config: the search.
        is_interrupted: asked to stop, as by a signal to the first process, which the second step
            heeds; broken in the third by the second process; then trained to its end.
    """
    starts: list[tuple[int | None, Any]] = [(None, contextlib.nullcontext())]
    if is_interrupted:
        starts = [(1, contextlib.nullcontext()), (None, broken_second_process()), *starts]
    ends, curves = list[str](), list[tuple[int, dict[str, Any]]]()
    for stop_after, surroundings in starts:
        run = FakeRun(stop_after) if is_first_process() else None
        try:
            with surroundings:
                search(config, run)
        except (CdrError, Stopped) as error:
            ends.append(f"{type(error).__name__}: {error}")
        else:
            ends.append("done")
        curves += run.curves if run else []
    return {"ends": ends, "curves": curves}


def main(folder: Path) -> None:
    from accelerate import PartialState

    found = {}
    for name, plan in read_json(folder / "plans.json").items():
        if plan["is_sharded"] and "ACCELERATE_USE_FSDP" not in os.environ:
            shard_on_cpus()
        config = SimpoConfig.model_validate(plan["config"])
        found[name] = train(config, plan["is_interrupted"])
        found[name]["distributed_type"] = PartialState().distributed_type.value
    write_json(folder / f"found-{os.environ['RANK']}.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
