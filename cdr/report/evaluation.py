"""What the page of an evaluation shows: one reward or several, side by side, on one benchmark.

    benchmark_pairs ─► EvaluatedRun (numbers) ─► gather_evaluation (pairs to read) ─► EvaluationData

Numbers come from judged pairs, which are on the driver anyway (`cdr.comparison`); texts and
log-probs of a few dozen pairs are read from the tables. The values are plain, so that a page can be
rendered, and tested, without Spark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from pyspark.sql import functions as F

from cdr.accuracy import Floats
from cdr.benchmark_report import Report
from cdr.comparison import Comparison, Judged, compare_judged
from cdr.errors import InputError
from cdr.evaluation_config import EvaluateConfig
from cdr.evaluation_plan import CHOSEN, REJECTED
from cdr.plan import RewardPlan
from cdr.report.pairs import PairIds, ShownPair, read_pairs
from cdr.report.plots import Histogram
from cdr.reward_config import RewardSpec
from cdr.runs import RunRecord
from cdr.tables import BENCHMARK_PAIRS, REWARDS
from cdr.warehouse import Warehouse

MAX_ROWS_READ = 4
"""Rows whose pairs a page quotes; a further one's stand on a page of its own."""

_BINS = 20


@dataclass(frozen=True)
class EvaluatedRun:
    """One reward on the benchmark, as a run left it.

    Args:
        record: its row of `runs`, with outcome and counts.
        config: the config of this row alone.
        judged: `JUDGED_COLUMNS`, one row per pair.
        report: what came out.
        plan: for the tokenizers; None where the models are not on this machine.
    """

    record: RunRecord
    config: EvaluateConfig
    judged: Judged
    report: Report
    plan: RewardPlan | None


@dataclass(frozen=True)
class Margins:
    """How large the margins of won and of lost pairs are; without sign, in the reward's unit.

    Args:
        won: |margin| of pairs won.
        lost: |margin| of pairs lost, in the same bins; ties are in neither.
        won_median: None without any.
        lost_median: likewise.
        surest_won: share of wins among the half of the pairs with the larger |margin|.
    """

    won: Histogram
    lost: Histogram
    won_median: float | None
    lost_median: float | None
    surest_won: float


@dataclass(frozen=True)
class SurestPairs:
    """The pairs of a section with the largest margins either way, the surest first."""

    wins: tuple[ShownPair, ...]
    losses: tuple[ShownPair, ...]


@dataclass(frozen=True)
class EvaluatedRow:
    """One reward on the page.

    Args:
        title: how the page names it, unique.
        run: its run.
        config: of this row alone.
        report: what came out.
        margins: by section; those without a verdict are left out.
        pairs: to read, by section; None: the page quotes none of this row (`MAX_ROWS_READ`).
        engine_versions: of the engines behind the pairs that are quoted.
        tokens_missing: why answers are not shown token by token; None where they are.
    """

    title: str
    run: RunRecord
    config: EvaluateConfig
    report: Report
    margins: Mapping[str, Margins]
    pairs: Mapping[str, SurestPairs] | None
    engine_versions: tuple[str, ...] = ()
    tokens_missing: str | None = None

    @property
    def reward(self) -> RewardSpec:
        """The reward."""
        return self.config.reward

    @property
    def printed(self) -> Mapping[str, float]:
        """Published scores in percent by section and `Overall`; empty without any."""
        row = self.config.rows.get(self.reward.name)
        return row.printed if row else {}

    @property
    def right_routes(self) -> tuple[int, int]:
        """Pairs judged that have the right domain of their section, of those that can have one."""
        right = total = 0
        for section, domains in self.report.routed.items():
            if (wanted := self.config.oracle.get(section)) is not None:
                right += domains.get(wanted, 0)
                total += sum(domains.values())
        return right, total


@dataclass(frozen=True)
class EvaluationData:
    """All that a page shows.

    Args:
        rows: the rewards, in order; at least one.
        comparisons: of each further row with the first, pair by pair; absent where no pair was
            judged by both.
        rebuild: the command that builds this page again.
        benchmark_pairs: what stands behind FROM in a query over it.
        rewards: likewise.
        ui_command: the command that shows the MLflow runs; None for none.
    """

    rows: tuple[EvaluatedRow, ...]
    comparisons: tuple[Comparison, ...]
    rebuild: str
    benchmark_pairs: str
    rewards: str
    ui_command: str | None = None

    @property
    def dataset(self) -> str:
        """The benchmark, or the sample of it."""
        return self.rows[0].run.dataset

    @property
    def sections(self) -> tuple[str, ...]:
        """The benchmark's sections that any row has pairs of, judged or not."""
        found = [score for row in self.rows for score in row.report.at("section")]
        return tuple(dict.fromkeys(s.name for s in found if s.tally.total or s.left_out))


def gather_evaluation(
    runs: Sequence[EvaluatedRun],
    warehouse: Warehouse,
    *,
    rebuild: str,
    ui_command: str | None = None,
) -> EvaluationData:
    """Read all that a page shows.

    Args:
        runs: the rewards, in order; at least one; all on one benchmark.
        warehouse: where `rewards` and `logprobs` are.
        rebuild: the command that builds the page again.
        ui_command: the command that shows the MLflow runs.
    """
    titles = _titles(runs)
    rows = [
        _read_row(title, run, warehouse, is_read=place < MAX_ROWS_READ)
        for place, (title, run) in enumerate(zip(titles, runs, strict=True))
    ]
    others = zip(titles[1:], runs[1:], strict=True)
    comparisons = [_compare(runs[0], run, (titles[0], title)) for title, run in others]
    return EvaluationData(
        rows=tuple(rows),
        comparisons=tuple(found for found in comparisons if found is not None),
        rebuild=rebuild,
        benchmark_pairs=warehouse.sql_name(BENCHMARK_PAIRS),
        rewards=warehouse.sql_name(REWARDS),
        ui_command=ui_command,
    )


def measure_margins(judged: Judged, sections: Sequence[str]) -> dict[str, Margins]:
    """Give the margins of won and of lost pairs by section; all sections have the same bins.

    Args:
        judged: `JUDGED_COLUMNS`, one row per pair.
        sections: in order; those without a pair judged are left out.
    """
    ok = judged[judged["status"] == "ok"]
    margins = ok["margin"].astype("float64")
    if margins.empty:
        return {}
    # The middle of it: the outermost bin holds what lies beyond.
    high = 1.5 * float(np.quantile(margins.abs(), 0.95)) or 1.0
    return {
        section: _measure(group, high)
        for section in sections
        if len(group := np.asarray(margins[ok["section"] == section], dtype=np.float64))
    }


def _measure(margins: Floats, high: float) -> Margins:
    won, lost = margins[margins > 0], -margins[margins < 0]

    def count(sizes: Floats) -> Histogram:
        counts, _ = np.histogram(np.minimum(sizes, high), bins=_BINS, range=(0.0, high))
        return Histogram(0.0, high, tuple(int(n) for n in counts))

    surest = margins[np.argsort(-np.abs(margins), kind="stable")][: -(-len(margins) // 2)]
    return Margins(
        won=count(won),
        lost=count(lost),
        won_median=float(np.median(won)) if len(won) else None,
        lost_median=float(np.median(lost)) if len(lost) else None,
        surest_won=float((surest > 0).mean()),
    )


def _titles(runs: Sequence[EvaluatedRun]) -> list[str]:
    titles = []
    for run in runs:
        row = run.config.rows.get(run.config.reward.name)
        titles.append((row.title if row else "") or run.config.reward.name)
    times = Counter(titles)
    return [
        title if times[title] == 1 else f"{title} ({run.record.run_id})"
        for title, run in zip(titles, runs, strict=True)
    ]


def _read_row(
    title: str, run: EvaluatedRun, warehouse: Warehouse, *, is_read: bool
) -> EvaluatedRow:
    row = EvaluatedRow(
        title=title,
        run=run.record,
        config=run.config,
        report=run.report,
        margins=measure_margins(run.judged, list(run.report.length)),
        pairs=None,
    )
    if not is_read:
        return row
    number = run.config.report.pairs_per_section
    wanted = {
        section: (_surest(rows, number), _surest(rows, number, wins=False))
        for section in run.report.length
        if not (rows := _ok(run.judged, section)).empty
    }
    # Whichever run wrote them last: under one key they are the same.
    rewards = warehouse.read(REWARDS).where(
        (F.col("dataset") == run.record.dataset) & (F.col("reward_key") == run.record.reward_key)
    )
    read = read_pairs(
        [ids for sides in wanted.values() for side in sides for ids in side],
        rewards, warehouse, run.config.reward, run.plan, has_texts=run.config.report.texts,
    )  # fmt: skip
    pairs = {
        section: SurestPairs(*(tuple(read.pairs[ids] for ids in side) for side in sides))
        for section, sides in wanted.items()
    }
    return replace(
        row,
        pairs=pairs,
        engine_versions=read.engine_versions,
        tokens_missing=read.tokens_missing,
    )


def _ok(judged: Judged, section: str) -> Judged:
    return judged[(judged["status"] == "ok") & (judged["section"] == section)]


def _surest(rows: Judged, number: int, *, wins: bool = True) -> list[PairIds]:
    """Name the pairs with the largest margins: wins, or losses."""
    margins = rows["margin"].astype("float64")
    found: pd.DataFrame = rows[margins > 0 if wins else margins < 0]
    # Judged pairs are in the order of their ids, so the same ones come every time.
    ordered = found.sort_values("margin", ascending=not wins, kind="stable")
    return [(str(name), CHOSEN, REJECTED) for name in ordered["prompt_id"].head(number)]


def _compare(a: EvaluatedRun, b: EvaluatedRun, names: tuple[str, str]) -> Comparison | None:
    try:
        return compare_judged(
            a.judged,
            b.judged,
            names,
            sections=a.config.sections_in_use(),
            resamples=a.config.statistics.resamples,
            seed=a.config.statistics.seed,
        )
    except InputError:  # no pair was judged by both
        return None
