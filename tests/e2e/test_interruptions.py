"""A run killed or stopped at any instant loses at most the wave in flight, and nothing twice."""

from __future__ import annotations

import datetime as dt
import errno
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from deltalake import DeltaTable
from transformers import AutoTokenizer

from tests.e2e.conftest import Job, descendants, make_rows

SLOW = {"delay_s_per_token": 0.01}  # about 0.15 s per completion: waves last seconds
PROMPTS, CANDIDATES = 24, 2


def wait_for(
    condition: Callable[[], Any],
    process: subprocess.Popen[str],
    timeout_s: float,
    poll_s: float = 0.1,
) -> Any:
    """Poll until something is there; fail with the job's output when it ends before."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process.poll() is not None:
            pytest.fail(f"the job ended too early, with exit code {process.returncode}")
        time.sleep(poll_s)
    process.kill()
    pytest.fail("timed out")


def in_second_wave(job: Job, process: subprocess.Popen[str]) -> None:
    """Wait until one wave is committed (creating the table is commit 0) and the next one runs."""
    wait_for(lambda: job.commits("logprobs") >= 2, process, 240)
    wait_for(lambda: descendants(process)["host"], process, 60)
    time.sleep(1.0)


def key_of(row: dict[str, Any]) -> tuple[str, bytes, bytes]:
    """The key of a row of `logprobs`."""
    return row["model_key"], row["prefix_hash"], row["completion_hash"]


def assert_complete(job: Job, num_candidates: int) -> None:
    """Every candidate has a reward, every log-prob stands once, the last run did only the rest."""
    rewards = job.rows("rewards")
    assert len(rewards) == num_candidates
    assert {row["status"] for row in rewards} == {"ok"}
    keys = Counter(map(key_of, job.rows("logprobs")))
    assert len(keys) == 2 * num_candidates  # strong and weak
    assert set(keys.values()) == {1}


def last_run(job: Job) -> dict[str, Any]:
    return max(job.rows("runs"), key=lambda row: row["started_at"])


def counts(run: dict[str, Any]) -> dict[str, int]:
    return dict(run["counts"])


def slow_job(make_job: Callable[..., Job]) -> Job:
    rows = make_rows(range(PROMPTS), range(CANDIDATES))
    return make_job(rows, SLOW, wave_tokens=1500, request_tokens=256)


@pytest.mark.parametrize("victim", ["driver", "jvm"])
def test_a_run_killed_in_a_wave_is_finished_by_the_next_with_rows_that_came_in_between(
    make_job: Callable[..., Job], victim: str
) -> None:
    job = slow_job(make_job)
    process = job.start()
    in_second_wave(job, process)
    processes = descendants(process)
    host = processes["host"][0]
    processes[victim][0].send_signal(signal.SIGKILL)
    process.wait(60)
    gone, alive = psutil.wait_procs([host], timeout=20)
    assert gone
    assert not alive, "an engine host outlived its executor"

    committed = len(job.rows("logprobs"))
    assert 0 < committed < 2 * PROMPTS * CANDIDATES
    # A third candidate for every prompt, also for those whose bucket was finished.
    job.add_rows(make_rows(range(PROMPTS), range(CANDIDATES, CANDIDATES + 1)))
    code, output = job.run()
    assert code == 0, output
    assert_complete(job, PROMPTS * (CANDIDATES + 1))
    assert counts(last_run(job))["logprobs_scored"] == 2 * PROMPTS * (CANDIDATES + 1) - committed
    killed = min(job.rows("runs"), key=lambda row: row["started_at"])
    assert (killed["outcome"], killed["ended_at"]) == ("running", None)
    assert not list((job.warehouse / "_staging").iterdir()), "the dead run's staging was left"


def has_staged(job: Job, name: str) -> bool:
    """Whether a stage's intermediate table is being written, or is there."""
    return any(job.warehouse.glob(f"_staging/*/{name}/**/*.parquet"))


def is_committing(job: Job, table: str) -> bool:
    """Whether data files lie in a table that no commit names yet."""
    folder = job.warehouse / table
    if not job.commits(table):
        return False
    files = {path.name for path in folder.rglob("*.parquet") if "_delta_log" not in path.parts}
    return bool(files - {Path(uri).name for uri in DeltaTable(str(folder)).file_uris()})


def freeze_at(process: subprocess.Popen[str], instant: Callable[[], bool]) -> None:
    """Stop the JVM at an instant; when it has passed before the signal came, wait for the next."""
    while True:
        wait_for(instant, process, 240, poll_s=0.002)
        process.send_signal(signal.SIGSTOP)
        if instant():
            return
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("instant", "is_scoring_over"),
    [
        (partial(has_staged, name="candidates"), False),
        (partial(has_staged, name="work"), False),
        (partial(has_staged, name="scored"), False),
        (partial(is_committing, table="logprobs"), False),
        (partial(is_committing, table="rewards"), True),
        (partial(is_committing, table="preferences"), True),
    ],
    ids=["reading", "planning", "staging a wave", "committing a wave", "rewards", "preferences"],
)
def test_a_run_killed_at_any_instant_is_finished_by_the_next(
    make_job: Callable[..., Job], instant: Callable[[Job], bool], is_scoring_over: bool
) -> None:
    job = make_job(make_rows(range(8), range(2)), wave_tokens=400)
    process = job.start()
    freeze_at(process, lambda: instant(job))
    process.kill()
    process.wait(60)
    committed = len(job.rows("logprobs")) if job.commits("logprobs") else 0
    assert (committed == 2 * 8 * 2) == is_scoring_over
    code, output = job.run()
    assert code == 0, output
    assert_complete(job, 8 * 2)
    assert counts(last_run(job))["logprobs_scored"] == 2 * 8 * 2 - committed
    assert len(job.rows("preferences")) == 8


@pytest.mark.parametrize("victim", ["worker", "host"])
def test_a_run_whose_worker_or_engine_host_is_killed_goes_on(
    make_job: Callable[..., Job], victim: str
) -> None:
    job = slow_job(make_job)
    process = job.start()
    in_second_wave(job, process)
    wait_for(lambda: descendants(process)[victim], process, 30)[0].send_signal(signal.SIGKILL)
    code, output = job.end(process, timeout_s=300)
    assert code == 0, output
    assert_complete(job, PROMPTS * CANDIDATES)


def test_sigterm_ends_a_run_in_good_order_and_the_next_goes_on(
    make_job: Callable[..., Job],
) -> None:
    job = slow_job(make_job)
    process = job.start()
    in_second_wave(job, process)
    process.terminate()  # the JVM, as YARN or a shell would
    code, output = job.end(process, timeout_s=120)
    assert code == 4, output
    assert "stopped: SIGTERM" in output
    stopped = last_run(job)
    assert stopped["outcome"] == "stopped"
    assert stopped["ended_at"] is not None
    committed = len(job.rows("logprobs"))
    code, output = job.run()
    assert code == 0, output
    assert_complete(job, PROMPTS * CANDIDATES)
    assert counts(last_run(job))["logprobs_scored"] == 2 * PROMPTS * CANDIDATES - committed


def start_with_time_to_plan(job: Job) -> tuple[subprocess.Popen[str], psutil.Process, float]:
    """Start a job whose time is not up before its models run, however slow this machine is.

    Returns:
        The job, the engine host of its first wave, and its `--max-hours` in seconds.
    """
    for max_s in (20.0, 90.0, 400.0):
        process = job.start("--max-hours", str(max_s / 3600))
        while process.poll() is None:
            if hosts := descendants(process)["host"]:
                return process, hosts[0], max_s
            time.sleep(0.1)
    pytest.fail("the first wave did not begin in time")


def test_max_hours_commits_the_wave_in_flight_and_starts_no_other(
    make_job: Callable[..., Job],
) -> None:
    job = slow_job(make_job)
    process, host, max_s = start_with_time_to_plan(job)
    host.send_signal(signal.SIGSTOP)  # holds the wave in flight until the time is up
    age = dt.datetime.now(dt.UTC) - last_run(job)["started_at"]
    time.sleep(max(0.0, max_s + 1 - age.total_seconds()))
    assert job.commits("logprobs") < 2, "the first wave was over before the time was"
    assert process.poll() is None
    host.send_signal(signal.SIGCONT)
    code, output = job.end(process, timeout_s=240)
    assert code == 4, output
    assert "stopped: --max-hours is over" in output
    assert job.commits("logprobs") == 2, "not one wave (creating the table is commit 0)"
    stopped = last_run(job)
    assert (stopped["outcome"], stopped["waves_done"]) == ("stopped", 1)
    assert stopped["waves_total"] > 1
    committed = len(job.rows("logprobs"))
    assert 0 < committed < 2 * PROMPTS * CANDIDATES
    assert counts(stopped)["logprobs_scored"] == committed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def keep_full(file: Path, process: subprocess.Popen[str]) -> None:
    """Take every page of the file system that is free, until a process has ended."""
    with file.open("ab", buffering=0) as stream:
        while process.poll() is None:
            try:
                stream.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                time.sleep(0.05)  # what the process deletes meanwhile is taken too


def test_a_full_disk_is_named_and_what_was_committed_is_built_upon_when_there_is_room_again(
    make_job: Callable[..., Job], small_disk: Path
) -> None:
    job = slow_job(make_job)
    job.warehouse = small_disk / "warehouse"
    elsewhere = ("--set", f"warehouse={job.warehouse}")
    process = job.start(*elsewhere)
    in_second_wave(job, process)
    keep_full(small_disk / "ballast", process)
    code, output = job.end(process, timeout_s=240)
    assert code == 1, output
    assert "error: the disk is full" in output
    committed = {key_of(row): row for row in job.rows("logprobs")}
    assert 0 < len(committed) < 2 * PROMPTS * CANDIDATES

    (small_disk / "ballast").unlink()
    code, output = job.run(*elsewhere)
    assert code == 0, output
    assert_complete(job, PROMPTS * CANDIDATES)
    after = {key_of(row): row for row in job.rows("logprobs")}
    assert {key: after[key] for key in committed} == committed
    assert counts(last_run(job))["logprobs_scored"] == len(after) - len(committed)


def test_a_second_run_scores_nothing_and_changes_no_row(make_job: Callable[..., Job]) -> None:
    job = make_job(make_rows(range(4), range(3)))
    code, output = job.run()
    assert code == 0, output
    first = {row["prompt_id"]: row["chosen_id"] for row in job.rows("preferences")}
    assert len(first) == 4
    code, output = job.run()
    assert code == 0, output
    assert "nothing to score, all 24 were in the store" in output
    assert counts(last_run(job))["logprobs_scored"] == 0
    assert {row["prompt_id"]: row["chosen_id"] for row in job.rows("preferences")} == first


def test_completions_that_cannot_be_scored_fail_alone_and_the_exit_code_says_so(
    make_job: Callable[..., Job],
) -> None:
    rows = make_rows(range(6), range(2))
    rows[3]["completion"] += " zebra"  # kills the strong engine
    rows[8]["completion"] += " piano"  # gives it NaN
    job = make_job(rows)
    config = yaml.safe_load(job.config.read_text())
    strong = config["reward"]["models"]["strong"]
    tokenizer = AutoTokenizer.from_pretrained(strong["path"])
    (zebra,), (piano,) = (tokenizer.encode(word)[-1:] for word in (" zebra", " piano"))
    strong["extra"] = {"kill_token": zebra, "nan_token": piano}
    job.config.write_text(yaml.safe_dump(config))
    code, output = job.run()
    assert code == 3, output
    failed = {r["completion_id"]: r["error"] for r in job.rows("rewards") if r["status"] != "ok"}
    assert set(failed) == {rows[3]["completion_id"], rows[8]["completion_id"]}
    assert failed[rows[3]["completion_id"]].startswith("engine_died_twice")
    assert failed[rows[8]["completion_id"]].startswith("non_finite_logprob")
    assert len(job.rows("rewards")) == 12
    assert len(job.rows("logprobs")) == 2 * 12 - 2, "only scores are stored"
    assert last_run(job)["outcome"] == "over_threshold"
