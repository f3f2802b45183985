"""`kernels.absorb_audio_projections` with e4m3 results, for `kernels.absorbed_audio_attention_fp8`.

A softmax over the keys of a head does not change if their logits all change by the same amount, and its weights P add
up to 1. So the mean over the keys of a head is taken out of G, and that of U is added to the bias:

    P U + bo = P (U - mean U) + sum over heads of mean U + bo

What the keys of a frame have in common then costs none of the 4 bits of an e4m3 number, and rounding P does not change
its weight. With G' and U' for the differences, the results are

    G8 = G' / G_scale      G_scale[f, key] = max over the row of |G'| / 448, at least 1e-12
    U8 = U' / U_scale      U_scale[f, n] = max over heads and keys of |U'[:, n]| / 448, at least 1e-12

A scale is known when a whole row has been computed. The kernels compute it twice, once for its largest magnitude and
once to store it: reading the weights again from the cache costs less than writing 16 bits to memory and reading them.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.absorb_audio_projections import (
    absorb_reference,
    bias_of_keys,
    channel_strides,
    check_keys_per_frame,
    check_projections,
    scaled_by_channel,
)
from kernels.common import DTYPE_NAMES, FP8, check, define_op, e4m3_scale, to_e4m3
from kernels.layer_norm import quantize_reference
from kernels.tuning import LaunchConfig, launch_config

# Launch parameters where nothing was tuned: rows are keys of as many frames as ROWS holds.
DEFAULT_CONFIG: LaunchConfig = {"ROWS": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


class AbsorbedFP8(NamedTuple):
    """The results for a layer, as `absorb_audio_projections_fp8` describes them."""

    keys: Tensor
    keys_scale: Tensor
    key_bias: Tensor
    values: Tensor
    values_scale: Tensor
    value_bias: Tensor


# --- Reference ------------------------------------------------------------------------------------------------------


def centre(keys: Tensor, values: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """G and U^T without the means over the keys of a head, and the sum over heads of U's means [frames, out width]."""
    keys, values = keys.unflatten(1, (heads, -1)), values.unflatten(2, (heads, -1))
    means = values.mean(3, keepdim=True)
    keys = keys - keys.mean(2, keepdim=True)
    return keys.flatten(1, 2), (values - means).flatten(2, 3), means.sum((2, 3))


def absorb_fp8_reference(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    q_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> AbsorbedFP8:
    """`absorb_audio_projections_fp8` by definition, in float32, with the same arguments."""
    q_weight, out_weight = (
        w if s is not None else w.float() for w, s in ((q_weight, q_scale), (out_weight, out_scale))
    )
    operands = k.float(), v.float(), q_weight, q_bias.float(), out_weight
    keys, key_bias, values = absorb_reference(*operands, q_scale, out_scale)
    keys, values, means = centre(keys, values, k.shape[2])
    (keys8, keys_scale), (values8, values_scale) = (quantize_reference(x.flatten(0, 1)) for x in (keys, values))
    return AbsorbedFP8(
        keys8.contiguous().view(keys.shape), keys_scale.view(keys.shape[:2]), key_bias.contiguous(),
        values8.contiguous().view(values.shape), values_scale.view(values.shape[:2]), means + out_bias.float(),
    )  # fmt: skip


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_frames(x, first_frame, frames, head, x_frame, x_row, x_head, FRAMES: tl.constexpr, KEYS: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    """x[frame, key, head] of FRAMES frames as [FRAMES x KEYS, D]; zeros follow the last frame."""
    offs = tl.arange(0, FRAMES * KEYS)
    frame = first_frame + offs // KEYS
    ptrs = x + (frame.to(tl.int64) * x_frame + offs % KEYS * x_row + head * x_head)[:, None] + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=(frame < frames)[:, None], other=0.0)


@triton.jit
def centred_product(x_tile, w_tile, scale, FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """scale x w as [FRAMES, KEYS, BLOCK_N] without its means over the keys, and these [FRAMES, BLOCK_N]."""
    product = tl.dot(x_tile, w_tile, input_precision="ieee") * scale
    product = tl.reshape(product, [FRAMES, KEYS, BLOCK_N])
    means = tl.sum(product, 1) * (1.0 / KEYS)
    return product - means[:, None, :], means


@triton.jit
def absorb_keys_fp8(k, w, out, out_scale, scale, width, frames, k_frame, k_row, k_head, w_head, w_channel, w_column,
                    FRAMES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """G8 and its scales, of one head and FRAMES frames."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    first_frame = tl.program_id(1) * FRAMES
    k_tile = load_frames(k, first_frame, frames, head, k_frame, k_row, k_head, FRAMES, KEYS, D)
    offs_d, offs_n = tl.arange(0, D), tl.arange(0, BLOCK_N)
    w_ptrs = w + head.to(tl.int64) * w_head + (offs_d * w_channel)[:, None] + (offs_n * w_column)[None, :]
    largest = tl.zeros([FRAMES, KEYS], tl.float32)
    for n in tl.range(0, width, BLOCK_N):
        w_tile = tl.load(w_ptrs + n * w_column, mask=(n + offs_n < width)[None, :], other=0.0).to(k_tile.dtype)
        tile, _means = centred_product(k_tile, w_tile, scale, FRAMES, KEYS, BLOCK_N)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 2))
    row_scale = e4m3_scale(largest)
    frame = first_frame + tl.arange(0, FRAMES)
    rows = (frame * heads + head)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    mask = (frame < frames)[:, None]
    tl.store(out_scale + rows, row_scale, mask=mask)
    for n in tl.range(0, width, BLOCK_N):
        mask_n = n + offs_n < width
        w_tile = tl.load(w_ptrs + n * w_column, mask=mask_n[None, :], other=0.0).to(k_tile.dtype)
        tile, _means = centred_product(k_tile, w_tile, scale, FRAMES, KEYS, BLOCK_N)
        ptrs = out + rows.to(tl.int64)[:, :, None] * width + (n + offs_n)[None, None, :]
        tl.store(
            ptrs, to_e4m3(tile * (1.0 / row_scale)[:, :, None], out), mask=mask[:, :, None] & mask_n[None, None, :]
        )


@triton.jit
def absorb_values_fp8(v, w, w_scale, bias, out, out_scale, out_bias, width, heads, frames, v_frame, v_row, v_head,
                      w_head, w_channel, w_column, SCALED: tl.constexpr, FRAMES: tl.constexpr, KEYS: tl.constexpr,
                      D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """U8 and its scales, and the bias with the means, of FRAMES frames and BLOCK_N output columns."""
    first_frame = tl.program_id(1) * FRAMES
    offs_d, offs_n = tl.arange(0, D), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    w_ptrs = w + (offs_d * w_channel)[:, None] + (offs_n.to(tl.int64) * w_column)[None, :]
    column_scale = tl.full([BLOCK_N], 1.0, tl.float32)
    if SCALED:
        column_scale = tl.load(w_scale + offs_n, mask=mask_n, other=0.0)
    largest = tl.zeros([FRAMES, BLOCK_N], tl.float32)
    total = tl.zeros([FRAMES, BLOCK_N], tl.float32)
    for head in tl.range(0, heads):
        v_tile = load_frames(v, first_frame, frames, head, v_frame, v_row, v_head, FRAMES, KEYS, D)
        w_tile = tl.load(w_ptrs + head * w_head, mask=mask_n[None, :], other=0.0).to(v_tile.dtype)
        tile, means = centred_product(v_tile, w_tile, column_scale[None, :], FRAMES, KEYS, BLOCK_N)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 1))
        total += means
    frame = first_frame + tl.arange(0, FRAMES)
    rows = frame[:, None] * width + offs_n[None, :]
    mask = (frame < frames)[:, None] & mask_n[None, :]
    total += tl.load(bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_bias + rows, total, mask=mask)
    row_scale = e4m3_scale(largest)
    tl.store(out_scale + rows, row_scale, mask=mask)
    for head in tl.range(0, heads):
        v_tile = load_frames(v, first_frame, frames, head, v_frame, v_row, v_head, FRAMES, KEYS, D)
        w_tile = tl.load(w_ptrs + head * w_head, mask=mask_n[None, :], other=0.0).to(v_tile.dtype)
        tile, _means = centred_product(v_tile, w_tile, column_scale[None, :], FRAMES, KEYS, BLOCK_N)
        tile = tl.permute(tile * (1.0 / row_scale)[:, None, :], [0, 2, 1])
        offs_k = head * KEYS + tl.arange(0, KEYS)
        ptrs = out + rows.to(tl.int64)[:, :, None] * (heads * KEYS) + offs_k[None, None, :]
        tl.store(ptrs, to_e4m3(tile, out), mask=mask[:, :, None])


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_absorb_fp8(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    q_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> AbsorbedFP8:
    """`absorb_audio_projections_fp8` by two Triton kernels; `config` replaces default launch parameters.

    Triton's interpreter cannot round to e4m3, so on a CPU such results stay float32.
    """
    frames, keys_per_frame, heads, head_dim = k.shape
    check_keys_per_frame("k", keys_per_frame)
    dims = {"frames": frames, "keys": keys_per_frame, "heads": heads, "head_dim": head_dim}
    parameters = launch_config(
        "absorb_audio_projections_fp8", dims, "fp8", k.device, default=DEFAULT_CONFIG, given=config,
        match_exactly=("head_dim",),
    )  # fmt: skip
    at_once = max(1, parameters.pop("ROWS") // keys_per_frame)
    groups, block_n = triton.cdiv(frames, at_once), parameters["BLOCK_N"]
    columns, width, out_width = heads * keys_per_frame, q_weight.shape[1], out_weight.shape[0]
    shape = {"FRAMES": at_once, "KEYS": keys_per_frame, "D": head_dim}
    e4m3 = FP8 if k.is_cuda else torch.float32

    keys, values = (k.new_empty(*x, dtype=e4m3) for x in ((frames, columns, width), (frames, out_width, columns)))
    keys_scale, values_scale, value_bias = (
        k.new_empty(frames, n, dtype=torch.float32) for n in (columns, out_width, out_width)
    )
    k_scaled = scaled_by_channel(k, q_scale)
    absorb_keys_fp8[(heads, groups)](
        k_scaled, q_weight, keys, keys_scale, head_dim**-0.5, width, frames, *k_scaled.stride()[:3],
        *channel_strides(q_weight, head_dim), **shape, **parameters,
    )  # fmt: skip
    absorb_values_fp8[(triton.cdiv(out_width, block_n), groups)](
        v, out_weight, v if out_scale is None else out_scale, out_bias, values, values_scale, value_bias, out_width,
        heads, frames, *v.stride()[:3], *channel_strides(out_weight.T, head_dim), SCALED=out_scale is not None,
        **shape, **parameters,
    )  # fmt: skip
    return AbsorbedFP8(keys, keys_scale, bias_of_keys(k, q_bias), values, values_scale, value_bias)


# --- Operation ------------------------------------------------------------------------------------------------------


def _absorb_fp8_cpu(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    q_scale: Tensor | None, out_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return absorb_fp8_reference(k, v, q_weight, q_bias, out_weight, out_bias, q_scale, out_scale)


absorb_audio_projections_fp8_op = define_op("absorb_audio_projections_fp8", cpu=_absorb_fp8_cpu, cuda=launch_absorb_fp8)


def absorb_audio_projections_fp8(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    q_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> AbsorbedFP8:
    """Multiplies the projections of an audio attention layer into its keys and values, and rounds the results to e4m3.

    For each head: G = k Wq / sqrt(head_dim), g = k bq / sqrt(head_dim), U = v Wo^T. From G and U the means over the
    keys of a head are taken out, which `absorbed_audio_attention_fp8` needs for U only, as a part of the bias.

    Args:
        k: [frames, keys, heads, head_dim], contiguous along head_dim; float32, float16 or bfloat16. On a GPU the number
            of keys must be a power of two.
        v: like k.
        q_weight: [heads x head_dim, width], the weight of the query projection as nn.Linear has it.
        q_bias: [heads x head_dim], the bias of the query projection.
        out_weight: [out width, heads x head_dim], the weight of the output projection as nn.Linear has it.
        out_bias: [out width], the bias of the output projection, contiguous; float32, float16 or bfloat16.
        q_scale: None, or float32 [heads x head_dim], contiguous, the scales of the rows of a float8_e4m3fn q_weight.
        out_scale: None, or float32 [out width], contiguous, the scales of the rows of a float8_e4m3fn out_weight.

    Returns:
        G8, float8_e4m3fn [frames, heads x keys, width], and the scales of its rows, float32 [frames, heads x keys]; g,
        float32 [frames, heads x keys]; U8^T, float8_e4m3fn [frames, out width, heads x keys], and the scales of its
        rows, float32 [frames, out width]; and out_bias with the sum over heads of U's means, float32
        [frames, out width].

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride, or requires a gradient.
    """
    check_projections(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)
    check("out_bias", out_bias, shape=out_weight.shape[:1], dtype=DTYPE_NAMES, device=k.device, layout="contiguous")
    return AbsorbedFP8(
        *absorb_audio_projections_fp8_op(k, v, q_weight, q_bias, out_weight, out_bias, q_scale, out_scale)
    )
