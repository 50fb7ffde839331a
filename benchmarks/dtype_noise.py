"""How far rewards move with the dtype: the same labelled pairs in float32 and in bfloat16.

    python benchmarks/dtype_noise.py                            # the repository's 40 pairs
    python benchmarks/dtype_noise.py --pairs FILE --max-chars 1200

Scores both answers of every pair by the demo's reward without routing, as `jobs/evaluate.py` does,
once with both models in float32 and twice in bfloat16: in one call, and in calls of a pair each,
which batch otherwise. Tells by how much rewards and margins (chosen − rejected) differ, how often
the favourite changes, and how large margins are in the first place. Nats, sums over tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdr.plan import plan_reward
from cdr.reward_config import load_reward_config
from cdr.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[1]
REWARD = ROOT / "conf" / "rewards" / "smollm2-dpo-over-start.yaml"

Floats = NDArray[np.float64]


def read_pairs(file: Path, max_chars: int) -> list[list[dict[str, Any]]]:
    """Read labelled pairs whose longer answer fits; give the rows of chosen and rejected."""
    pairs = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [
        [{"prompt": pair["prompt"], "completion": pair[side]} for side in ("chosen", "rejected")]
        for pair in pairs
        if max(len(pair["chosen"]), len(pair["rejected"])) <= max_chars
    ]


def score(pairs: list[list[dict[str, Any]]], dtype: str, *, together: bool) -> Floats:
    """Give the rewards, shape [pairs, 2]; NaN where a row is rejected."""
    changes = [f"models.{role}.dtype={dtype}" for role in ("strong", "weak")]
    model = RewardModel(plan_reward(load_reward_config(REWARD, ["routing.mode=none", *changes])))
    calls = [[row for pair in pairs for row in pair]] if together else pairs
    found = [row.reward for call in calls for row in model.score(call)]
    return np.array([np.nan if one is None else one for one in found]).reshape(-1, 2)


def compare(name: str, found: Floats, exact: Floats) -> None:
    """Print how rewards differ from others of the same pairs."""
    margins, others = found[:, 0] - found[:, 1], exact[:, 0] - exact[:, 1]
    turned = int(((margins > 0) != (others > 0)).sum())
    print(
        f"{name:<34} reward |Δ| {np.abs(found - exact).mean():.2f}, "
        f"margin |Δ| {np.abs(margins - others).mean():.2f}, "
        f"correlation of margins {np.corrcoef(margins, others)[0, 1]:.3f}, "
        f"favourite turned in {turned} of {len(margins)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = ROOT / "conf" / "demo" / "pairs.jsonl"
    parser.add_argument("--pairs", type=Path, default=demo, metavar="FILE")
    parser.add_argument("--max-chars", type=int, default=4000, metavar="N", help="of an answer")
    args = parser.parse_args()
    pairs = read_pairs(args.pairs, args.max_chars)
    exact = score(pairs, "float32", together=True)
    rounded = score(pairs, "bfloat16", together=True)
    apart = score(pairs, "bfloat16", together=False)
    fits = ~np.isnan(exact).any(axis=1)
    exact, rounded, apart = exact[fits], rounded[fits], apart[fits]
    margins = exact[:, 0] - exact[:, 1]
    print(
        f"{len(margins)} pairs of {len(pairs)}; in float32 {np.mean(margins > 0):.1%} are right, "
        f"margins are {np.median(np.abs(margins)):.2f} in the median"
    )
    compare("bfloat16 against float32", rounded, exact)
    compare("bfloat16, other batches", apart, rounded)


if __name__ == "__main__":
    main()
