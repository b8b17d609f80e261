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

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import trace
from benchmarks.clock import Clock, Pass, Times, peak, timed
from benchmarks.problem import Answer, Problem, Setup, check, clock_of, noted, title
from benchmarks.replay import Mail, Recorder, Replay
from benchmarks.report import Table, markdown
from benchmarks.todays import PASSES, Rank, order_of
from nnscaler_ring.core import engine, passes
from nnscaler_ring.core.call import Rows, attend
from nnscaler_ring.core.kernels import choose
from nnscaler_ring.core.passes import Job
from nnscaler_ring.core.plan import RankPlan, plan
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.transport import transport_of


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
            Way("zigzag, ring", "zigzag", "ring"),
            Way("zigzag, grouped_ring", "zigzag", "grouped_ring"),
            Way("zigzag, all_gather", "zigzag", "all_gather"),
            Way("ring, contiguous", "contiguous", RING, ours=False),
            Way("ring, zigzag", "zigzag", RING, ours=False),
            Way("ring, stripe", "stripe", RING, ours=False),
            Way("all-gather, zigzag", "zigzag", GATHER, ours=False),
        ),
        "full": (
            Way("contiguous, auto", "contiguous", "auto"),
            Way("contiguous, ring", "contiguous", "ring"),
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


# -- what is compared ------------------------------------------------------------------------------------------------------------


class Schedule(ABC):
    """A way to compute a problem on the ranks of a world; `plans` are those of the forward pass, `back` of the backward pass."""

    def __init__(self, problem: Problem, way: Way) -> None:
        self.problem, self.way = problem, way
        ranks = problem.setup.ranks
        self.layout = problem.layout(way.layout, ranks)
        self.plans: Sequence[RankPlan] = []
        self.back: Sequence[RankPlan] = []
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
        """All ranks; keeps their plans and their mail."""

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
        leaves, jobs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)], list[Job]()

        def made(*args: Any, **named: Any) -> Job:
            jobs.append(passes.job_of(*args, **named))
            return jobs[-1]

        with mock.patch.object(transport_of(group), "run", recorder.run), mock.patch.object(engine, "job_of", made):
            out, lse = self._attend(group, *leaves)
            grads = torch.autograd.grad(out, leaves, problem.d_out)
        self.mail, (self.plans, self.back) = recorder.mail, (job.plans for job in jobs)
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

    def __init__(self, problem: Problem, way: Way) -> None:
        super().__init__(problem, way)
        ranks = range(problem.setup.ranks)
        self.plans = self.back = [plan(problem.mask, self.layout, self.layout, way.transport, rank) for rank in ranks]

    def _rank(self, rank: int) -> Rank:
        plan, (q, k, v, _) = self.plans[rank], self.shards(rank)
        return Rank(plan, self.problem.kernel, self.problem.scores, q, k, v, order_of(plan).to(q.device))

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


DENSE = "dense call"


@dataclass
class Results:
    """All figures of a problem, and what failed: a way by its name, or `DENSE`."""

    problem: Problem
    dense: list[Times]
    dense_bytes: int
    product: list[float] = field(default_factory=list)
    ways: dict[str, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(setup: Setup, name: str, repeats: int) -> Results:
    """Check each way's answer, then time them all, round by round; a way that fails is left out from there on."""
    problem, clock = Problem(setup, name), clock_of(setup)
    dense = problem.dense()
    want = dense.backward(dense.forward())
    found = Results(problem, [], peak(dense, setup.device))
    for way in WAYS[name]:
        with noted(found.failed, way.name):
            found.ways[way.name] = _checked(problem, way, want)
    del want
    for _ in range(repeats):
        with noted(found.failed, DENSE):  # as after an illegal access, when nothing runs any more
            found.product.append(clock.product())
            found.dense.append(timed(dense, problem.kernel, clock))
        if DENSE in found.failed:
            break
        for way_name, each in list(found.ways.items()):
            with noted(found.failed, way_name):
                each.rounds.append(_round(each.schedule, clock))
            if way_name in found.failed:
                del found.ways[way_name]
    return found


def _checked(problem: Problem, way: Way, want: Answer) -> Measured:
    """A way whose result is right."""
    schedule = (Ours if way.ours else Todays)(problem, way)
    wrong = check(schedule.world(), want, problem.setup.dtype)
    with schedule.alone(problem.setup.ranks // 2) as run:
        return Measured(schedule, wrong, peak(run, problem.setup.device))


def _round(schedule: Schedule, clock: Clock) -> list[Times]:
    """Each rank once."""
    times = []
    for rank in range(schedule.problem.setup.ranks):
        with schedule.alone(rank) as run:
            times.append(timed(run, schedule.problem.kernel, clock))
    return times


# -- the table -------------------------------------------------------------------------------------------------------------------

HEADER = (
    *("mask", "schedule", "calls", "merges", "efficiency", "rate", "range", "glue", "TFLOP/s"),
    *("forward efficiency", "rate", "glue", "TFLOP/s", "MB"),
)
Row = tuple[object, ...]


def tables(repeats: int, setup: Setup) -> Iterator[Table]:
    """Measure a setup: the table after each mask, the last one whole; rows go to stderr as they come.

    What fails has a row that says so. The full mask, which takes the longest, comes last, so that a time limit costs the least.
    """
    kernel, threads = title(choose(setup.kernel, setup.case)), torch.get_num_threads()
    rows, products, worst, bad = dict[str, list[Row]](), list[float](), 0.0, False
    torch.set_num_threads(setup.threads)
    try:
        for name in sorted(setup.masks, key=lambda name: name == "full"):
            failed = dict[str, str]()
            with noted(failed, DENSE):
                found = measure(setup, name, repeats)
                products += found.product
                worst = max(worst, *(way.difference for way in found.ways.values()), 0.0)
                rows[name] = list(_rows(found, _speed(setup, found.product)))
                failed |= found.failed
                del found  # and with it what ranks have received
            if name not in rows:
                rows[name] = [_failed(setup, name, DENSE, failed[DENSE])]
            print(*(" | ".join(map(str, row)) for row in rows[name]), sep="\n", file=sys.stderr, flush=True)
            bad = bad or bool(failed)
            yield Table(_text(setup, kernel, rows, products, worst), bad)
    finally:
        torch.set_num_threads(threads)


def _text(setup: Setup, kernel: str, rows: Mapping[str, Sequence[Row]], products: Sequence[float], worst: float) -> str:
    """The table of the masks that there are."""
    side, cuda = f"{setup.product:,} x {setup.product:,}", setup.device == "cuda"
    missing = [name for name in setup.masks if name not in rows]
    about = [
        f"{setup.ranks} ranks of {setup.tokens:,} tokens, each alone on one device; {setup.words(f'kernel {kernel}')}",
        "Forward + backward, then forward alone. Efficiency: dense / ranks / slowest rank. Rate: FLOP/s over those of the dense",
        "call, with its range over the rounds. Glue: time outside of kernel calls over time inside. TFLOP/s: of the slowest rank,",
        f"in brackets over the {_speed(setup, products):.3g} of a product of {side} matrices. Calls and merges: forward, of the",
        f"busiest rank. MB: what rank {setup.ranks // 2} allocates at most besides its inputs. Bold: this package; the others are",
        f"the algorithms of today. Relative root mean square difference of all results to the dense ones: {worst:.1g} at most.",
        *(["Host: time to send a rank's work over the time that it takes, at most; a GPU without a lead waits from 100%."] * cuda),
        *([f"\nNot measured: {', '.join(missing)}."] if missing else []),
    ]
    made = markdown(_header(setup), [row for name in setup.masks for row in rows.get(name, ())])
    return "\n".join(["## Whole schedules on one device\n", *about, "", made])


def _speed(setup: Setup, seconds: Sequence[float]) -> float:
    """TFLOP/s of the matrix product; NaN where there was none."""
    return 2 * setup.product**3 / median(seconds) / 1e12 if seconds else float("nan")


def _header(setup: Setup) -> Sequence[str]:
    return (*HEADER, "host") if setup.device == "cuda" else HEADER


def _failed(setup: Setup, mask: str, name: str, why: str) -> Row:
    """The row of what failed."""
    return (mask, f"{name}: {why}", *["-"] * (len(_header(setup)) - 2))


def _rows(found: Results, product: float) -> Iterator[Row]:
    """A row of the dense call and one a way."""
    flops, setup, mask = found.problem.flops, found.problem.setup, found.problem.name
    names = {each.name: f"**{each.name}**" if each.ours else each.name for each in WAYS[mask]}
    if DENSE in found.failed:
        for name, shown in {DENSE: DENSE, **names}.items():
            yield _failed(setup, mask, shown, found.failed.get(name, "not timed"))
        return
    both, forward = (median(getattr(x, f"{part}_kernels") for x in found.dense) for part in ("both", "forward"))

    def speed(operations: float, seconds: float) -> str:
        return f"{operations / seconds / 1e12:.3g} ({operations / seconds / 1e12 / product:.0%})"

    def last(held: int, host: float) -> list[str]:
        return [f"{held / 1e6:,.0f}", *([f"{host:.0%}"] if setup.device == "cuda" else [])]

    dense = ("-", "-", "-", "-", speed(3.5 * flops, both), "-", "-", "-", speed(flops, forward))
    host = median(x.host / x.both for x in found.dense)
    yield (mask, DENSE, found.problem.one.num_calls, 0, *dense, *last(found.dense_bytes, host))
    for name, shown in names.items():
        if name in found.failed:
            yield _failed(setup, mask, shown, found.failed[name])
            continue
        way = found.ways[name]
        plans, ranks = way.schedule.plans, setup.ranks
        figures: list[str] = []
        for part, one, operations in (("both", both, 3.5 * flops), ("forward", forward, flops)):
            times, kernels = way.of(part), way.of(f"{part}_kernels")
            rates = [
                getattr(dense, f"{part}_kernels") / sum(getattr(x, part) for x in one_round)
                for dense, one_round in zip(found.dense, way.rounds, strict=True)
            ]
            figures += [f"{one / ranks / max(times):.1%}", f"{median(rates):.1%}"]
            figures += [f"{min(rates):.1%} .. {max(rates):.1%}"] if part == "both" else []
            figures += [f"{sum(times) / sum(kernels) - 1:.1%}", speed(operations / ranks, max(times))]
        calls, merges = max(p.num_calls for p in plans), max(p.num_merges for p in plans)
        host = max(sent / took for sent, took in zip(way.of("host"), way.of("both"), strict=True))
        yield (mask, shown, calls, merges, *figures, *last(way.bytes, host))


def draw(setup: Setup, path: str) -> None:
    """Draw both passes of one rank of this package's first schedule for the first mask."""
    torch.set_num_threads(setup.threads)
    problem = Problem(setup, setup.masks[0])
    schedule = Ours(problem, WAYS[problem.name][0])
    schedule.world()
    with schedule.alone(setup.ranks // 2) as run:
        run.backward(run.forward())  # plans, and what is compiled once
        bars = trace.record(lambda: run.backward(run.forward()), setup.device == "cuda")
    where = f"rank {setup.ranks // 2} of {setup.ranks}, {setup.tokens:,} tokens a rank"
    title = f"{problem.name}, {schedule.way.name}: {where}, forward and backward"
    Path(path).write_text(trace.picture(bars, title))
