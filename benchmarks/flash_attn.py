"""flash-attn's functions over a kernel of this package: libraries written for flash-attn run where there is none, on the kernel
that this package runs on.

What is here is what they call, with the parameters and conventions of flash-attn 2.8 (Dao-AILab/flash-attention,
``flash_attn/flash_attn_interface.py``): windows aligned at the last row and the last key, log-sum-exp ``[B, Hq, L]``, packed
``[Hq, T]``, rows that see no key with an out of 0 and a log-sum-exp of +inf.

Legend: `B` batch, `L` query rows, `M` key rows, `T` packed rows, `Hq`/`Hk` heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from nnscaler_ring.core.kernels import Case, Grad, Kernel, Scores, choose
from nnscaler_ring.core.kernels.base import Spans, Window
from nnscaler_ring.core.sums import Sum


@contextmanager
def installed() -> Iterator[None]:
    """In this context ``flash_attn`` can be imported, and is this."""
    top, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for name in ("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        setattr(interface, name, globals()[name])
    # Imported by some beside what they call; it is not here.
    top.flash_attn_func = top.flash_attn_varlen_func = _absent  # type: ignore[attr-defined]
    top.flash_attn_interface = interface  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {module.__name__: module for module in (top, interface)}):
        yield


def kernel_of(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The kernel that this package takes for such tensors."""
    return choose("auto", Case(q.device.type, q.dtype, q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2]))


def _absent(*args: Any, **named: Any) -> None:
    raise NotImplementedError("the stand-in for flash-attn has no such function")


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    _only_plain(dropout_p, softcap, alibi_slopes)
    window = _window(causal, window_size_left, window_size_right)
    return *_forward(q, k, v, _spans([0, q.shape[1]], [0, k.shape[1]], window), window, softmax_scale), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    _only_plain(dropout_p, softcap, alibi_slopes)
    window = _window(causal, window_size_left, window_size_right)
    spans = _spans([0, q.shape[1]], [0, k.shape[1]], window)
    _backward((q, out, dout, softmax_lse), k, v, (dq, dk, dv), spans, window, softmax_scale)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, None, None]:
    _only_plain(dropout_p, softcap, alibi_slopes)
    window = _window(causal, window_size_left, window_size_right)
    spans = _spans(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), window)
    out, lse = _forward(*(x.unsqueeze(0) for x in (q, k, v)), spans, window, softmax_scale)
    return out.squeeze(0), lse.squeeze(0), None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    _only_plain(dropout_p, softcap, alibi_slopes)
    window = _window(causal, window_size_left, window_size_right)
    spans = _spans(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), window)
    rows, (k, v), into = ([x.unsqueeze(0) for x in xs] for xs in ((q, out, dout, softmax_lse), (k, v), (dq, dk, dv)))
    _backward(rows, k, v, into, spans, window, softmax_scale)


def _only_plain(dropout_p: float, softcap: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p or softcap or alibi_slopes is not None:
        raise NotImplementedError("the stand-in for flash-attn has no dropout, no soft cap and no ALiBi")


def _window(causal: bool, left: int, right: int) -> Window:
    return left, 0 if causal else right


def _spans(cu_q: Sequence[int], cu_k: Sequence[int], window: Window) -> Spans:
    """Each sequence's rows that see a key, and its keys that are seen."""
    spans, (left, right) = [], window
    for (i0, i1), (j0, j1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        ahead = (j1 - j0) - (i1 - i0)  # of a row, in keys
        blind = max(0, -ahead - right) if right >= 0 else 0
        unseen = max(0, blind + ahead - left) if left >= 0 else 0
        if i0 + blind < i1 and j0 + unseen < j1:
            spans.append((i0 + blind, i1, j0 + unseen, j1))
    return np.array(spans, dtype=np.int64).reshape(-1, 4)


def _forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    part, part_lse = kernel_of(q, k, v).forward(q, k, v, spans, window, Scores(scale=scale))
    if part.shape[1] == q.shape[1]:
        return part.to(q.dtype), part_lse
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), part_lse.new_full((q.shape[0], q.shape[2], q.shape[1]), math.inf)
    rows = torch.cat([torch.arange(i0, i1) for i0, i1, _, _ in spans.tolist()])
    out[:, rows], lse[..., rows] = part.to(q.dtype), part_lse
    return out, lse


def _backward(
    rows: Sequence[Tensor], k: Tensor, v: Tensor, into: Sequence[Tensor], spans: Spans, window: Window, scale: float
) -> None:
    """Of `rows`, q, out, their gradient and the log-sum-exp, the gradients dq, dk and dv."""
    q, out, d_out, lse = rows
    sums = [Sum(x, end=x.dtype, into=x) for x in into]
    kernel_of(q, k, v).backward(Grad(q, out, d_out, lse.contiguous(), *sums), k, v, spans, window, Scores(scale=scale))
    for total in sums:
        total.result()
