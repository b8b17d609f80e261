"""Balance, bytes, calls and modelled efficiency at 8 to 512 ranks, beside the full ring and the all-gather of other libraries.

Counts are exact, from the plans; times are those of `nnscaler_ring.core.scaling`, on paper. 8k tokens a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks import packings
from benchmarks.report import markdown
from nnscaler_ring.core.layouts import build
from nnscaler_ring.core.mask import Mask
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.scaling import NETWORKS, SPEEDS, Report, Shape, report

A_RANK = 8192
WORLDS = (8, 64, 512)
SHAPE, SPEED = Shape(heads=32, heads_k=8, dim=128, dim_v=128), SPEEDS["fa4-h200"]
NAMED = ("nvlink", "400g", "100g")


@dataclass(frozen=True)
class Way:
    """A layout and a transport; `ours` are what this package would be used with."""

    layout: str
    transport: str
    ours: bool = True


OTHERS = (Way("contiguous", "full_ring", False), Way("zigzag", "full_ring", False), Way("zigzag", "broadcast", False))
WAYS = {
    "causal": (Way("zigzag", "ring"), Way("zigzag", "halo"), Way("contiguous", "all_to_all"), *OTHERS),
    "window 1,024": (Way("contiguous", "halo"), *OTHERS),
    "packed mix": (Way("balanced", "halo"), Way("balanced", "ring"), Way("zigzag-per-document", "halo"), *OTHERS),
}


def table(repeats: int) -> str:
    """All rows; nothing is measured, so `repeats` is not looked at."""
    header = (
        "mask",
        "ranks",
        "layout",
        "transport",
        "pairs max/mean",
        "tiles max/mean",
        "MB a rank",
        "of what is read",
        "calls",
        "merges",
        *NAMED,
    )
    about = (
        f"{A_RANK:,} tokens a rank, Hq/Hk/D = {SHAPE.heads}/{SHAPE.heads_k}/{SHAPE.dim}, bf16 rows, sums of gradients in fp32,\n"
        f"{SPEED.name}.\n"
        "MB are of the forward pass, calls and merges of the busiest rank; the last columns are modelled efficiencies, forward +\n"
        "backward, on " + ", ".join(f"{NETWORKS[name].name} ({name})" for name in NAMED) + ".\n"
        "Bold: this package. full_ring and broadcast are the rings and the all-gather that carry every row to every rank."
    )
    return f"## At scale, on paper\n\n{about}\n\n{markdown(header, _rows())}"


def _rows() -> Iterator[tuple[object, ...]]:
    for about, ways in WAYS.items():
        for world in WORLDS:
            mask, cu = _mask(about, world)
            for way in ways:
                if way.transport == "all_to_all" and SHAPE.heads % world:
                    continue
                if way.layout == "zigzag-per-document" and world > 64:
                    continue  # 2 P pieces of each document: planning alone takes minutes
                held = build(way.layout, world * A_RANK, world, cu)
                made = [report(mask, held, way.transport, SHAPE, SPEED, NETWORKS[name], most=64) for name in NAMED]
                yield _row(about, way, made)


def _row(about: str, way: Way, made: list[Report]) -> tuple[object, ...]:
    first = made[0]
    bound = "-" if not first.needed else f"{first.sent / first.needed:.2f}"
    megabytes = first.sent / first.world_size / 1e6
    layout, transport = (f"**{name}**" if way.ours else name for name in (way.layout, way.transport))
    efficiencies = (f"{each.efficiency:.1%}" for each in made)
    tiles = "-" if first.tile_balance is None else f"{first.tile_balance:.2f}"
    counts = (f"{first.balance:.2f}", tiles, f"{megabytes:,.1f}", bound, first.calls, first.merges)
    return (about, first.world_size, layout, transport, *counts, *efficiencies)


def _mask(about: str, world: int) -> tuple[Mask, np.ndarray | None]:
    total = world * A_RANK
    if about != "packed mix":
        return build_mask(total, causal=True, window=(1024, 0) if "window" in about else (-1, -1)), None
    rows = {8: [("64k", 0)], 64: [("512k", 0)], 512: [("1m", seed) for seed in range(4)]}[world]
    lengths = [length for size, seed in rows for length in packings.lengths(packings.SIZES[size], seed)]
    cu = np.cumsum([0, *lengths])
    return build_mask(total, causal=True, cu_seqlens_q=cu), cu
