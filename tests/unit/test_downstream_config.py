"""Downstream configs: those we ship, what they ask the machinery for, and how they say no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cdr.answer_files import read_questions
from cdr.downstream_config import DownstreamConfig, load_downstream_config
from cdr.errors import ConfigError
from tests.unit.test_config import CONF, required_variables

SHIPPED = sorted((CONF / "downstream").rglob("*.yaml"))


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> DownstreamConfig:
    path = CONF / "downstream" / f"{name}.yaml"
    for variable in required_variables(path):
        monkeypatch.setenv(variable, "/somewhere")
    return load_downstream_config(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads_with_two_rewards(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(SHIPPED) >= 4
    config = load(path.stem, monkeypatch)
    assert list(config.rewards()) == ["reward", "held_out_reward"]
    assert (config.judge is None) == (path.stem == "demo")


def test_mt_benchs_temperatures_are_fastchats(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("mt-bench", monkeypatch)
    # fastchat/llm_judge/common.py, and gen_model_answer.py for any other category.
    expected = {"writing": 0.7, "math": 0.0, "humanities": 0.1, "arena-hard-200": 0.7, None: 0.7}
    assert {name: config.temperature_of(name) for name in expected} == expected
    sampling = config.sampling_config("d", "/prompts", 0.1).sampling
    assert (sampling.num_samples, sampling.temperature) == (1, 0.1)
    assert (sampling.top_p, sampling.max_new_tokens) == (1.0, 1024)


def test_demo_questions_have_two_turns_and_three_temperatures() -> None:
    config = load_downstream_config(CONF / "downstream" / "demo.yaml")
    questions = read_questions("mt_bench", config.questions)
    assert {len(question.turns) for question in questions} == {2}
    temperatures = {config.temperature_of(question.category) for question in questions}
    assert temperatures == {0.0, 0.1, 0.7}


def test_a_judge_must_fit_its_benchmark(tmp_path: Path) -> None:
    reward = {"name": "r", "models": {"strong": {"path": "p", "engine": "stub"}}}
    tree: dict[str, Any] = {
        "dataset": "d",
        "questions": "q",
        "answers": "a",
        "warehouse": "w",
        "policy": {"path": "p", "engine": "stub"},
        "sampling": {"temperature": 0, "max_new_tokens": 1},
    }

    def problems(**changes: Any) -> tuple[str, ...]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({**tree, **changes}))
        with pytest.raises(ConfigError) as caught:
            load_downstream_config(file)
        return caught.value.problems

    assert problems(benchmark="alpaca_eval", judge={"python": "x", "folder": "f"}) == (
        "judge.folder: not for alpaca_eval",
    )
    assert problems(benchmark="arena_hard", judge={"python": "x", "references": "r"}) == (
        "judge.folder: is required for arena_hard",
        "judge.settings: is required for arena_hard",
        "judge.references: not for arena_hard, `folder` has them",
    )
    plain = {**reward, "form": "custom", "routing": {"mode": "none"}}
    plain["terms"] = [{"model": "strong", "condition": "plain", "weight": 1}]
    assert problems(benchmark="mt_bench", reward=plain, held_out_reward=plain) == (
        "held_out_reward: has the name of the other, 'r'",
    )
    assert problems(benchmark="mt_bench", training_run="latest")[0].startswith("training_run: ")
