"""Control tokens: strings that become one special id, by which templates delimit turns.

Content must not be able to forge a turn. What holds such a string is found (`find_forgery`), or
encoded as the ordinary text it is: disguised before the template is rendered around it, and
encoded by a tokenizer that knows control tokens by other names. No torch, no Spark.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from cdr.errors import RejectReason, RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A template's turn markers look like this even where they are ordinary text to the tokenizer.
_MARKER = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[/?[A-Z_]+\]")


class ControlTokens:
    """The control tokens of a tokenizer under a template, and encoding that respects them.

    Args:
        tokenizer: a fast tokenizer of transformers.
        literals: the texts that the template puts around content.

    Attributes:
        ids: control token's string to id.
        turn_markers: bracketed words of the literals (`[INST]`), control tokens or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, literals: Sequence[str]) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        # Marks control tokens in content; no user can guess it.
        self._nonce = f"x{secrets.token_hex(12)}x"
        turns = "\n".join(literals)
        # A token that delimits turns is one, also where its file forgot to call it special.
        self.ids = {
            token.content: id_
            for id_, token in self._backend.get_added_tokens_decoder().items()
            if token.special or token.content in turns
        }
        self.turn_markers = frozenset(_MARKER.findall(turns))
        # Unknown characters of ordinary text encode to it: no sign of a forged turn.
        self._counted = frozenset(self.ids.values()) - {tokenizer.unk_token_id}
        self._pattern = _any_of(self.ids)
        self._forgery = _any_of({*self.ids, *self.turn_markers})

    def find(self, text: str) -> list[re.Match[str]]:
        """Find every control token in a text, in order."""
        return list(self._pattern.finditer(text))

    def find_forgery(self, content: str) -> str | None:
        """Find the first control token or turn marker in content."""
        found = self._forgery.search(content)
        return found[0] if found else None

    def disguise(self, content: str) -> str:
        """Put placeholders for the control tokens in content; `encode` knows them."""
        return self._pattern.sub(lambda token: f"{self._nonce}{self.ids[token[0]]}t", content)

    def encode(self, text: str) -> list[int]:
        """Encode text whose control tokens are the template's own, and assert just that.

        Args:
            text: with content disguised.

        Raises:
            RowRejected: special_token_in_text.
        """
        ids = (
            self._encode_disguised(text)
            if self._nonce in text
            else self._backend.encode(text, add_special_tokens=False).ids
        )
        if sum(map(self._counted.__contains__, ids)) != len(self._pattern.findall(text)):
            # A normalizer or merge can still make one of text that does not look like it.
            raise RowRejected(
                RejectReason.SPECIAL_TOKEN_IN_TEXT, "text that is encoded as a control token"
            )
        return ids

    def _encode_disguised(self, text: str) -> list[int]:
        """Encode text with placeholders by a tokenizer that knows control tokens by other names."""
        tokenizer, original = self._renamed
        renamed = self._pattern.sub(lambda token: self._alias(self.ids[token[0]]), text)
        strings = {id_: string for string, id_ in self.ids.items()}
        placeholder = re.compile(rf"{self._nonce}(\d+)t")
        restored = placeholder.sub(lambda match: strings[int(match[1])], renamed)
        ids = tokenizer.encode(restored, add_special_tokens=False).ids
        return [original.get(id_, id_) for id_ in ids]

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy with control tokens renamed, and its added tokens' ids to the original ones.

        The joint encoding stays one call, so that what the tokenizer does around control tokens
        (prefix spaces, stripping) is the same as without control strings in the content.
        """
        spec = json.loads(self._backend.to_str())
        names = {}
        for token in spec["added_tokens"]:
            if token["content"] in self.ids:
                token["content"] = self._alias(token["id"])
            names[token["content"]] = token["id"]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        added = tokenizer.get_added_tokens_decoder()
        return tokenizer, {id_: names[token.content] for id_, token in added.items()}

    def _alias(self, token_id: int) -> str:
        return f"{self._nonce}{token_id}n"


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    # Longest first, as tokenizers match; without strings, a pattern that matches nothing.
    ordered = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
