"""Errors and reject reasons: every way in which a run, a row or a request can be refused.

Every error says what was wrong, where, and what to do. Jobs turn the classes below into exit codes
(`CdrError.exit_code`). A problem of one row is a `RowRejected` inside the library and a
`RejectReason` in the tables; it never ends a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


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
    """An engine or its host failed; the message ends with the tail of the host's log."""


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
    EMPTY_PROMPT = "empty_prompt"
    BAD_MESSAGES = "bad_messages"
    NULL_COMPLETION = "null_completion"
    EMPTY_COMPLETION = "empty_completion"
    UNEVEN_ARRAYS = "uneven_arrays"
    DUPLICATE_ID = "duplicate_id"
    UNKNOWN_DOMAIN = "unknown_domain"
    UNKNOWN_SECTION = "unknown_section"
    UNKNOWN_SUBSET = "unknown_subset"
    EQUAL_COMPLETIONS = "equal_completions"
    SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
    TOO_LONG = "too_long"
    TEMPLATE_REFUSED = "template_refused"
    BOUNDARY_UNSTABLE = "boundary_unstable"
    OUTSIDE_VOCABULARY = "outside_vocabulary"
    NO_OTHER_CANDIDATE = "no_other_candidate"
    JUDGE_REFUSED = "judge_refused"
    JUDGE_UNCLEAR = "judge_unclear"


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
    ENGINE_DIED_TWICE = "engine_died_twice"
    ENGINE_ERROR = "engine_error"
    NOT_SCORED = "not_scored"
    JUDGE_TIMEOUT = "judge_timeout"
    JUDGE_UNAVAILABLE = "judge_unavailable"


class NoPairReason(StrEnum):
    """Why a prompt gave no preference pair."""

    ONE_CANDIDATE = "one_candidate"
    TIE = "tie"
    BELOW_MIN_MARGIN = "below_min_margin"
    OUTSIDE_LENGTH_WINDOW = "outside_length_window"
