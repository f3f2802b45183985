"""Norms, rotation and quantisation: what lies between a product and the next one. In float32, one pass over memory.

Before a linear layer, of rows [rows, columns]:

    layer_norm             (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    layer_norm_modulate    (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift
    ..._fp8                the same as `quantize_rows` would have it
    quantize_rows          x8 = x / x_scale in e4m3, x_scale the largest value of the row / 448

Before attention, of queries and keys [tokens, heads, channels], RMSNorm over all channels and 3-D rotary embedding; a
token's heads lie side by side, tokens any distance apart: slices of a fused projection go in as they are.

    x_norm = x / sqrt(mean(x^2) + eps) * weight            over all heads x channels of a token, not head by head
    (a, b) -> (a cos - b sin, a sin + b cos)               of every adjacent pair of channels, by the token's angles

`rms_norm_rope_fp8` writes what `kernels.chunk_attention.chunk_attention_fp8` reads, and takes v along:

    q8, q_scale   e4m3, and the largest value of each token and head / 448
    k8, k_scale   e4m3 of k - c. c[head, channel] is about the mean key, which many channels share and which would cost
                  the rest their precision; the attention does not change with any c. It is the mean of at most 128
                  tokens, spread over all of them. The scale is a head's, and fixed: a normalised, rotated key is no
                  longer than sqrt(heads x channels) max|weight|, k - c no longer than twice that (`key_scale`). A
                  floating-point format loses nothing by room to spare: e4m3 is exact to 4 bits over 2^15
    v8, v_scale   e4m3 [heads, channels, tokens], a scale for each head and channel: 8 times the largest value of the
                  same 128 tokens; what is larger still saturates

Source: SoulX-FlashTalk's WanSelfAttention; smoothing of keys, SageAttention (arXiv 2410.02367).
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunk_attention import DTYPE_NAMES, FP8, interleave
from kernels.tuning import LaunchConfig, tuned_config

SAMPLE = 128  # tokens that the mean key and the range of values are taken from
HEADROOM = 8.0  # of a value over the largest one of the sample
FP8_MAX = 448.0  # of e4m3
MIN_SCALE = 1e-12  # least scale: an operand of zeros has one too

DEFAULT: LaunchConfig = {"BLOCK_H": 8, "TOKENS": 2, "num_warps": 4}
ROWS: LaunchConfig = {"ROWS": 2, "num_warps": 8}


# --- Definition -----------------------------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> list[Tensor]:
    """q and k normalised and rotated, in float32 or wider, rounded to q's dtype; arguments as in `rms_norm_rope`."""
    return [_turn(x, weight, rope, eps).to(x.dtype) for x, weight in ((q, q_weight), (k, k_weight))]


def _turn(x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
    """x [tokens, heads, d] normalised and rotated, not rounded."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
    wide = (wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt() * weight).unflatten(1, x.shape[1:])
    a, b = wide.unflatten(2, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].to(wide.dtype).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(2)


def reference_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q8, q_scale, k8, v8, v_scale; arguments as in `rms_norm_rope_fp8`."""
    turned_q, turned_k = _turn(q, q_weight, rope, eps), _turn(k, k_weight, rope, eps)
    tokens = torch.tensor(sample(len(k)), device=k.device)
    q_scale = (turned_q.abs().amax(2) / FP8_MAX).clamp_min(MIN_SCALE)
    centre = turned_k[tokens].mean(0).to(k.dtype)
    v_scale = (v[tokens].abs().amax(0).to(turned_q.dtype) * (HEADROOM / FP8_MAX)).clamp_min(MIN_SCALE)
    places = torch.from_numpy(interleave(len(v))).to(v.device)
    padded = F.pad(v / v_scale, (0, 0, 0, 0, 0, len(places) - len(v)))[places]
    return (
        _round(turned_q / q_scale[..., None]), q_scale.float(), _round((turned_k - centre) / k_scale[:, None]),
        _round(padded.permute(1, 2, 0).contiguous()), v_scale.float(),
    )  # fmt: skip


def _round(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float = 0.0) -> Tensor:
    """LayerNorm(x) (one + weight) + bias, in float32 or wider, not rounded."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(wide, x.shape[-1:], eps=eps) * (one + weight) + bias


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as e4m3 and the float32 scale of each row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(1) / FP8_MAX).clamp_min(MIN_SCALE)
    return _round(wide / scale[:, None]), scale.float()


def sample(tokens: int) -> list[int]:
    """At most SAMPLE tokens, evenly spread over any period of the grid they come from: by the golden ratio."""
    stride = _stride(tokens)
    return [i * stride % tokens for i in range(min(tokens, SAMPLE))]


def _stride(tokens: int) -> int:
    """The number nearest to 0.618 of the tokens, from below, that has no divisor in common with theirs."""
    return next(n for n in range(max(1, int(tokens * 0.618)), 0, -1) if math.gcd(n, tokens) == 1)


def key_scale(k_weight: Tensor, heads: int) -> Tensor:
    """The scale of a head's e4m3 keys, float32 [heads], from the weight [heads x channels] of their norm."""
    largest = 2 * math.sqrt(len(k_weight)) * k_weight.float().abs().unflatten(0, (heads, -1)).amax(1)
    return (largest / FP8_MAX).clamp_min(MIN_SCALE)


# --- Triton kernels -------------------------------------------------------------------------------------------------


@triton.jit
def inverse_rms(x, width, eps, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row."""
    squares = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(BLOCKS):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
        squares += y * y
    return tl.rsqrt(tl.sum(squares) / width + eps)


@triton.jit
def load_turned(x, weight, scale, cos, sin, places, mask, D: tl.constexpr):
    """scale x weight, rotated; x at `places` [rows, D]. cos and sin [rows or 1, D / 2]."""
    y = tl.load(x + places, mask=mask, other=0.0).to(tl.float32) * scale
    y *= tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(y, [y.shape[0], D // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [y.shape[0], D])


@triton.jit
def to_e4m3(x, out):
    """x within the range of e4m3, in the dtype that `out` points to."""
    return tl.clamp(x, -448.0, 448.0).to(out.dtype.element_ty)


@triton.jit
def rows_forward(x, weight, bias, out, out_scale, eps, one, rows, columns, x_row, NORM: tl.constexpr, FP8: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ROWS rows, each in registers as a whole: normalised if NORM, quantised if FP8."""
    places = tl.arange(0, BLOCK)
    within = places < columns
    for i in range(ROWS):
        row = (tl.program_id(0) * ROWS + i).to(tl.int64)
        if row < rows:
            y = tl.load(x + row * x_row + places, mask=within, other=0.0).to(tl.float32)
            if NORM:
                y = tl.where(within, y - tl.sum(y) / columns, 0.0)
                y *= tl.rsqrt(tl.sum(y * y) / columns + eps)
                # From the cache: registers for them would halve the rows that are under way.
                y *= one + tl.load(weight + places, mask=within, other=0.0).to(tl.float32)
                y += tl.load(bias + places, mask=within, other=0.0).to(tl.float32)
            if FP8:
                scale = tl.maximum(tl.max(tl.abs(y)) / 448.0, 1e-12)
                tl.store(out_scale + row, scale)
                y = to_e4m3(y * (1.0 / scale), out)
            tl.store(out + row * columns + places, y.to(out.dtype.element_ty), mask=within)


@triton.jit
def norm_rope_forward(q, k, q_out, k_out, q_weight, k_weight, rope, q_scale, k_scale, centre, eps, tokens, q_row, k_row,
                      heads, FP8: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCKS: tl.constexpr,
                      TOKENS: tl.constexpr):  # fmt: skip
    """TOKENS rows of q and of k. A row's second reading comes out of the multiprocessor's own cache."""
    width = heads * D
    pairs = tl.arange(0, D // 2)
    for i in range(TOKENS):
        token = (tl.program_id(0) * TOKENS + i).to(tl.int64)
        if token < tokens:
            cos = tl.load(rope + token * D + 2 * pairs)[None, :]
            sin = tl.load(rope + token * D + 2 * pairs + 1)[None, :]
            q_token, k_token = q + token * q_row, k + token * k_row
            q_rms = inverse_rms(q_token, width, eps, BLOCK_H * D, BLOCKS)
            k_rms = inverse_rms(k_token, width, eps, BLOCK_H * D, BLOCKS)
            for block in tl.static_range(BLOCKS):
                head = block * BLOCK_H + tl.arange(0, BLOCK_H)
                mask = (head < heads)[:, None]
                places = head[:, None] * D + tl.arange(0, D)[None, :]
                y = load_turned(q_token, q_weight + places, q_rms, cos, sin, places, mask, D)
                z = load_turned(k_token, k_weight + places, k_rms, cos, sin, places, mask, D)
                if FP8:
                    scale = tl.maximum(tl.max(tl.abs(y), 1) / 448.0, 1e-12)
                    tl.store(q_scale + token * heads + head, scale, mask=head < heads)
                    y = to_e4m3(y * (1.0 / scale)[:, None], q_out)
                    z -= tl.load(centre + places, mask=mask, other=0.0).to(tl.float32)
                    fixed = 1.0 / tl.load(k_scale + head, mask=head < heads, other=1.0)
                    z = to_e4m3(z * fixed[:, None], k_out)
                else:
                    y, z = y.to(q_out.dtype.element_ty), z.to(k_out.dtype.element_ty)
                tl.store(q_out + token * width + places, y, mask=mask)
                tl.store(k_out + token * width + places, z, mask=mask)


@triton.jit
def sample_rms(k, out, eps, tokens, stride, k_row, heads, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCKS: tl.constexpr):
    """The inverse RMS of each token of the sample."""
    i = tl.program_id(0)
    token = i.to(tl.int64) * stride % tokens
    tl.store(out + i, inverse_rms(k + token * k_row, heads * D, eps, BLOCK_H * D, BLOCKS))


@triton.jit
def sample_statistics(k, v, k_weight, rope, rms, centre, v_scale, tokens, stride, k_row, v_row,
                      D: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Of one head: the mean of the sample's turned keys, and the scale of its values. SIZE is a power of two."""
    i, count = tl.arange(0, SIZE), tl.minimum(tokens, SIZE)
    token = i.to(tl.int64) * stride % tokens
    mask = (i < count)[:, None]
    channels, pairs = tl.program_id(0) * D + tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
    cos = tl.load(rope + token[:, None] * D + 2 * pairs)
    sin = tl.load(rope + token[:, None] * D + 2 * pairs + 1)
    scale = tl.load(rms + i, mask=i < count, other=0.0)[:, None]
    weight = k_weight + tl.broadcast_to(channels, [SIZE, D])
    turned = load_turned(k, weight, scale, cos, sin, token[:, None] * k_row + channels, mask, D)
    out = tl.program_id(0) * D + tl.arange(0, D)
    tl.store(centre + out, (tl.sum(turned, 0) / count).to(centre.dtype.element_ty))
    values = tl.load(v + token[:, None] * v_row + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(v_scale + out, tl.maximum(tl.max(tl.abs(values), 0) * (8.0 / 448.0), 1e-12))


@triton.jit
def transpose_values(v, out, v_scale, tokens, padded, v_row, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK tokens of a head, scaled, turned to [channel, token] in the order of `interleave`; beyond the end zeros."""
    head = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = ((place & ~15) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)).to(tl.int64)
    channels = head * D + tl.arange(0, D)
    mask = (token < tokens)[:, None]
    values = tl.load(v + token[:, None] * v_row + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    values = to_e4m3(values * (1.0 / tl.load(v_scale + channels))[None, :], out)
    rows = channels.to(tl.int64) * padded
    tl.store(out + rows[:, None] + place[None, :], tl.trans(values), mask=(place < padded)[None, :])


# --- Launchers ------------------------------------------------------------------------------------------------------


def launch_rows(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float, float] | None,
    fp8: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """x [rows, columns] normalised by (weight, bias, eps, one), and quantised if `fp8`; and the scales [rows], or none.

    The interpreter cannot round to e4m3: on the CPU the result then stays float32.
    """
    rows, columns = x.shape
    operation = "layer_norm_modulate" if norm else "quantize_rows"
    dtype = "fp8" if fp8 else DTYPE_NAMES[x.dtype]
    tuned = tuned_config(operation, {"rows": rows, "columns": columns}, dtype, x.device, ("triton",))
    parameters = {**ROWS, **(config or (tuned.config if tuned else {}))}
    out = x.new_empty(x.shape, dtype=(FP8 if x.is_cuda else torch.float32) if fp8 else x.dtype)
    scale = x.new_empty(rows if fp8 else 0, dtype=torch.float32)
    weight, bias, eps, one = norm or (x, x, 0.0, 0.0)
    rows_forward[(triton.cdiv(rows, parameters["ROWS"]),)](
        x, weight, bias, out, scale, eps, one, rows, columns, x.stride(0), NORM=norm is not None, FP8=fp8,
        BLOCK=triton.next_power_of_2(columns), **parameters,
    )  # fmt: skip
    return out, scale


def launch_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    fp8: Mapping[str, Tensor] | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k turned; with `fp8` (q_scale to be written, k_scale, centre) in e4m3, or q_scale's dtype if that is less.

    The interpreter cannot round to e4m3; there, q_scale being on the CPU, the results stay float32.
    """
    tokens, heads, d = q.shape
    tuned = tuned_config(
        "rms_norm_rope", {"tokens": tokens, "heads": heads, "head_dim": d}, "bf16", q.device, ("triton",)
    )
    parameters: dict[str, Any] = {**DEFAULT, **(config or (tuned.config if tuned else {}))}
    parameters |= {"FP8": fp8 is not None, "D": d, "BLOCKS": triton.cdiv(heads, parameters["BLOCK_H"])}
    dtype = q.dtype if fp8 is None else FP8 if q.is_cuda else torch.float32
    q_out, k_out = (q.new_empty(q.shape, dtype=dtype) for _ in range(2))
    scales = (fp8["q_scale"], fp8["k_scale"], fp8["centre"]) if fp8 else (q, q, q)
    norm_rope_forward[(triton.cdiv(tokens, parameters["TOKENS"]),)](
        q,
        k,
        q_out,
        k_out,
        q_weight,
        k_weight,
        rope,
        *scales,
        eps,
        tokens,
        q.stride(0),
        k.stride(0),
        heads,
        **parameters,
    )
    return q_out, k_out


def launch_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference_fp8`."""
    tokens, heads, d = q.shape
    stride, count, block_h = _stride(tokens), min(tokens, SAMPLE), DEFAULT["BLOCK_H"]
    rms = q.new_empty(count, dtype=torch.float32)
    sample_rms[(count,)](
        k, rms, eps, tokens, stride, k.stride(0), heads, D=d, BLOCK_H=block_h, BLOCKS=triton.cdiv(heads, block_h)
    )
    centre, v_scale = k.new_empty(heads, d), q.new_empty(heads, d, dtype=torch.float32)
    sample_statistics[(heads,)](
        k, v, k_weight, rope, rms, centre, v_scale, tokens, stride, k.stride(0), v.stride(0),
        D=d, SIZE=triton.next_power_of_2(count), num_warps=8,
    )  # fmt: skip
    q_scale = q.new_empty(tokens, heads, dtype=torch.float32)
    fp8 = {"q_scale": q_scale, "k_scale": k_scale, "centre": centre}
    q8, k8 = launch_rms_norm_rope(q, k, q_weight, k_weight, rope, eps, fp8)
    padded = -(-tokens // 16) * 16
    v8 = v.new_empty(heads, d, padded, dtype=q8.dtype)
    grid = (triton.cdiv(padded, BLOCK_VALUES), heads)
    transpose_values[grid](v, v8, v_scale, tokens, padded, v.stride(0), D=d, BLOCK=BLOCK_VALUES, num_warps=4)
    return q8, q_scale, k8, v8, v_scale


BLOCK_VALUES = 128  # tokens that a program transposes


# --- Operations -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::layer_norm", mutates_args=(), device_types="cpu")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float) -> Tensor:
    return layer_norm_reference(x, weight, bias, eps, one).to(x.dtype)


@_layer_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float) -> Tensor:
    return launch_rows(x, (weight, bias, eps, one), fp8=False)[0]


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("flashtalk::layer_norm_fp8", mutates_args=(), device_types="cpu")
def _layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float) -> tuple[Tensor, Tensor]:
    return quantize_reference(layer_norm_reference(x, weight, bias, eps, one))


@_layer_norm_fp8.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float) -> tuple[Tensor, Tensor]:
    return launch_rows(x, (weight, bias, eps, one), fp8=True)


@_layer_norm_fp8.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("flashtalk::quantize_rows", mutates_args=(), device_types="cpu")
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_reference(x)


@_quantize_rows.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return launch_rows(x, None, fp8=True)


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis; see the module's first lines.

    Args:
        x: [rows, columns], float32, float16 or bfloat16; a row's values side by side, rows any distance apart.
        weight: [columns], float32, float16 or bfloat16, contiguous.
        bias: like weight.
        eps: added to the variance.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    _check_rows(x, {"weight": weight, "bias": bias})
    return _layer_norm(x, weight, bias, eps, 0.0)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`layer_norm` as `quantize_rows` would have it: float8_e4m3fn [rows, columns], and float32 [rows]."""
    _check_rows(x, {"weight": weight, "bias": bias})
    return _layer_norm_fp8(x, weight, bias, eps, 0.0)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis, modulated; see the module's first lines.

    Args:
        x: as in `layer_norm`.
        shift: [columns], float32, float16 or bfloat16, contiguous.
        scale: like shift.
        eps: added to the variance.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    _check_rows(x, {"shift": shift, "scale": scale})
    return _layer_norm(x, scale, shift, eps, 1.0)


def layer_norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate` as `quantize_rows` would have it: float8_e4m3fn [rows, columns], and float32 [rows]."""
    _check_rows(x, {"shift": shift, "scale": scale})
    return _layer_norm_fp8(x, scale, shift, eps, 1.0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ~ x8 x_scale; see the module's first lines. A row of zeros has a scale, too: 1e-12.

    Args:
        x: [rows, columns], float32, float16 or bfloat16; a row's values side by side, rows any distance apart.

    Returns:
        float8_e4m3fn [rows, columns], contiguous, and float32 [rows].

    Raises:
        ValueError: x has another shape, dtype or stride, or wants a gradient.
    """
    _check_rows(x, {})
    return _quantize_rows(x)


@torch.library.custom_op("flashtalk::rms_norm_rope", mutates_args=(), device_types="cpu")
def _rms_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = reference(q, k, q_weight, k_weight, rope, eps)
    return q, k


@_rms_norm_rope.register_kernel("cuda")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_rms_norm_rope(q, k, q_weight, k_weight, rope, eps)


@_rms_norm_rope.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rms_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """q and k normalised over all channels, weighted, rotated; see the module's first lines.

    Args:
        q: [tokens, heads, channels], float32, float16 or bfloat16; a token's heads side by side, tokens any distance
            apart.
        k: like q.
        q_weight: [heads x channels], contiguous.
        k_weight: like q_weight.
        rope: float32 [tokens, channels / 2, 2], cosine and sine of each token's angles, contiguous.
        eps: of the norm.

    Returns:
        q and k, contiguous, in q's dtype.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    _check(q, {"k": k}, {"q_weight": q_weight, "k_weight": k_weight}, rope)
    return _rms_norm_rope(q, k, q_weight, k_weight, rope, eps)


@torch.library.custom_op("flashtalk::rms_norm_rope_fp8", mutates_args=(), device_types="cpu")
def _rms_norm_rope_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference_fp8(q, k, v, q_weight, k_weight, k_scale, rope, eps)


@_rms_norm_rope_fp8.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_fp8(q, k, v, q_weight, k_weight, k_scale, rope, eps)


@_rms_norm_rope_fp8.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, d = q.shape
    return (
        q.new_empty(q.shape, dtype=FP8), q.new_empty(tokens, heads, dtype=torch.float32),
        k.new_empty(k.shape, dtype=FP8),
        v.new_empty(heads, d, (tokens + 15) // 16 * 16, dtype=FP8), v.new_empty(heads, d, dtype=torch.float32),
    )  # fmt: skip


def rms_norm_rope_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    k_scale: Tensor,
    rope: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_rope` in e4m3, and v with it; see the module's first lines.

    Args:
        q: as in `rms_norm_rope`.
        k: as in `rms_norm_rope`.
        v: like q.
        q_weight: as in `rms_norm_rope`.
        k_weight: as in `rms_norm_rope`.
        k_scale: `key_scale(k_weight, heads)`, float32 [heads].
        rope: as in `rms_norm_rope`.
        eps: as in `rms_norm_rope`.

    Returns:
        q8, q_scale, k8, k_scale, v8, v_scale: the first arguments of `kernels.chunk_attention.chunk_attention_fp8`.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    _check(q, {"k": k, "v": v}, {"q_weight": q_weight, "k_weight": k_weight}, rope)
    if k_scale.shape != q.shape[1:2] or k_scale.dtype != torch.float32:
        raise ValueError(f"k_scale: {k_scale.dtype} {list(k_scale.shape)}, wanted torch.float32 [{q.shape[1]}]")
    q8, q_scale, k8, v8, v_scale = _rms_norm_rope_fp8(q, k, v, q_weight, k_weight, k_scale, rope, eps)
    return q8, q_scale, k8, k_scale, v8, v_scale


def _check(q: Tensor, rows: Mapping[str, Tensor], weights: Mapping[str, Tensor], rope: Tensor) -> None:
    """Raises ValueError unless all of them go together."""
    if q.ndim != 3 or not q.numel():
        raise ValueError(f"q: shape {list(q.shape)}, wanted [tokens, heads, channels], at least 1 of each")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q: {q.dtype}, wanted float32, float16 or bfloat16")
    tokens, heads, d = q.shape
    if d % 2:
        raise ValueError(f"q: {d} channels, wanted an even number")
    wanted = {name: (x, q.shape, q.dtype) for name, x in {"q": q, **rows}.items()}
    wanted |= {name: (x, (heads * d,), None) for name, x in weights.items()}
    wanted["rope"] = (rope, (tokens, d // 2, 2), torch.float32)
    for name, (x, shape, dtype) in wanted.items():
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name}: shape {list(x.shape)}, wanted {list(shape)}")
        if dtype is not None and x.dtype != dtype:
            raise ValueError(f"{name}: {x.dtype}, wanted {dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, wanted {q.device}, where q is")
        if not (x[0] if name in ("q", *rows) else x).is_contiguous():
            raise ValueError(
                f"{name}: strides {x.stride()} for shape {list(x.shape)}, wanted a token's values in a row"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")


def _check_rows(x: Tensor, vectors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless x is rows, and the vectors go along with it."""
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"x: shape {list(x.shape)}, wanted [rows, columns], at least 1 of each")
    for name, y in {"x": x, **vectors}.items():
        if y.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: {y.dtype}, wanted float32, float16 or bfloat16")
        if name != "x" and y.shape != x.shape[1:]:
            raise ValueError(f"{name}: shape {list(y.shape)}, wanted [{x.shape[1]}]")
        if y.device != x.device:
            raise ValueError(f"{name}: on {y.device}, wanted {x.device}, where x is")
        if y.stride(-1) != 1 and y.shape[-1] > 1:
            raise ValueError(f"{name}: strides {y.stride()} for shape {list(y.shape)}, wanted a row's values in a row")
        if y.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")
