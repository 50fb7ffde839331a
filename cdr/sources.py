"""Open a table that a user names; what is wrong with it is said before it costs anything.

Delta, Parquet or JSON lines, by path or catalog name, on any file system that Spark reads. Nothing
is guessed: a column must be there and hold what is expected, a file must be whole. Looks at schemas
and folders on the driver, at no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from cdr.config import SourceSpec
from cdr.errors import InputError
from cdr.unreadable import explain_unreadable


@dataclass(frozen=True)
class ColumnType:
    """What a column may hold.

    Args:
        name: as a message says it.
        fits: tells whether a Spark type is that.
    """

    name: str
    fits: Callable[[T.DataType], bool]


def array_of(item: ColumnType) -> ColumnType:
    """Give the type of an array of such items."""
    return ColumnType(
        f"array<{item.name}>",
        lambda kind: isinstance(kind, T.ArrayType) and item.fits(kind.elementType),
    )


def _is_messages(kind: T.DataType) -> bool:
    if not isinstance(kind, T.ArrayType) or not isinstance(kind.elementType, T.StructType):
        return False
    fields = {field.name: field.dataType for field in kind.elementType}
    return all(isinstance(fields.get(name), T.StringType) for name in ("role", "content"))


TEXT = ColumnType("string", lambda kind: isinstance(kind, T.StringType))
IDENTIFIER = ColumnType(
    "string or integer", lambda kind: isinstance(kind, T.StringType | T.IntegralType)
)
PROMPT = ColumnType(
    "string or array<struct<role: string, content: string>>",
    lambda kind: TEXT.fits(kind) or _is_messages(kind),
)


def input_version(spark: SparkSession, source: SourceSpec) -> int | None:
    """Give the Delta version that is read; None where the input is not Delta.

    Raises:
        InputError: it is missing or unreadable.
    """
    if source.format != "delta":
        return None
    if source.version is not None:
        return source.version
    from delta.tables import DeltaTable

    read_source(spark, source)  # says what is wrong with it
    with _opening(source):
        if source.path:
            table = DeltaTable.forPath(spark, source.path)
        else:
            table = DeltaTable.forName(spark, str(source.table))
        row = table.history(1).select("version").first()
    return None if row is None else int(row["version"])


def read_source(spark: SparkSession, source: SourceSpec) -> DataFrame:
    """Read a table as it is.

    Raises:
        InputError: it is missing, or not readable in its format.
    """
    place = source.place
    reader = spark.read
    if source.version is not None:
        reader = reader.option("versionAsOf", source.version)
    if source.format == "json":
        # A line that is not JSON must end the run, not become a row of nulls.
        reader = reader.option("mode", "FAILFAST")
    with _opening(source):
        if source.table is not None:
            return reader.table(source.table)
        if not _exists(spark, place):
            fix = "check input.path, and that Spark may look into the folders above it"
            raise InputError("the input does not exist", where=place, fix=fix)
        frame = reader.format(source.format).load(place)
        # Schemas are read lazily; a folder of another format shows itself only now.
        if not frame.schema.fields:
            raise InputError("the input has no rows", where=place)
    return frame


@contextmanager
def reading(source: SourceSpec) -> Iterator[None]:
    """Make Spark's error about a file of the input one that names the file and the remedy.

    Spark looks into most files only when rows are asked for: whatever does that belongs in here.

    Raises:
        InputError: a file is damaged, gone, or may not be read.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        known = explain_unreadable(str(error), place=source.place)
        if known is None:
            raise
        raise known from None


@contextmanager
def _opening(source: SourceSpec) -> Iterator[None]:
    """Make whatever Spark says against opening the input an error of the input."""
    try:
        with reading(source):
            yield
    except (PySparkException, Py4JJavaError) as error:
        if "UNABLE_TO_INFER_SCHEMA" in str(error):
            raise InputError("the input has no rows", where=source.place) from None
        raise InputError(
            f"the input cannot be read as {source.format}: {_first_line(error)}",
            where=source.place,
            fix="check input.path, input.format and input.version",
        ) from None


def check_columns(
    rows: DataFrame,
    expected: Sequence[tuple[str | None, ColumnType]],
    where: str,
    *,
    fix: str | None = None,
) -> None:
    """Refuse rows that lack a column or hold another type in it, naming all such columns.

    Nothing is cast: a struct or a number made into text would be scored like any other text.

    Args:
        rows: the input.
        expected: columns and what they must hold; a name that is None is not mapped.
        where: the input, for the message.
        fix: what to do about a wrong type, where it is known.

    Raises:
        InputError: a column is missing or of another type.
    """
    named = [(name, kind) for name, kind in expected if name is not None]
    missing = [name for name, _ in named if name not in rows.columns]
    if missing:
        raise InputError(
            f"the input lacks the columns {missing}; it has {rows.columns}",
            where=where,
            fix="map your names, for example --set input.columns.completion=response",
        )
    found = [(name, rows.schema[name].dataType, kind) for name, kind in named]
    wrong = [
        f"column '{name}' is {given.simpleString()}, expected {kind.name}"
        for name, given, kind in found
        if not kind.fits(given)
    ]
    if wrong:
        fix = fix or "convert it, or map another column"
        raise InputError("\n".join(wrong), where=where, fix=fix)


def _exists(spark: SparkSession, place: str) -> bool:
    """Ask the file system that Spark would read from; a pattern exists when something fits it."""
    assert spark._jvm is not None
    path = spark._jvm.org.apache.hadoop.fs.Path(place)
    files = path.getFileSystem(spark._jsparkSession.sessionState().newHadoopConf())
    # A name with brackets is a pattern, but may be meant as it stands.
    return bool(files.exists(path) or files.globStatus(path))


def _first_line(error: Exception) -> str:
    """Give what an error says, without Java's trace and Py4J's line above it."""
    said = str(error)
    if isinstance(error, Py4JJavaError):
        said = said.partition("\n: ")[2] or said
    return said.splitlines()[0]
