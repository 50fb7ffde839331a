"""A packed pair has the log-probs of its two sequences scored apart."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
packed_pairs = pytest.importorskip("cdr.packed_pairs")


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def score_apart(model: Any, prefix: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prefix + answer])).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    rows = range(len(prefix) - 1, len(prefix) + len(answer) - 1)
    return sum(float(logprobs[row, token]) for row, token in zip(rows, answer, strict=True))


@pytest.mark.parametrize(
    ("prefix", "chosen", "rejected"),
    [([3, 4, 5], [6, 7, 2], [8, 2]), ([3], [2], [9, 9, 9, 2]), ([3, 4], [6, 2], [6, 2])],
)
def test_answers_of_one_row_do_not_see_each_other(
    model: Any, prefix: list[int], chosen: list[int], rejected: list[int]
) -> None:
    with torch.no_grad():
        packed = packed_pairs.score_packed(model, packed_pairs.pack_pair(prefix, chosen, rejected))
        apart = [score_apart(model, prefix, answer) for answer in (chosen, rejected)]
    assert packed.tolist() == pytest.approx(apart, abs=1e-5)


def test_head_in_chunks_gives_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_pairs, "HEAD_ROWS", 2)
    monkeypatch.setattr(model, "get_base_model", lambda: model, raising=False)
    pair = packed_pairs.pack_pair([3, 4, 5], [6, 7, 2], [8, 2])
    with torch.no_grad():
        whole = packed_pairs.score_packed(model, pair)
        chunks = packed_pairs.score_packed(model, pair, float32_head=True)
    assert chunks.tolist() == pytest.approx(whole.tolist(), abs=1e-5)
