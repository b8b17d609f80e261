"""What ranks move through memory besides their kernels, counted, and what that takes on paper beside the kernel's work.

The engine runs each rank's whole walk on tensors without memory (device ``meta``), with a kernel that computes nothing and takes
and gives rows as flash-attn does; all other operations are counted, as accelerators do them: what each reads and writes. Messages
do not count. Nothing is measured: shares are the bytes at a memory's speed over the FLOPs at a kernel's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import packings
from benchmarks.report import markdown
from nnscaler_ring.core import held, merge, passes, walk
from nnscaler_ring.core.held import AGAIN, MORE, Part, Place
from nnscaler_ring.core.intervals import covered
from nnscaler_ring.core.kernels import Case, Grad, Scores
from nnscaler_ring.core.kernels.base import Spans, Window
from nnscaler_ring.core.kernels.packed import Call, Packed, Read
from nnscaler_ring.core.merge import Results
from nnscaler_ring.core.passes import Extras, backward, forward, job_of
from nnscaler_ring.core.recipe import Recipe
from nnscaler_ring.core.scaling import SPEEDS, Shape
from nnscaler_ring.core.transport import PretendTransport

RANKS, A_RANK, HEADS, HEADS_K, DIM = 8, 8192, 32, 8, 128
SPEED, MEMORY = SPEEDS["fa4-h200"], 4.0e12
"""A fast kernel, and bytes/s of a memory that is sold for 4.8e12."""

MASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"causal": {"causal": True}, "full": {}, "window 1,024": {"causal": True, "window": (1024, 0)}, "packed mix": {"causal": True}}
)
WAYS = (
    *(("causal", "zigzag", transport, False) for transport in ("auto", "ring", "grouped_ring", "all_gather")),
    *(("full", "contiguous", transport, False) for transport in ("ring", "all_gather")),
    *(("window 1,024", "contiguous", transport, False) for transport in ("auto", "all_gather")),
    *(("packed mix", "balanced", transport, False) for transport in ("auto", "all_gather")),
    ("packed mix", "zigzag-per-document", "ring", False),
    ("causal", "zigzag", "auto", True),
    ("window 1,024", "contiguous", "auto", True),
    ("packed mix", "balanced", "auto", True),
)
"""Mask, layout, transport, and whether the kernel puts together in place."""


class Nothing(Packed):
    """A library that takes rows end to end, and computes nothing."""

    name = "nothing"

    def check_sizes(self, case: Case) -> None:
        return None

    def attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(heads_first, dtype=torch.float32)

    def gradients(self, call: Call, read: Read) -> Sequence[Tensor]:
        return [torch.empty_like(x) for x in (read.q, read.k, read.v)]


class InPlace(Nothing):
    """A kernel that computes nothing, and puts together in place what rows have, as Triton's does.

    Beyond the result, which any kernel stores, it reads what rows had, in fp32, and stores in fp32 what is not the last.
    """

    rounds = False

    def __init__(self, moved: Moved) -> None:
        self._moved = moved

    def merge(self, results: Results, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        place = results.place(covered(spans[:, :2]))
        self._move(place)
        self._move(place._replace(end=results.lse, total=results.lse))

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        for total, side in ((grad.dq, 0), (grad.dk, 2), (grad.dv, 2)):
            self._move(total.place(covered(spans[:, side : side + 2])))

    def _move(self, place: Place) -> None:
        for lo, hi, state in place.rows.tolist() if place.total is not None else ():
            read, stored = size(place.total[:, lo:hi]), size(place.end[:, lo:hi])
            self._moved.bytes += read * bool(state & AGAIN) + (read - stored) * bool(state & MORE)


def size(*tensors: Tensor) -> int:
    """Bytes; what stands for many is read once."""
    return sum(x.element_size() * int(np.prod([n for n, step in zip(x.shape, x.stride(), strict=True) if step])) for x in tensors)


def named(table: Tensor | None, column: int, *tensors: Tensor) -> int:
    """Bytes of the rows of tensors that a column of a table names; without a table of all."""
    rows = None if table is None else int((table.numpy()[:, column] >= 0).sum())
    return size(*tensors) if rows is None else sum(size(x) // max(x.shape[1], 1) * rows for x in tensors)


def _table(table: Tensor | None) -> int:
    """Bytes of a table, written once and read once."""
    return 0 if table is None else 2 * table.nbytes


class Moved(TorchDispatchMode):
    """Counts the operations that touch memory, each a launch, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def _add(self, bytes_: int) -> None:
        self.bytes += bytes_
        self.launches += bytes_ > 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, returned = func._schema.name.removeprefix("aten::"), func._schema.returns
        made = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]
        given = [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg]) if isinstance(x, Tensor)]
        if name.startswith(("empty", "new_empty")) or any(x.alias_info and not x.alias_info.is_write for x in returned):
            return result  # no memory is touched
        if name in ("index_select", "index_add_", "index_copy_"):
            rows = made[0] if name == "index_select" else args[3]
            self._add(size(rows) * (3 if name == "index_add_" else 2))
        elif name in ("copy_", "zero_", "fill_"):
            self._add(size(*given))
        elif name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"):
            self._add(size(*made))
        else:
            self._add(size(*given, *made))
        return result

    @contextmanager
    def like_an_accelerator(self, in_place: bool) -> Iterator[None]:
        """The engine with a kernel that computes nothing, and merges and sums counted as one kernel each."""

        def merge_(
            out: Tensor, lse: Tensor, parts: Sequence[Part], fresh: bool, into: Tensor | None, at: Tensor | None = None
        ) -> None:
            ends, befores = (out if into is None else into, lse), () if fresh else (out, lse)
            self._add(sum(named(at, column, *each) for column, each in enumerate((ends, befores, *parts))) + _table(at))

        def add_(out: Tensor, terms: Sequence[Tensor], at: Tensor | None = None) -> None:
            self._add(sum(named(at, column, each) for column, each in enumerate((out, *terms))) + _table(at))

        kernel = InPlace(self) if in_place else Nothing()
        most, kernels = 4, SimpleNamespace(MOST=4, merge_=merge_, add_=add_)
        with ExitStack() as patches:
            for module in (held, merge, passes, walk):
                patches.enter_context(mock.patch.object(module, "at_once", lambda _: most))
            patches.enter_context(mock.patch.object(held, "fused", lambda: kernels))
            patches.enter_context(
                mock.patch.object(held, "resident", lambda make, _, *about: [torch.from_numpy(x) for x in make(*about)])
            )
            patches.enter_context(mock.patch.object(passes, "kernel_for", lambda *_: kernel))
            patches.enter_context(mock.patch.object(PretendTransport, "start", lambda *_: lambda: None))
            yield


@dataclass(frozen=True)
class Glue:
    """Of all ranks together, forward and backward: bytes, and seconds of them over the kernel's; the most launches of a rank."""

    bytes: tuple[int, int]
    launches: tuple[int, int]
    share: tuple[float, float]


def count(mask: str, layout: str, transport: str, in_place: bool = False, *, ranks: int = RANKS, tokens: int = A_RANK) -> Glue:
    """Run all ranks, one after the other."""
    total, shape = ranks * tokens, Shape(heads=HEADS, heads_k=HEADS_K, dim=DIM, dim_v=DIM)
    cu = torch.tensor([0, *np.cumsum(packings.lengths(total, 0))], dtype=torch.int32) if mask == "packed mix" else None
    moved, most, seconds = [0, 0], [0, 0], [0.0, 0.0]
    for rank in range(ranks):
        recipe = Recipe(
            group=f"pretend:{ranks}:{rank}", layout=layout, transport=transport, returns_lse=False, keeps=True, **MASKS[mask]
        )
        about = (recipe, (total, total), (cu, None, None))
        wanted = [torch.empty(1, tokens, heads, DIM, dtype=torch.bfloat16, device="meta") for heads in (HEADS, HEADS_K, HEADS_K)]
        jobs = [job_of(*about, wanted, DIM**-0.5, backward=back) for back in (False, True)]
        rows = int(jobs[0].q_layout.counts[rank])
        q, k, v, d_out = (x.new_empty(1, rows, x.shape[2], DIM) for x in (*wanted, wanted[0]))
        extras = Extras(None, None, None)
        for _ in range(2):  # what is sent once for all calls is there when it counts
            counted = Moved()
            with counted.like_an_accelerator(in_place), counted:
                (plan,) = jobs[0].plans
                ((out, lse, kept),) = jobs[0].transport.run([forward(jobs[0], plan, q, k, v, extras)])
                before = counted.bytes, counted.launches
                (back,) = jobs[1].plans
                jobs[1].transport.run([backward(jobs[1], back, None, [d_out, q, k, v, out, lse], kept, extras, False)])
        after = counted.bytes - before[0], counted.launches - before[1]
        for n, (found, launches) in enumerate((before, after)):
            moved[n] += found
            most[n] = max(most[n], launches)
            seconds[n] += plan.pairs * shape.flops(bool(n)) / (SPEED.backward if n else SPEED.forward)
    share = tuple(found / MEMORY / second for found, second in zip(moved, seconds, strict=True))
    return Glue((moved[0], moved[1]), (most[0], most[1]), (share[0], share[1]))


def table(repeats: int) -> str:
    """All rows; nothing is measured, so `repeats` is not looked at."""
    rows = []
    for mask, layout, transport, in_place in WAYS:
        glue = count(mask, layout, transport, in_place)
        shares = [f"{100 * share:.2f} %" for share in glue.share]
        a_rank = [f"{found / RANKS / 1e6:,.0f}" for found in glue.bytes]
        cells = [cell for each in zip(a_rank, shares, glue.launches, strict=True) for cell in each]
        rows.append((mask, f"{layout}, {transport}" + ", in place" * in_place, *cells))
    each = ("of the kernel's time", "launches")
    header = ("mask", "layout, transport", "MB a rank, forward", *each, "backward", *each)
    about = (
        f"{RANKS} ranks of {A_RANK:,} tokens, Hq/Hk/D = {HEADS}/{HEADS_K}/{DIM}, bf16. Bytes read and written outside of kernels\n"
        f"and messages, counted; their time at {MEMORY / 1e12:.0f} TB/s over that of the kernel at the speed of {SPEED.name}\n"
        f"({SPEED.forward / 1e12:.0f} / {SPEED.backward / 1e12:.0f} TFLOP/s). Launches: of the busiest rank, besides\n"
        "the kernel's. In place: a kernel that adds to what rows have, as Triton's does; what it reads and writes for\n"
        "that, besides the result, is counted."
    )
    return f"## Glue on paper\n\n{about}\n\n{markdown(header, rows)}"
