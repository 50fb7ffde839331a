"""Win rates and their intervals, by hand."""

from __future__ import annotations

import pytest

from cdr.accuracy import compute_wilson_interval
from cdr.win_rates import Estimate, WinRate, estimate_mean, estimate_normal, measure_lengths

DRAWS = {"resamples": 2000, "seed": 0}


def test_a_tie_is_half_a_win_and_what_is_left_out_counts_nowhere() -> None:
    found = WinRate.of(5, 2, 1, 4)
    # (5 + 2/2) / 8, and the Wilson interval of 6 out of 8
    low, high = (100 * bound for bound in compute_wilson_interval(6, 8))
    assert found.rate == Estimate(75, low, high, 8)
    assert found.as_metrics()["left_out"] == 4
    assert WinRate.of(0, 0, 0, 3).rate is None
    # A bootstrap of four wins would be sure of 100 %.
    assert WinRate.of(4, 0, 0).as_metrics()["win_rate"]["ci_low"] == pytest.approx(51.0, abs=0.1)


def test_the_interval_is_that_of_the_normal_distribution_where_questions_are_many() -> None:
    found = estimate_mean([1.0] * 600 + [0.0] * 400, scale=100, **DRAWS)
    # 60 ± 1.96 · 100 · sqrt(0.6 · 0.4 / 1000) = 60 ± 3.04
    expected = estimate_normal(60, 100 * (0.24 / 1000) ** 0.5, 1000)
    assert (expected.low, expected.high) == pytest.approx((56.96, 63.04), abs=0.01)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.3)
    assert estimate_mean([1.0] * 600 + [0.0] * 400, scale=100, **DRAWS) == found


def test_verdicts_of_one_question_stay_together() -> None:
    # Two verdicts per question that agree: as uncertain as one verdict per question.
    twice = estimate_mean([2.0] * 50 + [0.0] * 50, [2.0] * 100, **DRAWS)
    once = estimate_mean([1.0] * 50 + [0.0] * 50, **DRAWS)
    assert twice == once
    # Weights: (3 · 1 + 1 · 0) / (3 + 1)
    assert estimate_mean([3.0, 0.0], [3.0, 1.0], **DRAWS).value == 0.75


def test_lengths() -> None:
    found = measure_lengths(["", "ab", "abcd"], [1, 2, 9])
    assert found == {
        "chars_mean": 2, "chars_median": 2, "chars_max": 4,
        "tokens_mean": 4, "tokens_median": 2, "tokens_max": 9,
    }  # fmt: skip
    assert set(measure_lengths(["a"], None)) == {"chars_mean", "chars_median", "chars_max"}
