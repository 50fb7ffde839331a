"""Sample completions on the workers: ask this task's engine host, give a row per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from cdr.chat import ChatEncoder
from cdr.engines.base import Sample, SamplingRequest
from cdr.engines.wire import Outcome
from cdr.errors import RejectReason, RowRejected
from cdr.progress import TaskCounter
from cdr.sampling import SamplingPlan, sample_id, sample_seed
from udfs.engines import task_engines

_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("completion_id", pa.string()),
        ("completion", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("error", pa.string()),
    ]
)


def make_generate(
    plan: SamplingPlan, counter: TaskCounter
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make the function for `DataFrame.mapInArrow`.

    Args:
        plan: policy, texts and sampling parameters.
        counter: counts prompts, and tokens sampled.

    Returns:
        A function over batches with prompt_id, prompt_hash, prompt (messages) and numbers (of the
        samples to draw); it yields `cdr.sampling_stages.GENERATED_DDL` rows in that order, one
        per sample, or one per prompt that is refused.
    """

    def generate(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        first = next(batches, None)
        if first is None:
            return  # an empty partition loads no model
        encoder = plan.load_encoder()
        device = plan.config.run.device
        with (
            task_engines([plan.engine], device, counter) as (client, _),
            counter.task() as count,
        ):
            for batch in chain([first], batches):
                for part in _requests(batch.to_pylist(), encoder, plan):
                    asked = [draw.request for draw in part if draw.request is not None]
                    answers = iter(client.generate(plan.engine.name, asked))
                    rows = [
                        row
                        for draw in part
                        for row in draw.rows(encoder, None if draw.refusal else next(answers))
                    ]
                    tokens = sum(row.get("num_tokens", 0) for row in rows)
                    count.add(prompts=len(part), tokens=tokens)
                    yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)

    return generate


@dataclass(frozen=True)
class _Draw:
    """A prompt's question to the policy, or why it is not asked."""

    prompt_id: str
    numbers: Sequence[int]
    request: SamplingRequest | None
    refusal: RowRejected | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the engine may have to hold: each sample has its own copy of the prompt."""
        request = self.request
        if request is None:
            return 0
        return len(request.seeds) * (len(request.prefix_ids) + request.max_new_tokens)

    def rows(
        self, encoder: ChatEncoder, outcomes: Sequence[Outcome[Sample]] | None
    ) -> Iterator[dict[str, Any]]:
        if self.request is None or outcomes is None:
            assert self.refusal is not None
            reason, detail = self.refusal.reason.value, self.refusal.detail
            yield {"prompt_id": self.prompt_id, "reason": reason, "detail": detail}
            return
        for number, seed, outcome in zip(self.numbers, self.request.seeds, outcomes, strict=True):
            row: dict[str, Any] = {
                "prompt_id": self.prompt_id,
                "completion_id": sample_id(self.prompt_id, number),
                "seed": seed,
            }
            sample = outcome.value
            if sample is None:
                yield {**row, "error": _error(outcome)}
            else:
                yield {
                    **row,
                    "completion": encoder.decode(sample.token_ids),
                    "finish_reason": sample.finish_reason,
                    "num_tokens": len(sample.token_ids),
                }


def _requests(
    rows: Sequence[dict[str, Any]], encoder: ChatEncoder, plan: SamplingPlan
) -> Iterator[list[_Draw]]:
    """Cut rows, in their order, into requests of about `request_tokens` tokens."""
    part: list[_Draw] = []
    tokens = 0
    for row in rows:
        draw = _draw(row, encoder, plan)
        if part and tokens + draw.num_tokens > plan.config.run.request_tokens:
            yield part
            part, tokens = [], 0
        part.append(draw)
        tokens += draw.num_tokens
    if part:
        yield part


def _draw(row: dict[str, Any], encoder: ChatEncoder, plan: SamplingPlan) -> _Draw:
    sampling = plan.config.sampling
    prompt_id, numbers = row["prompt_id"], row["numbers"]
    try:
        prefix_ids = encoder.encode_prefix(row["prompt"])
        longest = plan.tokenizer.max_length - sampling.max_new_tokens
        if len(prefix_ids) > longest:
            raise RowRejected(
                RejectReason.TOO_LONG,
                f"{len(prefix_ids)} tokens, and the policy takes {longest} before a completion",
            )
    except RowRejected as refusal:
        return _Draw(prompt_id, numbers, None, refusal)
    request = SamplingRequest(
        prefix_ids=prefix_ids,
        seeds=tuple(sample_seed(sampling.seed, row["prompt_hash"], n) for n in numbers),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        # A control token in the text would forge a turn: whatever it is, the text ends there.
        stop_ids=tuple(dict.fromkeys((*encoder.stop_ids, *encoder.control_tokens.values()))),
    )
    return _Draw(prompt_id, numbers, request)


def _error(outcome: Outcome[Sample]) -> str:
    assert outcome.error is not None
    reason = outcome.error.value
    return reason if outcome.detail is None else f"{reason}: {outcome.detail}"
