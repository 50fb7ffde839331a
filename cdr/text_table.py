"""Rows of text under a header, for a terminal: what jobs print and what errors list."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?((–| to )[-+]?[\d.,]+%?)?")


def render_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay out a table in columns: numbers, also as text, and ranges to the right, None as `-`.

    Args:
        header: a name per column.
        rows: their values; ints get thousands separators.

    Returns:
        Lines, the header first.
    """
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (list(header), *texts)
    ]


def format_bytes(number: float) -> str:
    """Write a size in three digits and decimal units: `0 B`, `12.3 kB`, `-1.20 GB`."""
    size, unit = float(number), 0
    # 999.5 of a unit would be rounded up to 1000 of it.
    while abs(size) >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    if unit == 0:
        return f"{size:.0f} B"
    return f"{size:.{2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0}f} {_UNITS[unit]}"


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
