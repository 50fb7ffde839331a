"""Progress from counts: what the lines say, how fast and how long; what a running task leaves."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from cdr.engines.base import EngineSpec
from cdr.job_run import name_engines
from cdr.progress import Counts, EngineLoad, Progress, TaskCount, is_one_machine


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Source:
    def __init__(self) -> None:
        self.counts = Counts()
        self.loads: frozenset[EngineLoad] = frozenset()

    def read(self) -> Counts:
        return self.counts

    def engine_loads(self) -> frozenset[EngineLoad]:
        return self.loads


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_progress(
    source: Source, clock: Clock, stream: io.StringIO, total_tokens: int = 40_000
) -> Progress:
    total = Counts(prompts=1000, tokens=total_tokens)
    names = {"0f": "strong, router (a-model + adapter)"}
    return Progress(total, source, label="strong", names=names, stream=stream, clock=clock)


def test_a_line_says_how_far_how_fast_and_how_long() -> None:
    source, clock, stream = Source(), Clock(), io.StringIO()
    progress = make_progress(source, clock, stream)
    clock.now_s += 20
    source.counts = Counts(250, 10_000)
    progress.refresh()
    # 10,000 tokens in 20 s: 500 a second, 30,000 left take 60 s.
    assert stream.getvalue() == (
        "strong: 10.0 k of 40.0 k tokens, 250 of 1,000 prompts, 500 tokens/s, 12 prompts/s, "
        "1 min left, 20 s so far\n"
    )


def test_nothing_done_yet_promises_no_time() -> None:
    source, clock, stream = Source(), Clock(), io.StringIO()
    progress = make_progress(source, clock, stream)
    clock.now_s += 30
    progress.refresh()
    assert stream.getvalue() == ("strong: 0 of 40.0 k tokens, 0 of 1,000 prompts, 30 s so far\n")


def test_where_tokens_cannot_be_known_before_prompts_say_how_long() -> None:
    source, clock, stream = Source(), Clock(), io.StringIO()
    progress = make_progress(source, clock, stream, total_tokens=0)
    clock.now_s += 20
    source.counts = Counts(0, 4_000)  # of a prompt that is not through
    progress.refresh()
    clock.now_s += 20
    source.counts = Counts(250, 10_000)
    progress.refresh()
    source.counts = Counts(1000, 35_000)
    progress.refresh()
    assert stream.getvalue().splitlines() == [
        "strong: 4,000 tokens, 0 of 1,000 prompts, 200 tokens/s, 0 prompts/s, 20 s so far",
        "strong: 10.0 k tokens, 250 of 1,000 prompts, 250 tokens/s, 6.2 prompts/s, 2 min left, "
        "40 s so far",
        "strong: 35.0 k tokens, 1,000 of 1,000 prompts, 875 tokens/s, 25 prompts/s, done, "
        "40 s so far",
    ]


def test_the_rate_forgets_what_is_older_than_five_minutes() -> None:
    source, clock, stream = Source(), Clock(), io.StringIO()
    progress = make_progress(source, clock, stream, total_tokens=4_000_000)
    for _ in range(40):  # 400 s at 1,000 tokens a second
        clock.now_s += 10
        source.counts = source.counts.plus(Counts(1, 10_000))
        progress.refresh()
    for _ in range(40):  # then at 100
        clock.now_s += 10
        source.counts = source.counts.plus(Counts(1, 1_000))
        progress.refresh()
    assert ", 100 tokens/s, 0.1 prompts/s, " in stream.getvalue().splitlines()[-1]


def test_counts_never_go_back() -> None:
    source, clock, stream = Source(), Clock(), io.StringIO()
    progress = make_progress(source, clock, stream)
    for counts in (Counts(10, 500), Counts(4, 200)):
        source.counts = counts
        progress.refresh()
    assert "500 of 40.0 k tokens, 10 of 1,000 prompts" in stream.getvalue().splitlines()[-1]


def test_the_block_ends_with_the_final_count_also_after_an_error() -> None:
    source, stream = Source(), io.StringIO()

    def failing_action() -> None:
        source.counts = Counts(1000, 40_000)
        raise RuntimeError("task failed")

    progress = make_progress(source, Clock(), stream)
    with pytest.raises(RuntimeError, match="task failed"), progress:
        failing_action()
    assert stream.getvalue().splitlines()[-1].startswith("strong: 40.0 k of 40.0 k tokens")


@pytest.mark.parametrize("done", [40_000, 40_500])
def test_a_terminal_gets_a_bar_that_stops_at_100_percent(done: int) -> None:
    source, stream = Source(), Terminal()
    with make_progress(source, Clock(), stream):
        source.counts = Counts(1000, done)
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("strong 100%|")
    assert "1,000 of 1,000 prompts" in last


def test_a_running_task_leaves_its_count_once_a_second_and_takes_it_away(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "3-0"
    count = TaskCount(file, clock)
    count.add(prompts=1, tokens=100)
    assert file.read_text() == "1 100"
    clock.now_s += 0.5
    count.add(prompts=1, tokens=100)
    assert file.read_text() == "1 100"
    clock.now_s += 0.5
    count.add(prompts=1, tokens=100)
    assert file.read_text() == "3 300"
    count.clear()
    assert list(tmp_path.iterdir()) == []
    assert count.counts == Counts(3, 300)


def test_a_task_on_a_cluster_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    count = TaskCount(None)
    count.add(prompts=2, tokens=7)
    count.clear()
    assert count.counts == Counts(2, 7)
    assert list(tmp_path.iterdir()) == []


def test_each_load_of_an_engine_is_told_once() -> None:
    source, clock, stream = Source(), Clock(), io.StringIO()
    progress = make_progress(source, clock, stream)
    source.loads = frozenset({EngineLoad("node1", "cuda:0", 12, "0f", 31.24)})
    progress.refresh()
    source.loads |= {EngineLoad("node2", "cuda:1", 13, "1e", 30.0)}
    progress.refresh()
    assert [line for line in stream.getvalue().splitlines() if line.startswith("loaded")] == [
        "loaded strong, router (a-model + adapter) in 31.2 s on node1 cuda:0 (engine host 12)",
        "loaded 1e in 30.0 s on node2 cuda:1 (engine host 13)",
    ]


def test_an_engine_is_named_by_its_roles_and_the_last_part_of_its_path() -> None:
    weak = EngineSpec("0f", "vllm", "warehouse/demo/smollm2-135m/")
    strong = replace(weak, name="1e", adapter_path="conf/models/dpo")
    hub = EngineSpec("2d", "vllm", "mistralai/Mixtral-8x7B-v0.1", revision="4" * 40)
    assert name_engines({"strong": strong, "weak": weak, "router": strong, "judge": hub}) == {
        "1e": "strong, router (smollm2-135m + adapter)",
        "0f": "weak (smollm2-135m)",
        "2d": "judge (Mixtral-8x7B-v0.1)",
    }


@pytest.mark.parametrize(
    ("master", "is_one"),
    [("local", True), ("local[2,3]", True), ("local-cluster[2,2,1024]", False), ("yarn", False)],
)
def test_one_machine_is_told_from_a_cluster(master: str, is_one: bool) -> None:
    assert is_one_machine(master) is is_one
