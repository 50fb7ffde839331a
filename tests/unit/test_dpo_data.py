"""Pairs for tuning: no prompt on both sides, every drop counted, no checkpoint of another run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cdr.chat import ChatEncoder
from cdr.dpo_config import TrainingConfig
from cdr.dpo_data import (
    EncodedPair,
    PreferencePair,
    draw_pairs,
    encode_pairs,
    hash_pairs,
    read_pairs,
    split_pairs,
    write_pairs,
)
from cdr.dpo_report import HeldOutPair, describe_command, summarize
from cdr.errors import ConfigError, InputError, RejectReason, RowRejected
from jobs.hold_out import main as hold_out


def make_pair(prompt: str = "p", **fields: Any) -> PreferencePair:
    values: dict[str, Any] = {
        "chosen": "yes",
        "rejected": "no",
        "section": "Chat",
        "subset": "s",
        "group": None,
        "split": None,
        "source": "here",
        "license": "MIT",
    }
    return PreferencePair(prompt=({"role": "user", "content": prompt},), **(values | fields))


class WordEncoder:
    """One token per word, one for the end of turn; "forged" is refused."""

    def encode_prefix(self, messages: Any) -> tuple[int, ...]:
        text = messages[-1]["content"]
        if text == "forged":
            raise RowRejected(RejectReason.SPECIAL_TOKEN_IN_TEXT, "turn 0")
        return tuple(range(len(text.split())))

    def encode_completion(self, completion: str, finish_reason: str | None) -> Any:
        return SimpleNamespace(ids=(*range(len(completion.split())), 99))


ENCODER = cast(ChatEncoder, WordEncoder())


def encode(*pairs: PreferencePair, max_length: int = 100) -> list[EncodedPair]:
    return encode_pairs(pairs, ENCODER, max_length)[0]


# Reading


def test_text_and_messages_make_the_same_pair(tmp_path: Path) -> None:
    text = {"prompt": "p", "chosen": "yes", "rejected": "no", "section": "Chat"}
    messages = {
        **text,
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(text) + "\n")
    parquet.write_table(pa.Table.from_pylist([messages]), tmp_path / "b.parquet")
    (pair,) = read_pairs([tmp_path])  # the same pair twice is one
    assert (pair.prompt, pair.chosen, pair.rejected) == (make_pair().prompt, "yes", "no")
    assert (pair.section, pair.subset, pair.source) == ("Chat", "Chat", "a")


def test_pairs_that_are_written_are_read_again_with_ids_of_their_own(tmp_path: Path) -> None:
    written = [make_pair("p"), make_pair("q", chosen="größer\nals"), make_pair("p", chosen="other")]
    file = tmp_path / "new" / "held-out.jsonl"
    write_pairs(written, file)
    assert [pair.key for pair in read_pairs([file])] == [pair.key for pair in written]
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == 3
    assert [(line["section"], line["subset"]) for line in lines] == [
        (pair.section, pair.subset) for pair in written
    ]


def test_hash_knows_content_and_not_order() -> None:
    a, b = make_pair("a"), make_pair("b")
    assert hash_pairs([a, b]) == hash_pairs([b, replace(a, source="elsewhere")])
    assert hash_pairs([a, b]) != hash_pairs([a, replace(b, chosen="else")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "yes"}, "missing or null: rejected; present: chosen, prompt"),
        ({"prompt": "p", "chosen": [], "rejected": "no"}, "one assistant message, got 0"),
    ],
)
def test_row_that_is_no_pair_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message) as error:
        read_pairs([tmp_path / "a.jsonl"])
    assert "a.jsonl, row 1" in str(error.value)


def test_folder_without_pairs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file found"):
        read_pairs([tmp_path])
    with pytest.raises(InputError, match="no such file"):
        read_pairs([tmp_path / "missing"])


def test_delta_table_is_refused_since_its_files_hold_deleted_rows(tmp_path: Path) -> None:
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(InputError, match="deleted rows"):
        read_pairs([tmp_path])


# Splitting


@given(
    st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 5), st.integers(0, 2))),
    st.floats(0, 0.9),
)
def test_no_prompt_and_no_group_is_on_both_sides(
    rows: list[tuple[int, int | None, int]], fraction: float
) -> None:
    pairs = [
        make_pair(f"p{prompt}", group=None if group is None else f"g{group}", section=f"s{section}")
        for prompt, group, section in rows
    ]
    train, test = split_pairs(pairs, fraction)
    assert sorted([*train, *test], key=repr) == sorted(pairs, key=repr)
    assert not {pair.prompt_key for pair in train} & {pair.prompt_key for pair in test}
    assert not {pair.group for pair in train if pair.group} & {pair.group for pair in test}


def test_each_section_gives_the_same_share() -> None:
    pairs = [make_pair(f"{s}{i}", section=s) for s, n in [("a", 200), ("b", 50)] for i in range(n)]
    _, test = split_pairs(pairs, 0.1)
    assert Counter(pair.section for pair in test) == {"a": 20, "b": 5}


def test_split_does_not_depend_on_order_of_rows() -> None:
    pairs = [make_pair(f"p{i % 40}", chosen=f"c{i}", group=f"g{i % 60}") for i in range(120)]
    _, test = split_pairs(pairs, 0.3)
    _, again = split_pairs(pairs[::-1], 0.3)
    assert test == again[::-1]


def test_split_named_by_the_table_wins_over_the_hash() -> None:
    pairs = [make_pair(f"p{i}", split="test" if i == 7 else "train") for i in range(20)]
    _, test = split_pairs(pairs, 0.5)
    assert test == [pairs[7]]


def test_split_that_names_no_held_out_row_leaves_it_to_the_hash() -> None:
    _, test = split_pairs([make_pair(f"p{i}", split="dev") for i in range(20)], 0.5)
    assert len(test) == 10


# Encoding and drawing


def test_pair_too_long_by_one_token_is_counted_and_never_cut() -> None:
    fits = make_pair("one two", chosen="a b", rejected="a")  # 2 + 2 words + end of turn = 5
    too_long = make_pair("one two", chosen="a", rejected="a b c")  # 2 + 3 + 1 = 6
    same = make_pair("x", chosen="a", rejected="a")
    encoded, left_out = encode_pairs([fits, too_long, same, make_pair("forged")], ENCODER, 5)
    assert [item.pair for item in encoded] == [fits]
    assert encoded[0].chosen_ids == (0, 1, 99)
    assert left_out == {"too_long": 1, "same_answers": 1, "special_token_in_text": 1}


def test_sections_and_subsets_have_equal_shares_as_far_as_they_reach() -> None:
    pairs = [
        make_pair(f"{section}{subset}{i}", section=section, subset=subset)
        for section, subset, number in [("A", "a", 50), ("A", "b", 50), ("B", "b", 3)]
        for i in range(number)
    ]
    drawn = draw_pairs(encode(*pairs), 13, seed=0)
    # B has 3; the 10 left are A's, five of each subset.
    assert Counter((item.pair.section, item.pair.subset) for item in drawn) == {
        ("A", "a"): 5,
        ("A", "b"): 5,
        ("B", "b"): 3,
    }


def test_seed_decides_what_is_drawn_and_order_of_rows_does_not() -> None:
    items = encode(*(make_pair(f"p{i}") for i in range(50)))
    assert draw_pairs(items, 10, seed=0) == draw_pairs(items[::-1], 10, seed=0)
    assert draw_pairs(items, 10, seed=0) != draw_pairs(items, 10, seed=1)
    assert sorted(draw_pairs(items, None, seed=0), key=repr) == sorted(items, key=repr)


# Resuming

CONFIG = TrainingConfig(
    base_name="m",
    base_hash="1",
    pairs_hash="2",
    max_length=128,
    max_pairs=None,
    holdout_fraction=0.1,
    epochs=1.0,
    batch_size=8,
    learning_rate=1e-4,
    beta=0.1,
    rank=8,
    seed=0,
    dtype="float32",
    processes=1,
)


def test_same_configuration_goes_on() -> None:
    recorded = json.loads(json.dumps(asdict(CONFIG)))
    CONFIG.check_same(recorded, Path("training-config.json"))


def test_other_configuration_is_refused_with_every_difference() -> None:
    recorded = asdict(replace(CONFIG, beta=0.2, seed=3))
    with pytest.raises(ConfigError) as error:
        CONFIG.check_same(recorded, Path("out/training-config.json"))
    assert error.value.problems == (
        "beta: expected 0.2 as in what lies there, got 0.1",
        "seed: expected 3 as in what lies there, got 0",
    )
    assert "another --output" in str(error.value)


def test_values_out_of_range_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, beta=0.0, batch_size=7, processes=2)
    assert error.value.problems == (
        "batch_size: must be a multiple of the number of processes, 2, got 7",
        "beta: must be > 0, got 0.0",
    )


# Reporting


def test_accuracy_is_strict_and_per_section() -> None:
    def scored(section: str, chosen: float, rejected: float, tokens: int = 2) -> HeldOutPair:
        return HeldOutPair(section, "s", chosen, rejected, tokens, 2)

    result = summarize(
        [
            scored("A", 1.0, 0.0),
            scored("A", 0.0, 0.0),  # a tie is not right
            scored("B", 3.0, 2.0, tokens=6),  # per token 0.5 < 1
        ]
    )
    assert (result["A"]["accuracy_sum"], result["A"]["ties_sum"]) == (0.5, 1)
    assert (result["B"]["accuracy_sum"], result["B"]["accuracy_mean"]) == (1.0, 0.0)
    assert result["B"]["longer_wins"] == 1.0
    assert result["All"]["n"] == 3
    assert result["All"]["accuracy_sum"] == pytest.approx(2 / 3)


def test_command_in_the_card_names_no_place_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = describe_command(["--pairs", str(tmp_path / "pairs"), "--output", "conf/models/m"])
    assert command == (
        "torchrun --nproc-per-node 2 -m jobs.train_dpo --pairs pairs --output conf/models/m"
    )


def test_held_out_pairs_are_written_as_a_tuning_splits_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "pairs.jsonl", tmp_path / "held-out.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--pairs", str(file), "--output", str(output), "--holdout-fraction", "0.25"]
    assert hold_out(command) == 0
    _, held_out = split_pairs(read_pairs([file]), 0.25)
    assert {pair.key for pair in read_pairs([output])} == {pair.key for pair in held_out}
    assert "5 of 20 pairs are held out" in capsys.readouterr().out
