"""Draw the pictures that `nnscaler-ring plan --plot` does not: masks side by side, and the lemma's worked example.

python docs/pictures/draw.py, from the repository's root; needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nnscaler_ring.core import geometry, layout
from nnscaler_ring.core.mask import Mask, build
from nnscaler_ring.pictures import OKABE_ITO, image

HERE = Path(__file__).parent
LENGTH = 16
DOCUMENTS = [0, 5, 7, 16]
MASKS = {
    "causal": build(LENGTH, causal=True),
    "window (3, 0)": build(LENGTH, causal=True, window=(3, 0)),
    "window (3, 0), 1 sink": build(LENGTH, causal=True, window=(3, 0), sinks=1),
    "prefix 5": build(LENGTH, causal=True, prefix=5),
    "3 documents": build(LENGTH, causal=True, cu_seqlens_q=DOCUMENTS),
    "documents, window, sink": build(LENGTH, causal=True, window=(2, 0), sinks=1, cu_seqlens_q=DOCUMENTS),
    "full window (2, 2)": build(LENGTH, window=(2, 2)),
    "piecewise, far = 6": build(LENGTH, causal=True, far=6),
}


def main() -> None:
    masks(HERE / "masks.png")
    lemma(HERE / "lemma.png")


def masks(path: Path) -> None:
    """Every kind of mask; of two parts the second in another colour."""
    figure = Figure(figsize=(11, 6), layout="constrained", facecolor="white")
    for axes, (name, mask) in zip(figure.subplots(2, 4).flat, MASKS.items(), strict=True):
        seen = np.ones((LENGTH, LENGTH, 3))
        for part in range(mask.num_parts):
            seen[Mask(mask.table[mask.parts == part].tolist(), LENGTH).as_array()] = _rgb(OKABE_ITO[part])
        _grid(axes, seen, name)
    figure.supxlabel("keys", fontsize="medium")
    figure.supylabel("queries", fontsize="medium")
    figure.savefig(path, dpi=110)


def lemma(path: Path) -> None:
    """One run of queries, one run of keys and one slice: the pairs in the whole sequence, and in local row numbers."""
    mask, held = build(LENGTH, causal=True, window=(5, 0)), layout.zigzag(LENGTH, 2)
    (band,) = geometry.visible(mask, held, held, reader=1, origin=0).tolist()
    i0, i1, j0, j1 = band[2:6]
    figure = Figure(figsize=(9.5, 4.9), layout="constrained", facecolor="white")
    whole, local = figure.subplots(1, 2)
    _grid(whole, image(mask, held), "the whole sequence: rank 0 blue, rank 1 orange")
    whole.add_patch(Rectangle((-0.5, 3.5), 4, 8, fill=False, edgecolor="black", linewidth=2.5))
    whole.set_xlabel("key position")
    whole.set_ylabel("query position")
    box = mask.as_array()[4:12, 0:4]
    shown = np.where(box[..., None], _rgb(OKABE_ITO[1]), 1.0)
    shown[i1:] = 0.88
    _grid(local, shown, "the box, in local rows: one call")
    local.add_patch(Rectangle((j0 - 0.5, i0 - 0.5), j1 - j0, i1 - i0, fill=False, edgecolor="black", linewidth=2.5))
    local.annotate("rows that see nothing here:\ntrimmed", (4.2, 6), annotation_clip=False, va="center")
    local.annotate(f"q[{i0}:{i1}] x k[{j0}:{j1}]\nwindow (0, -1)", (4.2, 2), annotation_clip=False, va="center")
    local.set_xlabel("row of rank 0's keys")
    local.set_ylabel("row of rank 1's queries")
    figure.savefig(path, dpi=110)


def _grid(axes: Any, pixels: np.ndarray, title: str) -> None:
    rows, columns = pixels.shape[:2]
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(0, columns, 4 if columns > 8 else 1))
    axes.set_yticks(range(0, rows, 4 if rows > 8 else 1))
    axes.set_title(title, fontsize="medium")


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])


if __name__ == "__main__":
    main()
