"""Piecewise attention over one dense causal call of the same shape, on one thread: two scores, one softmax, the same pairs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import nnscaler_ring as nr
from benchmarks.report import markdown

CASES = ((8192, 4096, 8, 64), (8192, 1024, 8, 64), (8192, 4096, 4, 128), (2048, 1024, 8, 64))
LIMIT = 1.15


def table(repeats: int) -> str:
    """Measure every case, dense and piecewise in turn, and return the table."""
    torch.set_num_threads(1)
    rows = []
    for seq, threshold, heads, dim in CASES:
        x = [torch.randn(1, seq, heads, dim, requires_grad=True) for _ in range(5)]
        d_out = torch.randn(1, seq, heads, dim)

        def dense(x: list[Tensor] = x, d_out: Tensor = d_out) -> None:
            q, k, v = (t.transpose(1, 2) for t in (x[0], x[1], x[4]))
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).backward(d_out)

        def piecewise(x: list[Tensor] = x, d_out: Tensor = d_out, threshold: int = threshold) -> None:
            out = nr.wrap_piecewise_attn_func(*x[:4], x[4], threshold, True)
            assert isinstance(out, Tensor)
            out.backward(d_out)

        dense()
        piecewise()
        pairs = [(_seconds(dense), _seconds(piecewise)) for _ in range(repeats)]
        ratios = [b / a for a, b in pairs]
        seconds = f"{median(b for _, b in pairs):.2f} / {median(a for a, _ in pairs):.2f}"
        limit = f"{LIMIT:.2f}" if (seq, threshold) == (8192, 4096) else "-"
        shape = f"H = {heads}, D = {dim}"
        rows.append(
            (
                f"{seq:,}",
                f"{threshold:,}",
                shape,
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f} .. {max(ratios):.3f}",
                limit,
                seconds,
            )
        )
    header = ("tokens", "threshold", "shape", "piecewise / dense", "range", "limit", "seconds")
    return (
        f"## Piecewise attention\n\nfp32, forward + backward, causal, over torch's dense causal call.\n\n{markdown(header, rows)}"
    )


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
