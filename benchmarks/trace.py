"""A picture of what ran when, from torch's profiler: a lane a stream of a GPU, or the ops of a CPU, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

KINDS = (
    ("attention", "#0072B2", ("flash", "fmha", "attention", "compute_attn", "grad_queries", "grad_keys", "forward")),
    ("copy", "#E69F00", ("memcpy", "copy", "cat", "index", "gather")),
    ("merge", "#CC79A7", ("merge", "lerp", "sigmoid", "logaddexp")),
    ("other", "#999999", ("",)),
)
"""What a kernel is, its colour, and what its name then contains, lower case; the first that fits."""

WIDTH, LANE, LEFT, TOP = 1200, 40, 90, 50


class Bar(NamedTuple):
    """A kernel, a copy or an op: its lane, its name, and microseconds from the first one's start."""

    lane: str
    name: str
    start: float
    length: float

    @property
    def kind(self) -> str:
        return next(kind for kind, _, words in KINDS if any(word in self.name.lower() for word in words))


def record(run: Callable[[], object], cuda: bool) -> list[Bar]:
    """What runs: kernels and copies where a GPU is used, else the ops that no other op calls."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])], acc_events=True) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    events: Sequence[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() != "[memory]"]
    on_gpu = [(f"stream {e.device_resource_id()}", e) for e in events if e.device_type() == DeviceType.CUDA]
    found = on_gpu or [("cpu", e) for e in events if e.name().startswith("aten::")]
    bars, end = list[Bar](), dict[str, int]()
    first = min((e.start_ns() for _, e in found), default=0)
    for lane, e in sorted(found, key=lambda each: (each[1].start_ns(), -each[1].duration_ns())):
        if e.start_ns() >= end.get(lane, 0) and e.duration_ns():
            bars.append(Bar(lane, e.name(), (e.start_ns() - first) / 1e3, e.duration_ns() / 1e3))
            end[lane] = e.start_ns() + e.duration_ns()
    return bars


def picture(bars: Sequence[Bar], title: str) -> str:
    """The bars as SVG."""
    lanes, total = sorted({bar.lane for bar in bars}), max((bar.start + bar.length for bar in bars), default=1.0)
    scale, colours = (WIDTH - LEFT - 10) / total, {kind: colour for kind, colour, _ in KINDS}
    height = TOP + LANE * len(lanes) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/><text x="10" y="18" font-size="14">{escape(title)}</text>',
    ]
    for n, (kind, colour) in enumerate(colours.items()):
        lines.append(f'<rect x="{LEFT + 110 * n}" y="28" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 110 * n + 17}" y="38">{kind}</text>')
    lines += [f'<text x="10" y="{TOP + LANE * n + 24}">{escape(lane)}</text>' for n, lane in enumerate(lanes)]
    for bar in bars:
        x, y, width = LEFT + bar.start * scale, TOP + LANE * lanes.index(bar.lane) + 6, max(bar.length * scale, 0.3)
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 12}" fill="{colours[bar.kind]}">'
            f"<title>{escape(bar.name[:80])}: {bar.length:.0f} us</title></rect>"
        )
    lines.append(f'<text x="{WIDTH - 10}" y="{height - 6}" text-anchor="end">{total / 1e3:,.1f} ms</text></svg>')
    return "\n".join(lines) + "\n"
