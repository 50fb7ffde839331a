"""Messages and completions to token ids: tokenised once, here, with one rule for the boundary.

    prefix_ids      the prompt's messages rendered by the chat template, generation header included
    completion ids  the completion *in context*: what follows the header's ids in the joint encoding

A prompt's prefix ids are the same for all its completions, and `prefix_ids + ids` is the encoding
of the full text wherever the tokenizer leaves the boundary alone; `boundary_merged` marks the rest.
Nothing is truncated here. Text cannot forge a turn. Why the proof on the header's tail suffices is
in `docs/explanation/chat-encoding.md`. No torch, no Spark.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from jinja2 import TemplateError
from tokenizers import Tokenizer

from cdr.errors import ConfigError, ModelError, RejectReason, RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
    {%- if message['role'] == 'user' -%}{{ 'User: ' + message['content'] }}
    {%- elif message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] }}
    {%- elif loop.first -%}{{ message['content'] }}
    {%- else -%}{{ raise_exception('a system message can only come first') }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:' }}{%- endif -%}
"""
"""Template `plain`, for models without one. It needs no special token, so every base model reads it.
The header ends at the colon: tokenizers join a space to the word after it, so the space that every
completion begins with is the completion's."""

FROZEN_DATE = "26 Jul 2024"
"""What templates that print today's date get (Llama 3's own default): ids must not change by day."""

_ROLES = ("system", "user", "assistant")
_MARKER = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[/?[A-Z_]+\]")
_ANCHORS = ("\n", "a", ".")


class Message(TypedDict):
    """One turn; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class EncodedCompletion:
    """A completion's token ids, at least one.

    Args:
        ids: ids that follow the prefix ids, end-of-turn token included when it is scored.
        boundary_merged: the tokenizer would have merged text across the boundary; `ids` are then
            the completion encoded apart, which decodes to the same text after the same prefix.
    """

    ids: tuple[int, ...]
    boundary_merged: bool


class ChatEncoder:
    """Encode prompts and completions for one model.

    Ids are a pure function of tokenizer, template, options and text. The encoder takes the
    tokenizer over: truncation and padding are switched off in it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: `own` (the tokenizer's), `plain`, or Jinja text.
        special_tokens_in_text: what happens to content that holds a control token's string:
            `reject` the row, or encode the string `as_text`.
        score_end_of_turn: append the end-of-turn token to completions that ended by themselves.

    Raises:
        ConfigError: the template is missing, does not compile, or cannot be encoded by this rule.
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        *,
        special_tokens_in_text: Literal["reject", "as_text"] = "reject",
        score_end_of_turn: bool = True,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"tokenizer must be a fast one, got {type(tokenizer).__name__}",
                fix="save it with a tokenizer.json beside the model",
            )
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer.json may carry a truncation length; it would cut prompts in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._rejects = special_tokens_in_text == "reject"
        self.chat_template_text = _template_text(tokenizer, template)
        self.is_own_template = template == "own"
        self.bos_id: int | None = tokenizer.bos_token_id
        # Decided by what the tokenizer does: its options and its post-processor may disagree.
        self._adds_bos = self.bos_id in self._backend.encode("").ids
        # Stands for content in probes, and marks placeholders; text cannot hold it by design.
        self._nonce = f"x{secrets.token_hex(12)}x"
        try:
            self._read_template()
        except RowRejected as rejected:
            raise ConfigError([f"template: cannot render a question: {rejected.detail}"]) from None
        if score_end_of_turn and self.end_of_turn_id is None:
            raise ConfigError(
                ["score_end_of_turn: needs an end-of-turn token; template and tokenizer have none"],
                fix="set score_end_of_turn: false",
            )
        self._scored_end = (self.end_of_turn_id,) if score_end_of_turn else ()
