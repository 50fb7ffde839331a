"""From the models a config names to what engines load: pinned, found, and keyed by content.

The model key is the first part of every log-prob's key. It hashes what decides the numbers (the
weights, the adapter, quantisation, dtype, head dtype, engine, the engine's `extra`) and nothing
else: where the folder lies, how large a batch is, or how long a row may be do not change it. Nor
does the number of GPUs a model is spread over: it changes the order of sums, as another batch or
GPU does, and a store that is scored on both is no worse. Runs on the driver; loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from cdr.config import content_hash
from cdr.engines.base import EngineSpec
from cdr.engines.hardware import resolve_dtype
from cdr.engines.vllm_setup import resolve_head_dtype
from cdr.errors import ConfigError, ModelError
from cdr.reward_config import ApiSpec, ModelSpec, RewardSpec
from cdr.weights import (
    Source,
    fetch_small_files,
    hash_files,
    hash_source,
    is_copied,
    list_names,
    require_safetensors,
    wrong_checksum,
)

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")
_STUB_VOCABULARY = 1 << 20
_SHOWN_LABELS = 8


@dataclass(frozen=True)
class ResolvedModel:
    """A model of a reward, ready to be loaded by an engine.

    Args:
        role: key in the reward's `models`.
        spec: what the config said.
        engine_spec: what hosts load; its `name` is the model key.
        vocab_size: rows of the embedding; token ids must be below it.
        config_folder: local folder with config.json and tokenizer files; empty for an API.
    """

    role: str
    spec: ModelSpec
    engine_spec: EngineSpec
    vocab_size: int
    config_folder: str

    @property
    def model_key(self) -> str:
        """Hash of all that decides this model's log-probs; 16 hex digits."""
        return self.engine_spec.name

    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer's files: they decide token ids, not log-probs of ids.

        Empty for a model behind an API, which is asked in text.
        """
        if self.spec.engine == "api":
            return ""
        return hash_files(Path(self.config_folder), _TOKENIZER_FILES)


def hash_text_files(path: str) -> str:
    """Hash what decides how a model's text becomes token ids: its tokenizer and chat template.

    Args:
        path: the model's folder or URI.

    Raises:
        ModelError: it cannot be had.
    """
    return hash_files(fetch_small_files(path, None), (*_TOKENIZER_FILES, "chat_template*"))


def resolve_models(reward: RewardSpec, *, only_used: bool = True) -> dict[str, ResolvedModel]:
    """Find every model of a reward and compute its key.

    Args:
        reward: the reward's configuration.
        only_used: leave out models that neither a term nor the router uses.

    Returns:
        Models by role.

    Raises:
        ConfigError: with every model that is missing or unusable.
    """
    used = {term.model for term in reward.resolved_terms()}
    if reward.routing.mode == "adaptive":
        used.add(reward.routing.model)
    if reward.encoding.template == "strong":
        used.add("strong")
    problems: list[str] = []
    found: dict[str, ResolvedModel] = {}
    find = cache(_find)  # models of a reward often share a folder, and its hash takes a while
    for role, spec in reward.models.items():
        if only_used and role not in used:
            continue
        try:
            found[role] = _resolve(role, spec, find)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(
            problems,
            where=f"reward '{reward.name}'",
            fix="check the paths; the demo's model is made by python jobs/make_demo_model.py, its "
            "classifier by make kinds-demo",
        )
    return found


def _resolve(role: str, spec: ModelSpec, find: Callable[[Source], _Found]) -> ResolvedModel:
    where = f"models.{role}"

    def find_named(source: Source) -> _Found:
        try:
            return find(source)
        except ModelError as error:
            key = f"{where}.adapter" if source.is_adapter else f"{where}.path"
            raise ConfigError([f"{key}: {error.what}; {error.fix}"]) from error

    if spec.engine == "stub":
        # A stub has no weights: it borrows the folder's tokenizer, which stands for them, and any
        # text as its adapter makes another model of it.
        folder = Path(spec.path)
        weights = hash_files(folder, _TOKENIZER_FILES) if folder.is_dir() else spec.path
        identity: dict[str, object] = {
            "engine": "stub", "weights": weights, "adapter": spec.adapter, "extra": spec.extra
        }  # fmt: skip
        return ResolvedModel(
            role,
            spec,
            _engine_spec(spec, identity, "float32", "float32"),
            _STUB_VOCABULARY,
            spec.path,
        )
    if spec.api is not None:
        return _resolve_api(role, spec, spec.api)
    model = find_named(Source(spec.path, spec.revision, spec.checksum, has_code=spec.custom_code))
    dtype = resolve_dtype(spec.dtype)
    head_dtype = resolve_head_dtype(spec.head_dtype, engine=spec.engine, dtype=dtype)
    identity = {
        "engine": spec.engine,
        "weights": model.identity,
        "dtype": dtype,
        "head_dtype": head_dtype,
    }
    if spec.quantization is not None:
        identity["quantization"] = spec.quantization
    if spec.extra:
        # vLLM takes arguments that decide numbers (the dtype of its cache) and others; which is
        # which changes with its version.
        identity["extra"] = spec.extra
    if spec.engine == "classifier":
        check_classifier(spec, model.folder / "config.json", where)
        identity |= {"output": spec.output, "custom_code": spec.custom_code}
    adapter: _Found | None = None
    if spec.adapter is not None:
        source = Source(spec.adapter, spec.adapter_revision, spec.adapter_checksum, is_adapter=True)
        adapter = find_named(source)
        identity["adapter"] = adapter.identity
    engine_spec = replace(
        _engine_spec(spec, identity, dtype, head_dtype),
        checksum=model.checksum,
        adapter_path=spec.adapter,
        adapter_revision=spec.adapter_revision,
        adapter_checksum=adapter.checksum if adapter else None,
    )
    vocab_size = _vocab_size(model.folder / "config.json", where)
    return ResolvedModel(role, spec, engine_spec, vocab_size, str(model.folder))


def _resolve_api(role: str, spec: ModelSpec, api: ApiSpec) -> ResolvedModel:
    """Key a model behind an API by all that is known of it: its names, and what it is asked for."""
    identity: dict[str, object] = {
        "engine": "api",
        "model": spec.path,
        "base_url": api.base_url,
        "max_tokens": api.max_tokens,
    }
    if spec.extra:
        identity["extra"] = spec.extra
    return ResolvedModel(role, spec, _engine_spec(spec, identity, "float32", "float32"), 0, "")


def _engine_spec(
    spec: ModelSpec, identity: Mapping[str, object], dtype: str, head_dtype: str
) -> EngineSpec:
    return EngineSpec(
        name=content_hash(identity)[:16],
        engine=spec.engine,
        path=spec.path,
        revision=spec.revision,
        dtype=dtype,
        head_dtype=head_dtype,
        max_length=spec.max_length,
        batch_tokens=spec.batch_tokens,
        extra=json.dumps(spec.extra, sort_keys=True),
        quantization=spec.quantization,
        memory_fraction=spec.memory_fraction,
        tensor_parallel=spec.tensor_parallel,
        output=spec.output or "",
        custom_code=spec.custom_code,
    )


@dataclass(frozen=True)
class _Found:
    """A model or an adapter, its weights wherever they are.

    Args:
        folder: local folder with its small files at least.
        identity: stands for the weights in the model key: hub id and commit, or content hash.
        checksum: content hash that the files of every node must have; None for a hub id without.
    """

    folder: Path
    identity: str
    checksum: str | None


def _find(source: Source) -> _Found:
    """Find a model or an adapter; weights behind a URI are not read.

    Raises:
        ModelError: it is missing or unusable.
    """
    # Somebody waits for the plan, and a hub out of reach is a problem of every model of it.
    folder = fetch_small_files(source.path, source.revision, is_patient=False)
    if source.revision is not None:
        return _Found(folder, f"{source.path}@{source.revision}", source.checksum)
    require_safetensors(list_names(source.path), source)
    # Where the config says what a remote folder holds, only the nodes check: it is their copy.
    content = source.checksum if is_copied(source.path) else None
    content = content or hash_source(source)
    if source.checksum not in (None, content):
        raise wrong_checksum(source, content, source.path)
    return _Found(folder, content, content)


def check_classifier(spec: ModelSpec, config_file: Path, where: str) -> None:
    """Check on the driver that a classifier is one, and that one of its outputs is meant.

    Args:
        spec: a model of engine `classifier`.
        config_file: its config.json.
        where: config key of the model.

    Raises:
        ConfigError: it is another kind of model, brings code that is not allowed, or has several
            outputs and none is named.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    own_code = config.get("auto_map", {}).get("AutoModelForSequenceClassification")
    if own_code is not None and not spec.custom_code:
        # transformers would load a class of its own in its place, with a random head.
        raise ConfigError(
            [f"{where}.custom_code: the model brings code of its own ({own_code}), got false"],
            fix=f"read the code of {spec.path}; if you trust it, set custom_code to true and pin "
            "the model",
        )
    if spec.custom_code and own_code is None:
        raise ConfigError([f"{where}.custom_code: the model brings no code for a classifier"])
    if spec.custom_code and "--" in own_code:
        raise ConfigError(
            [f"{where}.custom_code: the code lies in another repository ({own_code})"],
            fix="only code that is pinned with the weights is run: copy both into one folder",
        )
    architectures = config.get("architectures") or []
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    if not is_classifier and not spec.custom_code:
        raise ConfigError(
            [f"{where}.path: must be a sequence classifier, is {', '.join(architectures) or '?'}"],
            fix="a reward model's config.json names ...ForSequenceClassification",
        )
    # transformers leaves its default of two labels out of the file.
    labels = list(config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).values())
    if spec.output is None and len(labels) > 1:
        shown = ", ".join(labels[:_SHOWN_LABELS]) + (", ..." if len(labels) > _SHOWN_LABELS else "")
        raise ConfigError(
            [f"{where}.output: is required for a classifier of {len(labels)} outputs ({shown})"],
            fix="name the output that is the reward"
            + (", a field of what the model's code returns" if spec.custom_code else ""),
        )
    # Of custom code it is a field, which no file lists.
    if spec.output is not None and spec.output not in labels and not spec.custom_code:
        raise ConfigError(
            [f"{where}.output: must be one of {', '.join(labels)}, got '{spec.output}'"]
        )


def _vocab_size(config_file: Path, where: str) -> int:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):
        raise ConfigError([f"{where}.path: config.json has no vocab_size"])
    return size
