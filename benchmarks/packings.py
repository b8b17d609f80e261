"""The packed mix: rows of documents whose lengths are those of a real long-context training set.

``doc_length_distribution.csv`` has the lengths of 13.5 million documents, as published with MagiAttention's context-parallel
benchmark (SandAI-org/MagiAttention, ``exps/dist_attn/benchmark/datasets/default``, Apache-2.0). Rows are drawn by that
benchmark's rule: documents at their natural frequency, none longer than a quarter of the row, the last one cut to fill it. Inside
a range of the table lengths are log-uniform. A seed always draws the same row.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Mapping
from functools import lru_cache
from json import loads
from pathlib import Path
from types import MappingProxyType

TABLE = Path(__file__).with_name("doc_length_distribution.csv")

SIZES: Mapping[str, int] = MappingProxyType({"64k": 1 << 16, "512k": 1 << 19, "1m": 1 << 20})
"""Tokens of a row by its name."""

SEEDS = range(8)
"""The rows of each size."""


def lengths(total: int, seed: int) -> list[int]:
    """Lengths of the documents of one row of `total` tokens.

    Example:
        >>> lengths(1 << 16, 0)[:4]
        [1732, 254, 669, 1264]
    """
    rng, left, row = random.Random(seed), total, list[int]()
    ranges, documents = _table()
    while left:
        lo, hi = rng.choices(ranges, documents)[0]
        length = round(math.exp(rng.uniform(math.log(lo), math.log(hi))))
        if length <= total // 4:
            row.append(min(length, left))
            left -= row[-1]
    return row


@lru_cache(maxsize=1)
def _table() -> tuple[list[tuple[int, int]], list[int]]:
    """Ranges of lengths, both ends in, and how many documents each has."""
    with TABLE.open() as file:
        rows = [(*loads(row["range"]), int(row["number"])) for row in csv.DictReader(file)]
    return [(max(lo, 1), hi) for lo, hi, _ in rows], [number for _, _, number in rows]
