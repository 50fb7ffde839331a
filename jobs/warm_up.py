r"""Bring a run's weights to every node, and say how that went; optionally load the models.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/warm_up.py --config conf/annotate/demo.yaml

A run does the same by itself when it needs a model; done before, what is wrong with access, disks
or copies is known in minutes, and the first wave starts at once. Reads and writes no table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from cdr.cli import FAILED, OK, end, make_parser, run_job
from cdr.executors import settle_device
from cdr.placement import place
from cdr.registry import load_annotation_plan
from cdr.session import get_session
from cdr.warm_up import plan_engine_sets, plan_sources, warm_up
from udfs.warm_up import make_warm_up


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(
        __doc__,
        config="annotate YAML: a path or URI, see conf/annotate/",
        epilog="prints one line per node and model, and with --load one per device;\n"
        "exit codes: 0 all is there, 1 a node failed, 2 bad config or setup",
    )
    parser.add_argument("--load", action="store_true", help="load the models too, as the run would")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    plan = load_annotation_plan(args.config, args.set)
    spark = get_session("cdr warm-up")
    device = settle_device(plan.config.run, plan.engines(), spark).device
    plan = place(plan, spark)
    engine_sets = plan_engine_sets(plan) if args.load else []
    make_function = partial(make_warm_up, choice=device)
    report = warm_up(spark, make_function, plan_sources(plan), engine_sets)
    print("\n".join(report.lines))
    print(f"{report.num_executors} executors answered, on {report.num_nodes} nodes")
    if report.num_failed:
        print(f"\nerror: {report.num_failed} of {len(report.lines)} failed", file=sys.stderr)
    return FAILED if report.num_failed else OK


def run() -> None:
    """Run as a program: this script, the command `cdr-warm-up`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
