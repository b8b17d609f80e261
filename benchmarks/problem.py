"""What the benchmarks of whole schedules and of kernels compute: a mask over random numbers, and the dense answer to it."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import packings
from benchmarks.clock import Clock, Pass
from nnscaler_ring.core import layouts
from nnscaler_ring.core.call import Options
from nnscaler_ring.core.kernels import Case, Grad, Kernel, Scores, choose
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.mask import Mask
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import RankPlan, plan
from nnscaler_ring.core.sums import Sum

MASKS = ("causal", "full", "window", "packed")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, on what."""

    device: str = "cpu"
    ranks: int = 8
    tokens: int = 8192
    heads: tuple[int, int, int] = (32, 8, 128)
    dtype: str = "bfloat16"
    kernel: str = "auto"
    masks: Sequence[str] = MASKS
    window: int = 1024
    threads: int = 1
    product: int = 8192
    """Rows and columns of the matrix product."""

    @property
    def total(self) -> int:
        return self.ranks * self.tokens

    @property
    def case(self) -> Case:
        """What a kernel must be able to do."""
        heads, heads_k, dim = self.heads
        return Case(self.device, getattr(torch, self.dtype), dim, dim, heads, heads_k)

    def words(self, *more: str) -> str:
        """Heads, dtype, what is said besides, clock and masks."""
        cuda, one = self.device == "cuda", self.threads == 1
        clock = "CUDA events" if cuda else "one thread, CPU seconds" if one else f"{self.threads} threads, wall time"
        about = ", ".join([f"Hq/Hk/D = {'/'.join(map(str, self.heads))}", self.dtype, *more, clock])
        return f"{about};\nwindow {self.window:,}; packed: {len(packings.lengths(self.total, 0))} documents.\n"


SETUPS: Mapping[str, Setup] = MappingProxyType(
    {
        "cuda": Setup(device="cuda"),
        "cpu": Setup(tokens=2048, heads=(2, 1, 64), dtype="float32", product=2048),
        "quick": Setup(tokens=256, heads=(2, 1, 32), dtype="float32", window=64, product=256),
    }
)
"""Defaults by device; `quick` to see whether it runs."""


def title(kernel: Kernel) -> str:
    """A kernel's name, and which of several it is."""
    return f"`{kernel.name}`" + (f" ({kernel.label})" if kernel.label else "")


class Answer(NamedTuple):
    """What attention gives, forward and backward, over the whole sequence in natural order."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Problem:
    """A mask, random numbers for it, and one device's dense answer."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.setup, self.name = setup, name
        total = setup.total
        self.cu = np.cumsum([0, *packings.lengths(total, 0)]) if name == "packed" else None
        self.options = Options(causal=name != "full", window_size=(setup.window, 0) if name == "window" else (-1, -1))
        self.mask: Mask = build_mask(total, causal=self.options.causal, window=self.options.window_size, cu_seqlens_q=self.cu)
        heads, heads_k, dim = setup.heads
        device, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def made(heads: int) -> Tensor:
            return torch.randn(1, total, heads, dim, generator=generator, device=device).to(dtype)

        self.q, self.k, self.v, self.d_out = made(heads), made(heads_k), made(heads_k), made(heads)
        self.kernel = choose(setup.kernel, setup.case)
        self.scores = Scores(scale=dim**-0.5)

    def layout(self, name: str, ranks: int) -> Layout:
        return layouts.build(name, self.setup.total, ranks, self.cu)

    @cached_property
    def one(self) -> RankPlan:
        """The dense call."""
        whole = self.layout("contiguous", 1)
        return plan(self.mask, whole, whole, "auto", 0)

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has 2.5 times as many."""
        return 4.0 * self.one.pairs * self.q.shape[2] * self.q.shape[3]

    def dense(self, kernel: Kernel | None = None) -> Pass:
        """A kernel's own calls for the whole sequence; the problem's kernel where None."""
        return dense(kernel or self.kernel, self.one, (self.q, self.k, self.v, self.d_out), self.scores)


def dense(kernel: Kernel, one: RankPlan, tensors: Sequence[Tensor], scores: Scores) -> Pass:
    """The calls of a plan for one device on q, k, v and the gradient of out: gives an `Answer`, gradients in fp32."""
    q, k, v, d_out = tensors

    def forward() -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(d_out)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        for each in one.steps[0].calls:
            part, part_lse = kernel.forward(q, k, v, each.spans, each.window, scores)
            start = 0
            for i0, i1, _ in each.blocks.tolist():
                out[:, i0:i1] = part[:, start : start + i1 - i0]
                lse[:, i0:i1] = part_lse.transpose(1, 2)[:, start : start + i1 - i0]
                start += i1 - i0
        return out, lse.transpose(1, 2).contiguous()

    def backward(saved: tuple[Tensor, Tensor]) -> Answer:
        out, lse = saved
        sums = [Sum(x) for x in (q, k, v)]
        for each in one.steps[0].calls:
            grad = Grad(q, out, d_out, lse, dq=sums[0], dk=sums[1], dv=sums[2])
            kernel.backward(grad, k, v, each.spans, each.window, scores)
        return Answer(out, lse, *(x.total() for x in sums))

    return Pass(forward, backward)


def difference(got: Answer, want: Answer) -> float:
    """The largest root mean square difference of a part, over that part's root mean square; NaN where there is one."""

    def rms(x: Tensor) -> float:
        return float(x.float().square().mean().sqrt())

    return float(np.max([rms(g.float() - w.float()) / rms(w) for g, w in zip(got, want, strict=True)]))


TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-5}
"""Of `difference` to the dense answer, which has an error itself; who sees whom is what other tests are for."""


def check(got: Answer, want: Answer, dtype: str) -> float:
    """The `difference`; AssertionError where it is above `TOLERANCE`."""
    wrong = difference(got, want)
    if not wrong <= TOLERANCE[dtype]:
        raise AssertionError(f"the result differs by {wrong:.2g} from the dense one")
    return wrong


def clock_of(setup: Setup) -> Clock:
    """Its product is in the dtype of the setup, on the CPU in the one in which half precision is computed there, fp32."""
    dtype = getattr(torch, setup.dtype) if setup.device == "cuda" else torch.float32
    return Clock(setup.device, setup.threads, setup.product, dtype)


@contextmanager
def noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """What goes wrong is told, becomes a line in `failed` and gives back the memory that it held; the rest goes on."""
    try:
        yield
    except Exception as why:
        traceback.print_exc()
        traceback.clear_frames(why.__traceback__)  # or they would hold their tensors for as long as this runs
        text = " ".join(str(why).split()).replace("|", "/")
        failed[name] = f"{type(why).__name__}: {text if len(text) <= 160 else f'{text[:157]}...'}"
        gc.collect()
        with suppress(RuntimeError):  # after an illegal access a GPU refuses everything
            torch.cuda.empty_cache()
