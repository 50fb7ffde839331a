r"""Evaluate a reward on labelled pairs: RewardBench, or any table of prompt, chosen and rejected.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/evaluate.py --config conf/evaluate/demo.yaml

Scores both answers of each pair through the same stages and the same store of log-probs as
annotating does, and prints accuracies per section with intervals, what length alone would reach,
and what was left out and why. Writes the Delta tables benchmark_results and benchmark_pairs, an
MLflow run with figures, and one report page. A config with rows evaluates each of them and compares
them. Run it again to go on after an interruption: only what is missing is scored.

--quick answers one question before you annotate: does this pair of models see the difference?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from cdr.cli import OK, end, make_wave_parser, overrides, run_job
from cdr.evaluation import Evaluated, EvaluationRun, compare_stored
from cdr.evaluation_plan import EvaluationPlan, dataset_name, make_sample, plan_evaluation
from cdr.evaluation_rows import evaluate_rows
from cdr.labelled_pairs import judge_pairs, load_pairs, split_pairs
from cdr.placement import place
from cdr.plan import check_keys
from cdr.registry import load_evaluation
from cdr.scoring_run import make_context
from cdr.session import get_session
from cdr.warehouse import Warehouse
from jobs.scoring import forecast_candidates, score_candidates


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_wave_parser(
        __doc__,
        config="evaluate YAML: a path or URI, see conf/evaluate/ and conf/benchmark/",
        limit="each is a pair here; results go to the benchmark NAME.limit-N",
        epilog="examples of --set:\n"
        "  --set reward=conf/rewards/mistral-dpo-over-sft.yaml   another reward\n"
        "  --set reward=models:/mistral-dpo-over-sft@champion    a registered one\n"
        "  --set reward.routing.mode=column                      the true domains, no router\n"
        "  --set input.path=my.parquet --set input.format=parquet\n"
        "  --set quick.pairs=400 --set statistics.seed=1\n"
        "all keys: docs/reference/config.md; a walk through: docs/how-to/evaluate.md",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="about 200 pairs, equal shares of the sections")
    add("--rows", nargs="+", metavar="ROW", help="only these rows of the config")
    audit = "evaluate a second time with the true domains in the router's place, and compare"
    add("--audit-router", action="store_true", help=audit)
    compare = "compare two rewards by the pairs stored by earlier runs; score nothing"
    add("--compare", nargs=2, metavar=("A", "B"), help=compare)
    add("--dry-run", action="store_true", help="count tokens, estimate the cost; load no model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    config, version = load_evaluation(args.config, overrides(args))
    config = config.keep_rows(args.rows) if args.rows else config
    sample = make_sample(config, limit=args.limit, quick=args.quick)
    plans = [] if args.compare else plan_evaluation(
        config, sample=sample, with_oracle=args.audit_router, reward_version=version
    )  # fmt: skip
    rewards = {plan.name: plan.annotation.config.reward for plan in plans}
    for warning in dict.fromkeys(text for one in rewards.values() for text in one.warnings()):
        print(f"warning: {warning}", file=sys.stderr)
    if not args.dry_run:
        check_keys(rewards)
    spark = get_session("cdr evaluate", warehouse=config.warehouse)
    warehouse = Warehouse(spark, config.warehouse, config.tables)
    if args.compare:
        a, b = args.compare
        print(compare_stored(a, b, dataset_name(config, sample), config, warehouse).render())
        return OK
    placed = [replace(plan, annotation=place(plan.annotation, spark)) for plan in plans]
    return dry_run(placed, warehouse) if args.dry_run else evaluate(placed, warehouse)


def evaluate(plans: Sequence[EvaluationPlan], warehouse: Warehouse) -> int:
    """Carry out the plans, one reward after the other, and compare them."""
    return evaluate_rows(plans, warehouse, evaluate_row)


def evaluate_row(plan: EvaluationPlan, run: EvaluationRun) -> Evaluated:
    """Judge the labelled pairs by one reward."""
    pairs = load_pairs(plan, run.context)
    scored = score_candidates(split_pairs(pairs, run.context), run)
    judged = judge_pairs(pairs, scored.rewards, scored.rejects, run.context)
    return run.finish(judged, scored.work)


def dry_run(plans: Sequence[EvaluationPlan], warehouse: Warehouse) -> int:
    """Say what a run would do."""
    for plan in plans:
        context = make_context(plan.annotation, warehouse)
        with context.staging:
            candidates = split_pairs(load_pairs(plan, context), context)
            print(f"{plan.title}: {forecast_candidates(candidates, context)}\n")
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-evaluate`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
