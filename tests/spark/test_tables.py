"""A warehouse refuses what it cannot read, and writes atomically under declared schemas."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cdr.errors import TableError
from cdr.tables import ROUTES, RUNS, TABLES
from cdr.warehouse import Warehouse


def route_rows(spark: SparkSession, run_id: str, *hashes: str) -> object:
    rows = [(h, "k", "chat", 0.9, {"chat": -0.1}, "router", run_id) for h in hashes]
    return spark.createDataFrame(rows, ROUTES.schema())


def test_a_table_of_another_schema_version_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    warehouse = Warehouse(spark, str(tmp_path))
    warehouse.append(ROUTES, route_rows(spark, "r", "a"))  # type: ignore[arg-type]
    place = warehouse.place(ROUTES)
    spark.sql(f"ALTER TABLE delta.`{place}` SET TBLPROPERTIES ('cdr.schemaVersion' = '0')")
    with pytest.raises(TableError, match="schema version 0, this program reads and writes"):
        Warehouse(spark, str(tmp_path)).read(ROUTES)


def test_a_foreign_table_in_a_tables_place_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    spark.range(3).write.format("delta").save(str(tmp_path / "routes"))
    with pytest.raises(TableError, match="schema version none"):
        Warehouse(spark, str(tmp_path)).read(ROUTES)


def test_rows_that_lack_a_column_are_not_written(spark: SparkSession, tmp_path: Path) -> None:
    rows = spark.createDataFrame([("a",)], "prompt_hash string")
    with pytest.raises(TableError, match="rows lack the columns"):
        Warehouse(spark, str(tmp_path)).append(ROUTES, rows)


def test_comments_and_version_are_stored_in_delta(spark: SparkSession, tmp_path: Path) -> None:
    warehouse = Warehouse(spark, str(tmp_path))
    warehouse.append(ROUTES, route_rows(spark, "r", "a"))  # type: ignore[arg-type]
    described = spark.sql(f"DESCRIBE TABLE delta.`{warehouse.place(ROUTES)}`").collect()
    comments = {row["col_name"]: row["comment"] for row in described}
    assert comments["confidence"].startswith("Softmax share")
    assert warehouse.version(ROUTES) == 1
    assert warehouse.version(RUNS) is None


def test_readers_take_one_row_per_key_when_two_runs_wrote_it(
    spark: SparkSession, tmp_path: Path
) -> None:
    warehouse = Warehouse(spark, str(tmp_path))
    warehouse.append(ROUTES, route_rows(spark, "r1", "a", "b"))  # type: ignore[arg-type]
    warehouse.append(ROUTES, route_rows(spark, "r2", "b", "c"))  # type: ignore[arg-type]
    rows = warehouse.read_one_per_key(ROUTES).orderBy("prompt_hash").collect()
    assert [(row["prompt_hash"], row["run_id"]) for row in rows] == [
        ("a", "r1"), ("b", "r1"), ("c", "r2")
    ]  # fmt: skip


def test_replace_touches_only_the_rows_named(spark: SparkSession, tmp_path: Path) -> None:
    warehouse = Warehouse(spark, str(tmp_path))
    warehouse.append(ROUTES, route_rows(spark, "r1", "a", "b"))  # type: ignore[arg-type]
    other = route_rows(spark, "r1", "c").withColumn("router_key", F.lit("k2"))  # type: ignore[attr-defined]
    warehouse.replace(ROUTES, other, router_key="k2")
    again = route_rows(spark, "r2", "d").withColumn("router_key", F.lit("k2"))  # type: ignore[attr-defined]
    warehouse.replace(ROUTES, again, router_key="k2")
    left = {row["prompt_hash"] for row in warehouse.read(ROUTES).collect()}
    assert left == {"a", "b", "d"}


def test_an_empty_warehouse_reads_as_empty_tables(spark: SparkSession, tmp_path: Path) -> None:
    warehouse = Warehouse(spark, str(tmp_path))
    for table in TABLES:
        rows = warehouse.read(table)
        fields = [(field.name, field.dataType) for field in rows.schema]
        assert fields == [(field.name, field.dataType) for field in table.schema()]
        assert rows.isEmpty()


def test_catalog_names_work_like_paths(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql("CREATE DATABASE IF NOT EXISTS cdr_test")
    warehouse = Warehouse(spark, str(tmp_path), {"routes": "cdr_test.routes"})
    try:
        warehouse.append(ROUTES, route_rows(spark, "r", "a"))  # type: ignore[arg-type]
        assert spark.table("cdr_test.routes").count() == 1
        assert warehouse.read(ROUTES).count() == 1
    finally:
        spark.sql("DROP DATABASE cdr_test CASCADE")


def test_an_unknown_table_name_in_the_config_is_named(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such table: reward"):
        Warehouse(spark, str(tmp_path), {"reward": "x"})


def test_every_column_has_a_comment_and_every_key_is_a_column() -> None:
    for table in TABLES:
        assert all(comment for _, _, comment in table.columns)
        assert set(table.key) | set(table.partitioned_by) <= set(table.names())


def test_a_warehouse_may_be_given_relative_to_the_working_directory(
    spark: SparkSession, tmp_path: Path
) -> None:
    warehouse = Warehouse(spark, os.path.relpath(tmp_path / "warehouse"))
    warehouse.append(ROUTES, route_rows(spark, "r1", "a"))
    assert warehouse.read(ROUTES).count() == 1
    assert (tmp_path / "warehouse" / "routes" / "_delta_log").is_dir()
