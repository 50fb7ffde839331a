"""What preference tunings share around TRL's trainers: rows, stopping, adapters, the first process.

`cdr.dpo`, `cdr.simpo` and `cdr.classifier_training` differ in the loss and in where pairs come
from; this is the rest.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback

from cdr.checkpoints import read_json, write_json
from cdr.dpo_config import PairTrainingConfig
from cdr.dpo_data import EncodedPair

CHECKPOINTS: Final = "checkpoints"
CONFIG_FILE: Final = "training-config.json"
METRICS_FILE: Final = "metrics.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"


class StopWhenAsked(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Stops all processes at the same step, with a checkpoint.

    Args:
        is_asked: whether this process has been asked to; one is enough.
    """

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked = is_asked
        self.has_stopped = False
        """Whether the training ended because of this."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look after each step."""
        asked = torch.tensor(float(self._is_asked()), device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item():
            control.should_training_stop = True
            control.should_save = True
            self.has_stopped = state.global_step < state.max_steps


def make_rows(pairs: Sequence[EncodedPair], seed: int) -> list[dict[str, Any]]:
    """Make a trainer's rows of pairs, in an order that the seed decides.

    Args:
        pairs: what to train on.
        seed: of the order.

    Returns:
        Per pair `prompt_ids`, `chosen_ids`, `rejected_ids` and `index`, its place in `pairs`.
    """
    rows = [
        {
            "prompt_ids": list(item.prefix_ids),
            "chosen_ids": list(item.chosen_ids),
            "rejected_ids": list(item.rejected_ids),
            "index": index,
        }
        for index, item in enumerate(pairs)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def pair_arguments(config: PairTrainingConfig, num_pairs: int) -> dict[str, Any]:
    """Give the arguments of TRL's trainers that `PairTrainingConfig` decides, and what goes along.

    Args:
        config: the batch is of all processes; the arguments' is of one pair, accumulated.
        num_pairs: that are trained on.
    """
    steps = max(1, round(config.epochs * num_pairs / config.batch_size))
    return {
        # Pairs differ in length: two of them in a forward would be padded to the longer.
        "per_device_train_batch_size": 1,
        "max_steps": steps,
        "learning_rate": config.learning_rate,
        "warmup_steps": max(1, steps // 10),
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "max_length": None,  # what is too long has been left out
        "bf16": config.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "logging_steps": 4,
        "logging_first_step": True,
        "seed": config.seed,
        "report_to": [],
        "disable_tqdm": True,
    }


def make_lora(rank: int, task_type: str = "CAUSAL_LM") -> Any:
    """Give PEFT's config of an adapter on every linear layer but the head; alpha is twice rank.

    Args:
        rank: of its matrices.
        task_type: PEFT's name of what the model is for; with `SEQ_CLS` the head is trained whole.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type=task_type,
    )


def round_trained(model: Any) -> None:
    """Round trained weights to bfloat16 as stored, so that what is measured is what is saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(torch.bfloat16))


def save_adapter(
    model: Any, folder: Path, base_name: str, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write adapter_model.safetensors in bfloat16 and adapter_config.json without any path.

    Args:
        model: with the adapter.
        folder: where to; it is made.
        base_name: what the adapter's config calls the start model.
        state: the model's state where it is sharded and has been gathered; None to take it from
            the model.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model, state).items())
    }
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # the library makes it readable by its owner alone
    peft_config = model.peft_config["default"]
    peft_config.base_model_name_or_path = base_name
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    # The library writes a set in no fixed order; the file is to be the same each time.
    path = folder / "adapter_config.json"
    content = read_json(path)
    content["target_modules"] = sorted(content["target_modules"])
    write_json(path, content)


def open_checkpoints(folder: Path, config: dict[str, Any]) -> None:
    """Make the folder of checkpoints, which git is to leave alone, and note what they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    if is_first_process():
        (folder / ".gitignore").write_text("*\n", "utf-8")
        write_json(folder / CONFIG_FILE, config)


def find_checkpoint(folder: Path) -> str | None:
    """Find the last whole checkpoint; None without one.

    The trainer writes a checkpoint's state last: one without was being written at a kill.
    """
    whole = [
        path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if path.stat().st_size  # a full disk leaves an empty one
    ]
    newest = max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)
    return None if newest is None else str(newest)


def losses(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the losses from a trainer's log, with their steps."""
    return [
        {"step": entry["step"], "loss": round(entry["loss"], 4)}
        for entry in history
        if "loss" in entry
    ]


def count_tokens(item: EncodedPair) -> int:
    """Count the tokens of a packed pair."""
    return len(item.prefix_ids) + len(item.chosen_ids) + len(item.rejected_ids)


def say(line: str) -> None:
    """Print a line of progress, by the first process only."""
    if is_first_process():
        print(line, flush=True)


def is_first_process() -> bool:
    """Tell whether this is the process that speaks and writes, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"
