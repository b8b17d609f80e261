"""Every per-rank function on real processes, forward and backward, against dense attention over the whole sequence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import nnscaler_ring
from nnscaler_ring import llama3_flash_attn_prepare_cu_seqlens
from tests import test_ops
from tests.worlds import Seen, Shape, check_call, held, naming, no_communication, no_faults, told, whole

WORLDS = [2, 3, 4]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a function by its name; `call` are its keyword arguments, `cu` documents of the whole row."""

    name: str
    layout: str
    shape: Shape
    call: dict[str, Any] = field(default_factory=dict)
    seen: Seen
    gain: float = 1.0

    @property
    def scale(self) -> float | None:
        return self.call.get("softmax_scale")


def packings(base: str) -> list[str]:
    return [f"{base}_{packing}func" for packing in ("", "kvpacked_", "qkvpacked_")]


def stacked(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as the function called `name` takes them."""
    if "qkvpacked" in name:
        return (torch.stack([q, k, v], -3),)
    return (q, torch.stack([k, v], -3)) if "kvpacked" in name else (q, k, v)


def seen_by(call: dict[str, Any], cu: tuple[int, ...] | None = None) -> Seen:
    return Seen(causal=call.get("causal", False), window=call.get("window_size", (-1, -1)), cu=cu)


# -- ring, zigzag, stripe, intel ------------------------------------------------------------------------------------------------

DENSE = {
    "ring_flash_attn": "contiguous",
    "zigzag_ring_flash_attn": "zigzag",
    "stripe_flash_attn": "stripe",
    "intel_ring_flash_attn": "contiguous",
}

LSE = {"return_attn_probs": True}
OPTIONS: list[dict[str, Any]] = [
    {"causal": True},
    {},
    {"causal": True, "window_size": (5, 0), "transport": "all_gather", **LSE},
    {"window_size": (4, 3), **LSE},
    {"window_size": (-1, 2), "transport": "halo", **LSE},
    # A window longer than any shard, a right side that causal overrules, and arguments that must reach the kernel.
    {"causal": True, "window_size": (17, 5), "softmax_scale": 0.7, "deterministic": True, "transport": "auto", **LSE},
    {"causal": True, "dropout_p": 0.0, "alibi_slopes": None, "group": None, "kernel": "reference", **LSE},
]
CAUSAL = [options for options in OPTIONS if options.get("causal")]


def dense_cases(base: str, world_size: int) -> Iterator[Case]:
    layout, options = DENSE[base], CAUSAL if base.startswith("zigzag") else OPTIONS
    gqa, mha = Shape(), Shape(heads_k=4)

    def case(name: str, shape: Shape, call: dict[str, Any], gain: float = 1.0) -> Case:
        return Case(name=name, layout=layout, shape=shape, call=call, seen=seen_by(call), gain=gain)

    plain, kv, qkv = packings(base)
    for call in options:
        yield case(plain, gqa, call)
    for call in (options[0], options[-2]):
        yield case(kv, gqa, call)
        yield case(qkv, mha, call)
    causal: dict[str, Any] = {"causal": True, **LSE}
    yield case(plain, Shape(heads_k=1, dim=16, dim_v=8), causal)
    yield case(plain, Shape(dim=8, dim_v=24), {**causal, "window_size": (6, 0)})
    yield case(plain, Shape(batch=3, seq=7 * world_size), causal)  # an odd number of tokens on each rank
    yield case(plain, gqa, causal, gain=40.0)  # logits in the thousands
    for seq in (6 * world_size - 1, 6 * world_size + 1, world_size - 1):  # ranks with different numbers of tokens, or none
        for call in (causal, {**options[1], **LSE}):
            yield case(plain, Shape(seq=seq), {**call, "seq_len": seq})
    yield case(plain, Shape(seq=4 * world_size, seq_k=6 * world_size), causal)  # keys before the first query
    yield case(plain, Shape(seq=5, seq_k=6 * world_size + 1), {**causal, "seq_len": 5, "seq_len_k": 6 * world_size + 1})


# -- packed documents ------------------------------------------------------------------------------------------------------------

VARLEN = {"ring_flash_attn_varlen": "contiguous-per-document", "zigzag_ring_flash_attn_varlen": "zigzag-per-document"}


def varlen_cases(base: str, world_size: int) -> Iterator[Case]:
    layout, options = VARLEN[base], CAUSAL if base.startswith("zigzag") else OPTIONS
    plain, kv, qkv = packings(base)
    local = (0, 3, 4, 4, 11)  # odd, single, empty and long parts
    for n, call in enumerate(options):
        for name in (plain, kv, qkv) if n < 2 else (plain,):
            cu = tuple(world_size * end for end in local)
            shape = Shape(seq=cu[-1], heads_k=4 if name == qkv else 2, dim_v=8 if name != plain else 16, packed=True)
            given = {**call, "cu_seqlens": local, "max_seqlen": 7 + n}
            yield Case(name=name, layout=layout, shape=shape, call=given, seen=seen_by(call, cu))


def llama3_cases(world_size: int) -> Iterator[Case]:
    rows = {2: (0, 5, 5, 24), 3: (0, 9, 10, 14, 24), 4: (0, 5, 13, 13, 20, 24)}
    plain, kv, qkv = packings("llama3_flash_attn_varlen")
    options = [{key: value for key, value in call.items() if key != "transport"} for call in OPTIONS]
    for n, call in enumerate(options):
        for name in (plain, kv, qkv) if n < 2 else (plain,):
            cu = rows.get(world_size, (0, 4, 24)) if n % 2 else (0, 1, 24)
            shape = Shape(seq=24, heads_k=4 if name == qkv else 2, dim_v=8 if name != plain else 16, packed=True)
            for stride in (1, 2):
                given = {**call, "heads_k_stride": stride}
                yield Case(name=name, layout="contiguous", shape=shape, call=given, seen=seen_by(call, cu))


# -- windows and sinks -----------------------------------------------------------------------------------------------------------

WINDOWED = ["ring_sliding_window_attn", "ring_streaming_llm_attn"]


def windowed_cases(base: str, world_size: int) -> Iterator[Case]:
    sinks = int("streaming" in base)
    for window, call in (
        (0, {}),
        (3, {"transport": "ring"}),
        (5, {"softmax_scale": 0.3, "cp_size": world_size}),
        (6 * 24 // world_size, {"transport": "halo"}),  # longer than the shard
        (1000, {"transport": "all_gather", "kernel": "reference"}),
    ):
        given = {"window_size": window, **call}
        seen = Seen(causal=True, window=(window, 0), sinks=sinks)
        yield Case(name=base, layout="contiguous", shape=Shape(), call=given, seen=seen)
        yield Case(name=base, layout="contiguous", shape=Shape(heads_k=1, dim_v=16, batch=3), call=given, seen=seen)
        name, packed = base + "_varlen", Shape(packed=True)
        for cu in ((0, 7, 8, 24), (0, 24)):
            cut = replace(seen, cu=cu)
            yield Case(name=name, layout="contiguous", shape=packed, call={**given, "cu_seqlens": cu}, seen=cut)
        cut = replace(seen, cu=(0, 10, 24))
        yield Case(name=name, layout="contiguous", shape=Shape(), call={**given, "cu_seqlens": (0, 10, 24)}, seen=cut)
        yield Case(name=name, layout="contiguous", shape=packed, call={**given, "cu_seqlens": None}, seen=seen)
        for seq in (23, 25, world_size - 1):  # ranks with different numbers of tokens, or none
            cu, uneven = (0, seq // 3, seq), {**given, "seq_len": seq}
            yield Case(name=base, layout="contiguous", shape=Shape(seq=seq), call=uneven, seen=seen)
            shape = Shape(seq=seq, packed=True)
            yield Case(name=name, layout="contiguous", shape=shape, call={**uneven, "cu_seqlens": cu}, seen=replace(seen, cu=cu))
        more = {**given, "seq_len": 5, "seq_len_k": 21}
        yield Case(name=base, layout="contiguous", shape=Shape(seq=5, seq_k=21), call=more, seen=seen)


PREPARED = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "local_k_slice"]
FAMILIES: dict[str, Callable[[int], Iterator[Case]]] = {
    **{base: lambda world_size, base=base: dense_cases(base, world_size) for base in DENSE},
    **{base: lambda world_size, base=base: varlen_cases(base, world_size) for base in VARLEN},
    "llama3_flash_attn_varlen": llama3_cases,
    **{base: lambda world_size, base=base: windowed_cases(base, world_size) for base in WINDOWED},
}


# -- running them ----------------------------------------------------------------------------------------------------------------


def table(cu: Sequence[int] | None) -> Tensor | None:
    return None if cu is None else torch.tensor(cu, dtype=torch.int32)


def run_cases(rank: int, world_size: int, cases: Sequence[Case]) -> list[str]:
    faults = []
    for case in cases:
        given = dict(case.call)
        truth = whole(case.shape, case.seen, case.scale, gain=case.gain)
        rows = held(case.layout, case.shape.seq, world_size, rank, case.seen.cu)
        keys = held(case.layout, case.shape.seq_k or case.shape.seq, world_size, rank, case.seen.cu)
        if case.name.startswith("llama3"):
            assert case.seen.cu is not None
            cu = torch.tensor(case.seen.cu, dtype=torch.int32)
            prepared = llama3_flash_attn_prepare_cu_seqlens(cu, case.seen.causal, rank, world_size)
            given |= dict(zip(PREPARED, prepared, strict=True))
        elif "cu_seqlens" in given:
            given["cu_seqlens"] = table(given["cu_seqlens"])
        function = getattr(nnscaler_ring, case.name)
        with naming(case):
            answer = check_call(
                lambda q, k, v, run=function, name=case.name, given=given: run(*stacked(name, q, k, v), **given),
                *(truth, rows, keys, case.call.get("return_attn_probs", False)),
            )
        faults += told(case, answer)
    return faults


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_agrees_with_dense_attention(ranks, world_size: int, family: str) -> None:
    no_faults(ranks(world_size).run(run_cases, list(FAMILIES[family](world_size))))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_without_a_group(family: str) -> None:
    assert not dist.is_initialized()
    no_faults([run_cases(0, 1, list(FAMILIES[family](1)))])


def test_every_public_function_is_covered() -> None:
    """A new name in `__all__` fails here until a case stands above, in `test_ops`, or it is named here with its own tests."""
    elsewhere = {"ContextParallel", "Mask", "Slice", "llama3_flash_attn_prepare_cu_seqlens"}
    elsewhere |= {"setup_mpi_distributed", "cleanup_distributed"}  # test_launch
    elsewhere |= {"substitute_hf_flash_attn", "update_ring_flash_attn_params", "use_ring_attn"}  # test_transformers
    elsewhere |= {"flash_attention", "piecewise_attention", "wrap_piecewise_attn_func"}  # test_feature_fronts
    for world_size in WORLDS:
        here = {case.name for cases in FAMILIES.values() for case in cases(world_size)}
        assert here | set(test_ops.OPS) | elsewhere == set(nnscaler_ring.__all__)
    assert all(callable(getattr(nnscaler_ring, name)) for name in nnscaler_ring.__all__)


# -- other dtypes ----------------------------------------------------------------------------------------------------------------


def other_dtypes(rank: int, world_size: int) -> list[str]:
    """fp32 partial results, gradients of each tensor in its own dtype: no drift as the world grows."""
    faults = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, layout in DENSE.items():
            for heads_k in (1, 2):
                truth = whole(Shape(seq=96, heads_k=heads_k, dim=16, dim_v=16), Seen(causal=True), dtype=dtype)
                function = getattr(nnscaler_ring, name + "_func")
                answer = check_call(
                    lambda q, k, v, run=function: run(q, k, v, causal=True, return_attn_probs=True),
                    *(truth, held(layout, 96, world_size, rank)),
                    probs=True,
                )
                faults += told((name, dtype, heads_k), answer)
    return faults


def test_other_dtypes(ranks, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the other tests run in bfloat16 there; float32 has no fast kernel")
    no_faults(ranks(4).run(other_dtypes))


# -- groups ----------------------------------------------------------------------------------------------------------------------


def groups_at_once(rank: int, world_size: int) -> list[str]:
    """Two groups of global ranks at once, and what a caller may say of them."""
    pairs = [(0, 3), (1, 2)]
    made = [dist.new_group(list(pair)) for pair in pairs]
    pair, group = next((p, g) for p, g in zip(pairs, made, strict=True) if rank in p)
    own = pair.index(rank)
    faults = []
    said = {"cp_size": 2, "cp_local_rank": own, "cp_prev_global_rank": pair[own - 1], "cp_next_global_rank": pair[1 - own]}
    for name in WINDOWED:
        seen = Seen(causal=True, window=(15, 0), sinks=int("streaming" in name))
        rows = held("contiguous", 24, 2, own)
        for given in (said, {}):
            call = lambda q, k, v, name=name, given=given: getattr(nnscaler_ring, name)(q, k, v, 15, group, **given)  # noqa: E731
            faults += told((name, given), check_call(call, whole(Shape(), seen), rows))
        for key, value in said.items():
            wrong = value + 1
            with pytest.raises(ValueError, match=rf"{key}={wrong}, but in cp_group it is {value}"), no_communication():
                getattr(nnscaler_ring, name)(*(torch.zeros(1, 4, 2, 8),) * 3, 3, group, **{key: wrong})
    truth, rows = whole(Shape(), Seen(causal=True)), held("zigzag", 24, 2, own)
    call = lambda q, k, v: nnscaler_ring.zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)  # noqa: E731
    faults += told("zigzag", check_call(call, truth, rows))
    for foreign in (made[1] if rank in pairs[0] else made[0], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match="not a member"), no_communication():
            nnscaler_ring.ring_flash_attn_func(*(torch.zeros(1, 4, 2, 8),) * 3, group=foreign)
    return faults


def test_two_groups_at_once(ranks) -> None:
    no_faults(ranks(4).run(groups_at_once))


# -- llama3's tables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_prepare_says_what_each_rank_sees(causal: bool) -> None:
    """The documents of queries and of the keys in the slice, aligned at their last tokens, are the rows of the whole mask."""
    random = torch.Generator().manual_seed(3)
    for world_size in (1, 2, 3, 4):
        for _ in range(20):
            ends = torch.randint(0, 25, (4,), generator=random).sort().values.tolist()
            cu = torch.tensor([0, *ends, 24], dtype=torch.int32)
            mask = Seen(cu=tuple(cu.tolist()), causal=causal).dense(24, 24)
            for rank in range(world_size):
                cu_q, cu_k, max_q, max_k, keys = llama3_flash_attn_prepare_cu_seqlens(cu, causal, rank, world_size)
                assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
                assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == 24 // world_size and cu_k[-1] == keys.stop - keys.start
                assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
                rows = mask[24 // world_size * rank : 24 // world_size * (rank + 1)]
                assert not rows[:, : keys.start].any() and not rows[:, keys.stop :].any(), "a key outside of the slice is seen"
                seen = Seen(causal=causal, cu=tuple(cu_q.tolist()), cu_k=tuple(cu_k.tolist()))
                assert torch.equal(seen.dense(len(rows), int(cu_k[-1])), rows[:, keys])


def test_llama3_leaves_out_documents_without_tokens() -> None:
    row = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 3, 8], dtype=torch.int32), True, 0, 1)
    assert row[0].tolist() == row[1].tolist() == [0, 3, 8]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"heads_k_stride": None}, "heads_k_stride=None must divide the 2 key heads"),
        ({"heads_k_stride": 3}, "heads_k_stride=3 must divide"),
        ({"local_k_slice": None}, "local_k_slice=None: give the slice that"),
        ({"local_k_slice": slice(0, 9)}, "within the row's 8 tokens"),
        ({"max_seqlen_q": "8"}, "max_seqlen='8', but the longest document of cu_seqlens has 5"),
        ({"max_seqlen_k": None}, "max_seqlen=None, but"),
    ],
)
def test_what_llama3_is_told_is_looked_at(change: dict[str, Any], why: str) -> None:
    cu_q, cu_k, max_q, max_k, keys = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 8]), True, 0, 1)
    said = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k, "local_k_slice": keys}
    q, k, v = (torch.randn(8, heads, 4) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=re.escape(why)):
        nnscaler_ring.llama3_flash_attn_varlen_func(q, k, v, **{**said, "heads_k_stride": 1, **change}, causal=True)
