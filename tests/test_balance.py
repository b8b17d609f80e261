"""The balanced layout: a valid layout of any mask, its goals on the packed mix; and the tiles that it counts."""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from itertools import product
from typing import Any

import numpy as np
import pytest

from benchmarks import packings
from nnscaler_ring.core import balance, cost, layout, mask
from nnscaler_ring.core.balance import balanced
from nnscaler_ring.core.geometry import trim
from nnscaler_ring.core.intervals import overlaps
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.mask import NO_LIMIT, Mask
from nnscaler_ring.core.plan import plan, plans
from tests.shapes import KINDS, WORLDS, random_mask

ROWS = [(name, world, seed) for name, world in (("64k", 8), ("512k", 64)) for seed in packings.SEEDS]
"""Rows of the packed mix and their numbers of ranks: 8k tokens a rank."""


def boundaries(name: str, seed: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(packings.lengths(packings.SIZES[name], seed))])


def packed(cu: np.ndarray) -> Mask:
    return mask.build(int(cu[-1]), causal=True, cu_seqlens_q=cu)


def greedy(cu: np.ndarray, world_size: int, chunk: int = 512) -> Layout:
    """The usual dealing: chunks, the largest work first, to the least loaded rank that has room; as many chunks for each."""
    depth = np.arange(cu[-1]) - np.repeat(cu[:-1], np.diff(cu)) + 1
    work = depth.reshape(-1, chunk).sum(axis=1)
    room, ranks = [len(work) // world_size] * world_size, [(0, rank) for rank in range(world_size)]
    runs = []
    for n in np.argsort(-work, kind="stable").tolist():
        load, rank = heapq.heappop(ranks)
        runs.append((rank, n * chunk, chunk))
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(ranks, (load + int(work[n]), rank))
    return Layout(np.array(runs), int(cu[-1]), world_size)


def pieces(held: Layout, cu: np.ndarray) -> tuple[np.ndarray, ...]:
    """What ranks hold of documents: ``(rank, document, a, b)``, rows counted from the document's start."""
    rank, start, count = held.runs.T
    run, document = overlaps(start, start + count, cu[:-1], cu[1:])
    a, b = np.maximum(start[run], cu[document]), np.minimum((start + count)[run], cu[document + 1])
    return rank[run], document, a - cu[document], b - cu[document]


def rows_sent(held: Layout, cu: np.ndarray) -> int:
    """Rows that ranks receive under a causal mask: of each document all before the rank's last row that it does not hold."""
    rank, document, _, b = pieces(held, cu)
    ends: dict[tuple[int, int], int] = {}
    for key, end in zip(zip(rank.tolist(), document.tolist(), strict=True), b.tolist(), strict=True):
        ends[key] = max(end, ends.get(key, 0))
    return sum(ends.values()) - held.length


def tiles(held: Layout, cu: np.ndarray, tile: int = cost.TILE) -> np.ndarray:
    """Tiles of each rank under a causal mask."""
    rank, _, a, b = pieces(held, cu)
    zero = np.zeros_like(a)
    return np.bincount(rank, cost.band_tiles(a, b, zero, b, zero - NO_LIMIT, zero, tile), minlength=held.world_size)


# -- the goals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world", "seed"), ROWS, ids=lambda value: str(value))
def test_packed_mix(name: str, world: int, seed: int) -> None:
    cu = boundaries(name, seed)
    held, before = balanced(packed(cu), world), greedy(cu, world)
    work, documents = tiles(held, cu), -(-np.diff(cu) // cost.TILE)
    assert (held.counts == held.length // world).all()
    assert work.max() <= balance.EVEN * work.mean()
    assert rows_sent(held, cu) <= 0.6 * rows_sent(before, cu)
    assert work.sum() <= 1.02 * (documents * (documents + 1) // 2).sum()


@pytest.mark.parametrize("seed", range(2))
def test_what_is_counted_is_what_is_planned(seed: int) -> None:
    cu = boundaries("64k", seed)
    seen = packed(cu)
    for held in (balanced(seen, 8), greedy(cu, 8)):
        planned = list(plans(seen, held, held, "all_gather"))
        assert sum(each.rows_sent for each in planned) == rows_sent(held, cu)
        assert [cost.tiles(each) for each in planned] == tiles(held, cu).tolist()


@pytest.mark.parametrize(("name", "world"), [("64k", 8), ("512k", 64), ("1m", 64)])
def test_time_to_solve(name: str, world: int) -> None:
    seen = packed(boundaries(name, 0))
    start = time.process_time()
    balanced(seen, world)
    spent = time.process_time() - start
    print(f"{name} on {world} ranks: {spent * 1e3:.0f} ms")
    assert spent < 1


DOCUMENTS = boundaries("64k", 0)
OTHERS: dict[str, dict[str, Any]] = {
    "documents, full": {"cu_seqlens_q": DOCUMENTS},
    "documents, causal from behind": {"window": (0, -1), "cu_seqlens_q": DOCUMENTS},
    "documents, window": {"causal": True, "window": (512, 0), "cu_seqlens_q": DOCUMENTS},
    "documents, prefix": {"causal": True, "prefix": 300, "cu_seqlens_q": DOCUMENTS},
    "three documents": {"causal": True, "cu_seqlens_q": [0, 30000, 40001, 1 << 16]},
    "window": {"causal": True, "window": (20000, 0)},
    "sinks": {"causal": True, "window": (4096, 0), "sinks": 128},
    "prefix": {"causal": True, "prefix": 20000},
}


@pytest.mark.parametrize("about", OTHERS)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_other_masks_are_even(about: str, world: int) -> None:
    seen = mask.build(1 << 16, **OTHERS[about])
    held = balanced(seen, world)
    work = [cost.tiles(plan(seen, held, held, "all_gather", rank)) for rank in range(world)]
    assert max(work) <= balance.EVEN * np.mean(work)
    assert held.counts.max() - held.counts.min() <= 1


# -- a valid layout of any mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_valid_for_any_mask(kind: str, packed: bool) -> None:
    rng = np.random.default_rng(KINDS.index(kind) * 2 + packed)
    for world, _ in product(WORLDS, range(8)):
        length = int(rng.choice([1, 3, 17, 40, 129, 700]))
        seen = random_mask(rng, length, length, kind, packed).mask()
        held = balanced(seen, world)
        assert held.stride == 1 and held.world_size == world and held.counts.max() - held.counts.min() <= 1
        positions = np.concatenate([held.positions(rank) for rank in range(world)])
        np.testing.assert_array_equal(np.sort(positions), np.arange(length))
        assert held == balanced(seen, world)
        assert sum(plan(seen, held, held, "all_gather", rank).pairs for rank in range(world)) == seen.pairs


def test_no_mask_no_tokens() -> None:
    assert balanced(Mask([], 10), 4) == Layout([[0, 0, 3], [1, 3, 3], [2, 6, 2], [3, 8, 2]], 10, 4)
    assert len(balanced(Mask([], 0), 4).runs) == 0


def test_contiguous_where_that_is_even() -> None:
    for named in ({}, {"window": (100, 100)}, {"causal": True, "window": (128, 0)}, {"causal": True, "window": (1024, 0)}):
        assert balanced(mask.build(1 << 16, **named), 8) == layout.contiguous(1 << 16, 8)
    same = np.arange(0, (1 << 14) + 1, 1024)
    assert balanced(mask.build(1 << 14, causal=True, cu_seqlens_q=same), 8) == layout.contiguous(1 << 14, 8)


@pytest.mark.parametrize("length", [1 << 14, 50001])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_zigzag_for_one_sequence(length: int, world: int) -> None:
    assert balanced(mask.build(length, causal=True), world) == layout.zigzag(length, world)
    assert balanced(mask.build(length, window=(0, -1)), world) == layout.zigzag(length, world)


def test_zigzag_where_nothing_is_even_but_it_is_near_the_best() -> None:
    assert balanced(mask.build(91, causal=True), 4) == layout.zigzag(91, 4)


@pytest.mark.parametrize(("cu", "world"), [([0, 300, 1000, 1100, 4096], 16), ([0, 100, 700, 2048], 8)])
def test_few_tokens_a_rank_are_even_in_smaller_tiles(cu: list[int], world: int) -> None:
    work = tiles(balanced(packed(np.array(cu)), world), np.array(cu), tile=32)
    assert work.max() <= balance.EVEN * work.mean()


def test_needs_as_many_keys_as_queries() -> None:
    with pytest.raises(ValueError, match="8 queries and 9 keys"):
        balanced(mask.build(8, 9), 2)


# -- tiles --------------------------------------------------------------------------------------------------------------------


def tiles_of(dense: np.ndarray, tile: int) -> int:
    i, j = np.nonzero(dense)
    return len(np.unique(np.stack([i // tile, j // tile]), axis=1).T)


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 7])
def test_tiles_of_bands(tile: int) -> None:
    rng = np.random.default_rng(tile)
    i0, j0, height, width = rng.integers(0, 20, (4, 500))
    low, high = np.where(rng.random((2, 500)) < 0.2, [[-NO_LIMIT], [NO_LIMIT]], rng.integers(-25, 25, (2, 500)))
    bands = np.stack([i0, i0 + height, j0, j0 + width, low, high], axis=1)
    counted = cost.band_tiles(*bands.T, tile=tile)
    trimmed = np.stack(trim(*bands.T), axis=1)
    counted_trimmed = cost.band_tiles(*trimmed.T, tile=tile)
    for n, (a, b, c, d, lo, hi) in enumerate(bands.tolist()):
        distance = np.arange(c, d) - np.arange(a, b)[:, None]
        dense = (distance >= lo) & (distance <= hi)
        assert counted[n] == tiles_of(dense, tile)
        seen = dense[dense.any(axis=1)][:, dense.any(axis=0)]
        assert counted_trimmed[n] == cost.one_band_tiles(a, b, c, d, lo, hi, tile=tile) == tiles_of(seen, tile)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_plans(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    seen = random_mask(rng, 60, 60, kind, packed=True).mask()
    held = layout.zigzag(60, 3)
    for each in plans(seen, held, held, "ring"):
        expected = 0
        for step in each.steps:
            for calls in step.calls:
                left, right = calls.window
                for i0, i1, j0, j1 in calls.spans.tolist():
                    distance = (np.arange(j0, j1) - j1) - (np.arange(i0, i1) - i1)[:, None]
                    dense = (left < 0) | (distance >= -left)
                    expected += tiles_of(dense & ((right < 0) | (distance <= right)), 4)
        assert cost.tiles(each, tile=4) == expected


# -- the packed mix -----------------------------------------------------------------------------------------------------------


def test_packed_mix_is_the_shared_one() -> None:
    rows = {f"{name}-{seed}": packings.lengths(total, seed) for name, total in packings.SIZES.items() for seed in packings.SEEDS}
    assert (
        hashlib.sha256(json.dumps(rows).encode()).hexdigest() == "0b07cbe4187418f10c8a33d06af3a689b4ee189f2f61aa92610db513f408a579"
    )
