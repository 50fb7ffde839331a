"""Judging: what the tools are told, what is read back, and that nothing is asked twice.

The tools themselves are replaced by a program that leaves the files they leave; it notes how it was
called. `make check-tools` runs the real ones.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdr.answer_files import Answer, Question, read_questions
from cdr.downstream_config import DownstreamConfig
from cdr.errors import ConfigError, InputError, SetupError, Stopped
from cdr.judging import Verdicts, check_judge, judge_answers

FAKE = """#!{python}
import json, os, sys
from pathlib import Path

here = Path(__file__).parent
call = {{"args": sys.argv[1:], "env": dict(os.environ), "stdin": sys.stdin.read()}}
with open(here / "calls.jsonl", "a") as stream:
    stream.write(json.dumps(call) + "\\n")
args = sys.argv[1:]
if (here / "hang").exists():
    import subprocess, time
    child = subprocess.Popen(["sleep", "600"])  # a tool may have processes of its own
    (here / "hung").write_text(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(600)
if (here / "fail").exists():
    sys.exit("no such model")
if args[0] == "-c":
    print(here / "alpaca_eval" / "__init__.py")
elif args[:2] == ["-m", "alpaca_eval.main"]:
    options = dict(zip(args[3::2], args[4::2]))
    rows = json.loads(Path(options["--model_outputs"]).read_text())
    folder = Path(options["--output_path"])
    folder.mkdir(exist_ok=True)
    (folder / "leaderboard.csv").write_text(
        ",win_rate,standard_error,n_total,length_controlled_winrate,lc_standard_error\\n"
        f"pol,40.0,2.0,{{len(rows)}},30.0,1.0\\n"
    )
elif args[:2] == ["-m", "fastchat.llm_judge.gen_judgment"]:
    data = Path("data/mt_bench")
    judge = args[args.index("--judge-model") + 1]
    assert Path("data/judge_prompts.jsonl").read_text() == "prompts"
    assert (data / "reference_answer" / f"{{judge}}.jsonl").read_text() == "gpt-4's"
    found = data / "model_judgment" / f"{{judge}}_single.jsonl"
    found.parent.mkdir(exist_ok=True)
    with open(found, "a") as stream:
        for number, line in enumerate((data / "question.jsonl").read_text().splitlines()):
            name = json.loads(line)["question_id"]
            for turn in (1, 2):
                # The last one says nothing that is a score, the first time.
                broken = name == 83 and "again" not in judge and not (here / "second").exists()
                score = -1 if broken and turn == 2 else 2 * turn + number
                row = {{"question_id": name, "model": "pol", "turn": turn, "score": score}}
                stream.write(json.dumps(row) + "\\n")
    (here / "second").touch()
else:
    import yaml

    settings, endpoint = (yaml.safe_load(open(args[n])) for n in (2, 4))
    (name,) = settings["model_list"]
    data = Path("data") / settings["bench_name"]
    assert (data / "model_answer" / "gpt-4-0314.jsonl").exists()
    asked = [json.loads(line)["uid"] for line in (data / "question.jsonl").open()]
    ours = data / "model_answer" / f"{{name}}.jsonl"
    assert {{json.loads(line)["uid"] for line in ours.open()}} == set(asked)
    assert endpoint[settings["judge_model"]]["endpoints"] is None
    games = [("B>>A", "A>B"), ("A=B", "B>A"), (None, "A>B")]
    found = data / "model_judgment" / settings["judge_model"] / f"{{name}}.jsonl"
    found.parent.mkdir(parents=True)
    with open(found, "w") as stream:
        for uid, pair in zip(asked, games):
            played = [None if score is None else {{"score": score}} for score in pair]
            stream.write(json.dumps({{"uid": uid, "games": played}}) + "\\n")
"""

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [{"instruction": f"Why {i}?"} for i in (1, 2, 3)],
    "arena_hard": [{"uid": f"u{i}", "prompt": f"Why {i}?"} for i in (1, 2, 3)],
    "mt_bench": [{"question_id": 80 + i, "turns": ["Why?", "And?"]} for i in (1, 2, 3)],
}


class Case:
    """A benchmark with a fake tool."""

    def __init__(self, folder: Path, benchmark: str, **judge: Any) -> None:
        self.folder, self.tool = folder, folder / "tool"
        self.tool.mkdir()
        python = self.tool / "python"
        python.write_text(FAKE.format(python=sys.executable))
        python.chmod(0o755)
        rows = ROWS[benchmark]
        file = folder / "questions"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(json.dumps(rows) if benchmark == "alpaca_eval" else lines)
        if benchmark != "alpaca_eval":
            judge["folder"] = str(self.tool)
        if benchmark == "arena_hard":
            judge["settings"] = "settings.yaml"
            self._file("settings.yaml", "judge_model: j\nbench_name: v0.1\nmodel_list:\n")
            self._file("data/v0.1/model_answer/gpt-4-0314.jsonl", "{}\n")
        self._file("data/judge_prompts.jsonl", "prompts")
        self._file("data/mt_bench/reference_answer/gpt-4.jsonl", "gpt-4's")
        annotator = {"weighted": {"prompt_template": "p.txt", "completions_kwargs": {"x": 1}}}
        self._file(
            "alpaca_eval/evaluators_configs/weighted_alpaca_eval_gpt4_turbo/configs.yaml",
            json.dumps(annotator),
        )
        self.config = DownstreamConfig.model_validate(
            {
                "dataset": "pol",
                "benchmark": benchmark,
                "questions": str(file),
                "answers": str(folder / "answers"),
                "warehouse": "w",
                "policy": {"path": "p", "engine": "stub"},
                "sampling": {"temperature": 0, "max_new_tokens": 8},
                "statistics": {"resamples": 100},
                "judge": {
                    "python": str(python),
                    "base_url": "http://localhost:1/v1",
                    "api_key_variable": "JUDGE_KEY",
                    **judge,
                },
            }
        )
        self.questions: list[Question] = read_questions(self.config.benchmark, file)

    def _file(self, name: str, text: str) -> None:
        file = self.tool / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def judge(
        self, text: str = "So.", *, stop: Callable[[], str | None] = lambda: None
    ) -> Verdicts:
        answers = {
            question.id: Answer((text,) * len(question.turns), (1,) * len(question.turns))
            for question in self.questions
        }
        return judge_answers(self.config, self.questions, answers, model="pol", stop=stop)

    def calls(self) -> list[dict[str, Any]]:
        file = self.tool / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")


def test_alpaca_evals_leaderboard_is_read_and_the_key_goes_by_the_environment(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, "alpaca_eval", model="org/judge")
    found = case.judge()
    assert (found.judge, found.unjudged) == ("org/judge", 0)
    rate, controlled = found.scores["win_rate"], found.scores["length_controlled_win_rate"]
    # 40 ± 1.96 · 2 and 30 ± 1.96 · 1
    assert (rate.value, rate.low, rate.high) == pytest.approx((40, 36.08, 43.92), abs=0.01)
    assert (controlled.low, controlled.high) == pytest.approx((28.04, 31.96), abs=0.01)
    assert (rate.count, set(found.as_metrics())) == (
        3, {"judge", "win_rate", "length_controlled_win_rate", "unjudged"}
    )  # fmt: skip
    call = case.calls()[-1]
    assert call["env"]["OPENAI_API_KEY"] == "secret"
    assert call["env"]["OPENAI_API_BASE"] == call["env"]["OPENAI_BASE_URL"]
    assert call["env"]["OPENAI_API_BASE"] == "http://localhost:1/v1"
    assert "PYTHONPATH" not in call["env"]
    assert "secret" not in json.dumps(call["args"])
    # Its own annotator, with the other model.
    annotator = (found.folder / "annotator" / "configs.yaml").read_text()
    assert "model_name: org/judge" in annotator
    assert "x: 1" in annotator
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [f for f in written if f.name != "calls.jsonl" and "secret" in f.read_text()]


def test_arena_hards_games_are_weighed_and_half_judged_questions_left_out(tmp_path: Path) -> None:
    found = Case(tmp_path, "arena_hard", model="my-judge").judge()
    # u1: won by much (3 · 1) and by little (1 · 1); u2: a tie and a loss (B>A with ours as A);
    # u3: only one game was judged. (3 + 1 + 0.5 + 0) / (3 + 1 + 1 + 1)
    assert found.scores["win_rate"].value == pytest.approx(75)
    assert (found.judge, found.unjudged) == ("my-judge", 1)


def test_mt_benchs_missing_questions_alone_are_asked_again(tmp_path: Path) -> None:
    case = Case(tmp_path, "mt_bench")
    first = case.judge()
    # Turns of question n (from 0): 2 + n and 4 + n; the third has no second score.
    assert first.scores["score"].value == (2 + 4 + 3 + 5) / 4
    assert (first.scores["turn_1"].value, first.scores["turn_2"].value) == (2.5, 4.5)
    assert (first.judge, first.unjudged) == ("gpt-4", 1)
    assert case.calls()[0]["stdin"] == "\n"  # "Press Enter to confirm..."
    second = case.judge()
    assert second.unjudged == 0
    assert (second.folder / "data/mt_bench/question.jsonl").read_text().count("\n") == 1
    assert len(case.calls()) == 2
    assert case.judge().scores == second.scores
    assert len(case.calls()) == 2
    # Other answers under the same name have verdicts of their own.
    assert case.judge("Otherwise.").folder != second.folder
    assert len(case.calls()) == 3


def test_a_tool_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    case = Case(tmp_path, "mt_bench")
    (case.tool / "fail").touch()
    with pytest.raises(SetupError, match=r"exit code 1.*\nno such model") as caught:
        case.judge()
    assert "judge.log" in str(caught.value)


def is_running(process: str) -> bool:
    """Whether a process is there and not a dead one that nobody has looked at yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stopped_job_leaves_no_process_of_the_tool(tmp_path: Path) -> None:
    case = Case(tmp_path, "mt_bench")
    (case.tool / "hang").touch()
    hung = case.tool / "hung"
    with pytest.raises(Stopped, match="SIGTERM"):
        case.judge(stop=lambda: "SIGTERM" if hung.exists() and hung.read_text() else None)
    # Killed all, but the kernel takes its time where other work waits for the cores.
    deadline = time.monotonic() + 30
    while any(is_running(process) for process in hung.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (case.tool / "hang").unlink()
    assert case.judge().unjudged == 1


def test_a_tool_that_outlives_its_job_keeps_the_next_one_out(tmp_path: Path) -> None:
    case = Case(tmp_path, "mt_bench")
    (case.tool / "hang").touch()
    hung = case.tool / "hung"

    def run() -> None:
        with pytest.raises(Stopped):
            case.judge(stop=lambda: "end" if (case.tool / "end").exists() else None)

    job = threading.Thread(target=run)
    job.start()
    try:
        while not (hung.exists() and hung.read_text()):
            assert job.is_alive()
            time.sleep(0.05)
        with pytest.raises(SetupError, match="still at work") as caught:
            case.judge()
        assert hung.read_text().split()[0] in str(caught.value)
    finally:
        (case.tool / "end").touch()
        job.join()


def test_results_without_a_verdict_are_an_error(tmp_path: Path) -> None:
    case = Case(tmp_path, "mt_bench")
    case.questions = case.questions[2:]  # the one that is not scored at first
    with pytest.raises(InputError, match="no question has a verdict"):
        case.judge()


def test_what_is_missing_is_said_before_anything_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Case(tmp_path, "mt_bench").config
    assert check_judge(config) == config.judge
    with pytest.raises(ConfigError, match="judge: is required"):
        check_judge(config.model_copy(update={"judge": None}))
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(SetupError, match="JUDGE_KEY is not set"):
        check_judge(config)
    assert config.judge is not None
    gone = config.judge.model_copy(update={"python": "/absent/python"})
    with pytest.raises(SetupError, match="is not here: no /absent/python"):
        check_judge(config.model_copy(update={"judge": gone}))
