"""The one attention of this package: walk a plan, forward and backward.

`_walk` is the only loop over ring steps. It sends key/value rows ahead, hands each buffer that arrived to a visitor (the forward
pass merges results, the backward pass adds gradients) and takes the gradients of the buffer's rows home. Around it stands one
``torch.library`` op whose arguments are tensors, numbers and strings, so that autograd, ``torch.compile``, checkpointing and
DTensor see one node: `attention`, with `attention_backward`.

A row of a buffer is all that a token has: keys of every batch row and head, then values. So any rows are one slice of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels, layout
from .kernels import Case, Grad, Kernel
from .merge import merge_
from .plan import Calls, Message, RankPlan, Step, plan
from .recipe import Recipe, content, layout_of, mask_of
from .transport import Exchange, LocalTransport, Transport, Wait, Walk, transport_of


@dataclass(frozen=True, eq=False)
class _Job:
    """A recipe made concrete: the plans and the transport of the ranks that this process drives."""

    recipe: Recipe
    transport: Transport
    plans: Sequence[RankPlan]
    q_layout: layout.Layout
    k_layout: layout.Layout
    scale: float

    @property
    def local(self) -> bool:
        return isinstance(self.transport, LocalTransport)

    def shards(self, x: Tensor, rows: layout.Layout, dim: int = 1) -> list[Tensor]:
        """The rows of each rank that this process drives: `x` itself, or pieces of it where all ranks are here."""
        if not self.local or self.transport.world_size == 1:
            return [x]
        return [x.index_select(dim, _index(rows, rank, x.device)) for rank in self.transport.ranks]

    def whole(self, shards: Sequence[Tensor], rows: layout.Layout, dim: int = 1) -> Tensor:
        """The inverse of `shards`."""
        if not self.local or self.transport.world_size == 1:
            return shards[0]
        order = torch.cat([_index(rows, rank, shards[0].device) for rank in self.transport.ranks])
        return torch.cat(list(shards), dim).index_select(dim, torch.argsort(order))


def _index(rows: layout.Layout, rank: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.positions(rank)).to(device)


def _job(recipe: Recipe, total: tuple[int, int], tables: Sequence[Tensor | None], scale: float) -> _Job:
    transport = transport_of(recipe.group)
    cu_q, cu_k, slices = (content(table) for table in tables)
    seen = mask_of(recipe, *total, cu_q, cu_k, slices)
    q_layout = layout_of(recipe.layout, total[0], transport.world_size, cu_q)
    k_layout = layout_of(recipe.layout, total[1], transport.world_size, cu_q if cu_k is None else cu_k)
    plans = [plan(seen, q_layout, k_layout, recipe.transport, rank) for rank in transport.ranks]
    return _Job(recipe, transport, plans, q_layout, k_layout, scale)


# -- the loop --------------------------------------------------------------------------------------------------------------------

Visit = Callable[[Step, Tensor, Tensor, "_Rows | None"], None]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Packed rows ``[n, B, Hk * (D + Dv)]`` of keys and values, or of their gradients."""

    data: Tensor
    heads: int
    head_dim: int

    @classmethod
    def make(cls, size: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> _Rows:
        """Uninitialised rows for keys and values like k and v."""
        width = k.shape[2] * (k.shape[3] + v.shape[3])
        return cls(torch.empty(size, k.shape[0], width, dtype=dtype, device=k.device), k.shape[2], k.shape[3])

    @classmethod
    def pack(cls, rows: np.ndarray, k: Tensor, v: Tensor) -> Tensor:
        """Some rows of ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]``, packed."""
        packed, start = cls.make(int((rows[:, 1] - rows[:, 0]).sum()), k, v, k.dtype), 0
        for lo, hi in rows.tolist():
            packed.k[:, start : start + hi - lo] = k[:, lo:hi]
            packed.v[:, start : start + hi - lo] = v[:, lo:hi]
            start += hi - lo
        return packed.data

    @property
    def k(self) -> Tensor:
        """``[B, n, Hk, D]`` view."""
        return self.data[..., : self.heads * self.head_dim].unflatten(-1, (self.heads, -1)).transpose(0, 1)

    @property
    def v(self) -> Tensor:
        """``[B, n, Hk, Dv]`` view."""
        return self.data[..., self.heads * self.head_dim :].unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def take(self, rows: np.ndarray) -> Tensor:
        """The rows of some intervals, contiguous: a view where it is one interval."""
        parts = [self.data[lo:hi] for lo, hi in rows.tolist()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, rows: np.ndarray, data: Tensor, add: bool = False) -> None:
        start = 0
        for lo, hi in rows.tolist():
            into, part = self.data[lo:hi], data[start : start + hi - lo]
            _ = into.add_(part) if add else into.copy_(part)
            start += hi - lo


def _walk(plan: RankPlan, k: Tensor, v: Tensor, visit: Visit, home: _Rows | None) -> Walk:
    """One pass over the steps: key/value rows go out, gradients come home.

    Args:
        k, v: the own shard, ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]``.
        visit: called with a step, its keys and values, and where to add their gradients.
        home: where the gradients of the own shard are added; None in the forward pass.
    """
    arriving = yield from _fetch(plan, 1, lambda rows: _Rows.pack(rows, k, v), k, v)
    visit(plan.steps[0], k, v, home)
    settle: Callable[[_Rows | None], None] = lambda grads: None  # noqa: E731
    for t in range(1, len(plan.steps)):
        buffer = arriving()
        arriving = yield from _fetch(plan, t + 1, buffer.take, k, v)
        grads = None if home is None else _Rows.make(buffer.data.shape[0], k, v, home.data.dtype)
        if grads is not None:
            grads.data.zero_()
        visit(plan.steps[t], buffer.k, buffer.v, grads)
        if home is not None and grads is not None:
            settle(grads)  # adds what the ranks before have gathered for these rows
            settle = yield from _send_home(plan, t, grads, home)
    settle(None)


def _fetch(
    plan: RankPlan, t: int, take: Callable[[np.ndarray], Tensor], k: Tensor, v: Tensor
) -> Generator[Exchange, Wait, Callable[[], _Rows]]:
    """Start filling the buffer of step `t` with rows that ranks `take` of what they hold; returns how to wait for it."""
    if t >= len(plan.steps):
        return lambda: _Rows.make(0, k, v, k.dtype)
    step = plan.steps[t]
    buffer = _Rows.make(step.size, k, v, k.dtype)
    inbox = [
        (m, buffer.data[slice(*m.rows[0])] if len(m.rows) == 1 else buffer.data.new_empty(m.size, *buffer.data.shape[1:]))
        for m in step.receive
    ]
    outbox = [(m.peer, take(m.rows)) for m in step.send]
    wait = yield Exchange([o for o in outbox if o[0] != plan.rank], [(m.peer, x) for m, x in inbox if m.peer != plan.rank])

    def arrived() -> _Rows:
        wait()
        for message, data in inbox:
            data = next(x for peer, x in outbox if peer == plan.rank) if message.peer == plan.rank else data
            if len(message.rows) > 1 or message.peer == plan.rank:
                buffer.put(message.rows, data)
        return buffer

    return arrived


def _send_home(plan: RankPlan, t: int, grads: _Rows, home: _Rows) -> Generator[Exchange, Wait, Callable[[_Rows | None], None]]:
    """Start sending the gradients of step `t`'s rows to whoever holds them next, or home; returns how to add what arrives."""
    step, onward = plan.steps[t], plan.steps[t + 1 : t + 2] if plan.steps[t].relays else ()
    own = [m for m in step.home_receive if m.peer == plan.rank]
    for message, rows in zip((m for m in step.home_send if m.peer == plan.rank), own, strict=True):
        home.put(rows.rows, grads.take(message.rows), add=True)
    send = [m for m in (*step.home_send, *(m for s in onward for m in s.send)) if m.peer != plan.rank]
    to_home = [(m, _empty_rows(grads, m)) for m in step.home_receive if m.peer != plan.rank]
    to_next = [(m, _empty_rows(grads, m)) for s in onward for m in s.receive]
    wait = yield Exchange([(m.peer, grads.take(m.rows)) for m in send], [(m.peer, x) for m, x in (*to_home, *to_next)])

    def settle(following: _Rows | None) -> None:
        wait()
        for message, data in to_home:
            home.put(message.rows, data, add=True)
        for message, data in to_next:
            assert following is not None
            following.put(message.rows, data, add=True)

    return settle


def _empty_rows(like: _Rows, message: Message) -> Tensor:
    return like.data.new_empty(message.size, *like.data.shape[1:])


def _staggered(walks: Sequence[Walk]) -> Walk:
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


# -- forward and backward: what a visit does -----------------------------------------------------------------------------------


def _heads(stride: int, heads: int, heads_k: int) -> list[tuple[slice, slice]]:
    """Query heads and key heads that are computed together."""
    group, stride = heads // heads_k, stride or heads_k
    return [
        (slice(n * group, min(n + stride, heads_k) * group), slice(n, min(n + stride, heads_k))) for n in range(0, heads_k, stride)
    ]


def kernel_for(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The backend for q, k and v; NotImplementedError that says what each lacks where none takes them."""
    case = Case(q.device.type, q.dtype, q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2], recipe.deterministic)
    return kernels.choose(recipe.kernel, case)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _forward(job: _Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor) -> Generator[Exchange, Wait, tuple[Tensor, Tensor]]:
    """One rank's forward walk: out ``[B, Lq, Hq, Dv]`` and lse ``[B, Hq, Lq]`` of its rows."""
    kernel, exact = kernel_for(job.recipe, q, k, v), _exact(q.dtype)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=exact if plan.num_merges else q.dtype)
    lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=exact)

    def visit(heads: slice) -> Visit:
        def run(step: Step, k: Tensor, v: Tensor, grads: _Rows | None) -> None:
            for calls in step.calls:
                part, part_lse = kernel.forward(q[:, :, heads], k, v, calls.spans, calls.window, job.scale)
                _store(calls, out[:, :, heads], lse[:, :, heads], part, part_lse.transpose(1, 2).unsqueeze(3))

        return run

    split = _heads(job.recipe.heads_stride, q.shape[2], k.shape[2])
    yield from _staggered([_walk(plan, k[:, :, hk], v[:, :, hk], visit(hq), None) for hq, hk in split])
    return out.to(q.dtype), lse.squeeze(3).transpose(1, 2).contiguous()


def _store(calls: Calls, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Store or merge the result of some calls, block by block of rows."""
    start = 0
    for i0, i1, fresh in calls.blocks.tolist():
        rows, here = slice(i0, i1), slice(start, start + i1 - i0)
        if fresh:
            out[:, rows], lse[:, rows] = part[:, here], part_lse[:, here]
        else:
            merge_(out[:, rows], lse[:, rows], part[:, here], part_lse[:, here])
        start += i1 - i0


Shards = Sequence[Tensor]


def _backward(job: _Job, plan: RankPlan, saved: Shards) -> Generator[Exchange, Wait, tuple[Tensor, Tensor, Tensor]]:
    """One rank's backward walk over ``d_out, q, k, v, out, lse``: dq, dk and dv of its rows."""
    d_out, q, k, v, out, lse = saved
    kernel, exact = kernel_for(job.recipe, q, k, v), _exact(q.dtype)
    dq, dk, dv = torch.zeros_like(q, dtype=exact), torch.empty_like(k), torch.empty_like(v)
    homes, walks = [], []

    def visit(heads: slice) -> Visit:
        def run(step: Step, k: Tensor, v: Tensor, grads: _Rows | None) -> None:
            assert grads is not None
            h, dk, dv = heads, grads.k, grads.v
            read = (q[:, :, h], out[:, :, h], d_out[:, :, h], lse[:, h], dq[:, :, h])
            for calls in step.calls:
                grad = Grad(*read, dk, dv, job.recipe.deterministic)
                kernel.backward(grad, k, v, calls.spans, calls.window, job.scale)

        return run

    split = _heads(job.recipe.heads_stride, q.shape[2], k.shape[2])
    for hq, hk in split:
        home = _Rows.make(k.shape[1], k[:, :, hk], v[:, :, hk], exact)
        home.data.zero_()
        homes.append(home)
        walks.append(_walk(plan, k[:, :, hk], v[:, :, hk], visit(hq), home))
    yield from _staggered(walks)
    for (_, hk), home in zip(split, homes, strict=True):
        dk[:, :, hk], dv[:, :, hk] = home.k, home.v
    return dq.to(q.dtype), dk, dv


# -- the ops -------------------------------------------------------------------------------------------------------------------

_ATTENTION = "Tensor? cu_q, Tensor? cu_k, Tensor? slices, int total_q, int total_k, float scale, str recipe"


@torch.library.custom_op(
    "nnscaler_ring::attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor, Tensor)"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    slices: Tensor | None,
    total_q: int,
    total_k: int,
    scale: float,
    recipe: str,
) -> tuple[Tensor, Tensor]:
    """This rank's part of attention over a sequence that a group of ranks holds.

    Args:
        q, k, v: own rows ``[B, Lq, Hq, D]``, ``[B, Lk, Hk, D]``, ``[B, Lk, Hk, Dv]`` in the recipe's layout; the whole sequence
            in natural order for a ``local:N`` group.
        cu_q, cu_k: boundaries of packed documents over the whole sequence, or None.
        slices: a mask as int64 ``[n, 6]`` band slices, or None for the recipe's.
        total_q, total_k: tokens of the whole sequence.
        scale: factor of the scores.
        recipe: a `Recipe` as a string.

    Returns:
        out ``[B, Lq, Hq, Dv]`` in q's dtype; lse ``[B, Hq, Lq]``, natural log, fp32 (float64 for float64).
    """
    job = _job(Recipe.parse(recipe), (total_q, total_k), (cu_q, cu_k, slices), scale)
    _check_rows(job, q, k)
    qs, (ks, vs) = job.shards(q, job.q_layout), (job.shards(x, job.k_layout) for x in (k, v))
    results = job.transport.run([_forward(job, *rank) for rank in zip(job.plans, qs, ks, vs, strict=True)])
    out, lse = zip(*results, strict=True)
    return job.whole(out, job.q_layout), job.whole(lse, job.q_layout, dim=2)


def _check_rows(job: _Job, q: Tensor, k: Tensor) -> None:
    """ValueError unless q and k are this rank's shards, or the whole sequence where all ranks are in this process."""
    mine, world = job.plans[0], job.transport.world_size
    whole = job.q_layout.length, job.k_layout.length
    wanted = whole if job.local else (mine.q_rows, mine.k_rows)
    if (q.shape[1], k.shape[1]) != wanted:
        raise ValueError(
            f"rank {mine.rank} of {world} passed {q.shape[1]} query and {k.shape[1]} key tokens; layout {job.recipe.layout!r} of "
            f"{whole[0]} and {whole[1]} tokens gives it {wanted[0]} and {wanted[1]}: pass the shard that the layout gives, and the "
            "whole length where ranks hold different numbers"
        )


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_exact(q.dtype))


@torch.library.custom_op(
    "nnscaler_ring::attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ATTENTION}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    slices: Tensor | None,
    total_q: int,
    total_k: int,
    scale: float,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `attention`, from its result over all keys and its log-sum-exp; each call recomputes its weights."""
    job = _job(Recipe.parse(recipe), (total_q, total_k), (cu_q, cu_k, slices), scale)
    by_rank = zip(
        *(job.shards(x, job.q_layout) for x in (d_out, q)),
        *(job.shards(x, job.k_layout) for x in (k, v)),
        job.shards(out, job.q_layout),
        job.shards(lse, job.q_layout, dim=2),
        strict=True,
    )
    results = job.transport.run([_backward(job, plan, saved) for plan, saved in zip(job.plans, by_rank, strict=True)])
    dq, dk, dv = zip(*results, strict=True)
    return job.whole(dq, job.q_layout), job.whole(dk, job.k_layout), job.whole(dv, job.k_layout)


@attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *tables = inputs[:6]
    ctx.save_for_backward(q, k, v, *output, *tables)
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_lse is not None:
        raise NotImplementedError("softmax_lse has no gradient here: detach it before it enters the loss")
    if d_out is None:
        return (None,) * 10
    q, k, v, out, lse, *tables = ctx.saved_tensors
    return (*attention_backward(d_out, q, k, v, out, lse, *tables, *ctx.rest), *(None,) * 7)


attention.register_autograd(_differentiate, setup_context=_save)
