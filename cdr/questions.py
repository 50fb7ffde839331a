"""What models are asked about completions, cut into requests of a bounded size.

The order of questions is kept for whole requests; within one, each model's are sorted by prefix, so
that neighbours share their common one. Used by tasks and by registered rewards alike, so that both
ask, and read the answers, in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cdr.engines.base import ScoringGroup, TokenLogprobs
from cdr.engines.wire import Outcome


@dataclass(frozen=True)
class Question:
    """A model, a prefix and completions after it.

    Args:
        model_key: which model is asked.
        prefix_hash: names the prefix in the answer.
        completion_hashes: name the completions, in the group's order.
        group: the token ids.
    """

    model_key: str
    prefix_hash: bytes
    completion_hashes: Sequence[bytes]
    group: ScoringGroup

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, once, and of all completions."""
        return len(self.group.prefix_ids) + sum(map(len, self.group.completions_ids))


def cut_requests(
    questions: Iterable[Question], request_tokens: int
) -> Iterator[dict[str, list[Question]]]:
    """Cut questions, in their order, into requests.

    Args:
        questions: prompts with a common prefix together, all models of a prompt in turn.
        request_tokens: tokens for each model at most, unless one question alone has more.

    Yields:
        Questions by model key, sorted by prefix.
    """
    request: dict[str, list[Question]] = {}
    tokens: Counter[str] = Counter()
    for question in questions:
        key = question.model_key
        if tokens[key] and tokens[key] + question.num_tokens > request_tokens:
            yield _sorted(request)
            request, tokens = {}, Counter()
        request.setdefault(key, []).append(question)
        tokens[key] += question.num_tokens
    if request:
        yield _sorted(request)


def sum_logprobs(logprobs: TokenLogprobs) -> float:
    """Give the log-prob of a whole completion, nats: its tokens' float32 summed in float64."""
    return float(np.sum(logprobs, dtype=np.float64))


def describe_error(outcome: Outcome[TokenLogprobs]) -> str | None:
    """Say why there is no score, as tables do: `reason`, or `reason: detail`; None for a score."""
    if outcome.error is None:
        return None
    reason = outcome.error.value
    return reason if outcome.detail is None else f"{reason}: {outcome.detail}"


def _sorted(request: dict[str, list[Question]]) -> dict[str, list[Question]]:
    return {
        key: sorted(questions, key=lambda question: question.group.prefix_ids)
        for key, questions in request.items()
    }
