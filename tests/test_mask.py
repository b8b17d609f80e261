"""Masks: the builders against their definitions pair by pair, the algebra, and what is refused."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from nnscaler_ring.core.mask import NO_LIMIT, Mask, Slice, band_area, build, check_cu_seqlens, check_window
from tests.shapes import KINDS, random_mask


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_random_masks_mean_what_they_say(kind: str, packed: bool) -> None:
    rng = np.random.default_rng(KINDS.index(kind) + 100 * packed)
    for n in range(200):
        q_len = int(rng.integers(1, 30))
        case = random_mask(rng, q_len, q_len if n % 2 else int(rng.integers(1, 30)), kind, packed)
        mask, seen = case.mask(), case.seen()
        np.testing.assert_array_equal(mask.as_array(), seen, err_msg=str(case))
        assert mask.pairs == seen.sum(), case
        assert mask == Mask(mask.table, case.q_len, case.k_len), "disjoint and in range, or this raises"


def drawn(text: str) -> np.ndarray:
    return np.array([[c == "x" for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        (build(4), "xxxx xxxx xxxx xxxx"),
        (build(4, causal=True), "x... xx.. xxx. xxxx"),
        (build(4, window=(1, 0)), "x... xx.. .xx. ..xx"),
        (build(4, window=(0, 2)), "xxx. .xxx ..xx ...x"),
        (build(4, window=(-1, 1)), "xx.. xxx. xxxx xxxx"),
        (build(4, window=(1, 2), causal=True), "x... xx.. .xx. ..xx"),
        (build(4, window=(0, 0)), "x... .x.. ..x. ...x"),
        (build(2, 4, causal=True), "xxx. xxxx"),
        (build(4, 2, causal=True), ".. .. x. xx"),
        (build(4, 2, window=(0, 1)), ".. x. xx .x"),
        (build(4, causal=True, window=(1, 0), sinks=1), "x... xx.. xxx. x.xx"),
        (build(4, causal=True, sinks=2), "x... xx.. xxx. xxxx"),
        (build(4, causal=True, prefix=2), "xx.. xx.. xxx. xxxx"),
        (build(4, prefix=2), "xxxx xxxx xxxx xxxx"),
        (build(4, causal=True, cu_seqlens_q=[0, 1, 1, 4]), "x... .x.. .xx. .xxx"),
        (build(4, 3, causal=True, cu_seqlens_q=[0, 2, 4], cu_seqlens_k=[0, 0, 3]), "... ... xx. xxx"),
        (build(4, causal=True, window=(0, 0), sinks=1, cu_seqlens_q=[0, 2, 4]), "x... xx.. ..x. ..xx"),
    ],
)
def test_pictures(mask: Mask, picture: str) -> None:
    np.testing.assert_array_equal(mask.as_array(), drawn(picture))


def test_a_mask_is_its_content() -> None:
    a, b = build(8, causal=True), Mask([(0, 8, 0, 8, -NO_LIMIT, 0)], 8)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != build(8) and a != build(9, causal=True) and a != "a mask"
    assert build(4, 3, cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 3]) == build(4, 3)
    assert Mask([(0, 2, 0, 2)], 3, 3) != Mask([(0, 2, 0, 2)], 3, 4) != Mask([(0, 2, 0, 2)], 4, 4)
    assert Mask([], 3).pairs == 0 and not Mask([(1, 1, 0, 3)], 3).as_array().any()
    assert Mask([(0, 2, 0, 2)], 3) == Mask([(0, 2, 0, 2, -(1 << 60), 1 << 60)], 3), "no limit is no limit"
    with pytest.raises(ValueError, match="read-only"):
        a.table[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        a.parts[0] = 1
    assert repr(a) == f"Mask([(0, 8, 0, 8, {-NO_LIMIT}, 0)], q_len=8, k_len=8)"
    assert "20 slices" in repr(build(20, cu_seqlens_q=np.arange(21)))


def test_slices_that_count_a_pair_twice_are_refused() -> None:
    """Against brute force, with random slices that overlap about as often as not."""
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        slices = []
        for _ in range(rng.integers(2, 5)):
            q0, k0 = rng.integers(0, 6, 2).tolist()
            q1, k1 = (x + int(rng.integers(1, 6)) for x in (q0, k0))
            lo = k0 - q0 + int(rng.integers(-4, 3))
            slices.append((q0, q1, k0, k1, lo, lo + int(rng.integers(0, 7))))
        twice = (sum(Mask([each], 14).as_array().astype(int) for each in slices) > 1).any()
        if twice:
            refused += 1
            with pytest.raises(ValueError, match="share pairs, which would count twice"):
                Mask(slices, 14)
        else:
            Mask(slices, 14)
    assert 100 < refused < 300


@pytest.mark.parametrize("row", [(-1, 2, 0, 2), (0, 2, -1, 2), (0, 6, 0, 2), (0, 2, 0, 4)])
def test_slices_out_of_range_are_refused(row: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"leaves queries \[0, 5\) or keys \[0, 3\)"):
        Mask([row], 5, 3)


@pytest.mark.parametrize(
    ("row", "why"),
    [((0, 2, 0), "q0, q1, k0, k1"), ((0, 2, 0, 2, 1, 2, 3), "lo"), ((0, 2, 0, 1.5), "whole"), ((0, 1 << 70, 0, 2), "leaves")],
)
def test_slices_that_are_none_are_refused(row: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Mask([row], 5, 3)


@pytest.mark.parametrize("lengths", [(-1, 3), (3, -1), (4.5, 3), ("4", 3)])
def test_lengths_that_are_none_are_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"_len=.*number of positions"):
        Mask([], *lengths)


@pytest.mark.parametrize("far", [sys.maxsize, 1 << 63, 1 << 70])
def test_what_reaches_past_every_token_is_no_limit(far: int) -> None:
    """Also of documents with more queries than keys and the other way round, where a sum with it leaves 64 bits."""
    for lengths in ((6, 4), (4, 6), (6, 6)):
        for more in ({}, {"causal": True}, {"prefix": 3}, {"sinks": 2}, {"far": 2}):
            assert build(*lengths, window=(far, far), **more) == build(*lengths, **more)
        near = build(*lengths, causal=True, far=far)
        assert near.num_parts == 1 and near.pairs == build(*lengths, causal=True).pairs
    for name in ("sinks", "prefix"):
        about = {"causal": True, "window": (1, 0), "cu_seqlens_q": [0, 3, 6]}
        assert build(6, **about, **{name: far}) == build(6, **about, **{name: 6})
    assert Mask([(0, 4, 0, 4, -far, far)], 4) == Mask([(0, 4, 0, 4)], 4)


@pytest.mark.parametrize("window", [(-2, 0), (0, -2), (1, 2, 3), (1,), (1.5, 0)])
def test_windows_below_minus_one_are_refused(window: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"window_size=\(.*\): give \(left, right\)"):
        build(4, window=window)
    assert check_window((np.int64(3), -1)) == (3, -1)


@pytest.mark.parametrize("counts", [{"sinks": -1}, {"prefix": -1}])
def test_negative_counts_are_refused(counts: dict[str, int]) -> None:
    ((name, count),) = counts.items()
    with pytest.raises(ValueError, match=f"^{name}={count}: give a number of tokens >= 0$"):
        build(4, **counts)


@pytest.mark.parametrize(
    ("cu", "why"),
    [
        ([1, 8], "runs from 1 to 8"),
        ([0, 7], "runs from 0 to 7"),
        ([0, 9], "runs from 0 to 9"),
        ([0, 5, 3, 8], "must not decrease: 5 is followed by 3 at index 2"),
        ([], "1-D integer"),
        ([[0, 8]], "1-D integer"),
        ([0.0, 8.0], "1-D integer"),
        (8, "1-D integer"),
    ],
)
def test_faults_of_cu_seqlens_are_named(cu: object, why: str) -> None:
    with pytest.raises(ValueError, match=f"cu_seqlens_q .*{why}|cu_seqlens_q must.*{why}"):
        build(8, cu_seqlens_q=cu)
    with pytest.raises(ValueError, match=why):
        build(8, cu_seqlens_q=[0, 8], cu_seqlens_k=cu)
    assert check_cu_seqlens("x", np.array([0, 0, 8], dtype=np.int32), 8).dtype == np.int64


def test_documents_of_queries_and_keys_must_agree() -> None:
    with pytest.raises(ValueError, match="cu_seqlens_q has 2 documents and cu_seqlens_k 1"):
        build(8, cu_seqlens_q=[0, 3, 8], cu_seqlens_k=[0, 8])
    with pytest.raises(ValueError, match="cu_seqlens_k runs from 0 to 8"):
        build(8, 6, cu_seqlens_q=[0, 8])


def test_band_area_counts_pairs() -> None:
    boxes = list(itertools.product([0, 2], [0, 1, 5], [0, 3], [0, 4, 7]))
    limits = [-NO_LIMIT, -6, -5, -2, -1, 0, 1, 3, 6, NO_LIMIT]
    rows = [(*box, lo, hi) for box in boxes for lo, hi in itertools.product(limits, limits)]
    brute = [sum(lo <= j - i <= hi for i in range(q0, q1) for j in range(k0, k1)) for q0, q1, k0, k1, lo, hi in rows]
    np.testing.assert_array_equal(band_area(*np.array(rows).T), brute)
    million = Slice(0, 10**6, 0, 10**6, -NO_LIMIT, 0)
    assert band_area(*np.array([million]).T).item() == 10**6 * (10**6 + 1) // 2


@pytest.mark.parametrize("far", [0, 1, 3, 9, 40])
def test_near_and_far_share_what_is_seen(far: int) -> None:
    """Part 1 where a key is at least `far` tokens before its query, aligned at the documents' last tokens; part 0 elsewhere."""
    cu_q, cu_k = [0, 3, 3, 9], [0, 5, 6, 13]
    for named in ({"causal": True}, {}, {"causal": True, "window": (4, 0), "sinks": 1}, {"window": (-1, 2), "prefix": 2}):
        plain = build(9, 13, **named, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        both = build(9, 13, **named, far=far, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        parts = [Mask.trusted(both.table[both.parts == part].copy(), 9, 13).as_array() for part in (0, 1)]
        np.testing.assert_array_equal(parts[0] | parts[1], plain.as_array())
        assert both.pairs == plain.pairs and both != plain
        for q0, q1, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[1:], strict=True):
            distance = (np.arange(q0, q1) + k1 - q1)[:, None] - np.arange(13)
            assert not (parts[1][q0:q1] & (distance < far)).any() and not (parts[0][q0:q1] & (distance >= far)).any()
