"""What vLLM is asked to score groups of completions, and how its answers are read.

vLLM shares computed prefixes between requests through a cache of whole blocks of tokens. A request
that hits the cache gets no log-probs for the rows it did not compute, so every log-prob has to come
from a request that computes its row:

- a **primer** per prefix is queued first. It fills the cache and yields the log-probs of all first
  tokens, which no completion's own request can give when the cache covers the prefix to its end;
- a **rows** request per distinct completion reads the cache and yields the rest;
- where two completions begin alike beyond a block boundary, the later one hits the blocks of the
  earlier one too. Its common tokens are then taken from there, and the first token after the
  boundary from a primer of its own, one block of work.

An answer that is missing, misaligned, or hit the cache further than planned (another prompt's
blocks, say) is asked for once more without the cache. Rows of a hit hold garbage in some versions
of vLLM, hence the check of token ids and of `num_cached_tokens`.

Pure Python: vLLM itself is behind `Ask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cdr.engines.base import ScoringGroup, TokenLogprobs
from cdr.errors import EngineError

Ids = tuple[int, ...]

MAX_CHOSEN_TOKENS = 128
"""Token ids whose log-probs one primer may ask for, vLLM's own limit."""

# Sampling one token costs nothing beyond the prompt, and vLLM refuses to sample none.
_NO_SAMPLING = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "ignore_eos": True}


@dataclass(frozen=True)
class Features:
    """What the installed vLLM can do, found out when it loads.

    Args:
        block_size: tokens per block of the prefix cache.
        chooses_logprobs: `logprob_token_ids`: log-probs of chosen next tokens. Without it a
            primer asks for the whole vocabulary.
        scores_token_ids: `prompt_logprob_token_ids`: log-probs of chosen prompt rows (model
            runner V2). Without it the tail of the prompt's log-probs is read.
    """

    block_size: int
    chooses_logprobs: bool
    scores_token_ids: bool


@dataclass(frozen=True)
class CoreRequest:
    """One request to vLLM: token ids, and fields of `vllm.SamplingParams`."""

    prompt_ids: list[int]
    params: dict[str, Any]


Ask = Callable[[Sequence[CoreRequest]], Sequence[Any]]
"""Sends requests in order and gives one `vllm.RequestOutput` each, in order."""


@dataclass(frozen=True)
class Scored:
    """Log-probs as `LogprobEngine.score` gives them, and how many requests were sent twice."""

    scores: list[list[TokenLogprobs]]
    num_resubmitted: int


def score_groups(groups: Sequence[ScoringGroup], ask: Ask, features: Features) -> Scored:
    """Score every completion of every group, each distinct one once.

    Args:
        groups: checked groups: nothing empty, too long or outside the vocabulary.
        ask: sends requests to a core.
        features: of that core.

    Raises:
        EngineError: vLLM gives no usable answer even without its cache.
    """
    plans = [_GroupPlan(group, features.block_size) for group in groups]
    questions = [question for plan in plans for question in plan.questions(features)]
    again = _ask_all(questions, ask, features, read_cache=True)
    if lost := _ask_all(again, ask, features, read_cache=False):
        raise EngineError(
            f"vLLM gave no usable log-probs for {len(lost)} of {len(questions)} requests",
            fix="update vLLM, or use the transformers engine",
        )
    return Scored([plan.collect() for plan in plans], len(again))


def _ask_all(
    questions: Sequence[_Question], ask: Ask, features: Features, *, read_cache: bool
) -> list[_Question]:
    """Ask, let each question keep its answer, and give those whose answer is of no use."""
    if not questions:
        return []
    answers = ask([question.request(features, read_cache=read_cache) for question in questions])
    pairs = zip(questions, answers, strict=True)
    return [question for question, answer in pairs if not question.keep(answer, features)]


class _GroupPlan:
    """Which request yields which log-prob of a group.

    Args:
        group: what to score.
        block_size: tokens per block of the cache.
    """

    def __init__(self, group: ScoringGroup, block_size: int) -> None:
        self.prefix_ids = group.prefix_ids
        self._asked = group.completions_ids
        self.completions = list(dict.fromkeys(group.completions_ids))
        # Per completion: tokens at its start that an earlier one has computed, and which one.
        self.num_shared: list[int] = []
        self._donors: list[int] = []
        # Per start of a completion: the next tokens asked of its primers, and their log-probs.
        self.next_tokens: dict[Ids, dict[int, float]] = {
            (): {ids[0]: np.nan for ids in self.completions}
        }
        self.rows: dict[int, Sequence[float]] = {}
        self._find_shared_starts(block_size)

    def _find_shared_starts(self, block_size: int) -> None:
        owners: dict[Ids, int] = {}  # start that ends with a block -> first completion that has it
        boundary = block_size - len(self.prefix_ids) % block_size
        for index, ids in enumerate(self.completions):
            shared, donor = 0, index
            # vLLM computes at least the last token of a prompt: a hit ends before it.
            for end in range(boundary, len(ids), block_size):
                if (owner := owners.get(ids[:end])) is None:
                    break
                shared, donor = end, owner
            self.num_shared.append(shared)
            self._donors.append(donor)
            if shared and not self._is_copied(index):
                self.next_tokens.setdefault(ids[:shared], {})[ids[shared]] = np.nan
            for end in range(boundary, len(ids) + 1, block_size):
                owners.setdefault(ids[:end], index)

    def _is_copied(self, index: int) -> bool:
        """Tell whether the token after the shared start is the donor's too."""
        after = slice(self.num_shared[index], self.num_shared[index] + 1)
        return self.completions[self._donors[index]][after] == self.completions[index][after]

    def questions(self, features: Features) -> Iterator[_Question]:
        """Give the requests in the order in which they must be queued: the cache fills first."""
        yield from self._primers((), features)
        for index, ids in enumerate(self.completions):
            if len(ids) - 1 > self.num_shared[index]:
                yield _Rows(self, index)
        for start in self.next_tokens:
            if start:
                yield from self._primers(start, features)

    def _primers(self, start: Ids, features: Features) -> Iterator[_Primer]:
        tokens = tuple(self.next_tokens[start])
        size = MAX_CHOSEN_TOKENS if features.chooses_logprobs else max(1, len(tokens))
        for first in range(0, len(tokens), size):
            yield _Primer(self, start, tokens[first : first + size])

    def collect(self) -> list[TokenLogprobs]:
        """Put the answers together: one array per completion of the group, in its order."""
        found: dict[Ids, TokenLogprobs] = {}
        for index, ids in enumerate(self.completions):
            shared = self.num_shared[index]
            logprobs = np.empty(len(ids), np.float32)
            logprobs[0] = self.next_tokens[()][ids[0]]
            if shared:
                donor = found[self.completions[self._donors[index]]]
                logprobs[1:shared] = donor[1:shared]
                logprobs[shared] = (
                    donor[shared]
                    if self._is_copied(index)
                    else self.next_tokens[ids[:shared]][ids[shared]]
                )
            logprobs[shared + 1 :] = self.rows.get(index, ())
            found[ids] = logprobs
        return [found[ids] for ids in self._asked]


class _Question(Protocol):
    """A request whose answer knows where it belongs."""

    def request(self, features: Features, *, read_cache: bool) -> CoreRequest:
        """Make the request."""
        ...

    def keep(self, answer: Any, features: Features) -> bool:
        """Keep what a `vllm.RequestOutput` says; tell whether it is of use."""
        ...


@dataclass(frozen=True)
class _Primer:
    """Asks for the log-probs of next tokens after a prefix and a start of its completions."""

    plan: _GroupPlan
    start: Ids
    tokens: Ids

    def request(self, features: Features, *, read_cache: bool) -> CoreRequest:
        chosen = (
            {"logprob_token_ids": list(self.tokens)}
            if features.chooses_logprobs
            else {"logprobs": -1}
        )
        skip = {"skip_reading_prefix_cache": not read_cache}
        return CoreRequest(
            [*self.plan.prefix_ids, *self.start],
            {**_NO_SAMPLING, "flat_logprobs": True, **chosen, **skip},
        )

    def keep(self, answer: Any, features: Features) -> bool:
        found = answer.outputs[0].logprobs if answer.outputs else None
        if not found:
            return False
        logprobs = dict(zip(found.token_ids, found.logprobs, strict=True))
        if any(token not in logprobs for token in self.tokens):
            return False
        self.plan.next_tokens[self.start].update({t: logprobs[t] for t in self.tokens})
        return True


@dataclass(frozen=True)
class _Rows:
    """Asks for the log-probs of a completion's tokens after its shared start and the next one."""

    plan: _GroupPlan
    index: int

    @property
    def _targets(self) -> Ids:
        return self.plan.completions[self.index][self.plan.num_shared[self.index] + 1 :]

    @property
    def _first_row(self) -> int:
        """Position of the first row needed; the cache may hold what comes before it."""
        return len(self.plan.prefix_ids) + self.plan.num_shared[self.index]

    def request(self, features: Features, *, read_cache: bool) -> CoreRequest:
        asked: dict[str, Any]
        if features.scores_token_ids:
            asked = {
                "prompt_logprob_token_ids": np.array(self._targets, np.int32)[:, None],
                "prompt_logprob_start": self._first_row,
            }
        else:
            asked = {"prompt_logprobs": 0, "flat_logprobs": True}
        # vLLM would skip the cache by itself for requests with prompt log-probs.
        skip = {"skip_reading_prefix_cache": not read_cache}
        return CoreRequest(
            [*self.plan.prefix_ids, *self.plan.completions[self.index]],
            {**_NO_SAMPLING, **asked, **skip},
        )

    def keep(self, answer: Any, features: Features) -> bool:
        if (answer.num_cached_tokens or 0) > self._first_row:
            return False
        targets = self._targets
        if features.scores_token_ids:
            scores = answer.prompt_token_id_logprobs
            if scores is None or scores.shape != (len(targets), 1):
                return False
            self.plan.rows[self.index] = scores[:, 0]
            return True
        found = answer.prompt_logprobs
        # The first rows of a hit are garbage or left out: only the tail is the completion's.
        if not found or tuple(found.token_ids[-len(targets) :]) != targets:
            return False
        self.plan.rows[self.index] = found.logprobs[-len(targets) :]
        return True
