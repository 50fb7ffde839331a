"""Let a benchmark's own tool judge answers, and read what it wrote.

Prompts, judge, reference answers and verdicts are the tool's; ours are the folder it works in, the
endpoint, and reading its result files back:

| benchmark | what is called | what is read |
|---|---|---|
| `alpaca_eval` | `alpaca_eval evaluate` | `leaderboard.csv`: win rates with their errors |
| `arena_hard` | arena-hard-auto's `gen_judgment.py` | two games a question; A>>B counts thrice |
| `mt_bench` | `fastchat.llm_judge.gen_judgment` | scores 1 to 10 of both turns |

A tool works in a folder of its own per policy, judge and content of the answers, so nothing that
was judged is asked again, and verdicts never stand for other answers than those they were given
for. It ends with the job that called it. The key comes from the environment and is written nowhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cdr.answer_files import Answer, Question, hash_answers, write_answers
from cdr.child_jobs import run_program
from cdr.downstream_config import DownstreamConfig, JudgeSpec
from cdr.errors import ConfigError, InputError, SetupError
from cdr.win_rates import Estimate, estimate_mean, estimate_normal

_TAIL_CHARS = 1500
_GAME = re.compile(r"^([AB])(>>|>|=|<|<<)([AB])$")
_ALPACA_ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # its default
_STRONG_WEIGHT = 3  # of >> and <<, in all releases of arena-hard-auto


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of a policy's answers.

    Args:
        judge: its name.
        scores: by name: `win_rate` and `length_controlled_win_rate` in percent; `score`, `turn_1`
            and `turn_2` from 1 to 10.
        unjudged: questions without a (whole) verdict; they are in no score.
        folder: where the tool's own files are.
    """

    judge: str
    scores: Mapping[str, Estimate]
    unjudged: int
    folder: Path

    def as_metrics(self) -> dict[str, Any]:
        """Give them as JSON-able numbers and names."""
        scores = {name: score.as_metrics() for name, score in self.scores.items()}
        return {"judge": self.judge, **scores, "unjudged": self.unjudged}


def check_judge(config: DownstreamConfig) -> JudgeSpec:
    """Check what is needed to judge before anything is answered.

    Raises:
        ConfigError: the config has no judge.
        SetupError: the tool, its folder or the endpoint's key is missing here.
    """
    judge = config.judge
    if judge is None:
        raise ConfigError(["judge: is required for --judge"], fix="see conf/downstream/")
    needed = [judge.python]
    if judge.folder is not None:
        needed.append(judge.folder)
        needed.append(str(Path(judge.folder) / (judge.settings or "data/judge_prompts.jsonl")))
    if judge.references is not None:
        needed.append(judge.references)
    if absent := [place for place in needed if not Path(place).exists()]:
        raise SetupError(
            f"the judge's tool is not here: no {', no '.join(absent)}",
            fix="docs/how-to/answer-benchmarks.md says how to install each tool",
        )
    if not os.environ.get(judge.api_key_variable):
        raise SetupError(
            f"the environment variable {judge.api_key_variable} is not set",
            where="judge.api_key_variable",
            fix=f"export {judge.api_key_variable}=..., any text where the endpoint takes no key",
        )
    return judge


def judge_answers(
    config: DownstreamConfig,
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    *,
    model: str,
    stop: Callable[[], str | None] = lambda: None,
) -> Verdicts:
    """Have answers judged by the benchmark's tool; what it has judged already is not asked again.

    Args:
        config: with a judge.
        questions: what was asked.
        answers: by question id, one for every question.
        model: what the tool calls the policy.
        stop: says why to end before the tool has; None to go on.

    Raises:
        SetupError: the tool cannot run, fails, or is still at work for a job that was killed; what
            it has judged is kept.
        Stopped: `stop` said so.
        InputError: its results are not what is expected, or hold no verdict.
    """
    judge = check_judge(config)
    call = {
        "alpaca_eval": _judge_alpaca_eval,
        "arena_hard": _judge_arena_hard,
        "mt_bench": _judge_mt_bench,
    }[config.benchmark]
    name = re.sub(r"[^\w.\-]", "_", judge.model or "default")
    folder = Path(config.answers).absolute() / "judged" / f"{model}.{name}"
    # Verdicts on earlier answers under this name stay where they are.
    folder = folder.with_name(f"{folder.name}.{hash_answers(answers)[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    return call(_Case(config, judge, questions, answers, model, folder, stop))


@dataclass(frozen=True)
class _Case:
    config: DownstreamConfig
    judge: JudgeSpec
    questions: Sequence[Question]
    answers: Mapping[str, Answer]
    model: str
    folder: Path
    stop: Callable[[], str | None]

    @property
    def log(self) -> Path:
        """What the tool said when it was last called."""
        return self.folder / "judge.log"

    def write(self, file: Path) -> None:
        write_answers(self.config.benchmark, file, self.questions, self.answers, model=self.model)

    def mean(self, sums: Sequence[float], weights: Sequence[float] | None = None,
             scale: float = 1.0) -> Estimate:  # fmt: skip
        statistics = self.config.statistics
        return estimate_mean(
            sums, weights, scale=scale, resamples=statistics.resamples, seed=statistics.seed
        )

    def call(self, arguments: Sequence[str], *, says: str = "") -> None:
        """Run the tool's Python in the case's folder.

        Args:
            arguments: behind the interpreter.
            says: what it is told on standard input.
        """
        # A job's own search path leads to packages that the tool must not see.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["OPENAI_API_KEY"] = os.environ[self.judge.api_key_variable]
        environment.pop("OPENAI_API_KEYS", None)
        environment["OPENAI_MAX_CONCURRENCY"] = str(self.judge.parallel)
        if self.judge.base_url is not None:
            # openai before 1.0, and alpaca_eval, read the first; openai since 1.0 the second.
            environment["OPENAI_API_BASE"] = environment["OPENAI_BASE_URL"] = self.judge.base_url
        try:
            code = run_program(
                [self.judge.python, *arguments],
                folder=self.folder,
                environment=environment,
                says=says,
                log=self.log,
                stop=self.stop,
            )
        except OSError as error:
            raise SetupError(
                f"cannot be run: {error.strerror or error}",
                where=self.judge.python,
                fix="name the Python of the environment that has the benchmark's tool",
            ) from None
        if code:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:].strip()
            raise SetupError(
                f"the judge's tool failed with exit code {code}; the end of its log:\n{tail}",
                where=str(self.log),
                fix="the same command goes on with what is not judged yet",
            )

    def finish(self, judge: str, scores: Mapping[str, Estimate], judged: int) -> Verdicts:
        return Verdicts(judge, scores, len(self.questions) - judged, self.folder)


def _judge_alpaca_eval(case: _Case) -> Verdicts:
    judge, outputs = case.judge, case.folder / "model_outputs.json"
    case.write(outputs)
    options = {
        "model_outputs": str(outputs),
        "output_path": str(case.folder / "results"),
        "caching_path": str(case.folder / "annotations_cache.json"),
        # Against the leaderboard's models the tool would compare nothing anew.
        "precomputed_leaderboard": "None",
    }
    if judge.model is not None:
        options["annotators_config"] = str(_write_annotator(case, judge.model))
    if judge.references is not None:
        options["reference_outputs"] = str(Path(judge.references).absolute())
    if not judge.length_controlled:
        options |= {"fn_metric": "get_winrate", "sort_by": "win_rate"}
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    case.call(["-m", "alpaca_eval.main", "evaluate", *flags])
    tables = sorted((case.folder / "results").rglob("leaderboard.csv"))
    if not tables:
        raise InputError(
            "alpaca_eval wrote no leaderboard.csv",
            where=str(case.folder),
            fix=f"read what the tool said in {case.log}",
        )
    rows = pd.read_csv(tables[0], index_col=0).to_dict(orient="index")
    row: dict[Any, Any] | None = rows.get(case.model)
    if row is None:
        raise InputError(
            f"has no row '{case.model}'",
            where=str(tables[0]),
            fix=f"read what the tool said in {case.log}",
        )
    count = int(row["n_total"])
    scores = {"win_rate": estimate_normal(row["win_rate"], row["standard_error"], count)}
    if judge.length_controlled:
        scores["length_controlled_win_rate"] = estimate_normal(
            row["length_controlled_winrate"], row["lc_standard_error"], count
        )
    return case.finish(judge.model or "gpt-4-1106-preview", scores, count)


def _write_annotator(case: _Case, model: str) -> Path:
    """Write alpaca_eval's default annotator with another model: same prompt, same parser."""
    where = "import importlib.util as u; print(u.find_spec('alpaca_eval').origin)"
    case.call(["-c", where])
    configs = Path(case.log.read_text(encoding="utf-8").strip()).parent / "evaluators_configs"
    text = (configs / _ALPACA_ANNOTATOR / "configs.yaml").read_text(encoding="utf-8")
    (settings,) = yaml.safe_load(text).values()
    settings["prompt_template"] = str(configs / settings["prompt_template"])
    settings["completions_kwargs"] |= {"model_name": model, "requires_chatml": True}
    folder = case.folder / "annotator"
    folder.mkdir(exist_ok=True)
    named = {f"weighted_{re.sub(r'[^A-Za-z0-9.-]', '_', model)}": settings}
    (folder / "configs.yaml").write_text(yaml.safe_dump(named, sort_keys=False))
    return folder


def _judge_arena_hard(case: _Case) -> Verdicts:
    judge = case.judge
    tool, given = Path(str(judge.folder)).absolute(), str(judge.settings)
    settings: dict[str, Any] = yaml.safe_load((tool / given).read_text(encoding="utf-8"))
    settings["model_list"] = [case.model]
    if judge.model is not None:
        settings["judge_model"] = judge.model
    name = settings["judge_model"]
    # Without endpoints of its own the tool takes address and key from the environment.
    endpoint = {
        "model": name, "model_name": name, "endpoints": None, "api_type": "openai",
        "parallel": judge.parallel,
    }  # fmt: skip
    (case.folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (case.folder / "endpoint.yaml").write_text(yaml.safe_dump({name: endpoint}))
    data = Path("data") / settings["bench_name"]
    _write_lines(case.folder / data / "question.jsonl", [q.row for q in case.questions])
    ours = case.folder / data / "model_answer" / f"{case.model}.jsonl"
    case.write(ours)
    for file in (tool / data / "model_answer").glob("*.jsonl"):
        if file.name != ours.name:
            _link(file, ours.with_name(file.name))
    case.call(
        [str(tool / "gen_judgment.py"), "--setting-file", "settings.yaml",
         "--endpoint-file", "endpoint.yaml"]
    )  # fmt: skip
    file = case.folder / data / "model_judgment" / name / f"{case.model}.jsonl"
    games = {
        str(row.get("uid", row.get("question_id"))): _weigh_games(row["games"])
        for row in _read_lines(file)
    }
    # In the questions' order: the tool's is that in which answers came.
    whole = [found for question in case.questions if (found := games.get(question.id))]
    if not whole:
        raise _no_verdict(case, file)
    rate = case.mean([top for top, _ in whole], [bottom for _, bottom in whole], scale=100)
    return case.finish(name, {"win_rate": rate}, len(whole))


def _weigh_games(games: Sequence[Mapping[str, Any] | None]) -> tuple[float, float] | None:
    """Weigh a question's two games: the baseline is A in the first, the policy in the second.

    Returns:
        Sum of weighted scores of the policy, and of weights; None without two verdicts.
    """
    top = bottom = 0.0
    for game, policy in zip(games, "BA", strict=True):
        found = _GAME.match((game or {}).get("score") or "")
        if found is None:
            return None
        left, sign, _ = found.groups()
        weight = _STRONG_WEIGHT if len(sign) == 2 else 1
        of_left = 0.5 if sign == "=" else float(sign[0] == ">")
        top += weight * (of_left if left == policy else 1 - of_left)
        bottom += weight
    return top, bottom


def _judge_mt_bench(case: _Case) -> Verdicts:
    judge, tool = case.judge, Path(str(case.judge.folder)).absolute() / "data"
    name = judge.model or "gpt-4"
    data = case.folder / "data" / "mt_bench"
    case.write(data / "model_answer" / f"{case.model}.jsonl")
    _link(tool / "judge_prompts.jsonl", case.folder / "data" / "judge_prompts.jsonl")
    # The default references are GPT-4's, whoever judges; the tool looks for the judge's own.
    own = tool / "mt_bench" / "reference_answer" / f"{name}.jsonl"
    references = own if own.exists() else own.with_name("gpt-4.jsonl")
    _link(references, data / "reference_answer" / f"{name}.jsonl")
    found = data / "model_judgment" / f"{name}_single.jsonl"
    whole = _scores_of_turns(found, case.questions)
    missing = [question for question in case.questions if question.id not in whole]
    if missing:
        # The tool asks for all that its question file holds, and appends.
        _write_lines(data / "question.jsonl", [question.row for question in missing])
        arguments = ["--model-list", case.model, "--judge-model", name]
        arguments += ["--parallel", str(judge.parallel)]
        case.call(["-m", "fastchat.llm_judge.gen_judgment", *arguments], says="\n")
        whole = _scores_of_turns(found, case.questions)
    if not whole:
        raise _no_verdict(case, found)
    turns = list(whole.values())
    scores = {"score": case.mean([sum(t) for t in turns], [len(t) for t in turns])}
    for number in range(max(map(len, turns))):
        scores[f"turn_{number + 1}"] = case.mean([t[number] for t in turns if len(t) > number])
    return case.finish(name, scores, len(whole))


def _no_verdict(case: _Case, file: Path) -> InputError:
    return InputError(
        "no question has a verdict",
        where=str(file),
        fix=f"read what the tool said in {case.log}, and run again",
    )


def _scores_of_turns(file: Path, questions: Sequence[Question]) -> dict[str, list[float]]:
    """Give the scores of questions whose turns all have one, by question id."""
    found: dict[tuple[str, int], float] = {}
    for row in _read_lines(file) if file.exists() else ():
        if row["score"] != -1:  # no score could be read from what the judge said
            found[str(row["question_id"]), row["turn"]] = float(row["score"])
    scores = {
        question.id: [found.get((question.id, turn + 1)) for turn in range(len(question.turns))]
        for question in questions
    }
    return {
        name: [score for score in turns if score is not None]
        for name, turns in scores.items()
        if None not in turns
    }


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tool's results cannot be read: {error}",
            where=str(file),
            fix="delete the file and run again: its questions are judged anew",
        ) from None


def _write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(dict(row))}\n" for row in rows), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(source)
