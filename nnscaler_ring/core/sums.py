"""Gradients to which calls and messages add, in fp32 (float64 for float64)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .held import Held, Part, Scattered, exact_dtype, together


class Sum(Held):
    """A gradient ``[B, rows, H, D]``; a part is the gradient of some rows, in any dtype.

    Args:
        like: a tensor of its shape.
        memory: where it is added up, uninitialised, in the `exact_dtype` of `like`; None: made, or taken, when it is needed.

    Example:
        >>> import numpy as np
        >>> total = Sum(torch.empty(1, 3, 1, 1, dtype=torch.bfloat16))
        >>> total.add(np.array([[0, 2]]), torch.ones(1, 2, 1, 1))
        >>> total.add(np.array([[1, 2]]), torch.ones(1, 1, 1, 1))
        >>> total.result(torch.bfloat16).flatten().tolist()
        [1.0, 2.0, 0.0]
    """

    def __init__(self, like: Tensor, memory: Tensor | None = None) -> None:
        super().__init__(like.shape[1], like.device)
        self.like, self.memory, self._exact = like, memory, exact_dtype(like.dtype)

    def total(self) -> Tensor:
        """All that has come, 0 where nothing has; kernels add to it in place."""
        self.finish()
        return self._total

    def result(self, dtype: torch.dtype) -> Tensor:
        """The end: the gradient, rounded once. It may be the very part that has come."""
        if dtype == self._exact:
            return self.total()
        if (part := self._taken(dtype)) is None:
            return self.store(self.like.new_empty(self.like.shape, dtype=dtype))
        return self.store(part[0], holds=True)

    def store(self, into: Tensor, holds: bool = False) -> Tensor:
        """The end: the gradient in another dtype, rounded once, and besides what `into` `holds`, if it does."""
        pieces = self._pieces(0, len(self._seen))
        if self._scattered(pieces):
            self._by_table(pieces.besides((into,)) if holds else pieces, into=into)
            return into
        for rows, parts, seen in pieces:
            end = into[:, rows]
            terms = [*([end] if holds else []), *([self._total[:, rows]] if seen else []), *(x for (x,) in parts)]
            add_all(end, terms)
        return into

    @property
    def _total(self) -> Tensor:
        if self.memory is None:
            self.memory = self.like.new_empty(self.like.shape, dtype=self._exact)
        return self.memory

    def _start(self) -> None:
        if self.memory is None and (part := self._taken(self._exact)):
            (self.memory,), self._seen[:] = part, True

    def _combine(self, rows: slice, parts: Sequence[Part], seen: bool) -> None:
        total = self._total[:, rows]
        add_all(total, [*([total] if seen else []), *(x for (x,) in parts)])

    def _clear(self, rows: slice) -> None:
        self._total[:, rows].zero_()

    def _scatter(self, pieces: Scattered, which: np.ndarray, into: Tensor | None) -> None:
        total = into if into is not None and not pieces.seen[which].any() else self._total
        terms = [total, *(x for (x,) in pieces.parts)]
        together().add_(total if into is None else into, terms, pieces.table(which, self.device))


class Whole:
    """A gradient ``[B, L, H, D]`` like a tensor, in `dtype`, as `parts` that are summed: the heads and features of each cut."""

    def __init__(self, like: Tensor, dtype: torch.dtype, cuts: Sequence[tuple[slice, slice]]) -> None:
        self._like, self._dtype = like, dtype
        self._at = [(slice(None), slice(None), *cut) for cut in cuts]
        together = len(cuts) > 1 and dtype == exact_dtype(like.dtype)
        self._memory = like.new_empty(like.shape, dtype=dtype) if together else None
        self.parts = [Sum(like[at], None if self._memory is None else self._memory[at]) for at in self._at]

    def finish(self) -> Tensor:
        """The gradient, contiguous."""
        if len(self.parts) == 1:
            return self.parts[0].result(self._dtype)
        if self._memory is not None:
            for total in self.parts:
                total.finish()
            return self._memory
        made = self._like.new_empty(self._like.shape, dtype=self._dtype)
        for at, total in zip(self._at, self.parts, strict=True):
            total.store(made[at])
        return made


def add_all(out: Tensor, terms: Sequence[Tensor]) -> None:
    """Store the sum of terms ``[B, n, H, D]``, in their order; `out` may be the first of them."""
    if not terms:
        out.zero_()
    elif len(terms) == 1:
        if terms[0] is not out:
            out.copy_(terms[0])
    elif len(terms) == 2 and terms[0] is out:
        out.add_(terms[1])
    else:
        together().add_(out, terms)
