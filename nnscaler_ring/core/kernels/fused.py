"""The online-softmax merge and the sum of gradients as one Triton kernel each: what is put together is read once and written once.

A chain of torch ops takes 38 bytes an element for each result and 10 for each gradient. For accelerators; in Triton's interpreter
(``TRITON_INTERPRET=1``) they run on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of one program: a row is what a head has for a token."""

MOST = 4
"""Results or gradients that are put together at once; a kernel has a place for each."""

# What is read a number a row needs no alignment: there is one kernel for all lengths.
_ANY = ("rows", "length", "lse_b", "lse_l", "lse_h", *(f"w{n}_{dim}" for n in range(MOST) for dim in "blh"))


@triton.jit
def _weigh(total, part, at, inside, weight):  # type: ignore[no-untyped-def]
    """A total and a part by its weight, which is 0 where it has seen nothing, whatever it holds there."""
    come = tl.load(part + at, mask=inside, other=0.0)
    weight = weight.to(total.dtype)[:, None]
    return total + tl.where(weight > 0, come.to(total.dtype) * weight, 0.0)


@triton.jit(do_not_specialize=_ANY)
def _merge(  # type: ignore[no-untyped-def]
    into, out, lse, p0, p1, p2, p3, w0, w1, w2, w3, rows, length, heads, width, into_b, into_l, into_h, out_b, out_l, out_h,
    lse_b, lse_l, lse_h,
    p0_b, p0_l, p0_h, p1_b, p1_l, p1_h, p2_b, p2_l, p2_h, p3_b, p3_l, p3_h,
    w0_b, w0_l, w0_h, w1_b, w1_l, w1_h, w2_b, w2_l, w2_h, w3_b, w3_l, w3_h,
    N: tl.constexpr, FRESH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    b, l, h = row // (length * heads), row // heads % length, row % heads
    lse_at = lse + b * lse_b + l * lse_l + h * lse_h
    exact = lse.dtype.element_ty
    old = tl.full([ROWS], float("-inf"), exact)
    if not FRESH:
        old = tl.load(lse_at, mask=there, other=0.0)
    x0 = tl.load(w0 + b * w0_b + l * w0_l + h * w0_h, mask=there, other=0.0).to(exact)
    x1, x2, x3 = x0, x0, x0
    most = tl.maximum(old, x0)
    if N > 1:
        x1 = tl.load(w1 + b * w1_b + l * w1_l + h * w1_h, mask=there, other=0.0).to(exact)
        most = tl.maximum(most, x1)
    if N > 2:
        x2 = tl.load(w2 + b * w2_b + l * w2_l + h * w2_h, mask=there, other=0.0).to(exact)
        most = tl.maximum(most, x2)
    if N > 3:
        x3 = tl.load(w3 + b * w3_b + l * w3_l + h * w3_h, mask=there, other=0.0).to(exact)
        most = tl.maximum(most, x3)
    most = tl.where(most == float("-inf"), 0.0, most)  # none has seen anything
    kept, x0, x1, x2, x3 = tl.exp(old - most), tl.exp(x0 - most), tl.exp(x1 - most), tl.exp(x2 - most), tl.exp(x3 - most)
    total = kept + x0
    if N > 1:
        total += x1
    if N > 2:
        total += x2
    if N > 3:
        total += x3
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(lse_at, tl.where(some, most + tl.log(total), float("-inf")), mask=there)
    column = tl.arange(0, WIDTH)
    inside = there[:, None] & (column < width)[None, :]
    into_at = into + (b * into_b + l * into_l + h * into_h)[:, None] + column[None, :]
    merged = tl.zeros([ROWS, WIDTH], EXACT)
    if not FRESH:
        merged = _weigh(merged, out, (b * out_b + l * out_l + h * out_h)[:, None] + column[None, :], inside, kept / total)
    merged = _weigh(merged, p0, (b * p0_b + l * p0_l + h * p0_h)[:, None] + column[None, :], inside, x0 / total)
    if N > 1:
        merged = _weigh(merged, p1, (b * p1_b + l * p1_l + h * p1_h)[:, None] + column[None, :], inside, x1 / total)
    if N > 2:
        merged = _weigh(merged, p2, (b * p2_b + l * p2_l + h * p2_h)[:, None] + column[None, :], inside, x2 / total)
    if N > 3:
        merged = _weigh(merged, p3, (b * p3_b + l * p3_l + h * p3_h)[:, None] + column[None, :], inside, x3 / total)
    tl.store(into_at, merged.to(into.dtype.element_ty), mask=inside)


def merge_(
    out: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor]], fresh: bool = False, into: Tensor | None = None
) -> None:
    """`merge.merge_all_` of up to `MOST` results in one kernel; any strides with the last dim contiguous."""
    into = out if into is None else into
    batch, length, heads, width = out.shape
    rows = batch * length * heads
    assert len(parts) <= MOST
    outs, lses = ([x[n] for x in (*parts, *[parts[0]] * (MOST - len(parts)))] for n in range(2))
    strides = [stride for x in (into, out, lse, *outs, *lses) for stride in x.stride()[:3]]
    exact = tl.float64 if out.element_size() == 8 else tl.float32
    if rows:
        _merge[(triton.cdiv(rows, ROWS),)](
            *(into, out, lse, *outs, *lses, rows, length, heads, width, *strides, len(parts), fresh),
            ROWS=ROWS, WIDTH=triton.next_power_of_2(width), EXACT=exact,
        )  # fmt: skip


@triton.jit(do_not_specialize=("rows", "length"))
def _add(  # type: ignore[no-untyped-def]
    out, p0, p1, p2, p3, p4, rows, length, heads, width, out_b, out_l, out_h,
    p0_b, p0_l, p0_h, p1_b, p1_l, p1_h, p2_b, p2_l, p2_h, p3_b, p3_l, p3_h, p4_b, p4_l, p4_h,
    N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b, l, h = row // (length * heads), row // heads % length, row % heads
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    total = tl.load(p0 + (b * p0_b + l * p0_l + h * p0_h)[:, None] + column, mask=inside).to(EXACT)
    if N > 1:
        total += tl.load(p1 + (b * p1_b + l * p1_l + h * p1_h)[:, None] + column, mask=inside).to(EXACT)
    if N > 2:
        total += tl.load(p2 + (b * p2_b + l * p2_l + h * p2_h)[:, None] + column, mask=inside).to(EXACT)
    if N > 3:
        total += tl.load(p3 + (b * p3_b + l * p3_l + h * p3_h)[:, None] + column, mask=inside).to(EXACT)
    if N > 4:
        total += tl.load(p4 + (b * p4_b + l * p4_l + h * p4_h)[:, None] + column, mask=inside).to(EXACT)
    tl.store(out + (b * out_b + l * out_l + h * out_h)[:, None] + column, total.to(out.dtype.element_ty), mask=inside)


def add_(out: Tensor, terms: Sequence[Tensor]) -> None:
    """`sums.add_all` of up to ``MOST + 1`` terms in one kernel; any strides with the last dim contiguous."""
    batch, length, heads, width = out.shape
    rows = batch * length * heads
    assert len(terms) <= MOST + 1
    given = [*terms, *[terms[0]] * (MOST + 1 - len(terms))]
    strides = [stride for x in (out, *given) for stride in x.stride()[:3]]
    if rows:
        _add[(triton.cdiv(rows, ROWS),)](
            *(out, *given, rows, length, heads, width, *strides, len(terms)),
            ROWS=ROWS, WIDTH=triton.next_power_of_2(width), EXACT=tl.float64 if terms[0].element_size() == 8 else tl.float32,
        )  # fmt: skip
