"""ring-flash-attention, as published, and nnscaler's own ring attention beside this package, on processes, over one kernel.

Both are written for flash-attn; here `flash_attn` stands in for it, so that every library runs the kernel of this package. The same
call is made of each library where both have it, on the shards that it asks for. Processes run one thread each, and ways take turns.

Efficiency is the CPU seconds of one process that calls the kernel for the whole sequence, over the ranks, over those of the slowest
rank; `besides` are CPU seconds outside of kernels over those inside, all ranks together: copies, merges, messages, Python. What the
stand-in does around a kernel call is not counted. Errors are root mean squares against float64, each over that of a single call
of the kernel for the whole sequence: 1 is as exact as one device.

Legend: `P` ranks, `S` tokens, `B` batch, `Hq`/`Hk` heads, `D` head dim.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import nnscaler_ring
from benchmarks import flash_attn, packings
from benchmarks.clock import Pass
from benchmarks.problem import dense
from benchmarks.report import markdown
from nnscaler_ring.core import layouts, mask
from nnscaler_ring.core.call import Options, Rows, attend, group_name
from nnscaler_ring.core.kernels import Kernel, Scores
from nnscaler_ring.core.plan import plan
from nnscaler_ring.core.recipe import Recipe

OURS, PEER, NNSCALER = "nnscaler_ring", "ring_flash_attn", "nnscaler"
SECONDS = 120
"""For one case of errors, where a library may wait for a rank that has failed."""


class Way(NamedTuple):
    """A package, what is called of it (a function, or a layout of this package), and where its shards lie."""

    package: str
    call: str
    layout: str


@dataclass(frozen=True)
class Case:
    """What is asked of the ways; `packed` rows are the packed mix, `even` ones with lengths that divide by 2P."""

    name: str
    ways: tuple[Way, ...]
    tokens: int = 8192
    ranks: int = 4
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    packed: str = ""
    dtype: str = "bfloat16"
    heads: tuple[int, int, int, int] = (4, 2, 64, 64)
    """Hq, Hk, D and Dv."""
    scale: float = 1.0
    """Factor of the scores, besides ``D ** -0.5``."""

    @property
    def boundaries(self) -> list[int]:
        """Of the documents."""
        if not self.packed:
            return [0, self.tokens]
        unit = 2 * self.ranks if self.packed == "even" else 1
        found = [0]
        for length in packings.lengths(self.tokens, 0):
            found.append(min(found[-1] + -(-length // unit) * unit, self.tokens))
        return sorted(set(found))

    def seen(self, **more: Any) -> mask.Mask:
        return mask.build(self.tokens, causal=self.causal, window=self.window, cu_seqlens_q=self.boundaries, **more)


def both(call: str, layout: str) -> tuple[Way, ...]:
    return Way(PEER, call, layout), Way(OURS, call, layout)


ZIGZAG = both("zigzag_ring_flash_attn_func", "zigzag")
LLAMA3 = both("llama3_flash_attn_varlen_func", "contiguous")
NATURAL = (
    Way(NNSCALER, "zigzag_attn_implementation.zigzag_ring_flash_attn_func", "contiguous"),
    Way(OURS, "wrap_zigzag_attn_func", "contiguous"),
)
BALANCED = Way(OURS, "balanced", "balanced")

TIMED = (
    Case("causal, zigzag", ZIGZAG),
    Case("causal, contiguous", both("ring_flash_attn_func", "contiguous")),
    Case("causal, stripe", both("stripe_flash_attn_func", "stripe")),
    Case("full, contiguous", both("ring_flash_attn_func", "contiguous"), causal=False),
    Case("packed mix", (*LLAMA3, BALANCED), packed="mix"),
    Case(
        "packed mix, lengths divide by 2P",
        (*both("zigzag_ring_flash_attn_varlen_func", "zigzag-per-document"), BALANCED),
        packed="even",
    ),
    Case("causal, tokens in natural order", NATURAL),
)

EXACT = (
    Case("causal, zigzag, bf16", ZIGZAG, 1024),
    Case("causal, zigzag, fp32", ZIGZAG, 1024, dtype="float32"),
    Case("window of 100, contiguous", both("ring_flash_attn_func", "contiguous"), 1024, window=(100, 0)),
    Case("window of 100, zigzag", ZIGZAG, 1024, window=(100, 0)),
    Case("packed mix, causal", LLAMA3, 1024, packed="mix"),
    Case("packed mix, window of 50 both ways", LLAMA3, 1024, causal=False, window=(50, 50), packed="mix"),
    Case("packed mix, causal, D of values 32", LLAMA3, 1024, packed="mix", heads=(4, 2, 64, 32)),
    Case("causal, natural order, bf16", NATURAL, 1024),
    Case("causal, natural order, scores x 60", NATURAL, 1024, scale=60.0),
)


def table(repeats: int) -> str:
    """Measure every case and return the tables."""
    packed = next(case for case in TIMED if case.packed)
    hq, hk, dim, _ = packed.heads
    sizes = (
        f"{packed.ranks} ranks of one thread, S = {packed.tokens:,}, Hq/Hk/D = {hq}/{hk}/{dim}, bf16, forward + backward, medians"
    )
    mix = f"the packed mix has {len(packed.boundaries) - 1} documents. Sent is what the rank with most sends. {_versions()}"
    times = markdown(("attention", "library", "call", "efficiency", "besides", "sent MB"), rows(TIMED, repeats))
    errors = markdown(("attention", "library", "call", "out", "dq", "dk", "dv"), rows(EXACT, 0))
    below = f"Errors over those of a single call, S = {EXACT[0].tokens:,}, bf16 where it does not say fp32:"
    return f"## Beside other libraries\n\n{sizes};\n{mix}\n\n{times}\n\n{below}\n\n{errors}"


def _versions() -> str:
    here = [name for name in ("ring-flash-attn", NNSCALER) if find_spec(name.replace("-", "_"))]
    return ", ".join(f"{name} {version(name)}" for name in here) + "."


# -- tables ----------------------------------------------------------------------------------------------------------------------


def rows(cases: Iterable[Case], repeats: int) -> Iterator[Sequence[str]]:
    """A row for each way of each case: times and bytes; errors for no repeats."""
    for case in cases:
        here = [way for way in case.ways if find_spec(way.package)]
        figures = times(case, here, repeats) if repeats else [errors(case, way) for way in here]
        found = dict(zip(here, figures, strict=True))
        for way in case.ways:
            yield case.name, way.package, f"`{way.call.rpartition('.')[2]}`", *_filled(found.get(way, ["not installed"]), repeats)


def _filled(cells: Sequence[str], repeats: int) -> Sequence[str]:
    """Where there are no figures a reason stands, and nothing beside it."""
    return [*cells, *[""] * ((3 if repeats else 4) - len(cells))]


def times(case: Case, ways: Sequence[Way], repeats: int) -> Iterator[Sequence[str]]:
    """Efficiency, seconds besides kernels and megabytes of each way."""
    found = on_ranks(case, ways, repeats)
    dense = median(found[0]["dense"])
    for at in range(len(ways)):
        slowest = median(max(each) for each in zip(*(rank["seconds"][at] for rank in found), strict=True))
        inside, outside = (sum(median(rank[what][at]) for rank in found) for what in ("inside", "outside"))
        most = max(rank["sent"][at] for rank in found)
        yield f"{dense / case.ranks / slowest:.1%}", f"{outside / inside:.1%}", f"{most / 1e6:.1f}"


def errors(case: Case, way: Way) -> Sequence[str]:
    """Of out, dq, dk and dv, over those of a single call."""
    given = inputs(case)
    right, single = exact(case, given), single_call(case, given)
    try:
        found = on_ranks(case, [way])
    except RuntimeError as error:
        return [f"fails: {error}"[:160].replace("|", "/")]
    at = torch.cat([positions(case, way, rank) for rank in range(case.ranks)])
    got = [torch.cat(list(parts), 1)[:, at.argsort()] for parts in zip(*(rank["results"] for rank in found), strict=True)]
    ratios = [rms(g - w) / rms(s - w) for g, s, w in zip(got, single, right, strict=True)]
    return [f"{ratio:.2f}" if ratio < 2 else f"**{ratio:,.0f}**" for ratio in ratios]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# -- the right answer ------------------------------------------------------------------------------------------------------------


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of out, whole."""
    heads, heads_k, dim, dim_v = case.heads
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, dim), (heads_k, dim), (heads_k, dim_v), (heads, dim_v))
    return [torch.randn(1, case.tokens, *size, generator=generator).to(getattr(torch, case.dtype)) for size in sizes]


def exact(case: Case, given: Sequence[Tensor]) -> list[Tensor]:
    """out, dq, dk and dv in float64."""
    q, k, v, d_out = (x.double().transpose(1, 2) for x in given)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    hidden = ~torch.from_numpy(case.seen().as_array())
    keys, values = (x.repeat_interleave(case.heads[0] // case.heads[1], 1) for x in (k, v))
    weights = (q @ keys.transpose(2, 3) * scale_of(case)).masked_fill(hidden, -torch.inf).softmax(-1)
    out = weights @ values
    return [x.detach().transpose(1, 2) for x in (out, *torch.autograd.grad(out, leaves, d_out))]


def alone(case: Case, given: Sequence[Tensor]) -> Pass:
    """One device: the kernel's own calls for the whole sequence."""
    whole = layouts.build("contiguous", case.tokens, 1)
    one = plan(case.seen(), whole, whole, "auto", 0)
    return dense(flash_attn.kernel_of(*given[:3]), one, given, Scores(scale=scale_of(case)))


def single_call(case: Case, given: Sequence[Tensor]) -> list[Tensor]:
    """out, dq, dk and dv of one device, rounded to the dtype of the inputs."""
    run = alone(case, given)
    out, _, *sums = run.backward(run.forward())
    return [x.to(out.dtype) for x in (out, *sums)]


def scale_of(case: Case) -> float:
    return case.scale * float(case.heads[2] ** -0.5)


# -- on ranks --------------------------------------------------------------------------------------------------------------------


def on_ranks(case: Case, ways: Sequence[Way], repeats: int = 0) -> list[dict[str, Any]]:
    """What every rank found: seconds and bytes of each way; for no repeats the results of the last one."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (case, ways, repeats, folder), nprocs=case.ranks)  # type: ignore[no-untyped-call]
        found: list[dict[str, Any]] = [torch.load(f"{folder}/{rank}") for rank in range(case.ranks)]
    if failed := sorted(rank["failed"] for rank in found if "failed" in rank):
        raise RuntimeError(failed[0][1])  # the first one's reason; others then fail because it is gone
    return found


def _rank(rank: int, case: Case, ways: Sequence[Way], repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    about = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": case.ranks}
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS), **about)
    given, found = inputs(case), dict[str, Any]()
    try:
        with libraries():
            made = [on_shards(case, way, rank, given) for way in ways]
            for each in made:
                found["results"] = each.backward(each.forward())  # plans, and what is set up once
            if repeats:
                found = measured(case, given, made, repeats)
    except Exception as error:
        found["failed"] = time.time(), f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def positions(case: Case, way: Way, rank: int) -> Tensor:
    """Of the rows that a rank holds."""
    cu = case.boundaries if case.packed else None
    return torch.from_numpy(layouts.build(way.layout, case.tokens, case.ranks, cu).positions(rank))


def on_shards(case: Case, way: Way, rank: int, given: Sequence[Tensor]) -> Pass:
    """A way on a rank's shards; its backward pass gives out, dq, dk and dv."""
    *qkv, d_out = (x.index_select(1, positions(case, way, rank)) for x in given)
    leaves = [x.requires_grad_() for x in qkv]
    attention = attention_of(case, way, rank)
    return Pass(lambda: attention(*leaves), lambda out: [out.detach(), *torch.autograd.grad(out, leaves, d_out)])


def attention_of(case: Case, way: Way, rank: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What a way calls, on ``[B, L, H, D]``."""
    cu = torch.tensor(case.boundaries, dtype=torch.int32)
    named: dict[str, Any] = {"causal": case.causal, "window_size": case.window, "softmax_scale": scale_of(case)}
    if way.package == OURS and way.call in layouts.LAYOUTS:
        recipe, options = Recipe(group=group_name(None), layout=way.layout, transport="auto"), Options(**named)
        rows = Rows(seq_len=case.tokens, cu_seqlens_q=cu)
        return lambda q, k, v: attend(q, k, v, recipe, options, rows)  # type: ignore[return-value]
    module: Any = module_of(way)
    func = getattr(module, way.call.rpartition(".")[2])
    if way.call.startswith("wrap_"):
        return lambda q, k, v: func(q, k, v, process_group=dist.group.WORLD, **named)
    if "varlen" not in way.call:
        return lambda q, k, v: func(q, k, v, group=dist.group.WORLD, **named)
    shard = cu // case.ranks
    places: tuple[Any, ...] = (shard, max(b - a for a, b in pairwise(shard.tolist())))
    if way.call.startswith("llama3"):
        prepared = module.llama3_flash_attn_prepare_cu_seqlens(cu, case.causal, rank, case.ranks)
        places = (*prepared[:4], 1, prepared[4])
    return lambda q, k, v: func(*(x.squeeze(0) for x in (q, k, v)), *places, group=dist.group.WORLD, **named).unsqueeze(0)


@contextmanager
def libraries() -> Iterator[None]:
    """The other libraries can be imported and run here: over the stand-in, without adapters of transformers and Triton kernels for
    GPUs, and with buffers where the tensors are."""
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    absent = {"ring_flash_attn.adapters": adapters, "ring_flash_attn.triton_utils": None}
    with ExitStack() as stack:
        stack.enter_context(flash_attn.installed())
        stack.enter_context(mock.patch.dict(sys.modules, absent))
        stack.enter_context(mock.patch("torch.cuda.current_device", lambda: "cpu"))
        yield


def module_of(way: Way) -> ModuleType:
    if way.package == NNSCALER:
        return importlib.import_module(f"nnscaler.customized_ops.ring_attention.core.{way.call.rpartition('.')[0]}")
    return nnscaler_ring if way.package == OURS else importlib.import_module(way.package)


# -- what is measured ------------------------------------------------------------------------------------------------------------


def measured(case: Case, given: Sequence[Tensor], ways: Sequence[Pass], repeats: int) -> dict[str, Any]:
    """Interleaved CPU seconds of one device and of each way, and what the ways send and hold."""
    found: dict[str, Any] = {"dense": [], **{name: [[] for _ in ways] for name in ("seconds", "inside", "outside")}}
    kernel, one = flash_attn.kernel_of(*given[:3]), alone(case, given)
    one.backward(one.forward())
    for _ in range(repeats):
        dist.barrier()
        if dist.get_rank() == 0:
            start = time.process_time()
            one.backward(one.forward())
            found["dense"].append(time.process_time() - start)
        for at, way in enumerate(ways):
            dist.barrier()
            total, inside, around = seconds(way, kernel)
            found["seconds"][at].append(total - around)
            found["inside"][at].append(inside)
            found["outside"][at].append(total - around - inside)
    found["sent"] = [sent(way) for way in ways]
    return found


def seconds(way: Pass, kernel: Kernel) -> tuple[float, float, float]:
    """CPU seconds of a forward and a backward pass: of all, inside the kernel, and around it in the stand-in."""
    spent = {"kernel": 0.0, "stand-in": 0.0}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start = time.process_time()
            result = call(*args)
            spent[name] += time.process_time() - start
            return result

        return wrapper

    calls = {name: watched("kernel", getattr(kernel, name)) for name in ("forward", "backward")}
    stand_in = {name: watched("stand-in", getattr(flash_attn, name)) for name in ("_forward", "_backward")}
    with mock.patch.multiple(kernel, **calls), mock.patch.multiple(flash_attn, **stand_in):
        start = time.process_time()
        way.backward(way.forward())
        total = time.process_time() - start
    return total, spent["kernel"], max(0.0, spent["stand-in"] - spent["kernel"])


def sent(way: Pass) -> int:
    """Bytes that this rank gives to others, forward and backward."""
    bytes_sent = 0

    def counted(name: str, of: Callable[..., int]) -> Any:
        call = getattr(dist, name)

        def wrapper(*args: Any, **named: Any) -> Any:
            nonlocal bytes_sent
            bytes_sent += of(*args)
            return call(*args, **named)

        return mock.patch.object(dist, name, wrapper)

    with (
        counted("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
        counted("all_gather_into_tensor", lambda whole, part: whole.nbytes - part.nbytes),
        counted("reduce_scatter_tensor", lambda part, whole: whole.nbytes - part.nbytes),
    ):
        way.backward(way.forward())
    return bytes_sent
