"""Prefix tree of a batch of scoring groups, laid out so that every shared token is computed once.

Rows of the tree are the tokens a decoder must read: every prefix and every completion except its
last token, which nothing follows. Rows are numbered in depth-first order, so a subtree is the
interval [row, end) and one comparison answers "may row i see row j?":

    j is i itself or an ancestor of it  <=>  j <= i < ends[j]

That is the attention mask of the packed batch, and the rule for which keys and values are still
needed when the walk goes on. A completion token is a `target` that its parent row predicts.

Source: tree attention as in SpecInfer (arXiv 2305.09781), applied to scoring. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdr.engines.base import ScoringGroup

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrefixTree:
    """Rows to read and targets to predict, as flat arrays.

    Args:
        token_ids: token of each row, shape [num_rows], depth-first order.
        depths: position of each row in its sequence, shape [num_rows].
        ends: one past the last row of each row's subtree, shape [num_rows].
        target_rows: row that predicts each target, shape [num_targets]; targets are in the order
            of the groups, their completions and the completions' tokens.
        target_ids: token id of each target, shape [num_targets].
        num_known: leading rows that continue a path computed before, and that predict no target.
    """

    token_ids: Ints
    depths: Ints
    ends: Ints
    target_rows: Ints
    target_ids: Ints
    num_known: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def is_on_path(self, rows: Ints, to: int) -> npt.NDArray[np.bool_]:
        """Tell which rows are `to` itself or one of its ancestors; shape of `rows`."""
        return (rows <= to) & (to < self.ends[rows])


def build_prefix_tree(groups: Sequence[ScoringGroup], known_ids: Ints | None = None) -> PrefixTree:
    """Merge all prefixes and completions into one tree.

    Args:
        groups: any order, repeats allowed.
        known_ids: token ids of a path whose keys and values are at hand, shape [known]; the
            branch that shares most with it comes first in the tree. None for none.

    Returns:
        The tree; `num_known` rows of it need no computation.
    """
    known = np.empty(0, np.int64) if known_ids is None else known_ids
    sequences: list[Ints] = []
    prefix_lengths: list[int] = []
    targets: list[Ints] = []
    for group in groups:
        prefix = np.asarray(group.prefix_ids, np.int64)
        for completion_ids in group.completions_ids:
            completion = np.asarray(completion_ids, np.int64)
            sequences.append(np.concatenate([prefix, completion[:-1]]))
            prefix_lengths.append(len(prefix))
            targets.append(completion)

    shared_with_known = [_common_length(sequence, known) for sequence in sequences]
    # Big-endian bytes compare like the ids they hold. Both keys keep every subtree together.
    order = sorted(
        range(len(sequences)),
        key=lambda i: (-shared_with_known[i], sequences[i].astype(">u4").tobytes()),
    )

    num_rows = 0
    ends = np.zeros(sum(map(len, sequences)), np.int64)
    previous, path = np.empty(0, np.int64), np.empty(0, np.int64)
    token_ids, depths = [previous], [previous]
    target_rows = [previous] * len(sequences)
    for i in order:
        sequence = sequences[i]
        shared = _common_length(sequence, previous)
        ends[path[shared:]] = num_rows
        added = len(sequence) - shared
        path = np.concatenate([path[:shared], np.arange(num_rows, num_rows + added)])
        num_rows += added
        token_ids.append(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        target_rows[i] = path[prefix_lengths[i] - 1 :]
        previous = sequence
    ends[path] = num_rows

    first_target_row = min((int(rows[0]) for rows in target_rows), default=0)
    return PrefixTree(
        token_ids=np.concatenate(token_ids),
        depths=np.concatenate(depths),
        ends=ends[:num_rows],
        target_rows=np.concatenate([previous[:0], *target_rows]),
        target_ids=np.concatenate([previous[:0], *targets]),
        num_known=min(max(shared_with_known, default=0), first_target_row),
    )


def _common_length(one: Ints, other: Ints) -> int:
    """Count the leading ids that both have in common."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
