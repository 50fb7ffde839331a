"""A model small enough to train in a test: one layer of random weights, SmolLM2's tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.tokenizers import make_smollm2


def save_tiny_model(folder: Path) -> Path:
    """Write it as a Hugging Face folder, the same weights each time; give the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_smollm2()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
