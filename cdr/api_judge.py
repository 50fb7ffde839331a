"""A judge behind an OpenAI-compatible endpoint: questions in, verdicts out, each paid for once.

    POST <base_url>/chat/completions    {"model": ..., "messages": [...], "temperature": 0, ...}

Whatever the endpoint does becomes a verdict, a reason why there is none for good (it refused, or
named neither A nor B), or an error to try again with the next run (it timed out, or was not to be
had after all tries). Retries and their pauses, `Retry-After` included, are urllib3's. No Spark.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cdr.errors import FailReason, ModelError, RejectReason, SetupError
from cdr.judge import LABELS
from cdr.reward_config import ApiSpec

_FOR_NOW = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that another try may change; 529 is Anthropic's for an overloaded endpoint."""
_BACKOFF_S = 1.0  # then 2, 4, ...
# A letter, perhaps with a word and marks around it: `A`, `**B**`, `Answer A.`
_LETTER = re.compile(rf"\W*(?:answer\W+)?({'|'.join(LABELS)})\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What came of one question.

    Args:
        verdict: `A` or `B`; None for neither.
        reason: why there is none for good; None otherwise.
        error: why there is none this time; None otherwise.
        prompt_tokens: tokens read, as the endpoint counts them; None where it does not say.
        answer_tokens: tokens written, likewise.
        answered_by: what the endpoint calls the model that answered.
    """

    verdict: str | None = None
    reason: RejectReason | None = None
    error: FailReason | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    answered_by: str | None = None

    def cost_usd(self, api: ApiSpec) -> float | None:
        """Give the price of the question and its answer; None where it is not known."""
        if None in (api.prompt_price, api.answer_price, self.prompt_tokens, self.answer_tokens):
            return None
        return (
            (self.prompt_tokens or 0) * (api.prompt_price or 0)
            + (self.answer_tokens or 0) * (api.answer_price or 0)
        ) / 1e6


class ApiJudge:
    """Asks one endpoint, several questions at a time; used as a context manager.

    Args:
        model: the endpoint's name of the model.
        api: endpoint and limits, over all tasks.
        tasks: how many tasks share the limits.

    Raises:
        SetupError: the key's variable is not set here.
    """

    def __init__(self, model: str, api: ApiSpec, tasks: int = 1) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        self._model, self._api = model, api
        self._url = f"{api.base_url.rstrip('/')}/chat/completions"
        threads = max(1, api.concurrency // tasks)
        self._pool = ThreadPoolExecutor(threads, "judge")
        self._turn = threading.Lock()
        self._pause_s = 60 * tasks / api.requests_per_minute if api.requests_per_minute else 0.0
        self._next_turn = time.monotonic()
        retry = Retry(
            total=api.retries,
            status_forcelist=_FOR_NOW,
            allowed_methods=None,  # a POST too: a question asked twice has the same answer
            backoff_factor=_BACKOFF_S,
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=threads, max_retries=retry))
        self._session.headers["Authorization"] = f"Bearer {read_key(api)}"

    def __enter__(self) -> ApiJudge:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._session.close()

    def ask(self, questions: Sequence[str]) -> Iterator[Verdict]:
        """Ask questions.

        Args:
            questions: each the JSON of its messages.

        Yields:
            One verdict per question, in order.

        Raises:
            ModelError: the endpoint refuses whatever it is asked: key, model or path are wrong.
        """
        return self._pool.map(self._ask, questions)

    def _ask(self, question: str) -> Verdict:
        import requests

        self._wait_for_turn()
        body = {
            "model": self._model,
            "messages": json.loads(question),
            "max_tokens": self._api.max_tokens,
            "temperature": 0,
        }
        try:
            response = self._session.post(self._url, json=body, timeout=self._api.timeout_s)
        except requests.Timeout:
            return Verdict(error=FailReason.JUDGE_TIMEOUT)
        except requests.RequestException as error:
            # Out of tries: urllib3 says so, and what the last one was.
            timed_out = "timed out" in str(error).lower()
            return Verdict(
                error=FailReason.JUDGE_TIMEOUT if timed_out else FailReason.JUDGE_UNAVAILABLE
            )
        if response.status_code in (401, 403, 404):
            raise ModelError(
                f"the endpoint answered {response.status_code} for model '{self._model}'",
                where=self._url,
                fix=f"check base_url, the model's name and the key in {self._api.api_key_variable}",
            )
        if response.status_code in _FOR_NOW:
            return Verdict(error=FailReason.JUDGE_UNAVAILABLE)
        if not response.ok:  # too long, or against the endpoint's rules
            return Verdict(reason=RejectReason.JUDGE_REFUSED)
        try:
            return read_answer(response.json())
        except (ValueError, KeyError, IndexError, TypeError):
            return Verdict(error=FailReason.JUDGE_UNAVAILABLE)

    def _wait_for_turn(self) -> None:
        if not self._pause_s:
            return
        with self._turn:
            begin = max(self._next_turn, time.monotonic())
            self._next_turn = begin + self._pause_s
        time.sleep(max(0.0, begin - time.monotonic()))


def read_answer(response: dict[str, Any]) -> Verdict:
    """Read an endpoint's answer.

    Raises:
        KeyError, IndexError, TypeError: it is not a chat completion.
    """
    choice = response["choices"][0]
    message, usage = choice["message"], response.get("usage") or {}
    text = (message.get("content") or "").strip()
    found = _LETTER.fullmatch(text)
    refused = message.get("refusal") or choice.get("finish_reason") == "content_filter"
    reason = None
    if found is None:
        reason = RejectReason.JUDGE_REFUSED if refused else RejectReason.JUDGE_UNCLEAR
    return Verdict(
        verdict=found[1].upper() if found else None,
        reason=reason,
        prompt_tokens=usage.get("prompt_tokens"),
        answer_tokens=usage.get("completion_tokens"),
        answered_by=response.get("model"),
    )


def read_key(api: ApiSpec) -> str:
    """Read the endpoint's key from the environment.

    Raises:
        SetupError: the variable is not set.
    """
    key = os.environ.get(api.api_key_variable)
    if not key:
        raise SetupError(
            f"the environment variable {api.api_key_variable} is not set",
            where="models.judge.api.api_key_variable",
            fix=f"export {api.api_key_variable}=... (any text where the endpoint takes no key), "
            f"and for executors set spark.executorEnv.{api.api_key_variable}",
        )
    return key
