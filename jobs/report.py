r"""Build the report page of a run from its tables; nothing is scored, no model is loaded.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/report.py --warehouse warehouse/demo

Annotate and evaluate runs build their page by themselves. This builds it again: with or without
texts, after an error, for a run that had `report.enabled: false`, or with other evaluations of a
benchmark side by side. Prints where the page is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cdr.cli import OK, end, run_job
from cdr.report.build import find_evaluations, rebuild_report
from cdr.session import get_session


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="how to read the page: docs/how-to/report.md\n"
        "exit codes: 0 done, 1 no such run or its rows are gone, 2 bad setup",
    )
    add = parser.add_argument
    add("--warehouse", required=True, metavar="PLACE", help="folder or URI of the run's tables")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--run", nargs="+", default=[], metavar="ID",
        help="id of the run, or ids of evaluations of one benchmark, each a row of the page "
        "(default: the last annotate run that finished)",
    )  # fmt: skip
    which.add_argument(
        "--evaluation", nargs="?", const="", metavar="BENCHMARK",
        help="all rewards evaluated on a benchmark, by its name in `dataset` (default: the one "
        "evaluated last)",
    )  # fmt: skip
    add("--runs", metavar="PLACE", help="place of the table runs, if the config put it elsewhere")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--with-texts", dest="texts", action="store_true", default=None,
        help="show prompts and completions, whatever the run's config says",
    )  # fmt: skip
    texts.add_argument(
        "--without-texts", dest="texts", action="store_false", help="show ids and numbers only"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    spark = get_session("cdr report", warehouse=args.warehouse)
    run_ids = args.run
    if args.evaluation is not None:
        run_ids = find_evaluations(spark, args.warehouse, args.evaluation or None, runs=args.runs)
    page = rebuild_report(
        spark, args.warehouse, runs=args.runs, run_ids=run_ids, has_texts=args.texts
    )
    print(f"report: {page}")
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-report`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
