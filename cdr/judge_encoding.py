"""From a prompt with its candidates to the questions a judge is asked about them, as token ids.

What `cdr.encoding` is to a reward of log-prob terms: each view is a pair of answers in one order,
and what follows its prefix is the letter of each candidate. Pure: no Spark, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Protocol

from cdr.chat import ChatEncoder, Message
from cdr.encoding import (
    Candidate,
    EncodedCandidate,
    EncodedPrompt,
    EncodedView,
    EncodingPlan,
    PromptEncoder,
)
from cdr.errors import RejectReason, RowRejected
from cdr.judge import LABELS, judge_messages

Refusal = tuple[str, RejectReason, str]
"""completion_id, reason and detail of a candidate that is refused."""


class Encoder(Protocol):
    """Encodes a prompt and its candidates; see `PromptEncoder.encode`."""

    def encode(
        self,
        messages: Sequence[Message],
        prompt_hash: str,
        domain: str | None,
        candidates: Sequence[Candidate],
    ) -> EncodedPrompt:
        """Encode a prompt; see `PromptEncoder.encode`."""
        ...


def make_encoder(plan: EncodingPlan) -> Encoder:
    """Make the encoder of a plan: a judge's, or that of log-prob terms."""
    is_judge = any(condition == "compared" for _, condition in plan.views)
    return JudgeEncoder(plan) if is_judge else PromptEncoder(plan)


class JudgeEncoder:
    """Encodes what a judge is asked, by a plan with one tokenizer; loads it once.

    Args:
        plan: what decides the token ids.
    """

    def __init__(self, plan: EncodingPlan) -> None:
        self._plan = plan
        (self._tokenizer,) = plan.tokenizers
        self._encoder = ChatEncoder.load(
            self._tokenizer.path,
            self._tokenizer.revision,
            template=self._tokenizer.template,
            special_tokens_in_text=plan.special_tokens_in_text,
            score_end_of_turn=plan.score_end_of_turn,
        )
        # Cut, as it were: a letter is judged by itself, without an end of turn.
        self._labels = [self._encoder.encode_completion(letter, "length") for letter in LABELS]

    def encode(
        self,
        messages: Sequence[Message],
        prompt_hash: str,
        domain: str | None,
        candidates: Sequence[Candidate],
    ) -> EncodedPrompt:
        """Encode every pair of different candidates in both orders.

        Candidates with the same text are one answer. Where a pair is too long for the judge, the
        longest answer is refused, until all pairs fit; an answer with nothing to compare it to is
        refused as well.

        Args:
            messages: x.
            prompt_hash: decides the draw from the pack.
            domain: domain of the pack; None for no criteria.
            candidates: at least one.
        """
        encoded = self._encode(messages, prompt_hash, domain, candidates, with_exemplar=True)
        too_long = any(reason is RejectReason.TOO_LONG for _, reason, _ in encoded.rejected)
        if too_long and encoded.exemplar_id and self._plan.drop_exemplar_when_too_long:
            return self._encode(messages, prompt_hash, domain, candidates, with_exemplar=False)
        return encoded

    def _encode(
        self,
        messages: Sequence[Message],
        prompt_hash: str,
        domain: str | None,
        candidates: Sequence[Candidate],
        *,
        with_exemplar: bool,
    ) -> EncodedPrompt:
        criteria = instruction_id = exemplar_id = None
        rejected: list[Refusal] = []
        prefixes: dict[tuple[str, str], tuple[int, ...]] = {}
        try:
            if self._plan.pack is not None and domain is not None:
                conditioned = self._plan.pack.condition(
                    messages, domain, prompt_hash, self._plan.seed, with_exemplar=with_exemplar
                )
                criteria = conditioned.criteria
                instruction_id = conditioned.instruction_id
                exemplar_id = conditioned.exemplar_id
            answers, num_tokens = self._read(candidates, rejected)
            for first, second in permutations(answers, 2):
                asked = judge_messages(messages, criteria, first, second)
                prefixes[first, second] = self._encoder.encode_prefix(asked)
        except RowRejected as refusal:
            whole = tuple((c.completion_id, refusal.reason, refusal.detail) for c in candidates)
            return EncodedPrompt((), whole, None, None, False)
        self._refuse_too_long(answers, num_tokens, prefixes, rejected)
        if len(answers) == 1:
            (alone,) = answers.values()
            detail = "a judge compares answers, and this one has no other"
            rejected += [(name, RejectReason.NO_OTHER_CANDIDATE, detail) for name in alone]
            answers = {}
        views = [
            EncodedView(
                self._tokenizer.model_key,
                "compared",
                prefixes[pair],
                tuple(
                    EncodedCandidate(name, label.ids, label.boundary_merged, num_tokens[text])
                    for text, label in zip(pair, self._labels, strict=True)
                    for name in answers[text]
                ),
            )
            for pair in permutations(answers, 2)
        ]
        return EncodedPrompt(
            tuple(views), tuple(rejected), instruction_id, exemplar_id, not with_exemplar
        )

    def _read(
        self, candidates: Sequence[Candidate], rejected: list[Refusal]
    ) -> tuple[dict[str, list[str]], dict[str, int]]:
        """Give the ids and the tokens of each different answer; note those that are refused."""
        answers: dict[str, list[str]] = {}
        num_tokens: dict[str, int] = {}
        for candidate in candidates:
            text = candidate.completion
            try:
                ids = self._encoder.encode_completion(text, candidate.finish_reason).ids
            except RowRejected as refusal:
                rejected.append((candidate.completion_id, refusal.reason, refusal.detail))
                continue
            answers.setdefault(text, []).append(candidate.completion_id)
            num_tokens[text] = len(ids)
        return answers, num_tokens

    def _refuse_too_long(
        self,
        answers: dict[str, list[str]],
        num_tokens: dict[str, int],
        prefixes: dict[tuple[str, str], tuple[int, ...]],
        rejected: list[Refusal],
    ) -> None:
        """Take answers out, longest first, until every pair of them fits."""
        limit = self._tokenizer.max_length - max(len(label.ids) for label in self._labels)
        while len(answers) > 1:
            longest = max(len(prefixes[pair]) for pair in permutations(answers, 2))
            if longest <= limit:
                return
            text = max(answers, key=lambda text: (num_tokens[text], text))
            detail = f"a question of {longest} tokens, the judge takes {limit}"
            rejected += [(name, RejectReason.TOO_LONG, detail) for name in answers.pop(text)]
