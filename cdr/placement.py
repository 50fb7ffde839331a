"""Which scoring models are loaded together, and which share of a device each may take.

Two models that share a device are each asked about a prompt while it is at hand, and a wave's
commit is whole. Two that do not fit go one after the other. `auto` decides by arithmetic on the
driver: the bytes of the weights, from the headers of the safetensors files, against the memory of
a device. See docs/decisions/0006-placement.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdr.engines.base import EngineSpec
from cdr.engines.hardware import device_memory_bytes
from cdr.errors import ConfigError
from cdr.models import ResolvedModel
from cdr.plan import AnnotationPlan
from cdr.weight_size import count_weight_bytes

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Placement = Literal["auto", "colocated", "sequential"]

USABLE = 0.9
"""Share of a device's memory that all engines together get; the rest is the driver's."""
HEADROOM = 1.25
"""An engine needs its weights this many times: activations, prefix cache, log-probs."""

_GIB = 1 << 30


def place(plan: AnnotationPlan, spark: SparkSession) -> AnnotationPlan:
    """Settle the placement of the scoring models before any work.

    Args:
        plan: the checked plan.
        spark: asked for the memory of a device where the config does not give it: one small task.

    Returns:
        The plan with `run.placement` decided, and with the memory shares of models that are
        loaded together. A router that also scores has its share too: it stays loaded.

    Raises:
        ConfigError: a model is too large for its share of a device, or its size is not known.
    """
    run = plan.config.run
    placement: Placement = run.placement
    if placement == "auto" or run.device_memory_gib is not None:
        memory = int((run.device_memory_gib or 0) * _GIB) or _look_up(spark)
        needs = {role: _needed_bytes(model) for role, model in plan.reward.models.items()}
        if placement == "auto":
            placement = _choose(plan, needs, memory)
        _refuse_too_large(plan, needs, memory, placement)
    decided = run.model_copy(update={"placement": placement})
    config = plan.config.model_copy(update={"run": decided})
    engines, route = _with_shares(plan.reward.engines, placement), plan.reward.route
    if route is not None:
        # A host keeps an engine from one stage to the next only while all of its spec is the same.
        scoring = {engine.name: engine for engine in engines}
        route = replace(route, engine=scoring.get(route.engine.name, route.engine))
    return replace(plan, config=config, reward=replace(plan.reward, engines=engines, route=route))


def share_device(engines: tuple[EngineSpec, ...]) -> tuple[EngineSpec, ...]:
    """Give engines that are loaded together their shares of a device's memory.

    Raises:
        ConfigError: the shares that the config gives leave no room for the others.
    """
    return _with_shares(engines)


def weights_bytes(model: ResolvedModel) -> int | None:
    """Give the bytes of a model's weights as it runs; None when nothing tells them.

    Raises:
        ModelError: a file of weights is not in the format of safetensors.
    """
    if model.spec.engine in ("stub", "api"):
        return 0
    return count_weight_bytes(Path(model.config_folder), model.engine_spec.dtype)


def _needed_bytes(model: ResolvedModel) -> float:
    """Give the bytes that a model needs on each of its devices."""
    weights = weights_bytes(model)
    if weights is None:
        raise ConfigError(
            [
                f"models.{model.role}: the size of '{model.spec.path}' is not known here, and "
                "run.placement 'auto' or run.device_memory_gib asks for it"
            ],
            fix="set run.placement to colocated or sequential, and leave run.device_memory_gib out",
        )
    return weights * HEADROOM / model.engine_spec.tensor_parallel


def _choose(plan: AnnotationPlan, needs: Mapping[str, float], memory: int) -> Placement:
    shares = {engine.name: engine.memory_fraction for engine in _with_shares(plan.reward.engines)}
    fits = all(
        needs[role] <= (shares[model.model_key] or USABLE) * memory
        for role, model in plan.reward.models.items()
        if model.model_key in shares
    )
    placement: Placement = "colocated" if fits else "sequential"
    sizes = ", ".join(
        f"{role} {needs[role] / _GIB:.1f}"
        for role, model in plan.reward.models.items()
        if model.model_key in shares
    )
    print(f"placement: {placement} (GiB needed per device: {sizes}; there: {memory / _GIB:.1f})")
    return placement


def _refuse_too_large(
    plan: AnnotationPlan, needs: Mapping[str, float], memory: int, placement: Placement
) -> None:
    shares = {
        engine.name: engine.memory_fraction
        for engine in _with_shares(plan.reward.engines, placement)
    }
    problems = []
    for role, model in plan.reward.models.items():
        own = model.engine_spec.memory_fraction  # the router's, which is loaded alone
        share = (shares.get(model.model_key) or own or USABLE) * memory
        if needs[role] > share:
            problems.append(
                f"models.{role}: needs about {needs[role] / _GIB:.1f} GiB of each device, its "
                f"weights and a quarter more, but its share is {share / _GIB:.1f} of "
                f"{memory / _GIB:.1f} GiB"
            )
    if problems:
        remedy = "run.placement 'sequential', " if placement == "colocated" else ""
        raise ConfigError(
            problems,
            where=f"reward '{plan.config.reward.name}'",
            fix=f"set {remedy}a larger tensor_parallel of the model, a larger memory_fraction, a "
            "smaller dtype, or use devices with more memory",
        )


def _with_shares(
    engines: tuple[EngineSpec, ...], placement: Placement = "colocated"
) -> tuple[EngineSpec, ...]:
    """Split a device between engines that are loaded together; what the config set stays."""
    copies = {_copy(engine): engine.memory_fraction for engine in engines}
    if placement != "colocated" or len(copies) == 1:
        return engines
    given = sum(share for share in copies.values() if share)
    free = [copy for copy, share in copies.items() if share is None]
    rest = USABLE - given
    if given > 1 or (free and rest <= 0):
        raise ConfigError(
            [f"memory_fraction: models loaded together must leave each a share, got {given:g}"],
            fix="lower memory_fraction, or set run.placement to sequential",
        )
    return tuple(
        engine if engine.memory_fraction else replace(engine, memory_fraction=rest / len(free))
        for engine in engines
    )


def _copy(engine: EngineSpec) -> EngineSpec:
    """Give what engines on one copy of weights have in common; only vLLM's share one."""
    return engine.weights() if engine.engine == "vllm" else engine


def _look_up(spark: SparkSession) -> int:
    # Executors are of one kind: one of them tells for all.
    answer = spark.sparkContext.parallelize([0], 1).map(lambda _: device_memory_bytes())
    return answer.first()
