"""A completion token by token: what each one spells, and what it adds to the reward.

Token ids are not stored. They are computed anew from the text, and used only where they hash to
what the log-probs are stored under, so that a colour never stands on a wrong token. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cdr.chat import ChatEncoder
from cdr.encoding import EncodingPlan, ids_hash
from cdr.errors import RowRejected

MAX_TOKENS = 300
"""Tokens of a completion shown one by one."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character has four bytes at most, and a token may hold the end of one and the start of the next;
# a longer run is text that really does not decode.
_MAX_JOINED = 8


@dataclass(frozen=True)
class Piece:
    """One token of a completion, or several that only together spell a character.

    Args:
        text: what they spell.
        logprobs: log-prob by term, nats, in the order of the row's terms; summed over the tokens.
        reward: weighted sum of `logprobs`, nats.
    """

    text: str
    logprobs: tuple[float, ...]
    reward: float


@dataclass(frozen=True)
class TokenRow:
    """A completion in the tokens that some of the terms share.

    Args:
        terms: names of these terms, `model/condition`; all of them where models share a tokenizer.
        pieces: in order; long completions are cut.
        rest: tokens left out at the end.
        rest_reward: their weighted sum, nats.
    """

    terms: tuple[str, ...]
    pieces: tuple[Piece, ...]
    rest: int = 0
    rest_reward: float = 0.0


@dataclass(frozen=True)
class ScoredTerm:
    """A term's log-probs of one completion.

    Args:
        completion_hash: of the token ids they belong to.
        logprobs: per token, nats.
    """

    completion_hash: bytes
    logprobs: Sequence[float]


def split_text(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[
    tuple[str, int]
]:  # fmt: skip
    """Say what each token spells.

    Tokens of byte-level vocabularies may hold a part of a character; they come joined. The texts
    together are what all ids decode to.

    Args:
        ids: token ids.
        decode: the tokenizer's.

    Yields:
        (text, number of tokens), in order.
    """
    before, start = 0, 0
    while start < len(ids):
        # What stands before decides how a text begins (a leading space). Not from within a
        # character: bytes that do not decode would spoil those behind them.
        context = ids[before:start]
        known = decode(context) if context else ""
        end = start + 1
        text = decode([*context, *ids[start:end]])[len(known) :]
        while text.endswith(_UNFINISHED) and end < len(ids) and end - start < _MAX_JOINED:
            end += 1
            text = decode([*context, *ids[start:end]])[len(known) :]
        yield text, end - start
        before, start = start, end


class TokenReader:
    """Shows completions in the tokens of a reward's models; loads each tokenizer once.

    Args:
        plan: the encoding of the run.
        terms: model key in `plan` by term, `model/condition`.
        weights: weight in the reward by term.
    """

    def __init__(
        self, plan: EncodingPlan, terms: Mapping[str, str], weights: Mapping[str, float]
    ) -> None:
        self._plan, self._terms, self._weights = plan, dict(terms), dict(weights)
        self._encoders: dict[str, ChatEncoder] = {}

    def read(
        self, completion: str, finish_reason: str | None, scored: Mapping[str, ScoredTerm]
    ) -> tuple[TokenRow, ...]:
        """Give a completion token by token.

        Args:
            completion: its text.
            finish_reason: as scored.
            scored: by term.

        Returns:
            One row per different tokenisation, terms of the same one together. Empty where the
            tokenizers of today give other ids than those that were scored.
        """
        rows = []
        groups: dict[bytes, list[str]] = {}
        for name, term in scored.items():
            groups.setdefault(term.completion_hash, []).append(name)
        for completion_hash, names in groups.items():
            encoder = self._encoder(self._terms[names[0]])
            try:
                ids = encoder.encode_completion(completion, finish_reason).ids
            except RowRejected:
                return ()
            if ids_hash(ids) != completion_hash:
                return ()
            columns = [scored[name].logprobs for name in names]
            if any(len(column) != len(ids) for column in columns):
                return ()
            weights = [self._weights[name] for name in names]
            rows.append(_row(tuple(names), ids, encoder.decode, columns, weights))
        return tuple(rows)

    def _encoder(self, model_key: str) -> ChatEncoder:
        if model_key not in self._encoders:
            (spec,) = (spec for spec in self._plan.tokenizers if spec.model_key == model_key)
            self._encoders[model_key] = ChatEncoder.load(
                spec.path,
                spec.revision,
                template=spec.template,
                special_tokens_in_text=self._plan.special_tokens_in_text,
                score_end_of_turn=self._plan.score_end_of_turn,
            )
        return self._encoders[model_key]


def _row(
    names: tuple[str, ...],
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    columns: Sequence[Sequence[float]],
    weights: Sequence[float],
) -> TokenRow:
    def weigh(values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    pieces, place = [], 0
    for text, size in split_text(ids[:MAX_TOKENS], decode):
        sums = tuple(sum(column[place : place + size]) for column in columns)
        pieces.append(Piece(text, sums, weigh(sums)))
        place += size
    left = [sum(column[place:]) for column in columns]
    return TokenRow(names, tuple(pieces), rest=len(ids) - place, rest_reward=weigh(left))
