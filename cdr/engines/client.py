"""Client of the engine host: what a task uses to ask a model.

    with connect(device) as client:
        client.set_engines([strong, weak])
        outcomes = client.score(strong.name, groups)

The first client on a device starts the host (`cdr.engines.host`), later ones connect to it. When
the host dies, the client starts it again and narrows the request down to the completions that
kill it: those fail, the others are scored. One client serves one thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from cdr.engines import wire
from cdr.engines.base import EngineSpec, Sample, SamplingRequest, ScoringGroup, TokenLogprobs
from cdr.engines.device import Device
from cdr.engines.launch import HostOptions, HostPlace
from cdr.engines.wire import Group, Head, Outcome, Payload, Value
from cdr.errors import EngineError, FailReason
from cdr.weights import may_be_fetched


@dataclass(frozen=True)
class LoadedEngine:
    """An engine of a host: its name, its version, and the seconds it took to load."""

    name: str
    engine_version: str
    load_s: float


@dataclass(frozen=True)
class HostStatus:
    """A host's process id and loaded engines."""

    pid: int
    engines: tuple[LoadedEngine, ...]


def connect(device: Device, options: HostOptions | None = None) -> EngineClient:
    """Give a client of the device's host, which is started when there is none.

    Raises:
        EngineError: the host cannot be started.
    """
    client = EngineClient(device, options or HostOptions())
    client.status()
    return client


class _HostDied(Exception):  # noqa: N818 - an event the client handles, not an error it reports
    """The host died, or ended, before it replied; `was_running` tells if this request ran."""

    def __init__(self, was_running: bool) -> None:
        self.was_running = was_running


class EngineClient:
    """Asks the engines of one device; see `connect`."""

    def __init__(self, device: Device, options: HostOptions) -> None:
        self._device, self._options = device, options
        self._place = HostPlace(device, options)
        self._connection: socket.socket | None = None
        self._specs: tuple[EngineSpec, ...] = ()
        self._deaths_in_a_row = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_engines(self, specs: Sequence[EngineSpec]) -> HostStatus:
        """Declare the set of engines: others are closed, then missing ones load, one by one.

        Args:
            specs: all engines of the stage; unchanged ones stay loaded.

        Returns:
            The host's status with the set loaded.

        Raises:
            EngineError: a model cannot be loaded; the host died loading it, or took too long.
        """
        self._specs = tuple(specs)
        names = ", ".join(spec.name for spec in specs)
        head = self._head("set_engines")
        timeout_s = self._options.load_timeout_s
        if any(may_be_fetched(spec) for spec in specs):
            timeout_s += self._options.fetch_timeout_s
        return self._ask_status(head, f"loaded {names}", timeout_s)

    def score(
        self, engine: str, groups: Sequence[ScoringGroup]
    ) -> list[list[Outcome[TokenLogprobs]]]:
        """Score completions; one that cannot be scored costs no other.

        Args:
            engine: name of a declared engine.
            groups: as for `LogprobEngine.score`.

        Returns:
            One list per group, one outcome per completion, in the given order: float32 log-probs
            in nats, or `ENGINE_ERROR`, `NON_FINITE_LOGPROB` or `ENGINE_DIED_TWICE`.

        Raises:
            EngineError: the engine is not declared or does not load, or the host dies whatever
                it is asked.
        """
        head = self._head("score", engine)

        def ask(part: Sequence[ScoringGroup]) -> list[list[Outcome[TokenLogprobs]]] | None:
            reply = self._ask(head, wire.encode_groups(part))
            return reply and wire.decode_scores(reply, part)

        return self._survive(ask, groups) if groups else []

    def generate(
        self, engine: str, requests: Sequence[SamplingRequest]
    ) -> list[list[Outcome[Sample]]]:
        """Sample completions; one outcome per seed, with errors as for `score`."""
        head = self._head("generate", engine)

        def ask(part: Sequence[SamplingRequest]) -> list[list[Outcome[Sample]]] | None:
            reply = self._ask(head, wire.encode_requests(part))
            return reply and wire.decode_samples(reply, part)

        return self._survive(ask, requests) if requests else []

    def status(self) -> HostStatus:
        """Ask which engines are loaded; answered at once, also while others load or run."""
        return self._ask_status({"op": "status"}, "told its status")

    def shutdown(self) -> None:
        """End the host, if there is one, once earlier requests are done; wait until it is gone."""
        try:
            self._connection = self._connection or self._place.open()
            self._connection.settimeout(None)
            wire.send(self._connection, {"op": "shutdown"})
            while self._connection.recv(4096):
                pass
        except (ConnectionError, FileNotFoundError):
            self._place.clear()
        self.close()

    def close(self) -> None:
        """Leave the host, which lives on."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def _head(self, op: str, engine: str | None = None) -> Head:
        # Every request carries the set it needs, so a new host needs no introduction.
        if engine is not None and engine not in {spec.name for spec in self._specs}:
            raise EngineError(f"engine {engine} is not declared", fix="call set_engines first")
        return {"op": op, "engine": engine, "engines": [asdict(spec) for spec in self._specs]}

    def _ask_status(self, head: Head, doing: str, timeout_s: float | None = None) -> HostStatus:
        reply = self._ask(head, timeout_s=timeout_s)
        if reply is None:
            raise self._failure(f"the engine host on {self._device} died while it {doing}")
        engines = tuple(LoadedEngine(**engine) for engine in reply[0]["engines"])
        return HostStatus(reply[0]["pid"], engines)

    def _survive(
        self,
        ask: Callable[[Sequence[Group]], list[list[Outcome[Value]]] | None],
        groups: Sequence[Group],
        deaths: int = 0,
    ) -> list[list[Outcome[Value]]]:
        """Ask; when that kills the host, ask group by group, then completion by completion.

        Args:
            ask: gives None when the host died of the question.
            groups: at least one.
            deaths: how often the host has died with these groups in flight.
        """
        outcomes = ask(groups)
        if outcomes is not None:
            self._deaths_in_a_row = 0
            return outcomes
        deaths += 1
        if len(groups) > 1:
            return [self._survive(ask, [group], deaths)[0] for group in groups]
        (group,) = groups
        size = wire.num_items(group)
        if size > 1:
            items = [wire.part(group, i, i + 1) for i in range(size)]
            return [[self._survive(ask, [item], deaths)[0][0] for item in items]]
        if deaths == 1:
            return self._survive(ask, groups, deaths)
        return [[Outcome(None, FailReason.ENGINE_DIED_TWICE)]]

    def _ask(
        self, head: Head, payload: Payload | None = None, *, timeout_s: float | None = None
    ) -> Payload | None:
        """Exchange a request for its reply; None when the host died while it ran the request.

        A request that was still waiting when the host died is sent again.
        """
        while self._deaths_in_a_row < self._options.max_deaths_in_a_row:
            try:
                reply = self._exchange(head, payload, timeout_s)
            except _HostDied as death:
                self._deaths_in_a_row += 1
                if head.get("engine"):
                    # Loading first and by itself: if that is what kills the host, this says so.
                    self.set_engines(self._specs)
                if death.was_running:
                    return None
            else:
                if "error" in reply[0]:
                    raise self._failure(reply[0]["error"])
                return reply
        what = f"died {self._deaths_in_a_row} times in a row"
        raise self._failure(f"the engine host on {self._device} {what}")

    def _exchange(self, head: Head, payload: Payload | None, timeout_s: float | None) -> Payload:
        is_running = False
        try:
            self._connection = self._connection or self._place.open_or_start()
            self._connection.settimeout(timeout_s)
            wire.send(self._connection, head, payload)
            with self._connection.makefile("rb") as stream:
                while True:
                    reply = wire.receive(stream)
                    if not reply[0].get("running"):
                        return reply
                    is_running = True
        except ConnectionError as error:
            self.close()
            raise _HostDied(is_running) from error
        except TimeoutError as error:
            self.close()
            what = f"gave no reply within {timeout_s:.0f} s"
            raise self._failure(f"the engine host on {self._device} {what}") from error

    def _failure(self, what: str) -> EngineError:
        return EngineError(f"{what}{self._place.log_tail()}")
