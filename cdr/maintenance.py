"""Look after tables that grow: how large they are, compaction, vacuum, schema versions.

Nothing here changes a row. Compaction writes the same rows into fewer files; vacuum deletes the
files that only old versions of a table need, and with them the way back to those versions, so it
is never done in passing. Deleting a person's rows is `cdr.forgetting`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from cdr.errors import InputError, TableError
from cdr.files import Files
from cdr.tables import RUNS, SCHEMA_VERSION, TABLES, Table
from cdr.warehouse import Warehouse

SMALL_FILE_BYTES = 32_000_000
"""A file below this is a small one: opening it takes about as long as reading it."""

_UNIT_HOURS = {"week": 168.0, "day": 24.0, "hour": 1.0, "minute": 1 / 60, "second": 1 / 3600}
_RETENTION, _LOG_RETENTION = "delta.deletedFileRetentionDuration", "delta.logRetentionDuration"
_DEFAULT_HOURS = {_RETENTION: 168.0, _LOG_RETENTION: 720.0}
_ADDED = ("numOutputBytes", "numAddedBytes", "numTargetBytesAdded")
_REMOVED = ("numRemovedBytes", "numTargetBytesRemoved")
_RUNS_CHECKED_DAYS = 30


def choose_tables(warehouse: Warehouse, names: Sequence[str] = ()) -> list[Table]:
    """Give the tables that exist, all or those named.

    Raises:
        InputError: a name is none of a table's, or no table exists.
    """
    known = {table.name: table for table in TABLES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"no such table: {', '.join(unknown)}", fix=f"one of {', '.join(known)}")
    found = [table for name, table in known.items() if not names or name in names]
    found = [table for table in found if warehouse.exists(table)]
    if not found:
        raise InputError(
            "there is no table to look after",
            where=warehouse.root,
            fix="check --warehouse; jobs/annotate.py writes the tables",
        )
    return found


@dataclass(frozen=True)
class TableSize:
    """How large a table is.

    Args:
        table: which.
        rows: in the latest version.
        files: that hold them.
        bytes: of those files.
        small_files: those below `SMALL_FILE_BYTES`.
        mergeable_files: files that a compaction would save at least: it merges within partitions.
        disk_bytes: all that lies in the folder: old versions and the log too.
        versions: how many the log knows.
        commits: how many of them `growth_bytes` counts.
        growth_bytes: added less removed by the last `commits` commits.
        growth_hours: time between the first and the last of them.
    """

    table: Table
    rows: int
    files: int
    bytes: int
    small_files: int
    mergeable_files: int
    disk_bytes: int
    versions: int
    commits: int
    growth_bytes: int
    growth_hours: float

    @property
    def old_bytes(self) -> int:
        """Bytes that the latest version does not need: old versions, and the log."""
        return max(0, self.disk_bytes - self.bytes)

    def advice(self) -> str:
        """Say what to do, if anything."""
        found = []
        if self.mergeable_files >= 10 and self.mergeable_files * 2 >= self.files:
            found.append("compact")
        if self.old_bytes > max(self.bytes, SMALL_FILE_BYTES):
            found.append("vacuum, when old versions may go")
        return "; ".join(found) or "nothing"


def measure(warehouse: Warehouse, table: Table, *, commits: int = 10) -> TableSize:
    """Measure a table.

    One pass over its files that reads no column, the log's history, and a listing of the folder.

    Args:
        warehouse: where the tables are.
        table: one that exists.
        commits: over how many of the last ones the growth is reckoned.

    Raises:
        TableError: the table cannot be read.
    """
    delta = warehouse.delta(table)
    size = F.col("file_size")
    per_file = (
        delta.toDF()
        .select(*table.partitioned_by, "_metadata.file_path", "_metadata.file_size")
        .groupBy(*table.partitioned_by, "file_path", "file_size")
        .agg(F.count("*").alias("rows"))
    )
    is_small = size < SMALL_FILE_BYTES
    per_partition = per_file.groupBy(*table.partitioned_by).agg(
        F.sum("rows").alias("rows"),
        F.count("*").alias("files"),
        F.sum(size).alias("bytes"),
        F.count_if(is_small).alias("small"),
    )
    total = per_partition.agg(
        F.sum("rows"), F.sum("files"), F.sum("bytes"), F.sum("small"),
        F.sum(F.greatest(F.col("small") - 1, F.lit(0))),
    ).first()  # fmt: skip
    rows, files, num_bytes, small, mergeable = (int(value or 0) for value in total or [0] * 5)
    history = read_history(delta.history())
    last = history[:commits]
    detail = delta.detail().select("location").first()
    return TableSize(
        table=table,
        rows=rows,
        files=files,
        bytes=num_bytes,
        small_files=small,
        mergeable_files=mergeable,
        disk_bytes=Files(warehouse.spark).num_bytes(detail["location"]) if detail else 0,
        versions=len(history),
        commits=len(last),
        growth_bytes=sum(commit.added_bytes - commit.removed_bytes for commit in last),
        growth_hours=(last[0].at - last[-1].at).total_seconds() / 3600,
    )


@dataclass(frozen=True)
class Commit:
    """One version of a table.

    Args:
        version: its number.
        at: when it was made, UTC.
        operation: Delta's name for what made it.
        added_bytes: of the files it added.
        removed_bytes: of the files it took out of the table; they stay on disk until a vacuum.
    """

    version: int
    at: dt.datetime
    operation: str
    added_bytes: int
    removed_bytes: int


def read_history(history: DataFrame) -> list[Commit]:
    """Read a table's history as far as its log goes back, the newest first.

    Args:
        history: `DeltaTable.history()`.
    """
    # One row per commit that the log still has.
    rows = history.select(
        "version", F.col("timestamp").cast("double").alias("at"), "operation", "operationMetrics"
    ).collect()
    return [_commit(row) for row in sorted(rows, key=lambda row: -row["version"])]


def _commit(row: Row) -> Commit:
    metrics: Mapping[str, str] = row["operationMetrics"] or {}

    def total(names: Sequence[str]) -> int:
        return sum(int(metrics[name]) for name in names if metrics.get(name, "").isdigit())

    at = dt.datetime.fromtimestamp(row["at"], dt.UTC)
    return Commit(row["version"], at, row["operation"], total(_ADDED), total(_REMOVED))


@dataclass(frozen=True)
class Retention:
    """How long Delta keeps what a table no longer needs, in hours.

    Args:
        files: a file that no version from then on needs may be vacuumed after this.
        log: an entry of the log is deleted some time after this.
    """

    files: float
    log: float


def read_retention(warehouse: Warehouse, table: Table) -> Retention:
    """Read a table's retention from its properties; Delta's defaults are 7 and 30 days."""
    detail = warehouse.delta(table).detail().select("properties").first()
    properties: Mapping[str, str] = detail["properties"] if detail else {}
    hours = {
        name: parse_interval(properties[name]) if name in properties else default
        for name, default in _DEFAULT_HOURS.items()
    }
    return Retention(files=hours[_RETENTION], log=hours[_LOG_RETENTION])


def parse_interval(text: str) -> float:
    """Read hours from an interval as Delta's properties have it: `interval 1 week`, `36 hours`.

    Raises:
        TableError: it is none.
    """
    plain = text.lower().removeprefix("interval").strip()
    if not re.fullmatch(r"(\d+\s*(week|day|hour|minute|second)s?\s*)+", plain):
        raise TableError(
            f"not an interval of weeks, days, hours, minutes or seconds: '{text}'",
            fix="correct the table's delta.deletedFileRetentionDuration or "
            "delta.logRetentionDuration by ALTER TABLE ... SET TBLPROPERTIES",
        )
    found = re.findall(r"(\d+)\s*([a-z]+?)s?\b", plain)
    return sum(int(number) * _UNIT_HOURS[unit] for number, unit in found)


def cluster_column(table: Table) -> str | None:
    """Give the column to sort a table's files by: the prompt's hash, if it has one.

    A prompt's rows then lie together, and a query for the hash skips the other files. Not by
    `prompt_id`: the log would quote ids that are to be forgotten (`cdr.tables.INDEXED`).
    """
    return "prompt_hash" if "prompt_hash" in table.indexed() else None


def compact(warehouse: Warehouse, table: Table, *, cluster: bool = False) -> None:
    """Write a table's rows into fewer, larger files, in one commit; old versions stay readable.

    Args:
        warehouse: where the tables are.
        table: one that exists.
        cluster: also sort rows by `cluster_column`, where there is one (Z-order). That writes all
            files anew each time; without it only small ones are.
    """
    column = cluster_column(table) if cluster else None
    if column is None:
        warehouse.change(table, lambda delta: delta.optimize().executeCompaction())
    else:
        warehouse.change(table, lambda delta: delta.optimize().executeZOrderBy(column))


@dataclass(frozen=True)
class Vacuum:
    """What a vacuum of a table would do.

    Args:
        table: which.
        files: files it would delete; Delta lists 1,000 at most.
        lost_version: up to here versions may not be readable any more; None: all stay.
        latest_version: the table's; it always stays.
        is_short: whether it keeps less than the table's own retention says.
    """

    table: Table
    files: int
    lost_version: int | None
    latest_version: int
    is_short: bool


def plan_vacuum(warehouse: Warehouse, table: Table, retain_hours: float) -> Vacuum:
    """Find out what a vacuum would take away.

    Args:
        warehouse: where the tables are.
        table: one that exists.
        retain_hours: files needed by a version of the last so many hours stay.
    """
    history = read_history(warehouse.delta(table).history())
    cutoff = dt.datetime.now(dt.UTC) - dt.timedelta(hours=retain_hours)
    # A version is lost when the one that took its place is older than what is kept.
    lost = [newer.version - 1 for newer in history if newer.at < cutoff and newer.version > 0]
    with _vacuum_settings(warehouse.spark):
        command = f"VACUUM {warehouse.sql_name(table)} RETAIN {retain_hours} HOURS DRY RUN"
        files = warehouse.spark.sql(command).count()  # a listing, at most 1,000 rows
    return Vacuum(
        table=table,
        files=files,
        lost_version=max(lost, default=None),
        latest_version=history[0].version,
        is_short=retain_hours < read_retention(warehouse, table).files,
    )


def vacuum(warehouse: Warehouse, table: Table, retain_hours: float) -> None:
    """Delete the files that only versions older than this need. Nothing brings them back.

    Args:
        warehouse: where the tables are.
        table: one that exists.
        retain_hours: as for `plan_vacuum`. Below the table's retention, files that a running job
            reads or is about to commit may be deleted under it.
    """
    with _vacuum_settings(warehouse.spark):
        warehouse.change(table, lambda delta: delta.vacuum(retain_hours))


@contextlib.contextmanager
def _vacuum_settings(spark: SparkSession) -> Iterator[None]:
    """Let a vacuum keep less than Delta's default, and list the folder in few tasks.

    Who may keep less is decided elsewhere. Delta takes as many tasks for the listing as Spark's
    limit for other listings says, which is 10,000: minutes for a folder of ten files.
    """
    settings = {
        "spark.databricks.delta.retentionDurationCheck.enabled": "false",
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(
            spark.sparkContext.defaultParallelism
        ),
    }
    before = {name: spark.conf.get(name, None) for name in settings}
    for name, value in settings.items():
        spark.conf.set(name, value)
    try:
        yield
    finally:
        for name, given in before.items():
            if given is None:
                spark.conf.unset(name)
            else:
                spark.conf.set(name, given)


def running_jobs(warehouse: Warehouse) -> list[str]:
    """Give the runs that have not ended, newest first: alive, or killed within the last month."""
    since = dt.datetime.now(dt.UTC) - dt.timedelta(days=_RUNS_CHECKED_DAYS)
    rows = warehouse.read(RUNS).where(
        (F.col("outcome") == "running") & (F.col("started_at") > F.lit(since))
    )
    # One row per run that never said how it ended.
    return [row["run_id"] for row in rows.select("run_id").orderBy(F.desc("run_id")).collect()]


Step = Callable[[Warehouse, Table], None]
STEPS: Mapping[int, Step] = {}
"""By schema version: what makes a table of that version one of the next. There is one version."""


def migrate(
    warehouse: Warehouse,
    tables: Sequence[Table],
    *,
    dry_run: bool,
    steps: Mapping[int, Step] = STEPS,
    to_version: int = SCHEMA_VERSION,
) -> dict[str, list[int]]:
    """Bring tables to this program's schema version, one version after the other.

    Each step notes the version it has reached, so that what was cut off goes on from there.

    Args:
        warehouse: where the tables are.
        tables: those that exist.
        dry_run: only say which steps there are to take.
        steps: by the version that they start from.
        to_version: where they lead.

    Returns:
        By table, the versions that steps started from, in order; none where it is up to date.

    Raises:
        TableError: a table is foreign, newer than this program, or older than its first step.
            Nothing is changed then.
    """
    taken: dict[str, list[int]] = {}
    for table in tables:
        found = warehouse.schema_version(table)
        if found is None or not found.isdigit():
            raise TableError(
                f"'{table.name}' is not a table of this package: it has no schema version",
                where=warehouse.place(table),
                fix="check --warehouse and --place",
            )
        if int(found) > to_version:
            raise TableError(
                f"table '{table.name}' has schema version {found}, newer than this program's "
                f"{to_version}",
                where=warehouse.place(table),
                fix="use the program's version that wrote it, or a newer one",
            )
        taken[table.name] = list(range(int(found), to_version))
        if missing := [version for version in taken[table.name] if version not in steps]:
            raise TableError(
                f"there is no way from schema version {missing[0]} to {missing[0] + 1}",
                where=warehouse.place(table),
                fix="use a version of this program that still knew it, or another warehouse",
            )
    for table in tables:
        for version in [] if dry_run else taken[table.name]:
            steps[version](warehouse, table)
            warehouse.set_schema_version(table, version + 1)
    return taken
