"""Shared device code of the persistent, warp-specialised Gluon kernels for Hopper (sm_90).

The warps of a program have two roles, which synchronise through mbarriers in shared memory alone. One warp, the load
partition, copies tiles into a ring of stages with the tensor memory accelerator (TMA). Warp groups of four warps, the
MMA partitions or *consumers*, multiply the tiles (wgmma). A stage is *full* when its bytes have arrived, and *empty*
when all consumers have read it. kernels/scheduler.py makes the list of work tiles that a program works through.
"""

# Types inside device code are Triton's, not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.common import FP8

GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, FP8: gl.float8e4nv}
WGMMA_M = gl.constexpr(64)  # rows of a wgmma instruction, and so of a consumer's tile
WORK_TILE_FIELDS = gl.constexpr(6)  # of a row of `StreamKSchedule.work_tiles`


@cache
def smem_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The shared-memory layout of a TMA box of that shape. Cached: every launch asks for it, and it is slow to make."""
    return gl.NVMMASharedLayout.get_default_for(list(block), GL_DTYPES[dtype])


@gluon.jit
def next_stage(slot, phase, STAGES: gl.constexpr):
    """The stage of the ring after `slot`, and the parity of its barriers, which flips with every round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def previous_stage(slot, STAGES: gl.constexpr):
    """The stage of the ring before `slot`.

    Keeping it in a variable that is set to `slot` before a loop fails silently: Triton 3.6 takes a variable that a loop
    sets to a value which existed before the loop for unchanged, and does not carry it.
    """
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def read_work_tile(work_tiles, i):
    """Column, first row, end of rows, first key, end of keys, and index of the partial result of work tile i."""
    tile = work_tiles + WORK_TILE_FIELDS * i
    column, row, end = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
    first_key, end_key, partial = gl.load(tile + 3), gl.load(tile + 4), gl.load(tile + 5)
    return column, row, end, first_key, end_key, partial


@gluon.jit
def alloc_barriers(n: gl.constexpr, count: gl.constexpr):
    """n mbarriers in shared memory, each of which `count` arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit
def split_columns(x):
    """The left and the right half of x's columns, without moving a register."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    K: gl.constexpr = x.type.layout.instr_shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, K])
    left, right = x.reshape([M, 2, N // 2]).permute(0, 2, 1).split()
    left = gl.convert_layout(left, layout, assert_trivial=True)
    right = gl.convert_layout(right, layout, assert_trivial=True)
    return left, right


@gluon.jit
def to_e4m3_x4(x):
    """x rounded to e4m3, saturating, four elements at once: Triton's own conversion unpacks them again."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [x], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip
