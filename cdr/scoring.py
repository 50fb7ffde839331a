"""Scoring in waves: ask the models what `logprobs` lacks, and commit the answers atomically.

The work list is computed once per run: encoded prompts less what the table holds. Prompts fall
into buckets by hash; a wave is a range of buckets, scored and then appended in one Delta commit.
A run killed at any instant loses at most the wave in flight, and the next run's work list holds
exactly what is not committed, new rows of old buckets included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Observation
from pyspark.sql import functions as F

from cdr.config import RunSpec
from cdr.engines.base import EngineSpec
from cdr.stages import MapFunction
from cdr.staging import Staging
from cdr.tables import LOGPROBS, Warehouse

BUCKETS = 4096
"""Prompts fall into this many buckets by hash; a wave is a range of them."""

SCORED_DDL = (
    "model_key string, prefix_hash binary, completion_hash binary, logprob_sum double, "
    "num_tokens int, num_prefix_tokens int, token_logprobs array<float>, engine_version string, "
    "error string"
)
"""Schema of what a scoring function yields, one row per completion; `error` null when scored."""


@dataclass(frozen=True)
class Work:
    """What is asked of the models, and what `logprobs` lacks of it.

    Args:
        rows: prompts to score, one row per model and prefix: model_key, bucket, prefix_hash,
            prefix_ids, completion_hashes, completions_ids, num_rows.
        asked: log-probs the reward needs, identical ones counted once.
        missing: those of them that are not in `logprobs` yet.
        prefix_tokens: prefix tokens of the missing ones, each prefix once.
        completion_tokens: completion tokens of the missing ones.
        tokens_by_model: tokens of the missing ones by model key.
        prompts: prompts with something missing.
    """

    rows: DataFrame
    asked: int
    missing: int
    prefix_tokens: int
    completion_tokens: int
    tokens_by_model: dict[str, int]
    prompts: int

    @property
    def tokens(self) -> int:
        """Tokens to be read by the models, each prefix once."""
        return self.prefix_tokens + self.completion_tokens


def plan_work(
    encoded: DataFrame, engines: Sequence[EngineSpec], warehouse: Warehouse, staging: Staging
) -> Work:
    """Find what has to be scored: the encoded prompts less what `logprobs` holds.

    A prompt under two ids, and the same completion twice in a prompt, are one question. (Grouping
    by the prompt as well keeps a prefix that all prompts share, that of an unconditional term,
    from gathering the whole dataset in one row.) Written once, sorted by bucket, so that a wave
    reads only its own files.

    Args:
        encoded: from `cdr.stages.encode`.
        engines: the scoring models.
        warehouse: where `logprobs` is.
        staging: where the work list lies.
    """
    keys = [engine.name for engine in engines]
    views = encoded.select("prompt_hash", F.explode("views").alias("v")).select(
        "prompt_hash", "v.model_key", "v.prefix_hash", "v.prefix_ids", "v.candidates"
    )
    candidate = F.transform(
        "candidates", lambda c: F.struct(c["completion_hash"].alias("hash"), c["ids"].alias("ids"))
    )
    questions = views.groupBy("model_key", "prefix_hash", "prompt_hash").agg(
        F.first("prefix_ids").alias("prefix_ids"),
        F.array_distinct(F.flatten(F.collect_list(candidate))).alias("asked"),
    )
    done = (
        warehouse.read(LOGPROBS)
        .where(F.col("model_key").isin(keys))
        .groupBy("model_key", "prefix_hash")
        .agg(F.collect_set("completion_hash").alias("done"))
    )
    joined = questions.join(done, on=["model_key", "prefix_hash"], how="left")
    missing = F.when(F.col("done").isNull(), F.col("asked")).otherwise(
        F.filter("asked", lambda c: ~F.array_contains(F.col("done"), c["hash"]))
    )
    token_count = F.aggregate(
        "missing", F.lit(0).cast("bigint"), lambda total, c: total + F.size(c["ids"])
    )
    observed = Observation("work")
    rows = joined.withColumn("missing", missing).select(
        "model_key",
        _bucket(F.col("prompt_hash")).alias("bucket"),
        "prompt_hash",
        "prefix_hash",
        "prefix_ids",
        F.transform("missing", lambda c: c["hash"]).alias("completion_hashes"),
        F.transform("missing", lambda c: c["ids"]).alias("completions_ids"),
        F.size("asked").cast("bigint").alias("asked"),
        F.size("missing").cast("bigint").alias("missing"),
        F.when(F.size("missing") > 0, F.size("prefix_ids")).otherwise(0).alias("prefix_tokens"),
        token_count.alias("completion_tokens"),
    )
    rows = rows.observe(
        observed,
        F.sum("asked").alias("asked"),
        F.sum("missing").alias("missing"),
        F.sum("prefix_tokens").alias("prefix_tokens"),
        F.sum("completion_tokens").alias("completion_tokens"),
        *[
            F.sum(
                F.when(
                    F.col("model_key") == key, F.col("prefix_tokens") + F.col("completion_tokens")
                )
            ).alias(f"tokens_{key}")
            for key in keys
        ],
    )
    written = staging.write(
        "work", rows.repartitionByRange("bucket").sortWithinPartitions("bucket")
    ).where("missing > 0")
    seen = observed.get
    # Distinct prompts cannot be observed in one pass; the column alone is read back.
    prompts = written.select("prompt_hash").distinct().count()
    return Work(
        rows=written,
        asked=seen["asked"] or 0,
        missing=seen["missing"] or 0,
        prefix_tokens=seen["prefix_tokens"] or 0,
        completion_tokens=seen["completion_tokens"] or 0,
        tokens_by_model={key: seen[f"tokens_{key}"] or 0 for key in keys},
        prompts=prompts,
    )


@dataclass(frozen=True)
class Wave:
    """A range of buckets to score with some of the models.

    Args:
        number: from 0, over the whole run.
        total: waves of the run.
        low: first bucket.
        high: bucket behind the last one.
        engines: models loaded for this wave.
        tokens: tokens to be read, prefixes once.
        prompts: prompts with something to score.
    """

    number: int
    total: int
    low: int
    high: int
    engines: tuple[EngineSpec, ...]
    tokens: int
    prompts: int


def plan_waves(work: Work, engines: Sequence[EngineSpec], run: RunSpec) -> list[Wave]:
    """Cut the work into waves of about `run.wave_tokens` tokens.

    Colocated: every wave asks all models. Sequential: all waves of one model, then of the next,
    so that each is loaded once. Empty waves are left out.
    """
    sets = [tuple(engines)] if run.placement == "colocated" else [(engine,) for engine in engines]
    sizes = {
        (row["model_key"], row["bucket"]): (row["tokens"], row["prompts"])
        # At most BUCKETS rows per model: the size of each bucket, to cut waves by.
        for row in work.rows.groupBy("model_key", "bucket")
        .agg(
            F.sum(F.col("prefix_tokens") + F.col("completion_tokens")).alias("tokens"),
            F.countDistinct("prompt_hash").alias("prompts"),
        )
        .collect()
    }
    cut: list[tuple[int, int, tuple[EngineSpec, ...], int, int]] = []
    for loaded in sets:
        names = [engine.name for engine in loaded]
        low, tokens, prompts = 0, 0, 0
        for bucket in range(BUCKETS):
            found = [sizes.get((name, bucket), (0, 0)) for name in names]
            tokens += sum(size for size, _ in found)
            prompts += max(count for _, count in found)
            if tokens >= run.wave_tokens or (bucket == BUCKETS - 1 and tokens):
                cut.append((low, bucket + 1, loaded, tokens, prompts))
                low, tokens, prompts = bucket + 1, 0, 0
    return [Wave(i, len(cut), *rest) for i, rest in enumerate(cut)]


@dataclass(frozen=True)
class WaveResult:
    """What a wave did: completions scored, and completions without a score this time."""

    scored: int
    failed: int


def score_wave(
    wave: Wave,
    work: Work,
    make_score: Callable[[tuple[EngineSpec, ...], RunSpec], MapFunction],
    run: RunSpec,
    warehouse: Warehouse,
    staging: Staging,
    run_id: str,
    num_devices: int,
) -> WaveResult:
    """Score one wave and append it to `logprobs` in one commit.

    A prompt's questions go to one task, sorted so that neighbours share the longest prefix. The
    wave is staged first: scores and failures come out of one pass over the models.

    Args:
        wave: from `plan_waves`.
        work: from `plan_work`.
        make_score: `udfs.score.make_score`.
        run: how the work is cut.
        warehouse: where `logprobs` is.
        staging: where the wave lies before its commit.
        run_id: stored with the rows.
        num_devices: devices to keep busy.
    """
    names = [engine.name for engine in wave.engines]
    num_tasks = max(num_devices, math.ceil(wave.tokens / run.task_tokens))
    observed = Observation()
    scored = (
        work.rows.where((F.col("bucket") >= wave.low) & (F.col("bucket") < wave.high))
        .where(F.col("model_key").isin(names))
        # An explicit number is kept by adaptive execution: no device idles.
        .repartition(num_tasks, "prompt_hash")
        .sortWithinPartitions("model_key", "prefix_ids")
        .select("model_key", "prefix_hash", "prefix_ids", "completion_hashes", "completions_ids")
        .mapInPandas(make_score(wave.engines, run), SCORED_DDL)
        .observe(
            observed,
            F.count(F.when(F.col("error").isNull(), 1)).alias("scored"),
            F.count("error").alias("failed"),
        )
    )
    written = staging.write(f"scored/wave={wave.number}", scored)
    counts = observed.get
    if counts["scored"]:
        ok = written.where("error IS NULL").withColumn("run_id", F.lit(run_id))
        warehouse.append(LOGPROBS, ok)
    return WaveResult(scored=counts["scored"], failed=counts["failed"])


def _bucket(prompt_hash: Column) -> Column:
    first = F.conv(F.substring(prompt_hash, 1, 8), 16, 10).cast("bigint")
    return (first % BUCKETS).cast("int")
