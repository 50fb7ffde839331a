"""Preference pairs: from a prompt's scored candidates to one chosen and one rejected.

Best-of-N selection as a filter and a choice, the same for every rule:

    candidates   distinct texts, without the length-stopped ones where those are to be left out
    chosen       the candidate with the best score
    eligible     lower score, and a reward at least `min_margin` below the chosen one's
    rejected     the rule's pick from the eligible ones inside the length window

The score is the reward; for `dice` it is reward − alpha · characters. An empty window falls back to
the eligible candidate nearest in length, or gives no pair. A prompt without a pair keeps its row,
with the reason.

Sources: the paper's section 4.3 (arXiv 2411.02481; argmax, and random after a length threshold),
SimPO (2405.14734; argmax and argmin), DICE (2406.09760; length-regularised score).

All of it is window functions and one aggregate over the same key: a single shuffle by prompt (none
if the input is partitioned so), compiled by Spark, and spilling to disk where a prompt has very
many candidates. Collecting candidates into arrays would move the same bytes, but evaluates its
lambdas uncompiled and holds a prompt's candidates in memory.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from cdr.config import LengthWindowSpec, PairSpec
from cdr.errors import NoPairReason

SCORED_COLUMNS = (
    "prompt_id",
    "prompt_hash",
    "prompt",
    "domain",
    "completion_id",
    "completion",
    "finish_reason",
    "num_tokens",
    "reward",
    "strong_logprob",
    "weak_logprob",
)
"""What `select_pairs` reads: one row per scored candidate."""

PAIR_COLUMNS = (
    "prompt_id",
    "prompt_hash",
    "prompt",
    "domain",
    "chosen",
    "rejected",
    "chosen_id",
    "rejected_id",
    "chosen_reward",
    "rejected_reward",
    "margin",
    "chosen_strong_logprob",
    "rejected_strong_logprob",
    "chosen_weak_logprob",
    "rejected_weak_logprob",
    "chosen_num_tokens",
    "rejected_num_tokens",
    "num_candidates",
    "length_fallback",
    "no_pair_reason",
    "split",
)
"""What `select_pairs` gives: one row per prompt."""

_PROMPT = ("prompt_id", "prompt_hash")


def select_pairs(scored: DataFrame, spec: PairSpec) -> DataFrame:
    """Choose one preference pair per prompt.

    The outcome depends on the rows and the spec alone, not on row order or partitioning. The random
    rule draws by hash of seed, prompt and text, so two rewards over the same completions get the
    same draws, and one more candidate disturbs a pair only by becoming part of it.

    Args:
        scored: `SCORED_COLUMNS`, one row per candidate with a finite reward:
            prompt_id string, prompt_hash string (hex), prompt array<struct<role, content>>,
            domain string, completion_id string (unique within its prompt), completion string,
            finish_reason string (`length`: was cut; null: unknown), num_tokens int (>= 1),
            reward double, strong_logprob and weak_logprob double (nats, null where the reward has
            no such term). prompt and domain are the same in all rows of a prompt.
        spec: the selection.

    Returns:
        `PAIR_COLUMNS`, one row per (prompt_id, prompt_hash), in no particular order.
        chosen, rejected: array<struct<role, content>> of exactly one assistant message.
        margin: chosen_reward − rejected_reward, > 0.
        num_candidates: distinct candidates that the pair was chosen from, also without a pair.
        length_fallback: true where the window was empty and the nearest in length was taken.
        no_pair_reason: a `NoPairReason`; null exactly where there is a pair. All columns of the
        pair are null where it is not.
        split: `train` or `validation`, see `split_column`.
    """
    return _decide(_compare(_rank(scored.select(*SCORED_COLUMNS), spec), spec), spec)


def split_column(prompt_hash: Column, validation_fraction: float) -> Column:
    """Build the split of a prompt: `train` or `validation`.

    It depends on the prompt alone, so a prompt is on the same side for every reward, selection and
    dataset, and a larger fraction only adds prompts to `validation`.

    Args:
        prompt_hash: hex string.
        validation_fraction: expected share of `validation`, in [0, 1).
    """
    # Hashed once more, so that whatever else is cut by prompt_hash does not coincide with the
    # split. Hex digits compare as the numbers they spell: 16 of them are a fraction of 2**64.
    digits = F.sha2(F.concat(F.lit("split:"), prompt_hash), 256)
    bound = f"{int(validation_fraction * 2**64):016x}"
    return F.when(digits < F.lit(bound), "validation").otherwise("train")


def _rank(scored: DataFrame, spec: PairSpec) -> DataFrame:
    """Order each prompt's candidates, best first.

    Adds `text_hash` (null where the row is left out), `is_candidate` (the one row that stands for
    its text), `score` and `rank` (1 is the chosen one, if there is any candidate).
    """
    text_hash = F.sha2("completion", 256)
    if spec.drop_length_stopped:
        text_hash = F.when(~F.col("finish_reason").eqNullSafe("length"), text_hash)
    score = F.col("reward")
    if spec.rejected == "dice":
        score -= F.lit(spec.dice_alpha) * F.length("completion")
    by_text = Window.partitionBy(*_PROMPT).orderBy("text_hash", "completion_id")
    best_first = Window.partitionBy(*_PROMPT).orderBy(
        F.desc("is_candidate"), F.desc("score"), F.asc("completion_id")
    )
    repeats = F.col("text_hash").eqNullSafe(F.lag("text_hash").over(by_text))
    return (
        scored.withColumn("text_hash", text_hash)
        .withColumn("is_candidate", F.col("text_hash").isNotNull() & ~repeats)
        .withColumn("score", score)
        .withColumn("rank", F.row_number().over(best_first))
        .withColumn("best", F.first(F.struct("score", "reward", "num_tokens")).over(best_first))
    )


def _compare(ranked: DataFrame, spec: PairSpec) -> DataFrame:
    """Compare each candidate with the chosen one.

    Adds `is_lower` (has a lower score), `is_eligible` (and enough margin) and `length_gap` (0
    inside the length window, else the difference in tokens, which is then >= 1).
    """
    margin = F.col("best.reward") - F.col("reward")
    is_lower = F.col("is_candidate") & (F.col("score") < F.col("best.score"))
    # For `dice` a lower score need not be a lower reward: its alpha may change which pair is taken,
    # but must not prefer a completion that the reward does not prefer.
    enough_margin = (margin > 0) & (margin >= F.lit(spec.min_margin))
    gap = F.abs(F.col("num_tokens") - F.col("best.num_tokens"))
    return (
        ranked.withColumn("is_lower", is_lower)
        .withColumn("is_eligible", F.col("is_lower") & enough_margin)
        .withColumn(
            "length_gap",
            F.when(_in_window(spec.length_window), F.lit(0)).otherwise(gap),
        )
    )


def _in_window(window: LengthWindowSpec) -> Column:
    """Tell whether a candidate's length is close enough to the chosen one's."""
    shorter = F.least("num_tokens", "best.num_tokens")
    longer = F.greatest("num_tokens", "best.num_tokens")
    inside = F.lit(True)
    if window.tokens is not None:
        inside &= longer - shorter <= F.lit(window.tokens)
    if window.ratio is not None:
        # Not a product: 1.15 · 100 rounds to less than 115, while 115 / 100 is just 1.15.
        inside &= F.try_divide(longer, shorter) <= F.lit(window.ratio)
    return inside


def _decide(compared: DataFrame, spec: PairSpec) -> DataFrame:
    """Fold each prompt's candidates into its pair, or into the reason why it has none."""
    candidate = F.struct(
        "completion_id", "completion", "reward", "strong_logprob", "weak_logprob", "num_tokens"
    )
    # The window comes before the rule, and its gap is 0 inside: one order serves both the rule's
    # pick from the window and the fallback to the nearest in length.
    preference = F.when(F.col("is_eligible"), F.struct("length_gap", _rule_order(spec)))
    folded = compared.groupBy(*_PROMPT).agg(
        F.first("prompt").alias("prompt"),
        F.first("domain").alias("domain"),
        F.count_if("is_candidate").cast("int").alias("num_candidates"),
        F.bool_or("is_lower").alias("has_lower"),
        F.min(F.when(F.col("is_eligible"), F.col("length_gap"))).alias("least_gap"),
        F.min_by(candidate, "rank").alias("best"),
        F.min_by(candidate, preference).alias("other"),
    )
    reason = (
        F.when(F.col("num_candidates") < 2, NoPairReason.ONE_CANDIDATE)
        .when(~F.col("has_lower"), NoPairReason.TIE)
        .when(F.col("least_gap").isNull(), NoPairReason.BELOW_MIN_MARGIN)
    )
    if spec.fallback == "no_pair":
        reason = reason.when(F.col("least_gap") > 0, NoPairReason.OUTSIDE_LENGTH_WINDOW)
    has_pair = F.col("no_pair_reason").isNull()
    return (
        folded.withColumn("no_pair_reason", reason)
        .withColumn("length_fallback", has_pair & (F.col("least_gap") > 0))
        .withColumn("best", F.when(has_pair, F.col("best")))
        .withColumn("other", F.when(has_pair, F.col("other")))
        .withColumns({**_side("chosen", "best"), **_side("rejected", "other")})
        .withColumn("margin", F.col("chosen_reward") - F.col("rejected_reward"))
        .withColumn("split", split_column(F.col("prompt_hash"), spec.validation_fraction))
        .select(*PAIR_COLUMNS)
    )


def _rule_order(spec: PairSpec) -> Column:
    """Build the order in which the rule prefers rejected candidates, smallest first."""
    match spec.rejected:
        case "random":
            draw = F.concat_ws(":", F.lit(spec.seed), F.col("prompt_hash"), F.col("text_hash"))
            return F.sha2(draw, 256)
        case "second_best":
            return F.col("rank")
        case "lowest" | "dice":
            return -F.col("rank")


def _side(name: str, source: str) -> dict[str, Column]:
    """Spread one side of the pair into its columns; all null where `source` is."""
    message = F.struct(
        F.lit("assistant").alias("role"), F.col(f"{source}.completion").alias("content")
    )
    return {
        name: F.when(F.col(source).isNotNull(), F.array(message)),
        f"{name}_id": F.col(f"{source}.completion_id"),
        f"{name}_reward": F.col(f"{source}.reward"),
        f"{name}_strong_logprob": F.col(f"{source}.strong_logprob"),
        f"{name}_weak_logprob": F.col(f"{source}.weak_logprob"),
        f"{name}_num_tokens": F.col(f"{source}.num_tokens"),
    }
