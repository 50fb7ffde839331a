"""Where a run may listen for signals, and where it may not."""

from __future__ import annotations

import signal
import threading
from typing import cast

import pytest
from pyspark.sql import SparkSession

from cdr.runs import StopSignal

NO_SPARK = cast("SparkSession", object())
"""Any use of it would be an AttributeError."""


@pytest.fixture
def on_databricks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")


@pytest.mark.usefixtures("on_databricks")
def test_the_jvm_of_databricks_keeps_its_own_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(NO_SPARK, max_hours=1.0) as stop:
        assert stop.requested is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("on_databricks")
def test_a_thread_that_may_not_set_handlers_still_watches_the_time() -> None:
    seen: list[str | None] = []

    def run() -> None:
        with StopSignal(NO_SPARK, max_hours=0.0) as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == ["--max-hours is over"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("on_databricks")
def test_a_signal_between_two_runs_of_a_job_is_noted_and_a_second_one_is_urgent() -> None:
    with StopSignal(NO_SPARK, max_hours=None) as stop:
        stop.stand_up()
        stop.stand_down()  # the first run is over
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        assert not stop.is_urgent
        timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
        assert not timers, "nothing runs that could be cancelled"
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_urgent
