"""The attention of kernels/chunk_attention.py on Hopper: three kinds of warps, in Gluon, Triton's language for what is below.

A program stays on its multiprocessor and works off a list of *work_tiles*: 64 queries of one head for each of its warp
groups, and a range of keys. One warp, the producer, copies tiles of queries, keys and values into shared memory with
the tensor memory accelerator (TMA); warp groups of four, the consumers, multiply (wgmma) and take exponentials. They
meet at barriers in shared memory alone: a stage of the ring is *full* when its bytes have arrived, and *empty* when all
consumers have read it.

    consumers, 16-bit, 2 of them      scores of tile j and products with tile j - 1 are in flight together; while one
                                      group takes exponentials, the other one's products have the tensor cores (they
                                      pass a *turn* to each other, the ping-pong of FlashAttention-3)
    consumers, FP8, 3 of them         in FP8 a tile's exponentials take as long as its products. Each group goes one
                                      step at a time, and three of them fill each other's gaps; that leaves registers
                                      for products that are accumulated outside the tensor cores, whose sums of FP8
                                      products are short of a float32's bits

All weights are 2^(s - max): one fused multiply-add and one MUFU.EX2 an element. The keys' last tile, which may be cut
off, comes first, so that no other tile pays for a mask. kernels/scheduler.py shares the work_tiles out; a tile whose keys
are shared by several programs leaves parts, which `merge_parts` merges.

Source of the algorithm: FlashAttention-3 (arXiv 2407.08608); the accumulation, SageAttention2 (arXiv 2411.10958).
"""

# Types inside device code are Triton's, not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
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

from kernels.scheduler import KVRanges, stream_k_schedule_on
from kernels.sm90 import FP8, GL_DTYPES, WGMMA_M, alloc_barriers, next_stage, read_work_tile, smem_layout, to_e4m3_x4
from kernels.tuning import LaunchConfig, gpu_of

SHIFT = gl.constexpr(8.0)  # FP8 weights are rounded as 2^8 p: e4m3 reaches 448, and goes down to 2^-9
LN_2 = gl.constexpr(math.log(2))

MERGE_ROWS = 16  # queries that a program of `merge_parts` merges

# Where nothing was tuned; FP8 or not.
DEFAULT: dict[bool, LaunchConfig] = {False: {"BLOCK_N": 128, "STAGES": 2}, True: {"BLOCK_N": 128, "STAGES": 2}}


# --- Device code ----------------------------------------------------------------------------------------------------


@gluon.jit
def exp2(x):
    """2^x by the special function unit; denormal results become zero, which spares three instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def produce(work, rows, strides, buffers, q_bars, k_bars, v_bars, heads,
            FP8: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies the tiles of all work_tiles, in the order in which the consumers take them."""
    work_tiles, work_indptr = work
    q_rows, k_rows, v_rows = rows
    q_batch, q_head, k_batch, k_head, v_batch, v_head = strides
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty = q_bars
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    slot = 0
    phase = 0
    q_phase = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        column, row, _end, first, last, _part = read_work_tile(work_tiles, i)
        batch, head = column // heads, column % heads
        for group in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(group), q_phase ^ 1)
            mbarrier.expect(q_full.index(group), q_rows.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_rows,
                [row + group * WGMMA_M, batch * q_batch + head * q_head],
                q_full.index(group),
                q_smem.index(group),
            )
        q_phase ^= 1
        k_column = batch * k_batch + head * k_head
        v_column = batch * v_batch + head * v_head
        tiles = gl.cdiv(last - first, BLOCK_N)
        for j in range(tiles):
            key = first + (tiles - 1 - j) * BLOCK_N
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_rows.block_type.nbytes)
            tma.async_copy_global_to_shared(k_rows, [key, k_column], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_rows.block_type.nbytes)
            if FP8:  # v is transposed
                tma.async_copy_global_to_shared(v_rows, [v_column, key], v_full.index(slot), v_smem.index(slot))
            else:
                tma.async_copy_global_to_shared(v_rows, [key, v_column], v_full.index(slot), v_smem.index(slot))
            slot, phase = next_stage(slot, phase, STAGES)


@gluon.jit
def hide(scores, count):
    """The scores, those of keys from `count` on minus infinity."""
    keys = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where((keys < count)[None, :], scores, float("-inf"))


@gluon.jit
def left_operand(p, dtype: gl.constexpr, layout: gl.constexpr, FP8: gl.constexpr):
    """The weights as left operand of their product with v, in the registers in which they are.

    In FP8 that takes the keys of 16 in another order, which is that of v as it lies in memory: see `interleave` of
    kernels/chunk_attention.py. The assembly packs four weights at once; Triton's own conversion takes them apart again.
    """
    if FP8:
        N: gl.constexpr = p.shape[1]
        p = p.reshape([WGMMA_M, N // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([WGMMA_M, N])
        p = to_e4m3_x4(gl.convert_layout(p, layout, assert_trivial=True))
    else:
        p = gl.convert_layout(p.to(dtype), layout, assert_trivial=True)
    return p


@gluon.jit
def finish(acc, top, total, out, work_tiles, i, heads, CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr,
           FP8: gl.constexpr):  # fmt: skip
    """Stores a piece's output and log-sum-exp: into o and lse, or a part's, float32, into the workspace."""
    o, lse, parts, part_sums, v_scale, queries, o_batch, o_row, o_head = out
    column, row, end, _first, _last, part = read_work_tile(
        work_tiles, i
    )  # again, so as not to hold registers in between
    D: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    batch, head = column // heads, column % heads
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, layout))[:, None]
    channels = gl.arange(0, D, gl.SliceLayout(0, layout))
    if FP8:
        acc = acc * gl.load(v_scale + column * D + channels)[None, :]
    sums = (top + gl.log2(total)) * LN_2
    own = CONSUMER_ID * WGMMA_M + gl.arange(0, WGMMA_M, gl.SliceLayout(1, layout))
    own_sums = CONSUMER_ID * WGMMA_M + gl.arange(0, WGMMA_M, top.type.layout)
    if part < 0:
        places = o + batch.to(gl.int64) * o_batch + head.to(gl.int64) * o_head
        places = places + ((row + own).to(gl.int64) * o_row)[:, None] + channels[None, :]
        gl.store(places, acc.to(o.dtype.element_ty), mask=(row + own < end)[:, None])
        rows = (batch * queries + row + own_sums).to(gl.int64)
        gl.store(lse + rows * heads + head, sums, mask=row + own_sums < end)
    else:
        first = part.to(gl.int64) * (CONSUMERS * WGMMA_M)
        gl.store(parts + first * D + (own * D)[:, None] + channels[None, :], acc)
        gl.store(part_sums + first + own_sums, sums)


@gluon.jit
def attend_by_turns(work, buffers, q_bars, k_bars, v_bars, turns, out, scale, heads,
                    CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
                    STAGES: gl.constexpr):  # fmt: skip
    """A consumer in 16 bits: scores of a tile and products with the one before are in flight together."""
    work_tiles, work_indptr = work
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty = q_bars
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q = q_smem.index(CONSUMER_ID)
    slot = 0
    phase = 0
    q_phase = 0
    turn = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        _column, _row, _end, first, last, _part = read_work_tile(work_tiles, i)
        tiles = gl.cdiv(last - first, BLOCK_N)
        none = gl.zeros([WGMMA_M, BLOCK_N], gl.float32, s_layout)
        mbarrier.wait(q_full.index(CONSUMER_ID), q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(slot), phase)
        s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        s = hide(warpgroup_mma_wait(0, deps=[s]), last - first - (tiles - 1) * BLOCK_N)
        mbarrier.arrive(k_empty.index(slot))
        top = gl.max(s, 1) * scale
        p = exp2(s * scale - top[:, None])
        total = gl.sum(p, 1)
        acc = gl.zeros([WGMMA_M, D], gl.float32, o_layout)
        for _ in range(1, tiles):
            v_slot, v_phase = slot, phase
            slot, phase = next_stage(slot, phase, STAGES)
            mbarrier.wait(k_full.index(slot), phase)
            mbarrier.wait(turns.index(CONSUMER_ID), turn)
            turn ^= 1
            s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_slot), v_phase)
            left = left_operand(p, v_smem.dtype, p_layout, False)
            acc = warpgroup_mma(left, v_smem.index(v_slot), acc, is_async=True)
            mbarrier.arrive(turns.index((CONSUMER_ID + 1) % CONSUMERS))
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index(slot))
            new = gl.maximum(top, gl.max(s, 1) * scale)
            p = exp2(s * scale - new[:, None])
            fade = exp2(top - new)
            total = total * fade + gl.sum(p, 1)
            top = new
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(v_slot))
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        mbarrier.arrive(q_empty.index(CONSUMER_ID))
        mbarrier.wait(v_full.index(slot), phase)
        acc = warpgroup_mma(left_operand(p, v_smem.dtype, p_layout, False), v_smem.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot))
        slot, phase = next_stage(slot, phase, STAGES)
        finish(acc, top, total, out, work_tiles, i, heads, CONSUMER_ID, CONSUMERS, False)


@gluon.jit
def step(acc, top, total, q, factor, buffers, k_bars, v_bars, slot, phase, count,
         BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """One tile of keys in FP8, of which the first `count` count if MASKED.

    The tensor cores add up the products of this tile only, BLOCK_N terms; the sum over tiles is a float32's.
    """
    _, k_smem, v_smem = buffers
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    mbarrier.wait(k_full.index(slot), phase)
    s = warpgroup_mma(
        q, k_smem.index(slot).permute((1, 0)), gl.zeros([WGMMA_M, BLOCK_N], gl.float32, s_layout),
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot))
    if MASKED:
        s = hide(s, count)
    new = gl.maximum(top, gl.max(s, 1) * factor - SHIFT)
    p = exp2(s * factor[:, None] - new[:, None])
    fade = exp2(top - new)
    total = total * fade + gl.sum(p, 1)
    left = left_operand(p, v_smem.dtype, gl.DotOperandLayout(0, o_layout, 4), True)
    mbarrier.wait(v_full.index(slot), phase)
    product = warpgroup_mma(
        left, v_smem.index(slot).permute((1, 0)), gl.zeros([WGMMA_M, D], gl.float32, o_layout),
        use_acc=False, is_async=True,
    )  # fmt: skip
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
    acc += warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(slot))
    slot, phase = next_stage(slot, phase, STAGES)
    return acc, new, total, slot, phase


@gluon.jit
def attend_in_steps(work, buffers, q_bars, k_bars, v_bars, out, q_scale, k_scale, scale, heads,
                    CONSUMER_ID: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
                    STAGES: gl.constexpr):  # fmt: skip
    """A consumer in FP8: one tile after the other."""
    work_tiles, work_indptr = work
    q_full, q_empty = q_bars
    queries = out[5]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = buffers[0].index(CONSUMER_ID)
    slot = 0
    phase = 0
    q_phase = 0
    for i in range(gl.load(work_indptr + gl.program_id(0)), gl.load(work_indptr + gl.program_id(0) + 1)):
        column, row, end, first, last, _part = read_work_tile(work_tiles, i)
        batch, head = column // heads, column % heads
        tiles = gl.cdiv(last - first, BLOCK_N)
        rows = row + CONSUMER_ID * WGMMA_M + gl.arange(0, WGMMA_M, s_rows)
        places = q_scale + (batch * queries + rows).to(gl.int64) * heads + head
        factor = gl.load(places, mask=rows < end, other=0.0) * (gl.load(k_scale + column) * scale)
        top = gl.full([WGMMA_M], float("-inf"), gl.float32, s_rows)
        total = gl.zeros([WGMMA_M], gl.float32, s_rows)
        acc = gl.zeros([WGMMA_M, D], gl.float32, o_layout)
        mbarrier.wait(q_full.index(CONSUMER_ID), q_phase)
        q_phase ^= 1
        acc, top, total, slot, phase = step(
            acc, top, total, q, factor, buffers, k_bars, v_bars, slot, phase, last - first - (tiles - 1) * BLOCK_N,
            BLOCK_N, D, STAGES, True,
        )  # fmt: skip
        for _ in range(1, tiles):
            acc, top, total, slot, phase = step(
                acc, top, total, q, factor, buffers, k_bars, v_bars, slot, phase, BLOCK_N, BLOCK_N, D, STAGES, False
            )
        mbarrier.arrive(q_empty.index(CONSUMER_ID))
        finish(acc, top, total, out, work_tiles, i, heads, CONSUMER_ID, CONSUMERS, True)


# What is not specialised is not compiled anew: 1 head, lengths that 16 divides.
@gluon.jit(do_not_specialize=["heads", "queries", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head"])
def attention_hopper(
    q_rows, k_rows, v_rows, o, lse, parts, part_sums, work_tiles, work_indptr, q_scale, k_scale, v_scale, scale, heads, queries,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, o_batch, o_row, o_head,
    FP8: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Works off the work_tiles from work_indptr[program] to work_indptr[program + 1]; the launcher says what the rest is."""
    CONSUMERS: gl.constexpr = 3 if FP8 else 2
    q_smem = gl.allocate_shared_memory(q_rows.dtype, [CONSUMERS, WGMMA_M, D], q_rows.layout)
    k_smem = gl.allocate_shared_memory(k_rows.dtype, [STAGES, BLOCK_N, D], k_rows.layout)
    v_smem = gl.allocate_shared_memory(v_rows.dtype, [STAGES] + v_rows.block_type.shape, v_rows.layout)  # noqa: RUF005
    q_bars = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)  # full, empty
    k_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)
    v_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)
    turns = alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    work = work_tiles, work_indptr
    buffers = q_smem, k_smem, v_smem
    out = o, lse, parts, part_sums, v_scale, queries, o_batch, o_row, o_head
    rows = q_rows, k_rows, v_rows
    strides = q_batch, q_head, k_batch, k_head, v_batch, v_head
    # Registers a thread: 65,536 are shared out among the groups of four warps; the first one gets what is left.
    if FP8:
        gl.warp_specialize([
            (attend_in_steps, (work, buffers, q_bars, k_bars, v_bars, out, q_scale, k_scale, scale, heads,
                               0, CONSUMERS, BLOCK_N, D, STAGES)),
            (attend_in_steps, (work, buffers, q_bars, k_bars, v_bars, out, q_scale, k_scale, scale, heads,
                               1, CONSUMERS, BLOCK_N, D, STAGES)),
            (attend_in_steps, (work, buffers, q_bars, k_bars, v_bars, out, q_scale, k_scale, scale, heads,
                               2, CONSUMERS, BLOCK_N, D, STAGES)),
            (produce, (work, rows, strides, buffers, q_bars, k_bars, v_bars, heads, FP8, CONSUMERS, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        mbarrier.arrive(turns.index(0))
        gl.warp_specialize([
            (attend_by_turns, (work, buffers, q_bars, k_bars, v_bars, turns, out, scale, heads,
                               0, CONSUMERS, BLOCK_N, D, STAGES)),
            (attend_by_turns, (work, buffers, q_bars, k_bars, v_bars, turns, out, scale, heads,
                               1, CONSUMERS, BLOCK_N, D, STAGES)),
            (produce, (work, rows, strides, buffers, q_bars, k_bars, v_bars, heads, FP8, CONSUMERS, BLOCK_N, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["heads", "queries"])
def merge_parts(o, lse, parts, part_sums, merges, heads, queries, o_batch, o_row, o_head,
                D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """ROWS queries of a tile: o = sum_i exp(lse_i - lse) o_i over the parts of its keys, as in `merge_attention`."""
    merge = merges + 5 * tl.program_id(0)
    column, row, end = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    first, count = tl.load(merge + 3).to(tl.int64), tl.load(merge + 4)
    own = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(count):
        top = tl.maximum(top, tl.load(part_sums + (first + i) * TILE + own))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for i in range(count):
        rows = (first + i) * TILE + own
        weight = tl.exp(tl.load(part_sums + rows) - top)
        total += weight
        acc += weight[:, None] * tl.load(parts + rows[:, None] * D + channels[None, :])
    batch, head = (column // heads).to(tl.int64), (column % heads).to(tl.int64)
    valid = row + own < end
    rows = (row + own).to(tl.int64)
    places = o + batch * o_batch + head * o_head + rows[:, None] * o_row + channels[None, :]
    tl.store(places, (acc / total[:, None]).to(o.dtype.element_ty), mask=valid[:, None])
    tl.store(lse + (batch * queries + rows) * heads + head, top + tl.log(total), mask=valid)


def describe(x: Tensor, rows: int, width: int, stride: int, block: list[int]) -> TensorDescriptor:
    """Boxes of x, seen as [rows, width] with rows `stride` apart: every batch and head is an offset of columns."""
    return TensorDescriptor(x, [rows, width], [stride, 1], block, smem_layout(tuple(block), x.dtype))


def extent(x: Tensor) -> int:
    """Of [batch, token, head, d]: one past the largest offset of columns."""
    return (x.shape[0] - 1) * x.stride(0) + (x.shape[2] - 1) * x.stride(2) + x.shape[3]


def supports(q: Tensor, k: Tensor, v: Tensor, seen: KVRanges) -> bool:
    """Whether the kernel takes these operands, [batch, token, head, d] each, or FP8 v [batch, head, d, token].

    Copies start at whole 16 bytes, rows lie whole 16 bytes apart, columns are numbers of 31 bits; in FP8, tiles of keys
    start at whole groups of 16.
    """
    fp8 = q.dtype == FP8
    rows = (q, k) if fp8 else (q, k, v)
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(1) > 0 and x.stride(1) * x.itemsize % 16 == 0 and extent(x) < 2**31
        for x in rows
    )
    grouped = not fp8 or (v.is_contiguous() and all(first % 16 == 0 for *_, first, _ in seen))
    return q.dtype in GL_DTYPES and q.shape[3] in (64, 128) and aligned and grouped


def launch_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None,
    seen: KVRanges,
    scale: float,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """o in `dtype` [batch, token, head, d] and lse [batch, token, head] of operands that `supports` approves.

    `scales` of q [batch, token, head], k [batch, head] and v [batch, head, d] make it FP8.
    """
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    parameters: dict[str, Any] = {**DEFAULT[q.dtype == FP8], **(config or {})}
    block_n, group = parameters["BLOCK_N"], WGMMA_M.value
    block_m = group * (3 if scales else 2)
    programs = gpu_of(q.device).multiprocessors
    work = stream_k_schedule_on(q.device, type(q), seen, block_m, block_n, batch * heads, programs)
    q_rows = describe(q, queries, extent(q), q.stride(1), [group, d])
    k_rows = describe(k, keys, extent(k), k.stride(1), [block_n, d])
    if scales:
        v_rows, v_strides = describe(v, batch * heads * d, v.shape[3], v.stride(2), [d, block_n]), (heads * d, d)
    else:
        v_rows, v_strides = describe(v, keys, extent(v), v.stride(1), [block_n, d]), (v.stride(0), v.stride(2))
    o = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    parts, part_sums = lse.new_empty(work.num_partials * block_m, d), lse.new_empty(work.num_partials * block_m)
    attention_hopper[(programs,)](
        q_rows, k_rows, v_rows, o, lse, parts, part_sums, work.work_tiles, work.work_indptr, *(scales or (lse, lse, lse)),
        scale * math.log2(math.e), heads, queries, q.stride(0), q.stride(2), k.stride(0), k.stride(2), *v_strides,
        *o.stride()[:3], FP8=scales is not None, D=d, num_warps=4, **parameters,
    )  # fmt: skip
    if len(work.combines):
        merge_parts[(len(work.combines), block_m // MERGE_ROWS)](
            o, lse, parts, part_sums, work.combines, heads, queries, *o.stride()[:3], D=d, TILE=block_m, ROWS=MERGE_ROWS
        )
    return o, lse
