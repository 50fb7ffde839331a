"""Verdicts of a judge behind an API: what `verdicts` lacks is asked in waves, and stored at once.

The counterpart of `cdr.scoring` for a judge that is asked in text. A question (a pair of answers in
one order) is keyed by its content, so that no question is ever paid for twice, whichever run asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.api_judge import read_key
from cdr.engines.base import EngineSpec
from cdr.estimate import Workload
from cdr.judge_encoding import CHARS_PER_TOKEN
from cdr.progress import TaskCounter
from cdr.reward_config import ApiSpec
from cdr.scoring import Wave, Work
from cdr.stages import Context, MapFunction
from cdr.tables import VERDICTS
from cdr.waves import WaveResult, answer_wave, bucket_column, cut_buckets

ASKED_DDL = (
    "model_key string, prefix_hash binary, verdict string, reason string, "
    "prompt_tokens int, answer_tokens int, cost_usd double, answered_by string, error string"
)
"""Schema of what an asking function yields, one row per question; `error` null when answered."""


def plan_questions(encoded: DataFrame, run: Context) -> Work:
    """Find what has to be asked: the encoded questions less those with an answer.

    Args:
        encoded: from `cdr.stages.encode`.
        run: the run.
    """
    (engine,) = run.plan.reward.engines
    questions = (
        encoded.select("prompt_hash", F.explode("views").alias("v"))
        .groupBy("v.prefix_hash")
        .agg(F.min("prompt_hash").alias("prompt_hash"), F.first("v.question").alias("question"))
    )
    known = run.warehouse.read(VERDICTS).where(F.col("model_key") == engine.name)
    rows = questions.join(
        known.select("prefix_hash").distinct().withColumn("is_known", F.lit(True)),
        on="prefix_hash",
        how="left",
    ).select(
        F.lit(engine.name).alias("model_key"),
        bucket_column("prompt_hash").alias("bucket"),
        "prompt_hash",
        "prefix_hash",
        "question",
        F.ceil(F.length("question") / CHARS_PER_TOKEN).alias("prefix_tokens"),
        F.lit(1).cast("bigint").alias("completion_tokens"),
        F.col("is_known").isNull().alias("is_missing"),
    )
    written = run.staging.write(
        "work", rows.repartitionByRange("bucket").sortWithinPartitions("bucket")
    )
    left = written.where("is_missing")
    asked = written.count()  # of what was just written
    # At most BUCKETS rows; a prompt lies in one bucket.
    loads = left.groupBy("bucket").agg(
        F.count("*").alias("questions"),
        F.count_distinct("prompt_hash").alias("prompts"),
        F.sum("prefix_tokens").alias("tokens"),
    ).collect()  # fmt: skip
    missing = sum(load["questions"] for load in loads)
    workload = Workload(
        prompts=sum(load["prompts"] for load in loads),
        completions=missing,
        prefix_tokens=sum(load["tokens"] for load in loads),
        completion_tokens=missing,
    )
    bucket_tokens = {load["bucket"]: load["tokens"] + load["questions"] for load in loads}
    return Work(
        rows=left,
        asked=asked,
        missing={engine.name: workload} if missing else {},
        bucket_tokens={engine.name: bucket_tokens} if missing else {},
    )


def plan_question_waves(work: Work, run: Context) -> list[Wave]:
    """Cut the questions into waves: a killed run has to pay for one again at most.

    Args:
        work: from `plan_questions`.
        run: the run.
    """
    (engine,) = run.plan.reward.engines
    api = ApiSpec.model_validate_json(engine.extra)
    # At most BUCKETS rows.
    rows = work.rows.groupBy("bucket").count().collect()
    counts: dict[int, int] = dict(rows)
    buckets = cut_buckets(counts, api.wave_questions)
    return [Wave(number, (engine,), found) for number, found in enumerate(buckets)]


def ask_wave(
    wave: Wave,
    work: Work,
    run: Context,
    make_ask: Callable[[EngineSpec, ApiSpec, int, TaskCounter], MapFunction],
    counter: TaskCounter,
) -> WaveResult:
    """Ask one wave's questions and append the answers to `verdicts` in one commit.

    Args:
        wave: from `plan_question_waves`.
        work: from `plan_questions`.
        run: the run.
        make_ask: `udfs.ask.make_ask`.
        counter: where tasks count what they have done.

    Raises:
        SetupError: the endpoint's key is not in the environment.
    """
    (engine,) = wave.engines
    api = ApiSpec.model_validate_json(engine.extra)
    read_key(api)  # known missing before any task runs
    # The endpoint's limits are shared out among tasks, so there are no more than run at a time.
    num_tasks = max(1, min(api.concurrency, run.num_tasks))
    questions = (
        work.rows.where(wave.buckets.holds(F.col("bucket")))
        .repartition(num_tasks, "prompt_hash")
        .sortWithinPartitions("prompt_hash")
        .select("model_key", "prefix_hash", "question", "prefix_tokens")
    )
    return answer_wave(
        questions,
        make_ask(engine, api, num_tasks, counter),
        ASKED_DDL,
        run,
        engines=(),
        table=VERDICTS,
        staged_as=f"scored/wave={wave.number}",
    )


def count_cost(run: Context) -> str | None:
    """Say what a run's questions took; None where none was asked."""
    rows = run.warehouse.read(VERDICTS).where(F.col("run_id") == run.run_id)
    found = rows.agg(
        F.count("*"), F.sum("prompt_tokens"), F.sum("answer_tokens"), F.sum("cost_usd")
    ).first()
    if found is None or not found[0]:
        return None
    count, read, wrote, cost = found
    price = "cost not known (no prices in the config)" if cost is None else f"{cost:.4f} USD"
    return (
        f"judge: {count:,} questions answered, {math.floor(read or 0):,} tokens read, "
        f"{math.floor(wrote or 0):,} written, {price}"
    )
