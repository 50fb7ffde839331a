"""The warehouse: a checked way to read a table, an atomic way to write it.

A table lives at `<warehouse>/<name>` unless the config gives it another path or a catalog name. Its
schema is that of `cdr.tables`; a table of another schema version is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, DataFrameWriter, SparkSession, Window
from pyspark.sql import functions as F

from cdr.commits import MAX_TRIES, commit
from cdr.errors import TableError
from cdr.files import Files
from cdr.tables import SCHEMA_VERSION, TABLES, VERSION_PROPERTY, Table

if TYPE_CHECKING:
    from delta.tables import DeltaTable


class Warehouse:
    """The tables of one warehouse.

    Args:
        spark: the session.
        root: folder or URI of the warehouse; a path without a scheme is made full, since it is kept
            in MLflow and in manifests, which are read from elsewhere.
        places: other places per table name: a path (has a `/`), made full too, or a catalog name.
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
        self.root = self._in_full(root.rstrip("/"))
        self._places = {
            name: self._in_full(place) if _is_path(place) else place
            for name, place in (places or {}).items()
        }
        self._checked: set[str] = set()

    @property
    def reports(self) -> str:
        """Folder of the report pages; the name of each begins with its first run's id."""
        return f"{self.root}/reports"

    def place(self, table: Table) -> str:
        """Give the path or catalog name of a table."""
        return self._places.get(table.name, f"{self.root}/{table.name}")

    def sql_name(self, table: Table) -> str:
        """Give what stands behind FROM in a query over the table; Delta wants a full path there."""
        place = self.place(table)
        return f"delta.`{re.sub('^file:/+', '/', place)}`" if _is_path(place) else place

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
            # Spark knows that there are no rows, as it does not of an empty list: it plans none.
            null = F.lit(None)
            fields = [null.cast(field.dataType).alias(field.name) for field in table.schema()]
            return self.spark.range(1).where(F.lit(False)).select(*fields)
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
        found: str | None = (detail["properties"] if detail else {}).get(VERSION_PROPERTY)
        return found

    def set_schema_version(self, table: Table, version: int) -> None:
        """Note on an existing table that its columns are now those of this schema version."""
        self.spark.sql(
            f"ALTER TABLE {self.sql_name(table)} "
            f"SET TBLPROPERTIES ('{VERSION_PROPERTY}' = '{version}')"
        )
        self._checked.discard(table.name)

    def version(self, table: Table) -> int | None:
        """Give the latest Delta version; None where the table does not exist."""
        place = self.place(table)
        if _is_path(place):
            return Files(self.spark).delta_version(place)
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
        place = self.place(table).removeprefix("file:")
        if not place.startswith("/"):
            return None
        folder = Path(place)
        return folder.parent / "_locks" / folder.name

    def _in_full(self, place: str) -> str:
        """Give a place in full: with its file system, but for a local path, which is left bare."""
        if re.match(r"^([A-Za-z][\w+.\-]*:|/Volumes/)", place):
            return place
        jvm = self.spark._jvm
        assert jvm is not None
        path = jvm.org.apache.hadoop.fs.Path(place)
        files = path.getFileSystem(self.spark._jsc.hadoopConfiguration())
        return str(files.makeQualified(path).toString()).removeprefix("file:")

    def _writer(self, table: Table, rows: DataFrame) -> DataFrameWriter:
        missing = [name for name in table.names() if name not in rows.columns]
        if missing:
            raise TableError(
                f"{table.name}: rows lack the columns {missing}",
                fix="a stage and cdr/tables.py disagree: an error of this package, report it",
            )
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
        builder = builder.location(place) if _is_path(place) else builder.tableName(place)
        builder = builder.addColumns(table.schema()).comment(table.grain)
        builder = builder.property(VERSION_PROPERTY, str(SCHEMA_VERSION))
        builder = builder.property("delta.dataSkippingStatsColumns", ",".join(table.indexed()))
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
                f"table '{table.name}' cannot be read: {str(error).splitlines()[0]}",
                where=place,
                fix="a first run writes it (jobs/annotate.py); if one has, check `warehouse` and "
                "`tables`",
            ) from None


def _is_path(place: str) -> bool:
    return "/" in place


def _quoted(value: str) -> str:
    """Guard a literal in a SQL condition; names are checked in the config as well."""
    if not re.fullmatch(r"[\w.\-]+", value):
        raise TableError(
            f"not a plain name: {value!r}", fix="use letters, digits and the characters . _ -"
        )
    return value
