"""CPU seconds of all ranks over those of one process that does the same attention, forward and backward.

Processes run one thread each, so that nothing but work and messages is counted; one-process and all-rank runs alternate, and a
figure is the median of the ratios of neighbouring runs.
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

import nnscaler_ring as nr
from benchmarks.report import markdown

HEADS, HEAD_DIM = 8, 64


@dataclass(frozen=True)
class Case:
    """One line of the table; `limit` is what the project holds itself to."""

    ranks: int
    tokens: int
    limit: float
    layout: str = "zigzag"
    window: int | None = None
    transport: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.layout} causal" if self.window is None else f"window {self.window:,}"


CASES = (
    Case(2, 8192, 1.05),
    Case(2, 2048, 1.15),
    Case(4, 8192, 1.10),
    Case(2, 16384, 1.10, layout="contiguous", window=1024),
)


def table(repeats: int) -> str:
    """Measure every case and return the table."""
    rows = []
    for case in CASES:
        ratios, alone, together = measure(case, repeats)
        spread, seconds = f"{min(ratios):.3f} .. {max(ratios):.3f}", f"{together:.2f} / {alone:.2f}"
        shown = f"**{median(ratios):.3f}**" if median(ratios) > case.limit else f"{median(ratios):.3f}"
        rows.append((case.name, case.ranks, f"{case.tokens:,}", shown, spread, f"{case.limit:.2f}", seconds))
    header = ("attention", "ranks", "tokens", "all ranks / one process", "range", "limit", "CPU seconds")
    about = (
        f"H = {HEADS}, D = {HEAD_DIM}, fp32, forward + backward, one thread a process. Causal: over torch's dense causal call.\n"
        "Window: over this package's own window on one process. Bold: above the limit that the project holds itself to."
    )
    return f"## CPU cost of cutting the sequence\n\n{about}\n\n{markdown(header, rows)}"


def measure(case: Case, repeats: int) -> tuple[list[float], float, float]:
    """Ratios of interleaved pairs, and the median CPU seconds of one process and of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (case, repeats, folder), nprocs=case.ranks)  # type: ignore[no-untyped-call]
        pairs: Tensor = torch.load(f"{folder}/pairs")
    alone, together = pairs.T.tolist()
    return [b / a for a, b in zip(alone, together, strict=True)], median(alone), median(together)


def _rank(rank: int, case: Case, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    torch.manual_seed(0)
    whole = [torch.randn(1, case.tokens, HEADS, HEAD_DIM) for _ in range(4)]
    cp = nr.ContextParallel(layout=case.layout, transport=case.transport)
    mine = [cp.shard(x, dim=1) for x in whole]
    window = {} if case.window is None else {"window_size": (case.window, 0)}

    def together() -> None:
        step(lambda q, k, v: cp.attention(q, k, v, **window), mine)

    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nr.wrap_sliding_window_attn_func(q, k, v, case.window)

    def alone() -> None:
        if rank == 0:
            step(_dense if case.window is None else windowed, whole)

    alone()
    together()  # plans, and what the kernels set up once
    pairs = torch.tensor([[_cpu_seconds(alone), _cpu_seconds(together)] for _ in range(repeats)])
    if rank == 0:
        torch.save(pairs, f"{folder}/pairs")
    dist.destroy_process_group()


def step(attention: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """One forward and backward pass over ``q, k, v, d_out``."""
    *qkv, d_out = tensors
    attention(*(x.clone().requires_grad_() for x in qkv)).backward(d_out)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    return out.transpose(1, 2)


def _cpu_seconds(run: Callable[[], None]) -> float:
    """User and system time of all ranks while `run` runs on each."""
    dist.barrier()
    start = time.process_time()
    run()
    spent = torch.tensor([time.process_time() - start], dtype=torch.float64)
    dist.all_reduce(spent)
    return spent.item()
