"""Mask x layout x transport -> plan: which rows travel when, which attention calls run then. No tensors, no processes.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from types import MappingProxyType

import numpy as np

from .chains import Chains, chains_of, rows_needed
from .geometry import join, trim, visible, windows
from .intervals import coalesce, overlaps, turns, union
from .layout import PACKINGS, Layout
from .mask import Mask
from .steps import Calls, Message, RankPlan, Step


@dataclass(frozen=True)
class Route:
    """How rows travel: neighbour to neighbour or straight, own and received rows in one buffer or not, all rows or those read.

    With `grows`, what 1, 2, 4, ... hops bring is read at once.
    """

    relay: bool = False
    grows: bool = False
    joined: bool = False
    everything: bool = False


TRANSPORTS: Mapping[str, Route] = MappingProxyType(
    {
        "ring": Route(relay=True),
        "grouped_ring": Route(relay=True, grows=True),
        "full_ring": Route(relay=True, everything=True),
        "all_gather": Route(joined=True),
        "halo": Route(),
        "broadcast": Route(joined=True, everything=True),
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


@lru_cache(maxsize=2 * PACKINGS)
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


@lru_cache(maxsize=PACKINGS)
def choose(mask: Mask, q: Layout, k: Layout) -> str:
    """``halo``, in one step, while no rank sends or receives more than a shard so; beyond that ``ring``.

    Both move the same rows, but straight from their owner some ranks send the same row to many others.
    """
    if q.world_size == 1:
        return "all_gather"
    busiest = max(rows_given(mask, q, k).max(), rows_needed(mask, q, k).max())
    return "halo" if busiest <= k.counts.max() else "ring"


@lru_cache(maxsize=PACKINGS)
def rows_given(mask: Mask, q: Layout, k: Layout) -> np.ndarray:
    """Rows that each rank sends where its rows go straight to all their readers: int64 ``[world_size]``."""
    chains = chains_of(mask, q, k, False)
    sizes = chains.pieces[:, 3] - chains.pieces[:, 2]
    return np.bincount(chains.pieces[:, 0], sizes * chains.length, k.world_size).astype(np.int64)


def rows_sent(mask: Mask, q: Layout, k: Layout, transport: str) -> int:
    """Key/value rows that all ranks send together in the forward pass, and as many rows of gradients in the backward pass."""
    how = TRANSPORTS[transport]
    if how.everything:
        return (k.world_size - 1) * k.length
    return int(rows_needed(mask, q, k).sum())


def rows_once(mask: Mask, q: Layout, k: Layout, transport: str) -> int:
    """Of `rows_sent`, those of messages whose gradients one call gives, see `Message.once`."""
    how = TRANSPORTS[transport]
    if how.relay:
        return 0
    if how.everything:
        return rows_sent(mask, q, k, transport) if _apart(mask, q) else 0
    once = 0
    for reader in range(k.world_size):
        rows = visible(mask, q, k, reader=reader)[:, [1, 4, 5]]
        origin, lo, hi = union(*rows[rows[:, 0] != reader].T)
        once += int((hi - lo)[~np.isin(origin, list(_twice(*rows.T)))].sum())
    return once


# -- straight to the reader: all_gather, halo ---------------------------------------------------------------------------------


def _direct(mask: Mask, q: Layout, k: Layout, rank: int, route: Route) -> RankPlan:
    mine, part = _of_rank(mask, q, k, rank)
    reads = _reads(mine[:, [0, 1, 4, 5]], k, route.everything)
    remote = bool((reads[:, 1] != rank).any())
    joined = route.joined and remote
    late = (mine[:, 1] != rank) | joined
    buffer = _buffer(reads if joined else reads[reads[:, 1] != rank], k)
    origin, lo, hi, start = buffer.T
    end, others = start + hi - lo, origin != rank
    seen = visible(mask, q, k, origin=rank)[:, [0, 1, 4, 5]]
    wanted = _reads(seen, k, route.everything)
    wanted = wanted[(wanted[:, 1] == rank) & (wanted[:, 0] != rank)]
    runs = k.row0[k.runs[:, 0] == rank]
    readers = np.unique(wanted[:, 0])
    breaks = np.repeat(readers, len(runs)), np.tile(runs, len(readers))
    send = _in_parts(*union(wanted[:, 0], wanted[:, 2], wanted[:, 3], breaks))
    receive = _in_parts(origin[others], start[others], end[others])
    readers_read_twice, read_twice = _twice(*seen[:, [0, 2, 3]].T), _twice(*mine[late][:, [1, 4, 5]].T)
    known = not route.everything or _apart(mask, q)
    if known:
        send, receive = _marked(send, readers_read_twice), _marked(receive, read_twice)
    own = _end_to_end(np.column_stack([lo, hi, start, end])[~others])
    q_rows, k_rows = int(q.counts[rank]), int(k.counts[rank])
    bands = mine[:, 2:].copy()
    bands[late] = _in_buffer(mine[late], buffer)
    first, second = _calls(bands, late.astype(np.int64), part, 2, q_rows)
    steps = [Step(k_rows, calls=first, holds=np.array([[rank, 0, k_rows, 0]]))]
    if q.world_size > 1:
        size, once = int((hi - lo).sum()), known and not read_twice
        moves = Step(size, send, receive, own, room=size, home_send=receive, home_receive=send)
        steps.append(replace(moves, calls=second, once=once, holds=buffer))
    keeps = q.world_size > 1 and not route.joined and choose(mask, q, k) == "halo"
    return RankPlan(rank, q.world_size, q_rows, k_rows, tuple(steps), keeps)


def _of_rank(mask: Mask, q: Layout, k: Layout, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The bands of a rank's queries, and the part of each."""
    bands = [visible(mask, q, k, reader=rank, part=part) for part in range(mask.num_parts)]
    return np.concatenate(bands), np.repeat(np.arange(mask.num_parts), [len(each) for each in bands])


def _apart(mask: Mask, q: Layout) -> bool:
    """Whether no rank reads a row twice, as far as any rank can tell that knows only the slices of its own queries, as llama3's do:
    slices of other keys each, as documents are, and one run of queries a rank."""
    keys, ranks = mask.table[:, 2:4], q.runs[:, 0]
    return len(np.unique(ranks)) == len(ranks) and not _twice(np.zeros_like(keys[:, 0]), *keys.T)


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
    buffer = np.column_stack(union(reads[:, 1], reads[:, 2], reads[:, 3], (k.runs[:, 0], k.row0)))
    if k.ascends:
        buffer = buffer[np.argsort(_position(k, buffer[:, 0], buffer[:, 1]), kind="stable")]
    sizes = buffer[:, 2] - buffer[:, 1]
    return np.column_stack([buffer, np.cumsum(sizes) - sizes])


def _end_to_end(own: np.ndarray) -> np.ndarray:
    """Rows ``(lo, hi, start, end)`` with neighbours in both places made one."""
    if not len(own):
        return own
    first = np.flatnonzero(np.append(True, (own[1:, 0] != own[:-1, 1]) | (own[1:, 2] != own[:-1, 3])))
    last = np.append(first[1:], len(own)) - 1
    return np.column_stack([own[first, 0], own[last, 1], own[first, 2], own[last, 3]])


def _position(k: Layout, rank: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Position of each local row."""
    run = np.searchsorted(k.number0, k.rank0[rank] + row, side="right") - 1
    return k.runs[run, 1] + k.stride * (row - k.row0[run])


def _messages(peer: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[Message, ...]:
    """One message a peer with all its rows, in ascending order."""
    peer, lo, hi = union(peer, lo, hi)
    rows = np.column_stack([lo, hi])
    return tuple(Message(p, rows[peer == p]) for p in np.unique(peer).tolist())


def _in_parts(peer: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[Message, ...]:
    """`_messages`, each in parts that are one interval with sender and receiver where these are few (`PARTS`) and long (`LONG`)."""
    sizes = {p: tuple((hi - lo)[peer == p].tolist()) for p in np.unique(peer).tolist()}
    return tuple(
        replace(m, parts=sizes[m.peer]) if 1 < len(sizes[m.peer]) <= PARTS and min(sizes[m.peer]) >= LONG else m
        for m in _messages(peer, lo, hi)
    )


def _marked(messages: Sequence[Message], twice: set[int]) -> tuple[Message, ...]:
    """The messages, those of peers of which no row is read twice as such that one call reads."""
    return tuple(replace(m, once=m.peer not in twice) for m in messages)


def _twice(peer: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> set[int]:
    """The peers among whose rows ``lo:hi`` some are there twice, so that two calls may read them."""
    order = np.lexsort((lo, peer))
    peer, lo, hi = peer[order], lo[order], hi[order]
    return set(np.unique(peer[1:][(peer[1:] == peer[:-1]) & (lo[1:] < hi[:-1])]).tolist())


PARTS, LONG = 4, 32
"""The most parts of a message, and the fewest rows of each, with which they are sent by themselves."""


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
    apart = 4 * (int(bands[:, :4].max()) + 1)  # moved apart by so many rows, bands of different memories or parts never join
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
    keys, at = np.unique(np.column_stack([turns(bands), window]), axis=0, return_inverse=True)
    return tuple(_call(key[1:], bands[at.ravel() == n, :4], seen, part) for n, key in enumerate(keys))


def _call(window: np.ndarray, spans: np.ndarray, seen: np.ndarray, part: int) -> Calls:
    rows = coalesce(spans[:, :2])
    fresh = []
    for lo, hi in rows.tolist():
        fresh.append(not seen[lo:hi].any())
        seen[lo:hi] = True
    left, right = window.tolist()
    return Calls((left, right), spans, np.column_stack([rows, fresh]), part)


# -- neighbour to neighbour: ring --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Arrivals:
    """Pieces of rows that come to a rank round the ring, ordered by step and address: arrays with an entry a piece.

    Attributes:
        step: with which it comes, from 1 on.
        before, after: from which rank, and to which it goes on; -1 for none.
        origin, row, size: whose it is, its first row there, and rows.
        start: where it lies in the buffer of its step.
        bounds: the pieces of step `t` are ``bounds[t - 1]:bounds[t]``.
    """

    step: np.ndarray
    before: np.ndarray
    after: np.ndarray
    origin: np.ndarray
    row: np.ndarray
    size: np.ndarray
    start: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, chains: Chains, rank: int) -> _Arrivals:
        piece, step, before, after = chains.seen_from(rank)
        order = np.argsort(step, kind="stable")
        piece, step, before, after = (x[order] for x in (piece, step, before, after))
        origin, row, lo, hi = chains.pieces[piece].T
        bounds = np.searchsorted(step, np.arange(1, chains.steps + 2))
        first = np.cumsum(hi - lo) - (hi - lo)
        start = first - first[bounds[step - 1]] if len(step) else first
        return cls(step, before, after, origin, row, hi - lo, start, bounds)

    def sizes(self) -> np.ndarray:
        """Rows of each step's buffer; step 0 has none."""
        return np.bincount(self.step, self.size, len(self.bounds)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Memories:
    """In which memory the buffer of each step lies, and where: lists with an entry a step.

    Attributes:
        number: of the memory; 0 is the own shard.
        at: where the buffer starts in it.
        room: rows of the memory with its first step, else 0.
        ends: the memory is full with this step.
    """

    number: list[int]
    at: list[int]
    room: list[int]
    ends: list[bool]

    @classmethod
    def of(cls, sizes: Sequence[int], grows: bool) -> _Memories:
        made = cls([0], [0], [0], [True])
        for n, (first, end) in enumerate(_groups(len(sizes) - 1, grows)):
            whole, before = sum(sizes[first:end]), 0
            for t in range(first, end):
                made.number.append(n + 1)
                made.at.append(before)
                made.room.append(whole if t == first else 0)
                made.ends.append(t == end - 1)
                before += sizes[t]
        return made


def _relayed(mask: Mask, q: Layout, k: Layout, rank: int, route: Route) -> RankPlan:
    chains = chains_of(mask, q, k, route.everything)
    came = _Arrivals.of(chains, rank)
    sizes = came.sizes().tolist()
    memory = _Memories.of(sizes, route.grows)
    number = np.array(memory.number)[came.step]
    # the calls of each memory, in order
    places = np.column_stack([came.origin, came.row, came.row + came.size, came.start + np.array(memory.at)[came.step]])
    seen, part = _of_rank(mask, q, k, rank)
    bands, when, which = _arriving(seen, rank, np.column_stack([places, came.step]))
    calls = _calls(bands, np.array(memory.number)[when], part[which], memory.number[-1] + 1, int(q.counts[rank]))
    # the steps
    mine, first_reader, last_reader = chains.sent_from(rank)
    own, back = chains.pieces[mine, 1], chains.length[mine]
    own_end = own + chains.pieces[mine, 3] - chains.pieces[mine, 2]
    k_rows = int(k.counts[rank])
    steps = [Step(k_rows, calls=calls[0], holds=np.array([[rank, 0, k_rows, 0]]))]
    send = _messages(first_reader, own, own_end)
    for t in range(1, chains.steps + 1):
        here, returns = slice(came.bounds[t - 1], came.bounds[t]), back == t
        lo, hi = came.start[here], came.start[here] + came.size[here]
        goes_on = came.after[here] >= 0
        steps.append(
            Step(
                sizes[t],
                send=send,
                receive=_messages(came.before[here], lo, hi),
                at=memory.at[t],
                room=memory.room[t],
                ends=memory.ends[t],
                calls=calls[memory.number[t]] if memory.ends[t] else (),
                holds=places[slice(*np.searchsorted(number, (memory.number[t], memory.number[t] + 1)))],
                home_send=_messages(came.origin[here][~goes_on], lo[~goes_on], hi[~goes_on]),
                home_receive=_messages(last_reader[returns], own[returns], own_end[returns]),
            )
        )
        send = _messages(came.after[here][goes_on], lo[goes_on], hi[goes_on])
    return RankPlan(rank, q.world_size, int(q.counts[rank]), k_rows, tuple(steps))


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


def plans(mask: Mask, q: Layout, k: Layout, transport: str) -> list[RankPlan]:
    """The plans of all ranks."""
    return [plan(mask, q, k, transport, rank) for rank in range(q.world_size)]
