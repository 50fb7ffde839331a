r"""Annotate completions with a reward and choose preference pairs.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/annotate.py --config conf/annotate/demo.yaml

Reads prompts and completions, routes prompts to domains, scores completions with a strong (better
aligned) and a weak model, and writes the Delta tables routes, logprobs, rewards, preferences,
unpaired, rejects and runs. Run it again to go on after an interruption: only what is missing is
scored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cdr.annotation import AnnotationRun
from cdr.cli import OK, end, make_wave_parser, overrides, run_job
from cdr.placement import place
from cdr.plan import AnnotationPlan, check_keys
from cdr.registry import load_annotation_plan
from cdr.scoring_run import make_context
from cdr.session import get_session
from cdr.stages import load_candidates, pair
from cdr.warehouse import Warehouse
from jobs.scoring import forecast_candidates, score_candidates


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_wave_parser(
        __doc__,
        config="annotate YAML: a path or URI, see conf/annotate/",
        limit="results go to the dataset NAME.limit-N, scores are kept for later",
        epilog="examples of --set:\n"
        "  --set reward=conf/rewards/mistral-dpo-over-sft.yaml   another reward\n"
        "  --reward models:/mistral-dpo-over-sft@champion        a registered one\n"
        "  --set reward.routing.mode=none                        no criteria: prompts as they are\n"
        "  --set input.path=my.parquet --set input.format=parquet\n"
        "  --set pairs.rejected=lowest --set pairs.min_margin=1.0\n"
        "all keys: docs/reference/config.md",
    )
    parser.add_argument(
        "--reward",
        metavar="REWARD",
        help="reward YAML, or a registered one: models:/NAME@ALIAS or models:/NAME/VERSION",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="count prompts, tokens and what is scored already, estimate the cost; load no model",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    named = [] if args.reward is None else [f"reward={args.reward}"]
    plan = load_annotation_plan(args.config, [*named, *overrides(args)], limit=args.limit)
    config = plan.config
    for warning in config.reward.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    if not args.dry_run:
        check_keys({config.reward.name: config.reward})
    spark = get_session("cdr annotate", warehouse=config.warehouse)
    warehouse = Warehouse(spark, config.warehouse, config.tables)
    plan = place(plan, spark)
    return dry_run(plan, warehouse) if args.dry_run else annotate(plan, warehouse)


def annotate(plan: AnnotationPlan, warehouse: Warehouse) -> int:
    """Carry a plan out."""
    with AnnotationRun(plan, warehouse) as run:
        scored = score_candidates(load_candidates(run.context), run)
        pairs, unpaired = pair(scored.rewards, run.context, run.mlflow_run_id)
        run.finish(scored.rewards, scored.rejects, pairs, unpaired, scored.work)
    return run.exit_code


def dry_run(plan: AnnotationPlan, warehouse: Warehouse) -> int:
    """Say what a run would do."""
    context = make_context(plan, warehouse)
    with context.staging:
        print(forecast_candidates(load_candidates(context), context))
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-annotate`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
