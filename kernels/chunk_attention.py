"""Chunk-bidirectional attention: every query sees all keys of its chunk, and those of some chunks before it.

    o[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]          j over the keys that query i may see
    lse[i] = log sum_j exp(scale q[i] . k[j])               what merges parts: `merge_attention`

Without `chunks` every query sees every key. With `chunks`, lengths that add up to the tokens, a query sees its own
chunk in both directions, the `past` chunks before it ("all": every one before it), and never a later one: a video
grows chunk by chunk, and nothing that is made already changes.

`[tokens, heads, channels]`, or with a batch in front; any strides but along the channels. `scale` is channels^-1/2
unless given; lse is natural, float32 [tokens, heads].

`chunk_attention_fp8` takes e4m3 operands as `kernels.norm.rms_norm_rope_fp8` writes them:

    q ~ q8 q_scale          [tokens, heads, channels], scale [tokens, heads]
    k ~ k8 k_scale + c      [tokens, heads, channels], scale [heads]; any c [heads, channels] that is the same for all
                            keys adds the same to all logits of a query: softmax takes it out again
    v ~ v8 v_scale          [heads, channels, tokens], scale [heads, channels]; tokens padded with zeros to 16, and in
                            groups of 16 in the order of `interleave`

Operands of the tensor cores' FP8 product come with their summed axis contiguous, so v is transposed; and a thread that
has just computed the scores of keys 2c, 2c + 1, 8 + 2c, 9 + 2c (c = 0 .. 3) of 16 has to hand in keys 4c .. 4c + 3: v
in that order spares shuffling the weights. The weights are rounded to e4m3 as 2^8 exp(s - max), whose sum is taken
before rounding; their products are accumulated in float32.

Forms: `reference` is the definition; on CPUs PyTorch's attention, chunk by chunk; on GPUs the Triton kernel below, and
on Hopper the one of kernels/chunk_attention_sm90.py, whichever kernels/tuned/ names for the shape; beyond 128 channels
PyTorch's, until the kernel below is measured to be faster.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunk_attention_sm90 import launch_sm90, supports
from kernels.scheduler import KVRanges, kv_ranges, query_tiles_on
from kernels.sm90 import FP8
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, tuned_config

LOG2_E = math.log2(math.e)

# Of the Triton kernel, where nothing was tuned. Float32 products run out of registers in large tiles.
DEFAULT: Mapping[torch.dtype, LaunchConfig] = {
    torch.float32: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    torch.float16: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    torch.bfloat16: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    FP8: {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
}


WIDE = 128  # channels from which on tiles are smaller
BESIDE: LaunchConfig = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


# --- Definition -----------------------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, v: Tensor, seen: KVRanges | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o and lse by the definition, in q's precision; `seen`: which queries see which keys, all if None.

    q [queries, head, d], k and v [keys, head, d] -> [queries, head, d], [queries, head].
    """
    factor = q.shape[2] ** -0.5 if scale is None else scale
    outputs, sums = [], []
    for start, end, first, last in seen or kv_ranges(len(q), len(k)):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[first:last]) * factor
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first:last]))
        sums.append(scores.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(sums)


def interleave(tokens: int) -> np.ndarray:
    """Which token lies at each of the places of an FP8 v: its bits 3, (2, 1), 0 are the place's bits 1, (3, 2), 0."""
    place = np.arange(-(-tokens // 16) * 16)
    return place & ~15 | (place & 2) << 2 | (place & 12) >> 1 | place & 1


def dequantize(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of `chunk_attention_fp8` multiplied out, each [tokens, head, d] in `dtype`."""
    places = torch.from_numpy(interleave(v.shape[-1])).argsort()[: len(k)].to(v.device)
    values = v.to(dtype)[..., places] * v_scale.to(dtype)[..., None]
    return q.to(dtype) * q_scale.to(dtype)[..., None], k.to(dtype) * k_scale.to(dtype)[:, None], values.permute(2, 0, 1)


def merge_attention(outputs: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention to all keys, from that to parts of them: o [tokens, head, d] and lse [tokens, head] of each part.

        lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

    In float32, o rounded once to the parts' dtype. Source: the log-sum-exp merge of ring attention.
    """
    total = torch.stack(tuple(sums)).logsumexp(0)
    weighted = [o.float() * (lse - total).exp()[..., None] for o, lse in zip(outputs, sums, strict=True)]
    return torch.stack(weighted).sum(0).to(outputs[0].dtype), total


# --- Triton kernel --------------------------------------------------------------------------------------------------


@triton.jit
def attention_step(acc, more, top, total, q, q_more, factor, k, v, k_row, v_row, start, first, last,
                   SCALED: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, MORE: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """BLOCK_N keys from `start` on. acc, more, top and total are the products, maximum and sum of the keys before."""
    keys = start + tl.arange(0, BLOCK_N)
    wide = keys.to(tl.int64)
    channels = tl.arange(0, D)
    inside = (keys >= first) & (keys < last)
    places = k + wide[None, :] * k_row + channels[:, None]
    k_tile = tl.load(places, mask=inside[None, :], other=0.0) if MASKED else tl.load(places)  # [D, BLOCK_N]
    scores = tl.dot(q, k_tile, input_precision="ieee")
    if MORE:
        places = k + wide[None, :] * k_row + (D + tl.arange(0, MORE))[:, None]
        k_more = tl.load(places, mask=inside[None, :], other=0.0) if MASKED else tl.load(places)
        scores = tl.dot(q_more, k_more, scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    shift = 8.0 if SCALED else 0.0  # the weights are rounded as 2^8 p: e4m3 reaches 448
    new = tl.maximum(top, tl.max(scores, 1) * factor - shift)
    p = tl.exp2(scores * factor[:, None] - new[:, None])  # one fused multiply-add
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    if SCALED:  # v is transposed, and its keys in the order of `interleave`
        p = tl.reshape(
            tl.permute(tl.reshape(p, [BLOCK_M, BLOCK_N // 16, 2, 4, 2]), (0, 1, 3, 2, 4)), [BLOCK_M, BLOCK_N]
        )
        places = v + wide[:, None] + channels[None, :] * v_row
        held = keys < (last + 15) // 16 * 16
    else:
        places = v + wide[:, None] * v_row + channels[None, :]
        held = inside
    v_tile = tl.load(places, mask=held[:, None], other=0.0) if MASKED else tl.load(places)  # [BLOCK_N, D]
    p = p.to(v_tile.dtype)
    acc = acc * fade[:, None] + tl.dot(p, v_tile, input_precision="ieee")
    if MORE:
        places = v + wide[:, None] * v_row + (D + tl.arange(0, MORE))[None, :]
        v_more = tl.load(places, mask=held[:, None], other=0.0) if MASKED else tl.load(places)
        more = more * fade[:, None] + tl.dot(p, v_more, input_precision="ieee")
    return acc, more, new, total


@triton.jit(do_not_specialize=["heads", "queries"])
def attention_forward(q, k, v, o, lse, tiles, q_scale, k_scale, v_scale, scale, heads, queries,
                      q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head,
                      SCALED: tl.constexpr, D: tl.constexpr, MORE: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of queries of one head: it walks over its keys and keeps the running maximum and sum of each row.

    There are D + MORE channels, each a power of two or no more.
    """
    tile = tiles + 4 * tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row, end, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    channels = tl.arange(0, D)
    valid = rows < end
    statistics = (batch * queries + rows) * heads + head  # of [batch, query, head]
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    places = q + rows[:, None] * q_row
    q_tile = tl.load(places + channels[None, :], mask=valid[:, None], other=0.0)
    q_more = q_tile
    if MORE:
        q_more = tl.load(places + (D + tl.arange(0, MORE))[None, :], mask=valid[:, None], other=0.0)
    if SCALED:
        k_factor = tl.load(k_scale + batch * heads + head) * scale
        factor = tl.load(q_scale + statistics, mask=valid, other=0.0) * k_factor
    else:
        factor = tl.zeros([BLOCK_M], tl.float32) + scale
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    more = tl.zeros([BLOCK_M, MORE if MORE else 16], tl.float32)
    start = first
    if SCALED:  # whole groups of 16 keys
        start = first // 16 * 16
        if start < first:
            acc, more, top, total = attention_step(acc, more, top, total, q_tile, q_more, factor, k, v, k_row, v_row,
                                                   start, first, last, SCALED, True, D, MORE, BLOCK_M,
                                                   BLOCK_N)  # fmt: skip
            start += BLOCK_N
    whole = start + tl.maximum(last - start, 0) // BLOCK_N * BLOCK_N
    for key in tl.range(start, whole, BLOCK_N):
        acc, more, top, total = attention_step(acc, more, top, total, q_tile, q_more, factor, k, v, k_row, v_row,
                                               key, first, last, SCALED, False, D, MORE, BLOCK_M,
                                               BLOCK_N)  # fmt: skip
    if whole < last:
        acc, more, top, total = attention_step(acc, more, top, total, q_tile, q_more, factor, k, v, k_row, v_row,
                                               whole, first, last, SCALED, True, D, MORE, BLOCK_M,
                                               BLOCK_N)  # fmt: skip
    acc *= (1.0 / total)[:, None]
    if SCALED:
        acc *= tl.load(v_scale + (batch * heads + head) * D + channels)[None, :]
    places = o + batch * o_batch + head * o_head + rows[:, None] * o_row
    tl.store(places + channels[None, :], acc.to(o.dtype.element_ty), mask=valid[:, None])
    if MORE:
        more *= (1.0 / total)[:, None]
        tl.store(places + (D + tl.arange(0, MORE))[None, :], more.to(o.dtype.element_ty), mask=valid[:, None])
    tl.store(lse + statistics, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)


def parts_of(channels: int) -> tuple[int, int] | None:
    """Channels as a power of two and a smaller one or 0, none below what a product takes; None if they are no such."""
    first = 1 << channels.bit_length() - 1
    rest = channels - first
    return (first, rest) if first >= 16 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0)) else None


Scales = tuple[Tensor, Tensor, Tensor]


def launch_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Scales | None,
    seen: KVRanges,
    scale: float,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """o in `dtype` and lse of [batch, token, head, d] operands, FP8 v [batch, head, d, token] and its `scales`."""
    batch, queries, heads, d = q.shape
    parts = parts_of(d)
    assert parts is not None
    own = DEFAULT[q.dtype] if d <= WIDE else BESIDE
    parameters: dict[str, Any] = {
        "SCALED": scales is not None, "D": parts[0], "MORE": parts[1], **own, **(config or {})
    }  # fmt: skip
    table = query_tiles_on(q.device, type(q), seen, parameters["BLOCK_M"])
    o = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    v_strides = (v.stride(0), v.stride(2), v.stride(1)) if scales else v.stride()[:3]
    attention_forward[(len(table), batch * heads)](
        q, k, v, o, lse, table, *(scales or (lse, lse, lse)), scale * LOG2_E, heads, queries,
        *q.stride()[:3], *k.stride()[:3], *v_strides, *o.stride()[:3], **parameters,
    )  # fmt: skip
    return o, lse


# --- Operation ------------------------------------------------------------------------------------------------------


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Scales | None,
    seen: KVRanges,
    scale: float,
    dtype: torch.dtype,
    choice: TunedConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """By the form that kernels/tuned/ names for the shape, or `choice`; else by the one made for the GPU."""
    choice = choice or _tuned(q, k, "fp8" if scales else DTYPE_NAMES[q.dtype])
    hopper = gpu_of(q.device).capability == "9.0" and supports(q, k, v, seen)
    wanted = choice.backend if choice is not None and choice.backend in BACKENDS else "gluon"
    form = BACKENDS[wanted if hopper else "triton"]
    parameters = choice.config if choice is not None and BACKENDS.get(choice.backend) is form else None
    return form(q, k, v, scales, seen, scale, dtype, parameters)


def _tuned(q: Tensor, k: Tensor, dtype: str) -> TunedConfig | None:
    """What kernels/tuned/ names for these tokens and heads, and as many channels."""
    dims = {"queries": q.shape[1], "keys": k.shape[1], "heads": q.shape[2], "head_dim": q.shape[3]}
    return tuned_config("chunk_attention", dims, dtype, q.device, match_exactly=("head_dim",))


BACKENDS = {"gluon": launch_sm90, "triton": launch_triton}
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@torch.library.custom_op("flashtalk::chunk_attention", mutates_args=(), device_types="cpu")
def _chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """[batch, token, head, d] -> o, lse (empty unless `with_sums`)."""
    seen = kv_ranges(q.shape[1], k.shape[1], chunks and tuple(chunks), past)
    if with_sums:
        wide = (x.float() for x in (q, k, v))
        outputs = [reference(a, b, c, seen, scale) for a, b, c in zip(*wide, strict=True)]
        return torch.stack([o for o, _ in outputs]).to(q.dtype), torch.stack([lse for _, lse in outputs])
    return library(q, k, v, seen, scale), q.new_empty(0, dtype=torch.float32)


def library(q: Tensor, k: Tensor, v: Tensor, seen: KVRanges, scale: float) -> Tensor:
    """o [batch, token, head, d] by PyTorch, part by part."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads in front
    parts = [
        F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], scale=scale) for a, b, c, d in seen
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


@_chunk_attention.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float, with_sums: bool
) -> tuple[Tensor, Tensor]:
    seen = kv_ranges(q.shape[1], k.shape[1], chunks and tuple(chunks), past)
    if not with_sums and not _ours(q, k):
        return library(q, k, v, seen, scale), q.new_empty(0, dtype=torch.float32)
    o, lse = launch(q, k, v, None, seen, scale, q.dtype)
    return o, lse if with_sums else lse.new_empty(0)


def _ours(q: Tensor, k: Tensor) -> bool:
    """Whether our kernels take so many channels, and where these are many, were measured to be the fastest."""
    if parts_of(q.shape[3]) is None or q.shape[3] <= WIDE:
        return parts_of(q.shape[3]) is not None
    choice = _tuned(q, k, DTYPE_NAMES[q.dtype])
    return choice is not None and choice.backend in BACKENDS


@_chunk_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float, with_sums: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if with_sums else 0, dtype=torch.float32)


Past = int | Literal["all"] | None


@overload
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[int] | None = ..., past: Past = ..., scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[int] | None = ..., past: Past = ..., scale: float | None = ...,
    *, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[int] | None = ..., past: Past = ..., scale: float | None = ...,
    return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[int] | None = None,
    past: Past = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside chunks, and to the `past` chunks before; see the module's first lines.

    Args:
        q: [queries, heads, channels] or [batch, queries, heads, channels], contiguous along the channels; float32,
            float16, bfloat16, on a CPU also float64.
        k: like q, its tokens are keys.
        v: like k.
        chunks: lengths >= 1 that add up to the tokens of q and of k; None is one chunk, then q and k may differ.
        past: how many chunks before its own a query sees; None is 0, "all" every one.
        scale: of the logits; channels^-1/2 by default.
        return_lse: return lse as well.

    Returns:
        o like q, contiguous; with return_lse also lse, float32 [(batch,) queries, heads].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    if q.ndim not in (3, 4):
        raise ValueError(f"q: shape {list(q.shape)}, wanted [queries, heads, channels], or with a batch in front")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check(name, x, q, q.dtype)
    if q.dtype not in DTYPE_NAMES and (q.is_cuda or q.dtype != torch.float64):
        raise ValueError(f"q: {q.dtype}, wanted float32, float16 or bfloat16; chunk_attention_fp8 takes e4m3")
    if q.is_cuda and return_lse and parts_of(q.shape[-1]) is None:
        raise ValueError(f"q: {q.shape[-1]} channels, wanted a power of two or two of them, each 16 or more, for lse")
    _check_shape("k", k, (*q.shape[:-3], k.shape[-3] if k.ndim == q.ndim else q.shape[-3], *q.shape[-2:]))
    _check_shape("v", v, k.shape)
    lengths, seen = _chunks(q.shape[-3], k.shape[-3], chunks, past)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.ndim == 4:
        o, lse = _chunk_attention(q, k, v, lengths, seen, factor, return_lse)
    else:
        o, lse = _chunk_attention(q[None], k[None], v[None], lengths, seen, factor, return_lse)
        o, lse = o[0], lse[0] if return_lse else lse
    return (o, lse) if return_lse else o


@torch.library.custom_op("flashtalk::chunk_attention_fp8", mutates_args=(), device_types="cpu")
def _chunk_attention_fp8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, chunks: list[int] | None,
    past: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """No batch -> o, lse."""
    seen = kv_ranges(len(q), len(k), chunks and tuple(chunks), past)
    o, lse = reference(*dequantize(q, q_scale, k, k_scale, v, v_scale, torch.float32), seen, scale)
    return o.to(dtype), lse


@_chunk_attention_fp8.register_kernel("cuda")
def _(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, chunks: list[int] | None,
    past: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    seen = kv_ranges(len(q), len(k), chunks and tuple(chunks), past)
    o, lse = launch(q[None], k[None], v[None], (q_scale, k_scale, v_scale), seen, scale, dtype)
    return o[0], lse[0]


@_chunk_attention_fp8.register_fake
def _(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, chunks: list[int] | None,
    past: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:2], dtype=torch.float32)


@overload
def chunk_attention_fp8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor,
    chunks: Sequence[int] | None = ..., past: Past = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
    dtype: torch.dtype = ...,
) -> Tensor: ...  # fmt: skip
@overload
def chunk_attention_fp8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor,
    chunks: Sequence[int] | None = ..., past: Past = ..., scale: float | None = ..., *, return_lse: Literal[True],
    dtype: torch.dtype = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def chunk_attention_fp8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    chunks: Sequence[int] | None = None,
    past: Past = None,
    scale: float | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor | tuple[Tensor, Tensor]:
    """`chunk_attention` of e4m3 operands with scales, as the module's first lines describe them; no batch.

    Args:
        q: e4m3 [queries, heads, channels], 64 or 128 channels, contiguous along them.
        q_scale: float32 [queries, heads], contiguous.
        k: e4m3 [keys, heads, channels].
        k_scale: float32 [heads].
        v: e4m3 [heads, channels, keys rounded up to 16], contiguous, keys in the order of `interleave`.
        v_scale: float32 [heads, channels].
        chunks: as in `chunk_attention`.
        past: as in `chunk_attention`.
        scale: as in `chunk_attention`.
        return_lse: return lse as well: that of the smoothed keys, which the mean taken off them shifts.
        dtype: of o.

    Returns:
        o [queries, heads, channels] in `dtype`; with return_lse also lse, float32 [queries, heads].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    for name, x, wanted in (("q", q, FP8), ("k", k, FP8), ("v", v, FP8), ("q_scale", q_scale, torch.float32),
                            ("k_scale", k_scale, torch.float32), ("v_scale", v_scale, torch.float32)):  # fmt: skip
        _check(name, x, q, wanted)
    if q.ndim != 3:
        raise ValueError(f"q: shape {list(q.shape)}, wanted [queries, heads, channels]")
    queries, heads, channels = q.shape
    _check_shape("k", k, (k.shape[0], heads, channels))
    _check_shape("v", v, (heads, channels, -(-k.shape[0] // 16) * 16))
    for name, x, shape in (("q_scale", q_scale, (queries, heads)), ("k_scale", k_scale, (heads,)),
                           ("v_scale", v_scale, (heads, channels)), ("v", v, v.shape)):  # fmt: skip
        _check_shape(name, x, shape)
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()} for shape {list(x.shape)}, wanted contiguous")
    lengths, seen = _chunks(queries, k.shape[0], chunks, past)
    scale = channels**-0.5 if scale is None else float(scale)
    o, lse = _chunk_attention_fp8(q, q_scale, k, k_scale, v, v_scale, lengths, seen, scale, dtype)
    return (o, lse) if return_lse else o


def _check(name: str, x: Tensor, q: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless x can go along with q."""
    if x.dtype != dtype:
        raise ValueError(f"{name}: {x.dtype}, wanted {dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}, wanted {q.device}, where q is")
    if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: stride {x.stride(-1)} along the last axis, wanted 1")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")


def _check_shape(name: str, x: Tensor, wanted: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(wanted):
        raise ValueError(f"{name}: shape {list(x.shape)}, wanted {list(wanted)}")


def _chunks(queries: int, keys: int, chunks: Sequence[int] | None, past: Past) -> tuple[list[int] | None, int]:
    """Chunks and past as the operations have them; raises ValueError for those that make no sense."""
    if queries < 1 or keys < 1:
        raise ValueError(f"{'q' if queries < 1 else 'k'}: no tokens, wanted at least 1")
    seen = -1 if past == "all" else 0 if past is None else past
    if not isinstance(seen, int) or (seen < 0 and past != "all"):
        raise ValueError(f'past: {past!r}, wanted a number of chunks >= 0, or "all"')
    if chunks is None:
        if seen:
            raise ValueError(f"past: {past!r} without chunks")
        return None, 0
    lengths = [int(n) for n in chunks]
    if any(n < 1 for n in lengths):
        raise ValueError(f"chunks: {lengths}, wanted lengths >= 1")
    if (sum(lengths), sum(lengths)) != (queries, keys):
        raise ValueError(f"chunks: {sum(lengths)} tokens in all, wanted those of q and k, {queries} and {keys}")
    return lengths, seen
