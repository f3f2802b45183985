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
from triton.language.core import _aggregate  # as Gluon's own library imports it

from kernels.common import FP8

GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, FP8: gl.float8e4nv, torch.int8: gl.int8}
SHARED_BYTES = 232448  # of shared memory that a program can have
WGMMA_M = gl.constexpr(64)  # rows of a wgmma instruction, and so of a consumer's tile
thread_barrier: Any = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 shortened its name
WORK_TILE_FIELDS = gl.constexpr(6)  # of a row of `StreamKSchedule.work_tiles`


@cache
def smem_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The shared-memory layout of a TMA box. Cached, because every launch needs it and it is slow to construct."""
    return gl.NVMMASharedLayout.get_default_for(list(block), GL_DTYPES[dtype])


def aggregate(cls: type) -> Any:
    """A struct of device code whose constructor takes the annotated fields, in their order."""
    fields = tuple(cls.__annotations__)

    @gluon.constexpr_function
    def init(self, *values):
        for name, value in zip(fields, values, strict=True):
            setattr(self, name, value)

    cls.__init__ = init
    return _aggregate(cls)


@gluon.jit
def next_stage(stage, phase, stages):
    """The stage after `stage` of a ring of `stages`, and the parity of its barriers, which flips with every round."""
    stage += 1
    if stage == stages:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def previous_stage(stage, STAGES: gl.constexpr):
    """The stage of the ring before `stage`.

    Do not keep it in a variable that is assigned `stage` before the loop: Triton 3.6 silently fails to carry a variable
    to which a loop assigns a value from before the loop.
    """
    return gl.where(stage == 0, STAGES, stage) - 1


@gluon.jit
def read_work_tile(work_tiles, i):
    """Work tile i: column, first row, end of rows, first key, end of keys, index of its partial result or -1."""
    tile = work_tiles + WORK_TILE_FIELDS * i
    column, row, row_end = gl.load(tile), gl.load(tile + 1), gl.load(tile + 2)
    kv_start, kv_end, partial = gl.load(tile + 3), gl.load(tile + 4), gl.load(tile + 5)
    return column, row, row_end, kv_start, kv_end, partial


@gluon.jit
def alloc_barriers(n: gl.constexpr, count: gl.constexpr):
    """Allocates n mbarriers in shared memory, each of which completes a phase after `count` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit
def split_columns(x):
    """Splits x into the left and the right half of its columns without moving data between registers."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    K: gl.constexpr = x.type.layout.instr_shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, K])
    left, right = x.reshape([M, 2, N // 2]).permute(0, 2, 1).split()
    left = gl.convert_layout(left, layout, assert_trivial=True)
    right = gl.convert_layout(right, layout, assert_trivial=True)
    return left, right


@gluon.jit
def exp2(x):
    """2^x by the special function unit. Denormal results become zero, which saves three instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def mask_scores(scores, num_keys):
    """Sets the scores of all keys from `num_keys` on to minus infinity."""
    offs_n = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where((offs_n < num_keys)[None, :], scores, float("-inf"))


@gluon.jit
def to_e4m3_x4(x):
    """Rounds x to e4m3, saturating, and packs four elements at once. Triton's own conversion would unpack them."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [x], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip
