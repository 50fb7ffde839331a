"""What a SimPO training may be asked, which policy of a grid is best, and what the card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdr.dpo_data import EncodedPair, PreferencePair
from cdr.errors import ConfigError
from cdr.simpo_config import SimpoConfig, list_points, load_simpo_config
from cdr.simpo_report import choose_best, summarize

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDR_WAREHOUSE", "s3://bucket/warehouse")


@pytest.mark.parametrize("path", sorted((CONF / "train").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_training_loads(path: Path) -> None:
    assert load_simpo_config(path).search.gamma_ratio == 0.3


def points_of(config: SimpoConfig) -> list[Any]:
    return list_points(config, base_hash="b", pairs_hash="p", dtype="bfloat16", processes=8)


def test_shipped_llama3_search_is_the_papers() -> None:
    config = load_simpo_config(CONF / "train" / "llama3-simpo.yaml")
    training = config.training
    assert [(p.learning_rate, p.beta, p.gamma) for p in points_of(config)] == [
        # gamma is absolute, 0.3 · beta.
        (5e-7, 10, 3.0), (8e-7, 10, 3.0), (1e-6, 10, 3.0),
        (5e-7, 18, pytest.approx(5.4)), (8e-7, 18, pytest.approx(5.4)),
        (1e-6, 18, pytest.approx(5.4)),
    ]  # fmt: skip
    assert (training.batch_size, training.epochs, training.max_length) == (128, 1, 2048)
    assert (training.schedule, training.warmup_fraction) == ("cosine", 0.1)
    assert (training.early_stop, training.lora) == (None, None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("search.learning_rates=[0]", "learning_rates: must be > 0"),
        ("search.betas=[10,10]", "betas: must be > 0 and different"),
        ("start.revision=main", "only a hub id has one"),
        ("training.early_stop={patience: 2}", "a multiple of eval_steps"),
        ("training.beta=10", "training.beta: unknown key"),
    ],
)
def test_problem_is_told_with_its_key(change: str, problem: str) -> None:
    changes = [change, "training.eval_steps=4"] if "early_stop" in change else [change]
    with pytest.raises(ConfigError) as caught:
        load_simpo_config(CONF / "train" / "loop.yaml", changes)
    assert problem in str(caught.value)


def test_loops_prompts_are_apart_from_those_it_is_measured_on() -> None:
    def prompts(name: str) -> list[str]:
        lines = (CONF / "demo" / name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["prompt"] for line in lines]
        return [row if isinstance(row, str) else row[0]["content"] for row in rows]

    sampled, held_out = prompts("loop-prompts.jsonl"), prompts("loop-held-out.jsonl")
    assert len(set(sampled)) == len(sampled) >= 100
    assert not set(sampled) & {*held_out, *prompts("pairs.jsonl")}
    assert len(set(held_out)) == len(held_out) == 24


def measured(accuracy: float, margin: float) -> dict[str, Any]:
    return {"validation": {"All": {"accuracy": accuracy, "margin": margin}}}


def test_best_has_the_highest_accuracy_then_the_largest_margin_then_comes_first() -> None:
    points = {
        "a": measured(0.6, 0.9), "b": measured(0.7, 0.1), "c": measured(0.7, 0.2),
        "d": measured(0.7, 0.2),
    }  # fmt: skip
    assert choose_best(points) == "c"
    assert choose_best({"only": {"validation": None}}) == "only"


def test_validation_is_measured_per_domain_in_the_order_of_pairs() -> None:
    def pair(section: str, chosen: int, rejected: int) -> EncodedPair:
        text = PreferencePair((), "c", "r", section, section, None, "validation", "s", "l")
        return EncodedPair(text, (1,), (2,) * chosen, (3,) * rejected)

    pairs = [pair("chat", 3, 2), pair("safety", 2, 2), pair("chat", 1, 4)]
    result = summarize(pairs, np.array([[-1.0, -2.0], [-1.0, -1.0], [-3.0, -1.0]]))
    # chat: one right of two; safety: a tie, which is not right.
    assert (result["chat"]["accuracy"], result["safety"]["accuracy"]) == (0.5, 0.0)
    assert (result["safety"]["ties"], result["chat"]["longer_wins"]) == (1, 0.5)
    assert result["All"]["n"] == 3
    assert result["All"]["margin"] == pytest.approx((1 + 0 - 2) / 3)
