"""Pictures of a configuration: who computes what, how even the work is, and what one rank does when.

A column a configuration. Pairs are coloured by the rank that computes them; a cell that stands for many pairs shows the mean of
its ranks' colours, paler the fewer of its pairs are visible, so that stripes and short documents are not drawn as what they are
not. Colours: Okabe and Ito's up to eight ranks, viridis beyond, which colour-blind readers tell apart, on white whatever the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .core.intervals import overlaps
from .core.layout import Layout
from .core.mask import Mask, band_area
from .core.scaling import Bar, Timeline

CELLS = 512
"""Most rows and columns of a mask's picture."""

PANELS = ("mask", "work", "timeline")
"""What a picture may show."""

SUFFIXES = (".png", ".svg", ".pdf")
"""Kinds of files, by their names' ends."""

MOST = 4
"""Configurations that fit in one picture."""

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666")
LANES = {"step": "#0072B2", "rows": "#E69F00", "gradients": "#CC79A7", "tokens": "#009E73", "heads": "#009E73"}
"""Colours of bars by the first word of their labels."""

KINDS = {"step": "attention calls", "rows": "keys and values", "gradients": "their gradients", "tokens": "tokens for heads"}


@dataclass(frozen=True, eq=False)
class Column:
    """What is drawn of one configuration.

    Attributes:
        title: its name.
        mask: who sees whom.
        owner: which rank, or team of ranks, computes which queries.
        work: pairs that each rank computes, of shared heads its part: ``[world_size]``.
        walk: whose passes are drawn, on which network.
        forward, backward: what that rank does when.
    """

    title: str
    mask: Mask
    owner: Layout
    work: np.ndarray
    walk: str
    forward: Timeline
    backward: Timeline


def save(path: Path, columns: Sequence[Column], panels: Sequence[str] = PANELS) -> None:
    """Draw up to `MOST` configurations side by side; the end of the file's name says which kind of picture."""
    above, below = [name for name in PANELS[:2] if name in panels], "timeline" in panels
    heights = [4.0] * bool(above) + [2.6] * below
    width = {0: 8.0, 1: 5.4, 2: 7.6}[len(above)] * (1 if len(columns) == 1 else 0.8)
    figure = import_module("matplotlib.figure").Figure(
        figsize=(width * len(columns), sum(heights) + 0.4), layout="constrained", facecolor="white"
    )
    parts = np.atleast_1d(figure.subfigures(1, len(columns), wspace=0.03))
    end = max(line.total for column in columns for line in (column.forward, column.backward))  # one scale, to compare
    most = max(float(column.work.max()) for column in columns)
    for part, column in zip(parts, columns, strict=True):
        part.suptitle(column.title, fontsize="large", fontweight="bold")
        rows = np.atleast_1d(part.subfigures(len(heights), 1, height_ratios=heights))
        if above:
            ratios = [2.2, 1] if len(above) == 2 else [1]
            for name, axes in zip(above, np.atleast_1d(rows[0].subplots(1, len(above), width_ratios=ratios)), strict=True):
                _draw_mask(axes, column) if name == "mask" else _draw_work(axes, column, most)
        if below:
            _draw_timeline(rows[-1], column, end)
    figure.savefig(path, dpi=110)


def coverage(mask: Mask, edges: np.ndarray) -> np.ndarray:
    """Part of the pairs of each cell that is visible: float64 ``[n, n]`` for cells between ``n + 1`` ascending edges."""
    seen = np.zeros((len(edges) - 1, len(edges) - 1))
    for q0, q1, k0, k1, lo, hi in mask.table.tolist():
        rows, columns = _cells_of(edges, q0, q1), _cells_of(edges, k0, k1)
        i0, i1 = np.maximum(edges[:-1][rows], q0)[:, None], np.minimum(edges[1:][rows], q1)[:, None]
        j0, j1 = np.maximum(edges[:-1][columns], k0)[None], np.minimum(edges[1:][columns], k1)[None]
        seen[rows, columns] += band_area(i0, i1, j0, j1, np.array(lo), np.array(hi))
    return seen / np.multiply.outer(np.diff(edges), np.diff(edges))


def _cells_of(edges: np.ndarray, start: int, end: int) -> slice:
    return slice(int(np.searchsorted(edges, start, side="right")) - 1, int(np.searchsorted(edges, end)))


def owners(layout: Layout, edges: np.ndarray) -> np.ndarray:
    """Part of the positions of each cell that each rank holds: float64 ``[n, world_size]``."""
    rank, start, count = layout.runs.T
    held = np.zeros((len(edges) - 1, layout.world_size))
    if layout.stride == 1:
        run, cell = overlaps(start, start + count, edges[:-1], edges[1:])
        tokens = np.minimum((start + count)[run], edges[1:][cell]) - np.maximum(start[run], edges[:-1][cell])
        np.add.at(held, (cell, rank[run]), tokens)
    else:
        before = np.clip(-((start[:, None] - edges) // layout.stride), 0, count[:, None])  # positions of a run before each edge
        np.add.at(held.T, rank, np.diff(before, axis=1))
    return held / np.diff(edges)[:, None]


def image(mask: Mask, layout: Layout) -> np.ndarray:
    """The picture of who computes what: float64 ``[n, n, 3]`` with values of 0 .. 1, `n` at most `CELLS`."""
    cells = min(CELLS, layout.length)
    edges = np.round(np.linspace(0, layout.length, cells + 1)).astype(np.int64)
    seen = coverage(mask, edges)[:, :, None]
    ink = 1 - owners(layout, edges) @ colours(layout.world_size)
    return 1 - np.where(seen > 0, 0.3 + 0.7 * seen, 0) * ink[:, None]


def colours(world_size: int) -> np.ndarray:
    """A colour a rank: float64 ``[world_size, 3]``."""
    if world_size <= len(OKABE_ITO):
        return np.array([_rgb(colour) for colour in OKABE_ITO[:world_size]])
    return np.asarray(import_module("matplotlib").colormaps["viridis"](np.linspace(0, 1, world_size)))[:, :3]


def tokens(count: int) -> str:
    """A number of tokens in few letters.

    Example:
        >>> tokens(1 << 20), tokens(3 << 14), tokens(1000)
        ('1m', '48k', '1,000')
    """
    for size, letter in ((1 << 20, "m"), (1 << 10, "k")):
        if count and count % size == 0:
            return f"{count // size:,}{letter}"
    return f"{count:,}"


def figures(number: float) -> str:
    """A number in three figures, or more before the point.

    Example:
        >>> figures(1043.7), figures(24.77), figures(0.0)
        ('1,044', '24.8', '0.00')
    """
    return f"{number:,.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"


def _draw_mask(axes: Any, column: Column) -> None:
    length, world = column.owner.length, column.owner.world_size
    kind = "nearest" if length <= CELLS // 4 else "auto"
    axes.imshow(image(column.mask, column.owner), extent=(0, length, length, 0), interpolation=kind)
    ticks = [round(length * n / 4) for n in range(5)] if length >= 4 else list(range(length + 1))
    axes.set_xticks(ticks, [tokens(n) for n in ticks])
    axes.set_yticks(ticks, [tokens(n) for n in ticks])
    axes.set_xlabel("key position (tokens)")
    axes.set_ylabel("query position (tokens)")
    ranks = len(column.work)
    if world == ranks:
        title = "pairs by the rank that computes them"
    elif world > 1:
        title = f"pairs by the team of {ranks // world} ranks"
    else:
        title = f"pairs: all {ranks} ranks, each its heads"
    axes.set_title(title, fontsize="medium")


def _draw_work(axes: Any, column: Column, most: float) -> None:
    work, world = column.work, len(column.work)
    scale, unit = next(
        (s, u) for s, u in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, "")) if most >= s or s == 1
    )
    shown = np.repeat(colours(column.owner.world_size), world // column.owner.world_size, axis=0)
    ranks, mean = np.arange(world), work.mean() / scale
    axes.barh(ranks, work / scale, color=shown, height=0.85 if world <= 64 else 1.0)
    axes.axvline(mean, color="black", linewidth=1.2, linestyle="--")
    axes.annotate(
        "mean", (mean, 1), xycoords=("data", "axes fraction"), xytext=(3, 2), textcoords="offset points", fontsize="small"
    )
    if world <= 16:
        axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    else:
        axes.set_ylabel("rank")
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(world - 0.5, -0.5)
    axes.set_xlim(0, max(most / scale * 1.08, 1e-9))
    axes.set_xlabel(f"visible pairs ({unit})" if unit else "visible pairs")
    axes.set_title(f"work per rank\nmost / mean = {work.max() / max(work.mean(), 1e-9):.3f}", fontsize="medium", pad=14)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_timeline(part: Any, column: Column, end: float) -> None:
    part.suptitle(column.walk, fontsize="medium")
    kinds = dict.fromkeys(
        bar.label.split()[0] for line in (column.forward, column.backward) for bar in (*line.compute, *line.network)
    )
    scale, unit = (1e3, "ms") if end >= 1e-3 else (1e6, "µs")
    upper, lower = part.subplots(2, 1, sharex=True)
    for axes, name, line in ((upper, "forward", column.forward), (lower, "backward", column.backward)):
        for lane, bars in ((1, line.compute), (0, line.network)):
            _draw_bars(axes, lane, bars, scale, end)
        axes.axvline(line.total * scale, color="black", linewidth=1, linestyle=":")
        axes.set_yticks([1, 0], ["compute", "network"])
        axes.set_ylim(-0.5, 1.5)
        axes.set_xlim(0, end * scale * 1.01)
        axes.set_title(f"{name}: {figures(line.total * scale)} {unit}", fontsize="small", loc="left", pad=3)
        axes.spines[["top", "right"]].set_visible(False)
    lower.set_xlabel(f"time ({unit}, modelled)")
    patch = import_module("matplotlib.patches").Patch
    shown = dict.fromkeys((LANES[kind], KINDS["tokens" if kind == "heads" else kind]) for kind in kinds)
    handles = [patch(color=colour, label=label) for colour, label in shown]
    part.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small", frameon=False, columnspacing=1.4)


def _draw_bars(axes: Any, lane: int, bars: Sequence[Bar], scale: float, end: float) -> None:
    """Bars of one lane; those that are wide enough say which step they are of."""
    bars = [bar for bar in bars if bar.end > bar.start]
    if len(bars) > 100:
        axes.imshow(_blurred(bars, end)[None], extent=(0, end * scale, lane - 0.38, lane + 0.38), aspect="auto")
        return
    shown = [LANES[bar.label.split()[0]] for bar in bars]
    wide = [bar.end - bar.start > 0.01 * end for bar in bars]
    edges = ["white" if apart else colour for apart, colour in zip(wide, shown, strict=True)]  # a hairline is seen, too
    spans = [(bar.start * scale, (bar.end - bar.start) * scale) for bar in bars]
    axes.broken_barh(spans, (lane - 0.38, 0.76), facecolors=shown, edgecolor=edges, linewidth=0.6)
    for bar in bars:
        number = bar.label.split()[-1]
        if number.isdigit() and bar.end - bar.start > 0.03 * end:
            colour = "white" if lane else "black"
            axes.text((bar.start + bar.end) / 2 * scale, lane, number, ha="center", va="center", fontsize="small", color=colour)


def _blurred(bars: Sequence[Bar], end: float, cells: int = 256) -> np.ndarray:
    """Bars thinner than a pixel as the mean of their colours: float64 ``[cells, 3]`` for equal parts of 0 .. `end`."""
    shown, edges = np.ones((cells, 3)), np.linspace(0, end, cells + 1)
    for kind in {bar.label.split()[0] for bar in bars}:
        times = np.array([(bar.start, bar.end) for bar in bars if bar.label.split()[0] == kind])
        busy = np.cumsum(times[:, 1] - times[:, 0])
        so_far = np.interp(edges, times.ravel(), np.column_stack([np.append(0, busy[:-1]), busy]).ravel())
        shown -= np.outer(np.diff(so_far) * cells / end, 1 - _rgb(LANES[kind]))
    return shown.clip(0, 1)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
