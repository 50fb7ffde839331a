"""The plots of a report page, as SVG to stand inside HTML.

Texts stay texts, colours are the page's own (`currentColor` and its CSS variables), so one picture
does for light and dark. The same numbers give the same bytes: no date, no program, no random id.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from cdr.report.data import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no CSS; these stand in for the page's colours until the SVG is written.
_INK, _MAIN, _FAINT = "#010203", "#010204", "#010205"
_COLOURS = {_INK: "currentColor", _MAIN: "var(--plot)", _FAINT: "var(--line)"}
_SIZE_IN = (3.0, 2.0)

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

    return _draw(paint, key, label)


def _draw(paint: Any, key: str, label: str) -> Markup:
    # The object interface alone: no global figure, no window, nothing to close.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes)
        axes.locator_params(axis="y", integer=True, nbins=5)
        axes.locator_params(axis="x", nbins=6)
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
