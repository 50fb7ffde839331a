"""From a prompt with its candidates to the token ids that every term of a reward asks about.

A *view* is (model, condition): the prefix a model reads before it judges the candidates. For each
prompt, `PromptEncoder.encode` gives every view's prefix ids and every candidate's completion ids,
and says which candidates are refused and why. What cannot be scored by one model is scored by
none. Pure: no Spark, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np

from cdr.chat import ChatEncoder, Message
from cdr.errors import RejectReason, RowRejected
from cdr.prompt_pack import PromptPack
from cdr.reward_config import Condition

UNCONDITIONAL: tuple[Message, ...] = ({"role": "user", "content": ""},)
"""The prompt of an `unconditional` term: an empty user turn and the generation header."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A model's tokenizer and the longest row the model takes.

    Args:
        model_key: the model's key.
        path: folder or hub id of the tokenizer.
        revision: commit hash of a hub id.
        template: Jinja text.
        max_length: tokens of prefix and completion together.
        vocab_size: ids at or above it do not exist in the model.
        close_turns: see `cdr.chat.ChatEncoder`; for classifiers.
    """

    model_key: str
    path: str
    revision: str | None
    template: str
    max_length: int
    vocab_size: int
    close_turns: bool = False


@dataclass(frozen=True)
class EncodingPlan:
    """All that decides the token ids of a reward, besides prompt, domain and candidates.

    Args:
        tokenizers: one per model key.
        views: (model key, condition) of every term, each once.
        pack: prompt pack; None when every prompt stays as it is.
        seed: seed of the draw of instruction and exemplar.
        special_tokens_in_text: `reject` or `as_text`.
        score_end_of_turn: whether the end-of-turn token is scored.
        drop_exemplar_when_too_long: try again without the exemplar before rejecting.
    """

    tokenizers: tuple[TokenizerSpec, ...]
    views: tuple[tuple[str, Condition], ...]
    pack: PromptPack | None
    seed: int
    special_tokens_in_text: Literal["reject", "as_text"]
    score_end_of_turn: bool
    drop_exemplar_when_too_long: bool


@dataclass(frozen=True)
class Candidate:
    """One completion of a prompt, as given."""

    completion_id: str
    completion: str
    finish_reason: str | None


@dataclass(frozen=True)
class EncodedCandidate:
    """What one model is asked about a candidate.

    Args:
        completion_id: the candidate's.
        ids: its token ids; under a judge's view those of its letter.
        boundary_merged: as in `cdr.chat`.
        num_tokens: tokens of the candidate itself.
    """

    completion_id: str
    ids: tuple[int, ...]
    boundary_merged: bool
    num_tokens: int


@dataclass(frozen=True)
class EncodedView:
    """What one model reads under one condition, and the candidates after it.

    Args:
        model_key: the model's.
        condition: how it reads the prompt.
        prefix_ids: what it reads; none where it is asked in text.
        candidates: what follows.
        question: messages as JSON, for a judge that is asked in text; None otherwise.
    """

    model_key: str
    condition: Condition
    prefix_ids: tuple[int, ...]
    candidates: tuple[EncodedCandidate, ...]
    question: str | None = None

    @property
    def prefix_hash(self) -> bytes:
        """Hash of what is read; 16 bytes."""
        if self.question is None:
            return ids_hash(self.prefix_ids)
        return hashlib.sha256(self.question.encode()).digest()[:16]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for scoring; every candidate is in all views or in `rejected`.

    Args:
        views: in the plan's order; none when every candidate was refused.
        rejected: (completion_id, reason, detail) of refused candidates.
        instruction_id: instruction drawn; None where the prompt was left as it is.
        exemplar_id: exemplar drawn; None for none.
        exemplar_dropped: the exemplar was left out because a candidate did not fit with it.
    """

    views: tuple[EncodedView, ...]
    rejected: tuple[tuple[str, RejectReason, str], ...]
    instruction_id: str | None
    exemplar_id: str | None
    exemplar_dropped: bool


def ids_hash(ids: Sequence[int]) -> bytes:
    """Hash token ids: the first 16 bytes of the sha256 of their little-endian int32 bytes."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).digest()[:16]


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that a model's embedding has no row for (a tokenizer with added tokens).

    Raises:
        RowRejected: outside_vocabulary, with the largest.
    """
    if (largest := max(ids)) >= vocab_size:
        raise RowRejected(
            RejectReason.OUTSIDE_VOCABULARY,
            f"the tokenizer gives the id {largest}, the model has ids below {vocab_size}",
        )


class _Encode(Protocol):
    def __call__(self, *, with_exemplar: bool) -> EncodedPrompt: ...


def encode_within_limit(plan: EncodingPlan, encode: _Encode) -> EncodedPrompt:
    """Encode a prompt with its exemplar, or without where that makes something too long.

    Args:
        plan: says whether the exemplar may be left out.
        encode: does it.
    """
    encoded = encode(with_exemplar=True)
    too_long = any(reason is RejectReason.TOO_LONG for _, reason, _ in encoded.rejected)
    if too_long and encoded.exemplar_id and plan.drop_exemplar_when_too_long:
        return encode(with_exemplar=False)
    return encoded


def refuse_prompt(candidates: Sequence[Candidate], refusal: RowRejected) -> EncodedPrompt:
    """Refuse all candidates of a prompt for the same reason."""
    whole = tuple((c.completion_id, refusal.reason, refusal.detail) for c in candidates)
    return EncodedPrompt((), whole, None, None, False)


class PromptEncoder:
    """Encodes prompts by a plan; loads each tokenizer once."""

    def __init__(self, plan: EncodingPlan) -> None:
        self._plan = plan
        self._tokenizers = {spec.model_key: spec for spec in plan.tokenizers}
        self._encoders = {
            spec.model_key: ChatEncoder.load(
                spec.path,
                spec.revision,
                template=spec.template,
                special_tokens_in_text=plan.special_tokens_in_text,
                score_end_of_turn=plan.score_end_of_turn,
                close_turns=spec.close_turns,
            )
            for spec in plan.tokenizers
        }

    def encode(
        self,
        messages: Sequence[Message],
        prompt_hash: str,
        domain: str | None,
        candidates: Sequence[Candidate],
    ) -> EncodedPrompt:
        """Encode a prompt and its candidates for every view.

        Args:
            messages: x.
            prompt_hash: decides the draw from the pack.
            domain: domain of the pack; None leaves the prompt as it is.
            candidates: at least one.
        """
        return encode_within_limit(
            self._plan, partial(self._encode, messages, prompt_hash, domain, candidates)
        )

    def _encode(
        self,
        messages: Sequence[Message],
        prompt_hash: str,
        domain: str | None,
        candidates: Sequence[Candidate],
        *,
        with_exemplar: bool,
    ) -> EncodedPrompt:
        instruction_id = exemplar_id = None
        prompts: dict[Condition, Sequence[Message]] = {
            "plain": messages, "conditioned": messages, "unconditional": UNCONDITIONAL
        }  # fmt: skip
        try:
            if self._plan.pack is not None and domain is not None:
                conditioned = self._plan.pack.condition(
                    messages, domain, prompt_hash, self._plan.seed, with_exemplar=with_exemplar
                )
                prompts["conditioned"] = conditioned.messages
                instruction_id = conditioned.instruction_id
                exemplar_id = conditioned.exemplar_id
            prefixes = [
                self._encode_prefix(model_key, prompts[condition])
                for model_key, condition in self._plan.views
            ]
        except RowRejected as refusal:
            return refuse_prompt(candidates, refusal)

        longest = {
            model_key: max(
                len(prefix)
                for prefix, (key, _) in zip(prefixes, self._plan.views, strict=True)
                if key == model_key
            )
            for model_key in self._tokenizers
        }
        kept: list[dict[str, EncodedCandidate]] = []
        rejected: list[tuple[str, RejectReason, str]] = []
        for candidate in candidates:
            try:
                kept.append(self._encode_candidate(candidate, longest))
            except RowRejected as refusal:
                rejected.append((candidate.completion_id, refusal.reason, refusal.detail))
        views = tuple(
            EncodedView(
                model_key, condition, prefix, tuple(by_model[model_key] for by_model in kept)
            )
            for prefix, (model_key, condition) in zip(prefixes, self._plan.views, strict=True)
        )
        return EncodedPrompt(
            views if kept else (), tuple(rejected), instruction_id, exemplar_id, not with_exemplar
        )

    def _encode_prefix(self, model_key: str, messages: Sequence[Message]) -> tuple[int, ...]:
        ids = self._encoders[model_key].encode_prefix(messages)
        check_ids(ids, self._tokenizers[model_key].vocab_size)
        return ids

    def _encode_candidate(
        self, candidate: Candidate, longest: dict[str, int]
    ) -> dict[str, EncodedCandidate]:
        by_model = {}
        for model_key, spec in self._tokenizers.items():
            encoded = self._encoders[model_key].encode_completion(
                candidate.completion, candidate.finish_reason
            )
            check_ids(encoded.ids, spec.vocab_size)
            total = longest[model_key] + len(encoded.ids)
            if total > spec.max_length:
                raise RowRejected(
                    RejectReason.TOO_LONG,
                    f"{longest[model_key]} prefix and {len(encoded.ids)} completion tokens, "
                    f"the model takes {spec.max_length}",
                )
            by_model[model_key] = EncodedCandidate(
                candidate.completion_id, encoded.ids, encoded.boundary_merged, len(encoded.ids)
            )
        return by_model
