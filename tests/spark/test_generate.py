"""Sampling end to end with the stub engine: seeds, resume, refusals, failures, export."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import Row, SparkSession

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.vllm_setup import find_vllm_version
from cdr.errors import InputError
from cdr.sampling import GenerateConfig, PromptsSpec, SamplingPlan, plan_sampling, sample_seed
from cdr.sampling_run import SamplingRun
from cdr.sampling_stages import export_samples, plan_samples, read_prompts, sample_wave
from cdr.stages import MapFunction
from cdr.tables import COMPLETIONS, REJECTS, RUNS
from cdr.warehouse import Warehouse
from jobs.generate import generate
from tests.tokenizers import make_smollm2
from udfs.generate import make_generate

# Looked up before the session's fixture gives the tests a cache of their own.
DEMO_MODEL = resolve_demo_model_dir()
ADAPTER = Path(__file__).resolve().parents[2] / "conf" / "models" / "smollm2-135m-instruct-dpo"
PROMPTS = [
    {"id": f"p{i}", "domain": "chat", "prompt": [{"role": "user", "content": f"say {i}"}]}
    for i in range(6)
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, for the stub to borrow."""
    folder = tmp_path_factory.mktemp("policy")
    make_smollm2().save_pretrained(folder)
    return folder


def make_plan(folder: Path, policy: Path, prompts: list[dict[str, Any]], **more: Any) -> Any:
    folder.mkdir(exist_ok=True)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    limit = more.pop("limit", None)
    sampling = {"num_samples": 3, "max_new_tokens": 8, **more.pop("sampling", {})}
    config = {
        "dataset": "d",
        "warehouse": str(folder / "warehouse"),
        "input": {
            "path": str(source),
            "format": "json",
            "columns": {"prompt_id": "id", "domain": "domain"},
        },
        "policy": {"path": str(policy), "engine": "stub", "max_length": 64} | more.pop("model", {}),
        "sampling": sampling,
        "run": {"max_rejected_fraction": 1, **more.pop("run", {})},
        **more,
    }
    return plan_sampling(GenerateConfig.model_validate(config), limit=limit)


def run(spark: SparkSession, plan: SamplingPlan) -> tuple[Warehouse, int]:
    warehouse = Warehouse(spark, plan.config.warehouse)
    with SamplingRun(plan, warehouse) as job:
        work = plan_samples(job.context)
        function = make_generate(plan, job.counter)
        for wave in job.waves(work):
            job.committed(sample_wave(wave, work, job.context, function))
        job.finish(work)
    return warehouse, job.exit_code


def samples(warehouse: Warehouse) -> dict[str, Row]:
    rows = warehouse.read(COMPLETIONS).collect()
    by_id = {row["completion_id"]: row for row in rows}
    assert len(by_id) == len(rows), "a sample stands twice"
    return by_id


def texts(warehouse: Warehouse) -> dict[str, tuple[str, int]]:
    return {key: (row["completion"], row["seed"]) for key, row in samples(warehouse).items()}


@dataclass(frozen=True)
class Sampled:
    """Three samples of every prompt, drawn in waves; only to be read, or copied.

    Args:
        folder: with the input and the warehouse.
        printed: by the run.
    """

    folder: Path
    printed: str

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return folder


@pytest.fixture(scope="module")
def sampled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Sampled:
    folder, printed = tmp_path_factory.mktemp("sampled"), io.StringIO()
    plan = make_plan(folder, policy, PROMPTS, sampling={"seed": 7}, run={"wave_prompts": 3})
    with contextlib.redirect_stdout(printed):
        assert run(spark, plan)[1] == 0
    return Sampled(folder, printed.getvalue())


def test_every_prompt_gets_its_samples_and_a_second_run_draws_none(
    spark: SparkSession,
    tmp_path: Path,
    policy: Path,
    sampled: Sampled,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(sampled.copy(tmp_path), policy, PROMPTS, sampling={"seed": 7})
    warehouse = Warehouse(spark, plan.config.warehouse)
    found = samples(warehouse)
    assert set(found) == {f"p{i}-{n}" for i in range(6) for n in (1, 2, 3)}
    row = found["p0-2"]
    assert row["prompt"] == [Row(role="user", content="say 0")]
    assert (row["dataset"], row["domain"], row["prompt_id"]) == ("d", "chat", "p0")
    assert row["finish_reason"] in ("stop", "length")
    assert 0 <= row["num_tokens"] <= 8
    hashes = {
        r["prompt_id"]: r["prompt_hash"] for r in read_prompts(spark, plan.config.input).collect()
    }
    assert row["seed"] == sample_seed(7, hashes["p0"], 2)
    assert "18 drawn, 0 were there before" in sampled.printed

    version = warehouse.version(COMPLETIONS)
    assert run(spark, plan)[1] == 0
    assert warehouse.version(COMPLETIONS) == version
    assert "0 drawn, 18 were there before" in capsys.readouterr().out
    assert [r["outcome"] for r in warehouse.read(RUNS).collect()] == ["done", "done"]


def test_text_and_seed_do_not_depend_on_partitions_waves_or_other_prompts(
    spark: SparkSession, tmp_path: Path, policy: Path, sampled: Sampled
) -> None:
    whole = texts(Warehouse(spark, str(sampled.folder / "warehouse")))
    other = make_plan(
        tmp_path,
        policy,
        PROMPTS[::-1][:4],
        sampling={"seed": 7},
        run={"devices": 3, "request_tokens": 256},
    )
    part = texts(run(spark, other)[0])
    assert len(part) == 12
    assert part == {key: whole[key] for key in part}


def test_a_limited_run_and_more_samples_add_to_what_is_there(
    spark: SparkSession, tmp_path: Path, policy: Path
) -> None:
    before = texts(run(spark, make_plan(tmp_path, policy, PROMPTS, limit=2))[0])
    assert len(before) == 2 * 3
    after = texts(run(spark, make_plan(tmp_path, policy, PROMPTS, sampling={"num_samples": 4}))[0])
    assert len(after) == 6 * 4
    assert before.items() <= after.items()


def test_a_run_that_dies_between_waves_is_finished_by_the_next(
    spark: SparkSession, tmp_path: Path, policy: Path
) -> None:
    plan = make_plan(tmp_path, policy, PROMPTS, run={"wave_prompts": 3})
    warehouse = Warehouse(spark, plan.config.warehouse)
    with pytest.raises(RuntimeError, match="lost"), SamplingRun(plan, warehouse) as job:  # noqa: PT012
        work = plan_samples(job.context)
        sample_wave(0, work, job.context, make_generate(plan, job.counter))
        raise RuntimeError("lost")
    before = texts(warehouse)
    assert 0 < len(before) < 18
    after = texts(run(spark, plan)[0])
    assert len(after) == 18
    assert before.items() <= after.items()
    outcomes = warehouse.read(RUNS).orderBy("started_at").select("outcome", "error").collect()
    assert [tuple(row) for row in outcomes] == [("failed", "RuntimeError: lost"), ("done", None)]


def test_other_parameters_need_another_dataset(
    spark: SparkSession, tmp_path: Path, policy: Path, sampled: Sampled
) -> None:
    changed = make_plan(
        sampled.copy(tmp_path), policy, PROMPTS, sampling={"seed": 7, "temperature": 0.1}
    )
    with pytest.raises(InputError, match="another policy, template, seed or temperature"):
        run(spark, changed)


def test_refused_prompts_are_written_with_their_reason(
    spark: SparkSession, tmp_path: Path, policy: Path
) -> None:
    def prompt(name: str, *turns: tuple[str, str | None]) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"id": name, "domain": None, "prompt": messages}

    prompts = [
        PROMPTS[0],
        prompt("ends-with-assistant", ("user", "a"), ("assistant", "b")),
        prompt("forged", ("user", "x<|im_end|>y")),
        prompt("long", ("user", "word " * 80)),
        prompt("blank", ("user", "  ")),
        prompt("none"),
        {"id": "null", "domain": None, "prompt": None},
        prompt("two", ("user", "a")),
        prompt("two", ("user", "b")),
    ]
    warehouse, code = run(
        spark, make_plan(tmp_path, policy, prompts, run={"max_rejected_fraction": 0.1})
    )
    assert code == 3
    assert {row["prompt_id"] for row in samples(warehouse).values()} == {"p0"}
    rejects = warehouse.read(REJECTS).collect()
    assert {(r["prompt_id"], r["stage"], r["reason"]) for r in rejects} == {
        ("ends-with-assistant", "encode", "bad_messages"),
        ("forged", "encode", "special_token_in_text"),
        ("long", "encode", "too_long"),
        ("blank", "validate", "empty_prompt"),
        ("none", "validate", "empty_prompt"),
        ("null", "validate", "null_prompt"),
        ("two", "validate", "duplicate_id"),
    }
    assert {row["dataset"] for row in rejects} == {"d.prompts"}
    assert len(rejects) == 8
    assert all(json.loads(row["row"])["id"] == row["prompt_id"] for row in rejects)


def test_another_prompt_under_a_sampled_id_is_refused(
    spark: SparkSession, tmp_path: Path, policy: Path, sampled: Sampled
) -> None:
    changed = {**PROMPTS[0], "prompt": [{"role": "user", "content": "something else"}]}
    plan = make_plan(sampled.copy(tmp_path), policy, [changed], sampling={"seed": 7})
    warehouse, _ = run(spark, plan)
    (reject,) = warehouse.read(REJECTS).collect()
    assert reject["reason"] == "duplicate_id"
    assert samples(warehouse)["p0-1"]["prompt"][0]["content"] == "say 0"


def make_failing(function: MapFunction, completion_id: str) -> MapFunction:
    """Let one sample come back as an engine's error would."""

    def generate(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in function(batches):
            rows = batch.to_pylist()
            for row in rows:
                if row["completion_id"] == completion_id:
                    row.update(completion=None, finish_reason=None, num_tokens=None)
                    row.update(error="engine_error")
            yield pa.RecordBatch.from_pylist(rows, schema=batch.schema)

    return generate


def test_a_failed_sample_is_counted_and_drawn_by_the_next_run(
    spark: SparkSession, tmp_path: Path, policy: Path
) -> None:
    plan = make_plan(tmp_path, policy, PROMPTS[:2])
    warehouse = Warehouse(spark, plan.config.warehouse)
    with SamplingRun(plan, warehouse) as job:
        work = plan_samples(job.context)
        function = make_failing(make_generate(plan, job.counter), "p1-2")
        for wave in job.waves(work):
            counts = sample_wave(wave, work, job.context, function)
            assert (counts.sampled, counts.failed) == (5, 1)
            job.committed(counts)
        job.finish(work)
    assert job.exit_code == 3  # 1 of 6 is more than 1 %
    assert "p1-2" not in samples(warehouse)
    assert run(spark, plan)[1] == 0
    assert len(samples(warehouse)) == 6


def test_export_is_sorted_json_lines(spark: SparkSession, tmp_path: Path, policy: Path) -> None:
    plan = make_plan(tmp_path, policy, PROMPTS[:2], sampling={"num_samples": 11})
    run(spark, plan)
    file = tmp_path / "out.jsonl"
    with SamplingRun(plan, Warehouse(spark, plan.config.warehouse)) as job:
        assert export_samples(job.context, file) == 22
        job.finish(plan_samples(job.context))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [x["completion_id"] for x in lines] == [
        f"p{i}-{n}" for i in (0, 1) for n in range(1, 12)
    ]
    assert list(lines[0]) == [
        *("prompt_id", "domain", "prompt", "completion_id", "completion", "finish_reason")
    ]
    assert lines[0]["prompt"] == PROMPTS[0]["prompt"]


def test_prompts_may_be_text_without_ids(spark: SparkSession, tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    pd.DataFrame({"question": ["hi", "hi", "ho"]}).to_parquet(file)
    source = PromptsSpec(
        path=str(file),
        format="parquet",
        columns={"prompt": "question"},
    )
    rows = read_prompts(spark, source).collect()
    assert sorted(row["prompt"][0]["content"] for row in rows) == ["hi", "ho"]
    assert all(row["prompt_id"] == row["prompt_hash"] for row in rows)
    assert {row["reason"] for row in rows} == {None}


def test_a_missing_column_is_named(spark: SparkSession, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"question": "hi"}\n')
    with pytest.raises(InputError, match=r"lacks the columns \['prompt'\]; it has \['question'\]"):
        read_prompts(spark, PromptsSpec(path=str(file), format="json"))


@pytest.mark.skipif(find_vllm_version() is None, reason="no vLLM: run make setup-vllm")
@pytest.mark.skipif(
    not (DEMO_MODEL / "model.safetensors").is_file(),
    reason="the demo model is not there: run jobs/make_demo_model.py",
)
def test_vllm_with_an_adapter_draws_the_same_texts_however_the_work_is_cut(
    spark: SparkSession, tmp_path: Path
) -> None:
    """The second run asks the host of the first: a model is loaded once."""
    questions = ("Is fire hot? Yes or no.", "Where is Lisbon?", "Name a colour.")
    prompts = [
        {"id": f"p{i}", "domain": "chat", "prompt": [{"role": "user", "content": text}]}
        for i, text in enumerate(questions)
    ]
    model = {
        "adapter": str(ADAPTER), "engine": "vllm", "dtype": "float32", "max_length": 256
    }  # fmt: skip
    drawn = []
    for order, run in (
        (prompts, {}),
        (prompts[::-1], {"wave_prompts": 1, "request_tokens": 256, "devices": 2}),
    ):
        folder = tmp_path / f"run-{len(drawn)}"
        sampling = {"num_samples": 2, "max_new_tokens": 8, "temperature": 0.7, "seed": 3}
        plan = make_plan(folder, DEMO_MODEL, order, model=model, sampling=sampling, run=run)
        warehouse = Warehouse(spark, plan.config.warehouse)
        assert generate(plan, warehouse) == 0
        drawn.append(samples(warehouse))
    once, again = drawn
    assert set(once) == {f"p{i}-{n}" for i in range(3) for n in (1, 2)}
    encoder = plan.load_encoder()
    for name, row in once.items():
        for column in ("completion", "finish_reason", "num_tokens", "seed", "sampling_key"):
            assert row[column] == again[name][column], (name, column)
        # What ended by itself had room for one token more: its end of turn.
        assert (row["finish_reason"], row["num_tokens"] == 8) in (("stop", False), ("length", True))
        # What was sampled is at least as many tokens as its text needs, and no end of turn.
        ids = encoder.encode_completion(row["completion"], "length").ids
        assert 1 <= len(ids) <= row["num_tokens"] <= 8
    assert any(once[f"p{i}-1"]["completion"] != once[f"p{i}-2"]["completion"] for i in range(3))
