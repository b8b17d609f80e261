"""What a plan costs a kernel: the tiles of its calls. A kernel computes a tile of scores whole if any pair in it is visible."""

from __future__ import annotations

import numpy as np

from .mask import ramp
from .steps import RankPlan, Step

TILE = 128
"""Rows and keys of a tile."""


def band_tiles(
    i0: np.ndarray, i1: np.ndarray, j0: np.ndarray, j1: np.ndarray, low: np.ndarray, high: np.ndarray, tile: int = TILE
) -> np.ndarray:
    """Number of `tile` x `tile` tiles with a visible pair, elementwise over int64 arrays.

    The grid starts at ``(i0, j0)``; pairs of ``[i0, i1) x [j0, j1)`` are visible where ``low <= j - i <= high``. The rows of a tile
    row see one interval of keys between them, whose first and last tile move on by one a tile row until the box ends: sums of
    ramps. Only the last tile row may be short, so that it is counted by itself.

    Example:
        >>> ends = np.array([512]), np.array([0]), np.array([512])
        >>> band_tiles(np.array([0]), *ends, np.array([-512]), np.array([0])).item()
        10
    """
    low, high = np.maximum(low, j0 - i1), np.minimum(high, j1 - i0)  # beyond these a limit excludes nothing
    last = (i1 - i0 - 1) // tile  # the last tile row
    edge = (j1 - j0 - 1) // tile  # the last tile column
    first_at, last_at = (i0 + low - j0) // tile, (i0 + tile - 1 + high - j0) // tile  # of tile row 0, were the box endless
    # tile rows before the last that see a key: [begin, end]
    begin = np.maximum(0, -last_at)
    end = np.minimum(last - 1, (j1 - 1 - i0 - low) // tile)
    rising = ramp(begin, end + 1, last_at + 1)  # none of these rows is below 0
    whole = rising - ramp(begin, end + 1, last_at - edge) - ramp(begin, end + 1, first_at)
    # the last
    final = np.minimum(edge, (i1 - 1 + high - j0) // tile) - np.maximum(0, last + first_at) + 1
    seen = (i0 + last * tile + low < j1) & (i1 - 1 + high >= j0)
    return np.where((i0 < i1) & (j0 < j1) & (low <= high), whole + np.where(seen, final, 0), 0)


def one_band_tiles(i0: int, i1: int, j0: int, j1: int, low: int, high: int, tile: int = TILE) -> int:
    """The same of one band of Python ints, many times faster than an array of one; rows and keys that see nothing are cut off.

    Example:
        >>> one_band_tiles(0, 512, 0, 4096, -512, 0)
        10
    """
    j0, j1 = max(j0, i0 + low), min(j1, i1 + high)
    i0, i1 = max(i0, j0 - high), min(i1, j1 - low)
    if i0 >= i1 or j0 >= j1 or low > high:
        return 0
    last, edge = (i1 - i0 - 1) // tile, (j1 - j0 - 1) // tile
    first_at, last_at = (i0 + low - j0) // tile, (i0 + tile - 1 + high - j0) // tile
    total = min(edge, (i1 - 1 + high - j0) // tile) - max(0, last + first_at) + 1  # trimmed: the last tile row sees a key
    begin, end = max(0, -last_at), min(last - 1, (j1 - 1 - i0 - low) // tile)
    if begin <= end:
        total += (end * (end + 1) - begin * (begin - 1)) // 2 + (end - begin + 1) * (last_at + 1)
        for shift in (last_at - edge, first_at):
            above, below = max(0, end + shift), max(0, begin - 1 + shift)
            total -= (above * (above + 1) - below * (below + 1)) // 2
    return total


def tiles(plan: RankPlan, tile: int = TILE) -> int:
    """Tiles that one rank computes, summed over the spans of all its calls; the grid of a span starts at its first row and key.

    Example:
        >>> from nnscaler_ring.core import layout, mask
        >>> from nnscaler_ring.core.plan import plan
        >>> whole = layout.contiguous(512, 1)
        >>> tiles(plan(mask.build(512, causal=True), whole, whole, "all_gather", 0))
        10
    """
    return sum(step_tiles(step, tile) for step in plan.steps)


def step_tiles(step: Step, tile: int = TILE) -> int:
    """Tiles of the calls of one step."""
    total = 0
    for calls in step.calls:
        i0, i1, j0, j1, low, high = calls.bands.T
        total += int(band_tiles(i0, i1, j0, j1, low, high, tile).sum())
    return total
