"""Run the benchmarks and print their tables; ``--save`` also writes them to ``benchmarks/results/``."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from benchmarks import cpu_cost, glue, kernels, overlap, peers, piecewise, planning, scaling, schedule
from benchmarks.options import OF_KERNELS, OF_SCHEDULE, add_options, asked, device_of, name_of, setup_of, words_of
from benchmarks.problem import Setup
from benchmarks.report import Table, hardware, save

PLAIN: Mapping[str, Callable[[int], str]] = MappingProxyType(
    {module.__name__.rpartition(".")[2]: module.table for module in (cpu_cost, glue, overlap, peers, piecewise, planning, scaling)}
)
"""Benchmarks without options."""

WITH_SETUP: Mapping[str, Callable[[int, Setup], Iterator[Table]]] = MappingProxyType(
    {"kernels": kernels.tables, "schedule": schedule.tables}
)
OPTIONS: Mapping[str, frozenset[str]] = MappingProxyType({"kernels": OF_KERNELS, "schedule": OF_SCHEDULE})

NAMES = sorted((*PLAIN, *WITH_SETUP))
RESULTS = pathlib.Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is read, not its log
    if given.trace:
        schedule.draw(setup_of(given), given.trace)
        return
    if failed := [name for name in given.names or NAMES if run(name, given)]:
        sys.exit(f"failed in part: {', '.join(failed)}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for; an option that nothing would look at is an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)}; default: all")
    parser.add_argument("--repeats", type=int, help="interleaved pairs of runs a figure (default: 7)")
    parser.add_argument("--save", action="store_true", help="write NAME.md to the folder of results")
    parser.add_argument("--results", type=pathlib.Path, help="that folder (default: benchmarks/results)")
    add_options(parser)
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    for name in given.names or NAMES:
        for option in asked(given):
            if option not in OPTIONS.get(name, ()):
                takers = ", ".join(taker for taker, options in OPTIONS.items() if option in options)
                parser.error(f"{name} takes no --{option}: it is for {takers}")
    if given.results and not given.save:
        parser.error("--results is where --save writes: give both")
    if given.trace and (given.save or given.repeats is not None or len(given.masks or "m") > 1):
        parser.error("--trace draws one mask and measures nothing: leave out --save, --repeats and all but one of --masks")
    given.repeats = 7 if given.repeats is None else given.repeats
    if given.repeats < 1:
        parser.error(f"--repeats is 1 or more, not {given.repeats}")
    return given


def run(name: str, given: argparse.Namespace) -> bool:
    """Print a benchmark's table, saved as far as it is after each part of it; whether something in it failed."""
    results = given.results or RESULTS
    if given.save:
        results.mkdir(parents=True, exist_ok=True)
    device, file, words, text, table = "cpu", name, f"{name} --repeats {given.repeats}", "", Table("")
    if name in WITH_SETUP:
        device, file, words = device_of(given), name_of(name, given), f"{words} {words_of(given)}"
        made = WITH_SETUP[name](given.repeats, setup_of(given))
    else:
        made = iter([Table(PLAIN[name](given.repeats))])
    where = hardware(f"python -m benchmarks {words}", device)  # asked first: a GPU may be missing now, or be lost on the way
    for table in made:
        text = f"{table.text}\n\n{where}\n"
        if given.save:
            save(results / f"{file}.md", text)
    print(text)
    return table.failed


if __name__ == "__main__":
    main()
