"""The life of an annotate run: what it is recorded as, its MLflow run, its summary.

`jobs/annotate.py` holds the recipe; this holds what surrounds it (`cdr.scoring_run`).
"""

from __future__ import annotations

import dataclasses
import time

from pyspark.sql import DataFrame

from cdr.job_run import Share
from cdr.plan import AnnotationPlan
from cdr.report.annotation_gather import RunRows
from cdr.report.build import report_run
from cdr.scoring import Work
from cdr.scoring_run import ScoringRun
from cdr.summary import Summary, summarize
from cdr.tables import LOGPROBS, PREFERENCES, REJECTS, REWARDS, ROUTES, UNPAIRED, VERDICTS
from cdr.verdicts import JudgeCost
from cdr.warehouse import Warehouse


class AnnotationRun(ScoringRun):
    """One annotate run, used as a context manager.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.
    """

    def __init__(self, plan: AnnotationPlan, warehouse: Warehouse) -> None:
        super().__init__(
            plan,
            warehouse,
            job="annotate",
            reads="completions",
            config=plan.config.model_dump(mode="json"),
            tags={"cdr.selection_key": plan.selection_key},
        )

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
            scored=self._counts["logprobs_scored"],
            tokens=work.tokens,
            scoring_s=self._spent_s["scoring"],
            engines=self._engine_use(),
            wall_s=time.monotonic() - self._started,
        )
        limits = self._spec
        shares = (
            Share(
                "candidates", "rejected", summary.rejected_fraction, limits.max_rejected_fraction
            ),
            Share("candidates", "failed", summary.failed_fraction, limits.max_failed_fraction),
        )
        cost = JudgeCost.read(self.context)
        self._conclude(shares, {**summary.counts(), **cost.counts()})
        self._tracker.log_summary({**summary.metrics(), **cost.metrics()})
        self._log_outputs((ROUTES, LOGPROBS, VERDICTS, REWARDS, REJECTS, PREFERENCES, UNPAIRED))
        print(f"\n{summary.render()}\n")
        self._remark_on_models(cost)
        print(self._next_steps(self._report(rewards, rejects, pairs, summary)))

    def _report(
        self, rewards: DataFrame, rejects: DataFrame, pairs: DataFrame, summary: Summary
    ) -> str | None:
        """Build the report page; give its place, or None."""
        if not self._plan.config.report.enabled:
            return None
        record = dataclasses.replace(
            self._log.record,
            outcome=self._outcome,
            error=self._problem,
            counts=self._counts,
        )
        return report_run(
            RunRows(rewards, pairs, rejects),
            self._warehouse,
            self._plan,
            record,
            summary,
            ui_command=self._tracker.ui_command(),
            keep=lambda page: self._tracker.log_page(page, "report.html"),
        )

    def _next_steps(self, report: str | None) -> str:
        lines = [f"report: {report}", ""] if report else []
        lines += [
            "next:",
            "  SELECT domain, count(*) AS pairs, round(avg(margin), 2) AS margin",
            f"  FROM {self._warehouse.sql_name(PREFERENCES)} "
            # A dataset may hold the pairs of other rewards and selections too.
            f"WHERE run_id = '{self.context.run_id}' GROUP BY domain",
        ]
        if command := self._tracker.ui_command():
            lines += ["", f"  {command}"]
        return "\n".join(lines)
