"""The attention variants that the example can train with: the op to call, and what to draw of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from torch import Tensor

from nnscaler_ring import ops
from nnscaler_ring.annotations.spec import SPECS, OpSpec
from nnscaler_ring.core import layouts, mask

from .model import Attention

NUM_SINKS = 1
"""First bytes of each document that the streaming variant keeps in sight."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table below.

    Attributes:
        op: ``(q, k, v, cu_seqlens, window_size) -> out``, shapes as in `model.Attention`.
        spec: what the op says of itself; the picture needs the layout that it computes in, while tensors go in and come out
            in natural order.
        windowed: whether a query sees only the `window_size` keys before it, and itself.
        sinks: number of first keys of each document that are seen from beyond the window.
    """

    op: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    spec: OpSpec
    windowed: bool = False
    sinks: int = 0

    def attention(self, window_size: int) -> Attention:
        """The attention function that the model calls."""
        op = self.op

        def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:  # no lambda: nnscaler reads its source
            return op(q, k, v, cu_seqlens, window_size)

        return attention

    def mask(self, cu_seqlens: np.ndarray, window_size: int) -> mask.Mask:
        """Who sees whom in the documents of `cu_seqlens`."""
        window = (window_size, 0) if self.windowed else (-1, -1)
        return mask.build(int(cu_seqlens[-1]), causal=True, window=window, sinks=self.sinks, cu_seqlens_q=cu_seqlens)

    def owner(self, cu_seqlens: np.ndarray, world_size: int) -> np.ndarray:
        """For each token the rank that computes its query: int64 ``[S]``."""
        return layouts.build(self.spec.layout, int(cu_seqlens[-1]), world_size, cu_seqlens).owner()[0]


def _ring(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int) -> Tensor:
    return ops.wrap_ring_attn_func(q, k, v, cu_seqlens=cu_seqlens)


def _zigzag(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int) -> Tensor:
    return ops.wrap_zigzag_attn_func(q, k, v, cu_seqlens=cu_seqlens)


def _stripe(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int) -> Tensor:
    return ops.wrap_stripe_attn_func(q, k, v, cu_seqlens=cu_seqlens)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int) -> Tensor:
    q, k, v = (x.squeeze(0) for x in (q, k, v))  # packed tokens have no batch dim
    return ops.wrap_ring_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True).unsqueeze(0)


def _window(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int) -> Tensor:
    return ops.wrap_sliding_window_attn_func(q, k, v, window_size, cu_seqlens=cu_seqlens)


def _streaming(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int) -> Tensor:
    return ops.wrap_streaming_llm_attn_func(q, k, v, window_size, num_sinks=NUM_SINKS, cu_seqlens=cu_seqlens)


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "ring": Variant(op=_ring, spec=SPECS["wrap_ring_attn_func"]),
        "zigzag": Variant(op=_zigzag, spec=SPECS["wrap_zigzag_attn_func"]),
        "stripe": Variant(op=_stripe, spec=SPECS["wrap_stripe_attn_func"]),
        "window": Variant(op=_window, spec=SPECS["wrap_sliding_window_attn_func"], windowed=True),
        "streaming": Variant(op=_streaming, spec=SPECS["wrap_streaming_llm_attn_func"], windowed=True, sinks=NUM_SINKS),
        "varlen": Variant(op=_varlen, spec=SPECS["wrap_ring_attn_varlen_func"]),
    }
)
"""What ``--variant`` may name."""
