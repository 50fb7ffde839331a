r"""Write preference pairs to files for a trainer, with a manifest of where they came from.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/export.py --warehouse warehouse/demo --dataset demo --to exports/demo

Reads the table preferences; writes a file per split (train.jsonl, validation.jsonl) and
manifest.json into a new folder, which TRL's trainers and `datasets.load_dataset` take unchanged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cdr.cli import OK, add_warehouse, end, positive, run_job, table_places
from cdr.export import FORMATS, LAYOUTS, Target, export_pairs, find_pairs
from cdr.session import get_session
from cdr.warehouse import Warehouse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="layouts:\n"
        "  messages       prompt, chosen, rejected as messages; TRL's own (DPO, CPO, SimPO, ORPO)\n"
        "  conversations  chosen and rejected as whole conversations, as UltraFeedback-binarized\n"
        "  text           prompt, chosen, rejected as strings; prompts of one message only\n\n"
        "which pairs there are:  leave --reward out, or name a wrong one: the error lists them\n"
        "what a run saw:         --version N, from its manifest or DESCRIBE HISTORY\n"
        "a walk through:         docs/how-to/export.md\n\n"
        "exit codes: 0 done, 1 failed, 2 nothing matches or the folder is not empty",
    )
    add_warehouse(parser)
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        metavar="NAME",
        help="which completions: `dataset` of a config",
    )
    reward = "name of the reward, or start of its key; needed where there are several"
    add("--reward", metavar="NAME", help=reward)
    selection = "start of the key of the rule that chose; needed where there are several"
    add("--selection", metavar="KEY", help=selection)
    add("--version", type=int, metavar="N", help="Delta version of the table; default: the latest")
    add("--to", required=True, metavar="DIR", help="folder or URI to write, new or empty")
    add("--format", choices=FORMATS, default="jsonl", help="of files (default: jsonl)")
    add("--layout", choices=LAYOUTS, default="messages", help="see below (default: messages)")
    more = "keep more columns, for example prompt_id,domain,margin"
    add("--with", dest="extra", default="", metavar="COLUMNS", help=more)
    add("--parts", type=positive, default=1, metavar="N", help="files per split (default: 1)")
    add("--overwrite", action="store_true", help="replace an earlier export in that folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    places = table_places(args)
    extra = [name.strip() for name in args.extra.split(",") if name.strip()]
    target = Target(args.to, args.format, args.layout, extra, args.parts, args.overwrite)
    spark = get_session("cdr export", warehouse=args.warehouse)
    warehouse = Warehouse(spark, args.warehouse, places)
    pairs = find_pairs(
        warehouse,
        dataset=args.dataset,
        reward=args.reward,
        selection=args.selection,
        version=args.version,
    )
    print(export_pairs(warehouse, pairs, target).render(args.to))
    return OK


def run() -> None:
    """Run as a program: this script, the command `cdr-export`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
