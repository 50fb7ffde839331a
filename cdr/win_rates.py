"""How often a policy wins, how sure that is, and how long its answers are.

A win rate is a mean over questions: 1 for a win, ½ for a tie, 0 for a loss. Where a question has
several verdicts (two orders, two turns), the interval draws questions anew, so that they stay
together.

Pure functions on numpy arrays: no Spark, no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdr.accuracy import Z_95, compute_wilson_interval


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Args:
        value: the number.
        low: lower bound of its 95 % interval.
        high: upper bound.
        count: questions it is a mean over.
    """

    value: float
    low: float
    high: float
    count: int

    def as_metrics(self) -> dict[str, float]:
        """Give it as JSON-able numbers."""
        return {
            "value": self.value, "ci_low": self.low, "ci_high": self.high, "count": self.count
        }  # fmt: skip


def estimate_mean(
    sums: Sequence[float] | NDArray[Any],
    weights: Sequence[float] | NDArray[Any] | None = None,
    *,
    scale: float = 1.0,
    resamples: int,
    seed: int,
) -> Estimate:
    """Estimate Σ sums / Σ weights over questions, with a bootstrap of the questions.

    Args:
        sums: per question, the sum of its verdicts, each times its weight; at least one question.
        weights: per question, the sum of the weights, > 0; None for one verdict each.
        scale: what the result is multiplied by; 100 for percent.
        resamples: draws of the bootstrap.
        seed: of the draws; the same seed gives the same interval.
    """
    top = np.asarray(sums, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # How often each question is drawn: one draw of all of them is one row.
    times = rng.multinomial(top.size, np.full(top.size, 1 / top.size), size=resamples)
    drawn = (times @ top) / (times @ bottom)
    low, high = np.quantile(drawn, (0.025, 0.975)) * scale
    value = float(top.sum() / bottom.sum() * scale)
    return Estimate(value, float(low), float(high), top.size)


def estimate_normal(value: float, standard_error: float, count: int) -> Estimate:
    """Give the 95 % interval of a mean whose standard error a tool has computed."""
    spread = Z_95 * standard_error
    return Estimate(value, value - spread, value + spread, count)


@dataclass(frozen=True)
class WinRate:
    """One policy against another on the same questions.

    Args:
        wins: questions that it wins.
        ties: equal rewards or equal answers; each counts half.
        losses: questions that the other wins.
        left_out: questions without a verdict, in no way counted.
        rate: (wins + ties / 2) / (wins + ties + losses), in percent; None without a verdict.
    """

    wins: int
    ties: int
    losses: int
    left_out: int
    rate: Estimate | None

    @classmethod
    def of(cls, wins: int, ties: int, losses: int, left_out: int = 0) -> WinRate:
        """Compute the rate, with a Wilson interval: it holds for few questions too."""
        total, won = wins + ties + losses, wins + ties / 2
        rate = None
        if total:
            low, high = compute_wilson_interval(won, total)
            rate = Estimate(100 * won / total, 100 * low, 100 * high, total)
        return cls(wins, ties, losses, left_out, rate)

    def as_metrics(self) -> dict[str, Any]:
        """Give it as JSON-able numbers."""
        return {
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "left_out": self.left_out,
            "win_rate": None if self.rate is None else self.rate.as_metrics(),
        }


def measure_lengths(texts: Sequence[str], num_tokens: Sequence[int] | None) -> dict[str, float]:
    """Measure answers.

    Args:
        texts: the answers, at least one.
        num_tokens: tokens of each, of the policy's tokenizer; None where not known.

    Returns:
        Mean, median and maximum of characters (AlpacaEval's length is the mean), and of tokens.
    """
    found: dict[str, float] = {}
    for unit, values in (("chars", [len(text) for text in texts]), ("tokens", num_tokens)):
        if values is not None:
            found[f"{unit}_mean"] = float(np.mean(values))
            found[f"{unit}_median"] = float(np.median(values))
            found[f"{unit}_max"] = float(np.max(values))
    return found
