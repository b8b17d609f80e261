"""Mask x layout x transport -> plan: which rows travel when, which attention calls run then. No tensors, no processes.

A rank's walk has steps. In step 0 it reads its own key/value rows. Each later step has a *buffer* of rows that arrived from
peers, and the calls that read it; the rows of a step's messages are rows of the buffer of the step before (ring: they are passed
on) or of the own shard (everything else). Gradients of a buffer's rows go to whoever holds them next, or home if nobody does.

Transports are rows of a table:

============  ==========================================================================================================
``ring``      each row goes from neighbour to neighbour as far as somebody still reads it, in the direction that moves less;
              step `t` reads what started `t` ranks away
``all_gather``  every row goes straight to each rank that reads it, and the calls run on own and received rows joined: the
              fewest calls and merges
``halo``      as ``all_gather``, but calls on own rows run while the others are on their way
``broadcast``  as ``all_gather``, but every row goes to every rank, so that a rank need not know what the others read
============  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from .geometry import coalesce, join, trim, union, visible, windows
from .layout import Layout
from .mask import Mask, band_area


@dataclass(frozen=True, eq=False)
class Message:
    """Rows ``[n, 2]`` of a buffer, as ordered intervals, that go to or come from `peer` (a rank of the group)."""

    peer: int
    rows: np.ndarray

    @property
    def size(self) -> int:
        return int((self.rows[:, 1] - self.rows[:, 0]).sum())


@dataclass(frozen=True, eq=False)
class Calls:
    """Attention on several spans that share a window and no query row: one varlen kernel call.

    Attributes:
        window: ``(left, right)``, -1 for no limit, aligned at each span's last row and last key.
        spans: ``[n, 4]`` ``(i0, i1, j0, j1)``: local query rows and buffer rows.
        blocks: ``[m, 3]`` ``(i0, i1, fresh)``: the spans' query rows with touching ones joined; `fresh` where no earlier call
            wrote them, so that the result is stored and not merged.
    """

    window: tuple[int, int]
    spans: np.ndarray
    blocks: np.ndarray


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a rank: `receive` fills the buffer of `size` rows, `calls` read it, `home` tells where its gradients end.

    Attributes:
        size: rows in the buffer (step 0: the own shard).
        send: rows of the buffer before; a message to the rank itself is a copy.
        receive: rows of this buffer.
        calls: what runs when the buffer is there.
        relays: the next step passes rows of this buffer on, so their gradients go there; False: they went out from the shard.
        home_send: rows of this buffer whose gradient goes to the rank that owns them.
        home_receive: rows of the own shard whose gradient arrives.
    """

    size: int
    send: tuple[Message, ...] = ()
    receive: tuple[Message, ...] = ()
    calls: tuple[Calls, ...] = ()
    relays: bool = False
    home_send: tuple[Message, ...] = ()
    home_receive: tuple[Message, ...] = ()


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does, forward and backward. Rows are key/value rows; multiply by bytes a row for traffic."""

    rank: int
    world_size: int
    q_rows: int
    k_rows: int
    steps: tuple[Step, ...]

    @property
    def num_calls(self) -> int:
        """Attention calls on one span each."""
        return sum(len(calls.spans) for step in self.steps for calls in step.calls)

    @property
    def num_merges(self) -> int:
        """Times that a result is merged into rows that an earlier call wrote."""
        return sum(int((calls.blocks[:, 2] == 0).sum()) for step in self.steps for calls in step.calls)

    @property
    def rows_sent(self) -> int:
        """Key/value rows that go to other ranks, in the forward pass and again in the backward pass."""
        return sum(m.size for step in self.steps for m in step.send if m.peer != self.rank)

    @property
    def grad_rows_sent(self) -> int:
        """Rows of dK/dV (fp32) that go to other ranks in the backward pass."""
        onward = sum(m.size for a, b in zip(self.steps, self.steps[1:], strict=False) if a.relays for m in b.send)
        return onward + sum(m.size for step in self.steps for m in step.home_send if m.peer != self.rank)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs that the rank computes: its work."""
        return sum(int(_pairs(calls).sum()) for step in self.steps for calls in step.calls)

    def __str__(self) -> str:
        lines = [
            f"rank {self.rank} of {self.world_size}: {self.q_rows} query rows, {self.k_rows} key rows, {self.num_calls} calls, "
            f"{self.num_merges} merges, {self.rows_sent} rows sent, {self.grad_rows_sent} gradient rows sent"
        ]
        for t, step in enumerate(self.steps):
            moves = [f"{m.size} rows from rank {m.peer}" for m in step.receive]
            spans = [f"q[{a}:{b}] x k[{c}:{d}] window {n.window}" for n in step.calls for a, b, c, d in n.spans[:4].tolist()]
            lines.append(f"  step {t}: {', '.join(moves) or 'own rows'}; {', '.join(spans) or 'no call'}")
        return "\n".join(lines)


def _pairs(calls: Calls) -> np.ndarray:
    i0, i1, j0, j1 = calls.spans.T
    left, right = calls.window
    end = j1 - i1
    low = end - left if left >= 0 else np.full_like(end, -(1 << 40))
    high = end + right if right >= 0 else np.full_like(end, 1 << 40)
    return band_area(i0, i1, j0, j1, low, high)


@dataclass(frozen=True)
class Transport:
    """How rows travel: neighbour to neighbour or straight, own and received rows in one buffer or not, all rows or those read."""

    relay: bool = False
    joined: bool = False
    everything: bool = False


TRANSPORTS: Mapping[str, Transport] = MappingProxyType(
    {
        "ring": Transport(relay=True),
        "all_gather": Transport(joined=True),
        "halo": Transport(),
        "broadcast": Transport(joined=True, everything=True),
    }
)


def check_transport(name: str) -> str:
    """`name`, or ValueError that lists the known transports."""
    if name != "auto" and name not in TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}: choose one of auto, {', '.join(TRANSPORTS)}")
    return name


@lru_cache(maxsize=1024)
def plan(mask: Mask, q: Layout, k: Layout, transport: str, rank: int) -> RankPlan:
    """The plan of one rank, cached by content.

    Args:
        mask: who sees whom, over ``q.length`` queries and ``k.length`` keys.
        q: which rank holds which queries.
        k: which rank holds which keys; of one stride with `q`.
        transport: a name in `TRANSPORTS`, or ``auto``: ``ring`` unless going straight moves fewer rows.
        rank: the rank, ``0 .. world_size-1``.

    Example:
        >>> from nnscaler_ring.core import layout, mask
        >>> zigzag = layout.zigzag(64, 4)
        >>> plan(mask.build(64, causal=True), zigzag, zigzag, "all_gather", 1).num_calls
        2
    """
    assert q.stride == k.stride and q.world_size == k.world_size, "one stride and one world in a plan"
    assert (mask.q_len, mask.k_len) == (q.length, k.length), "mask and layouts speak of the same tokens"
    if transport == "auto":
        transport = choose(mask, q, k)
    if TRANSPORTS[transport].relay and q.world_size > 1:
        return _relayed(mask, q, k, rank)
    return _direct(mask, q, k, rank, TRANSPORTS[transport])


@lru_cache(maxsize=256)
def choose(mask: Mask, q: Layout, k: Layout) -> str:
    """The transport that moves fewer rows over the whole world; ``ring`` where they move the same."""
    if q.world_size == 1:
        return "all_gather"
    reader, _, lo, hi, _ = _wanted(visible(mask, q, k), k.world_size)
    straight = int((hi - lo).sum()) if len(reader) else 0
    return "ring" if _route(mask, q, k).moved <= straight else "halo"


def _wanted(bands: np.ndarray, world_size: int) -> tuple[np.ndarray, ...]:
    """Rows that ranks read of other ranks: disjoint pieces ``(reader, origin, lo, hi, height)``."""
    bands = bands[bands[:, 0] != bands[:, 1]]
    key, lo, hi, height = union(
        bands[:, 0] * world_size + bands[:, 1], bands[:, 4], bands[:, 5], np.ones(len(bands), dtype=np.int64)
    )
    return key // world_size, key % world_size, lo, hi, height


# -- straight to the reader: all_gather, halo ---------------------------------------------------------------------------------


def _direct(mask: Mask, q: Layout, k: Layout, rank: int, transport: Transport) -> RankPlan:
    mine = visible(mask, q, k, reader=rank)
    reads = _reads(mine[:, [0, 1, 4, 5]], k, transport.everything)
    remote = bool((reads[:, 1] != rank).any())
    joined = transport.joined and remote
    late = (mine[:, 1] != rank) | joined
    buffer = _buffer(reads if joined else reads[reads[:, 1] != rank], k)
    origin, lo, hi, start = buffer.T
    wanted = _reads(visible(mask, q, k, origin=rank)[:, [0, 1, 4, 5]], k, transport.everything)
    wanted = wanted[(wanted[:, 1] == rank) & ((wanted[:, 0] != rank) | joined)]
    send, receive = _messages(wanted[:, 0], wanted[:, 2], wanted[:, 3]), _messages(origin, start, start + hi - lo)
    seen = np.zeros(int(q.counts[rank]), dtype=bool)
    steps = [Step(int(k.counts[rank]), calls=_calls(mine[~late][:, 2:], seen))]
    if q.world_size > 1:
        calls = _calls(_in_buffer(mine[late], buffer), seen)
        steps.append(Step(int((hi - lo).sum()), send, receive, calls, home_send=receive, home_receive=send))
    return RankPlan(rank, q.world_size, len(seen), int(k.counts[rank]), tuple(steps))


def _reads(ranges: np.ndarray, k: Layout, everything: bool) -> np.ndarray:
    """Key rows ``(reader, origin, j0, j1)`` that ranks read; all rows for all ranks if `everything`."""
    if not everything:
        return ranges
    world = np.arange(k.world_size)
    reader, origin = np.repeat(world, k.world_size), np.tile(world, k.world_size)
    return np.column_stack([reader, origin, np.zeros_like(origin), k.counts[origin]])


def _buffer(reads: np.ndarray, k: Layout) -> np.ndarray:
    """The rows of a rank's buffer, ``(origin, lo, hi, start)``, in the order of their positions so that neighbours join."""
    pieces = union(reads[:, 1], reads[:, 2], reads[:, 3], np.ones(len(reads), dtype=np.int64), (k.runs[:, 0], k.row0))
    buffer = np.stack(pieces, axis=1)
    buffer = buffer[np.argsort(_position(k, buffer[:, 0], buffer[:, 1]), kind="stable")]
    sizes = buffer[:, 2] - buffer[:, 1]
    buffer[:, 3] = np.cumsum(sizes) - sizes
    return buffer


def _position(k: Layout, rank: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Position of each local row."""
    base = np.cumsum(k.counts) - k.counts
    run = np.searchsorted(base[k.runs[:, 0]] + k.row0, base[rank] + row, side="right") - 1
    return k.runs[run, 1] + k.stride * (row - k.row0[run])


def _messages(peer: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[Message, ...]:
    """One message a peer with all its rows, in ascending order."""
    peer, lo, hi, _ = union(peer, lo, hi, np.ones(len(peer), dtype=np.int64))
    rows = np.column_stack([lo, hi])
    return tuple(Message(p, rows[peer == p]) for p in np.unique(peer).tolist())


def _in_buffer(bands: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """Bands over local key rows of their origin -> ``[n, 6]`` bands over rows of the buffer ``(origin, lo, hi, start)``."""
    if not len(bands):
        return bands[:, 2:]
    span = int(buffer[:, 2].max()) + 1
    order = np.lexsort((buffer[:, 1], buffer[:, 0]))
    at = np.searchsorted(buffer[order, 0] * span + buffer[order, 1], bands[:, 1] * span + bands[:, 4], side="right") - 1
    shift = buffer[order[at], 3] - buffer[order[at], 1]
    return np.column_stack([bands[:, 2:4], bands[:, 4:] + shift[:, None]])


def _calls(bands: np.ndarray, seen: np.ndarray) -> tuple[Calls, ...]:
    """The calls for ``[n, 6]`` bands: joined, grouped by window, marked fresh or not; `seen` rows are updated."""
    if not len(bands):
        return ()
    bands = join(np.stack(trim(*bands.T), axis=1))
    window, turn = windows(bands), _turns(bands)
    keys, group = np.unique(np.column_stack([turn, window]), axis=0, return_inverse=True)
    calls = []
    for n, (_, left, right) in enumerate(keys.tolist()):
        spans = bands[group.ravel() == n, :4]
        rows = coalesce(spans[:, :2])
        fresh = np.array([not seen[lo:hi].any() for lo, hi in rows.tolist()], dtype=np.int64)
        for lo, hi in rows.tolist():
            seen[lo:hi] = True
        calls.append(Calls((left, right), spans, np.column_stack([rows, fresh])))
    return tuple(calls)


def _turns(bands: np.ndarray) -> np.ndarray:
    """A number for each band such that bands of one number share no query row; bands come ordered by their first row."""
    turns = np.zeros(len(bands), dtype=np.int64)
    if (bands[1:, 0] >= bands[:-1, 1]).all():
        return turns
    free: list[int] = []  # the row from which each turn is free
    for n, (i0, i1) in enumerate(bands[:, :2].tolist()):
        turns[n] = next((t for t, row in enumerate(free) if row <= i0), len(free))
        free[turns[n] : turns[n] + 1] = [i1]
    return turns


# -- neighbour to neighbour: ring --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Route:
    """The way of all rows round the ring: pieces ``(origin, lo, hi, hops)`` and the direction, +1 to higher ranks."""

    direction: int
    pieces: np.ndarray
    bands: np.ndarray

    @property
    def moved(self) -> int:
        return int(((self.pieces[:, 2] - self.pieces[:, 1]) * self.pieces[:, 3]).sum())

    def held(self, origin: int, hops: int) -> np.ndarray:
        """Rows of `origin` that still go on after ``hops - 1`` hops: what the rank `hops` away gets."""
        rows = self.pieces[(self.pieces[:, 0] == origin) & (self.pieces[:, 3] >= hops)]
        return coalesce(rows[:, 1:3])


@lru_cache(maxsize=64)
def _route(mask: Mask, q: Layout, k: Layout) -> _Route:
    """The direction that moves fewer rows, and how far each row goes in it."""
    bands, world = visible(mask, q, k), q.world_size
    far = bands[bands[:, 0] != bands[:, 1]]
    routes = []
    for direction in (-1, 1):
        hops = (far[:, 0] - far[:, 1]) * direction % world
        routes.append(_Route(direction, np.stack(union(far[:, 1], far[:, 4], far[:, 5], hops), axis=1), bands))
    return min(routes, key=lambda route: route.moved)


def _relayed(mask: Mask, q: Layout, k: Layout, rank: int) -> RankPlan:
    world, route = q.world_size, _route(mask, q, k)
    last = int(route.pieces[:, 3].max()) if len(route.pieces) else 0
    onward = (rank + route.direction) % world
    before = (rank - route.direction) % world
    mine = route.bands[route.bands[:, 0] == rank]
    seen = np.zeros(int(q.counts[rank]), dtype=bool)
    own_rows = int(k.counts[rank])
    steps: list[Step] = []
    held = np.array([[0, own_rows]])
    sent: tuple[Message, ...] = ()
    for hops in range(last + 1):
        origin = (rank - route.direction * hops) % world
        bands = mine[mine[:, 1] == origin]
        if hops == 0:
            steps.append(Step(own_rows, calls=_calls(bands[:, 2:], seen)))
        else:
            start = np.cumsum(held[:, 1] - held[:, 0]) - (held[:, 1] - held[:, 0])
            buffer = np.column_stack([np.full(len(held), origin), held, start])
            size = int((held[:, 1] - held[:, 0]).sum())
            ends = _within(_minus(held, route.held(origin, hops + 1)), held)
            leaves = _minus(route.held(rank, hops), route.held(rank, hops + 1))
            steps.append(
                Step(
                    size,
                    send=sent,
                    receive=_one(before, np.array([[0, size]])),
                    calls=_calls(_in_buffer(bands, buffer), seen),
                    relays=hops < last,
                    home_send=_one(origin, ends),
                    home_receive=_one((rank + route.direction * hops) % world, leaves),
                )
            )
        if hops < last:
            sent = _one(onward, _within(route.held(origin, hops + 1), held))
            held = route.held((origin - route.direction) % world, hops + 1)
    return RankPlan(rank, world, int(q.counts[rank]), own_rows, tuple(steps))


def _one(peer: int, rows: np.ndarray) -> tuple[Message, ...]:
    rows = rows[rows[:, 0] < rows[:, 1]]
    return (Message(peer, rows),) if len(rows) else ()


def _within(rows: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Intervals `rows`, each inside one of the intervals `held`, as places in the buffer that stores `held` end to end."""
    if not len(rows):
        return rows
    start = np.cumsum(held[:, 1] - held[:, 0]) - (held[:, 1] - held[:, 0])
    at = np.searchsorted(held[:, 0], rows[:, 0], side="right") - 1
    return coalesce(rows + (start[at] - held[at, 0])[:, None])


def _minus(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Ordered intervals `rows` without the ordered intervals `other`, which lie inside them."""
    if not len(rows) or not len(other):
        return rows
    points = np.sort(np.concatenate([rows.ravel(), other.ravel()]))
    pieces = points.reshape(-1, 2)  # inside `rows` every point flips between kept and not kept
    return coalesce(pieces[pieces[:, 0] < pieces[:, 1]])


def plans(mask: Mask, q: Layout, k: Layout, transport: str) -> Iterable[RankPlan]:
    """The plans of all ranks."""
    return [plan(mask, q, k, transport, rank) for rank in range(q.world_size)]
