"""Masks as data: which query positions see which key positions.

A mask is a list of disjoint *band slices* ``(q0, q1, k0, k1, lo, hi)``: query position ``i`` in ``[q0, q1)`` sees key position
``j`` in ``[k0, k1)`` iff ``lo <= j - i <= hi``. Eight queries (rows) and keys (columns), ``x`` = seen::

    causal        window (2, 0)   two documents   window (1, 0) + 1 sink   prefix 3
    x.......      x.......        x.......        x.......                 xxx.....
    xx......      xx......        xx......        xx......                 xxx.....
    xxx.....      xxx.....        xxx.....        xxx.....                 xxx.....
    xxxx....      .xxx....        ...x....        x.xx....                 xxxx....
    xxxxx...      ..xxx...        ...xx...        x..xx...                 xxxxx...
    xxxxxx..      ...xxx..        ...xxx..        x...xx..                 xxxxxx..
    xxxxxxx.      ....xxx.        ...xxxx.        x....xx.                 xxxxxxx.
    xxxxxxxx      .....xxx        ...xxxxx        x.....xx                 xxxxxxxx

The algebra of all variants is in these six numbers, so the plan never asks which variant it serves. A slice may also name the
*part* of the features of q and k that makes its scores: two in piecewise attention, near and far.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch

NO_LIMIT = 1 << 40
"""Distance that no two positions have: the value of a band's ``lo`` or ``hi`` where it has none (with its sign)."""


class Slice(NamedTuple):
    """One band slice: queries ``[q0, q1)`` see keys ``[k0, k1)`` where ``lo <= j - i <= hi``; no limit where none is given.

    Example:
        >>> Mask([Slice(0, 4, 0, 4, hi=0)], 4).pairs  # causal
        10
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int = -NO_LIMIT
    hi: int = NO_LIMIT


class Mask:
    """An immutable list of disjoint band slices over ``q_len`` queries and ``k_len`` keys, compared by content.

    Args:
        slices: rows ``(q0, q1, k0, k1[, lo, hi])``; `lo` and `hi` default to no limit.
        q_len: number of query positions.
        k_len: number of key positions; `q_len` where None.
        parts: for each slice the part of the features of q and k that makes its scores; 0 where None.

    Raises:
        ValueError: a slice leaves the ranges, or two slices share a pair (its keys would count twice).

    Example:
        >>> Mask([(0, 2, 0, 2, -NO_LIMIT, 0), (2, 4, 2, 4, -NO_LIMIT, 0)], 4).pairs
        6
    """

    @torch.compiler.disable  # numbers beyond 32 bits, as NO_LIMIT, come out as 0 where Dynamo makes graphs of numpy's code
    def __init__(
        self, slices: Iterable[Sequence[int]], q_len: int, k_len: int | None = None, parts: Sequence[int] | np.ndarray | None = None
    ) -> None:
        k_len = q_len if k_len is None else k_len
        for name, length in (("q_len", q_len), ("k_len", k_len)):
            if not (isinstance(length, Integral) and length >= 0):
                raise ValueError(f"{name}={length!r}: give a number of positions >= 0")
        rows = [tuple(row) for row in slices]
        if wrong := next((row for row in rows if not 4 <= len(row) <= 6 or not all(isinstance(n, Integral) for n in row)), None):
            raise ValueError(f"mask slice {wrong}: give whole numbers (q0, q1, k0, k1[, lo[, hi]]); no limit is NO_LIMIT")
        clipped = [[min(max(int(n), -NO_LIMIT), NO_LIMIT) for n in Slice(*row)] for row in rows]
        table = np.array(clipped, dtype=np.int64).reshape(-1, 6)
        numbers = np.zeros(len(table), dtype=np.int64) if parts is None else np.asarray(parts)
        if numbers.shape != (len(table),) or numbers.dtype.kind not in "iu" or (numbers < 0).any():
            raise ValueError(f"parts={parts}: give a number >= 0 for each of the {len(table)} slices")
        self._set(table, q_len, k_len, numbers.astype(np.int64))
        _check(self.table, q_len, k_len)

    @classmethod
    @torch.compiler.disable
    def trusted(cls, table: np.ndarray, q_len: int, k_len: int, parts: np.ndarray | None = None) -> Mask:
        """A mask of an ``[n, 6]`` table whose slices are disjoint and in range by construction."""
        mask = cls.__new__(cls)
        parts = np.zeros(len(table), dtype=np.int64) if parts is None else parts
        mask._set(np.ascontiguousarray(table, dtype=np.int64), q_len, k_len, parts)
        return mask

    def _set(self, table: np.ndarray, q_len: int, k_len: int, parts: np.ndarray) -> None:
        table[:, 4] = np.maximum(table[:, 4], -NO_LIMIT)
        table[:, 5] = np.minimum(table[:, 5], NO_LIMIT)
        empty = (table[:, 0] >= table[:, 1]) | (table[:, 2] >= table[:, 3]) | (table[:, 4] > table[:, 5])
        self.table, self.parts = table[~empty], parts[~empty]
        self.table.flags.writeable = self.parts.flags.writeable = False
        self.num_parts = int(self.parts.max(initial=0)) + 1
        self.q_len, self.k_len = int(q_len), int(k_len)
        self._key = (self.q_len, self.k_len, self.table.tobytes(), self.parts.tobytes())
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        shown = ", ".join(str(tuple(int(x) for x in row)) for row in self.table[:4])
        more = f", ... {len(self.table)} slices" if len(self.table) > 4 else ""
        return f"Mask([{shown}{more}], q_len={self.q_len}, k_len={self.k_len})"

    @property
    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        return int(band_area(*self.table.T).sum())

    def as_array(self) -> np.ndarray:
        """The dense boolean ``[q_len, k_len]`` array: the oracle of every test."""
        dense = np.zeros((self.q_len, self.k_len), dtype=bool)
        for q0, q1, k0, k1, lo, hi in self.table.tolist():
            distance = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            dense[q0:q1, k0:k1] |= (distance >= lo) & (distance <= hi)
        return dense


def band_area(q0: np.ndarray, q1: np.ndarray, k0: np.ndarray, k1: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Number of pairs in ``[q0, q1) x [k0, k1)`` with ``lo <= j - i <= hi``, elementwise over int64 arrays.

    Pairs with ``j - i <= h`` are counted per row: row ``i`` has ``clip(i + h + 1 - k0, 0, k1 - k0)`` of them, a ramp whose
    sum is a difference of triangular numbers.
    """

    def at_most(limit: np.ndarray) -> np.ndarray:
        limit = np.clip(limit, k0 - q1, k1 - q0)  # beyond these no pair, or every pair, is counted
        return ramp(q0, q1, limit + 1 - k0) - ramp(q0, q1, limit + 1 - k1)

    return np.where((q1 > q0) & (k1 > k0) & (lo <= hi), at_most(hi) - at_most(lo - 1), 0)


def ramp(begin: np.ndarray, end: np.ndarray, shift: np.ndarray, stride: int = 1) -> np.ndarray:
    """Sum of ``max(0, shift + stride * i)`` over ``begin <= i < end``, elementwise over int64 arrays."""
    first = np.minimum(np.maximum(-(shift // stride), begin), end)  # what is before it adds nothing
    return (end - first) * shift + stride * (end * (end - 1) - first * (first - 1)) // 2


def _check(table: np.ndarray, q_len: int, k_len: int) -> None:
    for row in table:
        q0, q1, k0, k1 = (int(x) for x in row[:4])
        if q0 < 0 or k0 < 0 or q1 > q_len or k1 > k_len:
            raise ValueError(f"mask slice {Slice(*map(int, row))} leaves queries [0, {q_len}) or keys [0, {k_len}): clip it")
    order = np.argsort(table[:, 0], kind="stable")
    table = table[order]
    for n, row in enumerate(table):
        later = table[n + 1 : n + 1 + np.searchsorted(table[n + 1 :, 0], row[1])]
        common = [np.maximum(later[:, c], row[c]) if c % 2 == 0 else np.minimum(later[:, c], row[c]) for c in range(6)]
        shared = np.flatnonzero(band_area(*common))
        if len(shared):
            raise ValueError(
                f"mask slices {Slice(*map(int, row))} and {Slice(*map(int, later[shared[0]]))} share pairs, which would count "
                "twice: make the slices disjoint"
            )


@torch.compiler.disable
def build(
    q_len: int,
    k_len: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sinks: int = 0,
    prefix: int = 0,
    far: int | None = None,
    cu_seqlens_q: Sequence[int] | np.ndarray | None = None,
    cu_seqlens_k: Sequence[int] | np.ndarray | None = None,
) -> Mask:
    """The masks that have names: full, causal, window, sinks, prefix, piecewise, each over one sequence or packed documents.

    Queries and keys of a document are aligned at its last token, as flash-attn does, where their numbers differ.

    Args:
        q_len: number of query positions, in tokens.
        k_len: number of key positions; `q_len` where None.
        causal: no query sees a later key.
        window: ``(left, right)`` tokens that a query sees before and after itself; -1 is no limit. Under `causal` right is 0.
        sinks: the first `sinks` keys of each document are also seen from beyond the window (StreamingLLM).
        prefix: the first `prefix` keys of each document are also seen by earlier queries (prefix LM).
        far: keys at least so many tokens before a query are of part 1, all others of part 0 (piecewise attention).
        cu_seqlens_q: starts of the documents and the end of the last, ``[0, ..., q_len]``; one document where None.
        cu_seqlens_k: the same for keys; `cu_seqlens_q` where None.

    Raises:
        ValueError: a window below -1, a negative count, or document boundaries that are not as described.

    Example:
        >>> build(4, causal=True).as_array().sum().item()
        10
        >>> build(4, causal=True, cu_seqlens_q=[0, 2, 4]).as_array().sum().item()
        6
    """
    k_len = q_len if k_len is None else k_len
    left, right = check_window(window)
    for name, count in (("sinks", sinks), ("prefix", prefix)):
        if not (isinstance(count, Integral) and count >= 0):
            raise ValueError(f"{name}={count!r}: give a number of tokens >= 0")
    cu_q = check_cu_seqlens("cu_seqlens_q", [0, q_len] if cu_seqlens_q is None else cu_seqlens_q, q_len)
    if cu_seqlens_k is None:
        cu_seqlens_k = [0, k_len] if cu_seqlens_q is None else cu_seqlens_q
    cu_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k_len)
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_q) - 1} documents and cu_seqlens_k {len(cu_k) - 1}: they must agree")
    q0, q1, k0, k1 = cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]
    offset = k1 - q1
    lo = offset - left if left >= 0 else np.full_like(offset, -NO_LIMIT)
    right = 0 if causal else right
    hi = offset + right if right >= 0 else np.full_like(offset, NO_LIMIT)
    slices = [np.stack([q0, q1, k0, k1, lo, hi], axis=1)]
    if sinks and left >= 0:
        slices.append(np.stack([q0, q1, k0, np.minimum(k0 + min(sinks, k_len), k1), np.full_like(lo, -NO_LIMIT), lo - 1], axis=1))
    if prefix and right >= 0:
        slices.append(np.stack([q0, q1, k0, np.minimum(k0 + min(prefix, k_len), k1), hi + 1, np.full_like(hi, NO_LIMIT)], axis=1))
    if far is None or far >= NO_LIMIT:
        return Mask.trusted(np.concatenate(slices), q_len, k_len)
    near = np.concatenate(slices)
    distant, border = near.copy(), np.tile(offset - far, len(slices))
    near[:, 4], distant[:, 5] = np.maximum(near[:, 4], border + 1), np.minimum(distant[:, 5], border)
    return Mask.trusted(np.concatenate([near, distant]), q_len, k_len, np.repeat([0, 1], len(near)))


def check_window(window: Sequence[int]) -> tuple[int, int]:
    """``(left, right)`` as two ints, each >= -1, or ValueError; one that reaches past every token is none."""
    sides = tuple(window) if isinstance(window, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and side >= -1 for side in sides):
        raise ValueError(f"window_size={window}: give (left, right) in tokens, each >= 0, or -1 for no limit")
    left, right = (-1 if side >= NO_LIMIT else int(side) for side in sides)
    return left, right


def check_cu_seqlens(name: str, cu_seqlens: Sequence[int] | np.ndarray, length: int | None) -> np.ndarray:
    """Document boundaries as an int64 array, or ValueError where they are not ``0 <= ... <= length`` (any end for None)."""
    cu = np.asarray(cu_seqlens)
    if cu.ndim != 1 or cu.size < 1 or cu.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a 1-D integer tensor, got shape {cu.shape} of {cu.dtype}")
    cu = cu.astype(np.int64)
    length = int(cu[-1]) if length is None else length
    if cu[0] != 0 or cu[-1] != length:
        raise ValueError(f"{name} runs from {cu[0]} to {cu[-1]}: it must start at 0 and end at the {length} tokens given")
    if (np.diff(cu) < 0).any():
        at = int(np.flatnonzero(np.diff(cu) < 0)[0])
        raise ValueError(f"{name} must not decrease: {cu[at]} is followed by {cu[at + 1]} at index {at + 1}")
    return cu
