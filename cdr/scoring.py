"""Scoring in waves: ask the models what `logprobs` lacks, and commit the answers atomically.

The work list is computed once per run: encoded prompts less what the table holds. Prompts fall
into buckets by hash; a wave is a range of buckets, scored and then appended in one Delta commit.
A run killed at any instant loses at most the wave in flight, and the next run's work list holds
exactly what is not committed, new rows of old buckets included.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from cdr.config import RunSpec
from cdr.engines.base import EngineSpec
from cdr.estimate import Workload
from cdr.progress import TaskCounter
from cdr.stages import Context, MapFunction
from cdr.tables import LOGPROBS
from cdr.waves import BucketRange, WaveResult, answer_wave, bucket_column, cut_buckets, cut_tasks

SCORED_DDL = (
    "model_key string, prefix_hash binary, completion_hash binary, logprob_sum double, "
    "num_tokens int, num_prefix_tokens int, token_logprobs array<float>, engine_version string, "
    "error string"
)
"""Schema of what a scoring function yields, one row per completion; `error` null when scored."""


@dataclass(frozen=True)
class Work:
    """What is asked of the models, and what `logprobs` lacks of it.

    Args:
        rows: one row per model and prefix with something missing: model_key, bucket, prompt_hash,
            head, prefix_hash, prefix_ids, completion_hashes, completions_ids and their numbers. A
            `head` names the instruction and exemplar that prefixes of the prompt begin with.
        asked: log-probs the reward needs; identical ones count once.
        missing: what each model has to read, by model key.
        bucket_tokens: the tokens of that by model key and bucket.
    """

    rows: DataFrame
    asked: int
    missing: Mapping[str, Workload]
    bucket_tokens: Mapping[str, Mapping[int, int]]

    @property
    def completions(self) -> int:
        """Log-probs to compute."""
        return sum(workload.completions for workload in self.missing.values())

    @property
    def counted(self) -> str:
        """Key of the model with the most prompts to read: progress counts its prompts."""
        return max(sorted(self.missing), key=lambda key: self.missing[key].prompts)

    @property
    def tokens(self) -> int:
        """Tokens to be read by all models, each prefix once."""
        return sum(workload.tokens for workload in self.missing.values())


def plan_work(encoded: DataFrame, run: Context) -> Work:
    """Find what has to be scored: the encoded prompts less what `logprobs` holds.

    A question (model, prefix, completion) that several prompts share, as all do under an
    unconditional term, is asked once, for the prompt whose hash comes first. Questions are grouped
    by prompt, so that no prefix gathers the whole dataset in one row. Written once, sorted by
    bucket, so that a wave reads only its own files.

    Args:
        encoded: from `cdr.stages.encode`.
        run: the run.
    """
    models = F.col("model_key").isin([engine.name for engine in run.plan.reward.engines])
    head = F.concat_ws(" ", "instruction_id", "exemplar_id").alias("head")
    views = encoded.select("prompt_hash", head, F.explode("views").alias("v")).select(
        "prompt_hash", "head", "v.model_key", "v.prefix_hash", "v.prefix_ids", "v.candidates"
    )
    per_prompt = ["model_key", "prefix_hash", "prompt_hash"]
    # Hashes alone are taken apart and joined; the ids, which are most of the bytes, stay put.
    asked = (
        views.select(*per_prompt, F.explode("candidates.completion_hash").alias("completion_hash"))
        .groupBy(*LOGPROBS.key)
        .agg(F.min("prompt_hash").alias("prompt_hash"))
    )
    done = run.warehouse.read(LOGPROBS).where(models).select(*LOGPROBS.key).distinct()
    sorted_out = (
        asked.join(done.withColumn("is_done", F.lit(True)), on=list(LOGPROBS.key), how="left")
        .groupBy(*per_prompt)
        .agg(
            F.count("*").alias("num_asked"),
            # Nulls are not collected.
            F.collect_list(F.when(F.col("is_done").isNull(), F.col("completion_hash"))).alias(
                "wanted"
            ),
        )
    )
    completions = F.transform(
        "candidates", lambda c: F.struct(c["completion_hash"].alias("hash"), c["ids"].alias("ids"))
    )
    # A prompt may stand under several ids, a completion several times in it.
    prompts = views.groupBy(*per_prompt).agg(
        F.first("head").alias("head"),
        F.first("prefix_ids").alias("prefix_ids"),
        F.array_distinct(F.flatten(F.collect_list(completions))).alias("completions"),
    )
    wanted = F.filter("completions", lambda c: F.array_contains(F.col("wanted"), c["hash"]))
    rows = (
        prompts.join(sorted_out, on=per_prompt, how="inner")
        .withColumn("missing", wanted)
        .select(
            "model_key",
            bucket_column("prompt_hash").alias("bucket"),
            "prompt_hash",
            "head",
            "prefix_hash",
            "prefix_ids",
            F.transform("missing", lambda c: c["hash"]).alias("completion_hashes"),
            F.transform("missing", lambda c: c["ids"]).alias("completions_ids"),
            "num_asked",
            F.size("missing").alias("num_missing"),
            F.size("prefix_ids").cast("bigint").alias("prefix_tokens"),
            F.aggregate(
                "missing", F.lit(0).cast("bigint"), lambda total, c: total + F.size(c["ids"])
            ).alias("completion_tokens"),
        )
    )
    written = run.staging.write(
        "work", rows.repartitionByRange("bucket").sortWithinPartitions("bucket")
    )
    is_left = F.col("num_missing") > 0
    sums = ("num_missing", "prefix_tokens", "completion_tokens")
    # At most BUCKETS rows per model.
    sizes = (
        written.groupBy("model_key", "bucket")
        .agg(
            F.sum("num_asked").alias("num_asked"),
            F.count_if(is_left).alias("prompts"),
            *[F.sum(F.when(is_left, F.col(name)).otherwise(0)).alias(name) for name in sums],
        )
        .collect()
    )
    missing: defaultdict[str, Workload] = defaultdict(lambda: Workload(0, 0, 0, 0))
    bucket_tokens: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for row in sizes:
        if row["prompts"]:
            load = Workload(row["prompts"], *[row[name] for name in sums])
            missing[row["model_key"]] += load
            bucket_tokens[row["model_key"]][row["bucket"]] = load.tokens
    return Work(
        rows=written.where(is_left),
        asked=sum(row["num_asked"] for row in sizes),
        missing=dict(missing),
        bucket_tokens=dict(bucket_tokens),
    )


@dataclass(frozen=True)
class Wave:
    """A range of buckets to score with some of the models.

    Args:
        number: from 0, over the whole run.
        engines: models loaded for this wave.
        buckets: the range; its tokens are those to be read, prefixes once.
    """

    number: int
    engines: tuple[EngineSpec, ...]
    buckets: BucketRange


def plan_waves(work: Work, run: Context) -> list[Wave]:
    """Cut the work into waves of about `run.wave_tokens` tokens.

    Colocated: every wave asks all models. Sequential: all waves of one model, then of the next,
    so that each is loaded once.
    """
    spec, engines = run.plan.config.run, run.plan.reward.engines
    sets = [engines] if spec.placement == "colocated" else [(engine,) for engine in engines]
    waves: list[Wave] = []
    for loaded in sets:
        by_bucket: Counter[int] = Counter()
        for engine in loaded:
            by_bucket.update(work.bucket_tokens.get(engine.name, {}))
        for buckets in cut_buckets(by_bucket, spec.wave_tokens):
            waves.append(Wave(len(waves), loaded, buckets))
    return waves


def score_wave(
    wave: Wave,
    work: Work,
    run: Context,
    make_score: Callable[[tuple[EngineSpec, ...], RunSpec, TaskCounter, str], MapFunction],
    counter: TaskCounter,
) -> WaveResult:
    """Score one wave and append it to `logprobs` in one commit.

    A prompt's questions go to one task, and prompts with the same instruction and exemplar to the
    same task as far as it reaches: each task reads those anew. They are sorted so that neighbours
    share the longest prefix, and all models of a prompt are asked in turn, so that none waits for
    the other to get through the task.

    Args:
        wave: from `plan_waves`.
        work: from `plan_work`.
        run: the run.
        make_score: `udfs.score.make_score`.
        counter: where tasks count what they have done.
    """
    spec = run.plan.config.run
    names = [engine.name for engine in wave.engines]
    # A prompt's place among the others is its longest prefix in the tokens of one model: the shared
    # text of domain and exemplar leads in all of them.
    longest_of_one_model = F.struct("model_key", -F.size("prefix_ids"))
    prompt = Window.partitionBy("head", "prompt_hash")
    asked = work.rows.where(F.col("model_key").isin(names))
    questions = (
        cut_tasks(asked, wave.buckets, run, "head", "prompt_hash")
        # The window finds its rows where they are: no second shuffle.
        .withColumn("place", F.min_by("prefix_ids", longest_of_one_model).over(prompt))
        .sortWithinPartitions("place", "model_key")
        .select("model_key", "prefix_hash", "prefix_ids", "completion_hashes", "completions_ids")
    )
    return answer_wave(
        questions,
        make_score(wave.engines, spec, counter, work.counted),
        SCORED_DDL,
        run,
        engines=wave.engines,
        table=LOGPROBS,
        staged_as=f"scored/wave={wave.number}",
    )
