"""Rewards in a real MLflow registry: registered, annotated with, predicted with, and refused.

Stub models in real engine hosts: the job, `predict` and the Spark function must agree to the last
bit. One test asks real models: tiny ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cdr.errors import CdrError, ConfigError
from cdr.evaluation_config import RowSpec
from cdr.evaluation_plan import plan_evaluation
from cdr.registry import KEY_TAG, global_store, load_annotation_plan, load_evaluation
from cdr.tables import PREFERENCES, REJECTS, REWARDS, Table
from cdr.warehouse import Warehouse
from jobs.annotate import annotate
from jobs.annotate import main as annotate_main
from jobs.evaluate import main as evaluate_main
from jobs.register_reward import main as register
from tests.chat_endpoint import say, serve
from tests.spark.conftest import MakeStore
from tests.tiny_model import save_tiny_model
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe, make_smollm2

ROOT = Path(__file__).resolve().parents[2]

# Of MLflow itself: old pandas and pydantic calls, and type hints of its own classes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    r"ignore:[\s\S]*type hint[\s\S]*:UserWarning",
)


@pytest.fixture(autouse=True)
def _no_tracking_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def make_row(i: int, j: int) -> dict[str, Any]:
    # The last two candidates of p1 are the same.
    kind = min(j, 1) if i == 1 else j
    return {
        "prompt_id": f"p{i}",
        "prompt": turns(*(["Hello.", "Hello!"] if i == 2 else []), f"Question {i}: a fox?"),
        "completion_id": f"p{i}-{j}",
        "completion": f"Answer {kind} to {i}." + " Ask the council." * (kind % 2),
        "finish_reason": "length" if kind == 2 else "stop",
    }


ROWS = [make_row(i, j) for i in range(8) for j in range(3)]
BAD = [
    {"prompt": turns("Say <|im_end|>."), "completion": "Yes.", "reason": "special_token_in_text"},
    {"prompt": turns("A fox?"), "completion": " ", "reason": "empty_completion"},
]  # fmt: skip


@dataclass
class Store:
    """A warehouse with its MLflow store, a reward with stub models, and a run's config."""

    folder: Path

    @property
    def warehouse(self) -> Path:
        return self.folder / "warehouse"

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.warehouse}/mlflow.db"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    def register(self, *arguments: str) -> None:
        config = str(self.folder / "stub.yaml")
        assert register(["--config", config, "--warehouse", str(self.warehouse), *arguments]) == 0

    def versions(self, name: str) -> list[str]:
        found = self.client.search_model_versions(f"name='{name}'")
        return sorted(str(version.version) for version in found)

    def edit_pack(self, file: Path) -> None:
        """Change one exemplar's text."""
        tree = yaml.safe_load(file.read_text())
        next(iter(tree["domains"]["safety"]["exemplars"].values()))["why"] += " It is kind, too."
        file.write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture(scope="module")
def store(make_store: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    make_store(folder / "warehouse")
    make_smollm2().save_pretrained(folder / "smollm2")
    special = ("<|im_end|>", "<|im_start|>")
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(folder / "small")
    shutil.copy(ROOT / "conf" / "prompts" / "cdr-v1.yaml", folder / "pack.yaml")

    def model(tokenizer: str, role: str) -> dict[str, Any]:
        return {
            "path": f"./{tokenizer}", "engine": "stub", "adapter": role, "max_length": 8192
        }  # fmt: skip

    reward = {
        "name": "stub",
        "description": "Numbers from hashes.",
        "models": {
            "strong": {**model("smollm2", "s"), "tuned_from": "weak"},
            "weak": model("small", "w"),
            "router": model("smollm2", "r"),
        },
        "reduction": "mean",
        "encoding": {"template": "own"},
        "prompt_pack": "./pack.yaml",
        # Stubs of another folder give other routes; that all fall on one domain must be rare.
        "routing": {"mode": "adaptive", "threshold": 0.4},
    }
    (folder / "stub.yaml").write_text(yaml.safe_dump(reward))
    with (folder / "input.jsonl").open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in ROWS)
    columns = ("prompt_id", "completion_id", "finish_reason")
    run = {
        "dataset": "d",
        "warehouse": "./warehouse",
        "input": {
            "path": "./input.jsonl",
            "format": "json",
            "columns": {name: name for name in columns},
        },
        "reward": "models:/stub@champion",
        "report": {"enabled": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return Store(folder)


@pytest.fixture(scope="module")
def registered(store: Store) -> Store:
    """The store with the stub reward as version 1."""
    store.register("--alias", "champion")
    return store


@pytest.fixture(scope="module")
def annotated(registered: Store, spark: SparkSession) -> Warehouse:
    """A run with version 1."""
    plan = load_annotation_plan(registered.folder / "run.yaml", ["reward=models:/stub/1"])
    warehouse = Warehouse(spark, plan.config.warehouse)
    assert annotate(plan, warehouse) == 0
    return warehouse


def collect(warehouse: Warehouse, table: Table) -> list[dict[str, Any]]:
    return [row.asDict(recursive=True) for row in warehouse.read(table).collect()]


@pytest.fixture
def in_store(store: Store) -> Iterator[None]:
    """MLflow's own functions look into the store."""
    with global_store(store.uri):
        yield


def test_a_run_with_a_registered_reward_says_so_everywhere(
    store: Store, annotated: Warehouse
) -> None:
    pairs = collect(annotated, PREFERENCES)
    assert pairs
    assert {pair["reward_version"] for pair in pairs} == {"stub/1"}
    (run_id,) = {pair["mlflow_run_id"] for pair in pairs}
    tags = store.client.get_run(run_id).data.tags
    assert tags["cdr.reward_version"] == "stub/1"
    version = store.client.get_model_version_by_alias("stub", "champion")
    assert version.tags[KEY_TAG] == tags["cdr.reward_key"] == pairs[0]["reward_key"]
    assert version.tags["cdr_prompt_pack"].startswith("cdr-v1 ")
    assert "Numbers from hashes." in version.description
    assert "strong" in version.description
    registration = store.client.get_run(version.run_id).data.tags
    assert registration["cdr.reward_version"] == "stub/1"
    # Both pages lead to each other.
    assert tags["mlflow.note.content"] == "Reward: [stub/1](#/models/stub/versions/1)"
    run = store.client.get_run(run_id).info
    page = f"#/experiments/{run.experiment_id}/runs/{run_id}"
    assert f"\n- annotate: [{run.run_name}]({page})" in version.description


def test_an_evaluation_by_name_gives_the_version_its_figures(
    annotated: Warehouse, store: Store
) -> None:
    pairs = [
        {
            "prompt_id": f"p{i}",
            "prompt": make_row(i, 0)["prompt"],
            "chosen": make_row(i, 0)["completion"],
            "rejected": make_row(i, 1)["completion"],
            "section": "Chat" if i % 2 else "Safety",
        }
        for i in range(6)
    ]
    (store.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = {
        "dataset": "held-out",
        "warehouse": "./warehouse",
        "input": {
            "path": "./pairs.jsonl",
            "format": "json",
            "columns": {"section": "section"},
        },
        "sections": ["Chat", "Safety"],
        "reward": "models:/stub/1",
        "report": {"enabled": False},
    }
    (store.folder / "by-name.yaml").write_text(yaml.safe_dump(config))
    assert evaluate_main(["--config", str(store.folder / "by-name.yaml")]) == 0

    client = store.client
    experiment = client.get_experiment_by_name("cdr-evaluate")
    evaluation, *_ = client.search_runs([experiment.experiment_id])  # newest first
    version = client.get_model_version("stub", "1")
    figures = client.get_run(version.run_id).data.metrics
    assert figures["held-out/counts/judged"] == 6
    found = {
        name: value
        for name, value in evaluation.data.metrics.items()
        if name.startswith(("accuracy/", "ci_low/", "ci_high/"))
    }
    assert {"accuracy/section/Chat", "ci_low/section/Chat", "accuracy/overall/all pairs"} <= set(
        found
    )
    assert {f"held-out/{name}": value for name, value in found.items()}.items() <= figures.items()
    # The newest run is the first of the list.
    *_, newest, older = version.description.splitlines()
    assert newest.startswith(f"- evaluate: [{evaluation.info.run_name}](#/experiments/")
    assert older.startswith("- annotate: [")
    assert "(#/models/stub/versions/1)" in evaluation.data.tags["mlflow.note.content"]


def test_a_version_brings_the_code_and_names_the_packages_that_made_its_numbers(
    registered: Store,
) -> None:
    location = registered.client.get_model_version_download_uri("stub", "1")
    folder = Path(location.removeprefix("file://"))
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert f"torch=={metadata.version('torch').partition('+')[0]}" in needed
    assert f"transformers=={metadata.version('transformers')}" in needed
    assert not [line for line in needed if line.startswith(("cdr", "vllm", "pyspark", "pytest"))]
    assert all("==" in line for line in needed)
    # Where the package is not installed: `-S` leaves out what an editable installation adds.
    script = (
        "import sys, mlflow\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "import cdr, pandas as pd\n"
        "print(cdr.__file__)\n"
        "rows = pd.DataFrame({'prompt': ['A fox?'], 'completion': ['Yes.']})\n"
        "print(model.predict(rows)['status'][0])\n"
    )
    paths = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", script, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=registered.folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    place, status = done.stdout.splitlines()[-2:]
    assert (Path(place), status) == (folder / "code" / "cdr" / "__init__.py", "ok")


@pytest.mark.usefixtures("in_store")
def test_predict_gives_the_rewards_of_the_run_to_the_last_bit(
    annotated: Warehouse, tmp_path: Path
) -> None:
    model = mlflow.pyfunc.load_model("models:/stub@champion")
    bad = [{"completion_id": f"bad-{i}", **row} for i, row in enumerate(BAD)]
    # In an order that takes prompts apart, with rows among them that cannot be scored.
    mixed = pd.DataFrame([*ROWS[::2], *bad, *ROWS[1::2]]).set_index("completion_id")
    scored = model.predict(mixed[["prompt", "completion", "finish_reason"]])
    assert list(scored.index) == list(mixed.index)
    of_run = [row for row in collect(annotated, REWARDS) if row["dataset"] == "d"]
    rewards = {row["completion_id"]: row for row in of_run}
    assert len(rewards) == len(ROWS)
    assert len({row["domain"] for row in rewards.values()}) > 1
    for name, row in scored.loc[list(rewards)].iterrows():
        stored = rewards[name]
        assert (row["status"], row["error"]) == ("ok", "")
        for column in ("reward", "domain", "strong_logprob", "weak_logprob", "num_tokens"):
            assert row[column] == stored[column], (name, column)
    for i, row in enumerate(BAD):
        refused = scored.loc[f"bad-{i}"]
        assert refused["status"] == "rejected"
        assert refused["error"].startswith(f"{row['reason']}: ")
        assert np.isnan(refused["reward"])
        assert refused["num_tokens"] == 0
    # The table of rejects has what the run itself refused: nothing here.
    assert collect(annotated, REJECTS) == []
    one_by_one = model.predict(mixed.iloc[:1], params={"placement": "sequential"})
    assert one_by_one["reward"].iloc[0] == scored["reward"].iloc[0]
    assert len(model.predict(mixed.iloc[:0])) == 0


@pytest.mark.usefixtures("in_store")
def test_a_spark_function_gives_them_too_and_loads_nothing_in_a_worker(
    spark: SparkSession, annotated: Warehouse
) -> None:
    function = mlflow.pyfunc.spark_udf(spark, "models:/stub/1", env_manager="local")
    rewards = annotated.read(REWARDS)
    by_name = rewards.withColumn(
        "scored", function(F.struct("prompt", "completion", "finish_reason"))
    )
    wrong = by_name.where(
        "scored.reward IS DISTINCT FROM reward OR scored.status != 'ok' OR scored.error != ''"
        " OR scored.domain IS DISTINCT FROM domain OR scored.num_tokens != num_tokens"
    )
    assert wrong.collect() == []
    # In SQL, with texts for prompts, and rows that cannot be scored.
    spark.udf.register("cdr_reward", function)
    spark.createDataFrame(
        [("A fox?", "Yes.", "stop"), (None, "Yes.", None), ("A fox?", "No.", None)],
        "prompt string, completion string, finish_reason string",
    ).createOrReplaceTempView("answers")
    query = (
        "SELECT s.* FROM (SELECT cdr_reward(prompt, completion, finish_reason) AS s FROM answers)"
    )
    statuses = [
        (row["status"], row["error"].partition(":")[0]) for row in spark.sql(query).collect()
    ]
    assert statuses == [("ok", ""), ("rejected", "null_prompt"), ("ok", "")]
    _assert_models_are_in_a_host(loaded="")


def _assert_models_are_in_a_host(loaded: str) -> None:
    """See that no Python worker of the session has torch, and that its engine host runs.

    Args:
        loaded: library that the host has in its memory; empty for none.
    """
    jvm = next(p for p in psutil.Process().children(recursive=True) if p.name() == "java")
    names = ("pyspark.daemon", "pyspark.worker")
    workers = 0
    for child in jvm.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # an idle one ends by itself
            if any(name in " ".join(child.cmdline()) for name in names):
                assert not any("libtorch" in region.path for region in child.memory_maps())
                workers += 1
    assert workers
    hosts = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"cdr.engines.host", str(jvm.pid)} <= set(process.info["cmdline"] or ())
    ]
    assert hosts
    if loaded:
        assert any(loaded in region.path for host in hosts for region in host.memory_maps())


LONELY = {
    "prompt_id": "lonely", "prompt": turns("Is anyone there?"), "completion_id": "lonely-0",
    "completion": "Only me.", "finish_reason": "stop",
}  # fmt: skip


@pytest.fixture(scope="module")
def judged(store: Store, spark: SparkSession) -> Warehouse:
    """A run with a registered judge, over half of the rows and a prompt with one candidate."""
    source = store.folder / "judged.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:12], LONELY]))
    model = {"engine": "stub", "max_length": 8192}
    smollm2 = str(store.folder / "smollm2")
    reward = {
        "name": "referee",
        "form": "judge",
        "models": {
            "judge": {**model, "path": smollm2, "adapter": "j"},
            "router": {**model, "path": smollm2, "adapter": "r"},
        },
        "encoding": {"template": "own"},
        "prompt_pack": str(store.folder / "pack.yaml"),
        "routing": {"mode": "adaptive"},
    }
    (store.folder / "referee.yaml").write_text(yaml.safe_dump(reward))
    store.register("--config", str(store.folder / "referee.yaml"), "--alias", "champion")
    config = yaml.safe_load((store.folder / "run.yaml").read_text())
    config |= {
        "dataset": "judged",
        "warehouse": str(store.folder / "judged"),
        "tracking": {"uri": store.uri, "enabled": False},  # the registry alone
        "run": {"max_rejected_fraction": 1},
    }
    config["input"]["path"] = str(source)
    (store.folder / "judged.yaml").write_text(yaml.safe_dump(config))
    plan = load_annotation_plan(store.folder / "judged.yaml", ["reward=models:/referee@champion"])
    warehouse = Warehouse(spark, plan.config.warehouse)
    assert annotate(plan, warehouse) == 0
    return warehouse


@pytest.mark.usefixtures("in_store")
def test_a_registered_judge_gives_whole_prompts_the_rewards_of_the_run(
    store: Store, judged: Warehouse
) -> None:
    version = store.client.get_model_version("referee", "1")
    rewards = {row["completion_id"]: row for row in collect(judged, REWARDS)}
    assert {row["reward_key"] for row in rewards.values()} == {version.tags[KEY_TAG]}
    assert {pair["reward_version"] for pair in collect(judged, PREFERENCES)} == {"referee/1"}
    assert "compares all candidates of a prompt: log-odds" in version.description

    model = mlflow.pyfunc.load_model("models:/referee@champion")
    names = [column.name for column in model.metadata.get_input_schema().inputs]
    assert names == ["prompt", "completion", "num_candidates", "finish_reason", "domain"]
    frame = pd.DataFrame([*ROWS[1:12:2], LONELY, *ROWS[:12:2]]).set_index("completion_id")
    frame["num_candidates"] = frame.groupby("prompt_id")["completion"].transform("size")
    scored = model.predict(frame.drop(columns="prompt_id"))
    assert list(scored.index) == list(frame.index)
    assert scored.loc["lonely-0"]["error"].startswith("no_other_candidate: ")
    assert [row["reason"] for row in collect(judged, REJECTS)] == ["no_other_candidate"]
    assert len(rewards) == 12
    # The last two candidates of p1 are one answer.
    assert rewards["p1-1"]["reward"] == rewards["p1-2"]["reward"]
    for name, stored in rewards.items():
        row = scored.loc[name]
        assert (row["status"], row["error"]) == ("ok", "")
        for column in ("reward", "domain", "num_tokens"):
            assert row[column] == stored[column], (name, column)
        assert np.isnan(row["strong_logprob"])
    # Half of a prompt would be another judgement.
    part = model.predict(frame.drop(columns="prompt_id").drop(index="p3-0"))
    told = "incomplete_prompt: 2 of 3 candidates in this call"
    assert (part.loc["p3-1":"p3-2", "error"] == told).all()
    assert part.loc["p0-0", "reward"] == rewards["p0-0"]["reward"]
    with pytest.raises(Exception, match="num_candidates"):
        model.predict(frame[["prompt", "completion"]])

    # Evaluating takes it by name as well.
    tree = yaml.safe_load((store.folder / "judged.yaml").read_text())
    tree["input"] = {"path": "./input.jsonl", "format": "json"}
    (store.folder / "evaluate-judged.yaml").write_text(yaml.safe_dump(tree))
    found, number = load_evaluation(
        store.folder / "evaluate-judged.yaml", ["reward=models:/referee@champion"]
    )
    (plan,) = plan_evaluation(found, reward_version=number)
    assert plan.annotation.reward.key == version.tags[KEY_TAG]


@pytest.mark.usefixtures("in_store")
def test_a_judge_in_sql_counts_the_candidates_and_a_group_holds_a_prompt_whole(
    spark: SparkSession, judged: Warehouse, tmp_path: Path
) -> None:
    rewards = judged.read(REWARDS)
    spark.udf.register(
        "cdr_judge", mlflow.pyfunc.spark_udf(spark, "models:/referee/1", env_manager="local")
    )
    rewards.createOrReplaceTempView("judged")
    in_sql = spark.sql("""
        SELECT completion_id, reward AS stored, s.reward, s.error FROM (
            SELECT *, cdr_judge(prompt, completion, count(*) OVER (PARTITION BY prompt_id)) AS s
            FROM judged)
    """)

    folder = mlflow.artifacts.download_artifacts("models:/referee/1", dst_path=str(tmp_path))
    models: dict[str, Any] = {}

    def judge(prompt: pd.DataFrame) -> pd.DataFrame:
        if not models:
            models["judge"] = mlflow.pyfunc.load_model(folder)
        given = prompt[["prompt", "completion"]].assign(num_candidates=len(prompt))
        scored = models["judge"].predict(given)
        return pd.DataFrame(
            {
                "completion_id": prompt["completion_id"],
                "stored": prompt["reward"],
                "reward": scored["reward"],
                "error": scored["error"],
            }
        )

    schema = "completion_id string, stored double, reward double, error string"
    grouped = rewards.groupBy("prompt_id").applyInPandas(judge, schema)
    for rows in (in_sql.collect(), grouped.collect()):
        assert len(rows) == 12
        assert all((row["reward"], row["error"]) == (row["stored"], "") for row in rows)


@pytest.mark.usefixtures("in_store")
def test_an_api_judge_is_registered_without_its_key_and_asked_by_one_task(
    spark: SparkSession, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-of-nobody")  # workers have another
    with serve(lambda *_: say("A")) as endpoint:
        api = {"base_url": endpoint.base_url, "api_key_variable": "JUDGE_KEY"}
        reward = {
            "name": "gpt",
            "form": "judge",
            "models": {"judge": {"path": "gpt-4-turbo", "engine": "api", "api": api}},
            "encoding": {"template": "own"},
            "routing": {"mode": "none"},
        }
        (tmp_path / "gpt.yaml").write_text(yaml.safe_dump(reward))
        store.register("--config", str(tmp_path / "gpt.yaml"), "--alias", "champion")
        plan = load_annotation_plan(store.folder / "run.yaml", ["reward=models:/gpt@champion"])
        version = store.client.get_model_version("gpt", "1")
        assert plan.reward.key == version.tags[KEY_TAG]
        held = [file for file in (store.folder / "warehouse").rglob("*") if file.is_file()]
        assert held
        assert not any(b"sk-of-nobody" in file.read_bytes() for file in held)
        moved = "reward.models.judge.api.base_url=http://elsewhere/v1"
        with pytest.raises(ConfigError, match=r"models\.judge\.api\.base_url: was http://127"):
            load_annotation_plan(store.folder / "run.yaml", ["reward=models:/gpt/1", moved])

        frame = pd.DataFrame(ROWS[:2]).assign(num_candidates=2)
        columns = ["prompt", "completion", "num_candidates"]
        scored = mlflow.pyfunc.load_model("models:/gpt/1").predict(frame[columns])
        assert list(scored["reward"]) == [0.0, 0.0]  # always the first, in both orders
        function = mlflow.pyfunc.spark_udf(spark, "models:/gpt/1", env_manager="local")
        answers = spark.createDataFrame(
            [(f"Question {i}: a fox?", f"Answer {j}.") for i in range(8) for j in range(2)],
            "prompt string, completion string",
        )
        asked = function("prompt", "completion", F.lit(2).cast("long")).alias("s")
        rows = answers.coalesce(1).select(asked).collect()
        assert [row["s"]["reward"] for row in rows] == [0.0] * 16
        with pytest.raises(Exception, match="its limits hold for one Spark task at a time"):
            answers.repartition(4, "prompt").select(asked).collect()


def test_the_same_reward_is_not_registered_twice_and_a_changed_pack_is_a_new_version(
    registered: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    registered.register("--set", "description=other words")
    assert "nothing to register: models:/stub/1 is this reward already" in capsys.readouterr().out
    assert registered.versions("stub") == ["1"]

    pack = registered.folder / "pack.yaml"
    before = pack.read_text()
    registered.edit_pack(pack)
    try:
        registered.register("--alias", "champion", "--name", "stub")
    finally:
        pack.write_text(before)
    printed = capsys.readouterr().out
    assert "registered models:/stub/2 " in printed
    assert "models:/stub@champion is version 2 (before: version 1)" in printed
    first_key, second_key = (
        registered.client.get_model_version("stub", number).tags[KEY_TAG] for number in ("1", "2")
    )
    assert first_key != second_key
    config = registered.folder / "run.yaml"
    assert load_annotation_plan(config).reward.key == second_key
    old = load_annotation_plan(config, ["reward=models:/stub/1"])
    assert (old.reward.key, old.reward_version) == (first_key, "stub/1")
    # Evaluating takes it by name as well.
    pairs = yaml.safe_load(config.read_text())
    pairs["input"] = {"path": "./input.jsonl", "format": "json"}
    evaluation = registered.folder / "evaluate.yaml"
    evaluation.write_text(yaml.safe_dump(pairs))
    found, version = load_evaluation(evaluation, ["reward=models:/stub/1"])
    (plan,) = plan_evaluation(found, reward_version=version)
    assert (plan.annotation.reward.key, plan.annotation.reward_version) == (first_key, "stub/1")
    # Of several rows, those that change nothing are the version.
    rows = {"router": RowSpec(), "plain": RowSpec(change={"routing": {"mode": "none"}})}
    plans = plan_evaluation(found.model_copy(update={"rows": rows}), reward_version=version)
    assert [plan.annotation.reward_version for plan in plans] == ["stub/1", None]
    with pytest.raises(ConfigError, match="reduction: was mean when it was registered"):
        load_evaluation(evaluation, ["reward=models:/stub/1", "reward.reduction=sum"])
    registered.register("--force")
    assert registered.versions("stub") == ["1", "2", "3"]
    assert registered.client.get_model_version("stub", "3").tags[KEY_TAG] == first_key


def test_a_registered_reward_that_is_not_the_same_any_more_is_refused(registered: Store) -> None:
    config = registered.folder / "run.yaml"
    named = "reward=models:/stub/1"
    with pytest.raises(ConfigError, match="reduction: was mean when it was registered, is sum"):
        load_annotation_plan(config, [named, "reward.reduction=sum"])
    # How models are run may be said anew.
    plan = load_annotation_plan(config, [named, "reward.models.weak.batch_tokens=99"])
    assert plan.reward_version == "stub/1"

    location = registered.client.get_model_version_download_uri("stub", "1")
    model = Path(location.removeprefix("file://"))
    (pack,) = model.rglob("prompt_pack.yaml")
    before = pack.read_text()
    registered.edit_pack(pack)
    try:
        with pytest.raises(ConfigError, match=r"exemplars were altered") as caught:
            load_annotation_plan(config, [named])
        assert caught.value.where == "models:/stub/1"
        with pytest.raises(Exception, match="exemplars were altered"), global_store(registered.uri):
            mlflow.pyfunc.load_model("models:/stub/1")
    finally:
        pack.write_text(before)

    (registered.folder / "small").rename(registered.folder / "gone")
    try:
        with pytest.raises(CdrError, match=r"no such folder '.*small'"):
            load_annotation_plan(config, [named])
    finally:
        (registered.folder / "gone").rename(registered.folder / "small")


def test_what_does_not_exist_is_answered_with_what_does(registered: Store) -> None:
    config = registered.folder / "run.yaml"

    def error(reference: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_annotation_plan(config, [f"reward={reference}"])
        return str(caught.value)

    missing = error("models:/stub@challenger")
    assert "'stub' has no alias 'challenger'; aliases: @champion (version " in missing
    assert "versions: 1" in missing
    assert "'stub' has no version 99" in error("models:/stub/99")
    assert "no registered model has the name 'nobody'; there are: " in error("models:/nobody@a")
    assert "stub" in error("models:/nobody/1")


@pytest.mark.usefixtures("in_store")
def test_a_model_that_is_no_reward_is_refused(registered: Store) -> None:
    run = registered.client.create_run(registered.client.create_experiment("others"))
    registered.client.log_text(run.info.run_id, "no reward", "model/MLmodel")
    registered.client.create_registered_model("other")
    source = f"{run.info.artifact_uri}/model"
    registered.client.create_model_version("other", source, run_id=run.info.run_id)
    with pytest.raises(ConfigError, match="'other/1' is not a reward of this package"):
        load_annotation_plan(registered.folder / "run.yaml", ["reward=models:/other/1"])


def save_adapter(model: Path, folder: Path) -> Path:
    """Write a LoRA adapter that changes much; give its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder


def test_real_models_give_a_spark_function_the_rewards_of_the_run(
    spark: SparkSession, make_store: MakeStore, tmp_path: Path
) -> None:
    warehouse_folder = tmp_path / "warehouse"
    uri = make_store(warehouse_folder)
    model = save_tiny_model(tmp_path / "model")
    models = [
        f"models.{role}.{key}"
        for role in ("strong", "weak", "router")
        for key in (f"path={model}", "dtype=float32")
    ]
    models.append(f"models.strong.adapter={save_adapter(model, tmp_path / 'adapter')}")
    name = "smollm2-dpo-over-start"  # the demo's, with these models
    arguments = [word for item in [*models, "routing.mode=none"] for word in ("--set", item)]
    config = str(ROOT / "conf" / "rewards" / f"{name}.yaml")
    assert register(["--config", config, "--tracking-uri", uri, "--alias", "a", *arguments]) == 0

    lines = (ROOT / "conf" / "demo" / "completions.jsonl").read_text().splitlines()[:4]
    (tmp_path / "input.jsonl").write_text("\n".join(lines))
    run = str(ROOT / "conf" / "annotate" / "demo.yaml")
    changes = [
        f"warehouse={warehouse_folder}",
        f"input.path={tmp_path / 'input.jsonl'}",
        "report.enabled=false",
        "tracking.enabled=false",
    ]
    sets = [word for item in changes for word in ("--set", item)]
    assert annotate_main(["--config", run, "--reward", f"models:/{name}@a", *sets]) == 0
    warehouse = Warehouse(spark, str(warehouse_folder))
    stored = {row["completion_id"]: row for row in collect(warehouse, REWARDS)}

    with global_store(uri):
        function = mlflow.pyfunc.spark_udf(spark, f"models:/{name}@a", env_manager="local")
        called = {
            row["completion_id"]: row["scored"]
            for row in warehouse.read(REWARDS)
            .repartition(1)
            .select(
                "completion_id",
                function(F.struct("prompt", "completion", "finish_reason")).alias("scored"),
            )
            .collect()
        }
    assert len(called) == len(stored) == len(lines)
    for completion_id, expected in stored.items():
        scored = called[completion_id]
        assert (scored["status"], scored["num_tokens"]) == ("ok", expected["num_tokens"])
        tolerance = 1e-5 * expected["num_tokens"]
        assert abs(scored["reward"] - expected["reward"]) <= tolerance
        assert abs(expected["reward"]) > 10 * tolerance
    _assert_models_are_in_a_host(loaded="libtorch")
