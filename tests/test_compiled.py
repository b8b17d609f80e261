"""flash-attn 4 itself, where it is installed, compiles what its adapter asks of it: without a GPU, each size in its own process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = [
    (64, 64, 2),
    (96, 96, 8),
    (100, 60, 2),
    (112, 112, 2),
    (128, 128, 2),
    (192, 128, 8),
    (192, 128, 2),
    (192, 192, 2),
    (256, 256, 2),
]
"""Head dims of keys and of values, and key heads beside 8 query heads."""

REFUSED = {("sm_90", (192, 128, 2)), ("sm_100", (192, 192, 2)), ("sm_100", (256, 256, 2))}
"""By the adapter, by name: another kernel is chosen then."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_it_compiles(arch: str, size: tuple[int, int, int]) -> None:
    """Windows of all kinds, one span and several, a gradient of the log-sum-exp, a soft cap, a deterministic backward."""
    needed = ("flash_attn.cute", "cutlass.cute", "quack")
    if any(importlib.util.find_spec(name.split(".")[0]) is None or importlib.util.find_spec(name) is None for name in needed):
        pytest.skip("needs flash-attn 4")
    command = [sys.executable, "-W", "ignore", "-m", "tests.compiled", arch, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ})
    if (arch, size) in REFUSED:
        assert done.returncode and "NotImplementedError: flash-attn 4 " in done.stderr, done.stderr[-2000:]
    else:
        assert done.returncode == 0 and done.stdout.split()[-1] == "13", done.stderr[-2000:]
