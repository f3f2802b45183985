"""Warp-specialised FlashAttention-3 forward for Hopper (sm_90) in Gluon: the "gluon" back-end of `chunk_attention`.

Each program is persistent and computes a list of work tiles. A work tile is a tile of queries of one head, 64 for each
consumer, and a range of keys. One warp, the load partition, copies queries, keys and values into shared memory by TMA.
Warp groups of four warps, the MMA partitions or consumers, compute products (wgmma) and exponentials. They synchronise
through mbarriers alone: a stage of the ring is *full* when its bytes have arrived, and *empty* when all consumers have
read it.

16 bits, 2 consumers:
    The scores of tile j and the product of the weights of tile j - 1 with its values are in flight together. While one
    consumer computes exponentials, the other one occupies the tensor cores. The consumers enforce this order with a
    barrier each, the ping-pong schedule of FlashAttention-3.
FP8, 3 consumers:
    The exponentials of a tile take as long as its products. Each consumer computes one step at a time, and the three
    fill each other's gaps. This leaves registers for accumulating products outside the tensor cores, whose own sums of
    FP8 products have fewer bits than float32.

The weights are computed as 2^(s - m): one fused multiply-add and one MUFU.EX2 per element. The last tile of keys, which
may be partial, is computed first, so that only this tile pays for a mask. kernels/scheduler.py distributes the work
tiles (stream-K). Where several programs share the keys of an output tile, each stores a partial result, and
`combine_partials` combines them.

In FP8 the output can be e4m3 as well, for the linear layer that follows. Its scale is the same for all rows and known
before the launch: a softmax averages values, so that no output of v8 v_scale exceeds 448 max v_scale.

Sources: FlashAttention-3 (arXiv 2407.08608) for the algorithm, SageAttention2 (arXiv 2411.10958) for the FP8
accumulation.
"""

# Types inside device code are Triton's, not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_partials import COMBINE_ROWS, combine_partials
from kernels.common import FP8
from kernels.scheduler import KVRanges, stream_k_schedule_on
from kernels.sm90 import (
    GL_DTYPES,
    WGMMA_M,
    aggregate,
    alloc_barriers,
    exp2,
    mask_scores,
    next_stage,
    read_work_tile,
    smem_layout,
    to_e4m3_x4,
)
from kernels.tuning import LaunchConfig, gpu_of

FP8_SHIFT = gl.constexpr(8.0)  # FP8 weights are rounded as 2^8 p, to use the range of e4m3 from 2^-9 to 448
LN_2 = gl.constexpr(math.log(2))

DEFAULT_CONFIG: LaunchConfig = {"BLOCK_N": 128, "STAGES": 2}  # where nothing was tuned


# --- Kernel ---------------------------------------------------------------------------------------------------------


@aggregate
class WorkQueue:
    """The work tiles of all programs: program p computes those from work_indptr[p] to work_indptr[p + 1]."""

    work_tiles: gl.tensor
    work_indptr: gl.tensor


@aggregate
class Operands:
    """TMA descriptors of q, k and v, and how many columns batches and heads are apart in them."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    q_batch: gl.tensor
    q_head: gl.tensor
    k_batch: gl.tensor
    k_head: gl.tensor
    v_batch: gl.tensor
    v_head: gl.tensor


@aggregate
class SharedTiles:
    """Shared memory: a tile of queries for each consumer, the rings of keys and values, and the barriers of each."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


@aggregate
class Outputs:
    """Where results are stored, the workspace of partial results, the scales of v in FP8, and o's strides.

    `max_v_scale` is the scale of an e4m3 output, and `o_scale` where it is stored for each row.
    """

    o: gl.tensor
    lse: gl.tensor
    o_scale: gl.tensor
    max_v_scale: gl.tensor
    partial_o: gl.tensor
    partial_lse: gl.tensor
    v_scale: gl.tensor
    queries: gl.tensor
    o_batch: gl.tensor
    o_row: gl.tensor
    o_head: gl.tensor


@gluon.jit
def load_partition(work, operands, tiles, heads,
                   IS_FP8: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Copies the tiles of the program's work tiles to shared memory, in the order in which the consumers read them."""
    q_desc, k_desc, v_desc = operands.q_desc, operands.k_desc, operands.v_desc
    stage = 0
    phase = 0
    q_phase = 0
    for i in range(gl.load(work.work_indptr + gl.program_id(0)), gl.load(work.work_indptr + gl.program_id(0) + 1)):
        column, row, _row_end, kv_start, kv_end, _partial = read_work_tile(work.work_tiles, i)
        batch, head = column // heads, column % heads
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(tiles.q_empty.index(consumer), q_phase ^ 1)
            mbarrier.expect(tiles.q_full.index(consumer), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc,
                [row + consumer * WGMMA_M, batch * operands.q_batch + head * operands.q_head],
                tiles.q_full.index(consumer),
                tiles.q.index(consumer),
            )
        q_phase ^= 1
        k_column = batch * operands.k_batch + head * operands.k_head
        v_column = batch * operands.v_batch + head * operands.v_head
        num_kv_tiles = gl.cdiv(kv_end - kv_start, BLOCK_N)
        for j in range(num_kv_tiles):
            key = kv_start + (num_kv_tiles - 1 - j) * BLOCK_N
            mbarrier.wait(tiles.k_empty.index(stage), phase ^ 1)
            mbarrier.expect(tiles.k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [key, k_column], tiles.k_full.index(stage), tiles.k.index(stage))
            mbarrier.wait(tiles.v_empty.index(stage), phase ^ 1)
            mbarrier.expect(tiles.v_full.index(stage), v_desc.block_type.nbytes)
            if IS_FP8:  # v is transposed
                tma.async_copy_global_to_shared(
                    v_desc, [v_column, key], tiles.v_full.index(stage), tiles.v.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    v_desc, [key, v_column], tiles.v_full.index(stage), tiles.v.index(stage)
                )
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def to_mma_operand(p, dtype: gl.constexpr, layout: gl.constexpr, IS_FP8: gl.constexpr):
    """Converts the weights to the left operand of their product with v, without moving data between registers.

    In FP8 this permutes the keys of each group of 16. The values lie in memory in the same order, which `interleave` in
    kernels/chunk_attention_fp8.py defines.
    """
    if IS_FP8:
        N: gl.constexpr = p.shape[1]
        p = p.reshape([WGMMA_M, N // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([WGMMA_M, N])
        p = to_e4m3_x4(gl.convert_layout(p, layout, assert_trivial=True))
    else:
        p = gl.convert_layout(p.to(dtype), layout, assert_trivial=True)
    return p


@gluon.jit
def epilogue(acc, m_i, l_i, out, work_tiles, i, heads, CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr,
             IS_FP8: gl.constexpr, QUANTIZE: gl.constexpr):  # fmt: skip
    """Normalises the output of a work tile, and stores it with its log-sum-exp, or a partial result in float32."""
    # The work tile is read again, so that it holds no registers during the loop.
    column, row, row_end, _kv_start, _kv_end, partial = read_work_tile(work_tiles, i)
    D: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    batch, head = column // heads, column % heads
    acc = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, layout))[:, None]
    offs_d = gl.arange(0, D, gl.SliceLayout(0, layout))
    if IS_FP8:
        acc = acc * gl.load(out.v_scale + column * D + offs_d)[None, :]
    lse = (m_i + gl.log2(l_i)) * LN_2
    offs_m = CONSUMER_ID * WGMMA_M + gl.arange(0, WGMMA_M, gl.SliceLayout(1, layout))
    offs_lse = CONSUMER_ID * WGMMA_M + gl.arange(0, WGMMA_M, m_i.type.layout)  # the same rows in the layout of lse
    if partial < 0:
        # What belongs to a row goes first: its registers are free before those of e4m3 output are needed.
        rows = (batch * out.queries + row + offs_lse).to(gl.int64)
        gl.store(out.lse + rows * heads + head, lse, mask=row + offs_lse < row_end)
        if QUANTIZE:
            scale = gl.load(out.max_v_scale)
            if head == 0:
                gl.store(out.o_scale + rows, gl.zeros_like(lse) + scale, mask=row + offs_lse < row_end)
            o = to_e4m3_x4(acc * (1.0 / scale))
        else:
            o = acc.to(out.o.dtype.element_ty)
        o_ptrs = out.o + batch.to(gl.int64) * out.o_batch + head.to(gl.int64) * out.o_head
        o_ptrs = o_ptrs + ((row + offs_m).to(gl.int64) * out.o_row)[:, None] + offs_d[None, :]
        gl.store(o_ptrs, o, mask=(row + offs_m < row_end)[:, None])
    else:
        first_row = partial.to(gl.int64) * (CONSUMERS * WGMMA_M)
        gl.store(out.partial_o + first_row * D + (offs_m * D)[:, None] + offs_d[None, :], acc)
        gl.store(out.partial_lse + first_row + offs_lse, lse)


@gluon.jit
def mma_partition_pingpong(work, tiles, order_bars, out, qk_scale, heads,
                           CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
                           D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A consumer in 16 bits: the scores of a tile and the product with the previous tile's values overlap."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q = tiles.q.index(CONSUMER_ID)
    stage = 0
    phase = 0
    q_phase = 0
    order_phase = 0
    for i in range(gl.load(work.work_indptr + gl.program_id(0)), gl.load(work.work_indptr + gl.program_id(0) + 1)):
        _column, _row, _row_end, kv_start, kv_end, _partial = read_work_tile(work.work_tiles, i)
        num_kv_tiles = gl.cdiv(kv_end - kv_start, BLOCK_N)
        zeros = gl.zeros([WGMMA_M, BLOCK_N], gl.float32, s_layout)
        mbarrier.wait(tiles.q_full.index(CONSUMER_ID), q_phase)
        q_phase ^= 1
        mbarrier.wait(tiles.k_full.index(stage), phase)
        s = warpgroup_mma(q, tiles.k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = mask_scores(warpgroup_mma_wait(0, deps=[s]), kv_end - kv_start - (num_kv_tiles - 1) * BLOCK_N)
        mbarrier.arrive(tiles.k_empty.index(stage))
        m_i = gl.max(s, 1) * qk_scale
        p = exp2(s * qk_scale - m_i[:, None])
        l_i = gl.sum(p, 1)
        acc = gl.zeros([WGMMA_M, D], gl.float32, o_layout)
        for _ in range(1, num_kv_tiles):
            v_stage, v_phase = stage, phase
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(tiles.k_full.index(stage), phase)
            mbarrier.wait(order_bars.index(CONSUMER_ID), order_phase)
            order_phase ^= 1
            s = warpgroup_mma(q, tiles.k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(tiles.v_full.index(v_stage), v_phase)
            p_operand = to_mma_operand(p, tiles.v.dtype, p_layout, False)
            acc = warpgroup_mma(p_operand, tiles.v.index(v_stage), acc, is_async=True)
            mbarrier.arrive(order_bars.index((CONSUMER_ID + 1) % CONSUMERS))
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(tiles.k_empty.index(stage))
            m_ij = gl.maximum(m_i, gl.max(s, 1) * qk_scale)
            p = exp2(s * qk_scale - m_ij[:, None])
            alpha = exp2(m_i - m_ij)
            l_i = l_i * alpha + gl.sum(p, 1)
            m_i = m_ij
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(tiles.v_empty.index(v_stage))
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        mbarrier.arrive(tiles.q_empty.index(CONSUMER_ID))
        mbarrier.wait(tiles.v_full.index(stage), phase)
        p_operand = to_mma_operand(p, tiles.v.dtype, p_layout, False)
        acc = warpgroup_mma(p_operand, tiles.v.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(tiles.v_empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        epilogue(acc, m_i, l_i, out, work.work_tiles, i, heads, CONSUMER_ID, CONSUMERS, False, False)


@gluon.jit
def attention_step_fp8(acc, m_i, l_i, q, qk_scale, tiles, stage, phase, num_keys,
                       BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """One tile of keys of the online softmax in FP8. If MASKED, only the first `num_keys` keys count.

    The tensor cores sum the BLOCK_N products of this tile alone. The sum over tiles is in float32.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    mbarrier.wait(tiles.k_full.index(stage), phase)
    s = warpgroup_mma(
        q, tiles.k.index(stage).permute((1, 0)), gl.zeros([WGMMA_M, BLOCK_N], gl.float32, s_layout),
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(tiles.k_empty.index(stage))
    if MASKED:
        s = mask_scores(s, num_keys)
    m_ij = gl.maximum(m_i, gl.max(s, 1) * qk_scale - FP8_SHIFT)
    p = exp2(s * qk_scale[:, None] - m_ij[:, None])
    alpha = exp2(m_i - m_ij)
    l_i = l_i * alpha + gl.sum(p, 1)
    p_operand = to_mma_operand(p, tiles.v.dtype, gl.DotOperandLayout(0, o_layout, 4), True)
    mbarrier.wait(tiles.v_full.index(stage), phase)
    pv = warpgroup_mma(
        p_operand, tiles.v.index(stage).permute((1, 0)), gl.zeros([WGMMA_M, D], gl.float32, o_layout),
        use_acc=False, is_async=True,
    )  # fmt: skip
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    acc += warpgroup_mma_wait(0, deps=[pv])
    mbarrier.arrive(tiles.v_empty.index(stage))
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, m_ij, l_i, stage, phase


@gluon.jit
def mma_partition_sequential(work, tiles, out, q_scale, k_scale, softmax_scale_log2, heads,
                             CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
                             D: gl.constexpr, STAGES: gl.constexpr, QUANTIZE: gl.constexpr):  # fmt: skip
    """A consumer in FP8: it finishes one tile of keys before it starts the next."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = tiles.q.index(CONSUMER_ID)
    stage = 0
    phase = 0
    q_phase = 0
    for i in range(gl.load(work.work_indptr + gl.program_id(0)), gl.load(work.work_indptr + gl.program_id(0) + 1)):
        column, row, row_end, kv_start, kv_end, _partial = read_work_tile(work.work_tiles, i)
        batch, head = column // heads, column % heads
        num_kv_tiles = gl.cdiv(kv_end - kv_start, BLOCK_N)
        rows = row + CONSUMER_ID * WGMMA_M + gl.arange(0, WGMMA_M, s_rows)
        q_scale_ptrs = q_scale + (batch * out.queries + rows).to(gl.int64) * heads + head
        q_scales = gl.load(q_scale_ptrs, mask=rows < row_end, other=0.0)
        qk_scale = q_scales * (gl.load(k_scale + column) * softmax_scale_log2)
        m_i = gl.full([WGMMA_M], float("-inf"), gl.float32, s_rows)
        l_i = gl.zeros([WGMMA_M], gl.float32, s_rows)
        acc = gl.zeros([WGMMA_M, D], gl.float32, o_layout)
        mbarrier.wait(tiles.q_full.index(CONSUMER_ID), q_phase)
        q_phase ^= 1
        acc, m_i, l_i, stage, phase = attention_step_fp8(
            acc, m_i, l_i, q, qk_scale, tiles, stage, phase, kv_end - kv_start - (num_kv_tiles - 1) * BLOCK_N,
            BLOCK_N, D, STAGES, True,
        )  # fmt: skip
        for _ in range(1, num_kv_tiles):
            acc, m_i, l_i, stage, phase = attention_step_fp8(
                acc, m_i, l_i, q, qk_scale, tiles, stage, phase, BLOCK_N, BLOCK_N, D, STAGES, False
            )
        mbarrier.arrive(tiles.q_empty.index(CONSUMER_ID))
        epilogue(acc, m_i, l_i, out, work.work_tiles, i, heads, CONSUMER_ID, CONSUMERS, True, QUANTIZE)


# Without specialisation of these, a single head or lengths divisible by 16 do not compile another kernel.
@gluon.jit(do_not_specialize=["heads", "queries", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head"])
def attention_fwd_sm90(
    q_desc, k_desc, v_desc, o, lse, o_scale, partial_o, partial_lse, work_tiles, work_indptr, q_scale, k_scale, v_scale,
    max_v_scale, softmax_scale_log2, heads, queries, q_batch, q_head, k_batch, k_head, v_batch, v_head, o_batch, o_row,
    o_head, IS_FP8: gl.constexpr, QUANTIZE: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A persistent program: allocates shared memory, and starts the load partition and the MMA partitions."""
    CONSUMERS: gl.constexpr = 3 if IS_FP8 else 2
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, WGMMA_M, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    q_full, q_empty = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)
    k_full, k_empty = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)
    v_full, v_empty = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)
    order_bars = alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    work = WorkQueue(work_tiles, work_indptr)
    operands = Operands(q_desc, k_desc, v_desc, q_batch, q_head, k_batch, k_head, v_batch, v_head)
    tiles = SharedTiles(q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    out = Outputs(o, lse, o_scale, max_v_scale, partial_o, partial_lse, v_scale, queries, o_batch, o_row, o_head)
    # The 65,536 registers are shared by the warp groups; the numbers are registers per thread of all but the first one,
    # which gets the rest.
    if IS_FP8:
        gl.warp_specialize([
            (mma_partition_sequential, (work, tiles, out, q_scale, k_scale, softmax_scale_log2, heads,
                                        0, CONSUMERS, BLOCK_N, D, STAGES, QUANTIZE)),
            (mma_partition_sequential, (work, tiles, out, q_scale, k_scale, softmax_scale_log2, heads,
                                        1, CONSUMERS, BLOCK_N, D, STAGES, QUANTIZE)),
            (mma_partition_sequential, (work, tiles, out, q_scale, k_scale, softmax_scale_log2, heads,
                                        2, CONSUMERS, BLOCK_N, D, STAGES, QUANTIZE)),
            (load_partition, (work, operands, tiles, heads, IS_FP8, CONSUMERS, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        mbarrier.arrive(order_bars.index(0))
        gl.warp_specialize([
            (mma_partition_pingpong, (work, tiles, order_bars, out, softmax_scale_log2, heads,
                                      0, CONSUMERS, BLOCK_N, D, STAGES)),
            (mma_partition_pingpong, (work, tiles, order_bars, out, softmax_scale_log2, heads,
                                      1, CONSUMERS, BLOCK_N, D, STAGES)),
            (load_partition, (work, operands, tiles, heads, IS_FP8, CONSUMERS, BLOCK_N, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def make_desc(x: Tensor, rows: int, columns: int, stride: int, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of x as [rows, columns] with rows `stride` apart, where batch and head are column offsets."""
    return TensorDescriptor(x, [rows, columns], [stride, 1], block, smem_layout(tuple(block), x.dtype))


def num_columns(x: Tensor) -> int:
    """The number of columns of x [batch, tokens, heads, head_dim] in its descriptor: one past the largest offset."""
    return (x.shape[0] - 1) * x.stride(0) + (x.shape[2] - 1) * x.stride(2) + x.shape[3]


def supports(q: Tensor, k: Tensor, v: Tensor, ranges: KVRanges) -> bool:
    """Whether `launch_sm90` takes these operands.

    head_dim must be 64 or 128. TMA needs addresses and row strides divisible by 16 bytes, and column offsets below
    2^31. In FP8, key ranges must start at multiples of 16, because the values are permuted in groups of 16.

    Args:
        q: [batch, queries, heads, head_dim].
        k: [batch, keys, heads, head_dim].
        v: like k, or in FP8 [batch, heads, head_dim, keys].
        ranges: the keys that each group of queries attends to.
    """
    fp8 = q.dtype == FP8
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(1) > 0 and x.stride(1) * x.itemsize % 16 == 0 and num_columns(x) < 2**31
        for x in ((q, k) if fp8 else (q, k, v))
    )
    grouped = not fp8 or (v.is_contiguous() and all(kv_start % 16 == 0 for *_, kv_start, _ in ranges))
    return q.dtype in GL_DTYPES and q.shape[3] in (64, 128) and aligned and grouped


def launch_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None,
    ranges: KVRanges,
    scale: float,
    out_dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by the Hopper kernel, for operands that `supports` accepts.

    Args:
        q: [batch, queries, heads, head_dim].
        k: [batch, keys, heads, head_dim].
        v: like k, or in FP8 [batch, heads, head_dim, keys].
        scales: None, or in FP8 the scales of q [batch, queries, heads], k [batch, heads], v [batch, heads, head_dim].
        ranges: the keys that each group of queries attends to.
        scale: factor of the logits.
        out_dtype: the dtype of o; e4m3 for operands in FP8 only.
        config: launch parameters that replace defaults.

    Returns:
        o [batch, queries, heads, head_dim]; lse, float32 [batch, queries, heads]; and the scale of o's rows, float32
        [batch, queries], all of which are the largest scale of v, or [0] if o is not e4m3.
    """
    batch, queries, heads, head_dim = q.shape
    keys, quantize = k.shape[1], out_dtype == FP8
    parameters: dict[str, Any] = {**DEFAULT_CONFIG, **(config or {})}
    block_n, consumer_m = parameters["BLOCK_N"], WGMMA_M.value
    block_m = consumer_m * (3 if scales else 2)
    num_programs = gpu_of(q.device).multiprocessors
    work = stream_k_schedule_on(q.device, type(q), ranges, block_m, block_n, batch * heads, num_programs)
    q_desc = make_desc(q, queries, num_columns(q), q.stride(1), [consumer_m, head_dim])
    k_desc = make_desc(k, keys, num_columns(k), k.stride(1), [block_n, head_dim])
    if scales:
        v_desc = make_desc(v, batch * heads * head_dim, v.shape[3], v.stride(2), [head_dim, block_n])
        v_strides = heads * head_dim, head_dim
    else:
        v_desc = make_desc(v, keys, num_columns(v), v.stride(1), [block_n, head_dim])
        v_strides = v.stride(0), v.stride(2)
    o = q.new_empty(q.shape, dtype=out_dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o_scale = lse.new_empty((batch, queries) if quantize else (0,))
    max_v_scale = scales[2].amax() if scales and quantize else lse
    partial_o = lse.new_empty(work.num_partials * block_m, head_dim)
    partial_lse = lse.new_empty(work.num_partials * block_m)
    attention_fwd_sm90[(num_programs,)](
        q_desc, k_desc, v_desc, o, lse, o_scale, partial_o, partial_lse, work.work_tiles, work.work_indptr,
        *(scales or (lse, lse, lse)), max_v_scale, scale * math.log2(math.e), heads, queries,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), *v_strides, *o.stride()[:3],
        IS_FP8=scales is not None, QUANTIZE=quantize, D=head_dim, num_warps=4, **parameters,
    )  # fmt: skip
    if len(work.combines):
        combine_partials[(len(work.combines), block_m // COMBINE_ROWS)](
            o, lse, o_scale, partial_o, partial_lse, max_v_scale, work.combines, heads, queries, *o.stride()[:3],
            QUANTIZE=quantize, D=head_dim, BLOCK_M=block_m, ROWS=COMBINE_ROWS,
        )  # fmt: skip
    return o, lse, o_scale
