"""One device times every rank's whole schedule of a world, beside the algorithms of today over the same kernels, in one run.

First all ranks of the world run in this process and their result is compared with that of the dense call; what each rank receives
is kept. Then each rank runs alone, forward and backward, and gets that again as copies, on a stream of their own where there are
streams: what is timed are the same calls on the same numbers as in a world whose network takes no time. Runs of everything that is
compared follow each other, round after round; a figure is made of medians over the rounds.

- dense: the time inside the kernel's calls for the whole sequence on one device, not counting what is around them.
- efficiency: that divided by the number of ranks, over the whole time of the slowest rank's schedule.
- rate: the same over the mean of all ranks, that is FLOP/s of the schedule over those of the dense call: efficiency less balance.
- glue: what a schedule takes besides its kernel calls, over the time inside them, summed over the ranks.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import packings, trace
from benchmarks.clock import Clock, Pass, Times, peak, timed
from benchmarks.replay import Mail, Recorder, Replay
from benchmarks.report import markdown
from benchmarks.todays import PASSES, Rank
from nnscaler_ring.core import layouts
from nnscaler_ring.core.call import Options, Rows, attend
from nnscaler_ring.core.kernels import Case, Grad, Scores, choose
from nnscaler_ring.core.layout import Layout
from nnscaler_ring.core.mask import Mask
from nnscaler_ring.core.mask import build as build_mask
from nnscaler_ring.core.plan import RankPlan, plan
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.transport import transport_of

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


SETUPS: Mapping[str, Setup] = MappingProxyType(
    {
        "cuda": Setup(device="cuda"),
        "cpu": Setup(tokens=2048, heads=(2, 1, 64), dtype="float32", product=2048),
        "quick": Setup(tokens=256, heads=(2, 1, 32), dtype="float32", window=64, product=256),
    }
)
"""Defaults by device; `quick` to see whether it runs."""


@dataclass(frozen=True)
class Way:
    """A layout and a transport of this package, or an algorithm of today."""

    name: str
    layout: str
    transport: str
    ours: bool = True


RING, GATHER = "full_ring", "broadcast"
"""The plans that have the calls of today's algorithms."""

WAYS: Mapping[str, Sequence[Way]] = MappingProxyType(
    {
        "causal": (
            Way("zigzag, auto", "zigzag", "auto"),
            Way("zigzag, grouped_ring", "zigzag", "grouped_ring"),
            Way("zigzag, all_gather", "zigzag", "all_gather"),
            Way("ring, contiguous", "contiguous", RING, ours=False),
            Way("ring, zigzag", "zigzag", RING, ours=False),
            Way("ring, stripe", "stripe", RING, ours=False),
            Way("all-gather, zigzag", "zigzag", GATHER, ours=False),
        ),
        "full": (
            Way("contiguous, auto", "contiguous", "auto"),
            Way("contiguous, grouped_ring", "contiguous", "grouped_ring"),
            Way("contiguous, all_gather", "contiguous", "all_gather"),
            Way("ring, contiguous", "contiguous", RING, ours=False),
            Way("all-gather, contiguous", "contiguous", GATHER, ours=False),
        ),
        "window": (
            Way("contiguous, auto", "contiguous", "auto"),
            Way("contiguous, all_gather", "contiguous", "all_gather"),
            Way("ring, contiguous", "contiguous", RING, ours=False),
            Way("ring, zigzag", "zigzag", RING, ours=False),
            Way("all-gather, zigzag", "zigzag", GATHER, ours=False),
        ),
        "packed": (
            Way("balanced, auto", "balanced", "auto"),
            Way("balanced, all_gather", "balanced", "all_gather"),
            Way("ring, contiguous", "contiguous", RING, ours=False),
            Way("ring, zigzag", "zigzag", RING, ours=False),
            Way("all-gather, zigzag", "zigzag", GATHER, ours=False),
        ),
    }
)


class Answer(NamedTuple):
    """What attention gives, forward and backward, over the whole sequence in natural order."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


# -- what is compared ------------------------------------------------------------------------------------------------------------


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
        self.kernel = choose(setup.kernel, Case(device.type, dtype, dim, dim, heads, heads_k))
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

    def dense(self) -> Pass:
        """The kernel's own calls for the whole sequence."""

        def forward() -> tuple[Tensor, Tensor]:
            out = torch.zeros_like(self.q)
            lse = torch.full(self.q.shape[:3], -torch.inf, device=self.q.device)
            for each in self.one.steps[0].calls:
                part, part_lse = self.kernel.forward(self.q, self.k, self.v, each.spans, each.window, self.scores)
                start = 0
                for i0, i1, _ in each.blocks.tolist():
                    out[:, i0:i1] = part[:, start : start + i1 - i0]
                    lse[:, i0:i1] = part_lse.transpose(1, 2)[:, start : start + i1 - i0]
                    start += i1 - i0
            return out, lse.transpose(1, 2).contiguous()

        def backward(saved: tuple[Tensor, Tensor]) -> Answer:
            out, lse = saved
            sums = [torch.zeros_like(x, dtype=torch.float32) for x in (self.q, self.k, self.v)]
            for each in self.one.steps[0].calls:
                grad = Grad(self.q, out, self.d_out, lse, *sums)
                self.kernel.backward(grad, self.k, self.v, each.spans, each.window, self.scores)
            return Answer(out, lse, *sums)

        return Pass(forward, backward)


class Schedule(ABC):
    """A way to compute a problem on the ranks of a world."""

    def __init__(self, problem: Problem, way: Way) -> None:
        self.problem, self.way = problem, way
        ranks = problem.setup.ranks
        self.layout = problem.layout(way.layout, ranks)
        self.plans = [plan(problem.mask, self.layout, self.layout, way.transport, rank) for rank in range(ranks)]
        self._at = [torch.from_numpy(self.layout.positions(rank)).to(problem.q.device) for rank in range(ranks)]
        self.mail: list[Mail] = []

    def shards(self, rank: int) -> list[Tensor]:
        """q, k, v and d_out of a rank."""
        problem = self.problem
        return [x.index_select(1, self._at[rank]) for x in (problem.q, problem.k, problem.v, problem.d_out)]

    def whole(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Of the ranks' rows the whole sequence."""
        return torch.cat(list(shards), dim).index_select(dim, torch.argsort(torch.cat(self._at)))

    @abstractmethod
    def world(self) -> Answer:
        """All ranks; keeps their mail."""

    @abstractmethod
    def alone(self, rank: int) -> Any:
        """A context in which one rank can run alone: gives its `Pass`."""


class Ours(Schedule):
    """This package, from its public edge on."""

    def _attend(self, group: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        problem, way = self.problem, self.way
        recipe = Recipe(group=group, layout=way.layout, transport=way.transport, kernel=problem.setup.kernel)
        cu = None if problem.cu is None else torch.from_numpy(problem.cu).to(torch.int32)
        rows = Rows(seq_len=problem.setup.total, cu_seqlens_q=cu)
        out, lse, _ = attend(q, k, v, recipe, replace(problem.options, return_attn_probs=True), rows)
        return out, lse

    def world(self) -> Answer:
        group, problem = f"local:{self.problem.setup.ranks}", self.problem
        recorder = Recorder(problem.setup.ranks)
        leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        with mock.patch.object(transport_of(group), "run", recorder.run):
            out, lse = self._attend(group, *leaves)
            grads = torch.autograd.grad(out, leaves, problem.d_out)
        self.mail = recorder.mail
        return Answer(out.detach(), lse.detach(), *grads)

    @contextmanager
    def alone(self, rank: int) -> Iterator[Pass]:
        ranks = self.problem.setup.ranks
        replay, group = Replay(ranks, rank, self.mail[rank]), f"pretend:{ranks}:{rank}"
        *qkv, d_out = self.shards(rank)
        leaves = [x.requires_grad_() for x in qkv]

        def forward() -> Tensor:
            replay.rewind()
            return self._attend(group, *leaves)[0]

        with mock.patch.object(transport_of(group), "start", replay.start):
            yield Pass(forward, lambda out: torch.autograd.grad(out, leaves, d_out))


class Todays(Schedule):
    """An algorithm of `todays`."""

    def _rank(self, rank: int) -> Rank:
        return Rank(self.plans[rank], self.problem.kernel, self.problem.scores, *self.shards(rank)[:3])

    def world(self) -> Answer:
        forward, backward = PASSES[self.way.transport]
        ranks = [self._rank(rank) for rank in range(self.problem.setup.ranks)]
        recorder = Recorder(len(ranks))
        results = recorder.run([forward(rank) for rank in ranks])
        d_outs = [self.shards(rank)[3] for rank in range(len(ranks))]
        grads = recorder.run([backward(rank, *saved, d_out) for rank, saved, d_out in zip(ranks, results, d_outs, strict=True)])
        self.mail = recorder.mail
        out, lse = zip(*results, strict=True)
        return Answer(self.whole(out), self.whole(lse, 2), *(self.whole(each) for each in zip(*grads, strict=True)))

    @contextmanager
    def alone(self, rank: int) -> Iterator[Pass]:
        forward, backward = PASSES[self.way.transport]
        replay, made, d_out = Replay(len(self.plans), rank, self.mail[rank]), self._rank(rank), self.shards(rank)[3]

        def first() -> Any:
            replay.rewind()
            return replay.run([forward(made)])[0]

        yield Pass(first, lambda saved: replay.run([backward(made, *saved, d_out)])[0])


def difference(got: Answer, want: Answer) -> float:
    """The largest root mean square difference of a part, over that part's root mean square."""

    def rms(x: Tensor) -> float:
        return float(x.float().square().mean().sqrt())

    return max(rms(g.float() - w.float()) / rms(w) for g, w in zip(got, want, strict=True))


TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-5}
"""Of `difference` to the dense answer, which has an error itself; who sees whom is what other tests are for."""


@dataclass
class Measured:
    """A schedule's figures."""

    schedule: Schedule
    difference: float
    bytes: int
    rounds: list[list[Times]] = field(default_factory=list)
    """A round has one `Times` a rank."""

    def of(self, part: str) -> list[float]:
        """Of each rank the median over the rounds."""
        return [median(getattr(each[rank], part) for each in self.rounds) for rank in range(len(self.rounds[0]))]


@dataclass
class Results:
    """All figures of a problem."""

    problem: Problem
    dense: list[Times]
    dense_bytes: int
    product: list[float]
    ways: list[Measured]


def clock_of(setup: Setup) -> Clock:
    return Clock(setup.device, setup.threads, setup.product, getattr(torch, setup.dtype))


def measure(setup: Setup, name: str, repeats: int) -> Results:
    """Check each way's answer, then time them all, round by round."""
    problem, clock = Problem(setup, name), clock_of(setup)
    dense = problem.dense()
    want = dense.backward(dense.forward())
    found = Results(problem, [], peak(dense, setup.device), [], [])
    for way in WAYS[name]:
        schedule = (Ours if way.ours else Todays)(problem, way)
        wrong = difference(schedule.world(), want)
        if not wrong <= TOLERANCE[setup.dtype]:
            raise AssertionError(f"{name}, {way.name}: the result differs by {wrong:.2g} from the dense one")
        with schedule.alone(setup.ranks // 2) as run:
            found.ways.append(Measured(schedule, wrong, peak(run, setup.device)))
    del want
    for _ in range(repeats):
        found.product.append(clock.product())
        found.dense.append(timed(dense, problem.kernel, clock))
        for each in found.ways:
            each.rounds.append([])
            for rank in range(setup.ranks):
                with each.schedule.alone(rank) as run:
                    each.rounds[-1].append(timed(run, problem.kernel, clock))
    return found


# -- the table -------------------------------------------------------------------------------------------------------------------

HEADER = (
    *("mask", "schedule", "calls", "merges", "efficiency", "range", "rate", "glue", "TFLOP/s"),
    *("forward efficiency", "rate", "glue", "TFLOP/s", "MB"),
)


def table(repeats: int, setup: Setup | None = None) -> str:
    """Measure everything of a setup and return the table; rows go to stderr as they come."""
    setup = setup or SETUPS["cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(setup.threads)
    rows, products, worst = list[tuple[object, ...]](), list[float](), 0.0
    try:
        for name in setup.masks:
            found = measure(setup, name, repeats)
            products += found.product
            worst = max(worst, *(way.difference for way in found.ways))
            made = list(_rows(found, _speed(setup, found.product)))
            del found  # and with it what ranks have received
            rows += made
            print(*(" | ".join(map(str, row)) for row in made), sep="\n", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
    side = f"{setup.product:,} x {setup.product:,}"
    about = [
        _what(setup),
        "Forward + backward, then forward alone. Efficiency: dense / ranks / slowest rank. Rate: FLOP/s over those of the dense",
        "call, with its range over the rounds. Glue: time outside of kernel calls over time inside. TFLOP/s: of the slowest rank,",
        f"in brackets over the {_speed(setup, products):.3g} of a product of {side} matrices. Calls and merges: forward, of the",
        f"busiest rank. MB: what rank {setup.ranks // 2} allocates at most besides its inputs. Bold: this package; the others are",
        f"the algorithms of today. Relative root mean square difference of all results to the dense ones: {worst:.1g} at most.",
    ]
    return "\n".join(["## Whole schedules on one device\n", *about, "", markdown(HEADER, rows)])


def _speed(setup: Setup, seconds: Sequence[float]) -> float:
    """TFLOP/s of the matrix product."""
    return 2 * setup.product**3 / median(seconds) / 1e12


def _what(setup: Setup) -> str:
    """Sizes, kernel and clock in words."""
    cuda, one = setup.device == "cuda", setup.threads == 1
    clock = "CUDA events" if cuda else "one thread, CPU seconds" if one else f"{setup.threads} threads, wall time"
    heads, heads_k, dim = setup.heads
    kernel = choose(setup.kernel, Case(setup.device, getattr(torch, setup.dtype), dim, dim, heads, heads_k))
    documents = len(packings.lengths(setup.total, 0))
    return (
        f"{setup.ranks} ranks of {setup.tokens:,} tokens, each alone on one device; Hq/Hk/D = {heads}/{heads_k}/{dim}, "
        f"{setup.dtype}, kernel `{kernel.name}`, {clock};\nwindow {setup.window:,}; packed: {documents} documents.\n"
    )


def _rows(found: Results, product: float) -> Iterator[tuple[object, ...]]:
    flops = found.problem.flops
    both, forward = (median(getattr(x, f"{part}_kernels") for x in found.dense) for part in ("both", "forward"))

    def speed(operations: float, seconds: float) -> str:
        return f"{operations / seconds / 1e12:.3g} ({operations / seconds / 1e12 / product:.0%})"

    dense = ("-", "-", "-", "-", speed(3.5 * flops, both), "-", "-", "-", speed(flops, forward), f"{found.dense_bytes / 1e6:,.0f}")
    yield (found.problem.name, "dense call", found.problem.one.num_calls, 0, *dense)
    for way in found.ways:
        plans, ranks = way.schedule.plans, len(way.schedule.plans)
        figures: list[str] = []
        for part, one, operations in (("both", both, 3.5 * flops), ("forward", forward, flops)):
            times, kernels = way.of(part), way.of(f"{part}_kernels")
            rates = [
                getattr(dense, f"{part}_kernels") / sum(getattr(x, part) for x in each)
                for dense, each in zip(found.dense, way.rounds, strict=True)
            ]
            figures.append(f"{one / ranks / max(times):.1%}")
            figures += [f"{min(rates):.1%} .. {max(rates):.1%}"] if part == "both" else []
            figures += [f"{median(rates):.1%}", f"{sum(times) / sum(kernels) - 1:.1%}", speed(operations / ranks, max(times))]
        name = f"**{way.schedule.way.name}**" if way.schedule.way.ours else way.schedule.way.name
        calls, merges = max(p.num_calls for p in plans), max(p.num_merges for p in plans)
        yield (found.problem.name, name, calls, merges, *figures, f"{way.bytes / 1e6:,.0f}")


def draw(setup: Setup, path: str) -> None:
    """Draw both passes of one rank of this package's first schedule for the first mask."""
    torch.set_num_threads(setup.threads)
    problem = Problem(setup, setup.masks[0])
    schedule = Ours(problem, WAYS[problem.name][0])
    schedule.world()
    with schedule.alone(setup.ranks // 2) as run:
        run.backward(run.forward())  # plans, and what is compiled once
        bars = trace.record(lambda: run.backward(run.forward()))
    where = f"rank {setup.ranks // 2} of {setup.ranks}, {setup.tokens:,} tokens a rank"
    title = f"{problem.name}, {schedule.way.name}: {where}, forward and backward"
    Path(path).write_text(trace.picture(bars, title))


# -- the command line ------------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    group = parser.add_argument_group("schedule")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what runs it (default: cpu)")
    group.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs")
    group.add_argument("--kernel", help="a kernel's name (default: auto)")
    group.add_argument("--ranks", type=int, help="ranks of the world (default: 8)")
    group.add_argument("--tokens", type=int, help="tokens a rank (default: 8,192 on cuda, 2,048 on cpu)")
    group.add_argument("--heads", type=_heads, metavar="Hq,Hk,D", help="heads (default: 32,8,128 on cuda, 2,1,64 on cpu)")
    group.add_argument("--dtype", choices=tuple(TOLERANCE), help="(default: bfloat16 on cuda, float32 on cpu)")
    group.add_argument("--window", type=int, help="keys before a query that it sees (default: 1,024)")
    group.add_argument("--threads", type=int, help="threads on cpu (default: 1)")
    group.add_argument("--masks", type=_masks, metavar="NAME,...", help=f"of {', '.join(MASKS)} (default: all)")
    group.add_argument("--trace", metavar="FILE.svg", help="instead of measuring draw what runs when in one rank's schedule")


def _heads(text: str) -> tuple[int, int, int]:
    heads, heads_k, dim = map(int, text.split(","))
    return heads, heads_k, dim


def _masks(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(MASKS):
        raise argparse.ArgumentTypeError(f"unknown mask {', '.join(sorted(unknown))}: choose from {', '.join(MASKS)}")
    return names


OPTIONS = ("kernel", "ranks", "tokens", "heads", "dtype", "window", "threads", "masks")
"""Options that replace a field of a setup."""


def setup_of(given: argparse.Namespace) -> Setup:
    """The setup that a command line asks for."""
    asked = {name: value for name in OPTIONS if (value := getattr(given, name)) is not None}
    return replace(SETUPS["quick" if given.quick else given.device], device=given.device, **asked)


def words_of(given: argparse.Namespace) -> str:
    """The options of this benchmark as they were given."""
    words = ["--device", given.device, *(["--quick"] if given.quick else [])]
    for name in OPTIONS:
        if (value := getattr(given, name)) is not None:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return " ".join(words)


def name_of(given: argparse.Namespace) -> str:
    """What its result is called."""
    return "-".join(("schedule", given.device, *(x for x in (given.kernel, given.dtype) if x)))
