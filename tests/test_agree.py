"""``NNSCALER_RING_CHECK=1``: ranks that do not call alike are told so, all of them, before rows travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nnscaler_ring import (
    ContextParallel,
    Mask,
    Slice,
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_func,
    wrap_ring_attn_func,
    wrap_zigzag_attn_func,
)
from nnscaler_ring.core.agree import VARIABLE, asked

DIFFERENT: dict[str, Callable[[int], dict[str, Any]]] = {
    "mask": lambda rank: {"mask": ("causal", "full")[rank]},
    "softcap or dropout_p": lambda rank: {"softcap": 1.0 + rank},
    "other options": lambda rank: {"deterministic": bool(rank)},
    "dtype of the bias, or whether it has a gradient": lambda rank: {"bias": torch.zeros(1, 8, 16, requires_grad=bool(rank))},
    "seq_len": lambda rank: {"rows": 8 - rank, "seq_len": 16 - 2 * rank},
    "cu_seqlens": lambda rank: {"cu_seqlens": torch.tensor([0, 5 + rank, 16], dtype=torch.int32)},
    "the slices of their Mask": lambda rank: {"mask": Mask([Slice(0, 16, 0, 16 - rank)], 16, 16)},
    "which of alibi_slopes, bias and learnable_sink they pass": lambda rank: {"learnable_sink": torch.zeros(4) if rank else None},
    "batch, heads or head dims": lambda rank: {"heads": 2 * (rank + 1)},
    "dtype": lambda rank: {"dtype": (torch.float32, torch.float64)[rank]},
    "softmax_scale": lambda rank: {"softmax_scale": 1.0 + rank},
    "dropout_seed, which torch's CPU generator draws where it is not given": lambda rank: {"dropout_p": 0.5, "dropout_seed": rank},
    "whether their tokens are as many as the layout gives": lambda rank: {"rows": 8 - rank, "seq_len": 16},
}


def qkv(rows: int = 8, heads: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(1, rows, n, 8, dtype=dtype) for n in (heads, 2, 2)]


def say(rank: int, world_size: int) -> dict[str, str]:
    """What each rank is told of every difference; nothing where they call alike."""
    cp, said = ContextParallel(), dict[str, str]()
    for name, of in {"nothing": lambda _: {}, **DIFFERENT}.items():
        given = of(rank)
        shards = qkv(**{key: given.pop(key) for key in ("rows", "heads", "dtype") if key in given})
        sent = mock.patch.object(dist, "batch_isend_irecv", side_effect=dist.batch_isend_irecv)
        with mock.patch.dict("os.environ", {VARIABLE: "1"}), sent as messages:
            try:
                cp.attention(*shards, **given)
            except ValueError as why:
                assert not messages.called
                said[name] = str(why)
    return said


def told(call: Callable[[], object], *kinds: type[Exception]) -> str:
    """What a rank is told of a call that is refused under the check."""
    with mock.patch.dict("os.environ", {VARIABLE: "1"}), pytest.raises(kinds or ValueError) as refused:
        call()
    return str(refused.value)


REFUSED: dict[str, Callable[[int], dict[str, Any]]] = {
    "cu_seqlens": lambda rank: {"cu_seqlens": torch.tensor([0, 5, 16 + 2 * rank], dtype=torch.int32)},
    "learnable_sink": lambda rank: {"learnable_sink": torch.zeros(4 + rank)},
    "deterministic": lambda rank: {"deterministic": "no" if rank else False},
    "both": lambda rank: {"transport": "no such transport"},
}
"""What rank 1, or every rank, finds wrong with its own arguments."""


def refuse(rank: int, world_size: int) -> dict[str, str]:
    said = {}
    for name, of in REFUSED.items():
        for call in (wrap_ring_attn_func, wrap_zigzag_attn_func):  # one attends at once, one moves rows first
            said[f"{name} {call.__name__}"] = told(
                lambda call=call, of=of: call(*qkv(), process_group=dist.group.WORLD, **of(rank))
            )
    return said


def refuse_anything(rank: int, world_size: int) -> list[str]:
    """What rank 1 passes to ContextParallel, wrong in many ways."""
    cp, said = ContextParallel(), list[str]()
    empty = torch.zeros(0, dtype=torch.int32)
    for wrong in ({"banana": 1}, {"cu_seqlens": empty}, {"softmax_scale": "a"}, {"softcap": "x"}, {"alibi_slopes": [1.0] * 4}):
        said.append(told(lambda wrong=wrong: cp.attention(*qkv(), **(wrong if rank else {})), ValueError, TypeError))
    q, k, v = qkv()
    for call in (lambda: cp.attention(q if rank == 0 else None, k, v), lambda: cp.unshard(q if rank == 0 else None, 1)):
        said.append(told(call, ValueError, AttributeError))
    return said


def test_whatever_one_rank_refuses_is_told_to_the_others(ranks: Any) -> None:
    waiting, refusing = ranks(2).run(refuse_anything)
    assert set(waiting) == {"rank 1 refused the arguments of this call: the error there says why"}
    words = ("banana", "cu_seqlens", "softmax_scale", "softcap", "alibi_slopes", "None", "None")
    for message, word in zip(refusing, words, strict=True):
        assert word in message


def refuse_boundaries(rank: int, world_size: int) -> list[str]:
    """Of ContextParallel, whose layout looks at them before it attends."""
    cp, said = ContextParallel(layout="balanced"), list[str]()
    wrong = torch.tensor([0, 5, 16 + 2 * rank], dtype=torch.int32)
    for call in (
        lambda: cp.attention(*qkv(), cu_seqlens=wrong, seq_len=16),
        lambda: cp.unshard(torch.ones(1, 8, 2), 1, cu_seqlens=wrong, seq_len=16),
        lambda: cp.attention(*qkv(), "causal" if rank == 0 else "runs from 0 to 18"),
    ):
        said.append(told(call))
    return said


def test_boundaries_that_one_rank_refuses_are_told_to_the_others(ranks: Any) -> None:
    waiting, refusing = ranks(2).run(refuse_boundaries)
    assert set(waiting) == {"rank 1 refused the arguments of this call: the error there says why"}
    assert all("runs from 0 to 18" in message for message in refusing)


def test_a_rank_that_refuses_its_own_arguments_is_told_to_the_others(ranks: Any) -> None:
    waiting, refusing = ranks(2).run(refuse)
    for name, message in refusing.items():
        assert "differ in" not in message
        told = "rank 1 refused the arguments of this call: the error there says why"
        assert waiting[name] == (message if name.startswith("both") else told)


def test_every_difference_is_told_on_every_rank(ranks: Any) -> None:
    for said in ranks(2).run(say):
        assert said.keys() == DIFFERENT.keys()
        for name, message in said.items():
            assert f"rank 0 and rank 1 differ in {name}; on rank " in message, message


def on_a_grid(rank: int, world_size: int) -> str:
    cp = ContextParallel(init_device_mesh("cpu", (2, 2)))
    with mock.patch.dict("os.environ", {VARIABLE: "1"}):
        out = cp.attention(*qkv())
        assert isinstance(out, Tensor) and out.shape == (1, 8, 4, 8)
        with pytest.raises(ValueError, match="differ in softmax_scale") as told:
            cp.attention(*qkv(), softmax_scale=1.0 + (rank == 3))
    return str(told.value)


def test_ranks_of_a_grid(ranks: Any) -> None:
    """Also of those that share no group with the one that differs."""
    assert {said.partition(";")[0] for said in ranks(4).run(on_a_grid)} == {"ranks 0, 1, 2 and rank 3 differ in softmax_scale"}


def moving_rows(rank: int, world_size: int) -> list[str]:
    """Of an op that moves rows first, and of `unshard`."""
    said, group = list[str](), dist.group.WORLD
    sent = mock.patch.object(dist, "batch_isend_irecv", side_effect=dist.batch_isend_irecv)
    with mock.patch.dict("os.environ", {VARIABLE: "1"}), sent as messages:
        cu, documents = torch.tensor([0, 4 + 4 * rank, 16]), ContextParallel(layout="zigzag-per-document")
        for call, what in (
            (lambda: wrap_zigzag_attn_func(*qkv(heads=2 * (rank + 1)), process_group=group), "batch, heads, head dims or dtype"),
            (lambda: ContextParallel().unshard(torch.ones(1, 8, 2 + rank), 1), "batch, heads, head dims or dtype"),
            (lambda: documents.unshard(torch.ones(1, 8, 2), 1, cu_seqlens=cu), "cu_seqlens"),
        ):
            with pytest.raises(ValueError, match=f"differ in {what}") as told:
                call()
            said.append(str(told.value))
        assert not messages.called
    return said


def alike(rank: int, world_size: int) -> None:
    """What ranks may say differently: of llama3's rows each knows its own, and a graph may be of a rank."""
    cu = torch.tensor([0, 5, 16], dtype=torch.int32)
    prepared = llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world_size)
    with mock.patch.dict("os.environ", {VARIABLE: "1"}):
        q, k, v = (x.squeeze(0) for x in qkv())
        assert llama3_flash_attn_varlen_func(q, k, v, *prepared[:4], 1, prepared[4], causal=True).shape == (8, 4, 8)
        heads = ContextParallel(transport="all_to_all")
        assert torch.compile(lambda *x: heads.attention(*x), backend="eager")(*qkv()).shape == (1, 8, 4, 8)


def test_llama3_calls_alike(ranks: Any) -> None:
    ranks(2).run(alike)


def of_another_length(rank: int, world_size: int) -> str:
    with mock.patch.dict("os.environ", {VARIABLE: "1"}), pytest.raises(ValueError, match="as many as the layout gives") as told:
        ContextParallel().unshard(torch.ones(1, 8 - rank, 2), 1, seq_len=16)
    return str(told.value)


def test_a_shard_of_another_length_is_told_to_all(ranks: Any) -> None:
    assert all("rank 0 and rank 1 differ in" in said for said in ranks(2).run(of_another_length))


def one_without_a_loss(rank: int, world_size: int) -> str:
    """Rank 0 goes back, rank 1 on."""
    cp, tensors = ContextParallel(), [x.requires_grad_() for x in qkv()]
    with mock.patch.dict("os.environ", {VARIABLE: "1"}):
        for _ in range(2):
            out = cp.attention(*tensors)
            assert isinstance(out, Tensor)
            out.sum().backward()
        out = cp.attention(*tensors)
        assert isinstance(out, Tensor)
        with pytest.raises(ValueError) as told:
            out.sum().backward() if rank == 0 else cp.attention(*tensors)
    return str(told.value)


def test_a_backward_pass_that_one_rank_skips(ranks: Any) -> None:
    said = ranks(2).run(one_without_a_loss)
    assert all("rank 0 and rank 1 differ in what they call" in each for each in said)
    assert "on rank 0 it is 'the backward pass of attention'" in said[0] and "on rank 1 it is 'attention'" in said[1]


def test_before_rows_are_moved(ranks: Any) -> None:
    assert [len(said) for said in ranks(2).run(moving_rows)] == [3, 3]


def test_it_is_off_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in {None: False, "": False, "0": False, "1": True}.items():
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        assert asked() is on
