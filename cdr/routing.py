"""Routing in waves: ask the router about the prompts that `routes` lacks, and give all a domain.

As scoring does (`cdr.scoring`), a wave is answered and then committed at once, so that a killed
run loses one at most. Without a router a prompt's domain comes from a column, is fixed, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.config import RunSpec
from cdr.plan import RoutePlan
from cdr.progress import TaskCounter
from cdr.router import content_free_messages
from cdr.stages import Context, MapFunction
from cdr.tables import ROUTES
from cdr.warehouse import Warehouse
from cdr.waves import BucketRange, WaveResult, answer_wave, bucket_column, cut_buckets, cut_tasks

ROUTED_DDL = (
    "prompt_hash string, domain string, confidence double, label_logprobs map<string, double>, "
    "domain_source string, error string"
)
"""Schema of what a routing function yields, one row per prompt; `error` null when routed."""

_CHARS_PER_TOKEN = 4
"""Of English prose; it only sizes waves, before anything is encoded."""


@dataclass(frozen=True)
class RoutingWork:
    """The prompts that the router has to be asked about.

    Args:
        rows: prompt_hash, prompt, bucket; each prompt once.
        prompts: how many.
        waves: ranges of buckets; none where no router is asked.
    """

    rows: DataFrame
    prompts: int
    waves: tuple[BucketRange, ...]


def plan_routing(prompts: DataFrame, run: Context) -> RoutingWork:
    """Find the prompts the router does not know yet, and cut them into waves.

    Reads: prompt_hash, prompt.
    """
    route = run.plan.reward.route
    if route is None:
        return RoutingWork(prompts.limit(0), 0, ())
    known = known_routes(route, run.warehouse)
    unknown = (
        prompts.select("prompt_hash", "prompt")
        .join(known, on="prompt_hash", how="left_anti")
        .groupBy("prompt_hash")
        .agg(F.first("prompt").alias("prompt"))
        .withColumn("bucket", bucket_column("prompt_hash"))
    )
    rows = run.staging.write(
        "unrouted", unknown.repartitionByRange("bucket").sortWithinPartitions("bucket")
    )
    task_chars = sum(len(m["content"]) for m in content_free_messages(route.pack, route.domains))
    chars = F.aggregate(
        "prompt", F.lit(task_chars), lambda total, turn: total + F.length(turn["content"])
    )
    # At most BUCKETS rows.
    sizes = rows.groupBy("bucket").agg(F.count("*"), F.sum(chars)).collect()
    tokens = {bucket: chars // _CHARS_PER_TOKEN for bucket, _, chars in sizes}
    return RoutingWork(
        rows=rows,
        prompts=sum(count for _, count, _ in sizes),
        waves=tuple(cut_buckets(tokens, run.plan.config.run.wave_tokens)),
    )


def route_wave(
    wave: BucketRange,
    work: RoutingWork,
    run: Context,
    make_route: Callable[[RoutePlan, RunSpec, TaskCounter], MapFunction],
    counter: TaskCounter,
) -> WaveResult:
    """Ask the router about one wave and append its answers to `routes` in one commit.

    Args:
        wave: one of `work.waves`.
        work: from `plan_routing`.
        run: the run.
        make_route: `udfs.route.make_route`.
        counter: where tasks count what they have done.
    """
    route, spec = run.plan.reward.route, run.plan.config.run
    assert route is not None
    return answer_wave(
        cut_tasks(work.rows, wave, run, "prompt_hash").select("prompt_hash", "prompt"),
        make_route(route, spec, counter),
        ROUTED_DDL,
        run,
        engines=[route.engine],
        table=ROUTES,
        staged_as=f"routes/wave={wave.low}",
        stamps={"router_key": F.lit(route.key)},
    )


def give_domains(prompts: DataFrame, work: RoutingWork, run: Context) -> DataFrame:
    """Give each prompt its domain.

    Reads: prompt_hash, given_domain.

    Args:
        prompts: one row per prompt.
        work: from `plan_routing`; all its waves have been routed.
        run: the run.

    Returns:
        The prompts with domain, domain_source, domain_confidence and route_error (null: routed).
    """
    plan = run.plan
    if plan.reward.route is None:
        routing = plan.config.reward.routing
        domain = {
            "column": F.col("given_domain"),
            "fixed": F.lit(routing.domain),
            "none": F.lit(None),
        }[routing.mode]
        given = {
            "domain": domain.cast("string"),
            "domain_source": F.lit(routing.mode),
            "domain_confidence": F.lit(None).cast("double"),
            "route_error": F.lit(None).cast("string"),
        }
        return run.staging.write("routed", prompts.withColumns(given))
    routed = prompts.join(
        known_routes(plan.reward.route, run.warehouse), on="prompt_hash", how="left"
    )
    if not work.waves:
        return run.staging.write(
            "routed", routed.withColumn("route_error", F.lit(None).cast("string"))
        )
    errors = (
        run.staging.read("routes")
        .where("error IS NOT NULL")
        .select("prompt_hash", F.col("error").alias("route_error"))
    )
    return run.staging.write("routed", routed.join(errors, on="prompt_hash", how="left"))


def known_routes(plan: RoutePlan, warehouse: Warehouse) -> DataFrame:
    """Read this router's decisions: prompt_hash, domain, domain_source, domain_confidence."""
    return (
        warehouse.read_one_per_key(ROUTES)
        .where(F.col("router_key") == plan.key)
        .select(
            "prompt_hash",
            "domain",
            "domain_source",
            F.col("confidence").alias("domain_confidence"),
        )
    )
