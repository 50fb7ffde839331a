"""What endpoints' errors mean, by their own bodies; a refusal needs a known sign."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cdr.endpoint_errors import EndpointError, Meaning

ENDS, REFUSED, UNKNOWN, FOR_NOW = (
    Meaning.ENDS_RUN, Meaning.REFUSED, Meaning.UNKNOWN, Meaning.FOR_NOW
)  # fmt: skip


def openai(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return {"error": error}


def anthropic(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


@pytest.mark.parametrize(
    ("status", "body", "meaning"),
    [
        # The question: its length, or what it is about.
        (400, openai("...", "context_length_exceeded", "messages"), REFUSED),
        (400, openai("...", "content_filter", "prompt"), REFUSED),
        (400, anthropic("prompt is too long: 215000 tokens > 200000 maximum"), REFUSED),
        (400, anthropic("Output blocked by content filtering policy"), REFUSED),
        (413, anthropic("Request exceeds the maximum size", "request_too_large"), REFUSED),
        # vLLM's; what it suggests is about a parameter, what it says is about the question.
        (
            400,
            openai("'max_tokens' is too large: 16. This model's maximum context length is 512 "
                   "tokens and your request has 500 input tokens.", param="max_tokens"),
            REFUSED,
        ),
        (422, {"error": "`inputs` must have less than 10 tokens."}, REFUSED),
        # The request or the account: no question would do.
        (400, anthropic("Your credit balance is too low to access the Anthropic API."), ENDS),
        (400, anthropic("You have reached your specified API usage limits."), ENDS),
        (400, anthropic("max_completion_tokens: Extra inputs are not permitted"), ENDS),
        (400, anthropic("`temperature` is deprecated for this model."), ENDS),
        (400, openai("Unsupported parameter: 'max_tokens' ...", "unsupported_parameter"), ENDS),
        (400, openai("Unsupported value: 'temperature' ...", "unsupported_value"), ENDS),
        (400, openai("Invalid value.", "invalid_value", "temperature"), ENDS),
        (400, openai("gpt-9 is not a valid model ID"), ENDS),
        (400, [{"error": {"code": 400, "message": "API key not valid."}}], ENDS),
        (429, openai("You exceeded your current quota.", "insufficient_quota"), ENDS),
        (402, {}, ENDS),
        (405, {}, ENDS),
        # A filter's word in an account's error is no refusal of the question.
        (403, openai("Your account's content filter is not approved."), ENDS),
        # What another try may change.
        (429, openai("Rate limit reached: lower max_tokens", "rate_limit_exceeded"), FOR_NOW),
        (500, openai("context length"), FOR_NOW),
        (520, {}, FOR_NOW),
        # Nothing that is known: never stored.
        (400, openai("Something is odd.", param="messages[0].content"), UNKNOWN),
        (413, {}, UNKNOWN),
        (413, openai("Request too large: tokens per minute", "rate_limit_exceeded"), UNKNOWN),
        (422, {"detail": [{"loc": ["body"], "msg": "no"}]}, UNKNOWN),
        (418, [], UNKNOWN),
        (400, None, UNKNOWN),
    ],
)  # fmt: skip
def test_an_errors_meaning_is_told_by_its_words_then_by_its_status(
    status: int, body: Any, meaning: Meaning
) -> None:
    assert EndpointError.read(status, json.dumps(body)).meaning is meaning


def test_a_proxys_page_is_told_by_its_status_alone() -> None:
    page = "<html>prompt is too long</html>"
    assert [EndpointError.read(status, page).meaning for status in (413, 403, 502)] == [
        UNKNOWN, ENDS, FOR_NOW
    ]  # fmt: skip
