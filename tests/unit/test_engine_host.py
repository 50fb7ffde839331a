"""The engine host with stub engines: real processes, sockets and signals, no models."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from cdr.engines import host, wire
from cdr.engines.base import EngineSpec, Sample, SamplingRequest, ScoringGroup
from cdr.engines.client import EngineClient, connect
from cdr.engines.device import Device, claim_device, make_private_folder, visible_cuda_devices
from cdr.engines.launch import HostOptions, HostPlace, host_environment, host_folder, import_path
from cdr.engines.owner import Owner
from cdr.engines.stub import StubEngine
from cdr.engines.wire import Outcome
from cdr.errors import EngineError, FailReason, SetupError

pytestmark = pytest.mark.timeout(120)

NAN, KILL = 987_650_001, 987_650_002
PLAIN = EngineSpec("plain", "stub", "")
KNOBS = EngineSpec("knobs", "stub", "", extra=json.dumps({"nan_token": NAN, "kill_token": KILL}))
KILL_CHILD = 987_650_003
PARENT = EngineSpec("parent", "stub", "", extra=json.dumps({"kill_child_token": KILL_CHILD}))
SLOW = EngineSpec("slow", "stub", "", extra='{"delay_s_per_token": 0.1}')

ME = Owner.of(os.getpid())
GROUPS = [
    ScoringGroup((1, 2, 3), ((4, 5), (6,), (7, 8, 9))),
    ScoringGroup((1, 2), ((5, 5),)),
    ScoringGroup((1, 3), ((5, 6), (6, 5, 4, 3))),
]


def options(**changes: float) -> HostOptions:
    # The test run itself is the owner, also where a JVM (an IDE, a CI agent) started it.
    return HostOptions(owner=Owner.of(os.getpid()), **changes)  # type: ignore[arg-type]


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[EngineClient]:
    with connect(Device("cpu", ("tests",)), options()) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def _leave_no_host() -> Iterator[None]:
    yield
    with EngineClient(Device("cpu", ("tests",)), options()) as client:
        client.shutdown()


def values(outcomes: list[list[Outcome[npt.NDArray[np.float32]]]]) -> list[list[Any]]:
    return [[o.error if o.value is None else o.value.tolist() for o in g] for g in outcomes]


def expected(spec: EngineSpec, groups: list[ScoringGroup]) -> list[list[list[float]]]:
    return [[logprobs.tolist() for logprobs in group] for group in StubEngine(spec).score(groups)]


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_log_probs_through_the_host_are_those_of_the_engine_in_process(
    client: EngineClient,
) -> None:
    client.set_engines([PLAIN])
    outcomes = client.score("plain", GROUPS)
    assert values(outcomes) == expected(PLAIN, GROUPS)
    assert {o.value.dtype for group in outcomes for o in group if o.value is not None} == {
        np.dtype(np.float32)
    }
    assert client.score("plain", []) == []


def test_samples_through_the_host_are_those_of_the_engine_in_process(client: EngineClient) -> None:
    requests = [
        SamplingRequest((1, 2), (10, 11, 2**40), 8, 1.0, 0.9, (3,)),
        SamplingRequest((5,), (12,), 4, 0.0, 1.0, ()),
    ]
    client.set_engines([PLAIN])
    outcomes = client.generate("plain", requests)
    assert [[o.value for o in group] for group in outcomes] == StubEngine(PLAIN).generate(requests)


def test_a_host_with_stub_engines_imports_neither_torch_nor_pandas(client: EngineClient) -> None:
    client.set_engines([PLAIN])
    client.score("plain", GROUPS)
    maps = Path(f"/proc/{client.status().pid}/maps").read_text()
    assert "numpy" in maps
    assert not [name for name in ("torch", "pandas") if name in maps]


def test_unchanged_engines_stay_loaded_and_others_are_closed(client: EngineClient) -> None:
    before = client.set_engines([PLAIN, KNOBS])
    after = client.set_engines([SLOW, PLAIN])
    assert [engine.name for engine in before.engines] == ["plain", "knobs"]
    assert [engine.name for engine in after.engines] == ["plain", "slow"]
    assert after.engines[0] == before.engines[0]  # with the seconds it took: not loaded again
    assert after.pid == before.pid


def test_an_engine_that_changed_under_its_name_is_loaded_anew(client: EngineClient) -> None:
    renamed = EngineSpec("plain", "stub", "", extra=KNOBS.extra)
    client.set_engines([PLAIN])
    client.set_engines([renamed])
    outcomes = client.score("plain", [ScoringGroup((1,), ((NAN,),))])
    assert values(outcomes) == [[FailReason.NON_FINITE_LOGPROB]]


def test_an_engine_that_was_not_declared_is_refused(client: EngineClient) -> None:
    client.set_engines([PLAIN])
    with pytest.raises(EngineError, match="knobs is not declared"):
        client.score("knobs", GROUPS)


def test_a_non_finite_log_prob_fails_its_completion_alone(client: EngineClient) -> None:
    client.set_engines([KNOBS])
    (outcomes,) = client.score("knobs", [ScoringGroup((1,), ((2,), (2, NAN, 2), (3,)))])
    assert [o.error for o in outcomes] == [None, FailReason.NON_FINITE_LOGPROB, None]
    assert outcomes[1].detail == "1 of 3 log-probs are not finite"


def test_a_completion_that_kills_the_host_twice_fails_and_all_others_are_scored(
    client: EngineClient,
) -> None:
    groups = [GROUPS[0], ScoringGroup((1, 2), ((5, 5), (5, KILL), (6,))), GROUPS[2]]
    client.set_engines([KNOBS])
    before = client.status().pid
    found = values(client.score("knobs", groups))
    harmless = [GROUPS[0], ScoringGroup((1, 2), ((5, 5), (6,))), GROUPS[2]]
    want = expected(KNOBS, harmless)
    assert found == [want[0], [want[1][0], FailReason.ENGINE_DIED_TWICE, want[1][1]], want[2]]
    assert client.status().pid != before
    assert is_gone(before)


def test_a_prefix_that_kills_with_every_completion_fails_whole_and_costs_no_other(
    client: EngineClient,
) -> None:
    poison = ScoringGroup((1, 2), tuple((KILL, i) for i in range(1, 33)))
    client.set_engines([KNOBS])
    found = values(client.score("knobs", [GROUPS[0], poison, poison, GROUPS[2]]))
    first, last = expected(KNOBS, [GROUPS[0], GROUPS[2]])
    assert found == [first, *[[FailReason.ENGINE_DIED_TWICE] * 32] * 2, last]


def test_a_lone_completion_gets_its_second_chance(client: EngineClient) -> None:
    client.set_engines([KNOBS])
    pids = {client.status().pid}
    outcomes = client.score("knobs", [ScoringGroup((1,), ((KILL,),))])
    pids.add(client.status().pid)
    assert values(outcomes) == [[FailReason.ENGINE_DIED_TWICE]]
    assert len(pids) == 2


def children(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if p.name() == "sleep"]


def test_a_completion_that_kills_an_engine_twice_fails_and_the_host_and_its_other_engine_live_on(
    client: EngineClient,
) -> None:
    """As when vLLM's core dies: the host is well, and loads that engine again."""
    before = client.set_engines([PLAIN, PARENT])
    (child,) = children(before.pid)
    bad = [GROUPS[0], ScoringGroup((1, 2), ((5, 5), (5, KILL_CHILD), (6,))), GROUPS[2]]
    harmless = [GROUPS[0], ScoringGroup((1, 2), ((5, 5), (6,))), GROUPS[2]]
    found = client.score_all({"plain": GROUPS, "parent": bad})
    assert values(found["plain"]) == expected(PLAIN, GROUPS)
    want = expected(EngineSpec("parent", "stub", ""), harmless)
    assert values(found["parent"]) == [
        want[0], [want[1][0], FailReason.ENGINE_DIED_TWICE, want[1][1]], want[2]
    ]  # fmt: skip
    after = client.status()
    assert after.pid == before.pid
    assert after.engines[0] == before.engines[0], "the engine beside it was loaded again"
    (new_child,) = children(before.pid)
    assert new_child != child


def test_an_engine_whose_process_was_killed_from_outside_is_loaded_again(
    client: EngineClient,
) -> None:
    (child,) = children(client.set_engines([PARENT]).pid)
    child.kill()
    found = client.score("parent", GROUPS)
    assert values(found) == expected(EngineSpec("parent", "stub", ""), GROUPS)


def test_an_engine_that_dies_whatever_it_is_asked_ends_the_request() -> None:
    device, limits = Device("cpu", ("tests",)), options(max_deaths_in_a_row=3)
    groups = [ScoringGroup((i,), ((KILL_CHILD,),)) for i in range(8)]
    with connect(device, limits) as client:
        client.set_engines([PARENT])
        with pytest.raises(EngineError, match="died 3 times in a row; the end of"):
            client.score("parent", groups)


def test_a_closed_engine_leaves_no_child_before_the_next_loads(client: EngineClient) -> None:
    (child,) = children(client.set_engines([PARENT]).pid)
    client.set_engines([PLAIN])
    assert is_gone(child.pid)
    log = (host_folder(Device("cpu", ("tests",)), ME) / "host.log").read_text()
    assert log.rindex("closed parent") < log.rindex("loading plain")


@pytest.mark.parametrize("end", ["shutdown", "kill", "terminate"])
def test_nothing_of_a_host_is_left_however_it_ends(end: str) -> None:
    """A host that is killed has no say; its parent sees to its children in other sessions."""
    with connect(Device("cpu", ("orphans",)), options()) as client:
        pid = client.set_engines([PARENT]).pid
        (child,) = children(pid)
        supervisor = psutil.Process(pid).ppid()
        if end == "shutdown":
            client.shutdown()
        else:
            os.kill(pid, signal.SIGKILL if end == "kill" else signal.SIGTERM)
        for process in (pid, child.pid, supervisor):
            assert wait_until(lambda process=process: is_gone(process), 5)  # type: ignore[misc]
        client.shutdown()


def beside(name: str) -> EngineSpec:
    extra = {"delay_s_per_token": 0.1, "is_concurrent": True}
    return EngineSpec(name, "stub", "", extra=json.dumps(extra))


@pytest.mark.parametrize(("second", "is_together"), [(beside("b"), True), (SLOW, False)])
def test_two_engines_of_one_request_work_at_the_same_time_if_both_can(
    client: EngineClient, second: EngineSpec, is_together: bool
) -> None:
    """Each has 15 tokens of 0.1 s to do: 1.5 s side by side, 3 s one after the other."""
    groups = [ScoringGroup((1,), ((2,) * 5,)), ScoringGroup((2,), ((2,) * 5, (3,) * 5))]
    first = beside("a")
    client.set_engines([first, second])
    begin = time.monotonic()
    found = client.score_all({"a": groups, second.name: groups})
    elapsed_s = time.monotonic() - begin
    plain = [EngineSpec(spec.name, "stub", "") for spec in (first, second)]
    assert [values(answers) for answers in found.values()] == [expected(s, groups) for s in plain]
    assert elapsed_s < 2.9 if is_together else elapsed_s >= 3.0


def test_a_completion_that_kills_the_host_is_found_among_those_of_several_engines(
    client: EngineClient,
) -> None:
    client.set_engines([PLAIN, KNOBS])
    bad = [ScoringGroup((1,), ((KILL,),)), GROUPS[1]]
    found = client.score_all({"plain": GROUPS, "knobs": bad})
    assert values(found["plain"]) == expected(PLAIN, GROUPS)
    want = expected(KNOBS, GROUPS[1:2])
    assert values(found["knobs"]) == [[FailReason.ENGINE_DIED_TWICE], want[0]]


def test_a_host_over_two_gpus_ends_before_one_on_either_of_them_starts() -> None:
    """As between a router of several GPUs and the scoring models: its memory is needed."""
    pair, single, other = (Device("cuda", ids) for ids in (("0", "1"), ("1",), ("2",)))
    with connect(pair, options()) as router, connect(other, options()) as bystander:
        pid, bystander_pid = router.set_engines([PARENT]).pid, bystander.status().pid
        (child,) = children(pid)
        with connect(single, options()) as scorer:
            assert is_gone(pid)
            assert wait_until(lambda: is_gone(child.pid), 5)
            assert scorer.status().pid != pid
            scorer.shutdown()
        assert bystander.status().pid == bystander_pid
        bystander.shutdown()


def test_a_host_that_dies_whatever_it_is_asked_ends_the_request() -> None:
    device, limits = Device("cpu", ("tests",)), options(max_deaths_in_a_row=3)
    groups = [ScoringGroup((i,), ((KILL,),)) for i in range(8)]
    with connect(device, limits) as client:
        client.set_engines([KNOBS])
        with pytest.raises(EngineError, match="died 3 times in a row; the end of"):
            client.score("knobs", groups)


def test_rows_that_wait_while_another_clients_rows_kill_the_host_are_not_blamed(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both requests are in flight when the host dies; only the one that ran may be cut up."""
    innocent = [ScoringGroup((9,), ((1,), (2,)))] * 2
    long = [ScoringGroup((1,), ((1,) * 15,))]  # 1.5 s
    sizes: list[int] = []
    is_ready, is_running, is_sent = threading.Event(), threading.Event(), threading.Event()

    send, receive = wire.send, wire.receive

    def count(
        connection: socket.socket, head: wire.Head, payload: wire.Payload | None = None
    ) -> None:
        send(connection, head, payload)
        if payload:
            sizes.append(payload[1].num_rows)
            if sizes[-1] == len(innocent):
                is_sent.set()

    def notice(stream: BinaryIO) -> wire.Payload:
        payload = receive(stream)
        if payload[0].get("running") and sizes:  # and not for the sets of engines before
            is_running.set()
        return payload

    def score_innocent() -> list[list[Any]]:
        with connect(Device("cpu", ("tests",)), options()) as waiting:
            waiting.set_engines([SLOW])
            is_ready.set()
            is_running.wait()
            return values(waiting.score("slow", innocent))

    def kill(pid: int) -> None:
        is_sent.wait()
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(wire, "send", count)
    monkeypatch.setattr(wire, "receive", notice)
    pid = client.set_engines([SLOW]).pid
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(score_innocent)
        pool.submit(kill, pid)
        is_ready.wait()
        assert values(client.score("slow", long)) == expected(SLOW, long)
    assert found.result() == expected(SLOW, innocent)
    # Both were sent twice; the innocent one again as a whole, not row by row.
    assert sorted(sizes) == [1, 1, 2, 2]


def test_a_model_that_cannot_load_is_named_with_the_end_of_the_log(client: EngineClient) -> None:
    before = client.set_engines([PLAIN]).pid
    bad = EngineSpec("no-such-knob", "stub", "models/bad", extra='{"speed": 1}')
    with pytest.raises(EngineError, match=r"cannot load model no-such-knob from models/bad") as e:
        client.set_engines([PLAIN, bad])
    _, where, fix, *tail = str(e.value).splitlines()
    assert where.startswith("  where: engine no-such-knob")
    assert fix.startswith("  fix: leave the others out; the end of ")
    # An error that says what to do has no traceback to hide what the engine itself wrote.
    assert "cannot load no-such-knob: extra must hold only" in tail[-1]
    assert "Traceback" not in str(e.value)
    with pytest.raises(EngineError, match=r"JSONDecodeError(.|\n)*Traceback"):
        client.set_engines([PLAIN, EngineSpec("no-json", "stub", "", extra="{")])
    assert client.status().pid == before
    client.set_engines([PLAIN])
    assert values(client.score("plain", GROUPS)) == expected(PLAIN, GROUPS)


def test_a_host_that_dies_while_it_loads_is_not_started_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host gets the import path of its client, so it finds this torch before the real one."""
    (tmp_path / "torch.py").write_text(
        f"import os\nopen({str(tmp_path / 'loads')!r}, 'a').write('x')\nos.kill(os.getpid(), 9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("config.json", "model.safetensors"):  # what a host looks for before it loads
        (tmp_path / name).touch()
    fatal = EngineSpec("fatal", "transformers", str(tmp_path))
    with connect(Device("cpu", ("fatal",)), options()) as client:
        with pytest.raises(EngineError, match="died while it loaded fatal; the end of"):
            client.set_engines([fatal])
        assert (tmp_path / "loads").read_text() == "x"
        folder = host_folder(Device("cpu", ("fatal",)), Owner.of(os.getpid()))
        assert folder.exists()  # for the log
        client.shutdown()
        assert not folder.exists()


def test_clients_that_come_at_once_share_one_host() -> None:
    def pid(_: int) -> int:
        with connect(Device("cpu", ("crowd",)), options()) as client:
            return client.status().pid

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(pid, range(6)))) == 1
    with EngineClient(Device("cpu", ("crowd",)), options()) as client:
        client.shutdown()


def test_two_clients_with_different_sets_take_turns_and_both_are_right() -> None:
    def score(spec: EngineSpec) -> list[list[list[Any]]]:
        with connect(Device("cpu", ("tests",)), options()) as client:
            client.set_engines([spec])
            return [values(client.score(spec.name, GROUPS)) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        plain, knobs = pool.map(score, (PLAIN, KNOBS))
    assert plain == [expected(PLAIN, GROUPS)] * 10
    assert knobs == [expected(KNOBS, GROUPS)] * 10


def test_a_client_that_leaves_in_the_middle_costs_nothing(client: EngineClient) -> None:
    client.set_engines([SLOW])
    pid = client.status().pid
    head = {"op": "score", "asked": [["slow", 1]], "engines": [asdict(SLOW)]}
    groups = wire.encode_groups([ScoringGroup((1,), ((2,) * 5,))])  # 0.5 s
    with HostPlace(Device("cpu", ("tests",)), options()).open() as leaving:
        for _ in range(2):  # one runs, one waits
            wire.send(leaving, head, groups)
    assert values(client.score("slow", GROUPS[1:2])) == expected(SLOW, GROUPS[1:2])
    assert client.status().pid == pid


def test_the_log_holds_no_token_ids(client: EngineClient) -> None:
    client.set_engines([KNOBS])
    client.score("knobs", [ScoringGroup((1,), ((KILL,), (NAN,)))])
    log = host_folder(Device("cpu", ("tests",)), Owner.of(os.getpid())) / "host.log"
    text = log.read_text()
    assert "loaded knobs" in text
    assert str(KILL) not in text
    assert str(NAN) not in text


def test_an_idle_host_ends_with_its_folder_and_the_next_request_starts_another() -> None:
    device, short = Device("cpu", ("idle",)), options(idle_timeout_s=0.5)
    with connect(device, short) as client:
        client.set_engines([PLAIN])
        pid = client.status().pid
        folder = host_folder(device, Owner.of(os.getpid()))
        assert folder.stat().st_mode & 0o777 == 0o700
        assert wait_until(lambda: is_gone(pid), 5)
        assert not folder.exists()
        assert values(client.score("plain", GROUPS)) == expected(PLAIN, GROUPS)
        client.shutdown()
    assert not folder.exists()


OWNER = """
import os, resource, sys, time
from cdr.engines.base import EngineSpec
from cdr.engines.client import connect
from cdr.engines.device import Device
from cdr.engines.launch import HostOptions, host_folder
from cdr.engines.owner import Owner
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (32 << 30, hard))
os.environ["OMP_NUM_THREADS"] = "1"
owner = Owner.of(os.getpid())
client = connect(Device("cpu"), HostOptions(owner=owner, num_threads=3))
status = client.set_engines([EngineSpec("plain", "stub", "")])
print(status.pid, host_folder(Device("cpu"), owner), flush=True)
time.sleep(600)
"""


def test_a_host_has_its_own_environment_and_ends_when_its_owner_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pid_text, folder = process.stdout.readline().split()
        pid = int(pid_text)
        environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert {"OMP_NUM_THREADS=3", "MKL_NUM_THREADS=3", "CUDA_VISIBLE_DEVICES="} <= set(environ)
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (address_space,) = [line.split() for line in limits if line.startswith("Max address space")]
        assert address_space[3] == address_space[4]
        assert os.getsid(pid) != os.getsid(0)
    finally:
        process.kill()
    # The owner is a zombie until this test reaps it, as a JVM may be under a careless parent.
    assert wait_until(lambda: is_gone(pid), 3)
    assert not Path(folder).exists()
    process.communicate()


def test_the_end_of_a_host_ends_its_children_in_other_sessions_too() -> None:
    script = (
        "import subprocess; from cdr.engines.host import kill_session\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "kill_session()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert wait_until(lambda: is_gone(int(out)), 3)


SHARING = """
import sys, time
from multiprocessing.shared_memory import SharedMemory
from cdr.engines.host import kill_session
block = SharedMemory(create=True, size=8)
print(block.name, flush=True)
kill_session() if sys.argv[1] == "itself" else time.sleep(60)
"""
SUPERVISOR = """
import subprocess, sys
from cdr.engines.supervisor import become_subreaper, kill_descendants
become_subreaper()
host = subprocess.Popen([sys.executable, "-c", sys.argv[1], ""], stdout=subprocess.PIPE, text=True)
print(host.stdout.readline(), end="", flush=True)
kill_descendants()
"""


@pytest.mark.parametrize("arguments", [(SHARING, "itself"), (SUPERVISOR, SHARING)])
def test_shared_memory_of_killed_processes_is_removed(arguments: tuple[str, str]) -> None:
    """By multiprocessing's tracker, which must not be killed with them."""
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=30,
    )
    name = done.stdout.strip()
    assert name.startswith("psm_")
    assert wait_until(lambda: not Path("/dev/shm", name).exists(), 5)


def test_an_owner_is_told_from_a_later_process_with_its_pid() -> None:
    me = Owner.of(os.getpid())
    assert me.is_alive()
    assert not Owner(me.pid, me.start + 1).is_alive()


def fail_on(bad: int, asked: list[int]) -> Callable[..., list[list[Outcome[Sample]]]]:
    def ask(groups: list[ScoringGroup]) -> list[list[Outcome[Sample]]]:
        asked.append(sum(len(group.completions_ids) for group in groups))
        if any(bad in ids for group in groups for ids in group.completions_ids):
            raise IndexError(f"id {bad} is out of range")
        return [[Outcome(Sample(ids, "stop")) for ids in g.completions_ids] for g in groups]

    return ask


def test_an_engine_exception_is_halved_down_to_the_completion_that_raises_it() -> None:
    asked: list[int] = []
    groups = [
        ScoringGroup((g,), tuple((10 * g + i,) for i in range(4))) for g in range(4)
    ]  # the bad completion is item 1 of group 2
    found = host.answer(fail_on(21, asked), groups)
    flat = [outcome for group in found for outcome in group]
    assert [len(group) for group in found] == [4, 4, 4, 4]
    assert [i for i, outcome in enumerate(flat) if outcome.error] == [9]
    assert [o.value.token_ids for o in flat if o.value] == [
        (10 * g + i,) for g in range(4) for i in range(4) if (g, i) != (2, 1)
    ]
    assert flat[9].error is FailReason.ENGINE_ERROR
    assert flat[9].detail is not None
    assert flat[9].detail.startswith("IndexError at test_engine_host.py:")
    assert "21" not in flat[9].detail.partition(":")[0]
    # 16, then halves: 8 ok, 8; of those 4, 4 ok; 2, 2 ok; 1 ok, 1.
    assert sorted(asked, reverse=True) == [16, 8, 8, 4, 4, 2, 2, 1, 1]


def test_a_log_prob_too_few_is_an_engine_error() -> None:
    class Short(StubEngine):
        def score(self, groups: object) -> list[list[np.ndarray]]:
            return [[np.zeros(1, np.float32), np.zeros(1, np.float32)]]

    outcomes = host.score(Short(PLAIN), [ScoringGroup((1,), ((2,), (3,)))])
    assert [o.error for o in outcomes[0]] == [None, None]
    with pytest.raises(ValueError, match="2 tokens, but 1 log-probs"):
        host.score(Short(PLAIN), [ScoringGroup((1,), ((2,), (3, 4)))])


def test_a_hosts_environment_is_the_workers_but_for_threads_devices_and_imports() -> None:
    worker = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/spark", "LANG": "C"}
    env = host_environment(Device("cuda", ("1", "3")), 16, worker, ["", "/code.zip", "/site"])
    assert env["LANG"] == "C"
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "16"
    assert env["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert env["PYTHONPATH"] == f"{os.getcwd()}:/code.zip:/site"
    assert host_environment(Device("cpu"), 1, {"CUDA_VISIBLE_DEVICES": "0"}, [])[
        "CUDA_VISIBLE_DEVICES"
    ] == ("")


def test_a_host_runs_the_code_that_asks_it_whatever_a_loaded_model_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(Path(host.__file__).resolve().parents[2])
    (tmp_path / "model" / "cdr" / "engines").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["/first", str(tmp_path / "model"), "/last"])
    assert import_path() == ["/first", own, str(tmp_path / "model"), "/last"]


def test_hosts_of_other_devices_and_owners_live_elsewhere_on_short_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    places = {
        host_folder(device, owner)
        for device in (Device("cpu"), Device("cuda", ("0",)), Device("cuda", ("0", "1")))
        for owner in (Owner(1, 1), Owner(1, 2), Owner(2, 1))
    }
    assert len(places) == 9
    longest = str(uuid.uuid4())  # vLLM names its sockets so
    assert all(len(os.fsencode(place / longest)) < 104 for place in places)


def test_a_folder_that_others_can_enter_or_redirect_is_refused(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "mine")
    make_private_folder(tmp_path / "mine")  # again is fine
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link"):
        with pytest.raises(SetupError, match="mode 0700"):
            make_private_folder(tmp_path / name)


def test_sparks_addresses_are_one_device_whatever_their_order(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    with claim_device(["3", "1", "3"], ["0", "1", "2", "3"], ME, lock_folder=locks) as device:
        assert device == Device("cuda", ("1", "3"))
    with claim_device([], [], ME, lock_folder=locks) as device:
        assert device == Device("cpu")
    with claim_device(["3"], ["3"], ME, choice="cpu", lock_folder=locks) as device:
        assert device == Device("cpu")
    with claim_device(["3"], [], ME, choice="gpu", lock_folder=locks) as device:
        assert device == Device("cuda", ("3",))
    assert not locks.exists()  # none needs a lock


def test_a_task_that_was_to_have_a_gpu_is_refused_without_one_by_the_settings_to_change() -> None:
    with pytest.raises(SetupError) as refused, claim_device([], [], ME, choice="gpu"):
        pass
    assert socket.gethostname() in str(refused.value)
    for name in ("executor.resource.gpu.amount", "conf/cluster/gpu-discovery.sh", "run.device"):
        assert name in str(refused.value.fix)


def test_more_gpus_than_a_task_has_are_refused_by_the_setting_to_change(tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match=r"spark\.task\.resource\.gpu\.amount=4"),
        claim_device(["0", "1"], [], ME, num_gpus=4),
    ):
        pass
    with (
        pytest.raises(SetupError, match="this machine has 2: 0, 1"),
        claim_device([], ["0", "1"], ME, num_gpus=4, lock_folder=tmp_path / "locks"),
    ):
        pass
    with claim_device(["0", "1", "2", "3"], [], ME, num_gpus=4) as device:
        assert device.ids == ("0", "1", "2", "3")


def test_tasks_without_addresses_claim_a_device_each_and_the_third_waits_for_one_of_two(
    tmp_path: Path,
) -> None:
    visible, locks = ("0", "GPU-2f/1"), tmp_path / "locks"
    third: list[Device] = []

    def claim_third() -> None:
        with claim_device([], visible, ME, lock_folder=locks) as device:
            third.append(device)

    task = threading.Thread(target=claim_third)
    with claim_device([], visible, ME, lock_folder=locks) as first:
        with claim_device([], visible, ME, lock_folder=locks) as second:
            assert {first.ids, second.ids} == {("0",), ("GPU-2f/1",)}
            task.start()
            time.sleep(0.5)
            assert third == []
        task.join(timeout=5)
        assert third == [second]


def test_a_task_of_several_gpus_claims_all_of_them_or_none(tmp_path: Path) -> None:
    visible, locks = ("0", "1", "2"), tmp_path / "locks"
    with claim_device([], visible, ME, num_gpus=2, lock_folder=locks) as pair:
        assert pair.ids == ("0", "1")
        with claim_device([], visible, ME, lock_folder=locks) as single:
            assert single.ids == ("2",)


def test_a_device_belongs_to_the_executor_that_took_it_first_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models stay there between tasks, so a second executor's would not fit beside them."""
    monkeypatch.setattr("cdr.engines.device._FOREIGN_GRACE_S", 0.2)
    locks = tmp_path / "locks"
    with subprocess.Popen(["sleep", "60"]) as executor:
        theirs = Owner.of(executor.pid)
        with claim_device([], ["0", "1"], theirs, lock_folder=locks) as device:
            assert device.ids == ("0",)
        with claim_device([], ["0", "1"], ME, lock_folder=locks) as device:
            assert device.ids == ("1",), "the first one still holds their models"
        with claim_device([], ["0", "1"], theirs, lock_folder=locks) as device:
            assert device.ids == ("0",)
        with (
            pytest.raises(SetupError, match=r"spark\.executor\.resource\.gpu\.amount"),
            claim_device([], ["0"], ME, lock_folder=locks),
        ):
            pass
        executor.kill()
        executor.wait()
        with claim_device([], ["0"], ME, lock_folder=locks) as device:
            assert device.ids == ("0",)


def test_devices_are_counted_without_asking_torch(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_cuda_devices({}, tmp_path) == ("0", "2", "10")
    assert visible_cuda_devices({"CUDA_VISIBLE_DEVICES": "2, GPU-ab"}, tmp_path) == ("2", "GPU-ab")
    assert visible_cuda_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ()
    assert visible_cuda_devices({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == ()
