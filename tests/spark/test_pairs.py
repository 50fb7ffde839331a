from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from cdr.config import PairSpec
from cdr.pairs import PAIR_COLUMNS, SCORED_COLUMNS, select_pairs, split_column

SCHEMA = (
    "prompt_id string, prompt_hash string, prompt array<struct<role: string, content: string>>, "
    "domain string, completion_id string, completion string, finish_reason string, "
    "num_tokens int, reward double, strong_logprob double, weak_logprob double"
)


@dataclass(frozen=True)
class Candidate:
    id: str
    reward: float
    num_tokens: int = 100
    text: str = ""  # empty: a text of its own, made from the id
    finish_reason: str | None = "stop"

    @property
    def completion(self) -> str:
        return self.text or f"text {self.id}"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rows_of(prompts: Mapping[str, Sequence[Candidate]]) -> list[tuple[Any, ...]]:
    return [
        (
            prompt_id,
            sha256(prompt_id),
            [("user", f"question {prompt_id}")],
            "chat",
            c.id,
            c.completion,
            c.finish_reason,
            c.num_tokens,
            c.reward,
            c.reward - 50.0,
            -50.0,
        )
        for prompt_id, candidates in prompts.items()
        for c in candidates
    ]


def scored_of(spark: SparkSession, prompts: Mapping[str, Sequence[Candidate]]) -> DataFrame:
    return spark.createDataFrame(rows_of(prompts), SCHEMA)


def pairs_of(
    spark: SparkSession, prompts: Mapping[str, Sequence[Candidate]], **spec: Any
) -> dict[str, Row]:
    found = select_pairs(scored_of(spark, prompts), PairSpec.model_validate(spec)).collect()
    pairs = {row["prompt_id"]: row for row in found}
    assert len(pairs) == len(found), "a prompt came back twice"
    return pairs


def ids_of(pairs: Mapping[str, Row]) -> dict[str, tuple[str | None, str | None]]:
    return {prompt: (row["chosen_id"], row["rejected_id"]) for prompt, row in pairs.items()}


def reasons_of(pairs: Mapping[str, Row]) -> dict[str, str | None]:
    return {prompt: row["no_pair_reason"] for prompt, row in pairs.items()}


FOUR = [Candidate("a", 1.0), Candidate("b", 4.0), Candidate("c", -2.0), Candidate("d", 3.0)]


def test_a_pair_carries_both_sides_in_the_shape_that_trl_loads(spark: SparkSession) -> None:
    found = select_pairs(
        scored_of(
            spark, {"p": [Candidate("a", 2.5, num_tokens=7), Candidate("b", -1.0, num_tokens=9)]}
        ),
        PairSpec(validation_fraction=0.0),
    )
    messages = "array<struct<role:string,content:string>>"
    types = {field.name: field.dataType.simpleString() for field in found.schema}
    assert tuple(types) == PAIR_COLUMNS
    assert (types["prompt"], types["chosen"], types["rejected"]) == (messages,) * 3

    (row,) = found.collect()
    assert row.asDict(recursive=True) == {
        "prompt_id": "p",
        "prompt_hash": sha256("p"),
        "prompt": [{"role": "user", "content": "question p"}],
        "domain": "chat",
        "chosen": [{"role": "assistant", "content": "text a"}],
        "rejected": [{"role": "assistant", "content": "text b"}],
        "chosen_id": "a",
        "rejected_id": "b",
        "chosen_reward": 2.5,
        "rejected_reward": -1.0,
        "margin": 3.5,  # 2.5 - (-1)
        "chosen_strong_logprob": -47.5,
        "rejected_strong_logprob": -51.0,
        "chosen_weak_logprob": -50.0,
        "rejected_weak_logprob": -50.0,
        "chosen_num_tokens": 7,
        "rejected_num_tokens": 9,
        "num_candidates": 2,
        "length_fallback": False,
        "no_pair_reason": None,
        "split": "train",
    }


def test_chosen_has_the_best_reward_and_the_rule_picks_the_rejected(spark: SparkSession) -> None:
    # By reward: b 4, d 3, a 1, c -2.
    assert ids_of(pairs_of(spark, {"p": FOUR}, rejected="lowest")) == {"p": ("b", "c")}
    assert ids_of(pairs_of(spark, {"p": FOUR}, rejected="second_best")) == {"p": ("b", "d")}


def test_random_draws_every_other_candidate_about_equally_often(spark: SparkSession) -> None:
    prompts = {f"p{i}": FOUR for i in range(300)}
    drawn = [ids[1] for ids in ids_of(pairs_of(spark, prompts, rejected="random")).values()]
    counts = {other: drawn.count(other) for other in ("a", "c", "d")}
    # 300 draws at 1/3: mean 100, standard deviation sqrt(300 · 1/3 · 2/3) = 8.2; four of them.
    assert sum(counts.values()) == 300
    assert all(67 <= count <= 133 for count in counts.values()), counts


def test_the_seed_and_nothing_else_moves_the_random_choice(spark: SparkSession) -> None:
    prompts = {f"p{i}": FOUR for i in range(40)}
    first = ids_of(pairs_of(spark, prompts, seed=0))
    assert ids_of(pairs_of(spark, prompts, seed=0, validation_fraction=0.5)) == first
    other = ids_of(pairs_of(spark, prompts, seed=1))
    assert other != first
    assert {ids[0] for ids in other.values()} == {"b"}  # the chosen one is no draw


def test_draws_follow_texts_so_that_users_ids_do_not_matter(spark: SparkSession) -> None:
    named = [replace(c, text=f"answer {c.id}") for c in FOUR]
    renamed = [replace(c, id=f"x{i}") for i, c in enumerate(named)]
    prompts = [f"p{i}" for i in range(20)]
    before = pairs_of(spark, dict.fromkeys(prompts, named))
    after = pairs_of(spark, dict.fromkeys(prompts, renamed))
    assert [after[p]["rejected"] for p in prompts] == [before[p]["rejected"] for p in prompts]


def test_one_more_candidate_disturbs_only_the_pairs_it_is_part_of(spark: SparkSession) -> None:
    prompts = [f"p{i}" for i in range(40)]
    before = ids_of(pairs_of(spark, dict.fromkeys(prompts, FOUR)))
    more = [Candidate("new", 0.0), *FOUR]
    after = ids_of(pairs_of(spark, dict.fromkeys(prompts, more)))
    changed = {prompt for prompt in prompts if after[prompt] != before[prompt]}
    assert changed == {prompt for prompt in prompts if after[prompt] == ("b", "new")}
    assert 0 < len(changed) < len(prompts)


def test_one_of_several_equal_best_is_chosen_by_id_and_none_of_them_rejected(
    spark: SparkSession,
) -> None:
    prompts = {"p": [Candidate("b", 2.0), Candidate("a", 2.0), Candidate("c", 1.0)]}
    for rule in ("random", "lowest", "second_best"):
        assert ids_of(pairs_of(spark, prompts, rejected=rule)) == {"p": ("a", "c")}


def test_prompts_without_a_pair_come_back_with_the_reason(spark: SparkSession) -> None:
    prompts = {
        "alone": [Candidate("a", 1.0)],
        "same text": [Candidate("a", 1.0, text="yes"), Candidate("b", 1.0, text="yes")],
        "tie": [Candidate("a", 1.0), Candidate("b", 1.0), Candidate("c", 1.0)],
        "close": [Candidate("a", 1.0), Candidate("b", 0.75)],  # margin 0.25 < 0.5
        "far": [Candidate("a", 1.0), Candidate("b", 0.5)],  # margin 0.5, just enough
    }
    pairs = pairs_of(spark, prompts, min_margin=0.5)
    assert reasons_of(pairs) == {
        "alone": "one_candidate",
        "same text": "one_candidate",
        "tie": "tie",
        "close": "below_min_margin",
        "far": None,
    }
    assert {prompt: row["num_candidates"] for prompt, row in pairs.items()} == {
        "alone": 1,
        "same text": 1,
        "tie": 3,
        "close": 2,
        "far": 2,
    }
    of_the_pair = [
        name for name in PAIR_COLUMNS if name.startswith(("chosen", "rejected", "margin"))
    ]
    assert len(of_the_pair) == 13
    for prompt in ("alone", "same text", "tie", "close"):
        assert [pairs[prompt][name] for name in of_the_pair] == [None] * 13
        assert pairs[prompt]["length_fallback"] is False
        assert pairs[prompt]["prompt"] == [Row(role="user", content=f"question {prompt}")]


def test_min_margin_passes_over_those_too_close_and_takes_the_next(spark: SparkSession) -> None:
    # Margins to b (4): d 1, a 3, c 6. At 2 nats, d is out and a is the second best.
    pairs = pairs_of(spark, {"p": FOUR}, rejected="second_best", min_margin=2.0)
    assert ids_of(pairs) == {"p": ("b", "a")}


def test_identical_completions_are_one_candidate_under_the_smallest_id(
    spark: SparkSession,
) -> None:
    twins = [Candidate("z", 0.0, text="no"), Candidate("y", 0.0, text="no"), Candidate("a", 1.0)]
    (row,) = pairs_of(spark, {"p": twins}).values()
    assert (row["num_candidates"], row["rejected_id"]) == (2, "y")


def test_length_stopped_candidates_are_left_out_first_on_request(spark: SparkSession) -> None:
    cut = replace(FOUR[1], finish_reason="length")
    unknown = replace(FOUR[2], finish_reason=None)
    prompts = {
        "best was cut": [FOUR[0], cut, unknown, FOUR[3]],
        "one left": [FOUR[0], cut],
        "all cut": [cut],
        # The text is there twice; the copy that ended by itself counts.
        "cut twin": [FOUR[0], replace(cut, text="same"), Candidate("z", 4.0, text="same")],
    }
    kept = pairs_of(spark, prompts, rejected="lowest")
    assert kept["best was cut"]["chosen_id"] == "b"
    dropped = pairs_of(spark, prompts, rejected="lowest", drop_length_stopped=True)
    assert ids_of(dropped) == {
        "best was cut": ("d", "c"),
        "one left": (None, None),
        "all cut": (None, None),
        "cut twin": ("z", "a"),
    }
    assert (dropped["one left"]["num_candidates"], dropped["all cut"]["num_candidates"]) == (1, 0)
    assert reasons_of(dropped)["all cut"] == "one_candidate"


# The chosen one has 100 tokens.
LENGTHS = [
    Candidate("best", 9.0, num_tokens=100),
    Candidate("short", 1.0, num_tokens=60),
    Candidate("near", 3.0, num_tokens=115),
    Candidate("long", 2.0, num_tokens=190),
]


@pytest.mark.parametrize(
    ("window", "rejected"),
    [
        ({}, "short"),  # lowest of all
        ({"tokens": 40}, "short"),  # |60 - 100| = 40, just inside
        ({"tokens": 39}, "near"),  # |115 - 100| = 15
        ({"ratio": 1.9}, "short"),  # 100/60 = 1.67; 190/100 = 1.9
        ({"ratio": 1.15}, "near"),  # 115/100 = 1.15, just inside
        ({"tokens": 90, "ratio": 1.6}, "near"),  # short fails the ratio, long too
        ({"tokens": 35, "ratio": 2.0}, "near"),  # short and long fail the tokens
    ],
)
def test_rejected_comes_from_the_length_window(
    spark: SparkSession, window: dict[str, float], rejected: str
) -> None:
    (row,) = pairs_of(spark, {"p": LENGTHS}, rejected="lowest", length_window=window).values()
    assert (row["rejected_id"], row["length_fallback"]) == (rejected, False)


@pytest.mark.parametrize("rule", ["random", "lowest"])
def test_an_empty_window_falls_back_to_the_nearest_in_length_or_gives_no_pair(
    spark: SparkSession, rule: str
) -> None:
    prompts = {"p": LENGTHS, "q": [*LENGTHS, Candidate("close", 0.0, num_tokens=95)]}
    window = {"tokens": 10}
    # p: |60 - 100| = 40, |115 - 100| = 15, |190 - 100| = 90: near. q: |95 - 100| = 5 is inside.
    pairs = pairs_of(spark, prompts, rejected=rule, length_window=window)
    assert ids_of(pairs) == {"p": ("best", "near"), "q": ("best", "close")}
    assert {prompt: row["length_fallback"] for prompt, row in pairs.items()} == {
        "p": True,
        "q": False,
    }
    strict = pairs_of(spark, prompts, rejected=rule, length_window=window, fallback="no_pair")
    assert ids_of(strict) == {"p": (None, None), "q": ("best", "close")}
    assert reasons_of(strict) == {"p": "outside_length_window", "q": None}
    assert strict["p"]["length_fallback"] is False


def test_dice_ranks_by_reward_less_alpha_per_character(spark: SparkSession) -> None:
    candidates = [
        Candidate("long", 10.0, text="x" * 100),
        Candidate("short", 8.0, text="x" * 20),
        Candidate("bad", 1.0, text="x" * 10),
        Candidate("wordy", 2.0, text="x" * 60),
    ]
    # alpha 0:    long 10, short 8, wordy 2, bad 1.
    assert ids_of(pairs_of(spark, {"p": candidates}, rejected="dice")) == {"p": ("long", "bad")}
    # alpha 0.05: long 10 - 5 = 5, short 8 - 1 = 7, bad 1 - 0.5 = 0.5, wordy 2 - 3 = -1.
    (row,) = pairs_of(spark, {"p": candidates}, rejected="dice", dice_alpha=0.05).values()
    assert (row["chosen_id"], row["rejected_id"]) == ("short", "wordy")
    assert row["margin"] == 6.0  # of rewards, 8 - 2, not of scores


def test_dice_never_prefers_against_the_reward(spark: SparkSession) -> None:
    # alpha 0.1: long 10 - 10 = 0 or 8 - 10 = -2, short 8 - 2 = 6.
    short = Candidate("short", 8.0, text="x" * 20)
    prompts = {
        "lower": [Candidate("long", 10.0, text="x" * 100), short],
        "equal": [Candidate("long", 8.0, text="x" * 100), short],
    }
    pairs = pairs_of(spark, prompts, rejected="dice", dice_alpha=0.1)
    assert reasons_of(pairs) == {"lower": "below_min_margin", "equal": "below_min_margin"}


def random_prompts(count: int) -> dict[str, list[Candidate]]:
    """Prompts with ties, repeated texts, cut completions and all sizes from one candidate up."""
    rng = random.Random(7)
    return {
        f"prompt {i}": [
            Candidate(
                id=f"c{j:02}",
                # Few values, so that equal rewards and equal lengths are common.
                reward=rng.randint(-3, 3) / 4,
                num_tokens=rng.choice([5, 8, 40, 50, 60, 200]),
                text=rng.choice(["", "", "", "twin", "other twin" * 5]),
                finish_reason=rng.choice(["stop", "length", None]),
            )
            for j in range(rng.randint(1, 9))
        ]
        for i in range(count)
    }


def expected_ids(
    prompt: str, rows: Sequence[Candidate], spec: PairSpec
) -> tuple[str | None, str | None]:
    """Select by the rules in plain Python, as they are worded in docs/explanation/pairs.md."""
    by_text: dict[str, Candidate] = {}
    for c in sorted(rows, key=lambda c: c.id):
        if not (spec.drop_length_stopped and c.finish_reason == "length"):
            by_text.setdefault(c.completion, c)
    alpha = spec.dice_alpha if spec.rejected == "dice" else 0.0

    def score(c: Candidate) -> float:
        return c.reward - alpha * len(c.completion)

    def draw(c: Candidate) -> str:
        return sha256(f"{spec.seed}:{sha256(prompt)}:{sha256(c.completion)}")

    ranked = sorted(by_text.values(), key=lambda c: (-score(c), c.id))
    if not ranked:
        return None, None
    best = ranked[0]
    eligible = [
        c
        for c in ranked
        if score(c) < score(best)
        and c.reward < best.reward
        and best.reward - c.reward >= spec.min_margin
    ]
    window = [
        c
        for c in eligible
        if (t := spec.length_window.tokens) is None or abs(c.num_tokens - best.num_tokens) <= t
        if (r := spec.length_window.ratio) is None
        or max(c.num_tokens, best.num_tokens) / min(c.num_tokens, best.num_tokens) <= r
    ]
    if not window and spec.fallback == "nearest_length" and eligible:
        least = min(abs(c.num_tokens - best.num_tokens) for c in eligible)
        window = [c for c in eligible if abs(c.num_tokens - best.num_tokens) == least]
    if not window:
        return None, None
    if spec.rejected == "random":
        return best.id, min(window, key=draw).id
    return best.id, (window[0] if spec.rejected == "second_best" else window[-1]).id


@pytest.mark.parametrize(
    "spec",
    [
        PairSpec(),
        PairSpec.model_validate({"length_window": {"tokens": 15, "ratio": 1.3}, "seed": 3}),
        PairSpec.model_validate(
            {"rejected": "lowest", "length_window": {"ratio": 1.7}, "drop_length_stopped": True}
        ),
        PairSpec.model_validate(
            {
                "rejected": "second_best",
                "length_window": {"tokens": 15},
                "fallback": "no_pair",
                "min_margin": 0.5,
            }
        ),
        PairSpec.model_validate(
            {"rejected": "dice", "dice_alpha": 1 / 32, "length_window": {"tokens": 50}}
        ),
    ],
    ids=lambda spec: spec.rejected,
)
def test_many_random_prompts_get_the_pairs_that_plain_python_selects(
    spark: SparkSession, spec: PairSpec
) -> None:
    prompts = random_prompts(150)
    pairs = pairs_of(spark, prompts, **spec.model_dump())
    assert ids_of(pairs) == {p: expected_ids(p, rows, spec) for p, rows in prompts.items()}
    found = [row for row in pairs.values() if row["no_pair_reason"] is None]
    assert 30 < len(found) < 150  # both kinds are there to be compared
    for row in found:
        assert row["chosen_reward"] > row["rejected_reward"]
        assert row["margin"] == row["chosen_reward"] - row["rejected_reward"]
        assert row["margin"] >= spec.min_margin
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in row[side]] == ["assistant"]


def test_row_order_and_partitioning_change_nothing(spark: SparkSession) -> None:
    rows = rows_of(random_prompts(60))
    spec = PairSpec.model_validate({"length_window": {"tokens": 15}})

    def pairs(table: DataFrame) -> list[Row]:
        return sorted(select_pairs(table, spec).collect(), key=lambda row: str(row["prompt_id"]))

    first = pairs(spark.createDataFrame(rows, SCHEMA))
    for seed, num_partitions in ((1, 1), (2, 5)):
        shuffled = random.Random(seed).sample(rows, len(rows))
        table = spark.createDataFrame(shuffled, SCHEMA).repartition(num_partitions)
        assert pairs(table) == first


def test_prompts_that_share_an_id_are_never_mixed(spark: SparkSession) -> None:
    one = scored_of(spark, {"p": [Candidate("a", 1.0), Candidate("b", 0.0)]})
    other = one.withColumns(
        {"prompt_hash": F.lit(sha256("another prompt")), "reward": -F.col("reward")}
    )
    found = select_pairs(one.union(other), PairSpec()).collect()
    assert {row["prompt_hash"]: (row["chosen_id"], row["rejected_id"]) for row in found} == {
        sha256("p"): ("a", "b"),
        sha256("another prompt"): ("b", "a"),
    }


def test_the_split_depends_on_the_prompt_alone(spark: SparkSession) -> None:
    prompts = {f"p{i}": FOUR for i in range(400)}
    better = {prompt: [replace(c, reward=-c.reward) for c in FOUR] for prompt in prompts}

    def split_of(table: Mapping[str, Sequence[Candidate]], **spec: Any) -> dict[str, str]:
        return {prompt: row["split"] for prompt, row in pairs_of(spark, table, **spec).items()}

    first = split_of(prompts, validation_fraction=0.2)
    assert first == split_of(
        better, validation_fraction=0.2, rejected="lowest", seed=9, min_margin=100.0
    )
    held_out = {prompt for prompt, split in first.items() if split == "validation"}
    # 400 prompts at 0.2: mean 80, standard deviation sqrt(400 · 0.2 · 0.8) = 8; four of them.
    assert 48 <= len(held_out) <= 112
    larger = split_of(prompts, validation_fraction=0.5)
    assert held_out < {prompt for prompt, split in larger.items() if split == "validation"}


def test_a_fraction_of_zero_holds_nothing_out(spark: SparkSession) -> None:
    hashes = spark.range(200).select(F.sha2(F.col("id").cast("string"), 256).alias("prompt_hash"))
    splits = hashes.select(split_column(F.col("prompt_hash"), 0.0)).distinct().collect()
    assert [row[0] for row in splits] == ["train"]


def test_one_shuffle_is_all_it_takes(spark: SparkSession) -> None:
    pairs = select_pairs(scored_of(spark, {"p": FOUR}), PairSpec())
    plan = pairs._jdf.queryExecution().executedPlan().toString()
    assert plan.count("Exchange hashpartitioning") == 1
    assert plan.count("Exchange") == 1


def test_a_missing_column_is_named_even_where_the_spec_does_not_need_it(
    spark: SparkSession,
) -> None:
    scored = scored_of(spark, {"p": FOUR})
    assert tuple(scored.columns) == SCORED_COLUMNS
    with pytest.raises(AnalysisException, match="finish_reason"):
        select_pairs(scored.drop("finish_reason"), PairSpec(drop_length_stopped=False))
