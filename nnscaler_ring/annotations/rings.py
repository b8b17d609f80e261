"""Which ranks form the ring of each piece of an op, read from nnscaler's partitioned and assigned graph.

nnscaler emits the code of one piece at a time, and a piece does not know its siblings. So the rings are derived from all
pieces at once, before any code is written: pieces that differ only in their range of the sequence belong together.

    sequence x heads on 4 devices            sequence x 2 replicas

    heads    0:2     2:4                     replica   0       1
    tokens 0:4  [0]     [1]   rings (0, 2)   tokens 0:4  [0]     [1]   rings (0, 2)
    tokens 4:8  [2]     [3]         (1, 3)   tokens 4:8  [2]     [3]         (1, 3)

Two layers: `derive_rings` and `check_collectives` work on plain data and need no nnscaler; `install` reads that data from a
real graph where nnscaler collects its process groups, so that every rank creates every ring in one and the same order.

What is refused, because nnscaler (0.8 and 0.9) would run it and compute something else:

- devices that do not ascend along a ring. nnscaler's collectives order chunks by rank, whatever the assignment says.
- pieces that are replicated unevenly, do not tile the sequence or differ in length.
- rows that are put in the order of a ring by an op that is cut in other parts than the attention that reads them.
- collectives planned over chunks in another order than their ranks'. nnscaler plans such a one when two cuts are nested
  and the inner one splits an input which lacks the outer one's dimension. Keys and values of one head (MQA) under heads
  outer, sequence inner: the gradients of the head groups are to be summed, nnscaler scatters the sum over devices 0 and
  2, 1 and 3, and then gathers it over 0, 1, 2, 3 as if these held consecutive chunks. The index maps of the op's own
  pieces do not tell, since other producers of the input lead to other collectives; the planned collectives do.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IndexMap = tuple[tuple[int, int], ...]
Ring = tuple[int, ...]
Rings = dict[tuple[int, int], Ring]

_RING = "_nnscaler_ring"


@dataclass(frozen=True)
class Piece:
    """One piece of an op on one device. Replicas of a piece share its `cid`."""

    cid: int
    device: int
    """Local to the plan: 0 to plan_ngpus - 1."""
    tensor: int
    """Id of the whole output tensor, the same for all pieces of one call of the op."""
    index_map: IndexMap
    """(start, stop) in every dim of that tensor."""
    sequence_dim: int
    length: int
    """Of the whole sequence."""

    @property
    def tokens(self) -> tuple[int, int]:
        return self.index_map[self.sequence_dim]

    @property
    def family(self) -> tuple[int, IndexMap]:
        """Equal for the pieces that attend to each other."""
        dim = self.sequence_dim
        return self.tensor, self.index_map[:dim] + self.index_map[dim + 1 :]


@dataclass(frozen=True)
class Collective:
    """One side (what goes in, or what comes out) of a collective that nnscaler planned."""

    name: str
    tensor: str
    parts: tuple[tuple[int, IndexMap], ...]
    """(device, index map) of every rank's part."""


def derive_rings(pieces: Iterable[Piece]) -> Rings:
    """The ring of every piece, by its (cid, device): devices in the order of the sequence, its own among them.

    A piece with the whole sequence is a ring of itself.

    Raises:
        ValueError: the plan is one that would compute something else; says which and what to do instead.
    """
    families: dict[tuple[int, IndexMap], list[Piece]] = defaultdict(list)
    for piece in pieces:
        families[piece.family].append(piece)
    rings: Rings = {}
    for family in families.values():
        chunks: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece in sorted(family, key=lambda piece: (piece.tokens, piece.device)):
            chunks[piece.tokens].append(piece)
        _check_chunks(chunks, family[0].length)
        # Replicas hold the same data, so any matching of them is right; by device, rings ascend wherever they can.
        for members in zip(*chunks.values(), strict=True):
            ring = tuple(piece.device for piece in members)
            _check_ascending(ring, list(chunks))
            rings.update({(piece.cid, piece.device): ring for piece in members})
    return rings


def _check_chunks(chunks: Mapping[tuple[int, int], Sequence[Piece]], length: int) -> None:
    ranges = list(chunks)
    edges = [0, *(stop for _, stop in ranges)]
    if [start for start, _ in ranges] != edges[:-1] or edges[-1] != length:
        raise ValueError(
            f"the pieces hold the token ranges {ranges} of {length}, which do not tile the sequence; cut the op's sequence "
            "dim with graph.partition, and assign every piece that it returns to a device"
        )
    if len({stop - start for start, stop in ranges}) > 1:
        raise ValueError(
            f"the pieces hold the token ranges {ranges}, which differ in length; cut the sequence in equal parts: all "
            "pieces of the op by the same number"
        )
    replicas = {tokens: [piece.device for piece in each] for tokens, each in chunks.items()}
    if len({len(devices) for devices in replicas.values()}) > 1:
        raise ValueError(
            f"the token ranges are on the devices {replicas}, some on more than others; replicate every piece equally often"
        )


def _check_ascending(ring: Ring, ranges: list[tuple[int, int]]) -> None:
    if all(a < b for a, b in itertools.pairwise(ring)):
        return
    if len(set(ring)) < len(ring):
        raise ValueError(
            f"the token ranges {ranges} are on the devices {ring}, two of them on one; cut the sequence in as many parts as "
            "there are devices for it"
        )
    raise ValueError(
        f"the token ranges {ranges} are on the devices {ring}, which do not ascend. nnscaler orders chunks by device in its "
        f"own collectives, so this plan would permute the sequence; assign them to {tuple(sorted(ring))}"
    )


def check_collectives(collectives: Iterable[Collective]) -> None:
    """Refuse collectives whose chunks do not lie in the order of their ranks, which is the order they get when it runs.

    Raises:
        ValueError: names the tensor and the way out.
    """
    for collective in collectives:
        parts = sorted(collective.parts)
        for ranges in zip(*(index_map for _, index_map in parts), strict=True):
            if list(ranges) != sorted(ranges):
                devices = tuple(device for device, _ in sorted(parts, key=lambda part: part[1]))
                raise ValueError(
                    f"nnscaler planned {collective.name} of tensor {collective.tensor} with consecutive chunks on the devices "
                    f"{devices}, but runs it in ascending order, which permutes them. Assign pieces to ascending devices; "
                    "where two cuts are nested, the inner one must be of the dimension that this tensor lacks: sequence outer and "
                    "heads inner for keys and values of one head, heads outer and sequence inner for a weight of heads. Where "
                    "tensors of both kinds are read by several ops or computed, no order is right: cut one dimension only"
                )


def check_order(rings: Mapping[str, Iterable[Ring]]) -> None:
    """Refuse ops that put rows in the order of a ring, or read them in it, where their rings are not of one size.

    Args:
        rings: signature of such an op -> the rings of all its pieces.

    Raises:
        ValueError: says which op is cut in how many parts.
    """
    parts = {signature: sorted({len(ring) for ring in each}) for signature, each in rings.items()}
    if len({num for each in parts.values() for num in each}) > 1:
        raise ValueError(
            f"the rows are put in the order of a ring, and read in it, by ops that are cut in other numbers of parts: {parts}; cut "
            "the sequence of all of them alike"
        )


def scaled_groups(rings: Iterable[Ring], plan_ndevs: int, runtime_ndevs: int) -> list[Ring]:
    """The ranks of every ring of two or more in every scale unit, each once, in an order that all ranks agree on."""
    units = range(0, runtime_ndevs, plan_ndevs)
    return sorted({tuple(unit + device for device in ring) for ring in rings for unit in units if len(ring) > 1})


# ------------------------------------------------------------------------- reading nnscaler's graph


def read_pieces(graph: Any, sequence_dims: Mapping[str, int]) -> list[Piece]:
    """The pieces of every op named in `sequence_dims` (signature -> sequence dim of its first output)."""
    pieces = []
    for node in _nodes(graph, sequence_dims):
        if len(node.device) != 1:
            raise ValueError(f"{node} is on the devices {tuple(node.device)}; let the policy assign every piece to one")
        output = node.output(0)
        dim = sequence_dims[node.signature] % len(output.indmap)
        index_map = tuple((int(start), int(stop)) for start, stop in output.indmap)
        pieces.append(Piece(node.cid, node.device[0], output.parent.tid, index_map, dim, output.parent.shape[dim]))
    return pieces


def read_collectives(graph: Any) -> list[Collective]:
    """Both sides of every collective in the graph, forward and backward."""
    from nnscaler.ir.adapter import IRAdapter
    from nnscaler.ir.tensor import IRSubTensor

    collectives = []
    for adapter in graph.select(ntype=IRAdapter):
        for prim in adapter.prims:
            if "ranks" not in prim.kwargs:
                continue  # local, or addressed rank by rank: no order to get wrong
            for side in (prim.inputs(), prim.outputs()):
                if len(side) > 1 and all(isinstance(tensor, IRSubTensor) for tensor in side):
                    parts = tuple((tensor.device[0], tuple(tensor.indmap)) for tensor in side)
                    collectives.append(Collective(type(prim).__name__, side[0].parent.name, parts))
    return collectives


def _nodes(graph: Any, sequence_dims: Mapping[str, int]) -> list[Any]:
    from nnscaler.ir.operator import IRFwOperation

    return [node for node in graph.select(ntype=IRFwOperation) if node.signature in sequence_dims]


def install(sequence_dims: Mapping[str, int], ordered: Collection[str] = ()) -> Callable[[], None]:
    """Derive rings whenever nnscaler generates code, and have each rank create their groups when the module is built.

    Args:
        sequence_dims: signature of a registered op -> sequence dim of its first output. Read anew each time, so that ops
            may be added later.
        ordered: signatures of those for `check_order`.

    Returns:
        a function that takes the hook out again.
    """
    from nnscaler.codegen.module.module import ModuleCodeGen

    original = ModuleCodeGen.get_comm_groups

    @functools.wraps(original)
    def get_comm_groups(self: Any) -> list[Any]:
        groups, graph = list(original(self)), self.execplan.graph
        if pieces := read_pieces(graph, sequence_dims):
            rings = derive_rings(pieces)
            check_collectives(read_collectives(graph))
            sorting: dict[str, list[Ring]] = defaultdict(list)
            for node in _nodes(graph, sequence_dims):
                setattr(node, _RING, ring := rings[node.cid, node.device[0]])
                if node.signature in ordered:
                    sorting[node.signature].append(ring)
            check_order(sorting)
            known = {tuple(group) for group in groups}
            groups += [
                group for group in scaled_groups(rings.values(), len(self.devices), self.runtime_ndevs) if group not in known
            ]
        return groups

    ModuleCodeGen.get_comm_groups = get_comm_groups

    def remove() -> None:
        ModuleCodeGen.get_comm_groups = original

    return remove


def ring_ranks(node: Any, runtime_devid: int, plan_ndevs: int) -> Ring:
    """For emit_fn: the ranks of the node's ring in the scale unit of `runtime_devid`, in the order of the sequence."""
    ring = vars(node).get(_RING)
    if ring is None:
        raise ValueError(f"no ring is known for {node}: rings.install was not called with {node.signature!r} before")
    unit = runtime_devid // plan_ndevs * plan_ndevs
    return tuple(unit + device for device in ring)
