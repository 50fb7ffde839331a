"""Jobs as users run them: spark-submit in a process of its own, tables read without a JVM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from deltalake import DeltaTable

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards judge it".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder; `make setup` puts it there."""
    cache = Path(os.environ.get("CDR_CACHE", "~/.cache/cdr")).expanduser()
    folder = cache / "models" / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        pytest.skip("the demo model is not here; make it with: python jobs/make_demo_model.py")
    return folder


@dataclass
class Job:
    """An annotate job on a warehouse of its own.

    Args:
        config: its YAML file.
        warehouse: its tables.
        input: its JSON lines.
    """

    config: Path
    warehouse: Path
    input: Path

    @property
    def log(self) -> Path:
        return self.input.with_suffix(".log")

    def command(self, *arguments: str, settings: Sequence[str] = ()) -> list[str]:
        options = [item for setting in settings for item in ("--conf", setting)]
        return [
            str(Path(sys.executable).parent / "spark-submit"),
            "--properties-file", str(ROOT / "conf/cluster/local.conf"), *options,
            str(ROOT / "jobs/annotate.py"), "--config", str(self.config), *arguments,
        ]  # fmt: skip

    def start(self, *arguments: str, settings: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start it and come back at once; what it prints goes to `log`."""
        with self.log.open("w") as log:
            return subprocess.Popen(
                self.command(*arguments, settings=settings),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.input.parent,
                env={**os.environ, "PYSPARK_PYTHON": sys.executable},
                start_new_session=True,
            )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run it; give exit code and output."""
        return self.end(self.start(*arguments), timeout_s=600)

    def end(self, process: subprocess.Popen[str], timeout_s: float) -> tuple[int, str]:
        """Wait for its end; give exit code and output."""
        return process.wait(timeout_s), self.log.read_text()

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Read a table with another reader than Spark."""
        return DeltaTable(str(self.warehouse / table)).to_pyarrow_table().to_pylist()

    def commits(self, table: str) -> int:
        """Count a table's commits that exist by now, the one that created it included."""
        return len(list((self.warehouse / table / "_delta_log").glob("*.json")))

    def edit(self, **changes: object) -> None:
        """Set dotted keys (with `__` for the dot) in its YAML."""
        config = yaml.safe_load(self.config.read_text())
        for dotted, value in changes.items():
            *path, last = dotted.split("__")
            place = config
            for key in path:
                place = place.setdefault(key, {})
            place[last] = value
        self.config.write_text(yaml.safe_dump(config))

    def add_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.input.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)


def make_rows(prompts: range, candidates: range) -> list[dict[str, Any]]:
    """Rows whose texts all differ."""
    return [
        {
            "prompt_id": f"p{i}",
            "prompt": [{"role": "user", "content": f"Question {i}: {WORDS[i % len(WORDS)]}?"}],
            "completion_id": f"p{i}-{j}",
            "completion": f"Answer {j} to {i}: " + " ".join(WORDS[: 3 + (i + j) % 12]),
            "finish_reason": "stop",
        }
        for i in prompts
        for j in candidates
    ]


def write_job(
    folder: Path,
    tokenizer: Path,
    rows: Sequence[dict[str, Any]],
    extra: dict[str, Any] | None = None,
    **run: Any,
) -> Job:
    """Write a job with stub engines (numbers from hashes) that borrow a tokenizer."""

    def model(adapter: str) -> dict[str, Any]:
        return {
            "path": str(tokenizer), "engine": "stub", "adapter": adapter, "extra": extra or {}
        }  # fmt: skip

    data, warehouse = folder / "input.jsonl", folder / "warehouse"
    config = {
        "dataset": "test",
        "warehouse": str(warehouse),
        "input": {
            "path": str(data),
            "format": "json",
            "columns": {
                "prompt_id": "prompt_id",
                "completion_id": "completion_id",
                "finish_reason": "finish_reason",
            },
        },
        "reward": {
            "name": "stub",
            "models": {"strong": {**model("s"), "tuned_from": "weak"}, "weak": model("w")},
            "routing": {"mode": "none"},
        },
        "run": run,
        "tracking": {"enabled": False},
        "report": {"enabled": False},
    }
    (folder / "annotate.yaml").write_text(yaml.safe_dump(config))
    job = Job(folder / "annotate.yaml", warehouse, data)
    job.add_rows(rows)
    return job


@pytest.fixture
def make_job(tmp_path: Path, demo_model: Path) -> Callable[..., Job]:
    """Make a job with stub engines and the demo model's tokenizer."""

    def make(rows: Sequence[dict[str, Any]], *arguments: Any, **run: Any) -> Job:
        return write_job(tmp_path, demo_model, rows, *arguments, **run)

    return make


def descendants(process: subprocess.Popen[str]) -> dict[str, list[psutil.Process]]:
    """Give a job's processes by what they are: jvm, driver, worker, host."""
    jvm = psutil.Process(process.pid)
    found: dict[str, list[psutil.Process]] = {"jvm": [jvm], "driver": [], "worker": [], "host": []}
    for child in jvm.children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:  # it ended meanwhile
            continue
        if "jobs/annotate.py" in command:
            found["driver"].append(child)
        elif "pyspark.daemon" in command and child.parent() != jvm:
            found["worker"].append(child)
    for other in psutil.process_iter(["cmdline"]):
        command = " ".join(other.info["cmdline"] or ())
        if "cdr.engines.host" in command and f"--owner-pid {jvm.pid} " in f"{command} ":
            found["host"].append(other)
    return found
