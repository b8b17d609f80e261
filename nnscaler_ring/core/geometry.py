"""The lemma: for one run of queries, one run of keys and one band slice, the visible pairs are a band in local row numbers.

With ``a, b`` the starts of the runs and ``s`` their stride, row `i` sees key row `j` iff ``L <= j - i <= H`` where
``L = ceil((lo - b + a) / s)`` and ``H = floor((hi - b + a) / s)``. Rows that see nothing and keys that nobody sees are trimmed,
and what is left is exactly one attention call with a ``(left, right)`` window aligned at its last row and last key, as
flash-attn means it. All functions work on whole arrays: a row of a *band table* is ``(i0, i1, j0, j1, L, H)``.
"""

from __future__ import annotations

import numpy as np

from .intervals import Columns, overlaps
from .layout import Layout
from .mask import NO_LIMIT, Mask, band_area


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
