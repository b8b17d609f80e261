"""torch's DTensor as the engine that cuts: placements say what is cut, the mesh says which ranks form the ring.

The op runs on the local tensors; this module turns placements into its group and back into the placements of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .spec import OpSpec


@dataclass(frozen=True)
class Here:
    """What a rank computes of a call on DTensors.

    Attributes:
        qkv, extras: the local tensors.
        rings: the groups that share the sequence, outer first.
        lengths: query and key tokens of the whole sequence.
        first: gives the numbers of the first batch row and query head.
    """

    qkv: Sequence[Tensor]
    extras: Mapping[str, Tensor | None]
    rings: Sequence[dist.ProcessGroup]
    lengths: tuple[int, int]
    first: Callable[[], tuple[int, int]]


Local = Callable[[Here], tuple[Tensor, Tensor]]
"""The op on local tensors -> out, lse."""


@dataclass(frozen=True)
class Cut:
    """How one call is cut: for each mesh axis the name of the dim, or None where it is replicated."""

    mesh: DeviceMesh
    dims: tuple[str | None, ...]

    def placements(self, spec: OpSpec, tensor: str) -> list[Placement]:
        """The placements of an input or a result."""
        return [Replicate() if name is None else Shard(spec.place(tensor, name)) for name in self.dims]

    @property
    def rings(self) -> list[dist.ProcessGroup]:
        """The groups of the axes that cut the sequence, outer first."""
        return [axis_group(self.mesh, axis) for axis, name in enumerate(self.dims) if name == "sequence"]


def axis_group(mesh: DeviceMesh, axis: int) -> dist.ProcessGroup:
    """The group of this rank along a mesh axis.

    Raises:
        ValueError: its ranks are in another order than the mesh lists them.
    """
    if not _ascends(mesh, axis):
        raise ValueError(
            f"mesh axis {axis} lists ranks in an order that is not ascending ({mesh}): its group would hold the chunks of the "
            "sequence in another order; build the mesh with ascending ranks along the axis that cuts the sequence"
        )
    return mesh.get_group(axis)


@torch.compiler.assume_constant_result
def _ascends(mesh: DeviceMesh, axis: int) -> bool:
    """Whether all that lies along an axis ascends, on whatever rank; torch sorts the ranks of a group."""
    return bool((mesh.mesh.diff(dim=axis) > 0).all())


def check_all(spec: OpSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError where only some of q, k and v are DTensors."""
    if not all(isinstance(x, DTensor) for x in (q, k, v)):
        kinds = [type(x).__name__ for x in (q, k, v)]
        raise ValueError(f"{spec.name}: q, k and v must all be DTensors or all plain, got {kinds}")


def resolve(spec: OpSpec, q: DTensor, k: DTensor, v: DTensor) -> Cut:
    """How the DTensors q, k and v are cut, or ValueError that lists what is allowed.

    Raises:
        ValueError: different meshes or one that this rank is not in, placements that the spec does not allow, the sequence cut by
            more axes than it allows or unevenly by two, or heads that do not divide by their ranks.
    """
    if not q.device_mesh == k.device_mesh == v.device_mesh:
        raise ValueError(f"{spec.name}: q, k and v are on different meshes: {q.device_mesh}, {k.device_mesh}, {v.device_mesh}")
    if q.device_mesh.get_coordinate() is None:
        raise ValueError(f"{spec.name}: this process is not in {q.device_mesh}: call on its ranks only")
    single = k.shape[spec.place("k", "heads")] == 1
    axes = zip(q.placements, k.placements, v.placements, strict=True)
    cut = Cut(q.device_mesh, tuple(_name(spec, axis, placements, single) for axis, placements in enumerate(axes)))
    rings = [cut.mesh.size(axis) for axis, name in enumerate(cut.dims) if name == "sequence"]
    if len(rings) > 1 + spec.grid:
        raise ValueError(
            f"{spec.name}: the sequence is cut by {len(rings)} mesh axes; flatten them into {'two' if spec.grid else 'one'} "
            "(DeviceMesh._flatten) first, or take wrap_ulysses_attn_func, which takes two: ring outside, heads inside"
        )
    lengths = [x.shape[spec.place(name, "sequence")] for name, x in (("q", q), ("k", k))]
    if len(rings) == 2 and any(length % (rings[0] * rings[1]) for length in lengths):
        raise ValueError(
            f"{spec.name}: {lengths[0]} query and {lengths[1]} key tokens over two mesh axes of {rings[0]} x {rings[1]} ranks: "
            "lengths must divide by their product; pad the sequence, or cut it by one axis"
        )
    for name, x in (("q", q), ("k", k)):
        heads, parts = x.shape[spec.place(name, "heads")], 1
        shared = [n for n, cuts in enumerate(cut.dims) if cuts == "heads" and not x.placements[n].is_replicate()]
        for axis in shared:
            parts *= cut.mesh.size(axis)
        if heads % parts:
            raise ValueError(
                f"{spec.name}: the {heads} heads of {name} do not divide by the {parts} ranks that share them, mesh axes {shared}"
            )
    return cut


def _name(spec: OpSpec, axis: int, placements: Sequence[Placement], single_key_head: bool) -> str | None:
    """The name of the dim that one mesh axis cuts, the same in q, k and v."""
    if all(isinstance(p, Replicate) for p in placements):
        return None
    for name in spec.cuttable:
        if all(_cuts(p, spec.place(t, name)) for t, p in zip("qkv", placements, strict=True)):
            return name
    heads_q = _cuts(placements[0], spec.place("q", "heads"))
    if heads_q and single_key_head and all(isinstance(p, Replicate) for p in placements[1:]):
        return "heads"
    whole = [name for name, p in zip("qkv", placements, strict=True) if isinstance(p, Replicate)]
    raise ValueError(
        f"{spec.name}: placements q {placements[0]}, k {placements[1]}, v {placements[2]} on mesh axis {axis} are not allowed. "
        f"Allowed on each axis: {spec.describe()}" + f"; redistribute {', '.join(whole)} to be cut alike" * bool(whole)
    )


def _cuts(placement: Placement, dim: int) -> bool:
    """Whether it cuts a dim in chunks in order; a ``_StridedShard``, which does not, equals a ``Shard`` in torch 2.6."""
    return type(placement) is Shard and placement.dim == dim


def run(spec: OpSpec, q: Tensor, k: Tensor, v: Tensor, extras: Mapping[str, Tensor | None], op: Local) -> tuple[DTensor, DTensor]:
    """Run an op on DTensors: out and lse with the placements of q.

    A key head that every rank of a heads axis shares has a gradient that is a sum over that axis, and so have the extras over the
    axes that do not cut them; plain tensors among these are taken to be the same on every rank.
    """
    assert isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)
    cut = resolve(spec, q, k, v)
    for name, x in extras.items():
        if isinstance(x, DTensor) and x.device_mesh != cut.mesh:
            raise ValueError(f"{spec.name}: {name} is on {x.device_mesh}, q, k and v on {cut.mesh}: give one mesh")
    rings, locals_ = cut.rings, []  # the rings before an extra travels: their mesh may be refused
    for name, x in zip("qkv", (q, k, v), strict=True):
        cut_here = zip(cut.placements(spec, name), x.placements, strict=True)
        grads = [Partial() if wanted.is_shard() and not have.is_shard() else have for wanted, have in cut_here]
        locals_.append(x.to_local(grad_placements=grads))
    total = q.shape[spec.place("q", "sequence")], k.shape[spec.place("k", "sequence")]

    def first() -> tuple[int, int]:
        if not {"batch", "heads"} & set(cut.dims):
            return 0, 0
        _, offsets = compute_local_shape_and_global_offset(q.shape, q.device_mesh, q.placements)
        row, head = (offsets[dim] if (dim := spec.dim("q", name)) is not None else 0 for name in ("batch", "heads"))
        return row, head

    mine = {name: None if x is None else _extra(spec, cut, name, x, q) for name, x in extras.items()}
    out, lse = op(Here(locals_, mine, rings, total, first))
    shape = torch.Size((*q.shape[:-1], v.shape[-1]))
    return _wrap(out, cut, spec, "out", shape), _wrap(lse, cut, spec, "lse", torch.Size(spec.lse_shape(q.shape)))


def _extra(spec: OpSpec, cut: Cut, name: str, x: Tensor, q: Tensor) -> Tensor:
    """The local part of a tensor besides q, k and v: it is given for the whole q, and is cut on the dims that it shares with q."""
    dims, size = spec.inputs[name][-x.dim() :], len(cut.dims)
    whole = x if isinstance(x, DTensor) else DTensor.from_local(x, cut.mesh, [Replicate()] * size, run_check=False)
    places: list[Placement] = []
    grads: list[Placement] = []
    for axis in cut.dims:
        dim = dims.index(axis) if axis in dims else None
        stands_for_all = dim is not None and x.shape[dim] == 1 != q.shape[spec.place("q", dims[dim])]
        here = Replicate() if dim is None or stands_for_all else Shard(dim)
        places.append(here)
        grads.append(Partial() if axis is not None and here.is_replicate() else here)
    return whole.redistribute(cut.mesh, places).to_local(grad_placements=grads)


def _wrap(x: Tensor, cut: Cut, spec: OpSpec, name: str, shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, cut.mesh, cut.placements(spec, name), run_check=False, shape=shape, stride=stride)


def local(tensor: Tensor | None) -> Tensor | None:
    """A table that every rank has whole: the local tensor of a replicated DTensor, or the tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(isinstance(p, Replicate) for p in tensor.placements):
        raise ValueError(f"cu_seqlens has placements {tensor.placements}: every rank needs it whole, redistribute to Replicate()")
    return tensor.to_local()
