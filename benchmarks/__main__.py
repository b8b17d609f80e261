"""Run the benchmarks and print their tables; ``--save`` also writes them to ``benchmarks/results/``."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

from benchmarks import cpu_cost, overlap, piecewise, planning, scaling
from benchmarks.report import hardware

MODULES = (cpu_cost, overlap, piecewise, planning, scaling)
BENCHMARKS: dict[str, Callable[[int], str]] = {module.__name__.rpartition(".")[2]: module.table for module in MODULES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved pairs of runs a figure (default: 7)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.md")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    for name in given.names or BENCHMARKS:
        text = f"{BENCHMARKS[name](given.repeats)}\n\n{hardware(f'python -m benchmarks {name} --repeats {given.repeats}')}\n"
        print(text)
        if given.save:
            (pathlib.Path(__file__).parent / "results" / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
