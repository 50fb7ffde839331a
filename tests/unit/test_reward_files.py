"""A reward's folder: what is in it, that it is the same reward again, and what is noticed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdr.errors import ConfigError
from cdr.plan import RewardPlan, plan_reward
from cdr.reward_config import load_reward_config
from cdr.reward_files import read_identity, read_reward, write_reward
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe

PACK = Path(__file__).resolve().parents[2] / "conf" / "prompts" / "cdr-v1.yaml"
SPECIAL = ("<|im_end|>", "<|im_start|>")


def make_model(folder: Path, weights: bytes) -> Path:
    """A folder that can be planned with: its weights are hashed and never loaded."""
    make_small_bpe(CHATML_TEMPLATE, special=SPECIAL).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 500}))
    return folder


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    """A reward's YAML, with models and pack of its own."""
    shutil.copy(PACK, tmp_path / "pack.yaml")
    for role in ("strong", "weak"):
        make_model(tmp_path / role, role.encode())
    tree = {
        "name": "toy",
        "description": "costs ${nothing}",
        "models": {
            **{role: {"path": f"./{role}"} for role in ("strong", "weak")},
            "router": {"path": "./weak", "max_length": 999},
            "unused": {"path": "./nowhere"},
        },
        "prompt_pack": "./pack.yaml",
        "routing": {"mode": "adaptive", "domains": ["safety", "chat"]},
    }
    text = yaml.safe_dump(tree).replace("${", "\\${")
    (tmp_path / "toy.yaml").write_text(text)
    return tmp_path / "toy.yaml"


def write(path: Path, *overrides: str) -> tuple[RewardPlan, Path]:
    plan = plan_reward(load_reward_config(path, overrides))
    folder = path.parent / "registered"
    folder.mkdir()
    write_reward(plan, folder)
    return plan, folder


def read_error(folder: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_reward(folder, where="models:/toy/1", overrides=overrides)
    return caught.value


def test_a_folder_holds_the_same_reward_pinned_and_apart_from_its_sources(reward: Path) -> None:
    plan, folder = write(reward)
    (reward.parent / "pack.yaml").unlink()
    reward.unlink()
    again = read_reward(folder, where="models:/toy/1")
    assert again.key == plan.key == read_identity(folder).reward_key
    assert again.encoding == plan.encoding
    assert again.spec.description == "costs ${nothing}"
    assert sorted(file.name for file in folder.iterdir()) == [
        "identity.json", "prompt_pack.yaml", "reward.yaml"
    ]  # fmt: skip
    assert set(again.spec.models) == {"strong", "weak", "router"}
    for spec in again.spec.models.values():
        assert re.fullmatch("[0-9a-f]{64}", spec.checksum or "")
        assert "auto" not in (spec.dtype, spec.head_dtype)


def test_a_template_file_and_a_reward_without_a_pack_come_along(reward: Path) -> None:
    template = reward.parent / "own.jinja"
    template.write_text(CHATML_TEMPLATE)
    plan, folder = write(reward, f"encoding.template={template}", "routing.mode=none")
    template.unlink()
    again = read_reward(folder, where="models:/toy/1")
    assert again.key == plan.key
    assert again.spec.prompt_pack is None
    assert not (folder / "prompt_pack.yaml").exists()


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("exemplars", None, "prompt_pack (its layout, instructions or exemplars were altered)"),
        ("router", "Sort this conversation.", "prompt_pack (the router's texts were altered)"),
    ],
)
def test_an_altered_pack_is_an_error_that_says_so(
    reward: Path, old: str, new: str | None, part: str
) -> None:
    _, folder = write(reward)
    tree = yaml.safe_load((folder / "prompt_pack.yaml").read_text())
    if new is None:
        tree["domains"]["safety"][old].popitem()
    else:
        tree["router"]["system"] = new
    (folder / "prompt_pack.yaml").write_text(yaml.safe_dump(tree))
    error = read_error(folder)
    (problem,) = error.problems
    assert problem.startswith(f"{part}: was ")
    assert error.where == "models:/toy/1"
    assert "register what you have as a new version" in str(error)


def test_weights_that_changed_in_their_folder_are_an_error(reward: Path) -> None:
    _, folder = write(reward)
    (reward.parent / "strong" / "model.safetensors").write_bytes(b"other")
    (problem,) = read_error(folder).problems
    assert problem.startswith("models.strong.path:")
    assert "its files have changed or are damaged" in problem


def test_models_that_are_gone_are_named(reward: Path) -> None:
    _, folder = write(reward)
    shutil.rmtree(reward.parent / "weak")
    assert sorted(problem.partition(":")[0] for problem in read_error(folder).problems) == [
        "models.router.path", "models.weak.path"
    ]  # fmt: skip


def test_folders_may_move_and_models_be_run_in_another_way(reward: Path) -> None:
    plan, folder = write(reward)
    moved = reward.parent / "elsewhere"
    (reward.parent / "strong").rename(moved)
    changes = [f"models.strong.path={moved}", "models.strong.batch_tokens=128", "name=renamed"]
    again = read_reward(folder, where="models:/toy/1", overrides=changes)
    assert again.key == plan.key


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("reduction=mean", "reduction: was sum when it was registered, is mean"),
        ("models.strong.max_length=777", "models.strong.max_length: was 2048"),
        ("models.strong.dtype=float32", None),
        ("engine=stub", "models.strong.engine: was transformers"),
        ("seed=1", "seed: was 0"),
        ("routing.threshold=0.5", "routing: was "),
    ],
)
def test_what_decides_numbers_may_not_be_overridden(
    reward: Path, override: str, named: str | None
) -> None:
    _, folder = write(reward, "models.strong.dtype=bfloat16")
    error = read_error(folder, override)
    expected = named or "models.strong.dtype: was bfloat16 when it was registered, is float32"
    assert any(problem.startswith(expected) for problem in error.problems)


def test_keys_of_another_version_of_the_package_are_told_from_changes(reward: Path) -> None:
    _, folder = write(reward)
    file = folder / "identity.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "reward_key": "0" * 64}))
    assert "is computed in another way" in read_error(folder).problems[0]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_that_is_no_rewards_is_an_error(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "identity.json").write_text(content)
    with pytest.raises(ConfigError, match=r"identity\.json: is missing or damaged"):
        read_identity(tmp_path)
