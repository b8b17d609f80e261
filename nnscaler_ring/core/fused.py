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
_ANY = ("rows", "length", "at_l", "lse_b", "lse_l", "lse_h", *(f"w{n}_{dim}" for n in range(MOST) for dim in "blh"))


@triton.jit
def _row(at, number, at_l, column: tl.constexpr, there, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of a tensor that a column of the table says, -1 for none; without a table all have the same."""
    found = number
    if TABLE:
        found = tl.load(at + number * at_l + column, mask=there, other=-1).to(tl.int64)
    return found


@triton.jit
def _where(b, row, h, x_b, x_l, x_h):  # type: ignore[no-untyped-def]
    """Where the rows of heads begin in a tensor of these strides."""
    return b * x_b + row * x_l + h * x_h


@triton.jit
def _weight(at, row, there):  # type: ignore[no-untyped-def]
    """The log-sum-exp of a part, -inf where the row has none of it."""
    return tl.load(at, mask=there & (row >= 0), other=float("-inf"))


@triton.jit
def _weigh(total, at, inside, weight):  # type: ignore[no-untyped-def]
    """A total and a part by its weight, which is 0 where it has seen nothing, whatever it holds there."""
    weight = weight.to(total.dtype)[:, None]
    come = tl.load(at, mask=inside & (weight > 0), other=0.0)
    return total + come.to(total.dtype) * weight


@triton.jit(do_not_specialize=_ANY)
def _merge(  # type: ignore[no-untyped-def]
    into, out, lse, p0, p1, p2, p3, w0, w1, w2, w3, at, rows, length, heads, width, at_l,
    into_b, into_l, into_h, out_b, out_l, out_h, lse_b, lse_l, lse_h,
    p0_b, p0_l, p0_h, p1_b, p1_l, p1_h, p2_b, p2_l, p2_h, p3_b, p3_l, p3_h,
    w0_b, w0_l, w0_h, w1_b, w1_l, w1_h, w2_b, w2_l, w2_h, w3_b, w3_l, w3_h,
    N: tl.constexpr, FRESH: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    b, number, h = row // (length * heads), row // heads % length, row % heads
    end = _row(at, number, at_l, 0, there, TABLE)
    exact = lse.dtype.element_ty
    old = tl.full([ROWS], float("-inf"), exact)
    before = end
    if not FRESH:
        before = _row(at, number, at_l, 1, there, TABLE)
        old = _weight(lse + _where(b, before, h, lse_b, lse_l, lse_h), before, there)
    r0, r1, r2, r3 = end, end, end, end
    x0 = tl.full([ROWS], float("-inf"), exact)
    x1, x2, x3 = x0, x0, x0
    most = old
    if N > 0:
        r0 = _row(at, number, at_l, 2, there, TABLE)
        x0 = _weight(w0 + _where(b, r0, h, w0_b, w0_l, w0_h), r0, there).to(exact)
        most = tl.maximum(most, x0)
    if N > 1:
        r1 = _row(at, number, at_l, 3, there, TABLE)
        x1 = _weight(w1 + _where(b, r1, h, w1_b, w1_l, w1_h), r1, there).to(exact)
        most = tl.maximum(most, x1)
    if N > 2:
        r2 = _row(at, number, at_l, 4, there, TABLE)
        x2 = _weight(w2 + _where(b, r2, h, w2_b, w2_l, w2_h), r2, there).to(exact)
        most = tl.maximum(most, x2)
    if N > 3:
        r3 = _row(at, number, at_l, 5, there, TABLE)
        x3 = _weight(w3 + _where(b, r3, h, w3_b, w3_l, w3_h), r3, there).to(exact)
        most = tl.maximum(most, x3)
    most = tl.where(most == float("-inf"), 0.0, most)  # none has seen anything
    kept, x0, x1, x2, x3 = tl.exp(old - most), tl.exp(x0 - most), tl.exp(x1 - most), tl.exp(x2 - most), tl.exp(x3 - most)
    total = kept + x0 + x1 + x2 + x3
    some = total != 0  # also a NaN, which stays one
    total = tl.where(some, total, 1.0)
    tl.store(lse + _where(b, end, h, lse_b, lse_l, lse_h), tl.where(some, most + tl.log(total), float("-inf")), mask=there)
    column = tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (column < width)
    merged = tl.zeros([ROWS, WIDTH], EXACT)
    if not FRESH:
        merged = _weigh(merged, out + _where(b, before, h, out_b, out_l, out_h)[:, None] + column, inside, kept / total)
    if N > 0:
        merged = _weigh(merged, p0 + _where(b, r0, h, p0_b, p0_l, p0_h)[:, None] + column, inside, x0 / total)
    if N > 1:
        merged = _weigh(merged, p1 + _where(b, r1, h, p1_b, p1_l, p1_h)[:, None] + column, inside, x1 / total)
    if N > 2:
        merged = _weigh(merged, p2 + _where(b, r2, h, p2_b, p2_l, p2_h)[:, None] + column, inside, x2 / total)
    if N > 3:
        merged = _weigh(merged, p3 + _where(b, r3, h, p3_b, p3_l, p3_h)[:, None] + column, inside, x3 / total)
    into_at = into + _where(b, end, h, into_b, into_l, into_h)[:, None] + column
    tl.store(into_at, merged.to(into.dtype.element_ty), mask=inside)


def merge_(
    out: Tensor,
    lse: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    fresh: bool = False,
    into: Tensor | None = None,
    at: Tensor | None = None,
) -> None:
    """`merge.merge_all_` of up to `MOST` results in one kernel; any strides with the last dim contiguous.

    `at`, int32 ``[n, 2 + parts]``, names the rows that are put together: where each ends, where it was before (-1 for nowhere), and
    its row in each part (-1 for none); without it row `i` of all is one.
    """
    into = out if into is None else into
    batch, length, heads, width = out.shape if at is None else (out.shape[0], len(at), *out.shape[2:])
    rows = batch * length * heads
    assert len(parts) <= MOST
    outs, lses = ([x[n] for x in (*parts, *[parts[0] if parts else (into, lse)] * (MOST - len(parts)))] for n in range(2))
    strides = [stride for x in (into, out, lse, *outs, *lses) for stride in x.stride()[:3]]
    table, at_l = (lse, 0) if at is None else (at, at.stride(0))
    exact = tl.float64 if out.element_size() == 8 else tl.float32
    if rows:
        _merge[(triton.cdiv(rows, ROWS),)](
            *(into, out, lse, *outs, *lses, table, rows, length, heads, width, at_l, *strides, len(parts), fresh, at is not None),
            ROWS=ROWS, WIDTH=triton.next_power_of_2(width), EXACT=exact,
        )  # fmt: skip


@triton.jit
def _term(at, row, inside):  # type: ignore[no-untyped-def]
    """A term of a sum, 0 where the row has none of it."""
    return tl.load(at, mask=inside & (row >= 0)[:, None], other=0.0)


@triton.jit(do_not_specialize=("rows", "length", "at_l"))
def _add(  # type: ignore[no-untyped-def]
    out, p0, p1, p2, p3, p4, at, rows, length, heads, width, at_l, out_b, out_l, out_h,
    p0_b, p0_l, p0_h, p1_b, p1_l, p1_h, p2_b, p2_l, p2_h, p3_b, p3_l, p3_h, p4_b, p4_l, p4_h,
    N: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    b, number, h = row // (length * heads), row // heads % length, row % heads
    column = tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (column < width)
    end = _row(at, number, at_l, 0, there, TABLE)
    r0 = _row(at, number, at_l, 1, there, TABLE)
    total = _term(p0 + _where(b, r0, h, p0_b, p0_l, p0_h)[:, None] + column, r0, inside).to(EXACT)
    if N > 1:
        r1 = _row(at, number, at_l, 2, there, TABLE)
        total += _term(p1 + _where(b, r1, h, p1_b, p1_l, p1_h)[:, None] + column, r1, inside).to(EXACT)
    if N > 2:
        r2 = _row(at, number, at_l, 3, there, TABLE)
        total += _term(p2 + _where(b, r2, h, p2_b, p2_l, p2_h)[:, None] + column, r2, inside).to(EXACT)
    if N > 3:
        r3 = _row(at, number, at_l, 4, there, TABLE)
        total += _term(p3 + _where(b, r3, h, p3_b, p3_l, p3_h)[:, None] + column, r3, inside).to(EXACT)
    if N > 4:
        r4 = _row(at, number, at_l, 5, there, TABLE)
        total += _term(p4 + _where(b, r4, h, p4_b, p4_l, p4_h)[:, None] + column, r4, inside).to(EXACT)
    tl.store(out + _where(b, end, h, out_b, out_l, out_h)[:, None] + column, total.to(out.dtype.element_ty), mask=inside)


def add_(out: Tensor, terms: Sequence[Tensor], at: Tensor | None = None) -> None:
    """`sums.add_all` of up to ``MOST + 1`` terms in one kernel; any strides with the last dim contiguous.

    `at`, int32 ``[n, 1 + terms]``, names the rows that are added up: where each ends, and its row in each term, -1 for none.
    """
    batch, length, heads, width = out.shape if at is None else (out.shape[0], len(at), *out.shape[2:])
    rows = batch * length * heads
    assert len(terms) <= MOST + 1
    given = [*terms, *[terms[0]] * (MOST + 1 - len(terms))]
    strides = [stride for x in (out, *given) for stride in x.stride()[:3]]
    table, at_l = (out, 0) if at is None else (at, at.stride(0))
    exact = tl.float64 if max(x.element_size() for x in (out, *terms)) == 8 else tl.float32
    if rows:
        _add[(triton.cdiv(rows, ROWS),)](
            *(out, *given, table, rows, length, heads, width, at_l, *strides, len(terms), at is not None),
            ROWS=ROWS, WIDTH=triton.next_power_of_2(width), EXACT=exact,
        )  # fmt: skip
