"""The layout that balances any mask: equal tokens and equal work on every rank, and few rows to send.

Zigzag balances one causal sequence, contiguous a full one; packed documents need more. Eight tokens (columns) in documents of
three and five, seen by the rows that rank a or b holds; the tail of the long one goes to the rank with the whole short one::

    contiguous    zigzag        balanced
    a.......      a.......      a.......
    aa......      aa......      aa......
    aaa.....      bbb.....      aaa.....
    ...a....      ...b....      ...b....
    ...bb...      ...bb...      ...bb...
    ...bbb..      ...bbb..      ...bbb..
    ...bbbb.      ...aaaa.      ...bbbb.
    ...bbbbb      ...aaaaa      ...aaaaa
    7 and 14      12 and 9      11 and 10 pairs

Ranks are dealt in turn, each its part of what is left, in tokens and in tiles. A rank takes the tail of the longest document and
fills up with the lightest tokens there are, as many tail rows as then fit: by the intermediate value theorem a rank can always
meet the mean, so what is left has the same mean. This is zigzag, but over documents. It keeps traffic low: what a rank receives
is about the place where its last piece of a document ends, so few ranks should hold late pieces, each as much as it can; short
documents stay whole. Where rows of tiles are too coarse to make ranks even, whole documents of middling length do, and a last
exchange of rows between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from . import layout
from .cost import TILE, band_tiles, one_band_tiles
from .geometry import trim
from .intervals import overlaps, ranges
from .layout import Layout
from .mask import Mask

EVEN = 1.02
"""Most loaded rank over the mean up to which a layout counts as balanced."""

ROWS = 8
"""Rows of tiles that a rank has at least: with fewer, work is counted in smaller tiles."""

# Relative to a rank's part of the work:
NEAR = 0.006  # amounts that differ by less are equal
OVER = 0.012  # a rank may go this far above its part for one more row of a tail: less traffic
GOAL = 0.015  # ranks above this exchange rows with others

Piece = tuple[int, int, int]
"""Rows ``[a, b)`` of a segment, counted from its light end: ``(segment, a, b)``."""


def balanced(mask: Mask, world_size: int) -> Layout:
    """Equal numbers of tokens on all ranks (within one), and equal work: most loaded rank over the mean at most `EVEN`.

    Work is counted in tiles of 128 x 128 that a kernel computes, in smaller ones where a rank has less than `ROWS` rows of them.
    Contiguous where that is balanced; for one sequence zigzag where that is; otherwise dealt as this module says. Where tokens are
    too few or the mask is too coarse for `EVEN`, what comes nearest. Deterministic: every rank gets the same layout.

    Args:
        mask: who sees whom, of as many queries as keys.
        world_size: number of ranks.

    Raises:
        ValueError: the mask has another number of keys than of queries.

    Example:
        >>> from nnscaler_ring.core import mask
        >>> balanced(mask.build(8, causal=True, cu_seqlens_q=[0, 3, 8]), 2).runs.tolist()
        [[0, 0, 3], [0, 7, 1], [1, 3, 4]]
    """
    if mask.q_len != mask.k_len:
        raise ValueError(
            f"a balanced layout holds queries and keys alike, but the mask has {mask.q_len} queries and {mask.k_len} keys: choose "
            "another layout"
        )
    length = mask.q_len
    share = np.full(world_size, length // world_size)
    share[: length % world_size] += 1
    even = Layout(np.column_stack([np.arange(world_size), np.cumsum(share) - share, share]), length, world_size)
    if world_size == 1 or not len(mask.table):
        return even
    tile = TILE
    while tile > 1 and tile * ROWS > length // world_size:
        tile //= 2
    segments = _Segments(mask, tile)
    builders = [lambda: even, lambda: layout.zigzag(length, world_size), lambda: _dealt(segments, share.tolist())]
    if len(segments.start) > 1:
        builders[1:] = builders[:0:-1]  # packed documents: dealing comes before zigzag
    tried: list[tuple[float, Layout]] = []
    for build in builders:
        held = build()
        work = segments.work(held)
        tried.append((work.max() / max(1.0, work.mean()), held))
        if tried[-1][0] <= EVEN:
            return held
    best = min(uneven for uneven, _ in tried)
    return next(held for uneven, held in tried if uneven <= best + NEAR)


class _Segments:
    """Maximal ranges of rows that lie in the same slices of a mask (mostly: documents), and what pieces of them cost."""

    def __init__(self, mask: Mask, tile: int) -> None:
        q0, q1 = mask.table[:, 0], mask.table[:, 1]
        cuts = np.unique(np.concatenate([[0, mask.q_len], q0, q1]))
        self.tile, self.start, self.stop = tile, cuts[:-1], cuts[1:]
        band, segment = overlaps(q0, q1, self.start, self.stop)
        order = np.argsort(segment, kind="stable")
        self._bands = mask.table[band[order], 2:]
        self._first_band = np.searchsorted(segment[order], np.arange(len(cuts)))
        row = np.minimum(tile, self.stop - self.start)
        everything = np.arange(len(self.start))
        self.costs = self.tiles(everything, self.start, self.stop)
        """Tiles of each segment."""
        first, last = self.tiles(everything, self.start, self.start + row), self.tiles(everything, self.stop - row, self.stop)
        self.depths = np.maximum(first, last)
        """Tiles of the last row of tiles at each segment's heavy end."""
        bands = self._bands.tolist()
        self._lists = [bands[a:b] for a, b in pairwise(self._first_band.tolist())]
        self._falls, self._starts, self._stops = (first > last).tolist(), self.start.tolist(), self.stop.tolist()

    def tiles(self, segment: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Tiles of the rows at positions ``[a, b)``, which lie in `segment`, elementwise."""
        count = self._first_band[segment + 1] - self._first_band[segment]
        at = np.repeat(np.arange(len(segment)), count)
        k0, k1, lo, hi = self._bands[ranges(self._first_band[segment], count)].T
        i0, i1, j0, j1, low, high = trim(a[at], b[at], k0, k1, lo, hi)
        tiles = band_tiles(i0, i1, j0, j1, low, high, self.tile)
        return np.bincount(at, tiles, minlength=len(segment)).astype(np.int64)

    def work(self, held: Layout) -> np.ndarray:
        """Tiles of each rank."""
        rank, start, count = held.runs.T
        run, segment = overlaps(start, start + count, self.start, self.stop)
        a, b = np.maximum(start[run], self.start[segment]), np.minimum((start + count)[run], self.stop[segment])
        return np.bincount(rank[run], self.tiles(segment, a, b), minlength=held.world_size)

    def positions(self, segment: int, a: int, b: int) -> tuple[int, int]:
        """The positions ``[start, stop)`` of a piece."""
        if self._falls[segment]:
            return self._stops[segment] - b, self._stops[segment] - a
        return self._starts[segment] + a, self._starts[segment] + b

    def cost(self, segment: int, a: int, b: int) -> int:
        """Tiles of one piece."""
        i0, i1 = self.positions(segment, a, b)
        return sum(one_band_tiles(i0, i1, k0, k1, lo, hi, self.tile) for k0, k1, lo, hi in self._lists[segment])

    def last_row(self, segment: int, a: int, b: int) -> int:
        """Tiles of the last row of tiles of a piece, in the grid that starts at the segment's light end."""
        return self.cost(segment, self.cut(a, b, 1), b)

    def cut(self, a: int, b: int, rows: int) -> int:
        """Where the last `rows` rows of tiles of ``[a, b)`` begin, in that grid."""
        return max(a, (-(-b // self.tile) - rows) * self.tile)


class _Stock:
    """What is not dealt yet: of each segment the rows ``[head, tail)``; segments in the order of tiles a token, lightest first."""

    def __init__(self, segments: _Segments) -> None:
        self.segments = segments
        self.length, self.cost, self.depth = segments.stop - segments.start, segments.costs.copy(), segments.depths.copy()
        self.density = self.cost / self.length
        self.head, self.tail = [0] * len(self.length), self.length.tolist()
        self.order = np.argsort(self.density, kind="stable")
        self._sum()

    def _sum(self) -> None:
        self.tokens = np.concatenate([[0], np.cumsum(self.length[self.order])])
        self.tiles = np.concatenate([[0], np.cumsum(self.cost[self.order])])

    def _changed(self, segment: int) -> None:
        order, (a, b) = self.order[self.order != segment], (self.head[segment], self.tail[segment])
        if a < b:
            self.length[segment], self.cost[segment] = b - a, self.segments.cost(segment, a, b)
            self.depth[segment] = self.segments.last_row(segment, a, b)
            self.density[segment] = self.cost[segment] / (b - a)
            order = np.insert(order, np.searchsorted(self.density[order], self.density[segment]), segment)
        self.order = order
        self._sum()

    def deepest(self) -> int:
        """The segment with the heaviest last row of tiles."""
        return int(self.order[self.depth[self.order].argmax()])

    def take_tail(self, segment: int, at: int) -> Piece:
        """Remove and return the rows of a segment from `at` on."""
        piece = segment, at, self.tail[segment]
        self.tail[segment] = at
        self._changed(segment)
        return piece

    def lightest(self, tokens: int) -> int:
        """Tiles of the lightest `tokens` tokens: whole segments, and the head of the one after them."""
        count = int(self.tokens.searchsorted(tokens, side="right")) - 1
        total, rest = int(self.tiles[count]), tokens - int(self.tokens[count])
        if rest:
            segment = int(self.order[count])
            total += self.segments.cost(segment, self.head[segment], self.head[segment] + rest)
        return total

    def take_lightest(self, tokens: int) -> list[Piece]:
        """Remove and return them."""
        count = int(self.tokens.searchsorted(tokens, side="right")) - 1
        rest = tokens - int(self.tokens[count])
        pieces = [(segment, self.head[segment], self.tail[segment]) for segment in self.order[:count].tolist()]
        self.order = self.order[count:]
        if rest:
            segment = int(self.order[0])
            pieces.append((segment, self.head[segment], self.head[segment] + rest))
            self.head[segment] += rest
            self._changed(segment)
        else:
            self._sum()
        return pieces


def _dealt(segments: _Segments, share: Sequence[int]) -> Layout:
    stock, hands = _Stock(segments), []
    for rank, tokens in enumerate(share):
        part = int(stock.tiles[-1]) / (len(share) - rank)
        hands.append(_Hand(stock, tokens, part).dealt() if len(stock.order) else [])
    _exchange(segments, hands)
    runs = [(rank, a, b - a) for rank, hand in enumerate(hands) for a, b in (segments.positions(*piece) for piece in hand)]
    return Layout(np.array(runs), sum(share), len(share))


class _Hand:
    """What one rank gets: `pieces` so far, and how many `tokens` and how much `work` it still lacks."""

    def __init__(self, stock: _Stock, tokens: int, part: float) -> None:
        self.stock, self.tokens, self.work, self.part = stock, tokens, part, part
        self.pieces: list[Piece] = []

    def dealt(self) -> list[Piece]:
        """The pieces of this rank, taken from the stock."""
        self._long_tail()
        for _ in range(6):
            if self._lacks() <= NEAR * self.part or not self._whole_segment():
                break
        if self._lacks() > OVER * self.part:
            self._short_tail()
        return self.pieces + self.stock.take_lightest(self.tokens)

    def _lacks(self) -> float:
        """Work that is lacking even if the other tokens are the lightest there are."""
        return self.work - self.stock.lightest(self.tokens)

    def _take(self, segment: int, at: int) -> None:
        piece = self.stock.take_tail(segment, at)
        self.pieces.append(piece)
        self.tokens -= piece[2] - piece[1]
        self.work -= self.stock.segments.cost(*piece)

    def _cuts(self, segment: int, work: float) -> list[tuple[int, int]]:
        """``(total, at)`` of tails from `at` on, `total` with the lightest fill: a bisection for a total of `work`."""
        stock, segments, cuts = self.stock, self.stock.segments, []
        a, b = stock.head[segment], stock.tail[segment]
        few, many = 0, min(self.tokens // segments.tile, -(-b // segments.tile) - a // segments.tile)
        while few < many:
            rows = (few + many + 1) // 2
            at = segments.cut(a, b, rows)
            total = segments.cost(segment, at, b) + stock.lightest(self.tokens - (b - at))
            cuts.append((total, at))
            few, many = (rows, many) if total <= work else (few, rows - 1)
        return cuts

    def _long_tail(self) -> None:
        """As much as fits of the tail of the deepest segment, if it does not fit whole."""
        stock, limit = self.stock, self.part * (1 + OVER)
        segment = stock.deepest()
        length, cost = int(stock.length[segment]), int(stock.cost[segment])
        if length > self.tokens or cost + stock.lightest(self.tokens - length) > self.part * (1 + NEAR):
            cuts = [cut for cut in self._cuts(segment, limit) if cut[0] <= limit]
            if cuts:
                self._take(segment, max(cuts)[1])

    def _whole_segment(self) -> bool:
        """The segment that, taken whole in place of fill, adds the most of what is lacking; False where none adds a tenth."""
        stock, lacks = self.stock, self._lacks()
        rest = self.tokens - stock.length[stock.order]
        gain = stock.cost[stock.order] + np.interp(rest, stock.tokens, stock.tiles) - (self.work - lacks)
        is_fill = stock.tokens[1:] <= self.tokens
        gain[(rest < 0) | is_fill | (gain > lacks + NEAR * self.part)] = 0
        at = int(gain.argmax())
        if gain[at] < 0.1 * lacks:
            return False
        segment = int(stock.order[at])
        self._take(segment, stock.head[segment])
        return True

    def _short_tail(self) -> None:
        """The tail of a segment that comes nearest to what is lacking; of those that are near, of the shortest segment."""
        stock, work = self.stock, self.work
        margin = stock.lightest(self.tokens) - stock.lightest(max(0, self.tokens - stock.segments.tile))
        gain = stock.depth[stock.order] - margin  # of one row of tiles
        able = np.flatnonzero(gain > 0)
        able = able[np.abs(gain[able] - self._lacks()).argsort(kind="stable")[:8]]
        choices = [
            (max(abs(total - work), NEAR * self.part), stock.tail[segment], segment, at)
            for segment in stock.order[able].tolist()
            for total, at in self._cuts(segment, work)
        ]
        if choices and min(choices)[0] < self._lacks():
            self._take(*min(choices)[2:])


def _exchange(segments: _Segments, hands: list[list[Piece]]) -> None:
    """Ranks above `GOAL`, the most loaded first, give rows to ranks below the mean for as many lighter ones."""
    hands[:] = map(_joined, hands)
    work = [sum(segments.cost(*piece) for piece in hand) for hand in hands]
    mean = sum(work) / len(work)
    stuck: set[int] = set()
    for _ in range(4 * len(hands)):
        ranked = sorted((tiles, rank) for rank, tiles in enumerate(work) if rank not in stuck)
        if not ranked or ranked[-1][0] <= mean * (1 + GOAL):
            break
        high = ranked[-1][1]
        for tiles, low in ranked[:12]:
            if tiles >= mean:
                continue
            swapped = _swapped(segments, hands[high], hands[low], work[high] - mean, mean - tiles, NEAR * mean)
            if swapped:
                hands[high], hands[low] = swapped
                work[high], work[low] = (sum(segments.cost(*piece) for piece in hand) for hand in swapped)
                break
        else:
            stuck.add(high)


def _joined(hand: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for segment, a, b in sorted(hand):
        if joined and joined[-1][0] == segment and joined[-1][2] == a:
            a = joined.pop()[1]
        joined.append((segment, a, b))
    return joined


def _swapped(
    segments: _Segments, high: list[Piece], low: list[Piece], over: float, under: float, near: float
) -> tuple[list[Piece], list[Piece]] | None:
    """Two hands after the best swap of a tail in `high` for as many tokens at a head in `low`; None where none helps.

    `over` and `under` are how far the first is above the mean and the second below; what is `near` the mean is as good as on it.
    """
    wanted = min(over, under) if min(over, under) > near else (over + under) / 2
    tails = [(segments.last_row(*piece), piece) for piece in high]
    heads = [(segments.cost(s, a, a + segments.tile), (s, a, b)) for s, a, b in low if b - a >= segments.tile]
    pairs = [
        (abs(rows * (more - less) - wanted), rows, tail, head)
        for more, tail in tails
        for less, head in heads
        if more > less and (rows := max(1, round(wanted / (more - less))))
    ]
    best, swap = max(over, under) - near / 2, None
    for _, guess, (u, a, b), (v, c, d) in sorted(pairs)[:8]:
        whole, other = segments.cost(u, a, b), segments.cost(v, c, d)
        for at in (segments.cut(a, b, guess), segments.cut(a, b, guess + 1)):
            upto = c + b - at
            if upto > d:
                continue
            kept = segments.cost(u, a, at) + segments.cost(v, c, upto)
            given = segments.cost(u, at, b) + segments.cost(v, upto, d)
            off = max(over - whole + kept, abs(given - other - under), near)
            if off + 1e-6 * (b + upto) < best:  # of equals the one that is read least
                best, swap = off + 1e-6 * (b + upto), ((u, a, b), (v, c, d), at, upto)
    if swap is None:
        return None
    (u, a, b), (v, c, d), at, upto = swap
    high = [piece for piece in high if piece != (u, a, b)] + [(u, a, at)] * (a < at) + [(v, c, upto)]
    low = [piece for piece in low if piece != (v, c, d)] + [(v, upto, d)] * (upto < d) + [(u, at, b)]
    return _joined(high), _joined(low)
