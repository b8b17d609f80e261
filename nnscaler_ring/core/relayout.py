"""Moving rows between layouts: into zigzag and back inside an op, and from shards to the whole and back at a model's edge.

Two custom ops of torch over the transports: `relayout`, whose gradient is the way back, and `gather`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, library

from .agree import asked, check_alike
from .device import on_device
from .layout import PACKINGS, Layout
from .layouts import shown
from .recipe import content, layout_of
from .transport import Exchange, Transport, Walk, rank_in, transport_of


@lru_cache(maxsize=PACKINGS)
def _moves(source: Layout, target: Layout, rank: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows to send to each rank and rows to fill from each rank, both in the order of the receiver's rows."""
    peer, row = target.owner()
    here = source.positions(rank)
    send = [np.flatnonzero(peer[here] == p) for p in range(source.world_size)]
    send = [rows[np.argsort(row[here[rows]])] for rows in send]
    came_from = source.owner()[0][target.positions(rank)]
    return send, [np.flatnonzero(came_from == p) for p in range(source.world_size)]


def _relayout(source: Layout, target: Layout, rank: int, tensors: Sequence[Tensor]) -> Walk:
    """One rank's walk that moves its rows of each ``[B, L, ...]`` tensor to the ranks that hold them in `target`."""
    send, receive = _moves(source, target, rank)
    moved = [x.new_empty((x.shape[0], int(target.counts[rank]), *x.shape[2:])) for x in tensors]
    outbox, inbox = [], []
    pick, fill = (_indices(rows, tensors[0].device) for rows in (send, receive))
    for x in tensors:
        outbox.append([x.index_select(1, rows) for rows in pick])
        inbox.append([x.new_empty((x.shape[0], len(rows), *x.shape[2:])) for rows in receive])
    others = [p for p in range(source.world_size) if p != rank]
    wait = yield Exchange(
        [(p, box[p]) for box in outbox for p in others if box[p].numel()],
        [(p, box[p]) for box in inbox for p in others if box[p].numel()],
        tensors[0].device,
    )
    wait()
    for whole, arrived, own in zip(moved, inbox, outbox, strict=True):
        for p, rows in enumerate(fill):
            whole.index_copy_(1, rows, own[p] if p == rank else arrived[p])
    return moved


def _indices(rows: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Rows of each rank as tensors on a device, copied together."""
    return on_device(np.concatenate(rows), device).split([len(each) for each in rows])


def relayout(
    tensors: Sequence[Tensor], cu_seqlens: Tensor | None, total: int, source: str, target: str, group: str
) -> list[Tensor]:
    """Move the rows (dim 1) of ``[B, L, ...]`` shards from layout `source` to layout `target`, over a process group.

    Args:
        tensors: shards in the source layout; all travel in one exchange.
        cu_seqlens: document boundaries for the layouts that cut each document.
        total: tokens of the whole sequence.
        source, target: names in `layouts.LAYOUTS`, or strings of `layouts.name_of`.
        group: name of the process group.
    """
    moved: list[Tensor] = _relaid(tensors, cu_seqlens, total, source, target, group, rank_in(group))
    return moved


@library.custom_op(
    "nnscaler_ring::relayout",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor? cu_seqlens, SymInt total, str source, str target, str group, int rank) -> Tensor[]",
)
def _relaid(
    tensors: Sequence[Tensor], cu_seqlens: Tensor | None, total: int, source: str, target: str, group: str, rank: int
) -> list[Tensor]:
    """`relayout`; `rank` is there for graphs alone, whose shapes depend on it, as in `Recipe`."""
    transport = transport_of(group)
    if transport.inner > 1:
        raise ValueError(f"relayout from {source!r} to {target!r} over a grid: ranks of different teams and places share no group")
    cu = content(cu_seqlens)
    before = _held(transport, tensors, cu, total, (source, target))
    after = layout_of(target, total, transport.world_size, cu)
    (moved,) = transport.run([_relayout(before, after, transport.ranks[0], tensors)])
    return moved


def _held(transport: Transport, tensors: Sequence[Tensor], cu: bytes | None, total: int, names: Sequence[str]) -> Layout:
    """The layout of the first of these names, of which the tensors must be this rank's shards; ValueError where they are not."""
    held, (rank,) = layout_of(names[0], total, transport.world_size, cu), transport.ranks
    wrong = next((x.shape[1] for x in tensors if x.shape[1] != held.counts[rank]), None)
    if asked():
        shapes = [(x.shape[0], *x.shape[2:], x.dtype) for x in tensors]
        facts = {"batch, heads, head dims or dtype": shapes, "layout": names, "seq_len": total, "cu_seqlens": cu}
        facts |= {"whether their tokens are as many as the layout gives": wrong is None}
        check_alike(transport, "what moves tokens between layouts", facts, tensors[0].device)
    if wrong is not None:
        raise ValueError(f"rank {rank} passed {wrong} tokens; {shown(names[0])} of {total} tokens gives it {held.counts[rank]}")
    return held


@_relaid.register_fake
def _(
    tensors: Sequence[Tensor], cu_seqlens: Tensor | None, total: int, source: str, target: str, group: str, rank: int
) -> list[Tensor]:
    if isinstance(total, torch.SymInt):  # so many shards like this one, which without documents every layout can hold
        return [torch.empty_like(x) for x in tensors]
    rows = layout_of(target, total, transport_of(group).world_size, content(cu_seqlens)).counts[rank]
    return [x.new_empty((x.shape[0], int(rows), *x.shape[2:])) for x in tensors]


def _save_relayout(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, cu_seqlens, ctx.total, ctx.source, ctx.target, *ctx.where = inputs
    ctx.save_for_backward(cu_seqlens)


def _undo_relayout(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    back = _relaid(grads, *ctx.saved_tensors, ctx.total, ctx.target, ctx.source, *ctx.where)
    return back, *[None] * 6


_relaid.register_autograd(_undo_relayout, setup_context=_save_relayout)


def _gather(layout: Layout, inner: int, rank: int, x: Tensor) -> Walk:
    """One rank's walk that gets every rank's rows of ``[B, L, ...]`` and puts them in natural order.

    In a grid teams of `inner` ranks gather first, then ranks of one place in each team.
    """
    first, place = rank // inner * inner, rank % inner
    team = {p: int(layout.counts[p]) for p in range(first, first + inner)}
    others = {p + place: int(layout.counts[p : p + inner].sum()) for p in range(0, layout.world_size, inner)}
    for counts in (team, others):
        own = x.contiguous()
        parts = {p: own if p == rank else x.new_empty((x.shape[0], n, *x.shape[2:])) for p, n in counts.items()}
        filled = {p: part for p, part in parts.items() if p != rank and part.numel()}
        wait = yield Exchange([(p, own) for p in counts if p != rank and own.numel()], list(filled.items()), x.device)
        wait()
        x = torch.cat(list(parts.values()), dim=1)
    order = np.concatenate([layout.positions(p) for p in range(layout.world_size)])
    return x.index_select(1, on_device(np.argsort(order), x.device))


_GATHER = "(Tensor x, Tensor? cu_seqlens, SymInt total, str layout, str group) -> Tensor"


@library.custom_op("nnscaler_ring::gather", mutates_args=(), schema=_GATHER)
def gather(x: Tensor, cu_seqlens: Tensor | None, total: int, layout: str, group: str) -> Tensor:
    """The whole ``[B, total, ...]`` in natural order on every rank, from each rank's rows ``[B, L, ...]``.

    The gradient of a rank's rows is that of the same rows in its own whole tensor: every rank is taken to do the same with it, as
    ``DTensor.full_tensor`` takes it.
    """
    transport = transport_of(group)
    held = _held(transport, [x], content(cu_seqlens), total, (layout,))
    (whole,) = transport.run([_gather(held, transport.inner, transport.ranks[0], x)])
    return whole


@gather.register_fake
def _(x: Tensor, cu_seqlens: Tensor | None, total: int, layout: str, group: str) -> Tensor:
    return x.new_empty((x.shape[0], total, *x.shape[2:]))


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cu_seqlens, ctx.total, ctx.layout, ctx.group = inputs
    ctx.save_for_backward(cu_seqlens)


def _own_rows(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    transport = transport_of(ctx.group)
    held = layout_of(ctx.layout, ctx.total, transport.world_size, content(*ctx.saved_tensors))
    return grad.index_select(1, on_device(held.positions(transport.ranks[0]), grad.device)), None, None, None, None


gather.register_autograd(_own_rows, setup_context=_save_gather)
