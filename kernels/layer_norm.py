"""LayerNorm of rows, with a modulation and with quantisation to e4m3 in the same pass over memory.

    layer_norm             y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    layer_norm_modulate    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift
    quantize_rows          x8 = x / x_scale in e4m3, with x_scale = max |x| / 448 of each row
    layer_norm_fp8, layer_norm_modulate_fp8       quantize_rows of y, which is never written

x is [rows, columns]. Everything is computed in float32 and rounded once. One kernel serves all five: a program holds a
whole row in registers, so that the row is read once. The e4m3 results are operands of `kernels.linear`.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, MIN_SCALE, check, define_op, e4m3_scale, to_e4m3
from kernels.tuning import LaunchConfig, launch_config

DEFAULT_CONFIG: LaunchConfig = {"ROWS": 2, "num_warps": 8}


# --- Reference ------------------------------------------------------------------------------------------------------


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """LayerNorm(x) * (weight_offset + weight) + bias, in float32 or wider, not rounded to x's dtype."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(x_wide, x.shape[-1:], eps=eps) * (weight_offset + weight) + bias


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] in e4m3, and the float32 scale of each row."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (x_wide.abs().amax(1) / FP8_MAX).clamp_min(MIN_SCALE)
    return (x_wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale.float()


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def layer_norm_fwd(x, weight, bias, out, scale, eps, weight_offset, rows, columns, x_row, NORM: tl.constexpr,
                   FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Normalises ROWS rows of x if NORM, and quantises them if FP8. BLOCK columns, a power of two, hold a row."""
    offs = tl.arange(0, BLOCK)
    mask = offs < columns
    for i in range(ROWS):
        row = (tl.program_id(0) * ROWS + i).to(tl.int64)
        if row < rows:
            y = tl.load(x + row * x_row + offs, mask=mask, other=0.0).to(tl.float32)
            if NORM:
                y = tl.where(mask, y - tl.sum(y) / columns, 0.0)
                y *= tl.rsqrt(tl.sum(y * y) / columns + eps)
                # Weight and bias come from the cache for every row: in registers they would halve the occupancy.
                y *= weight_offset + tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
                y += tl.load(bias + offs, mask=mask, other=0.0).to(tl.float32)
            if FP8:
                row_scale = e4m3_scale(tl.max(tl.abs(y)))
                tl.store(scale + row, row_scale)
                y = to_e4m3(y * (1.0 / row_scale), out)
            tl.store(out + row * columns + offs, y.to(out.dtype.element_ty), mask=mask)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float, config: LaunchConfig | None = None
) -> Tensor:
    """LayerNorm(x) * (weight_offset + weight) + bias by the kernel, contiguous, in x's dtype."""
    return _launch(x, (weight, bias, eps, weight_offset), False, config)[0]


def launch_layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x) * (weight_offset + weight) + bias by the kernel, in e4m3, and the scale of each row."""
    return _launch(x, (weight, bias, eps, weight_offset), True, config)


def launch_quantize_rows(x: Tensor, config: LaunchConfig | None = None) -> tuple[Tensor, Tensor]:
    """x in e4m3 by the kernel, and the scale of each row."""
    return _launch(x, None, True, config)


def _launch(
    x: Tensor, norm: tuple[Tensor, Tensor, float, float] | None, fp8: bool, config: LaunchConfig | None
) -> tuple[Tensor, Tensor]:
    """Normalises x by (weight, bias, eps, weight_offset) and quantises it if `fp8`; the scales are empty if not.

    Triton's interpreter cannot round to e4m3, so on a CPU quantised results stay float32.
    """
    rows, columns = x.shape
    parameters = launch_config(
        "layer_norm_modulate" if norm else "quantize_rows", {"rows": rows, "columns": columns},
        "fp8" if fp8 else DTYPE_NAMES[x.dtype], x.device, default=DEFAULT_CONFIG, given=config,
    )  # fmt: skip
    out = x.new_empty(x.shape, dtype=(FP8 if x.is_cuda else torch.float32) if fp8 else x.dtype)
    scale = x.new_empty(rows if fp8 else 0, dtype=torch.float32)
    weight, bias, eps, weight_offset = norm or (x, x, 0.0, 0.0)
    layer_norm_fwd[(triton.cdiv(rows, parameters["ROWS"]),)](
        x, weight, bias, out, scale, eps, weight_offset, rows, columns, x.stride(0), NORM=norm is not None, FP8=fp8,
        BLOCK=triton.next_power_of_2(columns), **parameters,
    )  # fmt: skip
    return out, scale


# --- Operation ------------------------------------------------------------------------------------------------------


def _layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float) -> Tensor:
    return layer_norm_reference(x, weight, bias, eps, weight_offset).to(x.dtype)


def _layer_norm_fp8_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return quantize_reference(layer_norm_reference(x, weight, bias, eps, weight_offset))


layer_norm_op = define_op("layer_norm", cpu=_layer_norm_cpu, cuda=launch_layer_norm)
layer_norm_fp8_op = define_op("layer_norm_fp8", cpu=_layer_norm_fp8_cpu, cuda=launch_layer_norm_fp8)
quantize_rows_op = define_op("quantize_rows", cpu=quantize_reference, cuda=launch_quantize_rows)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Mean and population variance are those of a row, computed in float32; the result is rounded once.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.
        weight: [columns], float32, float16 or bfloat16, contiguous.
        bias: [columns], float32, float16 or bfloat16, contiguous.
        eps: added to the variance.

    Returns:
        [rows, columns] in x's dtype, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_rows(x, weight=weight, bias=bias)
    return layer_norm_op(x, weight, bias, eps, 0.0)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last axis, quantised by row to e4m3.

    With y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias in float32, the results are y8 = y / y_scale in e4m3
    and y_scale = max |y| / 448 of each row, at least 1e-12; y8 * y_scale approximates y.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.
        weight: [columns], float32, float16 or bfloat16, contiguous.
        bias: [columns], float32, float16 or bfloat16, contiguous.
        eps: added to the variance.

    Returns:
        y8, float8_e4m3fn [rows, columns], contiguous; y_scale, float32 [rows].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_rows(x, weight=weight, bias=bias)
    return layer_norm_fp8_op(x, weight, bias, eps, 0.0)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last axis, modulated as in DiT: (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift.

    Mean and population variance are those of a row, computed in float32; the result is rounded once.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.
        shift: [columns], float32, float16 or bfloat16, contiguous.
        scale: [columns], float32, float16 or bfloat16, contiguous.
        eps: added to the variance.

    Returns:
        [rows, columns] in x's dtype, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_rows(x, shift=shift, scale=scale)
    return layer_norm_op(x, scale, shift, eps, 1.0)


def layer_norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last axis, modulated as in DiT and quantised by row to e4m3.

    With y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift in float32, the results are y8 = y / y_scale in
    e4m3 and y_scale = max |y| / 448 of each row, at least 1e-12; y8 * y_scale approximates y.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.
        shift: [columns], float32, float16 or bfloat16, contiguous.
        scale: [columns], float32, float16 or bfloat16, contiguous.
        eps: added to the variance.

    Returns:
        y8, float8_e4m3fn [rows, columns], contiguous; y_scale, float32 [rows].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_rows(x, shift=shift, scale=scale)
    return layer_norm_fp8_op(x, scale, shift, eps, 1.0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises every row of x to e4m3: x8 = x / x_scale with x_scale = max |x| / 448 of the row, at least 1e-12.

    x8 * x_scale approximates x to 4 significant bits. A row of zeros stays zero.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.

    Returns:
        x8, float8_e4m3fn [rows, columns], contiguous; x_scale, float32 [rows].

    Raises:
        ValueError: x has another shape, dtype or stride, or requires a gradient.
    """
    _check_rows(x)
    return quantize_rows_op(x)


def _check_rows(x: Tensor, **vectors: Tensor) -> None:
    """Raises ValueError unless x is [rows, columns], and the vectors, by their arguments' names, are [columns]."""
    check("x", x, shape=("rows", "columns"), dtype=DTYPE_NAMES, layout="rows")
    for name, vector in vectors.items():
        check(name, vector, shape=x.shape[1:], dtype=DTYPE_NAMES, device=x.device, layout="contiguous")
