"""A version of a registered reward, and the runs made with it, linked both ways in MLflow's pages.

A run's description links to the version's page; the version's description lists the newest runs,
each with a link. Only so many: a description has a limit, and the tag `cdr.reward_version` of the
runs finds all of them. A version that cannot be changed (a registry may allow its use alone) costs
a warning, and never a run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from cdr.redaction import first_line
from cdr.tracking import RunTracker, make_metrics
from cdr.tracking_store import open_store, quiet

_logger = logging.getLogger(__name__)

VERSION_TAG = "cdr.reward_version"
"""Tag of a run with the registered reward that it used: `NAME/3`."""

_SHOWN = 20
_MAX_CHARS = 5000  # of a version's description, in MLflow's database
_BATCH = 500  # metrics in one request; MLflow takes 1000
_HEADING = "Newest runs with it"
_RUN_LINE = re.compile(r"- \w+: \[.+\]\(\S+\)$")


def link_version(tracker: RunTracker, version: str | None, *, job: str) -> None:
    """Link a run and the registered reward that it uses, both ways.

    Two runs that begin at the same moment may overwrite each other's line in the version's
    description; their own links stand.

    Args:
        tracker: the run, begun; nothing is done where its store has gone away.
        version: `NAME/3`; None where the reward came from a file, and there is nothing to link.
        job: what the version calls the run: its job's name in `runs`.
    """
    if version is None or (client := _reach(tracker)) is None:
        return
    name, _, number = version.rpartition("/")
    try:
        with quiet():
            before = client.get_model_version(name, number).description or ""
            tracker.describe(f"Reward: {_as_link(version, str(tracker.uri))}")
            now = list_run(before, f"- {job}: {tracker.as_link()}", version)
            client.update_model_version(name, number, description=now)
    except Exception as error:  # MLflow, SQLAlchemy and the network each have their own
        _logger.warning("the reward %s gets no link to this run: %s", version, first_line(error))


def log_evaluation(
    tracker: RunTracker, version: str | None, dataset: str, metrics: Mapping[str, Any]
) -> None:
    """Add what an evaluation found to the metrics of the version that was evaluated.

    They go to the run that registered the version, where versions are compared: under the names
    that they have in the evaluation's own run, behind the benchmark's, so that two benchmarks, or
    one and a sample of it, are never taken for each other.

    Args:
        tracker: the evaluation's run; nothing is done where its store has gone away.
        version: `NAME/3`; None where the reward came from a file.
        dataset: name of the benchmark, or of the sample of it.
        metrics: see `RunTracker.log_metrics`.
    """
    if version is None or (client := _reach(tracker)) is None:
        return
    name, _, number = version.rpartition("/")
    try:
        with quiet():
            run_id = client.get_model_version(name, number).run_id
            figures = make_metrics({dataset: metrics})
            for start in range(0, len(figures), _BATCH):
                client.log_batch(run_id, metrics=figures[start : start + _BATCH])
    except Exception as error:  # MLflow, SQLAlchemy and the network each have their own
        _logger.warning(
            "the reward %s gets no metrics of this evaluation: %s; to add them later, run the "
            "evaluation again, which scores nothing that is stored", version, first_line(error)
        )  # fmt: skip


def list_run(description: str, line: str, version: str) -> str:
    """Put a run at the head of the runs that a version's description lists.

    Args:
        description: Markdown; what people have written there stays, above the list.
        line: of the run.
        version: `NAME/3`.

    Returns:
        The description with the newest runs that it has room for.
    """
    lines = description.splitlines()
    runs = [line, *(old for old in lines if _RUN_LINE.match(old) and old != line)][:_SHOWN]
    written = [old for old in lines if not _RUN_LINE.match(old) and not old.startswith(_HEADING)]
    head = re.sub("\n{3,}", "\n\n", "\n".join(written)).rstrip()
    heading = f"{_HEADING} (all: search runs for `` tags.`{VERSION_TAG}` = '{version}' ``):"
    while runs:
        text = f"{head}\n\n{heading}\n\n".lstrip() + "\n".join(runs)
        if len(text) <= _MAX_CHARS:
            return text
        runs.pop()
    return description


def _reach(tracker: RunTracker) -> Any:
    """Give a client of a run's store and registry; None without a run or where it has gone."""
    if tracker.run_id is None or not tracker.has_run(tracker.run_id):
        return None
    return open_store(str(tracker.uri))


def _as_link(version: str, uri: str) -> str:
    """Give a version as a link within MLflow's UI; as text where its page is elsewhere.

    So it is on Databricks, whose catalog has pages of its own, and with a registry of its own.
    """
    if uri.startswith("databricks") or os.environ.get("MLFLOW_REGISTRY_URI"):
        return version
    name, _, number = version.rpartition("/")
    return f"[{version}](#/models/{quote(name)}/versions/{number})"
