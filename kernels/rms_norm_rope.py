"""RMSNorm and rotary embedding of queries and keys, and their quantisation for FP8 attention.

q and k are [tokens, heads, head_dim]. The norm runs over all heads of a token, not head by head, and the 3-D rotary
embedding turns every adjacent pair (a, b) of channels by the token's angles:

    x_norm = x / sqrt(mean(x^2) + eps) * weight            mean over heads * head_dim values
    (a, b) -> (a cos - b sin, a sin + b cos)

`rms_norm_rope_fp8` also quantises the results, and v with them, to the operands of
`kernels.chunk_attention_fp8.chunk_attention_fp8`:

    q8, q_scale   e4m3; a scale for each token and head, max |q| / 448
    k8, k_scale   e4m3 of k - c, where c [head, channel] is about the mean key. Keys share a large common part, which
                  would cost the rest their precision and which the softmax ignores, so any c gives the same attention.
                  c is the mean over a sample of 128 tokens. A head's scale is fixed by the weight: a normalised,
                  rotated key is no longer than sqrt(heads * head_dim) * max |weight|, and k - c no longer than twice
                  that (`key_scale`). The unused range costs no precision: e4m3 keeps 4 bits over a range of 2^15.
    v8, v_scale   e4m3 [heads, head_dim, tokens]; a scale for each head and channel, 8 times the largest value of the
                  same sample, / 448. Values beyond that saturate.

A rank that has only some of the tokens quantises them as the whole is quantised: the ranks gather the sample, and give
it to `kv_statistics`, which returns c and v_scale.

Source: SoulX-FlashTalk's WanSelfAttention; smoothing of keys: SageAttention (arXiv 2410.02367).
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunk_attention_fp8 import interleave
from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, MIN_SCALE, check, define_op, e4m3_scale, to_e4m3
from kernels.tuning import LaunchConfig, launch_config

NUM_SAMPLES = 128  # tokens that the mean key and the range of values are estimated from
VALUE_HEADROOM = 8.0  # the range of values over the largest one sampled
TRANSPOSE_BLOCK = 128  # tokens that a program of `transpose_values` takes

DEFAULT_CONFIG: LaunchConfig = {"BLOCK_H": 8, "TOKENS": 2, "num_warps": 4}


# --- Reference ------------------------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k normalised and rotated in float32 or wider, and rounded to their own dtype."""
    return _norm_rope(q, q_weight, rope, eps).to(q.dtype), _norm_rope(k, k_weight, rope, eps).to(k.dtype)


def _norm_rope(x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
    """x [tokens, heads, head_dim] normalised and rotated, not rounded to its dtype."""
    y = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
    y = (y * (y.square().mean(1, keepdim=True) + eps).rsqrt() * weight).unflatten(1, x.shape[1:])
    a, b = y.unflatten(2, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].to(y.dtype).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(2)


def reference_statistics(k: Tensor, v: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kv_statistics` by definition, with the same arguments; v_scale is float32 or, for float64, wider."""
    wide = torch.promote_types(v.dtype, torch.float32)
    v_scale = (v.abs().amax(0).to(wide) * (VALUE_HEADROOM / FP8_MAX)).clamp_min(MIN_SCALE)
    return _norm_rope(k, k_weight, rope, eps).mean(0).to(k.dtype), v_scale


def reference_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float,
    mean_key: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q8, q_scale, k8, v8 and v_scale of `rms_norm_rope_fp8`."""
    if mean_key is None or v_scale is None:
        tokens = torch.tensor(sample_tokens(len(k)), device=k.device)
        mean_key, v_scale = reference_statistics(k[tokens], v[tokens], k_weight, rope[tokens], eps)
    q_rot, k_rot = _norm_rope(q, q_weight, rope, eps), _norm_rope(k, k_weight, rope, eps)
    q_scale = (q_rot.abs().amax(2) / FP8_MAX).clamp_min(MIN_SCALE)
    order = torch.from_numpy(interleave(len(v))).to(v.device)
    v_padded = F.pad(v / v_scale, (0, 0, 0, 0, 0, len(order) - len(v)))[order]
    return (
        _to_e4m3(q_rot / q_scale[..., None]), q_scale.float(), _to_e4m3((k_rot - mean_key) / k_scale[:, None]),
        _to_e4m3(v_padded.permute(1, 2, 0).contiguous()), v_scale.float(),
    )  # fmt: skip


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def sample_tokens(tokens: int) -> list[int]:
    """At most NUM_SAMPLES different tokens of a space-time grid, spread evenly over its frames, rows and columns."""
    stride = _sample_stride(tokens)
    return [i * stride % tokens for i in range(min(tokens, NUM_SAMPLES))]


def _sample_stride(tokens: int) -> int:
    """The largest integer <= 0.618 * tokens that is coprime to tokens: multiples of it never line up with the grid."""
    return next(n for n in range(max(1, int(tokens * 0.618)), 0, -1) if math.gcd(n, tokens) == 1)


def key_scale(k_weight: Tensor, heads: int) -> Tensor:
    """The scale of each head's e4m3 keys, which no smoothed key exceeds.

    2 * sqrt(heads * head_dim) * max |weight of the head| / 448, at least 1e-12.

    Args:
        k_weight: [heads * head_dim], the weight of the keys' norm.
        heads: number of heads.

    Returns:
        float32 [heads].
    """
    largest = 2 * math.sqrt(len(k_weight)) * k_weight.float().abs().unflatten(0, (heads, -1)).amax(1)
    return (largest / FP8_MAX).clamp_min(MIN_SCALE)


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def inverse_rms(x, width, eps, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row of `width` values."""
    squares = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(BLOCKS):
        offs = i * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(x + offs, mask=offs < width, other=0.0).to(tl.float32)
        squares += y * y
    return tl.rsqrt(tl.sum(squares) / width + eps)


@triton.jit
def load_rotated(x, weight_ptrs, scale, cos, sin, offs, mask, HEAD_DIM: tl.constexpr):
    """x at `offs` [rows, HEAD_DIM], times `scale` and weight, rotated by cos and sin [rows or 1, HEAD_DIM / 2]."""
    y = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) * scale
    y *= tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(y, [y.shape[0], HEAD_DIM // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [y.shape[0], HEAD_DIM])


@triton.jit
def rms_norm_rope_fwd(q, k, q_out, k_out, q_weight, k_weight, rope, q_scale, k_scale, mean_key, eps, tokens, q_row,
                      k_row, heads, FP8: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
                      BLOCKS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """TOKENS rows of q and of k, BLOCK_H heads at a time. The second read of a row hits the L1 cache."""
    width = heads * HEAD_DIM
    pairs = tl.arange(0, HEAD_DIM // 2)
    for i in range(TOKENS):
        token = (tl.program_id(0) * TOKENS + i).to(tl.int64)
        if token < tokens:
            cos = tl.load(rope + token * HEAD_DIM + 2 * pairs)[None, :]
            sin = tl.load(rope + token * HEAD_DIM + 2 * pairs + 1)[None, :]
            q_token, k_token = q + token * q_row, k + token * k_row
            q_rms = inverse_rms(q_token, width, eps, BLOCK_H * HEAD_DIM, BLOCKS)
            k_rms = inverse_rms(k_token, width, eps, BLOCK_H * HEAD_DIM, BLOCKS)
            for block in tl.static_range(BLOCKS):
                head = block * BLOCK_H + tl.arange(0, BLOCK_H)
                mask = (head < heads)[:, None]
                offs = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
                y = load_rotated(q_token, q_weight + offs, q_rms, cos, sin, offs, mask, HEAD_DIM)
                z = load_rotated(k_token, k_weight + offs, k_rms, cos, sin, offs, mask, HEAD_DIM)
                if FP8:
                    scale = e4m3_scale(tl.max(tl.abs(y), 1))
                    tl.store(q_scale + token * heads + head, scale, mask=head < heads)
                    y = to_e4m3(y * (1.0 / scale)[:, None], q_out)
                    z -= tl.load(mean_key + offs, mask=mask, other=0.0).to(tl.float32)
                    k_factor = 1.0 / tl.load(k_scale + head, mask=head < heads, other=1.0)
                    z = to_e4m3(z * k_factor[:, None], k_out)
                else:
                    y, z = y.to(q_out.dtype.element_ty), z.to(k_out.dtype.element_ty)
                tl.store(q_out + token * width + offs, y, mask=mask)
                tl.store(k_out + token * width + offs, z, mask=mask)


@triton.jit
def sample_rms(k, out, eps, tokens, stride, k_row, heads, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
               BLOCKS: tl.constexpr):  # fmt: skip
    """The inverse RMS of each sampled key: token i * stride % tokens is sample i."""
    i = tl.program_id(0)
    token = i.to(tl.int64) * stride % tokens
    tl.store(out + i, inverse_rms(k + token * k_row, heads * HEAD_DIM, eps, BLOCK_H * HEAD_DIM, BLOCKS))


@triton.jit
def sample_statistics(k, v, k_weight, rope, rms, mean_key, v_scale, tokens, stride, k_row, v_row,
                      HEAD_DIM: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """The mean of a head's sampled, rotated keys, and the scale of its values. SIZE samples, a power of two."""
    i, count = tl.arange(0, SIZE), tl.minimum(tokens, SIZE)
    token = i.to(tl.int64) * stride % tokens
    mask = (i < count)[:, None]
    channels, pairs = (
        tl.program_id(0) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :],
        tl.arange(0, HEAD_DIM // 2)[None, :],
    )
    cos = tl.load(rope + token[:, None] * HEAD_DIM + 2 * pairs)
    sin = tl.load(rope + token[:, None] * HEAD_DIM + 2 * pairs + 1)
    scale = tl.load(rms + i, mask=i < count, other=0.0)[:, None]
    weight_ptrs = k_weight + tl.broadcast_to(channels, [SIZE, HEAD_DIM])
    keys = load_rotated(k, weight_ptrs, scale, cos, sin, token[:, None] * k_row + channels, mask, HEAD_DIM)
    offs = tl.program_id(0) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(mean_key + offs, (tl.sum(keys, 0) / count).to(mean_key.dtype.element_ty))
    values = tl.load(v + token[:, None] * v_row + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(v_scale + offs, tl.maximum(tl.max(tl.abs(values), 0) * (8.0 / 448.0), 1e-12))  # VALUE_HEADROOM / FP8_MAX


@triton.jit
def transpose_values(v, out, v_scale, tokens, padded_tokens, v_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Quantises BLOCK tokens of a head to [channel, token], in the order of `interleave`; the padding is zeros."""
    head = tl.program_id(1)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = ((offs & ~15) | ((offs & 2) << 2) | ((offs & 12) >> 1) | (offs & 1)).to(tl.int64)
    channels = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    mask = (token < tokens)[:, None]
    values = tl.load(v + token[:, None] * v_row + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    values = to_e4m3(values * (1.0 / tl.load(v_scale + channels))[None, :], out)
    rows = channels.to(tl.int64) * padded_tokens
    tl.store(out + rows[:, None] + offs[None, :], tl.trans(values), mask=(offs < padded_tokens)[None, :])


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm_rope` by its kernel."""
    return _launch(q, k, q_weight, k_weight, rope, eps, None, config)


def _launch(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    eps: float,
    fp8: tuple[Tensor, Tensor, Tensor] | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k normalised and rotated; in e4m3 with `fp8`: q_scale, which is written, k_scale and the mean key.

    Triton's interpreter cannot round to e4m3, so on a CPU quantised results stay float32.
    """
    tokens, heads, head_dim = q.shape
    parameters = launch_config(
        "rms_norm_rope", {"tokens": tokens, "heads": heads, "head_dim": head_dim}, "bf16", q.device,
        default=DEFAULT_CONFIG, given=config,
    )  # fmt: skip
    parameters |= {"FP8": fp8 is not None, "HEAD_DIM": head_dim, "BLOCKS": triton.cdiv(heads, parameters["BLOCK_H"])}
    dtype = q.dtype if fp8 is None else FP8 if q.is_cuda else torch.float32
    q_out, k_out = (q.new_empty(q.shape, dtype=dtype) for _ in range(2))
    rms_norm_rope_fwd[(triton.cdiv(tokens, parameters["TOKENS"]),)](
        q, k, q_out, k_out, q_weight, k_weight, rope, *(fp8 or (q, q, q)), eps, tokens, q.stride(0), k.stride(0), heads,
        **parameters,
    )  # fmt: skip
    return q_out, k_out


def launch_kv_statistics(
    k: Tensor, v: Tensor, k_weight: Tensor, rope: Tensor, eps: float, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """`kv_statistics` by two kernels, of the tokens 0, stride, 2 stride, ... modulo the number of tokens."""
    tokens, heads, head_dim = k.shape
    count, block_h = min(tokens, NUM_SAMPLES), DEFAULT_CONFIG["BLOCK_H"]
    rms = k.new_empty(count, dtype=torch.float32)
    sample_rms[(count,)](
        k, rms, eps, tokens, stride, k.stride(0), heads, HEAD_DIM=head_dim, BLOCK_H=block_h,
        BLOCKS=triton.cdiv(heads, block_h),
    )  # fmt: skip
    mean_key, v_scale = k.new_empty(heads, head_dim), k.new_empty(heads, head_dim, dtype=torch.float32)
    sample_statistics[(heads,)](
        k, v, k_weight, rope, rms, mean_key, v_scale, tokens, stride, k.stride(0), v.stride(0),
        HEAD_DIM=head_dim, SIZE=triton.next_power_of_2(count), num_warps=8,
    )  # fmt: skip
    return mean_key, v_scale


def launch_rms_norm_rope_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float,
    mean_key: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q8, q_scale, k8, v8 and v_scale of `rms_norm_rope_fp8`, by four kernels, or two with given statistics."""
    tokens, heads, head_dim = q.shape
    if mean_key is None or v_scale is None:
        mean_key, v_scale = launch_kv_statistics(k, v, k_weight, rope, eps, _sample_stride(tokens))
    q_scale = q.new_empty(tokens, heads, dtype=torch.float32)
    q8, k8 = _launch(q, k, q_weight, k_weight, rope, eps, (q_scale, k_scale, mean_key))
    padded_tokens = -(-tokens // 16) * 16
    v8 = v.new_empty(heads, head_dim, padded_tokens, dtype=q8.dtype)
    transpose_values[(triton.cdiv(padded_tokens, TRANSPOSE_BLOCK), heads)](
        v, v8, v_scale, tokens, padded_tokens, v.stride(0), HEAD_DIM=head_dim, BLOCK=TRANSPOSE_BLOCK, num_warps=4
    )
    return q8, q_scale, k8, v8, v_scale


# --- Operation ------------------------------------------------------------------------------------------------------


def _rms_norm_rope_fp8_cpu(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float,
    mean_key: Tensor | None, v_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q8, q_scale, k8, v8, used = reference_fp8(q, k, v, q_weight, k_weight, k_scale, rope, eps, mean_key, v_scale)
    return q8, q_scale, k8, v8, used.clone() if used is v_scale else used  # results must not alias arguments


def _rms_norm_rope_fp8_fake(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, k_scale: Tensor, rope: Tensor, eps: float,
    mean_key: Tensor | None, v_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, heads, head_dim = q.shape
    return (
        q.new_empty(q.shape, dtype=FP8), q.new_empty(tokens, heads, dtype=torch.float32),
        k.new_empty(k.shape, dtype=FP8), v.new_empty(heads, head_dim, (tokens + 15) // 16 * 16, dtype=FP8),
        v.new_empty(heads, head_dim, dtype=torch.float32),
    )  # fmt: skip


def _kv_statistics_cpu(k: Tensor, v: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference_statistics(k, v, k_weight, rope, eps)


rms_norm_rope_op = define_op("rms_norm_rope", cpu=reference, cuda=launch_rms_norm_rope)
rms_norm_rope_fp8_op = define_op(
    "rms_norm_rope_fp8", cpu=_rms_norm_rope_fp8_cpu, cuda=launch_rms_norm_rope_fp8, fake=_rms_norm_rope_fp8_fake
)
kv_statistics_op = define_op("kv_statistics", cpu=_kv_statistics_cpu, cuda=launch_kv_statistics)


def rms_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k over all heads of a token, then rotary embedding.

    x_norm = x / sqrt(mean(x^2) + eps) * weight, with the mean over a token's heads * head_dim values; then every
    adjacent pair of channels (a, b) becomes (a cos - b sin, a sin + b cos). Computed in float32, rounded once.

    Args:
        q: [tokens, heads, head_dim], float32, float16 or bfloat16, head_dim even. The heads of a token are adjacent in
            memory; tokens may be any stride apart, as in a slice of a fused projection.
        k: like q, with a stride of its own.
        q_weight: [heads * head_dim], contiguous.
        k_weight: [heads * head_dim], contiguous.
        rope: float32 [tokens, head_dim / 2, 2], the cosine and sine of each token's angles, contiguous.
        eps: added to the mean square.

    Returns:
        q and k, [tokens, heads, head_dim] each, contiguous, in q's dtype.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_tokens({"q_weight": q_weight, "k_weight": k_weight}, rope, q=q, k=k)
    return rms_norm_rope_op(q, k, q_weight, k_weight, rope, eps)


def rms_norm_rope_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    k_scale: Tensor,
    rope: Tensor,
    eps: float = 1e-6,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm and rotary embedding of q and k, with q, k and v quantised to e4m3 for FP8 attention.

    x_norm = x / sqrt(mean(x^2) + eps) * weight, with the mean over a token's heads * head_dim values; then every
    adjacent pair of channels (a, b) becomes (a cos - b sin, a sin + b cos). With q and k so normalised and rotated:

        q8 = q / q_scale           q_scale = max |q| / 448 of each token and head
        k8 = (k - c) / k_scale     c is about the mean key of each head, taken over at most 128 tokens; subtracting it
                                   changes no attention weight and saves precision
        v8 = v / v_scale           v_scale = 8 * max |v| / 448 of each head and channel, over the same tokens; values
                                   beyond 448 saturate

    Args:
        q: [tokens, heads, head_dim], float32, float16 or bfloat16, head_dim even. The heads of a token are adjacent in
            memory; tokens may be any stride apart, as in a slice of a fused projection.
        k: like q, with a stride of its own.
        v: like q, with a stride of its own.
        q_weight: [heads * head_dim], contiguous.
        k_weight: [heads * head_dim], contiguous.
        k_scale: float32 [heads], made once by `key_scale(k_weight, heads)`.
        rope: float32 [tokens, head_dim / 2, 2], the cosine and sine of each token's angles, contiguous.
        eps: added to the mean square.
        statistics: c [heads, head_dim] in k's dtype and v_scale, float32 [heads, head_dim], from `kv_statistics`; None
            takes them of these tokens.

    Returns:
        The first arguments of `kernels.chunk_attention_fp8.chunk_attention_fp8`: q8 [tokens, heads, head_dim], q_scale
        [tokens, heads], k8 [tokens, heads, head_dim], k_scale [heads], v8 [heads, head_dim, tokens rounded up to 16],
        v_scale [heads, head_dim]. Operands are float8_e4m3fn, scales float32, all contiguous. The tokens of v8 are in
        the order of `kernels.chunk_attention_fp8.interleave`; its padding is zeros.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_tokens({"q_weight": q_weight, "k_weight": k_weight}, rope, q=q, k=k, v=v)
    check("k_scale", k_scale, shape=q.shape[1:2], dtype=torch.float32, device=q.device, layout="contiguous")
    mean_key, v_scale = statistics or (None, None)
    for name, x, dtype in (("mean_key", mean_key, k.dtype), ("v_scale", v_scale, torch.float32)):
        if x is not None:
            check(name, x, shape=q.shape[1:], dtype=dtype, device=q.device, layout="contiguous")
    q8, q_scale, k8, v8, v_scale = rms_norm_rope_fp8_op(
        q, k, v, q_weight, k_weight, k_scale, rope, eps, mean_key, v_scale
    )
    return q8, q_scale, k8, k_scale, v8, v_scale


def kv_statistics(k: Tensor, v: Tensor, k_weight: Tensor, rope: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What `rms_norm_rope_fp8` takes from a sample of the tokens: the mean key c and the scale of the values.

        c = mean over the tokens of the normalised, rotated keys        v_scale = 8 * max over the tokens |v| / 448

    `rms_norm_rope_fp8` takes the tokens `sample_tokens(n)` of n, in this order. A rank that has only some of the n
    gathers these and gives the result to `rms_norm_rope_fp8`: its operands are then those of one rank, bit for bit.

    Args:
        k: [tokens, heads, head_dim] of at most 128 tokens, float32, float16 or bfloat16, head_dim even.
        v: like k.
        k_weight: [heads * head_dim], the weight of the keys' norm, contiguous.
        rope: float32 [tokens, head_dim / 2, 2], the cosine and sine of each token's angles, contiguous.
        eps: added to the mean square.

    Returns:
        c [heads, head_dim] in k's dtype, and v_scale, float32 [heads, head_dim].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_tokens({"k_weight": k_weight}, rope, k=k, v=v)
    if len(k) > NUM_SAMPLES:
        raise ValueError(f"k: {len(k)} tokens, wanted at most {NUM_SAMPLES}")
    return kv_statistics_op(k, v, k_weight, rope, eps)


def _check_tokens(weights: dict[str, Tensor], rope: Tensor, **inputs: Tensor) -> None:
    """Raises ValueError unless the inputs, by name, are alike and weights and rope fit them."""
    name, x = next(iter(inputs.items()))
    check(name, x, shape=("tokens", "heads", "head_dim"), dtype=DTYPE_NAMES, layout="tokens")
    tokens, heads, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"{name}: head_dim {head_dim}, wanted an even number")
    for other, y in inputs.items():
        check(other, y, shape=x.shape, dtype=x.dtype, device=x.device, layout="tokens")
    for weight_name, weight in weights.items():
        check(weight_name, weight, shape=(heads * head_dim,), device=x.device, layout="contiguous")
    check("rope", rope, shape=(tokens, head_dim // 2, 2), dtype=torch.float32, device=x.device, layout="contiguous")
