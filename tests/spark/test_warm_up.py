"""The warm-up job on a real session: copies, loads, and says which node failed and why."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import Row, SparkSession

from cdr.warm_up import Answer, report
from cdr.weights import WEIGHT_FILES, hash_files
from jobs.warm_up import main
from tests.tokenizers import make_smollm2

HOST = socket.gethostname()


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
    first = capsys.readouterr().out.splitlines()
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
    again = capsys.readouterr().out.splitlines()
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
    assert told.num_failed == 1
