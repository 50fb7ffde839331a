r"""Annotate completions with a reward and choose preference pairs.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/annotate.py --config conf/annotate/demo.yaml

Reads prompts and completions, routes prompts to domains, scores completions with a strong and a
weak model, and writes the Delta tables routes, logprobs, rewards, preferences, rejects and runs.
Run it again to go on after an interruption: only what is missing is scored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cdr.annotation import AnnotationRun, make_context
from cdr.cli import OK, end, make_parser, overrides, run_job
from cdr.forecast import assume_routes, forecast
from cdr.placement import place
from cdr.plan import AnnotationPlan
from cdr.registry import load_annotation_plan
from cdr.routing import give_domains, plan_routing, route_wave
from cdr.scoring import plan_waves, plan_work, score_wave
from cdr.session import get_session
from cdr.stages import encode, group_prompts, load_candidates, pair, reject, reward
from cdr.tables import Warehouse
from udfs.encode import ENCODED_DDL, make_encode
from udfs.route import make_route
from udfs.score import make_score


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(
        __doc__,
        config="annotate YAML: a path or URI, see conf/annotate/",
        limit="results go to the dataset NAME.limit-N, scores are kept for later",
        epilog="examples of --set:\n"
        "  --set reward=conf/rewards/mistral-dpo-over-sft.yaml   another reward\n"
        "  --reward models:/mistral-dpo-over-sft@champion        a registered one\n"
        "  --set reward.routing.mode=none                        no conditioning at all\n"
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
    spark = get_session("cdr annotate", warehouse=config.warehouse)
    warehouse = Warehouse(spark, config.warehouse, config.tables)
    plan = place(plan, spark)
    return dry_run(plan, warehouse) if args.dry_run else annotate(plan, warehouse)


def annotate(plan: AnnotationPlan, warehouse: Warehouse) -> int:
    """Carry a plan out."""
    with AnnotationRun(plan, warehouse) as run:
        context = run.context
        candidates = load_candidates(context)
        prompts = group_prompts(candidates)
        routing = plan_routing(prompts, context)
        for buckets in run.routing_waves(routing):
            run.routed(route_wave(buckets, routing, context, make_route, run.counter))
        routed = give_domains(prompts, routing, context)
        encoded = encode(routed, context, make_encode(plan.encoding), ENCODED_DDL)
        work = plan_work(encoded, context)
        for wave in run.scoring_waves(plan_waves(work, context), work):
            run.scored(score_wave(wave, work, context, make_score, run.counter))
        rewards = reward(candidates, routed, encoded, run.failures(), context)
        rejects = reject(candidates, encoded, context)
        pairs, unpaired = pair(rewards, context, run.mlflow_run_id)
        run.finish(rewards, rejects, pairs, unpaired, work)
    return run.exit_code


def dry_run(plan: AnnotationPlan, warehouse: Warehouse) -> int:
    """Say what a run would do."""
    context = make_context(plan, warehouse)
    with context.staging:
        candidates = load_candidates(context)
        routed = assume_routes(group_prompts(candidates), context)
        encoded = encode(routed, context, make_encode(plan.encoding), ENCODED_DDL)
        print(forecast(candidates, routed, plan_work(encoded, context), context))
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-annotate`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
