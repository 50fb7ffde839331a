"""Counts on their way from tasks to the driver: while a task runs, and after it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession

from cdr.progress import Counts, EngineLoad, EngineWork, TaskCounter, slowest_loads

if TYPE_CHECKING:
    import pandas as pd


def test_counts_are_seen_while_a_task_runs_and_are_exact_after_it(
    spark: SparkSession, tmp_path: Path
) -> None:
    counter = TaskCounter.create(spark)
    go_on = tmp_path / "go-on"
    seen_running: list[Counts] = []

    def count_rows(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        with counter.task() as count:
            for batch in batches:
                count.add(prompts=len(batch), tokens=10 * len(batch))
                deadline = time.monotonic() + 60
                while not go_on.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                yield batch

    def watch() -> None:
        deadline = time.monotonic() + 60
        while counter.read() != Counts(6, 60) and time.monotonic() < deadline:
            time.sleep(0.05)
        seen_running.append(counter.read())
        go_on.touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    spark.range(6, numPartitions=2).mapInPandas(count_rows, "id long").collect()
    watcher.join()
    assert seen_running == [Counts(6, 60)]
    assert counter.read() == Counts(6, 60)
    assert counter.ended.value == Counts(6, 60)
    assert counter.folder is not None
    assert list(counter.folder.iterdir()) == []


def test_a_failed_attempt_is_not_counted(spark: SparkSession) -> None:
    counter = TaskCounter.create(spark)

    def fail(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        with counter.task() as count:
            for _ in batches:
                count.add(prompts=1, tokens=1)
                raise ValueError("engine died")
            yield from batches

    with pytest.raises(PythonException, match="engine died"):
        spark.range(1).mapInPandas(fail, "id long").collect()
    assert counter.read() == Counts(0, 0)


def test_the_slowest_host_says_how_long_an_engine_took_to_load(spark: SparkSession) -> None:
    counter = TaskCounter.create(spark)

    def load(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for task in batch["id"].tolist():
                strong = EngineLoad("node", f"cuda:{task}", 100 + task, "strong", 30.0 + task)
                # Tasks that come later to a host find the same engine with the same number.
                weak = EngineLoad("node", "cuda:0", 100, "weak", 7.5)
                counter.add_loads([strong, weak])
                counter.add_work(EngineWork(task, {"node 100": 1.5, f"node {200 + task}": 0.5}))
            yield batch

    assert slowest_loads(counter.engine_loads()) == {}
    spark.range(3, numPartitions=3).mapInPandas(load, "id long").collect()
    assert len(counter.engine_loads()) == 4
    assert slowest_loads(counter.engine_loads()) == {"strong": 32.0, "weak": 7.5}
    own = {"node 200": 0.5, "node 201": 0.5, "node 202": 0.5}
    assert counter.engine_work() == EngineWork(0 + 1 + 2, {"node 100": 3 * 1.5, **own})


def test_the_folder_goes_away_with_the_counter(spark: SparkSession) -> None:
    counter = TaskCounter.create(spark)
    folder = counter.folder
    assert folder is not None
    assert folder.is_dir()
    del counter
    assert not folder.exists()
