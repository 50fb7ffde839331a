"""Reads what a report page shows from the tables: aggregates, and small samples drawn by hash.

Nothing of a table's size comes to the driver: histograms, sums and counts are computed where the
rows are, and a page quotes a few dozen pairs, the same ones every time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from cdr.chat import Message
from cdr.config import AnnotateConfig
from cdr.plan import AnnotationPlan
from cdr.report.data import (
    NO_EFFECT,
    SMALL_MARGIN,
    UNSURE,
    DomainReport,
    Histogram,
    LengthEffect,
    Lengths,
    ReportData,
    ShownCandidate,
    ShownPair,
    TokenRow,
    term_weights,
)
from cdr.report.tokens import ScoredTerm, TokenReader
from cdr.runs import RunRecord
from cdr.summary import Summary
from cdr.tables import LOGPROBS, PREFERENCES
from cdr.warehouse import Warehouse

MAX_DOMAINS = 12
UNSURE_PAIRS = 10
_BINS = 30
_CONFIDENCE_BINS = 20
_SCATTER = 200  # pairs per domain
_SEED = "report"

Side = tuple[str, str]
"""(prompt_id, completion_id) of a candidate."""


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


def gather_report(
    rows: RunRows,
    warehouse: Warehouse,
    config: AnnotateConfig,
    record: RunRecord,
    summary: Summary,
    plan: AnnotationPlan | None,
    *,
    rebuild: str,
    ui_command: str | None = None,
) -> ReportData:
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
    candidates = _read_candidates(rows.rewards, [*to_read, *least_sure])
    shower = _PairShower(config, candidates, plan, _read_scored(candidates, warehouse))
    pairs = {
        domain: tuple(shower.show(row) for row in to_read if row["domain"] == domain)
        for domain in shown
    }
    return ReportData(
        run=record,
        config=config,
        summary=summary,
        engine_versions=_engine_versions(candidates, warehouse),
        domains=_domain_reports(rows, summary, by_size, sample, config.reward.reduction == "mean"),
        hidden=tuple(hidden),
        pairs=pairs,
        unsure_pairs=tuple(shower.show(row) for row in least_sure),
        tokens_missing=shower.tokens_missing(),
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
    """Draw pairs of every domain by hash, numbered from 1 as `nth`; and the least sure pairs.

    Texts come with the first `per_domain` alone.
    """
    draw = F.sha2(F.concat_ws(":", F.lit(_SEED), "prompt_hash"), 256)
    narrow = (
        "prompt_id", "margin", "chosen_id", "rejected_id", "chosen_num_tokens",
        "rejected_num_tokens",
    )  # fmt: skip
    drawn = (
        pairs.withColumn("domain", _domain())
        .withColumn("nth", F.row_number().over(Window.partitionBy("domain").orderBy(draw)))
        .where(F.col("nth") <= max(_SCATTER, per_domain))
        .select(
            "domain",
            "nth",
            *narrow,
            F.when(F.col("nth") <= per_domain, F.col("prompt")).alias("prompt"),
        )
    )
    unsure = (
        pairs.select(_domain(), F.lit(None).cast("int").alias("nth"), *narrow, "prompt")
        .orderBy("margin", "prompt_id")
        .limit(UNSURE_PAIRS)
    )
    # At most _SCATTER rows per domain, and a page's worth of texts.
    found = drawn.unionByName(unsure).collect()
    sample = [row for row in found if row["nth"] is not None]
    least_sure = [row for row in found if row["nth"] is None]
    return (
        sorted(sample, key=lambda row: (row["domain"], row["nth"])),
        sorted(least_sure, key=lambda row: (row["margin"], row["prompt_id"])),
    )


def _read_candidates(rewards: DataFrame, pairs: Sequence[Row]) -> dict[Side, Row]:
    """Read the candidates of the pairs to be shown."""
    wanted = {
        (row["prompt_id"], row[side]) for row in pairs for side in ("chosen_id", "rejected_id")
    }
    if not wanted:
        return {}
    few = rewards.sparkSession.createDataFrame(
        sorted(wanted), "prompt_id string, completion_id string"
    )
    found = rewards.join(F.broadcast(few), on=["prompt_id", "completion_id"], how="left_semi")
    return {(row["prompt_id"], row["completion_id"]): row for row in found.collect()}


@dataclass(frozen=True)
class _Key:
    """A log-prob's key."""

    model_key: str
    prefix_hash: bytes
    completion_hash: bytes

    @classmethod
    def of(cls, term: Any) -> _Key:
        return cls(term["model_key"], bytes(term["prefix_hash"]), bytes(term["completion_hash"]))


def _read_scored(
    candidates: Mapping[Side, Row], warehouse: Warehouse
) -> dict[_Key, Sequence[float]]:
    """Read the token log-probs behind candidates, where they were kept."""
    keys = {_Key.of(term) for row in candidates.values() for term in row["terms"].values()}
    if not keys:
        return {}
    few = warehouse.spark.createDataFrame(
        [(k.model_key, bytearray(k.prefix_hash), bytearray(k.completion_hash)) for k in keys],
        "model_key string, prefix_hash binary, completion_hash binary",
    )
    rows = (
        warehouse.read(LOGPROBS)
        .where(F.col("model_key").isin(sorted({key.model_key for key in keys})))
        .where("token_logprobs IS NOT NULL")
        .select(*LOGPROBS.key, "token_logprobs")
        .join(F.broadcast(few), on=list(LOGPROBS.key), how="left_semi")
    )
    # A few per pair shown. Two runs at once may have written a key twice: either row is right.
    return {_Key.of(row): row["token_logprobs"] for row in rows.collect()}


def _engine_versions(candidates: Mapping[Side, Row], warehouse: Warehouse) -> tuple[str, ...]:
    models = {term["model_key"] for row in candidates.values() for term in row["terms"].values()}
    if not models:
        return ()
    rows = warehouse.read(LOGPROBS).where(F.col("model_key").isin(sorted(models)))
    # One row per version.
    return tuple(sorted(row[0] for row in rows.select("engine_version").distinct().collect()))


class _PairShower:
    """Makes pairs to read from their rows; notes why one could not be shown by token."""

    def __init__(
        self,
        config: AnnotateConfig,
        candidates: Mapping[Side, Row],
        plan: AnnotationPlan | None,
        scored: Mapping[_Key, Sequence[float]],
    ) -> None:
        self._config, self._candidates, self._scored = config, candidates, scored
        self._has_texts = config.report.texts
        self._weights = term_weights(config.reward)
        self._reader: TokenReader | None = None
        if plan is not None and self._has_texts and scored:
            models = {name: model_key for name, (model_key, _) in plan.term_views().items()}
            self._reader = TokenReader(plan.encoding, models, self._weights)
        self._without_models = plan is None
        self._unlike = 0

    def show(self, pair: Row) -> ShownPair:
        """Make one pair."""
        chosen = self._candidates[pair["prompt_id"], pair["chosen_id"]]
        drawn = [chosen[name] for name in ("instruction_id", "exemplar_id") if chosen[name]]
        prompt: tuple[Message, ...] | None = None
        if self._has_texts:
            prompt = tuple(
                Message(role=turn["role"], content=turn["content"]) for turn in pair["prompt"]
            )
        return ShownPair(
            prompt_id=pair["prompt_id"],
            domain=pair["domain"],
            confidence=chosen["domain_confidence"],
            conditioned_by=", ".join(drawn) or None,
            margin=pair["margin"],
            prompt=prompt,
            chosen=self._show_side(chosen),
            rejected=self._show_side(self._candidates[pair["prompt_id"], pair["rejected_id"]]),
        )

    def tokens_missing(self) -> str | None:
        """Say why completions are not shown token by token; None where they are, or no text is."""
        if not self._has_texts or not self._candidates:
            return None
        if not self._scored:
            return (
                "The log-probs of single tokens were not kept, so completions stand here without "
                "colours. Set run.store_token_logprobs to true before scoring; what the store "
                "holds already is not scored again, so try it with a new warehouse and --limit."
            )
        if self._without_models:
            return (
                "The tokenizers of the reward's models are not on this machine, so completions "
                "stand here without colours. Build the page where the models are."
            )
        if self._unlike:
            return (
                f"{self._unlike} completions stand here without colours: for them the store holds "
                "no log-probs of single tokens, or the tokenizers have changed since."
            )
        return None

    def _show_side(self, row: Row) -> ShownCandidate:
        terms = {name: row["terms"][name] for name in self._weights}
        tokens: tuple[TokenRow, ...] = ()
        if self._reader is not None:
            found = {name: self._scored.get(_Key.of(term)) for name, term in terms.items()}
            scored = {
                name: ScoredTerm(bytes(terms[name]["completion_hash"]), logprobs)
                for name, logprobs in found.items()
                if logprobs is not None
            }
            if len(scored) == len(terms):
                tokens = self._reader.read(row["completion"], row["finish_reason"], scored)
            self._unlike += not tokens
        return ShownCandidate(
            completion_id=row["completion_id"],
            text=row["completion"] if self._has_texts else None,
            reward=row["reward"],
            num_tokens=row["num_tokens"],
            terms={name: term["logprob_sum"] for name, term in terms.items()},
            tokens=tokens,
        )
