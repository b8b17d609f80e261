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
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .heads import Pack, Team, deal, team_of, teams, to_heads, to_tokens
from .kernels import Case, Grad, Kernel, Scores
from .layout import Layout
from .layouts import looks_at_documents
from .merge import merge_
from .plan import ALL_TO_ALL, Calls, Message, RankPlan, Step, among, plan
from .recipe import Recipe, content, layout_of, mask_of
from .transport import Exchange, LocalTransport, Transport, Wait, Walk, transport_of


@dataclass(frozen=True, eq=False)
class _Job:
    """A recipe made concrete: the plans and the transport of the ranks that this process drives; `inner` ranks share heads."""

    recipe: Recipe
    transport: Transport
    inner: int
    plans: Sequence[RankPlan]
    q_layout: Layout
    k_layout: Layout
    scale: float

    @property
    def local(self) -> bool:
        return isinstance(self.transport, LocalTransport)

    def shards(self, x: Tensor, rows: Layout, dim: int = 1) -> list[Tensor]:
        """The rows of each rank that this process drives: `x` itself, or pieces of it where all ranks are here."""
        if not self.local or self.transport.world_size == 1:
            return [x]
        return [x.index_select(dim, _index(rows, rank, x.device)) for rank in self.transport.ranks]

    def whole(self, shards: Sequence[Tensor], rows: Layout, dim: int = 1) -> Tensor:
        """The inverse of `shards`."""
        if not self.local or self.transport.world_size == 1:
            return shards[0]
        order = torch.cat([_index(rows, rank, shards[0].device) for rank in self.transport.ranks])
        return torch.cat(list(shards), dim).index_select(dim, torch.argsort(order))

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of keys and values of a dtype travel; sums are of `_exact` dtype in any case."""
        named: torch.dtype | None = getattr(torch, self.recipe.reduce_dtype, None)
        return named or _exact(dtype)

    def teams(self, plan: RankPlan, heads: int, heads_k: int) -> tuple[Team, Team]:
        """With whom a rank exchanges its queries, and its keys and values, for heads."""
        q, k = (team_of(rows, self.inner, plan.rank, heads, heads_k) for rows in (self.q_layout, self.k_layout))
        return q, k


def _index(rows: Layout, rank: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.positions(rank)).to(device)


def _inner(recipe: Recipe, transport: Transport) -> int:
    """How many ranks exchange tokens for heads; 1 for none."""
    return transport.world_size if recipe.transport == ALL_TO_ALL else transport.inner


def _job(recipe: Recipe, total: tuple[int, int], tables: Sequence[Tensor | None], scale: float) -> _Job:
    transport = transport_of(recipe.group)
    inner = _inner(recipe, transport)
    cu_q, cu_k, slices = (content(table) for table in tables)
    seen = mask_of(recipe, *total, cu_q, cu_k, slices)
    q_layout = layout_of(recipe.layout, total[0], transport.world_size, cu_q)
    k_layout = layout_of(recipe.layout, total[1], transport.world_size, cu_q if cu_k is None else cu_k)
    held, outer = (teams(q_layout, inner), teams(k_layout, inner)), "auto" if recipe.transport == ALL_TO_ALL else recipe.transport
    plans = [among(plan(seen, *held, outer, rank // inner), inner, rank % inner) for rank in transport.ranks]
    return _Job(recipe, transport, inner, plans, q_layout, k_layout, scale)


# -- the loop --------------------------------------------------------------------------------------------------------------------

Visit = Callable[[Step, Tensor, Tensor, "_Rows | None"], None]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Packed rows ``[n, B, Hk * (D + Dv)]`` of keys and values, or of their gradients."""

    data: Tensor
    heads: int
    dims: tuple[int, int]

    @classmethod
    def make(cls, size: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> _Rows:
        """Uninitialised rows for keys and values like k and v."""
        width = k.shape[2] * (k.shape[3] + v.shape[3])
        return cls(torch.empty(size, k.shape[0], width, dtype=dtype, device=k.device), k.shape[2], (k.shape[3], v.shape[3]))

    @classmethod
    def pack(cls, messages: Sequence[Message], k: Tensor, v: Tensor) -> Callable[[np.ndarray], Tensor]:
        """`take` of the rows of ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]`` that messages are about, packed once for all of them."""
        rows = [m.rows for m in messages if m.size]
        first, end = min((int(r[0, 0]) for r in rows), default=0), max((int(r[-1, 1]) for r in rows), default=0)
        packed = cls.make(end - first, k, v, k.dtype)
        packed.k.copy_(k[:, first:end])
        packed.v.copy_(v[:, first:end])
        return lambda rows: packed.take(rows - first)

    @property
    def k(self) -> Tensor:
        """``[B, n, Hk, D]`` view."""
        return self.data[..., : self.heads * self.dims[0]].unflatten(-1, (self.heads, self.dims[0])).transpose(0, 1)

    @property
    def v(self) -> Tensor:
        """``[B, n, Hk, Dv]`` view."""
        return self.data[..., self.heads * self.dims[0] :].unflatten(-1, (self.heads, self.dims[1])).transpose(0, 1)

    def part(self, step: Step) -> _Rows:
        """The buffer of a step in its memory."""
        return _Rows(self.data[step.at : step.at + step.size], self.heads, self.dims)

    def zeros(self, dtype: torch.dtype) -> _Rows:
        """As many rows of zeros."""
        return _Rows(torch.zeros_like(self.data, dtype=dtype), self.heads, self.dims)

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


def _walk(plan: RankPlan, k: Tensor, v: Tensor, visit: Visit, home: _Rows | None, wire: torch.dtype | None = None) -> Walk:
    """One pass over the steps: key/value rows go out, gradients come home.

    Args:
        k, v: the own shard, ``[B, Lk, Hk, D]`` and ``[B, Lk, Hk, Dv]``.
        visit: called with a step, its keys and values, and where to add their gradients.
        home: where the gradients of the own shard are added; None in the forward pass.
        wire: dtype in which gradients travel; that of `home` where None.
    """
    arriving = yield from _fetch(plan, 1, None, k, v)
    visit(plan.steps[0], k, v, home)
    settle: Callable[[_Rows | None], None] = lambda grads: None  # noqa: E731
    opened = 1
    for t in range(1, len(plan.steps)):
        memory, step = arriving(), plan.steps[t]
        arriving = yield from _fetch(plan, t + 1, memory, k, v)
        if not step.ends:
            continue
        grads = None if home is None else memory.zeros(home.data.dtype)
        visit(step, memory.k, memory.v, grads)
        del memory
        if home is not None and grads is not None:
            for s in range(opened, t + 1):
                here = grads.part(plan.steps[s])
                settle(here)  # adds what the ranks before have gathered for these rows
                settle = yield from _send_home(plan, s, here, home, wire or home.data.dtype)
        opened = t + 1
    settle(None)


def _fetch(plan: RankPlan, t: int, memory: _Rows | None, k: Tensor, v: Tensor) -> Generator[Exchange, Wait, Callable[[], _Rows]]:
    """Start filling the buffer of step `t`; returns how to wait for its memory.

    Ranks send rows of the buffer before, which is in `memory`, or of their own shard where that is None.
    """
    if t >= len(plan.steps):
        return lambda: _Rows.make(0, k, v, k.dtype)
    step = plan.steps[t]
    take = _Rows.pack(step.send, k, v) if memory is None else memory.part(plan.steps[t - 1]).take
    memory = memory if memory is not None and not step.room else _Rows.make(step.room, k, v, k.dtype)
    filled, buffer = memory, memory.part(step)
    inbox = [
        (m, buffer.data[slice(*m.rows[0])] if len(m.rows) == 1 else buffer.data.new_empty(m.size, *buffer.data.shape[1:]))
        for m in step.receive
    ]
    outbox = [(m.peer, take(m.rows)) for m in step.send]
    del take
    wait = yield _to_others(plan, outbox, [(m.peer, x) for m, x in inbox])

    def arrived() -> _Rows:
        wait()
        for message, data in inbox:
            data = next(x for peer, x in outbox if peer == plan.rank) if message.peer == plan.rank else data
            if len(message.rows) > 1 or message.peer == plan.rank:
                buffer.put(message.rows, data)
        outbox.clear()
        return filled

    return arrived


def _send_home(
    plan: RankPlan, t: int, grads: _Rows, home: _Rows, wire: torch.dtype
) -> Generator[Exchange, Wait, Callable[[_Rows | None], None]]:
    """Start sending the gradients of step `t`'s rows to whoever holds them next, or home; returns how to add what arrives."""
    step, onward = plan.steps[t], plan.steps[t + 1 : t + 2] if plan.steps[t].relays else ()
    own = [m for m in step.home_receive if m.peer == plan.rank]
    for message, rows in zip((m for m in step.home_send if m.peer == plan.rank), own, strict=True):
        home.put(rows.rows, grads.take(message.rows), add=True)
    send = [m for m in (*step.home_send, *(m for s in onward for m in s.send)) if m.peer != plan.rank]
    to_home = [(m, _empty_rows(grads, m, wire)) for m in step.home_receive if m.peer != plan.rank]
    to_next = [(m, _empty_rows(grads, m, wire)) for s in onward for m in s.receive]
    outbox = [(m.peer, grads.take(m.rows).to(wire)) for m in send]
    wait = yield _to_others(plan, outbox, [(m.peer, x) for m, x in (*to_home, *to_next)])

    def settle(following: _Rows | None) -> None:
        wait()
        for message, data in to_home:
            home.put(message.rows, data, add=True)
        for message, data in to_next:
            assert following is not None
            following.put(message.rows, data, add=True)

    return settle


Mail = Sequence[tuple[int, Tensor]]


def _to_others(plan: RankPlan, send: Mail, receive: Mail) -> Exchange:
    """The messages that travel: not a rank's to itself, and none without content."""
    return Exchange(*([(peer, x) for peer, x in mail if peer != plan.rank and x.numel()] for mail in (send, receive)))


def _empty_rows(like: _Rows, message: Message, wire: torch.dtype) -> Tensor:
    return like.data.new_empty(message.size, *like.data.shape[1:], dtype=wire)


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


def _heads(stride: int, heads: int, heads_k: int, most: int) -> list[tuple[slice, slice]]:
    """Query heads and key heads that are computed together; as many pieces as a rank with `most` key heads has."""
    group, stride = heads // max(heads_k, 1), stride or max(most, 1)
    cuts = [min(n, heads_k) for n in (*range(0, max(most, 1), stride), most)]
    return [(slice(lo * group, hi * group), slice(lo, hi)) for lo, hi in pairwise(cuts)]


def kernel_for(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The backend for q, k and v; NotImplementedError that says what each lacks where none takes them."""
    case = Case(q.device.type, q.dtype, q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2], recipe.deterministic)
    return kernels.choose(recipe.kernel, case)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


Forward = Generator[Exchange, Wait, tuple[Tensor, Tensor, list[Tensor]]]


def _forward(job: _Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor) -> Forward:
    """One rank's forward walk: out ``[B, Lq, Hq, Dv]`` and lse ``[B, Hq, Lq]`` of its rows, and what `_backward` is to get back."""
    if job.inner == 1:
        return *(yield from _attend(job, plan, q, k, v, k.shape[2])), []
    q_team, k_team = job.teams(plan, q.shape[2], k.shape[2])
    packs = Pack(q_team, "q", [q]), Pack(k_team, "k", [k, v])
    kept = yield from to_heads(packs)
    (mine,), (keys, values) = (pack.split(rows) for pack, rows in zip(packs, kept, strict=True))
    out, lse = yield from _attend(job, plan, mine, k_team.repeat(keys), k_team.repeat(values), k_team.most)
    column = lse.transpose(1, 2).unsqueeze(3)
    (all_out,), (all_lse,) = yield from to_tokens([Pack(q_team, "q", [x]) for x in (out, column)], [q.shape[2]] * 2)
    return all_out, all_lse.squeeze(3).transpose(1, 2).contiguous(), [*kept, out, lse]


def _attend(
    job: _Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, most: int
) -> Generator[Exchange, Wait, tuple[Tensor, Tensor]]:
    """The walk over key/value rows: out and lse of q's rows; `most` is the greatest number of key heads of a rank."""
    exact = _exact(q.dtype)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=exact if plan.num_merges else q.dtype)
    lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=exact)

    def visit(heads: slice) -> Visit:
        def run(step: Step, k: Tensor, v: Tensor, grads: _Rows | None) -> None:
            for calls in step.calls if k.shape[2] else ():
                part, part_lse = kernel.forward(q[:, :, heads], k, v, calls.spans, calls.window, scores)
                _store(calls, out[:, :, heads], lse[:, :, heads], part, part_lse.transpose(1, 2).unsqueeze(3))

        return run

    if k.shape[2]:
        kernel = kernel_for(job.recipe, q, k, v)
    scores = Scores(scale=job.scale)
    split = _heads(job.recipe.heads_stride, q.shape[2], k.shape[2], most)
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


Saved = Sequence[Tensor]
Gradients = Generator[Exchange, Wait, tuple[Tensor, Tensor, Tensor]]


def _backward(job: _Job, plan: RankPlan, saved: Saved, kept: Saved) -> Gradients:
    """One rank's backward walk over ``d_out, q, k, v, out, lse``: dq, dk and dv of its rows.

    With what the forward walk `kept`, all but d_out are empty and tell shapes only.
    """
    if job.inner == 1:
        dq, dk, dv = yield from _differentiate_attend(job, plan, saved, saved[2].shape[2])
        return dq.to(saved[1].dtype), torch.empty_like(saved[2]).copy_(dk), torch.empty_like(saved[3]).copy_(dv)
    d_out, q, k, v, _, _ = saved
    q_team, k_team = job.teams(plan, q.shape[2], k.shape[2])
    (rows,) = yield from to_heads([pack := Pack(q_team, "q", [d_out])])
    (d_mine,) = pack.split(rows)
    (mine,), (keys, values) = Pack(q_team, "q", [q]).split(kept[0]), Pack(k_team, "k", [k, v]).split(kept[1])
    read = (d_mine, mine, k_team.repeat(keys), k_team.repeat(values), *kept[2:])
    dq, dk, dv = yield from _differentiate_attend(job, plan, read, k_team.most)
    wire = job.wire(k.dtype) if k_team.shared else k.dtype
    packs = [Pack(q_team, "q", [dq.to(q.dtype)]), Pack(k_team, "k", [k_team.add_repeats(x).to(wire) for x in (dk, dv)])]
    (dq,), (dk, dv) = yield from to_tokens(packs, [q.shape[2], k.shape[2]])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _differentiate_attend(job: _Job, plan: RankPlan, saved: Saved, most: int) -> Gradients:
    """The walk that undoes `_attend`: dq, dk and dv in the dtype of partial results."""
    d_out, q, k, v, out, lse = saved
    exact = _exact(q.dtype)
    dq, homes, walks = torch.zeros_like(q, dtype=exact), [], []

    def visit(heads: slice) -> Visit:
        def run(step: Step, k: Tensor, v: Tensor, grads: _Rows | None) -> None:
            assert grads is not None
            h, dk, dv = heads, grads.k, grads.v
            read = (q[:, :, h], out[:, :, h], d_out[:, :, h], lse[:, h], dq[:, :, h])
            for calls in step.calls if k.shape[2] else ():
                grad = Grad(*read, dk, dv, job.recipe.deterministic)
                kernel.backward(grad, k, v, calls.spans, calls.window, scores)

        return run

    if k.shape[2]:
        kernel = kernel_for(job.recipe, q, k, v)
    scores = Scores(scale=job.scale)
    for hq, hk in _heads(job.recipe.heads_stride, q.shape[2], k.shape[2], most):
        home = _Rows.make(k.shape[1], k[:, :, hk], v[:, :, hk], exact)
        home.data.zero_()
        homes.append(home)
        walks.append(_walk(plan, k[:, :, hk], v[:, :, hk], visit(hq), home, job.wire(k.dtype)))
    yield from _staggered(walks)
    dk, dv = [home.k for home in homes], [home.v for home in homes]
    return (dq, dk[0], dv[0]) if len(homes) == 1 else (dq, torch.cat(dk, 2), torch.cat(dv, 2))


# -- the ops -------------------------------------------------------------------------------------------------------------------

_ATTENTION = "Tensor? cu_q, Tensor? cu_k, Tensor? slices, int total_q, int total_k, float scale, str recipe"


@torch.library.custom_op(
    "nnscaler_ring::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor, Tensor, Tensor[])",
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
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
        out ``[B, Lq, Hq, Dv]`` in q's dtype; lse ``[B, Hq, Lq]``, natural log, fp32 (float64 for float64); where ranks exchange
        tokens for heads, what the backward pass reads instead of q, k, v, out and lse.
    """
    job = _job(Recipe.parse(recipe), (total_q, total_k), (cu_q, cu_k, slices), scale)
    _check_rows(job, q, k)
    qs, (ks, vs) = job.shards(q, job.q_layout), (job.shards(x, job.k_layout) for x in (k, v))
    results = job.transport.run([_forward(job, *rank) for rank in zip(job.plans, qs, ks, vs, strict=True)])
    out, lse, kept = zip(*results, strict=True)
    return job.whole(out, job.q_layout), job.whole(lse, job.q_layout, dim=2), [x for each in kept for x in each]


def _check_rows(job: _Job, q: Tensor, k: Tensor) -> None:
    """ValueError unless q and k are this rank's shards, or the whole sequence where all ranks are in this process."""
    rank, world = job.transport.ranks[0], job.transport.world_size
    whole = job.q_layout.length, job.k_layout.length
    wanted = whole if job.local else (int(job.q_layout.counts[rank]), int(job.k_layout.counts[rank]))
    if (q.shape[1], k.shape[1]) != wanted:
        raise ValueError(
            f"rank {rank} of {world} passed {q.shape[1]} query and {k.shape[1]} key tokens; layout {job.recipe.layout!r} of "
            f"{whole[0]} and {whole[1]} tokens gives it {wanted[0]} and {wanted[1]}: pass the shard that the layout gives, and the "
            "whole length where ranks hold different numbers"
        )


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_exact(q.dtype))
    return out, lse, _fake_kept(q, k, v, *rest)


def _fake_kept(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    cu_q, cu_k, _, total_q, total_k, _, text = rest
    recipe = Recipe.parse(text)
    transport = transport_of(recipe.group)
    inner, kept = _inner(recipe, transport), list[Tensor]()
    for rank in transport.ranks if inner > 1 else ():
        share = deal(q.shape[2], k.shape[2], inner)[rank % inner]
        heads, heads_k = share.q[1] - share.q[0], share.k[1] - share.k[0]
        q_rows = _held(recipe, transport, inner, rank, total_q, cu_q)
        k_rows = _held(recipe, transport, inner, rank, total_k, cu_q if cu_k is None else cu_k)
        kept += [
            q.new_empty(q_rows, q.shape[0], heads * q.shape[3]),
            k.new_empty(k_rows, k.shape[0], heads_k * (k.shape[3] + v.shape[3])),
            q.new_empty(q.shape[0], q_rows, heads, v.shape[3]),
            q.new_empty((q.shape[0], heads, q_rows), dtype=_exact(q.dtype)),
        ]
    return kept


def _held(recipe: Recipe, transport: Transport, inner: int, rank: int, total: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of a rank's team, or of the rank where `inner` is 1; documents are looked at only if the layout needs them."""
    if inner == transport.world_size:
        return total
    cu = content(cu_seqlens) if looks_at_documents(recipe.layout) else None
    return int(teams(layout_of(recipe.layout, total, transport.world_size, cu), inner).counts[rank // inner])


_SAVED = "Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept"


@torch.library.custom_op(
    "nnscaler_ring::attention_backward", mutates_args=(), schema=f"({_SAVED}, {_ATTENTION}) -> (Tensor, Tensor, Tensor)"
)
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
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
    d_outs = job.shards(d_out, job.q_layout)
    if kept:  # shapes are all that is needed of the rest
        by_rank: Any = [(d, q, k, v, out, lse) for d in d_outs]
    else:
        by_rank = zip(
            *(d_outs, job.shards(q, job.q_layout)),
            *(job.shards(x, job.k_layout) for x in (k, v)),
            *(job.shards(out, job.q_layout), job.shards(lse, job.q_layout, dim=2)),
            strict=True,
        )
    own, ranks = len(kept) // len(job.plans), range(len(job.plans))
    walks = [_backward(job, job.plans[n], saved, kept[n * own : n * own + own]) for n, saved in zip(ranks, by_rank, strict=True)]
    dq, dk, dv = zip(*job.transport.run(walks), strict=True)
    return job.whole(dq, job.q_layout), job.whole(dk, job.k_layout), job.whole(dv, job.k_layout)


@attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor], *rest: Any) -> Any:
    if not kept:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    cu_q, cu_k, _, _, total_k, _, text = rest
    recipe = Recipe.parse(text)
    transport, cu_k = transport_of(recipe.group), cu_q if cu_k is None else cu_k
    local = isinstance(transport, LocalTransport)
    keys = total_k if local else _held(recipe, transport, 1, transport.ranks[0], total_k, cu_k)
    rows = (d_out.shape[1], keys, keys)
    return tuple(x.new_empty(x.shape[0], n, *x.shape[2:]) for x, n in zip((q, k, v), rows, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, *tables = inputs[:6]
    out, lse, kept = output
    read = [q, k, v, out, lse]
    if kept:
        read = [x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in read]
    ctx.save_for_backward(*read, *tables, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_lse is not None:
        raise NotImplementedError("softmax_lse has no gradient here: detach it before it enters the loss")
    if d_out is None:
        return (None,) * 10
    q, k, v, out, lse, cu_q, cu_k, slices, *kept = ctx.saved_tensors
    grads = attention_backward(d_out, q, k, v, out, lse, kept, cu_q, cu_k, slices, *ctx.rest)
    return (*grads, *(None,) * 7)


attention.register_autograd(_differentiate, setup_context=_save)
