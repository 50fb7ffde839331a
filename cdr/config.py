"""What a run is asked to do: frozen models of the YAML in `conf/`, checked before Spark starts.

Unknown keys are errors. A run names a reward, which `cdr.reward_config` holds. Where values come
from (files, the environment, `--set`) and how problems are told is the matter of
`cdr.config_files`. Nothing here touches models, tables or the network; `cdr.models` resolves what
this names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cdr.config_files import MayBeFile, Spec, load_config
from cdr.engines.device import DeviceChoice
from cdr.reward_config import EngineName, RewardSpec

# What the configs of all jobs have in common, each key with its one rule.
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]*$")]
WarehousePlace = Annotated[str, Field(description="Folder (or URI) of the tables.")]
TablePlaces = Annotated[
    dict[str, str],
    Field(default_factory=dict, description="Other places per table: a path, or a catalog name."),
]


class ColumnsSpec(Spec):
    """Names of the input's columns. None: the input has no such column."""

    prompt: str = Field("prompt", description="Text, or messages: an array of role and content.")
    completion: str = Field("completion", description="Text; for layout `array` an array of it.")
    completion_b: str = Field("completion_b", description="Second completion of layout `ab`.")
    prompt_id: str | None = Field(None, description="None: derived from the prompt's content.")
    completion_id: str | None = Field(None, description="None: derived from the text.")
    finish_reason: str | None = Field(
        None, description="`length` marks a completion that was cut; None: all ended themselves."
    )
    system: str | None = Field(None, description="System message, where prompt is a string.")
    domain: str | None = Field(None, description="Domain for routing.mode `column`.")
    per_completion: tuple[str, ...] = Field(
        (),
        description="Layout `array`: other arrays of yours with an item per completion, such as "
        "scores. Each candidate's `passthrough` has its own item; of arrays not named, all of it.",
    )

    def mapped(self) -> set[str]:
        """Name the columns that are read for what they mean."""
        return {name for name in self.model_dump(exclude={"per_completion"}).values() if name}


class SourceSpec(Spec):
    """A table to read: a path or a catalog name, in one of the formats."""

    path: str | None = Field(None, description="File or folder; a Delta table's folder.")
    table: str | None = Field(None, description="Catalog name; instead of `path`.")
    format: Literal["delta", "parquet", "json"] = Field("delta", description="json: one per line.")
    version: int | None = Field(None, ge=0, description="Delta version to read. None: the latest.")

    @property
    def place(self) -> str:
        """The path or the catalog name, for messages."""
        return str(self.path or self.table)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        problems = []
        if (self.path is None) == (self.table is None):
            problems.append("path: give exactly one of path and table")
        if self.version is not None and self.format != "delta":
            problems.append("version: only Delta tables have versions")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class InputSpec(SourceSpec):
    """Where prompts and completions come from, and in which shape."""

    layout: Literal["long", "array", "ab", "joined"] = Field(
        "long",
        description="`long`: a row per completion; `array`: a row per prompt with an array of "
        "completions; `ab`: two columns; `joined`: completions here, prompts in `prompts_path`, "
        "both with prompt_id.",
    )
    prompts_path: str | None = Field(None, description="Prompts of layout `joined`.")
    columns: ColumnsSpec = ColumnsSpec()

    @model_validator(mode="after")
    def _joined(self) -> Self:
        problems = []
        if (self.layout == "joined") != (self.prompts_path is not None):
            problems.append("prompts_path: is given exactly when layout is 'joined'")
        if self.layout == "joined" and self.columns.prompt_id is None:
            problems.append("columns.prompt_id: layout 'joined' needs it")
        named = self.columns.per_completion
        if named and self.layout != "array":
            problems.append(
                f"columns.per_completion: is for layout 'array', got layout '{self.layout}'"
            )
        taken = self.columns.mapped() - {self.columns.completion_b}
        problems += [
            f"columns.per_completion: '{name}' is named twice, here or for another key"
            for name in dict.fromkeys(named)
            if name in taken or named.count(name) > 1
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class LengthWindowSpec(Spec):
    """Which candidates are close enough in length to the chosen one to be rejected.

    Both bounds must hold where both are given; lengths are tokens of the first term's model.
    """

    tokens: int | None = Field(None, ge=0, description="|n − n_chosen| at most, in tokens.")
    ratio: float | None = Field(None, ge=1, description="max(n/n_chosen, n_chosen/n) at most.")


class PairSpec(Spec):
    """How a pair is chosen from a prompt's scored candidates."""

    rejected: Literal["random", "lowest", "second_best", "dice"] = Field(
        "random",
        description="`random`: any other eligible candidate in the length window; `lowest`, "
        "`second_best`: the one with that reward; `dice`: chosen and rejected are best and worst "
        "of reward − dice_alpha · characters, never against the reward.",
    )
    length_window: LengthWindowSpec = LengthWindowSpec()
    fallback: Literal["nearest_length", "no_pair"] = Field(
        "nearest_length", description="What to do when the window is empty; always counted."
    )
    dice_alpha: float = Field(0.0, ge=0, description="Reward taken off per character (dice).")
    drop_length_stopped: bool = Field(
        False, description="Leave out candidates whose finish_reason is `length`."
    )
    min_margin: float = Field(
        0.0,
        ge=0,
        description="Least reward difference, in the reward's unit (nats; nats per token for "
        "`mean`), asked of each candidate.",
    )
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of prompts in the `validation` split, by prompt hash."
    )
    seed: int = Field(0, description="Seed of the random choice, per prompt.")

    def key(self) -> str:
        """Hash of everything that decides which pairs come out."""
        return content_hash(self.model_dump(mode="json"))


class JobSpec(Spec):
    """How a job's work is limited and spread; nothing here changes a number."""

    max_hours: float | None = Field(
        None, gt=0, description="Stop in good order after the wave in flight at this age."
    )
    max_rejected_fraction: float = Field(
        0.05, ge=0, le=1, description="Exit code 3 above this share of rejected rows."
    )
    max_failed_fraction: float = Field(
        0.01, ge=0, le=1, description="Exit code 3 above this share of failed rows."
    )
    devices: int | None = Field(
        None, ge=1, description="Devices to keep busy. None: what the cluster announces."
    )
    device: DeviceChoice = Field(
        "auto",
        description="What models run on. `auto`: GPUs; on one machine the CPU where there is none, "
        "while a cluster without GPUs is refused. `gpu`: GPUs only. `cpu`: the CPU, also of a "
        "cluster.",
    )


class RunSpec(JobSpec):
    """How the work is carried out; nothing here changes a number."""

    placement: Literal["auto", "colocated", "sequential"] = Field(
        "colocated",
        description="`colocated`: all scoring models loaded together; `sequential`: one model "
        "through all waves, then the next, for models that only fit a device alone; `auto`: "
        "colocated where they fit a device together.",
    )
    device_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of one device in GiB, for `auto` and to refuse models that cannot fit. "
        "None: `auto` looks it up.",
    )
    wave_tokens: int = Field(
        50_000_000,
        ge=1,
        description="Tokens per wave (one atomic commit): what a killed job loses at most. Aim at "
        "20 to 30 minutes of your cluster.",
    )
    task_tokens: int = Field(
        2_000_000, ge=1, description="Tokens per Spark task; aim at one or two minutes."
    )
    request_tokens: int = Field(
        65_536, ge=256, description="Tokens per request to an engine; the progress grain."
    )
    store_token_logprobs: bool = Field(
        False, description="Keep every token's log-prob in `logprobs` (about 4 bytes each)."
    )


class TrackingSpec(Spec):
    """Where MLflow keeps the run."""

    uri: str | None = Field(
        None,
        description="Tracking URI. None: MLFLOW_TRACKING_URI, else the workspace on Databricks, "
        "else SQLite in a local warehouse. A warehouse behind a URI needs one of the former.",
    )
    experiment: str = Field("cdr-annotate", description="MLflow experiment.")
    enabled: bool = Field(True, description="False: no MLflow run.")
    parent: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{32}$",
        description="MLflow run that this one is a part of, quoted: shown below it. None: none.",
    )


class PageSpec(Spec):
    """The HTML page about a run, in the warehouse's `reports/` and with the MLflow run."""

    enabled: bool = Field(True, description="False: no page.")
    texts: bool = Field(
        True,
        description="Show prompts and completions of a few pairs. False: ids and numbers only, for "
        "sensitive data.",
    )


class ReportSpec(PageSpec):
    """The HTML page about a run, in the warehouse's `reports/` and with the MLflow run."""

    pairs_per_domain: int = Field(
        10, ge=0, le=50, description="Pairs to read per domain, drawn by hash of the prompt."
    )


class AnnotateConfig(Spec):
    """One annotate run: which completions, which reward, which pairs, where to."""

    dataset: DatasetName = Field(description="Name of this set of completions in all tables.")
    warehouse: WarehousePlace
    tables: TablePlaces
    input: InputSpec
    engine: EngineName | None = Field(
        None, description="Takes the place of `reward.engine`, as in `--set engine=vllm`."
    )
    reward: Annotated[RewardSpec, MayBeFile()]
    pairs: PairSpec = PairSpec()
    run: RunSpec = RunSpec()
    tracking: TrackingSpec = TrackingSpec()
    report: ReportSpec = ReportSpec()

    @model_validator(mode="before")
    @classmethod
    def _reward_inherits_engine(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or not isinstance(tree.get("reward"), Mapping):
            return tree
        if tree.get("engine") is None:
            return tree
        return {**tree, "reward": {**tree["reward"], "engine": tree["engine"]}}

    @model_validator(mode="after")
    def _column_routing(self) -> Self:
        if self.reward.routing.mode == "column" and self.input.columns.domain is None:
            raise ValueError(
                "input.columns.domain: reward.routing.mode 'column' needs the domain's column"
            )
        return self


def load_annotate_config(path: str | Path, overrides: Sequence[str] = ()) -> AnnotateConfig:
    """Read an annotate YAML with everything it names.

    Args:
        path: the YAML file.
        overrides: `a.b=c` items, strongest last.

    Raises:
        ConfigError: with every problem found.
    """
    return load_config(AnnotateConfig, path, overrides)


def trial_name(dataset: str, rows: int | None, kind: Literal["limit", "quick"] = "limit") -> str:
    """Name a dataset in the tables: a trial on some of its rows never replaces those of the whole.

    Args:
        dataset: its name in the config.
        rows: prompts, pairs or questions of the trial; None for all there are.
        kind: how they were chosen: the first ones, or a stratified sample.
    """
    return dataset if rows is None else f"{dataset}.{kind}-{rows}"


TRIAL = r"\.(limit|quick)-\d+"
"""Pattern of what `trial_name` adds."""


def content_hash(value: object) -> str:
    """Hash a JSON-able value: sha256 hex of its canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
