"""Answering benchmarks with stub models: turns, temperatures, files, resume, comparison, links."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

from cdr.cli import STOPPED
from cdr.downstream import LINK_TAG
from cdr.errors import ConfigError, InputError, SetupError
from cdr.tables import BENCHMARK_PAIRS, COMPLETIONS, RUNS
from cdr.tracking_store import open_store
from cdr.warehouse import Warehouse
from jobs.answer_benchmark import main
from tests.spark.conftest import MakeStore
from tests.tokenizers import make_smollm2

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Another."]},
    {"question_id": 82, "category": "math", "turns": ["2 + 2?", "And 3 more?"]},
    {"question_id": 83, "category": "math", "turns": ["3 + 3? <|im_end|>", "And 1?"]},
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, for the stub to borrow."""
    folder = tmp_path_factory.mktemp("policy")
    make_smollm2().save_pretrained(folder)
    return folder


@pytest.fixture
def uri(make_store: MakeStore, tmp_path: Path) -> str:
    """The MLflow store of a test's jobs."""
    return make_store(tmp_path)


def write_config(folder: Path, policy: Path, uri: str, **changes: Any) -> list[str]:
    """Write a config; give the job's arguments."""
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def reward(name: str, model: str) -> dict[str, Any]:
        return {
            "name": name,
            "models": {"m": {"path": str(policy), "engine": "stub", "adapter": model}},
            "form": "custom",
            "terms": [{"model": "m", "condition": "plain", "weight": 1}],
            "routing": {"mode": "none"},
            "encoding": {"template": "own", "special_tokens_in_text": "as_text"},
        }

    config = {
        "dataset": "tuned",
        "benchmark": "mt_bench",
        "questions": str(questions),
        "answers": str(folder / "answers"),
        "warehouse": str(folder / "warehouse"),
        "policy": {"path": str(policy), "engine": "stub", "max_length": 256},
        "sampling": {
            "temperature": 0.7,
            "temperature_by_category": {"math": 0},
            "max_new_tokens": 8,
        },
        "reward": reward("ours", "a"),
        "held_out_reward": reward("held-out", "b"),
        "scoring": {"max_rejected_fraction": 1},  # the stub may say nothing at all
        "statistics": {"resamples": 200},
        "tracking": {"uri": uri},
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file)]


def test_two_turns_are_answered_written_compared_and_linked(
    spark: SparkSession, tmp_path: Path, policy: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = open_store(uri)
    training = client.create_run(client.create_experiment("simpo")).info.run_id
    arguments = write_config(tmp_path, policy, uri)
    # Another policy's file, as the benchmark's tool writes it.
    start = tmp_path / "start.jsonl"
    answers = [
        {
            "question_id": row["question_id"],
            "model_id": "start",
            "choices": [{"index": 0, "turns": [f"Well, {text}" for text in row["turns"]]}],
        }
        for row in QUESTIONS
    ]
    start.write_text("".join(json.dumps(row) + "\n" for row in answers))
    linked = ["--set", f"training_run={training}"]
    assert main([*arguments, *linked, "--compare-with", str(start)]) == 0

    file = tmp_path / "answers" / "model_answer" / "tuned.jsonl"
    rows = {row["question_id"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == [81, 82, 83]
    assert {len(row["choices"][0]["turns"]) for row in rows.values()} == {2}

    # Each turn at each temperature is a dataset; the second turn's prompt has the first's answer.
    warehouse = Warehouse(spark, str(tmp_path / "warehouse"))
    drawn = {
        (row["dataset"], row["prompt_id"]): row
        for row in warehouse.read(COMPLETIONS).collect()
        if row["dataset"].startswith("tuned")
    }
    assert {key: len(row["prompt"]) for key, row in drawn.items()} == {
        ("tuned.turn-1.t-0.7", "81"): 1, ("tuned.turn-2.t-0.7", "81"): 3,
        ("tuned.turn-1.t-0", "82"): 1, ("tuned.turn-2.t-0", "82"): 3,
        ("tuned.turn-1.t-0", "83"): 1, ("tuned.turn-2.t-0", "83"): 3,
    }  # fmt: skip
    for question in QUESTIONS:
        name = str(question["question_id"])
        said = rows[question["question_id"]]["choices"][0]["turns"]
        kind = "0.7" if question["category"] == "writing" else "0"
        first, second = (drawn[f"tuned.turn-{turn}.t-{kind}", name] for turn in (1, 2))
        assert said == [first["completion"].strip(), second["completion"].strip()]
        asked = [(turn["role"], turn["content"]) for turn in second["prompt"]]
        assert asked == [
            ("user", question["turns"][0]), ("assistant", said[0]), ("user", question["turns"][1])
        ]  # fmt: skip

    results = json.loads((tmp_path / "answers" / "results" / "tuned.json").read_text())
    assert (results["answers"]["questions"], results["answers"]["answers"]) == (3, 6)
    pairs = [r for r in warehouse.read(BENCHMARK_PAIRS).collect() if r["reward_name"] == "ours"]
    assert {row["dataset"] for row in pairs} == {"tuned.vs.start"}
    ours = results["reward"]
    assert (ours["reward"], ours["against"]) == ("ours", "start")
    assert ours["wins"] == sum(row["outcome"] == "win" for row in pairs)
    assert ours["wins"] + ours["ties"] + ours["losses"] + ours["left_out"] == 3
    assert results["held_out_reward"]["reward"] == "held-out"
    assert "tuned against start: win rate in percent" in capsys.readouterr().out

    run = client.get_run(results["mlflow_run_id"])
    assert run.data.tags[LINK_TAG] == training
    assert run.data.metrics["reward/win_rate/value"] == ours["win_rate"]["value"]
    assert run.data.metrics["answers/chars_mean"] == results["answers"]["chars_mean"]
    back = client.get_run(training).data.tags
    assert back[f"cdr.downstream.{results['mlflow_run_id']}"] == "mt_bench"
    # Neither questions nor answers go to MLflow.
    sent = json.dumps([run.data.tags, run.data.params])
    assert not [turn for row in QUESTIONS for turn in row["turns"] if turn in sent]

    # Again, one question, against itself: nothing is drawn, nothing asked, and it is a tie.
    version, runs = warehouse.version(COMPLETIONS), warehouse.read(RUNS).count()
    assert main([*arguments, "--limit", "1", "--compare-with", str(file)]) == 0
    assert warehouse.version(COMPLETIONS) == version
    assert warehouse.read(RUNS).count() == runs + 2  # one per turn, and no evaluation
    limited = json.loads((tmp_path / "answers" / "results" / "tuned.limit-1.json").read_text())
    assert (limited["reward"]["ties"], limited["reward"]["win_rate"]["value"]) == (1, 50)


def test_a_signal_ends_the_judges_tool_and_the_job_with_it(
    spark: SparkSession,
    tmp_path: Path,
    policy: Path,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = tmp_path / "tool"
    (tool / "data").mkdir(parents=True)
    (tool / "data" / "judge_prompts.jsonl").touch()
    python = tool / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tool}/pid\nkill -TERM $PPID\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = {"python": str(python), "folder": str(tool), "api_key_variable": "JUDGE_KEY"}
    sampling = {"temperature": 0, "max_new_tokens": 8}
    arguments = write_config(
        tmp_path, policy, uri, special_tokens_in_text="as_text", judge=judge, sampling=sampling
    )
    assert main([*arguments, "--judge"]) == STOPPED
    assert "stopped: SIGTERM. The answers" in capsys.readouterr().out
    assert not Path("/proc", (tool / "pid").read_text().strip()).exists()
    run = json.loads((tmp_path / "answers" / "results" / "tuned.json").read_text())["mlflow_run_id"]
    assert open_store(uri).get_run(run).info.status == "KILLED"


def test_no_file_is_written_where_a_question_has_no_answer(
    spark: SparkSession, tmp_path: Path, policy: Path, uri: str
) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 8}
    arguments = write_config(
        tmp_path, policy, uri, special_tokens_in_text="reject", sampling=sampling
    )
    with pytest.raises(InputError, match=r"1 questions have no answer \(special_token_in_text 1\)"):
        main(arguments)
    assert not (tmp_path / "answers").exists()
    assert not os.listdir(tmp_path / "warehouse" / "_staging")

    # The two that were answered; then one of them becomes another question under its id.
    answered = [*arguments, "--limit", "2"]
    assert main(answered) == 0
    questions = tmp_path / "questions.jsonl"
    questions.write_text(questions.read_text().replace("2 + 2?", "2 + 5?"))
    with pytest.raises(InputError, match=r"\(duplicate_id 1\), for example 82"):
        main(answered)

    other = tmp_path / "answers" / "model_answer" / "tuned.limit-2.jsonl"
    with pytest.raises(InputError, match="1 of 3 questions have no answer in it"):
        main([*arguments, "--compare-with", str(other)])
    with pytest.raises(ConfigError, match="judge: is required"):
        main([*arguments, "--judge"])
    with pytest.raises(SetupError, match="the training run cannot be linked"):
        main([*answered, "--set", f"training_run={'0' * 31}a"])
