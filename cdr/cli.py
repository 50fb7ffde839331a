"""What all jobs do around their work: read the command line, turn errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad config or input or setup, 3 finished above a threshold,
4 stopped early. YARN's cluster mode flattens them, so `runs` has the outcome too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from cdr.errors import CdrError, InputError
from cdr.unreadable import explain_unreadable

OK, FAILED, BAD_INPUT, OVER_THRESHOLD, STOPPED = 0, 1, 2, 3, 4

KEPT = "What was committed before is kept; the same command goes on from there."

EXIT_CODES = """\
exit codes: 0 done, 1 failed, 2 bad config, input or setup, 3 finished above a
threshold of rejected or failed rows, 4 stopped early (run again to go on)"""


def make_parser(description: str | None, *, config: str, epilog: str) -> argparse.ArgumentParser:
    """Make the command line of a job that takes a config.

    Args:
        description: the job's docstring; it opens with the `spark-submit` line.
        config: what kind of YAML it takes.
        epilog: what stands below the options.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help=config)
    override = "change one key of the config for this run, as in --set dataset=try; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    return parser


def make_wave_parser(
    description: str | None, *, config: str, limit: str, epilog: str
) -> argparse.ArgumentParser:
    """Make the command line of a job that carries out a config, wave by wave.

    Args:
        description: as for `make_parser`.
        config: as for `make_parser`.
        limit: what a trial on N prompts leaves behind.
        epilog: examples of `--set` and where all keys stand.
    """
    parser = make_parser(description, config=config, epilog=f"{epilog}\n\n{EXIT_CODES}")
    add = parser.add_argument
    add("--limit", type=positive, metavar="N", help=f"try N prompts; {limit}")
    hours = "after H hours, commit the wave (part of the work) in flight and stop with exit code 4"
    add("--max-hours", type=float, metavar="H", help=hours)
    return parser


def positive(text: str) -> int:
    """Read a whole number of at least 1 from a command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_warehouse(parser: argparse.ArgumentParser) -> None:
    """Let a command line name a warehouse, for jobs that carry out no config."""
    add = parser.add_argument
    add("--warehouse", required=True, metavar="DIR", help="folder or URI of the tables")
    place = "where a table lies if not in the warehouse: a path or a catalog name; may be repeated"
    add("--place", action="append", default=[], metavar="TABLE=PLACE", help=place)


def table_places(args: argparse.Namespace) -> dict[str, str]:
    """Give the places of tables that a command line names.

    Raises:
        InputError: one is not `TABLE=PLACE`.
    """
    pairs = [item.partition("=")[::2] for item in args.place]
    wrong = [item for item, (table, place) in zip(args.place, pairs, strict=True)
             if not (table and place)]  # fmt: skip
    if wrong:
        raise InputError(
            f"--place {wrong[0]}: expected TABLE=PLACE",
            fix="for example --place preferences=main.cdr.preferences",
        )
    return dict(pairs)


def overrides(args: argparse.Namespace) -> Sequence[str]:
    """Give the config overrides that the command line of a wave job asks for, as `KEY=VALUE`."""
    hours = [] if args.max_hours is None else [f"run.max_hours={args.max_hours}"]
    return [*args.set, *hours]


def run_job(job: Callable[[], int]) -> int:
    """Run a job and give its exit code; an error is printed for the person who can cure it."""
    try:
        return job()
    except CdrError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nstopped. {KEPT}", file=sys.stderr)
        return STOPPED
    except Exception as error:
        explained = explain_spark_error(error)
        if explained is None:
            raise
        print(f"\nerror: {explained}", file=sys.stderr)
        return FAILED


def end(exit_code: int) -> None:
    """End a program with its exit code; where that is 0, just return.

    A wheel task of Databricks calls the entry point in a Python of its own: it does not look at
    what that returns, and takes any exception, SystemExit too, for a failure.
    """
    if exit_code != OK:
        sys.exit(exit_code)


def explain_spark_error(error: BaseException) -> str | None:
    """Say what went wrong inside a Spark job; None when it is not an error this knows."""
    text = str(error)
    # A CdrError raised on a worker arrives as the text of a Python traceback in Java's.
    found = re.search(r"cdr\.errors\.(\w+): (.*?)(?:\n\s*\n|\n\tat |\Z)", text, re.DOTALL)
    if found:
        return f"{found.group(2).rstrip()}\n  {KEPT}"
    if "No space left on device" in text:
        return f"the disk is full: free some space or use another warehouse.\n  {KEPT}"
    unreadable = explain_unreadable(text)
    if unreadable is not None:
        return f"{unreadable}\n  {KEPT}"
    return None
