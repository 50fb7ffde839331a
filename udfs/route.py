"""Route prompts on the workers: score the domain labels, give a row per prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from cdr.config import RunSpec
from cdr.plan import RoutePlan
from cdr.progress import TaskCounter
from cdr.prompt_router import PromptRouter
from udfs.engines import task_engines


def make_route(
    plan: RoutePlan, run: RunSpec, counter: TaskCounter
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Make the function for `DataFrame.mapInPandas`.

    Args:
        plan: router model, texts and threshold.
        run: `device` the router runs on; `request_tokens` bounds a request.
        counter: counts prompts, and tells the driver where the router was loaded.

    Returns:
        A function over frames with prompt_hash and prompt; it yields `cdr.routing.ROUTED_DDL`
        rows, one per prompt in order (`PromptRouter.route`).
    """

    def route(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        first = next(frames, None)
        if first is None:
            return  # an empty partition loads no model
        router = PromptRouter(plan)
        with (
            task_engines([plan.engine], run.device, counter) as (client, _),
            counter.task() as count,
        ):

            def decide(frame: pd.DataFrame) -> pd.DataFrame:
                routes = router.route(
                    list(frame["prompt"]),
                    lambda groups: client.score(plan.engine.name, groups),
                    run.request_tokens,
                    lambda prompts, tokens: count.add(prompts=prompts, tokens=tokens),
                )
                return pd.DataFrame(
                    [
                        {
                            "prompt_hash": prompt_hash,
                            "domain": found.domain,
                            "confidence": found.confidence,
                            "label_logprobs": found.label_logprobs,
                            "domain_source": found.source,
                            "error": found.error,
                        }
                        for prompt_hash, found in zip(frame["prompt_hash"], routes, strict=True)
                    ]
                )

            yield decide(first)
            for frame in frames:
                yield decide(frame)

    return route
