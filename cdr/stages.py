"""The stages of an annotate run: DataFrame in, DataFrame or committed table out.

    candidates -> route (`cdr.routing`) -> encode -> score (`cdr.scoring`) -> reward -> pair

Every stage that uses a model commits what it made and nothing downstream computes it again. What
one run hands from stage to stage lies in its staging folder (`cdr.staging`), Parquet, gone when the
run ends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from cdr.errors import FailReason
from cdr.inputs import read_candidates
from cdr.pairs import select_pairs
from cdr.plan import AnnotationPlan
from cdr.reward import logprob_column, reward_column, strong_term, weak_term
from cdr.sources import reading
from cdr.staging import Staging
from cdr.tables import LOGPROBS, PREFERENCES, REJECTS, REWARDS, UNPAIRED
from cdr.warehouse import Warehouse

MapFunction = Callable[[Iterator[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Context:
    """What every stage of a run works with.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.
        staging: the run's intermediate tables.
        run_id: stored with every row written.
        input_version: Delta version of the input; None for other formats.
        num_tasks: Spark tasks of stages that load no model.
        num_devices: devices to keep busy, tasks at least of stages that load one.
    """

    plan: AnnotationPlan
    warehouse: Warehouse
    staging: Staging
    run_id: str
    input_version: int | None
    num_tasks: int
    num_devices: int


def load_candidates(run: Context) -> DataFrame:
    """Read the input once, so that all stages see the same rows; a limit is applied here.

    Returns:
        The columns of `cdr.inputs.read_candidates`.

    Raises:
        InputError: as for `cdr.inputs.read_candidates`, or a file of the input cannot be read.
    """
    plan = run.plan
    source = plan.config.input.model_copy(update={"version": run.input_version})
    candidates = read_candidates(run.warehouse.spark, source, domains=plan.given_domains)
    if plan.limit is not None:
        # The prompts whose hashes come first: the same ones every time.
        hashes = candidates.where("prompt_hash IS NOT NULL").select("prompt_hash").distinct()
        first = hashes.orderBy("prompt_hash").limit(plan.limit)
        candidates = candidates.join(first, on="prompt_hash", how="left_semi")
    with reading(plan.config.input):
        return run.staging.write("candidates", candidates)


def group_prompts(candidates: DataFrame) -> DataFrame:
    """Gather the candidates that can be scored, one row per prompt.

    Reads: the columns of `cdr.inputs.read_candidates`.

    Returns:
        prompt_id, prompt_hash, prompt, given_domain, candidates (array of completion_id,
        completion, finish_reason, ordered by completion_id).
    """
    candidate = F.struct("completion_id", "completion", "finish_reason")
    return (
        candidates.where("reason IS NULL")
        .groupBy("prompt_id")
        .agg(
            F.first("prompt_hash").alias("prompt_hash"),
            F.first("prompt").alias("prompt"),
            F.first("given_domain").alias("given_domain"),
            F.array_sort(F.collect_list(candidate)).alias("candidates"),
        )
    )


def encode(routed: DataFrame, run: Context, function: MapFunction, schema: str) -> DataFrame:
    """Turn routed prompts into token ids, one row per prompt.

    Reads: prompt_id, prompt_hash, prompt, domain, candidates, route_error.

    Args:
        routed: from `cdr.routing.give_domains`; prompts without a route are left out.
        run: the run.
        function: `udfs.encode.make_encode(plan.encoding)`.
        schema: `udfs.encode.ENCODED_DDL`.
    """
    ready = routed.where("route_error IS NULL")
    needed = ready.select("prompt_id", "prompt_hash", "prompt", "domain", "candidates")
    encoded = needed.repartition(run.num_tasks, "prompt_hash").mapInArrow(function, schema)
    return run.staging.write("encoded", encoded)


def reward(
    candidates: DataFrame,
    routed: DataFrame,
    encoded: DataFrame,
    failures: DataFrame | None,
    run: Context,
) -> DataFrame:
    """Weigh the terms into a reward per candidate and replace this reward's rows.

    Every candidate that was not rejected comes back, `ok` or `failed`.

    Args:
        candidates: from `cdr.inputs.read_candidates`.
        routed: from `cdr.routing.give_domains`.
        encoded: from `encode`.
        failures: SCORED_DDL rows of this run with an error; None when nothing was scored.
        run: the run.

    Returns:
        A read of the rows written.
    """
    plan, warehouse = run.plan, run.warehouse
    terms = plan.config.reward.resolved_terms()
    rows = candidates.where("reason IS NULL").join(
        routed.select(
            "prompt_id", "domain", "domain_source", "domain_confidence", "route_error"
        ),
        on="prompt_id",
        how="left",
    )  # fmt: skip
    drawn = encoded.select("prompt_id", "instruction_id", "exemplar_id", "exemplar_dropped")
    refused = encoded.select("prompt_id", F.explode("rejected").alias("r")).select(
        "prompt_id", "r.completion_id"
    )
    keyed = ["prompt_id", "completion_id"]
    rows = (
        rows.join(drawn, on="prompt_id", how="left")
        .join(refused, on=keyed, how="left_anti")
        .join(read_answers(encoded, failures, run), on=keyed, how="left")
    )
    named = {
        name: F.element_at("answers", f"{model_key}/{condition}")
        for name, (model_key, condition) in plan.term_views().items()
    }
    first = next(iter(named))
    # A failed candidate has no terms rather than half of them.
    whole = F.lit(True)
    for answer in named.values():
        whole = whole & answer["logprob_sum"].isNotNull()
    fields = ("model_key", "prefix_hash", "completion_hash", "logprob_sum", "num_tokens")
    entries = [
        item
        for name, answer in named.items()
        for item in (F.lit(name), F.struct(*[answer[field].alias(field) for field in fields]))
    ]
    rows = rows.withColumn("terms", F.when(whole, F.create_map(*entries)))
    rows = rows.withColumn("reward", reward_column(terms, plan.config.reward.reduction))
    error = F.coalesce(
        "route_error",
        *[answer["error"] for answer in named.values()],
        F.lit(FailReason.NOT_SCORED.value),
    )
    ranked = Window.partitionBy("prompt_id").orderBy(F.desc_nulls_last("reward"))
    ok = F.col("reward").isNotNull()
    final = rows.select(
        F.lit(plan.dataset).alias("dataset"),
        F.lit(plan.reward_key).alias("reward_key"),
        "prompt_id", "completion_id",
        F.lit(plan.config.reward.name).alias("reward_name"),
        "prompt_hash", "prompt", "completion", "finish_reason",
        "domain", "domain_source", "domain_confidence",
        "instruction_id", "exemplar_id", "exemplar_dropped",
        "reward",
        logprob_column(strong_term(terms)).alias("strong_logprob"),
        logprob_column(weak_term(terms)).alias("weak_logprob"),
        F.element_at("terms", first)["num_tokens"].alias("num_tokens"),
        F.when(ok, F.rank().over(ranked)).alias("rank"),
        F.col("boundary_merged"),
        "terms", "passthrough",
        F.when(ok, "ok").otherwise("failed").alias("status"),
        F.when(~ok, error).alias("error"),
        F.lit(run.run_id).alias("run_id"),
    )  # fmt: skip
    warehouse.replace(REWARDS, final, dataset=plan.dataset, reward_key=plan.reward_key)
    return read_rewards(plan, warehouse)


def read_rewards(plan: AnnotationPlan, warehouse: Warehouse) -> DataFrame:
    """Read this dataset's rows of this reward."""
    return warehouse.read(REWARDS).where(
        (F.col("dataset") == plan.dataset) & (F.col("reward_key") == plan.reward_key)
    )


def read_answers(encoded: DataFrame, failures: DataFrame | None, run: Context) -> DataFrame:
    """Join every encoded candidate with its log-probs, as a map by `model_key/condition`.

    Args:
        encoded: from `encode`.
        failures: SCORED_DDL rows of this run with an error; None when nothing was scored.
        run: the run.

    Returns:
        prompt_id, completion_id, answers (model_key, prefix_hash, completion_hash, logprob_sum,
        num_tokens and error by view; logprob_sum is null where there is none yet), and
        boundary_merged. Refused candidates have no row.
    """
    views = encoded.select("prompt_id", F.explode("views").alias("v")).select(
        "prompt_id",
        F.col("v.model_key").alias("model_key"),
        F.col("v.condition").alias("condition"),
        F.col("v.prefix_hash").alias("prefix_hash"),
        F.explode("v.candidates").alias("c"),
    )
    asked = views.select(
        "prompt_id", "model_key", "condition", "prefix_hash",
        "c.completion_id", "c.completion_hash", "c.boundary_merged",
    )  # fmt: skip
    key = list(LOGPROBS.key)
    keys = [engine.name for engine in run.plan.engines]
    logprobs = (
        run.warehouse.read(LOGPROBS)
        .where(F.col("model_key").isin(keys))
        .groupBy(*key)
        # Two runs at once may both have written a key; any one of the rows is right.
        .agg(
            F.min_by("logprob_sum", "run_id").alias("logprob_sum"),
            F.min_by("num_tokens", "run_id").alias("num_tokens"),
        )
    )
    joined = asked.join(logprobs, on=key, how="left")
    if failures is None:
        joined = joined.withColumn("error", F.lit(None).cast("string"))
    else:
        joined = joined.join(failures.select(*key, "error"), on=key, how="left")
    answer = F.struct(
        "model_key", "prefix_hash", "completion_hash", "logprob_sum", "num_tokens", "error"
    )
    return joined.groupBy("prompt_id", "completion_id").agg(
        F.map_from_entries(
            F.collect_list(F.struct(F.concat_ws("/", "model_key", "condition"), answer))
        ).alias("answers"),
        F.max("boundary_merged").alias("boundary_merged"),
    )


def reject(candidates: DataFrame, encoded: DataFrame, run: Context) -> DataFrame:
    """Write every refused row with its reason, replacing this dataset's earlier rejects."""
    validated = candidates.where("reason IS NOT NULL").withColumn("stage", F.lit("validate"))
    refused = encoded.select("prompt_id", F.explode("rejected").alias("r")).select(
        "prompt_id", "r.completion_id", F.col("r.reason").alias("reason"), "r.detail"
    )
    at_encoding = (
        candidates.where("reason IS NULL")
        .drop("reason", "detail")
        .join(refused, on=["prompt_id", "completion_id"], how="inner")
        .withColumn("stage", F.lit("encode"))
    )
    rows = (
        validated.unionByName(at_encoding)
        .withColumn("dataset", F.lit(run.plan.dataset))
        .withColumn("run_id", F.lit(run.run_id))
    )
    run.warehouse.replace(REJECTS, rows, dataset=run.plan.dataset)
    return run.warehouse.read(REJECTS).where(F.col("dataset") == run.plan.dataset)


def pair(
    rewards: DataFrame, run: Context, mlflow_run_id: str | None
) -> tuple[DataFrame, DataFrame]:
    """Choose a pair per prompt; replace this selection's rows of `preferences` and `unpaired`.

    Returns:
        What was written: the pairs, and the prompts without one.
    """
    plan, warehouse = run.plan, run.warehouse
    selection = {
        "dataset": plan.dataset,
        "reward_key": plan.reward_key,
        "selection_key": plan.selection_key,
    }
    stamps = {name: F.lit(value) for name, value in {**selection, "run_id": run.run_id}.items()}
    chosen = run.staging.write(
        "pairs", select_pairs(rewards.where("status = 'ok'"), plan.config.pairs)
    ).withColumns(stamps)
    pairs = chosen.where("no_pair_reason IS NULL").withColumns(
        {
            "reward_name": F.lit(plan.config.reward.name),
            "reward_version": F.lit(plan.reward_version),
            "mlflow_run_id": F.lit(mlflow_run_id),
        }
    )
    unpaired = chosen.where("no_pair_reason IS NOT NULL").withColumnRenamed(
        "no_pair_reason", "reason"
    )
    for table, rows in ((PREFERENCES, pairs), (UNPAIRED, unpaired)):
        warehouse.replace(
            table,
            rows,
            dataset=plan.dataset,
            reward_key=plan.reward_key,
            selection_key=plan.selection_key,
        )
    ours = reduce(operator.and_, (F.col(name) == value for name, value in selection.items()))
    return warehouse.read(PREFERENCES).where(ours), warehouse.read(UNPAIRED).where(ours)
