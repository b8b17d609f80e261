"""`RingComm`, `AllGatherComm` and `update_out_and_lse` on real processes, used as people who write a variant use them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core import AllGatherComm, RingComm, flatten_varlen_lse, unflatten_varlen_lse, update_out_and_lse
from tests.worlds import Seen, Shape, Whole, attention, held, no_faults, place, refusal, told, whole

CAUSAL = Seen(causal=True)


def block(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel gives a migrating user: out and lse of one block."""
    out, lse = attention(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)), seen)
    return out.to(q.dtype), lse


def ring_forward(comm: RingComm, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, buffers: bool) -> tuple[Tensor, Tensor]:
    """The loop of ring-flash-attention, with its names; `seen` is this rank's rows of the whole mask."""
    out = lse = None
    k_buffer, v_buffer = (torch.empty_like(k), torch.empty_like(v)) if buffers else (None, None)
    for step in range(comm.world_size):
        if step + 1 != comm.world_size:
            next_k, next_v = comm.send_recv_kv(k, v, k_buffer, v_buffer)
        keys = held("contiguous", seen.shape[1], comm.world_size, (comm.rank - step) % comm.world_size)
        if step <= comm.rank:
            block_out, block_lse = block(q, k, v, seen[:, keys])
            out, lse = update_out_and_lse(out, lse, block_out, block_lse)
        if step + 1 != comm.world_size:
            comm.wait()
            k_buffer, v_buffer = (k, v) if buffers and step else (None, None)  # own k and v stay as they are
            k, v = next_k, next_v
    assert out is not None and lse is not None
    return out, lse.squeeze(-1).transpose(1, 2)


def zigzag_forward(comm: RingComm, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of the queries, each merged by a slice, from an empty result."""
    half = q.shape[1] // 2
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    lse = torch.full((*q.shape[:3], 1), float("-inf"), dtype=out.dtype, device=q.device)
    for step in range(comm.world_size):
        if step + 1 != comm.world_size:
            next_k = comm.send_recv(k)
            next_v = comm.send_recv(v)
            comm.commit()
        keys = held("zigzag", seen.shape[1], comm.world_size, (comm.rank - step) % comm.world_size)
        for rows in (slice(0, half), slice(half, None)):  # rows that see nothing of a block come with -inf and stay
            update_out_and_lse(out, lse, *block(q[:, rows], k, v, seen[rows, keys]), slice_=(slice(None), rows))
        if step + 1 != comm.world_size:
            comm.wait()
            k, v = next_k, next_v
    return out, lse.squeeze(-1).transpose(1, 2)


def shards(truth: Whole, layout: str, rank: int, world_size: int) -> tuple[Tensor, list[Tensor], Tensor]:
    rows = held(layout, truth.q.shape[1], world_size, rank)
    seen = CAUSAL.dense(truth.q.shape[1], truth.q.shape[1])[rows]
    return rows, [x[:, rows.to(x.device)] for x in (truth.q, truth.k, truth.v)], seen


def by_hand(rank: int, world_size: int) -> list[str]:
    truth, faults = whole(Shape(dim_v=16), CAUSAL), []
    for layout, buffers in (("contiguous", False), ("contiguous", True), ("zigzag", False)):
        rows, qkv, seen = shards(truth, layout, rank, world_size)
        before = [x.clone() for x in qkv]
        comm = RingComm(dist.group.WORLD)
        forward = ring_forward(comm, *qkv, seen, buffers) if layout == "contiguous" else zigzag_forward(comm, *qkv, seen)
        got = dict(zip(("out", "lse"), forward, strict=True))
        got["out"] = got["out"].to(truth.q.dtype)
        faults += told((layout, buffers), truth.wrong(got, {"out": rows, "lse": rows}))
        assert all(torch.equal(a, b) for a, b in zip(qkv, before, strict=True)), "own tensors were overwritten"
    rows, (q, k, v), seen = shards(truth, "contiguous", rank, world_size)
    gather, gathered = AllGatherComm(), []
    for x in (k, v):
        gathered.append(x.new_empty(world_size * x.shape[1], *x.shape[:1], *x.shape[2:]))
        gather.all_gather(gathered[-1], x.transpose(0, 1))  # strided: the tokens come first
    gather.wait()
    out, lse = block(q, *(x.transpose(0, 1) for x in gathered), seen)
    return faults + told("all_gather", truth.wrong({"out": out, "lse": lse}, {"out": rows, "lse": rows}))


@pytest.mark.parametrize("world_size", [2, 3])
def test_attention_by_hand(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(by_hand))


def exchanges(rank: int, world_size: int) -> None:
    device, _ = place()
    before, after = (rank - 1) % world_size, (rank + 1) % world_size
    comm = RingComm()  # the default group
    assert (comm.rank, comm.world_size) == (rank, world_size)

    mine = torch.full((2, 3), float(rank), device=device)
    buffer = torch.empty_like(mine)
    assert comm.send_recv(mine, recv_tensor=buffer) is buffer
    other = comm.send_recv((mine + 10).T)  # not contiguous
    assert other.shape == (3, 2) and other.data_ptr() != mine.data_ptr()
    comm.commit()
    with pytest.raises(RuntimeError, match="commit called twice"):
        comm.commit()
    comm.wait()
    assert (buffer == before).all() and (other == before + 10).all() and (mine == rank).all()
    with pytest.raises(RuntimeError, match="wait called before commit"):
        comm.wait()

    k_buffer, v_buffer = torch.empty(4, device=device), torch.empty(5, device=device)
    k, v = comm.send_recv_kv(*(torch.full((n,), 100.0 * n + rank, device=device) for n in (4, 5)), k_buffer, v_buffer)
    assert k is k_buffer and v is v_buffer
    comm.wait()
    assert (k == 400 + before).all() and (v == 500 + before).all()

    group = dist.new_group([0, world_size - 1])  # a part of the world, neighbours by rank in the group
    if rank in (0, world_size - 1):
        pair = RingComm(group)
        got = pair.send_recv(torch.tensor([rank], device=device))
        pair.commit()
        pair.wait()
        assert got.item() == world_size - 1 - rank
        both = torch.empty(2, device=device)
        gather = AllGatherComm(group)
        gather.all_gather(both, torch.tensor([float(rank)], device=device))
        gather.wait()
        gather.wait()  # nothing is left to wait for
        assert both.tolist() == [0, world_size - 1]

    alone = RingComm(dist.new_group([rank], use_local_synchronization=True))
    got = alone.send_recv(mine)
    alone.commit()
    alone.wait()
    assert torch.equal(got, mine) and got.data_ptr() != mine.data_ptr() and after != rank


@pytest.mark.parametrize("world_size", [2, 3])
def test_exchanges(ranks, world_size: int) -> None:
    ranks(world_size).run(exchanges)


def not_a_member(rank: int, world_size: int) -> list[str]:
    group = dist.new_group([0])
    kinds = [RingComm, AllGatherComm] if rank else []
    return [x for kind in kinds for x in told(kind.__name__, refusal(lambda kind=kind: kind(group), ValueError, ["not a member"]))]


def test_refuses_a_group_of_others(ranks) -> None:
    no_faults(ranks(2).run(not_a_member))


def test_without_a_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        RingComm(None)


def test_update_takes_rows_as_they_come() -> None:
    """Blocks in any order, some of them unseen, logits of any size: the dense result."""
    for gain in (1.0, 100.0):
        truth = whole(Shape(), CAUSAL, dtype=torch.float64, gain=gain)
        seen = CAUSAL.dense(24, 24)
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            out = lse = None
            for n in order:
                keys = slice(8 * n, 8 * n + 8)
                block_out, block_lse = attention(truth.q, truth.k[:, keys], truth.v[:, keys], seen[:, keys])
                out, lse = update_out_and_lse(out, lse, block_out, block_lse)
            assert out is not None and lse is not None
            assert not truth.wrong({"out": out, "lse": lse.squeeze(-1).transpose(1, 2)}, {})


def test_varlen_lse_there_and_back() -> None:
    cu = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    packed = torch.randn(7, 3)
    padded = unflatten_varlen_lse(packed.unsqueeze(-1), cu, 6)
    assert padded.shape == (3, 3, 6)
    assert torch.equal(padded[0, :, :2], packed[:2].T) and torch.equal(padded[2, :, :5], packed[2:].T)
    assert (padded[1] == float("-inf")).all() and (padded[2, :, 5:] == float("-inf")).all()
    assert torch.equal(flatten_varlen_lse(padded, cu), packed.T)


def exchanged_once(rank: int, world_size: int) -> None:
    comm = RingComm()
    first = comm.send_recv(torch.ones(2))
    comm.commit()
    comm.wait()
    first.zero_()
    comm.send_recv(torch.ones(2))
    comm.commit()
    comm.wait()
    assert not first.any()
    with pytest.raises(ValueError, match=r"recv_tensor of shape .* must be contiguous"):
        comm.send_recv(torch.ones(2, 2), torch.ones(2, 2).T)
    with pytest.raises(ValueError, match=r"recv_tensor is torch.float64, to_send torch.float32"):
        comm.send_recv(torch.ones(2), torch.ones(2, dtype=torch.float64))


def test_what_has_come_is_the_callers(ranks) -> None:
    """The next exchange does not fill it again; a buffer that cannot be filled is refused before anything is sent."""
    ranks(2).run(exchanged_once)


def gathered(rank: int, world_size: int) -> None:
    x = torch.arange(6.0).reshape(2, 3).mT
    comm, everything = AllGatherComm(), x.new_empty(3 * world_size, 2)
    comm.all_gather(everything, x + rank)
    comm.wait()
    assert torch.equal(everything, torch.cat([x + n for n in range(world_size)]))


def test_rows_with_gaps_are_gathered(ranks) -> None:
    ranks(2).run(gathered)
