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
    """A mesh whose ranks do not ascend: torch gives the chunks out in the order of the group, and so does the ring."""
    device, _ = place()
    meshes = [DeviceMesh(device.type, order, mesh_dim_names=("cp",)) for order in ([0, 2, 1], [2, 1])]
    faults = []
    for mesh in meshes[: 2 if rank else 1]:
        faults += check_dtensors(use(RING), mesh, "S") + check_dtensors(use(ZIGZAG), mesh, "S")
    return faults


def test_ranks_out_of_order(ranks) -> None:
    no_faults(ranks(3).run(ranks_out_of_order))


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
REFUSED = [
    Refused(q=[R], k=[SEQ]),
    Refused(q=[SEQ], k=[R]),
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
    Refused(q=[HEADS], shape=Shape(heads=6, heads_k=6), words=["6 query and 6 key heads", "mesh axis 0 of 4"]),
    Refused(q=[HEADS], k=[HEADS], shape=Shape(heads=8, heads_k=2), words=["8 query and 2 key heads", "mesh axis 0 of 4"]),
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
    cut_table = refusal(lambda: nnscaler_ring.wrap_ring_attn_func(q, k, v, cu_seqlens=table), ValueError, ["Replicate"])
    dist.barrier()  # everybody is still in step
    return faults + told("a table that is cut", cut_table) + check_dtensors(use(ZIGZAG), flat, "S")


def test_refused_on_every_rank_before_any_communication(ranks) -> None:
    no_faults(ranks(4).run(refused))
