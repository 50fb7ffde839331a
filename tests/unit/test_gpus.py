"""A stage asks for the GPUs its engines need, where Spark's own setting says something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cdr.engines.base import EngineSpec
from cdr.errors import SetupError
from cdr.gpus import task_gpus


def ask(
    tensor_parallel: int, per_executor: str | None, per_task: str | None, **spark: str
) -> dict[str, Any]:
    amounts = {
        "spark.executor.resource.gpu.amount": per_executor,
        "spark.task.resource.gpu.amount": per_task,
    }
    conf = {key: value for key, value in amounts.items() if value is not None}
    context = SimpleNamespace(
        master=spark.get("master", "yarn"), getConf=lambda: SimpleNamespace(get=conf.get)
    )
    session: Any = SimpleNamespace(sparkContext=context, version=spark.get("version", "3.5.1"))
    wide = EngineSpec("b", "stub", "", tensor_parallel=tensor_parallel)
    return task_gpus(session, [EngineSpec("a", "stub", ""), wide])


@pytest.mark.parametrize(
    ("tensor_parallel", "per_executor", "per_task"),
    [
        (1, None, None),  # no GPU scheduling: tasks claim the machine's
        (4, None, None),
        (1, "4", "1"),
        (2, "4", "2"),
        (1, "4", "0.5"),  # two tasks share a GPU and its host
        (1, "4", "4"),  # Spark 3.5: wasteful, not wrong
    ],
)
def test_settings_that_fit_are_left_alone(
    tensor_parallel: int, per_executor: str | None, per_task: str | None
) -> None:
    assert ask(tensor_parallel, per_executor, per_task) == {}


def test_spark_3_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(SetupError, match=r"set spark\.task\.resource\.gpu\.amount=2"):
        ask(2, "4", "1")
    with pytest.raises(SetupError, match=r"set spark\.task\.resource\.gpu\.amount=1"):
        ask(1, "4", None)


@pytest.mark.parametrize("version", ["3.5.1", "4.2.0"])
def test_more_gpus_than_an_executor_has_are_refused_on_any_spark(version: str) -> None:
    with pytest.raises(SetupError, match=r"set spark\.executor\.resource\.gpu\.amount=8"):
        ask(8, "4", "1", version=version)


def test_one_machine_has_no_executors_to_ask() -> None:
    assert ask(2, "4", "1", master="local[2,3]", version="4.2.0") == {}
