"""Accuracies, their intervals, comparisons and the part of length, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.accuracy import (
    LENGTH_EDGES,
    PairedTally,
    Stratum,
    Tally,
    accuracy_interval,
    bin_by_length,
    compare_accuracies,
    compute_mcnemar_p,
    compute_wilson_interval,
    measure_length,
    weighted_accuracy,
)


def test_a_win_is_strict_and_a_tie_is_a_loss() -> None:
    tally = Tally.of([1.0, 0.0, -2.0, 0.5])
    assert (tally.wins, tally.ties, tally.total) == (2, 1, 4)
    assert tally.accuracy == 0.5


def test_no_pairs_have_no_accuracy() -> None:
    assert Tally.of([]).accuracy is None
    assert weighted_accuracy([]) is None
    assert accuracy_interval([], resamples=10, seed=0) is None


def test_wilson_interval() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 3.8415/20) / (1 + 0.38415) = 0.7167, spread 0.2266
    assert compute_wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert compute_wilson_interval(0, 0) == (0.0, 1.0)


def test_weights_decide_how_much_a_stratum_counts() -> None:
    # (984 · 0.5 + 164 · 0.75) / 1148 = 615 / 1148
    strata = [Stratum(Tally(2, 0, 4), 984), Stratum(Tally(3, 0, 4), 164)]
    assert weighted_accuracy(strata) == pytest.approx(615 / 1148)


def test_bootstrap_is_seeded() -> None:
    strata = [Stratum(Tally(240, 0, 400), 1.0), Stratum(Tally(30, 0, 40), 2.0)]
    first = accuracy_interval(strata, resamples=2_000, seed=1)
    assert first == accuracy_interval(strata, resamples=2_000, seed=1)
    few = [accuracy_interval(strata, resamples=50, seed=seed) for seed in range(5)]
    assert len(set(few)) > 1


def test_strata_whose_pairs_weigh_alike_are_one() -> None:
    # Thirty subsets of a pair each have no spread of their own; thirty pairs have.
    singles = [Stratum(Tally(number % 3 > 0, 0, 1), 0.1) for number in range(30)]
    expected = compute_wilson_interval(20, 30)
    assert accuracy_interval(singles, resamples=10, seed=0) == expected
    # Beside a subset of another weight they are drawn together: 0.5² · (2/9)/30 + 0.5² · 0.25/50.
    strata = [*singles, Stratum(Tally(25, 0, 50), 3.0)]
    spread = 1.96 * math.sqrt(0.25 * (2 / 9) / 30 + 0.25 * 0.25 / 50)
    low, high = accuracy_interval(strata, resamples=20_000, seed=0) or (0, 0)
    middle = (2 / 3 + 1 / 2) / 2
    assert (low, high) == pytest.approx((middle - spread, middle + spread), abs=0.01)
    pairs = [(PairedTally(0, 0, number % 2, 1), 1.0) for number in range(40)]
    whole = [(PairedTally(0, 0, 20, 40), 1.0)]
    found, expect = (compare_accuracies(p, resamples=500, seed=0) for p in (pairs, whole))
    assert found.interval == expect.interval
    assert found.interval[0] < found.value < found.interval[1]


def test_bootstrap_of_two_strata_draws_each_by_itself() -> None:
    # Variance (0.25² + 0.75²)-weighted: 0.0625 · 0.25/100 + 0.5625 · 0.16/50.
    strata = [Stratum(Tally(50, 0, 100), 1.0), Stratum(Tally(40, 0, 50), 3.0)]
    spread = 1.96 * math.sqrt(0.0625 * 0.25 / 100 + 0.5625 * 0.16 / 50)
    low, high = accuracy_interval(strata, resamples=20_000, seed=0) or (0, 0)
    assert low == pytest.approx(0.725 - spread, abs=0.01)
    assert high == pytest.approx(0.725 + spread, abs=0.01)


def test_bootstrap_agrees_with_drawing_rows() -> None:
    rng = np.random.default_rng(0)
    wins = [np.array([True] * 30 + [False] * 20), np.array([True] * 10 + [False] * 10)]
    means = [
        (rng.choice(wins[0], 50).mean() + 2 * rng.choice(wins[1], 20).mean()) / 3
        for _ in range(4000)
    ]
    strata = [Stratum(Tally(30, 0, 50), 1), Stratum(Tally(10, 0, 20), 2)]
    found = accuracy_interval(strata, resamples=4000, seed=0)
    assert found == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.021)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 5, 2 * (1 + 6) / 64),
        (5, 1, 2 * (1 + 6) / 64),
        (0, 10, 2 / 1024),
        (3, 3, 1.0),
    ],
)
def test_mcnemar_is_exact(only_a: int, only_b: int, p: float) -> None:
    assert compute_mcnemar_p(only_a, only_b) == p


def test_mcnemar_stays_exact_for_thousands_of_pairs() -> None:
    # Normal approximation with continuity correction: z = (|1300 − 1200| − 1)/sqrt(2500) = 1.98.
    assert compute_mcnemar_p(1200, 1300) == pytest.approx(0.0477, abs=0.0005)


def test_a_paired_difference_counts_discordant_pairs_alone() -> None:
    a = [True, True, False, False, True]
    b = [True, False, True, True, True]
    tally = PairedTally.of(a, b)
    assert (tally.both, tally.only_a, tally.only_b, tally.total) == (2, 1, 2, 5)
    assert (tally.a.accuracy, tally.b.accuracy) == (0.6, 0.8)
    difference = compare_accuracies([(tally, 1.0)], resamples=1000, seed=0)
    assert difference.value == pytest.approx(0.2)
    assert difference.p == compute_mcnemar_p(1, 2) == 1.0


def test_a_paired_interval_is_narrower_than_that_of_two_samples() -> None:
    # 500 pairs, the rewards differ on 20: sd of the difference sqrt((20/500 − 0.02²) / 500).
    tally = PairedTally(both=300, only_a=5, only_b=15, total=500)
    found = compare_accuracies([(tally, 1.0)], resamples=20_000, seed=0)
    spread = 1.96 * math.sqrt((0.04 - 0.0004) / 500)
    assert found.interval == pytest.approx((0.02 - spread, 0.02 + spread), abs=0.003)


def test_a_weighted_difference_is_the_difference_of_weighted_accuracies() -> None:
    parts = [(PairedTally(2, 1, 3, 10), 984.0), (PairedTally(0, 4, 0, 5), 164.0)]
    found = compare_accuracies(parts, resamples=100, seed=0)
    # A: 3 of 10 and 4 of 5; B: 5 of 10 and 0 of 5.
    assert found.a == pytest.approx((0.3 * 984 + 0.8 * 164) / 1148)
    assert found.b == pytest.approx((0.5 * 984 + 0.0 * 164) / 1148)
    assert found.value == found.b - found.a
    assert (found.paired.only_a, found.paired.only_b, found.paired.total) == (5, 3, 15)


def test_length_bins_hold_every_pair_once_and_name_their_bounds() -> None:
    differences = np.array([-500, -101, -100, -26, -25, -6, -5, 0, 5, 6, 25, 26, 100, 101])
    margins = np.where(differences > 0, 1.0, -1.0)
    bins = bin_by_length(margins, differences)
    assert [(b.label, b.tally.total, b.tally.wins) for b in bins] == [
        ("<= -101", 2, 0),
        ("-100 to -26", 2, 0),
        ("-25 to -6", 2, 0),
        ("-5 to 5", 3, 1),
        ("6 to 25", 2, 2),
        ("26 to 100", 2, 2),
        (">= 101", 1, 1),
    ]
    assert sum(b.tally.total for b in bins) == len(differences)


def test_bins_without_pairs_are_left_out() -> None:
    (only,) = bin_by_length(np.array([1.0]), np.array([LENGTH_EDGES[-1]]))
    assert (only.low, only.high) == (LENGTH_EDGES[-1], None)


def test_a_reward_that_is_only_length_is_found_out() -> None:
    differences = np.array([5, 9, 3, -2, 0])
    effect = measure_length(differences.astype(float), differences)
    assert effect.longer_wins == Tally(3, 1, 5)
    assert effect.favours_longer == 1.0
    assert effect.balanced_accuracy == 0.5  # 3 of 3 where longer, 0 of 1 where shorter


def test_balanced_accuracy_needs_pairs_of_both_kinds() -> None:
    effect = measure_length(np.array([1.0, -1.0]), np.array([3, 3]))
    assert effect.balanced_accuracy is None
    assert effect.favours_longer == 0.5
    assert measure_length(np.array([1.0]), np.array([0])).favours_longer is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_swapping_two_rewards_flips_the_sign_and_keeps_p(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    forth = compare_accuracies([(PairedTally.of(a, b), 1.0)], resamples=10, seed=0)
    back = compare_accuracies([(PairedTally.of(b, a), 1.0)], resamples=10, seed=0)
    assert forth.value == -back.value
    assert forth.p == back.p
    assert 0 < forth.p <= 1
