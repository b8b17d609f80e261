"""Online-softmax merge: results over disjoint keys become the result over all of them.

Every result carries its log-sum-exp, so that ``exp(lse)`` is the weight of its `out`. The weights are compared through a sigmoid
of the difference, which neither overflows nor underflows at any size of the logits (Milakov & Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .device import sum_dtype
from .held import HERE, Held, Part, Place, Scattered, alone, at_once, together


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a result into `out` ``[B, L, H, Dv]`` and `lse` ``[B, L, H, 1]`` in place; ``-inf`` in both leaves a row as it is."""
    merge_all_(out, lse, [(block_out, block_lse)], fresh=False)


def merge_all_(out: Tensor, lse: Tensor, parts: Sequence[Part], fresh: bool, into: Tensor | None = None) -> None:
    """Merge results into `out` and `lse` in place, or store what they merge to where these are `fresh` and hold nothing yet.

    One kernel on an accelerator where Triton is there, for up to `at_once` results; a chain of torch ops elsewhere, of `out` in
    fp32. `into` takes out in place of `out`, in another dtype: rounded once.
    """
    into = out if into is None else into
    if at_once(out.device.type) > 1 and not (fresh and len(parts) == 1):
        together().merge_(out, lse, parts, fresh, into)
        return
    if fresh:
        into.copy_(parts[0][0])
        lse.copy_(parts[0][1])
    assert into is out or len(parts) == 1, "where one is merged at once nothing is held to the end"
    for part, part_lse in parts[fresh:]:
        weight = torch.sigmoid(part_lse - lse).nan_to_num_(nan=0.0)  # -inf less -inf: neither has seen anything
        out.lerp_(part.to(out.dtype), weight.to(out.dtype))
        lse.copy_(torch.logaddexp(lse, part_lse))


def empty_lse(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for the log-sum-exp ``[B, L, H, 1]`` of ``[B, L, H, ...]``.

    In memory heads come before rows, as kernels give it; rows before heads, as in `like`, where torch ops merge: longer loops.
    """
    batch, rows, heads = like.shape[:3]
    if at_once(like.device.type) == 1:
        return like.new_empty((batch, rows, heads, 1), dtype=dtype)
    return like.new_empty((batch, heads, rows), dtype=dtype).transpose(1, 2).unsqueeze(3)


class Results(Held):
    """out ``[B, L, H, Dv]`` and lse ``[B, L, H, 1]`` of calls over disjoint keys; a part is the same of some rows.

    Args:
        like: a tensor ``[B, L, H, ...]``.
        width: Dv.
        end: the dtype of the result.
        dtype, lse_dtype: in which they are merged; `end` and the exact one where None.
        into, lse: memory for the result, uninitialised; None: made, or taken, when it is needed.
        come: how many results each row gets, see `Held`.
    """

    def __init__(
        self,
        like: Tensor,
        width: int,
        end: torch.dtype,
        dtype: torch.dtype | None = None,
        lse_dtype: torch.dtype | None = None,
        *,
        into: Tensor | None = None,
        lse: Tensor | None = None,
        come: np.ndarray | None = None,
    ) -> None:
        super().__init__(like.shape[1], like.device, come)
        self._like, self._width, self._end = like, width, end
        self._dtype, self._lse_dtype = dtype or end, lse_dtype or sum_dtype(end)
        self._into, self._lse = into, lse
        self._out: Tensor | None = None

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return self._like.new_empty((*self._like.shape[:3], self._width), dtype=dtype)

    @property
    def _result(self) -> Tensor:
        if self._into is None:
            self._into = self._empty(self._end)
        return self._into

    @property
    def out(self) -> Tensor:
        """Where results are merged."""
        if self._dtype == self._end:
            return self._result
        if self._out is None:
            self._out = self._empty(self._dtype)
        return self._out

    @property
    def _total(self) -> Tensor:
        return self.out

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            self._lse = empty_lse(self._like, self._lse_dtype)
        return self._lse

    def place(self, intervals: np.ndarray) -> Place:
        self._dtype = sum_dtype(self._end)
        return super().place(intervals)._replace(lse=self.lse.squeeze(3).transpose(1, 2))

    def result(self) -> Tensor:
        """The end: out, rounded once. It may be the very part that has come."""
        if self._dtype == self._end:
            self.finish()
            return self.out
        pieces = self._pieces(0, len(self._seen))
        if self._scattered(len(pieces.seen)):
            self._by_table(pieces, into=self._result)
            return self._result
        for rows, parts, seen in pieces:
            end, lse = self._result[:, rows], self.lse[:, rows]
            if parts:
                merge_all_(self.out[:, rows] if seen else end, lse, parts, not seen, end)
            elif seen:
                end.copy_(self.out[:, rows])
            else:
                end.zero_()
                lse.fill_(float("-inf"))
        return self._result

    def _start(self) -> None:
        memory = self._into if self._dtype == self._end else self._out
        if memory is None and (part := self._taken(self._dtype)):
            out, lse = part
            self._into, self._out = (out, None) if self._dtype == self._end else (self._into, out)
            if self._lse is None and lse.dtype == self._lse_dtype and alone(lse.squeeze(3).transpose(1, 2)):
                self._lse = lse
            else:
                self.lse.copy_(lse)
            self._seen[:] = HERE

    def _combine(self, rows: slice, parts: Sequence[Part], seen: bool) -> None:
        merge_all_(self.out[:, rows], self.lse[:, rows], parts, fresh=not seen)

    def _clear(self, rows: slice) -> None:
        self.out[:, rows].zero_()
        self.lse[:, rows].fill_(float("-inf"))

    def _scatter(self, pieces: Scattered, which: np.ndarray, into: Tensor | None) -> None:
        fresh = not pieces.seen[which].any()
        out = into if into is not None and fresh else self.out
        together().merge_(out, self.lse, [(x, lse) for x, lse in pieces.parts], fresh, into, pieces.table(which, self.device))


def update_out_and_lse(
    out: Tensor | None,
    lse: Tensor | None,
    block_out: Tensor,
    block_lse: Tensor,
    slice_: tuple[slice | int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge one block's result into the running result: ``out - sigmoid(block_lse - lse) * (out - block_out)``.

    In place, so not differentiable: in training weigh the results by the softmax of their log-sum-exps.

    Args:
        out: running result ``[B, L, H, Dv]``, fp32 (float64 for float64 blocks); None at the first block. Updated in place.
        lse: its log-sum-exp, natural log, ``[B, L, H, 1]``; None at the first block. Updated in place.
        block_out: ``[B, l, H, Dv]``, any floating dtype.
        block_lse: ``[B, H, l]``, natural log; ``-inf`` where a row sees nothing: it is left alone, whatever `block_out` has, as is
            a row of ``+inf`` and zeros, flash-attn 2's way of saying so.
        slice_: the rows of `out` and `lse` that the block is about, as an index; all where None.

    Returns:
        The updated ``(out, lse)``.

    Raises:
        ValueError: a slice is given with the first block, when there is nothing to take a slice of; one of `out` and `lse` without
            the other; rows, heads or a head dim that differ.

    Example:
        >>> o, l = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2)
        >>> out, lse = update_out_and_lse(None, None, o, l)
        >>> out, lse = update_out_and_lse(out, lse, o + 1, l)
        >>> out[0, 0, 0, 0].item()
        0.5
    """
    dtype = sum_dtype(block_out.dtype)
    column = block_lse.transpose(-2, -1).unsqueeze(-1).to(dtype)
    if (out is None) != (lse is None):
        raise ValueError(f"out is {_kind(out)} and lse {_kind(lse)}: give both, or None for both at the first block")
    if column.shape[:-1] != block_out.shape[:-1]:
        raise ValueError(
            f"block_out {tuple(block_out.shape)} and block_lse {tuple(block_lse.shape)}: give [B, l, H, Dv] and [B, H, l]"
        )
    nothing = (column == float("inf")) & (block_out[..., :1] == 0)  # of what overflowed `block_out` is NaN
    column = column.masked_fill(nothing, float("-inf"))
    block_out = block_out.masked_fill(column == float("-inf"), 0.0)
    if out is None or lse is None:
        if slice_ is not None:
            raise ValueError("the first block sets every row: pass slice_=None, or start from out=0 and lse=-inf")
        return block_out.to(dtype), column.clone(memory_format=torch.contiguous_format)
    part, part_lse = (out, lse) if slice_ is None else (out[slice_], lse[slice_])
    if part.shape != block_out.shape or part_lse.shape != column.shape:
        given = f"out {tuple(part.shape)} and lse {tuple(part_lse.shape)}"
        raise ValueError(f"{given} of the rows, block_out {tuple(block_out.shape)}: give as many rows, heads and features")
    merge_(part, part_lse, block_out, column)
    if slice_ is not None:
        out[slice_], lse[slice_] = part, part_lse  # an index that is a tensor takes a copy
    return out, lse


def _kind(x: Tensor | None) -> str:
    return "None" if x is None else f"of shape {tuple(x.shape)}"


def flatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Padded log-sum-exp -> packed.

    Args:
        lse: ``[documents, H, max_seqlen]``.
        cu_seqlens: int32 ``[documents + 1]``, boundaries of the documents in the packed row.

    Returns:
        ``[H, T]``, of the same dtype.

    Raises:
        ValueError: documents that are more, or longer, than what `lse` has of them.

    Example:
        >>> flatten_varlen_lse(torch.arange(6.0).reshape(2, 1, 3), torch.tensor([0, 1, 4])).tolist()
        [[0.0, 3.0, 4.0, 5.0]]
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    if lse.dim() != 3 or len(lengths) != lse.shape[0] or max(lengths, default=0) > lse.shape[2]:
        raise ValueError(f"lse {tuple(lse.shape)} of documents of {lengths} tokens: give [documents, H, max_seqlen]")
    return torch.cat([row[:, :length] for row, length in zip(lse, lengths, strict=True)], dim=1)


def unflatten_varlen_lse(lse: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Packed log-sum-exp -> padded.

    Args:
        lse: ``[T, H, 1]``, where rows behind the last document are left out, or ``[T, H]``.
        cu_seqlens: int32 ``[documents + 1]``, boundaries of the documents in the packed row.
        max_seqlen: tokens of the longest document, at least.

    Returns:
        ``[documents, H, max_seqlen]``, of the same dtype, ``-inf`` in the padding.

    Raises:
        ValueError: an `lse` of another number of tokens, as is one of ``[H, T]``; a longer document than `max_seqlen`.

    Example:
        >>> unflatten_varlen_lse(torch.arange(4.0).reshape(4, 1), torch.tensor([0, 1, 4]), 3).tolist()
        [[[0.0, -inf, -inf]], [[1.0, 2.0, 3.0]]]
    """
    packed = lse.squeeze(-1) if lse.dim() == 3 else lse
    bounds = cu_seqlens.tolist()
    longest, tokens = max((hi - lo for lo, hi in pairwise(bounds)), default=0), max(bounds, default=0)
    few = tokens > packed.shape[0] or (lse.dim() == 2 and tokens < packed.shape[0])  # which may be [H, T]
    if packed.dim() != 2 or few or longest > max_seqlen:
        raise ValueError(
            f"lse {tuple(lse.shape)}, cu_seqlens up to {tokens} with a document of {longest} tokens, max_seqlen={max_seqlen}: "
            "give [T, H] or [T, H, 1] of all T tokens, and the length of the longest document"
        )
    padded = packed.new_full((len(bounds) - 1, packed.shape[1], max_seqlen), float("-inf"))
    for n, (lo, hi) in enumerate(pairwise(bounds)):
        padded[n, :, : hi - lo] = packed[lo:hi].T
    return padded
