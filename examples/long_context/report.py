"""What a run leaves behind: the final line, and a picture of the losses and of who computes what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnscaler_ring.core.mask import Mask

from .engines import StepResult
from .variants import Variant

TOLERANCE = 1e-4
"""Largest difference of loss, in nats per byte, that a right run may show at any step."""

CELLS = 128
"""Rows and columns of the mask picture: few enough that single stripes stay visible."""


@dataclass
class History:
    """The steps of one engine: its results, and the seconds that each took."""

    results: list[StepResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def series(self, name: str) -> np.ndarray:
        """One number of `StepResult` over the steps: float64 ``[steps]``."""
        return np.array([getattr(result, name) for result in self.results])

    def tokens_per_second(self, seq_len: int) -> float:
        """Speed of the median step, so that warming up does not count."""
        return seq_len / median(self.seconds)


def differences(sharded: History, single: History, name: str) -> np.ndarray:
    """Absolute difference of one number of `StepResult` between two runs: float64 ``[steps]``."""
    return np.abs(sharded.series(name) - single.series(name))


def save_picture(
    path: Path,
    title: str,
    sharded: History,
    single: History,
    variant: Variant,
    cu_seqlens: np.ndarray,
    window_size: int,
    world_size: int,
) -> None:
    """Writes a PNG: both loss curves, their differences, and the mask of the row `cu_seqlens` coloured by rank."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1.3), width_ratios=(1.15, 1))
    losses = figure.add_subplot(grid[0, 0])
    _draw_losses(losses, sharded, single, world_size)
    _draw_differences(figure.add_subplot(grid[1, 0], sharex=losses), sharded, single)
    _draw_mask(figure.add_subplot(grid[:, 1]), variant, cu_seqlens, window_size, world_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def shares(variant: Variant, cu_seqlens: np.ndarray, window_size: int, world_size: int) -> np.ndarray:
    """Each rank's share of the visible pairs of a row: float64 ``[world_size]``."""
    work = _visible_keys(variant.mask(cu_seqlens, window_size))
    return np.bincount(variant.owner(cu_seqlens, world_size), weights=work, minlength=world_size) / work.sum()


def _draw_losses(axes: Axes, sharded: History, single: History, world_size: int) -> None:
    steps = np.arange(1, len(single.results) + 1)
    axes.plot(steps, single.series("loss"), color="0.75", linewidth=6, label="one device")
    axes.plot(steps, sharded.series("loss"), color="C3", linewidth=1.8, linestyle="--", label=f"sharded, world size {world_size}")
    axes.set_ylabel("loss (nats per byte)")
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_differences(axes: Axes, sharded: History, single: History) -> None:
    steps = np.arange(1, len(single.results) + 1)
    for name, label, marker in (("loss", "loss", "o"), ("grad_norm", "gradient norm", "s")):
        axes.plot(steps, differences(sharded, single, name), marker=marker, markersize=4, linestyle="", label=label)
    axes.axhline(TOLERANCE, color="0.4", linewidth=1, linestyle=":", label="tolerance of the loss")
    axes.set_yscale("symlog", linthresh=1e-8)  # logarithmic with a place for an exact 0
    axes.set_ylim(-2e-9, 1e-2)
    axes.set_xlabel("step")
    axes.set_ylabel("abs. difference")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, loc="upper right", fontsize="small")


def _draw_mask(axes: Axes, variant: Variant, cu_seqlens: np.ndarray, window_size: int, world_size: int) -> None:
    seq_len = int(cu_seqlens[-1])
    scale = seq_len / CELLS
    small = np.round(cu_seqlens / scale).astype(np.int64)
    visible = variant.mask(small, round(window_size / scale)).as_array()
    colours = _rank_colours(world_size)
    cells = np.where(visible, variant.owner(small, world_size)[:, None] + 1, 0)
    extent = (0, seq_len, seq_len, 0)
    axes.imshow(cells, cmap=ListedColormap(["white", *colours]), vmin=0, vmax=world_size, extent=extent, interpolation="nearest")
    axes.set_title(f"who computes what, first row, drawn in {CELLS} x {CELLS} cells", fontsize="medium")
    axes.set_xlabel("key (byte of the row)")
    axes.set_ylabel("query (byte of the row)")
    share = shares(variant, cu_seqlens, window_size, world_size)
    patches = [Patch(color=colours[rank], label=f"rank {rank}: {share[rank]:.1%} of the pairs") for rank in range(world_size)]
    axes.legend(handles=patches, loc="upper right")


def _rank_colours(world_size: int) -> list[tuple[float, ...]]:
    if world_size <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:world_size])
    return [tuple(colour) for colour in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, world_size))]


def _visible_keys(mask: Mask) -> np.ndarray:
    """Number of keys that each query sees: int64 ``[q_len]``."""
    counts = np.zeros(mask.q_len, dtype=np.int64)
    for q0, q1, k0, k1, lo, hi in mask.table.tolist():
        query = np.arange(q0, q1)
        counts[q0:q1] += np.maximum(0, np.minimum(k1, query + hi + 1) - np.maximum(k0, query + lo))
    return counts
