"""`ContextParallel`: shard, attention, unshard and positions, for every layout, on real processes and on one."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nnscaler_ring import ContextParallel, Mask, ring_flash_attn_func, ring_sliding_window_attn, zigzag_ring_flash_attn_func
from nnscaler_ring.core.balance import balanced
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.core.mask import NO_LIMIT
from nnscaler_ring.core.relayout import relayout
from tests.worlds import Seen, Shape, check_call, held, naming, no_communication, no_faults, place, refusal, told, whole

DOCUMENTS = (0, 7, 8, 8, 24)
LSE = {"return_attn_probs": True}


def table(cu: tuple[int, ...] | None) -> Tensor | None:
    return None if cu is None else torch.tensor(cu, dtype=torch.int32)


def per_document(layout: str) -> bool:
    return layout.endswith("per-document")


# -- there and back --------------------------------------------------------------------------------------------------------------


def there_and_back(rank: int, world_size: int) -> None:
    device, dtype = place()
    for layout in LAYOUTS:
        cp = ContextParallel(dist.group.WORLD if dist.is_initialized() else None, layout=layout)
        assert (cp.rank, cp.world_size) == (rank, world_size) and layout in repr(cp)
        for seq in (8 * world_size, 8 * world_size - 1, 8 * world_size + 1, world_size - 1):
            cu = (0, seq // 3, seq // 3, seq) if per_document(layout) else None
            given = {"cu_seqlens": table(cu)}
            positions = held(layout, seq, world_size, rank, cu)
            in_document = positions if cu is None else positions - torch.tensor([0, seq // 3])[(positions >= seq // 3).long()]
            assert torch.equal(cp.position_ids(seq, **given), in_document), (layout, seq)
            assert cp.position_ids(seq, **given).dtype == torch.int64
            assert cp.position_ids(seq, **given, device=device).device == device
            for dim in (0, 1, 2, -1, -2):
                x = torch.arange(seq, device=device, dtype=dtype)
                sizes = [2, 3, 4]
                sizes[dim] = seq
                x = x.reshape([seq if n == dim % 3 else 1 for n in range(3)]).expand(sizes).clone().requires_grad_()
                shard = cp.shard(x, dim, **given)
                assert torch.equal(shard, x.index_select(dim, positions.to(device))), (layout, seq, dim)
                full = cp.unshard(shard, dim, **given, seq_len=seq)
                assert torch.equal(full, x), (layout, seq, dim)
                weight = torch.arange(full.numel(), device=device, dtype=dtype).reshape(full.shape) % 128
                (full * weight).sum().backward()
                # Every rank has the same loss: its gradient is that of its own tokens, and the ranks' sum is the whole.
                own = torch.zeros_like(x).index_copy(dim, positions.to(device), weight.index_select(dim, positions.to(device)))
                assert x.grad is not None and torch.equal(x.grad, own), (layout, seq, dim)
        given = {"cu_seqlens": torch.tensor([0, world_size, 6 * world_size])} if per_document(layout) else {}
        x = torch.arange(6 * world_size, device=device)
        even = ContextParallel(layout=layout)
        assert torch.equal(even.unshard(even.shard(x, 0, **given), 0, **given), x), "the length follows from the shard"


def cut_ahead(rank: int, world_size: int) -> None:
    """Shards of a batch of uneven length, then of the next one, before the first is used."""
    cp = ContextParallel()
    first, _ = cp.shard(torch.randn(1, 13, 2, 8), 1), cp.shard(torch.randn(1, 12, 2, 8), 1)
    for call in (lambda: cp.attention(first, first, first), lambda: cp.unshard(first, 1)):
        with pytest.raises(ValueError, match=r"different lengths have been given out before.*pass seq_len"):
            call()
    assert cp.unshard(first, 1, seq_len=13).shape[1] == 13
    assert cp.unshard(cp.shard(torch.randn(1, 32, 2, 8), 1), 1).shape[1] == 32, "of a length that never was one of several"
    *_, text, image = (cp.shard(torch.randn(1, n, 2, 8), 1) for n in (64, 66, 68, 70, 7, 9))
    joint = torch.cat([text, image], 1)  # 9 tokens on rank 0, 7 on rank 1: no rank was given so many
    with pytest.raises(ValueError, match="pass seq_len"), no_communication():
        cp.attention(joint, joint, joint, "full")
    for lengths in ((64, 77), (77, 64), (7, 64), (64, 61, 59)):  # what is even goes without, whatever else was cut
        cp = ContextParallel()
        even = {n: cp.shard(torch.randn(1, n, 2, 8), 1) for n in lengths}[64]
        assert cp.unshard(cp.attention(even, even, even), 1).shape[1] == 64


def test_shards_of_several_batches(ranks) -> None:
    ranks(2).run(cut_ahead)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_there_and_back(ranks, world_size: int) -> None:
    ranks(world_size).run(there_and_back)


def test_one_process() -> None:
    there_and_back(0, 1)


# -- attention -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Use:
    seen: Seen
    mask: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    shape: Shape = Shape(dim_v=16)  # noqa: RUF009


# A prefix seen by all, a stripe further back, a block of its own, and rows 20 to 23 that see nothing.
SLICES = (
    (0, 12, 0, 3, -NO_LIMIT, NO_LIMIT),
    (0, 12, 3, 12, -4, 0),
    (12, 16, 0, 16, -10, -6),
    (12, 16, 12, 16, -NO_LIMIT, 0),
    (16, 20, 5, 9, -NO_LIMIT, NO_LIMIT),
)
USES = [
    Use(seen=Seen(causal=True)),
    Use(seen=Seen(causal=True), mask="causal", call=LSE, shape=Shape(heads_k=1)),
    Use(seen=Seen(), mask="full", call={"softmax_scale": 0.3, **LSE}),
    Use(seen=Seen(causal=True, window=(5, 0)), mask="causal", call={"window_size": (5, -1), "deterministic": True}),
    Use(seen=Seen(window=(5, 3)), mask="full", call={"window_size": (5, 3), **LSE}),
    Use(seen=Seen(causal=True, window=(2, 0), sinks=3), mask="causal", call={"window_size": (2, 0), "sinks": 3, **LSE}),
    Use(seen=Seen(causal=True, prefix=9), mask="causal", call={"prefix": 9, **LSE}),
    Use(seen=Seen(causal=True, window=(4, 0), sinks=1, prefix=3), call={"window_size": (4, 0), "sinks": 1, "prefix": 3}),
    Use(seen=Seen(causal=True, cu=DOCUMENTS), mask="causal", call=LSE),
    Use(seen=Seen(cu=DOCUMENTS, window=(3, 3), sinks=1), mask="full", call={"window_size": (3, 3), "sinks": 1}),
    Use(seen=Seen(causal=True, cu=DOCUMENTS, prefix=4), mask="causal", call={"prefix": 4}, shape=Shape(packed=True)),
    Use(seen=Seen(slices=SLICES), call=LSE),
]


def uses(layout: str) -> Iterator[tuple[Use, str, str]]:
    for n, each in enumerate(USES):
        transport = ("auto", "ring", "all_gather", "halo", "all_to_all", "grouped_ring")[n % 6]
        kernel = ("auto", "aten" if each.shape.packed else "reference")[n % 5 == 0]
        if (each.seen.cu is not None) >= per_document(layout):
            yield each, transport, kernel
    for seq in () if per_document(layout) else (23, 25, 3):
        yield Use(seen=Seen(causal=True), shape=Shape(seq=seq), call={"seq_len": seq, **LSE}), "auto", "auto"
    if per_document(layout) or layout == "balanced":
        return
    for transport in ("auto", "ring", "all_gather", "all_to_all"):  # keys before the first query, as of a prompt's last part
        yield Use(seen=Seen(causal=True), shape=Shape(seq=12, seq_k=36), call=LSE), transport, "auto"
        lengths = {"seq_len": 5, "seq_len_k": 37}
        yield Use(seen=Seen(causal=True), shape=Shape(seq=5, seq_k=37), call={**lengths, **LSE}), transport, "auto"
        shape, seen = Shape(seq=5, seq_k=16), Seen(slices=((0, 5, 0, 16, -9, 11),))
        yield Use(seen=seen, shape=shape, call={"seq_len": 5, **LSE}), transport, "auto"
        yield Use(seen=replace(seen, slices=((0, 12, 0, 24, -9, 8),)), shape=Shape(seq=12, seq_k=24), call=LSE), transport, "auto"


def attends(rank: int, world_size: int, group: Any = None) -> list[str]:
    group = dist.group.WORLD if group is None and dist.is_initialized() else group
    faults = []
    for layout in LAYOUTS:
        for each, transport, kernel in uses(layout):
            cp = ContextParallel(group, layout=layout, transport=transport, kernel=kernel)
            given = {"mask": each.mask, "cu_seqlens": table(each.seen.cu), **each.call}
            given = {name: value for name, value in given.items() if value is not None}
            if each.seen.slices is not None:
                given["mask"] = Mask(each.seen.slices, each.shape.seq, each.shape.seq_k)
            truth = whole(each.shape, each.seen, each.call.get("softmax_scale"))
            rows = held(layout, each.shape.seq, world_size, rank, each.seen.cu)
            keys = held(layout, each.shape.seq_k or each.shape.seq, world_size, rank, each.seen.cu)
            with naming((layout, transport, each)):
                call = lambda q, k, v, cp=cp, given=given: cp.attention(q, k, v, **given)  # noqa: E731
                answer = check_call(call, truth, rows, keys, probs=each.call.get("return_attn_probs", False))
            faults += told((layout, transport, each), answer)
    return faults


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_attention(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(attends))


def test_attention_on_one_process() -> None:
    no_faults([attends(0, 1)])


def on_a_layout_of_one_s_own(rank: int, world_size: int) -> list[str]:
    """Balanced for a mask of slices; runs dealt by hand."""
    seen = Seen(slices=SLICES)
    mask, truth, faults = Mask(SLICES, 24), whole(Shape(), seen), []
    dealt = Layout(np.array([[n % world_size, 3 * n, 3] for n in range(8)]), 24, world_size)
    for layout in (balanced(mask, world_size), dealt):
        cp, rows = ContextParallel(layout=layout), torch.from_numpy(layout.positions(rank))
        assert torch.equal(cp.position_ids(24), rows) and "the layout given" in repr(cp)
        call = lambda q, k, v, cp=cp: cp.attention(q, k, v, mask, seq_len=24)  # noqa: E731
        faults += told(layout, check_call(call, truth, rows))
        x = torch.arange(24.0)
        assert torch.equal(cp.unshard(cp.shard(x, 0), 0, seq_len=24), x)
    return faults


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_layout_of_one_s_own(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(on_a_layout_of_one_s_own))


def as_a_model(rank: int, world_size: int) -> list[str]:
    """Shard, attention, unshard, a loss on the whole: the sum of the ranks' gradients is the gradient."""
    truth, faults = whole(Shape(), Seen(causal=True)), []
    for layout in ("contiguous", "zigzag", "stripe"):
        cp = ContextParallel(layout=layout)  # the default group
        q, k, v = (x.clone().requires_grad_() for x in (truth.q, truth.k, truth.v))
        out = cp.unshard(cp.attention(*(cp.shard(x, 1) for x in (q, k, v))), 1)
        (out * truth.grad).sum().backward()
        grads = {}
        for name, x in (("dq", q), ("dk", k), ("dv", v)):
            assert x.grad is not None
            dist.all_reduce(x.grad)
            grads[name] = x.grad
        faults += told(layout, truth.wrong({"out": out, **grads}, {}))
    return faults


def test_as_a_model(ranks) -> None:
    no_faults(ranks(3).run(as_a_model))


# -- meshes, parts of the world --------------------------------------------------------------------------------------------------


def on_meshes(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "cp"))
    truth, faults = whole(Shape(), Seen(causal=True)), []
    for each in (mesh["cp"], mesh["dp"]):
        own = rank % 2 if each is mesh["cp"] or each == mesh["cp"] else rank // 2
        cp = ContextParallel(each, layout="zigzag")
        assert (cp.rank, cp.world_size) == (own, 2)
        faults += told(each, check_call(cp.attention, truth, held("zigzag", 24, 2, own)))
    cube = init_device_mesh(device.type, (2, 2, 1), mesh_dim_names=("x", "y", "z"))
    faults += told("three dims", refusal(lambda: ContextParallel(cube), ValueError, ["one dim or two", "mesh['name']"]))
    middle = DeviceMesh(device.type, [1, 2])
    group = dist.new_group([1, 2])
    for each in (middle, group):
        if rank in (1, 2):
            faults += told(each, check_call(ContextParallel(each).attention, truth, held("contiguous", 24, 2, rank - 1)))
        else:
            faults += told("not in it", refusal(lambda each=each: ContextParallel(each), ValueError, ["not"]))
    flat = ContextParallel(mesh._flatten("all"))
    return faults + told("flat", check_call(flat.attention, truth, held("contiguous", 24, 4, rank)))


def on_grids(rank: int, world_size: int) -> list[str]:
    """Heads along the inner axis of a mesh, rows along the outer one; each use on one of the shapes of a mesh."""
    device, dtype = place()
    faults, shapes = [], ((2, world_size // 2), (1, world_size), (world_size, 1))
    for first, sizes in enumerate(shapes):
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("outer", "inner"))
        for turn, layout in enumerate(LAYOUTS):
            for each, transport, kernel in islice(uses(layout), (first + turn) % len(shapes), None, len(shapes)):
                if transport == "all_to_all":
                    continue
                cp = ContextParallel(mesh, layout=layout, transport=transport, kernel=kernel)
                assert (cp.rank, cp.world_size) == (rank, world_size)
                given = {"cu_seqlens": table(each.seen.cu), **each.call} | ({} if each.mask is None else {"mask": each.mask})
                if each.seen.slices is not None:
                    given["mask"] = Mask(each.seen.slices, each.shape.seq, each.shape.seq_k)
                truth = whole(each.shape, each.seen, each.call.get("softmax_scale"))
                rows = held(layout, each.shape.seq, world_size, rank, each.seen.cu)
                keys = held(layout, each.shape.seq_k or each.shape.seq, world_size, rank, each.seen.cu)
                call = lambda q, k, v, cp=cp, given=given: cp.attention(q, k, v, **given)  # noqa: E731
                with naming((sizes, layout, each)):
                    answer = check_call(call, truth, rows, keys, probs=each.call.get("return_attn_probs", False))
                faults += told((sizes, layout, each), answer)
        cp = ContextParallel(mesh, layout="zigzag")
        x = torch.arange(25, device=device, dtype=dtype)
        assert torch.equal(cp.unshard(cp.shard(x, 0), 0, seq_len=25), x)
    return faults + told("heads twice", refusal(lambda: ContextParallel(mesh, transport="all_to_all"), ValueError, ["grid"]))


def test_grids(ranks) -> None:
    no_faults(ranks(4).run(on_grids))


def reduced(rank: int, world_size: int) -> None:
    """Gradients that travel in bfloat16 are off by a rounding of each rank's part, and no more."""
    device, _ = place()
    truth = whole(Shape(), Seen(causal=True), dtype=torch.float32)
    rows = held("zigzag", 24, world_size, rank).to(device)
    errors = {}
    for dtype in (None, torch.bfloat16):
        for transport in ("ring", "halo", "all_to_all"):
            cp = ContextParallel(layout="zigzag", transport=transport, reduce_dtype=dtype)
            q, k, v = (x.index_select(1, rows).requires_grad_() for x in (truth.q, truth.k, truth.v))
            cp.attention(q, k, v).backward(truth.grad.index_select(1, rows))
            grads = {"dk": k.grad, "dv": v.grad}
            errors[dtype, transport] = max(_far(x, truth.want[name].index_select(1, rows.cpu())) for name, x in grads.items())
    for transport in ("ring", "halo"):
        assert errors[None, transport] < 1e-5 < errors[torch.bfloat16, transport] < 2.0**-8 * world_size * 8
    assert errors[None, "all_to_all"] < 1e-5


def _far(have: Tensor | None, want: Tensor) -> float:
    assert have is not None
    return (have.cpu().double() - want).abs().max().item()


def test_reduce_dtype(ranks) -> None:
    ranks(2).run(reduced)


def test_meshes(ranks) -> None:
    no_faults(ranks(4).run(on_meshes))


# -- what is refused -------------------------------------------------------------------------------------------------------------

CAUSAL = Mask([(0, 8, 0, 8, -NO_LIMIT, 0)], 8)
REFUSED: list[tuple[dict[str, Any], Callable[[ContextParallel, Tensor], Any], list[str]]] = [
    ({"layout": "zig-zag"}, lambda cp, x: None, ["'zig-zag'", *LAYOUTS]),
    ({"transport": "pigeon"}, lambda cp, x: None, ["'pigeon'", "auto", "ring", "all_gather", "halo"]),
    ({"reduce_dtype": torch.int32}, lambda cp, x: None, ["reduce_dtype", "torch.int32", "floating"]),
    ({"kernel": "magic"}, lambda cp, x: None, ["'magic'", "auto", "aten", "reference"]),
    ({}, lambda cp, x: cp.attention(x, x, x, mask="window"), ["'window'", "'causal'", "'full'", "Mask"]),
    ({}, lambda cp, x: cp.attention(x, x, x, mask=None), ["'causal'", "'full'", "Mask"]),
    ({}, lambda cp, x: cp.attention(x, x, x, CAUSAL, window_size=(3, 0)), ["Mask", "window_size"]),
    ({}, lambda cp, x: cp.attention(x, x, x, CAUSAL, sinks=2), ["Mask", "sinks"]),
    ({}, lambda cp, x: cp.attention(x, x, x, CAUSAL, cu_seqlens=torch.tensor([0, 8])), ["Mask", "cu_seqlens"]),
    ({}, lambda cp, x: cp.attention(x, x, x, Mask([(0, 9, 0, 9)], 9)), ["9 queries", "8"]),
    ({}, lambda cp, x: cp.attention(x, x, x, sinks=-1), ["sinks=-1"]),
    ({}, lambda cp, x: cp.attention(x, x, x, prefix=-1), ["prefix=-1"]),
    ({}, lambda cp, x: cp.attention(x, x, x, window_size=(-2, 0)), ["window_size"]),
    ({}, lambda cp, x: cp.attention(x, x, x, cu_seqlens=torch.tensor([0, 5, 12])), ["12 tokens"]),
    ({}, lambda cp, x: cp.attention(x, x, x, cu_seqlens=torch.tensor([0, 6, 5, 8])), ["cu_seqlens", "decrease"]),
    ({}, lambda cp, x: cp.attention(x, x, x, seq_len=11), ["11 tokens"]),
    ({"layout": "zigzag"}, lambda cp, x: cp.attention(x, x, x, seq_len=11), ["'zigzag'", "11 tokens"]),
    ({"layout": "zigzag-per-document"}, lambda cp, x: cp.attention(x, x, x), ["'zigzag-per-document'", "cu_seqlens"]),
    ({"layout": "contiguous-per-document"}, lambda cp, x: cp.shard(x, 1), ["cu_seqlens"]),
    ({"layout": "contiguous-per-document"}, lambda cp, x: cp.unshard(x, 1), ["cu_seqlens"]),
    ({"layout": "contiguous-per-document"}, lambda cp, x: cp.position_ids(8), ["cu_seqlens"]),
    ({}, lambda cp, x: cp.shard(x, 1, cu_seqlens=torch.tensor([0, 99])), ["cu_seqlens", "99"]),
    ({}, lambda cp, x: cp.unshard(x, 1, cu_seqlens=torch.tensor([0, 99])), ["99"]),
    ({}, lambda cp, x: cp.unshard(x, 1, seq_len=99), ["99"]),
    ({}, lambda cp, x: cp.unshard(x, 1, cu_seqlens=torch.tensor([0, 8]), seq_len=99), ["99"]),
]


def refused(rank: int, world_size: int) -> list[str]:
    device, dtype = place()
    x = torch.zeros(1, 8 // world_size, 2, 8, device=device, dtype=dtype)
    faults = []
    for n, (given, call, words) in enumerate(REFUSED):
        faults += told(f"REFUSED[{n}]", refusal(lambda g=given, c=call: c(ContextParallel(**g), x), ValueError, words))
    return faults


def test_refused(ranks) -> None:
    no_faults([refused(0, 1), *ranks(2).run(refused)])


def test_forgotten_boundaries_are_refused() -> None:
    """The layout places tokens by documents, which shards alone do not tell."""
    cp, cu = ContextParallel(layout="balanced"), torch.tensor([0, 5, 8], dtype=torch.int32)
    x = cp.shard(torch.randn(1, 8, 2, 4), dim=1, cu_seqlens=cu)
    with no_communication():
        with pytest.raises(ValueError, match="were cut with cu_seqlens, here are none"):
            cp.attention(x, x, x)
        with pytest.raises(ValueError, match="were cut with cu_seqlens, here are none"):
            cp.unshard(x, dim=1)
        with pytest.raises(ValueError, match="were cut with cu_seqlens, here are none"):
            cp.position_ids(8)
        x = cp.shard(torch.randn(1, 8, 2, 4), dim=1)
        with pytest.raises(ValueError, match="were cut without cu_seqlens, here are some"):
            cp.attention(x, x, x, cu_seqlens=cu)


def uneven(rank: int, world_size: int) -> None:
    """A graph is refused what is refused outside."""
    cp = ContextParallel(layout="zigzag")
    x = cp.shard(torch.randn(1, 11, 2, 4), dim=1)
    call = torch.compile(lambda x: cp.attention(x, x, x), backend="eager", fullgraph=False)
    with pytest.raises(ValueError, match="pass seq_len"), no_communication():
        call(x)
    for lengths in ((12, 11), (11, 12)):  # of queries and of keys, in either order
        q, k = (cp.shard(torch.randn(1, length, 2, 4), dim=1) for length in lengths)
        call = torch.compile(lambda q, k: cp.attention(q, k, k), backend="eager", fullgraph=False)
        with pytest.raises(ValueError, match="pass seq_len"), no_communication():
            call(q, k)
    cp.attention(q, k, k, seq_len=11, seq_len_k=12)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(lambda x: cp.attention(x, x, x), backend=counter, fullgraph=True)
    for length in (9, 11, 13):  # between steps of one length others are called outside, by what they are in all
        cp.attention(*[cp.shard(torch.randn(1, length, 2, 4), dim=1)] * 3, seq_len=length)
        call(cp.shard(torch.randn(1, 12, 2, 4), dim=1))
    assert counter.frame_count == 1


def test_uneven_shards_in_a_graph(ranks) -> None:
    ranks(2).run(uneven)


def test_forgotten_boundaries_in_a_graph() -> None:
    cp, cu = ContextParallel(layout="balanced"), torch.tensor([0, 5, 8], dtype=torch.int32)
    x = cp.shard(torch.randn(1, 8, 2, 4), dim=1, cu_seqlens=cu)
    with pytest.raises(ValueError, match="were cut with cu_seqlens, here are none"):
        torch.compile(lambda x: cp.attention(x, x, x), backend="eager", fullgraph=False)(x)


def test_dtensors_are_for_the_ops() -> None:
    x = torch.randn(1, 8, 2, 4)
    with mock.patch("nnscaler_ring.core.call.DTensor", torch.Tensor), pytest.raises(ValueError, match=r"call a wrap_\* op"):
        ContextParallel().attention(x, x, x)


def test_one_table_is_of_queries_and_keys() -> None:
    q, k, cu = torch.randn(1, 4, 2, 8), torch.randn(1, 8, 2, 8), torch.tensor([0, 3, 4])
    with pytest.raises(ValueError, match="4 query and 8 key tokens, but cu_seqlens is of both"):
        ContextParallel().attention(q, k, k, cu_seqlens=cu, seq_len_k=8)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="takes no causal: mask= says"):
        ContextParallel().attention(*[torch.randn(1, 8, 2, 4)] * 3, causal=True)
    x = torch.zeros(1, 8, 2, 8)
    with pytest.raises(TypeError, match="windows"), no_communication():
        ContextParallel().attention(x, x, x, windows=(3, 0))


def test_one_of_many_without_a_group_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes alone what the others compute too."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="one of 4 .* no process group") as told:
        assert ContextParallel().world_size == 1
    assert told[0].filename == __file__
    q = torch.zeros(1, 4, 2, 8)
    with pytest.warns(UserWarning, match="one of 4 .* this attention is of this process alone") as told:
        ring_flash_attn_func(q, q, q)
    assert [x.filename for x in told] == [__file__]
    for call in (lambda: ring_sliding_window_attn(q, q, q, 2), lambda: zigzag_ring_flash_attn_func(q, q, q, causal=True)):
        with pytest.warns(UserWarning, match="one of 4") as told:
            call()
        assert [x.filename for x in told] == [__file__]
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.warns(UserWarning, match="one of 4"):
        ContextParallel()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ContextParallel()


def test_what_is_wrong_is_said() -> None:
    cp, x = ContextParallel(layout="zigzag"), torch.zeros(1, 8, 2, 8)
    for dim in (4, -5):
        for wrong in (cp.shard, cp.unshard):
            with pytest.raises(ValueError, match=rf"dim={dim}: x has shape \(1, 8, 2, 8\)"):
                wrong(x, dim=dim)
    with pytest.raises(ValueError, match=r"a tensor \(8, 8\): give 'causal', 'full' or a Mask"):
        cp.attention(x, x, x, mask=torch.ones(8, 8, dtype=torch.bool))  # type: ignore[arg-type]


def ended(rank: int, world_size: int) -> bool:
    """Whether a group is gone once it is destroyed, though a `ContextParallel` over it lives on."""
    group = dist.new_group()
    gone = weakref.ref(group)
    cp = ContextParallel(group, layout="zigzag")
    x = cp.shard(torch.randn(1, 8, 2, 4), 1).requires_grad_()
    cp.attention(x, x, x).sum().backward()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return gone() is None and "a group that is not there" in repr(cp)


def loaded(rank: int, world_size: int) -> tuple[int, bool]:
    """The rank of what rank 0 has saved, and whether attention over its shards is that over those of one's own."""
    saved = [pickle.dumps(ContextParallel(layout="zigzag"))]
    dist.broadcast_object_list(saved, src=0)
    x, (one, other) = torch.randn(1, 10, 2, 4), (pickle.loads(saved[0]), ContextParallel(layout="zigzag"))
    got, want = (cp.unshard(cp.attention(*[cp.shard(x, 1)] * 3, seq_len=10), 1, seq_len=10) for cp in (one, other))
    return one.rank, torch.equal(got, want) and torch.equal(one.position_ids(10), other.position_ids(10))


def test_another_rank_may_load_what_one_saves(ranks) -> None:
    assert ranks(3).run(loaded) == [(0, True), (1, True), (2, True)]


def test_nothing_keeps_a_group_alive(ranks) -> None:
    """Its threads would run on while Python ends, and may then abort the process."""
    assert ranks(2).run(ended) == [True, True]


def test_what_goes_beside_a_mask_of_slices() -> None:
    x, mask = torch.randn(1, 8, 2, 4), Mask([(0, 8, 0, 8)], 8)
    for named in ({"prefix": 2}, {"sinks": 2}, {"window_size": (2, 0)}, {"cu_seqlens": torch.tensor([0, 5, 8])}):
        with pytest.raises(ValueError, match="a Mask says everything: leave out cu_seqlens, window_size, sinks and prefix"):
            ContextParallel().attention(x, x, x, mask, **named)
    with pytest.raises(ValueError, match="the mask is over 8 queries and 9 keys, the tokens are 8 and 8"):
        ContextParallel().attention(x, x, x, Mask([(0, 8, 0, 9)], 8, 9))
    cp, cu = ContextParallel(layout="balanced"), torch.tensor([0, 5, 8])
    x = cp.shard(x, 1, cu_seqlens=cu)
    assert cp.attention(x, x, x, mask, cu_seqlens=cu).shape == x.shape, "there boundaries are for the layout"


def test_layouts_that_do_not_look_at_documents_take_them_later() -> None:
    cp = ContextParallel(layout="zigzag")
    x = cp.shard(torch.randn(1, 8, 2, 4), 1)
    assert cp.attention(x, x, x, cu_seqlens=torch.tensor([0, 5, 8])).shape == x.shape


def test_auto_may_let_heads_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    settle = lambda q, k, v, recipe, *rest: asked.append(recipe.transport) or recipe  # noqa: E731
    monkeypatch.setattr("nnscaler_ring.core.call._with_transport", settle)
    x = torch.randn(1, 8, 2, 4)
    ContextParallel().attention(x, x, x)
    assert asked == ["auto"]


def test_rows_do_not_move_over_a_grid() -> None:
    with pytest.raises(ValueError, match="over a grid"):
        relayout([torch.zeros(1, 2, 3)], None, 8, "contiguous", "zigzag", "pretend:2x2:0")


def test_shapes_of_moved_rows_are_the_ranks_own() -> None:
    with FakeTensorMode():
        (moved,) = torch.ops.nnscaler_ring.relayout([torch.empty(1, 2, 3)], None, 5, "contiguous", "contiguous", "pretend:2:1", 1)
    assert moved.shape == (1, 2, 3)
