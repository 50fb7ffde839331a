"""Attention by blocks against one dense product, and what makes PyTorch fast on CPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from cdr.engines import block_attention
from cdr.engines.block_attention import make_block_mask
from cdr.engines.cpu_math import exact_products, map_on_cores, speed_up_linear_layers

THREADS = 3


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def products() -> str:
    """What the process does with float32 matrices."""
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def see(prefix: int, branches: list[int]) -> torch.Tensor:
    """Which keys rows of branches may see after a prefix, shape [rows, prefix + rows]."""
    branch = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(branches))
    own = (branch[:, None] == branch) & torch.ones(len(branch), len(branch)).tril().bool()
    return torch.cat([torch.ones(len(branch), prefix).bool(), own], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80])  # the scaling of the latter is no power of two
@pytest.mark.parametrize("branches", [[1], [40, 50, 300, 1, 1, 60]])
def test_blocks_attend_as_one_dense_product_does(
    dtype: torch.dtype, head_dim: int, branches: list[int]
) -> None:
    torch.manual_seed(0)
    visible = see(100, branches)
    rows, keys = visible.shape
    query = 3 * torch.randn(1, 6, rows, head_dim).to(dtype)
    key, value = torch.randn(2, 1, 3, keys, head_dim).to(dtype)
    got, _ = block_attention.attend(
        torch.nn.Identity(), query, key, value, make_block_mask(visible)
    )
    shared = key.double().repeat_interleave(2, 1), value.double().repeat_interleave(2, 1)
    dots = query.double() @ shared[0].transpose(2, 3) * head_dim**-0.5
    weights = dots.masked_fill(~visible, -torch.inf).softmax(-1)
    exact = (weights @ shared[1]).transpose(1, 2)
    # With scores rounded to bfloat16 it would be several times as much.
    assert (got - exact).abs().mean() < (2e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    ("branches", "num_rows", "expected"),
    [
        ([], 1, [(0, 1)]),
        ([], 30, [(0, 10), (10, 20), (20, 30)]),
        ([], 14, [(0, 14)]),
        ([12, 20, 35], 40, [(0, 12), (12, 20), (20, 35), (35, 40)]),
        ([1, 2, 3, 31], 36, [(0, 10), (10, 20), (20, 31), (31, 36)]),
        ([3, 15], 17, [(0, 15), (15, 17)]),
    ],
)
def test_blocks_begin_with_branches_where_that_gives_good_sizes(
    branches: list[int], num_rows: int, expected: list[tuple[int, int]]
) -> None:
    assert list(block_attention._cut(branches, num_rows, 10)) == expected


def test_few_rows_are_blocks_for_every_thread() -> None:
    mask = make_block_mask(see(10, [200]))
    assert len(mask.cdr_blocks) >= THREADS  # type: ignore[attr-defined]


def test_pieces_are_done_side_by_side_by_threads_that_share_nothing() -> None:
    together = threading.Barrier(THREADS, timeout=60)

    def do(piece: int) -> tuple[int, int, bool]:
        together.wait()
        return piece, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert map_on_cores(do, range(THREADS)) == [(n, 1, True) for n in range(THREADS)]
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *found] == [THREADS, THREADS]


def test_a_piece_that_fails_fails_the_call() -> None:
    def do(piece: int) -> float:
        return 1 / piece

    with pytest.raises(ZeroDivisionError):
        map_on_cores(do, [1, 0, 2])


def test_products_are_exact_as_long_as_anyone_asks_for_it() -> None:
    before = products()
    with exact_products(torch.float32):
        assert products() == before
    with exact_products(torch.bfloat16):
        with exact_products(torch.bfloat16):
            pass
        assert products() == "bf16"
    assert products() == before


def test_linear_layers_by_onednn_give_the_same_products_from_the_same_weights() -> None:
    class Own(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    torch.manual_seed(0)
    layers = [torch.nn.Linear(96, 64), torch.nn.Linear(64, 33, bias=False), Own(33, 8)]
    model = torch.nn.Sequential(*layers).eval()
    weights = [layer.weight.data_ptr() for layer in layers]
    half = torch.nn.Linear(96, 8).bfloat16()
    rows = torch.randn(2, 50, 96)
    with torch.inference_mode():
        expected = model(rows), half(rows.bfloat16())
        speed_up_linear_layers(model)
        speed_up_linear_layers(half)
        with torch.profiler.profile() as profile:
            got = model(rows), half(rows.bfloat16())
    torch.testing.assert_close(got, expected)
    assert [layer.weight.data_ptr() for layer in layers] == weights
    ran = [event.name for event in profile.events()]
    assert ran.count("mkldnn::_linear_pointwise") == 2
