"""Train a sequence classifier on preference pairs: a reward model of your own, as a baseline.

    python -m jobs.train_classifier --pairs FOLDER --output FOLDER --held-out FILE.jsonl

A try of a minute on a laptop: add `--max-pairs 16 --max-length 160`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdr import cli
from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.hardware import resolve_dtype

HYPER_PARAMETERS = (
    *("max_length", "max_pairs", "holdout_fraction", "epochs", "batch_size"),
    *("learning_rate", "rank", "seed"),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train_classifier",
        description="Train a sequence classifier (TRL's RewardTrainer: LoRA and a head of one "
        "output, Bradley-Terry loss) from a causal language model on preference pairs, and write "
        "it as a whole model that `form: classifier` reads. It measures nothing: give the "
        "held-out pairs to jobs/evaluate.py, which compares it with other rewards.",
        epilog="A folder that holds a finished classifier of the same options is left as it is, "
        "one of other options is refused. A run that was stopped starts anew.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    pairs = ".jsonl or .parquet files, or folders of them, as for jobs/train_dpo.py"
    add("--pairs", type=Path, nargs="+", required=True, metavar="PATH", help=pairs)
    add("--output", type=Path, required=True, metavar="FOLDER", help="model folder to write")
    held_out = "write the pairs held out there, as JSON lines; default: nowhere"
    add("--held-out", type=Path, metavar="FILE", help=held_out)
    demo = resolve_demo_model_dir()
    add("--model", type=Path, default=demo, metavar="FOLDER", help="the model to start from")
    length = "of prompt and longer answer; longer pairs are left out and counted, never cut"
    add("--max-length", type=int, default=512, metavar="TOKENS", help=length)
    most = "train on N pairs at most, equal shares of sections and their subsets; default: all"
    add("--max-pairs", type=int, metavar="N", help=most)
    share = "share of each section's prompts to hold out, by hash; no group is on both sides. The "
    share += "same share of the same pairs is held out by jobs/train_dpo.py"
    add("--holdout-fraction", type=float, default=0.12, metavar="SHARE", help=share)
    add("--epochs", type=float, default=1.0, metavar="X", help="passes over the pairs")
    add("--batch-size", type=int, default=8, metavar="N", help="pairs per optimizer step")
    add("--learning-rate", type=float, default=5e-4, metavar="X", help="AdamW's peak rate")
    add("--rank", type=int, default=16, metavar="N", help="rank of the LoRA matrices")
    add("--seed", type=int, default=0, metavar="N", help="of pairs, order and first weights")
    dtype = "auto takes bfloat16 where the machine multiplies in it"
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=dtype)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; 0 when done, else the error's code."""
    args = parse_args(argv)
    return cli.run_job(lambda: train(args))


def train(args: argparse.Namespace) -> int:
    """Run the training that the command line asks for."""
    from cdr.classifier_training import train_classifier  # torch: not for --help

    metrics = train_classifier(
        args.model,
        tuple(args.pairs),
        args.output,
        args.held_out,
        dtype=resolve_dtype(args.dtype),
        **{name: getattr(args, name) for name in HYPER_PARAMETERS},
    )
    data, training = metrics["data"], metrics["training"]
    print(
        f"classifier: {args.output} ({data['train_pairs']} pairs, {training['steps']} steps, "
        f"{training['seconds']} s)"
    )
    return cli.OK


if __name__ == "__main__":
    sys.exit(main())
