"""The online-softmax merge: equal to the softmax over everything, at any size of logits, and silent about rows that see nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core import merge as merges
from nnscaler_ring.core.held import fused
from nnscaler_ring.core.mask import build
from nnscaler_ring.core.merge import (
    Results,
    flatten_varlen_lse,
    merge_,
    merge_all_,
    unflatten_varlen_lse,
    update_out_and_lse,
)
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.interpreter import many_at_once, skip_without_triton

INF = float("inf")
Merge = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@pytest.fixture(params=["torch", "triton"])
def merge(request: pytest.FixtureRequest) -> Merge:
    """Each way to merge; Triton's in its interpreter."""
    if request.param == "torch":
        return merge_
    pytest.importorskip("triton")
    kernel = fused()
    assert kernel is not None
    return lambda out, lse, part, part_lse: kernel.merge_(out, lse, [(part, part_lse)])


def blocks(
    num: int, logits: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """`num` blocks of 5 keys each, ``(out [B, L, H, Dv], lse [B, H, L])``, and out and lse over all keys in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = logits * torch.randn(2, 3, 4, 5 * num, dtype=torch.float64, generator=generator)
    v = torch.randn(2, 3, 5 * num, 6, dtype=torch.float64, generator=generator)
    parts = []
    for s, values in zip(scores.split(5, -1), v.split(5, 2), strict=True):
        parts.append(
            ((s.softmax(-1) @ values).transpose(1, 2).to(dtype), s.logsumexp(-1).to(torch.promote_types(dtype, torch.float32)))
        )
    return parts, (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("logits", [0.0, 1.0, 50.0, 1e4])
@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_merged_blocks_are_the_softmax_over_all(num: int, logits: float) -> None:
    parts, want, want_lse = blocks(num, logits)
    out = lse = None
    for part in parts:
        out, lse = update_out_and_lse(out, lse, *part)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse.transpose(1, 2).unsqueeze(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e4, -1e4, 1e38, -1e38])
def test_no_gap_between_weights_overflows(gap: float, merge: Merge) -> None:
    out, lse = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
    merge(out, lse, torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 1), gap))
    weight = torch.tensor(gap).sigmoid().item()
    assert out.flatten().tolist() == [weight, weight]
    assert lse.item() == pytest.approx(max(gap, 0.0) + math.log1p(math.exp(-abs(gap))))


def test_rows_that_see_nothing(merge: Merge) -> None:
    """-inf with -inf stays 0 and -inf; -inf on one side takes the other side as it is."""
    nothing, some = torch.full((1, 1, 1, 1), -INF), torch.full((1, 1, 1, 1), 3.0)
    for a, b, want, want_lse in [
        (nothing, nothing, 0.0, -INF),
        (nothing, some, 7.0, 3.0),
        (some, nothing, 5.0, 3.0),
    ]:
        out, lse = torch.full((1, 1, 1, 2), 5.0 if a is some else 0.0), a.clone()
        merge(out, lse, torch.full((1, 1, 1, 2), 7.0 if b is some else 0.0), b)
        assert (out == want).all() and lse.item() == want_lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_fused_merge_is_the_merge(dtype: torch.dtype) -> None:
    """On rows of a larger tensor, strided as the engine passes them, with an odd head dim."""
    pytest.importorskip("triton")
    module, exact = fused(), torch.promote_types(dtype, torch.float32)
    assert module is not None
    generator = torch.Generator().manual_seed(0)
    out, lse = (torch.randn(2, 9, 5, n, generator=generator, dtype=exact) for n in (7, 1))
    part = torch.randn(2, 4, 9, 7, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)[:, 2:]
    part_lse = torch.randn(2, 4, 7, generator=generator, dtype=exact).transpose(1, 2).unsqueeze(3)
    part_lse[0, 3] = lse[0, 3, 0] = -INF
    wanted, got = [(out.clone(), lse.clone()) for _ in range(2)]
    merge_(wanted[0][:, 1:8, 1:], wanted[1][:, 1:8, 1:], part, part_lse)
    module.merge_(got[0][:, 1:8, 1:], got[1][:, 1:8, 1:], [(part, part_lse)])
    for have, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5 if exact == torch.float32 else 1e-13, atol=1e-6)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("num", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_many_at_once(dtype: torch.dtype, num: int, fresh: bool) -> None:
    """As one after the other; rounded once, to the dtype of the result; what has seen nothing may hold anything."""
    pytest.importorskip("triton")
    module, exact = fused(), torch.promote_types(dtype, torch.float32)
    assert module is not None and num <= module.MOST
    parts, _, _ = blocks(num + 1, 1.0, dtype)
    columns = [(part.clone(), part_lse.transpose(1, 2).unsqueeze(3).clone()) for part, part_lse in parts]
    columns[0][1][0, 2], columns[0][0][0, 2] = -INF, float("nan")
    columns[1][1][1, :, 1], columns[1][0][1, :, 1] = -INF, 0.0
    *given, (first, first_lse) = columns
    want, want_lse = first.to(exact), first_lse.clone()
    want, want_lse = (torch.zeros_like(want), torch.full_like(want_lse, -INF)) if fresh else (want, want_lse)
    got, got_lse = want.clone().to(dtype), want_lse.clone()
    if fresh:
        got.fill_(float("nan"))
    for part, part_lse in given:
        merge_(want, want_lse, part.nan_to_num(0.0), part_lse)
    into = torch.full_like(got, float("nan"), dtype=torch.float16)
    module.merge_(got, got_lse.clone(), given, fresh, into)
    torch.testing.assert_close(into.to(exact), want, rtol=1e-2, atol=1e-2)
    module.merge_(got, got_lse, given, fresh)
    assert got.dtype == dtype
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.to(exact), want, **({"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_results_are_held_and_merged(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of calls overlap as they like; each row's are merged when it would have more than so many, and at the end; a row of
    none is one that has seen nothing."""
    generator = torch.Generator().manual_seed(1)
    parts, _, _ = blocks(7, 1.0, torch.float64)
    want, want_lse = torch.zeros(2, 4, 3, 6, dtype=torch.float64), torch.full((2, 4, 3, 1), -INF, dtype=torch.float64)
    want, want_lse = (F.pad(x, (0, 0, 0, 0, 0, 1), value=value) for x, value in ((want, 0.0), (want_lse, -INF)))
    out = torch.full_like(want, float("nan"))
    results = Results(out, 6, out.dtype, into=out, lse=torch.full_like(want_lse, float("nan")))
    monkeypatch.setattr(results, "most", most)
    held = []
    for part, part_lse in parts:
        rows = sorted(torch.randperm(4, generator=generator)[:3].tolist())
        column = part_lse.transpose(1, 2).unsqueeze(3)
        results.add(np.array([(row, row + 1) for row in rows]), part[:, rows], column[:, rows])
        held.append(max(sum(lo <= row < hi for layer in results._held for lo, hi, _ in layer.at) for row in range(4)))
        for row in rows:
            merge_(want[:, row : row + 1], want_lse[:, row : row + 1], part[:, row : row + 1], column[:, row : row + 1])
    results.finish()
    assert max(held) == (most if most > 1 else 0)
    torch.testing.assert_close(results.out, want)
    torch.testing.assert_close(results.lse, want_lse)


@pytest.mark.parametrize("fp16", [False, True])
def test_rows_of_many_intervals_are_merged_by_a_table(fp16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As piece by piece, also where rows have more parts than are merged at once; in a launch for each set of parts."""
    many_at_once(monkeypatch)
    rng, rows = np.random.default_rng(int(fp16)), 64
    dtype, end = (torch.float32, torch.float16) if fp16 else (torch.float64, torch.float64)
    for _ in range(10):
        nan = torch.full((2, rows, 3, 1), float("nan"), dtype=dtype)
        one, many = (Results(nan, 6, end_of, dtype, dtype, lse=nan.clone()) for end_of in (dtype, end))
        one.most = 1
        for _ in range(int(rng.integers(1, 8))):
            cuts = np.sort(rng.choice(rows + 1, 2 * int(rng.integers(4, 12)), replace=False)).reshape(-1, 2)
            size = int(np.diff(cuts).sum())
            out, lse = (torch.from_numpy(rng.standard_normal((2, size, 3, n))).to(dtype) for n in (6, 1))
            row = int(rng.integers(0, size))
            out[0, row], lse[0, row] = 0.0, -INF
            for results in (one, many):
                results.add(cuts, out, lse)
        got, want = many.result(), one.result()
        torch.testing.assert_close(got.to(dtype), want, **({"rtol": 2e-3, "atol": 1e-3} if fp16 else {}))
        torch.testing.assert_close(many.lse, one.lse)


def test_a_launch_for_each_set_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of the rows, interleaved, of which each has two parts besides one of all."""
    many_at_once(monkeypatch)
    kernel = fused()
    launches = mock.Mock(side_effect=kernel.merge_)
    monkeypatch.setattr(kernel, "merge_", launches)
    results = Results(torch.empty(1, 64, 1, 1), 2, torch.float32)
    every = np.arange(0, 65).repeat(2)[1:-1].reshape(-1, 2)
    for rows in (every[::2], every[1::2]):
        for _ in range(2):
            results.add(rows, torch.ones(1, 32, 1, 2), torch.zeros(1, 32, 1, 1))
    results.add(np.array([[0, 64]]), torch.ones(1, 64, 1, 2).to(torch.bfloat16), torch.zeros(1, 64, 1, 1))
    assert (results.result() == 1).all() and launches.call_count == 2
    torch.testing.assert_close(results.lse, torch.full((1, 64, 1, 1), math.log(3)))


def test_a_nan_stays_one(merge: Merge) -> None:
    """Of a run that has diverged."""
    out, lse, nan = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 1), float("nan")
    merge(out, lse, torch.full((1, 1, 1, 2), nan), torch.full((1, 1, 1, 1), nan))
    merge(out, lse, torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 1))
    assert out.isnan().all()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_result_of_all_rows_is_the_memory(dtype: torch.dtype, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied; what comes besides is merged into it."""
    if many:
        many_at_once(monkeypatch)
    parts, _, _ = blocks(3, 1.0, torch.float32)
    (first, lse), *others = [(out.contiguous(), lse.transpose(1, 2).unsqueeze(3).clone()) for out, lse in parts]
    want, want_lse, part = first.clone(), lse.clone(), first.to(dtype)
    results = Results(lse, 6, dtype, lse_dtype=lse.dtype)
    results.add(np.array([[0, 4]]), part, lse)
    for other, other_lse in others:
        merge_(want[:, 1:3], want_lse[:, 1:3], other[:, 1:3], other_lse[:, 1:3])
        results.add(np.array([[1, 3]]), other[:, 1:3], other_lse[:, 1:3])
    results.finish()
    assert results.out.data_ptr() == part.data_ptr() and results.lse.data_ptr() == lse.data_ptr()
    torch.testing.assert_close(results.lse, want_lse)
    torch.testing.assert_close(results.out.float(), want, **({"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}))


def test_other_results_are_copied() -> None:
    """Of another dtype, or not contiguous."""
    out, lse = torch.randn(2, 4, 3, 6), torch.zeros(2, 4, 3, 1)
    for part, dtype in ((out, torch.float64), (out.transpose(0, 1).contiguous().transpose(0, 1), out.dtype)):
        results = Results(lse, 6, dtype, lse_dtype=lse.dtype)
        results.add(np.array([[0, 4]]), part, lse)
        results.finish()
        assert torch.equal(results.out, out.to(dtype)) and results.out.data_ptr() != part.data_ptr()
        assert torch.equal(results.lse, lse) and results.lse.data_ptr() != lse.data_ptr(), "nor lies it heads first"


def test_the_formula_and_the_dtypes() -> None:
    """``out - sigmoid(block_lse - lse) * (out - block_out)``, in fp32 for blocks of less."""
    parts, want, _ = blocks(4, 1.0, torch.bfloat16)
    out = lse = None
    for block_out, block_lse in parts:
        before = None if out is None else (out.clone(), lse.clone())
        new, new_lse = update_out_and_lse(out, lse, block_out, block_lse)
        assert new.dtype == new_lse.dtype == torch.float32 and new_lse.shape == (2, 4, 3, 1)
        if before is not None:
            assert new is out and new_lse is lse, "in place"
            weight = torch.sigmoid(block_lse.transpose(1, 2).unsqueeze(-1) - before[1])
            torch.testing.assert_close(new, before[0] - weight * (before[0] - block_out), rtol=1e-5, atol=1e-6)
        out, lse = new, new_lse
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2)


def test_the_first_block_is_copied() -> None:
    block_out, block_lse = torch.ones(1, 2, 1, 3), torch.zeros(1, 1, 2)
    out, lse = update_out_and_lse(None, None, block_out, block_lse)
    update_out_and_lse(out, lse, block_out + 1, block_lse)
    assert (block_out == 1).all() and (block_lse == 0).all()


def test_a_slice_of_rows() -> None:
    parts, _, _ = blocks(2, 1.0)
    ulps = {"rtol": 4e-16, "atol": 4e-16}  # torch's loops over vectors and over what is left of them, which rows are in, may differ
    out, lse = update_out_and_lse(None, None, *parts[0])
    whole, whole_lse = update_out_and_lse(out.clone(), lse.clone(), *parts[1])
    first, first_lse = out.clone(), lse.clone()
    rows = (slice(None), slice(1, 3))
    block_out, block_lse = parts[1]
    got, got_lse = update_out_and_lse(out, lse, block_out[:, 1:3], block_lse[:, :, 1:3], slice_=rows)
    assert got is out and got_lse is lse
    torch.testing.assert_close(got[rows], whole[rows], **ulps)
    torch.testing.assert_close(got_lse[rows], whole_lse[rows], **ulps)
    for row in (0, 3):
        assert torch.equal(got[:, row], first[:, row]) and torch.equal(got_lse[:, row], first_lse[:, row])
    index = (slice(None), torch.tensor([1, 2]))  # a copy
    got, got_lse = update_out_and_lse(first.clone(), first_lse.clone(), block_out[:, 1:3], block_lse[:, :, 1:3], slice_=index)
    assert torch.equal(got, out) and torch.equal(got_lse, lse)
    with pytest.raises(ValueError, match="the first block sets every row"):
        update_out_and_lse(None, None, *parts[0], slice_=rows)


def test_rows_that_see_nothing_as_flash_attention_2_says_it() -> None:
    """Zeros of weight +inf count for nothing; what overflowed stays what it is."""
    block_out, block_lse = torch.randn(1, 3, 1, 2), torch.zeros(1, 1, 3)
    block_out[:, 1], block_lse[:, :, 1], block_lse[:, :, 2] = 0.0, INF, INF
    for first in (True, False):
        before = (None, None) if first else (torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 1))
        out, lse = update_out_and_lse(*before, block_out, block_lse)
        assert torch.equal(out[:, 1], torch.full((1, 1, 2), 0.0 if first else 1.0)) and lse[0, 1] == (-INF if first else 1.0)
        assert lse[0, 2] == INF


def test_blocks_that_do_not_fit() -> None:
    out, lse, block_out, block_lse = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 1), torch.ones(1, 4, 2, 3), torch.zeros(1, 2, 4)
    for given, words in (
        ((out, None, block_out, block_lse), "lse None: give both"),
        ((None, lse, block_out, block_lse), "out is None"),
        ((out, lse, block_out, block_lse.transpose(1, 2)), "give .B, l, H, Dv. and .B, H, l."),
        ((out, lse, block_out[:, :1], block_lse[..., :1]), "as many rows"),
        ((out, lse, block_out[..., :1], block_lse), "as many rows, heads and features"),
        ((out, lse[:, :1], block_out, block_lse), "as many rows"),
    ):
        with pytest.raises(ValueError, match=words):
            update_out_and_lse(*given)


def test_boundaries_of_other_rows() -> None:
    cu = torch.tensor([0, 1, 5])
    assert unflatten_varlen_lse(torch.ones(6, 2, 1), cu, 4).isfinite().sum() == 10  # the last row is of no document
    for lse, most in (
        (torch.zeros(2, 5), 4),
        (torch.zeros(6, 2), 4),
        (torch.zeros(4, 2, 1), 4),
        (torch.zeros(5, 2), 3),
        (torch.zeros(5), 4),
    ):
        with pytest.raises(ValueError, match=r"give \[T, H\]"):
            unflatten_varlen_lse(lse, cu, most)
    for lse in (torch.zeros(2, 1, 3), torch.zeros(1, 1, 4), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"give \[documents, H, max_seqlen\]"):
            flatten_varlen_lse(lse, cu)


@pytest.mark.parametrize("lengths", [[3], [1, 4, 2], [2, 0, 3]])
def test_flatten_and_unflatten(lengths: list[int]) -> None:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = torch.randn(sum(lengths), 5)
    for given in (packed, packed.unsqueeze(-1)):
        padded = unflatten_varlen_lse(given, cu, max(lengths) + 1)
        assert padded.shape == (len(lengths), 5, max(lengths) + 1)
        for row, length, rows in zip(padded, lengths, packed.split(lengths), strict=True):
            assert torch.equal(row[:, :length], rows.T) and (row[:, length:] == -INF).all()
        assert torch.equal(flatten_varlen_lse(padded, cu), packed.T)


@pytest.mark.parametrize(
    ("layout", "transport", "given"),
    [
        ("zigzag", "ring", {"causal": True}),
        ("zigzag", "grouped_ring", {"causal": True}),
        ("contiguous", "ring", {}),
        ("contiguous", "halo", {"causal": True, "window": (9, 0)}),
        ("stripe", "ring", {"causal": True, "heads_stride": 1}),
        ("balanced", "ring", {"causal": True}),
        ("zigzag-per-document", "ring", {"causal": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_walk_that_merges_many_at_once(
    dtype: torch.dtype, layout: str, transport: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerators do it: rows with as many results as are merged at once, and with more."""
    skip_without_triton("cpu")
    inputs, tokens = oracle.inputs(0, (2, 40, 40), (4, 2, 8, 8), dtype), 40
    cu = {"balanced": [0, 3, 17, tokens], "zigzag-per-document": [*range(0, 36, 5), 36, tokens]}.get(layout)
    seen = build(tokens, **{name: value for name, value in given.items() if name != "heads_stride"}, cu_seqlens_q=cu)
    results, calls, kernel = Counter[int](), mock.Mock(side_effect=merge_all_), fused()
    many_at_once(monkeypatch)
    by_table = mock.Mock(side_effect=kernel.merge_)
    monkeypatch.setattr(kernel, "merge_", by_table)
    monkeypatch.setattr(merges, "merge_all_", calls)
    for world in (3, 8):
        recipe = Recipe(group=f"local:{world}", layout=layout, transport=transport, kernel="reference", **given)
        got = oracle.run(inputs, 0.5, recipe, cu)
        results.update(len(call.args[2]) for call in (*calls.call_args_list, *by_table.call_args_list))
        oracle.assert_close(got, oracle.dense(inputs, seen.as_array(), 0.5), 3e-2 if dtype == torch.bfloat16 else 1e-10)
    if layout == "zigzag-per-document":
        assert any(len(call.args) == 6 for call in by_table.call_args_list), "what lies in many intervals is merged row by row"
        return
    assert max(results) >= {"grouped_ring": 3, "halo": 1}.get(transport, 4), "the first one may be the memory itself"


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from nnscaler_ring.core import fused

constants = {"ROWS": fused.ROWS, "WIDTH": 128, "EXACT": tl.float32}


def compiled(kernel, free, types, **known):
    known |= constants
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name not in {*known, *free}}
    made = triton.compile(ASTSource(kernel, signature, known, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(kernel.__name__, known["N"], known["TABLE"], "ld.global.v4" in made.asm["ptx"] and "st.global.v4" in made.asm["ptx"])


parts = {**{f"p{n}": "*bf16" for n in range(4)}, **{f"w{n}": "*fp32" for n in range(4)}}
for into, out, lse, number, fresh in (
    *(("bf16", "bf16", "fp32", 4, True), ("fp32", "fp32", "fp64", 4, False)),
    *(("bf16", "fp32", "fp64", 4, False), ("fp32", "fp32", "fp64", 1, False)),
):
    types = {"into": f"*{into}", "out": f"*{out}", "lse": f"*{lse}", "at": "*i32", **parts}
    for table in (False, True):
        compiled(fused._merge, fused._ANY, types, N=number, FRESH=fresh, TABLE=table)
for out, first, number in (("fp32", "fp32", 5), ("fp32", "bf16", 4), ("bf16", "fp32", 3)):
    terms = {f"p{n}": "*bf16" for n in range(1, 5)}
    types = {"out": f"*{out}", "p0": f"*{first}", "at": "*i32", **terms}
    for table in (False, True):
        compiled(fused._add, ("rows", "length", "at_l"), types, N=number, TABLE=table)
"""


def test_the_fused_kernels_compile() -> None:
    """For a GPU that is not here, in a process without the interpreter; memory is read and written 16 bytes at a time."""
    pytest.importorskip("triton", minversion="3.4")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    wanted = [("_merge", number) for number in (4, 4, 4, 1)] + [("_add", number) for number in (5, 4, 3)]
    assert done.stdout.splitlines() == [f"{name} {number} {table} True" for name, number in wanted for table in (False, True)], (
        done.stderr
    )
