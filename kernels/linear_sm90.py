"""The linear layer of kernels/linear.py on Hopper: three kinds of warps, in Gluon, Triton's language for what is below.

A program stays on its multiprocessor and works off a list of *work_tiles*: a tile of 64 rows for each of its consumers by
BLOCK_N columns of the output, over a range of the summed axis. kernels/sm90.py says what roles its warps have.

    producer     one warp: copies tiles of x and w (TMA, 128 bytes of the summed axis) into the ring, and of a residual
                 the tile that the epilogue will read, while the last stages are multiplied
    consumers    two or three groups of four warps: multiply (wgmma), scale, add, gate, round; the result goes through
                 shared memory, where the residual lay, and out by TMA while the next tile is multiplied

FP8 products are summed by the tensor cores with 13 bits behind the point of the largest term, cut off, not rounded: the
sum of many terms comes out too small. FP32_ACCUM adds the products of every 128 terms to a float32 outside of them; it
needs registers for both, so that a consumer's columns are multiplied in two halves, one after the other.

The order of work_tiles keeps what programs read at one time in the L2 cache: GROUP_N columns of tiles, row by row. With
SPLIT_K, the tiles left over for a last round that would not be full are cut along the summed axis, and leave parts, which
`merge_linear` of kernels/linear.py adds up.

Source of the roles and of promotion: CUTLASS, DeepGEMM, DeepSeek-V3 (arXiv 2412.19437, 3.3.2).
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
    FP8,
    GL_DTYPES,
    WGMMA_M,
    alloc_barriers,
    next_stage,
    read_work_tile,
    smem_layout,
    split_columns,
    to_e4m3_x4,
)
from kernels.tuning import LaunchConfig, gpu_of

BYTES_K = 128  # of the summed axis in a stage: a row of the widest swizzle

# Where nothing was tuned.
DEFAULT: LaunchConfig = {"BLOCK_N": 256, "CONSUMERS": 2, "STAGES": 3, "GROUP_N": 8, "FP32_ACCUM": 0, "SPLIT_K": 0}
LONG = 8192  # FP8 terms from which sums are promoted where nothing was tuned


# --- Device code ----------------------------------------------------------------------------------------------------


@gluon.jit
def tanh(x):
    """By the special function unit: 11 bits."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def produce(work, rows, buffers, stage_bars, residual_bars,
            RESIDUAL: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Copies the tiles of all work_tiles, in the order in which the consumers take them."""
    work_tiles, work_indptr = work
    x_rows, w_rows, _y_rows, residual_rows = rows
    x_smem, w_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    slot = 0
    phase = 0
    turn = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        column, row, _end, first, last, part = read_work_tile(work_tiles, i)
        for k in range(first, last, BLOCK_K):
            mbarrier.wait(empty.index(slot), phase ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, CONSUMERS * x_rows.block_type.nbytes + w_rows.block_type.nbytes)
            for group in gl.static_range(CONSUMERS):
                x = x_smem.index(slot * CONSUMERS + group)
                tma.async_copy_global_to_shared(x_rows, [row + group * WGMMA_M, k], bar, x)
            tma.async_copy_global_to_shared(w_rows, [column * BLOCK_N, k], bar, w_smem.index(slot))
            slot, phase = next_stage(slot, phase, STAGES)
        if RESIDUAL:  # now, as consumers still have all stages to read: earlier it would wait for the output before
            if part < 0:
                for group in gl.static_range(CONSUMERS):
                    mbarrier.wait(residual_empty.index(group), turn ^ 1)
                    mbarrier.expect(residual_full.index(group), 4 * residual_rows.block_type.nbytes)
                    for quarter in gl.static_range(4):
                        tma.async_copy_global_to_shared(
                            residual_rows, [row + group * WGMMA_M, column * BLOCK_N + quarter * (BLOCK_N // 4)],
                            residual_full.index(group), y_smem.index(4 * group + quarter),
                        )  # fmt: skip
                turn ^= 1


@gluon.jit
def epilogue(y, column, row, scales, vectors, sizes, out, SCALED: gl.constexpr, BIAS: gl.constexpr,
             GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr, ROUND: gl.constexpr):  # fmt: skip
    """Turns the sums y of rows from `row` and columns from `column` on into `out`, where the residual lies."""
    x_scale, w_scale, bound, _y_scale = scales
    bias, gate = vectors
    m, n = sizes
    layout: gl.constexpr = y.type.layout
    rows = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    within = columns < n
    factor = gl.full([y.shape[0]], 1.0, gl.float32, gl.SliceLayout(1, layout))
    weight = gl.full([y.shape[1]], 1.0, gl.float32, gl.SliceLayout(0, layout))
    if SCALED:
        factor = gl.load(x_scale + rows, mask=rows < m, other=0.0)
        weight = gl.load(w_scale + columns, mask=within, other=0.0)
    offset = gl.zeros([y.shape[1]], gl.float32, gl.SliceLayout(0, layout))
    if BIAS:
        offset = gl.load(bias + columns, mask=within, other=0.0).to(gl.float32)
    if GATED:
        strength = gl.load(gate + columns, mask=within, other=0.0)
        weight = weight * strength
        offset = offset * strength
    y = y * factor[:, None] * weight[None, :] + offset[None, :]
    if GELU:
        y = 0.5 * y * (1.0 + tanh(0.7978845608028654 * y * (1.0 + 0.044715 * y * y)))
    if RESIDUAL:
        y = y + out.load(layout).to(gl.float32)
    if ROUND:
        scale = factor * gl.load(bound) + gl.load(bound + 1)
        out.store(to_e4m3_x4(y * (1.0 / scale)[:, None]))
    else:
        out.store(y.to(out.dtype))


@gluon.jit
def finish(left, right, part, column, row, end, rows, scales, vectors, sizes, parts, y_smem, residual_full, turn,
           CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, SCALED: gl.constexpr,
           BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr,
           ROUND: gl.constexpr):  # fmt: skip
    """Stores a piece: the output's tile by TMA, or a part's sums, float32, into the workspace."""
    HALF: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = left.type.layout
    own = gl.arange(0, WGMMA_M, gl.SliceLayout(1, layout))
    if part < 0:
        if RESIDUAL:
            mbarrier.wait(residual_full.index(CONSUMER_ID), turn)
        else:
            tma.store_wait(0)  # of the tile before: its bytes have left
        first = row + CONSUMER_ID * WGMMA_M
        column = column * BLOCK_N
        quarters = split_columns(left) + split_columns(right)
        for i in gl.static_range(4):
            gl.thread_barrier()  # or ptxas loads all quarters' vectors first, and runs out of registers
            epilogue(quarters[i], column + i * (BLOCK_N // 4), first, scales, vectors, sizes,
                     y_smem.index(4 * CONSUMER_ID + i), SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)  # fmt: skip
        if ROUND:
            if column == 0:
                x_scale, _w_scale, bound, y_scale = scales
                inside = first + own < end
                scale = gl.load(x_scale + first + own, mask=inside, other=0.0) * gl.load(bound) + gl.load(bound + 1)
                gl.store(y_scale + first + own, scale, mask=inside)
        fence_async_shared()
        for i in gl.static_range(4):
            tma.async_copy_shared_to_global(
                rows, [first, column + i * (BLOCK_N // 4)], y_smem.index(4 * CONSUMER_ID + i)
            )
    else:
        places = (part.to(gl.int64) * CONSUMERS + CONSUMER_ID) * (WGMMA_M * BLOCK_N)
        places = parts + places + (own * BLOCK_N)[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, layout))[None, :]
        gl.store(places, left)
        gl.store(places + HALF, right)


@gluon.jit
def multiply(work, rows, buffers, stage_bars, residual_bars, scales, vectors, sizes, parts,
             CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
             STAGES: gl.constexpr, FP32_ACCUM: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr,
             GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATED: gl.constexpr, ROUND: gl.constexpr):  # fmt: skip
    """A consumer."""
    work_tiles, work_indptr = work
    x_smem, w_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    HALF: gl.constexpr = BLOCK_N // 2
    K: gl.constexpr = 256 // x_smem.dtype.primitive_bitwidth  # terms that one instruction multiplies
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, K])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, K])
    slot = 0
    phase = 0
    turn = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        _column, _row, _end, first, last, _part = read_work_tile(work_tiles, i)
        blocks = gl.cdiv(last - first, BLOCK_K)
        if FP32_ACCUM:
            left = gl.zeros([WGMMA_M, HALF], gl.float32, layout)
            right = gl.zeros([WGMMA_M, HALF], gl.float32, layout)
            for _ in range(blocks):
                mbarrier.wait(full.index(slot), phase)
                x = x_smem.index(slot * CONSUMERS + CONSUMER_ID)
                w = w_smem.index(slot)
                none = gl.zeros([WGMMA_M, HALF], gl.float32, layout)
                y = warpgroup_mma(x, w.slice(0, HALF).permute((1, 0)), none, use_acc=False, is_async=True)
                left += warpgroup_mma_wait(0, deps=[y])
                y = warpgroup_mma(x, w.slice(HALF, HALF).permute((1, 0)), none, use_acc=False, is_async=True)
                y = warpgroup_mma_wait(0, deps=[y])
                mbarrier.arrive(empty.index(slot))
                right += y
                slot, phase = next_stage(slot, phase, STAGES)
        else:
            mbarrier.wait(full.index(slot), phase)
            y = warpgroup_mma(
                x_smem.index(slot * CONSUMERS + CONSUMER_ID), w_smem.index(slot).permute((1, 0)),
                gl.zeros([WGMMA_M, BLOCK_N], gl.float32, whole), use_acc=False, is_async=True,
            )  # fmt: skip
            y = warpgroup_mma_wait(1, deps=[y])
            before = slot
            slot, phase = next_stage(slot, phase, STAGES)
            for _ in range(1, blocks):
                mbarrier.wait(full.index(slot), phase)
                y = warpgroup_mma(
                    x_smem.index(slot * CONSUMERS + CONSUMER_ID), w_smem.index(slot).permute((1, 0)), y, is_async=True
                )
                y = warpgroup_mma_wait(1, deps=[y])
                mbarrier.arrive(empty.index(before))
                before = slot
                slot, phase = next_stage(slot, phase, STAGES)
            y = warpgroup_mma_wait(0, deps=[y])
            mbarrier.arrive(empty.index(before))
            left, right = split_columns(y)
        column, row, end, _first, _last, part = read_work_tile(
            work_tiles, i
        )  # again, so as not to hold registers in between
        finish(left, right, part, column, row, end, rows[2], scales, vectors, sizes, parts, y_smem, residual_full, turn,
               CONSUMER_ID, CONSUMERS, BLOCK_N, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)  # fmt: skip
        if RESIDUAL:
            if part < 0:
                turn ^= 1
                tma.store_wait(0)
                mbarrier.arrive(residual_empty.index(CONSUMER_ID))
    tma.store_wait(0)


# What is not specialised is not compiled anew: 1 row, lengths that 16 divides.
@gluon.jit(do_not_specialize=["m", "n"])
def linear_hopper(
    x_rows, w_rows, y_rows, residual_rows, work_tiles, work_indptr, parts, x_scale, w_scale, bound, y_scale, bias, gate, m, n,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    FP32_ACCUM: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr,
    GATED: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """Works off the work_tiles from work_indptr[program] to work_indptr[program + 1]; the launcher says what the rest is."""
    x_smem = gl.allocate_shared_memory(x_rows.dtype, [STAGES * CONSUMERS, WGMMA_M, BLOCK_K], x_rows.layout)
    w_smem = gl.allocate_shared_memory(w_rows.dtype, [STAGES, BLOCK_N, BLOCK_K], w_rows.layout)
    y_smem = gl.allocate_shared_memory(y_rows.dtype, [CONSUMERS * 4, WGMMA_M, BLOCK_N // 4], y_rows.layout)
    stage_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)  # full, empty
    residual_bars = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    work = work_tiles, work_indptr
    rows = x_rows, w_rows, y_rows, residual_rows
    buffers = x_smem, w_smem, y_smem
    scales = x_scale, w_scale, bound, y_scale
    vectors = bias, gate
    sizes = m, n
    # Registers a thread: 65,536 are shared out among the groups of four warps; the first one gets what is left.
    if CONSUMERS == 3:
        gl.warp_specialize([
            (multiply, (work, rows, buffers, stage_bars, residual_bars, scales, vectors, sizes, parts, 0, CONSUMERS,
                        BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)),
            (multiply, (work, rows, buffers, stage_bars, residual_bars, scales, vectors, sizes, parts, 1, CONSUMERS,
                        BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)),
            (multiply, (work, rows, buffers, stage_bars, residual_bars, scales, vectors, sizes, parts, 2, CONSUMERS,
                        BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)),
            (produce, (work, rows, buffers, stage_bars, residual_bars, RESIDUAL, CONSUMERS, BLOCK_N, BLOCK_K, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (multiply, (work, rows, buffers, stage_bars, residual_bars, scales, vectors, sizes, parts, 0, CONSUMERS,
                        BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)),
            (multiply, (work, rows, buffers, stage_bars, residual_bars, scales, vectors, sizes, parts, 1, CONSUMERS,
                        BLOCK_N, BLOCK_K, STAGES, FP32_ACCUM, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)),
            (produce, (work, rows, buffers, stage_bars, residual_bars, RESIDUAL, CONSUMERS, BLOCK_N, BLOCK_K, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Boxes of x [rows, columns], whose rows may lie apart; what is beyond the end is zero, and is not stored."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, smem_layout(tuple(block), x.dtype))


def supports(x: Tensor, w: Tensor, dtype: torch.dtype, residual: Tensor | None) -> bool:
    """Whether the kernel takes these operands: copies start at whole 16 bytes, rows lie whole 16 bytes apart."""
    others = () if residual is None else (residual,)
    aligned = all(
        y.data_ptr() % 16 == 0 and y.stride(0) * y.itemsize % 16 == 0 and max(y.shape) < 2**31 for y in (x, w, *others)
    )
    typed = all(y in GL_DTYPES for y in (x.dtype, dtype)) and all(y.dtype == dtype for y in others)
    return aligned and typed and x.dtype == w.dtype and len(w) * dtype.itemsize % 16 == 0


def launch_sm90(
    x: Tensor,
    w: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    gelu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    bound: Tensor | None,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, StreamKSchedule, Tensor]:
    """y [m, n] in `dtype` of operands that `supports` approves, its scale [m] if `bound` asks for one, and what is split:

    the plan, and the sums of its parts, float32 [part x rows of a tile, BLOCK_N], that have yet to be merged into y.
    """
    (m, k), n = x.shape, len(w)
    parameters: dict[str, Any] = {**DEFAULT, **(config or {"FP32_ACCUM": int(x.dtype == FP8 and k >= LONG)})}
    block_k, group = BYTES_K // x.itemsize, WGMMA_M.value
    block_n, consumers = parameters["BLOCK_N"], parameters["CONSUMERS"]
    programs = gpu_of(x.device).multiprocessors
    schedule = stream_k_schedule_on(
        x.device, type(x), kv_ranges(m, k), consumers * group, block_k, -(-n // block_n), programs,
        parameters.pop("GROUP_N"), bool(parameters.pop("SPLIT_K")),
    )  # fmt: skip
    y = x.new_empty(m, n, dtype=dtype)
    y_scale = x.new_empty(m if bound is not None else 0, dtype=torch.float32)
    parts = x.new_empty(schedule.num_partials * consumers * group, block_n, dtype=torch.float32)
    y_rows = describe(y, [group, block_n // 4])
    x_scale, w_scale = scales or (y_scale, y_scale)
    linear_hopper[(programs,)](
        describe(x, [group, block_k]), describe(w, [block_n, block_k]), y_rows,
        y_rows if residual is None else describe(residual, [group, block_n // 4]), schedule.work_tiles, schedule.work_indptr, parts,
        x_scale, w_scale, y_scale if bound is None else bound, y_scale, y_scale if bias is None else bias,
        y_scale if gate is None else gate, m, n, BLOCK_K=block_k, SCALED=scales is not None, BIAS=bias is not None,
        GELU=gelu, RESIDUAL=residual is not None, GATED=gate is not None, ROUND=bound is not None, num_warps=4,
        **parameters,
    )  # fmt: skip
    return y, y_scale, schedule, parts
