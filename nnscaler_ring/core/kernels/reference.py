"""Plain torch: any device, dtype and head dim, every feature. The oracle of the other backends and the last resort.

Scores are computed in fp32 (float64 for float64), a few query rows at a time so that memory stays bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Case, Grad, Kernel, Spans, Window, rows

MAX_SCORES = 1 << 26
"""Scores held at once, over batch and heads: 256 MiB of fp32."""


class Reference(Kernel):
    """Attention by its definition."""

    name = "reference"

    def check(self, case: Case) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scale: float) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for i0, i1, j0, j1, align in _pieces(q, spans):
            scores = _scores(_tile(q, i0, i1), _tile(k, j0, j1, q), scale, _hidden(i0, i1, j0, j1, align, window, q.device))
            lse = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - lse.unsqueeze(-1))
            outs.append((weights @ _tile(v, j0, j1, q)).transpose(1, 2))
            lses.append(lse)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=2)

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scale: float) -> None:
        heads_k = k.shape[2]
        for i0, i1, j0, j1, align in _pieces(grad.q, spans):
            q, key, value = _tile(grad.q, i0, i1), _tile(k, j0, j1, grad.q), _tile(v, j0, j1, grad.q)
            out, d_out = _tile(grad.out, i0, i1), _tile(grad.d_out, i0, i1)
            scores = _scores(q, key, scale, _hidden(i0, i1, j0, j1, align, window, k.device))
            weights = torch.exp(scores - grad.lse[:, :, i0:i1].to(scores.dtype).unsqueeze(-1))
            d_scores = weights * (d_out @ value.mT - (out * d_out).sum(-1, keepdim=True)) * scale
            grad.dq[:, i0:i1] += (d_scores @ key).transpose(1, 2)
            grad.dk[:, j0:j1] += _fold(d_scores.mT @ q, heads_k)
            grad.dv[:, j0:j1] += _fold(weights.mT @ d_out, heads_k)


def _pieces(q: Tensor, spans: Spans) -> list[tuple[int, int, int, int, int]]:
    """The spans cut by query rows to `MAX_SCORES`, with the alignment ``j1 - i1`` of the whole span; a piece keeps all keys."""
    pieces = []
    for i0, i1, j0, j1 in rows(spans):
        step = max(1, MAX_SCORES // max(1, q.shape[0] * q.shape[2] * (j1 - j0)))
        pieces += [(i, min(i + step, i1), j0, j1, j1 - i1) for i in range(i0, i1, step)]
    return pieces


def _tile(x: Tensor, lo: int, hi: int, like: Tensor | None = None) -> Tensor:
    """``[B, H, hi - lo, D]`` in the dtype of computation, with the heads of `like`."""
    x = x[:, lo:hi].transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    return x if like is None else x.repeat_interleave(like.shape[2] // x.shape[1], dim=1)


def _fold(x: Tensor, heads_k: int) -> Tensor:
    """Sum over the query heads of each key head: ``[B, Hq, M, D] -> [B, M, Hk, D]``."""
    return x.unflatten(1, (heads_k, -1)).sum(2).transpose(1, 2)


def _hidden(i0: int, i1: int, j0: int, j1: int, align: int, window: Window, device: torch.device) -> Tensor | None:
    """Which pairs of a piece are not seen, or None where all are."""
    if window == (-1, -1):
        return None
    distance = torch.arange(j0, j1, device=device) - torch.arange(i0, i1, device=device).unsqueeze(1) - align
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= distance < -window[0]
    if window[1] >= 0:
        hidden |= distance > window[1]
    return hidden


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    scores = (q * scale) @ k.mT
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))
