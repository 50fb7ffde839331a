"""The life of an annotate run: its staging folder, its record, its MLflow run, how it ends.

`jobs/annotate.py` holds the recipe; this holds what surrounds it, so that a run leaves the same
traces whether it ends well, is stopped, or fails.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from functools import reduce
from types import TracebackType
from typing import Self

from pyspark.sql import DataFrame

from cdr.cli import FAILED, KEPT, OK, OVER_THRESHOLD, STOPPED, explain_spark_error
from cdr.errors import CdrError
from cdr.inputs import input_version
from cdr.plan import AnnotationPlan
from cdr.progress import Counts, Progress, TaskCounter
from cdr.runs import RunLog, RunRecord, StopSignal, new_run_id
from cdr.scoring import Wave, WaveResult, Work
from cdr.stages import Context
from cdr.staging import Staging
from cdr.summary import summarize
from cdr.tables import LOGPROBS, PREFERENCES, REJECTS, REWARDS, ROUTES, Warehouse
from cdr.tracking import RunTracker, TableVersion


class Stopped(Exception):  # noqa: N818 - an outcome, not an error
    """The run ends early in good order; the message says why."""


def make_context(plan: AnnotationPlan, warehouse: Warehouse) -> Context:
    """Give a new run its id, its staging folder and its numbers of tasks."""
    spark, run_id = warehouse.spark, new_run_id()
    context = spark.sparkContext
    is_local = (context.master or "").startswith("local")
    # On one machine without addresses all tasks share the machine's devices; on a cluster a task
    # more than there are devices costs nothing but its start.
    devices = plan.config.run.devices or (1 if is_local else context.defaultParallelism)
    staging = Staging(spark, warehouse.root, run_id)
    version = input_version(spark, plan.config.input)
    return Context(plan, warehouse, staging, run_id, version, context.defaultParallelism, devices)


class AnnotationRun:
    """One annotate run, used as a context manager.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.

    Attributes:
        context: what the stages work with.
        counter: where tasks count what they have done.
        exit_code: the job's, after the context has ended.
    """

    def __init__(self, plan: AnnotationPlan, warehouse: Warehouse) -> None:
        self.context = make_context(plan, warehouse)
        self.exit_code = FAILED
        self.counter = TaskCounter.create(warehouse.spark)
        self._scored = self._failed = 0
        self._scoring_s = 0.0
        self._waves: Sequence[Wave] = ()
        self._counts: dict[str, int] = {}
        self._problem: str | None = None
        self._spark, self._plan, self._warehouse = warehouse.spark, plan, warehouse
        self._started = time.monotonic()
        self._stop = StopSignal(warehouse.spark, plan.config.run.max_hours)

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run; None where tracking is off."""
        return self._tracker.run_id

    def __enter__(self) -> Self:
        plan, context = self._plan, self.context
        config = plan.config.model_dump(mode="json")
        source = plan.config.input
        with contextlib.ExitStack() as stack:
            stack.enter_context(context.staging)
            keys = {f"cdr.model_key.{role}": m.model_key for role, m in plan.models.items()}
            tags = {
                "cdr.job": "annotate",
                "cdr.dataset": plan.dataset,
                "cdr.reward_name": plan.config.reward.name,
                "cdr.reward_key": plan.reward_key,
                "cdr.selection_key": plan.selection_key,
                **keys,
            }
            self._tracker = stack.enter_context(
                RunTracker(
                    plan.config.tracking,
                    self._warehouse.root,
                    run_name=context.run_id,
                    config=config,
                    tags=tags,
                )
            )
            self._tracker.log_table(
                TableVersion(
                    "completions", str(source.path or source.table), context.input_version
                ),
                role="input",
            )
            version = context.input_version
            self._log = RunLog(
                self._warehouse,
                RunRecord(
                    run_id=context.run_id,
                    job="annotate",
                    dataset=plan.dataset,
                    reward_name=plan.config.reward.name,
                    reward_key=plan.reward_key,
                    config_hash=plan.config_hash(),
                    config=json.dumps(config, sort_keys=True),
                    input_versions={} if version is None else {"completions": version},
                    mlflow_run_id=self._tracker.run_id,
                ),
            )
            stack.enter_context(self._stop)
            # From here on `__exit__` cleans up, in the opposite order.
            self._open = stack.pop_all()
        return self

    def waves(self, waves: Sequence[Wave], work: Work) -> Iterator[Wave]:
        """Go through the waves with a progress bar, until the end or a stop signal.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        self.check_stop()
        self._waves = waves
        self._log.update(waves_total=len(waves))
        if not waves:
            return
        total = Counts(prompts=work.missing[work.counted].prompts, tokens=work.tokens)
        started = time.monotonic()
        with Progress(total, self.counter, label="scoring"):
            for wave in waves:
                yield wave
                self.check_stop()
        self._scoring_s = time.monotonic() - started

    def committed(self, wave: Wave, result: WaveResult) -> None:
        """Note that a wave has been committed."""
        self._scored += result.scored
        self._failed += result.failed
        self._log.update(
            waves_done=wave.number + 1,
            counts={"logprobs_scored": self._scored, "logprobs_failed": self._failed},
        )

    def failures(self) -> DataFrame | None:
        """Read the completions that this run could not score; None when there is none."""
        if not self._failed:
            return None
        staging = self.context.staging
        scored = [staging.read(f"scored/wave={wave.number}") for wave in self._waves]
        return reduce(DataFrame.unionByName, scored).where("error IS NOT NULL")

    def check_stop(self) -> None:
        """End the run here if it was asked to stop.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        if self._stop.requested:
            raise Stopped(self._stop.requested)

    def finish(
        self,
        rewards: DataFrame,
        rejects: DataFrame,
        pairs: DataFrame,
        without_pair: DataFrame,
        work: Work,
    ) -> None:
        """Sum up what was committed, print and record it, and decide the exit code."""
        summary = summarize(
            rewards,
            rejects,
            pairs,
            without_pair,
            asked=work.asked,
            scored=self._scored,
            tokens=work.tokens,
            scoring_s=self._scoring_s,
            wall_s=time.monotonic() - self._started,
        )
        limits = self._plan.config.run
        shares = {
            "rejected": (summary.rejected_fraction, limits.max_rejected_fraction),
            "failed": (summary.failed_fraction, limits.max_failed_fraction),
        }
        problems = [
            f"{share:.1%} of the candidates were {what}, more than {limit:.1%} "
            f"(run.max_{what}_fraction)"
            for what, (share, limit) in shares.items()
            if share > limit
        ]
        self._problem = "; ".join(problems) or None
        self.exit_code = OVER_THRESHOLD if problems else OK
        self._counts = summary.counts()
        self._tracker.log_summary(summary.metrics())
        for table in (ROUTES, LOGPROBS, REWARDS, REJECTS, PREFERENCES):
            written = self._warehouse.version(table)
            if written is not None:
                place = self._warehouse.place(table)
                self._tracker.log_table(TableVersion(table.name, place, written), role="output")
        print(f"\n{summary.render()}\n\n{self._next_steps()}")

    def _next_steps(self) -> str:
        place = self._warehouse.place(PREFERENCES)
        lines = [
            "next:",
            "  SELECT domain, count(*) AS pairs, round(avg(margin), 2) AS margin",
            f"  FROM delta.`{place}` WHERE dataset = '{self._plan.dataset}' GROUP BY domain",
        ]
        if command := self._tracker.ui_command():
            lines += ["", f"  {command}"]
        return "\n".join(lines)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        stop = self._stop.requested
        try:
            if isinstance(error, Stopped) or (error is not None and self._stop.gave_up):
                self.exit_code = STOPPED
                self._log.end("stopped", error=stop)
                self._tracker.end_as("KILLED")
                print(f"\nstopped: {stop}. {KEPT}")
                return True
            if error is not None:
                known = str(error) if isinstance(error, CdrError) else explain_spark_error(error)
                self._log.end("failed", error=known or f"{type(error).__name__}: {error}"[:2000])
                return False
            outcome = "done" if self.exit_code == OK else "over_threshold"
            self._log.end(outcome, error=self._problem, counts=self._counts)
            if self._problem:
                print(f"\nover the threshold: {self._problem}; see the tables rejects and rewards")
            return False
        finally:
            self._open.__exit__(None if self.exit_code == STOPPED else kind, error, trace)
