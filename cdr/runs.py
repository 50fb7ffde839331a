"""A job's run: its row in `runs`, and the signals that end it in good order.

The row is written when the run starts and again between waves, so `runs` says how far a run came
even when it was killed; such a run keeps the outcome `running` without an end.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Self

from pyspark.sql import DataFrame, SparkSession

from cdr.commits import MAX_TRIES
from cdr.tables import RUNS
from cdr.warehouse import Warehouse

_logger = logging.getLogger(__name__)

_GRACE_S = 20.0
# The JVM's notice comes through a socket and a thread of its own, late on a busy machine.
_ECHO_S = 5.0


def new_run_id() -> str:
    """Make a run id that sorts by start time: `20260131T120000-1a2b3c`."""
    return f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class RunRecord:
    """One row of `runs`; field meanings are the columns' comments in `cdr.tables`."""

    run_id: str
    job: str
    dataset: str
    reward_name: str | None
    reward_key: str | None
    config_hash: str
    config: str
    input_versions: Mapping[str, int]
    mlflow_run_id: str | None = None
    outcome: str = "running"
    error: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    waves_done: int = 0
    waves_total: int = 0
    started_at: dt.datetime = field(default_factory=lambda: dt.datetime.now(dt.UTC))
    ended_at: dt.datetime | None = None


class RunLog:
    """Writes a run's row when it starts, when it ends, and now and then in between.

    Args:
        warehouse: where `runs` is.
        record: the row at the start.
        interval_s: seconds between two writes at least; a commit per wave would be a large part of
            a short run's time.
    """

    def __init__(self, warehouse: Warehouse, record: RunRecord, interval_s: float = 60.0) -> None:
        self._warehouse = warehouse
        self._interval_s = interval_s
        self.record = record
        self._next_write = time.monotonic() + interval_s
        warehouse.append(RUNS, self._row())  # a new run's id: there is nothing to replace

    def update(self, **changes: Any) -> None:
        """Change fields of the record; write it if the last write is long enough ago.

        It never ends the run: how far a run has come is for those who watch it, and its results
        are in other tables. What could not be written now is written with the next update or the
        end.
        """
        self.record = replace(self.record, **changes)
        if time.monotonic() < self._next_write:
            return
        try:
            self._write(max_tries=1)  # devices wait while waves do
        except Exception as error:
            _logger.warning("progress was not written to `runs`, the run goes on: %s", error)

    def end(self, outcome: str, *, error: str | None = None, **changes: Any) -> None:
        """Write the outcome and the time."""
        self.record = replace(
            self.record, outcome=outcome, error=error, ended_at=dt.datetime.now(dt.UTC), **changes
        )
        self._write()

    def _write(self, max_tries: int = MAX_TRIES) -> None:
        self._next_write = time.monotonic() + self._interval_s
        run_id = self.record.run_id
        self._warehouse.replace(RUNS, self._row(), max_tries=max_tries, run_id=run_id)

    def _row(self) -> DataFrame:
        values = {name: getattr(self.record, name) for name in RUNS.names()}
        values["counts"] = dict(values["counts"])
        values["input_versions"] = dict(values["input_versions"])
        row = [tuple(values[name] for name in RUNS.names())]
        return self._warehouse.spark.createDataFrame(row, RUNS.schema())


@dataclass
class _Received:
    """A signal, the monotonic time, and which processes have noticed it (`jvm`, `python`)."""

    name: str
    at: float
    noticed_by: set[str]

    def is_noticed_also(self, name: str, *, by: str) -> bool:
        """Take a notice for one of this signal, if it can be; else it is of a new signal.

        A terminal's Ctrl-C goes to all processes of its group. The same process notices a signal
        once: its next notice is of a second one, however soon it comes.
        """
        is_same = (
            name == self.name and by not in self.noticed_by and time.monotonic() - self.at < _ECHO_S
        )
        if is_same:
            self.noticed_by.add(by)
        return is_same


class StopSignal:
    """Tells a run to end in good order: SIGTERM, SIGINT, or its time is up.

    Work between two waves looks at `requested`. A wave in flight gets a grace period and is then
    given up (its jobs are cancelled); what was committed stays. Under spark-submit the JVM is the
    process that gets the signal and would take the session down at once, so its handler is
    replaced too; on exit all handlers are what they were. A signal that both get (Ctrl-C in a
    terminal) counts once; a second one cancels the wave in flight at once.

    A job of several runs has one of these for all of them: no signal is lost between two runs, and
    `max_hours` is the job's. It is stood down after each run, and up again for the next.

    Args:
        spark: the session whose jobs are cancelled.
        max_hours: age at which to stop; None for never. The wave in flight is then finished.
        grace_s: seconds between a signal and the cancelling of the wave in flight.
    """

    def __init__(
        self, spark: SparkSession, max_hours: float | None, grace_s: float = _GRACE_S
    ) -> None:
        self._spark = spark
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._grace_s = grace_s
        self._first: _Received | None = None
        self._last: _Received | None = None
        self._timer: threading.Timer | None = None
        # Signals come in the main thread, in the JVM's, and the timer has one too. Reentrant, since
        # a signal may come while the main thread holds it.
        self._lock = threading.RLock()
        self._is_over = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGTERM, signal.SIGINT):
                self._undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
        if "DATABRICKS_RUNTIME_VERSION" not in os.environ:  # its JVM is the platform's, not ours
            self._take_over_jvm()
        return self

    def __exit__(self, *_: object) -> None:
        self.stand_down()
        self._undo.close()

    def stand_up(self) -> None:
        """Cancel work from now on: some begins."""
        with self._lock:
            self._is_over = False

    def stand_down(self) -> None:
        """Cancel nothing from now on: the work is over, only its record is still to be written.

        A signal is noted all the same, for what would come after.
        """
        with self._lock:  # a cancelling on its way is done before this returns
            self._is_over = True
            if self._timer:
                self._timer.cancel()

    @property
    def requested(self) -> str | None:
        """Why to stop; None to go on."""
        if self._first:
            return self._first.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "--max-hours is over"
        return None

    @property
    def gave_up(self) -> bool:
        """Whether a signal came, so that an error of Spark's now is the cancelled wave's."""
        return self._first is not None

    @property
    def is_urgent(self) -> bool:
        """Whether a second signal came: nothing more is to be done than must."""
        return self._last is not self._first

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._receive(signal.Signals(number).name, by="python")

    def _receive(self, name: str, *, by: str) -> None:
        with self._lock:
            if self._last and self._last.is_noticed_also(name, by=by):
                return
            self._last = _Received(name, time.monotonic(), {by})
            if self._first:  # a second signal does not wait
                self._cancel()
                return
            self._first = self._last
            if self._is_over:
                return
            self._timer = threading.Timer(self._grace_s, self._cancel)
            self._timer.daemon = True
            self._timer.start()

    def _cancel(self) -> None:
        # The JVM may be gone; there is nothing to cancel then.
        with self._lock, contextlib.suppress(Exception):
            if not self._is_over:
                self._spark.sparkContext.cancelAllJobs()

    def _take_over_jvm(self) -> None:
        receive = self._receive

        class Handler:
            def handle(self, received: Any) -> None:
                receive(f"SIG{received.getName()}", by="jvm")

            class Java:
                implements = ("sun.misc.SignalHandler",)

        def give_back(received: Any, handler: Any) -> None:
            with contextlib.suppress(Exception):  # the JVM may be gone
                jvm_signal.handle(received, handler)

        from pyspark.java_gateway import ensure_callback_server_started

        gateway = self._spark.sparkContext._gateway
        assert gateway is not None
        ensure_callback_server_started(gateway)  # type: ignore[no-untyped-call]
        jvm_signal = gateway.jvm.sun.misc.Signal
        for name in ("TERM", "INT"):
            received = jvm_signal(name)
            before = jvm_signal.handle(received, Handler())
            self._undo.callback(give_back, received, before)
