"""The two products of the absorbed audio layer in e4m3 for Hopper, in one warp-specialised Gluon kernel.

    x w[f]^T        x [tokens, terms]; w [frames, n, terms], of which f is the latent frame of a row of x

In the first product x is z, and w is G; its epilogue is the softmax over the 32 keys of each head, and the result is
448 P in e4m3. In the second one x is 448 P, and w is U^T; its epilogue is scale, bias and residual. The roles of the
warps are those of kernels/linear_sm90.py:

    load partition   one warp, which copies tiles of x and w (TMA) into the ring, and the residual's tile while the last
                     stages are being multiplied
    MMA partitions   two or three consumers of four warps, which multiply (wgmma) and apply the epilogue

A work tile has BLOCK_N columns, and 64 rows of one frame for each consumer. Where the frame ends inside these rows, the
rows after its end are those of the next frame, which another tile computes, and TMA does not know where to stop. Such a
result is stored by the threads, under a mask, and every other one by TMA, while the next tile is multiplied.
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

from kernels.common import FP8
from kernels.linear_sm90 import make_desc
from kernels.scheduler import KVRanges, stream_k_schedule_on
from kernels.sm90 import (
    WGMMA_M,
    alloc_barriers,
    next_stage,
    previous_stage,
    read_work_tile,
    split_columns,
    thread_barrier,
    to_e4m3_x4,
)
from kernels.tuning import LaunchConfig, gpu_of

KEYS_PER_FRAME = 32  # of a head: a quarter of the columns of a tile of the first product
BLOCK_K = 128  # terms of a stage: a row of the widest swizzle

# Launch parameters where nothing was tuned; those with OUT are of the second product.
DEFAULT_CONFIG: LaunchConfig = {
    "CONSUMERS": 3, "STAGES": 4, "OUT_BLOCK_N": 256, "OUT_CONSUMERS": 2, "OUT_STAGES": 3, "GROUP_N": 8
}  # fmt: skip


# --- Kernel ---------------------------------------------------------------------------------------------------------


@gluon.jit
def load_partition(work, descs, buffers, stage_bars, residual_bars, sizes, RESIDUAL: gl.constexpr,
                   CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Copies the operands of all work tiles, in the order in which the consumers read them."""
    work_tiles, work_indptr = work
    x_desc, w_desc, _y_desc, residual_desc = descs
    x_smem, w_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    terms, n = sizes
    slot = 0
    phase = 0
    residual_phase = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        column, row, _end, frame, _next, _partial = read_work_tile(work_tiles, i)
        for k in range(0, terms, BLOCK_K):
            mbarrier.wait(empty.index(slot), phase ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, CONSUMERS * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            for consumer in gl.static_range(CONSUMERS):
                x = x_smem.index(slot * CONSUMERS + consumer)
                tma.async_copy_global_to_shared(x_desc, [row + consumer * WGMMA_M, k], bar, x)
            tma.async_copy_global_to_shared(w_desc, [frame * n + column * BLOCK_N, k], bar, w_smem.index(slot))
            slot, phase = next_stage(slot, phase, STAGES)
        # Only now, while the consumers still have all stages to read: earlier it would wait for the previous output.
        if RESIDUAL:
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
def softmax_epilogue(acc, first_row, first_column, end, frame, vectors, n, out):
    """448 softmax(acc x_scale w_scale + bias) over the columns, which are the keys of one head, in e4m3."""
    x_scale, w_scale, bias = vectors
    layout: gl.constexpr = acc.type.layout
    offs_m = first_row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    mask_n = columns < n
    row_scale = gl.load(x_scale + offs_m, mask=offs_m < end, other=0.0) * 1.4426950408889634
    column_scale = gl.load(w_scale + frame * n + columns, mask=mask_n, other=0.0)
    shift = gl.load(bias + frame * n + columns, mask=mask_n, other=0.0) * 1.4426950408889634
    logits = acc * row_scale[:, None] * column_scale[None, :] + shift[None, :]
    p = gl.exp2(logits - gl.max(logits, 1)[:, None])
    out.store(to_e4m3_x4(p * (448.0 / gl.sum(p, 1))[:, None]))


@gluon.jit
def output_epilogue(acc, first_column, frame, vectors, n, out, RESIDUAL: gl.constexpr):
    """acc w_scale / 448 + bias, plus the residual that `out` holds, in the dtype of `out`."""
    _x_scale, w_scale, bias = vectors
    layout: gl.constexpr = acc.type.layout
    columns = first_column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    mask_n = columns < n
    column_scale = gl.load(w_scale + frame * n + columns, mask=mask_n, other=0.0) * (1.0 / 448.0)
    y = acc * column_scale[None, :] + gl.load(bias + frame * n + columns, mask=mask_n, other=0.0)[None, :]
    if RESIDUAL:
        y = y + out.load(layout).to(gl.float32)
    out.store(y.to(out.dtype))


@gluon.jit
def store_rows(tile, first_row, first_column, end, y, n, layout: gl.constexpr):
    """Stores the rows of a tile in shared memory that lie before `end`."""
    values = tile.load(layout)
    rows = first_row + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    ptrs = y + rows.to(gl.int64)[:, None] * n + columns[None, :]
    gl.store(ptrs, values, mask=(rows < end)[:, None] & (columns < n)[None, :])


@gluon.jit
def store_tile(acc, tile, y_desc, vectors, y, n, y_smem, residual_full, residual_phase, CONSUMER_ID: gl.constexpr,
               BLOCK_N: gl.constexpr, SOFTMAX: gl.constexpr, RESIDUAL: gl.constexpr):  # fmt: skip
    """Applies the epilogue to a consumer's part of a work tile, and stores the rows of its frame."""
    column, row, end, frame = tile
    QUARTER: gl.constexpr = BLOCK_N // 4
    first_row = row + CONSUMER_ID * WGMMA_M
    if RESIDUAL:
        mbarrier.wait(residual_full.index(CONSUMER_ID), residual_phase)
    else:
        tma.store_wait(0)  # the store of the previous tile has read the buffer
    left, right = split_columns(acc)
    quarters = split_columns(left) + split_columns(right)
    layout: gl.constexpr = quarters[0].type.layout
    for i in gl.static_range(4):
        thread_barrier()  # or ptxas loads all quarters' vectors first, and runs out of registers
        first_column, out = column * BLOCK_N + i * QUARTER, y_smem.index(4 * CONSUMER_ID + i)
        if SOFTMAX:
            softmax_epilogue(quarters[i], first_row, first_column, end, frame, vectors, n, out)
        else:
            output_epilogue(quarters[i], first_column, frame, vectors, n, out, RESIDUAL)
    fence_async_shared()
    if first_row + WGMMA_M <= end:
        for i in gl.static_range(4):
            target = [first_row, column * BLOCK_N + i * QUARTER]
            tma.async_copy_shared_to_global(y_desc, target, y_smem.index(4 * CONSUMER_ID + i))
    else:
        for i in gl.static_range(4):
            store_rows(y_smem.index(4 * CONSUMER_ID + i), first_row, column * BLOCK_N + i * QUARTER, end, y, n, layout)
        thread_barrier()  # all threads have read the buffer, before the load partition fills it again


@gluon.jit
def mma_partition(work, descs, buffers, stage_bars, residual_bars, vectors, y, sizes, CONSUMER_ID: gl.constexpr,
                  CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
                  SOFTMAX: gl.constexpr, RESIDUAL: gl.constexpr):  # fmt: skip
    """One consumer: multiplies its 64 rows of every work tile and stores the results."""
    work_tiles, work_indptr = work
    x_smem, w_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    terms, n = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    slot = 0
    phase = 0
    residual_phase = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        acc = gl.zeros([WGMMA_M, BLOCK_N], gl.float32, layout)
        for block in range(gl.cdiv(terms, BLOCK_K)):
            mbarrier.wait(full.index(slot), phase)
            x = x_smem.index(slot * CONSUMERS + CONSUMER_ID)
            acc = warpgroup_mma(x, w_smem.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(previous_stage(slot, STAGES)), pred=block > 0)
            slot, phase = next_stage(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(previous_stage(slot, STAGES)))
        # Read only now, rather than held in registers during the main loop.
        column, row, end, frame, _next, _partial = read_work_tile(work_tiles, i)
        tile = column, row, end, frame
        store_tile(acc, tile, descs[2], vectors, y, n, y_smem, residual_full, residual_phase, CONSUMER_ID, BLOCK_N,
                   SOFTMAX, RESIDUAL)  # fmt: skip
        if RESIDUAL:
            residual_phase ^= 1
            tma.store_wait(0)
            mbarrier.arrive(residual_empty.index(CONSUMER_ID))
    tma.store_wait(0)


# n is not specialised, so that lengths that 16 divides do not compile another kernel.
@gluon.jit(do_not_specialize=["n"])
def frame_product_sm90(
    x_desc, w_desc, y_desc, residual_desc, work_tiles, work_indptr, x_scale, w_scale, bias, y, terms, n,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    SOFTMAX: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Program p computes the work tiles from work_indptr[p] to work_indptr[p + 1].

    The first key of a work tile is its latent frame.
    """
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CONSUMERS, WGMMA_M, BLOCK_K], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, [CONSUMERS * 4, WGMMA_M, BLOCK_N // 4], y_desc.layout)
    stage_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)  # full, empty
    residual_bars = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    work = work_tiles, work_indptr
    descs = x_desc, w_desc, y_desc, residual_desc
    buffers = x_smem, w_smem, y_smem
    vectors = x_scale, w_scale, bias
    sizes = terms, n
    # The last argument of `warp_specialize` is registers a thread: the warps of a program share 65,536, and the first
    # partition gets what the others leave.
    if CONSUMERS == 3:
        gl.warp_specialize([
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, vectors, y, sizes, 0, CONSUMERS, BLOCK_N,
                             BLOCK_K, STAGES, SOFTMAX, RESIDUAL)),
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, vectors, y, sizes, 1, CONSUMERS, BLOCK_N,
                             BLOCK_K, STAGES, SOFTMAX, RESIDUAL)),
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, vectors, y, sizes, 2, CONSUMERS, BLOCK_N,
                             BLOCK_K, STAGES, SOFTMAX, RESIDUAL)),
            (load_partition, (work, descs, buffers, stage_bars, residual_bars, sizes, RESIDUAL, CONSUMERS, BLOCK_N,
                              BLOCK_K, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, vectors, y, sizes, 0, CONSUMERS, BLOCK_N,
                             BLOCK_K, STAGES, SOFTMAX, RESIDUAL)),
            (mma_partition, (work, descs, buffers, stage_bars, residual_bars, vectors, y, sizes, 1, CONSUMERS, BLOCK_N,
                             BLOCK_K, STAGES, SOFTMAX, RESIDUAL)),
            (load_partition, (work, descs, buffers, stage_bars, residual_bars, sizes, RESIDUAL, CONSUMERS, BLOCK_N,
                              BLOCK_K, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def supports(
    z: Tensor, keys: Tensor, values: Tensor, keys_per_frame: int, residual: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether the kernel takes these operands: TMA needs addresses and row strides that are multiples of 16 bytes."""
    residuals = () if residual is None else (residual,)
    strides = [z.shape[1], values.shape[2], values.shape[1] * dtype.itemsize]
    strides += [x.stride(0) * x.itemsize for x in residuals]
    addresses = [x.data_ptr() for x in (z, keys, values, *residuals)]
    typed = z.dtype == FP8 and dtype in (torch.bfloat16, torch.float16)
    return typed and keys_per_frame == KEYS_PER_FRAME and all(x % 16 == 0 for x in (*strides, *addresses))


def launch_weights(
    z: Tensor, z_scale: Tensor, keys: Tensor, keys_scale: Tensor, key_bias: Tensor, ranges: KVRanges,
    config: LaunchConfig,
) -> Tensor:  # fmt: skip
    """448 P [tokens, heads x keys] in e4m3; the first key of tokens in `ranges` is their latent frame."""
    parameters = {**DEFAULT_CONFIG, **config}
    shape = {"BLOCK_N": 4 * KEYS_PER_FRAME, "CONSUMERS": parameters["CONSUMERS"], "STAGES": parameters["STAGES"]}
    return _launch(z, keys, (z_scale, keys_scale, key_bias), None, FP8, ranges, parameters["GROUP_N"], shape)


def launch_output(
    p: Tensor, values: Tensor, values_scale: Tensor, value_bias: Tensor, residual: Tensor | None, dtype: torch.dtype,
    ranges: KVRanges, config: LaunchConfig,
) -> Tensor:  # fmt: skip
    """residual + (P U + bias) [tokens, out width] in `dtype`, from 448 P in e4m3."""
    parameters = {**DEFAULT_CONFIG, **config}
    shape = {name: parameters[f"OUT_{name}"] for name in ("BLOCK_N", "CONSUMERS", "STAGES")}
    vectors = values_scale, values_scale, value_bias
    return _launch(p, values, vectors, residual, dtype, ranges, parameters["GROUP_N"], shape)


def _launch(
    x: Tensor,
    w: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor],
    residual: Tensor | None,
    dtype: torch.dtype,
    ranges: KVRanges,
    group_n: Any,
    shape: dict[str, Any],
) -> Tensor:
    """The product of x and w by frame, in `dtype`; if that is e4m3, with the softmax."""
    (tokens, terms), n, w = x.shape, w.shape[1], w.flatten(0, 1)
    block_m, block_n, consumers = WGMMA_M.value, shape["BLOCK_N"], shape["CONSUMERS"]
    num_sms = gpu_of(x.device).multiprocessors
    schedule = stream_k_schedule_on(
        x.device, type(x), ranges, consumers * block_m, 1, -(-n // block_n), num_sms, group_n, split=False
    )
    y = x.new_empty(tokens, n, dtype=dtype)
    y_desc = make_desc(y, [block_m, block_n // 4])
    residual_desc = y_desc if residual is None else make_desc(residual, [block_m, block_n // 4])
    frame_product_sm90[(num_sms,)](
        make_desc(x, [block_m, BLOCK_K]), make_desc(w, [block_n, BLOCK_K]), y_desc, residual_desc,
        schedule.work_tiles, schedule.work_indptr, *vectors, y, terms, n, BLOCK_K=BLOCK_K, SOFTMAX=dtype == FP8,
        RESIDUAL=residual is not None, num_warps=4, **shape,
    )  # fmt: skip
    return y
