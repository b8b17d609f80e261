"""Layouts as data: which rank holds which positions, as runs ``(rank, start, count)`` of one stride, with an exact inverse.

Eight tokens (columns) over two ranks (rows), and two documents of 3 and 5 tokens for the last two::

    contiguous    zigzag        stripe        contiguous-per-document   zigzag-per-document
    xxxx....      xx....xx      x.x.x.x.      xx.xx...                  x.xx...x
    ....xxxx      ..xxxx..      .x.x.x.x      ..x..xxx                  .x..xxx.

A rank's tokens are in ascending position, run by run. Lengths that do not divide are allowed everywhere: `contiguous` cuts as
``torch.chunk`` and DTensor do (the last ranks get less), the others as evenly as they can.
"""

from __future__ import annotations

import numpy as np

from .intervals import ranges

PACKINGS = 64
"""Packings whose masks, layouts and plans are cached: one of a million tokens in a thousand documents takes up to 14 MB."""


class Layout:
    """An immutable assignment of positions ``0 .. length-1`` to ranks, compared by content.

    Args:
        runs: int array ``[n, 3]`` of ``(rank, start, count)``: `count` positions ``start, start + stride, ...``.
        length: number of positions; each must be in exactly one run.
        world_size: number of ranks; a rank may hold nothing.
        stride: the one stride of all runs.

    Raises:
        ValueError: the runs hold more positions or fewer, or are of other ranks.

    Example:
        >>> zigzag(8, 2).positions(0)
        array([0, 1, 6, 7])
    """

    def __init__(self, runs: np.ndarray, length: int, world_size: int, stride: int = 1) -> None:
        runs = np.asarray(runs, dtype=np.int64).reshape(-1, 3)
        runs = runs[runs[:, 2] > 0]
        if len(runs) and not 0 <= runs[:, 0].min() <= runs[:, 0].max() < world_size:
            raise ValueError(f"runs of ranks {runs[:, 0].min()} to {runs[:, 0].max()}: give some of ranks 0 to {world_size - 1}")
        runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]
        if len(runs) and stride == 1:  # neighbours on one rank are one run
            joins = (runs[1:, 0] == runs[:-1, 0]) & (runs[:-1, 1] + runs[:-1, 2] == runs[1:, 1])
            first = np.flatnonzero(np.concatenate([[True], ~joins]))
            runs = np.column_stack([runs[first, :2], np.add.reduceat(runs[:, 2], first)])
        self.runs = runs
        self.runs.flags.writeable = False
        self.length, self.world_size, self.stride = int(length), int(world_size), int(stride)
        self.counts = np.bincount(runs[:, 0], weights=runs[:, 2], minlength=world_size).astype(np.int64)
        self.number0 = np.cumsum(runs[:, 2]) - runs[:, 2]
        """Number of each run's first row when the rows of rank 0, 1, 2 ... are counted through, from 0 on."""
        self.rank0 = np.cumsum(self.counts) - self.counts
        """Number of each rank's first row in the same count."""
        self.row0 = self.number0 - self.rank0[runs[:, 0]]
        """Local row of each run's first position."""
        self.ascends = stride == 1 or len(np.unique(runs[:, 0])) == len(runs)
        """A rank's rows are in the order of their positions; not so if it holds several runs of a stride."""
        self._key = (self.length, self.world_size, self.stride, runs.tobytes())
        self._hash = hash(self._key)
        if self.counts.sum() != length:
            raise ValueError(f"a layout holds every position once: these runs hold {int(self.counts.sum())}, length is {length}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Layout({len(self.runs)} runs of stride {self.stride}, length={self.length}, world_size={self.world_size})"

    def positions(self, rank: int) -> np.ndarray:
        """The positions that `rank` holds, in the order of its rows: int64 ``[counts[rank]]``."""
        _, start, count = self.runs[self.runs[:, 0] == rank].T
        return ranges(start, count, self.stride)

    def owner(self) -> tuple[np.ndarray, np.ndarray]:
        """The inverse: for each position the rank that holds it and its row there, two int64 ``[length]`` arrays."""
        ranks, rows = np.empty(self.length, dtype=np.int64), np.empty(self.length, dtype=np.int64)
        for rank in range(self.world_size):
            positions = self.positions(rank)
            ranks[positions], rows[positions] = rank, np.arange(len(positions))
        return ranks, rows


def joined(*layouts: Layout) -> Layout:
    """The layout of sequences that are cut one by one and put end to end on each rank, as text and image of joint attention.

    Positions are those of the sequences end to end: the second one's begin where the first one ends.

    Args:
        layouts: of one number of ranks and one stride.

    Raises:
        ValueError: none, or of several numbers of ranks or strides.

    Example:
        >>> joined(contiguous(4, 2), contiguous(6, 2)).positions(1)
        array([2, 3, 7, 8, 9])
    """
    kinds = {(each.world_size, each.stride) for each in layouts}
    if len(kinds) != 1:
        raise ValueError(f"layouts of {sorted(kinds)} ranks and strides: give some of one number of ranks and one stride")
    ((world_size, stride),) = kinds
    start = np.cumsum([0, *(each.length for each in layouts)])
    runs = [each.runs + np.array([0, at, 0]) for each, at in zip(layouts, start[:-1], strict=True)]
    return Layout(np.concatenate(runs), int(start[-1]), world_size, stride)


def contiguous(length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """Rank `r` holds chunk `r` of `world_size`, cut as ``torch.chunk`` cuts; `cu_seqlens` is not looked at."""
    chunk = -(-length // world_size)
    start = np.minimum(np.arange(world_size) * chunk, length)
    count = np.minimum(start + chunk, length) - start
    return Layout(np.column_stack([np.arange(world_size), start, count]), length, world_size)


def zigzag(length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """Rank `r` holds chunks `r` and ``2 * world_size - 1 - r``: equal work under a causal mask; `cu_seqlens` is not looked at."""
    return zigzag_per_document(length, world_size, np.array([0, length]))


def stripe(length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """Rank `r` holds every `world_size`-th position from `r` on (striped attention); `cu_seqlens` is not looked at."""
    start = np.arange(world_size)
    count = np.maximum(0, -(-(length - start) // world_size))
    return Layout(np.column_stack([start, start, count]), length, world_size, stride=world_size)


def contiguous_per_document(length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """Each document cut in `world_size` contiguous parts, part `r` on rank `r`."""
    start, parts = _parts(length, world_size, cu_seqlens)
    first = start[:, None] + np.cumsum(parts, axis=1) - parts
    ranks = np.broadcast_to(np.arange(world_size), parts.shape)
    return Layout(np.column_stack([ranks.ravel(), first.ravel(), parts.ravel()]), length, world_size)


def zigzag_per_document(length: int, world_size: int, cu_seqlens: np.ndarray | None = None) -> Layout:
    """Each document cut in ``2 * world_size`` chunks, chunks `r` and ``2 * world_size - 1 - r`` on rank `r`."""
    start, parts = _parts(length, world_size, cu_seqlens)
    early = -(-parts // 2)
    chunks = np.concatenate([early, (parts - early)[:, ::-1]], axis=1)
    first = start[:, None] + np.cumsum(chunks, axis=1) - chunks
    ranks = np.broadcast_to(np.concatenate([np.arange(world_size), np.arange(world_size)[::-1]]), chunks.shape)
    return Layout(np.column_stack([ranks.ravel(), first.ravel(), chunks.ravel()]), length, world_size)


def _parts(length: int, world_size: int, cu_seqlens: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the documents, and the tokens of each ``[document, rank]``, as even as possible.

    The tokens that a document leaves over go to the ranks in turn, so that many short documents do not pile up on rank 0.
    """
    cu = np.array([0, length]) if cu_seqlens is None else np.asarray(cu_seqlens, dtype=np.int64)
    lengths = np.diff(cu)
    over = lengths % world_size
    turn = (np.cumsum(over) - over)[:, None]
    extra = (np.arange(world_size) - turn) % world_size < over[:, None]
    return cu[:-1], lengths[:, None] // world_size + extra
