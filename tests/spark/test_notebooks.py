"""Notebooks run from top to bottom on a small warehouse, and are kept without outputs.

The cells are run in this process and its Spark session: a kernel of their own would start another
JVM for what the cells say just the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from pyspark.sql import SparkSession

from tests.spark.annotated import Annotated

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def cells_of(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = cells_of(path)
    assert cells[0]["cell_type"] == "markdown"
    assert "On Databricks" in "".join(cells[0]["source"])
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(
    spark: SparkSession,
    annotated: Annotated,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CDR_WAREHOUSE", str(annotated.warehouse))
    mpl.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(cells_of(path)):
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
        figures = len(plt.get_fignums())
    finally:
        plt.close("all")
    said = capsys.readouterr().out
    latest = annotated.latest("preferences")
    assert figures == 2
    assert latest[0]["run_id"] in said
    assert f"{len(latest):,}   without a pair" in said
    assert latest[0]["prompt"][-1]["content"][:40] in said or "LEAST SURE" in said
    assert "special_token_in_text" in said
