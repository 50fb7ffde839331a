"""Train a sequence classifier on preference pairs: a reward model, as a baseline of one's own.

    python -m jobs.train_classifier --pairs FOLDER --output FOLDER

    loss = −log σ(s(x, chosen) − s(x, rejected))

Source: Bradley–Terry, as in Ouyang et al., arXiv 2203.02155, eq. 1. TRL's `RewardTrainer` runs it:
a LoRA adapter on the body and a head of one output. What is saved is a whole model, adapter merged,
that `cdr.engines.classifier` reads; token ids are those that the engine gets.

Out of scope: resuming (a run takes minutes), measuring (`jobs/evaluate.py` does it, on the pairs
held out), more than one process.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cdr.chat import ChatEncoder
from cdr.checkpoints import hash_model, read_json, write_json
from cdr.dpo_config import PairTrainingConfig
from cdr.dpo_data import (
    count_by,
    describe_counts,
    draw_pairs,
    encode_pairs,
    hash_pairs,
    read_pairs,
    split_pairs,
    write_pairs,
)
from cdr.errors import InputError
from cdr.tuning import (
    METRICS_FILE,
    count_tokens,
    losses,
    make_lora,
    make_rows,
    pair_arguments,
    say,
)


def train_classifier(
    model: Path, pairs: tuple[Path, ...], output: Path, held_out: Path | None, **hyper: Any
) -> dict[str, Any]:
    """Train a classifier and write its folder; a finished one is left as it is.

    Args:
        model: folder of the causal language model to start from.
        pairs: files and folders of preference tables.
        output: folder to write: weights, tokenizer, and last metrics.json.
        held_out: JSON lines file to write the held-out pairs to, before training; None: none.
        **hyper: the fields of `PairTrainingConfig` that a user sets.

    Returns:
        The content of `metrics.json`.

    Raises:
        ConfigError: a value is out of range, or `output` holds a classifier of other options.
        InputError: the pairs cannot be read, or none fits.
        ModelError: the start model cannot be used.
    """
    found = read_pairs(pairs)
    folder = model.expanduser()
    config = PairTrainingConfig(base_hash=hash_model(folder), pairs_hash=hash_pairs(found), **hyper)
    train, kept_back = split_pairs(found, config.holdout_fraction)
    metrics_file = output / METRICS_FILE
    done = read_json(metrics_file) if metrics_file.exists() else None
    if done:  # before pairs are written that this classifier may have been trained on
        config.check_same(done["config"], metrics_file)
    if held_out is not None:
        write_pairs(kept_back, held_out)
    if done:
        return done

    encoder = ChatEncoder.load(str(folder), None, template="own", close_turns=True)
    fit, left_out = encode_pairs(train, encoder, config.max_length)
    drawn = draw_pairs(fit, config.max_pairs, config.seed)
    say(
        f"{len(found)} pairs: {len(drawn)} to train on (of {len(fit)} that fit), {len(kept_back)} "
        f"held out; left out {describe_counts(left_out)} of the training pairs"
    )
    if not drawn:
        raise InputError(
            f"no training pair fits {config.max_length} tokens",
            where=", ".join(map(str, pairs)),
            fix="raise --max-length",
        )
    rows = [
        {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
        for row in make_rows(drawn, config.seed)
    ]
    begun = time.monotonic()
    trainer = _make_trainer(folder, output, rows, config)
    trainer.train()
    _save(trainer, output, config.dtype)
    history = trainer.state.log_history
    metrics = {
        "config": asdict(config),
        "data": {
            "train_pairs": len(drawn),
            "train_pairs_by_section": count_by([item.pair for item in drawn], "section"),
            "train_tokens": sum(map(count_tokens, drawn)),
            "held_out_pairs": len(kept_back),
            "left_out_of_train": dict(left_out),
            "not_drawn": len(fit) - len(drawn),
        },
        "training": {
            "steps": trainer.state.global_step,
            "seconds": round(time.monotonic() - begun),
            "loss": losses(history),
        },
    }
    write_json(metrics_file, metrics)
    return metrics


def _make_trainer(
    folder: Path, output: Path, rows: list[dict[str, Any]], config: PairTrainingConfig
) -> Any:
    """Make TRL's trainer over token ids of whole conversations."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(
        output_dir=str(output),
        **pair_arguments(config, len(rows)),
        gradient_accumulation_steps=config.batch_size,
        model_init_kwargs={"dtype": config.dtype, "use_safetensors": True, "device_map": None},
        save_strategy="no",
    )
    trainer = RewardTrainer(
        model=str(folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(str(folder)),
        peft_config=make_lora(config.rank, "SEQ_CLS"),
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and ".score." in name:
                # Not random: no answer is better than another before anything is learned.
                parameter.zero_()
    return trainer


def _save(trainer: Any, output: Path, dtype: str) -> None:
    """Write the whole model: the adapter is merged in float32, where small updates survive."""
    model = trainer.model.float().merge_and_unload()
    model.to(getattr(torch, dtype)).save_pretrained(output)
    for file in output.glob("*.safetensors"):
        file.chmod(0o644)  # the library makes it readable by its owner alone
    trainer.processing_class.save_pretrained(output)
