"""Ask a judge behind an API on the workers: a row per question, answered or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pandas as pd

from cdr.api_judge import ApiJudge, Verdict
from cdr.engines.base import EngineSpec
from cdr.errors import ModelError
from cdr.progress import TaskCounter
from cdr.reward_config import ApiSpec


def make_ask(
    engine: EngineSpec, api: ApiSpec, tasks: int, counter: TaskCounter
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Make the function for `DataFrame.mapInPandas`.

    Args:
        engine: the judge; `path` is the endpoint's name of it.
        api: endpoint and limits, over all tasks.
        tasks: tasks that share the limits.
        counter: counts questions and their tokens, roughly.

    Returns:
        A function over frames with model_key, prefix_hash, question and prefix_tokens; it yields
        `cdr.verdicts.ASKED_DDL` rows, one per question, in order.
    """

    def ask(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        extra = json.loads(engine.extra)
        with counter.task() as count, ApiJudge(engine.path, api, tasks, extra) as judge:
            for frame in frames:
                if frame.empty:
                    continue
                asked = frame.to_dict("records")
                questions = [row["question"] for row in asked]
                verdicts: list[Verdict] = []
                ends_run = None
                try:
                    for row, found in zip(asked, judge.ask(questions), strict=True):
                        count.add(prompts=1, tokens=int(row["prefix_tokens"]))
                        verdicts.append(found)
                except ModelError as error:
                    # The driver's to raise: raised here, it would cost the answers before it.
                    ends_run = error.what
                rows = [
                    {
                        "model_key": row["model_key"],
                        "prefix_hash": row["prefix_hash"],
                        "verdict": found.verdict,
                        "reason": found.reason and found.reason.value,
                        "prompt_tokens": found.prompt_tokens,
                        "answer_tokens": found.answer_tokens,
                        "cost_usd": found.cost_usd(api),
                        "answered_by": found.answered_by,
                        "error": found.error and found.error.value,
                        "ends_run": ends_run,
                    }
                    for row, found in zip(asked, verdicts, strict=True)
                ]
                yield pd.DataFrame(rows).convert_dtypes()

    return ask
