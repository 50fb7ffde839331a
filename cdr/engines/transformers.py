"""Scoring and sampling with Hugging Face transformers: the default engine and the reference.

A call's prefixes and completions are merged into one prefix tree (`cdr.engines.prefix_tree`) and
the decoder walks it depth first, a fixed number of rows per forward, whatever mixture of prompts
and completions they are. A forward sees the keys and values of the path to its first row, and
among its own rows each sees its ancestors (an explicit 4-D mask). So

- every shared token (domain instruction, exemplar, prompt, common start of two completions) is
  computed once, without padding and without a copy of the prefix per completion;
- only the path is kept from one forward to the next, and from one call to the next: a call whose
  groups begin like the last ones goes on from there;
- the LM head runs on the rows that predict a completion token, in float32 unless the spec says
  otherwise, over slices of the vocabulary.

Rows of other branches are masked, which costs attention though not the matmuls: on a CPU a few rows
at a time attend to the keys they need (`cdr.engines.block_attention`); on a GPU, where the mask is
dense, it is why rows per forward are capped. Each of a CPU's threads does such blocks, and slices
of the vocabulary, from start to end (`cdr.engines.cpu_math`). docs/decisions/0002-prefix-tree.md
has the measurements, and what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from cdr.engines.base import (
    EngineSpec,
    Sample,
    SamplingRequest,
    ScoringGroup,
    TokenLogprobs,
    check_length,
)
from cdr.engines.causal_lm import CausalLm, KeysValues
from cdr.engines.cpu_math import map_on_cores
from cdr.engines.prefix_tree import Ints, PrefixTree, build_prefix_tree
from cdr.engines.tree_reader import TreeEngine, TreeReader
from cdr.errors import ModelError

# Logits held at once while the head scores: on a CPU 4 MiB of float32 by each thread, which stay in
# its cache from the product to their log-sum; on a GPU 128 MiB, which fill it.
_MAX_LOGITS = {"cpu": 2**20, "cuda": 2**25}
# Tokens of keys and values held while sampling, in multiples of `batch_tokens`.
_SAMPLING_CACHE_FACTOR = 8
# Mean |Δ| in nats per token that the check at load allows. Rounding stays far below; a mask, a
# position or a logit scale that the architecture treats in its own way comes out far above.
_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


class TransformersEngine(TreeEngine):
    """A causal language model in this process.

    Args:
        spec: as for `TreeEngine`.
        num_threads: as for `TreeEngine`.

    Raises:
        ModelError: the model cannot be loaded as specified, or its architecture is one that this
            engine would give wrong numbers for.
    """

    def __init__(self, spec: EngineSpec, num_threads: int | None = None) -> None:
        super().__init__(spec, num_threads)
        self._lm = CausalLm(spec, self._device)
        self._reader = TreeReader(self._lm, spec, self._device)
        self._check_architecture()

    @torch.inference_mode()
    def score(self, groups: Sequence[ScoringGroup]) -> list[list[TokenLogprobs]]:
        """Give the log-prob of every completion token; see `LogprobEngine.score`.

        A sequence whose numbers come out non-finite has no effect on the others.

        Raises:
            ModelError: a sequence is empty, longer than `max_length`, or has an id that is not in
                the vocabulary.
            EngineError: the device has no memory even for a few rows.
        """
        completions = [(group.prefix_ids, c) for group in groups for c in group.completions_ids]
        for prefix_ids, completion_ids in completions:
            check_length(self.spec, len(prefix_ids), len(completion_ids))
        tree = build_prefix_tree(groups, self._reader.path.token_ids)
        logprobs = self._score_tree(tree)
        if not np.isfinite(logprobs).all():
            # In attention, 0 · NaN is NaN: one bad row spoils its whole forward.
            self._reader.forget()
            if len(completions) > 1:
                alone = [self.score([ScoringGroup(p, (c,))])[0][0] for p, c in completions]
                logprobs = np.concatenate(alone)
        ends = np.cumsum([len(completion_ids) for _, completion_ids in completions])
        parts = iter(np.split(logprobs, ends[:-1]))
        return [[next(parts) for _ in group.completions_ids] for group in groups]

    @torch.inference_mode()
    def generate(self, requests: Sequence[SamplingRequest]) -> list[list[Sample]]:
        """Sample completions; see `LogprobEngine.generate`.

        Raises:
            ModelError: as for `score`, `max_new_tokens` being the completion's length.
            EngineError: as for `score`.
        """
        budget = self.spec.batch_tokens * _SAMPLING_CACHE_FACTOR
        batches: list[list[_Job]] = []
        longest = 0
        for request in requests:
            check_length(self.spec, len(request.prefix_ids), request.max_new_tokens)
            for seed in request.seeds:
                length = len(request.prefix_ids) + request.max_new_tokens
                longest = max(longest, length)
                if not batches or (len(batches[-1]) + 1) * longest > budget:
                    batches.append([])
                    longest = length
                batches[-1].append(_Job(request, seed))
        for batch in batches:
            self._sample_batch(batch)
        samples = (job.to_sample() for batch in batches for job in batch)
        return [[next(samples) for _ in request.seeds] for request in requests]

    def close(self) -> None:
        """Give the memory of weights and caches back."""
        del self._lm, self._reader
        super().close()

    def _score_tree(self, tree: PrefixTree) -> TokenLogprobs:
        """Give the log-prob of every target of a tree, in its order."""
        by_row = np.argsort(tree.target_rows, kind="stable")
        sorted_rows = tree.target_rows[by_row]
        logprobs = np.empty(len(by_row), np.float32)
        for begin, end, hidden in self._reader.walk(tree):
            first, last = np.searchsorted(sorted_rows, (begin, end))
            targets = by_row[first:last]
            if len(targets):
                rows = tree.target_rows[targets] - begin
                logprobs[targets] = self._score_targets(hidden, rows, tree.target_ids[targets])
        return logprobs

    def _score_targets(self, hidden: torch.Tensor, rows: Ints, target_ids: Ints) -> TokenLogprobs:
        """Give log p(target) for the targets that rows of one forward predict.

        Args:
            hidden: shape [rows of the forward, hidden].
            rows: predicting row of each target, shape [targets].
            target_ids: shape [targets].
        """
        distinct_rows, state_of_target = np.unique(rows, return_inverse=True)
        states = hidden[self._reader.to_device(distinct_rows)]
        state, target = self._reader.to_device(state_of_target), self._reader.to_device(target_ids)
        on_cpu, vocab_size = self._device.type == "cpu", self._lm.vocab_size
        width = max(1, _MAX_LOGITS[self._device.type] // len(states))
        if on_cpu:  # slices for every thread where there are few states
            width = min(width, -(-vocab_size // (2 * torch.get_num_threads())))

        def score_slice(first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = self._lm.compute_logits(states, first, first + width)
            inside = ((first <= target) & (target < first + width)).nonzero()[:, 0]
            return logits.logsumexp(-1), inside, logits[state[inside], target[inside] - first]

        slices = range(0, vocab_size, width)
        found = map_on_cores(score_slice, slices) if on_cpu else map(score_slice, slices)
        log_normalizers = torch.full((len(states),), -torch.inf, device=self._device)
        target_logits = torch.empty(len(target), device=self._device)
        for log_normalizer, inside, logits_inside in found:
            log_normalizers = torch.logaddexp(log_normalizers, log_normalizer)
            target_logits[inside] = logits_inside
        # Rounding may lift a probability a little above one.
        logprobs = (target_logits - log_normalizers[state]).clamp_(max=0.0)
        result: TokenLogprobs = logprobs.cpu().numpy()
        return result

    def _sample_batch(self, jobs: Sequence[_Job]) -> None:
        """Sample one completion per job, all at once, into the jobs."""
        states, layers, padding = self._prefill(jobs)
        running = list(jobs)
        while True:
            logits = self._lm.compute_logits(states)
            going_on = [slot for slot, job in enumerate(running) if job.extend(logits[slot])]
            if not going_on:
                return
            if len(going_on) < len(running):
                running = [running[slot] for slot in going_on]
                kept = torch.tensor(going_on, device=self._device)
                layers = [(keys[kept], values[kept]) for keys, values in layers]
                padding = padding[kept]
            num_keys = layers[0][0].shape[2] + 1
            key_positions = torch.arange(num_keys, device=self._device) - padding
            hidden, layers = self._lm.read(
                token_ids=torch.tensor([job.token_ids[-1:] for job in running]).to(self._device),
                positions=key_positions[:, -1:],
                key_positions=key_positions,
                visible=(key_positions >= 0)[:, None],
                layers=layers,
            )
            states = hidden[:, -1]

    def _prefill(self, jobs: Sequence[_Job]) -> tuple[torch.Tensor, KeysValues, torch.Tensor]:
        """Read each prefix once and repeat it for its jobs, padded on the left to one width.

        Returns:
            Last hidden states, shape [jobs, hidden]; keys and values of `width` tokens; and the
            padding of each job in tokens, shape [jobs, 1].
        """
        width = max(len(job.request.prefix_ids) for job in jobs)
        states, parts, padding = [], [], []
        for prefix_ids, jobs_of_prefix in groupby(jobs, key=lambda job: job.request.prefix_ids):
            count, pad = len(list(jobs_of_prefix)), width - len(prefix_ids)
            # Any target makes the walk read the last row of the prefix.
            tree = build_prefix_tree(
                [ScoringGroup(prefix_ids, ((0,),))], self._reader.path.token_ids
            )
            *_, (_, _, hidden) = self._reader.walk(tree)
            states.append(hidden[-1:].expand(count, -1))
            parts.append([_repeat(layer, count, pad) for layer in self._reader.path.layers])
            padding += [[pad]] * count
        layers = [
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
            for layer in zip(*parts, strict=True)
        ]
        return torch.cat(states), layers, torch.tensor(padding, device=self._device)

    @torch.inference_mode()
    def _check_architecture(self) -> None:
        """Compare with the model's own forward, and refuse what a walk would get wrong."""
        sequences, answers = self._score_probe(self._reader)
        rows = torch.tensor(sequences, device=self._device)
        plain = torch.stack([self._lm.compute_plain_logprobs(row)[3:] for row in rows])
        difference = np.abs(np.stack(answers) - plain.float().cpu().numpy()).mean()
        if not difference <= _CHECK_TOLERANCE[self.spec.dtype]:
            raise self._refuse_architecture(
                f"gives log-probs along a prefix tree that differ from its own by "
                f"{difference:.2g} nats per token"
            )

    def _refuse_architecture(self, reason: str) -> ModelError:
        return ModelError(
            f"this architecture {reason}",
            where=f"engine {self.spec.name} ({self.spec.path})",
            fix="use a model with ordinary causal attention, such as Llama, Mistral, Qwen or Gemma",
        )


class _Job:
    """One completion being sampled: a request, one of its seeds, and the tokens so far."""

    def __init__(self, request: SamplingRequest, seed: int) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self._is_stopped = False
        # Drawn ahead and by inversion, so that neither batch nor device enters.
        self._draws = np.random.default_rng(seed).random(request.max_new_tokens)

    def extend(self, logits: torch.Tensor) -> bool:
        """Choose the next token from logits of shape [vocab]; tell whether to go on."""
        token_id = self._choose(logits)
        self._is_stopped = token_id in self.request.stop_ids
        if not self._is_stopped:
            self.token_ids.append(token_id)
        return not self._is_stopped and len(self.token_ids) < self.request.max_new_tokens

    def to_sample(self) -> Sample:
        return Sample(tuple(self.token_ids), "stop" if self._is_stopped else "length")

    def _choose(self, logits: torch.Tensor) -> int:
        if self.request.temperature == 0:
            return int(logits.argmax())
        probabilities, ids = (
            (logits / self.request.temperature).softmax(-1).sort(descending=True, stable=True)
        )
        mass = probabilities.double().cumsum(-1)
        # The nucleus is the shortest run of likeliest tokens that holds top_p.
        size = 1 + int((mass < self.request.top_p).sum())
        nucleus = mass[:size]
        draw = nucleus[-1] * self._draws[len(self.token_ids)]
        return int(ids[torch.searchsorted(nucleus, draw, right=True)])


def _repeat(
    layer: tuple[torch.Tensor, torch.Tensor], count: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat keys and values of one sequence `count` times, with `pad` tokens of zeros before."""
    keys, values = (torch.nn.functional.pad(part, (0, 0, pad, 0)) for part in layer)
    return keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)
