"""Errors and reject reasons: every way in which a run, a row or a request can be refused.

Every error says what was wrong, where, and what to do. Jobs turn the classes below into exit codes
(`CdrError.exit_code`). A problem of one row is a `RowRejected` inside the library and a
`RejectReason` in the tables; it never ends a run. docs/reference/errors.md is written from here and
from the places that raise (`cdr.error_reference`): a text below a reason is its row on that page.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

_WHEEL = "make setup in a checkout; else pip install 'cdr_annotate-VERSION-py3-none-any.whl"
INSTALL_SPARK, INSTALL_TRAINING = f"{_WHEEL}[spark]'", f"{_WHEEL}[training]'"
"""What to do where an optional part of the package is missing."""


class CdrError(Exception):
    """Base of all errors a user can cause or cure.

    Args:
        what: one sentence: the rule, and what was given instead.
        where: file, table, key or row the problem is in; None when the sentence says it.
        fix: what to do next; None when nothing but the sentence helps.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class ConfigError(CdrError):
    """The configuration is wrong; holds every problem found, not only the first.

    Args:
        problems: one line per problem, `key: expected ..., got ...`.
        where: file the configuration came from.
        fix: what to do next.
    """

    exit_code = 2

    def __init__(
        self, problems: Sequence[str], *, where: str | None = None, fix: str | None = None
    ) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in the config"
        what = "\n".join([count, *(f"    {problem}" for problem in problems)])
        super().__init__(what, where=where, fix=fix or "see docs/reference/config.md")


class InputError(CdrError):
    """An input table, file or column cannot be used at all."""

    exit_code = 2


class SetupError(CdrError):
    """Java, Delta's classes, a device or a package is missing on this machine."""

    exit_code = 2


class ModelError(CdrError):
    """A model cannot be found, loaded, or used with what it was asked for."""

    exit_code = 2


class EngineError(CdrError):
    """An engine or its host failed: the tail of its log says why. Spark tries the task again."""


class EngineDied(EngineError):  # noqa: N818 - an event first: the host loads it again
    """An engine's own process (vLLM's core) ended: the engine has to be loaded again.

    Raised by engines. The host then closes the engine, and the client narrows the request down to
    the completions that it dies of, as when the host itself dies.
    """


class TableError(CdrError):
    """A table of the warehouse has another schema version, or cannot be read or written."""


class TrainingError(CdrError):
    """A training cannot go on: its loss or its gradients are no longer finite."""


class Stopped(Exception):  # noqa: N818 - an outcome, not an error of the program
    """A run ends early in good order; the message says why."""


class RejectReason(StrEnum):
    """Why a row was refused for good; the value is what tables hold in `reason`."""

    NULL_PROMPT = "null_prompt"
    """The prompt is null; with layout `joined`, a completion whose prompt is missing. Mend the
    input."""
    EMPTY_PROMPT = "empty_prompt"
    """The prompt is blank or has no messages. Mend the input."""
    BAD_MESSAGES = "bad_messages"
    """Roles, order or content of the messages are wrong: `system`, `user` and `assistant` with
    text each, the last one the user's."""
    NULL_COMPLETION = "null_completion"
    """The completion is null or not text. Mend the input."""
    EMPTY_COMPLETION = "empty_completion"
    """The completion is blank: the policy ended its turn at once. Nothing to do, or sample
    again."""
    UNEVEN_ARRAYS = "uneven_arrays"
    """With layout `array`, the ids, finish reasons or items of `columns.per_completion` are more
    or fewer than the completions."""
    DUPLICATE_ID = "duplicate_id"
    """A `prompt_id` with two prompts, or a `completion_id` twice in a prompt: map other
    columns, or none."""
    UNKNOWN_DOMAIN = "unknown_domain"
    """The domain column holds a name that the prompt pack does not have."""
    UNKNOWN_SECTION = "unknown_section"
    """A labelled pair's section is none of the config's `sections`: list it there, or map
    another column."""
    UNKNOWN_SUBSET = "unknown_subset"
    """A labelled pair's subset belongs to no section: list it, or map another column."""
    EQUAL_COMPLETIONS = "equal_completions"
    """Chosen and rejected of a labelled pair are the same text: there is nothing to judge."""
    SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
    r"""The text holds a control token such as `<\|im_end\|>`, which could forge a turn;
    `reward.encoding.special_tokens_in_text: as_text` takes it as ordinary text."""
    TOO_LONG = "too_long"
    """Prompt and completion exceed the model's `max_length`: raise it as far as the model
    goes, or set `reward.encoding.drop_exemplar_when_too_long`."""
    TEMPLATE_REFUSED = "template_refused"
    """The chat template does not take these turns: see `reward.encoding.template`."""
    BOUNDARY_UNSTABLE = "boundary_unstable"
    """The tokenizer has no ids for this text behind the template. Rare: look at the row."""
    OUTSIDE_VOCABULARY = "outside_vocabulary"
    """The tokenizer gives an id without an embedding: it has more added tokens than the model."""
    NO_OTHER_CANDIDATE = "no_other_candidate"
    """A judge compares, and the prompt has one candidate only: sample more of them."""
    JUDGE_REFUSED = "judge_refused"
    """The judge refuses to answer a question about this completion, or the question is too long for
    it; it is not asked again."""
    JUDGE_UNCLEAR = "judge_unclear"
    """The judge's answer to a question about this completion is neither A nor B; it is not asked
    again."""


class RowRejected(Exception):  # noqa: N818 - a verdict on a row, not an error of the program
    """One row (or one prompt with all its candidates) is refused for good.

    Args:
        reason: the enumerated reason.
        detail: what exactly, without quoting the user's text; ids, counts and limits only.
    """

    def __init__(self, reason: RejectReason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason.value}: {detail}")


class FailReason(StrEnum):
    """Why a row has no score this time; it is tried again on the next run."""

    NON_FINITE_LOGPROB = "non_finite_logprob"
    """The engine gave NaN or infinity: try `dtype: float32`, or another engine."""
    ENGINE_DIED_TWICE = "engine_died_twice"
    """The engine host died twice of this completion alone, mostly for want of memory: lower
    `max_length` or `batch_tokens`; the host's log has its last words."""
    ENGINE_ERROR = "engine_error"
    """The engine refused this request; `rewards.error` and the host's log say why. Run again."""
    INCOMPLETE_PROMPT = "incomplete_prompt"
    """A registered judge was called with another number of the prompt's rows than
    `num_candidates` says, and asked nothing: give a call whole prompts, see
    docs/how-to/registry.md. Never in a job's tables."""
    NOT_SCORED = "not_scored"
    """The run ended before its turn, or a wave was given up. Run again."""
    JUDGE_TIMEOUT = "judge_timeout"
    """The judge's endpoint did not answer in time, in all tries. Run again; `api.timeout_s`."""
    JUDGE_UNAVAILABLE = "judge_unavailable"
    """The judge's endpoint was down or refused for now, in all tries. Run again, or ask less at a
    time: `api.concurrency`, `api.requests_per_minute`."""
    JUDGE_ERROR = "judge_error"
    """The judge's endpoint answered with an error that is not known as a refusal, nor as one that
    every question would get; the executor's log has its status and code. Run again."""


class NoPairReason(StrEnum):
    """Why a prompt gave no preference pair."""

    ONE_CANDIDATE = "one_candidate"
    """Fewer than two scored candidates: sample more per prompt, or see why the others were
    left out."""
    TIE = "tie"
    """The best reward is not above the rejected one's: equal texts, or models without a
    difference."""
    BELOW_MIN_MARGIN = "below_min_margin"
    """The margin is below `pairs.min_margin`."""
    OUTSIDE_LENGTH_WINDOW = "outside_length_window"
    """No candidate has a length near the chosen one's, and `pairs.fallback` is `no_pair`."""
