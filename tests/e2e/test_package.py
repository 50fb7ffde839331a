"""The wheel alone, in an environment of its own and away from the checkout, as clusters have it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from deltalake import DeltaTable

from tests.e2e.conftest import ROOT

CONFIG = ("--config", "conf/annotate/demo.yaml")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel.

    Args:
        venv: its folder.
        cwd: an empty folder to run in.
    """

    venv: Path
    cwd: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin/python"

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.venv)}))

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command with nothing in its environment that leads to the checkout."""
        leads = ("PYTHONPATH", "VIRTUAL_ENV", "SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS")
        environ = {key: value for key, value in os.environ.items() if key not in leads}
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.cwd,
            env={**environ, "PYSPARK_PYTHON": str(self.python)},
            capture_output=True,
            text=True,
            timeout=900,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel as `make package` does, and install it."""
    folder = tmp_path_factory.mktemp("package")
    uv = Path(sys.executable).parent / "uv"
    build = [uv, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", ROOT]
    subprocess.run(build, check=True)
    [wheel] = (folder / "dist").glob("*.whl")
    place = Installed(folder / "venv", folder / "cwd")
    place.cwd.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place.venv], check=True)
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", place.python, wheel]
    subprocess.run(install, check=True)
    # The dependencies are the tests' own. A path in a .pth file is only searched: the .pth files
    # in it, such as the one of the editable install of the checkout, are not read.
    (place.packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return place


def test_nothing_of_the_checkout_is_imported(installed: Installed) -> None:
    report = "import cdr, udfs, jobs, sys; print(cdr.__file__, udfs.__file__, jobs.__file__)"
    done = installed.run(installed.python, "-c", f"{report}; print(*sys.path)")
    assert done.returncode == 0, done.stderr
    modules, path = done.stdout.splitlines()
    assert all(name.startswith(str(installed.packages)) for name in modules.split())
    assert str(ROOT) not in path.split()


def test_the_command_starts_spark_and_annotates_by_a_config_of_the_wheel(
    installed: Installed, demo_model: Path, tmp_path: Path
) -> None:
    assert demo_model.exists()
    warehouse = tmp_path / "warehouse"
    done = installed.run(
        *(installed.venv / "bin/cdr-annotate", *CONFIG, "--limit", "6"),
        *("--set", f"warehouse={warehouse}", "--set", "engine=stub"),
        *("--set", "tracking.enabled=false"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The wheel carries the page's template.
    assert len(list((warehouse / "reports").glob("*.html"))) == 1, done.stderr
    rows = {
        table: DeltaTable(str(warehouse / table)).to_pyarrow_table().to_pylist()
        for table in ("rewards", "logprobs", "preferences", "unpaired")
    }
    assert Counter(row["dataset"] for row in rows["rewards"]) == {"demo.limit-6": 6 * 4}
    assert {row["status"] for row in rows["rewards"]} == {"ok"}
    assert len(rows["logprobs"]) == 2 * 6 * 4
    assert len(rows["preferences"]) + len(rows["unpaired"]) == 6
    assert rows["preferences"]
    # Nothing but tables: no spark-warehouse, no log of a database.
    assert list(installed.cwd.iterdir()) == []


def test_the_installed_script_reads_a_config_of_the_wheel_under_spark_submit(
    installed: Installed,
) -> None:
    # Refused before the session, the command's above: what is new here is where modules and files
    # are found when Spark runs the script.
    done = installed.run(
        *(Path(sys.executable).parent / "spark-submit", "--properties-file"),
        *(installed.packages / "cdr_conf/cluster/local.conf",),
        *(installed.packages / "jobs/annotate.py", *CONFIG, "--set", "pairs.min_margn=1"),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    # Spark prints there what the script says on stderr.
    assert "did you mean 'min_margin'?" in done.stdout
    assert "where: conf/annotate/demo.yaml" in done.stdout
    assert "Traceback" not in done.stdout


CALL = """
import sys
from importlib.metadata import distribution
[entry] = [e for e in distribution("cdr_annotate").entry_points if e.name == "cdr-annotate"]
sys.argv = ["cdr-annotate", "--config", sys.argv[1]]
print("returned", entry.load()())
"""


def test_a_wheel_task_fails_by_an_exception_and_says_why(installed: Installed) -> None:
    # Databricks finds the entry point in the package's metadata and calls it.
    done = installed.run(installed.python, "-c", CALL, "conf/annotate/nothing.yaml")
    assert done.returncode == 2
    assert "conf/annotate/nothing.yaml: no such file" in done.stderr
    assert "returned" not in done.stdout
