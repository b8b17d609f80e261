"""The oracle: dense attention in float64, gradients by autograd; and one way to run the op and to compare the two.

Legend: `B` batch, `Lq`/`Lk` queries and keys, `Hq`/`Hk` heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnscaler_ring.core import engine
from nnscaler_ring.core.mask import Slice
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.sums import Sum


class Answer(NamedTuple):
    """What attention gives, forward and backward."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Inputs(NamedTuple):
    """q ``[B, Lq, Hq, D]``, k ``[B, Lk, Hk, D]``, v ``[B, Lk, Hk, Dv]`` and the gradient of out ``[B, Lq, Hq, Dv]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor


def inputs(
    seed: int,
    sizes: tuple[int, int, int],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs for ``(B, Lq, Lk)`` and ``(Hq, Hk, D, Dv)``, rounded to `dtype`."""
    (batch, num_q, num_k), (heads_q, heads_k, dim, dim_v) = sizes, heads
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_q, heads_q, dim), (num_k, heads_k, dim), (num_k, heads_k, dim_v), (num_q, heads_q, dim_v)]
    return Inputs(*(torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: np.ndarray | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention in the dtype given: out, and lse ``[B, Hq, Lq]`` without a gradient; 0 and -inf where nothing is seen."""
    seen = torch.as_tensor(seen, device=q.device)
    some = seen.any(-1, keepdim=True)
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * scale
    scores = torch.where(seen | ~some, scores, -torch.inf)
    weights = torch.softmax(scores, -1) * some
    out = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(group, 2))
    lse = torch.where(some.squeeze(-1), scores.detach().logsumexp(-1), -torch.inf) if k.shape[1] else scores.sum(-1) - torch.inf
    return out, lse.detach()


def dense(given: Inputs, seen: np.ndarray | Tensor, scale: float, dtype: torch.dtype = torch.float64) -> Answer:
    """The answer by dense attention."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in given[:3]]
    out, lse = attention(*leaves, seen, scale)
    return Answer(out.detach(), lse, *torch.autograd.grad(out, leaves, given.d_out.to(dtype)))


def table(slices: Sequence[Sequence[int]] | None) -> Tensor | None:
    """Slices as the op takes them: int64 ``[n, 6]``."""
    return None if slices is None else torch.tensor([Slice(*row) for row in slices], dtype=torch.int64).reshape(-1, 6)


def run(
    given: Inputs,
    scale: float,
    recipe: Recipe,
    cu_q: Sequence[int] | None = None,
    cu_k: Sequence[int] | None = None,
    slices: Sequence[Sequence[int]] | None = None,
) -> Answer:
    """The answer by the op, for a ``local:N`` group."""
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    cus = [None if cu is None else torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k)]
    tables = (*cus, table(slices), None, None, None)
    out, lse, _ = engine.attention(*leaves, *tables, given.q.shape[1], given.k.shape[1], scale, 0, str(recipe))
    return Answer(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, given.d_out))


def sums(like: Sequence[Tensor], start: float = 0.0) -> list[Sum]:
    """Sums that hold `start` in every row."""
    made = [Sum(x) for x in like]
    for total in made:
        total.total().fill_(start)
    return made


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1; inf for NaN, and for -inf out of place."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} is not {tuple(want.shape)}"
    if got.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    if not torch.equal(got == -torch.inf, want == -torch.inf) or got.isnan().any():
        return float("inf")
    want, got = (torch.where(x == -torch.inf, 0.0, x) for x in (want, got))
    return float((got - want).abs().max() / max(1.0, float(want.abs().max())))


def assert_close(got: Answer, want: Answer, tolerance: float, what: Any = "") -> None:
    """AssertionError unless every part is within `tolerance`."""
    errors = {name: error(g, w) for name, g, w in zip(Answer._fields, got, want, strict=True)}
    assert max(errors.values()) <= tolerance, f"{errors} above {tolerance}: {what}"
