"""Attention to few keys: of every token to text and image, and of a latent frame's tokens to its audio.

    text_image_attention    o = softmax(q text_k^T / sqrt(d)) text_v + softmax(q image_k^T / sqrt(d)) image_v
    frame_attention         o[i] = softmax(q[i] k[f]^T / sqrt(d)) v[f]        f the latent frame of token i
    absorbed_audio_attention        the audio layer as a whole, from the projection before it to the one after it,
                            but for the latter's bias:
                            softmax(z G[f]^T + g[f]) U[f]                     the softmax over the keys of each head

`[tokens, heads, channels]`, two softmaxes in the first one, not one over both. All text keys count, padding too: the
model was trained so. The padding's keys are all the same one, so that n of them are one whose weight is n times as
large: `real` says how many come before, on the device, so that another prompt is the same program.

Folding: with one speaker there is neither norm nor rotation between the audio layer's projections and its attention.
logits = (z Wq^T + bq) k^T / sqrt(d) = z (k Wq / sqrt(d))^T + k bq / sqrt(d) = z G^T + g, and P v Wp^T = P U with
U = v Wp^T: per frame and head 32 keys instead of 128 channels, 3/4 fewer operations. `absorb_audio_projections` makes G, g and U from
a chunk's keys and values, each time anew: all layers' would be 9 GB.

Source: SoulX-FlashTalk's WanI2VCrossAttention and SingleStreamAttention.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.chunk_attention import DEFAULT_CONFIGS as ATTENTION
from kernels.chunk_attention import DTYPE_NAMES, FP8, LOG2_E, launch_triton
from kernels.chunk_attention import reference as attention
from kernels.scheduler import KVRanges, query_tiles_on
from kernels.tuning import LaunchConfig, tuned_config

# Where nothing was tuned.
TEXT_IMAGE: dict[torch.dtype, LaunchConfig] = {
    torch.float32: {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_T": 32, "num_warps": 4, "num_stages": 1},
    torch.float16: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_T": 32, "num_warps": 8, "num_stages": 2},
    torch.bfloat16: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_T": 32, "num_warps": 8, "num_stages": 2},
}
FRAME: LaunchConfig = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}
FOLD: LaunchConfig = {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
FOLDED: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


# --- Definition -----------------------------------------------------------------------------------------------------


def text_image_reference(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, real: Tensor | None = None
) -> Tensor:
    """Arguments as in `text_image_attention`; `real` says what is equal, and changes nothing."""
    return attention(q, text_k, text_v)[0] + attention(q, image_k, image_v)[0]


def frame_reference(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int = 0) -> Tensor:
    """Arguments as in `frame_attention`."""
    seen = frame_kv_ranges(len(q), k.shape[1], per_frame, first)
    return attention(q, k.flatten(0, 1), v.flatten(0, 1), seen)[0]


def frame_kv_ranges(tokens: int, keys: int, per_frame: int, first: int) -> KVRanges:
    """Which tokens see which of all frames' keys, for tokens from `first` on in frames of `per_frame`."""
    return tuple(
        (
            max(0, frame * per_frame - first),
            min(tokens, (frame + 1) * per_frame - first),
            frame * keys,
            (frame + 1) * keys,
        )
        for frame in range(first // per_frame, (first + tokens - 1) // per_frame + 1)
    )


def absorb_reference(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    weight: Tensor,
    q_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """G, g, U; arguments as in `absorb_audio_projections`."""
    heads, d = k.shape[2:]
    factor = d**-0.5
    q_weight, weight = (_dequantized(w, s, k.dtype) for w, s in ((q_weight, q_scale), (weight, scale)))
    keys = torch.einsum("fkhd,hdn->fhkn", k, q_weight.unflatten(0, (heads, d))) * factor
    bias = torch.einsum("fkhd,hd->fhk", k, q_bias.unflatten(0, (heads, d))) * factor
    values = torch.einsum("fkhd,nhd->fhkn", v, weight.unflatten(1, (heads, d)))
    return keys.flatten(1, 2), bias.flatten(1, 2), values.flatten(1, 2)


def _dequantized(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return w if scale is None else (w.to(dtype) * scale[:, None]).to(dtype)


def absorbed_reference(
    z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, group: int, per_frame: int, first: int = 0
) -> Tensor:
    """Arguments as in `absorbed_audio_attention`."""
    out = []
    for start, end, column, _ in frame_kv_ranges(len(z), 1, per_frame, first):
        logits = z[start:end] @ keys[column].T + key_bias[column]
        weights = logits.unflatten(1, (-1, group)).softmax(2).flatten(1)
        out.append(weights.to(values.dtype) @ values[column])
    return torch.cat(out)


# --- Triton kernels -------------------------------------------------------------------------------------------------


@triton.jit
def attend_tile(acc, top, total, q, factor, k_rows, v_rows, column, start, count, bonus, WIDTH: tl.constexpr):
    """WIDTH keys from `start` on, of `count` in all; the last one's logit, in powers of 2, is `bonus` larger.

    Boxes of k_rows and v_rows reach beyond the last key: into rows that have no weight, or beyond the end, into zeros.
    """
    keys = start + tl.arange(0, WIDTH)
    bias = tl.where(keys < count, tl.where(keys == count - 1, bonus, 0.0), float("-inf"))
    scores = tl.dot(q, k_rows.load([start, column]).T, input_precision="ieee") * factor + bias[None, :]
    new = tl.maximum(top, tl.max(scores, 1))
    p, fade = tl.exp2(scores - new[:, None]), tl.exp2(top - new)
    v = v_rows.load([start, column])
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, new, total * fade + tl.sum(p, 1)


@triton.jit
def text_image_forward(q, text_k, text_v, image_k, image_v, tail_k, tail_v, real, o, scale, tokens, text, image,
                       q_row, q_head, text_head, image_head, o_row, o_head,
                       COLLAPSED: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """A tile of tokens of one head. COLLAPSED: text keys from the `real`th on are the same.

    Descriptors cut boxes of BLOCK_T text keys, of BLOCK_N image keys, and of TAIL for the image's last ones.
    """
    head = tl.program_id(1)
    wide = head.to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channels, valid = tl.arange(0, D), rows < tokens
    q_tile = tl.load(q + wide * q_head + rows[:, None] * q_row + channels[None, :], mask=valid[:, None], other=0.0)
    count, bonus = text, 0.0
    if COLLAPSED:
        count = tl.minimum(tl.load(real) + 1, text)  # with one key of the padding, for all of them
        bonus = tl.log2((text - count + 1).to(tl.float32))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, count, BLOCK_T):
        acc, top, total = attend_tile(
            acc, top, total, q_tile, scale, text_k, text_v, head * text_head, start, count, bonus, BLOCK_T
        )
    out = (acc * (1.0 / total)[:, None]).to(o.dtype.element_ty)  # half the registers of float32
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    whole = image // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        acc, top, total = attend_tile(
            acc, top, total, q_tile, scale, image_k, image_v, head * image_head, start, image, 0.0, BLOCK_N
        )
    if whole < image:
        acc, top, total = attend_tile(
            acc, top, total, q_tile, scale, tail_k, tail_v, head * image_head, whole, image, 0.0, TAIL
        )
    acc = acc * (1.0 / total)[:, None] + out.to(tl.float32)
    places = o + wide * o_head + rows[:, None] * o_row + channels[None, :]
    tl.store(places, acc.to(o.dtype.element_ty), mask=valid[:, None])


@triton.jit
def fold_forward(x, w, w_scale, out, scale, width, frames, x_frame, x_row, x_head, w_head, w_channel, w_column,
                 SCALED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out[f, head, key, n] = scale sum_c x[f, key, head, c] w[head, c, n]: one head, BLOCK_N columns, all frames.

    SCALED: times w_scale[n]. e4m3 weights become x's dtype, which holds them exactly.
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, channels, valid = tl.arange(0, KEYS), tl.arange(0, D), columns < width
    w_places = w + head.to(tl.int64) * w_head + channels[:, None] * w_channel + columns[None, :].to(tl.int64) * w_column
    w_tile = tl.load(w_places, mask=valid[None, :], other=0.0).to(x.dtype.element_ty)
    for frame in range(frames):
        x_tile = tl.load(x + frame * x_frame + keys[:, None] * x_row + head * x_head + channels[None, :])
        product = tl.dot(x_tile, w_tile, input_precision="ieee") * scale
        if SCALED:
            product *= tl.load(w_scale + columns, mask=valid, other=0.0)[None, :]
        rows = ((frame * heads + head) * KEYS + keys).to(tl.int64)
        places = out + rows[:, None] * width + columns[None, :]
        tl.store(places, product.to(out.dtype.element_ty), mask=valid[None, :])


@triton.jit
def folded_weights(z_rows, key_rows, key_bias, out, tiles, columns, width, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """softmax over groups of GROUP columns of z G^T + g: a tile of tokens of one frame, BLOCK_N columns.

    z_rows and key_rows cut boxes out of z [tokens, width] and G [frames x columns, width]. A box may reach into the
    next frame, or beyond the end, where it is zero; what comes of that is not stored.
    """
    tile = tiles + 4 * tl.program_id(1)
    row, end, frame = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first = tl.program_id(0) * BLOCK_N
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        a, b = z_rows.load([row, k]), key_rows.load([frame * columns + first, k])
        logits = tl.dot(a, b.T, logits, input_precision="ieee")
    rows, column = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    within = column < columns
    logits += tl.load(key_bias + frame * columns + column, mask=within, other=0.0)[None, :]
    grouped = tl.reshape(logits * 1.4426950408889634, [BLOCK_M, BLOCK_N // GROUP, GROUP])
    p = tl.exp2(grouped - tl.max(grouped, 2)[:, :, None])
    p = tl.reshape(p * (1.0 / tl.sum(p, 2))[:, :, None], [BLOCK_M, BLOCK_N])
    places = out + rows[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(places, p.to(out.dtype.element_ty), mask=(rows < end)[:, None] & within[None, :])


# --- Launchers ------------------------------------------------------------------------------------------------------


def launch_text_image(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    real: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`text_image_attention` by its kernel."""
    tokens, heads, d = q.shape
    dims = {"queries": tokens, "text": len(text_k), "image": len(image_k), "heads": heads, "head_dim": d}
    dims["dedup_padding"] = int(real is not None)
    parameters = _parameters("text_image_attention", dims, q, TEXT_IMAGE[q.dtype], config)
    o = q.new_empty(q.shape)
    block_t, block_n = parameters["BLOCK_T"], parameters["BLOCK_N"]
    tail = max(16, triton.next_power_of_2(len(image_k) % block_n))
    o = q.new_empty(q.shape)
    text_image_forward[(triton.cdiv(tokens, parameters["BLOCK_M"]), heads)](
        q, *(boxes(x, block_t) for x in (text_k, text_v)), *(boxes(x, block_n) for x in (image_k, image_v)),
        *(boxes(x, tail) for x in (image_k, image_v)), q if real is None else real, o, d**-0.5 * LOG2_E,
        tokens, len(text_k), len(image_k), *q.stride()[:2], text_k.stride(1), image_k.stride(1), *o.stride()[:2],
        COLLAPSED=real is not None, D=d, TAIL=tail, **parameters,
    )  # fmt: skip
    return o


def boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of boxes [rows, d] of x [keys, head, d]; every head is an offset of columns."""
    keys, heads, d = x.shape
    return TensorDescriptor(x, [keys, (heads - 1) * x.stride(1) + d], [x.stride(0), 1], [rows, d])


def launch_frame(
    q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int = 0, config: LaunchConfig | None = None
) -> Tensor:
    """`frame_attention` by the kernel of `chunk_attention`, whose tiles each see one frame's keys."""
    tokens, heads, d = q.shape
    keys = k.shape[1]
    dims = {"queries": tokens, "per_frame": per_frame, "keys": keys, "heads": heads, "head_dim": d}
    default = ATTENTION[q.dtype] if q.dtype == torch.float32 else FRAME
    parameters = _parameters("frame_attention", dims, q, default, config)
    parameters["BLOCK_N"] = min(128, max(16, triton.next_power_of_2(keys)))
    seen = frame_kv_ranges(tokens, keys, per_frame, first)
    rows = (x.flatten(0, 1)[None] for x in (k, v))
    return launch_triton(q[None], *rows, None, seen, d**-0.5, q.dtype, parameters)[0][0]


def launch_absorb(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    weight: Tensor,
    q_scale: Tensor | None = None,
    scale: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`absorb_audio_projections` by its kernel, once for the keys and once for the values.

    The scales of the projection before are those of the channels that are summed over: they go to the keys.
    """
    frames, keys, heads, d = k.shape
    if keys < 16 or keys & (keys - 1):
        raise ValueError(f"k: {keys} keys a frame, wanted a power of two from 16 on")
    dims = {"frames": frames, "keys": keys, "heads": heads, "head_dim": d}
    parameters = _parameters("absorb_audio_projections", dims, k, FOLD, config)
    folded = []
    scaled = k if q_scale is None else (k * q_scale.view(heads, d)).to(k.dtype)
    for x, w, w_scale, width, strides, factor in (
        (scaled, q_weight, None, q_weight.shape[1], (d * q_weight.stride(0), *q_weight.stride()), d**-0.5),
        (v, weight, scale, len(weight), (d * weight.stride(1), *reversed(weight.stride())), 1.0),
    ):
        out = x.new_empty(frames, heads * keys, width)
        fold_forward[(triton.cdiv(width, parameters["BLOCK_N"]), heads)](
            x, w, x if w_scale is None else w_scale, out, factor, width, frames, *x.stride()[:3], *strides,
            SCALED=w_scale is not None, KEYS=keys, D=d, **parameters,
        )  # fmt: skip
        folded.append(out)
    bias = torch.matmul(k.float().transpose(1, 2), q_bias.float().view(heads, d, 1)).flatten(1) * d**-0.5
    return folded[0], bias, folded[1]


def launch_absorbed(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    group: int,
    per_frame: int,
    first: int = 0,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`absorbed_audio_attention`: weights by the kernel, their product with the values by the library."""
    (tokens, width), columns = z.shape, keys.shape[1]
    dims = {"tokens": tokens, "per_frame": per_frame, "columns": columns, "width": width}
    default = FOLDED if z.dtype != torch.float32 else {**FOLDED, "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}
    parameters = _parameters("absorbed_audio_attention", dims, z, default, config)
    seen = frame_kv_ranges(tokens, 1, per_frame, first)
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    z_rows = TensorDescriptor.from_tensor(z, [block_m, block_k])
    key_rows = TensorDescriptor.from_tensor(keys.flatten(0, 1), [block_n, block_k])
    table = query_tiles_on(z.device, type(z), seen, block_m)
    p = z.new_empty(tokens, columns)
    folded_weights[(triton.cdiv(columns, block_n), len(table))](
        z_rows, key_rows, key_bias, p, table, columns, width, GROUP=group, **parameters
    )
    if tokens == len(values) * per_frame:
        return torch.bmm(p.unflatten(0, (-1, per_frame)), values).flatten(0, 1)
    return torch.cat([p[start:end] @ values[frame] for start, end, frame, _ in seen])


def _parameters(
    operation: str, dims: dict[str, int], x: Tensor, default: LaunchConfig, config: LaunchConfig | None
) -> dict[str, Any]:
    """Launch parameters: those given, or tuned ones, or the default."""
    tuned = tuned_config(
        operation,
        dims,
        DTYPE_NAMES[x.dtype],
        x.device,
        ("triton",),
        match_exactly=("head_dim",) if "head_dim" in dims else (),
    )
    return {**default, **(config or (tuned.config if tuned else {}))}


# --- Operations -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::text_image_attention", mutates_args=(), device_types="cpu")
def _text_image_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, real: Tensor | None
) -> Tensor:
    return _library(q, text_k, text_v) + _library(q, image_k, image_v)


@_text_image_attention.register_kernel("cuda")
def _(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, real: Tensor | None) -> Tensor:
    return launch_text_image(q, text_k, text_v, image_k, image_v, real)


@_text_image_attention.register_fake
def _(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, real: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def text_image_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, real: Tensor | None = None
) -> Tensor:
    """Attention to text plus attention to image, each with a softmax of its own; see the module's first lines.

    Args:
        q: [tokens, heads, channels], contiguous along the channels, like all others.
        text_k: [text keys, heads, channels].
        text_v: like text_k.
        image_k: [image keys, heads, channels].
        image_v: like image_k.
        real: int32, one element L on q's device: rows L and on of text_k, and of text_v, are equal. None: none are.

    Returns:
        Like q, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    _check_operands(q, {"text_k": text_k, "text_v": text_v, "image_k": image_k, "image_v": image_v})
    for k, v, name in ((text_k, text_v, "text_v"), (image_k, image_v, "image_v")):
        _check_shape(name, v, k.shape)
        if v.stride(1) != k.stride(1):
            raise ValueError(f"{name}: heads {v.stride(1)} apart, wanted {k.stride(1)}, as the keys' are")
    if real is not None and (real.dtype, real.numel(), real.device) != (torch.int32, 1, q.device):
        raise ValueError(
            f"real: {real.dtype} {list(real.shape)} on {real.device}, wanted one torch.int32 on {q.device}"
        )
    return _text_image_attention(q, text_k, text_v, image_k, image_v, real)


@torch.library.custom_op("flashtalk::frame_attention", mutates_args=(), device_types="cpu")
def _frame_attention(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int) -> Tensor:
    if len(q) == len(k) * per_frame:
        return _whole_frames(q, k, v)
    parts = [
        _library(q[start:end], k[key // k.shape[1]], v[key // k.shape[1]])
        for start, end, key, _ in frame_kv_ranges(len(q), k.shape[1], per_frame, first)
    ]
    return torch.cat(parts)


@_frame_attention.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int) -> Tensor:
    heads, d = q.shape[1:]
    dims = {"queries": len(q), "per_frame": per_frame, "keys": k.shape[1], "heads": heads, "head_dim": d}
    choice = tuned_config("frame_attention", dims, DTYPE_NAMES[q.dtype], q.device)
    if len(q) == len(k) * per_frame and choice is not None and choice.backend.startswith("sdpa"):
        return _whole_frames(q, k, v)
    return launch_frame(q, k, v, per_frame, first)


def _whole_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The library's attention with the frames as its batch."""
    q, k, v = (x.transpose(1, 2) for x in (q.unflatten(0, (len(k), -1)), k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().flatten(0, 1)


@_frame_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int) -> Tensor:
    return q.new_empty(q.shape)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int = 0) -> Tensor:
    """Attention of every token to the keys of its latent frame; see the module's first lines.

    Args:
        q: [tokens, heads, channels]: tokens `first`, `first` + 1, ... of a chunk, contiguous along the channels.
        k: [frames, keys, heads, channels], the frames' keys evenly apart; frame 0 is that of the chunk's token 0.
        v: like k.
        per_frame: tokens of a frame. A range may begin and end inside one: sequence parallelism.
        first: see q.

    Returns:
        Like q, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    if k.ndim != 4:
        raise ValueError(f"k: shape {list(k.shape)}, wanted [frames, keys, heads, channels]")
    _check_shape("v", v, k.shape)
    _check_range(len(q), per_frame, first, len(k), "k")
    for name, x in (("k", k), ("v", v)):
        if len(x) > 1 and x.stride(0) != x.shape[1] * x.stride(1):
            raise ValueError(f"{name}: strides {x.stride()}, wanted frames {x.shape[1] * x.stride(1)} apart")
    _check_operands(q, {"k": k[0], "v": v[0]})
    return _frame_attention(q, k, v, per_frame, first)


@torch.library.custom_op("flashtalk::absorb_audio_projections", mutates_args=(), device_types="cpu")
def _fold_audio(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, q_scale: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys, bias, values = absorb_reference(k, v, q_weight, q_bias, weight, q_scale, scale)
    return keys, bias.float(), values


@_fold_audio.register_kernel("cuda")
def _(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, q_scale: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_absorb(k, v, q_weight, q_bias, weight, q_scale, scale)


@_fold_audio.register_fake
def _(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, q_scale: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    frames, keys, heads, _ = k.shape
    return (
        k.new_empty(frames, heads * keys, q_weight.shape[1]), k.new_empty(frames, heads * keys, dtype=torch.float32),
        v.new_empty(frames, heads * keys, weight.shape[0]),
    )  # fmt: skip


def absorb_audio_projections(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    weight: Tensor,
    q_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """G, g and U of a layer: its projections multiplied into a chunk's keys and values; see the module's first lines.

    Args:
        k: [frames, keys, heads, channels]; on a GPU the number of keys is a power of two from 16 on.
        v: like k.
        q_weight: [heads x channels, width] of the projection before, as nn.Linear has it.
        q_bias: [heads x channels].
        weight: [width out, heads x channels] of the projection after.
        q_scale: with a q_weight of float8_e4m3fn, the scales of its rows, float32 [heads x channels].
        scale: the same of weight, float32 [width out].

    Returns:
        G [frames, heads x keys, width], g float32 [frames, heads x keys], U [frames, heads x keys, width out].

    Raises:
        ValueError: an argument has another shape, dtype or device, or wants a gradient.
    """
    if k.ndim != 4:
        raise ValueError(f"k: shape {list(k.shape)}, wanted [frames, keys, heads, channels]")
    channels = k.shape[2] * k.shape[3]
    for name, x, shape, dtype in (
        ("v", v, k.shape, k.dtype),
        ("q_weight", q_weight, (channels, *q_weight.shape[1:]), k.dtype if q_scale is None else FP8),
        ("q_bias", q_bias, (channels,), k.dtype),
        ("weight", weight, (*weight.shape[:1], channels), k.dtype if scale is None else FP8),
        ("q_scale", q_scale, (channels,), torch.float32),
        ("scale", scale, weight.shape[:1], torch.float32),
    ):
        if x is not None:
            _check_shape(name, x, shape)
            _check_kind(name, x, k, dtype)
    return _fold_audio(k, v, q_weight, q_bias, weight, q_scale, scale)


@torch.library.custom_op("flashtalk::absorbed_audio_attention", mutates_args=(), device_types="cpu")
def _folded_attention(
    z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, group: int, per_frame: int, first: int
) -> Tensor:
    return absorbed_reference(z, keys, key_bias, values, group, per_frame, first).to(z.dtype)


@_folded_attention.register_kernel("cuda")
def _(z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, group: int, per_frame: int, first: int) -> Tensor:
    return launch_absorbed(z, keys, key_bias, values, group, per_frame, first)


@_folded_attention.register_fake
def _(z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, group: int, per_frame: int, first: int) -> Tensor:
    return z.new_empty(z.shape[0], values.shape[2])


def absorbed_audio_attention(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    group: int,
    per_frame: int,
    first: int = 0,
) -> Tensor:
    """The audio layer, but for its last bias, from `absorb_audio_projections`'s products; see the module's first lines.

    Args:
        z: [tokens, width], contiguous: tokens `first`, `first` + 1, ... of a chunk, before the first projection.
        keys: G [frames, heads x group, width], contiguous.
        key_bias: g, float32 [frames, heads x group].
        values: U [frames, heads x group, width out], contiguous.
        group: keys of a frame, over which each head's softmax goes; a power of two.
        per_frame: tokens of a frame.
        first: see z.

    Returns:
        [tokens, width out].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    if z.ndim != 2 or keys.ndim != 3 or keys.shape[1] % group:
        raise ValueError(f"keys: shape {list(keys.shape)}, wanted [frames, a multiple of {group}, width]")
    frames, columns = keys.shape[:2]
    _check_range(len(z), per_frame, first, frames, "keys")
    for name, x, shape in (("keys", keys, (frames, columns, z.shape[1])), ("key_bias", key_bias, (frames, columns)),
                           ("values", values, (frames, columns, *values.shape[2:]))):  # fmt: skip
        _check_shape(name, x, shape)
        if name != "key_bias":
            _check_kind(name, x, z)
    for name, x in (("z", z), ("keys", keys), ("key_bias", key_bias), ("values", values)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()} for shape {list(x.shape)}, wanted contiguous")
    return _folded_attention(z, keys, key_bias, values, group, per_frame, first)


def _library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention of [tokens, head, d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).contiguous()


def _check_operands(q: Tensor, others: dict[str, Tensor]) -> None:
    """Raises ValueError unless keys and values [keys, heads, channels] go along with q."""
    if q.ndim != 3 or not len(q):
        raise ValueError(f"q: shape {list(q.shape)}, wanted [tokens, heads, channels], at least 1 token")
    if q.dtype not in TEXT_IMAGE:
        raise ValueError(f"q: {q.dtype}, wanted float32, float16 or bfloat16")
    for name, x in {"q": q, **others}.items():
        if x.ndim != 3 or not len(x) or x.shape[1:] != q.shape[1:]:
            raise ValueError(f"{name}: shape {list(x.shape)}, wanted [at least 1, {q.shape[1]}, {q.shape[2]}]")
        _check_kind(name, x, q)
        if x.stride(2) != 1:
            raise ValueError(f"{name}: stride {x.stride(2)} along the channels, wanted 1")


def _check_kind(name: str, x: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> None:
    wanted = dtype or like.dtype
    if (x.dtype, x.device) != (wanted, like.device):
        raise ValueError(f"{name}: {x.dtype} on {x.device}, wanted {wanted} on {like.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")


def _check_shape(name: str, x: Tensor, wanted: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(wanted):
        raise ValueError(f"{name}: shape {list(x.shape)}, wanted {list(wanted)}")


def _check_range(tokens: int, per_frame: int, first: int, frames: int, name: str) -> None:
    """Raises ValueError unless the tokens lie in those frames."""
    if per_frame < 1 or first < 0:
        raise ValueError(f"{'per_frame' if per_frame < 1 else 'first'}: {per_frame if per_frame < 1 else first}")
    if first + tokens > frames * per_frame:
        raise ValueError(
            f"{name}: {frames} frames, tokens up to {first + tokens} need {-(-(first + tokens) // per_frame)}"
        )
