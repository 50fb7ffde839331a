"""Train a policy on preferences with SimPO, over a grid of learning rates and β.

    loss = −log σ( β · (mean log p(chosen) − mean log p(rejected)) − γ )

Means are per token; there is no reference model. Source: Meng et al., arXiv 2405.14734, eq. 6; the
search is that of arXiv 2411.02481, section 4.3. `cdr.simpo_trainer` has the trainer, TRL's.

Every process of a launcher runs this. The first one also reads the table, talks to MLflow and
writes (`cdr.training_run`); what it decides, the others are told.

Out of scope: more than one machine, DeepSpeed, quantised bases.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cdr import simpo_report
from cdr.checkpoints import check_same, hash_model, read_json, write_json
from cdr.engines.hardware import resolve_dtype
from cdr.errors import ConfigError, InputError, Stopped
from cdr.simpo_config import PointConfig, SimpoConfig, StartModelSpec, list_points
from cdr.simpo_trainer import Pairs, SimpoTrainer, load_pairs, make_trainer
from cdr.tuning import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    StopWhenAsked,
    count_tokens,
    find_checkpoint,
    losses,
    open_checkpoints,
    round_trained,
    save_adapter,
    say,
)
from cdr.weights import SMALL_FILES, Source, fetch

if TYPE_CHECKING:
    from cdr.training_run import TrainingRun

PAIRS = "pairs"
POINTS = "points"
POLICY = "policy"


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
            "duplicates": pairs.duplicates,
            "left_out_fraction": pairs.left_out_fraction,
        },
    }
    if run is not None:
        _publish(output / POINTS / best / POLICY, output / POLICY)
        card = simpo_report.render_card(metrics, run.origin)
        (output / POLICY / "README.md").write_text(card, "utf-8")
        write_json(output / METRICS_FILE, metrics)
    return metrics


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
    # The network before: its trainer refers to it in a circle, and a device may not hold two.
    gc.collect()
    torch.cuda.empty_cache()
    open_checkpoints(checkpoints, decisive)
    last = find_checkpoint(checkpoints)
    log = None if run is None else run.log_curves
    trainer = make_trainer(point, pairs, model, config, checkpoints, is_new=last is None, log=log)
    stop = StopWhenAsked(lambda: run is not None and run.stop_requested is not None)
    trainer.add_callback(stop)
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
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    if point.lora_rank is not None:
        save_adapter(trainer.model, folder, point.base_name, state)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in SMALL_FILES:
        for file in start.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    dtype = getattr(torch, point.dtype)
    network = trainer.accelerator.unwrap_model(trainer.model)
    network.save_pretrained(
        str(folder), state_dict={name: tensor.to(dtype) for name, tensor in state.items()}
    )
    network.config.dtype = dtype  # it has noted that of the weights in training
    network.config.save_pretrained(str(folder))
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library makes it readable by its owner alone


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
