"""nnscaler as the engine that cuts: annotations say what may be cut, the code it generates names each piece's ring.

nnscaler sees one registered op with every tensor in a slot of its own, and strings besides::

    q, k, v [B, S, H, D], cu_seqlens     ->  b l (h 2) d^, b l h d^, b l h e^, n^ -> b l (h 2) e^
    q, k, v [T, H, D], both cu_seqlens   ->  l h d^, l h d^, l h e^, n^, n^       -> l h e^

The annotation is derived from the op's spec and the shapes, here and again for every piece, so cuts nest. Three more things make
the op one that nnscaler can handle: while a model is traced it returns results of the right shape without computing them; a cut of
the sequence is recorded as `ring_size`, so that a piece which autodist profiles by itself costs one rank's share; and the emitted
call names the ranks of the piece's ring (`rings`), whose groups every rank has made by then.

Nothing here needs nnscaler until `connect` is called and finds it. `annotation` is pure.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.device import sum_dtype
from . import rings
from .spec import OpSpec

Shape = Sequence[int]


def tracing() -> bool:
    """Whether nnscaler runs the caller only to learn the shapes of its results."""
    patcher = sys.modules.get("nnscaler.graph.tracer.operator_patcher")
    return patcher is not None and patcher.OperatorPatcherContext.ctx_tracer is not None


def constant(name: str, value: Any) -> Any:
    """A plain argument with a value that code may branch on, also while a model is traced.

    A `softmax_scale` that a model computes from shapes is a proxy while it is traced, and so is a ``dropout_p`` of
    ``rate if self.training else 0.0``, which is taken where both are 0.

    Raises:
        ValueError: another argument is a proxy: the code that nnscaler writes would keep its value for the length that is traced.
    """
    if not tracing():
        return value
    proxies, original = (sys.modules[f"nnscaler.graph.tracer.{module}"] for module in ("concrete_proxy", "orig_func"))
    parts = value if original.isinstance(value, (original.tuple, original.list)) else (value,)
    for part in parts:
        if original.isinstance(part, proxies.ConcreteProxy):
            if name == "softmax_scale" and original.isinstance(part.value, (original.int, original.float)):
                return original.float(part.value)
            if name == "dropout_p" and part.node.args[1:] == (0.0, 0.0):  # of `ifexpr(training, rate, 0.0)`
                return 0.0
            raise ValueError(f"{name} is computed from shapes, tensors or self.training, which nnscaler traces: give a constant")
    return value


def untouched(*results: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """These empty results, made to require a gradient where one of the inputs `of` does."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in of)
    return tuple(x.requires_grad_(grad) for x in results)


def stand_in(spec: OpSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of the right shapes and dtypes, for `tracing`."""
    lse = q.new_empty(spec.lse_shape(q.shape), dtype=sum_dtype(q.dtype))
    out, lse = untouched(q.new_empty((*q.shape[:-1], v.shape[-1])), lse, of=(q, k, v))
    return out, lse


# -- annotations -----------------------------------------------------------------------------------------------------------------


def annotation(spec: OpSpec, shapes: Mapping[str, Shape | None], lse: bool = False) -> str:
    """nnscaler's annotation of an attention op.

    Args:
        spec: which dims the tensors have.
        shapes: the shape of each input by its name in the spec; None for a tensor that is not given, those after it may be left
            out.
        lse: the op returns the log-sum-exp too.

    Example:
        >>> from nnscaler_ring.annotations.spec import SPECS
        >>> shapes = {"q": (2, 16, 4, 8), "k": (2, 16, 2, 8), "v": (2, 16, 2, 8), "cu_seqlens": None}
        >>> annotation(SPECS["wrap_ring_attn_func"], shapes)
        'b l (h 2) d^, b l h d^, b l h e^, ? -> b l (h 2) e^'
    """
    sizes = {(t, name): (shapes[t] or ())[i] for t in "qkv" for i, name in enumerate(spec.inputs[t])}
    queries, keys = sizes["q", "heads"], sizes["k", "heads"]
    one_length = sizes["q", "sequence"] == sizes["k", "sequence"]
    grouped = "h" if queries == keys or keys == 1 else f"(h {queries // keys})"
    names = {"batch": "b", "sequence": "l", "heads": grouped, "dim": "d^"}
    # Queries and keys of different numbers have no identifier in common; the rule for the ring cuts both all the same.
    names_k = names | {"heads": "1" if keys == 1 < queries else "h", "sequence": "l" if one_length else "m^"}
    of = {"q": names, "k": names_k, "v": names_k | {"dim": "e^"}, "out": names | {"dim": "e^"}, "lse": names}
    extra = names | {"keys": "t^"}
    inputs = [
        _slot(i, shapes[t], [of.get(t, extra)[name] for name in dims], t not in of)
        for i, (t, dims) in enumerate(spec.inputs.items())
        if t in shapes
    ]
    results = [spec.out, spec.lse] if lse else [spec.out]
    outputs = [" ".join(of[t][name] for name in dims) for t, dims in zip(("out", "lse"), results, strict=False)]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}"


def _slot(place: int, shape: Shape | None, dims: Sequence[str], extra: bool) -> str:
    """One input: its dims (the last, where an extra has fewer), or for a table that every rank has whole one identifier a dim."""
    if shape is None:
        return "?"
    if not dims:
        return " ".join(f"n{place}x{dim}^" for dim in range(len(shape)))
    return " ".join("1" if extra and size == 1 else name for size, name in zip(shape, dims[-len(shape) :], strict=True))


def rows_annotation(shape: Shape) -> str:
    """The annotation of an op that reorders the first dim of a tensor, which a ring shares, by a table.

    Example:
        >>> rows_annotation((16, 4))
        'l x1, n^ -> l x1'
    """
    rows = " ".join(["l", *(f"x{dim}" for dim in range(1, len(shape)))])
    return f"{rows}, n^ -> {rows}"


def loss_annotation(shape: Shape) -> str:
    """The annotation of a loss that sums over tokens: every piece of any cut adds its part.

    Example:
        >>> loss_annotation((2, 16, 100))
        'x0+ x1+ v^, x0+ x1+ -> 1'
    """
    tokens = " ".join(f"x{dim}+" for dim in range(len(shape) - 1))
    return f"{tokens} v^, {tokens} -> 1"


# -- ops -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Op:
    """A function as nnscaler is to know it.

    Attributes:
        function: at the top of a module; generated code imports it.
        annotate: ``(inputs, kwargs) -> annotation``, where an input is an IRTensor or None.
        sequence: for an op whose pieces form rings, the dim of the sequence in each input (None: it has none).
        sequence_out: the same for each result.
        ordered: rows come or go in the order that a ring of so many ranks gives them.
        generate: ``(inputs, ring_size, device) -> tensors`` to profile a piece with, where contents matter.
    """

    function: Callable[..., Any]
    annotate: Callable[[Sequence[Any], Mapping[str, Any]], str]
    sequence: tuple[int | None, ...] = ()
    sequence_out: tuple[int, ...] = ()
    ordered: bool = False
    generate: Callable[[Sequence[Any], int, Any], Sequence[Tensor | None]] | None = None

    @property
    def signature(self) -> str:
        """nnscaler's name of the op."""
        return f"{self.function.__module__}.{self.function.__name__}"


def attention_op(function: Callable[..., Any], spec: OpSpec, returns_lse: Callable[[str], bool], ordered: bool = False) -> Op:
    """A function of the tensors in `spec.inputs` and a string `settings`; `returns_lse` reads from it what is returned."""

    def annotate(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        shapes = {name: _shape(x) for name, x in zip(spec.inputs, inputs, strict=False)}
        return annotation(spec, shapes, returns_lse(kwargs.get("settings", "{}")))

    def generate(inputs: Sequence[Any], ring_size: int, device: Any) -> Sequence[Tensor | None]:
        made: list[Tensor | None] = [_random(x, device) for x in inputs[:3]]
        lengths = [ring_size * inputs[i].shape[spec.place(t, "sequence")] for i, t in ((0, "q"), (1, "k"))]
        names = list(spec.inputs)[3:]
        tables = iter(lengths)
        for name, x in zip(names, inputs[3:], strict=False):
            length = next(tables) if not spec.inputs[name] else 0
            there = _shape(x) is not None
            made.append((_random(x, device) if spec.inputs[name] else boundaries(x.shape[0], length, device)) if there else None)
        return made

    sequence = tuple(spec.dim(name, "sequence") for name in spec.inputs)
    outs = tuple(spec.place(name, "sequence") for name in ("out", "lse"))
    return Op(function=function, annotate=annotate, sequence=sequence, sequence_out=outs, ordered=ordered, generate=generate)


def rows_op(function: Callable[..., Any]) -> Op:
    """A function of rows ``[T, ...]`` and boundaries ``cu_seqlens`` that reorders the rows within a ring."""

    def generate(inputs: Sequence[Any], ring_size: int, device: Any) -> Sequence[Tensor | None]:
        rows, table = inputs
        return [_random(rows, device), boundaries(table.shape[0], ring_size * rows.shape[0], device)]

    def annotate(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return rows_annotation(inputs[0].shape)

    return Op(function=function, annotate=annotate, sequence=(0, None), sequence_out=(0,), ordered=True, generate=generate)


def loss_op(function: Callable[..., Any]) -> Op:
    """A function of logits ``[..., V]`` and labels ``[...]`` that returns a sum over tokens."""
    return Op(function=function, annotate=lambda inputs, kwargs: loss_annotation(inputs[0].shape))


def _shape(tensor: Any) -> Shape | None:
    return tuple(tensor.shape) if hasattr(tensor, "shape") else None  # a slot may hold None, wrapped or not


def _random(tensor: Any, device: Any) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)


def boundaries(size: int, length: int, device: Any = "cpu") -> Tensor:
    """int32 boundaries ``[size]`` of documents of about one length, for a row of `length` tokens.

    Example:
        >>> boundaries(4, 10).tolist()
        [0, 3, 6, 10]
    """
    return torch.tensor([i * length // max(1, size - 1) for i in range(size)], dtype=torch.int32, device=device)


# -- handing them over -----------------------------------------------------------------------------------------------------------


def connect(ops: Sequence[Op]) -> Callable[[], None] | None:
    """Register ops with nnscaler where it is installed, and have it make the groups of their rings.

    An nnscaler that is there and cannot be imported is warned of: the rest of this package works without.

    Returns:
        a function that takes the hook for the groups out again; None without nnscaler.
    """
    if importlib.util.find_spec("nnscaler") is None:
        return None
    try:
        nnscaler = importlib.import_module("nnscaler")
        for op in ops:
            _register(nnscaler, op)
    except Exception as error:  # whatever it is, it is not this package's to fail of
        warnings.warn(f"nnscaler is installed, but no op was registered: {error!r}", RuntimeWarning, stacklevel=2)
        return None
    ordered = {op.signature for op in ops if op.ordered}
    return rings.install({op.signature: op.sequence_out[0] for op in ops if op.sequence}, ordered)


def _register(nnscaler: Any, op: Op) -> None:
    options: dict[str, Any] = {}
    if op.sequence:
        options = {"emit_fn": _emit, "transform_rules": (_ring_rule(op),)}
    if op.generate is not None:
        generate = op.generate
        options["input_gen_fn"] = lambda node: tuple(
            generate(node.inputs(), node.kwargs.get("ring_size", 1), torch.cuda.current_device())
        )
    nnscaler.register_op(lambda *inputs, **kwargs: op.annotate(inputs, kwargs), **options)(op.function)


def _ring_rule(op: Op) -> Any:
    """Cuts the sequence in all tensors that have one, and notes in how many parts."""
    dimops = importlib.import_module("nnscaler.graph.function.dimops")
    split = dimops.DimopSplit

    def count(kwargs: Mapping[str, Any], idx: int, dim: int, num: int, pos: int) -> dict[str, Any]:
        return {**kwargs, "ring_size": kwargs.get("ring_size", 1) * num}

    inputs = tuple(split.R() if dim is None else split.D(dim) for dim in op.sequence)
    return dimops.TransformRule(inputs, tuple(split.D(dim) for dim in op.sequence_out), count)


def _emit(
    node: Any, args: Sequence[str], kwargs: Mapping[str, str], runtime_devid: int, plan_ndevs: int, runtime_ndevs: int
) -> str:
    """The call of a piece, with the ranks of its ring."""
    if node.kwargs.get("process_group") is not None:
        given = node.kwargs["process_group"]
        raise ValueError(f"{node.signature}: process_group={given} in a model that is cut: leave it out, the cuts say it")
    ring = rings.ring_ranks(node, runtime_devid, plan_ndevs)
    assert len(ring) == node.kwargs.get("ring_size", 1), f"{node} was cut in other parts than its ring {ring}"
    options = {name: value for name, value in kwargs.items() if name not in ("ring_size", "process_group")}
    if len(ring) > 1:
        options["process_group"] = repr(ring)
    return f"{node.signature}({', '.join([*args, *(f'{name}={value}' for name, value in options.items())])})"
