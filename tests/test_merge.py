"""The online-softmax merge: equal to the softmax over everything, at any size of logits, and silent about rows that see nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.merge import flatten_varlen_lse, fused, merge_, unflatten_varlen_lse, update_out_and_lse

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
    return kernel


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
    kernel, exact = fused(), torch.promote_types(dtype, torch.float32)
    assert kernel is not None
    generator = torch.Generator().manual_seed(0)
    out, lse = (torch.randn(2, 9, 5, n, generator=generator, dtype=exact) for n in (7, 1))
    part = torch.randn(2, 4, 9, 7, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)[:, 2:]
    part_lse = torch.randn(2, 4, 7, generator=generator, dtype=exact).transpose(1, 2).unsqueeze(3)
    part_lse[0, 3] = lse[0, 3, 0] = -INF
    wanted, got = [(out.clone(), lse.clone()) for _ in range(2)]
    for function, (o, l) in ((merge_, wanted), (kernel, got)):
        function(o[:, 1:8, 1:], l[:, 1:8, 1:], part, part_lse)
    for have, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5 if exact == torch.float32 else 1e-13, atol=1e-6)


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
    out, lse = update_out_and_lse(None, None, *parts[0])
    whole, whole_lse = update_out_and_lse(out.clone(), lse.clone(), *parts[1])
    first, first_lse = out.clone(), lse.clone()
    rows = (slice(None), slice(1, 3))
    block_out, block_lse = parts[1]
    got, got_lse = update_out_and_lse(out, lse, block_out[:, 1:3], block_lse[:, :, 1:3], slice_=rows)
    assert got is out and got_lse is lse
    torch.testing.assert_close(got[rows], whole[rows], rtol=0, atol=0)
    torch.testing.assert_close(got_lse[rows], whole_lse[rows], rtol=0, atol=0)
    for row in (0, 3):
        assert torch.equal(got[:, row], first[:, row]) and torch.equal(got_lse[:, row], first_lse[:, row])
    with pytest.raises(ValueError, match="the first block sets every row"):
        update_out_and_lse(None, None, *parts[0], slice_=rows)


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
