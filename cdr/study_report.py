"""What a strong-over-weak study found: accuracy per pair of models, and what the gap says of it.

A cell is one ordered pair of models. Its accuracy is that of log p_numerator − log p_denominator on
the labelled pairs; its gap is the difference of their alignment scores. A model over itself gives 0
to everything: such a cell is null.

Gap and accuracy are correlated over the cells (Pearson). Cells share models and are no independent
points, so the interval is a bootstrap over models: they are drawn anew, with every cell between
them. And a cell is the mirror image of its reverse (gap and accuracy − ½ change their signs, ties
aside), which alone pulls the points onto a line; so the same is also told for positive gaps only,
the pairs that the method is about.

Pure: tallies in, numbers and text out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdr.accuracy import Interval, Stratum, Tally, accuracy_interval, weighted_accuracy
from cdr.benchmark_report import ALL_PAIRS, MEAN_OF_SECTIONS
from cdr.rewardbench import PRIOR_SETS, mean_of_sections, weigh_subsets
from cdr.study_config import StudyConfig
from cdr.text_table import render_table

MIN_CELLS: Final = 3
"""Fewer points than this always lie on a line."""

Matrix = NDArray[np.float64]


class CellTally(NamedTuple):
    """Verdicts of one cell on one subset."""

    numerator: str
    denominator: str
    section: str
    subset: str
    tally: Tally


@dataclass(frozen=True)
class CellScore:
    """One accuracy of one cell.

    Args:
        accuracy: 0 to 1.
        interval: 95 %: Wilson's for one subset, a stratified bootstrap's for more.
        tally: its labelled pairs, unweighted.
    """

    accuracy: float
    interval: Interval
    tally: Tally


@dataclass(frozen=True)
class Cell:
    """One ordered pair of models.

    Args:
        numerator: name of the model whose log-probs count.
        denominator: name of the model whose log-probs are taken off.
        gap: score of numerator − score of denominator.
        overall: over the sections, or all labelled pairs; None: a model over itself, or no pairs.
        sections: by section; one without labelled pairs is left out.
    """

    numerator: str
    denominator: str
    gap: float
    overall: CellScore | None
    sections: Mapping[str, CellScore]


@dataclass(frozen=True)
class Correlation:
    """How gap and accuracy go together.

    Args:
        r: Pearson's, −1 to 1.
        interval: 95 % percentile bootstrap over models; None where too few draws have one.
        cells: points.
    """

    r: float
    interval: Interval | None
    cells: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.r:+.2f} ({self.cells} pairs of models)"
        low, high = self.interval
        return f"{self.r:+.2f} (95 % CI {low:+.2f} to {high:+.2f}; {self.cells} pairs of models)"


@dataclass(frozen=True)
class StudyReport:
    """All that one study found.

    Args:
        config: what was asked.
        cells: those of `StudyConfig.cell_names`, in their order.
        overall: what the overall accuracy is: `mean of sections` or `all pairs`.
        correlation: of gap and accuracy over all cells; None where there are too few, or nothing
            varies.
        correlation_positive: the same over cells with a gap above 0.
        left_out: labelled pairs by reason.
    """

    config: StudyConfig
    cells: tuple[Cell, ...]
    overall: str
    correlation: Correlation | None
    correlation_positive: Correlation | None
    left_out: Mapping[str, int]

    @property
    def judged(self) -> int:
        """Labelled pairs with a verdict: the same ones in every cell."""
        return max((c.overall.tally.total for c in self.cells if c.overall), default=0)

    @property
    def pairs(self) -> int:
        """Labelled pairs, left out or not."""
        return self.judged + sum(self.left_out.values())

    def accuracies(self) -> dict[tuple[str, str], float]:
        """Give the accuracy by (numerator, denominator); nulls are left out."""
        return {
            (cell.numerator, cell.denominator): cell.overall.accuracy
            for cell in self.cells
            if cell.overall is not None
        }

    def counts(self) -> dict[str, int]:
        """Give every count by name, for `runs`."""
        return {
            "pairs": self.pairs,
            "judged": self.judged,
            "models": len({name for c in self.cells for name in (c.numerator, c.denominator)}),
            "cells": len(self.cells),
            "cells_null": sum(cell.overall is None for cell in self.cells),
            **{f"left_out.{reason}": count for reason, count in self.left_out.items()},
        }

    def metrics(self) -> dict[str, Any]:
        """Give every number by name, for MLflow."""
        found: dict[str, Any] = {
            "accuracy": {
                f"{one} over {other}": accuracy
                for (one, other), accuracy in self.accuracies().items()
            },
            **self.counts(),
        }
        for name, value in (
            ("correlation", self.correlation),
            ("correlation_positive_gap", self.correlation_positive),
        ):
            if value is not None:
                low, high = value.interval or (None, None)
                found[name] = {"r": value.r, "ci_low": low, "ci_high": high}
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Give the columns of `study_pairs` that the cells decide."""
        models = self.config.models
        return [
            {
                "numerator": cell.numerator,
                "denominator": cell.denominator,
                "numerator_score": models[cell.numerator].score,
                "denominator_score": models[cell.denominator].score,
                "gap": cell.gap,
                "overall": self.overall,
                **_columns(cell.overall),
                "sections": {name: _columns(score) for name, score in cell.sections.items()}
                or None,
            }
            for cell in self.cells
        ]

    def render(self) -> str:
        """Write the numbers for a terminal; accuracies in percent."""
        name = self.config.score_name
        blocks = [self._matrix(), self._list()]
        for title, value in (
            (f"correlation of gap ({name}) and accuracy", self.correlation),
            ("the same where the gap is positive", self.correlation_positive),
        ):
            blocks.append([f"{title}: {value if value else '-'}"])
        blocks[-1].append("intervals: a bootstrap over models, as pairs of models share them")
        if self.left_out:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.items())
            blocks.append([f"left out of every cell: {reasons}"])
        return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)

    def axes(self) -> tuple[list[str], list[str]]:
        """Name the rows (numerators) and columns (denominators) of the matrix, in their order."""
        numerators = {cell.numerator for cell in self.cells}
        denominators = {cell.denominator for cell in self.cells}
        return (
            [name for name in self.config.models if name in numerators],
            [name for name in self.config.models if name in denominators],
        )

    def _matrix(self) -> list[str]:
        numerators, denominators = self.axes()
        accuracies, title = self.accuracies(), self.config.title_of
        wide = max((len(title(name)) for name in numerators), default=0) + 2
        width = max(7, *(len(title(name)) + 2 for name in denominators))
        lines = [f"accuracy, % ({self.overall}); rows: numerator, columns: denominator"]
        lines.append(" " * wide + "".join(f"{title(name):>{width}}" for name in denominators))
        for one in numerators:
            cells = (_percent(accuracies.get((one, other))) for other in denominators)
            lines.append(f"{title(one):<{wide}}" + "".join(f"{cell:>{width}}" for cell in cells))
        return lines

    def _list(self) -> list[str]:
        # The reverse of each is its mirror image, and stands in the matrix.
        shown = sorted(
            (cell for cell in self.cells if cell.overall is not None and cell.gap > 0),
            key=lambda cell: -cell.gap,
        )
        sections = [name for name in self.config.sections if any(name in c.sections for c in shown)]
        rows = []
        for cell in shown:
            score = cell.overall
            assert score is not None
            rows.append(
                (
                    self.config.title_of(cell.numerator),
                    self.config.title_of(cell.denominator),
                    f"{cell.gap:+g}",
                    _percent(score.accuracy),
                    _range(score.interval),
                    score.tally.ties,
                    *(_percent(_accuracy(cell.sections.get(name))) for name in sections),
                )
            )
        header = ("numerator", "denominator", "gap", "accuracy", "95 % CI", "ties", *sections)
        return ["strong over weak, widest gap first", *render_table(header, rows)]


def make_report(
    config: StudyConfig,
    sections: Sequence[str],
    tallies: Iterable[CellTally],
    left_out: Mapping[str, int],
) -> StudyReport:
    """Make accuracies of tallies, and correlate them with the gaps.

    Args:
        config: the study.
        sections: those of the benchmark, in order.
        tallies: one per cell and subset, with at least one labelled pair each; none for a model
            over itself.
        left_out: labelled pairs by reason.
    """
    by_cell: dict[tuple[str, str], list[CellTally]] = defaultdict(list)
    for tally in tallies:
        by_cell[tally.numerator, tally.denominator].append(tally)
    present = {tally.section for found in by_cell.values() for tally in found}
    wanted = [section for section in sections if section != PRIOR_SETS]
    overall = MEAN_OF_SECTIONS if present.issuperset(wanted) else ALL_PAIRS
    cells = tuple(
        _make_cell(config, one, other, by_cell.get((one, other), []), sections, overall)
        for one, other in config.cell_names()
    )
    names = list(config.models)
    gaps, accuracies = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    for cell in cells:
        if cell.overall is not None:
            place = names.index(cell.numerator), names.index(cell.denominator)
            gaps[place], accuracies[place] = cell.gap, cell.overall.accuracy
    statistics = config.statistics
    draws = {"resamples": statistics.resamples, "seed": statistics.seed}
    positive = np.where(gaps > 0, accuracies, np.nan)
    return StudyReport(
        config=config,
        cells=cells,
        overall=overall,
        correlation=correlate(gaps, accuracies, **draws),
        correlation_positive=correlate(gaps, positive, **draws),
        left_out=left_out,
    )


def correlate(gaps: Matrix, accuracies: Matrix, *, resamples: int, seed: int) -> Correlation | None:
    """Correlate gap and accuracy over pairs of models.

    Args:
        gaps: [models, models], numerators in rows.
        accuracies: likewise; NaN where there is no cell.
        resamples: draws of models, each with as many as there are; a draw with fewer than
            `MIN_CELLS` different cells, or in which nothing varies, does not count.
        seed: of the draws.

    Returns:
        None with fewer than `MIN_CELLS` cells, or where nothing varies.
    """
    present = ~np.isnan(accuracies)
    r = float(_pearson(gaps[None], accuracies[None])[0])
    if present.sum() < MIN_CELLS or np.isnan(r):
        return None
    models = len(gaps)
    drawn = np.random.default_rng(seed).integers(models, size=(resamples, models))
    rows, columns = drawn[:, :, None], drawn[:, None, :]
    again = _pearson(gaps[rows, columns], accuracies[rows, columns])
    counts = np.array([present[np.ix_(found, found)].sum() for found in map(np.unique, drawn)])
    again = again[(counts >= MIN_CELLS) & ~np.isnan(again)]
    interval = None
    if again.size >= resamples / 2:
        low, high = np.quantile(again, (0.025, 0.975))
        interval = (float(low), float(high))
    return Correlation(r, interval, int(present.sum()))


def _pearson(x: Matrix, y: Matrix) -> Matrix:
    """Correlate the cells of each [models, models] matrix of a stack; NaN where nothing varies."""
    is_cell = ~np.isnan(y)
    counts = is_cell.sum(axis=(1, 2))
    x, y = (np.where(is_cell, values, 0.0) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        x = np.where(is_cell, x - (x.sum(axis=(1, 2)) / counts)[:, None, None], 0.0)
        y = np.where(is_cell, y - (y.sum(axis=(1, 2)) / counts)[:, None, None], 0.0)
        spread = np.sqrt((x * x).sum(axis=(1, 2)) * (y * y).sum(axis=(1, 2)))
        found: Matrix = np.where(spread > 1e-12, (x * y).sum(axis=(1, 2)) / spread, np.nan)
    return found


def _make_cell(
    config: StudyConfig,
    numerator: str,
    denominator: str,
    tallies: Sequence[CellTally],
    sections: Sequence[str],
    overall: str,
) -> Cell:
    parts: dict[str, list[tuple[Tally, float]]] = {}
    for section in sections:
        by_subset = {t.subset: t.tally for t in tallies if t.section == section}
        weights = weigh_subsets(section, {name: t.total for name, t in by_subset.items()})
        parts[section] = [(by_subset[name], weights[name]) for name in sorted(by_subset)]
    wanted = [section for section in sections if section != PRIOR_SETS]
    if overall == MEAN_OF_SECTIONS:
        whole = mean_of_sections(parts, wanted)
    else:
        whole = [(reduce(add, (found.tally for found in tallies)), 1.0)] if tallies else None
    return Cell(
        numerator,
        denominator,
        config.gap(numerator, denominator),
        _score(config, whole) if whole else None,
        {section: _score(config, found) for section, found in parts.items() if found},
    )


def _score(config: StudyConfig, parts: Sequence[tuple[Tally, float]]) -> CellScore:
    strata = [Stratum(tally, weight) for tally, weight in parts]
    accuracy = weighted_accuracy(strata)
    interval = accuracy_interval(
        strata, resamples=config.statistics.resamples, seed=config.statistics.seed
    )
    assert accuracy is not None
    assert interval is not None
    return CellScore(accuracy, interval, reduce(add, (tally for tally, _ in parts)))


def _columns(score: CellScore | None) -> dict[str, Any]:
    if score is None:
        names = ("accuracy", "ci_low", "ci_high", "pairs", "wins", "ties")
        return dict.fromkeys(names)
    return {
        "accuracy": score.accuracy,
        "ci_low": score.interval[0],
        "ci_high": score.interval[1],
        "pairs": score.tally.total,
        "wins": score.tally.wins,
        "ties": score.tally.ties,
    }


def _accuracy(score: CellScore | None) -> float | None:
    return None if score is None else score.accuracy


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _range(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"
