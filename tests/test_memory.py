"""What the engine allocates besides results: buffers of keys and values, and accumulators, at the peak of a pass.

The kernel here computes nothing and allocates nothing, queries are few, and one rank walks alone: what is left are the buffers.
They are counted in *pairs*, the bytes of a shard's keys and values; one of gradients in fp32 is two pairs of bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core import engine, passes
from nnscaler_ring.core.call import Options, Rows, out_and_lse
from nnscaler_ring.core.kernels.base import Case, Grad, Kernel, Scores, Spans, Window
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.walk import KV, KVSums

P, RANK, ROWS, HEADS, DIM = 8, 3, 512, 4, 16
PAIR = ROWS * HEADS * 2 * DIM * 2
SMALL = 0.05
"""Results and tables, in pairs."""


class Nothing(Kernel):
    """Zeros, without memory of their own."""

    name = "nothing"

    def check_sizes(self, case: Case) -> None:
        pass

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        rows = int((spans[:, 1] - spans[:, 0]).sum())
        lse = torch.zeros(1).expand(q.shape[0], q.shape[2], rows)
        return q.new_zeros(1).expand(q.shape[0], rows, q.shape[2], v.shape[3]), lse

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        _ = grad.totals


def peak(run: Callable[[], object]) -> float:
    """The most memory that `run` holds at once, in pairs."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profiler:  # it warns without
        run()
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert found, "memory events were recorded"
    return most / PAIR


def peaks(monkeypatch: pytest.MonkeyPatch, **how: object) -> tuple[float, float]:
    """Of the forward pass and of the backward pass."""
    monkeypatch.setattr(passes, "kernel_for", lambda *_: Nothing())
    recipe = str(Recipe(group=f"pretend:{P}:{RANK}", **{"causal": True, **how}))  # type: ignore[arg-type]
    q, d_out = (torch.randn(1, 1, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, ROWS, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2))
    tables, total, rest = [None] * 6, (P, ROWS * P), (0.1, 0, recipe)
    run = lambda: engine.attention(q, k, v, *tables, *total, *rest)  # noqa: E731
    out, lse, kept = run()
    forward = peak(run)
    backward = lambda: engine.attention_backward([d_out, q, k, v, out, lse, *kept], None, tables, total, *rest, False)  # noqa: E731
    backward()
    return forward, peak(backward)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_a_ring_holds_two_pairs(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in use and the one on its way; backward besides the gradients of both, those on their way on, and the own ones."""
    forward, backward = peaks(monkeypatch, layout=layout, transport="ring", causal=False)
    assert 2 - SMALL < forward < 2 + SMALL
    assert backward < 2 + 4 * 2 + SMALL


def test_a_grouped_ring_holds_its_last_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hops 2 and 3 in use, 4 to 7 on their way."""
    forward, _ = peaks(monkeypatch, layout="contiguous", transport="grouped_ring", causal=False)
    assert 6 - SMALL < forward < 6 + SMALL


def test_a_halo_holds_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends is not copied; backward the own gradients, as they are added up and as they are returned."""
    forward, _ = peaks(monkeypatch, layout="contiguous", transport="halo", causal=False)
    assert 7 - SMALL < forward < 7 + SMALL
    narrow, narrow_backward = peaks(monkeypatch, layout="contiguous", transport="halo", window=(ROWS // 8, 0))
    assert narrow < 1 / 8 + SMALL
    assert narrow_backward < 2 + 1 + SMALL


def test_all_gather_holds_two_of_its_strides_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks' keys and values; of the heads in use and of the next the own ones, too, which do not lie end to end."""
    whole, _ = peaks(monkeypatch, layout="contiguous", transport="all_gather", causal=False)
    assert 8 - SMALL < whole < 8 + SMALL
    one_head, backward = peaks(monkeypatch, layout="contiguous", transport="all_gather", causal=False, heads_stride=1)
    assert one_head < 2 * 9 / HEADS + SMALL
    assert backward < 2 * (9 + 8 * 2 + 8 * 2) / HEADS + 2 + SMALL


def test_steps_that_bring_nothing_have_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a causal ring over contiguous chunks: rank 1 reads one other chunk, and then nothing comes any more."""
    made, inside = list[int](), KVSums.inside

    def noted(rows: KV, parts: int) -> KVSums:
        made.append(len(rows.keys))
        return inside(rows, parts)

    monkeypatch.setattr(KVSums, "inside", noted)
    recipe = Recipe(group="pretend:8:1", transport="ring", causal=True)
    q, k, v = (torch.randn(1, 8, 2, 8, requires_grad=True) for _ in range(3))
    out, _ = out_and_lse(q, k, v, recipe, Options(causal=True), Rows())
    out.sum().backward()
    assert [size for size in made if size] == [8]


def test_what_is_saved_where_heads_travel() -> None:
    """What each rank keeps, and of q, k, v and the result only shapes: also where what is saved is copied elsewhere."""
    saved = list[Tensor]()

    def moved(x: Tensor) -> Tensor:
        saved.append(torch.empty(x.size(), dtype=x.dtype))
        return x

    q, k, v = (torch.randn(1, 64, 4, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda x: x):
        out, _ = out_and_lse(q, k, v, Recipe(group="local:2", transport="all_to_all"), Options(causal=True), Rows())
    assert sum(x.nbytes for x in saved) == 4 * (4 * q.numel() + 4 * 64)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in grads] == [q.shape] * 3
