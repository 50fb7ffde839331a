"""The plots of the report pages, as SVG to stand inside HTML.

Texts stay texts, colours are the page's own (`currentColor` and its CSS variables), so one picture
does for light and dark. The same numbers give the same bytes: no date, no program, no random id.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no CSS; these stand in for the page's colours until the SVG is written.
_INK, _MAIN, _OTHER = "#010203", "#010204", "#010205"
_COLOURS = {_INK: "currentColor", _MAIN: "var(--plot)", _OTHER: "var(--other)"}
_SIZE_IN = (3.0, 2.0)
_LINE_IN = 0.22
_MAX_NAME = 26

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cdr",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of one width.

    Args:
        low: left edge of the first bin.
        high: right edge of the last one.
        counts: per bin, left to right; the first and the last also hold what lies beyond.
    """

    low: float
    high: float
    counts: tuple[int, ...]

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.high - self.low) / len(self.counts)


@dataclass(frozen=True)
class ScoreLine:
    """One line of `draw_scores`.

    Args:
        name: what is scored.
        accuracy: 0 to 1.
        interval: 95 %; None: not drawn.
        longer_wins: what "the longer answer is better" reaches; None: not drawn.
        is_part: of the one above: drawn smaller.
    """

    name: str
    accuracy: float
    interval: tuple[float, float] | None
    longer_wins: float | None = None
    is_part: bool = False


def draw_histogram(
    values: Histogram, *, axis: str, rows: str, key: str, label: str, zero: bool = False
) -> Markup:
    """Draw a histogram.

    Args:
        values: the counts.
        axis: what the horizontal axis shows, with its unit.
        rows: what is counted.
        key: unique in the page; starts every id inside.
        label: what a reader who does not see it is told.
        zero: mark 0 with a line.
    """

    def paint(axes: Axes) -> None:
        edges = [values.low + values.width * n for n in range(len(values.counts) + 1)]
        axes.stairs(values.counts, edges, fill=True, color=_MAIN)
        if zero and values.low < 0 < values.high:
            axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(values.low, values.high)
        axes.set_xlabel(axis)
        axes.set_ylabel(rows)
        _tick_numbers(axes)

    return _draw(paint, key, label)


def draw_lengths(sample: Sequence[tuple[int, int]], *, most: int, key: str, label: str) -> Markup:
    """Draw chosen against rejected lengths; dots above the line are pairs whose chosen is longer.

    Args:
        sample: (tokens of rejected, tokens of chosen).
        most: end of both axes.
        key: unique in the page; starts every id inside.
        label: what a reader who does not see it is told.
    """

    def paint(axes: Axes) -> None:
        end = most * 1.05
        axes.plot([0, end], [0, end], color=_INK, linewidth=0.8, linestyle=":")
        axes.plot(
            [x for x, _ in sample],
            [y for _, y in sample],
            linestyle="none",
            marker="o",
            markersize=4,
            markerfacecolor=_MAIN,
            markeredgewidth=0,
            alpha=0.75,
        )
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        axes.set_xlabel("tokens of rejected")
        axes.set_ylabel("tokens of chosen")
        _tick_numbers(axes)

    return _draw(paint, key, label)


def draw_mirrored(up: Histogram, down: Histogram, *, axis: str, key: str, label: str) -> Markup:
    """Draw two histograms with the same bins, one upwards and one downwards.

    Args:
        up: the pairs won.
        down: the pairs lost.
        axis: what the horizontal axis shows, with its unit.
        key: unique in the page; starts every id inside.
        label: what a reader who does not see it is told.
    """

    def paint(axes: Axes) -> None:
        edges = [up.low + up.width * n for n in range(len(up.counts) + 1)]
        axes.stairs(up.counts, edges, fill=True, color=_MAIN)
        axes.stairs([-count for count in down.counts], edges, fill=True, color=_OTHER)
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.set_xlim(up.low, up.high)
        most = max(1, *up.counts, *down.counts) * 1.1
        axes.set_ylim(-most, most)
        axes.set_xlabel(axis)
        axes.set_ylabel("pairs")
        for name, place in (("won", 0.98), ("lost", 0.02)):
            axes.text(0.99, place, name, transform=axes.transAxes, ha="right",
                      va="top" if place > 0.5 else "bottom")  # fmt: skip
        _tick_numbers(axes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")

    return _draw(paint, key, label)


def draw_scores(
    lines: Sequence[ScoreLine], *, key: str, label: str, width_in: float = 4.4
) -> Markup:
    """Draw accuracies with their intervals, one below the other, against the 50 % of a coin.

    Args:
        lines: from top to bottom; at least one.
        key: unique in the page; starts every id inside.
        label: what a reader who does not see it is told.
        width_in: of the picture; text is larger in a narrow one.
    """

    def paint(axes: Axes) -> None:
        places = range(len(lines))
        axes.axvline(50, color=_INK, linewidth=0.8, linestyle=":")
        for place, line in zip(places, lines, strict=True):
            if line.interval is not None:
                low, high = (100 * end for end in line.interval)
                axes.hlines(place, low, high, color=_MAIN, linewidth=1 if line.is_part else 2)
            # Drawn whole at the ends of the axis too.
            dot: dict[str, Any] = {"linestyle": "none", "clip_on": False}
            if line.longer_wins is not None:
                bar = {**dot, "marker": "|", "markersize": 9, "markeredgewidth": 2}
                axes.plot(100 * line.longer_wins, place, color=_OTHER, **bar)
            size = 3.5 if line.is_part else 5
            axes.plot(100 * line.accuracy, place, color=_MAIN, marker="o", markersize=size, **dot)
        # A name is the input's: a dollar sign in it is no formula.
        axes.set_yticks(places, [_cut(line.name) for line in lines], parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, %")

    return _draw(paint, key, label, size_in=(width_in, 0.6 + _LINE_IN * len(lines)))


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _tick_numbers(axes: Axes) -> None:
    axes.locator_params(axis="y", integer=True, nbins=5)
    axes.locator_params(axis="x", nbins=6)


def _draw(
    paint: Callable[[Axes], None], key: str, label: str, size_in: tuple[float, float] = _SIZE_IN
) -> Markup:
    # The object interface alone: no global figure, no window, nothing to close.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Texts stay texts: it is the reader's font that must have the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size_in, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        return _to_html(_to_svg(figure), key, label)


def _to_svg(figure: Figure) -> str:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return stream.getvalue()


def _to_html(svg: str, key: str, label: str) -> Markup:
    """Take off what only a file of its own needs, and fit the rest into a page."""
    svg = svg[svg.index("<svg") :]
    # Its style would be one for the whole page; `svg *` of the page's own says the same.
    for useless in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        svg = re.sub(useless, "", svg, flags=re.DOTALL)
    # Ids are the page's, and several plots have the same.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r"font-family: [^;\"]+; ", "", svg)
    svg = re.sub(r"\s+", " ", svg)
    opening, _, rest = svg.partition(">")
    box = re.search(r'viewBox="[^"]+"', opening)
    assert box is not None
    safe = escape(label)
    return Markup(f'<svg {box[0]} role="img" aria-label="{safe}">{rest.rstrip()}')
