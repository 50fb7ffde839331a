r"""Which reward makes the best policy? Annotate, train, answer and judge, once per row of a table.

    python -m jobs.policy_study --config conf/study/table2-small.yaml

The start policy and one policy per reward, all from the same completions: each row is annotated,
searched over learning rates and beta, trained with SimPO, and answers the same benchmarks. Prints
the table beside published values, and writes the Delta table policy_results and an MLflow run with
those of its stages below it. A stage is a job in a process of its own with a log of its own. Run it
again to go on after an interruption: what is done under the same configuration is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdr.cli import EXIT_CODES, OK, end, make_parser, run_job
from cdr.policy_study import Stage, plan_policy_study
from cdr.policy_study_config import TRAIN, LaunchSpec, load_policy_study_config
from cdr.policy_study_run import PolicyStudyRun, render_plan
from cdr.session import get_session
from cdr.tables import POLICY_RESULTS
from cdr.warehouse import Warehouse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(
        __doc__,
        config="policy study YAML: a path or URI, such as conf/study/table2.yaml",
        epilog="examples of --set:\n"
        "  --set 'train.search.betas=[10]'                  a smaller search\n"
        "  --set benchmarks.arena-hard.judge.model=NAME     another judge\n"
        "  --set rows.vanilla.change.reduction=mean         one row's reward, and only that row\n"
        "all keys: docs/reference/config.md; a walk through: docs/how-to/policy-study.md\n\n"
        + EXIT_CODES,
    )
    add = parser.add_argument
    add("--rows", nargs="+", metavar="ROW", help="only these rows of the config, and start")
    add("--dry-run", action="store_true", help="list the stages and what is done; start none")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    plan = plan_policy_study(load_policy_study_config(args.config, args.set), rows=args.rows)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        print(render_plan(plan))
        return OK
    config = plan.config

    def open_warehouse() -> Warehouse:
        spark = get_session("cdr policy study", warehouse=config.warehouse)
        return Warehouse(spark, config.warehouse, config.tables)

    with PolicyStudyRun(plan) as run:
        # This process and the training have a Spark of their own: what it cannot reach is told now.
        warehouse = open_warehouse()
        warehouse.exists(POLICY_RESULTS)
        warehouse.spark.stop()
        run.carry_out(lambda stage: command_of(stage, config.launch))
        run.finish(open_warehouse)
    return run.exit_code


def command_of(stage: Stage, launch: LaunchSpec) -> list[str]:
    """Give the command of a stage's job, without its config."""
    module = ["-m", f"jobs.{stage.job}"]
    if stage.name == TRAIN:
        return [*(launch.train or (sys.executable,)), *module]
    if not launch.spark:
        return [sys.executable, *module]
    return [*launch.spark, str(Path(__file__).with_name(f"{stage.job}.py"))]


def run() -> None:
    """Run as a program: this script, or the command `cdr-policy-study`."""
    end(run_job(main))


if __name__ == "__main__":
    run()
