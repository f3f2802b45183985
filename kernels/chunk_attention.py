"""Chunk-bidirectional attention: each query attends to all keys of its own chunk and to those of earlier chunks.

    o[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]          j over the keys that query i attends to
    lse[i] = log sum_j exp(scale q[i] . k[j])               natural logarithm

Without `chunks`, every query attends to every key. With `chunks`, lengths that add up to the number of tokens, a query
attends to its own chunk in both directions and to the `past` chunks before it, never to a later one. Video can then be
generated chunk by chunk, because a new chunk changes nothing in earlier ones.

Public functions: `chunk_attention`, `chunk_attention_with_lse`, and `merge_attention`, which merges the results for
parts of the keys as ring attention does. The model calls them without `chunks` and without lse so far; both are for
causal students and for ring attention. kernels/chunk_attention_fp8.py has the same for FP8 operands, on these kernels.

Back-ends: "gluon" for Hopper (kernels/chunk_attention_sm90.py), "triton" for any GPU (below), "flash-attn" where that
package is installed; kernels/tuned/ selects one for a shape. For head_dim above 128 PyTorch's attention is used unless
the Triton kernel was measured to be faster. CPUs run PyTorch's attention, chunk by chunk.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunk_attention_library import FLASH_ATTN, launch_flash_attn, why_not_flash_attn
from kernels.chunk_attention_sm90 import launch_sm90, supports
from kernels.common import DTYPE_NAMES, FP8, check, define_op
from kernels.scheduler import KVRanges, kv_ranges, query_tiles_on
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, tuned_config, untuned_config

LOG2_E = math.log2(math.e)

# Launch parameters of the Triton kernel where nothing was tuned. In float32, large tiles would run out of registers.
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
FP8_CONFIG: LaunchConfig = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
DEFAULT_CONFIGS: Mapping[torch.dtype, LaunchConfig] = {
    torch.float32: FP32_CONFIG,
    torch.float16: BF16_CONFIG,
    torch.bfloat16: BF16_CONFIG,
    FP8: FP8_CONFIG,
}
LARGE_HEAD_DIM = 128  # a head_dim above this takes LARGE_HEAD_CONFIG
LARGE_HEAD_CONFIG: LaunchConfig = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


# --- Reference ------------------------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, v: Tensor, ranges: KVRanges | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by definition, in q's precision.

    Args:
        q: [queries, heads, head_dim].
        k: [keys, heads, head_dim].
        v: like k.
        ranges: the keys that each group of queries attends to; None means all.
        scale: factor of the logits; None means head_dim^-1/2.

    Returns:
        o [queries, heads, head_dim] and lse [queries, heads].
    """
    factor = q.shape[2] ** -0.5 if scale is None else scale
    outputs, lses = [], []
    for q_start, q_end, kv_start, kv_end in ranges or kv_ranges(len(q), len(k)):
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], k[kv_start:kv_end]) * factor
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[kv_start:kv_end]))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(lses)


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def attention_fwd_inner(acc, acc_tail, m_i, l_i, q, q_tail, qk_scale, k, v, k_row, v_row, start, kv_start, kv_end,
                        SCALED: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D_TAIL: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys from `start` on. If MASKED, some of them are not in the range."""
    offs_n = start + tl.arange(0, BLOCK_N)
    offs_i64 = offs_n.to(tl.int64)
    offs_d = tl.arange(0, D)
    mask_n = (offs_n >= kv_start) & (offs_n < kv_end)
    ptrs = k + offs_i64[None, :] * k_row + offs_d[:, None]
    k_tile = tl.load(ptrs, mask=mask_n[None, :], other=0.0) if MASKED else tl.load(ptrs)  # [D, BLOCK_N]
    scores = tl.dot(q, k_tile, input_precision="ieee")
    if D_TAIL:
        ptrs = k + offs_i64[None, :] * k_row + (D + tl.arange(0, D_TAIL))[:, None]
        k_tail = tl.load(ptrs, mask=mask_n[None, :], other=0.0) if MASKED else tl.load(ptrs)
        scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    shift = 8.0 if SCALED else 0.0  # FP8 weights are rounded as 2^8 p, to use the range of e4m3 up to 448
    m_ij = tl.maximum(m_i, tl.max(scores, 1) * qk_scale - shift)
    p = tl.exp2(scores * qk_scale[:, None] - m_ij[:, None])  # one fused multiply-add
    alpha = tl.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    if SCALED:  # v is transposed, and its keys are in the order of `interleave`
        p = tl.reshape(
            tl.permute(tl.reshape(p, [BLOCK_M, BLOCK_N // 16, 2, 4, 2]), (0, 1, 3, 2, 4)), [BLOCK_M, BLOCK_N]
        )
        ptrs = v + offs_i64[:, None] + offs_d[None, :] * v_row
        mask_v = offs_n < (kv_end + 15) // 16 * 16
    else:
        ptrs = v + offs_i64[:, None] * v_row + offs_d[None, :]
        mask_v = mask_n
    v_tile = tl.load(ptrs, mask=mask_v[:, None], other=0.0) if MASKED else tl.load(ptrs)  # [BLOCK_N, D]
    p = p.to(v_tile.dtype)
    acc = acc * alpha[:, None] + tl.dot(p, v_tile, input_precision="ieee")
    if D_TAIL:
        ptrs = v + offs_i64[:, None] * v_row + (D + tl.arange(0, D_TAIL))[None, :]
        v_tail = tl.load(ptrs, mask=mask_v[:, None], other=0.0) if MASKED else tl.load(ptrs)
        acc_tail = acc_tail * alpha[:, None] + tl.dot(p, v_tail, input_precision="ieee")
    return acc, acc_tail, m_ij, l_i


@triton.jit(do_not_specialize=["heads", "queries"])
def attention_fwd(q, k, v, o, lse, q_tiles, q_scale, k_scale, v_scale, softmax_scale_log2, heads, queries,
                  q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head,
                  SCALED: tl.constexpr, D: tl.constexpr, D_TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """FlashAttention forward for one tile of queries of one head.

    The head_dim is D + D_TAIL, each a power of two, or D_TAIL 0. SCALED: operands have scales, and v is transposed.
    """
    q_tile_ptr = q_tiles + 4 * tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row, row_end = tl.load(q_tile_ptr), tl.load(q_tile_ptr + 1)
    kv_start, kv_end = tl.load(q_tile_ptr + 2), tl.load(q_tile_ptr + 3)
    offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < row_end
    offs_lse = (batch * queries + offs_m) * heads + head  # in [batch, query, head]
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    ptrs = q + offs_m[:, None] * q_row
    q_tile = tl.load(ptrs + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    q_tail = q_tile
    if D_TAIL:
        q_tail = tl.load(ptrs + (D + tl.arange(0, D_TAIL))[None, :], mask=mask_m[:, None], other=0.0)
    if SCALED:
        k_factor = tl.load(k_scale + batch * heads + head) * softmax_scale_log2
        qk_scale = tl.load(q_scale + offs_lse, mask=mask_m, other=0.0) * k_factor
    else:
        qk_scale = tl.zeros([BLOCK_M], tl.float32) + softmax_scale_log2
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    acc_tail = tl.zeros([BLOCK_M, D_TAIL if D_TAIL else 16], tl.float32)
    start = kv_start
    if SCALED:  # v is read in whole groups of 16 keys
        start = kv_start // 16 * 16
        if start < kv_start:
            acc, acc_tail, m_i, l_i = attention_fwd_inner(
                acc, acc_tail, m_i, l_i, q_tile, q_tail, qk_scale, k, v, k_row, v_row, start, kv_start, kv_end,
                SCALED, True, D, D_TAIL, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            start += BLOCK_N
    whole_end = start + tl.maximum(kv_end - start, 0) // BLOCK_N * BLOCK_N
    for key in tl.range(start, whole_end, BLOCK_N):
        acc, acc_tail, m_i, l_i = attention_fwd_inner(
            acc, acc_tail, m_i, l_i, q_tile, q_tail, qk_scale, k, v, k_row, v_row, key, kv_start, kv_end,
            SCALED, False, D, D_TAIL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if whole_end < kv_end:
        acc, acc_tail, m_i, l_i = attention_fwd_inner(
            acc, acc_tail, m_i, l_i, q_tile, q_tail, qk_scale, k, v, k_row, v_row, whole_end, kv_start, kv_end,
            SCALED, True, D, D_TAIL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    acc *= (1.0 / l_i)[:, None]
    if SCALED:
        acc *= tl.load(v_scale + (batch * heads + head) * D + offs_d)[None, :]
    ptrs = o + batch * o_batch + head * o_head + offs_m[:, None] * o_row
    tl.store(ptrs + offs_d[None, :], acc.to(o.dtype.element_ty), mask=mask_m[:, None])
    if D_TAIL:
        acc_tail *= (1.0 / l_i)[:, None]
        tl.store(ptrs + (D + tl.arange(0, D_TAIL))[None, :], acc_tail.to(o.dtype.element_ty), mask=mask_m[:, None])
    tl.store(lse + offs_lse, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=mask_m)


# --- Launcher -------------------------------------------------------------------------------------------------------

Scales = tuple[Tensor, Tensor, Tensor]


def split_head_dim(head_dim: int) -> tuple[int, int] | None:
    """Splits head_dim into D, a power of two, and D_TAIL, a smaller power of two or 0, each at least 16.

    None if there is no such split: then our kernels do not take this head_dim.
    """
    d = 1 << head_dim.bit_length() - 1
    d_tail = head_dim - d
    return (d, d_tail) if d >= 16 and (d_tail == 0 or (d_tail >= 16 and d_tail & (d_tail - 1) == 0)) else None


def launch_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Scales | None,
    ranges: KVRanges,
    scale: float,
    out_dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by the Triton kernel, for a head_dim that `split_head_dim` can split.

    Args:
        q: [batch, queries, heads, head_dim].
        k: [batch, keys, heads, head_dim].
        v: like k, or in FP8 [batch, heads, head_dim, keys].
        scales: None, or in FP8 the scales of q [batch, queries, heads], k [batch, heads], v [batch, heads, head_dim].
        ranges: the keys that each group of queries attends to.
        scale: factor of the logits.
        out_dtype: the dtype of o.
        config: launch parameters that replace defaults.

    Returns:
        o [batch, queries, heads, head_dim] and lse, float32 [batch, queries, heads].
    """
    batch, queries, heads, head_dim = q.shape
    split = split_head_dim(head_dim)
    assert split is not None
    parameters: dict[str, Any] = {
        "SCALED": scales is not None, "D": split[0], "D_TAIL": split[1], **_default_config(q), **(config or {})
    }  # fmt: skip
    q_tiles = query_tiles_on(q.device, type(q), ranges, parameters["BLOCK_M"])
    o = q.new_empty(q.shape, dtype=out_dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    v_strides = (v.stride(0), v.stride(2), v.stride(1)) if scales else v.stride()[:3]
    attention_fwd[(len(q_tiles), batch * heads)](
        q, k, v, o, lse, q_tiles, *(scales or (lse, lse, lse)), scale * LOG2_E, heads, queries,
        *q.stride()[:3], *k.stride()[:3], *v_strides, *o.stride()[:3], **parameters,
    )  # fmt: skip
    return o, lse


def _default_config(q: Tensor) -> LaunchConfig:
    """Launch parameters of the Triton kernel where nothing was tuned."""
    if q.shape[3] > LARGE_HEAD_DIM:
        return LARGE_HEAD_CONFIG
    name = "fp8" if q.dtype == FP8 else DTYPE_NAMES[q.dtype]
    return {**DEFAULT_CONFIGS[q.dtype], **untuned_config("chunk_attention", name, q.device)}


BACKENDS: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "gluon": launch_sm90,
    "triton": launch_triton,
    FLASH_ATTN: launch_flash_attn,
}


def dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Scales | None,
    ranges: KVRanges,
    scale: float,
    out_dtype: torch.dtype,
    tuned: TunedConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by the back-end `tuned`, or else the fastest in kernels/tuned/, or else the default one of the GPU.

    The other arguments and the results are those of `launch_triton`.
    """
    usable = _usable(q, k, v, scales, ranges)
    tuned = tuned or _tuned_config(q, k, "fp8" if scales else DTYPE_NAMES[q.dtype], usable)
    backend = tuned.backend if tuned is not None and tuned.backend in usable else usable[0]
    config = tuned.config if tuned is not None and tuned.backend == backend else None
    o, lse, *_ = BACKENDS[backend](q, k, v, scales, ranges, scale, out_dtype, config)
    return o, lse


def _usable(q: Tensor, k: Tensor, v: Tensor, scales: Scales | None, ranges: KVRanges) -> list[str]:
    """The back-ends that take these operands on this GPU; the first is its default."""
    on_hopper = gpu_of(q.device).capability == "9.0" and supports(q, k, v, ranges)
    by_library = scales is None and not why_not_flash_attn(q)
    return [*(["gluon"] if on_hopper else []), "triton", *([FLASH_ATTN] if by_library else [])]


def _tuned_config(q: Tensor, k: Tensor, dtype: str, backends: Collection[str] = ()) -> TunedConfig | None:
    dims = {"queries": q.shape[1], "keys": k.shape[1], "heads": q.shape[2], "head_dim": q.shape[3]}
    return tuned_config("chunk_attention", dims, dtype, q.device, backends, ("head_dim",))


def _has_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether our kernels take this head_dim and, if it is large, one of them was measured to be the fastest."""
    if split_head_dim(q.shape[3]) is None:
        return False
    if q.shape[3] <= LARGE_HEAD_DIM:
        return True
    tuned = _tuned_config(q, k, DTYPE_NAMES[q.dtype])
    return tuned is not None and tuned.backend in BACKENDS


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention on [batch, tokens, heads, head_dim]; the result is contiguous."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


# --- Operation ------------------------------------------------------------------------------------------------------


def _sdpa_ranges(q: Tensor, k: Tensor, v: Tensor, ranges: KVRanges, scale: float) -> Tensor:
    outputs = [
        sdpa(q[:, q_start:q_end], k[:, kv_start:kv_end], v[:, kv_start:kv_end], scale)
        for q_start, q_end, kv_start, kv_end in ranges
    ]
    return torch.cat(outputs, dim=1)


def chunk_ranges(queries: int, keys: int, chunks: list[int] | None, past: int) -> KVRanges:
    """The keys that each group of queries attends to, by the arguments of the ops."""
    return kv_ranges(queries, keys, chunks and tuple(chunks), past)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float) -> Tensor:
    return _sdpa_ranges(q, k, v, chunk_ranges(q.shape[1], k.shape[1], chunks, past), scale)


def _attention_cuda(q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float) -> Tensor:
    ranges = chunk_ranges(q.shape[1], k.shape[1], chunks, past)
    if not _has_kernel(q, k):
        return _sdpa_ranges(q, k, v, ranges, scale)
    return dispatch(q, k, v, None, ranges, scale, q.dtype)[0]


def _attention_with_lse_cpu(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float
) -> tuple[Tensor, Tensor]:
    ranges = chunk_ranges(q.shape[1], k.shape[1], chunks, past)
    results = [reference(*operands, ranges, scale) for operands in zip(q.float(), k.float(), v.float(), strict=True)]
    return torch.stack([o for o, _ in results]).to(q.dtype), torch.stack([lse for _, lse in results])


def _attention_with_lse_cuda(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int] | None, past: int, scale: float
) -> tuple[Tensor, Tensor]:
    return dispatch(q, k, v, None, chunk_ranges(q.shape[1], k.shape[1], chunks, past), scale, q.dtype)


# The fakes are written out because key ranges are computed from numbers, which symbolic shapes are not.
chunk_attention_op = define_op(
    "chunk_attention",
    cpu=_attention_cpu,
    cuda=_attention_cuda,
    fake=lambda q, *_: q.new_empty(q.shape),
)
chunk_attention_with_lse_op = define_op(
    "chunk_attention_with_lse",
    cpu=_attention_with_lse_cpu,
    cuda=_attention_with_lse_cuda,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)),
)
Past = int | Literal["all"] | None


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[int] | None = None,
    past: Past = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query to its own chunk and to the `past` chunks before it: softmax(scale q k^T) v.

    Args:
        q: [queries, heads, head_dim] or [batch, queries, heads, head_dim], contiguous along head_dim; float32, float16
            or bfloat16, on a CPU also float64.
        k: [keys, heads, head_dim], or with q's batch in front, contiguous along head_dim; q's dtype and device.
        v: like k.
        chunks: lengths of at least 1 that add up to the tokens of q and of k. None means that every query attends to
            every key; then q and k may differ in length.
        past: how many chunks before its own a query attends to. None means 0, "all" means every earlier chunk.
        scale: factor of the logits; None means head_dim^-1/2.

    Returns:
        o, contiguous, with the shape and dtype of q.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    lengths, num_past = _check_operands(q, k, v, chunks, past)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.ndim == 4:
        return chunk_attention_op(q, k, v, lengths, num_past, factor)
    return chunk_attention_op(q[None], k[None], v[None], lengths, num_past, factor)[0]


def chunk_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[int] | None = None,
    past: Past = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its own chunk and to the `past` chunks before it, with the log-sum-exp of the logits.

    Computes o = softmax(scale q k^T) v and lse = log sum exp(scale q k^T), with the natural logarithm.
    `merge_attention` merges such results for parts of the keys.

    Args:
        q: [queries, heads, head_dim] or [batch, queries, heads, head_dim], contiguous along head_dim; float32, float16
            or bfloat16, on a CPU also float64. On a GPU, head_dim must be a power of two of at least 16, or a sum of
            two.
        k: [keys, heads, head_dim], or with q's batch in front, contiguous along head_dim; q's dtype and device.
        v: like k.
        chunks: lengths of at least 1 that add up to the tokens of q and of k. None means that every query attends to
            every key; then q and k may differ in length.
        past: how many chunks before its own a query attends to. None means 0, "all" means every earlier chunk.
        scale: factor of the logits; None means head_dim^-1/2.

    Returns:
        o, contiguous, with the shape and dtype of q; and lse, float32 [queries, heads], or with the batch in front.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    lengths, num_past = _check_operands(q, k, v, chunks, past)
    if q.is_cuda and split_head_dim(q.shape[-1]) is None:
        raise ValueError(f"q: head_dim {q.shape[-1]}, wanted a power of two of at least 16, or a sum of two, for lse")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.ndim == 4:
        return chunk_attention_with_lse_op(q, k, v, lengths, num_past, factor)
    o, lse = chunk_attention_with_lse_op(q[None], k[None], v[None], lengths, num_past, factor)
    return o[0], lse[0]


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention to parts of the keys into attention to all of them, as ring attention does.

        lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

    The sums are computed in float32, and o is rounded once.

    Args:
        outputs: o [tokens, heads, head_dim] of each part.
        lses: lse, float32 [tokens, heads] of each part.

    Returns:
        o, in the dtype of the parts, and lse.
    """
    lse = torch.stack(tuple(lses)).logsumexp(0)
    weighted = [o.float() * (part - lse).exp()[..., None] for o, part in zip(outputs, lses, strict=True)]
    return torch.stack(weighted).sum(0).to(outputs[0].dtype), lse


def _check_operands(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[int] | None, past: Past
) -> tuple[list[int] | None, int]:
    """Checks the arguments of `chunk_attention`, and returns `chunks` and `past` in the form that the op takes."""
    if q.ndim not in (3, 4):
        raise ValueError(f"q: shape {list(q.shape)}, wanted [queries, heads, head_dim], or with a batch in front")
    batch, (heads, head_dim) = q.shape[:-3], q.shape[-2:]
    dtypes = DTYPE_NAMES if q.is_cuda else (*DTYPE_NAMES, torch.float64)
    check("q", q, shape=(*batch, "queries", "heads", "head_dim"), dtype=dtypes, layout="rows")
    check("k", k, shape=(*batch, "keys", heads, head_dim), dtype=q.dtype, device=q.device, layout="rows")
    check("v", v, shape=k.shape, dtype=q.dtype, device=q.device, layout="rows")
    return check_chunks(q.shape[-3], k.shape[-3], chunks, past)


def check_chunks(queries: int, keys: int, chunks: Sequence[int] | None, past: Past) -> tuple[list[int] | None, int]:
    """Checks `chunks` and `past`, and returns them in the form that the ops take: past -1 means all earlier chunks."""
    num_past = -1 if past == "all" else 0 if past is None else past
    if not isinstance(num_past, int) or (num_past < 0 and past != "all"):
        raise ValueError(f'past: {past!r}, wanted a number of chunks >= 0, or "all"')
    if chunks is None:
        if num_past:
            raise ValueError(f"past: {past!r} without chunks")
        return None, 0
    lengths = [int(n) for n in chunks]
    if any(n < 1 for n in lengths):
        raise ValueError(f"chunks: {lengths}, wanted lengths >= 1")
    if (sum(lengths), sum(lengths)) != (queries, keys):
        raise ValueError(f"chunks: {sum(lengths)} tokens in all, wanted those of q and k, {queries} and {keys}")
    return lengths, num_past
