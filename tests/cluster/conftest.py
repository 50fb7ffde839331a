"""A standalone Spark cluster on this machine: a master, two workers, made-up GPU addresses.

The workers announce addresses through a discovery script, as those of a real cluster do; engines
are stubs, so no address is ever looked at. Everything the cluster starts carries a mark in its
environment, by which the tests find what is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import ROOT, demo_model, make_job

__all__ = ["demo_model", "make_job"]  # fixtures of that tier

BIN = Path(sys.executable).parent
QUICK_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
MARK = "CDR_TEST_CLUSTER"


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until something is there; fail after a time that is ample for a busy machine."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"timed out after {timeout_s} s: {what}")
        time.sleep(0.1)
    return found


@dataclass
class Cluster:
    """A running cluster.

    Args:
        url: of the master.
        mark: in the environment of all its processes.
        tmp: the TMPDIR of its workers.
        daemons: master and workers.
    """

    url: str
    mark: str
    tmp: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def settings(self, **changes: str) -> list[str]:
        """Spark settings of an application of two executors with two addresses each."""
        values = {
            "spark.master": self.url,
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.log.level": "WARN",
            "spark.executor.cores": "2",
            "spark.executor.memory": "512m",
            "spark.driver.memory": "512m",
            "spark.executor.extraJavaOptions": QUICK_JVM,
            "spark.executor.resource.gpu.amount": "2",
            "spark.task.resource.gpu.amount": "1",
            "spark.scheduler.minRegisteredResourcesRatio": "1.0",
            "spark.locality.wait": "0s",
        } | changes  # fmt: skip
        return [f"{key}={value}" for key, value in values.items() if value]

    def processes(self, *words: str) -> list[psutil.Process]:
        """What runs in the cluster, but for the daemons, with all these words in its command."""
        daemons = {daemon.pid for daemon in self.daemons}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get(MARK) == self.mark and process.pid not in daemons
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                command = " ".join(process.cmdline())
                if is_ours and is_alive and all(word in command for word in words):
                    found.append(process)
        return found

    @property
    def executors(self) -> list[psutil.Process]:
        return self.processes("CoarseGrainedExecutorBackend")

    @property
    def hosts(self) -> list[psutil.Process]:
        return self.processes("cdr.engines.host")

    @property
    def engine_children(self) -> list[psutil.Process]:
        """What the stub engines started, each in a session of its own."""
        return self.processes("sleep 86400")

    def assert_empty(self, timeout_s: float = 20) -> None:
        """Fail unless everything but the daemons is gone soon."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left over: {left}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tmp = Path(tempfile.mkdtemp(prefix="cdr-t-"))  # sockets need short paths
    cluster = Cluster(f"spark://127.0.0.1:{port}", tmp.name, tmp)
    environ = {
        **os.environ,
        MARK: cluster.mark,
        "TMPDIR": str(tmp),
        "PYSPARK_PYTHON": sys.executable,  # spark-class finds Spark by it
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": QUICK_JVM,
        "OMP_NUM_THREADS": "1",
        # What tasks find where Spark gives no addresses: both workers are on one machine.
        "CUDA_VISIBLE_DEVICES": "0,1",
    }

    def start(name: str, arguments: Sequence[str], **more: str) -> Path:
        log = folder / f"{name}.log"
        with log.open("w") as stream:
            daemon = subprocess.Popen(
                [str(BIN / "spark-class"), *arguments],
                env={**environ, **more},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        cluster.daemons.append(daemon)
        return log

    try:
        master = "org.apache.spark.deploy.master.Master"
        address = ["--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
        start("master", [master, *address])
        logs = []
        for number in range(2):
            script = folder / f"discover-{number}.sh"
            gpus = {"name": "gpu", "addresses": [str(2 * number), str(2 * number + 1)]}
            script.write_text(f"#!/bin/sh\necho '{json.dumps(gpus)}'\n")
            script.chmod(0o755)
            gpu = "-Dspark.worker.resource.gpu"
            place = ["--host", "127.0.0.1", "--webui-port", "0", "-d", str(folder / f"w{number}")]
            log = start(
                f"worker-{number}",
                ["org.apache.spark.deploy.worker.Worker", *place,
                 "--cores", "2", "--memory", "1g", cluster.url],
                SPARK_WORKER_OPTS=f"{gpu}.amount=2 {gpu}.discoveryScript={script}",
            )  # fmt: skip
            logs.append(log)
        wait_for(
            lambda: all("Successfully registered" in log.read_text() for log in logs),
            180,
            f"workers did not register, see {folder}",
        )
        yield cluster
    finally:
        for daemon in cluster.daemons:
            daemon.kill()
            daemon.wait()
        for process in cluster.processes():
            process.kill()
        shutil.rmtree(tmp, ignore_errors=True)


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, and its mark on what the test starts; nothing may be left afterwards."""
    monkeypatch.setenv(MARK, cluster.mark)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    yield cluster
    cluster.assert_empty()


@dataclass(frozen=True)
class Record:
    """Where one task of the probe found its engines; see tests/cluster/probe.py."""

    stage: str
    executor: int
    worker: int
    addresses: tuple[str, ...]
    host: int
    visible: str
    engines: tuple[str, ...]
    is_right: bool
    is_warm: bool


def run_probe(cluster: Cluster, folder: Path, mode: str, settings: Sequence[str]) -> list[Record]:
    """Run tests/cluster/probe.py as an application; give what its tasks saw."""
    output = folder / "records.jsonl"
    options = [item for setting in settings for item in ("--conf", setting)]
    done = subprocess.run(
        [
            str(BIN / "spark-submit"),
            *options,
            str(ROOT / "tests/cluster/probe.py"), mode, str(output),
        ],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert ("the probe fails on purpose" in said) == (mode == "failing"), said
    assert (done.returncode != 0) == (mode == "failing"), said
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        row["addresses"], row["engines"] = tuple(row["addresses"]), tuple(row["engines"])
    return [Record(**row) for row in rows]
