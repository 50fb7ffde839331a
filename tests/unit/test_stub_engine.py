"""The stub engine: numbers that depend on exactly what a model's would depend on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr.engines.base import EngineSpec, SamplingRequest, ScoringGroup, make_engine
from cdr.errors import ModelError

IDS = st.lists(st.integers(0, 50_000), min_size=1, max_size=30).map(tuple)


def make_stub(name: str = "strong", **knobs: Any) -> Any:
    return make_engine(EngineSpec(name, "stub", "none", extra=json.dumps(knobs)))


def score_one(engine: Any, prefix: tuple[int, ...], completion: tuple[int, ...]) -> Any:
    return engine.score([ScoringGroup(prefix, (completion,))])[0][0]


@given(prefix=IDS, completion=IDS)
def test_log_probs_are_finite_negative_and_reproducible(
    prefix: tuple[int, ...], completion: tuple[int, ...]
) -> None:
    logprobs = score_one(make_stub(), prefix, completion)
    assert logprobs.dtype == np.float32
    assert logprobs.shape == (len(completion),)
    assert ((logprobs < 0) & (logprobs > -8)).all()
    np.testing.assert_array_equal(logprobs, score_one(make_stub(), prefix, completion))


@given(prefix=IDS, completion=IDS, more=IDS)
def test_a_token_depends_on_what_precedes_it_and_not_on_what_follows(
    prefix: tuple[int, ...], completion: tuple[int, ...], more: tuple[int, ...]
) -> None:
    engine = make_stub()
    longer = score_one(engine, prefix, completion + more)
    np.testing.assert_array_equal(longer[: len(completion)], score_one(engine, prefix, completion))


def test_name_prefix_and_token_order_all_matter() -> None:
    base = score_one(make_stub(), (1, 2), (3, 4, 5))
    assert (score_one(make_stub("weak"), (1, 2), (3, 4, 5)) != base).all()
    assert (score_one(make_stub(), (2, 1), (3, 4, 5)) != base).all()
    swapped = score_one(make_stub(), (1, 2), (4, 3, 5))
    assert (swapped != base).all()


def test_log_probs_spread_evenly_over_minus_eight_to_zero() -> None:
    logprobs = score_one(make_stub(), (1,), tuple(range(20_000)))
    counts, _ = np.histogram(logprobs, bins=8, range=(-8, 0))
    assert abs(counts - 2500).max() < 250  # 5 standard deviations, √(20000 · 1/8 · 7/8) = 47


def test_the_nan_token_gives_nan_in_its_place_only() -> None:
    logprobs = score_one(make_stub(nan_token=7), (7,), (1, 7, 2))
    assert np.isnan(logprobs).tolist() == [False, True, False]


def test_the_delay_is_paid_per_completion_token() -> None:
    start = time.perf_counter()
    score_one(make_stub(delay_s_per_token=0.02), (1,) * 100, (1, 2, 3))
    assert time.perf_counter() - start >= 0.06


def test_the_kill_token_kills_the_process() -> None:
    script = (
        "from cdr.engines.base import *\n"
        "engine = make_engine(EngineSpec('m', 'stub', '', extra='{\"kill_token\": 9}'))\n"
        "engine.score([ScoringGroup((9,), ((1,),))]); print('alive', flush=True)\n"
        "engine.score([ScoringGroup((1,), ((9,),))]); print('still alive', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-9, "alive\n")


def test_an_unknown_knob_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="delay_s_per_tokne"):
        make_stub(delay_s_per_tokne=1)


def test_samples_depend_on_prefix_and_seed_and_keep_their_limits() -> None:
    request = SamplingRequest((1, 2), tuple(range(50)), 8, 1.0, 1.0, (3,))
    samples = make_stub().generate([request])[0]
    assert samples == make_stub().generate([request])[0]
    assert len({sample.token_ids for sample in samples}) > 40
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert all(len(sample.token_ids) <= 8 and 3 not in sample.token_ids for sample in samples)
