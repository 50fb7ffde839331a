"""A reward as a function of rows: route, encode, score, weigh, in this process and without Spark.

The engine host is asked here as tasks of a run ask it, and every step is the run's own function
(`cdr.prompt_router`, `cdr.judge_encoding`, `cdr.questions`, `cdr.reward`, `cdr.judge`), so that a
row gets the reward that `jobs/annotate.py` gives it. What a run keeps in tables is not read or
written: a call scores what it is given, each distinct completion once.

A judge's reward depends on the other candidates of the prompt. So its rows say how many there are
(`num_candidates`), and a prompt that a call does not hold whole is not asked about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cdr.candidate_rows import CandidateRow, PromptName, count_candidates, read_row
from cdr.chat import Message
from cdr.encoding import Candidate, EncodedPrompt
from cdr.engines.access import hold_engines
from cdr.engines.base import EngineSpec
from cdr.errors import ConfigError, FailReason, RowRejected
from cdr.judge_encoding import Encoder, make_encoder
from cdr.placement import share_device
from cdr.plan import RewardPlan
from cdr.prompt_router import PromptRouter, Route
from cdr.prompt_weighing import Weighed, weigh_prompts

REQUEST_TOKENS = 65_536
"""Tokens per request to an engine; the default of a run's `run.request_tokens`."""

_Ending = tuple[str, bool]
"""A completion's text, and whether it was cut: all that decides its ids for a prompt."""


@dataclass(frozen=True)
class RewardRow:
    """What became of one row.

    Args:
        reward: as in the table `rewards`; None unless `status` is `ok`.
        domain: domain whose instruction conditioned the prompt; None for none.
        strong_logprob: sum of the first positive term, nats; None unless `ok`, or for no term.
        weak_logprob: the same of the first negative term.
        num_tokens: completion tokens of the first term's model, or of the judge; None unless `ok`.
        status: `ok`, `rejected` (for good) or `failed` (may succeed another time).
        error: the reason, with detail behind a colon; None when `ok`.
    """

    reward: float | None
    domain: str | None
    strong_logprob: float | None
    weak_logprob: float | None
    num_tokens: int | None
    status: Literal["ok", "rejected", "failed"]
    error: str | None


@dataclass(frozen=True)
class _Prompt:
    """A prompt and its distinct completions, in the order in which they were first given."""

    messages: tuple[Message, ...]
    prompt_hash: str
    domain: str | None
    candidates: dict[_Ending, Candidate]

    def add(self, row: CandidateRow) -> None:
        """Take a row's completion in, if it is new."""
        ending = _ending(row)
        number = str(len(self.candidates))
        finish_reason = "length" if ending[1] else None
        self.candidates.setdefault(ending, Candidate(number, row.completion, finish_reason))


class RewardModel:
    """Scores rows by a plan; loads tokenizers once, models in the engine host.

    Args:
        plan: the checked reward.
    """

    def __init__(self, plan: RewardPlan) -> None:
        self._plan = plan
        self._encoder: Encoder | None = None
        self._router: PromptRouter | None = None

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        placement: str = "colocated",
        request_tokens: int = REQUEST_TOKENS,
    ) -> list[RewardRow]:
        """Give every row its reward.

        All rows of a prompt belong in one call: they share its forward pass, and a prompt that is
        too long with its exemplar loses it for all of them alike. For a judge they must be: a
        prompt of which the call holds another number of rows is `failed`.

        Args:
            rows: see `cdr.candidate_rows.read_row`; for a judge with `num_candidates` too, see
                `cdr.candidate_rows.count_candidates`.
            placement: `colocated` loads all scoring models together, `sequential` one after the
                other, for models that only fit a device alone.
            request_tokens: tokens per request to an engine.

        Returns:
            One row per row, in order; none is dropped.

        Raises:
            ConfigError: `placement` is something else, or several Spark tasks ask a judge behind
                an API.
            EngineError: the host or a model cannot be started.
            ModelError: an endpoint refuses whatever it is asked.
            SetupError: there are fewer GPUs than a model needs, or an endpoint's key is missing.
        """
        if placement not in ("colocated", "sequential"):
            raise ConfigError(
                [f"placement: must be 'colocated' or 'sequential', got {placement!r}"],
                fix="see docs/how-to/registry.md",
            )
        engines = self._plan.engines
        sets: list[tuple[EngineSpec, ...]] = [(engine,) for engine in engines]
        if placement == "colocated":
            sets = [share_device(engines)]
        read = [self._read(row) for row in rows]
        prompts: dict[PromptName, _Prompt] = {}
        for row in read:
            if isinstance(row, CandidateRow):
                name = row.prompt_name
                if name not in prompts:
                    prompts[name] = _Prompt(row.messages, *name, {})
                prompts[name].add(row)
        failed = self._find_incomplete(rows)
        asked = {name: prompt for name, prompt in prompts.items() if name not in failed}
        routes = self._route(list(asked.values()), sets, request_tokens)
        domains: dict[PromptName, str | None] = {}
        for name, route in zip(asked, routes, strict=True):
            if route.error is None:
                domains[name] = route.domain
            else:
                failed[name] = route.error
        encoded = (self._encode(prompts[name], domain) for name, domain in domains.items())
        weighed = weigh_prompts(encoded, self._plan, sets, request_tokens)
        by_prompt = dict(zip(domains, weighed, strict=True))

        def result(row: CandidateRow | RowRejected) -> RewardRow:
            if isinstance(row, RowRejected):
                return _refusal(row)
            name = row.prompt_name
            if name in failed:
                return _failure(failed[name], None)
            candidate = prompts[name].candidates[_ending(row)]
            return _as_row(by_prompt[name][candidate.completion_id], domains[name])

        return [result(row) for row in read]

    def _read(self, row: Mapping[str, Any]) -> CandidateRow | RowRejected:
        try:
            return read_row(row, self._plan.given_domains)
        except RowRejected as refusal:
            return refusal

    def _find_incomplete(self, rows: Sequence[Mapping[str, Any]]) -> dict[PromptName, str]:
        """Say which prompts a judge is not given whole; none of another reward's."""
        if not self._plan.spec.is_judge:
            return {}
        counted = count_candidates(rows, self._plan.given_domains).items()
        return {
            name: f"{FailReason.INCOMPLETE_PROMPT.value}: {count} of "
            f"{' or '.join(sorted('?' if one is None else str(one) for one in said))} candidates "
            "in this call"
            for name, (count, said) in counted
            if said != {count}
        }

    def _route(
        self,
        prompts: Sequence[_Prompt],
        sets: Sequence[tuple[EngineSpec, ...]],
        request_tokens: int,
    ) -> list[Route]:
        plan, routing = self._plan.route, self._plan.spec.routing
        if plan is None:
            fixed = routing.domain if routing.mode == "fixed" else None
            return [Route(p.domain or fixed, None, None, routing.mode, None) for p in prompts]
        if not prompts:
            return []
        router = self._router = self._router or PromptRouter(plan)
        # One that also scores is loaded as for scoring, so that it stays.
        scoring = {engine.name: engine for engines in sets for engine in engines}
        engine = scoring.get(plan.engine.name, plan.engine)
        with hold_engines([engine]) as held:
            return router.route(
                [prompt.messages for prompt in prompts],
                lambda groups: held.client.score(engine.name, groups),
                request_tokens,
            )

    def _encode(self, prompt: _Prompt, domain: str | None) -> EncodedPrompt:
        encoder = self._encoder = self._encoder or make_encoder(self._plan.encoding)
        candidates = list(prompt.candidates.values())
        return encoder.encode(prompt.messages, prompt.prompt_hash, domain, candidates)


def _ending(row: CandidateRow) -> _Ending:
    return row.completion, row.finish_reason == "length"


def _as_row(weighed: Weighed, domain: str | None) -> RewardRow:
    if weighed.refusal is not None:
        return _refusal(weighed.refusal, domain)
    if weighed.reward is None:
        return _failure(weighed.error, domain)
    return RewardRow(
        weighed.reward, domain, weighed.strong_logprob, weighed.weak_logprob, weighed.num_tokens,
        "ok", None,
    )  # fmt: skip


def _refusal(refusal: RowRejected, domain: str | None = None) -> RewardRow:
    return RewardRow(None, domain, None, None, None, "rejected", str(refusal))


def _failure(error: str | None, domain: str | None) -> RewardRow:
    return RewardRow(None, domain, None, None, None, "failed", error)
