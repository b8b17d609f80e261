"""The op as autograd, torch.compile and users meet it: graphs, bits, precision, edges, refusals. The grid is in test_property."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from nnscaler_ring.core import engine
from nnscaler_ring.core.mask import build
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.shapes import HEADS, VARIANTS

KERNELS = ("reference", "aten")
SIZES, SMALL = (2, 21, 21), (4, 2, 6, 4)
SCALE = 0.4
CAUSAL = build(21, causal=True).as_array()


def recipe(world: int = 4, **named: Any) -> Recipe:
    return Recipe(**{"group": f"local:{world}", "layout": "zigzag", "transport": "ring", "causal": True, **named})


def leaves(given: oracle.Inputs) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in given[:3]]


def op(q: Tensor, k: Tensor, v: Tensor, how: Recipe, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    return engine.attention(q, k, v, *[None] * 6, q.shape[1], k.shape[1], scale, 0, str(how))[:2]


HOW = [
    pytest.param(recipe(world, transport=transport, kernel=kernel), id=f"{world}-{transport}-{kernel}")
    for world, transport, kernel in itertools.product((1, 4), ("ring", "all_gather", "halo"), KERNELS)
]


@pytest.mark.parametrize("how", HOW)
def test_backward_twice_through_one_graph(how: Recipe) -> None:
    given = oracle.inputs(0, SIZES, SMALL)
    qkv = leaves(given)
    out, _ = op(*qkv, how)
    first = torch.autograd.grad(out, qkv, given.d_out, retain_graph=True)
    second = torch.autograd.grad(out, qkv, given.d_out, retain_graph=True)
    doubled = torch.autograd.grad(out, qkv, 2 * given.d_out)
    for a, b, c in zip(first, second, doubled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 2 * a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
def test_twice_in_one_graph(how: Recipe) -> None:
    """The second call's queries are the first one's result, and both read the same keys."""
    given = oracle.inputs(0, SIZES, (4, 2, 6, 6))
    qkv = leaves(given)
    got, _ = op(op(*qkv, how)[0], qkv[1], qkv[2], how)
    want_leaves = leaves(given)
    inner, _ = oracle.attention(*want_leaves, CAUSAL, SCALE)
    want, _ = oracle.attention(inner, *want_leaves[1:], CAUSAL, SCALE)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    grads = zip(torch.autograd.grad(got, qkv, given.d_out), torch.autograd.grad(want, want_leaves, given.d_out), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", HOW)
def test_calls_share_no_memory(how: Recipe) -> None:
    """What a caller does to a result changes no later one; inputs stay as they are."""
    given = oracle.inputs(0, SIZES, SMALL)
    rest = ([None] * 6, SIZES[1:], SCALE, 0, str(how))
    answers = []
    for _ in range(2):
        out, lse = op(*given[:3], how)
        grads = engine.attention_backward([given.d_out, *given[:3], out, lse], None, *rest, False)
        answers.append([x.clone() for x in (out, lse, *grads)])
        for x in (out, lse, *grads):
            assert all(x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for y in given)
            x.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, oracle.inputs(0, SIZES, SMALL), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_deterministic_means_the_same_bits(name: str, dtype: torch.dtype) -> None:
    variant, length = VARIANTS[name], 64
    named = variant.mask(length, 4)
    cu = named.pop("cu_seqlens_q", None)
    how = recipe(**{**named, "layout": variant.layout, "transport": variant.transport, "deterministic": True})
    given = oracle.inputs(0, (2, length, length), SMALL, dtype)
    for a, b in zip(*(oracle.run(given, SCALE, how, cu) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", HOW)
def test_the_scale_is_honoured(how: Recipe) -> None:
    given = oracle.inputs(0, SIZES, SMALL)
    for scale in (0.01, 1.7, -0.5, 0.0):
        oracle.assert_close(oracle.run(given, scale, how), oracle.dense(given, CAUSAL, scale), 1e-11)


def error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The largest and the mean error."""
    wrong = (got.double() - want).abs()
    return float(wrong.max()), float(wrong.mean())


@pytest.mark.parametrize("heads", [HEADS[1], HEADS[3]], ids=lambda heads: heads.name)
@pytest.mark.parametrize("name", ["ring", "zigzag", "stripe", "zigzag-gather", "window-halo", "streaming-ring"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_is_at_most_twice_as_wrong_as_one_dense_call(kernel: str, name: str, heads: Any) -> None:
    """Over 8 ranks, in the largest and in the mean error of out and of each gradient: no drift as the world grows."""
    variant, length, world, few = VARIANTS[name], 512, 8, heads.fewer()
    named = variant.mask(length, world)
    given = oracle.inputs(0, (1, length, length), (few.num_q, few.num_k, few.dim, few.dim_v), torch.bfloat16)
    scale, seen = few.dim**-0.5, build(length, **named).as_array()
    want = oracle.dense(given, seen, scale)
    qkv = leaves(given)
    # Of other head dims torch's flash kernel takes none, nor fewer key heads in torch 2.6, and torch's math is in fp32.
    padded = F.pad(qkv[2], (0, few.dim - few.dim_v))
    k, v = (x.repeat_interleave(few.num_q // few.num_k, 2) for x in (qkv[1], padded))
    dense = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (qkv[0], k, v)), attn_mask=torch.from_numpy(seen), scale=scale
    ).transpose(1, 2)[..., : few.dim_v]
    limits = [dense.detach(), *torch.autograd.grad(dense, qkv, given.d_out)]
    how = recipe(world, layout=variant.layout, transport=variant.transport, kernel=kernel, **named)
    got = oracle.run(given, scale, how)
    assert got.lse.dtype == torch.float32 and oracle.error(got.lse, want.lse) < 1e-4, "rounded to bf16 it would be off by 4e-3"
    for part, limit, exact in zip((got.out, *got[2:]), limits, (want.out, *want[2:]), strict=True):
        assert part.dtype == torch.bfloat16
        for mine, one_call in zip(error(part, exact), error(limit, exact), strict=True):
            assert mine <= 2 * one_call, f"{mine} against {one_call} of one dense call"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_bf16_gradients_do_not_drift_as_the_world_grows(layout: str) -> None:
    """They are summed in fp32: 8 ranks are about as wrong as one. Summed in bf16, dq is 1.4 to 2.1 x as wrong, dk and dv 2.1 x."""
    length, few = 512, HEADS[1].fewer()
    given = oracle.inputs(0, (1, length, length), (few.num_q, few.num_k, few.dim, few.dim_v), torch.bfloat16)
    scale = few.dim**-0.5
    want = oracle.dense(given, build(length, causal=True).as_array(), scale)
    many, one = (oracle.run(given, scale, recipe(world, layout=layout, kernel="reference")) for world in (8, 1))
    for mine, single, exact in zip(many[2:], one[2:], want[2:], strict=True):
        assert error(mine, exact)[1] <= 1.2 * error(single, exact)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", HOW)
def test_logits_of_1e4(how: Recipe, dtype: torch.dtype) -> None:
    given = oracle.inputs(0, SIZES, (4, 2, 8, 8), dtype)
    given = given._replace(q=given.q * 120, k=given.k * 120)
    seen = CAUSAL
    want, got = oracle.dense(given, seen, SCALE), oracle.run(given, SCALE, how)
    assert want.lse.max() > 1e4 and all(x.isfinite().all() for x in got)
    oracle.assert_close(got, want, {torch.float64: 1e-8, torch.float32: 2e-2, torch.bfloat16: 5e-2}[dtype])


@pytest.mark.parametrize("how", HOW)
def test_rows_that_see_nothing(how: Recipe) -> None:
    """Out 0, lse -inf, no gradient; so are keys that nobody sees without one."""
    given = oracle.inputs(0, SIZES, SMALL)
    slices = [(3, 7, 2, 9), (12, 15, 4, 5), (15, 16, 0, 20, 2, 3)]
    got = oracle.run(given, SCALE, how, slices=slices)
    sees, seen = np.zeros(21, dtype=bool), np.zeros(21, dtype=bool)
    sees[[3, 4, 5, 6, 12, 13, 14, 15]], seen[[*range(2, 9), 17, 18]] = True, True
    assert (got.out[:, ~sees] == 0).all() and (got.lse[:, :, ~sees] == -torch.inf).all() and (got.dq[:, ~sees] == 0).all()
    assert (got.dk[:, ~seen] == 0).all() and (got.dv[:, ~seen] == 0).all()
    assert got.lse[:, :, sees].isfinite().all() and (got.dv[:, seen] != 0).all()
    nothing = oracle.run(given, SCALE, how, slices=[])
    assert all((x == 0).all() for x in (nothing.out, *nothing[2:])) and (nothing.lse == -torch.inf).all()


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 0), (0, 5), (5, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize("how", HOW)
def test_hardly_any_tokens(how: Recipe, num_q: int, num_k: int) -> None:
    given = oracle.inputs(0, (2, num_q, num_k), SMALL)
    seen = build(num_q, num_k, causal=True).as_array()
    oracle.assert_close(oracle.run(given, SCALE, how), oracle.dense(given, seen, SCALE), 1e-11)


def test_gradients_of_some_inputs_only() -> None:
    given = oracle.inputs(0, SIZES, SMALL)
    want = oracle.dense(given, CAUSAL, SCALE)
    for n, name in enumerate(("dq", "dk", "dv")):
        qkv = [x.clone().requires_grad_(m == n) for m, x in enumerate(given[:3])]
        (grad,) = torch.autograd.grad(op(*qkv, recipe())[0], [qkv[n]], given.d_out)
        torch.testing.assert_close(grad, getattr(want, name), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """Schema, fake shapes and autograd registration, with and without tables, for both ops."""
    given = oracle.inputs(0, SIZES, SMALL, dtype)
    cu, slices = torch.tensor([0, 4, 4, 21], dtype=torch.int32), oracle.table([(0, 21, 0, 21, -3, 0)])
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    ways = [((None, None, None), recipe()), ((cu, None, None), recipe()), ((cu, cu, slices), recipe())]
    ways.append(((None, None, None), recipe(transport="all_to_all")))
    for tables, how in ways:
        given_tables, rest = [*tables, None, None, None], (SCALE, 0, str(how))
        library.opcheck(engine.attention, (*leaves(given), *given_tables, 21, 21, *rest), test_utils=utils)
        out, lse, kept = engine.attention(*given[:3], *given_tables, 21, 21, *rest)
        saved = ([given.d_out, *given[:3], out, lse, *kept], None, given_tables, [21, 21], *rest, False)
        library.opcheck(engine.attention_backward, saved, test_utils=("test_schema", "test_faketensor"))


def test_gradients_are_contiguous_as_their_fakes_are() -> None:
    """Whatever the strides of what they are of, and of a bias whose rows have travelled for heads."""
    how = recipe(group="pretend:1x2:1", kernel="reference")
    q, k, v, d_out = (torch.randn(2, heads, 4, 8).transpose(1, 2) for heads in (4, 2, 2, 4))
    bias = torch.randn(8, 4, 4).permute(2, 1, 0)  # [Hq, Lq, T]
    tables, rest = [None, None, None, None, bias, None], (SCALE, 0, str(how))
    out, lse, kept = engine.attention(q, k, v, *tables, 8, 8, *rest)
    saved = ([d_out, q, k, v, out, lse, *kept], None, tables, [8, 8], *rest, True)
    grads = engine.attention_backward(*saved)
    assert len(grads) == 4 and all(x.is_contiguous() for x in grads)
    library.opcheck(engine.attention_backward, saved, test_utils=("test_schema", "test_faketensor"))


def test_a_shard_of_the_wrong_size_is_refused() -> None:
    """What came is said, also where all ranks are in this process and too many rows would be left over in silence."""
    q, k, v, _ = oracle.inputs(0, (1, 8, 8), SMALL)
    for world, num_q, num_k in [(1, 7, 8), (1, 8, 9), (2, 7, 8), (2, 8, 7), (2, 9, 9)]:
        with pytest.raises(ValueError, match="8 query and 8 key tokens"):
            engine.attention(q, k, v, *[None] * 6, num_q, num_k, SCALE, 0, str(recipe(world)))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    given = oracle.inputs(0, (1, 8, 8), SMALL)
    for named, why in [
        ({"cu_q": [0, 3, 7]}, "cu_seqlens_q runs from 0 to 7"),
        ({"cu_q": [0, 3, 8], "cu_k": [0, 8]}, "they must agree"),
    ]:
        with pytest.raises(ValueError, match=why):
            oracle.run(given, SCALE, recipe(2), **named)
    for how, why in [
        ({"layout": "zag"}, "unknown layout"),
        ({"kernel": "zag"}, "unknown kernel"),
        ({"window": (-3, 0)}, "window_size"),
    ]:
        with pytest.raises(ValueError, match=why):
            oracle.run(given, SCALE, recipe(2, **how))


def test_rows_that_see_nothing_in_half_precision() -> None:
    """Where results are merged in fp32 and rounded at the end; what is not initialised is NaN here."""
    slices = [(0, 20, 0, 24, -24, 0)]
    given = oracle.inputs(0, (1, 24, 24), (2, 1, 8, 8), torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        got = oracle.run(given, 0.3, Recipe(group="local:4", transport="ring", kernel="reference"), slices=slices)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (got.lse[:, :, 20:] == -torch.inf).all() and not got.out[:, 20:].any()


@pytest.mark.parametrize("transport", ["halo", "all_gather", "ring"])
def test_teams_whose_rows_do_not_ascend(transport: str) -> None:
    """A team has the tokens of one rank after those of the other: what is beside in its buffer is not so in position."""
    for length, window in ((24, (2, 5)), (29, (3, 0)), (30, (0, 4))):
        given = oracle.inputs(length, (1, length, length), (4, 2, 8, 8))
        recipe = Recipe(group="local:2x3", layout="stripe", transport=transport, kernel="reference", window=window)
        seen = build(length, window=window).as_array()
        oracle.assert_close(oracle.run(given, 0.3, recipe), oracle.dense(given, seen, 0.3), 1e-11, (length, window))
