"""Gradients are stored where they come first and added elsewhere: no accumulator is zeroed for a kernel that knows what is there.

Memory that nobody filled is NaN here, as deterministic mode makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler_ring.core import kernels
from nnscaler_ring.core.kernels import Case
from nnscaler_ring.core.kernels.base import add, clear
from nnscaler_ring.core.kernels.packed import Call, Packed, Read
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.core.plan import ALL_TO_ALL, TRANSPORTS, plan
from nnscaler_ring.core.recipe import Recipe, layout_of, mask_of
from tests import oracle, releases

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
        sums = [torch.zeros_like(x) for x in (q, k, v)]
        grad = kernels.Grad(q, out, d_out, lse, *sums)
        Reference().backward(
            grad, k, v, releases.spans_of(q, k, call.cu_q, call.cu_k), call.window, kernels.Scores(scale=call.scale)
        )
        return [x[0] for x in sums] if one else sums


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "KERNELS", {"whole": (Whole(),), "reference": (Reference(),)})
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
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_layouts_and_transports(name: str, world: int) -> None:
    cu = (0, 5, 6, 17, 24) if name == "packed" else None
    given, ran = oracle.inputs(world, SIZES, (4, 2, 16, 8) if name == "far" else HEADS), 0
    for layout in LAYOUTS:
        if cu is None and "per-document" in layout:
            continue
        for transport in (*TRANSPORTS, ALL_TO_ALL, "auto"):
            answers = []
            for kernel in ("whole", "reference"):
                how = Recipe(group=f"local:{world}", layout=layout, transport=transport, kernel=kernel, **MASKS[name])
                answers.append(oracle.run(given, SCALE, how, cu_q=cu))
            for mine, theirs in zip(*answers, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
            ran += 1
    assert ran >= 4 * 8


def test_dq_is_rounded_once_where_nothing_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a zigzag rank under all_gather: it is stored as the kernel gives it, over memory that held nothing."""
    given = oracle.inputs(0, SIZES, HEADS, torch.bfloat16)
    how = Recipe(group="local:4", layout="zigzag", transport="all_gather", kernel="whole", causal=True)
    held, seen = layout_of("zigzag", 24, 4), mask_of(how, 24, 24, None, None, None)
    assert not any(plan(seen, held, held, "all_gather", rank).num_merges for rank in range(4))
    made, cleared, gradients = list[Tensor](), dict[int, int](), Whole.gradients

    def kept(self: Whole, call: Call, read: Read) -> Sequence[Tensor]:
        found = gradients(self, call, read)
        made.append(found[0])
        return found

    def counted(total: Tensor, seen: np.ndarray) -> None:
        cleared[total.shape[2]] = cleared.get(total.shape[2], 0) + int((~seen).sum())
        clear(total, seen)

    monkeypatch.setattr(Whole, "gradients", kept)
    monkeypatch.setattr("nnscaler_ring.core.passes.clear", counted)
    answer = oracle.run(given, SCALE, how)
    assert torch.equal(answer.dq.flatten(1).sort(1)[0], torch.cat([x.reshape(2, -1) for x in made], 1).sort(1)[0])
    assert cleared == {HEADS[0]: 0, HEADS[1]: 2 * SIZES[2]}, "of dk and dv the own rows, which wait for what others send"


def test_add_and_clear() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        total, seen = torch.full((1, 12, 2), float("nan")), np.zeros(12, dtype=bool)
        want = torch.zeros(1, 12, 2)
        for _ in range(int(rng.integers(0, 5))):
            lo, hi = sorted(rng.integers(0, 13, 2).tolist())
            part = torch.randn(1, hi - lo, 2)
            add(total, lo, hi, part, seen)
            want[:, lo:hi] += part
        clear(total, seen)
        assert torch.equal(total, want) and seen.all()
