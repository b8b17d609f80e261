"""The lemma and its tools, against dense masks and brute force on thousands of random cases."""

from __future__ import annotations

import numpy as np
import pytest

from nnscaler_ring.core import geometry, intervals
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.core.mask import NO_LIMIT
from tests.shapes import KINDS, WORLDS, random_mask

CASES = 400


def covered(bands: np.ndarray, num_q: int, num_k: int) -> np.ndarray:
    """How often each pair is in a band ``(i0, i1, j0, j1, low, high)``."""
    count = np.zeros((num_q, num_k), dtype=int)
    for i0, i1, j0, j1, low, high in bands.tolist():
        assert 0 <= i0 < i1 <= num_q and 0 <= j0 < j1 <= num_k
        distance = np.arange(j0, j1) - np.arange(i0, i1)[:, None]
        count[i0:i1, j0:j1] += (distance >= low) & (distance <= high)
    return count


def assert_trimmed(bands: np.ndarray) -> None:
    """Every row sees a key, every key is seen, and a limit that is given excludes something."""
    for i0, i1, j0, j1, low, high in bands.tolist():
        seen = covered(np.array([[0, i1 - i0, 0, j1 - j0, low - j0 + i0, high - j0 + i0]]), i1 - i0, j1 - j0)
        assert seen.any(0).all() and seen.any(1).all()
        assert low == -NO_LIMIT or low > j0 - (i1 - 1)
        assert high == NO_LIMIT or high < j1 - 1 - i0


def random_layouts(rng: np.random.Generator, q_len: int, k_len: int, cu_q: list[int] | None, cu_k: list[int] | None):
    """Two layouts of one world and one stride."""
    name, world = list(LAYOUTS)[rng.integers(len(LAYOUTS))], WORLDS[rng.integers(len(WORLDS))]
    cus = [None if cu is None else np.array(cu) for cu in (cu_q, cu_k)]
    return tuple(LAYOUTS[name](length, world, cu) for length, cu in zip((q_len, k_len), cus, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_lemma(kind: str) -> None:
    """The bands between two ranks' rows cover exactly the visible pairs, each once, and are trimmed."""
    rng = np.random.default_rng(KINDS.index(kind))
    for n in range(CASES):
        q_len, k_len = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        case = random_mask(rng, q_len, q_len if n % 3 else k_len, kind, packed=n % 2 == 0)
        q, k = random_layouts(rng, case.q_len, case.k_len, case.cu_q, case.cu_k)
        mask, seen = case.mask(), case.seen()
        bands = geometry.visible(mask, q, k)
        for reader in range(q.world_size):
            mine = geometry.visible(mask, q, k, reader=reader)
            np.testing.assert_array_equal(mine, bands[bands[:, 0] == reader])
            for origin in range(k.world_size):
                here = mine[mine[:, 1] == origin]
                at = np.ix_(q.positions(reader), k.positions(origin))
                count = covered(here[:, 2:], int(q.counts[reader]), int(k.counts[origin]))
                np.testing.assert_array_equal(count, seen[at], err_msg=f"{case} {q} rank {reader} reads rank {origin}")
        origin = int(rng.integers(k.world_size))
        rows = geometry.visible(mask, q, k, origin=origin)
        assert sorted(rows.tolist()) == sorted(bands[bands[:, 1] == origin].tolist())
        assert_trimmed(bands[:, 2:])


@pytest.mark.parametrize("kind", KINDS)
def test_windows_say_the_same_aligned_at_the_last_row_and_key(kind: str) -> None:
    """And join keeps the pairs exactly, in no more bands."""
    rng = np.random.default_rng(50 + KINDS.index(kind))
    shorter = 0
    for n in range(CASES):
        case = random_mask(rng, int(rng.integers(1, 32)), int(rng.integers(1, 32)), kind, packed=n % 2 == 0)
        q, k = random_layouts(rng, case.q_len, case.k_len, case.cu_q, case.cu_k)
        one = Layout(np.array([[0, 0, k.length]]), k.length, 1)
        keys = one if q.stride == 1 and rng.random() < 0.5 else k  # all in natural order as in a buffer, or those of a rank
        bands = geometry.visible(case.mask(), q, keys, reader=0, origin=0)[:, 2:]
        sizes = int(q.counts[0]), int(keys.counts[0])
        count = covered(bands, *sizes)
        joined = geometry.join(bands)
        np.testing.assert_array_equal(covered(joined, *sizes), count, err_msg=str(case))
        assert len(joined) <= len(bands)
        assert_trimmed(joined)
        shorter += len(joined) < len(bands)
        for (_, i1, _, j1, low, high), (left, right) in zip(joined.tolist(), geometry.windows(joined).tolist(), strict=True):
            align = j1 - i1
            assert left == -1 if low == -NO_LIMIT else align - left == low and left >= 0
            assert right == -1 if high == NO_LIMIT else align + right == high and right >= 0
    assert shorter or kind == "full"


def test_join_makes_one_call_of_what_is_one() -> None:
    causal = (-NO_LIMIT, 0)
    own_chunks = [(0, 4, 0, 4, *causal), (4, 8, 4, 8, *causal), (4, 8, 0, 4, -NO_LIMIT, NO_LIMIT)]
    assert geometry.join(np.array(own_chunks)).tolist() == [[0, 8, 0, 8, *causal]]
    side_by_side = [(0, 4, 4 * n, 4 * n + 4, -NO_LIMIT, NO_LIMIT) for n in (2, 0, 3, 1)]
    assert geometry.join(np.array(side_by_side)).tolist() == [[0, 4, 0, 16, -NO_LIMIT, NO_LIMIT]]
    documents = [(0, 4, 0, 4, *causal), (4, 8, 4, 8, *causal)]
    assert len(geometry.join(np.array(documents))) == 2


def test_overlaps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        a0, b0 = rng.integers(0, 30, rng.integers(0, 8)), rng.integers(0, 30, rng.integers(0, 8))
        a1, b1 = a0 + rng.integers(-2, 8, len(a0)), b0 + rng.integers(1, 8, len(b0))
        n, m = intervals.overlaps(a0, a1, b0, b1)
        brute = {(x, y) for x in range(len(a0)) for y in range(len(b0)) if max(a0[x], b0[y]) < min(a1[x], b1[y])}
        found = list(zip(n.tolist(), m.tolist(), strict=True))
        assert set(found) == brute and len(found) == len(brute)


def test_union_is_what_the_intervals_of_each_key_cover() -> None:
    rng = np.random.default_rng(0)
    for n in range(1000):
        num, length = int(rng.integers(0, 9)), 24
        keys = rng.integers(0, 3, num)
        lo = rng.integers(0, length, num)
        hi = np.minimum(lo + rng.integers(1, 12, num), length)
        breaks = None
        if n % 2:
            at = rng.integers(0, length, (3, 2))
            breaks = np.repeat(np.arange(3), 2), at.ravel()
        covered, got = np.zeros((3, length), dtype=bool), np.zeros((3, length), dtype=bool)
        for key, a, b in zip(keys, lo, hi, strict=True):
            covered[key, a:b] = True
        pieces = np.stack(intervals.union(keys, lo, hi, breaks), axis=1)
        for key, a, b in pieces.tolist():
            assert not got[key, a:b].any() and a < b, "disjoint"
            got[key, a:b] = True
        np.testing.assert_array_equal(got, covered)
        walls = set() if breaks is None else set(zip(breaks[0].tolist(), breaks[1].tolist(), strict=True))
        assert all(not a < at < b for key, a, b in pieces.tolist() for k, at in walls if k == key), "none reaches across"
        assert pieces[:, :2].tolist() == sorted(pieces[:, :2].tolist())
        for one, two in zip(pieces[:-1].tolist(), pieces[1:].tolist(), strict=True):
            touch = one[0] == two[0] and one[2] == two[1]
            assert not touch or (two[0], two[1]) in walls, "as few pieces as can be"


def test_coalesce() -> None:
    assert intervals.coalesce(np.array([[0, 2], [2, 5], [6, 7], [7, 8], [8, 9]])).tolist() == [[0, 5], [6, 9]]
    assert intervals.coalesce(np.array([[1, 2]])).tolist() == [[1, 2]]
    assert len(intervals.coalesce(np.empty((0, 2), dtype=np.int64))) == 0
