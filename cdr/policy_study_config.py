"""What a study of policies is asked: rewards to annotate with, one training, benchmarks, a judge.

    conf/study/table2*.yaml      a table of policies, one per reward

All rows share the completions, the rule that chooses pairs, the training's search and the
benchmarks; they differ in the reward alone. The row `start` is the policy that the others are
trained from. Annotating, training and answering are configured as they are for their own jobs, by
the same files.

Source: arXiv 2411.02481, section 4.3 and Table 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from cdr.answer_files import Benchmark
from cdr.config import AnnotateConfig, TablePlaces, TrackingSpec, WarehousePlace
from cdr.config_files import MayBeFile, Spec, load_config
from cdr.downstream_config import DownstreamConfig
from cdr.evaluation_config import RowName
from cdr.reward_config import RewardSpec, change_reward
from cdr.simpo_config import SimpoConfig
from cdr.text_files import is_uri

START: Final = "start"
"""Row of the policy before training."""

ANNOTATE, TRAIN = STAGES = ("annotate", "train")
"""Names of stages; those that answer are named after their benchmark."""

TOOL_COLUMNS: Mapping[Benchmark, Mapping[str, str]] = {
    "alpaca_eval": {
        "length_controlled_win_rate": "LC", "win_rate": "WR", "length_chars": "length"
    },
    "arena_hard": {"win_rate": "WR", "length_tokens": "length"},
    "mt_bench": {"score": "score"},
}  # fmt: skip
"""What a table shows of a benchmark that its tool judges, and how it heads the column."""

REWARD_COLUMNS: Mapping[str, str] = {
    "reward_win_rate": "WR", "held_out_win_rate": "held-out WR", "length_tokens": "length"
}  # fmt: skip
"""The same where rewards compare the answers with the start policy's."""


class PolicyRowSpec(Spec):
    """One row: the reward that its pairs are annotated with. The row `start` has none."""

    title: str = Field("", description="How the table names it; empty: the row's key.")
    reward: Annotated[RewardSpec | None, MayBeFile()] = Field(
        None, description="Reward, or its file. None: `annotate.reward`."
    )
    registered: str | None = Field(
        None,
        pattern=r"^models:/",
        description="A registered reward in its place, `models:/NAME@ALIAS` or `models:/NAME/3`.",
    )
    change: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of the reward with other values, nested as in its file; `null` takes a "
        "value away. Not for a registered one.",
    )
    printed: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Published values by benchmark and column, to print beside.",
    )


class LaunchSpec(Spec):
    """What the jobs are started with.

    A program is looked for beside this Python, then in PATH. A cluster's own spark-submit should be
    named in full, as /usr/bin/spark-submit: pip's pyspark puts one beside Python.
    """

    spark: tuple[str, ...] = Field(
        (),
        description="Before a job of Spark's, such as `[spark-submit, --properties-file, FILE]`. "
        "Empty: this Python, on this machine.",
    )
    train: tuple[str, ...] = Field(
        (),
        description="Before the training, such as `[accelerate, launch, --num_processes, '8']`. "
        "Empty: this Python, one process. It decides what is trained, as the number of processes "
        "does: another command trains every row anew.",
    )


class PolicyStudyTrackingSpec(TrackingSpec):
    """Where MLflow keeps the study's run, and below it those of its stages."""

    experiment: str = Field("cdr-policy-study", description="MLflow experiment.")


class PolicyStudyConfig(Spec):
    """One study of policies: which rewards, trained how, answering what, judged by whom."""

    study: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._\-]*$", description="Name of the study in tables and files."
    )
    warehouse: WarehousePlace
    tables: TablePlaces
    output: str = Field(
        description="Folder of policies, answers, logs, and the records of what is done: on this "
        "machine, and where the cluster's nodes see it too, as they answer with the policies."
    )
    annotate: Annotated[AnnotateConfig, MayBeFile()] = Field(
        description="The completions, the rule that chooses pairs, and the default reward, as in "
        "`conf/annotate/`. `warehouse`, `tables` and `tracking` are the study's, and may be left "
        "out; so may what is the study's below."
    )
    train: Annotated[SimpoConfig, MayBeFile()] = Field(
        description="Start policy and search, as in `conf/train/`. `preferences` and `output` are "
        "the study's too."
    )
    benchmarks: dict[RowName, Annotated[DownstreamConfig, MayBeFile()]] = Field(
        min_length=1,
        description="What the policies answer, by name, as in `conf/downstream/`. `dataset` and "
        "`answers` are the study's too; `policy` is the start policy.",
    )
    judged_by: Literal["tool", "rewards"] = Field(
        description="`tool`: each benchmark's own tool and judge; `rewards`: win rate over the "
        "start policy by each benchmark's `reward` and `held_out_reward`, without an endpoint."
    )
    rows: dict[RowName, PolicyRowSpec] = Field(
        description="The policies by name, in the table's order; `start` among them."
    )
    launch: LaunchSpec = LaunchSpec()
    tracking: PolicyStudyTrackingSpec = PolicyStudyTrackingSpec()

    @model_validator(mode="before")
    @classmethod
    def _parts_take_the_studys_places(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        tracking = tree.get("tracking") or {}
        if isinstance(tracking, Mapping):
            tracking = {"experiment": PolicyStudyTrackingSpec().experiment, **tracking}
        shared = {
            "warehouse": tree.get("warehouse", ""),
            "tables": tree.get("tables") or {},
            "tracking": tracking,
        }
        parts: dict[str, Any] = {name: tree.get(name) for name in ("annotate", "train")}
        if isinstance(parts["annotate"], Mapping):
            parts["annotate"] = {**parts["annotate"], **shared}
        if isinstance(parts["train"], Mapping):
            # Which pairs, and where to, is decided row by row.
            places = {"preferences": {"dataset": ""}, "output": tree.get("output", "")}
            parts["train"] = {**parts["train"], **shared, **places}
        benchmarks = tree.get("benchmarks")
        if isinstance(benchmarks, Mapping):
            places = {"dataset": START, "answers": tree.get("output", "")}
            parts["benchmarks"] = {
                name: {**one, **shared, **places} if isinstance(one, Mapping) else one
                for name, one in benchmarks.items()
            }
        return {**tree, **{name: part for name, part in parts.items() if part is not None}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._row_problems(), *self._benchmark_problems()]
        search = self.train.search
        policies = len(search.learning_rates) * len(search.betas)
        if self.annotate.pairs.validation_fraction == 0 and policies > 1:
            problems.append(
                f"annotate.pairs.validation_fraction: must be > 0 to choose one of {policies} "
                "policies by"
            )
        if is_uri(self.output) or self.output.startswith("dbfs:"):
            problems.append(
                "output: must be a folder on this machine; a shared one is mounted, as /mnt/studies"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _row_problems(self) -> list[str]:
        problems = []
        if START not in self.rows:
            problems.append(f"rows: needs one named '{START}', the policy before training")
        for name, row in self.rows.items():
            if name == START and (row.reward or row.registered or row.change):
                problems.append(f"rows.{name}: is not trained, and takes no reward")
            if row.registered and (row.reward or row.change):
                problems.append(
                    f"rows.{name}.registered: stands alone, a registered reward cannot be changed"
                )
            try:
                self.reward_of(name)
            except ValidationError as error:
                problems += [
                    f"rows.{name}.change.{'.'.join(map(str, item['loc']))}: {item['msg']}"
                    for item in error.errors()
                ]
            problems += [
                f"rows.{name}.printed.{benchmark}: no column '{column}'; known: "
                f"{', '.join(self.columns_of(benchmark)) or 'none'}"
                for benchmark, values in row.printed.items()
                for column in values
                if column not in self.columns_of(benchmark)
            ]
        return problems

    def _benchmark_problems(self) -> list[str]:
        problems, start = [], self.train.start
        for name, benchmark in self.benchmarks.items():
            if name in STAGES:
                problems.append(f"benchmarks.{name}: is the name of a stage, take another")
            policy = benchmark.policy
            if (policy.path, policy.revision) != (start.path, start.revision) or policy.adapter:
                problems.append(
                    f"benchmarks.{name}.policy: must be train.start ({start.path} at "
                    f"{start.revision}) without an adapter, got {policy.path} at {policy.revision}"
                )
            if self.judged_by == "tool" and benchmark.judge is None:
                problems.append(f"benchmarks.{name}.judge: is required, as judged_by is 'tool'")
            if self.judged_by == "rewards" and benchmark.reward is None:
                problems.append(f"benchmarks.{name}.reward: is required, as judged_by is 'rewards'")
        return problems

    def columns_of(self, benchmark: str) -> Mapping[str, str]:
        """Give the table's columns of a benchmark: metric, and the end of the header."""
        given = self.benchmarks.get(benchmark)
        if given is None:
            return {}
        if self.judged_by == "tool":
            return TOOL_COLUMNS[given.benchmark]
        both = given.held_out_reward is not None
        return {k: v for k, v in REWARD_COLUMNS.items() if both or k != "held_out_win_rate"}

    def title_of(self, row: str) -> str:
        """Name a row as the table does."""
        return self.rows[row].title or row

    def reward_of(self, row: str) -> RewardSpec:
        """Give a row's reward; it has a name of the study's, not of its file.

        Raises:
            ValidationError: the row's changes do not make a reward.
        """
        given = self.rows[row]
        reward = given.reward or self.annotate.reward
        return change_reward(reward, {"name": f"{self.study}.{row}", **given.change})


def load_policy_study_config(path: str | Path, overrides: Sequence[str] = ()) -> PolicyStudyConfig:
    """Read a policy study's YAML with everything it names; see `cdr.config_files.load_config`."""
    return load_config(PolicyStudyConfig, path, overrides)
