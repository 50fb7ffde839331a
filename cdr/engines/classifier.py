"""Trained reward models: sequence classifiers of transformers, one score per completion.

A classifier reads prompt and answer and gives numbers at the last token; one of them is the reward.
It is asked as every engine is, by prefix and completions, and answers with one number per
completion in place of one per token.

- A causal decoder with one linear head (`score`), as transformers' own classes are, is read along
  the prefix tree (`cdr.engines.tree_reader`): a prompt is paid once for all its answers.
- Code that comes with a model is run only where the spec says so. Nobody here has read it, so it
  gets one whole sequence at a time, through its own forward.

Out of scope: adapters, quantised weights, encoders (a pair of texts in place of a conversation).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from cdr.engines.base import (
    EngineSpec,
    Sample,
    SamplingRequest,
    ScoringGroup,
    TokenLogprobs,
    check_length,
    check_token_ids,
)
from cdr.engines.causal_lm import Decoder, load_model
from cdr.engines.prefix_tree import build_prefix_tree
from cdr.engines.tree_reader import TreeEngine, TreeReader
from cdr.errors import ModelError

_log = logging.getLogger(__name__)

# |Δ| between a score along the tree and the model's own, relative to 1 + |score|.
_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class ClassifierEngine(TreeEngine):
    """A sequence classifier in this process.

    Args:
        spec: as for `TreeEngine`.
        num_threads: as for `TreeEngine`.

    Raises:
        ModelError: the model cannot be loaded as specified, lacks its head, has no such output, or
            is of an architecture that this engine would give wrong numbers for.
    """

    def __init__(self, spec: EngineSpec, num_threads: int | None = None) -> None:
        super().__init__(spec, num_threads)
        self._model = load_model(AutoModelForSequenceClassification, spec, self._device)
        self._reader: TreeReader | None = None
        if spec.custom_code:
            self._probe_own_code()
        else:
            self._output = self._find_output()
            self._head_dtype: torch.dtype = getattr(torch, spec.head_dtype)
            self._reader = TreeReader(Decoder(self._model, spec, self._device), spec, self._device)
            self._check_architecture(self._reader)

    @torch.inference_mode()
    def score(self, groups: Sequence[ScoringGroup]) -> list[list[TokenLogprobs]]:
        """Give the score of every completion after its prefix, an array of shape [1] each.

        Raises:
            ModelError: a sequence is empty, longer than `max_length`, or has an id that is not in
                the vocabulary; or the model's own code gives no such output.
            EngineError: the device has no memory even for a few rows.
        """
        for group in groups:
            for completion_ids in group.completions_ids:
                check_length(self.spec, len(group.prefix_ids), len(completion_ids))
        sequences = [group.prefix_ids + c for group in groups for c in group.completions_ids]
        reader = self._reader
        if reader is None:
            scores = [self._ask_own_code(ids) for ids in sequences]
        else:
            scores = self._score_all(reader, [self._until_pooled(ids) for ids in sequences])
            if len(scores) > 1 and not np.isfinite(scores).all():
                # In attention, 0 · NaN is NaN: one bad row spoils its whole forward.
                reader.forget()
                scores = [self._score_all(reader, [self._until_pooled(s)])[0] for s in sequences]
        parts = iter(np.asarray(scores, np.float32)[:, None])
        return [[next(parts) for _ in group.completions_ids] for group in groups]

    def generate(self, requests: Sequence[SamplingRequest]) -> list[list[Sample]]:
        """Refuse: a classifier writes nothing.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a classifier cannot sample",
            where=f"engine {self.spec.name}",
            fix="sample with a causal language model",
        )

    def close(self) -> None:
        """Give the memory of weights and caches back."""
        del self._model, self._reader
        super().close()

    def _score_all(self, reader: TreeReader, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Read sequences as one tree, and run the head on the last row of each."""
        # A target makes the walk read the row before it; which one does not matter.
        groups = [ScoringGroup(ids, ((0,),)) for ids in sequences]
        tree = build_prefix_tree(groups, reader.path.token_ids)
        scores = np.empty(len(sequences), np.float64)
        weight = self._model.score.weight[self._output].to(self._head_dtype)
        bias = self._model.score.bias
        for begin, end, hidden in reader.walk(tree):
            inside = np.flatnonzero((begin <= tree.target_rows) & (tree.target_rows < end))
            states = hidden[reader.to_device(tree.target_rows[inside] - begin)]
            found = (states.to(self._head_dtype) @ weight).double()
            scores[inside] = found.cpu().numpy()
        if bias is not None:
            scores += float(bias[self._output])
        return list(scores)

    def _until_pooled(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Cut a sequence behind the token at which the model's own forward takes its score.

        That is the last one that is not the padding token, which some models also end turns with.
        """
        pad = self._model.config.get_text_config().pad_token_id
        end = len(ids)
        while end > 1 and ids[end - 1] == pad:
            end -= 1
        return ids[:end]

    @torch.inference_mode()
    def _probe_own_code(self) -> None:
        """See at load that the output is there, and not with every row."""
        try:
            self._ask_own_code((1, 2, 3, 4))
        except ModelError:
            raise
        except Exception as error:  # the code may want a whole conversation, as ArmoRM's does
            _log.info("the model's own code cannot be probed: %s", type(error).__name__)

    def _ask_own_code(self, ids: tuple[int, ...]) -> float:
        check_token_ids(
            self.spec, np.asarray(ids, np.int64), self._model.get_input_embeddings().num_embeddings
        )
        result = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self._device),
        )
        name = self.spec.output or "logits"
        found = getattr(result, name, None)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else "absent"
            raise ModelError(
                f"output '{name}' must be one number per sequence, is {shape}",
                where=f"engine {self.spec.name} ({self.spec.path})",
                fix="set the model's `output` to the field of its result that is the reward",
            )
        return float(found.float())

    def _find_output(self) -> int:
        """Give the row of the head that is the reward."""
        head = getattr(self._model, "score", None)
        if not isinstance(head, nn.Linear):
            raise self._refuse_architecture("has no single linear head called `score`")
        if not self.spec.output:
            if head.out_features == 1:
                return 0
            problem = f"the classifier has {head.out_features} outputs, and none is named"
        else:
            labels = {str(label): int(row) for row, label in self._model.config.id2label.items()}
            if (row := labels.get(self.spec.output)) is not None:
                return row
            problem = f"the classifier has no output '{self.spec.output}'"
        raise ModelError(
            problem,
            where=f"engine {self.spec.name} ({self.spec.path})",
            fix="name the output that is the reward in the model's `output`",
        )

    @torch.inference_mode()
    def _check_architecture(self, reader: TreeReader) -> None:
        """Compare with the model's own forward, and refuse what a walk would get wrong."""
        for ids, (score,) in zip(*self._score_probe(reader), strict=True):
            logits = self._model(input_ids=torch.tensor([ids], device=self._device)).logits
            own = float(logits[0, self._output])
            if not abs(score - own) <= _CHECK_TOLERANCE[self.spec.dtype] * (1 + abs(own)):
                raise self._refuse_architecture(
                    f"gives scores along a prefix tree that differ from its own: {score:.4g} "
                    f"against {own:.4g}"
                )

    def _refuse_architecture(self, reason: str) -> ModelError:
        return ModelError(
            f"this architecture {reason}",
            where=f"engine {self.spec.name} ({self.spec.path})",
            fix="use a classifier on a causal decoder, such as Llama, Mistral, Qwen or Gemma",
        )
