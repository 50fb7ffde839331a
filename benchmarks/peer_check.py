"""Whether our rewards are those of a scorer that nobody here wrote: TRL's.

    make peer-check                      # the demo model's pair, 224 rows; minutes on 2 cores
    make peer-check ARGS='--rows 16'

The demo's completions are scored as (strong, weak) = (the demo's adapter, its start model), plain
ratio, sums, in float32, by

    ours   `cdr.reward_model`: our encoding, our engine in its host
    TRL    `DPOTrainer`: its tokenization of the conversation, its collator, its forward and
           log-probs (`compute_ref_log_probs`), once per model; two completions of a prompt make one
           of its pairs

Settings are aligned: every completion counts as ended by itself, for TRL scores the end of the turn
always. One difference is TRL's way and not an error: behind the end-of-turn token it also scores
what the template writes next (ChatML's line break), which no model samples. So TRL is asked twice:
with the template as it is, and with one that writes the same text but puts that line break in front
of the next turn. The second must agree to rounding.
"""

from __future__ import annotations

import os

# Threads that spin while they wait ruin each other's timing as soon as a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from cdr.plan import plan_reward
from cdr.reward_config import load_reward_config
from cdr.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[1]
REWARD = ROOT / "conf" / "rewards" / "smollm2-dpo-over-start.yaml"
ROWS = ROOT / "conf" / "demo" / "completions.jsonl"
TOLERANCE = 1e-3
"""Nats per completion, of both models' sums over up to hundreds of float32 terms."""

# The template of SmolLM2-135M-Instruct, each line break in front of the turn that follows it.
ENDS_AT_END_OF_TURN = """\
{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n\
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>' }}{% endif %}\
{{ '' if loop.first and message['role'] == 'system' else '\\n' }}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"""

Floats = NDArray[np.float64]


def read_rows(limit: int) -> list[dict[str, Any]]:
    """Read completions, an even number of each prompt; which of them were cut is left aside."""
    lines = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    rows: list[dict[str, Any]] = []
    for _, group in groupby(lines, key=lambda row: row["prompt_id"]):
        found = list(group)
        rows += found[: len(found) // 2 * 2]
    names = ("prompt", "completion")
    return [{name: row[name] for name in names} for row in rows[: limit // 2 * 2]]


def score_ours(rows: list[dict[str, Any]]) -> tuple[Floats, Floats]:
    """Give the log-prob sums of strong and weak, one per row."""
    reward = load_reward_config(
        REWARD,
        ["routing.mode=none", "models.strong.dtype=float32", "models.weak.dtype=float32"],
    )
    results = RewardModel(plan_reward(reward)).score(rows)
    refused = [row.error for row in results if row.status != "ok"]
    if refused:
        raise SystemExit(f"{len(refused)} rows have no reward: {refused[0]}")
    return (
        np.array([row.strong_logprob for row in results], dtype=np.float64),
        np.array([row.weak_logprob for row in results], dtype=np.float64),
    )


def score_trl(rows: list[dict[str, Any]], template: str | None) -> tuple[Floats, Floats]:
    """Give the same by TRL.

    Args:
        rows: two of each prompt after each other.
        template: chat template in place of the model's own; None for that.
    """
    reward = load_reward_config(REWARD)
    start, adapter = reward.models["weak"].path, reward.models["strong"].adapter
    tokenizer = AutoTokenizer.from_pretrained(start)
    if template is not None:
        tokenizer.chat_template = template
    weak, strong = (
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2)
    )
    strong = PeftModel.from_pretrained(strong, adapter).merge_and_unload()

    def answer(row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": row["completion"]}]

    pairs = [
        {"prompt": one["prompt"], "chosen": answer(one), "rejected": answer(other)}
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=strong,
            ref_model=weak,
            args=DPOConfig(
                output_dir=folder, max_length=None, bf16=False, report_to=[],
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )  # fmt: skip
        strong.eval()
        weak.eval()
        sums: list[list[float]] = [[], []]
        batches = DataLoader(trainer.train_dataset, batch_size=4, collate_fn=trainer.data_collator)
        for batch in batches:
            on_device = {name: tensor.to(strong.device) for name, tensor in batch.items()}
            for model, found in zip((strong, weak), sums, strict=True):
                chosen, rejected = trainer.compute_ref_log_probs(model, on_device)
                found += torch.stack([chosen, rejected], dim=1).flatten().tolist()
    return np.array(sums[0]), np.array(sums[1])


def describe(name: str, ours: tuple[Floats, Floats], theirs: tuple[Floats, Floats]) -> float:
    """Print how far two scorers are apart; give the largest difference of the rewards."""
    rewards = ours[0] - ours[1], theirs[0] - theirs[1]
    apart = {
        "strong": np.abs(ours[0] - theirs[0]),
        "weak": np.abs(ours[1] - theirs[1]),
        "reward": np.abs(rewards[0] - rewards[1]),
    }
    margins = [reward[::2] - reward[1::2] for reward in rewards]
    agree = float((np.sign(margins[0]) == np.sign(margins[1])).mean())
    print(f"\n{name}: {len(ours[0])} rows, {len(margins[0])} pairs")
    for what, difference in apart.items():
        print(f"  |Δ {what}|  mean {difference.mean():.2e}  largest {difference.max():.2e} nats")
    print(f"  correlation of rewards {np.corrcoef(*rewards)[0, 1]:.6f}; same favourite {agree:.1%}")
    return float(apart["reward"].max())


def main() -> int:
    """Run the check; 1 where the aligned scorers disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000, metavar="N", help="at most")
    args = parser.parse_args()
    disable_progress_bars()
    rows = read_rows(args.rows)
    ours = score_ours(rows)
    print(f"rewards: mean {np.mean(ours[0] - ours[1]):.3f}, spread {np.std(ours[0] - ours[1]):.3f}")
    describe("TRL with the template's line break behind the turn", ours, score_trl(rows, None))
    aligned = score_trl(rows, ENDS_AT_END_OF_TURN)
    furthest = describe("TRL, ending at the end of the turn", ours, aligned)
    print(f"\n{'agree' if furthest < TOLERANCE else 'DISAGREE'} (tolerance {TOLERANCE} nats)")
    return 0 if furthest < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
