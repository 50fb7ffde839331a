"""Scoring costs by hand: published model sizes, FLOPs of a tiny workload, the reader's units."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cdr.errors import ModelError
from cdr.estimate import (
    DevicePeak,
    Estimate,
    ModelShape,
    Workload,
    count_waves,
    estimate_scoring,
    format_count,
    format_duration,
    gpu_peak,
    load_model_shape,
    shape_from_config,
    sharing_gain,
)

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MISTRAL_7B = LLAMA_3_8B | {"vocab_size": 32000}
MIXTRAL_8X7B = MISTRAL_7B | {"num_local_experts": 8, "num_experts_per_tok": 2}
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "published", "norms"),
    [
        # Two norms per layer and a last one, each as wide as the hidden size.
        (LLAMA_3_8B, 8_030_261_248, 65 * 4096),
        (MISTRAL_7B, 7_241_732_096, 65 * 4096),
        (MIXTRAL_8X7B, 46_702_792_704, 65 * 4096),
        (SMOLLM2_135M, 134_515_008, 61 * 576),
    ],
)
def test_the_config_gives_the_published_number_of_parameters(
    config: dict[str, float], published: int, norms: int
) -> None:
    shape = shape_from_config(config)
    assert shape is not None
    assert shape.total_params + norms == published


def test_only_the_active_experts_of_a_mixture_are_paid_for() -> None:
    shape = shape_from_config(MIXTRAL_8X7B)
    assert shape is not None
    # Published: 12.9 B active parameters, the embeddings (2 · 4096 · 32000) among them.
    assert (shape.body_params + 2 * shape.head_params) / 1e9 == pytest.approx(12.9, abs=0.05)


def test_experts_may_be_narrower_than_the_dense_mlp_and_have_a_shared_one() -> None:
    config = {
        "hidden_size": 8,
        "intermediate_size": 1000,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 6,
        "vocab_size": 10,
        "rms_norm_eps": 1e-5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    }
    shape = shape_from_config({"text_config": config, "vocab_size": 7})
    # Attention 4 · 8 · 12 = 384; gate 32; shared 3 · 8 · 32 = 768; an expert 3 · 8 · 16 = 384.
    assert shape == ModelShape(
        total_params=2 * 80 + 384 + 32 + 768 + 4 * 384,
        body_params=384 + 32 + 768 + 2 * 384,
        head_params=80,
        attention_width=12,
    )


def test_a_model_of_another_kind_is_counted_in_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 4, "vocab_size": 10}))
    for number, tensors in enumerate(
        [{"wte.weight": (10, 4), "wpe.weight": (6, 4)}, {"h.0.mlp.weight": (4, 16)}]
    ):
        arrays = {name: np.zeros(shape, np.float16) for name, shape in tensors.items()}
        save_file(arrays, tmp_path / f"model-{number}.safetensors", metadata={"format": "pt"})
    assert load_model_shape(tmp_path) == ModelShape(
        total_params=40 + 24 + 64, body_params=64, head_params=40, attention_width=0
    )


def test_a_folder_that_does_not_say_its_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model_shape(tmp_path)


def test_flops_and_seconds_of_a_tiny_workload_by_hand() -> None:
    # Two prompts of 10 tokens with two completions of 4 tokens each.
    workload = Workload(prompts=2, completions=4, prefix_tokens=20, completion_tokens=16)
    shape = ModelShape(total_params=0, body_params=100, head_params=30, attention_width=5)
    device = DevicePeak("toy", bfloat16_flops=1000.0, float32_flops=100.0, efficiency=0.5)
    cost = estimate_scoring(workload, shape, device)
    assert cost.body_flops == 2 * 100 * 36
    # Positions attended to: prefixes 2 · 10²/2 = 100; completions 4 · (4 · 10 + 4²/2) = 192.
    assert cost.attention_flops == 4 * 5 * (100 + 192)
    assert cost.head_flops == 2 * 30 * 16
    assert cost.device_s == pytest.approx((7200 + 5840) / 500 + 960 / 50)
    in_one_dtype = estimate_scoring(workload, shape, device, head_dtype="bfloat16")
    assert in_one_dtype.device_s == pytest.approx((7200 + 5840 + 960) / 500)


def test_nothing_to_score_costs_nothing() -> None:
    cost = estimate_scoring(
        Workload(0, 0, 0, 0), ModelShape(1, 1, 1, 1), DevicePeak("toy", 1.0, 1.0, 1.0)
    )
    assert (cost.device_hours, cost.tokens_in(60), sharing_gain(Workload(0, 0, 0, 0))) == (0, 0, 1)


@pytest.mark.parametrize(
    ("prefix", "completion", "candidates", "gain"),
    # N(L + n) / (L + N·n)
    [(1500, 500, 32, 3.66), (1800, 200, 32, 7.80), (1000, 300, 2, 1.63)],
)
def test_sharing_gain_is_the_ratio_of_tokens_read(
    prefix: int, completion: int, candidates: int, gain: float
) -> None:
    workload = Workload(10, 10 * candidates, 10 * prefix, 10 * candidates * completion)
    assert sharing_gain(workload) == pytest.approx(gain, abs=0.01)


def test_a_wave_is_sized_by_the_devices_speed() -> None:
    cost = Estimate(
        tokens=1_000_000, body_flops=0, attention_flops=0, head_flops=0, device_s=2000.0
    )
    assert cost.tokens_in(25 * 60, devices=8) == 500 * 1500 * 8
    assert (count_waves(0, 10), count_waves(10, 10), count_waves(11, 10)) == (1, 1, 2)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla T4", 8.1),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H200", 989.0),
    ],
)
def test_gpus_are_found_by_the_name_their_driver_gives(name: str, tflops: float) -> None:
    peak = gpu_peak(name)
    assert peak is not None
    assert peak.flops("bfloat16") == pytest.approx(0.4 * tflops * 1e12)


def test_an_unknown_gpu_has_no_peak() -> None:
    assert gpu_peak("NVIDIA L400") is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (0.94, "0.9 s"),
        (45.4, "45 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (4800, "1 h 20 min"),
        (4829, "1 h 20 min"),
        (86399, "24 h"),
        (183600, "2 d 3 h"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0333, "0.033"),
        (3.25, "3.2"),
        (999, "999"),
        (9_994, "9,994"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (12_345_678, "12.3 M"),
        (3_456_000_000, "3.46 B"),
    ],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text


@given(st.integers(1, 10**12))
def test_a_count_reads_back_within_half_a_percent(number: int) -> None:
    digits, _, unit = format_count(number).partition(" ")
    factor = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[unit]
    assert float(digits.replace(",", "")) * factor == pytest.approx(number, rel=0.0051)
