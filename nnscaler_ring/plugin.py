"""What nnscaler finds here: every op of `ops` registered, a loss that may be cut, and the names of nnscaler's own ring attention.

Importing `nnscaler_ring` registers the ops where nnscaler is installed. Those who come from nnscaler's own
``customized_ops.ring_attention`` import this module instead: same names, cut at input 0, dim 1 (packed rows: dim 0).

Legend: `T` packed tokens, `Hq`/`Hk` heads, `D`/`Dv` head dims, `V` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from .annotations import nnscaler
from .annotations.nnscaler import constant
from .annotations.spec import SPECS
from .core.call import Group, Options, Rows, check_documents, check_qkv, group_name, out_and_lse
from .core.device import sum_dtype
from .core.kernels.transformer_engine import PACKAGE as transformer_engine
from .core.recipe import Recipe
from .core.relayout import relayout
from .core.transport import num_ranks
from .ops import (
    dense_attention,
    packed_attention,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_sliding_window_attn_func,
    wrap_zigzag_attn_func,
)
from .settings import Settings, group_of, options_of

__all__ = [
    "get_transformer_engine_info",
    "print_transformer_engine_status",
    "shuffle_varlen",
    "summed_cross_entropy",
    "unshuffle_varlen",
    "wrap_maybe_shuffle",
    "wrap_maybe_unshuffle",
    "wrap_ring_attn_func",
    "wrap_ring_attn_varlen_func",
    "wrap_sliding_window_attn_func",
    "wrap_zigzag_allgather_attn_varlen_func",
    "wrap_zigzag_attn_func",
]

_PER_DOCUMENT = "zigzag-per-document"
_ZIGZAG = replace(SPECS["wrap_ring_attn_varlen_func"], name="wrap_zigzag_allgather_attn_varlen_func", layout=_PER_DOCUMENT)


def summed_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The sum over tokens of the cross entropy: nnscaler may cut it on every dim but the classes, and adds the parts.

    Divide by the number of tokens for the mean; nnscaler's own `cross_entropy` gathers the logits for it.

    Args:
        logits: ``[..., V]``; computed in fp32 where they are of lower precision.
        labels: ``[...]`` class indices.
        ignore_index: label of tokens that do not count.

    Returns:
        a scalar.

    Example:
        >>> import torch
        >>> round(summed_cross_entropy(torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)).item(), 3)
        13.816
    """
    return summed_loss(logits, labels, ignore_index=ignore_index)


def summed_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The op behind `summed_cross_entropy`: nnscaler knows it where its module calls it."""
    logits = logits.to(sum_dtype(logits.dtype))
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")


# -- rows in zigzag order, document by document ----------------------------------------------------------------------------------


def wrap_maybe_shuffle(hidden_states: Tensor, cu_seqlens: Tensor, enable_ring: bool = True, process_group: Group = None) -> Tensor:
    """Rows in natural order to the order that `wrap_zigzag_allgather_attn_varlen_func` takes; nothing on one device.

    Cut it in as many parts as the attention, once at the model's start, and give it the position ids too.

    Args:
        hidden_states: ``[T, ...]``.
        cu_seqlens: int32 boundaries of the documents in the whole row.
        enable_ring: must be True; leave the sequence uncut instead.
        process_group: for plain shards, the ranks that share the row.

    Raises:
        NotImplementedError: ``enable_ring=False``.

    Example:
        >>> import torch
        >>> wrap_maybe_shuffle(torch.arange(4.0).view(4, 1), torch.tensor([0, 4], dtype=torch.int32)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    _check_ring(enable_ring)
    return shuffled_rows(hidden_states, cu_seqlens, back=False, process_group=process_group)


def wrap_maybe_unshuffle(
    hidden_states: Tensor, cu_seqlens: Tensor, enable_ring: bool = True, process_group: Group = None
) -> Tensor:
    """The inverse of `wrap_maybe_shuffle`.

    Example:
        >>> import torch
        >>> wrap_maybe_unshuffle(torch.arange(4.0).view(4, 1), torch.tensor([0, 4], dtype=torch.int32)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    _check_ring(enable_ring)
    return shuffled_rows(hidden_states, cu_seqlens, back=True, process_group=process_group)


def _check_ring(enable_ring: bool) -> None:
    if not enable_ring:
        raise NotImplementedError("enable_ring=False: leave it out, and do not cut the sequence of the op instead")


def shuffled_rows(rows: Tensor, cu_seqlens: Tensor, back: bool = False, process_group: Group = None, ring_size: int = 1) -> Tensor:
    """The op behind `wrap_maybe_shuffle` and, with `back`, `wrap_maybe_unshuffle`; `ring_size` as in `ops.dense_attention`."""
    if nnscaler.tracing():
        return nnscaler.untouched(torch.empty_like(rows), of=[rows])[0]
    if process_group is None and ring_size == 1:
        return rows.clone()
    return _moved(rows, cu_seqlens, group_of(process_group, ring_size), back)


def _moved(rows: Tensor, cu_seqlens: Tensor, group: str, back: bool) -> Tensor:
    orders = (_PER_DOCUMENT, "contiguous") if back else ("contiguous", _PER_DOCUMENT)
    return relayout([rows.unsqueeze(0)], cu_seqlens, num_ranks(group) * rows.shape[0], *orders, group)[0].squeeze(0)


def shuffle_varlen(
    t: Tensor, cu_seqlens_padded: Tensor, cp_ranks: Sequence[int] | None = None, cp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """This rank's rows, cut in contiguous parts, to zigzag order document by document. Differentiable.

    Args:
        t: ``[T / P, ...]``.
        cu_seqlens_padded: int32 boundaries ``[0, ..., T]`` of the documents in the whole row.
        cp_ranks: global ranks of the group; taken where `cp_group` is None.
        cp_group: the group; the default one where both are None.

    Returns:
        ``[T / P, ...]``, of the dtype of `t`.

    Raises:
        ValueError: `cp_ranks` and `cp_group` disagree, or the tokens are not as many as the boundaries give this rank.

    Example:
        >>> import torch
        >>> shuffle_varlen(torch.arange(4.0).view(4, 1), torch.tensor([0, 4], dtype=torch.int32)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    return _shuffle(t, cu_seqlens_padded, cp_ranks, cp_group, back=False)


def unshuffle_varlen(
    t: Tensor, cu_seqlens_padded: Tensor, cp_ranks: Sequence[int] | None = None, cp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """The inverse of `shuffle_varlen`, of the same arguments.

    Example:
        >>> import torch
        >>> unshuffle_varlen(torch.arange(4.0).view(4, 1), torch.tensor([0, 4], dtype=torch.int32)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    return _shuffle(t, cu_seqlens_padded, cp_ranks, cp_group, back=True)


def _shuffle(t: Tensor, cu: Tensor, ranks: Sequence[int] | None, group: dist.ProcessGroup | None, back: bool) -> Tensor:
    if ranks is not None and group is not None and list(ranks) != dist.get_process_group_ranks(group):
        raise ValueError(f"cp_ranks={list(ranks)}, but cp_group has the ranks {dist.get_process_group_ranks(group)}: give one")
    name = group_name(group if group is not None or ranks is None else tuple(ranks))
    return t.clone() if name == "local:1" else _moved(t, cu, name, back)


def wrap_zigzag_allgather_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    return_attn_probs: bool = False,
    enable_ring: bool = True,
    use_cute: bool = False,
    process_group: Group = None,
    return_lse: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within packed documents whose rows `wrap_maybe_shuffle` has put in zigzag order; keys and values are gathered.

    Args:
        q: ``[T, Hq, D]``; k ``[T, Hk, D]``; v ``[T, Hk, Dv]``.
        cu_seqlens_q, cu_seqlens_k: int32 boundaries of the documents in the whole row.
        alibi_slopes, dropout_p: see `wrap_ring_attn_varlen_func`.
        softmax_scale, causal, window_size, deterministic, process_group: see `wrap_ring_attn_varlen_func`.
        return_attn_probs, enable_ring, use_cute: must be left as they are.
        return_lse: return ``(out, softmax_lse)``, the latter ``[Hq, T]``.
        max_seqlen_q, max_seqlen_k: not needed here; where given, no document may be longer.

    Returns:
        out ``[T, Hq, Dv]``, or out and lse.

    Raises:
        ValueError, NotImplementedError: an argument is not as described.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(16, 4, 8) for _ in range(3))
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> wrap_zigzag_allgather_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([16, 4, 8])
    """
    _check_ring(enable_ring)
    if return_attn_probs or use_cute:
        raise NotImplementedError("return_attn_probs and use_cute must be False: take return_lse, and a kernel by its name")
    given: dict[str, Any] = {}
    said = (("softmax_scale", softmax_scale), ("dropout_p", dropout_p), ("causal", causal), ("window_size", window_size))
    for name, value in (*said, ("deterministic", deterministic), ("return_attn_probs", return_lse)):
        given[name] = constant(name, value)
    Options(**given)
    settings = Settings(**given)
    most_q, most_k = constant("max_seqlen_q", max_seqlen_q), constant("max_seqlen_k", max_seqlen_k)
    longest = "" if most_q is None and most_k is None else f"{most_q},{most_k}"
    return zigzag_attention(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes),
        settings=str(settings),
        longest=longest,
        process_group=process_group,
    )


def zigzag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    settings: str = "{}",
    longest: str = "",
    process_group: Group = None,
    ring_size: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The op behind `wrap_zigzag_allgather_attn_varlen_func`; `settings` and `ring_size` as in `ops.packed_attention`."""
    given = Settings.parse(settings)
    check_qkv(q, k, v)
    if nnscaler.tracing():
        out, lse = nnscaler.stand_in(_ZIGZAG, q, k, v)
        return (out, lse) if given.return_attn_probs else out
    for table, most in zip((cu_seqlens_q, cu_seqlens_k), longest.split(",") if longest else (), strict=False):
        if most != "None":
            check_documents(table, int(most))
    recipe = Recipe(group=group_of(process_group, ring_size), layout=_PER_DOCUMENT, transport="all_gather")
    rows = Rows(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    options = options_of(given, alibi_slopes=alibi_slopes)
    out, lse = out_and_lse(q, k, v, recipe, options, rows)
    return (out, lse) if given.return_attn_probs else out


# -- Transformer Engine ----------------------------------------------------------------------------------------------------------


def get_transformer_engine_info() -> dict[str, Any]:
    """Whether Transformer Engine is installed and new enough for the kernel of that name; it is not imported.

    Returns:
        ``has_transformer_engine``, ``version_ok``, ``has_cp_function``, ``env_enable_cp``, ``version``, ``required_version``.
        The third and fourth are False: the rings here are this package's own, and no environment variable switches them.

    Example:
        >>> get_transformer_engine_info()["required_version"]
        '2.2.0+'
    """
    version = transformer_engine.version
    return {
        "has_transformer_engine": bool(version),
        "version_ok": bool(version and TorchVersion(version) >= transformer_engine.minimum),
        "has_cp_function": False,
        "env_enable_cp": False,
        "version": version or None,
        "required_version": f"{transformer_engine.minimum}+",
    }


def print_transformer_engine_status() -> None:
    """Print `get_transformer_engine_info`, one line an entry."""
    print("TransformerEngine:")
    for name, value in get_transformer_engine_info().items():
        print(f"  {name}: {value}")


# -- registration ----------------------------------------------------------------------------------------------------------------


def _returns_lse(settings: str) -> bool:
    return Settings.parse(settings).return_attn_probs


OPS = (
    nnscaler.attention_op(dense_attention, SPECS["wrap_ring_attn_func"], _returns_lse),
    nnscaler.attention_op(packed_attention, SPECS["wrap_ring_attn_varlen_func"], _returns_lse),
    nnscaler.attention_op(zigzag_attention, _ZIGZAG, _returns_lse, ordered=True),
    nnscaler.rows_op(shuffled_rows),
    nnscaler.loss_op(summed_loss),
)
"""The ops that stand behind the names above and those of `nnscaler_ring`."""

nnscaler.connect(OPS)
