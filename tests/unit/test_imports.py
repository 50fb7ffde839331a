"""Who may import whom, read from the source with `ast`: nothing is executed.

cdr never imports udfs or jobs, so that it works without either; udfs import cdr alone of the
three. What an engine host loads must not need Spark, and only what computes with torch may load it
at import, so that the driver, the tests and `--help` start fast.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"cdr", "udfs", "jobs", "tests", "benchmarks"}
ALLOWED = {
    "cdr": {"cdr"},
    "udfs": {"cdr", "udfs"},
    "jobs": {"cdr", "udfs", "jobs"},
    "notebooks": {"cdr"},
}
TORCH_AT_IMPORT = {
    "cdr/engines/transformers.py",
    "cdr/engines/block_attention.py",
    "cdr/engines/causal_lm.py",
    "cdr/engines/cpu_math.py",
    "cdr/engines/classifier.py",
    "cdr/engines/tree_reader.py",
    "cdr/classifier_training.py",
    "cdr/dpo.py",
    "cdr/packed_pairs.py",
    "cdr/simpo.py",
    "cdr/simpo_trainer.py",
    "cdr/tuning.py",
    "cdr/demo_model.py",
}
HEAVY = {"torch", "transformers", "peft", "trl", "vllm"}
SPARK = {"pyspark", "delta", "py4j"}
MAX_JOB_LINES = 120


@dataclass(frozen=True)
class Import:
    """One imported module.

    Args:
        module: dotted name; for `from a import b` both `a` and `a.b`, as b may be a module.
        at_load: whether importing the file runs it (neither in a function nor for types only).
    """

    module: str
    at_load: bool

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def read_imports(source: str) -> Iterator[Import]:
    yield from _walk(ast.parse(source), at_load=True)


def _walk(node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import: write the package's name"
            assert child.module is not None
            yield Import(child.module, at_load)
            yield from (Import(f"{child.module}.{alias.name}", at_load) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (Import(i.module, False) for part in child.body for i in _walk_one(part))
            yield from (i for part in child.orelse for i in _walk_one(part, at_load=at_load))
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, at_load=at_load and not is_function)


def _walk_one(node: ast.stmt, *, at_load: bool = False) -> Iterator[Import]:
    yield from _walk(ast.Module(body=[node], type_ignores=[]), at_load=at_load)


def sources(folder: str) -> dict[str, str]:
    """Python source by path from the repository's root; a notebook's code cells as one file."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py":
            found[name] = path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            lines = "\n".join(code).splitlines()
            found[name] = "\n".join(line for line in lines if not line.startswith(("%", "!")))
    return found


@cache
def imports_of(name: str) -> tuple[Import, ...]:
    return tuple(read_imports((ROOT / name).read_text(encoding="utf-8")))


def module_file(module: str) -> str | None:
    """File of one of our modules, or None where the dotted name is not a module."""
    path = module.replace(".", "/")
    for name in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / name).is_file():
            return name
    return None


def files_loaded_by(name: str) -> set[str]:
    """All our files that importing a file executes, itself included."""
    loaded, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current in loaded:
            continue
        loaded.add(current)
        imports = (i for i in imports_of(current) if i.at_load and i.package in OURS)
        found = (module_file(i.module) for i in imports)
        waiting += [file for file in found if file is not None]
    return loaded


def imported_at_load(name: str) -> set[str]:
    """Foreign packages that importing a file loads, through our own files too."""
    return {
        found.package
        for file in files_loaded_by(name)
        for found in imports_of(file)
        if found.at_load
    }


CDR_FILES = sorted(sources("cdr"))


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_what_lies_below_it(folder: str) -> None:
    wrong = {
        f"{name} imports {found.module}"
        for name, source in sources(folder).items()
        for found in read_imports(source)
        if found.package in OURS - ALLOWED[folder]
    }
    assert wrong == set()


@pytest.mark.parametrize("name", sorted(sources("notebooks")))
def test_names_that_a_notebook_imports_exist(name: str) -> None:
    # Types are not checked there, and their tests on Spark are no part of `make check`.
    missing = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(sources("notebooks")[name]))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "cdr"
        for alias in node.names
        if not hasattr(importlib.import_module(str(node.module)), alias.name)
    ]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in CDR_FILES if "/engines/" in name])
def test_engine_loads_without_spark(name: str) -> None:
    assert imported_at_load(name) & (SPARK | {"mlflow"}) == set()


@pytest.mark.parametrize("name", [name for name in CDR_FILES if name not in TORCH_AT_IMPORT])
def test_module_loads_without_torch(name: str) -> None:
    assert imported_at_load(name) & HEAVY == set()


@pytest.mark.parametrize("name", sorted(sources("jobs")))
def test_job_is_a_recipe(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < MAX_JOB_LINES


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "notebooks", "jobs", "udfs"])
def test_private_names_of_the_library_stay_in_it(folder: str) -> None:
    wrong = {
        f"{name} imports {found.module}"
        for name, source in sources(folder).items()
        for found in read_imports(source)
        if found.package == "cdr"
        and any(part.startswith("_") and part != "__init__" for part in found.module.split("."))
    }
    assert wrong == set()


# --- the reader itself -------------------------------------------------------------------------

SAMPLE = """
import a.b, c
from d import e
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import types_only
else:
    import not_types
try:
    import tried
except ImportError:
    import instead
def function():
    import late
    class Inner:
        from later import name
class Body:
    import in_class
"""


def test_reader_tells_load_time_from_later() -> None:
    found = list(read_imports(SAMPLE))
    assert {i.module for i in found if i.at_load} == {
        *("a.b", "c", "d", "d.e", "typing", "typing.TYPE_CHECKING"),
        *("not_types", "tried", "instead", "in_class"),
    }
    assert {i.module for i in found if not i.at_load} == {
        "types_only",
        "late",
        "later",
        "later.name",
    }


def test_reader_follows_our_own_modules() -> None:
    loaded = files_loaded_by("cdr/config_reference.py")
    assert {"cdr/config_reference.py", "cdr/config.py", "cdr/errors.py"} <= loaded
    assert {"pydantic", "omegaconf"} <= imported_at_load("cdr/config_reference.py")


def test_rules_are_applied_to_something() -> None:
    assert len(CDR_FILES) > 10
    assert sources("jobs")
    assert sources("udfs")
    assert {name for name in TORCH_AT_IMPORT if (ROOT / name).is_file()}
