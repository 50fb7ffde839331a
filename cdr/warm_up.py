"""A cluster that is ready before its first wave: weights on every node, engines once loaded.

What to fetch and load comes from a plan; tasks do it (`udfs.warm_up`) and say how it went; here it
is asked for until every executor has answered, and told in one line per node and model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pyspark.sql import Row, SparkSession

from cdr.engines.base import EngineSpec
from cdr.errors import SetupError
from cdr.gpus import task_gpus
from cdr.node_cache import format_gib
from cdr.plan import AnnotationPlan
from cdr.stages import MapFunction
from cdr.weights import Source, list_sources

WARM_UP_DDL = (
    "host string, executor string, device string, model string, action string, source string, "
    "num_bytes bigint, seconds double, is_verified boolean, error string"
)
"""Schema of what tasks answer: the fields of `Answer`."""

EngineSet = Mapping[str, EngineSpec]
"""Engines that are loaded together, by the role of their models."""

HOLD_S = 2.0
"""Seconds for which a task keeps its slot at least."""

_MAX_ROUNDS = 5


@dataclass(frozen=True)
class Answer:
    """What a task says about one source, or about one set of engines.

    Args:
        host: name of the node.
        executor: tells executors of a node apart.
        device: what the task holds.
        model: roles of the models in the reward.
        action: `fetch` or `load`.
        source: where files come from; for `load` the engines' versions.
        num_bytes: bytes fetched, 0 when they were there; None for `load`.
        seconds: how long it took.
        is_verified: the content hash was compared; None for `load`.
        error: why it failed; None when it did not.
    """

    host: str
    executor: str
    device: str
    model: str
    action: str
    source: str
    num_bytes: int | None = None
    seconds: float = 0.0
    is_verified: bool | None = None
    error: str | None = None

    def render(self) -> str:
        """Say it in one line; an error takes more."""
        place = f"{self.host}  {self.device}  {self.model}  {self.source}"
        if self.error is not None:
            return f"{place}  FAILED to {self.action}: {self.error}"
        if self.action == "load":
            return f"{place}  loaded in {self.seconds:.1f} s"
        came = f"{format_gib(self.num_bytes)} GiB copied" if self.num_bytes else "already there"
        checked = "checksum ok" if self.is_verified else "no checksum to compare"
        return f"{place}  {came}, {self.seconds:.1f} s, {checked}"


@dataclass(frozen=True)
class WarmUpReport:
    """What the nodes answered.

    Args:
        lines: one per node and model, then one per device and set of engines, for people.
        num_failed: how many of them are failures.
        num_executors: executors that answered.
        num_nodes: nodes they run on.
    """

    lines: tuple[str, ...]
    num_failed: int
    num_executors: int
    num_nodes: int


def plan_sources(plan: AnnotationPlan) -> dict[Source, str]:
    """Give what a plan's models have to fetch, each once, with the roles that need it."""
    roles: dict[Source, list[str]] = {}
    for role, model in plan.reward.models.items():
        for source in list_sources(model.engine_spec):
            roles.setdefault(source, []).append(f"{role}{' adapter' * source.is_adapter}")
    return {source: ", ".join(names) for source, names in roles.items()}


def plan_engine_sets(plan: AnnotationPlan) -> list[EngineSet]:
    """Give the sets of engines that a run loads, in its order.

    A router that is loaded with the other scoring models has no set of its own: it is there, and
    stays when the run needs no more than it.
    """
    reward = plan.reward
    sets: list[EngineSet] = (
        [{plan.config.reward.routing.model: reward.route.engine}] if reward.route else []
    )
    engines = {engine.name: engine for engine in reward.engines}
    scoring = {
        term.model: engines[reward.models[term.model].model_key]
        for term in plan.config.reward.resolved_terms()
    }
    if plan.config.reward.is_asked_by_api:
        return sets
    if plan.config.run.placement == "sequential":
        return sets + [{role: engine} for role, engine in scoring.items()]
    if reward.route and reward.route.engine in scoring.values():
        return [scoring]
    return [*sets, scoring]


def warm_up(
    spark: SparkSession,
    make_function: Callable[[Mapping[Source, str], Sequence[EngineSet]], MapFunction],
    sources: Mapping[Source, str],
    engine_sets: Sequence[EngineSet],
) -> WarmUpReport:
    """Fetch sources on every executor, then load sets of engines where the run's tasks will.

    What a run loads first is loaded last, and is there when it begins: a host holds one set at a
    time, and a model split over several GPUs and those on one of them end each other's hosts. So
    sets of different `tensor_parallel` come one after the other, each in tasks with as many GPUs.
    When one fails somewhere, those after it are left out.

    Args:
        spark: the session; with dynamic allocation only executors that run now are reached.
        make_function: `udfs.warm_up.make_warm_up` for a kind of device.
        sources: what to fetch, with the roles that need it.
        engine_sets: in the run's order; none to fetch only.

    Raises:
        SetupError: some executors gave no answer, or have fewer GPUs than a model needs.
    """
    rows: list[Row] = []
    last_first = engine_sets[::-1]
    for batch in [list(alike) for _, alike in groupby(last_first, count_gpus)] or [[]]:
        engines = [engine for engines in batch for engine in engines.values()]
        # What is there already would be read again for its checksum.
        missing = {} if rows else sources
        rows += _ask_executors(spark, make_function(missing, batch), engines)
        if any(row.error is not None for row in rows):
            break
    return report(rows)


def count_gpus(engines: EngineSet) -> int:
    """Count the GPUs that a task needs for a set of engines."""
    return max(engine.tensor_parallel for engine in engines.values())


def _ask_executors(
    spark: SparkSession, function: MapFunction, engines: Sequence[EngineSpec]
) -> list[Row]:
    """Run a function on every executor, its tasks with the GPUs that the engines need.

    Spark has no call for "once per executor". A barrier stage would start all of its tasks at
    once, but may put them on few executors, and excludes dynamic allocation. So plain tasks, as
    many as there are slots, each keep a slot for a moment, which spreads them; a round is repeated
    until every executor that Spark knows of has answered. A node that has its weights answers at
    once, so rounds are cheap.
    """
    gpus = task_gpus(spark, engines)
    # Dynamic allocation gives such a stage executors of its own, as many as it finds right.
    has_own_executors = "profile" in gpus and bool(gpus["profile"].executorResources)
    rows: list[Row] = []
    for _ in range(_MAX_ROUNDS):
        slots = max(spark.sparkContext.defaultParallelism, _count_executors(spark))
        tasks = spark.range(0, slots, 1, slots).mapInPandas(function, WARM_UP_DDL, **gpus)
        rows += tasks.collect()  # a few rows per task: what is reported
        executors = {(row.host, row.executor) for row in rows}
        if has_own_executors or len(executors) >= _count_executors(spark):
            return rows
    raise SetupError(
        f"{_count_executors(spark) - len(executors)} of {_count_executors(spark)} executors gave "
        f"no answer in {_MAX_ROUNDS} rounds",
        fix="is another job running? Run it again when the cluster is free",
    )


def _count_executors(spark: SparkSession) -> int:
    context = spark.sparkContext
    if (context.master or "").startswith("local["):
        return 1
    # All block managers, one of which is the driver's.
    managers = int(context._jsc.sc().getExecutorMemoryStatus().size())
    return max(managers - 1, 1)


def report(rows: Sequence[Row]) -> WarmUpReport:
    """Sum up what tasks answered; see `WarmUpReport`."""
    fetched: dict[tuple[str, str, str], list[Answer]] = {}
    loaded: dict[tuple[str, str, str], list[Answer]] = {}
    answers = [Answer(**row.asDict()) for row in rows]
    for answer in answers:
        if answer.action == "fetch":
            fetched.setdefault((answer.host, answer.model, answer.source), []).append(answer)
        else:
            loaded.setdefault((answer.host, answer.device, answer.model), []).append(answer)
    told = [_sum_up(same) for _, same in sorted(fetched.items())]
    told += [_sum_up(same) for _, same in sorted(loaded.items())]
    failed = sum(answer.error is not None for answer in told)
    return WarmUpReport(
        tuple(answer.render() for answer in told),
        failed,
        num_executors=len({(answer.host, answer.executor) for answer in answers}),
        num_nodes=len({answer.host for answer in answers}),
    )


def _sum_up(answers: Sequence[Answer]) -> Answer:
    """Give the answer of one node: a failure, else that of the task that did the work."""
    told = max(answers, key=lambda a: (a.error is not None, a.num_bytes or 0, a.seconds))
    return replace(told, device=", ".join(sorted({answer.device for answer in answers})))
