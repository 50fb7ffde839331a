"""What an evaluation is asked to do: labelled pairs, one reward or rows of variants, where to.

    conf/evaluate/*.yaml      one reward on one benchmark
    conf/benchmark/*.yaml     a table: rows of variants of a reward on one benchmark

A row changes keys of the file's reward and takes the rest as it is, so a table reads as what its
rows differ in. Checked as a whole before Spark starts, as all configs are (`cdr.config`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from cdr.config import (
    DatasetName,
    PageSpec,
    RunSpec,
    SourceSpec,
    TablePlaces,
    TrackingSpec,
    WarehousePlace,
)
from cdr.config_files import MayBeFile, Spec, list_problems, load_config
from cdr.errors import ConfigError
from cdr.reward_config import Domain, RewardSpec, change_reward, is_hub_id
from cdr.rewardbench import CHAT, CHAT_HARD, PRIOR_SETS, REASONING, SAFETY, SECTIONS

ONE_SECTION = "All"
"""The one section of a table that has neither sections nor subsets."""

RowName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._\-]*$")]


class PairColumnsSpec(Spec):
    """Names of the input's columns. None: the input has no such column."""

    prompt: str | None = Field(
        "prompt",
        description="Text, or messages: an array of role and content. None: the messages that both "
        "answers' conversations begin with.",
    )
    chosen: str = Field(
        "chosen",
        description="The better answer: text, one assistant message, or the whole conversation "
        "that ends with it.",
    )
    rejected: str = Field("rejected", description="The worse answer, likewise.")
    id: str | None = Field(
        None, description="The pair's id, unique within its subset. None: derived from the content."
    )
    subset: str | None = Field(
        None, description="Subset; RewardBench's names bring its weights. None: the section."
    )
    section: str | None = Field(
        None, description="Section, or a domain of yours. None: RewardBench's, by the subset."
    )
    domain: str | None = Field(
        None, description="Domain for routing.mode `column`. None: the section's, by `oracle`."
    )


class PairsInputSpec(SourceSpec):
    """Labelled pairs: a file, a table, or a data set of the hub (then `path` is its id)."""

    revision: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{40}$",
        description="Commit hash of a hub data set: 40 hex digits, quoted. None: no hub id.",
    )
    split: str = Field("filtered", description="Split of the hub data set.")
    columns: PairColumnsSpec = PairColumnsSpec()

    @model_validator(mode="after")
    def _hub(self) -> Self:
        if self.revision is None:
            return self
        problems = []
        if self.path is None or not is_hub_id(self.path):
            problems.append(f"revision: only a hub id has one, got path {self.place!r}")
        if self.format != "parquet":
            problems.append(f"format: a hub data set is read as 'parquet', got '{self.format}'")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class RowSpec(Spec):
    """One row of a table: what differs from the file's reward."""

    title: str = Field("", description="How the table names it; empty: the row's key.")
    change: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of the reward with other values, nested as in its file; `null` takes a "
        "value away.",
    )
    oracle: dict[str, Domain] | None = Field(
        None, description="Domain by section for routing.mode `column`. None: the file's."
    )
    printed: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(
        default_factory=dict,
        description="Published scores in percent by section and `Overall`, to print beside.",
    )

    @model_validator(mode="after")
    def _percent(self) -> Self:
        if self.printed and max(self.printed.values()) <= 1:
            raise ValueError("printed: must be in percent, got fractions; write 92.2, not 0.922")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the row is the file's reward as it is."""
        return not self.change and self.oracle is None


class StatisticsSpec(Spec):
    """How sure the numbers are."""

    resamples: int = Field(10_000, ge=100, description="Draws of the bootstrap.")
    seed: int = Field(0, description="Seed of its draws.")


class QuickSpec(Spec):
    """The sample of `--quick`."""

    pairs: int = Field(
        200, ge=4, description="Pairs, in equal shares of sections and of the subsets in them."
    )
    seed: int = Field(0, description="Seed of the choice.")


class EvaluateTrackingSpec(TrackingSpec):
    """Where MLflow keeps the run."""

    experiment: str = Field("cdr-evaluate", description="MLflow experiment.")


class EvaluateReportSpec(PageSpec):
    """The HTML page about a job's rows, in the warehouse's `reports/` and with each MLflow run."""

    pairs_per_section: int = Field(
        3, ge=0, le=50,
        description="Pairs to read per section: the surest wins, and as many of the surest losses.",
    )  # fmt: skip


class EvaluateConfig(Spec):
    """One evaluation: which labelled pairs, which reward or rows of rewards, where to."""

    dataset: DatasetName = Field(description="Name of the benchmark in all tables.")
    warehouse: WarehousePlace
    tables: TablePlaces
    input: PairsInputSpec
    reward: Annotated[RewardSpec, MayBeFile()]
    rows: dict[RowName, RowSpec] = Field(
        default_factory=dict, description="Variants of the reward. Empty: the reward as it is."
    )
    sections: tuple[str, ...] = Field(
        (*SECTIONS, PRIOR_SETS),
        description="Sections there may be; pairs of others are refused. The overall score is the "
        "mean of these (Prior Sets aside), and absent where one is.",
    )
    oracle: dict[str, Domain] = Field(
        default_factory=lambda: {
            CHAT: "chat", CHAT_HARD: "chat", SAFETY: "safety", REASONING: "math_code",
            PRIOR_SETS: "chat",
        },
        description="The right domain by section: for routing.mode `column`, and to audit the "
        "router.",
    )  # fmt: skip
    statistics: StatisticsSpec = StatisticsSpec()
    quick: QuickSpec = QuickSpec()
    run: RunSpec = RunSpec()
    tracking: EvaluateTrackingSpec = EvaluateTrackingSpec()
    report: EvaluateReportSpec = EvaluateReportSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = (*self.sections, *self.sections_in_use())
        # RewardBench's stand in the default, whatever the sections are here.
        problems = [
            *repeated_sections(self.sections),
            *_unknown("oracle", self.oracle, (*known, *SECTIONS, PRIOR_SETS)),
        ]
        for name, row in self.rows.items():
            try:
                self.reward_of(name)
            except ValidationError as error:
                found = list_problems(error, RewardSpec)
                problems += [f"rows.{name}.change.{problem}" for problem in found]
            problems += _unknown(f"rows.{name}.oracle", row.oracle or {}, known)
            problems += _unknown(f"rows.{name}.printed", row.printed, (*known, "Overall"))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def row_names(self) -> list[str]:
        """Name the rows; the reward itself is one where none is given."""
        return list(self.rows) or [self.reward.name]

    def keep_rows(self, names: Sequence[str]) -> Self:
        """Give the config with some of its rows alone, in the config's order.

        Raises:
            ConfigError: it has no such row.
        """
        problems = [f"--rows: no row '{name}'" for name in names if name not in self.rows]
        if problems:
            raise ConfigError(
                problems, fix=f"rows of this config: {', '.join(self.rows) or 'none'}"
            )
        kept = {name: row for name, row in self.rows.items() if name in names}
        return self.model_copy(update={"rows": kept})

    def reward_of(self, name: str) -> RewardSpec:
        """Give a row's reward, which has the row's name.

        Raises:
            ValidationError: the row's changes do not make a reward.
        """
        row = self.rows.get(name)
        if row is None:
            return self.reward
        return change_reward(self.reward, {"name": name, **row.change})

    def sections_in_use(self) -> tuple[str, ...]:
        """Give the sections; one for all pairs where the input has no such column."""
        columns = self.input.columns
        return self.sections if columns.section or columns.subset else (ONE_SECTION,)


def repeated_sections(sections: Sequence[str]) -> list[str]:
    """Name the sections of a config that stand there twice, a problem each."""
    return [
        f"sections: '{name}' is named twice"
        for name in dict.fromkeys(sections)
        if sections.count(name) > 1
    ]


def _unknown(key: str, given: Iterable[str], known: Sequence[str]) -> list[str]:
    listed = ", ".join(dict.fromkeys(known))
    return [
        f"{key}: unknown section {name!r}; known: {listed}" for name in given if name not in known
    ]


def load_evaluate_config(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read an evaluate YAML with everything it names; see `cdr.config_files.load_config`."""
    return load_config(EvaluateConfig, path, overrides)
