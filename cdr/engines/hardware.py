"""What the hardware of this machine can do: which dtype is fast, how fast, how much memory.

`resolve_dtype` reads /proc and imports torch only where a GPU may be, because it also runs on a
Spark driver that will never load a model.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil

from cdr.errors import ConfigError, SetupError

DTYPES = ("float32", "bfloat16")

_NVIDIA_NODES = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")  # the last one is WSL's
_BF16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})


def resolve_dtype(requested: str) -> str:
    """Decide the dtype that a model is to run in on this machine.

    Args:
        requested: `auto`, `float32` or `bfloat16`.

    Returns:
        `requested` itself, or for `auto`: `bfloat16` where matmuls in it are fast (a CUDA device
        with bf16, a CPU with AMX or AVX512-BF16), else `float32`. On other CPUs a bf16 matmul is
        emulated and takes minutes where float32 takes seconds.

    Raises:
        ConfigError: `requested` is something else.
    """
    if requested in DTYPES:
        return requested
    if requested != "auto":
        raise ConfigError([f"dtype: must be 'auto', 'float32' or 'bfloat16', got {requested!r}"])
    if _has_cuda():
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_flags() & _BF16_CPU_FLAGS else "float32"


def count_cores() -> int:
    """Count the CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_nvidia() -> bool:
    """Tell whether this machine has an NVIDIA driver, without asking it anything."""
    return any(Path(node).exists() for node in _NVIDIA_NODES)


def device_memory_bytes() -> int:
    """Give the memory of this machine's smallest NVIDIA GPU, or the machine's where there is none.

    Raises:
        SetupError: there is a GPU, but the driver's nvidia-smi does not tell its memory.
    """
    if not has_nvidia():
        return int(psutil.virtual_memory().total)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return min(int(line) for line in answer.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SetupError(
            f"nvidia-smi does not tell the GPUs' memory: {error}",
            fix="set run.device_memory_gib, or run.placement to colocated or sequential",
        ) from None


def matmul_flops(dtype: str, size: int = 2048, budget_s: float = 1.0) -> float:
    """Measure the matmul peak of the first CUDA device, or of the CPU where there is none.

    Args:
        dtype: `float32` or `bfloat16`.
        size: rows and columns of the square matrices.
        budget_s: seconds to repeat the product for; the best repeat counts.

    Returns:
        Floating-point operations per second (a multiply and an add are two).
    """
    import torch

    from cdr.engines.cpu_math import multiply

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    right = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))

    def timed_product_s() -> float:
        start = time.perf_counter()
        multiply(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        timed_product_s()  # the first one starts threads
        best_s, end = timed_product_s(), time.perf_counter() + budget_s
        while time.perf_counter() < end:
            best_s = min(best_s, timed_product_s())
    return 2.0 * size**3 / best_s


def _has_cuda() -> bool:
    """Tell whether a CUDA device is visible, without torch where no NVIDIA driver is loaded."""
    if not has_nvidia():
        return False
    import torch

    return torch.cuda.is_available()


def _cpu_flags() -> frozenset[str]:
    """Read the feature flags of the first CPU; empty where the system does not list them."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
