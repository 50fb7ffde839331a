"""What an annotate run did, in numbers: for the terminal, for MLflow, for the row in `runs`.

Computed from the committed tables in three small aggregations, so it says what readers will find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.text_table import render_table

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

RESUBMITTED = "sent to vLLM again, without its prefix cache (docs/how-to/vllm.md)"
"""What became of the requests that are counted as such."""
_LOAD_S = "load_s."


@dataclass(frozen=True)
class EngineUse:
    """How a run used its engines.

    Args:
        load_s: seconds that loading a model took on the slowest engine host, by role; the models
            that this run did not load are missing.
        resubmitted: requests that engines sent their model again.
        busy_s: seconds that engine hosts were at work on requests, summed over them; what tasks
            asked that failed is not in it.
        at_hand_s: seconds that the waves took, summed over the hosts that were asked in them:
            loading, uneven ends and commits are in it.
    """

    load_s: Mapping[str, float] = field(default_factory=dict)
    resubmitted: int = 0
    busy_s: float = 0.0
    at_hand_s: float = 0.0

    @property
    def busy(self) -> float | None:
        """Share of the waves' time that the hosts were at work; None where none was asked."""
        return self.busy_s / self.at_hand_s if self.at_hand_s else None

    def counts(self) -> dict[str, int]:
        """Give what `runs.counts` keeps, by name: whole seconds."""
        return {name: round(value) for name, value in self.metrics().items()}

    def metrics(self) -> dict[str, float]:
        """Give what there is to tell, by name, for MLflow."""
        found = {f"{_LOAD_S}{role}": seconds for role, seconds in self.load_s.items()}
        if self.resubmitted:
            found["requests_resubmitted"] = self.resubmitted
        if self.at_hand_s:
            found |= {"engines_busy_s": self.busy_s, "engines_at_hand_s": self.at_hand_s}
        return found

    @classmethod
    def read(cls, counts: Mapping[str, int]) -> EngineUse:
        """Take what `counts` gave."""
        return cls(
            load_s={
                name.removeprefix(_LOAD_S): float(seconds)
                for name, seconds in counts.items()
                if name.startswith(_LOAD_S)
            },
            resubmitted=counts.get("requests_resubmitted", 0),
            busy_s=counts.get("engines_busy_s", 0.0),
            at_hand_s=counts.get("engines_at_hand_s", 0.0),
        )

    def render(self) -> list[str]:
        """Write it for a terminal, in lines; none where no engine was asked."""
        lines = []
        if self.busy is not None:
            lines.append(f"{'engines':<12}{self.busy:>9.0%}   busy while there were waves")
        if self.resubmitted:
            lines.append(f"{'requests':<12}{self.resubmitted:>9,}   {RESUBMITTED}")
        return lines


@dataclass(frozen=True)
class DomainSummary:
    """One domain's numbers.

    Args:
        prompts: prompts in it.
        candidates: scored candidates.
        pairs: pairs chosen.
        reward_quantiles: at `QUANTILES`, nats; empty without scored candidates.
        margin_quantiles: at `QUANTILES`, nats; empty without pairs.
        chosen_tokens: mean tokens of chosen; None without pairs.
        rejected_tokens: mean tokens of rejected; None without pairs.
        chosen_longer: share of pairs whose chosen is longer; None without pairs.
    """

    prompts: int
    candidates: int
    pairs: int
    reward_quantiles: tuple[float, ...]
    margin_quantiles: tuple[float, ...]
    chosen_tokens: float | None
    rejected_tokens: float | None
    chosen_longer: float | None


@dataclass(frozen=True)
class Summary:
    """A run's numbers.

    Args:
        candidates: rows of the input, one per candidate; = ok + failed + the rejected.
        ok: candidates with a reward.
        failed: candidates without a score this time, tried again by the next run.
        rejected: refused rows by reason.
        domains: by domain; `none` where prompts were left as they are.
        routed: prompts by who decided their domain (router, fallback, column, fixed, none).
        asked: log-probs the reward needs.
        scored: those computed by this run.
        pairs: pairs chosen.
        no_pair: prompts without a pair, by reason.
        length_fallbacks: pairs whose length window was empty.
        tokens: tokens read by the scoring models, prefixes once.
        scoring_s: seconds spent in waves; whole ones where it comes from `runs`.
        engines: how it used its engines.
        wall_s: seconds since the start.
    """

    candidates: int
    ok: int
    failed: int
    rejected: Mapping[str, int]
    domains: Mapping[str, DomainSummary]
    routed: Mapping[str, int]
    asked: int
    scored: int
    pairs: int
    no_pair: Mapping[str, int]
    length_fallbacks: int
    tokens: int
    scoring_s: float
    engines: EngineUse
    wall_s: float

    @property
    def prompts(self) -> int:
        """Prompts with at least one candidate that was not rejected."""
        return sum(domain.prompts for domain in self.domains.values())

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of scoring; None where nothing was scored, or in no measurable time."""
        return self.tokens / self.scoring_s if self.tokens and self.scoring_s else None

    @property
    def rejected_fraction(self) -> float:
        """Share of the input's candidates that were refused."""
        return sum(self.rejected.values()) / self.candidates if self.candidates else 0.0

    @property
    def failed_fraction(self) -> float:
        """Share of the input's candidates that have no score this time."""
        return self.failed / self.candidates if self.candidates else 0.0

    def counts(self) -> dict[str, int]:
        """Give every count by name, for `runs`."""
        return {
            "prompts": self.prompts,
            "candidates": self.candidates,
            "ok": self.ok,
            "failed": self.failed,
            "rejected": sum(self.rejected.values()),
            "pairs": self.pairs,
            "length_fallbacks": self.length_fallbacks,
            "logprobs_asked": self.asked,
            "logprobs_scored": self.scored,
            "tokens": self.tokens,
            # Whole seconds, for pages built from the tables later.
            "scoring_s": round(self.scoring_s),
            **self.engines.counts(),
            **{f"rejected.{reason}": count for reason, count in self.rejected.items()},
            **{f"no_pair.{reason}": count for reason, count in self.no_pair.items()},
            **{f"routed.{source}": count for source, count in self.routed.items()},
            **{f"domain.{name}": domain.prompts for name, domain in self.domains.items()},
        }

    def metrics(self) -> dict[str, float]:
        """Give every number by name, for MLflow."""
        found: dict[str, float] = {name: float(value) for name, value in self.counts().items()}
        found |= {
            "rejected_fraction": self.rejected_fraction,
            "failed_fraction": self.failed_fraction,
            "scoring_s": self.scoring_s,
            "wall_s": self.wall_s,
            **self.engines.metrics(),
        }
        if self.tokens_per_s is not None:
            found["tokens_per_s"] = self.tokens_per_s
        for name, domain in self.domains.items():
            for kind, values in (
                ("reward", domain.reward_quantiles), ("margin", domain.margin_quantiles)
            ):  # fmt: skip
                for quantile, value in zip(QUANTILES, values, strict=False):
                    found[f"{kind}_p{round(quantile * 100):02d}.{name}"] = value
            found |= {
                f"{label}.{name}": value
                for label, value in (
                    ("chosen_tokens", domain.chosen_tokens),
                    ("rejected_tokens", domain.rejected_tokens),
                    ("chosen_longer", domain.chosen_longer),
                )
                if value is not None
            }
        return found

    def render(self) -> str:
        """Write the numbers for a terminal."""
        lines = [
            f"{'prompts':<12}{self.prompts:>9,}",
            f"{'candidates':<12}{self.candidates:>9,}   ok {self.ok:,}, failed {self.failed:,}, "
            f"rejected {_listed(self.rejected)}",
            f"{'routed':<12}{sum(self.routed.values()):>9,}   by {_listed(self.routed)}",
            f"{'scored':<12}{self.scored:>9,}   log-probs; "
            + (
                f"{self.asked - self.scored:,} of {self.asked:,} were in the store"
                if self.scored
                else f"nothing to score, all {self.asked:,} were in the store"
            ),
            f"{'pairs':<12}{self.pairs:>9,}   without a pair: {_listed(self.no_pair)}; "
            f"length window empty: {self.length_fallbacks:,}",
            f"{'tokens':<12}{self.tokens:>9,}   "
            + (f"{self.tokens_per_s:,.0f} tokens/s while scoring" if self.tokens_per_s else ""),
            *self.engines.render(),
            f"{'wall time':<12}{self.wall_s:>8,.0f}s   of it scoring {self.scoring_s:,.0f}s",
            "",
        ]
        header = ("domain", "prompts", "pairs", "margin p50", "reward p50", "chosen tok",
                  "rejected tok", "chosen longer")  # fmt: skip
        rows = [
            (
                name,
                domain.prompts,
                domain.pairs,
                _tenths(_median(domain.margin_quantiles)),
                _tenths(_median(domain.reward_quantiles)),
                _tenths(domain.chosen_tokens),
                _tenths(domain.rejected_tokens),
                None if domain.chosen_longer is None else f"{domain.chosen_longer:.0%}",
            )
            for name, domain in self.domains.items()
        ]
        return "\n".join([*(line.rstrip() for line in lines), *render_table(header, rows)])


def summarize(
    rewards: DataFrame,
    rejects: DataFrame,
    pairs: DataFrame,
    unpaired: DataFrame,
    *,
    asked: int,
    scored: int,
    tokens: int,
    scoring_s: float,
    engines: EngineUse,
    wall_s: float,
) -> Summary:
    """Aggregate what a run committed.

    Args:
        rewards: this run's rows of `rewards`.
        rejects: this dataset's rows of `rejects`.
        pairs: this run's rows of `preferences`.
        unpaired: this run's rows of `unpaired`.
        asked: log-probs the reward needs.
        scored: log-probs computed now.
        tokens: tokens read by the scoring models.
        scoring_s: seconds spent in waves.
        engines: how the run used its engines.
        wall_s: seconds since the start.
    """
    quantiles = list(QUANTILES)
    domain = F.coalesce("domain", F.lit("none")).alias("domain")
    # All collects below are one row per domain, source or reason.
    by_domain = (
        rewards.groupBy(domain)
        .agg(
            F.countDistinct("prompt_id").alias("prompts"),
            F.count(F.when(F.col("status") == "ok", 1)).alias("ok"),
            F.count(F.when(F.col("status") != "ok", 1)).alias("failed"),
            F.percentile_approx("reward", quantiles).alias("rewards"),
        )
        .collect()
    )
    by_pair = {
        row["domain"]: row
        for row in pairs.groupBy(domain)
        .agg(
            F.count("*").alias("pairs"),
            F.percentile_approx("margin", quantiles).alias("margins"),
            F.avg("chosen_num_tokens").alias("chosen_tokens"),
            F.avg("rejected_num_tokens").alias("rejected_tokens"),
            F.avg(
                F.when(F.col("chosen_num_tokens") > F.col("rejected_num_tokens"), 1.0).otherwise(0)
            ).alias("chosen_longer"),
            F.count(F.when(F.col("length_fallback"), 1)).alias("fallbacks"),
        )
        .collect()
    }
    domains = {}
    for row in sorted(by_domain, key=lambda row: str(row["domain"])):
        pair = by_pair.get(row["domain"])
        domains[row["domain"]] = DomainSummary(
            prompts=row["prompts"],
            candidates=row["ok"],
            pairs=pair["pairs"] if pair else 0,
            reward_quantiles=tuple(row["rewards"] or ()),
            margin_quantiles=tuple(pair["margins"] or ()) if pair else (),
            chosen_tokens=pair["chosen_tokens"] if pair else None,
            rejected_tokens=pair["rejected_tokens"] if pair else None,
            chosen_longer=pair["chosen_longer"] if pair else None,
        )
    ok, failed = sum(row["ok"] for row in by_domain), sum(row["failed"] for row in by_domain)
    source = F.coalesce("domain_source", F.lit("not routed"))
    counts = _count_distinct(
        routed=rewards.select(source, "prompt_id"),
        rejected=rejects.select("reason", "source_row"),
        no_pair=unpaired.select("reason", "prompt_id"),
    )
    rejected = counts["rejected"]
    return Summary(
        candidates=ok + failed + sum(rejected.values()),
        ok=ok,
        failed=failed,
        rejected=rejected,
        domains=domains,
        routed=counts["routed"],
        asked=asked,
        scored=scored,
        pairs=sum(row["pairs"] for row in by_pair.values()),
        no_pair=counts["no_pair"],
        length_fallbacks=sum(row["fallbacks"] for row in by_pair.values()),
        tokens=tokens,
        scoring_s=scoring_s,
        engines=engines,
        wall_s=wall_s,
    )


def _count_distinct(**frames: DataFrame) -> dict[str, dict[str, int]]:
    """Count in one pass over frames of a name and a key: distinct keys by frame and name."""
    parts = [rows.toDF("name", "key").withColumn("kind", F.lit(k)) for k, rows in frames.items()]
    union = reduce(DataFrame.unionByName, parts)
    counted = union.groupBy("kind", "name").agg(F.count_distinct("key").alias("keys"))
    found: dict[str, dict[str, int]] = {kind: {} for kind in frames}
    for row in sorted(counted.collect(), key=lambda row: str(row["name"])):
        found[row["kind"]][str(row["name"])] = row["keys"]
    return found


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "0"


def _median(quantiles: tuple[float, ...]) -> float | None:
    return quantiles[len(quantiles) // 2] if quantiles else None


def _tenths(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
