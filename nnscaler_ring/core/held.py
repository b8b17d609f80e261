"""What calls give for rows, held until several can be put together in one pass over memory."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .device import resident
from .intervals import distinct, ranges, turns

Part = tuple[Tensor, ...]
"""Tensors ``[B, n, ...]`` about the same rows."""


def at_once(device: str) -> int:
    """How many parts of a row are put together in one pass over memory."""
    return 1 if device not in ("cuda", "xpu") or (kernel := fused()) is None else int(kernel.MOST)


@lru_cache(maxsize=1)
def fused() -> ModuleType | None:
    """The module `fused`, or None without Triton."""
    return None if importlib.util.find_spec("triton") is None else importlib.import_module(".fused", __package__)


def together() -> ModuleType:
    """`fused`, where several are put together at once and so it is there."""
    kernel = fused()
    assert kernel is not None, "where one is put together at once there are not so many"
    return kernel


AGAIN, MORE = 1, 2
"""Bits of the state of rows that a kernel puts together in place: some came before, which it reads; more is to come."""

HERE, DONE = 1, 2
"""What has come for a row: some, the sum of which is in the memory; all, and the end is stored; 0 stands for nothing."""


class Place(NamedTuple):
    """Where a kernel puts rows together in place.

    Attributes:
        end: ``[B, L, H, D]``, for rows to which no more is to come, in the dtype of the result.
        total: the same in the exact dtype, which is read for rows that are `AGAIN` and written for rows to which `MORE` is to come;
            None where there are no such rows. It may be `end` itself.
        rows: ``[n, 3]`` ``(lo, hi, state)``: the kernel's rows, ordered, by `AGAIN` and `MORE`.
        lse: of results, ``[B, H, L]``.
    """

    end: Tensor
    total: Tensor | None
    rows: np.ndarray
    lse: Tensor | None = None


class Layer(NamedTuple):
    """A part, and whose it is: rows ``lo:hi`` have its rows from `start` on, ``(lo, hi, start)``, in order and disjoint."""

    at: Sequence[tuple[int, int, int]]
    part: Part

    def within(self, lo: int, hi: int) -> Layer:
        """What is about rows ``lo:hi``."""
        return Layer([(max(a, lo), min(b, hi), max(a, lo) - a + start) for a, b, start in self.at if a < hi and lo < b], self.part)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Rows in pieces, each of which has the same parts for all its rows.

    Attributes:
        cuts: where pieces start, and the end of the last, ``[n + 1]``.
        parts: those of all pieces.
        source: of each piece its first row in each part, ``[n, parts]``; -1 where it has none of it.
        seen: ``[n]``, what came for it before: `HERE`, `DONE` or 0.
    """

    cuts: Sequence[int]
    parts: Sequence[Part]
    source: Sequence[Sequence[int]]
    seen: Sequence[int]

    def __iter__(self) -> Iterator[tuple[slice, list[Part], bool]]:
        """The rows of each piece that is not done, what it has of its parts, and whether something came before."""
        for lo, hi, source, seen in zip(self.cuts, self.cuts[1:], self.source, self.seen, strict=False):
            found = [(part, start) for part, start in zip(self.parts, source, strict=True) if start >= 0]
            if seen != DONE:
                yield slice(lo, hi), [tuple(_rows(x, start, hi - lo) for x in part) for part, start in found], seen == HERE
            assert seen != DONE or not found, "no more was to come"

    def besides(self, part: Part) -> Pieces:
        """These pieces with one more part, which has all rows in their order."""
        source = [[*starts, lo] for starts, lo in zip(self.source, self.cuts, strict=False)]
        return replace(self, parts=[*self.parts, part], source=source)


def _rows(x: Tensor, start: int, size: int) -> Tensor:
    return x if size == x.shape[1] else x[:, start : start + size]


@dataclass(frozen=True, eq=False)
class Scattered:
    """`Pieces` that are put together row by row, as arrays; those that are `open` are not done."""

    cuts: np.ndarray
    parts: Sequence[Part]
    source: np.ndarray
    seen: np.ndarray
    open: np.ndarray

    @classmethod
    def of(cls, pieces: Pieces) -> Scattered:
        source = np.array(pieces.source, dtype=np.int64).reshape(len(pieces.seen), len(pieces.parts))
        return cls(np.array(pieces.cuts), pieces.parts, source, np.array(pieces.seen) == HERE, np.array(pieces.seen) != DONE)

    @property
    def touched(self) -> np.ndarray:
        """Which pieces have parts."""
        return np.any(self.source >= 0, axis=1)

    def groups(self, most: int) -> Iterator[tuple[Scattered, np.ndarray, bool]]:
        """Groups of pieces with up to `most` parts between them: with these parts alone, which pieces they are, whether it is all.

        A piece that has more parts than `most` is in several groups, one after the other.
        """
        there = self.source >= 0
        kinds, kind = np.unique(there, axis=0, return_inverse=True)
        sets: list[tuple[np.ndarray, list[int]]] = []  # parts, and kinds of pieces
        for n in np.argsort(-kinds.sum(1), kind="stable").tolist():
            parts, of = next((each for each in sets if (each[0] | kinds[n]).sum() <= most), (np.zeros_like(kinds[n]), []))
            sets += [] if of else [(parts, of)]
            parts |= kinds[n]
            of.append(n)
        for parts, of in sets:
            which, columns = np.isin(kind.ravel(), of), np.flatnonzero(parts)
            for n in range(0, max(len(columns), 1), most):
                some, seen = columns[n : n + most], self.seen | there[:, columns[:n]].any(1)
                pieces = replace(self, parts=[self.parts[at] for at in some], source=self.source[:, some], seen=seen)
                yield pieces, which, n + most >= len(columns)

    def table(self, which: np.ndarray, device: torch.device) -> Tensor:
        """For each row of some pieces: its number, its number again if something came before, and its row in each part; else -1.

        int32 ``[rows, 2 + parts]``.
        """
        lo, seen = self.cuts[:-1][which], self.seen[which]
        first = np.column_stack([np.diff(self.cuts)[which], lo, np.where(seen, lo, -1), self.source[which]])
        (table,) = resident(_row_by_row, device, first.shape[1], first.tobytes())
        return table


def _row_by_row(columns: int, pieces: bytes) -> Sequence[np.ndarray]:
    """`Scattered.table` of pieces as int64 bytes: of each its number of rows, and its first in each column of the table."""
    size, *first = np.frombuffer(pieces, dtype=np.int64).reshape(-1, columns).T
    starts, within = np.repeat(np.column_stack(first), size, axis=0), ranges(np.zeros_like(size), size)
    return [np.where(starts < 0, -1, starts + within[:, None]).astype(np.int32)]


class Held(ABC):
    """What kernel calls give for rows, put together: results that are merged, or gradients that are added up.

    A *part* is what one call gives for some rows. Parts wait until some row has `at_once` of them, 4 with the fused Triton kernel
    and else 1, and are then put together in one pass: in half precision a part so costs 2 bytes an element, and the sum 2 to 8
    once, where one after the other they cost 10 each. A row is empty (0), has a sum in fp32 so far (`HERE`), or is final (`DONE`)
    in the dtype of the result, to which nothing can be added. A part that has all rows can become their memory itself.
    Other memory may be uninitialised: `finish` fills the rows to which nothing came.

    Three calls that give parts of four rows, `at_once` being 4::

        A   0 1 2 3     held: A
        B   . 1 2 .     held: A, B
        C   . . 2 3     held: A, B, C

    Nothing is computed until the end. Then A's tensor becomes the memory, and rows 1, 2 and 3 get A and B, A, B and C, and A and C
    in one launch; row 0 is there already. Were `at_once` 2, C would find two parts of row 2: A and B are put together before it is
    held.

    Either calls hand over parts (`add`), or a kernel puts rows together in place (`place`); `come` tells how many are to come.

    Args:
        rows: how many there are.
        come: how many parts each row gets in all, ``[rows]``; None where that is not known.
    """

    def __init__(self, rows: int, device: torch.device, come: np.ndarray | None = None) -> None:
        self.most, self.device = at_once(device.type), device
        self._held: list[Layer] = []
        self._seen = np.zeros(rows, dtype=np.int8)
        self._come, self._placed = come, False

    def add(self, intervals: np.ndarray, *part: Tensor) -> None:
        """A part of the rows ``lo:hi`` of some intervals ``[m, 2]``, end to end in its tensors; they may share rows."""
        came = _layers(intervals, part)
        if len(self._held) + len(came) > self.most and _deepest([*self._held, *came]) > self.most:
            self.flush()
        self._held += came
        if self.most == 1 or len(came) > self.most:
            self.flush()

    def flush(self) -> None:
        """Put together what is held."""
        self._start()
        self._put(self._pieces(0, len(self._seen)), clear=False)

    def finish(self, lo: int = 0, hi: int | None = None) -> None:
        """Put together what is held for rows ``lo:hi``, and store what a row has to which nothing came."""
        if not self._held and np.count_nonzero(self._seen) == len(self._seen):
            return
        self._start()
        self._put(self._pieces(lo, len(self._seen) if hi is None else hi), clear=True)
        self._seen[lo:hi] |= self._seen[lo:hi] == 0

    def place(self, intervals: np.ndarray) -> Place:
        """Where a kernel puts together rows of ordered disjoint intervals in place: those to come again in the exact dtype."""
        rows = self._states(intervals)
        return Place(self._result, self._total if rows[:, 2].any() else None, rows)

    def _states(self, intervals: np.ndarray) -> np.ndarray:
        """The rows of ordered disjoint intervals in which a kernel puts together what comes now, as in `Place`."""
        assert not self._held, "a kernel gives parts or puts together in place"
        if not len(intervals):
            return np.empty((0, 3), dtype=np.int64)
        if not self._placed:
            self._come, self._placed = None if self._come is None else self._come.copy(), True
        first = intervals[0, 0]
        seen = self._seen[first : intervals[-1, 1]]
        state = AGAIN * (seen == HERE).view(np.int8)
        state |= MORE if self._come is None else MORE * (self._come[first : intervals[-1, 1]] > 1).view(np.int8)
        points = distinct(np.concatenate([intervals.ravel(), first + 1 + np.flatnonzero(state[1:] != state[:-1])]))
        lo, hi = points[:-1], points[1:]
        inside = lo < intervals[np.searchsorted(intervals[:, 0], lo, side="right") - 1, 1]
        rows = np.column_stack([lo, hi, state[lo - first]])[inside]
        for begin, end, kind in rows.tolist():
            assert not (self._seen[begin:end] == DONE).any(), "no more was to come"
            self._seen[begin:end] = HERE if kind & MORE else DONE
            if self._come is not None:
                self._come[begin:end] -= 1
        return rows

    def _put(self, pieces: Pieces, clear: bool) -> None:
        if self._scattered(sum(any(start >= 0 for start in starts) for starts in pieces.source)):
            self._by_table(pieces, clear)
            return
        for rows, parts, seen in pieces:
            for n in range(0, len(parts), self.most):
                self._combine(rows, parts[n : n + self.most], seen or n > 0)
            if clear and not parts and not seen:
                self._clear(rows)

    def _by_table(self, pieces: Pieces, clear: bool = False, into: Tensor | None = None) -> None:
        """Put together all rows in few launches, the end of all in `into` if that is given."""
        for some, which, last in Scattered.of(pieces).groups(self.most):
            end = into if last else None
            assert not (some.touched & ~some.open).any(), "no more was to come"
            which = which & some.open & (end is not None or some.touched | (clear & last & ~some.seen))
            if which.any():
                self._scatter(some, which, end)

    def _scattered(self, launches: int) -> bool:
        """Pieces that take so many launches, one by one, are put together by a table."""
        return self.most > 1 and launches > 1

    def _pieces(self, lo: int, hi: int) -> Pieces:
        """The rows ``lo:hi`` in pieces with what was held for them, which no longer is."""
        inside, self._held = self._held, []
        if hi - lo < len(self._seen):
            rest = [layer.within(*outside) for layer in inside for outside in ((0, lo), (hi, len(self._seen)))]
            inside = [layer.within(lo, hi) for layer in inside]
            self._held, inside = ([layer for layer in layers if layer.at] for layers in (rest, inside))
        ends = {lo, hi, *(end for at, _ in inside for a, b, _ in at for end in (a, b))}
        if 0 < np.count_nonzero(self._seen) < len(self._seen) or self._placed:
            ends.update((lo + 1 + np.flatnonzero(np.diff(self._seen[lo:hi]))).tolist())
        cuts = sorted(ends)
        source = [[-1] * len(inside) for _ in cuts[1:]]
        seen = self._seen[cuts[:-1]].tolist()
        for n, (at, _) in enumerate(inside):
            for a, b, start in at:
                for piece in range(bisect_left(cuts, a), bisect_left(cuts, b)):
                    source[piece][n] = start + cuts[piece] - a
                self._seen[a:b] = HERE
        return Pieces(cuts, [part for _, part in inside], source, seen)

    def _taken(self, dtype: torch.dtype) -> Part | None:
        """A part that has all rows in `dtype`, contiguous, in memory that is no other tensor's; it is no longer held."""
        for n, (at, part) in enumerate(self._held):
            first = part[0]
            if at == [(0, first.shape[1], 0)] and first.shape[1] == len(self._seen) and first.dtype == dtype and alone(first):
                del self._held[n]
                return part
        return None

    @property
    @abstractmethod
    def _result(self) -> Tensor:
        """Where rows end."""

    @property
    @abstractmethod
    def _total(self) -> Tensor:
        """Where they are put together."""

    @abstractmethod
    def _start(self) -> None:
        """Take a part for the memory if there is none yet and one can be it."""

    @abstractmethod
    def _combine(self, rows: slice, parts: Sequence[Part], seen: bool) -> None:
        """Put together up to `most` parts of some rows, and what they have where something was `seen` before."""

    @abstractmethod
    def _clear(self, rows: slice) -> None:
        """Store what rows have to which nothing came."""

    @abstractmethod
    def _scatter(self, pieces: Scattered, which: np.ndarray, into: Tensor | None) -> None:
        """Put together the rows of those of `pieces`, which have up to `most` parts, in `into` or where they were; rows of which
        nothing has come are cleared."""


def alone(x: Tensor) -> bool:
    """Whether a tensor is contiguous and fills its memory, so that it is no part of another."""
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes > 0


def _layers(intervals: np.ndarray, part: Part) -> list[Layer]:
    """A part of intervals that may share rows, as parts of some that do not."""
    at, start = list[tuple[int, int, int]](), 0
    for lo, hi in intervals.tolist():
        at += [(lo, hi, start)] if lo < hi else []
        start += hi - lo
    if all(one[1] <= other[0] for one, other in pairwise(at)):
        return [Layer(at, part)] if at else []
    at.sort()
    turn = turns(np.array(at)).tolist()
    return [Layer([each for each, number in zip(at, turn, strict=True) if number == n], part) for n in range(max(turn) + 1)]


def _deepest(held: Sequence[Layer]) -> int:
    """The greatest number of parts that any one row has."""
    depth = most = 0
    for _, step in sorted((end, step) for layer in held for lo, hi, _ in layer.at for end, step in ((lo, 1), (hi, -1))):
        depth += step
        most = max(most, depth)
    return most
