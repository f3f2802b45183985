"""Attention to text and to image for Hopper (sm_90) in Gluon: the "gluon" back-end of `text_image_attention`.

A head's keys and values of the image stay in shared memory, and so do those of the text if its padding counts as one
key. Programs are persistent. Each of them computes a range of consecutive tiles of queries, which are ordered by head,
so that it loads the keys and values of one head, seldom of two. kernels/sm90.py describes the roles of its warps:

    load partition   one warp, which copies keys and values where a head begins, and the queries of every tile (TMA)
    MMA partitions   two consumers of four warps, with 64 queries of a tile each; the output takes the place of the
                     queries in shared memory and leaves by TMA, while the other of two tiles of queries is computed

All scores of 64 queries with the image's keys are in registers at once, so that this softmax knows its maximum before
the first exponential. The keys are two tiles of a power of two and a tail. One tile after the other becomes weights in
16 bits: at once, they would need more registers than there are.

The softmax over the text is an online one, over tiles of BLOCK_T keys in a ring of STAGES. How many text keys there are
is read on the device. If the ring holds them all, they are loaded once for a head, else anew for each tile of queries.

A consumer begins the scores of its tile right after the other consumer has begun its own, so that the exponentials of
one run beside the products of the other: the ping-pong schedule of FlashAttention-3 (arXiv 2407.08608).
"""

# Types inside device code are Triton's, not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false

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

from kernels.common import FP8
from kernels.sm90 import (
    SHARED_BYTES,
    WGMMA_M,
    aggregate,
    alloc_barriers,
    exp2,
    mask_scores,
    next_stage,
    smem_layout,
    to_e4m3_x4,
)
from kernels.tuning import LaunchConfig, gpu_of

CONSUMERS = gl.constexpr(2)
MIN_TILE = 16  # least number of keys in a tile, the terms of one wgmma of their values
MAX_IMAGE_TILE = 128  # more would take the registers of other values
BARRIER_BYTES = 1024  # more than barriers take

DEFAULT_CONFIG: LaunchConfig = {"BLOCK_T": 32, "STAGES": 1}  # where nothing was tuned


# --- Kernel ---------------------------------------------------------------------------------------------------------


@aggregate
class Operands:
    """TMA descriptors of the operands and of the output, and how many columns heads are apart in them."""

    q: tma.tensor_descriptor
    image_k: tma.tensor_descriptor
    image_v: tma.tensor_descriptor
    tail_k: tma.tensor_descriptor
    tail_v: tma.tensor_descriptor
    text_k: tma.tensor_descriptor
    text_v: tma.tensor_descriptor
    o: tma.tensor_descriptor
    q_head: gl.tensor
    image_head: gl.tensor
    text_head: gl.tensor
    o_head: gl.tensor


@aggregate
class SharedTiles:
    """Shared memory: two tiles of queries for each consumer, the keys and values of the image and of its tail, the ring
    of those of the text, and barriers.
    """

    q: gl.shared_memory_descriptor
    image_k: gl.shared_memory_descriptor
    image_v: gl.shared_memory_descriptor
    tail_k: gl.shared_memory_descriptor
    tail_v: gl.shared_memory_descriptor
    text_k: gl.shared_memory_descriptor
    text_v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    image_k_full: gl.shared_memory_descriptor
    image_v_full: gl.shared_memory_descriptor
    image_empty: gl.shared_memory_descriptor
    text_full: gl.shared_memory_descriptor
    text_empty: gl.shared_memory_descriptor
    order: gl.shared_memory_descriptor


@aggregate
class Sizes:
    """Numbers of tokens, of tiles of queries of a head and of all heads, and of the keys that count."""

    tokens: gl.tensor
    tiles_m: gl.tensor
    num_tiles: gl.tensor
    image_keys: gl.tensor
    text_keys: gl.tensor
    padding_log_weight: gl.tensor  # what the padding adds to the logit of the last text key, to base 2


@aggregate
class Scales:
    """Factors of the rows' logits, and the bound and the scales of an output in e4m3."""

    softmax_scale_log2: gl.tensor
    q_scale: gl.tensor
    o_bound: gl.tensor
    o_scale: gl.tensor


@gluon.jit
def program_tiles(num_tiles):
    """The first tile of this program, and the end of its tiles."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return program * num_tiles // programs, (program + 1) * num_tiles // programs


@gluon.jit
def load_pair(k_desc, v_desc, coords, k_full, v_full, k_smem, v_smem):
    """Copies a tile of keys and that of their values, for barriers that expect them."""
    tma.async_copy_global_to_shared(k_desc, coords, k_full, k_smem)
    tma.async_copy_global_to_shared(v_desc, coords, v_full, v_smem)


@gluon.jit
def load_partition(operands, tiles, sizes, BLOCK_N: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr):
    """Copies queries, keys and values to shared memory, in the order in which the consumers read them."""
    first, end = program_tiles(sizes.num_tiles)
    streamed = sizes.text_keys > STAGES * BLOCK_T
    q_stage = 0
    q_phase = 0
    image_phase = 0
    stage = 0
    phase = 0
    for tile in range(first, end):
        head = tile // sizes.tiles_m
        row = tile % sizes.tiles_m * (CONSUMERS * WGMMA_M)
        head_begins = (tile == first) | (row == 0)
        for consumer in gl.static_range(CONSUMERS):
            slot = 2 * consumer + q_stage
            bar = tiles.q_full.index(slot)
            mbarrier.wait(tiles.q_empty.index(slot), q_phase ^ 1)
            mbarrier.expect(bar, operands.q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                operands.q, [row + consumer * WGMMA_M, head * operands.q_head], bar, tiles.q.index(slot)
            )
        q_stage, q_phase = next_stage(q_stage, q_phase, 2)
        if head_begins:
            column = head * operands.image_head
            k_full, v_full = tiles.image_k_full.index(0), tiles.image_v_full.index(0)
            nbytes: gl.constexpr = 2 * operands.image_k.block_type.nbytes + operands.tail_k.block_type.nbytes
            mbarrier.wait(tiles.image_empty.index(0), image_phase ^ 1)
            mbarrier.expect(k_full, nbytes)
            mbarrier.expect(v_full, nbytes)
            for i in gl.static_range(2):
                load_pair(operands.image_k, operands.image_v, [i * BLOCK_N, column], k_full, v_full,
                          tiles.image_k.index(i), tiles.image_v.index(i))  # fmt: skip
            load_pair(operands.tail_k, operands.tail_v, [2 * BLOCK_N, column], k_full, v_full,
                      tiles.tail_k.index(0), tiles.tail_v.index(0))  # fmt: skip
            image_phase ^= 1
        if head_begins | streamed:
            for key in range(0, sizes.text_keys, BLOCK_T):
                mbarrier.wait(tiles.text_empty.index(stage), phase ^ 1)
                full = tiles.text_full.index(stage)
                mbarrier.expect(full, 2 * operands.text_k.block_type.nbytes)
                load_pair(operands.text_k, operands.text_v, [key, head * operands.text_head], full, full,
                          tiles.text_k.index(stage), tiles.text_v.index(stage))  # fmt: skip
                stage, phase = next_stage(stage, phase, gl.minimum(gl.cdiv(sizes.text_keys, BLOCK_T), STAGES))


@gluon.jit
def begin_scores(q, k, N: gl.constexpr):
    """Begins the product of 64 queries with a tile of N keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    zeros = gl.zeros([WGMMA_M, N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def begin_weighted_values(p, v, acc, D: gl.constexpr, use_acc=True):
    """Begins acc + p v, [64, D]. The weights p become the left operand without moving between registers."""
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    return warpgroup_mma(
        gl.convert_layout(p.to(v.dtype), layout, assert_trivial=True), v, acc, use_acc=use_acc, is_async=True
    )


@gluon.jit
def exp_scores(s, num_keys, qk_scale, m_i, N: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr):
    """The weights 2^(s qk_scale - m_i) of the first `num_keys` keys of a tile, in `dtype`, and their sums by row."""
    s_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    o_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    s = s * gl.convert_layout(qk_scale, s_rows)[:, None] - gl.convert_layout(m_i, s_rows)[:, None]
    p = exp2(mask_scores(s, num_keys))
    return p.to(dtype), gl.convert_layout(gl.sum(p, 1), o_rows)


@gluon.jit
def attend_image(q, qk_scale, tiles, sizes, phase, turn, CONSUMER_ID: gl.constexpr, BLOCK_N: gl.constexpr,
                 TAIL: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """The attention [64, D] of 64 queries to the image. `turn` is the parity of the barriers that order consumers."""
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    mbarrier.wait(tiles.image_k_full.index(0), phase)
    mbarrier.wait(tiles.order.index(CONSUMER_ID), turn)
    s0 = begin_scores(q, tiles.image_k.index(0), BLOCK_N)
    s1 = begin_scores(q, tiles.image_k.index(1), BLOCK_N)
    s_tail = begin_scores(q, tiles.tail_k.index(0), TAIL)
    mbarrier.arrive(tiles.order.index((CONSUMER_ID + 1) % CONSUMERS))
    s0, s1, s_tail = warpgroup_mma_wait(0, deps=[s0, s1, s_tail])
    num_tail = sizes.image_keys - 2 * BLOCK_N
    tail_max = gl.max(mask_scores(s_tail, num_tail), 1)
    m_i = gl.convert_layout(gl.maximum(gl.max(s0, 1), gl.max(s1, 1)), o_rows)
    m_i = gl.maximum(m_i, gl.convert_layout(tail_max, o_rows)) * qk_scale
    p0, l_0 = exp_scores(s0, BLOCK_N, qk_scale, m_i, BLOCK_N, D, q.dtype)
    p1, l_1 = exp_scores(s1, BLOCK_N, qk_scale, m_i, BLOCK_N, D, q.dtype)
    p_tail, l_tail = exp_scores(s_tail, num_tail, qk_scale, m_i, TAIL, D, q.dtype)
    mbarrier.wait(tiles.image_v_full.index(0), phase)
    zeros = gl.zeros([WGMMA_M, D], gl.float32, o_layout)
    acc = begin_weighted_values(p0, tiles.image_v.index(0), zeros, D, use_acc=False)
    acc = begin_weighted_values(p1, tiles.image_v.index(1), acc, D)
    acc = begin_weighted_values(p_tail, tiles.tail_v.index(0), acc, D)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return acc * (1.0 / (l_0 + l_1 + l_tail))[:, None]


@gluon.jit
def attend_text(q, qk_scale, tiles, sizes, stage, phase, release, BLOCK_T: gl.constexpr, D: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """The attention [64, D] of 64 queries to the text, and where the ring stands after it.

    `release`: the tiles of the ring are not needed again, and others will take their place.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    m_i = gl.full([WGMMA_M], float("-inf"), gl.float32, s_rows)
    l_i = gl.zeros([WGMMA_M], gl.float32, s_rows)
    acc = gl.zeros([WGMMA_M, D], gl.float32, o_layout)
    factor = gl.convert_layout(qk_scale, s_rows)
    ring = gl.minimum(gl.cdiv(sizes.text_keys, BLOCK_T), STAGES)
    for key in range(0, sizes.text_keys, BLOCK_T):
        mbarrier.wait(tiles.text_full.index(stage), phase)
        s = begin_scores(q, tiles.text_k.index(stage), BLOCK_T)
        offs_n = key + gl.arange(0, BLOCK_T, gl.SliceLayout(0, s_layout))
        weight = gl.where(offs_n == sizes.text_keys - 1, sizes.padding_log_weight, 0.0)
        bias = gl.where(offs_n < sizes.text_keys, weight, float("-inf"))
        s = warpgroup_mma_wait(0, deps=[s]) * factor[:, None] + bias[None, :]
        m_ij = gl.maximum(m_i, gl.max(s, 1))
        p = exp2(s - m_ij[:, None])
        alpha = exp2(m_i - m_ij)
        l_i = l_i * alpha + gl.sum(p, 1)
        m_i = m_ij
        acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
        acc = begin_weighted_values(p.to(q.dtype), tiles.text_v.index(stage), acc, D)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(tiles.text_empty.index(stage), pred=release)
        stage, next_phase = next_stage(stage, phase, ring)
        phase = gl.where(release, next_phase, phase)
    return acc * gl.convert_layout(1.0 / l_i, o_rows)[:, None], stage, phase


@gluon.jit
def store_output(o, operands, smem, scales, head, row, tokens, QUANTIZE: gl.constexpr):
    """Begins to store the output [64, D] of a tile, in 16 bits or, with the scale of its rows, in e4m3.

    `smem` is the tile of its queries, which nobody reads any more.
    """
    smem = smem._reinterpret(operands.o.dtype, operands.o.block_type.shape, operands.o.layout)
    if QUANTIZE:
        scale = gl.maximum(gl.load(scales.o_bound) / 448.0, 1e-12)
        smem.store(to_e4m3_x4(o * (1.0 / scale)))
        if head == 0:
            offs_m = row + gl.arange(0, WGMMA_M, gl.SliceLayout(1, o.type.layout))
            row_scale = gl.full([WGMMA_M], 1.0, gl.float32, offs_m.type.layout) * scale
            gl.store(scales.o_scale + offs_m, row_scale, mask=offs_m < tokens)
    else:
        smem.store(o.to(smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(operands.o, [row, head * operands.o_head], smem)


@gluon.jit
def mma_partition(operands, tiles, sizes, scales, CONSUMER_ID: gl.constexpr, BLOCK_N: gl.constexpr,
                  TAIL: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
                  SCALED: gl.constexpr, QUANTIZE: gl.constexpr):  # fmt: skip
    """One consumer: computes its 64 queries of every tile, and stores their output."""
    o_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    first, end = program_tiles(sizes.num_tiles)
    streamed = sizes.text_keys > STAGES * BLOCK_T
    q_stage = 0
    q_phase = 0
    turn = 0
    image_phase = 0
    stage = 0
    phase = 0
    for tile in range(first, end):
        head = tile // sizes.tiles_m
        row = (tile % sizes.tiles_m * CONSUMERS + CONSUMER_ID) * WGMMA_M
        head_ends = (tile + 1) % sizes.tiles_m == 0
        qk_scale = gl.full([WGMMA_M], 1.0, gl.float32, o_rows) * scales.softmax_scale_log2
        if SCALED:
            offs_m = row + gl.arange(0, WGMMA_M, o_rows)
            qk_scale = qk_scale * gl.load(scales.q_scale + offs_m, mask=offs_m < sizes.tokens, other=0.0)
        q = tiles.q.index(2 * CONSUMER_ID + q_stage)
        mbarrier.wait(tiles.q_full.index(2 * CONSUMER_ID + q_stage), q_phase)
        o = attend_image(q, qk_scale, tiles, sizes, image_phase, turn, CONSUMER_ID, BLOCK_N, TAIL, D)
        mbarrier.arrive(tiles.image_empty.index(0), pred=head_ends)
        # By now the output of the previous tile has left, and its memory can take queries.
        tma.store_wait(0)
        mbarrier.arrive(tiles.q_empty.index(2 * CONSUMER_ID + 1 - q_stage), pred=tile > first)
        o_text, stage, phase = attend_text(
            q, qk_scale, tiles, sizes, stage, phase, streamed | head_ends, BLOCK_T, D, STAGES
        )
        store_output(o + o_text, operands, q, scales, head, row, sizes.tokens, QUANTIZE)
        q_stage, q_phase = next_stage(q_stage, q_phase, 2)
        turn ^= 1
        image_phase ^= head_ends.to(gl.int32)
    tma.store_wait(0)


# Without specialisation of these, neither one head nor lengths that 16 divides compile another kernel.
@gluon.jit(
    do_not_specialize=["tokens", "heads", "image_keys", "text_keys", "q_head", "image_head", "text_head", "o_head"]
)
def text_image_attention_fwd_sm90(
    q_desc, image_k_desc, image_v_desc, tail_k_desc, tail_v_desc, text_k_desc, text_v_desc, o_desc, num_text_tokens,
    q_scale, o_bound, o_scale, softmax_scale_log2, tokens, heads, image_keys, text_keys, q_head, image_head, text_head,
    o_head, D: gl.constexpr, BLOCK_N: gl.constexpr, TAIL: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
    DEDUP_PADDING: gl.constexpr, SCALED: gl.constexpr, QUANTIZE: gl.constexpr,
):  # fmt: skip
    """A persistent program: allocates shared memory, and starts the load partition and the MMA partitions."""
    num_text_keys = text_keys
    if DEDUP_PADDING:  # the last one stands for all of the padding
        num_text_keys = gl.minimum(gl.load(num_text_tokens) + 1, text_keys)
    padding_log_weight = gl.log2((text_keys - num_text_keys + 1).to(gl.float32))
    tiles = SharedTiles(
        gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS, WGMMA_M, D], q_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_N, D], image_k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_N, D], image_v_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [1, TAIL, D], tail_k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [1, TAIL, D], tail_v_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_T, D], text_k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_T, D], text_v_desc.layout),
        alloc_barriers(2 * CONSUMERS, 1), alloc_barriers(2 * CONSUMERS, 1),
        alloc_barriers(1, 1), alloc_barriers(1, 1), alloc_barriers(1, CONSUMERS),
        alloc_barriers(STAGES, 1), alloc_barriers(STAGES, CONSUMERS),
        alloc_barriers(CONSUMERS, 1),
    )  # fmt: skip
    fence_async_shared()
    mbarrier.arrive(tiles.order.index(0))
    tiles_m = gl.cdiv(tokens, CONSUMERS * WGMMA_M)
    operands = Operands(
        q_desc, image_k_desc, image_v_desc, tail_k_desc, tail_v_desc, text_k_desc, text_v_desc, o_desc, q_head,
        image_head, text_head, o_head,
    )  # fmt: skip
    sizes = Sizes(tokens, tiles_m, tiles_m * heads, image_keys, num_text_keys, padding_log_weight)
    scales = Scales(softmax_scale_log2, q_scale, o_bound, o_scale)
    # The 65,536 registers are shared by the warps; the numbers are registers per thread of all but the first partition.
    gl.warp_specialize([
        (mma_partition, (operands, tiles, sizes, scales, 0, BLOCK_N, TAIL, BLOCK_T, STAGES, D, SCALED, QUANTIZE)),
        (mma_partition, (operands, tiles, sizes, scales, 1, BLOCK_N, TAIL, BLOCK_T, STAGES, D, SCALED, QUANTIZE)),
        (load_partition, (operands, tiles, sizes, BLOCK_N, BLOCK_T, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def image_tiles(image_keys: int) -> tuple[int, int]:
    """The rows of each of the two tiles of the image's keys, and of the tail that holds the rest: powers of two."""
    block_n = min(1 << (image_keys - 1).bit_length() - 2, MAX_IMAGE_TILE)
    return block_n, max(MIN_TILE, 1 << (image_keys - 2 * block_n - 1).bit_length())


def shared_bytes(q: Tensor, image_keys: int, config: LaunchConfig) -> int:
    """The shared memory of a program."""
    block_n, tail = image_tiles(image_keys)
    keys = 2 * block_n + tail + int(config["BLOCK_T"]) * int(config["STAGES"])
    queries = 2 * CONSUMERS.value * WGMMA_M.value
    return q.shape[2] * q.itemsize * (2 * keys + queries) + BARRIER_BYTES


def supports(q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], config: LaunchConfig) -> bool:
    """Whether `launch_sm90` takes these operands with these launch parameters.

    q must have 16 bits and a head_dim of 64 or 128. The image must have more than 32 keys, and fit in shared memory.
    TMA needs addresses and strides of tokens and heads that are multiples of 16 bytes, and column offsets below 2^31.

    Args:
        q: [tokens, heads, head_dim].
        text: keys and values [text keys, heads, head_dim], with the same strides between heads.
        image: keys and values [image keys, heads, head_dim], with the same strides between heads.
        config: launch parameters that replace defaults.
    """
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] not in (64, 128) or len(image[0]) <= 2 * MIN_TILE:
        return False
    aligned = all(
        x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in x.stride()[:2])
        and x.shape[1] * x.stride(1) < 2**31
        for x in (q, *text, *image)
    )
    return aligned and shared_bytes(q, len(image[0]), {**DEFAULT_CONFIG, **config}) <= SHARED_BYTES


def make_desc(x: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of boxes [rows, head_dim] of x [tokens, heads, head_dim], where a head is a column offset."""
    tokens, heads, head_dim = x.shape
    shape, block = [tokens, (heads - 1) * x.stride(1) + head_dim], [rows, head_dim]
    return TensorDescriptor(x, shape, [x.stride(0), 1], block, smem_layout(tuple(block), x.dtype))


def launch_sm90(
    q: Tensor,
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    num_text_tokens: Tensor | None,
    q_scale: Tensor | None,
    o_bound: Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by the Hopper kernel, for operands that `supports` accepts.

    Args:
        q: [tokens, heads, head_dim].
        text: keys and values [text keys, heads, head_dim].
        image: keys and values [image keys, heads, head_dim].
        num_text_tokens: int32 [1], or None; the text keys from this one on are equal.
        q_scale: float32 [tokens], factors of the logits, or None.
        o_bound: float32 [], which no output exceeds: the output is e4m3. None: it is in q's dtype.
        config: launch parameters that replace defaults.

    Returns:
        o [tokens, heads, head_dim], and the scales of its rows, float32 [tokens], or [0] without `o_bound`.
    """
    tokens, heads, head_dim = q.shape
    parameters: dict[str, Any] = {**DEFAULT_CONFIG, **(config or {})}
    block_n, tail = image_tiles(len(image[0]))
    o = q.new_empty(q.shape, dtype=q.dtype if o_bound is None else FP8)
    o_scale = q.new_empty(0 if o_bound is None else tokens, dtype=torch.float32)
    text_image_attention_fwd_sm90[(gpu_of(q.device).multiprocessors,)](
        make_desc(q, WGMMA_M.value), *(make_desc(x, block_n) for x in image), *(make_desc(x, tail) for x in image),
        *(make_desc(x, parameters["BLOCK_T"]) for x in text), make_desc(o, WGMMA_M.value),
        o_scale if num_text_tokens is None else num_text_tokens, o_scale if q_scale is None else q_scale,
        o_scale if o_bound is None else o_bound, o_scale, head_dim**-0.5 * math.log2(math.e), tokens, heads,
        len(image[0]), len(text[0]), q.stride(1), image[0].stride(1), text[0].stride(1), o.stride(1),
        D=head_dim, BLOCK_N=block_n, TAIL=tail, DEDUP_PADDING=num_text_tokens is not None, SCALED=q_scale is not None,
        QUANTIZE=o_bound is not None, num_warps=4, **parameters,
    )  # fmt: skip
    return o, o_scale
