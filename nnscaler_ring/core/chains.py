"""Who reads which key/value rows, and the way of a row from reader to reader round the ring.

Every key row has an *address*: for layouts of stride 1 its position, so that what a rank reads is few intervals, whoever holds it;
for other strides the number of the row when the rows of rank 0, 1, 2 ... are counted through.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .geometry import trim, visible
from .intervals import Columns, distinct, overlaps, union
from .layout import Layout
from .mask import Mask


def _addresses(k: Layout) -> np.ndarray:
    """The address of each run's first row."""
    return k.runs[:, 1] if k.stride == 1 else k.number0


def needs(mask: Mask, q: Layout, k: Layout) -> Columns:
    """What each rank reads, its own rows included: disjoint intervals of addresses ``(reader, lo, hi)``, by reader and place."""
    if k.stride == 1:
        rank, start, count = q.runs.T
        q0, q1, k0, k1, lo, hi = mask.table.T
        at_slice, at_q = overlaps(q0, q1, start, start + count)
        i0, i1 = np.maximum(q0[at_slice], start[at_q]), np.minimum(q1[at_slice], (start + count)[at_q])
        i0, i1, j0, j1, _, _ = trim(i0, i1, k0[at_slice], k1[at_slice], lo[at_slice], hi[at_slice])
        some = (i0 < i1) & (j0 < j1)
        reader, lo, hi = rank[at_q][some], j0[some], j1[some]
    else:
        bands = visible(mask, q, k)
        base = k.rank0[bands[:, 1]]
        reader, lo, hi = bands[:, 0], base + bands[:, 4], base + bands[:, 5]
    return union(reader, lo, hi)


@lru_cache(maxsize=64)
def rows_needed(mask: Mask, q: Layout, k: Layout) -> np.ndarray:
    """Key/value rows of others that each rank reads: int64 ``[world_size]``, what any exchange must bring at least."""
    reader, lo, hi = needs(mask, q, k)
    start = _addresses(k)
    span = k.length + 1
    mine, theirs = overlaps(
        reader * span + lo, reader * span + hi, k.runs[:, 0] * span + start, k.runs[:, 0] * span + start + k.runs[:, 2]
    )
    own = np.minimum(hi[mine], (start + k.runs[:, 2])[theirs]) - np.maximum(lo[mine], start[theirs])
    return (np.bincount(reader, hi - lo, q.world_size) - np.bincount(reader[mine], own, q.world_size)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Chains:
    """The way of all rows: from the rank that holds them to each reader in turn, in the order in which the ring comes to them.

    Attributes:
        direction: of the ring, +1 to higher ranks.
        pieces: ``(origin, row, address, end)`` of rows that the same ranks read, in ascending address.
        reads: bool ``[pieces, world - 1]``: whether the rank at a distance from the origin, 1 first, reads them.
    """

    direction: int
    pieces: np.ndarray
    reads: np.ndarray

    @property
    def steps(self) -> int:
        """Readers of the row that most ranks read."""
        return int(self.length.max(initial=0))

    @cached_property
    def length(self) -> np.ndarray:
        """Readers of each piece."""
        return self.reads.sum(1)

    def rank_at(self, piece: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """The rank at a distance, counted from 0, on the way of each piece."""
        return (self.pieces[piece, 0] + self.direction * (distance + 1)) % (self.reads.shape[1] + 1)

    def seen_from(self, rank: int) -> tuple[np.ndarray, ...]:
        """Of the pieces that `rank` reads: number, place in the chain from 1, the rank before, and the one after or -1."""
        distance = (rank - self.pieces[:, 0]) * self.direction % (self.reads.shape[1] + 1) - 1
        far = np.flatnonzero(distance >= 0)
        piece = far[self.reads[far, distance[far]]]
        reads, own = self.reads[piece], distance[piece, None]
        columns = np.arange(reads.shape[1])
        earlier, later = reads & (columns < own), reads & (columns > own)
        place = earlier.sum(1) + 1
        before = np.where(place > 1, self.rank_at(piece, reads.shape[1] - 1 - earlier[:, ::-1].argmax(1)), self.pieces[piece, 0])
        after = np.where(later.any(1), self.rank_at(piece, later.argmax(1)), -1)
        return piece, place, before, after

    def sent_from(self, rank: int) -> tuple[np.ndarray, ...]:
        """Of the pieces that `rank` holds and others read: number, the first reader and the last."""
        piece = np.flatnonzero((self.pieces[:, 0] == rank) & (self.length > 0))
        reads = self.reads[piece]
        last = reads.shape[1] - 1 - reads[:, ::-1].argmax(1)
        return piece, self.rank_at(piece, reads.argmax(1)), self.rank_at(piece, last)


@lru_cache(maxsize=32)
def chains_of(mask: Mask, q: Layout, k: Layout, everything: bool) -> Chains:
    """The chains in the direction in which rows skip fewer ranks; with `everything` all ranks read all rows."""
    world = k.world_size
    if everything:
        pieces = _cut(k, _addresses(k))
        return Chains(1, pieces, np.ones((len(pieces), world - 1), dtype=bool))
    reader, lo, hi = needs(mask, q, k)
    pieces = _cut(k, np.concatenate([lo, hi]))
    change = np.zeros((len(pieces) + 1, world), dtype=np.int8)
    np.add.at(change, (np.searchsorted(pieces[:, 2], lo), reader), 1)
    np.add.at(change, (np.searchsorted(pieces[:, 2], hi), reader), -1)
    member = np.cumsum(change[:-1], axis=0, dtype=np.int8).view(bool)
    some = np.flatnonzero(member.sum(1) > member[np.arange(len(pieces)), pieces[:, 0]])  # read by others
    pieces, member = pieces[some], member[some]
    twice = np.concatenate([member, member], axis=1)
    upward = sliding_window_view(twice, world - 1, axis=1)[np.arange(len(pieces)), pieces[:, 0] + 1]  # from the next rank on
    chains = [Chains(-1, pieces, upward[:, ::-1]), Chains(1, pieces, upward)]

    def skipped(chain: Chains) -> int:
        last = np.where(chain.reads.any(1), world - 1 - chain.reads[:, ::-1].argmax(1), 0)
        return int(((pieces[:, 3] - pieces[:, 2]) * (last - chain.length)).sum())

    return min(chains, key=skipped)


def _cut(k: Layout, points: np.ndarray) -> np.ndarray:
    """The runs of keys cut at addresses: pieces ``(origin, row, address, end)`` in ascending address."""
    start = _addresses(k)
    points = distinct(np.concatenate([points, start, start + k.runs[:, 2]]))
    order = np.argsort(start)
    run = order[np.searchsorted(start[order], points[:-1], side="right") - 1]
    return np.column_stack([k.runs[run, 0], k.row0[run] + points[:-1] - start[run], points[:-1], points[1:]])
