"""Train a policy on preferences with SimPO, over a grid of learning rates and β.

    loss = −log σ( β · (mean log p(chosen) − mean log p(rejected)) − γ )

Means are per token; there is no reference model. Source: Meng et al., arXiv 2405.14734, eq. 6; the
search is that of arXiv 2411.02481, section 4.3. TRL's `CPOTrainer` computes the loss (with
`loss_type="simpo"` and no CPO term) and runs the training; the log-probs are those of
`cdr.packed_pairs`.

Every process of a launcher runs this. The first one also reads the table, talks to MLflow and
writes (`cdr.training_run`); what it decides, the others are told.

Out of scope: more than one machine, DeepSpeed, quantised bases.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback

from cdr import simpo_report
from cdr.chat import ChatEncoder
from cdr.checkpoints import check_same, hash_model, read_json, write_json
from cdr.dpo_data import (
    EncodedPair,
    describe_counts,
    encode_pairs,
    hash_pairs,
    read_pairs,
    split_pairs,
)
from cdr.engines.hardware import resolve_dtype
from cdr.errors import ConfigError, InputError, Stopped, TrainingError
from cdr.packed_pairs import collate_one, score_packed
from cdr.simpo_config import PointConfig, SimpoConfig, StartModelSpec, list_points
from cdr.tuning import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    StopWhenAsked,
    count_tokens,
    find_checkpoint,
    losses,
    make_lora,
    make_rows,
    open_checkpoints,
    round_trained,
    save_adapter,
    say,
)
from cdr.weights import SMALL_FILES, Source, fetch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.cpo import CPOConfig, CPOTrainer

if TYPE_CHECKING:
    from cdr.training_run import TrainingRun

PAIRS = "pairs"
POINTS = "points"
POLICY = "policy"


@dataclass(frozen=True)
class Pairs:
    """The pairs of a search, encoded.

    Args:
        train: what is trained on.
        validation: what is measured on.
        left_out: how many of each split were left out, by reason.
        identity: hash of all pairs read.
    """

    train: list[EncodedPair]
    validation: list[EncodedPair]
    left_out: dict[str, Counter[str]]
    identity: str

    @property
    def left_out_fraction(self) -> float:
        """Share of the pairs read that are left out."""
        out = sum(sum(counts.values()) for counts in self.left_out.values())
        return out / (out + len(self.train) + len(self.validation))


def search_policy(config: SimpoConfig, run: TrainingRun | None) -> dict[str, Any]:
    """Train, or go on training, every policy of the grid; keep the best one's files.

    The best one has the highest validation reward accuracy; of equals, the one with the largest
    mean margin of log-probs per token. The loss would not do: its scale changes with β.

    Args:
        config: the search. `config.output` has the pairs already, in the first process's eyes.
        run: the run around it; None in all processes but the first.

    Returns:
        The content of `metrics.json`: `search`, `best`, `points` and `data`.

    Raises:
        ConfigError: the output folder holds work of another configuration.
        InputError: no pair fits, or there is nothing to compare policies by.
        ModelError: the start model cannot be used.
        TrainingError: the loss is no longer finite.
        Stopped: the run was asked to stop; a checkpoint is written.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if run is None:
        # The first process is asked to stop and tells the others at the end of a step.
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, signal.SIG_IGN)
    start = config.start
    # Others wait here until the first process has written the pairs and hashed the model.
    (base_hash,) = broadcast_object_list([None if run is None else _identity(start)])
    folder = Path(fetch(_source(start)).folder)
    output = Path(config.output)
    pairs = load_pairs(output / PAIRS, folder, config.training.max_length)
    points = list_points(
        config,
        base_hash=base_hash,
        pairs_hash=pairs.identity,
        dtype=resolve_dtype(config.training.dtype),
        processes=processes,
    )
    _check_search(config, pairs, len(points), processes)
    done = {}
    for number, point in enumerate(points, start=1):
        say(f"\n{point.name} ({number} of {len(points)})")
        with contextlib.nullcontext() if run is None else run.point(point):
            done[point.name] = tune(point, pairs, folder, config, run)
    best = simpo_report.choose_best(done)
    metrics = {
        "search": config.search.model_dump(mode="json"),
        "best": best,
        "points": done,
        "data": {
            "train_pairs": len(pairs.train),
            "validation_pairs": len(pairs.validation),
            "train_tokens": sum(map(count_tokens, pairs.train)),
            "left_out": {split: dict(counts) for split, counts in pairs.left_out.items()},
            "left_out_fraction": pairs.left_out_fraction,
        },
    }
    if run is not None:
        _publish(output / POINTS / best / POLICY, output / POLICY)
        card = simpo_report.render_card(metrics, run.origin)
        (output / POLICY / "README.md").write_text(card, "utf-8")
        write_json(output / METRICS_FILE, metrics)
    return metrics


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
    if not encoded["train"]:
        raise InputError(
            f"no training pair fits {max_length} tokens",
            where=str(folder),
            fix="raise training.max_length",
        )
    return Pairs(encoded["train"], encoded["validation"], left_out, hash_pairs(read))


def tune(
    point: PointConfig, pairs: Pairs, model: Path, config: SimpoConfig, run: TrainingRun | None
) -> dict[str, Any]:
    """Train one policy of the grid, from its last checkpoint if there is one.

    Args:
        point: what decides the policy.
        pairs: to train and to measure on.
        model: folder of the start model.
        config: the search.
        run: as for `search_policy`.

    Returns:
        The content of the point's `metrics.json`: `config`, `training`, `start`, `validation`.

    Raises:
        ConfigError, TrainingError, Stopped: as for `search_policy`.
    """
    folder = Path(config.output) / POINTS / point.name
    checkpoints, metrics_file = folder / CHECKPOINTS, folder / METRICS_FILE
    # As JSON has it: a tuple comes back as a list.
    decisive = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(point).items()}
    if (checkpoints / CONFIG_FILE).exists():
        check_same(decisive, read_json(checkpoints / CONFIG_FILE), checkpoints / CONFIG_FILE)
    if metrics_file.exists():
        metrics = read_json(metrics_file)
        check_same(decisive, metrics["config"], metrics_file)
        say("done before")
        return metrics
    open_checkpoints(checkpoints, decisive)
    last = find_checkpoint(checkpoints)
    trainer = make_trainer(point, pairs, model, config, is_new=last is None)
    stop = StopWhenAsked(lambda: run is not None and run.stop_requested is not None)
    trainer.add_callback(stop)
    if run is not None:
        trainer.add_callback(_Curves(run.log_curves))
    if last:
        say(f"goes on from {Path(last).name}")
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=last)
    if stop.has_stopped:
        reason = run.stop_requested if run is not None else None
        raise Stopped(reason or "another process was asked to")
    if point.lora_rank is not None or point.dtype == "bfloat16":
        round_trained(trainer.model)
    validation = None
    if pairs.validation:
        predicted = trainer.predict(trainer.eval_dataset)
        scores = predicted.predictions[predicted.label_ids.argsort()]
        validation = simpo_report.summarize(pairs.validation, scores)
    _save_policy(trainer, folder / POLICY, point, model)
    history = trainer.state.log_history
    starts = [entry for entry in history if entry["step"] == 0 and "eval_accuracy" in entry]
    metrics = {
        "config": decisive,
        "training": {
            "steps": trainer.state.global_step,
            "planned_steps": trainer.state.max_steps,
            "best_step": trainer.state.best_global_step if point.early_stop else None,
            "hours_of_last_start": round((time.monotonic() - begun) / 3600, 3),
            "loss": losses(history),
        },
        "start": simpo_report.take_start(starts),
        "validation": validation,
    }
    if trainer.is_world_process_zero():
        write_json(metrics_file, metrics)
        if not config.run.keep_checkpoints:
            shutil.rmtree(checkpoints)
    if run is not None:
        run.log_point(metrics)
    return metrics


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
    point: PointConfig, pairs: Pairs, model: Path, config: SimpoConfig, *, is_new: bool
) -> SimpoTrainer:
    """Make the trainer of one policy.

    Args:
        point: what decides the policy.
        pairs: to train and to measure on.
        model: folder of the start model.
        config: the search.
        is_new: whether the start model itself is to be measured first.
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
    arguments = CPOConfig(
        output_dir=str(Path(config.output) / POINTS / point.name / CHECKPOINTS),
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
        lr_scheduler_type=point.schedule,
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
    callbacks = []
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


def _identity(start: StartModelSpec) -> str:
    if start.revision is not None:
        return f"{start.path}@{start.revision}"
    return hash_model(Path(fetch(_source(start), verify=True).folder))


def _source(start: StartModelSpec) -> Source:
    return Source(start.path, start.revision, start.checksum)


def _check_search(config: SimpoConfig, pairs: Pairs, points: int, processes: int) -> None:
    if config.training.batch_size % processes:
        raise ConfigError(
            [
                f"training.batch_size: must be a multiple of the number of processes, {processes}, "
                f"got {config.training.batch_size}"
            ]
        )
    if not pairs.validation and (points > 1 or config.training.early_stop):
        raise InputError(
            "there are no validation pairs to choose a policy or a step by",
            where=str(Path(config.output) / PAIRS),
            fix="annotate with pairs.validation_fraction above 0, or give one learning rate and "
            "one beta and no early stop",
        )


def _save_policy(trainer: SimpoTrainer, folder: Path, point: PointConfig, start: Path) -> None:
    """Write an adapter, or a whole model with the start model's tokenizer; all processes call."""
    if point.lora_rank is not None:
        if trainer.is_world_process_zero():
            save_adapter(trainer.model, folder, point.base_name)
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in SMALL_FILES:
        for file in start.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    dtype = getattr(torch, point.dtype)
    network = trainer.accelerator.unwrap_model(trainer.model)
    network.config.dtype = dtype
    network.save_pretrained(
        str(folder), state_dict={name: tensor.to(dtype) for name, tensor in state.items()}
    )


def _publish(source: Path, target: Path) -> None:
    """Give the best policy a fixed place; its files are linked where the disk can, else copied."""

    def link_or_copy(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new, copy_function=link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
