"""The life of a sampling run: its staging folder, its record, its progress, how it ends.

`jobs/generate.py` holds the recipe; this holds what surrounds it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from cdr.annotation import Stopped
from cdr.cli import FAILED, KEPT, OK, OVER_THRESHOLD, STOPPED, explain_spark_error
from cdr.config import content_hash
from cdr.errors import CdrError
from cdr.estimate import format_count, format_duration
from cdr.progress import Counts, Progress, TaskCounter
from cdr.runs import RunLog, RunRecord, StopSignal, new_run_id
from cdr.sampling import SamplingPlan
from cdr.sampling_stages import SampleCounts, SamplingContext, SamplingWork, write_rejects
from cdr.staging import Staging
from cdr.tables import COMPLETIONS, Warehouse


class SamplingRun:
    """One sampling run, used as a context manager.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.

    Attributes:
        context: what the stages work with.
        counter: where tasks count what they have done.
        exit_code: the job's, after the context has ended.
    """

    def __init__(self, plan: SamplingPlan, warehouse: Warehouse) -> None:
        spark, run_id = warehouse.spark, new_run_id()
        is_local = (spark.sparkContext.master or "").startswith("local")
        # On one machine without addresses all tasks share the machine's devices.
        devices = plan.config.run.devices
        num_tasks = devices or (1 if is_local else spark.sparkContext.defaultParallelism)
        staging = Staging(spark, warehouse.root, run_id)
        self.context = SamplingContext(plan, warehouse, staging, run_id, num_tasks)
        self.counter = TaskCounter.create(spark)
        self.exit_code = FAILED
        self._plan, self._warehouse = plan, warehouse
        self._counts = SampleCounts()
        self._waves_done: list[int] = []
        self._sampling_s = 0.0
        self._recorded: dict[str, int] = {}
        self._problem: str | None = None
        self._stop = StopSignal(spark, plan.config.run.max_hours)

    def __enter__(self) -> Self:
        config = self._plan.config
        values = config.model_dump(mode="json")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.context.staging)
            record = RunRecord(
                run_id=self.context.run_id,
                job="generate",
                dataset=config.dataset,
                reward_name=None,
                reward_key=None,
                config_hash=content_hash(values),
                config=json.dumps(values, sort_keys=True),
                input_versions={},
            )
            self._log = RunLog(self._warehouse, record)
            stack.enter_context(self._stop)
            self._open = stack.pop_all()
        return self

    def waves(self, work: SamplingWork) -> Iterator[int]:
        """Go through the waves with a progress bar, until the end or a stop signal.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        self._check_stop()
        self._log.update(waves_total=work.num_waves)
        if not work.num_waves:
            return
        # How long samples get shows only when they end, so tokens are those at most.
        most = work.num_missing * self._plan.config.sampling.max_new_tokens
        started = time.monotonic()
        with Progress(Counts(work.num_missing_prompts, most), self.counter, label="sampling"):
            for wave in range(work.num_waves):
                yield wave
                self._sampling_s = time.monotonic() - started
                self._check_stop()

    def committed(self, wave: int, counts: SampleCounts) -> None:
        """Note that a wave has been committed."""
        self._counts = self._counts.plus(counts)
        self._waves_done.append(wave)
        self._log.update(
            waves_done=len(self._waves_done),
            counts={"samples": self._counts.sampled, "failed": self._counts.failed},
        )

    def finish(self, work: SamplingWork) -> None:
        """Write the rejects, print and record the summary, and decide the exit code."""
        rejects = write_rejects(work, self._waves_done, self.context)
        counts, limits = self._counts, self._plan.config.run
        rejected = sum(rejects.values())
        shares = (
            ("prompts", "rejected", rejected / work.num_prompts, limits.max_rejected_fraction),
            (
                "samples",
                "failed",
                counts.failed / max(work.num_missing, 1),
                limits.max_failed_fraction,
            ),
        )
        problems = [
            f"{share:.1%} of the {what} were {how}, more than {limit:.1%} (run.max_{how}_fraction)"
            for what, how, share, limit in shares
            if share > limit
        ]
        self._problem = "; ".join(problems) or None
        self.exit_code = OVER_THRESHOLD if problems else OK
        self._recorded = {
            "prompts": work.num_prompts,
            "prompts_rejected": rejected,
            "samples": counts.sampled,
            "failed": counts.failed,
            "tokens": counts.tokens,
            "length_stopped": counts.cut,
            "empty": counts.empty,
        }
        print(f"\n{self._summary(work, rejects)}")

    def _summary(self, work: SamplingWork, rejects: dict[str, int]) -> str:
        config, counts = self._plan.config, self._counts
        known = (work.num_prompts - sum(rejects.values())) * config.sampling.num_samples
        known -= work.num_missing - counts.refused * config.sampling.num_samples
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejects.items()))
        lines = [
            f"dataset     {config.dataset}",
            f"prompts     {work.num_prompts:,}" + (f"; rejected: {reasons}" if reasons else ""),
            f"samples     {counts.sampled:,} drawn, {known:,} were there before",
        ]
        if counts.failed:
            lines.append(f"failed      {counts.failed:,}; run again to try them again")
        if counts.sampled:
            lines += [
                f"            {counts.cut:,} reached max_new_tokens, {counts.empty:,} are empty",
                f"tokens      {counts.tokens:,}, {counts.tokens / counts.sampled:.1f} per sample",
                f"time        {format_duration(self._sampling_s)}, "
                f"{format_count(counts.tokens / self._sampling_s)} tokens/s",
            ]
        return "\n".join([*lines, f"table       {self._warehouse.place(COMPLETIONS)}"])

    def _check_stop(self) -> None:
        if self._stop.requested:
            raise Stopped(self._stop.requested)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        with self._open:
            if isinstance(error, Stopped) or (error is not None and self._stop.gave_up):
                self.exit_code = STOPPED
                self._log.end("stopped", error=self._stop.requested)
                print(f"\nstopped: {self._stop.requested}. {KEPT}")
                return True
            if error is not None:
                known = str(error) if isinstance(error, CdrError) else explain_spark_error(error)
                self._log.end("failed", error=known or f"{type(error).__name__}: {error}"[:2000])
                return False
            outcome = "done" if self.exit_code == OK else "over_threshold"
            self._log.end(outcome, error=self._problem, counts=self._recorded)
        if self._problem:
            print(f"\nover the threshold: {self._problem}")
        return False
