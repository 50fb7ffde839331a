"""Two runs that share a warehouse, in processes of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tests.e2e.conftest import Job, make_rows


def test_two_runs_of_different_datasets_started_at_once_in_a_new_warehouse_both_finish(
    make_job: Callable[..., Job],
) -> None:
    job = make_job(make_rows(range(6), range(2)))
    other = replace(job, input=job.input.with_name("other.jsonl"))  # for a log of its own
    running = [(job, job.start()), (other, other.start("--set", "dataset=other"))]
    for one, process in running:
        code, output = one.end(process, timeout_s=600)
        assert code == 0, output
    runs = job.rows("runs")
    assert {(run["dataset"], run["outcome"]) for run in runs} == {
        ("test", "done"), ("other", "done")
    }  # fmt: skip
    assert len(runs) == 2
    assert max(run["started_at"] for run in runs) < min(run["ended_at"] for run in runs)
    for table, per_dataset in (("rewards", 12), ("preferences", 6)):
        found = Counter(row["dataset"] for row in job.rows(table))
        assert found == {"test": per_dataset, "other": per_dataset}
