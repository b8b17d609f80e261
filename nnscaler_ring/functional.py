"""Per-rank attention functions under the names that people migrate from: each rank passes its own shard.

Legend: `B` batch, `L` tokens of this rank, `T` packed tokens of this rank, `Hq`/`Hk` heads, `D`/`Dv` head dims, `P` ranks.
All share a tail of arguments: ``dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None,
deterministic=False, return_attn_probs=False, group=None``, with flash-attn's meaning in *global* positions; `group` None is the
default group. They return out like q with head dim `Dv`, and with `return_attn_probs` the tuple ``(out, softmax_lse, None)``:
``softmax_lse`` is fp32 (float64 for float64), natural log, ``[B, Hq, L]`` (packed: ``[Hq, T]``).

A function here is data: a layout and a transport. What they mean is in `core.layout` and `core.plan`.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .core.call import (
    Group,
    Options,
    Result,
    Rows,
    attend,
    check_boundaries,
    check_documents,
    check_flags,
    check_qkv,
    group_name,
    traced,
)
from .core.mask import NO_LIMIT, Mask, check_window
from .core.recipe import Recipe
from .core.transport import num_ranks, resolve_group, transport_of
from .fronts import fixed, packed
from .launch import warn_if_alone


@torch.compiler.assume_constant_result
def _group(group: Group) -> str:
    """The name of the group whose ranks pass shards."""
    if group is None:
        warn_if_alone("this attention")
    return group_name(group)


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    layout: str = "contiguous",
    transport: str = "ring",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """Ring attention (Liu et al., arXiv:2310.01889) on contiguous shards: rank `r` holds chunk `r` of `P`.

    Args:
        q: ``[B, L, Hq, D]``; k ``[B, L, Hk, D]``; v ``[B, L, Hk, Dv]``.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs: see `core.call.Options`.
        group: the ranks that share the sequence; None: the default group, or this process alone where there is none.
        layout: where the shards lie, a name in `core.layouts.LAYOUTS`.
        transport: ``ring``, ``grouped_ring``, ``all_gather``, ``halo``, ``all_to_all``, or ``auto`` (ring,
            grouped_ring or halo).
        kernel: ``auto``, or the name of a backend.
        seq_len: tokens of the whole sequence where ranks hold different numbers; ``P * L`` where None.
        seq_len_k: its key tokens, where they are not as many; `seq_len` where None.
        softcap, learnable_sink, dropout_seed: see `core.call.Options`.

    Returns:
        out ``[B, L, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `core.call.attend`.

    Example:
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> ring_flash_attn_func(q, k, v, causal=True).shape
        torch.Size([1, 16, 4, 8])
    """
    recipe = Recipe(group=_group(group), layout=layout, transport=transport, kernel=kernel)
    options = Options(
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        softcap=softcap,
        learnable_sink=learnable_sink,
        dropout_seed=dropout_seed,
    )
    return attend(q, k, v, recipe, options, Rows(seq_len=seq_len, seq_len_k=seq_len_k))


def ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    layout: str = "contiguous-per-document",
    transport: str = "ring",
    kernel: str = "auto",
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """Ring attention on packed documents, each cut in `P` contiguous parts of one length.

    Args:
        q: ``[T, Hq, D]``; k ``[T, Hk, D]``; v ``[T, Hk, Dv]``.
        cu_seqlens: int32 ``[documents + 1]``, boundaries of the parts in *this rank's* shard, equal on all ranks.
        max_seqlen: tokens of the longest part, at least.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group: see
            `ring_flash_attn_func`.
        layout, transport, kernel, softcap, learnable_sink, dropout_seed: see `ring_flash_attn_func`.

    Returns:
        out ``[T, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `core.call.attend`.

    Example:
        >>> q, k, v = (torch.randn(16, 4, 8) for _ in range(3))
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> ring_flash_attn_varlen_func(q, k, v, cu_seqlens, 10, causal=True).shape
        torch.Size([16, 4, 8])
    """
    recipe = Recipe(group=_group(group), layout=layout, transport=transport, kernel=kernel)
    options = Options(
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        softcap=softcap,
        learnable_sink=learnable_sink,
        dropout_seed=dropout_seed,
    )
    check_qkv(q, k, v)
    if torch.compiler.is_compiling():  # contents are not checked where a graph is traced
        documents = cu_seqlens * num_ranks(recipe.group)
    else:
        documents = torch.from_numpy(check_documents(cu_seqlens, max_seqlen, q.shape[0]) * num_ranks(recipe.group))
    return attend(q, k, v, recipe, options, Rows(cu_seqlens_q=documents))


@torch.compiler.disable
def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What `llama3_flash_attn_varlen_func` needs to know about this rank's part of a packed row.

    Args:
        cu_seqlens: int32 ``[documents + 1]``, boundaries of the documents in the *whole* row, which is cut in `world_size` parts.
        causal: the mask that will be used; it decides how far this rank's keys reach.
        rank, world_size: this rank and the number of ranks.

    Returns:
        ``cu_seqlens_q``, ``cu_seqlens_k`` (int32, boundaries among this rank's queries and among the keys in the slice),
        ``max_seqlen_q``, ``max_seqlen_k``, and the slice of the whole row that holds the keys this rank reads.

    Raises:
        ValueError: the row does not divide by `world_size`, or the arguments are not as described.

    Example:
        >>> llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 8], dtype=torch.int32), True, 1, 2)
        (tensor([0, 4], dtype=torch.int32), tensor([0, 5], dtype=torch.int32), 4, 5, slice(3, 8, None))
    """
    if not all(isinstance(n, Integral) for n in (rank, world_size)) or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank!r} of world_size={world_size!r}: give a number from 0 on, and one above it")
    check_flags(causal=causal)
    cu = check_boundaries(cu_seqlens, None)
    if cu[-1] % world_size:
        raise ValueError(f"the row's {cu[-1]} tokens do not divide by world_size={world_size}: pad its last document")
    start, stop = (int(cu[-1]) // world_size * n for n in (rank, rank + 1))
    here = np.flatnonzero((cu[1:] > start) & (cu[:-1] < stop) & (cu[1:] > cu[:-1]))
    first, last = cu[here], cu[here + 1]
    q_ends = np.clip(np.append(first, last[-1:]), start, stop) - start
    k_ends = np.append(first, np.minimum(last[-1:], stop) if causal else last[-1:])
    longest_q, longest_k = (int(np.diff(ends).max(initial=0)) for ends in (q_ends, k_ends))
    k_slice = slice(int(k_ends[0]), int(k_ends[-1])) if len(here) else slice(0, 0)
    q_ends, k_ends = (q_ends, k_ends - k_slice.start) if len(here) else (np.zeros(1, int), np.zeros(1, int))
    tables = (torch.as_tensor(ends, dtype=torch.int32, device=cu_seqlens.device) for ends in (q_ends, k_ends))
    return (*tables, longest_q, longest_k, k_slice)  # type: ignore[return-value]


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    kernel: str = "auto",
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | None = None,
) -> Result:
    """All-gather attention on a packed row cut in `P` contiguous parts (Llama 3, arXiv:2407.21783, section 3.3.2).

    A rank knows only its own documents here, so keys and values go to every rank; `heads_k_stride` heads at a time.

    Args:
        q: ``[T, Hq, D]``; k ``[T, Hk, D]``; v ``[T, Hk, Dv]``.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice: as `llama3_flash_attn_prepare_cu_seqlens` gives them.
        heads_k_stride: key heads gathered at once, a divisor of `Hk`: fewer take less memory.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group, kernel, softcap,
            learnable_sink, dropout_seed: see `ring_flash_attn_func`.

    Returns:
        out ``[T, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `core.call.attend`.

    Example:
        >>> q, k, v = (torch.randn(8, 4, 8) for _ in range(3))
        >>> row = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 8], dtype=torch.int32), True, 0, 1)
        >>> llama3_flash_attn_varlen_func(q, k, v, *row[:4], 1, row[4], causal=True).shape
        torch.Size([8, 4, 8])
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError("llama3_flash_attn_varlen_func under torch.compile: call it outside the graph")
    check_qkv(q, k, v)
    if not isinstance(heads_k_stride, Integral) or heads_k_stride < 1 or k.shape[-2] % heads_k_stride:
        raise ValueError(f"heads_k_stride={heads_k_stride!r} must divide the {k.shape[-2]} key heads")
    if not isinstance(local_k_slice, slice):
        raise ValueError(f"local_k_slice={local_k_slice!r}: give the slice that llama3_flash_attn_prepare_cu_seqlens returns")
    recipe = Recipe(group=_group(group), transport="broadcast", kernel=kernel, heads_stride=heads_k_stride)
    options = Options(
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        softcap=softcap,
        learnable_sink=learnable_sink,
        dropout_seed=dropout_seed,
    )
    transport = transport_of(recipe.group)
    tokens = q.shape[0] * transport.world_size
    start, stop = local_k_slice.start or 0, tokens if local_k_slice.stop is None else local_k_slice.stop
    if local_k_slice.step not in (None, 1) or not 0 <= start <= stop <= tokens:
        raise ValueError(f"local_k_slice={local_k_slice}: give slice(start, stop) within the row's {tokens} tokens")
    q_ends = check_documents(cu_seqlens_q, max_seqlen_q, q.shape[0]) + transport.ranks[0] * q.shape[0]
    k_ends = check_documents(cu_seqlens_k, max_seqlen_k, stop - start) + start
    if len(q_ends) != len(k_ends):
        raise ValueError(f"cu_seqlens_q has {len(q_ends) - 1} documents and cu_seqlens_k {len(k_ends) - 1}: they must agree")
    check_flags(causal=causal)
    left, right = check_window(window_size)
    low, high = -left if left >= 0 else -NO_LIMIT, 0 if causal else right if right >= 0 else NO_LIMIT
    documents = zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)
    mask = Mask([(*map(int, ends), low, high) for ends in documents], tokens)
    return attend(q, k, v, recipe, options, Rows(slices=mask))


def ring_sliding_window_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cu_seqlens: Tensor | None,
    cp_group: dist.ProcessGroup | None = None,
    cp_size: int | None = None,
    cp_local_rank: int | None = None,
    cp_prev_global_rank: int | None = None,
    cp_next_global_rank: int | None = None,
    softmax_scale: float | None = None,
    *,
    num_sinks: int = 0,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
) -> Tensor:
    """Causal sliding-window attention on contiguous shards of packed rows: a query sees itself and `window_size` keys before it.

    Args:
        q: ``[T, Hq, D]`` (or ``[B, L, Hq, D]``); k and v alike with `Hk` heads.
        window_size: keys before the query that it sees, >= 0.
        cu_seqlens: int32 boundaries of the documents in the *whole* row; None: one document.
        cp_group: the ranks that share the row; None: the default group.
        cp_size, cp_local_rank, cp_prev_global_rank, cp_next_global_rank: what the group says already; checked where given.
        softmax_scale: factor of the scores; ``D ** -0.5`` where None.
        num_sinks: first tokens of each document that all its later queries see too.
        transport, kernel, seq_len, seq_len_k: see `ring_flash_attn_func`.

    Returns:
        out like q, with v's head dim.

    Raises:
        ValueError: an argument is not as described, or disagrees with the group.

    Example:
        >>> q, k, v = (torch.randn(16, 4, 8) for _ in range(3))
        >>> ring_sliding_window_attn_varlen(q, k, v, 4, torch.tensor([0, 6, 16], dtype=torch.int32)).shape
        torch.Size([16, 4, 8])
    """
    name = _group(cp_group)
    _check_group(name, *map(traced, (cp_size, cp_local_rank, cp_prev_global_rank, cp_next_global_rank)))
    if not isinstance(window_size, Integral) or window_size < 0:
        raise ValueError(f"window_size={window_size}: give the number of earlier keys a query sees, >= 0")
    recipe = Recipe(group=name, transport=transport, kernel=kernel)
    options = Options(softmax_scale=softmax_scale, causal=True, window_size=(window_size, 0), sinks=num_sinks)
    out = attend(q, k, v, recipe, options, Rows(seq_len=seq_len, seq_len_k=seq_len_k, cu_seqlens_q=cu_seqlens))
    assert isinstance(out, Tensor)
    return out


@torch.compiler.assume_constant_result
def _check_group(name: str, size: int | None, rank: int | None, before: int | None, after: int | None) -> None:
    """ValueError unless what a caller says of the group is so."""
    transport = transport_of(name)
    world, own = transport.world_size, transport.ranks[0]
    if world == 1:
        peers = [dist.get_rank() if dist.is_initialized() else 0]
    else:
        peers = dist.get_process_group_ranks(resolve_group(name))
    true = {"cp_size": world, "cp_local_rank": own}
    true |= {"cp_prev_global_rank": peers[own - 1], "cp_next_global_rank": peers[(own + 1) % world]}
    for (key, value), given in zip(true.items(), (size, rank, before, after), strict=True):
        if given is not None and given != value:
            raise ValueError(f"{key}={given}, but in cp_group it is {value}: leave it out, or pass the group that you mean")


def ring_sliding_window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    cp_group: dist.ProcessGroup | None = None,
    cp_size: int | None = None,
    cp_local_rank: int | None = None,
    cp_prev_global_rank: int | None = None,
    cp_next_global_rank: int | None = None,
    softmax_scale: float | None = None,
    *,
    num_sinks: int = 0,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
) -> Tensor:
    """Causal sliding-window attention on contiguous shards: a query sees itself and `window_size` keys before it.

    Args:
        q: ``[B, L, Hq, D]``; k ``[B, L, Hk, D]``; v ``[B, L, Hk, Dv]``.
        window_size, cp_group, cp_size, cp_local_rank, cp_prev_global_rank, cp_next_global_rank, softmax_scale, num_sinks,
            transport, kernel, seq_len, seq_len_k: see `ring_sliding_window_attn_varlen`.

    Returns:
        out ``[B, L, Hq, Dv]``.

    Raises:
        ValueError: an argument is not as described, or disagrees with the group.

    Example:
        >>> q, k, v = (torch.randn(2, 16, 4, 8) for _ in range(3))
        >>> ring_sliding_window_attn(q, k, v, 4).shape
        torch.Size([2, 16, 4, 8])
    """
    group = (cp_group, cp_size, cp_local_rank, cp_prev_global_rank, cp_next_global_rank)
    choices: dict[str, Any] = {"num_sinks": num_sinks, "transport": transport, "kernel": kernel}
    choices |= {"seq_len": seq_len, "seq_len_k": seq_len_k}
    return ring_sliding_window_attn_varlen(q, k, v, window_size, None, *group, softmax_scale, **choices)


# -- the same under other names: one layout fixed, or tensors that come packed ------------------------------------------------

zigzag_ring_flash_attn_func = fixed(
    ring_flash_attn_func,
    "zigzag_ring_flash_attn_func",
    "Causal ring attention with equal work on every rank: rank `r` holds chunks `r` and ``2P-1-r`` of ``2P``.",
    causal_only=True,
    layout="zigzag",
)
stripe_flash_attn_func = fixed(
    ring_flash_attn_func,
    "stripe_flash_attn_func",
    "Striped attention (Brandon et al., arXiv:2311.09431): rank `r` holds tokens ``r, r+P, r+2P, ...``.",
    layout="stripe",
)
intel_ring_flash_attn_func = fixed(
    ring_flash_attn_func,
    "intel_ring_flash_attn_func",
    "`ring_flash_attn_func`, on Intel GPUs as everywhere.",
    layout="contiguous",
)
zigzag_ring_flash_attn_varlen_func = fixed(
    ring_flash_attn_varlen_func,
    "zigzag_ring_flash_attn_varlen_func",
    "Causal ring attention on packed documents, chunks `r` and ``2P-1-r`` of each document's ``2P`` on rank `r`.",
    causal_only=True,
    layout="zigzag-per-document",
)
ring_streaming_llm_attn = fixed(
    ring_sliding_window_attn,
    "ring_streaming_llm_attn",
    "StreamingLLM attention (Xiao et al., arXiv:2309.17453): the window, and the first token of the query's own sequence.",
    num_sinks=1,
)
ring_streaming_llm_attn_varlen = fixed(
    ring_sliding_window_attn_varlen,
    "ring_streaming_llm_attn_varlen",
    "StreamingLLM attention (Xiao et al., arXiv:2309.17453): the window, and the first token of the query's own document.",
    num_sinks=1,
)

ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func = (packed(ring_flash_attn_func, w) for w in ("kv", "qkv"))
zigzag_ring_flash_attn_kvpacked_func, zigzag_ring_flash_attn_qkvpacked_func = (
    packed(zigzag_ring_flash_attn_func, w) for w in ("kv", "qkv")
)
stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func = (packed(stripe_flash_attn_func, w) for w in ("kv", "qkv"))
intel_ring_flash_attn_kvpacked_func, intel_ring_flash_attn_qkvpacked_func = (
    packed(intel_ring_flash_attn_func, w) for w in ("kv", "qkv")
)
ring_flash_attn_varlen_kvpacked_func, ring_flash_attn_varlen_qkvpacked_func = (
    packed(ring_flash_attn_varlen_func, w) for w in ("kv", "qkv")
)
zigzag_ring_flash_attn_varlen_kvpacked_func, zigzag_ring_flash_attn_varlen_qkvpacked_func = (
    packed(zigzag_ring_flash_attn_varlen_func, w) for w in ("kv", "qkv")
)
llama3_flash_attn_varlen_kvpacked_func, llama3_flash_attn_varlen_qkvpacked_func = (
    packed(llama3_flash_attn_varlen_func, w) for w in ("kv", "qkv")
)
