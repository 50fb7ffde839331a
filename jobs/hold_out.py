"""Write the labelled pairs that a tuning on them holds out: others measure memory, not a reward.

    python -m jobs.hold_out --pairs FOLDER --output held-out.jsonl

jobs/train_dpo.py and jobs/train_classifier.py hold out the same pairs, given the same share: the
split goes by hashes of prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdr import cli
from cdr.dpo_data import read_pairs, split_pairs, write_pairs


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.hold_out",
        description="Write the labelled pairs that a tuning on them holds out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    pairs = ".jsonl or .parquet files, or folders of them, as jobs/train_dpo.py takes them"
    add("--pairs", type=Path, nargs="+", required=True, metavar="PATH", help=pairs)
    output = "file to write: JSON lines, as jobs/evaluate.py reads them"
    add("--output", type=Path, required=True, metavar="FILE", help=output)
    share = "share of each section's prompts, by hash; no group is on both sides"
    add("--holdout-fraction", type=float, default=0.12, metavar="SHARE", help=share)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pairs; give the exit code."""
    args = parse_args(argv)
    return cli.run_job(lambda: hold_out(args))


def hold_out(args: argparse.Namespace) -> int:
    """Read, split and write."""
    seen, held_out = split_pairs(read_pairs(args.pairs), args.holdout_fraction)
    write_pairs(held_out, args.output)
    print(f"{len(held_out):,} of {len(seen) + len(held_out):,} pairs are held out: {args.output}")
    return cli.OK


if __name__ == "__main__":
    sys.exit(main())
