"""Context parallelism as it is done today, to compare with: plain schedules of one rank over the kernels of this package.

Each is a walk, like the package's own, so that one transport drives both. The calls are those of a plan that moves every row to
every rank, in the steps of the published algorithms; what differs from this package is all around them.

`ring`: each step passes the whole keys and values on, attends to those held, and merges by a chain of torch ops in fp32 (Liu et
al., arXiv:2310.01889; with zigzag or striped tokens Brandon et al., arXiv:2311.09431). `gather`: keys and values of all ranks are
gathered and put in order, then each run of queries is one call (as Llama 3 was trained, arXiv:2407.21783).

Legend: `B` batch, `L` rows of a shard, `Hq`/`Hk` heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.kernels import Grad, Kernel, Scores
from nnscaler_ring.core.plan import RankPlan, Step
from nnscaler_ring.core.sums import Sum
from nnscaler_ring.core.transport import Exchange, Wait

Forward = Generator[Exchange, Wait, tuple[Tensor, Tensor]]
Backward = Generator[Exchange, Wait, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Rank:
    """One rank's plan, kernel and shards ``[B, L, H, D]``; `order` is `order_of` its plan, on their device before any run."""

    plan: RankPlan
    kernel: Kernel
    scores: Scores
    q: Tensor
    k: Tensor
    v: Tensor
    order: Tensor


# -- around a ring ---------------------------------------------------------------------------------------------------------------


def ring_forward(rank: Rank) -> Forward:
    """out ``[B, L, Hq, D]`` and lse ``[B, Hq, L]``."""
    out, lse = _nothing_seen(rank)
    keys, values = rank.k, rank.v
    for t, step in enumerate(rank.plan.steps):
        wait, came = yield from _pass_on(rank.plan, t, keys, values)
        _attend(rank, step, keys, values, out, lse)
        wait()
        keys, values = came
    return out.to(rank.q.dtype), lse.squeeze(3).transpose(1, 2).contiguous()


def ring_backward(rank: Rank, out: Tensor, lse: Tensor, d_out: Tensor) -> Backward:
    """dq, dk and dv of the shards: gradients in fp32 follow their rows round the ring, a step behind."""
    dq = Sum(rank.q)
    keys, values = rank.k, rank.v
    wait_home: Wait = lambda: None  # noqa: E731
    gathered: tuple[Tensor, ...] = ()
    for t, step in enumerate(rank.plan.steps):
        wait, came = yield from _pass_on(rank.plan, t, keys, values)
        dk, dv = (Sum(x) for x in (keys, values))
        _differentiate(rank, step, Grad(rank.q, out, d_out, lse, dq, dk, dv), keys, values)
        mine = dk.total(), dv.total()
        wait_home()
        for total, part in zip(mine, gathered, strict=False):
            total += part
        wait()
        keys, values = came
        wait_home, gathered = yield from _hand_over(rank.plan, *mine)
    wait_home()
    home_k, home_v = gathered
    return dq.total().to(rank.q.dtype), home_k.to(rank.k.dtype), home_v.to(rank.v.dtype)


def _pass_on(plan: RankPlan, t: int, *held: Tensor) -> Generator[Exchange, Wait, tuple[Wait, tuple[Tensor, Tensor]]]:
    """Start to pass on what is held at step `t`; nothing after the last."""
    if t + 1 == len(plan.steps):
        return lambda: None, (held[0][:0], held[1][:0])
    return (yield from _hand_over(plan, *held))


def _hand_over(plan: RankPlan, *held: Tensor) -> Generator[Exchange, Wait, tuple[Wait, tuple[Tensor, Tensor]]]:
    """Start to send tensors to the next rank and to receive such from the one before."""
    ahead, behind = (plan.rank + 1) % plan.world_size, (plan.rank - 1) % plan.world_size
    came = [torch.empty_like(x) for x in held]
    wait = yield Exchange([(ahead, x) for x in held], [(behind, x) for x in came])
    return wait, (came[0], came[1])


# -- all keys and values at once -------------------------------------------------------------------------------------------------


def gather_forward(rank: Rank) -> Forward:
    """out and lse; two calls where a rank holds two chunks of the sequence."""
    out, lse = _nothing_seen(rank)
    keys, values = yield from _gather(rank)
    _attend(rank, rank.plan.steps[-1], keys, values, out, lse)
    return out.to(rank.q.dtype), lse.squeeze(3).transpose(1, 2).contiguous()


def gather_backward(rank: Rank, out: Tensor, lse: Tensor, d_out: Tensor) -> Backward:
    """dq, dk and dv: keys and values are gathered again; the gradients of all go to their ranks, which add them up."""
    keys, values = yield from _gather(rank)
    dq, *of_keys = (Sum(x) for x in (rank.q, keys, values))
    _differentiate(rank, rank.plan.steps[-1], Grad(rank.q, out, d_out, lse, dq, *of_keys), keys, values)
    d_keys = [x.total() for x in of_keys]
    others = [n for n in range(rank.plan.world_size) if n != rank.plan.rank]
    # [B, P * L, ...] in the order of positions -> P shards
    shards = [torch.empty_like(x).index_copy_(1, rank.order, x).chunk(rank.plan.world_size, 1) for x in d_keys]
    came = [[torch.empty_like(own[rank.plan.rank]) for _ in others] for own in shards]
    wait = yield Exchange(
        [(n, own[n]) for n in others for own in shards],
        [(n, parts[at]) for at, n in enumerate(others) for parts in came],
    )
    wait()
    dk, dv = (torch.stack([own[rank.plan.rank], *parts]).sum(0) for own, parts in zip(shards, came, strict=True))
    return dq.total().to(rank.q.dtype), dk.to(rank.k.dtype), dv.to(rank.v.dtype)


def _gather(rank: Rank) -> Generator[Exchange, Wait, tuple[Tensor, Tensor]]:
    """Keys and values of all ranks in the order of their positions: ``[B, P * L, Hk, D]``."""
    plan = rank.plan
    others = [n for n in range(plan.world_size) if n != plan.rank]
    rooms = [x.new_empty(plan.world_size, *x.shape) for x in (rank.k, rank.v)]
    wait = yield Exchange(
        [(n, x) for n in others for x in (rank.k, rank.v)],
        [(n, room[n]) for n in others for room in rooms],
    )
    for room, x in zip(rooms, (rank.k, rank.v), strict=True):
        room[plan.rank] = x
    wait()
    keys, values = (room.transpose(0, 1).flatten(1, 2).index_select(1, rank.order) for room in rooms)
    return keys, values


def order_of(plan: RankPlan) -> Tensor:
    """For each row of the last step's memory its place among the ranks' shards end to end; on the host."""
    size, pieces = plan.k_rows, sorted(plan.steps[-1].holds.tolist(), key=lambda piece: piece[3])
    return torch.cat([torch.arange(origin * size + lo, origin * size + hi) for origin, lo, hi, _ in pieces])


# -- what both do ----------------------------------------------------------------------------------------------------------------


def _nothing_seen(rank: Rank) -> tuple[Tensor, Tensor]:
    """fp32 where there is something to merge."""
    out = torch.zeros_like(rank.q, dtype=torch.float32 if rank.plan.num_merges else rank.q.dtype)
    return out, torch.full_like(out[..., :1], -torch.inf, dtype=torch.float32)


def _attend(rank: Rank, step: Step, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor) -> None:
    """The calls of a step, each merged op by op into what is there."""
    for calls in step.calls:
        part, part_lse = rank.kernel.forward(rank.q, keys, values, calls.spans, calls.window, rank.scores)
        column, start = part_lse.transpose(1, 2).unsqueeze(3), 0
        for i0, i1, fresh in calls.blocks.tolist():
            here = slice(start, start + i1 - i0)
            _merge(out[:, i0:i1], lse[:, i0:i1], part[:, here], column[:, here], bool(fresh))
            start += i1 - i0


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, fresh: bool) -> None:
    if fresh:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    out -= torch.sigmoid(part_lse - lse) * (out - part.to(torch.float32))
    lse -= F.logsigmoid(lse - part_lse)


def _differentiate(rank: Rank, step: Step, grad: Grad, keys: Tensor, values: Tensor) -> None:
    for calls in step.calls:
        rank.kernel.backward(grad, keys, values, calls.spans, calls.window, rank.scores)
        for total in (grad.dq, grad.dk, grad.dv):
            total.flush()  # one after the other


PASSES: Mapping[str, tuple[Callable[[Rank], Forward], Callable[[Rank, Tensor, Tensor, Tensor], Backward]]] = MappingProxyType(
    {"full_ring": (ring_forward, ring_backward), "broadcast": (gather_forward, gather_backward)}
)
"""Forward and backward by the plan that has their calls."""
