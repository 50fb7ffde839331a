"""The report page: one HTML file that loads nothing, from the values in `ReportData`.

Every text is escaped by the template engine, the completions' above all; a policy in the page
forbids scripts and every request besides. Light and dark follow the reader's system.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cdr.report.data import DomainReport, Piece, ReportData, TokenRow
from cdr.report.plots import draw_histogram, draw_lengths
from cdr.report.verdict import Level, judge
from cdr.reward_config import ModelSpec
from cdr.summary import DomainSummary
from cdr.tracking import redact

_TEXT_CHARACTERS = 3000
_HEAVIEST = 3  # on either side
_SHADES = (0.05, 0.25, 0.75, 2.0)
"""Nats per token from which a token has a colour, and the next darker ones."""

_MARKS = {Level.FINE: "fine", Level.LOOK: "look", Level.STOP: "stop"}
_OUTCOMES = {"over_threshold": "finished above a threshold"}


def render_page(data: ReportData) -> str:
    """Write the page.

    Args:
        data: from `cdr.report.gather`, or made by hand.

    Returns:
        HTML, the same for the same data.
    """
    sides = [side for pair in _pairs(data) for side in (pair.chosen, pair.rejected)]
    return _environment().get_template("page.html.jinja").render(
        data=data,
        names=_short_names(data),
        verdict=judge(data),
        outcome=_OUTCOMES.get(data.run.outcome, data.run.outcome),
        asked=list(_asked(data)),
        came=list(_came(data)),
        plots=[
            _DomainPlots(name, _plots(name, n, data))
            for n, name in enumerate(data.domains)
            if name not in data.hidden
        ],
        has_tokens=any(side.tokens for side in sides),
        formula=_formula(data, _short_names(data)),
        legend=list(_legend()),
        commands=list(_commands(data)),
        TEXT_CHARACTERS=_TEXT_CHARACTERS,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cdr.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "explain": _explain,
        "heaviest": _heaviest,
        "mark": _MARKS.__getitem__,
        "number": _number,
        "percent": lambda value: "–" if value is None else f"{value:.0%}",
        "pick": lambda values, place: _number(values[place] if values else None),
        "shade": _shade,
        "shortened": _shortened,
        "signed": lambda value: _minus(f"{value:+.2f}"),
        "visible": lambda text: text.replace("\n", "⏎\n"),
    }
    return environment


def _pairs(data: ReportData) -> Iterator[Any]:
    for shown in data.pairs.values():
        yield from shown
    yield from data.unsure_pairs


# --- numbers and texts ---------------------------------------------------------------------------


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else _minus(f"{value:,.{digits}f}")


def _shortened(text: str, characters: int, is_told: bool = True) -> str:
    if len(text) <= characters:
        return text
    left = f" ({len(text) - characters:,} more characters)" if is_told else ""
    return f"{text[:characters].rstrip()} …{left}"


def _shade(reward: float) -> str:
    darkness = sum(abs(reward) >= least for least in _SHADES)
    return "z" if not darkness else f"{'p' if reward > 0 else 'n'}{darkness}"


def _legend() -> Iterator[tuple[str, str]]:
    for sign, text in (("n", "−"), ("p", "+")):
        steps = list(enumerate(_SHADES, 1))
        for darkness, least in reversed(steps) if sign == "n" else steps:
            yield (
                f"{sign}{darkness}",
                f"{text}{least:g} nats or {'less' if sign == 'n' else 'more'}",
            )
        if sign == "n":
            yield "z", f"less than {_SHADES[0]:g} either way"


def _explain(piece: Piece, row: TokenRow, names: Mapping[str, str]) -> str:
    terms = ", ".join(
        f"{names[name]} {_number(value)}"
        for name, value in zip(row.terms, piece.logprobs, strict=True)
    )
    return f"{_minus(f'{piece.reward:+.2f}')} nats ({terms})"


def _heaviest(row: TokenRow) -> list[Piece]:
    """Give the tokens that weigh most on either side, heaviest first."""
    ordered = sorted(row.pieces, key=lambda piece: piece.reward)
    ends = [piece for piece in ordered[:_HEAVIEST] if piece.reward <= -_SHADES[0]]
    ends += [piece for piece in ordered[-_HEAVIEST:] if piece.reward >= _SHADES[0]]
    return sorted(ends, key=lambda piece: -abs(piece.reward))


def _short_names(data: ReportData) -> dict[str, str]:
    """Name each term by its model alone, where that tells them apart."""
    models = [name.partition("/")[0] for name in data.weights]
    unique = len(set(models)) == len(models)
    return {
        name: model if unique else name for name, model in zip(data.weights, models, strict=True)
    }


def _formula(data: ReportData, names: Mapping[str, str] | None = None) -> str:
    reward = data.config.reward
    if reward.is_asked_by_api:
        return "share of verdicts won less share lost, against the others, both orders"
    if reward.is_judge:
        return "log-odds that judge names it the better answer, mean over the others, both orders"

    def quantity(name: str) -> str:
        is_classifier = reward.models[name.partition("/")[0]].engine == "classifier"
        return f"{'score of' if is_classifier else 'log p'} {names[name] if names else name}"

    parts = [
        f"{'−' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}"
        f"{quantity(name)}"
        for name, weight in data.weights.items()
    ]
    return " ".join(parts).removeprefix("+ ")


# --- what was asked, what came -------------------------------------------------------------------


def _asked(data: ReportData) -> Iterator[tuple[str, str]]:
    config, reward = data.config, data.config.reward
    yield "completions", str(redact(config.input.place))
    for table, version in data.run.input_versions.items():
        yield f"version of {table}", str(version)
    used = [(term.model, term.model) for term in reward.resolved_terms()]
    if reward.routing.mode == "adaptive":
        used.append((reward.routing.model, "router's model"))
    for role, label in dict(used).items():
        yield label, str(redact(_model(reward.models[role])))
    over = {"mean": ", mean per token", "sum": ", sum"}[reward.reduction]
    yield "reward", f"{_formula(data)}{over if reward.is_per_token else ''}"
    yield "domain prompts", str(redact(reward.prompt_pack or "none"))
    routing = reward.routing
    details = {
        "adaptive": f", threshold {routing.threshold:g}, else {routing.fallback}",
        "fixed": f", {routing.domain}",
    }
    yield "router", f"{routing.mode}{details.get(routing.mode, '')}"
    yield "chat template", str(redact(reward.encoding.template))
    pairs, window = config.pairs, config.pairs.length_window
    within = [f"{window.tokens} tokens"] if window.tokens is not None else []
    within += [f"ratio {window.ratio:g}"] if window.ratio is not None else []
    yield "rejected", f"{pairs.rejected}, length window {' and '.join(within) or 'open'}"
    yield "least margin", f"{pairs.min_margin:g} {data.unit}"
    yield "validation split", f"{pairs.validation_fraction:.0%} of prompts, by hash"


def _model(model: ModelSpec) -> str:
    text = model.path if model.revision is None else f"{model.path} at {model.revision}"
    if model.adapter is not None:
        revision = f" at {model.adapter_revision}" if model.adapter_revision else ""
        text += f", adapter {model.adapter}{revision}"
    return f"{text} ({model.engine}, {model.dtype})"


def _came(data: ReportData) -> Iterator[tuple[str, str]]:
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
    if summary.tokens and summary.scoring_s:
        speed = (
            f", {summary.tokens / summary.scoring_s:,.0f} tokens/s, "
            f"{summary.prompts / summary.scoring_s:,.2g} prompts/s"
        )
    yield "scoring", f"{summary.tokens:,} tokens in {summary.scoring_s:,.0f} s{speed}"
    yield "wall time", f"{summary.wall_s:,.0f} s"
    yield "engine", ", ".join(data.engine_versions) or "–"
    if data.run.error:
        yield "problem", data.run.error


# --- plots ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plot:
    svg: Markup
    caption: str


@dataclass(frozen=True)
class _DomainPlots:
    name: str
    plots: list[_Plot]


def _plots(name: str, place: int, data: ReportData) -> list[_Plot]:
    domain, summary = data.domains[name], data.summary.domains[name]
    found = []
    if domain.rewards is not None:
        spread = _spread(summary.reward_quantiles, data.unit)
        found.append(
            _Plot(
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
            _Plot(
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
            _Plot(
                draw_histogram(
                    domain.confidence, axis="router's confidence", rows="prompts",
                    key=f"c{place}", label=f"Histogram of the router's confidence: {told}",
                ),
                f"Router's confidence: {told}",
            )
        )  # fmt: skip
    return found


def _length_plot(
    domain: DomainReport, summary: DomainSummary, place: int, data: ReportData
) -> _Plot:
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
    return _Plot(svg, f"Above the line chosen is longer{some}: {told}{explained}")


def _spread(quantiles: Sequence[float], unit: str) -> str:
    low, _, middle, _, high = quantiles
    return f"median {_number(middle)}, middle 90 % from {_number(low)} to {_number(high)} {unit}"


# --- what next -----------------------------------------------------------------------------------


def _commands(data: ReportData) -> Iterator[tuple[str, str]]:
    run_id = data.run.run_id
    yield (
        "Ask the table yourself (SQL)",
        "SELECT domain, prompt_id, margin, chosen_num_tokens, rejected_num_tokens,\n"
        "       chosen[0].content AS chosen, rejected[0].content AS rejected\n"
        f"FROM {data.preferences}\nWHERE run_id = '{run_id}' ORDER BY margin LIMIT 20",
    )
    yield (
        "Other pairs from the same rewards (scores nothing)",
        "spark-submit --properties-file conf/cluster/local.conf jobs/annotate.py --config YOURS "
        "\\\n    --set pairs.min_margin=1.0 --set pairs.length_window.ratio=1.2",
    )
    if data.config.reward.reduction == "sum":
        yield (
            "The same reward per token (scores nothing)",
            "spark-submit --properties-file conf/cluster/local.conf jobs/annotate.py "
            "--config YOURS \\\n    --set reward.reduction=mean",
        )
    if data.ui_command:
        yield "This run in MLflow", data.ui_command
    yield "Build this page again", data.rebuild
