"""From answers to rewards: the terms of each candidate weighed, or candidates compared.

A reward of log-prob terms, classifiers among them, gives each candidate its own sum. A judge gives
a candidate what it got against the others of its prompt, on average. Both fill the same columns.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from cdr.judge import mean_odds_column
from cdr.plan import AnnotationPlan
from cdr.reward import logprob_column, reward_column, strong_term, weak_term
from cdr.tables import LOGPROBS, VERDICTS
from cdr.warehouse import Warehouse

_TERM_FIELDS = ("model_key", "prefix_hash", "completion_hash", "logprob_sum", "num_tokens")


def weigh(
    encoded: DataFrame, failures: DataFrame | None, plan: AnnotationPlan, warehouse: Warehouse
) -> DataFrame:
    """Give every encoded candidate its reward, or why there is none.

    Args:
        encoded: from `cdr.stages.encode`.
        failures: rows of this run with an error, by the key of what was asked; None for none.
        plan: the run's.
        warehouse: where answers are.

    Returns:
        prompt_id, completion_id, terms, reward (null without), strong_logprob, weak_logprob,
        num_tokens, boundary_merged, error (null, or why there is none this time), judge_reason
        (null, or why there is none for good).
    """
    spec = plan.config.reward
    if spec.is_asked_by_api:
        return _compare(_read_verdicts(encoded, failures, plan, warehouse), plan)
    if spec.is_judge:
        return _compare(_read_log_odds(encoded, failures, plan, warehouse), plan)
    return _weigh_terms(read_answers(encoded, failures, plan, warehouse), plan)


def _weigh_terms(answered: DataFrame, plan: AnnotationPlan) -> DataFrame:
    """Weigh the terms of each candidate.

    Args:
        answered: from `read_answers`.
        plan: the run's.

    Returns:
        The columns of `weigh`. A candidate that failed has no terms rather than half of them.
    """
    spec = plan.config.reward
    terms = spec.resolved_terms()
    named = {
        name: F.element_at("answers", f"{model_key}/{condition}")
        for name, (model_key, condition) in plan.reward.term_views().items()
    }
    first = next(iter(named))
    whole = F.lit(True)
    for answer in named.values():
        whole = whole & answer["logprob_sum"].isNotNull()
    entries = [
        item
        for name, answer in named.items()
        for item in (F.lit(name), F.struct(*[answer[field].alias(field) for field in _TERM_FIELDS]))
    ]
    weighed = answered.withColumn("terms", F.when(whole, F.create_map(*entries)))
    return weighed.select(
        "prompt_id", "completion_id", "terms",
        reward_column(terms, spec.reduction).alias("reward"),
        logprob_column(strong_term(terms)).alias("strong_logprob"),
        logprob_column(weak_term(terms)).alias("weak_logprob"),
        F.element_at("terms", first)["num_tokens"].alias("num_tokens"),
        "boundary_merged",
        F.coalesce(*[answer["error"] for answer in named.values()]).alias("error"),
        F.lit(None).cast("string").alias("judge_reason"),
    )  # fmt: skip


def _compare(answered: DataFrame, plan: AnnotationPlan) -> DataFrame:
    """Give each candidate what it got against the others, on average (`cdr.judge`).

    Args:
        answered: from `_read_log_odds` or `_read_verdicts`.
        plan: the run's.

    Returns:
        The columns of `weigh`. Terms are the candidate's letters, one per question it stands in;
        what the letter's rival got is in the terms of the other candidate.
    """
    ((name, _),) = plan.reward.term_views().items()
    term = F.struct(
        "model_key", "prefix_hash", "completion_hash", "logprob_sum",
        F.col("num_label_tokens").alias("num_tokens"),
    )  # fmt: skip
    gathered = answered.groupBy("prompt_id", "completion_id").agg(
        F.map_from_entries(
            F.collect_list(F.struct(F.concat_ws("/", F.lit(name), F.hex("prefix_hash")), term))
        ).alias("terms"),
        F.collect_list("odds").alias("odds"),
        F.count("*").alias("questions"),
        F.max("num_tokens").alias("num_tokens"),
        F.max("boundary_merged").alias("boundary_merged"),
        F.max("error").alias("error"),
        F.max("judge_reason").alias("judge_reason"),
    )
    reward = mean_odds_column(F.col("odds"), F.col("questions"))
    no_logprob = F.lit(None).cast("double")
    return gathered.select(
        "prompt_id", "completion_id",
        F.when(reward.isNotNull(), F.col("terms")).alias("terms"),
        reward.alias("reward"),
        no_logprob.alias("strong_logprob"),
        no_logprob.alias("weak_logprob"),
        "num_tokens", "boundary_merged", "error", "judge_reason",
    )  # fmt: skip


def _read_log_odds(
    encoded: DataFrame, failures: DataFrame | None, plan: AnnotationPlan, warehouse: Warehouse
) -> DataFrame:
    """Give the log-odds of every candidate's letter in every question it stands in.

    Returns:
        The columns of `_look_up`, odds (nats; null where a letter has no log-prob) and
        judge_reason (null).
    """
    question = Window.partitionBy("prompt_id", "prefix_hash")
    # Of the two letters, one is the likelier; answers with the same text share theirs.
    own, best, least = F.col("logprob_sum"), F.max("logprob_sum"), F.min("logprob_sum")
    odds = best.over(question) - least.over(question)
    missing = F.max(own.isNull()).over(question)
    return _look_up(encoded, failures, plan, warehouse).withColumns(
        {
            "odds": F.when(~missing, F.when(own == best.over(question), odds).otherwise(-odds)),
            "error": F.max("error").over(question),
            "judge_reason": F.lit(None).cast("string"),
        }
    )


def mean_letter_mass(rewards: DataFrame) -> float | None:
    """Give the probability of a generative judge's two letters together, a mean over questions.

    Args:
        rewards: rows of `rewards` of such a judge.

    Returns:
        0 to 1; None where no question has both letters' log-probs.
    """
    # Two candidates of a question have a row each; those with the same text share their letter.
    letters = rewards.select("prompt_id", F.explode("terms").alias("question", "term")).select(
        "prompt_id", "term.prefix_hash", "term.completion_hash", "term.logprob_sum"
    )
    questions = (
        letters.distinct()
        .groupBy("prompt_id", "prefix_hash")
        .agg(F.count("*").alias("letters"), F.sum(F.exp("logprob_sum")).alias("mass"))
    )
    found = questions.where("letters = 2").agg(F.avg("mass")).first()
    return None if found is None else found[0]


def _read_verdicts(
    encoded: DataFrame, failures: DataFrame | None, plan: AnnotationPlan, warehouse: Warehouse
) -> DataFrame:
    """Give every candidate, under every question it stands in, what the judge made of it.

    Returns:
        prompt_id, completion_id, model_key, prefix_hash, completion_hash (of its letter),
        num_tokens (of the candidate), boundary_merged, logprob_sum and num_label_tokens (null),
        odds: 1 for the answer that was preferred, −1 for the other, null without a verdict;
        error: why there is none this time; judge_reason: why there is none for good.
    """
    (engine,) = plan.reward.engines
    views = encoded.select("prompt_id", F.explode("views").alias("v")).select(
        "prompt_id",
        F.col("v.model_key").alias("model_key"),
        F.col("v.prefix_hash").alias("prefix_hash"),
        F.posexplode("v.candidates").alias("place", "c"),
    )
    known = warehouse.read_one_per_key(VERDICTS).where(F.col("model_key") == engine.name)
    joined = views.join(
        known.select("prefix_hash", "verdict", "reason"), on="prefix_hash", how="left"
    )
    if failures is None:
        joined = joined.withColumn("error", F.lit(None).cast("string"))
    else:
        joined = joined.join(failures.select("prefix_hash", "error"), on="prefix_hash", how="left")
    # The first candidate of a view is answer A, and so are those with the same text.
    first = F.first("c.completion_hash").over(
        Window.partitionBy("prompt_id", "prefix_hash").orderBy("place")
    )
    letter = F.when(F.col("c.completion_hash") == first, "A").otherwise("B")
    return joined.select(
        "prompt_id", "c.completion_id", "model_key", "prefix_hash", "c.completion_hash",
        "c.num_tokens", "c.boundary_merged",
        F.lit(None).cast("double").alias("logprob_sum"),
        F.lit(None).cast("int").alias("num_label_tokens"),
        F.when(F.col("verdict") == letter, 1.0)
        .when(F.col("verdict").isNotNull(), -1.0)
        .alias("odds"),
        "error", F.col("reason").alias("judge_reason"),
    )  # fmt: skip


def read_answers(
    encoded: DataFrame, failures: DataFrame | None, plan: AnnotationPlan, warehouse: Warehouse
) -> DataFrame:
    """Join every encoded candidate with its log-probs.

    Returns:
        prompt_id, completion_id, answers (model_key, prefix_hash, completion_hash, logprob_sum,
        num_tokens and error by `model_key/condition`), boundary_merged.
    """
    answer = F.struct(
        "model_key", "prefix_hash", "completion_hash", "logprob_sum", "num_tokens", "error"
    )
    return (
        _look_up(encoded, failures, plan, warehouse)
        .groupBy("prompt_id", "completion_id")
        .agg(
            F.map_from_entries(
                F.collect_list(F.struct(F.concat_ws("/", "model_key", "condition"), answer))
            ).alias("answers"),
            F.max("boundary_merged").alias("boundary_merged"),
        )
    )


def _look_up(
    encoded: DataFrame, failures: DataFrame | None, plan: AnnotationPlan, warehouse: Warehouse
) -> DataFrame:
    """Give the log-prob of every candidate under every view, or its error of this run.

    Returns:
        prompt_id, completion_id, model_key, condition, prefix_hash, completion_hash, num_tokens
        (of the candidate), boundary_merged, logprob_sum, num_label_tokens (of what was scored),
        error.
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
        "c.completion_id", "c.completion_hash", "c.boundary_merged", "c.num_tokens",
    )  # fmt: skip
    key = list(LOGPROBS.key)
    keys = [engine.name for engine in plan.reward.engines]
    logprobs = (
        warehouse.read(LOGPROBS)
        .where(F.col("model_key").isin(keys))
        .groupBy(*key)
        # Two runs at once may both have written a key; any one of the rows is right.
        .agg(
            F.min_by("logprob_sum", "run_id").alias("logprob_sum"),
            F.min_by("num_tokens", "run_id").alias("num_label_tokens"),
        )
    )
    joined = asked.join(logprobs, on=key, how="left")
    if failures is None:
        return joined.withColumn("error", F.lit(None).cast("string"))
    return joined.join(failures.select(*key, "error"), on=key, how="left")
