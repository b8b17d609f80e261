"""Rows that move between layouts, and from shards to the whole, without processes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.layouts import build
from nnscaler_ring.core.relayout import _gather, _relayout, relayout
from nnscaler_ring.core.transport import LocalTransport

TURNED = Layout([[0, 0, 3], [0, 1, 1], [1, 3, 3], [1, 6, 1]], 8, 2, stride=2)
"""Rows that do not ascend: 0, 2, 4, 1 and 3, 5, 7, 6."""
UNEVEN = Layout([[0, 5, 3], [1, 0, 5]], 8, 2)


@pytest.mark.parametrize("target", [TURNED, UNEVEN, build("stripe", 8, 2)])
@pytest.mark.parametrize("source", [TURNED, UNEVEN, build("zigzag", 8, 2)])
def test_rows_move_between_any_layouts(source: Layout, target: Layout) -> None:
    whole = [torch.randn(2, 8, 3), torch.randn(2, 8, 1, 2)]
    shards = [[x[:, source.positions(rank)] for x in whole] for rank in range(2)]
    moved = LocalTransport(2).run([_relayout(source, target, rank, shards[rank]) for rank in range(2)])
    assert all(
        torch.equal(got, x[:, target.positions(rank)]) for rank in range(2) for got, x in zip(moved[rank], whole, strict=True)
    )


@pytest.mark.parametrize("inner", [1, 2, 4])
def test_all_rows_in_their_order_on_every_rank(inner: int) -> None:
    """Of teams whose ranks hold 3, 1, 0 and 4 rows."""
    held = Layout([[0, 5, 3], [1, 2, 1], [3, 0, 2], [3, 3, 2]], 8, 4)
    whole = torch.randn(2, 8, 3)
    got = LocalTransport(4).run([_gather(held, inner, rank, whole[:, held.positions(rank)]) for rank in range(4)])
    assert all(torch.equal(each, whole) for each in got)


def test_a_shard_that_is_none_of_its_layout_is_told() -> None:
    """Whichever of the tensors it is; rank 3 has no token of 5 in chunks of two, and one in zigzag."""
    for tensors in ([torch.zeros(1, 1, 3)], [torch.zeros(1, 0, 3), torch.zeros(1, 1, 3)]):
        with pytest.raises(ValueError, match="rank 3 passed 1 tokens; layout 'contiguous' of 5 tokens gives it 0"):
            relayout(tensors, None, 5, "contiguous", "zigzag", "pretend:4:3")


def test_shapes_in_a_graph_are_those_of_the_target() -> None:
    with FakeTensorMode():
        given, where = torch.empty(2, 0, 3), ("pretend:4:3", 3)
        (moved,) = torch.ops.nnscaler_ring.relayout([given], None, 5, "contiguous", "zigzag", *where)
        whole = torch.ops.nnscaler_ring.gather(given, None, 5, "contiguous", where[0])
    assert (moved.shape, whole.shape) == ((2, 1, 3), (2, 5, 3))


def test_what_is_sent_lies_in_one_piece() -> None:
    """Whatever the strides of what was given: processes send no other."""
    walk = _gather(build("contiguous", 8, 2), 2, 0, torch.zeros(1, 3, 4).mT)
    assert all(x.is_contiguous() for _, x in next(walk).send)
