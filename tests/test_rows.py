"""A row says of a configuration what its report, plans and shares of heads say."""

from __future__ import annotations

import numpy as np
import pytest

from nnscaler_ring.core import layouts, mask
from nnscaler_ring.core.scaling import NETWORKS, Shape, head_bytes
from nnscaler_ring.core.teams import deal
from nnscaler_ring.rows import Row, measure, size, table


def made(transport: str = "ring", inner: int = 1) -> Row:
    """6 ranks with 2 key heads: in teams of three, 2, 3 and 3 query heads each, which read 1, 2 and 1 of them."""
    held, shape = layouts.build("contiguous", 768, 6), Shape(heads=8, heads_k=2, dim=64, dim_v=32)
    names = {"layout": "contiguous", "network": "400g", "speed": "fa2-h100"}
    return measure(mask.build(768, causal=True), held, shape, transport=transport, inner=inner, **names)


def test_the_timeline_of_the_slowest_rank_is_the_report() -> None:
    row = made(inner=3)
    column = row.column()
    assert column.walk.startswith("rank 3, the slowest: ")
    assert (column.forward.total, column.backward.total) == (row.made.forward, row.made.backward)
    before, _ = head_bytes(row.shape, deal(8, 2, 3), row.held)
    for each, sent in zip((column.forward, column.backward), before, strict=True):
        assert each.network[0].end == pytest.approx(sent.max() / NETWORKS["400g"].bandwidth + NETWORKS["400g"].latency)


def test_the_work_of_a_team_is_shared_by_heads() -> None:
    assert made(inner=3).per_rank(np.array([8, 16])).tolist() == [2, 3, 3, 4, 6, 6]


def test_configurations_are_told_apart() -> None:
    every = [made(), made(inner=2), made(inner=3), made("all_to_all"), made("auto")]
    names = ["ring, 6 ranks", "ring, 6 ranks in teams of 2", "ring, 6 ranks in teams of 3", "all_to_all, 6 ranks"]
    assert [row.title for row in every] == [f"contiguous, {name}" for name in (*names, "auto: all_to_all, 6 ranks")]
    assert len({row.key for row in every}) == 5
    assert [line.split()[0] for line in table(every).splitlines()] == ["ranks", *"66666"]


def test_sizes_at_the_ends_of_units() -> None:
    assert [size(count) for count in (999.4, 999.6, 999_600, 1e18)] == ["999 B", "1.00 kB", "1.00 MB", "1,000,000 TB"]
