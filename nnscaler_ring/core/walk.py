"""The only loop over ring steps: key/value rows go out ahead of time, gradients come home.

A row of a buffer is all that a token has: keys of every batch row and head, then values. So any rows are one slice of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .device import MANY, index_of, take
from .held import exact_dtype
from .steps import Message, RankPlan, Step
from .sums import Sum
from .transport import Exchange, Wait, Walk

Visit = Callable[[Step, Tensor, Tensor, "KVSums | None"], None]


@dataclass(frozen=True, eq=False)
class KV:
    """Packed rows ``[n, B, Hk * (D + Dv)]`` of keys and values, or of their gradients."""

    data: Tensor
    heads: int
    dims: tuple[int, int]

    @classmethod
    def make(cls, size: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> KV:
        """Uninitialised rows for keys and values like k and v."""
        width = k.shape[2] * (k.shape[3] + v.shape[3])
        return cls(torch.empty(size, k.shape[0], width, dtype=dtype, device=k.device), k.shape[2], (k.shape[3], v.shape[3]))

    @classmethod
    def pack(cls, messages: Sequence[Message], k: Tensor, v: Tensor) -> Callable[[np.ndarray], Tensor]:
        """`take` from the rows of ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]`` that messages are about.

        Packed at once for all messages, or what each is about by itself where that is less to copy, in few copies.
        """
        wanted = {m.rows.tobytes(): m.rows for m in messages}  # several peers may want the same
        bounds = np.concatenate([np.empty((0, 2), dtype=np.int64), *wanted.values()])
        first = int(bounds[:, 0].min(initial=k.shape[1]))
        end = int(bounds[:, 1].max(initial=first))
        apart = len(bounds) <= 2 * MANY and (bounds[:, 1] - bounds[:, 0]).sum() < end - first

        def packed(rows: np.ndarray) -> Tensor:
            made, start = cls.make(int((rows[:, 1] - rows[:, 0]).sum()), k, v, k.dtype), 0
            for lo, hi in rows.tolist():
                made.k[:, start : start + hi - lo].copy_(k[:, lo:hi])
                made.v[:, start : start + hi - lo].copy_(v[:, lo:hi])
                start += hi - lo
            return made.data

        if apart:
            each = {key: packed(rows) for key, rows in wanted.items()}
            return lambda rows: each[rows.tobytes()]
        whole = packed(np.array([[first, end]]))
        return lambda rows: take(whole, rows - first)

    @property
    def k(self) -> Tensor:
        """``[B, n, Hk, D]`` view."""
        return self.data[..., : self.heads * self.dims[0]].unflatten(-1, (self.heads, self.dims[0])).transpose(0, 1)

    @property
    def v(self) -> Tensor:
        """``[B, n, Hk, Dv]`` view."""
        return self.data[..., self.heads * self.dims[0] :].unflatten(-1, (self.heads, self.dims[1])).transpose(0, 1)

    def over(self, data: Tensor) -> KV:
        """Other rows of this kind."""
        return KV(data, self.heads, self.dims)

    def part(self, step: Step) -> KV:
        """The buffer of a step in its memory."""
        return self.over(self.data[step.at : step.at + step.size])

    def empty(self, size: int, dtype: torch.dtype) -> KV:
        """Uninitialised rows of this kind."""
        return self.over(self.data.new_empty(size, *self.data.shape[1:], dtype=dtype))

    def like(self, dtype: torch.dtype) -> KV:
        """As many uninitialised rows."""
        return self.empty(len(self.data), dtype)


@dataclass(frozen=True, eq=False)
class KVSums:
    """dK and dV of some rows, to which calls and messages add; dK in a sum for each part of the features."""

    k: Sequence[Sum]
    v: Sum
    rows: KV | None = None

    @classmethod
    def inside(cls, rows: KV, parts: int) -> KVSums:
        """In the memory of packed rows, uninitialised."""
        return cls([Sum(x, x) for x in rows.k.chunk(parts, -1)], Sum(rows.v, rows.v), rows)

    def add(self, rows: np.ndarray, part: KV) -> None:
        """Packed rows, end to end, for those of some intervals."""
        at = index_of(rows, part.data.device) if len(rows) > MANY and self.v.most == 1 else None  # else by a table of rows
        for total, piece in zip((*self.k, self.v), (*part.k.chunk(len(self.k), -1), part.v), strict=True):
            if at is None:
                total.add(rows, piece)
            else:
                total.total().index_add_(1, at, piece.to(total.total().dtype))

    def filled(self, step: Step) -> KV:
        """The rows of a step in the memory, with all that has come."""
        assert self.rows is not None
        for total in (*self.k, self.v):
            total.finish(step.at, step.at + step.size)
        return self.rows.part(step)


def room(data: Tensor, rows: np.ndarray) -> Tensor:
    """Where the rows of some intervals are received: right there if it is one interval, else `put` stores them."""
    return data[slice(*rows[0])] if len(rows) == 1 else data.new_empty(int((rows[:, 1] - rows[:, 0]).sum()), *data.shape[1:])


def put(data: Tensor, rows: np.ndarray, part: Tensor) -> None:
    """Store rows at some intervals."""
    if len(rows) > MANY:
        data.index_copy_(0, index_of(rows, data.device), part)
        return
    start = 0
    for lo, hi in rows.tolist():
        data[lo:hi].copy_(part[start : start + hi - lo])
        start += hi - lo


def walk(plan: RankPlan, k: Tensor, v: Tensor, visit: Visit, home: KVSums | None, wire: torch.dtype | None) -> Walk:
    """One pass over the steps: key/value rows go out, gradients come home.

    Args:
        k, v: the own shard, ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]``.
        visit: called with a step, its keys and values, and the sums of their gradients, to which it adds.
        home: the sums of the gradients of the own shard; None in the forward pass.
        wire: dtype in which gradients travel; None in the forward pass.
    """
    arriving = yield from _fetch(plan, 1, None, k, v)
    visit(plan.steps[0], k, v, home)
    settle: Callable[[KVSums | None, int], None] = lambda grads, at: None  # noqa: E731
    opened = 1
    for t in range(1, len(plan.steps)):
        memory, step = arriving(), plan.steps[t]
        arriving = yield from _fetch(plan, t + 1, memory, k, v)
        if not step.ends:
            continue
        grads = None if home is None else KVSums.inside(memory.like(exact_dtype(k.dtype)), len(home.k))
        visit(step, memory.k, memory.v, grads)
        del memory
        if home is not None and grads is not None and wire is not None:
            for s in range(opened, t + 1):
                here = plan.steps[s]
                settle(grads, here.at)  # adds what the ranks before have gathered for these rows
                settle = yield from _send_home(plan, s, grads.filled(here), home, wire)
        opened = t + 1
    settle(None, 0)


def _fetch(plan: RankPlan, t: int, memory: KV | None, k: Tensor, v: Tensor) -> Generator[Exchange, Wait, Callable[[], KV]]:
    """Start filling the buffer of step `t`; returns how to wait for its memory.

    Ranks send rows of the buffer before, which is in `memory`, or of their own shard where that is None.
    """
    if t >= len(plan.steps):
        return lambda: KV.make(0, k, v, k.dtype)
    step = plan.steps[t]
    receive, send = _pieces(step.receive), _pieces(step.send)
    packed = KV.pack(send, k, v) if memory is None else partial(take, memory.part(plan.steps[t - 1]).data)
    memory = KV.make(step.room, k, v, k.dtype) if memory is None or plan.steps[t - 1].ends else memory
    filled, buffer = memory, memory.part(step)
    inbox = [(m, room(buffer.data, m.rows)) for m in receive]
    outbox = [(m.peer, packed(m.rows)) for m in send]
    del packed
    wait = yield _to_others(plan, outbox, [(m.peer, x) for m, x in inbox], k.device)

    def arrived() -> KV:
        wait()
        own = iter([x for peer, x in outbox if peer == plan.rank])
        for message, data in inbox:
            data = next(own) if message.peer == plan.rank else data
            if len(message.rows) > 1 or message.peer == plan.rank:
                put(buffer.data, message.rows, data)
        outbox.clear()
        return filled

    return arrived


def _send_home(
    plan: RankPlan, t: int, grads: KV, home: KVSums, wire: torch.dtype
) -> Generator[Exchange, Wait, Callable[[KVSums | None, int], None]]:
    """Start sending the gradients of step `t`'s rows to whoever holds them next, or home; returns how to add what arrives."""
    step, onward = plan.steps[t], plan.steps[t + 1 : t + 2]
    home_send, home_receive = _pieces(step.home_send), _pieces(step.home_receive)
    own = [m for m in home_receive if m.peer == plan.rank]
    for message, rows in zip((m for m in home_send if m.peer == plan.rank), own, strict=True):
        home.add(rows.rows, grads.over(take(grads.data, message.rows)))
    send = [m for m in (*home_send, *(m for s in onward for m in s.send)) if m.peer != plan.rank]
    to_home = [(m, grads.empty(m.size, wire)) for m in home_receive if m.peer != plan.rank]
    to_next = [(m, grads.empty(m.size, wire)) for s in onward for m in s.receive]
    outbox = [(m.peer, take(grads.data, m.rows).to(wire)) for m in send]
    wait = yield _to_others(plan, outbox, [(m.peer, x.data) for m, x in (*to_home, *to_next)], grads.data.device)

    def settle(following: KVSums | None, at: int) -> None:
        wait()
        for message, rows in to_home:
            home.add(message.rows, rows)
        for message, rows in to_next:
            assert following is not None
            following.add(message.rows + at, rows)

    return settle


def _pieces(messages: Sequence[Message]) -> list[Message]:
    """The messages as they travel."""
    return [piece for m in messages for piece in m.pieces]


Mail = Sequence[tuple[int, Tensor]]


def _to_others(plan: RankPlan, send: Mail, receive: Mail, device: torch.device) -> Exchange:
    """The messages that travel: not a rank's to itself, and none without content."""
    out, back = ([(peer, x) for peer, x in mail if peer != plan.rank and x.numel()] for mail in (send, receive))
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
