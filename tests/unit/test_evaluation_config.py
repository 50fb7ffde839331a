"""Evaluate configs: those we ship, rows as changes of one reward, samples, and how they say no."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdr.errors import ConfigError, SetupError
from cdr.evaluation_config import ONE_SECTION, EvaluateConfig, load_evaluate_config
from cdr.evaluation_plan import dataset_name, make_sample, plan_evaluation
from cdr.rewardbench import SECTIONS
from jobs.evaluate import main as evaluate
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe
from tests.unit.test_config import COMMIT, CONF, required_variables, reward_tree
from tests.unit.test_rewardbench import TABLE_1

SHIPPED = sorted([*(CONF / "evaluate").rglob("*.yaml"), *(CONF / "benchmark").rglob("*.yaml")])
PACK = str(CONF / "prompts" / "cdr-v1.yaml")


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": "bench",
        "warehouse": "/data/warehouse",
        "input": {"path": "/data/pairs", "columns": {"subset": "subset"}},
        "reward": reward_tree(),
        **changes,
    }


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateConfig:
    for name in required_variables(path):
        monkeypatch.setenv(name, "somewhere")
    return load_evaluate_config(path)


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    def problems(**changes: Any) -> tuple[str, ...]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree(**changes)))
        with pytest.raises(ConfigError) as caught:
            load_evaluate_config(path)
        return caught.value.problems

    return problems


# --- the files we ship -------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_row_is_a_reward(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(path, monkeypatch)
    names = config.row_names()
    assert names
    for name in names:
        assert config.reward_of(name).resolved_terms()
    assert len({config.reward_of(name).name for name in names}) == len(names)


def test_shipped_files_are_found() -> None:
    stems = {path.stem for path in SHIPPED}
    assert stems == {"demo", "forms", "kinds", "loop", "rewardbench", "table1"}


def test_table_1_prints_the_papers_numbers_and_has_its_rewards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(CONF / "benchmark" / "table1.yaml", monkeypatch)
    table_1 = {title.replace(" vs ", " vs. "): scores for title, scores in TABLE_1.items()}
    found = {
        row.title: tuple(row.printed[name] for name in (*SECTIONS, "Overall"))
        for row in config.rows.values()
    }
    assert found == table_1
    rewards = {name: config.reward_of(name) for name in config.row_names()}
    assert {name: reward.routing.mode for name, reward in rewards.items()} == {
        "dpo-over-sft": "none", "dpo-over-base": "none", "sft-over-base": "none",
        "cdr-safety": "fixed", "cdr-math-code": "fixed", "cdr-chat-hard": "fixed",
        "cdr-adaptive-chat-hard-oracle": "column", "cdr-adaptive-oracle": "column",
        "cdr-adaptive-router": "adaptive", "generative": "adaptive",
        "rm-mistral-7b": "none", "armorm-llama3-8b": "none",
        "gpt-4-turbo": "none", "claude-3.5-sonnet": "none",
    }  # fmt: skip
    forms = {name: r.form for name, r in rewards.items() if r.form != "density_ratio"}
    assert forms == {
        "generative": "judge", "rm-mistral-7b": "classifier", "armorm-llama3-8b": "classifier",
        "gpt-4-turbo": "judge", "claude-3.5-sonnet": "judge",
    }  # fmt: skip
    judge, strong = rewards["generative"].models["judge"], config.reward.models["strong"]
    assert (judge.path, judge.revision) == (strong.path, strong.revision)
    base = rewards["dpo-over-base"]
    assert base.models["strong"].path == config.reward.models["strong"].path
    assert base.models["weak"].path == "mistralai/Mistral-7B-v0.1"
    assert base.encoding.template == rewards["sft-over-base"].encoding.template == "plain"
    assert rewards["dpo-over-sft"].encoding.template == "strong"
    # Only where strong was not tuned from weak.
    warned = {name for name, reward in rewards.items() if reward.warnings()}
    assert warned == {"dpo-over-base", "sft-over-base", "armorm-llama3-8b"}
    oracle = config.rows["cdr-adaptive-chat-hard-oracle"].oracle or {}
    assert (oracle["Chat"], oracle["Chat Hard"]) == ("chat_hard", "chat_hard")
    assert (config.oracle["Chat"], config.oracle["Chat Hard"]) == ("chat", "chat")


# --- rows --------------------------------------------------------------------------------------


def test_a_row_changes_what_it_names_and_keeps_the_rest() -> None:
    row = {
        "change": {
            "models": {"weak": {"path": "acme/base"}, "strong": {"tuned_from": None}},
            "reduction": "mean",
        }
    }
    config = EvaluateConfig.model_validate(tree(rows={"other": row}))
    reward = config.reward_of("other")
    assert (reward.name, reward.reduction) == ("other", "mean")
    assert (reward.models["weak"].path, reward.models["weak"].revision) == ("acme/base", COMMIT)
    assert (reward.models["strong"].path, reward.models["strong"].tuned_from) == ("acme/dpo", None)
    assert config.reward.models["weak"].path == "acme/sft"


def test_without_rows_the_reward_is_the_only_one() -> None:
    config = EvaluateConfig.model_validate(tree())
    assert config.row_names() == ["dpo-over-sft"]
    assert config.reward_of("dpo-over-sft") == config.reward


def test_problems_of_all_rows_are_told_at_once(problems: Callable[..., tuple[str, ...]]) -> None:
    found = problems(
        rows={
            "a": {"change": {"reduction": "median"}},
            "b": {"oracle": {"Poetry": "chat"}, "printed": {"Chat": 1.0, "Maths": 2.0}},
        }
    )
    assert [line.split(":")[0] for line in found] == [
        "rows.a.change.reduction", "rows.b.oracle", "rows.b.printed"
    ]  # fmt: skip


def test_a_hub_data_set_is_pinned_and_parquet(problems: Callable[..., tuple[str, ...]]) -> None:
    hub = {"path": "acme/pairs", "revision": COMMIT, "format": "parquet"}
    assert EvaluateConfig.model_validate(tree(input=hub)).input.split == "filtered"
    found = problems(input={"path": "/data/pairs", "revision": COMMIT, "format": "json"})
    assert any("only a hub id has one" in line for line in found)
    assert any("is read as 'parquet'" in line for line in found)


def test_a_table_without_sections_is_one_section() -> None:
    config = EvaluateConfig.model_validate(tree(input={"path": "/data/pairs"}))
    assert config.sections_in_use() == (ONE_SECTION,)


def test_names_and_numbers_that_mean_nothing_are_refused(
    problems: Callable[..., tuple[str, ...]],
) -> None:
    sections = ["billing", "legal", "billing"]
    found = problems(sections=sections, oracle={"bililng": "chat", "Chat": "chat"})
    assert found == (
        "sections: 'billing' is named twice",
        "oracle: unknown section 'bililng'; known: billing, legal, Chat, Chat Hard, Safety, "
        "Reasoning, Prior Sets",
    )
    rows = {"fractions": {"printed": {"Chat": 0.922, "Overall": 0.77}}}
    (found,) = problems(rows=rows)
    assert found.startswith("rows.fractions.printed: must be in percent")
    (found,) = problems(rows={"much": {"printed": {"Chat": 922}}})
    assert found.startswith("rows.much.printed.Chat: ")
    one_section = {"input": {"path": "/data/pairs"}, "oracle": {ONE_SECTION: "safety"}}
    assert EvaluateConfig.model_validate(tree(**one_section)).oracle == {ONE_SECTION: "safety"}


def test_one_price_of_an_endpoint_needs_the_other(
    problems: Callable[..., tuple[str, ...]],
) -> None:
    api = {"base_url": "http://localhost/v1", "prompt_price": 10}
    judge = {"path": "gpt", "engine": "api", "api": api}
    reward = {
        "name": "r", "form": "judge", "models": {"judge": judge}, "routing": {"mode": "none"},
        "encoding": {"template": "own"},
    }  # fmt: skip
    (found,) = problems(reward=reward)
    assert "answer_price: is required beside the other price" in found
    api["answer_price"] = 0
    assert EvaluateConfig.model_validate(tree(reward=reward)).reward.is_judge


# --- samples and plans -------------------------------------------------------------------------


def test_samples_have_names_of_their_own_and_exclude_each_other() -> None:
    config = EvaluateConfig.model_validate(tree(quick={"pairs": 50}))
    whole, quick, limit = (
        make_sample(config, limit=n, quick=q) for n, q in ((None, False), (None, True), (7, False))
    )
    assert [dataset_name(config, sample) for sample in (whole, quick, limit)] == [
        "bench", "bench.quick-50", "bench.limit-7"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="not with --quick"):
        make_sample(config, limit=7, quick=True)


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, Any]:
    special = ("<|im_end|>", "<|im_start|>")
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(tmp_path / "tokenizer")
    folder = str(tmp_path / "tokenizer")
    models = {
        role: {"path": folder, "engine": "stub", "adapter": role, "tuned_from": "weak"}
        for role in ("strong", "weak", "router")
    }
    return {"name": "r", "models": models, "prompt_pack": PACK}


def test_two_oracles_are_two_rewards_though_nothing_else_differs(stubs: dict[str, Any]) -> None:
    column = {"change": {"routing": {"mode": "column"}}}
    hard = dict.fromkeys(("Chat", "Chat Hard", "Safety", "Reasoning", "Prior Sets"), "chat_hard")
    config = EvaluateConfig.model_validate(
        tree(reward=stubs, rows={"one": column, "two": {**column, "oracle": hard}})
    )
    one, two = plan_evaluation(config)
    assert one.annotation.reward.encoding == two.annotation.reward.encoding
    assert one.annotation.reward.key != two.annotation.reward.key


def test_the_oracle_of_a_router_is_added_behind_it(stubs: dict[str, Any]) -> None:
    config = EvaluateConfig.model_validate(
        tree(reward=stubs, rows={"plain": {"change": {"routing": {"mode": "none"}}}, "cdr": {}})
    )
    plans = plan_evaluation(config, with_oracle=True)
    assert [plan.name for plan in plans] == ["plain", "cdr", "cdr.oracle"]
    modes = [plan.annotation.config.reward.routing.mode for plan in plans]
    assert modes == ["none", "adaptive", "column"]
    assert len({plan.annotation.reward.key for plan in plans}) == 3


def test_what_is_recorded_of_a_row_is_a_config_of_it_alone(stubs: dict[str, Any]) -> None:
    row = {
        "title": "Mean", "printed": {"Chat": 92.2}, "oracle": dict.fromkeys(SECTIONS, "chat_hard"),
        "change": {"reduction": "mean", "routing": {"mode": "column"}},
    }  # fmt: skip
    config = EvaluateConfig.model_validate(
        tree(reward=stubs, rows={"plain": {}, "mean": row}, sections=SECTIONS)
    )
    plan = plan_evaluation(config)[1]
    recorded = json.loads(json.dumps(plan.recorded()))
    assert recorded.pop("sample") is None
    again = EvaluateConfig.model_validate(recorded)
    assert again.reward == plan.annotation.config.reward == again.reward_of("mean")
    assert list(again.rows) == ["mean"]
    (planned,) = plan_evaluation(again)
    assert (planned.title, planned.printed) == ("Mean", {"Chat": 92.2})
    assert planned.annotation.reward.key == plan.annotation.reward.key


def test_an_oracle_that_is_a_row_already_is_not_added(stubs: dict[str, Any]) -> None:
    rows = {"cdr": {}, "oracle": {"change": {"routing": {"mode": "column"}}}}
    config = EvaluateConfig.model_validate(tree(reward=stubs, rows=rows))
    plans = plan_evaluation(config, with_oracle=True)
    assert [plan.name for plan in plans] == ["cdr", "oracle"]


def test_an_oracle_that_the_pack_does_not_have_is_refused(stubs: dict[str, Any]) -> None:
    reward = {**stubs, "routing": {"mode": "column"}}
    config = EvaluateConfig.model_validate(tree(reward=reward, oracle={"Chat": "poetry"}))
    with pytest.raises(ConfigError) as caught:
        plan_evaluation(config)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        f"oracle.{section}" for section in (*SECTIONS, "Prior Sets")
    ]


def test_keys_that_judges_lack_are_told_before_spark_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubs: dict[str, Any]
) -> None:
    def judge(variable: str) -> dict[str, Any]:
        api = {"base_url": "http://localhost/v1", "api_key_variable": variable}
        return {
            "change": {
                "form": "judge", "routing": {"mode": "none"}, "encoding": {"template": "own"},
                "models": {"judge": {"engine": "api", "path": "gpt", "api": api}},
            }
        }  # fmt: skip

    config = tree(
        reward=stubs, warehouse=str(tmp_path / "warehouse"),
        rows={"cdr": {}, "a": judge("KEY_A"), "b": judge("KEY_B"), "c": judge("KEY_A")},
    )  # fmt: skip
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.delenv("KEY_A", raising=False)
    monkeypatch.delenv("KEY_B", raising=False)

    def starts(*options: str) -> None:
        """Run the job up to where it would start Spark."""
        with monkeypatch.context() as patch:
            patch.setattr("jobs.evaluate.get_session", _start_spark)
            evaluate(["--config", str(tmp_path / "evaluate.yaml"), *options])

    with pytest.raises(SetupError, match="environment: KEY_A for a, c; KEY_B for b"):
        starts()
    monkeypatch.setenv("KEY_A", "secret")
    with pytest.raises(SetupError, match="environment: KEY_B for b"):
        starts()
    for options in (["--dry-run"], ["--rows", "a", "cdr"]):
        with pytest.raises(_SparkStarts):
            starts(*options)


class _SparkStarts(Exception):  # noqa: N818 - an event
    pass


def _start_spark(*_: Any, **__: Any) -> None:
    raise _SparkStarts
