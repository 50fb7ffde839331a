"""Two rewards on one benchmark by their stored pairs; a router and its oracle; rows of a table.

Compared are the pairs that both rewards judged. Differences are B − A, weighted as the scores are,
with a paired bootstrap interval; McNemar's exact test counts the pairs that only one of them wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.accuracy import Difference, PairedTally, compare_accuracies
from cdr.benchmark_report import (
    ALL_PAIRS,
    JUDGED_COLUMNS,
    MEAN_OF_SECTIONS,
    Report,
    show_percent,
)
from cdr.errors import InputError
from cdr.rewardbench import PRIOR_SETS, mean_of_sections, weigh_subsets
from cdr.tables import BENCHMARK_PAIRS
from cdr.text_table import render_table
from cdr.warehouse import Warehouse

Judged = pd.DataFrame


def load_judged(warehouse: Warehouse, dataset: str, reward: str) -> Judged:
    """Read the stored pairs of one reward.

    Args:
        warehouse: where the tables are.
        dataset: the benchmark's name.
        reward: name of the reward or row, its latest evaluation; or the beginning of a reward key.

    Returns:
        `JUDGED_COLUMNS`, one row per pair.

    Raises:
        InputError: the reward has not been evaluated on this benchmark.
    """
    rows = warehouse.read(BENCHMARK_PAIRS).where(F.col("dataset") == dataset)
    # One row per evaluation.
    known = rows.groupBy("reward_key", "reward_name").agg(F.max("run_id").alias("run_id")).collect()
    fits = [row for row in known if reward == row["reward_name"]] or [
        row for row in known if row["reward_key"].startswith(reward)
    ]
    if not fits:
        names = ", ".join(sorted({row["reward_name"] for row in known})) or "none"
        raise InputError(
            f"no stored pairs of a reward '{reward}' on the benchmark '{dataset}'",
            where=warehouse.place(BENCHMARK_PAIRS),
            fix=f"evaluate it first; evaluated here: {names}",
        )
    latest = max(fits, key=lambda row: row["run_id"])
    # A benchmark has thousands of pairs; their texts are not read.
    return collect_judged(rows.where(F.col("reward_key") == latest["reward_key"]))


def collect_judged(rows: DataFrame) -> Judged:
    """Bring judged pairs to the driver, numbers and names only, in the order of their ids."""
    found: Judged = rows.select(*JUDGED_COLUMNS).toPandas()
    return found.sort_values("prompt_id", ignore_index=True)


@dataclass(frozen=True)
class Comparison:
    """Two rewards on the pairs that both judged.

    Args:
        names: of A and B.
        differences: by section, then over the sections; B − A.
        unpaired: pairs that only one of them judged.
    """

    names: tuple[str, str]
    differences: Mapping[str, Difference]
    unpaired: int

    def metrics(self) -> dict[str, object]:
        """Give every number by section and mean, for MLflow; accuracies 0 to 1."""
        return {
            "difference": {name: found.value for name, found in self.differences.items()},
            "difference_ci_low": {n: found.interval[0] for n, found in self.differences.items()},
            "difference_ci_high": {n: found.interval[1] for n, found in self.differences.items()},
            "mcnemar_p": {name: found.p for name, found in self.differences.items()},
            "only_a": {name: found.paired.only_a for name, found in self.differences.items()},
            "only_b": {name: found.paired.only_b for name, found in self.differences.items()},
            "pairs": {name: found.paired.total for name, found in self.differences.items()},
            "unpaired": self.unpaired,
        }

    def render(self) -> str:
        """Write the numbers for a terminal; in percent, McNemar's p aside."""
        header = (
            "B − A, points", "pairs", "A", "B", "B − A", "95 % CI", "only A", "only B", "McNemar p"
        )  # fmt: skip
        rows = [
            (
                name,
                found.paired.total,
                show_percent(found.a),
                show_percent(found.b),
                f"{100 * found.value:+.1f}",
                " to ".join(f"{100 * end:+.1f}" for end in found.interval),
                found.paired.only_a,
                found.paired.only_b,
                f"{found.p:.3g}",
            )
            for name, found in self.differences.items()
        ]
        lines = [f"A = {self.names[0]}", f"B = {self.names[1]}", *render_table(header, rows)]
        if self.unpaired:
            lines.append(f"not compared, as only one reward has a verdict: {self.unpaired:,}")
        return "\n".join(lines)


def compare_judged(
    a: Judged, b: Judged, names: tuple[str, str], *, sections: Sequence[str], resamples: int,
    seed: int,
) -> Comparison:  # fmt: skip
    """Compare two rewards pair by pair.

    Args:
        a: `JUDGED_COLUMNS` of the first, one row per pair of the benchmark.
        b: the same of the second.
        names: of both.
        sections: the benchmark's, in order.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        InputError: no pair has a verdict by both.
    """
    ok_a, ok_b = (rows[rows["status"] == "ok"] for rows in (a, b))
    both = ok_a.merge(ok_b[["prompt_id", "margin"]], on="prompt_id", suffixes=("_a", "_b"))
    if both.empty:
        raise InputError(
            f"no pair was judged by both '{names[0]}' and '{names[1]}'",
            fix="evaluate both on the same pairs",
        )
    parts: dict[str, list[tuple[PairedTally, float]]] = {}
    for section in sections:
        rows = both[both["section"] == section]
        tallies = {str(n): _tally(group) for n, group in rows.groupby("subset", sort=True)}
        weights = weigh_subsets(section, {name: t.total for name, t in tallies.items()})
        parts[section] = [(tally, weights[name]) for name, tally in tallies.items()]
    groups = {section: found for section, found in parts.items() if found}
    overall = mean_of_sections(parts, [s for s in sections if s != PRIOR_SETS])
    if overall is not None:
        groups[MEAN_OF_SECTIONS] = overall
    groups[ALL_PAIRS] = [(_tally(both), 1.0)]
    return Comparison(
        names,
        {
            name: compare_accuracies(found, resamples=resamples, seed=seed)
            for name, found in groups.items()
        },
        len(ok_a) + len(ok_b) - 2 * len(both),
    )


def _tally(rows: pd.DataFrame) -> PairedTally:
    return PairedTally.of((rows["margin_a"] > 0).to_numpy(), (rows["margin_b"] > 0).to_numpy())


def audit_router(
    router: Judged, report: Report, oracle: Mapping[str, str], lost: Comparison | None
) -> str:
    """Say how often the router chose a section's domain, and what its mistakes cost.

    Args:
        router: `JUDGED_COLUMNS` of the reward with its router.
        report: of the same.
        oracle: the right domain by section.
        lost: the router (A) against the true domains in its place (B); None: not evaluated.
    """
    ok = router[router["status"] == "ok"]
    known = ok[ok["section"].isin(list(oracle))]
    right = known["domain"] == known["section"].map(dict(oracle))
    rows: list[tuple[object, ...]] = []
    for section, row in report.routed.items():
        domain = oracle.get(section)
        total = sum(row.values())
        others = ", ".join(f"{name} {count:,}" for name, count in row.items() if name != domain)
        share = show_percent(row.get(domain, 0) / total) if domain else None
        rows.append((section, domain, share, others or "0"))
    rows.append(("all", "", show_percent(float(right.mean())) if len(known) else None, ""))
    header = ("section", "right domain", "routed there", "routed elsewhere")
    lines = ["router audit", *render_table(header, rows)]
    if lost is None:
        lines.append("what its mistakes cost: run with --audit-router")
        return "\n".join(lines)
    return "\n".join([*lines, "", "accuracy lost against the oracle:", lost.render()])


def render_rows(
    rows: Sequence[tuple[str, Report, Mapping[str, float]]], sections: Sequence[str]
) -> str:
    """Write a table of rows, in percent; published scores stand in brackets.

    Args:
        rows: title, report, and published scores by section and `Overall`.
        sections: the columns; those that no row has are left out.
    """
    shown = [s for s in sections if any(_at(report, s) is not None for _, report, _ in rows)]
    columns = [*shown, "Overall"]
    has_printed = any(printed for _, _, printed in rows)

    def cell(report: Report, printed: Mapping[str, float], column: str) -> str | None:
        share = show_percent(_at(report, column))
        if not has_printed:
            return share
        return f"{share or '-'} ({f'{printed[column]:.1f}' if column in printed else '-'})"

    lines = render_table(
        ("row", *columns),
        [(title, *[cell(report, p, name) for name in columns]) for title, report, p in rows],
    )
    lines.append("Overall is the mean of sections; -: absent")
    if has_printed:
        lines.append("in brackets: as published")
    return "\n".join(lines)


def _at(report: Report, column: str) -> float | None:
    score = (
        report.get("overall", MEAN_OF_SECTIONS)
        if column == "Overall"
        else report.get("section", column)
    )
    return None if score is None else score.accuracy
