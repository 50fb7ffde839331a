"""Tune a LoRA adapter on preference pairs by DPO, measure it, and write its model card.

    python -m jobs.train_dpo --pairs FOLDER --output conf/models/NAME

A try of two minutes on a laptop: add `--max-pairs 16 --max-length 160 --output try`. On a CPU that
others share, two processes of one thread each are faster than one of two threads:

    torchrun --nproc-per-node 2 -m jobs.train_dpo --threads 1 --pairs FOLDER --output FOLDER
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cdr.demo_model import MODEL_NAME, resolve_demo_model_dir
from cdr.errors import CdrError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train_dpo",
        description="Tune a LoRA adapter on preference pairs by DPO. The tuned model over its own "
        "start makes a density-ratio reward; the held-out accuracy of that reward is measured at "
        "the end and stands in the adapter's README.md and metrics.json.",
        epilog="A run that was stopped goes on when the same command is given again: --output "
        "holds its checkpoints. A checkpoint made with other options is refused.",
    )
    add = parser.add_argument
    add(
        "--pairs", type=Path, nargs="+", required=True, metavar="PATH",
        help=".jsonl or .parquet files, or folders of them, with columns prompt (messages or "
        "text), chosen, rejected (text or one assistant message), and if there section, subset, "
        "group, split, source, license",
    )  # fmt: skip
    add("--output", type=Path, required=True, metavar="FOLDER", help="adapter folder to write")
    add(
        "--model", metavar="FOLDER",
        help="start model (default: the demo model, see jobs.make_demo_model)",
    )  # fmt: skip
    add(
        "--base-name", metavar="NAME",
        help="how the adapter calls its start model (default: the model folder's name)",
    )  # fmt: skip
    add(
        "--max-length", type=int, default=512, metavar="TOKENS",
        help="prompt and longer answer together; longer pairs are left out and counted, never "
        "cut (default: %(default)s)",
    )  # fmt: skip
    add(
        "--max-pairs", type=int, metavar="N",
        help="train on at most N pairs, with equal shares of each section and of the subsets in "
        "it (default: all)",
    )  # fmt: skip
    add(
        "--holdout-fraction", type=float, default=0.12, metavar="SHARE",
        help="share of each section's prompts to measure on, chosen by hash; a prompt or group is "
        "never on both sides (default: %(default)s)",
    )  # fmt: skip
    add("--epochs", type=float, default=1.0, help="passes over the pairs (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="pairs per step (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-4, help="peak rate (default: %(default)s)")
    add(
        "--beta", type=float, default=0.1,
        help="of the DPO loss; smaller lets the model move further (default: %(default)s)",
    )  # fmt: skip
    add("--rank", type=int, default=16, help="of the LoRA matrices (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="auto takes bfloat16 where the machine multiplies in it (default: %(default)s)",
    )  # fmt: skip
    add(
        "--max-hours", type=float, metavar="HOURS",
        help="stop at a checkpoint after this long, measure that and say so in the card; 0 only "
        "measures the last checkpoint (default: no limit)",
    )  # fmt: skip
    add("--threads", type=int, help="torch threads per process (default: torch's own)")
    add("--save-steps", type=int, default=20, help="between checkpoints (default: %(default)s)")
    add("--keep-checkpoints", action="store_true", help="leave them when training has ended")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure; 0 when done, 4 when stopped early, else the error's code."""
    args = parse_args(argv)
    from cdr import dpo, dpo_report  # torch: not for --help

    model = args.model or str(resolve_demo_model_dir())
    hyper = ("max_length", "max_pairs", "holdout_fraction", "epochs", "batch_size")
    hyper += ("learning_rate", "beta", "rank", "seed")
    try:
        metrics = dpo.train_adapter(
            dpo.RunOptions(
                model=model,
                pairs=tuple(args.pairs),
                output=args.output,
                command=describe_command(sys.argv[1:] if argv is None else argv),
                max_hours=args.max_hours,
                threads=args.threads,
                save_steps=args.save_steps,
                keep_checkpoints=args.keep_checkpoints,
            ),
            base_name=args.base_name or (Path(model).name if args.model else MODEL_NAME),
            dtype=dpo.choose_dtype() if args.dtype == "auto" else args.dtype,
            **{name: getattr(args, name) for name in hyper},
        )
    except CdrError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not metrics:  # a further process of torchrun; the first one reports
        return 0
    print(dpo_report.render_table(metrics["held_out"]))
    print(f"adapter: {args.output}")
    return 0 if metrics["training"]["finished"] else 4


def describe_command(argv: Sequence[str]) -> str:
    """Give the command with absolute paths cut to their last part: no card names a machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    return " ".join([start, "-m jobs.train_dpo", *words])


if __name__ == "__main__":
    sys.exit(main())
