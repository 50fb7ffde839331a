"""The MLflow run of a job: what was asked, from which versions, and what came out.

Spoken to from the driver only. A store that cannot be reached stops a job before it starts; one
that goes away later never costs work: what could not be sent is kept as JSON beside the tables.
Everything sent is configuration, ids, versions and numbers, never a prompt or a completion; but for
the report page, which shows a few pairs unless `report.texts` is false.
"""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from cdr.config import TrackingSpec, content_hash
from cdr.errors import SetupError, Stopped
from cdr.redaction import first_line, redact
from cdr.tracking_store import (
    WITHOUT_TRACKING,
    artifact_folder,
    local_folder,
    open_store,
    quiet,
    resolve_tracking_uri,
    ui_command,
)

_logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_PARAM_CHARS = 6000  # MLflow's limit; Databricks has the same
_MAX_TAG_CHARS = 5000  # MLflow allows 8000, Databricks fewer
_DESCRIPTION = "mlflow.note.content"  # Markdown
_BATCH = 100  # parameters or tags in one request
_METRIC_NAME = re.compile(r"[^\w\-. :/]")


@dataclass(frozen=True)
class TableVersion:
    """A table as a run read or wrote it.

    Args:
        name: its name among the run's tables, for example `logprobs`.
        place: path or catalog name.
        version: Delta version; None for other formats.
    """

    name: str
    place: str
    version: int | None = None


class RunTracker:
    """One MLflow run for the length of a `with` block.

    With tracking off it does nothing, under the same interface. An exception or an exit code ends
    the run as FAILED; Ctrl-C and a stop in good order (`Stopped`) end it as KILLED.

    Args:
        tracking: where, and whether at all.
        warehouse: folder or URI of the run's tables.
        run_name: name in MLflow; the job's own run id.
        config: the resolved config, JSON-able; becomes parameters, `config.yaml` and a hash.
        tags: further tags, for example model keys and revisions.
        parent: the run that this one is nested in. A store that goes away after the parent's start
            does not keep this one from its work.
        note: file that remembers the run: work that goes on under an equal config goes on in the
            same run. None: a new run each time.

    Raises:
        SetupError: on entry, if the store cannot be used.
    """

    def __init__(
        self,
        tracking: TrackingSpec,
        warehouse: str,
        *,
        run_name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        parent: RunTracker | None = None,
        note: Path | None = None,
    ) -> None:
        self._tracking, self._warehouse, self._run_name = tracking, warehouse, run_name
        self._parent, self._note = parent, note
        self._config: dict[str, Any] = redact(config)
        self._tags = dict(tags or {})
        self._client: Any = None
        self._unsent: list[dict[str, Any]] = []
        self.uri: str | None = None
        """Tracking URI in use; None with tracking off."""
        self.run_id: str | None = None
        """MLflow's id of the run; None with tracking off."""

    def __enter__(self) -> Self:
        if not self._tracking.enabled:
            return self
        self.uri = uri = resolve_tracking_uri(self._tracking, self._warehouse)
        if self._parent is not None:
            self._unsent = self._parent._unsent
            self._send("run", self._run_name, lambda: self._start(uri))
            self.log_params(self._config)
            return self
        try:
            self._start(uri)
        except Exception as error:  # MLflow, SQLAlchemy and the network each have their own
            raise SetupError(
                f"MLflow cannot be used: {first_line(error)}",
                where=redact(self.uri),
                fix="start the server or correct tracking.uri (or MLFLOW_TRACKING_URI) and "
                f"tracking.experiment; or {WITHOUT_TRACKING}",
            ) from None
        self.log_params(self._config)
        self._send("config.yaml", self._config, lambda: self._log_text(self._config))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status: RunStatus = "FINISHED"
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            status = "KILLED"
        elif isinstance(error, SystemExit):
            status = "FAILED" if error.code else "FINISHED"
        elif error is not None:
            status = "FAILED"
        self._send("status", status, lambda: self._client.set_terminated(self.run_id, status))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log what was asked for; nested mappings become dotted names, long values are cut."""
        flat = [(name, _param_text(value)) for name, value in _leaves(params, ".")]

        def send() -> None:
            from mlflow.entities import Param

            for start in range(0, len(flat), _BATCH):
                batch = [Param(*item) for item in flat[start : start + _BATCH]]
                self._client.log_batch(self.run_id, params=batch)

        self._send("params", dict(flat), send)

    def has_run(self, run_id: str) -> bool:
        """Tell whether the store is known to have another run, to link the two."""
        if self._client is None or self._unsent:
            return False
        try:
            self._client.get_run(run_id)
        except Exception:  # of another store, deleted, or the store has gone away
            return False
        return True

    def set_tags(self, tags: Mapping[str, str], *, run_id: str | None = None) -> None:
        """Set tags on this run or on another one (to link the two)."""
        cut = {name: str(redact(text))[:_MAX_TAG_CHARS] for name, text in tags.items()}

        def send() -> None:
            for name, text in cut.items():
                self._client.set_tag(run_id or self.run_id, name, text)

        self._send("tags", {"run_id": run_id or self.run_id, **cut}, send)

    def link(self, run_id: str, name: str, *, is_our: str, are_its: str) -> None:
        """Link this run and another one, both ways, in the descriptions that MLflow's UI shows.

        Args:
            run_id: the other run; `has_run` is true of it.
            name: what to call it.
            is_our: what it is to this run, for example `annotate run`.
            are_its: what this run is to it, for example `SimPO training`.
        """

        def send() -> None:
            ours, its = (self._client.get_run(one) for one in (self.run_id, run_id))
            self._describe(ours, f"{is_our}: [{name}]({self._page(its)})")
            self._describe(its, f"{are_its}: [{self._run_name}]({self._page(ours)})")

        self._send("link", {"run_id": run_id, "name": name, "is_our": is_our}, send)

    def describe(self, line: str) -> None:
        """Add a line of Markdown to this run's description."""

        def send() -> None:
            self._describe(self._client.get_run(self.run_id), line)

        self._send("description", line, send)

    def as_link(self) -> str:
        """Give this run as a Markdown link within MLflow's UI; the store is asked for its place."""
        return f"[{self._run_name}]({self._page(self._client.get_run(self.run_id))})"

    def _describe(self, run: Any, line: str) -> None:
        """Add a line to a run's description, whatever a person has written there."""
        note = run.data.tags.get(_DESCRIPTION, "")
        if line not in note:
            text = f"{note}\n\n{line}".lstrip()
            self._client.set_tag(run.info.run_id, _DESCRIPTION, text)

    def _page(self, run: Any) -> str:
        """Give a run's address within MLflow's UI."""
        start = "/ml" if str(self.uri).startswith("databricks") else "#"
        return f"{start}/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"

    def log_metrics(self, metrics: Mapping[str, Any], *, step: int = 0) -> None:
        """Log the numbers of a nested mapping, under names joined by `/`.

        Args:
            metrics: leaves that are no finite numbers (None, NaN, texts, lists) are left out.
            step: for numbers that come again, for example the wave.
        """
        numbers = _numbers(metrics)

        def send() -> None:
            items = make_metrics(metrics, step)
            for start in range(0, len(items), _BATCH):
                self._client.log_batch(self.run_id, metrics=items[start : start + _BATCH])

        self._send("metrics", {"step": step, **numbers}, send)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Log a run's results: all of it as `summary.json`, its numbers as metrics.

        Args:
            summary: JSON-able; counts per status and domain, quantiles of rewards and margins,
                length statistics, throughput, warnings.
        """
        self.log_metrics(summary)
        text = json.dumps(redact(summary), indent=2, ensure_ascii=False)
        self._send(
            "summary.json",
            summary,
            lambda: self._client.log_text(self.run_id, text, "summary.json"),
        )

    def log_table(self, table: TableVersion, *, role: Literal["input", "output"]) -> None:
        """Record that the run read or wrote a table at a version: a data set and a tag."""

        def send() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = {"path": table.place, "delta_table_version": table.version}
            dataset = Dataset(
                name=table.name,
                digest=content_hash(source)[:16],
                source_type="delta_table" if table.version is not None else "local",
                source=json.dumps(source),
            )
            context = InputTag("mlflow.data.context", role)
            self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [context])])

        version = "unversioned" if table.version is None else str(table.version)
        self.set_tags({f"cdr.{role}.{table.name}": f"{table.place}@{version}"})
        self._send("table", {"role": role, **vars(table)}, send)

    def log_file(self, path: str | Path) -> None:
        """Keep a copy of a file with the run."""
        self._send("file", str(path), lambda: self._client.log_artifact(self.run_id, str(path)))

    def log_page(self, html: str, name: str) -> None:
        """Keep a page with the run, for example the report; what is kept unsent is its name."""
        self._send("page", name, lambda: self._client.log_text(self.run_id, html, name))

    def ui_command(self) -> str | None:
        """Give the command that shows the run; None with tracking off."""
        return None if self.uri is None else ui_command(self.uri)

    def _start(self, uri: str) -> None:
        client = open_store(uri)
        with quiet():
            experiment = client.get_experiment_by_name(self._tracking.experiment)
            if experiment is not None:
                experiment_id = experiment.experiment_id
            else:
                # A server knows where its artifacts go; a database file has to be told.
                location = artifact_folder(uri)
                experiment_id = client.create_experiment(
                    self._tracking.experiment, artifact_location=location
                )
            tags = {"cdr.config_hash": content_hash(self._config), **self._tags}
            commit = git_commit()
            if commit is not None:
                tags["mlflow.source.git.commit"] = commit
            above = self._tracking.parent if self._parent is None else self._parent.run_id
            if above is not None:
                tags["mlflow.parentRunId"] = above
            run_id = self._begun_before(client, tags["cdr.config_hash"])
            if run_id is None:
                run = client.create_run(experiment_id, run_name=self._run_name, tags=tags)
                run_id = run.info.run_id
            else:
                client.update_run(run_id, status="RUNNING")
                for name, text in tags.items():
                    client.set_tag(run_id, name, text)
        self._client, self.run_id = client, run_id
        if self._note is not None:
            note = {"run_id": run_id, "config_hash": tags["cdr.config_hash"]}
            self._note.write_text(json.dumps(note), encoding="utf-8")

    def _begun_before(self, client: Any, config_hash: str) -> str | None:
        """Give the run in which this work was begun, if the store still has it."""
        if self._note is None or not self._note.exists():
            return None
        note = json.loads(self._note.read_text(encoding="utf-8"))
        if note["config_hash"] != config_hash:
            return None
        try:
            run = client.get_run(note["run_id"])
        except Exception:  # of another store; a store that is down is found out by what follows
            return None
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None

    def _log_text(self, config: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._client.log_text(self.run_id, text, "config.yaml")

    def _send(self, what: str, payload: object, send: Callable[[], None]) -> None:
        """Send, or keep what cannot be sent.

        After a first failure nothing more is tried but the final status: each try could wait for a
        dead server's timeouts, and the run would be incomplete anyway.
        """
        if self.uri is None:
            return
        problem = "not tried after an earlier failure"
        has_run = self._client is not None or what == "run"
        if has_run and (not self._unsent or what == "status"):
            try:
                send()
                return
            except Exception as error:  # the job's work must outlive any store
                problem = first_line(error)
        self._unsent.append(
            {"run": self._run_name, "what": what, "problem": problem, "payload": redact(payload)}
        )
        text = json.dumps(self._unsent, indent=2, ensure_ascii=False, default=str)
        first = self if self._parent is None else self._parent
        path = _unsent_folder(self._warehouse) / f"{first.run_id}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            _logger.error("%s cannot be kept for MLflow: %s", what, error)
        if len(self._unsent) == 1:
            _logger.warning(
                "MLflow did not take %s (%s); the job goes on, and %s keeps what cannot be sent",
                what,
                problem,
                path,
            )


def make_metrics(metrics: Mapping[str, Any], step: int = 0) -> list[Any]:
    """Make MLflow's metrics of a nested mapping; see `RunTracker.log_metrics`."""
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(name, value, now_ms, step) for name, value in _numbers(metrics).items()]


def git_commit() -> str | None:
    """Give the commit this code is at, with `-dirty` where it was changed; None outside git.

    A package installed below somebody else's repository has no commit of its own.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--", "cdr") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _unsent_folder(warehouse: str) -> Path:
    return (local_folder(warehouse) or Path.cwd()) / "mlflow-unsent"


def _leaves(tree: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        _METRIC_NAME.sub("_", name): float(value)
        for name, value in _leaves(metrics, "/")
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _param_text(value: object) -> str:
    text = str(redact(value if isinstance(value, str) else json.dumps(value, default=str)))
    if len(text) <= _MAX_PARAM_CHARS:
        return text
    note = " ... (cut: all of it is in config.yaml)"
    return text[: _MAX_PARAM_CHARS - len(note)] + note
