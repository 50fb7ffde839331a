"""How often a reward prefers the better answer, how sure that is, and how much of it is length.

A pair is a win when the chosen answer's reward is strictly higher; a tie is a loss, and is counted.
An accuracy may be a weighted mean over strata (a benchmark's subsets); its interval is a stratified
bootstrap, or Wilson's where all pairs weigh alike. Two rewards on the same pairs are compared by
their discordant pairs: McNemar's exact test, and a paired bootstrap of the difference.

Drawing n pairs anew from a stratum and counting wins is drawing from a binomial distribution, so
that is what is drawn: the result is the same, at a cost that does not depend on n. Pairs count as
independent; where many share a prompt, intervals are too narrow.

Pure functions on numpy arrays: no Spark, no torch, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Z_95: Final = 1.959963984540054  # the normal distribution's 97.5 % quantile

LENGTH_EDGES: Final = (-100, -25, -5, 6, 26, 101)
"""Where `bin_by_length` cuts chosen − rejected, in tokens; up to 5 either way is one bin."""

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Tally:
    """Wins and ties of some pairs.

    Args:
        wins: pairs whose chosen answer has the strictly higher value.
        ties: pairs whose values are equal.
        total: pairs in all.
    """

    wins: int
    ties: int
    total: int

    @classmethod
    def of(cls, margins: Sequence[float] | NDArray[Any]) -> Self:
        """Count.

        Args:
            margins: value of chosen − value of rejected, one per pair, finite.
        """
        values = np.asarray(margins, dtype=np.float64)
        return cls(int((values > 0).sum()), int((values == 0).sum()), values.size)

    def __add__(self, other: Tally) -> Tally:
        """Count the pairs of both."""
        return Tally(self.wins + other.wins, self.ties + other.ties, self.total + other.total)

    @property
    def accuracy(self) -> float | None:
        """Share of wins, 0 to 1; None without pairs."""
        return self.wins / self.total if self.total else None

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the accuracy; (0, 1) without pairs."""
        return compute_wilson_interval(self.wins, self.total)


def compute_wilson_interval(right: float, total: int) -> Interval:
    """Give the 95 % Wilson score interval of a share.

    Args:
        right: how many were right; with halves for ties it is on the wide side.
        total: of how many; 0 gives (0, 1).

    Returns:
        (lower, upper) bound, each in [0, 1].

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.

    Example:
        >>> tuple(round(bound, 3) for bound in compute_wilson_interval(8, 10))
        (0.49, 0.943)
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, Z_95 * Z_95
    centre = share + z2 / (2 * total)
    spread = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Stratum:
    """A part of a weighted accuracy.

    Args:
        tally: its pairs, at least one.
        weight: > 0; only its share of the sum of weights matters.
    """

    tally: Tally
    weight: float


def weighted_accuracy(strata: Sequence[Stratum]) -> float | None:
    """Compute Σ weight · accuracy / Σ weight, 0 to 1; None without strata."""
    if not strata:
        return None
    weights = np.array([stratum.weight for stratum in strata])
    shares = np.array([stratum.tally.wins / stratum.tally.total for stratum in strata])
    return float((weights * shares).sum() / weights.sum())


def accuracy_interval(strata: Sequence[Stratum], *, resamples: int, seed: int) -> Interval | None:
    """Give the 95 % interval of a weighted accuracy: Wilson's, or a percentile bootstrap.

    Args:
        strata: those whose pairs weigh alike are one, which changes no accuracy; where all are one,
            the interval is Wilson's. Else each is drawn anew with its own number of pairs, and one
            whose pairs are all won, or all lost, has no spread of its own: with few pairs the
            interval is then too narrow.
        resamples: how many times.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        (lower, upper) bound, each in [0, 1]; None without strata.
    """
    if not strata:
        return None
    pooled = _pool([(stratum.tally, stratum.weight) for stratum in strata])
    if len(pooled) == 1:
        return pooled[0][0].interval
    rng = np.random.default_rng(seed)
    weights = np.array([weight for _, weight in pooled])
    totals = np.array([tally.total for tally, _ in pooled])
    wins = np.array([tally.wins for tally, _ in pooled])
    drawn = rng.binomial(totals, wins / totals, size=(resamples, len(pooled)))
    return _percentiles((drawn / totals * weights).sum(axis=1) / weights.sum())


@dataclass(frozen=True)
class LengthBin:
    """Pairs whose answers differ in length by about as much.

    Args:
        low: least chosen − rejected, in tokens; None for the first bin.
        high: the first difference above it; None for the last bin.
        tally: its pairs.
    """

    low: int | None
    high: int | None
    tally: Tally

    @property
    def label(self) -> str:
        """Name the bin: `-24 to -6`, `<= -101`, `>= 101`."""
        if self.low is None:
            return f"<= {int(self.high or 0) - 1}"
        if self.high is None:
            return f">= {self.low}"
        return f"{self.low} to {self.high - 1}"


def bin_by_length(
    margins: NDArray[Any], differences: NDArray[Any], edges: Sequence[int] = LENGTH_EDGES
) -> list[LengthBin]:
    """Tally pairs by how much longer the chosen answer is; bins without pairs are left out.

    Args:
        margins: reward of chosen − reward of rejected, one per pair.
        differences: tokens of chosen − tokens of rejected, likewise.
        edges: first difference of each bin but the first, ascending.

    Returns:
        Bins from shortest to longest chosen.
    """
    lows, highs = (None, *edges), (*edges, None)
    place = np.digitize(differences, edges)
    bins = [
        LengthBin(low, high, Tally.of(margins[place == number]))
        for number, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]
    return [found for found in bins if found.tally.total]


@dataclass(frozen=True)
class LengthEffect:
    """How much of an accuracy is length.

    Args:
        longer_wins: what "the longer answer is better" reaches; equal lengths are ties.
        where_longer: the reward's tally where the chosen answer is the longer one.
        where_shorter: the same where it is the shorter one.
        favours_longer: share of pairs of unequal length in which the reward's favourite is the
            longer answer; near 0 or 1 the reward sees little but length. None without such pairs.
    """

    longer_wins: Tally
    where_longer: Tally
    where_shorter: Tally
    favours_longer: float | None

    @property
    def strata(self) -> tuple[Stratum, ...]:
        """Both sides with equal weight, where there are pairs on both; else nothing.

        A reward that sees only length is at 0.5 by them, whatever the benchmark's lengths are.
        """
        sides = (self.where_longer, self.where_shorter)
        return tuple(Stratum(side, 0.5) for side in sides) if all(s.total for s in sides) else ()

    @property
    def balanced_accuracy(self) -> float | None:
        """Accuracy if chosen were longer in half of the pairs; None where one side is empty."""
        return weighted_accuracy(self.strata)


def measure_length(margins: NDArray[Any], differences: NDArray[Any]) -> LengthEffect:
    """Tell how much of an accuracy is length.

    Args:
        margins: reward of chosen − reward of rejected, one per pair.
        differences: tokens of chosen − tokens of rejected, likewise.
    """
    unequal = (differences != 0) & (margins != 0)
    longer = (margins > 0) == (differences > 0)
    return LengthEffect(
        longer_wins=Tally.of(differences),
        where_longer=Tally.of(margins[differences > 0]),
        where_shorter=Tally.of(margins[differences < 0]),
        favours_longer=float(longer[unequal].mean()) if unequal.any() else None,
    )


@dataclass(frozen=True)
class PairedTally:
    """Two rewards, A and B, on the same pairs.

    Args:
        both: pairs that both win.
        only_a: pairs that A alone wins.
        only_b: pairs that B alone wins.
        total: pairs in all.
    """

    both: int
    only_a: int
    only_b: int
    total: int

    @classmethod
    def of(
        cls, wins_a: Sequence[bool] | NDArray[Any], wins_b: Sequence[bool] | NDArray[Any]
    ) -> Self:
        """Count; the arguments say of each pair, in the same order, whether it is a win."""
        a, b = np.asarray(wins_a, dtype=bool), np.asarray(wins_b, dtype=bool)
        return cls(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), a.size)

    def __add__(self, other: PairedTally) -> PairedTally:
        """Count the pairs of both."""
        return PairedTally(
            self.both + other.both,
            self.only_a + other.only_a,
            self.only_b + other.only_b,
            self.total + other.total,
        )

    @property
    def a(self) -> Tally:
        """A's wins; ties are not told apart here."""
        return Tally(self.both + self.only_a, 0, self.total)

    @property
    def b(self) -> Tally:
        """B's wins; ties are not told apart here."""
        return Tally(self.both + self.only_b, 0, self.total)


Counted = TypeVar("Counted", Tally, PairedTally)


def compute_mcnemar_p(only_a: int, only_b: int) -> float:
    """Compute McNemar's exact two-sided p-value.

    If A and B were equally good, each of the discordant pairs would be as likely A's as B's:
    p = min(1, 2 · P[Binomial(only_a + only_b, ½) <= min(only_a, only_b)]).

    Args:
        only_a: pairs that A alone wins.
        only_b: pairs that B alone wins.

    Returns:
        In (0, 1]; 1 without discordant pairs.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996.

    Example:
        >>> compute_mcnemar_p(1, 5)  # 2 · (1 + 6) / 2**6
        0.21875
    """
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    # Whole numbers: exact for any number of pairs. Each binomial coefficient comes from the last.
    at_most = ways = 1
    for k in range(fewer):
        ways = ways * (discordant - k) // (k + 1)
        at_most += ways
    return min(1.0, 2 * at_most / (1 << discordant))


@dataclass(frozen=True)
class Difference:
    """Accuracy of B minus that of A on the same pairs.

    Args:
        a: weighted accuracy of A, 0 to 1.
        b: the same of B.
        interval: 95 % paired, stratified bootstrap interval of b − a.
        p: McNemar's exact p-value over all the pairs, weights aside.
        paired: the pairs in all.
    """

    a: float
    b: float
    interval: Interval
    p: float
    paired: PairedTally

    @property
    def value(self) -> float:
        """B − A, −1 to 1."""
        return self.b - self.a


def compare_accuracies(
    strata: Sequence[tuple[PairedTally, float]], *, resamples: int, seed: int
) -> Difference:
    """Compare two rewards by the pairs that only one of them wins.

    Args:
        strata: tally (at least one pair) and weight of each; at least one. Those whose pairs weigh
            alike are drawn anew as one.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    rng = np.random.default_rng(seed)
    pooled = _pool(strata)
    weights = np.array([weight for _, weight in pooled])
    drawn = np.empty((resamples, len(pooled)))
    for number, (tally, _) in enumerate(pooled):
        alike = tally.total - tally.only_a - tally.only_b
        chances = np.array([tally.only_a, tally.only_b, alike]) / tally.total
        counts = rng.multinomial(tally.total, chances, size=resamples)
        drawn[:, number] = (counts[:, 1] - counts[:, 0]) / tally.total
    paired = reduce(add, (tally for tally, _ in strata))
    return Difference(
        a=weighted_accuracy([Stratum(tally.a, weight) for tally, weight in strata]) or 0.0,
        b=weighted_accuracy([Stratum(tally.b, weight) for tally, weight in strata]) or 0.0,
        interval=_percentiles((drawn * weights).sum(axis=1) / weights.sum()),
        p=compute_mcnemar_p(paired.only_a, paired.only_b),
        paired=paired,
    )


def _pool(strata: Sequence[tuple[Counted, float]]) -> list[tuple[Counted, float]]:
    """Put strata together whose pairs weigh alike.

    Many small subsets that count by their pairs would else have hardly any spread: a subset of one
    pair has none.

    Args:
        strata: tally and weight of each.

    Returns:
        The same of the pooled ones, by what a pair weighs, in order of appearance.
    """
    pooled: dict[str, tuple[Counted, float]] = {}
    for tally, weight in strata:
        alike = f"{weight / tally.total:.9e}"
        if alike in pooled:
            other, its_weight = pooled[alike]
            tally, weight = other + tally, its_weight + weight
        pooled[alike] = tally, weight
    return list(pooled.values())


def _percentiles(values: Floats) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
