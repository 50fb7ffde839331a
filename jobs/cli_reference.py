"""Reference page of every command, written from the parsers of the jobs.

    python -m jobs.cli_reference > docs/reference/cli.md

Not a job of its own. Each module of this folder with a `main` is on the page.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from unittest import mock

import jobs
from cdr import doctor

_INTRODUCTION = """\
# Commands

<!-- Written by `python -m jobs.cli_reference` from the parsers in jobs/ and cdr/doctor.py. -->

`jobs/NAME.py` is what Spark submits. The package installs most of them as a command too, `cdr-NAME`
(`cdr-annotate`), which starts Spark on this machine. Each prints what stands here with `--help`.
"""


class _Found(Exception):  # noqa: N818 - carries a parser out of a job
    """The parser with which a job was about to read its command line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def find_parser(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """Give the parser that a job reads its command line with, without running the job.

    Args:
        main: the job; parsing is the first thing it does.
    """

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main([])
        except _Found as found:
            return found.parser
    raise LookupError(f"{main} reads no command line")


def render_cli_reference() -> str:
    """Write the page: a section per command, one below it per subcommand; Markdown."""
    names = sorted(module.name for module in pkgutil.iter_modules(jobs.__path__))
    mains = {name: getattr(import_module(f"jobs.{name}"), "main", None) for name in names}
    page = [_INTRODUCTION]
    for name, main in mains.items():
        if main is not None:
            page += _sections(f"jobs/{name}.py", find_parser(main), "##")
    page += _sections("cdr-doctor", find_parser(doctor.main), "##")
    return "\n".join(page)


def _sections(title: str, parser: argparse.ArgumentParser, level: str) -> Iterator[str]:
    # Raw descriptions are docstrings: their indented lines are commands, which Markdown shows so.
    about = inspect.cleandoc(parser.description or "").split("\n\n")
    yield f"{level} `{title}`\n\n" + "\n\n".join(map(_paragraph, about)) + "\n"
    rows = [
        f"| `{_spelling(action)}` | {_meaning(action)} |"
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]
    if rows:
        yield "| option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"
    if epilog := parser.epilog:
        is_raw = parser.formatter_class is argparse.RawDescriptionHelpFormatter
        yield f"```text\n{epilog if is_raw else textwrap.fill(epilog, 90)}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _sections(f"{title} {name}", inner, f"{level}#")


def _paragraph(text: str) -> str:
    """Keep columns that stand below each other as they are."""
    has_columns = not text.startswith(" ") and re.search(r"\S {2,}\S", text)
    return f"```text\n{text}\n```" if has_columns else text


def _spelling(action: argparse.Action) -> str:
    """Write an option as it is typed, as `--limit N`."""
    name = ", ".join(action.option_strings) or action.dest
    if action.nargs == 0:
        return name
    metavar = action.metavar
    if metavar is None:
        choices = ",".join(map(str, action.choices or ()))
        metavar = f"{{{choices}}}" if choices else action.dest.upper()
    given = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    return f"{name} {given}{' ...' if action.nargs == '+' else ''}"


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "") % vars(action)
    notes = ["required"] if action.required else []
    is_shown = isinstance(action.default, str | int | float) and action.default != ""
    if is_shown and not isinstance(action.default, bool) and "default" not in text:
        notes.append(f"default: {action.default}")
    return text.replace("|", "\\|") + (f" ({', '.join(notes)})" if notes else "")


if __name__ == "__main__":
    print(render_cli_reference(), end="")
