"""Online-softmax merge: results over disjoint keys become the result over all of them.

Every result carries its log-sum-exp, so that ``exp(lse)`` is the weight of its `out`. The weights are compared through a sigmoid
of the difference, which neither overflows nor underflows at any size of the logits (Milakov & Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from torch import Tensor


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results and gradients: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a result into `out` ``[B, L, H, Dv]`` and `lse` ``[B, L, H, 1]`` in place; ``-inf`` in both leaves a row as it is."""
    merge_all_(out, lse, [(block_out, block_lse)], fresh=False)


def merge_all_(out: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor]], fresh: bool) -> None:
    """Merge results into `out` and `lse` in place, or store what they merge to where these are `fresh` and hold nothing yet.

    One kernel on an accelerator where Triton is there, for up to `at_once` results; a chain of torch ops elsewhere.
    """
    if at_once(out.device.type) > 1 and not (fresh and len(parts) == 1):
        kernel = fused()
        assert kernel is not None
        kernel.merge_(out, lse, parts, fresh)
        return
    if fresh:
        out.copy_(parts[0][0])
        lse.copy_(parts[0][1])
    for part, part_lse in parts[fresh:]:
        weight = torch.sigmoid(part_lse - lse).nan_to_num_(nan=0.0)  # -inf less -inf: neither has seen anything
        out.lerp_(part.to(out.dtype), weight.to(out.dtype))
        lse.copy_(torch.logaddexp(lse, part_lse))


def at_once(device: str) -> int:
    """How many results are merged in one pass over memory."""
    return 1 if device not in ("cuda", "xpu") or (kernel := fused()) is None else int(kernel.MOST)


@lru_cache(maxsize=1)
def fused() -> ModuleType | None:
    """`kernels.fused`, or None without Triton."""
    return None if importlib.util.find_spec("triton") is None else importlib.import_module(".kernels.fused", __package__)


class Results:
    """out ``[B, L, H, Dv]`` and lse ``[B, L, H, 1]`` of calls over disjoint keys.

    What comes is held until a row would have more than `at_once`: in half precision results that are merged together take 2 bytes
    an element each, and 2 to 8 once, one after the other 10 each. `flush` before reading.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse, self.most = out, lse, at_once(out.device.type)
        self._held: list[tuple[np.ndarray, Tensor, Tensor]] = []
        self._depth = np.zeros(out.shape[1], dtype=np.int64)

    def add(self, blocks: np.ndarray, part: Tensor, part_lse: Tensor) -> None:
        """The result of a call, ``[B, n, H, Dv]`` and ``[B, n, H, 1]``.

        Args:
            blocks: rows ``i0:i1`` of the results, end to end in the part, each with whether it is their first: ``[m, 3]``.
        """
        more = np.zeros_like(self._depth)
        for i0, i1, _ in blocks.tolist():
            more[i0:i1] += 1
        if (self._depth + more).max(initial=0) > self.most:
            self.flush()
        self._held.append((blocks, part, part_lse))
        self._depth += more
        if self.most == 1:
            self.flush()

    def flush(self) -> None:
        """Merge what is held."""
        cuts = np.unique(np.concatenate([blocks[:, :2].ravel() for blocks, _, _ in self._held])) if self._held else ()
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cuts]
        first = [False for _ in cuts]
        for blocks, part, part_lse in self._held:
            start = 0
            for i0, i1, fresh in blocks.tolist():
                for n in range(*np.searchsorted(cuts, (i0, i1)).tolist()):
                    at = slice(start + int(cuts[n]) - i0, start + int(cuts[n + 1]) - i0)
                    first[n] |= bool(fresh)
                    found[n].append((part[:, at], part_lse[:, at]))
                start += i1 - i0
        for n, parts in enumerate(found):
            if parts:
                rows = slice(int(cuts[n]), int(cuts[n + 1]))
                merge_all_(self.out[:, rows], self.lse[:, rows], parts, first[n])
        self._held, self._depth = [], np.zeros_like(self._depth)


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
