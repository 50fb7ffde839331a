"""Rows of a frame are read by the rules of the input stage, and refused for the same reasons."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cdr.candidate_rows import hash_messages, read_row
from cdr.errors import RejectReason, RowRejected

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "May I keep a fox?"},
]


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "May I keep a fox?", "completion": "Ask the council.", **changes}


def test_text_is_one_user_turn_and_messages_are_taken_in_any_container() -> None:
    assert read_row(row(), None).messages == (TURNS[1],)
    for prompt in (TURNS, tuple(TURNS), np.array(TURNS, dtype=object)):
        assert read_row(row(prompt=prompt), None).messages == tuple(TURNS)


@pytest.mark.parametrize("null", [None, math.nan, pd.NA])
def test_what_may_be_missing_is_none(null: object) -> None:
    read = read_row(row(finish_reason=null, domain=null), None)
    assert (read.finish_reason, read.domain) == (None, None)
    assert read_row(row(finish_reason="length"), None).finish_reason == "length"


def test_the_domain_is_read_where_it_is_asked_for() -> None:
    assert read_row(row(domain="safety"), None).domain is None
    assert read_row(row(domain="safety"), ("safety", "chat")).domain == "safety"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, RejectReason.NULL_PROMPT),
        ({"prompt": math.nan}, RejectReason.NULL_PROMPT),
        ({"prompt": pd.NA}, RejectReason.NULL_PROMPT),
        ({"prompt": []}, RejectReason.EMPTY_PROMPT),
        ({"prompt": " \n"}, RejectReason.EMPTY_PROMPT),
        ({"prompt": [{"role": "tool", "content": "x"}]}, RejectReason.BAD_MESSAGES),
        ({"prompt": [{"role": "user", "content": None}]}, RejectReason.BAD_MESSAGES),
        ({"prompt": [{"role": "user"}]}, RejectReason.BAD_MESSAGES),
        ({"prompt": TURNS[:1]}, RejectReason.BAD_MESSAGES),
        ({"prompt": 7}, RejectReason.BAD_MESSAGES),
        ({"completion": None}, RejectReason.NULL_COMPLETION),
        ({"completion": 7}, RejectReason.NULL_COMPLETION),
        ({"completion": "\t\n "}, RejectReason.EMPTY_COMPLETION),
        ({"domain": "poetry"}, RejectReason.UNKNOWN_DOMAIN),
        ({"domain": pd.NA}, RejectReason.UNKNOWN_DOMAIN),
        ({}, RejectReason.UNKNOWN_DOMAIN),
    ],
)
def test_a_row_is_refused_with_a_reason(changes: dict[str, Any], reason: RejectReason) -> None:
    with pytest.raises(RowRejected) as caught:
        read_row(row(**changes), ("safety", "chat"))
    assert caught.value.reason is reason


def test_the_first_rule_that_is_broken_counts() -> None:
    with pytest.raises(RowRejected, match="null_prompt"):
        read_row({"prompt": None, "completion": None}, None)


def test_only_the_blanks_of_ascii_are_blank_as_in_spark() -> None:
    assert read_row(row(completion="\u00a0"), None).completion == "\u00a0"


def test_a_prompt_is_hashed_as_the_input_stage_hashes_it() -> None:
    # Characters are counted, not bytes.
    text = "user:2:né" + "assistant:1:x" + "user:1:y"
    turns: Any = [
        {"role": "user", "content": "né"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "y"},
    ]
    assert hash_messages(turns) == hashlib.sha256(text.encode()).hexdigest()
