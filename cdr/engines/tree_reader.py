"""Reading a prefix tree with a decoder: every shared token once, only the path kept.

What engines of this library have in common that read with transformers' models (`TreeEngine`); the
heads on top are theirs. See `cdr.engines.transformers` for why it is done so.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs, check_token_ids
from cdr.engines.causal_lm import Decoder, KeysValues, check_spec
from cdr.engines.hardware import count_cores
from cdr.engines.prefix_tree import Ints, PrefixTree
from cdr.errors import EngineError, ModelError

# Rows per forward: enough to fill the matmuls, and to be worth waking a CPU's threads for; few
# enough that masked-out attention stays small on a GPU.
_MAX_ROWS = 2048
_MIN_ROWS = 16


@dataclass(frozen=True)
class ReadPath:
    """Token ids from the root to the last row read, shape [tokens], with keys and values."""

    token_ids: Ints
    layers: KeysValues


NO_PATH = ReadPath(np.empty(0, np.int64), [])


class TreeReader:
    """Walks prefix trees; goes on from the path that the last walk ended with.

    Args:
        decoder: what reads.
        spec: its engine's.
        device: where it is.

    Attributes:
        path: token ids from the root to the last row read, with keys and values.
        vocab_size: ids that the decoder knows.
    """

    def __init__(self, decoder: Decoder, spec: EngineSpec, device: torch.device) -> None:
        self._decoder, self._spec, self._device = decoder, spec, device
        self._max_rows = min(spec.batch_tokens, _MAX_ROWS)
        self.path = NO_PATH
        self.vocab_size = decoder.vocab_size

    def forget(self) -> None:
        """Give the memory of the path back; the next walk begins at the root."""
        self.path = NO_PATH

    def walk(self, tree: PrefixTree) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Read the rows of a tree in order; leaves the path to its last row in `path`.

        Yields:
            First row, one past the last row, and their hidden states, shape [rows, hidden].
        """
        ids = np.concatenate([tree.token_ids, tree.target_ids])
        check_token_ids(self._spec, ids, self.vocab_size)
        begin, num_rows = tree.num_known, len(tree)
        path = np.arange(begin)
        layers = [(keys[:, :, :begin], values[:, :, :begin]) for keys, values in self.path.layers]
        self.path = NO_PATH  # nothing to go on from if a forward fails
        while begin < num_rows:
            end = min(begin + self._max_rows, num_rows)
            seen = np.concatenate([path, np.arange(begin, end)])
            try:
                hidden, layers_seen = self._read_rows(tree, begin, end, seen, layers)
            except RuntimeError as error:
                self._lower_max_rows(end - begin, error)
                continue
            yield begin, end, hidden
            kept = tree.is_on_path(seen, to=min(end, num_rows - 1))
            path, kept_tokens = seen[kept], self.to_device(np.flatnonzero(kept))
            layers = [
                (keys.index_select(2, kept_tokens), values.index_select(2, kept_tokens))
                for keys, values in layers_seen
            ]
            begin = end
        self.path = ReadPath(tree.token_ids[path], layers)

    def _read_rows(
        self, tree: PrefixTree, begin: int, end: int, seen: Ints, layers: KeysValues
    ) -> tuple[torch.Tensor, KeysValues]:
        """Run the decoder on rows [begin, end) of a tree; `seen` ends with them."""
        rows, keys = torch.arange(begin, end, device=self._device), self.to_device(seen)
        visible = (keys <= rows[:, None]) & (rows[:, None] < self.to_device(tree.ends[seen]))
        hidden, layers = self._decoder.read(
            token_ids=self.to_device(tree.token_ids[None, begin:end]),
            positions=self.to_device(tree.depths[None, begin:end]),
            key_positions=self.to_device(tree.depths[None, seen]),
            visible=visible[None],
            layers=layers,
        )
        return hidden[0], layers

    def _lower_max_rows(self, num_rows: int, error: RuntimeError) -> None:
        """Halve the rows per forward if memory ran out; raise where that cannot help."""
        is_cpu_allocator = "DefaultCPUAllocator" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not is_cpu_allocator:
            raise error
        if num_rows <= _MIN_ROWS:
            raise EngineError(
                f"no memory even for {num_rows} tokens at a time",
                where=f"engine {self._spec.name} on {self._device}",
                fix="lower max_length, or place fewer models on the device",
            ) from error
        self._max_rows = num_rows // 2

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Give an array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


class TreeEngine(ABC):
    """An engine on a model of transformers in this process, on the first CUDA device or the CPU.

    One caller at a time. The number of CPU threads is set for the whole process.

    Args:
        spec: what to load; `extra` must be empty.
        num_threads: CPU threads; None takes all cores this process may use.

    Raises:
        ModelError: the spec asks for what these engines have not.
    """

    is_concurrent = False

    def __init__(self, spec: EngineSpec, num_threads: int | None) -> None:
        torch.set_num_threads(num_threads or count_cores())
        check_spec(spec)
        self.spec = spec
        self.engine_version = f"transformers {transformers.__version__} / torch {torch.__version__}"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @abstractmethod
    def score(self, groups: Sequence[ScoringGroup]) -> list[list[TokenLogprobs]]:
        """Answer as `LogprobEngine.score` does."""

    def close(self) -> None:
        """Give the memory back of what the engine has let go of: weights and caches."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _score_probe(self, reader: TreeReader) -> tuple[list[tuple[int, ...]], list[TokenLogprobs]]:
        """Score two short sequences, to be compared with what the model's own forward gives.

        Returns:
            The sequences, whose first four tokens are the prefix, and the answers.

        Raises:
            ModelError: the model cannot be read along a tree at all.
        """
        ids = np.linspace(0, reader.vocab_size - 1, 12).astype(np.int64).tolist()
        sequences = [tuple(ids), tuple(ids[:4] + ids[:3:-1])]
        group = ScoringGroup(sequences[0][:4], tuple(s[4:] for s in sequences))
        try:
            (answers,) = self.score([group])
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise self._refuse_architecture(
                f"cannot be read along a prefix tree: {error}"
            ) from error
        reader.forget()
        return sequences, answers

    @abstractmethod
    def _refuse_architecture(self, reason: str) -> ModelError:
        """Make the error that says why, and what to use in its place."""
