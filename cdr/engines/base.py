"""The question every model is asked: how likely are these completions after this prefix?

Engines take token ids and give token ids or log-probs; text never crosses this line. The reward
asks strong and weak, the router asks about its labels. Sampling (`generate`) is the only other
question. The protocol is the same in process and through the engine host (`cdr.engines.host`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cdr.errors import ModelError

TokenLogprobs = npt.NDArray[np.float32]
"""Log-probs in nats, one per completion token, shape [num_tokens]. Sum them in float64."""


@dataclass(frozen=True)
class ScoringGroup:
    """One prefix and the completions to score after it.

    Args:
        prefix_ids: token ids of the rendered prompt with the generation header, at least one.
        completions_ids: token ids of each completion, each at least one long.
    """

    prefix_ids: tuple[int, ...]
    completions_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SamplingRequest:
    """One prefix to continue `len(seeds)` times.

    Args:
        prefix_ids: token ids of the rendered prompt with the generation header.
        seeds: one per completion wanted; the same seed gives the same completion.
        max_new_tokens: tokens at most, the end-of-turn token included.
        temperature: 0 takes the likeliest token; otherwise > 0.
        top_p: nucleus mass kept, in (0, 1].
        stop_ids: token ids that end a completion (they are left out of the result).
    """

    prefix_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A sampled completion: token ids without the stop token, and `stop` or `length`."""

    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine needs to load, resolved on the driver; crosses to hosts as JSON.

    Args:
        name: what requests call it; the model's `model_key`.
        engine: `transformers`, `vllm`, `classifier` or `stub`.
        path: folder of weights and tokenizer, hub id or URI; engines themselves get a folder of
            this node (`cdr.weights.make_local`).
        revision: commit hash of the hub id; None for all others.
        adapter_path: the same of a LoRA adapter; None for none.
        dtype: `float32` or `bfloat16` (`auto` was decided before).
        head_dtype: dtype in which the LM head and log-softmax run.
        max_length: tokens of prefix and completion together that the engine must take.
        batch_tokens: token rows per forward at most.
        extra: further engine arguments, as JSON text of an object.
        quantization: how weights are quantised (vLLM); None for as they are.
        memory_fraction: share of each device's memory that the engine may take, in (0, 1]; None
            leaves it to the engine.
        tensor_parallel: devices over which the weights are split (vLLM).
        checksum: content hash that the model's files must have; None where it is not known.
        adapter_revision: commit hash of the adapter's hub id.
        adapter_checksum: content hash that the adapter's files must have.
        max_adapter_rank: largest LoRA rank that engines on these weights may have, so that they
            can share them (vLLM); 0 where only this engine's own adapter counts.
        adapter_modules: names of the modules that such adapters change, sorted, with commas.
        output: which output of a classifier is its score: a label, or with custom code a field of
            the result; empty for the only one.
        custom_code: whether the model's own Python code is run (classifier).
    """

    name: str
    engine: str
    path: str
    revision: str | None = None
    adapter_path: str | None = None
    dtype: str = "float32"
    head_dtype: str = "float32"
    max_length: int = 2048
    batch_tokens: int = 4096
    extra: str = "{}"
    quantization: str | None = None
    memory_fraction: float | None = None
    tensor_parallel: int = 1
    checksum: str | None = None
    adapter_revision: str | None = None
    adapter_checksum: str | None = None
    max_adapter_rank: int = 0
    adapter_modules: str = ""
    output: str = ""
    custom_code: bool = False

    def weights(self) -> EngineSpec:
        """Give what engines have in common that differ by their adapter only."""
        return replace(
            self, name="", adapter_path=None, adapter_revision=None, adapter_checksum=None
        )


class LogprobEngine(Protocol):
    """A loaded model that scores and samples; one thread at a time asks it.

    Same inputs, same outputs, in order, whatever the grouping or batch.
    """

    spec: EngineSpec
    engine_version: str
    """For example `transformers 5.19.0 / torch 2.13.0`."""
    is_concurrent: bool
    """Whether the work is done in other processes: two such engines may be busy at a time, each
    with one caller."""

    def score(self, groups: Sequence[ScoringGroup]) -> list[list[TokenLogprobs]]:
        """Give the log-prob of every completion token given prefix and earlier tokens.

        Args:
            groups: sorted by `prefix_ids` when neighbours are to share their common prefix;
                any order is right.

        Returns:
            One list per group, one float32 array per completion, in the given order: a log-prob
            per token; of a classifier the score of the whole, shape [1].

        Raises:
            EngineDied: a process of the engine's own ended; this engine can only be closed.
        """
        ...

    def generate(self, requests: Sequence[SamplingRequest]) -> list[list[Sample]]:
        """Sample completions; one list per request, one sample per seed, in order."""
        ...

    def close(self) -> None:
        """Give memory back, and end all processes of its own; it cannot be used afterwards."""
        ...


def make_engine(spec: EngineSpec, num_threads: int | None = None) -> LogprobEngine:
    """Load the engine a spec names.

    Args:
        spec: what to load.
        num_threads: CPU threads for the engine; None takes all cores.

    Raises:
        ModelError: the model cannot be loaded, or this machine lacks the engine's package.
    """
    if spec.engine == "stub":
        from cdr.engines.stub import StubEngine

        return StubEngine(spec)
    if spec.engine == "transformers":
        from cdr.engines.transformers import TransformersEngine

        return TransformersEngine(spec, num_threads=num_threads)
    if spec.engine == "vllm":
        from cdr.engines.vllm import VllmEngine

        return VllmEngine(spec, num_threads=num_threads)
    if spec.engine == "classifier":
        from cdr.engines.classifier import ClassifierEngine

        return ClassifierEngine(spec, num_threads=num_threads)
    raise ModelError(
        f"engine must be 'transformers', 'vllm', 'classifier' or 'stub', got {spec.engine!r}",
        fix="set the model's engine, or `engine` for all models of the reward",
    )


def check_length(spec: EngineSpec, num_prefix_tokens: int, num_new_tokens: int) -> None:
    """Refuse an empty prefix or completion, and what is longer than `max_length`.

    Raises:
        ModelError: with both lengths.
    """
    if num_prefix_tokens < 1 or num_new_tokens < 1:
        raise ModelError(
            "prefix and completion must have at least one token each, got none",
            fix="reject such rows before they reach the engine",
        )
    if num_prefix_tokens + num_new_tokens > spec.max_length:
        raise ModelError(
            f"prefix and completion must have at most {spec.max_length} tokens together, "
            f"got {num_prefix_tokens} + {num_new_tokens}",
            where=f"engine {spec.name}",
            fix="raise max_length, or reject such rows before they reach the engine",
        )


def check_token_ids(spec: EngineSpec, ids: npt.NDArray[np.int64], vocab_size: int) -> None:
    """Refuse token ids that the model has no embedding or no logit for.

    Raises:
        ModelError: with one of them.
    """
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ModelError(
            f"token id {outside[0]} is not in the model's vocabulary of {vocab_size}",
            where=f"engine {spec.name} ({spec.path})",
            fix="use `template: plain` for a model without the template's special tokens",
        )
