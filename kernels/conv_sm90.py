"""The causal convolution of kernels/causal_conv3d.py on Hopper: an implicit matrix product, in Gluon.

    y[pixel, o] = bias[o] + sum over taps and channels of x[pixel + tap, c] w[o, tap, c]  (+ residual[pixel, o])

A program works off tiles: TILE_H x 8 pixels for each of its consumers, one below the other, by BLOCK_N0 + BLOCK_N1 output
channels. More TILE_H, 16 for 8, have more pixels share the weights that a tile copies, and need twice the registers.
kernels/sm90.py says what roles its warps have. The producer copies, for every tap and block of channels, the pixels
that the tap sees as boxes of the frame; TMA fills what lies outside with zeros, so that there is no padding, and takes
it from `past` or from x, so that nothing is concatenated. Taps on frames before the clip are left out. Output and
residual pass through shared memory as in kernels/linear_sm90.py.

NORM: what is stored is not y but SiLU of its norm over a pixel's channels, as in kernels/rms_norm_silu.py, in 8 bits if
the convolution behind wants that. A tile must have all channels: then a pixel's are in the registers of four threads,
and the two passes over memory of a norm of its own are spared.

REUSE_ROWS: a stage holds one box more below the others, and serves the K taps of a column of the kernel: eight pixels of a
line are a whole number of swizzled rows, so that the tap below sees the same bytes, one line on. With few output
channels copies from the L2 cache are what limits, and these are 4/9 of those of nine taps.

wgmma has widths that tensors cannot have: 192 and 96 channels are BLOCK_N0 + BLOCK_N1 = 128 + 64 and 64 + 32. FP8 sums stay in
the tensor cores, which keep 13 bits behind the point of the largest term, see kernels/linear_sm90.py.
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

from kernels.linear_sm90 import split_columns
from kernels.sm90 import GL_DTYPES, alloc_barriers, next_stage, previous_stage, smem_layout, to_e4m3_x4
from kernels.tuning import LaunchConfig, gpu_of

SIDE = gl.constexpr(8)  # lines and columns of a box of pixels
CONSUMERS = gl.constexpr(3)

NARROW, THIN = 96, 16  # output channels that tiles of 64 + 32 and of 16 + 0 take at once
WIDEST = 192  # output channels that a tile can have
WHOLE = 8  # output channels that 16 bytes hold, which the copy engine moves


# --- Device code ----------------------------------------------------------------------------------------------------


@gluon.jit
def locate(tile, sizes, WIDTH: gl.constexpr, TILE_H: gl.constexpr):
    """A tile's frame, row, column and first output channel: all channels of a place, then places, then frames."""
    _frames, _before, tiles_h, tiles_w, groups, _blocks, _channels = sizes
    place = tile // groups
    frame, place = place // (tiles_h * tiles_w), place % (tiles_h * tiles_w)
    return frame, place // tiles_w * (CONSUMERS * TILE_H), place % tiles_w * SIDE, tile % groups * WIDTH


@gluon.jit
def produce(boxes, buffers, stage_bars, residual_bars, sizes, tiles, dy, dx, KT: gl.constexpr, K: gl.constexpr,
            RESIDUAL: gl.constexpr, BLOCK_N0: gl.constexpr, BLOCK_N1: gl.constexpr,
            BLOCK_K: gl.constexpr, STAGES: gl.constexpr, REUSE_ROWS: gl.constexpr, TILE_H: gl.constexpr,
            STRIDE: gl.constexpr):  # fmt: skip
    """Copies the pixels and weights of all tiles, in the order in which the consumers take them.

    The taps of a pixel begin dy rows and dx columns from it. With a STRIDE of 2, boxes are of pairs of rows and of
    columns: [frame, pair, row of the pair, pair, channels of both pixels].
    """
    x_boxes, past_boxes, left_boxes, right_boxes, _y_boxes, residual_boxes = boxes
    x_smem, left_smem, right_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    _frames, before, _tiles_h, _tiles_w, _groups, blocks, channels = sizes
    PIECES: gl.constexpr = 3 if BLOCK_N1 else 2
    TAPS: gl.constexpr = K if REUSE_ROWS else 1
    BOXES: gl.constexpr = CONSUMERS * (TILE_H // SIDE) + (1 if REUSE_ROWS else 0)
    slot = 0
    phase = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        frame, row, column, first = locate(tile, sizes, BLOCK_N0 + BLOCK_N1, TILE_H)
        for i in range(gl.maximum(0, KT - 1 - frame - before), KT):
            seen = frame + i - (KT - 1)
            for step in range(K * K // TAPS):
                for block in range(blocks):
                    mbarrier.wait(empty.index(slot), phase ^ 1)
                    bar = full.index(slot)
                    mbarrier.expect(
                        bar, BOXES * x_boxes.block_type.nbytes + TAPS * left_boxes.block_type.nbytes
                        + (TAPS * right_boxes.block_type.nbytes if BLOCK_N1 else 0),
                    )  # fmt: skip
                    channel = block * BLOCK_K
                    top = step // K + dy
                    left = step % K + dx
                    for box in gl.static_range(BOXES):
                        x = x_smem.index(slot * BOXES + box)
                        line = row + box * SIDE
                        if STRIDE == 2:
                            place = [seen, line + top // 2, top % 2, column + left // 2, left % 2 * channels + channel]
                            tma.async_copy_global_to_shared(x_boxes, place, bar, x)
                        elif seen < 0:
                            place = [seen + before, line + top, column + left, channel]
                            tma.async_copy_global_to_shared(past_boxes, place, bar, x)
                        else:
                            place = [seen, line + top, column + left, channel]
                            tma.async_copy_global_to_shared(x_boxes, place, bar, x)
                    for tap in gl.static_range(TAPS):
                        term = ((i * K + tap) * K + step) * channels + channel
                        w = slot * TAPS + tap
                        tma.async_copy_global_to_shared(left_boxes, [first, term], bar, left_smem.index(w))
                        if BLOCK_N1:
                            tma.async_copy_global_to_shared(
                                right_boxes, [first + BLOCK_N0, term], bar, right_smem.index(w)
                            )
                    slot, phase = next_stage(slot, phase, STAGES)
        if RESIDUAL:  # now, as consumers still have all stages to read: earlier it would wait for the output before
            for group in gl.static_range(CONSUMERS):
                mbarrier.wait(residual_empty.index(group), turn ^ 1)
                mbarrier.expect(residual_full.index(group), PIECES * residual_boxes.block_type.nbytes)
                for piece in gl.static_range(PIECES):
                    tma.async_copy_global_to_shared(
                        residual_boxes, [frame, row + group * TILE_H, column, first + piece * (BLOCK_N0 // 2)],
                        residual_full.index(group), y_smem.index(group * PIECES + piece),
                    )  # fmt: skip
            turn ^= 1


@gluon.jit
def affine(y, first, scale, bias, outputs, SCALED: gl.constexpr, BIAS: gl.constexpr):
    """The sums y of the output channels from `first` on, scaled and with their bias; 0 beyond the last one."""
    channel = first + gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
    within = channel < outputs
    if SCALED:
        y = y * gl.load(scale + channel, mask=within, other=0.0)[None, :]
    if BIAS:
        y = y + gl.load(bias + channel, mask=within, other=0.0).to(gl.float32)[None, :]
    return y


@gluon.jit
def squares(y, layout: gl.constexpr):
    """Sums over each pixel's channels."""
    return gl.convert_layout(gl.sum(y * y, 1), layout, assert_trivial=True)


@gluon.jit
def rms_norm_silu(y, first, reciprocal, gamma, root, factor, outputs):
    """SiLU of y gamma root times its pixel's `reciprocal`, times `factor`; y: the channels from `first` on."""
    channel = first + gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
    weight = gl.load(gamma + channel, mask=channel < outputs, other=0.0).to(gl.float32) * root
    reciprocal = gl.convert_layout(reciprocal, gl.SliceLayout(1, y.type.layout), assert_trivial=True)
    y = y * reciprocal[:, None] * weight[None, :]
    return y * (factor / (1.0 + gl.exp(-y)))


@gluon.jit
def multiply(boxes, buffers, stage_bars, residual_bars, sizes, tiles, scale, bias, norm, outputs,
             CONSUMER_ID: gl.constexpr, KT: gl.constexpr, K: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr,
             RESIDUAL: gl.constexpr, NORM: gl.constexpr, BLOCK_N0: gl.constexpr, BLOCK_N1: gl.constexpr, BLOCK_K: gl.constexpr,
             STAGES: gl.constexpr, REUSE_ROWS: gl.constexpr, TILE_H: gl.constexpr):  # fmt: skip
    """A consumer."""
    x_smem, left_smem, right_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    _frames, before, _tiles_h, _tiles_w, _groups, blocks, _channels = sizes
    DTYPE: gl.constexpr = x_smem.dtype
    PIECES: gl.constexpr = 3 if BLOCK_N1 else 2
    TAPS: gl.constexpr = K if REUSE_ROWS else 1
    BOXES: gl.constexpr = CONSUMERS * (TILE_H // SIDE) + (1 if REUSE_ROWS else 0)
    PIXELS: gl.constexpr = TILE_H * SIDE
    TERMS: gl.constexpr = 256 // DTYPE.primitive_bitwidth  # that one instruction multiplies
    left_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N0, TERMS])
    right_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N1 if BLOCK_N1 else 32, TERMS])
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIXELS, BLOCK_K], DTYPE)
    y_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIXELS, BLOCK_N0 // 2], y_smem.dtype)
    line_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, BLOCK_K], DTYPE)
    lines = x_smem._reinterpret(DTYPE, [STAGES * BOXES * SIDE, SIDE, BLOCK_K], line_layout)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        frame, _row, _column, _first = locate(tile, sizes, BLOCK_N0 + BLOCK_N1, TILE_H)
        steps = (KT - gl.maximum(0, KT - 1 - frame - before)) * (K * K // TAPS) * blocks
        left = gl.zeros([PIXELS, BLOCK_N0], gl.float32, left_layout)
        right = gl.zeros([PIXELS, BLOCK_N1 if BLOCK_N1 else 32], gl.float32, right_layout)
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            for tap in gl.static_range(TAPS):
                line = lines.index(slot * BOXES * SIDE + CONSUMER_ID * TILE_H + tap)
                x = line._reinterpret(DTYPE, [PIXELS, BLOCK_K], x_layout)  # that line and those below it
                w = slot * TAPS + tap
                left = warpgroup_mma(x, left_smem.index(w).permute((1, 0)), left, is_async=True)
                if BLOCK_N1:
                    right = warpgroup_mma(x, right_smem.index(w).permute((1, 0)), right, is_async=True)
            if BLOCK_N1:
                left, right = warpgroup_mma_wait(2 * TAPS, deps=[left, right])
            else:
                left = warpgroup_mma_wait(TAPS, deps=[left])
            if step > 0:
                mbarrier.arrive(empty.index(previous_stage(slot, STAGES)))
            slot, phase = next_stage(slot, phase, STAGES)
        if BLOCK_N1:
            left, right = warpgroup_mma_wait(0, deps=[left, right])
        else:
            left = warpgroup_mma_wait(0, deps=[left])
        mbarrier.arrive(empty.index(previous_stage(slot, STAGES)))
        frame, row, column, first = locate(
            tile, sizes, BLOCK_N0 + BLOCK_N1, TILE_H
        )  # again, so as not to hold registers
        if RESIDUAL:
            mbarrier.wait(residual_full.index(CONSUMER_ID), tile // gl.num_programs(0) & 1)
        else:
            tma.store_wait(0)  # of the tile before: its bytes have left
        gamma, root, factor = norm
        reciprocal = 1.0
        if NORM:
            left = affine(left, first, scale, bias, outputs, SCALED, BIAS)
            of_pixel: gl.constexpr = gl.SliceLayout(1, left_layout)
            total = squares(left, of_pixel)
            if BLOCK_N1:
                right = affine(right, first + BLOCK_N0, scale, bias, outputs, SCALED, BIAS)
                total += squares(right, of_pixel)
            reciprocal = 1.0 / gl.maximum(gl.sqrt(total), 1e-12)
        pieces = split_columns(left) + (right,)  # noqa: RUF005
        for i in gl.static_range(PIECES):
            gl.thread_barrier()  # or ptxas loads all pieces' vectors first, and runs out of registers
            out = y_smem.index(CONSUMER_ID * PIECES + i)
            out = out._reinterpret(out.dtype, [PIXELS, BLOCK_N0 // 2], y_layout)  # pixels [1, TILE_H, 8, n] in a row
            channel = first + i * (BLOCK_N0 // 2)
            if NORM:
                y = rms_norm_silu(pieces[i], channel, reciprocal, gamma, root, factor, outputs)
            else:
                y = affine(pieces[i], channel, scale, bias, outputs, SCALED, BIAS)
            if RESIDUAL:
                y = y + out.load(y.type.layout).to(gl.float32)
            out.store(to_e4m3_x4(y) if out.dtype == gl.float8e4nv else y.to(out.dtype))
        fence_async_shared()
        for i in gl.static_range(PIECES):
            place = [frame, row + CONSUMER_ID * TILE_H, column, first + i * (BLOCK_N0 // 2)]
            tma.async_copy_shared_to_global(boxes[4], place, y_smem.index(CONSUMER_ID * PIECES + i))
        if RESIDUAL:
            tma.store_wait(0)
            mbarrier.arrive(residual_empty.index(CONSUMER_ID))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["frames", "before", "tiles_h", "tiles_w", "groups", "blocks", "channels", "outputs", "dy",
                              "dx"])  # fmt: skip
def conv_hopper(
    x_boxes, past_boxes, left_boxes, right_boxes, y_boxes, residual_boxes, scale, bias, gamma, root, factor, frames,
    before, tiles_h, tiles_w, groups, blocks, channels, outputs, dy, dx, KT: gl.constexpr, K: gl.constexpr,
    SCALED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, NORM: gl.constexpr, BLOCK_N0: gl.constexpr,
    BLOCK_N1: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, REUSE_ROWS: gl.constexpr, TILE_H: gl.constexpr,
    STRIDE: gl.constexpr,
):  # fmt: skip
    """Every program takes each num_programs-th tile; the launcher says what the rest is."""
    PIECES: gl.constexpr = 3 if BLOCK_N1 else 2
    TAPS: gl.constexpr = K if REUSE_ROWS else 1
    BOXES: gl.constexpr = CONSUMERS * (TILE_H // SIDE) + (1 if REUSE_ROWS else 0)
    RIGHT_ROWS: gl.constexpr = BLOCK_N1 if BLOCK_N1 else 8
    BOX: gl.constexpr = [1, SIDE, 1, SIDE, BLOCK_K] if STRIDE == 2 else [1, SIDE, SIDE, BLOCK_K]
    x_smem = gl.allocate_shared_memory(x_boxes.dtype, [STAGES * BOXES] + BOX, x_boxes.layout)  # noqa: RUF005
    left_smem = gl.allocate_shared_memory(x_boxes.dtype, [STAGES * TAPS, BLOCK_N0, BLOCK_K], left_boxes.layout)
    right_smem = gl.allocate_shared_memory(x_boxes.dtype, [STAGES * TAPS, RIGHT_ROWS, BLOCK_K], right_boxes.layout)
    y_smem = gl.allocate_shared_memory(
        y_boxes.dtype, [CONSUMERS * PIECES, 1, TILE_H, SIDE, BLOCK_N0 // 2], y_boxes.layout
    )
    stage_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)  # full, empty
    residual_bars = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    boxes = x_boxes, past_boxes, left_boxes, right_boxes, y_boxes, residual_boxes
    buffers = x_smem, left_smem, right_smem, y_smem
    sizes = frames, before, tiles_h, tiles_w, groups, blocks, channels
    tiles = frames * tiles_h * tiles_w * groups
    norm = gamma, root, factor
    # Registers a thread: 65,536 are shared out among the groups of four warps; the first one gets what is left.
    gl.warp_specialize([
        (multiply, (boxes, buffers, stage_bars, residual_bars, sizes, tiles, scale, bias, norm, outputs, 0, KT,
                    K, SCALED, BIAS, RESIDUAL, NORM, BLOCK_N0, BLOCK_N1, BLOCK_K, STAGES, REUSE_ROWS, TILE_H)),
        (multiply, (boxes, buffers, stage_bars, residual_bars, sizes, tiles, scale, bias, norm, outputs, 1, KT,
                    K, SCALED, BIAS, RESIDUAL, NORM, BLOCK_N0, BLOCK_N1, BLOCK_K, STAGES, REUSE_ROWS, TILE_H)),
        (multiply, (boxes, buffers, stage_bars, residual_bars, sizes, tiles, scale, bias, norm, outputs, 2, KT,
                    K, SCALED, BIAS, RESIDUAL, NORM, BLOCK_N0, BLOCK_N1, BLOCK_K, STAGES, REUSE_ROWS, TILE_H)),
        (produce, (boxes, buffers, stage_bars, residual_bars, sizes, tiles, dy, dx, KT, K, RESIDUAL, BLOCK_N0,
                   BLOCK_N1, BLOCK_K, STAGES, REUSE_ROWS, TILE_H, STRIDE)),
    ], [4, 4, 1], [160, 160, 32])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Boxes of x, as [frame, row, column, channel] if it has frames; what is beyond is zero, and is not stored."""
    x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, smem_layout(tuple(block), x.dtype))


def describe_pairs(x: Tensor, block_k: int) -> TensorDescriptor:
    """Every second row and column of x, as [frame, pair of rows, row, pair of columns, channels of both]."""
    frames, channels, rows, columns = x.shape
    pairs = x.permute(0, 2, 3, 1).view(frames, rows // 2, 2, columns // 2, 2 * channels)
    block = [1, SIDE.value, 1, SIDE.value, block_k]
    return TensorDescriptor(pairs, list(pairs.shape), list(pairs.stride()), block, smem_layout(tuple(block), x.dtype))


def supports(x: Tensor, past: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these operands: 8 or 16 bits, pixels of whole 16 bytes."""
    aligned = all(y.data_ptr() % 16 == 0 for y in (x, past, weight) if len(y))
    return x.dtype in GL_DTYPES and weight.shape[1] * x.itemsize % 16 == 0 and aligned


def launch_sm90(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    reach: tuple[int, int],
    stride: int = 1,
    config: LaunchConfig | None = None,
    norm: tuple[Tensor, float, float] | None = None,
) -> None:
    """Fills y, float16 or bfloat16, any view of [frame, channel, row, column] with neighbouring channels in a row.

    `past`, [before, C, H, W], may be empty. The sums of operands that `supports` approves are multiplied by scale
    [outputs], float32, if there is one, and the residual is added, if there is one. `reach` says where the taps of a
    pixel begin: rows and columns from it. With a stride of 2, a pixel of y is two rows and columns of x wide; x has
    even numbers of them, BLOCK_K divides its channels, taps do not reach up or left, and nothing is REUSE_ROWS. A `norm` is
    gamma [outputs], the root of the number of channels, and a factor: BLOCK_N0 + BLOCK_N1 must then hold all outputs, y may be
    e4m3, and there is no residual.
    """
    channels, (frames, _, rows, columns) = x.shape[1], y.shape
    outputs, _, kt, k, _ = weight.shape
    parameters: dict[str, Any] = {**default(x.dtype, outputs, k), **(config or {})}
    left, right, block_k, lines = (parameters[name] for name in ("BLOCK_N0", "BLOCK_N1", "BLOCK_K", "TILE_H"))
    side = SIDE.value
    matrix = weight.permute(0, 2, 3, 4, 1).reshape(outputs, -1)  # a view, where the weight is channels-last
    box, piece = [1, side, side, block_k], [1, lines, side, left // 2]
    x_boxes, y_boxes = describe(x, box) if stride == 1 else describe_pairs(x, block_k), describe(y, piece)
    tiles_h, tiles_w = -(-rows // (lines * CONSUMERS.value)), -(-columns // side)
    groups = -(-outputs // (left + right))
    gamma, root, factor = norm or (y, 1.0, 1.0)
    programs = min(gpu_of(x.device).multiprocessors, frames * tiles_h * tiles_w * groups)
    conv_hopper[(programs,)](
        x_boxes, describe(past, box) if len(past) else x_boxes, describe(matrix, [left, block_k]),
        describe(matrix, [right or 8, block_k]), y_boxes, y_boxes if residual is None else describe(residual, piece),
        y if scale is None else scale, y if bias is None else bias, gamma, root, factor, frames, len(past),
        tiles_h, tiles_w, groups, -(-channels // block_k), channels, outputs, *reach, KT=kt, K=k,
        SCALED=scale is not None, BIAS=bias is not None, RESIDUAL=residual is not None, NORM=norm is not None,
        STRIDE=stride, num_warps=4, **parameters,
    )  # fmt: skip


def default(dtype: torch.dtype, outputs: int, k: int) -> LaunchConfig:
    """Where nothing was tuned: by the columns of a tile, and what fits into shared memory."""
    if outputs > NARROW:
        return {
            "BLOCK_N0": 128,
            "BLOCK_N1": 64,
            "BLOCK_K": 64,
            "STAGES": 6 // dtype.itemsize,
            "REUSE_ROWS": 0,
            "TILE_H": 8,
        }
    columns = {"BLOCK_N0": 64, "BLOCK_N1": 32} if outputs > THIN else {"BLOCK_N0": THIN, "BLOCK_N1": 0}
    stages = (10 if k > 1 else 12) // dtype.itemsize
    return {**columns, "BLOCK_K": 32, "STAGES": stages, "REUSE_ROWS": int(k > 1), "TILE_H": 8}
