"""What all but the models costs: a whole annotate run, and the bare engines on the same rows.

    python benchmarks/spark_overhead.py                  # 60 prompts; the fixed cost shows
    make bench-overhead                                  # 1,800: ten minutes at 3,000 tokens/s

The run is `jobs/annotate.py` with the demo's reward on a warehouse of its own: it reads, routes,
encodes, scores with both models, commits its waves, weighs, pairs, writes the report page and an
MLflow run. The bare side is the router and the two engines in this process, one after the other,
on the same token ids: half of the prompts before the run and half after it, so that a machine that
changes its speed meanwhile does so for both. From the speed of the first half follow the sizes of
waves and tasks, as docs/how-to/sizing.md tells users to choose them. What loads models is told and
is in neither time; the start of Spark's session is told too. Log-probs and domains of both sides
are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that spin while they wait ruin each other's timing as soon as a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from pyspark.sql import functions as F

from cdr.config import RunSpec
from cdr.encoding import Candidate, ids_hash
from cdr.engines.base import LogprobEngine, ScoringGroup, make_engine
from cdr.engines.wire import Outcome
from cdr.judge_encoding import make_encoder
from cdr.placement import place
from cdr.plan import AnnotationPlan
from cdr.prompt_router import PromptRouter
from cdr.registry import load_annotation_plan
from cdr.scoring_run import make_context
from cdr.session import get_session
from cdr.stages import group_prompts, load_candidates
from cdr.summary import EngineUse
from cdr.tables import LOGPROBS, ROUTES, RUNS
from cdr.warehouse import Warehouse
from jobs.annotate import annotate

ROOT = Path(__file__).resolve().parents[1]

WAVE_S, TASK_S = 1500, 90
"""Seconds of a wave and a task, as docs/how-to/sizing.md has them."""

GOAL, LEAST_WORK_S = 0.95, 600
"""Share of the bare engines' speed, on so much work at least."""


@dataclass
class Bare:
    """The engines of a plan in this process, and what they took and gave.

    Args:
        plan: its router and engines are loaded at once.
    """

    plan: AnnotationPlan
    routing_s: float = 0.0
    scoring_s: float = 0.0
    tokens: int = 0
    domains: dict[str, str | None] = field(default_factory=dict)
    logprobs: dict[tuple[str, bytes, bytes], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        route = self.plan.reward.route
        assert route is not None
        started = time.perf_counter()
        self._engines = {spec.name: make_engine(spec) for spec in self.plan.reward.engines}
        self._router, self._router_engine = PromptRouter(route), make_engine(route.engine)
        self._encoder = make_encoder(self.plan.reward.encoding)
        self.load_s = time.perf_counter() - started

    @property
    def spent_s(self) -> float:
        """Seconds in which an engine worked."""
        return self.routing_s + self.scoring_s

    def annotate(self, rows: Sequence[Any]) -> None:
        """Route and score rows of `cdr.stages.group_prompts`."""
        run = self.plan.config.run
        started = time.perf_counter()
        routes = self._router.route(
            [row["prompt"] for row in rows],
            lambda groups: _outcomes(self._router_engine, groups),
            run.request_tokens,
        )
        self.routing_s += time.perf_counter() - started
        asked: dict[str, dict[ScoringGroup, None]] = {name: {} for name in self._engines}
        for row, route in zip(rows, routes, strict=True):
            self.domains[row["prompt_hash"]] = route.domain
            encoded = self._encoder.encode(
                [turn.asDict() for turn in row["prompt"]],
                row["prompt_hash"],
                route.domain,
                [Candidate(**candidate.asDict()) for candidate in row["candidates"]],
            )
            for view in encoded.views:
                completions = dict.fromkeys(tuple(candidate.ids) for candidate in view.candidates)
                group = ScoringGroup(tuple(view.prefix_ids), tuple(completions))
                asked[view.model_key][group] = None
        for name, engine in self._engines.items():
            groups = sorted(asked[name], key=lambda group: group.prefix_ids)
            started = time.perf_counter()
            answers = engine.score(groups)
            self.scoring_s += time.perf_counter() - started
            for group, logprobs in zip(groups, answers, strict=True):
                self.tokens += len(group.prefix_ids) + sum(map(len, group.completions_ids))
                for ids, values in zip(group.completions_ids, logprobs, strict=True):
                    key = (name, ids_hash(group.prefix_ids), ids_hash(ids))
                    self.logprobs[key] = float(values.sum(dtype=np.float64))


def _outcomes(engine: LogprobEngine, groups: Sequence[ScoringGroup]) -> list[list[Outcome[Any]]]:
    return [[Outcome(logprobs) for logprobs in answers] for answers in engine.score(groups)]


def make_rows(prompts: int) -> Iterator[dict[str, str]]:
    """Give the demo's prompts and completions over and over, no text twice."""
    lines = (ROOT / "conf/demo/completions.jsonl").read_text(encoding="utf-8").splitlines()
    by_prompt = [
        list(rows)
        for _, rows in itertools.groupby(map(json.loads, lines), key=lambda r: r["prompt_id"])
    ]
    for number, rows in enumerate(itertools.islice(itertools.cycle(by_prompt), prompts)):
        for row in rows:
            yield {
                "prompt_id": f"{number}",
                "completion_id": row["completion_id"],
                "prompt": f"({number}) {row['prompt']}",
                "completion": f"({number}) {row['completion']}",
                "finish_reason": row["finish_reason"],
                "domain": row["domain"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=60, help="of four candidates each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args.prompts, args.sets, Path(folder))


def measure(prompts: int, sets: Sequence[str], folder: Path) -> None:
    """Measure in a folder and print what was found."""
    source = folder / "completions.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(prompts))
    # Requests of the size that a run has by default, not the demo's.
    sets = [
        f"input.path={source}",
        f"warehouse={folder}/warehouse",
        f"run.request_tokens={RunSpec().request_tokens}",
        *sets,
    ]
    plan = _load(sets)
    started = time.perf_counter()
    spark = get_session("cdr benchmark", warehouse=plan.config.warehouse)
    session_s = time.perf_counter() - started
    warehouse = Warehouse(spark, plan.config.warehouse, plan.config.tables)
    plan = place(plan, spark)
    context = make_context(plan, warehouse)
    with context.staging:
        rows = group_prompts(load_candidates(context)).orderBy("prompt_hash").collect()

    bare = Bare(plan)
    half = -(-len(rows) // 2)
    bare.annotate(rows[:half])
    rate = bare.tokens / bare.scoring_s
    sizes = [f"run.wave_tokens={rate * WAVE_S:.0f}", f"run.task_tokens={rate * TASK_S:.0f}"]
    plan = place(_load([*sizes, *sets]), spark)
    started = time.perf_counter()
    code = annotate(plan, warehouse)
    job_s = time.perf_counter() - started
    bare.annotate(rows[half:])
    assert code == 0, f"the run ended with {code}"

    use = EngineUse.read(warehouse.read(RUNS).select("counts").collect()[0][0])
    names = {role: model.engine_spec.name for role, model in plan.reward.models.items()}
    # Roles that share a model name the same loading.
    loads = {names[role]: seconds for role, seconds in use.load_s.items()}
    load_s = sum(loads.values())
    run_s = job_s - load_s
    print(f"{bare.tokens:,} tokens in {prompts} prompts, each prefix once for each model")
    print(f"bare engines     {bare.spent_s:7.1f} s to route and score; loading {bare.load_s:.1f} s")
    print(f"annotate run     {run_s:7.1f} s from input to report; loading {load_s:.1f} s")
    print(f"Spark's session  {session_s:7.1f} s")
    print(f"bare / run       {bare.spent_s / run_s:7.3f} without loading")
    print(f"                 = {use.busy_s / run_s:.3f}, share of the run that its engines worked")
    print(
        f"                 × {bare.spent_s / use.busy_s:.3f}, their speed by that of the bare ones"
    )
    print(f"                 {bare.spent_s / job_s:7.3f} with the loading of the run's models")
    print(_compare(bare, warehouse))
    print(_judge(bare.spent_s, bare.spent_s / run_s))
    spark.stop()


def _judge(bare_s: float, ratio: float) -> str:
    if bare_s < LEAST_WORK_S:
        return f"goal: needs {LEAST_WORK_S:.0f} s of work, this was {bare_s:.0f} s: more --prompts"
    return f"goal: bare / run ≥ {GOAL} without loading: {'met' if ratio >= GOAL else 'MISSED'}"


def _load(sets: Sequence[str]) -> AnnotationPlan:
    return load_annotation_plan(ROOT / "conf/annotate/demo.yaml", sets)


def _compare(bare: Bare, warehouse: Warehouse) -> str:
    domains = {r["prompt_hash"]: r["domain"] for r in warehouse.read(ROUTES).collect()}
    assert domains.keys() == bare.domains.keys()
    elsewhere = sum(domains[key] != bare.domains[key] for key in domains)
    sums = warehouse.read(LOGPROBS).select(
        "model_key", "prefix_hash", "completion_hash", F.col("logprob_sum").alias("sum")
    )
    found = {
        (r["model_key"], bytes(r["prefix_hash"]), bytes(r["completion_hash"])): r["sum"]
        for r in sums.collect()
    }
    common = found.keys() & bare.logprobs.keys()
    differences = [abs(found[key] - bare.logprobs[key]) for key in common]
    return (
        f"{elsewhere} of {len(domains)} prompts routed elsewhere; {len(common)} of {len(found)} "
        f"log-probs asked by both, mean |Δ sum| {np.mean(differences):.4f} nats, "
        f"max {max(differences):.4f}"
    )


if __name__ == "__main__":
    main()
