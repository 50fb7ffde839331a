"""The work list holds what `logprobs` lacks, once; waves cover it, whole and without overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cdr.config import AnnotateConfig, RunSpec
from cdr.encoding import EncodingPlan
from cdr.engines.base import EngineSpec
from cdr.plan import AnnotationPlan, RewardPlan
from cdr.progress import TaskCounter
from cdr.scoring import Wave, Work, plan_waves, plan_work, score_wave
from cdr.stages import Context
from cdr.staging import Staging
from cdr.tables import LOGPROBS
from cdr.warehouse import Warehouse
from cdr.waves import BUCKETS, BucketRange, cut_tasks
from udfs.encode import ENCODED_DDL

STRONG, WEAK = (EngineSpec(name=name, engine="stub", path=name) for name in ("strong", "weak"))


def make_context(spark: SparkSession, root: Path, **run: Any) -> Context:
    config = AnnotateConfig.model_validate(
        {
            "dataset": "d",
            "warehouse": str(root),
            "input": {"path": "in", "format": "json"},
            "reward": {
                "name": "r",
                "models": {
                    "strong": {"path": "s", "engine": "stub"},
                    "weak": {"path": "w", "engine": "stub"},
                },
                "routing": {"mode": "none"},
            },
            "run": run,
        }
    )
    reward = RewardPlan(
        spec=config.reward,
        models={},
        pack=None,
        encoding=EncodingPlan((), (), None, 0, "reject", True, False),
        engines=(STRONG, WEAK),
        route=None,
        key="k",
    )
    plan = AnnotationPlan(config=config, dataset="d", limit=None, reward=reward)
    return Context(
        plan, Warehouse(spark, str(root)), Staging(spark, str(root), "r"), "r", None, 2, 2
    )


def encoded(spark: SparkSession, prompts: dict[str, list[list[int]]]) -> DataFrame:
    """One row per prompt; its prefix is the name's bytes."""
    rows = []
    for name, completions in prompts.items():
        prompt_hash = sha256(name.encode()).hexdigest()
        views = [
            (
                engine.name,
                "conditioned",
                name.encode(),
                list(name.encode()),
                None,
                [
                    (f"{name}{i}", bytes(ids), ids, False, len(ids))
                    for i, ids in enumerate(completions)
                ],
            )
            for engine in (STRONG, WEAK)
        ]
        rows.append((f"id-{name}", prompt_hash, None, None, False, views, []))
    return spark.createDataFrame(rows, ENCODED_DDL)


def fake_score(
    engines: tuple[EngineSpec, ...], run: RunSpec, counter: TaskCounter, counted: str
) -> Any:
    def score(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for frame in frames:
            rows = [
                {
                    "model_key": row["model_key"],
                    "prefix_hash": row["prefix_hash"],
                    "completion_hash": digest,
                    "logprob_sum": None if 99 in ids else -float(sum(ids)),
                    "num_tokens": len(ids),
                    "num_prefix_tokens": len(row["prefix_ids"]),
                    "token_logprobs": None,
                    "engine_version": "fake",
                    "error": "engine_error" if 99 in ids else None,
                }
                for row in frame.to_dict("records")
                for digest, ids in zip(
                    row["completion_hashes"], row["completions_ids"], strict=True
                )
            ]
            yield pd.DataFrame(rows)

    return score


def score_all(spark: SparkSession, context: Context, rows: DataFrame) -> tuple[int, int, int]:
    """Plan and score; give waves, scored and failed."""
    work = plan_work(rows, context)
    waves = plan_waves(work, context)
    return len(waves), *score(spark, context, work, waves)


def score(
    spark: SparkSession, context: Context, work: Work, waves: Sequence[Wave]
) -> tuple[int, int]:
    """Score what was planned; give scored and failed."""
    counter = TaskCounter.create(spark)
    results = [score_wave(wave, work, context, fake_score, counter) for wave in waves]
    return sum(r.committed for r in results), sum(r.failed for r in results)


def test_identical_questions_are_asked_once(spark: SparkSession, tmp_path: Path) -> None:
    context = make_context(spark, tmp_path)
    rows = encoded(spark, {"a": [[1, 2], [1, 2], [3]]})
    twice = rows.unionByName(rows.selectExpr("'other' AS prompt_id", "* EXCEPT (prompt_id)"))
    work = plan_work(twice, context)
    # Two models × the completions [1, 2] and [3]; a prefix of one token and 2 + 1 behind it.
    assert work.asked == 4
    assert work.completions == 4
    assert work.tokens == 2 * (1 + 2 + 1)


def test_what_is_in_the_store_is_not_asked_again_and_what_failed_is(
    spark: SparkSession, tmp_path: Path
) -> None:
    context = make_context(spark, tmp_path)
    assert score_all(spark, context, encoded(spark, {"a": [[1], [99]]})) == (1, 2, 2)
    more = encoded(spark, {"a": [[1], [99], [4]], "b": [[5]]})
    work = plan_work(more, replace(context, run_id="r2"))
    assert (work.asked, work.completions) == (8, 6)
    assert score_all(spark, context, more) == (1, 4, 2)
    stored = context.warehouse.read(LOGPROBS)
    assert stored.count() == stored.select(*LOGPROBS.key).distinct().count() == 6


@pytest.mark.parametrize("placement", ["colocated", "sequential"])
def test_waves_cover_the_work_whole_and_without_overlap(
    spark: SparkSession, tmp_path: Path, placement: str
) -> None:
    context = make_context(spark, tmp_path, placement=placement, wave_tokens=60, task_tokens=20)
    names = [f"{first}{second}" for first in "abcdefgh" for second in "xyz"]
    rows = encoded(spark, {name: [[1, 2, 3], [4]] for name in names})
    work = plan_work(rows, context)
    waves = plan_waves(work, context)
    assert len(waves) > 3
    assert sum(wave.buckets.tokens for wave in waves) == work.tokens == len(names) * 2 * (2 + 4)
    loaded = [[engine.name for engine in wave.engines] for wave in waves]
    if placement == "sequential":
        assert loaded == sorted(loaded), "a model is loaded once"
        assert all(len(names) == 1 for names in loaded)
    else:
        assert all(names == ["strong", "weak"] for names in loaded)
    assert score(spark, context, work, waves) == (work.completions, 0)
    assert context.warehouse.read(LOGPROBS).count() == work.completions == len(names) * 4


def test_a_prefix_that_all_prompts_share_does_not_gather_them_in_one_row(
    spark: SparkSession, tmp_path: Path
) -> None:
    context = make_context(spark, tmp_path)
    rows = encoded(spark, {"a": [[1], [9, 99]], "b": [[2], [9, 99]], "c": [[3]]})
    views = "transform(views, v -> named_struct('model_key', v.model_key, 'condition', "
    views += "'unconditional', 'prefix_hash', binary('same'), 'prefix_ids', array(7), "
    views += "'candidates', v.candidates)) AS views"
    shared = rows.selectExpr("* EXCEPT (views)", views)
    work = plan_work(shared, context)
    assert work.rows.count() == 6
    # Two models × [1], [2], [3] and the [9, 99] that two prompts share: it is asked once, so that
    # its failure stands once too.
    assert (work.asked, work.completions) == (8, 8)
    assert score_all(spark, context, shared) == (1, 6, 2)
    assert plan_work(shared, replace(context, run_id="r2")).completions == 2


def test_prompts_that_begin_alike_lie_in_few_tasks_and_all_of_a_prompt_in_one(
    spark: SparkSession, tmp_path: Path
) -> None:
    context = make_context(spark, tmp_path)
    names = [f"{first}{second}" for first in "abcdefghijkl" for second in "wxyz"]
    rows = encoded(spark, {name: [[1, 2]] for name in names})
    # As drawn: four exemplars, by hash and not by the prompt's own text.
    drawn = rows.selectExpr(
        "* EXCEPT (instruction_id, exemplar_id)",
        "'i' AS instruction_id",
        "cast(conv(substring(prompt_hash, 9, 2), 16, 10) % 4 AS string) AS exemplar_id",
    )
    work = plan_work(drawn, context)
    asked = cut_tasks(work.rows, BucketRange(0, BUCKETS, 6_000_000), context, "head", "prompt_hash")
    found = asked.select("head", "prompt_hash", F.spark_partition_id().alias("task")).collect()
    assert len(found) == 2 * len(names)
    tasks, heads = {row["task"] for row in found}, {row["head"] for row in found}
    assert (len(tasks), len(heads)) == (3, 4)
    # Cut by hash, each of the three tasks would have all four.
    assert len({(row["task"], row["head"]) for row in found}) <= len(tasks) + len(heads) - 1
    assert len({(row["task"], row["prompt_hash"]) for row in found}) == len(names)
