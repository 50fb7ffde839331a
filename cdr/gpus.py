"""How a task of a stage gets the GPUs that its engines need.

Spark's own setting, `spark.task.resource.gpu.amount`, holds for all stages of an application. A
router over four GPUs and scoring models on one each want different amounts: from Spark 4.0 on, a
stage with a model may bring a resource profile of its own. It says what a *task* takes, and the
same executors serve all stages. Only with dynamic allocation, which asks for executors by profile,
it has to say what an executor has as well; such a stage gets executors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from cdr.engines.base import EngineSpec
from cdr.errors import SetupError
from cdr.progress import is_one_machine

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

EXECUTOR_AMOUNT = "spark.executor.resource.gpu.amount"
"""Spark's setting of the GPUs of an executor."""
_TASK = "spark.task.resource.gpu.amount"
_DISCOVERY = "spark.executor.resource.gpu.discoveryScript"
_VENDOR = "spark.executor.resource.gpu.vendor"


def task_gpus(spark: SparkSession, engines: Sequence[EngineSpec]) -> dict[str, Any]:
    """Give what `mapInPandas` or `mapInArrow` needs to get each task the GPUs of its engines.

    Args:
        spark: the session.
        engines: all that the stage needs; the largest `tensor_parallel` counts. None for a judge
            behind an API.

    Returns:
        `{"profile": ...}`, or nothing where Spark's settings fit already, or where Spark gives
        out no GPUs (tasks then claim those of their machine, `cdr.engines.device`).

    Raises:
        SetupError: executors have fewer GPUs, or this Spark needs a setting for it.
    """
    needed = max((engine.tensor_parallel for engine in engines), default=0)
    if not needed:
        return {}
    conf = spark.sparkContext.getConf()
    per_executor = int(conf.get(EXECUTOR_AMOUNT, "0") or 0)
    if is_one_machine(spark.sparkContext.master) or not per_executor:
        return {}
    if needed > per_executor:
        raise SetupError(
            f"a model with tensor_parallel {needed} needs {needed} GPUs in one executor, which has "
            f"{per_executor}",
            fix=f"set {EXECUTOR_AMOUNT}={needed}, or a smaller tensor_parallel",
        )
    per_task = float(conf.get(_TASK, "0") or 0)
    if per_task == needed or (needed == 1 and 0 < per_task < 1):  # tasks may share a GPU
        return {}
    if int(spark.version.split(".")[0]) < 4:
        if per_task > needed:
            return {}  # more than needed is wasteful, not wrong
        raise SetupError(
            f"a task needs {needed} GPUs, and this Spark {spark.version} gives every task "
            f"{per_task:g}",
            fix=f"set {_TASK}={needed}; from Spark 4.0 on, stages ask for what they need",
        )
    executor = None
    if conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        executor = (per_executor, conf.get(_DISCOVERY, "") or "", conf.get(_VENDOR, "") or "")
    return {"profile": _build_profile(spark.sparkContext.applicationId, needed, executor)}


@cache  # each profile has an id of its own, and dynamic allocation new executors for each
def _build_profile(
    application_id: str, per_task: int, executor: tuple[int, str, str] | None
) -> ResourceProfile:
    """Build the profile of an application's stages whose tasks take so many GPUs.

    Args:
        application_id: profiles do not outlive their application.
        per_task: GPUs.
        executor: GPUs, discovery script and vendor to ask the cluster manager for; cores and
            memory are those of the settings.
    """
    from pyspark.resource import (
        ExecutorResourceRequests,
        ResourceProfileBuilder,
        TaskResourceRequests,
    )

    builder = ResourceProfileBuilder().require(TaskResourceRequests().resource("gpu", per_task))
    if executor:
        builder.require(ExecutorResourceRequests().resource("gpu", *executor))
    profile: ResourceProfile = builder.build
    return profile
