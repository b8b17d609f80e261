"""What a plan takes on a machine, on paper: bytes, balance, calls, and a timeline of compute and network.

The model has two lanes a rank, which a stream orders as the engine does: the exchange of step ``t + 1`` starts when the calls of
step `t` do, gradients leave when they end. Calls take the tiles that a kernel computes at the kernel's speed on large blocks, and a
launch each; what is merged and added up takes the memory's bandwidth. Peers are taken to be as far as the rank itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from .chains import rows_needed
from .cost import TILE, step_tiles, tiles
from .intervals import overlaps
from .layout import PACKINGS, Layout
from .mask import Mask, ramp
from .plan import ALL_TO_ALL, choose, plan, rows_given, rows_once, rows_sent
from .steps import Message, RankPlan, Step
from .teams import Share, deal, teams


@dataclass(frozen=True)
class Network:
    """What one rank can send, and receive at the same time: `bandwidth` in bytes/s, `latency` in s a message."""

    name: str
    bandwidth: float
    latency: float


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "nvlink": Network("NVLink 4, 450 GB/s", 450e9, 4e-6),
        "400g": Network("400 Gb/s", 50e9, 10e-6),
        "100g": Network("100 Gb/s", 12.5e9, 15e-6),
        "gloo": Network("processes of one machine, 2 GB/s", 2e9, 5e-5),
    }
)
"""Networks that have a name."""


@dataclass(frozen=True)
class Speed:
    """A kernel on a device: FLOP/s of forward and backward calls on large blocks, s a launch, bytes/s of its memory, how many
    results or gradients of a row are put together at once, and whether it `rounds` gradients to the dtype of keys and values."""

    name: str
    forward: float
    backward: float
    launch: float = 6e-6
    memory: float = 3.0e12
    at_once: int = 4
    rounds: bool = True


SPEEDS: Mapping[str, Speed] = MappingProxyType(
    {
        "fa2-h100": Speed("FlashAttention-2, H100", 366e12, 330e12),
        "cudnn-h200": Speed("cuDNN, H200", 655e12, 526e12, memory=4.0e12),
        "fa4-h200": Speed("FlashAttention-4, H200", 675e12, 629e12, memory=4.0e12),
        "cpu-core": Speed("torch on one CPU core", 50e9, 45e9, 2e-5, 1e10, at_once=1, rounds=False),
    }
)
"""Kernels that have a name, with what they reach on 8k tokens, head dim 128, bf16, causal."""


NEAR = 8
"""Ranks that are taken to be on one node."""

PLANNED = 64
"""Ranks, or teams of them, that `report` plans every one of."""

FEW = 16
"""Slices of a mask for which `row_transport` compares plans."""


def machine_of(device: str, world_size: int) -> tuple[Speed, Network]:
    """What ranks on a kind of device are taken to be where nobody says: one node of GPUs up to `NEAR` ranks, 400 Gb/s beyond."""
    if device == "cpu":
        return SPEEDS["cpu-core"], NETWORKS["gloo"]
    return SPEEDS["fa2-h100"], NETWORKS["nvlink" if world_size <= NEAR else "400g"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer: heads, head dims, and bytes of an element of q, k and v, of a sum of gradients that travels, and of a gradient that
    one call gives: as many as one of q where not said, or as of a sum if that has less."""

    heads: int = 32
    heads_k: int = 8
    dim: int = 128
    dim_v: int = 128
    element: int = 2
    gradient: int = 4
    once: int | None = None
    batch: int = 1

    @property
    def row(self) -> int:
        """Bytes of one token's keys and values."""
        return self.batch * self.heads_k * (self.dim + self.dim_v) * self.element

    @property
    def gradient_row(self) -> int:
        """Bytes of one token's dK and dV where they are sums."""
        return self.batch * self.heads_k * (self.dim + self.dim_v) * self.gradient

    def once_row(self, speed: Speed) -> int:
        """Bytes of one token's dK and dV that are what one call gives."""
        once = min(self.element, self.gradient) if self.once is None else self.once
        return self.gradient_row // self.gradient * once if speed.rounds else self.gradient_row

    def flops(self, backward: bool = False) -> int:
        """FLOPs of one (query, key) pair in all heads: two products forward; five backward, the scores again among them."""
        per_head = 2 * (3 * self.dim + 2 * self.dim_v) if backward else 2 * (self.dim + self.dim_v)
        return self.batch * self.heads * per_head


@dataclass(frozen=True)
class Bar:
    """Something that takes from `start` to `end`, in s."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One rank's pass: what its kernel and its network do when."""

    compute: tuple[Bar, ...]
    network: tuple[Bar, ...]

    @property
    def total(self) -> float:
        """Seconds until both are done."""
        return max(bar.end for bar in (*self.compute, *self.network))


def timeline(
    walk: RankPlan, shape: Shape, speed: Speed, network: Network, backward: bool = False, around: tuple[int, int] = (0, 0)
) -> Timeline:
    """The forward or backward pass of one rank; `around` are bytes that it exchanges for heads before the walk and after it.

    Of a plan that keeps what came, the backward pass begins with that; where heads travel nothing of it is kept.
    """
    compute, wire = list[Bar](), list[Bar]()

    def send(label: str, size: int, messages: int, after: float) -> float:
        start = max(after, wire[-1].end if wire else 0.0)
        if size:
            wire.append(Bar(label, start, start + size / network.bandwidth + messages * network.latency))
        return wire[-1].end if size else start

    arrived = done = send("tokens to heads", around[0], 1, 0.0)
    again = backward and walk.keeps and not any(around)
    for t, step in list(enumerate(walk.steps))[:: -1 if again else 1]:
        start = max(done, arrived)
        if t + 1 < len(walk.steps) and not again:
            following = walk.steps[t + 1]
            arrived = send(f"rows of step {t + 1}", _rows(following) * shape.row, len(following.receive), start)
        flops = step_tiles(step) * TILE * TILE * shape.flops(backward)
        calls = flops / (speed.backward if backward else speed.forward) + speed.launch * len(step.calls)
        done = start + calls + step_bytes(walk, t, shape, speed, backward) / speed.memory
        compute.append(Bar(f"step {t}", start, done))
        if backward and t:
            busier = max(_gradient_bytes(side, shape, speed) for side in walk.gradients(t))
            send(f"gradients of step {t}", busier, 1, done)
    send("heads to tokens", around[1], 1, done)
    return Timeline(tuple(compute), tuple(wire))


def _rows(step: Step) -> int:
    """Rows on the wire in one step, the busier way."""
    return max(sum(m.size for m in side) for side in (step.send, step.receive))


def _gradient_bytes(messages: Sequence[Message], shape: Shape, speed: Speed) -> int:
    return sum(m.size * (shape.once_row(speed) if m.once else shape.gradient_row) for m in messages)


def step_bytes(walk: RankPlan, t: int, shape: Shape, speed: Speed, backward: bool) -> float:
    """What a step reads and writes besides its calls: results merged, or gradients added up, `at_once` of a row in one pass.

    Each part counts with its own bytes and its share of reading and writing the sum in fp32. Gradients of rows that came from
    others are made fp32 to travel, with what has arrived for them, unless one call gives them all. Copies into and out of messages
    are left out.
    """
    step, total = walk.steps[t], 8 / speed.at_once
    merged = sum(int((b[:, 1] - b[:, 0])[b[:, 2] == 0].sum()) for b in (calls.blocks for calls in step.calls))
    moved = merged * shape.batch * shape.heads * (shape.dim if backward else shape.dim_v) * (shape.element + total)
    if backward and t:
        home, own = sum(m.size for m in step.home_receive), int((step.own[:, 1] - step.own[:, 0]).sum())
        width = shape.batch * shape.heads_k * (shape.dim + shape.dim_v)
        given = speed.rounds and step.once
        moved += 0 if given else step.size * (shape.row + 4 * width)
        moved += _gradient_bytes(walk.gradients(t)[1], shape, speed) + home * total * width
        moved += own * ((shape.row if given else 4 * width) + total * width)
    return moved


# -- a whole world ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def rank_pairs(mask: Mask, q: Layout) -> np.ndarray:
    """Visible pairs that each rank computes: int64 ``[world_size]``, whoever holds the keys."""
    rank, start, count = q.runs.T
    q0, q1, k0, k1, lo, hi = mask.table.T
    at, run = overlaps(q0, q1, start, start + q.stride * (count - 1) + 1)
    i0 = np.maximum(0, -((start[run] - q0[at]) // q.stride))
    i1 = np.maximum(i0, np.minimum(count[run], (q1[at] - 1 - start[run]) // q.stride + 1))

    def at_most(limit: np.ndarray) -> np.ndarray:
        """Keys up to `limit` after each query: a ramp from the first key of the slice on, level from the last."""
        limit = np.clip(limit, k0[at] - q.length, k1[at])
        last = start[run] + limit + 1
        return ramp(i0, i1, last - k0[at], q.stride) - ramp(i0, i1, last - k1[at], q.stride)

    seen = at_most(hi[at]) - at_most(lo[at] - 1)
    return np.bincount(rank[run], seen, q.world_size).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A configuration in figures. Bytes are of the forward pass over all ranks unless said otherwise; seconds are modelled.

    Attributes:
        transport, transport_backward: of the two passes, which ``auto`` chooses each by itself.
        balance: most pairs of a rank over the mean.
        tile_balance: the same in the tiles that a kernel computes; None where not all ranks are planned.
        inner: ranks of a team that share heads.
        needed: bytes of the rows that ranks read of others: the least that an exchange of keys and values alone sends; None where
            heads travel.
        sent: bytes sent.
        sent_backward: bytes of the backward pass: keys and values again, and gradients.
        calls, merges: of the busiest rank looked at, forward.
        forward, backward: seconds of the slowest rank looked at, in each pass.
        slowest: the team looked at (the rank, where ranks share no heads) that both passes together take longest.
        efficiency: of both passes: a rank's share of the visible pairs at the kernel's speed, without launches or half-empty
            tiles, over the slowest rank's time.
    """

    world_size: int
    transport: str
    transport_backward: str
    inner: int
    balance: float
    tile_balance: float | None
    needed: int | None
    sent: int
    sent_backward: int
    calls: int
    merges: int
    forward: float
    backward: float
    slowest: int
    efficiency: float


def report(
    mask: Mask, held: Layout, transport: str, shape: Shape, speed: Speed, network: Network, *, inner: int = 1, most: int = PLANNED
) -> Report:
    """Count and model a configuration.

    Args:
        mask: who sees whom.
        held: which rank holds which tokens.
        transport: a name in `plan.TRANSPORTS`, ``auto`` for what `row_transport` says, ``all_to_all`` for heads over all ranks.
        shape: the layer.
        speed, network: as in `SPEEDS` and `NETWORKS`.
        inner: ranks of a team that share heads, in a grid.
        most: in a larger world only the ranks with the most pairs and rows, the first, the middle and the last are planned.

    Example:
        >>> from nnscaler_ring.core import layout, mask
        >>> held, causal = layout.zigzag(1 << 16, 8), mask.build(1 << 16, causal=True)
        >>> made = report(causal, held, "ring", Shape(), SPEEDS["fa2-h100"], NETWORKS["nvlink"])
        >>> made.balance, made.calls, made.sent / made.needed, made.efficiency > 0.9
        (1.0, 8, 1.0, True)

    Raises:
        ValueError: the ranks do not divide into teams.
    """
    world = held.world_size
    inner = world if transport == ALL_TO_ALL else inner
    if world % inner:
        raise ValueError(f"{world} ranks do not divide into teams of {inner}")
    outer = teams(held, inner)
    shares = deal(shape.heads, shape.heads_k, inner)
    busiest, around = of_busiest(shape, shares), most_head_bytes(shape, shares, held)
    ways = (transport, transport)
    if transport == "auto" or outer.world_size == 1:
        way, way_back = (row_transport(mask, (outer, outer), busiest, (speed, network), backward) for backward in (False, True))
        ways = way, way_back
    pairs, needed = rank_pairs(mask, outer), rows_needed(mask, outer, outer)
    looked_at = list(range(outer.world_size))
    if outer.world_size > most:
        looked_at = sorted({0, outer.world_size // 2, outer.world_size - 1, int(pairs.argmax()), int(needed.argmax())})
    planned = [[plan(mask, outer, outer, way, rank) for rank in looked_at] for way in ways]
    plans = planned[0]
    before, after = head_bytes(shape, shares, held)
    seconds = np.array([[timeline(p, busiest, speed, network, bool(n), around[n]).total for p in planned[n]] for n in range(2)])
    lines = seconds.max(axis=1).tolist()
    heads = sum(s.k[1] - s.k[0] for s in shares)
    rows, rows_back = (rows_sent(mask, outer, outer, way) * heads // shape.heads_k for way in ways)
    once = rows_once(mask, outer, outer, ways[1]) * heads // shape.heads_k
    gradients = once * shape.once_row(speed) + (rows_back - once) * shape.gradient_row
    again = 0 if planned[1][0].keeps and inner == 1 else rows_back * shape.row
    worked = [tiles(p) for p in plans]
    spread = busiest.heads * inner / shape.heads
    alone = pairs.sum() / world * (shape.flops() / speed.forward + shape.flops(True) / speed.backward)
    return Report(
        world_size=world,
        transport=ways[0],
        transport_backward=ways[1],
        inner=inner,
        balance=float(pairs.max() / max(pairs.mean(), 1e-9)) * spread,
        tile_balance=max(worked) * len(worked) / max(sum(worked), 1) * spread if len(plans) == outer.world_size else None,
        needed=int(needed.sum()) * shape.row if inner == 1 else None,
        sent=rows * shape.row + int(before[0].sum() + after[0].sum()),
        sent_backward=again + gradients + int(before[1].sum() + after[1].sum()),
        calls=max(p.num_calls for p in plans),
        merges=max(p.num_merges for p in plans),
        forward=lines[0],
        backward=lines[1],
        slowest=looked_at[int(seconds.sum(axis=0).argmax())],
        efficiency=float(alone) / sum(lines) if pairs.sum() else 1.0,
    )


def of_busiest(shape: Shape, shares: Sequence[Share]) -> Shape:
    """What the rank with most heads computes with."""
    return replace(shape, heads=max(s.q[1] - s.q[0] for s in shares), heads_k=max(len(s.repeats) for s in shares))


def most_head_bytes(shape: Shape, shares: Sequence[Share], held: Layout) -> list[tuple[int, int]]:
    """The most of `head_bytes` that a rank sends before and after the walk, of the forward and of the backward pass."""
    return [(int(before.max()), int(after.max())) for before, after in zip(*head_bytes(shape, shares, held), strict=True)]


def head_bytes(shape: Shape, shares: Sequence[Share], held: Layout) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Bytes that each rank sends for heads before and after the walk, forward and backward: two ``[world_size]`` arrays each."""
    inner = len(shares)
    tokens = held.counts.astype(object)  # integers of Python, however many bytes
    team = np.repeat(tokens.reshape(-1, inner).sum(1), inner)
    q, k = (np.array([s.q[1] - s.q[0] for s in shares]), np.array([s.k[1] - s.k[0] for s in shares]))
    mine_q, mine_k = (np.tile(heads, held.world_size // inner) for heads in (q, k))
    others_q, others_k = q.sum() - mine_q, k.sum() - mine_k
    wire = shape.gradient if k.sum() > shape.heads_k else shape.element
    both, b = shape.dim + shape.dim_v, shape.element
    before = [tokens * (others_q * shape.dim + others_k * both) * b, tokens * others_q * (shape.dim_v * b + 4)]
    after = [
        (team - tokens) * mine_q * (shape.dim_v * b + 4),
        (team - tokens) * (mine_q * shape.dim * b + mine_k * both * wire),
    ]
    return [shape.batch * x for x in before], [shape.batch * x for x in after]


# -- which transport ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=PACKINGS)
def row_transport(mask: Mask, held: tuple[Layout, Layout], shape: Shape, machine: tuple[Speed, Network], backward: bool) -> str:
    """What ``auto`` is in one pass: as `plan.choose` says, but a ring whose groups grow where merges take longer than waits would.

    That is so forward alone: in the backward pass the gradients of the last group would leave with nothing to hide behind. The
    last rank is looked at, which under a causal mask merges most, in worlds of up to `NEAR` ranks, beyond which networks are too
    slow, and for masks of `FEW` slices or less, which are quickly planned.

    Args:
        held: which rank holds which queries, and which keys.

    Example:
        >>> from nnscaler_ring.core import layout, mask
        >>> held, causal = layout.zigzag(1 << 16, 8), mask.build(1 << 16, causal=True)
        >>> [row_transport(causal, (held, held), Shape(), machine_of("cuda", world), False) for world in (8, 64)]
        ['grouped_ring', 'ring']
    """
    name = choose(mask, *held)
    world = held[0].world_size
    if name != "ring" or backward or world > NEAR or len(mask.table) > FEW:
        return name
    seconds = {way: timeline(plan(mask, *held, way, world - 1), shape, *machine).total for way in (name, "grouped_ring")}
    return min(seconds, key=lambda way: seconds[way])


@lru_cache(maxsize=PACKINGS)
def best_transport(mask: Mask, held: Layout, shape: Shape, speed: Speed, network: Network) -> str:
    """``all_to_all`` if it clearly takes less time for both passes than moving keys and values as `plan.choose` says, else that.

    A ring hides its rows behind all calls but the first, a halo behind the calls on own rows, an exchange for heads behind nothing;
    but it alone evens out the work of a layout that does not, as far as heads divide: the rank with most is waited for. The
    exchange is judged by its timeline, the others, which take longer to plan, by a lower bound of theirs.

    Example:
        >>> from nnscaler_ring.core import layout, mask
        >>> held, machine = layout.zigzag(1 << 16, 8), (SPEEDS["fa2-h100"], NETWORKS["nvlink"])
        >>> window = mask.build(1 << 16, causal=True, window=(1024, 0))
        >>> [best_transport(m, held, Shape(heads=28, heads_k=4), *machine) for m in (mask.build(1 << 16, causal=True), window)]
        ['ring', 'halo']
    """
    world, rows = held.world_size, choose(mask, held, held)
    shares = deal(shape.heads, shape.heads_k, world)
    busiest, around = of_busiest(shape, shares), most_head_bytes(shape, shares, held)
    pairs, needed = rank_pairs(mask, held), rows_needed(mask, held, held)
    a_pair = shape.flops() / speed.forward + shape.flops(True) / speed.backward
    compute, mean = float(pairs.max()) * a_pair, float(pairs.mean()) * a_pair
    row = 2 * shape.row + shape.gradient_row  # keys and values twice, gradients once
    if rows == "halo":
        row = shape.row + shape.once_row(speed)  # the former are kept
    own = float((held.counts / np.maximum(held.counts + needed, 1)).min())  # of the keys that a rank reads
    hidden = mean * (own if rows == "halo" else (world - 1) / world)
    most = float(np.maximum(needed, rows_given(mask, held, held)).max() if rows == "halo" else needed.max()) * row
    steps = 0 if not needed.any() else 1 if rows == "halo" else world - 1
    sent = most / network.bandwidth + 2 * steps * network.latency
    limit = (compute + 2 * (1 + steps) * speed.launch + max(0.0, sent - hidden)) / CLEARLY
    if mean * busiest.heads * world / shape.heads + sum(map(sum, around)) / network.bandwidth >= limit:
        return rows  # before anything is planned
    whole = teams(held, world)
    alone = plan(mask, whole, whole, choose(mask, whole, whole), 0)
    times = [timeline(alone, busiest, speed, network, bool(n), around[n]).total for n in range(2)]
    return ALL_TO_ALL if sum(times) < limit else rows


CLEARLY = 1.1
"""The factor by which the modelled time of `ALL_TO_ALL` must be below the others'."""
