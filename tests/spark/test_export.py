"""Exports hold the pairs that were asked for, once, and say truly where they came from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from cdr.errors import InputError, TableError
from cdr.export import PairSet, Target, export_pairs, find_pairs
from cdr.tables import PREFERENCES
from cdr.warehouse import Warehouse
from jobs.export import main
from tests.spark.annotated import REWARD, Annotated


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> list[str]:
    """All names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def warehouse(spark: SparkSession, annotated: Annotated) -> Warehouse:
    return Warehouse(spark, str(annotated.warehouse))


@pytest.fixture
def plain(warehouse: Warehouse) -> PairSet:
    return find_pairs(warehouse, dataset="demo", reward="plain")


def pairs_of(annotated: Annotated, reward: str) -> dict[str, dict[str, Any]]:
    return {r["prompt_id"]: r for r in annotated.rows("preferences") if r["reward_name"] == reward}


def test_the_job_writes_a_file_per_split_that_holds_each_pair_once(
    annotated: Annotated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exports" / "demo"
    arguments = ["--warehouse", str(annotated.warehouse), "--dataset", "demo", "--reward", "plain"]
    assert main([*arguments, "--to", str(folder), "--with", "prompt_id,domain"]) == 0
    assert names(folder) == ["manifest.json", "train.jsonl", "validation.jsonl"]
    assert names(tmp_path / "exports") == ["demo"], "something is left beside it"
    expected = pairs_of(annotated, "plain")
    found = {split: read_lines(folder / f"{split}.jsonl") for split in ("train", "validation")}
    assert sorted(row["prompt_id"] for rows in found.values() for row in rows) == sorted(expected)
    for split, rows in found.items():
        assert [expected[row["prompt_id"]]["split"] for row in rows] == [split] * len(rows)
        hashes = [expected[row["prompt_id"]]["prompt_hash"] for row in rows]
        assert hashes == sorted(hashes)
        for row in rows:
            columns = ("prompt", "chosen", "rejected", "prompt_id", "domain")
            # This reward has no domains: a null is written as one.
            assert row == {name: expected[row["prompt_id"]][name] for name in columns}
    assert f"{len(found['train'])}" in capsys.readouterr().out


def test_the_manifest_says_where_the_pairs_came_from(
    spark: SparkSession, warehouse: Warehouse, annotated: Annotated, tmp_path: Path
) -> None:
    newest = max(annotated.rows("preferences"), key=lambda row: row["run_id"])
    pairs = find_pairs(warehouse, dataset="demo", reward=newest["reward_key"][:16])
    export_pairs(warehouse, pairs, Target(str(tmp_path / "out")))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    source = manifest["source"]
    assert source["version"] == annotated.version("preferences")
    for name in ("dataset", "reward_name", "reward_key", "selection_key", "run_id"):
        assert source[name] == newest[name]
    assert (source["mlflow_run_id"], source["reward_name"]) == (None, REWARD)
    messages = "array<struct<role:string,content:string>>"
    assert manifest["columns"] == dict.fromkeys(("prompt", "chosen", "rejected"), messages)
    rows = annotated.latest("preferences")
    counted = Counter((row["split"], row["domain"]) for row in rows)
    assert {
        (split, domain): count
        for split, domains in manifest["pairs"].items()
        for domain, count in domains.items()
    } == counted
    for file in manifest["files"]:
        content = (tmp_path / "out" / file["name"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["bytes"] == len(content)
    again = spark.sql(manifest["query"]).collect()
    assert sorted(row["prompt_id"] for row in again) == sorted(row["prompt_id"] for row in rows)


def test_the_same_version_gives_the_same_bytes_and_an_old_one_what_it_held(
    spark: SparkSession, annotated: Annotated, tmp_path: Path
) -> None:
    copy = annotated.copy(tmp_path)
    warehouse = Warehouse(spark, str(copy.warehouse))
    pairs = find_pairs(warehouse, dataset="demo", reward="plain")
    first = export_pairs(warehouse, pairs, Target(str(tmp_path / "a")))
    # The next run of this reward replaces its pairs: all but one are gone.
    rows = spark.createDataFrame(
        warehouse.read(PREFERENCES).where("reward_name = 'plain'").orderBy("prompt_id").take(1),
        PREFERENCES.schema(),
    )
    keys = {"dataset": "demo", "reward_key": pairs.reward_key}
    warehouse.replace(PREFERENCES, rows, **keys, selection_key=pairs.selection_key)
    assert find_pairs(warehouse, dataset="demo", reward="plain").pairs == 1
    then = find_pairs(warehouse, dataset="demo", reward="plain", version=pairs.version)
    assert then == pairs
    second = export_pairs(warehouse, then, Target(str(tmp_path / "b")))
    assert second.files == first.files
    assert first.files
    with pytest.raises(TableError, match=r"version 99 .* cannot be read(.|\n)*DESCRIBE HISTORY"):
        find_pairs(warehouse, dataset="demo", version=99)


def test_layouts_hold_the_same_texts(
    warehouse: Warehouse, plain: PairSet, annotated: Annotated, tmp_path: Path
) -> None:
    expected = pairs_of(annotated, "plain")
    columns = {}
    for layout in ("conversations", "text"):
        target = Target(str(tmp_path / layout), layout=layout, extra=["prompt_id"])  # type: ignore[arg-type]
        columns[layout] = list(export_pairs(warehouse, plain, target).columns)
    assert columns == {
        "conversations": ["chosen", "rejected", "prompt_id"],
        "text": ["prompt", "chosen", "rejected", "prompt_id"],
    }
    for row in read_lines(tmp_path / "conversations" / "train.jsonl"):
        pair = expected[row["prompt_id"]]
        assert row["chosen"] == [*pair["prompt"], *pair["chosen"]]
        assert row["rejected"] == [*pair["prompt"], *pair["rejected"]]
    for row in read_lines(tmp_path / "text" / "train.jsonl"):
        pair = expected[row["prompt_id"]]
        for name in ("prompt", "chosen", "rejected"):
            assert [row[name]] == [message["content"] for message in pair[name]]


def test_parquet_in_parts_loads_as_splits(
    warehouse: Warehouse, plain: PairSet, annotated: Annotated, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    manifest = export_pairs(warehouse, plain, Target(str(folder), format="parquet", parts=3))
    train = [file.name for file in manifest.files if file.split == "train"]
    assert train == [f"train-0000{i}-of-0000{len(train)}.parquet" for i in range(len(train))]
    assert len(train) > 1
    assert names(folder) == sorted([*(file.name for file in manifest.files), "manifest.json"])

    from datasets import load_dataset

    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    expected = Counter(pair["split"] for pair in pairs_of(annotated, "plain").values())
    assert {name: len(rows) for name, rows in loaded.items()} == expected
    assert sum(pq.read_metadata(folder / name).num_rows for name in train) == expected["train"]


def test_an_export_loads_in_trl_unchanged(
    warehouse: Warehouse, plain: PairSet, annotated: Annotated, tmp_path: Path
) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    export_pairs(warehouse, plain, Target(str(tmp_path / "out")))
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for rows in loaded.values():
        assert rows.column_names == ["prompt", "chosen", "rejected"]
        for row in rows:
            assert is_conversational(row)
            assert [message["role"] for message in row["chosen"]] == ["assistant"]


def test_what_matches_nothing_or_several_is_listed(warehouse: Warehouse) -> None:
    with pytest.raises(InputError) as error:
        find_pairs(warehouse, dataset="dmeo")
    text = str(error.value)
    assert "no pairs match dataset 'dmeo'" in text
    assert text.count(REWARD) == 2  # by both versions of the pack
    assert "plain" in text
    with pytest.raises(
        InputError, match=f"2 sets of pairs match dataset 'demo', reward '{REWARD}'"
    ):
        find_pairs(warehouse, dataset="demo", reward=REWARD)
    with pytest.raises(InputError, match="no pairs match dataset 'demo', selection 'abcdefg'"):
        find_pairs(warehouse, dataset="demo", selection="abcdefg")


def test_a_warehouse_without_pairs_is_named(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no preferences in this warehouse"):
        find_pairs(Warehouse(spark, str(tmp_path)), dataset="demo")


def test_only_an_export_is_replaced_and_only_when_told(
    warehouse: Warehouse, plain: PairSet, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export_pairs(warehouse, plain, Target(str(folder), parts=2))
    before = names(folder)
    with pytest.raises(InputError, match="the folder is not empty"):
        export_pairs(warehouse, plain, Target(str(folder)))
    assert names(folder) == before
    export_pairs(warehouse, plain, Target(str(folder), overwrite=True))
    assert names(folder) == ["manifest.json", "train.jsonl", "validation.jsonl"]
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"what no export has written, such as thesis\.txt"):
        export_pairs(warehouse, plain, Target(str(folder), overwrite=True))
    assert (folder / "thesis.txt").exists()
    assert names(tmp_path) == ["out"]


def test_what_cannot_be_written_is_refused_before_anything_is(
    spark: SparkSession, annotated: Annotated, tmp_path: Path
) -> None:
    copy = annotated.copy(tmp_path)
    warehouse = Warehouse(spark, str(copy.warehouse))
    warehouse_name = warehouse.sql_name(PREFERENCES)
    spark.sql(
        f"UPDATE {warehouse_name} SET prompt = concat(prompt, chosen, prompt) "
        "WHERE reward_name = 'plain' AND prompt_id IN ('p4', 'p5')"
    )
    plain = find_pairs(warehouse, dataset="demo", reward="plain")
    with pytest.raises(InputError, match=r"2 of \d+ prompts have more than one message"):
        export_pairs(warehouse, plain, Target(str(tmp_path / "out"), layout="text"))
    with pytest.raises(InputError, match=r"no columns .'margn'.(.|\n)*margin"):
        export_pairs(warehouse, plain, Target(str(tmp_path / "out"), extra=["margn"]))
    assert names(tmp_path) == ["warehouse"]
