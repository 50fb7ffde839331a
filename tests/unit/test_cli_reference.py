"""The page of commands is what the parsers say, and every command is on it."""

from __future__ import annotations

import argparse
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from jobs import annotate, evaluate
from jobs.cli_reference import find_parser, render_cli_reference

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "cli.md"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_page_is_what_the_parsers_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_cli_reference(), "stale page: make docs"


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (annotate, ("--dry-run", "--limit", "exit codes", "examples")),
        (evaluate, ("--quick", "--compare", "--audit-router", "exit codes", "--limit")),
    ],
)
def test_help_teaches(
    job: ModuleType, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        job.main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for word in ("spark-submit", *words):
        assert word in said


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_option_of_an_installed_command_is_explained(command: str) -> None:
    module = SCRIPTS[command].split(":")[0]
    page = PAGE.read_text(encoding="utf-8")
    assert f"## `{module.replace('.', '/')}.py`" in page or f"## `{command}`" in page
    waiting = [find_parser(import_module(module).main)]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action.dest
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
