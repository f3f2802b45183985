"""Chunk-bidirectional attention of FP8 operands, by the kernels of kernels/chunk_attention.py.

Operands, as `rms_norm_rope_fp8` writes them:

    q ~ q8 q_scale          q8 [tokens, heads, head_dim], q_scale [tokens, heads]
    k ~ k8 k_scale + c      k8 [tokens, heads, head_dim], k_scale [heads]. The offset c [heads, head_dim] is the same
                            for all keys. It adds the same number to all logits of a query, so softmax cancels it.
    v ~ v8 v_scale          v8 [heads, head_dim, tokens], v_scale [heads, head_dim]. The tokens are padded with zeros to
                            a multiple of 16, and each group of 16 is permuted as `interleave` says.

The tensor cores read FP8 operands along the summed axis, so v is transposed. The permutation saves a shuffle: a thread
that has computed the scores of keys 2c, 2c + 1, 8 + 2c, 9 + 2c of 16 (c = 0 .. 3) must supply the weights of keys 4c to
4c + 3 of the next product. The weights are rounded to e4m3 as 2^8 exp(s - max). Their sum is taken before rounding, and
their products are accumulated in float32.

`chunk_attention_fp8_quantized` gives o in e4m3 with a scale for each row, as `linear_fp8` takes it. Its back-ends are
"separate", which is attention and then `quantize_rows`, and "fused", which is the Hopper kernel with a scale that is
known beforehand, where kernels/tuned/ says so.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.chunk_attention import Past, check_chunks, chunk_ranges, dispatch, reference
from kernels.chunk_attention_sm90 import launch_sm90, supports
from kernels.common import FP8, FP8_MAX, check, define_op
from kernels.layer_norm import launch_quantize_rows, quantize_reference, quantize_to_bound
from kernels.tuning import TunedConfig, gpu_of, tuned_config

QUANTIZED_BACKENDS = ("fused", "separate")  # of chunk_attention_fp8_quantized

HEAD_DIMS = (16, 32, 64, 128)  # the Hopper kernel has the last two

# --- Reference ------------------------------------------------------------------------------------------------------


def interleave(tokens: int) -> np.ndarray:
    """The order of the tokens in an FP8 v: place i holds token `interleave(tokens)[i]`, with tokens padded to 16.

    Bits 3, (2, 1), 0 of the token are bits 1, (3, 2), 0 of the place.
    """
    place = np.arange(-(-tokens // 16) * 16)
    return place & ~15 | (place & 2) << 2 | (place & 12) >> 1 | place & 1


def dequantize(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies the operands of `chunk_attention_fp8` by their scales: q, k and v [tokens, heads, head_dim]."""
    places = torch.from_numpy(interleave(v.shape[-1])).argsort()[: len(k)].to(v.device)
    values = v.to(dtype)[..., places] * v_scale.to(dtype)[..., None]
    return q.to(dtype) * q_scale.to(dtype)[..., None], k.to(dtype) * k_scale.to(dtype)[:, None], values.permute(2, 0, 1)


def bounded_reference(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunk_attention_fp8_quantized` as its back-end "fused" rounds its output, in the precision of the scales."""
    o, _ = reference(*dequantize(q, q_scale, k, k_scale, v, v_scale, q_scale.dtype))
    return quantize_to_bound(o, v_scale.amax() * FP8_MAX)


# --- Launcher -------------------------------------------------------------------------------------------------------


def dispatch_quantized(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    tuned: TunedConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`chunk_attention_fp8_quantized` on a GPU: "fused" where measurements or `tuned` say so, else "separate"."""
    queries, heads, head_dim = q.shape
    dims = {"queries": queries, "keys": len(k), "heads": heads, "head_dim": head_dim}
    tuned = tuned or tuned_config(
        "chunk_attention_fp8_quantized", dims, "fp8", q.device, QUANTIZED_BACKENDS, ("head_dim",)
    )
    operands, ranges, scale = (q[None], k[None], v[None]), chunk_ranges(queries, len(k), None, 0), head_dim**-0.5
    scales = q_scale[None], k_scale[None], v_scale[None]
    fused = tuned is not None and tuned.backend == "fused" and gpu_of(q.device).capability == "9.0"
    if tuned is not None and fused and supports(*operands, ranges):
        o, _, o_scale = launch_sm90(*operands, scales, ranges, scale, FP8, tuned.config)
        return o[0], o_scale[0]
    o, _ = dispatch(*operands, scales, ranges, scale, torch.bfloat16)
    o8, o_scale = launch_quantize_rows(o[0].flatten(1))
    return o8.view(q.shape), o_scale


# --- Operation ------------------------------------------------------------------------------------------------------


def _attention_fp8_cpu(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, chunks: list[int] | None,
    past: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = dequantize(q, q_scale, k, k_scale, v, v_scale, torch.float32)
    o, lse = reference(*operands, chunk_ranges(len(q), len(k), chunks, past), scale)
    return o.to(dtype), lse


def _attention_fp8_cuda(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, chunks: list[int] | None,
    past: int, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ranges = chunk_ranges(len(q), len(k), chunks, past)
    o, lse = dispatch(q[None], k[None], v[None], (q_scale, k_scale, v_scale), ranges, scale, dtype)
    return o[0], lse[0]


# The fake is written out because key ranges are computed from numbers, which symbolic shapes are not.
chunk_attention_fp8_with_lse_op = define_op(
    "chunk_attention_fp8_with_lse",
    cpu=_attention_fp8_cpu,
    cuda=_attention_fp8_cuda,
    fake=lambda q, *rest: (q.new_empty(q.shape, dtype=rest[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)),
)


def _attention_fp8_quantized_cpu(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor
) -> tuple[Tensor, Tensor]:
    o, _ = reference(*dequantize(q, q_scale, k, k_scale, v, v_scale, torch.float32))
    o8, o_scale = quantize_reference(o.flatten(1))
    return o8.view(q.shape), o_scale


chunk_attention_fp8_quantized_op = define_op(
    "chunk_attention_fp8_quantized",
    cpu=_attention_fp8_quantized_cpu,
    cuda=dispatch_quantized,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(len(q), dtype=torch.float32)),
)


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
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Attention of each query to its own chunk and to the `past` chunks before it, of e4m3 operands with scales.

    Computes softmax(scale (q q_scale) (k k_scale)^T) (v v_scale). The weights are rounded to e4m3, and products are
    accumulated in float32. `rms_norm_rope_fp8` makes such operands.

    Args:
        q: float8_e4m3fn [queries, heads, head_dim], contiguous along head_dim, which is one of `HEAD_DIMS`.
        q_scale: float32 [queries, heads], contiguous.
        k: float8_e4m3fn [keys, heads, head_dim], contiguous along head_dim. The same vector may have been subtracted
            from all keys: softmax cancels it.
        k_scale: float32 [heads].
        v: float8_e4m3fn [heads, head_dim, keys rounded up to a multiple of 16], contiguous. The keys are padded with
            zeros and permuted: place i holds key `interleave(keys)[i]`.
        v_scale: float32 [heads, head_dim].
        chunks: lengths of at least 1 that add up to the tokens of q and of k. None means that every query attends to
            every key; then q and k may differ in length.
        past: how many chunks before its own a query attends to. None means 0, "all" means every earlier chunk.
        scale: factor of the logits; None means head_dim^-1/2.
        dtype: the dtype of o.

    Returns:
        o [queries, heads, head_dim] in `dtype`, contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    return chunk_attention_fp8_with_lse(q, q_scale, k, k_scale, v, v_scale, chunks, past, scale, dtype)[0]


def chunk_attention_fp8_with_lse(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    chunks: Sequence[int] | None = None,
    past: Past = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Attention of e4m3 operands with scales, within chunks and to the `past` chunks before, with its log-sum-exp.

    Computes o = softmax(s) (v v_scale) and lse = log sum exp(s), where s = scale (q q_scale) (k k_scale)^T. The weights
    are rounded to e4m3, and products are accumulated in float32. If a vector was subtracted from all keys, lse is that
    of the remaining keys. `merge_attention` merges such results for parts of the keys.

    Args:
        q: float8_e4m3fn [queries, heads, head_dim], contiguous along head_dim, which is one of `HEAD_DIMS`.
        q_scale: float32 [queries, heads], contiguous.
        k: float8_e4m3fn [keys, heads, head_dim], contiguous along head_dim.
        k_scale: float32 [heads].
        v: float8_e4m3fn [heads, head_dim, keys rounded up to a multiple of 16], contiguous. The keys are padded with
            zeros and permuted: place i holds key `interleave(keys)[i]`.
        v_scale: float32 [heads, head_dim].
        chunks: lengths of at least 1 that add up to the tokens of q and of k. None means that every query attends to
            every key; then q and k may differ in length.
        past: how many chunks before its own a query attends to. None means 0, "all" means every earlier chunk.
        scale: factor of the logits; None means head_dim^-1/2.
        dtype: the dtype of o.

    Returns:
        o [queries, heads, head_dim] in `dtype`, contiguous, and lse, float32 [queries, heads].

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    _check_operands(q, q_scale, k, k_scale, v, v_scale)
    lengths, num_past = check_chunks(len(q), len(k), chunks, past)
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    return chunk_attention_fp8_with_lse_op(q, q_scale, k, k_scale, v, v_scale, lengths, num_past, factor, dtype)


def chunk_attention_fp8_quantized(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key, of e4m3 operands with scales, with an e4m3 result.

    With o = softmax((q q_scale) (k k_scale)^T / sqrt(head_dim)) (v v_scale), the results are o8 = o / o_scale in e4m3
    and o_scale of each query. The scale is max |o| / 448 of a query's heads together, or max v_scale for all queries,
    whichever was measured to be faster; neither lets anything saturate. The weights are rounded to e4m3, and products
    are accumulated in float32. `rms_norm_rope_fp8` makes such operands.

    Args:
        q: float8_e4m3fn [queries, heads, head_dim], contiguous along head_dim, which is 64 or 128.
        q_scale: float32 [queries, heads], contiguous.
        k: float8_e4m3fn [keys, heads, head_dim], contiguous along head_dim. The same vector may have been subtracted
            from all keys: softmax cancels it.
        k_scale: float32 [heads].
        v: float8_e4m3fn [heads, head_dim, keys rounded up to a multiple of 16], contiguous. The keys are padded with
            zeros and permuted: place i holds key `interleave(keys)[i]`.
        v_scale: float32 [heads, head_dim], positive.

    Returns:
        o8, float8_e4m3fn [queries, heads, head_dim], contiguous; o_scale, float32 [queries].

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride, or requires a gradient.
    """
    _check_operands(q, q_scale, k, k_scale, v, v_scale)
    return chunk_attention_fp8_quantized_op(q, q_scale, k, k_scale, v, v_scale)


def _check_operands(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor) -> None:
    check("q", q, shape=("queries", "heads", "head_dim"), dtype=FP8, layout="rows")
    queries, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q: head_dim {head_dim}, wanted {', '.join(map(str, HEAD_DIMS))}")
    check("k", k, shape=("keys", heads, head_dim), dtype=FP8, device=q.device, layout="rows")
    v_shape = heads, head_dim, -(-len(k) // 16) * 16
    check("v", v, shape=v_shape, dtype=FP8, device=q.device, layout="contiguous")
    for name, x, shape in (
        ("q_scale", q_scale, (queries, heads)),
        ("k_scale", k_scale, (heads,)),
        ("v_scale", v_scale, (heads, head_dim)),
    ):
        check(name, x, shape=shape, dtype=torch.float32, device=q.device, layout="contiguous")
