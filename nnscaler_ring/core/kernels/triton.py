"""FlashAttention-2 in Triton: every feature, any head dim up to 256, all spans in one launch, the same bits each time.

For what torch's kernel has not: soft cap, ALiBi, bias, dropout, fp32, D other than Dv. The tables of rows and blocks are made here
with numpy, once for spans that come again, and read by the kernels of `triton_kernels`; nothing waits for the device. It is tested
in Triton's interpreter (``TRITON_INTERPRET=1``) and compiles for compute capability 8.0 and 9.0; it has not run on a GPU yet, and
the block sizes are chosen by registers and shared memory, not by timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..device import resident
from ..held import Place
from ..intervals import covered, overlaps, ranges, union
from ..merge import Results
from .base import Case, Grad, Kernel, Scores, Spans, Window

ANY = 1 << 30
"""No limit, of a window."""


_NO_STATES = np.empty((0, 3), dtype=np.int64)


class Blocks(NamedTuple):
    """Query and key rows of a block, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """The blocks of the three kernels."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


Table = Mapping[tuple[int, int], Sizes]
"""By bytes of an element and the width of a head, 64, 128 or 256."""

NARROW: Table = MappingProxyType(
    {
        (2, 64): Sizes(Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
        (2, 128): Sizes(Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
        (2, 256): Sizes(Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
        (4, 64): Sizes(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
        (4, 128): Sizes(Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
        (4, 256): Sizes(Blocks(32, 16, 8, 2), Blocks(16, 16, 8, 2), Blocks(16, 32, 8, 1)),
    }
)
"""For 99 KiB of shared memory, as desktop GPUs have; and everywhere for a bias, which is read there and takes many registers."""

WIDE: Table = MappingProxyType(
    {
        **NARROW,
        (2, 64): Sizes(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
        (2, 128): Sizes(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
        (2, 256): Sizes(Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
    }
)
"""For 163 KiB: A100."""

HOPPER: Table = MappingProxyType(
    {
        **WIDE,
        (2, 64): WIDE[2, 64]._replace(forward=Blocks(128, 128, 8, 3)),
        (2, 128): WIDE[2, 128]._replace(forward=Blocks(128, 128, 8, 2)),
    }
)
"""For 227 KiB: H100 and newer."""


class Triton(Kernel):
    """The kernels of `triton_kernels`; `sizes` replaces what the tables say."""

    name = "triton"
    takes_d_lse = True
    features = frozenset({"softcap", "alibi", "bias", "dropout"})

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.sizes = sizes

    def offers(self, case: Case) -> bool:
        """Not on CPU: the interpreter is for tests."""
        return case.device != "cpu"

    def check_sizes(self, case: Case) -> None:
        if case.device not in ("cpu", "cuda", "xpu"):
            raise NotImplementedError(f"Triton's kernels are for cuda and xpu, the tensors are on {case.device}")
        if find_spec("triton") is None:
            raise NotImplementedError("Triton is not installed")
        if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise NotImplementedError(f"it takes bfloat16, float16 and float32, not {case.dtype}")
        if max(case.head_dim, case.head_dim_v) > 256:
            raise NotImplementedError(f"it takes head dims up to 256, not {case.head_dim} and {case.head_dim_v}")
        if case.device == "cpu" and not interpreted():
            raise NotImplementedError("on CPU Triton has its interpreter alone, which TRITON_INTERPRET=1 turns on")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> tuple[Tensor, Tensor]:
        num_rows = int((spans[:, 1] - spans[:, 0]).sum())
        out = q.new_empty(q.shape[0], num_rows, q.shape[2], v.shape[3], dtype=torch.float32 if scores.merged else q.dtype)
        lse = q.new_empty(q.shape[0], q.shape[2], num_rows, dtype=torch.float32)
        self._attend(q, k, v, spans, window, scores, Place(out, None, _NO_STATES, lse))
        return out, lse

    def merge(self, results: Results, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        self._attend(q, k, v, spans, window, scores, results.place(covered(spans[:, :2])))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores, place: Place) -> None:
        """The results at a `Place`; end to end where it names no rows."""
        from . import triton_kernels as compiled

        blocks = self._sizes(q, v, scores).forward
        (tiles,) = _tables("rows", spans, window, blocks, q.device, place.rows)
        programs = len(tiles) * q.shape[0] * q.shape[2]
        if programs:
            given, out, lse = _Given(scores), place.end, place.lse
            assert lse is not None, "a place of results"
            merged, strides = (lse, [0, 0, 0]) if place.total is None else (place.total, _strides(place.total))
            compiled.forward[(programs,)](
                *(q, k, v, out, merged, lse, tiles, *given.tensors),
                *(*_strides(q, k, v, out), *strides, *lse.stride(), *given.strides),
                *(len(tiles), q.shape[2], q.shape[2] // k.shape[2], *_sides(window), *given.numbers),
                **_constants(q, v, blocks),
                **given.flags,
            )

    def backward(self, grad: Grad, k: Tensor, v: Tensor, spans: Spans, window: Window, scores: Scores) -> None:
        from . import triton_kernels as compiled

        q, (batch, length, heads, _), heads_k = grad.q, grad.q.shape, k.shape[2]
        given, sizes, d_bias = _Given(scores), self._sizes(q, v, scores), grad.d_bias
        delta, logs = torch.empty(2, batch, heads, length, dtype=torch.float32, device=q.device)
        if grad.d_lse is not None:
            torch.neg(grad.d_lse, out=delta)
        dq = grad.dq.place(covered(spans[:, :2]))
        (tiles,) = _tables("rows", spans, window, sizes.queries, q.device, dq.rows)
        programs = len(tiles) * batch * heads
        alone, atomic = shares(d_bias, batch, heads, grad.deterministic)
        step = programs if alone is None else len(tiles) * alone
        (dq_end, dq_sum), dq_strides = _of_place(dq, delta)
        for program0 in range(0, programs, max(step, 1)):
            compiled.grad_queries[(step,)](
                *(q, k, v, grad.out, grad.d_out, grad.lse, delta, logs, dq_end, dq_sum, d_bias, tiles, *given.tensors),
                *(*_strides(q, k, v, grad.out, grad.d_out), *grad.lse.stride(), *delta.stride()[:2], *dq_strides),
                *((0, 0, 0) if d_bias is None else _bias_strides(d_bias)),
                *given.strides,
                *(len(tiles), heads, heads // heads_k, *_sides(window), *given.numbers, program0),
                **_constants(q, v, sizes.queries),
                **given.flags,
                D_BIAS=d_bias is not None,
                ATOMIC=atomic,
                D_LSE=grad.d_lse is not None,
            )
        keys = covered(spans[:, 2:])
        dk, dv = grad.dk.place(keys), grad.dv.place(keys)
        tiles, visits = _tables("keys", spans, window, sizes.keys, q.device, dk.rows, dv.rows)
        if len(tiles):
            (dk_tensors, dk_strides), (dv_tensors, dv_strides) = _of_place(dk, delta), _of_place(dv, delta)
            compiled.grad_keys[(len(tiles) * batch * heads_k,)](
                *(q, k, v, grad.d_out, delta, logs, *dk_tensors, *dv_tensors, tiles, visits, *given.tensors),
                *(*_strides(q, k, v, grad.d_out), *delta.stride()[:2], *dk_strides, *dv_strides, *given.strides),
                *(len(tiles), heads, heads // heads_k, *_sides(window), *given.numbers),
                **_constants(q, v, sizes.keys),
                **given.flags,
            )

    def _sizes(self, q: Tensor, v: Tensor, scores: Scores) -> Sizes:
        return self.sizes or sizes_for(q, v, scores.bias is not None)


def _of_place(place: Place, unused: Tensor) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """The end and the total of a gradient with their strides; in place of a total that is not there a tensor in its dtype."""
    end, total = place.end, place.total
    return (end, unused if total is None else total), [*_strides(end), *([0, 0, 0] if total is None else _strides(total))]


def sizes_for(q: Tensor, v: Tensor, bias: bool) -> Sizes:
    """The blocks for these tensors on their device."""
    shared = _shared_memory(q.device) >> 10
    table = NARROW if bias or shared < 163 else WIDE if shared < 227 else HOPPER
    return table[q.element_size(), max(64, _width(max(q.shape[3], v.shape[3])))]


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; the interpreter has what an A100 has."""
    if device.type == "cpu":
        return 163 << 10
    from triton.runtime import driver

    properties: dict[str, int] = driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"]


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton's interpreter is on, which is settled when the kernels are defined."""
    from triton import JITFunction

    from .triton_kernels import forward

    return not isinstance(forward, JITFunction)


class _Given:
    """What the kernels take of `Scores`."""

    def __init__(self, scores: Scores) -> None:
        alibi, bias = scores.alibi, scores.bias
        dropped = round(scores.dropout * 2**32)
        far = None if alibi is None or scores.q_at is None else scores.q_at
        if far is not None and scores.ahead is not None:
            far = far + scores.ahead
        self.tensors = (alibi, bias, scores.q_at, far, scores.k_at)
        alibi_strides = (0, 0) if alibi is None else (0 if alibi.shape[0] == 1 else alibi.stride(0), alibi.stride(1))
        self.strides = (*alibi_strides, *((0, 0, 0) if bias is None else _bias_strides(bias)))
        signed = [_signed(word) for word in (dropped - 1, scores.seed & 0xFFFFFFFF, scores.seed >> 32 & 0xFFFFFFFF)]
        kept_scale = 1 / (1 - scores.dropout)
        self.numbers = (scores.scale, scores.softcap, kept_scale, *signed, scores.batch0, scores.head0)
        self.flags = {
            "PLAIN": not scores.softcap and alibi is None and bias is None and scores.scale > 0,
            "SOFTCAP": bool(scores.softcap),
            "ALIBI": alibi is not None,
            "BIAS": bias is not None,
            "DROPOUT": dropped > 0,
        }


def _constants(q: Tensor, v: Tensor, blocks: Blocks) -> dict[str, Any]:
    dim, dim_v = q.shape[3], v.shape[3]
    precision = "ieee" if q.dtype == torch.float32 else "wide" if q.device.type == "cpu" else "tf32"
    return {
        **{"D": dim, "DV": dim_v, "BLOCK_D": _width(dim), "BLOCK_DV": _width(dim_v), "ROWS": blocks.rows, "KEYS": blocks.keys},
        "PRECISION": precision,
        **{"num_warps": blocks.warps, "num_stages": blocks.stages},
    }


def shares(d_bias: Tensor | None, batch: int, heads: int, deterministic: bool) -> tuple[int | None, bool]:
    """How many heads of a tile may be in one launch so that no two of its programs add to one number of the bias's gradient (None:
    all), and whether programs add atomically instead."""
    if d_bias is None or (batch == 1 and d_bias.shape[0] == heads):
        return None, False
    if not deterministic:
        return None, True
    return (1 if d_bias.shape[0] == 1 else heads), False


def _signed(word: int) -> int:
    """The 32 bits of `word` as an int32, which is one type for all words."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def _width(dim: int) -> int:
    """The power of two that holds a head; a product takes 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def _sides(window: Window) -> list[int]:
    return [ANY if side < 0 else min(side, ANY) for side in window]


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, rows and heads."""
    assert all(x.stride(3) == 1 or x.shape[3] == 1 for x in tensors), "the last dim is contiguous"
    return [stride for x in tensors for stride in x.stride()[:3]]


def _bias_strides(bias: Tensor) -> tuple[int, int, int]:
    return (0 if bias.shape[0] == 1 else bias.stride(0), bias.stride(1), bias.stride(2))


# -- the tables ------------------------------------------------------------------------------------------------------------------


def _tables(kind: str, spans: Spans, window: Window, blocks: Blocks, device: torch.device, *states: np.ndarray) -> Sequence[Tensor]:
    """A table per kernel on the device; `states` are the rows of places."""
    bytes_ = (np.ascontiguousarray(x, dtype=np.int64).tobytes() for x in (spans, *states))
    return resident(_made_of, device, kind, window, blocks.rows, blocks.keys, *bytes_)


def _made_of(kind: str, window: Window, block_rows: int, block_keys: int, spans: bytes, *states: bytes) -> Sequence[np.ndarray]:
    given = np.frombuffer(spans, dtype=np.int64).reshape(-1, 4)
    placed = [np.frombuffer(each, dtype=np.int64).reshape(-1, 3) for each in states]
    left, right = _sides(window)
    if kind == "keys":
        made = list(key_tiles(given, left, right, block_rows, block_keys, *placed))
    else:
        made = [row_tiles(given, left, right, block_rows, block_keys, *placed)]
    return [x.astype(np.int32) for x in made]


def row_tiles(spans: Spans, left: int, right: int, block_rows: int, block_keys: int, placed: np.ndarray = _NO_STATES) -> np.ndarray:
    """Tiles of query rows, those with the most to do first.

    Returns:
        ``[n, 10]``: rows ``first:end``, the keys ``reach:reach_end`` that they can see, the alignment ``j1 - i1``, of the blocks of
        keys counted from `reach` those ``whole:whole_end`` that all rows see entirely and the number of all, the first of the
        rows in the output, and the state of all, of the rows of a `Place`. Where none are `placed` the output has the spans' rows
        end to end.
    """
    lengths = spans[:, 1] - spans[:, 0]
    start = np.cumsum(lengths) - lengths
    if len(placed):
        span, place = overlaps(spans[:, 0], spans[:, 1], placed[:, 0], placed[:, 1])
        lo, hi = np.maximum(spans[span, 0], placed[place, 0]), np.minimum(spans[span, 1], placed[place, 1])
        state, ahead = placed[place, 2], np.zeros_like(lo)
    else:
        span, lo, hi = np.arange(len(spans)), spans[:, 0], spans[:, 1]
        state, ahead = np.zeros_like(lo), start - lo
    which, first, end = _cut(lo, hi, block_rows)
    _, i1, j0, j1 = spans[span[which]].T
    align = j1 - i1
    low, high = first + align, end - 1 + align  # the keys at distance 0 of the first and the last row
    reach, reach_end = np.maximum(j0, low - left), np.minimum(j1, high + right + 1)
    blocks = _visits(reach, reach_end, np.maximum(j0, high - left), np.minimum(j1, low + right + 1), block_keys)
    order = np.argsort(-blocks[2], kind="stable")
    return np.column_stack([first, end, reach, reach_end, align, *blocks, first + ahead[which], state[which]])[order]


def key_tiles(
    spans: Spans, left: int, right: int, block_rows: int, block_keys: int, *placed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of key rows, those with the most to do first, each with its visits to spans: spans may share keys, tiles do not.

    Returns:
        ``[n, 6]``: keys ``first:end``, the visits ``visit:visit_end``, and the states of all keys, of the rows of the two places in
        `placed`, of dk and dv; and of the visits ``[m, 8]``: the query rows ``reach:reach_end`` that can see the tile, the span's
        keys ``j0:j1``, its alignment, and the blocks of rows, as in `row_tiles`.
    """
    walls = np.concatenate([each[:, :2].ravel() for each in placed])
    _, lo, hi = union(np.zeros(len(spans), dtype=np.int64), spans[:, 2], spans[:, 3], (np.zeros_like(walls), walls))
    _, first, end = _cut(lo, hi, block_keys)
    which, tile = overlaps(spans[:, 2], spans[:, 3], first, end)
    i0, i1, j0, j1 = spans[which].T
    align = j1 - i1
    low, high = np.maximum(first[tile], j0) - align, np.minimum(end[tile], j1) - 1 - align  # the rows at distance 0
    reach, reach_end = np.maximum(i0, low - right), np.minimum(i1, high + left + 1)
    own = (first[tile] >= j0) & (end[tile] <= j1)
    whole, whole_end = np.maximum(i0, high - right), np.where(own, np.minimum(i1, low + left + 1), 0)
    blocks = _visits(reach, reach_end, whole, whole_end, block_rows)
    order = np.argsort(tile, kind="stable")
    visits = np.column_stack([reach, reach_end, j0, j1, align, *blocks])[order]
    bounds = np.searchsorted(tile[order], np.arange(len(first) + 1))
    work = np.bincount(tile, weights=blocks[2], minlength=len(first))
    states = [each[np.searchsorted(each[:, 0], first, side="right") - 1, 2] for each in placed]
    tiles = np.column_stack([first, end, bounds[:-1], bounds[1:], *states])
    return tiles[np.argsort(-work, kind="stable")], visits


def _cut(lo: np.ndarray, hi: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranges cut in steps: of each piece the number of its range, its first and its end."""
    counts = -(-(hi - lo) // step)
    which = np.repeat(np.arange(len(lo)), counts)
    first = ranges(lo, counts, step)
    return which, first, np.minimum(first + step, hi[which])


def _visits(reach: np.ndarray, reach_end: np.ndarray, whole: np.ndarray, whole_end: np.ndarray, step: int) -> list[np.ndarray]:
    """Of the blocks that cut ``reach:reach_end`` the first and the end of those inside ``whole:whole_end``, and their number."""
    count = np.maximum(0, -(-(reach_end - reach) // step))
    begin = np.clip(-(-(whole - reach) // step), 0, count)
    return [begin, np.clip((whole_end - reach) // step, begin, count), count]
