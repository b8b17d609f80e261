"""Kernel backends and their choice: the first that can, in an order by device; if none can, what each one lacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

import torch

from .aten import AtenCpu, AtenCuda, AtenXpu
from .base import Case, Grad, Kernel, Scores
from .flash_attn import FlashAttn2
from .flash_attn_cute import FlashAttn4
from .flash_attn_hopper import FlashAttn3
from .reference import Reference
from .transformer_engine import TransformerEngine
from .triton import Triton

__all__ = ["KERNELS", "Case", "Grad", "Kernel", "Scores", "check_kernel", "choose"]

KERNELS: Mapping[str, tuple[Kernel, ...]] = MappingProxyType(
    {
        "aten": (AtenCpu(), AtenCuda(), AtenXpu()),
        "flash_attn": (FlashAttn4(), FlashAttn3(), FlashAttn2()),
        "transformer_engine": (TransformerEngine(),),
        "triton": (Triton(),),
        "reference": (Reference(),),
    }
)
"""Backends by name; a name stands for several where devices or versions of a library differ, the fastest first."""

FASTEST: Mapping[int, tuple[type[Kernel], ...]] = MappingProxyType(
    {
        8: (FlashAttn2, AtenCuda, TransformerEngine),
        9: (FlashAttn4, FlashAttn3, AtenCuda, TransformerEngine, FlashAttn2),
        10: (FlashAttn4, AtenCuda, TransformerEngine, FlashAttn2),
        12: (FlashAttn2, AtenCuda, TransformerEngine),
    }
)
"""The order of ``auto`` by the GPU's major compute capability; what is not named follows as in `KERNELS`.

On Hopper by the TFLOP/s forward / backward of an H200 (bf16, D 128, causal, 8k tokens): flash-attn 4 675 / 629, cuDNN, which is
what torch and Transformer Engine call, 655 / 526, FlashAttention-2 about 366 / 330 (an H100); flash-attn 3 by its authors' figure
(up to 740 forward on an H100, arXiv 2407.08608). On Ampere flash-attn 2 and torch have the same kernel, the library the newer one.
None of this was measured through these adapters.
"""


def check_kernel(name: str) -> str:
    """`name`, or ValueError that lists the known kernels."""
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}: choose one of auto, {', '.join(KERNELS)}")
    return name


@lru_cache(maxsize=256)
def choose(name: str, case: Case) -> Kernel:
    """The backend called `name`, or with ``auto`` the first that takes the case.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: no backend asked for takes the case; says what each lacks.
    """
    lacking = []
    for kernel in in_order(case) if check_kernel(name) == "auto" else KERNELS[name]:
        if name == "auto" and not kernel.offers(case):
            continue
        try:
            kernel.check(case)
            return kernel
        except NotImplementedError as why:
            lacking.append(f"{kernel.name}: {why}")
    asked = case.features - {"d_lse"}
    able = [other for other, kernels in KERNELS.items() if other != name and any(asked <= k.features for k in kernels)]
    hint = f". What is asked for besides, {', '.join(able)} have" if asked and name != "auto" else ""
    raise NotImplementedError(f"no kernel {name!r} for {case}: " + "; ".join(dict.fromkeys(lacking)) + hint)


def in_order(case: Case) -> Iterator[Kernel]:
    """All backends, those that are faster for the case's device first."""
    known = case.device == "cuda" and torch.cuda.is_available()
    first = FASTEST.get(torch.cuda.get_device_capability()[0], ()) if known else ()
    every = [kernel for kernels in KERNELS.values() for kernel in kernels]
    yield from (kernel for wanted in first for kernel in every if type(kernel) is wanted)
    yield from (kernel for kernel in every if type(kernel) not in first)
