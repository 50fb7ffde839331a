"""Delete prompts by id through every table, with a receipt of what is gone and what is not yet.

A person's prompts stand in many places, under three kinds of key:

    by prompt_id     completions, rewards, preferences, unpaired, rejects, benchmark_pairs
    by prompt_hash   routes: the hash of the text, which another prompt_id may share
    by content       logprobs and verdicts: the hashes that a reward's `terms` name, shared likewise

Rows of the last two kinds go only if no other prompt's row uses them. Such rows are deleted first
and the rows that lead to them last, so that what a killed deletion has left, the same command finds
again.

A deleted row is out of the table at once, and out of its files only after a vacuum: old versions
still hold it. The receipt says which, and from when on a vacuum takes them; nothing here vacuums.
Delta's log never quotes an id or a text: it keeps bounds of hashes and run ids alone.

Report pages in `<warehouse>/reports` quote texts. Those of all runs over the prompts' datasets are
deleted, as it cannot be told which texts they quote; `jobs/report.py` builds them anew.

Not reached: the user's own input, exports, MLflow's artifacts, models trained on the rows, backups,
and staging folders of killed runs, which the receipt lists.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Literal

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cdr.config import TRIAL
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
    POLICY_RESULTS,
    REWARDS,
    ROUTES,
    RUNS,
    STUDY_PAIRS,
    TABLES,
    VERDICTS,
    Table,
)
from cdr.text_table import render_table
from cdr.warehouse import Warehouse

BY_ID = tuple(table for table in TABLES if {"dataset", "prompt_id"} <= set(table.names()))
"""Tables whose rows belong to one prompt_id of one dataset."""
NO_PROMPTS = (RUNS, BENCHMARK_RESULTS, STUDY_PAIRS, POLICY_RESULTS)
"""Tables that hold nothing of a prompt: configs, counts, versions and accuracies."""

_OWNER = ["dataset", "prompt_id"]
_FACT = (
    "struct<owner: struct<table: string, dataset: string, prompt_id: string, run_id: string>, "
    "prompt: struct<prompt_hash: string>, "
    "term: struct<model_key: string, prefix_hash: binary, completion_hash: binary>>"
)
_DERIVED_ID = re.compile(r"[0-9a-f]{64}")  # of a prompt without an id: its hash


@dataclass(frozen=True)
class Request:
    """What to forget.

    Args:
        prompt_ids: the prompts' ids.
        dataset: only there, and in its trials and its sampling's rejects (`NAME.limit-20`,
            `NAME.quick-200`, `NAME.prompts`); None: in every dataset.
        unclaimed: also delete log-probs, verdicts and routes that no row of any prompt uses. Whose
            they are cannot be told: those of candidates that have since changed, and those of a
            run that has not finished, which would have to score them again.
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
        log_gone_after: earliest time when Delta drops the log entries of these versions. Of their
            files they quote the least and greatest `cdr.tables.INDEXED`, and more where somebody
            has changed the table's `delta.dataSkippingStatsColumns`.
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
        unclaimed: log-probs, verdicts and routes that no row uses and whose prompt is unknown; they
            were deleted if that was asked for, and are in `rows` above then.
        unclaimed_deleted: whether they were.
        pages: report pages of runs over the prompts' datasets; deleted.
        mlflow_run_ids: MLflow runs over the prompts' datasets: their artifacts may quote texts.
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
    pages: list[str]
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
            lines += ["", f"{self.unclaimed:,} log-probs, verdicts and routes belong to no prompt "
                      f"any more, so it cannot be told whose they were; {fate}"]  # fmt: skip
        if self.pages:
            lines += ["", f"report pages of these datasets, {verb}: {len(self.pages):,}; "
                      "jobs/report.py builds one anew"]  # fmt: skip
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

        Each table is read once, the shared ones once more to be told apart.

        Raises:
            TableError: a table cannot be read.
        """
        facts = self._staging.write("facts", self._facts())
        owners = facts.where("owner IS NOT NULL").select("owner.*", "rows")
        self._keys = {
            LOGPROBS.name: self._sort_out(LOGPROBS, facts, "term"),
            VERDICTS.name: self._sort_out(VERDICTS, facts, "term"),
            ROUTES.name: self._sort_out(ROUTES, facts, "prompt"),
        }
        fates = self._count_fates()
        gone = ("goes", "unclaimed") if self._request.unclaimed else ("goes",)
        self._keys = {
            name: rows.where(F.col("fate").isin(*gone)).drop("fate").distinct()
            for name, rows in self._keys.items()
        }
        # The rows that others are found by come last (see the module's docstring).
        ordered = [table for table in BY_ID if table not in (COMPLETIONS, REWARDS)]
        mine = owners.select(*_OWNER).distinct()
        self._keys |= {table.name: mine for table in (*ordered, COMPLETIONS, REWARDS)}
        found = owners.agg(
            F.count_distinct("prompt_id").alias("prompts"),
            *[F.sum(F.when(F.col("table") == t.name, F.col("rows"))).alias(t.name) for t in BY_ID],
            F.collect_set("dataset").alias("datasets"),
        ).first()
        assert found is not None
        runs = self._runs_over(found["datasets"])
        shared = (LOGPROBS, VERDICTS, ROUTES)
        rows = {table.name: int(found[table.name] or 0) for table in BY_ID}
        rows |= {table.name: sum(fates[table.name, fate] for fate in gone) for table in shared}
        tables = []
        for table in self._tables():
            versions = [one.version for one in read_history(self._warehouse.delta(table).history())]
            tables.append(
                TableReceipt(
                    table=table.name,
                    place=self._warehouse.place(table),
                    rows=rows[table.name],
                    kept_shared=fates[table.name, "shared"],
                    version_before=versions[0],
                    oldest_version=versions[-1],
                )
            )
        return Receipt(
            receipt_id=self._id,
            outcome="planned",
            at=_utc(dt.datetime.now(dt.UTC)),
            prompt_ids_sha256=[hashlib.sha256(one.encode()).hexdigest() for one in self._ids],
            num_found=found["prompts"],
            dataset=self._request.dataset,
            tables=tables,
            unclaimed=sum(fates[table.name, "unclaimed"] for table in shared),
            unclaimed_deleted=self._request.unclaimed,
            pages=self._pages_of(runs),
            mlflow_run_ids=sorted(filter(None, runs.values())),
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
        # First: when the rows are gone, nothing tells any more which datasets the prompts were in.
        for page in plan.pages:
            files.delete(page)
        tables = []
        for planned in plan.tables:
            table = next(one for one in TABLES if one.name == planned.table)
            if planned.rows:
                self._delete(table)
                planned = self._after(table, planned)
            tables.append(planned)
        receipt = replace(plan, outcome="done", tables=tables)
        if left := self._tables_with_rows():
            raise TableError(
                f"{', '.join(repr(table.name) for table in left)} has rows of these prompts again: "
                "another run has written them",
                where=self._warehouse.place(left[0]),
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

    def _facts(self) -> DataFrame:
        """Gather what the rows of `BY_ID` say: whose they are, and which shared rows they use.

        Returns:
            One row per fact, which is in one of three columns: owner (of rows to forget: table,
            dataset, prompt_id, run_id), prompt (prompt_hash) and term (the key of `logprobs`); and
            rows (that say so), is_mine (of rows to forget) and is_others (of any other row).
        """
        spark = self._warehouse.spark
        asked = [(one, True) for one in self._ids]
        ids = F.broadcast(spark.createDataFrame(asked, "prompt_id string, is_asked boolean"))
        is_mine = F.coalesce(F.col("is_asked") & self._in_dataset(), F.lit(False))
        found = []
        for table in BY_ID:
            owner = F.struct(F.lit(table.name).alias("table"), *_OWNER, "run_id")
            facts = [F.array(_fact(owner=F.when(is_mine, owner)))]
            if "prompt_hash" in table.names():
                facts.append(F.array(_fact(prompt=F.struct("prompt_hash"))))
            elif "prompt" in table.names():
                hashed = prompt_hash(F.col("prompt")).alias("prompt_hash")
                facts.append(F.array(_fact(prompt=F.struct(hashed))))
            if "terms" in table.names():
                used = F.transform(
                    F.map_values("terms"),
                    lambda term: _fact(term=F.struct(*[term[n].alias(n) for n in LOGPROBS.key])),
                )
                facts.append(F.coalesce(used, F.array().cast(f"array<{_FACT}>")))
            rows = self._warehouse.read(table).join(ids, on="prompt_id", how="left")
            found.append(
                rows.select(is_mine.alias("is_mine"), F.explode(F.concat(*facts)).alias("fact"))
            )
        # An id that was derived is the prompt's hash: its route is found also without a row.
        derived = [(one,) for one in self._ids if _DERIVED_ID.fullmatch(one)]
        hashes = spark.createDataFrame(derived, "prompt_hash string")
        found.append(
            hashes.select(
                F.lit(True).alias("is_mine"), _fact(prompt=F.struct("prompt_hash")).alias("fact")
            )
        )
        return (
            _union(found)
            .select("is_mine", "fact.*")
            .groupBy("owner", "prompt", "term")
            .agg(
                F.count("*").alias("rows"),
                F.bool_or("is_mine").alias("is_mine"),
                F.bool_or(~F.col("is_mine")).alias("is_others"),
            )
        )

    def _sort_out(self, table: Table, facts: DataFrame, kind: str) -> DataFrame:
        """Stage the rows of a shared table that the prompts to forget use, or nobody does.

        Returns:
            The columns of the key that tell them apart, and fate: goes, shared or unclaimed.
        """
        used = facts.where(f"{kind} IS NOT NULL").select(f"{kind}.*", "is_mine", "is_others")
        keys = [name for name in used.columns if name in table.key]
        # Both answers to a judge's question name the one verdict on it.
        used = used.groupBy(*keys).agg(
            F.bool_or("is_mine").alias("is_mine"), F.bool_or("is_others").alias("is_others")
        )
        fate = (
            F.when(F.col("is_mine").isNull(), "unclaimed")
            .when(F.col("is_mine") & F.col("is_others"), "shared")
            .when(F.col("is_mine"), "goes")
        )
        rows = self._warehouse.read(table).select(*keys).join(used, on=keys, how="left")
        return self._staging.write(
            table.name, rows.select(*keys, fate.alias("fate")).where("fate IS NOT NULL")
        )

    def _count_fates(self) -> Counter[tuple[str, str]]:
        """Count the rows of the shared tables by table and fate."""
        frames = [rows.select(F.lit(n).alias("table"), "fate") for n, rows in self._keys.items()]
        counts = _union(frames).groupBy("table", "fate").agg(F.count("*").alias("rows"))
        return Counter({(row["table"], row["fate"]): row["rows"] for row in counts.collect()})

    def _in_dataset(self) -> Column:
        name = self._request.dataset
        if name is None:
            return F.lit(True)
        return F.col("dataset").rlike(rf"^{re.escape(name)}({TRIAL})?(\.prompts)?$")

    def _tables_with_rows(self) -> list[Table]:
        """Give the tables that still, or again, have rows to forget."""
        tables = self._tables()
        found = []
        for table in tables:
            keys = self._keys[table.name]
            rows = self._warehouse.read(table).join(keys, on=keys.columns, how="left_semi")
            found.append(rows.select(F.lit(table.name).alias("table")).limit(1))
        names = {row["table"] for row in _union(found).collect()}
        return [table for table in tables if table.name in names]

    def _delete(self, table: Table) -> None:
        keys = self._keys[table.name]
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

    def _after(self, table: Table, planned: TableReceipt) -> TableReceipt:
        now, retention = dt.datetime.now(dt.UTC), read_retention(self._warehouse, table)
        return replace(
            planned,
            version_after=self._warehouse.version(table),
            files_gone_after=_utc(now + dt.timedelta(hours=retention.files)),
            log_gone_after=_utc(now + dt.timedelta(hours=retention.log)),
        )

    def _runs_over(self, datasets: Sequence[str]) -> dict[str, str | None]:
        """Give the runs over these datasets, with MLflow's; rows name only the latest."""
        is_over = F.col("dataset").isin(list(datasets))
        if self._request.dataset is not None:  # also where earlier runs alone had the prompts
            is_over |= self._in_dataset()
        runs = self._warehouse.read(RUNS).where(is_over)
        found = runs.select("run_id", "mlflow_run_id").collect()
        return {row["run_id"]: row["mlflow_run_id"] for row in found}

    def _pages_of(self, run_ids: Iterable[str]) -> list[str]:
        folder = self._warehouse.reports
        names = Files(self._warehouse.spark).names(folder)
        # A page of several runs, which are over one dataset, begins with the first one's id.
        return [f"{folder}/{name}" for name in names if name.startswith(tuple(run_ids))]

    def _other_staging(self) -> list[str]:
        folder = f"{self._warehouse.root}/_staging"
        names = Files(self._warehouse.spark).names(folder)
        return [f"{folder}/{name}" for name in names if name != self._id]


def _fact(
    owner: Column | None = None, prompt: Column | None = None, term: Column | None = None
) -> Column:
    """Build one fact; what it does not say is null."""
    nothing = F.lit(None)
    return F.struct(
        (nothing if owner is None else owner).alias("owner"),
        (nothing if prompt is None else prompt).alias("prompt"),
        (nothing if term is None else term).alias("term"),
    ).cast(_FACT)


def _union(frames: Iterable[DataFrame]) -> DataFrame:
    return reduce(DataFrame.unionByName, frames)


def _utc(time: dt.datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
