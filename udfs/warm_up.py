"""Warm a node up on the workers: fetch weights, load engines, say how it went."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace

import pandas as pd

from cdr.engines.client import connect
from cdr.engines.device import (
    Device,
    DeviceChoice,
    claim_device,
    task_gpu_addresses,
    visible_cuda_devices,
)
from cdr.engines.launch import host_environment
from cdr.engines.owner import find_owner
from cdr.errors import CdrError
from cdr.warm_up import HOLD_S, Answer, EngineSet, count_gpus
from cdr.weights import Source


def make_warm_up(
    sources: Mapping[Source, str],
    engine_sets: Sequence[EngineSet],
    choice: DeviceChoice,
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Make the function for `DataFrame.mapInPandas`.

    Args:
        sources: what to fetch, with the roles that need it.
        engine_sets: sets of engines to load, one after the other; all need as many GPUs.
        choice: which kind of device, as `cdr.executors` has settled it.

    Returns:
        A function over frames of any columns; it yields `cdr.warm_up.WARM_UP_DDL` rows, one per
        source and per set of engines. What goes wrong is a row's `error`.
    """
    num_gpus = max(map(count_gpus, engine_sets), default=1)

    def warm_up(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        begin = time.monotonic()
        for _ in frames:
            pass
        owner = find_owner()
        with claim_device(
            task_gpu_addresses(),
            visible_cuda_devices(),
            owner,
            num_gpus=num_gpus,
            choice=choice,
        ) as device:
            place = (socket.gethostname(), f"{owner.pid}-{owner.start}", str(device))
            answers = [_fetch(place, source, roles) for source, roles in sources.items()]
            if all(answer.error is None for answer in answers):
                answers += [_load(place, device, engines) for engines in engine_sets]
            # Keeps this slot busy, so that the next task goes to another executor.
            time.sleep(max(0.0, HOLD_S - (time.monotonic() - begin)))
        yield pd.DataFrame(
            [asdict(answer) for answer in answers],
            columns=[field.name for field in fields(Answer)],
        )

    return warm_up


def _fetch(place: tuple[str, str, str], source: Source, roles: str) -> Answer:
    """Fetch in a process of its own.

    Spark bounds a worker's memory and may end it with its task; a half copy would cost more.
    """
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cdr.weights", "fetch", json.dumps(asdict(source))],
        env=host_environment(Device("cpu"), 1, os.environ, sys.path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its log goes to the executor's
        text=True,
    )
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        told = {"error": f"the process that fetches ended with {done.returncode}"}
    return Answer(
        *place,
        model=roles,
        action="fetch",
        source=str(source),
        num_bytes=told.get("bytes_copied"),
        seconds=time.monotonic() - begin,
        is_verified=told.get("is_verified"),
        error=told.get("error"),
    )


def _load(place: tuple[str, str, str], device: Device, engines: EngineSet) -> Answer:
    answer = Answer(*place, model=", ".join(engines), action="load", source="")
    try:
        with connect(device) as client:
            status = client.set_engines(list(engines.values()))
    except CdrError as error:
        return replace(answer, error=str(error))
    versions = dict.fromkeys(engine.engine_version for engine in status.engines)
    load_s = sum(engine.load_s for engine in status.engines)
    return replace(answer, source=", ".join(versions), seconds=load_s)
