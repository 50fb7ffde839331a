"""SimPO on a tiny model: the loss is the formula's, and a training that was killed goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from cdr import simpo_trainer  # noqa: E402 - only where TRL is
from cdr.errors import ConfigError, InputError, Stopped, TrainingError  # noqa: E402
from cdr.simpo_config import list_points  # noqa: E402
from tests.tiny_model import save_tiny_model  # noqa: E402
from tests.toy_search import FakeRun, make_config, search  # noqa: E402

pytestmark = [
    pytest.mark.timeout(600),
    # Of the libraries under TRL.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("start"))


def test_loss_is_the_formulas_on_values_computed_by_hand(start: Path, tmp_path: Path) -> None:
    config = make_config(start, tmp_path, search={"learning_rates": [1e-3], "betas": [10]})
    pairs = simpo_trainer.load_pairs(tmp_path / "pairs", start, 60)
    (point,) = list_points(
        config, base_hash="b", pairs_hash=pairs.identity, dtype="float32", processes=1
    )
    trainer = simpo_trainer.make_trainer(
        point, pairs, start, config, tmp_path / "checkpoints", is_new=True, log=None
    )
    # Log-probs per token -1.0 and -1.5; beta 10, gamma/beta 0.3: -log σ(10·0.5 − 3) = log(1+e^-2).
    loss, *_ = trainer.cpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]))
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)
    # -1.5 and -1.0: -log σ(-5 − 3) = log(1+e^8).
    loss, *_ = trainer.cpo_loss(torch.tensor([-1.5]), torch.tensor([-1.0]))
    assert loss.item() == pytest.approx(8.000335, abs=1e-5)

    # And of the model itself, from log-probs of each answer behind its prompt alone.
    item = pairs.train[0]
    packed = simpo_trainer.collate_one(
        [{"prompt_ids": item.prefix_ids, "chosen_ids": item.chosen_ids,
          "rejected_ids": item.rejected_ids, "index": 0}]
    )  # fmt: skip
    means = []
    for answer in (item.chosen_ids, item.rejected_ids):
        ids = torch.tensor([[*item.prefix_ids, *answer]])
        with torch.no_grad():
            logprobs = torch.log_softmax(trainer.model(input_ids=ids).logits[0], dim=-1)
        at = len(item.prefix_ids) - 1
        means.append(
            sum(float(logprobs[at + n, token]) for n, token in enumerate(answer)) / len(answer)
        )
    margin = 10 * (means[0] - means[1]) - 3.0
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, packed)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx(10 * (means[0] - means[1]), abs=1e-3)


def test_killed_training_goes_on_and_ends_where_one_in_one_go_does(
    start: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = search(make_config(start, whole), FakeRun())
    with pytest.raises(Stopped, match="SIGTERM"):
        search(make_config(start, parts), FakeRun(stop_after=3))
    checkpoints = parts / "points" / "lr-0.001_beta-10" / "checkpoints"
    # A checkpoint that was being written at a kill has no state yet, and is left aside.
    (checkpoints / "checkpoint-9").mkdir()
    run = FakeRun()
    metrics = search(make_config(start, parts), run)
    assert [step for step, numbers in run.curves if "loss" in numbers] == [5]
    for name in ("validation", "start"):
        ours, theirs = (m["points"]["lr-0.001_beta-10"][name] for m in (metrics, expected))
        assert json.dumps(ours) == json.dumps(theirs)
    weights = "policy/adapter_model.safetensors"
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()
    assert not checkpoints.exists()
    card = (parts / "policy" / "README.md").read_text()
    # p0's rejected answer is too long; nothing is cut.
    assert "Left out: train: 1 too_long; validation: none" in card
    assert metrics["data"]["left_out_fraction"] == 1 / 8
    assert str(tmp_path) not in card

    again = FakeRun()
    assert search(make_config(start, parts), again) == metrics  # nothing is left to do
    assert again.curves == []
    with pytest.raises(ConfigError, match=r"max_length: expected 60 .* got 50"):
        search(make_config(start, parts, training={"max_length": 50}), FakeRun())


def test_grid_takes_up_new_rates_and_ends_early_where_told(start: Path, tmp_path: Path) -> None:
    stop = {"early_stop": {"patience": 1}, "eval_steps": 1, "save_steps": 1, "epochs": 20}
    grid = {"learning_rates": [1e-9, 1e-2], "betas": [10], "gamma_ratio": 0.3}
    run = FakeRun()
    metrics = search(make_config(start, tmp_path, training=stop, search=grid), run)
    assert run.points == ["lr-1e-09_beta-10", "lr-0.01_beta-10"]
    slow = metrics["points"]["lr-1e-09_beta-10"]["training"]
    # Accuracy does not move at this rate: the first evaluation is the best, the second the last.
    assert (slow["steps"], slow["planned_steps"]) == (2, 100)
    assert metrics["best"] in run.points


def test_whole_model_is_saved_so_that_it_loads(start: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = search(make_config(start, tmp_path, training={"lora": None}), FakeRun())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    before = AutoModelForCausalLM.from_pretrained(start)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    assert (tmp_path / "policy" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert metrics["points"]["lr-0.001_beta-10"]["training"]["steps"] == 5


def test_loss_that_is_no_number_ends_it_and_keeps_the_last_good_checkpoint(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(start, tmp_path)
    run = FakeRun()
    score = simpo_trainer.score_packed

    def break_later(*args: Any, **options: Any) -> Any:
        is_late = sum("loss" in numbers for _, numbers in run.curves) >= 3
        return score(*args, **options) * (math.nan if is_late else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(simpo_trainer, "score_packed", break_later)
        with pytest.raises(TrainingError, match="step 4") as caught:
            search(config, run)
    assert "checkpoint-2" in str(caught.value)
    after = FakeRun()
    search(config, after)
    assert [step for step, numbers in after.curves if "loss" in numbers] == [3, 4, 5]


def test_grid_without_validation_pairs_is_refused(start: Path, tmp_path: Path) -> None:
    config = make_config(start, tmp_path, search={"learning_rates": [1e-3, 1e-4], "betas": [10]})
    (tmp_path / "pairs" / "validation.jsonl").unlink()
    with pytest.raises(InputError, match="no validation pairs"):
        search(config, FakeRun())
