"""Preference-tune a LoRA adapter by DPO, and measure it on pairs it has not seen.

    python -m jobs.train_dpo --pairs FOLDER --output conf/models/NAME

    loss = −log σ(β · [(log p_tuned − log p_start)(chosen) − (log p_tuned − log p_start)(rejected)])

Source: Rafailov et al., arXiv 2305.18290, eq. 7. TRL's `DPOTrainer` runs the training (optimizer,
checkpoints, resume, several processes); the log-probs are those of `cdr.packed_pairs`. The start
model is the same model with the adapter off; its log-probs are computed once per pair.

Out of scope: full fine-tuning, quantised bases, tuning on more than one machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cdr import dpo_report
from cdr.chat import ChatEncoder
from cdr.checkpoints import hash_model, read_json, write_json
from cdr.dpo_config import RunOptions, TrainingConfig
from cdr.dpo_data import (
    EncodedPair,
    count_by,
    describe_counts,
    draw_pairs,
    encode_pairs,
    hash_pairs,
    read_pairs,
    split_pairs,
    write_pairs,
)
from cdr.dpo_report import HeldOutPair
from cdr.errors import InputError
from cdr.packed_pairs import collate_one, pack_pair, score_packed
from cdr.tuning import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    StopWhenAsked,
    count_tokens,
    find_checkpoint,
    is_first_process,
    losses,
    make_lora,
    make_rows,
    open_checkpoints,
    pair_arguments,
    round_trained,
    save_adapter,
    say,
)


def train_adapter(options: RunOptions, **hyper: Any) -> dict[str, Any]:
    """Train, or go on training, an adapter; then measure it and write its model card.

    Args:
        options: where things lie, and limits.
        **hyper: the fields of `TrainingConfig` that a user sets.

    Returns:
        The content of `metrics.json`.

    Raises:
        ConfigError: a value is out of range, or `options.output` holds work of another
            configuration.
        InputError: the pairs cannot be read.
        ModelError: the start model cannot be used.
    """
    started = time.monotonic()
    folder = options.model.expanduser()
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = read_pairs(options.pairs)
    config = TrainingConfig(
        base_hash=hash_model(folder),
        pairs_hash=hash_pairs(pairs),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        **hyper,
    )
    train, test = split_pairs(pairs, config.holdout_fraction)
    checkpoints = options.output / CHECKPOINTS
    metrics_file = options.output / METRICS_FILE
    if (checkpoints / CONFIG_FILE).exists():
        config.check_same(read_json(checkpoints / CONFIG_FILE), checkpoints / CONFIG_FILE)
    before = read_json(metrics_file) if metrics_file.exists() else None
    if before:
        config.check_same(before["config"], metrics_file)
    # Not before the checks: what lies there may have been trained on these pairs.
    if options.held_out is not None and is_first_process():
        write_pairs(test, options.held_out)
    if before and before["training"]["finished"]:
        return before

    encoder = ChatEncoder.load(str(folder), None, template="own")
    train_fit, train_left_out = encode_pairs(train, encoder, config.max_length)
    test_fit, test_left_out = encode_pairs(test, encoder, config.max_length)
    drawn = draw_pairs(train_fit, config.max_pairs, config.seed)
    say(
        f"{len(pairs)} pairs: {len(drawn)} to train on (of {len(train_fit)} that fit), "
        f"{len(test_fit)} held out; left out {describe_counts(train_left_out)} of the training "
        f"pairs and {describe_counts(test_left_out)} of the held-out ones"
    )
    if not drawn:
        raise InputError(
            f"no training pair fits {config.max_length} tokens",
            where=", ".join(map(str, options.pairs)),
            fix="raise --max-length",
        )
    open_checkpoints(checkpoints, asdict(config))

    trainer = _make_trainer(folder, encoder, drawn, config, options)
    training = _train(trainer, checkpoints, started, options)
    round_trained(trainer.model)
    held_out = _measure(trainer, test_fit)
    if not trainer.is_world_process_zero():
        return {}
    save_adapter(trainer.model, options.output, config.base_name)
    metrics = {
        "config": asdict(config),
        "data": {
            "train_pairs": len(drawn),
            "train_pairs_by_section": count_by([item.pair for item in drawn], "section"),
            "train_pairs_by_source": dpo_report.count_sources(drawn),
            "held_out_pairs": len(test_fit),
            "held_out_pairs_by_source": dpo_report.count_sources(test_fit),
            "train_tokens": sum(map(count_tokens, drawn)),
            "left_out_of_train": dict(train_left_out),
            "left_out_of_held_out": dict(test_left_out),
            "not_drawn": len(train_fit) - len(drawn),
        },
        "training": training,
        "held_out": dpo_report.summarize(held_out),
        "command": options.command,
    }
    (options.output / "README.md").write_text(dpo_report.render_card(metrics), "utf-8")
    write_json(metrics_file, metrics)
    if training["finished"] and not options.keep_checkpoints:
        shutil.rmtree(checkpoints)
    return metrics


def _make_trainer(
    folder: Path,
    encoder: ChatEncoder,
    pairs: Sequence[EncodedPair],
    config: TrainingConfig,
    options: RunOptions,
) -> Any:
    """Make TRL's trainer over rows of packed pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=getattr(torch, config.dtype), use_safetensors=True
    )

    class PackedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl ships no types
        """DPO on packed rows; everything but the log-probs is TRL's."""

        start_logprobs: dict[int, torch.Tensor]  # by index of the pair

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> torch.Tensor:
            index = int(inputs.pop("index"))
            if index not in self.start_logprobs:
                unwrapped = self.accelerator.unwrap_model(model)
                with torch.no_grad(), unwrapped.disable_adapter():
                    self.start_logprobs[index] = score_packed(unwrapped, inputs)
            ratio = score_packed(model, inputs) - self.start_logprobs[index]
            margin = config.beta * (ratio[0] - ratio[1])
            logged = self._metrics["train"]
            logged["rewards/accuracies"].append(float(margin.item() > 0))
            logged["rewards/margins"].append(margin.item())
            logged["rewards/chosen"].append(config.beta * ratio[0].item())
            return -torch.nn.functional.logsigmoid(margin)

    arguments = DPOConfig(
        output_dir=str(options.output / CHECKPOINTS),
        **pair_arguments(config, len(pairs)),
        gradient_accumulation_steps=config.batch_size // config.processes,
        beta=config.beta,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_steps=options.save_steps,
        save_total_limit=None if options.keep_checkpoints else 2,
    )
    trainer = PackedDPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(make_rows(pairs, config.seed)),
        data_collator=collate_one,
        processing_class=AutoTokenizer.from_pretrained(str(folder)),
        peft_config=make_lora(config.rank),
    )
    trainer.start_logprobs = {}
    return trainer


def _train(trainer: Any, checkpoints: Path, started: float, options: RunOptions) -> dict[str, Any]:
    """Run the trainer to its end or to the time limit, from the last checkpoint if there is one."""
    limit_s = float("inf") if options.max_hours is None else options.max_hours * 3600
    trainer.add_callback(StopWhenAsked(lambda: time.monotonic() - started > limit_s))
    last = find_checkpoint(checkpoints)
    if last:
        say(f"goes on from {Path(last).name}")
    begun = time.monotonic()
    # A limit of 0 hours measures what the last checkpoint has learned.
    if last and options.max_hours is not None and options.max_hours <= 0:
        trainer._load_from_checkpoint(last)
        state = read_json(Path(last) / "trainer_state.json")
        step, history = int(state["global_step"]), state["log_history"]
    else:
        trainer.train(resume_from_checkpoint=last)
        step, history = trainer.state.global_step, trainer.state.log_history
    return {
        "finished": step >= trainer.args.max_steps,
        "steps": step,
        "planned_steps": trainer.args.max_steps,
        "hours_of_last_start": round((time.monotonic() - begun) / 3600, 3),
        "loss": losses(history),
    }


def _measure(trainer: Any, pairs: Sequence[EncodedPair]) -> list[HeldOutPair]:
    """Score held-out pairs under tuned and start model; the processes share the work."""
    model = trainer.model.eval()
    rank, world = trainer.args.process_index, trainer.args.world_size
    scored: list[HeldOutPair] = []
    begun = time.monotonic()
    with torch.no_grad(), _autocast(model):
        for index in range(rank, len(pairs), world):
            item = pairs[index]
            packed = pack_pair(item.prefix_ids, item.chosen_ids, item.rejected_ids)
            packed = {name: tensor.to(model.device) for name, tensor in packed.items()}
            tuned = score_packed(model, packed, float32_head=True).double()
            with model.disable_adapter():
                start = score_packed(model, packed, float32_head=True).double()
            ratio = (tuned - start).tolist()
            scored.append(
                HeldOutPair(
                    section=item.pair.section,
                    subset=item.pair.subset,
                    chosen_ratio=ratio[0],
                    rejected_ratio=ratio[1],
                    chosen_tokens=len(item.chosen_ids),
                    rejected_tokens=len(item.rejected_ids),
                )
            )
            if rank == 0 and len(scored) % 25 == 0:
                say(f"measured {len(scored) * world} pairs in {time.monotonic() - begun:.0f} s")
    if world > 1:
        gathered: list[list[HeldOutPair]] = [[] for _ in range(world)]
        torch.distributed.all_gather_object(gathered, scored)
        scored = [pair for part in gathered for pair in part]
    return scored


@contextlib.contextmanager
def _autocast(model: Any) -> Iterator[None]:
    """Run the adapter's float32 products in the start model's dtype, as in training."""
    half = model.get_base_model().dtype == torch.bfloat16
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        yield
