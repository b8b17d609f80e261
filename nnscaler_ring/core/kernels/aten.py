"""What torch ships: its CPU flash kernel, FlashAttention-2 and cuDNN on CUDA, oneDNN on XPU.

Nothing to install, so one of these is there everywhere. The CPU's and oneDNN's know only full and top-left causal attention and
masks, see `tiled`. On CUDA FlashAttention-2 takes many spans and any window; on Hopper and data-centre Blackwell cuDNN is much
faster where a call is full or causal with as many rows as keys (H200, bf16, D 128, causal, 8k tokens: 655 / 526 TFLOP/s forward /
backward, FlashAttention-2 about 366 / 330 on an H100), so long spans of that kind are given to it one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .base import Case, Spans, Window
from .packed import Call, Packed, Read
from .tiled import Tiled

aten = torch.ops.aten

HALF = (torch.bfloat16, torch.float16)


class AtenCpu(Tiled):
    """``_scaled_dot_product_flash_attention_for_cpu``: all floating dtypes, GQA, lse in fp32 (float64 for float64).

    Half precision is computed in fp32 and rounded once, at the end. A CPU without matrix products of bf16 is faster that way, too:
    one with AVX2 takes 8 to 12 times as long for gradients in bf16 or fp16 as in fp32.
    """

    name = "aten"
    shares_heads = TorchVersion(torch.__version__) >= "2.13"
    """On 2.6 its backward with fewer key heads writes out of bounds; 2.13 is right, and releases between were not tried."""
    exact = True

    def check_sizes(self, case: Case) -> None:
        if case.device != "cpu":
            raise NotImplementedError(f"this is torch's CPU kernel, the tensors are on {case.device}")

    def attend(self, read: Sequence[Tensor], causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(*read, 0.0, causal, attn_mask=mask, scale=scale)

    def gradients(self, read: Sequence[Tensor], lse: Tensor, causal: bool, mask: Tensor | None, scale: float) -> Sequence[Tensor]:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(*read, lse, 0.0, causal, attn_mask=mask, scale=scale)


class AtenXpu(Tiled):
    """``_scaled_dot_product_fused_attention_overrideable`` and its backward, which torch gives to oneDNN on XPU.

    Forward alone came first: where torch has no backward registered, it is not taken. Its forward has a log-sum-exp (``[B, H, L,
    1]``) only where gradients are recorded for q, its backward wants as many key heads as query heads; source: torch's
    ``native/mkldnn/xpu/Attention.cpp``. torch's FlashAttention on XPU is not used: releases differ in what it takes.
    """

    name = "aten"
    shares_heads = False

    def check_sizes(self, case: Case) -> None:
        if case.device != "xpu":
            raise NotImplementedError(f"this is torch's XPU kernel, the tensors are on {case.device}")
        for op in (
            aten._scaled_dot_product_fused_attention_overrideable,
            aten._scaled_dot_product_fused_attention_overrideable_backward,
        ):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(op.default.name(), "XPU"):
                raise NotImplementedError(f"torch {torch.__version__} has no {op.default.name()} on xpu")
        if case.dtype not in (*HALF, torch.float32):
            raise NotImplementedError(f"oneDNN takes bfloat16, float16 and float32, not {case.dtype}")
        if max(case.head_dim, case.head_dim_v) > 576:
            raise NotImplementedError(f"oneDNN takes head dims up to 576, not {case.head_dim} and {case.head_dim_v}")
        if case.deterministic:
            raise NotImplementedError("oneDNN does not say whether its backward gives the same bits each time")

    def attend(self, read: Sequence[Tensor], causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = read
        with torch.enable_grad():
            forward = aten._scaled_dot_product_fused_attention_overrideable
            out, lse, *_ = forward(q.detach().requires_grad_(), k, v, _four_dims(mask), 0.0, causal, scale=scale)
        return out.detach(), lse.detach().reshape(q.shape[:3])

    def gradients(self, read: Sequence[Tensor], lse: Tensor, causal: bool, mask: Tensor | None, scale: float) -> Sequence[Tensor]:
        d_out, q, k, v, out = read
        state = torch.zeros((), dtype=torch.int64)  # of the dropout that is not there
        backward = aten._scaled_dot_product_fused_attention_overrideable_backward
        wanted, sizes = [True, True, True, False], (None, None, q.shape[2], k.shape[2])
        saved = (out, lse.unsqueeze(3), *sizes, 0.0, causal, state, state)
        return backward(d_out, q, k, v, _four_dims(mask), wanted, *saved, scale=scale)[:3]


def _four_dims(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None, None]


class AtenCuda(Packed):
    """``_flash_attention_forward`` and ``_backward``, FlashAttention-2 as torch ships it, and cuDNN where that is faster."""

    name = "aten"

    def check_sizes(self, case: Case) -> None:
        if case.device != "cuda":
            raise NotImplementedError(f"this is torch's CUDA kernel, the tensors are on {case.device}")
        if case.dtype not in HALF:
            raise NotImplementedError(f"FlashAttention-2 takes bfloat16 and float16, not {case.dtype}")
        if max(case.head_dim, case.head_dim_v) > 256:
            raise NotImplementedError(f"FlashAttention-2 takes head dims up to 256, not {case.head_dim} and {case.head_dim_v}")
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            raise NotImplementedError("FlashAttention-2 needs a GPU of compute capability 8.0 or newer")

    def groups(self, q: Tensor, k: Tensor, spans: Spans, window: Window, deterministic: bool) -> list[Spans]:
        sizes = [(i1 - i0, j1 - j0) for i0, i1, j0, j1 in spans.tolist()]
        alone = all(suits_cudnn(q, size, window, deterministic) for size in sizes)
        return np.split(spans, range(1, len(spans))) if alone else super().groups(q, k, spans, window, deterministic)

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if call.cu_q is None and suits_cudnn(q, call.most, call.window, call.deterministic):
            heads_first, causal = [_plain(x).transpose(1, 2) for x in (q, k, v)], call.window[1] == 0
            with _or_flash_attention():
                out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, causal, scale=call.scale)
                return out.transpose(1, 2), lse.reshape(lse.shape[:3])
        sizes = (call.cu_q, call.cu_k, *call.most)
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *sizes, 0.0, False, False, scale=call.scale, **_sides(call.window))
        return out, call.cut(lse) if call.cu_q is not None and _pads() else lse

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        sizes = (call.cu_q, call.cu_k, *call.most)
        if call.cu_q is None and suits_cudnn(read.q, call.most, call.window, call.deterministic):
            d_out, out = read.d_out.contiguous(), read.out.contiguous()  # what was prepared is found by q, k and v alone
            heads_first = [_plain(x).transpose(1, 2) for x in (d_out, read.q, read.k, read.v, out)]
            causal = call.window[1] == 0
            lse = read.lse.unsqueeze(3) if _cudnn_lse_dims() == 4 else read.lse
            seed = torch.zeros((), dtype=torch.int64, device=lse.device)  # of the dropout that is not there
            backward = aten._scaled_dot_product_cudnn_attention_backward
            with _or_flash_attention():
                grads = backward(*heads_first, lse, seed, seed, None, *sizes, 0.0, causal, scale=call.scale)
                return [x.transpose(1, 2) for x in grads]
        read = read._replace(lse=call.padded(read.lse)) if call.cu_q is not None and _pads() else read
        state = torch.zeros(2, dtype=torch.int64, device=read.q.device)
        with _deterministic(call.deterministic):
            backward = aten._flash_attention_backward
            return backward(*read[:6], *sizes, 0.0, False, state, state[:0], scale=call.scale, **_sides(call.window))


LONG, UNIT = 1024, 128
"""The fewest rows and keys for which a span gets a call of cuDNN by itself (not measured), and what both must be multiples of:
cuDNN prepares each size that is new for half a second, so every length of a document (FunASR#3704), and results of sizes that are
no multiples have been wrong (pytorch#196678)."""


def suits_cudnn(q: Tensor, size: tuple[int, int], window: Window, deterministic: bool) -> bool:
    """Whether cuDNN takes a span of so many rows and keys, and is the faster one.

    Its causal attention is aligned at the first row and key, and torch says that it is not deterministic. Head dims above 128 and
    GPUs besides 9.0 and 10.x are left to FlashAttention-2, as are versions before 9.10.2: Transformer Engine names faults of
    9.10.0 and 9.10.1. ``torch.backends.cuda.enable_cudnn_sdp(False)`` turns it off, as does a call that it refused.
    """
    kind = window == (-1, -1) or (window == (-1, 0) and size[0] == size[1])
    if not kind or deterministic or min(size) < LONG or size[0] % UNIT or size[1] % UNIT or q.shape[-1] > 128:
        return False
    return not _REFUSED and _has_cudnn() and torch.backends.cuda.cudnn_sdp_enabled()


_REFUSED: list[str] = []
"""What cuDNN said when it would not prepare a call."""


@contextmanager
def _or_flash_attention() -> Iterator[None]:
    """A call that cuDNN refuses goes on behind this, to FlashAttention-2, as does every later one of this process.

    torch keeps an empty graph for it: a second call of its kind would end the process (``native/cudnn/MHA.cpp``).
    """
    try:
        yield
    except RuntimeError as why:
        if "cudnn" not in str(why).lower():
            raise
        _REFUSED.append(str(why))
        warnings.warn(f"cuDNN refused a call, FlashAttention-2 is used from now on: {why}", stacklevel=2)


def _plain(x: Tensor) -> Tensor:
    """``[B, L, H, D]`` without gaps between batch rows, as its gradient lies: some releases of torch compare their strides with
    those that cuDNN was told, also of a single row."""
    if x.shape[0] == 1:
        return x.squeeze(0).unsqueeze(0)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if reach == x.numel() else x.contiguous()


def _has_cudnn() -> bool:
    """A GPU and a cuDNN for which it is the faster one."""
    new = torch.version.hip is None and torch.cuda.get_device_capability()[0] in (9, 10)
    return new and (torch.backends.cudnn.version() or 0) >= 91002


@lru_cache(maxsize=1)
def _pads() -> bool:
    """Whether torch has a flash-attn that pads the log-sum-exp of many spans, as 2.6 does."""
    return aten._flash_attention_forward.default._schema.returns[2].name == "philox_seed"


@lru_cache(maxsize=1)
def _cudnn_lse_dims() -> int:
    """How many dims cuDNN's log-sum-exp has in this torch, ``[B, H, L, 1]`` or ``[B, H, L]``; its backward takes the same."""
    x = torch.empty(1, 1, 1, 8, dtype=torch.float16, device="meta")
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _sides(window: Window) -> dict[str, int | None]:
    return {"window_size_left": window[0], "window_size_right": window[1]}


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's own switch for FlashAttention's deterministic backward, set for one call."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before, warn_only=warn)
