"""What makes PyTorch fast on a CPU: work in pieces, one per core, and oneDNN's matrix products.

PyTorch shares every operation among its threads, and they sleep in between (`OMP_WAIT_POLICY`, see
`cdr.engines.launch`). Waking them took 50 µs per operation where it was measured, which is as long
as many operations of a small model take. A piece of work done by one thread from start to end wakes
nobody, and its intermediate results stay in that core's cache.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def map_on_cores(do: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """Do pieces of work, as many at a time as PyTorch has threads, each on one thread.

    Args:
        do: does one piece, without gradients.
        pieces: at least two per thread where there is work enough, as the slowest one is waited
            for; a single one is done by all threads together.

    Returns:
        What each gave, in order.
    """
    num_threads, pieces = torch.get_num_threads(), list(pieces)
    if num_threads == 1 or len(pieces) == 1:
        return [do(piece) for piece in pieces]

    def do_without_gradients(piece: Piece) -> Result:
        with torch.inference_mode():  # a thread's own setting
            return do(piece)

    return list(_single_threads(num_threads).map(do_without_gradients, pieces))


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let a CPU multiply float32 matrices of bfloat16 numbers as what they are, where it can.

    Such products are exact in float32, in which they are added up, so only the order of the sums is
    another one. PyTorch has no product of bfloat16 matrices on a CPU that is not rounded. It is a
    setting of the whole process, which counts as long as any thread is in here.

    Args:
        dtype: that of the numbers; other than bfloat16, nothing is changed.
    """
    # PyTorch has it from 2.9 on.
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or dtype != torch.bfloat16:
        yield
        return
    with _exact.lock:
        if not _exact.users:
            _exact.before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _exact.users += 1
    try:
        yield
    finally:
        with _exact.lock:
            _exact.users -= 1
            if not _exact.users:
                matmul.fp32_precision = _exact.before


def multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply as `torch.nn.functional.linear` does; float32 on a CPU by oneDNN, without gradients.

    PyTorch takes MKL for float32, which is less than half as fast on AMD's CPUs. oneDNN rearranges
    the weights in each call. Rearranged ones are 5 % faster from 512 rows on, but no longer pages
    of the model's file, which processes share.

    Args:
        rows: shape [..., inputs].
        weight: shape [outputs, inputs], of the same dtype.
        bias: shape [outputs], of the same dtype.

    Returns:
        Shape [..., outputs].
    """
    is_float32 = rows.device.type == "cpu" and rows.dtype == torch.float32
    if is_float32 and not torch.is_grad_enabled() and _has_onednn():
        # What PyTorch's own compiler calls (`torch._inductor`); it has no public name.
        op = torch.ops.mkldnn._linear_pointwise
        result: torch.Tensor = op(rows, weight, bias, "none", [], "")
        return result
    return torch.nn.functional.linear(rows, weight, bias)


def speed_up_linear_layers(model: torch.nn.Module) -> None:
    """Let the linear layers of a model run by `multiply`.

    Args:
        model: any; a subclass of `torch.nn.Linear` may have a forward of its own and is left as it
            is.
    """
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = functools.partial(  # type: ignore[method-assign]
                multiply, weight=module.weight, bias=module.bias
            )


@functools.cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@dataclass
class _Exact:
    """Who is in `exact_products`, and what the setting was before."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    before: str = ""


_exact = _Exact()


@functools.cache
def _single_threads(count: int) -> ThreadPoolExecutor:
    """Start threads whose operations PyTorch does not share among others."""
    started = threading.Barrier(count)

    def start() -> None:
        torch.get_num_threads()  # a thread's first use of PyTorch takes over what was set last
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, thread_name_prefix="core", initializer=start)
    # None is idle before all are started, so each of these starts one.
    list(threads.map(lambda _: None, range(count)))
    torch.set_num_threads(count)  # for threads to come, which begin with what was set last
    return threads
