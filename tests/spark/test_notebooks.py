"""Notebooks run from top to bottom on a small warehouse, and are kept without outputs.

The cells are run in this process and its Spark session: a kernel of their own would start another
JVM for what the cells say just the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from deltalake import DeltaTable
from matplotlib import pyplot as plt
from mlflow import MlflowClient
from pyspark.sql import SparkSession

from cdr.config import TrackingSpec
from cdr.evaluation_plan import plan_evaluation
from cdr.tracking import RunTracker
from cdr.warehouse import Warehouse
from jobs.evaluate import evaluate
from jobs.pair_study import study
from tests.spark.annotated import REWARD, Annotated
from tests.spark.conftest import MakeStore
from tests.spark.test_evaluate import GOOD, PLAIN, REWARDBENCH, make_config
from tests.spark.test_pair_study import MODELS
from tests.spark.test_pair_study import plan as plan_small_study
from tests.tiny_model import save_tiny_model
from tests.tokenizers import make_smollm2

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"

Said = tuple[str, dict[str, Any], int]


def cells_of(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.fixture
def execute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str, Path], Said]]:
    """Run a notebook on a warehouse: gives what it printed, its names, its number of figures."""

    def run(name: str, warehouse: Path) -> Said:
        path = FOLDER / f"{name}.ipynb"
        monkeypatch.setenv("CDR_WAREHOUSE", str(warehouse))
        capsys.readouterr()
        names: dict[str, Any] = {"__name__": "__main__"}
        for number, cell in enumerate(cells_of(path)):
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
        return capsys.readouterr().out, names, len(plt.get_fignums())

    mpl.use("agg")
    yield run
    plt.close("all")


def versions(warehouse: Path) -> dict[str, int]:
    """Tell the version of every table."""
    logs = warehouse.glob("*/_delta_log")
    return {log.parent.name: DeltaTable(str(log.parent)).version() for log in logs}


def test_first_look_shows_the_latest_run(
    annotated: Annotated, execute: Callable[[str, Path], Said]
) -> None:
    text, names, figures = execute("first_look", annotated.warehouse)
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


def test_own_domain_scores_a_sample_with_the_changed_pack_and_writes_no_table(
    annotated: Annotated, execute: Callable[[str, Path], Said]
) -> None:
    before = versions(annotated.warehouse)
    text, names, figures = execute("own_domain", annotated.warehouse)
    assert versions(annotated.warehouse) == before
    found, domain = names["found"], names["DOMAIN"]
    stored = {row["reward"] for row in annotated.latest("rewards") if row["domain"] == domain}
    assert set(found["before"]) <= stored
    assert len(found) >= 3
    assert not (found["before"] == found["after"]).any()  # the stub's numbers are of the prompt's
    assert names["ADDED"] in text.split("[user]")[1]
    assert f"another best answer for {len(names['moved'])} of" in text
    assert figures == 1


def test_choose_a_pair_says_what_the_tables_of_evaluations_and_a_study_say(
    spark: SparkSession, tmp_path: Path, execute: Callable[[str, Path], Said]
) -> None:
    make_smollm2().save_pretrained(tmp_path / "tokenizer")
    rows = {"plain": PLAIN, "cdr": {}}
    config = make_config(tmp_path, tmp_path / "tokenizer", GOOD, REWARDBENCH, rows=rows)
    warehouse = Warehouse(spark, config.warehouse)
    assert evaluate(plan_evaluation(config), warehouse) == 0
    assert study(plan_small_study(tmp_path, tracking={"enabled": False}), warehouse) == 0
    place = tmp_path / "warehouse"
    before = versions(place)

    text, names, figures = execute("choose_a_pair", place)

    assert figures == 5
    assert versions(place) == before
    stored = DeltaTable(str(place / "benchmark_pairs")).to_pandas()
    margins = stored.pivot(index="prompt_id", columns="reward_name", values="margin")
    everything = names["found"].differences["all pairs"]
    only = (
        (margins["plain"] > 0) & ~(margins["cdr"] > 0),
        ~(margins["plain"] > 0) & (margins["cdr"] > 0),
    )
    assert (everything.paired.only_a, everything.paired.only_b) == tuple(map(sum, only))
    assert everything.paired.only_a + everything.paired.only_b > 0
    # Its verdict on 12 pairs: a word per section and reward.
    assert text.count(" chance\n") == 2 * len(names["sections"])
    worst = margins["cdr"].nsmallest(3)
    assert list(names["worst"].index) == list(worst.index)
    rejected = {f"{row['subset']}/{row['id']}": row["rejected"] for row in GOOD}
    for prompt_id in worst.index:
        assert f"FAVOURED   {rejected[prompt_id]}\n" in text
    cells = (
        DeltaTable(str(place / "study_pairs")).to_pandas().set_index(["numerator", "denominator"])
    )
    assert names["models"] == list(MODELS)
    for (y, x), accuracy in names["np"].ndenumerate(names["accuracies"]):
        if x != y:
            assert accuracy == cells.loc[(MODELS[y], MODELS[x]), "accuracy"]
    assert "(3 pairs of models)" in text


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings(  # of MLflow and of the libraries under TRL
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_preferences_to_simpo_trains_on_the_latest_pairs_and_follows_the_links(
    spark: SparkSession,
    annotated: Annotated,
    make_store: MakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    execute: Callable[[str, Path], Said],
) -> None:
    pytest.importorskip("trl")
    for name in ("MLFLOW_TRACKING_URI", "DATABRICKS_RUNTIME_VERSION", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # The start model of conf/train/demo.yaml.
    save_tiny_model(tmp_path / "cache" / "models" / "smollm2-135m-instruct")
    monkeypatch.setenv("CDR_CACHE", str(tmp_path / "cache"))
    mine = annotated.copy(tmp_path)
    folder = str(mine.warehouse)
    make_store(mine.warehouse)
    # As an annotate run with tracking would have left the table.
    with RunTracker(TrackingSpec(), folder, run_name="annotate", config={}) as annotate:
        pass
    spark.sql(f"UPDATE delta.`{folder}/preferences` SET mlflow_run_id = '{annotate.run_id}'")
    latest = mine.latest("preferences")
    version = mine.version("preferences")

    text, names, figures = execute("preferences_to_simpo", mine.warehouse)

    assert figures == 3
    assert mine.version("preferences") == version
    pairs = names["pairs"]
    assert (pairs.reward_name, pairs.run_id) == (REWARD, latest[0]["run_id"])
    assert (pairs.pairs, pairs.version) == (len(latest), version)
    assert f"gives {len(latest)} rows" in text
    # `twin` is p0 under another id: their pair is trained on once.
    trained = {row["prompt_hash"] for row in latest if row["split"] == "train"}
    assert names["metrics"]["data"]["train_pairs"] == len(trained)
    assert f"as the chat template has it: {len(trained)} of {len(trained)} pairs" in text
    assert "trained on the very files that you looked at: True" in text
    (training,) = [row for row in mine.rows("runs") if row["job"] == "train_simpo"]
    assert training["outcome"] == "done"
    link = f"cdr.training.{training['mlflow_run_id']}"
    assert f"{link} = {training['run_id']}" in text
    assert MlflowClient(annotate.uri).get_run(annotate.run_id).data.tags[link] == training["run_id"]
    (left, *_) = names["figure"].axes
    steps = names["metrics"]["points"][names["metrics"]["best"]]["training"]["loss"]
    assert list(left.lines[0].get_ydata()) == pytest.approx(
        [entry["loss"] for entry in steps], abs=1e-4
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = cells_of(path)
    assert "**On Databricks**" in "".join(cells[0]["source"])
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
