"""Convolution of frames in channels-last memory on Hopper (sm_90): an implicit GEMM, written in Gluon.

    y[pixel, o] = bias[o] + sum over taps and channels of x[pixel + tap, c] w[o, tap, c]   (+ residual[pixel, o])

Tiles. The kernel is persistent: every program computes each num_programs-th tile. A tile has TILE_H x 8 pixels for each
of the three consumers, one consumer's pixels below the other's, by BLOCK_N0 + BLOCK_N1 output channels. TILE_H is 8 or
16: with 16, twice as many pixels share the weights that are copied for a tile, at twice the registers. There are two
blocks of output channels because Triton's tensors have powers of two as lengths, where wgmma has other widths as well:
192 channels are 128 + 64, and 96 are 64 + 32.

Loads. kernels/sm90.py describes the roles of the warps. For every tap and block of input channels, the load partition
copies the pixels that the tap sees, as boxes of 8 x 8 pixels of a frame. TMA fills what lies outside of the frame with
zeros, so that no padding is needed, and reads a frame from `past` or from x, so that nothing is concatenated. Taps on
frames before the clip are skipped. Output and residual pass through shared memory.

REUSE_ROWS. A stage holds one more box, below the others, and serves the K taps of one column of the filter. This works
because the 8 pixels of a row are a whole number of swizzled rows: the next tap sees the same bytes, one row further on.
With few output channels, copies from the L2 cache limit the kernel, and 3 x 3 taps then copy 4/9 of the pixels.

NORM. The epilogue stores SiLU(RMSNorm(y)) over a pixel's channels instead of y, as e4m3 if the next convolution wants
that, and so saves the norm's own two passes over memory. A tile must hold all output channels: then the channels of a
pixel are in the registers of four threads.

TAIL. The epilogue stores the tiles of the last frames a second time, to `tail`, from the same shared memory.

NORM, TAIL and a TILE_H of 16 are on trial until a GPU has measured them.

FP8 sums stay in the tensor cores, which align products to the largest term and keep 13 fraction bits of it.
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
from triton.language.core import _aggregate as aggregate  # as Gluon's tutorials import it

from kernels.sm90 import (
    GL_DTYPES,
    alloc_barriers,
    next_stage,
    previous_stage,
    smem_layout,
    split_columns,
    thread_barrier,
    to_e4m3_x4,
)
from kernels.tuning import LaunchConfig, gpu_of

BOX_SIZE = gl.constexpr(8)  # rows and columns of pixels that one TMA copy moves
CONSUMERS = gl.constexpr(3)  # MMA partitions

MAX_FUSED_CHANNELS = 192  # output channels of the largest tile, 128 + 64, and so the most that NORM can have
MEDIUM_TILE_CHANNELS = 96  # output channels of a tile of 64 + 32
SMALL_TILE_CHANNELS = 16  # output channels of a tile of 16 + 0


# --- Kernel ---------------------------------------------------------------------------------------------------------


@aggregate
class ConvConfig:
    """The constants of a launch, and the sizes that follow from them."""

    KT: gl.constexpr
    K: gl.constexpr
    SCALED: gl.constexpr
    BIAS: gl.constexpr
    RESIDUAL: gl.constexpr
    NORM: gl.constexpr
    TAIL: gl.constexpr
    STRIDE: gl.constexpr
    BLOCK_N0: gl.constexpr
    BLOCK_N1: gl.constexpr
    BLOCK_K: gl.constexpr
    STAGES: gl.constexpr
    TILE_H: gl.constexpr
    BLOCK_M: gl.constexpr  # pixels of a consumer's tile
    BLOCK_N: gl.constexpr  # output channels of a tile
    SUBTILES: gl.constexpr  # pieces of BLOCK_N0 / 2 output channels in which a tile is stored
    TAPS: gl.constexpr  # taps that a stage serves
    X_BOXES: gl.constexpr  # boxes of pixels in a stage

    @gluon.constexpr_function
    def __init__(
        self, KT, K, SCALED, BIAS, RESIDUAL, NORM, TAIL, STRIDE, BLOCK_N0, BLOCK_N1, BLOCK_K, STAGES, REUSE_ROWS, TILE_H
    ):
        self.KT = gl.constexpr(KT)
        self.K = gl.constexpr(K)
        self.SCALED = gl.constexpr(SCALED)
        self.BIAS = gl.constexpr(BIAS)
        self.RESIDUAL = gl.constexpr(RESIDUAL)
        self.NORM = gl.constexpr(NORM)
        self.TAIL = gl.constexpr(TAIL)
        self.STRIDE = gl.constexpr(STRIDE)
        self.BLOCK_N0 = gl.constexpr(BLOCK_N0)
        self.BLOCK_N1 = gl.constexpr(BLOCK_N1)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.STAGES = gl.constexpr(STAGES)
        self.TILE_H = gl.constexpr(TILE_H)
        self.BLOCK_M = gl.constexpr(TILE_H * BOX_SIZE.value)
        self.BLOCK_N = gl.constexpr(BLOCK_N0 + BLOCK_N1)
        self.SUBTILES = gl.constexpr(3 if BLOCK_N1 else 2)
        self.TAPS = gl.constexpr(K if REUSE_ROWS else 1)
        self.X_BOXES = gl.constexpr(CONSUMERS.value * TILE_H // BOX_SIZE.value + (1 if REUSE_ROWS else 0))


@gluon.jit
def tile_coords(tile, sizes, cfg):
    """Frame, row, column and first output channel of a tile. Channels vary fastest, then pixels, then frames."""
    _frames, _past_frames, tiles_h, tiles_w, tiles_n, _blocks_k, _in_channels = sizes
    rest = tile // tiles_n
    frame, rest = rest // (tiles_h * tiles_w), rest % (tiles_h * tiles_w)
    return frame, rest // tiles_w * (CONSUMERS * cfg.TILE_H), rest % tiles_w * BOX_SIZE, tile % tiles_n * cfg.BLOCK_N


@gluon.jit
def load_partition(descs, buffers, stage_bars, residual_bars, sizes, num_tiles, offset_h, offset_w, cfg):
    """Copies the pixels and weights of all tiles, in the order in which the consumers take them.

    The taps of a pixel begin offset_h rows and offset_w columns from it. With a STRIDE of 2, boxes are of pairs of rows
    and of columns: [frame, pair of rows, row of the pair, pair of columns, channels of both columns].
    """
    x_desc, past_desc, w0_desc, w1_desc, _y_desc, residual_desc = descs
    x_smem, w0_smem, w1_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    _frames, past_frames, _tiles_h, _tiles_w, _tiles_n, blocks_k, in_channels = sizes
    slot = 0
    phase = 0
    residual_phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        frame, row, column, out_channel = tile_coords(tile, sizes, cfg)
        for tap_t in range(gl.maximum(0, cfg.KT - 1 - frame - past_frames), cfg.KT):
            in_frame = frame + tap_t - (cfg.KT - 1)
            for step in range(cfg.K * cfg.K // cfg.TAPS):
                for block in range(blocks_k):
                    mbarrier.wait(empty.index(slot), phase ^ 1)
                    bar = full.index(slot)
                    mbarrier.expect(
                        bar, cfg.X_BOXES * x_desc.block_type.nbytes + cfg.TAPS * w0_desc.block_type.nbytes
                        + (cfg.TAPS * w1_desc.block_type.nbytes if cfg.BLOCK_N1 else 0),
                    )  # fmt: skip
                    channel = block * cfg.BLOCK_K
                    tap_h = step // cfg.K + offset_h
                    tap_w = step % cfg.K + offset_w
                    for box in gl.static_range(cfg.X_BOXES):
                        x = x_smem.index(slot * cfg.X_BOXES + box)
                        box_row = row + box * BOX_SIZE
                        if cfg.STRIDE == 2:
                            coords = [in_frame, box_row + tap_h // 2, tap_h % 2, column + tap_w // 2,
                                      tap_w % 2 * in_channels + channel]  # fmt: skip
                            tma.async_copy_global_to_shared(x_desc, coords, bar, x)
                        elif in_frame < 0:
                            coords = [in_frame + past_frames, box_row + tap_h, column + tap_w, channel]
                            tma.async_copy_global_to_shared(past_desc, coords, bar, x)
                        else:
                            coords = [in_frame, box_row + tap_h, column + tap_w, channel]
                            tma.async_copy_global_to_shared(x_desc, coords, bar, x)
                    for tap in gl.static_range(cfg.TAPS):
                        k = ((tap_t * cfg.K + tap) * cfg.K + step) * in_channels + channel
                        w = slot * cfg.TAPS + tap
                        tma.async_copy_global_to_shared(w0_desc, [out_channel, k], bar, w0_smem.index(w))
                        if cfg.BLOCK_N1:
                            tma.async_copy_global_to_shared(
                                w1_desc, [out_channel + cfg.BLOCK_N0, k], bar, w1_smem.index(w)
                            )
                    slot, phase = next_stage(slot, phase, cfg.STAGES)
        if cfg.RESIDUAL:  # only now, while consumers have stages to read: before, it would wait for the last output
            for consumer in gl.static_range(CONSUMERS):
                mbarrier.wait(residual_empty.index(consumer), residual_phase ^ 1)
                mbarrier.expect(residual_full.index(consumer), cfg.SUBTILES * residual_desc.block_type.nbytes)
                for i in gl.static_range(cfg.SUBTILES):
                    coords = [frame, row + consumer * cfg.TILE_H, column, out_channel + i * (cfg.BLOCK_N0 // 2)]
                    tma.async_copy_global_to_shared(
                        residual_desc, coords, residual_full.index(consumer), y_smem.index(consumer * cfg.SUBTILES + i)
                    )
            residual_phase ^= 1


@gluon.jit
def scale_and_bias(y, out_channel, scale, bias, out_channels, cfg):
    """The sums y of the output channels from `out_channel` on, scaled, with their bias; 0 beyond the last channel."""
    offs_n = out_channel + gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
    mask_n = offs_n < out_channels
    if cfg.SCALED:
        y = y * gl.load(scale + offs_n, mask=mask_n, other=0.0)[None, :]
    if cfg.BIAS:
        y = y + gl.load(bias + offs_n, mask=mask_n, other=0.0).to(gl.float32)[None, :]
    return y


@gluon.jit
def sum_of_squares(y, layout: gl.constexpr):
    """The sum of squares over each pixel's channels."""
    return gl.convert_layout(gl.sum(y * y, 1), layout, assert_trivial=True)


@gluon.jit
def rms_norm_silu(y, out_channel, inv_norm, gamma, sqrt_channels, out_scale, out_channels):
    """`out_scale` SiLU(y inv_norm gamma sqrt(C)), where y has the output channels from `out_channel` on."""
    offs_n = out_channel + gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
    weight = gl.load(gamma + offs_n, mask=offs_n < out_channels, other=0.0).to(gl.float32) * sqrt_channels
    inv_norm = gl.convert_layout(inv_norm, gl.SliceLayout(1, y.type.layout), assert_trivial=True)
    y = y * inv_norm[:, None] * weight[None, :]
    return y * (out_scale / (1.0 + gl.exp(-y)))


@gluon.jit
def mma_partition(operands, CONSUMER_ID: gl.constexpr, cfg):
    """Multiplies, finishes and stores the pixels that belong to one consumer, in all tiles of the program."""
    descs, buffers, stage_bars, residual_bars, sizes, num_tiles, scale, bias, norm, tail, out_channels = operands
    x_smem, w0_smem, w1_smem, y_smem = buffers
    full, empty = stage_bars
    residual_full, residual_empty = residual_bars
    _frames, past_frames, _tiles_h, _tiles_w, _tiles_n, blocks_k, _in_channels = sizes
    DTYPE: gl.constexpr = x_smem.dtype
    WIDTH1: gl.constexpr = cfg.BLOCK_N1 if cfg.BLOCK_N1 else 32  # of acc1, which is unused where BLOCK_N1 is 0
    WGMMA_K: gl.constexpr = 256 // DTYPE.primitive_bitwidth
    acc0_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.BLOCK_N0, WGMMA_K])
    acc1_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH1, WGMMA_K])
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([cfg.BLOCK_M, cfg.BLOCK_K], DTYPE)
    y_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([cfg.BLOCK_M, cfg.BLOCK_N0 // 2], y_smem.dtype)
    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BOX_SIZE, cfg.BLOCK_K], DTYPE)
    x_rows = x_smem._reinterpret(
        DTYPE, [cfg.STAGES * cfg.X_BOXES * BOX_SIZE, BOX_SIZE, cfg.BLOCK_K], row_layout
    )  # fmt: skip
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        frame, _row, _column, _out_channel = tile_coords(tile, sizes, cfg)
        steps = (cfg.KT - gl.maximum(0, cfg.KT - 1 - frame - past_frames)) * (cfg.K * cfg.K // cfg.TAPS) * blocks_k
        acc0 = gl.zeros([cfg.BLOCK_M, cfg.BLOCK_N0], gl.float32, acc0_layout)
        acc1 = gl.zeros([cfg.BLOCK_M, WIDTH1], gl.float32, acc1_layout)
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            for tap in gl.static_range(cfg.TAPS):
                x_row = x_rows.index(slot * cfg.X_BOXES * BOX_SIZE + CONSUMER_ID * cfg.TILE_H + tap)
                x = x_row._reinterpret(DTYPE, [cfg.BLOCK_M, cfg.BLOCK_K], x_layout)  # that row and those below it
                w = slot * cfg.TAPS + tap
                acc0 = warpgroup_mma(x, w0_smem.index(w).permute((1, 0)), acc0, is_async=True)
                if cfg.BLOCK_N1:
                    acc1 = warpgroup_mma(x, w1_smem.index(w).permute((1, 0)), acc1, is_async=True)
            if cfg.BLOCK_N1:
                acc0, acc1 = warpgroup_mma_wait(2 * cfg.TAPS, deps=[acc0, acc1])
            else:
                acc0 = warpgroup_mma_wait(cfg.TAPS, deps=[acc0])
            if step > 0:
                mbarrier.arrive(empty.index(previous_stage(slot, cfg.STAGES)))
            slot, phase = next_stage(slot, phase, cfg.STAGES)
        if cfg.BLOCK_N1:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        mbarrier.arrive(empty.index(previous_stage(slot, cfg.STAGES)))
        frame, row, column, out_channel = tile_coords(tile, sizes, cfg)  # again, so as not to hold registers
        if cfg.RESIDUAL:
            mbarrier.wait(residual_full.index(CONSUMER_ID), tile // gl.num_programs(0) & 1)
        else:
            tma.store_wait(0)  # until y_smem has been read by the previous tile's stores
        gamma, sqrt_channels, out_scale = norm
        inv_norm = 1.0
        if cfg.NORM:
            acc0 = scale_and_bias(acc0, out_channel, scale, bias, out_channels, cfg)
            pixel_layout: gl.constexpr = gl.SliceLayout(1, acc0_layout)
            squares = sum_of_squares(acc0, pixel_layout)
            if cfg.BLOCK_N1:
                acc1 = scale_and_bias(acc1, out_channel + cfg.BLOCK_N0, scale, bias, out_channels, cfg)
                squares += sum_of_squares(acc1, pixel_layout)
            inv_norm = 1.0 / gl.maximum(gl.sqrt(squares), 1e-12)
        subtiles = split_columns(acc0) + (acc1,)  # noqa: RUF005
        for i in gl.static_range(cfg.SUBTILES):
            thread_barrier()  # or ptxas loads the vectors of all subtiles first, and runs out of registers
            out = y_smem.index(CONSUMER_ID * cfg.SUBTILES + i)  # [1, TILE_H, 8, n], seen as [pixels, n]
            out = out._reinterpret(out.dtype, [cfg.BLOCK_M, cfg.BLOCK_N0 // 2], y_layout)
            channel = out_channel + i * (cfg.BLOCK_N0 // 2)
            if cfg.NORM:
                y = rms_norm_silu(subtiles[i], channel, inv_norm, gamma, sqrt_channels, out_scale, out_channels)
            else:
                y = scale_and_bias(subtiles[i], channel, scale, bias, out_channels, cfg)
            if cfg.RESIDUAL:
                y = y + out.load(y.type.layout).to(gl.float32)
            out.store(to_e4m3_x4(y) if out.dtype == gl.float8e4nv else y.to(out.dtype))
        fence_async_shared()
        _x_desc, _past_desc, _w0_desc, _w1_desc, y_desc, _residual_desc = descs
        for i in gl.static_range(cfg.SUBTILES):
            coords = [frame, row + CONSUMER_ID * cfg.TILE_H, column, out_channel + i * (cfg.BLOCK_N0 // 2)]
            tma.async_copy_shared_to_global(y_desc, coords, y_smem.index(CONSUMER_ID * cfg.SUBTILES + i))
        if cfg.TAIL:
            tail_desc, tail_start = tail
            if frame >= tail_start:
                for i in gl.static_range(cfg.SUBTILES):
                    coords = [frame - tail_start, row + CONSUMER_ID * cfg.TILE_H, column,
                              out_channel + i * (cfg.BLOCK_N0 // 2)]  # fmt: skip
                    tma.async_copy_shared_to_global(tail_desc, coords, y_smem.index(CONSUMER_ID * cfg.SUBTILES + i))
        if cfg.RESIDUAL:
            tma.store_wait(0)
            mbarrier.arrive(residual_empty.index(CONSUMER_ID))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["frames", "past_frames", "tiles_h", "tiles_w", "tiles_n", "blocks_k", "in_channels",
                              "out_channels", "offset_h", "offset_w", "tail_start"])  # fmt: skip
def implicit_gemm_conv_sm90(
    x_desc, past_desc, w0_desc, w1_desc, y_desc, residual_desc, scale, bias, gamma, sqrt_channels, out_scale, frames,
    past_frames, tiles_h, tiles_w, tiles_n, blocks_k, in_channels, out_channels, offset_h, offset_w, tail_desc,
    tail_start, KT: gl.constexpr, K: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    NORM: gl.constexpr, TAIL: gl.constexpr, BLOCK_N0: gl.constexpr, BLOCK_N1: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, REUSE_ROWS: gl.constexpr, TILE_H: gl.constexpr, STRIDE: gl.constexpr,
):  # fmt: skip
    """A persistent convolution kernel: one load partition, three MMA partitions. `launch_conv` gives the arguments."""
    cfg = ConvConfig(
        KT, K, SCALED, BIAS, RESIDUAL, NORM, TAIL, STRIDE, BLOCK_N0, BLOCK_N1, BLOCK_K, STAGES, REUSE_ROWS, TILE_H
    )  # fmt: skip
    X_BOX: gl.constexpr = [1, BOX_SIZE, 1, BOX_SIZE, BLOCK_K] if STRIDE == 2 else [1, BOX_SIZE, BOX_SIZE, BLOCK_K]
    W1_ROWS: gl.constexpr = BLOCK_N1 if BLOCK_N1 else 8
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * cfg.X_BOXES] + X_BOX, x_desc.layout)  # noqa: RUF005
    w0_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * cfg.TAPS, BLOCK_N0, BLOCK_K], w0_desc.layout)
    w1_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * cfg.TAPS, W1_ROWS, BLOCK_K], w1_desc.layout)
    y_smem = gl.allocate_shared_memory(
        y_desc.dtype, [CONSUMERS * cfg.SUBTILES, 1, TILE_H, BOX_SIZE, BLOCK_N0 // 2], y_desc.layout
    )
    stage_bars = alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS)  # full, empty
    residual_bars = alloc_barriers(CONSUMERS, 1), alloc_barriers(CONSUMERS, 1)
    fence_async_shared()
    descs = x_desc, past_desc, w0_desc, w1_desc, y_desc, residual_desc
    buffers = x_smem, w0_smem, w1_smem, y_smem
    sizes = frames, past_frames, tiles_h, tiles_w, tiles_n, blocks_k, in_channels
    num_tiles = frames * tiles_h * tiles_w * tiles_n
    norm = gamma, sqrt_channels, out_scale
    tail = tail_desc, tail_start
    operands = descs, buffers, stage_bars, residual_bars, sizes, num_tiles, scale, bias, norm, tail, out_channels
    # Registers a thread: the groups of four warps share 65,536 registers; the first group gets what the others leave.
    gl.warp_specialize([
        (mma_partition, (operands, 0, cfg)),
        (mma_partition, (operands, 1, cfg)),
        (mma_partition, (operands, 2, cfg)),
        (load_partition, (descs, buffers, stage_bars, residual_bars, sizes, num_tiles, offset_h, offset_w, cfg)),
    ], [4, 4, 1], [160, 160, 32])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def make_desc(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of x, of frames as [frame, row, column, channel]. Loads beyond x are 0, stores are dropped."""
    x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    # The stride of an axis of length 1 is anything, which TMA need not accept.
    strides = [stride if length > 1 else x.shape[-1] for length, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), strides, block, smem_layout(tuple(block), x.dtype))


def make_pair_desc(x: Tensor, block_k: int) -> TensorDescriptor:
    """A TMA descriptor for stride 2: [frame, pair of rows, row of it, pair of columns, channels of both columns]."""
    frames, channels, rows, columns = x.shape
    pairs = x.permute(0, 2, 3, 1).view(frames, rows // 2, 2, columns // 2, 2 * channels)
    block = [1, BOX_SIZE.value, 1, BOX_SIZE.value, block_k]
    return TensorDescriptor(pairs, list(pairs.shape), list(pairs.stride()), block, smem_layout(tuple(block), x.dtype))


def supports(x: Tensor, past: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can compute with these operands: 8 or 16 bits, and pixels of a multiple of 16 bytes."""
    aligned = all(y.data_ptr() % 16 == 0 for y in (x, past, weight) if len(y))
    return x.dtype in GL_DTYPES and weight.shape[1] * x.itemsize % 16 == 0 and aligned


def launch_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    y: Tensor,
    tap_offset: tuple[int, int],
    stride: int = 1,
    config: LaunchConfig | None = None,
    norm: tuple[Tensor, float, float] | None = None,
    tail: Tensor | None = None,
) -> None:
    """Writes the convolution of x, whose operands `supports` must accept, into y.

    Args:
        x: [frames, C, rows, columns] in channels-last memory. With a stride of 2, rows and columns are even.
        weight: [O, C, kt, k, k].
        bias: [O], or None.
        past: [0 to kt - 1, C, rows, columns], the frames before x; frames before these are zeros and are skipped.
        residual: is added to the result, like y; or None.
        scale: float32 [O], which the sums are multiplied by before bias and residual are added; or None.
        y: float16 or bfloat16, with a norm also e4m3; any view [frames, O, rows, columns] with contiguous channels, and
            pixels of a multiple of 16 bytes.
        tap_offset: row and column of the first tap, relative to the pixel.
        stride: 1, or 2 in rows and columns. With 2, BLOCK_K divides C, REUSE_ROWS is 0 and no tap_offset is negative.
        config: launch parameters, in place of those of `default_config`.
        norm: (gamma [O], the square root of the number of channels, out_scale). y is then `out_scale` times SiLU of the
            RMS norm of the result; BLOCK_N0 + BLOCK_N1 must be at least O, and there is no residual.
        tail: also gets the last frames of y, of which it has as many as it has room for; like y, or None.
    """
    channels, (frames, _, rows, columns) = x.shape[1], y.shape
    outputs, _, kt, k, _ = weight.shape
    parameters: dict[str, Any] = {**default_config(x.dtype, outputs, k), **(config or {})}
    block_n0, block_n1, block_k, tile_h = (parameters[n] for n in ("BLOCK_N0", "BLOCK_N1", "BLOCK_K", "TILE_H"))
    size = BOX_SIZE.value
    matrix = weight.permute(0, 2, 3, 4, 1).reshape(outputs, -1)  # a view, where the weight is channels-last
    x_box, y_box = [1, size, size, block_k], [1, tile_h, size, block_n0 // 2]
    x_desc, y_desc = make_desc(x, x_box) if stride == 1 else make_pair_desc(x, block_k), make_desc(y, y_box)
    tiles_h, tiles_w = -(-rows // (tile_h * CONSUMERS.value)), -(-columns // size)
    tiles_n = -(-outputs // (block_n0 + block_n1))
    gamma, sqrt_channels, out_scale = norm or (y, 1.0, 1.0)
    tail_desc, tail_start = (None, None) if tail is None else (make_desc(tail, y_box), frames - len(tail))
    programs = min(gpu_of(x.device).multiprocessors, frames * tiles_h * tiles_w * tiles_n)
    implicit_gemm_conv_sm90[(programs,)](
        x_desc, make_desc(past, x_box) if len(past) else x_desc, make_desc(matrix, [block_n0, block_k]),
        make_desc(matrix, [block_n1 or 8, block_k]), y_desc, y_desc if residual is None else make_desc(residual, y_box),
        y if scale is None else scale, y if bias is None else bias, gamma, sqrt_channels, out_scale, frames, len(past),
        tiles_h, tiles_w, tiles_n, -(-channels // block_k), channels, outputs, *tap_offset, tail_desc, tail_start,
        KT=kt, K=k, SCALED=scale is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
        NORM=norm is not None, TAIL=tail is not None, STRIDE=stride, num_warps=4, **parameters,
    )  # fmt: skip


def default_config(dtype: torch.dtype, outputs: int, k: int) -> LaunchConfig:
    """Launch parameters for a shape that was not tuned: the smallest tile for the outputs, the stages that fit."""
    if outputs > MEDIUM_TILE_CHANNELS:
        tile, block_k, stages, reuse_rows = (128, 64), 64, 6, 0
    else:
        tile = (64, 32) if outputs > SMALL_TILE_CHANNELS else (SMALL_TILE_CHANNELS, 0)
        block_k, stages, reuse_rows = 32, 10 if k > 1 else 12, int(k > 1)
    return {
        "BLOCK_N0": tile[0],
        "BLOCK_N1": tile[1],
        "BLOCK_K": block_k,
        "STAGES": stages // dtype.itemsize,
        "REUSE_ROWS": reuse_rows,
        "TILE_H": 8,
    }
