"""Time to plan one rank's work, nothing cached, for a row of a million tokens in a thousand documents."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from benchmarks.report import markdown
from nnscaler_ring.core import chains, layouts, mask
from nnscaler_ring.core import plan as planner

TOKENS, DOCUMENTS, RANKS = 1 << 20, 1000, 64


def documents() -> np.ndarray:
    """Boundaries of log-normal document lengths that fill the row."""
    lengths = np.random.default_rng(0).lognormal(0.0, 1.0, DOCUMENTS)
    bounds = np.round(np.cumsum(lengths) / lengths.sum() * TOKENS).astype(np.int64)
    return np.concatenate([[0], bounds])


def table(repeats: int) -> str:
    """Plan every case `repeats` times and return the table of medians."""
    cu = documents()
    masks = {"causal": mask.build(TOKENS, causal=True), "window 1,024": mask.build(TOKENS, causal=True, window=(1024, 0))}
    masks[f"{DOCUMENTS:,} documents"] = mask.build(TOKENS, causal=True, cu_seqlens_q=cu)
    rows = []
    for about, seen in masks.items():
        for name in ("contiguous", "zigzag", "balanced", "stripe", "contiguous-per-document", "zigzag-per-document"):
            if name not in ("contiguous", "zigzag", "stripe") and "documents" not in about:
                continue
            solving = median(_seconds(lambda: layouts.build(name, TOKENS, RANKS, cu), repeats))  # noqa: B023
            held = layouts.build(name, TOKENS, RANKS, cu)
            rows.append((about, name, "(the layout itself)", "-", "-", f"{solving * 1e3:.1f}"))
            for transport in ("ring", "grouped_ring", "all_gather", "halo", "auto"):
                done = planner.plan(seen, held, held, transport, RANKS // 2)
                spent = median(_cold(lambda: planner.plan(seen, held, held, transport, RANKS // 2), repeats))  # noqa: B023
                rows.append((about, name, transport, done.num_calls, f"{done.rows_sent:,}", f"{spent * 1e3:.1f}"))
    header = ("mask", "layout", "transport", "calls", "rows sent", "ms")
    about = f"{TOKENS:,} tokens, {RANKS} ranks, the plan of rank {RANKS // 2}, caches empty."
    return f"## Planning time\n\n{about}\n\n{markdown(header, rows)}"


CACHES = (planner.plan, planner.choose, planner.rows_given, chains.chains_of, chains.rows_needed)


def _cold(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds with nothing cached."""

    def cold() -> None:
        for cached in CACHES:
            cached.cache_clear()
        run()

    return _seconds(cold, repeats)


def _seconds(run: Callable[[], object], repeats: int) -> list[float]:
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return spent
