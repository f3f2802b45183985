"""Linear layers by other packages: cuBLAS by way of PyTorch, and torchao where it is installed.

Their products are scaled by row in 8 bits. The rest of the epilogue takes further passes over the output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common import FP8, installed
from kernels.linear_epilogue import FP32_ACCUM_MIN_K, Epilogue, Output, Scales, apply_epilogue, quantize_output
from kernels.tuning import LaunchConfig

TORCHAO, TORCHAO_MODULE = "torchao", "torchao.kernel.intmm"  # the back-end, and what it needs


def libraries(x: Tensor, w: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> list[str]:
    """The back-ends of other packages that are considered for these operands and a result in `dtype`."""
    if epilogue.gelu or any(part is not None for part in (epilogue.gate, epilogue.residual, epilogue.bound)):
        return []
    if x.dtype == torch.int8:
        return ["library", *([TORCHAO] if installed(TORCHAO_MODULE) else [])] if _takes_int8(x, w) else []
    return ["library"] if x.dtype != FP8 or _takes_fp8(x, w, dtype) else []


def _takes_fp8(x: Tensor, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether cuBLAS multiplies these e4m3 operands, with scales by row: to bfloat16, of sizes that 16 divides."""
    return dtype == torch.bfloat16 and x.shape[1] % 16 == 0 and len(w) % 16 == 0


def _takes_int8(x: Tensor, w: Tensor) -> bool:
    """Whether cuBLAS multiplies these int8 operands: more than 16 rows, and sizes that 8 divides."""
    return len(x) > 16 and x.shape[1] % 8 == 0 and len(w) % 8 == 0


def launch_library(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """epilogue(x w^T) by cuBLAS, scaled by row in FP8, with the rest of the epilogue by PyTorch."""
    if scales and x.dtype == torch.int8:
        return _launch_int8(x, w, scales, epilogue, dtype, "library")
    bias = epilogue.bias
    if scales:
        scaled_mm: Any = torch._scaled_mm  # pyright: ignore  (private, but there is no public one)
        wide = torch.bfloat16  # the only output dtype with a scale for each row
        bias = bias if bias is None else bias.to(wide)
        x_scale, w_scale = scales[0][:, None], scales[1][None]
        fast = x.shape[1] < FP32_ACCUM_MIN_K
        y = scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=wide, use_fast_accum=fast)
    else:
        y = F.linear(x, w, bias if bias is None else bias.to(x.dtype))
    y = apply_epilogue(y, epilogue._replace(bias=None))
    if epilogue.bound is None:
        return y.to(dtype), y.new_empty(0, dtype=torch.float32)
    assert scales is not None
    return quantize_output(y.float(), scales[0], epilogue.bound)


def launch_torchao(
    x: Tensor,
    w: Tensor,
    scales: Scales,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """epilogue(x w^T) of int8 operands by torchao, with the rest of the epilogue by PyTorch."""
    return _launch_int8(x, w, scales, epilogue, dtype, TORCHAO)


def _launch_int8(x: Tensor, w: Tensor, scales: Scales, epilogue: Epilogue, dtype: torch.dtype, backend: str) -> Output:
    y = apply_epilogue(_int8_product(x, w, *scales, backend), epilogue)
    return y.to(dtype), y.new_empty(0, dtype=torch.float32)


def _int8_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, backend: str) -> Tensor:
    """(x w^T) * x_scale * w_scale of int8 x [m, k] and w [n, k], in float32, by cuBLAS or by torchao."""
    if backend == TORCHAO:
        from torchao.kernel.intmm import int_scaled_matmul  # type: ignore[import-not-found]

        return int_scaled_matmul(x, w.t(), x_scale[:, None]).float() * w_scale
    product: Any = torch._int_mm  # pyright: ignore  (private, and there is no other)
    return product(x, w.t()).float() * x_scale[:, None] * w_scale
