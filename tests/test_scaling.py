"""The model on paper: its counts against the plans', its timelines by hand, and which transport it picks."""

from __future__ import annotations

from dataclasses import replace

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
    machine_of,
    rank_pairs,
    report,
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
    assert best_transport(causal, contiguous, odd, *gpu) == "ring", "28 heads do not divide by 8"
    short = build_mask(2048, causal=True)
    many = Shape(heads=8, heads_k=8)
    assert best_transport(short, build("zigzag", 2048, 8), many, SPEEDS["fa2-h100"], NETWORKS["100g"]) == "all_to_all"
    assert best_transport(Mask([], 8), build("zigzag", 8, 8), odd, *gpu) == "halo"


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
