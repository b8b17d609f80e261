"""The only loop over ring steps: key/value rows go out ahead of time, gradients come home.

Keys and values of a step share one buffer, rows first in each half: any rows are one slice of either, so that they are sent from
where they lie and received where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from .device import MANY, index_of, sum_dtype, take
from .held import at_once
from .steps import Message, RankPlan, Step
from .sums import Sum
from .transport import Exchange, Wait, Walk

Visit = Callable[[Step, Tensor, Tensor, "KVSums | None"], None]


@dataclass(frozen=True, eq=False)
class KV:
    """Rows of keys ``[n, B, Hk, D]`` and of values ``[n, B, Hk, Dv]``, or of their gradients; `data` is the memory of both."""

    keys: Tensor
    values: Tensor
    data: Tensor | None = None

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> KV:
        """The rows of ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``, where they lie."""
        return cls(k.transpose(0, 1), v.transpose(0, 1))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.keys, self.values))

    @property
    def k(self) -> Tensor:
        """``[B, n, Hk, D]`` view."""
        return self.keys.transpose(0, 1)

    @property
    def v(self) -> Tensor:
        """``[B, n, Hk, Dv]`` view."""
        return self.values.transpose(0, 1)

    def __getitem__(self, rows: slice) -> KV:
        """Some rows, where they lie."""
        return KV(self.keys[rows], self.values[rows])

    def part(self, step: Step) -> KV:
        """The buffer of a step in its memory."""
        return self if step.size == self.keys.shape[0] else self[step.at : step.at + step.size]

    def take(self, rows: np.ndarray) -> KV:
        """The rows of some intervals, end to end: where they lie, if it is one interval."""
        return KV(*(take(x, rows) for x in self))

    def contiguous(self) -> KV:
        return KV(*(x.contiguous() for x in self))

    def to(self, dtype: torch.dtype) -> KV:
        return KV(*(x.to(dtype) for x in self))

    def empty(self, size: int, dtype: torch.dtype) -> KV:
        """Uninitialised rows of this kind, in one buffer."""
        return self.within(self.keys.new_empty(size * sum(prod(x.shape[1:]) for x in self), dtype=dtype), size)

    def within(self, data: Tensor, size: int) -> KV:
        """Rows of this kind in a contiguous buffer."""
        shapes, start = [(size, *x.shape[1:]) for x in self], data.storage_offset()
        places = start, start + prod(shapes[0])
        keys, values = (data.as_strided(shape, _strides(shape), at) for shape, at in zip(shapes, places, strict=True))
        return KV(keys, values, data)


def _strides(shape: Sequence[int]) -> list[int]:
    """Those of a contiguous tensor."""
    return [prod(shape[n + 1 :]) for n in range(len(shape))]


def outgoing(own: KV, messages: Sequence[Message]) -> Callable[[np.ndarray], KV]:
    """`KV.take` of the own shard for the rows that messages are about, contiguous.

    Rows that several peers want are put together once. Rows that are not contiguous in memory, as with several batch rows, are
    copied: message by message, or once from the first to the last row of any message where that copies no more.
    """
    wanted = {m.rows.tobytes(): m.rows for m in messages}
    bounds = np.concatenate([np.empty((0, 2), dtype=np.int64), *wanted.values()])
    first, end = int(bounds[:, 0].min(initial=len(own.keys))), int(bounds[:, 1].max(initial=0))
    if (bounds[:, 1] - bounds[:, 0]).sum() < end - first:
        first = 0
    elif first < end:
        own = own[first:end].contiguous()
    made = {key: own.take(rows - first).contiguous() for key, rows in wanted.items()}
    return lambda rows: made[rows.tobytes()]


@dataclass(frozen=True)
class Wire:
    """In which dtype gradients travel: of sums, and of rows whose gradient is what one call gives.

    Attributes:
        given: that is also the dtype in which the call gives it, and less than exact.
    """

    sums: torch.dtype
    once: torch.dtype
    given: bool = False

    def of(self, message: Message) -> torch.dtype:
        return self.once if message.once else self.sums


@dataclass(frozen=True, eq=False)
class KVSums:
    """dK and dV of some rows, to which calls and messages add; dK in a sum for each part of the features."""

    k: Sequence[Sum]
    v: Sum
    rows: KV | None = None

    @classmethod
    def inside(cls, rows: KV, parts: int) -> KVSums:
        """In the memory of rows, uninitialised."""
        return cls([Sum(x, into=x) for x in rows.k.chunk(parts, -1)], Sum(rows.v, into=rows.v), rows)

    @classmethod
    def given(cls, rows: KV, parts: int) -> KVSums:
        """What one call gives for each row of a step, in their dtype; it is not copied where one call gives all."""
        *keys, values = (x.new_empty(()).expand(x.shape) for x in (*rows.k.chunk(parts, -1), rows.v))  # the rows may go meanwhile
        return cls([Sum(x, end=x.dtype) for x in keys], Sum(values, end=values.dtype))

    def add(self, rows: np.ndarray, part: KV) -> None:
        """Rows, end to end, for those of some intervals."""
        at = index_of(rows, part.keys.device) if len(rows) > MANY and self.v.most == 1 else None  # else by a table of rows
        for total, piece in zip((*self.k, self.v), (*part.k.chunk(len(self.k), -1), part.v), strict=True):
            if at is None:
                total.add(rows, piece)
            else:
                total.total().index_add_(1, at, piece.to(total.total().dtype))

    def filled(self, step: Step) -> KV:
        """The rows of a step in the memory, with all that has come."""
        if self.rows is None:
            keys = [total.result() for total in self.k]
            return KV.of(keys[0] if len(keys) == 1 else torch.cat(keys, -1), self.v.result())
        for total in (*self.k, self.v):
            total.finish(step.at, step.at + step.size)
        return self.rows.part(step)


def room(data: Tensor, rows: np.ndarray) -> Tensor:
    """What to receive the rows of some intervals in: their place in `data` if it is one interval, else a tensor for `put`."""
    if len(rows) != 1:
        return data.new_empty(int((rows[:, 1] - rows[:, 0]).sum()), *data.shape[1:])
    lo, hi = rows[0].tolist()
    return data if hi - lo == data.shape[0] else data[lo:hi]


def put(data: Tensor, rows: np.ndarray, part: Tensor) -> None:
    """Store rows at some intervals."""
    if len(rows) > MANY:
        data.index_copy_(0, index_of(rows, data.device), part)
        return
    start = 0
    for lo, hi in rows.tolist():
        data[lo:hi].copy_(part[start : start + hi - lo])
        start += hi - lo


def walk(
    plan: RankPlan, k: Tensor, v: Tensor, visit: Visit, home: KVSums | None, wire: Wire | None, kept: list[Tensor] | None = None
) -> Walk:
    """One pass over the steps: key/value rows go out, gradients come home.

    Where the forward pass has kept what came, the backward pass begins with that, and its gradients travel while calls on own rows
    run.

    Args:
        k, v: the own shard, ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]``.
        visit: called with a step, its keys and values, and the sums of their gradients, to which it adds.
        home: the sums of the gradients of the own shard; None in the forward pass.
        wire: how gradients travel; None in the forward pass.
        kept: where the forward pass puts the one buffer that came, for the backward pass; None where it is not kept.
    """
    own, there = KV.of(k, v), [] if home is None or kept is None else kept
    if there:
        arriving: Callable[[], KV] = lambda: own.within(there[0].contiguous(), plan.steps[1].room)  # noqa: E731
    else:
        arriving = yield from _fetch(plan, 1, None, own)
        visit(plan.steps[0], k, v, home)
    settle: Callable[[KVSums | None, int], None] = lambda grads, at: None  # noqa: E731
    opened = 1
    for t in range(1, len(plan.steps)):
        memory, step = arriving(), plan.steps[t]
        arriving = yield from _fetch(plan, t + 1, memory, own)
        if not step.ends:
            continue
        grads = None if home is None or wire is None else _sums(step, memory, len(home.k), wire)
        visit(step, memory.k, memory.v, grads)
        if kept is not None and home is None and memory.data is not None:
            kept.append(memory.data)
        del memory
        if home is not None and grads is not None and wire is not None:
            for s in range(opened, t + 1):
                here = plan.steps[s]
                settle(grads, here.at)  # adds what the ranks before have gathered for these rows
                settle = yield from _send_home(plan, s, grads.filled(here), home, wire)
        del grads
        opened = t + 1
    if there:
        visit(plan.steps[0], k, v, home)
    settle(None, 0)


def _sums(step: Step, memory: KV, parts: int, wire: Wire) -> KVSums:
    """Of the rows of a memory that is full with a step: exact, unless all travel as calls give them, and that is held."""
    if step.once and wire.given and at_once(memory.keys.device.type) > 1:
        return KVSums.given(memory, parts)
    return KVSums.inside(memory.empty(len(memory.keys), sum_dtype(memory.keys.dtype)), parts)


def _fetch(plan: RankPlan, t: int, memory: KV | None, own: KV) -> Generator[Exchange, Wait, Callable[[], KV]]:
    """Start filling the buffer of step `t`; returns how to wait for its memory.

    Ranks send rows of the buffer before, which is in `memory`, or of their own shard where that is None.
    """
    if t >= len(plan.steps):
        return lambda: own[:0]
    step = plan.steps[t]
    receive, send = _pieces(step.receive), _pieces(step.send)
    sent = outgoing(own, send) if memory is None else memory.part(plan.steps[t - 1]).take
    memory = own.empty(step.room, own.keys.dtype) if memory is None or plan.steps[t - 1].ends else memory
    filled, buffer = memory, memory.part(step)
    inbox = [(m, KV(*(room(x, m.rows) for x in buffer))) for m in receive]
    outbox = [(m.peer, sent(m.rows)) for m in send]
    del sent
    wait = yield _exchange(outbox, [(m.peer, x) for m, x in inbox], own.keys.device)
    for mine, there in _in_pieces(step.own):
        for x, part in zip(buffer, own.take(mine), strict=True):
            put(x, there, part)

    def arrived() -> KV:
        wait()
        for message, came in inbox:
            for x, part in zip(buffer, came, strict=True) if len(message.rows) > 1 else ():
                put(x, message.rows, part)
        outbox.clear()
        return filled

    return arrived


def _send_home(
    plan: RankPlan, t: int, grads: KV, home: KVSums, wire: Wire
) -> Generator[Exchange, Wait, Callable[[KVSums | None, int], None]]:
    """Start sending the gradients of step `t`'s rows to whoever holds them next, or home; returns how to add what arrives."""
    step, onward = plan.steps[t], plan.steps[t + 1 : t + 2]
    send, _ = plan.gradients(t)
    for mine, there in _in_pieces(step.own):
        home.add(mine, grads.take(there))
    to_home = [(m, grads.empty(m.size, wire.of(m))) for m in _pieces(step.home_receive)]
    to_next = [(m, grads.empty(m.size, wire.of(m))) for s in onward for m in _pieces(s.receive)]
    outbox = [(m.peer, grads.take(m.rows).to(wire.of(m)).contiguous()) for m in _pieces(send)]
    wait = yield _exchange(outbox, [(m.peer, x) for m, x in (*to_home, *to_next)], grads.keys.device)

    def settle(following: KVSums | None, at: int) -> None:
        wait()
        for message, rows in to_home:
            home.add(message.rows, rows)
        for message, rows in to_next:
            assert following is not None
            following.add(message.rows + at, rows)

    return settle


def _in_pieces(own: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Own rows and their places in a buffer: interval by interval, which is one copy each, or all at once where they are many."""
    pieces = [own] if len(own) > MANY else [own[n : n + 1] for n in range(len(own))]
    return ((piece[:, :2], piece[:, 2:]) for piece in pieces)


def _pieces(messages: Sequence[Message]) -> list[Message]:
    """The messages as they travel."""
    return [piece for m in messages for piece in m.pieces]


Mail = Sequence[tuple[int, KV]]


def _exchange(send: Mail, receive: Mail, device: torch.device) -> Exchange:
    """The messages, keys and then values, none without content."""
    out, back = ([(peer, x) for peer, rows in mail for x in rows if x.numel()] for mail in (send, receive))
    return Exchange(out, back, device)


def staggered(walks: Sequence[Walk]) -> Walk:
    """Walks one after the other, each one's first exchange under way while the one before computes."""
    starts: list[Wait | None] = []
    for n in range(len(walks)):
        for ahead in walks[len(starts) : n + 2]:
            try:
                starts.append((yield next(ahead)))
            except StopIteration:
                starts.append(None)
        reply = starts[n]
        while reply is not None:
            try:
                reply = yield walks[n].send(reply)
            except StopIteration:
                break
