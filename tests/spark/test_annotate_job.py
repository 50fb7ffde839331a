"""The annotate job on stub engines, in this process: what it prints, what MLflow keeps of it."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable, write_deltalake
from mlflow import MlflowClient
from pyspark.sql import SparkSession

import jobs.scoring
from cdr.cli import run_job
from cdr.tracking import git_commit
from jobs.annotate import main
from tests.e2e.conftest import ROOT, Job, make_rows, write_job
from tests.spark.conftest import MakeStore, TakeHours
from tests.tokenizers import make_smollm2

MakeJob = Callable[..., Job]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """Make a job whose stubs borrow a tokenizer that is trained in a moment."""
    make_smollm2().save_pretrained(tmp_path / "tokenizer")

    def make(*arguments: object, **run: object) -> Job:
        return write_job(tmp_path, tmp_path / "tokenizer", *arguments, **run)

    return make


@pytest.fixture
def run(spark: SparkSession, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a job; give exit code and output."""

    def run(job: Job, *arguments: str) -> tuple[int, str]:
        code = run_job(lambda: main(["--config", str(job.config), *arguments]))
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_limit_takes_few_prompts_under_a_name_of_its_own_and_its_scores_are_kept(
    make_job: MakeJob, run: Run
) -> None:
    job = make_job(make_rows(range(6), range(2)))
    code, output = run(job, "--limit", "2")
    assert code == 0, output
    assert {row["dataset"] for row in job.rows("rewards")} == {"test.limit-2"}
    assert len(job.rows("logprobs")) == 2 * 2 * 2
    code, output = run(job, "--dry-run")
    assert code == 0, output
    assert "24 asked, 8 in the store (33%), 16 to score" in output
    assert "dry run" in output
    assert len(job.rows("logprobs")) == 8


def test_a_line_that_is_not_json_ends_the_run_with_a_clear_error(
    make_job: MakeJob, run: Run
) -> None:
    job = make_job(make_rows(range(2), range(2)))
    with job.input.open("a") as stream:
        stream.write('{"prompt": \n')
    code, output = run(job)
    assert code in (1, 2), output
    assert "error: the input" in output
    assert "Traceback" not in output


def test_max_hours_commits_the_wave_in_flight_and_starts_no_other(
    make_job: MakeJob, run: Run, take_hours: TakeHours
) -> None:
    job = make_job(make_rows(range(8), range(2)), wave_tokens=200)
    take_hours(jobs.scoring, "score_wave")
    code, output = run(job, "--max-hours", "1")
    assert code == 4, output
    assert "stopped: --max-hours is over" in output
    assert job.commits("logprobs") == 2, "not one wave (creating the table is commit 0)"
    (stopped,) = job.rows("runs")
    assert (stopped["outcome"], stopped["waves_done"]) == ("stopped", 1)
    assert stopped["waves_total"] > 1
    committed = len(job.rows("logprobs"))
    assert 0 < committed < 2 * 8 * 2
    assert dict(stopped["counts"])["logprobs_scored"] == committed


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The least value that this share of all values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def test_the_mlflow_run_says_what_was_asked_of_which_versions_and_what_came_out(
    make_job: MakeJob,
    run: Run,
    make_store: MakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)
    job = make_job([])
    uri = make_store(job.warehouse)
    rows, source = make_rows(range(10), range(3)), str(tmp_path / "completions")
    for part in (rows[:15], rows[15:]):
        write_deltalake(source, pa.Table.from_pylist(part), mode="append")
    models = yaml.safe_load(job.config.read_text())["reward"]["models"]
    job.edit(
        input__path=source,
        input__format="delta",
        reward__models__router={**models["weak"], "adapter": "router"},
        reward__prompt_pack=str(ROOT / "conf/prompts/cdr-v1.yaml"),
        reward__routing={"mode": "adaptive"},
        tracking__enabled=True,
        report={"texts": False},
    )
    code, output = run(job)
    assert code == 0, output

    tables = {
        name: job.rows(name)
        for name in ("routes", "logprobs", "rewards", "rejects", "preferences", "unpaired")
    }
    (record,) = job.rows("runs")
    assert f"mlflow ui --backend-store-uri {uri}" in output
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(record["mlflow_run_id"])
    assert {pair["mlflow_run_id"] for pair in tables["preferences"]} == {run.info.run_id}
    assert (run.info.run_name, run.info.status) == (record["run_id"], "FINISHED")

    params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
    assert params["dataset"] == "test"
    assert params["reward.models.strong.adapter"] == "s"
    assert params["reward.routing.mode"] == "adaptive"
    assert params["pairs.validation_fraction"] == "0.05", "a default is part of what was asked"
    assert tags["cdr.config_hash"] == record["config_hash"]
    assert tags["cdr.reward_key"] == record["reward_key"]
    assert {tags["cdr.selection_key"]} == {pair["selection_key"] for pair in tables["preferences"]}
    assert {tags[f"cdr.model_key.{role}"] for role in ("strong", "weak")} == {
        row["model_key"] for row in tables["logprobs"]
    }
    assert tags["cdr.model_key.router"]
    assert tags.get("mlflow.source.git.commit") == git_commit()

    assert record["input_versions"] == [("completions", 1)]
    versions = {name: DeltaTable(str(job.warehouse / name)).version() for name in tables}
    # Creating a table is its version 0; a replace that changes nothing makes none.
    assert all(versions[name] >= 1 for name, found in tables.items() if found)
    assert {name: text for name, text in tags.items() if re.match(r"cdr\.(in|out)put", name)} == {
        "cdr.input.completions": f"{source}@1",
        **{f"cdr.output.{name}": f"{job.warehouse}/{name}@{v}" for name, v in versions.items()},
    }
    datasets = {
        (item.tags[0].value, item.dataset.name): json.loads(item.dataset.source)
        for item in run.inputs.dataset_inputs
    }
    assert datasets["input", "completions"] == {"path": source, "delta_table_version": 1}
    assert datasets["output", "preferences"]["delta_table_version"] == versions["preferences"]

    expected: dict[str, float] = {
        "prompts": 10, "candidates": 30, "ok": 30, "failed": 0, "rejected": 0,
        "logprobs_asked": 60, "logprobs_scored": 60, "pairs": len(tables["preferences"]),
    }  # fmt: skip
    prefixes = {
        (r["model_key"], r["prefix_hash"]): r["num_prefix_tokens"] for r in tables["logprobs"]
    }
    expected["tokens"] = sum(prefixes.values()) + sum(r["num_tokens"] for r in tables["logprobs"])
    expected["tokens_per_s"] = expected["tokens"] / metrics["scoring_s"]
    for domain in {route["domain"] for route in tables["routes"]}:
        routed = [route for route in tables["routes"] if route["domain"] == domain]
        scored = [row["reward"] for row in tables["rewards"] if row["domain"] == domain]
        pairs = [pair for pair in tables["preferences"] if pair["domain"] == domain]
        chosen, refused = (
            [pair[f"{side}_num_tokens"] for pair in pairs] for side in ("chosen", "rejected")
        )
        expected |= {
            f"domain.{domain}": len(routed),
            f"reward_p05.{domain}": nearest_rank(scored, 0.05),
            f"reward_p50.{domain}": nearest_rank(scored, 0.5),
            f"margin_p75.{domain}": nearest_rank([pair["margin"] for pair in pairs], 0.75),
            f"chosen_tokens.{domain}": mean(chosen),
            f"rejected_tokens.{domain}": mean(refused),
            f"chosen_longer.{domain}": mean(map(operator.gt, chosen, refused)),
        }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    roles = {"router", "strong", "weak"}
    assert {name for name in metrics if name.startswith("load_s")} == {f"load_s.{r}" for r in roles}
    counts = dict(record["counts"])
    assert {name for name in counts if name.startswith("load_s")} == {f"load_s.{r}" for r in roles}
    assert "requests_resubmitted" not in metrics  # nothing was
    # One host routed, then scored.
    assert 0 < metrics["engines_busy_s"] < metrics["engines_at_hand_s"] < metrics["wall_s"]
    assert counts["engines_at_hand_s"] == round(metrics["engines_at_hand_s"])
    assert re.search(r"engines +\d+%   busy while there were waves", output)

    artifacts = Path(url2pathname(urlsplit(run.info.artifact_uri).path))
    asked = yaml.safe_load((artifacts / "config.yaml").read_text())
    assert asked == json.loads(record["config"])
    assert json.loads((artifacts / "summary.json").read_text()) == pytest.approx(metrics)
    page = (job.warehouse / "reports" / f"{record['run_id']}.html").read_text(encoding="utf-8")
    assert f"report: {job.warehouse}/reports/{record['run_id']}.html" in output
    assert (artifacts / "report.html").read_text(encoding="utf-8") == page
    assert all(pair["prompt_id"] in page for pair in tables["preferences"])
    kept = [job.warehouse / "mlflow.db", *artifacts.iterdir()]
    assert not any(b"Question" in file.read_bytes() for file in kept), "a prompt was logged"
