"""The online-softmax merge as one Triton kernel: it reads a result once and writes once, where a chain of torch ops takes 38 bytes
an element. For results on an accelerator; in Triton's interpreter (``TRITON_INTERPRET=1``) it runs on CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of one program: a row is what a head has for a token."""


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out, lse, part, part_lse, rows, length, heads, width,
    out_b, out_l, out_h, lse_b, lse_l, lse_h, part_b, part_l, part_h, part_lse_b, part_lse_l, part_lse_h,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    b, l, h = row // (length * heads), row // heads % length, row % heads
    old_at = lse + b * lse_b + l * lse_l + h * lse_h
    old = tl.load(old_at, mask=there, other=0.0)
    new = tl.load(part_lse + b * part_lse_b + l * part_lse_l + h * part_lse_h, mask=there, other=0.0).to(old.dtype)
    most = tl.maximum(old, new)
    most = tl.where(most == float("-inf"), 0.0, most)  # neither has seen anything
    old_weight, new_weight = tl.exp(old - most), tl.exp(new - most)
    some = old_weight + new_weight > 0
    total = tl.where(some, old_weight + new_weight, 1.0)
    tl.store(old_at, tl.where(some, most + tl.log(total), float("-inf")), mask=there)
    weight = new_weight / total
    column = tl.arange(0, WIDTH)
    inside = there[:, None] & (column < width)[None, :]
    out_at = out + (b * out_b + l * out_l + h * out_h)[:, None] + column[None, :]
    have = tl.load(out_at, mask=inside, other=0.0)
    come = tl.load(part + (b * part_b + l * part_l + h * part_h)[:, None] + column[None, :], mask=inside, other=0.0)
    tl.store(out_at, have + weight.to(have.dtype)[:, None] * (come.to(have.dtype) - have), mask=inside)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merge.merge_` in one kernel; any strides with the last dim contiguous."""
    batch, length, heads, width = out.shape
    rows = batch * length * heads
    tensors = (out, lse, block_out, block_lse)
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    if rows:
        _merge[(triton.cdiv(rows, ROWS),)](
            *tensors, rows, length, heads, width, *strides, ROWS=ROWS, WIDTH=triton.next_power_of_2(width)
        )
