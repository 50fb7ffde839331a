"""From a prompt with its candidates to the questions a judge is asked about them.

What `cdr.encoding` is to a reward of log-prob terms: each view is a pair of answers in one order,
and what follows its prefix is the letter of each candidate. A model of ours is asked in token ids,
one behind an API in text. Pure: no Spark, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
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
    check_ids,
    encode_within_limit,
    refuse_prompt,
)
from cdr.errors import RejectReason, RowRejected
from cdr.judge import LABELS, judge_messages

CHARS_PER_TOKEN = 4
"""Of English prose, where nothing better is known."""

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
    if not any(condition == "compared" for _, condition in plan.views):
        return PromptEncoder(plan)
    return JudgeEncoder(plan, _TokenQuestions(plan) if plan.tokenizers else _TextQuestions())


class Questions(Protocol):
    """How a judge is asked, and how long that is."""

    @property
    def letters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of `LABELS`."""
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of a question at most; None where only the endpoint knows."""
        ...

    def count_tokens(self, candidate: Candidate) -> int:
        """Count a candidate's tokens.

        Raises:
            RowRejected: the candidate cannot be shown.
        """
        ...

    def ask(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], str | None]:
        """Give a question's token ids and its text, one of which is empty.

        Raises:
            RowRejected: it cannot be asked.
        """
        ...


class _TokenQuestions:
    def __init__(self, plan: EncodingPlan) -> None:
        (tokenizer,) = plan.tokenizers
        self._vocab_size = tokenizer.vocab_size
        self._encoder = ChatEncoder.load(
            tokenizer.path,
            tokenizer.revision,
            template=tokenizer.template,
            special_tokens_in_text=plan.special_tokens_in_text,
            score_end_of_turn=plan.score_end_of_turn,
        )
        # Cut, as it were: a letter is judged by itself, without an end of turn.
        a, b = (self._encoder.encode_completion(letter, "length").ids for letter in LABELS)
        self.letters = (a, b)
        self.longest = tokenizer.max_length - max(len(a), len(b))

    def count_tokens(self, candidate: Candidate) -> int:
        encoded = self._encoder.encode_completion(candidate.completion, candidate.finish_reason)
        check_ids(encoded.ids, self._vocab_size)
        return len(encoded.ids)

    def ask(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], str | None]:
        ids = self._encoder.encode_prefix(messages)
        check_ids(ids, self._vocab_size)
        return ids, None


class _TextQuestions:
    # Bytes stand for them: they only name the letter in tables.
    letters = (tuple(LABELS[0].encode()), tuple(LABELS[1].encode()))
    longest = None

    def count_tokens(self, candidate: Candidate) -> int:
        """Estimate: the endpoint's tokenizer is not known."""
        if not candidate.completion:
            raise RowRejected(RejectReason.EMPTY_COMPLETION, "the completion has no text")
        return max(1, round(len(candidate.completion) / CHARS_PER_TOKEN))

    def ask(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], str | None]:
        return (), json.dumps(list(messages), ensure_ascii=False)


class JudgeEncoder:
    """Encodes what a judge is asked, by a plan.

    Args:
        plan: what decides it.
        questions: how the judge is asked.
    """

    def __init__(self, plan: EncodingPlan, questions: Questions) -> None:
        self._plan, self._questions = plan, questions
        ((self._model_key, self._condition),) = plan.views

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
        criteria = instruction_id = exemplar_id = None
        rejected: list[Refusal] = []
        asked: dict[tuple[str, str], tuple[tuple[int, ...], str | None]] = {}
        try:
            if self._plan.pack is not None and domain is not None:
                conditioned = self._plan.pack.condition(
                    messages, domain, prompt_hash, self._plan.seed, with_exemplar=with_exemplar
                )
                criteria = conditioned.criteria
                instruction_id = conditioned.instruction_id
                exemplar_id = conditioned.exemplar_id
            answers = self._read(candidates, rejected)
            for first, second in permutations(answers, 2):
                asked[first, second] = self._questions.ask(
                    judge_messages(messages, criteria, first, second)
                )
        except RowRejected as refusal:
            return refuse_prompt(candidates, refusal)
        lengths = {pair: len(prefix_ids) for pair, (prefix_ids, _) in asked.items()}
        self._refuse_too_long(answers, lengths, rejected)
        if len(answers) == 1:
            (alone,) = answers.values()
            detail = "a judge compares answers, and this one has no other"
            rejected += [(name, RejectReason.NO_OTHER_CANDIDATE, detail) for name in alone]
            answers = {}
        views = [
            EncodedView(
                self._model_key,
                self._condition,
                asked[pair][0],
                tuple(
                    EncodedCandidate(name, ids, False, num_tokens)
                    for text, ids in zip(pair, self._questions.letters, strict=True)
                    for name, num_tokens in answers[text].items()
                ),
                asked[pair][1],
            )
            for pair in permutations(answers, 2)
        ]
        return EncodedPrompt(
            tuple(views), tuple(rejected), instruction_id, exemplar_id, not with_exemplar
        )

    def _read(
        self, candidates: Sequence[Candidate], rejected: list[Refusal]
    ) -> dict[str, dict[str, int]]:
        """Give each different answer's candidates and their tokens; note those that are refused."""
        answers: dict[str, dict[str, int]] = {}
        for candidate in candidates:
            try:
                count = self._questions.count_tokens(candidate)
            except RowRejected as refusal:
                rejected.append((candidate.completion_id, refusal.reason, refusal.detail))
                continue
            answers.setdefault(candidate.completion, {})[candidate.completion_id] = count
        return answers

    def _refuse_too_long(
        self,
        answers: dict[str, dict[str, int]],
        lengths: dict[tuple[str, str], int],
        rejected: list[Refusal],
    ) -> None:
        """Take answers out, longest first, until every pair of them fits."""
        limit = self._questions.longest
        while limit is not None and len(answers) > 1:
            longest = max(lengths[pair] for pair in permutations(answers, 2))
            if longest <= limit:
                return
            text = max(answers, key=lambda text: (max(answers[text].values()), text))
            detail = f"a question of {longest} tokens, the judge takes {limit}"
            rejected += [(name, RejectReason.TOO_LONG, detail) for name in answers.pop(text)]
