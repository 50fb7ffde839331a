"""What executors must have before a run begins: as many GPUs as its models need, and vLLM.

Without this the first task would tell, after routes are asked for and rows are encoded; or, where
a node type or a discovery script is wrong, nobody: models of billions of parameters run on a CPU
too, for weeks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from cdr.config import JobSpec
from cdr.engines.base import EngineSpec
from cdr.engines.device import miss_gpu, miss_gpus, visible_cuda_devices
from cdr.engines.vllm_setup import check_version
from cdr.gpus import EXECUTOR_AMOUNT, task_gpus
from cdr.progress import is_one_machine

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Limits = TypeVar("Limits", bound=JobSpec)


def settle_device(run: Limits, engines: Sequence[EngineSpec], spark: SparkSession) -> Limits:
    """Check that the engines can run where the tasks will, and settle on what.

    Args:
        run: the config's `run`.
        engines: all that the run loads; those behind an API need nothing.
        spark: on a cluster whose settings name no GPUs, one small task looks for some.

    Returns:
        `run` with what tasks have to insist on: on a cluster `device` is `gpu` for `auto`.

    Raises:
        ModelError: on one machine, its vLLM is missing, too old, or cannot do what is asked. (A
            cluster's executors tell when they load the model: the driver need not have it.)
        SetupError: there are no GPUs, and the CPU is not meant; or a model is split over more
            than one executor has.
    """
    loaded = [engine for engine in engines if engine.engine != "api"]
    if not loaded:
        return run
    num_gpus = max(engine.tensor_parallel for engine in loaded)
    is_one = is_one_machine(spark.sparkContext.master)
    for engine in loaded:
        if is_one and engine.engine == "vllm":
            check_version(engine)
    if run.device == "cpu" and num_gpus > 1:
        raise miss_gpus(num_gpus, (), "the CPU (run.device)")
    task_gpus(spark, loaded)  # asked here too, because it refuses what executors cannot give
    if run.device == "cpu":
        return run
    if is_one:
        place, visible = "this machine", visible_cuda_devices()
        if run.device == "gpu" and not visible:
            raise miss_gpu(place)
    elif int(spark.sparkContext.getConf().get(EXECUTOR_AMOUNT, "0") or 0):
        return run.model_copy(update={"device": "gpu"})
    else:
        place, visible = "an executor", _look_up(spark)
        if not visible:
            raise miss_gpu(f"{EXECUTOR_AMOUNT} is not set, and an executor sees no GPU in /dev")
    if num_gpus > max(len(visible), 1):
        raise miss_gpus(num_gpus, visible, place)
    return run if is_one else run.model_copy(update={"device": "gpu"})


def _look_up(spark: SparkSession) -> tuple[str, ...]:
    # Executors are of one kind: one of them tells for all.
    found: tuple[str, ...] = (
        spark.sparkContext.parallelize([0], 1).map(lambda _: visible_cuda_devices()).first()
    )
    return found
