"""What the page of an annotate run says at its top: checks of the run's own data.

No finding says that the pairs are right. Whether a reward prefers better answers is measured on
labelled pairs, never here.
"""

from __future__ import annotations

from collections.abc import Iterator

from cdr.report.annotation_data import SMALL_MARGIN, UNSURE, AnnotationData
from cdr.report.verdict import Finding, Level, Limits, Verdict, check_engines

LENGTH_SHARE = Limits(0.25, 0.5)  # of the rewards' variance within prompts
ONE_SIDED = Limits(0.15, 0.3)  # distance of "chosen is longer" from one half
NO_PAIR = Limits(0.05, 0.2)  # of prompts
SMALL_MARGINS = Limits(0.1, 0.33)  # of pairs
UNSURE_ROUTES = Limits(0.1, 0.3)  # of routed prompts
FALLBACKS = Limits(0.2, 0.5)  # of pairs
CUT = Limits(0.2, 0.5)  # of scored candidates
FEW_PAIRS = 30
"""Pairs of a domain below which its shares and medians are rough."""


def judge(data: AnnotationData) -> Verdict:
    """Check a run's data against the limits above."""
    findings = [
        *_check_run(data),
        *_check_models(data),
        *_check_length(data),
        *_check_pairs(data),
        *_check_routes(data),
    ]
    return Verdict.of(findings, stop="Do not train on these pairs yet")


def _check_run(data: AnnotationData) -> Iterator[Finding]:
    summary, spec = data.summary, data.config.run
    if not summary.pairs:
        yield Finding(
            Level.STOP,
            "There is no pair.",
            "See below why prompts gave none, and why rows were rejected.",
        )
    rejected = sum(summary.rejected.values())
    if rejected:
        too_many = summary.rejected_fraction > spec.max_rejected_fraction
        yield Finding(
            Level.STOP if too_many else Level.LOOK,
            f"{rejected:,} candidates ({summary.rejected_fraction:.1%}) were rejected for good.",
            "Read the reasons below; the rows themselves are in the table rejects.",
        )
    if summary.failed:
        too_many = summary.failed_fraction > spec.max_failed_fraction
        yield Finding(
            Level.STOP if too_many else Level.LOOK,
            f"{summary.failed:,} candidates ({summary.failed_fraction:.1%}) have no score this "
            "time.",
            "Run the same command again: they are tried again, and nothing else is scored.",
        )
    cut = sum(domain.cut for domain in data.domains.values())
    if cut:
        level = CUT.level(cut / summary.ok)
        yield Finding(
            level,
            f"{cut:,} candidates ({cut / summary.ok:.0%}) were cut by the sampler's limit: their "
            "end is not scored, and a policy trained on them does not learn to stop.",
            "Sample with a higher limit, or leave them out: pairs.drop_length_stopped."
            if level
            else None,
        )
    if not rejected and not summary.failed:
        yield Finding(Level.FINE, f"All {summary.candidates:,} candidates were scored.")


def _check_models(data: AnnotationData) -> Iterator[Finding]:
    for warning in data.config.reward.warnings():
        yield Finding(
            Level.LOOK,
            f"{warning[0].upper()}{warning[1:]}",
            "Compare the reward's choice with labelled pairs of your own kind before you train.",
        )
    yield from check_engines(data.engine_versions)


def _check_length(data: AnnotationData) -> Iterator[Finding]:
    effect = data.effect
    if effect.share is not None and effect.slope is not None:
        level = LENGTH_SHARE.level(effect.share)
        kind = "rewarded more" if effect.slope > 0 else "rewarded less"
        slope = f"{effect.slope:+.3f}".replace("-", "−")
        fix = (
            "Try rewards per token (reward.reduction: mean) or a tighter "
            "pairs.length_window.ratio: neither scores anything again. Then compare the pairs."
            if data.config.reward.reduction == "sum"
            else "Try a tighter pairs.length_window.ratio: it scores nothing again."
        )
        yield Finding(
            level,
            f"Length explains {effect.share:.0%} of how rewards differ within a prompt "
            f"(R²; {slope} {data.unit} per further token: longer is {kind}).",
            fix if level else None,
        )
    longer = sum(domain.lengths.longer for domain in data.domains.values())
    shorter = sum(domain.lengths.shorter for domain in data.domains.values())
    if longer + shorter:
        share = longer / (longer + shorter)
        level = ONE_SIDED.level(abs(share - 0.5))
        if longer + shorter < FEW_PAIRS:
            level = min(level, Level.LOOK)
        policy = "longer" if share > 0.5 else "shorter"
        yield Finding(
            level,
            f"Chosen is the longer one in {share:.0%} of the {longer + shorter:,} pairs of unequal "
            "length.",
            f"A policy trained on this learns to answer {policy}. Compare with a tighter "
            "pairs.length_window, or with reward.reduction: mean."
            if level
            else None,
        )
    fallbacks = data.summary.length_fallbacks
    if fallbacks:
        share = fallbacks / data.summary.pairs
        level = FALLBACKS.level(share)
        yield Finding(
            level,
            f"{fallbacks:,} pairs ({share:.0%}) had no candidate in the length window and took the "
            "nearest.",
            "Widen pairs.length_window, or leave them out with pairs.fallback: no_pair."
            if level
            else None,
        )


def _check_pairs(data: AnnotationData) -> Iterator[Finding]:
    summary = data.summary
    without = sum(summary.no_pair.values())
    if without:
        share = without / (without + summary.pairs)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.no_pair.items())
        level = NO_PAIR.level(share)
        yield Finding(
            level,
            f"{without:,} prompts ({share:.1%}) gave no pair: {reasons}.",
            "Sample more candidates, at a higher temperature, or lower pairs.min_margin."
            if level
            else None,
        )
    small = sum(domain.small_margins for domain in data.domains.values())
    if summary.pairs:
        share = small / summary.pairs
        level = SMALL_MARGINS.level(share)
        yield Finding(
            level,
            f"{small:,} pairs ({share:.0%}) have a margin below {SMALL_MARGIN:g} nat"
            f"{' over the whole completion' if data.unit != 'nats' else ''}, which engine, dtype "
            "and batch may have decided.",
            "Read the least sure pairs below; pairs.min_margin leaves such pairs out and scores "
            "nothing again."
            if level
            else None,
        )
    few = [
        f"{name} ({summary.domains[name].pairs})"
        for name in data.domains
        if 0 < summary.domains[name].pairs < FEW_PAIRS
    ]
    if few:
        yield Finding(
            Level.LOOK,
            f"Fewer than {FEW_PAIRS} pairs: {', '.join(few)}. Their shares and medians are rough.",
            "Do not compare these domains by number; read their pairs.",
        )


def _check_routes(data: AnnotationData) -> Iterator[Finding]:
    routed = sum(domain.routed for domain in data.domains.values())
    if not routed:
        return
    unsure = sum(domain.unsure for domain in data.domains.values())
    share = unsure / routed
    level = UNSURE_ROUTES.level(share)
    yield Finding(
        level,
        f"The router was unsure of {unsure:,} of {routed:,} prompts ({share:.0%}; confidence below "
        f"{UNSURE:g}, or fallen back).",
        "Look at their prompts in the table routes; a larger router, reward.routing.threshold with "
        "a fallback, or a domain column of your own (reward.routing.mode: column) may serve better."
        if level
        else None,
    )
