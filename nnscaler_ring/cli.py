"""The command line: what a configuration costs, on paper, before anything is started; and which kernels run here.

``plan`` is `core.scaling.report` for every combination of the values given, as a table or as JSON, and a picture of a few of them.
Nothing is communicated and no tensor is made, so that 4,096 ranks are planned on a laptop.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from . import __version__, pictures, rows
from .core import layouts
from .core.kernels import KERNELS, Case, Kernel, choose
from .core.mask import Mask, build, check_cu_seqlens
from .core.plan import ALL_TO_ALL, TRANSPORTS
from .core.scaling import NETWORKS, PLANNED, SPEEDS, Shape

USUAL = ("nvlink", "400g", "100g")
"""Networks of a table where nobody says."""

DEVICES = ("cpu", "cuda", "xpu")
DTYPES = ("float32", "bfloat16", "float16", "float64")

ALL = "all"

EXAMPLES = """examples:
  nnscaler-ring plan --seq-len 1m --world-size 8,64,512 --network 400g
  nnscaler-ring plan --seq-len 128k --window 4k --sinks 4 --layout contiguous --transport ring halo
  nnscaler-ring plan --docs 32k,16k,8k,8k --layout all --transport ring all_to_all --network 400g
  nnscaler-ring plan --seq-per-rank 8k --world-size 64 --heads-per-team 8 --network 400g --json
  nnscaler-ring plan --seq-len 64 --world-size 4 --rank 1 --tiles
  nnscaler-ring plan --seq-len 64k --world-size 4 --transport ring --network nvlink --plot causal.png
  nnscaler-ring kernels --device cuda --head-dim 192 --head-dim-v 128
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; SystemExit with code 2 and one line on stderr where it is wrong; help where it is empty."""
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if options.run is None:
            parser.print_help(sys.stderr)
            return 2
        options.run(options)
        if sys.stdout is not None:  # closed by the shell: print says nothing
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except OSError as why:  # a full disk, a picture that cannot be written
        parser.error(str(why))
    return 0


# -- the options -----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors are one line; options are not abbreviated, so that new ones break no script."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Several(argparse.Action):
    """Values by commas or spaces, each once."""

    def __call__(self, parser: Any, space: Any, values: Any, option: str | None = None) -> None:
        setattr(space, self.dest, tuple(dict.fromkeys(value for group in values for value in group)))


class _Completion(argparse.Action):
    """Print the completion of a shell and exit."""

    def __call__(self, parser: Any, space: Any, values: Any, option: str | None = None) -> None:
        shtab = _library(parser, option or "", "shtab")
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for action in (action for command in commands.choices.values() for action in command._actions):
            action.choices = action.choices or getattr(action.type, "known", None)
            if action.metavar == "FILE":
                action.complete = shtab.FILE
        print(shtab.complete(parser, values), flush=True)
        parser.exit()


def _library(parser: argparse.ArgumentParser, option: str, name: str) -> Any:
    """An optional library, or an error that says how to install it."""
    try:
        return import_module(name)
    except ImportError as why:
        lacking = isinstance(why, ModuleNotFoundError) and why.name == name
        parser.error(f"{option} needs {name}" + (f": pip install {name}" if lacking else f", which does not load: {why}"))


@dataclass(frozen=True)
class _Name:
    """The type of an option that takes one of some names."""

    what: str
    known: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.known:
            raise argparse.ArgumentTypeError(f"unknown {self.what} {text!r}: choose one of {', '.join(self.known)}")
        return text


@dataclass(frozen=True)
class _Each:
    """The type of an option whose values may have commas between them."""

    of: Callable[[str], Any]

    @property
    def known(self) -> tuple[str, ...] | None:
        return self.of.known if isinstance(self.of, _Name) else None

    def __call__(self, text: str) -> list[Any]:
        if not (parts := [part for part in text.split(",") if part]):
            raise argparse.ArgumentTypeError(f"{text!r} says nothing")
        return [self.of(part) for part in parts]


MOST = 1 << 40
"""The largest number of an option."""

RANKS = 1 << 13
"""The most ranks: plans take memory for each rank and each piece of the row that ranks hold."""

LONGEST = 1 << 30
"""The most tokens of a row: a count of its pairs fits into an int64 on the way, too."""


def _count(text: str, least: int = 0, allowed: str = "at least 0") -> int:
    """A number of at least `least`, where k is 1024 and m 1024 k."""
    found = re.fullmatch(r"(-?\d+)([km]?)", text.strip().lower().replace("_", ""))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: write it as 65536, 64k or 1m")
    number = int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2]]
    if number > MOST:
        raise argparse.ArgumentTypeError(f"{text} is too large: at most {MOST:,}")
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is too few: give {allowed}")
    return number


def _some(text: str) -> int:
    """A number of at least 1, as `_count`."""
    return _count(text, 1, "at least 1")


def _ranks(text: str) -> int:
    """A number of ranks, as `_some`, that is planned in reasonable time and memory."""
    if (number := _some(text)) > RANKS:
        raise argparse.ArgumentTypeError(f"{text} ranks are too many: at most {RANKS:,}")
    return number


def _side(text: str) -> int:
    """A side of a window."""
    return _count(text, -1, "tokens, 0 or more, or -1 for no limit")


def _several(
    group: argparse._ArgumentGroup | argparse.ArgumentParser, *flags: str, of: Callable[[str], Any], **options: Any
) -> None:
    group.add_argument(*flags, type=_Each(of), nargs="+", action=_Several, **options)


def _parser() -> _Parser:
    parser = _Parser(prog="nnscaler-ring", description="Context-parallel attention on paper.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"nnscaler-ring {__version__}")
    shells = ("bash", "zsh", "tcsh")
    parser.add_argument("--print-completion", choices=shells, action=_Completion, help="print a shell's completion (needs shtab)")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    about = "Count and model configurations: all combinations of the values of options marked with *, by spaces or commas."
    added = commands.add_parser(
        "plan", help="balance, bytes, calls and modelled time of configurations", description=about, epilog=EXAMPLES
    )
    added.set_defaults(run=_plan, parser=added)
    _add_mask(added.add_argument_group("mask"))
    _add_configuration(added.add_argument_group("configuration"))
    _add_shape(added.add_argument_group("layer and machine"))
    _add_output(added.add_argument_group("output"))
    about = "Which attention kernels can run here, and what each lacks."
    added = commands.add_parser("kernels", help="the attention kernels that can run here", description=about)
    added.set_defaults(run=_kernels, parser=added)
    _add_kernels(added)
    return parser


def _add_mask(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--mask", choices=("causal", "full"), default="causal", help="default: causal")
    sides = "how far before and after itself a token sees; -1: no limit, the default of RIGHT where the mask is full"
    add("--window", type=_side, nargs="+", metavar="TOKENS", default=(), help=f"LEFT [RIGHT]: {sides}")
    add("--sinks", type=_count, default=0, metavar="N", help="first tokens, of each document, seen from beyond the window")
    add("--prefix", type=_count, default=0, metavar="N", help="first tokens, of each document, seen by earlier ones")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--seq-len", type=_some, metavar="N", help="tokens: 65536, 64k, 1m; documents say it themselves")
    length.add_argument("--seq-per-rank", type=_some, metavar="N", help="tokens a rank")
    documents = group.add_mutually_exclusive_group()
    documents.add_argument("--docs", type=_Each(_count), metavar="N,N,...", help="lengths of packed documents")
    documents.add_argument("--lengths", metavar="FILE", help="the same, in a file of JSON or of plain numbers; - for stdin")
    documents.add_argument("--cu-seqlens", metavar="FILE", help="their boundaries 0 ... N, in such a file")


def _add_configuration(group: argparse._ArgumentGroup) -> None:
    _several(group, "--world-size", of=_ranks, default=(8,), metavar="N", help="* ranks (default: 8)")
    known = ", ".join(layouts.LAYOUTS)
    of: Callable[[str], Any] = _Name("layout", (*layouts.LAYOUTS, ALL))
    told = f"* {known}, or all (default: zigzag, of documents balanced)"
    _several(group, "--layout", of=of, metavar="NAME", help=told)
    of = _Name("transport", ("auto", *TRANSPORTS, ALL_TO_ALL, ALL))
    told = f"* auto (default), {', '.join(TRANSPORTS)}, {ALL_TO_ALL}, or all of them but auto"
    _several(group, "--transport", of=of, metavar="NAME", default=("auto",), help=told)
    told = "* neighbouring ranks that exchange tokens for heads; the transport is that between teams (default: 1)"
    _several(group, "--heads-per-team", "--inner", of=_some, metavar="N", default=(1,), dest="inner", help=told)
    told = f"* {', '.join(NETWORKS)} (default: {', '.join(USUAL)}); pictures take the first"
    _several(group, "--network", of=_Name("network", tuple(NETWORKS)), metavar="NAME", default=USUAL, help=told)


def _add_shape(group: argparse._ArgumentGroup) -> None:
    for flag, default, told in (
        ("--heads", 32, "query heads"),
        ("--heads-k", 8, "key heads"),
        ("--head-dim", 128, "of queries and keys"),
        ("--head-dim-v", None, "of values"),
        ("--batch", 1, "batch rows"),
        ("--dtype-bytes", 2, "bytes of an element"),
        ("--gradient-bytes", 4, "bytes of an element of a sum of gradients that travels; what one call gives has --dtype-bytes"),
    ):
        shown = default or "--head-dim"
        group.add_argument(flag, type=_some, default=default, metavar="N", help=f"{told} (default: {shown})")
    told, of = f"{', '.join(SPEEDS)} (default: fa2-h100)", _Name("speed", tuple(SPEEDS))
    group.add_argument("--speed", type=of, default="fa2-h100", metavar="NAME", help=told)


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rank", type=_count, metavar="R", help="print this rank's plan, and draw its timeline")
    group.add_argument("--tiles", action="store_true", help=f"show the balance of 128 x 128 tiles too, up to {PLANNED} ranks")
    group.add_argument("--json", action="store_true", help="print JSON: bytes, and seconds")
    kinds = ", ".join(pictures.SUFFIXES)
    told = f"draw up to {pictures.MOST} configurations ({kinds}; needs matplotlib)"
    group.add_argument("--plot", type=Path, metavar="FILE", help=told)
    told, of = f"what to draw: {', '.join(pictures.PANELS)} (default: all)", _Name("panel", pictures.PANELS)
    _several(group, "--panels", of=of, metavar="NAME", help=told)


def _add_kernels(added: argparse.ArgumentParser) -> None:
    told = f"{', '.join(DEVICES)} (default: all)"
    _several(added, "--device", of=_Name("device", DEVICES), default=DEVICES, metavar="NAME", help=told)
    told = f"{', '.join(DTYPES)} (default: all)"
    _several(added, "--dtype", of=_Name("dtype", DTYPES), default=DTYPES, metavar="NAME", help=told)
    for flag, default in (("--head-dim", 128), ("--head-dim-v", None), ("--heads", 32), ("--heads-k", 8)):
        added.add_argument(flag, type=_some, default=default, metavar="N", help=f"default: {default or '--head-dim'}")
    added.add_argument("--deterministic", action="store_true", help="the same bits each time")
    added.add_argument("--json", action="store_true", help="print JSON")


# -- plan ------------------------------------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> None:
    try:
        options.cu = _documents(options)
        masks = {world: _mask(options, world) for world in options.world_size}
        shape = _shape(options)
        _check(options)
    except (ValueError, OSError) as wrong:
        options.parser.error(str(wrong))
    made = list(_rows(options, masks, shape))
    if options.plot:
        try:
            columns = [row.column(options.rank) for row in made if row.network == options.network[0]]
            pictures.save(options.plot, columns, options.panels or pictures.PANELS)
        except OSError as wrong:
            options.parser.error(f"--plot: {wrong}")
    if options.json:
        shown = [row.as_dict() for row in made]
        for n, row in enumerate(made):
            shown[n] |= {"plan": rows.plan_dict(row.plan(options.rank))} if options.rank is not None else {}
        asked = {"mask": _words(options), "documents": 0 if options.cu is None else len(options.cu) - 1, "shape": asdict(shape)}
        print(json.dumps({"version": __version__, **asked, "rows": shown}, indent=2))
        return
    print(f"{_words(options)}\n{_machine(options, shape)}\n")
    print(rows.table(made, tiles=options.tiles))
    distinct = {row.key: row for row in made}
    for row in distinct.values() if options.rank is not None else ():
        print(f"\n{row.title}\n{row.plan(options.rank)}")


def _rows(options: argparse.Namespace, masks: Mapping[int, Mask], shape: Shape) -> Iterator[rows.Row]:
    """All combinations; a progress bar on a terminal where they take more than a second."""
    ways = _ways(options)
    total = len(masks) * len(options.layout) * len(ways) * len(options.network)
    try:
        bar: Any = import_module("tqdm").tqdm(total=total, delay=1, leave=False, disable=None, file=sys.stderr)
    except ImportError:
        bar = nullcontext()
    with bar as shown:
        for (world, mask), layout in product(masks.items(), options.layout):
            held = layouts.build(layout, mask.q_len, world, options.cu)
            for (inner, way), network in product(ways, options.network):
                names = {"layout": layout, "transport": way, "network": network, "speed": options.speed}
                yield rows.measure(mask, held, shape, inner=inner, **names)
                if shown is not None:
                    shown.update()


def _documents(options: argparse.Namespace) -> np.ndarray | None:
    """The boundaries of packed documents, or None."""
    if options.cu_seqlens is not None:
        return check_cu_seqlens(f"{options.cu_seqlens}:", np.array(_numbers(options.cu_seqlens), dtype=np.int64), None)
    lengths = _numbers(options.lengths) if options.lengths is not None else options.docs
    if lengths is None:
        return None
    if min(lengths, default=0) < 0:
        raise ValueError(f"a document of {min(lengths)} tokens: lengths are at least 0")
    return np.cumsum([0, *lengths])


def _numbers(name: str) -> list[int]:
    """Whole numbers of a file: a JSON list, or between spaces, lines or commas."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
        text = text.removeprefix("\ufeff")
        numbers = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.replace(",", " ").split()]
    except (ValueError, RecursionError):  # of what is no text, too
        numbers = [None]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{name}: not a list of whole numbers, as [3, 5] or 3 5")
    if not numbers or max(map(abs, numbers)) > LONGEST:
        raise ValueError(f"{name}: {f'a number above {LONGEST:,}' if numbers else 'no numbers'} in it")
    return numbers


def _mask(options: argparse.Namespace, world: int) -> Mask:
    """The mask of a world; ValueError for what does not fit together, rather than an option that changes nothing."""
    length = options.seq_per_rank * world if options.seq_per_rank else options.seq_len
    if options.cu is not None:
        total = int(options.cu[-1])
        if length not in (None, total):
            flag = "--seq-per-rank" if options.seq_per_rank else "--seq-len"
            raise ValueError(f"the documents have {total:,} tokens together, {flag} says {length:,}: leave it out, or fill the row")
        length = total
    if length is not None and length > LONGEST:
        raise ValueError(f"{length:,} tokens in all are too many: at most {LONGEST:,} ({pictures.tokens(LONGEST)})")
    if not length:
        raise ValueError("no tokens: give --seq-len, --seq-per-rank, or documents by --docs, --lengths or --cu-seqlens")
    causal, window = options.mask == "causal", options.window
    left, right = (*window, *(-1, 0 if causal else -1)[len(window) :])[:2]
    if len(window) > 2:
        raise ValueError(f"--window takes LEFT and RIGHT, got {len(window)} numbers")
    if causal and right:
        raise ValueError("--window: a causal mask has no RIGHT: leave it out, or give --mask full")
    if options.sinks and left < 0:
        raise ValueError("--sinks are seen from beyond a window: give --window LEFT")
    if options.prefix and right < 0:
        raise ValueError("--prefix is of a causal mask, or of --window LEFT RIGHT: without a limit every token sees it")
    longest = length if options.cu is None else int(np.diff(options.cu).max())
    if options.prefix > longest:
        what = "the sequence" if options.cu is None else "the longest document"
        raise ValueError(f"--prefix {options.prefix:,}: {what} has {longest:,} tokens")
    return build(length, causal=causal, window=(left, right), sinks=options.sinks, prefix=options.prefix, cu_seqlens_q=options.cu)


def _shape(options: argparse.Namespace) -> Shape:
    if options.heads % options.heads_k:
        raise ValueError(f"--heads {options.heads} is no multiple of --heads-k {options.heads_k}: each key head serves as many")
    heads = {"heads": options.heads, "heads_k": options.heads_k, "batch": options.batch}
    bytes_ = {"element": options.dtype_bytes, "gradient": options.gradient_bytes}
    return Shape(**heads, **bytes_, dim=options.head_dim, dim_v=options.head_dim_v or options.head_dim)


def _check(options: argparse.Namespace) -> None:
    """ValueError for a configuration that is none; fills in the layouts and transports that are meant."""
    packed = options.cu is not None
    names = options.layout or ("balanced" if packed else "zigzag",)
    if ALL in names:
        names = tuple(name for name in layouts.LAYOUTS if packed or not layouts.needs_documents(name))
    if not packed and any(map(layouts.needs_documents, names)):
        raise ValueError(f"layout {next(filter(layouts.needs_documents, names))!r} cuts each document: give --docs or a file")
    options.layout = names
    if ALL in options.transport:
        options.transport = (*TRANSPORTS, ALL_TO_ALL)
    if options.transport == (ALL_TO_ALL,) and options.inner != (1,):
        raise ValueError("all_to_all exchanges heads among all ranks: leave out --heads-per-team, or give another transport")
    for world, inner in product(options.world_size, options.inner):
        if world % inner:
            raise ValueError(f"--heads-per-team {inner} does not divide --world-size {world}")
    if options.rank is not None and options.rank >= min(options.world_size):
        raise ValueError(
            f"--rank {options.rank}: ranks of --world-size {min(options.world_size)} are 0 to {min(options.world_size) - 1}"
        )
    if options.tiles and max(options.world_size) > PLANNED:
        raise ValueError(f"--tiles looks at every rank: at most {PLANNED}, not {max(options.world_size)}")
    if options.panels and not options.plot:
        raise ValueError("--panels are of a picture: give --plot FILE")
    if options.plot:
        _check_plot(options)


def _check_plot(options: argparse.Namespace) -> None:
    if options.plot.suffix not in pictures.SUFFIXES:
        raise ValueError(f"--plot {options.plot}: end the name with {', '.join(pictures.SUFFIXES)}")
    if not options.plot.parent.is_dir():
        raise ValueError(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    count = len(options.world_size) * len(options.layout) * len(_ways(options))
    if count > pictures.MOST:
        raise ValueError(f"--plot draws up to {pictures.MOST} configurations, not {count}")
    _library(options.parser, "--plot", "matplotlib")


def _ways(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Team sizes and transports; all_to_all is a team of all ranks, whatever the sizes of others."""
    pairs = product(options.inner, options.transport)
    return [(inner, way) for inner, way in pairs if way != ALL_TO_ALL or inner == options.inner[0]]


def _words(options: argparse.Namespace) -> str:
    """The mask in words."""
    parts, sides = [options.mask], [("no limit" if side < 0 else pictures.tokens(side)) for side in options.window]
    parts += [f"window {sides[0]} before" + (f" and {sides[1]} after" if sides[1:] else "")] if sides else []
    parts += [f"{options.sinks} sinks"] if options.sinks else []
    parts += [f"prefix {options.prefix}"] if options.prefix else []
    if options.cu is not None:
        lengths = np.diff(options.cu)
        parts.append(
            f"{len(lengths):,} documents of {lengths.min():,} to {lengths.max():,} tokens, {pictures.tokens(options.cu[-1])} in all"
        )
    else:
        length = options.seq_per_rank or options.seq_len
        parts.append(f"{pictures.tokens(length)} tokens" + " a rank" * bool(options.seq_per_rank))
    return ", ".join(parts)


def _machine(options: argparse.Namespace, shape: Shape) -> str:
    dims = f"{shape.dim}" if shape.dim == shape.dim_v else f"{shape.dim} and {shape.dim_v}"
    batch = f"{shape.batch} batch rows, " if shape.batch > 1 else ""
    elements = f"{shape.element} bytes an element, {shape.gradient} of a sum of gradients"
    return f"{batch}{shape.heads} heads, {shape.heads_k} key heads of {dims}, {elements}; {SPEEDS[options.speed].name}"


# -- kernels ---------------------------------------------------------------------------------------------------------------------


def _kernels(options: argparse.Namespace) -> None:
    if options.heads % options.heads_k:
        options.parser.error(f"--heads {options.heads} is no multiple of --heads-k {options.heads_k}")
    made = [_verdict(options, device, dtype, name) for device, dtype, name in product(options.device, options.dtype, KERNELS)]
    chosen = {device: {dtype: _auto(options, device, dtype) for dtype in options.dtype} for device in options.device}
    if options.json:
        print(json.dumps({"version": __version__, "torch": torch.__version__, "kernels": made, "auto": chosen}, indent=2))
        return
    dims = options.head_dim, options.head_dim_v or options.head_dim
    print(f"torch {torch.__version__}; {options.heads} heads, {options.heads_k} key heads, head dims {dims[0]} and {dims[1]}\n")
    notes = dict[str, int]()
    lines = [("device", "kernel", *options.dtype)]
    for device in options.device:
        lines.append((device, "auto", *(picked or "-" for picked in chosen[device].values())))
        for name in KERNELS:
            cells = [each for each in made if (each["device"], each["kernel"]) == (device, name)]
            for row, whys in _rows_of(name, cells).items():
                marks = [f"no ({notes.setdefault(why, len(notes) + 1)})" if why else "yes" for why in whys]
                lines.append((device, row, *marks))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print("\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines))
    print("".join(f"\n({number}) {why}" for why, number in notes.items()))


def _rows_of(name: str, cells: Sequence[dict[str, Any]]) -> dict[str, list[str | None]]:
    """A kernel's rows of the table, and what each lacks by dtype: one, or one for each version of its library."""
    if "versions" not in cells[0]:
        return {name: [each["why_not"] for each in cells]}
    return {f"{name} ({version})": [each["versions"][version] for each in cells] for version in cells[0]["versions"]}


def _case(options: argparse.Namespace, device: str, dtype: str) -> Case:
    dims = (options.head_dim, options.head_dim_v or options.head_dim)
    return Case(device, getattr(torch, dtype), *dims, options.heads, options.heads_k, options.deterministic)


def _auto(options: argparse.Namespace, device: str, dtype: str) -> str | None:
    """What ``auto`` picks, or None where the device is not there."""
    if _missing(device):
        return None
    kernel = choose("auto", _case(options, device, dtype))
    return kernel.label or kernel.name


def _verdict(options: argparse.Namespace, device: str, dtype: str, name: str) -> dict[str, Any]:
    """Whether the backends called `name` can, or what each for this device lacks."""
    case = _case(options, device, dtype)
    said = [(kernel.label, _missing(device) or _lacks(kernel, case)) for kernel in KERNELS[name]]
    lacking = list(dict.fromkeys(why for _, why in said))
    here = [why for why in lacking if not why.endswith(f"the tensors are on {device}")]
    usable = "" in lacking
    made = {
        "device": device,
        "dtype": dtype,
        "kernel": name,
        "usable": usable,
        "why_not": None if usable else "; ".join(here or lacking),
    }
    versions = {label: why or None for label, why in said if label}
    return {**made, "versions": versions} if versions else made


def _lacks(kernel: Kernel, case: Case) -> str:
    """What it lacks, or nothing."""
    try:
        kernel.check(case)
    except (NotImplementedError, ImportError, RuntimeError) as why:
        return str(why)
    return ""


def _missing(device: str) -> str:
    """Why there is no such device here; empty where there is one."""
    if device == "cpu" or getattr(torch, device).is_available():
        return ""
    built = getattr(torch.version, device, None) or (device == "cuda" and torch.version.hip)
    return f"no {device} device is to be seen" if built else f"torch {torch.__version__} is built without {device}"
