"""TRL's SimPO trainer over packed pairs of token ids, and the pairs it is given.

The loss, the optimizer, checkpoints and several processes are those of TRL's `CPOTrainer`, with
`loss_type="simpo"` and no CPO term; the log-probs are those of `cdr.packed_pairs`. TRL's own way
from text to tokens, which cuts what is long, is not used.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from cdr import simpo_report
from cdr.chat import ChatEncoder
from cdr.dpo_data import (
    EncodedPair,
    describe_counts,
    encode_pairs,
    hash_pairs,
    read_pairs,
    split_pairs,
)
from cdr.errors import InputError, TrainingError
from cdr.packed_pairs import collate_one, score_packed
from cdr.simpo_config import PointConfig, SimpoConfig
from cdr.tuning import find_checkpoint, make_lora, make_rows, say

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.cpo import CPOConfig, CPOTrainer

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Pairs:
    """The pairs of a search, encoded.

    Args:
        train: what is trained on.
        validation: what is measured on.
        left_out: how many of each split were left out, by reason.
        duplicates: how many rows held a pair that another one holds too; it counts once.
        identity: hash of all pairs read.
    """

    train: list[EncodedPair]
    validation: list[EncodedPair]
    left_out: dict[str, Counter[str]]
    duplicates: int
    identity: str

    @property
    def left_out_fraction(self) -> float:
        """Share of the pairs read that are left out."""
        out = sum(sum(counts.values()) for counts in self.left_out.values())
        return out / (out + len(self.train) + len(self.validation))


def load_pairs(folder: Path, model: Path, max_length: int) -> Pairs:
    """Read exported pairs and encode them for a model, by the split they were stored with.

    Args:
        folder: what `cdr.export` has written.
        model: folder with the tokenizer.
        max_length: tokens of prompt and longer answer, at most.

    Raises:
        InputError: no pair to train on is there, or fits.
    """
    read = read_pairs([folder])
    encoder = ChatEncoder.load(str(model), None, template="own")
    encoded, left_out = {}, {}
    splits = dict(zip(("train", "validation"), split_pairs(read, 0.0), strict=True))
    for split, pairs in splits.items():
        encoded[split], left_out[split] = encode_pairs(pairs, encoder, max_length)
        say(
            f"{split:<11}{len(encoded[split]):,} of {len(pairs):,} pairs; "
            f"left out: {describe_counts(left_out[split])}"
        )
    rows = sum(
        bool(line.strip())
        for file in folder.glob("*.jsonl")
        for line in file.read_text("utf-8").splitlines()
    )
    duplicates = rows - len(read)
    if duplicates:
        say(f"{duplicates:,} rows hold a pair that is there already; it counts once")
    if not encoded["train"]:
        raise InputError(
            f"no training pair fits {max_length} tokens",
            where=str(folder),
            fix="raise training.max_length",
        )
    return Pairs(encoded["train"], encoded["validation"], left_out, duplicates, hash_pairs(read))


class SimpoTrainer(CPOTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's trainer on packed rows; the loss and everything around it are TRL's."""

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """Add nothing: rows are token ids already, and nothing is to be cut."""
        return {}

    def concatenated_forward(self, model: Any, batch: Any) -> tuple[torch.Tensor, ...]:
        """Give mean log-probs of chosen and rejected [1] each, and what the loss does not use."""
        chosen, rejected = score_packed(model, batch, per_token=True)
        unused = torch.zeros((), device=chosen.device)
        return chosen[None], rejected[None], unused, unused, unused

    def store_metrics(self, metrics: Mapping[str, float], train_eval: Any = "train") -> None:
        """Keep what TRL computes for the curves, without what it makes of the unused."""
        used = {
            name: value
            for name, value in metrics.items()
            if not name.startswith("logits/") and name != "nll_loss"
        }
        super().store_metrics(used, train_eval)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give the loss, mean log-probs of chosen and rejected [1, 2], and the pair's index [1]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            chosen, rejected, *_ = self.concatenated_forward(model, inputs)
            loss, *_ = self.cpo_loss(chosen, rejected)
        return loss.mean(), torch.stack([chosen, rejected], dim=1), inputs["index"]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The step just measured counts as the best if its folder is there, which each process looks
        # up for itself. With FSDP the folder comes only afterwards, by whoever is first: some
        # processes would load another step than the rest at the end, or wait for them for ever.
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    def _clip_grad_norm(self, model: Any) -> Any:
        # After the processes have added up their gradients and before these change a weight: all
        # processes find out at the same time, and no checkpoint has seen the step.
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            last = find_checkpoint(Path(self.args.output_dir))
            kept = "there is no checkpoint yet" if last is None else f"the last good one is {last}"
            raise TrainingError(
                f"the loss or its gradient is not finite in step {self.state.global_step + 1}; "
                f"{kept}",
                where=f"learning rate {self.args.learning_rate:g}, beta {self.args.beta:g}",
                fix="take this rate out of search.learning_rates, or add a lower one: what other "
                "points of the grid have done is kept; training.dtype=float32 rules rounding out",
            )
        return norm


class _Curves(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Prints what matters of each log entry, and hands its numbers over."""

    def __init__(self, log: Callable[[Mapping[str, Any], int], None]) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        numbers = logs or {}
        shown = ("loss", "rewards/accuracies", "eval_loss", "eval_accuracy", "eval_margin")
        parts = [f"{name} {numbers[name]:.4f}" for name in shown if name in numbers]
        if parts:
            say(f"step {state.global_step} of {state.max_steps}  {', '.join(parts)}")
        self._log(numbers, state.global_step)


def make_trainer(
    point: PointConfig,
    pairs: Pairs,
    model: Path,
    config: SimpoConfig,
    checkpoints: Path,
    *,
    is_new: bool,
    log: Callable[[Mapping[str, Any], int], None] | None,
) -> SimpoTrainer:
    """Make the trainer of one policy.

    Args:
        point: what decides the policy.
        pairs: to train and to measure on.
        model: folder of the start model.
        config: the search.
        checkpoints: folder to keep them in.
        is_new: whether the start model itself is to be measured first.
        log: takes the numbers of each log entry, with the step; None in all processes but the
            first.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

    disable_progress_bars()
    torch.manual_seed(point.seed)
    # Steps of a small learning rate get lost in bfloat16: what is trained is float32.
    dtype = torch.float32 if point.lora_rank is None else getattr(torch, point.dtype)
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, use_safetensors=True)
    measured = bool(pairs.validation)
    early_stop = measured and point.early_stop is not None
    # The launcher sets it from an option of its own; what a policy is made of is the config's.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = CPOConfig(
        output_dir=str(checkpoints),
        loss_type="simpo",
        beta=point.beta,
        simpo_gamma=point.gamma,
        cpo_alpha=0.0,
        max_length=point.max_length,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=point.batch_size // point.processes,
        num_train_epochs=point.epochs,
        learning_rate=point.learning_rate,
        warmup_steps=point.warmup_fraction,
        lr_scheduler_type=_SCHEDULES[point.schedule],
        max_grad_norm=1.0,
        bf16=point.dtype == "bfloat16",
        gradient_checkpointing=config.training.gradient_checkpointing,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        logging_steps=config.run.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if measured else "no",
        eval_steps=config.training.eval_steps,
        eval_on_start=measured and is_new,
        load_best_model_at_end=early_stop,
        metric_for_best_model="accuracy" if early_stop else None,
        greater_is_better=True if early_stop else None,
        restore_callback_states_from_checkpoint=early_stop,
        save_steps=config.training.save_steps,
        save_total_limit=2,
        seed=point.seed,
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [] if log is None else [_Curves(log)]
    if early_stop and point.early_stop is not None:
        callbacks.append(EarlyStoppingCallback(*point.early_stop))
    trainer = SimpoTrainer(
        model=network,
        args=arguments,
        train_dataset=Dataset.from_list(make_rows(pairs.train, point.seed)),
        eval_dataset=Dataset.from_list(make_rows(pairs.validation, 0)) if measured else None,
        data_collator=collate_one,
        processing_class=AutoTokenizer.from_pretrained(str(model)),
        peft_config=None if point.lora_rank is None else make_lora(point.lora_rank),
        compute_metrics=simpo_report.measure_predictions,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # `_Curves` says it in fewer words
    return trainer
