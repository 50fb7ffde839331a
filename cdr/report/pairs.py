"""Pairs to read: both answers with what the models said of each token, read from the tables by id.

A page quotes a few dozen pairs, so their rows and log-probs come to the driver, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from cdr.chat import Message
from cdr.errors import TableError
from cdr.plan import RewardPlan
from cdr.report.reward_text import term_weights
from cdr.report.tokens import ScoredTerm, TokenReader, TokenRow
from cdr.reward_config import RewardSpec
from cdr.tables import LOGPROBS, REWARDS
from cdr.warehouse import Warehouse

PairIds = tuple[str, str, str]
"""(prompt_id, completion_id of chosen, completion_id of rejected)."""

_Side = tuple[str, str]
"""(prompt_id, completion_id) of a candidate."""

_COLUMNS = (
    "prompt_id", "completion_id", "prompt", "completion", "finish_reason", "domain",
    "domain_confidence", "instruction_id", "exemplar_id", "reward", "num_tokens", "terms",
)  # fmt: skip


@dataclass(frozen=True)
class ShownCandidate:
    """One side of a pair.

    Args:
        completion_id: the candidate's id.
        text: what it says; None where texts are left out.
        reward: its reward.
        num_tokens: tokens of the first term's model.
        terms: log-prob sum by term, nats.
        tokens: one row where all terms share tokens, more where tokenizers differ; empty where
            token log-probs were not kept.
    """

    completion_id: str
    text: str | None
    reward: float
    num_tokens: int
    terms: Mapping[str, float]
    tokens: tuple[TokenRow, ...] = ()


@dataclass(frozen=True)
class ShownPair:
    """A pair to read.

    Args:
        prompt_id: the prompt's id.
        domain: its domain; `none` without one.
        confidence: the router's; None without a router.
        conditioned_by: ids of the instruction and exemplar drawn, as text; None for none.
        margin: chosen − rejected.
        prompt: its messages; None where texts are left out.
        chosen: the preferred candidate, or the better answer by its label.
        rejected: the other one.
    """

    prompt_id: str
    domain: str
    confidence: float | None
    conditioned_by: str | None
    margin: float
    prompt: tuple[Message, ...] | None
    chosen: ShownCandidate
    rejected: ShownCandidate


@dataclass(frozen=True)
class PairsRead:
    """What `read_pairs` found.

    Args:
        pairs: by their ids.
        engine_versions: versions of the engines behind the log-probs of the reward's models.
        tokens_missing: why answers are not shown token by token, and what to do; None where they
            are, or no text is.
    """

    pairs: Mapping[PairIds, ShownPair]
    engine_versions: tuple[str, ...]
    tokens_missing: str | None


def read_pairs(
    wanted: Collection[PairIds],
    rewards: DataFrame,
    warehouse: Warehouse,
    reward: RewardSpec,
    plan: RewardPlan | None,
    *,
    has_texts: bool,
) -> PairsRead:
    """Read pairs to be shown.

    Args:
        wanted: their ids, a page's worth.
        rewards: rows of `rewards`, of one run.
        warehouse: where `logprobs` is.
        reward: the run's.
        plan: for the tokenizers; None where the models are not on this machine.
        has_texts: whether prompts and completions may be shown.
    """
    candidates = _read_candidates(rewards, wanted)
    shower = _PairShower(reward, candidates, plan, _read_scored(candidates, warehouse), has_texts)
    return PairsRead(
        pairs={ids: shower.show(ids) for ids in dict.fromkeys(wanted)},
        engine_versions=_engine_versions(candidates, warehouse),
        tokens_missing=shower.tokens_missing(),
    )


def _read_candidates(rewards: DataFrame, pairs: Collection[PairIds]) -> dict[_Side, Row]:
    wanted = {(prompt_id, side) for prompt_id, *sides in pairs for side in sides}
    if not wanted:
        return {}
    few = rewards.sparkSession.createDataFrame(
        sorted(wanted), "prompt_id string, completion_id string"
    )
    found = rewards.select(*_COLUMNS).join(
        F.broadcast(few), on=["prompt_id", "completion_id"], how="left_semi"
    )
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
    candidates: Mapping[_Side, Row], warehouse: Warehouse
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


def _engine_versions(candidates: Mapping[_Side, Row], warehouse: Warehouse) -> tuple[str, ...]:
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
        reward: RewardSpec,
        candidates: Mapping[_Side, Row],
        plan: RewardPlan | None,
        scored: Mapping[_Key, Sequence[float]],
        has_texts: bool,
    ) -> None:
        self._reward, self._candidates, self._scored = reward, candidates, scored
        self._has_texts = has_texts
        self._weights = term_weights(reward)
        self._reader: TokenReader | None = None
        if plan is not None and has_texts and scored and reward.is_per_token:
            models = {name: model_key for name, (model_key, _) in plan.term_views().items()}
            self._reader = TokenReader(plan.encoding, models, self._weights)
        self._without_models = plan is None
        self._unlike = 0

    def show(self, ids: PairIds) -> ShownPair:
        """Make one pair."""
        prompt_id, *sides = ids
        if missing := [side for side in sides if (prompt_id, side) not in self._candidates]:
            raise TableError(
                f"it has no candidate {' or '.join(missing)} of prompt {prompt_id} any more",
                where=REWARDS.name,
                fix="another run over this dataset has replaced the rows: run the job again, which "
                "scores nothing that is stored",
            )
        chosen, rejected = (self._candidates[prompt_id, side] for side in sides)
        drawn = [chosen[name] for name in ("instruction_id", "exemplar_id") if chosen[name]]
        prompt: tuple[Message, ...] | None = None
        if self._has_texts:
            prompt = tuple(
                Message(role=turn["role"], content=turn["content"]) for turn in chosen["prompt"]
            )
        return ShownPair(
            prompt_id=prompt_id,
            domain=chosen["domain"] or "none",
            confidence=chosen["domain_confidence"],
            conditioned_by=", ".join(drawn) or None,
            margin=chosen["reward"] - rejected["reward"],
            prompt=prompt,
            chosen=self._show_side(chosen),
            rejected=self._show_side(rejected),
        )

    def tokens_missing(self) -> str | None:
        """Say why completions are not shown token by token; None where they are, or no text is."""
        if not self._has_texts or not self._candidates:
            return None
        if not self._reward.is_per_token:
            return "This reward is one of whole completions, so they stand here without colours."
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
