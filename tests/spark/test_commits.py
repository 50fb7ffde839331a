"""Runs that write to one table at once all get their rows in, and only lost races are run again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cdr.errors import TableError
from cdr.runs import RunLog, RunRecord
from cdr.tables import ROUTES, RUNS, Table
from cdr.warehouse import Warehouse


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits after lost races, in seconds; none is really waited for."""
    waits: list[float] = []
    monkeypatch.setattr("cdr.commits.sleep", waits.append)
    return waits


def routes(rows: DataFrame, router_key: str) -> DataFrame:
    """Rows of `routes` with an id per row of the frame."""
    return rows.select(
        F.col("id").cast("string").alias("prompt_hash"),
        F.lit(router_key).alias("router_key"),
        F.lit("chat").alias("domain"),
        F.lit(0.9).alias("confidence"),
        F.lit(None).alias("label_logprobs"),
        F.lit("router").alias("domain_source"),
        F.lit("r").alias("run_id"),
    )


def held_back(rows: DataFrame, begun: Path, go: Path) -> DataFrame:
    """The same rows, once a file is there; another file tells that they are being computed."""

    def hold(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        begun.touch()
        while not go.exists():
            time.sleep(0.05)
        yield from batches

    return rows.mapInPandas(hold, rows.schema)


def router_keys(warehouse: Warehouse) -> set[str]:
    return {row["router_key"] for row in warehouse.read(ROUTES).collect()}


def test_a_replace_that_another_runs_replace_overtook_is_made_again(
    spark: SparkSession, tmp_path: Path, waits: list[float]
) -> None:
    warehouse = Warehouse(spark, str(tmp_path / "warehouse"))
    one = spark.range(0, 1, numPartitions=1)  # one task: the other slot is for the other run
    warehouse.append(ROUTES, routes(one, "theirs"))
    begun, go = tmp_path / "begun", tmp_path / "go"
    mine = routes(held_back(one, begun, go), "mine")
    with ThreadPoolExecutor() as pool:
        replacing = pool.submit(warehouse.replace, ROUTES, mine, router_key="mine")
        try:
            while not begun.exists():
                assert not replacing.done(), replacing.result()
                time.sleep(0.05)
            # In the unpartitioned table this commit touches files that `mine` has looked at.
            warehouse.replace(ROUTES, routes(one, "theirs"), router_key="theirs")
        finally:
            go.touch()
        replacing.result()
    assert len(waits) == 1, "the two writes were to meet"
    assert sorted(row["router_key"] for row in warehouse.read(ROUTES).collect()) == [
        "mine", "theirs"
    ]  # fmt: skip


class MeetingWarehouse(Warehouse):
    """Goes on to create a table only when another one has found it missing as well."""

    def __init__(self, *arguments: Any, meeting: threading.Barrier) -> None:
        super().__init__(*arguments)
        self._meeting: threading.Barrier | None = meeting

    def exists(self, table: Table) -> bool:
        found = super().exists(table)
        if not found and self._meeting:
            self._meeting.wait(60)
            self._meeting = None
        return found


@pytest.mark.parametrize("place", [None, "cdr_race.routes"], ids=["path", "catalog"])
def test_two_runs_that_create_a_table_at_once_both_write_to_it(
    spark: SparkSession, tmp_path: Path, place: str | None, waits: list[float]
) -> None:
    spark.sql("CREATE DATABASE IF NOT EXISTS cdr_race")
    places = {"routes": place} if place else {}
    meeting = threading.Barrier(2)
    runs = {
        key: MeetingWarehouse(spark, str(tmp_path), places, meeting=meeting) for key in ("a", "b")
    }
    try:
        with ThreadPoolExecutor() as pool:
            for writing in [
                pool.submit(run.append, ROUTES, routes(spark.range(1), key))
                for key, run in runs.items()
            ]:
                writing.result()
        assert waits, "one of the two was to lose"
        assert router_keys(Warehouse(spark, str(tmp_path), places)) == {"a", "b"}
    finally:
        spark.sql("DROP DATABASE cdr_race CASCADE")


def test_an_error_that_is_no_lost_race_ends_the_write_at_once(
    spark: SparkSession, tmp_path: Path, waits: list[float]
) -> None:
    rows = routes(spark.range(1), "k").withColumn("domain", F.raise_error(F.lit("concurrent")))
    with pytest.raises(Exception, match="concurrent"):
        Warehouse(spark, str(tmp_path)).append(ROUTES, rows)
    assert waits == []


class BrokenWarehouse(Warehouse):
    """Refuses to write while it is broken."""

    is_broken = False

    def replace(self, table: Table, rows: DataFrame, **arguments: Any) -> None:
        if self.is_broken:
            raise TableError("other runs kept writing")
        super().replace(table, rows, **arguments)


def test_progress_that_cannot_be_written_does_not_end_the_run(
    spark: SparkSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warehouse = BrokenWarehouse(spark, str(tmp_path))
    record = RunRecord("r", "annotate", "d", None, None, "h", "{}", {})
    log = RunLog(warehouse, record, interval_s=0.0)
    warehouse.is_broken = True
    log.update(waves_done=1, counts={"logprobs_scored": 5})
    assert "other runs kept writing" in caplog.text
    warehouse.is_broken = False
    log.end("done")
    (row,) = warehouse.read(RUNS).collect()
    assert (row["outcome"], row["waves_done"], row["counts"]) == (
        "done", 1, {"logprobs_scored": 5}
    )  # fmt: skip
