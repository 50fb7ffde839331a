"""SimPO in two processes, each with a whole model or sharing one (FSDP): as in one process.

Everything is trained by one start of torchrun, since starting takes most of the time. FSDP has no
GPUs here: `tests.toy_search.shard_on_cpus` says what that means.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from safetensors.torch import load_file  # noqa: E402 - only where TRL is

from tests.tiny_model import save_tiny_model  # noqa: E402
from tests.toy_search import FakeRun, make_config, search  # noqa: E402

pytestmark = [
    pytest.mark.timeout(600),
    # Of the libraries under TRL.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
POINT = "lr-0.001_beta-10"
WHOLE: dict[str, Any] = {"batch_size": 2, "lora": None}
ADAPTER: dict[str, Any] = {"batch_size": 2}
# As in the paper's file, and with the best step loaded at the end.
PAPER = {
    **WHOLE, "dtype": "bfloat16", "gradient_checkpointing": True,
    "early_stop": {"patience": 1}, "eval_steps": 1, "save_steps": 1,
}  # fmt: skip
PLANS = {
    "replicated": WHOLE,
    "replicated-adapter": ADAPTER,
    "sharded": WHOLE,
    "sharded-adapter": ADAPTER,
    "sharded-paper": PAPER,
}
INTERRUPTED = ("replicated", "sharded")
# Weights go by up to 1.5e-3 in three steps.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def together(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave: a folder per plan, and found-0.json and found-1.json."""
    folder = tmp_path_factory.mktemp("together")
    plans = {
        name: {
            "config": make_toy(start, folder / name, training).model_dump(mode="json"),
            "is_sharded": name.startswith("sharded"),
            "is_interrupted": name in INTERRUPTED,
        }
        for name, training in PLANS.items()
    }
    (folder / "plans.json").write_text(json.dumps(plans))
    command = ["torch.distributed.run", "--nproc-per-node=2", "-m", "tests.toy_search"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def make_toy(start: Path, output: Path, training: dict[str, Any]) -> Any:
    """Six pairs to train on, and three to measure on: an odd number for two processes."""
    return make_config(
        start, output, train=range(1, 7), validation=range(7, 10), training=dict(training)
    )


def found(together: Path, rank: int, name: str) -> Any:
    return json.loads((together / f"found-{rank}.json").read_text())[name]


def metrics_of(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())["points"][POINT]


@pytest.fixture(scope="module", params=["whole", "adapter"])
def alone(
    request: pytest.FixtureRequest, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, FakeRun]:
    """What one process leaves, which accumulates two pairs a step: its folder, and its curves."""
    folder, run = tmp_path_factory.mktemp("alone"), FakeRun()
    search(make_toy(start, folder, WHOLE if request.param == "whole" else ADAPTER), run)
    return request.param, folder, run


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_two_processes_train_what_one_does(
    together: Path, alone: tuple[str, Path, FakeRun], way: str
) -> None:
    kind, expected, run = alone
    name = way if kind == "whole" else f"{way}-adapter"
    ours = found(together, 0, name)
    assert ours["distributed_type"] == ("FSDP" if way == "sharded" else "MULTI_CPU")
    curve, wanted = (
        [(s, n) for s, n in all_ if "loss" in n] for all_ in (ours["curves"], run.curves)
    )
    assert [step for step, _ in curve] == [step for step, _ in wanted] == [1, 2, 3]
    for (step, numbers), (_, theirs) in zip(curve, wanted, strict=True):
        # AdamW's steps do not depend on the gradient's scale; its norm, before clipping, does.
        for key in ("loss", "grad_norm", "learning_rate"):
            assert numbers[key] == pytest.approx(theirs[key], rel=1e-4), (step, key)
    (file,) = (path.name for path in (expected / "policy").glob("*.safetensors"))
    folders = (together / name, expected)
    weights, wanted_weights = (load_file(folder / "policy" / file) for folder in folders)
    assert weights.keys() == wanted_weights.keys()
    # An adapter is stored in bfloat16, with 8 bits of precision.
    precision = 2**-8 if kind == "adapter" else 0.0
    for key, weight in wanted_weights.items():
        torch.testing.assert_close(weights[key], weight, atol=TOLERANCE, rtol=precision)
    for part in ("start", "validation"):
        measured, same = (metrics_of(folder)[part] for folder in folders)
        if part == "validation":
            measured, same = measured["All"], same["All"]
            assert (measured["n"], same["n"]) == (3, 3)
        assert measured["margin"] == pytest.approx(same["margin"], abs=1e-4)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_what_stops_or_breaks_one_process_ends_both_and_the_last_checkpoint_is_kept(
    together: Path, name: str
) -> None:
    first, second = (found(together, rank, name)["ends"] for rank in (0, 1))
    assert first[0] == "Stopped: SIGTERM"
    assert second[0] == "Stopped: another process was asked to"
    for ends in (first, second):
        assert ends[1].startswith("TrainingError: the loss or its gradient is not finite in step 3")
        assert "checkpoint-2" in ends[1]
        assert ends[2] == "done"
    # They went on from there: the curves have each step once, and the weights are compared above.
    assert metrics_of(together / name)["training"]["steps"] == 3


def test_the_papers_training_leaves_a_whole_policy_that_loads(start: Path, together: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = together / "sharded-paper"
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert AutoTokenizer.from_pretrained(folder / "policy").chat_template
    assert {weight.dtype for weight in policy.parameters()} == {torch.bfloat16}
    before = load_file(start / "model.safetensors")
    assert all(
        not torch.equal(weight.float(), before[key]) for key, weight in policy.named_parameters()
        if "norm" not in key  # ones, and near them bfloat16 is coarser than the steps
    )  # fmt: skip
    # The best step was loaded at the end: what is measured then is what was measured there, but for
    # rounding. Margins go by 0.05 a step.
    metrics = metrics_of(folder)
    margins = {
        step: numbers["eval_margin"]
        for step, numbers in found(together, 0, "sharded-paper")["curves"]
        if "eval_margin" in numbers
    }
    assert len(margins) == 1 + metrics["training"]["steps"]
    best = margins[metrics["training"]["best_step"]]
    assert metrics["validation"]["All"]["margin"] == pytest.approx(best, abs=5e-3)
