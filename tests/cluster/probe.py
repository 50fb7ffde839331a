"""An application that writes down where its tasks find their engines, one JSON line per task.

    spark-submit ... tests/cluster/probe.py MODE FILE

Modes: `stages` runs scoring stages, then a router over two GPUs, then scoring again; `warm` does so
after a warm-up; `failing` also kills a stage's tasks in the middle, and ends with a task that
fails; `short` is two scoring stages.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from pyspark.sql import SparkSession

from cdr.engines.base import EngineSpec, ScoringGroup
from cdr.engines.device import task_gpu_addresses
from cdr.engines.owner import find_owner
from cdr.engines.stub import StubEngine
from cdr.gpus import task_gpus
from cdr.progress import TaskCounter
from cdr.warm_up import warm_up
from udfs.engines import task_engines
from udfs.warm_up import make_warm_up

KNOBS = {"delay_s_per_token": 0.05, "is_concurrent": True, "has_child": True}
EXTRA = json.dumps(KNOBS)
SCORING = tuple(EngineSpec(name, "stub", "", extra=EXTRA) for name in ("strong", "weak"))
ROUTER = (EngineSpec("router", "stub", "", extra=EXTRA, tensor_parallel=2),)
TASKS = 8


def make_task(
    stage: str,
    specs: tuple[EngineSpec, ...],
    counter: TaskCounter,
    tokens: int,
    warm_hosts: frozenset[int],
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
                "is_warm": status.pid in warm_hosts,
            }
            yield pd.DataFrame({"record": [json.dumps(record)]})

    return run


def warm(spark: SparkSession) -> frozenset[int]:
    """Warm up for scoring stages and then the router; give the hosts that there are after it."""
    sets = [{engine.name: engine for engine in specs} for specs in (SCORING, ROUTER)]
    told = warm_up(spark, partial(make_warm_up, choice="gpu"), {}, sets)
    if told.num_failed:
        raise RuntimeError("\n".join(told.lines))
    commands = psutil.process_iter(["pid", "cmdline"])
    return frozenset(p.pid for p in commands if "cdr.engines.host" in (p.info["cmdline"] or ()))


def main() -> None:
    mode, output = sys.argv[1:]
    spark = SparkSession.builder.appName("cdr probe").getOrCreate()
    counter = TaskCounter.create(spark)
    warm_hosts = warm(spark) if mode == "warm" else frozenset()

    def stage(name: str, specs: tuple[EngineSpec, ...], tokens: int = 10) -> None:
        rows = spark.range(0, TASKS, 1, TASKS).mapInPandas(
            make_task(name, specs, counter, tokens, warm_hosts),
            "record string",
            **task_gpus(spark, specs),
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
