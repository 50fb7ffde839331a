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
Condition = Literal["plain", "conditioned", "unconditional", "compared"]
EngineName = Literal["transformers", "vllm", "classifier", "api", "stub"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_CHECKSUM = re.compile(r"^[0-9a-f]{64}$")
# Keys of a model that is loaded here; one behind an API has none of them.
_OF_LOADED_MODELS = (
    "revision", "checksum", "adapter", "adapter_revision", "adapter_checksum", "tuned_from",
    "dtype", "head_dtype", "max_length", "batch_tokens",
)  # fmt: skip
_OF_REQUESTS = {"messages", "model", "stream"}
"""Of a request to an endpoint: those that a judge fills in, and the shape of the answer."""


class ApiSpec(Spec):
    """An OpenAI-compatible endpoint (`/chat/completions`), and how hard it may be asked."""

    base_url: str = Field(pattern=r"^https?://", description="Such as `https://api.openai.com/v1`.")
    api_key_variable: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the key, on every node. The key is written nowhere.",
    )
    max_tokens: int = Field(16, ge=1, description="Tokens of an answer at most; a letter is asked.")
    concurrency: int = Field(8, ge=1, description="Requests at a time, over all tasks.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Requests begun per minute at most, over all tasks. None: no limit."
    )
    wave_questions: int = Field(
        500, ge=1, description="Questions per commit: what a killed run has to pay for again."
    )
    timeout_s: float = Field(60, gt=0, description="Seconds to wait for an answer.")
    retries: int = Field(
        5, ge=0, description="Further tries of a request that is refused for now, or times out."
    )
    prompt_price: float | None = Field(
        None, ge=0, description="USD per million tokens read. None: cost is not known."
    )
    answer_price: float | None = Field(None, ge=0, description="USD per million tokens written.")

    @model_validator(mode="after")
    def _both_prices(self) -> Self:
        if (self.prompt_price is None) != (self.answer_price is None):
            missing = "prompt_price" if self.prompt_price is None else "answer_price"
            raise ValueError(f"{missing}: is required beside the other price; 0 where it is free")
        return self


class ModelSpec(Spec):
    """A model and how to run it."""

    path: str = Field(
        description="Folder (safetensors and tokenizer), hub id, or URI (`s3://bucket/prefix`); of "
        "engine `api` the endpoint's name of the model."
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
        description="What runs the model. None given: the reward's `engine`. `classifier`: a "
        "trained reward model, read with transformers. `api`: an endpoint, for judges. `stub` "
        "makes numbers from hashes, for tests of scale.",
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
    output: str | None = Field(
        None,
        description="Which output of a classifier is the reward: a label of its config, or with "
        "`custom_code` a field of its result (`score`). None: its only one.",
    )
    custom_code: bool = Field(
        False,
        description="Run the Python code that comes with a classifier, on every node, with all "
        "rights of the job. Read it before; only for a pinned `revision` or `checksum`.",
    )
    api: ApiSpec | None = Field(None, description="The endpoint of engine `api`.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments for the engine, passed as they are. Of engine `api` fields "
        "of the request's body; null takes one of ours away (`max_tokens`, `temperature`).",
    )

    def is_hub_id(self) -> bool:
        """Tell a hub id (`owner/name`) from a folder."""
        return is_hub_id(self.path)

    @model_validator(mode="after")
    def _engine_has_it(self) -> Self:
        given = {
            "quantization": (self.quantization is not None, "vllm"),
            "memory_fraction": (self.memory_fraction is not None, "vllm"),
            "tensor_parallel": (self.tensor_parallel != 1, "vllm"),
            "output": (self.output is not None, "classifier"),
            "custom_code": (self.custom_code, "classifier"),
            "api": (self.api is not None, "api"),
        }
        problems = [
            f"{key}: only engine '{engine}' has it, got engine '{self.engine}'"
            for key, (is_given, engine) in given.items()
            if is_given and self.engine != engine
        ]
        if self.engine == "api" and self.api is None:
            problems.append("api: engine 'api' needs it")
        if self.engine == "classifier" and self.adapter is not None:
            problems.append("adapter: engine 'classifier' takes none; merge it into the weights")
        if self.custom_code and self.revision is None and self.checksum is None:
            problems.append(
                "custom_code: needs pinned code: the revision of a hub id, or the checksum that "
                f"this prints: {checksum_command(self.path)} --custom-code"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _endpoint_has_it(self) -> Self:
        if self.engine != "api":
            return self
        problems = [
            f"{key}: means nothing to an endpoint; leave it out for engine 'api'"
            for key in _OF_LOADED_MODELS
            # By value: a config that was written out whole has the defaults too.
            if getattr(self, key) != type(self).model_fields[key].default
        ]
        problems += [
            f"extra: '{key}' of a request is not the config's to set"
            for key in sorted(_OF_REQUESTS & self.extra.keys())
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.engine in ("stub", "api"):
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
                    f"{checksum_command(path)}{' --custom-code' * self.custom_code}"
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
        description="`plain`: log p(y|x); `conditioned`: log p(y|T(x)); `unconditional`: log p(y). "
        "`compared` is that of form `judge`: log-odds that the model names y the better answer.",
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
    # A trained reward model: its score is the one term.
    "classifier": (("classifier", "conditioned", 1.0),),
    # A model that is shown two answers: the strong one as generative judge, or one behind an API.
    "judge": (("judge", "compared", 1.0),),
}


class RewardSpec(Spec):
    """A reward: a weighted sum of log-prob terms, and all that decides its numbers."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._\-]*$", description="Name people call it by.")
    description: str = Field("", description="What it is for.")
    engine: EngineName = Field(
        "transformers", description="Engine of every model that names none itself."
    )
    models: dict[str, ModelSpec] = Field(description="Models by role: strong, weak, router, ...")
    form: Literal["density_ratio", "prompt_delta", "pmi", "classifier", "judge", "custom"] = Field(
        "density_ratio",
        description="Which terms; `custom` takes them from `terms`. `classifier`: the score of the "
        "trained reward model `models.classifier`. `judge`: `models.judge` compares every two "
        "candidates in both orders.",
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
        problems += self._kind_problems()
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    @property
    def is_judge(self) -> bool:
        """Whether candidates are compared with each other, and none has a reward by itself."""
        return self.form == "judge"

    @property
    def is_asked_by_api(self) -> bool:
        """Whether the reward is a judge behind an API, which gives verdicts and no log-probs."""
        return self.judge_api is not None

    @property
    def judge_api(self) -> ApiSpec | None:
        """The endpoint of a judge behind an API; None for any other reward."""
        return self.models["judge"].api if self.is_judge else None

    @property
    def is_per_token(self) -> bool:
        """Whether the reward is a sum over a completion's tokens."""
        engines = {self.models[term.model].engine for term in self.resolved_terms()}
        return not self.is_judge and "classifier" not in engines

    def _kind_problems(self) -> list[str]:
        classifiers = {role for role, model in self.models.items() if model.engine == "classifier"}
        asked = {term.model for term in self.resolved_terms()}
        problems = []
        if self.form == "classifier" and "classifier" in self.models and not classifiers & asked:
            problems.append("models.classifier.engine: must be 'classifier' for form 'classifier'")
        if self.reduction == "mean" and asked & classifiers:
            problems.append("reduction: a classifier's score has no mean per token; set 'sum'")
        if self.is_judge:
            if self.reduction == "mean":
                problems.append("reduction: a judge's letter has no mean per token; set 'sum'")
            if asked & classifiers:
                problems.append("models.judge.engine: a classifier cannot judge; name an LLM")
        elif any(term.condition == "compared" for term in self.resolved_terms()):
            problems.append("terms: the condition 'compared' is that of form 'judge' alone")
        problems += [
            f"models.{role}.engine: 'api' gives no log-probs; only a judge is asked so"
            for role, model in self.models.items()
            if model.engine == "api" and not (self.is_judge and role == "judge")
        ]
        if self.routing.mode == "adaptive" and self.routing.model in classifiers:
            problems.append(f"routing.model: '{self.routing.model}' is a classifier; name an LLM")
        return problems

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
        found += [
            f"reward '{self.name}': models.{role} runs the Python code that comes with "
            f"{model.path} ({model.revision or model.checksum}), as custom_code says."
            for role, model in self.models.items()
            if model.custom_code
        ]
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


def change_reward(reward: RewardSpec, change: Mapping[str, Any]) -> RewardSpec:
    """Give a reward with other values.

    Args:
        reward: the reward.
        change: keys with other values, nested as in a reward's file; None takes a value away.

    Raises:
        ValidationError: the changes do not make a reward.
    """
    return RewardSpec.model_validate(
        _merge(reward.model_dump(mode="json", exclude_unset=True), change)
    )


def _merge(tree: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes into a tree; mappings are merged, anything else takes the old value's place."""
    merged = dict(tree)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged
