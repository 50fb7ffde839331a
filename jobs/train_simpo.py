r"""Train a policy with SimPO on the preference pairs of a warehouse, over a grid.

    python -m jobs.train_simpo --config conf/train/demo.yaml
    accelerate launch --num_processes 8 -m jobs.train_simpo --config conf/train/llama3-simpo.yaml

Reads the table preferences at one version, for one reward, once; trains a policy per learning rate
and beta on the split stored with the pairs; keeps the best one by validation reward accuracy. Run
it again to go on after an interruption: what is done is not done again.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Sequence

from cdr.cli import EXIT_CODES, OK, STOPPED, end, make_parser, run_job
from cdr.errors import INSTALL_TRAINING, SetupError, Stopped
from cdr.session import get_session
from cdr.simpo_config import load_simpo_config


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = make_parser(
        __doc__,
        config="training YAML: a path or URI, see conf/train/",
        epilog="examples of --set:\n"
        "  --set preferences.dataset=demo --set preferences.reward=smollm2-dpo-over-start\n"
        "  --set preferences.version=12                  what an earlier state of the table had\n"
        "  --set 'search.learning_rates=[1e-6]' --set 'search.betas=[10]'    one policy, no grid\n"
        "  --set training.lora.rank=16                   an adapter instead of all weights\n"
        "which pairs there are:  leave preferences.reward out, or name a wrong one\n"
        "all keys: docs/reference/config.md; a walk through: docs/how-to/train-simpo.md\n\n"
        f"{EXIT_CODES}\n"
        "(accelerate's launcher turns all but 0 into 1; the table runs has the outcome)",
    )
    hours = "stop in good order, at a checkpoint, at this age"
    parser.add_argument("--max-hours", type=float, metavar="H", help=hours)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    hours = [] if args.max_hours is None else [f"run.max_hours={args.max_hours}"]
    config = load_simpo_config(args.config, [*args.set, *hours])
    if importlib.util.find_spec("trl") is None:
        raise SetupError(f"TRL is not installed for {sys.executable}", fix=INSTALL_TRAINING)
    from cdr.simpo import search_policy  # torch: not for --help
    from cdr.training_run import TrainingRun
    from cdr.tuning import is_first_process
    from cdr.warehouse import Warehouse

    if not is_first_process():  # the first one reads the table and tells the others
        try:
            search_policy(config, None)
        except Stopped:
            return STOPPED
        return OK
    spark = get_session("cdr train_simpo", warehouse=config.warehouse)
    with TrainingRun(config, Warehouse(spark, config.warehouse, config.tables)) as run:
        run.finish(search_policy(config, run))
    return run.exit_code


def run() -> None:
    """Run as a program: this script, the command `cdr-train-simpo`, or a wheel task."""
    end(run_job(main))


if __name__ == "__main__":
    run()
