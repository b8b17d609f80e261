"""Kernels that know only `full`, top-left `causal` and small additive masks: `tiles` cuts every band into those.

Torch's CPU kernel and oneDNN's on XPU are of this kind; a backend says how one piece is run, forward and backward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..device import sum_dtype
from ..merge import merge_
from . import tiles
from .base import Grad, Kernel, Scores, Spans, Window
from .packed import pad
from .tiles import Kind, Piece


class Tiled(Kernel):
    """Attention piece by piece; pieces that share rows are merged in fp32."""

    shares_heads = True
    """Both passes take fewer key heads than query heads."""
    exact = False
    """Half precision is computed in fp32, so that nothing is rounded before the end, and log-sum-exps add up in float64."""

    @abstractmethod
    def attend(self, read: Sequence[Tensor], causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """out ``[B, H, rows, D]`` and lse ``[B, H, rows]`` of q, k and v as ``[B, H, rows, D]``; a mask is added to the scores."""

    @abstractmethod
    def gradients(self, read: Sequence[Tensor], lse: Tensor, causal: bool, mask: Tensor | None, scale: float) -> Sequence[Tensor]:
        """dq, dk and dv of `attend`; `read` is d_out, q, k, v, out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        head_dim_v = v.shape[-1]
        q, k, v = pad(*self._as_computed(q, k, v))
        k, v = self._heads_as(q, k), self._heads_as(q, v)
        parts = [self._span(q[:, i0:i1], k[:, j0:j1], v[:, j0:j1], window, scores.scale) for i0, i1, j0, j1 in spans.tolist()]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat([o for o, _ in parts], 1), torch.cat([x for _, x in parts], 2))
        return out[..., :head_dim_v], lse

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        all_q, all_k, all_v = grad.totals
        q, k, v, out, d_out = pad(*self._as_computed(grad.q, k, v, grad.out, grad.d_out))
        k, v = self._heads_as(q, k), self._heads_as(q, v)
        for i0, i1, j0, j1 in spans.tolist():
            for piece in tiles.pieces(i1 - i0, j1 - j0, window):
                at = piece._replace(i0=piece.i0 + i0, i1=piece.i1 + i0, j0=piece.j0 + j0, j1=piece.j1 + j0)
                for b in _batches(at, q.shape[0]):
                    mask = _mask(piece, q)
                    read = [*(_rows(x[b], at) for x in (d_out, q)), *(_keys(x[b], at) for x in (k, v)), _rows(out[b], at)]
                    lse = _tiled(grad.lse[b].transpose(1, 2).unsqueeze(3), at.i0, at.i1, at).squeeze(3)
                    dq, dk, dv = self._run_backward(at.kind, read, lse, mask, scores.scale)
                    _add(all_q[b], dq, at.i0, at.i1, at)
                    _add(all_k[b], dk, at.j0, at.j1, at)
                    _add(all_v[b], dv, at.j0, at.j1, at)

    def _span(self, q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
        """One span's result: that of its one piece, or its pieces merged in fp32."""
        pieces = tiles.pieces(q.shape[1], k.shape[1], window)
        if len(pieces) == 1 and pieces[0].repeat == 1:
            return self._run(pieces[0], q, k, v, scale)
        disjoint = sum((p.i1 - p.i0) * p.repeat for p in pieces) == q.shape[1]
        exact = sum_dtype(q.dtype)
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype if disjoint else exact)
        lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=torch.float64 if self.exact and not disjoint else exact)
        for piece in pieces:
            for b in _batches(piece, q.shape[0]):
                block_out, block_lse = self._run(piece, q[b], k[b], v[b], scale)
                column = block_lse.transpose(1, 2).unsqueeze(3)
                at = (b, slice(piece.i0, piece.i0 + block_out.shape[1]))
                if disjoint:
                    out[at], lse[at] = block_out, column
                else:
                    merge_(out[at], lse[at], block_out, column)
        return out, lse.to(exact).squeeze(3).transpose(1, 2)

    def _run(self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out ``[B, rows, H, D]`` and lse ``[B, H, rows]`` of a piece and its repeats."""
        read = [_rows(q, piece), _keys(k, piece), _keys(v, piece)]
        anti, causal = piece.kind is Kind.ANTI, piece.kind in (Kind.CAUSAL, Kind.ANTI)
        if anti:
            read = [x.flip(2) for x in read]
        out, lse = self.attend(read, causal, _mask(piece, q), scale)
        if anti:
            out, lse = out.flip(2), lse.flip(2)
        if piece.repeat > 1:
            return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), lse.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return out.transpose(1, 2), lse

    def _run_backward(self, kind: Kind, read: list[Tensor], lse: Tensor, mask: Tensor | None, scale: float) -> list[Tensor]:
        """dq, dk and dv ``[B, H, rows, D]`` of a piece; `read` is d_out, q, k, v, out."""
        anti, causal = kind is Kind.ANTI, kind in (Kind.CAUSAL, Kind.ANTI)
        if anti:
            read, lse = [x.flip(2) for x in read], lse.flip(2)
        grads = self.gradients(read, lse, causal, mask, scale)
        return [x.flip(2) for x in grads] if anti else list(grads)

    def _as_computed(self, *read: Tensor) -> Sequence[Tensor]:
        return [x.to(sum_dtype(x.dtype)) for x in read] if self.exact else read

    def _heads_as(self, q: Tensor, k: Tensor) -> Tensor:
        """k with q's number of heads where the kernel cannot share them among query heads."""
        return k if k.shape[2] == q.shape[2] or self.shares_heads else k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)


def _batches(piece: Piece, batch: int) -> list[slice]:
    """The batch rows of one kernel call: all, or one by one where the piece's repeats are the kernel's batch."""
    return [slice(None)] if piece.repeat == 1 else [slice(b, b + 1) for b in range(batch)]


def _tiled(x: Tensor, lo: int, hi: int, piece: Piece) -> Tensor:
    """Rows ``lo:hi`` of ``[B, L, H, D]``, and of the repeats, as a view ``[B or repeats, H, hi - lo, D]``."""
    if piece.repeat == 1:
        return x[:, lo:hi].transpose(1, 2)
    step = piece.i1 - piece.i0
    return x[0, lo : hi + step * (piece.repeat - 1)].unfold(0, hi - lo, step).transpose(2, 3)


def _rows(x: Tensor, piece: Piece) -> Tensor:
    return _tiled(x, piece.i0, piece.i1, piece)


def _keys(x: Tensor, piece: Piece) -> Tensor:
    return _tiled(x, piece.j0, piece.j1, piece)


def _add(total: Tensor, part: Tensor, lo: int, hi: int, piece: Piece) -> None:
    """Add the gradient of a piece's rows or keys ``lo:hi`` and of its repeats; a key head's is the sum over its query heads."""
    heads, width = total.shape[2:]
    part = (part if part.shape[1] == heads else part.unflatten(1, (heads, -1)).sum(2)).transpose(1, 2)[..., :width]
    step = piece.i1 - piece.i0
    if piece.repeat == 1:
        total[:, lo:hi] += part
    elif hi - lo == step:
        total[0, lo : lo + step * piece.repeat] += part.flatten(0, 1)
    else:  # keys of repeats overlap: one after the other
        for n in range(piece.repeat):
            total[0, lo + n * step : hi + n * step] += part[n]


def _mask(piece: Piece, like: Tensor) -> Tensor | None:
    """The additive mask of a band's tile, or None where every row sees every key."""
    if piece.kind is not Kind.BAND:
        return None
    ahead = piece.j0 - piece.i0
    sizes = piece.i1 - piece.i0, piece.j1 - piece.j0
    return _band(*sizes, piece.low - ahead, piece.high - ahead, like.dtype, like.device)


@lru_cache(maxsize=64)
def _band(rows: int, keys: int, low: int, high: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row i sees keys ``i + low .. i + high``; the tiles of a call, and of the calls that follow, have few shapes."""
    distance = torch.arange(keys, device=device) - torch.arange(rows, device=device).unsqueeze(1)
    hidden = (distance < low) | (distance > high)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
