"""The life of a SimPO search: the pairs it takes, its row in `runs`, its MLflow runs, its links.

`cdr.simpo` trains; this is what the first of its processes does around it. The table is read once:
the pairs lie in the output folder from then on, with the version they came from, so that a training
goes on from them whatever has happened to the table meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cdr.checkpoints import read_json
from cdr.child_jobs import work_alone
from cdr.config import JobSpec, content_hash
from cdr.errors import CdrError, ConfigError, InputError, TableError
from cdr.export import MANIFEST, PairSet, Target, export_pairs, find_pairs
from cdr.job_run import JobRun, Share
from cdr.redaction import redact
from cdr.runs import RunRecord, new_run_id
from cdr.simpo_config import PointConfig, PreferencesSpec, SimpoConfig
from cdr.simpo_report import ALL_DOMAINS, render_search
from cdr.staging import Staging
from cdr.tables import PREFERENCES
from cdr.tracking import RunTracker, TableVersion
from cdr.unreadable import explain_unreadable
from cdr.version_links import VERSION_TAG, link_version
from cdr.warehouse import Warehouse

RUN_NOTE = "mlflow-run.json"
"""File of an output folder that names the MLflow run of the search."""


class TrainingRun(JobRun):
    """One start of a search, used as a context manager by the first process.

    Entering it opens the MLflow run, takes the pairs and sets the links: what is wrong with store,
    table or folder shows before a model loads.

    Args:
        config: the search.
        warehouse: where the tables are.

    Attributes:
        pairs: the pairs of the search.
    """

    pairs: PairSet

    def __init__(self, config: SimpoConfig, warehouse: Warehouse) -> None:
        self._run_id = new_run_id()
        limits = JobSpec(
            max_hours=config.run.max_hours, max_rejected_fraction=config.run.max_rejected_fraction
        )
        staging = Staging(warehouse.spark, warehouse.root, self._run_id)
        super().__init__(warehouse, staging, limits)
        self._config = config
        self._output = Path(config.output)
        self._point: RunTracker | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """Where the pairs came from, for people."""
        pairs = self.pairs
        return {
            "warehouse": redact(self._warehouse.root),
            "preferences": f"version {pairs.version}, {pairs.pairs} pairs",
            "dataset": pairs.dataset,
            "reward": pairs.reward_version or pairs.reward_name,
            "reward key": pairs.reward_key,
            "selection key": pairs.selection_key,
            "annotate run": pairs.run_id,
            "annotate run in MLflow": pairs.mlflow_run_id or "none",
            "this run in MLflow": self._tracker.run_id or "none",
        }

    def _begin(self, stack: contextlib.ExitStack) -> RunRecord:
        config = self._config
        self.pairs, is_taken = self._find_pairs()
        pinned = config.preferences.model_copy(
            update={
                "reward": self.pairs.reward_key,
                "selection": self.pairs.selection_key,
                "version": self.pairs.version,
            }
        )
        values = config.model_copy(update={"preferences": pinned}).model_dump(mode="json")
        # What limits this start does not make another search.
        search = {key: value for key, value in values.items() if key not in ("run", "tracking")}
        self._output.mkdir(parents=True, exist_ok=True)
        # A launcher that is killed leaves its processes behind, at work on the same checkpoints.
        stack.enter_context(work_alone(self._output))
        self._tracker = stack.enter_context(
            RunTracker(
                config.tracking,
                self._warehouse.root,
                run_name=f"simpo {self.pairs.dataset} {self.pairs.reward_name}",
                config=search,
                tags=self._tags(),
                note=self._output / RUN_NOTE,
            )
        )
        self._link()
        if not is_taken:
            self._take_pairs()
        return RunRecord(
            run_id=self._run_id,
            job="train_simpo",
            dataset=self.pairs.dataset,
            reward_name=self.pairs.reward_name,
            reward_key=self.pairs.reward_key,
            config_hash=content_hash(values),
            config=json.dumps(
                redact({**values, "annotate_run_id": self.pairs.run_id}), sort_keys=True
            ),
            input_versions={"preferences": self.pairs.version},
            mlflow_run_id=self._tracker.run_id,
        )

    @contextlib.contextmanager
    def point(self, point: PointConfig) -> Iterator[None]:
        """Hold the MLflow run of one policy of the grid, nested in the search's."""
        values = dataclasses.asdict(point)
        folder = self._output / "points" / point.name
        folder.mkdir(parents=True, exist_ok=True)
        with RunTracker(
            self._config.tracking,
            self._warehouse.root,
            run_name=point.name,
            config=values,
            tags=self._tags(),
            parent=self._tracker,
            note=folder / RUN_NOTE,
        ) as self._point:
            yield

    def log_curves(self, numbers: Mapping[str, Any], step: int) -> None:
        """Add to the curves of the policy in training."""
        assert self._point is not None
        self._point.log_metrics(numbers, step=step)

    def log_point(self, metrics: Mapping[str, Any]) -> None:
        """Log how a policy does."""
        assert self._point is not None
        self._point.log_summary({name: metrics[name] for name in ("start", "validation")})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Print and record the result, and decide the exit code."""
        left_out = metrics["data"]["left_out_fraction"]
        limit = self._spec.max_rejected_fraction
        data = {name: metrics["data"][name] for name in ("train_pairs", "validation_pairs")}
        rejected = sum(sum(counts.values()) for counts in metrics["data"]["left_out"].values())
        counts = {**data, "pairs_rejected": rejected, "policies": len(metrics["points"])}
        self._conclude((Share("pairs", "rejected", left_out, limit),), counts)
        best = metrics["points"][metrics["best"]]
        everything = (best["validation"] or {}).get(ALL_DOMAINS, {})
        self._tracker.log_summary({"best": everything, **data, "pairs_rejected": rejected})
        self._tracker.set_tags(
            {
                "cdr.best": metrics["best"],
                "cdr.best_learning_rate": f"{best['config']['learning_rate']:g}",
                "cdr.best_beta": f"{best['config']['beta']:g}",
                "cdr.policy": str((self._output / "policy").absolute()),
            }
        )
        self._tracker.log_file(self._output / "policy" / "README.md")
        print(f"\n{render_search(metrics)}\n\npolicy: {self._output / 'policy'}")
        if command := self._tracker.ui_command():
            print(f"\n  {command}")

    def _find_pairs(self) -> tuple[PairSet, bool]:
        """Give the pairs of this output folder, and whether they lie there already.

        Raises:
            ConfigError: others do.
        """
        asked, manifest = self._config.preferences, self._output / "pairs" / MANIFEST
        if not manifest.exists():
            return self._look_up(asked), False
        source = read_json(manifest)["source"]
        fields = {field.name for field in dataclasses.fields(PairSet)}
        taken = PairSet(**{name: source[name] for name in fields})
        wanted = {
            "dataset": (asked.dataset, asked.dataset == taken.dataset),
            "reward": (
                asked.reward,
                asked.reward in (None, taken.reward_name)
                or taken.reward_key.startswith(asked.reward),
            ),
            "selection": (asked.selection, taken.selection_key.startswith(asked.selection or "")),
            "version": (asked.version, asked.version in (None, taken.version)),
        }
        there = {**dataclasses.asdict(taken), "reward": taken.reward_name}
        there["selection"] = taken.selection_key
        problems = [
            f"preferences.{name}: expected {there[name]!r} as in what lies there, got {given!r}"
            for name, (given, is_same) in wanted.items()
            if not is_same
        ]
        if source["table"] != self._warehouse.sql_name(PREFERENCES):
            problems.append(f"warehouse: the pairs that lie there are of {source['table']}")
        if problems:
            raise ConfigError(
                problems,
                where=str(manifest),
                fix="give the same to continue, or another output to start anew",
            )
        print(f"goes on with version {taken.version} of preferences, as taken before")
        return taken, True

    def _look_up(self, asked: PreferencesSpec) -> PairSet:
        try:
            return find_pairs(
                self._warehouse,
                dataset=asked.dataset,
                reward=asked.reward,
                selection=asked.selection,
                version=asked.version,
            )
        except InputError as error:
            fix = (error.fix or "").replace("--reward", "preferences.reward")
            fix = fix.replace("--selection", "preferences.selection")
            raise InputError(error.what, where=error.where, fix=fix or None) from None
        except CdrError:
            raise
        except Exception as error:  # Spark finds out while it reads
            explained = explain_unreadable(str(error))
            if explained is None:
                raise
            version = "the latest version" if asked.version is None else f"version {asked.version}"
            raise TableError(
                f"{version} of preferences cannot be read: {explained.what}",
                where=explained.where,
                fix="an old version's files go with a vacuum: leave preferences.version out for "
                "the latest one, or annotate again, which scores nothing that is stored",
            ) from None

    def _take_pairs(self) -> None:
        """Write the pairs to the output folder, by the split they are stored with."""
        folder = self._output / "pairs"
        shutil.rmtree(folder, ignore_errors=True)  # without a manifest it is not whole
        extra = ("prompt_id", "domain", "split")
        # Of this machine, whatever Spark takes a bare path for.
        target = Target(f"file:{folder.absolute()}", extra=extra)
        manifest = export_pairs(self._warehouse, self.pairs, target)
        print(manifest.render(str(folder)))

    def _tags(self) -> dict[str, str]:
        pairs = self.pairs
        tags = {
            "cdr.job": "train_simpo",
            "cdr.warehouse": self._warehouse.root,
            "cdr.dataset": pairs.dataset,
            "cdr.reward_name": pairs.reward_name,
            "cdr.reward_key": pairs.reward_key,
            "cdr.selection_key": pairs.selection_key,
            "cdr.preferences_version": str(pairs.version),
            "cdr.annotate_run_id": pairs.run_id,
        }
        if pairs.mlflow_run_id is not None:
            tags["cdr.annotate_mlflow_run_id"] = pairs.mlflow_run_id
        if pairs.reward_version is not None:
            tags[VERSION_TAG] = pairs.reward_version
        return tags

    def _link(self) -> None:
        """Record what was read; name this search in the annotate run and the reward behind it."""
        place = self._warehouse.place(PREFERENCES)
        self._tracker.log_table(
            TableVersion("preferences", place, self.pairs.version), role="input"
        )
        link_version(self._tracker, self.pairs.reward_version, job="train_simpo")
        annotate = self.pairs.mlflow_run_id
        if self._tracker.run_id is None or annotate is None:
            return
        if self._tracker.has_run(annotate):
            link = {f"cdr.training.{self._tracker.run_id}": self._run_id}
            self._tracker.set_tags(link, run_id=annotate)
            self._tracker.link(
                annotate, self.pairs.run_id, is_our="Annotate run", are_its="SimPO training"
            )
        else:
            print(f"note: this MLflow store lacks the annotate run {annotate}; it gets no link")
