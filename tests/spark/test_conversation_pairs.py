"""Labelled pairs whose answers are whole conversations, as preference sets on the hub have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from pyspark.sql import SparkSession

from cdr.errors import InputError
from tests.spark.test_evaluate import make_config, read
from tests.tokenizers import make_smollm2

QUESTION = "Which?"
NOT_THE_PROMPT = "an answer's conversation does not begin with the prompt"
NO_ANSWER = "an answer's last message is not the assistant's, or has no content"
DIFFER = "the answers' conversations differ before their last message"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_smollm2().save_pretrained(folder)
    return folder


def talk(*texts: str) -> list[dict[str, str]]:
    """A conversation, the user first; the fields as the hub's set orders them."""
    return [
        {"content": text, "role": "assistant" if n % 2 else "user"} for n, text in enumerate(texts)
    ]


ANSWERS = {
    "whole": (talk(QUESTION, "this"), talk(QUESTION, "that")),
    "longer": (talk(QUESTION, "hm", "Why?", "so"), talk(QUESTION, "hm", "Why?", "no")),
    "other": (talk(QUESTION, "this"), talk("What?", "that")),
    "asks": (talk(QUESTION, "this", "Why?"), talk(QUESTION, "that")),
    "alone": (talk(QUESTION, "this"), talk("", "that")[1:]),
}
ROWS = [
    {"id": name, "prompt": QUESTION, "chosen": chosen, "rejected": rejected}
    for name, (chosen, rejected) in ANSWERS.items()
]


def outcomes(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Per pair the texts of its prompt and answers, or why it does not fit."""
    return {
        row["prompt_id"].removeprefix("All/"): row["detail"]
        or ([m["content"] for m in row["prompt"]], row["chosen"], row["rejected"])
        for row in found
    }


def test_an_answer_may_be_the_conversation_that_ends_with_it(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    both = ([QUESTION], "this", "that")
    config = make_config(tmp_path, tokenizer, ROWS, {"id": "id"})
    assert outcomes(read(spark, config)) == {
        "whole": both, "alone": both, "longer": NOT_THE_PROMPT, "other": NOT_THE_PROMPT,
        "asks": NO_ANSWER,
    }  # fmt: skip
    # Without a prompt it is what both begin with, however long.
    config = make_config(tmp_path, tokenizer, ROWS, {"id": "id", "prompt": None})
    assert outcomes(read(spark, config)) == {
        "whole": both, "longer": ([QUESTION, "hm", "Why?"], "so", "no"), "alone": DIFFER,
        "other": DIFFER, "asks": NO_ANSWER,
    }  # fmt: skip


def test_a_set_of_the_hub_is_read_with_its_conversations(
    spark: SparkSession, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_prefs-0.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), file)
    monkeypatch.setattr("cdr.labelled_pairs.download_split", lambda *_: [file])
    hub = {
        "path": "acme/preferences", "revision": "0" * 40, "format": "parquet",
        "columns": {"id": "id"},
    }  # fmt: skip
    config = make_config(tmp_path, tokenizer, [], {}, input=hub)
    assert outcomes(read(spark, config))["whole"] == ([QUESTION], "this", "that")


def test_what_to_do_goes_with_the_reason_that_no_pair_fits(
    spark: SparkSession, tmp_path: Path, tokenizer: Path
) -> None:
    def refused(rows: list[dict[str, Any]], columns: dict[str, Any]) -> str:
        with pytest.raises(InputError) as caught:
            read(spark, make_config(tmp_path, tokenizer, rows, columns))
        return str(caught.value)

    said = refused([row for row in ROWS if row["id"] == "longer"], {})
    assert f"no pair of the input fits: bad_messages 1 ({NOT_THE_PROMPT})" in said
    assert "--set input.columns.prompt=null" in said
    assert "section" not in said
    said = refused([{"prompt": QUESTION, "chosen": "this", "rejected": "this"}], {})
    assert "equal_completions 1" in said
    assert "input.columns.rejected" in said
    said = refused([{"chosen": "this", "rejected": "that"}], {"prompt": None})
    assert "nothing is the prompt" in said
