"""Random mask x layout x transport x world size x heads x batch x length: the op against dense float64, forward and gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from nnscaler_ring.core.layouts import LAYOUTS
from nnscaler_ring.core.plan import TRANSPORTS
from nnscaler_ring.core.recipe import Recipe
from tests import oracle
from tests.shapes import KINDS, WORLDS, MaskCase, random_mask

CHUNKS, CASES = 32, 100
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
KERNELS = ("reference", "aten")
TRANSPORT_NAMES = ("auto", "all_to_all", *TRANSPORTS)


@dataclass(frozen=True)
class Case:
    """One random case."""

    mask: MaskCase
    recipe: Recipe
    world: int
    batch: int
    heads: tuple[int, int, int, int]
    dtype: torch.dtype
    scale: float
    seed: int


@cache
def cases(chunk: int) -> tuple[Case, ...]:
    """The cases of a chunk: the same on every run."""
    rng = np.random.default_rng(1000 + chunk)
    return tuple(_case(rng, CASES * chunk + n) for n in range(CASES))


def _case(rng: np.random.Generator, number: int) -> Case:
    def one(*choices):
        return choices[rng.integers(len(choices))]

    world = one(*WORLDS)
    q_len = int(rng.integers(1, one(world + 2, 24, 48)))
    k_len = q_len if rng.random() < 0.7 else int(rng.integers(1, 48))
    mask = random_mask(rng, q_len, k_len, one(*KINDS), packed=rng.random() < 0.4)
    heads_k = int(rng.integers(1, 4))
    transport = one(*TRANSPORT_NAMES)
    inner = one(*(n for n in range(1, world + 1) if world % n == 0)) if transport != "all_to_all" and rng.random() < 0.5 else 1
    named = {} if mask.slices is not None else mask.named
    recipe = Recipe(
        group=f"local:{world}" if inner == 1 else f"local:{world // inner}x{inner}",
        layout=one(*LAYOUTS),
        transport=transport,
        kernel=one(*KERNELS),
        heads_stride=int(rng.integers(0, 4)) if transport == "all_gather" or rng.random() < 0.1 else 0,
        deterministic=bool(rng.random() < 0.5),
        keeps=number % 2 == 0,
        **named,
    )
    heads = (heads_k * int(rng.integers(1, 4)), heads_k, int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    dtype = torch.float64 if rng.random() < 0.9 else torch.float32
    return Case(mask, recipe, world, int(rng.integers(1, 4)), heads, dtype, float(rng.uniform(0.1, 1.5)), number)


def compare(case: Case, seen: np.ndarray) -> None:
    mask = case.mask
    given = oracle.inputs(case.seed, (case.batch, mask.q_len, mask.k_len), case.heads, case.dtype)
    got = oracle.run(given, case.scale, case.recipe, mask.cu_q, mask.cu_k, mask.slices)
    oracle.assert_close(got, oracle.dense(given, seen, case.scale), TOLERANCE[case.dtype], case)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases(chunk: int) -> None:
    ran = 0
    for case in cases(chunk):
        compare(case, case.mask.seen())
        ran += 1
    assert ran == CASES


def test_there_are_enough_cases_of_everything() -> None:
    everything = [case for chunk in range(CHUNKS) for case in cases(chunk)]
    assert len(everything) == len({case.seed for case in everything}) >= 3000
    axes = [
        {case.mask.kind for case in everything},
        {"packed", "one"},
        {"equal", "unequal"},
        set(LAYOUTS),
        set(TRANSPORT_NAMES),
        set(WORLDS),
        set(KERNELS),
        {1, 2, 3},
        {"mha", "gqa", "mqa"},
        {True, False},
    ]
    assert axes[0] == set(KINDS)
    found = {row for case in everything for row in itertools.combinations(enumerate(_row(case)), 2)}
    missing = [
        pair
        for (a, many), (b, others) in itertools.combinations(enumerate(axes), 2)
        for pair in itertools.product(many, others)
        if ((a, pair[0]), (b, pair[1])) not in found
    ]
    assert not missing, "pairs of values that no case has"
    docs = [np.diff(case.mask.cu_q) for case in everything if case.mask.cu_q]
    assert sum((d == 0).any() for d in docs) > 100 and sum((d < 5).any() for d in docs) > 100
    assert sum(bool(case.mask.q_len % (2 * case.world)) for case in everything) > 1000
    assert sum(case.heads[2] != case.heads[3] for case in everything) > 1000
    assert sum(case.recipe.heads_stride > 0 for case in everything) > 100
    assert sum("x" in case.recipe.group for case in everything) > 500, "grids"
    ulysses = [case for case in everything if case.recipe.transport == "all_to_all"]
    assert sum(case.world > case.heads[1] for case in ulysses) > 100, "more ranks than key heads"
    assert sum(bool(case.heads[0] % case.world) for case in ulysses) > 100, "heads that do not divide"
    assert sum(not case.mask.seen().any(1).all() for case in everything) > 100, "rows that see nothing"


def _row(case: Case) -> tuple[object, ...]:
    mask, recipe = case.mask, case.recipe
    sharing = "mha" if case.heads[0] == case.heads[1] else "mqa" if case.heads[1] == 1 else "gqa"
    lengths = "equal" if mask.q_len == mask.k_len else "unequal"
    where = (recipe.layout, recipe.transport, case.world, recipe.kernel)
    return (mask.kind, "packed" if mask.cu_q else "one", lengths, *where, case.batch, sharing, recipe.deterministic)


def test_one_pair_more_or_less_is_noticed() -> None:
    """The negative control: with an oracle that differs in one pair, the comparison fails, in every case."""
    noticed = 0
    for case in cases(0) + cases(1):
        rng = np.random.default_rng(case.seed)
        seen = case.mask.seen()
        at = rng.integers(seen.shape[0]), rng.integers(seen.shape[1])
        seen[at] = not seen[at]
        with pytest.raises(AssertionError, match="above"):
            compare(case, seen)
        noticed += 1
    assert noticed == 2 * CASES
