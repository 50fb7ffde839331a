"""Engine hosts on a cluster: each device has one, it stays there, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import Cluster, Record, run_probe, wait_for
from tests.e2e.conftest import Job, make_rows

PROMPTS, CANDIDATES = 16, 2
SCORING_STAGES = {"first", "second", "third"}


def assert_complete(job: Job) -> None:
    """Every candidate has a reward, every log-prob of strong and weak stands once."""
    rewards, logprobs = job.rows("rewards"), job.rows("logprobs")
    assert [row["status"] for row in rewards] == ["ok"] * PROMPTS * CANDIDATES
    keys = {(row["model_key"], row["prefix_hash"], row["completion_hash"]) for row in logprobs}
    assert len(keys) == len(logprobs) == 2 * PROMPTS * CANDIDATES


def hosts_by_device(records: list[Record]) -> dict[tuple[int, tuple[str, ...]], set[int]]:
    """The hosts that tasks of each executor and addresses met."""
    found = defaultdict(set)
    for record in records:
        found[record.executor, record.addresses].add(record.host)
    return dict(found)


def assert_sound(records: list[Record]) -> None:
    """Every task got right answers from the engines it asked for, on the GPUs Spark gave it."""
    assert records
    assert all(record.is_right for record in records)
    for record in records:
        if record.addresses:
            assert record.visible == ",".join(record.addresses)
        expected = ("router",) if record.stage == "router" else ("strong", "weak")
        assert record.engines == expected


def test_each_device_has_its_own_host_through_all_stages_and_a_router_takes_two_at_a_time(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    records = run_probe(on_cluster, tmp_path, "warm", on_cluster.settings())
    assert_sound(records)
    # The warm-up loaded the router too, before them: what a run begins with is there.
    assert {r.stage for r in records if r.is_warm} == SCORING_STAGES
    assert all(r.is_warm for r in records if r.stage in SCORING_STAGES)
    hosts = hosts_by_device([r for r in records if r.stage in SCORING_STAGES])
    assert {addresses for _, addresses in hosts} == {("0",), ("1",), ("2",), ("3",)}
    assert len({executor for executor, _ in hosts}) == 2
    assert all(len(pids) == 1 for pids in hosts.values()), "a host changed"
    assert len(set.union(*hosts.values())) == 4, "two devices share a host"

    routers = hosts_by_device([r for r in records if r.stage == "router"])
    assert {addresses for _, addresses in routers} == {("0", "1"), ("2", "3")}
    assert all(len(pids) == 1 for pids in routers.values())
    # The scoring hosts had to leave their GPUs to the router, and it leaves them to new ones.
    later = hosts_by_device([r for r in records if r.stage == "after the router"])
    before = set.union(*hosts.values()) | set.union(*routers.values())
    assert not before & set.union(*later.values())


def test_with_dynamic_allocation_executors_are_asked_for_anew_when_a_router_takes_two_at_a_time(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    settings = on_cluster.settings(
        **{
            "spark.dynamicAllocation.enabled": "true",
            "spark.dynamicAllocation.maxExecutors": "2",
            # Executors of the scoring stages hold all GPUs until they have been idle this long.
            "spark.dynamicAllocation.executorIdleTimeout": "2s",
        }
    )
    records = run_probe(on_cluster, tmp_path, "stages", settings)
    assert_sound(records)
    hosts = hosts_by_device(records)
    assert all(len(pids) == 1 for pids in hosts.values())
    routers = {r.executor: r.addresses for r in records if r.stage == "router"}
    assert routers
    assert set(routers.values()) <= {("0", "1"), ("2", "3")}
    assert len(routers) <= 2, "the second wave did not find the executors of the first"
    others = {r.executor for r in records if r.stage in SCORING_STAGES}
    assert not others & routers.keys()


def test_hosts_outlive_killed_tasks_and_not_a_failed_job(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    settings = on_cluster.settings(**{"spark.task.maxFailures": "1"})
    records = run_probe(on_cluster, tmp_path, "failing", settings)
    assert_sound(records)
    hosts = hosts_by_device([r for r in records if r.stage in SCORING_STAGES])
    after = hosts_by_device([r for r in records if r.stage == "after the kill"])
    assert all(after[device] == hosts[device] for device in after)
    # `on_cluster` then sees that neither hosts nor their children are left.


def test_two_tasks_on_a_fraction_of_a_gpu_each_share_its_host_with_dynamic_allocation(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    settings = on_cluster.settings(
        **{
            "spark.executor.resource.gpu.amount": "1",
            "spark.task.resource.gpu.amount": "0.5",
            "spark.dynamicAllocation.enabled": "true",
            "spark.dynamicAllocation.maxExecutors": "2",
        }
    )
    records = run_probe(on_cluster, tmp_path, "short", settings)
    assert_sound(records)
    hosts = hosts_by_device(records)
    assert all(len(pids) == 1 for pids in hosts.values())
    workers = defaultdict(set)
    for record in records:
        workers[record.host].add(record.worker)
    assert max(map(len, workers.values())) == 2, "no two workers met at one host"


def test_executors_without_addresses_take_different_gpus_of_their_machine(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    settings = on_cluster.settings(
        **{
            "spark.executor.resource.gpu.amount": "",
            "spark.task.resource.gpu.amount": "",
            "spark.executor.cores": "1",
            "spark.cores.max": "2",
        }
    )
    records = run_probe(on_cluster, tmp_path, "short", settings)
    assert_sound(records)
    assert {record.addresses for record in records} == {()}
    gpus = defaultdict(set)
    for record in records:
        gpus[record.executor].add((record.visible, record.host))
    assert len(gpus) == 2
    assert all(len(held) == 1 for held in gpus.values()), "an executor changed its GPU"
    assert {gpu for held in gpus.values() for gpu, _ in held} == {"0", "1"}


@pytest.fixture
def slow_job(make_job: Callable[..., Job]) -> Job:
    """Waves of seconds; every engine has a child, as vLLM's have."""
    rows = make_rows(range(PROMPTS), range(CANDIDATES))
    knobs = {"delay_s_per_token": 0.02, "is_concurrent": True, "has_child": True}
    return make_job(rows, knobs, wave_tokens=1000, request_tokens=256, devices=4)


@contextlib.contextmanager
def running(job: Job, settings: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start the job; it is gone afterwards, also when the test fails."""
    with job.start(settings=settings) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_hosts(cluster: Cluster) -> None:
    wait_for(lambda: len(cluster.hosts) >= 2 and cluster.engine_children, 600, "no engine hosts")


def test_an_executor_killed_in_a_wave_costs_only_time_with_dynamic_allocation(
    on_cluster: Cluster, slow_job: Job
) -> None:
    job = slow_job
    settings = on_cluster.settings(
        **{
            "spark.dynamicAllocation.enabled": "true",
            "spark.dynamicAllocation.maxExecutors": "2",
            "spark.dynamicAllocation.executorIdleTimeout": "60s",
        }
    )
    with running(job, settings) as process:
        wait_for(lambda: job.commits("logprobs") >= 2, 600, "no wave was committed")
        wait_for_hosts(on_cluster)
        time.sleep(0.5)  # the second wave begins
        victim = on_cluster.executors[0]
        owner = f"--owner-pid {victim.pid} "
        hosts = [host for host in on_cluster.hosts if owner in " ".join(host.cmdline())]
        children = [child for host in hosts for child in host.children()]
        assert hosts
        assert len(children) == 2 * len(hosts)  # one of each engine
        victim.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([*hosts, *children], timeout=10)
        assert not alive, "what the killed executor's tasks had started is still there"
        code, output = job.end(process, timeout_s=600)
    assert code == 0, output
    assert_complete(job)
    told = r"loaded [^\n]+ in [\d.]+ s on \S+ (cuda:\d) \(engine host (\d+)\)"
    loads = set(re.findall(told, output))
    assert {device for device, _ in loads} <= {f"cuda:{i}" for i in range(4)}
    assert len(loads) >= 2


def test_nothing_is_left_on_the_nodes_when_the_driver_is_killed(
    on_cluster: Cluster, slow_job: Job
) -> None:
    with running(slow_job, on_cluster.settings()) as process:
        wait_for_hosts(on_cluster)
        for driver in on_cluster.processes("SparkSubmit"):
            driver.send_signal(signal.SIGKILL)
        process.wait(30)
        on_cluster.assert_empty(timeout_s=30)
