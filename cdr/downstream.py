"""The life of a downstream run: answers, comparisons and verdicts into a file and MLflow.

`jobs/answer_benchmark.py` holds the recipe; this holds what surrounds it. All of a policy's results
on a benchmark are in one JSON file beside its answers, and in MLflow runs that are linked with the
run that trained the policy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd

from cdr.answer_files import (
    Answer,
    Benchmark,
    Question,
    hash_answers,
    model_of,
    read_answers,
    write_answers,
)
from cdr.answering import Conversations
from cdr.cli import OK, STOPPED
from cdr.comparison import load_judged
from cdr.downstream_config import DownstreamConfig
from cdr.errors import ConfigError, InputError, SetupError, Stopped
from cdr.evaluation_config import (
    ONE_SECTION,
    EvaluateConfig,
    EvaluateReportSpec,
    EvaluateTrackingSpec,
    PairColumnsSpec,
    PairsInputSpec,
)
from cdr.evaluation_plan import EvaluationPlan, plan_evaluation
from cdr.judging import judge_answers
from cdr.plan import check_keys
from cdr.redaction import first_line
from cdr.reward_config import RewardSpec
from cdr.runs import StopSignal, new_run_id
from cdr.staging import Staging
from cdr.tables import COMPLETIONS
from cdr.text_table import render_table
from cdr.tracking import RunTracker, TableVersion
from cdr.tracking_store import open_store, resolve_tracking_uri
from cdr.warehouse import Warehouse
from cdr.win_rates import Estimate, WinRate, measure_lengths

_PAIRS_DDL = "id string, prompt string, chosen string, rejected string"

LINK_TAG = "cdr.training_mlflow_run_id"
"""Tag of a downstream run: the run that trained the policy. That one has `cdr.downstream.ID`."""


def answers_file(folder: str, benchmark: Benchmark, model: str) -> Path:
    """Say where a policy's answers are written, as the benchmark's tool lays its files out."""
    if benchmark == "alpaca_eval":
        return Path(folder) / model / "model_outputs.json"
    return Path(folder) / "model_answer" / f"{model}.jsonl"


def results_file(folder: str, model: str) -> Path:
    """Say where a policy's results are written."""
    return Path(folder) / "results" / f"{model}.json"


class DownstreamRun:
    """One policy on one benchmark, used as a context manager.

    Args:
        config: the resolved config.
        warehouse: where the tables are.
        model: what the files call the policy: the dataset, and the limit where there is one.
        policy_key: the policy's model key.

    Attributes:
        staging: the run's intermediate tables.
        exit_code: the job's, after the context has ended.
    """

    def __init__(
        self, config: DownstreamConfig, warehouse: Warehouse, *, model: str, policy_key: str
    ) -> None:
        run_id = new_run_id()
        self.staging = Staging(warehouse.spark, warehouse.root, run_id)
        self._config, self._warehouse, self._model = config, warehouse, model
        self._results: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self.exit_code = OK
        self._tracker = RunTracker(
            config.tracking,
            warehouse.root,
            run_name=run_id,
            config=config.model_dump(mode="json"),
            tags={
                "cdr.job": "answer_benchmark",
                "cdr.benchmark": config.benchmark,
                "cdr.dataset": model,
                "cdr.model_key.policy": policy_key,
            },
        )

    def __enter__(self) -> Self:
        if self._config.training_run and self._config.tracking.enabled:
            _check_run(self._config, self._warehouse.root)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tracker)
            stack.enter_context(self.staging)
            self._link_training()
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self._results:
            self._tracker.log_summary(self._results)
        self._open.__exit__(kind, error, trace)
        if isinstance(error, Stopped):
            self.exit_code = STOPPED
        elif error is None:
            print(f"\nresults     {results_file(self._config.answers, self._model)}")
            if command := self._tracker.ui_command():
                print(f"MLflow      {command}")
        return isinstance(error, Stopped)

    def note(self, exit_code: int) -> None:
        """Take the exit code of a run that this one is made of.

        Raises:
            Stopped: it was stopped, as this one then is; it has said so.
        """
        if exit_code == STOPPED:
            raise Stopped("a run of this one was stopped")
        self.exit_code = max(self.exit_code, exit_code)

    def answered(self, questions: Sequence[Question], talk: Conversations) -> dict[str, Answer]:
        """Write, measure and give the answers; every turn has been taken."""
        config, answers, counts = self._config, talk.answers(), talk.counts()
        file = answers_file(config.answers, config.benchmark, self._model)
        write_answers(config.benchmark, file, questions, answers, model=self._model)
        texts = [text for answer in answers.values() for text in answer.turns]
        tokens = [count for answer in answers.values() for count in answer.num_tokens or ()]
        lengths = measure_lengths(texts, tokens)
        version = self._warehouse.version(COMPLETIONS)
        place = self._warehouse.place(COMPLETIONS)
        self._tracker.log_table(TableVersion(COMPLETIONS.name, place, version), role="input")
        self._tracker.set_tags({"cdr.answers": f"{file}@{hash_answers(answers)}"})
        self._begin_results(hash_answers(answers))
        self._found("answers", {**counts, **lengths})
        print(
            f"\n{self._model} on {config.benchmark}: {counts['questions']:,} questions, "
            f"{counts['answers']:,} answers; {counts['cut']:,} reached max_new_tokens, "
            f"{counts['empty']:,} are empty\n"
            f"length      {lengths['chars_mean']:,.0f} characters, {lengths['tokens_mean']:,.0f} "
            f"tokens on average\nfile        {file}"
        )
        return answers

    def compared(self, found: Mapping[str, Compared]) -> None:
        """Record and print how the policy compares with another by rewards."""
        for role, one in found.items():
            self._found(role, one.as_metrics())
        print(f"\n{render_compared(self._model, found)}")

    def judge(self, questions: Sequence[Question], answers: Mapping[str, Answer]) -> None:
        """Let the benchmark's tool judge the answers; record and print what it said.

        Raises:
            Stopped: a signal came, and the tool has ended.
        """
        with StopSignal(self._warehouse.spark, max_hours=None) as signals:
            try:
                verdicts = judge_answers(
                    self._config,
                    questions,
                    answers,
                    model=self._model,
                    stop=lambda: signals.requested,
                )
            except Stopped as stopped:
                print(f"\nstopped: {stopped}. The answers and what was judged before are kept.")
                raise
        self._found("judge", verdicts.as_metrics())
        lines = [f"judged by {verdicts.judge}, 95 % CI"]
        lines += [f"{name:<27}{_show(score)}" for name, score in verdicts.scores.items()]
        if verdicts.unjudged:
            lines.append(f"without a verdict: {verdicts.unjudged:,} questions, in no score")
        print("\n" + "\n".join([*lines, f"the tool's files: {verdicts.folder}"]))

    def _begin_results(self, said: str) -> None:
        """Go on from the results on the same answers, if there are any."""
        file = results_file(self._config.answers, self._model)
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._kept = before if before.get("answers_hash") == said else {}
        self._kept |= {
            "benchmark": self._config.benchmark, "model": self._model, "answers_hash": said
        }  # fmt: skip

    def _found(self, part: str, numbers: Mapping[str, Any]) -> None:
        """Keep results: those of this run for MLflow, all there are in the file."""
        self._results[part] = dict(numbers)
        self._kept = {**self._kept, part: dict(numbers), "mlflow_run_id": self._tracker.run_id}
        file = results_file(self._config.answers, self._model)
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f"{file.name}.new")
        fresh.write_text(json.dumps(self._kept, indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, file)

    def _link_training(self) -> None:
        run, ours = self._config.training_run, self._tracker.run_id
        if run is None or ours is None:
            return
        self._tracker.set_tags({LINK_TAG: run})
        self._tracker.set_tags({f"cdr.downstream.{ours}": self._config.benchmark}, run_id=run)
        answers = f"Answers to {self._config.benchmark}"
        self._tracker.link(run, run, is_our="SimPO training", are_its=answers)


def _check_run(config: DownstreamConfig, warehouse: str) -> None:
    """See that the training run is in the store: a link to nothing would fail after the work."""
    uri = resolve_tracking_uri(config.tracking, warehouse)
    try:
        open_store(uri).get_run(config.training_run)
    except Exception as error:  # MLflow and the network each have their own
        raise SetupError(
            f"the training run cannot be linked: {first_line(error)}",
            where="training_run",
            fix="take a run of the same MLflow store (tracking.uri), or leave training_run out",
        ) from None


@dataclass(frozen=True)
class Compared:
    """A policy against another one, by one reward.

    Args:
        reward: its name.
        other: the other policy's name.
        win_rate: of the policy.
        where_longer: of the questions to which its answer is the longer one, in tokens.
        where_shorter: of those to which it is the shorter one.
    """

    reward: str
    other: str
    win_rate: WinRate
    where_longer: WinRate
    where_shorter: WinRate

    def as_metrics(self) -> dict[str, Any]:
        """Give it as JSON-able numbers and names."""
        parts = {"where_longer": self.where_longer, "where_shorter": self.where_shorter}
        return {
            "reward": self.reward,
            "against": self.other,
            **self.win_rate.as_metrics(),
            **{name: part.as_metrics() for name, part in parts.items()},
        }


@dataclass(frozen=True)
class Rival:
    """Another policy's answers to the same questions.

    Args:
        name: what its file calls it.
        answers: by question id, one for every question.
    """

    name: str
    answers: Mapping[str, Answer]


def read_rival(config: DownstreamConfig, file: str, questions: Sequence[Question]) -> Rival:
    """Read another policy's answers, before anything is answered.

    Raises:
        ConfigError: there is no reward to compare by.
        InputError: the file cannot be read, or a question has no answer in it.
        SetupError: the key of a reward's judge is not in the environment.
    """
    if not config.rewards():
        raise ConfigError(["reward: is required for --compare-with"], fix="see conf/downstream/")
    check_keys(config.rewards())
    answers = read_answers(config.benchmark, file, questions)
    if missing := [question.id for question in questions if question.id not in answers]:
        raise InputError(
            f"{len(missing):,} of {len(questions):,} questions have no answer in it, for example "
            f"{', '.join(missing[:3])}",
            where=file,
            fix="compare answers to the same questions",
        )
    return Rival(model_of(config.benchmark, file), answers)


class PolicyComparison:
    """Two policies' answers as the labelled pairs of an evaluation, ours standing as the chosen.

    The accuracy of such an evaluation is our win rate, so it goes through the stages, the store and
    the tables of `jobs/evaluate.py`. Compared are first turns: what is asked in a second one
    depends on what was said in the first. Equal answers are ties that need no reward.

    Args:
        config: the resolved config, with a reward at least.
        warehouse: where the tables are.
        staging: for the pairs.
        model: our policy's name.
        rival: the other policy.
    """

    def __init__(
        self,
        config: DownstreamConfig,
        warehouse: Warehouse,
        staging: Staging,
        *,
        model: str,
        rival: Rival,
    ) -> None:
        self._config, self._warehouse, self._staging = config, warehouse, staging
        self._rival, self._name = rival, f"{model}.vs.{rival.name}"
        self._equal = 0

    def evaluations(
        self, questions: Sequence[Question], answers: Mapping[str, Answer]
    ) -> dict[str, EvaluationPlan]:
        """Write the pairs whose answers differ; give an evaluation of them for each reward.

        Args:
            questions: what was asked.
            answers: our policy's.

        Returns:
            Plans by what the reward is here; none where all answers are equal.
        """
        rows = []
        for question in questions:
            ours, theirs = answers[question.id].turns[0], self._rival.answers[question.id].turns[0]
            if ours != theirs.strip():  # ours are stripped when they are drawn
                rows.append((question.id, question.turns[0], ours, theirs.strip()))
        self._equal = len(questions) - len(rows)
        if not rows:
            return {}
        self._staging.write("pairs", self._warehouse.spark.createDataFrame(rows, _PAIRS_DDL))
        return {
            role: plan_evaluation(self._evaluation(reward))[0]
            for role, reward in self._config.rewards().items()
        }

    def _evaluation(self, reward: RewardSpec) -> EvaluateConfig:
        config = self._config
        return EvaluateConfig(
            dataset=self._name,
            warehouse=config.warehouse,
            tables=config.tables,
            input=PairsInputSpec(
                path=self._staging.place("pairs"),
                format="parquet",
                columns=PairColumnsSpec(id="id"),
            ),
            reward=reward,
            oracle={ONE_SECTION: "chat"},
            statistics=config.statistics,
            run=config.scoring,
            tracking=EvaluateTrackingSpec(**config.tracking.model_dump()),
            # Its pairs have no label: "chosen" is our policy's answer.
            report=EvaluateReportSpec(enabled=False),
        )

    def compared(self, evaluated: Mapping[str, EvaluationPlan]) -> dict[str, Compared]:
        """Compare by the pairs that the evaluations have judged.

        Args:
            evaluated: from `evaluations`, carried out.
        """
        return {
            role: self._compare(evaluated.get(role), reward.name)
            for role, reward in self._config.rewards().items()
        }

    def _compare(self, plan: EvaluationPlan | None, reward: str) -> Compared:
        judged = pd.DataFrame({"status": [], "margin": [], "longer": []})
        if plan is not None:
            key = plan.annotation.reward.key
            judged = load_judged(self._warehouse, plan.annotation.dataset, key)
            judged["longer"] = judged["chosen_num_tokens"] - judged["rejected_num_tokens"]
        ok = judged[judged["status"] == "ok"]

        def rate(rows: pd.DataFrame, ties: int = 0, left_out: int = 0) -> WinRate:
            margins = rows["margin"].astype(float)
            won, even, lost = (int(s.sum()) for s in (margins > 0, margins == 0, margins < 0))
            return WinRate.of(won, even + ties, lost, left_out)

        return Compared(
            reward,
            self._rival.name,
            rate(ok, self._equal, len(judged) - len(ok)),
            rate(ok[ok["longer"] > 0]),
            rate(ok[ok["longer"] < 0]),
        )


def render_compared(model: str, found: Mapping[str, Compared]) -> str:
    """Write a comparison for a terminal; rates in percent."""
    other = next(iter(found.values())).other
    header = ("by", "win rate", "wins", "ties", "losses", "left out", "where longer",
              "where shorter")  # fmt: skip
    rows = [
        (
            one.reward,
            _show(one.win_rate.rate),
            one.win_rate.wins,
            one.win_rate.ties,
            one.win_rate.losses,
            one.win_rate.left_out,
            _value(one.where_longer.rate),
            _value(one.where_shorter.rate),
        )
        for one in found.values()
    ]
    told = f"{model} against {other}: win rate in percent, ties count half, 95 % CI"
    return "\n".join([told, *render_table(header, rows)])


def _show(score: Estimate | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.1f} ({score.low:.1f} to {score.high:.1f})"


def _value(score: Estimate | None) -> str:
    return "-" if score is None else f"{score.value:.1f} of {score.count:,}"
