"""Scoring through vLLM's prefix cache, with a stand-in for vLLM that has such a cache.

The stand-in answers as the versions do: rows that a hit covers are garbage (runner V1), left out of
the list (V2), or make the answer None (V2 with token ids). Log-probs are a function of the tokens
before, so that a row taken from the wrong place shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.engines.base import ScoringGroup
from cdr.engines.vllm_scoring import CoreRequest, Features, score_groups
from cdr.errors import EngineError

VOCAB = 8
BLOCK = 4


def logprob(context: Sequence[int], token: int) -> float:
    return float(np.float32(-(1 + zlib.crc32(bytes([*context, token])) % 100_000) / 10_000))


class Flat(SimpleNamespace):
    """vLLM's FlatLogprobs, as far as it is read."""

    def __bool__(self) -> bool:
        return bool(self.token_ids)


@dataclass
class FakeVllm:
    """Answers requests in order, every block of a prompt cached as soon as it is queued."""

    features: Features
    is_v2: bool = False
    cached: set[tuple[int, ...]] = field(default_factory=set)
    requests: list[CoreRequest] = field(default_factory=list)
    num_computed: int = 0
    spoil: Any = None

    def ask(self, requests: Sequence[CoreRequest]) -> list[Any]:
        answers = []
        for request in requests:
            answer = self.answer(request)
            answers.append(self.spoil(request, answer) if self.spoil else answer)
        return answers

    def answer(self, request: CoreRequest) -> Any:
        self.requests.append(request)
        ids, params = request.prompt_ids, request.params
        assert params["max_tokens"] == 1
        assert params["detokenize"] is False
        hit = 0
        if not params["skip_reading_prefix_cache"]:
            while hit + BLOCK < len(ids) and tuple(ids[: hit + BLOCK]) in self.cached:
                hit += BLOCK
        self.cached.update(tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK))
        self.num_computed += len(ids) - hit
        answer = SimpleNamespace(
            num_cached_tokens=hit,
            outputs=[SimpleNamespace(logprobs=self.next_tokens(ids, params))],
            prompt_logprobs=None,
            prompt_token_id_logprobs=None,
        )
        if "prompt_logprob_token_ids" in params:
            start = params["prompt_logprob_start"]
            targets = params["prompt_logprob_token_ids"]
            assert targets.dtype == np.int32
            assert targets.shape == (len(ids) - 1 - start, 1)
            if hit <= start:
                rows = [logprob(ids[: start + 1 + i], t) for i, t in enumerate(targets[:, 0])]
                answer.prompt_token_id_logprobs = np.array(rows, np.float32)[:, None]
        elif "prompt_logprobs" in params:
            rows = [logprob(ids[:end], ids[end]) for end in range(hit + 1, len(ids))]
            # Garbage with the right ids: the check of ids alone would not see it.
            garbage = 0 if self.is_v2 else len(ids) - 1 - len(rows)
            kept = ids[len(ids) - len(rows) :] if rows else []
            answer.prompt_logprobs = Flat(
                token_ids=[*ids[1 : 1 + garbage], *kept], logprobs=[99.0] * garbage + rows
            )
        return answer

    def next_tokens(self, ids: list[int], params: dict[str, Any]) -> Flat | None:
        if "logprob_token_ids" in params:
            assert 0 < len(params["logprob_token_ids"]) <= 128
            tokens = [0, *params["logprob_token_ids"]]  # the sampled one comes first
        elif params.get("logprobs") == -1:
            tokens = list(range(VOCAB))
        else:
            return None
        return Flat(token_ids=tokens, logprobs=[logprob(ids, token) for token in tokens])


FEATURES = {
    "0.13": (Features(BLOCK, chooses_logprobs=False, scores_token_ids=False), False),
    "V1": (Features(BLOCK, chooses_logprobs=True, scores_token_ids=False), False),
    "V2 lists": (Features(BLOCK, chooses_logprobs=True, scores_token_ids=False), True),
    "V2 ids": (Features(BLOCK, chooses_logprobs=True, scores_token_ids=True), True),
}


def make_fake(version: str, **fields: Any) -> FakeVllm:
    features, is_v2 = FEATURES[version]
    return FakeVllm(features, is_v2, **fields)


def expected(groups: Sequence[ScoringGroup]) -> list[list[list[float]]]:
    return [
        [
            [logprob(group.prefix_ids + ids[:i], token) for i, token in enumerate(ids)]
            for ids in group.completions_ids
        ]
        for group in groups
    ]


def assert_scores(scores: Any, groups: Sequence[ScoringGroup]) -> None:
    assert all(one.dtype == np.float32 for group in scores for one in group)
    assert [[one.tolist() for one in group] for group in scores] == expected(groups)


TOKENS = st.integers(0, 2)
GROUP_OF_TOKENS = st.builds(
    ScoringGroup,
    st.lists(TOKENS, min_size=1, max_size=13).map(tuple),
    st.lists(st.lists(TOKENS, min_size=1, max_size=13).map(tuple), max_size=5).map(tuple),
)
GROUPS = st.lists(GROUP_OF_TOKENS, max_size=4)


@pytest.mark.parametrize("version", FEATURES)
@given(groups=GROUPS)
def test_every_log_prob_comes_from_a_row_that_was_computed(
    version: str, groups: list[ScoringGroup]
) -> None:
    fake = make_fake(version)
    for _ in range(2):  # the second time all blocks are cached already
        assert_scores(score_groups(groups, fake.ask, fake.features).scores, groups)


@pytest.mark.parametrize("version", FEATURES)
@given(group=GROUP_OF_TOKENS)
def test_a_group_alone_is_never_asked_for_again(version: str, group: ScoringGroup) -> None:
    fake = make_fake(version)
    assert score_groups([group], fake.ask, fake.features).num_resubmitted == 0


def test_a_prefix_is_computed_once_and_so_is_a_common_start() -> None:
    fake = make_fake("V1")
    prefix = (1,) * (5 * BLOCK)
    start = (2, 3, 4, 5)  # one block
    group = ScoringGroup(prefix, ((*start, 6, 7), (*start, 7), (3,), (3,)))
    assert_scores(score_groups([group], fake.ask, fake.features).scores, [group])
    primer, first, branch = fake.requests
    assert primer.prompt_ids == [*prefix]
    assert primer.params["logprob_token_ids"] == [2, 3]
    assert first.prompt_ids == [*prefix, *start, 6, 7]
    assert branch.prompt_ids == [*prefix, *start]
    assert branch.params["logprob_token_ids"] == [7]
    # The prefix, the first completion, and the block whose last row predicts the second's own 7.
    assert fake.num_computed == 5 * BLOCK + 6 + BLOCK


def test_one_token_completions_need_no_request_of_their_own() -> None:
    fake = make_fake("V1")
    group = ScoringGroup((1, 2, 3), tuple((token,) for token in range(130)))
    assert_scores(score_groups([group], fake.ask, fake.features).scores, [group])
    asked = [len(request.params["logprob_token_ids"]) for request in fake.requests]
    assert asked == [128, 2]


def test_blocks_of_another_prompt_reach_past_the_prefix_and_are_not_believed() -> None:
    for version in FEATURES:
        fake = make_fake(version)
        completion = (2, 3) * BLOCK
        longer = ScoringGroup((1,) * BLOCK + completion, ((5, 6),))
        group = ScoringGroup((1,) * BLOCK, (completion, (7, 7)))
        scored = score_groups([longer, group], fake.ask, fake.features)
        assert_scores(scored.scores, [longer, group])
        assert scored.num_resubmitted == 1
        assert fake.requests[-1].params["skip_reading_prefix_cache"] is True
        assert fake.requests[-1].prompt_ids == [*group.prefix_ids, *completion]


def with_tail(answer: Any, **changes: Any) -> Any:
    if answer.prompt_logprobs:
        answer.prompt_logprobs.__dict__.update(changes)
    return answer


SPOILS = {
    "short list": lambda a: with_tail(a, token_ids=[], logprobs=[]),
    "other ids": lambda a: with_tail(a, token_ids=[7] * 20, logprobs=[99.0] * 20),
    "no rows": lambda a: SimpleNamespace(**{**vars(a), "prompt_logprobs": None}),
    "rows of another shape": lambda a: SimpleNamespace(
        **{**vars(a), "prompt_token_id_logprobs": np.zeros((1, 1), np.float32)}
    ),
    "no next token": lambda a: SimpleNamespace(
        **{**vars(a), "outputs": [SimpleNamespace(logprobs=Flat(token_ids=[0], logprobs=[-1.0]))]}
    ),
    "no output": lambda a: SimpleNamespace(**{**vars(a), "outputs": []}),
}
GROUP = ScoringGroup((1, 1, 1, 1, 1), ((2, 3, 4, 5), (4, 2, 2)))


@pytest.mark.parametrize(
    ("spoil", "version", "num_spoilt"),
    [
        ("short list", "V2 lists", 2),
        ("other ids", "V1", 2),
        ("no rows", "V1", 2),
        ("rows of another shape", "V2 ids", 2),
        ("no next token", "V1", 1),
        ("no next token", "0.13", 1),
        ("no output", "V2 ids", 1),
    ],
)
def test_an_unusable_answer_is_asked_for_again_without_the_cache(
    spoil: str, version: str, num_spoilt: int
) -> None:
    def spoil_hits(request: CoreRequest, answer: Any) -> Any:
        is_spoilt = not request.params["skip_reading_prefix_cache"]
        return SPOILS[spoil](answer) if is_spoilt else answer

    fake = make_fake(version, spoil=spoil_hits)
    scored = score_groups([GROUP], fake.ask, fake.features)
    assert_scores(scored.scores, [GROUP])
    assert scored.num_resubmitted == num_spoilt


def test_an_answer_that_stays_unusable_is_an_error() -> None:
    fake = make_fake("V1", spoil=lambda _, answer: SPOILS["other ids"](answer))
    with pytest.raises(EngineError, match="no usable log-probs for 2 of 3 requests"):
        score_groups([GROUP], fake.ask, fake.features)


def test_no_groups_ask_nothing() -> None:
    fake = make_fake("V1")
    assert score_groups([], fake.ask, fake.features).scores == []
    assert score_groups([ScoringGroup((1,), ())], fake.ask, fake.features).scores == [[]]
