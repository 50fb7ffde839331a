"""Every shape of input gives one row per candidate, and every bad row its own reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession

from cdr.config import InputSpec
from cdr.errors import InputError
from cdr.inputs import input_version, read_candidates

USER = [{"role": "user", "content": "Why?"}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(spark: SparkSession, path: str, **options: Any) -> list[Row]:
    domains = options.pop("domains", None)
    source = InputSpec.model_validate({"path": path, "format": "json", **options})
    return read_candidates(spark, source, domains=domains).orderBy("completion").collect()


def reasons(rows: list[Row]) -> list[str | None]:
    return [row["reason"] for row in rows]


def test_all_layouts_of_the_same_data_give_the_same_candidates(
    spark: SparkSession, tmp_path: Path
) -> None:
    long = write(
        tmp_path / "long.jsonl",
        [{"prompt": "Why?", "completion": "Because."}, {"prompt": "Why?", "completion": "So."}],
    )
    array = write(tmp_path / "array.jsonl", [{"prompt": "Why?", "completion": ["Because.", "So."]}])
    messages = write(tmp_path / "m.jsonl", [{"prompt": USER, "completion": ["So.", "Because."]}])
    expected = [(r["prompt_id"], r["completion_id"], r["completion"]) for r in read(spark, long)]
    assert [text for _, _, text in expected] == ["Because.", "So."]
    for path in (array, messages):
        found = read(spark, path, layout="array")
        assert [(r["prompt_id"], r["completion_id"], r["completion"]) for r in found] == expected


def test_layout_ab_names_its_candidates_a_and_b(spark: SparkSession, tmp_path: Path) -> None:
    path = write(
        tmp_path / "ab.jsonl", [{"prompt": "Why?", "completion": "A!", "completion_b": "B!"}]
    )
    found = read(spark, path, layout="ab")
    assert [(r["completion_id"], r["completion"]) for r in found] == [("a", "A!"), ("b", "B!")]


def test_layout_joined_brings_prompts_to_completions_and_keeps_those_without_one(
    spark: SparkSession, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"id": "1", "prompt": "Why?"}])
    path = write(
        tmp_path / "c.jsonl", [{"id": "1", "completion": "A"}, {"id": "2", "completion": "B"}]
    )
    found = read(spark, path, layout="joined", prompts_path=prompts, columns={"prompt_id": "id"})
    assert reasons(found) == [None, "null_prompt"]


def test_prompts_that_stand_twice_are_refused_before_they_double_completions(
    spark: SparkSession, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"id": "1", "prompt": "a"}, {"id": "1", "prompt": "b"}])
    path = write(tmp_path / "c.jsonl", [{"id": "1", "completion": "A"}])
    with pytest.raises(InputError, match="same id more than once"):
        read(spark, path, layout="joined", prompts_path=prompts, columns={"prompt_id": "id"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "completion": "x"}, "null_prompt"),
        ({"prompt": [], "completion": "x"}, "empty_prompt"),
        ({"prompt": [{"role": "user", "content": "  "}], "completion": "x"}, "empty_prompt"),
        ({"prompt": [{"role": "robot", "content": "a"}], "completion": "x"}, "bad_messages"),
        ({"prompt": [{"role": "user", "content": None}], "completion": "x"}, "bad_messages"),
        (
            {"prompt": [*USER, {"role": "assistant", "content": "b"}], "completion": "x"},
            "bad_messages",
        ),
        ({"prompt": USER, "completion": None}, "null_completion"),
        ({"prompt": USER, "completion": " \n"}, "empty_completion"),
    ],
)
def test_a_bad_row_gets_its_reason_and_the_good_one_beside_it_none(
    spark: SparkSession, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    good = {"prompt": USER, "completion": "zzz"}
    found = read(spark, write(tmp_path / "in.jsonl", [row, good]))
    assert reasons(found) == [reason, None]
    assert all(r["detail"] for r in found if r["reason"])


def test_an_empty_array_of_completions_keeps_its_row(spark: SparkSession, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        [{"prompt": "a", "completion": []}, {"prompt": "b", "completion": ["x"]}],
    )
    assert reasons(read(spark, path, layout="array")) == ["null_completion", None]


def test_identical_candidates_get_ids_of_their_own(spark: SparkSession, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "same"}] * 3)
    found = read(spark, path)
    assert reasons(found) == [None] * 3
    assert len({row["completion_id"] for row in found}) == 3


def test_a_repeated_completion_id_is_refused_once_and_a_prompt_id_for_two_prompts_wholly(
    spark: SparkSession, tmp_path: Path
) -> None:
    columns = {"prompt_id": "id", "completion_id": "cid"}
    path = write(
        tmp_path / "in.jsonl",
        [
            {"id": "1", "prompt": "a", "cid": "x", "completion": "1"},
            {"id": "1", "prompt": "a", "cid": "x", "completion": "2"},
            {"id": "2", "prompt": "b", "cid": "x", "completion": "3"},
            {"id": "2", "prompt": "c", "cid": "y", "completion": "4"},
        ],
    )
    found = read(spark, path, columns=columns)
    assert reasons(found) == [None, "duplicate_id", "duplicate_id", "duplicate_id"]


def test_an_unknown_domain_is_refused_where_the_column_decides(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "a", "completion": "1", "d": "safety"},
            {"prompt": "b", "completion": "2", "d": "cooking"},
            {"prompt": "c", "completion": "3", "d": None},
        ],
    )
    found = read(spark, path, columns={"domain": "d"}, domains=("safety", "chat"))
    assert reasons(found) == [None, "unknown_domain", "unknown_domain"]


def test_a_system_column_becomes_the_system_message_where_it_is_set(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "a", "completion": "1", "sys": "Be brief."},
            {"prompt": "a", "completion": "2", "sys": None},
        ],
    )
    found = read(spark, path, columns={"system": "sys"})
    assert [[m["role"] for m in row["prompt"]] for row in found] == [["system", "user"], ["user"]]


def test_other_columns_are_kept_as_json(spark: SparkSession, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "1", "source": "web"}])
    (row,) = read(spark, path)
    assert json.loads(row["passthrough"]) == {"source": "web"}
    assert json.loads(row["row"])["completion"] == "1"


def test_missing_columns_are_named_with_those_that_are_there(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", [{"question": "a", "completion": "1"}])
    with pytest.raises(InputError, match=r"lacks the columns \['prompt'\]; it has") as caught:
        read(spark, path)
    assert "question" in str(caught.value)


def test_a_layout_that_does_not_fit_the_column_says_which_one_does(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": ["1"]}])
    with pytest.raises(InputError, match=r"is an array.*\n.*\n.*input.layout=array"):
        read(spark, path)


def test_a_prompt_column_of_another_type_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": 7, "completion": "1"}])
    with pytest.raises(InputError, match="must be a string or array"):
        read(spark, path)


def test_an_input_that_is_not_there_or_empty_or_of_another_format_is_refused(
    spark: SparkSession, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(spark, str(tmp_path / "nothing.jsonl"))
    parquet = str(tmp_path / "empty.parquet")
    spark.createDataFrame([], "prompt string, completion string").write.parquet(parquet)
    with pytest.raises(InputError, match="has no rows"):
        read(spark, parquet, format="parquet")
    with pytest.raises(InputError, match="cannot be read as delta"):
        read(spark, parquet, format="delta")


def test_delta_is_read_at_its_version(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "table")
    rows = spark.createDataFrame([("a", "1")], "prompt string, completion string")
    rows.write.format("delta").save(path)
    rows.write.format("delta").mode("append").save(path)
    source = InputSpec(path=path)
    assert input_version(spark, source) == 1
    pinned = source.model_copy(update={"version": 0})
    assert read_candidates(spark, pinned).count() == 1
    assert read_candidates(spark, source).count() == 2
