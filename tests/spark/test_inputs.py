"""Every shape of input gives one row per candidate, and every bad row its own reason."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import ArithmeticException
from pyspark.sql import Row, SparkSession

from cdr.cli import explain_spark_error
from cdr.config import InputSpec
from cdr.errors import InputError
from cdr.inputs import read_candidates
from cdr.sources import input_version, reading
from cdr.unreadable import explain_unreadable

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


def test_a_bad_row_gets_its_reason_and_the_good_one_beside_it_none(
    spark: SparkSession, tmp_path: Path
) -> None:
    assistant = {"role": "assistant", "content": "b"}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"prompt": None}, "null_prompt"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "empty_prompt"),
        ({"prompt": [{"role": "robot", "content": "a"}]}, "bad_messages"),
        ({"prompt": [{"role": "user", "content": None}]}, "bad_messages"),
        ({"prompt": [*USER, assistant]}, "bad_messages"),
        ({"completion": None}, "null_completion"),
        ({"completion": " \n"}, "empty_completion"),
    ]
    good = {"prompt": USER, "completion": "x"}
    rows = [{**good, **row, "n": n} for n, (row, _) in enumerate(bad)]
    found = read(spark, write(tmp_path / "in.jsonl", [*rows, {**good, "n": len(bad)}]))
    by_number = {json.loads(row["passthrough"])["n"]: row for row in found}
    assert [by_number[n]["reason"] for n in range(len(bad) + 1)] == [*(why for _, why in bad), None]
    assert all(row["detail"] for row in found if row["reason"])


def test_an_empty_array_of_completions_keeps_its_row(spark: SparkSession, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        [{"prompt": "a", "completion": []}, {"prompt": "b", "completion": ["x"]}],
    )
    assert reasons(read(spark, path, layout="array")) == ["null_completion", None]


LAYOUTS = {
    # Two candidates of one prompt, in each layout; "A" and "B" stand nowhere else.
    "long": ([{"q": "Why?", "a": "A"}, {"q": "Why?", "a": "B"}], {"completion": "a"}),
    "array": (
        [{"q": "Why?", "a": ["A", "B"], "id": ["i", "j"], "end": ["stop", "length"]}],
        {"completion": "a", "completion_id": "id", "finish_reason": "end"},
    ),
    "ab": ([{"q": "Why?", "a": "A", "b": "B"}], {"completion": "a", "completion_b": "b"}),
    "joined": (
        [{"key": "1", "a": "A"}, {"key": "1", "a": "B"}],
        {"completion": "a", "prompt_id": "key"},
    ),
}


@pytest.mark.parametrize(
    ("layout", "first", "second"),
    [
        ("long", {"q": "Why?", "a": "A"}, {"q": "Why?", "a": "B"}),
        (
            "array",
            {"q": "Why?", "a": "A", "id": "i", "end": "stop"},
            {"q": "Why?", "a": "B", "id": "j", "end": "length"},
        ),
        ("ab", {"q": "Why?", "a": "A"}, {"q": "Why?", "b": "B"}),
        ("joined", {"key": "1", "q": "Why?", "a": "A"}, {"key": "1", "q": "Why?", "a": "B"}),
    ],
)
def test_a_candidate_carries_its_row_with_itself_and_no_other_candidate(
    spark: SparkSession, tmp_path: Path, layout: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    rows, columns = LAYOUTS[layout]
    options: dict[str, Any] = {"layout": layout, "columns": {"prompt": "q", **columns}}
    if layout == "joined":
        prompts = write(tmp_path / "prompts.jsonl", [{"key": "1", "q": "Why?"}])
        options["prompts_path"] = prompts
    found = read(spark, write(tmp_path / "in.jsonl", rows), **options)
    assert [json.loads(row["row"]) for row in found] == [first, second]
    assert len({row["source_row"] for row in found}) == 2


def test_reading_n_candidates_of_a_prompt_costs_n_texts_and_not_n_squared(
    spark: SparkSession, tmp_path: Path
) -> None:
    def read_size(count: int) -> int:
        texts = [f"{i:03}" * 200 for i in range(count)]
        ids = [f"{i:03}" * 20 for i in range(count)]
        row = {"prompt": "a", "completion": texts, "i": ids, "why": texts}
        columns = {"completion_id": "i", "per_completion": ["why"]}
        path = write(tmp_path / f"{count}.jsonl", [row])
        found = read(spark, path, layout="array", columns=columns)
        assert reasons(found) == [None] * count
        return sum(len(str(row)) for row in found)

    # 64 times the text for 8 times the candidates, were each to carry all of them.
    assert read_size(32) < 9 * read_size(4)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("long", [{"prompt": "a", "completion": None}] * 3),
        ("array", [{"prompt": "a", "completion": [None, None, "x", "x"]}] * 2),
        ("array", [{"prompt": "a", "completion": [], "more": ["x"]}] * 2),
        ("ab", [{"prompt": "a", "completion": None, "completion_b": None}] * 2),
        ("ab", [{"prompt": "a", "completion": "x", "completion_b": "x"}] * 2),
    ],
)
def test_source_row_tells_every_candidate_apart_and_is_the_same_however_rows_are_spread(
    spark: SparkSession, tmp_path: Path, layout: str, rows: list[Any]
) -> None:
    good = {"prompt": "b", "completion": ["y"] if layout == "array" else "y"}
    if layout == "ab":
        good["completion_b"] = "z"
    whole = read(spark, write(tmp_path / "in.jsonl", [*rows, good]), layout=layout)
    keys = [row["source_row"] for row in whole]
    assert len(set(keys)) == len(keys)
    for number, row in enumerate([good, *rows]):
        (tmp_path / "parts").mkdir(exist_ok=True)
        write(tmp_path / "parts" / f"{number}.json", [row])
    spread = read(spark, str(tmp_path / "parts"), layout=layout)
    assert {row["source_row"] for row in spread} == set(keys)


def test_arrays_that_do_not_go_with_the_completions_are_refused_not_filled_with_nulls(
    spark: SparkSession, tmp_path: Path
) -> None:
    even = {"completion": ["x", "y"], "id": ["i", "j"], "end": ["stop", "length"], "score": [1, 2]}
    uneven, fine = "uneven_arrays", (None, None)
    cases: list[tuple[dict[str, Any], tuple[str | None, str | None]]] = [
        ({"end": ["stop"]}, (uneven, "end has length 1, completion has length 2")),
        ({"end": []}, (uneven, "end has length 0, completion has length 2")),
        ({"id": ["i", "j", "k"]}, (uneven, "id has length 3, completion has length 2")),
        ({"score": [1]}, (uneven, "score has length 1, completion has length 2")),
        ({"end": None, "id": None, "score": None}, fine),
        ({"end": ["stop", None], "id": [None, "j"]}, fine),
        ({}, fine),
    ]
    rows = [{"prompt": str(n), **even, **row} for n, (row, _) in enumerate(cases)]
    columns = {"completion_id": "id", "finish_reason": "end", "per_completion": ["score"]}
    path = write(tmp_path / "in.jsonl", rows)
    found = read(spark, path, layout="array", columns=columns)
    for n, (_, expected) in enumerate(cases):
        ours = [(r["reason"], r["detail"]) for r in found if r["prompt"][0]["content"] == str(n)]
        assert ours == [expected] * 2, n


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


def test_of_an_array_each_completion_keeps_its_item_where_it_is_said_to_have_one(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "a", "completion": ["1", "2"], "my.score": [0.5, None], "tags": ["x", "y"]}
    path = write(tmp_path / "in.jsonl", [{**row, "source": "web"}])
    whole = read(spark, path, layout="array")
    assert [json.loads(r["passthrough"])["my.score"] for r in whole] == [[0.5, None]] * 2
    assert "the whole arrays ['my.score', 'tags'] in passthrough" in capsys.readouterr().err
    found = read(spark, path, layout="array", columns={"per_completion": ["my.score"]})
    assert "the whole arrays ['tags'] in passthrough" in capsys.readouterr().err
    shared = {"tags": ["x", "y"], "source": "web"}
    kept = [json.loads(r["passthrough"]) for r in found]
    assert kept == [{"my.score": 0.5, **shared}, shared]  # JSON leaves a null out
    assert json.loads(found[0]["row"]) == {"prompt": "a", "completion": "1", **kept[0]}
    with pytest.raises(InputError, match="'source' is string, expected array"):
        read(spark, path, layout="array", columns={"per_completion": ["source"]})


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
    said = r"'completion' is array<string>, expected string\n.*\n.*input.layout=array"
    with pytest.raises(InputError, match=said):
        read(spark, path)
    path = write(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "1"}])
    said = r"'completion' is string, expected array<string>\n.*\n.*input.layout=long"
    with pytest.raises(InputError, match=said):
        read(spark, path, layout="array")


ANSWER = [{"role": "assistant", "content": "yes"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


@pytest.mark.parametrize(
    ("layout", "row", "column", "found", "expected"),
    [
        ("long", {"prompt": 7}, "prompt", "bigint", "string or array<struct<role"),
        ("long", {"prompt": PARTS}, "prompt", "array<struct<content:array<str", "string or array<"),
        ("long", {"prompt": ["Why?"]}, "prompt", "array<string>", "string or array<struct<role"),
        ("long", {"completion": ANSWER}, "completion", "array<struct<content:string", "string"),
        ("long", {"completion": ANSWER[0]}, "completion", "struct<content:string", "string"),
        ("long", {"completion": 1.5}, "completion", "double", "string"),
        ("array", {"completion": [ANSWER]}, "completion", "array<array<struct", "array<string>"),
        ("array", {"completion": ["x"], "end": "stop"}, "end", "string", "array<string>"),
        ("array", {"completion": ["x"], "cid": "1"}, "cid", "string", "array<string or integer>"),
        ("ab", {"completion_b": ANSWER}, "completion_b", "array<struct<content:string", "string"),
        ("long", {"pid": 1.5}, "pid", "double", "string or integer"),
        ("long", {"cid": {"a": 1}}, "cid", "struct<a:bigint>", "string or integer"),
        ("long", {"end": True}, "end", "boolean", "string"),
        ("long", {"sys": ANSWER}, "sys", "array<struct<content:string", "string"),
        ("long", {"dom": 3}, "dom", "bigint", "string"),
    ],
)
def test_a_column_of_another_type_is_named_with_the_type_it_should_have(
    spark: SparkSession,
    tmp_path: Path,
    layout: str,
    row: dict[str, Any],
    column: str,
    found: str,
    expected: str,
) -> None:
    names = {"pid": "prompt_id", "cid": "completion_id", "end": "finish_reason"}
    names |= {"sys": "system", "dom": "domain"}
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "x", **row}])
    with pytest.raises(InputError) as caught:
        read(spark, path, layout=layout, columns={names[c]: c for c in row if c in names})
    assert f"column '{column}' is {found}" in str(caught.value)
    assert f", expected {expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "row", "column"),
    [
        ("long", {"completion": ANSWER}, "completion"),
        ("long", {"prompt": PARTS}, "prompt"),
        ("array", {"completion": [ANSWER, ANSWER]}, "completion"),
        ("ab", {"completion_b": ANSWER}, "completion_b"),
    ],
)
def test_json_with_text_in_one_line_and_an_array_in_another_is_refused_not_made_text(
    spark: SparkSession, tmp_path: Path, layout: str, row: dict[str, Any], column: str
) -> None:
    # Text that looks like JSON is text.
    good = {"prompt": USER, "completion": '["x"]', "completion_b": "{}"}
    if layout == "array":
        good["completion"] = ['["x"]', "y"]
    assert reasons(read(spark, write(tmp_path / "a.jsonl", [good]), layout=layout))[0] is None
    path = write(tmp_path / "in.jsonl", [good, {**good, **row}])
    with pytest.raises(InputError, match=rf"\['{column}'\], some lines hold text and others an"):
        read(spark, path, layout=layout)


def test_all_columns_of_wrong_types_are_named_at_once(spark: SparkSession, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": 7, "completion": 8}])
    with pytest.raises(InputError, match=r"'prompt' is bigint.*\n.*'completion' is bigint"):
        read(spark, path)


def test_integers_are_good_identifiers(spark: SparkSession, tmp_path: Path) -> None:
    columns = {"prompt_id": "pid", "completion_id": "cid"}
    row = {"prompt": "a", "pid": 7, "cid": [8, 9], "completion": ["x", "y"]}
    found = read(spark, write(tmp_path / "in.jsonl", [row]), layout="array", columns=columns)
    assert [(r["prompt_id"], r["completion_id"]) for r in found] == [("7", "8"), ("7", "9")]


def test_joined_tables_must_agree_about_the_type_of_their_key(
    spark: SparkSession, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"id": "07", "prompt": "Why?"}])
    path = write(tmp_path / "c.jsonl", [{"id": 7, "completion": "A"}])
    with pytest.raises(InputError, match=r"id is a string in one .* an integer in the other"):
        read(spark, path, layout="joined", prompts_path=prompts, columns={"prompt_id": "id"})


def test_an_input_that_is_not_there_or_empty_or_of_another_format_is_refused(
    spark: SparkSession, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(spark, str(tmp_path / "nothing.jsonl"))
    with pytest.raises(InputError, match="does not exist"):
        read(spark, str(tmp_path / "nothing-*.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="has no rows"):
        read(spark, str(tmp_path / "empty.jsonl"))
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


WriteRows = Callable[..., Path]
GOOD = [(f"prompt {i}", str(i) * 50) for i in range(2000)]


@pytest.fixture(scope="module")
def write_rows(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> WriteRows:
    """Put good rows into a new folder as one file, without a checksum beside it; give that file."""
    written = tmp_path_factory.mktemp("written")

    def write_rows(path: Path, form: str = "parquet") -> Path:
        once = written / form
        if not once.exists():
            rows = spark.createDataFrame(GOOD, "prompt string, completion string")
            rows.coalesce(1).write.format(form).save(str(once))
            for checksum in once.rglob(".*.crc"):
                checksum.unlink()
        # The session does not know a copy, as a new session would not know the table.
        shutil.copytree(once, path)
        (file,) = path.glob("part-*")
        return file

    return write_rows


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        file.write_bytes(b"this was never a table")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "corrupt":  # the footer, and so the schema, is whole
        file.write_bytes(content[:100] + b"\xff" * 2000 + content[2100:])
    elif how == "gone":
        file.unlink()


def expect_unreadable(call: Callable[[], object], file: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call()
    assert caught.value.exit_code == 2
    assert caught.value.where is not None
    assert caught.value.where.endswith(file)
    assert caught.value.fix
    # What a job prints of it has no trace of Java or Python in it.
    assert "\tat " not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("how", ["garbage", "empty", "truncated"])
def test_parquet_that_is_none_is_named_when_its_schema_is_read(
    spark: SparkSession, write_rows: WriteRows, tmp_path: Path, how: str
) -> None:
    file = write_rows(tmp_path / "in")
    damage(file, how)
    source = InputSpec(path=str(tmp_path / "in"), format="parquet")
    expect_unreadable(lambda: read_candidates(spark, source), file.name, "a file is damaged")


@pytest.mark.parametrize(
    ("form", "how", "said"),
    [
        ("parquet", "corrupt", "a file is damaged"),
        ("delta", "garbage", "a file is damaged"),
        ("delta", "gone", "a file is not there any more"),
    ],
)
def test_a_file_that_shows_itself_unreadable_later_is_named_too(
    spark: SparkSession, write_rows: WriteRows, tmp_path: Path, form: str, how: str, said: str
) -> None:
    file = write_rows(tmp_path / "in", form)
    damage(file, how)
    source = InputSpec(path=str(tmp_path / "in"), format=form)

    def read_all() -> None:
        with reading(source):
            read_candidates(spark, source).write.parquet(str(tmp_path / "out"))

    expect_unreadable(read_all, file.name, said)


def test_a_file_that_becomes_unreadable_in_the_middle_of_a_job_is_explained(
    spark: SparkSession, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "in")
    rows = spark.read.parquet(str(tmp_path / "in"))
    damage(file, "corrupt")
    with pytest.raises(Exception, match="FAILED_READ_FILE") as caught:
        rows.write.parquet(str(tmp_path / "out"))
    explained = explain_spark_error(caught.value)
    assert explained is not None
    assert f"{file.name}\n  fix: " in explained
    assert "\tat " not in explained


def test_compressed_json_that_is_cut_off_and_lines_that_are_not_json_are_named(
    spark: SparkSession, tmp_path: Path
) -> None:
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 5000)
    (tmp_path / "in.json.gz").write_bytes(whole[: len(whole) // 2])
    cut = str(tmp_path / "in.json.gz")
    expect_unreadable(lambda: read(spark, cut), "in.json.gz", "a file is damaged, cut off")
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops\n')
    bad = str(tmp_path / "in.jsonl")
    expect_unreadable(lambda: read(spark, bad), "in.jsonl", "a line that is not JSON")


LOG = f"{0:020}.json"


@pytest.mark.parametrize("call", [read_candidates, input_version])
def test_a_folder_without_a_delta_log_is_refused(
    spark: SparkSession,
    write_rows: WriteRows,
    tmp_path: Path,
    call: Callable[[SparkSession, InputSpec], object],
) -> None:
    write_rows(tmp_path / "in", "delta")
    shutil.rmtree(tmp_path / "in" / "_delta_log")
    source = InputSpec(path=str(tmp_path / "in"))
    expect_unreadable(lambda: call(spark, source), "in", "cannot be read as delta")


@pytest.mark.parametrize(
    ("call", "checksum", "file", "said"),
    [
        (read_candidates, False, LOG, "a file is damaged"),
        (input_version, False, LOG, "a file is damaged"),
        # The checksum has the schema too, so the log shows itself later.
        (read_candidates, True, LOG, "a file is damaged"),
        (input_version, True, "in", "cannot be read as delta: .*Unrecognized token"),
    ],
)
def test_a_delta_table_whose_log_is_damaged_is_refused(
    spark: SparkSession,
    write_rows: WriteRows,
    tmp_path: Path,
    call: Callable[[SparkSession, InputSpec], object],
    checksum: bool,
    file: str,
    said: str,
) -> None:
    write_rows(tmp_path / "in", "delta")
    (tmp_path / "in" / "_delta_log" / LOG).write_text("this was never a log\n")
    if not checksum:
        for path in (tmp_path / "in" / "_delta_log").glob("*.crc"):
            path.unlink()
    source = InputSpec(path=str(tmp_path / "in"))
    expect_unreadable(lambda: call(spark, source), file, said)


def test_a_gap_in_the_log_of_a_delta_table_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "in")
    rows = spark.createDataFrame(GOOD, "prompt string, completion string")
    for _ in range(3):
        rows.write.format("delta").mode("append").save(path)
    (tmp_path / "in" / "_delta_log" / f"{1:020}.json").unlink()
    for checksum in (tmp_path / "in" / "_delta_log").glob("*crc"):
        checksum.unlink()
    source = InputSpec(path=path)
    expect_unreadable(lambda: read_candidates(spark, source), "in", "versions 0 and 2|not contig")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("form", ["parquet", "delta", "json"])
def test_a_file_without_permission_is_named(
    spark: SparkSession, write_rows: WriteRows, tmp_path: Path, form: str
) -> None:
    file = write_rows(tmp_path / "in", form)
    file.chmod(0)
    source = InputSpec(path=str(tmp_path / "in"), format=form)
    expect_unreadable(lambda: read_candidates(spark, source), file.name, "no permission")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        # A local file: its schema, its rows; then HDFS and S3.
        (
            "[FAILED_READ_FILE.CANNOT_READ_FILE_FOOTER] Encountered error while reading file "
            "file:/in/a.parquet. Could not read footer.\nCaused by: java.io."
            "FileNotFoundException: /in/a.parquet (Permission denied)",
            "file:/in/a.parquet",
        ),
        (
            "[FAILED_READ_FILE.FILE_NOT_EXIST] Encountered error while reading file "
            "file:///in/a.parquet. File does not exist.\nCaused by: java.io."
            "FileNotFoundException: /in/a.parquet (Permission denied)",
            "file:///in/a.parquet",
        ),
        (
            ": org.apache.hadoop.security.AccessControlException: Permission denied: user=me, "
            'access=READ, inode="/in":root:root:drwx------',
            "hdfs://in",
        ),
        (": java.nio.file.AccessDeniedException: s3a://b/in: getFileStatus", "hdfs://in"),
    ],
)
def test_refused_permission_is_told_from_a_missing_and_a_damaged_file(
    text: str, where: str
) -> None:
    explained = explain_unreadable(text, place="hdfs://in")
    assert explained is not None
    assert (explained.what, explained.where) == ("no permission to read a file", where)


def test_errors_that_are_not_about_a_file_stay_as_they_are(
    spark: SparkSession, tmp_path: Path
) -> None:
    source = InputSpec(path=str(tmp_path), format="json")
    with pytest.raises(ArithmeticException), reading(source):
        spark.sql("SELECT 1 / 0").collect()
    with pytest.raises(InputError, match="unknown-scheme"):
        read(spark, "unknown-scheme://bucket/in.jsonl")


def test_patterns_and_paths_of_the_default_file_system_are_read(
    spark: SparkSession, write_rows: WriteRows, tmp_path: Path
) -> None:
    for name in ("a-1", "a-2", "b-1", "c[1]"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": "a", "completion": name}])
    assert [r["completion"] for r in read(spark, f"{tmp_path}/a-*.jsonl")] == ["a-1", "a-2"]
    assert [r["completion"] for r in read(spark, f"{tmp_path}/{{a,b}}-1.jsonl")] == ["a-1", "b-1"]
    folder = tmp_path / "t[1]"
    write_rows(folder, "delta")
    assert read_candidates(spark, InputSpec(path=str(folder))).count() == len(GOOD)
    # Where the cluster's default is another file system, a bare path is one of its own: here
    # Hadoop's view of folders, in which /seen is this test's.
    hadoop = spark._jsc.hadoopConfiguration()
    mounted = {
        "fs.defaultFS": "viewfs://c/",
        "fs.viewfs.mounttable.c.link./seen": tmp_path.as_uri(),
    }
    before = hadoop.get("fs.defaultFS")
    try:
        for key, value in mounted.items():
            hadoop.set(key, value)
        assert [r["completion"] for r in read(spark, "/seen/b-1.jsonl")] == ["b-1"]
        with pytest.raises(InputError, match="does not exist"):
            read(spark, f"{tmp_path}/b-1.jsonl")
    finally:
        for key in mounted:
            hadoop.unset(key)
        hadoop.set("fs.defaultFS", before)
