"""Carry out a policy study: one child process per stage, and a record of each that is done.

    <output>/stages/ROW.STAGE.KEY.json what decided it, on which records it stands, what came out
    <output>/configs/ROW.STAGE.yaml    the config that the job was given
    <output>/logs/ROW.STAGE.log        all that it said

A record with the stage's key means that it is done, while those that it stands on are: where a
policy is gone and trained again, it is answered with again, as its weights need not be the same. A
stage that was killed has no record and is started again, and its job goes on from what it has
committed. A child gets SIGTERM where this process is asked to stop, and ends as it does on its own.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cdr.checkpoints import read_json, write_json
from cdr.child_jobs import Children, last_lines, work_alone
from cdr.cli import FAILED, KEPT, OK, STOPPED
from cdr.config import content_hash
from cdr.errors import Stopped
from cdr.policy_results import metrics_of, render_results, write_results
from cdr.policy_study import SHORT, PolicyPlan, Stage
from cdr.policy_study_config import TRAIN
from cdr.redaction import redact
from cdr.runs import RunLog, RunRecord, new_run_id
from cdr.simpo_report import ALL_DOMAINS
from cdr.tracking import RunTracker
from cdr.tracking_store import resolve_tracking_uri
from cdr.training_run import RUN_NOTE
from cdr.warehouse import Warehouse

_SHOWN_CHANGES = 3


def read_record(plan: PolicyPlan, stage: Stage) -> dict[str, Any] | None:
    """Give the record of a stage that is done under its present key; None where it is not."""
    file = _record_file(plan, stage)
    if not file.exists() or not (stage.result is None or stage.result.exists()):
        return None
    record = read_json(file)
    return record if record["stands_on"] == _stands_on(plan, stage) else None


def _stands_on(plan: PolicyPlan, stage: Stage) -> dict[str, str | None]:
    """Name the records of the stages that a stage needs."""
    found = {label: read_record(plan, plan.stage(label)) for label in stage.needs}
    return {label: None if one is None else str(one["id"]) for label, one in found.items()}


def render_plan(plan: PolicyPlan) -> str:
    """Say which stages there are, and what is done of them."""
    lines = []
    for number, stage in enumerate(plan.stages, 1):
        record = read_record(plan, stage)
        if record is not None:
            state = f"done {record['ended_at']}"
        elif changes := _changes(plan, stage):
            state = f"to do again: {', '.join(changes)}"
        else:
            state = "to do"
        lines.append(f"{number:>3} of {len(plan.stages)}  {stage.label:<40} {state}")
    return "\n".join(lines)


class PolicyStudyRun:
    """One start of a study, used as a context manager.

    Args:
        plan: the checked study.

    Raises:
        SetupError: on entry, if another start is still at work, or MLflow's store cannot be used.

    Attributes:
        done: records by label, of the stages that are done.
        failed: what went wrong by label, of those that ended otherwise or could not begin.
        exit_code: the job's, after the context has ended.
    """

    def __init__(self, plan: PolicyPlan) -> None:
        self.exit_code = FAILED
        self._plan, self._begun = plan, dt.datetime.now(dt.UTC)
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self._carried_out = 0
        self._tracker = RunTracker(
            plan.config.tracking,
            plan.config.warehouse,
            run_name=plan.config.study,
            config=plan.config.model_dump(mode="json"),
            tags={"cdr.job": "policy_study", "cdr.study": plan.config.study},
            note=plan.output / RUN_NOTE,
        )

    def __enter__(self) -> Self:
        for folder in ("stages", "configs", "logs"):
            (self._plan.output / folder).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # First: the MLflow run is that of the start which is at work.
            self._lock = stack.enter_context(work_alone(self._plan.output))
            stack.enter_context(self._tracker)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._open.__exit__(kind, error, trace)
        if isinstance(error, Stopped):
            self.exit_code = STOPPED
            print(f"\nstopped: {error}. {KEPT}")
        return isinstance(error, Stopped)

    def carry_out(self, command_of: Callable[[Stage], Sequence[str]]) -> None:
        """Carry out what is not done; a row that fails does not keep others from theirs.

        Args:
            command_of: gives a stage's command, to which config and options are added.

        Raises:
            SetupError: a program cannot be run.
            Stopped: a signal came, or a stage was stopped.
        """
        stages = self._plan.stages
        with Children(self._lock) as children:
            for number, stage in enumerate(stages, 1):
                if children.stopped:
                    raise Stopped(children.stopped)
                print(f"[{number} of {len(stages)}] {stage.row}: {stage.name}", end="", flush=True)
                if (record := read_record(self._plan, stage)) is not None:
                    self.done[stage.label] = record
                    print(", done before", flush=True)
                elif missing := [label for label in stage.needs if label not in self.done]:
                    self.failed[stage.label] = f"not begun, as {', '.join(missing)} is not done"
                    print(f", {self.failed[stage.label]}", flush=True)
                else:
                    self._start(stage, children, command_of)

    def _start(
        self, stage: Stage, children: Children, command_of: Callable[[Stage], Sequence[str]]
    ) -> None:
        plan, log = self._plan, _file(self._plan, stage, "logs", "log")
        changes = _changes(plan, stage)
        print(f", again: {', '.join(changes)}" if changes else "")
        print(f"    log: {log}", flush=True)
        config = self._write_config(stage)
        command = [*command_of(stage), "--config", str(config), *stage.options]
        begun = time.monotonic()
        code = children.run(command, log)
        spent_s = time.monotonic() - begun
        if code == STOPPED or (children.stopped and code != OK):
            raise Stopped(children.stopped or f"{stage.label} was stopped")
        if code != OK or not (stage.result is None or stage.result.exists()):
            self.failed[stage.label] = f"exit code {code}; log: {log}"
            print(f"    failed after {spent_s / 60:.1f} minutes, exit code {code}; its last lines:")
            print("\n".join(f"    | {line}" for line in last_lines(log)), flush=True)
            return
        self.done[stage.label] = _record(plan, stage, spent_s)
        self._carried_out += 1
        print(f"    done in {spent_s / 60:.1f} minutes", flush=True)

    def finish(self, open_warehouse: Callable[[], Warehouse]) -> None:
        """Print, write and record the results there are, and decide the exit code.

        Args:
            open_warehouse: gives the tables; called when the results are printed.
        """
        plan, tracker = self._plan, self._tracker
        table = render_results(plan, self.done)
        file = plan.output / "table.txt"
        file.write_text(f"{table}\n", encoding="utf-8")
        tracker.log_summary(metrics_of(plan, self.done))
        tracker.log_file(file)
        # First: the tables may be out of reach meanwhile, and nothing that is known is lost by it.
        print(f"\n{table}\n")
        for label, problem in self.failed.items():
            print(f"failed      {label}: {problem}")
        self._write(open_warehouse())
        print(f"table       {file}, and policy_results in {plan.config.warehouse}")
        if command := tracker.ui_command():
            print(f"MLflow      {command}")
        self.exit_code = FAILED if self.failed else OK

    def _write(self, warehouse: Warehouse) -> None:
        config, values = self._plan.config, self._plan.config.model_dump(mode="json")
        log = RunLog(
            warehouse,
            RunRecord(
                run_id=new_run_id(),
                job="policy_study",
                dataset=config.study,
                reward_name=None,
                reward_key=None,
                config_hash=content_hash(values),
                config=json.dumps(redact(values), sort_keys=True),
                input_versions={},
                mlflow_run_id=self._tracker.run_id,
                started_at=self._begun,
            ),
        )
        rows = write_results(self._plan, self.done, warehouse, log.record.run_id)
        counts = {
            "stages": len(self._plan.stages),
            "stages_done": len(self.done),
            "stages_carried_out": self._carried_out,
            "stages_failed": len(self.failed),
            "results": rows,
        }
        problems = "; ".join(f"{label}: {problem}" for label, problem in self.failed.items())
        log.end("failed" if problems else "done", error=problems or None, counts=counts)

    def _write_config(self, stage: Stage) -> Path:
        """Write what a stage's job is given."""
        config = self._plan.config
        tracking = config.tracking.model_dump(mode="json")
        if config.tracking.enabled:
            uri = resolve_tracking_uri(config.tracking, config.warehouse)
            tracking |= {"uri": uri, "parent": self._tracker.run_id}
        tree = {**stage.config, "tracking": tracking}
        if stage.name in config.benchmarks:
            tree["training_run"] = self._training_run(stage)
        file = _file(self._plan, stage, "configs", "yaml")
        # A store's address may hold a password.
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return file

    def _training_run(self, stage: Stage) -> str | None:
        """Give the MLflow run that trained a stage's policy; None without one in this store."""
        for needed in map(self._plan.stage, stage.needs):
            note = Path(needed.config.get("output", "")) / RUN_NOTE
            if needed.name == TRAIN and note.exists():
                run_id = str(read_json(note)["run_id"])
                return run_id if self._tracker.has_run(run_id) else None
        return None


def _record(plan: PolicyPlan, stage: Stage, spent_s: float) -> dict[str, Any]:
    record = {
        "id": new_run_id(),
        "key": stage.key,
        "stands_on": _stands_on(plan, stage),
        "decisive": stage.decisive,
        "ended_at": f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC",
        "spent_s": round(spent_s, 1),
        "outcome": _read_outcome(stage),
    }
    write_json(_record_file(plan, stage), record)
    return record


def _read_outcome(stage: Stage) -> dict[str, Any]:
    """Take from a stage's result what the table of the study shows."""
    if stage.result is None:
        return {}
    found = read_json(stage.result)
    if stage.job != "train_simpo":
        return found
    best = found["points"][found["best"]]
    validation = (best["validation"] or {}).get(ALL_DOMAINS, {})
    return {
        "policy": str(Path(stage.config["output"]) / "policy"),
        "learning_rate": float(best["config"]["learning_rate"]),
        "beta": float(best["config"]["beta"]),
        "validation_accuracy": validation.get("accuracy"),
    }


def _changes(plan: PolicyPlan, stage: Stage) -> list[str]:
    """Say what has changed since a stage was last done."""
    if _record_file(plan, stage).exists():
        return ["what it stands on, or its result, is gone or new"]
    records = (plan.output / "stages").glob(f"{stage.label}.*.json")
    latest = max(records, key=lambda file: file.stat().st_mtime, default=None)
    if latest is None:
        return []
    before = dict(_leaves(read_json(latest)["decisive"]))
    now = dict(_leaves(json.loads(json.dumps(stage.decisive))))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    more = f"and {len(names) - _SHOWN_CHANGES} more" if len(names) > _SHOWN_CHANGES else None
    return [f"other {name}" for name in names[:_SHOWN_CHANGES]] + ([more] if more else [])


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}".lstrip("."))
    else:
        yield name, tree


def _file(plan: PolicyPlan, stage: Stage, folder: str, ending: str) -> Path:
    return plan.output / folder / f"{stage.label}.{ending}"


def _record_file(plan: PolicyPlan, stage: Stage) -> Path:
    return _file(plan, stage, "stages", f"{stage.key[:SHORT]}.json")
