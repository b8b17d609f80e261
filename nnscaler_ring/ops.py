"""The ops that a model calls as for one device; placements, or a compiler, say how they are cut.

Natural token order in, natural token order out, whatever happens inside. On plain tensors without a `process_group` an op computes
on this process alone; with one, each rank passes its contiguous shard. On DTensors the placements and the mesh say all that, see
`annotations.spec` for the cuts that each op allows.

Legend: `B` batch, `S` tokens of the sequence, `T` packed tokens, `Hq`/`Hk` query/key heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .annotations import dtensor, nnscaler
from .annotations.nnscaler import constant, tracing
from .annotations.spec import SPECS, OpSpec
from .core.call import (
    Group,
    Options,
    Result,
    Rows,
    announced,
    check,
    check_extras,
    check_names,
    check_qkv,
    check_tensors,
    grid_name,
    host_table,
    out_and_lse,
    traced,
    whole_lengths,
)
from .core.mask import check_window
from .core.plan import check_transport
from .core.recipe import Recipe
from .core.relayout import relayout
from .core.transport import is_grid
from .fronts import fixed
from .settings import Settings, group_of, options_of, plain


@torch.compiler.assume_constant_result
def _parsed(text: str) -> Settings:
    """`Settings.parse`, once while a graph is traced."""
    return Settings.parse(text)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of an op: everything but q, k and v."""

    spec: OpSpec
    settings: Settings
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    extras: Mapping[str, Any]
    first: tuple[int, int] = (0, 0)

    def _warn_if_one_of_many(self) -> None:
        """Warn of tokens in the order of shards in a call that names no group, where there are ranks that may hold the others."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"{self.spec.name}: layout={self.settings.layout!r} without a process_group: these are taken to be whole, not "
                f"one of {dist.get_world_size()} shards; pass process_group=torch.distributed.group.WORLD then",
                stacklevel=8,
            )

    def run(self, q: Tensor, k: Tensor, v: Tensor, process_group: Group, ring_size: int) -> tuple[Tensor, Tensor]:
        """out and lse, on DTensors or on this rank's shard."""
        on_mesh = any(isinstance(x, DTensor) for x in (q, k, v))
        if on_mesh:
            dtensor.check_all(self.spec, q, k, v)
        check_qkv(q, k, v)
        if q.dim() != len(self.spec.out):
            raise ValueError(f"{self.spec.name}: q has shape {tuple(q.shape)}, the op takes dims {self.spec.out}")
        if self.settings.layout not in ("contiguous", self.spec.layout):
            allowed = " or ".join(["'contiguous' (natural order)", *{repr(self.spec.layout)} - {"'contiguous'"}])
            raise ValueError(f"{self.spec.name}: tokens in layout {self.settings.layout!r}; give {allowed}")
        if not on_mesh:
            if nnscaler.tracing():
                check_names(Recipe(transport=self.settings.transport, kernel=self.settings.kernel))
                return nnscaler.stand_in(self.spec, q, k, v)
            if process_group is None and self.settings.layout != "contiguous" and not torch.compiler.is_compiling():
                self._warn_if_one_of_many()
            name = group_of(process_group, ring_size)
            return self._on_group((q, k, v), name, (self.settings.seq_len, self.settings.seq_len_k))
        given = {"process_group": process_group, "seq_len": self.settings.seq_len, "seq_len_k": self.settings.seq_len_k}
        if any(value is not None for value in given.values()):
            raise ValueError(
                f"{self.spec.name}: the DTensors and their mesh say who shares how long a sequence; leave out {', '.join(given)}"
            )
        call = replace(self, cu_seqlens_q=dtensor.local(self.cu_seqlens_q), cu_seqlens_k=dtensor.local(self.cu_seqlens_k))

        def on_shards(here: dtensor.Here) -> tuple[Tensor, Tensor]:
            first = here.first() if self.settings.dropout_p else (0, 0)  # which dropout alone looks at
            return replace(call, extras=here.extras, first=first)._on_group(here.qkv, grid_name(here.rings), here.lengths)

        if self.settings.dropout_p and self.settings.dropout_seed is None:
            raise ValueError(
                f"{self.spec.name}: dropout on DTensors needs dropout_seed, the same on every rank that has the same rows"
            )
        check_extras(q, options_of(self.settings, **self.extras), k.shape[k.dim() - 3])  # whole, before they are cut
        return dtensor.run(self.spec, q, k, v, self.extras, on_shards)

    def _transport(self, group: str) -> str:
        """The transport of a call on `group`; in a grid heads travel within each team, and this says how rows go between teams."""
        asked, own = check_transport(self.settings.transport), self.spec.transport
        if own == "auto" or is_grid(group) or group == "local:1":
            return asked
        if asked not in ("auto", own):
            raise ValueError(
                f"{self.spec.name}: transport={asked!r} is for the outer of two mesh axes; over one, heads travel: leave it out"
            )
        return own

    def _on_group(self, shards: Sequence[Tensor], group: str, lengths: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's tokens: to the op's own layout, through the engine, and back."""
        q, k, v = shards
        given = self.settings
        inner = given.layout if group == "local:1" else self.spec.layout
        transport, (batch0, head0) = self._transport(group), self.first
        recipe = Recipe(group=group, layout=inner, transport=transport, kernel=given.kernel, batch0=batch0, head0=head0)
        q_len, k_len = lengths
        cu_q, cu_k = self.cu_seqlens_q, self.cu_seqlens_k
        if not torch.compiler.is_compiling():  # read from the device once
            cu_q, cu_k = host_table("cu_seqlens_q", cu_q), host_table("cu_seqlens_k", cu_k)
        rows = Rows(seq_len=q_len, seq_len_k=k_len, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        options = options_of(given, **self.extras)
        if inner != given.layout and not torch.compiler.is_compiling():
            check(q, k, v, recipe, options, rows)  # before anything travels
        total, total_k = whole_lengths(q, k, group, rows)
        if inner != given.layout:
            batches = [([q, k, v], total)] if total == total_k else [([q], total), ([k, v], total_k)]
            q, k, v = (x for xs, length in batches for x in relayout(xs, None, length, given.layout, inner, group))
        out, lse = out_and_lse(q, k, v, recipe, options, rows)
        if inner != given.layout:
            (out,) = relayout([out], None, total, inner, given.layout, group)
            if given.return_attn_probs:
                (lse,) = relayout([lse.transpose(1, 2).contiguous()], None, total, inner, given.layout, group)
                lse = lse.transpose(1, 2).contiguous()
        return out, lse


Outputs = Tensor | tuple[Tensor, Tensor]


def _attention(
    spec: OpSpec, tensors: Sequence[Tensor | None], settings: Settings, process_group: Group, ring_size: int = 1
) -> Outputs:
    """The op of `spec` on its inputs, in their order."""
    given = dict(zip(spec.inputs, tensors, strict=True))
    q, k, v = (cast(Tensor, given.pop(name)) for name in "qkv")
    cu_q, cu_k = (given.pop(name, None) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    cu_q = given.pop("cu_seqlens", cu_q)
    call = _Call(spec=spec, settings=settings, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, extras=given)
    out, lse = call.run(q, k, v, process_group, ring_size)
    return (out, lse) if settings.return_attn_probs else out


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    op: str = "wrap_ring_attn_func",
    settings: str = "{}",
    process_group: Group = None,
    ring_size: int = 1,
) -> Outputs:
    """The op behind the fronts for rows of one sequence: every tensor in a slot, everything else a string that a compiler keeps.

    Args:
        q, k, v: ``[B, S, Hq, D]``, ``[B, S, Hk, D]``, ``[B, S, Hk, Dv]``.
        cu_seqlens: boundaries of packed documents, or None.
        alibi_slopes, learnable_sink: see `core.call.Options`.
        op: name of the front in `annotations.spec.SPECS`.
        settings: a `Settings` as a string.
        process_group: the ranks that share the sequence; None: this process alone.
        ring_size: without a group, compute the last rank's part of a ring of so many, on zeros in place of the others' rows: what
            nnscaler profiles a piece by.

    Returns:
        out, or out and lse with ``return_attn_probs``.
    """
    tensors = (q, k, v, cu_seqlens, alibi_slopes, learnable_sink)
    return _attention(SPECS[op], tensors, _parsed(settings), process_group, ring_size)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    bias: Tensor | None = None,
    op: str = "wrap_ring_attn_varlen_func",
    settings: str = "{}",
    process_group: Group = None,
    ring_size: int = 1,
) -> Outputs:
    """`dense_attention` for one packed row: q ``[T, Hq, D]``, k ``[T, Hk, D]``, v ``[T, Hk, Dv]``, both boundaries, and a bias."""
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, learnable_sink, bias)
    return _attention(SPECS[op], tensors, _parsed(settings), process_group, ring_size)


_SHARED: tuple[str, ...] = ("softmax_scale", "dropout_p", "window_size", "deterministic", "return_attn_probs")
_SHARED += ("transport", "kernel", "seq_len", "seq_len_k", "softcap", "dropout_seed")
"""The plain arguments that all fronts have, in the order in which they hand them on."""


def _run(op: str, tensors: Sequence[Tensor | None], process_group: Group, shared: Sequence[Any], **own: Any) -> Result:
    """Check the plain arguments of a front and run the op. Tensors are not looked at, nor put into a container with others.

    nnscaler traces through the fronts, and would record in its graph whatever is computed from a container that holds a tensor.
    """
    given: dict[str, Any] = {}
    for name, value in (*zip(_SHARED, shared, strict=True), *own.items()):
        given[name] = constant(name, value)
    scale, far = given["softmax_scale"], given.get("far")
    Options(softmax_scale=scale, dropout_p=given["dropout_p"], softcap=given["softcap"], far=far)
    given = {**given, "softmax_scale": None if scale is None else float(scale), "window_size": check_window(given["window_size"])}
    if torch.compiler.is_compiling():  # numbers that a graph takes as arguments, as a seed of each call's own, fit in no string
        lengths = {name: traced(given.get(name)) for name in ("seq_len", "seq_len_k")}  # shards may differ: a graph for each
        result = _attention(SPECS[op], tensors, Settings(**{**given, **lengths}), process_group)
    else:
        entry: Callable[..., Outputs] = dense_attention if "batch" in SPECS[op].out else packed_attention
        result = entry(*tensors, op=op, settings=str(Settings(**given)), process_group=process_group)
    if not given["return_attn_probs"]:
        return cast(Tensor, result)
    return result[0], result[1], None


def _dense_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "contiguous",
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
    op: str = "wrap_ring_attn_func",
) -> Result:
    """Attention over one sequence a batch row.

    Args:
        q: ``[B, S, Hq, D]``, a plain tensor or a DTensor; k ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``.
        softmax_scale: factor of the scores; ``D ** -0.5`` where None.
        dropout_p: probability with which a weight is dropped; which are does not depend on how the sequence is cut.
        causal: no token sees a later one.
        window_size: ``(left, right)`` tokens seen before and after each token, -1 for no limit.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``: scores less slope times distance (ALiBi, Press et al., arXiv:2108.12409).
        deterministic: the same bits each time.
        return_attn_probs: return ``(out, softmax_lse, None)``.
        process_group: for plain tensors, the group whose ranks each pass a shard, or the global ranks of one that was made;
            None: this process alone.
        cu_seqlens: int32 boundaries of documents packed in the row ``[0, ..., S]``, the same in every batch row.
        layout: order of the tokens passed: ``contiguous`` for natural order, or the op's own layout.
        transport: ``auto``, ``ring``, ``grouped_ring``, ``all_gather``, ``halo`` or ``all_to_all``.
        kernel: ``auto``, or the name of a backend.
        seq_len: tokens of the whole sequence, for plain shards of different lengths.
        seq_len_k: its key tokens, where they are not as many; `seq_len` where None.
        softcap: scores ``softcap * tanh(score / softcap)``; 0 for none.
        learnable_sink: logits ``[Hq]`` of a key without a value, one a head.
        dropout_seed: of the dropout; drawn from torch's default CPU generator where None.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)`` with ``softmax_lse`` ``[B, Hq, S]``, natural log, fp32
            (float64 for float64).

    Raises:
        ValueError: an argument or a placement is not as described; says what is allowed.
        NotImplementedError: no kernel has what is asked for.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> _dense_attn(q, k, v).shape
        torch.Size([1, 16, 4, 8])
    """
    shared: tuple[Any, ...] = (softmax_scale, dropout_p, window_size, deterministic, return_attn_probs)
    shared += (transport, kernel, seq_len, seq_len_k, softcap, dropout_seed)
    return _run(op, (q, k, v, cu_seqlens, alibi_slopes, learnable_sink), process_group, shared, causal=causal, layout=layout)


wrap_ring_attn_func = fixed(
    _dense_attn,
    "wrap_ring_attn_func",
    "Ring attention: contiguous shards, keys and values pass from neighbour to neighbour (Liu et al., arXiv:2310.01889).",
    op="wrap_ring_attn_func",
)
wrap_zigzag_attn_func = fixed(
    _dense_attn,
    "wrap_zigzag_attn_func",
    "Causal attention with equal work on every rank: inside, rank `r` holds chunks `r` and ``2P-1-r`` of ``2P``.",
    causal_only=True,
    op="wrap_zigzag_attn_func",
)
wrap_stripe_attn_func = fixed(
    _dense_attn,
    "wrap_stripe_attn_func",
    "Striped attention (Brandon et al., arXiv:2311.09431): inside, rank `r` holds tokens ``r, r+P, r+2P, ...``.",
    op="wrap_stripe_attn_func",
)

wrap_ulysses_attn_func = fixed(
    _dense_attn,
    "wrap_ulysses_attn_func",
    "Ulysses: ranks exchange tokens for heads and back (Jacobs et al., arXiv:2309.14509). Over two mesh axes heads travel within "
    "the inner one, and keys and values along the outer one as `transport` says.",
    op="wrap_ulysses_attn_func",
)


def wrap_ring_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    bias: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """Attention within the documents packed in one row, which is cut in contiguous parts wherever that falls.

    Args:
        q: ``[T, Hq, D]``, a plain tensor or a DTensor; k ``[T, Hk, D]``; v ``[T, Hk, Dv]``.
        cu_seqlens_q: int32 boundaries of the documents in the whole row, ``[0, ..., T]``.
        cu_seqlens_k: the same for keys; documents are aligned at their last token where the numbers differ.
        bias: ``[Hq or 1, T, Tk]``, rows with q, keys in natural order, added to the scores.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, process_group, transport,
            kernel, seq_len, seq_len_k, softcap, learnable_sink, dropout_seed: see `wrap_ring_attn_func`.

    Returns:
        out ``[T, Hq, Dv]``, or ``(out, softmax_lse, None)`` with ``softmax_lse`` ``[Hq, T]``, natural log, fp32 (float64
            for float64).

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(16, 4, 8) for _ in range(3))
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> wrap_ring_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([16, 4, 8])
    """
    shared: tuple[Any, ...] = (softmax_scale, dropout_p, window_size, deterministic, return_attn_probs)
    shared += (transport, kernel, seq_len, seq_len_k, softcap, dropout_seed)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, learnable_sink, bias)
    return _run("wrap_ring_attn_varlen_func", tensors, process_group, shared, causal=causal)


def wrap_sliding_window_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """Sliding-window attention: only the neighbours' last rows travel, however many ranks there are.

    Args:
        q: ``[B, S, Hq, D]``, a plain tensor or a DTensor; k ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``.
        window_size: tokens seen before each token (and after it, if not causal), or ``(left, right)``; -1 for no limit.
        softmax_scale, dropout_p, causal, alibi_slopes, deterministic, return_attn_probs, process_group, cu_seqlens, transport,
            kernel, seq_len, seq_len_k, softcap, learnable_sink, dropout_seed: see `wrap_ring_attn_func`.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> wrap_sliding_window_attn_func(q, k, v, 4).shape
        torch.Size([1, 16, 4, 8])
    """
    window = (window_size, 0 if plain(causal) else window_size) if isinstance(window_size, Integral) else window_size
    shared: tuple[Any, ...] = (softmax_scale, dropout_p, window, deterministic, return_attn_probs)
    shared += (transport, kernel, seq_len, seq_len_k, softcap, dropout_seed)
    return _run(
        "wrap_sliding_window_attn_func", (q, k, v, cu_seqlens, alibi_slopes, learnable_sink), process_group, shared, causal=causal
    )


def wrap_streaming_llm_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    num_sinks: int = 1,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """StreamingLLM attention (Xiao et al., arXiv:2309.17453): a causal window, and the first tokens of the query's document.

    Args:
        q: ``[B, S, Hq, D]``, a plain tensor or a DTensor; k ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``.
        window_size: tokens seen before each token; -1 for no limit.
        num_sinks: first tokens of each document that all its later tokens see.
        softmax_scale, dropout_p, alibi_slopes, deterministic, return_attn_probs, process_group, cu_seqlens, transport, kernel,
            seq_len, seq_len_k, softcap, learnable_sink, dropout_seed: see `wrap_ring_attn_func`.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> wrap_streaming_llm_attn_func(q, k, v, 4).shape
        torch.Size([1, 16, 4, 8])
    """
    window = (window_size, 0)
    shared: tuple[Any, ...] = (softmax_scale, dropout_p, window, deterministic, return_attn_probs)
    shared += (transport, kernel, seq_len, seq_len_k, softcap, dropout_seed)
    return _run(
        "wrap_streaming_llm_attn_func",
        (q, k, v, cu_seqlens, alibi_slopes, learnable_sink),
        process_group,
        shared,
        causal=True,
        sinks=num_sinks,
    )


def wrap_piecewise_attn_func(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "contiguous",
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """Attention with scores ``q2.k2`` where the key is at least `dist_threshold` tokens before the query, ``q1.k1`` elsewhere.

    Rotary embeddings of two bases, for near and far (FlagAttention's piecewise attention). Two disjoint masks with one softmax: no
    kernel needs to know of it.

    Args:
        q1, q2: ``[B, S, Hq, D]``; k1, k2 ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``; plain tensors or DTensors.
        dist_threshold: tokens; positions are aligned at the last one where queries and keys differ in number.
        causal, softmax_scale, dropout_p, window_size, alibi_slopes, deterministic, return_attn_probs, process_group, cu_seqlens,
            layout, transport, kernel, seq_len, seq_len_k, softcap, learnable_sink, dropout_seed: see `wrap_ring_attn_func`.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q1, k1, q2, k2, v = (torch.randn(1, 16, 4, 8) for _ in range(5))
        >>> wrap_piecewise_attn_func(q1, k1, q2, k2, v, 4, causal=True).shape
        torch.Size([1, 16, 4, 8])
    """
    if dist_threshold is None:
        raise ValueError("dist_threshold=None: give a number of tokens >= 0")
    if not tracing():
        with announced(group_of(process_group), q1):
            _check_halves(q1, k1, q2, k2)
    q, k = torch.cat([q1, q2], -1), torch.cat([k1, k2], -1)
    shared: tuple[Any, ...] = (softmax_scale, dropout_p, window_size, deterministic, return_attn_probs)
    shared += (transport, kernel, seq_len, seq_len_k, softcap, dropout_seed)
    tensors = (q, k, v, cu_seqlens, alibi_slopes, learnable_sink)
    return _run("wrap_ring_attn_func", tensors, process_group, shared, causal=causal, layout=layout, far=dist_threshold)


def _check_halves(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor) -> None:
    """ValueError where features would not be halves of one width."""
    check_tensors(q1=q1, k1=k1, q2=q2, k2=k2)
    if q1.shape != q2.shape or k1.shape != k2.shape or q1.shape[-1] != k1.shape[-1]:
        shapes = f"q1 {tuple(q1.shape)}, k1 {tuple(k1.shape)}, q2 {tuple(q2.shape)}, k2 {tuple(k2.shape)}"
        raise ValueError(f"{shapes}: q1 and q2 must have one shape, as k1 and k2, and all one head dim")
    if q1.dtype != q2.dtype or k1.dtype != k2.dtype:
        raise ValueError(f"q1 is {q1.dtype}, q2 {q2.dtype}, k1 {k1.dtype}, k2 {k2.dtype}: give one dtype")
