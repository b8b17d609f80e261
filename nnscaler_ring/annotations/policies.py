"""Policies for nnscaler: the whole model is cut where the attention is, by following its dims through every other op.

A policy starts at the registered ops, which know what their sequence, heads and batch are, and follows each of these dims along the
annotations of all other ops, in both directions, until nothing changes. What it does not reach is replicated::

    embed [b l^d] -> norm -> wq -> view -> attention -> view -> wo -> + -> mlp -> logits -> loss
             l        l      l     l h     l h          l h    l     l     l       l        sum

So no activation of a sequence-cut model is ever gathered or exchanged but inside the op, unless the model looks at its shape. Cut
heads end where a matrix product sums over them (tensor parallelism), cut batches run through.

Nothing here needs nnscaler until a policy runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .spec import CUTS, SPECS

Policy = Callable[[Any, Any], Any]
"""``(graph, compute config) -> graph``, as ``nnscaler.parallelize`` takes it."""

_ENTRIES: Mapping[str, str] = {
    "nnscaler_ring.ops.dense_attention": "wrap_ring_attn_func",
    "nnscaler_ring.ops.packed_attention": "wrap_ring_attn_varlen_func",
    "nnscaler_ring.plugin.zigzag_attention": "wrap_ring_attn_varlen_func",
}
"""nnscaler's name of an attention op -> a spec with its dims."""

_ROWS = "nnscaler_ring.plugin.shuffled_rows"
"""What puts rows in the order of a ring, which is the attention's: cut as that is, and by nothing else."""


def pas_sequence(graph: Any, config: Any) -> Any:
    """Cut the sequence of the whole model over all devices of a stage; give it to ``nnscaler.parallelize`` as the policy.

    ``config.pas_config`` may hold:

    - ``recompute_modules``: names of module classes, separated by commas, whose activations are recomputed in the backward pass.
    - ``stages``: paths of the modules (``"layers.1"``) that start the pipeline stages after the first, each on as many devices;
      with ``pipeline_nmicros`` and, if not ``1f1b``, ``pipeline_scheduler``. It needs ``use_end2end=True``.

    Raises:
        ValueError: the model calls no attention op of this package, or the sequence does not divide by the devices.

    Example:
        >>> # nnscaler.parallelize(Model, inputs, pas_sequence, nnscaler.ComputeConfig(plan_ngpus=8, runtime_ngpus=64))
    """
    return cut(sequence=config.plan_ngpus // (len(_stages(config)) + 1))(graph, config)


def _stages(config: Any) -> Sequence[str]:
    """Where the stages after the first start, or ValueError."""
    starts = config.pas_config.get("stages", ())
    if isinstance(starts, str) or len(starts) > config.plan_ngpus - 1:
        raise ValueError(f"stages={starts!r}: give a list of modules, of which at most {config.plan_ngpus - 1} start a stage")
    if starts and "pipeline_nmicros" not in config.pas_config:
        raise ValueError(f"stages={starts!r} without pipeline_nmicros: say how many micro batches make a step")
    return list(starts)


def cut(**parts: int) -> Policy:
    """A policy that cuts a model on several dims, the one named first outermost; ``config.pas_config`` as for `pas_sequence`.

    Put heads last where there is one key head, and first where a parameter such as a sink is read by heads: nnscaler permutes their
    gradients under another order, which is refused.

    Args:
        parts: of ``batch``, ``sequence`` and ``heads``, in how many parts each. Where their product is less than the devices of a
            stage, the rest is replicas.

    Raises:
        ValueError: another name, or a number below 1; by the policy, what `pas_sequence` refuses.

    Example:
        >>> cut(sequence=4, heads=2).__name__
        'pas_sequence4_heads2'
    """
    if unknown := [name for name in parts if name not in CUTS]:
        raise ValueError(f"cut({parts}): {unknown} unknown; choose from {', '.join(CUTS)}")
    if any(num < 1 for num in parts.values()):
        raise ValueError(f"cut({parts}): give whole numbers >= 1")

    def policy(graph: Any, config: Any) -> Any:
        return _apply(graph, config, {name: num for name, num in parts.items() if num > 1})

    policy.__name__ = "_".join(["pas", *(f"{name}{num}" for name, num in parts.items() if num > 1)])
    return policy


def _apply(graph: Any, config: Any, parts: Mapping[str, int]) -> Any:
    from nnscaler.graph.function.anchor import IRGraphAnchor
    from nnscaler.graph.function.pyfunc import IRPyFunc
    from nnscaler.ir.operator import IRDataOperation, IRFwOperation

    _recompute(graph, config)
    stages = _staged(graph, _stages(config))
    devices, pieces = config.plan_ngpus // len(stages), math.prod(parts.values())
    if config.plan_ngpus % len(stages) or devices % pieces:
        raise ValueError(
            f"{dict(parts)} makes {pieces} pieces of each of {len(stages)} stages, which do not fit plan_ngpus={config.plan_ngpus}"
        )
    if [*parts.values()] != [devices]:
        for stage in stages:
            _let_sums_be_planned(stage)
    of_stage = [[n for n in stage.select(ntype=IRFwOperation) if not isinstance(n, IRGraphAnchor)] for stage in stages]
    plans = follow([node for nodes in of_stage for node in nodes], parts)
    weights = _weights([node for nodes in of_stage for node in nodes])
    for stage, nodes in enumerate(of_stage):
        for node in nodes:
            if node.name != "multiref" and not isinstance(node, IRPyFunc):  # nnscaler places these itself
                _place(graph, node, parts, plans.get(id(node), {}), range(stage * devices, (stage + 1) * devices), weights)
    for node in graph.select(ntype=IRDataOperation):
        _place(graph, node, {}, {}, range(config.plan_ngpus), weights)
    if len(stages) > 1:
        scheduler = config.pas_config.get("pipeline_scheduler", "1f1b")
        config.apply_pipeline_scheduler(graph, len(stages), config.pas_config["pipeline_nmicros"], scheduler)
    return graph


def _staged(graph: Any, starts: Sequence[str]) -> list[Any]:
    """The stages that begin at the modules named, the graph itself where there is one; tensors of several readers multiplied."""
    from nnscaler.graph.segment import IRSegment
    from nnscaler.ir.operator import IRFwOperation
    from nnscaler.policies import auto_multiref

    nodes = graph.select(ntype=IRFwOperation)
    first = [nodes[0]]
    for start in starts:
        inside = [node for node in nodes if any(_is_at(path, start) for path in node.module_stack or ())]
        if not inside:
            raise ValueError(f"stages={list(starts)}: the model has no module {start!r}")
        first.append(inside[0])
    if len(first) == 1:
        auto_multiref(graph)
        return [graph]
    graph.staging(first)
    auto_multiref(graph)
    stages = [segment for segment in graph.select(ntype=IRSegment, flatten=False) if segment.isfw()]
    for stage in stages:
        for tensor in stage.full_tensors():
            if not tensor.is_grad() and len(stage.consumers(tensor)) > 1:
                stage.multiref(tensor)
    return stages


def _let_sums_be_planned(stage: Any) -> None:
    """Put a multiref between attention ops and parameters that they read, as sinks: nnscaler then plans how gradients are summed.

    The gradient of a parameter itself it sums over all devices or over none (see `_spread`), which not every cut of the op fits.
    """
    from nnscaler.ir.operator import IRFwOperation

    for node in stage.select(ntype=IRFwOperation):
        for x in node.inputs()[3:] if node.signature in _ENTRIES else ():
            if _is_tensor(x) and x.is_param():
                stage.multiref(x.parent)


def _is_at(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _weights(nodes: Sequence[Any]) -> set[int]:
    """Ids of whole tensors that are parameters, or made of parameters alone, as the multiref of a weight with two readers is."""
    found: set[int] = set()
    for node in nodes:
        given = [x for x in node.inputs() if _is_tensor(x)]
        found |= {x.parent.tid for x in given if x.is_param()}
        if given and all(x.parent.tid in found for x in given):
            found |= {x.parent.tid for x in node.outputs() if _is_tensor(x)}
    return found


def _place(
    graph: Any, node: Any, parts: Mapping[str, int], plan: Mapping[str, tuple[int, int]], devices: range, weights: set[int]
) -> None:
    """Partition or replicate a node step by step, and assign the pieces to ascending devices."""
    steps = {name: num if name in plan else 1 for name, num in parts.items()}
    if node.signature not in (*_ENTRIES, _ROWS):
        steps = _spread(node, steps, plan, len(devices), weights)
    pieces = [node]
    for name in parts:
        if steps.get(name, 1) > 1:
            idx, dim = plan[name]
            pieces = [part for x in pieces for part in graph.partition(x, x.algorithm("dim"), idx=idx, dim=dim, num=steps[name])]
    pieces = [part for x in pieces for part in graph.replicate(x, times=len(devices) // len(pieces))]
    for device, piece in zip(devices, pieces, strict=True):
        graph.assign(piece, device)


def _spread(
    node: Any, steps: Mapping[str, int], plan: Mapping[str, tuple[int, int]], devices: int, weights: set[int]
) -> dict[str, int]:
    """The same steps, changed so that nnscaler can sum the gradients of the node's weights.

    It sums a weight's gradient over all devices or over none: the readers of a weight are all pieces or all replicas, and a weight
    that is cut itself is cut by nothing else. So one step takes what is left of the devices; other tensors are exchanged for it.
    """
    own = {x.parent.tid for x in node.inputs() if _is_tensor(x)} & weights
    steps = {name: num for name, num in steps.items() if num > 1}
    splits = {name: _splits(node, *plan[name], num) or () for name, num in steps.items()}
    cutting = [name for name, each in splits.items() if any(tid in own and dim is not None for tid, dim in each)]
    if len(steps) > len(cutting) > 0:
        steps = {name: num for name, num in steps.items() if name not in cutting}
    left = devices // math.prod(steps.values())
    for name, num in steps.items() if left > 1 else ():
        idx, dim = plan[name]
        if node.algorithm("dim").satisfy(idx=idx, dim=dim, num=num * left):
            return {**steps, name: num * left}
    return {} if own and left > 1 else steps


def _recompute(graph: Any, config: Any) -> None:
    """Group the ops of each named module for recomputation."""
    from nnscaler.ir.operator import IRFwOperation

    names = str(config.pas_config.get("recompute_modules", ""))
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    groups: dict[str, list[Any]] = {}
    known: set[str] = set()
    for node in graph.select(ntype=IRFwOperation):
        stack = node.module_stack or {}
        known |= {name for path, cls in stack.items() for name in (path, cls.__name__)}
        for path, cls in stack.items():
            if cls.__name__ in wanted or path in wanted:
                groups.setdefault(path, []).append(node)
                break
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(f"recompute_modules={names!r}: no module of the model is named {missing}; it has {sorted(known)}")
    for nodes in groups.values():
        graph.recompute(nodes)


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
    return [(tid, None if dims is None else dims[0]) for tid, dims in found]


# -- autodist --------------------------------------------------------------------------------------------------------------------


def write_partition_constraints(path: str | Path, allowed: Iterable[str] = ("sequence",), parent_module: str = "") -> Path:
    """A file for autodist's ``partition_constraints_path``: the attention ops may only be cut on the dims named, and are.

    An op that has none of them, as packed rows have no batch, is not cut. What puts rows in the order of a ring is cut with it.

    Args:
        path: the YAML file to write.
        allowed: of ``sequence``, ``heads`` and ``batch``.
        parent_module: the class of the closest module around the op, or any where empty.

    Raises:
        ValueError: another dim, or a `parent_module` that is no name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(write_partition_constraints(folder + "/cuts.yaml").read_text().splitlines()[0])
        - allowed_partition_dims: ["0,1"]
    """
    allowed = list(allowed)
    if unknown := [name for name in allowed if name not in CUTS]:
        raise ValueError(f"allowed={allowed}: {unknown} unknown; choose from {', '.join(CUTS)}")
    if parent_module and not re.fullmatch(r"[\w.]+", parent_module):
        raise ValueError(f"parent_module={parent_module!r}: give the name of a class")
    entries = []
    for signature, spec in _ENTRIES.items():
        dims = [dim for name in allowed if (dim := SPECS[spec].dim("q", name)) is not None]
        entries.append((signature, dims, parent_module, not dims))
    entries.append((_ROWS, [0] if "sequence" in allowed else [], "", set(allowed) != {"sequence"}))  # it stands outside of layers
    path = Path(path)
    path.write_text(
        "".join(
            f"- allowed_partition_dims: {json.dumps([f'0,{dim}' for dim in dims])}\n"
            f"  name: {signature}\n  parent_module: {json.dumps(parent)}\n  replica_allowed: {json.dumps(whole)}\n"
            for signature, dims, parent, whole in entries
        )
    )
    return path
