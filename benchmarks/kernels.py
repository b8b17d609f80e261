"""One dense call of every kernel that is there, by mask, and whether the one that `auto` takes is the fastest of them.

All get the same tensors. Results are compared with those of `reference`, which computes in fp32 by the definition of attention;
then forward and backward calls are timed in turn, round after round, as in `schedule`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from benchmarks.clock import Times, timed
from benchmarks.problem import Problem, Setup, check, clock_of, noted, title
from benchmarks.report import Table, markdown
from nnscaler_ring.core.kernels import KERNELS, Case, Kernel, choose
from nnscaler_ring.core.kernels.reference import Reference

HEADER = ("mask", "kernel", "calls", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "time / auto's", "range", "difference")

Row = tuple[object, ...]


@dataclass
class Results:
    """All figures of a problem by the titles of the kernels: differences, a `Times` a round, and what failed."""

    problem: Problem
    wrong: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[Times]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def ratios(self, name: str, auto: str) -> list[float]:
        """Time of a kernel over that of another, round by round."""
        pairs = zip(self.rounds.get(name, ()), self.rounds.get(auto, ()), strict=False)
        return [mine.both_kernels / its.both_kernels for mine, its in pairs]


def usable(case: Case) -> tuple[dict[str, Kernel], list[str]]:
    """The kernels that take a case, by title, and why each other one does not."""
    able, refused = dict[str, Kernel](), list[str]()
    for kernel in (each for kernels in KERNELS.values() for each in kernels):
        try:
            kernel.check(case)
            able[title(kernel)] = kernel
        except NotImplementedError as why:
            refused.append(f"{title(kernel)}: {why}")
    return able, refused


def measure(setup: Setup, mask: str, kernels: Mapping[str, Kernel], repeats: int) -> Results:
    """Check each kernel's answer, then time them all, round by round; one that fails is left out from there on."""
    problem, clock = Problem(setup, mask), clock_of(setup)
    found, exact = Results(problem), problem.dense(Reference())
    clock.product()  # which sets up what multiplies
    want = exact.backward(exact.forward())
    for name, kernel in kernels.items():
        with noted(found.failed, name):
            run = problem.dense(kernel)
            found.wrong[name] = check(run.backward(run.forward()), want, setup.dtype)
            found.rounds[name] = []
    del want
    for _ in range(repeats):
        for name, rounds in list(found.rounds.items()):
            with noted(found.failed, name):
                rounds.append(timed(problem.dense(kernels[name]), kernels[name], clock))
            if name in found.failed:
                del found.rounds[name]
    return found


def tables(repeats: int, setup: Setup) -> Iterator[Table]:
    """Measure a setup on one rank: the table after each mask, the last one whole; rows go to stderr as they come."""
    setup = replace(setup, ranks=1)
    kernels, refused = usable(setup.case)
    auto, threads = title(choose("auto", setup.case)), torch.get_num_threads()
    rows, ratios, bad = list[Row](), dict[str, dict[str, float]](), False
    torch.set_num_threads(setup.threads)
    try:
        for mask in setup.masks:
            failed, made = dict[str, str](), list[Row]()
            with noted(failed, "all"):
                found = measure(setup, mask, kernels, repeats)
                made = [_row(found, name, auto) for name in kernels]
                ratios[mask] = {name: median(each) for name in kernels if (each := found.ratios(name, auto))}
                failed |= found.failed
            made = made or [_failed(mask, "all", failed["all"])]
            print(*(" | ".join(map(str, row)) for row in made), sep="\n", file=sys.stderr, flush=True)
            rows, bad = rows + made, bad or bool(failed)
            yield Table(_text(setup, rows, refused, verdict(auto, ratios)), bad)
    finally:
        torch.set_num_threads(threads)


def verdict(auto: str, ratios: Mapping[str, Mapping[str, float]]) -> str:
    """Whether `auto` takes the fastest, from times over those of the kernel that it takes, by mask and kernel.

    Example:
        >>> verdict("`aten`", {"causal": {"`aten`": 1.0, "`triton`": 1.2}, "full": {"`aten`": 1.0, "`triton`": 0.9}})
        '`auto` takes `aten`: the fastest for causal; for full `triton` takes 0.90 of its time.'
    """
    fastest = [mask for mask, each in ratios.items() if min(each.values(), default=0.0) >= 1]
    said = [f"the fastest for {', '.join(fastest)}"] if fastest else []
    for mask, each in ratios.items():
        best = min(each, key=lambda name: each[name], default=None)
        if best is None:
            said.append(f"it failed for {mask}")
        elif mask not in fastest:
            said.append(f"for {mask} {best} takes {each[best]:.2f} of its time")
    return f"`auto` takes {auto}: {'; '.join(said) or 'nothing was measured'}."


def _text(setup: Setup, rows: Sequence[Row], refused: Sequence[str], last: str) -> str:
    """The table of the masks that there are."""
    missing = [name for name in setup.masks if name not in {row[0] for row in rows}]
    about = [
        f"One dense call on one device, {setup.tokens:,} tokens; {setup.words()}",
        "Times are of the kernel's calls alone, medians. Bold: the kernel that `auto` takes. Time / auto's: of both passes, with",
        "the range over the rounds. Difference: relative root mean square, to the results of `reference`, which computes in fp32.",
        *([f"\nNot measured: {', '.join(missing)}."] if missing else []),
    ]
    lacking = ["\nNot for this case:\n", *(f"- {each}" for each in refused)] if refused else []
    return "\n".join(["## Kernels\n", *about, "", markdown(HEADER, rows), f"\n{last}", *lacking])


def _failed(mask: str, name: str, why: str) -> Row:
    """The row of what failed."""
    return (mask, f"{name}: {why}", *["-"] * (len(HEADER) - 2))


def _row(found: Results, name: str, auto: str) -> Row:
    problem, shown = found.problem, f"**{name}**" if name == auto else name
    if name in found.failed:
        return _failed(problem.name, shown, found.failed[name])
    rounds, ratios = found.rounds[name], found.ratios(name, auto)
    figures: list[str] = []
    for operations, seconds in (
        (problem.flops, median(x.forward_kernels for x in rounds)),
        (2.5 * problem.flops, median(x.both_kernels - x.forward_kernels for x in rounds)),
    ):
        figures += [f"{seconds * 1e3:.3g}", f"{operations / seconds / 1e12:.3g}"]
    figures += [f"{median(ratios):.2f}", f"{min(ratios):.2f} .. {max(ratios):.2f}"] if ratios else ["-", "-"]
    return (problem.name, shown, problem.one.num_calls, *figures, f"{found.wrong[name]:.1g}")
