"""The model on paper: its counts against the plans', its timelines by hand, and which transport it picks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from nnscaler_ring.core import passes
from nnscaler_ring.core.chains import rows_needed
from nnscaler_ring.core.layouts import LAYOUTS, build
from nnscaler_ring.core.mask import Mask
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import TRANSPORTS, plan, plans, rows_sent
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.scaling import (
    NETWORKS,
    SPEEDS,
    Network,
    Shape,
    Speed,
    best_transport,
    head_bytes,
    machine_of,
    rank_pairs,
    report,
    row_transport,
    step_bytes,
    timeline,
)
from nnscaler_ring.core.teams import deal, team_of, teams
from tests import oracle
from tests.shapes import KINDS, WORLDS, random_mask

SLOW = Speed("a test", forward=1e6, backward=1e6, launch=0.0, memory=1e30)
ONE = Shape(heads=1, heads_k=1, dim=1, dim_v=1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_plans(kind: str, name: str) -> None:
    rng = np.random.default_rng(len(name))
    for n in range(8):
        length, world = int(rng.integers(1, 60)), WORLDS[rng.integers(len(WORLDS))]
        case = random_mask(rng, length, length, kind, packed=n % 2 == 0)
        held, mask = build(name, length, world, None if case.cu_q is None else np.array(case.cu_q)), case.mask()
        straight = list(plans(mask, held, held, "halo"))
        assert rank_pairs(mask, held).tolist() == [p.pairs for p in straight], case
        assert rows_needed(mask, held, held).tolist() == [p.grad_rows_sent for p in straight]
        for transport in TRANSPORTS:
            made = list(plans(mask, held, held, transport))
            assert rows_sent(mask, held, held, transport) == sum(p.rows_sent for p in made) == sum(p.grad_rows_sent for p in made)


def test_a_timeline_by_hand() -> None:
    """Two ranks, contiguous, causal, one tile a shard: own rows, then the rows of rank 0 on rank 1."""
    mask, held = build_mask(256, causal=True), build("contiguous", 256, 2)
    tile = 128 * 128 * 4 / 1e6  # seconds of a tile: 4 FLOPs a pair
    rows = 128 * 2 * 2  # bytes
    wait = 3 * tile
    network = Network("a test", bandwidth=rows / wait, latency=0.0)
    made = timeline(plan(mask, held, held, "ring", 1), ONE, SLOW, network)
    assert [(bar.start, bar.end) for bar in made.compute] == [
        (0.0, pytest.approx(tile)),
        (pytest.approx(wait), pytest.approx(wait + tile)),
    ]
    assert [(bar.start, bar.end) for bar in made.network] == [(0.0, pytest.approx(wait))]
    assert made.total == pytest.approx(wait + tile)
    sender = timeline(plan(mask, held, held, "ring", 0), ONE, SLOW, network)
    assert sender.total == pytest.approx(wait) and len(sender.compute) == 2
    back = timeline(plan(mask, held, held, "ring", 1), ONE, SLOW, network, backward=True)
    assert back.total == pytest.approx(wait + 2.5 * tile + 2 * wait), "gradients are fp32, and leave when the calls have ended"
    straight = [
        timeline(plan(mask, held, held, "halo", 1), ONE, replace(SLOW, rounds=r), network, backward=True) for r in (False, True)
    ]
    assert [each.total - 2.5 * tile for each in straight] == [pytest.approx(2 * wait), pytest.approx(wait)], "one call gave them"
    around = timeline(plan(mask, held, held, "ring", 0), ONE, SLOW, Network("", 1.0, 0.0), around=(3, 5))
    assert around.total == pytest.approx(3 + rows + 5)


def test_bytes_of_exchanges_for_heads() -> None:
    """4 ranks, 8 query and 2 key heads: key heads are with two ranks each, and their gradients travel in fp32."""
    mask, held, shape = build_mask(64, causal=True), build("contiguous", 64, 4), Shape(heads=8, heads_k=2, dim=4, dim_v=6)
    made = report(mask, held, "all_to_all", shape, SLOW, NETWORKS["nvlink"])
    into, out = 64 * 3 * (2 * 4 + 1 * 10) * 2, 16 * 3 * 4 * 2 * (6 * 2 + 4)
    assert (made.sent, made.needed, made.balance, made.calls, made.merges) == (into + out, None, 1.0, 1, 0)
    back_in, back_out = 64 * 3 * 2 * (6 * 2 + 4), 16 * 3 * 4 * (2 * 4 * 2 + 1 * 10 * 4)
    assert made.sent_backward == back_in + back_out
    uneven = report(mask, held, "all_to_all", Shape(heads=6, heads_k=6, dim=4, dim_v=6), SLOW, NETWORKS["nvlink"])
    assert uneven.balance == pytest.approx(2 * 4 / 6)


def test_bytes_of_a_grid() -> None:
    """2 x 2: a zigzag ring between two teams, each rank of a team with half of the heads."""
    mask, held, shape = build_mask(64, causal=True), build("zigzag", 64, 4), Shape(heads=4, heads_k=2, dim=4, dim_v=4)
    made = report(mask, held, "ring", shape, SLOW, NETWORKS["nvlink"], inner=2)
    outer = teams(held, 2)
    assert outer == build("zigzag", 64, 2)
    ring = rows_sent(mask, outer, outer, "ring") * 2 * 8 * 2  # one key head a rank, two ranks of each team
    assert made.sent == ring + 64 * (2 * 4 + 1 * 8) * 2 + 64 * 2 * (4 * 2 + 4) and made.inner == 2
    assert [share.k for share in deal(4, 2, 2)] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("world", [8, 64])
def test_efficiency_of_what_is_known(world: int) -> None:
    """Zigzag on a fast network is near 1; contiguous is half of it; a slow network shows."""
    length = 8192 * world
    mask, shape = build_mask(length, causal=True), Shape()
    zigzag, contiguous = (build(name, length, world) for name in ("zigzag", "contiguous"))
    fast = report(mask, zigzag, "ring", shape, SPEEDS["fa2-h100"], NETWORKS["nvlink"])
    assert 0.94 < fast.efficiency < 1.0 and fast.balance == 1.0 and fast.sent == fast.needed
    assert report(mask, contiguous, "ring", shape, SPEEDS["fa2-h100"], NETWORKS["nvlink"]).efficiency < 0.56
    assert report(mask, zigzag, "ring", shape, SPEEDS["fa4-h200"], NETWORKS["100g"]).efficiency < 0.6


def test_thousands_of_ranks() -> None:
    world = 4096
    held, mask = build("zigzag", 8192 * world, world), build_mask(8192 * world, causal=True)
    made = report(mask, held, "ring", Shape(), SPEEDS["fa2-h100"], NETWORKS["400g"])
    assert made.calls == world and made.sent == made.needed


def test_the_best_transport() -> None:
    gpu = machine_of("cuda", 8)
    assert gpu == (SPEEDS["fa2-h100"], NETWORKS["nvlink"]) and machine_of("cuda", 16)[1] == NETWORKS["400g"]
    assert machine_of("cpu", 2) == (SPEEDS["cpu-core"], NETWORKS["gloo"])
    length, odd = 1 << 16, Shape(heads=28, heads_k=4)
    causal, window = build_mask(length, causal=True), build_mask(length, causal=True, window=(1024, 0))
    contiguous, zigzag = (build(name, length, 8) for name in ("contiguous", "zigzag"))
    assert best_transport(causal, zigzag, odd, *gpu) == "ring"
    assert best_transport(window, zigzag, odd, *gpu) == "halo", "few rows: in one step"
    assert best_transport(window, contiguous, Shape(), *gpu) == "halo", "heads would move all rows"
    assert best_transport(causal, contiguous, Shape(), *gpu) == "all_to_all", "which evens out the work"
    assert best_transport(causal, contiguous, odd, *gpu) == "all_to_all", "also where some ranks have 4 heads and some 3"
    short = build_mask(2048, causal=True)
    many = Shape(heads=8, heads_k=8)
    assert best_transport(short, build("zigzag", 2048, 8), many, SPEEDS["fa2-h100"], NETWORKS["100g"]) == "all_to_all"
    assert best_transport(Mask([], 8), build("zigzag", 8, 8), odd, *gpu) == "halo"


def test_the_best_transport_for_a_mask_of_many_slices() -> None:
    """Each slice is a call, and all of them are one rank's where heads travel: block-causal video."""
    frames = {n: Mask([(i, i + 32, 0, i + 32) for i in range(0, 32 * n, 32)], 32 * n) for n in (32, 256)}
    held = {n: build("contiguous", 32 * n, 8) for n in frames}
    shape, gpu = Shape(heads=12, heads_k=12), machine_of("cuda", 8)
    assert [best_transport(frames[n], held[n], shape, *gpu) for n in frames] == ["all_to_all", "ring"]


def test_auto_groups_the_forward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where merges take longer than waits would: fewer of them forward, a ring backward, the same numbers."""
    slow = Speed("slow memory", 1e15, 1e15, 0.0, 1e9), Network("fast", 1e12, 0.0)
    monkeypatch.setattr(passes, "machine_of", lambda *_: slow)
    taken, given = [], oracle.inputs(0, (1, 64, 64), (4, 2, 8, 8))
    monkeypatch.setattr(passes, "plan", lambda *args: taken.append(args[3]) or plan(*args))
    recipe = Recipe(group="local:8", layout="zigzag", causal=True)
    got = oracle.run(given, 0.3, recipe)
    assert taken == ["grouped_ring"] * 8 + ["ring"] * 8
    want = oracle.run(given, 0.3, replace(recipe, transport="ring"))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    made = report(build_mask(64, causal=True), build("zigzag", 64, 8), "auto", Shape(), *slow)
    assert (made.transport, made.transport_backward, made.sent) == ("grouped_ring", "ring", made.needed)


def test_ranks_that_do_not_divide_into_teams_are_refused() -> None:
    machine = SPEEDS["fa2-h100"], NETWORKS["nvlink"]
    with pytest.raises(ValueError, match="8 ranks do not divide into teams of 3"):
        report(build_mask(64), build("contiguous", 64, 8), "ring", Shape(), *machine, inner=3)


def test_who_shares_key_heads() -> None:
    of_heads = {heads_k: team_of(build("contiguous", 8, 2), 2, 0, 4, heads_k).shared for heads_k in (4, 2, 1)}
    assert of_heads == {4: False, 2: False, 1: True}


def test_two_products_forward_and_five_backward() -> None:
    shape = Shape(heads=3, heads_k=1, dim=3, dim_v=5)
    assert (shape.flops(), shape.flops(backward=True)) == (3 * 2 * (3 + 5), 3 * 2 * (3 * 3 + 2 * 5))


def test_a_network_carries_one_thing_at_a_time() -> None:
    mask, held = build_mask(512, causal=True), build("contiguous", 512, 4)
    made = timeline(plan(mask, held, held, "ring", 2), ONE, SLOW, Network("slow", 1e3, 0.0), backward=True)
    assert len(made.network) == 5 and all(one.end <= after.start for one, after in pairwise(made.network))


def test_bytes_of_a_step_by_hand() -> None:
    """32 rows a rank of 3 heads of 3 elements, values of 5, in 2 bytes; of 4 parts at once each moves 8 / 4 bytes of their sum."""
    mask, held, shape = build_mask(96), build("contiguous", 96, 3), Shape(heads=3, heads_k=1, dim=3, dim_v=5)
    ring, gather = (plan(mask, held, held, way, 2) for way in ("ring", "all_gather"))
    assert SLOW.at_once == 4
    assert [step_bytes(ring, t, shape, SLOW, False) for t in range(3)] == [0, 32 * 15 * (2 + 2), 32 * 15 * (2 + 2)]
    merged, made, home = 32 * 9 * (2 + 2), 32 * 8 * (2 + 4), 32 * 8 * (4 + 2)  # dQ; dK and dV to fp32; those of the own rows
    assert [step_bytes(ring, t, shape, SLOW, True) for t in range(3)] == [0, merged + made + 32 * 8 * 4, merged + made + home]
    own = 32 * 8 * (4 + 2)
    assert step_bytes(gather, 1, shape, replace(SLOW, rounds=False), True) == 3 * made + 2 * home + own
    assert step_bytes(gather, 1, shape, SLOW, True) == 3 * 32 * 8 * (2 + 2), "as the call gave them"


def test_ranks_that_are_looked_at_in_a_large_world() -> None:
    """The fourth of 8 has most rows to get, the second most pairs: as slow as if all were planned."""
    machine, held = (SPEEDS["fa2-h100"], NETWORKS["gloo"]), build("contiguous", 4096, 8)
    mask = Mask([(512, 1024, 512, 1024), (1536, 1538, 0, 4096)], 4096)
    every, few = (report(mask, held, "halo", Shape(), *machine, most=most) for most in (8, 2))
    assert every.slowest == 3 and replace(every, tile_balance=None) == few and every.tile_balance is not None


def test_gradients_of_heads_that_no_ranks_share_travel_as_they_are() -> None:
    machine, shape = (SPEEDS["fa2-h100"], NETWORKS["nvlink"]), Shape(heads=4, heads_k=4, dim=4, dim_v=6)
    made = report(build_mask(64, causal=True), build("contiguous", 64, 4), "all_to_all", shape, *machine)
    assert made.sent_backward == 64 * 3 * (6 * 2 + 4) + 64 * 3 * (4 + 10) * 2


def test_a_grid_takes_as_long_as_the_rank_with_most_heads() -> None:
    """Of 8 heads on 3 ranks two have 3 and one of them both key heads, one of these repeated."""
    mask, held, machine = build_mask(768, causal=True), build("contiguous", 768, 6), (SPEEDS["fa2-h100"], NETWORKS["nvlink"])
    made = report(mask, held, "ring", Shape(heads=8, heads_k=2), *machine, inner=3)
    last = plan(mask, teams(held, 3), teams(held, 3), "ring", 1)
    before, after = head_bytes(Shape(heads=8, heads_k=2), deal(8, 2, 3), held)
    for n, total in enumerate((made.forward, made.backward)):
        around = int(before[n].max()), int(after[n].max())
        assert total == timeline(last, Shape(heads=3, heads_k=3), *machine, bool(n), around).total
    pairs, tiles = np.array([384 * 385 / 2, 384 * 384 + 384 * 385 / 2]), np.array([6, 15])
    assert made.balance == pytest.approx(pairs.max() / pairs.mean() * 9 / 8)
    assert made.tile_balance == pytest.approx(tiles.max() / tiles.mean() * 9 / 8)


def test_a_mask_that_sees_nothing_is_efficient() -> None:
    assert report(Mask([], 8), build("zigzag", 8, 2), "ring", Shape(), *machine_of("cuda", 2)).efficiency == 1.0


def test_groups_grow_in_small_worlds_under_simple_masks_alone() -> None:
    slow = Speed("slow memory", 1e15, 1e15, 0.0, 1e9), Network("fast", 1e12, 0.0)
    causal, many = build_mask(4096, causal=True), Mask([(0, 4096, k, k + 128, -4096, 0) for k in range(0, 4096, 128)], 4096)
    held = {world: build("zigzag", 4096, world) for world in (8, 16)}
    ways = [row_transport(mask, (held[n], held[n]), Shape(), slow, False) for mask, n in ((causal, 8), (causal, 16), (many, 8))]
    assert ways == ["grouped_ring", "ring", "ring"]


@pytest.mark.parametrize(
    ("world", "length", "window", "name", "heads", "network", "best"),
    [
        (16, 65536, -1, "contiguous", (32, 8), "nvlink", "all_to_all"),  # two ranks a key head
        (2, 16384, 4096, "contiguous", (32, 8), "nvlink", "halo"),  # which takes longer, but not clearly
        (2, 4096, -1, "zigzag", (8, 8), "400g", "halo"),  # keys and values travel once
        (2, 2048, -1, "zigzag", (8, 8), "nvlink", "halo"),  # 4 messages for heads
        (3, 1024, -1, "contiguous", (28, 4), "nvlink", "all_to_all"),  # one call, not two, and one wait
        (16, 4608, -1, "contiguous", (24, 24), "400g", "all_to_all"),  # 2 heads or 1
        (8, 4096, -1, "zigzag", (28, 4), "nvlink", "ring"),  # one with 4 heads would be waited for
        (4, 4096, 1024, "contiguous", (6, 6), "400g", "halo"),  # and one that sends more
        (8, 16384, 1024, "zigzag", (16, 16), "100g", "halo"),  # few own rows to hide it behind, but few to send
        (8, 16384, 2048, "zigzag", (16, 16), "100g", "all_to_all"),  # more
    ],
)
def test_the_best_transport_where_two_are_near(
    world: int, length: int, window: int, name: str, heads: tuple[int, int], network: str, best: str
) -> None:
    mask, shape = build_mask(length, causal=True, window=(window, 0)), Shape(heads=heads[0], heads_k=heads[1])
    assert best_transport(mask, build(name, length, world), shape, SPEEDS["fa2-h100"], NETWORKS[network]) == best
