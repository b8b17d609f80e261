"""The lemma: for one run of queries, one run of keys and one band slice, the visible pairs are a band in local row numbers.

With ``a, b`` the starts of the runs and ``s`` their stride, row `i` sees key row `j` iff ``L <= j - i <= H`` where
``L = ceil((lo - b + a) / s)`` and ``H = floor((hi - b + a) / s)``. Rows that see nothing and keys that nobody sees are trimmed,
and what is left is exactly one attention call with a ``(left, right)`` window aligned at its last row and last key, as
flash-attn means it. All functions work on whole arrays: a row of a *band table* is ``(i0, i1, j0, j1, L, H)``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .layout import Layout, ranges
from .mask import NO_LIMIT, Mask, band_area

Columns = tuple[np.ndarray, ...]


def visible(
    mask: Mask, q: Layout, k: Layout, reader: int | None = None, origin: int | None = None, part: int | None = None
) -> np.ndarray:
    """Every trimmed band between what ranks hold: int64 ``[n, 8]`` rows ``(reader, origin, i0, i1, j0, j1, L, H)``.

    `i` are local query rows of the reader, `j` local key rows of the origin; `reader` and `origin` restrict the ranks, `part` the
    slices to those of a part.
    """
    q_at, k_at = _select(q, reader), _select(k, origin)
    q_rank, q_start, q_count = q.runs[q_at].T
    k_rank, k_start, k_count = k.runs[k_at].T
    q0, q1, k0, k1, lo, hi = (mask.table if part is None else mask.table[mask.parts == part]).T
    stride = q.stride
    # 1. query runs that meet a slice, cut to its rows
    at_slice, at_q = overlaps(q0, q1, q_start, q_start + stride * (q_count - 1) + 1)
    start = q_start[at_q]
    i0 = np.maximum(0, -((start - q0[at_slice]) // stride))
    i1 = np.minimum(q_count[at_q], (q1[at_slice] - 1 - start) // stride + 1)
    # 2. key runs that meet what these rows can see
    first = np.maximum(k0[at_slice], start + stride * i0 + lo[at_slice])
    last = np.minimum(k1[at_slice], start + stride * (i1 - 1) + hi[at_slice] + 1)
    at_pair, at_k = overlaps(first, np.where(i0 < i1, last, first), k_start, k_start + stride * (k_count - 1) + 1)
    at_slice, at_q, i0, i1 = at_slice[at_pair], at_q[at_pair], i0[at_pair], i1[at_pair]
    # 3. the lemma
    shift, start = q_start[at_q] - k_start[at_k], k_start[at_k]
    low, high = -((-lo[at_slice] - shift) // stride), (hi[at_slice] + shift) // stride
    j0 = np.maximum(0, -((start - k0[at_slice]) // stride))
    j1 = np.minimum(k_count[at_k], (k1[at_slice] - 1 - start) // stride + 1)
    i_row, j_row = q.row0[q_at][at_q], k.row0[k_at][at_k]
    i0, i1, j0, j1, low, high = trim(i0 + i_row, i1 + i_row, j0 + j_row, j1 + j_row, low + j_row - i_row, high + j_row - i_row)
    table = np.stack([q_rank[at_q], k_rank[at_k], i0, i1, j0, j1, low, high], axis=1)
    return table[(i0 < i1) & (j0 < j1) & (low <= high)]


def _select(layout: Layout, rank: int | None) -> np.ndarray:
    return np.arange(len(layout.runs)) if rank is None else np.flatnonzero(layout.runs[:, 0] == rank)


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


def trim(i0: np.ndarray, i1: np.ndarray, j0: np.ndarray, j1: np.ndarray, low: np.ndarray, high: np.ndarray) -> Columns:
    """Bands without the rows that see nothing and the keys that nobody sees, and with no limit that excludes nothing."""
    j0, j1 = np.maximum(j0, i0 + low), np.minimum(j1, i1 + high)
    i0, i1 = np.maximum(i0, j0 - high), np.minimum(i1, j1 - low)
    low = np.where(low <= j0 - (i1 - 1), -NO_LIMIT, low)
    high = np.where(high >= j1 - 1 - i0, NO_LIMIT, high)
    return i0, i1, j0, j1, low, high


def join(bands: np.ndarray) -> np.ndarray:
    """A shorter table with the same pairs: neighbours become one band wherever their union is one.

    Two disjoint bands are one iff the tightest band around both, in the box around both, has no pair more than they have.
    A causal zigzag rank's own two chunks thus are one causal call, and key runs that lie side by side are one call.
    Bands over the same rows join first: one call over more keys saves a merge. `bands` are ``[n, 6]`` and trimmed.
    """
    bands = bands[np.lexsort((bands[:, 2], bands[:, 0]))]
    for same_rows in (True, False):
        before = -1
        while len(bands) != before:
            before = len(bands)
            for odd in (0, 1):
                bands = _join_pairs(bands, odd, same_rows)
    return bands


def _join_pairs(bands: np.ndarray, odd: int, same_rows: bool) -> np.ndarray:
    a, b = bands[odd:-1:2], bands[odd + 1 :: 2]
    if not len(b):
        return bands
    i0, j0 = np.minimum(a[:, 0], b[:, 0]), np.minimum(a[:, 2], b[:, 2])
    i1, j1 = np.maximum(a[:, 1], b[:, 1]), np.maximum(a[:, 3], b[:, 3])
    low = np.minimum(np.maximum(a[:, 4], a[:, 2] - a[:, 1] + 1), np.maximum(b[:, 4], b[:, 2] - b[:, 1] + 1))
    high = np.maximum(np.minimum(a[:, 5], a[:, 3] - 1 - a[:, 0]), np.minimum(b[:, 5], b[:, 3] - 1 - b[:, 0]))
    same = band_area(i0, i1, j0, j1, low, high) == band_area(*a.T) + band_area(*b.T)
    if same_rows:
        same &= (a[:, 0] == b[:, 0]) & (a[:, 1] == b[:, 1])
    if not same.any():
        return bands
    joined = np.stack(trim(i0, i1, j0, j1, low, high), axis=1)
    keep = np.ones(len(bands), dtype=bool)
    at = odd + 2 * np.flatnonzero(same)
    keep[at + 1] = False
    bands = bands.copy()
    bands[at] = joined[same]
    return bands[keep]


def windows(bands: np.ndarray) -> np.ndarray:
    """The ``(left, right)`` window of each trimmed band, aligned at its last row and last key: ``[n, 2]``, -1 for no limit."""
    _, i1, _, j1, low, high = bands.T
    left = np.where(low <= -NO_LIMIT // 2, -1, j1 - i1 - low)
    right = np.where(high >= NO_LIMIT // 2, -1, high + i1 - j1)
    return np.stack([left, right], axis=1)


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
