"""Wall time of two ranks over that of the same blocks without messages: what communication costs beside compute.

Both processes run one thread each, so that each is the other's load. Without messages a rank does its own share of the ring (the
same calls on the same rows) and sends nothing; runs with and without messages alternate, and a figure is the median of the ratios
of neighbouring runs, each the slower rank's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.cpu_cost import HEAD_DIM, HEADS, step
from benchmarks.report import markdown
from nnscaler_ring.core.call import Options, Rows, attend, group_name
from nnscaler_ring.core.layouts import build
from nnscaler_ring.core.recipe import Recipe

RANKS = 2


@dataclass(frozen=True)
class Case:
    """One line of the table; `limit` is what the project holds itself to."""

    tokens: int
    limit: float
    layout: str = "zigzag"
    transport: str = "ring"
    window: int = -1


CASES = (
    Case(8192, 1.08),
    Case(2048, 1.25),
    Case(8192, 1.08, transport="halo"),
    Case(8192, 1.25, transport="all_to_all"),
    Case(16384, 1.08, layout="contiguous", transport="halo", window=1024),
)


def table(repeats: int) -> str:
    """Measure every case and return the table."""
    rows = []
    for case in CASES:
        alone, together = measure(case, repeats)
        ratios = [b / a for a, b in zip(alone, together, strict=True)]
        what = f"{case.layout} causal" if case.window < 0 else f"window {case.window:,}"
        spread, seconds = f"{min(ratios):.3f} .. {max(ratios):.3f}", f"{median(together):.2f} / {median(alone):.2f}"
        rows.append((what, case.transport, f"{case.tokens:,}", f"{median(ratios):.3f}", spread, f"{case.limit:.2f}", seconds))
    header = ("attention", "transport", "tokens", "with / without messages", "range", "limit", "seconds")
    about = f"{RANKS} ranks of one thread, H = {HEADS}, D = {HEAD_DIM}, fp32, forward + backward, wall time of the slower rank."
    return f"## Communication beside compute\n\n{about}\n\n{markdown(header, rows)}"


def measure(case: Case, repeats: int) -> tuple[list[float], list[float]]:
    """Wall seconds of interleaved runs without and with messages."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (case, repeats, folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
        pairs: Tensor = torch.load(f"{folder}/pairs")
    alone, together = pairs.T.tolist()
    return alone, together


def _rank(rank: int, case: Case, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    rows = torch.from_numpy(build(case.layout, case.tokens, RANKS).positions(rank))
    mine = [torch.randn(1, case.tokens, HEADS, HEAD_DIM).index_select(1, rows) for _ in range(4)]
    options = Options(causal=True, window_size=(case.window, 0))

    def on(group: str) -> Callable[[], None]:
        recipe = Recipe(group=group, layout=case.layout, transport=case.transport)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v, recipe, options, Rows(seq_len=case.tokens))
            assert isinstance(out, Tensor)
            return out

        return lambda: step(attention, mine)

    alone, together = on(f"pretend:{RANKS}:{rank}"), on(group_name(None))
    alone()
    together()  # plans, and what is set up once
    pairs = torch.tensor([[_seconds(alone), _seconds(together)] for _ in range(repeats)])
    if rank == 0:
        torch.save(pairs, f"{folder}/pairs")
    dist.destroy_process_group()


def _seconds(run: Callable[[], None]) -> float:
    """Wall time of the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    run()
    spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item()
