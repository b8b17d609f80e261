"""The benchmark of other libraries: the stand-in for flash-attn that they run on, what is counted, and that what fails is told."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from benchmarks import flash_attn, peers
from benchmarks.peers import Case, Way
from nnscaler_ring.core import mask
from tests import oracle, releases

PEER = pytest.mark.skipif(find_spec(peers.PEER) is None, reason="needs ring_flash_attn")
ZIGZAG = Case("zigzag", peers.ZIGZAG, tokens=256, ranks=2)


def rows(tokens: int, heads: int, dim: int = 8) -> Tensor:
    return torch.randn(2, tokens, heads, dim)


def seen(q_rows: int, k_rows: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Bool ``[q_rows, k_rows]``, aligned at the last row and the last key."""
    ahead = torch.arange(k_rows) - torch.arange(q_rows).unsqueeze(1) - (k_rows - q_rows)
    left, right = window[0], 0 if causal else window[1]
    return (ahead <= (right if right >= 0 else math.inf)) & (ahead >= (-left if left >= 0 else -math.inf))


@pytest.mark.parametrize("window", [(-1, -1), (5, 0), (3, 4)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (8, 16), (16, 8)])
def test_the_stand_in_has_the_conventions_of_flash_attn(sizes: tuple[int, int], causal: bool, window: tuple[int, int]) -> None:
    q, k, v, d_out = rows(sizes[0], 4), rows(sizes[1], 2), rows(sizes[1], 2), rows(sizes[0], 4)
    visible = seen(*sizes, causal, window)
    out, lse, _, _ = flash_attn._flash_attn_forward(q, k, v, 0.0, 0.5, causal, *window, 0.0, None, False)
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    flash_attn._flash_attn_backward(d_out, q, k, v, out, lse, *grads, 0.0, 0.5, causal, *window, 0.0, None, False)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = oracle.attention(*leaves, visible.numpy(), 0.5)
    blind = ~visible.any(1)
    assert not out[:, blind].any() and torch.all(lse[..., blind] == math.inf)
    torch.testing.assert_close(out, want.float())
    torch.testing.assert_close(lse[..., ~blind], want_lse[..., ~blind].float())
    for got, expected in zip(grads, torch.autograd.grad(want, leaves, d_out.double()), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)


def test_the_stand_in_takes_packed_rows() -> None:
    cu = [0, 5, 6, 16]
    q, k, v, d_out = (rows(16, heads)[0] for heads in (4, 2, 2, 4))
    places = (torch.tensor(cu), torch.tensor(cu), 10, 10)
    out, lse, _, _ = flash_attn._flash_attn_varlen_forward(q, k, v, *places, 0.0, 0.5, True)
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    flash_attn._flash_attn_varlen_backward(d_out, q, k, v, out, lse, *grads, *places, 0.0, 0.5, True, -1, -1, 0.0, None, False)
    leaves = [x.double().unsqueeze(0).requires_grad_() for x in (q, k, v)]
    want, want_lse = oracle.attention(*leaves, mask.build(16, causal=True, cu_seqlens_q=cu).as_array(), 0.5)
    expected = [want, want_lse, *torch.autograd.grad(want, leaves, d_out.double().unsqueeze(0))]
    for got, right in zip((out, lse, *grads), expected, strict=True):
        torch.testing.assert_close(got, right[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", releases.RELEASES_2[-1].functions)
def test_the_stand_in_has_the_parameters_of_releases(name: str) -> None:
    """Those that have defaults may be missing at its end."""
    own = list(inspect.signature(getattr(flash_attn, name)).parameters)
    for release in releases.RELEASES_2[-2:]:
        theirs = [part.split(":")[0] for part in release.functions[name].split(", ")]
        assert own == theirs[: len(own)]
        assert all("=" in part for part in release.functions[name].split(", ")[len(own) :])


@PEER
def test_bytes_are_counted() -> None:
    """A zigzag ring of two ranks: keys and values once forward and once backward, of a causal mask 3/4; gradients in fp32."""
    found = peers.on_ranks(replace(ZIGZAG, dtype="float32"), ZIGZAG.ways, repeats=1)
    shard = 128 * 2 * 64 * 4  # rows, heads, dim, bytes: K or V of a rank in fp32
    theirs, ours = ([rank["sent"][at] for rank in found] for at in (0, 1))
    assert theirs == [2 * shard + 2 * shard + 2 * 2 * shard] * 2
    assert sum(ours) == 3 * 2 * 2 * shard * 3 // 4
    for rank in found:
        assert all(total[0] > inside[0] > 0 for total, inside in zip(rank["seconds"], rank["inside"], strict=True))


@PEER
def test_errors_are_told() -> None:
    """Of this package those of one device; a result that is wrong stands out; what fails is a row, the rest goes on."""
    wrong, aliased = replace(ZIGZAG, window=(100, 0)), replace(ZIGZAG, dtype="float32")
    fails = Case("fails", (Way(peers.PEER, "no_such_func", "zigzag"), ZIGZAG.ways[1]), tokens=256, ranks=2)
    absent = Case("absent", (Way("no_such_library", "func", "zigzag"),))
    theirs, ours, exact, our_exact, failed, right, missing = peers.rows([wrong, aliased, fails, absent], 0)
    assert ours[1:3] == (peers.OURS, "`zigzag_ring_flash_attn_func`")
    assert all(float(cell) < 1.5 for cell in (*ours[3:], *our_exact[3:], *right[3:]))
    assert [cell.startswith("**") for cell in theirs[3:]] == [True] * 4
    out, dq, *_ = (cell.startswith("**") for cell in exact[3:])  # its dk and dv are sent while they change: wrong nearly always
    assert dq and not out
    assert "no_such_func" in failed[3] and [*failed[4:], *missing[4:]] == [""] * 6
    assert missing[3] == "not installed"
