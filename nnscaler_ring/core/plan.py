"""Mask x layout x transport -> plan: which rows travel when, which attention calls run then. No tensors, no processes.

A rank's walk has steps. In step 0 it reads its own key/value rows. Each later step has a *buffer* of rows that arrived from
peers, and the calls that read it; the rows of a step's messages are rows of the buffer of the step before (ring: they are passed
on) or of the own shard (everything else). Gradients of a buffer's rows go to whoever holds them next, or home if nobody does.

Transports are rows of a table:

============  ==========================================================================================================
``ring``      each row goes from neighbour to neighbour as far as somebody still reads it, in the direction that moves less;
              step `t` reads what started `t` ranks away
``grouped_ring``  as ``ring``, but calls wait until 1, 2, 4, ... hops have arrived: about log2(P) calls and merges, not P, for
              buffers that hold half of the sequence at the end
``full_ring``  as ``ring``, but every row goes all the way round, whoever reads it: the ring of other libraries, to compare with
``all_gather``  every row goes straight to each rank that reads it, and the calls run on own and received rows joined: the
              fewest calls and merges
``halo``      as ``all_gather``, but calls on own rows run while the others are on their way
``broadcast``  as ``all_gather``, but every row goes to every rank, so that a rank need not know what the others read
============  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
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
        blocks: ``[m, 3]`` ``(i0, i1, fresh)``: the spans' query rows with touching ones joined; `fresh` where no earlier call
            wrote them, so that the result is stored and not merged.
    """

    window: tuple[int, int]
    spans: np.ndarray
    blocks: np.ndarray

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
        return _relayed(mask, q, k, rank, TRANSPORTS[transport])
    return _direct(mask, q, k, rank, TRANSPORTS[transport])


@lru_cache(maxsize=256)
def choose(mask: Mask, q: Layout, k: Layout) -> str:
    """The transport that moves fewer rows over the whole world; ``ring`` where they move the same."""
    if q.world_size == 1:
        return "all_gather"
    return min(("ring", "halo"), key=lambda name: rows_sent(mask, q, k, name))


def rows_sent(mask: Mask, q: Layout, k: Layout, transport: str) -> int:
    """Key/value rows that all ranks send together in the forward pass, and as many rows of gradients in the backward pass."""
    how = TRANSPORTS[transport]
    if how.everything:
        return (k.world_size - 1) * k.length
    return _route(mask, q, k, False).moved if how.relay and q.world_size > 1 else int(rows_needed(mask, q, k).sum())


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
    q_rows, k_rows = int(q.counts[rank]), int(k.counts[rank])
    first, second = _calls([mine[~late][:, 2:], _in_buffer(mine[late], buffer)], q_rows)
    steps = [Step(k_rows, calls=first)]
    if q.world_size > 1:
        size = int((hi - lo).sum())
        steps.append(Step(size, send, receive, room=size, calls=second, home_send=receive, home_receive=send))
    return RankPlan(rank, q.world_size, q_rows, k_rows, tuple(steps))


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


def _calls(groups: Sequence[np.ndarray], q_rows: int) -> list[tuple[Calls, ...]]:
    """The calls for each group of ``[n, 6]`` bands, in the order in which they run: joined, grouped by window, fresh or not."""
    number = np.repeat(np.arange(len(groups)), [len(bands) for bands in groups])
    bands = np.concatenate(groups)
    if not len(bands):
        return [()] * len(groups)
    apart = 4 * (int(bands[:, :4].max()) + 1)  # rows between groups: so many that no band reaches over two
    bands = join(np.stack(trim(*_shifted(bands, number * apart).T), axis=1))
    number = bands[:, 0] // apart
    bands = _shifted(bands, -number * apart)
    window, seen = windows(bands), np.zeros(q_rows, dtype=bool)
    bounds = np.searchsorted(number, np.arange(len(groups) + 1)).tolist()
    return [_group(bands[lo:hi], window[lo:hi], seen) if lo < hi else () for lo, hi in pairwise(bounds)]


def _shifted(bands: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Bands with all rows moved along the diagonal."""
    return np.column_stack([bands[:, :4] + by[:, None], bands[:, 4:]])


def _group(bands: np.ndarray, window: np.ndarray, seen: np.ndarray) -> tuple[Calls, ...]:
    """The calls for joined bands of one moment; `seen` rows are updated."""
    if len(bands) == 1:
        return (_call(window[0], bands[:, :4], seen),)
    keys, at = np.unique(np.column_stack([_turns(bands), window]), axis=0, return_inverse=True)
    return tuple(_call(key[1:], bands[at.ravel() == n, :4], seen) for n, key in enumerate(keys))


def _call(window: np.ndarray, spans: np.ndarray, seen: np.ndarray) -> Calls:
    rows = coalesce(spans[:, :2])
    fresh = []
    for lo, hi in rows.tolist():
        fresh.append(not seen[lo:hi].any())
        seen[lo:hi] = True
    left, right = window.tolist()
    return Calls((left, right), spans, np.column_stack([rows, fresh]))


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
    """The way of all rows round the ring: pieces ``(origin, lo, hi, hops)``, by origin, and the direction, +1 to higher ranks."""

    direction: int
    pieces: np.ndarray

    @property
    def moved(self) -> int:
        return int(((self.pieces[:, 2] - self.pieces[:, 1]) * self.pieces[:, 3]).sum())

    def held(self, origin: int, hops: int) -> np.ndarray:
        """Rows of `origin` that still go on after ``hops - 1`` hops: what the rank `hops` away gets."""
        first, end = np.searchsorted(self.pieces[:, 0], [origin, origin + 1])
        rows = self.pieces[first:end]
        return coalesce(rows[rows[:, 3] >= hops, 1:3])


@lru_cache(maxsize=64)
def _route(mask: Mask, q: Layout, k: Layout, everything: bool) -> _Route:
    """The direction that moves fewer rows, and how far each row goes in it: all round if `everything`."""
    if everything:
        rank, _, count = k.runs.T
        return _Route(1, np.column_stack([rank, k.row0, k.row0 + count, np.full_like(rank, k.world_size - 1)]))
    reader, lo, hi = _needs(mask, q, k)
    pieces = _cut(k, np.concatenate([lo, hi]))
    return min((_Route(way, _hops(reader, lo, hi, pieces, way, q.world_size)) for way in (-1, 1)), key=lambda route: route.moved)


def _cut(k: Layout, points: np.ndarray) -> np.ndarray:
    """The runs of keys cut at addresses: pieces ``(origin, row, address, end)`` in ascending address."""
    start = _addresses(k)
    points = distinct(np.concatenate([points, start, start + k.runs[:, 2]]))
    order = np.argsort(start)
    run = order[np.searchsorted(start[order], points[:-1], side="right") - 1]
    return np.column_stack([k.runs[run, 0], k.row0[run] + points[:-1] - start[run], points[:-1], points[1:]])


def _hops(reader: np.ndarray, lo: np.ndarray, hi: np.ndarray, pieces: np.ndarray, way: int, world: int) -> np.ndarray:
    """How far each piece goes: to its last reader, which is the first one that the opposite way round comes to.

    Returns ``(origin, lo, hi, hops)`` in rows, of the pieces that leave their rank.
    """
    origin, address = pieces[:, 0], pieces[:, 2]
    span = int(pieces[:, 3].max(initial=0)) + 1
    starts, ends = reader * span + lo, np.append(-1, reader * span + hi)

    def reads(rank: np.ndarray, address: np.ndarray) -> np.ndarray:
        at = rank * span + address
        return ends[np.searchsorted(starts, at, side="right")] > at

    readers = np.searchsorted(np.sort(lo), address, side="right") - np.searchsorted(np.sort(hi), address, side="right")
    hops, left = np.zeros(len(pieces), dtype=np.int64), np.flatnonzero(readers > reads(origin, address))
    for distance in range(world - 1, 0, -1):
        if not len(left):
            break
        found = reads((origin[left] + way * distance) % world, address[left])
        hops[left[found]] = distance
        left = left[~found]
    origin, row, address, end = pieces[hops > 0].T
    table = np.column_stack([origin, row, row + end - address, hops[hops > 0]])
    return table[np.lexsort((table[:, 1], table[:, 0]))]


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
    world, route = q.world_size, _route(mask, q, k, transport.everything)
    last = int(route.pieces[:, 3].max()) if len(route.pieces) else 0
    q_rows, k_rows = int(q.counts[rank]), int(k.counts[rank])
    # 1. what arrives with each hop, and where in its memory it starts
    origins = (rank - route.direction * np.arange(last + 1)) % world
    held = [np.array([[0, k_rows]]), *(route.held(origins[hops], hops) for hops in range(1, last + 1))]
    sizes, groups = [_size(rows) for rows in held], _groups(last, transport.grows)
    at, room, group_of = np.zeros(last + 1, dtype=np.int64), [0] * (last + 1), np.zeros(last + 1, dtype=np.int64)
    for n, (first, end) in enumerate(groups):
        at[first:end] = np.cumsum([0, *sizes[first : end - 1]])
        room[first], group_of[first:end] = sum(sizes[first:end]), n + 1
    # 2. the calls of each memory, in order
    mine = visible(mask, q, k, reader=rank)
    hops = (rank - mine[:, 1]) * route.direction % world
    far, order = hops > 0, np.argsort(group_of[hops], kind="stable")
    bands = mine[:, 2:].copy()
    bands[far] = _in_buffer(mine[far], _places(origins[1:], held[1:], at[1:]))
    cuts = np.searchsorted(group_of[hops][order], np.arange(1, len(groups) + 1))
    calls = _calls(np.split(bands[order], cuts), q_rows)
    # 3. the steps
    steps = [Step(k_rows, calls=calls[0])]
    stays = [route.held(rank, hop) for hop in range(1, last + 2)]
    ends, sent = {end - 1 for _, end in groups}, _one((rank + route.direction) % world, stays[0])
    for hop in range(1, last + 1):
        onward = _within(route.held(origins[hop], hop + 1), held[hop])
        steps.append(
            Step(
                sizes[hop],
                send=sent,
                receive=_one((rank - route.direction) % world, np.array([[0, sizes[hop]]])),
                at=int(at[hop]),
                room=room[hop],
                ends=hop in ends,
                calls=calls[group_of[hop]] if hop in ends else (),
                relays=hop < last,
                home_send=_one(int(origins[hop]), _minus(np.array([[0, sizes[hop]]]), onward)),
                home_receive=_one((rank + route.direction * hop) % world, _minus(stays[hop - 1], stays[hop])),
            )
        )
        sent = _one((rank + route.direction) % world, onward)
    return RankPlan(rank, world, q_rows, k_rows, tuple(steps))


def _places(origins: np.ndarray, held: Sequence[np.ndarray], at: np.ndarray) -> np.ndarray:
    """Where the rows held of each origin lie in the memory, end to end from `at`: a buffer ``(origin, lo, hi, start)``."""
    if not held:
        return np.empty((0, 4), dtype=np.int64)
    rows, number = np.concatenate(held), np.repeat(np.arange(len(held)), [len(each) for each in held])
    ends = np.cumsum(rows[:, 1] - rows[:, 0])
    before = np.append(0, ends)[np.searchsorted(number, np.arange(len(held)))]
    return np.column_stack([origins[number], rows, at[number] + ends - (rows[:, 1] - rows[:, 0]) - before[number]])


def _groups(last: int, grows: bool) -> list[tuple[int, int]]:
    """Hops ``first .. end - 1`` whose rows are read at once: one by one, or 1, 2, 4, ... of them."""
    firsts = [1 << n for n in range(last.bit_length())] if grows else list(range(1, last + 1))
    return list(pairwise([*firsts, last + 1]))


def _size(rows: np.ndarray) -> int:
    return int((rows[:, 1] - rows[:, 0]).sum())


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
