"""How an op may be cut, said once per op: each engine's adapter reads it from here.

A spec names the dims of every tensor. Dims of one name are cut together; what a name may do is the same for all ops::

    batch      cut freely: rows are independent
    sequence   cut over one ring of ranks: the op exchanges keys and values in it
    heads      cut freely, query heads together with their key heads; a single key head stays whole and its gradient is a sum
    dim        never cut
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..core.plan import ALL_TO_ALL

CUTS: Mapping[str, str] = MappingProxyType(
    {
        "batch": "cut freely",
        "sequence": "cut over one axis, the ring",
        "heads": "cut freely, queries with their keys and values",
    }
)
"""Dims that may be cut, and how; a dim of another name stays whole."""


@dataclass(frozen=True)
class OpSpec:
    """One op: the names of its tensors' dims.

    Attributes:
        name: the public name.
        inputs: name of a tensor argument -> names of its dims; an empty tuple for a table that every rank has whole.
        out, lse: dims of the results.
        layout: the layout that the op computes in, whatever order the tokens come in.
        transport: how rows travel where a call does not say.
        grid: the sequence may be cut over two axes, the inner of which exchanges tokens for heads.

    Example:
        >>> SPECS["wrap_ring_attn_func"].dim("q", "sequence")
        1
    """

    name: str
    inputs: Mapping[str, tuple[str, ...]]
    out: tuple[str, ...]
    lse: tuple[str, ...]
    layout: str = "contiguous"
    transport: str = "auto"
    grid: bool = False

    def dim(self, tensor: str, name: str) -> int | None:
        """The place of the dim called `name` in a tensor argument, ``out`` or ``lse``; None where it has no such dim."""
        return self.place(tensor, name) if name in self._dims(tensor) else None

    def place(self, tensor: str, name: str) -> int:
        """The same of a dim that the tensor has."""
        return self._dims(tensor).index(name)

    def _dims(self, tensor: str) -> tuple[str, ...]:
        return {**self.inputs, "out": self.out, "lse": self.lse}[tensor]

    def lse_shape(self, q: Sequence[int]) -> list[int]:
        """The shape of the log-sum-exp for the shape of q."""
        return [q[self.place("q", name)] for name in self.lse]

    @property
    def cuttable(self) -> tuple[str, ...]:
        """Names of the dims that may be cut."""
        return tuple(name for name in CUTS if name in self.inputs["q"])

    def describe(self) -> str:
        """The allowed cuts in words, for error messages."""
        cuts = []
        for name in self.cuttable:
            where = ", ".join(f"{t} on dim {self.dim(t, name)}" for t in ("q", "k", "v"))
            over_two = " or two, ring outside and heads inside" if self.grid and name == "sequence" else ""
            cuts.append(f"{name} ({where}; {CUTS[name]}{over_two})")
        return "; ".join(cuts) + "; or nothing (replicated)"


_DENSE = ("batch", "sequence", "heads", "dim")
_PACKED = ("sequence", "heads", "dim")
_EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType({"alibi_slopes": ("batch", "heads"), "learnable_sink": ("heads",)})
"""Tensors besides q and k that scores are made of; one that is given with fewer dims has the last of these."""


def _dense(name: str, layout: str = "contiguous", transport: str = "auto") -> OpSpec:
    tensors = {"q": _DENSE, "k": _DENSE, "v": _DENSE, "cu_seqlens": (), **_EXTRAS}
    lse, grid = ("batch", "heads", "sequence"), transport == ALL_TO_ALL
    return OpSpec(name, MappingProxyType(tensors), _DENSE, lse, layout, transport, grid)


def _varlen(name: str) -> OpSpec:
    tensors = {"q": _PACKED, "k": _PACKED, "v": _PACKED, "cu_seqlens_q": (), "cu_seqlens_k": (), **_EXTRAS}
    tensors["bias"] = ("heads", "sequence", "keys")
    return OpSpec(name, MappingProxyType(tensors), _PACKED, ("heads", "sequence"))


SPECS: Mapping[str, OpSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _dense("wrap_ring_attn_func"),
            _dense("wrap_zigzag_attn_func", "zigzag"),
            _dense("wrap_stripe_attn_func", "stripe"),
            _dense("wrap_ulysses_attn_func", transport=ALL_TO_ALL),
            _varlen("wrap_ring_attn_varlen_func"),
            _dense("wrap_sliding_window_attn_func"),
            _dense("wrap_streaming_llm_attn_func"),
        )
    }
)
"""Every op's spec by its public name."""
