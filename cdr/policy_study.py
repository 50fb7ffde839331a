"""From a policy study's config to its stages: what is run, in which order, keyed by what.

    start:                                answer each benchmark
    every other row:  annotate -> train -> answer each benchmark, judged or compared with the start

A stage is a run of a job on a config of its own. Its key hashes all that decides what comes out,
the stages before it included, so a changed row is done again and the others are not. Everything a
stage needs (configs, models, questions, keys of judges, programs) is looked for here, before the
first hour is spent. Loads no weights, starts no Spark.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cdr.answer_files import read_questions
from cdr.api_judge import read_key
from cdr.child_jobs import search_path
from cdr.config import AnnotateConfig, content_hash
from cdr.config_files import Spec
from cdr.downstream import answers_file, results_file
from cdr.downstream_config import DownstreamConfig
from cdr.errors import INSTALL_TRAINING, CdrError, ConfigError, InputError, SetupError
from cdr.judging import check_judge
from cdr.models import hash_text_files
from cdr.plan import AnnotationPlan, plan_annotation, plan_reward
from cdr.policy_study_config import ANNOTATE, START, TRAIN, PolicyStudyConfig
from cdr.registry import load_annotation_plan
from cdr.sampling import plan_sampling
from cdr.simpo_config import SimpoConfig
from cdr.text_files import is_uri
from cdr.weights import Source, hash_source

SHORT = 8
"""Digits of a key in names of files and datasets."""
# How a judge is asked, and how a policy is run: neither decides what comes out.
_NOT_OF_THE_VERDICT = {"python", "parallel", "api_key_variable"}
_NOT_OF_THE_POLICY = {"batch_tokens", "memory_fraction", "tensor_parallel"}


@dataclass(frozen=True)
class Stage:
    """One job of a study.

    Args:
        row: the policy.
        name: `annotate`, `train`, or the benchmark's.
        job: module of jobs/.
        config: what the job is given, JSON-able; the run adds where MLflow keeps it.
        decisive: what decides the outcome, by a name that says to people what it is.
        needs: labels of stages that must be done before.
        options: of the job's command line, besides the config.
        result: file that the job leaves; None where that is a table.
    """

    row: str
    name: str
    job: str
    config: Mapping[str, Any]
    decisive: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    result: Path | None = None

    @property
    def label(self) -> str:
        """Name of the stage within the study, and of its files."""
        return f"{self.row}.{self.name}"

    @cached_property
    def key(self) -> str:
        """Hash of all that decides the outcome."""
        return content_hash(self.decisive)


@dataclass(frozen=True)
class PolicyPlan:
    """A checked study.

    Args:
        config: the resolved config, with all rows.
        rows: those that are asked for, `start` among them.
        stages: of these rows, in an order in which each stands behind what it needs.
        rewards: by row, the reward key that its pairs are chosen by.
        warnings: about the rewards, for people.
    """

    config: PolicyStudyConfig
    rows: tuple[str, ...]
    stages: tuple[Stage, ...]
    rewards: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def output(self) -> Path:
        """Folder of all that is no table."""
        return Path(self.config.output)

    def stage(self, label: str) -> Stage:
        """Give the stage of a label."""
        return next(stage for stage in self.stages if stage.label == label)

    def answering(self, row: str) -> dict[str, Stage]:
        """Give a row's stages that answer, by benchmark."""
        found = (stage for stage in self.stages if stage.row == row)
        return {stage.name: stage for stage in found if stage.name in self.config.benchmarks}


def plan_policy_study(
    config: PolicyStudyConfig, *, rows: Sequence[str] | None = None
) -> PolicyPlan:
    """Resolve and check all that a study names.

    Args:
        config: the config.
        rows: some of its rows, to which `start` is added; None for all.

    Raises:
        ConfigError: with every problem found.
    """
    if unknown := [name for name in rows or () if name not in config.rows]:
        raise ConfigError(
            [f"--rows: no row '{name}'" for name in unknown],
            fix=f"rows of this config: {', '.join(config.rows)}",
        )
    taken = [name for name in config.rows if rows is None or name in (START, *rows)]
    # What others are compared with comes first, wherever the table shows it.
    taken.sort(key=lambda name: name != START)
    planner = _Planner(config)
    stages = [stage for row in taken for stage in planner.plan_row(row)]
    if planner.problems:
        raise ConfigError(
            list(dict.fromkeys(planner.problems)),
            where=f"policy study '{config.study}'",
            fix="--rows takes the rows that have all they need; docs/how-to/policy-study.md says "
            "what each stage needs",
        )
    shown = tuple(name for name in config.rows if name in taken)
    warnings = tuple(dict.fromkeys(planner.warnings))
    return PolicyPlan(config, shown, tuple(stages), planner.rewards, warnings)


class _Planner:
    """Lays out the stages of one row after the other, and collects what is wrong."""

    def __init__(self, config: PolicyStudyConfig) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.rewards: dict[str, str] = {}
        self._config, self._output = config, Path(config.output).absolute()
        self._start_answers: dict[str, tuple[str, str]] = {}
        self._completions = self._start = ""
        self._questions: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._compared_by: dict[str, dict[str, str]] = {}
        self._check_programs()
        with self._at("annotate.input"):
            self._completions = _hash_completions(config.annotate)
        with self._at("train.start"):
            start = config.train.start
            if start.revision is not None:
                self._start = f"{start.path}@{start.revision}"
            else:
                weights = start.checksum or hash_source(Source(start.path, None, None))
                self._start = content_hash([weights, hash_text_files(start.path)])
        for name, benchmark in config.benchmarks.items():
            self._check_benchmark(name, benchmark)

    def plan_row(self, row: str) -> Iterator[Stage]:
        """Lay out a row's stages; those that cannot be laid out are a problem."""
        names = self._config.benchmarks
        if row == START:
            yield from (self._answer(row, name, None) for name in names)
            return
        with self._at(f"rows.{row}"):
            annotate, plan = self._annotate(row)
            train = self._train(row, annotate, plan)
            yield from (annotate, train)
            yield from (self._answer(row, name, train) for name in names)

    def _annotate(self, row: str) -> tuple[Stage, AnnotationPlan]:
        config = self._config
        tree = _dump(config.annotate)
        registered = config.rows[row].registered
        if registered is None:
            tree["reward"] = _dump(config.reward_of(row))
            plan = plan_annotation(AnnotateConfig.model_validate(tree))
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "annotate.yaml"
                file.write_text(yaml.safe_dump({**tree, "reward": registered}), encoding="utf-8")
                plan = load_annotation_plan(file)
            # An alias may stand for another version tomorrow.
            tree["reward"] = f"models:/{plan.reward_version}"
        reward = plan.config.reward
        if reward.judge_api is not None:
            read_key(reward.judge_api)
        self.warnings += reward.warnings()
        self.rewards[row] = plan.reward.key
        decisive = {
            "warehouse": _whole(config.warehouse),
            "tables": config.tables,
            "dataset": plan.dataset,
            "input": config.annotate.input.model_dump(mode="json"),
            "completions": self._completions,
            "reward": plan.reward.key,
            "pairs": plan.selection_key,
        }
        return Stage(row, ANNOTATE, "annotate", tree, decisive), plan

    def _train(self, row: str, annotate: Stage, plan: AnnotationPlan) -> Stage:
        config = self._config
        decisive = {
            "annotate": annotate.key,
            "start": self._start,
            "search": config.train.search.model_dump(mode="json"),
            "training": config.train.training.model_dump(mode="json"),
            # How many share a step decides too.
            "launch": list(config.launch.train),
        }
        output = self._output / "policies" / f"{row}-{content_hash(decisive)[:SHORT]}"
        pairs = {
            "dataset": plan.dataset,
            "reward": plan.reward.key,
            "selection": plan.selection_key,
        }
        tree = {**_dump(config.train), "preferences": pairs, "output": str(output)}
        SimpoConfig.model_validate(tree)
        needs, result = (annotate.label,), output / "metrics.json"
        return Stage(row, TRAIN, "train_simpo", tree, decisive, needs, result=result)

    def _answer(self, row: str, name: str, train: Stage | None) -> Stage:
        config, benchmark = self._config, self._config.benchmarks[name]
        answers = {
            "policy": self._start if train is None else train.key,
            "run as": benchmark.policy.model_dump(mode="json", exclude=_NOT_OF_THE_POLICY),
            "template": benchmark.template,
            "text": self._texts.get(name, ""),
            "sampling": benchmark.sampling.model_dump(mode="json"),
            "questions": self._questions.get(name, ""),
        }
        # Another policy, or other sampling, is another dataset of `completions`.
        dataset = f"{config.study}.{row}.{content_hash(answers)[:SHORT]}"
        folder, policy = self._output / "answers" / name, _dump(benchmark.policy)
        if train is not None:
            trained = str(Path(train.config["output"]) / "policy")
            is_adapter = config.train.training.lora is not None
            policy |= {"adapter": trained} if is_adapter else {
                "path": trained, "revision": None, "checksum": None
            }  # fmt: skip
        tree = {
            **_dump(benchmark),
            "dataset": dataset, "answers": str(folder), "policy": policy,
        }  # fmt: skip
        DownstreamConfig.model_validate(tree)
        decisive: dict[str, Any] = {"answers": answers, "answered to": benchmark.benchmark}
        options: tuple[str, ...] = ()
        needs: tuple[str, ...] = () if train is None else (train.label,)
        if config.judged_by == "tool":
            assert benchmark.judge is not None
            options = ("--judge",)
            judge = benchmark.judge.model_dump(mode="json", exclude=_NOT_OF_THE_VERDICT)
            decisive |= {"judge": judge, "statistics": benchmark.statistics.model_dump()}
        elif train is None:
            file = answers_file(str(folder), benchmark.benchmark, dataset)
            self._start_answers[name] = (dataset, str(file))
        else:
            start, file_of_start = self._start_answers[name]
            options = ("--compare-with", file_of_start)
            needs += (f"{START}.{name}",)
            decisive |= {"compared by": self._compared_by.get(name), "with": start}
        result = results_file(str(folder), dataset)
        return Stage(
            row, name, "answer_benchmark", tree, decisive, needs, options=options, result=result
        )

    def _check_benchmark(self, name: str, benchmark: DownstreamConfig) -> None:
        key = f"benchmarks.{name}"
        with self._at(f"{key}.questions"):
            questions = read_questions(benchmark.benchmark, benchmark.questions)
            told = [(question.id, question.turns, question.category) for question in questions]
            self._questions[name] = content_hash(told)
        with self._at(f"{key}.policy"):
            sampling = benchmark.sampling_config("check", "-", benchmark.sampling.temperature)
            self._texts[name] = plan_sampling(sampling).text_key
        if self._config.judged_by == "tool":
            with self._at(f"{key}.judge"):
                check_judge(benchmark)
            return
        for role, reward in benchmark.rewards().items():
            with self._at(f"{key}.{role}"):
                self._compared_by.setdefault(name, {})[role] = plan_reward(reward).key

    def _check_programs(self) -> None:
        launch = self._config.launch
        for key, command in (("spark", launch.spark), ("train", launch.train)):
            if command and shutil.which(command[0], path=search_path()) is None:
                self.problems.append(f"launch.{key}: no program '{command[0]}' in PATH")
        if importlib.util.find_spec("trl") is None:
            self.problems.append(
                f"train: TRL is not installed for {sys.executable}: {INSTALL_TRAINING}"
            )

    @contextlib.contextmanager
    def _at(self, key: str) -> Iterator[None]:
        """Take an error for a problem of this key, and go on to the next."""
        try:
            yield
        except ConfigError as error:
            self.problems += [f"{key}: {problem}" for problem in error.problems]
        except (CdrError, ValueError) as error:
            self.problems.append(f"{key}: {_in_a_line(error)}")


def _hash_completions(annotate: AnnotateConfig) -> str:
    """Give what stands for the completions' content.

    Raises:
        InputError: they are not there.
        SetupError: nothing says which version of them is meant.
    """
    source = annotate.input
    if source.format == "delta":
        if source.version is None:
            raise SetupError(
                f"version: is required, as all rows have to see the same {source.place}",
                fix="its versions: DESCRIBE HISTORY in SQL; take the newest one",
            )
        return f"{source.place}@{source.version}"
    total = hashlib.sha256()
    for place in filter(None, (source.path, source.prompts_path)):
        if is_uri(place):
            total.update(place.encode())  # nobody reads a bucket twice to hash it
            continue
        folder = Path(place)
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if not file.exists():
                raise InputError("no such file", where=place, fix="correct the path")
            if file.is_file():
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _dump(spec: Spec) -> dict[str, Any]:
    """Give what a config file would have to say."""
    tree: dict[str, Any] = _whole(spec.model_dump(mode="json", exclude_unset=True))
    return tree


def _whole(value: Any) -> Any:
    """Give relative paths of `--set` in full: a file in another folder would read them anew."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.abspath(value)
    return value


def _in_a_line(error: Exception) -> str:
    if not isinstance(error, CdrError):
        return str(error).splitlines()[0]
    parts = (error.what, f"at {error.where}" if error.where else None, error.fix)
    return "; ".join(part for part in parts if part)
