"""The life of a run that scores candidates: its MLflow run, its waves of routes and log-probs.

`AnnotationRun` (`cdr.annotation`) and `EvaluationRun` (`cdr.evaluation`) differ in what they read
and in what they make of the rewards; this is what they share.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.config import content_hash
from cdr.executors import settle_device
from cdr.job_run import JobRun, count_devices
from cdr.plan import AnnotationPlan
from cdr.progress import Counts
from cdr.redaction import redact
from cdr.routing import RoutingWork
from cdr.runs import RunRecord, StopSignal, new_run_id
from cdr.scoring import Wave, Work
from cdr.sources import input_version
from cdr.stages import Context
from cdr.staging import Staging
from cdr.tables import LOGPROBS, REWARDS, Table
from cdr.tracking import RunTracker, TableVersion
from cdr.verdicts import JudgeCost
from cdr.version_links import VERSION_TAG, link_version
from cdr.warehouse import Warehouse
from cdr.waves import BucketRange, WaveResult
from cdr.weighing import mean_letter_mass

_LETTER_MASS = 0.5
"""Probability of a judge's two letters together below which a run warns."""


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


class ScoringRun(JobRun):
    """One run that scores candidates, used as a context manager.

    Args:
        plan: the checked plan; its `run.device` is settled here.
        warehouse: where the tables are.
        job: its name in `runs` and MLflow.
        reads: what its input is called there.
        config: the resolved config, JSON-able.
        tags: further tags of the MLflow run.
        stop: as for `JobRun`.

    Attributes:
        context: what the stages work with.

    Raises:
        ModelError: vLLM is asked for and cannot be used on this machine.
        SetupError: there are no GPUs, and the CPU is not meant.
    """

    def __init__(
        self,
        plan: AnnotationPlan,
        warehouse: Warehouse,
        *,
        job: str,
        reads: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        stop: StopSignal | None = None,
    ) -> None:
        settled = settle_device(plan.config.run, plan.engines(), warehouse.spark)
        plan = replace(plan, config=plan.config.model_copy(update={"run": settled}))
        self.context = make_context(plan, warehouse)
        engines = {role: model.engine_spec for role, model in plan.reward.models.items()}
        super().__init__(warehouse, self.context.staging, plan.config.run, engines, stop)
        self._plan, self._job, self._reads = plan, job, reads
        self._config, self._tags = config, tags
        self._started = time.monotonic()

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run; None where tracking is off."""
        return self._tracker.run_id

    def _begin(self, stack: contextlib.ExitStack) -> RunRecord:
        plan, context = self._plan, self.context
        source, version = plan.config.input, context.input_version
        keys = {
            f"cdr.model_key.{role}": model.model_key for role, model in plan.reward.models.items()
        }
        tags = {
            "cdr.job": self._job,
            "cdr.dataset": plan.dataset,
            "cdr.reward_name": plan.config.reward.name,
            "cdr.reward_key": plan.reward.key,
            **self._tags,
            **keys,
        }
        if plan.reward_version is not None:
            tags[VERSION_TAG] = plan.reward_version
        self._tracker = stack.enter_context(
            RunTracker(
                plan.config.tracking,
                self._warehouse.root,
                run_name=context.run_id,
                config=self._config,
                tags=tags,
            )
        )
        self._tracker.log_table(TableVersion(self._reads, source.place, version), role="input")
        link_version(self._tracker, plan.reward_version, job=self._job)
        return RunRecord(
            run_id=context.run_id,
            job=self._job,
            dataset=plan.dataset,
            reward_name=plan.config.reward.name,
            reward_key=plan.reward.key,
            config_hash=content_hash(self._config),
            config=json.dumps(redact(self._config), sort_keys=True),
            input_versions={} if version is None else {self._reads: version},
            mlflow_run_id=self._tracker.run_id,
        )

    def routing_waves(self, work: RoutingWork) -> Iterator[BucketRange]:
        """Go through the router's waves with a progress bar, until the end or a stop signal.

        Raises:
            Stopped: a signal came, or the time is up.
        """
        return self._go_through(work.waves, Counts(work.prompts, 0), "routing")

    def routed(self, result: WaveResult) -> None:
        """Note that a wave of routes has been committed."""
        self._note_wave({"routed": result.committed, "routes_failed": result.failed})

    def scoring_waves(self, waves: Sequence[Wave], work: Work) -> Iterator[Wave]:
        """Go through the scoring waves, as `routing_waves` does."""
        prompts = work.missing[work.counted].prompts if waves else 0
        return self._go_through(waves, Counts(prompts, work.tokens), "scoring")

    def scored(self, result: WaveResult) -> None:
        """Note that a wave of log-probs has been committed."""
        self._note_wave({"logprobs_scored": result.committed, "logprobs_failed": result.failed})

    def failures(self) -> DataFrame | None:
        """Read the completions that this run could not score; None when there is none."""
        if not self._counts["logprobs_failed"]:
            return None
        return self.context.staging.read("scored").where("error IS NOT NULL")

    def _log_outputs(self, tables: Sequence[Table]) -> None:
        """Record the tables that the run wrote, at their versions."""
        if self.mlflow_run_id is None:
            return  # a version takes a Spark job to read
        for table in tables:
            written = self._warehouse.version(table)
            if written is not None:
                place = self._warehouse.place(table)
                self._tracker.log_table(TableVersion(table.name, place, written), role="output")

    def _remark_on_models(self, cost: JudgeCost | None = None) -> None:
        """Say at the end what the models' answers cost, and what is doubtful about them."""
        if cost is not None and cost.questions:
            print(cost.render())
        self._warn_of_lost_letters()
        self._warn_of_mixed_versions()

    def _warn_of_lost_letters(self) -> None:
        """Say where a judge's letters are not what it would write."""
        spec = self._plan.reward.spec
        if not spec.is_judge or spec.is_asked_by_api:
            return
        rows = self._warehouse.read(REWARDS).where(F.col("run_id") == self.context.run_id)
        mass = mean_letter_mass(rows)
        if mass is not None and mass < _LETTER_MASS:
            print(
                f"warning: the judge gives its two letters {mass:.1%} of the probability on "
                "average: it would rather write something else.\nIts verdicts are then of little "
                "worth: see its chat template, or take another model.\n"
            )

    def _warn_of_mixed_versions(self) -> None:
        """Say where log-probs of the reward's models were computed by several engine versions."""
        models = [engine.name for engine in self._plan.reward.engines]
        rows = self._warehouse.read(LOGPROBS).where(F.col("model_key").isin(models))
        # One row per version.
        versions = sorted(row[0] for row in rows.select("engine_version").distinct().collect())
        if len(versions) > 1:
            self._tracker.set_tags({"cdr.engine_versions": ", ".join(versions)})
            print(
                "warning: the log-probs of these models were computed by several versions of the "
                f"engine: {', '.join(versions)}.\nSmall margins may come from that; see "
                "logprobs.engine_version.\n"
            )
