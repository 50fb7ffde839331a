"""A policy study in Delta, in MLflow and with a registered reward; its stages are stubs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

from cdr.config import TrackingSpec
from cdr.plan import plan_reward
from cdr.policy_study import plan_policy_study
from cdr.policy_study_config import PolicyStudyConfig
from cdr.registration import register_reward
from cdr.reward_config import load_reward_config
from cdr.tables import POLICY_RESULTS, RUNS
from cdr.tracking import RunTracker
from cdr.tracking_store import open_store
from cdr.warehouse import Warehouse
from tests.spark.conftest import MakeStore
from tests.unit.test_policy_study import carry_out, load, model, tree

__all__ = ["load", "model", "tree"]  # fixtures

# Of MLflow itself: old pandas and pydantic calls, and type hints of its own classes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    r"ignore:[\s\S]*type hint[\s\S]*:UserWarning",
)


def test_results_are_in_delta_and_the_stages_below_the_studys_run(
    spark: SparkSession,
    tree: dict[str, Any],
    load: Callable[..., PolicyStudyConfig],
    make_store: MakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CDR_CACHE", str(tmp_path / "cache"))
    uri = make_store(tmp_path)
    reward = plan_reward(load_reward_config(tmp_path / "reward.yaml"))
    register_reward(reward, uri=uri, name="ours", alias="best")
    tree["rows"]["registered"] = {"registered": "models:/ours@best"}
    tree["tracking"] = {"uri": uri}
    plan = plan_policy_study(load())
    # The same reward by two names: two policies, trained on equal pairs.
    assert plan.rewards["registered"] == plan.rewards["plain"] == reward.key
    warehouse = Warehouse(spark, plan.config.warehouse)
    (tmp_path / "fail").write_text("safe.train")
    assert carry_out(plan, tmp_path, warehouse)[0].exit_code == 1
    (tmp_path / "fail").unlink()
    assert carry_out(plan, tmp_path, warehouse)[0].exit_code == 0

    # An alias is pinned to the version it stood for.
    config = yaml.safe_load((tmp_path / "out/configs/registered.annotate.yaml").read_text())
    assert config["reward"] == "models:/ours/1"
    rows = [row.asDict() for row in warehouse.read(POLICY_RESULTS).collect()]
    values = {(row["row"], row["metric"]): row for row in rows}
    lengths = {(name, f"length_{unit}") for name in tree["rows"] for unit in ("chars", "tokens")}
    assert set(values) == lengths | {
        (name, "reward_win_rate") for name in tree["rows"] if name != "start"
    }
    assert len(values) == len(rows)
    plain = values["plain", "reward_win_rate"]
    assert (plain["value"], plain["ci_low"], plain["questions"]) == (60, 40, 5)
    assert (plain["printed"], plain["judge"], plain["reward_key"]) == (55.5, "ours", reward.key)
    assert (plain["learning_rate"], plain["beta"]) == (1e-4, 10)
    start = values["start", "length_chars"]
    assert (start["value"], start["reward_key"], start["learning_rate"]) == (99.5, None, None)
    ran = sorted(warehouse.read(RUNS).collect(), key=lambda row: row["started_at"])
    assert [row["outcome"] for row in ran] == ["failed", "done"]
    assert "safe.train: exit code 1" in ran[0]["error"]
    assert ran[1]["counts"]["stages_carried_out"] == 2
    assert {row["run_id"] for row in rows} == {ran[1]["run_id"]}

    # Both starts are one run of MLflow, and each stage is told to be a part of it.
    (study,) = {row["mlflow_run_id"] for row in ran}
    metrics = open_store(uri).get_run(study).data.metrics
    assert metrics["plain/bench/reward_win_rate"] == 60
    assert config["tracking"]["parent"] == study
    # A policy's answers are linked with the run that trained it (the stub names the study's).
    answers = {
        name: yaml.safe_load((tmp_path / f"out/configs/{name}.bench.yaml").read_text())
        for name in ("start", "safe")
    }
    assert {name: given["training_run"] for name, given in answers.items()} == {
        "start": None, "safe": study
    }  # fmt: skip
    with RunTracker(TrackingSpec(**config["tracking"]), "w", run_name="x", config={}) as stage:
        pass
    assert open_store(uri).get_run(stage.run_id).data.tags["mlflow.parentRunId"] == study
