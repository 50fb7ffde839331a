"""The annotate job with real models on vLLM: the numbers of transformers, and nothing left behind.

One store is filled by transformers, another one by vLLM in two runs that are disturbed: the first
is killed with its models loaded, the second has its engine core killed under a request.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import pytest

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.processes import is_alive
from cdr.engines.vllm_setup import find_vllm_version
from tests.e2e.conftest import ROOT, Job, descendants

# The demo's 56 prompts, each with the first words of its four completions: real text in all
# domains that a slow CPU reads in a minute.
PROMPTS, CANDIDATES, WORDS = 56, 4, 6
# Float32 engines agree to 1e-3 nats per token (tests/real/test_vllm_engine.py).
NOISE_PER_TOKEN = 1e-3
# A host looks every second for its owner, and gives its engines time to end.
GONE_WITHIN_S = 30

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_vllm_version() is None, reason="no vLLM: run make setup-vllm"),
    pytest.mark.skipif(
        not (resolve_demo_model_dir() / "model.safetensors").is_file(),
        reason="the demo model is not there: run jobs/make_demo_model.py",
    ),
]


def make_job(folder: Path) -> Job:
    folder.mkdir()
    lines = (ROOT / "conf/demo/completions.jsonl").read_text(encoding="utf-8").splitlines()
    job = Job(ROOT / "conf/annotate/demo.yaml", folder / "tables", folder / "input.jsonl")
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["completion"] = " ".join(row["completion"].split()[:WORDS])
        row["finish_reason"] = "length"
    job.add_rows(rows)
    return job


class Run:
    """A run of the job in float32, and what its engine hosts have started so far.

    A context manager: a run that a failed check leaves alive is killed.

    Args:
        job: the job.
        engine: of all its models.
    """

    def __init__(self, job: Job, engine: str) -> None:
        changes = {
            "engine": engine,
            "warehouse": job.warehouse,
            "input.path": job.input,
            "run.wave_tokens": 8000,
            "run.request_tokens": 1500,
            "tracking.enabled": "false",
            "report.enabled": "false",
            **{f"reward.models.{role}.dtype": "float32" for role in ("strong", "weak", "router")},
        }
        sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        self.job = job
        self.process: subprocess.Popen[str] = job.start(*sets)
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def look(self) -> None:
        """Take in what is there now below the run's hosts and the hosts' own parents."""
        for host in descendants(self.process)["host"]:
            try:
                supervisor = host.parent()
                if supervisor is not None and "supervisor" in " ".join(supervisor.cmdline()):
                    self.seen |= {supervisor, *supervisor.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Poll until something is so; fail with the job's output if it ends before."""
        while not condition():
            assert self.process.poll() is None, self.job.log.read_text()
            self.look()
            time.sleep(0.4)  # a look reads all processes: often, it would take a core
        self.look()

    def end(self) -> None:
        """Wait until the job has ended well."""
        while self.process.poll() is None:
            self.look()
            time.sleep(1.0)
        assert self.process.returncode == 0, self.job.log.read_text()

    def cores(self) -> list[psutil.Process]:
        """vLLM's engine cores that live: children of a host."""
        return [p for p in self.seen if is_alive(p) and "EngineCore" in " ".join(p.cmdline())]

    def host_log(self) -> str:
        """Give what the host has logged; it takes its log away when it ends."""
        for host in descendants(self.process)["host"]:
            try:
                command = host.cmdline()
                return (Path(command[command.index("--folder") + 1]) / "host.log").read_text()
            except (psutil.NoSuchProcess, FileNotFoundError):
                continue
        return ""

    def assert_nothing_is_left(self) -> None:
        """Fail unless all that hosts had started is gone soon, vLLM's processes included."""
        assert len(self.seen) >= 3, "host, parent and engine core were never seen"
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := [p for p in self.seen if is_alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left over: {left}"


def kill_with_models_loaded(job: Job) -> int:
    """Start a run and kill its JVM, driver and executor in one, when it has committed a wave.

    Returns:
        Rows that are in the store.
    """
    with Run(job, "vllm") as run:
        run.wait_for(lambda: job.commits("logprobs") >= 2)  # creating the table is one
        (core,) = run.cores()
        assert core.parent() in descendants(run.process)["host"]
        assert core.children(), "the model is in a worker below the core"
        run.process.kill()
        run.process.wait(60)
        run.assert_nothing_is_left()
    return len(job.rows("logprobs"))


def finish_though_a_core_is_killed_in_a_request(job: Job) -> None:
    with Run(job, "vllm") as run:
        run.wait_for(lambda: run.host_log().count("INFO loaded ") == 2)
        (core,) = run.cores()
        core.send_signal(signal.SIGSTOP)
        time.sleep(3)  # the wave's first request is with it
        core.kill()
        # Strong and weak are one core, and load again together.
        run.wait_for(lambda: run.host_log().count("died in a request") == 2)
        run.wait_for(lambda: run.host_log().count("INFO loaded ") == 4)
        assert run.cores() != [core]
        run.end()
        run.assert_nothing_is_left()


def read_token_logprobs(job: Job) -> dict[tuple[str, bytes, bytes], list[float]]:
    """Give the log-probs of every row of `logprobs`, by the model's role, prefix and completion."""
    terms = next(iter(job.rows("rewards")))["terms"]
    roles = {term["model_key"]: name.partition("/")[0] for name, term in dict(terms).items()}
    assert set(roles.values()) == {"strong", "weak"}
    rows = job.rows("logprobs")
    found = {
        (roles[row["model_key"]], row["prefix_hash"], row["completion_hash"]): row["token_logprobs"]
        for row in rows
    }
    assert len(found) == len(rows), "a row stands twice"
    return found


def test_vllm_killed_twice_gives_the_log_probs_and_pairs_of_transformers_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    job = make_job(tmp_path / "vllm")
    committed = kill_with_models_loaded(job)
    finish_though_a_core_is_killed_in_a_request(job)
    reference = make_job(tmp_path / "transformers")
    with Run(reference, "transformers") as run:
        run.end()

    # Each engine scored every row itself, one without a death as the other with two.
    logprobs, expected = read_token_logprobs(job), read_token_logprobs(reference)
    candidates = {(row["prompt_hash"], row["completion"]) for row in job.rows("rewards")}
    assert len(candidates) >= 200
    assert len(logprobs) == len(expected) == 2 * len(candidates)
    for one, engine in ((job, "vllm"), (reference, "transformers")):
        assert all(row["engine_version"].startswith(engine) for row in one.rows("logprobs"))
        runs = [dict(row["counts"]) for row in one.rows("runs") if row["outcome"] == "done"]
        already = committed if one is job else 0
        assert [counts["logprobs_scored"] for counts in runs] == [len(expected) - already]
    assert 0 < committed < len(logprobs)

    assert logprobs.keys() == expected.keys()
    for key, found in logprobs.items():
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=NOISE_PER_TOKEN)
    assert_same_rewards_and_pairs(job, reference)


def assert_same_rewards_and_pairs(job: Job, reference: Job) -> None:
    """Compare two stores: rewards within noise, pairs the same where margins are not within it."""
    rewards, others = (
        {row["completion_id"]: row for row in one.rows("rewards")} for one in (job, reference)
    )
    assert rewards.keys() == others.keys()
    assert len(rewards) == PROMPTS * CANDIDATES
    for completion_id, row in rewards.items():
        other = others[completion_id]
        assert row["status"] == other["status"] == "ok"
        assert row["domain"] == other["domain"]
        assert row["num_tokens"] == other["num_tokens"]
        noise = NOISE_PER_TOKEN * row["num_tokens"]
        for column in ("strong_logprob", "weak_logprob"):
            assert row[column] == pytest.approx(other[column], abs=noise)

    pairs, other_pairs = (
        {row["prompt_id"]: row for row in one.rows("preferences")} for one in (job, reference)
    )
    assert pairs.keys() == other_pairs.keys()
    changed = 0
    for prompt_id, pair in pairs.items():
        if any(pair[side] != other_pairs[prompt_id][side] for side in ("chosen", "rejected")):
            changed += 1
            of_prompt = [row for row in others.values() if row["prompt_id"] == prompt_id]
            ranked = sorted((row["reward"] for row in of_prompt), reverse=True)
            closest = min(one - next_ for one, next_ in pairwise(ranked))
            longest = max(row["num_tokens"] for row in of_prompt)
            # Two rewards of two log-probs each.
            assert closest < 4 * NOISE_PER_TOKEN * longest
    assert changed <= PROMPTS // 10
    print(f"{changed} of {len(pairs)} pairs differ, their margins being within noise")
