"""The `wrap_*` ops on DTensors: every placement that a spec allows, forward and backward, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import nnscaler_ring
from nnscaler_ring import ContextParallel
from tests.test_ops import DOCUMENTS, LSE, OPS, RING, SLIDING, ULYSSES, Use, probs, use
from tests.worlds import Seen, Shape, Whole, held, naming, no_faults, place, refusal, told, whole

VARLEN, ZIGZAG, STRIPE = "wrap_ring_attn_varlen_func", "wrap_zigzag_attn_func", "wrap_stripe_attn_func"


def placements(cut: str, packed: bool, one_head: bool = False) -> list[Placement]:
    """One letter a mesh axis: B batch, S sequence, H heads (kept whole with `one_head`), R replicated."""
    dims = {"S": 0, "H": 1} if packed else {"B": 0, "S": 1, "H": 2}
    return [Replicate() if letter == "R" or (letter == "H" and one_head) else Shard(dims[letter]) for letter in cut]


def check_dtensors(each: Use, mesh: DeviceMesh, cut: str, layout: str | None = None) -> list[str]:
    """Run a use on DTensors and compare whole results and whole gradients; `layout` is that of the data passed."""
    truth, packed = whole(each.shape, each.seen, each.scale), each.shape.packed
    order = None
    if layout is not None:
        ring = mesh.size(cut.index("S"))
        order = torch.cat([held(layout, each.shape.seq, ring, rank) for rank in range(ring)])
    spread = lambda x, n: spread_out(x if order is None else x.index_select(x.dim() - 3, order.to(x.device)), mesh, n)  # noqa: E731
    rest = placements(cut, packed, each.shape.heads_k == 1)
    q, k, v = spread(truth.q, placements(cut, packed)), spread(truth.k, rest), spread(truth.v, rest)
    with naming((each, cut, layout)):
        answer = each(q, k, v, **({} if layout is None else {"layout": layout}))
        out, lse, last = answer if isinstance(answer, tuple) else (answer, None, None)
        out.backward(spread(truth.grad, placements(cut, packed)).detach())
        got = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
        faults = [] if isinstance(answer, tuple) == probs(each) and last is None else [f"returned {type(answer)}"]
        if list(out.placements) != placements(cut, packed):
            faults.append(f"out has placements {out.placements}")
        if lse is not None:
            got["lse"] = lse
        whole_results = {name: x.full_tensor() for name, x in got.items()}
    faults += truth.wrong(whole_results, dict.fromkeys(got, order))
    return told((each, cut, layout), faults)


def spread_out(x: Tensor, mesh: DeviceMesh, where: Sequence[Placement]) -> DTensor:
    return distribute_tensor(x, mesh, where).detach().requires_grad_()


# -- what is allowed -------------------------------------------------------------------------------------------------------------

ONE_AXIS, TWO_AXES = ["S", "B", "H", "R"], ["SB", "BS", "SH", "HS", "SR", "RS", "BH", "HB", "RR"]


def along_one_axis(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("cp",))
    faults = []
    for name, uses in OPS.items():
        for each in uses:
            faults += check_dtensors(each, mesh, "S")
        for cut in ONE_AXIS[1:]:
            for each in uses[:2]:
                if fits(each, mesh, cut):
                    faults += check_dtensors(each, mesh, cut)
        packed = name == VARLEN
        for seq in (6 * world_size - 1, 6 * world_size + 1, world_size - 1):
            documents = {"cu_seqlens_q": (0, 1, seq), "cu_seqlens_k": (0, 1, seq)} if packed else {}
            window = {"window_size": 4} if "streaming" in name or name == SLIDING else {}
            faults += check_dtensors(use(name, Shape(seq=seq, packed=packed), **window, **documents, **LSE), mesh, "S")
    for name in (ZIGZAG, STRIPE):  # data that is in the op's own order already
        for each in (use(name), use(name, Shape(heads_k=1, dim_v=16), window_size=(5, 0), **LSE)):
            faults += check_dtensors(each, mesh, "S", layout=name.split("_")[1])
    return faults


def fits(each: Use, mesh: DeviceMesh, cut: str) -> bool:
    """Packed rows have no batch; heads must divide by their axis, or k has one."""
    heads = mesh.size(cut.index("H")) if "H" in cut else 1
    divide = each.shape.heads % heads == 0 and each.shape.heads_k in (1, *range(heads, 99, heads))
    return divide and not (each.shape.packed and "B" in cut)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_one_axis(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(along_one_axis))


def along_two_axes(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("a", "b"))
    faults = []
    for name, uses in OPS.items():
        for cut in TWO_AXES:
            for each in uses[:3]:
                if fits(each, mesh, cut):
                    faults += check_dtensors(each, mesh, cut)
        if name in (ZIGZAG, STRIPE):
            for cut in ("SB", "HS"):
                faults += check_dtensors(use(name), mesh, cut, layout=name.split("_")[1])
    uneven = use(ZIGZAG, Shape(batch=3, seq=23))
    faults += check_dtensors(uneven, mesh, "BS") + check_dtensors(uneven, mesh, "SB")
    for each in OPS[ULYSSES]:  # ring outside, heads inside
        faults += check_dtensors(each, mesh, "SS")
        faults += check_dtensors(replace(each, call={**each.call, "transport": "all_gather"}), mesh, "SS")
    narrow = init_device_mesh(device.type, (2, 1, 2), mesh_dim_names=("x", "y", "z"))
    for cut in ("BHS", "SRH", "HSB", "BSH"):  # a ring of one rank among them
        faults += check_dtensors(use(ZIGZAG), narrow, cut)
    for cut in ("SSB", "BSS", "HSS", "SSR"):  # teams of one rank, or one team
        for transport in ("auto", "ring"):
            faults += check_dtensors(use(ULYSSES, transport=transport), narrow, cut)
    return faults


def test_two_axes(ranks) -> None:
    no_faults(ranks(4).run(along_two_axes))


def parts_of_the_world(rank: int, world_size: int) -> list[str]:
    """A mesh of two ranks that are not the first, and the axes of a larger mesh, each with its own data parallel copy."""
    device, _ = place()
    middle = DeviceMesh(device.type, [1, 2], mesh_dim_names=("cp",))
    faults = []
    for uses in OPS.values():
        if rank in (1, 2):
            faults += check_dtensors(uses[0], middle, "S")
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "cp"))
    for axis in ("dp", "cp"):
        for name, uses in OPS.items():
            own = uses[(rank // 2 if axis == "cp" else rank % 2) % len(uses)]  # another problem in each of the two
            faults += check_dtensors(own, mesh[axis], "S")
            if name in (ZIGZAG, STRIPE):
                faults += check_dtensors(use(name), mesh[axis], "S", layout=name.split("_")[1])
    return faults


def test_parts_of_the_world(ranks) -> None:
    no_faults(ranks(4).run(parts_of_the_world))


def ranks_out_of_order(rank: int, world_size: int) -> list[str]:
    """A mesh whose ranks do not ascend along a ring: torch itself gives out chunks in one order and gathers them in another."""
    device, _ = place()
    truth, faults = whole(Shape(), Seen()), []
    for order, placed in (([0, 2, 1, 3], [SEQ]), ([3, 1, 2, 0], [SEQ]), ([[3, 1], [2, 0]], [R, SEQ]), ([[3, 1], [2, 0]], [SEQ, R])):
        mesh = DeviceMesh(device.type, order)
        shards = [distribute_tensor(x, mesh, placed) for x in (truth.q, truth.k, truth.v)]
        sink = DTensor.from_local(torch.ones(4, device=device), mesh, [Partial()] * mesh.ndim)  # which would travel first
        for name, more in ((RING, {}), (ZIGZAG, {"learnable_sink": sink})):
            call = lambda name=name, more=more, shards=shards: getattr(nnscaler_ring, name)(*shards, **more)  # noqa: E731
            faults += told((order, placed, name), refusal(call, ValueError, ["ascending"]))
    crossed = DeviceMesh(device.type, [[0, 2], [1, 3]], mesh_dim_names=("a", "b"))
    for cut in ("RS", "SB", "HS"):
        faults += check_dtensors(use(ZIGZAG), crossed, cut)
    return faults


def test_ranks_out_of_order(ranks) -> None:
    no_faults(ranks(4).run(ranks_out_of_order))


def outside_of_the_mesh(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    mesh, truth = DeviceMesh(device.type, [1, 2]), whole(Shape(), Seen())
    faults = check_dtensors(use(ZIGZAG), mesh, "S") if rank in (1, 2) else []
    for where in (SEQ, R) if rank in (0, 3) else ():
        shards = [distribute_tensor(x, mesh, [where]) for x in (truth.q, truth.k, truth.v)]
        call = lambda shards=shards: nnscaler_ring.wrap_zigzag_attn_func(*shards)  # noqa: E731
        faults += told(where, refusal(call, ValueError, ["not in", "call on its ranks only"]))
    return faults


def test_ranks_outside_of_the_mesh_are_told(ranks) -> None:
    no_faults(ranks(4).run(outside_of_the_mesh))


def shorter_queries(rank: int, world_size: int) -> list[str]:
    """Numbers of query and key tokens that differ, and are the same on some ranks: both come from the whole tensors."""
    device, _ = place()
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("cp",))
    faults = []
    for seq, seq_k in ((24, 36), (5, 6), (23, 37), (23, 24)):
        tables = {"cu_seqlens_q": (0, 2, seq), "cu_seqlens_k": (0, 3, seq_k)}
        faults += check_dtensors(use(VARLEN, Shape(seq=seq, seq_k=seq_k, packed=True), causal=True, **tables), mesh, "S")
        for name in (RING, ZIGZAG, STRIPE):
            faults += check_dtensors(use(name, Shape(seq=seq, seq_k=seq_k), **LSE), mesh, "S")
    return faults


@pytest.mark.parametrize("world_size", [2, 3])
def test_shorter_queries(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(shorter_queries, timeout=40))


def through_full_tensor(rank: int, world_size: int) -> list[str]:
    """A loss on the whole tensor, tables that are DTensors themselves, and a parameter that replicates."""
    device, _ = place()
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("cp",))
    tables = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), DOCUMENTS)
    each = use(VARLEN, Shape(packed=True), causal=True, **tables)
    truth = whole(each.shape, each.seen)
    q, k, v = (spread_out(x, mesh, [Shard(0)]) for x in (truth.q, truth.k, truth.v))
    cu = distribute_tensor(torch.tensor(DOCUMENTS, dtype=torch.int32, device=device), mesh, [Replicate()])
    out = nnscaler_ring.wrap_ring_attn_varlen_func(q, k, v, cu, cu, causal=True)
    (out.full_tensor() * truth.grad).sum().backward()
    got = {"out": out.full_tensor(), "dq": q.grad.full_tensor(), "dk": k.grad.full_tensor(), "dv": v.grad.full_tensor()}
    return told("full_tensor", truth.wrong(got, {}))


def test_loss_on_the_whole_tensor(ranks) -> None:
    no_faults(ranks(2).run(through_full_tensor))


# -- what is refused -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Placements of q, k and v on a mesh, what else is passed, and words of the error."""

    mesh: tuple[int, ...] = (4,)
    q: Sequence[Placement]
    k: Sequence[Placement] | None = None
    v: Sequence[Placement] | None = None
    shape: Shape = Shape()  # noqa: RUF009
    name: str = RING
    words: Sequence[str] = ("Allowed on each axis: batch", "q on dim 0", "sequence", "heads", "replicated")
    call: Any = None

    def __call__(self, truth: Whole, mesh: DeviceMesh) -> Callable[[], Any]:
        where = [self.q, self.k or self.q, self.v or self.k or self.q]
        tensors = [distributed(x, mesh, each) for x, each in zip((truth.q, truth.k, truth.v), where, strict=True)]
        return lambda: getattr(nnscaler_ring, self.name)(*tensors, **(self.call or {}))


def distributed(x: Tensor, mesh: DeviceMesh, where: Sequence[Placement]) -> DTensor:
    """`x` with these placements, Partial among them, which `distribute_tensor` does not make."""
    if any(isinstance(each, Partial) for each in where):
        return DTensor.from_local(x, mesh, where, run_check=False)
    return distribute_tensor(x, mesh, where)


BATCH, SEQ, HEADS, DIM, R = Shard(0), Shard(1), Shard(2), Shard(3), Replicate()
ALL_HEADS = Shape(heads=4, heads_k=4)
PACKED, ALL_PACKED = Shape(packed=True), Shape(heads=4, heads_k=4, packed=True)


def biased(*shape: int) -> dict[str, Tensor]:
    return {**dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(DOCUMENTS)), "bias": torch.ones(shape)}


REFUSED = [
    Refused(q=[R], k=[SEQ]),
    Refused(q=[SEQ], k=[R], words=["Allowed on each axis", "redistribute k, v to be cut alike"]),
    Refused(q=[SEQ], k=[SEQ], v=[R]),
    Refused(q=[SEQ], k=[HEADS], shape=ALL_HEADS),
    Refused(q=[BATCH], k=[SEQ]),
    Refused(q=[DIM]),
    Refused(q=[R], k=[DIM]),
    Refused(q=[Partial()]),
    Refused(q=[SEQ], k=[Partial()]),
    Refused(q=[HEADS], k=[R], shape=ALL_HEADS),
    Refused(q=[SEQ], k=[R], shape=Shape(heads_k=1)),
    Refused(q=[R], k=[SEQ], name="wrap_zigzag_attn_func"),
    Refused(q=[R], k=[SEQ], name="wrap_streaming_llm_attn_func", call={"window_size": 3}),
    Refused(q=[SEQ, DIM], mesh=(2, 2)),
    Refused(q=[SEQ, SEQ], mesh=(2, 2), words=["2 mesh axes", "_flatten", "wrap_ulysses_attn_func"]),
    Refused(q=[SEQ, SEQ], mesh=(2, 2), name=ULYSSES, shape=Shape(seq=22), words=["22 query", "2 x 2", "pad"]),
    Refused(q=[SEQ], name=ULYSSES, call={"transport": "ring"}, words=["'ring'", "two mesh axes"]),
    Refused(q=[SEQ, SEQ], mesh=(2, 2), name=ULYSSES, call={"transport": "all_to_all"}, words=["all_to_all", "grid"]),
    Refused(q=[HEADS], shape=Shape(heads=6, heads_k=6), words=["6 heads of q", "4 ranks", "axes [0]"]),
    Refused(q=[HEADS], k=[HEADS], shape=Shape(heads=8, heads_k=2), words=["2 heads of k", "4 ranks", "axes [0]"]),
    Refused(q=[HEADS, HEADS], mesh=(2, 2), shape=Shape(heads=24, heads_k=6), words=["6 heads of k", "4 ranks", "axes [0, 1]"]),
    Refused(q=[HEADS, HEADS], mesh=(2, 2), shape=Shape(heads=6, heads_k=2), words=["6 heads of q", "4 ranks"]),
    Refused(q=[HEADS], shape=Shape(heads=4, heads_k=1), words=["1 heads of k", "4 ranks"]),
    Refused(q=[HEADS], shape=ALL_HEADS, call={"learnable_sink": torch.ones(1)}, words=["learnable_sink", "(1,)", "(4,)"]),
    Refused(q=[HEADS], shape=ALL_HEADS, call={"alibi_slopes": torch.ones(7)}, words=["alibi_slopes", "(7,)", "(4,)"]),
    Refused(q=[SEQ], call={"alibi_slopes": torch.tensor(1.0)}, words=["alibi_slopes", "()"]),
    Refused(q=[SEQ], call={"learnable_sink": [1.0]}, words=["learnable_sink", "list"]),
    Refused(q=[Shard(0)], name=VARLEN, shape=PACKED, call=biased(4, 23, 24), words=["(4, 23, 24)", "(4, 24, 24)"]),
    Refused(q=[Shard(1)], name=VARLEN, shape=ALL_PACKED, call=biased(2, 24, 24), words=["bias", "(2, 24, 24)"]),
    Refused(q=[SEQ], call={"process_group": [0, 1, 2, 3]}, words=["process_group", "mesh"]),
    Refused(q=[SEQ], call={"seq_len": 23}, words=["seq_len"]),
    Refused(q=[SEQ], call={"layout": "zigzag"}, words=["'zigzag'", "'contiguous'"]),
    Refused(q=[SEQ], call={"cu_seqlens": torch.tensor([0, 9, 8, 24])}, words=["cu_seqlens", "decrease"]),
    Refused(q=[SEQ], name="wrap_zigzag_attn_func", call={"cu_seqlens": torch.tensor([0, 23])}, words=["cu_seqlens", "24"]),
    Refused(q=[SEQ], name="wrap_zigzag_attn_func", call={"causal": False}, words=["causal=False"]),
    Refused(q=[SEQ], call={"window_size": (-2, 0)}, words=["window_size"]),
]


def refused(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    flat = init_device_mesh(device.type, (4,), mesh_dim_names=("cp",))
    meshes = {(4,): flat, (2, 2): init_device_mesh(device.type, (2, 2), mesh_dim_names=("a", "b"))}
    faults = []
    for each in REFUSED:
        call = each(whole(each.shape, Seen()), meshes[each.mesh])
        faults += told(each, refusal(call, ValueError, each.words))
    truth = whole(Shape(), Seen())
    q, k, v = (distribute_tensor(x, flat, [SEQ]) for x in (truth.q, truth.k, truth.v))
    plain = q.to_local()
    for mixed in ((q, plain, plain), (plain, k, v), (q, k, v.to_local())):
        faults += told("mixed", refusal(lambda mixed=mixed: nnscaler_ring.wrap_ring_attn_func(*mixed), ValueError, ["DTensor"]))
    other = [distribute_tensor(x, meshes[2, 2], [SEQ, R]) for x in (truth.k, truth.v)]
    faults += told("meshes", refusal(lambda: nnscaler_ring.wrap_ring_attn_func(q, *other), ValueError, ["different meshes"]))
    table = distribute_tensor(torch.tensor([0, 4, 8, 24]), flat, [Shard(0)])
    elsewhere = distribute_tensor(torch.ones(4, dtype=truth.q.dtype), meshes[2, 2], [R, R])
    one_mesh = refusal(lambda: nnscaler_ring.wrap_ring_attn_func(q, k, v, learnable_sink=elsewhere), ValueError, ["one mesh"])
    faults += told("a sink on another mesh", one_mesh)
    shards, tables = [x.to_local() for x in (q, k, v)], distribute_tensor(torch.tensor([0, 4, 24]), flat, [R])
    for among in ({"learnable_sink": elsewhere}, {"alibi_slopes": elsewhere}, {"cu_seqlens": tables}):
        call = lambda among=among: nnscaler_ring.wrap_ring_attn_func(*shards, process_group=dist.group.WORLD, **among)  # noqa: E731
        faults += told(("a DTensor among plain tensors", *among), refusal(call, ValueError, ["DTensors", "to_local"]))
    faults += told("shard", refusal(lambda: ContextParallel(flat).shard(q, 1), ValueError, ["DTensors"]))
    cut_table = refusal(lambda: nnscaler_ring.wrap_ring_attn_func(q, k, v, cu_seqlens=table), ValueError, ["Replicate"])
    dist.barrier()  # everybody is still in step
    return faults + told("a table that is cut", cut_table) + check_dtensors(use(ZIGZAG), flat, "S")


def test_refused_on_every_rank_before_any_communication(ranks) -> None:
    no_faults(ranks(4).run(refused))


def refused_beside_dtensors(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    q = distribute_tensor(torch.randn(8, 2, 4), mesh, [Shard(0)])
    cu = torch.tensor([0, 8], dtype=torch.int32)
    for named, words in (
        ({"seq_len_k": 8}, "leave out process_group, seq_len, seq_len_k"),
        ({"dropout_p": 0.5}, "needs dropout_seed"),
    ):
        with pytest.raises(ValueError, match=words):
            nnscaler_ring.wrap_ring_attn_varlen_func(q, q, q, cu, cu, **named)


def test_what_dtensors_say_by_themselves_is_refused(ranks) -> None:
    ranks(2).run(refused_beside_dtensors)
