"""Messages and completions to token ids: tokenised once, here, with one rule for the boundary.

    prefix ids      the prompt's messages rendered by the chat template, generation header included
    completion ids  the completion *in context*: what follows the header's ids in the joint encoding

A prompt's prefix ids are the same for all its completions, and prefix ids + completion ids are the
encoding of the full text wherever the tokenizer leaves the boundary alone; `boundary_merged` marks
the rest. Nothing is truncated, and content cannot forge a turn. Why looking at the header's tail
is enough: `docs/decisions/0004-token-boundary.md`. No torch, no Spark.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cdr.control_tokens import ControlTokens
from cdr.errors import ConfigError, ModelError, RejectReason, RowRejected
from cdr.weights import fetch_small_files

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
"""Template `plain`, for models without one: headings that any base model has read, no special
token. The header ends at the colon because tokenizers join a space to the word that follows."""

FROZEN_DATE = datetime.date(2024, 7, 26)
"""Today, for templates that print the date (Llama 3's own default): ids must not change by day."""

_ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class EncodedCompletion:
    """A completion's token ids, at least one.

    Args:
        ids: what follows the prefix ids, the end-of-turn token included where it is scored.
        boundary_merged: the joint encoding has a token across the boundary, so `ids` are the
            completion encoded apart; behind the prefix they decode to the same text.
    """

    ids: tuple[int, ...]
    boundary_merged: bool


class ChatEncoder:
    """Encode prompts and completions for one model.

    Ids are a pure function of tokenizer, template, options and text. The encoder takes the
    tokenizer over: truncation and padding are switched off in it.

    Args:
        tokenizer: a fast tokenizer of transformers; encoders may share one.
        template: `own` (the tokenizer's), `plain`, or Jinja text.
        special_tokens_in_text: `reject` a row whose content holds the string of a control token
            or of the template's turn marker, or encode it `as_text`, without a special id.
        score_end_of_turn: append the end-of-turn token to completions that ended by themselves.
        close_turns: append all that the template puts behind an answer, to every completion: what
            a classifier reads.

    Attributes:
        chat_template_text: the Jinja text in use.
        is_own_template: the tokenizer came with this template.
        control_tokens: control token's string to id; content can produce none of these ids.
        turn_markers: bracketed words of the template (`[INST]`), control tokens or not.
        template_ids: ids of the text that the template puts around content.
        bos_id: the tokenizer's BOS; None for none.
        end_of_turn_id: what ends an assistant turn: the template's token, else EOS, else None.

    Raises:
        ConfigError: the template is missing, does not compile, or its generation header does not
            separate the user's text from the completion.
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        *,
        special_tokens_in_text: Literal["reject", "as_text"] = "reject",
        score_end_of_turn: bool = True,
        close_turns: bool = False,
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
        # Stands for content in probes.
        self._nonce = f"x{secrets.token_hex(12)}x"
        self.bos_id: int | None = tokenizer.bos_token_id
        # Asked of the encoding itself: a tokenizer's options and post-processor may disagree.
        self._bos_ids = [id_ for id_ in self._backend.encode("").ids if id_ == self.bos_id]
        self.chat_template_text = _template_text(tokenizer, template)
        self.is_own_template = self.chat_template_text == own_template(tokenizer)
        self._read_template()
        self._scored_end: tuple[int, ...] = ()
        self._closes_turns = close_turns
        if close_turns:
            self._scored_end = self._closing_ids
        elif score_end_of_turn:
            if self.end_of_turn_id is None:
                raise ConfigError(
                    ["score_end_of_turn: neither template nor tokenizer has an end-of-turn token"],
                    fix="set score_end_of_turn to false",
                )
            self._scored_end = (self.end_of_turn_id,)

    @classmethod
    def load(cls, path: str, revision: str | None, *, template: str, **options: Any) -> ChatEncoder:
        """Load a model's tokenizer and make its encoder.

        Args:
            path: local folder or hub id.
            revision: commit hash of a hub id; None for a folder.
            template: as in the constructor.
            **options: as in the constructor.

        Raises:
            ModelError: no usable tokenizer is there.
            ConfigError: as in the constructor.
        """
        return cls(load_tokenizer(path, revision), template, **options)

    @property
    def vocab_size(self) -> int:
        """Size of the id space: the largest token id plus one, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a sampled completion: end of turn and EOS."""
        ends = (self.end_of_turn_id, self._tokenizer.eos_token_id)
        return tuple(dict.fromkeys(token for token in ends if token is not None))

    def encode_prefix(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode a prompt, with the header that opens the assistant's turn.

        Where the template has no system role, a leading system message goes into the user turn
        after it, an empty line between. BOS stands once, at the start, if tokenizer or template
        adds it.

        Args:
            messages: the turns, the last one a user's.

        Raises:
            RowRejected: bad_messages, special_token_in_text, template_refused, or
                boundary_unstable (the text changes how the header is encoded).
        """
        text = self._render(self._guard_turns(messages), header=True)
        ids = self._controls.encode(text)
        if ids[:1] != self._bos_ids:
            ids = self._bos_ids + ids
        if ids[:2] == [self.bos_id, self.bos_id]:
            raise RowRejected(RejectReason.TEMPLATE_REFUSED, "the template renders BOS twice")
        if ids[-len(self._fixed_ids) :] != self._fixed_ids:
            raise RowRejected(
                RejectReason.BOUNDARY_UNSTABLE,
                "the generation header is encoded differently behind this prompt",
            )
        return tuple(ids)

    def encode_completion(self, completion: str, finish_reason: str | None) -> EncodedCompletion:
        """Encode a completion as it continues any prefix of this encoder.

        Where the template puts a space before the assistant's text, a completion that brings no
        whitespace of its own gets it, as its own first token's.

        Args:
            completion: text alone, without end-of-turn string.
            finish_reason: `length` when it was cut off; anything else, or None, means that it
                ended by itself.

        Raises:
            RowRejected: special_token_in_text, empty_completion, or boundary_unstable (no split
                at the boundary gives the text back).
        """
        text = self._guard(completion, "completion")
        if not text[:1].isspace():
            text = self._glue + text
        joint = self._controls.encode(self._tail + text)
        merged = joint[: len(self._tail_ids)] != self._tail_ids
        ids = self._encode_apart(text, joint) if merged else joint[len(self._tail_ids) :]
        if not completion or not ids:
            raise RowRejected(RejectReason.EMPTY_COMPLETION, "the completion has no token")
        if finish_reason != "length" or self._closes_turns:
            ids.extend(self._scored_end)
        return EncodedCompletion(tuple(ids), merged)

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of token ids; control tokens appear as their strings."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def _read_template(self) -> None:
        """Learn from probe renderings what surrounds content: header, glue, end of turn."""
        user: Message = {"role": "user", "content": self._nonce}
        try:
            opening, found, header = self._render([user], header=True).rpartition(self._nonce)
            turn = self._render([user, {**user, "role": "assistant"}], header=False)
        except RowRejected as refusal:
            raise ConfigError([f"template: {refusal.detail}"]) from None
        if not found or turn.count(self._nonce) < 2:
            raise ConfigError(["template: leaves out the user's or the assistant's text"])
        between, _, ending = turn.rpartition(self._nonce)
        between = between.rpartition(self._nonce)[2]
        self._has_system_role = True
        system: Message = {"role": "system", "content": f"{self._nonce}s"}
        try:
            preamble = self._render([system, user], header=True).rpartition(self._nonce)[0]
            self._has_system_role = system["content"] in preamble
        except RowRejected:
            self._has_system_role = False
        if not self._has_system_role:
            preamble = ""

        literals = (preamble.replace(system["content"], " "), opening, header, ending)
        self._controls = ControlTokens(self._tokenizer, literals)
        self.control_tokens = self._controls.ids
        self.turn_markers = self._controls.turn_markers
        self._find_tail(header)
        # More than whitespace (a block for reasoning, say) is for the model to write, not for us.
        glue = between.removeprefix(header)
        self._glue = glue if between.startswith(header) and glue.isspace() else ""
        ends = self._controls.find(ending)
        self.end_of_turn_id: int | None = (
            self.control_tokens[ends[0][0]] if ends else self._tokenizer.eos_token_id
        )
        # Encoded apart, it is what it is behind an answer where it begins with a control token.
        closing = self._controls.encode(ending) if ends and not ends[0].start() else []
        if not closing and self.end_of_turn_id is not None:
            closing = [self.end_of_turn_id]
        self._closing_ids = tuple(closing)
        self.template_ids = frozenset(
            id_ for text in literals for id_ in self._controls.encode(text)
        )
        try:
            self.encode_prefix([{"role": "user", "content": "a"}])
        except RowRejected as refusal:
            raise ConfigError([f"template: {refusal.detail}"]) from None

    def _find_tail(self, header: str) -> None:
        """Cut from the generation header what decides how a completion behind it is encoded."""
        controls = self._controls.find(header)
        # Tokenizers cut text at control tokens first, so nothing before the last one matters.
        self._tail = header[controls[-1].start() :] if controls else header.lstrip()
        self._tail_ids = self._controls.encode(self._tail)
        # Without one, the text before may change the tail's first token; BPE decides by
        # neighbouring pairs, so it is enough that the tokens at the boundary stay.
        self._fixed_ids = self._tail_ids if controls else self._tail_ids[1:]
        if not self._fixed_ids or not (controls or isinstance(self._backend.model, BPE)):
            raise ConfigError(
                ["template: nothing separates the user's text from the completion"],
                fix="use a template whose generation header has a special token, or 'plain'",
            )

    def _guard_turns(self, messages: Sequence[Message]) -> list[Message]:
        """Check the turns and their content; merge the system message where it has no role."""
        roles = [message.get("role") for message in messages]
        if not roles or roles[-1] != "user" or any(role not in _ROLES for role in roles):
            raise RowRejected(
                RejectReason.BAD_MESSAGES,
                "expected roles system, user and assistant with a user turn last, "
                f"got {len(roles)} turns",
            )
        turns: list[Message] = []
        for index, message in enumerate(messages):
            where, content = f"turn {index} ({message['role']})", message.get("content")
            if not isinstance(content, str):
                raise RowRejected(RejectReason.BAD_MESSAGES, f"{where}: content is not text")
            turns.append({"role": message["role"], "content": self._guard(content, where)})
        if turns[0]["role"] == "system" and not self._has_system_role:
            system, first, *rest = turns
            if first["role"] != "user":
                raise RowRejected(
                    RejectReason.TEMPLATE_REFUSED,
                    "no system role, and no user turn after it to take the system message",
                )
            merged = f"{system['content']}\n\n{first['content']}"
            turns = [{"role": "user", "content": merged}, *rest]
        return turns

    def _guard(self, content: str, where: str) -> str:
        """Reject content that holds a control token's string, or disguise it."""
        if self._rejects and (forged := self._controls.find_forgery(content)):
            raise RowRejected(RejectReason.SPECIAL_TOKEN_IN_TEXT, f"{where} holds {forged}")
        return self._controls.disguise(content)

    def _render(self, turns: Sequence[Message], *, header: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns),
                    chat_template=self.chat_template_text,
                    add_generation_prompt=header,
                    tokenize=False,
                    date_string=FROZEN_DATE.strftime("%d %b %Y"),
                    strftime_now=FROZEN_DATE.strftime,
                )
            )
        except TemplateSyntaxError as error:
            raise ConfigError(
                [f"template: does not compile, line {error.lineno}: {error.message}"]
            ) from None
        except TemplateError:
            # The message may quote content; the roles are what templates are particular about.
            roles = ", ".join(turn["role"] for turn in turns)
            raise RowRejected(
                RejectReason.TEMPLATE_REFUSED, f"the template does not take the roles {roles}"
            ) from None

    def _encode_apart(self, text: str, joint: list[int]) -> list[int]:
        """Encode text that merges with the tail, so that tail ids + these decode to the same.

        A completion alone may gain a prefix space, so it is encoded behind an anchor that it does
        not merge with.
        """
        whole = self.decode(joint)
        for anchor in (*(found[0] for found in self._controls.find(self._tail)), "\n", "a", "."):
            anchor_ids = self._controls.encode(anchor)
            behind = self._controls.encode(anchor + text)
            ids = behind[len(anchor_ids) :]
            apart = behind[: len(anchor_ids)] == anchor_ids
            if apart and self.decode(self._tail_ids + ids) == whole:
                return ids
        raise RowRejected(
            RejectReason.BOUNDARY_UNSTABLE, "the completion has no encoding behind the header"
        )


def check_vocabulary(encoder: ChatEncoder, model_vocab_size: int, *, who: str) -> None:
    """Check that a model knows every token its encoder can give it.

    Args:
        encoder: the model's own tokenizer with the run's template.
        model_vocab_size: rows of the model's embedding.
        who: config key of the model, for the message.

    Raises:
        ConfigError: the template needs ids the model has not, or turn markers that are no single
            control token of the tokenizer (a base model under a chat model's template).
    """
    problems = []
    strings = {id_: string for string, id_ in encoder.control_tokens.items()}
    template_ids = {*encoder.template_ids, *encoder.stop_ids}
    outside = sorted(id_ for id_ in template_ids if id_ >= model_vocab_size)
    if outside:
        named = ", ".join(f"{strings.get(id_, 'text')} = {id_}" for id_ in outside)
        problems.append(
            f"{who}: the template's tokens must be below the model's vocabulary size "
            f"{model_vocab_size}, got {named}"
        )
    # Another model's template: what was one token there must be one here.
    if not encoder.is_own_template:
        markers = sorted(m for m in encoder.turn_markers if re.fullmatch(r"<[^<>]+>", m))
        missing = [marker for marker in markers if marker not in encoder.control_tokens]
        if missing:
            problems.append(
                f"{who}: the template's turn markers must be single tokens of the tokenizer, "
                f"{', '.join(missing)} is ordinary text there"
            )
    if problems:
        raise ConfigError(
            problems, fix="set encoding.template to 'plain' (both models) or to 'own'"
        )


def load_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer; takes a large part of a second.

    Args:
        path: local folder or hub id.
        revision: commit hash of a hub id; None for a folder.

    Raises:
        ModelError: no usable tokenizer is there.
    """
    from transformers import PreTrainedTokenizerFast

    folder = str(fetch_small_files(path, revision))
    options = {"trust_remote_code": False}
    try:
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        except (OSError, ValueError):
            # No tokenizer.json: the model's own class can convert its files, but imports torch.
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"cannot load a tokenizer ({str(error).splitlines()[0]})",
            where=path if revision is None else f"{path}@{revision}",
            fix="check path and revision; the folder needs a tokenizer.json",
        ) from error


def own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Give the text of the chat template that came with a tokenizer; None when it has none."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else None


def _template_text(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    if template == "plain":
        return PLAIN_TEMPLATE
    if template != "own":
        return template
    own = own_template(tokenizer)
    if own is None:
        raise ConfigError(
            ["template: 'own' needs a tokenizer with a chat template, this one has none"],
            fix="set encoding.template to 'plain', or to a Jinja file",
        )
    return own
