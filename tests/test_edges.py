"""What a review found once: strides, shards of different lengths, autocast, ranks that differ in what they differentiate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import nnscaler_ring as nr
from tests.worlds import no_faults, refusal, told

CASES: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])}]


def qkv(dtype: torch.dtype = torch.float64, seq: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, seq, h, 8, dtype=torch.float64, generator=generator).to(dtype) for h in (4, 2, 2)]


def grads(call: Any, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("call", CASES, ids=str)
def test_a_last_dim_of_any_stride(which: int, call: dict[str, Any]) -> None:
    plain = qkv()
    strided = [x.mT.contiguous().mT if n == which else x for n, x in enumerate(plain)]
    assert strided[which].stride(-1) != 1
    op = lambda *x: nr.wrap_ring_attn_func(*x, **call)  # noqa: E731
    for a, b in zip(grads(op, plain), grads(op, strided), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", CASES, ids=str)
def test_autocast_does_not_reach_into_the_op(call: dict[str, Any]) -> None:
    op = lambda *x: nr.wrap_ring_attn_func(*x, **call)  # noqa: E731
    want = grads(op, qkv(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = grads(op, qkv(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_dropout(reentrant: bool) -> None:
    op = lambda q, k, v: nr.wrap_ring_attn_func(q, k, v, dropout_p=0.5, softcap=2.0)  # noqa: E731
    answers = []
    for run in (op, lambda *x: checkpoint(op, *x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        leaves = [x.requires_grad_() for x in qkv()]
        out = run(*leaves)
        out.square().sum().backward()
        answers.append([out.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_a_sink_of_minus_infinity_is_none() -> None:
    """Also for rows that see nothing."""
    tensors, mask = qkv(), nr.Mask([(4, 16, 0, 16)], 16)
    sink = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    out = nr.ContextParallel().attention(*tensors, mask, learnable_sink=sink)
    without = nr.ContextParallel().attention(*tensors, mask)
    assert isinstance(out, Tensor) and isinstance(without, Tensor)
    assert torch.allclose(out[:, :, [0, 3]], without[:, :, [0, 3]]) and (out[:, :4] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), sink)
    assert grad.isfinite().all() and (grad[[0, 3]] == 0).all() and (grad[1:3] != 0).all()


@pytest.mark.parametrize("parts", [[-1, 0], [0], [0.5, 1.0]])
def test_parts_that_are_none(parts: list[Any]) -> None:
    with pytest.raises(ValueError, match="parts="):
        nr.Mask([(0, 4, 0, 4), (4, 8, 4, 8)], 8, parts=parts)


def test_a_mask_of_parts_where_features_have_none() -> None:
    tensors, mask = qkv(seq=8), nr.Mask([(0, 4, 0, 4), (4, 8, 4, 8)], 8, parts=[1, 0])
    for call in ({"mask": mask}, {"mask": nr.Mask([(0, 8, 0, 8)], 8), "far": 3}):
        with pytest.raises(ValueError, match="parts"):
            nr.ContextParallel().attention(*tensors, **call)


@pytest.mark.parametrize("call", [{"dropout_p": 0.1, "dropout_seed": 1.5}, {"dropout_p": 0.1, "dropout_seed": 1 << 63}], ids=str)
def test_seeds_that_are_none(call: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dropout_seed="):
        nr.ring_flash_attn_func(*qkv(), **call)


def test_an_op_for_two_axes_runs_alone() -> None:
    assert torch.allclose(nr.wrap_ulysses_attn_func(*qkv(), transport="ring"), nr.wrap_ring_attn_func(*qkv()))  # type: ignore[arg-type]


def on_ranks(rank: int, world_size: int) -> list[str]:
    faults = []
    x = torch.randn(2, 4 * world_size + 1, 2, 8, dtype=torch.float64)
    for layout in ("zigzag", "contiguous"):
        cp = nr.ContextParallel(layout=layout)
        shard = cp.shard(x, 1)
        faults += told(layout, refusal(lambda cp=cp, s=shard: cp.attention(s, s, s), ValueError, ["seq_len", "different lengths"]))
        faults += told(layout, refusal(lambda cp=cp, s=shard: cp.unshard(s, 1), ValueError, ["seq_len"]))
        dist.barrier()
        cp.attention(shard, shard, shard, seq_len=x.shape[1])
    # one rank alone differentiates the log-sum-exp
    cp = nr.ContextParallel(transport="all_to_all")
    q, k, v = (t[:, :4].clone().requires_grad_() for t in qkv())
    out, lse, _ = cp.attention(q, k, v, return_attn_probs=True)  # type: ignore[misc]
    (out.sum() + (lse.sum() if rank == 0 else 0.0)).backward()
    assert q.grad is not None and q.grad.isfinite().all()
    mesh = init_device_mesh("cpu", (world_size,))
    d = distribute_tensor(torch.randn(1, 8, 2, 8), mesh, [Shard(1)])
    dropped = refusal(lambda: nr.wrap_ring_attn_func(d, d, d, dropout_p=0.5), ValueError, ["dropout_seed"])
    return faults + told("dropout on DTensors", dropped)


def test_ranks(ranks) -> None:
    no_faults(ranks(2).run(on_ranks))
