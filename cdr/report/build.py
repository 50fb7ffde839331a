"""Builds the page of runs and puts it beside the tables: when they end, or later from the tables.

A page is about work that is done: whatever goes wrong with it is told, and costs the run nothing.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cdr.benchmark_report import score_pairs
from cdr.comparison import collect_judged
from cdr.config import AnnotateConfig, content_hash
from cdr.errors import CdrError, TableError
from cdr.evaluation_config import EvaluateConfig
from cdr.files import Files
from cdr.plan import AnnotationPlan, RewardPlan, plan_reward
from cdr.report.annotation_gather import RunRows, gather_annotation
from cdr.report.annotation_page import render_annotation
from cdr.report.evaluation import EvaluatedRun, gather_evaluation
from cdr.report.evaluation_page import render_evaluation
from cdr.report.html import SUBMIT
from cdr.reward_config import RewardSpec
from cdr.runs import RunRecord
from cdr.summary import EngineUse, Summary, summarize
from cdr.tables import BENCHMARK_PAIRS, PREFERENCES, REJECTS, REWARDS, RUNS, UNPAIRED, Table
from cdr.warehouse import Warehouse

_FINISHED = ("done", "over_threshold")

Config = TypeVar("Config", AnnotateConfig, EvaluateConfig)


def report_command(warehouse: Warehouse, *run_ids: str) -> str:
    """Give the command that builds a run's page, or that of several evaluations, from tables."""
    place = warehouse.place(RUNS)
    elsewhere = "" if place == f"{warehouse.root}/{RUNS.name}" else f" --runs {place}"
    return (
        f"{SUBMIT} jobs/report.py --warehouse {warehouse.root}{elsewhere} --run {' '.join(run_ids)}"
    )


def report_run(
    rows: RunRows,
    warehouse: Warehouse,
    plan: AnnotationPlan,
    record: RunRecord,
    summary: Summary,
    *,
    ui_command: str | None,
    keep: Callable[[str], None],
) -> str | None:
    """Build the page of an annotate run that has just committed its last table.

    Args:
        rows: what it committed.
        warehouse: the tables; the page goes to `reports/<run_id>.html` beside them.
        plan: the run's plan.
        record: its row of `runs`, with outcome and counts.
        summary: its numbers.
        ui_command: the command that shows the MLflow run.
        keep: takes the page's HTML, to log it with the MLflow run.

    Returns:
        Where the page is; None where it could not be built or written: a warning then says why, and
        which command builds it.
    """

    def make(command: str) -> str:
        data = gather_annotation(
            rows, warehouse, plan.config, record, summary, plan.reward,
            rebuild=command, ui_command=ui_command,
        )  # fmt: skip
        return render_annotation(data)

    return _report(warehouse, [record], make, keep)


def report_evaluation(
    runs: Sequence[EvaluatedRun],
    warehouse: Warehouse,
    *,
    ui_command: str | None,
    keep: Callable[[str], None],
) -> str | None:
    """Build the page of evaluations that have just ended, one row each, as `report_run` does.

    Args:
        runs: in order; at least one; all on one benchmark.
        warehouse: the tables.
        ui_command: the command that shows the MLflow runs.
        keep: takes the page's HTML, to log it with the MLflow runs.
    """

    def make(command: str) -> str:
        data = gather_evaluation(runs, warehouse, rebuild=command, ui_command=ui_command)
        return render_evaluation(data)

    return _report(warehouse, [run.record for run in runs], make, keep)


def _report(
    warehouse: Warehouse,
    records: Sequence[RunRecord],
    make: Callable[[str], str],
    keep: Callable[[str], None],
) -> str | None:
    run_ids = [record.run_id for record in records]
    command = report_command(warehouse, *run_ids)
    try:
        page = make(command)
        keep(page)
        return write_page(warehouse, run_ids, page)
    except Exception as error:  # the run's work is done and must count as done
        what = str(error).splitlines() or [""]
        print(
            f"warning: the run is complete, but its report page is not: "
            f"{type(error).__name__}: {what[0]}\n  fix: build it from the tables: {command}",
            file=sys.stderr,
        )
        return None


def rebuild_report(
    spark: SparkSession,
    root: str,
    *,
    runs: str | None = None,
    run_ids: Sequence[str] = (),
    has_texts: bool | None = None,
) -> str:
    """Build the page of an earlier run, or of several evaluations, from its tables; scores nothing.

    Args:
        spark: the session.
        root: the warehouse.
        runs: place of the table `runs`, where the config put it elsewhere.
        run_ids: an annotate run, or evaluations of one benchmark in the order of the page's rows.
            Without any: the last annotate run that finished.
        has_texts: whether prompts and completions are shown; None for what the run's config says.

    Returns:
        Where the page is.

    Raises:
        TableError: there is no such run, runs do not go together, a later run has replaced the
            rows, or they were written by another version of this program.
    """
    place = {RUNS.name: runs} if runs else {}
    index = Warehouse(spark, root, place)
    records = [_find_run(index, run_id) for run_id in run_ids or (None,)]
    kinds = {(record.job, record.dataset) for record in records}
    if len(records) > 1 and (len(kinds) > 1 or records[0].job != "evaluate"):
        listed = ", ".join(f"{r.run_id} ({r.job} of {r.dataset})" for r in records)
        raise TableError(
            f"a page shows one annotate run, or evaluations of one benchmark; these are {listed}",
            where=index.place(RUNS),
            fix="build a page of each",
        )
    if records[0].job == "evaluate":
        return _rebuild_evaluation(records, index, place, has_texts)
    return _rebuild_annotation(records[0], index, place, has_texts)


def find_evaluations(
    spark: SparkSession, root: str, dataset: str | None, *, runs: str | None = None
) -> list[str]:
    """Name the last finished evaluation of every reward on a benchmark, in the order they began.

    Args:
        spark: the session.
        root: the warehouse.
        dataset: the benchmark, or the sample of it; None for the one evaluated last.
        runs: place of the table `runs`, where the config put it elsewhere.

    Raises:
        TableError: none has finished.
    """
    warehouse = Warehouse(spark, root, {RUNS.name: runs} if runs else {})
    finished = warehouse.read(RUNS).where("job = 'evaluate'").where(
        F.col("outcome").isin(*_FINISHED)
    )  # fmt: skip
    last = finished.groupBy("dataset", "reward_key").agg(F.max("run_id").alias("run_id"))
    # One row per reward and benchmark.
    rows = sorted(last.collect(), key=lambda row: row["run_id"])
    wanted = dataset or (rows[-1]["dataset"] if rows else None)
    found = [row["run_id"] for row in rows if row["dataset"] == wanted]
    if not found:
        known = ", ".join(sorted({row["dataset"] for row in rows})) or "none"
        what = "no evaluation" if dataset is None else f"no evaluation on '{dataset}'"
        raise TableError(
            f"{what} has finished in this warehouse; benchmarks evaluated here: {known}",
            where=warehouse.place(RUNS),
            fix="name another warehouse or benchmark, or run jobs/evaluate.py first",
        )
    return found


def _rebuild_annotation(
    record: RunRecord, index: Warehouse, place: dict[str, str], has_texts: bool | None
) -> str:
    config = _with_texts(_config_of(record, AnnotateConfig), has_texts)
    warehouse = Warehouse(index.spark, index.root, {**config.tables, **place})
    rows = RunRows(
        _rows_of(REWARDS, record, warehouse),
        _rows_of(PREFERENCES, record, warehouse, may_be_empty=True),
        _rows_of(REJECTS, record, warehouse, may_be_empty=True),
    )
    counts = record.counts
    ended = record.ended_at or record.started_at
    summary = summarize(
        rows.rewards,
        rows.rejects,
        rows.pairs,
        _rows_of(UNPAIRED, record, warehouse, may_be_empty=True),
        asked=counts.get("logprobs_asked", 0),
        scored=counts.get("logprobs_scored", 0),
        tokens=counts.get("tokens", 0),
        scoring_s=float(counts.get("scoring_s", 0)),
        engines=EngineUse.read(counts),
        wall_s=(ended - record.started_at).total_seconds(),
    )
    data = gather_annotation(
        rows, warehouse, config, record, summary, _plan_of(config.reward),
        rebuild=report_command(warehouse, record.run_id),
    )  # fmt: skip
    return write_page(warehouse, [record.run_id], render_annotation(data))


def _rebuild_evaluation(
    records: Sequence[RunRecord], index: Warehouse, place: dict[str, str], has_texts: bool | None
) -> str:
    configs = [_with_texts(_config_of(record, EvaluateConfig), has_texts) for record in records]
    warehouse = Warehouse(index.spark, index.root, {**configs[0].tables, **place})
    found = []
    for record, config in zip(records, configs, strict=True):
        judged = collect_judged(_rows_of(BENCHMARK_PAIRS, record, warehouse))
        report = score_pairs(
            judged,
            config.sections_in_use(),
            resamples=config.statistics.resamples,
            seed=config.statistics.seed,
        )
        found.append(EvaluatedRun(record, config, judged, report, _plan_of(config.reward)))
    run_ids = [record.run_id for record in records]
    data = gather_evaluation(found, warehouse, rebuild=report_command(warehouse, *run_ids))
    return write_page(warehouse, run_ids, render_evaluation(data))


def write_page(warehouse: Warehouse, run_ids: Sequence[str], page: str) -> str:
    """Write a page beside the tables, through the file system that holds them; give its place."""
    first, *others = run_ids
    name = f"{first}-and-{len(others)}-more-{content_hash(others)[:6]}" if others else first
    place = f"{warehouse.reports}/{name}.html"
    files = Files(warehouse.spark)
    files.write_text(place, page)
    return files.full_name(place)


def _find_run(warehouse: Warehouse, run_id: str | None) -> RunRecord:
    jobs = ("annotate",) if run_id is None else ("annotate", "evaluate")
    runs = warehouse.read(RUNS).where(F.col("job").isin(*jobs))
    wanted = (
        F.col("outcome").isin(*_FINISHED) if run_id is None else F.col("run_id") == F.lit(run_id)
    )
    row = runs.where(wanted).orderBy(F.desc("run_id")).first()
    if row is None:
        # A few ids, for the message.
        known = [r["run_id"] for r in runs.orderBy(F.desc("run_id")).limit(5).collect()]
        what = (
            "no annotate run has finished"
            if run_id is None
            else f"no annotate or evaluate run '{run_id}'"
        )
        raise TableError(
            f"{what} in this warehouse; the last ones begun: {', '.join(known) or 'none'}",
            where=warehouse.place(RUNS),
            fix="name another warehouse or run, or run jobs/annotate.py first; --evaluation builds "
            "the page of an evaluation",
        )
    values = row.asDict()
    # Spark gives times of this machine's zone, without saying so.
    for name in ("started_at", "ended_at"):
        values[name] = values[name] and values[name].astimezone(dt.UTC)
    return RunRecord(**values)


def _config_of(record: RunRecord, kind: type[Config]) -> Config:
    tree: dict[str, Any] = json.loads(record.config)
    tree.pop("sample", None)  # an evaluation's; the name of the benchmark says it too
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TableError(
            f"the config of run '{record.run_id}' is not one of this version: {place}: "
            f"{first['msg'].splitlines()[0]}",
            fix="build the page with the version that made the run, from the folder it was "
            "started in (its model paths may be relative)",
        ) from None


def _with_texts(config: Config, has_texts: bool | None) -> Config:
    if has_texts is None:
        return config
    report = config.report.model_copy(update={"texts": has_texts})
    return config.model_copy(update={"report": report})


def _plan_of(reward: RewardSpec) -> RewardPlan | None:
    try:
        return plan_reward(reward)
    except (CdrError, OSError):
        return None  # the models are elsewhere: the page does without the tokens, and says so


def _rows_of(
    table: Table, record: RunRecord, warehouse: Warehouse, *, may_be_empty: bool = False
) -> DataFrame:
    rows = warehouse.read(table).where(F.col("run_id") == record.run_id)
    if may_be_empty or not rows.isEmpty():
        return rows
    others = warehouse.read(table).where(F.col("dataset") == record.dataset)
    # Runs replace each other's rows: there are as many as rewards and selections.
    known = sorted(row[0] for row in others.select("run_id").distinct().collect())
    raise TableError(
        f"run '{record.run_id}' has no rows in '{table.name}': a later run over the same dataset "
        f"and reward has replaced them; runs with rows: {', '.join(known) or 'none'}",
        where=warehouse.place(table),
        fix="build the page of one of those runs",
    )
