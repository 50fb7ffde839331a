"""Verdicts of a judge behind an API: what `verdicts` lacks is asked in waves, and stored at once.

The counterpart of `cdr.scoring` for a judge that is asked in text. A question (a pair of answers in
one order) is keyed by its content, so that no question is ever paid for twice, whichever run asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cdr.api_judge import read_key, refuses_everything
from cdr.engines.base import EngineSpec
from cdr.estimate import Workload
from cdr.judge_encoding import CHARS_PER_TOKEN
from cdr.progress import TaskCounter
from cdr.reward_config import ApiSpec
from cdr.scoring import Wave, Work
from cdr.stages import Context, MapFunction
from cdr.tables import VERDICTS
from cdr.waves import WaveResult, answer_wave, bucket_column, cut_buckets

ASKED_DDL = (
    "model_key string, prefix_hash binary, verdict string, reason string, "
    "prompt_tokens int, answer_tokens int, cost_usd double, answered_by string, error string, "
    "ends_run string"
)
"""Schema of what an asking function yields, one row per question; `error` null when answered.

`ends_run`, the same in a batch's rows, is why no question is answered any more; else null."""


def plan_questions(encoded: DataFrame, run: Context) -> Work:
    """Find what has to be asked: the encoded questions less those with an answer.

    Args:
        encoded: from `cdr.stages.encode`.
        run: the run.
    """
    (engine,) = run.plan.reward.engines
    questions = (
        encoded.select("prompt_hash", F.explode("views").alias("v"))
        .groupBy("v.prefix_hash")
        .agg(F.min("prompt_hash").alias("prompt_hash"), F.first("v.question").alias("question"))
    )
    known = run.warehouse.read(VERDICTS).where(F.col("model_key") == engine.name)
    rows = questions.join(
        known.select("prefix_hash").distinct().withColumn("is_known", F.lit(True)),
        on="prefix_hash",
        how="left",
    ).select(
        F.lit(engine.name).alias("model_key"),
        bucket_column("prompt_hash").alias("bucket"),
        "prompt_hash",
        "prefix_hash",
        "question",
        F.ceil(F.length("question") / CHARS_PER_TOKEN).alias("prefix_tokens"),
        F.lit(1).cast("bigint").alias("completion_tokens"),
        F.col("is_known").isNull().alias("is_missing"),
    )
    written = run.staging.write(
        "work", rows.repartitionByRange("bucket").sortWithinPartitions("bucket")
    )
    left = written.where("is_missing")
    asked = written.count()  # of what was just written
    # At most BUCKETS rows; a prompt lies in one bucket.
    loads = left.groupBy("bucket").agg(
        F.count("*").alias("questions"),
        F.count_distinct("prompt_hash").alias("prompts"),
        F.sum("prefix_tokens").alias("tokens"),
    ).collect()  # fmt: skip
    missing = sum(load["questions"] for load in loads)
    workload = Workload(
        prompts=sum(load["prompts"] for load in loads),
        completions=missing,
        prefix_tokens=sum(load["tokens"] for load in loads),
        completion_tokens=missing,
    )
    bucket_tokens = {load["bucket"]: load["tokens"] + load["questions"] for load in loads}
    return Work(
        rows=left,
        asked=asked,
        missing={engine.name: workload} if missing else {},
        bucket_tokens={engine.name: bucket_tokens} if missing else {},
    )


def plan_question_waves(work: Work, run: Context) -> list[Wave]:
    """Cut the questions into waves: a killed run has to pay for one again at most.

    Args:
        work: from `plan_questions`.
        run: the run.
    """
    (engine,) = run.plan.reward.engines
    api = _endpoint(run)
    # At most BUCKETS rows.
    rows = work.rows.groupBy("bucket").count().collect()
    counts: dict[int, int] = dict(rows)
    buckets = cut_buckets(counts, api.wave_questions)
    return [Wave(number, (engine,), found) for number, found in enumerate(buckets)]


def ask_wave(
    wave: Wave,
    work: Work,
    run: Context,
    make_ask: Callable[[EngineSpec, ApiSpec, int, TaskCounter], MapFunction],
    counter: TaskCounter,
) -> WaveResult:
    """Ask one wave's questions and append the answers to `verdicts` in one commit.

    Args:
        wave: from `plan_question_waves`.
        work: from `plan_questions`.
        run: the run.
        make_ask: `udfs.ask.make_ask`.
        counter: where tasks count what they have done.

    Raises:
        ModelError: the endpoint refuses whatever it is asked; what it answered before is kept.
        SetupError: the endpoint's key is not in the environment.
    """
    (engine,) = wave.engines
    api = _endpoint(run)
    read_key(api)  # known missing before any task runs
    # The endpoint's limits are shared out among tasks, so there are no more than run at a time.
    num_tasks = max(1, min(api.concurrency, run.num_tasks))
    questions = (
        work.rows.where(wave.buckets.holds(F.col("bucket")))
        .repartition(num_tasks, "prompt_hash")
        .sortWithinPartitions("prompt_hash")
        .select("model_key", "prefix_hash", "question", "prefix_tokens")
    )
    staged_as = f"scored/wave={wave.number}"
    result = answer_wave(
        questions,
        make_ask(engine, api, num_tasks, counter),
        ASKED_DDL,
        run,
        engines=(),
        table=VERDICTS,
        staged_as=staged_as,
    )
    if result.failed:
        ended = run.staging.read(staged_as).where("ends_run IS NOT NULL").first()
        if ended is not None:
            raise refuses_everything(
                f"{ended.ends_run} ({result.committed:,} of this wave's answers are kept)", api
            )
    return result


def _endpoint(run: Context) -> ApiSpec:
    api = run.plan.reward.spec.judge_api
    assert api is not None  # questions are planned for no other reward
    return api


@dataclass(frozen=True)
class JudgeCost:
    """What a run's questions to a judge behind an API took.

    Args:
        questions: those with an answer.
        prompt_tokens: tokens read, where the endpoint counted them.
        answer_tokens: tokens written, likewise.
        priced: questions with a price.
        cost_usd: their price; None where no question has one.
    """

    questions: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    priced: int = 0
    cost_usd: float | None = None

    @classmethod
    def read(cls, run: Context) -> JudgeCost:
        """Sum up what a run has stored; nothing for a reward of another kind."""
        if not run.plan.reward.spec.is_asked_by_api:
            return cls()
        rows = run.warehouse.read(VERDICTS).where(F.col("run_id") == run.run_id)
        found = rows.agg(
            F.count("*"),
            F.coalesce(F.sum("prompt_tokens"), F.lit(0)),
            F.coalesce(F.sum("answer_tokens"), F.lit(0)),
            F.count("cost_usd"),
            F.sum("cost_usd"),
        ).first()
        return cls() if found is None else cls(*found)

    def counts(self) -> dict[str, int]:
        """Give the whole numbers, for `runs`; empty where nothing was asked."""
        if not self.questions:
            return {}
        return {
            "judge_questions": self.questions,
            "judge_prompt_tokens": self.prompt_tokens,
            "judge_answer_tokens": self.answer_tokens,
        }

    def metrics(self) -> dict[str, float]:
        """Give all numbers, for MLflow: a price is that of `judge_questions_priced` questions."""
        if self.cost_usd is None:
            return {**self.counts()}
        return {
            **self.counts(),
            "judge_cost_usd": self.cost_usd,
            "judge_questions_priced": self.priced,
        }

    def render(self) -> str:
        """Say it in one line."""
        if self.cost_usd is None:
            price = "cost not known (no prices in the config, or no token counts of the endpoint)"
        else:
            price = f"{self.cost_usd:.4f} USD"
            if self.priced < self.questions:
                price += f" for {self.priced:,} of them (of the others no tokens were counted)"
        return (
            f"judge: {self.questions:,} questions answered, {self.prompt_tokens:,} tokens read, "
            f"{self.answer_tokens:,} written, {price}"
        )
