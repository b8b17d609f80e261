"""Gradients travel without loss: sums in fp32, and what one call gives for a row in the dtype in which that gives it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import llama3_flash_attn_prepare_cu_seqlens, llama3_flash_attn_varlen_func
from nnscaler_ring.context import ContextParallel
from nnscaler_ring.core import engine, passes
from nnscaler_ring.core.agree import VARIABLE
from nnscaler_ring.core.intervals import times
from nnscaler_ring.core.kernels import Case, Kernel
from nnscaler_ring.core.kernels.packed import Call, Packed, Read
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.layouts import LAYOUTS, build
from nnscaler_ring.core.mask import Mask
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import TRANSPORTS, plan, plans, rows_once
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.transport import transport_of
from nnscaler_ring.core.walk import KVSums
from tests import oracle, releases
from tests.interpreter import many_at_once
from tests.shapes import KINDS, random_mask

STRAIGHT = ("all_gather", "halo")


class Rounds(Packed):
    """Gives gradients in the dtype of keys and values, as libraries of flash attention do; computes as the reference does."""

    name = "rounds"

    def check_sizes(self, case: Case) -> None:
        return None

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = releases.attend(q, k, v, call.cu_q, call.cu_k, call.window, call.scale, call.softcap, nothing=-torch.inf)
        return out.to(q.dtype), lse

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        plain, of_lse = read[:6], read.d_lse
        grads = releases.differentiate(*plain, call.cu_q, call.cu_k, call.window, call.scale, call.softcap, of_lse)
        return [x.to(read.q.dtype) for x in grads]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls are of a kernel that rounds."""
    monkeypatch.setattr(passes, "kernel_for", lambda *_: Rounds())


# -- the plan ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sender_and_receiver_agree_on_rows_that_one_call_reads(kind: str) -> None:
    rng, found = np.random.default_rng(KINDS.index(kind)), {True: 0, False: 0}
    for n in range(36):
        case = random_mask(rng, 36, 36 if n % 3 else int(rng.integers(1, 40)), kind, packed=n % 2 == 0)
        name, world = list(LAYOUTS)[n % len(LAYOUTS)], (2, 3, 5)[n % 3]
        q, k = (build(name, size, world, cu) for size, cu in ((case.q_len, case.cu_q), (case.k_len, case.cu_k)))
        way = STRAIGHT[n // 3 % 2]
        made = plans(case.mask(), q, k, way)
        sent = {(p.rank, m.peer): m for p in made for m in p.steps[1].send}
        for p in made:
            step = p.steps[1]
            read = times(step.size, (calls.spans[:, 2:] for calls in step.calls))
            assert not step.once or read.max(initial=0) <= 1, "of a rank's own rows beside them, too"
            for m in step.receive:
                assert m.once == sent[m.peer, p.rank].once == all(piece.once for piece in m.pieces)
                assert not m.once or max(read[lo:hi].max() for lo, hi in m.rows.tolist()) == 1
                found[m.once] += 1
        assert rows_once(case.mask(), q, k, way) == sum(m.size for p in made for m in p.steps[1].receive if m.once)
    assert min(found.values()) >= 10, found


def test_which_rows_one_call_reads() -> None:
    """Of windows and documents in contiguous shards all; of zigzag shards those of ranks of which one chunk alone reads; in rings,
    which add up, none."""
    causal, window = build_mask(64, causal=True), build_mask(64, causal=True, window=(9, 0))
    packed = build_mask(64, causal=True, cu_seqlens_q=[0, 10, 40, 64])
    whole, zigzag = build("contiguous", 64, 4), build("zigzag", 64, 4)
    for seen in (causal, window, packed, build_mask(64)):
        for way in (*STRAIGHT, "broadcast"):
            made = plans(seen, whole, whole, way)
            assert all(m.once for p in made for m in (*p.steps[1].send, *p.steps[1].receive)) and all(p.steps[1].once for p in made)
            assert rows_once(seen, whole, whole, way) == sum(p.rows_sent for p in made)
        for way in set(TRANSPORTS) - {*STRAIGHT, "broadcast"}:
            assert not any(m.once for p in plans(seen, whole, whole, way) for step in p.steps for m in (*step.send, *step.receive))
            assert rows_once(seen, whole, whole, way) == 0
    assert {m.peer: m.once for m in plan(causal, zigzag, zigzag, "halo", 1).steps[1].receive} == {0: False, 2: True, 3: True}
    assert not plan(causal, zigzag, zigzag, "halo", 1).steps[1].once


def test_what_a_rank_knows_of_the_slices_of_its_own_queries_alone() -> None:
    """With broadcast rows need not be read where they go: all ranks find by their own slices that one call reads them, or none."""
    cu = [0, 10, 40, 64]
    whole, zigzag, seen = build("contiguous", 64, 4), build("zigzag", 64, 4), build_mask(64, causal=True, cu_seqlens_q=cu)
    own = [Mask([row for row in seen.table.tolist() if row[0] < 16 * rank + 16 and row[1] > 16 * rank], 64) for rank in range(4)]
    assert all(mask != seen for mask in own)
    for rank, mask in enumerate(own):
        step, wanted = (plan(each, whole, whole, "broadcast", rank).steps[1] for each in (mask, seen))
        for mine, others in ((step.send, wanted.send), (step.receive, wanted.receive)):
            assert [(m.peer, m.rows.tolist(), m.once) for m in mine] == [(m.peer, m.rows.tolist(), True) for m in others]
    few, held = build_mask(3, causal=True, window=(1, 0), sinks=1), build("contiguous", 3, 4)
    assert {engine._once(SimpleNamespace(plans=[p])) for p in plans(few, held, held, "broadcast")} == {False}, (
        "of ranks without rows"
    )
    sinks = build_mask(64, causal=True, window=(9, 0), sinks=2)
    for mask, held in ((sinks, whole), (seen, zigzag)):
        made = plans(mask, held, held, "broadcast")
        assert not any(x.once for p in made for step in p.steps for x in (step, *step.send, *step.receive))
        assert rows_once(mask, held, held, "broadcast") == 0


# -- what travels ------------------------------------------------------------------------------------------------------------------


def gradients(recipe: Recipe, given: oracle.Inputs, cu: Tensor | None = None, of_lse: bool = False) -> tuple[list[Tensor], int]:
    """dq, dk and dv, and the bytes that were sent for them."""
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    transport: Any = transport_of(recipe.group)
    total = given.q.shape[1], given.k.shape[1]
    out, lse, *_ = engine.attention(*leaves, cu, None, None, None, None, None, *total, 0.3, 0, str(recipe))
    before = sum(transport.bytes_sent)
    results, theirs = ([out, lse], [given.d_out, torch.ones_like(lse)]) if of_lse else ([out], [given.d_out])
    return list(torch.autograd.grad(results, leaves, theirs)), sum(transport.bytes_sent) - before


WAYS: dict[str, tuple[str, dict[str, Any], list[int] | None]] = {
    "window": ("contiguous", {"causal": True, "window": (9, 0)}, None),
    "two-sided window": ("contiguous", {"window": (30, 5)}, None),
    "full": ("contiguous", {}, None),
    "causal zigzag": ("zigzag", {"causal": True}, None),
    "windows of stripes": ("stripe", {"causal": True, "window": (9, 0)}, None),
    "packed": ("balanced", {"causal": True}, [0, 5, 31, 48, 96]),
    "packed chunks": ("zigzag-per-document", {"causal": True}, [0, 5, 31, 48, 96]),
    "sinks": ("contiguous", {"causal": True, "window": (9, 0), "sinks": 2}, None),
    "near and far": ("contiguous", {"causal": True, "far": 7}, None),
    "a head at a time": ("contiguous", {"causal": True, "heads_stride": 1}, None),
}


def saved(name: str, dtype: torch.dtype, world: int, way: str, batch: int, of_lse: bool) -> float:
    """The share of the bytes of a backward pass that are saved where nobody asks for fp32, which gives the same bits."""
    layout, about, documents = WAYS[name]
    cu = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    given = oracle.inputs(world, (batch if cu is None else 1, 96, 96), (4, 2, 8, 8), dtype)
    recipes = [Recipe(group=f"local:{world}", layout=layout, transport=way, reduce_dtype=x, **about) for x in ("", "float32")]
    (mine, sent), (wanted, most) = (gradients(recipe, given, cu, of_lse) for recipe in recipes)
    for got, want in zip(mine, wanted, strict=True):
        assert torch.equal(got, want), (world, way, of_lse)
    return (most - sent) / most


@pytest.mark.parametrize(("name", "dtype"), [*product(WAYS, [torch.bfloat16]), ("window", torch.float16), ("full", torch.float32)])
def test_nothing_is_lost(name: str, dtype: torch.dtype, rounds: None) -> None:
    """To the bit what fp32 brings, also with several batch rows, and with a gradient of the log-sum-exp."""
    ways = ((2, "halo", 1), (4, "all_gather", 1), (3, "halo", 2), (4, "halo", 1))
    fewer = [saved(name, dtype, *way, of_lse) for way in ways for of_lse in (False, True)]
    if dtype == torch.float32:
        assert not any(fewer)
    elif name in ("window", "two-sided window", "full", "a head at a time"):
        assert all(less == pytest.approx(1 / 3) for less in fewer), "2 of 2 bytes for the rows again and 4 for their gradients"
    else:
        assert min(fewer) >= 0 and 0 < max(fewer) < 0.34, "two calls may read some"


@pytest.mark.parametrize("name", ["window", "packed"])
def test_nothing_is_lost_where_four_are_put_together(name: str, monkeypatch: pytest.MonkeyPatch, rounds: None) -> None:
    many_at_once(monkeypatch)
    for world, way, batch in ((4, "all_gather", 1), (3, "halo", 2)):
        assert 0 < saved(name, torch.bfloat16, world, way, batch, False) < 0.34


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("asked", ["bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_that_of_all(
    asked: str, together: bool, monkeypatch: pytest.MonkeyPatch, rounds: None
) -> None:
    """Of what travels, that is: the own rows beside them are not rounded where a kernel gives exact gradients."""
    if together:
        many_at_once(monkeypatch)
    given = oracle.inputs(0, (1, 96, 96), (4, 2, 8, 8), torch.bfloat16)
    way = {"causal": True, "layout": "contiguous"}
    for transport in ("ring", "all_gather"):
        _, sent = gradients(Recipe(group="local:4", transport=transport, reduce_dtype=asked, **way), given)  # type: ignore[arg-type]
        rows = sum(p.rows_sent for p in plans(build_mask(96, causal=True), *[build("contiguous", 96, 4)] * 2, transport))
        assert sent == rows * 2 * 16 * (2 + 2)
    monkeypatch.setattr(passes, "kernel_for", lambda *_: Reference())
    monkeypatch.setattr(KVSums, "given", None)  # in half precision
    last = Recipe(group="local:4", transport="all_gather", reduce_dtype=asked, **way)  # type: ignore[arg-type]
    exact = Recipe(group="local:4", transport="all_gather", reduce_dtype="float32", **way)  # type: ignore[arg-type]
    (mine, _), (wanted, _) = (gradients(each, given) for each in (last, exact))
    assert all(torch.equal(x[:, 72:], y[:, 72:]) for x, y in zip(mine, wanted, strict=True)), "nobody else reads the last shard"


def test_a_kernel_that_adds_in_fp32_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "kernel_for", lambda *_: Reference())
    given = oracle.inputs(0, (1, 96, 96), (4, 2, 8, 8), torch.bfloat16)
    recipe = Recipe(group="local:4", transport="halo", causal=True, window=(9, 0))
    _, sent = gradients(recipe, given)
    assert sent == 3 * 9 * 2 * 16 * (2 + 4)


@pytest.mark.parametrize(("group", "who"), [("local:4", (2,)), ("local:4", (0, 1, 2, 3)), ("local:4x2", ())])
def test_ranks_agree_where_some_have_a_gradient_of_the_log_sum_exp(
    group: str, who: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For which they take another kernel, of exact gradients: no rank knows of the others, so all travel in fp32.

    In a grid all have one where the log-sum-exp is returned; where asked for, fp32 is what heads travel in, too.
    """

    def kernel_for(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, bool]) -> Kernel:
        return Reference() if extras["d_lse"] else Rounds()

    monkeypatch.setattr(passes, "kernel_for", kernel_for)
    given = oracle.inputs(0, (1, 96, 96), (4, 2, 8, 8), torch.bfloat16)
    backward = passes.backward

    def some_have_it(job: Any, plan: Any, d_lse: Tensor | None, saved: Any, *rest: Any) -> Any:
        return backward(job, plan, torch.zeros_like(saved[5]) if plan.rank in who else d_lse, saved, *rest)

    monkeypatch.setattr(engine, "backward", some_have_it)
    recipes = [Recipe(group=group, transport="halo", reduce_dtype=x, causal=True, window=(30, 0)) for x in ("", "float32")]
    (got, sent), (want, most) = (gradients(recipe, given) for recipe in recipes)
    assert sent == most or not who
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_a_kernel_that_takes_no_gradient_of_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank can have one."""

    def kernel_for(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, bool]) -> Kernel:
        if extras["d_lse"]:
            raise NotImplementedError
        return Rounds()

    monkeypatch.setattr(passes, "kernel_for", kernel_for)
    given = oracle.inputs(0, (1, 96, 96), (4, 2, 8, 8), torch.bfloat16)
    _, sent = gradients(Recipe(group="local:4", transport="halo", **WAYS["window"][1]), given)
    assert sent == 3 * 9 * 2 * 16 * (2 + 2)


def _bits(rank: int, world_size: int) -> list[bool]:
    """Whether gradients are those that fp32 brings, on processes."""
    same = []
    for name in ("window", "causal zigzag", "packed", "sinks"):
        layout, about, documents = WAYS[name]
        cu = None if documents is None else torch.tensor(documents, dtype=torch.int32)
        given = oracle.inputs(1, (1, 96, 96), (4, 2, 8, 8), torch.bfloat16)
        seen = {"window_size": about.get("window", (-1, -1)), "sinks": about.get("sinks", 0)}
        grads = []
        for asked in (None, torch.float32):
            cp = ContextParallel(dist.group.WORLD, layout=layout, transport="halo", reduce_dtype=asked)
            q, k, v, d_out = (cp.shard(x, dim=1, cu_seqlens=cu) for x in given)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            with mock.patch.object(passes, "kernel_for", lambda *_: Rounds()):
                out = cp.attention(*leaves, mask="causal", cu_seqlens=cu, **seen)
                grads.append(torch.autograd.grad(out, leaves, d_out))
        same += [torch.equal(x, y) for x, y in zip(*grads, strict=True)]
    return same


def test_on_processes(ranks) -> None:
    for same in ranks(2).run(_bits):
        assert all(same) and len(same) == 12


def _llama3(rank: int, world_size: int) -> tuple[float, list[torch.dtype]]:
    """The largest error of llama3's gradients, and the dtypes that travel in its backward pass."""
    q, k, v, d_out = oracle.inputs(1, (1, 96, 96), (4, 2, 8, 8), torch.bfloat16)
    cu, mine = torch.tensor([0, 40, 70, 96], dtype=torch.int32), slice(96 // world_size * rank, 96 // world_size * (rank + 1))
    given = llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world_size)
    leaves = [x[0, mine].requires_grad_() for x in (q, k, v)]
    with mock.patch.object(passes, "kernel_for", lambda *_: Rounds()):
        out = llama3_flash_attn_varlen_func(*leaves, *given[:4], 1, given[4], causal=True, softmax_scale=0.3)
        start, dtypes = dist.batch_isend_irecv, set[torch.dtype]()

        def started(ops: list[dist.P2POp]) -> list[dist.Work]:
            dtypes.update(op.tensor.dtype for op in ops)
            return start(ops)

        with mock.patch.object(dist, "batch_isend_irecv", started):
            grads = torch.autograd.grad(out, leaves, d_out[0, mine])
    want = oracle.dense(oracle.Inputs(q, k, v, d_out), build_mask(96, causal=True, cu_seqlens_q=cu.tolist()).as_array(), 0.3)
    worst = max(oracle.error(x, y[0, mine]) for x, y in zip((out.detach(), *grads), (want.out, *want[2:]), strict=True))
    return worst, list(dtypes)


def test_llama3_on_processes(ranks) -> None:
    """A rank knows its own documents alone."""
    for worst, dtypes in ranks(2).run(_llama3):
        assert worst < 2e-2 and dtypes == [torch.bfloat16]


def _of_other_kernels(rank: int, world_size: int) -> str:
    """What a rank is told under the check where the other has a kernel of another kind."""
    q, k, v, _ = oracle.inputs(1, (1, 48, 48), (4, 2, 8, 8), torch.bfloat16)
    kernel = (Rounds(), Reference())[rank]
    checked, patched = mock.patch.dict("os.environ", {VARIABLE: "1"}), mock.patch.object(passes, "kernel_for", lambda *_: kernel)
    with checked, patched, pytest.raises(ValueError) as refused:
        ContextParallel(dist.group.WORLD, transport="halo").attention(q, k, v, mask="full")
    return str(refused.value)


def test_kernels_of_another_kind_are_told_under_the_check(ranks) -> None:
    """Before anything travels."""
    for said in ranks(2).run(_of_other_kernels):
        assert "rank 0 and rank 1 differ in dtypes in which gradients travel, by the kernels that each has" in said
