"""A preference pair as one row of tokens, and the log-probs of its two answers.

A CPU cannot afford TRL's way, which reads the prompt twice per pair and runs the LM head on every
position; on a GPU it takes the memory. Here a pair is one row, [prompt | chosen | rejected], with a
mask that hides the answers from each other, and the head sees answer positions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

# Rows of the LM head computed at a time: 128 × 49k float32 logits are 25 MB.
HEAD_ROWS: Final = 128


def pack_pair(
    prefix_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Lay a pair out as one row in which neither answer sees the other.

    Args:
        prefix_ids: L ids of the prompt.
        chosen_ids: c ids, at least one.
        rejected_ids: r ids, at least one.

    Returns:
        `input_ids` and `position_ids` [1, L+c+r] (both answers start at position L),
        `attention_mask` [1, 1, L+c+r, L+c+r] bool, `rows` [c+r] (positions whose output predicts
        an answer's token), `targets` [c+r] and `num_chosen`.
    """
    start, chosen, rejected = len(prefix_ids), len(chosen_ids), len(rejected_ids)
    length = start + chosen + rejected
    mask = torch.ones((length, length), dtype=torch.bool).tril()
    mask[start + chosen :, start : start + chosen] = False
    positions = [*range(start + chosen), *range(start, start + rejected)]
    rows = [
        *range(start - 1, start + chosen - 1),
        start - 1,
        *range(start + chosen, length - 1),
    ]
    return {
        "input_ids": torch.tensor([[*prefix_ids, *chosen_ids, *rejected_ids]]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": mask[None, None],
        "rows": torch.tensor(rows),
        "targets": torch.tensor([*chosen_ids, *rejected_ids]),
        "num_chosen": torch.tensor(chosen),
    }


def collate_one(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of the one row of `cdr.tuning.make_rows` that TRL hands over."""
    (row,) = examples
    packed = pack_pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    return {**packed, "index": torch.tensor([row["index"]])}


def score_packed(
    model: Any,
    packed: Mapping[str, torch.Tensor],
    *,
    per_token: bool = False,
    float32_head: bool = False,
) -> torch.Tensor:
    """Give log p(chosen) and log p(rejected) of one packed pair.

    Args:
        model: a causal LM of transformers, with or without adapter.
        packed: what `pack_pair` gives.
        per_token: give means over the answer's tokens, not sums.
        float32_head: compute the LM head in float32, without gradients; for measuring, and only
            with an adapter.

    Returns:
        Two sums (or means) over the answer's tokens, end-of-turn token included: [2] float32, nats.
    """
    inputs = {name: packed[name] for name in ("input_ids", "position_ids", "attention_mask")}
    if float32_head:
        causal = model.get_base_model()
        hidden = causal.model(**inputs, use_cache=False).last_hidden_state[0, packed["rows"]]
        weight = causal.lm_head.weight.float()
        targets = packed["targets"]
        logprobs = torch.cat(
            [
                _target_logprobs(
                    hidden[at : at + HEAD_ROWS].float() @ weight.T, targets[at : at + HEAD_ROWS]
                )
                for at in range(0, len(targets), HEAD_ROWS)
            ]
        )
    else:
        logits = model(**inputs, use_cache=False, logits_to_keep=packed["rows"]).logits[0]
        logprobs = _target_logprobs(logits, packed["targets"])
    chosen = int(packed["num_chosen"])
    answers = (logprobs[:chosen], logprobs[chosen:])
    return torch.stack([one.mean() if per_token else one.sum() for one in answers])


def _target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs of targets [rows] under logits [rows, vocabulary], in float32."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
