"""A judge as a function of rows: whole prompts, each question once, what an endpoint answers.

Asks a stub of an endpoint (`tests.chat_endpoint`); judges and other rewards in an engine host are
compared with the job's in tests/spark/test_registry.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.errors import ConfigError, SetupError
from cdr.judge import mean_odds
from cdr.plan import plan_reward
from cdr.registration import describe, register_reward
from cdr.reward_config import RewardSpec
from cdr.reward_model import RewardModel, RewardRow
from tests.chat_endpoint import Endpoint, Reply, say, serve


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")


def make_judge(base_url: str) -> RewardSpec:
    api = {"base_url": base_url, "api_key_variable": "JUDGE_KEY", "retries": 0}
    return RewardSpec.model_validate(
        {
            "name": "gpt",
            "form": "judge",
            "models": {"judge": {"path": "gpt-4-turbo", "engine": "api", "api": api}},
            "routing": {"mode": "none"},
            "encoding": {"template": "own"},
        }
    )


def score(endpoint: Endpoint, rows: Sequence[dict[str, Any]]) -> list[RewardRow]:
    return RewardModel(plan_reward(make_judge(endpoint.base_url))).score(rows)


def make_rows(
    prompt: str, *completions: str | None, num: int | None = None
) -> list[dict[str, Any]]:
    count = len(completions) if num is None else num
    return [{"prompt": prompt, "completion": text, "num_candidates": count} for text in completions]


def answer(question: str, _: int) -> Reply:
    """Prefer the longer answer; other than that, do what the conversation says."""
    first, second = (
        question.partition(f"[Answer {letter}]\n")[2].partition("\n[End")[0] for letter in "AB"
    )
    if "down" in question:
        return 503, {}
    if "secret" in second:
        return say(None, refusal="I can't help with that.")
    return say("A" if len(first) >= len(second) else "B")


def test_an_api_judge_weighs_whole_prompts_and_asks_each_question_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_rows("A fox?", "no", "yes, yes", "maybe", "no")
    with serve(answer) as endpoint:
        found = score(endpoint, rows)
        # Three different answers, each two in both orders.
        assert len(endpoint.asked) == 6
        # "yes, yes" wins all its 4 questions, "maybe" 2 and loses 2, "no" loses 4.
        assert [row.reward for row in found] == [-1.0, 1.0, 0.0, -1.0]
        assert {(row.status, row.strong_logprob, row.error) for row in found} == {
            ("ok", None, None)
        }
        assert [row.num_tokens for row in found] == [1, 2, 1, 1]  # 4 characters each
        # Apart from each other, a prompt asked about after the other, and with rows that cannot
        # be shown.
        monkeypatch.setattr("cdr.prompt_weighing._CHUNK_VIEWS", 1)
        bad = make_rows("An owl?", "yes", None, "no!", "")
        mixed = [*rows[:2], *bad, *rows[2:]]
        again = score(endpoint, mixed)
        assert [*again[:2], *again[6:]] == found
        assert [row.status for row in again[2:6]] == ["ok", "rejected", "ok", "rejected"]


def test_a_prompt_that_a_call_does_not_hold_whole_is_failed_and_not_asked_about() -> None:
    rows = [
        *make_rows("A fox?", "yes", "no", "maybe", num=4),
        *make_rows("An owl?", "yes", "no", num=1),
        *make_rows("A cat?", "yes", num=2),
        {"prompt": "A cat?", "completion": "no", "num_candidates": float("nan")},
        *make_rows("", "yes"),
    ]
    with serve(answer) as endpoint:
        found = score(endpoint, rows)
        assert endpoint.asked == []
    told = ["3 of 4"] * 3 + ["2 of 1"] * 2 + ["2 of 2 or ?"] * 2
    assert [row.error for row in found[:-1]] == [
        f"incomplete_prompt: {said} candidates in this call" for said in told
    ]
    assert {(row.status, row.reward) for row in found[:-1]} == {("failed", None)}
    assert (found[-1].status, str(found[-1].error).partition(":")[0]) == (
        "rejected", "empty_prompt"
    )  # fmt: skip


def test_what_has_no_verdict_says_why() -> None:
    rows = [
        *make_rows("A fox?", "no", "a secret"),
        *make_rows("You are down.", "yes", "no"),
        *make_rows("An owl?", "yes"),
    ]
    with serve(answer) as endpoint:
        found = score(endpoint, rows)
    refused = ("rejected", "judge_refused: a question about it has no verdict")
    assert [(row.status, row.error) for row in found[:4]] == [
        *[refused] * 2, *[("failed", "judge_unavailable")] * 2
    ]  # fmt: skip
    assert str(found[4].error).startswith("no_other_candidate: ")


def test_the_key_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_reward(make_judge("https://host/v1"))
    assert "gpt-4-turbo` (api, https://host/v1, key in JUDGE_KEY)" in describe(plan)
    assert "compares all candidates of a prompt: share of verdicts won" in describe(plan)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(SetupError, match="JUDGE_KEY is not set"):
        RewardModel(plan).score(make_rows("A fox?", "yes", "no"))
    with pytest.raises(ConfigError, match=r"api\.base_url: must have no user name") as caught:
        register_reward(plan_reward(make_judge("https://me:hidden@host/v1")), uri="unused")
    assert "hidden" not in str(caught.value)


def test_a_mean_takes_all_answers_or_is_none() -> None:
    assert mean_odds([3.0, -1.0]) == 1.0  # (3 − 1) / 2
    assert mean_odds([3.0, None]) is None


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1).flatmap(
        lambda x: st.tuples(st.just(x), st.permutations(x))
    )
)
def test_a_mean_does_not_depend_on_the_order_of_the_questions(
    odds: tuple[list[float], list[float]],
) -> None:
    assert mean_odds(odds[0]) == mean_odds(odds[1])
