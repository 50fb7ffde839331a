"""Encode prompts into token ids on the workers: one row per prompt in, one row per prompt out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from cdr.encoding import Candidate, EncodingPlan, ids_hash
from cdr.judge_encoding import Encoder, make_encoder

ENCODED_DDL = (
    "prompt_id string, prompt_hash string, instruction_id string, exemplar_id string, "
    "exemplar_dropped boolean, "
    "views array<struct<model_key: string, condition: string, prefix_hash: binary, "
    "prefix_ids: array<int>, question: string, candidates: array<struct<completion_id: string, "
    "completion_hash: binary, ids: array<int>, boundary_merged: boolean, num_tokens: int>>>>, "
    "rejected array<struct<completion_id: string, reason: string, detail: string>>"
)
"""Schema of what `make_encode` yields."""

_CHUNK_ROWS = 64
_CHUNK_VIEWS = 1024

_CANDIDATE = pa.struct(
    [
        ("completion_id", pa.string()),
        ("completion_hash", pa.binary()),
        ("ids", pa.list_(pa.int32())),
        ("boundary_merged", pa.bool_()),
        ("num_tokens", pa.int32()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_hash", pa.string()),
        ("instruction_id", pa.string()),
        ("exemplar_id", pa.string()),
        ("exemplar_dropped", pa.bool_()),
        (
            "views",
            pa.list_(
                pa.struct(
                    [
                        ("model_key", pa.string()),
                        ("condition", pa.string()),
                        ("prefix_hash", pa.binary()),
                        ("prefix_ids", pa.list_(pa.int32())),
                        ("question", pa.string()),
                        ("candidates", pa.list_(_CANDIDATE)),
                    ]
                )
            ),
        ),
        (
            "rejected",
            pa.list_(
                pa.struct(
                    [
                        ("completion_id", pa.string()),
                        ("reason", pa.string()),
                        ("detail", pa.string()),
                    ]
                )
            ),
        ),
    ]
)


def make_encode(
    plan: EncodingPlan,
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make the function for `DataFrame.mapInArrow`.

    Args:
        plan: what decides the token ids.

    Returns:
        A function over batches with columns prompt_id, prompt_hash, prompt (messages), domain
        and candidates (array of completion_id, completion, finish_reason); it yields
        `ENCODED_DDL` rows in the same order.
    """

    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        encoder: Encoder | None = None
        for batch in batches:
            # Loaded with the first batch: an empty partition loads no tokenizer.
            encoder = encoder or make_encoder(plan)
            # A batch of Spark's may hold thousands of prompts; as Python objects they would take
            # many times the memory.
            for start in range(0, batch.num_rows, _CHUNK_ROWS):
                rows: list[dict[str, Any]] = []
                views = 0
                for row in batch.slice(start, _CHUNK_ROWS).to_pylist():
                    rows.append(_encode_row(encoder, row))
                    # A judge's prompt has a view for every two candidates.
                    views += len(rows[-1]["views"])
                    if views >= _CHUNK_VIEWS:
                        yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)
                        rows, views = [], 0
                if rows:
                    yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)

    return encode


def _encode_row(encoder: Encoder, row: dict[str, Any]) -> dict[str, Any]:
    encoded = encoder.encode(
        row["prompt"],
        row["prompt_hash"],
        row["domain"],
        [Candidate(**candidate) for candidate in row["candidates"]],
    )
    return {
        "prompt_id": row["prompt_id"],
        "prompt_hash": row["prompt_hash"],
        "instruction_id": encoded.instruction_id,
        "exemplar_id": encoded.exemplar_id,
        "exemplar_dropped": encoded.exemplar_dropped,
        "views": [
            {
                "model_key": view.model_key,
                "condition": view.condition,
                "prefix_hash": view.prefix_hash,
                "prefix_ids": view.prefix_ids,
                "question": view.question,
                "candidates": [
                    {
                        "completion_id": candidate.completion_id,
                        "completion_hash": ids_hash(candidate.ids),
                        "ids": candidate.ids,
                        "boundary_merged": candidate.boundary_merged,
                        "num_tokens": candidate.num_tokens,
                    }
                    for candidate in view.candidates
                ],
            }
            for view in encoded.views
        ],
        "rejected": [
            {"completion_id": identifier, "reason": reason.value, "detail": detail}
            for identifier, reason, detail in encoded.rejected
        ],
    }
