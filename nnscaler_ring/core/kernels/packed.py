"""Kernels that take the rows of many spans in one call: end to end with their boundaries, or one span as it lies.

Every library of flash attention on GPUs is of this kind, with a window aligned at each span's last row and key. A backend says how
its library is called, forward and backward; here the rows are gathered, padded and put back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import on_device, resident, take
from ..intervals import coalesce
from ..merge import Results
from ..sums import Sum
from .base import Grad, Kernel, Scores, Spans, Window


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What a library is told besides the tensors.

    Attributes:
        cu_q, cu_k: boundaries of the spans, int32 ``[n + 1]``; None for a single span, whose tensors are ``[B, rows, H, D]``. With
            boundaries they are ``[T, H, D]``.
        num_q, num_k: rows and keys of each span, batch row after batch row.
        window: aligned at the last row and key; -1 for no limit.
        scale, softcap, deterministic: as in `Scores` and `Grad`.
    """

    cu_q: Tensor | None
    cu_k: Tensor | None
    num_q: tuple[int, ...]
    num_k: tuple[int, ...]
    window: Window
    scale: float
    softcap: float = 0.0
    deterministic: bool = False

    @property
    def most(self) -> tuple[int, int]:
        """Rows and keys of the longest spans."""
        return max(self.num_q), max(self.num_k)

    def cut(self, lse: Tensor) -> Tensor:
        """The log-sum-exp of padded spans ``[n, H, rows]``, as flash-attn had it before 2.6, as ``[H, T]``."""
        return lse.transpose(1, 2).flatten(0, 1).index_select(0, self._filled(lse.shape[2], lse.device)).T

    def padded(self, lse: Tensor) -> Tensor:
        """The inverse."""
        most = self.most[0]
        rows = lse.new_zeros(len(self.num_q) * most, lse.shape[0])
        rows.index_copy_(0, self._filled(most, lse.device), lse.T)
        return rows.unflatten(0, (-1, most)).transpose(1, 2).contiguous()

    def _filled(self, most: int, device: torch.device) -> Tensor:
        """The numbers of the rows that are there, of spans padded to `most` rows each."""
        return on_device(np.concatenate([n * most + np.arange(count) for n, count in enumerate(self.num_q)]), device)


class Read(NamedTuple):
    """What a library reads for the gradients of a call; `lse` and `d_lse` as `Packed.attend` returns the former, contiguous."""

    d_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    d_lse: Tensor | None


WORTH = 16 << 20
"""Bytes of copies that are worth one launch more to avoid: read and written in 8 us at 4 TB/s."""


class Packed(Kernel):
    """A backend whose library takes rows end to end."""

    rounds = True

    @abstractmethod
    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out as q with v's head dim, and lse: ``[H, T]``, or ``[B, H, rows]`` for a single span; -inf where nothing is seen."""

    @abstractmethod
    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        """dq, dk and dv, like q, k and v."""

    def widths(self, head_dim: int, head_dim_v: int) -> tuple[int, int]:
        """The head dims that the library takes for these: here the wider of them, as a multiple of 8."""
        width = -(-max(head_dim, head_dim_v) // 8) * 8
        return width, width

    def groups(self, q: Tensor, k: Tensor, spans: Spans, window: Window, deterministic: bool) -> list[Spans]:
        """The spans of each call of the library.

        Here all in one call; or a call for each stretch of spans that lie end to end, where gathering the rows of all takes longer
        than the calls more, and than putting together what they give for rows that need no gathering.
        """
        apart = (spans[1:, 0] != spans[:-1, 1]) | (spans[1:, 2] != spans[:-1, 3])
        of_rows, of_keys = spans[:, 1] - spans[:, 0], 2 * (spans[:, 3] - spans[:, 2])
        queries, keys = (x[:, :1].nbytes * int(sizes.sum()) for x, sizes in ((q, of_rows), (k, of_keys)))
        gathered = (queries if len(coalesce(spans[:, :2])) > 1 else -queries) + (keys if len(coalesce(spans[:, 2:])) > 1 else 0)
        return [spans] if gathered <= WORTH * apart.sum() else np.split(spans, np.flatnonzero(apart) + 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        outs, lses = zip(*((out, lse) for _, out, lse in self.calls(q, k, v, spans, window, scores)), strict=True)
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 2))

    def merge(self, results: Results, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        for group, out, lse in self.calls(q, k, v, spans, window, scores):
            results.add(coalesce(group[:, :2]), out, lse.transpose(1, 2).unsqueeze(3))

    def calls(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores
    ) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """The spans of each call of the library, and what `forward` gives for them."""
        batch, head_dim_v = q.shape[0], v.shape[-1]
        width, width_v = self.widths(q.shape[-1], head_dim_v)
        (q, k), (v,) = pad(q, k, width=width), pad(v, width=width_v)
        for group in self.groups(q, k, spans, window, False):
            packing = Packing(group, q)
            out, lse = self.attend(packing.call(window, scores), packing.rows(q), packing.keys(k), packing.keys(v))
            lse = lse if packing.single else lse.unflatten(1, (batch, -1)).transpose(0, 1)
            yield group, packing.apart(out, batch)[..., :head_dim_v], lse

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        width, width_v = self.widths(grad.q.shape[-1], v.shape[-1])
        (q, k), (v, out, d_out) = pad(grad.q, k, width=width), pad(v, grad.out, grad.d_out, width=width_v)
        for group in self.groups(q, k, spans, window, grad.deterministic):
            packing = Packing(group, q)
            call = packing.call(window, scores, grad.deterministic)
            read = (packing.rows(d_out), packing.rows(q), packing.keys(k), packing.keys(v), packing.rows(out))
            d_lse = None if grad.d_lse is None else packing.columns(grad.d_lse)
            dq, dk, dv = self.gradients(call, Read(*read, packing.columns(grad.lse), d_lse))
            packing.add(grad.dq, dq, 0)
            packing.add(grad.dk, dk, 1)
            packing.add(grad.dv, dv, 1)


class Packing:
    """Where the rows of spans lie in one call."""

    def __init__(self, spans: Spans, q: Tensor) -> None:
        self.single, self._like = len(spans) == 1, q
        self._sides = coalesce(spans[:, :2]), coalesce(spans[:, 2:])
        self.num_q = tuple((spans[:, 1] - spans[:, 0]).tolist()) * q.shape[0]
        self.num_k = tuple((spans[:, 3] - spans[:, 2]).tolist()) * q.shape[0]

    def call(self, window: Window, scores: Scores, deterministic: bool = False) -> Call:
        """The call, its boundaries on the device of the queries."""
        cu_q = None if self.single else bounds(self.num_q, self._like)
        cu_k = cu_q if self.single or self.num_k == self.num_q else bounds(self.num_k, self._like)
        return Call(
            cu_q=cu_q,
            cu_k=cu_k,
            num_q=self.num_q,
            num_k=self.num_k,
            window=window,
            scale=scores.scale,
            softcap=scores.softcap,
            deterministic=deterministic,
        )

    def rows(self, x: Tensor) -> Tensor:
        """The spans' query rows of ``[B, L, ...]``."""
        return _aligned(self._take(x, 0))

    def keys(self, x: Tensor) -> Tensor:
        """The spans' key rows of ``[B, M, ...]``."""
        return _aligned(self._take(x, 1))

    def columns(self, x: Tensor) -> Tensor:
        """The spans' query rows of ``[B, H, L]``, as `attend` returns the lse, contiguous, from a multiple of 16 bytes on."""
        taken = self._take(x.transpose(1, 2), 0)
        made = (taken.transpose(1, 2) if self.single else taken.T).contiguous()
        return made.clone() if made.storage_offset() * made.element_size() % 16 else made

    def apart(self, x: Tensor, batch: int) -> Tensor:
        """The rows of a result as ``[B, rows, ...]``."""
        return x if self.single else x.unflatten(0, (batch, -1))

    def _take(self, x: Tensor, side: int) -> Tensor:
        """The rows that spans have of queries, 0, or of keys, 1."""
        rows = self._sides[side]
        return x[:, slice(*rows[0])] if self.single else take(x, rows, 1).flatten(0, 1)

    def add(self, total: Sum, part: Tensor, side: int) -> None:
        """Add a gradient of the spans' rows of queries, 0, or of keys, 1, which spans may share."""
        total.add(self._sides[side], self.apart(part, total.like.shape[0])[..., : total.like.shape[-1]])


def bounds(counts: Sequence[int], like: Tensor) -> Tensor:
    """int32 boundaries of rows end to end, on the device of `like` without a sync."""
    (table,) = resident(_bounds, like.device, tuple(counts))
    return table


def _bounds(counts: tuple[int, ...]) -> Sequence[np.ndarray]:
    return [np.cumsum([0, *counts], dtype=np.int32)]


def pad(*tensors: Tensor, width: int | None = None) -> list[Tensor]:
    """The tensors with zeros appended to one head dim, the widest of theirs or `width`, which changes no score and no result."""
    width = max(x.shape[-1] for x in tensors) if width is None else width
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def _aligned(x: Tensor) -> Tensor:
    """x as kernels load it, 16 bytes at a time: copied where rows or heads start between those."""
    step = 16 // x.element_size()
    starts = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    fits = all(start % step == 0 for start in (x.storage_offset(), *starts))
    return x if fits else x.clone(memory_format=torch.contiguous_format)
