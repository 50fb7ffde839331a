"""`--dry-run`: how much there is to do and what it would cost, before any model loads.

Prompts are encoded for real, so token counts are exact, but for one thing: a prompt the router has
not seen yet has no domain. It is counted with the longest conditioning the router may choose.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.engines.hardware import matmul_flops
from cdr.estimate import (
    CPU_EFFICIENCY,
    DevicePeak,
    estimate_scoring,
    format_count,
    format_duration,
    gpu_peak,
    load_model_shape,
    sharing_gain,
)
from cdr.judge_encoding import CHARS_PER_TOKEN
from cdr.prompt_pack import PromptPack
from cdr.routing import known_routes
from cdr.scoring import Work, plan_waves
from cdr.stages import Context
from cdr.verdicts import plan_question_waves

_REFERENCE_GPUS = ("NVIDIA A10G", "NVIDIA A100", "NVIDIA H100")


def assume_routes(prompts: DataFrame, run: Context) -> DataFrame:
    """Give each prompt the domain it has, or the longest one it may get; asks no model.

    Returns:
        The columns of `cdr.routing.give_domains`; `domain_source` is `assumed` where nothing is
        known.
    """
    plan = run.plan.reward
    route, routing = plan.route, plan.spec.routing
    no_error = F.lit(None).cast("string").alias("route_error")
    if route is None:
        domain = {
            "column": F.col("given_domain"),
            "fixed": F.lit(routing.domain),
            "none": F.lit(None).cast("string"),
        }[routing.mode]
        return prompts.select(
            "*", domain.alias("domain"), F.lit(routing.mode).alias("domain_source"), no_error
        )
    longest = max(route.domains, key=lambda name: _conditioning_chars(route.pack, name))
    known = known_routes(route, run.warehouse).drop("domain_confidence")
    return (
        prompts.join(known, on="prompt_hash", how="left")
        .withColumn("domain_source", F.coalesce("domain_source", F.lit("assumed")))
        .withColumn("domain", F.coalesce("domain", F.lit(longest)))
        .select("*", no_error)
    )


def _conditioning_chars(pack: PromptPack, domain: str) -> int:
    spec = pack.domains[domain]
    if spec.is_vanilla:
        return 0
    instruction = max(len(text) for text in spec.instructions.values())
    exemplars = (exemplar.model_dump().values() for exemplar in spec.exemplars.values())
    return instruction + max((sum(map(len, texts)) for texts in exemplars), default=0)


def forecast(candidates: DataFrame, routed: DataFrame, work: Work, run: Context) -> str:
    """Write what a run would do, for a terminal.

    Args:
        candidates: from `cdr.inputs.read_candidates`.
        routed: from `assume_routes`.
        work: from `cdr.scoring.plan_work`.
        run: the run.
    """
    plan = run.plan
    # One row each: counts only.
    rejected = candidates.where("reason IS NOT NULL").groupBy("reason").count().collect()
    total = candidates.count()
    sources = {r[0]: r[1] for r in routed.groupBy("domain_source").count().collect()}
    share = 1 - work.completions / work.asked if work.asked else 1.0
    reasons = ", ".join(f"{row[0]} {row[1]:,}" for row in rejected) or "0"
    if plan.reward.spec.is_asked_by_api:
        asked, waves = "questions", plan_question_waves(work, run)
    else:
        asked, waves = "log-probs", plan_waves(work, run)
    lines = [
        "dry run: nothing is written, no model is loaded",
        "",
        f"prompts      {sum(sources.values()):,}",
        f"candidates   {total:,}   rejected so far: {reasons}",
        f"{asked}    {work.asked:,} asked, {work.asked - work.completions:,} in the store "
        f"({share:.0%}), {work.completions:,} to score in {len(waves):,} waves",
        f"tokens       {format_count(work.tokens)} to read",
    ]
    if unknown := sources.get("assumed", 0):
        lines.append(
            f"not routed   {unknown:,} prompts; counted with the longest conditioning, and the "
            "router's own reading comes on top"
        )
    if work.tokens and plan.reward.spec.is_asked_by_api:
        lines += ["", _price(work, run)]
    elif work.tokens:
        lines += ["", *_costs(work, run)]
    if plan.limit is not None:
        lines += ["", f"with --limit: results would go to the dataset '{plan.dataset}'"]
    return "\n".join(lines)


def _price(work: Work, run: Context) -> str:
    api = run.plan.reward.spec.judge_api
    if api is None or api.prompt_price is None or api.answer_price is None:
        return "what that costs is not known: models.judge.api has no prompt_price and answer_price"
    cost = (work.tokens * api.prompt_price + work.completions * api.answer_price) / 1e6
    return f"about {cost:,.2f} USD by the config's prices, at {CHARS_PER_TOKEN} characters a token"


def _costs(work: Work, run: Context) -> list[str]:
    models = {model.model_key: model for model in run.plan.reward.models.values()}
    devices = [peak for name in _REFERENCE_GPUS if (peak := gpu_peak(name)) is not None]
    flops = {
        dtype: matmul_flops(dtype)
        for dtype in {models[key].engine_spec.dtype for key in work.missing} | {"float32"}
    }
    here = DevicePeak(
        "this machine's CPU", flops.get("bfloat16", flops["float32"]), flops["float32"],
        CPU_EFFICIENCY,
    )  # fmt: skip
    lines = [f"prefix sharing reads {_gain(work):.1f} times fewer tokens than scoring row by row"]
    for device in [here, *devices]:
        seconds = 0.0
        for key, workload in work.missing.items():
            model = models[key]
            if model.spec.engine == "stub":
                continue
            # GPUs compute in bfloat16 whatever `auto` chose for this machine.
            spec = model.engine_spec
            dtype = spec.dtype if device is here or spec.dtype == "bfloat16" else "bfloat16"
            shape = load_model_shape(model.config_folder)
            seconds += estimate_scoring(
                workload, shape, device, dtype=dtype, head_dtype=spec.head_dtype
            ).device_s
        lines.append(
            f"about {format_duration(seconds)} on one {device.name} "
            f"({seconds / 3600:.2f} device-hours, {device.efficiency:.0%} of its matmul peak)"
        )
    return lines


def _gain(work: Work) -> float:
    gains = [sharing_gain(workload) for workload in work.missing.values()]
    return sum(gains) / len(gains)
