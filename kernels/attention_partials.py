"""Combines partial results of attention: those of queries whose keys several programs have shared (stream-K).

A partial result is the attention to a part of the keys, normalised, in float32, and its log-sum-exp.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from kernels.common import to_e4m3

COMBINE_ROWS = 16  # queries of a program of `combine_partials`


@triton.jit(do_not_specialize=["heads", "queries"])
def combine_partials(o, lse, o_scale, partial_o, partial_lse, max_v_scale, combines, heads, queries, o_batch, o_row,
                     o_head, QUANTIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                     ROWS: tl.constexpr):  # fmt: skip
    """Combines the partial results of ROWS queries of an output tile: o = sum_i exp(lse_i - lse) o_i.

    A row of `combines` is a row of `StreamKSchedule.combines`. Each partial result has BLOCK_M queries. If QUANTIZE, o
    is e4m3 with the scale `max_v_scale`.
    """
    combine = combines + 5 * tl.program_id(0)
    column, row, row_end = tl.load(combine), tl.load(combine + 1), tl.load(combine + 2)
    first_partial, num_partials = tl.load(combine + 3).to(tl.int64), tl.load(combine + 4)
    offs_m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, D)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(num_partials):
        m_i = tl.maximum(m_i, tl.load(partial_lse + (first_partial + i) * BLOCK_M + offs_m))
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for i in range(num_partials):
        rows = (first_partial + i) * BLOCK_M + offs_m
        weight = tl.exp(tl.load(partial_lse + rows) - m_i)
        l_i += weight
        acc += weight[:, None] * tl.load(partial_o + rows[:, None] * D + offs_d[None, :])
    batch, head = (column // heads).to(tl.int64), (column % heads).to(tl.int64)
    mask_m = row + offs_m < row_end
    rows = (row + offs_m).to(tl.int64)
    o_ptrs = o + batch * o_batch + head * o_head + rows[:, None] * o_row + offs_d[None, :]
    acc /= l_i[:, None]
    if QUANTIZE:
        scale = tl.load(max_v_scale)
        acc = to_e4m3(acc * (1.0 / scale), o)
        tl.store(o_scale + batch * queries + rows, tl.zeros_like(l_i) + scale, mask=mask_m & (head == 0))
    tl.store(o_ptrs, acc.to(o.dtype.element_ty), mask=mask_m[:, None])
    tl.store(lse + (batch * queries + rows) * heads + head, m_i + tl.log(l_i), mask=mask_m)
