"""The vLLM engine, on this machine's CPU, against the transformers engine, in float32.

One core is loaded for the whole module: the demo's weak model and, sharing its weights, the strong
one, which is a LoRA adapter on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.adapters import share_weights
from cdr.engines.base import EngineSpec, SamplingRequest, ScoringGroup, make_engine
from cdr.engines.client import connect
from cdr.engines.device import Device
from cdr.engines.launch import HostOptions
from cdr.engines.owner import Owner
from cdr.engines.processes import is_alive
from cdr.engines.transformers import TransformersEngine
from cdr.engines.vllm import VllmEngine
from cdr.engines.vllm_setup import find_vllm_version
from cdr.engines.vllm_worker import WorkerExtension
from cdr.errors import EngineDied, ModelError

MODEL = resolve_demo_model_dir()
CONF = Path(__file__).resolve().parents[2] / "conf"
ADAPTER = CONF / "models" / "smollm2-135m-instruct-dpo"

pytestmark = [
    pytest.mark.skipif(find_vllm_version() is None, reason="no vLLM: run make setup-vllm"),
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").is_file(),
        reason="the demo model is not there: run jobs/make_demo_model.py",
    ),
    # vLLM and what it imports warn about each other.
    pytest.mark.filterwarnings("default"),
]

# None: all cores. Fewer on a machine with other work, where threads wait for each other.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or None
BLOCK = 32  # tokens per block of the prefix cache
BATCH = 256  # tokens per step: the longest prefix below takes several
WEAK = EngineSpec(
    "weak", "vllm", str(MODEL), dtype="float32", max_length=1024, batch_tokens=BATCH
)  # fmt: skip


class Pair(NamedTuple):
    weak: VllmEngine
    strong: VllmEngine


@pytest.fixture(scope="module")
def vllm() -> Iterator[Pair]:
    strong = replace(WEAK, name="strong", adapter_path=str(ADAPTER))
    weak, strong = share_weights([WEAK, strong])
    pair = Pair(VllmEngine(weak, THREADS), VllmEngine(strong, THREADS))
    yield pair
    pair.weak.close()
    pair.strong.close()


@pytest.fixture(scope="module")
def reference() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(replace(WEAK, engine="transformers"), THREADS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def demo_groups() -> list[ScoringGroup]:
    """The demo's 224 completions, by prompt."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (CONF / "demo" / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    groups = []
    for _, of_prompt in groupby(rows, key=lambda row: row["prompt_id"]):
        candidates = list(of_prompt)
        text = tokenizer.apply_chat_template(
            candidates[0]["prompt"], add_generation_prompt=True, tokenize=False
        )
        groups.append(
            ScoringGroup(
                tuple(tokenizer.encode(text, add_special_tokens=False)),
                tuple(
                    tuple(tokenizer.encode(c["completion"], add_special_tokens=False))
                    for c in candidates
                ),
            )
        )
    return groups


@pytest.fixture(scope="module")
def text_ids(demo_groups: list[ScoringGroup]) -> list[int]:
    return [token for group in demo_groups for ids in group.completions_ids for token in ids]


def assert_same(got: Any, expected: Any) -> None:
    assert [len(group) for group in got] == [len(group) for group in expected]
    for one, other in zip(chain(*got), chain(*expected), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


def test_real_completions_score_as_with_transformers(
    vllm: Pair, reference: TransformersEngine, demo_groups: list[ScoringGroup]
) -> None:
    assert sum(len(group.completions_ids) for group in demo_groups) >= 200
    before = vllm.weak.num_resubmitted
    assert_same(vllm.weak.score(demo_groups), reference.score(demo_groups))
    assert vllm.weak.num_resubmitted == before


@pytest.mark.parametrize("prefix_length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 600])
def test_prefixes_of_any_length_score_as_with_transformers(
    vllm: Pair, reference: TransformersEngine, text_ids: list[int], prefix_length: int
) -> None:
    # Another start for each length: what an earlier test left in the cache must not be hit.
    draws = iter(text_ids[7 * prefix_length :])
    prefix = tuple(next(draws) for _ in range(prefix_length))
    long = tuple(next(draws) for _ in range(80))
    groups = [
        # One token; a duplicate; the start of another; alike up to a block's end, and beyond it.
        ScoringGroup(
            prefix,
            (
                long,
                long[:1],
                long,
                long[:40],
                (*long[: BLOCK - 1], 7, 8),
                (*long[:BLOCK], 9, 10),
                (*long[: 2 * BLOCK], 11),
                (*long[: 2 * BLOCK], 12, 13),
                (14,),
            ),
        ),
        ScoringGroup((*prefix, 5), (tuple(next(draws) for _ in range(20)),)),
        ScoringGroup((*prefix, 6), ((1,), (2,))),
    ]
    before = vllm.weak.num_resubmitted
    assert_same(vllm.weak.score(groups), reference.score(groups))
    assert vllm.weak.num_resubmitted == before


def test_32_completions_score_as_with_transformers(
    vllm: Pair, reference: TransformersEngine, text_ids: list[int]
) -> None:
    prefix = tuple(text_ids[1000 : 1000 + 3 * BLOCK])
    starts = [tuple(text_ids[5000 + 9 * i : 5000 + 9 * i + 12 + i]) for i in range(32)]
    group = ScoringGroup(prefix, tuple(starts))
    before = vllm.weak.num_resubmitted
    assert_same(vllm.weak.score([group]), reference.score([group]))
    assert vllm.weak.num_resubmitted == before


def test_more_first_tokens_than_one_primer_may_ask_for(
    vllm: Pair, reference: TransformersEngine, text_ids: list[int]
) -> None:
    labels = tuple((token,) for token in range(100, 300))
    group = ScoringGroup(tuple(text_ids[2000:2040]), labels)
    assert_same(vllm.weak.score([group]), reference.score([group]))


def test_what_is_cached_from_before_is_asked_for_again_and_counted(
    vllm: Pair, reference: TransformersEngine, text_ids: list[int]
) -> None:
    group = ScoringGroup(tuple(text_ids[3000:3050]), (tuple(text_ids[3050:3130]),))
    expected = reference.score([group])
    assert_same(vllm.weak.score([group]), expected)
    before = vllm.weak.num_resubmitted
    # The completion's own blocks are in the cache now: their rows would be missing.
    assert_same(vllm.weak.score([group]), expected)
    assert vllm.weak.num_resubmitted == before + 1


def test_an_adapter_shares_the_weights_and_scores_as_with_transformers(
    vllm: Pair, demo_groups: list[ScoringGroup]
) -> None:
    spec = replace(WEAK, engine="transformers", adapter_path=str(ADAPTER))
    merged = TransformersEngine(spec, THREADS)
    groups = demo_groups[:8]
    assert_same(vllm.strong.score(groups), merged.score(groups))
    greedy = [request(group.prefix_ids, (0,), temperature=0.0) for group in groups[:4]]
    samples = vllm.strong.generate(greedy)
    assert samples == merged.generate(greedy)
    assert samples != vllm.weak.generate(greedy)
    merged.close()
    pairs = zip(chain(*vllm.strong.score(groups)), chain(*vllm.weak.score(groups)), strict=True)
    differences = [np.abs(strong - weak).max() for strong, weak in pairs]
    assert max(differences) > 0.05
    assert len(vllm_cores()) == 1


def request(prefix: tuple[int, ...], seeds: tuple[int, ...], **fields: Any) -> SamplingRequest:
    defaults = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "stop_ids": ()}
    return SamplingRequest(prefix, seeds, **{**defaults, **fields})


def test_greedy_samples_are_those_of_transformers(
    vllm: Pair, reference: TransformersEngine, demo_groups: list[ScoringGroup]
) -> None:
    greedy = [request(group.prefix_ids, (0,), temperature=0.0) for group in demo_groups[:4]]
    samples = vllm.weak.generate(greedy)
    assert samples == reference.generate(greedy)
    [free] = samples[0]
    assert (len(free.token_ids), free.finish_reason) == (12, "length")
    [[stopped]] = vllm.weak.generate([replace(greedy[0], stop_ids=(free.token_ids[5],))])
    expected = free.token_ids[: free.token_ids.index(free.token_ids[5])]
    assert (stopped.token_ids, stopped.finish_reason) == (expected, "stop")


def test_the_same_seed_gives_the_same_sample(vllm: Pair, demo_groups: list[ScoringGroup]) -> None:
    first, second = (group.prefix_ids for group in demo_groups[:2])
    [[one, other]] = vllm.weak.generate([request(first, (5, 2**64 - 1))])
    assert one != other
    [_, [again]] = vllm.weak.generate([request(second, (5,)), request(first, (5,))])
    assert again == one


def test_samples_of_a_prompt_share_its_prefill(
    vllm: Pair, text_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = []

    def ask(requests: Any) -> Any:
        answers.extend(VllmEngine.ask(vllm.strong, requests))
        return answers

    monkeypatch.setattr(vllm.strong, "ask", ask)
    prefix = tuple(text_ids[6000 : 6000 + 3 * BLOCK + 5])
    [samples] = vllm.strong.generate([request(prefix, (1, 2, 3, 4))])
    # All are asked at once, and the first computes the three whole blocks for the others.
    assert [answer.num_cached_tokens for answer in answers] == [0, *[3 * BLOCK] * 3]
    assert len({sample.token_ids for sample in samples}) == 4


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (ScoringGroup((1, 49152), ((2,),)), "token id 49152 .* vocabulary of 49152"),
        (ScoringGroup((1,) * 1000, ((2,) * 25,)), "at most 1024 tokens"),
        (ScoringGroup((1,), ((),)), "at least one token"),
    ],
)
def test_what_cannot_be_scored_is_refused(vllm: Pair, group: ScoringGroup, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        vllm.weak.score([group])


def test_a_sequence_of_max_length_is_scored(
    vllm: Pair, reference: TransformersEngine, text_ids: list[int]
) -> None:
    group = ScoringGroup(tuple(text_ids[:1000]), (tuple(text_ids[1000:1024]),))
    assert_same(vllm.weak.score([group]), reference.score([group]))


def test_what_cannot_be_loaded_is_refused(vllm: Pair) -> None:
    with pytest.raises(ModelError, match=r"cannot load the model.*8192"):
        make_engine(replace(WEAK, max_length=9000))
    with pytest.raises(ModelError, match="tensor_parallel must be 1 on a CPU"):
        make_engine(replace(WEAK, tensor_parallel=2))
    assert len(vllm_cores()) == 1


def test_the_version_names_vllm_and_torch(vllm: Pair) -> None:
    assert vllm.weak.engine_version.startswith("vllm 0.")
    assert " / torch 2." in vllm.weak.engine_version


def test_no_process_is_left_when_the_last_engine_is_closed(vllm: Pair) -> None:
    vllm.weak.close()
    (core,) = vllm_cores()
    processes = [core, *core.children(recursive=True)]
    vllm.strong.close()
    assert not any(map(is_alive, processes))
    assert not vllm_cores()


def test_an_engine_whose_core_is_killed_says_so_and_can_be_loaded_again() -> None:
    for _ in range(2):
        engine = VllmEngine(WEAK, THREADS)
        (core,) = vllm_cores()
        processes = [core, *core.children(recursive=True)]
        core.kill()
        with pytest.raises(EngineDied):
            engine.score([ScoringGroup((1, 2), ((3, 4),))])
        engine.close()
        assert not any(map(is_alive, processes))
        assert not vllm_cores()


class UnquantizedHead:
    def apply(self, layer: Any, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(rows, layer.weight, bias)


class QuantizedHead(UnquantizedHead):
    pass


def test_a_head_of_weights_cast_once_gives_what_casting_them_each_time_gives() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    with set_current_vllm_config(VllmConfig()):
        processor = LogitsProcessor(300)
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(get_model=lambda: torch.nn.Sequential(processor))
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 96).bfloat16())
    head = SimpleNamespace(weight=weight, quant_method=UnquantizedHead())
    bias, rows = torch.randn(300).bfloat16(), torch.randn(7, 96).bfloat16()
    with torch.inference_mode():
        before = processor._apply_head(head, rows, None)
        assert before.dtype == torch.bfloat16
        # This vLLM has the method that is replaced.
        assert worker.cast_head_once() == 1
        apply = processor._apply_head
        for added in (None, bias, bias):
            expected = torch.nn.functional.linear(
                rows.float(), weight.float(), None if added is None else added.float()
            )
            torch.testing.assert_close(apply(head, rows, added), expected)
        # The rest is vLLM's own way.
        quantized = SimpleNamespace(weight=weight, quant_method=QuantizedHead())
        torch.testing.assert_close(apply(quantized, rows, None), before)


def test_a_host_holds_two_cores_that_work_at_the_same_time(
    demo_groups: list[ScoringGroup],
) -> None:
    """In bfloat16, whose head is float32: what a run has by default."""
    specs = [
        replace(WEAK, name=name, dtype="bfloat16", max_length=length)
        for name, length in (("one", 512), ("two", 1024))
    ]
    assert len({spec.weights() for spec in specs}) == 2, "they would share a core"
    groups = [group for group in demo_groups if len(group.prefix_ids) < 300][:8]
    options = HostOptions(owner=Owner.of(os.getpid()), num_threads=THREADS)
    with connect(Device("cpu", ("vllm-tests",)), options) as client:
        status = client.set_engines(specs)
        assert [engine.name for engine in status.engines] == ["one", "two"]
        assert len(vllm_cores(status.pid)) == 2
        answers = client.score_all({"one": groups, "two": groups})
        client.set_engines(specs[1:])
        (core,) = vllm_cores(status.pid)
        again = client.score("two", groups)
        client.shutdown()
    assert not is_alive(core)
    engine = TransformersEngine(replace(specs[0], engine="transformers"), THREADS)
    expected = np.concatenate(list(chain(*engine.score(groups))))
    engine.close()
    for outcomes in (*answers.values(), again):
        logprobs = [o.value for o in chain(*outcomes) if o.value is not None]
        assert np.abs(np.concatenate(logprobs) - expected).mean() < 0.1


def vllm_cores(parent: int | None = None) -> list[psutil.Process]:
    """Engine cores among this process's descendants, or a host's; workers are below them."""
    found = psutil.Process(parent).children(recursive=True)
    return [p for p in found if is_alive(p) and "EngineCore" in " ".join(p.cmdline()[:1])]
