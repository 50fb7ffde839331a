"""Waves: long work cut into ranges of buckets that are answered and committed one by one.

Prompts fall into buckets by a hash of their messages, so that a bucket holds whole prompts and
buckets are about alike. A wave is a range of buckets: engines are asked about its rows, and their
answers appended in one commit, so that a killed run loses one wave at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyspark.sql import Column, DataFrame, Observation
from pyspark.sql import functions as F

from cdr.engines.base import EngineSpec
from cdr.gpus import task_gpus
from cdr.stages import Context, MapFunction
from cdr.tables import Table

BUCKETS = 4096


class BucketRange(NamedTuple):
    """Buckets from `low` up to but not including `high`, and the tokens in them."""

    low: int
    high: int
    tokens: int

    def holds(self, bucket: Column) -> Column:
        """Build the condition that a row's bucket is in the range."""
        return (bucket >= self.low) & (bucket < self.high)


def bucket_column(prompt_hash: str) -> Column:
    """Build the bucket of a prompt: an int below `BUCKETS`.

    Args:
        prompt_hash: name of the column of hex hashes.
    """
    return (hash_number(prompt_hash) % BUCKETS).cast("int")


def hash_number(prompt_hash: str) -> Column:
    """Build a number below 2³² from the first eight digits of a column of hex hashes."""
    return F.conv(F.substring(prompt_hash, 1, 8), 16, 10).cast("bigint")


def cut_buckets(tokens: Mapping[int, int], tokens_per_wave: int) -> list[BucketRange]:
    """Cut all buckets into ranges of at least `tokens_per_wave` tokens, the last one aside.

    Args:
        tokens: by bucket; buckets without work may be missing.
        tokens_per_wave: a bucket is never cut, so a range may hold more.

    Returns:
        Ranges in order, without overlap, each with work in it.
    """
    ranges = []
    low = gathered = 0
    for bucket in range(BUCKETS):
        gathered += tokens.get(bucket, 0)
        if gathered >= tokens_per_wave or (bucket == BUCKETS - 1 and gathered):
            ranges.append(BucketRange(low, bucket + 1, gathered))
            low, gathered = bucket + 1, 0
    return ranges


def cut_tasks(rows: DataFrame, wave: BucketRange, run: Context, *together: str) -> DataFrame:
    """Take a wave's rows, cut into Spark tasks of rows that are neighbours.

    There are enough tasks for `run.task_tokens` each on average, and one per device at least.

    Reads: bucket, and those of `together`.

    Args:
        rows: of all waves.
        wave: the buckets to take.
        run: the run.
        together: columns that say what is near to what; rows alike in all of them lie in one task.
    """
    num_tasks = math.ceil(wave.tokens / run.plan.config.run.task_tokens)
    # An explicit number is kept by adaptive execution: no device idles.
    return rows.where(wave.holds(F.col("bucket"))).repartitionByRange(
        max(run.num_devices, num_tasks), *together
    )


class WaveResult(NamedTuple):
    """What a wave did: rows committed, and rows without an answer this time."""

    committed: int
    failed: int


def answer_wave(
    questions: DataFrame,
    function: MapFunction,
    schema: str,
    run: Context,
    *,
    engines: Sequence[EngineSpec],
    table: Table,
    staged_as: str,
    stamps: Mapping[str, Column] | None = None,
) -> WaveResult:
    """Ask engines about a wave's rows, and append what they answer to a table in one commit.

    The wave is staged first: answers and failures come out of one pass over the models. Failures
    stay there for later stages to read.

    Args:
        questions: the wave's rows, cut into tasks and sorted as they are to be asked.
        function: asks the engine host of its task.
        schema: of what it yields; `error` is null in rows with an answer.
        run: the run.
        engines: those that `function` asks; they say how many GPUs a task needs.
        table: where answers go.
        staged_as: name of the wave in the run's staging folder.
        stamps: columns that `table` has besides, the same in all rows; `run_id` is always one.
    """
    observed = Observation()
    answers = questions.mapInPandas(
        function, schema, **task_gpus(run.warehouse.spark, engines)
    ).observe(
        observed,
        F.count(F.when(F.col("error").isNull(), 1)).alias("committed"),
        F.count("error").alias("failed"),
    )
    staged = run.staging.write(staged_as, answers)
    result = WaveResult(**observed.get)
    if result.committed:
        stamped = {**(stamps or {}), "run_id": F.lit(run.run_id)}
        run.warehouse.append(table, staged.where("error IS NULL").withColumns(stamped))
    return result
