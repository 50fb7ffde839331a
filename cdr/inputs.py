"""Read a user's prompts and completions, whatever their shape, into one row per candidate.

Input: Delta, Parquet or JSON lines; a row per completion, an array per prompt, two columns A/B,
or completions joined with prompts. Output of `read_candidates`, one row per candidate:

    prompt_id, prompt_hash, prompt (messages), completion_id, completion, finish_reason,
    given_domain, passthrough (JSON of the input's other columns), row (JSON of the whole row),
    source_row (its sha256), reason and detail (null for rows that can be scored)

No row is dropped: `reason` marks those that cannot be used. All of it is Spark SQL; nothing is
collected and nothing but schemas is looked at on the driver.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from cdr.config import ColumnsSpec, InputSpec, SourceSpec
from cdr.errors import InputError, RejectReason
from cdr.tables import MESSAGES

ROLES = ("system", "user", "assistant")

NOT_BLANK = r"\S"
"""What a prompt or completion must hold: a visible character."""

_URI = re.compile(r"^[A-Za-z][\w+.\-]+:")


def read_candidates(
    spark: SparkSession, source: InputSpec, *, domains: Sequence[str] | None = None
) -> DataFrame:
    """Read the input as one row per candidate, with a reason on those that cannot be used.

    Args:
        spark: the session.
        source: where the input is and how its columns are called.
        domains: the pack's domains; a `given_domain` outside them is refused. None: not checked.

    Raises:
        InputError: the input is missing, unreadable, empty, or lacks a column.
    """
    rows = _read_rows(spark, source)
    if rows.isEmpty():
        raise InputError("the input has no rows", where=source.place)
    return _validate(_to_candidates(rows, source), domains)


def input_version(spark: SparkSession, source: SourceSpec) -> int | None:
    """Give the Delta version that is read; None where the input is not Delta."""
    if source.format != "delta":
        return None
    if source.version is not None:
        return source.version
    from delta.tables import DeltaTable

    read_source(spark, source)  # says what is wrong with it
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
    if source.path is not None and not _URI.match(place) and not Path(place).exists():
        raise InputError("the input does not exist", where=place, fix="check input.path")
    reader = spark.read
    if source.version is not None:
        reader = reader.option("versionAsOf", source.version)
    if source.format == "json":
        # A line that is not JSON must end the run, not become a row of nulls.
        reader = reader.option("mode", "FAILFAST")
    try:
        if source.table is not None:
            return reader.table(source.table)
        frame = reader.format(source.format).load(place)
        # Schemas are read lazily; a folder of another format shows itself only now.
        frame.schema  # noqa: B018
        return frame
    except AnalysisException as error:
        raise InputError(
            f"the input cannot be read as {source.format}: {str(error).splitlines()[0]}",
            where=place,
            fix="check input.path, input.format and input.version",
        ) from None


def messages_column(rows: DataFrame, name: str) -> Column:
    """Give a prompt column, text or messages, as messages; null where it is null."""
    prompt = F.col(f"`{name}`")
    if isinstance(rows.schema[name].dataType, T.StringType):
        turn = F.struct(F.lit("user").alias("role"), prompt.alias("content"))
        return F.when(prompt.isNotNull(), F.array(turn)).cast(MESSAGES)
    # By name: JSON sorts the fields of a struct.
    return F.transform(
        prompt,
        lambda m: F.struct(
            m["role"].cast("string").alias("role"), m["content"].cast("string").alias("content")
        ),
    ).cast(MESSAGES)


def optional_column(name: str | None) -> Column:
    """Give a column; null where the config says that the input has none."""
    return F.lit(None) if name is None else F.col(f"`{name}`")


def prompt_hash(messages: Column) -> Column:
    """Hash messages: sha256 hex over `role:characters:content` of each, in order."""
    pieces = F.transform(
        messages,
        lambda m: F.concat(
            m["role"], F.lit(":"), F.length(m["content"]).cast("string"), F.lit(":"), m["content"]
        ),
    )
    return F.sha2(F.concat_ws("", pieces), 256)


def _read_rows(spark: SparkSession, source: InputSpec) -> DataFrame:
    completions = read_source(spark, source)
    if source.layout != "joined":
        return completions
    # A version is the completions' own; prompts are read as they are now.
    only = {"path": source.prompts_path, "table": None, "version": None}
    prompts = read_source(spark, source.model_copy(update=only))
    key = str(source.columns.prompt_id)
    for frame, name in ((completions, source.place), (prompts, str(source.prompts_path))):
        if key not in frame.columns:
            raise InputError(_lacks([key], frame.columns), where=name, fix=_columns_fix())
    if prompts.groupBy(key).count().where("count > 1").limit(1).count():
        raise InputError(
            f"the prompts have the same {key} more than once", where=str(source.prompts_path)
        )
    repeated = [c for c in prompts.columns if c in completions.columns and c != key]
    return completions.join(prompts.drop(*repeated), on=key, how="left")


def _lacks(missing: Sequence[str], present: Sequence[str]) -> str:
    return f"the input lacks the columns {list(missing)}; it has {list(present)}"


def _columns_fix() -> str:
    return "map your names, for example --set input.columns.completion=response"


def _to_candidates(rows: DataFrame, source: InputSpec) -> DataFrame:
    names = source.columns
    _check_columns(rows, source)
    as_json = F.to_json(F.struct(*[rows[f"`{c}`"] for c in rows.columns]))
    other = [c for c in rows.columns if c not in _mapped(names, source.layout)]
    passthrough = F.to_json(F.struct(*[rows[f"`{c}`"] for c in other])) if other else F.lit(None)
    frame = rows.select(
        optional_column(names.prompt_id).cast("string").alias("prompt_id"),
        _messages(rows, names).alias("prompt"),
        optional_column(names.domain).cast("string").alias("given_domain"),
        _completions(source).alias("_many"),
        passthrough.cast("string").alias("passthrough"),
        as_json.alias("row"),
        F.sha2(as_json, 256).alias("source_row"),
    )
    # An empty array keeps its row (as a null completion), so that it is counted and rejected.
    return frame.select("*", F.explode_outer("_many").alias("_one")).select(
        "prompt_id",
        "prompt",
        "given_domain",
        "passthrough",
        "row",
        "source_row",
        F.col("_one.completion_id").alias("completion_id"),
        F.col("_one.completion").alias("completion"),
        F.col("_one.finish_reason").alias("finish_reason"),
    )


def _mapped(names: ColumnsSpec, layout: str) -> set[str]:
    mapped = {value for value in names.model_dump().values() if value is not None}
    return mapped if layout == "ab" else mapped - {names.completion_b}


def _check_columns(rows: DataFrame, source: InputSpec) -> None:
    names, where = source.columns, source.place
    needed = [names.prompt, names.completion]
    if source.layout == "ab":
        needed.append(names.completion_b)
    needed += [
        name
        for name in (
            names.prompt_id, names.completion_id, names.finish_reason, names.system, names.domain
        )
        if name is not None
    ]  # fmt: skip
    missing = [name for name in needed if name not in rows.columns]
    if missing:
        raise InputError(_lacks(missing, rows.columns), where=where, fix=_columns_fix())
    is_array = isinstance(rows.schema[names.completion].dataType, T.ArrayType)
    if is_array != (source.layout == "array"):
        raise InputError(
            f"column '{names.completion}' is {'an' if is_array else 'not an'} array, "
            f"but input.layout is '{source.layout}'",
            where=where,
            fix=f"--set input.layout={'array' if is_array else 'long'}",
        )
    kind = rows.schema[names.prompt].dataType
    if not isinstance(kind, T.StringType) and not _is_messages(kind):
        raise InputError(
            f"column '{names.prompt}' must be a string or array<struct<role, content>>, "
            f"got {kind.simpleString()}",
            where=where,
        )


def _is_messages(kind: T.DataType) -> bool:
    return (
        isinstance(kind, T.ArrayType)
        and isinstance(kind.elementType, T.StructType)
        and {"role", "content"} <= set(kind.elementType.names)
    )


def _messages(rows: DataFrame, names: ColumnsSpec) -> Column:
    messages = messages_column(rows, names.prompt)
    if names.system is None:
        return messages
    system = F.col(f"`{names.system}`")
    first = F.array(F.struct(F.lit("system").alias("role"), system.alias("content")))
    with_system = F.when(system.rlike(NOT_BLANK), F.concat(first.cast(MESSAGES), messages))
    return F.coalesce(with_system, messages)


def _completions(source: InputSpec) -> Column:
    """Give an array of (completion_id, completion, finish_reason) for any layout."""
    names = source.columns

    def candidate(text: Column, identifier: Column, finish: Column) -> Column:
        return F.struct(
            identifier.cast("string").alias("completion_id"),
            text.cast("string").alias("completion"),
            finish.cast("string").alias("finish_reason"),
        )

    text, identifier = F.col(f"`{names.completion}`"), optional_column(names.completion_id)
    finish = optional_column(names.finish_reason)
    if source.layout == "array":
        # Parallel arrays: ids and finish reasons, where given, go by position.
        return F.transform(
            text,
            lambda item, i: candidate(
                item,
                F.get(identifier, i) if names.completion_id else identifier,
                F.get(finish, i) if names.finish_reason else finish,
            ),
        )
    if source.layout == "ab":
        second = F.col(f"`{names.completion_b}`")
        return F.array(candidate(text, F.lit("a"), finish), candidate(second, F.lit("b"), finish))
    return F.array(candidate(text, identifier, finish))


def _validate(candidates: DataFrame, domains: Sequence[str] | None) -> DataFrame:
    messages, text = F.col("prompt"), F.col("completion")
    last = F.element_at(messages, -1)
    blank_user = (last["role"] == "user") & ~last["content"].rlike(NOT_BLANK)
    bad_roles = ~F.coalesce(F.forall(messages, lambda m: m["role"].isin(*ROLES)), F.lit(False))
    no_content = F.exists(messages, lambda m: m["content"].isNull())
    hashed = candidates.withColumn(
        "prompt_hash", F.when(F.col("prompt").isNotNull(), prompt_hash(messages))
    )
    # Ids that the input lacks are derived from content; a repeated text gets its number behind.
    named = hashed.withColumn("prompt_id", F.coalesce("prompt_id", "prompt_hash"))
    same = Window.partitionBy("prompt_id", "completion_id", "completion").orderBy("source_row")
    derived = F.concat(
        F.substring(F.sha2("completion", 256), 1, 32),
        F.when(F.col("_nth") > 1, F.concat(F.lit("-"), F.col("_nth").cast("string"))).otherwise(""),
    )
    named = named.withColumn("_nth", F.row_number().over(same)).withColumn(
        "_given_id", F.col("completion_id").isNotNull()
    )
    named = named.withColumn("completion_id", F.coalesce("completion_id", derived))
    one_prompt = (
        F.col("prompt_hash") if domains is None else F.struct("prompt_hash", "given_domain")
    )
    per_prompt = Window.partitionBy("prompt_id")
    per_id = Window.partitionBy("prompt_id", "completion_id").orderBy("completion", "source_row")
    counted = named.withColumn(
        "_prompts", F.size(F.collect_set(one_prompt).over(per_prompt))
    ).withColumn("_with_id", F.row_number().over(per_id))
    rules: list[tuple[Column, RejectReason, str]] = [
        (messages.isNull(), RejectReason.NULL_PROMPT, "the prompt is null"),
        (F.size(messages) == 0, RejectReason.EMPTY_PROMPT, "the prompt has no messages"),
        (bad_roles, RejectReason.BAD_MESSAGES, f"roles must be among {', '.join(ROLES)}"),
        (no_content, RejectReason.BAD_MESSAGES, "a message has no content"),
        (last["role"] != "user", RejectReason.BAD_MESSAGES, "the last message must be the user's"),
        (blank_user, RejectReason.EMPTY_PROMPT, "the last message is empty"),
        (text.isNull(), RejectReason.NULL_COMPLETION, "the completion is null"),
        (~text.rlike(NOT_BLANK), RejectReason.EMPTY_COMPLETION, "the completion is empty"),
        (
            F.col("_prompts") > 1,
            RejectReason.DUPLICATE_ID,
            "this prompt_id stands for more than one prompt or domain",
        ),
        (
            F.col("_given_id") & (F.col("_with_id") > 1),
            RejectReason.DUPLICATE_ID,
            "this completion_id was given before for this prompt",
        ),
    ]
    if domains is not None:
        unknown = F.col("given_domain").isNull() | ~F.col("given_domain").isin(*domains)
        known = f"the domain must be one of {', '.join(domains)}"
        rules.append((unknown, RejectReason.UNKNOWN_DOMAIN, known))
    reason = F.coalesce(*[F.when(rule, F.lit(name.value)) for rule, name, _ in rules])
    detail = F.coalesce(*[F.when(rule, F.lit(said)) for rule, _, said in rules])
    return counted.withColumn("reason", reason).withColumn("detail", detail).select(
        "prompt_id", "prompt_hash", "prompt", "completion_id", "completion", "finish_reason",
        "given_domain", "passthrough", "row", "source_row", "reason", "detail",
    )  # fmt: skip
