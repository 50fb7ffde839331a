"""Preference-tune a LoRA adapter by DPO, and measure it on pairs it has not seen.

    python -m jobs.train_dpo --pairs FOLDER --output conf/models/NAME

    loss = −log σ(β · [(log p_tuned − log p_start)(chosen) − (log p_tuned − log p_start)(rejected)])

Source: Rafailov et al., arXiv 2305.18290, eq. 7. TRL's `DPOTrainer` runs the training (optimizer,
checkpoints, resume, several processes); the log-probs are computed here, because a CPU cannot
afford TRL's way: it reads the prompt twice per pair and runs the LM head on every position. Here a
pair is one row, [prompt | chosen | rejected], with a mask that hides the answers from each other,
and the head sees answer positions only. The start model is the same model with the adapter off; its
log-probs are computed once per pair.

Out of scope: full fine-tuning, quantised bases, tuning on more than one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from cdr import dpo_report
from cdr.chat import ChatEncoder
from cdr.dpo_config import RunOptions, TrainingConfig, hash_model
from cdr.dpo_data import (
    EncodedPair,
    count_by,
    draw_pairs,
    encode_pairs,
    hash_pairs,
    read_pairs,
    split_pairs,
    write_pairs,
)
from cdr.dpo_report import HeldOutPair
from cdr.errors import InputError, ModelError

CHECKPOINTS: Final = "checkpoints"
CONFIG_FILE: Final = "training-config.json"
METRICS_FILE: Final = "metrics.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
# Rows of the LM head computed at a time: 128 × 49k float32 logits are 25 MB.
HEAD_ROWS: Final = 128


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
    if not folder.is_dir():
        raise ModelError(
            "the start model must be a folder on this machine",
            where=str(folder),
            fix="make the demo model with: python -m jobs.make_demo_model",
        )
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
    if options.held_out is not None and _is_first_process():
        write_pairs(test, options.held_out)
    checkpoints = options.output / CHECKPOINTS
    metrics_file = options.output / METRICS_FILE
    if (checkpoints / CONFIG_FILE).exists():
        config.check_same(_read_json(checkpoints / CONFIG_FILE), checkpoints / CONFIG_FILE)
    if metrics_file.exists():
        metrics = _read_json(metrics_file)
        config.check_same(metrics["config"], metrics_file)
        if metrics["training"]["finished"]:
            return metrics

    encoder = ChatEncoder.load(str(folder), None, template="own")
    train_fit, train_left_out = encode_pairs(train, encoder, config.max_length)
    test_fit, test_left_out = encode_pairs(test, encoder, config.max_length)
    drawn = draw_pairs(train_fit, config.max_pairs, config.seed)
    _say(
        f"{len(pairs)} pairs: {len(drawn)} to train on (of {len(train_fit)} that fit), "
        f"{len(test_fit)} held out; left out {_counts(train_left_out)} of the training pairs and "
        f"{_counts(test_left_out)} of the held-out ones"
    )
    if not drawn:
        raise InputError(
            f"no training pair fits {config.max_length} tokens",
            where=", ".join(map(str, options.pairs)),
            fix="raise --max-length",
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    if _is_first_process():
        (checkpoints / ".gitignore").write_text("*\n", "utf-8")
        new = checkpoints / f"{CONFIG_FILE}.new"
        new.write_text(_to_json(asdict(config)), "utf-8")
        new.replace(checkpoints / CONFIG_FILE)  # at once: other processes may be reading it

    trainer = _make_trainer(folder, encoder, drawn, config, options)
    training = _train(trainer, checkpoints, started, options)
    _round_adapter(trainer.model)
    held_out = _measure(trainer, test_fit)
    if not trainer.is_world_process_zero():
        return {}
    _save_adapter(trainer.model, options.output, config.base_name)
    metrics = {
        "config": asdict(config),
        "data": {
            "train_pairs": len(drawn),
            "train_pairs_by_section": count_by([item.pair for item in drawn], "section"),
            "train_pairs_by_source": dpo_report.count_sources(drawn),
            "held_out_pairs": len(test_fit),
            "held_out_pairs_by_source": dpo_report.count_sources(test_fit),
            "train_tokens": sum(map(_num_tokens, drawn)),
            "left_out_of_train": dict(train_left_out),
            "left_out_of_held_out": dict(test_left_out),
            "not_drawn": len(train_fit) - len(drawn),
        },
        "training": training,
        "held_out": dpo_report.summarize(held_out),
        "command": options.command,
    }
    (options.output / "README.md").write_text(dpo_report.render_card(metrics), "utf-8")
    metrics_file.write_text(_to_json(metrics), "utf-8")
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
    from peft import LoraConfig
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

    steps = max(1, round(config.epochs * len(pairs) / config.batch_size))
    bf16 = config.dtype == "bfloat16"
    arguments = DPOConfig(
        output_dir=str(options.output / CHECKPOINTS),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.batch_size // config.processes,
        max_steps=steps,
        learning_rate=config.learning_rate,
        warmup_steps=max(1, steps // 10),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        beta=config.beta,
        max_length=None,
        bf16=bf16,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        logging_steps=4,
        logging_first_step=True,
        save_steps=options.save_steps,
        save_total_limit=None if options.keep_checkpoints else 2,
        seed=config.seed,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [
        {
            "prompt_ids": list(item.prefix_ids),
            "chosen_ids": list(item.chosen_ids),
            "rejected_ids": list(item.rejected_ids),
            "index": index,
        }
        for index, item in enumerate(pairs)
    ]
    random.Random(config.seed).shuffle(rows)
    trainer = PackedDPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=_collate_one,
        processing_class=AutoTokenizer.from_pretrained(str(folder)),
        peft_config=LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.start_logprobs = {}
    return trainer


def pack_pair(
    prefix_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Lay a pair out as one row in which neither answer sees the other.

    Args:
        prefix_ids: L ids of the prompt.
        chosen_ids: c ids, at least one.
        rejected_ids: r ids, at least one.

    Returns:
        `input_ids` and `position_ids` [1, L+c+r] (both answers start at position L),
        `attention_mask` [1, 1, L+c+r, L+c+r] bool, `rows` [c+r] (positions whose output predicts
        an answer's token), `targets` [c+r] and `num_chosen`.
    """
    start, chosen, rejected = len(prefix_ids), len(chosen_ids), len(rejected_ids)
    length = start + chosen + rejected
    mask = torch.ones((length, length), dtype=torch.bool).tril()
    mask[start + chosen :, start : start + chosen] = False
    positions = [*range(start + chosen), *range(start, start + rejected)]
    rows = [
        *range(start - 1, start + chosen - 1),
        start - 1,
        *range(start + chosen, length - 1),
    ]
    return {
        "input_ids": torch.tensor([[*prefix_ids, *chosen_ids, *rejected_ids]]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": mask[None, None],
        "rows": torch.tensor(rows),
        "targets": torch.tensor([*chosen_ids, *rejected_ids]),
        "num_chosen": torch.tensor(chosen),
    }


def score_packed(
    model: Any, packed: Mapping[str, torch.Tensor], *, float32_head: bool = False
) -> torch.Tensor:
    """Give log p(chosen) and log p(rejected) of one packed pair.

    Args:
        model: a causal LM of transformers, with or without adapter.
        packed: what `pack_pair` gives.
        float32_head: compute the LM head in float32, without gradients; for measuring.

    Returns:
        Two sums over the answer's tokens, end-of-turn token included: [2] float32, nats.
    """
    inputs = {name: packed[name] for name in ("input_ids", "position_ids", "attention_mask")}
    if float32_head:
        causal = model.get_base_model()
        hidden = causal.model(**inputs, use_cache=False).last_hidden_state[0, packed["rows"]]
        weight = causal.lm_head.weight.float()
        targets = packed["targets"]
        logprobs = torch.cat(
            [
                _target_logprobs(
                    hidden[at : at + HEAD_ROWS].float() @ weight.T, targets[at : at + HEAD_ROWS]
                )
                for at in range(0, len(targets), HEAD_ROWS)
            ]
        )
    else:
        logits = model(**inputs, use_cache=False, logits_to_keep=packed["rows"]).logits[0]
        logprobs = _target_logprobs(logits, packed["targets"])
    chosen = int(packed["num_chosen"])
    return torch.stack([logprobs[:chosen].sum(), logprobs[chosen:].sum()])


def _target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs of targets [rows] under logits [rows, vocabulary], in float32."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _collate_one(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    (row,) = examples
    packed = pack_pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    return {**packed, "index": torch.tensor(row["index"])}


def _train(trainer: Any, checkpoints: Path, started: float, options: RunOptions) -> dict[str, Any]:
    """Run the trainer to its end or to the time limit, from the last checkpoint if there is one."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    class StopInTime(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        """Stops all processes at the same step, with a checkpoint, when time is up."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            limit = float("inf") if options.max_hours is None else options.max_hours * 3600
            late = torch.tensor(float(time.monotonic() - started > limit), device=args.device)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(late, op=torch.distributed.ReduceOp.MAX)
            if late.item():
                control.should_training_stop = True
                control.should_save = True

    trainer.add_callback(StopInTime())
    last = get_last_checkpoint(str(checkpoints))
    if last:
        _say(f"goes on from {Path(last).name}")
    begun = time.monotonic()
    # A limit of 0 hours measures what the last checkpoint has learned.
    if last and options.max_hours is not None and options.max_hours <= 0:
        trainer._load_from_checkpoint(last)
        state = json.loads((Path(last) / "trainer_state.json").read_text("utf-8"))
        step, history = int(state["global_step"]), state["log_history"]
    else:
        trainer.train(resume_from_checkpoint=last)
        step, history = trainer.state.global_step, trainer.state.log_history
    return {
        "finished": step >= trainer.args.max_steps,
        "steps": step,
        "planned_steps": trainer.args.max_steps,
        "hours_of_last_start": round((time.monotonic() - begun) / 3600, 3),
        "loss": [
            {"step": entry["step"], "loss": round(entry["loss"], 4)}
            for entry in history
            if "loss" in entry
        ],
    }


def _round_adapter(model: Any) -> None:
    """Round the adapter's weights to what is stored, so that what is measured is what is saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(torch.bfloat16))


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
                _say(f"measured {len(scored) * world} pairs in {time.monotonic() - begun:.0f} s")
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


def _save_adapter(model: Any, folder: Path, base_name: str) -> None:
    """Write adapter_model.safetensors in bfloat16 and adapter_config.json without any path."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model).items())
    }
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # the library makes it readable by its owner alone
    peft_config = model.peft_config["default"]
    peft_config.base_model_name_or_path = base_name
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    # The library writes a set in no fixed order; the file is to be the same each time.
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text("utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(_to_json(content), "utf-8")


def _num_tokens(item: EncodedPair) -> int:
    return len(item.prefix_ids) + len(item.chosen_ids) + len(item.rejected_ids)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "none"


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _say(line: str) -> None:
    """Print a line of progress, by the first process only."""
    if _is_first_process():
        print(line, flush=True)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
