"""From encoded prompts to the rewards of their candidates, in this process and without tables.

What `cdr.scoring`, `cdr.verdicts` and `cdr.weighing` do for a run: the engine host is asked as its
tasks ask it, and so is the endpoint of a judge behind an API. Nothing is kept: a call asks each
question once, and the next call asks it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cdr.api_judge import ApiJudge, Verdict
from cdr.encoding import EncodedPrompt, EncodedView, ids_hash
from cdr.engines.access import hold_engines
from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs
from cdr.engines.wire import Outcome
from cdr.errors import ConfigError, FailReason, RejectReason, RowRejected
from cdr.judge import LABELS, mean_odds
from cdr.plan import RewardPlan
from cdr.questions import Question, cut_requests, describe_error, sum_logprobs
from cdr.reward import reward_value, strong_term, weak_term

_CHUNK_VIEWS = 4096
"""Questions to a judge that are in memory at a time, or those of one prompt."""

_Key = tuple[str, bytes, bytes]
"""Model key, prefix hash, completion hash: as in `logprobs`."""


@dataclass(frozen=True)
class Weighed:
    """What became of a candidate: the columns of `cdr.weighing.weigh`.

    Args:
        reward: as in `rewards`; None without one.
        strong_logprob: sum of the first positive term, nats; None without a reward or such a term.
        weak_logprob: the same of the first negative term.
        num_tokens: tokens of the candidate; None without a reward.
        error: why there is no reward this time; None otherwise.
        refusal: why there is none for good; None otherwise.
    """

    reward: float | None = None
    strong_logprob: float | None = None
    weak_logprob: float | None = None
    num_tokens: int | None = None
    error: str | None = None
    refusal: RowRejected | None = None


def weigh_prompts(
    encoded: Iterable[EncodedPrompt],
    plan: RewardPlan,
    sets: Sequence[tuple[EngineSpec, ...]],
    request_tokens: int,
) -> list[dict[str, Weighed]]:
    """Ask what has to be asked, and give every candidate its reward.

    Args:
        encoded: by `cdr.judge_encoding.make_encoder`; a judge's prompts are taken as they are
            asked about.
        plan: the checked reward.
        sets: engines that are loaded together, one set after the other; not for a judge behind
            an API.
        request_tokens: tokens per request to an engine.

    Returns:
        Per prompt, all candidates by completion_id, those that the encoder refused among them.

    Raises:
        ConfigError: several Spark tasks ask a judge behind an API.
        EngineError: the host or a model cannot be started.
        ModelError: the endpoint refuses whatever it is asked.
        SetupError: the endpoint's key is not in the environment, or GPUs lack.
    """
    if not plan.spec.is_judge:
        prompts = list(encoded)
        answers = _ask_engines(prompts, sets, request_tokens)
        return [_weigh_terms(prompt, plan, answers) | _refused(prompt) for prompt in prompts]
    weighed: list[dict[str, Weighed]] = []
    for chunk in _cut_chunks(encoded):
        read: _Read
        if plan.spec.is_asked_by_api:
            read = partial(_read_verdict, _ask_endpoint(chunk, plan))
        else:
            read = partial(_read_log_odds, _ask_engines(chunk, sets, request_tokens))
        weighed += [_compare(prompt, read) | _refused(prompt) for prompt in chunk]
    return weighed


def _refused(encoded: EncodedPrompt) -> dict[str, Weighed]:
    return {
        name: Weighed(refusal=RowRejected(reason, detail))
        for name, reason, detail in encoded.rejected
    }


# --- a reward of log-prob terms -------------------------------------------------------------------


def _weigh_terms(
    encoded: EncodedPrompt, plan: RewardPlan, answers: Mapping[_Key, _Answer]
) -> dict[str, Weighed]:
    """Weigh the terms of each candidate."""
    by_candidate: defaultdict[str, dict[tuple[str, str], _Answer]] = defaultdict(dict)
    for view in encoded.views:
        prefix = ids_hash(view.prefix_ids)
        for candidate in view.candidates:
            answer = answers[(view.model_key, prefix, ids_hash(candidate.ids))]
            by_candidate[candidate.completion_id][(view.model_key, view.condition)] = answer
    return {name: _sum_terms(plan, by_view) for name, by_view in by_candidate.items()}


def _sum_terms(plan: RewardPlan, by_view: Mapping[tuple[str, str], _Answer]) -> Weighed:
    terms = plan.spec.resolved_terms()
    found = {
        (term.model, term.condition): by_view[(plan.models[term.model].model_key, term.condition)]
        for term in terms
    }
    for answer in found.values():
        if answer.error is not None:
            return Weighed(error=answer.error)
    sums = {name: answer.logprob_sum or 0.0 for name, answer in found.items()}
    counts = {name: answer.num_tokens for name, answer in found.items()}
    try:
        reward = reward_value(terms, sums, counts, plan.spec.reduction)
    except ValueError:
        return Weighed(error=FailReason.NOT_SCORED.value)
    strong, weak = (
        None if term is None else sums[(term.model, term.condition)]
        for term in (strong_term(terms), weak_term(terms))
    )
    return Weighed(reward, strong, weak, next(iter(counts.values())))


# --- a judge --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """What a question gave one of its answers.

    Args:
        odds: for it against the other, see `cdr.judge.mean_odds`; None without an answer.
        error: why there is none this time; None otherwise.
        reason: why there is none for good; None otherwise.
    """

    odds: float | None
    error: str | None = None
    reason: RejectReason | None = None

    def of_rival(self) -> _Finding:
        """Give what the other answer got."""
        return _Finding(None if self.odds is None else -self.odds, self.error, self.reason)


_Read = Callable[[EncodedView], _Finding]
"""Gives what a question found for the answer that is shown first."""


def _cut_chunks(encoded: Iterable[EncodedPrompt]) -> Iterator[list[EncodedPrompt]]:
    """Cut prompts to be asked together: one has a view, with its ids, for every two candidates."""
    chunk: list[EncodedPrompt] = []
    views = 0
    for prompt in encoded:
        chunk.append(prompt)
        views += len(prompt.views)
        if views >= _CHUNK_VIEWS:
            yield chunk
            chunk, views = [], 0
    if chunk:
        yield chunk


def _compare(encoded: EncodedPrompt, read: _Read) -> dict[str, Weighed]:
    """Give each candidate what it got against the others, on average; each view is a question."""
    found: defaultdict[str, list[_Finding]] = defaultdict(list)
    num_tokens: dict[str, int] = {}
    for view in encoded.views:
        of_first = read(view)
        first_letter = view.candidates[0].ids
        for candidate in view.candidates:
            is_first = candidate.ids == first_letter
            found[candidate.completion_id].append(of_first if is_first else of_first.of_rival())
            num_tokens[candidate.completion_id] = candidate.num_tokens
    return {name: _average(findings, num_tokens[name]) for name, findings in found.items()}


def _average(findings: Sequence[_Finding], num_tokens: int) -> Weighed:
    if reasons := [one.reason for one in findings if one.reason is not None]:
        detail = "a question about it has no verdict"
        return Weighed(refusal=RowRejected(max(reasons), detail))
    reward = mean_odds([one.odds for one in findings])
    if reward is None:
        errors = [one.error for one in findings if one.error is not None]
        return Weighed(error=max(errors, default=FailReason.NOT_SCORED.value))
    return Weighed(reward, num_tokens=num_tokens)


def _read_log_odds(answers: Mapping[_Key, _Answer], view: EncodedView) -> _Finding:
    """Give the log-odds of the first letter."""
    prefix = ids_hash(view.prefix_ids)
    first, second = (
        answers[(view.model_key, prefix, ids_hash(letter))]
        for letter in dict.fromkeys(candidate.ids for candidate in view.candidates)
    )
    if first.logprob_sum is None or second.logprob_sum is None:
        return _Finding(None, max(filter(None, (first.error, second.error)), default=None))
    return _Finding(first.logprob_sum - second.logprob_sum)


def _read_verdict(verdicts: Mapping[bytes, Verdict], view: EncodedView) -> _Finding:
    """Give 1 where the first letter was named, −1 where the other was."""
    found = verdicts[view.prefix_hash]
    if found.verdict is None:
        return _Finding(None, found.error and found.error.value, found.reason)
    return _Finding(1.0 if found.verdict == LABELS[0] else -1.0)


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """A completion's log-prob sum under one view, or why there is none."""

    logprob_sum: float | None
    num_tokens: int
    error: str | None


def _ask_engines(
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


def _ask_endpoint(encoded: Sequence[EncodedPrompt], plan: RewardPlan) -> dict[bytes, Verdict]:
    """Ask a judge behind an API; give its verdicts by prefix hash."""
    asked = {
        view.prefix_hash: view.question
        for prompt in encoded
        for view in prompt.views
        if view.question is not None
    }
    model = plan.spec.models["judge"]
    if not asked or model.api is None:
        return {}
    _refuse_several_tasks()
    with ApiJudge(model.path, model.api, extra=model.extra) as judge:
        return dict(zip(asked, judge.ask(list(asked.values())), strict=True))


def _refuse_several_tasks() -> None:
    """Refuse to ask an endpoint from several tasks, of which each would take its whole limits."""
    try:
        from pyspark import TaskContext  # clusters bring it; no other process is a task's
    except ImportError:
        return
    task = TaskContext.get()
    if task is not None and task.partitionId() > 0:
        raise ConfigError(
            ["models.judge.api: its limits hold for one Spark task at a time, got several"],
            where="the Spark function of a registered judge behind an API",
            fix="call it on one partition (DataFrame.coalesce(1)): api.concurrency says how many "
            "questions that one asks at a time; or annotate with jobs/annotate.py",
        )
