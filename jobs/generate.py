r"""Sample completions for prompts from a policy: the model that is to be tuned on them.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/generate.py --config conf/generate/demo.yaml

Reads prompts, draws N completions of each, and writes the Delta tables completions, rejects and
runs. Run it again to go on after an interruption: only what is missing is sampled. The table
`completions` is an input for jobs/annotate.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cdr.cli import end, make_wave_parser, overrides, run_job
from cdr.sampling import SamplingPlan, load_generate_config, plan_sampling
from cdr.sampling_run import SamplingRun
from cdr.sampling_stages import export_samples, plan_samples, sample_wave
from cdr.session import get_session
from cdr.warehouse import Warehouse
from udfs.generate import make_generate


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_wave_parser(
        __doc__,
        config="sampling YAML: a path or URI, see conf/generate/",
        limit="their samples are kept, a run without --limit adds the rest",
        epilog="examples of --set:\n"
        "  --set policy.path=my/policy --set dataset=round-2     another policy\n"
        "  --set sampling.num_samples=8                          more samples of each prompt\n"
        "  --set input.path=my.parquet --set input.format=parquet\n"
        "all keys: docs/reference/config.md; a walk through: docs/how-to/generate.md",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="also write them as JSON lines, sorted",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    config = load_generate_config(args.config, overrides(args))
    plan = plan_sampling(config, limit=args.limit)
    spark = get_session("cdr generate", warehouse=config.warehouse)
    return generate(plan, Warehouse(spark, config.warehouse, config.tables), export=args.export)


def generate(plan: SamplingPlan, warehouse: Warehouse, *, export: Path | None = None) -> int:
    """Carry a plan out; give the exit code."""
    with SamplingRun(plan, warehouse) as run:
        function = make_generate(run.context.plan, run.counter)
        work = plan_samples(run.context)
        for wave in run.waves(work):
            run.committed(sample_wave(wave, work, run.context, function))
        run.finish(work)
        if export is not None:
            print(f"exported    {export_samples(run.context, export):,} rows to {export}")
    return run.exit_code


def run() -> None:
    """Run as a program: this script, the command `cdr-generate`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
