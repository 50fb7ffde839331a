"""What scoring will cost, before any model loads: FLOPs, device-hours, tokens per wave.

    FLOPs = 2 · P_body · tokens + 2 · d · V · completion tokens + attention

Each prefix is read once for all of its completions, and the LM head runs on completion rows only
(a multiply and an add are two FLOPs). Pure arithmetic on numbers and `config.json`: no torch, no
Spark. Left out: loading models, encoding, reading and writing tables, and what neighbouring prompts
share of their prefixes, so that short runs take longer and long shared exemplars cost less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdr.errors import ModelError
from cdr.weight_size import read_tensors

GPU_EFFICIENCY = 0.4
"""Share of the dense matmul peak that scoring is assumed to reach on a GPU."""
CPU_EFFICIENCY = 0.5
"""The same share of the matmul peak measured on a CPU."""


@dataclass(frozen=True)
class Workload:
    """Texts that one model has to read.

    Args:
        prompts: prefixes, each read once.
        completions: candidates of all prompts.
        prefix_tokens: tokens of all prefixes, each prefix counted once.
        completion_tokens: tokens of all completions.
    """

    prompts: int
    completions: int
    prefix_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.prefix_tokens + self.completion_tokens

    def __add__(self, other: Workload) -> Workload:
        return Workload(
            self.prompts + other.prompts,
            self.completions + other.completions,
            self.prefix_tokens + other.prefix_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a forward pass costs.

    Args:
        total_params: weights of the model, all experts and the embeddings included.
        body_params: weights one token is multiplied with, without embeddings and LM head; of
            experts, those that are active.
        head_params: weights of the LM head, hidden size × vocabulary.
        attention_width: layers × attention heads × head size; 0 where it is not known.
    """

    total_params: int
    body_params: int
    head_params: int
    attention_width: int = 0


@dataclass(frozen=True)
class DevicePeak:
    """How fast a device multiplies matrices.

    Args:
        name: for the reader.
        bfloat16_flops: dense FLOP/s in bfloat16.
        float32_flops: dense FLOP/s in float32, without TF32.
        efficiency: share of the peak that scoring reaches, in (0, 1].
    """

    name: str
    bfloat16_flops: float
    float32_flops: float
    efficiency: float

    def flops(self, dtype: str) -> float:
        """Give the FLOP/s to reckon with for `float32` or `bfloat16`."""
        peak = {"bfloat16": self.bfloat16_flops, "float32": self.float32_flops}[dtype]
        return peak * self.efficiency


# Dense peaks from the vendor's data sheets, in TFLOP/s: bfloat16, float32. Turing (T4) has no
# bfloat16 units, so float32 is what runs there. Longer names come before the names they contain.
_GPU_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "A10G": (70.0, 31.5),
    "A10": (125.0, 31.2),
    "L4": (121.0, 30.3),
    "T4": (8.1, 8.1),
}


def gpu_peak(name: str) -> DevicePeak | None:
    """Look a GPU up by the name its driver gives, for example `NVIDIA A100-SXM4-80GB`.

    Returns:
        Its peak; None where the table lacks it (measure it then, or give no hours).
    """
    words = name.replace("-", " ")
    for known, (bfloat16, float32) in _GPU_TFLOPS.items():
        if f" {known} " in f" {words} ":
            return DevicePeak(name, bfloat16 * 1e12, float32 * 1e12, GPU_EFFICIENCY)
    return None


@dataclass(frozen=True)
class Estimate:
    """What a workload costs one model on one device.

    Args:
        tokens: tokens that pass through the model.
        body_flops: matmuls of the layers.
        attention_flops: scores and weighted sums.
        head_flops: LM head on completion rows.
        device_s: seconds on one device.
    """

    tokens: int
    body_flops: float
    attention_flops: float
    head_flops: float
    device_s: float

    @property
    def device_hours(self) -> float:
        """Hours on one device."""
        return self.device_s / 3600

    def tokens_in(self, seconds: float, devices: int = 1) -> int:
        """Give the tokens that `devices` get through in a time: the size of a wave or a task."""
        if self.device_s == 0:
            return self.tokens
        return max(1, int(self.tokens / self.device_s * seconds * devices))


def estimate_scoring(
    workload: Workload,
    shape: ModelShape,
    device: DevicePeak,
    *,
    dtype: str = "bfloat16",
    head_dtype: str = "float32",
) -> Estimate:
    """Reckon what a model's scoring of a workload costs.

    Attention is reckoned at the mean lengths, which is too little where lengths differ much.

    Args:
        workload: what is still to be scored.
        shape: the model's sizes.
        device: the device's peak.
        dtype: of the layers, `float32` or `bfloat16`.
        head_dtype: of the LM head.
    """
    prefix = workload.prefix_tokens / max(workload.prompts, 1)
    completion = workload.completion_tokens / max(workload.completions, 1)
    # A token at position t attends to t others, on average half of its own segment and all of what
    # lies before: 2 FLOPs per weight for the scores and 2 for the weighted sum.
    attended = workload.prefix_tokens * prefix / 2
    attended += workload.completion_tokens * (prefix + completion / 2)
    body = 2.0 * shape.body_params * workload.tokens
    attention = 4.0 * shape.attention_width * attended
    head = 2.0 * shape.head_params * workload.completion_tokens
    seconds = (body + attention) / device.flops(dtype) + head / device.flops(head_dtype)
    return Estimate(workload.tokens, body, attention, head, seconds)


def sharing_gain(workload: Workload) -> float:
    """Tell how many times fewer tokens are read than if every completion re-read its prefix."""
    if workload.tokens == 0:
        return 1.0
    per_prompt = workload.completions / max(workload.prompts, 1)
    return (workload.prefix_tokens * per_prompt + workload.completion_tokens) / workload.tokens


def count_waves(tokens: int, wave_tokens: int) -> int:
    """Count the waves that `tokens` make at `wave_tokens` each; at least one."""
    return max(1, math.ceil(tokens / wave_tokens))


def load_model_shape(folder: str | Path) -> ModelShape:
    """Read a model's sizes from its folder.

    Args:
        folder: has `config.json` of a Llama, Mistral, Qwen or Mixtral kind, or safetensors files
            whose headers are counted instead.

    Raises:
        ModelError: neither says how large the model is.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    shape = shape_from_config(config) or _shape_from_weights(folder)
    if shape is None:
        raise ModelError(
            "the model's size is in neither config.json nor safetensors files",
            where=str(folder),
            fix="give the folder of a decoder with safetensors weights",
        )
    return shape


def shape_from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """Reckon a decoder's sizes from its `config.json`, without norms and biases (below 0.1 %).

    Args:
        config: parsed JSON; models that also see or hear keep the decoder's in `text_config`.

    Returns:
        The sizes; None where the keys of a gated-MLP decoder are not all there.
    """
    config = config.get("text_config", config)
    try:
        hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        mlp_width = int(config["intermediate_size"])
        # The MLP has three matrices in models that normalise by RMS, two in GPT's descendants.
        config["rms_norm_eps"]
    except KeyError:
        return None
    key_value_heads = int(config.get("num_key_value_heads") or heads)
    head_size = int(config.get("head_dim") or hidden // heads)
    attention = 2 * hidden * head_size * (heads + key_value_heads)

    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    if experts:
        expert = 3 * hidden * int(config.get("moe_intermediate_size") or mlp_width)
        always = hidden * experts  # the gate that picks the experts
        always += 3 * hidden * int(config.get("shared_expert_intermediate_size") or 0)
        all_mlp = always + experts * expert
        active_mlp = always + int(config["num_experts_per_tok"]) * expert
    else:
        all_mlp = active_mlp = 3 * hidden * mlp_width

    head = hidden * vocab
    embeddings = head if config.get("tie_word_embeddings") else 2 * head
    return ModelShape(
        total_params=embeddings + layers * (attention + all_mlp),
        body_params=layers * (attention + active_mlp),
        head_params=head,
        attention_width=layers * heads * head_size,
    )


def _shape_from_weights(folder: Path) -> ModelShape | None:
    """Count a dense model's weights in the headers of its safetensors files."""
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in read_tensors(folder)}
    embeddings = [
        size
        for name, size in sizes.items()
        if any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
    ]
    if not embeddings:
        return None
    total = sum(sizes.values())
    # Input embeddings and LM head are of one size; position embeddings, if any, are smaller.
    return ModelShape(total, total - sum(embeddings), max(embeddings))


def format_count(number: float) -> str:
    """Write a count in three digits: `999`, `12.3 k`, `1.20 M`, `3.46 B`."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        # 0.9995 of a unit would be rounded up to 1000 of the one below.
        if number >= 0.9995 * limit:
            scaled = number / (1e3 if unit == " k" else limit)
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f}{unit}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units: `45 s`, `3 min 20 s`, `1 h 20 min`, `2 d 3 h`."""
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, part_size, part_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            parts, left = divmod(round(whole / part_size), size // part_size)
            return f"{parts} {unit} {left} {part_unit}" if left else f"{parts} {unit}"
    return f"{whole} s"
