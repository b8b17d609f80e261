"""``torch.compile(fullgraph=True)`` around the ops: no graph break, forward and backward, dynamic lengths; one process, a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import nnscaler_ring as nr
from nnscaler_ring.core import engine
from nnscaler_ring.core.mask import NO_LIMIT, build
from tests.worlds import held, naming, no_faults, told

HEADS, HEADS_K, DIM = 4, 2, 8
Call = Callable[[Tensor, Tensor, Tensor], Any]


def given(seq: int, packed: bool = False, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = (seq,) if packed else (2, seq)
    sizes = [(*lead, HEADS, DIM), (*lead, HEADS_K, DIM), (*lead, HEADS_K, DIM)]
    return [torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_() for size in sizes]


def model(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Something before the op and something after it."""
    answer = call(q * 1.1, k.sin(), v + 0.5)
    out = answer[0] + answer[1].transpose(-1, -2).unsqueeze(-1).cos() if isinstance(answer, tuple) else answer
    return out.tanh().square().sum()


def both(call: Call, tensors: list[Tensor], dynamic: bool | None = None) -> list[str]:
    """What differs between the compiled model and the plain one, value and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(partial(model, call), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    pairs = []
    for run in (compiled, partial(model, call)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        loss = run(*leaves)
        pairs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return [f"result {n}" for n, (a, b) in enumerate(zip(*pairs, strict=True)) if not torch.allclose(a, b, rtol=1e-11, atol=1e-12)]


def calls(group: Any, world_size: int, seq: int) -> dict[str, tuple[Call, bool]]:
    """Calls by name, and whether their tensors are packed."""
    cu = torch.tensor([0, seq // 3, world_size * seq], dtype=torch.int32)
    documents = torch.tensor([0, seq // 2, seq], dtype=torch.int32)
    of_op = {} if group is None else {"process_group": group}
    found: dict[str, tuple[Call, bool]] = {
        "ring": (lambda q, k, v: nr.wrap_ring_attn_func(q, k, v, **of_op), False),
        "zigzag lse": (lambda q, k, v: nr.wrap_zigzag_attn_func(q, k, v, return_attn_probs=True, **of_op)[:2], False),
        "stripe": (lambda q, k, v: nr.wrap_stripe_attn_func(q, k, v, softcap=2.0, **of_op), False),
        "ulysses": (lambda q, k, v: nr.wrap_ulysses_attn_func(q, k, v, **of_op), False),
        "window": (lambda q, k, v: nr.wrap_sliding_window_attn_func(q, k, v, 3, **of_op), False),
        "varlen": (lambda q, k, v: nr.wrap_ring_attn_varlen_func(q, k, v, cu, cu, causal=True, **of_op), True),
        "piecewise": (lambda q, k, v: nr.wrap_piecewise_attn_func(q, k, -q, -k, v, 5, True, **of_op), False),
        "ring_flash": (lambda q, k, v: nr.ring_flash_attn_func(q, k, v, causal=True, group=group), False),
        "zigzag_varlen": (
            lambda q, k, v: nr.zigzag_ring_flash_attn_varlen_func(q, k, v, documents, seq, causal=True, group=group),
            True,
        ),
        "sliding": (lambda q, k, v: nr.ring_sliding_window_attn(q, k, v, 3, cp_group=group), False),
        "sliding_varlen": (lambda q, k, v: nr.ring_sliding_window_attn_varlen(q, k, v, 3, cu, group, world_size), True),
        "streaming": (lambda q, k, v: nr.ring_streaming_llm_attn(q, k, v, 3, cp_group=group), False),
        "streaming_varlen": (lambda q, k, v: nr.ring_streaming_llm_attn_varlen(q, k, v, 3, cu, group), True),
    }
    balanced = nr.ContextParallel(group, layout="balanced", transport="all_to_all")
    found["context documents"] = (lambda q, k, v: balanced.attention(q, k, v, "causal", cu_seqlens=cu), False)
    for transport in ("auto", "ring", "all_gather", "all_to_all"):
        cp = nr.ContextParallel(group, layout="zigzag", transport=transport)
        found[f"context {transport}"] = (lambda q, k, v, cp=cp: cp.attention(q, k, v, mask="causal"), False)
    return found


OLD = TorchVersion(torch.__version__) < "2.7"
needs_newer = pytest.mark.skipif(OLD, reason="needs a torch newer than 2.6, whose Dynamo fails on wrap_* ops ('distributed_state')")
AS_SHARDS = {"ring_flash", "zigzag_varlen", "sliding", "sliding_varlen", "streaming", "streaming_varlen"}
"""Per-rank functions, which 2.6 takes as well."""


def named(names: Iterable[str]) -> list[Any]:
    """Cases, those of `wrap_*` ops skipped where torch cannot."""
    ours = [name for name in names if name in AS_SHARDS or name.startswith("context")]
    return [name if name in ours else pytest.param(name, marks=needs_newer) for name in names]


@pytest.mark.parametrize("name", named(calls(None, 1, 24)))
def test_one_process(name: str) -> None:
    call, packed = calls(None, 1, 24)[name]
    assert not both(call, given(24, packed))


@pytest.mark.parametrize("name", named(["ring", "zigzag lse", "context ring", "context all_to_all"]))
def test_lengths_are_dynamic(name: str) -> None:
    """One graph for several lengths."""
    call, _ = calls(None, 1, 24)[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(partial(model, call), fullgraph=True, backend=counter)
    for seq in (24, 40, 56):
        tensors = given(seq)
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 1)
        assert torch.allclose(compiled(*tensors), model(call, *tensors), rtol=1e-11)
    assert counter.frame_count == 1


class Numbers:
    """Of a model's own."""

    def __init__(self) -> None:
        self.scale, self.softcap, self.dropout = 0.3, 2.0, 0.1


NUMBERS = Numbers()


def with_numbers() -> dict[str, tuple[Call, bool]]:
    """More calls, with default arguments, and with floats that are somebody's attributes."""
    scores, cp = {"softmax_scale": 0.5, "dropout_seed": 7}, nr.ContextParallel()
    return {
        "kvpacked": (lambda q, k, v: nr.stripe_flash_attn_kvpacked_func(q, torch.stack([k, v], 2)), False),
        "flash_attention": (lambda q, k, v: nr.flash_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), False),
        "ring_flash scale": (lambda q, k, v: nr.ring_flash_attn_func(q, k, v, softmax_scale=NUMBERS.scale), False),
        "ring_flash dropout": (lambda q, k, v: nr.ring_flash_attn_func(q, k, v, dropout_p=NUMBERS.dropout, **scores), False),
        "ring softcap": (lambda q, k, v: nr.wrap_ring_attn_func(q, k, v, NUMBERS.scale, softcap=NUMBERS.softcap), False),
        "context softcap": (lambda q, k, v: cp.attention(q, k, v, "causal", softcap=NUMBERS.softcap), False),
    }


@needs_newer
@pytest.mark.parametrize("name", [*calls(None, 1, 24), *with_numbers()])
def test_floats_are_symbols_under_dynamic_shapes(name: str) -> None:
    call, packed = {**calls(None, 1, 24), **with_numbers()}[name]
    assert not both(call, given(24, packed), dynamic=True)


@needs_newer
def test_a_graph_is_of_its_numbers() -> None:
    """Another softcap than that of the first call is heeded."""
    tensors, call = given(24), partial(model, with_numbers()["context softcap"][0])
    torch._dynamo.reset()
    compiled, found = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True), set()
    with pytest.MonkeyPatch.context() as patch:
        for softcap in (1.0, 2.0, 0.0):
            patch.setattr(NUMBERS, "softcap", softcap)
            assert torch.allclose(compiled(*tensors), call(*tensors), rtol=1e-11)
            found.add(call(*tensors).item())
    assert len(found) == 3


DROPPING, ALONE = {"dropout_p": 0.3}, nr.ContextParallel()
WITH_SEED: dict[str, Callable[..., Any]] = {
    "zigzag": lambda q, k, v, seed: nr.wrap_zigzag_attn_func(q, k, v, dropout_seed=seed, **DROPPING),
    "window": lambda q, k, v, seed: nr.wrap_sliding_window_attn_func(q, k, v, 3, dropout_seed=seed, **DROPPING),
    "ring_flash": lambda q, k, v, seed: nr.ring_flash_attn_func(q, k, v, dropout_seed=seed, **DROPPING),
    "context": lambda q, k, v, seed: ALONE.attention(q, k, v, dropout_seed=seed, **DROPPING),
}


@needs_newer
@pytest.mark.parametrize("name", WITH_SEED)
def test_a_seed_of_each_call(name: str) -> None:
    """Two graphs for any number of seeds: one before it is known that they change."""
    tensors, call = given(24), WITH_SEED[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed in (3, 1 << 40, 7, (1 << 63) - 1):
        got, want = compiled(*tensors, seed), call(*tensors, seed)
        assert torch.allclose(got, want, rtol=1e-11)
        grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (got, want)]
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(*grads, strict=True))
    assert counter.frame_count == 2


def on_a_group(rank: int, world_size: int) -> list[str]:
    faults, seq = [], 24
    for name, (call, packed) in calls(dist.group.WORLD, world_size, seq).items():
        mine = held("contiguous", seq * world_size, world_size, rank)
        tensors = [x.index_select(0 if packed else 1, mine) for x in given(seq * world_size, packed)]
        with naming(name):
            faults += told(name, both(call, tensors))
    return faults


@needs_newer
def test_on_a_group(ranks) -> None:
    no_faults(ranks(2).run(on_a_group))


def graphs(rank: int, world_size: int) -> list[tuple[str, list[tuple[int, ...]]]]:
    """What graphs of calls contain, by which torch finds them on disk, and the shapes in them."""
    found = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nodes = [node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta]
        tensors = [x for value in nodes for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]
        found.append((graph.code, [tuple(x.shape) for x in tensors]))
        return graph.forward

    group = dist.group.WORLD
    heads = nr.ContextParallel(transport="all_to_all")
    odd, even = (torch.randn(1, len(held("contiguous", seq, world_size, rank)), 3, 8) for seq in (13, 16))
    for call, mine in (
        (lambda x: heads.attention(x, x, x), even),
        (lambda x: nr.wrap_zigzag_attn_func(x, x, x, process_group=group, seq_len=13), odd),
        (lambda x: nr.ring_flash_attn_func(x, x, x, group=group), even),
    ):
        torch._dynamo.reset()
        torch.compile(call, fullgraph=True, backend=keep)(mine)
    return found


@needs_newer
def test_one_rank_s_graph_is_not_taken_for_another_s(ranks) -> None:
    """Of 3 heads on 4 ranks not all have one, and of 13 tokens ranks that hold 4 each hold others in zigzag."""
    for n, of_ranks in enumerate(zip(*ranks(4).run(graphs), strict=True)):
        known = dict(of_ranks)
        assert all(known[code] == shapes for code, shapes in of_ranks)
        assert len(known) == (1 if n == 2 else 4), "where shapes cannot differ one is compiled for all"
        assert n == 2 or len({shapes[0] for shapes in known.values()}) < len({str(shapes) for shapes in known.values()})


def of_any_length(rank: int, world_size: int) -> None:
    """Few graphs for many lengths, though rows move between layouts."""
    for op in (nr.wrap_ring_attn_func, nr.wrap_zigzag_attn_func, nr.wrap_stripe_attn_func, nr.wrap_ulysses_attn_func):
        call = partial(model, partial(op, process_group=dist.group.WORLD))
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
        for seq in range(12, 12 + 12 * 5, 5):
            tensors = given(seq)
            got, want = compiled(*tensors), call(*tensors)
            assert torch.allclose(got, want, rtol=1e-11), (op.__name__, seq)
            for x, y in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors), strict=True):
                assert torch.allclose(x, y, rtol=1e-10, atol=1e-12), (op.__name__, seq)
        assert counter.frame_count <= 3, (op.__name__, counter.frame_count)


@needs_newer
def test_lengths_are_dynamic_on_a_group(ranks) -> None:
    ranks(2).run(of_any_length)


def on_a_grid(rank: int, world_size: int) -> list[str]:
    """A layout that looks at documents, of which a graph does not know where they end."""
    cp = nr.ContextParallel(init_device_mesh("cpu", (2, world_size // 2)), layout="balanced")
    cu, tensors = torch.tensor([0, 9, 12 * world_size], dtype=torch.int32), given(12, seed=rank)
    call = partial(cp.attention, mask="causal", cu_seqlens=cu)
    faults = told("equal", both(call, tensors)) + told("dynamic", both(call, tensors, dynamic=True))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="leave seq_len out"):
        torch.compile(partial(call, seq_len=12 * world_size), fullgraph=True, backend="aot_eager")(*tensors)
    return faults


@needs_newer
def test_documents_on_a_grid(ranks) -> None:
    no_faults(ranks(4).run(on_a_grid))


def on_dtensors(rank: int, world_size: int, shape: tuple[int, ...], placements: tuple[Shard, ...]) -> list[str]:
    mesh, faults = init_device_mesh("cpu", shape), []
    ops: dict[str, Call] = {
        "ring": nr.wrap_ring_attn_func,
        "zigzag lse": lambda q, k, v: nr.wrap_zigzag_attn_func(q, k, v, return_attn_probs=True)[:2],
        "stripe": nr.wrap_stripe_attn_func,
        "ulysses": nr.wrap_ulysses_attn_func,
        "window": lambda q, k, v: nr.wrap_sliding_window_attn_func(q, k, v, 3),
    }
    if len(shape) == 1:
        ops["dropout"] = lambda q, k, v: nr.wrap_ring_attn_func(q, k, v, dropout_p=0.3, dropout_seed=7)
    else:  # what differs on a grid is the op's placement rule, which is one for all rings
        ops = {name: ops[name] for name in ("zigzag lse", "ulysses")}
    for name, call in ops.items():
        tensors = [distribute_tensor(x.detach(), mesh, placements) for x in given(24)]
        torch._dynamo.reset()
        answers = []
        for run in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
            leaves = [x.detach().requires_grad_() for x in tensors]
            found = run(*leaves)
            found = found if isinstance(found, tuple) else (found,)
            grads = torch.autograd.grad([x.full_tensor().square().sum() for x in found], leaves)
            answers.append([x.full_tensor().detach() for x in (*found, *grads)])
        same = [torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(*answers, strict=True)]
        faults += [] if all(same) else [f"{name}: {same}"]
    return faults


@needs_newer
@pytest.mark.parametrize(
    ("shape", "placements"),
    [((2,), (Shard(1),)), ((2, 2), (Shard(1), Shard(2))), ((2, 2), (Shard(0), Shard(1)))],
    ids=["sequence", "sequence x heads", "batch x sequence"],
)
def test_on_dtensors(ranks, shape: tuple[int, ...], placements: tuple[Shard, ...]) -> None:
    no_faults(ranks(math.prod(shape)).run(on_dtensors, shape, placements))


def test_selective_checkpointing_saves_the_op() -> None:
    """Its result is kept, so that the backward pass does not compute the attention again."""
    ran = []
    forward = engine.forward

    def counted(*args: Any) -> Any:
        ran.append(1)
        return forward(*args)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.nnscaler_ring.attention.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    tensors, call = given(24), partial(model, nr.wrap_zigzag_attn_func)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "forward", counted)
        contexts = partial(create_selective_checkpoint_contexts, policy)
        kept = torch.autograd.grad(checkpoint(call, *tensors, use_reentrant=False, context_fn=contexts), tensors)
        assert len(ran) == 1
        again = torch.autograd.grad(checkpoint(call, *tensors, use_reentrant=False), tensors)
        assert len(ran) == 3
    for a, b, c in zip(kept, again, torch.autograd.grad(call(*tensors), tensors), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's, where a graph breaks
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_cannot_be_compiled_breaks_a_graph_that_may_break(dynamic: bool) -> None:
    """And runs beside it: torch makes no graph of its own of what is not in one, in which no limit would be one of 0."""
    q, k, v = given(8)
    cu, cp = torch.tensor([0, 3, 8], dtype=torch.int32), nr.ContextParallel(layout="zigzag")

    def llama3(*tensors: Tensor) -> Tensor:
        row = nr.llama3_flash_attn_prepare_cu_seqlens(cu, True, 0, 1)
        return nr.llama3_flash_attn_varlen_func(*(x[0] for x in tensors), *row[:4], 1, row[4], causal=True)

    def sharded(*tensors: Tensor) -> Tensor:
        at = cp.position_ids(8, cu_seqlens=cu)[:, None, None]
        return cp.unshard(cp.attention(*(at + cp.shard(x, 1) for x in tensors)), 1)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cp.attention(q, k, v, nr.Mask([(0, q.shape[1], 0, q.shape[1], -NO_LIMIT, 0)], q.shape[1]))

    def built(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cp.attention(q, k, v, build(q.shape[1], causal=True, window=(3, 0), sinks=1))

    for call in (llama3, sharded, masked, built):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(call, backend="aot_eager", dynamic=dynamic)(q, k, v), call(q, k, v))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch itself
@pytest.mark.parametrize("warm", [False, True])
def test_forward_mode_is_refused_where_a_graph_is_traced(warm: bool) -> None:
    """Also where a graph is there already, for calls without it."""
    (q, k, v), cp = given(8), nr.ContextParallel()
    compiled = torch.compile(lambda q: cp.attention(q, k, v), backend="aot_eager")
    if warm:
        compiled(q)
    with pytest.raises(NotImplementedError, match="forward-mode"), forward_ad.dual_level():
        compiled(forward_ad.make_dual(q.detach(), q.detach()))
    assert compiled(q).shape == q.shape


@pytest.mark.skipif(OLD, reason="the Dynamo of 2.6 keeps the words of an error to itself")
def test_what_is_no_table_is_refused_where_a_graph_is_traced() -> None:
    (q, k, v), cp = given(8), nr.ContextParallel()

    def packed(*tensors: Tensor) -> Tensor:
        return cp.attention(*tensors[:3], cu_seqlens=tensors[3])

    for cu in (torch.tensor([0.0, 3.0, 8.0]), torch.tensor([[0, 3, 8]])):
        with pytest.raises(Exception, match="must be a 1-D"):
            torch.compile(packed, backend="aot_eager", fullgraph=True)(q, k, v, cu)


def test_what_cannot_be_compiled_says_so() -> None:
    q, k, v = given(8)
    mask, cp, packed = nr.Mask([(0, 8, 0, 8)], 8), nr.ContextParallel(), nr.ContextParallel(layout="zigzag-per-document")
    cu = torch.tensor([0, 16], dtype=torch.int32)
    sink = torch.ones(1)
    for call, words in (
        (lambda q, k, v: cp.attention(q, k, v, mask), None if OLD else "a Mask of slices under torch.compile"),
        (lambda q, k, v: packed.attention(q, k, v), None if OLD else "cuts each document"),
        (lambda q, k, v: cp.attention(q, k, v, learnable_sink=sink), None if OLD else "learnable_sink"),
        (lambda q, k, v: nr.wrap_ring_attn_func(q, k, v, dropout_p=0.5), "dropout_seed"),
        (lambda q, k, v: nr.flash_attention(q, k, v, return_total_attention=True), "return_total_attention.*outside the graph"),
        (
            lambda q, k, v: nr.llama3_flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 16, 16, 1, slice(0, 16), causal=True
            ),
            "llama3_flash_attn" if OLD else "llama3.*outside the graph",  # the Dynamo of 2.6 keeps the words of an error to itself
        ),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
