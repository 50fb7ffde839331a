"""What a reward is: its models, its terms, how prompts are routed and text becomes token ids.

Frozen models of the YAML in `conf/rewards/`, which a run's config names by file (`cdr.config`).
Every model is pinned: by a commit of the hub, a checksum, or the content of its folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cdr.config_files import Spec, load_config
from cdr.weights import checksum_command, is_uri

Domain = str
Condition = Literal["plain", "conditioned", "unconditional"]
EngineName = Literal["transformers", "vllm", "stub"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_CHECKSUM = re.compile(r"^[0-9a-f]{64}$")


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
        return give_engine(tree)

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


def give_engine(tree: Any) -> Any:
    """Give the `engine` of a mapping with `models` to those that name none themselves."""
    if not isinstance(tree, Mapping) or not isinstance(tree.get("models"), Mapping):
        return tree
    if "engine" not in tree:
        return tree
    models = {
        role: {"engine": tree["engine"], **model} if isinstance(model, Mapping) else model
        for role, model in tree["models"].items()
    }
    return {**tree, "models": models}


def load_reward_config(path: str | Path, overrides: Sequence[str] = ()) -> RewardSpec:
    """Read a reward YAML; see `cdr.config_files.load_config`."""
    return load_config(RewardSpec, path, overrides)
