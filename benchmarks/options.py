"""The options of the benchmarks that have a setup, `kernels` and `schedule`; a result is called by all that were given."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.problem import MASKS, SETUPS, TOLERANCE, Setup

FIELDS = ("kernel", "ranks", "tokens", "heads", "dtype", "window", "threads", "masks")
"""Options that replace a field of a setup."""

OF_SCHEDULE = frozenset({"device", "quick", *FIELDS, "trace"})
OF_KERNELS = OF_SCHEDULE - {"kernel", "ranks", "trace"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, none of which has a default here: what was given can be told."""
    group = parser.add_argument_group("kernels and schedule")
    group.add_argument("--device", choices=("cpu", "cuda"), help="what runs it (default: cpu)")
    group.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs")
    group.add_argument("--tokens", type=int, help="tokens a rank (default: 8,192 on cuda, 2,048 on cpu)")
    group.add_argument("--heads", type=_heads, metavar="Hq,Hk,D", help="heads (default: 32,8,128 on cuda, 2,1,64 on cpu)")
    group.add_argument("--dtype", choices=tuple(TOLERANCE), help="(default: bfloat16 on cuda, float32 on cpu)")
    group.add_argument("--window", type=int, help="keys before a query that it sees (default: 1,024)")
    group.add_argument("--threads", type=int, help="threads on cpu (default: 1)")
    group.add_argument("--masks", type=_masks, metavar="NAME,...", help=f"of {', '.join(MASKS)} (default: all)")
    alone = parser.add_argument_group("schedule alone")
    alone.add_argument("--kernel", help="a kernel's name (default: auto)")
    alone.add_argument("--ranks", type=int, help="ranks of the world (default: 8)")
    alone.add_argument("--trace", metavar="FILE.svg", help="instead of measuring draw what runs when in one rank's schedule")


def _heads(text: str) -> tuple[int, int, int]:
    heads, heads_k, dim = map(int, text.split(","))
    return heads, heads_k, dim


def _masks(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(MASKS):
        raise argparse.ArgumentTypeError(f"unknown mask {', '.join(sorted(unknown))}: choose from {', '.join(MASKS)}")
    return names


def asked(given: argparse.Namespace) -> list[str]:
    """The options that were given, in a fixed order."""
    values = {name: getattr(given, name) for name in ("device", "quick", *FIELDS, "trace")}
    return [name for name, value in values.items() if value is not None and value is not False]


def device_of(given: argparse.Namespace) -> str:
    return given.device or "cpu"


def setup_of(given: argparse.Namespace) -> Setup:
    """The setup that a command line asks for."""
    device, fields = device_of(given), {name: getattr(given, name) for name in FIELDS if getattr(given, name) is not None}
    setup = replace(SETUPS["quick"], device=device, dtype=SETUPS[device].dtype) if given.quick else SETUPS[device]
    return replace(setup, **fields)


def _values(given: argparse.Namespace, between: str) -> Iterator[tuple[str, str]]:
    for name in asked(given):
        if name in FIELDS:
            value = getattr(given, name)
            yield name, between.join(map(str, value)) if isinstance(value, tuple) else str(value)


def words_of(given: argparse.Namespace) -> str:
    """The options as they were given."""
    words = ["--device", device_of(given), *(["--quick"] if given.quick else [])]
    return " ".join([*words, *(f"--{name} {value}" for name, value in _values(given, ","))])


def name_of(name: str, given: argparse.Namespace) -> str:
    """What a benchmark's result is called: no two setups have one file."""
    said = (value if field in ("kernel", "dtype") else f"{field}-{value}" for field, value in _values(given, "_"))
    return "-".join([name, device_of(given), *(["quick"] if given.quick else []), *said])
