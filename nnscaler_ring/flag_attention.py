"""FlagAttention's operators, ``[B, H, S, D]``: on one device, or on shards of a group's ranks.

Legend: `B` batch, `Sq`/`Sk` tokens of this rank, `H`/`Hk` heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .core.call import Group, Options, Rows, announced, check_flags, check_tensors, out_and_lse, total_attention
from .core.recipe import Recipe
from .ops import wrap_piecewise_attn_func
from .settings import group_of


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    return_log_normalizer: bool = False,
    return_total_attention: bool = False,
    *,
    dropout_p: float = 0.0,
    process_group: Group = None,
    layout: str = "contiguous",
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    seq_len_k: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention that also tells how much attention each key got.

    Args:
        q: ``[B, H, Sq, D]``; k ``[B, Hk, Sk, D]``; v ``[B, Hk, Sk, Dv]``.
        causal: no token sees a later one; aligned at the last token where `Sq` and `Sk` differ.
        sm_scale: factor of the scores; ``D ** -0.5`` where None.
        return_log_normalizer: return the log-sum-exp of the scores too, natural log; differentiable.
        return_total_attention: return for each key the attention weights summed over all queries, before dropout; no gradient.
        dropout_p, layout, transport, kernel, seq_len, seq_len_k: see `wrap_ring_attn_func`.
        process_group: the ranks that each pass a shard; None: this process alone.

    Returns:
        out ``[B, H, Sq, Dv]`` [, log_normalizer ``[B, H, Sq]``] [, total_attention ``[B, H, Sk]``]; the latter two fp32 (float64
        for float64).

    Raises:
        ValueError, NotImplementedError: see `core.call.attend`.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 16, 8) for _ in range(3))
        >>> out, total = flash_attention(q, k, v, causal=True, return_total_attention=True)
        >>> out.shape, round(total.sum().item())
        (torch.Size([1, 4, 16, 8]), 64)
    """
    if return_total_attention and torch.compiler.is_compiling():
        raise NotImplementedError("return_total_attention=True under torch.compile: call flash_attention outside the graph")
    flags = {"return_log_normalizer": return_log_normalizer, "return_total_attention": return_total_attention}
    if wrong := [f"{name}={flag!r}" for name, flag in flags.items() if isinstance(flag, float)]:
        raise ValueError(
            f"{', '.join(wrong)}: give True or False; the dropout that newer FlagAttention has there is dropout_p= here"
        )
    check_flags(**flags)
    name = group_of(process_group)
    recipe = Recipe(group=name, layout=layout, transport=transport, kernel=kernel)
    options = Options(softmax_scale=sm_scale, dropout_p=dropout_p, causal=causal, return_attn_probs=return_log_normalizer)
    with announced(name, q):
        q, k, v = _tokens_first(q=q, k=k, v=v)
    rows = Rows(seq_len=seq_len, seq_len_k=seq_len_k)
    out, lse = out_and_lse(q, k, v, recipe, options, rows)
    answers = [out.transpose(1, 2), *([lse] if return_log_normalizer else [])]
    if return_total_attention:
        answers.append(total_attention(q, k, lse, recipe, options, rows))
    return answers[0] if len(answers) == 1 else tuple(answers)


def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    process_group: Group = None,
    seq_len: int | None = None,
    seq_len_k: int | None = None,
) -> Tensor:
    """`wrap_piecewise_attn_func` on ``[B, H, S, D]``: scores ``q2.k2`` at a distance of `dist_threshold` or more, else ``q1.k1``.

    Args:
        q1, q2: ``[B, H, S, D]``; k1, k2 ``[B, Hk, S, D]``; v ``[B, Hk, S, Dv]``.
        dist_threshold: tokens.
        causal: no token sees a later one.
        sm_scale: factor of the scores; ``D ** -0.5`` where None.
        process_group: the ranks that each pass a shard; None: this process alone.
        seq_len, seq_len_k: see `wrap_ring_attn_func`.

    Returns:
        out ``[B, H, S, Dv]``.

    Raises:
        ValueError, NotImplementedError: see `wrap_piecewise_attn_func`.

    Example:
        >>> q1, k1, q2, k2, v = (torch.randn(1, 4, 16, 8) for _ in range(5))
        >>> piecewise_attention(q1, k1, q2, k2, v, 4, causal=True).shape
        torch.Size([1, 4, 16, 8])
    """
    with announced(group_of(process_group), q1):
        q1, k1, q2, k2, v = _tokens_first(q1=q1, k1=k1, q2=q2, k2=k2, v=v)
    group: dict[str, Any] = {"process_group": process_group, "seq_len": seq_len, "seq_len_k": seq_len_k}
    out = wrap_piecewise_attn_func(q1, k1, q2, k2, v, dist_threshold, causal, sm_scale, **group)
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2)


def _tokens_first(**given: Tensor) -> list[Tensor]:
    """``[B, H, S, D]`` as ``[B, S, H, D]``; ValueError for anything else, which would be taken for packed rows."""
    check_tensors(**given)
    if any(x.dim() != 4 for x in given.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        raise ValueError(f"{shapes}: give all [B, H, S, D]")
    return [x.transpose(1, 2) for x in given.values()]
