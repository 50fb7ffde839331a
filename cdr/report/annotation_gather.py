"""Reads what a report page shows from the tables: aggregates, and small samples drawn by hash.

Nothing of a table's size comes to the driver: histograms, sums and counts are computed where the
rows are, and a page quotes a few dozen pairs, the same ones every time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from cdr.config import AnnotateConfig
from cdr.plan import RewardPlan
from cdr.report.annotation_data import (
    NO_EFFECT,
    SMALL_MARGIN,
    UNSURE,
    AnnotationData,
    DomainReport,
    LengthEffect,
    Lengths,
)
from cdr.report.pairs import PairIds, read_pairs
from cdr.report.plots import Histogram
from cdr.runs import RunRecord
from cdr.summary import Summary
from cdr.tables import PREFERENCES
from cdr.warehouse import Warehouse

MAX_DOMAINS = 12
UNSURE_PAIRS = 10
_BINS = 30
_CONFIDENCE_BINS = 20
_SCATTER = 200  # pairs per domain
_SEED = "report"


@dataclass(frozen=True)
class RunRows:
    """What a run committed.

    Args:
        rewards: its rows of `rewards`.
        pairs: its rows of `preferences`.
        rejects: its rows of `rejects`.
    """

    rewards: DataFrame
    pairs: DataFrame
    rejects: DataFrame


def gather_annotation(
    rows: RunRows,
    warehouse: Warehouse,
    config: AnnotateConfig,
    record: RunRecord,
    summary: Summary,
    plan: RewardPlan | None,
    *,
    rebuild: str,
    ui_command: str | None = None,
) -> AnnotationData:
    """Read all that a page shows.

    Args:
        rows: what the run committed.
        warehouse: where `logprobs` is.
        config: the run's config, with the switches of the page.
        record: the run's row of `runs`, outcome and counts in it.
        summary: the run's numbers.
        plan: for the tokenizers; None where the models are not on this machine.
        rebuild: the command that builds the page again.
        ui_command: the command that shows the MLflow run.
    """
    by_size = sorted(summary.domains, key=lambda name: (-summary.domains[name].prompts, name))
    shown, hidden = by_size[:MAX_DOMAINS], by_size[MAX_DOMAINS:]
    sample, least_sure = _read_pairs(rows.pairs, config.report.pairs_per_domain)
    to_read = [row for row in sample if row["nth"] <= config.report.pairs_per_domain]
    read = read_pairs(
        [_ids(row) for row in (*to_read, *least_sure)],
        rows.rewards,
        warehouse,
        config.reward,
        plan,
        has_texts=config.report.texts,
    )
    pairs = {
        domain: tuple(read.pairs[_ids(row)] for row in to_read if row["domain"] == domain)
        for domain in shown
    }
    return AnnotationData(
        run=record,
        config=config,
        summary=summary,
        engine_versions=read.engine_versions,
        domains=_domain_reports(rows, summary, by_size, sample, config.reward.reduction == "mean"),
        hidden=tuple(hidden),
        pairs=pairs,
        unsure_pairs=tuple(read.pairs[_ids(row)] for row in least_sure),
        tokens_missing=read.tokens_missing,
        rebuild=rebuild,
        preferences=warehouse.sql_name(PREFERENCES),
        ui_command=ui_command,
        rejects={
            (row["stage"], row["reason"]): row["count"]
            for row in rows.rejects.groupBy("stage", "reason").count().collect()
        },
    )


def _domain() -> Column:
    return F.coalesce("domain", F.lit("none")).alias("domain")


# --- distributions -------------------------------------------------------------------------------


def _domain_reports(
    rows: RunRows, summary: Summary, domains: Sequence[str], sample: Sequence[Row], is_mean: bool
) -> dict[str, DomainReport]:
    histograms = _histograms(rows, summary)
    prompts = _read_prompts(rows.rewards)
    sides = _read_sides(rows.pairs, is_mean)
    found = {}
    for name in domains:
        ours = prompts.get(name, [])
        asked = [row for row in ours if row["bin"] is not None]
        counts = [0] * _CONFIDENCE_BINS
        for row in asked:
            counts[row["bin"]] += row["prompts"]
        side = sides.get(name)
        found[name] = DomainReport(
            rewards=histograms.get(("reward", name)),
            margins=histograms.get(("margin", name)),
            confidence=Histogram(0.0, 1.0, tuple(counts)) if asked else None,
            unsure=sum(row["unsure"] for row in ours),
            routed=sum(row["routed"] for row in ours),
            lengths=Lengths(
                longer=side["longer"] if side else 0,
                shorter=side["shorter"] if side else 0,
                equal=side["equal"] if side else 0,
                sample=tuple(
                    (row["rejected_num_tokens"], row["chosen_num_tokens"])
                    for row in sample
                    if row["domain"] == name
                ),
            ),
            effect=sum(
                (LengthEffect(row["sxx"], row["syy"], row["sxy"]) for row in ours), NO_EFFECT
            ),
            small_margins=side["small"] if side else 0,
            cut=sum(row["cut"] for row in ours),
        )
    return found


def _read_prompts(rewards: DataFrame) -> dict[str, list[Row]]:
    """Sum over prompts, by domain and bin of confidence: some dozens of rows."""
    x, y = F.col("num_tokens").cast("double"), F.col("reward")
    per_prompt = (
        rewards.where("status = 'ok'")
        .groupBy("prompt_id")
        .agg(
            F.first(_domain()).alias("domain"),
            F.first("domain_source").alias("source"),
            F.first("domain_confidence").alias("confidence"),
            # Of deviations, so no digits are lost to large means.
            (F.var_pop(x) * F.count(x)).alias("sxx"),
            (F.var_pop(y) * F.count(y)).alias("syy"),
            (F.covar_pop(x, y) * F.count(x)).alias("sxy"),
            F.count_if(F.col("finish_reason") == "length").alias("cut"),
        )
    )
    routed = F.col("source").isin("router", "fallback")
    place = F.least(F.floor(F.col("confidence") * _CONFIDENCE_BINS), F.lit(_CONFIDENCE_BINS - 1))
    unsure = (F.col("source") == "fallback") | (routed & (F.col("confidence") < UNSURE))
    totals = (
        per_prompt.withColumn("bin", F.when(routed, place).cast("int"))
        .groupBy("domain", "bin")
        .agg(
            F.count("*").alias("prompts"),
            F.count_if(routed).alias("routed"),
            F.count_if(unsure).alias("unsure"),
            *[F.sum(name).alias(name) for name in ("sxx", "syy", "sxy", "cut")],
        )
    )
    found: dict[str, list[Row]] = defaultdict(list)
    for row in totals.collect():  # a row per domain and bin
        found[row["domain"]].append(row)
    return found


def _read_sides(pairs: DataFrame, is_mean: bool) -> dict[str, Row]:
    """Count by domain which side is longer, and margins that noise may have decided."""
    longer = F.col("chosen_num_tokens") - F.col("rejected_num_tokens")
    # Noise is one of sums: a mean's margin is taken back to the sum of a completion of that length.
    length = F.least("chosen_num_tokens", "rejected_num_tokens") if is_mean else F.lit(1)
    rows = pairs.groupBy(_domain()).agg(
        F.count_if(longer > 0).alias("longer"),
        F.count_if(longer < 0).alias("shorter"),
        F.count_if(longer == 0).alias("equal"),
        F.count_if(F.col("margin") * length < SMALL_MARGIN).alias("small"),
    )
    return {row["domain"]: row for row in rows.collect()}  # a row per domain


def _histograms(rows: RunRows, summary: Summary) -> dict[tuple[str, str], Histogram]:
    """Count rewards and margins in bins; each kind has the same bins in all domains."""
    domains = summary.domains.values()
    bounds = {
        "reward": _bounds([domain.reward_quantiles for domain in domains]),
        "margin": _bounds([domain.margin_quantiles for domain in domains], least=0.0),
    }
    axes = {kind: ends for kind, ends in bounds.items() if ends is not None}
    frames = []
    for kind, (low, high) in axes.items():
        place = F.floor((F.col(kind) - low) / ((high - low) / _BINS))
        inside = F.least(F.greatest(place, F.lit(0)), F.lit(_BINS - 1)).cast("int")
        frame = rows.rewards if kind == "reward" else rows.pairs
        frames.append(
            frame.where(F.col(kind).isNotNull()).select(
                F.lit(kind).alias("kind"), _domain(), inside.alias("bin")
            )
        )
    if not frames:
        return {}
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * _BINS)
    union = reduce(DataFrame.unionByName, frames)
    for row in union.groupBy("kind", "domain", "bin").count().collect():  # a row per bin
        counts[row["kind"], row["domain"]][row["bin"]] = row["count"]
    return {
        (kind, domain): Histogram(*axes[kind], tuple(found))
        for (kind, domain), found in counts.items()
    }


def _bounds(
    quantiles: Iterable[Sequence[float]], least: float | None = None
) -> tuple[float, float] | None:
    """Give an axis that holds the middle 90 % of every domain, and half as much on either side."""
    ends = [(values[0], values[-1]) for values in quantiles if values]
    if not ends:
        return None
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    room = (high - low) / 2 or max(abs(high), 1.0) / 2
    return (low - room if least is None else least), high + room


# --- pairs to read -------------------------------------------------------------------------------


def _read_pairs(pairs: DataFrame, per_domain: int) -> tuple[list[Row], list[Row]]:
    """Draw pairs of every domain by hash, numbered from 1 as `nth`; and the least sure pairs."""
    draw = F.sha2(F.concat_ws(":", F.lit(_SEED), "prompt_hash"), 256)
    narrow = (
        "prompt_id", "margin", "chosen_id", "rejected_id", "chosen_num_tokens",
        "rejected_num_tokens",
    )  # fmt: skip
    drawn = (
        pairs.withColumn("domain", _domain())
        .withColumn("nth", F.row_number().over(Window.partitionBy("domain").orderBy(draw)))
        .where(F.col("nth") <= max(_SCATTER, per_domain))
        .select("domain", "nth", *narrow)
    )
    unsure = (
        pairs.select(_domain(), F.lit(None).cast("int").alias("nth"), *narrow)
        .orderBy("margin", "prompt_id")
        .limit(UNSURE_PAIRS)
    )
    # At most _SCATTER rows per domain, without texts.
    found = drawn.unionByName(unsure).collect()
    sample = [row for row in found if row["nth"] is not None]
    least_sure = [row for row in found if row["nth"] is None]
    return (
        sorted(sample, key=lambda row: (row["domain"], row["nth"])),
        sorted(least_sure, key=lambda row: (row["margin"], row["prompt_id"])),
    )


def _ids(pair: Row) -> PairIds:
    return pair["prompt_id"], pair["chosen_id"], pair["rejected_id"]
