"""One suite that every kernel backend runs, against dense float64; what a backend declares to lack is skipped by name.

`--device` chooses where; on each device at least `reference` runs everything.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler_ring.core import kernels, layouts, mask
from nnscaler_ring.core.kernels import KERNELS, Case, Grad, Kernel, Scores, check_kernel, choose, tiles
from nnscaler_ring.core.kernels.base import Window
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.plan import plans
from tests import oracle
from tests.interpreter import skip_without_triton
from tests.shapes import HEADS

BACKENDS = [
    # In Triton's interpreter the suite takes long; `test_triton` is the quick part of it.
    pytest.param(kernel, id=f"{name}-{type(kernel).__name__}", marks=[pytest.mark.slow] if name == "triton" else [])
    for name, each in KERNELS.items()
    for kernel in each
]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WINDOWS: list[Window] = [(-1, -1), (-1, 0), (0, -1), (0, 0), (-1, 2), (3, -1), (2, 1), (4, 0), (-1, 5)]
ROWS, KEYS = 11, 12
SPANS = {
    "one": [(0, 7, 0, 7)],
    "inside": [(2, 6, 3, 9)],
    "documents": [(0, 5, 0, 5), (5, 11, 5, 11)],
    "gaps": [(1, 4, 2, 6), (6, 10, 0, 5)],
    "shared keys": [(0, 4, 0, 9), (4, 8, 0, 9), (8, 11, 2, 9)],
    "more queries": [(0, 10, 3, 8)],
    "one row": [(3, 4, 0, 6)],
    "one key": [(0, 6, 5, 6), (6, 8, 2, 3)],
}


def fits(span: tuple[int, ...], window: Window) -> bool:
    """Whether a plan has such a span: every row sees a key, every key is seen, and a limit that is given excludes something."""
    num_q, num_k = span[1] - span[0], span[3] - span[2]
    low, high = num_k - num_q - window[0], num_k - num_q + window[1]
    return (window[0] < 0 or -(num_q - 1) < low <= 0) and (window[1] < 0 or 0 <= high < num_k - 1)


def band(num_q: int, num_k: int, window: Window) -> np.ndarray:
    """What a window aligned at the last row and key shows."""
    distance = (np.arange(num_k) - num_k) - (np.arange(num_q) - num_q)[:, None]
    return ((window[0] < 0) | (distance >= -window[0])) & ((window[1] < 0) | (distance <= window[1]))


class Problem(NamedTuple):
    """Some spans of one window, and a second call on `MORE` keys behind the others that the same rows see fully."""

    given: oracle.Inputs
    spans: np.ndarray
    more: np.ndarray
    window: Window
    scale: float

    @property
    def rows(self) -> Tensor:
        return torch.cat([torch.arange(i0, i1) for i0, i1, _, _ in self.spans.tolist()])

    def seen(self, both: bool) -> np.ndarray:
        seen = np.zeros((self.given.q.shape[1], self.given.k.shape[1]), dtype=bool)
        for i0, i1, j0, j1 in self.spans.tolist():
            seen[i0:i1, j0:j1] = band(i1 - i0, j1 - j0, self.window)
        for i0, i1, j0, j1 in self.more.tolist() if both else ():
            seen[i0:i1, j0:j1] = True
        return seen


MORE = 3


def problem(spans, window: Window, heads: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, size=(ROWS, KEYS)):
    num_q, num_k = size
    table = np.array(spans)
    more = np.column_stack([table[:, :2], np.full(len(table), num_k), np.full(len(table), num_k + MORE)])
    given = oracle.inputs(len(spans), (2, num_q, num_k + MORE), heads, dtype, device)
    return Problem(given, table, more, window, heads[2] ** -0.5)


def checked(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int, int]) -> None:
    """Skips by the name of what the backend lacks."""
    heads_q, heads_k, dim, dim_v = heads
    try:
        kernel.check(Case(device.type, dtype, dim, dim_v, heads_q, heads_k))
    except NotImplementedError as why:
        pytest.skip(f"{kernel.name} lacks: {why}")
    if kernel.name == "triton":
        skip_without_triton(device.type)


def backward(kernel: Kernel, p: Problem, out: Tensor, lse: Tensor, start: float = 0.0, deterministic: bool = False) -> list[Tensor]:
    """The accumulators, from `start`, after both calls."""
    sums = oracle.sums(p.given[:3], start)
    for spans, window in ((p.spans, p.window), (p.more, (-1, -1))):
        grad = Grad(p.given.q, out, p.given.d_out, lse, *sums, deterministic=deterministic)
        kernel.backward(grad, p.given.k, p.given.v, spans, window, Scores(scale=p.scale))
    return [x.total() for x in sums]


def check_forward(kernel: Kernel, p: Problem, tolerance: float) -> None:
    out, lse = kernel.forward(*p.given[:3], p.spans, p.window, Scores(scale=p.scale))
    want, want_lse = oracle.attention(*(x.double() for x in p.given[:3]), p.seen(both=False), p.scale)
    exact = torch.promote_types(p.given.q.dtype, torch.float32)
    assert out.dtype in (p.given.q.dtype, exact) and lse.dtype == exact
    assert oracle.error(out, want[:, p.rows]) <= tolerance, (p.spans, p.window)
    assert oracle.error(lse, want_lse[:, :, p.rows]) <= min(tolerance, 1e-4), (p.spans, p.window)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_gradient_of_the_log_sum_exp(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
    heads = (4, 2, 8, 6)
    checked(kernel, device, dtype, heads)
    check_lse_gradient(kernel, dtype, device, heads)


def check_lse_gradient(kernel: Kernel, dtype: torch.dtype, device: torch.device, heads: tuple[int, int, int, int]) -> None:
    """It adds its weighted self to the gradients of q and k, and nothing to that of v."""
    for window, name in (((-1, -1), "inside"), ((-1, 0), "documents"), ((2, 1), "inside")):
        p = problem(SPANS[name], window, heads, dtype, device)
        d_lse = torch.randn(2, heads[0], ROWS, generator=torch.Generator().manual_seed(3)).to(device)
        leaves = [x.to("cpu", torch.float64, copy=True).requires_grad_() for x in p.given[:3]]
        seen = torch.from_numpy(p.seen(both=False))
        scores = torch.einsum("bihd,bjhd->bhij", leaves[0], leaves[1].repeat_interleave(2, 2)) * p.scale
        some = seen.any(1)
        scores = scores.masked_fill(~(seen | ~some.unsqueeze(1)), -torch.inf)
        weights = scores.softmax(-1) * some.unsqueeze(1)
        out = torch.einsum("bhij,bjhd->bihd", weights, leaves[2].repeat_interleave(2, 2))
        lse = scores.logsumexp(-1) * some
        loss = (out * p.given.d_out.double().cpu()).sum() + (lse * d_lse.double().cpu()).sum()
        want = torch.autograd.grad(loss, leaves)
        exact = torch.promote_types(dtype, torch.float32)
        sums = oracle.sums(p.given[:3])
        saved = (out.detach().to(device, dtype), p.given.d_out, torch.where(some, lse.detach(), -torch.inf).to(device, exact))
        grad = Grad(p.given.q, *saved, *sums, d_lse=d_lse.to(exact))
        kernel.differentiate(grad, p.given.k, p.given.v, p.spans, window, Scores(scale=p.scale))
        for got, expected in zip(sums, want, strict=True):
            assert oracle.error(got.total().cpu(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_gradient_of_the_log_sum_exp_beyond_fp16(kernel: Kernel, device: torch.device) -> None:
    """As of a z-loss that is scaled; the gradients are within its range."""
    heads = (4, 2, 8, 6)
    checked(kernel, device, torch.float16, heads)
    p = problem(SPANS["one"], (-1, -1), heads, torch.float16, device)
    given = p.given._replace(q=p.given.q / 8, k=p.given.k / 8)
    d_lse, found = torch.full((2, heads[0], ROWS), 1e5, device=device), []
    for dtype, backend in ((torch.float16, kernel), (torch.float64, Reference())):
        q, k, v, d_out = (x.to(dtype) for x in given)
        out, lse = (x.to(q) for x in oracle.attention(*(x.double() for x in given[:3]), p.seen(both=False), p.scale))
        sums = oracle.sums((q, k, v))
        grad = Grad(q, out, d_out, lse.to(torch.promote_types(dtype, torch.float32)), *sums, d_lse=d_lse.to(sums[0].total().dtype))
        backend.differentiate(grad, k, v, p.spans, (-1, -1), Scores(scale=p.scale))
        found.append([x.total() for x in sums])
    for got, want in zip(*found, strict=True):
        assert got.isfinite().all() and oracle.error(got, want) <= TOLERANCE[torch.float16]


def check_backward(kernel: Kernel, p: Problem, tolerance: float) -> None:
    """Both calls, each from the out and lse over all keys, together give the dense gradient, added to what was there."""
    want = oracle.dense(p.given, p.seen(both=True), p.scale)
    start, exact = 3.0, torch.promote_types(p.given.q.dtype, torch.float32)
    sums = backward(kernel, p, want.out.to(p.given.q.dtype), want.lse.to(exact), start)
    seen = p.seen(both=True)
    for name, got, grad, sees in zip(("dq", "dk", "dv"), sums, want[2:], (seen.any(1), seen.any(0), seen.any(0)), strict=True):
        assert got.dtype == exact
        assert oracle.error(got - start, grad) <= tolerance, (name, p.spans, p.window)
        assert (got[:, torch.from_numpy(~sees)] == start).all(), f"{name} of rows outside the spans is untouched"


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_spans_and_windows(kernel: Kernel, dtype: torch.dtype, window: Window, device: torch.device) -> None:
    ran = 0
    for spans, heads in itertools.product(SPANS.values(), [(4, 2, 8, 8), (3, 1, 5, 3), (2, 2, 1, 4)]):
        checked(kernel, device, dtype, heads)
        if all(fits(span, window) for span in spans):
            p = problem(spans, window, heads, dtype, device)
            check_forward(kernel, p, TOLERANCE[dtype])
            check_backward(kernel, p, TOLERANCE[dtype])
            ran += 1
    assert ran >= 3


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: heads.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_heads(kernel: Kernel, dtype: torch.dtype, heads, device: torch.device) -> None:
    few = heads.fewer()
    sizes = (few.num_q, few.num_k, few.dim, few.dim_v)
    checked(kernel, device, dtype, sizes)
    for spans, window in [(SPANS["documents"], (-1, 0)), (SPANS["shared keys"], (-1, -1)), (SPANS["inside"], (2, 1))]:
        p = problem(spans, window, sizes, dtype, device)
        check_forward(kernel, p, TOLERANCE[dtype])
        check_backward(kernel, p, TOLERANCE[dtype])


LONG = [
    ((1000, 1000), (-1, 0)),
    ((800, 2100), (-1, 300)),
    ((2050, 2050), (-1, 0)),
    ((1000, 900), (300, -1)),
    ((900, 900), (200, 0)),
    ((1300, 1500), (700, 150)),
    ((700, 2000), (1300, 0)),
    ((1100, 1300), (-1, -1)),
]


@pytest.mark.parametrize(("size", "window"), LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_long_spans(kernel: Kernel, dtype: torch.dtype, size: tuple[int, int], window: Window, device: torch.device) -> None:
    """Long enough for every way in which a backend cuts a span; two spans where the window is narrow."""
    heads = (2, 1, 8, 8)
    checked(kernel, device, dtype, heads)
    spans = [(0, size[0], 0, size[1])]
    assert all(fits(span, window) for span in spans)
    p = problem(spans, window, heads, dtype, device, size)
    check_forward(kernel, p, TOLERANCE[dtype])
    check_backward(kernel, p, TOLERANCE[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize(("size", "window"), [((2048, 2048), (-1, 0)), ((1152, 1280), (-1, -1)), ((2048, 2176), (-1, 0))], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_spans_of_whole_blocks(kernel: Kernel, head_dim: int, size: tuple[int, int], window: Window, device: torch.device) -> None:
    """As cuDNN takes them, and one that it does not; more query heads than key heads."""
    heads = (4, 2, head_dim, head_dim)
    checked(kernel, device, torch.bfloat16, heads)
    p = problem([(0, size[0], 0, size[1])], window, heads, torch.bfloat16, device, size)
    check_forward(kernel, p, TOLERANCE[torch.bfloat16])
    check_backward(kernel, p, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_logits_of_1e4(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
    """No NaN, and the right row wins; a score of 1e4 in fp32 is known to 1e-3, which is what the weights may be off."""
    heads = (4, 2, 8, 8)
    checked(kernel, device, dtype, heads)
    for window in ((-1, 0), (2, 1), (-1, -1)):
        p = problem(SPANS["one"], window, heads, dtype, device)
        given = p.given._replace(q=p.given.q * 100, k=p.given.k * 100)
        p = p._replace(given=given)
        assert (torch.einsum("bihd,bjhd->bhij", given.q[:, :, ::2].double(), given.k.double()) * p.scale).abs().max() > 1e4
        check_forward(kernel, p, max(TOLERANCE[dtype], 1e-2 if dtype != torch.float64 else 0.0))
        check_backward(kernel, p, max(TOLERANCE[dtype], 5e-2 if dtype != torch.float64 else 1e-9))


@pytest.mark.parametrize("kernel", BACKENDS)
def test_any_strides_and_untouched_inputs(kernel: Kernel, device: torch.device) -> None:
    """Heads cut out of a fused tensor, and keys and values as they lie in a buffer of packed rows."""
    dtype = torch.float64 if device.type == "cpu" else torch.bfloat16
    heads = (4, 2, 8, 4)
    checked(kernel, device, dtype, heads)
    plain = problem(SPANS["gaps"], (-1, 0), heads, dtype, device)
    fused = torch.cat([plain.given.q, plain.given.q + 1, plain.given.q], dim=2)
    batch, num_k, heads_k, dim = plain.given.k.shape
    rows = torch.cat([x.transpose(0, 1).flatten(2) for x in plain.given[1:3]], dim=-1)
    k = rows[..., : heads_k * dim].unflatten(-1, (heads_k, -1)).transpose(0, 1)
    v = rows[..., heads_k * dim :].unflatten(-1, (heads_k, -1)).transpose(0, 1)
    d_out = torch.cat([plain.given.d_out, plain.given.d_out], dim=2)[:, :, heads[0] :]
    p = plain._replace(given=oracle.Inputs(fused[:, :, 8:], k, v, d_out))
    before = [x.clone() for x in p.given]
    assert not any(x.is_contiguous() for x in p.given) and batch == 2 and num_k == KEYS + MORE
    check_forward(kernel, p, TOLERANCE[dtype])
    check_backward(kernel, p, TOLERANCE[dtype])
    assert all(torch.equal(x, y) for x, y in zip(p.given, before, strict=True)), "inputs are as they were"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_deterministic_means_the_same_bits(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
    heads = (4, 2, 16, 16)
    checked(kernel, device, dtype, heads)
    p = problem([(0, 300, 0, 300)], (-1, 0), heads, dtype, device, (300, 300))
    want = oracle.dense(p.given, p.seen(both=True), p.scale)
    saved = want.out.to(dtype), want.lse.float()
    answers = [
        [*kernel.forward(*p.given[:3], p.spans, p.window, Scores(scale=p.scale)), *backward(kernel, p, *saved, deterministic=True)]
        for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))


# -- the choice ------------------------------------------------------------------------------------------------------------------


def test_an_unknown_kernel_lists_the_known() -> None:
    for refuse in (check_kernel, lambda name: choose(name, Case("cpu", torch.float32, 8, 8, 1, 1))):
        with pytest.raises(ValueError, match=f"unknown kernel 'cutlass': choose one of auto, {', '.join(KERNELS)}"):
            refuse("cutlass")
    assert [check_kernel(name) for name in ("auto", *KERNELS)] == ["auto", *KERNELS]


def test_what_each_backend_lacks_is_said() -> None:
    with pytest.raises(
        NotImplementedError, match=r"no kernel 'aten' for float32 on meta, 1/1 heads of 8.*CPU kernel.*on meta.*CUDA.*on meta"
    ):
        choose("aten", Case("meta", torch.float32, 8, 8, 1, 1))
    assert choose("auto", Case("meta", torch.float32, 8, 8, 1, 1)).name == "reference", "the last resort takes all"
    dropout = Case("cpu", torch.float32, 8, 8, 1, 1, features=frozenset({"dropout"}))
    with pytest.raises(NotImplementedError, match=r"8, dropout: aten: it has no dropout\..*triton, reference have"):
        choose("aten", dropout)
    assert choose("auto", dropout).name == "reference"
    assert choose("auto", Case("cpu", torch.float64, 8, 4, 4, 2)).name == "aten"
    cuda = [kernel for kernel in KERNELS["aten"] if isinstance(kernel, kernels.AtenCuda)]
    for case in [Case("cuda", torch.float32, 8, 8, 1, 1), Case("cuda", torch.bfloat16, 264, 8, 1, 1)]:
        for kernel in cuda:
            with pytest.raises(NotImplementedError, match="FlashAttention-2 takes"):
                kernel.check(case)


# -- how the CPU kernel's calls are cut ------------------------------------------------------------------------------------------


def computed(piece: tiles.Piece) -> np.ndarray:
    """The ``(row, key)`` pairs ``[n, 2]`` that a piece is about, its repeats included."""
    pairs = []
    for n in range(piece.repeat):
        shift = n * (piece.i1 - piece.i0)
        i, j = np.meshgrid(np.arange(piece.i0, piece.i1), np.arange(piece.j0, piece.j1), indexing="ij")
        seen = {
            tiles.Kind.FULL: np.ones(i.shape, dtype=bool),
            tiles.Kind.CAUSAL: j - piece.j0 <= i - piece.i0,
            tiles.Kind.ANTI: piece.j1 - j <= piece.i1 - i,
            tiles.Kind.BAND: (j - i >= piece.low) & (j - i <= piece.high),
        }[piece.kind]
        pairs.append(np.column_stack([i[seen] + shift, j[seen] + shift]))
    return np.concatenate(pairs)


def computed_pairs(piece: tiles.Piece) -> int:
    """Pairs that torch's CPU kernel computes for a piece and its repeats: of a causal call, 256 rows at a time, whole blocks of 512
    keys past the diagonal, as its source says for 768 rows or more."""
    num_q, num_k = piece.i1 - piece.i0, piece.j1 - piece.j0
    if piece.kind in (tiles.Kind.FULL, tiles.Kind.BAND):
        return num_q * num_k * piece.repeat
    ends = ((i, min(i + 256, num_q)) for i in range(0, num_q, 256))
    return sum((end - i) * min(num_k, -(-end // 512) * 512) for i, end in ends)


@pytest.mark.parametrize("window", [*WINDOWS, (100, 0), (-1, 130), (70, 90), (600, 40), (300, -1)], ids=str)
def test_pieces_are_the_band(window: Window) -> None:
    sizes = [(1, 1), (5, 9), (9, 5), (64, 64), (65, 200), (200, 190), (700, 700), (900, 1000), (1100, 1040)]
    ran = 0
    for num_q, num_k in sizes:
        if fits((0, num_q, 0, num_k), window):
            count, found = np.zeros((num_q, num_k), dtype=int), tiles.pieces(num_q, num_k, window)
            for piece in found:
                np.add.at(count, tuple(computed(piece).T), 1)
            np.testing.assert_array_equal(count, band(num_q, num_k, window))
            assert sum(map(computed_pairs, found)) >= count.sum()
            ran += 1
    assert ran


VISIBLE = {
    "causal": {"causal": True},
    **{f"causal window {w}": {"causal": True, "window": (w, 0)} for w in (1024, 2048, 4096)},
    **{f"window {w}, {w}": {"window": (w, w)} for w in (1024, 2048, 4096)},
    **{f"window {w}, {w // 4}": {"window": (w, w // 4)} for w in (1024, 2048, 4096)},
    "window none, 1024": {"window": (-1, 1024)},
    "window 1024, none": {"window": (1024, -1)},
}


@pytest.mark.parametrize("length", [4096, 8192, 16384])
@pytest.mark.parametrize("name", VISIBLE)
def test_the_cpu_kernel_computes_little_more_than_is_visible(name: str, length: int) -> None:
    """At most 1.15 x on every rank, by `computed_pairs`; what a call really computes cannot be observed from Python, only timed."""
    seen = mask.build(length, **VISIBLE[name])
    for world, place, transport in itertools.product((1, 2, 4, 8), ("contiguous", "zigzag"), ("ring", "halo", "all_gather")):
        rows = layouts.build(place, length, world)
        for p in plans(seen, rows, rows, transport):
            done = sum(
                computed_pairs(piece)
                for step in p.steps
                for calls in step.calls
                for i0, i1, j0, j1 in calls.spans.tolist()
                for piece in tiles.pieces(i1 - i0, j1 - j0, calls.window)
            )
            assert p.pairs <= done <= 1.15 * p.pairs, f"{done / p.pairs:.3f} x: {place}, {transport}\n{p}"


@pytest.mark.parametrize("window", [(0, -1), (5, -1)])
def test_triangles_that_are_read_backwards(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LONG", 16)
    assert any(piece.kind is tiles.Kind.ANTI for piece in tiles.pieces(40, 40, window))
    (kernel,) = (each for each in KERNELS["aten"] if each.name == "aten" and type(each).__name__ == "AtenCpu")
    p = problem([(0, 40, 0, 40)], window, (2, 1, 8, 8), torch.float64, torch.device("cpu"), (40, 40))
    check_forward(kernel, p, TOLERANCE[torch.float64])
    check_backward(kernel, p, TOLERANCE[torch.float64])
