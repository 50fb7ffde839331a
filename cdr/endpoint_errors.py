"""What an error of an OpenAI-compatible endpoint means: for the question, or for the whole run.

Endpoints share statuses, not their sense: 400 is a question that is too long, money that is out, or
a parameter that the model does not take. Only a known sign makes a refusal of it, since a refusal
is stored and never asked about again; what is not known is asked again by the next run.

Sources: error bodies of OpenAI, Azure OpenAI, Anthropic, and of the servers of vLLM, llama.cpp and
text-generation-inference.
Pure: no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

FOR_NOW = frozenset((408, 409, 425, 429, *range(500, 600)))
"""Statuses that another try may change; 520 to 529 are those of proxies and of busy endpoints."""
_OF_THE_RUN = frozenset((401, 402, 403, 404, 405))  # key, account, model or path

# Signs, in lower case: names are `error.code` and `error.type`, words are in `error.message`.
_REFUSAL_NAMES = frozenset(
    (
        "content_filter", "content_policy_violation",
        "context_length_exceeded", "exceed_context_size_error", "request_too_large",
        "string_above_max_length",
    )
)  # fmt: skip
_REFUSAL_WORDS = (
    "content filter", "content management policy", "prompt was flagged",
    "context length", "context size", "context window", "maximum model length",
    "prompt is too long", "`inputs` must have less than", "`inputs` tokens",
)  # fmt: skip
_RUN_NAMES = frozenset(
    (
        "billing_error", "billing_hard_limit_reached", "billing_not_active", "insufficient_quota",
        "invalid_api_key", "invalid_model", "model_not_found",
        "unknown_parameter", "unsupported_parameter", "unsupported_value",
    )
)  # fmt: skip
_RUN_WORDS = (
    "credit balance", "usage limits", "api key", "valid model",
    "unsupported parameter", "unrecognized request argument", "extra inputs are not permitted",
    "deprecated for this model", "max_tokens",
)  # fmt: skip


class Meaning(Enum):
    """What follows from an error."""

    FOR_NOW = auto()
    """Another try may do: busy, limited, down."""
    REFUSED = auto()
    """This question has no answer for good: filtered, or too long."""
    ENDS_RUN = auto()
    """No question will be answered: key, account, model, path or a parameter is wrong."""
    UNKNOWN = auto()
    """Nothing is known of it but its status."""


@dataclass(frozen=True)
class EndpointError:
    """An answer with a status of 400 or above.

    Args:
        status: of HTTP.
        names: `error.code` and `error.type`, in lower case.
        param: the field of the request that the error is about; None where it does not say.
        message: the endpoint's words; they may quote the request.
    """

    status: int
    names: frozenset[str] = frozenset()
    param: str | None = None
    message: str = ""

    @classmethod
    def read(cls, status: int, body: str) -> EndpointError:
        """Read an answer's body, JSON of any shape or something else."""
        try:
            found = json.loads(body)
        except ValueError:  # a proxy's page
            return cls(status)
        if isinstance(found, list) and found:  # Google's
            found = found[0]
        if isinstance(found, Mapping):
            found = found.get("error", found)  # vLLM's had its fields at the top
        if isinstance(found, str):  # Ollama's
            return cls(status, message=found)
        if not isinstance(found, Mapping):
            return cls(status)
        names = frozenset(str(found[key]).lower() for key in ("code", "type") if found.get(key))
        param = found.get("param")
        return cls(status, names, str(param) if param else None, str(found.get("message") or ""))

    @property
    def meaning(self) -> Meaning:
        """What follows from it."""
        words = self.message.lower()
        if self.status in FOR_NOW:  # a quota that is used up comes as a rate limit does
            return Meaning.ENDS_RUN if self.names & _RUN_NAMES else Meaning.FOR_NOW
        if self.status in _OF_THE_RUN:
            return Meaning.ENDS_RUN
        if self.names & _REFUSAL_NAMES or any(sign in words for sign in _REFUSAL_WORDS):
            return Meaning.REFUSED
        if self.names & _RUN_NAMES or any(sign in words for sign in _RUN_WORDS):
            return Meaning.ENDS_RUN
        # A field is named that is the same in every request.
        is_of_the_question = self.param is None or self.param.startswith(
            ("messages", "prompt", "input")
        )
        return Meaning.UNKNOWN if is_of_the_question else Meaning.ENDS_RUN
