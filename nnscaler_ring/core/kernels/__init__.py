"""Kernel backends and their choice: the first that can, in an order by device; if none can, what each one lacked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from .aten import AtenCpu, AtenCuda
from .base import Case, Grad, Kernel, Scores
from .reference import Reference
from .triton import Triton

__all__ = ["KERNELS", "Case", "Grad", "Kernel", "Scores", "check_kernel", "choose"]

KERNELS: Mapping[str, tuple[Kernel, ...]] = MappingProxyType(
    {"aten": (AtenCpu(), AtenCuda()), "triton": (Triton(),), "reference": (Reference(),)},
)
"""Backends by name, the fastest first; a name stands for one backend per kind of device."""


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
    for tried in KERNELS if check_kernel(name) == "auto" else (name,):
        for kernel in KERNELS[tried]:
            if name == "auto" and not kernel.offers(case):
                continue
            try:
                kernel.check(case)
                return kernel
            except NotImplementedError as why:
                lacking.append(f"{tried}: {why}")
    asked = case.features - {"d_lse"}
    able = [other for other, kernels in KERNELS.items() if other != name and any(asked <= k.features for k in kernels)]
    hint = f". What is asked for besides, {', '.join(able)} have" if asked and name != "auto" else ""
    raise NotImplementedError(f"no kernel {name!r} for {case}. " + "; ".join(lacking) + hint)
