"""Delete prompts by id through every table, with a receipt of what is gone and what is not yet.

A person's prompts stand in many places, under three kinds of key:

    by prompt_id     completions, rewards, preferences, unpaired, rejects, benchmark_pairs
    by prompt_hash   routes: the hash of the text, which another prompt_id may share
    by token ids     logprobs: the hashes that a reward's `terms` name, shared likewise

Rows of the last two kinds go only if no other prompt's row uses them. Such rows are deleted first
and the rows that lead to them last, so that what a killed deletion has left, the same command finds
again.

A deleted row is out of the table at once, and out of its files only after a vacuum: old versions
still hold it. The receipt says which, and from when on a vacuum takes them; nothing here vacuums.

Not reached: the user's own input, exports, MLflow's artifacts, models trained on the rows, backups,
and staging folders of killed runs, which the receipt lists.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Literal

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cdr.errors import InputError, TableError
from cdr.files import Files
from cdr.inputs import prompt_hash
from cdr.maintenance import read_history, read_retention
from cdr.runs import new_run_id
from cdr.staging import Staging
from cdr.tables import (
    BENCHMARK_RESULTS,
    COMPLETIONS,
    LOGPROBS,
    REWARDS,
    ROUTES,
    RUNS,
    STUDY_PAIRS,
    TABLES,
    Table,
)
from cdr.text_table import render_table
from cdr.warehouse import Warehouse

BY_ID = tuple(table for table in TABLES if {"dataset", "prompt_id"} <= set(table.names()))
"""Tables whose rows belong to one prompt_id of one dataset."""
NO_PROMPTS = (RUNS, BENCHMARK_RESULTS, STUDY_PAIRS)
"""Tables that hold nothing of a prompt: configs, counts, versions and accuracies."""

_OWNER = ["dataset", "prompt_id"]
_DERIVED_ID = re.compile(r"[0-9a-f]{64}")  # of a prompt without an id: its hash


@dataclass(frozen=True)
class Request:
    """What to forget.

    Args:
        prompt_ids: the prompts' ids.
        dataset: only there, and in its trials and its sampling's rejects (`NAME.limit-20`,
            `NAME.prompts`); None: in every dataset.
        unclaimed: also delete log-probs and routes that no row of any prompt uses. Whose they are
            cannot be told: those of candidates that have since changed, and those of a run that has
            not finished, which would have to score them again.
    """

    prompt_ids: Sequence[str]
    dataset: str | None = None
    unclaimed: bool = False


@dataclass(frozen=True)
class TableReceipt:
    """What became of one table.

    Args:
        table: its name.
        place: path or catalog name.
        rows: deleted.
        kept_shared: rows that the prompts use as well as others do, and that were left.
        version_before: Delta version before the deletion.
        version_after: Delta version after it; null where nothing was to delete.
        oldest_version: oldest version that may still be readable. All from there to version_before
            may hold the rows.
        files_gone_after: earliest time when a vacuum that keeps what the table's retention asks for
            deletes them; null where nothing was deleted.
        log_gone_after: earliest time when Delta drops the log entries of these versions, which
            quote the least and greatest values of their files (of text, the first 32 characters).
    """

    table: str
    place: str
    rows: int
    kept_shared: int = 0
    version_before: int | None = None
    version_after: int | None = None
    oldest_version: int | None = None
    files_gone_after: str | None = None
    log_gone_after: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What was forgotten; `<warehouse>/_receipts/<receipt_id>.json` has these fields.

    Args:
        receipt_id: also the file's name; sorts by time.
        outcome: `planned`, `begun` (cut off, if it stays so: run it again) or `done`.
        at: when, UTC.
        prompt_ids_sha256: hashes of the ids, so that it can be shown later that one was among them,
            and the receipt does not keep what was to be forgotten.
        num_found: ids that stood in a table.
        dataset: as asked; null: all.
        tables: what became of each.
        unclaimed: log-probs and routes that no row uses and whose prompt is unknown; they were
            deleted if that was asked for, and are in `rows` above then.
        unclaimed_deleted: whether they were.
        mlflow_run_ids: MLflow runs of the deleted pairs: their artifacts may quote texts.
        staging_folders: of other runs, alive or killed; they may hold rows of the input.
    """

    receipt_id: str
    outcome: Literal["planned", "begun", "done"]
    at: str
    prompt_ids_sha256: list[str]
    num_found: int
    dataset: str | None
    tables: list[TableReceipt]
    unclaimed: int
    unclaimed_deleted: bool
    mlflow_run_ids: list[str]
    staging_folders: list[str]

    @property
    def num_rows(self) -> int:
        """Rows deleted, or to be deleted, in all tables."""
        return sum(table.rows for table in self.tables)

    def render(self) -> str:
        """Write it for a terminal."""
        asked = len(self.prompt_ids_sha256)
        where = "every dataset" if self.dataset is None else f"dataset '{self.dataset}'"
        verb = "deleted" if self.outcome == "done" else "to delete"
        header = ("table", verb, "shared, kept", "version", "old versions with the rows",
                  "vacuum takes them after")  # fmt: skip
        rows = [
            (
                table.table,
                table.rows,
                table.kept_shared,
                table.version_before
                if table.version_after is None
                else f"{table.version_before} -> {table.version_after}",
                f"{table.oldest_version} to {table.version_before}" if table.rows else None,
                table.files_gone_after,
            )
            for table in self.tables
        ]
        lines = [f"{self.num_found:,} of {asked:,} prompt ids have rows, in {where}", ""]
        lines += render_table(header, rows)
        if self.unclaimed:
            fate = "deleted too" if self.unclaimed_deleted else "--unclaimed deletes them too"
            lines += ["", f"{self.unclaimed:,} log-probs and routes belong to no prompt any more, "
                      f"so it cannot be told whose they were; {fate}"]  # fmt: skip
        return "\n".join(lines)


class Forgetting:
    """One deletion, used as a context manager: what is to go is worked out once and staged.

    Args:
        warehouse: where the tables are.
        request: what to forget.

    Raises:
        InputError: there are no ids.
    """

    def __init__(self, warehouse: Warehouse, request: Request) -> None:
        if not request.prompt_ids:
            raise InputError("no prompt ids are given", fix="--prompt-id ID, or --prompt-ids-file")
        self._warehouse, self._request = warehouse, request
        self._ids = sorted(set(request.prompt_ids))
        self._id = new_run_id()
        self._staging = Staging(warehouse.spark, warehouse.root, self._id)
        self._keys: dict[str, DataFrame] = {}

    def __enter__(self) -> Forgetting:
        self._staging.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._staging.__exit__(*error)

    def plan(self) -> Receipt:
        """Work out what is to go, and count it; nothing is deleted.

        Raises:
            TableError: a table cannot be read.
        """
        ids = self._warehouse.spark.createDataFrame(
            [(one,) for one in self._ids], "prompt_id string"
        )
        owners = [self._rows(table).join(ids, on="prompt_id", how="left_semi").select(*_OWNER)
                  for table in BY_ID]  # fmt: skip
        mine = self._stage("owners", _union(owners).where(self._in_dataset()))
        routes, routes_kept, routes_unclaimed = self._split_keys(
            "routes", self._routes(mine, "left_semi", own_ids=True), self._routes(mine, "left_anti")
        )
        logprobs, logprobs_kept, logprobs_unclaimed = self._split_keys(
            "logprobs", self._terms(mine, "left_semi"), self._terms(mine, "left_anti")
        )
        # The rows that others are found by come last (see the module's docstring).
        ordered = [table for table in BY_ID if table not in (COMPLETIONS, REWARDS)]
        self._keys = {LOGPROBS.name: logprobs, ROUTES.name: routes}
        self._keys |= {table.name: mine for table in (*ordered, COMPLETIONS, REWARDS)}
        kept = {LOGPROBS.name: logprobs_kept, ROUTES.name: routes_kept}
        tables = [
            TableReceipt(
                table=table.name,
                place=self._warehouse.place(table),
                rows=self._matching(table, self._keys[table.name]).count(),
                kept_shared=kept.get(table.name, 0),
                version_before=self._warehouse.version(table),
                oldest_version=self._oldest_version(table),
            )
            for table in self._tables()
        ]
        return Receipt(
            receipt_id=self._id,
            outcome="planned",
            at=_utc(dt.datetime.now(dt.UTC)),
            prompt_ids_sha256=[hashlib.sha256(one.encode()).hexdigest() for one in self._ids],
            # As many rows as ids were given, at most.
            num_found=mine.select("prompt_id").distinct().count(),
            dataset=self._request.dataset,
            tables=tables,
            unclaimed=logprobs_unclaimed + routes_unclaimed,
            unclaimed_deleted=self._request.unclaimed,
            mlflow_run_ids=self._mlflow_runs(mine),
            staging_folders=self._other_staging(),
        )

    def carry_out(self, plan: Receipt) -> Receipt:
        """Delete what was planned, look whether it is gone, and write the receipt.

        Args:
            plan: from `plan`.

        Raises:
            TableError: a table cannot be written, or another run has written rows of the prompts
                meanwhile. The receipt then stays `begun`.
        """
        files = Files(self._warehouse.spark)
        folder = f"{self._warehouse.root}/_receipts"
        files.make_folder(folder)
        self._write(files, replace(plan, outcome="begun"))
        tables = []
        for planned in plan.tables:
            table = next(one for one in TABLES if one.name == planned.table)
            if planned.rows:
                self._delete(table)
                planned = self._after(table, planned)
            tables.append(planned)
        receipt = replace(plan, outcome="done", tables=tables)
        for table in self._tables():
            left = self._matching(table, self._keys[table.name])
            if not left.isEmpty():
                raise TableError(
                    f"'{table.name}' has rows of these prompts again: another run has written them",
                    where=self._warehouse.place(table),
                    fix="take the prompts out of the input, stop the runs, and forget once more",
                )
        self._write(files, receipt)
        return receipt

    @property
    def receipt_file(self) -> str:
        """Where the receipt is written."""
        return f"{self._warehouse.root}/_receipts/forget-{self._id}.json"

    def _write(self, files: Files, receipt: Receipt) -> None:
        files.write_text(self.receipt_file, json.dumps(asdict(receipt), indent=2) + "\n")

    def _tables(self) -> list[Table]:
        """Give the tables that exist, in the order in which to delete."""
        by_name = {table.name: table for table in TABLES}
        return [by_name[name] for name in self._keys if self._warehouse.exists(by_name[name])]

    def _rows(self, table: Table) -> DataFrame:
        return self._warehouse.read(table)

    def _stage(self, name: str, keys: DataFrame) -> DataFrame:
        return self._staging.write(name, keys.distinct())

    def _in_dataset(self) -> Column:
        name = self._request.dataset
        if name is None:
            return F.lit(True)
        return F.col("dataset").rlike(rf"^{re.escape(name)}(\.limit-\d+)?(\.prompts)?$")

    def _routes(self, mine: DataFrame, how: str, *, own_ids: bool = False) -> DataFrame:
        """Give the prompt hashes of the prompts to forget, or of all others."""
        found = []
        for table in BY_ID:
            rows = self._rows(table)
            if "prompt_hash" in table.names():
                hashed = rows.select(*_OWNER, "prompt_hash")
            elif "prompt" in table.names():
                hashed = rows.select(*_OWNER, prompt_hash(F.col("prompt")).alias("prompt_hash"))
            else:
                continue
            found.append(hashed.join(mine, on=_OWNER, how=how).select("prompt_hash"))
        if own_ids:
            derived = [(one,) for one in self._ids if _DERIVED_ID.fullmatch(one)]
            found.append(self._warehouse.spark.createDataFrame(derived, "prompt_hash string"))
        return _union(found)

    def _terms(self, mine: DataFrame, how: str) -> DataFrame:
        """Give the keys of log-probs that the prompts to forget use, or all others."""
        rows = self._rows(REWARDS).select(*_OWNER, "terms").join(mine, on=_OWNER, how=how)
        terms = rows.select(F.explode(F.map_values("terms")).alias("term"))
        return terms.select(*(f"term.{name}" for name in LOGPROBS.key))

    def _split_keys(
        self, name: str, own: DataFrame, others: DataFrame
    ) -> tuple[DataFrame, int, int]:
        """Stage the keys that go.

        Returns:
            The keys; how many rows are shared and stay; how many no row claims.
        """
        table = {"routes": ROUTES, "logprobs": LOGPROBS}[name]
        own, others = self._stage(f"{name}.own", own), self._stage(f"{name}.others", others)
        columns = own.columns
        keys = own.join(others, on=columns, how="left_anti")
        shared = own.join(others, on=columns, how="left_semi")
        claimed = own.unionByName(others)
        unclaimed = self._rows(table).join(claimed, on=columns, how="left_anti").select(*columns)
        unclaimed = self._stage(f"{name}.unclaimed", unclaimed)
        num_unclaimed = self._matching(table, unclaimed).count()
        if self._request.unclaimed:
            keys = keys.unionByName(unclaimed)
        return keys, self._matching(table, shared).count(), num_unclaimed

    def _matching(self, table: Table, keys: DataFrame) -> DataFrame:
        return self._rows(table).join(keys, on=keys.columns, how="left_semi")

    def _delete(self, table: Table) -> None:
        keys = self._keys[table.name].distinct()
        # A merge, not DELETE ... IN: the log keeps every condition, and with it the ids.
        condition = " AND ".join(f"t.`{name}` = k.`{name}`" for name in keys.columns)
        self._warehouse.change(
            table,
            lambda delta: (
                delta.alias("t").merge(keys.alias("k"), condition).whenMatchedDelete().execute()
            ),
        )
        detail = self._warehouse.delta(table).detail().select("tableFeatures").first()
        if "deletionVectors" in ((detail["tableFeatures"] if detail else None) or []):
            # The rows are only marked in files that are still the table's, which no vacuum takes.
            name = self._warehouse.sql_name(table)
            spark = self._warehouse.spark
            self._warehouse.change(table, lambda _: spark.sql(f"REORG TABLE {name} APPLY (PURGE)"))

    def _oldest_version(self, table: Table) -> int:
        return read_history(self._warehouse.delta(table).history())[-1].version

    def _after(self, table: Table, planned: TableReceipt) -> TableReceipt:
        now, retention = dt.datetime.now(dt.UTC), read_retention(self._warehouse, table)
        return replace(
            planned,
            version_after=self._warehouse.version(table),
            files_gone_after=_utc(now + dt.timedelta(hours=retention.files)),
            log_gone_after=_utc(now + dt.timedelta(hours=retention.log)),
        )

    def _mlflow_runs(self, mine: DataFrame) -> list[str]:
        runs = self._rows(RUNS).where("mlflow_run_id IS NOT NULL")
        rewards = self._matching(REWARDS, mine).select("run_id")
        # One row per annotate run that wrote these prompts.
        found = runs.join(rewards, on="run_id", how="left_semi").select("mlflow_run_id")
        return sorted(row[0] for row in found.distinct().collect())

    def _other_staging(self) -> list[str]:
        folder = f"{self._warehouse.root}/_staging"
        names = Files(self._warehouse.spark).names(folder)
        return [f"{folder}/{name}" for name in names if name != self._id]


def _union(frames: Iterable[DataFrame]) -> DataFrame:
    return reduce(DataFrame.unionByName, frames)


def _utc(time: dt.datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
