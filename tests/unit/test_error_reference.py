"""The page of errors: what is found in code, and that the page and every error are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdr.error_reference import Raised, read_errors, render_error_reference
from cdr.errors import (
    ConfigError,
    EngineError,
    FailReason,
    InputError,
    NoPairReason,
    RejectReason,
    SetupError,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"

SAMPLE = '''"""Sample module: for the test."""
from pydantic import BaseModel
from cdr.errors import ConfigError, InputError, SetupError
from cdr.texts import FAR

_MOST = 3
_REMEDY = "take fewer"

def count(rows, name):
    if len(rows) > _MOST:
        raise InputError(f"at most {_MOST} rows, got {len(rows)} of {', '.join(name)}", fix=_REMEDY)
    problems = []
    problems.append(f"{name}: is wrong")
    problems += [f"{row.key}: is worse" for row in rows]
    if problems:
        raise ConfigError(problems, fix="first" if rows else FAR)

def refuse(what, *, fix):
    return SetupError(what, where="here", fix=fix)

def callers(place):
    raise refuse(f"no {place}", fix="make it")
    raise refuse("too " + str(place), fix="shrink it")

class Model(BaseModel):
    def check(self):
        raise ValueError("a, b: only one of them")
'''


@pytest.fixture(scope="module")
def found() -> list[Raised]:
    return read_errors()


def read_sample(folder: Path) -> dict[str, Raised]:
    (folder / "cdr").mkdir()
    (folder / "cdr" / "sample.py").write_text(SAMPLE)
    (folder / "cdr" / "texts.py").write_text('FAR = "from afar"\n')
    return {error.what: error for error in read_errors(folder)}


def test_texts_are_followed_through_the_code(tmp_path: Path) -> None:
    found = read_sample(tmp_path)
    assert {what: (error.kind, error.fixes) for what, error in found.items()} == {
        "at most 3 rows, got {rows} of {name}": (InputError, ("take fewer",)),
        "{name}: is wrong": (ConfigError, ("first", "from afar")),
        "{key}: is worse": (ConfigError, ("first", "from afar")),
        # Each caller's sentence goes with that caller's remedy.
        "no {place}": (SetupError, ("make it",)),
        "too {place}": (SetupError, ("shrink it",)),
        "a, b: only one of them": (ConfigError, ()),
    }
    assert {error.area for error in found.values()} == {"Sample module"}


def test_page_shows_an_error_as_a_terminal_does(tmp_path: Path) -> None:
    page = render_error_reference(list(read_sample(tmp_path).values()))
    assert "## Setup (exit code 2)" in page
    assert "no {place}\n  fix: make it\n" in page


def test_page_is_what_the_code_says(found: list[Raised]) -> None:
    assert PAGE.read_text(encoding="utf-8") == render_error_reference(found), (
        "stale page: make docs"
    )


def test_every_error_says_what_to_do(found: list[Raised]) -> None:
    # A problem of a config is mended where it is named, and an engine's log says why it failed.
    silent = [
        f"{error.place}: {error.what}"
        for error in found
        if not error.fixes and not issubclass(error.kind, ConfigError | EngineError)
    ]
    assert silent == []


def test_every_error_is_read_from_the_code(found: list[Raised]) -> None:
    assert len(found) > 150
    # Nothing but a field: the reader could not follow where the sentence comes from.
    assert [e.place for e in found if e.what.startswith("{") and e.what.count("{") == 1
            and e.what.endswith("}")] == []  # fmt: skip


def test_every_reason_has_its_row() -> None:
    page = PAGE.read_text(encoding="utf-8")
    reasons = [*RejectReason, *FailReason, *NoPairReason]
    assert [reason for reason in reasons if f"| `{reason.value}` | " not in page] == []
