"""What decides what is trained on pairs, and the refusal to go on under anything else.

No torch: a command line is checked, and told what is wrong, before a model loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdr.checkpoints import check_same
from cdr.errors import ConfigError


@dataclass(frozen=True)
class PairTrainingConfig:
    """What decides a model that is trained on preference pairs, whatever the loss.

    Args:
        base_hash: hash of the start model's weights and tokenizer.
        pairs_hash: hash of all pairs read, held-out ones included.
        max_length: tokens of prompt and longer answer, at most.
        max_pairs: training pairs drawn at most; None for all.
        holdout_fraction: share of prompts per section that is not trained on.
        epochs: passes over the training pairs.
        batch_size: pairs per optimizer step, over all processes.
        learning_rate: AdamW's peak rate; linear warm-up over a tenth of the steps, then linear
            decay to 0.
        rank: of the LoRA matrices, on every linear layer but the head; alpha is twice the rank.
        seed: draws pairs, their order and the first weights.
        dtype: of the start model's weights and of the matrix products; what is trained is float32.
    """

    base_hash: str
    pairs_hash: str
    max_length: int
    max_pairs: int | None
    holdout_fraction: float
    epochs: float
    batch_size: int
    learning_rate: float
    rank: int
    seed: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuse values out of range, all at once."""
        problems = [
            f"{key}: must be {rule}, got {getattr(self, key)!r}"
            for key, (is_fine, rule) in self._rules().items()
            if not is_fine
        ]
        if problems:
            raise ConfigError(problems, where="command line", fix="see --help")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """Give per option whether it is in range, and the range."""
        return {
            "max_length": (self.max_length >= 2, ">= 2"),
            "max_pairs": (self.max_pairs is None or self.max_pairs >= 1, ">= 1"),
            "holdout_fraction": (0 <= self.holdout_fraction < 1, ">= 0 and < 1"),
            "epochs": (self.epochs > 0, "> 0"),
            "batch_size": (self.batch_size >= 1, ">= 1"),
            "learning_rate": (self.learning_rate > 0, "> 0"),
            "rank": (self.rank >= 1, ">= 1"),
        }

    def check_same(self, before: Mapping[str, Any], where: Path) -> None:
        """Refuse to continue what another configuration has begun.

        Args:
            before: the recorded configuration, as a mapping.
            where: the file it was read from.

        Raises:
            ConfigError: names every key that differs, with both values.
        """
        check_same(asdict(self), before, where)


@dataclass(frozen=True)
class TrainingConfig(PairTrainingConfig):
    """What decides the adapter: a checkpoint continues only under an equal one.

    Args:
        base_name: neutral name of the start model, written into the adapter.
        beta: weight of the log-ratio in the loss; smaller lets the model move further.
        processes: how many share a step (their number changes which pair is in which step).
    """

    base_name: str
    beta: float
    processes: int

    def _rules(self) -> dict[str, tuple[bool, str]]:
        return {
            **super()._rules(),
            "batch_size": (
                self.batch_size >= 1 and self.batch_size % self.processes == 0,
                f"a multiple of the number of processes, {self.processes}",
            ),
            "beta": (self.beta > 0, "> 0"),
        }


@dataclass(frozen=True)
class RunOptions:
    """What may change from one start of a run to the next.

    Args:
        model: folder of the start model.
        pairs: files and folders of preference tables.
        output: adapter folder to write.
        command: the command line, without machine paths, for the model card.
        max_hours: stop at a checkpoint after this long; None for no limit.
        threads: torch threads per process; None leaves torch's choice.
        save_steps: optimizer steps between checkpoints.
        keep_checkpoints: leave all of them when the training has ended; else the last two lie there
            while it runs.
        held_out: JSON lines file to write the held-out pairs to, before training; None: none.
    """

    model: Path
    pairs: tuple[Path, ...]
    output: Path
    command: str
    max_hours: float | None
    threads: int | None
    save_steps: int
    keep_checkpoints: bool
    held_out: Path | None = None
