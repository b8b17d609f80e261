"""Which ranks share heads, and how: `inner` neighbouring ranks form a *team*.

Query heads are dealt as evenly as they can be; each rank gets the key heads that its query heads read, so a key head may be with
several ranks, and its gradient is then the sum of theirs. `heads` exchanges tokens for heads within a team.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np
from torch import Tensor

from .device import on_device
from .intervals import coalesce
from .layout import PACKINGS, Layout


@dataclass(frozen=True)
class Share:
    """The heads of one rank: query heads ``q`` and key heads ``k``, each ``(first, end)``.

    Attributes:
        repeats: the key heads that a kernel gets, each by its place in ``k``. Kernels want as many query heads for each: where the
            rank's key heads serve different numbers of them, some key heads come more than once.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    repeats: tuple[int, ...]


@lru_cache(maxsize=256)
def deal(heads: int, heads_k: int, ranks: int) -> tuple[Share, ...]:
    """The heads of each of `ranks`, in order; ranks beyond the number of query heads get none.

    Example:
        >>> [share.k for share in deal(8, 2, 4)], deal(8, 2, 3)[1]
        ([(0, 1), (0, 1), (1, 2), (1, 2)], Share(q=(2, 5), k=(0, 2), repeats=(0, 0, 1)))
    """
    group, shares = heads // heads_k, []
    for rank in range(ranks):
        q0, q1 = heads * rank // ranks, heads * (rank + 1) // ranks
        if q0 == q1:
            shares.append(Share((q0, q1), (0, 0), ()))
            continue
        counts = np.bincount(np.arange(q0, q1) // group)
        first, counts = q0 // group, counts[counts > 0]
        size = gcd(*counts.tolist())
        repeats = np.repeat(np.arange(len(counts)), counts // size)
        shares.append(Share((q0, q1), (first, first + len(counts)), tuple(repeats.tolist())))
    return tuple(shares)


@dataclass(frozen=True, eq=False)
class Team:
    """The ranks that exchange tokens for heads, as one of them sees it.

    Attributes:
        rank: this rank in the world; peers are named by their rank in the world.
        ranks: the team's ranks.
        shares: the heads of each.
        places: for each, where its tokens lie among the team's, as intervals ``[n, 2]`` in the order of its own rows.
    """

    rank: int
    ranks: range
    shares: tuple[Share, ...]
    places: tuple[np.ndarray, ...]

    @property
    def rows(self) -> int:
        """Number of the team's tokens."""
        return sum(_count(place) for place in self.places)

    @property
    def place(self) -> int:
        """This rank's number in the team."""
        return self.rank - self.ranks.start

    @property
    def share(self) -> Share:
        return self.shares[self.place]

    @property
    def most(self) -> int:
        """The greatest number of key heads that a rank computes with."""
        return max(len(share.repeats) for share in self.shares)

    @property
    def shared(self) -> bool:
        """A key head is with several ranks."""
        return sum(share.k[1] - share.k[0] for share in self.shares) > max(share.k[1] for share in self.shares)

    def repeat(self, x: Tensor) -> Tensor:
        """Key heads ``[B, n, h, D]`` of the own share -> those that are computed with, the same number of query heads for each."""
        repeats = self.share.repeats
        return x if len(repeats) == x.shape[2] else x.index_select(2, on_device(np.array(repeats), x.device))

    def add_repeats(self, x: Tensor) -> Tensor:
        """The adjoint of `repeat`."""
        first, end = self.share.k
        if len(self.share.repeats) == end - first:
            return x
        total = x.new_zeros(*x.shape[:2], end - first, x.shape[3])
        for n, head in enumerate(self.share.repeats):  # one after the other: the same bits each time
            total[:, :, head] += x[:, :, n]
        return total


def team_of(layout: Layout, inner: int, rank: int, heads: int, heads_k: int) -> Team:
    """The team of a rank whose tokens lie in `layout`; see `teams` for the layout of the teams."""
    first = rank // inner * inner
    ranks = range(first, first + inner)
    return Team(rank, ranks, deal(heads, heads_k, inner), _places(layout, first, inner))


@lru_cache(maxsize=PACKINGS)
def teams(layout: Layout, inner: int) -> Layout:
    """The layout of the teams' tokens: each team holds what its ranks hold."""
    if inner == 1:
        return layout
    rank, start, count = layout.runs.T
    runs = np.column_stack([rank // inner, start, count])
    if layout.world_size == inner:  # every token: in natural order, whatever the layout
        return Layout(np.array([[0, 0, layout.length]]), layout.length, 1)
    return Layout(runs, layout.length, layout.world_size // inner, layout.stride)


@lru_cache(maxsize=PACKINGS)
def _places(layout: Layout, first: int, inner: int) -> tuple[np.ndarray, ...]:
    team, number = teams(layout, inner), first // inner
    positions = team.positions(number)
    order = np.argsort(positions)
    places = []
    for rank in range(first, first + inner):
        rows = order[np.searchsorted(positions, layout.positions(rank), sorter=order)]
        places.append(coalesce(np.column_stack([rows, rows + 1])))
    return tuple(places)


def _count(intervals: np.ndarray) -> int:
    return int((intervals[:, 1] - intervals[:, 0]).sum())
