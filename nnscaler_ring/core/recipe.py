"""What a call is to compute, as a key: a `Recipe` in one string, and the mask and layouts that are found by it.

Plans, masks and layouts are functions of content alone, so they are cached, and an op that gets the key needs no other state.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import layouts, mask
from .device import on_host, sum_dtype
from .layout import PACKINGS, Layout


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a call that is not a tensor or a length, as one string key.

    Attributes:
        group: who shares the sequence: a process group's name, two joined by `transport.GRID` for a grid, or ranks that are in
            this process, ``local:N`` and ``pretend:N:R``; see `transport.transport_of`.
        layout: a name in `layouts.LAYOUTS`, or a string of `layouts.name_of`: where the rows that are passed lie.
        transport, kernel: names, or ``auto``.
        causal, window, sinks, prefix: see `mask.build`.
        heads_stride: key heads that travel at once; 0 for all.
        deterministic: the same bits each time.
        softcap, dropout: see `kernels.base.Scores`.
        far: keys so many tokens before a query or more are scored by the second half of q's and k's features; None for no halves.
        batch0, head0: numbers of the first batch row and head in the whole model, where ranks have others besides.
        reduce_dtype: name of the dtype in which gradients of keys and values travel; where empty they lose nothing: sums travel in
            fp32 (float64 for float64), others as one call gave them.
        returns_lse: the caller gets the log-sum-exp, which may then have a gradient, on one rank or on all.
        keeps: rows that came for the forward pass may be kept for the backward pass.
        rank: this process's rank, in graphs whose shapes depend on it: torch keeps compiled graphs on disk for all ranks of a
            machine and finds them by their content, so this must differ. Nothing reads it; 0 elsewhere.
    """

    group: str = "local:1"
    layout: str = "contiguous"
    transport: str = "auto"
    kernel: str = "auto"
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    sinks: int = 0
    prefix: int = 0
    heads_stride: int = 0
    deterministic: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    far: int | None = None
    batch0: int = 0
    head0: int = 0
    reduce_dtype: str = ""
    returns_lse: bool = True
    keeps: bool = False
    rank: int = 0

    @property
    def parts(self) -> int:
        """In how many the features of q and k are divided."""
        return 1 if self.far is None else 2

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which sums of gradients travel of keys and values of a dtype."""
        return getattr(torch, self.reduce_dtype) if self.reduce_dtype else sum_dtype(dtype)

    @lru_cache(maxsize=PACKINGS)  # noqa: B019  # a layout without a name may take 500 kB
    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), default=lambda x: x.item())  # a number of numpy's

    @staticmethod
    @lru_cache(maxsize=PACKINGS)
    def parse(text: str) -> Recipe:
        fields = json.loads(text)
        return Recipe(**{**fields, "window": tuple(fields["window"])})


@lru_cache(maxsize=PACKINGS)
def mask_of(recipe: Recipe, q_len: int, k_len: int, cu_q: bytes | None, cu_k: bytes | None, slices: bytes | None) -> mask.Mask:
    """The mask of a recipe over packed documents, or the slices given instead; tables as int64 bytes."""
    if slices is not None:
        return mask.Mask.trusted(np.frombuffer(slices, dtype=np.int64).reshape(-1, 6).copy(), q_len, k_len)  # they were a Mask's
    return mask.build(
        *(q_len, k_len),
        causal=recipe.causal,
        window=recipe.window,
        sinks=recipe.sinks,
        prefix=recipe.prefix,
        far=recipe.far,
        cu_seqlens_q=None if cu_q is None else np.frombuffer(cu_q, dtype=np.int64),
        cu_seqlens_k=None if cu_k is None else np.frombuffer(cu_k, dtype=np.int64),
    )


@lru_cache(maxsize=PACKINGS)
def layout_of(name: str, length: int, world_size: int, cu_seqlens: bytes | None = None) -> Layout:
    """The layout called `name`, cached; `cu_seqlens` as int64 bytes."""
    return layouts.build(name, length, world_size, None if cu_seqlens is None else np.frombuffer(cu_seqlens, dtype=np.int64))


def content(table: Tensor | None) -> bytes | None:
    """An integer tensor's content as int64 bytes; a CUDA tensor is read, which waits for the device."""
    return None if table is None else on_host(table).numpy().tobytes()
