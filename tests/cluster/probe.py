"""An application that writes down where its tasks find their engines, one JSON line per task.

    spark-submit ... tests/cluster/probe.py MODE FILE

Modes: `stages` runs scoring stages, then a router over two GPUs, then scoring again; `failing`
also kills a stage's tasks in the middle, and ends with a task that fails; `short` is two scoring
stages.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import SparkSession

from cdr.engines.base import EngineSpec, ScoringGroup
from cdr.engines.device import task_gpu_addresses
from cdr.engines.owner import find_owner
from cdr.engines.stub import StubEngine
from cdr.gpus import task_gpus
from cdr.progress import TaskCounter
from udfs.engines import task_engines

KNOBS = {"delay_s_per_token": 0.05, "is_concurrent": True, "has_child": True}
EXTRA = json.dumps(KNOBS)
SCORING = tuple(EngineSpec(name, "stub", "", extra=EXTRA) for name in ("strong", "weak"))
ROUTER = (EngineSpec("router", "stub", "", extra=EXTRA, tensor_parallel=2),)
TASKS = 8


def make_task(
    stage: str, specs: tuple[EngineSpec, ...], counter: TaskCounter, tokens: int
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def run(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import os

        ids = [int(value) for frame in frames for value in frame["id"]]
        with task_engines(specs, "gpu", counter) as (client, _):
            groups = [ScoringGroup((value, 1), ((2,) * tokens,)) for value in ids]
            found = client.score_all({spec.name: groups for spec in specs})
            if stage == "fails":
                raise RuntimeError("the probe fails on purpose")
            status = client.status()
            plain = {spec.name: StubEngine(EngineSpec(spec.name, "stub", "")) for spec in specs}
            is_right = all(
                (outcome[0].value == want[0]).all()
                for name, outcomes in found.items()
                for outcome, want in zip(outcomes, plain[name].score(groups), strict=True)
            )
            environ = Path(f"/proc/{status.pid}/environ").read_text().split("\0")
            (visible,) = (v[21:] for v in environ if v.startswith("CUDA_VISIBLE_DEVICES="))
            record = {
                "stage": stage,
                "executor": find_owner().pid,
                "worker": os.getpid(),
                "addresses": list(task_gpu_addresses()),
                "host": status.pid,
                "visible": visible,
                "engines": [engine.name for engine in status.engines],
                "is_right": bool(is_right),
            }
            yield pd.DataFrame({"record": [json.dumps(record)]})

    return run


def main() -> None:
    mode, output = sys.argv[1:]
    spark = SparkSession.builder.appName("cdr probe").getOrCreate()
    counter = TaskCounter.create(spark)

    def stage(name: str, specs: tuple[EngineSpec, ...], tokens: int = 10) -> None:
        rows = spark.range(0, TASKS, 1, TASKS).mapInPandas(
            make_task(name, specs, counter, tokens), "record string", **task_gpus(spark, specs)
        )
        with Path(output).open("a") as stream:
            stream.writelines(row["record"] + "\n" for row in rows.collect())

    def cancelled() -> None:
        spark.sparkContext.setJobGroup("slow", "is cancelled", interruptOnCancel=True)
        try:
            stage("slow", SCORING, tokens=400)  # 20 s
        except Exception as error:
            if "cancelled" not in str(error).lower():
                raise

    if mode == "short":
        stage("first", SCORING)
        stage("second", SCORING)
        return
    for name in ("first", "second", "third"):
        stage(name, SCORING)
    if mode == "failing":
        thread: Any = threading.Thread(target=cancelled)
        thread.start()
        time.sleep(3)
        spark.sparkContext.cancelAllJobs()
        thread.join()
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)
        stage("after the kill", SCORING)
        stage("fails", SCORING)
    stage("router", ROUTER)
    stage("router", ROUTER)  # a second wave
    stage("after the router", SCORING)


if __name__ == "__main__":
    main()
