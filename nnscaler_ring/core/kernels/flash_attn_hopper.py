"""flash-attn 3, for Hopper: the ``hopper`` folder's ``flash_attn_interface`` from January 2025 to March 2026.

One function for one span and for many. What has no default in some of those sources is given as None: page tables, rotary
embedding, scales of fp8. It is built from source, and a build may leave things out. It has not run here on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .base import Case
from .flash_attn import BACKWARD, BOUNDS, FORWARD, FlashAttn
from .installed import Library, capability
from .packed import Call, Read

UNUSED = (
    *("k_new", "v_new", "qv", "out", "out_", "cu_seqlens_k_new", "seqused_q", "seqused_k", "sequed_q", "sequed_k", "page_table"),
    *("kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)


class FlashAttn3(FlashAttn):
    """``_flash_attn_forward`` and ``_flash_attn_backward``; rows that see nothing have a log-sum-exp of -inf."""

    package = Library(
        label="flash-attn 3",
        module="flash_attn_interface",
        distributions=("flash-attn-3", "flashattn-hopper"),
        neutral=MappingProxyType(dict.fromkeys(UNUSED)),
    )

    def check_gpu(self, case: Case) -> None:
        label = self.label
        capability(label, 9)
        width = max(self.widths(case.head_dim, case.head_dim_v))
        if case.deterministic and width > 192:
            raise NotImplementedError(f"{label} has no deterministic backward for head dims above 192, here {width}")
        off = _left_out()
        wanted = ["BACKWARD", "LOCAL", "VARLEN", *["FP16"] * (case.dtype == torch.float16), *map(str.upper, case.features)]
        lacking = [name for name in wanted if off.get(f"FLASHATTENTION_DISABLE_{name}")]
        if all(off.get(f"FLASHATTENTION_DISABLE_HDIM{dim}") for dim in (64, 96, 128, 192, 256) if dim >= width):
            lacking.append(f"head dim {width}")
        if lacking:
            raise NotImplementedError(f"this build of {label} is without {', '.join(lacking)}")

    def check_functions(self, module: Any, features: frozenset[str]) -> None:
        self.package.check(module._flash_attn_forward, FORWARD | BOUNDS | features)
        self.package.check(module._flash_attn_backward, BACKWARD | BOUNDS | features)

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.package.call(self.package.loaded()._flash_attn_forward, self.given(call, True, q=q, k=k, v=v))
        return out, lse

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        return self.in_place(self.package.loaded()._flash_attn_backward, call, read, True)


def _left_out() -> Mapping[str, bool]:
    """What the build says that it is without, where it says so."""
    try:
        flags: Mapping[str, bool] = import_module("flash_attn_config").CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return {}
    return flags
