"""Mask x layout x transport -> plan: which rows travel when, which attention calls run then. No tensors, no processes.

A rank's walk has steps. In step 0 it reads its own key/value rows. Each later step has a *buffer* of rows that arrived from
peers, and the calls that read it; the rows of a step's messages are rows of the buffer of the step before (ring: they are passed
on) or of the own shard (everything else). Gradients of a buffer's rows go to whoever gets the rows next, or home if nobody does.

Transports are rows of a table:

============  ==========================================================================================================
``ring``      each row goes from reader to reader round the ring, past ranks that do not read it; step `t` reads what its `t`-th
              reader gets
``grouped_ring``  as ``ring``, but calls wait until 1, 2, 4, ... steps have brought their rows: about log2(P) calls and merges, not
              P, for buffers that hold half of the sequence at the end
``full_ring``  as ``ring``, but every rank takes part, whoever reads: the ring of other libraries, to compare with
``all_gather``  every row goes straight to each rank that reads it, and the calls run on own and received rows joined: the
              fewest calls and merges
``halo``      as ``all_gather``, but calls on own rows run while the others are on their way
``broadcast``  as ``all_gather``, but every row goes to every rank, so that a rank need not know what the others read
============  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from types import MappingProxyType

import numpy as np

from .geometry import coalesce, distinct, join, overlaps, trim, union, visible, windows
from .layout import Layout
from .mask import NO_LIMIT, Mask, band_area


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
        part: of the features of q and k.
        blocks: ``[m, 3]`` ``(i0, i1, fresh)``: the spans' query rows with touching ones joined; `fresh` where no earlier call
            wrote them, so that the result is stored and not merged.
    """

    window: tuple[int, int]
    spans: np.ndarray
    blocks: np.ndarray
    part: int = 0

    @property
    def bands(self) -> np.ndarray:
        """The spans as bands ``[n, 6]`` ``(i0, i1, j0, j1, low, high)`` over query rows and buffer rows."""
        left, right = self.window
        end = self.spans[:, 3] - self.spans[:, 1]
        low = end - left if left >= 0 else np.full_like(end, -NO_LIMIT)
        high = end + right if right >= 0 else np.full_like(end, NO_LIMIT)
        return np.column_stack([self.spans, low, high])


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a rank: `receive` fills the buffer of `size` rows, `calls` read it, `home` tells where its gradients end.

    Several steps may fill one memory, end to end, for the calls of the last of them.

    Attributes:
        size: rows in the buffer (step 0: the own shard).
        send: rows of the buffer before; a message to the rank itself is a copy.
        receive: rows of this buffer.
        at: where in its memory the buffer starts.
        room: rows of the memory; 0 where it is that of the step before.
        ends: the memory is full with this step: calls run, gradients leave.
        calls: what runs then, on rows of the memory.
        holds: ``[n, 4]`` ``(origin, lo, hi, start)``: which rows the memory then holds, and where.
        relays: the next step passes rows of this buffer on, so their gradients go there; False: they went out from the shard.
        home_send: rows of this buffer whose gradient goes to the rank that owns them.
        home_receive: rows of the own shard whose gradient arrives.
    """

    size: int
    send: tuple[Message, ...] = ()
    receive: tuple[Message, ...] = ()
    at: int = 0
    room: int = 0
    ends: bool = True
    calls: tuple[Calls, ...] = ()
    holds: np.ndarray = field(default_factory=lambda: np.empty((0, 4), dtype=np.int64))
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
        return sum(int(band_area(*calls.bands.T).sum()) for step in self.steps for calls in step.calls)

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


@dataclass(frozen=True)
class Transport:
    """How rows travel: neighbour to neighbour or straight, own and received rows in one buffer or not, all rows or those read.

    With `grows`, what 1, 2, 4, ... hops bring is read at once.
    """

    relay: bool = False
    grows: bool = False
    joined: bool = False
    everything: bool = False


TRANSPORTS: Mapping[str, Transport] = MappingProxyType(
    {
        "ring": Transport(relay=True),
        "grouped_ring": Transport(relay=True, grows=True),
        "full_ring": Transport(relay=True, everything=True),
        "all_gather": Transport(joined=True),
        "halo": Transport(),
        "broadcast": Transport(joined=True, everything=True),
    }
)


ALL_TO_ALL = "all_to_all"
"""The transport that moves heads, not keys: see `heads`. What is left to plan is then attention on one device."""


def check_transport(name: str) -> str:
    """`name`, or ValueError that lists the known transports."""
    known = ("auto", *TRANSPORTS, ALL_TO_ALL)
    if name not in known:
        raise ValueError(f"unknown transport {name!r}: choose one of {', '.join(known)}")
    return name


@lru_cache(maxsize=1024)
def plan(mask: Mask, q: Layout, k: Layout, transport: str, rank: int) -> RankPlan:
    """The plan of one rank, cached by content.

    Args:
        mask: who sees whom, over ``q.length`` queries and ``k.length`` keys.
        q: which rank holds which queries.
        k: which rank holds which keys; of one stride with `q`.
        transport: a name in `TRANSPORTS`, or ``auto`` for what `choose` says.
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
        return _relayed(mask, q, k, rank, TRANSPORTS[transport])
    return _direct(mask, q, k, rank, TRANSPORTS[transport])


@lru_cache(maxsize=256)
def choose(mask: Mask, q: Layout, k: Layout) -> str:
    """``halo``, in one step, while no rank sends or receives more than a shard so; beyond that ``ring``.

    Both move the same rows, but straight from their owner some ranks send the same row to many others.
    """
    if q.world_size == 1:
        return "all_gather"
    busiest = max(rows_given(mask, q, k).max(), rows_needed(mask, q, k).max())
    return "halo" if busiest <= k.counts.max() else "ring"


@lru_cache(maxsize=64)
def rows_given(mask: Mask, q: Layout, k: Layout) -> np.ndarray:
    """Rows that each rank sends where its rows go straight to all their readers: int64 ``[world_size]``."""
    chains = _chains(mask, q, k, False)
    sizes = chains.pieces[:, 3] - chains.pieces[:, 2]
    return np.bincount(chains.pieces[:, 0], sizes * chains.length, k.world_size).astype(np.int64)


def rows_sent(mask: Mask, q: Layout, k: Layout, transport: str) -> int:
    """Key/value rows that all ranks send together in the forward pass, and as many rows of gradients in the backward pass."""
    how = TRANSPORTS[transport]
    if how.everything:
        return (k.world_size - 1) * k.length
    return int(rows_needed(mask, q, k).sum())


# -- straight to the reader: all_gather, halo ---------------------------------------------------------------------------------


def _direct(mask: Mask, q: Layout, k: Layout, rank: int, transport: Transport) -> RankPlan:
    mine, part = _of_rank(mask, q, k, rank)
    reads = _reads(mine[:, [0, 1, 4, 5]], k, transport.everything)
    remote = bool((reads[:, 1] != rank).any())
    joined = transport.joined and remote
    late = (mine[:, 1] != rank) | joined
    buffer = _buffer(reads if joined else reads[reads[:, 1] != rank], k)
    origin, lo, hi, start = buffer.T
    wanted = _reads(visible(mask, q, k, origin=rank)[:, [0, 1, 4, 5]], k, transport.everything)
    wanted = wanted[(wanted[:, 1] == rank) & ((wanted[:, 0] != rank) | joined)]
    send, receive = _messages(wanted[:, 0], wanted[:, 2], wanted[:, 3]), _messages(origin, start, start + hi - lo)
    q_rows, k_rows = int(q.counts[rank]), int(k.counts[rank])
    bands = mine[:, 2:].copy()
    bands[late] = _in_buffer(mine[late], buffer)
    first, second = _calls(bands, late.astype(np.int64), part, 2, q_rows)
    steps = [Step(k_rows, calls=first, holds=np.array([[rank, 0, k_rows, 0]]))]
    if q.world_size > 1:
        size = int((hi - lo).sum())
        steps.append(Step(size, send, receive, room=size, calls=second, holds=buffer, home_send=receive, home_receive=send))
    return RankPlan(rank, q.world_size, q_rows, k_rows, tuple(steps))


def _of_rank(mask: Mask, q: Layout, k: Layout, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The bands of a rank's queries, and the part of each."""
    bands = [visible(mask, q, k, reader=rank, part=part) for part in range(mask.num_parts)]
    return np.concatenate(bands), np.repeat(np.arange(mask.num_parts), [len(each) for each in bands])


def _reads(ranges: np.ndarray, k: Layout, everything: bool) -> np.ndarray:
    """Key rows ``(reader, origin, j0, j1)`` that ranks read; all rows for all ranks if `everything`."""
    if not everything:
        return ranges
    world = np.arange(k.world_size)
    reader, origin = np.repeat(world, k.world_size), np.tile(world, k.world_size)
    return np.column_stack([reader, origin, np.zeros_like(origin), k.counts[origin]])


def _buffer(reads: np.ndarray, k: Layout) -> np.ndarray:
    """The rows of a rank's buffer, ``(origin, lo, hi, start)``, in the order of their positions so that neighbours join.

    Where a rank's rows do not ascend they stay in their order, which is that of the messages; there are no neighbours to join.
    """
    pieces = union(reads[:, 1], reads[:, 2], reads[:, 3], np.ones(len(reads), dtype=np.int64), (k.runs[:, 0], k.row0))
    buffer = np.stack(pieces, axis=1)
    if k.ascends:
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


def _calls(bands: np.ndarray, memory: np.ndarray, part: np.ndarray, memories: int, q_rows: int) -> list[tuple[Calls, ...]]:
    """The calls for ``[n, 6]`` bands, for each memory in the order in which they run: joined, grouped by window, fresh or not."""
    if not len(bands):
        return [()] * memories
    parts = int(part.max()) + 1
    apart = 4 * (int(bands[:, :4].max()) + 1)  # rows between what may not join: so many that no band reaches over two
    bands = join(np.stack(trim(*_shifted(bands, (memory * parts + part) * apart).T), axis=1))
    number = bands[:, 0] // apart
    bands = _shifted(bands, -number * apart)
    window, seen = windows(bands), np.zeros(q_rows, dtype=bool)
    bounds = np.searchsorted(number, np.arange(memories * parts + 1)).tolist()
    made = [_group(bands[lo:hi], window[lo:hi], seen, n % parts) if lo < hi else () for n, (lo, hi) in enumerate(pairwise(bounds))]
    return [tuple(chain.from_iterable(made[n : n + parts])) for n in range(0, len(made), parts)]


def _shifted(bands: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Bands with all rows moved along the diagonal."""
    return np.column_stack([bands[:, :4] + by[:, None], bands[:, 4:]])


def _group(bands: np.ndarray, window: np.ndarray, seen: np.ndarray, part: int) -> tuple[Calls, ...]:
    """The calls for joined bands of one moment and part; `seen` rows are updated."""
    if len(bands) == 1:
        return (_call(window[0], bands[:, :4], seen, part),)
    keys, at = np.unique(np.column_stack([_turns(bands), window]), axis=0, return_inverse=True)
    return tuple(_call(key[1:], bands[at.ravel() == n, :4], seen, part) for n, key in enumerate(keys))


def _call(window: np.ndarray, spans: np.ndarray, seen: np.ndarray, part: int) -> Calls:
    rows = coalesce(spans[:, :2])
    fresh = []
    for lo, hi in rows.tolist():
        fresh.append(not seen[lo:hi].any())
        seen[lo:hi] = True
    left, right = window.tolist()
    return Calls((left, right), spans, np.column_stack([rows, fresh]), part)


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
class _Chains:
    """The way of all rows: from the rank that holds them to each reader in turn, in the order in which the ring comes to them.

    Attributes:
        direction: of the ring, +1 to higher ranks.
        pieces: ``(origin, row, address, end)`` of rows that the same ranks read, in ascending address.
        reads: bool ``[pieces, world - 1]``: whether the rank at a distance from the origin, 1 first, reads them.
    """

    direction: int
    pieces: np.ndarray
    reads: np.ndarray

    @property
    def steps(self) -> int:
        """Readers of the row that most ranks read."""
        return int(self.length.max(initial=0))

    @cached_property
    def length(self) -> np.ndarray:
        """Readers of each piece."""
        return self.reads.sum(1)

    def rank_at(self, piece: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """The rank at a distance, counted from 0, on the way of each piece."""
        return (self.pieces[piece, 0] + self.direction * (distance + 1)) % (self.reads.shape[1] + 1)

    def seen_from(self, rank: int) -> tuple[np.ndarray, ...]:
        """Of the pieces that `rank` reads: number, place in the chain from 1, the rank before, and the one after or -1."""
        distance = (rank - self.pieces[:, 0]) * self.direction % (self.reads.shape[1] + 1) - 1
        far = np.flatnonzero(distance >= 0)
        piece = far[self.reads[far, distance[far]]]
        reads, own = self.reads[piece], distance[piece, None]
        columns = np.arange(reads.shape[1])
        earlier, later = reads & (columns < own), reads & (columns > own)
        place = earlier.sum(1) + 1
        before = np.where(place > 1, self.rank_at(piece, reads.shape[1] - 1 - earlier[:, ::-1].argmax(1)), self.pieces[piece, 0])
        after = np.where(later.any(1), self.rank_at(piece, later.argmax(1)), -1)
        return piece, place, before, after

    def sent_from(self, rank: int) -> tuple[np.ndarray, ...]:
        """Of the pieces that `rank` holds and others read: number, the first reader and the last."""
        piece = np.flatnonzero((self.pieces[:, 0] == rank) & (self.length > 0))
        reads = self.reads[piece]
        last = reads.shape[1] - 1 - reads[:, ::-1].argmax(1)
        return piece, self.rank_at(piece, reads.argmax(1)), self.rank_at(piece, last)


@lru_cache(maxsize=32)
def _chains(mask: Mask, q: Layout, k: Layout, everything: bool) -> _Chains:
    """The chains in the direction in which rows skip fewer ranks; with `everything` all ranks read all rows."""
    world = k.world_size
    if everything:
        pieces = _cut(k, _addresses(k))
        return _Chains(1, pieces, np.ones((len(pieces), world - 1), dtype=bool))
    reader, lo, hi = _needs(mask, q, k)
    pieces = _cut(k, np.concatenate([lo, hi]))
    change = np.zeros((len(pieces) + 1, world), dtype=np.int8)
    np.add.at(change, (np.searchsorted(pieces[:, 2], lo), reader), 1)
    np.add.at(change, (np.searchsorted(pieces[:, 2], hi), reader), -1)
    member = np.cumsum(change[:-1], axis=0, dtype=np.int8).astype(bool)
    some = np.flatnonzero(member.sum(1) > member[np.arange(len(pieces)), pieces[:, 0]])  # read by others
    pieces, member = pieces[some], member[some]
    chains = []
    for way in (-1, 1):
        ranks = (pieces[:, :1] + way * np.arange(1, world)) % world
        chains.append(_Chains(way, pieces, np.take_along_axis(member, ranks, axis=1)))

    def skipped(chain: _Chains) -> int:
        last = np.where(chain.reads.any(1), world - 1 - chain.reads[:, ::-1].argmax(1), 0)
        return int(((pieces[:, 3] - pieces[:, 2]) * (last - chain.length)).sum())

    return min(chains, key=skipped)


def _cut(k: Layout, points: np.ndarray) -> np.ndarray:
    """The runs of keys cut at addresses: pieces ``(origin, row, address, end)`` in ascending address."""
    start = _addresses(k)
    points = distinct(np.concatenate([points, start, start + k.runs[:, 2]]))
    order = np.argsort(start)
    run = order[np.searchsorted(start[order], points[:-1], side="right") - 1]
    return np.column_stack([k.runs[run, 0], k.row0[run] + points[:-1] - start[run], points[:-1], points[1:]])


# -- who needs what ----------------------------------------------------------------------------------------------------------
# The address of a key row is its position where layouts have stride 1, so that what a rank reads is few intervals whoever holds
# it; elsewhere the number of the row if all ranks' rows are counted through.


def _addresses(k: Layout) -> np.ndarray:
    """The address of each run's first row."""
    return k.runs[:, 1] if k.stride == 1 else (np.cumsum(k.counts) - k.counts)[k.runs[:, 0]] + k.row0


def _needs(mask: Mask, q: Layout, k: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each rank reads, its own rows included: disjoint intervals of addresses ``(reader, lo, hi)``, by reader and place."""
    if k.stride == 1:
        rank, start, count = q.runs.T
        q0, q1, k0, k1, lo, hi = mask.table.T
        at_slice, at_q = overlaps(q0, q1, start, start + count)
        i0, i1 = np.maximum(q0[at_slice], start[at_q]), np.minimum(q1[at_slice], (start + count)[at_q])
        i0, i1, j0, j1, low, high = trim(i0, i1, k0[at_slice], k1[at_slice], lo[at_slice], hi[at_slice])
        some = (i0 < i1) & (j0 < j1) & (low <= high)
        reader, lo, hi = rank[at_q][some], j0[some], j1[some]
    else:
        bands = visible(mask, q, k)
        base = (np.cumsum(k.counts) - k.counts)[bands[:, 1]]
        reader, lo, hi = bands[:, 0], base + bands[:, 4], base + bands[:, 5]
    reader, lo, hi, _ = union(reader, lo, hi, np.ones(len(reader), dtype=np.int64))
    return reader, lo, hi


@lru_cache(maxsize=64)
def rows_needed(mask: Mask, q: Layout, k: Layout) -> np.ndarray:
    """Key/value rows of others that each rank reads: int64 ``[world_size]``, what any exchange must bring at least."""
    reader, lo, hi = _needs(mask, q, k)
    start = _addresses(k)
    span = k.length + 1
    mine, theirs = overlaps(
        reader * span + lo, reader * span + hi, k.runs[:, 0] * span + start, k.runs[:, 0] * span + start + k.runs[:, 2]
    )
    own = np.minimum(hi[mine], (start + k.runs[:, 2])[theirs]) - np.maximum(lo[mine], start[theirs])
    return (np.bincount(reader, hi - lo, q.world_size) - np.bincount(reader[mine], own, q.world_size)).astype(np.int64)


def _relayed(mask: Mask, q: Layout, k: Layout, rank: int, transport: Transport) -> RankPlan:
    chains = _chains(mask, q, k, transport.everything)
    q_rows, k_rows = int(q.counts[rank]), int(k.counts[rank])
    # 1. what arrives at each step, in ascending address, and where in its memory
    piece, step, before, after = chains.seen_from(rank)
    origin, row, size = chains.pieces[piece, 0], chains.pieces[piece, 1], chains.pieces[piece, 3] - chains.pieces[piece, 2]
    order = np.argsort(step, kind="stable")
    step, before, after, origin, row, size = (x[order] for x in (step, before, after, origin, row, size))
    bounds = np.searchsorted(step, np.arange(1, chains.steps + 2))
    total = np.append(0, np.cumsum(size))
    start = total[:-1] - total[bounds[step - 1]]  # in the buffer of its step
    sizes = np.diff(total[bounds], prepend=0)
    groups = _groups(chains.steps, transport.grows)
    at, room, group_of = (
        np.zeros(chains.steps + 1, dtype=np.int64),
        [0] * (chains.steps + 1),
        np.zeros(chains.steps + 1, dtype=np.int64),
    )
    for n, (first, end) in enumerate(groups):
        at[first:end] = np.cumsum([0, *sizes[first : end - 1]])
        room[first], group_of[first:end] = int(sizes[first:end].sum()), n + 1
    # 2. the calls of each memory, in order
    places = np.column_stack([origin, row, row + size, start + at[step]])
    seen, part = _of_rank(mask, q, k, rank)
    bands, when, which = _arriving(seen, rank, np.column_stack([places, step]))
    calls = _calls(bands, group_of[when], part[which], len(groups) + 1, q_rows)
    holds = [places[group_of[step] == n + 1] for n in range(len(groups))]
    # 3. the steps
    mine, first_reader, last_reader = chains.sent_from(rank)
    own = chains.pieces[mine, 1]
    own_end, back = own + chains.pieces[mine, 3] - chains.pieces[mine, 2], chains.length[mine]
    steps = [Step(k_rows, calls=calls[0], holds=np.array([[rank, 0, k_rows, 0]]))]
    send = _messages(first_reader, own, own_end)
    ends = {end - 1 for _, end in groups}
    for t in range(1, chains.steps + 1):
        here = slice(bounds[t - 1], bounds[t])
        lo, hi = start[here], start[here] + size[here]
        goes_on, returns = after[here] >= 0, back == t
        steps.append(
            Step(
                int(sizes[t]),
                send=send,
                receive=_messages(before[here], lo, hi),
                at=int(at[t]),
                room=room[t],
                ends=t in ends,
                calls=calls[group_of[t]] if t in ends else (),
                holds=holds[group_of[t] - 1],
                relays=t < chains.steps,
                home_send=_messages(origin[here][~goes_on], lo[~goes_on], hi[~goes_on]),
                home_receive=_messages(last_reader[returns], own[returns], own_end[returns]),
            )
        )
        send = _messages(after[here][goes_on], lo[goes_on], hi[goes_on])
    return RankPlan(rank, q.world_size, q_rows, k_rows, tuple(steps))


def _arriving(bands: np.ndarray, rank: int, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bands of a rank's queries ``[n, 8]`` over rows of memory: when each can be computed, and which of `bands` it is of.

    Args:
        arrivals: ``(origin, lo, hi, start, step)``: rows of an origin, where in memory they start, and with which step they arrive;
            own rows are there at 0. A band over rows of several steps becomes several bands.
    """
    own, other = np.flatnonzero(bands[:, 1] == rank), np.flatnonzero(bands[:, 1] != rank)
    far, order = bands[other], np.lexsort((arrivals[:, 1], arrivals[:, 0]))
    origin, lo, hi, start, step = arrivals[order].T
    if not len(order):
        return bands[:, 2:], np.zeros(len(bands), dtype=np.int64), own
    follows = (
        (origin[1:] == origin[:-1]) & (lo[1:] == hi[:-1]) & (step[1:] == step[:-1]) & (start[1:] - start[:-1] == lo[1:] - lo[:-1])
    )
    first = np.flatnonzero(np.append(True, ~follows))
    origin, lo, start, step, hi = origin[first], lo[first], start[first], step[first], hi[np.append(first[1:], len(hi)) - 1]
    span = int(max(hi.max(), far[:, 5].max(initial=0))) + 1
    band, run = overlaps(far[:, 1] * span + far[:, 4], far[:, 1] * span + far[:, 5], origin * span + lo, origin * span + hi)
    _, _, i0, i1, j0, j1, low, high = far[band].T
    cut = trim(i0, i1, np.maximum(j0, lo[run]), np.minimum(j1, hi[run]), low, high)
    shift = start[run] - lo[run]
    moved = np.stack([cut[0], cut[1], cut[2] + shift, cut[3] + shift, cut[4] + shift, cut[5] + shift], axis=1)
    some = (moved[:, 0] < moved[:, 1]) & (moved[:, 2] < moved[:, 3])
    when = np.concatenate([np.zeros(len(own), dtype=np.int64), step[run][some]])
    return np.concatenate([bands[own, 2:], moved[some]]), when, np.concatenate([own, other[band[some]]])


def _groups(last: int, grows: bool) -> list[tuple[int, int]]:
    """Hops ``first .. end - 1`` whose rows are read at once: one by one, or 1, 2, 4, ... of them."""
    firsts = [1 << n for n in range(last.bit_length())] if grows else list(range(1, last + 1))
    return list(pairwise([*firsts, last + 1]))


@lru_cache(maxsize=1024)
def among(plan: RankPlan, inner: int, place: int) -> RankPlan:
    """The plan of a team, for the rank at `place` in it: ranks of the plan become ranks of the grid."""
    if inner == 1:
        return plan

    def renamed(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(replace(m, peer=m.peer * inner + place) for m in messages)

    def moved(step: Step) -> Step:
        send, receive, home = renamed(step.send), renamed(step.receive), renamed(step.home_send)
        return replace(step, send=send, receive=receive, home_send=home, home_receive=renamed(step.home_receive))

    steps = tuple(map(moved, plan.steps))
    return replace(plan, rank=plan.rank * inner + place, world_size=plan.world_size * inner, steps=steps)


def plans(mask: Mask, q: Layout, k: Layout, transport: str) -> Iterable[RankPlan]:
    """The plans of all ranks."""
    return [plan(mask, q, k, transport, rank) for rank in range(q.world_size)]
