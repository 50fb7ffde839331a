"""A run's staging folder is deleted by others only when its run is known to be dead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyspark.sql import SparkSession

from cdr.staging import Staging


def edit(note: Path, **changes: Any) -> None:
    note.write_text(json.dumps({**json.loads(note.read_text()), **changes}))


def make_left_folder(spark: SparkSession, root: Path, **changes: Any) -> Path:
    """A folder with the note of this process, changed."""
    first = Staging(spark, str(root), "first")
    first.__enter__()
    note = root / "_staging" / "first" / "_owner.json"
    edit(note, **changes)
    return note.parent


def test_a_living_runs_folder_is_left_alone_also_when_the_clock_was_set(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("without /proc only the time of day tells processes apart")
    with Staging(spark, str(tmp_path), "first"):
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
        with Staging(spark, str(tmp_path), "second"):
            assert {p.name for p in (tmp_path / "_staging").iterdir()} == {"first", "second"}
    assert not list((tmp_path / "_staging").iterdir())


def test_a_dead_runs_folder_is_deleted(spark: SparkSession, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = make_left_folder(spark, tmp_path, pid=dead.pid)
    with Staging(spark, str(tmp_path), "second"):
        assert not folder.exists()


def test_a_pid_that_another_process_has_by_now_does_not_keep_a_folder(
    spark: SparkSession, tmp_path: Path
) -> None:
    folder = make_left_folder(spark, tmp_path, started=1)
    with Staging(spark, str(tmp_path), "second"):
        assert not folder.exists()


def test_another_machines_folder_is_left_alone(spark: SparkSession, tmp_path: Path) -> None:
    folder = make_left_folder(spark, tmp_path, host="elsewhere", started=1)
    with Staging(spark, str(tmp_path), "second"):
        assert folder.exists()


@pytest.mark.parametrize("text", ["", '{"host": "a", "p', "[]", '{"host": "a"}', None])
def test_a_folder_whose_note_cannot_be_read_is_left_alone_and_stops_nobody(
    spark: SparkSession, tmp_path: Path, text: str | None
) -> None:
    folder = tmp_path / "_staging" / "first"
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "_owner.json").write_text(text)
    with Staging(spark, str(tmp_path), "second") as second:
        second.write("numbers", spark.range(2))
        assert second.read("numbers").count() == 2
    assert folder.exists()


def test_nobody_sees_half_a_note(spark: SparkSession, tmp_path: Path) -> None:
    seen: list[str] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            for note in tmp_path.glob("_staging/*/_owner.json"):
                try:
                    seen.append(note.read_text())
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(30):
            with Staging(spark, str(tmp_path), f"run-{number}"):
                pass
    finally:
        is_over.set()
        watcher.join()
    assert seen
    assert all("pid" in json.loads(text) for text in seen)
