"""A run killed or stopped at any instant loses at most the wave in flight, and nothing twice."""

from __future__ import annotations

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
from deltalake import DeltaTable

from tests.e2e.conftest import Job, descendants, make_rows

SLOW = {"delay_s_per_token": 0.01}  # about 0.15 s per completion: waves last seconds
PROMPTS, CANDIDATES = 24, 2
# A run takes a whole JVM, so that tests kill one after the other on the same tables.
pytestmark = pytest.mark.timeout(1800)


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


def in_next_wave(job: Job, process: subprocess.Popen[str], commits: int = 0) -> None:
    """Wait until a wave is committed and the next one runs.

    Args:
        job: the job.
        process: its run.
        commits: of `logprobs` before that wave; creating the table is one.
    """
    wait_for(lambda: job.commits("logprobs") > max(commits, 1), process, 240)
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
    return make_job(rows, SLOW, wave_tokens=700, request_tokens=256)


def assert_ended(hosts: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(hosts, timeout=20)
    assert not alive, "an engine host outlived its executor"


def test_runs_that_are_killed_or_stopped_in_a_wave_are_finished_by_the_next(
    make_job: Callable[..., Job],
) -> None:
    job = slow_job(make_job)
    everything = 2 * PROMPTS * (CANDIDATES + 1)
    process = job.start()
    in_next_wave(job, process)
    processes = descendants(process)
    assert processes["host"]
    processes["driver"][0].kill()
    process.wait(60)
    assert_ended(processes["host"])
    committed = len(job.rows("logprobs"))
    assert 0 < committed < 2 * PROMPTS * CANDIDATES
    # A third candidate for every prompt, also for those whose bucket was finished.
    job.add_rows(make_rows(range(PROMPTS), range(CANDIDATES, CANDIDATES + 1)))

    # What tasks can do without is killed under a run; then it is asked to end.
    commits = job.commits("logprobs")
    process = job.start()
    wait_for(lambda: descendants(process)["host"], process, 240)
    time.sleep(1.0)
    wait_for(lambda: descendants(process)["worker"], process, 30)[0].kill()
    in_next_wave(job, process, commits)
    wait_for(lambda: descendants(process)["host"], process, 30)[0].kill()
    in_next_wave(job, process, commits + 1)
    process.terminate()  # the JVM, as YARN or a shell would
    code, output = job.end(process, timeout_s=120)
    assert code == 4, output
    assert "stopped: SIGTERM" in output
    stopped = last_run(job)
    assert stopped["outcome"] == "stopped"
    assert stopped["ended_at"] is not None
    scored = len(job.rows("logprobs")) - committed
    assert counts(stopped)["logprobs_scored"] == scored
    committed += scored
    assert committed < everything

    code, output = job.run()
    assert code == 0, output
    assert_complete(job, PROMPTS * (CANDIDATES + 1))
    assert counts(last_run(job))["logprobs_scored"] == everything - committed
    killed, *ended = sorted(job.rows("runs"), key=lambda row: row["started_at"])
    assert (killed["outcome"], killed["ended_at"]) == ("running", None)
    assert [run["outcome"] for run in ended] == ["stopped", "done"]
    assert not list((job.warehouse / "_staging").iterdir()), "a dead run's staging was left"
    assert {row["prompt_id"] for row in job.rows("preferences")} == {
        f"p{i}" for i in range(PROMPTS)
    }


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
        wait_for(instant, process, 480, poll_s=0.002)
        process.send_signal(signal.SIGSTOP)
        if instant():
            return
        process.send_signal(signal.SIGCONT)


# In the order in which a run comes to them: what a killed run has left must not look like the next.
INSTANTS: dict[str, tuple[Callable[[Job], bool], bool]] = {
    "reading": (partial(has_staged, name="candidates"), False),
    "staging a wave": (partial(has_staged, name="scored"), False),
    "committing a wave": (partial(is_committing, table="logprobs"), False),
    "rewards": (partial(is_committing, table="rewards"), True),
    "preferences": (partial(is_committing, table="preferences"), True),
}
"""Instants, and whether all is scored by then."""


def test_runs_killed_at_one_instant_after_the_other_lose_nothing_and_double_nothing(
    make_job: Callable[..., Job],
) -> None:
    job = make_job(make_rows(range(8), range(2)), wave_tokens=400)
    committed = 0
    for name, (instant, is_scoring_over) in INSTANTS.items():
        process = job.start()
        freeze_at(process, partial(instant, job))
        hosts = descendants(process)["host"]
        process.kill()
        process.wait(60)
        assert hosts or name != "committing a wave"  # by then there must be one
        assert_ended(hosts)
        before, rows = committed, job.rows("logprobs") if job.commits("logprobs") else []
        committed = len(rows)
        assert len(set(map(key_of, rows))) == committed >= before, name
        assert (committed == 2 * 8 * 2) == is_scoring_over, name
    code, output = job.run()
    assert code == 0, output
    assert f"nothing to score, all {2 * 8 * 2} were in the store" in output
    assert_complete(job, 8 * 2)
    assert counts(last_run(job))["logprobs_scored"] == 0
    assert len(job.rows("preferences")) == 8
    *killed, done = sorted(job.rows("runs"), key=lambda row: row["started_at"])
    assert [(run["outcome"], run["ended_at"]) for run in killed] == [("running", None)] * len(
        INSTANTS
    )
    assert done["outcome"] == "done"
    assert not list((job.warehouse / "_staging").iterdir()), "a dead run's staging was left"


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
    in_next_wave(job, process)
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
