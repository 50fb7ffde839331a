"""Sizes are those on disk, compaction changes no row, a vacuum takes what it says, when told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cdr.errors import InputError, TableError
from cdr.maintenance import (
    cluster_column,
    compact,
    measure,
    migrate,
    parse_interval,
    plan_vacuum,
    read_retention,
)
from cdr.tables import ROUTES, RUNS, SCHEMA_VERSION, TABLES, Table
from cdr.warehouse import Warehouse
from jobs.maintain import main
from tests.spark.annotated import Annotated


def route_rows(spark: SparkSession, *hashes: str, router: str = "k") -> DataFrame:
    rows = [(h, router, "chat", 0.9, {"chat": -0.1}, "router", "r") for h in hashes]
    return spark.createDataFrame(rows, ROUTES.schema()).coalesce(1)


@pytest.fixture(scope="module")
def many_files(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse whose table of routes has a file for each of twelve rows."""
    folder = tmp_path_factory.mktemp("many-files")
    made = Warehouse(spark, str(folder))
    for i in range(12):
        made.append(ROUTES, route_rows(spark, f"h{i}"))
    return folder


@pytest.fixture
def warehouse(spark: SparkSession, many_files: Path, tmp_path: Path) -> Warehouse:
    """A copy of it to change."""
    shutil.copytree(many_files, tmp_path / "warehouse")
    return Warehouse(spark, str(tmp_path / "warehouse"))


def files_on_disk(warehouse: Warehouse, table: Table) -> list[Path]:
    files = Path(warehouse.place(table)).rglob("*.parquet")
    return sorted(file for file in files if "_delta_log" not in file.parts)


def test_a_table_is_measured_as_it_lies_on_disk(
    spark: SparkSession, warehouse: Warehouse, annotated: Annotated
) -> None:
    size = measure(warehouse, ROUTES, commits=3)
    files = files_on_disk(warehouse, ROUTES)
    assert (size.rows, size.files, size.small_files, size.mergeable_files) == (12, 12, 12, 11)
    assert size.bytes == sum(file.stat().st_size for file in files)
    folder = Path(warehouse.place(ROUTES))
    everything = [file for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in everything if not file.name.endswith(".crc")]
    assert sum(f.stat().st_size for f in visible) <= size.disk_bytes
    assert size.disk_bytes <= sum(file.stat().st_size for file in everything)
    assert (size.versions, size.commits) == (13, 3)
    last = DeltaTable(str(folder)).history(3)
    assert size.growth_bytes == sum(int(one["operationMetrics"]["numOutputBytes"]) for one in last)
    assert size.advice().startswith("compact")

    stored = Warehouse(spark, str(annotated.warehouse))
    for table in TABLES:
        if stored.exists(table):
            rows, read = annotated.rows(table.name), DeltaTable(stored.place(table))
            found = measure(stored, table)
            assert (found.rows, found.files) == (len(rows), len(read.file_uris()))


def test_compaction_merges_files_and_changes_no_row(
    spark: SparkSession, warehouse: Warehouse, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {row["prompt_hash"]: row for row in warehouse.read(ROUTES).collect()}
    command = ["compact", "--warehouse", warehouse.root]
    assert main([*command, "--dry-run"]) == 0
    assert "would merge" in capsys.readouterr().out
    assert warehouse.version(ROUTES) == 12
    assert main(command) == 0
    assert warehouse.version(ROUTES) == 13
    assert measure(warehouse, ROUTES).files == 1
    assert {row["prompt_hash"]: row for row in warehouse.read(ROUTES).collect()} == before
    assert warehouse.read(ROUTES, version=6).count() == 6
    assert main(command) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert warehouse.version(ROUTES) == 13


def test_clustering_sorts_by_the_prompt_of_the_key(
    spark: SparkSession, warehouse: Warehouse
) -> None:
    assert {table.name: cluster_column(table) for table in TABLES} == {
        "completions": "prompt_id",
        "routes": "prompt_hash",
        "logprobs": None,
        "rewards": "prompt_id",
        "preferences": "prompt_id",
        "unpaired": "prompt_id",
        "rejects": None,
        "runs": None,
        "benchmark_pairs": "prompt_id",
        "benchmark_results": None,
        "study_pairs": None,
    }
    compact(warehouse, ROUTES, cluster=True)
    last = warehouse.delta(ROUTES).history(1).first()
    assert last is not None
    assert "prompt_hash" in last["operationParameters"]["zOrderBy"]
    assert warehouse.read(ROUTES).count() == 12


def vacuum(warehouse: Warehouse, *arguments: str) -> int:
    return main(["vacuum", "--warehouse", warehouse.root, "--table", "routes", *arguments])


def test_a_vacuum_is_told_what_it_ends_and_needs_every_confirmation(
    warehouse: Warehouse, capsys: pytest.CaptureFixture[str]
) -> None:
    compact(warehouse, ROUTES)
    files = files_on_disk(warehouse, ROUTES)
    assert len(files) == 13
    assert vacuum(warehouse, "--retain-hours", "0", "--dry-run") == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["routes", "12", "to", "12", "13", "to", "13"]
    with pytest.raises(InputError, match="can then never be read again"):
        vacuum(warehouse, "--retain-hours", "0")
    with pytest.raises(
        InputError, match=r"0 hours are less than the 168 (.|\n)*nothing-is-running"
    ):
        vacuum(warehouse, "--retain-hours", "0", "--yes-lose-old-versions")
    assert files_on_disk(warehouse, ROUTES) == files
    assert warehouse.read(ROUTES, version=6).count() == 6

    sure = ("--yes-lose-old-versions", "--yes-nothing-is-running")
    assert vacuum(warehouse, "--retain-hours", "0", *sure) == 0
    assert len(files_on_disk(warehouse, ROUTES)) == 1
    assert warehouse.read(ROUTES).count() == 12
    with pytest.raises(Exception, match=r"does not exist|FILE_NOT_EXIST|no longer"):
        warehouse.read(ROUTES, version=6).collect()


def test_a_vacuum_within_the_retention_keeps_all_that_is_younger(
    spark: SparkSession, warehouse: Warehouse
) -> None:
    compact(warehouse, ROUTES)
    files = files_on_disk(warehouse, ROUTES)
    plan = plan_vacuum(warehouse, ROUTES, 168)
    assert (plan.files, plan.lost_version, plan.is_short) == (0, None, False)
    assert vacuum(warehouse, "--retain-hours", "168", "--yes-lose-old-versions") == 0
    assert files_on_disk(warehouse, ROUTES) == files
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    assert spark.conf.get(check, "true") == "true", "the session's check is as it was"


def test_a_run_that_has_not_ended_is_named_before_a_short_vacuum(
    spark: SparkSession, warehouse: Warehouse
) -> None:
    row: dict[str, Any] = dict.fromkeys(RUNS.names())
    row |= {"run_id": "alive-1", "outcome": "running", "job": "annotate"}
    rows = spark.createDataFrame([tuple(row.values())], RUNS.schema())
    warehouse.append(RUNS, rows.withColumn("started_at", F.now()))
    with pytest.raises(InputError, match="alive-1"):
        vacuum(warehouse, "--retain-hours", "1", "--yes-lose-old-versions")


def test_retention_is_read_from_the_table(spark: SparkSession, warehouse: Warehouse) -> None:
    assert read_retention(warehouse, ROUTES).files == 7 * 24
    assert read_retention(warehouse, ROUTES).log == 30 * 24
    spark.sql(
        f"ALTER TABLE {warehouse.sql_name(ROUTES)} SET TBLPROPERTIES "
        "('delta.deletedFileRetentionDuration' = 'interval 2 weeks 12 hours')"
    )
    assert read_retention(warehouse, ROUTES).files == 2 * 7 * 24 + 12
    assert parse_interval("interval 90 minutes") == 1.5
    assert parse_interval("30 days") == 720
    with pytest.raises(TableError, match="not an interval"):
        parse_interval("interval 1 month")


def test_sizes_are_printed_for_every_table(
    annotated: Annotated, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sizes", "--warehouse", str(annotated.warehouse)]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0]: line for line in lines[1:] if line}
    assert {"routes", "logprobs", "rewards", "preferences", "runs"} <= set(named)
    assert named["logprobs"].split()[1] == str(len(annotated.rows("logprobs")))
    with pytest.raises(InputError, match="no such table: logprob"):
        main(["sizes", "--warehouse", str(annotated.warehouse), "--table", "logprob"])


def test_tables_of_this_version_have_nothing_to_migrate(
    annotated: Annotated, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", "--warehouse", str(annotated.warehouse), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"nothing to do: all 7 tables have schema version {SCHEMA_VERSION}" in printed


def test_steps_lead_an_old_table_to_the_current_version_and_a_newer_one_is_refused(
    spark: SparkSession, warehouse: Warehouse
) -> None:
    taken: list[tuple[str, int]] = []

    def step(version: int) -> Any:
        return lambda _, table: taken.append((table.name, version))

    steps = {SCHEMA_VERSION: step(1), SCHEMA_VERSION + 1: step(2)}
    newest = SCHEMA_VERSION + 2
    planned = migrate(warehouse, [ROUTES], dry_run=True, steps=steps, to_version=newest)
    assert (planned, taken) == ({"routes": [1, 2]}, [])
    assert warehouse.schema_version(ROUTES) == "1"
    migrate(warehouse, [ROUTES], dry_run=False, steps=steps, to_version=newest)
    assert taken == [("routes", 1), ("routes", 2)]
    assert warehouse.schema_version(ROUTES) == "3"
    with pytest.raises(TableError, match="newer than this program's 1"):
        migrate(warehouse, [ROUTES], dry_run=False)
    with pytest.raises(TableError, match="no way from schema version 3 to 4"):
        migrate(warehouse, [ROUTES], dry_run=False, steps=steps, to_version=newest + 1)
    with pytest.raises(TableError, match="schema version 3, this program"):
        warehouse.read(ROUTES)


def test_an_old_tables_error_names_the_way(spark: SparkSession, warehouse: Warehouse) -> None:
    warehouse.set_schema_version(ROUTES, 0)
    with pytest.raises(TableError, match=r"jobs/maintain\.py migrate"):
        warehouse.read(ROUTES)
