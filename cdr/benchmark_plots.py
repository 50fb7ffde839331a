"""Figures of an evaluation, for the MLflow run: PNG files, drawn without a display.

Matplotlib is imported when a figure is drawn, and only its object interface is used: nothing global
changes, and no window opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdr.accuracy import Interval
from cdr.benchmark_report import MEAN_OF_SECTIONS, Report, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _BASE, _CHANCE = "#1f5a8c", "#c47f17", "#888888"


def draw_report(report: Report, title: str, folder: Path) -> list[Path]:
    """Draw what there is to see.

    Args:
        report: what was found.
        title: the reward's and the benchmark's name.
        folder: where the files go; it exists.

    Returns:
        `accuracy.png`, `length.png`, and `routing.png` where prompts have domains.
    """
    figures = {"accuracy": _accuracy(report, title), "length": _length(report, title)}
    if any(name != "none" for row in report.routed.values() for name in row):
        figures["routing"] = _routing(report, title)
    files = []
    for name, figure in figures.items():
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=120, bbox_inches="tight")
        files.append(file)
    return files


def _accuracy(report: Report, title: str) -> Figure:
    overall = report.get("overall", MEAN_OF_SECTIONS)
    scores = [s for s in [*report.at("section"), overall] if s and s.accuracy is not None]
    figure, axes = _axes(max(4.0, 1.4 * len(scores)), title)
    _points(axes, scores, "accuracy, 95 % CI")
    longer = [None if s.longer_wins is None else 100 * s.longer_wins for s in scores]
    axes.scatter(
        [x for x, y in enumerate(longer) if y is not None],
        [y for y in longer if y is not None],
        marker="_", s=300, color=_BASE, label="longer wins",
    )  # fmt: skip
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure


def _length(report: Report, title: str) -> Figure:
    scores = report.at("length")
    figure, axes = _axes(max(4.0, 1.2 * len(scores)), title)
    _points(axes, scores, "accuracy, 95 % CI")
    axes.set_xlabel("length of chosen − length of rejected, tokens")
    axes.set_ylabel("accuracy, %")
    return figure


def _points(axes: Axes, scores: Sequence[Score], label: str) -> None:
    middles = [100 * (score.accuracy or 0.0) for score in scores]
    intervals: list[Interval] = [score.interval or (0.0, 1.0) for score in scores]
    errors = [
        [max(0.0, y - 100 * low) for y, (low, _) in zip(middles, intervals, strict=True)],
        [max(0.0, 100 * high - y) for y, (_, high) in zip(middles, intervals, strict=True)],
    ]
    places = list(range(len(scores)))
    axes.errorbar(
        places, middles, yerr=errors, fmt="o", color=_INK, capsize=4, label=label, zorder=3
    )
    for place, score in zip(places, scores, strict=True):
        axes.annotate(f"n={score.tally.total}", (place, 2), ha="center", fontsize=8, color=_CHANCE)
    axes.axhline(50, color=_CHANCE, linestyle="--", linewidth=1)
    axes.set_xticks(places, [score.name for score in scores])
    axes.set_xlim(-0.6, len(scores) - 0.4)
    axes.set_ylim(0, 102)


def _routing(report: Report, title: str) -> Figure:
    sections = list(report.routed)
    domains = sorted({name for row in report.routed.values() for name in row})
    counts = [[report.routed[section].get(name, 0) for name in domains] for section in sections]
    figure, axes = _axes(1.5 + 1.3 * len(domains), title)
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            ink = "white" if shares[y][x] > 0.6 else "black"
            axes.text(x, y, str(count), ha="center", va="center", color=ink)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(sections)), sections)
    axes.set_xlabel("domain given")
    axes.set_ylabel("section of the benchmark")
    return figure


def _axes(width: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
