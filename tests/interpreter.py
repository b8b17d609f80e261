"""Whether Triton's kernels run here: on CPU they need an interpreter that runs with this numpy.

That of triton 3.6 and before does not with numpy 2.4 and newer: it makes an int of an array of one element where a loop's end is a
number that the kernel was given or has read.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import numpy as np
import pytest
import torch

from nnscaler_ring.core import held, merge, passes, walk

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def _count(total, end):  # type: ignore[no-untyped-def]
        for _ in range(end):
            tl.store(total, tl.load(total) + 1)


@lru_cache(maxsize=1)
def missing_interpreter() -> str | None:
    """What is missing to run Triton's kernels on CPU, or None. Only the known fault is taken for one; any other is raised."""
    if importlib.util.find_spec("triton") is None:
        return "triton"
    if isinstance(_count, triton.JITFunction):
        return "TRITON_INTERPRET=1"
    total = torch.zeros(1)
    try:
        _count[(1,)](total, 3)
    except Exception as why:
        if "only 0-dimensional arrays can be converted" not in str(why):
            raise
        return f"a Triton interpreter that runs with this numpy (triton {triton.__version__}, numpy {np.__version__})"
    assert total.item() == 3
    return None


def many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients are put together on CPU as on accelerators, four at a time by Triton; skips without it."""
    skip_without_triton("cpu")
    for module in (held, merge, passes, walk):
        monkeypatch.setattr(module, "at_once", lambda device: 4)


def skip_without_triton(device: str = "cpu") -> None:
    """Skips, by the name of what is missing, where Triton's kernels cannot run on a type of device."""
    if device == "cpu" and (missing := missing_interpreter()):
        pytest.skip(f"needs {missing}")
    pytest.importorskip("triton", reason="needs triton")
