"""The doctor says what is missing, and only then ends with 1."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cdr import doctor
from cdr.doctor import (
    Finding,
    check_devices,
    check_disk,
    check_packages,
    check_python,
    check_spark,
    check_store,
)
from cdr.node_cache import resolve_cache_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with all that is needed, and nobody's settings; gives its home."""
    for name in ("PYSPARK_PYTHON", "SPARK_REMOTE", "MLFLOW_TRACKING_URI", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in (*doctor._OWN_SPARK, "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)
    jars = tmp_path / ".ivy2.5.2" / "jars"
    jars.mkdir(parents=True)
    (jars / "io.delta_delta-spark_4.2_2.13-4.4.0.jar").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CDR_CACHE", str(tmp_path / "cache"))
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{java.parent}:/usr/bin:/bin")
    return tmp_path


def states(findings: list[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def test_nothing_missing_ends_with_0(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("missing")] == []
    for name in ("python", "packages", "java", "spark", "devices", "vllm", "memory", "disk"):
        assert any(line.split()[1:2] == [name] for line in lines), name


def test_missing_java_ends_with_1_and_says_what_to_install(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(machine / "nowhere"))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "missing  java      Java does not run" in out
    assert "fix: install one of Java 17 or 21" in out
    assert "1 missing" in out


def test_workers_of_another_python_are_seen(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(list(check_python())) == ["ok"]
    monkeypatch.setenv("PYSPARK_PYTHON", "/usr/bin/env")
    assert states(list(check_python())) == ["ok", "warn"]
    monkeypatch.setenv("PYSPARK_PYTHON", "python-that-is-not-here")
    assert states(list(check_python())) == ["ok", "missing"]


@pytest.mark.parametrize(
    ("versions", "state", "text"),
    [
        ({"pyspark": None}, "missing", "PySpark is not installed"),
        ({"pyspark": "3.4.1", "delta-spark": "2.4.0"}, "missing", "3.4.1 is none of those"),
        ({"pyspark": "4.2.0", "delta-spark": None}, "missing", "delta-spark is not installed"),
        ({"pyspark": "4.2.0", "delta-spark": "3.3.2"}, "warn", "4.4.0 belongs to it"),
        ({"pyspark": "4.2.0", "delta-spark": "4.4.0"}, "ok", "PySpark 4.2.0"),
    ],
)
def test_spark_and_delta_must_fit(
    versions: dict[str, str | None],
    state: str,
    text: str,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    first = next(check_spark())
    assert first.state == state
    assert text in first.text
    assert (first.fix is None) == (state == "ok")


def test_jars_that_are_still_to_come_and_a_foreign_spark_are_warned_of(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(machine.rglob("*.jar")).unlink()
    monkeypatch.setenv("SPARK_HOME", "/opt/spark")
    assert states(list(check_spark())) == ["ok", "warn", "warn"]


def test_a_package_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["psutil>=999", "no-such-thing"])
    (found,) = check_packages()
    assert found.state == "missing"
    assert f"psutil>=999 is needed, {psutil.__version__} is installed" in found.text
    assert "no-such-thing is not installed" in found.text


def test_a_full_disk_is_warned_of(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOW_DISK", 1 << 60)
    found = list(check_disk())
    assert states(found) == ["warn"] * 4
    assert any("CDR_CACHE" in (finding.fix or "") for finding in found)


def test_a_store_that_does_not_answer_is_missing_and_keeps_its_password(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (found,) = check_store(f"http://me:secret@127.0.0.1:{port}")
    assert found.state == "missing"
    assert "secret" not in found.text
    database = tmp_path / "mlflow.db"
    assert states(list(check_store(f"sqlite:///{database}"))) == ["ok"]
    assert not database.exists()


def test_a_config_with_a_mistake_is_refused_and_its_problem_shown(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--config", "conf/annotate/none.yaml"]) == 1
    assert "conf/annotate/none.yaml: no such file" in capsys.readouterr().out


def test_without_its_packages_it_says_so_instead_of_a_traceback(tmp_path: Path) -> None:
    # -S: without site-packages, as a Python into which nothing has been installed.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "cdr.doctor"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is not installed for" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("is_available", "state", "text"),
    [(True, "ok", "2 x NVIDIA H100, 80 GiB; dtype auto is bfloat16"), (False, "missing", "none")],
)
def test_gpus_must_be_seen_by_pytorch(
    is_available: bool, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: is_available,
        device_count=lambda: 2,
        get_device_name=lambda _: "NVIDIA H100",
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.13.0"))
    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    monkeypatch.setattr(doctor, "device_memory_bytes", lambda: 80 << 30)
    monkeypatch.setattr(doctor, "resolve_dtype", lambda _: "bfloat16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (found,) = check_devices()
    assert (found.state, found.fix is None) == (state, is_available)
    assert text in found.text


def test_models_and_store_of_a_config_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    if not (resolve_cache_dir() / "models" / "smollm2-135m-instruct" / "config.json").exists():
        pytest.skip("the demo model is not here; make it with: python jobs/make_demo_model.py")
    doctor.main(["--config", str(ROOT / "conf" / "annotate" / "demo.yaml")])
    lines = capsys.readouterr().out.splitlines()
    models = {line.split()[2]: line for line in lines if line.split()[1:2] == ["models"]}
    assert set(models) == {"strong:", "weak:", "router:"}
    assert "smollm2-135m-instruct-dpo, transformers" in models["strong:"]
    assert any(line.startswith("ok       mlflow    SQLite at") for line in lines)
