"""`ContextParallel`: a group of ranks, a layout, a transport and a kernel bound once, for plain tensors."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .annotations.dtensor import axis_group
from .core.call import (
    Options,
    Result,
    Rows,
    announced,
    attend,
    check_differentiable,
    check_names,
    check_plain,
    check_qkv,
    check_tensors,
    grid_name,
    group_name,
    host_table,
)
from .core.device import on_device
from .core.layout import Layout
from .core.layouts import length_of, looks_at_documents, name_of, needs_documents, shown
from .core.mask import Mask, check_cu_seqlens
from .core.recipe import Recipe, content, layout_of
from .core.relayout import gather
from .core.transport import num_ranks, rank_in
from .launch import warn_if_alone

KNOWN = tuple(sorted({field.name for field in fields(Options)} - {"softmax_scale", "causal", "far"}))
"""Options of `ContextParallel.attention` by keyword."""


def _mesh_name(mesh: DeviceMesh) -> str:
    """The name of a mesh's group, or of its two groups."""
    if mesh.ndim > 2:
        raise ValueError(f"ContextParallel takes a mesh of one dim or two, got {mesh}: pass mesh['name'] of the axes meant")
    if mesh.get_coordinate() is None:
        raise ValueError(f"this process is not in the mesh given, {mesh}: call on its ranks only")
    return grid_name([axis_group(mesh, axis) for axis in range(mesh.ndim)])


def _tokens(x: Tensor, dim: int) -> int:
    """How long `x` is in `dim`."""
    check_tensors(x=x)
    if not isinstance(dim, Integral) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim!r}: x has shape {tuple(x.shape)}; give the number of a dim")
    return x.shape[dim]


PARTS = 4
"""Layouts of the last shards given out that are remembered until a call, to recognise shards that were put end to end."""


class ContextParallel:
    """Ranks that share each sequence, and how they share it.

    Args:
        group_or_mesh: a process group, a DeviceMesh of one or two dims, or None: the default group (this process alone where there
            is none, with a warning where it was started as one of many). Of two dims, ranks along the inner one exchange tokens for
            heads (Ulysses), and keys and values travel along the outer one as `transport` says; rank ``o * inner + i`` of the
            layout is at ``mesh[o, i]``.
        layout: ``contiguous``, ``zigzag`` (equal work under a causal mask), ``stripe``, ``balanced`` (equal work and few rows to
            send for packed rows), ``contiguous-per-document``, ``zigzag-per-document``, or a `Layout`, for example of
            `balanced` for a mask of one's own.
        transport: ``ring``, ``grouped_ring`` (fewer merges, more memory), ``all_gather``, ``halo``, ``all_to_all`` (Ulysses), or
            ``auto``: one of ring, halo and all_to_all, by what they move for the mask and the heads, and what hides it; a ring's
            forward pass grouped where its merges would take longer than the waits.
        kernel: ``auto``, or the name of a backend.
        reduce_dtype: dtype in which gradients of keys and values travel, for example ``torch.bfloat16`` for half the bytes; None
            for no loss: sums in fp32 (float64 for float64), what one call gives as it gave it. In any case they are added up in
            fp32.
        heads_k_stride: key heads that travel at once, for smaller buffers and more messages; 0 for all.

    Raises:
        ValueError: an unknown name (lists the known), a mesh of more than two dims, or a group that this process is not in.

    Example:
        >>> cp = ContextParallel(None, layout="zigzag")
        >>> x = cp.shard(torch.randn(1, 16, 4, 8), dim=1)
        >>> cp.unshard(cp.attention(x, x, x, mask="causal"), dim=1).shape
        torch.Size([1, 16, 4, 8])
    """

    def __init__(
        self,
        group_or_mesh: dist.ProcessGroup | DeviceMesh | None = None,
        layout: str | Layout = "contiguous",
        transport: str = "auto",
        kernel: str = "auto",
        *,
        reduce_dtype: torch.dtype | None = None,
        heads_k_stride: int = 0,
    ) -> None:
        if group_or_mesh is None:
            warn_if_alone("ContextParallel")
        name = _mesh_name(group_or_mesh) if isinstance(group_or_mesh, DeviceMesh) else group_name(group_or_mesh)
        if reduce_dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"reduce_dtype={reduce_dtype}: give a floating dtype of 2 bytes or more, or None for fp32")
        reduced = "" if reduce_dtype is None else str(reduce_dtype).removeprefix("torch.")
        self._recipe = Recipe(
            group=name,
            layout=name_of(layout),
            transport=transport,
            kernel=kernel,
            reduce_dtype=reduced,
            heads_stride=heads_k_stride,
        )
        check_names(self._recipe)
        self._alone = group_or_mesh is None and name == "local:1"
        rank_in(name)  # the group is there, and this process in it; not kept, since another process may load what this one saves
        self._uneven: set[int] = set()  # all lengths of shards in layouts that give ranks different numbers of tokens
        self._lately_uneven = False  # `shard` has, in its last turn, used such a layout; graphs guard on this flag, not on the set
        self._lately: list[Layout] = []  # the last `PARTS` that it has used in that turn; a turn ends with the `shard` after a call
        self._called = False  # there was a call, outside of graphs, since the last `shard`
        self._by_documents: bool | None = None  # whether the last `shard` was given cu_seqlens; None before the first

    @property
    def rank(self) -> int:
        """This process's rank in the group: that of the process which asks, also in a copy that another one saved."""
        return rank_in(self._recipe.group)

    @property
    def world_size(self) -> int:
        """The ranks of the group."""
        return num_ranks(self._recipe.group)

    def __repr__(self) -> str:
        r = self._recipe
        try:
            where = f"rank {self.rank} of {self.world_size}"
        except RuntimeError:  # torch's, of a name that no group has
            where = "a group that is not there"
        return f"ContextParallel({where}, {shown(r.layout)}, transport={r.transport}, kernel={r.kernel})"

    def _check_alone(self) -> None:
        """ValueError where this was made for a process that was alone, and a process group has been made since."""
        if self._alone and (now := group_name(None)) != self._recipe.group:
            raise ValueError(
                f"this ContextParallel was made when this process was alone; there are {num_ranks(now)} ranks: make it anew, or of "
                "a group of this rank alone"
            )

    @torch.compiler.disable
    def _layout(self, seq_len: int, cu: Tensor | None) -> Layout:
        """The layout of a sequence of so many tokens; `cu` are its boundaries on the host, as `host_table` gives them."""
        self._check_alone()
        if not isinstance(seq_len, Integral) or seq_len < 0:
            raise ValueError(f"seq_len={seq_len!r}: give the number of tokens of the whole sequence")
        if cu is not None:
            check_cu_seqlens("cu_seqlens", cu.numpy(), seq_len)
        elif needs_documents(self._recipe.layout):
            raise ValueError(f"layout {self._recipe.layout!r} cuts each document: pass cu_seqlens")
        return layout_of(self._recipe.layout, seq_len, self.world_size, content(cu))

    def position_ids(self, seq_len: int, *, cu_seqlens: Tensor | None = None, device: torch.device | str | None = None) -> Tensor:
        """Positions of this rank's tokens in the whole sequence, int64 ``[L]``, for RoPE; within each document with `cu_seqlens`.

        Args:
            seq_len: tokens of the whole sequence.
            cu_seqlens: int32 boundaries of packed documents ``[0, ..., seq_len]``.
            device: of the result.

        Raises:
            ValueError: the last shards were cut by documents, and here are none, or the other way round, where the layout looks at
                them: shard a batch before its positions are asked for.

        Example:
            >>> ContextParallel(None).position_ids(5, cu_seqlens=torch.tensor([0, 3, 5])).tolist()
            [0, 1, 2, 0, 1]
        """
        self._check_documents(cu_seqlens)
        cu = host_table("cu_seqlens", cu_seqlens)
        positions = self._layout(seq_len, cu).positions(self.rank)
        if cu is not None:
            starts = cu.numpy()
            positions = positions - starts[np.searchsorted(starts, positions, side="right") - 1]
        return torch.from_numpy(positions).to(device)

    def shard(self, x: Tensor, dim: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """This rank's tokens of `x`, which every rank has whole: ``[..., S, ...] -> [..., L, ...]``; differentiable.

        Args:
            x: any dtype.
            dim: the dim of the tokens.
            cu_seqlens: boundaries of packed documents; those that every call about these tokens gets.

        Raises:
            ValueError: no such dim, or boundaries that are not those of `S` tokens.

        Example:
            >>> ContextParallel(None).shard(torch.arange(6), dim=0).tolist()  # of one rank
            [0, 1, 2, 3, 4, 5]
        """
        check_plain(x)
        held = self._layout(_tokens(x, dim), host_table("cu_seqlens", cu_seqlens))
        self._by_documents = cu_seqlens is not None
        uneven = bool((held.counts != held.counts[0]).any())
        if self._called:
            self._lately_uneven, self._called, self._lately = False, False, []
        self._lately_uneven |= uneven
        self._lately = [*(each for each in self._lately if each != held), held][-PARTS:]
        self._uneven |= set(held.counts.tolist()) if uneven else set()
        positions = held.positions(self.rank)
        return x.index_select(dim, on_device(positions, x.device))

    def unshard(self, x: Tensor, dim: int, *, cu_seqlens: Tensor | None = None, seq_len: int | None = None) -> Tensor:
        """The whole tensor in natural order on every rank, from each rank's tokens: ``[..., L, ...] -> [..., S, ...]``.

        The gradient of a rank's tokens is that of the same tokens in its own whole tensor.

        Args:
            x: this rank's tokens.
            dim: the dim of the tokens.
            cu_seqlens: boundaries of packed documents.
            seq_len: `S`, where ranks hold different numbers of tokens; that of a `Layout`, else ``world_size * L`` where None.

        Returns:
            ``[..., S, ...]``, of the dtype of `x`.

        Raises:
            ValueError: tokens that are not this rank's, or other boundaries than those of the last `shard`.

        Example:
            >>> cp = ContextParallel(None, layout="zigzag")  # of one rank
            >>> cp.unshard(cp.shard(torch.arange(6), dim=0), dim=0).tolist()
            [0, 1, 2, 3, 4, 5]
        """
        with announced(self._recipe.group, x):
            check_plain(x)
            check_differentiable(x)
            self._check_documents(cu_seqlens)
            cu = host_table("cu_seqlens", cu_seqlens)  # read from the device once
            seq_len = self._total(_tokens(x, dim), cu, seq_len)
            self._layout(seq_len, cu)
        self._called = True
        rows = x.movedim(dim, 0).unsqueeze(0)
        whole = gather(rows, cu, seq_len, self._recipe.layout, self._recipe.group)
        return whole.squeeze(0).movedim(0, dim)

    def _check_documents(self, cu_seqlens: Tensor | None) -> None:
        """ValueError where the last shards were cut with boundaries that are missing here, or without some that are given."""
        if looks_at_documents(self._recipe.layout) and self._by_documents not in (None, cu_seqlens is not None):
            cut, now = ("with", "none") if self._by_documents else ("without", "some")
            raise ValueError(
                f"the last shards were cut {cut} cu_seqlens, here are {now}: layout {self._recipe.layout!r} places tokens by their "
                "documents, so give the same boundaries to every call"
            )

    def _total(self, tokens: int, cu: Tensor | None, seq_len: int | None) -> int:
        if seq_len is not None:
            return seq_len
        if (given := length_of(self._recipe.layout)) is not None:
            return given
        if cu is not None:
            return int(check_cu_seqlens("cu_seqlens", cu.numpy(), None)[-1])
        self._check_even(tokens, tokens in self._uneven or (self._lately_uneven and self._joined(tokens)))
        return tokens * self.world_size

    def _joined(self, tokens: int) -> bool:
        """Whether some rank holds `tokens` of an uneven layout made of shards given out lately, end to end; alike on all ranks."""
        counts = [each.counts for each in self._lately]
        sums = (np.sum(some, axis=0) for n in range(2, len(counts) + 1) for some in combinations(counts, n))
        return any((some != some[0]).any() and (some == tokens).any() for some in sums)

    def _check_even(self, tokens: int, uneven: bool) -> None:
        """ValueError where ranks may hold different numbers of tokens: on all ranks alike, since each sees its own number only."""
        if uneven:
            raise ValueError(
                f"shards of different lengths have been given out before, so {tokens} tokens here may be of several lengths: pass "
                "seq_len, the tokens of the whole sequence"
            )

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: str | Mask = "causal",
        softmax_scale: float | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Result:
        """Attention over the whole sequence, on this rank's tokens.

        Args:
            q: ``[B, L, Hq, D]``, this rank's tokens as `shard` gives them; k ``[B, Lk, Hk, D]``; v ``[B, Lk, Hk, Dv]``.
            mask: ``causal``, ``full``, or a `core.mask.Mask` of band slices over the whole sequence.
            softmax_scale: factor of the scores; ``D ** -0.5`` where None.
            cu_seqlens: int32 boundaries of packed documents ``[0, ..., S]``, the same in every batch row.
            options: ``window_size=(left, right)``; ``sinks``, the first tokens of each document seen from beyond the window;
                ``prefix``, the first tokens of each document seen by earlier ones; ``seq_len``, `S` where ranks hold different
                numbers of tokens and the layout is no `Layout`, which knows it, and ``seq_len_k`` where keys are not as many
                (aligned at the last token, in the same layout); ``deterministic``; ``return_attn_probs``; and ``softcap``,
                ``alibi_slopes``, ``learnable_sink``, ``bias``, ``dropout_p``, ``dropout_seed``, see `core.call.Options`.

        Returns:
            out ``[B, L, Hq, Dv]``, or ``(out, softmax_lse, None)``.

        Raises:
            ValueError, NotImplementedError: see `core.call.attend`.
            TypeError: an option that is not known.

        Example:
            >>> q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
            >>> ContextParallel(None).attention(q, k, v, window_size=(4, 0)).shape  # of one rank
            torch.Size([1, 16, 4, 8])
        """
        if torch.compiler.is_compiling():
            self._check_alone()
            settled, rows = self._settled(mask, softmax_scale, cu_seqlens, options)
            self._check_documents(cu_seqlens)
            if rows.seq_len is None:
                self._check_even(q.shape[q.dim() - 3], self._lately_uneven)
            return attend(q, k, v, self._recipe, settled, rows)
        with announced(self._recipe.group, q):
            settled, rows = self._settled(mask, softmax_scale, cu_seqlens, options)
            check_plain(q, k, v)
            check_qkv(q, k, v)
            self._check_documents(cu_seqlens)
            cu_seqlens = host_table("cu_seqlens", cu_seqlens)  # read from the device once
            total, total_k = self._total(q.shape[q.dim() - 3], cu_seqlens, rows.seq_len), rows.seq_len_k
            if total_k is None and rows.seq_len is None and cu_seqlens is None:
                total_k = self._total(k.shape[k.dim() - 3], None, None)
            self._layout(total, cu_seqlens)
        self._called = True
        rows = replace(rows, seq_len=total, seq_len_k=total_k, cu_seqlens_q=cu_seqlens)
        return attend(q, k, v, self._recipe, settled, rows, heads_may_travel=True)

    def _settled(
        self, mask: str | Mask, softmax_scale: float | None, cu_seqlens: Tensor | None, options: dict[str, Any]
    ) -> tuple[Options, Rows]:
        """What `attention` is asked for besides its tensors."""
        slices = mask if isinstance(mask, Mask) else None
        seq_len, seq_len_k = options.pop("seq_len", None), options.pop("seq_len_k", None)
        if slices is not None and seq_len is not None and seq_len_k is None:
            seq_len_k = slices.k_len
        rows = Rows(seq_len=seq_len, seq_len_k=seq_len_k, cu_seqlens_q=cu_seqlens, slices=slices)
        documents = cu_seqlens is not None and not looks_at_documents(self._recipe.layout)  # for the mask, not for the layout
        if isinstance(mask, Mask) and (documents or {"window_size", "sinks", "prefix"} & options.keys()):
            raise ValueError("a Mask says everything: leave out cu_seqlens, window_size, sinks and prefix")
        if not isinstance(mask, Mask) and mask not in ("causal", "full"):
            given = f"a tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"mask is {given}: give 'causal', 'full' or a Mask, which says in slices who sees whom")
        if unknown := [name for name in options if name not in KNOWN]:
            names = ("softmax_scale", "cu_seqlens", "seq_len", "seq_len_k", *KNOWN)
            raise TypeError(f"attention() takes no {', '.join(unknown)}: mask= says 'causal' or 'full'; besides there are {names}")
        settled = Options(softmax_scale=softmax_scale, causal=mask == "causal", **options)
        if cu_seqlens is None and needs_documents(self._recipe.layout):
            raise ValueError(f"layout {self._recipe.layout!r} cuts each document: pass cu_seqlens")
        return settled, rows
