"""The `wrap_*` ops on plain tensors: one process, whole groups, and parts of the world at once. On DTensors: `test_dtensor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import nnscaler_ring
from tests.distributed import run_ranks
from tests.worlds import Seen, Shape, check_call, held, naming, no_communication, no_faults, place, refusal, told, whole


@dataclass(frozen=True, kw_only=True)
class Use:
    """One call of an op, as for one device; sequences of ints among the arguments `cu_*` become int32 tensors."""

    name: str
    call: dict[str, Any] = field(default_factory=dict)
    seen: Seen
    shape: Shape = Shape()  # noqa: RUF009

    @property
    def scale(self) -> float | None:
        return self.call.get("softmax_scale")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        given = {**self.call, **more}
        tables = {name: torch.tensor(cu, dtype=torch.int32) for name, cu in given.items() if name.startswith("cu_")}
        return getattr(nnscaler_ring, self.name)(q, k, v, **{**given, **tables})


LSE = {"return_attn_probs": True}
DOCUMENTS = (0, 7, 8, 24)
MQA = Shape(heads_k=1, dim_v=16)


def use(name: str, shape: Shape = Shape(), sinks: int = 0, **call: Any) -> Use:  # noqa: B008
    """A use whose mask follows from the op's arguments."""
    window, streaming = call.get("window_size", (-1, -1)), name == "wrap_streaming_llm_attn_func"
    causal = call.get("causal", name != "wrap_ring_attn_varlen_func")
    window = window if isinstance(window, tuple) else (window, 0 if causal else window)
    cu = call.get("cu_seqlens", call.get("cu_seqlens_q"))
    sinks = call.get("num_sinks", 1) if streaming else 0
    seen = Seen(causal=causal or streaming, window=window, sinks=sinks, cu=cu, cu_k=call.get("cu_seqlens_k"))
    return Use(name=name, call=call, seen=seen, shape=shape)


def dense(name: str) -> list[Use]:
    return [
        use(name),
        use(name, MQA, causal=True, window_size=(5, 2), softmax_scale=0.4, deterministic=True, **LSE),
        use(name, cu_seqlens=DOCUMENTS, transport="all_gather", **LSE),
        use(name, Shape(batch=3, heads_k=4), window_size=(30, 0), transport="ring", kernel="reference"),
        use(name, Shape(seq_k=36), **LSE),
    ]


def varlen(name: str) -> list[Use]:
    both, packed = {"cu_seqlens_q": DOCUMENTS, "cu_seqlens_k": DOCUMENTS}, Shape(packed=True)
    other = {"cu_seqlens_q": (0, 4, 9, 9, 24), "cu_seqlens_k": (0, 2, 20, 24, 36)}  # keys of their own, a document without queries
    return [
        use(name, packed, **both),
        use(name, Shape(heads_k=1, dim_v=16, packed=True), causal=True, softmax_scale=0.4, bias=None, **both, **LSE),
        use(name, packed, window_size=(3, 2), transport="ring", **both, **LSE),
        use(name, packed, causal=True, transport="all_to_all", **both, **LSE),
        use(name, packed, causal=True, window_size=(9, 0), cu_seqlens_q=(0, 24), cu_seqlens_k=(0, 24)),
        use(name, Shape(packed=True, seq_k=36), softmax_scale=0.4, **other, **LSE),
        use(name, Shape(packed=True, seq_k=36), causal=True, **other, **LSE),
    ]


RING, STRIPE, ULYSSES = "wrap_ring_attn_func", "wrap_stripe_attn_func", "wrap_ulysses_attn_func"
SLIDING, STREAMING = "wrap_sliding_window_attn_func", "wrap_streaming_llm_attn_func"
NON_CAUSAL: list[dict[str, Any]] = [{}, {"window_size": (4, 3), **LSE}, {"window_size": (-1, 2), "softmax_scale": 0.4}]
OPS: dict[str, list[Use]] = {
    RING: [*dense(RING), *(use(RING, causal=False, **call) for call in NON_CAUSAL)],
    "wrap_zigzag_attn_func": dense("wrap_zigzag_attn_func"),
    STRIPE: [*dense(STRIPE), *(use(STRIPE, causal=False, **call) for call in NON_CAUSAL)],
    ULYSSES: [
        use(ULYSSES),
        use(
            ULYSSES,
            Shape(heads=8, heads_k=8, dim_v=16),
            causal=True,
            window_size=(5, 2),
            softmax_scale=0.4,
            deterministic=True,
            **LSE,
        ),
        use(ULYSSES, Shape(heads=6), cu_seqlens=DOCUMENTS, **LSE),
        use(ULYSSES, Shape(batch=3, heads=2, heads_k=1), window_size=(30, 0), kernel="reference"),
        use(ULYSSES, Shape(seq_k=36, heads=12, heads_k=4), causal=False, **LSE),
        use(ULYSSES, MQA, causal=False, window_size=(4, 3)),
    ],
    "wrap_ring_attn_varlen_func": varlen("wrap_ring_attn_varlen_func"),
    SLIDING: [
        use(SLIDING, window_size=3),
        use(SLIDING, MQA, window_size=0, softmax_scale=0.4, transport="ring", **LSE),
        use(SLIDING, window_size=5, causal=False, deterministic=True, **LSE),
        use(SLIDING, window_size=(4, 2), causal=False, kernel="reference"),
        use(SLIDING, window_size=(17, 0), cu_seqlens=DOCUMENTS, transport="halo", **LSE),
        use(SLIDING, window_size=-1),
    ],
    STREAMING: [
        use(STREAMING, window_size=3),
        use(STREAMING, MQA, window_size=2, num_sinks=4, softmax_scale=0.4, transport="ring", **LSE),
        use(STREAMING, Shape(batch=3), window_size=1, num_sinks=2, cu_seqlens=DOCUMENTS, deterministic=True, **LSE),
        use(STREAMING, window_size=40, num_sinks=0, transport="all_gather", kernel="reference"),
    ],
}


def probs(each: Use) -> bool:
    return each.call.get("return_attn_probs", False)


def on_group(uses: Sequence[Use], group: Any, rank: int, world_size: int) -> list[str]:
    faults = []
    for each in uses:
        shape = each.shape
        rows = held("contiguous", shape.seq, world_size, rank)
        rows_k = held("contiguous", shape.seq_k or shape.seq, world_size, rank)
        more: dict[str, Any] = {"process_group": group}
        if shape.seq % world_size:
            more["seq_len"] = shape.seq
        with naming((each, group)):
            call = lambda q, k, v, each=each, more=more: each(q, k, v, **more)  # noqa: E731
            answer = check_call(call, whole(shape, each.seen, each.scale), rows, rows_k, probs(each))
        faults += told((each, group), answer)
    return faults


def on_whole_group(rank: int, world_size: int, name: str) -> list[str]:
    uneven = [use(name, Shape(seq=seq), **uneven_arguments(name)) for seq in (6 * world_size - 1, 6 * world_size + 1)]
    uses = OPS[name] if name == "wrap_ring_attn_varlen_func" else [*OPS[name], *uneven]
    faults = on_group(uses, dist.group.WORLD, rank, world_size)
    return faults + on_group(OPS[name][:2], list(range(world_size)), rank, world_size)


def uneven_arguments(name: str) -> dict[str, Any]:
    return {"window_size": 5} if name in (SLIDING, STREAMING) else {"causal": True}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_over_a_group(ranks, world_size: int, name: str) -> None:
    no_faults(ranks(world_size).run(on_whole_group, name))


@pytest.mark.parametrize("name", OPS)
def test_one_process_without_a_group(name: str) -> None:
    assert not dist.is_initialized()
    no_faults([on_group(OPS[name], None, 0, 1)])


# -- a process group that is None, a part of the world, or several parts --------------------------------------------------------


def each_alone(rank: int, world_size: int) -> list[str]:
    """`process_group` None: this process alone, though there is a default group; a group of one: the same."""
    faults = []
    own = dist.new_group([rank], use_local_synchronization=True)
    for uses in OPS.values():
        for group in (None, [rank], own):
            uses_here = uses[rank % len(uses) :][:2]  # another op's arguments on each rank: nobody waits for anybody
            if group is None:
                with no_communication():
                    faults += on_group(uses_here, None, 0, 1)
            else:
                faults += on_group(uses_here, group, 0, 1)
    return faults


def test_each_alone(ranks) -> None:
    no_faults(ranks(3).run(each_alone))


def some() -> Iterator[Use]:
    for uses in OPS.values():
        yield from uses[:2]


def make_groups(*parts: Sequence[int]) -> None:
    """Groups that the ops find by their ranks, made by all ranks of the world as torch asks."""
    for part in parts:
        dist.new_group(list(part))


def middle_only(rank: int, world_size: int) -> list[str]:
    """Ranks 1 and 2 share sequences; 0 and 3 never hear of it and do something else."""
    make_groups((1, 2))
    faults = []
    for each in some():
        if rank in (1, 2):
            faults += on_group([each], (1, 2), rank - 1, 2)
        else:
            faults += on_group([each], None, 0, 1)
    total = torch.ones(1, device=place()[0])
    dist.all_reduce(total)
    assert total.item() == world_size
    return faults


def test_a_part_of_the_world(ranks) -> None:
    no_faults(ranks(4).run(middle_only))


def two_parts(rank: int, world_size: int) -> list[str]:
    """(0, 2) and (1, 3) at once, each with another op."""
    make_groups((0, 2), (1, 3))
    pair = (0, 2) if rank % 2 == 0 else (1, 3)
    uses = list(some())
    return on_group(uses if rank % 2 == 0 else uses[::-1], pair, pair.index(rank), 2)


def overlapping_parts(rank: int, world_size: int) -> list[str]:
    """Ranks that have been in different numbers of groups meet in another: a call never makes a group, so none waits for one."""
    parts = [[1, 2], [0, 1], [0, 2], [0, 1, 2]]
    make_groups(*parts)
    faults = []
    for part in parts:
        if rank in part:
            faults += on_group([use("wrap_ring_attn_func")], part, part.index(rank), len(part))
    return faults


def unmade(rank: int, world_size: int) -> list[str]:
    """Ranks that no group has been made of: refused, for making one inside a call hangs where a rank is not there."""
    part, faults = [0, 1, 3], []
    for uses in OPS.values() if rank in part else ():
        truth = whole(uses[0].shape, uses[0].seen)
        call = lambda use=uses[0], truth=truth: use(truth.q, truth.k, truth.v, process_group=part)  # noqa: E731
        faults += told(uses[0].name, refusal(call, ValueError, ["(0, 1, 3)", "new_group([0, 1, 3])", "every rank"]))
    return faults


def test_two_parts_at_once(ranks) -> None:
    no_faults(ranks(4).run(two_parts, timeout=40))


def test_overlapping_parts(ranks) -> None:
    no_faults(ranks(3).run(overlapping_parts, timeout=40))


def test_a_group_that_nobody_made(ranks) -> None:
    no_faults(ranks(4).run(unmade, timeout=40))


def group_made_anew(rank: int, world_size: int, directory: str) -> list[str]:
    """The default group ended and made again, as notebooks and elastic jobs do: nothing of the old one is kept."""
    backend, faults = dist.get_backend(), []
    for number in range(2):
        if number:
            dist.destroy_process_group()
            store = dist.FileStore(f"{directory}/again", world_size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
        make_groups([0, 2])
        faults += on_group([use("wrap_zigzag_attn_func")], dist.group.WORLD, rank, world_size)
        if rank != 1:
            faults += on_group([use("wrap_zigzag_attn_func")], [0, 2], rank // 2, 2)
    return faults


def test_group_made_anew(device: torch.device, tmp_path: Path) -> None:
    no_faults(run_ranks(group_made_anew, 3, str(tmp_path), device=device.type, timeout=60))


# -- what a result is ------------------------------------------------------------------------------------------------------------


def test_rows_that_see_nothing_are_zero() -> None:
    """As many queries as keys are aligned at the last token: the first ones see no key. Output 0, lse -inf, gradients finite."""
    for name in ("wrap_ring_attn_func", "wrap_stripe_attn_func"):
        each = use(name, Shape(seq=24, seq_k=16), causal=True, **LSE)
        no_faults([on_group([each], None, 0, 1)])
        truth = whole(each.shape, each.seen)
        out, lse, _ = each(truth.q, truth.k, truth.v)
        assert not out[:, :8].any() and (lse[:, :, :8] == float("-inf")).all() and lse[:, :, 8:].isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_lse_is_fp32_and_differentiable(name: str) -> None:
    each = next(each for each in OPS[name] if probs(each))
    truth = whole(each.shape, each.seen, each.scale, dtype=torch.bfloat16)
    out, lse, rest = each(*(x.clone().requires_grad_() for x in (truth.q, truth.k, truth.v)))
    assert (out.dtype, lse.dtype, rest) == (torch.bfloat16, torch.float32, None)
    assert out.requires_grad and lse.requires_grad


def strided(rank: int, world_size: int) -> list[str]:
    faults = []
    for uses in OPS.values():
        each, rows = uses[1], held("contiguous", 24, world_size, rank)
        call = lambda q, k, v, each=each: each(q, k, v, process_group=list(range(world_size)))  # noqa: E731
        truth = whole(each.shape, each.seen, each.scale)
        faults += told(each, check_call(call, truth, rows, probs=probs(each), strided=True))
    return faults


def test_strided_inputs(ranks) -> None:
    """Heads before tokens in memory, as a projection leaves them after a transpose, and gradients that are not contiguous."""
    no_faults(ranks(2).run(strided))


def test_a_loss_that_is_a_sum() -> None:
    """Its gradient is one number, expanded."""
    for name in ("wrap_ring_attn_func", "wrap_zigzag_attn_func"):
        each = use(name)
        truth = whole(each.shape, each.seen)
        tensors = [x.clone().requires_grad_() for x in (truth.q, truth.k, truth.v)]
        out = each(*tensors)
        expanded = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        assert all(map(torch.equal, expanded, torch.autograd.grad(out, tensors, torch.ones_like(out))))


def test_numbers_of_other_kinds() -> None:
    """Lists say the same as tuples; numpy's numbers say the same as Python's, or are refused in our words."""
    for name in (RING, SLIDING):
        each = use(name, window_size=(5, 0), softmax_scale=0.5)
        truth = whole(each.shape, each.seen, each.scale)
        assert not truth.wrong({"out": each(truth.q, truth.k, truth.v, window_size=[5, 0], softmax_scale=np.float64(0.5))}, {})
        for given in ({"softmax_scale": np.float32(0.5)}, {"window_size": (np.int64(5), np.int32(0))}):
            try:
                assert not truth.wrong({"out": each(truth.q, truth.k, truth.v, **given)}, {})
            except ValueError as error:
                assert next(iter(given)) in str(error)


def test_some_inputs_without_a_gradient() -> None:
    each = use("wrap_zigzag_attn_func")
    truth = whole(each.shape, each.seen)
    for wanted in ("q", "k", "v"):
        given = {name: getattr(truth, name).clone().requires_grad_(name == wanted) for name in ("q", "k", "v")}
        (grad,) = torch.autograd.grad(each(**given), [given[wanted]], truth.grad)
        assert not truth.wrong({"d" + wanted: grad}, {})
    with torch.no_grad():
        assert not each(truth.q, truth.k, truth.v).requires_grad
