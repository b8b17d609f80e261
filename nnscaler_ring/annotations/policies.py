"""Policies for nnscaler: the whole model is cut where the attention is, by following its dims through every other op.

A policy starts at the registered ops, which know what their sequence, heads and batch are, and follows each of these dims along the
annotations of all other ops, in both directions, until nothing changes. What it does not reach is replicated::

    embed [b l^d] -> norm -> wq -> view -> attention -> view -> wo -> + -> mlp -> logits -> loss
             l        l      l     l h     l h          l h    l     l     l       l        sum

So no activation of a sequence-cut model is ever gathered or exchanged but inside the op. Cut heads end where a matrix product sums
over them (tensor parallelism), cut batches run through.

Nothing here needs nnscaler until a policy runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .spec import SPECS

Policy = Callable[[Any, Any], Any]
"""``(graph, compute config) -> graph``, as ``nnscaler.parallelize`` takes it."""

_ENTRIES: Mapping[str, str] = {
    "nnscaler_ring.ops.dense_attention": "wrap_ring_attn_func",
    "nnscaler_ring.ops.packed_attention": "wrap_ring_attn_varlen_func",
    "nnscaler_ring.plugin.zigzag_attention": "wrap_ring_attn_varlen_func",
}
"""nnscaler's name of an attention op -> a spec with its dims."""

_ORDER = ("batch", "sequence", "heads")
"""Outer cuts first. Heads innermost: nnscaler permutes gradients of a single key head under the other order."""


def pas_sequence(graph: Any, config: Any) -> Any:
    """Cut the sequence of the whole model over all `plan_ngpus` devices; give it to ``nnscaler.parallelize`` as the policy.

    ``config.pas_config["recompute_modules"]`` may name module classes, separated by commas, whose activations are recomputed in the
    backward pass.

    Raises:
        ValueError: the model calls no attention op of this package, or the sequence does not divide by the devices.

    Example:
        >>> # nnscaler.parallelize(Model, inputs, pas_sequence, nnscaler.ComputeConfig(plan_ngpus=8, runtime_ngpus=64))
    """
    return cut(sequence=config.plan_ngpus)(graph, config)


def cut(*, sequence: int = 1, heads: int = 1, batch: int = 1) -> Policy:
    """A policy that cuts a model on several dims; where these are fewer than `plan_ngpus` the rest is replicas.

    Args:
        sequence, heads, batch: in how many parts; their product must divide `plan_ngpus`. Sequence chunks of one ring lie
            `heads` devices apart: heads vary fastest, then the sequence, then the batch.

    Example:
        >>> cut(sequence=4, heads=2).__name__
        'pas_sequence4_heads2'
    """
    parts = {"batch": batch, "sequence": sequence, "heads": heads}
    if any(num < 1 for num in parts.values()):
        raise ValueError(f"cut({parts}): give whole numbers >= 1")

    def policy(graph: Any, config: Any) -> Any:
        return _apply(graph, config, {name: parts[name] for name in _ORDER if parts[name] > 1})

    policy.__name__ = "_".join(["pas", *(f"{name}{num}" for name, num in parts.items() if num > 1)])
    return policy


def _apply(graph: Any, config: Any, parts: Mapping[str, int]) -> Any:
    from nnscaler.graph.function.anchor import IRGraphAnchor
    from nnscaler.ir.operator import IRDataOperation, IRFwOperation
    from nnscaler.policies import auto_multiref

    pieces = 1
    for num in parts.values():
        pieces *= num
    if config.plan_ngpus % pieces:
        raise ValueError(f"{dict(parts)} makes {pieces} pieces, which do not divide plan_ngpus={config.plan_ngpus}")
    _recompute(graph, config)
    auto_multiref(graph)
    nodes = [node for node in graph.select(ntype=IRFwOperation) if not isinstance(node, IRGraphAnchor)]
    plans = follow(nodes, parts)
    for node in (*nodes, *graph.select(ntype=IRDataOperation)):
        if node.name != "multiref":  # nnscaler cuts these itself, as their consumers are
            _place(graph, node, parts, plans.get(id(node), {}), config.plan_ngpus)
    return graph


def _place(graph: Any, node: Any, parts: Mapping[str, int], plan: Mapping[str, tuple[int, int]], devices: int) -> None:
    """Partition or replicate a node step by step, and assign the pieces to ascending devices."""
    pieces = [node]
    for name, num in parts.items():
        if name in plan:
            idx, dim = plan[name]
            pieces = [part for x in pieces for part in graph.partition(x, x.algorithm("dim"), idx=idx, dim=dim, num=num)]
        else:
            pieces = [part for x in pieces for part in graph.replicate(x, times=num)]
    pieces = [part for x in pieces for part in graph.replicate(x, times=devices // len(pieces))]
    for device, piece in enumerate(pieces):
        graph.assign(piece, device)


def _recompute(graph: Any, config: Any) -> None:
    """Group the ops of each named module for recomputation."""
    from nnscaler.ir.operator import IRFwOperation

    names = str(config.pas_config.get("recompute_modules", ""))
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    groups: dict[str, list[Any]] = {}
    for node in graph.select(ntype=IRFwOperation):
        for path, cls in (node.module_stack or {}).items():
            if cls.__name__ in wanted or path in wanted:
                groups.setdefault(path, []).append(node)
                break
    if missing := [name for name in wanted if name not in _names(graph)]:
        raise ValueError(f"recompute_modules={names!r}: no module of the model is named {missing}; it has {sorted(_names(graph))}")
    for nodes in groups.values():
        graph.recompute(nodes)


def _names(graph: Any) -> set[str]:
    from nnscaler.ir.operator import IRFwOperation

    stacks = [node.module_stack or {} for node in graph.select(ntype=IRFwOperation)]
    return {name for stack in stacks for path, cls in stack.items() for name in (path, cls.__name__)}


# -- following a dim -------------------------------------------------------------------------------------------------------------


@dataclass
class _Cuts:
    """What is known of one name while it is followed.

    Attributes:
        num: into how many parts.
        tensors: id of a whole tensor -> the dim of it that is cut.
        nodes: id of a node -> (input, dim) to partition it at.
    """

    num: int
    tensors: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def choose(self, node: Any, idx: int, dim: int) -> bool:
        """Cut a node at an input's dim, and with it all tensors that the annotation ties to it; False if it may not be."""
        splits = _splits(node, idx, dim, self.num)
        if splits is None:
            return False
        known = {tensor: split for tensor, split in splits if split is not None}
        if any(self.tensors.get(tensor, split) != split for tensor, split in known.items()):
            return False  # two ways to cut one tensor: whoever came first has it
        self.tensors.update(known)
        self.nodes[id(node)] = (idx, dim)
        return True

    def visit(self, node: Any) -> bool:
        """Cut a node where one of its tensors is; True if it now is."""
        for idx, tensor in enumerate(node.inputs()):
            for dim in range(len(tensor.shape)) if _is_tensor(tensor) else ():
                splits = _splits(node, idx, dim, self.num)
                if splits and any(split is not None and self.tensors.get(tid) == split for tid, split in splits):
                    return self.choose(node, idx, dim)
        return False


def follow(nodes: Sequence[Any], parts: Mapping[str, int]) -> dict[int, dict[str, tuple[int, int]]]:
    """For each node by its id, where to cut it: name -> (input, dim).

    Raises:
        ValueError: no attention op among the nodes, or one that may not be cut so.
    """
    starts = [node for node in nodes if node.signature in _ENTRIES]
    if not starts and parts:
        raise ValueError("the model calls no attention op of nnscaler_ring: write wrap_ring_attn_func or another in its layers")
    plans: dict[int, dict[str, tuple[int, int]]] = {}
    for name, num in parts.items():
        cuts = _Cuts(num)
        for node in starts:
            dim = SPECS[_ENTRIES[node.signature]].dim("q", name)
            if dim is None or not cuts.choose(node, 0, dim):
                raise ValueError(f"{node}: its {name} may not be cut in {num} parts; its annotation is {node.anno}")
        rest = [node for node in nodes if node.signature not in _ENTRIES and _is_dimops(node)]
        while reached := {id(node) for node in rest if cuts.visit(node)}:
            rest = [node for node in rest if id(node) not in reached]
        for node, place in cuts.nodes.items():
            plans.setdefault(node, {})[name] = place
    return plans


def _is_dimops(node: Any) -> bool:
    from nnscaler.graph.function.dimops import IRDimops

    return isinstance(node, IRDimops)


def _is_tensor(value: Any) -> bool:
    from nnscaler.ir.tensor import IRSubTensor

    return isinstance(value, IRSubTensor)


def _splits(node: Any, idx: int, dim: int, num: int) -> list[tuple[int, int | None]] | None:
    """What a cut of a node does to its tensors: (id of the whole tensor, dim that is cut); None if it may not be cut so."""
    algorithm = node.algorithm("dim")
    if not algorithm.satisfy(idx=idx, dim=dim, num=num):
        return None
    rule = algorithm.infer(idx, dim, num)
    if rule is None:
        return None
    tensors = [*zip(node.inputs(), rule.inputs(), strict=False), *zip(node.outputs(), rule.outputs(), strict=False)]
    found = [(x.parent.tid, split.dims) for x, split in tensors if _is_tensor(x)]
    if any(dims is not None and len(dims) > 1 for _, dims in found):
        return None  # one identifier twice in a tensor: a cut would lose all but the diagonal
    return [(tid, None if dims is None else dims[0] % 64) for tid, dims in found]


# -- autodist --------------------------------------------------------------------------------------------------------------------


def write_partition_constraints(path: str | Path, allowed: Iterable[str] = ("sequence",), parent_module: str = "") -> Path:
    """A file for autodist's ``partition_constraints_path``: the attention ops may only be cut on the dims named.

    Args:
        path: the YAML file to write.
        allowed: of ``sequence``, ``heads`` and ``batch``.
        parent_module: the class of the closest module around the op, or any where empty.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> print(write_partition_constraints(folder.name + "/cuts.yaml").read_text().splitlines()[0])
        - allowed_partition_dims: ["0,1"]
    """
    allowed = list(allowed)
    if unknown := [name for name in allowed if name not in _ORDER]:
        raise ValueError(f"allowed={allowed}: {unknown} unknown; choose from {', '.join(_ORDER)}")
    if parent_module and not re.fullmatch(r"[\w.]+", parent_module):
        raise ValueError(f"parent_module={parent_module!r}: give the name of a class")
    entries = []
    for signature, spec in _ENTRIES.items():
        dims = [dim for name in allowed if (dim := SPECS[spec].dim("q", name)) is not None]
        entries.append(
            f"- allowed_partition_dims: {json.dumps([f'0,{dim}' for dim in dims])}\n"
            f"  name: {signature}\n  parent_module: {json.dumps(parent_module)}\n  replica_allowed: false\n"
        )
    path = Path(path)
    path.write_text("".join(entries))
    return path
