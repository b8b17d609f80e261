"""What torch ships: its CPU flash kernel, and FlashAttention-2 with varlen and windows on CUDA.

Nothing to install, so these are the default everywhere. On CPU the kernel knows only full and top-left causal attention and
masks; `tiles` cuts every band into those. On CUDA a window aligned at the last row and key is what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from ..merge import merge_
from . import tiles
from .base import Case, Grad, Kernel, Scores, Spans, Window, rows
from .tiles import Kind, Piece

aten = torch.ops.aten


class AtenCpu(Kernel):
    """``_scaled_dot_product_flash_attention_for_cpu``: all floating dtypes, GQA, lse in fp32 (float64 for float64)."""

    name = "aten"

    def check_sizes(self, case: Case) -> None:
        if case.device != "cpu":
            raise NotImplementedError(f"this is torch's CPU kernel, the tensors are on {case.device}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        head_dim_v = v.shape[-1]
        q, k, v = _pad(q, k, v)
        k, v = _heads_as(q, k), _heads_as(q, v)
        parts = [_span(q[:, i0:i1], k[:, j0:j1], v[:, j0:j1], window, scores.scale) for i0, i1, j0, j1 in rows(spans)]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat([o for o, _ in parts], 1), torch.cat([x for _, x in parts], 2))
        return out[..., :head_dim_v], lse

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        heads_k = k.shape[2]
        q, k, v, out, d_out = _pad(grad.q, k, v, grad.out, grad.d_out)
        k, v = _heads_as(q, k), _heads_as(q, v)
        for i0, i1, j0, j1 in rows(spans):
            for piece in tiles.pieces(i1 - i0, j1 - j0, window):
                at = piece._replace(i0=piece.i0 + i0, i1=piece.i1 + i0, j0=piece.j0 + j0, j1=piece.j1 + j0)
                for b in _batches(at, q.shape[0]):
                    mask = _mask(piece, q.dtype)
                    read = [*(_rows(x[b], at) for x in (d_out, q)), *(_keys(x[b], at) for x in (k, v)), _rows(out[b], at)]
                    lse = _tiled(grad.lse[b].transpose(1, 2).unsqueeze(3), at.i0, at.i1, at).squeeze(3)
                    dq, dk, dv = _run_backward(at.kind, read, lse, mask, scores.scale)
                    _add_rows(grad.dq[b], dq, at)
                    _add_keys(grad.dk[b], dk, at, heads_k)
                    _add_keys(grad.dv[b], dv, at, heads_k)


def _span(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    """One span's result: that of its one piece, or its pieces merged in fp32."""
    pieces = tiles.pieces(q.shape[1], k.shape[1], window)
    if len(pieces) == 1 and pieces[0].repeat == 1:
        return _run(pieces[0], q, k, v, scale)
    disjoint = sum((p.i1 - p.i0) * p.repeat for p in pieces) == q.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype if disjoint else exact)
    lse = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=exact)
    for piece in pieces:
        for b in _batches(piece, q.shape[0]):
            block_out, block_lse = _run(piece, q[b], k[b], v[b], scale)
            column = block_lse.transpose(1, 2).unsqueeze(3)
            at = (b, slice(piece.i0, piece.i0 + block_out.shape[1]))
            if disjoint:
                out[at], lse[at] = block_out, column
            else:
                merge_(out[at], lse[at], block_out, column)
    return out, lse.squeeze(3).transpose(1, 2)


def _batches(piece: Piece, batch: int) -> list[slice]:
    """The batch rows of one kernel call: all, or one by one where the piece's repeats are the kernel's batch."""
    return [slice(None)] if piece.repeat == 1 else [slice(b, b + 1) for b in range(batch)]


def _run(piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out ``[B, rows, H, D]`` and lse ``[B, H, rows]`` of a piece and its repeats."""
    read = [_rows(q, piece), _keys(k, piece), _keys(v, piece)]
    anti, causal = piece.kind is Kind.ANTI, piece.kind in (Kind.CAUSAL, Kind.ANTI)
    if anti:
        read = [x.flip(2) for x in read]
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*read, 0.0, causal, attn_mask=_mask(piece, q.dtype), scale=scale)
    if anti:
        out, lse = out.flip(2), lse.flip(2)
    if piece.repeat > 1:
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), lse.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    return out.transpose(1, 2), lse


def _run_backward(kind: Kind, read: list[Tensor], lse: Tensor, mask: Tensor | None, scale: float) -> list[Tensor]:
    """dq, dk and dv ``[B, H, rows, D]`` of a piece; `read` is d_out, q, k, v, out."""
    anti, causal = kind is Kind.ANTI, kind in (Kind.CAUSAL, Kind.ANTI)
    if anti:
        read, lse = [x.flip(2) for x in read], lse.flip(2)
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = flash(*read, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return [x.flip(2) for x in grads] if anti else list(grads)


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


def _add_rows(total: Tensor, part: Tensor, piece: Piece) -> None:
    part, step = part.transpose(1, 2)[..., : total.shape[-1]], piece.i1 - piece.i0
    if piece.repeat == 1:
        total[:, piece.i0 : piece.i1] += part
    else:
        total[0, piece.i0 : piece.i0 + step * piece.repeat] += part.flatten(0, 1)


def _add_keys(total: Tensor, part: Tensor, piece: Piece, heads_k: int) -> None:
    """Add a piece's dk or dv; the repeats' keys overlap, so they are added one after the other."""
    if part.shape[1] != heads_k:
        part = part.unflatten(1, (heads_k, -1)).sum(2)
    part, head_dim = part.transpose(1, 2), total.shape[-1]
    if piece.repeat == 1:
        total[:, piece.j0 : piece.j1] += part[..., :head_dim]
        return
    step = piece.i1 - piece.i0
    for n in range(piece.repeat):
        total[0, piece.j0 + n * step : piece.j1 + n * step] += part[n, ..., :head_dim]


def _mask(piece: Piece, dtype: torch.dtype) -> Tensor | None:
    """The additive mask of a band's tile, or None where every row sees every key."""
    if piece.kind is not Kind.BAND:
        return None
    distance = torch.arange(piece.j0, piece.j1) - torch.arange(piece.i0, piece.i1).unsqueeze(1)
    hidden = (distance < piece.low) | (distance > piece.high)
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _pad(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """The tensors with zeros appended to one common head dim, which changes no score and no result."""
    width = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def _heads_as(q: Tensor, k: Tensor) -> Tensor:
    """k with q's number of heads where torch's CPU kernel cannot share them among query heads."""
    return k if k.shape[2] == q.shape[2] or _SHARES_HEADS else k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)


_SHARES_HEADS = TorchVersion(torch.__version__) >= "2.13"
"""torch's CPU kernel takes fewer key heads than query heads. On 2.6 its backward then writes out of bounds; 2.13 is right, and
releases between were not tried."""


class AtenCuda(Kernel):
    """``_flash_attention_forward`` and ``_backward``: FlashAttention-2 as torch ships it, one varlen call for many spans."""

    name = "aten"

    def check_sizes(self, case: Case) -> None:
        if case.device != "cuda":
            raise NotImplementedError(f"this is torch's CUDA kernel, the tensors are on {case.device}")
        if case.dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(f"FlashAttention-2 takes bfloat16 and float16, not {case.dtype}")
        if max(case.head_dim, case.head_dim_v) > 256:
            raise NotImplementedError(f"FlashAttention-2 takes head dims up to 256, not {case.head_dim} and {case.head_dim_v}")
        if torch.cuda.get_device_capability() < (8, 0):
            raise NotImplementedError("FlashAttention-2 needs a GPU of compute capability 8.0 or newer")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        head_dim_v, batch = v.shape[-1], q.shape[0]
        q, k, v = _pad(q, k, v, multiple=8)
        packed = _Packed(spans, q, k)
        out, lse, *_ = aten._flash_attention_forward(
            *(packed.rows(q), packed.keys(k), packed.keys(v)),
            *packed.sizes,
            0.0,
            False,
            False,
            scale=scores.scale,
            **_sides(window),
        )
        if packed.dense:
            return out[..., :head_dim_v], lse
        return out.unflatten(0, (batch, -1))[..., :head_dim_v], lse.unflatten(1, (batch, -1)).transpose(0, 1)

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        q, k, v, out, d_out = _pad(grad.q, k, v, grad.out, grad.d_out, multiple=8)
        packed = _Packed(spans, q, k)
        lse = packed.rows(grad.lse.transpose(1, 2))
        lse = (lse.transpose(1, 2) if packed.dense else lse.T).contiguous()
        state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of the dropout that is not there
        read = (packed.rows(d_out), packed.rows(q), packed.keys(k), packed.keys(v), packed.rows(out), lse)
        with _deterministic(grad.deterministic):
            dq, dk, dv = aten._flash_attention_backward(
                *read, *packed.sizes, 0.0, False, state, state[:0], scale=scores.scale, **_sides(window)
            )
        packed.add(grad.dq, dq, spans[:, :2])
        packed.add(grad.dk, dk, spans[:, 2:])
        packed.add(grad.dv, dv, spans[:, 2:])


class _Packed:
    """The spans as the kernel takes them: one dense call, or rows end to end with their boundaries, batch after batch."""

    def __init__(self, spans: Spans, q: Tensor, k: Tensor) -> None:
        self.spans, self.dense = rows(spans), len(spans) == 1
        num_q, num_k = (spans[:, 1] - spans[:, 0]).tolist(), (spans[:, 3] - spans[:, 2]).tolist()
        bounds = (None, None) if self.dense else (_bounds(num_q, q), _bounds(num_k, k))
        self.sizes = (*bounds, max(num_q), max(num_k))

    def rows(self, x: Tensor) -> Tensor:
        """The spans' query rows of ``[B, L, ...]``."""
        return self._take(x, [(i0, i1) for i0, i1, _, _ in self.spans])

    def keys(self, x: Tensor) -> Tensor:
        """The spans' key rows of ``[B, M, ...]``."""
        return self._take(x, [(j0, j1) for _, _, j0, j1 in self.spans])

    def _take(self, x: Tensor, at: list[tuple[int, int]]) -> Tensor:
        if self.dense:
            return x[:, at[0][0] : at[0][1]]
        ordered = all(a[1] == b[0] for a, b in pairwise(at))
        taken = x[:, at[0][0] : at[-1][1]] if ordered else torch.cat([x[:, lo:hi] for lo, hi in at], dim=1)
        return taken.flatten(0, 1)

    def add(self, total: Tensor, part: Tensor, at: Spans) -> None:
        """Add a gradient of the spans' rows to the accumulator; spans may share keys."""
        part = part if self.dense else part.unflatten(0, (total.shape[0], -1))
        start = 0
        for lo, hi in at.tolist():
            total[:, lo:hi] += part[:, start : start + hi - lo, :, : total.shape[-1]]
            start += hi - lo


def _bounds(counts: list[int], x: Tensor) -> Tensor:
    """int32 boundaries of the spans in every row of the batch, on x's device without a sync."""
    bounds = torch.tensor([0, *(counts * x.shape[0])], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return bounds.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else bounds


def _sides(window: Window) -> dict[str, int | None]:
    return {"window_size_left": window[0], "window_size_right": window[1]}


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's own switch for FlashAttention's deterministic backward, set for one call."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before, warn_only=warn)
