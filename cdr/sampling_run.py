"""The life of a sampling run: what it is recorded as, its progress, its summary.

`jobs/generate.py` holds the recipe; this holds what surrounds it (`cdr.job_run`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace

from cdr.config import content_hash
from cdr.estimate import format_count, format_duration
from cdr.executors import settle_device
from cdr.job_run import JobRun, Share, count_devices
from cdr.progress import Counts
from cdr.runs import RunRecord, new_run_id
from cdr.sampling import SamplingPlan
from cdr.sampling_stages import SampleCounts, SamplingContext, SamplingWork, write_rejects
from cdr.sources import input_version
from cdr.staging import Staging
from cdr.summary import EngineUse
from cdr.tables import COMPLETIONS
from cdr.warehouse import Warehouse


class SamplingRun(JobRun):
    """One sampling run, used as a context manager.

    Args:
        plan: the checked plan; its `run.device` is settled here.
        warehouse: where the tables are.

    Attributes:
        context: what the stages work with.

    Raises:
        ModelError: vLLM is asked for and cannot be used on this machine.
        SetupError: there are no GPUs, and the CPU is not meant.
    """

    def __init__(self, plan: SamplingPlan, warehouse: Warehouse) -> None:
        spark, run_id = warehouse.spark, new_run_id()
        # As asked for, whatever it means on this cluster.
        self._recorded = plan.config.model_dump(mode="json")
        settled = settle_device(plan.config.run, [plan.engine], spark)
        plan = replace(plan, config=plan.config.model_copy(update={"run": settled}))
        staging = Staging(spark, warehouse.root, run_id)
        self.context = SamplingContext(
            plan=plan,
            warehouse=warehouse,
            staging=staging,
            run_id=run_id,
            input_version=input_version(spark, plan.config.input),
            num_tasks=count_devices(spark, plan.config.run.devices),
        )
        super().__init__(warehouse, staging, plan.config.run, {"policy": plan.engine})
        self._plan = plan
        self._sampled = SampleCounts()

    def _begin(self, stack: contextlib.ExitStack) -> RunRecord:
        config = self._plan.config
        values, version = self._recorded, self.context.input_version
        return RunRecord(
            run_id=self.context.run_id,
            job="generate",
            dataset=config.dataset,
            reward_name=None,
            reward_key=None,
            config_hash=content_hash(values),
            config=json.dumps(values, sort_keys=True),
            input_versions={} if version is None else {"prompts": version},
        )

    def waves(self, work: SamplingWork) -> Iterator[int]:
        """Go through the waves with a progress bar, until the end or a stop signal.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        # How long samples get shows only when they end.
        total = Counts(work.num_missing_prompts, tokens=0)
        return self._go_through(range(work.num_waves), total, "sampling")

    def committed(self, counts: SampleCounts) -> None:
        """Note that a wave has been committed."""
        self._sampled = self._sampled.plus(counts)
        self._note_wave({"samples": counts.sampled, "failed": counts.failed})

    def finish(self, work: SamplingWork) -> None:
        """Write the rejects, print and record the summary, and decide the exit code."""
        rejects = write_rejects(work, self.context)
        counts, limits = self._sampled, self._spec
        rejected = sum(rejects.values())
        rejected_share = rejected / work.num_prompts
        failed_share = counts.failed / max(work.num_missing, 1)
        shares = (
            Share("prompts", "rejected", rejected_share, limits.max_rejected_fraction),
            Share("samples", "failed", failed_share, limits.max_failed_fraction),
        )
        engines = self._engine_use()
        recorded = {
            "prompts": work.num_prompts,
            "prompts_rejected": rejected,
            "samples": counts.sampled,
            "failed": counts.failed,
            "tokens": counts.tokens,
            "length_stopped": counts.cut,
            "empty": counts.empty,
            **engines.counts(),
        }
        self._conclude(shares, recorded)
        print(f"\n{self._summary(work, rejects, engines)}")

    def _summary(self, work: SamplingWork, rejects: dict[str, int], engines: EngineUse) -> str:
        config, counts = self._plan.config, self._sampled
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
            spent_s = self._spent_s["sampling"]
            lines += [
                f"            {counts.cut:,} reached max_new_tokens, {counts.empty:,} are empty",
                f"tokens      {counts.tokens:,}, {counts.tokens / counts.sampled:.1f} per sample",
                f"time        {format_duration(spent_s)}, "
                f"{format_count(counts.tokens / spent_s)} tokens/s",
            ]
        table = f"table       {self._warehouse.place(COMPLETIONS)}"
        return "\n".join([*lines, *engines.render(), table])
