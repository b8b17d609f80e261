"""Soft cap, ALiBi, bias, dropout, sinks, two parts of features, and the gradient of the log-sum-exp: against dense float64, in
every layout, transport and world, and that which weights dropout drops does not depend on how the sequence is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler_ring.core import engine
from nnscaler_ring.core.kernels.base import philox
from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.shapes import KINDS, MaskCase, random_mask
from tests.test_property import TRANSPORT_NAMES

WORLDS, CHUNKS, CASES = (1, 2, 3, 4), 12, 60
FEATURES = ("softcap", "alibi", "bias", "dropout", "sink", "far", "d_lse")


@dataclass(frozen=True)
class Case:
    """One random case; `features` are those that are on."""

    mask: MaskCase
    recipe: Recipe
    world: int
    batch: int
    heads: tuple[int, int, int, int]
    features: frozenset[str]
    seed: int


@cache
def cases(chunk: int) -> tuple[Case, ...]:
    rng = np.random.default_rng(9000 + chunk)
    return tuple(_case(rng, CASES * chunk + n) for n in range(CASES))


def _case(rng: np.random.Generator, number: int) -> Case:
    def one(*choices):
        return choices[rng.integers(len(choices))]

    world, transport = one(*WORLDS), one(*TRANSPORT_NAMES)
    q_len = int(rng.integers(1, 28))
    k_len = q_len if rng.random() < 0.7 else int(rng.integers(1, 28))
    features = {FEATURES[number % len(FEATURES)], *(name for name in FEATURES if rng.random() < 0.25)}
    kind = one(*(kind for kind in KINDS if kind != "slices" or "far" not in features))
    mask = random_mask(rng, q_len, k_len, kind, packed=rng.random() < 0.4)
    heads_k = int(rng.integers(1, 4))
    inner = one(*(n for n in range(1, world + 1) if world % n == 0)) if transport != "all_to_all" else 1
    recipe = Recipe(
        group=f"local:{world}" if inner == 1 else f"local:{world // inner}x{inner}",
        layout=one(*LAYOUTS),
        transport=transport,
        heads_stride=int(rng.integers(0, 3)),
        softcap=float(rng.uniform(0.5, 3.0)) if "softcap" in features else 0.0,
        dropout=float(rng.uniform(0.1, 0.8)) if "dropout" in features else 0.0,
        far=int(rng.integers(0, 20)) if "far" in features else None,
        batch0=int(rng.integers(0, 5)),
        head0=int(rng.integers(0, 5)),
        keeps=number % 3 > 0,
        **({} if mask.slices is not None else mask.named),
    )
    heads = (heads_k * int(rng.integers(1, 4)), heads_k, int(rng.integers(1, 7)) * recipe.parts, int(rng.integers(1, 7)))
    return Case(mask, recipe, world, int(rng.integers(1, 3)), heads, frozenset(features), number)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case."""

    given: oracle.Inputs
    extras: dict[str, Tensor | None]
    d_lse: Tensor | None
    scale: float
    seed: int


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    q_len, k_len, heads = case.mask.q_len, case.mask.k_len, case.heads[0]

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    per_head = case.seed % 2 == 0
    extras: dict[str, Tensor | None] = {
        "alibi": random(case.batch if per_head else 1, heads).abs() / 4 if "alibi" in case.features else None,
        "bias": random(heads if per_head else 1, q_len, k_len) if "bias" in case.features else None,
        "sink": random(heads) if "sink" in case.features else None,
    }
    given = oracle.inputs(case.seed, (case.batch, q_len, k_len), case.heads, torch.float64)
    d_lse = random(case.batch, heads, q_len) if "d_lse" in case.features else None
    return Problem(given, extras, d_lse, 0.6, 1234567890123 + case.seed)


def dense(case: Case, p: Problem) -> dict[str, Tensor]:
    """By definition: every pair, with torch's own differentiation."""
    recipe, mask = case.recipe, case.mask
    q, k, v = (x.clone().requires_grad_() for x in p.given[:3])
    bias, sink = (None if x is None else x.clone().requires_grad_() for x in (p.extras["bias"], p.extras["sink"]))
    q_len, k_len, group = mask.q_len, mask.k_len, q.shape[2] // k.shape[2]
    i, j = torch.arange(q_len).view(-1, 1), torch.arange(k_len)
    cu_q = mask.cu_q or [0, q_len]
    cu_k = (mask.cu_k or ([0, k_len] if mask.cu_q is None else mask.cu_q)) if mask.slices is None or mask.cu_q else [0, k_len]
    ends = torch.tensor([cu_k[n] - cu_q[n] for n in np.searchsorted(cu_q, np.arange(q_len), side="right")], dtype=torch.int64)
    distance = j - i - ends.view(-1, 1)
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    if recipe.far is None:
        scores = torch.einsum("bihd,bjhd->bhij", q, keys)
    else:
        halves = [torch.einsum("bihd,bjhd->bhij", *x) for x in zip(q.chunk(2, -1), keys.chunk(2, -1), strict=True)]
        scores = torch.where(-distance >= recipe.far, halves[1], halves[0])
    scores = scores * p.scale
    if recipe.softcap:
        scores = recipe.softcap * torch.tanh(scores / recipe.softcap)
    if p.extras["alibi"] is not None:
        scores = scores - p.extras["alibi"].unsqueeze(-1).unsqueeze(-1) * distance.abs()
    scores = scores if bias is None else scores + bias
    seen = torch.from_numpy(mask.seen())
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    some = scores.detach().amax(-1, keepdim=True) > -torch.inf if scores.shape[-1] else torch.zeros(*scores.shape[:3], 1).bool()
    safe = torch.where(some, scores, 0.0)
    lse = torch.where(some.squeeze(-1), safe.logsumexp(-1), -torch.inf)
    weights = (safe.softmax(-1) * some)[..., :k_len]
    if recipe.dropout:
        batch, head = (torch.arange(n) for n in scores.shape[:2])
        words = philox(i, j, (head + recipe.head0).view(-1, 1, 1), (batch + recipe.batch0).view(-1, 1, 1, 1), p.seed)
        weights = weights * (words >= round(recipe.dropout * 2**32)) / (1 - recipe.dropout)
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    loss = (out * p.given.d_out).sum()
    if p.d_lse is not None:
        loss = loss + (torch.where(some.squeeze(-1), lse, 0.0) * p.d_lse).sum()
    leaves = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"d_bias": bias}) | ({} if sink is None else {"d_sink": sink})
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


def run(case: Case, p: Problem) -> dict[str, Tensor]:
    """By the op."""
    mask = case.mask
    q, k, v = (x.clone().requires_grad_() for x in p.given[:3])
    bias, sink = (None if x is None else x.clone().requires_grad_() for x in (p.extras["bias"], p.extras["sink"]))
    cus = [None if cu is None else torch.tensor(cu, dtype=torch.int32) for cu in (mask.cu_q, mask.cu_k)]
    tables = (*cus, oracle.table(mask.slices), p.extras["alibi"], bias, sink)
    out, lse, _ = engine.attention(q, k, v, *tables, mask.q_len, mask.k_len, p.scale, p.seed, str(case.recipe))
    loss = (out * p.given.d_out).sum()
    if p.d_lse is not None:
        loss = loss + (torch.where(lse > -torch.inf, lse, 0.0) * p.d_lse).sum()
    leaves = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"d_bias": bias}) | ({} if sink is None else {"d_sink": sink})
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


def compare(case: Case) -> None:
    p = problem(case)
    got, want = run(case, p), dense(case, p)
    assert got.keys() == want.keys()
    errors = {name: oracle.error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= 1e-10, f"{errors}: {case}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases(chunk: int) -> None:
    for case in cases(chunk):
        compare(case)


def test_there_are_enough_cases_of_everything() -> None:
    everything = [case for chunk in range(CHUNKS) for case in cases(chunk)]
    for name in FEATURES:
        found = [case for case in everything if name in case.features]
        assert {case.recipe.transport for case in found} == set(TRANSPORT_NAMES), name
        assert {case.recipe.layout for case in found} == set(LAYOUTS), name
        assert {case.world for case in found} == set(WORLDS), name
        assert {bool(case.mask.cu_q) for case in found} == {True, False}
        assert {case.mask.kind for case in found} >= set(KINDS) - {"slices"}
        assert sum("x" in case.recipe.group or case.recipe.transport == "all_to_all" for case in found) > 30, "heads travel"


NOTICED: dict[str, dict[str, Any]] = {"softcap": {"softcap": 1.7}, "dropout": {"dropout": 0.4}, "far": {"far": 3}}


@pytest.mark.parametrize("name", NOTICED)
def test_a_feature_that_is_ignored_is_noticed(name: str) -> None:
    """The negative control: the answer with the feature is not the answer without."""
    mask = MaskCase("causal", 12, 12, {"causal": True})
    recipe = Recipe(group="local:2", layout="zigzag", transport="ring", causal=True, **NOTICED[name])
    case = Case(mask, recipe, 2, 1, (2, 1, 4, 3), frozenset({name}), 1)
    compare(case)
    without = replace(case, recipe=replace(recipe, softcap=0.0, dropout=0.0, far=None))
    want, got = dense(case, problem(case)), run(without, problem(case)) if name != "far" else dense(without, problem(case))
    assert oracle.error(got["out"], want["out"]) > 1e-3


def test_the_same_weights_are_dropped_however_the_sequence_is_cut() -> None:
    """Bit for bit: with values that are unit vectors the result is the row of weights, 0 where one was dropped."""
    length = 16
    q, k = (torch.randn(2, length, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    v = torch.eye(length, dtype=torch.float64).view(1, length, 1, length).expand(2, length, 4, length).contiguous()
    dropped = {}
    for world in (1, 2, 3, 4):
        for layout in LAYOUTS:
            for transport in TRANSPORT_NAMES:
                recipe = Recipe(group=f"local:{world}", layout=layout, transport=transport, causal=True, dropout=0.5)
                out, *_ = engine.attention(q, k, v, *[None] * 6, length, length, 0.3, 42, str(recipe))
                dropped[world, layout, transport] = out == 0
    first = dropped[1, "contiguous", "ring"]
    assert all(torch.equal(first, each) for each in dropped.values())
    causal = torch.ones(length, length).tril().bool().view(1, length, 1, length).expand(2, length, 4, length)
    share = (first & causal).sum() / causal.sum()
    assert 0.45 < share < 0.55
    halves = [torch.equal(first[0], first[1]), torch.equal(first[:, :, 0], first[:, :, 1])]
    assert not any(halves), "batch rows and heads have streams of their own"
    other = engine.attention(q, k, v, *[None] * 6, length, length, 0.3, 43, str(Recipe(causal=True, dropout=0.5)))[0] == 0
    assert not torch.equal(other, first)


def test_philox_is_that_of_its_authors() -> None:
    """The first words of Random123's known answers for philox4x32-10."""
    digits = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
    for counter, seed, word in (((0xFFFFFFFF,) * 4, (1 << 64) - 1, 0x408F276D), (digits, 0x299F31D0A4093822, 0xD16CFE09)):
        assert philox(*(torch.tensor([x]) for x in counter), seed).item() == word
