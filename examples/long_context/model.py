"""A small Llama in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

It is written once, as for one device, and names no rank, shard or process group. Fed with tensors it runs on one device; fed
with DTensors whose sequence dim is sharded it runs on a mesh, where only the attention function it was given communicates.

Shapes: ``B`` rows, ``S`` tokens of a row, ``C`` model dim, ``Hq``/``Hk`` query/key heads, ``D`` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(q [B, S, Hq, D], k [B, S, Hk, D], v [B, S, Hk, D], cu_seqlens) -> [B, S, Hq, D]``, causal inside each document."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of the model; the defaults train 40 steps of 8,192 bytes, twice, in about a minute and a half on two CPU cores."""

    vocab_size: int = 256
    dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 352
    rope_theta: float = 10_000.0


class Llama(nn.Module):
    """Bytes in, logits of the next byte out.

    Args:
        config: the sizes.
        attention: the attention of every layer; see `Attention`.
    """

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits ``[B, S, vocab]`` of `tokens` ``[B, S]`` at `positions` ``[B, S]`` in the documents of `cu_seqlens`."""
        angles = (positions.unsqueeze(-1) * self.frequencies).unsqueeze(2)  # [B, S, 1, D / 2]: the same for every head
        rope = (angles.cos(), angles.sin())
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rope, cu_seqlens)
        return self.head(self.norm(x))


class RMSNorm(nn.Module):
    """Divides by the root of the mean square of the last dim; spelled out, as nnscaler's autodist fails on torch's own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = SelfAttention(config, attention)
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cu_seqlens)
        return x + self.feed_forward(self.feed_forward_norm(x))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        self.q = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        out = self.attention(rotate(q, rope), rotate(k, rope), v, cu_seqlens)
        return self.out(out.flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward of Llama."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of `x` ``[B, S, H, D]``: each pair ``(i, i + D / 2)`` turned by its angle ``[B, S, 1, D / 2]``."""
    cos, sin = rope
    first, second = x.chunk(2, dim=3)  # not -1: nnscaler 0.9 takes none below 0 here
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def next_byte_loss(logits: Tensor, targets: Tensor, num_targets: int) -> Tensor:
    """Mean cross entropy in nats over the `num_targets` targets of the whole row.

    Divided before it is summed: of a sharded row the sum is still partial, and there torch 2.6 would take the divisor of an
    earlier row from DTensor's cache.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses / num_targets).sum()
