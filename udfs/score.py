"""Score completions on the workers: ask this task's engine host, give a row per completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from cdr.config import RunSpec
from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs
from cdr.engines.wire import Outcome
from cdr.progress import TaskCounter
from cdr.questions import Question, cut_requests, describe_error, sum_logprobs
from udfs.engines import task_engines


def make_score(
    specs: tuple[EngineSpec, ...], run: RunSpec, counter: TaskCounter, counted: str
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Make the function for `DataFrame.mapInPandas`.

    Args:
        specs: the models of the wave; rows name them by `model_key`.
        run: `device` they run on; `request_tokens` bounds what one request asks of one model;
            `store_token_logprobs` keeps every token's value.
        counter: counts tokens of all models, and prompts of one.
        counted: model key whose prompts are counted.

    Returns:
        A function over frames with model_key, prefix_hash, prefix_ids, completion_hashes and
        completions_ids, in an order that keeps prompts with a common prefix together and asks all
        models of a prompt in turn, so that a request keeps all of them busy. It yields
        `cdr.scoring.SCORED_DDL` rows, one per completion, failed ones with their error.
    """
    # Their one number is of the whole completion.
    classifiers = {spec.name for spec in specs if spec.engine == "classifier"}

    def score(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        first = next(frames, None)
        if first is None:
            return  # an empty partition loads no model
        with (
            task_engines(specs, run.device, counter) as (client, versions),
            counter.task() as count,
        ):
            for frame in _with_first(first, frames):
                for request in cut_requests(_questions(frame), run.request_tokens):
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
                            for row in _rows(
                                question,
                                outcomes,
                                versions[key],
                                keeps_tokens=run.store_token_logprobs and key not in classifiers,
                            )
                        ]
                    )

    return score


def _with_first(first: pd.DataFrame, rest: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    yield first
    yield from rest


def _questions(frame: pd.DataFrame) -> Iterator[Question]:
    for row in frame.to_dict("records"):
        group = ScoringGroup(
            tuple(row["prefix_ids"].tolist()),
            tuple(tuple(ids.tolist()) for ids in row["completions_ids"]),
        )
        yield Question(row["model_key"], row["prefix_hash"], row["completion_hashes"], group)


def _rows(
    question: Question,
    outcomes: Sequence[Outcome[TokenLogprobs]],
    version: str,
    *,
    keeps_tokens: bool,
) -> Iterator[dict[str, Any]]:
    for completion_hash, ids, outcome in zip(
        question.completion_hashes, question.group.completions_ids, outcomes, strict=True
    ):
        logprobs = outcome.value
        yield {
            "model_key": question.model_key,
            "prefix_hash": question.prefix_hash,
            "completion_hash": completion_hash,
            "logprob_sum": None if logprobs is None else sum_logprobs(logprobs),
            "num_tokens": len(ids),
            "num_prefix_tokens": len(question.group.prefix_ids),
            "token_logprobs": logprobs if keeps_tokens else None,
            "engine_version": version,
            "error": describe_error(outcome),
        }
