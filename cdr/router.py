"""Zero-shot router: ask a model which domain a prompt belongs to, by scoring labels.

The model is never asked to write: each domain has a label, and the label's log-prob as the answer
to a classification task decides. So every answer can be read, and low confidence is seen. Pure
functions; models are asked by the stage that routes.

Small models favour some labels whatever the prompt. Contextual calibration takes that out: the
same task with a content-free conversation gives each label's prior, which is subtracted.

Sources: arXiv 2411.02481, section 3.2 (zero-shot router); Zhao et al., "Calibrate Before Use",
arXiv 2102.09690 (contextual calibration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cdr.config import content_hash
from cdr.errors import RejectReason, RowRejected
from cdr.prompt_pack import PromptPack, render

if TYPE_CHECKING:
    from cdr.chat import Message

CONTENT_FREE_QUERY = "N/A"
"""Stands for a prompt about nothing, in calibration."""


@dataclass(frozen=True)
class RouteDecision:
    """The domain of a prompt, and how sure the router was.

    Args:
        domain: the domain to use.
        confidence: share of the best label in the softmax over all labels, in (0, 1]; None when
            the log-probs do not give one.
        source: `router`, or `fallback` when it was not sure enough.
    """

    domain: str
    confidence: float | None
    source: Literal["router", "fallback"]


def router_messages(
    messages: Sequence[Message], pack: PromptPack, domains: Sequence[str]
) -> list[Message]:
    """Write the classification task for one prompt.

    The last message is shown in full. Of each earlier one (system message included) the first
    `router.earlier_turn_chars` characters are shown, and what is left out is marked with its
    length: earlier turns say what a short follow-up is about, and do not need their full text.

    Args:
        messages: the prompt x, at least one message.
        pack: where the task's wording, labels and descriptions come from.
        domains: what may be chosen, in the order listed to the model.

    Returns:
        A system message and a user turn. All that does not depend on x comes first, so that
        prompts share it as a prefix.

    Raises:
        RowRejected: there is no message (`bad_messages`).
        KeyError: a domain is not in the pack.
    """
    if not messages:
        raise RowRejected(RejectReason.BAD_MESSAGES, "the prompt has no message")
    choices = [
        {"label": spec.router_label, "description": spec.description}
        for spec in (pack.domains[name] for name in domains)
    ]
    limit = pack.router.earlier_turn_chars
    turns = [(message["role"], _shorten(message["content"], limit)) for message in messages[:-1]]
    turns.append((messages[-1]["role"], messages[-1]["content"]))
    conversation = "\n".join(f"{role.capitalize()}: {content}" for role, content in turns)
    task = render(pack.router.task, domains=choices, conversation=conversation)
    return [
        {"role": "system", "content": render(pack.router.system, domains=choices)},
        {"role": "user", "content": task},
    ]


def content_free_messages(pack: PromptPack, domains: Sequence[str]) -> list[Message]:
    """Write the task whose label log-probs are the prior of calibration.

    Args:
        pack: as in `router_messages`.
        domains: as in `router_messages`, in the same order.
    """
    return router_messages([{"role": "user", "content": CONTENT_FREE_QUERY}], pack, domains)


def decide_domain(
    label_logprobs: Mapping[str, float],
    *,
    threshold: float,
    fallback: str,
    num_tokens: Mapping[str, int] | None = None,
    prior_logprobs: Mapping[str, float] | None = None,
) -> RouteDecision:
    """Choose the domain whose label is likeliest.

    Args:
        label_logprobs: sum of the label's token log-probs in nats, per domain; at least one.
        threshold: least confidence, in [0, 1], to follow the router.
        fallback: the domain otherwise.
        num_tokens: tokens of each label. Where any has several, all log-probs are divided by
            their own count, or else the longest label could hardly win. None: one token each.
        prior_logprobs: sums of the same labels after `content_free_messages`; they are subtracted
            (contextual calibration). None: no calibration.

    Returns:
        The decision. Ties go to the name first in alphabetical order. A log-prob or prior that is
        NaN, and -inf for all labels, give the fallback with confidence None.
    """
    scores = {}
    for name, logprob in label_logprobs.items():
        prior = prior_logprobs[name] if prior_logprobs is not None else 0.0
        scores[name] = (logprob - prior) / (num_tokens[name] if num_tokens is not None else 1)
    best = max(sorted(scores), key=lambda name: scores[name])
    # -inf is an impossible label and may stand; a best of ±inf or any NaN says nothing.
    if any(math.isnan(score) for score in scores.values()) or math.isinf(scores[best]):
        return RouteDecision(fallback, None, "fallback")
    confidence = 1.0 / math.fsum(math.exp(score - scores[best]) for score in scores.values())
    if confidence < threshold:
        return RouteDecision(fallback, confidence, "fallback")
    return RouteDecision(best, confidence, "router")


def router_key(
    pack: PromptPack,
    model_key: str,
    domains: Sequence[str],
    *,
    encoding_key: str,
    threshold: float,
    fallback: str,
    calibrate: bool,
) -> str:
    """Hash all that decides a route, besides the prompt.

    Args:
        pack: its task wording, and labels and descriptions of `domains`, enter; T's texts do not.
        model_key: the router model's key.
        domains: what may be chosen, in the order listed.
        encoding_key: hash of what turns messages into token ids, and of how many there may be.
        threshold: as in `decide_domain`.
        fallback: as in `decide_domain`.
        calibrate: whether priors are subtracted.

    Returns:
        Sha256 hex.
    """
    return content_hash(
        {
            "router": pack.router.model_dump(exclude={"domains"}),
            "choices": [
                [name, pack.domains[name].router_label, pack.domains[name].description]
                for name in domains
            ],
            "model_key": model_key,
            "encoding_key": encoding_key,
            "threshold": float(threshold),
            "fallback": fallback,
            "calibration": CONTENT_FREE_QUERY if calibrate else None,
        }
    )


def _shorten(content: str, limit: int) -> str:
    left_out = len(content) - limit
    return f"{content[:limit]} [{left_out} more characters]" if left_out > 0 else content
