"""LoRA adapters on engines that apply them to shared weights (vLLM), and who may share weights.

Reads nothing but `adapter_config.json` and the names in the header of the safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdr.engines.base import EngineSpec
from cdr.errors import ModelError

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Adapters of these change logits directly. vLLM applies such a change to sampled rows but not
# reliably to prompt rows, which are what scoring reads. With tied weights the input embedding is
# the head.
_HEAD_PARTS = ("lm_head", "embed_tokens", "embed_out", "wte")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
_DEFAULT_SHARE = 0.9  # of a GPU, for all engines that are loaded together


def read_adapter_rank(folder: str | Path) -> int:
    """Check that vLLM can score with a LoRA adapter, and give the rank to make room for.

    Args:
        folder: holds adapter_config.json and, unless it is still to be fetched,
            adapter_model.safetensors.

    Returns:
        The adapter's largest rank, rounded up to one that vLLM has kernels for.

    Raises:
        ModelError: it is no LoRA adapter, touches the LM head, or is of a kind that vLLM does not
            apply.
    """
    config = _read_config(Path(folder))
    if touched := _touched_head_parts(Path(folder), config):
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
    return next(size for size in _RANKS if size >= rank)


def share_weights(specs: Sequence[EngineSpec], *, colocated: bool) -> tuple[EngineSpec, ...]:
    """Let vLLM engines that differ by adapter only use one copy of their weights.

    Such engines get the same `max_adapter_rank`, by which the engine module knows that they belong
    together. Engines that name no `memory_fraction` divide the device evenly by copies of weights.

    Args:
        specs: the engines of one stage.
        colocated: they are loaded together, not one after the other.

    Raises:
        ModelError: an adapter cannot be used with vLLM.
    """
    ranks = {
        spec.name: read_adapter_rank(spec.adapter_path)
        for spec in specs
        if spec.engine == "vllm" and spec.adapter_path
    }
    vllm = [spec for spec in specs if spec.engine == "vllm"]
    bases = {spec.name: replace(spec, name="", adapter_path=None) for spec in vllm}
    num_copies = len(set(bases.values())) if colocated else 1
    shared = []
    for spec in specs:
        if spec.engine == "vllm":
            alike = [other for other in vllm if bases[other.name] == bases[spec.name]]
            spec = replace(
                spec,
                max_adapter_rank=max((ranks.get(other.name, 0) for other in alike), default=0),
                memory_fraction=spec.memory_fraction or round(_DEFAULT_SHARE / num_copies, 3),
            )
        shared.append(spec)
    return tuple(shared)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"a LoRA adapter must be a folder with {_CONFIG} and {_WEIGHTS}",
            where=str(folder),
        ) from error
    return config


def _touched_head_parts(folder: Path, config: dict[str, Any]) -> set[str]:
    names: list[str] = []
    for key in ("modules_to_save", "target_modules", "trainable_token_indices"):
        value = config.get(key) or []
        if key == "trainable_token_indices" and value:
            return {key}
        names += [value] if isinstance(value, str) else value
    if (folder / _WEIGHTS).is_file():
        from safetensors import safe_open

        with safe_open(folder / _WEIGHTS, framework="numpy") as weights:
            names += weights.keys()
    parts = {part for name in names for part in name.split(".")}
    return parts & set(_HEAD_PARTS)
