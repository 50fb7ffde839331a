"""The evaluate job as users run it, on the demo's models and a few of its pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from deltalake import DeltaTable
from mlflow import MlflowClient

from tests.e2e.conftest import ROOT


def run(folder: Path) -> tuple[int, str]:
    """Evaluate 4 of the demo's pairs in a warehouse of its own, by two of the demo's rows."""
    place = ROOT / "conf" / "evaluate"
    config = yaml.safe_load((place / "demo.yaml").read_text())
    del config["rows"]["plain"]
    config |= {"warehouse": str(folder / "warehouse"), "quick": {"pairs": 4}}
    config["input"]["path"] = str(place / config["input"]["path"])
    config["reward"] = str(place / config["reward"])
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "spark-submit"),
            "--properties-file", str(ROOT / "conf/cluster/local.conf"),
            str(ROOT / "jobs/evaluate.py"), "--config", str(folder / "evaluate.yaml"), "--quick",
        ],
        capture_output=True, text=True, timeout=800, cwd=folder,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
    )  # fmt: skip
    return done.returncode, f"{done.stdout}\n{done.stderr}"


def rows(warehouse: Path, table: str) -> list[dict[str, Any]]:
    return DeltaTable(str(warehouse / table)).to_pyarrow_table().to_pylist()


def test_a_quick_evaluation_with_the_demo_models_says_what_it_found_and_keeps_it(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo_model.exists()
    for name in ("MLFLOW_TRACKING_URI", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)
    warehouse = tmp_path / "warehouse"
    code, output = run(tmp_path)
    assert code == 0, output
    pairs = rows(warehouse, "benchmark_pairs")
    assert {row["dataset"] for row in pairs} == {"demo-pairs.quick-4"}
    assert {row["status"] for row in pairs} == {"ok"}
    for name in ("router", "oracle"):
        ours = [row for row in pairs if row["reward_name"] == name]
        assert Counter(row["section"] for row in ours) == dict.fromkeys(
            ("Chat", "Chat Hard", "Safety", "Reasoning"), 1
        )
        (everything,) = (
            row
            for row in rows(warehouse, "benchmark_results")
            if row["reward_name"] == name and row["name"] == "all pairs"
        )
        assert everything["wins"] == sum(row["outcome"] == "win" for row in ours)
        assert everything["accuracy"] == everything["wins"] / 4
    for text in (
        "longer wins",
        "router audit",
        "McNemar",
        "not above chance",
        "left out: 0",
        "report: ",
    ):
        assert text in output

    client = MlflowClient(tracking_uri=f"sqlite:///{warehouse}/mlflow.db")
    experiment = client.get_experiment_by_name("cdr-evaluate")
    assert experiment is not None
    all_runs = client.search_runs([experiment.experiment_id])
    (compared,) = (run for run in all_runs if run.data.tags["cdr.job"] == "compare")
    both = {compared.data.params[name] for name in ("a", "b")}
    assert both == {"CDR, oracle", "CDR, router"}
    assert compared.data.metrics["pairs/all pairs"] == 4
    assert 0 < compared.data.metrics["mcnemar_p/all pairs"] <= 1
    runs = [run for run in all_runs if run is not compared]
    assert {run.data.tags["cdr.row"] for run in runs} == {"router", "oracle"}
    for found in runs:
        assert found.info.status == "FINISHED"
        assert "accuracy/overall/mean of sections" in found.data.metrics
        files = {file.path for file in client.list_artifacts(found.info.run_id)}
        assert {"accuracy.png", "length.png", "routing.png", "summary.json", "config.yaml"} <= files
        assert "report.html" in files
