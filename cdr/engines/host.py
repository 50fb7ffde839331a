"""The engine host: one process per executor and device that holds the loaded models.

    python -m cdr.engines.host --folder FOLDER --owner-pid PID --owner-start START ...

`cdr.engines.client` starts it and talks to it; nobody else should. Models live here and not in
Spark's Python workers because a worker is reaped when idle and changes its GPU from task to task.

Requests are served one after the other, in the order of their arrival, and each carries the whole
set of engines it needs: two stages that want different sets take turns and cannot pull an engine
away from under each other. One request may ask several engines; those whose compute runs in child
processes then work at the same time. The log never holds token ids or text.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cdr.engines import wire
from cdr.engines.base import (
    EngineSpec,
    LogprobEngine,
    Sample,
    SamplingRequest,
    ScoringGroup,
    TokenLogprobs,
    make_engine,
)
from cdr.engines.launch import SOCKET
from cdr.engines.owner import Owner
from cdr.engines.processes import end_processes, find_engine_processes, kill_processes
from cdr.engines.supervisor import become_subreaper
from cdr.engines.wire import Group, Head, Outcome, Payload, Value
from cdr.errors import CdrError, EngineDied, FailReason
from cdr.weights import make_local

_WATCH_S = 1.0

_log = logging.getLogger("cdr.engines.host")


class _Loaded(NamedTuple):
    """An engine, how clients declare it (its own spec has this node's folders), its load time."""

    declared: EngineSpec
    engine: LogprobEngine
    load_s: float


class EngineHost:
    """Serves the engines of one device on a Unix socket, until nobody needs it any more.

    Args:
        folder: private folder of this host; removed at the end.
        owner: process whose end ends the host.
        idle_timeout_s: seconds without a request after which it ends.
        num_threads: CPU threads for each engine.
    """

    def __init__(
        self, folder: Path, owner: Owner, *, idle_timeout_s: float, num_threads: int
    ) -> None:
        self._folder, self._owner = folder, owner
        self._idle_timeout_s, self._num_threads = idle_timeout_s, num_threads
        self._loaded: dict[str, _Loaded] = {}
        # One worker: turns are first come, first served. Loading and all engines but concurrent
        # ones that are asked together see this single thread.
        self._turns = ThreadPoolExecutor(1, "turn")
        self._beside = ThreadPoolExecutor(thread_name_prefix="engine")
        self._activity = threading.Lock()
        self._open_requests = 0
        self._last_request = time.monotonic()

    def serve(self, on_ready: Callable[[], None]) -> NoReturn:
        """Serve until the end of the process.

        Args:
            on_ready: called once clients can connect.
        """
        address = self._folder / SOCKET
        address.unlink(missing_ok=True)  # of a host that was killed
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(128)
            threading.Thread(target=self._watch, daemon=True).start()
            on_ready()
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _watch(self) -> NoReturn:
        """End the host when its owner is gone or nobody has asked it for long."""
        while True:
            time.sleep(_WATCH_S)
            if not self._owner.is_alive():
                self.end("its owner is gone")
            with self._activity:  # held to the end: no request may begin in a host that is ending
                idle_s = time.monotonic() - self._last_request
                if not self._open_requests and idle_s > self._idle_timeout_s:
                    self.end(f"idle for {idle_s:.0f} s")

    def end(self, reason: str) -> NoReturn:
        """Remove the folder and end this process with all its descendants."""
        _log.info("ending: %s", reason)
        # Renamed first, so that a client can start the next host in this place at once.
        grave = self._folder.with_name(f"{self._folder.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
        kill_session()

    def _converse(self, connection: socket.socket) -> None:
        """Serve one client until it leaves."""
        with connection, connection.makefile("rb") as stream, contextlib.suppress(ConnectionError):
            while True:
                payload = wire.receive(stream)
                if payload[0]["op"] == "status":  # answered at once, also while models load
                    wire.send(connection, self._status())
                    continue
                with self._activity:
                    self._open_requests += 1
                try:
                    turn = self._turns.submit(self._take_turn, connection, payload)
                    wire.send(connection, *turn.result())
                finally:
                    with self._activity:
                        self._open_requests -= 1
                        self._last_request = time.monotonic()

    def _take_turn(
        self, connection: socket.socket, payload: Payload
    ) -> tuple[Head, Payload | None]:
        """Serve one request; whatever is wrong with it becomes the reply's `error`.

        Clients are told when a request begins to run: if this process then dies, that request and
        none of those waiting behind it is to blame.
        """
        if _is_gone(connection):
            raise ConnectionError("the client left before its turn")
        head, _ = payload
        try:
            match head["op"]:
                case "shutdown":
                    self._hold([])
                    wire.send(connection, {})
                    self.end("asked to")
                case "set_engines":
                    wire.send(connection, {"running": True})
                    self._hold(head["engines"])
                    return self._status(), None
                case "score":
                    self._begin(connection, head)
                    scores, told = self._answer_all(score, head, wire.decode_groups(payload))
                    return told, wire.encode_scores(scores)
                case "generate":
                    self._begin(connection, head)
                    samples, told = self._answer_all(generate, head, wire.decode_requests(payload))
                    return told, wire.encode_samples(samples)
                case op:
                    raise ValueError(f"no such request: {op}")
        except ConnectionError:
            raise
        except Exception as error:
            return {"error": str(error)}, None

    def _begin(self, connection: socket.socket, head: Head) -> None:
        # Engines first: a host that dies while it loads must not be held against the rows.
        self._hold(head["engines"])
        wire.send(connection, {"running": True})

    def _answer_all(
        self,
        ask: Callable[[LogprobEngine, list[Group]], list[list[Outcome[Value]]]],
        head: Head,
        groups: Sequence[Group],
    ) -> tuple[list[list[Outcome[Value]]], Head]:
        """Ask each engine of a request its share of the groups, side by side where they can.

        Args:
            ask: `score` or `generate`.
            head: `asked` says whom: [engine, number of groups], in the order of the groups.
            groups: of all engines, each with at least one item.

        Returns:
            One list per group, one outcome per item, and the head of the reply. Its `died` are the
            engines that did: the outcomes of theirs mean nothing, and whoever needs them next loads
            them again. `resubmitted` counts what engines had to ask their models again, `busy_s` is
            how many seconds they were at work.
        """
        names = [name for name, _ in head["asked"]]
        engines = [self._loaded[name].engine for name in names]
        resubmitted = -sum(map(_count_resubmitted, engines))
        left = iter(groups)
        parts = [list(islice(left, size)) for _, size in head["asked"]]
        answer_one = partial(self._answer_or_bury, ask)
        begun = time.monotonic()
        if len(engines) > 1 and all(engine.is_concurrent for engine in engines):
            answers = list(self._beside.map(answer_one, engines, parts))
        else:
            answers = list(map(answer_one, engines, parts))
        busy_s = time.monotonic() - begun
        died = [name for name, part in zip(names, answers, strict=True) if part is None]
        resubmitted += sum(map(_count_resubmitted, engines))
        nothing = Outcome[Value](None, FailReason.ENGINE_DIED_TWICE)
        outcomes = [
            outcome
            for part, groups_of_one in zip(answers, parts, strict=True)
            for outcome in part or [[nothing] * wire.num_items(group) for group in groups_of_one]
        ]
        return outcomes, {"died": died, "resubmitted": resubmitted, "busy_s": busy_s}

    def _answer_or_bury(
        self,
        ask: Callable[[LogprobEngine, list[Group]], list[list[Outcome[Value]]]],
        engine: LogprobEngine,
        groups: list[Group],
    ) -> list[list[Outcome[Value]]] | None:
        """Ask one engine; None, and the engine closed, when it dies of it."""
        try:
            return answer(partial(ask, engine), groups)
        except EngineDied as death:
            _log.error("%s died in a request: %s", engine.spec.name, death.what)
            self._close(engine.spec.name)
            return None

    def _hold(self, specs: Sequence[dict[str, Any]]) -> None:
        """Make the loaded engines exactly these, all closing before the first loading."""
        wanted = {spec["name"]: EngineSpec(**spec) for spec in specs}
        unwanted = [n for n, held in self._loaded.items() if held.declared != wanted.get(n)]
        for name in unwanted:
            self._close(name)
        if unwanted:
            gc.collect()
        for name, spec in wanted.items():
            if name not in self._loaded:
                self._load(spec)

    def _close(self, name: str) -> None:
        """Close an engine; with the last one, see that no process of any engine is left."""
        try:
            self._loaded.pop(name).engine.close()
        except Exception:  # a dead one may not know how any more
            _log.exception("closing %s", name)
        _log.info("closed %s", name)
        if self._loaded:  # engines may share processes
            return
        if killed := end_processes(find_engine_processes()):
            _log.warning("killed processes %s that engines left", [p.pid for p in killed])

    def _load(self, spec: EngineSpec) -> None:
        _log.info("loading %s with %s from %s", spec.name, spec.engine, spec.path)
        begin, before = time.monotonic(), find_engine_processes()
        try:
            local = make_local(spec)
            begin = time.monotonic()  # what is fetched once per node is no part of loading
            engine = make_engine(local, self._num_threads)
        except Exception as error:
            if isinstance(error, CdrError):
                # Without a traceback: clients show the log's last lines, which are to be those of
                # the engine's own processes.
                _log.error("cannot load %s: %s", spec.name, error.what)
            else:
                _log.exception("cannot load %s", spec.name)
            kill_processes(find_engine_processes() - before)  # half an engine
            raise RuntimeError(
                f"cannot load model {spec.name} from {spec.path}: {type(error).__name__}: {error}"
            ) from error
        load_s = time.monotonic() - begin
        self._loaded[spec.name] = _Loaded(spec, engine, load_s)
        _log.info("loaded %s in %.1f s", spec.name, load_s)

    def _status(self) -> Head:
        engines = [
            {"name": name, "engine_version": held.engine.engine_version, "load_s": held.load_s}
            for name, held in list(self._loaded.items())
        ]
        return {"pid": os.getpid(), "engines": engines}


def score(engine: LogprobEngine, groups: list[ScoringGroup]) -> list[list[Outcome[TokenLogprobs]]]:
    """Score, and take nothing but finite numbers: one per token, or per completion of a classifier.

    Raises:
        ValueError: the engine gave another number of them.
    """
    is_classifier = engine.spec.engine == "classifier"
    return [
        [
            check_logprobs(ids[:1] if is_classifier else ids, logprobs)
            for ids, logprobs in zip(group.completions_ids, scored, strict=True)
        ]
        for group, scored in zip(groups, engine.score(groups), strict=True)
    ]


def check_logprobs(ids: Sequence[int], logprobs: TokenLogprobs) -> Outcome[TokenLogprobs]:
    """Give the outcome of one completion; see `score`."""
    if len(logprobs) != len(ids):
        raise ValueError(f"{len(ids)} tokens, but {len(logprobs)} log-probs")
    finite = np.isfinite(logprobs)
    if finite.all():
        return Outcome(logprobs)
    detail = f"{np.count_nonzero(~finite)} of {len(ids)} log-probs are not finite"
    return Outcome(None, FailReason.NON_FINITE_LOGPROB, detail)


def generate(engine: LogprobEngine, requests: list[SamplingRequest]) -> list[list[Outcome[Sample]]]:
    """Sample; one outcome per seed.

    Raises:
        ValueError: the engine gave another number of samples than there are seeds.
    """
    return [
        [Outcome(sample) for _, sample in zip(request.seeds, samples, strict=True)]
        for request, samples in zip(requests, engine.generate(requests), strict=True)
    ]


def answer(
    ask: Callable[[list[Group]], list[list[Outcome[Value]]]], groups: list[Group]
) -> list[list[Outcome[Value]]]:
    """Ask an engine, halving the question until only the items that raise are left to fail.

    Args:
        ask: `score` or `generate` of one engine.
        groups: at least one, each with at least one item.

    Returns:
        One list per group, one outcome per item, in order.

    Raises:
        EngineDied: nothing can be asked of the engine any more.
    """
    try:
        return ask(groups)
    except EngineDied:
        raise
    except Exception as error:
        # An engine's message may quote its input, so only what it is and where it comes from.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        if _has_broken_process(error):
            _log.critical("%s: no later request could succeed in this process", detail)
            kill_session()
    if len(groups) > 1:
        middle = len(groups) // 2
        return answer(ask, groups[:middle]) + answer(ask, groups[middle:])
    (group,) = groups
    size = wire.num_items(group)
    if size > 1:
        halves = wire.part(group, 0, size // 2), wire.part(group, size // 2, size)
        return [[outcome for half in halves for outcome in answer(ask, [half])[0]]]
    _log.error("one completion failed: %s", detail)
    return [[Outcome(None, FailReason.ENGINE_ERROR, detail)]]


def _count_resubmitted(engine: LogprobEngine) -> int:
    # Only vLLM gives answers that have to be asked for again.
    return getattr(engine, "num_resubmitted", 0)


def kill_session() -> NoReturn:
    """End this process and all its descendants, without cleaning up."""
    # Also those in sessions of their own, and orphans: this process is their reaper.
    kill_processes(find_engine_processes())
    os.kill(os.getpid(), signal.SIGKILL)  # what is left meets `cdr.engines.supervisor`
    raise AssertionError("unreachable: the signal above ends this process")


def _has_broken_process(error: Exception) -> bool:
    return "CUDA error" in str(error)  # after one, every further call fails, innocent or not


def _is_gone(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def lift_address_space_limit() -> None:
    """Undo the limit that Spark puts on the memory of Python workers, as far as allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):  # only root may go beyond the hard limit
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        _log.warning(
            "address space is limited to %d MiB; unset spark.executor.pyspark.memory if models "
            "do not load",
            hard >> 20,
        )


def main() -> NoReturn:
    """Run the host; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m cdr.engines.host")
    parser.add_argument("--folder", type=Path, required=True, help="private folder, mode 0700")
    parser.add_argument("--owner-pid", type=int, required=True)
    parser.add_argument("--owner-start", type=int, required=True)
    parser.add_argument("--idle-timeout-s", type=float, required=True)
    parser.add_argument("--num-threads", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True, help="written to once, when ready")
    parser.add_argument("--lock-fd", type=int, required=True, help="start lock, let go when ready")
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Here vLLM's sockets leave with the folder, however this process ends.
    os.environ.setdefault("VLLM_RPC_BASE_PATH", str(args.folder))
    become_subreaper()
    lift_address_space_limit()
    host = EngineHost(
        args.folder,
        Owner(args.owner_pid, args.owner_start),
        idle_timeout_s=args.idle_timeout_s,
        num_threads=args.num_threads,
    )
    signal.signal(signal.SIGTERM, lambda *_: host.end("terminated"))

    def on_ready() -> None:
        os.write(args.ready_fd, b"1")
        os.close(args.ready_fd)
        os.close(args.lock_fd)

    host.serve(on_ready)


if __name__ == "__main__":
    main()
