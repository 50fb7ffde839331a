"""The reward: a weighted sum of the log-probs that models give a completion.

    r(x, y) = Σ_t  w_t · ℓ_t(x, y)        ℓ_t = log p_m(y | c(x)),  or that over m's token count

A term t asks one model m for one completion y under one condition c: `plain` is the prompt x,
`conditioned` is T(x), the prompt with its domain's instruction and exemplar, `unconditional` is an
empty prompt. The published forms are choices of terms (arXiv 2411.02481):

    density ratio (eq. 8)     + strong(T(x)) − weak(T(x))
    prompt delta  (eq. 10)    + strong(T(x)) − strong(x)
    PMI difference (app. B.2) + strong(T(x)) − strong() − weak(T(x)) + weak()

The maths is here twice: for one completion in plain Python (`reward_value`) and for a table as
Spark columns (`reward_column`). The two agree to the last bit. What is missing, NaN or infinite
never becomes a reward. No torch, no I/O.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from cdr.config import content_hash
from cdr.judge import JUDGE_KEY
from cdr.reward_config import Condition, RewardSpec, TermSpec

if TYPE_CHECKING:
    from pyspark.sql import Column

Reduction = Literal["sum", "mean"]


def term_name(term: TermSpec) -> str:
    """Give the key of a term in the `terms` map: `strong/conditioned`, for example."""
    return f"{term.model}/{term.condition}"


def strong_term(terms: Sequence[TermSpec]) -> TermSpec | None:
    """Give the term whose log-prob tables show as `strong_logprob`.

    Args:
        terms: the reward's terms, in order.

    Returns:
        The first term with a positive weight; None when all weights are negative.
    """
    return next((term for term in terms if term.weight > 0), None)


def weak_term(terms: Sequence[TermSpec]) -> TermSpec | None:
    """Give the term whose log-prob tables show as `weak_logprob`.

    Args:
        terms: the reward's terms, in order.

    Returns:
        The first term with a negative weight; None when all weights are positive.
    """
    return next((term for term in terms if term.weight < 0), None)


def reward_value(
    terms: Sequence[TermSpec],
    sums: Mapping[tuple[str, Condition], float],
    counts: Mapping[tuple[str, Condition], int],
    reduction: Reduction,
) -> float:
    """Compute the reward of one completion.

    Args:
        terms: the reward's terms, at least one.
        sums: log-prob of the whole completion in nats, by (model, condition).
        counts: scored tokens of the completion (>= 1), by (model, condition); each model has its
            own tokenizer. Read for `mean` only.
        reduction: `sum`, or `mean` per token of each term's own model.

    Returns:
        Nats for `sum`, nats per token for `mean`. Finite.

    Raises:
        KeyError: a term has no log-prob or no count.
        ValueError: a count is below 1, or the reward is not finite.

    Example:
        >>> terms = [
        ...     TermSpec(model="strong", condition="plain", weight=1.0),
        ...     TermSpec(model="weak", condition="plain", weight=-1.0),
        ... ]
        >>> sums = {("strong", "plain"): -12.0, ("weak", "plain"): -20.0}
        >>> reward_value(terms, sums, {}, "sum")
        8.0
    """
    reward = 0.0
    # Not the built-in sum(): from Python 3.12 on it compensates rounding, and Spark does not.
    for term in terms:
        name = (term.model, term.condition)
        logprob = sums[name]
        if reduction == "mean":
            if counts[name] < 1:
                raise ValueError(f"{term_name(term)}: num_tokens must be >= 1, got {counts[name]}")
            logprob /= counts[name]
        reward += term.weight * logprob
    if not math.isfinite(reward):
        raise ValueError(f"reward must be finite, got {reward}")
    return reward


def reward_column(terms: Sequence[TermSpec], reduction: Reduction) -> Column:
    """Build the reward of each row of a table with a `terms` column.

    Args:
        terms: the reward's terms, at least one.
        reduction: `sum`, or `mean` per token of each term's own model.

    Returns:
        A double: nats for `sum`, nats per token for `mean`. Null where a term is missing, has a
        null, or has no tokens under `mean`, and where the result would be NaN or infinite.
        Reads `terms`: map<string, struct<logprob_sum double, num_tokens int>> by `term_name`; the
        struct may hold more.
    """
    from pyspark.sql import functions as F

    def weighted(term: TermSpec) -> Column:
        entry = F.try_element_at("terms", F.lit(term_name(term)))
        logprob = entry["logprob_sum"]
        if reduction == "mean":
            # Division by zero is an error, not a null, under Spark 4's ANSI mode.
            logprob = F.when(entry["num_tokens"] >= 1, logprob / entry["num_tokens"])
        return F.lit(term.weight) * logprob

    # One check of the total is enough: weights are not 0, so a NaN or an infinity cannot cancel.
    return _finite(functools.reduce(operator.add, map(weighted, terms)))


def logprob_column(term: TermSpec | None) -> Column:
    """Build the log-prob sum of one term, for `strong_logprob` and `weak_logprob`.

    Args:
        term: from `strong_term` or `weak_term`.

    Returns:
        A double in nats (always the sum, whatever the reduction); null where `term` is None, and
        where the row has no finite log-prob for it. Reads `terms` as `reward_column` does.
    """
    from pyspark.sql import functions as F

    if term is None:
        return F.lit(None).cast("double")
    return _finite(F.try_element_at("terms", F.lit(term_name(term)))["logprob_sum"])


def reward_key(
    spec: RewardSpec,
    model_keys: Mapping[str, str],
    pack_key: str | None,
    route_key: str | None,
    template_hashes: Mapping[str, str],
) -> str:
    """Hash everything that decides a reward's numbers, and nothing that does not.

    Names, descriptions and file paths stay out: content stands in for them (models by their keys,
    the pack and the templates by their hashes), so that a renamed reward or a moved file keeps its
    key. The order of terms is part of it: it decides which ones tables show as strong and weak.

    Args:
        spec: the reward's configuration.
        model_keys: `model_key` by role in `spec.models`; read for the roles of the terms.
        pack_key: hash of the prompt pack's content; None without a pack.
        route_key: hash of all that decides a prompt's domain (`cdr.router.router_key`); None
            without a router.
        template_hashes: hash of the chat template and tokenizer in use, for the same roles.

    Returns:
        sha256 in hex.

    Raises:
        KeyError: a role that is read has no model key or template hash.
    """

    def model(role: str) -> dict[str, object]:
        return {
            "model_key": model_keys[role],
            "template": template_hashes[role],
            # Decides which prompts are too long, or lose their exemplar.
            "max_length": spec.models[role].max_length,
        }

    routing = spec.routing
    return content_hash(
        {
            "terms": [
                {**model(term.model), "condition": term.condition, "weight": term.weight}
                for term in spec.resolved_terms()
            ],
            "reduction": spec.reduction,
            "pack_key": pack_key,
            "routing": routing.model_dump(mode="json", exclude={"model"}),
            "router": route_key,
            "encoding": spec.encoding.model_dump(mode="json", exclude={"template"}),
            "seed": spec.seed,
            **({"judge": JUDGE_KEY} if spec.is_judge else {}),
        }
    )


def _finite(value: Column) -> Column:
    """Turn NaN and infinities into null."""
    from pyspark.sql import functions as F

    # Spark orders NaN above infinity, so this comparison refuses both.
    return F.when(F.abs(value) < F.lit(math.inf), value)
