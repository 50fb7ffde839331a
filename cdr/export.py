"""Preference pairs as files for a trainer, with a manifest of where they came from.

One file per split, in a folder that Hugging Face's `load_dataset` takes as it is:

    train.jsonl  validation.jsonl  manifest.json
    train-00000-of-00004.parquet …  manifest.json

Rows stand in the order of their prompts' hashes: shuffled, and the same bytes each time for the
same version of the table. Nothing shows under the folder's name before all rows are written, and
the manifest, which has every file's hash, comes last: a folder with a manifest is whole.

Limits: rows are taken as they are; nothing is tokenised, filtered or re-split.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal, get_args

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cdr.errors import InputError
from cdr.files import Files
from cdr.runs import new_run_id
from cdr.tables import PREFERENCES
from cdr.text_table import format_bytes, render_table
from cdr.tracking import git_commit
from cdr.warehouse import Warehouse

Layout = Literal["messages", "conversations", "text"]
Format = Literal["jsonl", "parquet"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FORMATS: tuple[Format, ...] = get_args(Format)
MANIFEST = "manifest.json"

_PAIR = ("prompt", "chosen", "rejected")
_WRITTEN = re.compile(r"(train|validation)(-\d{5}-of-\d{5})?\.(jsonl|parquet)")
_SHOWN = 12  # digits of a key that tell it from the others


@dataclass(frozen=True)
class PairSet:
    """The pairs of one dataset, reward and selection rule, as one version of the table has them.

    Args:
        dataset: name of the set of completions.
        reward_name: name of the reward configuration.
        reward_key: hash of all that decides its numbers.
        selection_key: hash of the rule that chose the pairs.
        run_id: the annotate run that wrote them.
        mlflow_run_id: its MLflow run; None where tracking was off.
        reward_version: the reward's name and version in MLflow; None: it came from a file.
        pairs: how many there are.
        version: Delta version of `preferences`.
    """

    dataset: str
    reward_name: str
    reward_key: str
    selection_key: str
    run_id: str
    mlflow_run_id: str | None
    reward_version: str | None
    pairs: int
    version: int


@dataclass(frozen=True)
class Target:
    """What to write, and where.

    Args:
        folder: path or URI; on a cluster one that all nodes reach.
        format: of the files.
        layout: `messages`: prompt, chosen and rejected as messages, the last two exactly one
            assistant message; `conversations`: chosen and rejected with the prompt's messages in
            front; `text`: three strings, for prompts of one message.
        extra: more columns of `preferences` to keep.
        parts: files per split.
        overwrite: whether an earlier export in the folder may be replaced.
    """

    folder: str
    format: Format = "jsonl"
    layout: Layout = "messages"
    extra: Sequence[str] = ()
    parts: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export: its name in the folder, its split, bytes, and content hash in hex."""

    name: str
    split: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Where an export came from and what it holds; `manifest.json` has these fields.

    Args:
        source: the table, its Delta version, and what names the pairs in it.
        query: gives the same rows in Spark SQL.
        format: of the files.
        layout: of the columns.
        columns: their Spark types by name.
        pairs: counts by split and domain; `none` where prompts had no domain.
        files: every file but this one.
        made_by: this program and its version.
        made_at: UTC.
    """

    source: dict[str, Any]
    query: str
    format: Format
    layout: Layout
    columns: dict[str, str]
    pairs: dict[str, dict[str, int]]
    files: list[ExportedFile]
    made_by: str
    made_at: str = field(default_factory=lambda: f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}")

    def render(self, folder: str) -> str:
        """Write what was exported for a terminal."""
        source = self.source
        header = ("file", "pairs", "size", "domains")
        rows = [
            (
                file.name,
                sum(self.pairs[file.split].values()) if self._is_alone(file) else None,
                format_bytes(file.bytes),
                ", ".join(f"{name} {count:,}" for name, count in self.pairs[file.split].items()),
            )
            for file in self.files
        ]
        return "\n".join(
            [
                f"dataset '{source['dataset']}', reward '{source['reward_name']}' of run "
                f"{source['run_id']}, version {source['version']} of {source['table']}",
                "",
                *render_table(header, rows),
                "",
                f"written to {folder}, with {MANIFEST}",
            ]
        )

    def _is_alone(self, file: ExportedFile) -> bool:
        return sum(other.split == file.split for other in self.files) == 1


def find_pairs(
    warehouse: Warehouse,
    *,
    dataset: str,
    reward: str | None = None,
    selection: str | None = None,
    version: int | None = None,
) -> PairSet:
    """Find the pairs that are meant, and pin the version of the table that has them.

    Args:
        warehouse: where the tables are.
        dataset: its name.
        reward: the reward's name, or the first digits of its key; None where there is one only.
        selection: first digits of the selection's key; None where there is one only.
        version: Delta version of `preferences`; None for the latest.

    Raises:
        InputError: none match, or several do; it lists what there is.
        TableError: the table or its version cannot be read.
    """
    latest = warehouse.version(PREFERENCES)
    if latest is None:
        raise InputError(
            "there are no preferences in this warehouse",
            where=warehouse.place(PREFERENCES),
            fix="check --warehouse, or write them with jobs/annotate.py",
        )
    version = latest if version is None else version
    found = _pair_sets(warehouse.read(PREFERENCES, version=version), version)
    matching = [
        one
        for one in found
        if one.dataset == dataset
        and (reward is None or one.reward_name == reward or one.reward_key.startswith(reward))
        and (selection is None or one.selection_key.startswith(selection))
    ]
    if len(matching) == 1:
        return matching[0]
    asked = {"dataset": dataset, "reward": reward, "selection": selection}
    named = ", ".join(f"{name} '{value}'" for name, value in asked.items() if value is not None)
    where = f"{warehouse.place(PREFERENCES)}, version {version}"
    if matching:
        raise InputError(
            f"{len(matching)} sets of pairs match {named}: their rewards or selection rules differ",
            where=where,
            fix="\n    ".join(["name one by --reward and --selection:", *_listing(matching)]),
        )
    there = _listing(found) if found else ["none: the table is empty"]
    raise InputError(
        f"no pairs match {named}", where=where, fix="\n    ".join(["what there is:", *there])
    )


def export_pairs(warehouse: Warehouse, pairs: PairSet, target: Target) -> Manifest:
    """Write pairs to files, one or more per split, and the manifest.

    Args:
        warehouse: where the tables are.
        pairs: from `find_pairs`.
        target: what to write, and where.

    Raises:
        InputError: the folder holds something, a column is unknown, the layout does not fit the
            prompts, or the folder is not one that the cluster's nodes share with this machine.
    """
    files = Files(warehouse.spark)
    folder = target.folder.rstrip("/")
    _check_target(target, files)
    rows = _rows_of(warehouse, pairs)
    counts = _count(rows, target)
    parent, slash, name = folder.rpartition("/")
    unfinished = f"{parent}{slash}.{name}.unfinished-{new_run_id()}"
    try:
        data = f"{unfinished}/data"
        files.make_folder(data)
        written = [
            file
            for split in counts
            for file in _write_split(rows, split, target, files, unfinished, data)
        ]
        manifest = Manifest(
            source={"table": warehouse.sql_name(PREFERENCES), **asdict(pairs)},
            query=_query(warehouse, pairs),
            format=target.format,
            layout=target.layout,
            columns=dict(rows.select(*_columns(target)).dtypes),
            pairs=counts,
            files=written,
            made_by=_this_program(),
        )  # fmt: skip
        if files.exists(folder):
            files.move(folder, f"{unfinished}/replaced")
        files.move(data, folder)
        files.write_text(f"{folder}/{MANIFEST}", json.dumps(asdict(manifest), indent=2) + "\n")
    finally:
        files.delete(unfinished)
    return manifest


def _pair_sets(preferences: DataFrame, version: int) -> list[PairSet]:
    """List what the table holds, the newest last."""
    columns = ("dataset", "reward_name", "reward_key", "selection_key")
    # One row per dataset, reward and selection; each was written by one run.
    grouped = preferences.groupBy(*columns).agg(
        F.max("run_id").alias("run_id"),
        F.max("mlflow_run_id").alias("mlflow_run_id"),
        F.max("reward_version").alias("reward_version"),
        F.count("*").alias("pairs"),
    )
    found = [PairSet(**row.asDict(), version=version) for row in grouped.collect()]
    return sorted(found, key=lambda one: one.run_id)


def _listing(found: Sequence[PairSet]) -> list[str]:
    header = ("dataset", "reward", "reward key", "selection", "run", "pairs")
    rows = [
        (
            one.dataset, one.reward_name, one.reward_key[:_SHOWN], one.selection_key[:_SHOWN],
            one.run_id, one.pairs,
        )
        for one in found
    ]  # fmt: skip
    return render_table(header, rows)


def _check_target(target: Target, files: Files) -> None:
    unknown = sorted(set(target.extra) - set(PREFERENCES.names()))
    if unknown:
        raise InputError(
            f"preferences have no columns {unknown}",
            fix=f"--with some of: {', '.join(n for n in PREFERENCES.names() if n not in _PAIR)}",
        )
    present = files.names(target.folder)
    if not present:
        return
    if not target.overwrite:
        raise InputError(
            "the folder is not empty", where=target.folder, fix="--overwrite, or another --to"
        )
    foreign = [name for name in present if name != MANIFEST and not _WRITTEN.fullmatch(name)]
    if foreign:
        raise InputError(
            f"the folder holds what no export has written, such as {foreign[0]}",
            where=target.folder,
            fix="another --to; --overwrite only replaces an export",
        )


def _rows_of(warehouse: Warehouse, pairs: PairSet) -> DataFrame:
    rows = warehouse.read(PREFERENCES, version=pairs.version)
    for name in ("dataset", "reward_key", "selection_key"):
        rows = rows.where(F.col(name) == getattr(pairs, name))
    return rows


def _count(rows: DataFrame, target: Target) -> dict[str, dict[str, int]]:
    """Count pairs by split and domain; refuse prompts that the layout has no place for."""
    domain = F.coalesce("domain", F.lit("none")).alias("domain")
    # One row per split and domain.
    found = (
        rows.groupBy("split", domain)
        .agg(F.count("*").alias("pairs"), F.count_if(F.size("prompt") != 1).alias("longer"))
        .orderBy("split", "domain")
        .collect()
    )
    longer = sum(row["longer"] for row in found)
    if target.layout == "text" and longer:
        raise InputError(
            f"{longer:,} of {sum(row['pairs'] for row in found):,} prompts have more than one "
            "message, which one string cannot hold without a chat template",
            fix="--layout messages or --layout conversations",
        )
    counts: dict[str, dict[str, int]] = {}
    for row in found:
        counts.setdefault(row["split"], {})[row["domain"]] = row["pairs"]
    return counts


def _columns(target: Target) -> list[Column]:
    prompt, chosen, rejected = (F.col(name) for name in _PAIR)
    pair = {
        "messages": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "conversations": {
            "chosen": F.concat(prompt, chosen), "rejected": F.concat(prompt, rejected),
        },
        "text": {name: F.col(name)[0]["content"] for name in _PAIR},
    }[target.layout]  # fmt: skip
    extra = {name: F.col(name) for name in target.extra if name not in _PAIR}
    return [column.alias(name) for name, column in {**pair, **extra}.items()]


def _write_split(
    rows: DataFrame, split: str, target: Target, files: Files, unfinished: str, data: str
) -> list[ExportedFile]:
    ordered = (
        rows.where(F.col("split") == split)
        # By a hash, not by range: which row goes to which file must not depend on a sample.
        .repartition(target.parts, "prompt_hash")
        .sortWithinPartitions("prompt_hash", "prompt_id")
        .select(*_columns(target))
    )
    spark_folder = f"{unfinished}/{split}"
    if target.format == "jsonl":
        # A null must not be a missing key: readers infer columns from the first lines.
        ordered.write.option("ignoreNullFields", "false").json(spark_folder)
    else:
        ordered.write.parquet(spark_folder)
    parts = [name for name in files.names(spark_folder) if name.startswith("part-")]
    if not parts:
        raise InputError(
            "the rows were written on other machines and cannot be seen from here",
            where=target.folder,
            fix="--to a place that all nodes reach: s3://..., hdfs://..., a volume",
        )
    written = []
    for number, part in enumerate(parts):
        of = f"-{number:05d}-of-{len(parts):05d}" if target.parts > 1 else ""
        name = f"{split}{of}.{target.format}"
        files.move(f"{spark_folder}/{part}", f"{data}/{name}")
        size, digest = files.num_bytes(f"{data}/{name}"), files.sha256(f"{data}/{name}")
        written.append(ExportedFile(name, split, size, digest))
    return written


def _query(warehouse: Warehouse, pairs: PairSet) -> str:
    return (
        f"SELECT * FROM {warehouse.sql_name(PREFERENCES)} VERSION AS OF {pairs.version} "
        f"WHERE dataset = '{pairs.dataset}' AND reward_key = '{pairs.reward_key}' "
        f"AND selection_key = '{pairs.selection_key}'"
    )


def _this_program() -> str:
    try:
        version = metadata.version("cdr-annotate")
    except metadata.PackageNotFoundError:  # a checkout on the import path
        version = "not installed"
    commit = git_commit()
    return f"cdr-annotate {version}" + (f" ({commit})" if commit else "")
