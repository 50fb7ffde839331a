"""LoRA adapters on engines that apply them to shared weights (vLLM), and who may share weights.

Reads nothing but `adapter_config.json` and the names in the header of the safetensors file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cdr.engines.base import EngineSpec
from cdr.errors import ModelError
from cdr.weights import fetch_small_files

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Adapters of these change logits directly. vLLM applies such a change to sampled rows but not
# reliably to prompt rows, which are what scoring reads. With tied weights the input embedding is
# the head.
_HEAD_PARTS = ("lm_head", "embed_tokens", "embed_out", "wte")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
# What makes an adapter compute something else than (alpha / r) B A on the weights as they are.
_SPECIAL_KEYS = (
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "init_lora_weights",
    "alora_invocation_tokens",
    "lora_bias",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initial values that leave the model's own weights alone.
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class AdapterShape:
    """What weights must make room for: the rank, one that vLLM has kernels for, and the modules."""

    rank: int
    modules: frozenset[str]


def read_adapter_shape(folder: str | Path) -> AdapterShape:
    """Check that vLLM can score with a LoRA adapter, and give what to make room for.

    Args:
        folder: holds adapter_config.json and, unless it is still to be fetched,
            adapter_model.safetensors.

    Raises:
        ModelError: it is no LoRA adapter, touches the LM head, or is of a kind that vLLM does not
            apply.
    """
    config, tensors = _read_config(Path(folder)), _read_tensor_names(Path(folder))
    if touched := _touched_head_parts(config, tensors):
        raise ModelError(
            f"with vLLM an adapter must leave the LM head alone, this one changes "
            f"{', '.join(sorted(touched))}",
            where=str(folder),
            fix="use the transformers engine for this model, or merge the adapter into its weights "
            "and give the merged folder as path",
        )
    unsupported = [key for key in ("use_dora", "modules_to_save") if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    rank = max([config.get("r", 0), *config.get("rank_pattern", {}).values()])
    if config.get("peft_type") != "LORA" or unsupported or rank > _RANKS[-1]:
        raise ModelError(
            f"with vLLM an adapter must be plain LoRA of rank {_RANKS[-1]} at most, got "
            f"{config.get('peft_type')} of rank {rank} {' '.join(unsupported)}".rstrip(),
            where=str(folder),
            fix="use the transformers engine for this model",
        )
    targets = config.get("target_modules")  # a pattern where it is a string
    modules = set(targets) if isinstance(targets, list) else set()
    # base_model.model.model.layers.0.mlp.up_proj.lora_A.weight
    modules |= {name.split(".lora_")[0] for name in tensors}
    return AdapterShape(
        rank=next(size for size in _RANKS if size >= rank),
        modules=frozenset(module.rpartition(".")[-1] for module in modules),
    )


def find_ignored_keys(folder: str | Path, known: Collection[str]) -> list[str]:
    """Find what makes an adapter more than plain LoRA and would go unnoticed by the loader.

    vLLM's loader takes the keys it knows from adapter_config.json and is silent about the others.

    Args:
        folder: holds adapter_config.json.
        known: keys that the loader applies, or refuses itself.

    Raises:
        ModelError: there is no such file.
    """
    config = _read_config(Path(folder))
    special = {key for key in _SPECIAL_KEYS if config.get(key)}
    if str(config.get("init_lora_weights")).lower() in _PLAIN_INITS:
        special.discard("init_lora_weights")
    return sorted(special - set(known))


def make_room(spec: EngineSpec, shapes: Iterable[AdapterShape]) -> EngineSpec:
    """Give a spec whose weights have room for adapters besides those it has room for already."""
    modules = set(filter(None, spec.adapter_modules.split(",")))
    rank = spec.max_adapter_rank
    for shape in shapes:
        rank, modules = max(rank, shape.rank), modules | shape.modules
    return replace(spec, max_adapter_rank=rank, adapter_modules=",".join(sorted(modules)))


def share_weights(specs: Sequence[EngineSpec]) -> tuple[EngineSpec, ...]:
    """Let vLLM engines that differ by adapter only use one copy of their weights.

    Such engines get room for the same adapters, by which the engine module knows that they belong
    together.

    Args:
        specs: the engines of one stage.

    Raises:
        ModelError: an adapter cannot be used with vLLM.
    """
    shapes: dict[EngineSpec, list[AdapterShape]] = defaultdict(list)
    for spec in specs:
        if spec.engine == "vllm" and spec.adapter_path is not None:
            folder = fetch_small_files(spec.adapter_path, spec.adapter_revision)
            shapes[spec.weights()].append(read_adapter_shape(folder))
    return tuple(
        make_room(spec, shapes[spec.weights()]) if spec.engine == "vllm" else spec for spec in specs
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"a LoRA adapter must be a folder with {_CONFIG} and {_WEIGHTS}",
            where=str(folder),
            fix="name the folder that PEFT's save_pretrained wrote",
        ) from error
    return config


def _read_tensor_names(folder: Path) -> list[str]:
    if not (folder / _WEIGHTS).is_file():
        return []
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, framework="numpy") as weights:
        return list(weights.keys())


def _touched_head_parts(config: dict[str, Any], tensors: Sequence[str]) -> set[str]:
    if config.get("trainable_token_indices"):
        return {"trainable_token_indices"}
    names = list(tensors)
    for key in ("modules_to_save", "target_modules"):
        value = config.get(key) or []
        names += [value] if isinstance(value, str) else value
    parts = {part for name in names for part in name.split(".")}
    return parts & set(_HEAD_PARTS)
