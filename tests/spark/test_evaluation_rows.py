"""Rows of one evaluation that fail, are stopped or killed: the others lose nothing by it."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

import jobs.evaluate
import jobs.scoring
from cdr.errors import InputError, SetupError
from cdr.evaluation_config import EvaluateConfig
from cdr.evaluation_plan import EvaluationPlan, plan_evaluation
from cdr.tables import BENCHMARK_PAIRS, LOGPROBS, RUNS, STUDY_PAIRS, Table
from cdr.warehouse import Warehouse
from jobs.evaluate import evaluate
from jobs.pair_study import main as pair_study
from tests.spark.conftest import TakeHours
from tests.spark.test_evaluate import GOOD, REWARDBENCH, make_config
from tests.tokenizers import make_smollm2

EVERYTHING = 2 * 2 * len(GOOD)  # two models, two answers of each pair
PLAIN = {"routing": {"mode": "none"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_smollm2().save_pretrained(folder)
    return folder


def strong(**changes: Any) -> dict[str, Any]:
    """A row that differs from the others in its strong model."""
    return {"change": {**PLAIN, "models": {"strong": changes}}}


def rows_of(warehouse: Warehouse, table: Table) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in warehouse.read(table).collect()]


def outcomes(warehouse: Warehouse) -> list[tuple[str, str]]:
    """Reward and outcome of every run, in their order."""
    runs = sorted(rows_of(warehouse, RUNS), key=lambda row: row["run_id"])
    return [(run["reward_name"], run["outcome"]) for run in runs]


def scored(warehouse: Warehouse) -> list[int]:
    runs = sorted(rows_of(warehouse, RUNS), key=lambda row: row["run_id"])
    return [run["counts"].get("logprobs_scored", 0) for run in runs]


def plan(config: EvaluateConfig) -> list[EvaluationPlan]:
    return plan_evaluation(config)


def test_a_row_that_fails_does_not_keep_the_others_from_theirs(
    spark: SparkSession, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(tokenizer, gone)
    rows = {
        "first": {"change": PLAIN},
        "broken": strong(extra={"bogus": 1}),  # the engine refuses it as it loads
        "gone": strong(path=str(gone)),
        "last": strong(adapter="other"),
    }
    config = make_config(tmp_path, tokenizer, GOOD, REWARDBENCH, rows=rows, report={})
    plans, warehouse = plan(config), Warehouse(spark, config.warehouse)
    shutil.rmtree(gone)  # planned, and gone when it is its turn
    assert evaluate(plans, warehouse) == 1
    shown = capsys.readouterr()
    assert "row 'broken' failed: " in shown.err
    assert "extra must hold only" in shown.err
    assert "row 'gone' failed: " in shown.err
    assert "A = first\nB = last" in shown.out
    assert "without a result: broken (failed), gone (failed)" in shown.out
    assert outcomes(warehouse) == [
        ("first", "done"), ("broken", "failed"), ("gone", "failed"), ("last", "done"),
    ]  # fmt: skip
    (page,) = Path(config.warehouse, "reports").glob("*-and-1-more-*.html")
    assert f"report: {page}" in shown.out

    # Alone it is the job that fails, with the error's own exit code.
    with pytest.raises(Exception, match="extra must hold only"):
        evaluate(plans[1:2], warehouse)


def test_a_row_that_needs_more_gpus_than_there_are_is_told_before_any_row_begins(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    rows = {"first": {"change": PLAIN}, "split": strong(adapter="split")}
    config = make_config(tmp_path, tokenizer, GOOD, REWARDBENCH, rows=rows)
    first, split = plan(config)
    reward, warehouse = split.annotation.reward, Warehouse(spark, config.warehouse)
    # A config takes it for vLLM's models only, which is not installed everywhere.
    engines = tuple(replace(engine, tensor_parallel=64) for engine in reward.engines)
    annotation = replace(split.annotation, reward=replace(reward, engines=engines))
    with pytest.raises(SetupError, match="tensor_parallel needs 64 GPUs"):
        evaluate([first, replace(split, annotation=annotation)], warehouse)
    assert outcomes(warehouse) == []


def test_what_every_row_would_meet_ends_the_job_and_what_is_done_is_shown(
    spark: SparkSession,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {name: strong(adapter=name) for name in ("one", "two", "three", "four")}
    config = make_config(tmp_path, tokenizer, GOOD[:2], REWARDBENCH, rows=rows)
    warehouse = Warehouse(spark, config.warehouse)
    load, begun = jobs.evaluate.load_pairs, []

    def lose_the_input(plan: EvaluationPlan, *arguments: Any) -> Any:
        begun.append(plan.name)
        if plan.name == "three":
            Path(config.input.place).unlink()
        return load(plan, *arguments)

    monkeypatch.setattr(jobs.evaluate, "load_pairs", lose_the_input)
    with pytest.raises(InputError, match="does not exist"):
        evaluate(plan(config), warehouse)
    assert begun == ["one", "two", "three"]
    shown = capsys.readouterr().out
    assert "A = one\nB = two" in shown
    assert "without a result: three (failed), four (not begun)" in shown


def test_a_stop_within_a_row_or_between_two_shows_what_is_done_and_the_next_run_goes_on(
    spark: SparkSession,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {name: strong(adapter=name) for name in ("one", "two", "three")}
    config = make_config(
        tmp_path, tokenizer, GOOD, REWARDBENCH, rows=rows,
        run={"wave_tokens": 400},  # several waves per row
    )  # fmt: skip
    plans, warehouse = plan(config), Warehouse(spark, config.warehouse)
    evaluate_row, score = jobs.evaluate.evaluate_row, jobs.scoring.score_wave
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def stop_after_two(plan: EvaluationPlan, run: Any) -> Any:
        found = evaluate_row(plan, run)
        if plan.name == "two":
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(jobs.evaluate, "evaluate_row", stop_after_two)
        assert evaluate(plans, warehouse) == 4
    shown = capsys.readouterr().out
    assert "stopped: SIGTERM" in shown
    assert "A = one\nB = two" in shown
    assert "without a result: three (not begun)" in shown
    assert outcomes(warehouse) == [("one", "done"), ("two", "done")]
    assert scored(warehouse) == [EVERYTHING, EVERYTHING // 2]  # the weak model is theirs together
    # What comes now ends the job at once, as it would any program.
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers

    def stop_in_a_wave(wave: Any, *arguments: Any) -> Any:
        found = score(wave, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(jobs.scoring, "score_wave", stop_in_a_wave)
        assert evaluate(plans[1:], warehouse) == 4
    assert "without a result: three (stopped)" in capsys.readouterr().out
    assert outcomes(warehouse)[2:] == [("two", "done"), ("three", "stopped")]
    part = scored(warehouse)[-1]
    assert 0 < part < EVERYTHING // 2

    # The last start asks what is new, and nothing else.
    assert evaluate(plans[2:], warehouse) == 0
    assert scored(warehouse)[2:] == [0, part, EVERYTHING // 2 - part]
    stored = rows_of(warehouse, LOGPROBS)
    keys = {(row["model_key"], row["prefix_hash"], row["completion_hash"]) for row in stored}
    assert len(keys) == len(stored) == 4 * EVERYTHING // 2
    judged = rows_of(warehouse, BENCHMARK_PAIRS)
    assert len(judged) == 3 * len(GOOD)
    assert {row["status"] for row in judged} == {"ok"}


def test_max_hours_are_those_of_the_job_not_of_each_row(
    spark: SparkSession,
    tmp_path: Path,
    tokenizer: Path,
    take_hours: TakeHours,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {name: strong(adapter=name) for name in ("one", "two")}
    config = make_config(
        tmp_path, tokenizer, GOOD[:2], REWARDBENCH, rows=rows, run={"max_hours": 1}
    )
    warehouse = Warehouse(spark, config.warehouse)
    take_hours(jobs.evaluate, "judge_pairs")
    assert evaluate(plan(config), warehouse) == 4
    shown = capsys.readouterr().out
    assert "stopped: --max-hours is over" in shown
    assert "without a result: two (not begun)" in shown
    assert outcomes(warehouse) == [("one", "done")]


# --- the command lines -------------------------------------------------------------------------


def write_config(config: EvaluateConfig, file: Path) -> str:
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return str(file)


def test_rows_a_limit_and_the_routers_audit_are_asked_for_by_options(
    spark: SparkSession, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        tmp_path, tokenizer, GOOD, REWARDBENCH, rows={"plain": {"change": PLAIN}, "cdr": {}}
    )
    file = write_config(config, tmp_path / "evaluate.yaml")
    options = ["--rows", "cdr", "--limit", "5", "--audit-router"]
    assert jobs.evaluate.main(["--config", file, *options]) == 0
    shown = capsys.readouterr().out
    assert "A = cdr\nB = cdr.oracle" in shown
    assert "accuracy lost against the oracle" in shown
    judged = rows_of(Warehouse(spark, config.warehouse), BENCHMARK_PAIRS)
    assert {row["dataset"] for row in judged} == {"bench.limit-5"}
    assert {row["reward_name"] for row in judged} == {"cdr", "cdr.oracle"}
    assert len(judged) == 2 * 5


def test_a_limited_study_is_asked_for_by_options(
    spark: SparkSession, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = make_config(tmp_path, tokenizer, GOOD, REWARDBENCH)
    kept = {"dataset", "warehouse", "input", "statistics", "tracking"}
    models = {
        name: {"path": str(tokenizer), "engine": "stub", "adapter": name, "score": score}
        for score, name in enumerate(("base", "sft", "dpo"))
    }
    tree = {
        **shared.model_dump(mode="json", include=kept, exclude_unset=True),
        "study": "small",
        "score_name": "points",
        "models": models,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    options = ["--limit", "4", "--set", "cells={dpo: [base]}"]
    assert pair_study(["--config", str(tmp_path / "study.yaml"), *options]) == 0
    assert "1 pairs of 2 models, 4 of 4 labelled pairs judged" in capsys.readouterr().out
    (cell,) = rows_of(Warehouse(spark, shared.warehouse), STUDY_PAIRS)
    assert (cell["dataset"], cell["numerator"], cell["denominator"]) == (
        "bench.limit-4", "dpo", "base"
    )  # fmt: skip
