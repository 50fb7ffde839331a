"""Deterministic numbers instead of a model: for scale tests of the Spark side, and for tests.

A token's log-prob is a hash of the engine's name, the prefix and the completion up to that token,
as a real model's is a function of them. Knobs in `EngineSpec.extra` (a JSON object) let tests see
slow engines, bad numbers and dying processes:

    delay_s_per_token   seconds to sleep per completion token scored
    nan_token           token id whose log-prob is NaN
    kill_token          token id that kills this process (SIGKILL) when a completion holds it
    is_concurrent       true: may be asked beside other engines of its process
    has_child           true: depends on a child process in a session of its own, as vLLM does
    kill_child_token    token id that kills that child (SIGKILL) when a completion holds it
    resubmit_token      token id whose completions count as sent again, as vLLM sends some
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from cdr.engines.base import EngineSpec, Sample, SamplingRequest, ScoringGroup, TokenLogprobs
from cdr.errors import EngineDied, ModelError

_KNOBS = {
    *("delay_s_per_token", "nan_token", "kill_token"),
    *("is_concurrent", "has_child", "kill_child_token", "resubmit_token"),
}
_MAX_TOKEN_ID = 255  # sampled ids stay small, so that any vocabulary can decode them
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio, odd: multiplication permutes 64-bit words


class StubEngine:
    """An engine without weights.

    Args:
        spec: `name` and `extra` count, the rest is ignored.

    Raises:
        ModelError: `extra` holds an unknown knob.
    """

    engine_version = "stub 1"
    is_concurrent = False

    def __init__(self, spec: EngineSpec) -> None:
        knobs = json.loads(spec.extra)
        if unknown := set(knobs) - _KNOBS:
            raise ModelError(
                f"extra must hold only {', '.join(sorted(_KNOBS))}, "
                f"got {', '.join(sorted(unknown))}",
                where=f"engine {spec.name}",
                fix="leave the others out",
            )
        self.spec = spec
        self._delay_s_per_token = float(knobs.get("delay_s_per_token", 0.0))
        self._nan_token: int | None = knobs.get("nan_token")
        self._kill_token: int | None = knobs.get("kill_token")
        self._kill_child_token: int | None = knobs.get("kill_child_token")
        self._resubmit_token: int | None = knobs.get("resubmit_token")
        self.num_resubmitted = 0
        self.is_concurrent = bool(knobs.get("is_concurrent", False))
        self._child: subprocess.Popen[bytes] | None = None
        if knobs.get("has_child") or self._kill_child_token is not None:
            self._child = subprocess.Popen(["sleep", "86400"], start_new_session=True)

    def score(self, groups: Sequence[ScoringGroup]) -> list[list[TokenLogprobs]]:
        """Give log-probs in (−8, 0) nats; see `LogprobEngine.score`."""
        scores = []
        for group in groups:
            seed = self._seed(group.prefix_ids)
            scores.append([self._score(seed, ids) for ids in group.completions_ids])
        return scores

    def generate(self, requests: Sequence[SamplingRequest]) -> list[list[Sample]]:
        """Give pseudo-random tokens; about half of the samples stop early."""
        return [[self._sample(request, seed) for seed in request.seeds] for request in requests]

    def close(self) -> None:
        """End the child; there is no memory to give back."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _score(self, seed: int, completion_ids: tuple[int, ...]) -> TokenLogprobs:
        if self._kill_token in completion_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_resubmitted += self._resubmit_token in completion_ids
        if self._child is not None:
            if self._kill_child_token in completion_ids:
                self._child.kill()
                self._child.wait()
            if self._child.poll() is not None:
                raise EngineDied(f"the stub's child ended with {self._child.returncode}")
        if self._delay_s_per_token:
            time.sleep(self._delay_s_per_token * len(completion_ids))
        ids = np.asarray(completion_ids, np.int64)
        # Weighing each token by its place before the running sum makes it depend on their order.
        places = np.arange(1, len(ids) + 1, dtype=np.uint64)
        words = _mix(ids.astype(np.uint64) + np.uint64(1) + (places << np.uint64(32)))
        hashes = _mix(np.cumsum(words) + np.uint64(seed))
        # 23 bits, moved off the ends: exact in float32, below 0 and above −8.
        steps = (hashes >> np.uint64(41)).astype(np.float32)
        logprobs: TokenLogprobs = -(steps + np.float32(0.5)) * np.float32(8.0 / 2**23)
        if self._nan_token is not None:
            logprobs[ids == self._nan_token] = np.nan
        return logprobs

    def _sample(self, request: SamplingRequest, seed: int) -> Sample:
        draws = np.random.default_rng([self._seed(request.prefix_ids), seed])
        num_tokens = int(draws.integers(1, 2 * request.max_new_tokens + 1))
        is_stopped = num_tokens < request.max_new_tokens
        num_tokens = min(num_tokens, request.max_new_tokens)
        ids = draws.integers(0, _MAX_TOKEN_ID + 1, num_tokens).tolist()
        token_ids = tuple(token_id for token_id in ids if token_id not in request.stop_ids)
        return Sample(token_ids, "stop" if is_stopped else "length")

    def _seed(self, prefix_ids: tuple[int, ...]) -> int:
        """Hash the engine's name and a prefix to 64 bits."""
        digest = blake2b(self.spec.name.encode(), digest_size=8)
        digest.update(b"\0" + np.asarray(prefix_ids, "<i8").tobytes())
        return int.from_bytes(digest.digest(), "little")


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words; overflow wraps, as meant (splitmix64's finaliser, shortened)."""
    words = (words ^ (words >> np.uint64(31))) * np.uint64(_MULTIPLIER)
    return words ^ (words >> np.uint64(29))
