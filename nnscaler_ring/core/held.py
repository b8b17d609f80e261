"""What calls give for rows, held until several can be put together in one pass over memory."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

Part = tuple[Tensor, ...]
"""Tensors ``[B, n, ...]`` about the same rows."""


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def at_once(device: str) -> int:
    """How many parts of a row are put together in one pass over memory."""
    return 1 if device not in ("cuda", "xpu") or (kernel := fused()) is None else int(kernel.MOST)


@lru_cache(maxsize=1)
def fused() -> ModuleType | None:
    """`kernels.fused`, or None without Triton."""
    return None if importlib.util.find_spec("triton") is None else importlib.import_module(".kernels.fused", __package__)


class Held(ABC):
    """Rows to which calls give one part after the other.

    What comes is held until a row would have more than `at_once`: in half precision parts that are put together take 2 bytes an
    element each, and 2 to 8 once, one after the other 10 each. A part that has all rows can be their memory itself, which takes
    none. Other memory may be uninitialised: `finish` fills all. What ends in another dtype is spent: nothing can be added to it.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.most = at_once(device.type)
        self._held: list[tuple[int, int, Part]] = []
        self._seen = np.zeros(rows, dtype=bool)

    def add(self, intervals: np.ndarray, *part: Tensor) -> None:
        """A part of the rows ``lo:hi`` of some intervals ``[m, 2]``, end to end in its tensors; they may share rows."""
        came, start = list[tuple[int, int, Part]](), 0
        for lo, hi in intervals.tolist():
            came.append((lo, hi, part if len(intervals) == 1 else tuple(x[:, start : start + hi - lo] for x in part)))
            start += hi - lo
        if len(self._held) + len(came) > self.most and _deepest([*self._held, *came]) > self.most:
            self.flush()
        self._held += came
        if self.most == 1 or (len(came) > self.most and _deepest(came) > self.most):
            self.flush()

    def flush(self) -> None:
        """Put together what is held."""
        self._start()
        for rows, parts, seen in self._pieces(0, len(self._seen)):
            self._join(rows, parts, seen)

    def finish(self, lo: int = 0, hi: int | None = None) -> None:
        """Put together what is held for rows ``lo:hi``, and store what a row has to which nothing came."""
        if not self._held and np.count_nonzero(self._seen) == len(self._seen):
            return
        self._start()
        for rows, parts, seen in self._pieces(lo, len(self._seen) if hi is None else hi):
            self._join(rows, parts, seen)
            if not parts and not seen:
                self._clear(rows)
        self._seen[lo:hi] = True

    def _join(self, rows: slice, parts: Sequence[Part], seen: bool) -> None:
        for n in range(0, len(parts), self.most):
            self._combine(rows, parts[n : n + self.most], seen or n > 0)

    def _pieces(self, lo: int, hi: int) -> list[tuple[slice, list[Part], bool]]:
        """The rows ``lo:hi`` in pieces, each with what is held for it, no longer, and whether something came before."""
        inside, rest = list[tuple[int, int, Part]](), list[tuple[int, int, Part]]()
        for i0, i1, part in self._held:
            for a, b, into in ((i0, min(i1, lo), rest), (max(i0, lo), min(i1, hi), inside), (max(i0, hi), i1, rest)):
                if a < b:
                    into.append((a, b, part if (a, b) == (i0, i1) else tuple(x[:, a - i0 : b - i0] for x in part)))
        ends = {lo, hi, *(end for a, b, _ in inside for end in (a, b))}
        if 0 < np.count_nonzero(self._seen) < len(self._seen):
            ends.update((lo + 1 + np.flatnonzero(np.diff(self._seen[lo:hi]))).tolist())
        cuts = sorted(ends)
        found: dict[int, list[Part]] = {start: [] for start in cuts}
        for a, b, part in inside:
            for start, end in pairwise(cuts[bisect_left(cuts, a) : bisect_right(cuts, b)]):
                whole = (start, end) == (a, b)
                found[start].append(part if whole else tuple(x[:, start - a : end - a] for x in part))
        pieces = [(slice(start, end), found[start], bool(self._seen[start])) for start, end in pairwise(cuts)]
        for a, b, _ in inside:
            self._seen[a:b] = True
        self._held = rest
        return pieces

    def _taken(self, dtype: torch.dtype) -> Part | None:
        """A part that has all rows in `dtype`, contiguous, in memory that is no other tensor's; it is no longer held."""
        for n, (lo, hi, part) in enumerate(self._held):
            first = part[0]
            alone = first.is_contiguous() and first.untyped_storage().nbytes() == first.nbytes
            if hi - lo == len(self._seen) and first.dtype == dtype and alone:
                del self._held[n]
                return part
        return None

    @abstractmethod
    def _start(self) -> None:
        """Take a part for the memory if there is none yet and one can be it."""

    @abstractmethod
    def _combine(self, rows: slice, parts: Sequence[Part], seen: bool) -> None:
        """Put together up to `most` parts of some rows, and what they have where something was `seen` before."""

    @abstractmethod
    def _clear(self, rows: slice) -> None:
        """Store what rows have to which nothing came."""


def _deepest(held: Sequence[tuple[int, int, Part]]) -> int:
    """How many parts the row has that has most."""
    depth = most = 0
    for _, step in sorted((end, step) for lo, hi, _ in held for end, step in ((lo, 1), (hi, -1))):
        depth += step
        most = max(most, depth)
    return most
