"""The life of an evaluation of one reward: its report, its tables, its MLflow run.

`jobs/evaluate.py` holds the recipe; this holds what surrounds it (`cdr.scoring_run`), and
`cdr.evaluation_rows` goes through several rewards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyspark.sql import DataFrame

from cdr.benchmark_plots import draw_report
from cdr.benchmark_report import Report, score_pairs
from cdr.comparison import (
    Comparison,
    Judged,
    audit_router,
    collect_judged,
    compare_judged,
    load_judged,
    render_rows,
)
from cdr.errors import InputError
from cdr.evaluation_config import EvaluateConfig
from cdr.evaluation_plan import EvaluationPlan
from cdr.job_run import Share
from cdr.report.build import report_evaluation
from cdr.report.evaluation import EvaluatedRun
from cdr.reward_config import RewardSpec
from cdr.runs import RunRecord, StopSignal
from cdr.scoring import Work
from cdr.scoring_run import ScoringRun
from cdr.tables import (
    BENCHMARK_PAIRS,
    BENCHMARK_RESULTS,
    LOGPROBS,
    REJECTS,
    REWARDS,
    ROUTES,
    VERDICTS,
)
from cdr.tracking import RunTracker
from cdr.verdicts import JudgeCost
from cdr.version_links import log_evaluation
from cdr.warehouse import Warehouse


@dataclass(frozen=True)
class Evaluated:
    """One reward on the benchmark.

    Args:
        plan: what was asked.
        judged: `JUDGED_COLUMNS`, one row per pair.
        report: what came out.
        record: its row of `runs`, with outcome and counts.
        tracker: its MLflow run, ended by now.
    """

    plan: EvaluationPlan
    judged: Judged
    report: Report
    record: RunRecord
    tracker: RunTracker


class EvaluationRun(ScoringRun):
    """One evaluation, used as a context manager.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.
        stop: tells the job to end; None: a stop signal of the run's own.
    """

    def __init__(
        self, plan: EvaluationPlan, warehouse: Warehouse, stop: StopSignal | None = None
    ) -> None:
        super().__init__(
            plan.annotation,
            warehouse,
            job="evaluate",
            reads="labelled_pairs",
            config=plan.recorded(),
            tags={"cdr.row": plan.name},
            stop=stop,
        )
        self._evaluation = plan

    def finish(self, pairs: DataFrame, work: Work) -> Evaluated:
        """Score the judged pairs, write, print and record it, and decide the exit code.

        Args:
            pairs: from `cdr.labelled_pairs.judge_pairs`.
            work: what was asked of the models.
        """
        plan, config = self._evaluation, self._evaluation.config
        judged = collect_judged(pairs)
        report = score_pairs(
            judged,
            config.sections_in_use(),
            resamples=config.statistics.resamples,
            seed=config.statistics.seed,
        )
        self._write(report)
        shares = [
            Share("pairs", status, float((judged["status"] == status).mean()), limit)
            for status, limit in (
                ("rejected", self._spec.max_rejected_fraction),
                ("failed", self._spec.max_failed_fraction),
            )
        ]
        now, failed = self._counts["logprobs_scored"], self._counts["logprobs_failed"]
        scoring = {
            "logprobs_asked": work.asked,
            "logprobs_scored": now,
            "tokens": work.tokens,
        }
        cost = JudgeCost.read(self.context)
        engines = self._engine_use()
        self._conclude(shares, {**report.counts(), **scoring, **engines.counts(), **cost.counts()})
        spent_s = {
            "scoring_s": self._spent_s["scoring"],
            "wall_s": time.monotonic() - self._started,
        }
        metrics = report.metrics()
        self._tracker.log_summary(
            {**metrics, **scoring, **engines.metrics(), **spent_s, **cost.metrics()}
        )
        log_evaluation(
            self._tracker,
            plan.annotation.reward_version,
            plan.annotation.dataset,
            # What versions are chosen by; the rest is one link away.
            {name: metrics[name] for name in ("accuracy", "ci_low", "ci_high", "counts")},
        )
        title = f"{plan.title} on {plan.annotation.dataset}"
        if self.mlflow_run_id is not None:
            with tempfile.TemporaryDirectory() as folder:
                for file in draw_report(report, title, Path(folder)):
                    self._tracker.log_file(file)
        self._log_outputs(
            (ROUTES, LOGPROBS, VERDICTS, REWARDS, REJECTS, BENCHMARK_PAIRS, BENCHMARK_RESULTS)
        )
        reused = work.asked - now - failed
        asked = "questions" if plan.annotation.reward.spec.is_asked_by_api else "log-probs"
        print(
            f"\n{title}: {report.judged:,} of {report.pairs:,} pairs judged\n"
            f"{asked}: {work.asked:,} asked, {reused:,} were in the store, "
            f"{now:,} scored in {spent_s['scoring_s']:.0f} s, {failed:,} failed\n\n"
            f"{report.render()}\n"
        )
        for warning in report.warnings():
            print(f"warning: {warning}")
        for line in engines.render():
            print(line)
        self._remark_on_models(cost)
        if command := self._tracker.ui_command():
            print(f"figures: {command}")
        record = replace(
            self._log.record, outcome=self._outcome, error=self._problem, counts=self._counts
        )
        return Evaluated(plan, judged, report, record, self._tracker)

    def _write(self, report: Report) -> None:
        plan = self._plan
        stamps = {
            "dataset": plan.dataset,
            "reward_key": plan.reward.key,
            "reward_name": plan.config.reward.name,
            "run_id": self.context.run_id,
        }
        names = BENCHMARK_RESULTS.names()
        rows = [{**score.as_row(), **stamps} for score in report.scores]
        frame = self._warehouse.spark.createDataFrame(
            [tuple(row[name] for name in names) for row in rows], BENCHMARK_RESULTS.schema()
        )
        self._warehouse.replace(
            BENCHMARK_RESULTS, frame, dataset=plan.dataset, reward_key=plan.reward.key
        )


def compare_evaluated(a: Evaluated, b: Evaluated) -> Comparison | None:
    """Compare two rewards of one job pair by pair; None where no pair was judged by both."""
    try:
        return _compare(a.judged, b.judged, (a.plan.title, b.plan.title), a.plan.config)
    except InputError:
        return None


def compare_stored(
    a: str, b: str, dataset: str, config: EvaluateConfig, warehouse: Warehouse
) -> Comparison:
    """Compare two rewards by the pairs that earlier runs stored, and keep it in MLflow.

    Args:
        a: name of a reward or row, or the beginning of a reward key.
        b: the other one, likewise.
        dataset: name of the benchmark, or of the sample of it, in the tables.
        config: has the sections and the draws.
        warehouse: where the tables are.

    Raises:
        InputError: one of them has not been evaluated on this benchmark.
    """
    judged = [load_judged(warehouse, dataset, reward) for reward in (a, b)]
    found = _compare(judged[0], judged[1], (a, b), config)
    record_comparison(found, dataset, config, warehouse)
    return found


def _compare(a: Judged, b: Judged, names: tuple[str, str], config: EvaluateConfig) -> Comparison:
    return compare_judged(
        a,
        b,
        names,
        sections=config.sections_in_use(),
        resamples=config.statistics.resamples,
        seed=config.statistics.seed,
    )


def record_comparison(
    found: Comparison, dataset: str, config: EvaluateConfig, warehouse: Warehouse
) -> None:
    """Keep a comparison as an MLflow run of its own, beside those of the rewards."""
    a, b = found.names
    with RunTracker(
        config.tracking,
        warehouse.root,
        run_name=f"{a} against {b}",
        config={"a": a, "b": b, "dataset": dataset, "statistics": config.statistics.model_dump()},
        tags={"cdr.job": "compare", "cdr.dataset": dataset},
    ) as tracker:
        tracker.log_summary(found.metrics())


def summarize_rows(done: list[Evaluated]) -> tuple[str, list[Comparison]]:
    """Write what several rewards of one job say together: table, differences, router audits.

    Args:
        done: the evaluated rows, in order; at least one.

    Returns:
        The text, and the differences in it: each row's from the first, a router's from its oracle.
        None is there of two rows that judged no pair both.
    """
    blocks: list[str] = []
    comparisons: list[Comparison] = []
    if len(done) > 1:
        first = done[0].plan
        rows = [(row.plan.title, row.report, row.plan.printed) for row in done]
        blocks.append(render_rows(rows, first.config.sections_in_use()))
        for row in done[1:]:
            found = compare_evaluated(done[0], row)
            if found is None:
                titles = f"{first.title} and {row.plan.title}"
                blocks.append(f"{titles}: not compared, as no pair was judged by both")
            else:
                comparisons.append(found)
                blocks.append(found.render())
    for row in done:
        if row.plan.annotation.config.reward.routing.mode == "adaptive":
            oracle = _oracle_of(row, done)
            lost = None if oracle is None else compare_evaluated(row, oracle)
            if lost is not None and row is not done[0] and oracle is not done[0]:  # kept above
                comparisons.append(lost)
            blocks.append(audit_router(row.judged, row.report, row.plan.oracle, lost))
    return "\n\n".join(blocks), comparisons


def report_rows(done: Sequence[Evaluated], warehouse: Warehouse) -> str | None:
    """Build the page of several rewards of one job, side by side, and keep it with each MLflow run.

    Args:
        done: the evaluated rows, in order; at least one.
        warehouse: where their tables are.

    Returns:
        Where the page is; None without one: it is switched off, or a warning says why.
    """
    if not done[0].plan.config.report.enabled:
        return None

    def keep(page: str) -> None:
        for row in done:
            row.tracker.log_page(page, "report.html")

    runs = [
        EvaluatedRun(
            row.record, row.plan.own_config(), row.judged, row.report, row.plan.annotation.reward
        )
        for row in done
    ]
    return report_evaluation(runs, warehouse, ui_command=done[0].tracker.ui_command(), keep=keep)


def _oracle_of(router: Evaluated, done: list[Evaluated]) -> Evaluated | None:
    """Find the row that is a router's reward with the true domains in the router's place."""

    def rest(reward: RewardSpec) -> object:
        # The router's model, threshold and fallback are not used with a column.
        return reward.model_dump(mode="json", exclude={"name", "description", "routing"})

    wanted = rest(router.plan.annotation.config.reward)
    return next(
        (
            row
            for row in done
            if row.plan.annotation.config.reward.routing.mode == "column"
            and rest(row.plan.annotation.config.reward) == wanted
            and row.plan.oracle == router.plan.oracle
        ),
        None,
    )
