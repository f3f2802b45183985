"""Warp-specialised linear layer for Hopper, written in Gluon; a back-end of kernels/linear.py.

The kernel is persistent: a program works through a list of work tiles, each of which is 64 rows for each consumer by
BLOCK_N columns of the output, over a range of the reduction axis. kernels/sm90.py describes the ring of stages through
which the warps of a program communicate:

    load partition   one warp, which copies tiles of x and w (TMA, 128 bytes of the reduction axis) into the ring, and
                     the residual's tile while the last stages are being multiplied
    MMA partitions   two or three consumers of four warps, which multiply (wgmma) and apply the epilogue; the result
                     replaces the residual in shared memory and leaves by TMA while the next tile is multiplied

The tensor cores sum FP8 products with 13 fraction bits relative to the largest term, and truncate rather than round, so
that sums of many terms come out too small. FP32_ACCUM instead adds the products of every 128 terms to a float32
accumulator in registers (DeepSeek's "promotion"). This needs registers for both, so a consumer multiplies the halves of
its columns one after the other. Products of int8 are summed exactly in int32, and become float32 in the epilogue.

DRIFT instead multiplies the tensor cores' own sums of K terms by 1 + DRIFT K. It is for data whose drift is known, and
no tuner tries it: truncation takes 4e-8 K of a sum of independent terms, 7e-7 K where x and w have a common component,
and 1.6e-5 K where all terms have one sign.

Work tiles are ordered row by row within groups of GROUP_N tile columns, so that programs which run at the same time
share data in the L2 cache. With SPLIT_K, the tiles of a last wave that would not fill the GPU are split along the
reduction axis (stream-K); they leave partial results, which `combine_linear_partials` of kernels/linear.py adds up.

Source: CUTLASS and DeepGEMM for the roles; DeepSeek-V3 (arXiv 2412.19437, 3.3.2) for the promotion.
"""

# Types inside device code are Triton's, not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

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

from kernels.scheduler import StreamKSchedule, kv_ranges, stream_k_schedule_on
from kernels.sm90 import (
    GL_DTYPES,
    WGMMA_M,
    alloc_barriers,
    next_stage,
    previous_stage,
    read_work_tile,
    smem_layout,
    split_columns,
    thread_barrier,
    to_e4m3_x4,
)
from kernels.tuning import LaunchConfig, gpu_of

BYTES_K = 128  # bytes of the reduction axis in a stage: a row of the widest swizzle

DEFAULT_CONFIG: LaunchConfig = {
    "BLOCK_N": 256, "CONSUMERS": 2, "STAGES": 3, "GROUP_N": 8, "FP32_ACCUM": 0, "SPLIT_K": 0, "DRIFT": 0.0
}  # fmt: skip


# --- Kernel ---------------------------------------------------------------------------------------------------------


@gluon.jit
def tanh(x):
    """tanh(x) by the special function unit, exact to 11 bits."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def load_partition(work, descs, buffers, stage_bars, residual_bars,
                   RESIDUAL: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Copies the operands of all work tiles, in the order in which the consumers read them."""
    work_tiles, work_indptr = work
    x_desc, w_desc, _y_desc, residual_desc = descs
    x_smem, w_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    slot = 0
    phase = 0
    residual_phase = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        column, row, _end, k_start, k_end, partial = read_work_tile(work_tiles, i)
        for k in range(k_start, k_end, BLOCK_K):
            mbarrier.wait(empty.index(slot), phase ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, CONSUMERS * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            for consumer in gl.static_range(CONSUMERS):
                x = x_smem.index(slot * CONSUMERS + consumer)
                tma.async_copy_global_to_shared(x_desc, [row + consumer * WGMMA_M, k], bar, x)
            tma.async_copy_global_to_shared(w_desc, [column * BLOCK_N, k], bar, w_smem.index(slot))
            slot, phase = next_stage(slot, phase, STAGES)
        # Only now, while the consumers still have all stages to read: earlier it would wait for the previous output.
        if RESIDUAL:
            if partial < 0:
                for consumer in gl.static_range(CONSUMERS):
                    mbarrier.wait(residual_empty.index(consumer), residual_phase ^ 1)
                    mbarrier.expect(residual_full.index(consumer), 4 * residual_desc.block_type.nbytes)
                    for quarter in gl.static_range(4):
                        tma.async_copy_global_to_shared(
                            residual_desc, [row + consumer * WGMMA_M, column * BLOCK_N + quarter * (BLOCK_N // 4)],
                            residual_full.index(consumer), y_smem.index(4 * consumer + quarter),
                        )  # fmt: skip
                residual_phase ^= 1


@gluon.jit
def epilogue(y, column, row, scales, vectors, sizes, out, SCALED: gl.constexpr, BIAS: gl.constexpr,
             GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr, QUANTIZE: gl.constexpr):  # fmt: skip
    """Applies the epilogue to the sums y, whose first element is at (row, column), and stores the result in `out`.

    `out` is shared memory that holds the residual, if there is one.
    """
    x_scale, w_scale, bound, _y_scale = scales
    bias, gate = vectors
    m, n = sizes
    layout: gl.constexpr = y.type.layout
    offs_m = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, layout))
    offs_n = column + gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    mask_n = offs_n < n
    row_scale = gl.full([y.shape[0]], 1.0, gl.float32, gl.SliceLayout(1, layout))
    column_scale = gl.full([y.shape[1]], 1.0, gl.float32, gl.SliceLayout(0, layout))
    if SCALED:
        row_scale = gl.load(x_scale + offs_m, mask=offs_m < m, other=0.0)
        column_scale = gl.load(w_scale + offs_n, mask=mask_n, other=0.0)
    shift = gl.zeros([y.shape[1]], gl.float32, gl.SliceLayout(0, layout))
    if BIAS:
        shift = gl.load(bias + offs_n, mask=mask_n, other=0.0).to(gl.float32)
    if GATED:
        gate_n = gl.load(gate + offs_n, mask=mask_n, other=0.0)
        column_scale = column_scale * gate_n
        shift = shift * gate_n
    y = y * row_scale[:, None] * column_scale[None, :] + shift[None, :]
    if GELU:
        y = 0.5 * y * (1.0 + tanh(0.7978845608028654 * y * (1.0 + 0.044715 * y * y)))
    if RESIDUAL:
        y = y + out.load(layout).to(gl.float32)
    if QUANTIZE:
        scale = row_scale * gl.load(bound) + gl.load(bound + 1)
        out.store(to_e4m3_x4(y * (1.0 / scale)[:, None]))
    else:
        out.store(y.to(out.dtype))


@gluon.jit
def store_tile(left, right, partial, column, row, end, y_desc, scales, vectors, sizes, partials, y_smem, residual_full,
               residual_phase, CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
               SCALED: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr,
               GATED: gl.constexpr, QUANTIZE: gl.constexpr):  # fmt: skip
    """Stores a work tile: a whole tile of the output by TMA, or the float32 sums of a split one into `partials`."""
    HALF_N: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = left.type.layout
    offs_m = gl.arange(0, WGMMA_M, gl.SliceLayout(1, layout))
    if partial < 0:
        if RESIDUAL:
            mbarrier.wait(residual_full.index(CONSUMER_ID), residual_phase)
        else:
            tma.store_wait(0)  # the store of the previous tile has read the buffer
        first_row = row + CONSUMER_ID * WGMMA_M
        column = column * BLOCK_N
        quarters = split_columns(left) + split_columns(right)
        for i in gl.static_range(4):
            thread_barrier()  # or ptxas loads all quarters' vectors first, and runs out of registers
            epilogue(quarters[i], column + i * (BLOCK_N // 4), first_row, scales, vectors, sizes,
                     y_smem.index(4 * CONSUMER_ID + i), SCALED, BIAS, GELU, RESIDUAL, GATED, QUANTIZE)  # fmt: skip
        if QUANTIZE:
            if column == 0:
                x_scale, _w_scale, bound, y_scale = scales
                mask_m = first_row + offs_m < end
                scale = gl.load(x_scale + first_row + offs_m, mask=mask_m, other=0.0) * gl.load(bound) + gl.load(
                    bound + 1
                )
                gl.store(y_scale + first_row + offs_m, scale, mask=mask_m)
        fence_async_shared()
        for i in gl.static_range(4):
            tma.async_copy_shared_to_global(
                y_desc, [first_row, column + i * (BLOCK_N // 4)], y_smem.index(4 * CONSUMER_ID + i)
            )
    else:
        offs = (partial.to(gl.int64) * CONSUMERS + CONSUMER_ID) * (WGMMA_M * BLOCK_N)
        ptrs = partials + offs + (offs_m * BLOCK_N)[:, None] + gl.arange(0, HALF_N, gl.SliceLayout(0, layout))[None, :]
        gl.store(ptrs, left)
        gl.store(ptrs + HALF_N, right)


@gluon.jit
def mma_partition(work, descs, buffers, stage_bars, residual_bars, scales, vectors, sizes, partials,
                  CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
                  STAGES: gl.constexpr, FP32_ACCUM: gl.constexpr, DRIFT: gl.constexpr, SCALED: gl.constexpr,
                  BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr,
                  QUANTIZE: gl.constexpr):  # fmt: skip
    """One consumer: multiplies its 64 rows of every work tile and stores the results."""
    work_tiles, work_indptr = work
    x_smem, w_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    HALF_N: gl.constexpr = BLOCK_N // 2
    WGMMA_K: gl.constexpr = 256 // x_smem.dtype.primitive_bitwidth  # terms that one instruction multiplies
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, WGMMA_K])
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_N, WGMMA_K])
    slot = 0
    phase = 0
    residual_phase = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        _column, _row, _end, k_start, k_end, _partial = read_work_tile(work_tiles, i)
        blocks = gl.cdiv(k_end - k_start, BLOCK_K)
        if FP32_ACCUM:
            left = gl.zeros([WGMMA_M, HALF_N], gl.float32, half_layout)
            right = gl.zeros([WGMMA_M, HALF_N], gl.float32, half_layout)
            for _ in range(blocks):
                mbarrier.wait(full.index(slot), phase)
                x = x_smem.index(slot * CONSUMERS + CONSUMER_ID)
                w = w_smem.index(slot)
                zeros = gl.zeros([WGMMA_M, HALF_N], gl.float32, half_layout)
                y = warpgroup_mma(x, w.slice(0, HALF_N).permute((1, 0)), zeros, use_acc=False, is_async=True)
                left += warpgroup_mma_wait(0, deps=[y])
                y = warpgroup_mma(x, w.slice(HALF_N, HALF_N).permute((1, 0)), zeros, use_acc=False, is_async=True)
                y = warpgroup_mma_wait(0, deps=[y])
                mbarrier.arrive(empty.index(slot))
                right += y
                slot, phase = next_stage(slot, phase, STAGES)
        elif x_smem.dtype == gl.int8:  # by halves, because Triton has no int8 instruction of 256 columns
            left = gl.zeros([WGMMA_M, HALF_N], gl.int32, half_layout)
            right = gl.zeros([WGMMA_M, HALF_N], gl.int32, half_layout)
            for block in range(blocks):
                mbarrier.wait(full.index(slot), phase)
                x = x_smem.index(slot * CONSUMERS + CONSUMER_ID)
                w = w_smem.index(slot)
                left = warpgroup_mma(x, w.slice(0, HALF_N).permute((1, 0)), left, is_async=True)
                right = warpgroup_mma(x, w.slice(HALF_N, HALF_N).permute((1, 0)), right, is_async=True)
                left, right = warpgroup_mma_wait(2, deps=[left, right])
                mbarrier.arrive(empty.index(previous_stage(slot, STAGES)), pred=block > 0)
                slot, phase = next_stage(slot, phase, STAGES)
            left, right = warpgroup_mma_wait(0, deps=[left, right])
            mbarrier.arrive(empty.index(previous_stage(slot, STAGES)))
            left = left.to(gl.float32)
            right = right.to(gl.float32)
        else:
            mbarrier.wait(full.index(slot), phase)
            y = warpgroup_mma(
                x_smem.index(slot * CONSUMERS + CONSUMER_ID), w_smem.index(slot).permute((1, 0)),
                gl.zeros([WGMMA_M, BLOCK_N], gl.float32, acc_layout), use_acc=False, is_async=True,
            )  # fmt: skip
            y = warpgroup_mma_wait(1, deps=[y])
            previous = slot
            slot, phase = next_stage(slot, phase, STAGES)
            for _ in range(1, blocks):
                mbarrier.wait(full.index(slot), phase)
                y = warpgroup_mma(
                    x_smem.index(slot * CONSUMERS + CONSUMER_ID), w_smem.index(slot).permute((1, 0)), y, is_async=True
                )
                y = warpgroup_mma_wait(1, deps=[y])
                mbarrier.arrive(empty.index(previous))
                previous = slot
                slot, phase = next_stage(slot, phase, STAGES)
            y = warpgroup_mma_wait(0, deps=[y])
            mbarrier.arrive(empty.index(previous))
            left, right = split_columns(y)
            if DRIFT != 0.0:
                gain = 1.0 + DRIFT * (k_end - k_start).to(gl.float32)
                left = left * gain
                right = right * gain
        # Read again rather than held in registers during the main loop.
        column, row, end, _k_start, _k_end, partial = read_work_tile(work_tiles, i)
        store_tile(left, right, partial, column, row, end, descs[2], scales, vectors, sizes, partials, y_smem,
                   residual_full, residual_phase, CONSUMER_ID, CONSUMERS, BLOCK_N, SCALED, BIAS, GELU, RESIDUAL, GATED,
                   QUANTIZE)  # fmt: skip
        if RESIDUAL:
            if partial < 0:
                residual_phase ^= 1
                tma.store_wait(0)
                mbarrier.arrive(residual_empty.index(CONSUMER_ID))
    tma.store_wait(0)


# m and n are not specialised, so that neither 1 row nor lengths that 16 divides compile another kernel.
@gluon.jit(do_not_specialize=["m", "n"])
def linear_fwd_sm90(
    x_desc, w_desc, y_desc, residual_desc, work_tiles, work_indptr, partials, x_scale, w_scale, bound, y_scale, bias,
    gate, m, n, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    FP32_ACCUM: gl.constexpr, DRIFT: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
    RESIDUAL: gl.constexpr, GATED: gl.constexpr, QUANTIZE: gl.constexpr,
):  # fmt: skip
    """Program p computes the work tiles from work_indptr[p] to work_indptr[p + 1], see `StreamKSchedule`."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CONSUMERS, WGMMA_M, BLOCK_K], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, [CONSUMERS * 4, WGMMA_M, BLOCK_N // 4], y_desc.layout)
    stage_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)  # full, empty
    residual_bars = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    work = work_tiles, work_indptr
    descs = x_desc, w_desc, y_desc, residual_desc
    buffers = x_smem, w_smem, y_smem
    scales = x_scale, w_scale, bound, y_scale
    vectors = bias, gate
    sizes = m, n
    # The last argument of `warp_specialize` is registers a thread: the warps of a program share 65,536, and the first
    # partition gets what the others leave.
    if CONSUMERS == 3:
        gl.warp_specialize([
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, scales, vectors, sizes, partials, 0,
                             CONSUMERS, BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, DRIFT, SCALED, BIAS, GELU, RESIDUAL,
                             GATED, QUANTIZE)),
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, scales, vectors, sizes, partials, 1,
                             CONSUMERS, BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, DRIFT, SCALED, BIAS, GELU, RESIDUAL,
                             GATED, QUANTIZE)),
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, scales, vectors, sizes, partials, 2,
                             CONSUMERS, BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, DRIFT, SCALED, BIAS, GELU, RESIDUAL,
                             GATED, QUANTIZE)),
            (load_partition, (work, descs, buffers, stage_bars, residual_bars, RESIDUAL, CONSUMERS, BLOCK_N, BLOCK_K,
                              STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, scales, vectors, sizes, partials, 0,
                             CONSUMERS, BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, DRIFT, SCALED, BIAS, GELU, RESIDUAL,
                             GATED, QUANTIZE)),
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, scales, vectors, sizes, partials, 1,
                             CONSUMERS, BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, DRIFT, SCALED, BIAS, GELU, RESIDUAL,
                             GATED, QUANTIZE)),
            (load_partition, (work, descs, buffers, stage_bars, residual_bars, RESIDUAL, CONSUMERS, BLOCK_N, BLOCK_K,
                              STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def make_desc(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of boxes of x [rows, columns]; beyond the ends it reads zeros and stores nothing."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, smem_layout(tuple(block), x.dtype))


def supports(x: Tensor, w: Tensor, dtype: torch.dtype, residual: Tensor | None) -> bool:
    """Whether the kernel takes these operands: TMA needs addresses and row strides that are multiples of 16 bytes."""
    residuals = () if residual is None else (residual,)
    aligned = all(
        y.data_ptr() % 16 == 0 and y.stride(0) * y.itemsize % 16 == 0 and max(y.shape) < 2**31
        for y in (x, w, *residuals)
    )
    typed = all(y in GL_DTYPES for y in (x.dtype, dtype)) and all(y.dtype == dtype for y in residuals)
    return aligned and typed and x.dtype == w.dtype and len(w) * dtype.itemsize % 16 == 0


def launch(
    x: Tensor,
    w: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    bound: Tensor | None,
    dtype: torch.dtype,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor, StreamKSchedule, Tensor]:
    """Launches the kernel on operands that `supports` accepts.

    Returns y [m, n] in `dtype`; its scales [m], empty without `bound`; the schedule; and the partials of the tiles that
    the schedule splits, float32 [partials * rows of a tile, BLOCK_N]. The caller combines these into y.
    """
    (m, k), n = x.shape, len(w)
    parameters: dict[str, Any] = {**DEFAULT_CONFIG, **config}
    block_k, block_m = BYTES_K // x.itemsize, WGMMA_M.value
    block_n, consumers = parameters["BLOCK_N"], parameters["CONSUMERS"]
    num_sms = gpu_of(x.device).multiprocessors
    schedule = stream_k_schedule_on(
        x.device, type(x), kv_ranges(m, k), consumers * block_m, block_k, -(-n // block_n), num_sms,
        parameters.pop("GROUP_N"), bool(parameters.pop("SPLIT_K")),
    )  # fmt: skip
    y = x.new_empty(m, n, dtype=dtype)
    y_scale = x.new_empty(m if bound is not None else 0, dtype=torch.float32)
    partials = x.new_empty(schedule.num_partials * consumers * block_m, block_n, dtype=torch.float32)
    x_desc, w_desc = make_desc(x, [block_m, block_k]), make_desc(w, [block_n, block_k])
    y_desc = make_desc(y, [block_m, block_n // 4])
    residual_desc = y_desc if residual is None else make_desc(residual, [block_m, block_n // 4])
    x_scale, w_scale = scales or (y_scale, y_scale)
    linear_fwd_sm90[(num_sms,)](
        x_desc, w_desc, y_desc, residual_desc, schedule.work_tiles, schedule.work_indptr, partials, x_scale, w_scale,
        y_scale if bound is None else bound, y_scale, y_scale if bias is None else bias,
        y_scale if gate is None else gate, m, n, BLOCK_K=block_k, SCALED=scales is not None, BIAS=bias is not None,
        GELU=gelu, RESIDUAL=residual is not None, GATED=gate is not None, QUANTIZE=bound is not None, num_warps=4,
        **parameters,
    )  # fmt: skip
    return y, y_scale, schedule, partials
