"""Open a table that a user names; what is wrong with it is said before it costs anything.

Delta, Parquet or JSON lines, by path or catalog name, on any file system that Spark reads. Nothing
is guessed: a column must be there and hold what is expected, a file must be whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from cdr.config import SourceSpec
from cdr.errors import InputError
from cdr.files import hadoop_place
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


ARRAY = ColumnType("array", lambda kind: isinstance(kind, T.ArrayType))
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
            raise no_rows(place)
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


def no_rows(place: str) -> InputError:
    """Make the error of an input without a single row."""
    fix = "check input.path, and that what writes it has finished"
    return InputError("the input has no rows", where=place, fix=fix)


@contextmanager
def _opening(source: SourceSpec) -> Iterator[None]:
    """Make whatever Spark says against opening the input an error of the input."""
    try:
        with reading(source):
            yield
    except (PySparkException, Py4JJavaError) as error:
        if "UNABLE_TO_INFER_SCHEMA" in str(error):
            raise no_rows(source.place) from None
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
    example: str = "completion=response",
) -> None:
    """Refuse rows that lack a column or hold another type in it, naming all such columns.

    Nothing is cast: a struct or a number made into text would be scored like any other text.

    Args:
        rows: the input.
        expected: columns and what they must hold; a name that is None is not mapped.
        where: the input, for the message.
        fix: what to do about a wrong type, where it is known.
        example: how a name may be mapped, where one is missing.

    Raises:
        InputError: a column is missing or of another type.
    """
    named = [(name, kind) for name, kind in expected if name is not None]
    missing = [name for name, _ in named if name not in rows.columns]
    if missing:
        raise InputError(
            f"the input lacks the columns {missing}; it has {rows.columns}",
            where=where,
            fix=f"map your names, for example --set input.columns.{example}",
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


def refuse_mixed_json(
    spark: SparkSession, source: SourceSpec, rows: DataFrame, names: Sequence[str]
) -> None:
    """Refuse JSON that holds text in one line and an array in another, in one column.

    Spark makes text of such arrays and says nothing. Reads the file once more, as if all texts were
    arrays: only those that are do not become null. (Not found: one array with texts and arrays.)

    Args:
        spark: the session.
        source: where the input is; other formats have one type per column.
        rows: the input as it was read.
        names: its columns of text or messages; those that are not there are left out.

    Raises:
        InputError: a column holds both.
    """
    present = [name for name in names if name in rows.columns]
    if source.format != "json" or source.path is None or not present:
        return
    kinds = {name: _arrays_for_texts(rows.schema[name].dataType) for name in present}
    schema = T.StructType([T.StructField(name, kind) for name, kind in kinds.items()])
    probe = spark.read.schema(schema).json(source.path)
    found = [F.max(_has_array(F.col(f"`{n}`"), kind)).alias(n) for n, kind in kinds.items()]
    with reading(source):
        # One row: whether each column has such an array.
        mixed = probe.agg(*found).first()
    wrong = [name for name in present if mixed is not None and mixed[name]]
    if wrong:
        raise InputError(
            f"of the columns {wrong}, some lines hold text and others an array",
            where=source.place,
            fix="write all lines in one way: a prompt is text or messages, their content text",
        )


def _arrays_for_texts(kind: T.DataType) -> T.DataType:
    if isinstance(kind, T.ArrayType):
        return T.ArrayType(_arrays_for_texts(kind.elementType))
    if isinstance(kind, T.StructType):
        # A message; what else it may hold is not read.
        texts = [field for field in kind if field.name in ("role", "content")]
        return T.StructType([T.StructField(f.name, _arrays_for_texts(f.dataType)) for f in texts])
    return T.ArrayType(T.StringType())


def _has_array(value: Column, kind: T.DataType) -> Column:
    """Tell whether one of the arrays that `_arrays_for_texts` put there was read."""
    if isinstance(kind, T.ArrayType) and not isinstance(kind.elementType, T.StringType):
        inner = kind.elementType
        return F.coalesce(F.exists(value, lambda v: _has_array(v, inner)), F.lit(False))
    if isinstance(kind, T.StructType):
        fields = [_has_array(value.getField(field.name), field.dataType) for field in kind]
        return reduce(Column.__or__, fields, F.lit(False))
    return value.isNotNull()


def _exists(spark: SparkSession, place: str) -> bool:
    """Ask the file system that Spark would read from; a pattern exists when something fits it."""
    assert spark._jvm is not None
    path = spark._jvm.org.apache.hadoop.fs.Path(hadoop_place(place))
    files = path.getFileSystem(spark._jsparkSession.sessionState().newHadoopConf())
    # A name with brackets is a pattern, but may be meant as it stands.
    return bool(files.exists(path) or files.globStatus(path))


def _first_line(error: Exception) -> str:
    """Give what an error says, without Java's trace and Py4J's line above it."""
    said = str(error)
    if isinstance(error, Py4JJavaError):
        said = said.partition("\n: ")[2] or said
    return said.splitlines()[0]
