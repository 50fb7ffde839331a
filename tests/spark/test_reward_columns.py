from __future__ import annotations

import math
from typing import Literal

import pytest
from pyspark.sql import SparkSession

from cdr.reward import (
    logprob_column,
    reward_column,
    reward_value,
    strong_term,
    term_name,
    weak_term,
)
from cdr.reward_config import Condition, TermSpec

Entry = tuple[float | None, int | None]

SCHEMA = "terms map<string, struct<logprob_sum: double, num_tokens: int>>"
DENSITY_RATIO = (
    TermSpec(model="strong", condition="conditioned", weight=1.0),
    TermSpec(model="weak", condition="conditioned", weight=-1.0),
)
STRONG, WEAK = (term_name(term) for term in DENSITY_RATIO)
REDUCTIONS: tuple[Literal["sum", "mean"], ...] = ("sum", "mean")


def rewards_of(
    spark: SparkSession, rows: list[dict[str, Entry] | None], reduction: Literal["sum", "mean"]
) -> list[float | None]:
    table = spark.createDataFrame([(row,) for row in rows], SCHEMA).coalesce(1)
    return [row[0] for row in table.select(reward_column(DENSITY_RATIO, reduction)).collect()]


def test_the_column_is_the_plain_python_reward_to_the_last_bit(spark: SparkSession) -> None:
    # Four terms with weights that do not divide evenly: the order of additions shows.
    names: list[tuple[str, Condition, float]] = [
        ("strong", "conditioned", 1.1),
        ("strong", "unconditional", -0.3),
        ("weak", "conditioned", -0.7),
        ("weak", "unconditional", 1 / 3),
    ]
    terms = [TermSpec(model=m, condition=c, weight=w) for m, c, w in names]
    sums = {(m, c): -100.0 / (7 + i) for i, (m, c, _) in enumerate(names)}
    counts = {(m, c): 11 + 3 * i for i, (m, c, _) in enumerate(names)}
    row = {f"{m}/{c}": (sums[m, c], counts[m, c]) for m, c, _ in names}
    table = spark.createDataFrame([(row,)], SCHEMA)
    (found,) = table.select(*(reward_column(terms, r).alias(r) for r in REDUCTIONS)).collect()
    for reduction in REDUCTIONS:
        assert found[reduction] == reward_value(terms, sums, counts, reduction)
    assert found["sum"] != found["mean"]


def test_a_term_that_is_missing_or_null_gives_no_reward(spark: SparkSession) -> None:
    rows: list[dict[str, Entry] | None] = [
        {STRONG: (-1.0, 1), WEAK: (-3.0, 1)},
        {STRONG: (-1.0, 1)},
        {STRONG: (-1.0, 1), WEAK: (None, 1)},
        None,
    ]
    assert rewards_of(spark, rows, "sum") == [2.0, None, None, None]


def test_the_mean_needs_tokens_and_the_sum_does_not(spark: SparkSession) -> None:
    rows: list[dict[str, Entry] | None] = [
        {STRONG: (-1.0, 2), WEAK: (-3.0, 4)},  # -1/2 + 3/4 = 0.25
        {STRONG: (-1.0, 0), WEAK: (-3.0, 4)},
        {STRONG: (-1.0, None), WEAK: (-3.0, 4)},
    ]
    assert rewards_of(spark, rows, "mean") == [0.25, None, None]
    assert rewards_of(spark, rows, "sum") == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_and_infinity_never_pass(
    spark: SparkSession, reduction: Literal["sum", "mean"]
) -> None:
    bad = [math.nan, math.inf, -math.inf]
    rows: list[dict[str, Entry] | None] = [{STRONG: (0.0, 1), WEAK: (value, 1)} for value in bad]
    rows += [{STRONG: (value, 1), WEAK: (value, 1)} for value in bad]
    rows += [{STRONG: (-1e308, 1), WEAK: (1e308, 1)}]  # overflows to -inf
    assert rewards_of(spark, rows, reduction) == [None] * 7


def test_strong_and_weak_logprob_are_the_sums_of_their_terms(spark: SparkSession) -> None:
    rows = [
        ({STRONG: (-1.5, 3), WEAK: (-4.0, 2)},),
        ({STRONG: (-1.5, 3)},),
        ({STRONG: (-math.inf, 3), WEAK: (math.nan, 2)},),
    ]
    table = spark.createDataFrame(rows, SCHEMA).coalesce(1)
    found = table.select(
        logprob_column(strong_term(DENSITY_RATIO)).alias("strong_logprob"),
        logprob_column(weak_term(DENSITY_RATIO)).alias("weak_logprob"),
        logprob_column(weak_term(DENSITY_RATIO[:1])).alias("no_such_term"),
    )
    assert found.schema.simpleString() == (
        "struct<strong_logprob:double,weak_logprob:double,no_such_term:double>"
    )
    assert [tuple(row) for row in found.collect()] == [
        (-1.5, -4.0, None),
        (-1.5, None, None),
        (None, None, None),
    ]
