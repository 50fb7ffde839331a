"""What a SimPO training is asked to do: which preferences, which start model, which grid, where to.

    conf/train/*.yaml

Unknown keys are errors, and all problems of a file are reported together (`cdr.config_files`). No
torch: a config is checked before a model loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from cdr.config import TablePlaces, TrackingSpec, WarehousePlace
from cdr.config_files import Spec, load_config
from cdr.reward_config import ModelSpec


class PreferencesSpec(Spec):
    """Which rows of the table `preferences`; as for `jobs/export.py`."""

    dataset: str = Field(description="Name of the set of completions.")
    reward: str | None = Field(
        None,
        description="The reward's name, or the start of its key. None: the dataset has one only.",
    )
    selection: str | None = Field(
        None, description="Start of the key of the rule that chose the pairs. None: there is one."
    )
    version: int | None = Field(
        None,
        ge=0,
        description="Delta version of the table. None: the latest when the training first starts; "
        "it is recorded, and a training that goes on keeps to it.",
    )


class StartModelSpec(Spec):
    """The model to start from."""

    path: str = Field(description="Folder, URI or hub id.")
    revision: str | None = Field(
        None, description="Commit hash of a hub id: 40 hex digits, quoted. None for a folder."
    )
    checksum: str | None = Field(
        None, description="Content hash of the weights; needed for a URI. None: not compared."
    )
    name: str | None = Field(
        None,
        description="What the model card and an adapter's config call it. None: the last part of "
        "the path.",
    )

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        try:  # the rule of all models
            ModelSpec(path=self.path, revision=self.revision, checksum=self.checksum)
        except ValidationError as error:
            problems = [str(item["ctx"]["error"]) for item in error.errors()]
            raise ValueError("\n".join(problems)) from None
        return self

    @property
    def neutral_name(self) -> str:
        """A name without a place of this machine."""
        is_hub_id = self.revision is not None
        return self.name or (self.path if is_hub_id else Path(self.path).name)


class SearchSpec(Spec):
    """The grid: every learning rate with every β; γ follows from β."""

    learning_rates: tuple[float, ...] = Field(
        (5e-7, 8e-7, 1e-6), min_length=1, description="AdamW's peak rates."
    )
    betas: tuple[float, ...] = Field(
        (10.0, 18.0), min_length=1, description="β: scale of the log-probs per token."
    )
    gamma_ratio: float = Field(
        0.3, ge=0, description="γ/β: the margin per token aimed at, in nats; the same for all."
    )

    @model_validator(mode="after")
    def _positive(self) -> Self:
        problems = [
            f"{name}: must be > 0 and different from each other, got {list(values)}"
            for name, values in (("learning_rates", self.learning_rates), ("betas", self.betas))
            if min(values) <= 0 or len(set(values)) < len(values)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class LoraSpec(Spec):
    """A LoRA adapter on every linear layer but the head; alpha is twice the rank."""

    rank: int = Field(16, ge=1, description="Of the matrices.")


class EarlyStopSpec(Spec):
    """Stop when the validation reward accuracy no longer rises, and keep the best checkpoint."""

    patience: int = Field(3, ge=1, description="Evaluations without a gain.")
    min_gain: float = Field(0.0, ge=0, description="A smaller gain is none; accuracy, 0 to 1.")


class TrainingSpec(Spec):
    """What decides the policy besides the grid; the defaults are the paper's."""

    batch_size: int = Field(128, ge=1, description="Pairs per optimizer step, over all processes.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training pairs.")
    max_length: int = Field(
        2048,
        ge=2,
        description="Tokens of prompt and longer answer; longer pairs are left out and counted.",
    )
    warmup_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps over which the rate rises to its peak."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How it falls to 0 afterwards, if at all."
    )
    lora: LoraSpec | None = Field(None, description="None: all weights are trained.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the matrix products. Weights that are trained, and their optimizer, are "
        "float32; those below an adapter have this dtype. `auto`: bfloat16 where it is fast.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice to keep fewer; for long pairs, large models."
    )
    early_stop: EarlyStopSpec | None = Field(None, description="None: train all epochs.")
    eval_steps: int = Field(
        20, ge=1, description="Steps between measurements on the validation pairs."
    )
    save_steps: int = Field(
        20, ge=1, description="Steps between checkpoints: what a killed training loses at most."
    )
    seed: int = Field(0, description="Of the order of pairs, and of an adapter's first weights.")

    @model_validator(mode="after")
    def _best_is_saved(self) -> Self:
        if self.early_stop and self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps: with early_stop a multiple of eval_steps ({self.eval_steps}), so "
                f"that the best step has a checkpoint, got {self.save_steps}"
            )
        return self


class SimpoRunSpec(Spec):
    """How the work is carried out; nothing here changes the policy."""

    max_hours: float | None = Field(
        None, gt=0, description="Stop in good order, at a checkpoint, at this age."
    )
    max_rejected_fraction: float = Field(
        0.05, ge=0, le=1, description="Exit code 3 above this share of pairs left out."
    )
    threads: int | None = Field(
        None, ge=1, description="torch's threads per process on a CPU. None: torch's choice."
    )
    logging_steps: int = Field(1, ge=1, description="Steps between points of the curves.")
    keep_checkpoints: bool = Field(False, description="Leave them when a training has ended.")


class SimpoTrackingSpec(TrackingSpec):
    """Where MLflow keeps the runs. It should be the store of the annotate run, to link the two."""

    experiment: str = Field("cdr-simpo", description="MLflow experiment.")


class SimpoConfig(Spec):
    """One search for a policy: which preferences, which start model, which grid, where to."""

    warehouse: WarehousePlace
    tables: TablePlaces
    preferences: PreferencesSpec
    start: StartModelSpec
    output: str = Field(
        description="Local folder of the policy, its checkpoints, and the pairs it was trained on."
    )
    search: SearchSpec = SearchSpec()
    training: TrainingSpec = TrainingSpec()
    run: SimpoRunSpec = SimpoRunSpec()
    tracking: SimpoTrackingSpec = SimpoTrackingSpec()


def load_simpo_config(path: str | Path, overrides: Sequence[str] = ()) -> SimpoConfig:
    """Read a training YAML; see `cdr.config_files.load_config`."""
    return load_config(SimpoConfig, path, overrides)


@dataclass(frozen=True)
class PointConfig:
    """What decides one policy of the grid: a checkpoint continues only under an equal one.

    Args:
        base_name: neutral name of the start model.
        base_hash: hash of its files, or hub id and commit.
        pairs_hash: hash of all pairs read, those of validation included.
        learning_rate: AdamW's peak rate.
        beta: scale of the log-probs per token.
        gamma: margin aimed at, β times the fixed ratio; TRL's `simpo_gamma`.
        batch_size: pairs per optimizer step, over all processes.
        epochs: passes over the training pairs.
        max_length: tokens of prompt and longer answer, at most.
        warmup_fraction: share of the steps over which the rate rises.
        schedule: how it falls.
        lora_rank: None where all weights are trained.
        dtype: of the matrix products, resolved.
        early_stop: patience and least gain; None to train all epochs.
        eval_steps: between measurements; 0 where they decide nothing.
        seed: of the order of pairs and the adapter's first weights.
        processes: how many share a step.
    """

    base_name: str
    base_hash: str
    pairs_hash: str
    learning_rate: float
    beta: float
    gamma: float
    batch_size: int
    epochs: float
    max_length: int
    warmup_fraction: float
    schedule: str
    lora_rank: int | None
    dtype: str
    early_stop: tuple[int, float] | None
    eval_steps: int
    seed: int
    processes: int

    @property
    def name(self) -> str:
        """Name of the point: its folder and its MLflow run."""
        return f"lr-{self.learning_rate:g}_beta-{self.beta:g}"


def list_points(
    config: SimpoConfig, *, base_hash: str, pairs_hash: str, dtype: str, processes: int
) -> list[PointConfig]:
    """Lay out the grid, learning rates within betas.

    Args:
        config: the search.
        base_hash: identity of the start model.
        pairs_hash: identity of the pairs.
        dtype: what `training.dtype` means on this machine.
        processes: how many train together.
    """
    training, search = config.training, config.search
    stop = training.early_stop
    return [
        PointConfig(
            base_name=config.start.neutral_name,
            base_hash=base_hash,
            pairs_hash=pairs_hash,
            learning_rate=rate,
            beta=beta,
            gamma=search.gamma_ratio * beta,
            batch_size=training.batch_size,
            epochs=training.epochs,
            max_length=training.max_length,
            warmup_fraction=training.warmup_fraction,
            schedule=training.schedule,
            lora_rank=training.lora.rank if training.lora else None,
            dtype=dtype,
            early_stop=(stop.patience, stop.min_gain) if stop else None,
            eval_steps=training.eval_steps if stop else 0,
            seed=training.seed,
            processes=processes,
        )
        for beta, rate in product(search.betas, search.learning_rates)
    ]
