"""LayerNorm of rows, with a modulation and with quantisation to 8 bits in the same pass over memory.

    layer_norm             y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    layer_norm_modulate    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift
    quantize_rows          x8 = x / x_scale in e4m3, with x_scale = max |x| / 448 of each row
    quantize_rows_int8     x8 = rotate(x) / x_scale in int8, with x_scale = max |rotate(x)| / 127 of each row
    layer_norm_fp8, layer_norm_modulate_fp8       quantize_rows of y, which is never written
    layer_norm_int8, layer_norm_modulate_int8     quantize_rows_int8 of y

x is [rows, columns]; `rotate` is that of kernels/rotation.py. Everything is computed in float32 and rounded once. One
kernel serves all: a program holds a whole row in registers, so that the row is read once. The quantised results are
operands of `kernels.linear`.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import (
    DTYPE_NAMES,
    FP8,
    FP8_MAX,
    INT8_MAX,
    MIN_SCALE,
    QUANTIZED_NAMES,
    check,
    define_op,
    e4m3_scale,
    to_e4m3,
)
from kernels.rotation import rotate, rotate_row, rotation_block
from kernels.tuning import LaunchConfig, launch_config

DEFAULT_CONFIG: LaunchConfig = {"ROWS": 2, "num_warps": 8}
# Rotating takes twice the registers, so that int8 needs more warps for a row.
INT8_CONFIG: LaunchConfig = {"ROWS": 1, "num_warps": 16}
WIDE_INT8_CONFIG: LaunchConfig = {"ROWS": 1, "num_warps": 32}  # of more than 8,192 columns


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


def quantize_to_bound(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, ...] in e4m3 with the same scale for all rows, bound / 448, and that scale of each row, float32.

    What exceeds the bound saturates.
    """
    scale = (bound.float() / FP8_MAX).clamp_min(MIN_SCALE)
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x_wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale.repeat(len(x))


def quantize_int8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns], rotated, in int8, and the float32 scale of each row."""
    rotated = rotate(x)
    scale = (rotated.abs().amax(1) / INT8_MAX).clamp_min(MIN_SCALE)
    return (rotated / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale.float()


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def round_to_int8(x):
    """x of at most 127 in magnitude, rounded to the nearest integer, ties to even.

    1.5 x 2^23 + x has the integer in its lowest bits. One addition rounds at full rate; conversions run at a quarter.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def layer_norm_fwd(x, weight, bias, out, scale, eps, weight_offset, rows, columns, x_row, NORM: tl.constexpr,
                   FP8: tl.constexpr, ROTATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Normalises ROWS rows of x if NORM, and quantises them: to e4m3 if FP8, to int8 if there is a ROTATION.

    BLOCK columns, a power of two, hold a row. ROTATION is the number of columns that are rotated together, or 0.
    """
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
            if ROTATION:
                y = rotate_row(y, ROTATION)
                row_scale = tl.maximum(tl.max(tl.abs(y)) / 127.0, 1e-12)
                tl.store(scale + row, row_scale)
                y = round_to_int8(y * (1.0 / row_scale))
            tl.store(out + row * columns + offs, y.to(out.dtype.element_ty), mask=mask)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float, config: LaunchConfig | None = None
) -> Tensor:
    """LayerNorm(x) * (weight_offset + weight) + bias by the kernel, contiguous, in x's dtype."""
    return _launch(x, (weight, bias, eps, weight_offset), x.dtype, config)[0]


def launch_layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x) * (weight_offset + weight) + bias by the kernel, in e4m3, and the scale of each row."""
    return _launch(x, (weight, bias, eps, weight_offset), FP8, config)


def launch_layer_norm_int8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x) * (weight_offset + weight) + bias by the kernel, rotated, in int8, and the scale of each row."""
    return _launch(x, (weight, bias, eps, weight_offset), torch.int8, config)


def launch_quantize_rows(x: Tensor, config: LaunchConfig | None = None) -> tuple[Tensor, Tensor]:
    """x in e4m3 by the kernel, and the scale of each row."""
    return _launch(x, None, FP8, config)


def launch_quantize_rows_int8(x: Tensor, config: LaunchConfig | None = None) -> tuple[Tensor, Tensor]:
    """x, rotated, in int8 by the kernel, and the scale of each row."""
    return _launch(x, None, torch.int8, config)


def _launch(
    x: Tensor, norm: tuple[Tensor, Tensor, float, float] | None, dtype: torch.dtype, config: LaunchConfig | None
) -> tuple[Tensor, Tensor]:
    """Normalises x by (weight, bias, eps, weight_offset) and quantises it if `dtype` is e4m3 or int8.

    Without quantisation, the scales are empty. Triton's interpreter cannot round to e4m3, so on a CPU such results stay
    float32.
    """
    rows, columns = x.shape
    quantised = dtype in QUANTIZED_NAMES
    parameters = launch_config(
        "layer_norm_modulate" if norm else "quantize_rows", {"rows": rows, "columns": columns},
        QUANTIZED_NAMES[dtype] if quantised else DTYPE_NAMES[dtype], x.device,
        default=_default_config(dtype, columns), given=config,
    )  # fmt: skip
    out = x.new_empty(x.shape, dtype=torch.float32 if dtype == FP8 and not x.is_cuda else dtype)
    scale = x.new_empty(rows if quantised else 0, dtype=torch.float32)
    weight, bias, eps, weight_offset = norm or (x, x, 0.0, 0.0)
    layer_norm_fwd[(triton.cdiv(rows, parameters["ROWS"]),)](
        x, weight, bias, out, scale, eps, weight_offset, rows, columns, x.stride(0), NORM=norm is not None,
        FP8=dtype == FP8, ROTATION=rotation_block(columns) if dtype == torch.int8 else 0,
        BLOCK=triton.next_power_of_2(columns), **parameters,
    )  # fmt: skip
    return out, scale


def _default_config(dtype: torch.dtype, columns: int) -> LaunchConfig:
    """Launch parameters where nothing was tuned, for results in `dtype`."""
    if dtype != torch.int8:
        return DEFAULT_CONFIG
    return INT8_CONFIG if columns <= 8192 else WIDE_INT8_CONFIG


# --- Operation ------------------------------------------------------------------------------------------------------


def _layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float) -> Tensor:
    return layer_norm_reference(x, weight, bias, eps, weight_offset).to(x.dtype)


def _layer_norm_fp8_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return quantize_reference(layer_norm_reference(x, weight, bias, eps, weight_offset))


def _layer_norm_int8_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return quantize_int8_reference(layer_norm_reference(x, weight, bias, eps, weight_offset))


layer_norm_op = define_op("layer_norm", cpu=_layer_norm_cpu, cuda=launch_layer_norm)
layer_norm_fp8_op = define_op("layer_norm_fp8", cpu=_layer_norm_fp8_cpu, cuda=launch_layer_norm_fp8)
layer_norm_int8_op = define_op("layer_norm_int8", cpu=_layer_norm_int8_cpu, cuda=launch_layer_norm_int8)
quantize_rows_op = define_op("quantize_rows", cpu=quantize_reference, cuda=launch_quantize_rows)
quantize_rows_int8_op = define_op("quantize_rows_int8", cpu=quantize_int8_reference, cuda=launch_quantize_rows_int8)


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


def layer_norm_int8(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last axis, rotated and quantised by row to int8.

    With y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias in float32 and
    r = `kernels.rotation.rotate(y)`, the results are r8 = r / r_scale in int8 and r_scale = max |r| / 127 of each row,
    at least 1e-12; r8 * r_scale approximates r.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.
        weight: [columns], float32, float16 or bfloat16, contiguous.
        bias: [columns], float32, float16 or bfloat16, contiguous.
        eps: added to the variance.

    Returns:
        r8, int8 [rows, columns], contiguous; r_scale, float32 [rows].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_rows(x, weight=weight, bias=bias)
    return layer_norm_int8_op(x, weight, bias, eps, 0.0)


def layer_norm_modulate_int8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last axis, modulated as in DiT, rotated and quantised by row to int8.

    With y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift in float32 and
    r = `kernels.rotation.rotate(y)`, the results are r8 = r / r_scale in int8 and r_scale = max |r| / 127 of each row,
    at least 1e-12; r8 * r_scale approximates r.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.
        shift: [columns], float32, float16 or bfloat16, contiguous.
        scale: [columns], float32, float16 or bfloat16, contiguous.
        eps: added to the variance.

    Returns:
        r8, int8 [rows, columns], contiguous; r_scale, float32 [rows].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    _check_rows(x, shift=shift, scale=scale)
    return layer_norm_int8_op(x, scale, shift, eps, 1.0)


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


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates every row of x and quantises it to int8: r8 = r / r_scale with r = `kernels.rotation.rotate(x)`.

    r_scale = max |r| / 127 of each row, at least 1e-12. r8 * r_scale approximates r; a row of zeros stays zero. The
    product of two such matrices approximates that of the matrices before the rotation.

    Args:
        x: [rows, columns], float32, float16 or bfloat16. The values of a row are adjacent, rows any stride apart.

    Returns:
        r8, int8 [rows, columns], contiguous; r_scale, float32 [rows].

    Raises:
        ValueError: x has another shape, dtype or stride, or requires a gradient.
    """
    _check_rows(x)
    return quantize_rows_int8_op(x)


def _check_rows(x: Tensor, **vectors: Tensor) -> None:
    """Raises ValueError unless x is [rows, columns], and the vectors, by their arguments' names, are [columns]."""
    check("x", x, shape=("rows", "columns"), dtype=DTYPE_NAMES, layout="rows")
    for name, vector in vectors.items():
        check(name, vector, shape=x.shape[1:], dtype=DTYPE_NAMES, device=x.device, layout="contiguous")
