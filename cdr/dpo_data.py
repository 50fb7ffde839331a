"""Preference pairs for tuning: read, split, drawn and encoded, with every drop counted.

A pair is a prompt and two answers, `chosen` preferred to `rejected`. It comes from JSON lines or
Parquet, in the shape of our own `preferences` table, of TRL's, or of RewardBench's. No torch: the
split and the counts can be tested, and repeated, without a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cdr.errors import InputError, RowRejected

if TYPE_CHECKING:
    from cdr.chat import ChatEncoder, Message

REQUIRED_COLUMNS: Final = ("prompt", "chosen", "rejected")
HELD_OUT_SPLITS: Final = frozenset({"test", "eval", "validation", "holdout"})
SAME_ANSWERS: Final = "same_answers"
TOO_LONG: Final = "too_long"


@dataclass(frozen=True)
class PreferencePair:
    """One labelled pair.

    Args:
        prompt: the turns, the last one a user's.
        chosen: text of the preferred answer.
        rejected: text of the other one.
        section: what results are reported by (RewardBench's section, or the domain).
        subset: finer than section; equal shares are drawn of each.
        group: what must not be torn apart by the split; None for the prompt alone.
        split: what the table says; None where it says nothing.
        source: where the row is from, for the model card.
        license: its licence, for the model card.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    section: str
    subset: str
    group: str | None
    split: str | None
    source: str
    license: str

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt's turns, hexadecimal."""
        return _hash(json.dumps(self.prompt, sort_keys=True))

    @property
    def key(self) -> str:
        """Hash of prompt and answers, hexadecimal: the pair's identity wherever it lies."""
        return _hash(json.dumps([self.prompt, self.chosen, self.rejected], sort_keys=True))


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids; both answers end with the end-of-turn token.

    Args:
        pair: what was encoded.
        prefix_ids: the prompt, generation header included.
        chosen_ids: the preferred answer's ids behind the prefix.
        rejected_ids: the other answer's.
    """

    pair: PreferencePair
    prefix_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


def read_pairs(paths: Sequence[Path]) -> list[PreferencePair]:
    """Read preference tables.

    Args:
        paths: `.jsonl` or `.parquet` files, or folders searched for both (a Delta table's folder
            is not one: it may hold rows that were deleted).

    Returns:
        Pairs in the order of the sorted file names, a pair that occurs twice once.

    Raises:
        InputError: nothing is found, a column is missing, or a row is not a pair.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError("no such file or folder", where=str(path), fix="correct --pairs")
        if (path / "_delta_log").exists():
            raise InputError(
                "a Delta table's files also hold deleted rows",
                where=str(path),
                fix="export the rows to tune on: spark.table(...).write.parquet(...)",
            )
        found = sorted(p for p in path.rglob("*") if p.suffix in {".jsonl", ".parquet"})
        files.extend(found if path.is_dir() else [path])
    if not files:
        raise InputError("no .jsonl or .parquet file found", where=", ".join(map(str, paths)))
    pairs: dict[str, PreferencePair] = {}
    for file in files:
        for number, row in enumerate(_read_rows(file), start=1):
            pair = _make_pair(row, default_source=file.stem, where=f"{file}, row {number}")
            pairs.setdefault(pair.key, pair)
    return list(pairs.values())


def split_pairs(
    pairs: Sequence[PreferencePair], holdout_fraction: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Split into pairs to train on and pairs to test on, by hash.

    Pairs that share a prompt or a group stay together. Within each section the same fraction of
    such bundles is held out, those of lowest hash: no seed, so that no run can choose its test. If
    the table itself names held-out rows (`split` is test, eval, validation or holdout), those
    bundles are held out and no others.

    Args:
        pairs: all of them.
        holdout_fraction: share of bundles per section, in [0, 1).

    Returns:
        (training pairs, held-out pairs), each in the given order.
    """
    bundle_of = _bundle(pairs)
    named = {
        bundle
        for bundle, pair in zip(bundle_of, pairs, strict=True)
        if pair.split in HELD_OUT_SPLITS
    }
    if named:
        held = named
    else:
        by_section: dict[str, set[str]] = defaultdict(set)
        seen: set[str] = set()
        for bundle, pair in zip(bundle_of, pairs, strict=True):
            if bundle not in seen:  # a bundle that spans sections counts for its first
                by_section[pair.section].add(bundle)
                seen.add(bundle)
        held = set()
        for bundles in by_section.values():
            ordered = sorted(bundles, key=lambda bundle: _hash(f"holdout {bundle}"))
            held.update(ordered[: round(holdout_fraction * len(ordered))])
    train = [pair for bundle, pair in zip(bundle_of, pairs, strict=True) if bundle not in held]
    test = [pair for bundle, pair in zip(bundle_of, pairs, strict=True) if bundle in held]
    return train, test


def write_pairs(pairs: Iterable[PreferencePair], file: Path) -> None:
    """Write pairs as JSON lines that `read_pairs` and labelled pairs read; ids are their keys."""
    rows = (
        {
            "id": pair.key[:32],
            "section": pair.section,
            "subset": pair.subset,
            "prompt": list(pair.prompt),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        for pair in pairs
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def draw_pairs(pairs: Sequence[EncodedPair], max_pairs: int | None, seed: int) -> list[EncodedPair]:
    """Draw pairs so that sections, and the subsets in each, have equal shares.

    Args:
        pairs: what to draw from.
        max_pairs: how many at most; None takes all. What a small section cannot give, the others
            give.
        seed: decides which ones, and the order.

    Returns:
        The drawn pairs, sections and subsets taking turns.
    """
    queues: dict[str, dict[str, list[EncodedPair]]] = defaultdict(lambda: defaultdict(list))
    for item in sorted(pairs, key=lambda item: _hash(f"draw {seed} {item.pair.key}")):
        queues[item.pair.section][item.pair.subset].append(item)
    sections = [
        list(_take_turns([queues[section][subset] for subset in sorted(queues[section])]))
        for section in sorted(queues)
    ]
    return list(_take_turns(sections))[:max_pairs]


def encode_pairs(
    pairs: Iterable[PreferencePair], encoder: ChatEncoder, max_length: int
) -> tuple[list[EncodedPair], Counter[str]]:
    """Encode pairs, leaving out what cannot be used; nothing is truncated.

    Args:
        pairs: text pairs.
        encoder: of the model that is tuned.
        max_length: tokens of prefix and longer answer together, at most.

    Returns:
        The encoded pairs in order, and how many were left out per reason (`too_long`,
        `same_answers`, or the encoder's reasons).
    """
    encoded: list[EncodedPair] = []
    left_out: Counter[str] = Counter()
    for pair in pairs:
        if pair.chosen == pair.rejected:
            left_out[SAME_ANSWERS] += 1
            continue
        try:
            prefix = encoder.encode_prefix(pair.prompt)
            chosen = encoder.encode_completion(pair.chosen, None).ids
            rejected = encoder.encode_completion(pair.rejected, None).ids
        except RowRejected as rejection:
            left_out[rejection.reason.value] += 1
            continue
        if len(prefix) + max(len(chosen), len(rejected)) > max_length:
            left_out[TOO_LONG] += 1
            continue
        encoded.append(EncodedPair(pair, prefix, chosen, rejected))
    return encoded, left_out


def hash_pairs(pairs: Iterable[PreferencePair]) -> str:
    """Hash the pairs' content, whatever files they lay in and in whatever order."""
    return _hash("".join(sorted(pair.key for pair in pairs)))


def count_by(pairs: Iterable[PreferencePair], field: str) -> dict[str, int]:
    """Count pairs by one field, sorted by its value."""
    return dict(sorted(Counter(str(getattr(pair, field)) for pair in pairs).items()))


def _read_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise InputError(f"not JSON: {error}", where=f"{file}:{number}") from None
        return
    if file.suffix != ".parquet":
        raise InputError(
            f"expected .jsonl or .parquet, got {file.suffix or 'no suffix'}", where=str(file)
        )
    from pyarrow import parquet

    yield from parquet.read_table(file).to_pylist()


def _make_pair(row: Mapping[str, Any], *, default_source: str, where: str) -> PreferencePair:
    missing = [name for name in REQUIRED_COLUMNS if row.get(name) is None]
    if missing:
        raise InputError(
            f"missing or null: {', '.join(missing)}; present: {', '.join(sorted(row))}", where=where
        )
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    section = str(row.get("section") or row.get("domain") or "all")
    group, split = row.get("group"), row.get("split")
    return PreferencePair(
        prompt=tuple({"role": str(t["role"]), "content": str(t["content"])} for t in prompt),
        chosen=_answer_text(row["chosen"], where),
        rejected=_answer_text(row["rejected"], where),
        section=section,
        subset=str(row.get("subset") or section),
        group=None if group is None else str(group),
        split=None if split is None else str(split),
        source=str(row.get("source") or default_source),
        license=str(row.get("license") or "not stated"),
    )


def _answer_text(answer: Any, where: str) -> str:
    """Take an answer that is text, or messages of which the last is the assistant's only one."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1 or answer[0].get("role") != "assistant":
        raise InputError(
            f"expected an answer as text or one assistant message, got {len(answer)} messages",
            where=where,
        )
    return str(answer[0]["content"])


def _bundle(pairs: Sequence[PreferencePair]) -> list[str]:
    """Name each pair's bundle: what hangs together by shared prompts and groups, transitively."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    names = [(f"p:{pair.prompt_key}", f"g:{pair.group}") for pair in pairs]
    for pair, (prompt, group) in zip(pairs, names, strict=True):
        if pair.group is not None:
            low, high = sorted((root(prompt), root(group)))
            parent[high] = low  # the lowest name leads, whatever the order of rows
    return [root(prompt) for prompt, _ in names]


def _take_turns(queues: Sequence[Sequence[EncodedPair]]) -> Iterator[EncodedPair]:
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
