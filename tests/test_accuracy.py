"""Errors in half precision, against float64, on 8 and on 64 ranks: they are those of a single call of the same backend.

Each rank's results are rounded to half precision once, like those of the single call. A backend that gives partial results and
gradients in half precision, as libraries for GPUs do, rounds these besides. All such roundings together are as large as the one at
the end where the parts have nothing to do with each other, as here, however many there are: errors are then up to sqrt(2) times
those of one call, and no more on 64 ranks than on 8. Errors are root mean squares and largest differences.

Legend: `S` tokens, `Hq`/`Hk` heads, `D` head dim.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnscaler_ring.core import kernels, layouts, mask
from nnscaler_ring.core.kernels import Case, Grad, Scores
from nnscaler_ring.core.kernels.aten import AtenCpu
from nnscaler_ring.core.plan import plan
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.interpreter import skip_without_triton
from tests.shapes import seen_by_name

S, HEADS = 256, (2, 1, 64, 64)
SCALE, WORLDS = HEADS[2] ** -0.5, (8, 64)
LIMIT = 1.1
"""Of the error over that of a single call."""


@dataclass(frozen=True)
class Way:
    """A layout, a transport and a mask."""

    layout: str
    transport: str
    mask: dict[str, Any] = field(default_factory=lambda: {"causal": True}, hash=False)


WAYS = {
    "causal ring zigzag": Way("zigzag", "ring"),
    "causal ring contiguous": Way("contiguous", "ring"),
    "causal all_gather zigzag": Way("zigzag", "all_gather"),
    "full ring": Way("contiguous", "ring", {}),
    "window halo": Way("contiguous", "halo", {"causal": True, "window": (50, 0)}),
}
BACKENDS = {"reference": ("causal ring zigzag", "window halo"), "aten": tuple(WAYS), "triton": ("causal ring zigzag",)}
"""Ways to test each backend in; Triton's kernels run in their interpreter, so on 8 ranks only."""

PARTS = oracle.Answer._fields


class Error:
    """Root mean square and largest difference to float64."""

    def __init__(self, got: Tensor, want: Tensor) -> None:
        differences = got.double() - want
        self.rms, self.largest = float(differences.square().mean().sqrt()), float(differences.abs().max())
        self.size = float(want.abs().max())


@lru_cache(maxsize=16)
def answer(way: str, dtype: torch.dtype) -> tuple[oracle.Inputs, oracle.Answer]:
    """Inputs and what is right."""
    given = oracle.inputs(0, (1, S, S), HEADS, dtype)
    return given, oracle.dense(given, seen_by_name(S, S, **WAYS[way].mask), SCALE)


@lru_cache(maxsize=256)
def errors(way: str, backend: str, dtype: torch.dtype, world: int) -> dict[str, Error]:
    """Errors of each part on `world` ranks; for a world of 0 those of a single call of the backend."""
    given, want = answer(way, dtype)
    got = dense(way, backend, given) if world == 0 else ranks(way, backend, given, world)
    return {name: Error(getattr(got, name), getattr(want, name)) for name in PARTS}


def ranks(way: str, backend: str, given: oracle.Inputs, world: int) -> oracle.Answer:
    how = WAYS[way]
    recipe = Recipe(group=f"local:{world}", layout=how.layout, transport=how.transport, kernel=backend, **how.mask)
    return oracle.run(given, SCALE, recipe)


def dense(way: str, backend: str, given: oracle.Inputs) -> oracle.Answer:
    """One call of the backend for all rows, rounded to the dtype of the inputs."""
    whole = layouts.build("contiguous", S, 1)
    (calls,) = plan(mask.build(S, **WAYS[way].mask), whole, whole, "auto", 0).steps[0].calls
    dtype, scores = given.q.dtype, Scores(scale=SCALE)
    kernel = kernels.choose(backend, Case("cpu", dtype, HEADS[2], HEADS[3], *HEADS[:2]))
    out, lse = kernel.forward(*given[:3], calls.spans, calls.window, scores)
    out, sums = out.to(dtype), oracle.sums(given[:3])
    kernel.backward(Grad(given.q, out, given.d_out, lse, *sums), given.k, given.v, calls.spans, calls.window, scores)
    return oracle.Answer(out, lse, *(x.total().to(dtype) for x in sums))


def rounding(part: str, of: Error) -> float:
    """The last bits of a value in fp32, which lse has whatever the inputs are: of the largest score, and of what is added to it."""
    return 2 * torch.finfo(torch.float32).eps * of.size if part == "lse" else 0.0


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_are_those_of_a_single_call(backend: str, part: str) -> None:
    if backend == "triton":
        skip_without_triton()
    above = []
    for way, world in itertools.product(BACKENDS[backend], WORLDS[:1] if backend == "triton" else WORLDS):
        single, got = (errors(way, backend, torch.bfloat16, each)[part] for each in (0, world))
        least = rounding(part, got)
        if got.rms > max(LIMIT * single.rms, least) or got.largest > max(LIMIT * single.largest, least):
            above.append(f"{way}, {world} ranks: rms {got.rms / single.rms:.3f} x, largest {got.largest / single.largest:.3f} x")
    assert not above, "\n".join(above)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_errors_do_not_grow_with_the_world(backend: str, part: str) -> None:
    """No more than a tenth from 8 ranks to 64."""
    for way in BACKENDS[backend]:
        few, many = (errors(way, backend, torch.bfloat16, world)[part] for world in WORLDS)
        assert many.rms <= max(LIMIT * few.rms, rounding(part, many)), f"{way}: {many.rms / few.rms:.3f} x"


def test_parts_that_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's kernel in half precision: at most what is said above, and no more than a tenth from 8 ranks to 64."""
    monkeypatch.setattr(AtenCpu, "exact", False)
    way, dtype = "causal ring zigzag", torch.bfloat16
    found = [errors.__wrapped__(way, "aten", dtype, world) for world in (0, *WORLDS)]
    for part in ("out", "dq", "dk", "dv"):  # lse is in fp32
        single, few, many = (each[part].rms for each in found)
        assert few <= 2**0.5 * single, f"{part}: {few / single:.3f} x"
        assert many <= LIMIT * few, f"{part}: {few / single:.3f} x, then {many / single:.3f} x"
    assert found[1]["dq"].rms > LIMIT * found[0]["dq"].rms, "nothing was rounded"


@pytest.mark.parametrize("part", PARTS)
def test_errors_in_float16(part: str) -> None:
    single, got = (errors("causal all_gather zigzag", "aten", torch.float16, world)[part] for world in (0, 8))
    assert got.rms <= max(LIMIT * single.rms, rounding(part, got)), f"{got.rms / single.rms:.3f} x"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_of_torch_itself_are_larger(dtype: torch.dtype) -> None:
    """Its CPU kernel rounds weights to half precision on the way."""
    way = "causal ring zigzag"
    given, want = answer(way, dtype)
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in given[:3]]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE, enable_gqa=True)
    found = [x.transpose(1, 2) for x in (out.detach(), *torch.autograd.grad(out, leaves, given.d_out.transpose(1, 2)))]
    for part, theirs in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert errors(way, "aten", dtype, 8)[part].rms <= Error(theirs, getattr(want, part)).rms, part


def test_heads_that_ranks_share_are_rounded_once() -> None:
    """One key head on 16 ranks: each has its part of the gradients, which travel and are added up in fp32."""
    errors = []
    for world in (1, 16):
        given = oracle.inputs(0, (1, 64, 64), (16, 1, 16, 16), torch.bfloat16)
        got = oracle.run(given, 0.25, Recipe(group=f"local:{world}", transport="all_to_all", kernel="reference", causal=True))
        want = oracle.dense(given, mask.build(64, causal=True).as_array(), 0.25)
        pairs = [(getattr(got, name).double(), getattr(want, name)) for name in ("dk", "dv")]
        errors.append([float((have - want).norm() / want.norm()) for have, want in pairs])
    assert all(many <= LIMIT * one for one, many in zip(*errors, strict=True)), errors
