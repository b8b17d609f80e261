"""Online-softmax merge: results over disjoint keys become the result over all of them.

Every result carries its log-sum-exp, so that ``exp(lse)`` is the weight of its `out`. The weights are compared through a sigmoid
of the difference, which neither overflows nor underflows at any size of the logits (Milakov & Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a result into `out` ``[B, L, H, Dv]`` and `lse` ``[B, L, H, 1]`` in place; ``-inf`` in both leaves a row as it is.

    One kernel on an accelerator where Triton is there, a chain of torch ops elsewhere.
    """
    if out.device.type in ("cuda", "xpu") and (kernel := fused()) is not None:
        kernel(out, lse, block_out, block_lse)
        return
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(nan=0.0)  # -inf less -inf: neither has seen anything
    out.lerp_(block_out.to(out.dtype), weight.to(out.dtype))
    lse.copy_(torch.logaddexp(lse, block_lse))


@lru_cache(maxsize=1)
def fused() -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
    """`kernels.fused.merge_`, or None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .kernels.fused import merge_ as kernel

    return kernel


def update_out_and_lse(
    out: Tensor | None,
    lse: Tensor | None,
    block_out: Tensor,
    block_lse: Tensor,
    slice_: tuple[slice | int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge one block's result into the running result: ``out - sigmoid(block_lse - lse) * (out - block_out)``.

    Args:
        out: running result ``[B, L, H, Dv]``, fp32 (float64 for float64 blocks); None at the first block. Updated in place.
        lse: its log-sum-exp, natural log, ``[B, L, H, 1]``; None at the first block. Updated in place.
        block_out: ``[B, l, H, Dv]``, any floating dtype.
        block_lse: ``[B, H, l]``, natural log; ``-inf`` where a row sees nothing: it is left alone, whatever `block_out` has.
        slice_: the rows of `out` and `lse` that the block is about, as an index; all where None.

    Returns:
        The updated ``(out, lse)``.

    Raises:
        ValueError: a slice is given with the first block, when there is nothing to take a slice of.

    Example:
        >>> o, l = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2)
        >>> out, lse = update_out_and_lse(None, None, o, l)
        >>> out, lse = update_out_and_lse(out, lse, o + 1, l)
        >>> out[0, 0, 0, 0].item()
        0.5
    """
    dtype = exact_dtype(block_out.dtype)
    column = block_lse.transpose(-2, -1).unsqueeze(-1).to(dtype)
    block_out = block_out.masked_fill(column == float("-inf"), 0.0)
    if out is None or lse is None:
        if slice_ is not None:
            raise ValueError("the first block sets every row: pass slice_=None, or start from out=0 and lse=-inf")
        return block_out.to(dtype, copy=True), column.clone(memory_format=torch.contiguous_format)
    if slice_ is None:
        merge_(out, lse, block_out, column)
    else:
        merge_(out[slice_], lse[slice_], block_out, column)
    return out, lse


def flatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Padded ``[documents, H, max_seqlen]`` log-sum-exp -> packed ``[H, T]``.

    Example:
        >>> flatten_varlen_lse(torch.arange(6.0).reshape(2, 1, 3), torch.tensor([0, 1, 4])).tolist()
        [[0.0, 3.0, 4.0, 5.0]]
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return torch.cat([row[:, :length] for row, length in zip(lse, lengths, strict=True)], dim=1)


def unflatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Packed ``[T, H, 1]`` or ``[T, H]`` log-sum-exp -> padded ``[documents, H, max_seqlen]``, ``-inf`` in the padding.

    Example:
        >>> unflatten_varlen_lse(torch.arange(4.0).reshape(4, 1), torch.tensor([0, 1, 4]), 3).tolist()
        [[[0.0, -inf, -inf]], [[1.0, 2.0, 3.0]]]
    """
    packed = lse.squeeze(-1) if lse.dim() == 3 else lse
    bounds = cu_seqlens.tolist()
    padded = packed.new_full((len(bounds) - 1, packed.shape[1], max_seqlen), float("-inf"))
    for n, (lo, hi) in enumerate(pairwise(bounds)):
        padded[n, :, : hi - lo] = packed[lo:hi].T
    return padded
