"""What a run's engines need of its executors, and how a stage asks Spark for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cdr.config import JobSpec
from cdr.engines import vllm_setup
from cdr.engines.base import EngineSpec
from cdr.engines.device import DeviceChoice
from cdr.errors import ModelError, SetupError
from cdr.executors import settle_device
from cdr.gpus import task_gpus


def make_session(
    per_executor: str | None,
    per_task: str | None,
    *,
    master: str = "yarn",
    version: str = "3.5.1",
    seen: tuple[str, ...] = (),
) -> Any:
    """A session with these settings, whose executors see these GPUs."""
    amounts = {
        "spark.executor.resource.gpu.amount": per_executor,
        "spark.task.resource.gpu.amount": per_task,
    }
    conf = {key: value for key, value in amounts.items() if value is not None}
    answer = SimpleNamespace(first=lambda: seen)
    context = SimpleNamespace(
        master=master,
        getConf=lambda: SimpleNamespace(get=conf.get),
        parallelize=lambda rows, slices: SimpleNamespace(map=lambda function: answer),
    )
    return SimpleNamespace(sparkContext=context, version=version)


def ask(
    tensor_parallel: int, per_executor: str | None, per_task: str | None, **spark: str
) -> dict[str, Any]:
    session = make_session(per_executor, per_task, **spark)  # type: ignore[arg-type]
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


def settle(session: Any, choice: DeviceChoice = "auto", engine: str = "transformers") -> str:
    return settle_device(JobSpec(device=choice), [EngineSpec("a", engine, "")], session).device


def test_a_cluster_without_gpus_is_refused_before_any_work_unless_its_cpus_are_meant() -> None:
    bare = make_session(None, None)
    for choice in ("auto", "gpu"):
        with pytest.raises(SetupError, match="no GPU for the models") as refused:
            settle(bare, choice)  # type: ignore[arg-type]
        assert "spark.executor.resource.gpu.amount" in str(refused.value.where)
    assert settle(bare, "cpu") == "cpu"
    assert settle(bare, engine="api") == "auto"  # asks nothing of the executors
    # Tasks then insist on the GPU that Spark gives, or that they claim of their machine.
    assert settle(make_session("1", "1")) == "gpu"
    assert settle(make_session(None, None, seen=("0", "1"))) == "gpu"


def test_one_machine_may_use_its_cpu_unless_a_gpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    laptop = make_session(None, None, master="local[2,3]")
    monkeypatch.setattr("cdr.executors.visible_cuda_devices", lambda: ())
    assert [settle(laptop, choice) for choice in ("auto", "cpu")] == ["auto", "cpu"]
    with pytest.raises(SetupError, match="no GPU for the models"):
        settle(laptop, "gpu")
    monkeypatch.setattr("cdr.executors.visible_cuda_devices", lambda: ("0",))
    assert settle(laptop, "gpu") == "gpu"


def settle_split(session: Any, choice: DeviceChoice = "auto") -> str:
    engines = [EngineSpec("a", "stub", ""), EngineSpec("b", "stub", "", tensor_parallel=4)]
    return settle_device(JobSpec(device=choice), engines, session).device


def test_a_model_split_over_more_gpus_than_there_are_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settle_split(make_session("4", "4")) == "gpu"
    with pytest.raises(SetupError, match="needs 4 GPUs in one executor, which has 2"):
        settle_split(make_session("2", "2"))
    assert settle_split(make_session(None, None, seen=("0", "1", "2", "3"))) == "gpu"
    with pytest.raises(SetupError, match="needs 4 GPUs, but an executor has 2: 0, 1"):
        settle_split(make_session(None, None, seen=("0", "1")))
    laptop = make_session(None, None, master="local[2,3]")
    monkeypatch.setattr("cdr.executors.visible_cuda_devices", lambda: ("0", "1"))
    with pytest.raises(SetupError, match="needs 4 GPUs, but this machine has 2: 0, 1"):
        settle_split(laptop)
    monkeypatch.setattr("cdr.executors.visible_cuda_devices", lambda: ())
    with pytest.raises(SetupError, match="needs 4 GPUs, but this machine has none"):
        settle_split(laptop)
    for session in (laptop, make_session("4", "1")):
        with pytest.raises(SetupError, match=r"needs 4 GPUs, but the CPU .* has none"):
            settle_split(session, "cpu")


def test_a_missing_vllm_is_told_on_one_machine_and_left_to_the_executors_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_setup, "_read_version", lambda: None)
    laptop = make_session(None, None, master="local[2]")
    with pytest.raises(ModelError, match="vLLM is not installed here"):
        settle(laptop, engine="vllm")
    assert settle(laptop, engine="transformers") == "auto"
    assert settle(make_session("1", "1"), engine="vllm") == "gpu"
