"""Labelled pairs as candidates, and candidates' rewards as judged pairs.

    labelled pairs -> load_pairs -> split_pairs -> (the stages of annotating) -> judge_pairs

Every row of the input comes back as one row of `benchmark_pairs`: won, tied or lost, or left out
with the reason. An answer is text, one message of the assistant's, or a whole conversation that
ends with it and begins with the prompt, as preference sets on the hub have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from cdr.errors import InputError, RejectReason
from cdr.evaluation_config import ONE_SECTION, PairsInputSpec
from cdr.evaluation_plan import CHOSEN, REJECTED, EvaluationPlan, Sample
from cdr.hub import download_split
from cdr.inputs import make_candidates, messages_column, optional_column, prompt_hash
from cdr.rewardbench import SUBSETS
from cdr.sources import (
    IDENTIFIER,
    PROMPT,
    TEXT,
    check_columns,
    no_rows,
    read_source,
    reading,
    refuse_mixed_json,
)
from cdr.stages import Context
from cdr.tables import BENCHMARK_PAIRS, MESSAGES


def load_pairs(plan: EvaluationPlan, run: Context) -> DataFrame:
    """Read the input once as one row per pair; a sample is taken here, of the pairs that fit.

    Returns:
        prompt_id (the pair's, unique), prompt (messages), chosen, rejected (texts), section,
        subset, domain, and reason and detail (null for pairs that fit). Of a sample, pairs that do
        not fit are left to the message that names them.

    Raises:
        InputError: the input is missing, unreadable, empty, lacks a column, or has no pair that
            fits.
    """
    source = plan.config.input.model_copy(update={"version": run.input_version})
    rows = read_pairs(run.warehouse.spark, source)
    with reading(source):
        pairs = run.staging.write("labelled", _named(_normalized(rows, plan)))
    # One row per reason and rule; null: the pairs that fit.
    rules = pairs.groupBy("reason", "detail").count().collect()
    if not rules:
        raise no_rows(source.place)
    unfit = ", ".join(
        f"{row['reason']} {row['count']:,} ({row['detail']})"
        for row in sorted(rules, key=str)
        if row["reason"]
    )
    if all(row["reason"] for row in rules):
        most = RejectReason(max(rules, key=lambda row: row["count"])["reason"])
        raise InputError(
            f"no pair of the input fits: {unfit}", where=source.place, fix=_fix_for(most)
        )
    if plan.sample is None:
        return pairs
    if unfit:
        print(f"note: not in the sample, as they do not fit: {unfit}")
    return run.staging.write("pairs", _draw(pairs.where("reason IS NULL"), plan.sample))


def _fix_for(reason: RejectReason) -> str:
    """Say what to do where no pair fits, by the reason that most of them have."""
    if reason is RejectReason.BAD_MESSAGES:
        return (
            "an answer is text, one assistant message, or a conversation that ends with it; where "
            "one begins with anything but the prompt column, --set input.columns.prompt=null takes "
            "the prompt from the conversations"
        )
    if reason is RejectReason.EQUAL_COMPLETIONS:
        return "map the better answer and the worse, as in --set input.columns.rejected=worse"
    return "map your sections, as in --set input.columns.section=topic, and list them in sections"


def read_pairs(spark: SparkSession, source: PairsInputSpec) -> DataFrame:
    """Read the input as it is; a data set of the hub through the driver, as benchmarks are small.

    Raises:
        InputError: it is missing, unreadable, or lacks a mapped column.
        ModelError: the hub does not give it.
    """
    names = source.columns
    mapped = [name for name in names.model_dump().values() if name is not None]
    if source.revision is not None:
        import pyarrow as pa
        from pyarrow import parquet
        from pyspark.sql.pandas.types import from_arrow_schema

        files = download_split(source.place, source.revision, source.split)
        table = pa.concat_tables([parquet.read_table(file) for file in files])
        present = [name for name in table.column_names if name in mapped]
        # By its schema: of conversations, Spark infers none, or maps in the place of structs.
        table = table.select(present)
        rows = spark.createDataFrame(table.to_pylist(), from_arrow_schema(table.schema))
    else:
        rows = read_source(spark, source)
    check_columns(
        rows,
        [(names.prompt, PROMPT), (names.chosen, PROMPT), (names.rejected, PROMPT),
         (names.id, IDENTIFIER), (names.subset, TEXT), (names.section, TEXT),
         (names.domain, TEXT)],
        source.place,
        example="chosen=good",
    )  # fmt: skip
    given = [name for name in (names.prompt, names.chosen, names.rejected) if name is not None]
    refuse_mixed_json(spark, source, rows, given)
    texts = [name for name in (names.chosen, names.rejected) if _is_text(rows, name)]
    if names.prompt is None and texts:
        raise InputError(
            f"columns.prompt is null, and the columns {texts} hold text: nothing is the prompt",
            where=source.place,
            fix="map the prompt, for example --set input.columns.prompt=question",
        )
    return rows


def _normalized(rows: DataFrame, plan: EvaluationPlan) -> DataFrame:
    names = plan.config.input.columns
    subset, section = optional_column(names.subset), optional_column(names.section)
    if names.section is None and names.subset is None:
        section = F.lit(ONE_SECTION)
    elif names.section is None:
        section = _look_up(subset, {name: found.section for name, found in SUBSETS.items()})
    domain = optional_column(names.domain)
    if names.domain is None:
        domain = _look_up(section, plan.oracle)
    known = section.isin(*plan.config.sections_in_use())
    bad_section = section.isNull() | ~known
    chosen, rejected = _answer(rows, names.chosen), _answer(rows, names.rejected)
    is_no_answer = [
        F.col(f"`{name}`").isNotNull() & text.isNull()
        for name, text in ((names.chosen, chosen), (names.rejected, rejected))
    ]
    befores = _before(rows, names.chosen), _before(rows, names.rejected)
    if names.prompt is None:
        prompt, begins_otherwise = befores[0], befores[0] != befores[1]
        otherwise = "the answers' conversations differ before their last message"
    else:
        prompt = messages_column(rows, names.prompt)
        begins_otherwise = reduce(
            Column.__or__, [(F.size(before) > 0) & (before != prompt) for before in befores]
        )
        otherwise = "an answer's conversation does not begin with the prompt"
    by_subset = names.section is None and names.subset is not None
    rules: list[tuple[Column, RejectReason, str]] = [
        (
            bad_section,
            RejectReason.UNKNOWN_SUBSET if by_subset else RejectReason.UNKNOWN_SECTION,
            "the subset is none of RewardBench's"
            if by_subset
            else f"the section must be one of {', '.join(plan.config.sections_in_use())}",
        ),
        (
            is_no_answer[0] | is_no_answer[1],
            RejectReason.BAD_MESSAGES,
            "an answer's last message is not the assistant's, or has no content",
        ),
        (begins_otherwise, RejectReason.BAD_MESSAGES, otherwise),
        (chosen == rejected, RejectReason.EQUAL_COMPLETIONS, "chosen and rejected are equal"),
    ]
    return rows.select(
        optional_column(names.id).cast("string").alias("given_id"),
        prompt.alias("prompt"),
        chosen.alias("chosen"),
        rejected.alias("rejected"),
        F.coalesce(section, F.lit("unknown")).alias("section"),
        F.coalesce(subset, section, F.lit("unknown")).alias("subset"),
        domain.cast("string").alias("domain"),
        F.coalesce(*[F.when(rule, F.lit(reason.value)) for rule, reason, _ in rules]).alias(
            "reason"
        ),
        F.coalesce(*[F.when(rule, F.lit(said)) for rule, _, said in rules]).alias("detail"),
    )


def _look_up(key: Column, values: Mapping[str, str]) -> Column:
    if not values:
        return F.lit(None).cast("string")
    items = [F.lit(item) for pair in values.items() for item in pair]
    return F.try_element_at(F.create_map(*items), key.cast("string"))


def _is_text(rows: DataFrame, name: str) -> bool:
    return isinstance(rows.schema[name].dataType, T.StringType)


def _answer(rows: DataFrame, name: str) -> Column:
    """Give an answer's text; null where the last message is not one of the assistant's."""
    answer = F.col(f"`{name}`")
    if _is_text(rows, name):
        return answer
    last = F.get(answer, F.size(answer) - 1)
    return F.when(last["role"] == "assistant", last["content"])


def _before(rows: DataFrame, name: str) -> Column:
    """Give the messages before an answer: none where it stands alone."""
    if _is_text(rows, name):
        return F.array().cast(MESSAGES)
    messages = messages_column(rows, name)
    return F.slice(messages, F.lit(1), F.greatest(F.size(messages) - 1, F.lit(0)))


def _named(rows: DataFrame) -> DataFrame:
    """Give each pair an id of its own: RewardBench's ids are unique within a subset only."""
    content = F.sha2(
        F.concat_ws(
            ":", prompt_hash(F.col("prompt")), F.sha2("chosen", 256), F.sha2("rejected", 256)
        ),
        256,
    )
    given = F.concat_ws("/", F.col("subset"), F.col("given_id"))
    same = Window.partitionBy("base").orderBy("content", "section", "subset")
    behind = F.when(F.col("nth") > 1, F.concat(F.lit("-"), F.col("nth").cast("string")))
    return (
        rows.withColumn("content", content)
        .withColumn(
            "base",
            F.when(F.col("given_id").isNotNull(), given).otherwise(F.substring("content", 1, 32)),
        )
        .withColumn("nth", F.row_number().over(same))
        .select(
            F.concat("base", F.coalesce(behind, F.lit(""))).alias("prompt_id"),
            "prompt", "chosen", "rejected", "section", "subset", "domain", "reason", "detail",
        )
    )  # fmt: skip


def _draw(pairs: DataFrame, sample: Sample) -> DataFrame:
    """Take pairs by hash; for `quick`, sections and the subsets in them take turns."""
    drawn = pairs.withColumn(
        "_hash", F.sha2(F.concat_ws(":", F.lit(sample.seed), "prompt_id"), 256)
    )
    order = [F.col("_hash")]
    if sample.kind == "quick":
        in_subset = Window.partitionBy("section", "subset").orderBy("_hash")
        in_section = Window.partitionBy("section").orderBy("_turn", "_hash")
        drawn = drawn.withColumn("_turn", F.row_number().over(in_subset))
        drawn = drawn.withColumn("_turn", F.row_number().over(in_section))
        order = [F.col("_turn"), *order]
    return drawn.orderBy(*order).limit(sample.pairs).drop("_hash", "_turn")


def split_pairs(pairs: DataFrame, run: Context) -> DataFrame:
    """Make two candidates of each pair; those of a pair that does not fit have its reason.

    Args:
        pairs: from `load_pairs`.
        run: the run; its plan is the pairs' annotate plan.

    Returns:
        The columns of `cdr.inputs.read_candidates`.
    """
    plan = run.plan
    rows = pairs.select("prompt_id", "prompt", "chosen", "rejected", "section", "subset", "domain")
    candidates = make_candidates(rows, plan.config.input, domains=plan.reward.given_domains)
    unfit = pairs.where("reason IS NOT NULL").select(
        "prompt_id",
        F.col("reason").alias("_reason"),
        F.col("detail").alias("_detail"),
    )
    joined = candidates.join(unfit, on="prompt_id", how="left")
    marked = joined.withColumns(
        {
            "reason": F.coalesce("_reason", "reason"),
            "detail": F.coalesce("_detail", "detail"),
        }
    )
    return run.staging.write("candidates", marked.drop("_reason", "_detail"))


def judge_pairs(
    pairs: DataFrame, rewards: DataFrame, rejects: DataFrame, run: Context
) -> DataFrame:
    """Compare each pair's two rewards; replace this benchmark's rows of this reward.

    Args:
        pairs: from `load_pairs`.
        rewards: from `cdr.stages.reward`.
        rejects: from `cdr.stages.reject`.
        run: the run.

    Returns:
        A read of the rows written to `benchmark_pairs`, one per pair.
    """
    plan, warehouse = run.plan, run.warehouse

    def side(which: str, name: str) -> DataFrame:
        columns = ("reward", "num_tokens", "status", "error")
        return rewards.where(F.col("completion_id") == which).select(
            "prompt_id",
            *[F.col(column).alias(f"{name}_{column}") for column in columns],
        )

    prompts = rewards.groupBy("prompt_id").agg(
        F.first("prompt_hash").alias("prompt_hash"),
        F.first("domain").alias("domain"),
        F.first("domain_source").alias("domain_source"),
    )
    # Of a judge's pair, what is wrong with one answer comes before what that means for the other.
    alone = F.col("reason") == RejectReason.NO_OTHER_CANDIDATE.value
    refused = rejects.groupBy("prompt_id").agg(
        F.coalesce(F.min(F.when(~alone, F.col("reason"))), F.min("reason")).alias("refused")
    )
    joined = pairs.select("prompt_id", "section", "subset")
    for other in (prompts, side(CHOSEN, "chosen"), side(REJECTED, "rejected"), refused):
        joined = joined.join(other, on="prompt_id", how="left")
    margin = F.col("chosen_reward") - F.col("rejected_reward")
    status = (
        F.when(F.col("refused").isNotNull(), "rejected")
        .when(F.col("margin").isNotNull(), "ok")
        .otherwise("failed")
    )
    ok = F.col("status") == "ok"
    outcome = F.when(F.col("margin") > 0, "win").when(F.col("margin") == 0, "tie").otherwise("loss")
    rows = (
        joined.withColumn("margin", margin)
        .withColumn("status", status)
        .withColumns(
            {
                "margin": F.when(ok, F.col("margin")),
                "outcome": F.when(ok, outcome),
                "reason": F.when(
                    ~ok,
                    F.coalesce("refused", "chosen_error", "rejected_error", F.lit("not_scored")),
                ),
                "dataset": F.lit(plan.dataset),
                "reward_key": F.lit(plan.reward.key),
                "reward_name": F.lit(plan.config.reward.name),
                "run_id": F.lit(run.run_id),
            }
        )
    )
    warehouse.replace(BENCHMARK_PAIRS, rows, dataset=plan.dataset, reward_key=plan.reward.key)
    return warehouse.read(BENCHMARK_PAIRS).where(
        (F.col("dataset") == plan.dataset) & (F.col("reward_key") == plan.reward.key)
    )
