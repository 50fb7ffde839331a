"""How a run hears of a signal, and what it cancels then: the wave in flight, never its own end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession

from cdr.config import RunSpec
from cdr.job_run import JobRun
from cdr.runs import RunRecord, StopSignal
from cdr.staging import Staging
from cdr.tables import Table
from cdr.warehouse import Warehouse


@pytest.fixture
def work(spark: SparkSession, tmp_path: Path) -> Iterator[Future[int]]:
    """A Spark job that runs until the test is over, or until it is cancelled."""
    begun, end = tmp_path / "begun", tmp_path / "end"

    def wait(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        begun.touch()
        while not end.exists():
            time.sleep(0.05)
        yield from batches

    with ThreadPoolExecutor() as pool:
        job = pool.submit(spark.range(1).mapInPandas(wait, "id long").count)
        try:
            while not begun.exists():
                assert not job.done(), job.result()
                time.sleep(0.05)
            yield job
        finally:
            end.touch()


def assert_runs_on(job: Future[int], for_s: float) -> None:
    with pytest.raises(TimeoutError):
        job.result(timeout=for_s)


def test_a_signal_to_the_jvm_and_the_driver_is_one_and_a_second_cancels_at_once(
    spark: SparkSession, work: Future[int]
) -> None:
    assert spark._jvm is not None
    jvm = spark._jvm.java.lang.ProcessHandle.current().pid()
    # What Ctrl-C does under spark-submit; the JVM of a test has no handler for SIGINT.
    with StopSignal(spark, None, grace_s=600) as stop:
        os.kill(jvm, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        assert_runs_on(work, for_s=2.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Exception, match="cancel"):
            work.result(timeout=60)


def test_the_work_is_cancelled_when_the_grace_period_is_over(
    spark: SparkSession, work: Future[int]
) -> None:
    with StopSignal(spark, None, grace_s=0.5):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Exception, match="cancel"):
            work.result(timeout=60)


def test_nothing_is_cancelled_any_more_once_the_work_is_over(
    spark: SparkSession, work: Future[int]
) -> None:
    with StopSignal(spark, None, grace_s=0.5) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.stand_down()
        os.kill(os.getpid(), signal.SIGTERM)
        assert_runs_on(work, for_s=2.0)
        assert stop.requested == "SIGTERM"


def test_the_jvms_signals_go_to_the_outer_one_again(spark: SparkSession) -> None:
    assert spark._jvm is not None
    jvm = spark._jvm.java.lang.ProcessHandle.current().pid()
    with StopSignal(spark, None, grace_s=600) as outer:
        with StopSignal(spark, None, grace_s=600) as inner:
            pass
        os.kill(jvm, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while outer.requested is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert (outer.requested, inner.requested) == ("SIGTERM", None)


class WatchedWarehouse(Warehouse):
    """Writes nothing, but notes for every write whether a timer could still cancel it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.endangered: list[bool] = []

    def append(self, table: Table, rows: DataFrame) -> None:
        self._note()

    def replace(self, table: Table, rows: DataFrame, **_: Any) -> None:
        self._note()

    def _note(self) -> None:
        timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
        self.endangered.append(not all(timer.finished.is_set() for timer in timers))


class WorklessRun(JobRun):
    label = "waiting"

    def _begin(self, stack: contextlib.ExitStack) -> RunRecord:
        return RunRecord("r", "annotate", "d", None, None, "h", "{}", {})


def test_the_grace_period_ends_before_a_stopped_runs_outcome_is_written(
    spark: SparkSession, tmp_path: Path
) -> None:
    warehouse = WatchedWarehouse(spark, str(tmp_path))
    run = WorklessRun(warehouse, Staging(spark, str(tmp_path), "r"), RunSpec())
    with run:
        os.kill(os.getpid(), signal.SIGTERM)
        run.check_stop()
    assert run.exit_code == 4
    assert warehouse.endangered == [False, False]  # at the start and at the end
