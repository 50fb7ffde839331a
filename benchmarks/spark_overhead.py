"""What Spark and the engine host cost: the same groups through the bare engine and through both.

    python benchmarks/spark_overhead.py                             # three rounds of a minute
    python benchmarks/spark_overhead.py --prompts 900 --rounds 1    # work of more than ten minutes

Both run in turn in one process tree on the demo model; the ratio is what counts. A first pass over
a few prompts starts the host and loads both models: its time is told and is not in the ratio.
The Spark side is the job's own scoring function (`udfs.score.make_score`) over a DataFrame of token
ids, with the rows of the wave in one task. Log-probs of both sides are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame

from cdr.config import RunSpec
from cdr.encoding import ids_hash
from cdr.engines.base import EngineSpec, ScoringGroup, make_engine
from cdr.engines.hardware import resolve_dtype
from cdr.progress import TaskCounter
from cdr.scoring import SCORED_DDL
from cdr.session import get_session
from udfs.score import make_score

WARM_UP = 8
"""Prompts of the first pass, which is not timed."""


def make_groups(prompts: int, candidates: int, seed: int = 0) -> list[ScoringGroup]:
    """Random token ids: a shared head of 200 tokens, prompts of 60, completions of 80."""
    rng = np.random.default_rng(seed)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(rng.integers(100, 40_000, size).tolist())

    head = draw(200)
    return [
        ScoringGroup(head + draw(60), tuple(draw(80) for _ in range(candidates)))
        for _ in range(prompts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cache = Path(os.environ.get("CDR_CACHE", "~/.cache/cdr")).expanduser()
    path, dtype = str(cache / "models" / "smollm2-135m-instruct"), resolve_dtype("auto")
    spec = EngineSpec(name="bench", engine="transformers", path=path, dtype=dtype)

    groups = sorted(make_groups(args.prompts, args.candidates), key=lambda g: g.prefix_ids)
    tokens = sum(len(g.prefix_ids) + sum(map(len, g.completions_ids)) for g in groups)
    spark = get_session("cdr benchmark")
    rows = [
        (
            "bench",
            ids_hash(g.prefix_ids),
            list(g.prefix_ids),
            [ids_hash(ids) for ids in g.completions_ids],
            [list(ids) for ids in g.completions_ids],
        )
        for g in groups
    ]
    ddl = "model_key string, prefix_hash binary, prefix_ids array<int>, "
    ddl += "completion_hashes array<binary>, completions_ids array<array<int>>"
    frame = spark.createDataFrame(rows, ddl).coalesce(1).cache()
    frame.count()
    run = RunSpec()
    function = make_score((spec,), run, TaskCounter.create(spark), "bench")
    engine = make_engine(spec)

    def through_spark(wave: DataFrame) -> dict[bytes, float]:
        scored = wave.mapInPandas(function, SCORED_DDL).collect()
        return {
            bytes(r["prefix_hash"]) + bytes(r["completion_hash"]): r["logprob_sum"] for r in scored
        }

    def bare(groups: Sequence[ScoringGroup]) -> dict[bytes, float]:
        return {
            ids_hash(g.prefix_ids) + ids_hash(ids): float(logprobs.sum(dtype=np.float64))
            for g, answers in zip(groups, engine.score(groups), strict=True)
            for ids, logprobs in zip(g.completions_ids, answers, strict=True)
        }

    started = time.perf_counter()
    through_spark(frame.limit(WARM_UP))
    print(f"host started, model loaded and warm in {time.perf_counter() - started:.1f} s")
    bare(groups[:WARM_UP])
    ratios, difference = [], 0.0
    for _ in range(args.rounds):
        started = time.perf_counter()
        expected = bare(groups)
        middle = time.perf_counter()
        found = through_spark(frame)
        ended = time.perf_counter()
        assert found.keys() == expected.keys()
        difference = max(difference, *(abs(found[key] - expected[key]) for key in expected))
        ratios.append((middle - started) / (ended - middle))
        print(
            f"bare {tokens / (middle - started):7.0f} tokens/s   "
            f"through Spark and host {tokens / (ended - middle):7.0f} tokens/s   "
            f"ratio {ratios[-1]:.2f}"
        )
    print(
        f"median ratio {statistics.median(ratios):.2f}, max |Δ sum| {difference:.4f} nats, {dtype}"
    )
    spark.stop()


if __name__ == "__main__":
    main()
