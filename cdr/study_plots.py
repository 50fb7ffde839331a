"""Figures of a strong-over-weak study: who over whom, and what the gap says of it.

Drawn as `cdr.benchmark_plots` draws: PNG files, Matplotlib's object interface, no display.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdr.study_report import StudyReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _MIRROR, _CHANCE = "#1f5a8c", "#9db8cd", "#888888"


def draw_study(report: StudyReport, folder: Path) -> list[Path]:
    """Draw the matrix of accuracies, and accuracy against gap.

    Args:
        report: what was found.
        folder: where `heatmap.png` and `scatter.png` go; it exists.
    """
    files = []
    for name, figure in (("heatmap", _heatmap(report)), ("scatter", _scatter(report))):
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=120, bbox_inches="tight")
        files.append(file)
    return files


def _title(report: StudyReport) -> str:
    config = report.config
    return f"{config.study} on {config.dataset} ({report.judged:,} labelled pairs)"


def _heatmap(report: StudyReport) -> Figure:
    from matplotlib.figure import Figure as NewFigure

    numerators, denominators = report.axes()
    accuracies, config = report.accuracies(), report.config
    values = np.array(
        [[accuracies.get((one, other), np.nan) for other in denominators] for one in numerators]
    )
    # Symmetric around chance, so that its colour is white in every study.
    reach = max(0.05, float(np.nanmax(np.abs(values - 0.5)))) if accuracies else 0.5
    figure = NewFigure(
        figsize=(2.6 + 0.75 * len(denominators), 1.9 + 0.5 * len(numerators)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_facecolor("#eeeeee")  # of nulls: white is chance
    image = axes.imshow(
        100 * values, cmap="RdBu", vmin=100 * (0.5 - reach), vmax=100 * (0.5 + reach), aspect="auto"
    )
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if np.isnan(value):
                axes.text(x, y, "–", ha="center", va="center", color=_CHANCE)
                continue
            ink = "white" if abs(value - 0.5) > 0.7 * reach else "black"
            axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", color=ink, fontsize=9)

    def labels(names: list[str]) -> list[str]:
        return [f"{config.title_of(name)} ({config.models[name].score:g})" for name in names]

    axes.set_xticks(range(len(denominators)), labels(denominators), rotation=35, ha="right")
    axes.set_yticks(range(len(numerators)), labels(numerators))
    axes.set_xlabel(f"denominator ({config.score_name})")
    axes.set_ylabel(f"numerator ({config.score_name})")
    axes.set_title(_title(report), fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, label=f"accuracy, % ({report.overall})")
    return figure


def _scatter(report: StudyReport) -> Figure:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    scored = [(cell, cell.overall) for cell in report.cells if cell.overall is not None]
    for is_strong, ink, label in (
        (True, _INK, "strong over weak"),
        (False, _MIRROR, "others"),
    ):
        shown = [(cell.gap, score) for cell, score in scored if (cell.gap > 0) is is_strong]
        if not shown:
            continue
        middles = [100 * score.accuracy for _, score in shown]
        errors = [
            [max(0.0, 100 * (score.accuracy - score.interval[0])) for _, score in shown],
            [max(0.0, 100 * (score.interval[1] - score.accuracy)) for _, score in shown],
        ]
        axes.errorbar(
            [gap for gap, _ in shown], middles, yerr=errors, fmt="o", color=ink, markersize=5,
            elinewidth=0.8, capsize=0, label=label, zorder=3,
        )  # fmt: skip
    axes.axhline(50, color=_CHANCE, linestyle="--", linewidth=1)
    axes.axvline(0, color=_CHANCE, linestyle=":", linewidth=1)
    axes.set_xlabel(f"gap: {report.config.score_name} of numerator − denominator")
    axes.set_ylabel(f"accuracy, % ({report.overall})")
    lines = [_title(report)]
    if report.correlation is not None:
        lines.append(f"r = {report.correlation}")
    if report.correlation_positive is not None:
        lines.append(f"strong over weak only: r = {report.correlation_positive}")
    axes.set_title("\n".join(lines), fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if scored:
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure
