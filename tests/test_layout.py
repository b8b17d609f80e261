"""Layouts: exact inverses, the cuts they promise, and balance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nnscaler_ring.core.layout import Layout, joined
from nnscaler_ring.core.layouts import LAYOUTS, build, length_of, name_of
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.shapes import WORLDS

LENGTHS = (0, 1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 97)


def cu_of(length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([0, *np.sort(rng.integers(0, length + 1, rng.integers(0, 7))), length])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_position_is_held_once_and_found_again(name: str, world: int) -> None:
    for seed, length in enumerate(LENGTHS):
        for cu in (None, cu_of(length, seed), cu_of(length, seed + 100)):
            held = build(name, length, world, cu)
            positions = [held.positions(rank) for rank in range(world)]
            assert [len(p) for p in positions] == held.counts.tolist()
            np.testing.assert_array_equal(np.sort(np.concatenate(positions)), np.arange(length))
            assert all((np.diff(p) > 0).all() for p in positions), "ascending on every rank"
            rank, row = held.owner()
            assert all(positions[rank[i]][row[i]] == i for i in range(length))
            for (r, start, count), row0 in zip(held.runs.tolist(), held.row0.tolist(), strict=True):
                np.testing.assert_array_equal(
                    positions[r][row0 : row0 + count], start + held.stride * np.arange(count), err_msg="runs and rows"
                )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_contiguous_is_torch_chunk(length: int, world: int) -> None:
    """And so what DTensor's Shard gives: the last ranks get less, or nothing."""
    chunks = [c.tolist() for c in torch.arange(length).chunk(world)]
    chunks += [[]] * (world - len(chunks))
    held = build("contiguous", length, world, cu_of(length, 0))
    assert [held.positions(rank).tolist() for rank in range(world)] == chunks


@pytest.mark.parametrize("world", WORLDS)
def test_zigzag_is_the_usual_one_where_it_divides(world: int) -> None:
    for chunk in (1, 3):
        length = 2 * world * chunk
        chunks = np.arange(length).reshape(2 * world, chunk)
        held = build("zigzag", length, world)
        for rank in range(world):
            want = np.concatenate([chunks[rank], chunks[2 * world - 1 - rank]])
            np.testing.assert_array_equal(held.positions(rank), want)


@pytest.mark.parametrize("world", WORLDS)
def test_stripe_takes_turns(world: int) -> None:
    for length in LENGTHS:
        held = build("stripe", length, world)
        assert held.stride == world
        for rank in range(world):
            np.testing.assert_array_equal(held.positions(rank), np.arange(rank, length, world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "contiguous"])
def test_shards_are_as_even_as_they_can_be(name: str, world: int) -> None:
    for seed, length in enumerate(LENGTHS):
        counts = build(name, length, world, cu_of(length, seed)).counts
        assert counts.max() - counts.min() <= 1, "also over many documents that leave tokens over"


@pytest.mark.parametrize("world", WORLDS)
def test_each_document_is_cut(world: int) -> None:
    """Where every document divides: parts in the order of documents, contiguous or two chunks each."""
    lengths = np.array([1, 0, 3, 2]) * 2 * world
    cu = np.concatenate([[0], np.cumsum(lengths)])
    plain, zigzag = (build(f"{name}-per-document", int(cu[-1]), world, cu) for name in ("contiguous", "zigzag"))
    for rank in range(world):
        parts, chunks = [], []
        for lo, hi in itertools.pairwise(cu):
            document = np.arange(lo, hi)
            parts.append(document.reshape(world, -1)[rank])
            pieces = document.reshape(2 * world, -1)
            chunks += [pieces[rank], pieces[2 * world - 1 - rank]]
        np.testing.assert_array_equal(plain.positions(rank), np.concatenate(parts))
        np.testing.assert_array_equal(zigzag.positions(rank), np.concatenate(chunks))


@pytest.mark.parametrize("name", ["contiguous-per-document", "zigzag-per-document"])
def test_uneven_documents_are_cut_as_evenly_as_they_can_be(name: str) -> None:
    world, cu = 4, np.array([0, 3, 10, 10, 11, 29])
    held = build(name, 29, world, cu)
    rank, _ = held.owner()
    for lo, hi in itertools.pairwise(cu):
        each = np.bincount(rank[lo:hi], minlength=world)
        assert each.max() - each.min() <= 1
        steps = np.diff(rank[lo:hi])
        if name.startswith("zigzag"):  # ranks ascend to the last one, then descend
            down = np.flatnonzero(steps < 0)
            turn = down[0] if len(down) else len(steps)
            assert (steps[turn:] <= 0).all()
            steps = steps[:turn]
        assert (steps >= 0).all()
    np.testing.assert_array_equal(build("zigzag", 29, world).runs, build("zigzag-per-document", 29, world).runs)


def test_a_layout_is_its_content() -> None:
    a, b = build("zigzag", 16, 2), Layout(np.array([[1, 4, 8], [0, 12, 4], [0, 0, 4]]), 16, 2)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != build("zigzag", 16, 4) and a != build("stripe", 16, 2) and a != "a layout"
    assert build("contiguous", 9, 3) == build("contiguous-per-document", 9, 3), "one stride, the same runs"
    assert len(a.runs) == 3, "chunks that touch on one rank are one run"
    with pytest.raises(ValueError, match="read-only"):
        a.runs[0, 0] = 1
    assert repr(a) == "Layout(3 runs of stride 1, length=16, world_size=2)"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_as_a_string(name: str) -> None:
    held = build(name, 29, 4, np.array([0, 3, 10, 10, 11, 29]))
    assert build(name_of(held), 29, 4) == held and name_of(name) == name
    for length, world in ((28, 4), (29, 2)):
        with pytest.raises(ValueError, match="holds 29 tokens on 4 ranks"):
            build(name_of(held), length, world)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown layout 'zagzig': choose one of contiguous, zigzag, stripe, contiguous-per"):
        build("zagzig", 8, 2)


def test_runs_that_leave_out_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="these runs hold 4, length is 6"):
        Layout(np.array([[0, 0, 2], [1, 4, 2]]), 6, 2)


def test_a_layout_is_its_world_too() -> None:
    assert build("contiguous", 1, 2) != build("contiguous", 1, 3), "ranks that hold nothing"


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([[0, 0, 4], [1, 2, 4]], "these runs hold 8, length is 6"),
        ([[0, 0, 4]], "these runs hold 4, length is 6"),
        ([[-1, 0, 6]], "of ranks 0 to 1"),
        ([[2, 0, 6]], "of ranks 0 to 1"),
    ],
)
def test_runs_that_make_no_layout_are_refused(runs: list[list[int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Layout(np.array(runs), 6, 2)


def test_balanced_looks_at_documents() -> None:
    assert build("balanced", 8, 2, np.array([0, 3, 8])).runs.tolist() == [[0, 0, 3], [0, 7, 1], [1, 3, 4]]


def test_sequences_cut_one_by_one() -> None:
    """Each rank holds its part of one after that of the other, whatever the layouts; and what ranks compute is one device's."""
    for name in ("contiguous", "zigzag", "stripe"):
        text, image = build(name, 7, 3), build(name, 30, 3)
        held = joined(text, image)
        for rank in range(3):
            assert held.positions(rank).tolist() == [*text.positions(rank), *(7 + image.positions(rank))], name
        given = oracle.inputs(0, (1, 37, 37), (4, 2, 8, 8))
        got, want = (
            oracle.run(given, 0.3, Recipe(group=f"local:{ranks}", layout=layout))
            for ranks, layout in ((3, name_of(held)), (1, "contiguous"))
        )
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert joined(text) == text and length_of(name_of(held)) == 37 and length_of("stripe") is None
    for wrong in ((), (text, build("stripe", 8, 2)), (text, build("zigzag", 8, 3))):
        with pytest.raises(ValueError, match="one number of ranks and one stride"):
            joined(*wrong)
