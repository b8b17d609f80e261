"""Cutting a band into pieces that a kernel with only `full`, top-left `causal` and masks can compute without waste.

Eight rows and keys of a causal window; ``T`` marks one of the tiles that slide along the band, all of one shape, so that they are
one batched call with one small mask::

    x.......      A long triangle is one causal call. A shorter one, and any band, is tiles of `tile` rows, each with the keys
    xx......      that its rows see: at most about 1/8 more than visible. What all rows see is a plain rectangle.
    xxx.....
    .TTT....
    ..TTT...
    ...xxx..
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ..mask import NO_LIMIT
from .base import Window

LONG = 4096
"""Rows from which a triangle is one causal call. Torch's CPU kernel computes whole blocks of 256 rows and 512 keys of it, which
wastes more than tiles do below (measured on one core: 2,048 rows 1.25 x the visible pairs, 1,024 rows 1.5 x)."""


class Kind(Enum):
    """How a piece is computed."""

    FULL = "every row sees every key"
    CAUSAL = "row i sees keys 0 .. i, aligned at the first row and key"
    ANTI = "row i sees keys i .. last, aligned at the last row and key: causal, read backwards"
    BAND = "row i sees keys i + low .. i + high"


class Piece(NamedTuple):
    """Rows ``i0:i1`` and keys ``j0:j1`` relative to the span; `repeat` pieces like it follow, each `i1 - i0` further along."""

    kind: Kind
    i0: int
    i1: int
    j0: int
    j1: int
    low: int = 0
    high: int = 0
    repeat: int = 1


def pieces(num_q: int, num_k: int, window: Window) -> list[Piece]:
    """Disjoint pieces of a trimmed span of `num_q` rows and `num_k` keys under a bottom-right aligned window."""
    left, right = window
    low, high = num_k - num_q - left, num_k - num_q + right
    from_first, to_last = left < 0 or low <= 1 - num_q, right < 0 or high >= num_k - 1  # no limit, or one that excludes nothing
    if from_first and to_last:
        return [Piece(Kind.FULL, 0, num_q, 0, num_k)]
    if from_first:
        return _below(num_q, num_k, high)
    if to_last:
        return [_backwards(piece, num_q, num_k) for piece in _below(num_q, num_k, num_k - num_q - low)]
    return _wide(num_q, num_k, low, high) if high - low + 1 >= LONG // 2 else _along(0, num_q, num_k, low, high)


def _below(num_q: int, num_k: int, high: int) -> list[Piece]:
    """Row i sees keys ``0 .. i + high``: a rectangle that all rows see, a triangle, and rows below it that see everything."""
    size = num_k - high
    if size < LONG // 2 and high <= size:  # short: the rectangle comes along in the triangle's tiles
        found = _along(0, size, num_k, -NO_LIMIT, high)
    else:
        found = [Piece(Kind.FULL, 0, size, 0, high)] if high > 0 else []
        found += _triangle(0, high, size)
    return [*found, Piece(Kind.FULL, size, num_q, 0, num_k)] if size < num_q else found


def _triangle(i0: int, j0: int, size: int) -> list[Piece]:
    """Row ``i0 + n`` sees keys ``j0 .. j0 + n``: one causal call, or two triangles and a rectangle, or tiles."""
    if size >= LONG:
        return [Piece(Kind.CAUSAL, i0, i0 + size, j0, j0 + size)]
    if size < LONG // 2:
        return [p._replace(j0=j0) for p in _along(i0, i0 + size, j0 + size, -NO_LIMIT, j0 - i0)]
    half = size // 2
    box = Piece(Kind.FULL, i0 + half, i0 + size, j0, j0 + half)
    return [*_triangle(i0, j0, half), box, *_triangle(i0 + half, j0 + half, size - half)]


def _wide(num_q: int, num_k: int, low: int, high: int) -> list[Piece]:
    """A wide band: as many rows at a time as it is wide see it as two triangles side by side, each with one limit."""
    found: list[Piece] = []
    width = high - low + 1
    for i0 in range(0, num_q, width):
        i1 = min(i0 + width, num_q)
        middle = min(max(i0 + high, 0), num_k)  # keys before it have no limit on the right, from it on none on the left
        first, rows = max(0, i0 + low), min(i1, middle - low) - i0
        if first < middle and rows > 0:
            left = middle - low - i0 - rows
            found += [_moved(piece, i0, first) for piece in pieces(rows, middle - first, (left, -1))]
        begin, end = max(i0, middle - high), min(num_k, i1 + high)
        if middle < end and begin < i1:
            found += [_moved(piece, begin, middle) for piece in pieces(i1 - begin, end - middle, (-1, high + i1 - end))]
    return found


def _moved(piece: Piece, i0: int, j0: int) -> Piece:
    """A piece of rows and keys that are counted from ``(i0, j0)``."""
    rows, keys = (piece.i0 + i0, piece.i1 + i0), (piece.j0 + j0, piece.j1 + j0)
    return Piece(piece.kind, *rows, *keys, piece.low + j0 - i0, piece.high + j0 - i0, piece.repeat)


def _backwards(piece: Piece, num_q: int, num_k: int) -> Piece:
    """A piece with rows and keys numbered from the other end."""
    kind = Kind.ANTI if piece.kind is Kind.CAUSAL else piece.kind
    end = num_k - num_q
    rows, keys = (num_q - piece.i1, num_q - piece.i0), (num_k - piece.j1, num_k - piece.j0)
    return Piece(kind, *rows, *keys, end - piece.high, end - piece.low)


def _along(start: int, stop: int, num_k: int, low: int, high: int) -> list[Piece]:
    """Rows ``start .. stop - 1``, row i sees keys ``i + low .. i + high``: tiles, those with all their keys inside as one piece."""
    width = min(high - low + 1, stop - start)
    tile = max(1, min(stop - start, max(64, min(512, width // 8 // 64 * 64))))
    found: list[Piece] = []
    for i0 in range(start, stop, tile):
        i1 = min(i0 + tile, stop)
        j0, j1 = max(0, i0 + low), min(num_k, i1 + high)
        inside = i1 - i0 == tile and i0 + low >= 0 and i1 + high <= num_k
        last = found[-1] if found else None
        if inside and last and last.i0 + low >= 0 and last.i1 - last.i0 == tile and last.j1 - last.j0 == j1 - j0:
            found[-1] = last._replace(repeat=last.repeat + 1)
        else:
            found.append(Piece(Kind.BAND, i0, i1, j0, j1, low, high))
    return found
