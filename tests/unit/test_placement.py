"""Placement is arithmetic: bytes of weights from the files, against the memory of a device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cdr.config import AnnotateConfig
from cdr.encoding import EncodingPlan, TokenizerSpec
from cdr.engines.base import EngineSpec
from cdr.errors import ConfigError, ModelError
from cdr.models import ResolvedModel
from cdr.placement import place, weights_bytes
from cdr.plan import AnnotationPlan, RewardPlan, RoutePlan
from cdr.prompt_pack import load_prompt_pack
from cdr.reward_config import ModelSpec

CONF = Path(__file__).resolve().parents[2] / "conf"
PARAMETERS = 1 << 20  # 4 MiB in float32, with a quarter more 5 MiB
GIB_OF_A_MIB = 1 / 1024


def make_model(root: Path, role: str, **spec: Any) -> ResolvedModel:
    folder = root / role
    folder.mkdir()
    save_file({"weight": np.zeros((1024, 1024), np.float32)}, folder / "model.safetensors")
    engine = EngineSpec(role, "transformers", str(folder), **spec)
    return ResolvedModel(role, ModelSpec(path=str(folder)), engine, 10, str(folder))


def make_plan(models: list[ResolvedModel], **run: Any) -> AnnotationPlan:
    stub = {"path": "x", "engine": "stub"}
    config = AnnotateConfig.model_validate(
        {
            "dataset": "d",
            "warehouse": "w",
            "input": {"path": "in", "format": "json"},
            "reward": {
                "name": "r",
                "models": {"strong": stub, "weak": stub},
                "routing": {"mode": "none"},
            },
            "run": run,
        }
    )
    reward = RewardPlan(
        spec=config.reward,
        models={model.role: model for model in models},
        pack=None,
        encoding=EncodingPlan((), (), None, 0, "reject", True, False),
        engines=tuple(m.engine_spec for m in models if m.role != "router"),
        route=None,
        key="k",
    )
    return AnnotationPlan(config=config, dataset="d", limit=None, reward=reward)


def make_route(engine: EngineSpec) -> RoutePlan:
    pack = load_prompt_pack(str(CONF / "prompts" / "cdr-v1.yaml"))
    tokenizer = TokenizerSpec(engine.name, "", None, "", 10, 10)
    return RoutePlan(pack, ("chat",), engine, tokenizer, 0.5, "chat", False, "k")


def placed(models: list[ResolvedModel], memory_mib: float, **run: Any) -> AnnotationPlan:
    run = {"placement": "auto", "device_memory_gib": memory_mib * GIB_OF_A_MIB, **run}
    return place(make_plan(models, **run), None)  # type: ignore[arg-type]  # no look-up is needed


@pytest.fixture
def pair(tmp_path: Path) -> list[ResolvedModel]:
    return [make_model(tmp_path, role) for role in ("strong", "weak")]


def test_models_that_fit_together_share_a_device_in_halves(pair: list[ResolvedModel]) -> None:
    plan = placed(pair, 12)  # 0.45 · 12 = 5.4 ≥ 5
    assert plan.config.run.placement == "colocated"
    assert [engine.memory_fraction for engine in plan.reward.engines] == [0.45, 0.45]


def test_models_that_only_fit_alone_go_one_after_the_other(pair: list[ResolvedModel]) -> None:
    plan = placed(pair, 11)  # 0.45 · 11 = 4.95 < 5 ≤ 0.9 · 11
    assert plan.config.run.placement == "sequential"
    assert [engine.memory_fraction for engine in plan.reward.engines] == [None, None]


def test_a_share_that_the_config_sets_stays_and_the_other_model_gets_the_rest(
    tmp_path: Path,
) -> None:
    models = [make_model(tmp_path, "strong", memory_fraction=0.6), make_model(tmp_path, "weak")]
    plan = placed(models, 100)
    assert [engine.memory_fraction for engine in plan.reward.engines] == [0.6, pytest.approx(0.3)]


def test_two_adapters_on_one_copy_of_weights_have_the_device_to_themselves(
    tmp_path: Path,
) -> None:
    strong = make_model(tmp_path, "strong", adapter_path="a")
    strong = replace(strong, engine_spec=replace(strong.engine_spec, engine="vllm"))
    base = replace(strong.engine_spec, name="weak", adapter_path=None)
    plan = placed([strong, replace(strong, role="weak", engine_spec=base)], 6)  # 5 ≤ 0.9 · 6
    assert plan.config.run.placement == "colocated"
    assert [engine.memory_fraction for engine in plan.reward.engines] == [None, None]


def test_a_router_that_also_scores_is_loaded_as_for_scoring(pair: list[ResolvedModel]) -> None:
    plan = make_plan(pair, device_memory_gib=1, placement="colocated")
    strong, alone = pair[0].engine_spec, EngineSpec("router", "vllm", "", tensor_parallel=4)
    for engine, share in ((strong, 0.45), (alone, None)):
        reward = replace(plan.reward, route=make_route(engine))
        route = place(replace(plan, reward=reward), None).reward.route  # type: ignore[arg-type]
        assert route is not None
        assert route.engine == replace(engine, memory_fraction=share)


def test_shares_beyond_the_device_are_refused(tmp_path: Path) -> None:
    models = [make_model(tmp_path, r, memory_fraction=0.6) for r in ("strong", "weak")]
    with pytest.raises(ConfigError, match=r"memory_fraction: .* got 1\.2"):
        placed(models, 100, placement="colocated")


def test_a_model_too_large_for_its_share_is_refused_with_what_to_change(
    pair: list[ResolvedModel],
) -> None:
    with pytest.raises(ConfigError, match=r"run\.placement 'sequential'") as colocated:
        placed(pair, 11, placement="colocated")
    assert len(colocated.value.problems) == 2
    with pytest.raises(ConfigError, match="tensor_parallel") as alone:
        placed(pair, 5)
    assert "models.strong: needs about" in alone.value.problems[0]
    assert "'sequential'" not in str(alone.value)


def test_weights_are_split_over_the_devices_of_tensor_parallel(tmp_path: Path) -> None:
    models = [make_model(tmp_path, role, tensor_parallel=2) for role in ("strong", "weak")]
    assert placed(models, 6).config.run.placement == "colocated"  # 2.5 ≤ 0.45 · 6


def test_a_router_that_does_not_fit_is_refused_though_it_is_loaded_alone(
    pair: list[ResolvedModel], tmp_path: Path
) -> None:
    router = make_model(tmp_path, "router", memory_fraction=0.1)
    assert placed([*pair, router], 60).config.run.placement == "colocated"  # 5 ≤ 0.1 · 60
    with pytest.raises(ConfigError, match=r"models\.router: needs"):
        placed([*pair, router], 40)


def test_placements_that_the_config_names_need_no_sizes(pair: list[ResolvedModel]) -> None:
    for name in ("colocated", "sequential"):
        plan = place(make_plan(pair, placement=name), None)  # type: ignore[arg-type]
        assert plan.config.run.placement == name


def test_weights_count_in_the_dtype_they_run_in_and_quantised_ones_as_stored(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path, "m")
    assert weights_bytes(model) == 4 * PARAMETERS
    half = replace(model, engine_spec=replace(model.engine_spec, dtype="bfloat16"))
    assert weights_bytes(half) == 2 * PARAMETERS
    save_file({"q": np.zeros(PARAMETERS, np.int8)}, tmp_path / "m" / "more.safetensors")
    assert weights_bytes(half) == 2 * PARAMETERS + PARAMETERS


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path: Path) -> None:
    model = make_model(tmp_path, "m")
    save_file({"w": np.zeros(PARAMETERS, np.float32)}, tmp_path / "m/consolidated.safetensors")
    assert weights_bytes(model) == 4 * PARAMETERS
    # With an index, its files are the weights: one of them is still to come.
    index = {"metadata": {"total_size": 5 * PARAMETERS}, "weight_map": {"a": "1.safetensors"}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "m/config.json").write_text('{"dtype": "float32"}')
    assert weights_bytes(model) == 5 * PARAMETERS
    save_file({"a": np.zeros(PARAMETERS, np.float16)}, tmp_path / "m/1.safetensors")
    assert weights_bytes(model) == 4 * PARAMETERS  # run in 4 bytes


def test_a_file_without_weights_is_told(tmp_path: Path) -> None:
    model = make_model(tmp_path, "m")
    for text in ("version https://git-lfs.github.com/spec/v1\n", ""):
        (tmp_path / "m/model.safetensors").write_text(text)
        with pytest.raises(ModelError, match=r"is no safetensors file(.|\n)*git lfs pull"):
            weights_bytes(model)


def test_a_hub_models_index_tells_its_size_and_without_one_auto_is_refused(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path, "strong")
    (tmp_path / "strong" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"models\.strong: the size of .* is not known"):
        placed([model], 100)
    (tmp_path / "strong" / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    index = {"metadata": {"total_size": 1000}}
    (tmp_path / "strong" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_bytes(model) == 2000  # stored in 2 bytes, run in 4
