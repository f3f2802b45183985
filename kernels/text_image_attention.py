"""Cross-attention to text and to image: one query, two separate softmaxes, and the sum of both results.

    o = softmax(q text_k^T / sqrt(head_dim)) text_v + softmax(q image_k^T / sqrt(head_dim)) image_v

All text keys take part, those of the padding too, because the model was trained so. The padding's keys are all equal,
and so are its values. n equal keys act as one key whose weight is n times as large, so the kernel adds log n to the
logit of one of them and skips the rest. The number of text tokens before the padding is read on the device, so that
prompts of different lengths run the same program.

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
from kernels.tuning import LaunchConfig, launch_config, pipelines_descriptors

# Launch parameters where nothing was tuned.
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_T": 32, "num_warps": 4, "num_stages": 1}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_T": 32, "num_warps": 8, "num_stages": 2}
DEFAULT_CONFIGS: Mapping[torch.dtype, LaunchConfig] = {
    torch.float32: FP32_CONFIG,
    torch.float16: BF16_CONFIG,
    torch.bfloat16: BF16_CONFIG,
}


# --- Reference ------------------------------------------------------------------------------------------------------


def text_image_reference(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, num_text_tokens: Tensor | None = None
) -> Tensor:
    """`text_image_attention` by definition, in q's precision, over all keys.

    `num_text_tokens` only says which keys are equal, and does not change the result.
    """
    return attention_reference(q, text_k, text_v)[0] + attention_reference(q, image_k, image_v)[0]


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
                             num_text_tokens, o, qk_scale, tokens, text_keys, image_keys,
                             q_row, q_head, text_k_row, text_v_row, text_head, image_k_row, image_v_row, image_head,
                             o_row, o_head, POINTERS: tl.constexpr,
                             DEDUP_PADDING: tl.constexpr, D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """A tile of tokens of one head. DEDUP_PADDING: text keys from number num_text_tokens on are equal.

    The boxes of the descriptors have BLOCK_T text keys, BLOCK_N image keys, and BLOCK_TAIL for the last image keys.
    POINTERS: there are pointers in their places.
    """
    head = tl.program_id(1)
    head_i64 = head.to(tl.int64)
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d, mask_m = tl.arange(0, D), offs_m < tokens
    q_ptrs = q + head_i64 * q_head + offs_m[:, None] * q_row + offs_d[None, :]
    q_tile = tl.load(q_ptrs, mask=mask_m[:, None], other=0.0)
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
    config: LaunchConfig | None = None,
) -> Tensor:
    """`text_image_attention` by the Triton kernel; `config` replaces default launch parameters."""
    tokens, heads, head_dim = q.shape
    dims = {"queries": tokens, "text": len(text_k), "image": len(image_k), "heads": heads, "head_dim": head_dim}
    dims["dedup_padding"] = int(num_text_tokens is not None)
    parameters = launch_config(
        "text_image_attention", dims, DTYPE_NAMES[q.dtype], q.device,
        default={**DEFAULT_CONFIGS[q.dtype], "POINTERS": int(q.is_cuda and not pipelines_descriptors(q.device))},
        given=config, match_exactly=("head_dim",),
    )  # fmt: skip
    block_t, block_n = parameters["BLOCK_T"], parameters["BLOCK_N"]
    block_tail = max(16, triton.next_power_of_2(len(image_k) % block_n))
    o = q.new_empty(q.shape)
    text, image = (text_k, text_v), (image_k, image_v)
    operands = [(x, block_t) for x in text] + [(x, block) for block in (block_n, block_tail) for x in image]
    text_image_attention_fwd[(triton.cdiv(tokens, parameters["BLOCK_M"]), heads)](
        q, *(x if parameters["POINTERS"] else make_desc(x, block) for x, block in operands),
        q if num_text_tokens is None else num_text_tokens, o,
        head_dim**-0.5 * math.log2(math.e), tokens, len(text_k), len(image_k), *q.stride()[:2],
        text_k.stride(0), text_v.stride(0), text_k.stride(1), image_k.stride(0), image_v.stride(0), image_k.stride(1),
        *o.stride()[:2], DEDUP_PADDING=num_text_tokens is not None, D=head_dim,
        BLOCK_TAIL=block_tail, **parameters,
    )  # fmt: skip
    return o


def make_desc(x: Tensor, block_n: int) -> TensorDescriptor:
    """A descriptor of boxes [block_n, head_dim] of x [keys, heads, head_dim], where a head is a column offset."""
    keys, heads, head_dim = x.shape
    return TensorDescriptor(x, [keys, (heads - 1) * x.stride(1) + head_dim], [x.stride(0), 1], [block_n, head_dim])


# --- Operation ------------------------------------------------------------------------------------------------------


def _text_image_cpu(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, num_text_tokens: Tensor | None
) -> Tensor:
    text = sdpa(q[None], text_k[None], text_v[None])[0]
    return text + sdpa(q[None], image_k[None], image_v[None])[0]


text_image_attention_op = define_op("text_image_attention", cpu=_text_image_cpu, cuda=launch_text_image)


def text_image_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, num_text_tokens: Tensor | None = None
) -> Tensor:
    """Attention to text plus attention to image, each with a softmax of its own.

    Computes softmax(q text_k^T / sqrt(head_dim)) text_v + softmax(q image_k^T / sqrt(head_dim)) image_v. Arguments may
    have any strides between tokens and between heads.

    Args:
        q: [tokens, heads, head_dim], contiguous along head_dim; float32, float16 or bfloat16.
        text_k: [text keys, heads, head_dim], contiguous along head_dim; q's dtype and device.
        text_v: like text_k, with the same stride between heads.
        image_k: [image keys, heads, head_dim], contiguous along head_dim; q's dtype and device.
        image_v: like image_k, with the same stride between heads.
        num_text_tokens: int32 [1] on q's device. Promises that the rows of text_k from this one on are equal, and those
            of text_v too, as the rows of a padding are: they are then computed once. None promises nothing.

    Returns:
        o, contiguous, with the shape and dtype of q.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride, or requires a gradient.
    """
    check("q", q, shape=("tokens", "heads", "head_dim"), dtype=DTYPE_NAMES, layout="rows")
    for name, k, v in (("text", text_k, text_v), ("image", image_k, image_v)):
        shape = (f"{name} keys", *q.shape[1:])
        check(f"{name}_k", k, shape=shape, dtype=q.dtype, device=q.device, layout="rows")
        check(f"{name}_v", v, shape=k.shape, dtype=q.dtype, device=q.device, layout="rows")
        if v.stride(1) != k.stride(1):
            raise ValueError(f"{name}_v: heads {v.stride(1)} apart, wanted {k.stride(1)} as in {name}_k")
    if num_text_tokens is not None:
        check("num_text_tokens", num_text_tokens, shape=(1,), dtype=torch.int32, device=q.device)
    return text_image_attention_op(q, text_k, text_v, image_k, image_v, num_text_tokens)
