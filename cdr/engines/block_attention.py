"""Attention of many rows, a block of rows at a time, each over only the keys that its rows may see.

Rows of a prefix tree that are read together lie on different branches: a dense mask makes each row
pay for the keys of all of them. Here the rows are cut into blocks, and a block attends to the keys
that at least one of its rows may see. The numbers are those of the dense mask, where hidden keys
have weight zero.

The blocks travel with the mask through the model, which hands masks on to its layers untouched;
a model that makes a mask of its own gets ordinary attention with that mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "cdr_blocks"
"""What `set_attn_implementation` takes."""


class _Block:
    """Rows of a mask that attend together.

    Args:
        visible: their part of the mask, shape [rows, keys].
        first: number of the first row.
        dtype: of queries and keys.
    """

    def __init__(self, visible: torch.Tensor, first: int, dtype: torch.dtype) -> None:
        self.rows = slice(first, first + len(visible))
        needed = visible.any(0).nonzero()[:, 0]
        start, stop = int(needed[0]), int(needed[-1]) + 1
        # A view where the keys lie together.
        self._needed = slice(start, stop) if stop - start == len(needed) else needed
        bias = torch.zeros((len(visible), len(needed)), dtype=dtype, device=visible.device)
        self._bias = bias.masked_fill_(~visible[:, self._needed], -torch.inf)

    def take(self, keys: torch.Tensor) -> torch.Tensor:
        """Take the needed ones of keys or values, shape [batch, heads, keys, head_dim]."""
        if isinstance(self._needed, slice):
            return keys[:, :, self._needed]
        return keys.index_select(2, self._needed)

    def make_bias(self, repeats: int) -> torch.Tensor:
        """Give the mask to add to scores, for rows repeated, shape [repeats · rows, keys]."""
        rows = self.rows.stop - self.rows.start
        if len(self._bias) != repeats * rows:  # once per forward: the layers are alike
            self._bias = self._bias[:rows].repeat(repeats, 1)
        return self._bias


def make_block_mask(visible: torch.Tensor, rows_per_block: int, dtype: torch.dtype) -> torch.Tensor:
    """Make the mask of one sequence, with its blocks.

    Args:
        visible: which keys a row may see, itself among them, shape [rows, keys].
        rows_per_block: rows that attend together.
        dtype: of queries and keys.

    Returns:
        Boolean mask, shape [1, 1, rows, keys], for models whose attention is `NAME`.
    """
    mask = visible[None, None]
    mask.cdr_blocks = [  # type: ignore[attr-defined]
        _Block(visible[first : first + rows_per_block], first, dtype)
        for first in range(0, len(visible), rows_per_block)
    ]
    return mask


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
    heads, key_heads = query.shape[1], key.shape[1]
    attended = torch.empty(
        (1, query.shape[2], heads, value.shape[-1]), dtype=query.dtype, device=query.device
    )
    for block in blocks:
        rows = query[:, :, block.rows]
        found = torch.nn.functional.scaled_dot_product_attention(
            # Heads that share keys are more rows of one head: no copy of the keys for each.
            rows.reshape(1, key_heads, -1, rows.shape[-1]),
            block.take(key),
            block.take(value),
            attn_mask=block.make_bias(heads // key_heads)[None, None],
            scale=scaling,
        )
        attended[:, block.rows] = found.reshape(1, heads, rows.shape[2], -1).transpose(1, 2)
    return attended, None


AttentionInterface.register(NAME, attend)
# Without a mask of ours, the masks that `sdpa` would get.
AttentionMaskInterface.register(NAME, sdpa_mask)
