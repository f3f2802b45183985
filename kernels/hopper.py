"""What the persistent Gluon kernels for Hopper have in common: barriers, the ring of stages, the list of pieces.

A program's warps have two roles that meet at barriers in shared memory alone: one warp, the producer, copies tiles into
the stages of a ring (TMA), groups of four warps, the consumers, multiply them (wgmma). A stage is *full* when its bytes
have arrived and *empty* when all consumers have read it. What a program computes is a list of *pieces*, made by
kernels/schedule.py.
"""

# Types inside device code are Triton's, not Python's.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

FP8 = torch.float8_e4m3fn
ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, FP8: gl.float8e4nv}
GROUP = gl.constexpr(64)  # rows of a consumer, as many as a wgmma has
PIECE = gl.constexpr(6)  # numbers of a piece: column, row, end of rows, first key, end of keys, part or -1


@cache
def layout_of(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a box of that shape lies in shared memory; asked for with every launch, and slow to make."""
    return gl.NVMMASharedLayout.get_default_for(list(block), ELEMENTS[dtype])


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and the parity of its barriers: it turns with every round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def preceding(slot, STAGES: gl.constexpr):
    """The stage before. To remember it in a variable set to `slot` before a loop fails silently: Triton 3.6 takes what
    a loop sets to a value that it had before the loop for unchanged, and does not carry it."""
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def read_piece(pieces, i):
    """column, row, end of rows, first key, end of keys, part."""
    piece = pieces + PIECE * i
    column, row, end = gl.load(piece), gl.load(piece + 1), gl.load(piece + 2)
    first, last, part = gl.load(piece + 3), gl.load(piece + 4), gl.load(piece + 5)
    return column, row, end, first, last, part


@gluon.jit
def new_barriers(n: gl.constexpr, count: gl.constexpr):
    """n barriers in shared memory, each of which `count` arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit
def to_e4m3(x):
    """x rounded to e4m3, saturating; four at once, which Triton's own conversion takes apart again."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [x], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip
