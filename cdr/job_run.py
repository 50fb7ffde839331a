"""The life of a job's run: staging folder, row in `runs`, signals, waves, and how it ends.

A job holds its recipe (`jobs/`); a `JobRun` is what surrounds it, so that every run leaves the same
traces whether it ends well, is stopped, or fails.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from pyspark.sql import SparkSession

from cdr.cli import FAILED, KEPT, OK, OVER_THRESHOLD, STOPPED, explain_spark_error
from cdr.config import JobSpec
from cdr.engines.base import EngineSpec
from cdr.engines.device import visible_cuda_devices
from cdr.errors import CdrError, Stopped
from cdr.progress import Counts, Progress, TaskCounter, is_one_machine, slowest_loads
from cdr.runs import RunLog, RunRecord, StopSignal
from cdr.staging import Staging
from cdr.summary import EngineUse
from cdr.warehouse import Warehouse

Wave = TypeVar("Wave")


@dataclass(frozen=True)
class Share:
    """A part of a run's rows that must not grow too large.

    Args:
        rows: what they are, for the message: `candidates`.
        what: what became of them, `rejected` or `failed`: names the limit in the config.
        value: their share, 0 to 1.
        limit: share up to which the run counts as well done.
    """

    rows: str
    what: str
    value: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.value:.1%} of the {self.rows} were {self.what}, more than {self.limit:.1%} "
            f"(run.max_{self.what}_fraction)"
        )


class JobRun(ABC):
    """One run of a job, used as a context manager.

    Args:
        warehouse: where the tables are.
        staging: the run's folder of intermediate tables.
        spec: its limits.
        engines: those that it may load, by role.
        stop: what tells the job to end, where it is made of several runs; None: a run of its own.

    Attributes:
        counter: where tasks count what they have done.
        exit_code: the job's, after the context has ended.
    """

    def __init__(
        self,
        warehouse: Warehouse,
        staging: Staging,
        spec: JobSpec,
        engines: Mapping[str, EngineSpec] | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        self.counter = TaskCounter.create(warehouse.spark)
        self.exit_code = FAILED
        self._warehouse, self._staging, self._spec = warehouse, staging, spec
        self._engines = engines or {}
        self._has_own_stop = stop is None
        self._stop = stop or StopSignal(warehouse.spark, spec.max_hours)
        self._waves_done = self._waves_total = 0
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        self._at_hand_s: dict[str, float] = {}
        self._problem: str | None = None
        self._counts: Counter[str] = Counter()

    @abstractmethod
    def _begin(self, stack: contextlib.ExitStack) -> RunRecord:
        """Describe the run; what else it needs while it lasts is entered into the stack."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._staging)
            self._log = RunLog(self._warehouse, self._begin(stack))
            if self._has_own_stop:
                stack.enter_context(self._stop)
            self._stop.stand_up()
            # From here on `__exit__` cleans up, in the opposite order.
            self._open = stack.pop_all()
        return self

    @property
    def stop_requested(self) -> str | None:
        """Why the run is to stop; None to go on."""
        return self._stop.requested

    def check_stop(self) -> None:
        """End the run here if it was asked to stop.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        if self._stop.requested:
            raise Stopped(self._stop.requested)

    def _go_through(self, waves: Sequence[Wave], total: Counts, label: str) -> Iterator[Wave]:
        """Go through the waves with a progress bar, until the end or a stop signal.

        Args:
            waves: none is fine.
            total: what they hold.
            label: what they do, for example `scoring`; `_spent_s` has their seconds under it, and
                `_at_hand_s` these times the engine hosts that were asked.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        self.check_stop()
        self._waves_total += len(waves)
        self._log.update(waves_total=self._waves_total)
        if not waves:
            return
        begun, before = time.monotonic(), self.counter.engine_work().busy_s
        names = name_engines(self._engines)
        with Progress(total, self.counter, label=label, names=names):
            for wave in waves:
                yield wave
                self._spent_s[label] = time.monotonic() - begun
                busy_s = self.counter.engine_work().busy_s
                hosts = sum(s > before.get(host, 0) for host, s in busy_s.items())
                self._at_hand_s[label] = hosts * self._spent_s[label]
                self.check_stop()

    def _note_wave(self, counts: Mapping[str, int]) -> None:
        """Note that one more wave has been committed, and what it adds to the run's counts."""
        self._waves_done += 1
        self._counts.update(counts)
        self._log.update(waves_done=self._waves_done, counts=self._counts)

    def _engine_use(self) -> EngineUse:
        """Tell how this run has used its engines so far."""
        loads, work = self.counter.engine_loads(), self.counter.engine_work()
        by_name = slowest_loads(loads)
        return EngineUse(
            load_s={
                role: by_name[engine.name]
                for role, engine in self._engines.items()
                if engine.name in by_name
            },
            resubmitted=work.resubmitted,
            busy_s=sum(work.busy_s.values()),
            at_hand_s=sum(self._at_hand_s.values()),
        )

    def _conclude(self, shares: Sequence[Share], counts: Mapping[str, int]) -> None:
        """Decide the exit code of a run that did all it could, and keep its counts for `runs`."""
        problems = [str(share) for share in shares if share.value > share.limit]
        self._problem = "; ".join(problems) or None
        self._counts = Counter(counts)
        self.exit_code = OVER_THRESHOLD if problems else OK

    @property
    def _outcome(self) -> str:
        """How a run that did all it could ended, for `runs`."""
        return "done" if self.exit_code == OK else "over_threshold"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        # Before anything is written: a grace period that ends now would cancel the write below.
        self._stop.stand_down()
        if error is not None and self._stop.gave_up:
            # After a signal an error of Spark's is that of the wave that was given up.
            kind, error = Stopped, Stopped(self._stop.requested)
        try:
            self._record_end(error)
        finally:
            self._open.__exit__(kind, error, trace)
        return isinstance(error, Stopped)

    def _record_end(self, error: BaseException | None) -> None:
        if isinstance(error, Stopped):
            self.exit_code = STOPPED
            self._log.end("stopped", error=str(error))
            print(f"\nstopped: {error}. {KEPT}")
        elif error is not None:
            known = str(error) if isinstance(error, CdrError) else explain_spark_error(error)
            self._log.end("failed", error=known or f"{type(error).__name__}: {error}"[:2000])
        else:
            self._log.end(self._outcome, error=self._problem, counts=self._counts)
            if self._problem:
                print(f"\nover the threshold: {self._problem}; see the tables rejects and rewards")


def name_engines(engines: Mapping[str, EngineSpec]) -> dict[str, str]:
    """Name engines for people: `strong (smollm2-135m-instruct + adapter)`.

    Args:
        engines: by role.

    Returns:
        The names by what engines are called in requests, their model key.
    """
    names: dict[str, str] = {}
    for engine in engines.values():
        roles = ", ".join(role for role, other in engines.items() if other.name == engine.name)
        path = engine.path.rstrip("/").rpartition("/")[2]
        adapter = " + adapter" if engine.adapter_path else ""
        names[engine.name] = f"{roles} ({path}{adapter})"
    return names


def count_devices(spark: SparkSession, configured: int | None) -> int:
    """Tell how many devices there are to keep busy, which is the tasks a model stage has at least.

    Args:
        spark: the session.
        configured: `run.devices`; None to go by the cluster.
    """
    if configured is not None:
        return configured
    if is_one_machine(spark.sparkContext.master):
        # Without addresses the tasks claim this machine's GPUs, or share its CPU.
        return max(1, len(visible_cuda_devices()))
    # On a cluster a task more than there are devices costs nothing but its start.
    return spark.sparkContext.defaultParallelism
