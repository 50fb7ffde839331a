"""Tables of text line up, and sizes are written in three digits."""

from __future__ import annotations

import pytest

from cdr.text_table import format_bytes, render_table


def test_numbers_stand_to_the_right_and_nothing_is_a_dash() -> None:
    rows = [("a", 1234, 2.5, "7%"), ("longer", None, -10.0, "100%")]
    assert render_table(("name", "rows", "mean", "share"), rows) == [
        "name     rows   mean  share",
        "a       1,234    2.5     7%",
        "longer      -  -10.0   100%",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert render_table(("name", "rows"), []) == ["name  rows"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (123_456, "123 kB"),
        (999_499, "999 kB"), (999_500, "1.00 MB"), (-2_000_000_000, "-2.00 GB"),
        (5e18, "5000 PB"),
    ],
)  # fmt: skip
def test_sizes(number: float, text: str) -> None:
    assert format_bytes(number) == text
