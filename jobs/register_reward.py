r"""Register a reward in MLflow: pinned models, prompt pack and config, under a name and version.

    python jobs/register_reward.py --config conf/rewards/smollm2-dpo-over-start.yaml \
        --warehouse warehouse/demo --alias champion

Needs no Spark and loads no model; weights in local folders are read once, to hash them. Afterwards
`annotate --reward models:/NAME@champion` uses the version, and so does
`mlflow.pyfunc.load_model("models:/NAME@champion").predict(frame)`;
`evaluate --set reward=models:/NAME@champion` logs its figures as the version's metrics.

The same reward is not registered twice: a version is added only when the key of the reward differs
from the latest version's, which every text, weight and setting that decides a number is part of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cdr.cli import OK, end, run_job
from cdr.plan import plan_reward
from cdr.redaction import redact
from cdr.registration import EXPERIMENT, Registration, find_store, register_reward
from cdr.reward_config import load_reward_config
from cdr.tracking_store import ui_command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  --set reduction=mean --name my-mean         a variant under another name\n"
        "  --alias champion                            let the name stand for this version\n"
        "going back: register the old config again, or move the alias in the MLflow UI;\n"
        "a walk through: docs/how-to/registry.md\n\n"
        "exit codes: 0 registered, or nothing to do; 2 bad config, input or setup",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="reward YAML, see conf/rewards/")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the reward, as in --set models.strong.path=/models/strong",
    )
    add("--name", help="name in the registry; default: the reward's own. In Unity Catalog: "
        "CATALOG.SCHEMA.NAME")  # fmt: skip
    add("--alias", metavar="ALIAS", help="name for this version from now on, such as champion")
    add("--warehouse", metavar="FOLDER", help="use the SQLite store of this warehouse")
    add("--tracking-uri", metavar="URI", help="MLflow store; default: MLFLOW_TRACKING_URI")
    experiment = "MLflow experiment of the run that logs a version; on Databricks an absolute path"
    add(
        "--experiment",
        default=EXPERIMENT,
        metavar="NAME",
        help=f"{experiment} (default: {EXPERIMENT})",
    )
    add(
        "--force",
        action="store_true",
        help="add a version even of the same reward, as when its folders have moved",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    uri = find_store(args.tracking_uri, args.warehouse)
    reward = load_reward_config(args.config, args.set)
    for warning in reward.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    done = register_reward(
        plan_reward(reward),
        uri=uri,
        name=args.name,
        alias=args.alias,
        experiment=args.experiment,
        force=args.force,
    )
    print(render(done))
    return OK


def render(done: Registration) -> str:
    """Say what was done, and what to do with it."""
    version = done.version
    key = str(version.reward_key)[:16]
    lines = [
        f"registered {version.uri} (reward key {key})"
        if done.is_new
        else f"nothing to register: {version.uri} is this reward already (reward key {key})"
    ]
    if done.alias is not None:
        before = f" (before: version {done.replaced})" if done.replaced else ""
        lines.append(f"models:/{version.name}@{done.alias} is version {version.version}{before}")
    named = version.uri if done.alias is None else f"models:/{version.name}@{done.alias}"
    lines += ["", "next:", f"  jobs/annotate.py --config ... --reward {named}"]
    if done.is_new:
        lines.append(
            f"  jobs/evaluate.py --config ... --set reward={named}  (figures for this version)"
        )
    if command := ui_command(done.uri):
        lines.append(f"  {redact(command)}")
    return "\n".join(lines)


def run() -> None:
    """Run as a program: this script, or the command `cdr-register-reward`."""
    end(run_job(main))


if __name__ == "__main__":
    run()
