"""What a review found once: strides, shards of different lengths, autocast, ranks that differ in what they differentiate."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import nnscaler_ring as nr
from nnscaler_ring.core import engine
from nnscaler_ring.core.call import Options, attend
from nnscaler_ring.core.device import on_device, take
from nnscaler_ring.core.kernels import Case, Grad, choose
from nnscaler_ring.core.kernels.aten import AtenCpu
from nnscaler_ring.core.kernels.packed import Packing, bounds
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.layouts import build
from nnscaler_ring.core.merge import update_out_and_lse
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.relayout import _relayout, gather, relayout
from nnscaler_ring.core.steps import Message
from nnscaler_ring.core.sums import Sum
from nnscaler_ring.core.transport import LocalTransport, transport_of
from nnscaler_ring.core.walk import KV, KVSums, outgoing, put
from tests import oracle
from tests.interpreter import skip_without_triton
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


# -- a second review -------------------------------------------------------------------------------------------------------------

BLIND = float("-inf")
HIDING = {
    "early keys from late queries": lambda i, j: (i >= 8) & (j < 8),
    "other documents": lambda i, j: i // 6 != j // 6,
    "all keys from a row": lambda i, j: i == 3,
}


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("hiding", HIDING)
def test_a_bias_that_hides_all_keys_of_a_call(hiding: str, world: int, kernel: str) -> None:
    """A bias of -inf is a mask; a rank's keys may all be hidden from a row, or all that there are."""
    if kernel == "triton":
        skip_without_triton()
    n, given = 16, [x.float() for x in qkv()]
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
    bias = torch.zeros(4, n, n).masked_fill(HIDING[hiding](i, j), BLIND)
    q, k, v, b = (x.clone().requires_grad_() for x in (*given, bias))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5 + b
    weights = torch.where(scores == BLIND, 0.0, scores.softmax(-1).nan_to_num(0.0))
    want = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
    upon = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, (q, k, v), upon)
    leaves = [x.clone().requires_grad_() for x in (*given, bias)]
    recipe = str(Recipe(group=f"local:{world}", transport="ring", kernel=kernel))
    out, *_ = engine.attention(*leaves[:3], *[None] * 4, leaves[3], None, n, n, 8**-0.5, 0, recipe)
    got = torch.autograd.grad(out, leaves, upon)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got, wanted, strict=False):
        if hiding != "all keys from a row":  # autograd of a softmax over nothing is NaN
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("kernel", ["aten", "reference", "triton"])
@pytest.mark.parametrize("loss", [lambda o: o.sum(), lambda o: o.sum(3).square().sum(), lambda o: o.mT.contiguous().square().sum()])
def test_gradients_of_any_stride(loss: Any, kernel: str) -> None:
    """That of a sum has a stride of 0 in every dim."""
    if kernel == "triton":
        skip_without_triton()
    answers = []
    for name in (kernel, "reference"):
        leaves = [x.float().requires_grad_() for x in qkv()]
        answers.append(torch.autograd.grad(loss(nr.wrap_ring_attn_func(*leaves, kernel=name)), leaves))
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def sent_by(world: int, heads_k: int, **how: Any) -> tuple[int, list[Tensor]]:
    """Bytes of a backward pass under all_to_all, and the gradients."""
    given = oracle.inputs(0, (1, 64, 64), (world, heads_k, 16, 16), torch.float32)
    recipe = Recipe(group=f"local:{world}", transport="all_to_all", causal=True, **how)
    transport = transport_of(recipe.group)
    assert isinstance(transport, LocalTransport)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    out, *_ = engine.attention(*leaves, *[None] * 6, 64, 64, 0.25, 0, str(recipe))
    before = sum(transport.bytes_sent)
    found = torch.autograd.grad(out, leaves, given.d_out)
    return sum(transport.bytes_sent) - before, list(found)


def test_shared_key_heads_are_summed_in_fp32() -> None:
    """However many ranks share one; `reduce_dtype` is of what travels, which is rounded once."""
    for world in (2, 16):
        _, want = sent_by(world, 1)
        _, got = sent_by(world, 1, reduce_dtype="bfloat16")
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 2.2e-3


def test_reduce_dtype_is_of_heads_that_no_ranks_share_too() -> None:
    full, _ = sent_by(4, 4)
    less, _ = sent_by(4, 4, reduce_dtype="bfloat16")
    elements = 2 * 64 * 4 * 16 * 3 // 4  # of dk and dv; three quarters of them travel
    assert full - less == elements * (4 - 2)


def test_totals_with_a_kernel_that_takes_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those for CUDA do: totals are then summed from its own weights."""

    def half_alone(self: AtenCpu, case: Case) -> None:
        if case.dtype != torch.bfloat16:
            raise NotImplementedError("half precision alone")

    q, k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in qkv())
    want = nr.flash_attention(q, k, v, causal=True, return_total_attention=True, kernel="reference")[1]
    choose.cache_clear()
    monkeypatch.setattr(AtenCpu, "check_sizes", half_alone)
    got = nr.flash_attention(q, k, v, causal=True, return_total_attention=True, kernel="aten")[1]
    choose.cache_clear()
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)


def test_a_block_that_sees_nothing_poisons_no_row() -> None:
    """Whatever its out has, first or later."""
    nothing, none = torch.full((1, 2, 1, 4), float("nan")), torch.full((1, 1, 2), BLIND)
    out, lse = update_out_and_lse(None, None, nothing, none)
    out, lse = update_out_and_lse(out, lse, torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2))
    out, lse = update_out_and_lse(out, lse, nothing, none)
    assert torch.equal(out, torch.ones(1, 2, 1, 4)) and torch.equal(lse, torch.zeros(1, 2, 1, 1))


def test_neighbouring_spans_are_added_at_once() -> None:
    """Not a launch for each of a row's documents."""
    at = np.array([[n, n + 1, n, n + 1] for n in range(100)])
    packing, total = Packing(at, torch.zeros(2, 100, 1, 8)), Sum(torch.zeros(2, 100, 1, 8))
    part = torch.randn(200, 1, 8)
    total.total().zero_()
    with torch.profiler.profile(acc_events=True) as seen:  # it warns without
        packing.add(total, part, 0)
        rows = packing.rows(total.total())
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls["aten::add_"] == 1 and "aten::cat" not in calls
    assert torch.equal(rows, part)


def test_moving_rows_copies_one_table_each_way() -> None:
    """To the device: one for what is sent and one for what is filled, however many ranks there are."""
    with mock.patch("nnscaler_ring.core.relayout.on_device", side_effect=on_device) as copied:
        source, target = build("contiguous", 32, 8), build("stripe", 32, 8)
        LocalTransport(8).run([_relayout(source, target, rank, [torch.zeros(1, 4, 2)] * 3) for rank in range(8)])
    assert copied.call_count == 2 * 8


def test_a_default_device_does_not_draw_the_seed() -> None:
    torch.manual_seed(3)
    want = nr.wrap_ring_attn_func(*qkv(), dropout_p=0.5)
    torch.manual_seed(3)
    given = qkv()
    with torch.device("meta"):
        got = nr.wrap_ring_attn_func(*given, dropout_p=0.5)
    assert torch.equal(got, want)


def test_a_default_device_makes_no_boundaries() -> None:
    with torch.device("meta"):
        found = bounds((3, 4), torch.zeros(1, device="cpu"))
    assert found.device.type == "cpu" and found.dtype == torch.int32 and found.tolist() == [0, 3, 7]


def test_numbers_of_numpy() -> None:
    q, k, v = qkv()
    want = nr.wrap_streaming_llm_attn_func(q, k, v, window_size=4, num_sinks=2)
    got = nr.wrap_streaming_llm_attn_func(q, k, v, window_size=np.int64(4), num_sinks=np.int64(2), deterministic=np.bool_(False))
    assert torch.equal(got, want)
    cp = nr.ContextParallel()
    assert torch.equal(cp.attention(q, k, v, sinks=np.int64(2)), cp.attention(q, k, v, sinks=2))


def test_one_rank_whose_layout_has_another_order() -> None:
    cp = nr.ContextParallel(layout=Layout(np.array([[0, 0, 4], [0, 1, 4]]), 8, 1, 2))
    x = torch.arange(8)
    assert cp.shard(x, 0).tolist() == [0, 2, 4, 6, 1, 3, 5, 7] and torch.equal(cp.unshard(cp.shard(x, 0), 0), x)


def in_the_order_of_shards(rank: int, world_size: int) -> list[str]:
    """Warnings of ops that are given shards, with and without their group."""
    q, k, v = qkv()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nr.wrap_zigzag_attn_func(q, k, v, layout="zigzag", process_group=dist.group.WORLD)
        nr.wrap_zigzag_attn_func(q, k, v)
        assert not caught
        nr.wrap_zigzag_attn_func(q, k, v, layout="zigzag")
    return [f"{each.filename == __file__} {each.message}" for each in caught]


def test_shards_without_a_group_are_told(ranks) -> None:
    """Only their order tells that they are shards."""
    for told_by_one in ranks(2).run(in_the_order_of_shards):
        (warning,) = told_by_one
        assert warning.startswith("True wrap_zigzag_attn_func: layout='zigzag' without a process_group"), warning


# -- another review --------------------------------------------------------------------------------------------------------------


def of_heads(rank: int, world_size: int, transport: str) -> list[tuple[bool, int]]:
    """For an lse that nobody asks for, one that nobody differentiates and one that rank 0 alone does: whether the kernel gets a
    gradient of it, and bytes sent backward."""
    found, cp = [], nr.ContextParallel(transport=transport)
    shards = [torch.randn(1, 8, heads, 8).requires_grad_() for heads in (4, 2, 2)]
    for lse, differentiated in ((False, False), (True, False), (True, rank == 0)):
        result = cp.attention(*shards, return_attn_probs=lse)
        out, loss = (result[0], result[1].sum()) if lse else (result, torch.zeros(()))
        sent, exchange, differentiate = 0, dist.batch_isend_irecv, AtenCpu.differentiate
        asked = []

        def counted(ops: list[dist.P2POp], exchange: Any = exchange) -> Any:
            nonlocal sent
            sent += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
            return exchange(ops)

        def spied(self: AtenCpu, grad: Grad, *rest: Any, asked: list[bool] = asked, to: Any = differentiate) -> None:
            asked.append(grad.d_lse is not None)
            to(self, grad, *rest)

        spies = mock.patch.object(dist, "batch_isend_irecv", counted), mock.patch.object(AtenCpu, "differentiate", spied)
        with spies[0], spies[1]:
            torch.autograd.grad(out.sum() + loss * differentiated, shards)
        found.append((any(asked), sent))
    return found


def test_heads_travel_without_a_gradient_of_lse_that_nobody_can_have(ranks: Any) -> None:
    """Kernels without such a gradient are not used in another way then, and nothing is sent for it."""
    for rank, found in enumerate(ranks(2).run(of_heads, "all_to_all")):
        assert [asked for asked, _ in found] == [False, True, True], rank
        assert found[1][1] - found[0][1] == 8 * 2 * 4, "own rows, the other's heads, fp32"
    assert [asked for asked, _ in ranks(2).run(of_heads, "ring")[0]] == [False, True, True]


def test_a_kernel_that_cannot_differentiate_lse_is_refused_before_heads_travel() -> None:
    """Its values are one wider there: at the limit of its head dim that is too wide."""
    tensors = [torch.randn(1, 8, 4, 8) for _ in range(3)]
    limit = mock.patch.object(AtenCpu, "check_sizes", side_effect=lambda case: refuse_above_8(case))
    recipe = Recipe(group="local:2", kernel="aten", transport="all_to_all")
    choose.cache_clear()
    with limit:
        attend(*tensors, recipe, Options())
        attend(*tensors, replace(recipe, transport="ring"), Options(return_attn_probs=True))
        with pytest.raises(NotImplementedError, match="8 is the widest"):
            attend(*tensors, recipe, Options(return_attn_probs=True))
    choose.cache_clear()


def refuse_above_8(case: Case) -> None:
    if case.head_dim_v > 8:
        raise NotImplementedError("8 is the widest")


def test_boundaries_that_change_before_the_backward_pass_are_told(ranks: Any) -> None:
    """The table is saved as tensors are: a loader's buffer that is filled anew is no other layout."""
    ranks(2).run(changed_boundaries)


def changed_boundaries(rank: int, world_size: int) -> None:
    cp, cu = nr.ContextParallel(layout="zigzag-per-document"), torch.tensor([0, 4, 16])
    mine = cp.shard(torch.randn(16), 0, cu_seqlens=cu).requires_grad_()
    whole = gather(mine.reshape(1, -1), cu, 16, "zigzag-per-document", dist.group.WORLD.group_name)
    moved = relayout([mine.reshape(1, -1)], cu, 16, "zigzag-per-document", "contiguous", dist.group.WORLD.group_name)[0]
    cu.copy_(torch.tensor([0, 8, 16]))
    for result in (whole, moved):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_rows_at_many_intervals() -> None:
    """Taken and put by an index; a copy for each would be a launch for each."""
    data, rows = torch.randn(64, 3), np.array([(5 * n, 5 * n + 1 + n % 3) for n in range(12)])
    part = take(data, rows)
    assert torch.equal(part, torch.cat([data[lo:hi] for lo, hi in rows.tolist()]))
    got, want, start = data.clone(), data.clone(), 0
    put(got, rows, part + 1)
    for lo, hi in rows.tolist():
        want[lo:hi] = part[start : start + hi - lo] + 1
        start += hi - lo
    assert torch.equal(got, want)
    own, brought = (KV(x[:, None, None, :2], x[:, None, None, 2:]) for x in (data, part.half()))
    sums = KVSums([Sum(x) for x in own.k.chunk(2, -1)], Sum(own.v))
    for _ in range(2):
        sums.add(rows, brought)
    want = torch.zeros_like(data).index_copy_(
        0, torch.cat([torch.arange(lo, hi) for lo, hi in rows.tolist()]), 2 * part.half().float()
    )
    got = torch.cat([x.total() for x in (*sums.k, sums.v)], -1)
    assert torch.equal(got[0, :, 0], want)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("wanted", "copied"),
    [
        ([], (0, 0)),
        ([[]], (0, 0)),
        ([[(0, 64)]], (0, 64)),
        ([[(0, 8)], [], [(56, 64)]], (0, 16)),
        ([[(0, 4)]] * 20, (0, 4)),  # the same to all
        ([[(0, 40)], [(20, 64)]], (0, 64)),  # each by itself would be more
        ([[(0, 4), (8, 12)]] * 3, (8, 8)),
        ([[(2 * n, 2 * n + 1) for n in range(20)]], (20, 20)),
    ],
)
def test_what_is_put_together_to_be_sent(wanted: list[list[tuple[int, int]]], copied: tuple[int, int], batch: int) -> None:
    """Of one batch row nothing is copied but what lies apart."""
    own = KV.of(torch.randn(batch, 64, 3, 4), torch.randn(batch, 64, 3, 5))
    messages = [Message(peer, np.array(rows, dtype=np.int64).reshape(-1, 2)) for peer, rows in enumerate(wanted)]
    sent = outgoing(own, messages)
    got = [sent(m.rows) for m in messages]
    for held, whole in ((x, y) for rows in got for x, y in zip(rows, own, strict=True)):
        assert held.is_contiguous() and held.shape[1:] == whole.shape[1:]
    for rows, at in zip(got, wanted, strict=True):
        index = [row for lo, hi in at for row in range(lo, hi)]
        assert torch.equal(rows.k, own.k[:, index]) and torch.equal(rows.v, own.v[:, index])
    for part, one in (("keys", 12), ("values", 15)):
        made = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (getattr(rows, part) for rows in got)}
        made.pop(getattr(own, part).untyped_storage().data_ptr(), None)
        assert sum(made.values()) == copied[batch - 1] * batch * one * 4


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("transport", ["ring", "grouped_ring", "all_gather", "halo", "all_to_all"])
@pytest.mark.parametrize("rank", range(3))
def test_a_batch_of_none(rank: int, transport: str, kernel: str) -> None:
    """What is empty is in nobody's memory, and yet no two gradients may be in one; kernels for GPUs refuse it."""
    if kernel == "triton":
        skip_without_triton()
    q, k, v = (torch.randn(0, 4, 3, 8, requires_grad=True) for _ in range(3))
    recipe = Recipe(group=f"pretend:3:{rank}", transport=transport, kernel=kernel)
    out, lse, _ = attend(q, k, v, recipe, Options(causal=True, return_attn_probs=True))
    assert isinstance(out, Tensor) and out.shape == (0, 4, 3, 8)
    assert [x.shape for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))] == [(0, 4, 3, 8)] * 3


@pytest.mark.parametrize("transport", ["ring", "all_to_all"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_result_can_be_changed_in_place(world_size: int, transport: str) -> None:
    """It is no view of what a kernel made; the backward pass tells whether it has saved what was changed."""
    recipe = Recipe(group=f"local:{world_size}", transport=transport, causal=True)
    tensors = [x.requires_grad_() for x in qkv()]
    out = attend(*tensors, recipe, Options(causal=True, return_attn_probs=True))
    assert isinstance(out, tuple) and not any(x._is_view() for x in out[:2])
    changed = out[0].add_(1.0)
    if world_size == 1:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.sum().backward()
        return
    others = [x.detach().requires_grad_() for x in tensors]
    plain = attend(*others, recipe, Options(causal=True))
    assert isinstance(plain, Tensor) and torch.equal(changed, plain + 1.0)
    if transport == "all_to_all":  # which saves what travelled
        for x, y in zip(*(torch.autograd.grad(one.sum(), of) for one, of in ((changed, tensors), (plain, others))), strict=True):
            assert torch.allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_that_were_made_for_inference(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        cu = torch.tensor([0, 5, 16], dtype=dtype)
    call = lambda cu: lambda *x: nr.ContextParallel().attention(*x, cu_seqlens=cu)  # noqa: E731
    for got, want in zip(grads(call(cu), qkv()), grads(call(cu.clone()), qkv()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("group", ["local:1", "local:3"])
def test_a_nan_in_a_sink_stays_one(group: str) -> None:
    """Of one head, in the result and in its own gradient; a sink of -inf is none."""
    q, k, v = qkv()
    sink = torch.tensor([torch.nan, 0.5, -torch.inf, 0.0], dtype=q.dtype, requires_grad=True)
    options = Options(causal=True, window_size=(3, 0), learnable_sink=sink)
    out = attend(q, k, v, Recipe(group=group, causal=True, window=(3, 0)), options)
    plain = attend(q, k, v, Recipe(group=group, causal=True, window=(3, 0)), Options(causal=True, window_size=(3, 0)))
    assert isinstance(out, Tensor) and isinstance(plain, Tensor)
    assert out[:, :, 0].isnan().all() and out[:, :, 1:].isfinite().all() and torch.allclose(out[:, :, 2], plain[:, :, 2])
    (d_sink,) = torch.autograd.grad(out.sum(), sink)
    assert d_sink[0].isnan() and d_sink[1:].isfinite().all() and d_sink[2] == 0


def test_slopes_of_one_batch_row_are_those_of_all() -> None:
    q, slopes = torch.randn(2, 8, 2, 4), torch.tensor([0.1, 0.2])
    one, all_ = (nr.wrap_ring_attn_func(q, q, q, alibi_slopes=x) for x in (slopes[None], slopes))
    assert torch.equal(one, all_)


class NoGradient(torch.autograd.Function):
    """What comes after it gives no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_a_result_without_any_gradient_has_none() -> None:
    q = torch.randn(1, 8, 2, 4, requires_grad=True)
    NoGradient.apply(nr.wrap_ring_attn_func(q, q, q)).sum().backward()
    assert q.grad is None or not q.grad.any()


def test_no_batch_rows_and_a_gradient_of_the_log_sum_exp() -> None:
    q = torch.zeros(0, 8, 2, 8, dtype=torch.float16, requires_grad=True)
    out, lse, _ = nr.wrap_ring_attn_func(q, q, q, return_attn_probs=True, kernel="aten")
    (out.sum() + lse.sum()).backward()
    assert q.grad is not None and q.grad.shape == q.shape


def one_loss_of_the_log_sum_exp(rank: int, world_size: int, transport: str) -> None:
    cp, whole = nr.ContextParallel(transport=transport), [x.requires_grad_() for x in qkv()]
    shards = [cp.shard(x.detach(), 1).requires_grad_() for x in whole]
    out, lse, _ = cp.attention(*shards, return_attn_probs=True)
    grads = torch.autograd.grad(out.sum() + lse.sum() if rank == 0 else out.sum(), shards)
    out, lse, _ = nr.wrap_ring_attn_func(*whole, return_attn_probs=True)
    of_first = lse[..., : shards[0].shape[1]]
    for got, want in zip(grads, torch.autograd.grad(out.sum() + of_first.sum(), whole), strict=True):
        torch.testing.assert_close(got, cp.shard(want, 1))


@pytest.mark.parametrize("transport", ["all_to_all", "ring"])
def test_one_rank_alone_may_differentiate_the_log_sum_exp(ranks, transport: str) -> None:
    ranks(2).run(one_loss_of_the_log_sum_exp, transport)


def test_a_sink_has_its_gradient_without_the_log_sum_exp() -> None:
    sizes = (1, 16, 4, 8), (1, 16, 2, 8), (1, 16, 2, 8), (4,)
    q, k, v, sink = (torch.randn(*size, dtype=torch.float64).requires_grad_() for size in sizes)
    found = []
    for named in ({}, {"return_attn_probs": True}):
        out = nr.wrap_ring_attn_func(q, k, v, learnable_sink=sink, **named)
        out = out[0] if isinstance(out, tuple) else out
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, sink))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k.repeat_interleave(2, 2)) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.cat([scores, sink.view(1, 4, 1, 1).expand(1, 4, 16, 1)], 3).softmax(3)[..., :-1]
    want = torch.einsum("bhlm,bmhd->blhd", weights, v.repeat_interleave(2, 2))
    for one, other in zip(found[0], [want, *torch.autograd.grad(want.square().sum(), (q, k, v, sink))], strict=True):
        torch.testing.assert_close(one, other)
