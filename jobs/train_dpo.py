"""Tune a LoRA adapter on preference pairs by DPO, measure it, and write its model card.

    python -m jobs.train_dpo --pairs FOLDER --output conf/models/NAME

A try of two minutes on a laptop: add `--max-pairs 16 --max-length 160 --output try`. On a CPU that
others share, two processes of one thread each are faster than one of two threads:

    torchrun --nproc-per-node 2 -m jobs.train_dpo --threads 1 --pairs FOLDER --output FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdr import cli
from cdr.demo_model import resolve_demo_model_dir
from cdr.dpo_config import RunOptions
from cdr.dpo_report import describe_command, render_table
from cdr.engines.hardware import resolve_dtype

HYPER_PARAMETERS = (
    *("max_length", "max_pairs", "holdout_fraction", "epochs", "batch_size"),
    *("learning_rate", "beta", "rank", "seed"),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train_dpo",
        description="Tune a LoRA adapter on preference pairs by DPO. The tuned model over its own "
        "start makes a density-ratio reward; the held-out accuracy of that reward is measured at "
        "the end and stands in the adapter's README.md and metrics.json.",
        epilog="A run that was stopped goes on when the same command is given again: --output "
        "holds its checkpoints. A checkpoint made with other options is refused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    pairs = ".jsonl or .parquet files, or folders of them, with columns prompt (messages or text), "
    pairs += "chosen, rejected (text or one assistant message), and, where there, section, subset, "
    pairs += "group, split, source, license"
    add("--pairs", type=Path, nargs="+", required=True, metavar="PATH", help=pairs)
    add("--output", type=Path, required=True, metavar="FOLDER", help="adapter folder to write")
    demo = resolve_demo_model_dir()
    add("--model", type=Path, default=demo, metavar="FOLDER", help="the model to start from")
    name = "what the adapter calls it; default: the folder's name"
    add("--base-name", metavar="NAME", help=name)
    length = "of prompt and longer answer; longer pairs are left out and counted, never cut"
    add("--max-length", type=int, default=512, metavar="TOKENS", help=length)
    most = "train on N pairs at most, equal shares of sections and their subsets; default: all"
    add("--max-pairs", type=int, metavar="N", help=most)
    share = "share of each section's prompts to measure on, by hash; no group is on both sides"
    add("--holdout-fraction", type=float, default=0.12, metavar="SHARE", help=share)
    add("--epochs", type=float, default=1.0, metavar="X", help="passes over the pairs")
    add("--batch-size", type=int, default=8, metavar="N", help="pairs per optimizer step")
    add("--learning-rate", type=float, default=3e-4, metavar="X", help="AdamW's peak rate")
    beta = "beta of the DPO loss; smaller lets the model move further"
    add("--beta", type=float, default=0.1, metavar="X", help=beta)
    add("--rank", type=int, default=16, metavar="N", help="rank of the LoRA matrices")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of pairs, order and first weights",
    )
    dtype = "auto takes bfloat16 where the machine multiplies in it"
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=dtype)
    hours = "stop at a checkpoint after this long, measure that and say so in the card; 0 only "
    hours += "measures the last checkpoint; default: no limit"
    add("--max-hours", type=float, metavar="HOURS", help=hours)
    add("--threads", type=int, metavar="N", help="CPU threads per process; default: torch's choice")
    add("--save-steps", type=int, default=20, metavar="N", help="steps between checkpoints")
    keep = "keep every one of them, as stages of the tuning; else the last two while it runs"
    add("--keep-checkpoints", action="store_true", help=keep)
    held_out = "write the held-out pairs there (JSON lines), to measure other rewards on them"
    add("--held-out", type=Path, metavar="FILE", help=held_out)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure; 0 when done, 4 when stopped early, else the error's code."""
    args = parse_args(argv)
    command = describe_command(sys.argv[1:] if argv is None else argv)
    return cli.run_job(lambda: train(args, command))


def train(args: argparse.Namespace, command: str) -> int:
    """Run the training that the command line asks for."""
    from cdr import dpo  # torch: not for --help

    metrics = dpo.train_adapter(
        RunOptions(
            model=args.model,
            pairs=tuple(args.pairs),
            output=args.output,
            command=command,
            max_hours=args.max_hours,
            threads=args.threads,
            save_steps=args.save_steps,
            keep_checkpoints=args.keep_checkpoints,
            held_out=args.held_out,
        ),
        base_name=args.base_name or args.model.name,
        dtype=resolve_dtype(args.dtype),
        **{name: getattr(args, name) for name in HYPER_PARAMETERS},
    )
    if not metrics:  # a further process of torchrun; the first one reports
        return cli.OK
    print(render_table(metrics["held_out"]))
    print(f"adapter: {args.output}")
    return cli.OK if metrics["training"]["finished"] else cli.STOPPED


if __name__ == "__main__":
    sys.exit(main())
