"""What a run is asked to do: frozen models of the YAML in `conf/`, checked before Spark starts.

Unknown keys are errors. Where values come from (files, the environment, `--set`) and how problems
are told is the matter of `cdr.config_files`. Nothing here touches models, tables or the network;
`cdr.models` resolves what this names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cdr.config_files import MayBeFile, load_config
from cdr.weights import checksum_command, is_uri

Domain = str
Condition = Literal["plain", "conditioned", "unconditional"]
EngineName = Literal["transformers", "vllm", "stub"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_CHECKSUM = re.compile(r"^[0-9a-f]{64}$")


class Spec(BaseModel):
    """A part of a config: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(Spec):
    """A model and how to run it."""

    path: str = Field(
        description="Folder (safetensors and tokenizer), hub id, or URI (`s3://bucket/prefix`)."
    )
    revision: str | None = Field(
        None, description="Commit hash of the hub id: 40 hex digits, quoted. None for a folder."
    )
    checksum: str | None = Field(
        None,
        description="Content hash of the weights, printed by `python -m cdr.weights checksum "
        "PATH`; every copy is compared with it. Required for a URI.",
    )
    adapter: str | None = Field(None, description="LoRA adapter: folder, hub id or URI.")
    adapter_revision: str | None = Field(None, description="Commit hash of the adapter's hub id.")
    adapter_checksum: str | None = Field(None, description="As `checksum`, of the adapter.")
    tuned_from: str | None = Field(
        None,
        description="Hub id or name of the model this one was preference-tuned from. The method "
        "works best when that is the weak model; other pairs get a warning.",
    )
    engine: EngineName = Field(
        "transformers",
        description="What runs the model. None given: the reward's `engine`. `stub` makes numbers "
        "from hashes, for tests of scale.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="`auto`: bfloat16 where the device computes it fast, else float32."
    )
    head_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the LM head and the log-softmax. `auto`: float32, unless the vLLM "
        "installed where the run is planned (before 0.26) only computes it in `dtype`.",
    )
    max_length: int = Field(
        2048, ge=16, description="Tokens of prompt and completion together; longer is rejected."
    )
    batch_tokens: int = Field(4096, ge=64, description="Tokens per forward at most.")
    quantization: str | None = Field(
        None,
        description="How weights are quantised, in vLLM's words (`fp8`, `awq`, ...); vllm only. "
        "None: as the weights say.",
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of each device's memory the engine may take. None: what the placement "
        "leaves it.",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="GPUs over which the weights are split, vllm only; a task needs as many.",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments for the engine, passed as they are."
    )

    def is_hub_id(self) -> bool:
        """Tell a hub id (`owner/name`) from a folder."""
        return is_hub_id(self.path)

    @model_validator(mode="after")
    def _only_with_vllm(self) -> Self:
        if self.engine == "vllm":
            return self
        given = {
            "quantization": self.quantization is not None,
            "memory_fraction": self.memory_fraction is not None,
            "tensor_parallel": self.tensor_parallel != 1,
        }
        problems = [
            f"{key}: only engine 'vllm' has it, got engine '{self.engine}'"
            for key, is_given in given.items()
            if is_given
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.engine == "stub":
            return self
        problems = []
        for prefix, path, revision, checksum in (
            ("", self.path, self.revision, self.checksum),
            ("adapter_", self.adapter, self.adapter_revision, self.adapter_checksum),
        ):
            kind = f"{prefix}revision"
            if path is None:
                for name, value in ((kind, revision), (f"{prefix}checksum", checksum)):
                    if value is not None:
                        problems.append(f"{name}: is given, but adapter is not")
                continue
            if checksum is not None and not _CHECKSUM.match(checksum):
                problems.append(f"{prefix}checksum: must be 64 hex digits, got '{checksum}'")
            if checksum is None and is_uri(path):
                problems.append(
                    f"{prefix}checksum: is required for the URI '{path}'; print it with: "
                    f"{checksum_command(path)}"
                )
            if is_hub_id(path):
                if revision is None or not _COMMIT.match(revision):
                    problems.append(
                        f"{kind}: must be a 40-digit commit hash for the hub id '{path}', "
                        f"got {revision!r}; an unpinned model would change its scores in silence"
                    )
            elif revision is not None:
                problems.append(f"{kind}: only a hub id has one, '{path}' is a folder")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def is_hub_id(path: str) -> bool:
    """Tell whether `path` reads as `owner/name` and no such folder is here."""
    return bool(_HUB_ID.match(path)) and not Path(path).is_dir()


class TermSpec(Spec):
    """One weighted log-prob of a reward."""

    model: str = Field(description="Key in `models`.")
    condition: Condition = Field(
        "conditioned",
        description="`plain`: log p(y|x); `conditioned`: log p(y|T(x)); `unconditional`: log p(y).",
    )
    weight: float = Field(description="Factor of the log-prob in the sum; not 0.")


class RoutingSpec(Spec):
    """How each prompt gets its domain."""

    mode: Literal["adaptive", "column", "fixed", "none"] = Field(
        "adaptive",
        description="`adaptive`: the router model decides; `column`: the input's `domain` column; "
        "`fixed`: `domain` for all; `none`: no conditioning at all.",
    )
    model: str = Field("router", description="Key in `models` of the router (adaptive).")
    domain: Domain | None = Field(None, description="The domain of `fixed`.")
    domains: tuple[Domain, ...] | None = Field(
        None, description="Domains the router may choose. None: those the pack opens to it."
    )
    threshold: float = Field(
        0.0, ge=0, le=1, description="Confidence below which `fallback` is taken."
    )
    fallback: Domain = Field("chat", description="Domain when the router is not sure.")
    calibrate: bool = Field(
        False, description="Subtract the labels' log-probs after an empty prompt (small routers)."
    )

    @model_validator(mode="after")
    def _fixed_has_domain(self) -> Self:
        if (self.mode == "fixed") != (self.domain is not None):
            raise ValueError("domain: is set exactly when mode is 'fixed'")
        return self


class EncodingSpec(Spec):
    """How messages become token ids."""

    template: str = Field(
        "strong",
        description="Chat template: `strong` (the strong model's for all), `own` (each its own), "
        "`plain` (for base models), or a Jinja file.",
    )
    special_tokens_in_text: Literal["reject", "as_text"] = Field(
        "reject",
        description="Text that holds a special token's string: refuse it, or encode "
        "it as ordinary text.",
    )
    score_end_of_turn: bool = Field(
        True, description="Score the end-of-turn token of completions that ended by themselves."
    )
    drop_exemplar_when_too_long: bool = Field(
        False,
        description="Leave the exemplar out for prompts that do not fit with it (all "
        "candidates and models alike) before rejecting.",
    )


_FORMS: dict[str, tuple[tuple[str, Condition, float], ...]] = {
    # arXiv 2411.02481: eq. 8, eq. 10, appendix B.2.
    "density_ratio": (("strong", "conditioned", 1.0), ("weak", "conditioned", -1.0)),
    "prompt_delta": (("strong", "conditioned", 1.0), ("strong", "plain", -1.0)),
    "pmi": (
        ("strong", "conditioned", 1.0),
        ("strong", "unconditional", -1.0),
        ("weak", "conditioned", -1.0),
        ("weak", "unconditional", 1.0),
    ),
}


class RewardSpec(Spec):
    """A reward: a weighted sum of log-prob terms, and all that decides its numbers."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._\-]*$", description="Name people call it by.")
    description: str = Field("", description="What it is for.")
    engine: EngineName = Field(
        "transformers", description="Engine of every model that names none itself."
    )
    models: dict[str, ModelSpec] = Field(description="Models by role: strong, weak, router, ...")
    form: Literal["density_ratio", "prompt_delta", "pmi", "custom"] = Field(
        "density_ratio", description="Which terms; `custom` takes them from `terms`."
    )
    terms: tuple[TermSpec, ...] = Field((), description="The terms of a `custom` reward.")
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="Sum of token log-probs, or mean per token of that model's own count."
    )
    prompt_pack: str | None = Field(
        None, description="Prompt pack file. Needed unless routing.mode is `none`."
    )
    routing: RoutingSpec = RoutingSpec()
    encoding: EncodingSpec = EncodingSpec()
    seed: int = Field(0, description="Seed of the choice of instruction and exemplar.")

    @model_validator(mode="before")
    @classmethod
    def _models_inherit_engine(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or not isinstance(tree.get("models"), Mapping):
            return tree
        if "engine" not in tree:
            return tree
        models = {
            role: {"engine": tree["engine"], **model} if isinstance(model, Mapping) else model
            for role, model in tree["models"].items()
        }
        return {**tree, "models": models}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if (self.form == "custom") != bool(self.terms):
            problems.append("terms: are given exactly when form is 'custom'")
        for term in self.resolved_terms():
            if term.model not in self.models:
                problems.append(
                    f"models: form '{self.form}' needs a model '{term.model}', "
                    f"got {sorted(self.models)}"
                )
            if term.weight == 0:
                problems.append(f"terms: weight of {term.model}/{term.condition} must not be 0")
        names = [(term.model, term.condition) for term in self.resolved_terms()]
        if len(set(names)) != len(names):
            problems.append("terms: each (model, condition) may stand once; add up the weights")
        if self.routing.mode != "none" and self.prompt_pack is None:
            problems.append(f"prompt_pack: routing.mode '{self.routing.mode}' needs one")
        if self.routing.mode == "adaptive" and self.routing.model not in self.models:
            problems.append(
                f"models: routing.mode 'adaptive' needs a model '{self.routing.model}', "
                f"got {sorted(self.models)}"
            )
        if self.encoding.template == "strong" and "strong" not in self.models:
            problems.append("encoding.template: 'strong' needs a model 'strong'")
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def resolved_terms(self) -> tuple[TermSpec, ...]:
        """Give the terms of the form, in a fixed order."""
        if self.form == "custom":
            return self.terms
        return tuple(
            TermSpec(model=model, condition=condition, weight=weight)
            for model, condition, weight in _FORMS[self.form]
        )

    def warnings(self) -> list[str]:
        """Say what is allowed but unlikely to work."""
        found = []
        strong, weak = self.models.get("strong"), self.models.get("weak")
        if (
            {"strong", "weak"} <= {term.model for term in self.resolved_terms()}
            and strong is not None
            and weak is not None
            and strong.tuned_from not in ("weak", weak.path)
        ):
            found.append(
                f"reward '{self.name}': strong is not known to be preference-tuned from weak "
                "(models.strong.tuned_from). Such pairs can be near chance: check the pair on "
                "labelled pairs before you annotate with it."
            )
        return found


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
        None, description="Tracking URI. None: MLFLOW_TRACKING_URI, else SQLite in the warehouse."
    )
    experiment: str = Field("cdr-annotate", description="MLflow experiment.")
    enabled: bool = Field(True, description="False: no MLflow run.")


class ReportSpec(Spec):
    """The HTML page about a run, in the warehouse's `reports/` and with the MLflow run."""

    enabled: bool = Field(True, description="False: no page.")
    texts: bool = Field(
        True,
        description="Show prompts and completions of a few pairs. False: ids and numbers only, for "
        "sensitive data.",
    )
    pairs_per_domain: int = Field(
        10, ge=0, le=50, description="Pairs to read per domain, drawn by hash of the prompt."
    )


class AnnotateConfig(Spec):
    """One annotate run: which completions, which reward, which pairs, where to."""

    dataset: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]*$",
        description="Name of this set of completions in all tables.",
    )
    warehouse: str = Field(description="Folder (or URI) of the tables.")
    tables: dict[str, str] = Field(
        default_factory=dict, description="Other places per table: a path, or a catalog name."
    )
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


def load_reward_config(path: str | Path, overrides: Sequence[str] = ()) -> RewardSpec:
    """Read a reward YAML; see `load_annotate_config`."""
    return load_config(RewardSpec, path, overrides)


def content_hash(value: object) -> str:
    """Hash a JSON-able value: sha256 hex of its canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
