"""SimPO from a real warehouse with a real MLflow store: pinned pairs, links both ways, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from deltalake import DeltaTable
from mlflow import MlflowClient
from pyspark.sql import SparkSession

pytest.importorskip("trl")

from cdr.child_jobs import work_alone
from cdr.config import TrackingSpec
from cdr.errors import ConfigError, InputError, SetupError, TableError
from cdr.tracking import RunTracker
from jobs.train_simpo import main
from tests.spark.annotated import REWARD, Annotated
from tests.spark.conftest import MakeStore
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "train-simpo.md"

pytestmark = [
    pytest.mark.timeout(600),
    # Of MLflow and of the libraries under TRL.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]


@pytest.fixture(autouse=True)
def _no_tracking_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DATABRICKS_RUNTIME_VERSION", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("start"))


@pytest.fixture
def warehouse(annotated: Annotated, make_store: MakeStore, tmp_path: Path) -> Annotated:
    copy = annotated.copy(tmp_path)
    make_store(copy.warehouse)
    return copy


def write_config(warehouse: Annotated, start: Path, **changes: Any) -> str:
    output = warehouse.warehouse.parent / "out"
    tree = {
        "warehouse": str(warehouse.warehouse),
        "preferences": {"dataset": "demo", "reward": "plain", **changes.pop("preferences", {})},
        "start": {"path": str(start)},
        "output": str(output),
        "search": {"learning_rates": [1e-3, 1e-4], "betas": [10]},
        "training": {"batch_size": 2, "max_length": 200, "dtype": "float32", "lora": {"rank": 2}},
        **changes,
    }
    path = warehouse.warehouse.parent / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def queries() -> Iterator[str]:
    yield from re.findall(r"```sql\n(.+?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_a_search_is_linked_to_what_its_pairs_came_from_and_pinned_to_their_version(
    spark: SparkSession, warehouse: Annotated, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(warehouse.warehouse)
    # As an annotate run with tracking, by a registered reward, would have left the table.
    with RunTracker(TrackingSpec(), folder, run_name="annotate", config={}) as annotate:
        pass
    client = MlflowClient(annotate.uri)
    client.create_registered_model("plain")
    client.create_model_version("plain", f"file://{folder}", description="Plain.")
    spark.sql(
        f"UPDATE delta.`{folder}/preferences` "
        f"SET mlflow_run_id = '{annotate.run_id}', reward_version = 'plain/1' "
        "WHERE reward_name = 'plain'"
    )
    version = warehouse.version("preferences")
    rows = [row for row in warehouse.rows("preferences") if row["reward_name"] == "plain"]

    assert main(["--config", write_config(warehouse, start)]) == 0

    (experiment,) = client.search_experiments(filter_string="name = 'cdr-simpo'")
    runs = client.search_runs([experiment.experiment_id])
    (search,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    points = {run.info.run_name: run for run in runs if run is not search}
    assert set(points) == {"lr-0.001_beta-10", "lr-0.0001_beta-10"}
    tags = search.data.tags
    assert {name.removeprefix("cdr."): text for name, text in tags.items()}.items() >= {
        "job": "train_simpo", "warehouse": folder, "dataset": "demo", "reward_name": "plain",
        "reward_key": rows[0]["reward_key"], "selection_key": rows[0]["selection_key"],
        "reward_version": "plain/1", "preferences_version": str(version),
        "annotate_run_id": rows[0]["run_id"], "annotate_mlflow_run_id": annotate.run_id,
        "input.preferences": f"{folder}/preferences@{version}",
    }.items()  # fmt: skip
    (data,) = search.inputs.dataset_inputs
    assert json.loads(data.dataset.source)["delta_table_version"] == version
    assert search.data.params["preferences.version"] == str(version)
    for point in points.values():
        assert point.data.tags["mlflow.parentRunId"] == search.info.run_id
        assert point.data.tags["cdr.reward_version"] == "plain/1"
        assert float(point.data.params["gamma"]) == 3.0
        curve = client.get_metric_history(point.info.run_id, "loss")
        assert [entry.step for entry in curve] == list(range(1, len(curve) + 1))
        assert "validation/All/accuracy" in point.data.metrics
    assert tags["cdr.best"] in points

    # And back, from the annotate run and in SQL as the page has it.
    (training,) = [row for row in warehouse.rows("runs") if row["job"] == "train_simpo"]
    back = client.get_run(annotate.run_id).data.tags
    here, there = (tags["mlflow.note.content"], back["mlflow.note.content"])
    reward = "Reward: [plain/1](#/models/plain/versions/1)"
    assert here.startswith(f"{reward}\n\nAnnotate run: [{rows[0]['run_id']}](#/experiments/")
    assert here.endswith(f"/runs/{annotate.run_id})")
    assert there.startswith("SimPO training: [")
    assert there.endswith(f"/runs/{search.info.run_id})")
    page = client.get_model_version("plain", "1").description
    assert page.startswith("Plain.\n\nNewest runs with it")
    assert page.endswith(f"\n- train_simpo: {there.removeprefix('SimPO training: ')}")
    assert back[f"cdr.training.{search.info.run_id}"] == training["run_id"]
    assert (training["outcome"], training["mlflow_run_id"]) == ("done", search.info.run_id)
    for table in ("runs", "preferences"):
        spark.sql(f"CREATE OR REPLACE TEMP VIEW {table} AS SELECT * FROM delta.`{folder}/{table}`")
    trained, reward = ([row.asDict() for row in spark.sql(q).collect()] for q in queries())
    (found,) = trained
    # `twin` is p0 under another id: their pair is trained on once.
    counted = len({row["prompt_hash"] for row in rows if row["split"] == "train"})
    assert (found["annotate_run"], found["training"]) == (rows[0]["run_id"], training["run_id"])
    assert (found["preferences_version"], found["train_pairs"]) == (version, counted)
    assert [(r["reward_version"], r["annotate_in_mlflow"]) for r in reward] == [
        ("plain/1", annotate.run_id)
    ]
    manifest = json.loads((warehouse.warehouse.parent / "out/pairs/manifest.json").read_text())
    assert spark.sql(manifest["query"]).count() == len(rows)

    # The table goes on; the search does not: same pairs, same MLflow run, nothing trained anew.
    spark.sql(f"DELETE FROM delta.`{folder}/preferences` WHERE prompt_id = 'p1'")
    capsys.readouterr()
    assert main(["--config", write_config(warehouse, start)]) == 0
    printed = capsys.readouterr().out
    assert f"goes on with version {version}" in printed
    assert printed.count("done before") == 2
    again = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in again} == {run.info.run_id for run in runs}
    assert {run.info.status for run in again} == {"FINISHED"}
    other = {"reward": REWARD, "version": version + 1}
    with pytest.raises(ConfigError) as caught:
        main(["--config", write_config(warehouse, start, preferences=other)])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "preferences.reward", "preferences.version",
    ]  # fmt: skip


def test_pairs_that_cannot_be_meant_or_read_are_refused_before_a_model_loads(
    spark: SparkSession, warehouse: Annotated, tmp_path: Path
) -> None:
    missing = tmp_path / "no-model"

    def refused(kind: type[Exception], **preferences: Any) -> str:
        with pytest.raises(kind) as caught:
            main(["--config", write_config(warehouse, missing, preferences=preferences)])
        assert not (tmp_path / "out" / "pairs").exists()
        return str(caught.value)

    mixed = refused(InputError, reward=None)
    assert "3 sets of pairs match" in mixed
    assert "preferences.reward" in mixed
    assert mixed.count(REWARD) == 2
    assert "no pairs match" in refused(InputError, dataset="absent")
    old = warehouse.version("preferences")
    place = warehouse.warehouse / "preferences"
    spark.sql(f"UPDATE delta.`{place}` SET run_id = concat(run_id, '-again')")
    kept = {Path(file).name for file in DeltaTable(str(place)).file_uris()}
    for file in place.rglob("*.parquet"):
        if file.name not in kept and "_delta_log" not in file.parts:
            file.unlink()  # as a vacuum does
    gone = refused(TableError, version=old)
    assert f"version {old} of preferences cannot be read" in gone
    assert "vacuum" in gone
    assert "version 999" in refused(TableError, version=999)


def test_a_tracking_server_that_is_down_stops_it_before_the_pairs_are_read(
    warehouse: Annotated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = {"uri": "http://127.0.0.1:1"}
    config = write_config(warehouse, tmp_path / "no-model", tracking=tracking)
    with pytest.raises(SetupError, match="MLflow cannot be used"):
        main(["--config", config])
    assert not (tmp_path / "out" / "pairs").exists()


def test_one_start_at_a_time_trains_in_a_folder(warehouse: Annotated, start: Path) -> None:
    output = warehouse.warehouse.parent / "out"
    output.mkdir()
    config = write_config(warehouse, start, tracking={"enabled": False})
    with work_alone(output), pytest.raises(SetupError, match="still at work in this folder"):
        main(["--config", config])
    assert [file.name for file in output.iterdir()] == ["lock"]


def test_a_signal_to_the_launcher_ends_two_processes_in_good_order_in_one_mlflow_run(
    warehouse: Annotated, start: Path, tmp_path: Path
) -> None:
    training = {"batch_size": 2, "max_length": 200, "dtype": "float32", "lora": {"rank": 2}}
    config = write_config(
        warehouse,
        start,
        search={"learning_rates": [1e-3], "betas": [10]},
        training={**training, "epochs": 10_000, "save_steps": 5},  # much longer than it is let be
    )
    command = ["torch.distributed.run", "--nproc-per-node=2", "-m", "jobs.train_simpo"]
    log, folder = tmp_path / "log", tmp_path / "out" / "points" / "lr-0.001_beta-10" / "checkpoints"
    with log.open("w") as stream:
        launcher = subprocess.Popen(
            [sys.executable, "-m", *command, "--config", config],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    children: list[psutil.Process] = []
    try:
        while not list(folder.glob("checkpoint-*/trainer_state.json")):
            assert launcher.poll() is None, log.read_text()[-4000:]
            time.sleep(0.2)
        children = psutil.Process(launcher.pid).children(recursive=True)
        launcher.terminate()
        assert launcher.wait(200) == 1  # whatever its processes' codes are
        assert not psutil.wait_procs(children, 10)[1]
    finally:
        for process in (*children, launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
    assert "stopped: SIGTERM" in log.read_text()
    (row,) = [row for row in warehouse.rows("runs") if row["job"] == "train_simpo"]
    assert (row["outcome"], row["error"]) == ("stopped", "SIGTERM")

    client = MlflowClient(f"sqlite:///{warehouse.warehouse}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'cdr-simpo'")
    runs = client.search_runs([experiment.experiment_id])
    (search,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    (point,) = [run for run in runs if run is not search]
    assert search.info.run_id == row["mlflow_run_id"] == point.data.tags["mlflow.parentRunId"]
    # One point of the curve per step, and the checkpoint is of the last one.
    steps = [entry.step for entry in client.get_metric_history(point.info.run_id, "loss")]
    last = max(
        int(file.parent.name.partition("-")[2]) for file in folder.glob("*/trainer_state.json")
    )
    assert steps == list(range(1, last + 1))
