"""Rows of prompts and completions as the input stage of a run reads them, without Spark.

`cdr.inputs` has the same rules as columns. Here they are for the rows that a registered reward is
given: the same text is refused for the same reason, and a prompt has the same hash, by which it
draws the same instruction and exemplar.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdr.chat import Message
from cdr.errors import RejectReason, RowRejected

PromptName = tuple[str, str | None]
"""Hash of a prompt, and the domain given with it: what tells prompts apart."""

ROLES = ("system", "user", "assistant")
# As in Java, where only ASCII's blanks are blank.
_VISIBLE = re.compile(r"\S", re.ASCII)


@dataclass(frozen=True)
class CandidateRow:
    """A prompt and one completion that can be scored.

    Args:
        messages: the prompt.
        completion: the text.
        finish_reason: `length` where it was cut; anything else, or None, where it ended by itself.
        domain: the domain given with it; None where none is read.
    """

    messages: tuple[Message, ...]
    completion: str
    finish_reason: str | None
    domain: str | None

    @property
    def prompt_name(self) -> PromptName:
        """What tells its prompt from others."""
        return hash_messages(self.messages), self.domain


def read_row(row: Mapping[str, Any], domains: Sequence[str] | None) -> CandidateRow:
    """Check a row and take it over.

    Args:
        row: `prompt` (text, or a sequence of turns with role and content), `completion`, and
            where they are known `finish_reason` and `domain`. None, NaN and NA are nulls.
        domains: what `domain` must be one of; None where it is not read.

    Raises:
        RowRejected: for the first rule that the row breaks, in the order of `cdr.inputs`.
    """
    messages = _read_messages(row["prompt"])
    completion = row["completion"]
    if _is_null(completion):
        raise RowRejected(RejectReason.NULL_COMPLETION, "the completion is null")
    if not isinstance(completion, str):
        raise RowRejected(
            RejectReason.NULL_COMPLETION,
            f"the completion must be text, got {type(completion).__name__}",
        )
    if not _VISIBLE.search(completion):
        raise RowRejected(RejectReason.EMPTY_COMPLETION, "the completion is empty")
    domain = None
    if domains is not None:
        domain = _optional(row, "domain")
        if domain not in domains:
            known = f"the domain must be one of {', '.join(domains)}"
            raise RowRejected(RejectReason.UNKNOWN_DOMAIN, known)
    finish_reason = _optional(row, "finish_reason")
    return CandidateRow(
        messages=messages,
        completion=completion,
        finish_reason=None if finish_reason is None else str(finish_reason),
        domain=domain,
    )


def count_candidates(
    rows: Iterable[Mapping[str, Any]], domains: Sequence[str] | None
) -> dict[PromptName, tuple[int, set[int | None]]]:
    """Count the rows of each prompt, those with a completion that is refused among them.

    Args:
        rows: as for `read_row`; `num_candidates` says how many rows the prompt has in all.
        domains: as for `read_row`.

    Returns:
        Per prompt, how many rows there are and what they say; None where one says nothing. Rows
        whose prompt is refused belong to none.
    """
    found: dict[PromptName, tuple[int, set[int | None]]] = {}
    for row in rows:
        try:
            messages = _read_messages(row["prompt"])
        except RowRejected:
            continue
        domain = None if domains is None else _optional(row, "domain")
        count, said = found.get(name := (hash_messages(messages), domain), (0, set()))
        given = row["num_candidates"]
        found[name] = (count + 1, said | {None if _is_null(given) else int(given)})
    return found


def hash_messages(messages: Sequence[Message]) -> str:
    """Hash a prompt as `cdr.inputs.prompt_hash` does: sha256 hex over `role:characters:content`."""
    text = "".join(f"{m['role']}:{len(m['content'])}:{m['content']}" for m in messages)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_messages(prompt: object) -> tuple[Message, ...]:
    if _is_null(prompt):
        raise RowRejected(RejectReason.NULL_PROMPT, "the prompt is null")
    if isinstance(prompt, str):
        messages: tuple[Message, ...] = ({"role": "user", "content": prompt},)
    else:
        messages = _read_turns(prompt)
    if not messages:
        raise RowRejected(RejectReason.EMPTY_PROMPT, "the prompt has no messages")
    if any(message["role"] not in ROLES for message in messages):
        raise RowRejected(RejectReason.BAD_MESSAGES, f"roles must be among {', '.join(ROLES)}")
    if any(not isinstance(message["content"], str) for message in messages):
        raise RowRejected(RejectReason.BAD_MESSAGES, "a message has no content")
    if messages[-1]["role"] != "user":
        raise RowRejected(RejectReason.BAD_MESSAGES, "the last message must be the user's")
    if not _VISIBLE.search(messages[-1]["content"]):
        raise RowRejected(RejectReason.EMPTY_PROMPT, "the last message is empty")
    return messages


def _read_turns(prompt: Any) -> tuple[Message, ...]:
    """Read turns: dicts, or the rows that Arrow and Spark make of structs."""
    try:
        return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)
    except (TypeError, KeyError, ValueError, IndexError):
        raise RowRejected(
            RejectReason.BAD_MESSAGES,
            "the prompt must be text, or a list of turns with role and content, "
            f"got {type(prompt).__name__}",
        ) from None


def _optional(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    return None if _is_null(value) else value


def _is_null(value: object) -> bool:
    if value is None or type(value).__name__ == "NAType":  # of pandas, which is not needed here
        return True
    return isinstance(value, float) and math.isnan(value)
