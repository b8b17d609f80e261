"""The shapes that tests and benchmarks share: heads, variants by name; and random masks, seeded, for the property tests.

`variants` are rows of one table: what the names in this field (ring, zigzag, llama3, halo, ...) mean as layout x transport x mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from nnscaler_ring.core.mask import NO_LIMIT, Mask, build

WORLDS = (1, 2, 3, 4, 5, 8)
"""World sizes of the tests."""


@dataclass(frozen=True)
class Heads:
    """Heads of a layer: `num_q` query and `num_k` key heads, head dims `dim` of q and k and `dim_v` of v."""

    name: str
    num_q: int
    num_k: int
    dim: int
    dim_v: int

    def fewer(self) -> Heads:
        """At most two key heads with the same head dims and the same query heads a key head: enough for a test."""
        num_k = min(self.num_k, 2)
        return Heads(self.name, num_k * (self.num_q // self.num_k), num_k, self.dim, self.dim_v)


HEADS = (
    Heads("mha-64", 16, 16, 64, 64),
    Heads("gqa-128", 32, 8, 128, 128),
    Heads("mqa-80", 8, 1, 80, 80),
    Heads("mla-192", 16, 16, 192, 128),
    Heads("gqa-256", 8, 4, 256, 256),
    Heads("odd-5", 6, 2, 5, 3),
    Heads("one-1", 3, 3, 1, 1),
)


@dataclass(frozen=True)
class Variant:
    """One row of the table: what a name means. `mask` takes a length and a world size and gives arguments of `mask.build`."""

    name: str
    layout: str
    transport: str
    mask: Callable[[int, int], dict[str, Any]]
    heads_stride: int = 0


def _documents(length: int, world_size: int) -> list[int]:
    """Half a shard, then whole shards shifted by that half: each document but the first lies on two ranks."""
    shard = length // world_size
    return [0, *range(shard // 2, length, shard), length]


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant("ring-full", "contiguous", "ring", lambda s, p: {}),
            Variant("ring", "contiguous", "ring", lambda s, p: {"causal": True}),
            Variant("zigzag", "zigzag", "ring", lambda s, p: {"causal": True}),
            Variant("stripe", "stripe", "ring", lambda s, p: {"causal": True}),
            Variant("zigzag-gather", "zigzag", "all_gather", lambda s, p: {"causal": True}),
            Variant("zigzag-gather-by-head", "zigzag", "all_gather", lambda s, p: {"causal": True}, heads_stride=1),
            Variant("window-halo", "contiguous", "halo", lambda s, p: {"causal": True, "window": (s // p // 4, 0)}),
            Variant("window-ring", "contiguous", "ring", lambda s, p: {"causal": True, "window": (s // p // 4, 0)}),
            Variant("window-gather", "contiguous", "all_gather", lambda s, p: {"causal": True, "window": (s // p // 4, 0)}),
            Variant("wide-halo", "contiguous", "halo", lambda s, p: {"causal": True, "window": (3 * (s // p) // 2, 0)}),
            Variant("wide-ring", "contiguous", "ring", lambda s, p: {"causal": True, "window": (3 * (s // p) // 2, 0)}),
            Variant("streaming-halo", "contiguous", "halo", lambda s, p: {"causal": True, "window": (s // p // 4, 0), "sinks": 2}),
            Variant("streaming-ring", "contiguous", "ring", lambda s, p: {"causal": True, "window": (s // p // 4, 0), "sinks": 2}),
            Variant("packed-halo", "contiguous", "halo", lambda s, p: {"causal": True, "cu_seqlens_q": _documents(s, p)}),
            Variant("packed-ring", "contiguous", "ring", lambda s, p: {"causal": True, "cu_seqlens_q": _documents(s, p)}),
            Variant("llama3", "contiguous", "all_gather", lambda s, p: {"causal": True, "cu_seqlens_q": _documents(s, p)}),
            Variant(
                "ring-varlen", "contiguous-per-document", "ring", lambda s, p: {"causal": True, "cu_seqlens_q": [0, s // 2, s]}
            ),
            Variant("zigzag-varlen", "zigzag-per-document", "ring", lambda s, p: {"causal": True, "cu_seqlens_q": [0, s // 2, s]}),
        )
    }
)


# -- random masks ----------------------------------------------------------------------------------------------------------------

KINDS = ("full", "causal", "window", "causal-window", "sinks", "prefix", "slices")


@dataclass(frozen=True)
class MaskCase:
    """A random mask: arguments of `mask.build`, or the disjoint `slices` that stand for them."""

    kind: str
    q_len: int
    k_len: int
    named: dict[str, Any] = field(default_factory=dict)
    cu_q: list[int] | None = None
    cu_k: list[int] | None = None
    slices: list[tuple[int, ...]] | None = None

    def mask(self) -> Mask:
        """What the package makes of it."""
        if self.slices is not None:
            return Mask(self.slices, self.q_len, self.k_len)
        return build(self.q_len, self.k_len, **self.named, cu_seqlens_q=self.cu_q, cu_seqlens_k=self.cu_k)

    def seen(self) -> np.ndarray:
        """What it means, by definition, without the package: bool ``[q_len, k_len]``."""
        if self.slices is not None:
            return seen_by_slices(self.slices, self.q_len, self.k_len)
        return seen_by_name(self.q_len, self.k_len, **self.named, cu_q=self.cu_q, cu_k=self.cu_k)


def random_mask(rng: np.random.Generator, q_len: int, k_len: int, kind: str, packed: bool = False) -> MaskCase:
    """A random mask of a kind in `KINDS`; packed documents may be empty, shorter than a world, and differ in queries and keys."""

    def width() -> int:
        return int(rng.integers(0, max(2, k_len // 2)))

    def left_or_right() -> tuple[int, int]:
        return [(width(), width()), (width(), -1), (-1, width())][rng.integers(3)]

    cu_q = cu_k = None
    if packed:
        num = int(rng.integers(1, 9))
        cu_q = _boundaries(rng, q_len, num)
        cu_k = cu_q if q_len == k_len and rng.random() < 0.7 else _boundaries(rng, k_len, num)
    named: dict[str, Any] = {}
    if kind == "slices":
        return MaskCase(kind, q_len, k_len, {}, cu_q, cu_k, _random_slices(rng, q_len, k_len))
    if kind in ("causal", "causal-window"):
        named["causal"] = True
    if kind in ("window", "causal-window"):
        named["window"] = left_or_right()
    if kind == "sinks":
        named |= {"causal": bool(rng.random() < 0.7), "window": (width(), [-1, width()][rng.integers(2)])}
    if kind == "prefix":
        named |= {"causal": bool(rng.random() < 0.7), "window": ([-1, width()][rng.integers(2)], width())}
    if kind == "sinks" or (kind == "prefix" and rng.random() < 0.3):
        named["sinks"] = int(rng.integers(1, 6))
    if kind == "prefix":
        named["prefix"] = int(rng.integers(1, 8))
    return MaskCase(kind, q_len, k_len, named, cu_q, cu_k)


def _boundaries(rng: np.random.Generator, length: int, num: int) -> list[int]:
    return [0, *sorted(rng.integers(0, length + 1, num - 1).tolist()), length]


def _random_slices(rng: np.random.Generator, q_len: int, k_len: int) -> list[tuple[int, ...]]:
    """Boxes of a random partition, each unseen, fully seen, seen in one band or in two."""
    boxes, done = [(0, q_len, 0, k_len)], []
    while boxes:
        q0, q1, k0, k1 = boxes.pop()
        cut = rng.random()
        if cut < 0.3 and q1 - q0 > 1:
            at = int(rng.integers(q0 + 1, q1))
            boxes += [(q0, at, k0, k1), (at, q1, k0, k1)]
        elif cut < 0.6 and k1 - k0 > 1:
            at = int(rng.integers(k0 + 1, k1))
            boxes += [(q0, q1, k0, at), (q0, q1, at, k1)]
        else:
            done.append((q0, q1, k0, k1))
    slices: list[tuple[int, ...]] = []
    for q0, q1, k0, k1 in done:
        lo, mid, hi = sorted(rng.integers(k0 - q1, k1 - q0 + 1, 3).tolist())
        bands = [[], [()], [(lo,)], [(-NO_LIMIT, hi)], [(lo, hi)], [(-NO_LIMIT, lo), (lo + 1, mid)], [(-NO_LIMIT, lo), (mid + 1,)]]
        slices += [(q0, q1, k0, k1, *band) for band in bands[rng.integers(len(bands))]]
    rng.shuffle(slices)
    return slices


def seen_by_slices(slices: list[tuple[int, ...]], q_len: int, k_len: int) -> np.ndarray:
    """Which pairs lie in a slice ``(q0, q1, k0, k1[, lo[, hi]])``."""
    i, j = np.arange(q_len)[:, None], np.arange(k_len)
    seen = np.zeros((q_len, k_len), dtype=bool)
    for q0, q1, k0, k1, *limits in slices:
        lo, hi = [*limits, *(-NO_LIMIT, NO_LIMIT)[len(limits) :]]
        seen |= (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
    return seen


def seen_by_name(
    q_len: int,
    k_len: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sinks: int = 0,
    prefix: int = 0,
    cu_q: list[int] | None = None,
    cu_k: list[int] | None = None,
) -> np.ndarray:
    """Which pairs are seen by the definition of the names: a limit holds unless the key is a sink (left) or in the prefix (right).

    Queries and keys of a document are aligned at its last token.
    """
    cu_q = [0, q_len] if cu_q is None else cu_q
    cu_k = ([0, k_len] if q_len != k_len or cu_q == [0, q_len] else cu_q) if cu_k is None else cu_k
    seen = np.zeros((q_len, k_len), dtype=bool)
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        before_last_q, before_last_k = np.arange(q1 - q0)[::-1, None], np.arange(k1 - k0)[::-1]
        ahead, number = before_last_q - before_last_k, np.arange(k1 - k0)
        left = np.ones(ahead.shape, dtype=bool) if window[0] < 0 else (-ahead <= window[0]) | (number < sinks)
        limit = 0 if causal else window[1]
        right = np.ones(ahead.shape, dtype=bool) if limit < 0 else (ahead <= limit) | (number < prefix)
        seen[q0:q1, k0:k1] = left & right
    return seen
