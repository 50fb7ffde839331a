"""Attention of many rows on a CPU: a block of rows at a time, over only the keys they may see.

Rows of a prefix tree that are read together lie on different branches: a dense mask makes each row
pay for the keys of all of them. Here the rows are cut into blocks, where branches begin if that
makes no odd sizes, and a block attends to the keys that at least one of its rows may see. The
numbers are those of the dense mask, where hidden keys have weight zero.

A block is the work of one thread (`cdr.engines.cpu_math`), and is made of matrix products:
PyTorch's own attention for CPUs multiplies bfloat16 at a fraction of their speed. As there, scores
are sums of exact products in float32, and weights have the dtype of the values.

The blocks travel with the mask through the model, which hands masks on to its layers untouched;
a model that makes a mask of its own gets ordinary attention with that mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cdr.engines.cpu_math import exact_products, map_on_cores, multiply

NAME = "cdr_blocks"
"""What `set_attn_implementation` takes."""

# Rows that attend together: many enough for fast products, few enough to see few keys in vain.
_MAX_ROWS, _MIN_ROWS = 128, 16


class _Block:
    """Rows of a mask that attend together.

    Args:
        visible: their part of the mask, shape [rows, keys].
        first: number of the first row.
    """

    def __init__(self, visible: torch.Tensor, first: int) -> None:
        self._rows = slice(first, first + len(visible))
        needed = visible.any(0).nonzero()[:, 0]
        start, stop = int(needed[0]), int(needed[-1]) + 1
        # A view where the keys lie together.
        self._needed = slice(start, stop) if stop - start == len(needed) else needed
        bias = torch.zeros((len(visible), len(needed)))
        self._bias = bias.masked_fill_(~visible[:, self._needed], -torch.inf)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        attended: torch.Tensor,
    ) -> None:
        """Write the weighted values of this block's rows into their place.

        Args:
            query: of all rows, shape [1, heads, rows, head_dim].
            key: shape [1, key heads, keys, head_dim].
            value: as `key`.
            scaling: factor on scores.
            attended: to be written, shape [1, rows, heads, head_dim].
        """
        heads, key_heads = query.shape[1], key.shape[1]
        # Heads that share keys are more rows of one head: no copy of the keys for each.
        rows = query[0, :, self._rows].reshape(key_heads, -1, query.shape[-1])
        keys, values = self._take(key[0]), self._take(value[0])
        found = []
        # Not as a batch, for which PyTorch has only MKL in float32.
        for queries, keys_, values_ in zip(rows.float(), keys.float(), values, strict=True):
            scores = multiply(queries, keys_)
            by_row = scores.view(-1, *self._bias.shape)
            # Not before, when queries would no longer be numbers of their dtype.
            torch.add(self._bias, by_row, alpha=scaling, out=by_row)
            found.append(multiply(scores.softmax(-1).to(values_.dtype), values_.T))
        by_head = torch.stack(found).reshape(heads, -1, value.shape[-1])
        attended[0, self._rows] = by_head.transpose(0, 1)

    def _take(self, keys: torch.Tensor) -> torch.Tensor:
        """Take the needed ones of keys or values, shape [key heads, keys, head_dim]."""
        if isinstance(self._needed, slice):
            return keys[:, self._needed]
        return keys.index_select(1, self._needed)


def make_block_mask(visible: torch.Tensor) -> torch.Tensor:
    """Make the mask of one sequence, with its blocks.

    Args:
        visible: which keys a row may see, itself among them, shape [rows, keys]; the last keys are
            the rows themselves.

    Returns:
        Boolean mask, shape [1, 1, rows, keys], for models whose attention is `NAME`.
    """
    num_rows = len(visible)
    # Small ones where there are few rows, so that every thread has blocks.
    size = max(_MIN_ROWS, min(_MAX_ROWS, num_rows // torch.get_num_threads()))
    sees_last = visible[:, -num_rows:].diagonal(-1)  # of all rows but the first
    branches = (~sees_last).nonzero()[:, 0] + 1
    mask = visible[None, None]
    mask.cdr_blocks = [  # type: ignore[attr-defined]
        _Block(visible[first:stop], first)
        for first, stop in _cut(branches.tolist(), num_rows, size)
    ]
    return mask


def _cut(branches: Iterable[int], num_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks of about `size` rows, at the beginning of a branch where possible.

    Args:
        branches: rows that begin one, in order.
        num_rows: how many there are.
        size: blocks are between half of it and half as much again, but for the last one.

    Yields:
        First row of a block, and one past its last.
    """
    first = 0
    for row in (*branches, num_rows):
        while row - first > size + size // 2:
            yield first, first + size
            first += size
        if row - first >= size // 2:
            yield first, row
            first = row
    if first < num_rows:
        yield first, num_rows


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa` does, by blocks where the mask has them.

    Args:
        module: the layer's attention module.
        query: shape [1, heads, rows, head_dim].
        key: shape [1, key heads, keys, head_dim]; a key head serves `heads / key heads` heads.
        value: as `key`.
        attention_mask: from `make_block_mask`, or any other, or None.
        scaling: factor on scores; None for 1/√head_dim.
        kwargs: handed on where there are no blocks.

    Returns:
        Weighted values, shape [1, rows, heads, head_dim], and None for the weights.
    """
    blocks: list[_Block] | None = getattr(attention_mask, "cdr_blocks", None)
    if blocks is None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return attended, None
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = query.new_empty((1, query.shape[2], query.shape[1], value.shape[-1]))
    with exact_products(query.dtype):
        map_on_cores(lambda block: block.attend(query, key, value, factor, attended), blocks)
    return attended, None


AttentionInterface.register(NAME, attend)
# Without a mask of ours, the masks that `sdpa` would get.
AttentionMaskInterface.register(NAME, sdpa_mask)
