"""Route prompts by asking a router model about its labels, whoever brings the model.

`cdr.router` says what is asked and how an answer is read; `PromptRouter` encodes the prompts, cuts
them into requests and puts every answer in its place. Tasks of a run and registered rewards route
by it, so that a prompt has the same domain in both. No Spark; models are behind `score`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdr.chat import ChatEncoder, Message
from cdr.engines.base import ScoringGroup, TokenLogprobs
from cdr.engines.wire import Outcome
from cdr.errors import EngineError, RowRejected
from cdr.plan import RoutePlan
from cdr.questions import sum_logprobs
from cdr.router import content_free_messages, decide_domain, router_messages

Score = Callable[[Sequence[ScoringGroup]], list[list[Outcome[TokenLogprobs]]]]
"""Asks the router model: one outcome per completion of each group, in order."""


@dataclass(frozen=True)
class Route:
    """What a prompt got.

    Args:
        domain: its domain; None when the router failed.
        confidence: as in `cdr.router.RouteDecision`.
        label_logprobs: per domain, nats; None when the router was not asked, or failed.
        source: `router` or `fallback`; None when the router failed.
        error: why the router failed, to be tried again; None otherwise.
    """

    domain: str | None
    confidence: float | None
    label_logprobs: Mapping[str, float] | None
    source: str | None
    error: str | None


class PromptRouter:
    """Routes prompts by a plan; loads the tokenizer once, and asks for the priors once.

    Args:
        plan: router model, texts and threshold.
    """

    def __init__(self, plan: RoutePlan) -> None:
        self._plan = plan
        self._encoder = ChatEncoder.load(
            plan.tokenizer.path,
            plan.tokenizer.revision,
            template=plan.tokenizer.template,
            # A prompt that quotes a special token is still a prompt to classify.
            special_tokens_in_text="as_text",
            score_end_of_turn=False,
        )
        self._labels = tuple(
            self._encoder.encode_completion(plan.pack.domains[name].router_label, None).ids
            for name in plan.domains
        )
        self._counts = {
            name: len(ids) for name, ids in zip(plan.domains, self._labels, strict=True)
        }
        self._longest = plan.tokenizer.max_length - max(self._counts.values())
        self._prior: dict[str, float] | None = None

    def route(
        self,
        prompts: Sequence[Sequence[Any]],
        score: Score,
        request_tokens: int,
        count: Callable[[int, int], None] | None = None,
    ) -> list[Route]:
        """Route prompts.

        Args:
            prompts: messages; turns have `role` and `content`.
            score: asks the router model.
            request_tokens: tokens per request at most, unless one prompt alone has more.
            count: is told the prompts and tokens of each request that was answered.

        Returns:
            One route per prompt, in order. A prompt the router cannot read (too long, or refused
            by its template) gets the fallback domain, marked as such.

        Raises:
            EngineError: the priors of calibration cannot be had.
        """
        if self._plan.calibrate and self._prior is None:
            self._prior = self._ask_prior(score)
        prefixes = [self._prefix(prompt) for prompt in prompts]
        readable = [i for i, p in enumerate(prefixes) if p and len(p) <= self._longest]
        # Sorted for the prefix tree; answers go back to their places.
        readable.sort(key=lambda i: prefixes[i] or ())
        answers: dict[int, dict[str, Outcome[TokenLogprobs]]] = {}
        for request in _cut(readable, prefixes, request_tokens):
            asked = [prefixes[i] or () for i in request]
            answers.update(zip(request, self._ask(asked, score), strict=True))
            if count is not None:
                count(len(request), sum(map(len, asked)))
        return [self._decide(answers.get(i)) for i in range(len(prompts))]

    def _ask(
        self, prefixes: Sequence[tuple[int, ...]], score: Score
    ) -> list[dict[str, Outcome[TokenLogprobs]]]:
        groups = [ScoringGroup(prefix, self._labels) for prefix in prefixes]
        return [dict(zip(self._plan.domains, outcomes, strict=True)) for outcomes in score(groups)]

    def _ask_prior(self, score: Score) -> dict[str, float]:
        messages = content_free_messages(self._plan.pack, self._plan.domains)
        prior = _sums(self._ask([self._encoder.encode_prefix(messages)], score)[0])
        if any(math.isnan(value) for value in prior.values()):
            raise EngineError("the router cannot score its labels after an empty prompt")
        return prior

    def _prefix(self, prompt: Sequence[Any]) -> tuple[int, ...] | None:
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in prompt]
        try:
            task = router_messages(messages, self._plan.pack, self._plan.domains)
            return self._encoder.encode_prefix(task)
        except RowRejected:
            return None

    def _decide(self, answer: dict[str, Outcome[TokenLogprobs]] | None) -> Route:
        if answer is None:
            return Route(self._plan.fallback, None, None, "fallback", None)
        failed = [outcome.error for outcome in answer.values() if outcome.error is not None]
        if failed:
            return Route(None, None, None, None, f"router: {failed[0].value}")
        sums = _sums(answer)
        decision = decide_domain(
            sums,
            threshold=self._plan.threshold,
            fallback=self._plan.fallback,
            num_tokens=self._counts,
            prior_logprobs=self._prior,
        )
        return Route(decision.domain, decision.confidence, sums, decision.source, None)


def _cut(
    rows: Sequence[int], prefixes: Sequence[tuple[int, ...] | None], request_tokens: int
) -> Iterator[list[int]]:
    """Cut rows, in their order, into requests of about `request_tokens` tokens."""
    request: list[int] = []
    tokens = 0
    for row in rows:
        size = len(prefixes[row] or ())
        if request and tokens + size > request_tokens:
            yield request
            request, tokens = [], 0
        request.append(row)
        tokens += size
    if request:
        yield request


def _sums(answer: Mapping[str, Outcome[TokenLogprobs]]) -> dict[str, float]:
    return {
        name: math.nan if outcome.value is None else sum_logprobs(outcome.value)
        for name, outcome in answer.items()
    }
