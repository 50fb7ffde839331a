"""What a session needs before a JVM starts, and what people are told to type."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pyspark import SparkContext

from cdr.cli import end
from cdr.errors import SetupError
from cdr.session import DELTA_PACKAGES, delta_remedy, find_java, get_session, local_settings

CHECKOUT = Path(__file__).parents[2]


def make_java(folder: Path, banner: str, exit_code: int = 0) -> Path:
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{banner}' >&2\nexit {exit_code}\n")
    java.chmod(0o755)
    return java


def read_settings() -> dict[str, str]:
    lines = [line for line in local_settings().read_text().splitlines() if line.strip()]
    pairs = [line.split(None, 1) for line in lines if not line.startswith("#")]
    settings = {key: value.strip() for key, value in pairs}
    assert len(settings) == len(pairs), "a key stands twice"
    return settings


@pytest.mark.parametrize(
    "banner", ['openjdk version "17.0.15" 2025-04-15', 'java version "21" 2023-09-19 LTS']
)
def test_java_17_and_newer_is_taken_from_java_home_first(
    banner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = make_java(tmp_path / "new", banner)
    old = make_java(tmp_path / "old", 'openjdk version "11.0.2"')
    monkeypatch.setenv("PATH", str(old.parent), prepend=":")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "new"))
    assert find_java() == java


@pytest.mark.parametrize(
    ("banner", "exit_code", "message"),
    [
        ('openjdk version "11.0.2" 2019-01-15', 0, "must be 17 or newer, got 11"),
        ('java version "1.8.0_392"', 0, "must be 17 or newer, got 8"),
        # What the placeholder of macOS says.
        ("Unable to locate a Java Runtime.", 1, "gives no version"),
    ],
)
def test_another_java_is_refused_with_the_remedy(
    banner: str, exit_code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = make_java(tmp_path, banner, exit_code)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(java.parent), prepend=":")
    with pytest.raises(SetupError, match=message) as caught:
        find_java()
    assert str(java) in str(caught.value)
    for remedy in ("apt-get install openjdk-17", "brew install openjdk@17", "export JAVA_HOME"):
        assert remedy in str(caught.value)


def test_a_java_home_without_java_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SetupError, match=f"JAVA_HOME={tmp_path}"):
        find_java()


def test_a_session_is_refused_before_the_jvm_where_there_is_no_java(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JAVA_HOME", "PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION", "SPARK_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(SparkContext, "_gateway", None)
    with pytest.raises(SetupError, match="there is none in PATH"):
        get_session("test")


def test_a_session_without_pyspark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(SetupError, match=re.escape(".whl[spark]'")):
        get_session("test")


def test_the_remedy_for_delta_is_a_command_for_the_running_spark() -> None:
    remedy = delta_remedy("3.5.6")
    assert f"--properties-file {CHECKOUT}/conf/cluster/local.conf" in remedy
    assert "--packages io.delta:delta-spark_2.12:3.3.2" in remedy
    assert "--conf spark.sql.extensions=io.delta.sql.DeltaSparkSessionExtension" in remedy
    assert "--packages io.delta:delta-spark_9.1_2.13:<version>" in delta_remedy("9.1.0")


def test_local_settings_agree_with_the_packages_that_are_installed() -> None:
    settings = read_settings()
    project = (CHECKOUT / "pyproject.toml").read_text()
    spark = re.search(r'"pyspark==(\d+\.\d+)\.', project)
    delta = re.search(r'"delta-spark==([\d.]+)"', project)
    assert spark is not None
    assert delta is not None
    assert settings["spark.jars.packages"] == DELTA_PACKAGES[spark[1]]
    assert settings["spark.jars.packages"].endswith(f":{delta[1]}")
    for key in ("spark.sql.extensions", "spark.sql.catalog.spark_catalog"):
        assert f"--conf {key}={settings[key]} " in delta_remedy(f"{spark[1]}.0")


def test_every_local_setting_is_explained() -> None:
    text = local_settings().read_text()
    blocks = [block for block in text.split("\n\n") if "\nspark." in f"\n{block}"]
    assert len(blocks) >= 5
    assert all(block.startswith("#") for block in blocks)
    # spark-submit ignores other keys with a mere warning.
    assert all(key.startswith("spark.") for key in read_settings())


def test_a_program_that_went_well_just_returns() -> None:
    # Databricks takes any exception of a wheel task, `sys.exit(0)` as well, for a failure.
    end(0)
    with pytest.raises(SystemExit) as caught:
        end(3)
    assert caught.value.code == 3
