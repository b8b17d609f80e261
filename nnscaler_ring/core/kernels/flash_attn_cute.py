"""flash-attn 4, for Hopper and Blackwell: ``flash_attn.cute`` of the distribution ``flash-attn-4``, 4.0.0b9 .. 4.0.0b36.

The fastest there is on Hopper (H200, bf16, D 128, causal, 8k tokens: 675 / 629 TFLOP/s forward / backward). It takes the gradient
of the log-sum-exp, and None for no limit of a window. Its kernels are compiled when first called. What is asked of it compiles for
compute capabilities 9.0 and 10.0 (4.0.0b36, `tests/compiled.py`); it has not run here on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Case
from .flash_attn import BACKWARD, BOUNDS, FORWARD, FlashAttn
from .installed import Library, capability
from .packed import Call, Read

BACK = (BACKWARD - {"softmax_lse", "dq", "dk", "dv"}) | BOUNDS | {"lse", "dlse"}


class FlashAttn4(FlashAttn):
    """``_flash_attn_fwd`` and ``_flash_attn_bwd``.

    Head dims are padded to what all its releases have and compile: one for q, k and v, a multiple of 8 up to 96, or 128, or (192,
    128), on Hopper with as many key heads as query heads; on Hopper also 192 and 256.
    """

    takes_d_lse = True
    package = Library(
        label="flash-attn 4",
        module="flash_attn.cute.interface",
        distributions=("flash-attn-4",),
        minimum="4.0.0b9",
    )

    def widths(self, head_dim: int, head_dim_v: int) -> tuple[int, int]:
        width = max(super().widths(head_dim, head_dim_v))
        if 128 < head_dim <= 192 and head_dim_v <= 128:
            return 192, 128
        wide = width if width <= 96 else next(each for each in (128, 192, 256) if width <= each)
        return wide, wide

    def check_gpu(self, case: Case) -> None:
        major, _ = capability(self.label, 9, 10)
        widths = self.widths(case.head_dim, case.head_dim_v)
        if major == 10 and widths != (192, 128) and max(widths) > 128:
            raise NotImplementedError(f"{self.label} is not used on Blackwell for head dims padded to {widths}")
        if major == 9 and widths == (192, 128) and case.heads != case.heads_k:
            raise NotImplementedError(f"{self.label} has no backward on Hopper for head dims {widths} with fewer key heads")

    def check_functions(self, module: Any, features: frozenset[str]) -> None:
        self.package.check(module._flash_attn_fwd, FORWARD - {"window_size"} | BOUNDS | {"return_lse"} | features)
        self.package.check(module._flash_attn_bwd, BACK - {"window_size"} | features)

    def window(self, call: Call) -> tuple[int | None, int | None]:
        left, right = (None if side < 0 else side for side in call.window)
        return left, right

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        given = self.given(call, True, q=q, k=k, v=v, return_lse=True)
        out, lse, *_ = self.package.call(self.package.loaded()._flash_attn_fwd, given)
        return out, lse

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        names = ("dout", "q", "k", "v", "out", "lse", "dlse")
        given = self.given(call, True, **dict(zip(names, read, strict=True)), deterministic=call.deterministic)
        dq, dk, dv, *_ = self.package.call(self.package.loaded()._flash_attn_bwd, given)
        return dq, dk, dv
