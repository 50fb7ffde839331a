"""The warehouse: every table's schema, a checked way to read it, an atomic way to write it.

A schema is declared once here, with a comment per column that Delta stores and
`docs/reference/tables.md` is generated from (`python -m cdr.tables`). Tables carry
a schema version; another one is refused. A table lives at `<warehouse>/<name>` unless the config
gives it another path or a catalog name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, DataFrameWriter, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from cdr.commits import MAX_TRIES, commit
from cdr.errors import TableError

if TYPE_CHECKING:
    from delta.tables import DeltaTable

SCHEMA_VERSION = 1
_VERSION_PROPERTY = "cdr.schemaVersion"

MESSAGES = T.ArrayType(
    T.StructType([T.StructField("role", T.StringType()), T.StructField("content", T.StringType())])
)


@dataclass(frozen=True)
class Table:
    """A table's contract.

    Args:
        name: plural noun; also the folder.
        grain: what one row stands for.
        key: columns that identify a row.
        columns: name, Spark type (DDL) and comment, in order.
        partitioned_by: columns the files are split by.
    """

    name: str
    grain: str
    key: tuple[str, ...]
    columns: tuple[tuple[str, str, str], ...]
    partitioned_by: tuple[str, ...] = ()

    def schema(self) -> T.StructType:
        """Give the Spark schema, comments in the field metadata."""
        return T.StructType(
            [
                T.StructField(name, T._parse_datatype_string(ddl), True, {"comment": comment})
                for name, ddl, comment in self.columns
            ]
        )

    def names(self) -> list[str]:
        """Give the column names in order."""
        return [name for name, _, _ in self.columns]


_DDL_MESSAGES = "array<struct<role: string, content: string>>"

ROUTES = Table(
    "routes",
    "prompt × router",
    ("prompt_hash", "router_key"),
    (
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("router_key", "string", "Hash of router model, prompt, labels, threshold"),
        ("domain", "string", "Domain the prompt was given"),
        ("confidence", "double", "Softmax share of the likeliest label, 0 to 1; null: no scores"),
        ("label_logprobs", "map<string, double>", "Log-prob per domain label, nats"),
        ("domain_source", "string", "router, or fallback (not sure, or prompt too long)"),
        ("run_id", "string", "Run that wrote the row"),
    ),
)

LOGPROBS = Table(
    "logprobs",
    "model × prefix × completion; only scored rows, appended once and never changed",
    ("model_key", "prefix_hash", "completion_hash"),
    (
        ("model_key", "string", "Hash of weights, adapter, dtype, head dtype and engine"),
        ("prefix_hash", "binary", "First 16 bytes of the sha256 of the prefix's int32 token ids"),
        ("completion_hash", "binary", "The same of the completion's token ids"),
        ("logprob_sum", "double", "Sum of the completion's token log-probs, nats"),
        ("num_tokens", "int", "Tokens of the completion, end-of-turn token included"),
        ("num_prefix_tokens", "int", "Tokens of the prefix"),
        ("token_logprobs", "array<float>", "Log-prob per token, nats; null unless asked for"),
        ("engine_version", "string", "Versions of the engine's packages"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("model_key",),
)

REWARDS = Table(
    "rewards",
    "completion × reward × dataset",
    ("dataset", "reward_key", "prompt_id", "completion_id"),
    (
        ("dataset", "string", "Name of the set of completions"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("prompt_id", "string", "The input's id, or derived from the prompt's content"),
        ("completion_id", "string", "The input's id, or derived from the completion's content"),
        ("reward_name", "string", "Name of the reward configuration"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("prompt", _DDL_MESSAGES, "Messages as given"),
        ("completion", "string", "The candidate's text"),
        ("finish_reason", "string", "As given; `length` means it was cut; null: not given"),
        ("domain", "string", "Domain whose instruction conditioned the prompt"),
        ("domain_source", "string", "router, column, fixed, fallback or none"),
        ("domain_confidence", "double", "Router's confidence, 0 to 1; null without a router"),
        ("instruction_id", "string", "Instruction drawn from the pack; null: prompt untouched"),
        ("exemplar_id", "string", "Exemplar drawn from the pack; null: none"),
        ("exemplar_dropped", "boolean", "The exemplar was left out because the prompt was long"),
        ("reward", "double", "Weighted sum of the terms, nats; null unless status is ok"),
        ("strong_logprob", "double", "First positive term's log-prob sum, nats"),
        ("weak_logprob", "double", "First negative term's log-prob sum, nats; null: none"),
        ("num_tokens", "int", "Completion tokens of the first term's model"),
        ("rank", "int", "1 for the prompt's highest reward; ties share a rank; null: no reward"),
        ("boundary_merged", "boolean", "The tokenizer would merge text across the boundary"),
        (
            "terms",
            "map<string, struct<model_key: string, prefix_hash: binary, completion_hash: binary, "
            "logprob_sum: double, num_tokens: int>>",
            "Every term by `model/condition`, with the key of its row in logprobs",
        ),
        ("passthrough", "string", "The input's other columns as JSON; null: none"),
        ("status", "string", "ok, or failed (tried again by the next run)"),
        ("error", "string", "Why it failed; null when ok"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key"),
)

PREFERENCES = Table(
    "preferences",
    "pair",
    ("dataset", "reward_key", "selection_key", "prompt_id"),
    (
        ("dataset", "string", "Name of the set of completions"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("selection_key", "string", "Hash of the rule that chose the pair"),
        ("prompt_id", "string", "The prompt's id"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("prompt", _DDL_MESSAGES, "Messages as given"),
        ("chosen", _DDL_MESSAGES, "Exactly one assistant message"),
        ("rejected", _DDL_MESSAGES, "Exactly one assistant message"),
        ("chosen_id", "string", "completion_id of the chosen candidate"),
        ("rejected_id", "string", "completion_id of the rejected candidate"),
        ("chosen_reward", "double", "Reward of the chosen candidate, nats"),
        ("rejected_reward", "double", "Reward of the rejected candidate, nats"),
        ("margin", "double", "chosen_reward − rejected_reward, nats, > 0"),
        ("chosen_strong_logprob", "double", "First positive term's sum for chosen, nats"),
        ("chosen_weak_logprob", "double", "First negative term's sum for chosen, nats"),
        ("rejected_strong_logprob", "double", "First positive term's sum for rejected, nats"),
        ("rejected_weak_logprob", "double", "First negative term's sum for rejected, nats"),
        ("chosen_num_tokens", "int", "Tokens of the chosen candidate"),
        ("rejected_num_tokens", "int", "Tokens of the rejected candidate"),
        ("num_candidates", "int", "Distinct usable candidates of the prompt"),
        ("length_fallback", "boolean", "No candidate lay in the length window; nearest was taken"),
        ("domain", "string", "Domain of the prompt"),
        ("split", "string", "train or validation, by hash of the prompt alone"),
        ("reward_name", "string", "Name of the reward configuration"),
        ("mlflow_run_id", "string", "MLflow run of the annotation; null: tracking was off"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key", "selection_key"),
)

UNPAIRED = Table(
    "unpaired",
    "prompt without a pair",
    ("dataset", "reward_key", "selection_key", "prompt_id"),
    (
        ("dataset", "string", "Name of the set of completions"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("selection_key", "string", "Hash of the rule that chose the pairs"),
        ("prompt_id", "string", "The prompt's id"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("domain", "string", "Domain of the prompt"),
        ("num_candidates", "int", "Distinct usable candidates of the prompt"),
        (
            "reason",
            "string",
            "one_candidate, tie, below_min_margin or outside_length_window",
        ),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key", "selection_key"),
)

REJECTS = Table(
    "rejects",
    "rejected input row",
    ("dataset", "source_row"),
    (
        ("dataset", "string", "Name of the set of completions"),
        (
            "source_row",
            "string",
            "sha256 hex of the completion_id, where given, and `row`; `-2`, `-3`, … behind it for "
            "equal rows",
        ),
        ("stage", "string", "validate or encode"),
        ("reason", "string", "One of the enumerated reasons"),
        ("detail", "string", "What exactly, without the text itself"),
        ("prompt_id", "string", "The prompt's id; null when there is none"),
        ("completion_id", "string", "The completion's id; null when there is none"),
        ("row", "string", "The input row as JSON, with this one of its completions"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset",),
)

RUNS = Table(
    "runs",
    "job run",
    ("run_id",),
    (
        ("run_id", "string", "Identifier of the run"),
        ("job", "string", "annotate, generate, ..."),
        ("dataset", "string", "Name of the set of completions"),
        ("reward_name", "string", "Name of the reward configuration"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("config_hash", "string", "Hash of the resolved config"),
        ("config", "string", "The resolved config as JSON"),
        ("input_versions", "map<string, bigint>", "Delta version read per input; empty: not Delta"),
        ("outcome", "string", "running, done, stopped, over_threshold or failed"),
        ("error", "string", "Why it failed; null otherwise"),
        ("counts", "map<string, bigint>", "Prompts, candidates, rows per status, tokens, pairs"),
        ("waves_done", "int", "Waves committed"),
        ("waves_total", "int", "Waves planned"),
        ("mlflow_run_id", "string", "MLflow run; null: tracking was off"),
        ("started_at", "timestamp", "Start, UTC"),
        ("ended_at", "timestamp", "End, UTC; null while running, or when the run was killed"),
    ),
)

COMPLETIONS = Table(
    "completions",
    "sampled candidate (written by jobs/generate.py; any table of the user's may take its place)",
    ("dataset", "prompt_id", "completion_id"),
    (
        ("dataset", "string", "Name of this set of completions"),
        ("prompt_id", "string", "The prompt's id"),
        ("completion_id", "string", "The prompt's id and the number of the sample"),
        ("domain", "string", "The input's domain column; null: none"),
        ("prompt", _DDL_MESSAGES, "Messages as given"),
        ("completion", "string", "The sampled text"),
        ("finish_reason", "string", "stop (ended by itself) or length (cut)"),
        ("num_tokens", "int", "Tokens of the completion"),
        ("seed", "bigint", "Seed of this sample"),
        ("sampling_key", "string", "Hash of model, template and sampling parameters"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset",),
)

TABLES: tuple[Table, ...] = (
    COMPLETIONS, ROUTES, LOGPROBS, REWARDS, PREFERENCES, UNPAIRED, REJECTS, RUNS
)  # fmt: skip


class Warehouse:
    """The tables of one warehouse.

    Args:
        spark: the session.
        root: folder or URI of the warehouse.
        places: other places per table name: a path (has a `/`) or a catalog name.
    """

    def __init__(
        self, spark: SparkSession, root: str, places: Mapping[str, str] | None = None
    ) -> None:
        unknown = sorted(set(places or {}) - {table.name for table in TABLES})
        if unknown:
            raise TableError(
                f"no such table: {', '.join(unknown)}",
                where="tables in the config",
                fix=f"known tables: {', '.join(table.name for table in TABLES)}",
            )
        self.spark = spark
        self.root = root.rstrip("/")
        self._places = dict(places or {})
        self._checked: set[str] = set()

    def place(self, table: Table) -> str:
        """Give the path or catalog name of a table."""
        return self._places.get(table.name, f"{self.root}/{table.name}")

    def sql_name(self, table: Table) -> str:
        """Give what stands behind FROM in a query over the table; Delta wants a full path there."""
        place = self.place(table)
        return (
            f"delta.`{self._qualified(place).removeprefix('file:')}`" if _is_path(place) else place
        )

    def exists(self, table: Table) -> bool:
        """Tell whether the table has been written."""
        from delta.tables import DeltaTable

        place = self.place(table)
        if _is_path(place):
            return bool(DeltaTable.isDeltaTable(self.spark, place))
        return bool(self.spark.catalog.tableExists(place))

    def read(self, table: Table, *, version: int | None = None) -> DataFrame:
        """Read a table; an empty frame of the right schema where it does not exist yet.

        Args:
            table: the table.
            version: Delta version to read; None for the latest.

        Raises:
            TableError: the table has another schema version, or lacks columns; there is no such
                Delta version, or it has been vacuumed away.
        """
        if not self.exists(table):
            return self.spark.createDataFrame([], table.schema())
        rows = self.delta(table).toDF() if version is None else self._at_version(table, version)
        return rows.select(*table.names())

    def read_one_per_key(self, table: Table) -> DataFrame:
        """Read a table with one row per key: two runs at once may both have written a key."""
        first = Window.partitionBy(*table.key).orderBy("run_id")
        rows = self.read(table).withColumn("_nth", F.row_number().over(first))
        return rows.where("_nth = 1").drop("_nth")

    def append(self, table: Table, rows: DataFrame) -> None:
        """Append rows in one atomic commit, creating the table when it is new.

        Raises:
            TableError: the table has another schema version, or other runs' writes came first each
                time (`cdr.commits`).
        """
        self._commit(table, lambda: self._writer(table, rows).mode("append"), MAX_TRIES)

    def replace(
        self, table: Table, rows: DataFrame, *, max_tries: int = MAX_TRIES, **values: str
    ) -> None:
        """Replace the rows whose columns have these values, in one atomic commit.

        Args:
            table: the table, created when it is new.
            rows: they must not be computed from the rows that they replace.
            max_tries: tries in all when other runs' writes come first (`cdr.commits`).
            values: what the columns are in the rows to replace; `rows` have the same.

        Raises:
            TableError: the table has another schema version, or the last try came too late.
        """
        condition = " AND ".join(f"`{name}` = '{_quoted(v)}'" for name, v in values.items())

        def writer() -> DataFrameWriter:
            overwrite = self._writer(table, rows).mode("overwrite")
            return overwrite.option("replaceWhere", condition)

        self._commit(table, writer, max_tries)

    def delta(self, table: Table) -> DeltaTable:
        """Open an existing table for what Delta knows of it: its details and its history.

        Raises:
            TableError: there is none, or it has another schema version, or lacks columns.
        """
        self._check(table)
        return self._delta(table)

    def change(self, table: Table, operation: Callable[[DeltaTable], object]) -> None:
        """Carry out an operation of Delta's on an existing table, in one atomic commit.

        Args:
            table: the table.
            operation: it commits once or not at all, and is right whatever the table holds by then
                (`cdr.commits`), as a deletion by key or a compaction is.

        Raises:
            TableError: as `delta`, or other runs' writes came first each time.
        """

        def write() -> None:
            operation(self.delta(table))

        commit(write, table=table.name, lock=self._lock(table))

    def schema_version(self, table: Table) -> str | None:
        """Give the schema version that an existing table says it has; None: a foreign table."""
        detail = self._delta(table).detail().select("properties").first()
        found: str | None = (detail["properties"] if detail else {}).get(_VERSION_PROPERTY)
        return found

    def set_schema_version(self, table: Table, version: int) -> None:
        """Note on an existing table that its columns are now those of this schema version."""
        self.spark.sql(
            f"ALTER TABLE {self.sql_name(table)} "
            f"SET TBLPROPERTIES ('{_VERSION_PROPERTY}' = '{version}')"
        )
        self._checked.discard(table.name)

    def version(self, table: Table) -> int | None:
        """Give the latest Delta version; None where the table does not exist."""
        if not self.exists(table):
            return None
        row = self._delta(table).history(1).select("version").first()
        return None if row is None else int(row["version"])

    def _commit(
        self, table: Table, make_writer: Callable[[], DataFrameWriter], max_tries: int
    ) -> None:
        def write() -> None:
            try:
                self._create(table)
                self._save(table, make_writer())
            except Exception:
                # Another run may have created or changed the table: the next try checks it anew.
                self._checked.discard(table.name)
                raise

        commit(write, table=table.name, lock=self._lock(table), max_tries=max_tries)

    def _lock(self, table: Table) -> Path | None:
        """Give the lock file of a table in a local folder.

        None elsewhere, and for catalog names: a catalog that several processes can open is not one
        of a single machine's disk.
        """
        place = self.place(table)
        if not _is_path(place):
            return None
        place = self._qualified(place)
        if not place.startswith("file:"):
            return None
        folder = Path(place.removeprefix("file:"))
        return folder.parent / "_locks" / folder.name

    def _qualified(self, place: str) -> str:
        """Give a path with its file system and in full, as `file:/data/warehouse/runs`."""
        jvm = self.spark._jvm
        assert jvm is not None
        path = jvm.org.apache.hadoop.fs.Path(place)
        files = path.getFileSystem(self.spark._jsc.hadoopConfiguration())
        return str(files.makeQualified(path).toString())

    def _writer(self, table: Table, rows: DataFrame) -> DataFrameWriter:
        missing = [name for name in table.names() if name not in rows.columns]
        if missing:
            raise TableError(f"{table.name}: rows lack the columns {missing}")
        typed = [F.col(name).cast(field.dataType).alias(name) for name, field in zip(
            table.names(), table.schema(), strict=True)]  # fmt: skip
        return rows.select(*typed).write.format("delta")

    def _save(self, table: Table, writer: DataFrameWriter) -> None:
        place = self.place(table)
        if _is_path(place):
            writer.save(place)
        else:
            writer.saveAsTable(place)

    def _create(self, table: Table) -> None:
        from delta.tables import DeltaTable

        if table.name in self._checked:
            return
        if self.exists(table):
            self._check(table)
            return
        place = self.place(table)
        # Not "if not exists": a table that another run has just created is to be checked.
        builder = DeltaTable.create(self.spark)
        if _is_path(place):
            # Delta takes a relative location for a name of the catalog.
            is_whole = place.startswith("/") or ":/" in place
            builder = builder.location(place if is_whole else self._qualified(place))
        else:
            builder = builder.tableName(place)
        builder = builder.addColumns(table.schema()).comment(table.grain)
        builder = builder.property(_VERSION_PROPERTY, str(SCHEMA_VERSION))
        if table.partitioned_by:
            builder = builder.partitionedBy(*table.partitioned_by)
        builder.execute()
        self._checked.add(table.name)

    def _check(self, table: Table) -> None:
        if table.name in self._checked:
            return
        found = self.schema_version(table)
        if found != str(SCHEMA_VERSION):
            raise TableError(
                f"table '{table.name}' has schema version {found or 'none'}, "
                f"this program reads and writes version {SCHEMA_VERSION}",
                where=self.place(table),
                fix="older tables: jobs/maintain.py migrate; else another warehouse, or the "
                "program's version that wrote this one",
            )
        present = self._delta(table).toDF().columns
        missing = [name for name in table.names() if name not in present]
        if missing:
            raise TableError(
                f"table '{table.name}' lacks the columns {missing}; it has {present}",
                where=self.place(table),
                fix="use another warehouse",
            )
        self._checked.add(table.name)

    def _at_version(self, table: Table, version: int) -> DataFrame:
        self._check(table)
        place = self.place(table)
        reader = self.spark.read.option("versionAsOf", version)
        try:
            return reader.format("delta").load(place) if _is_path(place) else reader.table(place)
        except AnalysisException as error:
            raise TableError(
                f"version {version} of the table '{table.name}' cannot be read: "
                f"{str(error).splitlines()[0]}",
                where=place,
                fix=f"DESCRIBE HISTORY {self.sql_name(table)} lists the versions",
            ) from None

    def _delta(self, table: Table) -> DeltaTable:
        from delta.tables import DeltaTable

        place = self.place(table)
        try:
            if _is_path(place):
                return DeltaTable.forPath(self.spark, place)
            return DeltaTable.forName(self.spark, place)
        except AnalysisException as error:
            raise TableError(
                f"table '{table.name}' cannot be read: {str(error).splitlines()[0]}", where=place
            ) from None


def _is_path(place: str) -> bool:
    return "/" in place


def _quoted(value: str) -> str:
    """Guard a literal in a SQL condition; names are checked in the config as well."""
    if not re.fullmatch(r"[\w.\-]+", value):
        raise TableError(f"not a plain name: {value!r}")
    return value


def render_reference() -> str:
    """Render `docs/reference/tables.md` from the schemas."""
    lines = [
        "# Tables",
        "",
        "Generated from `cdr/tables.py` by `python -m cdr.tables`; do not edit.",
        "",
        f"Schema version {SCHEMA_VERSION}, kept in each table's property `{_VERSION_PROPERTY}`.",
    ]
    for table in TABLES:
        lines += ["", f"## `{table.name}`", "", f"One row per {table.grain}.", ""]
        lines += [f"Key: {', '.join(f'`{column}`' for column in table.key)}."]
        if table.partitioned_by:
            lines[-1] += f" Partitioned by {', '.join(f'`{c}`' for c in table.partitioned_by)}."
        lines += ["", "| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | `{ddl}` | {comment} |" for name, ddl, comment in table.columns]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_reference(), end="")
