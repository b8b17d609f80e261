"""The Triton kernels against the reference in float64, on CPU in Triton's interpreter; and their tables, against dense masks.

The interpreter shows what is computed, not that it compiles: that is in `test_triton_compiles`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnscaler_ring.core import engine
from nnscaler_ring.core.kernels import Case, Grad, Kernel, Scores
from nnscaler_ring.core.kernels.base import Window, philox
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.triton import ANY, Blocks, Sizes, Triton, key_tiles, row_tiles, shares
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.interpreter import skip_without_triton
from tests.test_kernels import (
    ROWS,
    SPANS,
    TOLERANCE,
    WINDOWS,
    Problem,
    backward,
    band,
    check_backward,
    check_forward,
    fits,
    problem,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
launches = pytest.mark.usefixtures("triton_runs")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Sizes(Blocks(16, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1))
"""Blocks so small that a short span has several."""


def name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@pytest.fixture
def triton_runs(device: torch.device) -> None:
    skip_without_triton(device.type)


# -- the tables ------------------------------------------------------------------------------------------------------------------

TABLED = {
    **SPANS,
    "several blocks": [(0, 100, 0, 100)],
    "more keys": [(3, 50, 7, 190)],
    "fewer keys": [(0, 190, 10, 60)],
    "keys shared in part": [(0, 60, 0, 90), (60, 130, 33, 140), (130, 140, 200, 290), (140, 200, 5, 70)],
    "documents in any order": [(0, 33, 70, 103), (33, 70, 33, 70), (70, 103, 0, 33)],
}


def dense(spans: np.ndarray, window: Window) -> np.ndarray:
    """How often rows see keys."""
    seen = np.zeros((spans[:, 1].max(), spans[:, 3].max()), dtype=int)
    for i0, i1, j0, j1 in spans.tolist():
        seen[i0:i1, j0:j1] += band(i1 - i0, j1 - j0, window)
    return seen


@pytest.mark.parametrize("spans", TABLED.values(), ids=TABLED)
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64)], ids=str)
def test_tiles_visit_what_is_seen_and_need_masks_only_at_edges(blocks: tuple[int, int], spans) -> None:
    for window in [*WINDOWS, (30, 0), (-1, 40), (17, 17), (50, 3), (9, -1)]:
        check_tiles(np.array(spans), window, *blocks)


def check_tiles(spans: np.ndarray, window: Window, step_i: int, step_j: int) -> None:
    """What the tiles' blocks show is what `dense` says, each pair once, and blocks called whole show all their pairs."""
    left, right = (ANY if side < 0 else side for side in window)
    seen = dense(spans, window)
    visited, written = np.zeros_like(seen), []
    tiles = row_tiles(spans, left, right, step_i, step_j)
    for first, end, reach, reach_end, align, whole, whole_end, count, at, _ in tiles.tolist():
        assert 0 < end - first <= step_i and 0 <= whole <= whole_end <= count == max(0, -(-(reach_end - reach) // step_j))
        i = np.arange(first, end)[:, None]
        for block in range(count):
            j = np.arange(reach + block * step_j, min(reach + (block + 1) * step_j, reach_end))
            shown = (j - i - align >= -left) & (j - i - align <= right)
            if whole <= block < whole_end:
                assert shown.all() and len(j) == step_j
            visited[i, j] += shown
        written += [(at + n, i) for n, i in enumerate(range(first, end))]
    np.testing.assert_array_equal(visited, seen)
    assert [i for _, i in sorted(written)] == [i for i0, i1, _, _ in spans.tolist() for i in range(i0, i1)]
    assert [at for at, _ in sorted(written)] == list(range(len(written)))

    alone = np.array([[0, seen.shape[1], 0]])
    tiles, visits = key_tiles(spans, left, right, step_i, step_j, alone, alone)
    visited, covered = np.zeros_like(seen), np.zeros(seen.shape[1], dtype=int)
    for first, end, visit, visit_end, _, _ in tiles.tolist():
        assert 0 < end - first <= step_j
        covered[first:end] += 1
        for reach, reach_end, j0, j1, align, whole, whole_end, count in visits[visit:visit_end].tolist():
            assert 0 <= whole <= whole_end <= count == max(0, -(-(reach_end - reach) // step_i))
            j = np.arange(first, end)
            for block in range(count):
                i = np.arange(reach + block * step_i, min(reach + (block + 1) * step_i, reach_end))[:, None]
                shown = (j - i - align >= -left) & (j - i - align <= right) & (j >= j0) & (j < j1)
                if whole <= block < whole_end:
                    assert shown.all() and len(i) == step_i
                visited[i, j] += shown
    np.testing.assert_array_equal(visited, seen)
    assert covered.max() == 1, "no two tiles have a key"


def test_tiles_have_rows_of_one_state() -> None:
    """Cut where the state changes; in place, not end to end. Keys have two states, of dk and of dv."""
    rng, spans = np.random.default_rng(0), np.array(TABLED["keys shared in part"])

    def placed(rows: int) -> np.ndarray:
        cuts = np.unique([0, rows, *rng.integers(0, rows, 6)])
        return np.column_stack([cuts[:-1], cuts[1:], rng.integers(0, 4, len(cuts) - 1)])

    for window in ((-1, 0), (30, 0)):
        left, right = (ANY if side < 0 else side for side in window)
        of_rows, of_keys = placed(200), (placed(290), placed(290))
        tiles = row_tiles(spans, left, right, 32, 16, of_rows)
        state = np.full(200, -1)
        for first, end, *_, at, kind in tiles.tolist():
            assert at == first and (state[first:end] == -1).all()
            state[first:end] = kind
        np.testing.assert_array_equal(state, np.repeat(of_rows[:, 2], of_rows[:, 1] - of_rows[:, 0]))
        tiles, visits = key_tiles(spans, left, right, 32, 16, *of_keys)
        seen, both = np.zeros((200, 290), dtype=int), np.full((2, 290), -1)
        for first, end, visit, visit_end, *kinds in tiles.tolist():
            both[:, first:end] = np.array(kinds)[:, None]
            for reach, reach_end, j0, j1, align, *_ in visits[visit:visit_end].tolist():
                i, j = np.arange(reach, reach_end)[:, None], np.arange(max(first, j0), min(end, j1))
                seen[reach:reach_end, j] += (j - i - align >= -left) & (j - i - align <= right)
        np.testing.assert_array_equal(seen, dense(spans, window))
        for found, each in zip(both, of_keys, strict=True):
            want = np.repeat(each[:, 2], each[:, 1] - each[:, 0])
            np.testing.assert_array_equal(found[found >= 0], want[found >= 0])


@launches
@pytest.mark.parametrize(
    ("dtype", "layout", "transport", "how"),
    [
        (torch.float32, "zigzag", "ring", {"causal": True}),
        (torch.float32, "contiguous", "halo", {"causal": True, "window": (9, 0)}),
        (torch.bfloat16, "zigzag", "ring", {"causal": True}),
        (torch.bfloat16, "contiguous", "halo", {"causal": True, "window": (9, 0)}),
        (torch.bfloat16, "balanced", "grouped_ring", {"causal": True}),
        (torch.bfloat16, "stripe", "all_gather", {"causal": True, "heads_stride": 1}),
        (torch.bfloat16, "zigzag", "ring", {"causal": True, "far": 6}),
    ],
    ids=str,
)
def test_walks(dtype: torch.dtype, layout: str, transport: str, how: dict, device: torch.device) -> None:
    """Results and gradients are put together in place: rows of one call where they end, others in fp32 until the last."""
    cu = [0, 3, 17, 40] if layout == "balanced" else None
    given = oracle.inputs(0, (2, 40, 40), (4, 2, 16, 8) if "far" in how else (4, 2, 8, 8), dtype, device)
    exact = oracle.Inputs(*(x.cpu().double() for x in given))
    recipe = Recipe(layout=layout, transport=transport, **how)
    want = oracle.run(exact, 0.5, replace(recipe, group="local:1", transport="auto", kernel="reference"), cu)
    got = oracle.run(given, 0.5, replace(recipe, group="local:3", kernel="triton"), cu)
    assert got.out.dtype == got.dq.dtype == dtype and got.lse.dtype == torch.float32
    oracle.assert_close(oracle.Answer(*(x.cpu() for x in got)), want, 3e-2 if dtype == torch.bfloat16 else 2e-5)


def test_tiles_with_the_most_to_do_come_first() -> None:
    spans = np.array([(0, 1000, 0, 1000)])
    work = row_tiles(spans, ANY, 0, 64, 64)[:, 7]
    assert work[0] == 16 and (np.diff(work) <= 0).all()
    tiles, visits = key_tiles(spans, ANY, 0, 64, 64, *[np.array([[0, 1000, 0]])] * 2)
    work = visits[tiles[:, 2], 7]
    assert work[0] == 16 and (np.diff(work) <= 0).all()


def test_most_blocks_of_a_causal_span_need_no_mask() -> None:
    spans = np.array([(0, 4096, 0, 4096)])
    for table in (row_tiles(spans, ANY, 0, 128, 64), key_tiles(spans, ANY, 0, 64, 128, *[np.array([[0, 4096, 0]])] * 2)[1]):
        whole, whole_end, count = table[:, 5:8].sum(0)
        assert count == 32 * 33 and whole_end - whole == 32 * 31


# -- bands -----------------------------------------------------------------------------------------------------------------------


@launches
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_spans_and_windows(window: Window, device: torch.device) -> None:
    """Heads and dtypes take turns; `test_every_span_and_window` runs all."""
    turns, ran = itertools.cycle([((3, 1, 5, 3), torch.float32), ((2, 2, 8, 4), torch.bfloat16)]), 0
    for spans in SPANS.values():
        heads, dtype = next(turns)
        if all(fits(span, window) for span in spans):
            p = problem(spans, window, heads, dtype, device)
            check_forward(Triton(), p, TOLERANCE[dtype])
            check_backward(Triton(), p, TOLERANCE[dtype])
            ran += 1
    assert ran >= 2


@launches
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_span_and_window(window: Window, dtype: torch.dtype, device: torch.device) -> None:
    for spans, heads in itertools.product(SPANS.values(), [(4, 2, 8, 8), (3, 1, 5, 3), (2, 2, 1, 4), (4, 1, 20, 40)]):
        if all(fits(span, window) for span in spans):
            p = problem(spans, window, heads, dtype, device)
            check_forward(Triton(), p, TOLERANCE[dtype])
            check_backward(Triton(), p, TOLERANCE[dtype])


LONG = {
    "causal": ([(0, 300, 0, 450)], (-1, 0)),
    "full": ([(0, 300, 0, 450)], (-1, -1)),
    "window": ([(0, 300, 0, 300)], (130, 20)),
    "narrow": ([(0, 300, 0, 300)], (3, 2)),
    "left": ([(0, 300, 0, 250)], (170, -1)),
    "right": ([(0, 200, 0, 450)], (-1, 120)),
    "keys shared in part": ([(0, 130, 0, 300), (130, 250, 17, 137), (250, 300, 301, 440)], (-1, 0)),
    "documents": ([(0, 33, 0, 33), (33, 100, 33, 100), (100, 101, 100, 101), (101, 300, 101, 300)], (-1, -1)),
}


@launches
@pytest.mark.parametrize(("spans", "window"), LONG.values(), ids=LONG)
def test_long_spans(spans, window: Window, device: torch.device) -> None:
    """Several blocks of the sizes that a GPU would have."""
    p = problem(spans, window, (2, 1, 8, 8), torch.float32, device, (300, 450))
    check_forward(Triton(), p, TOLERANCE[torch.float32])
    check_backward(Triton(), p, TOLERANCE[torch.float32])


@launches
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("spans", "window"), LONG.values(), ids=LONG)
def test_long_spans_in_small_blocks(spans, window: Window, dtype: torch.dtype, device: torch.device) -> None:
    p = problem(spans, window, (4, 2, 24, 16), dtype, device, (300, 450))
    check_forward(Triton(SMALL), p, TOLERANCE[dtype])
    check_backward(Triton(SMALL), p, TOLERANCE[dtype])


@launches
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dims", [(64, 64), (80, 129), (256, 192)], ids=str)
def test_wide_heads(dims: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    p = problem([(0, 40, 0, 70)], (-1, 0), (2, 1, *dims), dtype, device, (40, 70))
    check_forward(Triton(), p, TOLERANCE[dtype])
    check_backward(Triton(), p, TOLERANCE[dtype])


@launches
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_logits_of_1e4(dtype: torch.dtype, device: torch.device) -> None:
    p = problem(SPANS["one"], (2, 1), (4, 2, 8, 8), dtype, device)
    p = p._replace(given=p.given._replace(q=p.given.q * 100, k=p.given.k * 100))
    check_forward(Triton(), p, max(TOLERANCE[dtype], 1e-2))
    check_backward(Triton(), p, 5e-2)


@launches
def test_any_strides_and_untouched_inputs(device: torch.device) -> None:
    plain = problem(SPANS["gaps"], (-1, 0), (4, 2, 8, 4), torch.float32, device)
    q = torch.cat([plain.given.q, plain.given.q + 1, plain.given.q], dim=2)[:, :, 8:]
    rows = torch.cat([x.transpose(0, 1).flatten(2) for x in plain.given[1:3]], dim=-1)
    k, v = rows[..., :16].unflatten(-1, (2, -1)).transpose(0, 1), rows[..., 16:].unflatten(-1, (2, -1)).transpose(0, 1)
    d_out = plain.given.d_out.transpose(1, 2).contiguous().transpose(1, 2)
    p = plain._replace(given=oracle.Inputs(q, k, v, d_out))
    before = [x.clone() for x in p.given]
    assert not any(x.is_contiguous() for x in p.given)
    check_forward(Triton(), p, TOLERANCE[torch.float32])
    check_backward(Triton(), p, TOLERANCE[torch.float32])
    assert all(torch.equal(x, y) for x, y in zip(p.given, before, strict=True)), "inputs are as they were"


@launches
def test_a_nan_stays_one(device: torch.device) -> None:
    """Of a run that has diverged, in one call and in what is merged in place."""
    q, k, v = (torch.randn(1, 32, 1, 8, device=device) for _ in range(3))
    q[0, 20] = torch.nan
    for group, window in (("local:1", (-1, -1)), ("local:2", (12, 0))):
        out, lse, _ = engine.attention(
            *(q, k, v, None, None, None, None, None, None, 32, 32, 0.3, 0),
            str(Recipe(group=group, kernel="triton", causal=True, window=window)),
        )
        assert out[0, 20].isnan().all() and lse[0, 0, 20].isnan() and out.isnan().sum() == 8 and lse.isnan().sum() == 1


@launches
def test_the_same_bits_each_time(device: torch.device) -> None:
    p = problem([(0, 150, 0, 150), (150, 200, 20, 100)], (-1, 0), (4, 2, 16, 16), torch.bfloat16, device, (200, 200))
    want = oracle.dense(p.given, p.seen(both=True), p.scale)
    saved = want.out.to(torch.bfloat16), want.lse.float()
    answers = [backward(Triton(), p, *saved) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))


@launches
def test_no_spans(device: torch.device) -> None:
    p = problem(SPANS["one"], (-1, -1), (2, 1, 8, 8), torch.float32, device)
    none = np.zeros((0, 4), dtype=np.int64)
    out, lse = Triton().forward(*p.given[:3], none, (-1, -1), Scores(scale=1.0))
    assert out.shape == (2, 0, 2, 8) and lse.shape == (2, 2, 0)
    sums = oracle.sums(p.given[:3], 1.0)
    saved = torch.zeros_like(p.given.d_out), torch.zeros(2, 2, ROWS, device=device)
    grad = Grad(p.given.q, saved[0], p.given.d_out, saved[1], *sums)
    Triton().backward(grad, *p.given[1:3], none, (-1, -1), Scores(scale=1.0))
    assert all((x.total() == 1).all() for x in sums)


@launches
def test_rows_that_see_nothing_have_no_gradient(device: torch.device) -> None:
    p = problem(SPANS["one"], (-1, -1), (2, 1, 8, 8), torch.float32, device)
    lse = torch.full((2, 2, ROWS), -torch.inf, device=device)
    sums = oracle.sums(p.given[:3], 1.0)
    grad = Grad(p.given.q, torch.zeros_like(p.given.d_out), p.given.d_out, lse, *sums)
    Triton().backward(grad, *p.given[1:3], p.spans, p.window, Scores(scale=p.scale))
    assert all((x.total() == 1).all() for x in sums)


# -- how scores are made ---------------------------------------------------------------------------------------------------------


PLACES = 40
"""Positions of keys, of which `problem` has a few in no order."""

FEATURES = {
    "negative scale": {"scale": -0.4},
    "no scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": 1},
    "alibi of batch rows": {"alibi": 2},
    "alibi ahead": {"alibi": 1, "ahead": True},
    "bias": {"bias": 1},
    "bias of heads": {"bias": 4},
    "dropout": {"dropout": 0.3},
    "all": {"softcap": 2.0, "alibi": 2, "ahead": True, "bias": 4, "dropout": 0.2},
    "all but one": {"softcap": 2.0, "alibi": 1, "bias": 1, "dropout": 0.5},
}


def scores(p: Problem, feature: dict, heads: int) -> Scores:
    """The scores that a row of `FEATURES` stands for."""
    device, (num_q, num_k) = p.given.q.device, (p.given.q.shape[1], p.given.k.shape[1])
    places = max(PLACES, num_k + 9)
    generator = torch.Generator().manual_seed(7)
    tables = {
        "alibi": lambda n: torch.rand(n, heads, generator=generator),
        "bias": lambda n: torch.randn(n, num_q, places, generator=generator),
        "ahead": lambda _: torch.randint(0, 9, (num_q,), generator=generator),
    }
    made = {name: tables[name](n).to(device) if name in tables else n for name, n in feature.items()}
    q_at, k_at = torch.randperm(num_q + 5, generator=generator)[:num_q], torch.randperm(places, generator=generator)[:num_k]
    seed, at = 0xF0E1D2C3B4A59687 - (1 << 64), {"q_at": q_at.to(device), "k_at": k_at.to(device)}
    return Scores(**{"scale": p.scale, "seed": seed, "batch0": 3, "head0": 11, **at, **made})


def check_scores(kernel: Triton, p: Problem, given: Scores, tolerance: float, deterministic: bool = False) -> None:
    """out, lse and every gradient are the reference's in float64, added to what was there."""
    exact = [x.double() for x in p.given]
    out, lse = kernel.forward(*p.given[:3], p.spans, p.window, given)
    want, want_lse = Reference().forward(*exact[:3], p.spans, p.window, given)
    assert oracle.error(out, want) <= tolerance and oracle.error(lse, want_lse) <= min(tolerance, 1e-4)
    full = torch.zeros_like(exact[3]).index_copy_(1, p.rows.to(want.device), want)
    full_lse = want_lse.new_full((*want_lse.shape[:2], full.shape[1]), torch.inf).index_copy_(2, p.rows.to(want.device), want_lse)
    sums, wanted = oracle.sums(p.given[:3], 1.0), oracle.sums(exact[:3], 1.0)
    biases = [None, None] if given.bias is None else [torch.ones_like(given.bias, dtype=x) for x in (torch.float32, torch.float64)]
    grad = Grad(
        p.given.q, full.to(out.dtype), p.given.d_out, full_lse.float(), *sums, deterministic=deterministic, d_bias=biases[0]
    )
    kernel.backward(grad, *p.given[1:3], p.spans, p.window, given)
    grad = Grad(exact[0], full, exact[3], full_lse, *wanted, deterministic=deterministic, d_bias=biases[1])
    Reference().backward(grad, *exact[1:3], p.spans, p.window, given)
    found = [(name, one.total(), other.total()) for name, one, other in zip(("dq", "dk", "dv"), sums, wanted, strict=True)]
    pairs = [*found, *([("d_bias", *biases)] if given.bias is not None else [])]
    for what, got, expected in pairs:
        assert oracle.error(got, expected) <= tolerance, (what, oracle.error(got, expected))


@launches
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_scores(feature: dict, device: torch.device) -> None:
    for spans, window, heads in [("shared keys", (-1, 0), (4, 2, 5, 3)), ("inside", (2, 1), (4, 4, 8, 8))]:
        p = problem(SPANS[spans], window, heads, torch.float32, device)
        check_scores(Triton(), p, scores(p, feature, heads[0]), TOLERANCE[torch.float32])


@launches
def test_scores_of_several_blocks(device: torch.device) -> None:
    p = problem([(0, 50, 0, 60), (50, 90, 30, 95)], (-1, 0), (2, 1, 8, 8), torch.bfloat16, device, (90, 95))
    check_scores(Triton(SMALL), p, scores(p, {**FEATURES["all"], "bias": 2}, 2), TOLERANCE[torch.bfloat16])


@launches
@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_score_and_window(window: Window, feature: dict, device: torch.device) -> None:
    turns = itertools.cycle(DTYPES)
    for spans in SPANS.values():
        if all(fits(span, window) for span in spans):
            p = problem(spans, window, (4, 2, 8, 4), next(turns), device)
            check_scores(Triton(), p, scores(p, feature, 4), TOLERANCE[p.given.q.dtype])


@launches
@pytest.mark.parametrize("bias", [1, 4])
def test_the_gradient_of_a_bias_can_be_deterministic(bias: int, device: torch.device) -> None:
    p = problem(SPANS["inside"], (2, 1), (4, 2, 8, 8), torch.float32, device)
    check_scores(Triton(), p, scores(p, {"bias": bias}, 4), TOLERANCE[torch.float32], deterministic=True)


def test_no_two_programs_of_a_launch_add_to_one_place_unless_atomically() -> None:
    """Of a tile, batch 2 and 4 heads: how many heads a launch has, and whether it adds atomically."""
    shared, own = torch.zeros(1, 3, 5), torch.zeros(4, 3, 5)
    assert shares(None, 2, 4, True) == (None, False), "no bias, no conflict"
    assert shares(own, 1, 4, True) == shares(own, 1, 4, False) == shares(shared, 1, 1, False) == (None, False)
    assert shares(own, 2, 4, False) == shares(shared, 2, 4, False) == shares(shared, 1, 4, False) == (None, True)
    assert shares(own, 2, 4, True) == (4, False) and shares(shared, 2, 4, True) == (1, False)


@launches
def test_the_gradient_of_a_bias_of_one_batch_row(device: torch.device) -> None:
    """No two programs add to one place, so they add without atomics."""
    p = problem(SPANS["inside"], (2, 1), (4, 2, 8, 8), torch.float32, device)
    p = p._replace(given=oracle.Inputs(*(x[:1] for x in p.given)))
    check_scores(Triton(), p, scores(p, {"bias": 4}, 4), TOLERANCE[torch.float32])


@launches
def test_a_bias_may_hide_keys(device: torch.device) -> None:
    p = problem(SPANS["one"], (-1, 0), (2, 1, 8, 8), torch.float32, device)
    given = scores(p, {"bias": 1}, 2)
    assert given.bias is not None and given.k_at is not None
    hidden = given.bias.clone()
    hidden[:, 3, given.k_at[1:]] = -torch.inf
    check_scores(Triton(), p, replace(given, bias=hidden), TOLERANCE[torch.float32])
    hidden[:, 3] = -torch.inf
    out, lse = Triton().forward(*p.given[:3], p.spans, p.window, replace(given, bias=hidden))
    assert (out[:, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all() and lse[:, :, 4].isfinite().all()


@launches
@pytest.mark.parametrize("kernel", [Reference(), Triton()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_a_bias_of_the_least_numbers_is_one_bias(kernel: Kernel, low: float, device: torch.device) -> None:
    """A row whose keys all have it sees them all alike."""
    p = problem(SPANS["one"], (-1, -1), (2, 1, 8, 8), torch.float32, device)
    given = scores(p, {"bias": 1}, 2)
    assert given.bias is not None
    bias = given.bias.clone()
    bias[:, 3] = low
    out, lse = kernel.forward(*p.given[:3], p.spans, p.window, replace(given, bias=bias))
    i0, i1, j0, j1 = p.spans[0]
    assert oracle.error(out[:, 3 - i0], p.given.v[:, j0:j1].mean(1).expand(-1, 2, -1)) < 1e-6
    assert (lse[:, :, 3 - i0] <= -1e9).all() and lse.isfinite().all() and i0 <= 3 < i1


@launches
def test_a_soft_cap_far_above_the_scores_bends_nothing(device: torch.device) -> None:
    p = problem(SPANS["one"], (-1, 0), (2, 1, 8, 8), torch.float32, device)
    for softcap in (3.0, 1e3, 1e6, 1e9):
        check_scores(Triton(), p, Scores(scale=p.scale, softcap=softcap), 1e-5)


@launches
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_the_pairs_that_the_generator_says(probability: float, device: torch.device) -> None:
    """With equal scores and values that are unit vectors, out is the kept pairs."""
    num_q, num_k, heads = 37, 30, 3
    q, k = (torch.zeros(2, n, heads, 4, device=device) for n in (num_q, num_k))
    v = torch.eye(num_k, device=device).view(1, num_k, 1, num_k).expand(2, -1, heads, -1)
    generator = torch.Generator().manual_seed(1)
    at = [torch.randint(0, 1 << 31, (n,), generator=generator).to(device) for n in (num_q, num_k)]
    given = Scores(scale=1.0, dropout=probability, seed=-5, batch0=6, head0=9, q_at=at[0], k_at=at[1])
    spans = np.array([(0, num_q, 0, num_k)])
    out, lse = Triton(SMALL).forward(q, k, v, spans, (-1, -1), given)
    batch, head = torch.arange(6, 8, device=device).view(-1, 1, 1, 1), torch.arange(9, 12, device=device).view(-1, 1)
    words = philox(at[0].view(-1, 1, 1), at[1], head, batch, -5)
    kept = words >= round(probability * 2**32)
    assert torch.equal(out > 0, kept) and abs(float(kept.double().mean()) - 1 + probability) < 0.05
    assert oracle.error(out, kept / (num_k * (1 - probability))) < 1e-6
    assert oracle.error(lse, torch.full_like(lse, num_k).log()) < 1e-6, "the log-sum-exp is of all weights"


# -- what it takes ---------------------------------------------------------------------------------------------------------------


@needs_triton
def test_what_it_takes(device: torch.device) -> None:
    case = Case(device.type, torch.float32, 8, 8, 2, 1, features=frozenset({"softcap", "alibi", "bias", "dropout"}))
    Triton().check(case)
    assert Triton().offers(case) == (device.type != "cpu"), "nobody is given the interpreter unasked"
    for other, why in [
        ({"device": "meta"}, "on meta"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"head_dim": 257}, "not 257 and 8"),
        ({"head_dim_v": 300}, "not 8 and 300"),
    ]:
        with pytest.raises(NotImplementedError, match=why):
            Triton().check(replace(case, **other))


@needs_triton
def test_on_cpu_without_the_interpreter_it_says_so() -> None:
    program = """
from nnscaler_ring.core.kernels.base import Case
from nnscaler_ring.core.kernels.triton import Triton
import sys, torch
assert "nnscaler_ring.core.kernels.triton_kernels" not in sys.modules, "it is imported where it is used"
try:
    Triton().check(Case("cpu", torch.float32, 8, 8, 1, 1))
except NotImplementedError as why:
    print(why)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1" in done.stdout


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnscaler_ring.core.kernels.triton.find_spec", lambda _: None)
    with pytest.raises(NotImplementedError, match="not installed"):
        Triton().check(Case("cuda", torch.float32, 8, 8, 1, 1))
