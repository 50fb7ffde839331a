"""The warm-up job on a real session: copies, loads, and says which node failed and why."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pyspark.sql import Row, SparkSession

from cdr.config import load_annotate_config
from cdr.engines.base import EngineSpec
from cdr.errors import SetupError
from cdr.plan import plan_annotation
from cdr.warm_up import Answer, WarmUpReport, plan_engine_sets, plan_sources, report, warm_up
from cdr.weights import WEIGHT_FILES, Source, hash_files
from jobs.warm_up import main
from tests.tokenizers import make_smollm2

HOST = socket.gethostname()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models with random weights and a real tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_smollm2()
    folders = {}
    for number, role in enumerate(("strong", "weak")):
        folders[role] = tmp_path_factory.mktemp(role)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16 + 16 * number, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    return folders


@pytest.fixture
def make_config(models: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a job whose models lie behind URIs."""

    def make(**changes: Any) -> list[str]:
        specs: dict[str, Any] = {
            role: {
                "path": folder.as_uri(),
                "checksum": hash_files(folder, WEIGHT_FILES),
                "dtype": "float32",
                "max_length": 256,
                **changes,
            }
            for role, folder in models.items()
        }
        specs["strong"]["tuned_from"] = "weak"
        reward = {"name": "r", "models": specs, "routing": {"mode": "none"}}
        config = {
            "dataset": "d",
            "warehouse": str(tmp_path / "warehouse"),
            "input": {"path": str(tmp_path / "none.jsonl"), "format": "json"},
            "reward": reward,
        }
        file = tmp_path / "annotate.yaml"
        file.write_text(yaml.safe_dump(config))
        return ["--config", str(file)]

    return make


def test_weights_come_once_and_engines_load_from_the_copy(
    spark: SparkSession,
    make_config: Callable[..., list[str]],
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*make_config(), "--load"]) == 0
    *first, answered = capsys.readouterr().out.splitlines()
    assert answered == "1 executors answered, on 1 nodes"
    assert [line.split("  ")[:3] for line in first] == [
        [HOST, "cpu", "strong"],
        [HOST, "cpu", "weak"],
        [HOST, "cpu", "strong, weak"],
    ]
    for line, folder in zip(first, models.values(), strict=False):
        assert folder.as_uri() in line
        assert " GiB copied, " in line
        assert line.endswith("checksum ok")
    assert "loaded in" in first[2]
    assert "transformers" in first[2]

    assert main(make_config()) == 0
    *again, _ = capsys.readouterr().out.splitlines()
    assert len(again) == 2
    assert all("already there" in line and line.endswith("checksum ok") for line in again)


def test_a_node_that_fails_gives_the_reason_and_the_exit_code(
    spark: SparkSession,
    make_config: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*make_config(checksum="f" * 64), "--load"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("FAILED to fetch: ") == 2
    assert f"expected {'f' * 64}" in captured.out
    assert "2 of 2 failed" in captured.err
    assert "loaded" not in captured.out


def test_sources_and_engine_sets_are_those_of_the_run(
    make_config: Callable[..., list[str]], models: dict[str, Path]
) -> None:
    weak = models["weak"].as_uri()
    router = [f"reward.models.router.{key}={value}" for key, value in (
        ("path", weak), ("checksum", hash_files(models["weak"], WEIGHT_FILES)),
        ("dtype", "float32"), ("max_length", 256),
    )]  # fmt: skip
    pack = ["reward.routing.mode=adaptive", f"reward.prompt_pack={ROOT}/conf/prompts/cdr-v1.yaml"]
    file = make_config()[1]
    plan = plan_annotation(load_annotate_config(file, [*router, *pack]))
    roles = {source.path: names for source, names in plan_sources(plan).items()}
    assert roles == {models["strong"].as_uri(): "strong", weak: "weak, router"}
    # The router is loaded with the others, unless each is loaded alone.
    assert [list(engines) for engines in plan_engine_sets(plan)] == [["strong", "weak"]]
    sequential = load_annotate_config(file, [*router, *pack, "run.placement=sequential"])
    sets = plan_engine_sets(plan_annotation(sequential))
    assert [list(engines) for engines in sets] == [["router"], ["strong"], ["weak"]]
    other = [*router, *pack, "reward.models.router.dtype=bfloat16"]
    sets = plan_engine_sets(plan_annotation(load_annotate_config(file, other)))
    assert [list(engines) for engines in sets] == [["router"], ["strong", "weak"]]


def answer(**changes: Any) -> Row:
    base = Answer("n1", "1-1", "cuda:0", "strong", "fetch", "s3://b/m", 0, 0.5, True)
    return Row(**{**asdict(base), **changes})


def test_a_node_is_told_once_by_the_task_that_did_the_work() -> None:
    told = report(
        [
            answer(),
            answer(device="cuda:1", num_bytes=3 << 30, seconds=9.0),
            answer(host="n2", executor="2-2", error="the disk is too full", num_bytes=None),
            answer(host="n2", executor="2-3"),
            answer(action="load", source="vllm 1", num_bytes=None, is_verified=None, seconds=4.0),
        ]
    )
    assert told.lines == (
        "n1  cuda:0, cuda:1  strong  s3://b/m  3.00 GiB copied, 9.0 s, checksum ok",
        "n2  cuda:0  strong  s3://b/m  FAILED to fetch: the disk is too full",
        "n1  cuda:0  strong  vllm 1  loaded in 4.0 s",
    )
    assert (told.num_failed, told.num_executors, told.num_nodes) == (1, 3, 2)


class FakeSpark:
    """A session of two executors with four GPUs each, whose tasks give these answers.

    Args:
        answers: what the tasks of a round give; always the same.
        settings: Spark's, besides the GPUs.
    """

    def __init__(self, answers: list[Row], **settings: str) -> None:
        conf = {
            "spark.executor.resource.gpu.amount": "4",
            "spark.task.resource.gpu.amount": "1",
            **settings,
        }
        managers = SimpleNamespace(size=lambda: 3)  # one is the driver's
        self.version = "4.2.0"
        self.rounds: list[int] = []
        self.sparkContext = SimpleNamespace(
            master="yarn",
            applicationId=str(id(self)),
            defaultParallelism=8,
            getConf=lambda: SimpleNamespace(get=conf.get),
            _jsc=SimpleNamespace(
                sc=lambda: SimpleNamespace(getExecutorMemoryStatus=lambda: managers)
            ),
        )
        self._answers = answers

    def range(self, *_: int) -> FakeSpark:
        return self

    def mapInPandas(self, function: Any, schema: str, profile: Any = None) -> FakeSpark:  # noqa: N802 - Spark's name
        self.rounds.append(int(profile.taskResources["gpu"].amount) if profile else 1)
        return self

    def collect(self) -> list[Row]:
        return self._answers


SPLIT = {"router": EngineSpec("r", "stub", "", tensor_parallel=4)}
STRONG, WEAK = ({role: EngineSpec(role, "stub", "")} for role in ("strong", "weak"))
SOURCE = {Source("s3://b/m"): "strong"}


def warm(spark: FakeSpark) -> tuple[WarmUpReport, list[tuple[int, list[str]]]]:
    """Give the report, and what was asked for: sources, and roles in order."""
    asked = []

    def make_function(sources: Any, engine_sets: Any) -> Any:
        asked.append((len(sources), [role for engines in engine_sets for role in engines]))

    return warm_up(spark, make_function, SOURCE, [SPLIT, STRONG, WEAK]), asked  # type: ignore[arg-type]


def test_each_set_is_loaded_on_as_many_gpus_as_in_the_run_and_the_runs_first_one_last() -> None:
    both = [answer(host="n1"), answer(host="n2")]
    spark = FakeSpark(both)
    told, asked = warm(spark)
    assert asked == [(1, ["weak", "strong"]), (0, ["router"])]
    assert spark.rounds == [1, 4]
    assert (told.num_failed, told.num_executors) == (0, 2)


def test_after_a_failure_no_other_set_is_loaded() -> None:
    told, asked = warm(FakeSpark([answer(host="n1"), answer(host="n2", error="full")]))
    assert [number for number, _ in asked] == [1]
    assert told.num_failed == 1


def test_rounds_go_on_until_all_have_answered_but_for_executors_that_only_this_set_has() -> None:
    with pytest.raises(SetupError, match="1 of 2 executors gave no answer in 5 rounds"):
        warm(FakeSpark([answer(host="n1")]))
    dynamic = {"spark.dynamicAllocation.enabled": "true", "spark.task.resource.gpu.amount": "2"}
    spark = FakeSpark([answer(host="n1")], **dynamic)
    told, _ = warm(spark)
    assert spark.rounds == [1, 4]
    assert told.num_executors == 1
