"""A reward as a function of rows: route, encode, score, weigh, in this process and without Spark.

The engine host is asked here as tasks of a run ask it, and every step is the run's own function
(`cdr.prompt_router`, `cdr.encoding`, `cdr.questions`, `cdr.reward`), so that a row gets the reward
that `jobs/annotate.py` gives it. What a run keeps in tables is not read or written: a call scores
what it is given, each distinct completion once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cdr.candidate_rows import CandidateRow, hash_messages, read_row
from cdr.chat import Message
from cdr.encoding import Candidate, EncodedPrompt, PromptEncoder, ids_hash
from cdr.engines.access import hold_engines
from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs
from cdr.engines.wire import Outcome
from cdr.errors import ConfigError, FailReason, RowRejected
from cdr.placement import share_device
from cdr.plan import RewardPlan
from cdr.prompt_router import PromptRouter, Route
from cdr.questions import Question, cut_requests, describe_error, sum_logprobs
from cdr.reward import reward_value, strong_term, weak_term

REQUEST_TOKENS = 65_536
"""Tokens per request to an engine; the default of a run's `run.request_tokens`."""

_Key = tuple[str, bytes, bytes]
"""Model key, prefix hash, completion hash: as in `logprobs`."""
_Ending = tuple[str, bool]
"""A completion's text, and whether it was cut: all that decides its ids for a prompt."""


@dataclass(frozen=True)
class RewardRow:
    """What became of one row.

    Args:
        reward: nats (nats per token for `mean`); None unless `status` is `ok`.
        domain: domain whose instruction conditioned the prompt; None for none.
        strong_logprob: sum of the first positive term, nats; None unless `ok`, or for no term.
        weak_logprob: the same of the first negative term.
        num_tokens: completion tokens of the first term's model; None unless `ok`.
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


@dataclass(frozen=True)
class _Answer:
    """A completion's log-prob sum under one view, or why there is none."""

    logprob_sum: float | None
    num_tokens: int
    error: str | None


class RewardModel:
    """Scores rows by a plan; loads tokenizers once, models in the engine host.

    Args:
        plan: the checked reward.
    """

    def __init__(self, plan: RewardPlan) -> None:
        self._plan = plan
        self._terms = plan.spec.resolved_terms()
        self._encoder: PromptEncoder | None = None
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
        too long with its exemplar loses it for all of them alike.

        Args:
            rows: see `cdr.candidate_rows.read_row`.
            placement: `colocated` loads all scoring models together, `sequential` one after the
                other, for models that only fit a device alone.
            request_tokens: tokens per request to an engine.

        Returns:
            One row per row, in order; none is dropped.

        Raises:
            ConfigError: `placement` is something else.
            EngineError: the host or a model cannot be started.
            SetupError: there are fewer GPUs than a model needs.
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
        prompts: dict[tuple[str, str | None], _Prompt] = {}
        for row in read:
            if isinstance(row, CandidateRow):
                name = hash_messages(row.messages), row.domain
                if name not in prompts:
                    prompts[name] = _Prompt(row.messages, *name, {})
                prompts[name].add(row)
        routes = self._route(list(prompts.values()), sets, request_tokens)
        encoded = [self._encode(*pair) for pair in zip(prompts.values(), routes, strict=True)]
        answers = self._ask([e for e in encoded if e is not None], sets, request_tokens)
        results = {
            name: self._weigh(prompt, route, whole, answers)
            for (name, prompt), route, whole in zip(prompts.items(), routes, encoded, strict=True)
        }
        return [
            _refusal(row)
            if isinstance(row, RowRejected)
            else results[(hash_messages(row.messages), row.domain)][_ending(row)]
            for row in read
        ]

    def _read(self, row: Mapping[str, Any]) -> CandidateRow | RowRejected:
        try:
            return read_row(row, self._plan.given_domains)
        except RowRejected as refusal:
            return refusal

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

    def _encode(self, prompt: _Prompt, route: Route) -> EncodedPrompt | None:
        """Encode a prompt; None where its route failed."""
        if route.error is not None:
            return None
        encoder = self._encoder = self._encoder or PromptEncoder(self._plan.encoding)
        candidates = list(prompt.candidates.values())
        return encoder.encode(prompt.messages, prompt.prompt_hash, route.domain, candidates)

    def _ask(
        self,
        encoded: Sequence[EncodedPrompt],
        sets: Sequence[tuple[EngineSpec, ...]],
        request_tokens: int,
    ) -> dict[_Key, _Answer]:
        questions = list(_questions(encoded))
        answers: dict[_Key, _Answer] = {}
        for engines in sets:
            names = {engine.name for engine in engines}
            asked = [question for question in questions if question.model_key in names]
            if not asked:
                continue
            with hold_engines(engines) as held:
                for request in cut_requests(asked, request_tokens):
                    outcomes = held.client.score_all(
                        {key: [q.group for q in part] for key, part in request.items()}
                    )
                    for key, part in request.items():
                        for question, found in zip(part, outcomes[key], strict=True):
                            answers.update(_answers(question, found))
        return answers

    def _weigh(
        self,
        prompt: _Prompt,
        route: Route,
        encoded: EncodedPrompt | None,
        answers: Mapping[_Key, _Answer],
    ) -> dict[_Ending, RewardRow]:
        """Give each completion of a prompt its reward."""
        if encoded is None:
            failed = _failure(route.error, None)
            return dict.fromkeys(prompt.candidates, failed)
        refused = {
            number: _refusal(RowRejected(reason, detail), route.domain)
            for number, reason, detail in encoded.rejected
        }
        by_number: dict[str, dict[tuple[str, str], _Answer]] = {}
        for view in encoded.views:
            prefix = ids_hash(view.prefix_ids)
            for candidate in view.candidates:
                answer = answers[(view.model_key, prefix, ids_hash(candidate.ids))]
                of_candidate = by_number.setdefault(candidate.completion_id, {})
                of_candidate[(view.model_key, view.condition)] = answer
        return {
            ending: refused.get(candidate.completion_id)
            or self._reward(by_number[candidate.completion_id], route.domain)
            for ending, candidate in prompt.candidates.items()
        }

    def _reward(self, by_view: Mapping[tuple[str, str], _Answer], domain: str | None) -> RewardRow:
        found = {
            (term.model, term.condition): by_view[
                (self._plan.models[term.model].model_key, term.condition)
            ]
            for term in self._terms
        }
        for answer in found.values():
            if answer.error is not None:
                return _failure(answer.error, domain)
        sums = {name: answer.logprob_sum or 0.0 for name, answer in found.items()}
        counts = {name: answer.num_tokens for name, answer in found.items()}
        try:
            reward = reward_value(self._terms, sums, counts, self._plan.spec.reduction)
        except ValueError:
            return _failure(FailReason.NOT_SCORED.value, domain)
        strong, weak = (
            None if term is None else sums[(term.model, term.condition)]
            for term in (strong_term(self._terms), weak_term(self._terms))
        )
        return RewardRow(reward, domain, strong, weak, next(iter(counts.values())), "ok", None)


def _ending(row: CandidateRow) -> _Ending:
    return row.completion, row.finish_reason == "length"


def _questions(encoded: Sequence[EncodedPrompt]) -> Iterator[Question]:
    """Ask for each (model, prefix, completion) once; neighbours share the longest prefix."""
    asked: set[_Key] = set()
    for prompt in sorted((p for p in encoded if p.views), key=_place):
        for view in sorted(prompt.views, key=lambda view: view.model_key):
            prefix = ids_hash(view.prefix_ids)
            wanted = {}
            for candidate in view.candidates:
                key = (view.model_key, prefix, ids_hash(candidate.ids))
                if key not in asked:
                    asked.add(key)
                    wanted[key[2]] = candidate.ids
            if wanted:
                group = ScoringGroup(view.prefix_ids, tuple(wanted.values()))
                yield Question(view.model_key, prefix, tuple(wanted), group)


def _place(prompt: EncodedPrompt) -> tuple[int, ...]:
    """Give a prompt's place among the others, as `cdr.scoring.score_wave` does."""
    first = min(prompt.views, key=lambda view: (view.model_key, -len(view.prefix_ids)))
    return first.prefix_ids


def _answers(
    question: Question, outcomes: Sequence[Outcome[TokenLogprobs]]
) -> Iterator[tuple[_Key, _Answer]]:
    for completion, ids, outcome in zip(
        question.completion_hashes, question.group.completions_ids, outcomes, strict=True
    ):
        value = None if outcome.value is None else sum_logprobs(outcome.value)
        key = (question.model_key, question.prefix_hash, completion)
        yield key, _Answer(value, len(ids), describe_error(outcome))


def _refusal(refusal: RowRejected, domain: str | None = None) -> RewardRow:
    return RewardRow(None, domain, None, None, None, "rejected", str(refusal))


def _failure(error: str | None, domain: str | None) -> RewardRow:
    return RewardRow(None, domain, None, None, None, "failed", error)
