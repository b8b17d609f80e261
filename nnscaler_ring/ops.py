"""The ops that a model calls as for one device; placements, or a compiler, say how they are cut.

Natural token order in, natural token order out, whatever happens inside. On plain tensors without a `process_group` an op computes
on this process alone; with one, each rank passes its contiguous shard. On DTensors the placements and the mesh say all that, see
`annotations.spec` for the cuts that each op allows.

Legend: `B` batch, `S` tokens of the sequence, `T` packed tokens, `Hq`/`Hk` query/key heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .annotations import dtensor
from .annotations.spec import SPECS, OpSpec
from .core.call import Group, Options, Result, Rows, attend, check, check_qkv, group_name
from .core.recipe import Recipe
from .core.relayout import relayout
from .fronts import fixed


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of an op: its spec and everything but q, k and v."""

    spec: OpSpec
    options: Options
    process_group: Group = None
    layout: str = "contiguous"
    transport: str = "auto"
    kernel: str = "auto"
    seq_len: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Result:
        check_qkv(q, k, v)
        if q.dim() != len(self.spec.inputs["q"]):
            raise ValueError(f"{self.spec.name}: q has shape {tuple(q.shape)}, the op takes dims {self.spec.inputs['q']}")
        if self.layout not in ("contiguous", self.spec.layout):
            allowed = " or ".join(dict.fromkeys(("'contiguous' (natural order)", repr(self.spec.layout))))
            raise ValueError(f"{self.spec.name}: tokens in layout {self.layout!r}; give {allowed}")
        if any(isinstance(x, DTensor) for x in (q, k, v)):
            return self._on_dtensors(q, k, v)
        name = "local:1" if self.process_group is None else group_name(self.process_group)
        out, lse = self._on_group((q, k, v), name, self.seq_len)
        return (out, lse, None) if self.options.return_attn_probs else out

    def _on_dtensors(self, q: Tensor, k: Tensor, v: Tensor) -> Result:
        if self.process_group is not None:
            raise ValueError(
                f"{self.spec.name}: the mesh of the DTensors says which ranks share the sequence; leave process_group out"
            )
        call = replace(self, cu_seqlens_q=dtensor.local(self.cu_seqlens_q), cu_seqlens_k=dtensor.local(self.cu_seqlens_k))

        def on_shards(shards: Sequence[Tensor], ring: dist.ProcessGroup | None, total: int) -> tuple[Tensor, Tensor]:
            return call._on_group(shards, "local:1" if ring is None else group_name(ring), total)

        dtensor.resolve(self.spec, q, k, v)
        assert isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)
        out, lse = dtensor.run(self.spec, q, k, v, on_shards)
        return (out, lse, None) if self.options.return_attn_probs else out

    def _on_group(self, shards: Sequence[Tensor], group: str, total: int | None) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's tokens: to the op's own layout, through the engine, and back."""
        q, k, v = shards
        inner = self.layout if group == "local:1" else self.spec.layout
        recipe = Recipe(group=group, layout=inner, transport=self.transport, kernel=self.kernel)
        rows = Rows(seq_len=total, cu_seqlens_q=self.cu_seqlens_q, cu_seqlens_k=self.cu_seqlens_k)
        options = replace(self.options, return_attn_probs=True)
        _, (total, _), _ = check(q, k, v, recipe, options, rows)
        if inner != self.layout:
            q, k, v = relayout([q, k, v], None, total, self.layout, inner, group)
        result = attend(q, k, v, recipe, options, rows)
        assert isinstance(result, tuple)
        out, lse, _ = result
        if inner != self.layout:
            (out,) = relayout([out], None, total, inner, self.layout, group)
            if self.options.return_attn_probs:
                (lse,) = relayout([lse.transpose(1, 2).contiguous()], None, total, inner, self.layout, group)
                lse = lse.transpose(1, 2).contiguous()
        return out, lse


def _run(op: str, given: dict[str, Any]) -> Result:
    """Run the op with the arguments of its front, as ``locals()`` names them."""
    options = Options(**{field.name: given[field.name] for field in fields(Options) if field.name in given})
    places = {field.name: given[field.name] for field in fields(_Call) if field.name in given}
    return _Call(spec=SPECS[op], options=options, **places)(given["q"], given["k"], given["v"])


def _dense_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "contiguous",
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
    op: str = "wrap_ring_attn_func",
) -> Result:
    """Attention over one sequence a batch row.

    Args:
        q: ``[B, S, Hq, D]``, a plain tensor or a DTensor; k ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``.
        softmax_scale: factor of the scores; ``D ** -0.5`` where None.
        dropout_p: must be 0.0; not built yet.
        causal: no token sees a later one.
        window_size: ``(left, right)`` tokens seen before and after each token, -1 for no limit.
        alibi_slopes: must be None; not built yet.
        deterministic: the same bits each time.
        return_attn_probs: return ``(out, softmax_lse, None)``.
        process_group: for plain tensors, the group (or its global ranks) whose ranks each pass a shard; None: this process alone.
        cu_seqlens: int32 boundaries of documents packed in the row ``[0, ..., S]``, the same in every batch row.
        layout: order of the tokens passed: ``contiguous`` for natural order, or the op's own layout.
        transport: ``auto``, ``ring``, ``all_gather`` or ``halo``.
        kernel: ``auto``, or the name of a backend.
        seq_len: tokens of the whole sequence, for plain shards of different lengths.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)`` with ``softmax_lse`` ``[B, Hq, S]``, fp32, natural log.

    Raises:
        ValueError: an argument or a placement is not as described; says what is allowed.
        NotImplementedError: no kernel has what is asked for.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> _dense_attn(q, k, v).shape
        torch.Size([1, 16, 4, 8])
    """
    return _run(op, {**locals(), "cu_seqlens_q": cu_seqlens})


wrap_ring_attn_func = fixed(
    _dense_attn,
    "wrap_ring_attn_func",
    "Ring attention: contiguous shards, keys and values pass from neighbour to neighbour (Liu et al., arXiv:2310.01889).",
    op="wrap_ring_attn_func",
)
wrap_zigzag_attn_func = fixed(
    _dense_attn,
    "wrap_zigzag_attn_func",
    "Causal attention with equal work on every rank: inside, rank `r` holds chunks `r` and ``2P-1-r`` of ``2P``.",
    causal_only=True,
    op="wrap_zigzag_attn_func",
)
wrap_stripe_attn_func = fixed(
    _dense_attn,
    "wrap_stripe_attn_func",
    "Striped attention (Brandon et al., arXiv:2311.09431): inside, rank `r` holds tokens ``r, r+P, r+2P, ...``.",
    op="wrap_stripe_attn_func",
)


def wrap_ring_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    bias: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
) -> Result:
    """Attention within the documents packed in one row, which is cut in contiguous parts wherever that falls.

    Args:
        q: ``[T, Hq, D]``, a plain tensor or a DTensor; k ``[T, Hk, D]``; v ``[T, Hk, Dv]``.
        cu_seqlens_q: int32 boundaries of the documents in the whole row, ``[0, ..., T]``.
        cu_seqlens_k: the same for keys; documents are aligned at their last token where the numbers differ.
        bias: must be None; not built yet.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, process_group, transport,
            kernel, seq_len: see `wrap_ring_attn_func`.

    Returns:
        out ``[T, Hq, Dv]``, or ``(out, softmax_lse, None)`` with ``softmax_lse`` ``[Hq, T]``, fp32, natural log.

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(16, 4, 8) for _ in range(3))
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> wrap_ring_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([16, 4, 8])
    """
    if bias is not None:
        raise NotImplementedError("bias: no kernel here adds one yet; pass bias=None")
    return _run("wrap_ring_attn_varlen_func", locals())


def wrap_sliding_window_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
) -> Result:
    """Sliding-window attention: only the neighbours' last rows travel, however many ranks there are.

    Args:
        q: ``[B, S, Hq, D]``, a plain tensor or a DTensor; k ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``.
        window_size: tokens seen before each token (and after it, if not causal), or ``(left, right)``; -1 for no limit.
        softmax_scale, dropout_p, causal, alibi_slopes, deterministic, return_attn_probs, process_group, cu_seqlens, transport,
            kernel, seq_len: see `wrap_ring_attn_func`.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> wrap_sliding_window_attn_func(q, k, v, 4).shape
        torch.Size([1, 16, 4, 8])
    """
    window = (window_size, 0 if causal else window_size) if isinstance(window_size, int) else window_size
    return _run("wrap_sliding_window_attn_func", {**locals(), "window_size": window, "cu_seqlens_q": cu_seqlens})


def wrap_streaming_llm_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    num_sinks: int = 1,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: Group = None,
    *,
    cu_seqlens: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seq_len: int | None = None,
) -> Result:
    """StreamingLLM attention (Xiao et al., arXiv:2309.17453): a causal window, and the first tokens of the query's document.

    Args:
        q: ``[B, S, Hq, D]``, a plain tensor or a DTensor; k ``[B, S, Hk, D]``; v ``[B, S, Hk, Dv]``.
        window_size: tokens seen before each token.
        num_sinks: first tokens of each document that all its later tokens see.
        softmax_scale, dropout_p, alibi_slopes, deterministic, return_attn_probs, process_group, cu_seqlens, transport, kernel,
            seq_len: see `wrap_ring_attn_func`.

    Returns:
        out ``[B, S, Hq, Dv]``, or ``(out, softmax_lse, None)``.

    Raises:
        ValueError, NotImplementedError: see `wrap_ring_attn_func`.

    Example:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
        >>> wrap_streaming_llm_attn_func(q, k, v, 4).shape
        torch.Size([1, 16, 4, 8])
    """
    given = {**locals(), "causal": True, "window_size": (window_size, 0), "sinks": num_sinks, "cu_seqlens_q": cu_seqlens}
    return _run("wrap_streaming_llm_attn_func", given)
