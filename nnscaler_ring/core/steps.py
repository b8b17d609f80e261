"""A plan's parts: messages, calls and steps of a rank. No tensors, no processes; `plan` makes them.

A rank's walk has steps. In step 0 it reads its own key/value rows. Each later step has a *buffer* of rows that arrived from
peers, and the calls that read it; the rows of a step's messages are rows of the buffer of the step before (ring: they are passed
on) or of the own shard (everything else). Gradients of a buffer's rows go to whoever gets the rows next, or home if nobody does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from .intervals import covered, times
from .layout import PACKINGS
from .mask import NO_LIMIT, band_area


@dataclass(frozen=True, eq=False)
class Message:
    """Rows ``[n, 2]`` of a buffer, as ordered intervals, that go to or come from `peer` (a rank of the group).

    Attributes:
        parts: rows of each part, where the message travels in several: the same for sender and receiver, and each part one
            interval on both sides, so that neither copies it.
        once: both ends know that one call reads each row, which goes no further: its gradient is what that call gives.
    """

    peer: int
    rows: np.ndarray
    parts: tuple[int, ...] = ()
    once: bool = False

    @cached_property
    def pieces(self) -> tuple[Message, ...]:
        """What is sent: the message, or its parts."""
        if not self.parts:
            return (self,)
        within = np.cumsum(self.rows[:, 1] - self.rows[:, 0])
        end = np.cumsum(self.parts)
        at = np.searchsorted(within, end)  # the interval of each part
        hi = self.rows[at, 1] - (within[at] - end)
        rows = [np.array([[b - size, b]]) for b, size in zip(hi.tolist(), self.parts, strict=True)]
        return tuple(replace(self, rows=each, parts=()) for each in rows)

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
            wrote them, so that nothing is merged there: merges are counted by it.
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


def _no_rows() -> np.ndarray:
    return np.empty((0, 4), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a rank: `receive` fills the buffer of `size` rows, `calls` read it; gradients leave by `RankPlan.gradients`.

    Several steps may fill one memory, end to end, for the calls of the last of them.

    Attributes:
        size: rows in the buffer (step 0: the own shard).
        send: rows of the buffer before.
        receive: rows of this buffer.
        own: ``[n, 4]`` ``(lo, hi, start, end)``: rows ``lo:hi`` of the own shard that the buffer holds, too, from `start` to `end`.
        at: where in its memory the buffer starts.
        room: rows of the memory that begins with this step; 0 where it goes on with that of the step before, or nothing comes.
        ends: the memory is full with this step: calls run, gradients leave.
        calls: what runs then, on rows of the memory.
        once: one call reads each row of the buffer, own rows too, and both ends know it of all its messages.
        holds: ``[n, 4]`` ``(origin, lo, hi, start)``: which rows the memory then holds, and where.
        home_send: rows of this buffer whose gradient goes to the rank that owns them.
        home_receive: rows of the own shard whose gradient arrives.
    """

    size: int
    send: tuple[Message, ...] = ()
    receive: tuple[Message, ...] = ()
    own: np.ndarray = field(default_factory=_no_rows)
    at: int = 0
    room: int = 0
    ends: bool = True
    calls: tuple[Calls, ...] = ()
    once: bool = False
    holds: np.ndarray = field(default_factory=_no_rows)
    home_send: tuple[Message, ...] = ()
    home_receive: tuple[Message, ...] = ()


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does, forward and backward. Rows are key/value rows; multiply by bytes a row for traffic.

    Attributes:
        keeps: what the one buffer brings is little on all ranks, and may be kept from the forward pass for the backward pass. That
            then begins with it, and its gradients travel while calls on own rows run.
    """

    rank: int
    world_size: int
    q_rows: int
    k_rows: int
    steps: tuple[Step, ...]
    keeps: bool = False

    @cached_property
    def num_calls(self) -> int:
        """Attention calls on one span each."""
        return sum(len(calls.spans) for step in self.steps for calls in step.calls)

    @cached_property
    def num_merges(self) -> int:
        """Times that a result is merged into rows that an earlier call wrote."""
        return sum(int((calls.blocks[:, 2] == 0).sum()) for step in self.steps for calls in step.calls)

    @cached_property
    def results(self) -> Mapping[int, np.ndarray]:
        """How many results calls give for each query row, and gradients, by the part of the features."""
        calls = [calls for step in self.steps for calls in step.calls]
        return {part: times(self.q_rows, (c.blocks for c in calls if c.part == part)) for part in {c.part for c in calls}}

    @cached_property
    def num_results(self) -> int:
        """The most results that calls give for a row."""
        return int(sum(self.results.values(), np.zeros(1)).max(initial=0))

    @cached_property
    def own_gradients(self) -> Mapping[int, np.ndarray]:
        """How many gradients calls give for each row of the own shard, where it lies, by the part of the features."""
        calls = self.steps[0].calls
        own = {part: [covered(c.spans[:, 2:]) for c in calls if c.part == part] for part in {c.part for c in calls}}
        return {part: times(self.k_rows, keys) for part, keys in own.items()}

    @cached_property
    def gradients_home(self) -> np.ndarray:
        """How many gradients come for each row of the own shard, from others and from where a buffer holds it, too."""
        home = [m.rows for step in self.steps for m in step.home_receive]
        return times(self.k_rows, [*home, *(step.own[:, :2] for step in self.steps)])

    @property
    def rows_sent(self) -> int:
        """Key/value rows that go to other ranks, in the forward pass and, unless they are kept, again in the backward pass."""
        return sum(m.size for step in self.steps for m in step.send)

    @property
    def grad_rows_sent(self) -> int:
        """Rows of dK/dV that go to other ranks in the backward pass."""
        return sum(m.size for t in range(1, len(self.steps)) for m in self.gradients(t)[0])

    def gradients(self, t: int) -> tuple[list[Message], list[Message]]:
        """What step `t`, from 1 on, sends and receives of gradients: home, and along the messages that pass its rows on."""
        step, following = self.steps[t], self.steps[t + 1 : t + 2]
        send = [*step.home_send, *(m for s in following for m in s.send)]
        receive = [*step.home_receive, *(m for s in following for m in s.receive)]
        return send, receive

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
            own = int((step.own[:, 1] - step.own[:, 0]).sum())
            moves = [f"{own} own rows"] * (own > 0) + [f"{m.size} rows from rank {m.peer}" for m in step.receive]
            spans = [f"q[{a}:{b}] x k[{c}:{d}] window {n.window}" for n in step.calls for a, b, c, d in n.spans[:4].tolist()]
            lines.append(f"  step {t}: {', '.join(moves) or 'own rows'}; {', '.join(spans) or 'no call'}")
        return "\n".join(lines)


@lru_cache(maxsize=2 * PACKINGS)
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
