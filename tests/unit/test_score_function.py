"""The scoring function of a task: a request has work for all models, and rows come back."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cdr.config import RunSpec
from cdr.engines.base import EngineSpec, ScoringGroup
from cdr.engines.client import EngineClient, connect
from cdr.engines.device import Device
from cdr.engines.stub import StubEngine
from cdr.errors import SetupError
from cdr.progress import Counts, EngineLoad, EngineWork
from udfs.score import make_score

RESUBMITS = '{"resubmit_token": 1}'
SPECS = tuple(EngineSpec(name, "stub", "", extra=RESUBMITS) for name in ("strong", "weak"))


class Counter:
    """What a `TaskCounter` does outside of Spark."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.loads: set[EngineLoad] = set()
        self.work = EngineWork(0, {})

    @contextlib.contextmanager
    def task(self) -> Iterator[Any]:
        yield SimpleNamespace(add=self.add)

    def add(self, prompts: int, tokens: int) -> None:
        self.counts = self.counts.plus(Counts(prompts, tokens))

    def add_loads(self, loads: Any) -> None:
        self.loads |= set(loads)

    def add_work(self, work: EngineWork) -> None:
        self.work = self.work.plus(work)


def make_frame(prompts: int) -> pd.DataFrame:
    """A row per prompt and model, as `cdr.scoring.score_wave` sorts them: 100 + 20 tokens each."""
    return pd.DataFrame(
        [
            {
                "model_key": spec.name,
                "prefix_hash": bytes([i]),
                "prefix_ids": np.full(100, i),
                "completion_hashes": [bytes([i, j]) for j in range(2)],
                "completions_ids": [np.full(10, j) for j in range(2)],
            }
            for i in range(prompts)
            for spec in SPECS
        ]
    )


@pytest.fixture
def counter() -> Iterator[Counter]:
    yield Counter()
    with connect(Device("cpu")) as client:
        client.shutdown()


def test_every_request_asks_both_models_and_all_rows_come_back_right(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, int]] = []
    score_all = EngineClient.score_all

    def record(client: EngineClient, groups: Any) -> Any:
        asked.append({key: len(of_one) for key, of_one in groups.items()})
        return score_all(client, groups)

    monkeypatch.setattr(EngineClient, "score_all", record)
    monkeypatch.setattr("cdr.engines.access.visible_cuda_devices", lambda: ())
    # 256 tokens are two prompts of 120 for each model; 5 prompts make 2 + 2 + 1.
    function = make_score(SPECS, RunSpec(request_tokens=256), counter, "strong")  # type: ignore[arg-type]
    rows = pd.concat(list(function(iter([make_frame(5)]))))
    assert asked == [{"strong": 2, "weak": 2}] * 2 + [{"strong": 1, "weak": 1}]
    found = {
        (row.model_key, row.completion_hash): row.logprob_sum
        for row in rows.itertuples()
        if row.error is None
    }
    want = {
        (spec.name, bytes([i, j])): float(scores[j].sum(dtype=np.float64))
        for spec in SPECS
        for i in range(5)
        for scores in StubEngine(spec).score([ScoringGroup((i,) * 100, ((0,) * 10, (1,) * 10))])
        for j in range(2)
    }
    assert found == want
    assert counter.counts == Counts(prompts=5, tokens=2 * 5 * 120)


def test_the_driver_learns_what_was_loaded_where(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdr.engines.access.visible_cuda_devices", lambda: ())
    function = make_score(SPECS, RunSpec(), counter, "strong")  # type: ignore[arg-type]
    assert sum(map(len, function(iter([make_frame(1)])))) == 4
    assert {(load.device, load.engine) for load in counter.loads} == {
        ("cpu", "strong"),
        ("cpu", "weak"),
    }
    assert len({load.host_pid for load in counter.loads}) == 1
    # One of two completions of each model; a later task on the same host adds its own only.
    first = counter.work
    assert first.resubmitted == 2
    ((host, busy_s),) = first.busy_s.items()
    assert host == f"{socket.gethostname()} {next(load.host_pid for load in counter.loads)}"
    assert sum(map(len, function(iter([make_frame(3)])))) == 12
    assert counter.work.resubmitted == 2 + 6
    assert counter.work.busy_s[host] > busy_s > 0


def test_a_cluster_without_gpus_is_refused_and_a_cpu_that_is_meant_is_taken(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdr.engines.access.visible_cuda_devices", lambda: ())
    function = make_score(SPECS, RunSpec(device="gpu"), counter, "strong")  # type: ignore[arg-type]
    with pytest.raises(SetupError, match="no GPU for the models"):
        next(function(iter([make_frame(1)])))
    monkeypatch.setattr("cdr.engines.access.visible_cuda_devices", lambda: ("0",))
    function = make_score(SPECS, RunSpec(device="cpu"), counter, "strong")  # type: ignore[arg-type]
    assert sum(map(len, function(iter([make_frame(1)])))) == 4
    assert {load.device for load in counter.loads} == {"cpu"}
