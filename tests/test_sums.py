"""Sums of gradients: what comes first is stored and the rest added, one by one or several at once; nothing is zeroed before.

Memory that nobody filled is NaN here, as deterministic mode makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler_ring.core import engine, kernels, walk
from nnscaler_ring.core.device import index_of
from nnscaler_ring.core.held import AGAIN, MORE, Place, fused
from nnscaler_ring.core.intervals import covered, times
from nnscaler_ring.core.kernels import Case, Grad, Scores
from nnscaler_ring.core.kernels.base import Spans, Window
from nnscaler_ring.core.kernels.packed import Call, Packed, Read
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.core.merge import Results, merge_
from nnscaler_ring.core.plan import ALL_TO_ALL, TRANSPORTS, plan
from nnscaler_ring.core.recipe import Recipe, layout_of, mask_of
from nnscaler_ring.core.sums import Sum
from tests import oracle, releases
from tests.interpreter import many_at_once, skip_without_triton

SIZES, HEADS, SCALE = (2, 24, 24), (4, 2, 8, 8), 0.3


class Whole(Packed):
    """A kernel that takes rows end to end, by the reference, in float64."""

    name = "whole"

    def check_sizes(self, case: Case) -> None:
        return None

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        one = call.cu_q is not None
        q, k, v = (x[None] if one else x for x in (q, k, v))
        spans = releases.spans_of(q, k, call.cu_q, call.cu_k)
        out, lse = Reference().forward(q, k, v, spans, call.window, kernels.Scores(scale=call.scale))
        return (out[0], lse[0]) if one else (out, lse)

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        one = call.cu_q is not None
        d_out, q, k, v, out, lse = (x[None] if one else x for x in read[:6])
        totals = oracle.sums((q, k, v))
        grad = kernels.Grad(q, out, d_out, lse, *totals)
        Reference().backward(
            grad, k, v, releases.spans_of(q, k, call.cu_q, call.cu_k), call.window, kernels.Scores(scale=call.scale)
        )
        return [(x.total()[0] if one else x.total()).to(x.like.dtype) for x in totals]


class Placed(Reference):
    """The reference, as a kernel that puts together in place what rows have."""

    name = "placed"

    def merge(self, results: Results, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        out, lse = self.forward(q, k, v, spans, window, scores)
        at, place = index_of(spans[:, :2], q.device), results.place(covered(spans[:, :2]))
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=out.dtype).index_copy_(1, at, out)
        lse = out.new_empty(*out.shape[:3], 1).index_copy_(1, at, lse.transpose(1, 2).unsqueeze(3))
        for rows, state in rows_of(place):
            mine, its_lse = out[:, rows], lse[:, rows]
            if state & AGAIN:
                assert place.total is not None
                merge_(mine, its_lse, place.total[:, rows], results.lse[:, rows])
            results.lse[:, rows] = its_lse
            memory(place, state)[:, rows] = mine.to(memory(place, state).dtype)

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        parts = oracle.sums((grad.q, k, v))
        super().backward(replace(grad, dq=parts[0], dk=parts[1], dv=parts[2]), k, v, spans, window, scores)
        for total, part, side in ((grad.dq, parts[0], 0), (grad.dk, parts[1], 2), (grad.dv, parts[2], 2)):
            put(total.place(covered(spans[:, side : side + 2])), part.total())


def rows_of(place: Place) -> list[tuple[slice, int]]:
    return [(slice(lo, hi), state) for lo, hi, state in place.rows.tolist()]


def memory(place: Place, state: int) -> Tensor:
    """Where rows of a state are stored."""
    if not state & MORE:
        return place.end
    assert place.total is not None
    return place.total


def put(place: Place, part: Tensor) -> None:
    """What a kernel does that adds in place."""
    for rows, state in rows_of(place):
        mine = part[:, rows]
        if state & AGAIN:
            assert place.total is not None
            mine = mine + place.total[:, rows]
        memory(place, state)[:, rows] = mine.to(memory(place, state).dtype)


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "KERNELS", {"whole": (Whole(),), "placed": (Placed(),), "reference": (Reference(),)})
    kernels.choose.cache_clear()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    kernels.choose.cache_clear()


MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"causal": True, "window": (5, 0)},
    "sinks": {"causal": True, "window": (3, 0), "sinks": 2},
    "far": {"causal": True, "far": 6},
    "packed": {"causal": True},
    "two heads at a time": {"causal": True, "heads_stride": 1},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("world", [1, 3])
def test_all_layouts_and_transports(name: str, world: int) -> None:
    cu = (0, 5, 6, 17, 24) if name == "packed" else None
    given, ran = oracle.inputs(world, SIZES, (4, 2, 16, 8) if name == "far" else HEADS), 0
    for layout in LAYOUTS:
        if cu is None and "per-document" in layout:
            continue
        for transport in (*TRANSPORTS, ALL_TO_ALL, "auto"):
            answers = []
            for kernel in ("reference", "whole", "placed"):
                how = Recipe(group=f"local:{world}", layout=layout, transport=transport, kernel=kernel, **MASKS[name])
                answers.append(oracle.run(given, SCALE, how, cu_q=cu))
            for theirs, *others in zip(*answers, strict=True):
                for mine in others:
                    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
            ran += 1
    assert ran >= 4 * 8


@pytest.mark.parametrize(
    ("layout", "transport", "name"),
    [
        ("zigzag", "ring", "causal"),
        ("zigzag", "grouped_ring", "causal"),
        ("zigzag", "all_gather", "full"),
        ("contiguous", "halo", "window"),
        ("stripe", "ring", "two heads at a time"),
        ("zigzag", "ring", "far"),
        ("balanced", "ring", "packed"),
        ("zigzag-per-document", "all_gather", "packed"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["whole", "placed"])
def test_many_at_once(
    kernel: str, dtype: torch.dtype, layout: str, transport: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerators do it: what comes for a row is held, and added up in one pass over memory."""
    cu = (0, 5, 6, 17, 24) if name == "packed" else None
    given = oracle.inputs(0, SIZES, (4, 2, 16, 8) if name == "far" else HEADS, dtype)
    how = Recipe(group="local:6", layout=layout, transport=transport, kernel=kernel, **MASKS[name])
    want = oracle.run(given, SCALE, how, cu_q=cu)
    many_at_once(monkeypatch)
    got = oracle.run(given, SCALE, how, cu_q=cu)
    oracle.assert_close(got, oracle.Answer(*(x.double() for x in want)), 3e-2 if dtype == torch.bfloat16 else 1e-10)


def test_dq_is_the_kernels_own_where_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a zigzag rank under all_gather: rounded once, and no memory in fp32."""
    many_at_once(monkeypatch)
    given = oracle.inputs(0, SIZES, HEADS, torch.bfloat16)
    how = Recipe(group="local:4", layout="zigzag", transport="all_gather", kernel="whole", causal=True)
    held, seen = layout_of("zigzag", 24, 4), mask_of(how, 24, 24, None, None, None)
    assert not any(plan(seen, held, held, "all_gather", rank).num_merges for rank in range(4))
    made, ended, gradients, result = list[Tensor](), list[Sum](), Whole.gradients, Sum.result

    def kept(self: Whole, call: Call, read: Read) -> Sequence[Tensor]:
        found = gradients(self, call, read)
        made.append(found[0])
        return found

    def noted(self: Sum) -> Tensor:
        ended.append(self)
        return result(self)

    monkeypatch.setattr(Whole, "gradients", kept)
    monkeypatch.setattr(Sum, "result", noted)
    answer = oracle.run(given, SCALE, how)
    assert torch.equal(answer.dq.flatten(1).sort(1)[0], torch.cat([x.reshape(2, -1) for x in made], 1).sort(1)[0])
    of_queries = [x for x in ended if x.like.shape[2] == HEADS[0]]
    assert len(of_queries) == 4 and all(x.memory is None or x.memory.dtype == torch.bfloat16 for x in of_queries)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_rows_of_one_call_have_no_other_memory(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision a kernel that puts together in place stores them where they end; others are in fp32 until then."""
    places = list[Place]()
    for kind in (Results, Sum):
        monkeypatch.setattr(kind, "place", lambda self, rows, place=kind.place: places.append(place(self, rows)) or places[-1])
    given = oracle.inputs(0, SIZES, HEADS, torch.bfloat16)
    for world, transport, wanted in ((1, "auto", {0}), (4, "halo", {0, MORE, AGAIN}), (4, "ring", {0, MORE, AGAIN, AGAIN | MORE})):
        how = Recipe(group=f"local:{world}", layout=layout, transport=transport, kernel="placed", causal=True)
        oracle.assert_close(oracle.run(given, SCALE, how), oracle.dense(given, np.tri(24, dtype=bool), SCALE), 3e-2)
        of_results = [place for place in places if place.end.dtype == torch.bfloat16]
        assert {state for place in of_results for _, state in rows_of(place)} == wanted
        assert all((place.total is None) == (not place.rows[:, 2].any()) for place in of_results)
        places.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_in_place_and_what_comes_later(dtype: torch.dtype, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel adds to any rows in place, and then parts come for some: known before or not."""
    many_at_once(monkeypatch)
    rng = np.random.default_rng(known)
    for _ in range(60):
        cuts = [np.sort(rng.choice(17, 2 * int(rng.integers(1, 5)), replace=False)).reshape(-1, 2) for _ in range(6)]
        placed, later = cuts[: int(rng.integers(0, 4))], cuts[4 : 4 + int(rng.integers(0, 3))]
        total = Sum(torch.empty(2, 16, 1, 2, dtype=dtype), end=dtype, come=times(16, [*placed, *later]) if known else None)
        want = torch.zeros(2, 16, 1, 2)
        for n, rows in enumerate((*placed, *later)):
            part = torch.from_numpy(rng.integers(-4, 5, (2, 16, 1, 2))).float()  # sums are exact
            at = index_of(rows, part.device)
            want.index_add_(1, at, part[:, at])
            if n < len(placed):
                put(total.place(rows), part)
            else:
                total.add(rows, part[:, at])
        assert torch.equal(total.result().float(), want)


def test_more_than_was_to_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plan that counts wrong: nothing is lost without a word."""
    many_at_once(monkeypatch)
    every, once = np.array([[0, 64]]), np.ones(64, dtype=np.int32)
    rows = np.arange(0, 65).repeat(2)[1:-1].reshape(-1, 2)[::2]
    for again in (every, rows):
        total = Sum(torch.empty(1, 64, 1, 1, dtype=torch.bfloat16), end=torch.bfloat16, come=once)
        put(total.place(every), torch.ones(1, 64, 1, 1))
        with pytest.raises(AssertionError, match="no more was to come"):
            total.place(again)
        total.add(again, torch.ones(1, int(np.diff(again).sum()), 1, 1))
        with pytest.raises(AssertionError, match="no more was to come"):
            total.result()


def deepest(total: Sum) -> int:
    """The most parts that are held of a row."""
    return max(sum(lo <= row < hi for layer in total._held for lo, hi, _ in layer.at) for row in range(total.like.shape[1]))


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_rows_in_any_order(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts share rows with others and with themselves; some rows are finished before the others, some have none."""
    many_at_once(monkeypatch)
    kernel = fused()
    rng, passes_over_memory = np.random.default_rng(most), mock.Mock(side_effect=kernel.add_)
    monkeypatch.setattr(kernel, "add_", passes_over_memory)
    for _ in range(40):
        total = Sum(torch.empty(2, 12, 1, 2, dtype=dtype), end=dtype)
        total.most = most
        want = torch.zeros(2, 12, 1, 2)
        for _ in range(int(rng.integers(0, 9))):
            ends = rng.integers(0, 13, (int(rng.integers(1, 4)), 2))
            rows = np.sort(ends, 1)
            part = torch.from_numpy(rng.integers(-4, 5, (2, int(np.diff(rows).sum()), 1, 2))).to(torch.bfloat16)  # sums are exact
            total.add(rows, part)
            for (lo, hi), piece in zip(rows.tolist(), part.split(np.diff(rows).ravel().tolist(), 1), strict=True):
                want[:, lo:hi] += piece
            assert deepest(total) <= (most if most > 1 else 0)
            if rng.random() < 0.3:
                lo, hi = sorted(rng.integers(0, 13, 2).tolist())
                total.finish(lo, hi)
                assert torch.equal(total._total[:, lo:hi], want[:, lo:hi]) and all(
                    b <= lo or a >= hi for layer in total._held for a, b, _ in layer.at
                )
        assert torch.equal(total.result().float(), want)
    assert max((len(call.args[1]) for call in passes_over_memory.call_args_list), default=2) == most + 1


def test_a_part_of_all_rows_is_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied; what comes besides is added to it. Of another dtype it is not."""
    many_at_once(monkeypatch)
    everything, some = np.array([[0, 4]]), np.array([[1, 3]])
    for kind in (torch.bfloat16, torch.float32):
        part = torch.randn(2, 4, 1, 2).to(kind)
        total = Sum(torch.empty(2, 4, 1, 2, dtype=torch.bfloat16), end=torch.bfloat16)
        total.add(everything, part)
        want, got = part.to(torch.bfloat16), total.result()
        assert torch.equal(got, want) and (got.data_ptr() == part.data_ptr()) == (kind == torch.bfloat16)

        total = Sum(torch.empty(2, 4, 1, 2, dtype=kind), end=kind)
        total.add(some, torch.ones(2, 2, 1, 2))
        total.add(everything, part)
        want = part.float()
        want[:, 1:3] += 1
        got = total.result()
        assert torch.equal(got, want.to(kind)) and got.data_ptr() == part.data_ptr()


@pytest.mark.parametrize("transport", ["ring", "all_gather", "halo", "broadcast", "auto"])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (3, 3), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_of_one_row_share_no_memory(dtype: torch.dtype, queries: int, keys: int, transport: str) -> None:
    """A row is contiguous in each half of a buffer of keys and values; ops of torch give no two results in one memory."""
    for rank in range(keys):
        recipe = Recipe(group=f"pretend:{keys}:{rank}", transport=transport, kernel="reference", reduce_dtype=str(dtype)[6:])
        held = layout_of("contiguous", queries, keys).counts[rank]
        q, d_out = (torch.randn(1, held, 2, 8, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(1, 1, 2, 8, dtype=dtype) for _ in range(2))
        about = ([None] * 6, [queries, keys], 0.3, 0, str(recipe))
        out, lse, _ = engine.attention(q, k, v, *about[0], *about[1], *about[2:])
        _, dk, dv = engine.attention_backward([d_out, q, k, v, out, lse], None, *about, False)
        assert dk.untyped_storage().data_ptr() != dv.untyped_storage().data_ptr()


@pytest.mark.parametrize("most", [1, 4])
def test_in_place(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel adds to the memory itself, to what others have left there."""
    many_at_once(monkeypatch)
    total = Sum(torch.empty(1, 4, 1, 1, dtype=torch.bfloat16))
    total.most = most
    total.add(np.array([[1, 3]]), torch.ones(1, 2, 1, 1))
    total.total().add_(1)
    total.add(np.array([[0, 2]]), torch.ones(1, 2, 1, 1))
    assert total.total().flatten().tolist() == [2, 3, 2, 1] and total.total().dtype == torch.float32


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.float32, torch.bfloat16, torch.float32)], ids=str)
def test_the_fused_sum(dtypes: Sequence[torch.dtype]) -> None:
    """Of rows of larger tensors, with an odd head dim; rounded once."""
    skip_without_triton()
    kernel = fused()
    assert kernel is not None
    generator = torch.Generator().manual_seed(0)
    into, *kinds = dtypes
    for number in range(2, kernel.MOST + 2):
        out = torch.full((2, 9, 5, 7), 8.0, dtype=into)
        terms = [torch.randn(2, 4, 9, 7, generator=generator).transpose(1, 2)[:, 2:] for _ in range(number)]
        terms = [x.to(kind) for x, kind in zip(terms, [*kinds, *kinds, *kinds], strict=False)]
        kernel.add_(out[:, 1:8, 1:], terms)
        want = sum(x.float() for x in terms)
        rounding = 0.0 if into == torch.float32 else 2**-7  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(out[:, 1:8, 1:].float(), want, rtol=rounding, atol=0)
        assert (out[:, 0] == 8).all() and (out[:, 8] == 8).all() and (out[:, :, 0] == 8).all()


def test_float64_is_added_up_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ends, in few intervals and in many."""
    many_at_once(monkeypatch)
    for rows in (np.array([[0, 32]]), np.column_stack([np.arange(32), np.arange(1, 33)])):
        total = Sum(torch.empty(1, 32, 1, 1, dtype=torch.float64), end=torch.float32)
        for value in (1.0, 2.0**-30, -1.0):
            total.add(rows, torch.full((1, 32, 1, 1), value, dtype=torch.float64))
        assert (total.result() == 2.0**-30).all()


def test_what_is_to_come_is_counted_in_a_copy() -> None:
    """It is the plan's own, which later calls read."""
    come = np.array([2, 2])
    Sum(torch.empty(1, 2, 1, 1), come=come).place(np.array([[0, 2]]))
    assert come.tolist() == [2, 2]


def test_gradients_are_added_up_in_fp32_whatever_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, inside = [], walk.KVSums.inside
    monkeypatch.setattr(walk.KVSums, "inside", lambda rows, parts: seen.append(rows.keys.dtype) or inside(rows, parts))
    given = oracle.inputs(0, (1, 16, 16), (2, 2, 8, 8), torch.float32)
    oracle.run(given, 0.3, Recipe(group="local:4", transport="ring", kernel="reference", causal=True, reduce_dtype="bfloat16"))
    assert set(seen) == {torch.float32}
