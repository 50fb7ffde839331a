"""How a registered reward is named, where its store is looked for, and what a name may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdr.config_files import named_file, read_values
from cdr.errors import ConfigError, InputError, SetupError
from cdr.registration import find_store, read_metrics
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


def test_metrics_are_a_json_object(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"rewardbench": {"safety": 0.9}}')
    assert read_metrics(file) == {"rewardbench": {"safety": 0.9}}
    assert read_metrics(None) == {}
    for text in ("[1]", "{"):
        file.write_text(text)
        with pytest.raises(InputError, match="JSON object"):
            read_metrics(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "none.json")
