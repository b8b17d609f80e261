"""Plans, without tensors: walked on index sets, every visible pair is computed once and every gradient comes home once."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.layouts import LAYOUTS, build
from nnscaler_ring.core.mask import Mask
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import TRANSPORTS, check_transport, choose, plan, plans
from nnscaler_ring.core.steps import Calls, RankPlan
from tests.shapes import KINDS, WORLDS, random_mask

CASES = 60


def rows_of(intervals: np.ndarray) -> np.ndarray:
    """The rows of ``[n, 2]`` ordered disjoint intervals."""
    assert (intervals[:, 0] < intervals[:, 1]).all() and (intervals[1:, 0] >= intervals[:-1, 1]).all()
    return np.concatenate([np.arange(lo, hi) for lo, hi in intervals.tolist()] or [np.empty(0, dtype=int)])


def pairs_of(calls: Calls) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (query row, key row) pairs of each span, as a kernel understands its window: aligned at the last row and key."""
    found = []
    for i0, i1, j0, j1 in calls.spans.tolist():
        left, right = calls.window
        behind = (i1 - 1 - np.arange(i0, i1))[:, None] - (j1 - 1 - np.arange(j0, j1))  # how far the key is after the query
        seen = (left < 0) | (-behind <= left)
        seen = seen & ((right < 0) | (behind <= right))
        i, j = np.nonzero(np.broadcast_to(seen, behind.shape))
        assert seen.any(), "a span sees something"
        assert len(np.unique(i)) == i1 - i0, "every row of a span sees a key"
        found.append((i + i0, j + j0))
    return found


class World:
    """All ranks' plans, walked in lockstep: a row of a buffer is the position that it holds, and its gradient a number."""

    def __init__(self, mask: Mask, q: Layout, k: Layout, transport: str) -> None:
        self.q, self.k, self.plans = q, k, list(plans(mask, q, k, transport))
        self.count = np.zeros((q.length, k.length), dtype=int)
        self.weight = np.random.default_rng(q.length).integers(1, 1000, q.length)  # of a query, in the gradients
        self.read: dict[tuple[int, int], set[int]] = defaultdict(set)
        self.walk()

    def walk(self) -> None:
        world = range(self.q.world_size)
        assert len({len(p.steps) for p in self.plans}) == 1, "all ranks exchange equally often"
        assert [(p.rank, p.q_rows, p.k_rows) for p in self.plans] == [(r, self.q.counts[r], self.k.counts[r]) for r in world]
        written = [np.zeros(p.q_rows, dtype=bool) for p in self.plans]
        buffers = [self.k.positions(rank) for rank in world]
        homes = [np.zeros(p.k_rows, dtype=int) for p in self.plans]
        for p in self.plans:
            first = p.steps[0]
            assert first.size == p.k_rows and not first.send and not first.receive
            self.compute(p, 0, buffers[p.rank], homes[p.rank], written[p.rank])
        arriving = [np.zeros(0, dtype=int) for _ in world]  # gradients that the ranks before have gathered for a buffer's rows
        opened, memories = 1, [np.zeros(0, dtype=int) for _ in world]
        for t in range(1, len(self.plans[0].steps)):
            buffers = self.deliver(t, buffers)
            for p in self.plans:
                step = p.steps[t]
                memories[p.rank] = np.full(step.room, -1) if t == opened else memories[p.rank]
                assert (t == opened) or step.room == 0
                memories[p.rank][step.at : step.at + step.size] = buffers[p.rank]
                assert step.ends == self.plans[0].steps[t].ends and (step.ends or not step.calls)
            if not self.plans[0].steps[t].ends:
                continue
            grads = [np.zeros(len(m), dtype=int) for m in memories]
            for p in self.plans:
                assert (memories[p.rank] >= 0).all(), "the steps fill their memory"
                self.compute(p, t, memories[p.rank], grads[p.rank], written[p.rank])
            for s in range(opened, t + 1):
                parts = [g[p.steps[s].at : p.steps[s].at + p.steps[s].size] for p, g in zip(self.plans, grads, strict=True)]
                for part, gathered in zip(parts, arriving, strict=True):
                    if len(gathered):
                        part += gathered
                arriving = self.send_home(s, parts, homes)
            opened = t + 1
        assert not any(len(a) for a in arriving), "no gradient is left on the way"
        self.home = np.zeros(self.k.length, dtype=int)
        for rank in world:
            self.home[self.k.positions(rank)] = homes[rank]

    def compute(self, p: RankPlan, t: int, buffer: np.ndarray, grads: np.ndarray, written: np.ndarray) -> None:
        positions = self.q.positions(p.rank)
        for calls in p.steps[t].calls:
            spans = [(i0, i1) for i0, i1, _, _ in calls.spans.tolist()]
            rows = np.concatenate([np.arange(*span) for span in spans])
            assert len(np.unique(rows)) == len(rows), "no two spans of a call share a query row"
            blocks = [np.arange(i0, i1) for i0, i1, _ in calls.blocks.tolist()]
            np.testing.assert_array_equal(np.concatenate(blocks), rows, err_msg="blocks are the spans' rows, in their order")
            for block, fresh in zip(blocks, calls.blocks[:, 2].tolist(), strict=True):
                assert fresh == (not written[block].any()), "fresh: nobody wrote these rows before"
                written[block] = True
            for i, j in pairs_of(calls):
                np.add.at(self.count, (positions[i], buffer[j]), 1)
                np.add.at(grads, j, self.weight[positions[i]])

    def deliver(self, t: int, before: list[np.ndarray]) -> list[np.ndarray]:
        """The buffers of step `t`, filled with what peers send out of the buffers `before`."""
        mail = {(p.rank, m.peer): before[p.rank][rows_of(m.rows)] for p in self.plans for m in p.steps[t].send}
        assert len(mail) == sum(len(p.steps[t].send) for p in self.plans), "one message a peer"
        buffers = []
        for p in self.plans:
            buffer = np.full(p.steps[t].size, -1)
            for m in p.steps[t].receive:
                rows = rows_of(m.rows)
                assert (buffer[rows] == -1).all(), "a row arrives once"
                assert m.peer != p.rank, "a message goes to another rank"
                buffer[rows] = mail.pop((m.peer, p.rank))
                assert m.size == len(rows)
            for lo, hi, start, end in p.steps[t].own.tolist():
                assert (buffer[start:end] == -1).all(), "a row arrives once"
                buffer[start:end] = self.k.positions(p.rank)[lo:hi]
            assert (buffer >= 0).all(), "every row arrives"
            assert len(np.unique(buffer)) == len(buffer)
            buffers.append(buffer)
        assert not mail, "every message has a receiver"
        return buffers

    def send_home(self, t: int, grads: list[np.ndarray], homes: list[np.ndarray]) -> list[np.ndarray]:
        """Gradients of step `t`'s rows to the ranks that own them, or on to those that hold the rows next, which are returned."""
        mail = {(p.rank, m.peer): grads[p.rank][rows_of(m.rows)] for p in self.plans for m in p.steps[t].home_send}
        arriving = [np.zeros(0, dtype=int) for _ in self.plans]
        onward = {}
        for p in self.plans:
            left = np.zeros(len(grads[p.rank]), dtype=int)
            for m in (*p.steps[t].home_send, *(p.steps[t + 1].send if 0 < t < len(p.steps) - 1 else ())):
                left[rows_of(m.rows)] += 1
            for lo, hi, start, end in p.steps[t].own.tolist():
                left[start:end] += 1
                homes[p.rank][lo:hi] += grads[p.rank][start:end]
            assert (left == 1).all(), "each row's gradient leaves once"
            if 0 < t < len(p.steps) - 1:
                onward |= {(p.rank, m.peer): grads[p.rank][rows_of(m.rows)] for m in p.steps[t + 1].send}
        for p in self.plans:
            for m in p.steps[t].home_receive:
                np.add.at(homes[p.rank], rows_of(m.rows), mail.pop((m.peer, p.rank)))
            if 0 < t < len(p.steps) - 1:
                arriving[p.rank] = np.zeros(p.steps[t + 1].size, dtype=int)
                for m in p.steps[t + 1].receive:
                    arriving[p.rank][rows_of(m.rows)] += onward.pop((m.peer, p.rank))
        assert not mail and not onward, "every gradient sent is received"
        return arriving


def far_reads(seen: np.ndarray, q: Layout, k: Layout) -> np.ndarray:
    """``[world, k_len]``: whether a rank reads a key that another rank holds, by the dense mask."""
    reads = np.stack([seen[q.positions(rank)].any(0) for rank in range(q.world_size)])
    return reads & (k.owner()[0] != np.arange(k.world_size)[:, None])


@pytest.mark.parametrize("transport", ["auto", *TRANSPORTS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_world_computes_what_the_mask_says(kind: str, transport: str) -> None:
    rng = np.random.default_rng([KINDS.index(kind), len(transport)])
    for n in range(CASES):
        q_len, k_len = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        case = random_mask(rng, q_len, q_len if n % 3 else k_len, kind, packed=n % 2 == 0)
        name, world = list(LAYOUTS)[n % len(LAYOUTS)], WORLDS[rng.integers(len(WORLDS))]
        cus = [None if cu is None else np.array(cu) for cu in (case.cu_q, case.cu_k)]
        q, k = (build(name, size, world, cu) for size, cu in zip((case.q_len, case.k_len), cus, strict=True))
        mask, seen = case.mask(), case.seen()
        walked = World(mask, q, k, transport)
        np.testing.assert_array_equal(walked.count, seen, err_msg=f"{case} {q}")
        np.testing.assert_array_equal(walked.home, walked.weight @ seen, err_msg=f"{case} {q}")
        assert sum(p.pairs for p in walked.plans) == seen.sum()
        sent = [p.rows_sent for p in walked.plans]
        reads, owner = far_reads(seen, q, k), k.owner()[0]
        straight = [int(reads[:, owner == rank].sum()) for rank in range(world)]
        if transport == "auto":
            best = "halo" if max(*straight, *reads.sum(1).tolist()) <= k.counts.max() else "ring"
            assert choose(mask, q, k) == (best if world > 1 else "all_gather")
            assert sum(sent) == sum(straight)
        elif transport in ("ring", "grouped_ring"):
            assert sum(sent) == sum(straight), "a row comes to its readers, and to nobody else"
            assert (np.array(sent) <= reads.sum(1) + k.counts).all(), "each sends its own rows once, and on what it got"
            assert [p.grad_rows_sent for p in walked.plans] == reads.sum(1).tolist()
            assert len(walked.plans[0].steps) == 1 + (int(reads.sum(0).max(initial=0)) if world > 1 else 0)
        elif transport == "full_ring":
            assert sum(sent) == sum(p.grad_rows_sent for p in walked.plans) == (world - 1) * k.length
        elif transport == "broadcast":
            assert sent == [(world - 1) * count for count in k.counts.tolist()]
        else:
            assert sent == straight, "no row goes to a rank that does not read it, and none twice"
            assert [p.grad_rows_sent for p in walked.plans] == reads.sum(1).tolist()


def test_the_world_notices_a_fault() -> None:
    """The negative control: a mask with one pair less than the plans' is not what was computed."""
    layout = build("zigzag", 16, 4)
    walked = World(build_mask(16, causal=True), layout, layout, "ring")
    seen = build_mask(16, causal=True).as_array()
    seen[9, 3] = False
    assert (walked.count != seen).sum() == 1


def test_plans_are_cached_by_content_and_frozen() -> None:
    def one(transport: str = "ring") -> RankPlan:
        layout = build("zigzag", 64, 4)
        return plan(build_mask(64, causal=True), layout, build("zigzag", 64, 4), transport, 1)

    assert one() is one() and one("halo") is not one()
    with pytest.raises(FrozenInstanceError):
        one().rank = 2  # type: ignore[misc]


def test_a_plan_prints() -> None:
    layout = build("contiguous", 16, 4)
    mask = build_mask(16, causal=True, window=(2, 0))
    assert str(plan(mask, layout, layout, "halo", 1)).splitlines() == [
        "rank 1 of 4: 4 query rows, 4 key rows, 2 calls, 1 merges, 2 rows sent, 2 gradient rows sent",
        "  step 0: own rows; q[0:4] x k[0:4] window (2, 0)",
        "  step 1: 2 rows from rank 0; q[0:2] x k[0:2] window (0, -1)",
    ]
    assert "no call" in str(plan(Mask([], 16), layout, layout, "halo", 0))


def test_an_unknown_transport_lists_the_known() -> None:
    with pytest.raises(
        ValueError,
        match="unknown transport 'pigeon': choose one of auto, ring, grouped_ring, full_ring, all_gather, halo, broadcast",
    ):
        check_transport("pigeon")
    assert [check_transport(name) for name in ("auto", *TRANSPORTS)] == ["auto", *TRANSPORTS]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_planning_speed(name: str, transport: str) -> None:
    """1 M tokens, 1,000 documents, 64 ranks, one rank's plan: printed (`-s`); the limit only catches a change of order."""
    length, world = 1 << 20, 64
    rng, best = np.random.default_rng(0), float("inf")
    for _ in range(3):  # another packing each time, as in training: nothing is cached
        cu = np.array([0, *np.sort(rng.choice(np.arange(1, length), 999, replace=False)), length])
        start = time.perf_counter()
        layout = build(name, length, world, cu)
        plan(build_mask(length, causal=True, cu_seqlens_q=cu), layout, layout, transport, 17)
        best = min(best, time.perf_counter() - start)
    print(f"{name}, {transport}: {1e3 * best:.1f} ms")
    assert best < 5.0
