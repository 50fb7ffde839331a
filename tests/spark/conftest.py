"""One Spark session with Delta for all tests of this tier."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark import SparkContext
from pyspark.sql import SparkSession

from cdr.tracking_store import open_store
from tests.spark.annotated import Annotated, annotate_small

MakeStore = Callable[[Path], str]
TakeHours = Callable[[object, str], None]
LOCAL_CONF = Path(__file__).resolve().parents[2] / "conf" / "cluster" / "local.conf"


@pytest.fixture(scope="package")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """A session with the settings users get on one machine, less the compiling of plans."""
    builder = SparkSession.builder.appName("cdr-tests")
    for line in LOCAL_CONF.read_text().splitlines():
        if line and not line.startswith("#"):
            key, value = line.split(maxsplit=1)
            builder = builder.config(key, value)
    # Compiling every new plan takes a quarter of the CPU time over these few rows. Tests of the
    # whole jobs (tests/e2e) keep to what users get.
    builder = builder.config("spark.sql.codegen.wholeStage", "false")
    builder = builder.config("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    catalog = tmp_path_factory.mktemp("spark-warehouse")
    builder = builder.config("spark.sql.warehouse.dir", str(catalog))
    with pytest.MonkeyPatch.context() as patch:
        # Workers would take `python3` from PATH, which need not have the packages.
        patch.setitem(os.environ, "PYSPARK_PYTHON", sys.executable)
        # Of the JVM, and so of workers and engine hosts: what tests fetch stays out of the user's.
        patch.setenv("CDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Of an API judge's tests: workers live as long as the session and keep its environment.
        patch.setenv("JUDGE_KEY", "secret")
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("ERROR")
        yield session
        session.stop()
        _end_jvm()


def _end_jvm() -> None:
    """End the JVM that PySpark would keep: tests of other tiers count this process's children."""
    gateway = SparkContext._gateway
    assert gateway is not None
    SparkContext._gateway = SparkContext._jvm = None
    gateway.shutdown()
    gateway.proc.stdin.close()  # Spark's launcher ends at the end of its input
    gateway.proc.wait(60)


@pytest.fixture(scope="package")
def annotated(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Annotated:
    """A small annotated warehouse, only to be read; `copy` gives one to change."""
    folder = _make_once(tmp_path_factory, "annotated", lambda place: annotate_small(spark, place))
    return Annotated(folder / "warehouse", folder / "input.jsonl")


@pytest.fixture(scope="package")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """Put an empty MLflow store where a warehouse has it and give its URI.

    MLflow takes seconds to make one (tests/spark/test_tracking.py lets it), a copy takes none.
    """
    empty = _make_once(
        tmp_path_factory,
        "mlflow",
        lambda folder: open_store(f"sqlite:///{folder}/mlflow.db").search_experiments(),
    )

    def make_store(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        shutil.copy(empty / "mlflow.db", folder)
        return f"sqlite:///{folder}/mlflow.db"

    return make_store


@pytest.fixture
def take_hours(monkeypatch: pytest.MonkeyPatch) -> TakeHours:
    """Let two hours pass, for what `--max-hours` counts, whenever a module's function is called."""
    passed_s = 0

    def take_hours(module: object, name: str) -> None:
        function = getattr(module, name)

        def slow(*arguments: Any) -> Any:
            nonlocal passed_s
            passed_s += 2 * 3600
            return function(*arguments)

        monkeypatch.setattr(module, name, slow)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s)
    monkeypatch.setattr("cdr.runs.time", clock)
    return take_hours


def _make_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Give a folder that all processes of a test session share: the first one fills it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the same for all workers: the others wait
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
