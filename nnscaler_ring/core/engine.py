"""The one attention of this package: walk a plan, forward and backward.

`_walk` is the only loop over ring steps. It sends key/value rows ahead, hands each buffer that arrived to a visitor (the forward
pass merges results, the backward pass adds gradients) and takes the gradients of the buffer's rows home. Around it stands one
``torch.library`` op whose arguments are tensors, numbers and strings, so that autograd, ``torch.compile``, checkpointing and
DTensor see one node: `attention`, with `attention_backward`.

A row of a buffer is all that a token has: keys of every batch row and head, then values. So any rows are one slice of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
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
    seed: int
    documents: tuple[bytes | None, bytes | None]

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

    def scores(self, plan: RankPlan, extras: _Extras, device: torch.device) -> Scores:
        """How scores of a rank's queries are made; where keys are, `key_positions` says."""
        recipe = self.recipe
        made = Scores(
            scale=self.scale,
            softcap=recipe.softcap,
            alibi=extras.alibi,
            bias=extras.bias,
            dropout=recipe.dropout,
            seed=self.seed,
            batch0=recipe.batch0,
            head0=recipe.head0 + extras.head0,
        )
        if not made.features & {"alibi", "bias", "dropout"}:
            return made
        at = teams(self.q_layout, self.inner).positions(plan.rank // self.inner)
        q_at, ahead = (torch.from_numpy(x).to(device) for x in (at, self._ahead(at)))
        return replace(made, q_at=q_at, ahead=ahead)

    def _ahead(self, at: np.ndarray) -> np.ndarray:
        """By how much the keys of each query's document run ahead: documents are aligned at their last tokens."""
        cu_q, cu_k = self.documents
        if cu_q is None:
            return np.full(len(at), self.k_layout.length - self.q_layout.length)
        q, k = (np.frombuffer(cu, dtype=np.int64) for cu in (cu_q, cu_q if cu_k is None else cu_k))
        return (k - q)[np.searchsorted(q, at, side="right")]

    def key_positions(self, plan: RankPlan, device: torch.device) -> dict[Step, Tensor]:
        """The position of each row of each step's memory, on the device before the walk begins."""
        held = teams(self.k_layout, self.inner)
        steps = [step for step in plan.steps if step.calls]
        origins = np.unique(np.concatenate([step.holds[:, 0] for step in steps])) if steps else ()
        positions = {int(origin): held.positions(int(origin)) for origin in origins}
        found = []
        for step in steps:
            at = np.zeros(int((step.holds[:, 2] - step.holds[:, 1]).sum()), dtype=np.int64)
            for origin, lo, hi, start in step.holds.tolist():
                at[start : start + hi - lo] = positions[origin][lo:hi]
            found.append(at)
        whole = torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)
        return dict(zip(steps, whole.to(device).split([len(at) for at in found]), strict=True))


@dataclass(frozen=True, eq=False)
class _Extras:
    """What scores have of tensors besides q and k, for the heads of a rank.

    Attributes:
        alibi: slopes ``[B or 1, Hq]``.
        bias: ``[Hq or 1, Lq, T]``.
        sink: logits ``[Hq]`` of keys without values, one a head.
        head0: the first of the heads.
    """

    alibi: Tensor | None
    bias: Tensor | None
    sink: Tensor | None
    head0: int = 0


def _index(rows: Layout, rank: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.positions(rank)).to(device)


def _inner(recipe: Recipe, transport: Transport) -> int:
    """How many ranks exchange tokens for heads; 1 for none."""
    return transport.world_size if recipe.transport == ALL_TO_ALL else transport.inner


def _job(recipe: Recipe, total: tuple[int, int], tables: Sequence[Tensor | None], scale: float, seed: int = 0) -> _Job:
    transport = transport_of(recipe.group)
    inner = _inner(recipe, transport)
    cu_q, cu_k, slices = (content(table) for table in tables)
    seen = mask_of(recipe, *total, cu_q, cu_k, slices)
    q_layout = layout_of(recipe.layout, total[0], transport.world_size, cu_q)
    k_layout = layout_of(recipe.layout, total[1], transport.world_size, cu_q if cu_k is None else cu_k)
    held, outer = (teams(q_layout, inner), teams(k_layout, inner)), "auto" if recipe.transport == ALL_TO_ALL else recipe.transport
    plans = [among(plan(seen, *held, outer, rank // inner), inner, rank % inner) for rank in transport.ranks]
    return _Job(recipe, transport, inner, plans, q_layout, k_layout, scale, seed, (cu_q, cu_k))


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


def kernel_for(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, bool] = MappingProxyType({})) -> Kernel:
    """The backend for q, k and v and for the `extras` that are there; NotImplementedError that says what each lacks for them."""
    features = {"softcap": bool(recipe.softcap), "dropout": bool(recipe.dropout), **extras}
    names = frozenset(name for name, there in features.items() if there)
    sizes = (q.shape[-1] // recipe.parts, v.shape[-1], q.shape[-2], k.shape[-2])
    return kernels.choose(recipe.kernel, Case(q.device.type, q.dtype, *sizes, recipe.deterministic, names))


def _kernel(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: _Extras, d_lse: Tensor | None = None) -> Kernel:
    there = {"alibi": extras.alibi, "bias": extras.bias, "d_lse": d_lse}
    return kernel_for(recipe, q, k, v, {name: x is not None for name, x in there.items()})


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


Forward = Generator[Exchange, Wait, tuple[Tensor, Tensor, list[Tensor]]]


def _forward(job: _Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, extras: _Extras) -> Forward:
    """One rank's forward walk: out ``[B, Lq, Hq, Dv]`` and lse ``[B, Hq, Lq]`` of its rows, and what `_backward` is to get back."""
    if job.inner == 1:
        return *(yield from _attend(job, plan, q, k, v, extras, k.shape[2])), []
    q_team, k_team = job.teams(plan, q.shape[2], k.shape[2])
    packs = [Pack(q_team, "q", [q]), Pack(k_team, "k", [k, v])]
    extras, more = _of_share(extras, q_team, q.shape[2])
    kept = yield from to_heads([*packs, *more])
    (mine,), (keys, values) = (pack.split(rows) for pack, rows in zip(packs, kept, strict=False))
    extras = _with_bias(extras, more, kept[2:])
    out, lse = yield from _attend(job, plan, mine, k_team.repeat(keys), k_team.repeat(values), extras, k_team.most)
    column = lse.transpose(1, 2).unsqueeze(3)
    (all_out,), (all_lse,) = yield from to_tokens([Pack(q_team, "q", [x]) for x in (out, column)], [q.shape[2]] * 2)
    return all_out, all_lse.squeeze(3).transpose(1, 2).contiguous(), [*kept[:2], out, lse, *kept[2:]]


def _of_share(extras: _Extras, team: Team, heads: int) -> tuple[_Extras, list[Pack]]:
    """The extras of a rank's share of heads; a bias, whose rows lie with the queries, travels with them as ``[1, L, Hq, T]``."""
    first, end = team.share.q
    alibi = None if extras.alibi is None else extras.alibi[:, first:end]
    sink = None if extras.sink is None else extras.sink[first:end]
    made = _Extras(alibi, None, sink, extras.head0 + first)
    if extras.bias is None:
        return made, []
    return made, [Pack(team, "q", [extras.bias.expand(heads, -1, -1).permute(1, 0, 2).unsqueeze(0)])]


def _with_bias(extras: _Extras, packs: Sequence[Pack], rows: Sequence[Tensor]) -> _Extras:
    """The extras with the bias of the share, ``[h, rows, T]``, where one has come."""
    if not packs:
        return extras
    ((bias,),) = (pack.split(x) for pack, x in zip(packs, rows, strict=True))
    return replace(extras, bias=bias.squeeze(0).permute(1, 0, 2))


def _attend(
    job: _Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, extras: _Extras, most: int
) -> Generator[Exchange, Wait, tuple[Tensor, Tensor]]:
    """The walk over key/value rows: out and lse of q's rows; `most` is the greatest number of key heads of a rank."""
    exact = _exact(q.dtype)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=exact if plan.num_merges or extras.sink is not None else q.dtype)
    lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=exact)
    scores = job.scores(plan, extras, q.device)
    k_at = {} if scores.q_at is None else job.key_positions(plan, q.device)

    def visit(heads: slice) -> Visit:
        mine = scores.of_heads(heads)

        def run(step: Step, k: Tensor, v: Tensor, grads: _Rows | None) -> None:
            here = replace(mine, k_at=k_at.get(step))
            for calls in step.calls if k.shape[2] else ():
                part = _features(calls, job.recipe, q)
                result, its_lse = kernel.forward(q[:, :, heads, part], k[..., part], v, calls.spans, calls.window, here)
                _store(calls, out[:, :, heads], lse[:, :, heads], result, its_lse.transpose(1, 2).unsqueeze(3))

        return run

    if k.shape[2]:
        kernel = _kernel(job.recipe, q, k, v, extras)
    split = _heads(job.recipe.heads_stride, q.shape[2], k.shape[2], most)
    yield from _staggered([_walk(plan, k[:, :, hk], v[:, :, hk], visit(hq), None) for hq, hk in split])
    if extras.sink is not None:  # one more key, without a value
        sink = extras.sink.to(exact).view(-1, 1)
        out *= torch.sigmoid(lse - sink).nan_to_num_(nan=0.0)  # -inf less -inf: there is nothing
        lse = torch.logaddexp(lse, sink)
    return out.to(q.dtype), lse.squeeze(3).transpose(1, 2).contiguous()


def _features(calls: Calls, recipe: Recipe, q: Tensor) -> slice:
    """The features of q and k that make the scores of some calls."""
    width = q.shape[3] // recipe.parts
    return slice(calls.part * width, (calls.part + 1) * width)


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
Gradients = Generator[Exchange, Wait, tuple[Tensor | None, ...]]


def _backward(
    job: _Job, plan: RankPlan, d_lse: Tensor | None, saved: Saved, kept: Saved, extras: _Extras, d_bias: bool
) -> Gradients:
    """One rank's backward walk over ``d_out, q, k, v, out, lse``: dq, dk, dv, d_bias and d_sink of its rows, None where not there.

    With what the forward walk `kept`, all but d_out are empty and tell shapes only.
    """
    if job.inner == 1:
        dq, dk, dv, *rest = yield from _differentiate_attend(job, plan, d_lse, saved, extras, d_bias, saved[2].shape[2])
        assert dq is not None and dk is not None and dv is not None
        return dq.to(saved[1].dtype), torch.empty_like(saved[2]).copy_(dk), torch.empty_like(saved[3]).copy_(dv), *rest
    d_out, q, k, v, _, _ = saved
    heads, bias, sink = q.shape[2], extras.bias, extras.sink
    q_team, k_team = job.teams(plan, heads, k.shape[2])
    d_lse = torch.zeros_like(d_out[..., 0], dtype=_exact(q.dtype)).mT if d_lse is None else d_lse  # others may have one
    packs = [Pack(q_team, "q", [d_out]), Pack(q_team, "q", [d_lse.mT.unsqueeze(3)])]
    came = yield from to_heads(packs)
    (d_mine,), (column,) = (pack.split(rows) for pack, rows in zip(packs, came, strict=True))
    d_lse = column.squeeze(3).mT
    (mine,), (keys, values) = Pack(q_team, "q", [q]).split(kept[0]), Pack(k_team, "k", [k, v]).split(kept[1])
    extras, more = _of_share(extras, q_team, heads)
    extras = _with_bias(extras, more, kept[4:])
    read = (d_mine, mine, k_team.repeat(keys), k_team.repeat(values), *kept[2:4])
    dq, dk, dv, d_rows, d_logits = yield from _differentiate_attend(job, plan, d_lse, read, extras, d_bias, k_team.most)
    assert dq is not None and dk is not None and dv is not None
    wire = job.wire(k.dtype) if k_team.shared else k.dtype
    packs = [Pack(q_team, "q", [dq.to(q.dtype)]), Pack(k_team, "k", [k_team.add_repeats(x).to(wire) for x in (dk, dv)])]
    if d_rows is not None:
        packs.append(Pack(q_team, "q", [d_rows.permute(1, 0, 2).unsqueeze(0)]))
    (dq,), (dk, dv), *d_biases = yield from to_tokens(packs, [heads, k.shape[2], heads][: len(packs)])
    if bias is not None and d_biases:
        d_rows = d_biases[0][0].squeeze(0).permute(1, 0, 2)
        d_rows = d_rows.sum(0, keepdim=True) if bias.shape[0] == 1 else d_rows
    if sink is not None and d_logits is not None:  # of the own heads; the others' are with their ranks
        d_sink = torch.zeros_like(sink, dtype=d_logits.dtype)
        d_sink[slice(*q_team.share.q)] = d_logits
        d_logits = d_sink
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_rows, d_logits


def _differentiate_attend(
    job: _Job, plan: RankPlan, d_lse: Tensor | None, saved: Saved, extras: _Extras, wants_bias: bool, most: int
) -> Gradients:
    """The walk that undoes `_attend`: dq, dk, dv, d_bias and d_sink in the dtype of partial results."""
    d_out, q, k, v, out, lse = saved
    exact = _exact(q.dtype)
    dq, homes, walks = torch.zeros_like(q, dtype=exact), [], []
    d_bias = torch.zeros_like(extras.bias, dtype=exact) if wants_bias and extras.bias is not None else None
    scores = job.scores(plan, extras, q.device)
    k_at = {} if scores.q_at is None else job.key_positions(plan, q.device)

    def visit(heads: slice) -> Visit:
        mine = scores.of_heads(heads)
        whole = d_bias is None or d_bias.shape[0] == 1
        bias = d_bias if whole or d_bias is None else d_bias[heads]

        def run(step: Step, k: Tensor, v: Tensor, grads: _Rows | None) -> None:
            assert grads is not None
            here = replace(mine, k_at=k_at.get(step))
            read = (out[:, :, heads], d_out[:, :, heads], lse[:, heads])
            of_lse = None if d_lse is None else d_lse[:, heads]
            for calls in step.calls if k.shape[2] else ():
                part = _features(calls, job.recipe, q)
                sums = (dq[:, :, heads, part], grads.k[..., part], grads.v)
                grad = Grad(q[:, :, heads, part], *read, *sums, job.recipe.deterministic, bias, of_lse)
                kernel.differentiate(grad, k[..., part], v, calls.spans, calls.window, here)

        return run

    if k.shape[2]:
        kernel = _kernel(job.recipe, q, k, v, extras, d_lse)
    for hq, hk in _heads(job.recipe.heads_stride, q.shape[2], k.shape[2], most):
        home = _Rows.make(k.shape[1], k[:, :, hk], v[:, :, hk], exact)
        home.data.zero_()
        homes.append(home)
        walks.append(_walk(plan, k[:, :, hk], v[:, :, hk], visit(hq), home, job.wire(k.dtype)))
    yield from _staggered(walks)
    dk, dv = [home.k for home in homes], [home.v for home in homes]
    d_sink = None if extras.sink is None else _of_sink(extras.sink, d_lse, d_out, out, lse)
    return (dq, dk[0], dv[0], d_bias, d_sink) if len(homes) == 1 else (dq, torch.cat(dk, 2), torch.cat(dv, 2), d_bias, d_sink)


def _of_sink(sink: Tensor, d_lse: Tensor | None, d_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient ``[Hq]`` of the logits of keys without values."""
    exact = lse.dtype
    delta = (d_out.to(exact) * out.to(exact)).sum(3).transpose(1, 2)
    weight = torch.exp(sink.to(exact).view(-1, 1) - lse).nan_to_num_(nan=0.0)
    return (weight * ((0.0 if d_lse is None else d_lse) - delta)).sum((0, 2))


# -- the ops -------------------------------------------------------------------------------------------------------------------

_TABLES = "Tensor? cu_q, Tensor? cu_k, Tensor? slices, Tensor? alibi, Tensor? bias, Tensor? sink"
_ATTENTION = f"{_TABLES}, SymInt total_q, SymInt total_k, float scale, int seed, str recipe"


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
    alibi: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    total_q: int,
    total_k: int,
    scale: float,
    seed: int,
    recipe: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """This rank's part of attention over a sequence that a group of ranks holds.

    Args:
        q, k, v: own rows ``[B, Lq, Hq, D]``, ``[B, Lk, Hk, D]``, ``[B, Lk, Hk, Dv]`` in the recipe's layout; the whole sequence
            in natural order for a ``local:N`` group.
        cu_q, cu_k: boundaries of packed documents over the whole sequence, or None.
        slices: a mask as int64 ``[n, 7]`` band slices, each with its part, or None for the recipe's.
        alibi: ALiBi slopes ``[B or 1, Hq]``, fp32, or None.
        bias: what is added to the scores, ``[Hq or 1, Lq, total_k]``: rows with q, keys in natural order; or None.
        sink: logits ``[Hq]`` of keys without values, or None.
        total_q, total_k: tokens of the whole sequence.
        scale: factor of the scores.
        seed: of dropout.
        recipe: a `Recipe` as a string.

    Returns:
        out ``[B, Lq, Hq, Dv]`` in q's dtype; lse ``[B, Hq, Lq]``, natural log, fp32 (float64 for float64); where ranks exchange
        tokens for heads, what the backward pass reads instead of q, k, v, out and lse.
    """
    job = _job(Recipe.parse(recipe), (total_q, total_k), (cu_q, cu_k, slices), scale, seed)
    _check_rows(job, q, k)
    qs, (ks, vs) = job.shards(q, job.q_layout), (job.shards(x, job.k_layout) for x in (k, v))
    by_rank = zip(job.plans, qs, ks, vs, _extras(job, alibi, bias, sink), strict=True)
    with torch.autocast(q.device.type, enabled=False):  # partial results are of the dtypes said here
        results = job.transport.run([_forward(job, *rank) for rank in by_rank])
    out, lse, kept = zip(*results, strict=True)
    return job.whole(out, job.q_layout), job.whole(lse, job.q_layout, dim=2), [x for each in kept for x in each]


def _extras(job: _Job, alibi: Tensor | None, bias: Tensor | None, sink: Tensor | None) -> list[_Extras]:
    """The extras of each rank that this process drives."""
    biases = [None] * len(job.plans) if bias is None else job.shards(bias, job.q_layout)
    return [_Extras(alibi, each, sink) for each in biases]


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
    cu_q, cu_k, _, _, bias, _, total_q, total_k, _, _, text = rest
    recipe = Recipe.parse(text)
    transport = transport_of(recipe.group)
    inner, kept = _inner(recipe, transport), list[Tensor]()
    for rank in transport.ranks if inner > 1 else ():
        share = deal(int(q.shape[2]), int(k.shape[2]), inner)[rank % inner]
        heads, heads_k = share.q[1] - share.q[0], share.k[1] - share.k[0]
        q_rows = _held(recipe, transport, inner, rank, total_q, cu_q)
        k_rows = _held(recipe, transport, inner, rank, total_k, cu_q if cu_k is None else cu_k)
        kept += [
            q.new_empty(q_rows, q.shape[0], heads * q.shape[3]),
            k.new_empty(k_rows, k.shape[0], heads_k * (k.shape[3] + v.shape[3])),
            q.new_empty(q.shape[0], q_rows, heads, v.shape[3]),
            q.new_empty((q.shape[0], heads, q_rows), dtype=_exact(q.dtype)),
        ]
        kept += [] if bias is None else [bias.new_empty(q_rows, 1, heads * total_k)]
    return kept


def _held(recipe: Recipe, transport: Transport, inner: int, rank: int, total: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of a rank's team, or of the rank where `inner` is 1; documents are looked at only if the layout needs them."""
    if inner == transport.world_size:
        return total
    cu = content(cu_seqlens) if looks_at_documents(recipe.layout) else None
    return int(teams(layout_of(recipe.layout, int(total), transport.world_size, cu), inner).counts[rank // inner])


_SAVED = "Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept"


@torch.library.custom_op(
    "nnscaler_ring::attention_backward", mutates_args=(), schema=f"({_SAVED}, {_ATTENTION}, bool wants_bias) -> Tensor[]"
)
def attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    slices: Tensor | None,
    alibi: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    total_q: int,
    total_k: int,
    scale: float,
    seed: int,
    recipe: str,
    wants_bias: bool,
) -> list[Tensor]:
    """dq, dk and dv of `attention`, from its result over all keys and its log-sum-exp; each call recomputes its weights.

    With `wants_bias` d_bias follows, with a sink d_sink, over this rank's queries.
    """
    job = _job(Recipe.parse(recipe), (total_q, total_k), (cu_q, cu_k, slices), scale, seed)
    ranks = range(len(job.plans))
    d_lses = [None for _ in ranks] if d_lse is None else job.shards(d_lse, job.q_layout, dim=2)
    saved = [job.shards(d_out, job.q_layout)]
    if kept:  # shapes are all that is needed of the rest
        saved += [[x] * len(ranks) for x in (q, k, v, out, lse)]
    else:
        saved += [job.shards(q, job.q_layout), *(job.shards(x, job.k_layout) for x in (k, v))]
        saved += [job.shards(out, job.q_layout), job.shards(lse, job.q_layout, dim=2)]
    own, extras = len(kept) // len(ranks), _extras(job, alibi, bias, sink)
    walks = [
        _backward(job, job.plans[n], d_lses[n], [x[n] for x in saved], kept[n * own : n * own + own], extras[n], wants_bias)
        for n in ranks
    ]
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, d_bias, d_sink = zip(*job.transport.run(walks), strict=True)
    grads = [job.whole(dq, job.q_layout), job.whole(dk, job.k_layout), job.whole(dv, job.k_layout)]
    if wants_bias and bias is not None:
        grads.append(job.whole(d_bias, job.q_layout).to(bias.dtype))
    if sink is not None:
        grads.append(torch.stack(d_sink).sum(0).to(sink.dtype))
    return grads


@attention_backward.register_fake
def _(d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
    kept, cu_q, cu_k, _, _, bias, sink, _, total_k, _, _, text, wants_bias = rest
    grads = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
    if kept:
        recipe = Recipe.parse(text)
        transport, cu_k = transport_of(recipe.group), cu_q if cu_k is None else cu_k
        local = isinstance(transport, LocalTransport)
        keys = total_k if local else _held(recipe, transport, 1, transport.ranks[0], total_k, cu_k)
        rows = (d_out.shape[1], keys, keys)
        grads = [x.new_empty(x.shape[0], n, *x.shape[2:]) for x, n in zip((q, k, v), rows, strict=True)]
    grads += [torch.empty_like(bias)] if wants_bias and bias is not None else []
    return grads + ([] if sink is None else [torch.empty_like(sink)])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, *tables = inputs[:9]
    out, lse, kept = output
    read = [q, k, v, out, lse]
    if kept:
        read = [x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in read]
    ctx.save_for_backward(*read, *tables, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.rest = inputs[9:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    none: list[Tensor | None] = [None] * 14
    if d_out is None and d_lse is None:
        return tuple(none)
    saved = ctx.saved_tensors  # once: under activation checkpointing this computes them anew
    q, k, v, out, lse, *tables, alibi, bias, sink = saved[:11]
    if d_out is None:
        assert d_lse is not None
        rows = d_lse.shape[2]
        d_out = q.new_zeros(q.shape[0], rows, q.shape[2], v.shape[3])
    wants_bias = bias is not None and ctx.needs_input_grad[7]
    read = (d_out, d_lse, q, k, v, out, lse, list(saved[11:]))
    dq, dk, dv, *rest = attention_backward(*read, *tables, alibi, bias, sink, *ctx.rest, wants_bias)
    none[:3] = dq, dk, dv
    none[7] = rest.pop(0) if wants_bias else None
    none[8] = rest.pop(0) if sink is not None else None
    return tuple(none)


attention.register_autograd(_differentiate, setup_context=_save)
