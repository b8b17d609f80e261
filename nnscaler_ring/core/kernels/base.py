"""The interface that every kernel backend has, small enough to write one in an afternoon.

Legend: `B` batch, `L` query rows, `M` key rows, `Hq`/`Hk` heads, `D`/`Dv` head dims. ``ValueError`` means that the user is wrong,
``NotImplementedError`` that this backend cannot: the registry then tries the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Spans = np.ndarray
"""``[n, 4]`` ``(i0, i1, j0, j1)``: rows ``i0:i1`` of q read rows ``j0:j1`` of k and v. No two spans share a query row."""

Window = tuple[int, int]
"""``(left, right)`` aligned at each span's last row and last key; -1 for no limit."""


@dataclass(frozen=True)
class Case:
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    heads: int
    heads_k: int
    deterministic: bool = False


class Kernel(ABC):
    """A backend: attention over spans that share a window, forward with its log-sum-exp, backward from the global one."""

    name: str

    @abstractmethod
    def check(self, case: Case) -> None:
        """Nothing, or NotImplementedError that says what this backend lacks for `case`."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of each span.

        Args:
            q: ``[B, L, Hq, D]``, any strides with the last dim contiguous, as k ``[B, M, Hk, D]`` and v ``[B, M, Hk, Dv]``.
            spans: the rows, trimmed: every row of a span sees a key of it.
            window: the window they share.
            scale: the factor of the scores.

        Returns:
            out ``[B, n, Hq, Dv]`` in q's dtype or, where the backend has it, fp32, and lse ``[B, Hq, n]`` (natural log, fp32,
            float64 for float64) of the spans' rows, span after span.
        """

    @abstractmethod
    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scale: float) -> None:
        """Add each span's part of dq, dk and dv to the accumulators in `grad`."""


@dataclass(frozen=True, eq=False)
class Grad:
    """What a backward call reads of the queries and where it adds.

    Attributes:
        q, out, d_out: ``[B, L, Hq, D or Dv]``; `out` is the result over *all* keys, not of one call.
        lse: ``[B, Hq, L]`` over all keys.
        dq: ``[B, L, Hq, D]`` accumulator, fp32 (float64 for float64).
        dk, dv: ``[B, M, Hk, D or Dv]`` accumulators of the buffer's rows.
    """

    q: Tensor
    out: Tensor
    d_out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    deterministic: bool = False


def rows(spans: Spans) -> Sequence[tuple[int, int, int, int]]:
    """The spans as tuples of ints."""
    return [tuple(span) for span in spans.tolist()]
