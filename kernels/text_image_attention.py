"""Cross-attention to text and to image: one query, two separate softmaxes, and the sum of both results.

    o = softmax(c q text_k^T / sqrt(head_dim)) text_v + softmax(c q image_k^T / sqrt(head_dim)) image_v

c is 1, or a factor of each row of q. With c = 1 / rms of a row over all heads, and the weight of its RMSNorm multiplied
into the keys, q need not be normalised before.

`text_image_attention_quantized` gives o in e4m3 with a scale for each row, as `linear_fp8` takes it.

All text keys take part, those of the padding too, because the model was trained so. The padding's keys are all equal,
and so are its values. n equal keys act as one key whose weight is n times as large, so the kernel adds log n to the
logit of one of them and skips the rest. The number of text tokens before the padding is read on the device, so that
prompts of different lengths run the same program.

Back-ends: "triton" for any GPU (below), and "gluon" for Hopper (kernels/text_image_attention_sm90.py) where
kernels/tuned/ says so. `text_image_attention_quantized` is "separate", which is one of them and `quantize_rows`, or
"fused", which is the Hopper kernel with a scale that is known beforehand, where kernels/tuned/ says so.

Source: WanI2VCrossAttention of SoulX-FlashTalk.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.chunk_attention import reference as attention_reference
from kernels.chunk_attention import sdpa
from kernels.common import DTYPE_NAMES, check, define_op
from kernels.layer_norm import launch_quantize_rows, quantize_reference, quantize_to_bound
from kernels.text_image_attention_sm90 import launch_sm90, supports
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, launch_config, reads_by_pointers, tuned_config

# Launch parameters where nothing was tuned.
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_T": 32, "num_warps": 4, "num_stages": 1}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_T": 32, "num_warps": 8, "num_stages": 2}
DEFAULT_CONFIGS: Mapping[torch.dtype, LaunchConfig] = {
    torch.float32: FP32_CONFIG,
    torch.float16: BF16_CONFIG,
    torch.bfloat16: BF16_CONFIG,
}
BACKENDS = {"text_image_attention": ("gluon", "triton"), "text_image_attention_quantized": ("fused", "separate")}


# --- Reference ------------------------------------------------------------------------------------------------------


def text_image_reference(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    num_text_tokens: Tensor | None = None,
    q_scale: Tensor | None = None,
) -> Tensor:
    """`text_image_attention` by definition, in q's precision, over all keys.

    `num_text_tokens` only says which keys are equal, and does not change the result.
    """
    q = scale_rows(q, q_scale)
    return attention_reference(q, text_k, text_v)[0] + attention_reference(q, image_k, image_v)[0]


def text_image_bounded_reference(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    o_bound: Tensor,
    num_text_tokens: Tensor | None = None,
    q_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`text_image_attention_quantized` as its back-end "fused" rounds, from the result in q's precision."""
    o = text_image_reference(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale)
    return quantize_to_bound(o, o_bound)


def scale_rows(q: Tensor, q_scale: Tensor | None) -> Tensor:
    """q [tokens, heads, head_dim] with its rows multiplied by q_scale [tokens], if any, and rounded to q's dtype."""
    return q if q_scale is None else (q * q_scale[:, None, None]).to(q.dtype)


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_keys(x, start, column, num_keys, row, BLOCK: tl.constexpr, D: tl.constexpr, POINTERS: tl.constexpr):
    """The tile [BLOCK, D] at (start, column) of keys or values, given by a descriptor or a pointer.

    What stands in place of rows beyond the last key does not matter, as long as it is finite: they get no weight.
    """
    if POINTERS:
        offs_n = tl.minimum(start + tl.arange(0, BLOCK), num_keys - 1).to(tl.int64)
        tile = tl.load(x + offs_n[:, None] * row + column + tl.arange(0, D)[None, :])
    else:
        tile = x.load([start, column])
    return tile


@triton.jit
def text_image_attention_inner(acc, m_i, l_i, q, qk_scale, k, v, k_row, v_row, column, start, num_keys,
                               padding_log_weight, BLOCK: tl.constexpr, D: tl.constexpr,
                               POINTERS: tl.constexpr):  # fmt: skip
    """One step of the online softmax: BLOCK keys from `start` on, of `num_keys` in all.

    padding_log_weight, a logarithm to base 2, is added to the logit of the last key. A box of the descriptors may reach
    beyond the last key, into rows that get no weight or beyond the end of memory, where it is filled with zeros.
    """
    offs_n = start + tl.arange(0, BLOCK)
    bias = tl.where(offs_n < num_keys, tl.where(offs_n == num_keys - 1, padding_log_weight, 0.0), float("-inf"))
    k_tile = load_keys(k, start, column, num_keys, k_row, BLOCK, D, POINTERS)
    scores = tl.dot(q, k_tile.T, input_precision="ieee") * qk_scale + bias[None, :]
    m_ij = tl.maximum(m_i, tl.max(scores, 1))
    p, alpha = tl.exp2(scores - m_ij[:, None]), tl.exp2(m_i - m_ij)
    v_tile = load_keys(v, start, column, num_keys, v_row, BLOCK, D, POINTERS)
    acc = acc * alpha[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    return acc, m_ij, l_i * alpha + tl.sum(p, 1)


@triton.jit
def text_image_attention_fwd(q, text_k_desc, text_v_desc, image_k_desc, image_v_desc, tail_k_desc, tail_v_desc,
                             num_text_tokens, q_scale, o, softmax_scale_log2, tokens, text_keys, image_keys,
                             q_row, q_head, text_k_row, text_v_row, text_head, image_k_row, image_v_row, image_head,
                             o_row, o_head, POINTERS: tl.constexpr, DEDUP_PADDING: tl.constexpr,
                             SCALED: tl.constexpr, D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """A tile of tokens of one head. DEDUP_PADDING: text keys from number num_text_tokens on are equal.

    SCALED: the logits of each row have a factor. The boxes of the descriptors have BLOCK_T text keys, BLOCK_N
    image keys, and BLOCK_TAIL for the last image keys. POINTERS: there are pointers in their places.
    """
    head = tl.program_id(1)
    head_i64 = head.to(tl.int64)
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d, mask_m = tl.arange(0, D), offs_m < tokens
    q_ptrs = q + head_i64 * q_head + offs_m[:, None] * q_row + offs_d[None, :]
    q_tile = tl.load(q_ptrs, mask=mask_m[:, None], other=0.0)
    qk_scale = softmax_scale_log2
    if SCALED:
        qk_scale = tl.load(q_scale + offs_m, mask=mask_m, other=0.0)[:, None] * softmax_scale_log2
    num_keys, padding_log_weight = text_keys, 0.0
    if DEDUP_PADDING:
        num_keys = tl.minimum(tl.load(num_text_tokens) + 1, text_keys)  # the last one stands for all of the padding
        padding_log_weight = tl.log2((text_keys - num_keys + 1).to(tl.float32))
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, num_keys, BLOCK_T):
        acc, m_i, l_i = text_image_attention_inner(
            acc, m_i, l_i, q_tile, qk_scale, text_k_desc, text_v_desc, text_k_row, text_v_row, head * text_head, start,
            num_keys, padding_log_weight, BLOCK_T, D, POINTERS,
        )  # fmt: skip
    text_o = (acc * (1.0 / l_i)[:, None]).to(o.dtype.element_ty)  # takes half the registers of float32
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    whole_end = image_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole_end, BLOCK_N):
        acc, m_i, l_i = text_image_attention_inner(
            acc, m_i, l_i, q_tile, qk_scale, image_k_desc, image_v_desc, image_k_row, image_v_row, head * image_head,
            start, image_keys, 0.0, BLOCK_N, D, POINTERS,
        )  # fmt: skip
    if whole_end < image_keys:
        acc, m_i, l_i = text_image_attention_inner(
            acc, m_i, l_i, q_tile, qk_scale, tail_k_desc, tail_v_desc, image_k_row, image_v_row, head * image_head,
            whole_end, image_keys, 0.0, BLOCK_TAIL, D, POINTERS,
        )  # fmt: skip
    acc = acc * (1.0 / l_i)[:, None] + text_o.to(tl.float32)
    o_ptrs = o + head_i64 * o_head + offs_m[:, None] * o_row + offs_d[None, :]
    tl.store(o_ptrs, acc.to(o.dtype.element_ty), mask=mask_m[:, None])


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_text_image(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    num_text_tokens: Tensor | None = None,
    q_scale: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`text_image_attention` by the Triton kernel; `config` replaces default launch parameters."""
    text, image = (text_k, text_v), (image_k, image_v)
    tokens, heads, head_dim = q.shape
    parameters = launch_config(
        "text_image_attention", _dims(q, text_k, image_k, num_text_tokens), DTYPE_NAMES[q.dtype], q.device,
        default={**DEFAULT_CONFIGS[q.dtype], "POINTERS": int(reads_by_pointers(*(x[:, 0] for x in (*text, *image))))},
        given=config, match_exactly=("head_dim",),
    )  # fmt: skip
    block_t, block_n = parameters["BLOCK_T"], parameters["BLOCK_N"]
    block_tail = max(16, triton.next_power_of_2(len(image_k) % block_n))
    o = q.new_empty(q.shape)
    operands = [(x, block_t) for x in text] + [(x, block) for block in (block_n, block_tail) for x in image]
    text_image_attention_fwd[(triton.cdiv(tokens, parameters["BLOCK_M"]), heads)](
        q, *(x if parameters["POINTERS"] else make_desc(x, block) for x, block in operands),
        q if num_text_tokens is None else num_text_tokens, q if q_scale is None else q_scale, o,
        head_dim**-0.5 * math.log2(math.e), tokens, len(text_k), len(image_k), *q.stride()[:2],
        text_k.stride(0), text_v.stride(0), text_k.stride(1), image_k.stride(0), image_v.stride(0), image_k.stride(1),
        *o.stride()[:2], DEDUP_PADDING=num_text_tokens is not None, SCALED=q_scale is not None, D=head_dim,
        BLOCK_TAIL=block_tail, **parameters,
    )  # fmt: skip
    return o


def make_desc(x: Tensor, block_n: int) -> TensorDescriptor:
    """A descriptor of boxes [block_n, head_dim] of x [keys, heads, head_dim], where a head is a column offset."""
    keys, heads, head_dim = x.shape
    return TensorDescriptor(x, [keys, (heads - 1) * x.stride(1) + head_dim], [x.stride(0), 1], [block_n, head_dim])


def dispatch(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    num_text_tokens: Tensor | None,
    q_scale: Tensor | None,
    tuned: TunedConfig | None = None,
) -> Tensor:
    """`text_image_attention` on a GPU: by the back-end `tuned`, or else the fastest one in kernels/tuned/."""
    tuned = tuned or _tuned_config("text_image_attention", DTYPE_NAMES[q.dtype], q, text_k, image_k, num_text_tokens)
    text, image = (text_k, text_v), (image_k, image_v)
    if tuned is not None and tuned.backend == "gluon" and _runs_on_hopper(q, text, image, tuned.config):
        return launch_sm90(q, text, image, num_text_tokens, q_scale, None, tuned.config)[0]
    config = tuned.config if tuned is not None and tuned.backend == "triton" else None
    return launch_text_image(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale, config)


def dispatch_quantized(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    o_bound: Tensor,
    num_text_tokens: Tensor | None,
    q_scale: Tensor | None,
    tuned: TunedConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`text_image_attention_quantized` on a GPU: "fused" where measurements or `tuned` say so, else "separate"."""
    tuned = tuned or _tuned_config("text_image_attention_quantized", "fp8", q, text_k, image_k, num_text_tokens)
    text, image = (text_k, text_v), (image_k, image_v)
    if tuned is not None and tuned.backend == "fused" and _runs_on_hopper(q, text, image, tuned.config):
        return launch_sm90(q, text, image, num_text_tokens, q_scale, o_bound, tuned.config)
    o8, o_scale = launch_quantize_rows(
        dispatch(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale).flatten(1)
    )
    return o8.view(q.shape), o_scale


def _runs_on_hopper(q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], config: LaunchConfig) -> bool:
    return gpu_of(q.device).capability == "9.0" and supports(q, text, image, config)


def _tuned_config(
    operation: str, dtype: str, q: Tensor, text_k: Tensor, image_k: Tensor, num_text_tokens: Tensor | None
) -> TunedConfig | None:
    dims = _dims(q, text_k, image_k, num_text_tokens)
    return tuned_config(operation, dims, dtype, q.device, BACKENDS[operation], ("head_dim",))


def _dims(q: Tensor, text_k: Tensor, image_k: Tensor, num_text_tokens: Tensor | None) -> dict[str, int]:
    """The shape, under the names that cases and tuned tables use."""
    tokens, heads, head_dim = q.shape
    dims = {"queries": tokens, "text": len(text_k), "image": len(image_k), "heads": heads, "head_dim": head_dim}
    return dims | {"dedup_padding": int(num_text_tokens is not None)}


# --- Operation ------------------------------------------------------------------------------------------------------


def _text_image_cpu(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    num_text_tokens: Tensor | None,
    q_scale: Tensor | None,
) -> Tensor:
    q = scale_rows(q, q_scale)
    text = sdpa(q[None], text_k[None], text_v[None])[0]
    return text + sdpa(q[None], image_k[None], image_v[None])[0]


def _text_image_quantized_cpu(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    o_bound: Tensor,
    num_text_tokens: Tensor | None,
    q_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    o = _text_image_cpu(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale)
    o8, o_scale = quantize_reference(o.flatten(1))
    return o8.view(o.shape), o_scale


text_image_attention_op = define_op("text_image_attention", cpu=_text_image_cpu, cuda=dispatch)
text_image_attention_quantized_op = define_op(
    "text_image_attention_quantized", cpu=_text_image_quantized_cpu, cuda=dispatch_quantized
)


def text_image_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    num_text_tokens: Tensor | None = None,
    q_scale: Tensor | None = None,
) -> Tensor:
    """Attention to text plus attention to image, each with a softmax of its own.

    Computes softmax(c q text_k^T / sqrt(head_dim)) text_v + softmax(c q image_k^T / sqrt(head_dim)) image_v, where c is
    `q_scale`, a factor of each row, or 1. Arguments may have any strides between tokens and between heads.

    Args:
        q: [tokens, heads, head_dim], contiguous along head_dim; float32, float16 or bfloat16.
        text_k: [text keys, heads, head_dim], contiguous along head_dim; q's dtype and device.
        text_v: like text_k, with the same stride between heads.
        image_k: [image keys, heads, head_dim], contiguous along head_dim; q's dtype and device.
        image_v: like image_k, with the same stride between heads.
        num_text_tokens: int32 [1] on q's device. Promises that the rows of text_k from this one on are equal, and those
            of text_v too, as the rows of a padding are: they are then computed once. None promises nothing.
        q_scale: float32 [tokens], contiguous, not negative: what q's rows are multiplied by. None means 1.

    Returns:
        o, contiguous, with the shape and dtype of q.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride, or requires a gradient.
    """
    _check_operands(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale)
    return text_image_attention_op(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale)


def text_image_attention_quantized(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    o_bound: Tensor,
    num_text_tokens: Tensor | None = None,
    q_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to text plus attention to image, each with a softmax of its own, with an e4m3 result.

    With o = softmax(c q text_k^T / sqrt(head_dim)) text_v + softmax(c q image_k^T / sqrt(head_dim)) image_v, where c is
    `q_scale`, a factor of each row, or 1, the results are o8 = o / o_scale in e4m3 and o_scale of each token. The scale
    is max |o| / 448 of a token's heads together, or o_bound / 448 for all tokens, whichever was measured to be faster;
    it is at least 1e-12. Arguments may have any strides between tokens and between heads.

    Args:
        q: [tokens, heads, head_dim], contiguous along head_dim; float32, float16 or bfloat16.
        text_k: [text keys, heads, head_dim], contiguous along head_dim; q's dtype and device.
        text_v: like text_k, with the same stride between heads.
        image_k: [image keys, heads, head_dim], contiguous along head_dim; q's dtype and device.
        image_v: like image_k, with the same stride between heads.
        o_bound: float32 [], `text_image_bound(text_v, image_v)`: no |o| exceeds it.
        num_text_tokens: int32 [1] on q's device. Promises that the rows of text_k from this one on are equal, and those
            of text_v too, as the rows of a padding are: they are then computed once. None promises nothing.
        q_scale: float32 [tokens], contiguous, not negative: what q's rows are multiplied by. None means 1.

    Returns:
        o8, float8_e4m3fn with the shape of q, contiguous; o_scale, float32 [tokens].

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride, or requires a gradient.
    """
    _check_operands(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale)
    check("o_bound", o_bound, shape=(), dtype=torch.float32, device=q.device)
    return text_image_attention_quantized_op(q, text_k, text_v, image_k, image_v, o_bound, num_text_tokens, q_scale)


def text_image_bound(text_v: Tensor, image_v: Tensor) -> Tensor:
    """What no |o| of attention to text and image exceeds: max over heads and channels of max |text_v| + max |image_v|.

    A softmax averages values, so that each of the two terms of o is at most the largest value of its channel.

    Args:
        text_v: [text keys, heads, head_dim], any floating-point dtype.
        image_v: [image keys, heads, head_dim], in the same dtype.

    Returns:
        float32 [].
    """
    return (text_v.abs().amax(0).float() + image_v.abs().amax(0).float()).amax()


def _check_operands(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    num_text_tokens: Tensor | None,
    q_scale: Tensor | None,
) -> None:
    check("q", q, shape=("tokens", "heads", "head_dim"), dtype=DTYPE_NAMES, layout="rows")
    for name, k, v in (("text", text_k, text_v), ("image", image_k, image_v)):
        shape = (f"{name} keys", *q.shape[1:])
        check(f"{name}_k", k, shape=shape, dtype=q.dtype, device=q.device, layout="rows")
        check(f"{name}_v", v, shape=k.shape, dtype=q.dtype, device=q.device, layout="rows")
        if v.stride(1) != k.stride(1):
            raise ValueError(f"{name}_v: heads {v.stride(1)} apart, wanted {k.stride(1)} as in {name}_k")
    if num_text_tokens is not None:
        check("num_text_tokens", num_text_tokens, shape=(1,), dtype=torch.int32, device=q.device)
    if q_scale is not None:
        check("q_scale", q_scale, shape=q.shape[:1], dtype=torch.float32, device=q.device, layout="contiguous")
