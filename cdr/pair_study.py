"""Strong-over-weak studies on Spark: every model asked once, every pair of models a join.

    plan_study -> load_pairs, split_pairs (`cdr.labelled_pairs`) -> (route nothing, encode, score)
               -> tally_cells -> StudyRun.finish

The reward of a pair of models is the difference of two stored log-probs, so 121 cells cost 11
passes over the labelled pairs, and a third study over the same models none.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cdr.accuracy import Tally
from cdr.errors import ConfigError, FailReason
from cdr.evaluation_plan import CHOSEN, REJECTED, EvaluationPlan, make_sample, plan_evaluation
from cdr.job_run import Share
from cdr.scoring import Work
from cdr.scoring_run import ScoringRun
from cdr.study_config import StudyConfig
from cdr.study_plots import draw_study
from cdr.study_report import CellTally, StudyReport, make_report
from cdr.tables import LOGPROBS, REJECTS, STUDY_PAIRS
from cdr.warehouse import Warehouse


@dataclass(frozen=True)
class StudyPlan:
    """A checked study.

    Args:
        config: the resolved config.
        evaluation: what asks the models: one term per model that a cell needs.
    """

    config: StudyConfig
    evaluation: EvaluationPlan

    @property
    def model_keys(self) -> Mapping[str, str]:
        """Give the model key by name, for the models that a cell needs."""
        models = self.evaluation.annotation.reward.models
        return {name: model.model_key for name, model in models.items()}

    def recorded(self) -> dict[str, object]:
        """Give the config, JSON-able, for `runs` and MLflow."""
        sample = None if self.evaluation.sample is None else vars(self.evaluation.sample)
        return {**self.config.model_dump(mode="json"), "sample": sample}


def plan_study(config: StudyConfig, *, limit: int | None = None, quick: bool = False) -> StudyPlan:
    """Resolve and check all models of a study; loads no weights.

    Args:
        config: the config.
        limit: labelled pairs at most; None for all.
        quick: take the config's quick sample.

    Raises:
        ConfigError: a model is missing, two are the same, templates differ, or what
            `cdr.evaluation_plan.plan_evaluation` finds.
    """
    asked = config.as_evaluation()
    (evaluation,) = plan_evaluation(asked, sample=make_sample(asked, limit=limit, quick=quick))
    plan = StudyPlan(config, evaluation)
    problems = [*_same_models(plan), *_other_templates(plan)]
    if problems:
        raise ConfigError(
            problems,
            where=f"study '{config.study}'",
            fix="a study compares different models under one template: encoding.template 'plain', "
            "or a Jinja file that fits all of them",
        )
    return plan


def _same_models(plan: StudyPlan) -> list[str]:
    names: dict[str, list[str]] = defaultdict(list)
    for name, key in plan.model_keys.items():
        names[key].append(name)
    return [
        f"models: {' and '.join(same)} are the same weights, run in the same way"
        for same in names.values()
        if len(same) > 1
    ]


def _other_templates(plan: StudyPlan) -> list[str]:
    tokenizers = plan.evaluation.annotation.reward.encoding.tokenizers
    by_key = {tokenizer.model_key: tokenizer.template for tokenizer in tokenizers}
    templates = {name: by_key[key] for name, key in plan.model_keys.items()}
    first = next(iter(templates))
    other = [name for name, template in templates.items() if template != templates[first]]
    if not other:
        return []
    return [
        f"encoding.template: '{plan.config.encoding.template}' gives {', '.join(other)} another "
        f"template than {first}"
    ]


def tally_cells(pairs: DataFrame, answers: DataFrame, plan: StudyPlan) -> DataFrame:
    """Count each cell's wins and ties per subset.

    A labelled pair counts where all models have answered both sides, so that all cells are about
    the same pairs.

    Args:
        pairs: from `cdr.labelled_pairs.load_pairs`.
        answers: from `cdr.weighing.read_answers`.
        plan: the study.

    Returns:
        numerator, denominator, section, subset, wins, ties, total: a row per subset and cell; none
        for a model over itself.
    """
    spark = pairs.sparkSession
    models = spark.createDataFrame(
        [(f"{key}/plain", name) for name, key in plan.model_keys.items()],
        "view string, model string",
    )
    cells = spark.createDataFrame(
        [names for names in plan.config.cell_names() if names[0] != names[1]],
        "numerator string, denominator string",
    )
    value = F.col("answer")["logprob_sum"]
    if plan.config.reduction == "mean":
        value = value / F.col("answer")["num_tokens"]

    def side(completion_id: str) -> Column:
        return F.max(F.when(F.col("completion_id") == completion_id, F.col("value")))

    judged = (
        answers.join(_whole(answers, plan), on="prompt_id", how="left_semi")
        .select("prompt_id", "completion_id", F.explode("answers").alias("view", "answer"))
        .withColumn("value", value)
        .join(F.broadcast(models), on="view", how="inner")
        .groupBy("prompt_id", "model")
        .agg(side(CHOSEN).alias("chosen"), side(REJECTED).alias("rejected"))
        .join(pairs.select("prompt_id", "section", "subset"), on="prompt_id", how="inner")
    )
    numerators = judged.withColumnRenamed("model", "numerator")
    denominators = judged.select(
        "prompt_id",
        F.col("model").alias("denominator"),
        F.col("chosen").alias("weak_chosen"),
        F.col("rejected").alias("weak_rejected"),
    )
    # As `benchmark_pairs` has it: the difference of two rewards, each a difference of two models.
    margin = (F.col("chosen") - F.col("weak_chosen")) - (F.col("rejected") - F.col("weak_rejected"))
    return (
        numerators.join(F.broadcast(cells), on="numerator", how="inner")
        .join(denominators, on=["prompt_id", "denominator"], how="inner")
        .withColumn("margin", margin)
        .groupBy("numerator", "denominator", "section", "subset")
        .agg(
            F.count_if(F.col("margin") > 0).alias("wins"),
            F.count_if(F.col("margin") == 0).alias("ties"),
            F.count("*").alias("total"),
        )
    )


def find_left_out(
    pairs: DataFrame, answers: DataFrame, rejects: DataFrame, plan: StudyPlan
) -> DataFrame:
    """Find the labelled pairs that count in no cell.

    Args:
        pairs: from `cdr.labelled_pairs.load_pairs`.
        answers: from `cdr.weighing.read_answers`.
        rejects: from `cdr.stages.reject`.
        plan: the study.

    Returns:
        prompt_id, status (`rejected` or `failed`) and reason.
    """
    refused = rejects.groupBy("prompt_id").agg(F.min("reason").alias("refused"))
    errors = F.transform(F.map_values("answers"), lambda answer: answer["error"])
    failed = answers.groupBy("prompt_id").agg(F.max(F.array_max(errors)).alias("error"))
    return (
        pairs.select("prompt_id")
        .join(_whole(answers, plan), on="prompt_id", how="left_anti")
        .join(refused, on="prompt_id", how="left")
        .join(failed, on="prompt_id", how="left")
        .select(
            "prompt_id",
            F.when(F.col("refused").isNotNull(), "rejected").otherwise("failed").alias("status"),
            F.coalesce("refused", "error", F.lit(FailReason.NOT_SCORED.value)).alias("reason"),
        )
    )


def _whole(answers: DataFrame, plan: StudyPlan) -> DataFrame:
    """Give the ids of the labelled pairs that every model has answered on both sides."""
    scored = F.filter(F.map_values("answers"), lambda answer: answer["logprob_sum"].isNotNull())
    total = F.sum(F.size(scored))
    wanted = 2 * len(plan.model_keys)
    return answers.groupBy("prompt_id").agg(total.alias("n")).where(F.col("n") == wanted).drop("n")


class StudyRun(ScoringRun):
    """One study, used as a context manager.

    Args:
        plan: the checked plan.
        warehouse: where the tables are.
    """

    def __init__(self, plan: StudyPlan, warehouse: Warehouse) -> None:
        super().__init__(
            plan.evaluation.annotation,
            warehouse,
            job="pair_study",
            reads="labelled_pairs",
            config=plan.recorded(),
            tags={"cdr.study": plan.config.study},
        )
        self._study = plan

    def finish(
        self, pairs: DataFrame, answers: DataFrame, rejects: DataFrame, work: Work
    ) -> StudyReport:
        """Judge every cell, write, print and record it, and decide the exit code.

        Args:
            pairs: from `cdr.labelled_pairs.load_pairs`.
            answers: from `cdr.weighing.read_answers`.
            rejects: from `cdr.stages.reject`.
            work: what was asked of the models.
        """
        plan, config = self._study, self._study.config
        answers = self.context.staging.write("answers", answers)
        # Cells times subsets, and a row per reason: neither grows with the labelled pairs.
        tallies = [
            CellTally(
                row["numerator"],
                row["denominator"],
                row["section"],
                row["subset"],
                Tally(row["wins"], row["ties"], row["total"]),
            )
            for row in tally_cells(pairs, answers, plan).collect()
        ]
        out = find_left_out(pairs, answers, rejects, plan).groupBy("status", "reason").count()
        left_out = [(row[0], row[1], row[2]) for row in out.collect()]
        report = make_report(
            config,
            plan.evaluation.config.sections_in_use(),
            tallies,
            {reason: count for _, reason, count in sorted(left_out)},
        )
        self._write(report)
        shares = [
            Share(
                "labelled pairs",
                status,
                sum(count for found, _, count in left_out if found == status)
                / max(1, report.pairs),
                limit,
            )
            for status, limit in (
                ("rejected", self._spec.max_rejected_fraction),
                ("failed", self._spec.max_failed_fraction),
            )
        ]
        now, failed = self._counts["logprobs_scored"], self._counts["logprobs_failed"]
        scoring = {"logprobs_asked": work.asked, "logprobs_scored": now, "tokens": work.tokens}
        engines = self._engine_use()
        self._conclude(shares, {**report.counts(), **scoring, **engines.counts()})
        spent_s = {
            "scoring_s": self._spent_s["scoring"],
            "wall_s": time.monotonic() - self._started,
        }
        self._tracker.log_summary({**report.metrics(), **scoring, **engines.metrics(), **spent_s})
        if self.mlflow_run_id is not None:
            with tempfile.TemporaryDirectory() as folder:
                for file in draw_study(report, Path(folder)):
                    self._tracker.log_file(file)
        self._log_outputs((LOGPROBS, REJECTS, STUDY_PAIRS))
        print(
            f"\nstudy {config.study} on {self._plan.dataset}: {len(report.cells)} pairs of "
            f"{len(plan.model_keys)} models, {report.judged:,} of {report.pairs:,} labelled pairs "
            f"judged\nlog-probs: {work.asked:,} asked, {work.asked - now - failed:,} were in the "
            f"store, {now:,} scored in {spent_s['scoring_s']:.0f} s, {failed:,} failed\n\n"
            f"{report.render()}\n"
        )
        for line in engines.render():
            print(line)
        self._remark_on_models()
        if command := self._tracker.ui_command():
            print(f"figures: {command}")
        return report

    def _write(self, report: StudyReport) -> None:
        keys, study = self._study.model_keys, self._study.config.study
        rows = [
            {
                **row,
                "dataset": self._plan.dataset,
                "study": study,
                "numerator_key": keys[row["numerator"]],
                "denominator_key": keys[row["denominator"]],
                "study_key": self._plan.reward.key,
                "score_name": self._study.config.score_name,
                "run_id": self.context.run_id,
            }
            for row in report.rows()
        ]
        names = STUDY_PAIRS.names()
        frame = self._warehouse.spark.createDataFrame(
            [tuple(row[name] for name in names) for row in rows], STUDY_PAIRS.schema()
        )
        self._warehouse.replace(STUDY_PAIRS, frame, dataset=self._plan.dataset, study=study)
