"""The model key changes with what decides the numbers, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cdr import models
from cdr.errors import ConfigError
from cdr.models import ResolvedModel, resolve_models
from cdr.reward_config import ModelSpec, RewardSpec
from cdr.weights import Source


def make_folder(path: Path, weights: bytes = b"weights", **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text(json.dumps({"vocab_size": 100, **config}))
    (path / "tokenizer.json").write_text("{}")
    return path


def make_adapter(path: Path, weights: bytes = b"lora") -> Path:
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(weights)
    (path / "adapter_config.json").write_text("{}")
    return path


def resolve(folder: Path, **options: Any) -> ResolvedModel:
    spec = {"path": str(folder), "dtype": "float32", **options}
    reward = RewardSpec(
        name="r",
        models={"strong": ModelSpec(**spec)},
        form="prompt_delta",
        routing={"mode": "none"},  # type: ignore[arg-type]
    )
    return resolve_models(reward)["strong"]


def test_what_decides_the_numbers_changes_the_key(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    adapter = make_adapter(tmp_path / "a")
    keys = [
        resolve(folder).model_key,
        resolve(make_folder(tmp_path / "m2", b"other")).model_key,
        resolve(make_folder(tmp_path / "m3", rope_theta=5)).model_key,
        resolve(folder, dtype="bfloat16").model_key,
        resolve(folder, head_dtype="bfloat16").model_key,
        resolve(folder, engine="stub").model_key,
        resolve(folder, adapter=str(adapter)).model_key,
        resolve(folder, adapter=str(make_adapter(tmp_path / "a2", b"other"))).model_key,
    ]
    assert len(set(keys)) == len(keys)


def test_what_does_not_decide_the_numbers_keeps_the_key(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    key = resolve(folder).model_key
    assert resolve(make_folder(tmp_path / "moved" / "elsewhere")).model_key == key
    assert resolve(folder, max_length=99, batch_tokens=128, tuned_from="weak").model_key == key
    (folder / "README.md").write_text("a note")
    assert resolve(folder).model_key == key


def test_a_tokenizer_changes_its_own_hash_and_not_the_model_key(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    before = resolve(folder)
    key, tokenizer = before.model_key, before.tokenizer_hash()
    (folder / "tokenizer.json").write_text('{"changed": true}')
    after = resolve(folder)
    assert (after.model_key, after.tokenizer_hash() == tokenizer) == (key, False)


def test_a_stub_is_known_by_its_tokenizer_wherever_that_lies(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    key = resolve(folder, engine="stub").model_key
    assert resolve(make_folder(tmp_path / "moved", b"other"), engine="stub").model_key == key
    (folder / "tokenizer.json").write_text('{"changed": true}')
    assert resolve(folder, engine="stub").model_key != key


def test_a_folder_of_several_models_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Source] = []

    def hash_source(source: Source) -> str:
        hashed.append(source)
        return "0" * 64

    monkeypatch.setattr(models, "hash_source", hash_source)
    path, adapter = str(make_folder(tmp_path / "m")), str(make_adapter(tmp_path / "a"))
    reward = RewardSpec(
        name="r",
        models={
            "strong": ModelSpec(path=path, adapter=adapter, tuned_from="weak"),
            "weak": ModelSpec(path=path),
        },
        routing={"mode": "none"},  # type: ignore[arg-type]
    )
    found = resolve_models(reward)
    assert found["strong"].model_key != found["weak"].model_key
    assert [source.path for source in hashed] == [path, adapter]


def test_every_model_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    no_weights = make_folder(tmp_path / "w")
    (no_weights / "model.safetensors").unlink()
    reward = RewardSpec(
        name="r",
        models={
            "strong": ModelSpec(path=str(tmp_path / "nowhere")),
            "weak": ModelSpec(path=str(empty)),
            "third": ModelSpec(path=str(no_weights)),
            "unused": ModelSpec(path=str(tmp_path / "nowhere-too")),
        },
        form="custom",
        terms=[  # type: ignore[arg-type]
            {"model": name, "weight": 1.0} for name in ("strong", "weak", "third")
        ],
        routing={"mode": "none"},  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError) as caught:
        resolve_models(reward)
    found = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "models.strong.path: no such folder" in found
    assert f"models.weak.path: '{empty}' lacks *.safetensors and config.json" in found
    assert f"models.third.path: '{no_weights}' lacks *.safetensors" in found


def test_an_adapter_without_its_files_says_which(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"models\.strong\.adapter.*lacks adapter_config\.json"):
        resolve(make_folder(tmp_path / "m"), adapter=str(adapter))
