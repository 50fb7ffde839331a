"""The life of an annotate run: what it is recorded as, its MLflow run, its summary.

`jobs/annotate.py` holds the recipe; this holds what surrounds it (`cdr.job_run`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.job_run import JobRun, Share, count_devices
from cdr.plan import AnnotationPlan
from cdr.progress import Counts
from cdr.routing import RoutingResult, RoutingWork
from cdr.runs import RunRecord, new_run_id
from cdr.scoring import Wave, WaveResult, Work
from cdr.sources import input_version
from cdr.stages import Context
from cdr.staging import Staging
from cdr.summary import summarize
from cdr.tables import (
    LOGPROBS,
    PREFERENCES,
    REJECTS,
    REWARDS,
    ROUTES,
    UNPAIRED,
    Warehouse,
)
from cdr.tracking import RunTracker, TableVersion, redact
from cdr.waves import BucketRange


def make_context(plan: AnnotationPlan, warehouse: Warehouse) -> Context:
    """Give a new run its id, its staging folder and its numbers of tasks."""
    spark, run_id = warehouse.spark, new_run_id()
    return Context(
        plan=plan,
        warehouse=warehouse,
        staging=Staging(spark, warehouse.root, run_id),
        run_id=run_id,
        input_version=input_version(spark, plan.config.input),
        num_tasks=spark.sparkContext.defaultParallelism,
        num_devices=count_devices(spark, plan.config.run.devices),
    )


class AnnotationRun(JobRun):
    """One annotate run, used as a context manager.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.

    Attributes:
        context: what the stages work with.
    """

    def __init__(self, plan: AnnotationPlan, warehouse: Warehouse) -> None:
        self.context = make_context(plan, warehouse)
        super().__init__(warehouse, self.context.staging, plan.config.run)
        self._plan = plan
        self._scored = self._failed = 0
        self._scoring_waves: Sequence[Wave] = ()
        self._started = time.monotonic()

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run; None where tracking is off."""
        return self._tracker.run_id

    def _begin(self, stack: contextlib.ExitStack) -> RunRecord:
        plan, context = self._plan, self.context
        config = plan.config.model_dump(mode="json")
        source, version = plan.config.input, context.input_version
        keys = {f"cdr.model_key.{role}": model.model_key for role, model in plan.models.items()}
        tags = {
            "cdr.job": "annotate",
            "cdr.dataset": plan.dataset,
            "cdr.reward_name": plan.config.reward.name,
            "cdr.reward_key": plan.reward_key,
            "cdr.selection_key": plan.selection_key,
            **keys,
        }
        if plan.reward_version is not None:
            tags["cdr.reward_version"] = plan.reward_version
        self._tracker = stack.enter_context(
            RunTracker(
                plan.config.tracking,
                self._warehouse.root,
                run_name=context.run_id,
                config=config,
                tags=tags,
            )
        )
        self._tracker.log_table(TableVersion("completions", source.place, version), role="input")
        return RunRecord(
            run_id=context.run_id,
            job="annotate",
            dataset=plan.dataset,
            reward_name=plan.config.reward.name,
            reward_key=plan.reward_key,
            config_hash=plan.config_hash(),
            config=json.dumps(redact(config), sort_keys=True),
            input_versions={} if version is None else {"completions": version},
            mlflow_run_id=self._tracker.run_id,
        )

    def routing_waves(self, work: RoutingWork) -> Iterator[BucketRange]:
        """Go through the router's waves with a progress bar, until the end or a stop signal.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        return self._go_through(work.waves, Counts(work.prompts, work.tokens), "routing")

    def routed(self, result: RoutingResult) -> None:
        """Note that a wave of routes has been committed."""
        self._note_wave({"routed": result.routed, "routes_failed": result.failed})

    def scoring_waves(self, waves: Sequence[Wave], work: Work) -> Iterator[Wave]:
        """Go through the scoring waves, as `routing_waves` does."""
        self._scoring_waves = waves
        prompts = work.missing[work.counted].prompts if waves else 0
        return self._go_through(waves, Counts(prompts, work.tokens), "scoring")

    def scored(self, result: WaveResult) -> None:
        """Note that a wave of log-probs has been committed."""
        self._scored += result.scored
        self._failed += result.failed
        self._note_wave({"logprobs_scored": result.scored, "logprobs_failed": result.failed})

    def failures(self) -> DataFrame | None:
        """Read the completions that this run could not score; None when there is none."""
        if not self._failed:
            return None
        staging = self.context.staging
        scored = [staging.read(f"scored/wave={wave.number}") for wave in self._scoring_waves]
        return reduce(DataFrame.unionByName, scored).where("error IS NOT NULL")

    def finish(
        self,
        rewards: DataFrame,
        rejects: DataFrame,
        pairs: DataFrame,
        unpaired: DataFrame,
        work: Work,
    ) -> None:
        """Sum up what was committed, print and record it, and decide the exit code."""
        summary = summarize(
            rewards,
            rejects,
            pairs,
            unpaired,
            asked=work.asked,
            scored=self._scored,
            tokens=work.tokens,
            scoring_s=self._spent_s["scoring"],
            wall_s=time.monotonic() - self._started,
        )
        limits = self._spec
        shares = (
            Share(
                "candidates", "rejected", summary.rejected_fraction, limits.max_rejected_fraction
            ),
            Share("candidates", "failed", summary.failed_fraction, limits.max_failed_fraction),
        )
        self._conclude(shares, summary.counts())
        self._tracker.log_summary(summary.metrics())
        for table in (ROUTES, LOGPROBS, REWARDS, REJECTS, PREFERENCES, UNPAIRED):
            written = self._warehouse.version(table)
            if written is not None:
                place = self._warehouse.place(table)
                self._tracker.log_table(TableVersion(table.name, place, written), role="output")
        print(f"\n{summary.render()}\n")
        if len(versions := self._engine_versions()) > 1:
            self._tracker.set_tags({"cdr.engine_versions": ", ".join(versions)})
            print(
                "warning: the log-probs of these models were computed by several versions of the "
                f"engine: {', '.join(versions)}.\nSmall margins may come from that; see "
                "logprobs.engine_version.\n"
            )
        print(self._next_steps())

    def _engine_versions(self) -> list[str]:
        """Give the engine versions behind the stored log-probs of the reward's models."""
        models = [engine.name for engine in self._plan.engines]
        rows = self._warehouse.read(LOGPROBS).where(F.col("model_key").isin(models))
        # One row per version.
        return sorted(row[0] for row in rows.select("engine_version").distinct().collect())

    def _next_steps(self) -> str:
        lines = [
            "next:",
            "  SELECT domain, count(*) AS pairs, round(avg(margin), 2) AS margin",
            f"  FROM {self._warehouse.sql_name(PREFERENCES)} "
            # A dataset may hold the pairs of other rewards and selections too.
            f"WHERE run_id = '{self.context.run_id}' GROUP BY domain",
        ]
        if command := self._tracker.ui_command():
            lines += ["", f"  {command}"]
        return "\n".join(lines)
