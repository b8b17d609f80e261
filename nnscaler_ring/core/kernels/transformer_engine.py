"""Transformer Engine 2.2.0 or newer: cuDNN's attention by ``fused_attn_fwd`` and ``fused_attn_bwd``.

Written to ``transformer_engine/pytorch/cpp_extensions/fused_attn.py`` of 2.2 .. 2.20. What is said here of masks, head dims and
cuDNN versions is in ``nvte_get_fused_attn_backend``; that the first auxiliary tensor is the log-sum-exp, ``[B, H, L, 1]`` for one
span and ``[T, H, 1]`` for rows end to end (cuDNN 9.6 or newer), and that backward takes a merged one, in its
``context_parallel.py``. It takes full and causal attention and windows of earlier keys; others are not in all those releases and
run on torch's FlashAttention-2. Its sinks, biases and dropout are not used. It has not run here on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .aten import AtenCuda
from .base import Case, Grad, Scores, Spans, Window
from .installed import Library, capability
from .packed import Call, Packed, Read, bounds

PACKAGE = Library(
    label="Transformer Engine",
    module="transformer_engine.pytorch.cpp_extensions.fused_attn",
    distributions=("transformer-engine", "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13"),
    minimum="2.2.0",
    optional=frozenset({"o_format", "do_format", "dqkv_layout", "dqkv_dtype"}),
)
BOTH = frozenset({"q", "k", "v", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q_padded"}) | {
    *("cu_seqlens_kv_padded", "attn_scale", "qkv_layout", "attn_mask_type", "window_size", "fake_dtype", "fused_attention_backend")
}
FORWARD = BOTH | {"is_training", "o_format"}
BACKWARD = BOTH | {"o", "d_o", "aux_ctx_tensors", "deterministic", "dqkv_dtype", "o_format", "do_format", "dqkv_layout"}


class TransformerEngine(Packed):
    """The backend ``F16_arbitrary_seqlen`` of its fused attention."""

    name = "transformer_engine"
    elsewhere = AtenCuda()

    def check_sizes(self, case: Case) -> None:
        if case.device != "cuda":
            raise NotImplementedError(f"{PACKAGE.label} is for cuda, the tensors are on {case.device}")
        module = PACKAGE.load()
        if case.dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(f"{PACKAGE.label} takes bfloat16 and float16, not {case.dtype}")
        (major, _), cudnn = capability(PACKAGE.label, 8, 9, 10), torch.backends.cudnn.version() or 0
        if cudnn < 91002:
            raise NotImplementedError(f"{PACKAGE.label} is used with cuDNN 9.10.2 or newer, not {cudnn}")
        widths = self.widths(case.head_dim, case.head_dim_v)
        if max(widths) > {8: 128, 9: 256, 10: 192 if widths == (192, 128) else 128}[major]:
            raise NotImplementedError(f"{PACKAGE.label} has no backward for head dims {widths} on a GPU {major}.x")
        if case.deterministic and (major == 8 or (major == 10 and cudnn < 91801)):
            raise NotImplementedError(f"{PACKAGE.label} has no deterministic backward on a GPU {major}.x with cuDNN {cudnn}")
        try:
            PACKAGE.check(module.fused_attn_fwd, FORWARD)
            PACKAGE.check(module.fused_attn_bwd, BACKWARD)
        except AttributeError as why:
            raise PACKAGE.unknown(str(why)) from why
        self.elsewhere.check_sizes(case)

    def widths(self, head_dim: int, head_dim_v: int) -> tuple[int, int]:
        return (192, 128) if 128 < head_dim <= 192 and head_dim_v <= 128 else super().widths(head_dim, head_dim_v)

    def groups(self, q: Tensor, k: Tensor, spans: Spans, window: Window, deterministic: bool) -> list[Spans]:
        """Rows end to end need a GPU of 9.0 or newer."""
        together = torch.cuda.get_device_capability()[0] > 8
        return super().groups(q, k, spans, window, deterministic) if together else np.split(spans, range(1, len(spans)))

    def calls(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores
    ) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        run = super().calls if _has(window) else self.elsewhere.calls
        return run(q, k, v, spans, window, scores)

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        run = super().backward if _has(window) else self.elsewhere.backward
        run(grad, k, v, spans, window, scores)

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        module = PACKAGE.loaded()
        out, (lse, *_), *_ = PACKAGE.call(module.fused_attn_fwd, _given(module, call, q, k, v) | {"is_training": True})
        lse = lse.squeeze(-1)
        return out, lse if call.cu_q is None else lse.T

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        module, (d_out, q, k, v, out, lse, _) = PACKAGE.loaded(), read
        given = _given(module, call, q, k, v)
        stats = (lse if call.cu_q is None else lse.T.contiguous()).unsqueeze(-1)
        state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of the dropout that is not there
        given |= {"o": out.contiguous(), "d_o": d_out.contiguous(), "aux_ctx_tensors": [stats, state]}
        given |= {"deterministic": call.deterministic, "dqkv_layout": given["qkv_layout"], "do_format": given["o_format"]}
        given |= {"dqkv_dtype": import_module("transformer_engine.pytorch.constants").TE_DType[q.dtype]}
        dq, dk, dv, *_ = PACKAGE.call(module.fused_attn_bwd, given)
        return dq, dk, dv


def _has(window: Window) -> bool:
    """Full, causal, or causal with a limit on the left."""
    return window == (-1, -1) or window[1] == 0


def _given(module: Any, call: Call, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What both passes are told; ``causal`` is aligned at the first row and key, which more cuDNN versions have."""
    single = call.cu_q is None
    causal = "causal" if call.num_q == call.num_k else "causal_bottom_right"
    mask = ["padding"] * (not single) + [causal] * (call.window != (-1, -1))
    cu_q, cu_k = (bounds(call.num_q, q), bounds(call.num_k, q)) if single else (call.cu_q, call.cu_k)
    form = "bshd" if single else "thd"
    return {
        **{"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), "fake_dtype": q.dtype},
        **{"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_k, "max_seqlen_q": call.most[0], "max_seqlen_kv": call.most[1]},
        **{"cu_seqlens_q_padded": None if single else cu_q, "cu_seqlens_kv_padded": None if single else cu_k},
        **{"qkv_layout": "_".join([form] * 3), "o_format": form, "attn_scale": call.scale, "window_size": call.window},
        "attn_mask_type": "_".join(mask) or "no_mask",
        "fused_attention_backend": module.FusedAttnBackend["F16_arbitrary_seqlen"],
    }
