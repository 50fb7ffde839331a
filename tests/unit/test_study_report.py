"""From tallies of cells to accuracies, nulls and correlations, with the arithmetic shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdr.accuracy import Tally
from cdr.study_config import StudyConfig
from cdr.study_plots import draw_study
from cdr.study_report import CellTally, StudyReport, correlate, make_report
from tests.unit.test_study_config import tree

SECTIONS = ("Chat", "Safety")


def report(tallies: list[CellTally], **changes: Any) -> StudyReport:
    config = StudyConfig.model_validate(
        tree(sections=SECTIONS, statistics={"resamples": 500}, **changes)
    )
    return make_report(config, SECTIONS, tallies, {"too_long": 2})


def both_ways(one: str, other: str, section: str, wins: int, total: int) -> list[CellTally]:
    """A cell and its mirror image, without ties."""
    return [
        CellTally(one, other, section, section, Tally(wins, 0, total)),
        CellTally(other, one, section, section, Tally(total - wins, 0, total)),
    ]


FOUND = report(
    [
        *both_ways("sft", "base", "Chat", 11, 20),
        *both_ways("sft", "base", "Safety", 5, 10),
        *both_ways("dpo", "base", "Chat", 16, 20),
        *both_ways("dpo", "base", "Safety", 7, 10),
        *both_ways("dpo", "sft", "Chat", 14, 20),
        *both_ways("dpo", "sft", "Safety", 6, 10),
    ]
)


def test_a_cell_is_the_mean_of_its_sections_and_a_model_over_itself_is_null() -> None:
    assert FOUND.overall == "mean of sections"
    assert len(FOUND.cells) == 9
    cells = {(cell.numerator, cell.denominator): cell for cell in FOUND.cells}
    for name in ("base", "sft", "dpo"):
        assert cells[name, name].overall is None
    best = cells["dpo", "base"]
    assert best.gap == 4.0
    assert best.overall is not None
    # (16/20 + 7/10) / 2 = 0.75
    assert best.overall.accuracy == pytest.approx(0.75)
    assert best.overall.interval[0] < 0.75 < best.overall.interval[1]
    assert best.sections["Safety"].accuracy == 0.7
    assert FOUND.judged == 30
    assert FOUND.pairs == 32
    row = next(r for r in FOUND.rows() if (r["numerator"], r["denominator"]) == ("base", "base"))
    assert (row["gap"], row["accuracy"], row["sections"]) == (0.0, None, None)


def test_without_a_section_the_overall_is_over_all_pairs() -> None:
    found = report(both_ways("sft", "base", "Chat", 15, 20))
    assert found.overall == "all pairs"
    assert found.accuracies() == {("sft", "base"): 0.75, ("base", "sft"): 0.25}
    # Two points always lie on a line.
    assert found.correlation is None


def test_gap_and_accuracy_are_correlated_over_the_cells() -> None:
    # Gaps 1.5, 4, 2.5 and accuracies 0.525, 0.75, 0.65, and their mirror images (mean 0, 0.5):
    # Σxy = 2 · (1.5·0.025 + 4·0.25 + 2.5·0.15) = 2.825, Σx² = 49, Σy² = 2 · 0.085625
    assert FOUND.correlation is not None
    assert FOUND.correlation.cells == 6
    assert FOUND.correlation.r == pytest.approx(2.825 / np.sqrt(49 * 0.17125))
    assert FOUND.correlation_positive is not None
    expected = np.corrcoef([1.5, 4, 2.5], [0.525, 0.75, 0.65])[0, 1]
    assert FOUND.correlation_positive.r == pytest.approx(expected)
    assert FOUND.correlation_positive.cells == 3


def test_the_interval_draws_models_and_does_not_take_cells_for_independent() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=8)
    gaps = scores[:, None] - scores[None, :]
    # Accuracy follows a trait of each model that goes only roughly with its score.
    trait = scores + rng.normal(size=8)
    accuracies = 0.5 + 0.05 * (trait[:, None] - trait[None, :])
    np.fill_diagonal(accuracies, np.nan)
    found = correlate(gaps, accuracies, resamples=2000, seed=0)
    assert found is not None
    assert found.interval is not None
    low, high = found.interval
    assert low < found.r < high
    # Fisher's interval of 56 independent points would be half as wide.
    z, spread = np.arctanh(found.r), 1.96 / np.sqrt(56 - 3)
    assert high - low > 1.5 * (np.tanh(z + spread) - np.tanh(z - spread))
    again = correlate(gaps, accuracies, resamples=2000, seed=0)
    assert again == found
    assert correlate(gaps, np.full((8, 8), np.nan), resamples=100, seed=0) is None


def test_the_text_has_matrix_list_and_correlation() -> None:
    text = FOUND.render()
    lines = text.splitlines()
    assert "dpo" in lines[1]
    (row,) = (line for line in lines[:5] if line.startswith("dpo"))
    assert row.split() == ["dpo", "75.0", "65.0", "-"]
    assert "left out of every cell: too_long 2" in text
    assert "correlation of gap (points) and accuracy: +0." in text


def test_figures_are_drawn_for_all_cells_and_for_some(tmp_path: Path) -> None:
    some = report(both_ways("dpo", "sft", "Chat", 15, 20), cells={"dpo": ["sft", "base"]})
    for number, found in enumerate((FOUND, some)):
        (tmp_path / str(number)).mkdir()
        files = draw_study(found, tmp_path / str(number))
        assert [file.name for file in files] == ["heatmap.png", "scatter.png"]
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
