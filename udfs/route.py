"""Route prompts on the workers: score the domain labels, give a row per prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cdr.chat import ChatEncoder, Message
from cdr.config import RunSpec
from cdr.engines.base import ScoringGroup
from cdr.errors import EngineError, RowRejected
from cdr.plan import RoutePlan
from cdr.progress import TaskCounter
from cdr.router import content_free_messages, decide_domain, router_messages
from udfs.engines import task_engines


def make_route(
    plan: RoutePlan, run: RunSpec, counter: TaskCounter
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Make the function for `DataFrame.mapInPandas`.

    Args:
        plan: router model, texts and threshold.
        run: `request_tokens` bounds a request.
        counter: counts prompts, and tells the driver where the router was loaded.

    Returns:
        A function over frames with prompt_hash and prompt; it yields `cdr.routing.ROUTED_DDL`
        rows, one per prompt in order. A prompt the router cannot read (too long, or refused by its
        template) gets the fallback domain, marked as such.
    """

    def route(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        first = next(frames, None)
        if first is None:
            return  # an empty partition loads no model
        encoder = ChatEncoder.load(
            plan.tokenizer.path,
            plan.tokenizer.revision,
            template=plan.tokenizer.template,
            # A prompt that quotes a special token is still a prompt to classify.
            special_tokens_in_text="as_text",
            score_end_of_turn=False,
        )
        labels = tuple(
            encoder.encode_completion(plan.pack.domains[name].router_label, None).ids
            for name in plan.domains
        )
        with task_engines([plan.engine], counter) as (client, _), counter.task() as count:

            def label_logprobs(prefixes: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
                groups = [ScoringGroup(prefix, labels) for prefix in prefixes]
                return [
                    dict(zip(plan.domains, outcomes, strict=True))
                    for outcomes in client.score(plan.engine.name, groups)
                ]

            prior = None
            if plan.calibrate:
                messages = content_free_messages(plan.pack, plan.domains)
                prior = _sums(label_logprobs([encoder.encode_prefix(messages)])[0])
                if any(math.isnan(value) for value in prior.values()):
                    raise EngineError("the router cannot score its labels after an empty prompt")
            counts = {name: len(ids) for name, ids in zip(plan.domains, labels, strict=True)}
            longest = plan.tokenizer.max_length - max(counts.values())

            def decide(frame: pd.DataFrame) -> pd.DataFrame:
                prefixes = [_prefix(encoder, plan, prompt) for prompt in frame["prompt"]]
                readable = [i for i, p in enumerate(prefixes) if p and len(p) <= longest]
                # Sorted for the prefix tree; answers go back to their places.
                readable.sort(key=lambda i: prefixes[i] or ())
                by_row: dict[int, dict[str, Any]] = {}
                for request in _requests(readable, prefixes, run.request_tokens):
                    asked = [prefixes[i] or () for i in request]
                    by_row.update(zip(request, label_logprobs(asked), strict=True))
                    count.add(prompts=len(request), tokens=sum(map(len, asked)))
                return pd.DataFrame(
                    [
                        {
                            "prompt_hash": prompt_hash,
                            **_decision(plan, by_row.get(i), counts, prior),
                        }
                        for i, prompt_hash in enumerate(frame["prompt_hash"])
                    ]
                )

            yield decide(first)
            for frame in frames:
                yield decide(frame)

    return route


def _requests(
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


def _prefix(encoder: ChatEncoder, plan: RoutePlan, prompt: Sequence[Any]) -> tuple[int, ...] | None:
    messages = [Message(role=turn["role"], content=turn["content"]) for turn in prompt]
    try:
        return encoder.encode_prefix(router_messages(messages, plan.pack, plan.domains))
    except RowRejected:
        return None


def _sums(answer: dict[str, Any]) -> dict[str, float]:
    return {
        name: math.nan if outcome.value is None else float(np.sum(outcome.value, dtype=np.float64))
        for name, outcome in answer.items()
    }


def _decision(
    plan: RoutePlan,
    answer: dict[str, Any] | None,
    counts: dict[str, int],
    prior: dict[str, float] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "domain": plan.fallback,
        "confidence": None,
        "label_logprobs": None,
        "domain_source": "fallback",
        "error": None,
    }
    if answer is None:
        return row
    failed = [outcome.error for outcome in answer.values() if outcome.error is not None]
    if failed:
        return {**row, "domain": None, "domain_source": None, "error": f"router: {failed[0].value}"}
    sums = _sums(answer)
    decision = decide_domain(
        sums,
        threshold=plan.threshold,
        fallback=plan.fallback,
        num_tokens=counts,
        prior_logprobs=prior,
    )
    return {
        **row,
        "domain": decision.domain,
        "confidence": decision.confidence,
        "label_logprobs": sums,
        "domain_source": decision.source,
    }
