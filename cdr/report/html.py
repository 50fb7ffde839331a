"""The frame that all report pages share: one HTML file that loads nothing; how they write things.

Every text is escaped by the template engine, the completions' above all; a policy in the page
forbids scripts and every request besides. Light and dark follow the reader's system. A page's
template extends `frame.html.jinja`; pairs, findings and facts are drawn by `parts.html.jinja`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cdr.benchmark_report import show_interval, show_percent
from cdr.report.tokens import Piece, TokenRow
from cdr.report.verdict import Level

SUBMIT = "spark-submit --properties-file conf/cluster/local.conf"
"""How the commands that pages print begin."""

_TEXT_CHARACTERS = 3000
_HEAVIEST = 3  # on either side
_SHADES = (0.05, 0.25, 0.75, 2.0)
"""Nats per token from which a token has a colour, and the next darker ones."""

_MARKS = {Level.FINE: "fine", Level.LOOK: "look", Level.STOP: "stop"}
_OUTCOMES = {"over_threshold": "finished above a threshold"}


@dataclass(frozen=True)
class Plot:
    """A figure of a page.

    Args:
        svg: from `cdr.report.plots`.
        caption: what it says, with the numbers.
    """

    svg: Markup
    caption: str


def render(template: str, **values: object) -> str:
    """Write a page.

    Args:
        template: its file in this folder.
        values: what the template names.

    Returns:
        HTML, the same for the same values.
    """
    return _environment().get_template(template).render(**values)


def show_number(value: float | None, digits: int = 2) -> str:
    """Write a number with a true minus; `–` for None."""
    return "–" if value is None else _minus(f"{value:,.{digits}f}")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cdr.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.globals |= {"TEXT_CHARACTERS": _TEXT_CHARACTERS, "legend": list(_legend())}
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "explain": _explain,
        "heaviest": _heaviest,
        "interval": lambda value: show_interval(value) or "–",
        "mark": _MARKS.__getitem__,
        "number": show_number,
        "outcome": lambda value: _OUTCOMES.get(value, value),
        "percent": lambda value: "–" if value is None else f"{value:.0%}",
        "pick": lambda values, place: show_number(values[place] if values else None),
        "points": lambda value: _minus(f"{100 * value:+.1f}") if value else "0.0",
        "shade": _shade,
        "share": lambda value: show_percent(value) or "–",
        "shortened": _shortened,
        "signed": lambda value: _minus(f"{value:+.2f}"),
        "visible": lambda text: text.replace("\n", "⏎\n"),
    }
    return environment


def _minus(text: str) -> str:
    return text.replace("-", "−")


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
        f"{names[name]} {show_number(value)}"
        for name, value in zip(row.terms, piece.logprobs, strict=True)
    )
    return f"{_minus(f'{piece.reward:+.2f}')} nats ({terms})"


def _heaviest(row: TokenRow) -> list[Piece]:
    """Give the tokens that weigh most on either side, heaviest first."""
    ordered = sorted(row.pieces, key=lambda piece: piece.reward)
    ends = [piece for piece in ordered[:_HEAVIEST] if piece.reward <= -_SHADES[0]]
    ends += [piece for piece in ordered[-_HEAVIEST:] if piece.reward >= _SHADES[0]]
    return sorted(ends, key=lambda piece: -abs(piece.reward))
