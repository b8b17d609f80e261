"""Exact rows: what is sent over what ranks read of others, counted without the package, up to 64 ranks and on real packings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import packings
from nnscaler_ring.core import engine, layouts, mask
from nnscaler_ring.core.plan import choose, plans, rows_sent
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.transport import LocalTransport, transport_of

RANKS = (2, 4, 8, 64)
N = 8
"""Tokens of a shard."""


def documents(length: int) -> list[int]:
    """Boundaries that fall inside shards."""
    return [0, *range(N // 2, length, 3 * N), length]


MASKS: dict[str, Any] = {
    "window": lambda length: {"causal": True, "window": (N // 2, 0)},
    "wide window": lambda length: {"causal": True, "window": (2 * N + 3, 0)},
    "both sides": lambda length: {"window": (3, 5)},
    "sinks": lambda length: {"causal": True, "window": (3, 0), "sinks": 2},
    "packed": lambda length: {"causal": True, "cu_seqlens_q": documents(length)},
    "packed window": lambda length: {"causal": True, "window": (N, 0), "cu_seqlens_q": documents(length)},
}


def read_of_others(seen: np.ndarray, held: list[np.ndarray]) -> list[int]:
    """Key rows of other ranks that each rank's queries see."""
    return [int(seen[rows].any(0).sum() - seen[rows].any(0)[rows].sum()) for rows in held]


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("name", MASKS)
def test_straight_transports_send_what_is_read_and_no_more(name: str, world: int) -> None:
    """1.0 exactly, in the plan, forward and backward, and for windows and documents also where `auto` chooses."""
    length = N * world
    named = MASKS[name](length)
    seen, cu = mask.build(length, **named), named.get("cu_seqlens_q")
    for layout in ("contiguous", "zigzag", "balanced"):
        held = layouts.build(layout, length, world, None if cu is None else np.array(cu))
        read = sum(read_of_others(seen.as_array(), [held.positions(rank) for rank in range(world)]))
        for transport in ("halo", "all_gather", choose(seen, held, held) if world > 1 else "halo"):
            made = list(plans(seen, held, held, transport))
            assert sum(p.rows_sent for p in made) == sum(p.grad_rows_sent for p in made) == read, (layout, transport)
            assert rows_sent(seen, held, held, transport) == read


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("name", MASKS)
def test_bytes_that_really_travel(name: str, world: int) -> None:
    length, heads, dim = N * world, 2, 4
    named = MASKS[name](length)
    cu = named.pop("cu_seqlens_q", None)
    seen = mask.build(length, **named, cu_seqlens_q=cu)
    held = layouts.build("contiguous", length, world)
    read = read_of_others(seen.as_array(), [held.positions(rank) for rank in range(world)])
    transport = transport_of(f"local:{world}")
    assert isinstance(transport, LocalTransport)
    before = sum(transport.bytes_sent)
    q, k, v = (torch.randn(1, length, heads, dim, requires_grad=True) for _ in range(3))
    recipe = Recipe(group=f"local:{world}", transport="auto", **named)
    table = None if cu is None else torch.tensor(cu)
    out, *_ = engine.attention(q, k, v, table, None, None, None, None, None, length, length, 0.5, 0, str(recipe))
    row = heads * 2 * dim * 4
    assert sum(transport.bytes_sent) - before == sum(read) * row
    out.sum().backward()
    assert sum(transport.bytes_sent) - before == sum(read) * row * 3, "keys and values again, and their gradients"


@pytest.mark.parametrize("world", RANKS)
def test_a_causal_zigzag_ring_carries_rows_that_are_still_needed(world: int) -> None:
    """Each hop of a row ends at a rank that reads it or has a reader further on; here all read it: no more than is read."""
    length = N * world
    seen, held = mask.build(length, causal=True), layouts.build("zigzag", length, world)
    made = list(plans(seen, held, held, "ring"))
    owner, dense = held.owner()[0], seen.as_array()
    reads = np.stack([dense[held.positions(rank)].any(0) for rank in range(world)])
    ranks = np.arange(world)[:, None]
    needed = {}
    for way in (-1, 1):  # hops to the last reader
        hops = (ranks - owner) * way % world
        needed[way] = int((hops * reads).max(0).sum())
    assert sum(p.rows_sent for p in made) == min(needed.values())
    assert sum(p.rows_sent for p in made) == int(reads.sum()) - length, "each rank that a row comes to reads it"
    assert 4 * sum(p.rows_sent for p in made) == 3 * N * world * (world - 1), "3/4 of a full ring"


@pytest.mark.parametrize(("size", "world"), [("64k", 8), ("512k", 64)])
@pytest.mark.parametrize("layout", ["contiguous", "balanced"])
def test_the_packed_mix(size: str, world: int, layout: str) -> None:
    """Rows of real documents: a rank reads from the start of each document that it has a part of to the end of its part."""
    total = packings.SIZES[size]
    for seed in packings.SEEDS:
        cu = np.cumsum([0, *packings.lengths(total, seed)])
        held = layouts.build(layout, total, world, cu)
        seen = mask.build(total, causal=True, cu_seqlens_q=cu)
        read = 0
        for rank in range(world):
            _, start, count = held.runs[held.runs[:, 0] == rank].T
            ends: dict[int, int] = {}
            for lo, hi in zip(start.tolist(), (start + count).tolist(), strict=True):
                first, last = np.searchsorted(cu, [lo, hi - 1], side="right") - 1
                ends |= {document: min(hi, int(cu[document + 1])) for document in range(first, last + 1)}
            read += sum(end - int(cu[document]) for document, end in ends.items()) - int(held.counts[rank])
        transport = "halo" if layout == "balanced" else choose(seen, held, held)
        assert rows_sent(seen, held, held, transport) == read
        if seed == 0:
            assert sum(p.rows_sent for p in plans(seen, held, held, transport)) == read
