"""Policy studies: what decides a stage, what is done again, what a failed or stopped stage leaves.

Stages are small programs here that leave what a job would; the real jobs have tests of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdr.chat import PLAIN_TEMPLATE
from cdr.config import load_annotate_config
from cdr.downstream_config import load_downstream_config
from cdr.errors import ConfigError, SetupError
from cdr.plan import plan_reward
from cdr.policy_results import list_results, render_results
from cdr.policy_study import PolicyPlan, Stage, plan_policy_study
from cdr.policy_study_config import PolicyStudyConfig, load_policy_study_config
from cdr.policy_study_run import PolicyStudyRun, read_record, render_plan
from cdr.simpo_config import load_simpo_config
from cdr.warehouse import Warehouse
from tests.tokenizers import make_smollm2
from tests.unit.test_config import COMMIT, CONF, required_variables

# A job: it notes that it ran, and leaves what the study reads. Files `fail` and `stop` are orders.
JOB = """
import json, os, pathlib, signal, sys, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
label, folder = sys.argv[1], pathlib.Path(sys.argv[2])
with open(folder / "ran", "a") as stream:
    print(label, *[item for item in sys.argv if item in ("--judge", "--compare-with")], file=stream)
if (folder / "fail").exists() and (folder / "fail").read_text() == label:
    sys.exit("error: the disk is full")
if (folder / "stop").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
rate = {"value": 60.0, "ci_low": 40.0, "ci_high": 80.0, "count": 5}
if "preferences" in config:
    output = pathlib.Path(config["output"])
    (output / "policy").mkdir(parents=True)
    best = {"config": {"learning_rate": 1e-4, "beta": 10}, "validation": {"All": {"accuracy": 0.7}}}
    (output / "metrics.json").write_text(json.dumps({"best": "b", "points": {"b": best}}))
    note = {"run_id": config["tracking"].get("parent")}
    (output / "mlflow-run.json").write_text(json.dumps(note))
elif "answers" in config:
    file = pathlib.Path(config["answers"]) / "results" / (config["dataset"] + ".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"model": config["dataset"], "answers": {"chars_mean": 99.5, "tokens_mean": 21.0,
             "questions": 5}, "training_run": config["training_run"]}
    if "--compare-with" in sys.argv:
        assert pathlib.Path(sys.argv[-1]).name.startswith("small.start.")
        found["reward"] = {"reward": "ours", "win_rate": rate}
    file.write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_smollm2().save_pretrained(folder)
    return folder


@pytest.fixture
def tree(tmp_path: Path, model: Path) -> dict[str, Any]:
    (tmp_path / "completions.jsonl").write_text("{}\n")
    (tmp_path / "questions.jsonl").write_text('{"uid": "1", "prompt": "Why?"}\n')
    stub = {"path": str(model), "engine": "stub"}
    reward = {
        "name": "ours",
        "models": {"strong": {**stub, "adapter": "a"}, "weak": stub, "router": stub},
        "prompt_pack": str(CONF / "prompts" / "cdr-v1.yaml"),
        "routing": {"mode": "none"},
    }
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(reward))
    source = {"path": str(tmp_path / "completions.jsonl"), "format": "json"}
    return {
        "study": "small",
        "warehouse": str(tmp_path / "warehouse"),
        "output": str(tmp_path / "out"),
        "annotate": {"dataset": "d", "input": source, "reward": "./reward.yaml"},
        "train": {"start": {"path": str(model), "checksum": "0" * 64}, "training": {"lora": {}}},
        "benchmarks": {
            "bench": {
                "benchmark": "arena_hard",
                "questions": str(tmp_path / "questions.jsonl"),
                "policy": stub,
                "sampling": {"temperature": 0, "max_new_tokens": 8},
                "reward": "./reward.yaml",
            }
        },
        "judged_by": "rewards",
        "rows": {
            "plain": {"printed": {"bench": {"reward_win_rate": 55.5}}},
            "start": {},
            "safe": {"title": "Safe", "change": {"routing": {"mode": "fixed", "domain": "safety"}}},
        },
        "tracking": {"enabled": False},
    }


@pytest.fixture
def load(tmp_path: Path, tree: dict[str, Any]) -> Callable[..., PolicyStudyConfig]:
    def load(*overrides: str) -> PolicyStudyConfig:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_policy_study_config(file, overrides)

    return load


def carry_out(
    plan: PolicyPlan, folder: Path, warehouse: Warehouse | None = None
) -> tuple[PolicyStudyRun, list[str]]:
    """Carry a study out with stub jobs, and into the warehouse; give its run and what ran."""
    (folder / "ran").write_text("")

    def command_of(stage: Stage) -> list[str]:
        return [sys.executable, "-c", JOB, stage.label, str(folder)]

    with PolicyStudyRun(plan) as run:
        run.carry_out(command_of)
        if warehouse is not None:
            run.finish(lambda: warehouse)
    return run, (folder / "ran").read_text().splitlines()


def keys(config: PolicyStudyConfig) -> dict[str, str]:
    return {stage.label: stage.key for stage in plan_policy_study(config).stages}


def test_shipped_table_2_has_the_papers_rows_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    path = CONF / "study" / "table2.yaml"
    files = [path, CONF / "annotate" / "ultrafeedback.yaml", *(CONF / "downstream").glob("*.yaml")]
    for name in {name for file in files for name in required_variables(file)}:
        monkeypatch.setenv(name, "somewhere")
    monkeypatch.setenv("CDR_COMPLETIONS_VERSION", "3")
    config = load_policy_study_config(path)
    assert config.annotate.input.version == 3
    table = [
        [value for name in config.benchmarks for value in row.printed[name].values()]
        for row in config.rows.values()
    ]
    assert table == [
        [22.9, 22.6, 1899, 22.3, 596, 8.1],
        [55.2, 48.2, 1651, 30.6, 475, 8.0],
        [23.3, 21.3, 1720, 23.5, 564, 8.3],
        [27.5, 26.7, 1888, 30.4, 607, 8.3],
        [39.9, 40.1, 2008, 34.6, 571, 8.1],
        [30.0, 44.7, 2850, 39.4, 777, 8.0],
        [36.0, 33.1, 1853, 30.4, 545, 8.2],
        [40.7, 46.1, 2229, 37.4, 643, 8.0],
    ]
    heads = [head for name in config.benchmarks for head in config.columns_of(name).values()]
    assert heads == ["LC", "WR", "length", "WR", "length", "score"]
    rewards = [config.reward_of(name) for name in config.rows]
    assert [reward.form for reward in rewards[1:3]] == ["classifier", "density_ratio"]
    strong = {reward.models["strong"].path for reward in rewards[2:4]}
    assert strong == {"teknium/OpenHermes-2.5-Mistral-7B"}
    assert [r.routing.domain or r.routing.mode for r in rewards[4:]] == [
        "none", "safety", "math_code", "adaptive"
    ]  # fmt: skip
    assert (config.train.search.betas, config.train.training.batch_size) == ((10, 18), 128)
    assert all(len(row.printed) == 3 for row in config.rows.values())
    assert config.train.start.revision != COMMIT


def test_shipped_small_table_has_three_rows_and_held_out_questions() -> None:
    config = load_policy_study_config(CONF / "study" / "table2-small.yaml")
    assert list(config.rows) == ["start", "vanilla", "adaptive"]
    lines = Path(config.benchmarks["demo"].questions).read_text().splitlines()
    asked = {json.loads(line)["prompt"] for line in lines}
    given = (CONF / "demo" / "completions.jsonl").read_text().splitlines()
    assert len(asked) == len(lines) == 24
    assert not asked & {json.loads(line)["prompt"][0]["content"] for line in given}


def test_a_change_is_done_again_where_it_decides_and_nowhere_else(
    tree: dict[str, Any], load: Callable[..., PolicyStudyConfig], tmp_path: Path
) -> None:
    shutil.copytree(tree["train"]["start"]["path"], tmp_path / "model")
    tree["train"]["start"]["path"] = str(tmp_path / "model")
    tree["benchmarks"]["bench"]["policy"]["path"] = str(tmp_path / "model")
    before = keys(load())
    assert list(before) == [
        "start.bench", "plain.annotate", "plain.train", "plain.bench",
        "safe.annotate", "safe.train", "safe.bench",
    ]  # fmt: skip

    def changed(*overrides: str) -> set[str]:
        now = keys(load(*overrides))
        return {label for label in before if now[label] != before[label]}

    assert (
        changed("annotate.run.task_tokens=5", "train.run.threads=1", "rows.safe.title=x") == set()
    )
    resources = [
        "benchmarks.bench.run.request_tokens=512",
        "benchmarks.bench.policy.batch_tokens=99",
    ]
    assert changed("tracking.experiment=other", *resources) == set()
    assert changed("rows.safe.change.routing.domain=math_code") == {
        "safe.annotate", "safe.train", "safe.bench"
    }  # fmt: skip
    trained = {"plain.train", "plain.bench", "safe.train", "safe.bench"}
    assert changed("train.search.betas=[5]") == trained
    assert changed("annotate.pairs.seed=1") == trained | {"plain.annotate", "safe.annotate"}
    answered = {"start.bench", "plain.bench", "safe.bench"}
    assert changed("benchmarks.bench.sampling.seed=1") == answered
    # Another reward to compare by: the same answers, which the start's alone are.
    assert changed("benchmarks.bench.reward.reduction=mean") == answered - {"start.bench"}
    # The same file's name, another template.
    template = tmp_path / "template.jinja"
    tree["benchmarks"]["bench"]["template"] = str(template)
    template.write_text(PLAIN_TEMPLATE)
    before = keys(load())
    template.write_text(f"{PLAIN_TEMPLATE} ")
    assert changed() == answered
    before = keys(load())
    (tmp_path / "model" / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    assert changed() == answered | trained
    before = keys(load())
    (tmp_path / "completions.jsonl").write_text('{"more": 1}\n')
    assert changed() == trained | {"plain.annotate", "safe.annotate"}


def test_a_failed_row_leaves_the_others_and_the_same_command_goes_on(
    load: Callable[..., PolicyStudyConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_policy_study(load())
    (tmp_path / "fail").write_text("plain.train")
    run, ran = carry_out(plan, tmp_path)
    assert ran == [
        "start.bench", "plain.annotate", "plain.train",
        "safe.annotate", "safe.train", "safe.bench --compare-with",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "[3 of 7] plain: train" in said
    assert "| error: the disk is full" in said
    assert f"log: {tmp_path}/out/logs/plain.train.log" in said
    assert "[4 of 7] plain: bench, not begun, as plain.train is not done" in said
    assert set(run.failed) == {"plain.train", "plain.bench"}
    # What the jobs are given is what they take.
    configs = tmp_path / "out" / "configs"
    annotated = load_annotate_config(configs / "safe.annotate.yaml")
    reward, pairs = plan_reward(annotated.reward).key, annotated.pairs.key()
    assert (annotated.reward.name, reward) == ("small.safe", plan.rewards["safe"])
    trained = load_simpo_config(configs / "safe.train.yaml")
    asked = trained.preferences
    assert (asked.dataset, asked.reward, asked.selection) == ("d", reward, pairs)
    answered = load_downstream_config(configs / "safe.bench.yaml")
    assert answered.policy.adapter == f"{trained.output}/policy"
    assert load_downstream_config(configs / "start.bench.yaml").policy.adapter is None
    assert "-" in render_results(plan, run.done).splitlines()[1]

    (tmp_path / "fail").unlink()
    run, ran = carry_out(plan, tmp_path)
    assert ran == ["plain.train", "plain.bench --compare-with"]
    assert run.failed == {}
    assert carry_out(plan, tmp_path)[1] == []

    # The table: policies in the config's order, published values in brackets.
    lines = render_results(plan, run.done).splitlines()
    assert lines[0].split("  ")[0] == "policy"
    assert "bench WR" in lines[0]
    assert "60.0 ±20.0 (55.5)" in lines[1]
    assert lines[2].startswith("start")
    assert [lines[3][:4], "60.0 ±20.0 (-)" in lines[3]] == ["Safe", True]
    assert "70.0%" in lines[3]
    values = {(r["row"], r["metric"]): r["value"] for r in list_results(plan, run.done)}
    assert values["safe", "reward_win_rate"] == 60
    assert ("start", "reward_win_rate") not in values
    assert values["start", "length_tokens"] == 21

    # Another search: trained anew in a folder of its own, and the reason is said.
    other = plan_policy_study(load("train.search.betas=[5]"), rows=["safe"])
    assert render_plan(other).splitlines()[2].endswith("to do again: other search.betas")
    assert carry_out(other, tmp_path)[1] == ["safe.train", "safe.bench --compare-with"]
    assert len(list((tmp_path / "out" / "policies").glob("safe-*"))) == 2
    # And back: all of it is still done.
    assert carry_out(plan, tmp_path)[1] == []


def test_a_policy_that_is_gone_is_trained_again(
    load: Callable[..., PolicyStudyConfig], tmp_path: Path
) -> None:
    plan = plan_policy_study(load(), rows=["plain"])
    carry_out(plan, tmp_path)
    (stage,) = [stage for stage in plan.stages if stage.label == "plain.train"]
    assert stage.result is not None
    stage.result.unlink()
    (stage.result.parent / "policy").rmdir()
    assert read_record(plan, stage) is None
    assert "plain.train" in render_plan(plan)
    # Weights need not come out the same: they are answered with anew.
    assert carry_out(plan, tmp_path)[1] == ["plain.train", "plain.bench --compare-with"]
    assert carry_out(plan, tmp_path)[1] == []


def test_a_signal_ends_the_stage_in_good_order_and_the_study_with_it(
    load: Callable[..., PolicyStudyConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_policy_study(load(), rows=["plain"])
    (tmp_path / "stop").write_text("")
    run, ran = carry_out(plan, tmp_path)
    assert (run.exit_code, ran) == (4, ["start.bench"])
    assert "stopped: SIGTERM" in capsys.readouterr().out
    (tmp_path / "stop").unlink()
    assert carry_out(plan, tmp_path)[1][0] == "start.bench"


def test_a_stage_that_outlives_its_study_keeps_a_second_start_out(
    load: Callable[..., PolicyStudyConfig], tmp_path: Path
) -> None:
    plan = plan_policy_study(load(), rows=["plain"])
    # A start that is killed while its first stage waits.
    start = f"""
import sys
from pathlib import Path
from cdr.child_jobs import Children, work_alone
folder = Path({str(plan.output)!r})
folder.mkdir()
with work_alone(folder) as lock, Children(lock) as children:
    stage = '''
import os, pathlib, sys, time
while str(os.getpid()) not in pathlib.Path(sys.argv[1]).read_text():
    time.sleep(0.01)
os.kill(os.getppid(), 9)
time.sleep(60)
'''
    children.run([sys.executable, "-c", stage, str(folder / "lock")], folder / "log")
"""
    killed = subprocess.run([sys.executable, "-c", start], check=False)
    assert killed.returncode == -9
    with pytest.raises(SetupError, match="still at work") as caught:
        carry_out(plan, tmp_path)
    left = int(str(caught.value.fix).split()[-1])
    os.kill(left, 9)
    while True:  # until the system has ended it
        try:
            assert carry_out(plan, tmp_path)[1][0] == "start.bench"
            break
        except SetupError:
            time.sleep(0.05)


def test_all_that_is_missing_is_told_before_anything_is_started(
    load: Callable[..., PolicyStudyConfig], tmp_path: Path
) -> None:
    (tmp_path / "questions.jsonl").unlink()
    config = load(
        "launch.train=[no-such-launcher, run]",
        "annotate.input.format=delta",
        "rows.safe.change.routing.domain=cooking",
        "rows.plain.change.models.strong.path=/nowhere",
        "rows.plain.change.models.strong.engine=transformers",
    )
    with pytest.raises(ConfigError) as caught:
        plan_policy_study(config)
    found = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(found) == [
        "annotate.input", "benchmarks.bench.questions", "launch.train", "rows.plain", "rows.safe"
    ]  # fmt: skip
    assert "version: is required" in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no row 'other'"):
        plan_policy_study(config, rows=["other"])


def test_a_tool_judges_the_start_policy_too_and_its_key_is_looked_for(
    tree: dict[str, Any],
    load: Callable[..., PolicyStudyConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "settings.yaml").write_text("")
    judge = {"python": sys.executable, "folder": str(tmp_path), "settings": "settings.yaml"}
    tree["benchmarks"]["bench"]["judge"] = judge
    tree["judged_by"], tree["rows"]["plain"] = "tool", {}
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="judge: the environment variable OPENAI_API_KEY is not"):
        plan_policy_study(load())
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    before = {stage.label: stage for stage in plan_policy_study(load()).stages}
    assert before["start.bench"].options == before["safe.bench"].options == ("--judge",)
    assert "secret" not in json.dumps([stage.config for stage in before.values()])
    other = keys(load("benchmarks.bench.judge.model=better"))
    assert {label for label in other if other[label] != before[label].key} == {
        "start.bench", "plain.bench", "safe.bench"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("rows.start.change.form=pmi", "rows.start: is not trained"),
        ("rows.plain.printed.bench.score=1", "rows.plain.printed.bench: no column 'score'"),
        ("rows.safe.registered=models:/r@best", "rows.safe.registered: stands alone"),
        ("rows.safe.change.form=nonsense", "rows.safe.change.form"),
        ("benchmarks.bench.policy.path=other", "benchmarks.bench.policy: must be train.start"),
        ("judged_by=tool", "benchmarks.bench.judge: is required"),
        ("annotate.pairs.validation_fraction=0", "annotate.pairs.validation_fraction: must be > 0"),
        ("annotate.pairs.sed=1", "annotate.pairs.sed: unknown key; did you mean 'seed'"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    load: Callable[..., PolicyStudyConfig], change: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(change)
    assert problem in str(caught.value)
