"""Ulysses: ranks exchange tokens for heads, so that each computes some heads of every token (Jacobs et al., arXiv:2309.14509).

`inner` neighbouring ranks form a *team*. `to_heads` and `to_tokens` are walks of one exchange: from a rank's own tokens with all
heads to all the team's tokens with the rank's share of heads, and back. What happens between them is any plan over the teams, so a
world of ``outer * inner`` ranks runs a ring, or whatever the transport says, between the ranks of one share, and a world of one
team computes as one device does.

Query heads are dealt as evenly as they can be; each rank gets the key heads that its query heads read, so a key head may be with
several ranks, and its gradient is then the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np
import torch
from torch import Tensor

from .device import on_device, sum_dtype, take
from .intervals import coalesce
from .layout import PACKINGS, Layout
from .transport import Exchange, Wait
from .walk import put, room


@dataclass(frozen=True)
class Share:
    """The heads of one rank: query heads ``q`` and key heads ``k``, each ``(first, end)``.

    Attributes:
        repeats: for each key head that is computed with, its place in ``k``: longer than ``k`` where the rank's query heads are
            not the same number for each of its key heads.
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


@dataclass(frozen=True, eq=False)
class Pack:
    """Tensors of one dtype over the same tokens that travel as one.

    Attributes:
        team: who exchanges.
        kind: ``q`` or ``k``: whose heads they have.
        tensors: ``[B, L, H, D]`` of own tokens and all heads, or ``[B, rows, h, D]`` of the team's tokens and the own share.
    """

    team: Team
    kind: str
    tensors: Sequence[Tensor]

    def heads(self, share: Share) -> tuple[int, int]:
        """First and end of a share's heads."""
        return share.q if self.kind == "q" else share.k

    def split(self, rows: Tensor, share: Share | None = None) -> list[Tensor]:
        """Rows ``[n, B, width]`` as a view ``[B, n, h, D]`` for each of the pack's tensors; of the own share where None."""
        first, end = self.heads(share or self.team.share)
        dims = [x.shape[3] for x in self.tensors]
        parts = rows.split([(end - first) * d for d in dims], dim=2)
        return [part.unflatten(2, (end - first, d)).transpose(0, 1) for part, d in zip(parts, dims, strict=True)]

    def rows(self, share: Share | None = None) -> Tensor:
        """The tensors as rows ``[n, B, width]``, of the heads of a share or of all that they have."""
        heads = slice(None) if share is None else slice(*self.heads(share))
        return torch.cat([x[:, :, heads].flatten(2) for x in self.tensors], dim=2).transpose(0, 1).contiguous()


def to_heads(packs: Sequence[Pack]) -> Generator[Exchange, Wait, list[Tensor]]:
    """Own tokens ``[B, L, H, D]`` of all heads -> rows ``[n, B, width]`` of the team's tokens and the own share of heads.

    `Pack.split` tells the tensors in a pack's rows apart.
    """
    outboxes = [[pack.rows(share) for share in pack.team.shares] for pack in packs]
    results, inboxes = [], []
    for pack, outbox in zip(packs, outboxes, strict=True):
        rows = outbox[0].new_empty(pack.team.rows, *outbox[pack.team.place].shape[1:])
        results.append(rows)
        inboxes.append([room(rows, place) for place in pack.team.places])
    wait = yield _exchange(packs, outboxes, inboxes)
    wait()
    for pack, rows, inbox in zip(packs, results, inboxes, strict=True):
        for place, arrived in zip(pack.team.places, inbox, strict=True):
            if len(place) > 1:  # else it came right there
                put(rows, place, arrived)
    return results


def to_tokens(packs: Sequence[Pack]) -> Generator[Exchange, Wait, list[list[Tensor]]]:
    """The inverse: the team's tokens ``[B, rows, h, D]`` -> own tokens ``[B, L, H, D]``; shared key heads are added up in fp32."""
    outboxes = [[take(rows, place) for place in pack.team.places] for pack in packs for rows in [pack.rows()]]
    inboxes = []
    for pack, outbox in zip(packs, outboxes, strict=True):
        own = outbox[pack.team.place]
        widths = [
            sum((pack.heads(share)[1] - pack.heads(share)[0]) * x.shape[3] for x in pack.tensors) for share in pack.team.shares
        ]
        inboxes.append([own.new_empty(*own.shape[:2], width) for width in widths])
    wait = yield _exchange(packs, outboxes, inboxes)
    wait()
    results = []
    for pack, inbox in zip(packs, inboxes, strict=True):
        n, batch, _ = inbox[0].shape
        number = max(pack.heads(share)[1] for share in pack.team.shares)
        dtype = inbox[0].dtype if pack.kind == "q" else sum_dtype(inbox[0].dtype)  # of what is added up
        whole = [inbox[0].new_zeros(batch, n, number, x.shape[3], dtype=dtype) for x in pack.tensors]
        for share, arrived in zip(pack.team.shares, inbox, strict=True):
            for into, part in zip(whole, pack.split(arrived, share), strict=True):
                into[:, :, slice(*pack.heads(share))] += part
        results.append(whole)
    return results


def _exchange(packs: Sequence[Pack], outboxes: Sequence[Sequence[Tensor]], inboxes: Sequence[Sequence[Tensor]]) -> Exchange:
    """One message a pack and peer; what stays on this rank is copied at once."""
    send, receive = [], []
    for pack, outbox, inbox in zip(packs, outboxes, inboxes, strict=True):
        for rank, out, into in zip(pack.team.ranks, outbox, inbox, strict=True):
            if rank == pack.team.rank:
                into.copy_(out)
                continue
            send += [(rank, out)] if out.numel() else []
            receive += [(rank, into)] if into.numel() else []
    return Exchange(send, receive, outboxes[0][0].device)
