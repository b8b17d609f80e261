"""What is counted: rows and bytes that each rank really sends, attention calls, merges; against formulas derived here by hand.

`n` is the tokens of a shard, ``c = n / 2`` a zigzag chunk, `w` a window, `P` the ranks, `r` a rank. Received gradients mirror
received rows: each key/value row that arrives at a rank leaves it once as a gradient, on along the ring or home, so a rank's
gradient rows sent are its rows received.

contiguous, full      everybody reads everything: each rank passes on P - 1 shards and makes P calls, each but the first a merge.
contiguous, causal    rank r's keys are read by the ranks above it. Upward, r passes on its own shard and the r shards from below
                      (the last rank nothing): (r + 1) n rows; it receives r n, makes r + 1 calls and r merges.
zigzag, causal        early chunks are read by all, the late chunk of rank o (chunk 2P - 1 - o) by the ranks below o alone.
                      Turning downward, rank r passes on P - 1 early chunks, and the late chunks of its own and of the ranks
                      above (r, ..., P - 1: P - r of them), unless it is rank 0, which nobody follows. Over all ranks
                      c (P (P - 1) + P (P - 1) / 2): 3/4 of the 2 c P (P - 1) of the full ring. Own chunks are one causal call,
                      each other rank's rows one full call (its early chunk for all queries, or both chunks for the late ones).
stripe, causal        row i of rank q reads rows j <= i of ranks o <= q and j < i of ranks o > q: all but a rank's last row go all
                      the way round, the last row goes to the ranks above as in contiguous. P calls.
all_gather, zigzag    the early chunk of rank r goes to the P - 1 others and the late one to the r ranks below; two calls a rank
                      (early queries, late queries) on keys 0 .. end of their own chunk, no merge; on the last rank the chunks
                      are neighbours and the two calls one.
window w, causal      rank r receives the min(w, r n) rows before its shard, by any transport; what rank r sends is what the ranks
                      above need of it: clip(w - d n, 0, n) rows for the (d + 1)-th above. On a ring r passes on min(w, (r + 1) n).
                      Calls on own rows, and on what arrived (one buffer, or one for each of the ceil(w / n) ranks before).
streaming             the window's, and s sinks of rank 0 to everybody; here s <= n - w, so rank 1 receives them besides its window.
                      On each rank the sinks are one call more (on rank 0, for the rows beyond the window).
packed                documents [0, n/2), [n/2, 3n/2), ...: each rank but the first receives half a shard from the one before, for
                      its first half; own rows are two causal calls, the half before one full call that merges, or, joined, none.
per document          the sequence as two documents: the contiguous or zigzag counts, with twice the calls. All rows of both
                      documents touch and are merged as one block; the late rows alone, which read the ranks above, do not touch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler_ring.core import engine, layouts, mask
from nnscaler_ring.core import merge as merges
from nnscaler_ring.core.kernels.base import Grad, Scores, Spans, Window
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.plan import plans
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.transport import LocalTransport, transport_of
from tests import oracle
from tests.shapes import VARIANTS

N = 16
"""Tokens of a shard."""
SINKS = 2
BATCH, HEADS_Q, HEADS_K, DIM, DIM_V = 2, 4, 2, 5, 3


@dataclass(frozen=True)
class Want:
    """One rank's counts."""

    sent: int
    received: int
    calls: int
    merges: int


def ring_full(r: int, p: int) -> Want:
    return Want((p - 1) * N, (p - 1) * N, p, p - 1)


def ring_causal(r: int, p: int) -> Want:
    return Want((r + 1) * N if r < p - 1 else 0, r * N, r + 1, r)


def zigzag(r: int, p: int) -> Want:
    chunk = N // 2
    late = [p - rank if rank else 0 for rank in range(p)]  # chunks that each rank passes on downward
    return Want(chunk * (p - 1 + late[r]), chunk * (p - 1 + late[(r + 1) % p]), p, p - 1)


def stripe(r: int, p: int) -> Want:
    last = ring_causal(r, p)
    return Want((N - 1) * (p - 1) + last.sent // N, (N - 1) * (p - 1) + last.received // N, p, p - 1)


def zigzag_gather(r: int, p: int) -> Want:
    chunk = N // 2
    return Want(chunk * (p - 1 + r), chunk * (p - 1 + (p - 1 - r)), 1 if r == p - 1 else 2, 0)


def twice_the_calls(want: Want, more_merges: int = 0) -> Want:
    return Want(want.sent, want.received, 2 * want.calls, want.merges + more_merges)


def window(kind: str, w: int, r: int, p: int) -> Want:
    sent = sum(min(max(w - d * N, 0), N) for d in range(p - 1 - r))
    if kind == "ring":
        sent = min(w, (r + 1) * N) if r < p - 1 else 0
    others = {"ring": min(r, math.ceil(w / N)), "halo": min(r, 1), "gather": 0}[kind]
    return Want(sent, min(w, r * N), 1 + others, others)


def streaming(kind: str, w: int, r: int, p: int) -> Want:
    plain = window(kind, w, r, p)
    if kind == "ring":
        sinks = SINKS if r < p - 1 else 0
    else:
        sinks = SINKS * (p - 1) if r == 0 else 0
    return Want(plain.sent + sinks, plain.received + (SINKS if r else 0), plain.calls + 1, plain.merges + 1)


def packed(joined: bool, r: int, p: int) -> Want:
    half, before = N // 2, 0 if joined or r == 0 else 1
    return Want(half if r < p - 1 else 0, half if r else 0, 2 + before, before)


WANT = {
    "ring-full": ring_full,
    "ring": ring_causal,
    "zigzag": zigzag,
    "stripe": stripe,
    "zigzag-gather": zigzag_gather,
    "zigzag-gather-by-head": zigzag_gather,
    "window-halo": lambda r, p: window("halo", N // 4, r, p),
    "window-ring": lambda r, p: window("ring", N // 4, r, p),
    "window-gather": lambda r, p: window("gather", N // 4, r, p),
    "wide-halo": lambda r, p: window("halo", 3 * N // 2, r, p),
    "wide-ring": lambda r, p: window("ring", 3 * N // 2, r, p),
    "streaming-halo": lambda r, p: streaming("halo", N // 4, r, p),
    "streaming-ring": lambda r, p: streaming("ring", N // 4, r, p),
    "packed-halo": lambda r, p: packed(False, r, p),
    "packed-ring": lambda r, p: packed(False, r, p),
    "llama3": lambda r, p: packed(True, r, p),
    "ring-varlen": lambda r, p: twice_the_calls(ring_causal(r, p)),
    "zigzag-varlen": lambda r, p: twice_the_calls(zigzag(r, p), more_merges=p - 1 - r),
}


class Counter:
    """Counts the spans handed to the reference kernel, the merges, and what the ranks of a world send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
        self.forward = self.backward = self.merges = 0
        transport = transport_of(f"local:{world}")
        assert isinstance(transport, LocalTransport)
        self.transport, self.before = transport, list(transport.bytes_sent)
        forward, backward, merge = Reference.forward, Reference.backward, merges.merge_all_

        def count_forward(kernel: Reference, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores):
            self.forward += len(spans)
            return forward(kernel, q, k, v, spans, window, scores)

        def count_backward(kernel: Reference, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores):
            self.backward += len(spans)
            return backward(kernel, grad, k, v, spans, window, scores)

        def count_merge(out: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor]], fresh: bool) -> None:
            self.merges += len(parts) - fresh
            merge(out, lse, parts, fresh)

        monkeypatch.setattr(Reference, "forward", count_forward)
        monkeypatch.setattr(Reference, "backward", count_backward)
        monkeypatch.setattr(merges, "merge_all_", count_merge)

    def bytes_sent(self) -> list[int]:
        """By each rank since the last time."""
        since = [now - then for now, then in zip(self.transport.bytes_sent, self.before, strict=True)]
        self.before = list(self.transport.bytes_sent)
        return since


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("name", VARIANTS)
def test_counts(name: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, length = VARIANTS[name], N * world
    named = variant.mask(length, world)
    want = [WANT[name](rank, world) for rank in range(world)]
    assert sum(w.sent for w in want) == sum(w.received for w in want), "the formulas agree with themselves"

    # 1. the plans
    cu = named.get("cu_seqlens_q")
    rows = layouts.build(variant.layout, length, world, None if cu is None else np.array(cu))
    made = list(plans(mask.build(length, **named), rows, rows, variant.transport))
    assert [Want(p.rows_sent, p.grad_rows_sent, p.num_calls, p.num_merges) for p in made] == want

    # 2. what runs: bf16 rows out, fp32 gradients home
    recipe = Recipe(
        group=f"local:{world}",
        layout=variant.layout,
        transport=variant.transport,
        kernel="reference",
        heads_stride=variant.heads_stride,
        **{key: value for key, value in named.items() if key != "cu_seqlens_q"},
    )
    given = oracle.inputs(0, (BATCH, length, length), (HEADS_Q, HEADS_K, DIM, DIM_V), torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in given[:3])
    counter = Counter(monkeypatch, world)
    splits = HEADS_K // variant.heads_stride if variant.heads_stride else 1
    elements = BATCH * HEADS_K * (DIM + DIM_V)
    documents = None if cu is None else torch.tensor(cu)
    out, *_ = engine.attention(q, k, v, documents, None, None, None, None, None, length, length, 0.4, 0, str(recipe))
    assert counter.bytes_sent() == [w.sent * elements * 2 for w in want]
    assert (counter.forward, counter.merges) == (splits * sum(w.calls for w in want), splits * sum(w.merges for w in want))
    out.backward(given.d_out)
    assert counter.bytes_sent() == [w.sent * elements * 2 + w.received * elements * 4 for w in want]
    assert counter.backward == counter.forward


@pytest.mark.parametrize("world", [2, 4, 8])
def test_causal_zigzag_moves_three_quarters_of_the_full_ring(world: int) -> None:
    assert 4 * sum(zigzag(r, world).sent for r in range(world)) == 3 * sum(ring_full(r, world).sent for r in range(world))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_documents_that_stay_on_their_rank_need_no_traffic(world: int) -> None:
    length = N * world
    rows = layouts.build("contiguous", length, world)
    documents = mask.build(length, causal=True, cu_seqlens_q=np.arange(0, length + 1, N // 2))
    for transport in ("ring", "halo", "all_gather"):
        for p in plans(documents, rows, rows, transport):
            assert (p.rows_sent, p.grad_rows_sent, p.num_calls, p.num_merges) == (0, 0, 2, 0)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_work_is_balanced_where_a_layout_promises_it(world: int) -> None:
    """Zigzag: every rank the same pairs, exactly. Stripe: within one diagonal. Contiguous: a triangle's."""
    length = N * world
    causal = mask.build(length, causal=True)
    pairs = {}
    for name in ("contiguous", "zigzag", "stripe"):
        rows = layouts.build(name, length, world)
        pairs[name] = [p.pairs for p in plans(causal, rows, rows, "ring")]
    assert pairs["contiguous"] == [N * (N + 1) // 2 + r * N * N for r in range(world)]
    assert pairs["zigzag"] == [length * (length + 1) // 2 // world] * world
    assert pairs["stripe"] == [world * N * (N - 1) // 2 + N * (r + 1) for r in range(world)]
