"""After an annotate job: its pairs are queried, exported, and a person is forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import ROOT, Job, make_rows


def run(program: str, *arguments: str, cwd: Path) -> str:
    """Run a program of Spark's that ends well, and give what it printed."""
    command = [
        str(Path(sys.executable).parent / program),
        *("--properties-file", str(ROOT / "conf/cluster/local.conf"), *arguments),
    ]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(script: str, *arguments: str, cwd: Path) -> str:
    return run("spark-submit", str(ROOT / "jobs" / script), *arguments, cwd=cwd)


def test_pairs_are_queried_and_exported_and_a_forgotten_prompt_is_in_no_table(
    make_job: Callable[..., Job],
) -> None:
    job = make_job(make_rows(range(6), range(3)))
    code, output = job.run()
    assert code == 0, output
    query = f"SELECT prompt_id, chosen_id FROM delta.`{job.warehouse}/preferences`"
    lines = run("spark-sql", "-e", query, cwd=job.warehouse.parent).splitlines()
    printed = {tuple(line.split("\t")) for line in lines if "\t" in line}
    assert printed == {(row["prompt_id"], row["chosen_id"]) for row in job.rows("preferences")}

    # Relative to the working directory, as on the pages.
    folder, place = job.warehouse.parent, ("--warehouse", job.warehouse.name)
    printed = submit("export.py", *place, "--dataset", "test", "--to", "out/pairs", cwd=folder)
    assert "written to out/pairs, with manifest.json" in printed
    manifest = json.loads((folder / "out/pairs/manifest.json").read_text())
    lines = [
        line
        for file in manifest["files"]
        for line in (folder / "out/pairs" / file["name"]).read_text().splitlines()
    ]
    exported = sorted(json.loads(line)["prompt"][0]["content"] for line in lines)
    assert exported == sorted(pair["prompt"][0]["content"] for pair in job.rows("preferences"))

    printed = submit("maintain.py", "forget", *place, "--prompt-id", "p3", cwd=folder)
    assert "1 of 1 prompt ids have rows, in every dataset" in printed
    tables = ("rewards", "preferences", "logprobs", "unpaired", "rejects")
    left = {name: job.rows(name) for name in tables}
    assert (len(left["rewards"]), len(left["logprobs"])) == (15, 2 * 15)
    assert "Question 3:" not in repr(left)
    (receipt,) = (job.warehouse / "_receipts").iterdir()
    assert json.loads(receipt.read_text())["outcome"] == "done"
