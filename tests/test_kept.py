"""What came for the forward pass is kept for the backward pass where it is little: it comes once, and gradients leave first."""

from __future__ import annotations

import os
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from nnscaler_ring import wrap_ring_attn_func
from nnscaler_ring.context import ContextParallel
from nnscaler_ring.core import engine, passes
from nnscaler_ring.core.agree import VARIABLE
from nnscaler_ring.core.kernels import Grad, Scores
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.layouts import LAYOUTS, build
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import TRANSPORTS, choose, plans
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.scaling import SPEEDS, Network, Shape, report, timeline
from nnscaler_ring.core.transport import PretendTransport, transport_of
from tests import oracle
from tests.interpreter import many_at_once, skip_without_triton
from tests.shapes import KINDS, random_mask
from tests.test_wire import Rounds

WINDOW: dict[str, Any] = {"causal": True, "window": (9, 0)}


def passes_of(recipe: Recipe, given: oracle.Inputs, cu: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """What both passes give, what was kept, and the bytes that each of them and the backward pass once more sent."""
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    transport: Any = transport_of(recipe.group)
    sent = [sum(transport.bytes_sent)]
    out, _, kept = engine.attention(
        *leaves, cu, None, None, None, None, None, *(x.shape[1] for x in given[:2]), 0.3, 0, str(recipe)
    )
    sent.append(sum(transport.bytes_sent))
    grads = torch.autograd.grad(out, leaves, given.d_out, retain_graph=True)
    sent.append(sum(transport.bytes_sent))
    for once, twice in zip(grads, torch.autograd.grad(out, leaves, given.d_out), strict=True):
        assert torch.equal(once, twice), "what is kept is not written to"
    sent.append(sum(transport.bytes_sent))
    return [out.detach(), *grads], kept, np.diff(sent).tolist()


# -- which rows --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_keep_what_came_or_none_does(kind: str) -> None:
    """Where no rank gets more than a shard, which all know."""
    rng, found = np.random.default_rng(KINDS.index(kind)), set()
    for n in range(10):
        case = random_mask(rng, 36, 36 if n % 3 else int(rng.integers(1, 40)), kind, packed=n % 2 == 0)
        name, world = list(LAYOUTS)[n % len(LAYOUTS)], (2, 3, 5)[n % 3]
        q, k = (build(name, size, world, cu) for size, cu in ((case.q_len, case.cu_q), (case.k_len, case.cu_k)))
        for way in TRANSPORTS:
            made = plans(case.mask(), q, k, way)
            assert {p.keeps for p in made} == {way == "halo" and choose(case.mask(), q, k) == "halo"}
            found.add(made[0].keeps)
            if made[0].keeps:
                assert max(p.steps[1].room for p in made) <= k.counts.max() and len(made[0].steps) == 2
    assert found == {True, False}
    alone = build("contiguous", 36, 1)
    assert not plans(build_mask(36), alone, alone, "halo")[0].keeps


def test_what_is_not_kept() -> None:
    """A ring's rows, those of all ranks, more than a shard, and where nobody asks for it."""
    given = oracle.inputs(0, (1, 96, 96), (4, 4, 8, 8))
    for about in (
        {"transport": "ring", "keeps": True, **WINDOW},
        {"transport": "all_gather", "keeps": True, **WINDOW},
        {"transport": "halo", "keeps": True, "causal": True},
        {"transport": "halo", **WINDOW},
    ):
        _, kept, (forward, backward, _) = passes_of(Recipe(group="local:4", **about), given)  # type: ignore[arg-type]
        assert kept == [] and backward == 2 * forward
    heads = Recipe(group="local:4", transport="all_to_all", keeps=True, **WINDOW)
    assert len(passes_of(heads, given)[1]) == 16, "what is read in place of q, k, v, out and lse"


# -- the numbers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("about", [WINDOW, {"window": (9, 6)}, {"sinks": 2, "dropout": 0.3, **WINDOW}, {"far": 5, **WINDOW}])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_the_same_numbers_and_fewer_bytes(layout: str, about: dict[str, Any]) -> None:
    """Also of documents, several batch rows, heads one at a time; gradients alone travel in the backward pass."""
    kept = 0
    for world, documents, stride, batch in (
        (2, None, 0, 2),
        (4, None, 1, 1),
        (3, [0, 5, 5, 31, 48, 96], 0, 1),
        (7, [0, 90, 96], 1, 1),
    ):
        if layout == "balanced" and documents is None:
            continue
        cu = None if documents is None else torch.tensor(documents, dtype=torch.int32)
        given = oracle.inputs(world, (batch, 96, 96), (4, 2, 8, 6))
        how = {"group": f"local:{world}", "layout": layout, "kernel": "reference", "heads_stride": stride, **about}
        mine, theirs = (Recipe(keeps=keeps, **how) for keeps in (True, False))  # type: ignore[arg-type]
        (got, rows, (forward, backward, again)), (want, none, sent) = (passes_of(recipe, given, cu) for recipe in (mine, theirs))
        assert none == [] and sent == [forward, 2 * forward, 2 * forward]
        assert backward == again == (forward if rows else 2 * forward)
        assert len(rows) in (0, world * (2 if stride else 1))
        kept += len(rows)
        for one, other in zip(got, want, strict=True):
            assert oracle.error(one, other) < 1e-12
    assert kept


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_where_four_are_put_together(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a kernel does so in place."""
    many_at_once(monkeypatch)
    given = oracle.inputs(3, (1, 48, 48), (2, 1, 16, 16), torch.float32)
    skip_without_triton()
    how: dict[str, Any] = {"group": "local:3", "kernel": kernel, **WINDOW}
    (got, rows, _), (want, _, _) = (passes_of(Recipe(keeps=keeps, **how), given) for keeps in (True, False))
    assert len(rows) == 3
    for one, other in zip(got, want, strict=True):
        assert oracle.error(one, other) < 1e-5


def test_gradients_leave_before_calls_on_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Noted(Reference):
        def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Any, window: Any, scores: Scores) -> None:
            log.append(f"{k.shape[1]} keys")
            super().backward(grad, k, v, spans, window, scores)

    def start(self: PretendTransport, exchange: Any) -> Any:
        for _, buffer in exchange.receive:
            buffer.zero_()
        log.append(f"{len(exchange.send)} out, {len(exchange.receive)} in")
        return lambda: log.append("wait")

    monkeypatch.setattr(passes, "kernel_for", lambda *_: Noted())
    monkeypatch.setattr(PretendTransport, "start", start)
    q, k, v, _ = oracle.inputs(0, (1, 24, 24), (2, 2, 8, 8))
    for keeps, wanted in (
        (True, ["9 keys", "2 out, 2 in", "24 keys", "wait"]),
        (False, ["2 out, 2 in", "24 keys", "wait", "9 keys", "2 out, 2 in", "wait"]),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        recipe = Recipe(group="pretend:4:1", transport="halo", keeps=keeps, **WINDOW)
        out, *_ = engine.attention(*leaves, None, None, None, None, None, None, 96, 96, 0.3, 0, str(recipe))
        log.clear()
        out.sum().backward()
        assert log == wanted


@pytest.mark.parametrize("stride", [0, 1])
@pytest.mark.parametrize("step", [1, 2])
def test_buffers_that_come_back_from_a_store(step: int, stride: int) -> None:
    """`saved_tensors_hooks` may give back a view of a larger memory."""
    store, used = torch.zeros(1 << 16, dtype=torch.float64), [7]

    def pack(x: Tensor) -> Any:
        if x.dtype != store.dtype:
            return x
        place = store[used[0] : used[0] + step * x.numel() : step]
        place.copy_(x.detach().reshape(-1))
        used[0] += step * x.numel()
        return place, x.shape

    given = oracle.inputs(0, (1, 96, 96), (2, 2, 8, 6))
    recipe = Recipe(group="local:4", transport="halo", kernel="reference", heads_stride=stride, keeps=True, **WINDOW)
    want, kept, _ = passes_of(recipe, given)
    assert kept
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda p: p if isinstance(p, Tensor) else p[0].view(p[1])):
        got, _, _ = passes_of(recipe, given)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


# -- who asks for it ---------------------------------------------------------------------------------------------------------------


def test_it_is_asked_for_where_a_backward_pass_may_follow() -> None:
    """And sizes are known."""
    asked: list[bool] = []
    attention = engine.attention

    def noted(*args: Any) -> Any:
        asked.append(Recipe.parse(args[-1]).keeps)
        return attention(*args)

    with mock.patch.object(engine, "attention", noted):
        x = torch.randn(1, 8, 2, 8)
        sink = torch.zeros(2, requires_grad=True)
        wrap_ring_attn_func(x, x, x)
        wrap_ring_attn_func(x, x.clone().requires_grad_(), x)
        with torch.no_grad():
            wrap_ring_attn_func(x.clone().requires_grad_(), x, x)
        ContextParallel().attention(x, x, x, learnable_sink=sink)
        with FakeTensorMode():
            fake = torch.empty(1, 8, 2, 8, requires_grad=True)
            assert wrap_ring_attn_func(fake, fake, fake).shape == fake.shape
    assert asked == [False, True, False, True, False]


def _on_processes(rank: int, world_size: int) -> list[tuple[float, int]]:
    """The largest error of a rank's gradients and the tensors that a backward pass sends and receives: as it is, with activations
    computed again in both of torch's ways, and in a graph."""
    found = []
    q, k, v, d_out = oracle.inputs(1, (1, 96, 96), (4, 2, 8, 8))
    cu = torch.tensor([0, 7, 60, 96], dtype=torch.int32)
    for layout, cu_seqlens, window in (("contiguous", None, (9, 0)), ("balanced", cu, (-1, -1))):
        cp = ContextParallel(dist.group.WORLD, layout=layout, kernel="reference")
        seen = build_mask(96, causal=True, window=window, cu_seqlens_q=None if cu_seqlens is None else cu.numpy())
        want = oracle.dense(oracle.Inputs(q, k, v, d_out), seen.as_array(), 8**-0.5)

        def attend(*leaves: Tensor, cp=cp, cu_seqlens=cu_seqlens, window=window) -> Tensor:
            return cp.attention(*leaves, mask="causal", cu_seqlens=cu_seqlens, window_size=window)

        mine, *wanted = (cp.shard(x, dim=1, cu_seqlens=cu_seqlens) for x in (d_out, *want[2:]))
        for way in (
            attend,
            lambda *x, attend=attend: checkpoint(attend, *x, use_reentrant=False),
            lambda *x, attend=attend: checkpoint(attend, *x, use_reentrant=True),
            torch.compile(attend, backend="aot_eager"),
        ):
            leaves = [cp.shard(x, dim=1, cu_seqlens=cu_seqlens).requires_grad_() for x in (q, k, v)]
            out, moved, start = way(*leaves), [0], dist.batch_isend_irecv

            def started(ops: list[dist.P2POp], moved=moved, start=start) -> list[dist.Work]:
                moved[0] += len(ops)
                return start(ops)

            with mock.patch.object(dist, "batch_isend_irecv", started):
                grads = torch.autograd.grad(out.view_as(out), leaves, mine) if way is attend else _gradients(out, leaves, mine)
            found.append((max(oracle.error(x, y) for x, y in zip(grads, wanted, strict=True)), moved[0]))
    return found


def _gradients(out: Tensor, leaves: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """By `backward`, which is all that a reentrant checkpoint knows."""
    out.backward(d_out)
    return [x.grad for x in leaves if x.grad is not None]


def test_on_processes(ranks) -> None:
    """Keys and values, sent or received, are two tensors; they come once for each forward pass, and once more in a graph."""
    for found in ranks(2).run(_on_processes):
        assert all(worst < 1e-10 for worst, _ in found)
        for once, again, reentrant, graph in (found[:4], found[4:]):
            assert once[1] == 2 and again[1] == reentrant[1] == graph[1] == 4


def _in_part_in_a_graph(rank: int, world_size: int) -> list[str]:
    """What a rank hears whose function runs as it is written, while that of the other runs as a graph."""
    shard = oracle.inputs(rank, (1, 48, 48), (4, 2, 8, 8))
    cp = ContextParallel(dist.group.WORLD, kernel="reference")

    def attend(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
        return cp.attention(q, k, v, mask="causal", window_size=(9, 0)) + other.sum()

    def gradients(call: Any, size: int) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in shard[:3]]
        return torch.autograd.grad(call(*leaves, torch.zeros(size)), leaves, shard.d_out)

    graph, want = torch.compile(attend, backend="eager", dynamic=False), gradients(attend, 1)
    gradients(graph, 1)
    with torch.compiler.set_stance("eager_on_recompile"):  # as from the recompile limit on
        for x, y in zip(gradients(graph, 1 + rank), want, strict=True):
            torch.testing.assert_close(x, y)
    with mock.patch.dict(os.environ, {VARIABLE: "1"}):
        try:
            gradients(attend if rank else graph, 1)
        except ValueError as heard:
            return [str(heard)]
    return []


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="torch 2.6 does not say that a compiled function runs")
def test_one_rank_in_a_graph_and_one_outside(ranks) -> None:
    """A compiled function that runs as it is written goes on; a call of one that is not compiled is named under the check."""
    for heard in ranks(2).run(_in_part_in_a_graph):
        assert len(heard) == 1 and "whether they kept keys and values that came" in heard[0]


# -- on paper ----------------------------------------------------------------------------------------------------------------------


def test_the_model() -> None:
    """Gradients travel while own rows are computed, and nothing else does."""
    length, shape, speed = 1 << 16, Shape(), SPEEDS["fa2-h100"]
    mask, held = build_mask(length, causal=True, window=(1024, 0)), build("contiguous", length, 8)
    fast, slow = Network("", 1e12, 0.0), Network("", 1e9, 0.0)
    made = plans(mask, held, held, "halo")[3]
    for network in (fast, slow):
        line = timeline(made, shape, speed, network, backward=True)
        (first, second), (wire,) = line.compute, line.network
        assert (first.label, second.label, wire.label) == ("step 1", "step 0", "gradients of step 1")
        assert first.start == 0 and second.start == first.end == wire.start
        assert wire.end - wire.start == pytest.approx(1024 * shape.row / network.bandwidth)
        assert line.total == max(second.end, wire.end)


@pytest.mark.parametrize(
    ("transport", "asked"),
    [*product(("halo", "ring", "all_gather"), ("", "float32", "bfloat16")), ("all_to_all", "")],
)
def test_bytes_of_the_report_are_those_that_travel(transport: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "kernel_for", lambda *_: Rounds())
    given = oracle.inputs(0, (1, 96, 96), (4, 4, 8, 8), torch.bfloat16)
    mask, held = build_mask(96, causal=True, window=(9, 0)), build("contiguous", 96, 4)
    recipe = Recipe(group="local:4", transport=transport, keeps=True, reduce_dtype=asked, **WINDOW)
    made = report(mask, held, transport, passes.shape_of(recipe, *given[:3]), SPEEDS["fa2-h100"], Network("", 1e9, 0.0))
    _, _, (forward, backward, _) = passes_of(recipe, given)
    assert (made.sent, made.sent_backward) == (forward, backward)
