"""Messages of few long runs of tokens travel in parts, each of which lies in one piece with its sender and with its receiver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.context import ContextParallel
from nnscaler_ring.core import plan as planning
from nnscaler_ring.core.kernels import Grad, Scores
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.layouts import LAYOUTS, build
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import plan, plans
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.shapes import KINDS, random_mask
from tests.test_plan import rows_of

DIRECT = ("all_gather", "halo", "broadcast")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of any length."""
    monkeypatch.setattr(planning, "LONG", 1)
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_sender_and_receiver_agree(kind: str, short: None) -> None:
    """On how many rows each part has; a part is one interval to both."""
    rng, parts = np.random.default_rng(KINDS.index(kind)), 0
    for n in range(60):
        case = random_mask(rng, 36, 36 if n % 3 else int(rng.integers(1, 40)), kind, packed=n % 2 == 0)
        name, world = list(LAYOUTS)[n % len(LAYOUTS)], (2, 3, 5)[n % 3]
        q, k = (build(name, size, world, cu) for size, cu in ((case.q_len, case.cu_q), (case.k_len, case.cu_k)))
        made = plans(case.mask(), q, k, DIRECT[int(rng.integers(3))])
        sent = {(p.rank, m.peer): m for p in made for step in p.steps for m in step.send}
        for reader, m in ((p.rank, m) for p in made for step in p.steps for m in step.receive):
            assert m.parts == sent[m.peer, reader].parts
            for each in (m, sent[m.peer, reader]):
                assert [piece.size for piece in each.pieces] == list(each.parts or [each.size])
                assert [row for piece in each.pieces for row in rows_of(piece.rows)] == list(rows_of(each.rows))
                assert not each.parts or all(len(piece.rows) == 1 for piece in each.pieces)
            parts += len(m.parts)
    assert parts > 20


def test_which_messages() -> None:
    """Both chunks of a zigzag shard, which in the last one are neighbours; not short ones, nor what is one piece."""
    zigzag, full = build("zigzag", 8 * 1024, 8), build_mask(8 * 1024)
    for p in plans(full, zigzag, zigzag, "all_gather"):
        assert all(m.parts == ((512, 512) if p.rank < 7 else ()) for m in p.steps[1].send)
        assert all(m.parts == ((512, 512) if m.peer < 7 else ()) for m in p.steps[1].receive)
    few = build("zigzag", 8 * 32, 8)
    assert not any(m.parts for m in plan(build_mask(8 * 32), few, few, "all_gather", 0).steps[1].send)
    whole = build("contiguous", 8 * 1024, 8)
    assert not any(m.parts for m in plan(full, whole, whole, "all_gather", 0).steps[1].receive)


@pytest.mark.parametrize("transport", DIRECT)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag-per-document", "stripe", "balanced"])
def test_the_numbers_of_one_device(layout: str, transport: str, short: None) -> None:
    cu = [0, 7, 9, 30, 48] if layout in ("zigzag-per-document", "balanced") else None
    for world in (2, 3, 4):
        given = oracle.inputs(world, (2, 48, 48), (4, 2, 6, 5))
        how = Recipe(group=f"local:{world}", layout=layout, transport=transport, causal=True, kernel="reference")
        want = oracle.dense(given, build_mask(48, causal=True, cu_seqlens_q=cu).as_array(), 0.4)
        oracle.assert_close(oracle.run(given, 0.4, how, cu), want, 1e-10, (layout, transport, world))


def _worst(rank: int, world_size: int) -> float:
    """The largest error of a rank's rows, forward and backward, where each message has two parts."""
    tokens = 1024 * world_size
    q, k, v, d_out = oracle.inputs(0, (1, tokens, tokens), (2, 1, 8, 8), torch.float32)
    cp = ContextParallel(dist.group.WORLD, layout="zigzag", transport="all_gather", kernel="reference")
    shards = [cp.shard(x, dim=1).requires_grad_() for x in (q, k, v)]
    out = cp.attention(*shards, mask="causal")
    grads = torch.autograd.grad(out, shards, cp.shard(d_out, dim=1))
    spans, scores = np.array([[0, tokens, 0, tokens]]), Scores(scale=8**-0.5)
    whole, lse = Reference().forward(q, k, v, spans, (-1, 0), scores)
    sums = oracle.sums((q, k, v))
    Reference().backward(Grad(q, whole, d_out, lse, *sums), k, v, spans, (-1, 0), scores)
    pairs: list[Any] = [(out, whole), *zip(grads, [x.total() for x in sums], strict=True)]
    return max(float((mine.detach() - cp.shard(want, dim=1)).abs().max()) for mine, want in pairs)


def test_on_processes(ranks) -> None:
    assert all(worst < 1e-4 for worst in ranks(2).run(_worst))
