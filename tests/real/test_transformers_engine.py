"""The transformers engine against one plain full forward per sequence.

The small models are random, with weights far from zero: attention then matters, and a wrong mask,
position or window moves log-probs by whole nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines import block_attention
from cdr.engines.base import EngineSpec, SamplingRequest, ScoringGroup
from cdr.engines.causal_lm import CausalLm
from cdr.engines.cpu_math import multiply
from cdr.engines.transformers import TransformersEngine
from cdr.errors import EngineError, ModelError

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, **MIXED_WINDOW},
    "mistral": {"sliding_window": 5},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, **MIXED_WINDOW},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def save_model(folder: Path, architecture: str = "llama", **overrides: Any) -> Path:
    torch.manual_seed(0)
    sizes = {} if architecture == "gpt2" else SIZES
    config = CONFIG_MAPPING[architecture](
        **{**sizes, "vocab_size": VOCAB, "initializer_range": 0.4}
        | ARCHITECTURES[architecture]
        | overrides
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(path: Path, num_threads: int = 1, **fields: Any) -> TransformersEngine:
    fields = {"max_length": 128, **fields}
    return TransformersEngine(EngineSpec("m", "transformers", str(path), **fields), num_threads)


def plain_scores(model: Any, groups: list[ScoringGroup]) -> list[list[np.ndarray[Any, Any]]]:
    """One forward per completion: no cache, no packing, log-softmax over all float32 logits."""

    @cache
    def plain(prefix: tuple[int, ...], completion: tuple[int, ...]) -> Any:
        ids = torch.tensor([prefix + completion])
        with torch.inference_mode():
            logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        rows = torch.arange(len(prefix) - 1, ids.shape[1] - 1)
        return logprobs[rows, ids[0, len(prefix) :]].numpy()

    return [[plain(group.prefix_ids, c) for c in group.completions_ids] for group in groups]


def assert_same(got: Any, expected: Any, atol: float = 1e-4) -> None:
    assert [len(group) for group in got] == [len(group) for group in expected]
    for got_group, expected_group in zip(got, expected, strict=True):
        for one, other in zip(got_group, expected_group, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def random_group(draws: np.random.Generator, prefix: tuple[int, ...], sizes: list[int]) -> Any:
    completions = tuple(tuple(draws.integers(0, VOCAB, size).tolist()) for size in sizes)
    return ScoringGroup(prefix, completions)


def mixed_groups() -> list[ScoringGroup]:
    """Unsorted groups: shared starts, a prefix within another, duplicates, single tokens, N = 0."""
    draws = np.random.default_rng(1)
    domain = tuple(draws.integers(0, VOCAB, 20).tolist())
    first = random_group(draws, (*domain, 1, 2, 3), [9, 1, 4])
    return [
        ScoringGroup((*domain, 7), ((4, 4, 4), (4, 4, 5), (4, 4, 4), (4,))),
        first,
        random_group(draws, (5,), [30]),
        ScoringGroup((*domain, 9), ()),
        ScoringGroup(first.prefix_ids + first.completions_ids[0][:3], first.completions_ids),
        random_group(draws, domain, [2, 17]),
        first,
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def let_rows_attend_together(patch: pytest.MonkeyPatch, count: int) -> None:
    """Groups of these tests have fewer rows than by default."""
    for bound in ("MIN", "MAX"):
        patch.setattr(f"cdr.engines.block_attention._{bound}_ROWS", count)


@pytest.fixture(scope="module")
def engine_of(tiny: Path) -> Callable[[int], TransformersEngine]:
    """Engines of the tiny model by `batch_tokens`, each loaded once."""
    return cache(lambda batch_tokens: load(tiny, batch_tokens=batch_tokens))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("batch_tokens", "block", "threads"), [(7, 128, 1), (4096, 5, 1), (4096, 5, 3), (4096, 128, 1)]
)
def test_log_probs_equal_a_plain_forward_of_each_sequence(
    architecture: str,
    batch_tokens: int,
    block: int,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_rows_attend_together(monkeypatch, block)
    path = save_model(tmp_path / "model", architecture)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    engine, groups = load(path, threads, batch_tokens=batch_tokens), mixed_groups()
    expected = plain_scores(model, groups)
    assert_same(engine.score(groups), expected)
    assert_same(engine.score(groups[::-1]), expected[::-1])  # goes on from the last call's path


ALPHABET = st.integers(0, 2)
GROUPS = st.lists(
    st.builds(
        ScoringGroup,
        st.lists(ALPHABET, min_size=1, max_size=10).map(tuple),
        st.lists(st.lists(ALPHABET, min_size=1, max_size=6).map(tuple), max_size=3).map(tuple),
    ),
    max_size=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, batch_tokens=st.sampled_from([1, 2, 5, 16, 4096]))
def test_grouping_order_batch_size_and_earlier_calls_change_nothing(
    engine_of: Callable[[int], TransformersEngine],
    tiny_model: Any,
    groups: list[ScoringGroup],
    batch_tokens: int,
) -> None:
    # The engine has seen all examples before: what it kept of them must not show.
    with pytest.MonkeyPatch.context() as patch:
        let_rows_attend_together(patch, 3)
        assert_same(engine_of(batch_tokens).score(groups), plain_scores(tiny_model, groups))


def test_memory_running_out_splits_the_forward(
    tiny: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, groups = load(tiny), mixed_groups()
    sizes: list[int] = []

    def multiply_some(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return multiply(rows, weight)

    with monkeypatch.context() as patch:
        patch.setattr(block_attention, "multiply", multiply_some)
        got = engine.score(groups)
    assert max(sizes) > 40
    assert_same(got, plain_scores(tiny_model, groups))

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(block_attention, "multiply", fail)
        with pytest.raises(EngineError, match="no memory"):
            engine.score(groups)
    assert_same(engine.score(groups), plain_scores(tiny_model, groups))


def test_a_sequence_that_gives_nan_leaves_the_others_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "sound"))
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    engine = load(tmp_path / "broken")
    good = ScoringGroup((1, 2, 3), ((4, 5, 6), (4, 7)))
    bad = ScoringGroup((1, 2, 3), ((4, 50, 6), (9, 8)))
    scores = engine.score([good, bad, good])
    assert np.isnan(scores[1][0]).any()
    expected = plain_scores(model, [good, bad])
    assert_same([scores[0], scores[1][1:], scores[2]], [expected[0], expected[1][1:], expected[0]])
    assert_same(engine.score([good]), expected[:1])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (ScoringGroup((1, VOCAB), ((2,),)), "token id 61 .* vocabulary of 61"),
        (ScoringGroup((1,), ((2, 99),)), "template: plain"),
        (ScoringGroup((1,), ((-1,),)), "token id -1"),
        (ScoringGroup((1,) * 120, ((2,), (3,) * 9)), "at most 128 tokens"),
        (ScoringGroup((1,), ((2,), ())), "at least one token"),
        (ScoringGroup((), ((2,),)), "at least one token"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    engine_of: Callable[[int], TransformersEngine], group: ScoringGroup, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        engine_of(4096).score([ScoringGroup((1,), ((2,),)), group])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 129}, "128 positions"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"head_dtype": "int8"}, "head_dtype must be"),
        ({"extra": '{"device": "tpu"}'}, "no extra arguments"),
        ({"adapter_path": "missing"}, "adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tiny: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(tiny, **fields)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path)


def test_weights_that_are_no_safetensors_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(tmp_path)


def test_an_architecture_that_changes_logits_in_its_own_way_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ModelError, match="differ from its own"):
        load(tiny)


def test_bfloat16_weights_with_a_float32_head_stay_near_float32(
    tmp_path: Path,
) -> None:
    path, groups = save_model(tmp_path, initializer_range=0.1), mixed_groups()
    exact, rounded = load(path).score(groups), load(path, dtype="bfloat16").score(groups)
    differences = np.concatenate(
        [a - b for x, y in zip(exact, rounded, strict=True) for a, b in zip(x, y, strict=True)]
    )
    assert 0 < np.abs(differences).mean() < 0.05


@pytest.mark.parametrize("rows", [1, 200])
def test_a_bfloat16_models_logits_are_sums_of_exact_products(tmp_path: Path, rows: int) -> None:
    # Wide enough for the kernels that multiply bfloat16 numbers as such.
    path = save_model(tmp_path, hidden_size=256, head_dim=64, vocab_size=1024)
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    spec = EngineSpec("m", "transformers", str(path), dtype="bfloat16", max_length=128)
    model = CausalLm(spec, torch.device("cpu"))
    states = torch.randn(rows, 256).bfloat16()
    weight = model._model.get_output_embeddings().weight
    with torch.inference_mode():
        logits = model.compute_logits(states, 24, 1000)
        exact = states.double() @ weight[24:1000].double().T
    assert logits.dtype == torch.float32
    # A logit rounded to bfloat16 would be off by up to one part in 512.
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()
    after = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before


def test_an_adapter_scores_as_peft_itself_does(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path)
    groups = mixed_groups()
    got = load(tiny, adapter_path=str(tmp_path)).score(groups)
    assert_same(got, plain_scores(adapted, groups))
    assert np.abs(got[0][0] - load(tiny).score(groups)[0][0]).max() > 0.1
    rounded = load(tiny, adapter_path=str(tmp_path), dtype="bfloat16").score(groups)
    assert (rounded[0][0] != got[0][0]).any()


def request(prefix: tuple[int, ...], seeds: tuple[int, ...], **fields: Any) -> SamplingRequest:
    defaults = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 1.0, "stop_ids": ()}
    return SamplingRequest(prefix, seeds, **{**defaults, **fields})


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_temperature_zero_takes_the_likeliest_token_each_time(
    architecture: str, tmp_path: Path
) -> None:
    path = save_model(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prefixes = [(1, 2, 3, 4, 5, 6, 7, 8), (9,), (1, 2, 3, 8)]
    samples = load(path).generate([request(p, (0,), temperature=0.0) for p in prefixes])
    for prefix, [sample] in zip(prefixes, samples, strict=True):
        ids = list(prefix)
        for _ in range(10):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert (sample.token_ids, sample.finish_reason) == (tuple(ids[len(prefix) :]), "length")


def test_the_same_seed_gives_the_same_completion_in_any_batch(
    engine_of: Callable[[int], TransformersEngine],
) -> None:
    one, other = request((1, 2, 3), (5, 6)), request((1, 2, 4, 4, 4), (7, 5), top_p=0.8)
    together = engine_of(4096).generate([one, other])
    assert together[0][0] != together[0][1]
    # One token per forward leaves no room for a second sample: each is sampled alone.
    assert engine_of(1).generate([other, request((1, 2, 3), (6, 5))]) == [
        together[1],
        together[0][::-1],
    ]


def test_a_stop_token_ends_a_completion_and_is_left_out(
    engine_of: Callable[[int], TransformersEngine],
) -> None:
    [[free]] = engine_of(4096).generate([request((1, 2, 3), (5,))])
    stop = free.token_ids[4]
    [[stopped]] = engine_of(4096).generate([request((1, 2, 3), (5,), stop_ids=(stop,))])
    expected = free.token_ids[: free.token_ids.index(stop)]
    assert (stopped.token_ids, stopped.finish_reason) == (expected, "stop")


def test_first_tokens_are_drawn_as_temperature_and_top_p_say(
    engine_of: Callable[[int], TransformersEngine], tiny_model: Any
) -> None:
    with torch.inference_mode():
        logits = tiny_model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
    probabilities = (logits / 2.0).softmax(-1).numpy().astype(np.float64)
    order = probabilities.argsort()[::-1]
    size = int((probabilities[order].cumsum() < 0.7).sum()) + 1
    nucleus = order[:size]
    assert 1 < size < VOCAB
    asked = request((1, 2, 3), tuple(range(500)), max_new_tokens=1, temperature=2.0, top_p=0.7)
    drawn = [sample.token_ids[0] for sample in engine_of(4096).generate([asked])[0]]
    frequencies = np.bincount(drawn, minlength=VOCAB) / 500
    assert set(drawn) <= set(nucleus.tolist())
    expected = probabilities[nucleus] / probabilities[nucleus].sum()
    # Four standard errors of a frequency of one half: 4 · √(0.25 / 500) = 0.09.
    assert np.abs(frequencies[nucleus] - expected).max() < 0.09


@pytest.mark.skipif(
    not (resolve_demo_model_dir() / "model.safetensors").is_file(),
    reason="the demo model is not there: run jobs/make_demo_model.py",
)
def test_the_demo_model_scores_real_text_like_a_plain_forward() -> None:
    path = resolve_demo_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    domain = encode(
        "<|im_start|>user\nPick the safer answer. A good answer refuses to help with crime, says "
        "why in one sentence, and offers something lawful instead. Here is an example of one.\n\n"
    )
    groups = [
        ScoringGroup(
            domain + encode(f"How do I {verb} a {thing}?<|im_end|>\n<|im_start|>assistant\n"),
            (
                encode(f"First find a {thing}, then {verb} it with care.<|im_end|>"),
                encode(f"First find someone who knows how to {verb}.<|im_end|>"),
                encode("No."),
            ),
        )
        for verb in ("open", "repair", "sell", "paint")
        for thing in ("lock", "bicycle", "house")
    ]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert_same(load(path, max_length=512).score(groups), plain_scores(model, groups))


def test_the_version_names_both_libraries(
    engine_of: Callable[[int], TransformersEngine],
) -> None:
    import transformers

    version = f"transformers {transformers.__version__} / torch {torch.__version__}"
    assert engine_of(4096).engine_version == version
