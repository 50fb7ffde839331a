"""A judge behind an OpenAI-compatible endpoint: questions in, verdicts out, each paid for once.

    POST <base_url>/chat/completions    {"model": ..., "messages": [...], "temperature": 0, ...}

Whatever the endpoint does becomes a verdict, a reason why there is none for good (it refused, or
named neither A nor B), or an error to try again with the next run (it timed out, or was not to be
had after all tries). What its errors mean is told by `cdr.endpoint_errors`; an error that every
question would get ends the asking, after what was answered. Retries and their pauses, `Retry-After`
included, are urllib3's. No Spark.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from urllib3.util import Retry

from cdr.endpoint_errors import FOR_NOW, EndpointError, Meaning
from cdr.errors import FailReason, ModelError, RejectReason, SetupError
from cdr.judge import LABELS
from cdr.reward_config import ApiSpec

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

_log = logging.getLogger(__name__)

_BACKOFF_S = 1.0  # then 2, 4, ...
_MESSAGE_CHARS = 300  # of an endpoint's own words, in an error
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
        extra: further fields of the request's body; None as a value takes a default away.

    Raises:
        SetupError: the key's variable is not set here.
    """

    def __init__(
        self,
        model: str,
        api: ApiSpec,
        tasks: int = 1,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self._model, self._api, self._key = model, api, read_key(api)
        self._url = f"{api.base_url.rstrip('/')}/chat/completions"
        fields = {"max_tokens": api.max_tokens, "temperature": 0, **(extra or {})}
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._ended: EndpointError | None = None
        threads = max(1, api.concurrency // tasks)
        self._pool = ThreadPoolExecutor(threads, "judge")
        self._turn = threading.Lock()
        self._pause_s = 60 * tasks / api.requests_per_minute if api.requests_per_minute else 0.0
        self._next_turn = time.monotonic()
        retry = _PacedRetry(
            total=api.retries,
            status_forcelist=FOR_NOW,
            allowed_methods=None,  # a POST too: a question asked twice has the same answer
            backoff_factor=_BACKOFF_S,
            raise_on_status=False,
        )
        retry.wait_for_turn = self._wait_for_turn
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=threads, max_retries=retry))
        self._session.headers["Authorization"] = f"Bearer {self._key}"

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
            ModelError: behind the last verdict: the endpoint refuses whatever it is asked, since
                key, account, model, path or a parameter is wrong. Questions that it did not answer
                have the error `not_scored`; none is asked any more.
        """
        yield from self._pool.map(self._ask, questions)
        if self._ended is not None:
            # A key may stand in what an endpoint says of it.
            said = self._ended.message.replace(self._key, "...")[:_MESSAGE_CHARS]
            words = said and f": {said}"
            raise refuses_everything(
                f"the endpoint answered {self._ended.status} for model '{self._model}'{words}",
                self._api,
            )

    def _ask(self, question: str) -> Verdict:
        import requests

        if not self._ended:
            self._wait_for_turn()
        if self._ended:
            return Verdict(error=FailReason.NOT_SCORED)
        body = {"model": self._model, "messages": json.loads(question), **self._fields}
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
        if not response.ok:
            return self._judge_error(EndpointError.read(response.status_code, response.text))
        try:
            return read_answer(response.json())
        except (ValueError, KeyError, IndexError, TypeError):
            return Verdict(error=FailReason.JUDGE_UNAVAILABLE)

    def _judge_error(self, error: EndpointError) -> Verdict:
        match error.meaning:
            case Meaning.FOR_NOW:
                return Verdict(error=FailReason.JUDGE_UNAVAILABLE)
            case Meaning.REFUSED:
                return Verdict(reason=RejectReason.JUDGE_REFUSED)
            case Meaning.ENDS_RUN:
                self._ended = error
                return Verdict(error=FailReason.NOT_SCORED)
        # Not its message, which may quote the question.
        names = ", ".join(sorted(error.names)) or "no code"
        _log.warning("%s answered %d (%s)", self._url, error.status, names)
        return Verdict(error=FailReason.JUDGE_ERROR)

    def _wait_for_turn(self) -> None:
        if not self._pause_s:
            return
        with self._turn:
            begin = max(self._next_turn, time.monotonic())
            self._next_turn = begin + self._pause_s
        time.sleep(max(0.0, begin - time.monotonic()))


class _PacedRetry(Retry):
    """Further tries that wait for their turn, as the first one does: each is a request."""

    wait_for_turn: Callable[[], None]

    def new(self, **changes: Any) -> Self:
        fresh = super().new(**changes)
        fresh.wait_for_turn = self.wait_for_turn
        return fresh

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        super().sleep(response)
        self.wait_for_turn()


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


def refuses_everything(what: str, api: ApiSpec) -> ModelError:
    """Make the error of an endpoint that no question will get an answer from."""
    return ModelError(
        what,
        where=f"models.judge, {api.base_url}",
        fix="check base_url, the model's name, what `extra` adds to the request, the key in "
        f"{api.api_key_variable}, and the account's credit and limits; then the same command asks "
        "what is left",
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
