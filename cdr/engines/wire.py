"""Messages between engine clients and the engine host: a JSON head and a table of token ids.

A message is one Arrow IPC stream: the head sits in the schema's metadata, the table follows as
record batches. Nothing is pickled, so a peer can send wrong data but never code. Known limit: one
message holds less than 2^31 tokens.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdr.engines.base import Sample, SamplingRequest, ScoringGroup, TokenLogprobs
from cdr.errors import FailReason

Group = TypeVar("Group", ScoringGroup, SamplingRequest)
Value = TypeVar("Value")
Head = dict[str, Any]
Payload = tuple[Head, pa.Table]

_HEAD = b"head"


@dataclass(frozen=True, eq=False)
class Outcome(Generic[Value]):
    """What came of one completion: its value, or why there is none this time.

    Args:
        value: token log-probs or sample; None exactly when `error` is set.
        error: the enumerated reason; None when the completion is ok.
        detail: more about the error, never token ids or text; None when there is no more to say.
    """

    value: Value | None
    error: FailReason | None = None
    detail: str | None = None


_ITEMS = {ScoringGroup: "completions_ids", SamplingRequest: "seeds"}


def num_items(group: Group) -> int:
    """Count what a group asks for: completions to score, or samples to draw."""
    return len(getattr(group, _ITEMS[type(group)]))


def part(group: Group, start: int, stop: int) -> Group:
    """Give the group with only its items `start` to `stop` (exclusive)."""
    name = _ITEMS[type(group)]
    items: dict[str, Any] = {name: getattr(group, name)[start:stop]}
    return replace(group, **items)


def send(connection: socket.socket, head: Head, payload: Payload | None = None) -> None:
    """Send one message.

    Args:
        connection: where to.
        head: anything that JSON can say.
        payload: encoded groups, requests, scores or samples.

    Raises:
        ConnectionError: the peer is gone.
    """
    payload_head, table = payload or ({}, _table())
    schema = table.schema.with_metadata({_HEAD: json.dumps(head | payload_head)})
    # Encoded in full before the first byte leaves: an error here cannot leave half a message.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    connection.sendall(sink.getvalue())


def receive(stream: BinaryIO) -> Payload:
    """Read one message, waiting for it; what was sent is in its head and its table.

    Raises:
        ConnectionError: the peer is gone, before the message or in the middle of it.
        TimeoutError: the connection has a timeout and it passed.
    """
    try:
        table = pa.ipc.open_stream(stream).read_all()
    except TimeoutError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ConnectionError("the peer closed the connection") from error
    return json.loads(table.schema.metadata[_HEAD]), table


def encode_groups(groups: Sequence[ScoringGroup]) -> Payload:
    """Lay groups out as `prefix_ids: list<int32>, completions_ids: list<list<int32>>`."""
    completions = _ragged([ids for group in groups for ids in group.completions_ids], np.int32)
    bounds = _array(_bounds(map(num_items, groups)))
    return {}, _table(
        prefix_ids=_ragged([group.prefix_ids for group in groups], np.int32),
        completions_ids=pa.ListArray.from_arrays(bounds, completions),
    )


def decode_groups(payload: Payload) -> list[ScoringGroup]:
    """Undo `encode_groups`."""
    _, table = payload
    nested = table["completions_ids"].combine_chunks()
    completions = _tuples(nested.values)
    bounds = np.from_dlpack(nested.offsets).tolist()
    return [
        ScoringGroup(prefix_ids, tuple(completions[start:stop]))
        for prefix_ids, (start, stop) in zip(
            _tuples(table["prefix_ids"]), pairwise(bounds), strict=True
        )
    ]


def encode_requests(requests: Sequence[SamplingRequest]) -> Payload:
    """Lay sampling requests out: ids and seeds in columns, the settings in the head."""
    settings = [[r.max_new_tokens, r.temperature, r.top_p] for r in requests]
    return {"settings": settings}, _table(
        prefix_ids=_ragged([request.prefix_ids for request in requests], np.int32),
        seeds=_ragged([request.seeds for request in requests], np.int64),
        stop_ids=_ragged([request.stop_ids for request in requests], np.int32),
    )


def decode_requests(payload: Payload) -> list[SamplingRequest]:
    """Undo `encode_requests`."""
    head, table = payload
    columns = (_tuples(table[name]) for name in ("prefix_ids", "seeds", "stop_ids"))
    return [
        SamplingRequest(prefix_ids, seeds, max_new_tokens, temperature, top_p, stop_ids)
        for (max_new_tokens, temperature, top_p), prefix_ids, seeds, stop_ids in zip(
            head["settings"], *columns, strict=True
        )
    ]


def encode_scores(outcomes: Sequence[Sequence[Outcome[TokenLogprobs]]]) -> Payload:
    """Lay scores out flat, one row of `logprobs: list<float>` per completion."""
    flat = [outcome for group in outcomes for outcome in group]
    rows = [() if outcome.value is None else outcome.value for outcome in flat]
    return _failures(flat), _table(logprobs=_ragged(rows, np.float32))


def decode_scores(
    payload: Payload, groups: Sequence[ScoringGroup]
) -> list[list[Outcome[TokenLogprobs]]]:
    """Undo `encode_scores`; `groups` are those that were asked for."""
    head, table = payload
    return _regroup(head, _rows(table["logprobs"]), groups)


def encode_samples(outcomes: Sequence[Sequence[Outcome[Sample]]]) -> Payload:
    """Lay samples out flat, one row of `token_ids: list<int32>` per sample."""
    flat = [outcome for group in outcomes for outcome in group]
    values = [outcome.value or Sample((), "") for outcome in flat]
    head = _failures(flat) | {"finish_reasons": [value.finish_reason for value in values]}
    return head, _table(token_ids=_ragged([value.token_ids for value in values], np.int32))


def decode_samples(
    payload: Payload, requests: Sequence[SamplingRequest]
) -> list[list[Outcome[Sample]]]:
    """Undo `encode_samples`; `requests` are those that were asked for."""
    head, table = payload
    rows = zip(_tuples(table["token_ids"]), head["finish_reasons"], strict=True)
    return _regroup(head, [Sample(*row) for row in rows], requests)


def _failures(flat: Sequence[Outcome[Any]]) -> Head:
    return {"failures": [[i, o.error, o.detail] for i, o in enumerate(flat) if o.error]}


def _regroup(
    head: Head, values: Sequence[Value], groups: Sequence[Group]
) -> list[list[Outcome[Value]]]:
    flat = [Outcome(value) for value in values]
    for i, error, detail in head["failures"]:
        flat[i] = Outcome(None, FailReason(error), detail)
    bounds = _bounds(map(num_items, groups)).tolist()
    return [flat[start:stop] for start, stop in pairwise(bounds)]


# Arrays cross between numpy and Arrow by their buffers: a batch has up to a million ids, and the
# handier `pa.array` and `to_numpy` import pandas, which is most of a small host's start.


def _table(**columns: pa.Array) -> pa.Table:
    return pa.Table.from_arrays(list(columns.values()), names=list(columns))


def _array(values: npt.NDArray[Any]) -> pa.Array:
    dtype = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(dtype, len(values), [None, pa.py_buffer(values)])


def _bounds(lengths: Iterable[int]) -> npt.NDArray[np.int32]:
    return np.cumsum([0, *lengths], dtype=np.int32)


def _ragged(rows: Sequence[Any], dtype: type[np.generic]) -> pa.ListArray:
    values = np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)])
    return pa.ListArray.from_arrays(_array(_bounds(map(len, rows))), _array(values))


def _rows(ragged: pa.ListArray | pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    if isinstance(ragged, pa.ChunkedArray):
        ragged = ragged.combine_chunks()
    values = np.from_dlpack(ragged.values)
    return [values[i:j] for i, j in pairwise(np.from_dlpack(ragged.offsets).tolist())]


def _tuples(ragged: pa.ListArray | pa.ChunkedArray) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in _rows(ragged)]
