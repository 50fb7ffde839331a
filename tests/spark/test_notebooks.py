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

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def cells_of(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.fixture
def said(
    spark: SparkSession,
    annotated: Annotated,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, dict[str, Any], int]:
    """Run the notebook that the test names: what it printed, its names, its figures."""
    path = FOLDER / f"{request.param}.ipynb"
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
    return capsys.readouterr().out, names, figures


@pytest.mark.parametrize("said", ["first_look"], indirect=True)
def test_first_look_shows_the_latest_run(
    annotated: Annotated, said: tuple[str, dict[str, Any], int]
) -> None:
    text, names, figures = said
    pairs = annotated.latest("preferences")
    assert names["run"]["run_id"] == pairs[0]["run_id"]
    assert names["summary"].pairs == len(pairs)
    assert len(names["chosen"]) == len(pairs)
    surest = max(pairs, key=lambda row: row["margin"])
    shown = text.split("SUREST\n")[1]
    assert shown.split("PROMPT    ")[1].startswith(surest["prompt"][-1]["content"])
    assert shown.split("CHOSEN    ")[1].startswith(surest["chosen"][0]["content"])
    assert "special_token_in_text" in text
    assert figures == 2


@pytest.mark.parametrize("said", ["own_domain"], indirect=True)
def test_own_domain_scores_a_sample_with_the_changed_pack_and_writes_no_table(
    annotated: Annotated, said: tuple[str, dict[str, Any], int]
) -> None:
    text, names, figures = said
    found, domain = names["found"], names["DOMAIN"]
    stored = {row["reward"] for row in annotated.latest("rewards") if row["domain"] == domain}
    assert set(found["before"]) <= stored
    assert len(found) >= 3
    assert not (found["before"] == found["after"]).any()  # the stub's numbers are of the prompt's
    assert names["ADDED"] in text.split("[user]")[1]
    assert f"another best answer for {len(names['moved'])} of" in text
    assert figures == 1


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = cells_of(path)
    assert "**On Databricks**" in "".join(cells[0]["source"])
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
