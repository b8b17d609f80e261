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

from .device import on_device
from .steps import Message, RankPlan, Step
from .transport import Exchange, Wait, Walk

Visit = Callable[[Step, Tensor, Tensor, "KV | None"], None]


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
        """`take` from the rows of ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]`` that messages are about, packed once for all."""
        rows = [m.rows for m in messages if m.size]
        first, end = min((int(r[0, 0]) for r in rows), default=0), max((int(r[-1, 1]) for r in rows), default=0)
        packed = cls.make(end - first, k, v, k.dtype)
        packed.k.copy_(k[:, first:end])
        packed.v.copy_(v[:, first:end])
        return lambda rows: take(packed.data, rows - first)

    @property
    def k(self) -> Tensor:
        """``[B, n, Hk, D]`` view."""
        return self.data[..., : self.heads * self.dims[0]].unflatten(-1, (self.heads, self.dims[0])).transpose(0, 1)

    @property
    def v(self) -> Tensor:
        """``[B, n, Hk, Dv]`` view."""
        return self.data[..., self.heads * self.dims[0] :].unflatten(-1, (self.heads, self.dims[1])).transpose(0, 1)

    def part(self, step: Step) -> KV:
        """The buffer of a step in its memory."""
        return KV(self.data[step.at : step.at + step.size], self.heads, self.dims)

    def like(self, dtype: torch.dtype) -> KV:
        """As many uninitialised rows."""
        return KV(torch.empty_like(self.data, dtype=dtype), self.heads, self.dims)


MANY = 8
"""Intervals from which their rows are taken and put by an index, not one by one."""


def take(data: Tensor, rows: np.ndarray) -> Tensor:
    """The rows of some intervals, contiguous: a view where it is one interval."""
    if len(rows) > MANY:
        return data.index_select(0, _index(rows, data.device))
    parts = [data[lo:hi] for lo, hi in rows.tolist()]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else data[:0]


def room(data: Tensor, rows: np.ndarray) -> Tensor:
    """Where the rows of some intervals are received: right there if it is one interval, else `put` stores them."""
    return data[slice(*rows[0])] if len(rows) == 1 else data.new_empty(int((rows[:, 1] - rows[:, 0]).sum()), *data.shape[1:])


def put(data: Tensor, rows: np.ndarray, part: Tensor, add: bool = False) -> None:
    """Store rows at some intervals, or add them to what is there."""
    if len(rows) > MANY:
        at, part = _index(rows, data.device), part.to(data.dtype)
        _ = data.index_add_(0, at, part) if add else data.index_copy_(0, at, part)
        return
    start = 0
    for lo, hi in rows.tolist():
        into, piece = data[lo:hi], part[start : start + hi - lo]
        _ = into.add_(piece) if add else into.copy_(piece)
        start += hi - lo


def _index(rows: np.ndarray, device: torch.device) -> Tensor:
    """The rows of some intervals one by one."""
    first, end = rows.T
    before = np.cumsum(end - first) - (end - first)
    return on_device(np.arange((end - first).sum()) + np.repeat(first - before, end - first), device)


def walk(plan: RankPlan, k: Tensor, v: Tensor, visit: Visit, home: KV | None, wire: torch.dtype | None) -> Walk:
    """One pass over the steps: key/value rows go out, gradients come home.

    Args:
        k, v: the own shard, ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]``.
        visit: called with a step, its keys and values, and uninitialised memory for their gradients, which it fills.
        home: where the gradients of the own shard are added up, uninitialised; None in the forward pass.
        wire: dtype in which gradients travel; None in the forward pass.
    """
    arriving = yield from _fetch(plan, 1, None, k, v)
    visit(plan.steps[0], k, v, home)
    settle: Callable[[KV | None], None] = lambda grads: None  # noqa: E731
    opened = 1
    for t in range(1, len(plan.steps)):
        memory, step = arriving(), plan.steps[t]
        arriving = yield from _fetch(plan, t + 1, memory, k, v)
        if not step.ends:
            continue
        grads = None if home is None else memory.like(home.data.dtype)
        visit(step, memory.k, memory.v, grads)
        del memory
        if home is not None and grads is not None and wire is not None:
            for s in range(opened, t + 1):
                here = grads.part(plan.steps[s])
                settle(here)  # adds what the ranks before have gathered for these rows
                settle = yield from _send_home(plan, s, here, home, wire)
        opened = t + 1
    settle(None)


def _fetch(plan: RankPlan, t: int, memory: KV | None, k: Tensor, v: Tensor) -> Generator[Exchange, Wait, Callable[[], KV]]:
    """Start filling the buffer of step `t`; returns how to wait for its memory.

    Ranks send rows of the buffer before, which is in `memory`, or of their own shard where that is None.
    """
    if t >= len(plan.steps):
        return lambda: KV.make(0, k, v, k.dtype)
    step = plan.steps[t]
    packed = KV.pack(step.send, k, v) if memory is None else partial(take, memory.part(plan.steps[t - 1]).data)
    memory = memory if memory is not None and not step.room else KV.make(step.room, k, v, k.dtype)
    filled, buffer = memory, memory.part(step)
    inbox = [(m, room(buffer.data, m.rows)) for m in step.receive]
    outbox = [(m.peer, packed(m.rows)) for m in step.send]
    del packed
    wait = yield _to_others(plan, outbox, [(m.peer, x) for m, x in inbox], k.device)

    def arrived() -> KV:
        wait()
        for message, data in inbox:
            data = next(x for peer, x in outbox if peer == plan.rank) if message.peer == plan.rank else data
            if len(message.rows) > 1 or message.peer == plan.rank:
                put(buffer.data, message.rows, data)
        outbox.clear()
        return filled

    return arrived


def _send_home(
    plan: RankPlan, t: int, grads: KV, home: KV, wire: torch.dtype
) -> Generator[Exchange, Wait, Callable[[KV | None], None]]:
    """Start sending the gradients of step `t`'s rows to whoever holds them next, or home; returns how to add what arrives."""
    step, onward = plan.steps[t], plan.steps[t + 1 : t + 2] if plan.steps[t].relays else ()
    own = [m for m in step.home_receive if m.peer == plan.rank]
    for message, rows in zip((m for m in step.home_send if m.peer == plan.rank), own, strict=True):
        put(home.data, rows.rows, take(grads.data, message.rows), add=True)
    send = [m for m in (*step.home_send, *(m for s in onward for m in s.send)) if m.peer != plan.rank]
    to_home = [(m, _empty_rows(grads, m, wire)) for m in step.home_receive if m.peer != plan.rank]
    to_next = [(m, _empty_rows(grads, m, wire)) for s in onward for m in s.receive]
    outbox = [(m.peer, take(grads.data, m.rows).to(wire)) for m in send]
    wait = yield _to_others(plan, outbox, [(m.peer, x) for m, x in (*to_home, *to_next)], grads.data.device)

    def settle(following: KV | None) -> None:
        wait()
        for message, data in to_home:
            put(home.data, message.rows, data, add=True)
        for message, data in to_next:
            assert following is not None
            put(following.data, message.rows, data, add=True)

    return settle


Mail = Sequence[tuple[int, Tensor]]


def _to_others(plan: RankPlan, send: Mail, receive: Mail, device: torch.device) -> Exchange:
    """The messages that travel: not a rank's to itself, and none without content."""
    out, back = ([(peer, x) for peer, x in mail if peer != plan.rank and x.numel()] for mail in (send, receive))
    return Exchange(out, back, device)


def _empty_rows(like: KV, message: Message, wire: torch.dtype) -> Tensor:
    return like.data.new_empty(message.size, *like.data.shape[1:], dtype=wire)


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
