"""Half-open intervals of whole numbers as arrays: what they share, cover and order. Nothing here knows of attention."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Columns = tuple[np.ndarray, ...]


def ranges(start: np.ndarray, count: np.ndarray, stride: int = 1) -> np.ndarray:
    """For each start the `count` numbers ``start, start + stride, ...``, one range after the other."""
    return np.repeat(start, count) + stride * (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count))


def overlaps(a0: np.ndarray, a1: np.ndarray, b0: np.ndarray, b1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs ``(n, m)`` of the half-open intervals ``[a0[n], a1[n])`` and ``[b0[m], b1[m])`` that share a point."""
    order = np.argsort(b0, kind="stable")
    b0, b1 = b0[order], b1[order]
    first = np.searchsorted(np.maximum.accumulate(b1), a0, side="right")
    count = np.maximum(0, np.searchsorted(b0, a1, side="left") - first)
    n = np.repeat(np.arange(len(a0)), count)
    m = ranges(first, count)
    hit = (b1[m] > a0[n]) & (a0[n] < a1[n])
    return n[hit], order[m[hit]]


def union(keys: np.ndarray, lo: np.ndarray, hi: np.ndarray, breaks: Columns | None = None) -> Columns:
    """Disjoint pieces ``(key, lo, hi)`` of what the intervals ``[lo, hi)`` of each key cover, ordered by key and place.

    Touching pieces are one, but none reaches across `breaks`, arrays ``(key, at)``.
    """
    if not len(keys):
        return keys, lo, hi
    span = int(hi.max()) + 1
    starts, ends = keys * span + lo, keys * span + hi
    walls = np.empty(0, dtype=np.int64) if breaks is None else breaks[0] * span + np.minimum(breaks[1], span - 1)
    points = distinct(np.concatenate([starts, ends, walls]))
    begin, end = (np.bincount(np.searchsorted(points, at), minlength=len(points)) for at in (starts, ends))
    covered = np.cumsum(begin - end) > 0  # from each point to the next
    before, wall = np.append(False, covered[:-1]), np.isin(points, walls)
    first, last = points[covered & (~before | wall)], points[before & (~covered | wall)]
    key = first // span
    return key, first - key * span, last - key * span


def covered(intervals: np.ndarray) -> np.ndarray:
    """What intervals ``[n, 2]`` cover, ordered and disjoint."""
    _, lo, hi = union(np.zeros(len(intervals), dtype=np.int64), *intervals.T)
    return np.column_stack([lo, hi])


def times(rows: int, intervals: Iterable[np.ndarray]) -> np.ndarray:
    """How often each of `rows` is in some sets of disjoint intervals, int32."""
    change = np.zeros(rows + 1, dtype=np.int32)
    for each in intervals:
        np.add.at(change, each[:, 0], 1)
        np.add.at(change, each[:, 1], -1)
    return change[:-1].cumsum(dtype=np.int32)


def distinct(values: np.ndarray) -> np.ndarray:
    """The values in order, each once; by sorting, where ``np.unique`` hashes, which is slower by far."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def coalesce(intervals: np.ndarray) -> np.ndarray:
    """Ordered disjoint ``[n, 2]`` intervals with those that touch made one."""
    if len(intervals) < 2:
        return intervals
    last = np.flatnonzero(intervals[1:, 0] != intervals[:-1, 1])  # but for the very last
    joined = np.empty((len(last) + 1, 2), dtype=intervals.dtype)
    joined[0, 0], joined[1:, 0] = intervals[0, 0], intervals[last + 1, 0]
    joined[:-1, 1], joined[-1, 1] = intervals[last, 1], intervals[-1, 1]
    return joined


def turns(intervals: np.ndarray) -> np.ndarray:
    """A number for each of some intervals, ordered by where they start, such that those of one number are disjoint.

    Intervals are the first two columns.
    """
    found = np.zeros(len(intervals), dtype=np.int64)
    if (intervals[1:, 0] >= intervals[:-1, 1]).all():
        return found
    free: list[int] = []  # where each turn is free from
    for n, (lo, hi) in enumerate(intervals[:, :2].tolist()):
        found[n] = next((turn for turn, end in enumerate(free) if end <= lo), len(free))
        free[found[n] : found[n] + 1] = [hi]
    return found
