"""What the page of an annotate run shows, as plain values filled from the tables.

Plain frozen values, so that a page can be rendered, and tested, without Spark. Log-probs and
rewards are in nats; with `reduction: mean` rewards and margins are nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cdr.config import AnnotateConfig
from cdr.report.pairs import ShownPair
from cdr.report.plots import Histogram
from cdr.report.reward_text import reward_unit
from cdr.runs import RunRecord
from cdr.summary import Summary


@dataclass(frozen=True)
class LengthEffect:
    """How far the length of a completion goes with its reward, within prompts.

    Sums over a prompt's scored candidates of products of deviations from that prompt's means, then
    over prompts: what prompts differ in among themselves plays no part. x is the token count, y the
    reward.

    Args:
        sxx: Σ (x − mean x)², tokens².
        syy: Σ (y − mean y)².
        sxy: Σ (x − mean x)(y − mean y).
    """

    sxx: float
    syy: float
    sxy: float

    def __add__(self, other: LengthEffect) -> LengthEffect:
        return LengthEffect(self.sxx + other.sxx, self.syy + other.syy, self.sxy + other.sxy)

    @property
    def share(self) -> float | None:
        """R²: share of the rewards' variance within prompts that a line on length explains.

        None where lengths or rewards do not differ.
        """
        if self.sxx <= 0 or self.syy <= 0:
            return None
        return min(1.0, self.sxy**2 / (self.sxx * self.syy))

    @property
    def slope(self) -> float | None:
        """Reward per further token; None where lengths do not differ."""
        return self.sxy / self.sxx if self.sxx > 0 else None


NO_EFFECT = LengthEffect(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Lengths:
    """Which side of the pairs is longer, in tokens.

    Args:
        longer: pairs whose chosen is longer.
        shorter: pairs whose chosen is shorter.
        equal: pairs of two equal lengths.
        sample: (tokens of rejected, tokens of chosen) of some pairs, drawn by hash.
    """

    longer: int
    shorter: int
    equal: int
    sample: tuple[tuple[int, int], ...] = ()

    @property
    def chosen_longer(self) -> float | None:
        """Share of `longer` among pairs of unequal length; None without any."""
        unequal = self.longer + self.shorter
        return self.longer / unequal if unequal else None


@dataclass(frozen=True)
class DomainReport:
    """A domain's distributions; its counts and quantiles are in the summary under its name.

    Args:
        rewards: of scored candidates; None without any.
        margins: of pairs; None without any.
        confidence: of the router, per prompt, 0 to 1; None where no router was asked.
        unsure: prompts that the router gave a confidence below `UNSURE`, or that fell back.
        routed: prompts that the router was asked about.
        lengths: of the pairs.
        effect: of length on reward.
        small_margins: pairs with a margin that noise may have decided (`SMALL_MARGIN`).
        cut: scored candidates that the sampler's limit cut off.
    """

    rewards: Histogram | None
    margins: Histogram | None
    confidence: Histogram | None
    unsure: int
    routed: int
    lengths: Lengths
    effect: LengthEffect
    small_margins: int
    cut: int = 0


UNSURE = 0.5
"""Confidence of the router below which a route counts as unsure."""

SMALL_MARGIN = 1.0
"""Nats: engines, dtypes and batches make sums differ by a good part of this."""


@dataclass(frozen=True)
class AnnotationData:
    """All that a page shows.

    Args:
        run: the row of `runs`, with outcome and counts.
        config: the run's resolved config.
        summary: the run's numbers.
        engine_versions: versions behind the log-probs of the pairs shown or of the whole run.
        domains: by name, those with most prompts first.
        hidden: domains beyond the most that a page shows plots and pairs of.
        pairs: pairs to read by domain, drawn by hash.
        unsure_pairs: pairs with the smallest margins, smallest first.
        tokens_missing: why completions are not shown token by token, and what to do; None where
            they are.
        rebuild: the command that builds this page again.
        preferences: what stands behind FROM in a query over `preferences`.
        ui_command: the command that shows the MLflow run; None for none.
    """

    run: RunRecord
    config: AnnotateConfig
    summary: Summary
    engine_versions: tuple[str, ...]
    domains: Mapping[str, DomainReport]
    hidden: tuple[str, ...]
    pairs: Mapping[str, tuple[ShownPair, ...]]
    unsure_pairs: tuple[ShownPair, ...]
    tokens_missing: str | None
    rebuild: str
    preferences: str
    ui_command: str | None = None
    rejects: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Rejected rows by (stage, reason)."""

    @property
    def unit(self) -> str:
        """Unit of rewards and margins."""
        return reward_unit(self.config.reward)

    @property
    def effect(self) -> LengthEffect:
        """The effect of length over all domains."""
        return sum((domain.effect for domain in self.domains.values()), NO_EFFECT)
