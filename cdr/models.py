"""From the models a config names to what engines load: pinned, found, and keyed by content.

The model key is the first part of every log-prob's key. It hashes what decides the numbers (the
weights, the adapter, quantisation, dtype, head dtype, engine) and nothing else: where the folder
lies, how large a batch is, or how long a row may be do not change it. Nor does the number of GPUs a
model is spread over: it changes the order of sums, as another batch or GPU does, and a store that
is scored on both is no worse. Runs on the driver; loads no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cdr.config import ModelSpec, RewardSpec, content_hash, is_hub_id
from cdr.engines.base import EngineSpec
from cdr.engines.hardware import resolve_dtype
from cdr.engines.vllm_setup import resolve_head_dtype
from cdr.errors import ConfigError

_WEIGHT_FILES = ("*.safetensors", "config.json")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_STUB_VOCABULARY = 1 << 20


@dataclass(frozen=True)
class ResolvedModel:
    """A model of a reward, ready to be loaded by an engine.

    Args:
        role: key in the reward's `models`.
        spec: what the config said.
        engine_spec: what hosts load; its `name` is the model key.
        vocab_size: rows of the embedding; token ids must be below it.
        config_folder: local folder with config.json and tokenizer files.
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
        """Hash of the tokenizer's files: they decide token ids, not log-probs of ids."""
        return hash_files(Path(self.config_folder), _TOKENIZER_FILES)


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
    for role, spec in reward.models.items():
        if only_used and role not in used:
            continue
        try:
            found[role] = _resolve(role, spec)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(
            problems,
            where=f"reward '{reward.name}'",
            fix="check the paths; the demo's model is made by: python jobs/make_demo_model.py",
        )
    return found


def _resolve(role: str, spec: ModelSpec) -> ResolvedModel:
    where = f"models.{role}"
    if spec.engine == "stub":
        # A stub has no weights: it borrows the folder's tokenizer, and any text as its adapter
        # makes another model of it.
        identity: dict[str, object] = {
            "engine": "stub", "weights": spec.path, "adapter": spec.adapter, "extra": spec.extra
        }  # fmt: skip
        return ResolvedModel(
            role,
            spec,
            _engine_spec(spec, identity, "float32", "float32"),
            _STUB_VOCABULARY,
            spec.path,
        )
    folder = _local_folder(spec.path, spec.revision, f"{where}.path")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConfigError([f"{where}.path: no config.json in '{spec.path}'; is it a model folder?"])
    if not is_hub_id(spec.path) and not list(folder.glob("*.safetensors")):
        raise ConfigError(
            [f"{where}.path: no *.safetensors in '{spec.path}'; other weight files are not loaded"]
        )
    dtype = resolve_dtype(spec.dtype)
    head_dtype = resolve_head_dtype(spec.head_dtype, engine=spec.engine, dtype=dtype)
    identity = {
        "engine": spec.engine,
        "weights": f"{spec.path}@{spec.revision}"
        if is_hub_id(spec.path)
        else hash_files(folder, _WEIGHT_FILES),
        "dtype": dtype,
        "head_dtype": head_dtype,
    }
    if spec.quantization is not None:
        identity["quantization"] = spec.quantization
    if spec.extra:
        # vLLM takes arguments that decide numbers (the dtype of its cache) and others; which is
        # which changes with its version.
        identity["extra"] = spec.extra
    adapter: Path | None = None
    if spec.adapter is not None:
        adapter = _local_folder(spec.adapter, spec.adapter_revision, f"{where}.adapter")
        missing = [name for name in _ADAPTER_FILES if not (adapter / name).is_file()]
        if missing and not is_hub_id(spec.adapter):
            raise ConfigError([f"{where}.adapter: '{spec.adapter}' lacks {', '.join(missing)}"])
        identity["adapter"] = (
            f"{spec.adapter}@{spec.adapter_revision}"
            if is_hub_id(spec.adapter)
            else hash_files(adapter, _ADAPTER_FILES)
        )
    vocab_size = _vocab_size(config_file, where)
    return ResolvedModel(
        role,
        spec,
        _engine_spec(spec, identity, dtype, head_dtype, adapter),
        vocab_size,
        str(folder),
    )


def _engine_spec(
    spec: ModelSpec,
    identity: Mapping[str, object],
    dtype: str,
    head_dtype: str,
    adapter: Path | None = None,
) -> EngineSpec:
    return EngineSpec(
        name=content_hash(identity)[:16],
        engine=spec.engine,
        path=spec.path,
        revision=spec.revision,
        adapter_path=str(adapter) if adapter else None,
        dtype=dtype,
        head_dtype=head_dtype,
        max_length=spec.max_length,
        batch_tokens=spec.batch_tokens,
        extra=json.dumps(spec.extra, sort_keys=True),
        quantization=spec.quantization,
        memory_fraction=spec.memory_fraction,
        tensor_parallel=spec.tensor_parallel,
    )


def _local_folder(path: str, revision: str | None, where: str) -> Path:
    """Give a folder with everything but the weights of a hub id, or the folder itself."""
    if not is_hub_id(path):
        if not Path(path).is_dir():
            raise ConfigError([f"{where}: no such folder '{path}'"])
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path, revision=revision, ignore_patterns=["*.safetensors", "*.bin"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [
                f"{where}: '{path}' at {revision} cannot be had from the hub ({reason}); for a "
                "gated model set HF_TOKEN, or give a local folder"
            ]
        ) from None


def _vocab_size(config_file: Path, where: str) -> int:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):
        raise ConfigError([f"{where}.path: config.json has no vocab_size"])
    return size


def hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """Hash names and contents of a folder's files that match; sha256 hex."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
