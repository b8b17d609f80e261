"""The names by which ring-flash-attention puts itself into transformers; thin fronts of `transformers.Attention`.

Models whose attention implementation is ``flash_attention_2``, ``_3`` or ``_4`` then share each packed row over a group, rank `r`
holding the `r`-th part. These functions change what transformers calls by those names, as the library does that they come from; an
`Attention` under a name of its own changes nothing for other models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..context import ContextParallel
from ..core.call import check_boundaries, group_name
from .transformers import Attention, refuse_masks, register, registered

NAMES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")

_BOUNDARIES: dict[str, Tensor] = {}
"""For a group's name the boundaries of the row that its ranks now share."""
_BEFORE: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {}
"""What transformers called by `NAMES`."""
_ON = [True]


class _Substitute(Attention):
    """`Attention` over the row that `update_ring_flash_attn_params` told of."""

    _hint = "under gradient checkpointing run the backward pass before update_ring_flash_attn_params tells of the next row"

    def __init__(self, process_group: dist.ProcessGroup | None, heads_k_stride: int) -> None:
        super().__init__(ContextParallel(process_group, heads_k_stride=heads_k_stride), "ring_attn")
        self.group = group_name(process_group)

    def _documents(self, kwargs: Mapping[str, Any], tokens: int, first: bool) -> tuple[Tensor | None, int | None]:
        if self.group not in _BOUNDARIES:
            raise ValueError("call update_ring_flash_attn_params(cu_seqlens, process_group) before the model")
        return super()._documents({**kwargs, "cu_seq_lens_q": _BOUNDARIES[self.group]}, tokens, first)


def substitute_hf_flash_attn(process_group: dist.ProcessGroup | None, heads_k_stride: int = 1) -> None:
    """Let transformers' flash attention run over a group; also registered as ``ring_attn``, for machines without flash-attn.

    Args:
        process_group: the ranks that share each row; None for the default group.
        heads_k_stride: key heads that travel at once; 0 for all.

    Raises:
        ValueError: this process is not in the group, or a stride below 0.

    Example:
        >>> substitute_hf_flash_attn(None)  # then from_pretrained(..., attn_implementation="flash_attention_2")
    """
    ring = _Substitute(process_group, heads_k_stride)
    register(ring.name, _switched(ring, registered("sdpa")[0] or ring), _switched(refuse_masks, registered("sdpa")[1] or _nothing))
    for name in NAMES:
        before = _BEFORE.setdefault(name, registered(name))
        if before[0] is not None:
            register(name, _switched(ring, before[0]), _switched(refuse_masks, before[1] or _nothing))


def _switched(on: Callable[..., Any], off: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (on if _ON[0] else off)(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def update_ring_flash_attn_params(cu_seqlens: Tensor, process_group: dist.ProcessGroup | None) -> None:
    """Say which documents the rows to come hold.

    Args:
        cu_seqlens: int32 boundaries over the whole row ``[0, ..., T]``.
        process_group: the ranks that share it.

    Raises:
        ValueError: not ascending from 0.

    Example:
        >>> import torch
        >>> update_ring_flash_attn_params(torch.tensor([0, 300, 1000], dtype=torch.int32), None)
    """
    cu = check_boundaries(cu_seqlens, None)
    if len(cu) < 2:
        raise ValueError("cu_seqlens must be an int32 tensor [0, ..., T]")
    _BOUNDARIES[group_name(process_group)] = torch.from_numpy(cu)


def use_ring_attn(flag: bool) -> None:
    """Whether `substitute_hf_flash_attn` is in force.

    Args:
        flag: False: transformers' own attention, on each rank's tokens alone.

    Example:
        >>> use_ring_attn(True)
    """
    _ON[0] = bool(flag)
