"""The one attention of this package, as ops of torch.

A custom op of torch whose arguments are tensors, numbers and strings, so that autograd, ``torch.compile``, checkpointing and
DTensor see one node: `attention`, with `attention_backward`. What it runs is in `passes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor

from .agree import asked, check_alike
from .device import sum_dtype
from .layouts import looks_at_documents, shown
from .passes import Extras, Job, backward, forward, inner_of, job_of, wire_of
from .recipe import Recipe, content, layout_of
from .teams import deal, teams
from .transport import Transport, transport_of


@library.custom_op(
    "nnscaler_ring::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, Tensor? slices, Tensor? alibi, Tensor? bias, Tensor? sink, "
    "SymInt total_q, SymInt total_k, float scale, SymInt seed, str recipe) -> (Tensor, Tensor, Tensor[])",
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
        slices: a mask as int64 ``[n, 6]`` band slices, all of one part, or None for the recipe's.
        alibi: ALiBi slopes ``[B or 1, Hq]``, fp32, or None.
        bias: what is added to the scores, ``[Hq or 1, Lq, total_k]``: rows with q, keys in natural order; or None.
        sink: logits ``[Hq]`` of keys without values, or None.
        total_q, total_k: tokens of the whole sequence.
        scale: factor of the scores.
        seed: of dropout.
        recipe: a `Recipe` as a string.

    Returns:
        out ``[B, Lq, Hq, Dv]`` in q's dtype; lse ``[B, Hq, Lq]``, natural log, fp32 (float64 for float64); what is kept for the
        backward pass: rows that came, or, where ranks exchange tokens for heads, what is read instead of q, k, v, out and lse.
    """
    job = job_of(Recipe.parse(recipe), (total_q, total_k), (cu_q, cu_k, slices), (q, k, v), scale, seed)
    if asked():
        facts = _facts(job, (q, k, v), scale, seed, (cu_q, cu_k, slices, alibi, bias, sink))
        check_alike(job.transport, "attention", facts, q.device)
    _check_rows(job, q, k)
    qs, (ks, vs) = job.shards(q, job.q_layout), (job.shards(x, job.k_layout) for x in (k, v))
    by_rank = zip(job.plans, qs, ks, vs, _extras(job, alibi, bias, sink), strict=True)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):  # partial results are of the dtypes said here
        results = job.transport.run([forward(job, *rank) for rank in by_rank])
    outs, lses, kept = zip(*results, strict=True)
    out, lse = job.whole(outs, job.q_layout), job.whole(lses, job.q_layout, dim=2)
    return _no_view(out), _no_view(lse), [x for each in kept for x in each]


def _no_view(x: Tensor) -> Tensor:
    """The same memory, not as a view of what a kernel made: a view that an op gives out cannot be changed in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride()) if x._is_view() else x


def _extras(job: Job, alibi: Tensor | None, bias: Tensor | None, sink: Tensor | None) -> list[Extras]:
    """The extras of each rank that this process drives."""
    biases = [None] * len(job.plans) if bias is None else job.shards(bias, job.q_layout)
    return [Extras(alibi, each, sink) for each in biases]


def _facts(job: Job, qkv: Sequence[Tensor], scale: float, seed: int, tables: Sequence[Tensor | None]) -> Mapping[str, object]:
    """What ranks that share a sequence must say alike."""
    (q, k, v), alibi, bias = qkv, *tables[3:5]
    broadcast = job.recipe.transport == "broadcast"
    said = {name: value for name, value in asdict(job.recipe).items() if name not in ("group", "rank", "keeps")}
    return {
        "layout": said.pop("layout"),
        "transport": said.pop("transport"),
        "mask": {name: said.pop(name) for name in ("causal", "window", "sinks", "prefix", "far")},
        "softcap or dropout_p": (said.pop("softcap"), said.pop("dropout")),
        "other options": said,
        "seq_len": (job.q_layout.length, job.k_layout.length),
        "cu_seqlens": [None if x is None else x.tolist() for x in tables[:2]],
        # Of llama3's, whose transport is broadcast, a rank knows its own.
        "the slices of their Mask": None if tables[2] is None or broadcast else tables[2].tolist(),
        "whether their slices have keys in common, so that gradients are sums": broadcast and not _once(job),
        "which of alibi_slopes, bias and learnable_sink they pass": [x is not None for x in tables[3:]],
        "dtype of the bias, or whether it has a gradient": bias is not None and (bias.dtype, bias.requires_grad),
        "batch, heads or head dims": [(x.shape[0], *x.shape[2:]) for x in (q, k, v)],
        "dtype": q.dtype,
        "dtypes in which gradients travel, by the kernels that each has": wire_of(job.recipe, q, k, v, Extras(alibi, bias, None)),
        "softmax_scale": scale,
        "dropout_seed, which torch's CPU generator draws where it is not given": seed,
        "whether their tokens are as many as the layout gives": (q.shape[1], k.shape[1]) == _wanted_rows(job),
    }


def _once(job: Job) -> bool:
    """Whether all gradients that travel are what one call gives."""
    return all(m.once for plan in job.plans for step in plan.steps for m in (*step.home_send, *step.home_receive))


def _wanted_rows(job: Job) -> tuple[int, int]:
    """Query and key tokens of this rank, or of the whole sequence where all ranks are in this process."""
    rank, layouts = job.transport.ranks[0], (job.q_layout, job.k_layout)
    num_q, num_k = (x.length if job.local else int(x.counts[rank]) for x in layouts)
    return num_q, num_k


def _check_rows(job: Job, q: Tensor, k: Tensor) -> None:
    """ValueError unless q and k are this rank's shards."""
    rank, world = job.transport.ranks[0], job.transport.world_size
    whole, wanted = (job.q_layout.length, job.k_layout.length), _wanted_rows(job)
    if (q.shape[1], k.shape[1]) != wanted:
        raise ValueError(
            f"rank {rank} of {world} passed {q.shape[1]} query and {k.shape[1]} key tokens in q {tuple(q.shape)} and k "
            f"{tuple(k.shape)}, which are [B, L, H, D]; {shown(job.recipe.layout)} of "
            f"{whole[0]} and {whole[1]} tokens gives it {wanted[0]} and {wanted[1]}: pass the shard that the layout gives, and the "
            "whole lengths, seq_len and seq_len_k, where ranks hold different numbers"
        )


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=sum_dtype(q.dtype))
    return out, lse, _fake_kept(q, k, v, *rest)


def _fake_kept(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    cu_q, cu_k, _, _, bias, _, total_q, total_k, _, _, text = rest
    recipe = Recipe.parse(text)
    transport = transport_of(recipe.group)
    inner, kept = inner_of(recipe, transport), list[Tensor]()
    for rank in transport.ranks if inner > 1 else ():
        share = deal(int(q.shape[2]), int(k.shape[2]), inner)[rank % inner]
        heads, heads_k = share.q[1] - share.q[0], share.k[1] - share.k[0]
        q_rows = _held(recipe, transport, inner, rank, total_q, cu_q)
        k_rows = _held(recipe, transport, inner, rank, total_k, cu_q if cu_k is None else cu_k)
        kept += [
            q.new_empty(q_rows, q.shape[0], heads * q.shape[3]),
            k.new_empty(k_rows, k.shape[0], heads_k * (k.shape[3] + v.shape[3])),
            q.new_empty(q.shape[0], q_rows, heads, v.shape[3]),
            q.new_empty((q.shape[0], heads, q_rows), dtype=sum_dtype(q.dtype)),
        ]
        kept += [] if bias is None else [bias.new_empty(q_rows, 1, heads * total_k)]
    return kept


def _held(recipe: Recipe, transport: Transport, inner: int, rank: int, total: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of a rank's team of `inner`; documents are looked at only if the layout needs them."""
    documents = cu_seqlens if looks_at_documents(recipe.layout) else None
    unknown = isinstance(total, torch.SymInt) or isinstance(documents, FakeTensor)
    if inner == transport.world_size or unknown:  # so many shards of one length
        return total * inner // transport.world_size
    counts = teams(layout_of(recipe.layout, int(total), transport.world_size, content(documents)), inner).counts
    return int(counts[rank // inner])


@library.custom_op(
    "nnscaler_ring::attention_backward",
    mutates_args=(),
    schema="(Tensor[] saved, Tensor? d_lse, Tensor?[] tables, SymInt[] total, float scale, SymInt seed, str recipe, "
    "bool wants_bias) -> Tensor[]",
)
def attention_backward(
    saved: Sequence[Tensor],
    d_lse: Tensor | None,
    tables: Sequence[Tensor | None],
    total: Sequence[int],
    scale: float,
    seed: int,
    recipe: str,
    wants_bias: bool,
) -> list[Tensor]:
    """dq, dk and dv of `attention`, from its result over all keys and its log-sum-exp; each call recomputes its weights.

    Args:
        saved: ``d_out, q, k, v, out, lse`` and the tensors of the third result of `attention`; where ranks exchange tokens for
            heads, they are read in place of q, k, v, out and lse, of which only shapes count.
        d_lse: the gradient of lse, or None.
        tables: its ``cu_q, cu_k, slices, alibi, bias, sink``.
        total, scale, seed, recipe: its own.
        wants_bias: d_bias is asked for.

    Returns:
        dq, dk, dv; with `wants_bias` then d_bias, with a sink then d_sink, over this rank's queries.
    """
    *documents, alibi, bias, sink = tables
    job = job_of(Recipe.parse(recipe), (total[0], total[1]), documents, saved[1:4], scale, seed, backward=True)
    if asked():
        facts = {**_facts(job, saved[1:4], scale, seed, tables), "whether they kept keys and values that came": len(saved) > 6}
        check_alike(job.transport, "the backward pass of attention", facts, saved[0].device)
    ranks = range(len(job.plans))
    d_lses = [None for _ in ranks] if d_lse is None else job.shards(d_lse, job.q_layout, dim=2)
    d_out, q, k, v, out, lse, *kept = saved
    d_out = d_out.contiguous()  # that of a sum has a stride of 0, and cuDNN keeps what it prepared for other strides
    by_rank = [job.shards(d_out, job.q_layout)]
    if job.inner > 1:
        by_rank += [[x] * len(ranks) for x in (q, k, v, out, lse)]
    else:
        by_rank += [job.shards(q, job.q_layout), *(job.shards(x, job.k_layout) for x in (k, v))]
        by_rank += [job.shards(out, job.q_layout), job.shards(lse, job.q_layout, dim=2)]
    own, extras = len(kept) // len(ranks), _extras(job, alibi, bias, sink)
    walks = [
        backward(job, job.plans[n], d_lses[n], [x[n] for x in by_rank], kept[n * own : n * own + own], extras[n], wants_bias)
        for n in ranks
    ]
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, d_bias, d_sink = zip(*job.transport.run(walks), strict=True)
    grads = [job.whole(dq, job.q_layout), job.whole(dk, job.k_layout), job.whole(dv, job.k_layout)]
    if wants_bias and bias is not None:
        grads.append(job.whole(d_bias, job.q_layout).to(bias.dtype).contiguous())
    if sink is not None:
        grads.append(torch.stack(d_sink).sum(0).to(sink.dtype))
    return grads


@attention_backward.register_fake
def _(saved: Sequence[Tensor], _: Tensor | None, tables: Sequence[Tensor | None], *rest: Any) -> list[Tensor]:
    bias, sink = tables[4:]
    grads = [x.new_empty(x.shape) for x in saved[1:4]]
    grads += [bias.new_empty(bias.shape)] if rest[-1] and bias is not None else []
    return grads + ([] if sink is None else [torch.empty_like(sink)])


def _of_heads(kept: Sequence[Tensor]) -> bool:
    """Whether ranks exchange tokens for heads, so that what was kept is read in place of q, k, v, out and lse.

    Those have several dims, a buffer of rows that came has one.
    """
    return len(kept) > 0 and kept[0].dim() > 1


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, *tables = inputs[:9]
    out, lse, kept = output
    read = [q, k, v, out, lse]
    if _of_heads(kept):
        read = [x.new_empty(0, *x.shape) for x in read]  # shapes alone: no memory, also where saved tensors are offloaded
    ctx.save_for_backward(*read, *tables, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.rest = inputs[9:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    none: list[Tensor | None] = [None] * 14
    if d_out is None and d_lse is None:
        return tuple(none)
    saved = ctx.saved_tensors  # once: under activation checkpointing this computes them anew
    q, k, v, out, lse, cu_q, cu_k, slices, alibi, bias, sink, *kept = saved
    if _of_heads(kept):
        q, k, v, out, lse = (x.new_empty(()).expand(x.shape[1:]) for x in (q, k, v, out, lse))
    if d_out is None:
        assert d_lse is not None
        rows = d_lse.shape[2]
        d_out = q.new_zeros(q.shape[0], rows, q.shape[2], v.shape[3])
    wants_bias = bias is not None and ctx.needs_input_grad[7]
    total_q, total_k, *rest = ctx.rest
    read, tables = [d_out, q, k, v, out, lse, *kept], [cu_q, cu_k, slices, alibi, bias, sink]
    dq, dk, dv, *more = attention_backward(read, d_lse, tables, [total_q, total_k], *rest, wants_bias)
    none[:3] = dq, dk, dv
    none[7] = more.pop(0) if wants_bias else None
    none[8] = more.pop(0) if sink is not None else None
    return tuple(none)


attention.register_autograd(_differentiate, setup_context=_save)
