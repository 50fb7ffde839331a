"""Score completions on the workers: ask this task's engine host, give a row per completion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cdr.config import RunSpec
from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs
from cdr.engines.wire import Outcome
from cdr.progress import TaskCounter
from udfs.engines import task_engines


def make_score(
    specs: tuple[EngineSpec, ...], run: RunSpec, counter: TaskCounter, counted: str
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Make the function for `DataFrame.mapInPandas`.

    Args:
        specs: the models of the wave; rows name them by `model_key`.
        run: `request_tokens` bounds what one request asks of one model; `store_token_logprobs`
            keeps every token's value.
        counter: counts tokens of all models, and prompts of one.
        counted: model key whose prompts are counted.

    Returns:
        A function over frames with model_key, prefix_hash, prefix_ids, completion_hashes and
        completions_ids, in an order that keeps prompts with a common prefix together and asks all
        models of a prompt in turn, so that a request keeps all of them busy. It yields
        `cdr.scoring.SCORED_DDL` rows, one per completion, failed ones with their error.
    """

    def score(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        first = next(frames, None)
        if first is None:
            return  # an empty partition loads no model
        with task_engines(specs, counter) as (client, versions), counter.task() as count:
            for frame in _with_first(first, frames):
                for request in _requests(frame, run.request_tokens):
                    answers = client.score_all(
                        {key: [q.group for q in questions] for key, questions in request.items()}
                    )
                    count.add(
                        prompts=len(request.get(counted, ())),
                        tokens=sum(q.num_tokens for asked in request.values() for q in asked),
                    )
                    yield pd.DataFrame(
                        [
                            row
                            for key, questions in request.items()
                            for question, outcomes in zip(questions, answers[key], strict=True)
                            for row in _rows(question, outcomes, versions[key], run)
                        ]
                    )

    return score


def _with_first(first: pd.DataFrame, rest: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    yield first
    yield from rest


@dataclass(frozen=True)
class _Question:
    """One input row: a model, a prefix and its completions."""

    model_key: str
    prefix_hash: bytes
    completion_hashes: Sequence[bytes]
    group: ScoringGroup

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, once, and of all completions."""
        return len(self.group.prefix_ids) + sum(map(len, self.group.completions_ids))


def _requests(frame: pd.DataFrame, request_tokens: int) -> Iterator[dict[str, list[_Question]]]:
    """Cut rows, in their order, into requests of about `request_tokens` tokens for each model.

    Yields:
        Questions by model key, sorted by prefix: neighbours share their common one.
    """
    request: dict[str, list[_Question]] = {}
    tokens: Counter[str] = Counter()
    for row in frame.to_dict("records"):
        group = ScoringGroup(
            tuple(row["prefix_ids"].tolist()),
            tuple(tuple(ids.tolist()) for ids in row["completions_ids"]),
        )
        key = row["model_key"]
        question = _Question(key, row["prefix_hash"], row["completion_hashes"], group)
        if tokens[key] and tokens[key] + question.num_tokens > request_tokens:
            yield _sorted(request)
            request, tokens = {}, Counter()
        request.setdefault(key, []).append(question)
        tokens[key] += question.num_tokens
    if request:
        yield _sorted(request)


def _sorted(request: dict[str, list[_Question]]) -> dict[str, list[_Question]]:
    return {
        key: sorted(questions, key=lambda question: question.group.prefix_ids)
        for key, questions in request.items()
    }


def _rows(
    question: _Question, outcomes: Sequence[Outcome[TokenLogprobs]], version: str, run: RunSpec
) -> Iterator[dict[str, Any]]:
    for completion_hash, ids, outcome in zip(
        question.completion_hashes, question.group.completions_ids, outcomes, strict=True
    ):
        logprobs = outcome.value
        yield {
            "model_key": question.model_key,
            "prefix_hash": question.prefix_hash,
            "completion_hash": completion_hash,
            "logprob_sum": None if logprobs is None else float(logprobs.sum(dtype=np.float64)),
            "num_tokens": len(ids),
            "num_prefix_tokens": len(question.group.prefix_ids),
            "token_logprobs": logprobs if run.store_token_logprobs else None,
            "engine_version": version,
            "error": _error(outcome),
        }


def _error(outcome: Outcome[TokenLogprobs]) -> str | None:
    if outcome.error is None:
        return None
    reason = outcome.error.value
    return reason if outcome.detail is None else f"{reason}: {outcome.detail}"
