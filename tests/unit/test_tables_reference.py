"""The reference page of the tables says what the schemas say, and the schemas say enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdr.tables import TABLES, Table, render_reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "tables.md"
table_by_name = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)


def test_page_is_what_the_schemas_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), (
        "stale page: python -m cdr.tables > docs/reference/tables.md"
    )


@table_by_name
def test_page_has_a_row_for_every_column(table: Table) -> None:
    section = render_reference().split(f"## `{table.name}`\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    # A bare | in a comment would end the table's cell, and make more than three.
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert {len(row) for row in cells} == {3}
    assert [row[0].strip("`") for row in cells] == table.names()
    assert all(meaning.strip() for _, _, meaning in cells)


@table_by_name
def test_key_columns_come_first_and_partitions_are_columns(table: Table) -> None:
    assert table.names()[: len(table.key)] == list(table.key)
    assert set(table.partitioned_by) <= set(table.names())
