"""Client of the engine host: what a task uses to ask a model.

    with connect(device) as client:
        client.set_engines([strong, weak])
        outcomes = client.score(strong.name, groups)

The first client on a device starts the host (`cdr.engines.host`), later ones connect to it. When
the host dies, or an engine in it, the client has it started again and narrows the request down to
the completions that kill it: those fail, the others are scored. One client serves one thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from types import TracebackType
from typing import Self

from cdr.engines import wire
from cdr.engines.base import EngineSpec, Sample, SamplingRequest, ScoringGroup, TokenLogprobs
from cdr.engines.device import Device
from cdr.engines.launch import HostOptions, HostPlace
from cdr.engines.wire import Group, Head, Outcome, Payload, Value
from cdr.errors import EngineError, FailReason
from cdr.weights import may_be_fetched

_DEATHS_OF_A_PREFIX = 3
"""Completions of one prefix that die one after the other before the rest is not tried."""


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

    This executor's hosts on some of the device's addresses, but not just these, are ended first:
    whoever has the device now has it alone.

    Raises:
        EngineError: the host cannot be started.
    """
    options = options or HostOptions()
    for rival in HostPlace(device, options).rivals():
        with EngineClient(rival, options) as leaving:
            leaving.shutdown()
    client = EngineClient(device, options)
    client.status()
    return client


_Question = tuple[str, Group]
"""A group and the name of the engine that is asked about it."""


class _HostDied(Exception):  # noqa: N818 - an event the client handles, not an error it reports
    """The host died, or ended, before it replied; `was_running` tells if this request ran."""

    def __init__(self, was_running: bool) -> None:
        self.was_running = was_running


class EngineClient:
    """Asks the engines of one device; see `connect`.

    Attributes:
        num_resubmitted: requests that engines had to send their model again (vLLM's without its
            prefix cache), for all that this client asked.
        busy_s: seconds that the device's engines were at work on what this client asked.
    """

    def __init__(self, device: Device, options: HostOptions) -> None:
        self._device, self._options = device, options
        self._place = HostPlace(device, options)
        self._connection: socket.socket | None = None
        self._specs: tuple[EngineSpec, ...] = ()
        self._deaths_in_a_row = 0
        self.num_resubmitted = 0
        self.busy_s = 0.0

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
        return self.score_all({engine: groups})[engine]

    def score_all(
        self, groups: Mapping[str, Sequence[ScoringGroup]]
    ) -> dict[str, list[list[Outcome[TokenLogprobs]]]]:
        """Score with several engines in one request; those that can work at the same time.

        Args:
            groups: what to score, by the name of the engine; see `score`.

        Returns:
            What `score` gives, by the name of the engine.

        Raises:
            EngineError: as for `score`.
        """
        return self._answers("score", groups, wire.encode_groups, wire.decode_scores)

    def generate(
        self, engine: str, requests: Sequence[SamplingRequest]
    ) -> list[list[Outcome[Sample]]]:
        """Sample completions; one outcome per seed, with errors as for `score`."""
        asked = {engine: requests}
        return self._answers("generate", asked, wire.encode_requests, wire.decode_samples)[engine]

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

    def _head(self, op: str) -> Head:
        # Every request carries the set it needs, so a new host needs no introduction.
        return {"op": op, "engines": [asdict(spec) for spec in self._specs]}

    def _answers(
        self,
        op: str,
        asked: Mapping[str, Sequence[Group]],
        encode: Callable[[Sequence[Group]], Payload],
        decode: Callable[[Payload, Sequence[Group]], list[list[Outcome[Value]]]],
    ) -> dict[str, list[list[Outcome[Value]]]]:
        """Ask engines, by name; see `score_all`."""
        if unknown := set(asked) - {spec.name for spec in self._specs}:
            names = ", ".join(sorted(unknown))
            raise EngineError(f"engine {names} is not declared", fix="call set_engines first")

        def ask(part: Sequence[_Question[Group]]) -> list[list[Outcome[Value]] | None]:
            counts = [[name, len(list(run))] for name, run in groupby(engine for engine, _ in part)]
            groups = [group for _, group in part]
            reply = self._ask({**self._head(op), "asked": counts}, encode(groups))
            if reply is None:
                return [None] * len(part)
            died = reply[0]["died"]
            self.num_resubmitted += reply[0]["resubmitted"]
            self.busy_s += reply[0]["busy_s"]
            self._deaths_in_a_row = self._deaths_in_a_row + 1 if died else 0
            outcomes = decode(reply, groups)
            return [
                None if engine in died else found
                for (engine, _), found in zip(part, outcomes, strict=True)
            ]

        questions = [(engine, group) for engine, groups in asked.items() for group in groups]
        answers = iter(self._survive(ask, questions) if questions else [])
        return {engine: list(islice(answers, len(groups))) for engine, groups in asked.items()}

    def _ask_status(self, head: Head, doing: str, timeout_s: float | None = None) -> HostStatus:
        reply = self._ask(head, timeout_s=timeout_s)
        if reply is None:
            raise self._failure(f"the engine host on {self._device} died while it {doing}")
        engines = tuple(LoadedEngine(**engine) for engine in reply[0]["engines"])
        return HostStatus(reply[0]["pid"], engines)

    def _survive(
        self,
        ask: Callable[[Sequence[_Question[Group]]], list[list[Outcome[Value]] | None]],
        questions: Sequence[_Question[Group]],
        deaths: int = 0,
    ) -> list[list[Outcome[Value]]]:
        """Ask; what that kills is asked group by group, then completion by completion.

        Args:
            ask: gives None for the questions whose host or engine died.
            questions: at least one.
            deaths: how often these questions were in flight at a death.
        """
        answers = ask(questions)
        if len(questions) > 1:
            return [
                self._survive(ask, [question], deaths + 1)[0] if found is None else found
                for question, found in zip(questions, answers, strict=True)
            ]
        ((engine, group),), (found,) = questions, answers
        if found is not None:
            return [found]
        deaths += 1
        size = wire.num_items(group)
        if size > 1:
            return [self._survive_one_by_one(ask, engine, group, deaths)]
        if deaths == 1:
            return self._survive(ask, questions, deaths)
        return [[Outcome(None, FailReason.ENGINE_DIED_TWICE)]]

    def _survive_one_by_one(
        self,
        ask: Callable[[Sequence[_Question[Group]]], list[list[Outcome[Value]] | None]],
        engine: str,
        group: Group,
        deaths: int,
    ) -> list[Outcome[Value]]:
        """Ask completion by completion, until so many have died that their prefix is to blame.

        A prefix too large for the device kills with any completion; with 32 of them, to try each
        would cost as many loads of the model, and a group like that must not end the run.
        """
        outcomes: list[Outcome[Value]] = []
        died = Outcome[Value](None, FailReason.ENGINE_DIED_TWICE, "as those before it did")
        died_in_a_row = 0
        for i in range(wire.num_items(group)):
            if died_in_a_row == _DEATHS_OF_A_PREFIX:
                outcomes.append(died)
                continue
            question = (engine, wire.part(group, i, i + 1))
            ((outcome,),) = self._survive(ask, [question], deaths)
            is_dead = outcome.error is FailReason.ENGINE_DIED_TWICE
            died_in_a_row = died_in_a_row + 1 if is_dead else 0
            outcomes.append(outcome)
        return outcomes

    def _ask(
        self, head: Head, payload: Payload | None = None, *, timeout_s: float | None = None
    ) -> Payload | None:
        """Exchange a request for its reply; None when the host died while it ran the request.

        A request that was still waiting when the host died is sent again.
        """
        most, unheard = self._options.max_deaths_in_a_row, 0
        while max(self._deaths_in_a_row, unheard) < most:
            try:
                reply = self._exchange(head, payload, timeout_s)
            except _HostDied as death:
                if death.was_running:
                    self._deaths_in_a_row += 1
                else:
                    unheard += 1  # perhaps one more knock at the door of a host that just died
                if "asked" in head:
                    # Loading first and by itself: if that is what kills the host, this says so.
                    self.set_engines(self._specs)
                if death.was_running:
                    return None
            else:
                if "error" in reply[0]:
                    raise self._failure(reply[0]["error"])
                return reply
        raise self._failure(
            f"the engine host on {self._device}, or an engine in it, died {most} times in a row"
        )

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
        return EngineError(what + self._place.log_tail())
