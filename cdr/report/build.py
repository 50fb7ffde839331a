"""Builds a run's page and puts it beside the tables: at the end of a run, or later from the tables.

A page is about work that is done: whatever goes wrong with it is told, and costs the run nothing.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Callable

from pydantic import ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cdr.config import AnnotateConfig, ReportSpec
from cdr.errors import CdrError, TableError
from cdr.files import Files
from cdr.plan import AnnotationPlan, plan_annotation
from cdr.report.annotation_gather import RunRows, gather_annotation
from cdr.report.annotation_page import render_annotation
from cdr.runs import RunRecord
from cdr.summary import Summary, summarize
from cdr.tables import PREFERENCES, REJECTS, REWARDS, RUNS, UNPAIRED, Table
from cdr.warehouse import Warehouse

_FINISHED = ("done", "over_threshold")


def report_command(warehouse: Warehouse, run_id: str) -> str:
    """Give the command that builds a run's page from the tables."""
    place = warehouse.place(RUNS)
    elsewhere = "" if place == f"{warehouse.root}/{RUNS.name}" else f" --runs {place}"
    return (
        "spark-submit --properties-file conf/cluster/local.conf jobs/report.py "
        f"--warehouse {warehouse.root}{elsewhere} --run {run_id}"
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
    """Build the page of a run that has just committed its last table.

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
    command = report_command(warehouse, record.run_id)
    try:
        data = gather_annotation(
            rows, warehouse, plan.config, record, summary, plan,
            rebuild=command, ui_command=ui_command,
        )  # fmt: skip
        page = render_annotation(data)
        keep(page)
        return write_page(warehouse, record.run_id, page)
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
    run_id: str | None = None,
    has_texts: bool | None = None,
) -> str:
    """Build the page of an earlier run from its tables; nothing is scored.

    Args:
        spark: the session.
        root: the warehouse.
        runs: place of the table `runs`, where the config put it elsewhere.
        run_id: the run; None for the last one that finished.
        has_texts: whether prompts and completions are shown; None for what the run's config says.

    Returns:
        Where the page is.

    Raises:
        TableError: there is no such run, a later run has replaced its rows, or it was written by
            another version of this program.
    """
    record = _find_run(Warehouse(spark, root, {RUNS.name: runs} if runs else {}), run_id)
    config = _config_of(record)
    if has_texts is not None:
        report = ReportSpec.model_validate({**config.report.model_dump(), "texts": has_texts})
        config = config.model_copy(update={"report": report})
    places = {**config.tables, **({RUNS.name: runs} if runs else {})}
    warehouse = Warehouse(spark, root, places)
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
        load_s={},  # `runs` does not keep it
        wall_s=(ended - record.started_at).total_seconds(),
    )
    data = gather_annotation(
        rows, warehouse, config, record, summary, _plan_of(config),
        rebuild=report_command(warehouse, record.run_id),
    )  # fmt: skip
    return write_page(warehouse, record.run_id, render_annotation(data))


def write_page(warehouse: Warehouse, run_id: str, page: str) -> str:
    """Write a page beside the tables, through the file system that holds them; give its place."""
    place = f"{warehouse.root}/reports/{run_id}.html"
    files = Files(warehouse.spark)
    files.write_text(place, page)
    return files.full_name(place)


def _find_run(warehouse: Warehouse, run_id: str | None) -> RunRecord:
    runs = warehouse.read(RUNS).where("job = 'annotate'")
    wanted = (
        F.col("outcome").isin(*_FINISHED) if run_id is None else F.col("run_id") == F.lit(run_id)
    )
    row = runs.where(wanted).orderBy(F.desc("run_id")).first()
    if row is None:
        # A few ids, for the message.
        known = [r["run_id"] for r in runs.orderBy(F.desc("run_id")).limit(5).collect()]
        what = "no annotate run has finished" if run_id is None else f"no annotate run '{run_id}'"
        raise TableError(
            f"{what} in this warehouse; the last ones begun: {', '.join(known) or 'none'}",
            where=warehouse.place(RUNS),
            fix="name another warehouse or run, or run jobs/annotate.py first",
        )
    values = row.asDict()
    # Spark gives times of this machine's zone, without saying so.
    for name in ("started_at", "ended_at"):
        values[name] = values[name] and values[name].astimezone(dt.UTC)
    return RunRecord(**values)


def _config_of(record: RunRecord) -> AnnotateConfig:
    try:
        return AnnotateConfig.model_validate(json.loads(record.config))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TableError(
            f"the config of run '{record.run_id}' is not one of this version: {place}: "
            f"{first['msg'].splitlines()[0]}",
            fix="build the page with the version that made the run, from the folder it was "
            "started in (its model paths may be relative)",
        ) from None


def _plan_of(config: AnnotateConfig) -> AnnotationPlan | None:
    try:
        return plan_annotation(config)
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
