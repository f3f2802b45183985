"""A small flash-attention kernel in Triton, to prove the toolkit on: audited, checked, timed and tuned in tests.

    o = softmax(q k^T / sqrt(d)) v        q, o [queries, head, d]; k, v [keys, head, d]; head by head

A block of the grid computes BLOCK_M queries of one head. It walks over the keys BLOCK_N at a time and keeps the running
row maximum and sum, so no score leaves the multiprocessor. Under TRITON_INTERPRET=1 the same code runs on CPU tensors
in float32 or float16 (Triton 3.6 interprets a bfloat16 product wrongly).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from profiling.cases import TOLERANCES, Backend, Call, Case, Dims, Shape
from profiling.cases.attention import SELF_ATTENTION

# Without tuning. Tensor cores want large tiles; float32 products run out of registers.
LAUNCH = {
    torch.bfloat16: {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    torch.float32: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def attention_forward(
    q_rows, k_rows, v_rows, o, scale, queries, keys, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr  # noqa: N803
):  # fmt: skip
    """One block: BLOCK_M queries of a head. The three descriptors cut [rows, D] boxes out of [tokens, head * D]."""
    row, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    q = q_rows.load([row, head * D])
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, keys, BLOCK_N):
        k = k_rows.load([start, head * D])
        scores = tl.dot(q, k.T, input_precision="ieee")
        inside = start + tl.arange(0, BLOCK_N) < keys  # beyond the end, descriptors read zeros
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])  # one fused multiply-add
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        v = v_rows.load([start, head * D])
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    rows = row + tl.arange(0, BLOCK_M)
    places = o + rows[:, None] * (tl.num_programs(1) * D) + head * D + tl.arange(0, D)[None, :]
    tl.store(places, (acc / total[:, None]).to(o.dtype.element_ty), mask=(rows < queries)[:, None])


def attention(q: Tensor, k: Tensor, v: Tensor, config: Mapping[str, int] | None = None) -> Tensor:
    """q [queries, head, d], k and v [keys, head, d], contiguous -> [queries, head, d]; `config` replaces LAUNCH."""
    queries, heads, d = q.shape
    default = LAUNCH[torch.float32 if q.dtype == torch.float32 else torch.bfloat16]
    parameters: dict[str, Any] = {"D": d, **default, **(config or {})}
    block_m, block_n = parameters["BLOCK_M"], parameters["BLOCK_N"]
    q_rows, k_rows, v_rows = (
        TensorDescriptor.from_tensor(x.flatten(1), [rows, d]) for x, rows in ((q, block_m), (k, block_n), (v, block_n))
    )
    o = torch.empty_like(q)
    scale = d**-0.5 * math.log2(math.e)  # the kernel's exponential is 2^x
    grid = (triton.cdiv(queries, block_m), heads)
    attention_forward[grid](q_rows, k_rows, v_rows, o, scale, queries, len(k), **parameters)
    return o


def prepare(q: Tensor, k: Tensor, v: Tensor, config: Mapping[str, int] | None = None) -> Call:
    """There is nothing to do beforehand."""
    return lambda: attention(q, k, v, config)


def configs(dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters worth trying: no tile longer than the tokens there are, rounded up."""
    for block_m in (64, 128):
        for block_n in (64, 128):
            if max(block_m, block_n) <= triton.next_power_of_2(dims["keys"]):
                yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": block_m // 16, "num_stages": 2}


TRITON = Backend("triton", prepare, ours=True, launcher=attention, configs=configs)
OPERATION = dataclasses.replace(
    SELF_ATTENTION,
    name="test_attention",
    backends={
        dtype: (TRITON, *(b for b in SELF_ATTENTION.backends[dtype] if b.launcher is None))
        for dtype in ("fp32", "bf16")
    },
)
TINY = Shape("tiny", {"queries": 84, "keys": 84, "heads": 2, "head_dim": 64})
PRODUCTION = Shape("14b-w1", {"queries": 12096, "keys": 12096, "heads": 40, "head_dim": 128}, calls=160)
CASES = [Case(OPERATION, shape, dtype, TOLERANCES[dtype]) for shape, dtype in ((TINY, "fp32"), (PRODUCTION, "bf16"))]
