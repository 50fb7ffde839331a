r"""Does a wider alignment gap make a better reward? Every model of a family over every other one.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/pair_study.py --config conf/study/demo.yaml

Each model scores both answers of the labelled pairs once, through the same stages and the same
store of log-probs as annotating and evaluating; every ordered pair of models is then a join. Prints
accuracies (rows: numerator, columns: denominator) and how they go with the gap; writes the Delta
table study_pairs, and an MLflow run with a heatmap and a scatter. Run it again to go on after an
interruption: only what is missing is scored.

`make study-demo` makes the demo's models and does all of it on a laptop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from cdr.cli import OK, end, make_wave_parser, overrides, run_job
from cdr.labelled_pairs import load_pairs, split_pairs
from cdr.pair_study import StudyPlan, StudyRun, plan_study
from cdr.placement import place
from cdr.scoring_run import make_context
from cdr.session import get_session
from cdr.stages import read_answers, reject
from cdr.study_config import load_study_config
from cdr.warehouse import Warehouse
from jobs.scoring import ask_models, forecast_candidates


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_wave_parser(
        __doc__,
        config="study YAML: a path or URI, see conf/study/",
        limit="labelled pairs here; results go to the benchmark NAME.limit-N",
        epilog="examples of --set:\n"
        "  --set reduction=mean                       per token\n"
        "  --set input.path=my.parquet --set input.revision=null\n"
        "  --set engine=vllm --set run.placement=auto\n"
        "all keys: docs/reference/config.md; a walk through: docs/how-to/pair-study.md",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="about 200 pairs, equal shares of the sections")
    add("--dry-run", action="store_true", help="count tokens, estimate the cost; load no model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    config = load_study_config(args.config, overrides(args))
    plan = plan_study(config, limit=args.limit, quick=args.quick)
    spark = get_session("cdr pair study", warehouse=config.warehouse)
    warehouse = Warehouse(spark, config.warehouse, config.tables)
    placed = replace(plan.evaluation, annotation=place(plan.evaluation.annotation, spark))
    plan = replace(plan, evaluation=placed)
    return dry_run(plan, warehouse) if args.dry_run else study(plan, warehouse)


def study(plan: StudyPlan, warehouse: Warehouse) -> int:
    """Ask every model once, and join the answers into pairs of models."""
    with StudyRun(plan, warehouse) as run:
        pairs = load_pairs(plan.evaluation, run.context)
        candidates = split_pairs(pairs, run.context)
        _, encoded, work = ask_models(candidates, run)
        answers = read_answers(encoded, run.failures(), run.context)
        run.finish(pairs, answers, reject(candidates, encoded, run.context), work)
    return run.exit_code


def dry_run(plan: StudyPlan, warehouse: Warehouse) -> int:
    """Say what a run would do."""
    context = make_context(plan.evaluation.annotation, warehouse)
    with context.staging:
        candidates = split_pairs(load_pairs(plan.evaluation, context), context)
        print(f"{plan.config.study}: {forecast_candidates(candidates, context)}")
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-pair-study`, or a wheel task."""
    end(run_job(main))


if __name__ == "__main__":
    run()
