"""The commands of `jobs/maintain.py`: what each does with its arguments, and what it prints.

The work is done by `cdr.maintenance` and `cdr.forgetting`; here are the words around it.
"""

from __future__ import annotations

import argparse

from cdr.errors import InputError
from cdr.estimate import format_duration
from cdr.forgetting import Forgetting, Receipt, Request
from cdr.maintenance import (
    Vacuum,
    choose_tables,
    cluster_column,
    compact,
    measure,
    migrate,
    plan_vacuum,
    read_retention,
    running_jobs,
    vacuum,
)
from cdr.tables import SCHEMA_VERSION
from cdr.text_files import read_text
from cdr.text_table import format_bytes, render_table
from cdr.warehouse import Warehouse

_DRY_RUN_LISTING = 1000  # paths that Delta lists at most

ABOUT = {
    "sizes": """\
Say how large the tables are, how they grow, and what to do. Changes nothing.

  small    share of files below 32 MB; a compaction merges them within a partition
  on disk  all in the table's folder: files of old versions and the log too
  growth   bytes added less bytes removed by the last commits""",
    "compact": """\
Write the rows of small files into larger ones (Delta's OPTIMIZE). No row changes, and old versions
stay readable; the small files stay on disk until a vacuum.""",
    "forget": """\
Delete prompts, and all that was made from them, from every table: completions, rewards, pairs,
rejects, and those routes and log-probs that no other prompt uses. Writes a receipt beside the
tables. Old versions hold the rows until a vacuum; the receipt says which, and from when on.

First take the prompts out of the input: the next annotate run would bring them back.""",
    "vacuum": """\
Delete files that only old versions of the tables need. Those versions can never be read again: no
time travel to what a training run saw, no RESTORE. Nothing else in this package deletes files.""",
    "migrate": """\
Bring tables that an older program wrote to this program's schema version, step by step.""",
}


def show_sizes(warehouse: Warehouse, args: argparse.Namespace) -> None:
    """Print the size, the growth and the advice for each table."""
    sizes = [
        measure(warehouse, table, commits=args.commits)
        for table in choose_tables(warehouse, args.table)
    ]
    header = ("table", "rows", "files", "small", "size", "on disk", "versions", "growth", "to do")
    rows = [
        (
            size.table.name,
            size.rows,
            size.files,
            f"{size.small_files / size.files:.0%}" if size.files else None,
            format_bytes(size.bytes),
            format_bytes(size.disk_bytes),
            size.versions,
            f"{format_bytes(size.growth_bytes)} in {size.commits} commits, "
            f"{format_duration(size.growth_hours * 3600)}",
            size.advice(),
        )
        for size in sizes
    ]
    print("\n".join(render_table(header, rows)))
    total = sum(size.bytes for size in sizes), sum(size.disk_bytes for size in sizes)
    print(f"\n{format_bytes(total[0])} in use, {format_bytes(total[1])} on disk")


def compact_tables(warehouse: Warehouse, args: argparse.Namespace) -> None:
    """Compact the tables that gain from it, or say which those are."""
    rows: list[tuple[object, ...]] = []
    for table in choose_tables(warehouse, args.table):
        before = measure(warehouse, table)
        column = cluster_column(table) if args.cluster else None
        how = f"sort by {column}" if column else "merge"
        if not before.mergeable_files and column is None:
            rows.append((table.name, before.files, None, None, "nothing to merge"))
        elif args.dry_run:
            least = before.files - before.mergeable_files
            rows.append((table.name, before.files, least, None, f"would {how}"))
        else:
            compact(warehouse, table, cluster=args.cluster)
            after = measure(warehouse, table)
            rows.append((table.name, before.files, after.files, warehouse.version(table), how))
    print("\n".join(render_table(("table", "files", "then", "version", "done"), rows)))


def forget_prompts(warehouse: Warehouse, args: argparse.Namespace) -> None:
    """Delete prompts through every table, or say what that would delete.

    Raises:
        InputError: there are no ids, or their file cannot be read.
        TableError: another run wrote rows of the prompts meanwhile.
    """
    choose_tables(warehouse)
    ids = [*args.prompt_id, *_read_ids(args.prompt_ids_file)]
    request = Request(prompt_ids=ids, dataset=args.dataset, unclaimed=args.unclaimed)
    with Forgetting(warehouse, request) as forgetting:
        plan = forgetting.plan()
        if args.dry_run:
            print(plan.render())
            return
        receipt = forgetting.carry_out(plan)
        print(receipt.render())
        print(f"\nreceipt     {forgetting.receipt_file}")
        print("\n".join(["", *_left_to_do(receipt)]))


def _read_ids(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the prompt ids cannot be read: {error}",
            where=file,
            fix="a text file in UTF-8 with an id per line",
        ) from None


def _left_to_do(receipt: Receipt) -> list[str]:
    last = max((table.files_gone_after or "" for table in receipt.tables), default="")
    lines = ["left to do:"]
    if last:
        lines += [
            f"  after {last}: jobs/maintain.py vacuum, or old versions keep the rows;",
            "    before that a vacuum has to cut the tables' own retention short",
        ]
    lines += [
        "  the input: if the prompts are still in it, the next run annotates them again",
        "  exports, backups, and models trained on the pairs",
    ]
    if receipt.mlflow_run_ids:
        lines.append(f"  artifacts of MLflow runs: {', '.join(receipt.mlflow_run_ids)}")
    if receipt.staging_folders:
        lines.append("  folders of killed runs, which may hold rows of the input:")
        lines += [f"    {folder}" for folder in receipt.staging_folders]
    return lines


def vacuum_tables(warehouse: Warehouse, args: argparse.Namespace) -> None:
    """Vacuum the tables if that is confirmed, or say what it would take away.

    Raises:
        InputError: a confirmation is missing; it says what would be lost.
    """
    if not args.retain_hours >= 0:
        raise InputError(
            f"--retain-hours must be 0 or more, got {args.retain_hours}",
            fix="--retain-hours 168 keeps a week, as Delta does by itself",
        )
    plans = [
        plan_vacuum(warehouse, table, args.retain_hours)
        for table in choose_tables(warehouse, args.table)
    ]
    header = ("table", "files to delete", "versions that cannot be read then", "versions kept")
    print("\n".join(render_table(header, [_vacuum_row(plan) for plan in plans])))
    print()
    if args.dry_run:
        return
    if not args.yes_lose_old_versions:
        raise InputError(
            "a vacuum cannot be undone: these versions can then never be read again, which ends "
            "time travel to what a training run saw",
            fix="--yes-lose-old-versions, or --dry-run to look only",
        )
    _refuse_short(warehouse, plans, args)
    for plan in plans:
        vacuum(warehouse, plan.table, args.retain_hours)
    print(f"vacuumed {', '.join(plan.table.name for plan in plans)}")


def _vacuum_row(plan: Vacuum) -> tuple[object, ...]:
    files = f"{plan.files:,} or more" if plan.files >= _DRY_RUN_LISTING else f"{plan.files:,}"
    if plan.lost_version is None:
        return plan.table.name, files, "none", f"all to {plan.latest_version}"
    first_kept = plan.lost_version + 1
    return (
        plan.table.name,
        files,
        f"to {plan.lost_version}",
        f"{first_kept} to {plan.latest_version}",
    )


def _refuse_short(warehouse: Warehouse, plans: list[Vacuum], args: argparse.Namespace) -> None:
    short = [plan.table for plan in plans if plan.is_short]
    if not short:
        return
    hours = max(read_retention(warehouse, table).files for table in short)
    running = running_jobs(warehouse)
    said = f"; `runs` knows of {len(running)} that have not ended: {', '.join(running[:3])}"
    if not args.yes_nothing_is_running:
        raise InputError(
            f"{args.retain_hours:g} hours are less than the {hours:g} that the tables ask for: a "
            f"run that is alive would lose files under its hands{said if running else ''}",
            fix=f"--retain-hours {hours:g}, or when nothing runs --yes-nothing-is-running",
        )


def migrate_tables(warehouse: Warehouse, args: argparse.Namespace) -> None:
    """Bring tables to this program's schema version, or say which steps that takes.

    Raises:
        TableError: there is no way for one of them.
    """
    tables = choose_tables(warehouse, args.table)
    taken = migrate(warehouse, tables, dry_run=args.dry_run)
    moved = {name: steps for name, steps in taken.items() if steps}
    if not moved:
        print(f"nothing to do: all {len(tables)} tables have schema version {SCHEMA_VERSION}")
    verb = "would go" if args.dry_run else "went"
    for name, steps in moved.items():
        print(f"{name} {verb} from schema version {steps[0]} to {SCHEMA_VERSION}")
