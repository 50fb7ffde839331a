r"""Look after the tables of a warehouse: sizes, compaction, forgetting prompts, vacuum, migration.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/maintain.py sizes --warehouse warehouse/demo

`sizes` changes nothing and says what to do; the others have --dry-run. Only `vacuum` deletes files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from cdr.cli import OK, add_warehouse, end, positive, run_job, table_places
from cdr.maintenance_commands import (
    ABOUT,
    compact_tables,
    forget_prompts,
    migrate_tables,
    show_sizes,
    vacuum_tables,
)
from cdr.session import get_session
from cdr.warehouse import Warehouse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="each command has a help of its own: jobs/maintain.py forget --help\n"
        "a walk through: docs/how-to/maintain.md\n\n"
        "exit codes: 0 done, 1 failed, 2 bad arguments, or a confirmation is missing",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sizes = _command(commands, "sizes", show_sizes, "rows, files, bytes, growth, and what to do")
    last = "commits over which growth is reckoned (default: 10)"
    sizes.add_argument("--commits", type=positive, default=10, metavar="N", help=last)

    compact = _command(commands, "compact", compact_tables, "write small files into larger ones")
    cluster = "also sort rows by prompt (Z-order): finds one prompt's rows faster, rewrites all"
    compact.add_argument("--cluster", action="store_true", help=cluster)

    forget = _command(
        commands, "forget", forget_prompts, "delete prompts by id through every table", tables=False
    )
    add = forget.add_argument
    add(
        "--prompt-id",
        action="append",
        default=[],
        metavar="ID",
        help="may be repeated",
    )
    add("--prompt-ids-file", metavar="FILE", help="a prompt id per line; a path or URI")
    add("--dataset", metavar="NAME", help="only in this one and its trials; default: in all")
    unclaimed = "delete log-probs and routes too that no prompt uses any more, whoever's they were"
    add("--unclaimed", action="store_true", help=unclaimed)

    vacuum = _command(
        commands, "vacuum", vacuum_tables, "delete files of old versions: they cannot be read again"
    )
    add = vacuum.add_argument
    hours = "keep what versions of the last H hours need; Delta's own default is 168"
    add("--retain-hours", type=float, required=True, metavar="H", help=hours)
    add("--yes-lose-old-versions", action="store_true", help="say yes: time travel to them ends")
    short = "for less than a table's own retention: a run that is alive would lose files it reads"
    add("--yes-nothing-is-running", action="store_true", help=short)

    _command(commands, "migrate", migrate_tables, "bring tables to this program's schema version")
    for command in (compact, forget, vacuum, commands.choices["migrate"]):
        command.add_argument("--dry-run", action="store_true", help="only say what would be done")
    return parser.parse_args(arguments)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: Callable[[Warehouse, argparse.Namespace], None],
    what: str,
    *,
    tables: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=ABOUT[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function, table=[])
    add_warehouse(parser)
    if tables:
        only = "only this one; may be repeated (default: all)"
        parser.add_argument("--table", action="append", default=[], metavar="NAME", help=only)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    places = table_places(args)
    spark = get_session("cdr maintain", warehouse=args.warehouse)
    args.function(Warehouse(spark, args.warehouse, places), args)
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-maintain`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
