"""The stages of a sampling run: prompts in, rows of `completions` out.

    prompts -> validate -> what is missing -> sample in waves -> completions

A wave is one atomic commit; the next run samples what the table lacks. Text is a function of the
seed up to rounding: in float32 the other rows of a batch hardly ever change a token, in bfloat16
now and then.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import astuple, dataclass
from pathlib import Path

from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from cdr.errors import InputError, RejectReason
from cdr.gpus import task_gpus
from cdr.inputs import NOT_BLANK, messages_column, optional_column, prompt_hash
from cdr.sampling import PromptsSpec, SamplingPlan
from cdr.sources import (
    IDENTIFIER,
    PROMPT,
    TEXT,
    check_columns,
    no_rows,
    read_source,
    reading,
)
from cdr.stages import MapFunction
from cdr.staging import Staging
from cdr.tables import COMPLETIONS, REJECTS
from cdr.warehouse import Warehouse
from cdr.waves import hash_number

GENERATED_DDL = (
    "prompt_id string, completion_id string, completion string, finish_reason string, "
    "num_tokens int, seed bigint, reason string, detail string, error string"
)
"""What a sampling function yields: a row per sample, with `error` where there is none this time;
or one row with `reason` for a prompt that is refused for good."""


@dataclass(frozen=True)
class SamplingContext:
    """What every stage of a run works with.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.
        staging: the run's intermediate tables.
        run_id: stored with every row written.
        input_version: Delta version of the prompts; None for other formats.
        num_tasks: Spark tasks of a wave, at least the devices to keep busy.
    """

    plan: SamplingPlan
    warehouse: Warehouse
    staging: Staging
    run_id: str
    input_version: int | None
    num_tasks: int


@dataclass(frozen=True)
class SamplingWork:
    """What a run has to sample.

    Args:
        prompts: all prompts, and with `reason` those that cannot be used.
        rows: a row per prompt with missing samples: prompt_id, prompt_hash, prompt, domain,
            numbers (of the samples), wave.
        num_prompts: rows of `prompts`.
        num_missing_prompts: rows of `rows`.
        num_missing: samples to draw.
        num_waves: `wave` is below it.
    """

    prompts: DataFrame
    rows: DataFrame
    num_prompts: int
    num_missing_prompts: int
    num_missing: int
    num_waves: int


@dataclass(frozen=True)
class SampleCounts:
    """What came of one or more waves.

    Args:
        sampled: samples written.
        failed: samples without a text this time.
        refused: prompts that the chat template or the policy's length refused.
        tokens: tokens of the samples written.
        cut: samples that reached `max_new_tokens`.
        empty: samples without text: the policy ended its turn at once.
    """

    sampled: int = 0
    failed: int = 0
    refused: int = 0
    tokens: int = 0
    cut: int = 0
    empty: int = 0

    def plus(self, other: SampleCounts) -> SampleCounts:
        """Add field by field."""
        return SampleCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def read_prompts(spark: SparkSession, source: PromptsSpec) -> DataFrame:
    """Read prompts, one row each, with a reason on those that cannot be used.

    A prompt that stands twice under one id is one prompt. What a chat template refuses (roles,
    their order, special tokens) shows when it is encoded.

    Returns:
        prompt_id, prompt_hash, prompt (messages), domain, row (the input's, as JSON), reason and
        detail (null for prompts that can be used).

    Raises:
        InputError: the input is missing, unreadable, empty, lacks a column or has one of another
            type.
    """
    rows = read_source(spark, source)
    columns = source.columns
    check_columns(
        rows,
        [(columns.prompt, PROMPT), (columns.prompt_id, IDENTIFIER), (columns.domain, TEXT)],
        source.place,
    )
    with reading(source):
        if rows.isEmpty():
            raise no_rows(source.place)
    messages = messages_column(rows, columns.prompt)
    named = rows.select(
        messages.alias("prompt"),
        F.when(messages.isNotNull(), prompt_hash(messages)).alias("prompt_hash"),
        optional_column(columns.prompt_id).cast("string").alias("given_id"),
        optional_column(columns.domain).cast("string").alias("domain"),
        F.to_json(F.struct("*")).alias("row"),
    ).withColumn("prompt_id", F.coalesce("given_id", "prompt_hash"))
    once = named.groupBy("prompt_id", "prompt_hash").agg(
        *(F.min_by(name, "row").alias(name) for name in ("prompt", "domain", "row"))
    )
    per_id = once.groupBy("prompt_id").agg(F.count("*").alias("num_prompts"))
    last = F.element_at("prompt", -1)["content"]
    rules = (
        (F.col("prompt").isNull(), RejectReason.NULL_PROMPT, "the prompt is null"),
        (F.size("prompt") == 0, RejectReason.EMPTY_PROMPT, "the prompt has no messages"),
        (~last.rlike(NOT_BLANK), RejectReason.EMPTY_PROMPT, "the last message is empty"),
        (
            F.col("num_prompts") > 1,
            RejectReason.DUPLICATE_ID,
            "this prompt_id stands for more than one prompt",
        ),
    )
    return once.join(per_id, on="prompt_id", how="left").select(
        "prompt_id", "prompt_hash", "prompt", "domain", "row",
        F.coalesce(*(F.when(rule, F.lit(why.value)) for rule, why, _ in rules)).alias("reason"),
        F.coalesce(*(F.when(rule, F.lit(said)) for rule, _, said in rules)).alias("detail"),
    )  # fmt: skip


def read_samples(plan: SamplingPlan, warehouse: Warehouse) -> DataFrame:
    """Read the dataset's samples, one row per key.

    Raises:
        InputError: some were drawn in another way, so that an id would stand for two texts.
    """
    dataset = plan.config.dataset
    rows = warehouse.read_one_per_key(COMPLETIONS).where(F.col("dataset") == dataset)
    if not rows.where(F.col("sampling_key") != plan.sampling_key).isEmpty():
        raise InputError(
            f"dataset '{dataset}' holds samples of another policy, template, seed or temperature",
            where=warehouse.place(COMPLETIONS),
            fix="--set dataset=NEW_NAME",
        )
    return rows


def plan_samples(run: SamplingContext) -> SamplingWork:
    """Find what has to be sampled: N samples of every usable prompt less those there are.

    Raises:
        InputError: as for `read_prompts` and `read_samples`.
    """
    plan = run.plan
    source = plan.config.input.model_copy(update={"version": run.input_version})
    prompts = read_prompts(run.warehouse.spark, source)
    if plan.limit is not None:
        prompts = prompts.orderBy("prompt_hash", "prompt_id").limit(plan.limit)
    done = read_samples(plan, run.warehouse).groupBy("prompt_id").agg(
        F.collect_set("completion_id").alias("done"),
        F.max(prompt_hash(F.col("prompt"))).alias("sampled_hash"),
    )  # fmt: skip
    changed = F.col("reason").isNull() & (F.col("sampled_hash") != F.col("prompt_hash"))
    said = "completions holds samples of another prompt under this prompt_id"
    known = prompts.join(done, on="prompt_id", how="left").withColumns(
        {
            "reason": F.when(changed, RejectReason.DUPLICATE_ID.value).otherwise(F.col("reason")),
            "detail": F.when(changed, said).otherwise(F.col("detail")),
        }
    )
    with reading(source):
        written = run.staging.write("prompts", known.drop("sampled_hash"))

    def is_missing(number: Column) -> Column:
        identifier = F.concat("prompt_id", F.lit("-"), number.cast("string"))
        return ~F.coalesce(F.array_contains("done", identifier), F.lit(False))

    numbers = F.sequence(F.lit(1), F.lit(plan.config.sampling.num_samples))
    rows = written.withColumn(
        "numbers", F.when(F.col("reason").isNull(), F.filter(numbers, is_missing))
    )
    # Three numbers, from the small staged table: they size the waves and the progress bar.
    total = rows.agg(
        F.count("*"),
        F.count(F.when(F.size("numbers") > 0, 1)),
        F.coalesce(F.sum(F.size("numbers")), F.lit(0)),
    ).first()
    assert total is not None
    num_waves = math.ceil(total[1] / plan.config.run.wave_prompts)
    return SamplingWork(
        prompts=written,
        rows=rows.where(F.size("numbers") > 0).withColumn(
            "wave", hash_number("prompt_hash") % max(num_waves, 1)
        ),
        num_prompts=total[0],
        num_missing_prompts=total[1],
        num_missing=total[2],
        num_waves=num_waves,
    )


def sample_wave(
    wave: int, work: SamplingWork, run: SamplingContext, function: MapFunction
) -> SampleCounts:
    """Sample one wave and append it to `completions` in one commit.

    The wave is staged first: samples, refusals and failures come out of one pass.

    Args:
        wave: value of `work.rows.wave`.
        work: from `plan_samples`.
        run: the run.
        function: `udfs.generate.make_generate(plan, counter)`.
    """
    rows = work.rows.where(F.col("wave") == wave)
    is_sample = F.col("completion").isNotNull()
    observed = Observation()
    generated = (
        rows.select("prompt_id", "prompt_hash", "prompt", "numbers")
        # An explicit number is kept by adaptive execution: no device idles.
        .repartition(run.num_tasks, "prompt_hash")
        .sortWithinPartitions("prompt_hash")
        .mapInArrow(function, GENERATED_DDL, **task_gpus(run.warehouse.spark, [run.plan.engine]))
        .observe(
            observed,
            F.count(F.when(is_sample, 1)).alias("sampled"),
            F.count("error").alias("failed"),
            F.count("reason").alias("refused"),
            F.coalesce(F.sum("num_tokens"), F.lit(0)).alias("tokens"),
            F.count(F.when(F.col("finish_reason") == "length", 1)).alias("cut"),
            F.count(F.when(F.col("completion") == "", 1)).alias("empty"),
        )
    )
    written = run.staging.write(f"sampled/wave={wave}", generated)
    counts = SampleCounts(**observed.get)
    if counts.sampled:
        prompts = rows.select("prompt_id", "prompt", "domain")
        samples = written.where(is_sample).join(prompts, on="prompt_id", how="inner")
        stamps = {
            "dataset": F.lit(run.plan.config.dataset),
            "sampling_key": F.lit(run.plan.sampling_key),
            "run_id": F.lit(run.run_id),
        }
        run.warehouse.append(COMPLETIONS, samples.withColumns(stamps))
    return counts


def write_rejects(work: SamplingWork, run: SamplingContext) -> dict[str, int]:
    """Write every refused prompt with its reason, replacing this dataset's earlier ones.

    They stand under the dataset `NAME.prompts`: an annotate run of NAME has rejects of its own.

    Args:
        work: from `plan_samples`; all its waves are sampled.
        run: the run.

    Returns:
        Prompts by reason.
    """
    columns = ("prompt_id", "row", "reason", "detail", "stage")
    rows = work.prompts.where("reason IS NOT NULL")
    rejects = rows.withColumn("stage", F.lit("validate")).select(*columns)
    if work.num_waves:
        refused = run.staging.read("sampled").where("reason IS NOT NULL")
        given = work.prompts.select("prompt_id", "row")
        rows = refused.join(given, on="prompt_id", how="inner")
        rejects = rejects.unionByName(
            rows.withColumn("stage", F.lit("encode")).select(*columns)
        )  # fmt: skip
    dataset = f"{run.plan.config.dataset}.prompts"
    stamps = {
        "dataset": F.lit(dataset),
        "source_row": F.sha2("row", 256),
        "completion_id": F.lit(None),
        "run_id": F.lit(run.run_id),
    }
    run.warehouse.replace(REJECTS, rejects.withColumns(stamps), dataset=dataset)
    written = run.warehouse.read(REJECTS).where(F.col("dataset") == dataset)
    # One row per reason.
    return {row[0]: row[1] for row in written.groupBy("reason").count().collect()}


def export_samples(run: SamplingContext, file: Path) -> int:
    """Write the dataset as JSON lines, sorted by prompt and sample number.

    All of it goes through this process: for sets small enough to ship.

    Returns:
        Lines written.
    """
    fields = ("prompt_id", "domain", "prompt", "completion_id", "completion", "finish_reason")
    rows = read_samples(run.plan, run.warehouse).orderBy(
        "prompt_id", F.length("completion_id"), "completion_id"
    )
    fresh = file.with_name(f"{file.name}.new")
    count = 0
    with fresh.open("w", encoding="utf-8") as stream:
        for row in rows.select(*fields).toLocalIterator():
            line = json.dumps(row.asDict(recursive=True), ensure_ascii=False)
            stream.write(f"{line}\n")
            count += 1
    os.replace(fresh, file)
    return count
