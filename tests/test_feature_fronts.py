"""The features by the public names: sharded over processes and DTensors, the numbers and gradients of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import nnscaler_ring as nr
from tests.worlds import held, naming, no_faults, place, told

S, HEADS, HEADS_K, DIM = 24, 4, 2, 8
EXACT = 1e-10
CU = (0, 7, 8, 24)


@dataclass(frozen=True)
class Use:
    """A front with features: which tensors it takes besides q, k and v, and plain arguments."""

    name: str
    layout: str = "contiguous"
    packed: bool = False
    tensors: tuple[str, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)


def uses() -> list[Use]:
    both = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
    dropped = {"dropout_p": 0.4, "dropout_seed": 11}
    varlen = "wrap_ring_attn_varlen_func"
    return [
        Use("wrap_ring_attn_func", tensors=("alibi", "sink"), call={"softcap": 2.0, "transport": "ring"}),
        Use("wrap_ring_attn_func", tensors=("alibi2",), call={"causal": False, **dropped}),
        Use("wrap_zigzag_attn_func", tensors=("sink",), call={"cu_seqlens": CU, **dropped}),
        Use("wrap_zigzag_attn_func", tensors=("alibi",), call={"softcap": 3.0}),
        Use("wrap_stripe_attn_func", tensors=("alibi", "sink"), call={"softcap": 2.0, **dropped}),
        Use("wrap_ulysses_attn_func", tensors=("alibi", "sink"), call={"softcap": 2.0, **dropped}),
        Use("wrap_sliding_window_attn_func", tensors=("alibi", "sink"), call={"window_size": 5, **dropped}),
        Use("wrap_streaming_llm_attn_func", tensors=("sink",), call={"window_size": 3, "softcap": 2.0}),
        Use(varlen, packed=True, tensors=("alibi", "sink", "bias"), call={"causal": True, **both, **dropped}),
        Use(varlen, packed=True, tensors=("bias1",), call={**both, "softcap": 2.0, "transport": "all_to_all"}),
        Use(varlen, packed=True, tensors=("bias",), call={**both, "window_size": (3, 2)}),
    ]


PER_RANK = [
    Use("ring_flash_attn_func", tensors=("alibi", "sink"), call={"causal": True, "dropout_p": 0.3, "dropout_seed": 3}),
    Use("zigzag_ring_flash_attn_func", "zigzag", tensors=("sink",), call={"causal": True, "softcap": 1.5}),
    Use("stripe_flash_attn_func", "stripe", tensors=("alibi",), call={"causal": True, "dropout_p": 0.3, "dropout_seed": 3}),
]


def made(use: Use) -> dict[str, Tensor]:
    """The whole tensors, the same on every rank."""
    device, dtype = place()
    generator = torch.Generator().manual_seed(5)
    lead = (S,) if use.packed else (2, S)
    sizes: dict[str, tuple[int, ...]] = {"q": (*lead, HEADS, DIM), "k": (*lead, HEADS_K, DIM), "v": (*lead, HEADS_K, DIM)}
    sizes |= {"d_out": (*lead, HEADS, DIM), "alibi": (HEADS,), "alibi2": (2, HEADS), "sink": (HEADS,)}
    sizes |= {"bias": (HEADS, S, S), "bias1": (1, S, S)}
    whole = {name: torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype) for name, size in sizes.items()}
    whole |= {name: whole[name].abs().float() / 4 for name in ("alibi", "alibi2")}
    return {name: x for name, x in whole.items() if name in ("q", "k", "v", "d_out", *use.tensors)}


KEYWORDS = {"alibi": "alibi_slopes", "alibi2": "alibi_slopes", "sink": "learnable_sink", "bias": "bias", "bias1": "bias"}


def run(use: Use, x: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """out, lse and the gradients of a loss of both."""
    given = {**use.call, **more, "return_attn_probs": True} | {KEYWORDS[name]: x[name] for name in use.tensors}
    given = {name: torch.tensor(v, dtype=torch.int32) if name.startswith("cu_") else v for name, v in given.items()}
    out, lse, _ = getattr(nr, use.name)(x["q"], x["k"], x["v"], **given)
    ((out * x["d_out"]).sum() + lse.square().sum() / 7).backward()
    grads = {f"d_{name}": leaf.grad for name, leaf in x.items() if leaf.requires_grad}
    return {"out": out, "lse": lse, **grads}


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if name.startswith(("alibi", "d_out")) else t.clone().requires_grad_() for name, t in x.items()}


def faults_of(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    assert got.keys() == want.keys()
    found = []
    for name, x in got.items():
        x, y = x.detach().double().cpu(), want[name].detach().double().cpu()
        error = float((x - y).abs().max() / max(1.0, float(y.abs().max()))) if x.shape == y.shape else float("inf")
        if not error <= EXACT:
            found.append(f"{name} is off by {error:.3g} {tuple(x.shape)} {tuple(y.shape)}")
    return found


def own(use: Use, x: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """This rank's part of whole tensors or results."""
    at = rows.to(x["q"].device if "q" in x else x["out"].device)
    dims = dict.fromkeys(("q", "k", "v", "d_out", "out", "d_q", "d_k", "d_v"), 0 if use.packed else 1)
    dims |= {"lse": 1 if use.packed else 2, "bias": 1, "bias1": 1, "d_bias": 1, "d_bias1": 1}
    return {name: t.index_select(dims[name], at) if name in dims else t for name, t in x.items()}


def on_processes(rank: int, world_size: int) -> list[str]:
    faults = []
    for use in (*uses(), *PER_RANK):
        rows = held(use.layout, S, world_size, rank)
        alone = Use(use.name, "contiguous", use.packed, use.tensors, use.call)
        single = (
            {"process_group": None}
            if use.name.startswith("wrap")
            else {"group": dist.new_group([rank], use_local_synchronization=True)}
        )
        with naming(use):
            want = own(use, run(alone, leaves(made(use)), **single), rows)
            group = {"process_group": dist.group.WORLD} if use.name.startswith("wrap") else {}
            got = run(use, leaves(own(use, made(use), rows)), **group)
            if "d_sink" in got:  # each rank has its queries' part
                dist.all_reduce(got["d_sink"])
        faults += told(use, faults_of(got, want))
    return faults


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(on_processes))


def on_dtensors(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    faults = []
    meshes = {"S": (2,), "H": (2,), "B": (2,)} if world_size == 2 else {"SH": (2, 2), "BS": (2, 2), "HB": (2, 2), "SR": (2, 2)}
    for cut, sizes in meshes.items():
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=tuple(cut.lower()))
        for use in uses():
            if use.packed and "B" in cut:
                continue
            dims = {"S": 0, "H": 1} if use.packed else {"B": 0, "S": 1, "H": 2}
            where = [Replicate() if axis == "R" else Shard(dims[axis]) for axis in cut]
            whole = made(use)
            want = run(use, leaves(whole))
            for as_dtensor in (False, True):
                x = {n: distribute_tensor(t, mesh, where) if n in ("q", "k", "v", "d_out") else t for n, t in whole.items()}
                if as_dtensor:  # and the extras as parameters that every rank has
                    x |= {n: distribute_tensor(t, mesh, [Replicate()] * mesh.ndim) for n, t in x.items() if n in use.tensors}
                with naming((cut, use)):
                    x = {n: t.detach().requires_grad_(not n.startswith(("alibi", "d_out"))) for n, t in x.items()}
                    got = run(use, x)
                    got = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in got.items()}
                faults += told((cut, as_dtensor, use), faults_of(got, want))
    return faults


@pytest.mark.parametrize("world_size", [2, 4])
def test_dtensors(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(on_dtensors))


def on_context(rank: int, world_size: int) -> list[str]:
    use, faults = Use("", tensors=("alibi", "sink", "bias")), []
    options = {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 9, "return_attn_probs": True}

    def once(cp: nr.ContextParallel, x: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {KEYWORDS[name]: x[name] for name in use.tensors}
        out, lse, _ = cp.attention(x["q"], x["k"], x["v"], **options, **tensors)  # type: ignore[misc]
        ((out * x["d_out"]).sum() + lse.square().sum() / 7).backward()
        return {"out": out, "lse": lse, **{f"d_{name}": leaf.grad for name, leaf in x.items() if leaf.requires_grad}}

    alone = dist.new_group([rank], use_local_synchronization=True)
    for layout in ("zigzag", "balanced", "stripe"):
        for transport in ("auto", "ring", "all_to_all", "all_gather"):
            rows = held(layout, S, world_size, rank)
            want = own(use, once(nr.ContextParallel(alone), leaves(made(use))), rows)
            got = once(nr.ContextParallel(layout=layout, transport=transport), leaves(own(use, made(use), rows)))
            dist.all_reduce(got["d_sink"])
            faults += told((layout, transport), faults_of(got, want))
    return faults


@pytest.mark.parametrize("world_size", [2, 3])
def test_context(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(on_context))


# -- piecewise, total attention --------------------------------------------------------------------------------------------------


def pieces(batch: int = 2, seq: int = S, seq_k: int = S, dim: int = DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    sizes = [(batch, h, s, dim) for h, s in ((HEADS, seq), (HEADS_K, seq_k), (HEADS, seq), (HEADS_K, seq_k), (HEADS_K, seq_k))]
    return [torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


def piecewise_by_definition(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, threshold: int, causal: bool) -> Tensor:
    k1, k2, v = (x.repeat_interleave(HEADS // HEADS_K, 1) for x in (k1, k2, v))
    distance = (torch.arange(q1.shape[2]) + k1.shape[2] - q1.shape[2]).view(-1, 1) - torch.arange(k1.shape[2])
    scores = torch.where(distance >= threshold, q2 @ k2.mT, q1 @ k1.mT) * q1.shape[3] ** -0.5
    scores = scores.masked_fill(distance < 0, -torch.inf) if causal else scores
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("threshold", [0, 1, 9, 100])
@pytest.mark.parametrize(("seq", "seq_k", "dim"), [(S, S, DIM), (9, S, 5), (S, S, 256)])
def test_piecewise_on_one_device(seq: int, seq_k: int, dim: int, threshold: int, causal: bool) -> None:
    x = pieces(seq=seq, seq_k=seq_k, dim=dim)
    d_out = torch.randn(2, HEADS, seq, dim, dtype=torch.float64)
    want = torch.autograd.grad(piecewise_by_definition(*x, threshold, causal), x, d_out, allow_unused=True)
    out = nr.piecewise_attention(*x, threshold, causal)
    torch.testing.assert_close(out, piecewise_by_definition(*x, threshold, causal), rtol=1e-11, atol=1e-11)
    for got, expected in zip(torch.autograd.grad(out, x, d_out), want, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, rtol=1e-10, atol=1e-10)


def sharded(rank: int, world_size: int) -> list[str]:
    device, _ = place()
    faults = []
    d_out = torch.randn(2, HEADS, S, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = held("contiguous", S, world_size, rank)
    for transport in ("ring", "halo", "all_to_all", "all_gather"):
        whole = pieces()
        want_out = piecewise_by_definition(*whole, 9, True)
        want = [want_out.index_select(2, rows), *(g.index_select(2, rows) for g in torch.autograd.grad(want_out, whole, d_out))]
        x = [t.detach().index_select(2, rows).transpose(1, 2).requires_grad_() for t in whole]
        out = nr.wrap_piecewise_attn_func(*x, 9, True, process_group=dist.group.WORLD, transport=transport)
        assert isinstance(out, Tensor)
        got = [out, *torch.autograd.grad(out, x, d_out.index_select(2, rows).transpose(1, 2))]
        named = [{str(n): t for n, t in enumerate(each)} for each in ([g.transpose(1, 2) for g in got], want)]
        faults += told(transport, faults_of(*named))
        # weights of each key, over the queries of all ranks
        q, k, _, _, v = whole
        scores = (q @ k.repeat_interleave(2, 1).mT * DIM**-0.5).masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        shards = [t.detach().index_select(2, rows) for t in (q, k, v)]
        _, lse, total = nr.flash_attention(*shards, True, None, True, True, process_group=dist.group.WORLD, transport=transport)
        named = [
            {"lse": lse, "total": total},
            {"lse": scores.logsumexp(-1).index_select(2, rows), "total": scores.softmax(-1).sum(2).index_select(2, rows)},
        ]
        faults += told(("total", transport), faults_of(*named))
        faults += told(("lengths", transport), of_other_lengths(rank, world_size, transport))
    assert device.type == "cpu" or not faults
    return faults


def of_other_lengths(rank: int, world_size: int, transport: str) -> list[str]:
    """Ranks with different numbers of tokens, and more keys than queries."""
    whole, given = pieces(seq=7, seq_k=19), {"seq_len": 7, "seq_len_k": 19, "process_group": dist.group.WORLD}
    rows, keys = held("contiguous", 7, world_size, rank), held("contiguous", 19, world_size, rank)
    q1, k1, q2, k2, v = (t.detach().index_select(2, rows if t.shape[2] == 7 else keys) for t in whole)
    scores = (whole[0] @ whole[1].repeat_interleave(2, 1).mT * DIM**-0.5).masked_fill(torch.ones(7, 19).triu(13).bool(), -torch.inf)
    out, total = nr.flash_attention(q1, k1, v, True, return_total_attention=True, transport=transport, **given)
    got = {"out": out, "total": total, "far": nr.piecewise_attention(q1, k1, q2, k2, v, 9, True, **given)}
    want = {
        "out": (scores.softmax(-1) @ whole[4].repeat_interleave(2, 1)).index_select(2, rows),
        "total": scores.softmax(-1).sum(2).index_select(2, keys),
        "far": piecewise_by_definition(*whole, 9, True).index_select(2, rows),
    }
    return faults_of(got, want)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_piecewise_and_total_attention_over_ranks(ranks, world_size: int) -> None:
    no_faults(ranks(world_size).run(sharded))


def on_a_mesh(rank: int, world_size: int) -> list[str]:
    """Piecewise on DTensors: sequence and heads."""
    device, _ = place()
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("s", "h"))
    whole = pieces()
    want = piecewise_by_definition(*whole, 5, True)
    grads = torch.autograd.grad(want.sum(), whole)
    x = [distribute_tensor(t.detach().transpose(1, 2).contiguous(), mesh, [Shard(1), Shard(2)]).requires_grad_() for t in whole]
    out = nr.wrap_piecewise_attn_func(*x, 5, True)
    assert isinstance(out, DTensor)
    ones = distribute_tensor(torch.ones_like(want).transpose(1, 2).contiguous(), mesh, [Shard(1), Shard(2)])
    out.backward(ones)
    got = {"out": out.full_tensor(), **{str(n): t.grad.full_tensor() for n, t in enumerate(x)}}  # type: ignore[union-attr]
    expected = {"out": want.transpose(1, 2), **{str(n): g.transpose(1, 2) for n, g in enumerate(grads)}}
    return told("mesh", faults_of(got, expected))


def test_piecewise_on_dtensors(ranks) -> None:
    no_faults(ranks(4).run(on_a_mesh))


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention(causal: bool) -> None:
    """`Sk > Sq`, GQA, the gradient of the log normalizer; what is returned, in order."""
    q, k, _, _, v = pieces(seq=9)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.4
    hidden = torch.arange(S) > (torch.arange(9) + S - 9).view(-1, 1)
    scores = scores.masked_fill(hidden, -torch.inf) if causal else scores
    want = (scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1), scores.softmax(-1).sum(2))
    got = nr.flash_attention(q, k, v, causal, 0.4, True, True)
    assert isinstance(got, tuple) and not got[2].requires_grad
    for have, expected in zip(got, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-10, atol=1e-10)
    loss: Callable[[Any], Tensor] = lambda each: each[0].square().sum() + each[1].sin().sum()  # noqa: E731
    for have, expected in zip(*(torch.autograd.grad(loss(each), (q, k, v)) for each in (got, want)), strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-9, atol=1e-9)
    only = nr.flash_attention(q, k, v, causal)
    assert isinstance(only, Tensor) and len(nr.flash_attention(q, k, v, return_total_attention=True)) == 2
    kept = nr.flash_attention(q, k, v, causal, 0.4, return_total_attention=True, dropout_p=0.5)
    torch.testing.assert_close(kept[1], want[2], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(kept[0], want[0])


def test_a_seed_drops_the_same_weights_and_none_draws_one() -> None:
    q = torch.randn(1, 16, 2, 4)
    call = lambda **seed: nr.wrap_ring_attn_func(q, q, q, dropout_p=0.5, **seed)  # noqa: E731
    assert torch.equal(call(dropout_seed=1), call(dropout_seed=1)) and not torch.equal(call(dropout_seed=1), call(dropout_seed=2))
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and not torch.equal(first, second)


def test_refused() -> None:
    q = torch.randn(1, 2, 8, 4)
    for threshold in (-1, -5):
        with pytest.raises(ValueError, match=f"dist_threshold={threshold}"):
            nr.piecewise_attention(q, q, q, q, q, threshold)
    with pytest.raises(ValueError, match="one head dim"):
        nr.piecewise_attention(q, q, q, q[..., :3], q, 2)
    narrow = q[..., :2]
    for far in (q, q.repeat(1, 2, 1, 1), q[:, :, 1:]):  # as wide together, but not halves of one width
        with pytest.raises(ValueError, match="q1 and q2 must have one shape"):
            nr.piecewise_attention(narrow, narrow, far, far, q, 2)
    with pytest.raises(ValueError, match="all one head dim"):
        nr.piecewise_attention(narrow, q, narrow, q, q, 2)
    with pytest.raises(ValueError, match=r"q2 torch.bfloat16.*give one dtype"):
        nr.piecewise_attention(q, q, q.bfloat16(), q.bfloat16(), q, 2)
    with pytest.raises(ValueError, match="q2 is a NoneType"):
        nr.wrap_piecewise_attn_func(q, q, None, q, q, 2)
    with pytest.raises(ValueError, match="dist_threshold=None"):
        nr.piecewise_attention(q, q, q, q, q, None)
    for flag in ("return_log_normalizer", "return_total_attention", "causal"):
        with pytest.raises(ValueError, match=r"(causal|return_.*)='no': give True or False"):
            nr.flash_attention(q, q, q, **{flag: "no"})
    with pytest.raises(ValueError, match="multiple of the 3 key heads"):
        nr.flash_attention(q, q.repeat(1, 3, 1, 1)[:, :3], q.repeat(1, 3, 1, 1)[:, :3])
    with pytest.raises(ValueError, match="dropout_p=1"):
        nr.flash_attention(q, q, q, dropout_p=1.5)
    for positional in ((0.0,), (False, 0.1), (0.0, True)):
        with pytest.raises(ValueError, match=r"return_\w+=0\.\d: give True or False; .*dropout_p="):
            nr.flash_attention(q, q, q, True, None, *positional)
    with pytest.raises(ValueError, match=r"q \(2, 8, 4\), k \(1, 2, 8, 4\).*give all \[B, H, S, D\]"):
        nr.flash_attention(q[0], q, q)
    with pytest.raises(ValueError, match=r"q1 \(2, 8, 4\).*give all \[B, H, S, D\]"):
        nr.piecewise_attention(*[q[0]] * 5, 2)
