"""A real MLflow store on SQLite: what a run leaves there, and what happens when it goes away."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from cdr.config import TrackingSpec
from cdr.errors import SetupError, Stopped
from cdr.tracking import RunTracker, TableVersion, git_commit
from cdr.tracking_store import resolve_tracking_uri, ui_command
from cdr.version_links import link_version, log_evaluation

CONFIG = {"dataset": "toy", "reward": {"models": {"strong": {"path": "a/b"}}, "terms": []}}


@pytest.fixture(autouse=True)
def _no_tracking_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: creating its tables takes seconds."""
    return tmp_path_factory.mktemp("warehouse")


def make_tracker(
    warehouse: Path | str, spec: TrackingSpec | None = None, config: Any = CONFIG
) -> RunTracker:
    return RunTracker(
        spec or TrackingSpec(), str(warehouse), run_name="run-1", config=config, tags={"k": "v"}
    )


def stored_run(tracker: RunTracker) -> Run:
    run: Run = MlflowClient(tracking_uri=tracker.uri).get_run(tracker.run_id)
    return run


def artifact(tracker: RunTracker, name: str, folder: Path) -> str:
    client = MlflowClient(tracking_uri=tracker.uri)
    path = client.download_artifacts(tracker.run_id, name, str(folder))
    return Path(path).read_text(encoding="utf-8")


def test_a_run_has_config_versions_results_and_files(warehouse: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>9 pairs</p>")
    summary = {
        "rows": {"ok": 9, "rejected": {"too_long": 1}},
        "margin": {"chat & more": {"q50": 2.5, "q99": float("inf")}},
        "pairs": None,
        "warnings": ["weak pair"],
    }
    with make_tracker(warehouse) as tracker:
        tracker.log_table(TableVersion("completions", "/data/c", 3), role="input")
        tracker.log_table(TableVersion("preferences", "cat.db.p", None), role="output")
        tracker.log_metrics({"tokens_per_s": 10.0}, step=0)
        tracker.log_metrics({"tokens_per_s": 30.0}, step=1)
        tracker.log_summary(summary)
        tracker.log_file(report)

    run = stored_run(tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run-1"
    assert run.data.params == {
        "dataset": "toy",
        "reward.models.strong.path": "a/b",
        "reward.terms": "[]",
    }
    assert run.data.metrics == {
        "tokens_per_s": 30.0,
        "rows/ok": 9.0,
        "rows/rejected/too_long": 1.0,
        "margin/chat _ more/q50": 2.5,
    }
    assert run.data.tags["k"] == "v"
    assert run.data.tags["cdr.input.completions"] == "/data/c@3"
    assert run.data.tags["cdr.output.preferences"] == "cat.db.p@unversioned"
    assert len(run.data.tags["cdr.config_hash"]) == 64
    (data, other) = sorted(run.inputs.dataset_inputs, key=lambda item: item.dataset.name)
    assert data.dataset.name == "completions"
    assert json.loads(data.dataset.source) == {"path": "/data/c", "delta_table_version": 3}
    assert [tag.value for tag in other.tags] == ["output"]
    assert yaml.safe_load(artifact(tracker, "config.yaml", tmp_path)) == CONFIG
    assert json.loads(artifact(tracker, "summary.json", tmp_path)) == summary
    assert artifact(tracker, "report.html", tmp_path) == "<p>9 pairs</p>"
    assert not (warehouse / "mlflow-unsent").exists()


def test_the_store_lives_in_the_warehouse_and_the_ui_command_names_it(warehouse: Path) -> None:
    with make_tracker(warehouse) as tracker:
        pass
    assert tracker.uri == f"sqlite:///{warehouse}/mlflow.db"
    assert tracker.ui_command() == f"mlflow ui --backend-store-uri sqlite:///{warehouse}/mlflow.db"
    assert (warehouse / "mlflow.db").is_file()
    assert (warehouse / "mlruns" / str(tracker.run_id)).is_dir()
    assert ui_command("https://mlflow.example") is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("bad"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Stopped("SIGTERM"), "KILLED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(3), "FAILED"),
    ],
)
def test_how_the_block_ends_is_the_runs_status(
    warehouse: Path, error: BaseException | None, status: str
) -> None:
    tracker = make_tracker(warehouse)
    if error is None:
        with tracker:
            pass
    else:
        with pytest.raises(type(error)), tracker:
            raise error
    assert stored_run(tracker).info.status == status


def test_runs_are_linked_both_ways(warehouse: Path) -> None:
    with make_tracker(warehouse) as annotate:
        annotate.set_tags({"mlflow.note.content": "Ours, for the spring release."})
    with make_tracker(warehouse) as policy:
        policy.set_tags({"cdr.policy_run": str(policy.run_id)}, run_id=annotate.run_id)
        for _ in range(2):  # work that goes on in the same run links anew
            policy.link(str(annotate.run_id), "a1", is_our="Annotate run", are_its="Training")
    there, here = stored_run(annotate), stored_run(policy)
    assert there.data.tags["cdr.policy_run"] == policy.run_id
    page = f"#/experiments/{here.info.experiment_id}/runs"
    assert here.data.tags["mlflow.note.content"] == f"Annotate run: [a1]({page}/{annotate.run_id})"
    assert there.data.tags["mlflow.note.content"] == (
        f"Ours, for the spring release.\n\nTraining: [{here.info.run_name}]({page}/{policy.run_id})"
    )


def test_a_version_that_cannot_be_changed_costs_a_warning_and_no_run(
    warehouse: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("may only use it")

    with make_tracker(warehouse) as tracker:
        client = MlflowClient(tracker.uri)
        client.create_registered_model("r")
        client.create_model_version("r", f"file://{warehouse}", run_id=tracker.run_id)
        monkeypatch.setattr(MlflowClient, "update_model_version", refuse)
        link_version(tracker, "r/1", job="annotate")
        link_version(tracker, "r/2", job="annotate")
        log_evaluation(tracker, "r/2", "pairs", {"judged": 9})
        log_evaluation(tracker, "r/1", "pairs", {"judged": 9})
        link_version(tracker, None, job="annotate")
        tracker.log_metrics({"later": 1})
    denied, *missing = [record.getMessage() for record in caplog.records]
    assert denied.startswith("the reward r/1 gets no link to this run: PermissionError: may only")
    assert ["the reward r/2 gets no" in message for message in missing] == [True, True]
    run = stored_run(tracker)
    assert run.data.tags["mlflow.note.content"] == "Reward: [r/1](#/models/r/versions/1)"
    assert run.data.metrics == {"pairs/judged": 9.0, "later": 1.0}
    assert not (warehouse / "mlflow-unsent" / f"{tracker.run_id}.json").exists()


def test_long_values_are_cut_with_a_note_and_more_than_a_batch_is_taken(
    warehouse: Path, tmp_path: Path
) -> None:
    config = {f"key{number}": number for number in range(250)} | {"pack": "x" * 7000}
    with make_tracker(warehouse, config=config) as tracker:
        tracker.log_metrics({f"m{number}": number for number in range(250)})
    run = stored_run(tracker)
    assert len(run.data.params) == 251
    assert len(run.data.metrics) == 250
    assert len(run.data.params["pack"]) == 6000
    assert run.data.params["pack"].endswith("(cut: all of it is in config.yaml)")
    assert yaml.safe_load(artifact(tracker, "config.yaml", tmp_path))["pack"] == "x" * 7000


def test_passwords_in_uris_are_not_logged(warehouse: Path, tmp_path: Path) -> None:
    config = {"tables": {"logprobs": "s3://key:secret@bucket/logprobs"}}
    with make_tracker(warehouse, config=config) as tracker:
        pass
    shown = stored_run(tracker).data.params["tables.logprobs"]
    assert shown == "s3://***@bucket/logprobs"
    assert "secret" not in artifact(tracker, "config.yaml", tmp_path)


def test_a_store_that_goes_away_costs_no_work(
    warehouse: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("server gone")

    tracker = make_tracker(warehouse)
    with tracker:
        unsent = warehouse / "mlflow-unsent" / f"{tracker.run_id}.json"
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", refuse)
            tracker.log_summary({"rows": {"ok": 9}})
            tracker.set_tags({"late": "tag"})
    (message,) = [item.getMessage() for item in caplog.records if item.name == "cdr.tracking"]
    assert "server gone" in message
    assert str(unsent) in message
    kept = json.loads(unsent.read_text())
    assert [(item["what"], item["payload"]) for item in kept] == [
        ("metrics", {"step": 0, "rows/ok": 9.0}),
        ("summary.json", {"rows": {"ok": 9}}),
        ("tags", {"run_id": tracker.run_id, "late": "tag"}),
    ]
    # The status is tried all the same, so that no run is shown as running for ever.
    assert stored_run(tracker).info.status == "FINISHED"


# MLflow's own REST handlers; `mlflow server` puts a dozen job runners around them.
SERVER = """
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(warehouse: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A tracking server over the module's store, and its address."""
    with make_tracker(warehouse) as tracker:  # makes the store's tables, where no test has yet
        pass
    environment = {
        **os.environ,
        "_MLFLOW_SERVER_FILE_STORE": str(tracker.uri),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": (warehouse / "mlruns").as_uri(),
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


def test_a_server_that_is_killed_under_a_run_costs_no_work_and_what_it_missed_is_kept(
    warehouse: Path,
    server: tuple[subprocess.Popen[str], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    process, uri = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with make_tracker(warehouse, TrackingSpec(uri=uri)) as tracker:
        tracker.log_metrics({"waves": 1})
        process.kill()
        process.wait()
        tracker.log_metrics({"waves": 2}, step=1)
        tracker.log_table(TableVersion("preferences", "/data/p", 4), role="output")
        tracker.log_summary({"rows": {"ok": 9}})
    unsent = warehouse / "mlflow-unsent" / f"{tracker.run_id}.json"
    kept = [(item["what"], item["payload"]) for item in json.loads(unsent.read_text())]
    assert kept == [
        ("metrics", {"step": 1, "waves": 2.0}),
        ("tags", {"run_id": tracker.run_id, "cdr.output.preferences": "/data/p@4"}),
        ("table", {"role": "output", "name": "preferences", "place": "/data/p", "version": 4}),
        ("metrics", {"step": 0, "rows/ok": 9.0}),
        ("summary.json", {"rows": {"ok": 9}}),
        ("status", "FINISHED"),
    ]
    messages = [item.getMessage() for item in caplog.records if item.name == "cdr.tracking"]
    assert [str(unsent) in message for message in messages] == [True]
    # What was sent before is there.
    run = MlflowClient(tracking_uri=f"sqlite:///{warehouse}/mlflow.db").get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("RUNNING", {"waves": 1.0})
    assert run.data.params["dataset"] == "toy"


def test_work_that_goes_on_goes_on_in_its_run_and_other_work_gets_another(
    warehouse: Path, tmp_path: Path
) -> None:
    def run_once(config: Any) -> str:
        with RunTracker(
            TrackingSpec(), str(warehouse), run_name="r", config=config, note=tmp_path / "note.json"
        ) as tracker:
            assert stored_run(tracker).info.status == "RUNNING"
        return str(tracker.run_id)

    first = run_once(CONFIG)
    assert run_once(CONFIG) == first
    assert run_once({"dataset": "other"}) != first


def test_nested_run_outlives_a_store_that_went_away_after_the_parents_start(
    warehouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("server gone")

    with make_tracker(warehouse) as parent:
        nested = {"run_name": "child", "config": {"beta": 10}, "parent": parent}
        with RunTracker(TrackingSpec(), str(warehouse), **nested) as child:
            child.log_metrics({"loss": 1.0})
        assert stored_run(child).data.tags["mlflow.parentRunId"] == parent.run_id
        monkeypatch.setattr(MlflowClient, "create_run", refuse)
        with RunTracker(TrackingSpec(), str(warehouse), **nested) as lost:
            lost.log_metrics({"loss": 2.0}, step=3)
        parent.log_metrics({"late": 1.0})
    kept = json.loads((warehouse / "mlflow-unsent" / f"{parent.run_id}.json").read_text())
    assert [(item["run"], item["what"]) for item in kept] == [
        ("child", "run"), ("child", "params"), ("child", "metrics"), ("child", "status"),
        ("run-1", "metrics"),
    ]  # fmt: skip
    assert kept[2]["payload"] == {"step": 3, "loss": 2.0}
    assert stored_run(parent).info.status == "FINISHED"


def test_a_server_that_is_down_stops_the_job_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = make_tracker(tmp_path, TrackingSpec(uri="http://me:secret@127.0.0.1:1"))
    with pytest.raises(SetupError, match=r"tracking\.enabled=false") as caught, tracker:
        pytest.fail("the work began")
    assert "secret" not in str(caught.value)


def test_without_tracking_nothing_happens_under_the_same_interface(tmp_path: Path) -> None:
    with make_tracker(tmp_path, TrackingSpec(enabled=False)) as tracker:
        tracker.log_params({"a": 1})
        tracker.log_summary({"rows": {"ok": 9}})
        tracker.log_table(TableVersion("completions", "c", 1), role="input")
        tracker.log_file(tmp_path / "none.html")
        tracker.set_tags({"a": "b"})
    assert (tracker.run_id, tracker.uri, tracker.ui_command()) == (None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none, given = TrackingSpec(), TrackingSpec(uri="http://given")
    assert resolve_tracking_uri(none, f"file://{tmp_path}") == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(SetupError, match=r"tracking\.uri"):
        resolve_tracking_uri(none, "s3://bucket/warehouse")
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    assert resolve_tracking_uri(none, "dbfs:/warehouse") == "databricks"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert resolve_tracking_uri(none, str(tmp_path)) == "http://environment"
    assert resolve_tracking_uri(given, str(tmp_path)) == "http://given"


def test_the_first_use_of_a_database_is_quiet(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from cdr.config import TrackingSpec\n"
        "from cdr.tracking import RunTracker\n"
        "with RunTracker(TrackingSpec(), sys.argv[1], run_name='r', config={}) as tracker: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout + done.stderr == ""
    assert logging.root.manager.disable == logging.NOTSET


def test_the_commit_is_that_of_this_checkout_or_absent() -> None:
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    expected = answer.stdout.strip() if answer.returncode == 0 else None
    commit = git_commit()
    assert (commit.removesuffix("-dirty") if commit else None) == expected
