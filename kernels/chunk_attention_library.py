"""Attention by FlashAttention-2, where the package flash-attn is installed and a table in kernels/tuned/ names it.

It is for GPUs that our kernels were not written for, such as an A100. Source: FlashAttention-2 (arXiv 2307.08691).
"""

import torch
from torch import Tensor

from kernels.common import installed
from kernels.scheduler import KVRanges

FLASH_ATTN = "flash-attn"  # the back-end, also as a peer in profiling/cases
MAX_HEAD_DIM = 256


def why_not_flash_attn(q: Tensor) -> str:
    """Why FlashAttention-2 cannot attend with queries [..., head_dim] like these; empty if it can."""
    if not installed("flash_attn"):
        return "flash_attn is not installed"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}, wanted float16 or bfloat16"
    if q.shape[-1] % 8 or q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]}, wanted a multiple of 8 up to {MAX_HEAD_DIM}"
    return ""


def launch_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: None,
    ranges: KVRanges,
    scale: float,
    out_dtype: torch.dtype,
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """Attention by FlashAttention-2, with the arguments and results of `kernels.chunk_attention.launch_triton`.

    Calls flash_attn_func once for each range. The operands are those for which `why_not_flash_attn` finds nothing.
    """
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    outputs, lses = [], []
    for q_start, q_end, kv_start, kv_end in ranges:
        keys, values = k[:, kv_start:kv_end], v[:, kv_start:kv_end]
        # return_attn_probs adds the log-sum-exp [batch, heads, queries] and S_dmask, which is None without dropout.
        o, lse, _ = flash_attn_func(q[:, q_start:q_end], keys, values, softmax_scale=scale, return_attn_probs=True)
        outputs.append(o)
        lses.append(lse.transpose(1, 2))
    return torch.cat(outputs, 1).to(out_dtype).contiguous(), torch.cat(lses, 1).contiguous()
