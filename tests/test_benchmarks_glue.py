"""What the engine moves besides kernels, counted in bytes: the limits of the project, on paper, where no GPU is at hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.glue import MASKS, WAYS, Moved, count, table
from nnscaler_ring.core.layouts import build
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import plan
from nnscaler_ring.core.scaling import SPEEDS, Shape, step_bytes

LIMITS = {
    "causal": {False: (0.02, 0.03), True: (0.02, 0.031)},
    "full": {False: (0.02, 0.03)},
    "window 1,024": {False: (0.03, 0.03), True: (0.03, 0.03)},
    "packed mix": {False: (0.035, 0.03), True: (0.03, 0.03)},
}
"""Of the forward pass and of the backward pass, for what `auto` takes: of a kernel that gives parts, and of one that puts them
together in place."""

LAUNCHES = {
    "causal": {False: (3, 25), True: (0, 14)},
    "window 1,024": {False: (1, 4), True: (0, 2)},
    "packed mix": {False: (3, 10), True: (0, 2)},
}
"""Besides the kernel's, of the busiest rank."""


@pytest.mark.parametrize(("mask", "layout", "in_place"), [(mask, at, placed) for mask, at, way, placed in WAYS if way == "auto"])
def test_the_limits(mask: str, layout: str, in_place: bool) -> None:
    """8 ranks of 8k tokens, at the published speed of flash-attn 4, which Triton's kernel does not have."""
    glue = count(mask, layout, "auto", in_place)
    for share, limit in zip(glue.share, LIMITS[mask][in_place], strict=True):
        assert 0 < share <= limit
    assert glue.launches == LAUNCHES[mask][in_place]


def test_rows_in_many_intervals_take_few_launches() -> None:
    """46 documents, each cut over 8 ranks: row by row, not interval by interval, of which there are 90."""
    forward, backward = count("packed mix", "zigzag-per-document", "ring").launches
    assert forward <= 26 and backward <= 98


def test_one_rank_moves_nothing() -> None:
    """What a single call gives is the result, and its gradients are the gradients."""
    assert count("causal", "contiguous", "auto", ranks=1).bytes == (0, 0)


def test_all_gather_of_a_full_mask() -> None:
    """In shards of keys and values: each pass puts the own one beside the others'; the gradients of all eight travel as one call
    gave them; what comes home is added up four at a time, and rounded once."""
    forward, backward = (size // 8 for size in count("full", "contiguous", "all_gather").bytes)
    shard, own = 8192 * 8 * 256 * 2, 2
    assert forward == own * shard
    assert backward == (own + (4 + 2) + (2 + 4 + 1)) * shard


def test_what_is_counted() -> None:
    x, half = torch.empty(4, 8, device="meta"), torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    row, index = torch.empty(1, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for run, wanted in (
        (lambda: x[1:].transpose(0, 1).unflatten(0, (2, 4)), 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: x.zero_(), 128),
        (lambda: x.new_zeros(2), 8),
        (lambda: x.copy_(half), 192),
        (lambda: x.add_(half), 128 + 64 + 128),
        (lambda: x.to(torch.bfloat16), 192),
        (lambda: torch.cat([x, x]), 512),
        (lambda: row.expand(4, 8).contiguous(), 32 + 128),
        (lambda: x.index_select(0, index), 128),
        (lambda: x.index_add_(0, index, x[:2]), 192),
        (lambda: x.index_copy_(0, index, x[:2]), 128),
    ):
        with Moved() as moved:
            run()
        assert moved.bytes == wanted and moved.launches == (wanted > 0)


def test_the_table() -> None:
    rows = [line for line in table(1).splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(WAYS)


@pytest.mark.parametrize(
    ("name", "layout", "transport"),
    [
        ("causal", "zigzag", "ring"),
        ("causal", "zigzag", "grouped_ring"),
        ("full", "contiguous", "ring"),
        ("full", "contiguous", "all_gather"),
    ],
)
def test_the_model_of_time_has_most_of_it(name: str, layout: str, transport: str) -> None:
    """All but what leads to messages and from them, within a tenth."""
    total, shape = 8 * 8192, Shape()
    seen, held = build_mask(total, **MASKS[name]), build(layout, total, 8)
    plans = [plan(seen, held, held, transport, rank) for rank in range(8)]
    counted = count(name, layout, transport).bytes
    for backward in (False, True):
        modelled = sum(step_bytes(each, t, shape, SPEEDS["fa4-h200"], backward) for each in plans for t in range(len(each.steps)))
        assert 0.9 * modelled <= counted[backward] <= 1.1 * modelled + 2 * total * shape.row
