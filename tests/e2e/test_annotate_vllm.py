"""The annotate job with real models on vLLM and on transformers: two empty stores, one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.vllm_setup import find_vllm_version
from tests.e2e.conftest import ROOT, Job

PROMPTS = 6  # of four candidates each
# Float32 engines agree to 1e-3 nats per token (tests/real/test_vllm_engine.py).
NOISE_PER_TOKEN = 1e-3

pytestmark = [
    pytest.mark.skipif(find_vllm_version() is None, reason="no vLLM: run make setup-vllm"),
    pytest.mark.skipif(
        not (resolve_demo_model_dir() / "model.safetensors").is_file(),
        reason="the demo model is not there: run jobs/make_demo_model.py",
    ),
]


def annotate(warehouse: Path, engine: str) -> Job:
    """Run the demo's first prompts with one engine, in float32, on an empty warehouse."""
    job = Job(ROOT / "conf/annotate/demo.yaml", warehouse, warehouse.parent / "unused.jsonl")
    changes = [f"engine={engine}", f"warehouse={warehouse}", "tracking.enabled=false"]
    changes.append("report.enabled=false")
    changes += [f"reward.models.{role}.dtype=float32" for role in ("strong", "weak", "router")]
    arguments = [argument for change in changes for argument in ("--set", change)]
    process = job.start("--limit", str(PROMPTS), *arguments)
    code, output = job.end(process, timeout_s=900)
    assert code == 0, output
    return job


@pytest.mark.timeout(1800)
def test_vllm_gives_the_pairs_of_transformers(tmp_path: Path) -> None:
    jobs = {engine: tmp_path / engine for engine in ("transformers", "vllm")}
    rewards: dict[str, dict[str, dict[str, Any]]] = {}
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for engine, warehouse in jobs.items():
        warehouse.mkdir()
        job = annotate(warehouse / "tables", engine)
        rewards[engine] = {row["completion_id"]: row for row in job.rows("rewards")}
        pairs[engine] = {row["prompt_id"]: row for row in job.rows("preferences")}
        # Each engine scored every row itself.
        logprobs = job.rows("logprobs")
        assert len(logprobs) == 2 * len(rewards[engine]) == 2 * 4 * PROMPTS
        assert all(row["engine_version"].startswith(engine) for row in logprobs)
        assert {row["status"] for row in rewards[engine].values()} == {"ok"}

    assert rewards["vllm"].keys() == rewards["transformers"].keys()
    for completion_id, row in rewards["vllm"].items():
        other = rewards["transformers"][completion_id]
        assert row["domain"] == other["domain"]
        assert row["num_tokens"] == other["num_tokens"]
        noise = NOISE_PER_TOKEN * row["num_tokens"]
        for column in ("strong_logprob", "weak_logprob"):
            assert row[column] == pytest.approx(other[column], abs=noise)

    assert pairs["vllm"].keys() == pairs["transformers"].keys()
    changed = 0
    for prompt_id, pair in pairs["vllm"].items():
        other = pairs["transformers"][prompt_id]
        sides = ("chosen", "rejected")
        if any(pair[side] != other[side] for side in sides):
            changed += 1
            of_prompt = [r for r in rewards["transformers"].values() if r["prompt_id"] == prompt_id]
            best, second = sorted((row["reward"] for row in of_prompt), reverse=True)[:2]
            longest = max(row["num_tokens"] for row in of_prompt)
            # Two rewards of two log-probs each.
            assert best - second < 4 * NOISE_PER_TOKEN * longest
    assert changed <= PROMPTS // 3
    print(f"{changed} of {PROMPTS} pairs differ, their margins being within noise")
