"""A judge behind an API: every way in which an endpoint answers, refuses or fails has its name.

Against a stub of an endpoint (`tests.chat_endpoint`): HTTP is real, no model is behind it.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from typing import Any

import pytest

from cdr.api_judge import ApiJudge, Verdict
from cdr.errors import FailReason, ModelError, RejectReason, SetupError
from cdr.reward_config import ApiSpec
from cdr.verdicts import JudgeCost
from tests.chat_endpoint import Reply, say, serve


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setattr("cdr.api_judge._BACKOFF_S", 0)


def make_api(base_url: str, **limits: Any) -> ApiSpec:
    return ApiSpec(base_url=base_url, api_key_variable="JUDGE_KEY", **limits)


def ask(api: ApiSpec, *questions: str) -> list[Verdict]:
    texts = [json.dumps([{"role": "user", "content": question}]) for question in questions]
    with ApiJudge("stub", api) as judge:
        return list(judge.ask(texts))


def answer(question: str, before: int) -> Reply | float:
    """Answer by the question's own word for what is to happen."""
    match question:
        case "busy once":
            return (429, {}) if not before else say("B")
        case "busy":
            return 503, {}
        case "slow":
            return 2.0
        case "against the rules":
            return 400, {"error": {"code": "content_filter", "message": "no"}}
        case "unknown":
            return 400, {"error": {"message": "no"}}
        case "too long for a proxy":
            return 413, {}
        case "behind a proxy":
            return 524, {}
        case "refused":
            return say(None, refusal="I can't help with that.")
        case "filtered":
            return say("", finish_reason="content_filter")
        case "odd":
            return 200, {"choices": []}
        case _:
            return say(question)


def test_every_answer_of_an_endpoint_has_its_name() -> None:
    expected: dict[str, tuple[str | None, str | None]] = {
        "A": ("A", None),
        "**b**": ("B", None),
        "Answer A.": ("A", None),
        "busy once": ("B", None),
        "A and B are alike": (None, RejectReason.JUDGE_UNCLEAR),
        "I cannot compare these.": (None, RejectReason.JUDGE_UNCLEAR),
        "refused": (None, RejectReason.JUDGE_REFUSED),
        "filtered": (None, RejectReason.JUDGE_REFUSED),
        "against the rules": (None, RejectReason.JUDGE_REFUSED),
        "unknown": (None, FailReason.JUDGE_ERROR),
        "too long for a proxy": (None, FailReason.JUDGE_ERROR),
        "behind a proxy": (None, FailReason.JUDGE_UNAVAILABLE),
        "busy": (None, FailReason.JUDGE_UNAVAILABLE),
        "slow": (None, FailReason.JUDGE_TIMEOUT),
        "odd": (None, FailReason.JUDGE_UNAVAILABLE),
    }
    with serve(answer) as endpoint:
        api = make_api(endpoint.base_url, timeout_s=0.3, retries=1)
        found = ask(api, *expected)
        counts = dict.fromkeys(expected, 0)
        for body in endpoint.asked:
            counts[body["messages"][-1]["content"]] += 1
            assert (body["model"], body["temperature"], body["key"]) == ("stub", 0, "Bearer secret")
    assert {
        question: (verdict.verdict, verdict.reason or verdict.error)
        for question, verdict in zip(expected, found, strict=True)
    } == expected
    # What may pass is tried again, what is decided is not.
    again = {"busy once", "busy", "slow", "behind a proxy"}
    assert counts == {question: 2 if question in again else 1 for question in expected}
    assert found[0].answered_by == "stub-2026"


def test_a_verdicts_price_is_of_the_tokens_that_the_endpoint_counted() -> None:
    with serve(answer) as endpoint:
        (verdict,) = ask(make_api(endpoint.base_url), "A")
    api = make_api(endpoint.base_url, prompt_price=10, answer_price=30)
    assert verdict.cost_usd(api) == pytest.approx((10 * 10 + 2 * 30) / 1e6)
    assert verdict.cost_usd(make_api(endpoint.base_url)) is None


def test_a_price_that_is_known_of_a_part_says_so() -> None:
    whole = JudgeCost(3, 30, 6, priced=3, cost_usd=0.25)
    part = JudgeCost(3, 20, 4, priced=2, cost_usd=0.25)
    assert whole.render().endswith("30 tokens read, 6 written, 0.2500 USD")
    assert "0.2500 USD for 2 of them" in part.render()
    assert (part.metrics()["judge_cost_usd"], part.metrics()["judge_questions_priced"]) == (0.25, 2)
    unknown = JudgeCost(3, 30, 6)
    assert "cost not known" in unknown.render()
    assert unknown.metrics() == unknown.counts()


def test_requests_are_begun_no_faster_than_allowed() -> None:
    def busy_once(question: str, before: int) -> Reply:
        return say("A") if before else (503, {})

    with serve(busy_once) as endpoint:
        api = make_api(endpoint.base_url, requests_per_minute=600)  # one in 0.1 s
        begin = time.monotonic()
        ask(api, *"1234")
        # Four questions, each asked twice; the first request begins at once.
        assert len(endpoint.asked) == 8
        assert time.monotonic() - begin >= 0.7


def test_a_requests_body_is_what_extra_makes_of_it() -> None:
    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 16}
    with serve(answer) as endpoint:
        with ApiJudge("stub", make_api(endpoint.base_url), extra=extra) as judge:
            list(judge.ask(['[{"content": "A"}]']))
        (body,) = endpoint.asked
    assert body.keys() == {"model", "messages", "max_completion_tokens", "key"}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, {}),
        (402, {}),
        (404, {}),
        (405, {}),
        # Anthropic's, when the money is out.
        (400, {"message": "Your credit balance is too low to access the Anthropic API."}),
        (400, {"code": "unsupported_parameter", "param": "max_tokens"}),
        (429, {"code": "insufficient_quota", "type": "insufficient_quota"}),
    ],
)
def test_an_endpoint_that_refuses_everything_ends_the_run_and_says_where(
    status: int, error: dict[str, Any]
) -> None:
    said = f"{error.get('message', '')} Your key is secret."
    with (
        serve(lambda *_: (status, {"error": {**error, "message": said}})) as endpoint,
        pytest.raises(ModelError, match=f"answered {status} for model 'stub': .*key is ") as caught,
    ):
        ask(make_api(endpoint.base_url, retries=0), "A")
    assert "secret" not in str(caught.value)
    assert endpoint.base_url in str(caught.value)


def test_what_was_answered_before_the_end_is_given_and_nothing_is_asked_after_it() -> None:
    texts = [json.dumps([{"content": str(number)}]) for number in range(6)]
    with (
        serve(lambda question, _: (402, {}) if question == "3" else say("A")) as endpoint,
        ApiJudge("stub", make_api(endpoint.base_url, concurrency=1)) as judge,
    ):
        asked = judge.ask(texts)
        verdicts = [(found.verdict, found.error) for found in islice(asked, len(texts))]
        with pytest.raises(ModelError, match="answered 402"):
            next(asked)
    assert len(endpoint.asked) == 4
    assert verdicts == [("A", None)] * 3 + [(None, FailReason.NOT_SCORED)] * 3


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(SetupError, match="variable JUDGE_KEY is not set"):
        ask(make_api("http://127.0.0.1:1"), "A")
