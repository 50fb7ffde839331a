"""The page of an annotate run, from the values in `AnnotationData`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cdr.redaction import redact
from cdr.report.annotation_data import AnnotationData, DomainReport
from cdr.report.annotation_verdict import judge
from cdr.report.html import SUBMIT, Plot, render, show_number
from cdr.report.pairs import ShownPair
from cdr.report.plots import draw_histogram, draw_lengths
from cdr.report.reward_text import RewardText, reward_facts
from cdr.summary import RESUBMITTED, DomainSummary


def render_annotation(data: AnnotationData) -> str:
    """Write the page.

    Args:
        data: from `cdr.report.annotation_gather`, or made by hand.

    Returns:
        HTML, the same for the same data.
    """
    sides = [side for pair in _pairs(data) for side in (pair.chosen, pair.rejected)]
    return render(
        "annotation.html.jinja",
        data=data,
        reward=RewardText.of(data.config.reward),
        verdict=judge(data),
        asked=list(_asked(data)),
        came=list(_came(data)),
        plots=[
            _DomainPlots(name, _plots(name, n, data))
            for n, name in enumerate(data.domains)
            if name not in data.hidden
        ],
        has_tokens=any(side.tokens for side in sides),
        commands=list(_commands(data)),
    )


def _pairs(data: AnnotationData) -> Iterator[ShownPair]:
    for shown in data.pairs.values():
        yield from shown
    yield from data.unsure_pairs


# --- what was asked, what came -------------------------------------------------------------------


def _asked(data: AnnotationData) -> Iterator[tuple[str, str]]:
    config, reward = data.config, data.config.reward
    yield "completions", str(redact(config.input.place))
    for table, version in data.run.input_versions.items():
        yield f"version of {table}", str(version)
    yield from reward_facts(reward)
    pairs, window = config.pairs, config.pairs.length_window
    within = [f"{window.tokens} tokens"] if window.tokens is not None else []
    within += [f"ratio {window.ratio:g}"] if window.ratio is not None else []
    yield "rejected", f"{pairs.rejected}, length window {' and '.join(within) or 'open'}"
    yield "least margin", f"{pairs.min_margin:g} {data.unit}"
    yield "validation split", f"{pairs.validation_fraction:.0%} of prompts, by hash"


def _came(data: AnnotationData) -> Iterator[tuple[str, str]]:
    summary = data.summary
    rejected = sum(summary.rejected.values())
    yield "prompts", f"{summary.prompts:,}"
    yield (
        "candidates",
        f"{summary.candidates:,}: {summary.ok:,} scored, {summary.failed:,} failed, "
        f"{rejected:,} rejected",
    )
    yield "pairs", f"{summary.pairs:,}"
    yield "prompts without a pair", f"{sum(summary.no_pair.values()):,}"
    yield "pairs outside the length window", f"{summary.length_fallbacks:,}"
    routed = ", ".join(f"{source} {count:,}" for source, count in summary.routed.items())
    yield "domains decided by", routed or "–"
    yield (
        "log-probs",
        f"{summary.asked:,} asked, {summary.scored:,} computed by this run, the rest were stored",
    )
    speed = ""
    if summary.tokens_per_s is not None:
        speed = (
            f", {summary.tokens_per_s:,.0f} tokens/s, "
            f"{summary.prompts / summary.scoring_s:,.2g} prompts/s"
        )
    yield "scoring", f"{summary.tokens:,} tokens in {summary.scoring_s:,.0f} s{speed}"
    engines = summary.engines
    if engines.busy is not None:
        yield "engines busy", f"{engines.busy:.0%} of the time that waves took"
    if engines.resubmitted:
        yield "requests", f"{engines.resubmitted:,} {RESUBMITTED}"
    if engines.load_s:
        loads = (f"{role} {seconds:,.0f} s" for role, seconds in sorted(engines.load_s.items()))
        yield "loading, on the slowest host", ", ".join(loads)
    yield "wall time", f"{summary.wall_s:,.0f} s"
    yield "engine", ", ".join(data.engine_versions) or "–"
    if data.run.error:
        yield "problem", data.run.error


# --- plots ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DomainPlots:
    name: str
    plots: list[Plot]


def _plots(name: str, place: int, data: AnnotationData) -> list[Plot]:
    domain, summary = data.domains[name], data.summary.domains[name]
    found = []
    if domain.rewards is not None:
        spread = _spread(summary.reward_quantiles, data.unit)
        found.append(
            Plot(
                draw_histogram(
                    domain.rewards, axis=f"reward, {data.unit}", rows="candidates",
                    key=f"r{place}", zero=True,
                    label=f"Histogram of the rewards of {summary.candidates:,} candidates: "
                    f"{spread}",
                ),
                f"Rewards: {spread}",
            )
        )  # fmt: skip
    if domain.margins is not None:
        spread = _spread(summary.margin_quantiles, data.unit)
        found.append(
            Plot(
                draw_histogram(
                    domain.margins, axis=f"margin, {data.unit}", rows="pairs", key=f"m{place}",
                    label=f"Histogram of the margins of {summary.pairs:,} pairs: {spread}",
                ),
                f"Margins: {spread}",
            )
        )  # fmt: skip
    if domain.lengths.sample:
        found.append(_length_plot(domain, summary, place, data))
    if domain.confidence is not None:
        told = f"{domain.unsure:,} of {domain.routed:,} prompts unsure or fallen back"
        found.append(
            Plot(
                draw_histogram(
                    domain.confidence, axis="router's confidence", rows="prompts",
                    key=f"c{place}", label=f"Histogram of the router's confidence: {told}",
                ),
                f"Router's confidence: {told}",
            )
        )  # fmt: skip
    return found


def _length_plot(
    domain: DomainReport, summary: DomainSummary, place: int, data: AnnotationData
) -> Plot:
    lengths = domain.lengths
    told = (
        f"chosen is longer in {lengths.longer:,}, shorter in {lengths.shorter:,}, equal in "
        f"{lengths.equal:,} pairs"
    )
    share = domain.effect.share
    explained = "" if share is None else f"; length explains {share:.0%} of the rewards"
    drawn = len(lengths.sample)
    some = f" ({drawn} of {summary.pairs:,} drawn)" if drawn < summary.pairs else ""
    most = max(max(pair) for d in data.domains.values() for pair in d.lengths.sample)
    label = f"Tokens of chosen against rejected, a dot per pair: {told}{explained}"
    svg = draw_lengths(lengths.sample, most=most, key=f"l{place}", label=label)
    return Plot(svg, f"Above the line chosen is longer{some}: {told}{explained}")


def _spread(quantiles: Sequence[float], unit: str) -> str:
    low, _, middle, _, high = quantiles
    ends = f"{show_number(low)} to {show_number(high)}"
    return f"median {show_number(middle)}, middle 90 % from {ends} {unit}"


# --- what next -----------------------------------------------------------------------------------


def _commands(data: AnnotationData) -> Iterator[tuple[str, str]]:
    run_id = data.run.run_id
    yield (
        "Ask the table yourself (SQL)",
        "SELECT domain, prompt_id, margin, chosen_num_tokens, rejected_num_tokens,\n"
        "       chosen[0].content AS chosen, rejected[0].content AS rejected\n"
        f"FROM {data.preferences}\nWHERE run_id = '{run_id}' ORDER BY margin LIMIT 20",
    )
    yield (
        "Other pairs from the same rewards (scores nothing)",
        f"{SUBMIT} jobs/annotate.py --config YOURS "
        "\\\n    --set pairs.min_margin=1.0 --set pairs.length_window.ratio=1.2",
    )
    if data.config.reward.reduction == "sum":
        yield (
            "The same reward per token (scores nothing)",
            f"{SUBMIT} jobs/annotate.py --config YOURS \\\n    --set reward.reduction=mean",
        )
    if data.ui_command:
        yield "This run in MLflow", data.ui_command
    yield "Build this page again", data.rebuild
