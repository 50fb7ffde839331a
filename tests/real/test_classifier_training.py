"""A classifier trained on a tiny model: it learns what the pairs say, and the engine reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402 - only where TRL is

from cdr.chat import ChatEncoder  # noqa: E402
from cdr.classifier_training import train_classifier  # noqa: E402
from cdr.engines.base import EngineSpec, ScoringGroup  # noqa: E402
from cdr.engines.classifier import ClassifierEngine  # noqa: E402
from cdr.errors import ConfigError  # noqa: E402
from tests.tokenizers import make_smollm2  # noqa: E402

pytestmark = [
    pytest.mark.timeout(300),
    # Of the libraries under TRL.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]
HYPER = {
    "max_length": 200, "max_pairs": None, "holdout_fraction": 0.25, "epochs": 4.0, "batch_size": 4,
    "learning_rate": 1e-2, "rank": 4, "seed": 0, "dtype": "float32",
}  # fmt: skip


def make_start(folder: Path) -> Path:
    tokenizer = make_smollm2()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_classifier_learns_from_pairs_and_is_a_reward(tmp_path: Path) -> None:
    start = make_start(tmp_path / "start")
    rows = [
        {"prompt": f"May I keep fox {n}?", "chosen": "Ask the council.", "rejected": "No."}
        for n in range(24)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, held_out = tmp_path / "classifier", tmp_path / "held-out.jsonl"

    metrics = train_classifier(start, (pairs,), output, held_out, **HYPER)
    # Before anything is learned no answer is better: the loss is -log σ(0).
    assert metrics["training"]["loss"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics["data"]["train_pairs"] == 18
    kept_back = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert len(kept_back) == 6

    encoder = ChatEncoder.load(str(output), None, template="own", close_turns=True)
    engine = ClassifierEngine(
        EngineSpec("m", "classifier", str(output), dtype="float32", max_length=200), num_threads=1
    )
    groups = [
        ScoringGroup(
            encoder.encode_prefix(row["prompt"]),
            tuple(
                encoder.encode_completion(row[side], None).ids for side in ("chosen", "rejected")
            ),
        )
        for row in kept_back
    ]
    margins = [float(chosen[0] - rejected[0]) for chosen, rejected in engine.score(groups)]
    assert min(margins) > 1

    # Finished: left as it is. Of other options: refused.
    weights = (output / "model.safetensors").stat().st_mtime_ns
    assert train_classifier(start, (pairs,), output, held_out, **HYPER) == metrics
    assert (output / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(ConfigError, match="rank: expected 4"):
        train_classifier(start, (pairs,), output, None, **{**HYPER, "rank": 8})
