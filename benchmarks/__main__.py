"""Run the benchmarks and print their tables; ``--save`` also writes them to ``benchmarks/results/``."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Callable

from benchmarks import cpu_cost, overlap, piecewise, planning, scaling, schedule
from benchmarks.report import hardware

MODULES = (cpu_cost, overlap, piecewise, planning, scaling, schedule)
BENCHMARKS: dict[str, Callable[[int], str]] = {module.__name__.rpartition(".")[2]: module.table for module in MODULES}
RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved pairs of runs a figure (default: 7)")
    parser.add_argument("--save", action="store_true", help="write NAME.md to the folder of results")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="that folder (default: benchmarks/results)")
    schedule.add_options(parser)
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is read, not its log
    if given.trace:
        schedule.draw(schedule.setup_of(given), given.trace)
        return
    for name in given.names or BENCHMARKS:
        run, device, file, words = BENCHMARKS[name], "cpu", name, f"{name} --repeats {given.repeats}"
        if name == "schedule":
            setup, device, file = schedule.setup_of(given), given.device, schedule.name_of(given)
            run, words = lambda repeats: schedule.table(repeats, setup), f"{words} {schedule.words_of(given)}"  # noqa: B023
        text = f"{run(given.repeats)}\n\n{hardware(f'python -m benchmarks {words}', device)}\n"
        print(text)
        if given.save:
            (given.results / f"{file}.md").write_text(text)


if __name__ == "__main__":
    main()
