"""Progress of a long Spark action, shown on the driver: a bar, or plain lines without a terminal.

Tasks count prompts and tokens as they go; nothing else leaves them. Two ways lead to the driver:

- An accumulator, on every platform. Spark ships it when a task ends; failed attempts add nothing.
  There, short tasks make a lively bar.
- On one machine a task on a CPU may take an hour, so there each running task also keeps its count
  in a small file that the driver reads. The file goes away when the task ends.

    counter = TaskCounter.create(spark)
    with Progress(Counts(prompts=60_000, tokens=10**9), counter, label="strong"):
        rows.mapInPandas(score(counter), schema).write...      # `with counter.task() as count:`
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TextIO

from tqdm import tqdm

from cdr.estimate import format_count, format_duration

if TYPE_CHECKING:
    from pyspark import Accumulator
    from pyspark.sql import SparkSession

_TERMINAL_INTERVAL_S = 1.0
_LINE_INTERVAL_S = 10.0
_TASK_FILE_INTERVAL_S = 1.0
_RATE_WINDOW_S = 300.0  # longer than a task: on a cluster counts come when tasks end


class Counts(NamedTuple):
    """Prompts and tokens done."""

    prompts: int = 0
    tokens: int = 0

    def plus(self, other: Counts) -> Counts:
        """Add field by field."""
        return Counts(self.prompts + other.prompts, self.tokens + other.tokens)

    def minus(self, other: Counts) -> Counts:
        """Subtract field by field."""
        return Counts(self.prompts - other.prompts, self.tokens - other.tokens)


class EngineLoad(NamedTuple):
    """An engine that an engine host has loaded: where, and the seconds that took."""

    node: str
    device: str
    host_pid: int
    engine: str
    load_s: float

    def describe(self, names: Mapping[str, str]) -> str:
        """Say it in one line, the engine by what it is called in `names`."""
        place = f"{self.node} {self.device} (engine host {self.host_pid})"
        name = names.get(self.engine, self.engine)
        return f"loaded {name} in {self.load_s:.1f} s on {place}"


def slowest_loads(loads: Iterable[EngineLoad]) -> dict[str, float]:
    """Give, by engine, the seconds that loading it took on the slowest engine host."""
    slowest: dict[str, float] = {}
    for load in loads:
        slowest[load.engine] = max(load.load_s, slowest.get(load.engine, 0.0))
    return slowest


class EngineWork(NamedTuple):
    """What engines had to do for some tasks.

    Args:
        resubmitted: requests that they sent their model again.
        busy_s: seconds that they were at work, by engine host.
    """

    resubmitted: int
    busy_s: Mapping[str, float]

    def plus(self, other: EngineWork) -> EngineWork:
        """Add field by field, host by host."""
        busy_s = dict(self.busy_s)
        for host, seconds in other.busy_s.items():
            busy_s[host] = busy_s.get(host, 0.0) + seconds
        return EngineWork(self.resubmitted + other.resubmitted, busy_s)


class CountSource(Protocol):
    """What a `Progress` polls."""

    def read(self) -> Counts:
        """Give everything counted so far."""
        ...

    def engine_loads(self) -> frozenset[EngineLoad]:
        """Give every engine that was loaded so far."""
        ...


# How Spark adds up: each an `AccumulatorParam`, without importing PySpark here.


class _CountsParam:
    def zero(self, value: Counts) -> Counts:
        return Counts()

    def addInPlace(self, left: Counts, right: Counts) -> Counts:  # noqa: N802 - Spark's name
        return left.plus(right)


class _WorkParam:
    def zero(self, value: EngineWork) -> EngineWork:
        return EngineWork(0, {})

    def addInPlace(self, left: EngineWork, right: EngineWork) -> EngineWork:  # noqa: N802 - Spark's
        return left.plus(right)


class _LoadsParam:
    def zero(self, value: frozenset[EngineLoad]) -> frozenset[EngineLoad]:
        return frozenset()

    def addInPlace(  # noqa: N802 - Spark's name
        self, left: frozenset[EngineLoad], right: frozenset[EngineLoad]
    ) -> frozenset[EngineLoad]:
        return left | right


@dataclass(frozen=True)
class TaskCounter:
    """Counts of all tasks of a job; crosses to workers with the function that uses it.

    Args:
        ended: accumulator over ended tasks.
        loads: accumulator over the engines that ended tasks found loaded.
        work: accumulator over what engines did for ended tasks.
        folder: of the running tasks' files, on the one machine of a local session; else None.
    """

    ended: Accumulator[Counts]
    loads: Accumulator[frozenset[EngineLoad]]
    work: Accumulator[EngineWork]
    folder: Path | None

    @classmethod
    def create(cls, spark: SparkSession) -> TaskCounter:
        """Make a counter on the driver; its folder goes away with it."""
        from pyspark.accumulators import AccumulatorParam

        # PySpark asks for subclasses; defined up there they would make this module need PySpark.
        counts: AccumulatorParam[Counts] = _CountsParam()  # type: ignore[assignment]
        loads: AccumulatorParam[frozenset[EngineLoad]] = _LoadsParam()  # type: ignore[assignment]
        work: AccumulatorParam[EngineWork] = _WorkParam()  # type: ignore[assignment]
        context = spark.sparkContext
        folder = None
        if is_one_machine(context.master):
            folder = Path(tempfile.mkdtemp(prefix="cdr-progress-"))
        counter = cls(
            context.accumulator(Counts(), counts),
            context.accumulator(frozenset(), loads),
            context.accumulator(EngineWork(0, {}), work),
            folder,
        )
        if folder is not None:
            weakref.finalize(counter, shutil.rmtree, folder, ignore_errors=True)
        return counter

    @contextlib.contextmanager
    def task(self) -> Iterator[TaskCount]:
        """Count inside one task, on a worker."""
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None, "counts belong to a Spark task"
        # Named so that a retry overwrites what a killed attempt left.
        name = f"{context.stageId()}-{context.partitionId()}"
        count = TaskCount(None if self.folder is None else self.folder / name)
        try:
            yield count
        finally:
            count.clear()
            self.ended.add(count.counts)

    def add_loads(self, loads: Iterable[EngineLoad]) -> None:
        """Note, on a worker, which engines a task found loaded."""
        self.loads.add(frozenset(loads))

    def add_work(self, work: EngineWork) -> None:
        """Count, on a worker, what a task's engines had to do."""
        self.work.add(work)

    def engine_work(self) -> EngineWork:
        """Give what engines did for ended tasks (driver only)."""
        return self.work.value

    def engine_loads(self) -> frozenset[EngineLoad]:
        """Give every engine that ended tasks found loaded (driver only)."""
        return self.loads.value

    def read(self) -> Counts:
        """Give the counts of ended and running tasks (driver only)."""
        total = self.ended.value
        for path in self.folder.glob("*-*") if self.folder is not None else ():
            with contextlib.suppress(FileNotFoundError, ValueError):  # the task just ended
                prompts, tokens = path.read_text().split()
                total = total.plus(Counts(int(prompts), int(tokens)))
        return total


def is_one_machine(master: str | None) -> bool:
    """Tell whether the driver is the only executor: `local`, `local[4]`; not `local-cluster`."""
    return re.fullmatch(r"local(\[.*\])?", master or "") is not None


class TaskCount:
    """What one task has done so far.

    Args:
        file: where the driver looks for it; None where it cannot.
        clock: seconds, for tests.
    """

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = Counts()
        self._file, self._clock = file, clock
        self._next_write_s = clock()

    def add(self, prompts: int, tokens: int) -> None:
        """Count finished work."""
        self.counts = self.counts.plus(Counts(prompts, tokens))
        if self._file is not None and self._clock() >= self._next_write_s:
            self._next_write_s = self._clock() + _TASK_FILE_INTERVAL_S
            fresh = self._file.with_suffix(".new")
            fresh.write_text(f"{self.counts.prompts} {self.counts.tokens}")
            os.replace(fresh, self._file)

    def clear(self) -> None:
        """Take the file away: from here on the accumulator tells."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class Progress:
    """Shows counts against a total while its `with` block runs.

    Args:
        total: what there is to do; tokens are 0 where nobody can know them before.
        source: polled from a thread, once a second with a terminal, else every ten.
        label: what is being done, for example the model's role.
        names: what engines are called in the lines about their loading, by engine.
        stream: where to show it.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: Counts,
        source: CountSource,
        *,
        label: str,
        names: Mapping[str, str] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._source, self._label = total, source, label
        self._names = names or {}
        self._stream = stream or sys.stderr
        self._clock = clock
        # A job's counter serves several stages: what others have counted is not ours.
        self._before = source.read()
        self._done = Counts()
        self._told = source.engine_loads()
        self._history = deque([(clock(), self._done)])
        self._start_s = clock()
        self._bar: tqdm[Any] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="cdr-progress", daemon=True)

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bar = tqdm(
                total=max(self._amount(self._total), 1),
                desc=self._label,
                file=self._stream,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
                dynamic_ncols=True,
            )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.refresh()
        if self._bar is not None:
            self._bar.close()

    def refresh(self) -> None:
        """Read the counts and show them, and which engines were loaded meanwhile."""
        loads = self._source.engine_loads()
        for load in sorted(loads - self._told):
            self._print(load.describe(self._names))
        self._told = loads
        now, counts = self._clock(), self._source.read().minus(self._before)
        # Between the end of a task and its accumulator's arrival the sum dips for a moment.
        self._done = Counts(*map(max, self._done, counts))
        self._history.append((now, self._done))
        while len(self._history) > 2 and self._history[1][0] <= now - _RATE_WINDOW_S:
            self._history.popleft()
        if self._bar is None:
            self._print(f"{self._label}: {self.describe()}")
        else:
            self._bar.set_postfix_str(self.describe(), refresh=False)
            done = min(self._amount(self._done), self._amount(self._total))
            self._bar.update(done - self._bar.n)
            self._bar.refresh()

    def describe(self) -> str:
        """Say how far it is, how fast, and how long it will take; rates of the last 5 minutes."""
        done, total = self._done, self._total
        of_all = f" of {format_count(total.tokens)}" if total.tokens else ""
        parts = [
            f"{format_count(done.tokens)}{of_all} tokens",
            f"{done.prompts:,} of {total.prompts:,} prompts",
        ]
        (then, before), (now, _) = self._history[0], self._history[-1]
        tokens, prompts = done.tokens - before.tokens, done.prompts - before.prompts
        if now > then and tokens > 0:
            span_s = now - then
            parts.append(f"{format_count(tokens / span_s)} tokens/s")
            parts.append(f"{format_count(prompts / span_s)} prompts/s")
            left = max(self._amount(total) - self._amount(done), 0)
            if not left:
                parts.append("done")
            elif amount := self._amount(Counts(prompts, tokens)):
                parts.append(f"{format_duration(left * span_s / amount)} left")
        parts.append(f"{format_duration(self._clock() - self._start_s)} so far")
        return ", ".join(parts)

    def _amount(self, counts: Counts) -> int:
        """Give what the work is measured by: tokens, where their total is known."""
        return counts.tokens if self._total.tokens else counts.prompts

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def _poll(self) -> None:
        interval_s = _LINE_INTERVAL_S if self._bar is None else _TERMINAL_INTERVAL_S
        while not self._ended.wait(interval_s):
            self.refresh()
