"""Plain torch: any device, dtype and head dim, every feature. The oracle of the other backends and the last resort.

Scores are computed in fp32 (float64 for float64), a few query rows at a time so that memory stays bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import sum_dtype
from .base import Case, Grad, Kernel, Scores, Spans, Window, philox

MAX_SCORES = 1 << 26
"""Scores held at once, over batch and heads: 256 MiB of fp32."""


class Reference(Kernel):
    """Attention by its definition."""

    name = "reference"
    takes_d_lse = True
    features = frozenset({"softcap", "alibi", "bias", "dropout"})

    def check_sizes(self, case: Case) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for piece in _pieces(q, spans):
            i0, i1, j0, j1, _ = piece
            s, _ = _scores(_tile(q, i0, i1), _tile(k, j0, j1, q), scores, piece, window)
            lse = torch.logsumexp(s, dim=-1)
            weights = torch.softmax(s, -1)  # not exp(s - lse): an fp32 lse of 1e5 has lost what tells sums of weights apart
            weights = weights.masked_fill_((lse == float("-inf")).unsqueeze(-1), 0.0)  # a bias hides all keys of the row
            if scores.dropout:
                weights = weights * _kept(weights, scores, piece)
            outs.append((weights @ _tile(v, j0, j1, q)).transpose(1, 2))
            lses.append(lse)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=2)

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        heads_k, (dq, dk, dv) = k.shape[2], grad.totals
        for piece in _pieces(grad.q, spans):
            i0, i1, j0, j1, _ = piece
            q, key, value = _tile(grad.q, i0, i1), _tile(k, j0, j1, grad.q), _tile(v, j0, j1, grad.q)
            out, d_out = _tile(grad.out, i0, i1), _tile(grad.d_out, i0, i1)
            s, slope = _scores(q, key, scores, piece, window)
            weights = torch.exp(s - _finite(grad.lse[:, :, i0:i1].to(s.dtype)).unsqueeze(-1))
            d_weights, used = d_out @ value.mT, weights
            if scores.dropout:
                kept = _kept(weights, scores, piece)
                d_weights, used = d_weights * kept, weights * kept
            delta = (out * d_out).sum(-1, keepdim=True)
            delta = delta if grad.d_lse is None else delta - grad.d_lse[:, :, i0:i1].unsqueeze(-1)
            d_scores = weights * (d_weights - delta)
            if grad.d_bias is not None and scores.k_at is not None:
                d_bias = d_scores.sum((0, 1) if grad.d_bias.shape[0] == 1 else 0)
                grad.d_bias[:, i0:i1].index_add_(2, scores.k_at[j0:j1], d_bias.view(-1, i1 - i0, j1 - j0))
            d_scores = (d_scores if slope is None else d_scores * slope) * scores.scale
            dq[:, i0:i1] += (d_scores @ key).transpose(1, 2)
            dk[:, j0:j1] += _fold(d_scores.mT @ q, heads_k)
            dv[:, j0:j1] += _fold(used.mT @ d_out, heads_k)


Piece = tuple[int, int, int, int, int]
"""Query rows ``i0:i1``, key rows ``j0:j1``, and the alignment ``j1 - i1`` of the whole span."""


def _pieces(q: Tensor, spans: Spans) -> list[Piece]:
    """The spans cut by query rows to `MAX_SCORES`; a piece keeps all keys."""
    pieces = []
    for i0, i1, j0, j1 in spans.tolist():
        step = max(1, MAX_SCORES // max(1, q.shape[0] * q.shape[2] * (j1 - j0)))
        pieces += [(i, min(i + step, i1), j0, j1, j1 - i1) for i in range(i0, i1, step)]
    return pieces


def _tile(x: Tensor, lo: int, hi: int, like: Tensor | None = None) -> Tensor:
    """``[B, H, hi - lo, D]`` in the dtype of computation, with the heads of `like`."""
    x = x[:, lo:hi].transpose(1, 2).to(sum_dtype(x.dtype))
    return x if like is None else x.repeat_interleave(like.shape[2] // x.shape[1], dim=1)


def _finite(lse: Tensor) -> Tensor:
    """0 where a bias hides all keys of a row, whose weights ``exp(-inf - lse)`` are then 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _fold(x: Tensor, heads_k: int) -> Tensor:
    """Sum over the query heads of each key head: ``[B, Hq, M, D] -> [B, M, Hk, D]``."""
    return x.unflatten(1, (heads_k, -1)).sum(2).transpose(1, 2)


def _hidden(piece: Piece, window: Window, device: torch.device) -> Tensor | None:
    """Which pairs of a piece are not seen, or None where all are."""
    if window == (-1, -1):
        return None
    i0, i1, j0, j1, align = piece
    distance = torch.arange(j0, j1, device=device) - torch.arange(i0, i1, device=device).unsqueeze(1) - align
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= distance < -window[0]
    if window[1] >= 0:
        hidden |= distance > window[1]
    return hidden


def _scores(q: Tensor, k: Tensor, scores: Scores, piece: Piece, window: Window) -> tuple[Tensor, Tensor | None]:
    """The scores ``[B, H, rows, keys]``, and their derivative by the scaled products where a soft cap makes it other than 1."""
    i0, i1, j0, j1, _ = piece
    s, slope = (q * scores.scale) @ k.mT, None
    if scores.softcap:
        bent = torch.tanh(s / scores.softcap)
        s, slope = scores.softcap * bent, 1 - bent * bent
    if scores.alibi is not None:
        assert scores.q_at is not None and scores.k_at is not None
        q_at = scores.q_at[i0:i1] + (0 if scores.ahead is None else scores.ahead[i0:i1])
        distance = (scores.k_at[j0:j1] - q_at.unsqueeze(1)).abs()
        s = s - scores.alibi.to(s.dtype)[:, :, None, None] * distance
    if scores.bias is not None:
        assert scores.k_at is not None
        s = s + scores.bias[:, i0:i1].index_select(2, scores.k_at[j0:j1]).to(s.dtype)
    hidden = _hidden(piece, window, q.device)
    return s if hidden is None else s.masked_fill_(hidden, float("-inf")), slope


def _kept(weights: Tensor, scores: Scores, piece: Piece) -> Tensor:
    """What dropout multiplies the weights by: 0, or ``1 / (1 - p)``."""
    assert scores.q_at is not None and scores.k_at is not None
    i0, i1, j0, j1, _ = piece
    batch, heads = (torch.arange(n, device=weights.device) for n in weights.shape[:2])
    words = philox(
        scores.q_at[i0:i1].view(-1, 1),
        scores.k_at[j0:j1],
        (heads + scores.head0).view(-1, 1, 1),
        (batch + scores.batch0).view(-1, 1, 1, 1),
        scores.seed,
    )
    return (words >= round(scores.dropout * 2**32)).to(weights.dtype) / (1 - scores.dropout)
