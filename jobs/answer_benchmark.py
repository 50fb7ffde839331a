r"""Answer a benchmark's questions with a policy, and have the answers judged or compared.

    spark-submit --properties-file conf/cluster/local.conf \
        jobs/answer_benchmark.py --config conf/downstream/demo.yaml

Draws the policy's answers to AlpacaEval 2, Arena-Hard or MT-Bench by the machinery of
jobs/generate.py (resumable, in the table completions), and writes them in exactly the file that the
benchmark's own tool reads. Run it again to go on after an interruption.

--compare-with FILE  win rate against another policy's answers, by the rewards of the config
--judge              verdicts of the benchmark's tool, through an OpenAI-compatible endpoint

Both give intervals and lengths, into a JSON file beside the answers and into MLflow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from cdr.answer_files import read_questions
from cdr.answering import Conversations
from cdr.cli import EXIT_CODES, end, make_parser, positive, run_job
from cdr.config import trial_name
from cdr.downstream import DownstreamRun, PolicyComparison, read_rival
from cdr.downstream_config import load_downstream_config
from cdr.judging import check_judge
from cdr.placement import place
from cdr.sampling import plan_sampling
from cdr.session import get_session
from cdr.warehouse import Warehouse
from jobs.evaluate import evaluate
from jobs.generate import generate


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(
        __doc__,
        config="downstream YAML: a path or URI, see conf/downstream/",
        epilog="examples of --set:\n"
        "  --set policy.path=my/policy --set dataset=my-policy   another policy\n"
        "  --set policy.adapter=runs/simpo/adapter               a LoRA adapter on it\n"
        "  --set training_run=0123...                            link with the MLflow run\n"
        "  --set judge.base_url=http://localhost:8000/v1         where the judge answers\n"
        "all keys: docs/reference/config.md; a walk through: docs/how-to/answer-benchmarks.md\n\n"
        + EXIT_CODES,
    )
    add = parser.add_argument
    limit = "try the first N questions; the files are named NAME.limit-N, the answers are kept"
    add("--limit", type=positive, metavar="N", help=limit)
    other = "answers of another policy, such as the one that tuning started from"
    add("--compare-with", metavar="FILE", help=other)
    add("--judge", action="store_true", help="let the benchmark's tool judge the answers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; give its exit code."""
    args = parse(arguments)
    config = load_downstream_config(args.config, args.set)
    questions = read_questions(config.benchmark, config.questions)[: args.limit]
    rival = read_rival(config, args.compare_with, questions) if args.compare_with else None
    if args.judge:
        check_judge(config)
    plan = plan_sampling(config.sampling_config(config.dataset, "-", config.sampling.temperature))
    model = trial_name(config.dataset, args.limit)
    spark = get_session("cdr answer_benchmark", warehouse=config.warehouse)
    warehouse = Warehouse(spark, config.warehouse, config.tables)
    key = plan.tokenizer.model_key
    with DownstreamRun(config, warehouse, model=model, policy_key=key) as run:
        talk = Conversations(config, questions, warehouse, run.staging)
        for turn in range(1, talk.num_turns + 1):
            samplings = talk.runs(turn)
            for sampling in samplings:
                run.note(generate(plan_sampling(sampling), warehouse))
            talk.take(turn, samplings)
        answers = run.answered(questions, talk)
        if rival is not None:
            pairs = PolicyComparison(config, warehouse, run.staging, model=model, rival=rival)
            evaluations = pairs.evaluations(questions, answers)
            for evaluation in evaluations.values():
                placed = replace(evaluation, annotation=place(evaluation.annotation, spark))
                run.note(evaluate([placed], warehouse))
            run.compared(pairs.compared(evaluations))
        if args.judge:
            run.judge(questions, answers)
    return run.exit_code


def run() -> None:
    """Run as a program: this script, `cdr-answer-benchmark`, or a wheel task of Databricks."""
    end(run_job(main))


if __name__ == "__main__":
    run()
