"""The Triton kernels of `kernels.triton`, after FlashAttention-2 (Dao, 2023): the forward, dq and dk with dv.

What a program reads of its span lies in a table of int32, made by `kernels.triton`: which rows it has, which blocks it visits, and
which of these hold only pairs that are seen. Those come first, without masks; the others after them, in any order as sums allow.
Names: `i` are query rows, `j` key rows, each the number of a row in its tensor; ``_at`` are positions in the sequence. Scores are
kept times ``log2(e)``, for `exp2`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-2.3e38)
"""The least score: times ``log2(e)`` it is still finite in fp32."""

QUERY_COLUMNS = tl.constexpr(10)
KEY_COLUMNS = tl.constexpr(6)
VISIT_COLUMNS = tl.constexpr(8)
"""Columns of the tables, see `kernels.triton`."""

CHANGING = ["left", "right", "dropped", "seed_low", "seed_high", "batch0", "head0", "num_tiles", "program0"]
"""Arguments whose value is not worth a compilation."""


@triton.jit
def _load(at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile, zero where a mask that counts says so."""
    if ROWS and COLUMNS:
        return tl.load(at, mask=rows[:, None] & columns[None, :], other=0.0)
    elif ROWS:
        return tl.load(at, mask=rows[:, None], other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=columns[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product, summed in fp32. The interpreter has none of bfloat16; widened before, it is the same."""
    if PRECISION == "wide":
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """x in another dtype. The interpreter cuts off what bfloat16 has not; rounded before, it is the same."""
    if PRECISION == "wide" and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _put(end, total, part, state, rows, columns, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a tile: what has come `AGAIN` (1) is added to the total, which is where it stays if there is `MORE` (2) to come."""
    there = rows[:, None] & columns[None, :]
    if state & 1 != 0:
        part += tl.load(total, mask=there, other=0.0)
    if state & 2 != 0:
        tl.store(total, part.to(total.dtype.element_ty), mask=there)
    else:
        tl.store(end, _rounded(part, end.dtype.element_ty, PRECISION), mask=there)


@triton.jit
def _at(x, b, h, first, x_b, x_l, x_h, rows, columns):  # type: ignore[no-untyped-def]
    """The rows and columns of a tile that begins at a row of a head."""
    return x + b * x_b + h * x_h + first * x_l + (rows[:, None] * x_l + columns[None, :])


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """By its series where the quotient would lose digits, which a large soft cap multiplies."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.04, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def _scores(products, scale, softcap, added, SOFTCAP: tl.constexpr, ADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scores times ``log2(e)``, and their derivative by the scaled products where there is a soft cap.

    The least finite numbers stay finite: masks of them hide nothing where they are all that a row has.
    """
    if SOFTCAP:
        bent = _tanh(products * (scale / softcap))
        s, bend = bent * softcap, 1.0 - bent * bent
    else:
        s, bend = products * scale, 1.0
    if ADDED:
        s += added
        s = tl.where((s < LEAST) & (s > float("-inf")), LEAST, s)
    return s * LOG2E, bend


@triton.jit
def _kept(q_at, k_at, head, batch, seed_low, seed_high, dropped):  # type: ignore[no-untyped-def]
    """Which pairs dropout leaves: those whose word of `base.philox` is above `dropped`. The ints are 32 bits without a sign."""
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox_impl(q_at.to(tl.uint32), k_at.to(tl.uint32), head.to(tl.uint32), batch.to(tl.uint32), low, high)
    return word > dropped.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=CHANGING)
def forward(  # type: ignore[no-untyped-def]
    q, k, v, out, merged, lse, tiles, alibi, bias, q_at, far_at, k_at,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, out_b, out_l, out_h, merged_b, merged_l, merged_h, lse_b, lse_h, lse_l,
    alibi_b, alibi_h, bias_h, bias_l, bias_t,
    num_tiles, heads, group, left, right, scale, softcap, kept_scale, dropped, seed_low, seed_high, batch0, head0,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of query rows in a head: merged with what is there, by its state as in `_put`."""
    program = tl.program_id(0)
    tile = tiles + program % num_tiles * QUERY_COLUMNS
    b, h = (program // num_tiles // heads).to(tl.int64), (program // num_tiles % heads).to(tl.int64)
    first, end, reach, reach_end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    align, whole, whole_end, blocks = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    at, state = tl.load(tile + 8).to(tl.int64), tl.load(tile + 9)
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, KEYS)
    row = tl.arange(0, ROWS)
    i = first + row
    there = i < end
    query = _load(_at(q, b, h, first.to(tl.int64), q_b, q_l, q_h, row, d), there, d < D, True, D != BLOCK_D)
    k_from = k + b * k_b + h // group * k_h + (n[:, None] * k_l + d[None, :])
    v_from = v + b * v_b + h // group * v_h + (n[:, None] * v_l + dv[None, :])
    if DROPOUT:
        at_i = tl.load(q_at + i, mask=there, other=0).to(tl.int32)
    slope, far = 0.0, 0
    if ALIBI:
        slope = tl.load(alibi + b * alibi_b + h * alibi_h)
        far = tl.load(far_at + i, mask=there, other=0).to(tl.int32)[:, None]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for masked in tl.static_range(2):
        count = whole_end - whole
        if masked:
            count = blocks - count
        for t in range(0, count):
            if masked:
                block = tl.where(t < whole, t, t + whole_end - whole)
            else:
                block = t + whole
            start = reach + block * KEYS
            j = start + n
            key = _load(k_from + start.to(tl.int64) * k_l, j < reach_end, d < D, masked, D != BLOCK_D)
            s = _dot(query, tl.trans(key), PRECISION)
            added = 0.0
            if ALIBI or BIAS or DROPOUT:
                at_j = tl.load(k_at + j, mask=j < reach_end, other=0).to(tl.int32)
                if ALIBI:
                    added -= slope * tl.abs(at_j[None, :] - far).to(tl.float32)
                if BIAS:
                    bias_at = bias + h * bias_h + i.to(tl.int64)[:, None] * bias_l + at_j.to(tl.int64)[None, :] * bias_t
                    added += tl.load(bias_at, mask=there[:, None] & (j < reach_end)[None, :], other=0.0).to(tl.float32)
            if PLAIN:
                unit = scale * LOG2E
            else:
                unit = 1.0
                s, _ = _scores(s, scale, softcap, added, SOFTCAP, ALIBI or BIAS)
            if masked:
                far_off = j[None, :] - i[:, None] - align
                s = tl.where((far_off >= -left) & (far_off <= right) & (j < reach_end)[None, :], s, float("-inf"))
            higher = tl.maximum(most, tl.max(s, 1) * unit)
            less = higher
            if masked or BIAS:
                less = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
            weights = tl.exp2(s * unit - less[:, None])
            fading = tl.exp2(most - less)
            total = total * fading + tl.sum(weights, 1)
            most = higher
            if DROPOUT:
                kept = _kept(at_i[:, None], at_j[None, :], head0 + h, batch0 + b, seed_low, seed_high, dropped)
                weights = tl.where(kept, weights, 0.0)
            value = _load(v_from + start.to(tl.int64) * v_l, j < reach_end, dv < DV, masked, DV != BLOCK_DV)
            acc = acc * fading[:, None] + _dot(weights.to(value.dtype), value, PRECISION)
    some = total != 0  # also a NaN, which stays one
    total = tl.where(some, total, 1.0)
    acc = acc * (kept_scale / total)[:, None]
    log = tl.where(some, (most + tl.log2(total)) / LOG2E, float("-inf")).to(lse.dtype.element_ty)
    lse_at = lse + b * lse_b + h * lse_h + (at + row) * lse_l
    merged_at = _at(merged, b, h, at, merged_b, merged_l, merged_h, row, dv)
    inside = there[:, None] & (dv < DV)[None, :]
    if state & 1 != 0:
        before, result = tl.load(lse_at, mask=there, other=float("-inf")), tl.load(merged_at, mask=inside, other=0.0)
        top = tl.maximum(before, log)
        top = tl.where(top == float("-inf"), 0.0, top)
        old, new = tl.exp(before - top), tl.exp(log - top)
        both = tl.where(old + new != 0, old + new, 1.0)
        log = tl.where(old + new != 0, top + tl.log(both), float("-inf"))
        acc = acc * (new / both).to(tl.float32)[:, None] + result.to(tl.float32) * (old / both).to(tl.float32)[:, None]
    tl.store(lse_at, log, mask=there)
    if state & 2 != 0:
        tl.store(merged_at, acc.to(merged.dtype.element_ty), mask=inside)
    else:
        result = _rounded(acc, out.dtype.element_ty, PRECISION)
        tl.store(_at(out, b, h, at, out_b, out_l, out_h, row, dv), result, mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def grad_queries(  # type: ignore[no-untyped-def]
    q, k, v, out, d_out, lse, delta, logs, dq, dq_sum, d_bias, tiles, alibi, bias, q_at, far_at, k_at,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, out_b, out_l, out_h, do_b, do_l, do_h, lse_b, lse_h, lse_l, delta_b, delta_h,
    dq_b, dq_l, dq_h, sum_b, sum_l, sum_h, db_h, db_l, db_t, alibi_b, alibi_h, bias_h, bias_l, bias_t,
    num_tiles, heads, group, left, right, scale, softcap, kept_scale, dropped, seed_low, seed_high, batch0, head0, program0,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, D_BIAS: tl.constexpr, ATOMIC: tl.constexpr, D_LSE: tl.constexpr,
):  # fmt: skip
    """dq and the gradient of the bias of a tile of query rows in a head; adds ``out . d_out`` of its rows to `delta`.

    With `D_LSE` there is less the gradient of the log-sum-exp in `delta`, else nothing. `logs` gets the log-sum-exp as `grad_keys`
    reads it: times ``log2(e)``, and +inf of rows that see nothing, whose weights are then 0.
    """
    program = tl.program_id(0) + program0
    tile = tiles + program % num_tiles * QUERY_COLUMNS
    b, h = (program // num_tiles // heads).to(tl.int64), (program // num_tiles % heads).to(tl.int64)
    first, end, reach, reach_end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    align, whole, whole_end, blocks = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, KEYS)
    row = tl.arange(0, ROWS)
    i, base = first + row, first.to(tl.int64)
    there = i < end
    query = _load(_at(q, b, h, base, q_b, q_l, q_h, row, d), there, d < D, True, D != BLOCK_D)
    result = _load(_at(out, b, h, base, out_b, out_l, out_h, row, dv), there, dv < DV, True, DV != BLOCK_DV)
    given = _load(_at(d_out, b, h, base, do_b, do_l, do_h, row, dv), there, dv < DV, True, DV != BLOCK_DV)
    common = tl.sum(result.to(tl.float32) * given.to(tl.float32), 1)
    if D_LSE:
        common += tl.load(delta + b * delta_b + h * delta_h + i, mask=there, other=0.0)
    tl.store(delta + b * delta_b + h * delta_h + i, common, mask=there)
    given = given.to(v.dtype.element_ty)
    log = tl.load(lse + b * lse_b + h * lse_h + i.to(tl.int64) * lse_l, mask=there, other=float("inf")) * LOG2E
    log = tl.where(log == float("-inf"), float("inf"), log)
    tl.store(logs + b * delta_b + h * delta_h + i, log, mask=there)
    k_from = k + b * k_b + h // group * k_h + (n[:, None] * k_l + d[None, :])
    v_from = v + b * v_b + h // group * v_h + (n[:, None] * v_l + dv[None, :])
    if DROPOUT:
        at_i = tl.load(q_at + i, mask=there, other=0).to(tl.int32)
    slope, far = 0.0, 0
    if ALIBI:
        slope = tl.load(alibi + b * alibi_b + h * alibi_h)
        far = tl.load(far_at + i, mask=there, other=0).to(tl.int32)[:, None]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        count = whole_end - whole
        if masked:
            count = blocks - count
        for t in range(0, count):
            if masked:
                block = tl.where(t < whole, t, t + whole_end - whole)
            else:
                block = t + whole
            start = reach + block * KEYS
            j = start + n
            key = _load(k_from + start.to(tl.int64) * k_l, j < reach_end, d < D, masked, D != BLOCK_D)
            value = _load(v_from + start.to(tl.int64) * v_l, j < reach_end, dv < DV, masked, DV != BLOCK_DV)
            s = _dot(query, tl.trans(key), PRECISION)
            added = 0.0
            if ALIBI or BIAS or DROPOUT:
                at_j = tl.load(k_at + j, mask=j < reach_end, other=0).to(tl.int32)
                if ALIBI:
                    added -= slope * tl.abs(at_j[None, :] - far).to(tl.float32)
                if BIAS:
                    bias_at = bias + h * bias_h + i.to(tl.int64)[:, None] * bias_l + at_j.to(tl.int64)[None, :] * bias_t
                    added += tl.load(bias_at, mask=there[:, None] & (j < reach_end)[None, :], other=0.0).to(tl.float32)
            if PLAIN:
                unit = scale * LOG2E
            else:
                unit = 1.0
                s, bend = _scores(s, scale, softcap, added, SOFTCAP, ALIBI or BIAS)
            if masked:
                far_off = j[None, :] - i[:, None] - align
                s = tl.where((far_off >= -left) & (far_off <= right) & (j < reach_end)[None, :], s, float("-inf"))
            weights = tl.exp2(s * unit - log[:, None])
            d_weights = _dot(given, tl.trans(value), PRECISION)
            if DROPOUT:
                kept = _kept(at_i[:, None], at_j[None, :], head0 + h, batch0 + b, seed_low, seed_high, dropped)
                d_weights = tl.where(kept, d_weights * kept_scale, 0.0)
            d_scores = weights * (d_weights - common[:, None])
            if D_BIAS:
                d_bias_at = d_bias + h * db_h + i.to(tl.int64)[:, None] * db_l + at_j.to(tl.int64)[None, :] * db_t
                both = there[:, None] & (j < reach_end)[None, :]
                if ATOMIC:
                    tl.atomic_add(d_bias_at, d_scores.to(d_bias.dtype.element_ty), mask=both)
                else:
                    held = tl.load(d_bias_at, mask=both, other=0.0)
                    tl.store(d_bias_at, held + d_scores.to(held.dtype), mask=both)
            if SOFTCAP:
                d_scores *= bend
            acc += _dot(d_scores.to(key.dtype), key, PRECISION)
    end, total = _at(dq, b, h, base, dq_b, dq_l, dq_h, row, d), _at(dq_sum, b, h, base, sum_b, sum_l, sum_h, row, d)
    _put(end, total, acc * scale, tl.load(tile + 9), there, d < D, PRECISION)


@triton.jit(do_not_specialize=CHANGING)
def grad_keys(  # type: ignore[no-untyped-def]
    q, k, v, d_out, delta, logs, dk, dk_sum, d_v, dv_sum, tiles, visits, alibi, bias, q_at, far_at, k_at,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, do_b, do_l, do_h, delta_b, delta_h,
    dk_b, dk_l, dk_h, ks_b, ks_l, ks_h, dv_b, dv_l, dv_h, vs_b, vs_l, vs_h, alibi_b, alibi_h, bias_h, bias_l, bias_t,
    num_tiles, heads, group, left, right, scale, softcap, kept_scale, dropped, seed_low, seed_high, batch0, head0,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of key rows in a key head, over its query heads and all spans that read it. Tiles lie keys by rows."""
    program = tl.program_id(0)
    tile = tiles + program % num_tiles * KEY_COLUMNS
    heads_k = heads // group
    b, hk = (program // num_tiles // heads_k).to(tl.int64), (program // num_tiles % heads_k).to(tl.int64)
    first, end, visit, visit_end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    d, dv, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, ROWS)
    column = tl.arange(0, KEYS)
    j, base = first + column, first.to(tl.int64)
    there = j < end
    key = _load(_at(k, b, hk, base, k_b, k_l, k_h, column, d), there, d < D, True, D != BLOCK_D)
    value = _load(_at(v, b, hk, base, v_b, v_l, v_h, column, dv), there, dv < DV, True, DV != BLOCK_DV)
    q_from = q + b * q_b + (m[:, None] * q_l + d[None, :])
    do_from = d_out + b * do_b + (m[:, None] * do_l + dv[None, :])
    if ALIBI or BIAS or DROPOUT:
        at_j = tl.load(k_at + j, mask=there, other=0).to(tl.int32)
    acc_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    acc_v = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    for which in range(visit, visit_end):
        at = visits + which * VISIT_COLUMNS
        reach, reach_end, j0, j1 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        align, whole, whole_end, blocks = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
        for masked in tl.static_range(2):
            count = whole_end - whole
            if masked:
                count = blocks - count
            h, turn = hk * group, 0
            for _ in range(0, count * group):  # one loop over heads and blocks, that loads run ahead from head to head
                if masked:
                    block = tl.where(turn < whole, turn, turn + whole_end - whole)
                else:
                    block = turn + whole
                start = reach + block * ROWS
                i, start = start + m, start.to(tl.int64)
                query = _load(q_from + h * q_h + start * q_l, i < reach_end, d < D, masked, D != BLOCK_D)
                given = _load(do_from + h * do_h + start * do_l, i < reach_end, dv < DV, masked, DV != BLOCK_DV).to(value.dtype)
                rows_in = i < reach_end
                in_head = b * delta_b + h * delta_h
                if masked:
                    log = tl.load(logs + in_head + i, mask=rows_in, other=float("inf"))
                    common = tl.load(delta + in_head + i, mask=rows_in, other=0.0)
                else:
                    log, common = tl.load(logs + in_head + i), tl.load(delta + in_head + i)
                s = _dot(key, tl.trans(query), PRECISION)
                added = 0.0
                if ALIBI:
                    slope = tl.load(alibi + b * alibi_b + h * alibi_h)
                    distance = at_j[:, None] - tl.load(far_at + i, mask=rows_in, other=0).to(tl.int32)[None, :]
                    added -= slope * tl.abs(distance).to(tl.float32)
                if BIAS:
                    bias_at = bias + h * bias_h + i.to(tl.int64)[None, :] * bias_l + at_j.to(tl.int64)[:, None] * bias_t
                    added += tl.load(bias_at, mask=rows_in[None, :] & there[:, None], other=0.0).to(tl.float32)
                if PLAIN:
                    unit = scale * LOG2E
                else:
                    unit = 1.0
                    s, bend = _scores(s, scale, softcap, added, SOFTCAP, ALIBI or BIAS)
                if masked:
                    far_off = j[:, None] - i[None, :] - align
                    inside = ((j >= j0) & (j < j1))[:, None] & rows_in[None, :]
                    s = tl.where((far_off >= -left) & (far_off <= right) & inside, s, float("-inf"))
                weights = tl.exp2(s * unit - log[None, :])
                d_weights = _dot(value, tl.trans(given), PRECISION)
                used = weights
                if DROPOUT:
                    at_i = tl.load(q_at + i, mask=rows_in, other=0).to(tl.int32)
                    kept = _kept(at_i[None, :], at_j[:, None], head0 + h, batch0 + b, seed_low, seed_high, dropped)
                    d_weights = tl.where(kept, d_weights * kept_scale, 0.0)
                    used = tl.where(kept, weights, 0.0)
                acc_v += _dot(used.to(given.dtype), given, PRECISION)
                d_scores = weights * (d_weights - common[None, :])
                if SOFTCAP:
                    d_scores *= bend
                acc_k += _dot(d_scores.to(query.dtype), query, PRECISION)
                h += turn + 1 == count
                turn = tl.where(turn + 1 == count, 0, turn + 1)
    end, total = _at(dk, b, hk, base, dk_b, dk_l, dk_h, column, d), _at(dk_sum, b, hk, base, ks_b, ks_l, ks_h, column, d)
    _put(end, total, acc_k * scale, tl.load(tile + 4), there, d < D, PRECISION)
    end, total = _at(d_v, b, hk, base, dv_b, dv_l, dv_h, column, dv), _at(dv_sum, b, hk, base, vs_b, vs_l, vs_h, column, dv)
    _put(end, total, acc_v * kept_scale, tl.load(tile + 5), there, dv < DV, PRECISION)
