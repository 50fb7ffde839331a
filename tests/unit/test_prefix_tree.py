"""The prefix tree: each shared token is one row, and rows see exactly their ancestors."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cdr.engines.base import ScoringGroup
from cdr.engines.prefix_tree import PrefixTree, build_prefix_tree

# Few distinct ids, so that prefixes and completions often begin alike.
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
GROUPS = st.lists(st.builds(ScoringGroup, IDS, st.lists(IDS, max_size=4).map(tuple)), max_size=5)


def path_ids(tree: PrefixTree, row: int) -> tuple[int, ...]:
    """Token ids from the root to a row, by the tree's own rule of who is an ancestor."""
    rows = np.arange(len(tree))
    on_path = rows[tree.is_on_path(rows, to=row)]
    assert tree.depths[on_path].tolist() == list(range(len(on_path)))
    return tuple(tree.token_ids[on_path].tolist())


def test_a_prompt_with_two_completions_by_hand() -> None:
    tree = build_prefix_tree([ScoringGroup((5, 6), ((7, 8), (7, 9, 1)))])
    # Rows: 5, 6, 7 (shared), 9. Last tokens 8 and 1 are predicted, never read.
    assert tree.token_ids.tolist() == [5, 6, 7, 9]
    assert tree.depths.tolist() == [0, 1, 2, 3]
    assert tree.ends.tolist() == [4, 4, 4, 4]
    assert tree.target_ids.tolist() == [7, 8, 7, 9, 1]
    assert tree.target_rows.tolist() == [1, 2, 1, 2, 3]


def test_a_known_path_saves_rows_up_to_the_first_that_predicts() -> None:
    groups = [ScoringGroup((1, 9), ((4,),)), ScoringGroup((5, 6, 7), ((4,),))]
    tree = build_prefix_tree(groups, np.array([5, 6, 7, 8]))
    assert tree.token_ids.tolist() == [5, 6, 7, 1, 9]  # the known branch comes first
    assert tree.num_known == 2  # row 2 predicts 4, so it is read again


@given(groups=GROUPS, known=st.lists(st.integers(0, 2), max_size=8))
def test_every_target_is_predicted_by_the_row_of_its_own_history(
    groups: list[ScoringGroup], known: list[int]
) -> None:
    tree = build_prefix_tree(groups, np.array(known, np.int64))
    histories = [
        (group.prefix_ids + completion[:i], completion[i])
        for group in groups
        for completion in group.completions_ids
        for i in range(len(completion))
    ]
    predicted = [
        (path_ids(tree, row), target)
        for row, target in zip(tree.target_rows, tree.target_ids, strict=True)
    ]
    assert predicted == histories
    # No history is read twice, and nothing is read that predicts nothing further down.
    paths = {path_ids(tree, row) for row in range(len(tree))}
    assert len(paths) == len(tree)
    assert paths == {history[:k] for history, _ in histories for k in range(1, len(history) + 1)}
    assert path_ids(tree, tree.num_known - 1) == tuple(known[: tree.num_known])
    assert not (tree.target_rows < tree.num_known).any()
