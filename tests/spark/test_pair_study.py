"""A study on stub models, in one session: each model asked once, cells as evaluations have them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pyspark.sql import SparkSession

from cdr.evaluation_config import EvaluateConfig
from cdr.evaluation_plan import plan_evaluation
from cdr.pair_study import StudyPlan, plan_study
from cdr.study_config import StudyConfig
from cdr.tables import BENCHMARK_PAIRS, LOGPROBS, RUNS, STUDY_PAIRS, Table
from cdr.warehouse import Warehouse
from jobs.evaluate import evaluate
from jobs.pair_study import dry_run, study
from tests.spark.conftest import MakeStore
from tests.spark.test_evaluate import BAD, GOOD, REWARDBENCH
from tests.tokenizers import make_smollm2

MODELS = ("base", "sft", "dpo")
# One model takes no longer rows than these tokens: the pair that has them is left out of all cells.
SHORT = 100


@pytest.fixture(scope="module")
def place(make_store: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_store(folder)
    make_smollm2().save_pretrained(folder / "tokenizer")
    long = {**GOOD[0], "id": 77, "chosen": "Ask the council. " * 40}
    rows = [*GOOD, *(row for row, _ in BAD.values()), long]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shared(place: Path) -> dict[str, Any]:
    return {
        "dataset": "bench",
        "warehouse": str(place / "warehouse"),
        "input": {"path": str(place / "pairs.jsonl"), "format": "json", "columns": REWARDBENCH},
        "run": {"max_rejected_fraction": 1},
        "sections": ["Chat", "Safety", "Reasoning"],
        "statistics": {"resamples": 200},
    }


def model(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {"path": str(place / "tokenizer"), "engine": "stub", "adapter": name, **changes}


def plan(place: Path, **changes: Any) -> StudyPlan:
    models = {
        name: model(place, name, score=score, title=name.upper())
        for score, name in enumerate(MODELS)
    }
    models["dpo"]["max_length"] = SHORT
    tree = {
        **shared(place),
        "study": "small",
        "score_name": "points",
        "models": models,
        "tracking": {"uri": f"sqlite:///{place}/mlflow.db"},
        **changes,
    }
    return plan_study(StudyConfig.model_validate(tree))


def rows(warehouse: Warehouse, table: Table) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in warehouse.read(table).collect()]


@pytest.fixture(scope="module")
def done(spark: SparkSession, place: Path) -> tuple[Warehouse, str]:
    warehouse = Warehouse(spark, str(place / "warehouse"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert dry_run(plan(place), warehouse) == 0
        assert study(plan(place), warehouse) == 0
    return warehouse, printed.getvalue()


def test_every_cell_is_stored_and_the_diagonal_is_null(
    done: tuple[Warehouse, str], place: Path
) -> None:
    warehouse, printed = done
    cells = {(row["numerator"], row["denominator"]): row for row in rows(warehouse, STUDY_PAIRS)}
    assert set(cells) == {(one, other) for one in MODELS for other in MODELS}
    for (one, other), row in cells.items():
        assert row["gap"] == MODELS.index(one) - MODELS.index(other)
        assert (row["accuracy"] is None) == (row["sections"] is None) == (one == other)
    assert {row["pairs"] for row in cells.values()} == {len(GOOD), None}
    assert {row["overall"] for row in cells.values()} == {"mean of sections"}
    for one, other in (("sft", "base"), ("dpo", "base"), ("dpo", "sft")):
        mirrored = cells[one, other]["wins"] + cells[other, one]["wins"] + cells[one, other]["ties"]
        assert mirrored == len(GOOD)
    assert f"{len(GOOD)} of {len(GOOD) + len(BAD) + 1} labelled pairs judged" in printed
    assert "left out of every cell:" in printed
    assert "too_long 1" in printed

    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("cdr-pair-study")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["accuracy/dpo over base"] == cells["dpo", "base"]["accuracy"]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "heatmap.png", "scatter.png", "summary.json",
    }  # fmt: skip


def test_a_cell_is_what_evaluating_its_two_models_as_a_reward_gives(
    done: tuple[Warehouse, str], place: Path
) -> None:
    warehouse, _ = done
    stored = len(rows(warehouse, LOGPROBS))
    config = EvaluateConfig.model_validate(
        {
            **shared(place),
            "reward": {
                "name": "dpo-over-sft",
                "models": {"strong": model(place, "dpo"), "weak": model(place, "sft")},
                "routing": {"mode": "none"},
                "encoding": {"template": "plain"},
            },
            "tracking": {"enabled": False},
            "report": {"enabled": False},
        }
    )
    assert evaluate(plan_evaluation(config), warehouse) == 0
    # New to it is the one long answer: too long for the study, not for these two.
    assert len(rows(warehouse, LOGPROBS)) == stored + 2
    judged = [
        row
        for row in rows(warehouse, BENCHMARK_PAIRS)
        if row["status"] == "ok" and not row["prompt_id"].endswith("/77")
    ]
    (cell,) = (
        row
        for row in rows(warehouse, STUDY_PAIRS)
        if (row["numerator"], row["denominator"]) == ("dpo", "sft")
    )
    assert cell["wins"] == sum(row["outcome"] == "win" for row in judged)
    for section, score in cell["sections"].items():
        ours = [row["outcome"] for row in judged if row["section"] == section]
        assert (score["wins"], score["pairs"]) == (ours.count("win"), len(ours))


def test_another_study_over_the_same_models_scores_nothing_and_has_its_own_cells(
    done: tuple[Warehouse, str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warehouse, _ = done
    stored = len(rows(warehouse, LOGPROBS))
    other = plan(
        place, study="other", cells={"dpo": ["sft", "base"]}, tracking={"enabled": False},
        reduction="mean",
    )  # fmt: skip
    assert study(other, warehouse) == 0
    assert ", 0 scored in" in capsys.readouterr().out
    assert len(rows(warehouse, LOGPROBS)) == stored
    cells = [row for row in rows(warehouse, STUDY_PAIRS) if row["study"] == "other"]
    assert {(row["numerator"], row["denominator"]) for row in cells} == {
        ("dpo", "sft"), ("dpo", "base"),
    }  # fmt: skip
    assert sum(row["study"] == "small" for row in rows(warehouse, STUDY_PAIRS)) == 9
    runs = [row for row in rows(warehouse, RUNS) if row["job"] == "pair_study"]
    assert {(row["reward_name"], row["outcome"]) for row in runs} == {
        ("small", "done"), ("other", "done"),
    }  # fmt: skip
