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


def send(connection: socket.socket, head: Head, table: pa.Table | None = None) -> None:
    """Send one message.

    Raises:
        ConnectionError: the peer is gone.
    """
    table = pa.table({}) if table is None else table
    schema = table.schema.with_metadata({_HEAD: json.dumps(head)})
    # Encoded in full before the first byte leaves: an error here cannot leave half a message.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    connection.sendall(sink.getvalue())


def receive(stream: BinaryIO) -> tuple[Head, pa.Table]:
    """Read one message, waiting for it.

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


def encode_groups(groups: Sequence[ScoringGroup]) -> pa.Table:
    """Lay groups out as `prefix_ids: list<int32>, completions_ids: list<list<int32>>`."""
    completions = [ids for group in groups for ids in group.completions_ids]
    return pa.table(
        {
            "prefix_ids": _ragged([group.prefix_ids for group in groups], np.int32),
            "completions_ids": pa.ListArray.from_arrays(
                _offsets(len(group.completions_ids) for group in groups),
                _ragged(completions, np.int32),
            ),
        }
    )


def decode_groups(table: pa.Table) -> list[ScoringGroup]:
    """Undo `encode_groups`."""
    prefixes, nested = _column(table, "prefix_ids"), _column(table, "completions_ids")
    completions = [tuple(ids.tolist()) for ids in _rows(nested.values)]
    return [
        ScoringGroup(tuple(prefix.tolist()), tuple(completions[start:stop]))
        for prefix, (start, stop) in zip(
            _rows(prefixes), pairwise(nested.offsets.to_pylist()), strict=True
        )
    ]


def encode_requests(requests: Sequence[SamplingRequest]) -> pa.Table:
    """Lay sampling requests out, one column per field."""
    return pa.table(
        {
            "prefix_ids": _ragged([request.prefix_ids for request in requests], np.int32),
            "seeds": _ragged([request.seeds for request in requests], np.int64),
            "max_new_tokens": [request.max_new_tokens for request in requests],
            "temperature": [float(request.temperature) for request in requests],
            "top_p": [float(request.top_p) for request in requests],
            "stop_ids": _ragged([request.stop_ids for request in requests], np.int32),
        }
    )


def decode_requests(table: pa.Table) -> list[SamplingRequest]:
    """Undo `encode_requests`."""
    return [_request(row) for row in table.to_pylist()]


def _request(fields: dict[str, Any]) -> SamplingRequest:
    ids = {name: tuple(v) for name, v in fields.items() if isinstance(v, list)}
    return SamplingRequest(**(fields | ids))


def encode_scores(outcomes: Sequence[Sequence[Outcome[TokenLogprobs]]]) -> pa.Table:
    """Lay scores out flat, one row per completion: `logprobs: list<float>, error, detail`."""
    flat = [outcome for group in outcomes for outcome in group]
    empty = np.empty(0, np.float32)
    values = [empty if outcome.value is None else outcome.value for outcome in flat]
    return pa.table({"logprobs": _ragged(values, np.float32), **_failures(flat)})


def decode_scores(
    table: pa.Table, groups: Sequence[ScoringGroup]
) -> list[list[Outcome[TokenLogprobs]]]:
    """Undo `encode_scores`; `groups` are those that were asked for."""
    flat = [
        Outcome[TokenLogprobs](None, FailReason(error), detail) if error else Outcome(logprobs)
        for logprobs, error, detail in zip(
            _rows(_column(table, "logprobs")), *_failure_columns(table), strict=True
        )
    ]
    return _regroup(flat, groups)


def encode_samples(outcomes: Sequence[Sequence[Outcome[Sample]]]) -> pa.Table:
    """Lay samples out flat: `token_ids: list<int32>, finish_reason, error, detail`."""
    flat = [outcome for group in outcomes for outcome in group]
    values = [outcome.value for outcome in flat]
    return pa.table(
        {
            "token_ids": _ragged([() if v is None else v.token_ids for v in values], np.int32),
            "finish_reason": pa.array([v and v.finish_reason for v in values], pa.string()),
            **_failures(flat),
        }
    )


def decode_samples(
    table: pa.Table, requests: Sequence[SamplingRequest]
) -> list[list[Outcome[Sample]]]:
    """Undo `encode_samples`; `requests` are those that were asked for."""
    flat = [
        Outcome[Sample](None, FailReason(error), detail)
        if error
        else Outcome(Sample(tuple(ids.tolist()), finish_reason))
        for ids, finish_reason, error, detail in zip(
            _rows(_column(table, "token_ids")),
            table["finish_reason"].to_pylist(),
            *_failure_columns(table),
            strict=True,
        )
    ]
    return _regroup(flat, requests)


def _failures(outcomes: Sequence[Outcome[Any]]) -> dict[str, pa.Array]:
    return {
        "error": pa.array([outcome.error for outcome in outcomes], pa.string()),
        "detail": pa.array([outcome.detail for outcome in outcomes], pa.string()),
    }


def _failure_columns(table: pa.Table) -> tuple[list[str | None], list[str | None]]:
    return table["error"].to_pylist(), table["detail"].to_pylist()


def _regroup(flat: list[Value], groups: Sequence[Group]) -> list[list[Value]]:
    bounds = _offsets(num_items(group) for group in groups).tolist()
    return [flat[start:stop] for start, stop in pairwise(bounds)]


def _offsets(lengths: Iterable[int]) -> npt.NDArray[np.int32]:
    return np.cumsum([0, *lengths], dtype=np.int32)


def _ragged(rows: Sequence[Any], dtype: type[np.generic]) -> pa.ListArray:
    # Through numpy, not pa.array(rows): a batch has up to a million ids, and this is 5x faster.
    values = np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)])
    return pa.ListArray.from_arrays(_offsets(map(len, rows)), values)


def _column(table: pa.Table, name: str) -> pa.ListArray:
    return table[name].combine_chunks()


def _rows(ragged: pa.ListArray) -> list[npt.NDArray[Any]]:
    values = ragged.values.to_numpy()
    return [values[start:stop] for start, stop in pairwise(ragged.offsets.to_pylist())]
