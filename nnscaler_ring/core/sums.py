"""Gradients to which calls and messages add, in fp32 (float64 for float64)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .device import sum_dtype
from .held import HERE, Held, Part, Scattered, together


class Sum(Held):
    """A gradient ``[B, rows, H, D]``; a part is the gradient of some rows, in any dtype.

    Args:
        like: a tensor of its shape.
        end: its dtype in the end; the exact one, in which it is added up, where None.
        into: memory for the end, uninitialised; None: made, or taken, when it is needed.
        come: how many parts each row gets, see `Held`.

    Example:
        >>> import numpy as np
        >>> total = Sum(torch.empty(1, 3, 1, 1, dtype=torch.bfloat16), end=torch.bfloat16)
        >>> total.add(np.array([[0, 2]]), torch.ones(1, 2, 1, 1))
        >>> total.add(np.array([[1, 2]]), torch.ones(1, 1, 1, 1))
        >>> total.result().flatten().tolist()
        [1.0, 2.0, 0.0]
    """

    def __init__(
        self,
        like: Tensor,
        *,
        end: torch.dtype | None = None,
        into: Tensor | None = None,
        come: np.ndarray | None = None,
    ) -> None:
        super().__init__(like.shape[1], like.device, come)
        self.like, self._exact = like, sum_dtype(like.dtype)
        self._end, self._into = end or self._exact, into
        self.memory = into if self._end == self._exact else None

    def total(self) -> Tensor:
        """All that has come, 0 where nothing has, for kernels that add to it in place; not of rows that were done at a `place`."""
        self.finish()
        return self._total

    def result(self) -> Tensor:
        """The end: the gradient, rounded once. It may be the very part that has come."""
        if self._end == self._exact:
            return self.total()
        part = self._taken(self._end) if self._into is None else None
        if part is not None:
            (self._into,) = part
            if not (self._seen == HERE).any():  # it is all that has come but for what is held
                self.memory, self._seen[:] = self._into, HERE
                return self.total()
        into, pieces = self._result, self._pieces(0, len(self._seen))
        if self._scattered(len(pieces.seen)):
            self._by_table(pieces if part is None else pieces.besides(part), into=into)
            return into
        for rows, parts, seen in pieces:
            end = into[:, rows]
            terms = [*([] if part is None else [end]), *([self._total[:, rows]] if seen else []), *(x for (x,) in parts)]
            add_all(end, terms)
        return into

    @property
    def _total(self) -> Tensor:
        if self.memory is None:
            self.memory = self.like.new_empty(self.like.shape, dtype=self._exact)
        return self.memory

    @property
    def _result(self) -> Tensor:
        if self._end == self._exact:
            return self._total
        if self._into is None:
            self._into = self.like.new_empty(self.like.shape, dtype=self._end)
        return self._into

    def _start(self) -> None:
        if self.memory is None and (part := self._taken(self._exact)):
            (self.memory,), self._seen[:] = part, HERE

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
    """A gradient ``[B, L, H, D]`` like a tensor, in `dtype`, as `parts` that are summed: the heads and features of each cut.

    `come` has for each cut how many parts its rows get.
    """

    def __init__(
        self, like: Tensor, dtype: torch.dtype, cuts: Sequence[tuple[slice, slice]], come: Sequence[np.ndarray | None]
    ) -> None:
        self._memory = like.new_empty(like.shape, dtype=dtype) if len(cuts) > 1 else None
        self.parts = []
        for cut, each in zip(cuts, come, strict=True):
            at = (slice(None), slice(None), *cut)
            into = None if self._memory is None else self._memory[at]
            self.parts.append(Sum(like[at], end=dtype, into=into, come=each))

    def finish(self) -> Tensor:
        """The gradient, contiguous."""
        ends = [total.result() for total in self.parts]
        return ends[0] if self._memory is None else self._memory


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
