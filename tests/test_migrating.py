"""Users of ring-flash-attention change the import: its calls as its users write them; signatures are in `test_spec`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import nnscaler_ring as ring_flash_attn
from nnscaler_ring.core import mask
from tests import oracle

B, S, H, D = 1, 48, 4, 8
DOCUMENTS = [0, 16, 48]


def contiguous(x: Tensor, rank: int, world: int) -> Tensor:
    return x.chunk(world, 1)[rank]


def zigzag(x: Tensor, rank: int, world: int) -> Tensor:
    chunks = x.chunk(2 * world, 1)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], 1)


def stripe(x: Tensor, rank: int, world: int) -> Tensor:
    return x[:, rank::world]


def each(cut: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor, int, int], Tensor]:
    """Each document cut so."""
    pairs = list(pairwise(DOCUMENTS))
    return lambda x, rank, world: torch.cat([cut(x[:, lo:hi], rank, world) for lo, hi in pairs], 1)


CUTS = {"ring_flash_attn": contiguous, "zigzag_ring_flash_attn": zigzag, "stripe_flash_attn": stripe}
CUTS |= {"ring_flash_attn_varlen": each(contiguous), "zigzag_ring_flash_attn_varlen": each(zigzag)}
CUTS |= {"llama3_flash_attn_varlen": contiguous}


def as_written_there(rank: int, world_size: int, family: str) -> None:
    """Broadcast, cut, detach, call with lse, backward; against dense attention in float64."""
    varlen, cut = "varlen" in family, CUTS[family]
    torch.manual_seed(rank)
    qkv, d_out = torch.randn(B, S, 3, H, D, dtype=torch.float64), torch.randn(B, S, H, D, dtype=torch.float64)
    for x in (qkv, d_out):
        dist.broadcast(x, src=0)
    whole = [x.clone().requires_grad_() for x in qkv.unbind(2)]
    seen = mask.build(S, causal=True, cu_seqlens_q=DOCUMENTS if varlen else None).as_array()
    want, want_lse = oracle.attention(*whole, seen, D**-0.5)
    grads = torch.stack(torch.autograd.grad(want, whole, d_out), 2)
    local, local_d_out = (cut(x, rank, world_size).detach().clone() for x in (qkv, d_out))
    local.requires_grad_()
    given: tuple[Any, ...] = ()
    if varlen:
        local_d_out = local_d_out.squeeze(0)
        cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
        shard = cu_seqlens // world_size
        given = (shard, int((shard[1:] - shard[:-1]).max()))
    if family.startswith("llama3"):
        prepared = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal=True, rank=rank, world_size=world_size)
        given = (*prepared[:4], 1, prepared[4])
    named = {"dropout_p": 0, "causal": True, "window_size": (-1, -1), "alibi_slopes": None, "deterministic": False}
    func = getattr(ring_flash_attn, f"{family}_qkvpacked_func")
    out, lse, _ = func(local.squeeze(0) if varlen else local, *given, **named, return_attn_probs=True)
    out.backward(local_d_out)
    assert local.grad is not None
    lse = (lse.unsqueeze(0) if varlen else lse).transpose(1, 2)
    wanted = [cut(x.detach(), rank, world_size) for x in (want, want_lse.transpose(1, 2), grads)]
    for got, expected in zip((out.unsqueeze(0) if varlen else out, lse, local.grad), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", CUTS)
def test_calls_as_their_users_write_them(ranks: Any, family: str) -> None:
    ranks(2).run(as_written_there, family)
