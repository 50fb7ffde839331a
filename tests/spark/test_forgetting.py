"""A forgotten prompt is in no table; what it shared with others is; the receipt is true.

What has to go is worked out here from the rows as another reader gives them.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from cdr.errors import InputError, TableError
from cdr.forgetting import BY_ID, NO_PROMPTS, Forgetting, Receipt, Request
from cdr.maintenance import compact
from cdr.tables import (
    BENCHMARK_PAIRS,
    BENCHMARK_RESULTS,
    COMPLETIONS,
    LOGPROBS,
    POLICY_RESULTS,
    PREFERENCES,
    REWARDS,
    ROUTES,
    STUDY_PAIRS,
    TABLES,
    VERDICTS,
    Table,
)
from cdr.warehouse import Warehouse
from jobs.maintain import main
from tests.spark.annotated import Annotated

Key = tuple[str, bytes, bytes]


@dataclass(frozen=True)
class Place:
    """A copy of the annotated warehouse, where p0, p5 and `twin` were sampled and judged too."""

    annotated: Annotated
    warehouse: Warehouse

    def rows(self, table: Table) -> list[dict[str, Any]]:
        return self.annotated.rows(table.name)

    def forget(self, *ids: str, **more: Any) -> Receipt:
        with Forgetting(self.warehouse, Request(prompt_ids=ids, **more)) as forgetting:
            return forgetting.carry_out(forgetting.plan())


@pytest.fixture(scope="module")
def whole(
    spark: SparkSession, annotated: Annotated, tmp_path_factory: pytest.TempPathFactory
) -> Annotated:
    """The annotated warehouse with samples and verdicts, only to be read."""
    copy = annotated.copy(tmp_path_factory.mktemp("whole"))
    warehouse = Warehouse(spark, str(copy.warehouse))
    judged = copy.rows("rewards")
    rewards = {row["prompt_id"]: row for row in judged}
    sampled = [
        {
            "dataset": "demo", "prompt_id": name, "completion_id": f"{name}-1",
            "prompt": rewards[name]["prompt"], "completion": "as sampled",
            "finish_reason": "stop", "num_tokens": 2, "seed": 1, "sampling_key": "k",
            "run_id": "r",
        }
        for name in ("p0", "p5", "twin")
    ]  # fmt: skip
    key = {"dataset": "demo", "reward_key": "k"}
    # As if a judge had been asked what the models were asked, once for all answers to it.
    verdicts = [
        {"model_key": model, "prefix_hash": prefix, "verdict": "A", "run_id": "r"}
        for model, prefix in sorted(questions_of(judged))
    ]
    for table, known in (
        (COMPLETIONS, sampled),
        (BENCHMARK_PAIRS, [{**key, "prompt_id": name} for name in ("p0", "p5", "twin")]),
        (BENCHMARK_RESULTS, [{**key, "level": "overall"}]),
        (VERDICTS, verdicts),
        (STUDY_PAIRS, [{"dataset": "demo", "study": "s"}]),
        (POLICY_RESULTS, [{"study": "s", "row": "start"}]),
    ):
        values = [tuple(row.get(name) for name in table.names()) for row in known]
        warehouse.append(table, spark.createDataFrame(values, table.schema()).coalesce(1))
    return copy


@pytest.fixture
def place(spark: SparkSession, whole: Annotated, tmp_path: Path) -> Place:
    copy = whole.copy(tmp_path)
    return Place(copy, Warehouse(spark, str(copy.warehouse)))


def keys_of(rewards: list[dict[str, Any]]) -> set[Key]:
    return {
        (term["model_key"], bytes(term["prefix_hash"]), bytes(term["completion_hash"]))
        for row in rewards
        for term in (row["terms"] or {}).values()
    }


def key_of(row: Mapping[str, Any]) -> Key:
    return row["model_key"], bytes(row["prefix_hash"]), bytes(row["completion_hash"])


def questions_of(rewards: list[dict[str, Any]]) -> set[tuple[str, bytes]]:
    return {(model, prefix) for model, prefix, _ in keys_of(rewards)}


def test_every_table_is_thought_of() -> None:
    assert {*BY_ID, ROUTES, LOGPROBS, VERDICTS, *NO_PROMPTS} == set(TABLES)


@dataclass(frozen=True)
class Forgotten:
    """A warehouse in which `GONE` and an id that nobody has were forgotten; rows and versions."""

    place: Place
    begun: dt.datetime
    before: dict[str, list[dict[str, Any]]]
    after: dict[str, list[dict[str, Any]]]
    versions_before: dict[str, int]
    versions_after: dict[str, int]
    receipt: Receipt


GONE = {"p0", "p3", "p5", "lonely"}


@pytest.fixture(scope="module")
def forgotten(
    spark: SparkSession, whole: Annotated, tmp_path_factory: pytest.TempPathFactory
) -> Forgotten:
    copy = whole.copy(tmp_path_factory.mktemp("forgotten"))
    place = Place(copy, Warehouse(spark, str(copy.warehouse)))
    nobodys = ("m" * 64, bytes(16), bytes(16), -1.0, 1, 1, None, "v", "r")
    place.warehouse.append(LOGPROBS, spark.createDataFrame([nobodys], LOGPROBS.schema()))
    reports = copy.warehouse / "reports"
    reports.mkdir(exist_ok=True)
    run_id = min(row["run_id"] for row in copy.rows("runs") if row["dataset"] == "demo")
    for name in (run_id, f"{run_id}-and-2-more", "of-another-run"):
        (reports / f"{name}.html").write_text("as sampled")
    before = {table.name: place.rows(table) for table in TABLES}
    versions = {table.name: copy.version(table.name) for table in TABLES}
    begun = dt.datetime.now(dt.UTC).replace(microsecond=0)
    receipt = place.forget(*GONE, "nobody")
    return Forgotten(
        place,
        begun,
        before,
        {table.name: place.rows(table) for table in TABLES},
        versions,
        {table.name: copy.version(table.name) for table in TABLES},
        receipt,
    )


def test_a_forgotten_prompt_is_in_no_table_and_nothing_else_is_gone(forgotten: Forgotten) -> None:
    before, after, receipt = forgotten.before, forgotten.after, forgotten.receipt
    rewards = before["rewards"]
    mine = [row for row in rewards if row["prompt_id"] in GONE]
    others = [row for row in rewards if row["prompt_id"] not in GONE]
    keys = keys_of(mine) - keys_of(others)
    questions = questions_of(mine) - questions_of(others)
    hashes = {row["prompt_hash"] for row in mine} - {row["prompt_hash"] for row in others}
    # The twin has the prompt and the completions of p0, and keeps what is theirs in common.
    assert keys
    assert keys_of(mine) & keys_of(others)
    assert len(hashes) == 3
    expected = {
        "logprobs": [row for row in before["logprobs"] if key_of(row) not in keys],
        "verdicts": [
            row
            for row in before["verdicts"]
            if (row["model_key"], bytes(row["prefix_hash"])) not in questions
        ],
        "routes": [row for row in before["routes"] if row["prompt_hash"] not in hashes],
        "runs": before["runs"],
    }
    expected |= {
        table.name: [row for row in before[table.name] if row["prompt_id"] not in GONE]
        for table in BY_ID
    }
    for name, rows in expected.items():
        assert sorted(map(repr, after[name])) == sorted(map(repr, rows)), name
        is_touched = len(rows) < len(before[name])
        assert is_touched == (name != "runs"), f"{name} had nothing to forget"
    everything = repr(after)
    texts = [row["prompt"][0]["content"] for row in mine if row["prompt_id"] != "p0"]
    texts += [row["completion"] for row in mine if row["prompt_id"] != "p0"]
    assert not [text for text in texts if text in everything]

    counted = {table.table: table.rows for table in receipt.tables}
    assert counted == {
        name: len(before[name]) - len(rows) for name, rows in expected.items() if name != "runs"
    }
    shared = {table.table: table.kept_shared for table in receipt.tables}
    assert shared["logprobs"] == len(keys_of(mine) & keys_of(others))
    assert shared["verdicts"] == len(questions_of(mine) & questions_of(others)) > 0
    kept_hash = {row["prompt_hash"] for row in mine} - hashes
    assert shared["routes"] == sum(row["prompt_hash"] in kept_hash for row in before["routes"]) > 0
    assert receipt.num_found == 4
    assert (receipt.unclaimed, receipt.unclaimed_deleted) == (1, False)

    reports = forgotten.place.annotated.warehouse / "reports"
    assert [page.name for page in reports.iterdir()] == ["of-another-run.html"]
    assert len(receipt.pages) == 2


def test_the_receipt_names_the_versions_that_still_hold_the_rows_and_until_when(
    forgotten: Forgotten,
) -> None:
    annotated, receipt = forgotten.place.annotated, forgotten.receipt
    file = annotated.warehouse / "_receipts" / f"forget-{receipt.receipt_id}.json"
    stored = json.loads(file.read_text())
    assert (stored["outcome"], stored["num_found"]) == ("done", len(GONE))
    assert stored["prompt_ids_sha256"] == [
        hashlib.sha256(name.encode()).hexdigest() for name in sorted({*GONE, "nobody"})
    ]
    assert '"p5"' not in file.read_text()
    for table in receipt.tables:
        assert table.rows
        assert table.version_before == forgotten.versions_before[table.table]
        assert table.version_after == forgotten.versions_after[table.table]
        assert table.version_after is not None
        assert table.version_after > table.version_before
        assert table.oldest_version == 0
        for text, days in ((table.files_gone_after, 7), (table.log_gone_after, 30)):
            assert text is not None
            then = dt.datetime.fromisoformat(text) - dt.timedelta(days=days)
            assert forgotten.begun <= then <= dt.datetime.now(dt.UTC)
    old = annotated.rows("preferences", forgotten.versions_before["preferences"])
    assert any(row["prompt_id"] == "p5" for row in old), "an old version has it still"
    # Delta's log keeps the conditions of what it was asked to do.
    log = annotated.warehouse / "preferences" / "_delta_log"
    version = forgotten.versions_after["preferences"]
    commit = (log / f"{version:020}.json").read_text().splitlines()
    info = next(line for line in commit if "commitInfo" in line)
    assert "p5" not in info
    assert not (annotated.warehouse / "_staging").exists() or not list(
        (annotated.warehouse / "_staging").iterdir()
    )


def test_rows_that_belong_to_nobody_go_when_that_is_asked_for(forgotten: Forgotten) -> None:
    place = forgotten.place
    receipt = place.forget("p6", unclaimed=True)
    assert (receipt.unclaimed, receipt.unclaimed_deleted) == (1, True)
    untouched = {table.table for table in receipt.tables if not table.rows}
    assert "rejects" in untouched
    assert {table.table for table in receipt.tables if table.version_after is None} == untouched
    # All that is left belongs to somebody.
    assert {key_of(row) for row in place.rows(LOGPROBS)} == keys_of(place.annotated.rows("rewards"))


def test_the_logs_of_the_tables_quote_hashes_and_run_ids_alone(whole: Annotated) -> None:
    quoted: dict[str, set[str]] = {}
    for file in whole.warehouse.glob("*/_delta_log/*.json"):
        added = [json.loads(line).get("add") for line in file.read_text().splitlines()]
        for stats in (json.loads(entry["stats"]) for entry in added if entry):
            found = quoted.setdefault(file.parts[-3], set())
            for kind in ("minValues", "maxValues"):
                found |= set(stats.get(kind, {}))
    assert set(quoted) == {table.name for table in TABLES}
    assert quoted.pop("rewards") == {"prompt_hash", "run_id"}
    assert all(names <= {"prompt_hash", "run_id"} for names in quoted.values())


def test_a_dry_run_says_what_would_go_and_nothing_goes(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("p5\n\n  p6  \n")
    before = {table.name: place.annotated.version(table.name) for table in TABLES}
    command = ["forget", "--warehouse", str(place.annotated.warehouse)]
    assert main([*command, "--prompt-ids-file", str(ids), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 prompt ids have rows, in every dataset" in printed
    assert before == {table.name: place.annotated.version(table.name) for table in TABLES}
    assert not (place.annotated.warehouse / "_receipts").exists()
    pairs = [row for row in place.rows(PREFERENCES) if row["prompt_id"] in ("p5", "p6")]
    (line,) = [line for line in printed.splitlines() if line.startswith("preferences")]
    assert line.split()[1] == str(len(pairs))


def sampled(spark: SparkSession, folder: Path, *datasets: str) -> Place:
    """A warehouse that has samples of p5 and p6 in each dataset, and nothing else."""
    warehouse = Warehouse(spark, str(folder / "warehouse"))
    rows = [
        (name, prompt, f"{prompt}-1", None, [("user", "Hm?")], "Yes.", "stop", 2, 1, "k", "r")
        for name in datasets
        for prompt in ("p5", "p6")
    ]
    warehouse.append(COMPLETIONS, spark.createDataFrame(rows, COMPLETIONS.schema()))
    return Place(Annotated(folder / "warehouse", folder), warehouse)


def test_the_same_id_of_another_dataset_stays_when_one_is_named(
    spark: SparkSession, tmp_path: Path
) -> None:
    place = sampled(spark, tmp_path, "demo", "other", "demo.limit-20", "demo2", "xdemo")
    place.forget("p5", dataset="demo")
    left = {row["dataset"] for row in place.rows(COMPLETIONS) if row["prompt_id"] == "p5"}
    assert left == {"other", "demo2", "xdemo"}
    assert sum(row["prompt_id"] == "p6" for row in place.rows(COMPLETIONS)) == 5


def test_a_deletion_that_was_cut_off_is_finished_by_the_same_command(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_p5 = [t for t in BY_ID if any(row["prompt_id"] == "p5" for row in place.rows(t))]
    assert {PREFERENCES, COMPLETIONS, REWARDS} < set(of_p5)
    for table in {*TABLES} - {LOGPROBS, *of_p5}:  # they would only take time
        shutil.rmtree(place.annotated.warehouse / table.name)
    whole = Warehouse.change

    def change(self: Warehouse, table: Table, operation: Any) -> None:
        if table == PREFERENCES:
            raise RuntimeError("killed")
        whole(self, table, operation)

    monkeypatch.setattr(Warehouse, "change", change)
    with pytest.raises(RuntimeError, match="killed"):
        place.forget("p5")
    (receipt,) = (place.annotated.warehouse / "_receipts").iterdir()
    assert json.loads(receipt.read_text())["outcome"] == "begun"
    monkeypatch.undo()
    before = len(place.rows(LOGPROBS))
    done = place.forget("p5")
    assert done.outcome == "done"
    assert len(place.rows(LOGPROBS)) == before, "these had gone before"
    assert all("p5" not in {row["prompt_id"] for row in place.rows(table)} for table in of_p5)


def test_rows_that_another_run_writes_meanwhile_are_noticed(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = sampled(spark, tmp_path, "demo")
    whole = Warehouse.change

    def change(self: Warehouse, table: Table, operation: Any) -> None:
        whole(self, table, operation)
        sampled(spark, tmp_path, "demo")

    monkeypatch.setattr(Warehouse, "change", change)
    with pytest.raises(TableError, match="'completions' has rows of these prompts again"):
        place.forget("p5")


def test_rows_marked_as_deleted_are_taken_out_of_the_tables_files(
    spark: SparkSession, tmp_path: Path
) -> None:
    place = sampled(spark, tmp_path, "demo")
    name = place.warehouse.sql_name(COMPLETIONS)
    spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    compact(place.warehouse, COMPLETIONS)  # both rows in one file, so that one is marked in it
    place.forget("p5")
    # Whoever reads the table's files alone must not find the row.
    files = place.warehouse.delta(COMPLETIONS).toDF().inputFiles()
    assert [row["prompt_id"] for row in spark.read.parquet(*files).collect()] == ["p6"]


def test_without_ids_nothing_is_done(whole: Annotated, tmp_path: Path) -> None:
    command = ["forget", "--warehouse", str(whole.warehouse)]
    with pytest.raises(InputError, match="no prompt ids"):
        main(command)
    with pytest.raises(InputError, match="cannot be read"):
        main([*command, "--prompt-ids-file", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no table to look after"):
        main(["forget", "--warehouse", str(tmp_path / "empty"), "--prompt-id", "p5"])
