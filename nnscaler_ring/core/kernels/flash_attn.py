"""flash-attn: what its versions 2, 3 and 4 have in common, and version 2; others: `flash_attn_hopper`, `flash_attn_cute`.

The same rows and windows, but other names, arities and conventions. Windows are aligned at the last row and key, the log-sum-exp is
natural, gradients are in the inputs' dtype and added to fp32 here. Dropout is not used: its random numbers are of rows and keys of
a call, not of positions. Version 2 is called as ``flash_attn/flash_attn_interface.py`` of 2.5.5 .. 2.8.3 is written; it has not run
here on a GPU.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .base import Case
from .installed import Library, capability, parameters
from .packed import Call, Packed, Read

FORWARD = frozenset({"q", "k", "v", "softmax_scale", "causal", "is_causal"}) | {
    *("window_size", "window_size_left", "window_size_right"),
}
BACKWARD = FORWARD | {"dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"}
BOUNDS = frozenset({"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"})


class FlashAttn(Packed):
    """What the three have in common."""

    name = "flash_attn"
    features = frozenset({"softcap"})
    package: Library

    def __init__(self) -> None:
        self.label = self.package.label

    def check_sizes(self, case: Case) -> None:
        label = self.label
        if case.device != "cuda":
            raise NotImplementedError(f"{label} is for cuda, the tensors are on {case.device}")
        module = self.package.load()
        if case.dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(f"{label} takes bfloat16 and float16, not {case.dtype}")
        if max(case.head_dim, case.head_dim_v) > 256:
            raise NotImplementedError(f"{label} takes head dims up to 256, not {case.head_dim} and {case.head_dim_v}")
        self.check_gpu(case)
        try:
            self.check_functions(module, case.features & {"softcap"})
        except AttributeError as why:
            raise self.package.unknown(str(why)) from why

    @abstractmethod
    def check_gpu(self, case: Case) -> None:
        """NotImplementedError for what this GPU or build lacks."""

    @abstractmethod
    def check_functions(self, module: Any, features: frozenset[str]) -> None:
        """NotImplementedError unless the release's functions take what is passed."""

    def given(self, call: Call, bounded: bool, **more: Any) -> dict[str, Any]:
        """What a call says by the names of all releases."""
        left, right = self.window(call)
        sides = {"window_size": (left, right), "window_size_left": left, "window_size_right": right}
        causal = dict.fromkeys(("causal", "is_causal"), call.window == (-1, 0))
        said = {**more, **sides, **causal, "softmax_scale": call.scale}
        said |= {"softcap": call.softcap} if call.softcap else {}
        if not bounded:
            return said
        max_q, max_k = (None, None) if call.cu_q is None else call.most
        return said | {"cu_seqlens_q": call.cu_q, "cu_seqlens_k": call.cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}

    def in_place(self, backward: Callable[..., Any], call: Call, read: Read, bounded: bool) -> list[Tensor]:
        """The gradients of a function that writes them into tensors that it is given."""
        d_out, q, k, v, out, lse, _ = read
        grads = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
        tensors = {"dout": d_out, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, **grads}
        self.package.call(backward, self.given(call, bounded, **tensors, deterministic=call.deterministic))
        return list(grads.values())

    def window(self, call: Call) -> tuple[int | None, int | None]:
        """The window as the library has it."""
        return call.window


class FlashAttn2(FlashAttn):
    """flash-attn 2: functions of their own for one span and for many.

    2.7 made them custom ops of torch, gave the window's sides a parameter each and returns 4 results instead of 8. Before 2.6,
    which brought the soft cap, many spans had a padded log-sum-exp ``[n, H, rows]``. Rows that see nothing have one of +inf.
    """

    package = Library(
        label="flash-attn 2",
        module="flash_attn.flash_attn_interface",
        distributions=("flash-attn",),
        minimum="2.5.5",
        neutral=MappingProxyType(
            {"dropout_p": 0.0, "softcap": 0.0, "return_softmax": False, "alibi_slopes": None, "block_table": None}
        ),
    )

    def check_gpu(self, case: Case) -> None:
        capability(self.label, 8, 9, 10, 12)

    def check_functions(self, module: Any, features: frozenset[str]) -> None:
        for forward, backward, more in ((*_dense(module), frozenset()), (*_varlen(module), BOUNDS)):
            self.package.check(forward, FORWARD | more | features)
            self.package.check(backward, BACKWARD | more | features)

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        module, single = self.package.loaded(), call.cu_q is None
        forward, _ = _dense(module) if single else _varlen(module)
        results = self.package.call(forward, self.given(call, not single, q=q, k=k, v=v))
        if len(results) not in (4, 8):
            raise self.package.unknown(f"{len(results)} results")
        lse = results[5 if len(results) == 8 else 1]
        if not single and _pads(forward):
            lse = call.cut(lse)
        return results[0], lse.masked_fill(lse == torch.inf, -torch.inf)

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        module, single = self.package.loaded(), call.cu_q is None
        _, backward = _dense(module) if single else _varlen(module)
        read = read if single or not _pads(backward) else read._replace(lse=call.padded(read.lse))
        return self.in_place(backward, call, read, not single)


def _dense(module: Any) -> tuple[Any, Any]:
    return module._flash_attn_forward, module._flash_attn_backward


def _varlen(module: Any) -> tuple[Any, Any]:
    return module._flash_attn_varlen_forward, module._flash_attn_varlen_backward


def _pads(function: Any) -> bool:
    """Whether the log-sum-exp of many spans is padded: as long as there was no soft cap."""
    return "softcap" not in parameters(function)
