"""Waves: long work cut into ranges of buckets that are committed one by one.

Prompts fall into buckets by a hash of their messages, so that a bucket holds whole prompts and
buckets are about alike. A wave is a range of buckets. Pure functions and one column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyspark.sql import Column
from pyspark.sql import functions as F

BUCKETS = 4096


class BucketRange(NamedTuple):
    """Buckets from `low` up to but not including `high`, and the tokens in them."""

    low: int
    high: int
    tokens: int

    def holds(self, bucket: Column) -> Column:
        """Build the condition that a row's bucket is in the range."""
        return (bucket >= self.low) & (bucket < self.high)


def bucket_column(prompt_hash: str) -> Column:
    """Build the bucket of a prompt: an int below `BUCKETS`.

    Args:
        prompt_hash: name of the column of hex hashes.
    """
    return (hash_number(prompt_hash) % BUCKETS).cast("int")


def hash_number(prompt_hash: str) -> Column:
    """Build a number below 2³² from the first eight digits of a column of hex hashes."""
    return F.conv(F.substring(prompt_hash, 1, 8), 16, 10).cast("bigint")


def cut_buckets(tokens: Mapping[int, int], tokens_per_wave: int) -> list[BucketRange]:
    """Cut all buckets into ranges of at least `tokens_per_wave` tokens, the last one aside.

    Args:
        tokens: by bucket; buckets without work may be missing.
        tokens_per_wave: a bucket is never cut, so a range may hold more.

    Returns:
        Ranges in order, without overlap, each with work in it.
    """
    ranges = []
    low = gathered = 0
    for bucket in range(BUCKETS):
        gathered += tokens.get(bucket, 0)
        if gathered >= tokens_per_wave or (bucket == BUCKETS - 1 and gathered):
            ranges.append(BucketRange(low, bucket + 1, gathered))
            low, gathered = bucket + 1, 0
    return ranges
