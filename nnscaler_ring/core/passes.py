"""What one rank does, forward and backward: a plan made concrete, and the kernel calls of each step of its walk.

The forward pass merges results, the backward pass adds up gradients; `walk` brings the rows and takes the gradients home.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .device import on_device, sum_dtype
from .heads import Pack, to_heads, to_tokens
from .held import at_once
from .kernels import Case, Grad, Kernel, Scores
from .layout import Layout
from .merge import Results, empty_lse
from .plan import ALL_TO_ALL, plan
from .recipe import Recipe, content, layout_of, mask_of
from .scaling import Shape, machine_of, row_transport
from .steps import RankPlan, Step, among
from .sums import Whole
from .teams import Team, team_of, teams
from .transport import Exchange, LocalTransport, Transport, Wait, transport_of
from .walk import KVSums, Visit, Wire, staggered, walk


@dataclass(frozen=True, eq=False)
class Job:
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

    def teams(self, plan: RankPlan, heads: int, heads_k: int) -> tuple[Team, Team]:
        """With whom a rank exchanges its queries, and its keys and values, for heads."""
        q, k = (team_of(rows, self.inner, plan.rank, heads, heads_k) for rows in (self.q_layout, self.k_layout))
        return q, k

    def keeps(self, plan: RankPlan) -> bool:
        """What came for the forward pass is kept for the backward pass."""
        return self.recipe.keeps and plan.keeps and self.inner == 1

    def scores(self, plan: RankPlan, extras: Extras, device: torch.device) -> Scores:
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
        q_at, ahead = (on_device(x, device) for x in (at, self._ahead(at)))
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
        whole = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        return dict(zip(steps, on_device(whole, device).split([len(at) for at in found]), strict=True))


@dataclass(frozen=True, eq=False)
class Extras:
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
    return on_device(rows.positions(rank), device)


def inner_of(recipe: Recipe, transport: Transport) -> int:
    """How many ranks exchange tokens for heads; 1 for none."""
    return transport.world_size if recipe.transport == ALL_TO_ALL else transport.inner


def job_of(
    recipe: Recipe,
    total: tuple[int, int],
    tables: Sequence[Tensor | None],
    qkv: Sequence[Tensor],
    scale: float,
    seed: int = 0,
    backward: bool = False,
) -> Job:
    """The job of one pass over the sequence; of q, k and v only shapes and dtypes count, by which ``auto`` chooses."""
    transport = transport_of(recipe.group)
    inner = inner_of(recipe, transport)
    cu_q, cu_k, slices = (content(table) for table in tables)
    seen = mask_of(recipe, *total, cu_q, cu_k, slices)
    q_layout = layout_of(recipe.layout, total[0], transport.world_size, cu_q)
    k_layout = layout_of(recipe.layout, total[1], transport.world_size, cu_q if cu_k is None else cu_k)
    held = teams(q_layout, inner), teams(k_layout, inner)
    way = "auto" if recipe.transport == ALL_TO_ALL else recipe.transport
    if way == "auto":
        shape, world = shape_of(recipe, *qkv), transport.world_size
        way = row_transport(seen, held, shape, machine_of(qkv[0].device.type, world), backward)
    plans = [among(plan(seen, *held, way, rank // inner), inner, rank % inner) for rank in transport.ranks]
    return Job(recipe, transport, inner, plans, q_layout, k_layout, scale, seed, (cu_q, cu_k))


def shape_of(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor) -> Shape:
    """The layer of q, k and v, ``[B, L, H, D]`` or packed ``[T, H, D]``, as `scaling` takes it."""
    sizes = {"heads": q.shape[-2], "heads_k": k.shape[-2], "dim": q.shape[-1], "dim_v": v.shape[-1]}
    batch, gradient = q.shape[0] if q.dim() == 4 else 1, recipe.wire(q.dtype).itemsize
    once = gradient if recipe.reduce_dtype else q.dtype.itemsize
    return Shape(**sizes, batch=batch, element=q.dtype.itemsize, gradient=gradient, once=once)


def _heads(stride: int, heads: int, heads_k: int, most: int) -> list[tuple[slice, slice]]:
    """Query and key heads that are computed together, `stride` key heads at a time (0: all), as slices.

    As many as the rank with `most` key heads has, the last ones empty if need be: all ranks make the same number of exchanges.
    """
    group, stride = heads // max(heads_k, 1), stride or max(most, 1)
    cuts = [min(n, heads_k) for n in (*range(0, max(most, 1), stride), most)]
    return [(slice(lo * group, hi * group), slice(lo, hi)) for lo, hi in pairwise(cuts)]


def kernel_for(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, bool] = MappingProxyType({})) -> Kernel:
    """The backend for q, k and v and for the `extras` that are there; NotImplementedError that says what each lacks for them."""
    features = {"softcap": bool(recipe.softcap), "dropout": bool(recipe.dropout), **extras}
    names = frozenset(name for name, there in features.items() if there)
    sizes = (q.shape[-1] // recipe.parts, v.shape[-1], q.shape[-2], k.shape[-2])
    return kernels.choose(recipe.kernel, Case(q.device.type, q.dtype, *sizes, recipe.deterministic, names))


def _kernel(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: Extras, d_lse: bool = False) -> Kernel:
    return kernel_for(recipe, q, k, v, {"alibi": extras.alibi is not None, "bias": extras.bias is not None, "d_lse": d_lse})


def wire_of(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Wire:
    """How gradients of keys and values travel: without loss, also where some ranks have a gradient of the log-sum-exp, for which
    they may call another kernel; no rank knows of the others."""
    sums, able = recipe.wire(k.dtype), [_kernel(recipe, q, k, v, extras)]
    with suppress(NotImplementedError):  # else no rank has such a gradient
        able.append(_kernel(recipe, q, k, v, extras, d_lse=True))
    rounds = k.dtype != sum_dtype(k.dtype) and all(kernel.rounds for kernel in able)
    once = k.dtype if rounds and not recipe.reduce_dtype else sums
    return Wire(sums, once, given=rounds and once == k.dtype)


Forward = Generator[Exchange, Wait, tuple[Tensor, Tensor, list[Tensor]]]


def forward(job: Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Forward:
    """One rank's forward walk: out ``[B, Lq, Hq, Dv]`` and lse ``[B, Hq, Lq]`` of its rows, and what `backward` is to get back."""
    if job.inner == 1:
        return (yield from _attend(job, plan, q, k, v, extras, k.shape[2]))
    q_team, k_team = job.teams(plan, q.shape[2], k.shape[2])
    packs = [Pack(q_team, "q", [q]), Pack(k_team, "k", [k, v])]
    extras, more = _of_share(extras, q_team, q.shape[2])
    kept = yield from to_heads([*packs, *more])
    (mine,), (keys, values) = (pack.split(rows) for pack, rows in zip(packs, kept, strict=False))
    extras = _with_bias(extras, more, kept[2:])
    out, lse, _ = yield from _attend(job, plan, mine, k_team.repeat(keys), k_team.repeat(values), extras, k_team.most)
    column = lse.transpose(1, 2).unsqueeze(3)
    (all_out,), (all_lse,) = yield from to_tokens([Pack(q_team, "q", [x]) for x in (out, column)])
    return all_out, all_lse.squeeze(3).transpose(1, 2).contiguous(), [*kept[:2], out, lse, *kept[2:]]


def _of_share(extras: Extras, team: Team, heads: int) -> tuple[Extras, list[Pack]]:
    """The extras of a rank's share of heads; a bias, whose rows lie with the queries, travels with them as ``[1, L, Hq, T]``."""
    first, end = team.share.q
    alibi = None if extras.alibi is None else extras.alibi[:, first:end]
    sink = None if extras.sink is None else extras.sink[first:end]
    made = Extras(alibi, None, sink, extras.head0 + first)
    if extras.bias is None:
        return made, []
    return made, [Pack(team, "q", [extras.bias.expand(heads, -1, -1).permute(1, 0, 2).unsqueeze(0)])]


def _with_bias(extras: Extras, packs: Sequence[Pack], rows: Sequence[Tensor]) -> Extras:
    """The extras with the bias of the share, ``[h, rows, T]``, where one has come."""
    if not packs:
        return extras
    ((bias,),) = (pack.split(x) for pack, x in zip(packs, rows, strict=True))
    return replace(extras, bias=bias.squeeze(0).permute(1, 0, 2))


def _attend(job: Job, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, extras: Extras, most: int) -> Forward:
    """The walk over key/value rows: out and lse of q's rows, and what is kept; `most` is the most key heads of a rank."""
    exact = sum_dtype(q.dtype)
    again = plan.num_results > at_once(q.device.type)  # merged into what was merged before: in fp32, sums of weights in float64
    end = q.dtype if extras.sink is None else exact
    dtype = exact if again else end
    summed = torch.float64 if again and q.device.type != "xpu" else exact  # not every XPU has it
    scores = replace(job.scores(plan, extras, q.device), merged=plan.num_merges > 0)
    k_at = {} if scores.q_at is None else job.key_positions(plan, q.device)
    split = _heads(job.recipe.heads_stride, q.shape[2], k.shape[2], most)
    come = sum(plan.results.values(), np.zeros(plan.q_rows, dtype=np.int32))
    joined = [] if len(split) == 1 else [q.new_empty((*q.shape[:3], v.shape[3]), dtype=end), empty_lse(q, summed)]
    found = []
    for hq, _ in split:
        into, lse = (x[:, :, hq] for x in joined) if joined else (None, None)
        found.append(Results(q[:, :, hq], v.shape[3], end, dtype, summed, into=into, lse=lse, come=come))

    def visit(n: int) -> Visit:
        heads, results = split[n][0], found[n]
        mine = scores.of_heads(heads)

        def run(step: Step, k: Tensor, v: Tensor, grads: KVSums | None) -> None:
            here = replace(mine, k_at=k_at.get(step)) if k_at else mine
            for calls in step.calls if len(q) and k.shape[2] else ():
                part = _features(calls.part, job.recipe, q)
                rows, keys = q[:, :, heads, part], k[..., part]
                kernel.merge(results, rows, keys, v, calls.spans, calls.window, here)

        return run

    if k.shape[2]:
        kernel = _kernel(job.recipe, q, k, v, extras)
    kept: list[list[Tensor] | None] = [[] if job.keeps(plan) else None for _ in split]
    walks = [walk(plan, k[:, :, hk], v[:, :, hk], visit(n), None, None, kept[n]) for n, (_, hk) in enumerate(split)]
    yield from staggered(walks)
    ends = [results.result() for results in found]
    out, lse = joined or (ends[0], found[0].lse)
    if extras.sink is not None:  # one more key, without a value
        sink = extras.sink.to(exact).view(-1, 1)
        out *= torch.sigmoid(_less(lse, sink))
        lse = torch.logaddexp(lse, sink)
    lse = lse.to(exact).squeeze(3).transpose(1, 2).contiguous()
    return out.to(q.dtype), lse, [buffer for each in kept for buffer in each or ()]


def _less(one: Tensor, other: Tensor) -> Tensor:
    """A difference of log-sum-exps; -inf, not NaN, where both are -inf: neither has seen a key."""
    return (one - other).masked_fill_((one == other) & (one == float("-inf")), float("-inf"))


def _features(part: int, recipe: Recipe, q: Tensor) -> slice:
    """The features of q and k that make the scores of a part."""
    width = q.shape[3] // recipe.parts
    return slice(part * width, (part + 1) * width)


Saved = Sequence[Tensor]
Gradients = Generator[Exchange, Wait, tuple[Tensor | None, ...]]


def backward(job: Job, plan: RankPlan, d_lse: Tensor | None, saved: Saved, kept: Saved, extras: Extras, d_bias: bool) -> Gradients:
    """One rank's backward walk over ``d_out, q, k, v, out, lse``: dq, dk, dv, d_bias and d_sink of its rows, None where not there.

    `kept` are the rows that came, which need not come again; where ranks share heads it is all that is read: of `saved` then only
    d_out has content, the rest have shapes alone.
    """
    if job.inner == 1:
        return (yield from _differentiate_attend(job, plan, d_lse, saved, extras, d_bias, saved[2].shape[2], kept))
    d_out, q, k, v, _, _ = saved
    heads, bias, sink = q.shape[2], extras.bias, extras.sink
    q_team, k_team = job.teams(plan, heads, k.shape[2])
    packs = [Pack(q_team, "q", [d_out])]
    if job.recipe.returns_lse:  # others may have a gradient of it
        d_lse = torch.zeros_like(d_out[..., 0], dtype=sum_dtype(q.dtype)).mT if d_lse is None else d_lse
        packs.append(Pack(q_team, "q", [d_lse.mT.unsqueeze(3)]))
    came = yield from to_heads(packs)
    (d_mine,), *columns = (pack.split(rows) for pack, rows in zip(packs, came, strict=True))
    d_lse = columns[0][0].squeeze(3).mT if columns else None
    (mine,), (keys, values) = Pack(q_team, "q", [q]).split(kept[0]), Pack(k_team, "k", [k, v]).split(kept[1])
    extras, more = _of_share(extras, q_team, heads)
    extras = _with_bias(extras, more, kept[4:])
    read = (d_mine, mine, k_team.repeat(keys), k_team.repeat(values), *kept[2:4])
    dq, dk, dv, d_rows, d_logits = yield from _differentiate_attend(job, plan, d_lse, read, extras, d_bias, k_team.most)
    assert dq is not None and dk is not None and dv is not None
    wire = job.recipe.wire(k.dtype) if k_team.shared or job.recipe.reduce_dtype else k.dtype
    packs = [Pack(q_team, "q", [dq]), Pack(k_team, "k", [k_team.add_repeats(x).to(wire) for x in (dk, dv)])]
    if d_rows is not None:
        packs.append(Pack(q_team, "q", [d_rows.permute(1, 0, 2).unsqueeze(0)]))
    (dq,), (dk, dv), *d_biases = yield from to_tokens(packs)
    if bias is not None and d_biases:
        d_rows = d_biases[0][0].squeeze(0).permute(1, 0, 2)
        d_rows = d_rows.sum(0, keepdim=True) if bias.shape[0] == 1 else d_rows
    if sink is not None and d_logits is not None:  # of the own heads; the others' are with their ranks
        d_sink = torch.zeros_like(sink, dtype=d_logits.dtype)
        d_sink[slice(*q_team.share.q)] = d_logits
        d_logits = d_sink
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_rows, d_logits


def _differentiate_attend(
    job: Job,
    plan: RankPlan,
    d_lse: Tensor | None,
    saved: Saved,
    extras: Extras,
    wants_bias: bool,
    most: int,
    kept: Saved = (),
) -> Gradients:
    """The walk that undoes `_attend`: dq, dk, dv, d_bias and d_sink; dk and dv are not yet rounded where ranks share heads."""
    d_out, q, k, v, out, lse = saved
    exact = sum_dtype(q.dtype)
    d_bias = torch.zeros_like(extras.bias, dtype=exact) if wants_bias and extras.bias is not None else None
    scores = job.scores(plan, extras, q.device)
    k_at = {} if scores.q_at is None else job.key_positions(plan, q.device)
    split = _heads(job.recipe.heads_stride, q.shape[2], k.shape[2], most)
    features = [_features(n, job.recipe, q) for n in range(job.recipe.parts)]
    of_rows = [plan.results.get(n, np.zeros(plan.q_rows, dtype=np.int32)) for n in range(job.recipe.parts)]
    of_keys = [plan.gradients_home + plan.own_gradients.get(n, 0) for n in range(job.recipe.parts)]
    of_values = sum(plan.own_gradients.values(), plan.gradients_home)
    ends = (k.dtype, v.dtype) if job.inner == 1 else (exact, exact)
    dq = Whole(q, q.dtype, [(hq, each) for hq, _ in split for each in features], of_rows * len(split))
    dk = Whole(k, ends[0], [(hk, each) for _, hk in split for each in features], of_keys * len(split))
    dv = Whole(v, ends[1], [(hk, slice(None)) for _, hk in split], [of_values] * len(split))

    def visit(n: int) -> Visit:
        heads = split[n][0]
        mine = scores.of_heads(heads)
        bias = d_bias if d_bias is None or d_bias.shape[0] == 1 else d_bias[heads]

        def run(step: Step, k: Tensor, v: Tensor, grads: KVSums | None) -> None:
            assert grads is not None
            here = replace(mine, k_at=k_at.get(step)) if k_at else mine
            read = (out[:, :, heads], d_out[:, :, heads], lse[:, heads])
            of_lse = None if d_lse is None else d_lse[:, heads]
            for calls in step.calls if len(q) and k.shape[2] else ():
                part = _features(calls.part, job.recipe, q)
                sums = dq.parts[n * len(features) + calls.part], grads.k[calls.part], grads.v
                plain = q[:, :, heads, part], *read, *sums
                grad = Grad(*plain, deterministic=job.recipe.deterministic, d_bias=bias, d_lse=of_lse)
                kernel.differentiate(grad, k[..., part], v, calls.spans, calls.window, here)

        return run

    wire = Wire(exact, exact)
    if k.shape[2]:
        kernel, wire = _kernel(job.recipe, q, k, v, extras, d_lse is not None), wire_of(job.recipe, q, k, v, extras)
    walks = []
    for n, (_, hk) in enumerate(split):
        home = KVSums(dk.parts[n * len(features) : (n + 1) * len(features)], dv.parts[n])
        walks.append(walk(plan, k[:, :, hk], v[:, :, hk], visit(n), home, wire, [kept[n]] if kept else None))
    yield from staggered(walks)
    d_sink = None if extras.sink is None else _of_sink(extras.sink, d_lse, d_out, out, lse)
    return dq.finish(), dk.finish(), dv.finish(), d_bias, d_sink


def _of_sink(sink: Tensor, d_lse: Tensor | None, d_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient ``[Hq]`` of the logits of keys without values."""
    exact = lse.dtype
    delta = (d_out.to(exact) * out.to(exact)).sum(3).transpose(1, 2)
    weight = torch.exp(_less(sink.to(exact).view(-1, 1), lse))
    return (weight * ((0.0 if d_lse is None else d_lse) - delta)).sum((0, 2))
