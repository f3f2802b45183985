"""The epilogue of the linear layers of kernels/linear.py: what happens to the sums x w^T before they are stored.

    * x_scale [m] * w_scale [n], + bias [n], then tanh-GELU or * gate [n], then + residual [m, n]

Every part is optional. It is computed in float32 and rounded once, to e4m3 with a scale for each row if it has a bound
(see kernels/linear.py).
"""

# Triton's functions take constants, and its variables are set in the branches that need them.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, check, to_e4m3


class Epilogue(NamedTuple):
    """What is applied to x w^T, in this order; None or False leaves a part out."""

    bias: Tensor | None = None  # [n]
    gelu: bool = False
    gate: Tensor | None = None  # float32 [n]
    residual: Tensor | None = None  # [m, n], in the output's dtype
    bound: Tensor | None = None  # float32 [2]: makes the output e4m3


Scales = tuple[Tensor, Tensor]  # of x [m] and of w [n], float32
Output = tuple[Tensor, Tensor]  # y, and the scales of its rows, which are empty unless the epilogue has a bound

FP32_ACCUM_MIN_K = 8192  # untuned FP8 products of this many terms or more are accumulated outside of the tensor cores


def apply_epilogue(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Bias, GELU, gate and residual, in y's precision."""
    if epilogue.bias is not None:
        y = y + epilogue.bias
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    elif epilogue.gate is not None:
        y = y * epilogue.gate
    return y if epilogue.residual is None else y + epilogue.residual


def quantize_output(y: Tensor, x_scale: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """float32 y in e4m3, with the scales that follow from `output_bound`."""
    y_scale = x_scale * bound[0] + bound[1]
    return (y / y_scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), y_scale


@triton.jit
def store_tile(acc, offs_m, offs_n, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, y_row,
               residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
               GATED: tl.constexpr, QUANTIZE: tl.constexpr):  # fmt: skip
    """Applies the epilogue to the float32 or int32 sums acc [offs_m, offs_n] and stores the result in y."""
    acc = acc.to(tl.float32)
    mask_m, mask_n = offs_m < m, offs_n < n
    mask = mask_m[:, None] & mask_n[None, :]
    offs_m = offs_m.to(tl.int64)
    if SCALED:
        row_scale = tl.load(x_scale + offs_m, mask=mask_m, other=0.0)
        acc *= row_scale[:, None] * tl.load(w_scale + offs_n, mask=mask_n, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GELU:  # 1/2 (1 + tanh(u)) = sigmoid(2 u)
        acc *= tl.sigmoid(1.5957691216057308 * acc * (1.0 + 0.044715 * acc * acc))
    if GATED:
        acc *= tl.load(gate + offs_n, mask=mask_n, other=0.0)[None, :]
    if RESIDUAL:
        residual_ptrs = residual + offs_m[:, None] * residual_row + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y + offs_m[:, None] * y_row + offs_n[None, :]
    if QUANTIZE:
        scale = row_scale * tl.load(bound) + tl.load(bound + 1)
        tl.store(y_scale + offs_m, scale, mask=mask_m)  # every tile of the row stores the same value
        tl.store(y_ptrs, to_e4m3(acc * (1.0 / scale)[:, None], y), mask=mask)
    else:
        tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=mask)


def epilogue_arguments(
    y: Tensor, y_scale: Tensor, scales: Scales | None, epilogue: Epilogue
) -> tuple[list[Tensor], list[int], dict[str, bool]]:
    """Pointers, strides and flags of `store_tile`; y stands in for pointers that no flag reads."""
    bias, gelu, gate, residual, bound = epilogue
    x_scale, w_scale = scales or (None, None)
    pointers = [y if p is None else p for p in (residual, x_scale, w_scale, bound)]
    pointers = [y, *pointers, y_scale, *(y if p is None else p for p in (bias, gate))]
    strides = [y.stride(0), y.stride(0) if residual is None else residual.stride(0)]
    flags = {"SCALED": scales is not None, "BIAS": bias is not None, "GELU": gelu, "RESIDUAL": residual is not None}
    return pointers, strides, flags | {"GATED": gate is not None, "QUANTIZE": bound is not None}


def check_epilogue(x: Tensor, w: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> None:
    """Raises ValueError unless the epilogue fits the product of x and w, with a result in `dtype`."""
    if epilogue.bound is None and dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype: {dtype}, wanted {' or '.join(map(str, DTYPE_NAMES))}")
    if epilogue.gelu and epilogue.gate is not None:
        raise ValueError("gate: not together with an activation")
    m, n = len(x), len(w)
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...], Collection[torch.dtype]]] = {
        "bias": (epilogue.bias, (n,), DTYPE_NAMES),
        "gate": (epilogue.gate, (n,), (torch.float32,)),
        "residual": (epilogue.residual, (m, n), (dtype,)),
        "bound": (epilogue.bound, (2,), (torch.float32,)),
    }
    for name, (y, shape, dtypes) in wanted.items():
        if y is not None:
            check(name, y, shape=shape, dtype=dtypes, device=x.device, layout="rows")
