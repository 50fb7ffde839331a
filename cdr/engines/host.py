"""The engine host: one process per executor and device that holds the loaded models.

    python -m cdr.engines.host --folder FOLDER --owner-pid PID --owner-start START ...

`cdr.engines.client` starts it and talks to it; nobody else should. Models live here and not in
Spark's Python workers because a worker is reaped when idle and changes its GPU from task to task.

Requests are served one after the other, in the order of their arrival, and each carries the whole
set of engines it needs: two stages that want different sets take turns and cannot pull an engine
away from under each other. The log never holds token ids or text.
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
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

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
from cdr.engines.launch import SOCKET, Owner
from cdr.engines.wire import Group, Head, Outcome, Payload, Value
from cdr.errors import FailReason
from cdr.weights import make_local

_WATCH_S = 1.0

_log = logging.getLogger("cdr.engines.host")


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
        self._engines: dict[str, LogprobEngine] = {}
        # Specs as clients declare them; an engine's own has the folders of this node.
        self._declared: dict[str, EngineSpec] = {}
        self._load_s: dict[str, float] = {}
        # One worker: turns are first come, first served, and models see a single thread.
        self._turns = ThreadPoolExecutor(1, "turn")
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
                    engine = self._begin(connection, head)
                    scores = answer(partial(score, engine), wire.decode_groups(payload))
                    return {}, wire.encode_scores(scores)
                case "generate":
                    engine = self._begin(connection, head)
                    samples = answer(partial(generate, engine), wire.decode_requests(payload))
                    return {}, wire.encode_samples(samples)
                case op:
                    raise ValueError(f"no such request: {op}")
        except ConnectionError:
            raise
        except Exception as error:
            return {"error": str(error)}, None

    def _begin(self, connection: socket.socket, head: Head) -> LogprobEngine:
        # Engines first: a host that dies while it loads must not be held against the rows.
        self._hold(head["engines"])
        wire.send(connection, {"running": True})
        return self._engines[head["engine"]]

    def _hold(self, specs: Sequence[dict[str, Any]]) -> None:
        """Make the loaded engines exactly these, all closing before the first loading."""
        wanted = {spec["name"]: EngineSpec(**spec) for spec in specs}
        unwanted = [name for name in self._engines if self._declared[name] != wanted.get(name)]
        for name in unwanted:
            self._engines.pop(name).close()
            _log.info("closed %s", name)
        if unwanted:
            gc.collect()
        for name, spec in wanted.items():
            if name not in self._engines:
                self._load(spec)

    def _load(self, spec: EngineSpec) -> None:
        _log.info("loading %s with %s from %s", spec.name, spec.engine, spec.path)
        begin = time.monotonic()
        try:
            local = make_local(spec)
            begin = time.monotonic()  # what is fetched once per node is no part of loading
            engine = make_engine(local, self._num_threads)
        except Exception as error:
            _log.exception("cannot load %s", spec.name)
            raise RuntimeError(
                f"cannot load model {spec.name} from {spec.path}: {type(error).__name__}: {error}"
            ) from error
        self._load_s[spec.name] = time.monotonic() - begin
        self._engines[spec.name], self._declared[spec.name] = engine, spec
        _log.info("loaded %s in %.1f s", spec.name, self._load_s[spec.name])

    def _status(self) -> Head:
        engines = [
            {"name": name, "engine_version": e.engine_version, "load_s": self._load_s[name]}
            for name, e in list(self._engines.items())
        ]
        return {"pid": os.getpid(), "engines": engines}


def score(engine: LogprobEngine, groups: list[ScoringGroup]) -> list[list[Outcome[TokenLogprobs]]]:
    """Score, and take nothing but one finite number per token for a log-prob.

    Raises:
        ValueError: the engine gave another number of log-probs than there are tokens.
    """
    return [
        [
            check_logprobs(ids, logprobs)
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
    """
    try:
        return ask(groups)
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


def kill_session() -> NoReturn:
    """End this process and all its descendants, without cleaning up."""
    for child in psutil.Process().children(recursive=True):  # those in groups of their own too
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable: the signal above ends this process")


def _has_broken_process(error: Exception) -> bool:
    # After a CUDA error every further call fails, innocent or not; vLLM's dead core likewise.
    return "CUDA error" in str(error) or type(error).__name__ == "EngineDeadError"


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
    with contextlib.suppress(PermissionError):
        os.setsid()  # refused when this process leads a group, which is what kill_session needs
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
