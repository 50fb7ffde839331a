"""Read a user's prompts and completions, whatever their shape, into one row per candidate.

Input: Delta, Parquet or JSON lines; a row per completion, an array per prompt, two columns A/B,
or completions joined with prompts (`cdr.sources` opens them). Output of `read_candidates`, one row
per candidate:

    prompt_id, prompt_hash, prompt (messages), completion_id, completion, finish_reason,
    given_domain, passthrough (JSON of the input's other columns), row (JSON of the input's row
    with this one of its candidates), source_row (names the row by its hash, never twice), reason
    and detail (null for rows that can be scored)

A column that holds something of each candidate gives every one its own, so that N candidates of a
prompt carry N texts and not N². What belongs to the prompt is carried by each.

No row is dropped: `reason` marks those that cannot be used. All of it is Spark SQL; nothing is
collected and nothing but schemas is looked at on the driver.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from cdr.config import ColumnsSpec, InputSpec
from cdr.errors import InputError, RejectReason
from cdr.sources import (
    ARRAY,
    IDENTIFIER,
    PROMPT,
    TEXT,
    ColumnType,
    array_of,
    check_columns,
    no_rows,
    read_source,
    reading,
    refuse_mixed_json,
)
from cdr.tables import MESSAGES

ROLES = ("system", "user", "assistant")

NOT_BLANK = r"\S"
"""What a prompt or completion must hold: a visible character."""


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
    if repeated := _repeated_arrays(rows, source):
        print(
            f"warning: each completion carries the whole arrays {repeated} in passthrough; where "
            "they have an item per completion, name them in input.columns.per_completion",
            file=sys.stderr,
        )
    with reading(source):
        if rows.isEmpty():
            raise no_rows(source.place)
    return make_candidates(rows, source, domains=domains)


def make_candidates(
    rows: DataFrame, source: InputSpec, *, domains: Sequence[str] | None = None
) -> DataFrame:
    """Turn rows that were read, and hold the mapped columns, into candidates; as above."""
    return _validate(_to_candidates(rows, source), domains)


def messages_column(rows: DataFrame, name: str) -> Column:
    """Give a prompt column, text or messages, as messages; null where it is null."""
    prompt = F.col(f"`{name}`")
    if isinstance(rows.schema[name].dataType, T.StringType):
        turn = F.struct(F.lit("user").alias("role"), prompt.alias("content"))
        return F.when(prompt.isNotNull(), F.array(turn)).cast(MESSAGES)
    # By name: JSON sorts the fields of a struct.
    return F.transform(
        prompt, lambda m: F.struct(m["role"].alias("role"), m["content"].alias("content"))
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
        _check_columns(completions, source)
        refuse_mixed_json(spark, source, completions, _texts(source.columns))
        return completions
    # A version is the completions' own; prompts are read as they are now.
    only = {"path": source.prompts_path, "table": None, "version": None}
    of_prompts = source.model_copy(update=only)
    prompts = read_source(spark, of_prompts)
    key = str(source.columns.prompt_id)
    place = str(source.prompts_path)
    check_columns(completions, [(key, IDENTIFIER)], source.place)
    check_columns(prompts, [(key, IDENTIFIER)], place)
    kinds = [TEXT.fits(frame.schema[key].dataType) for frame in (completions, prompts)]
    if kinds[0] != kinds[1]:
        # Spark would cast one to the other: "07" would be 7, and "x7" the end of the run.
        raise InputError(
            f"{key} is a string in one of completions and prompts, an integer in the other",
            where=f"{source.place}, {place}",
            fix="give both the same type",
        )
    repeated = [c for c in prompts.columns if c in completions.columns and c != key]
    joined = completions.join(prompts.drop(*repeated), on=key, how="left")
    _check_columns(joined, source)
    for frame, place_of in ((completions, source), (prompts, of_prompts)):
        refuse_mixed_json(spark, place_of, frame, _texts(source.columns))
    with reading(source):
        if not prompts.groupBy(key).count().where("count > 1").isEmpty():
            raise InputError(
                f"the prompts have the same {key} more than once",
                where=place,
                fix="keep one row of each prompt",
            )
    return joined


def _to_candidates(rows: DataFrame, source: InputSpec) -> DataFrame:
    names = source.columns
    own = _own_columns(source)
    other = _other_columns(rows, source)
    per_row = rows.select(
        optional_column(names.prompt_id).cast("string").alias("prompt_id"),
        _messages(rows, names).alias("prompt"),
        optional_column(names.domain).cast("string").alias("given_domain"),
        _uneven_arrays(source).alias("uneven"),
        # The row without its candidates: with them, N candidates would carry N texts each.
        F.struct(*[rows[f"`{c}`"] for c in rows.columns if c not in own]).alias("shared"),
        _completions(source).alias("many"),
    )
    # An empty array keeps its row (as a null completion), so that it is counted and rejected.
    one = per_row.withColumn("one", F.explode_outer("many"))
    shared = F.col("shared")

    def as_json(columns: Sequence[str]) -> Column:
        return F.to_json(F.struct(*[own.get(c, shared[c]).alias(c) for c in columns]))

    passthrough = as_json(other) if other else F.lit(None).cast("string")
    return one.select(
        "prompt_id",
        "prompt",
        "given_domain",
        passthrough.alias("passthrough"),
        "uneven",
        as_json(rows.columns).alias("row"),
        F.col("one.completion_id").cast("string").alias("completion_id"),
        F.col("one.completion").alias("completion"),
        F.col("one.finish_reason").cast("string").alias("finish_reason"),
    )


def _texts(names: ColumnsSpec) -> list[str]:
    texts = (names.prompt, names.completion, names.completion_b, names.system)
    return [name for name in texts if name is not None]


def _other_columns(rows: DataFrame, source: InputSpec) -> list[str]:
    """Name the columns that go into `passthrough`."""
    mapped = source.columns.mapped()
    if source.layout != "ab":
        mapped.discard(source.columns.completion_b)
    return [name for name in rows.columns if name not in mapped]


def _repeated_arrays(rows: DataFrame, source: InputSpec) -> list[str]:
    """Name the arrays of layout `array` that every completion of a row carries whole."""
    return [
        name
        for name in _other_columns(rows, source)
        if source.layout == "array"
        and name not in source.columns.per_completion
        and isinstance(rows.schema[name].dataType, T.ArrayType)
    ]


def _check_columns(rows: DataFrame, source: InputSpec) -> None:
    names, is_array = source.columns, source.layout == "array"

    def each(kind: ColumnType) -> ColumnType:
        return array_of(kind) if is_array else kind

    fix = None
    if names.completion in rows.columns:
        kind = rows.schema[names.completion].dataType
        if TEXT.fits(kind) if is_array else array_of(TEXT).fits(kind):
            fix = f"--set input.layout={'long' if is_array else 'array'}"
    expected = [
        (names.prompt, PROMPT),
        (names.completion, each(TEXT)),
        (names.completion_b if source.layout == "ab" else None, TEXT),
        (names.prompt_id, IDENTIFIER),
        (names.completion_id, each(IDENTIFIER)),
        (names.finish_reason, each(TEXT)),
        (names.system, TEXT),
        (names.domain, TEXT),
        *((name, ARRAY) for name in names.per_completion),
    ]
    check_columns(rows, expected, source.place, fix=fix)


def _messages(rows: DataFrame, names: ColumnsSpec) -> Column:
    messages = messages_column(rows, names.prompt)
    if names.system is None:
        return messages
    system = F.col(f"`{names.system}`")
    first = F.array(F.struct(F.lit("system").alias("role"), system.alias("content")))
    with_system = F.when(system.rlike(NOT_BLANK), F.concat(first.cast(MESSAGES), messages))
    return F.coalesce(with_system, messages)


def _completions(source: InputSpec) -> Column:
    """Give an array of (completion_id, completion, finish_reason) for any layout.

    With `per_completion` columns there is a field more, `others`: a struct of their items.
    """
    names = source.columns

    def candidate(text: Column, identifier: Column, finish: Column, *others: Column) -> Column:
        return F.struct(
            identifier.alias("completion_id"),
            text.alias("completion"),
            finish.alias("finish_reason"),
            *([F.struct(*others).alias("others")] if others else []),
        )

    text, identifier = F.col(f"`{names.completion}`"), optional_column(names.completion_id)
    finish = optional_column(names.finish_reason)
    if source.layout == "array":
        # Parallel arrays: ids, finish reasons and what else is named go by position.
        return F.transform(
            text,
            lambda item, i: candidate(
                item,
                F.get(identifier, i) if names.completion_id else identifier,
                F.get(finish, i) if names.finish_reason else finish,
                *(F.get(F.col(f"`{name}`"), i).alias(name) for name in names.per_completion),
            ),
        )
    if source.layout == "ab":
        second = F.col(f"`{names.completion_b}`")
        return F.array(candidate(text, F.lit("a"), finish), candidate(second, F.lit("b"), finish))
    return F.array(candidate(text, identifier, finish))


def _own_columns(source: InputSpec) -> dict[str, Column]:
    """Give the input's columns that hold several candidates, as the exploded one's values."""
    names, one = source.columns, F.col("one")
    if source.layout == "array":
        own = {names.completion: one["completion"]}
        for name, field in (
            (names.completion_id, "completion_id"),
            (names.finish_reason, "finish_reason"),
        ):
            if name is not None:
                own[name] = one[field]
        return own | {name: one["others"][name] for name in names.per_completion}
    if source.layout == "ab":
        return {
            name: F.when(one["completion_id"] == which, one["completion"])
            for name, which in ((names.completion, "a"), (names.completion_b, "b"))
        }
    return {}


def _uneven_arrays(source: InputSpec) -> Column:
    """Say which array does not go with the completions; null where all do.

    A null array is one that was not given. A value that is only missing must not become a null:
    for a finish reason, that says that the completion ended by itself.
    """
    names = source.columns
    many = F.array_size(F.col(f"`{names.completion}`")) if source.layout == "array" else None
    said = [F.lit(None).cast("string")]
    for name in (names.completion_id, names.finish_reason, *names.per_completion):
        if many is not None and name is not None:
            size = F.array_size(F.col(f"`{name}`"))
            lengths = (F.lit(name), size, F.lit(names.completion), many)
            text = F.format_string("%s has length %d, %s has length %d", *lengths)
            said.append(F.when(size != many, text))
    return F.coalesce(*said)


def _validate(candidates: DataFrame, domains: Sequence[str] | None) -> DataFrame:
    messages, text = F.col("prompt"), F.col("completion")
    last = F.element_at(messages, -1)
    blank_user = (last["role"] == "user") & ~last["content"].rlike(NOT_BLANK)
    bad_roles = ~F.coalesce(F.forall(messages, lambda m: m["role"].isin(*ROLES)), F.lit(False))
    no_content = F.exists(messages, lambda m: m["content"].isNull())
    hashed = candidates.withColumns(
        {
            "prompt_hash": F.when(F.col("prompt").isNotNull(), prompt_hash(messages)),
            # A and B may have equal rows (both null), so the id is hashed too.
            "source_row": F.sha2(F.concat_ws(" ", "completion_id", "row"), 256),
        }
    )
    named = hashed.withColumn("prompt_id", F.coalesce("prompt_id", "prompt_hash"))
    one_prompt = (
        F.col("prompt_hash") if domains is None else F.struct("prompt_hash", "given_domain")
    )
    # The widest window first: its shuffle, by prompt_id, serves the narrower ones too.
    per_prompt = Window.partitionBy("prompt_id")
    named = named.withColumn("_prompts", F.size(F.collect_set(one_prompt).over(per_prompt)))
    # Ids that the input lacks are derived from content; a repeated text or row gets its number
    # behind. Equal rows have equal ids and texts: they stand side by side in this window.
    same = Window.partitionBy("prompt_id", "completion_id", "completion").orderBy("source_row")
    named = named.withColumns(
        {
            "_nth": F.row_number().over(same),
            "_nth_row": F.row_number().over(same) - F.rank().over(same) + 1,
            "_given_id": F.col("completion_id").isNotNull(),
        }
    )
    derived = _numbered(F.substring(F.sha2("completion", 256), 1, 32), "_nth")
    named = named.withColumns(
        {
            "completion_id": F.coalesce("completion_id", derived),
            "source_row": _numbered(F.col("source_row"), "_nth_row"),
        }
    )
    per_id = Window.partitionBy("prompt_id", "completion_id").orderBy("completion", "source_row")
    counted = named.withColumn("_with_id", F.row_number().over(per_id))
    rules: list[tuple[Column, RejectReason, str | Column]] = [
        (messages.isNull(), RejectReason.NULL_PROMPT, "the prompt is null"),
        (F.size(messages) == 0, RejectReason.EMPTY_PROMPT, "the prompt has no messages"),
        (bad_roles, RejectReason.BAD_MESSAGES, f"roles must be among {', '.join(ROLES)}"),
        (no_content, RejectReason.BAD_MESSAGES, "a message has no content"),
        (last["role"] != "user", RejectReason.BAD_MESSAGES, "the last message must be the user's"),
        (blank_user, RejectReason.EMPTY_PROMPT, "the last message is empty"),
        (F.col("uneven").isNotNull(), RejectReason.UNEVEN_ARRAYS, F.col("uneven")),
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
    detail = F.coalesce(*[F.when(rule, said) for rule, _, said in rules])
    return counted.withColumn("reason", reason).withColumn("detail", detail).select(
        "prompt_id", "prompt_hash", "prompt", "completion_id", "completion", "finish_reason",
        "given_domain", "passthrough", "row", "source_row", "reason", "detail",
    )  # fmt: skip


def _numbered(name: Column, nth: str) -> Column:
    """Tell equal names apart: the second is `name-2`."""
    behind = F.concat(F.lit("-"), F.col(nth).cast("string"))
    return F.concat(name, F.when(F.col(nth) > 1, behind).otherwise(""))
