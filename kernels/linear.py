"""Linear layers in FP8, INT8 and 16 bits with a fused epilogue: y = epilogue(x w^T).

    linear         y = x w^T                                       x [m, k], w [n, k], as in nn.Linear
    linear_fp8     y = (x8 w8^T) * x_scale * w_scale               e4m3, with a scale for each row of x and of w
    linear_int8    the same of int8 operands                       both rotated, which leaves y as it is
    epilogue       + bias, then tanh-GELU or * gate [n], then + residual [m, n]; every part is optional

Products are accumulated in float32, those of int8 exactly in int32. The epilogue is computed in float32, and the result
is rounded once, except by cuBLAS in 16 bits, which rounds the product first. FP8 and INT8 operands come from
`kernels.layer_norm` (`layer_norm_modulate_fp8`, `layer_norm_fp8`, `quantize_rows`, and the same of int8): the scale of
a row is its largest magnitude / 448 or / 127. A row of w is an output channel. kernels/rotation.py says what the
rotation of int8 operands is good for.

`linear_fp8_quantized` rounds its output to e4m3 for the next layer. The largest value of an output row is known only
when all its columns are done, so the scale comes from an upper bound instead, and nothing ever saturates:

    |y[i, j]| <= sum_k |x[i, k]| |w[j, k]| + |bias[j]| <= 448 x_scale[i] max_j |w[j]|_1 + max_j |bias[j]|
    y_scale[i] = x_scale[i] * bound[0] + bound[1]                  `output_bound` computes the two numbers of a layer

GELU makes no magnitude larger. The unused range costs no precision: e4m3 keeps 4 bits over a range of 2^15, and the
bound is 2^6 to 2^11 above the largest magnitude of a row.

Back-ends: on a CPU `reference`; on a GPU the Triton kernel of this file, the Hopper kernel of kernels/linear_sm90.py,
the library (cuBLAS), or torchao where it is installed, whichever kernels/tuned/ names for the shape. The Triton kernel
reads its operands by tensor descriptors where Triton overlaps such loads with products, and by pointers elsewhere.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import linear_sm90
from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, INT8_MAX, MIN_SCALE, QUANTIZED_NAMES, check, define_op
from kernels.layer_norm import quantize_rows, quantize_rows_int8
from kernels.linear_epilogue import (
    FP32_ACCUM_MIN_K,
    Epilogue,
    Output,
    Scales,
    apply_epilogue,
    check_epilogue,
    epilogue_arguments,
    quantize_output,
    store_tile,
)
from kernels.linear_library import TORCHAO, launch_library, launch_torchao, libraries
from kernels.linear_sm90 import supports
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, reads_by_pointers, tuned_config, untuned_config

# Launch parameters of the Triton kernel for shapes that were not tuned.
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
FP8_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
FP8_ACC32_CONFIG: LaunchConfig = {
    "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "FP32_ACCUM": 1, "num_warps": 8, "num_stages": 4
}  # fmt: skip
SMALL_8BIT_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
MAX_INT8_TERMS = int((2**31 - 1) // INT8_MAX**2)  # of a sum that int32 holds whatever the operands
COMBINE_ROWS = 16  # rows of a tile that a program of `combine_linear_partials` adds up

__all__ = [
    "Epilogue",
    "dequantize",
    "linear",
    "linear_fp8",
    "linear_fp8_quantized",
    "linear_int8",
    "output_bound",
    "quantize_rows",
    "quantize_rows_int8",
]

# --- Reference ------------------------------------------------------------------------------------------------------


def reference(x: Tensor, w: Tensor, scales: Scales | None, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """epilogue(x w^T) in `dtype`, ignoring `epilogue.bound`.

    Computed in float32, or in float64 if the scales, or x where there are none, are float64.
    """
    wide = torch.promote_types(torch.float32, x.dtype if scales is None else scales[0].dtype)
    y = x.to(wide) @ w.to(wide).T
    if scales:
        y = y * scales[0][:, None] * scales[1]
    return apply_epilogue(y, epilogue).to(dtype)


def output_bound(w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The constants of a layer from which `linear_fp8_quantized` computes the scales of its e4m3 output.

    bound[0] = max_j w_scale[j] * sum_k |w[j, k]| and bound[1] = max_j |bias[j]| / 448, at least 1e-12. With
    y_scale[i] = x_scale[i] * bound[0] + bound[1], no |y[i, j]| exceeds 448 * y_scale[i].

    Args:
        w: float8_e4m3fn [n, k].
        w_scale: float32 [n].
        bias: [n], or None.

    Returns:
        float32 [2].
    """
    weight_bound = w.float().abs().sum(1).mul(w_scale).amax()
    bias_bound = bias.float().abs().amax() / FP8_MAX if bias is not None else torch.zeros_like(weight_bound)
    return torch.stack((weight_bound, bias_bound.clamp_min(MIN_SCALE)))


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale of e4m3 or int8 values [rows, columns] and the scales [rows] of their rows, in the scales' dtype.

    Int8 values that were rotated stay so.
    """
    return values.to(scale.dtype) * scale[:, None]


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(x, row, column, rows, columns, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              POINTERS: tl.constexpr):  # fmt: skip
    """The tile at (row, column) of x [rows, columns], a descriptor or a pointer; zeros follow the last column.

    What is read in place of rows beyond the last one does not matter: nothing of it is stored.
    """
    if POINTERS:
        offs_m = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        offs_k = column + tl.arange(0, COLUMNS)
        tile = tl.load(x + offs_m[:, None] * x_row + offs_k[None, :], mask=(offs_k < columns)[None, :], other=0.0)
    else:
        tile = x.load([row, column])
    return tile


@triton.jit(do_not_specialize=["m", "n"])
def linear_fwd(x, w, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, m, n, k, x_row,
               w_row, y_row, residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
               RESIDUAL: tl.constexpr, GATED: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr, FP32_ACCUM: tl.constexpr,
               INT8: tl.constexpr, POINTERS: tl.constexpr):  # fmt: skip
    """Computes one output tile. x and w are tensor descriptors, or pointers if POINTERS.

    Tiles are ordered row by row within groups of GROUP_N tile columns, so that programs which run at the same time
    share tiles of w in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    first_n = tile // (GROUP_N * tiles_m) * GROUP_N
    group_n = tl.minimum(tiles_n - first_n, GROUP_N)
    tile %= GROUP_N * tiles_m
    start_m, start_n = tile // group_n * BLOCK_M, (first_n + tile % group_n) * BLOCK_N
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for start_k in tl.range(0, k, BLOCK_K):
        a = load_tile(x, start_m, start_k, m, k, x_row, BLOCK_M, BLOCK_K, POINTERS)
        b = load_tile(w, start_n, start_k, n, k, w_row, BLOCK_N, BLOCK_K, POINTERS)
        if FP32_ACCUM:
            acc += tl.dot(a, b.T, input_precision="ieee", out_dtype=SUM)
        else:
            acc = tl.dot(a, b.T, acc, input_precision="ieee", out_dtype=SUM)
    # The epilogue runs on one half of the tile after the other; on the whole tile it would run out of registers.
    left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N // 2)
    store_tile(left, offs_m, offs_n, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, y_row,
               residual_row, SCALED, BIAS, GELU, RESIDUAL, GATED, QUANTIZE)  # fmt: skip
    store_tile(right, offs_m, offs_n + BLOCK_N // 2, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate,
               y_row, residual_row, SCALED, BIAS, GELU, RESIDUAL, GATED, QUANTIZE)  # fmt: skip


@triton.jit(do_not_specialize=["m", "n"])
def combine_linear_partials(partials, combines, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, m, n, y_row,
                            residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
                            RESIDUAL: tl.constexpr, GATED: tl.constexpr, QUANTIZE: tl.constexpr, TILE: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds up the partials of BLOCK_M rows of a tile [TILE, BLOCK_N], in order, and applies the epilogue.

    `combines` has five integers for each split tile, see `kernels.scheduler.StreamKSchedule`.
    """
    combine = combines + 5 * tl.program_id(0)
    start_n, start_m = tl.load(combine) * BLOCK_N, tl.load(combine + 1)
    first, count = tl.load(combine + 3).to(tl.int64), tl.load(combine + 4)
    offs_m, offs_n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(count):
        acc += tl.load(partials + ((first + i) * TILE + offs_m)[:, None] * BLOCK_N + offs_n[None, :])
    store_tile(acc, start_m + offs_m, start_n + offs_n, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate,
               y_row, residual_row, SCALED, BIAS, GELU, RESIDUAL, GATED, QUANTIZE)  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_triton(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """epilogue(x w^T) by the Triton kernel."""
    (m, k), n = x.shape, len(w)
    by_pointers = reads_by_pointers(x, w)
    default = {"GROUP_N": 8, "FP32_ACCUM": 0, "POINTERS": int(by_pointers)}
    parameters: dict[str, Any] = {**default, **(config or _default_config(x, by_pointers))}
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    y, y_scale = _empty_output(x, n, epilogue, dtype)
    operands = (x, w)
    if not parameters["POINTERS"]:
        operands = (
            TensorDescriptor(t, list(t.shape), list(t.stride()), [block, block_k])
            for t, block in ((x, block_m), (w, block_n))
        )
    epilogue_pointers, strides, flags = epilogue_arguments(y, y_scale, scales, epilogue)
    linear_fwd[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        *operands, *epilogue_pointers, m, n, k, x.stride(0), w.stride(0), *strides, **flags, INT8=x.dtype == torch.int8,
        **parameters,
    )  # fmt: skip
    return y, y_scale


def _default_config(x: Tensor, by_pointers: bool) -> LaunchConfig:
    """Launch parameters of the Triton kernel where nothing was tuned, for operands like x [rows, terms]."""
    if x.dtype in QUANTIZED_NAMES:
        long = x.shape[1] >= FP32_ACCUM_MIN_K and x.dtype == FP8
        small = x.dtype == torch.int8 or by_pointers
        config = FP8_ACC32_CONFIG if long else SMALL_8BIT_CONFIG if small else FP8_CONFIG
    else:
        config = FP32_CONFIG if x.dtype == torch.float32 else BF16_CONFIG
    name = {**QUANTIZED_NAMES, **DTYPE_NAMES}[x.dtype]
    return {**config, **untuned_config("linear", name, x.device)}


def launch_sm90(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """epilogue(x w^T) by the Hopper kernel; tiles that it split along k are combined by a second kernel."""
    config = config or {"FP32_ACCUM": int(x.dtype == FP8 and x.shape[1] >= FP32_ACCUM_MIN_K)}
    y, y_scale, schedule, partials = linear_sm90.launch(x, w, scales, *epilogue, dtype=dtype, config=config)
    if len(schedule.combines):
        pointers, strides, flags = epilogue_arguments(y, y_scale, scales, epilogue)
        tile, block_n = len(partials) // schedule.num_partials, partials.shape[1]
        combine_linear_partials[(len(schedule.combines), tile // COMBINE_ROWS)](
            partials, schedule.combines, *pointers, *y.shape, *strides, **flags, TILE=tile, BLOCK_M=COMBINE_ROWS,
            BLOCK_N=block_n,
        )  # fmt: skip
    return y, y_scale


def _empty_output(x: Tensor, n: int, epilogue: Epilogue, dtype: torch.dtype) -> Output:
    """Memory for y and its scales. On a CPU e4m3 outputs are float32: Triton's interpreter cannot round to e4m3."""
    quantize = epilogue.bound is not None
    y = x.new_empty(len(x), n, dtype=(FP8 if x.is_cuda else torch.float32) if quantize else dtype)
    return y, x.new_empty(len(x) if quantize else 0, dtype=torch.float32)


BACKENDS: Mapping[str, Callable[..., Output]] = {
    "gluon": launch_sm90,
    "triton": launch_triton,
    "library": launch_library,
    TORCHAO: launch_torchao,
}


def dispatch(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    tuned: TunedConfig | None = None,
) -> Output:
    """epilogue(x w^T) by the back-end `tuned`, or else by the one that kernels/tuned/ names for the shape.

    Untuned shapes use the library in 16 bits and the Triton kernel in FP8 and INT8. Tuning measures products with a
    bias only; other epilogues cost libraries further passes over the output, so they are not considered for them.
    """
    dims = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
    backends = ["gluon", "triton", *libraries(x, w, epilogue, dtype)]
    name = QUANTIZED_NAMES[x.dtype] if scales else DTYPE_NAMES[x.dtype]
    tuned = tuned or tuned_config("linear", dims, name, x.device, backends=backends)
    backend = tuned.backend if tuned is not None else "triton" if scales else "library"
    if backend == "gluon" and not (gpu_of(x.device).capability == "9.0" and supports(x, w, dtype, epilogue.residual)):
        backend = "triton"
    config = tuned.config if tuned is not None and tuned.backend == backend else None
    return BACKENDS[backend](x, w, scales, epilogue, dtype, config or None)


# --- Operation ------------------------------------------------------------------------------------------------------


def _linear_cpu(
    x: Tensor, w: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    return reference(x, w, None, Epilogue(bias, gelu, gate, residual), x.dtype)


def _linear_cuda(
    x: Tensor, w: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    return dispatch(x, w, None, Epilogue(bias, gelu, gate, residual), x.dtype)[0]


def _linear_scaled_cpu(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return reference(x, w, (x_scale, w_scale), Epilogue(bias, gelu, gate, residual), dtype)


def _linear_scaled_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dispatch(x, w, (x_scale, w_scale), Epilogue(bias, gelu, gate, residual), dtype)[0]


def _linear_fp8_quantized_cpu(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> Output:
    y = reference(x, w, (x_scale, w_scale), Epilogue(bias, gelu), torch.float32)
    return quantize_output(y, x_scale, bound)


def _linear_fp8_quantized_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> Output:
    return dispatch(x, w, (x_scale, w_scale), Epilogue(bias, gelu, bound=bound), FP8)


linear_op = define_op("linear", cpu=_linear_cpu, cuda=_linear_cuda)
linear_fp8_op = define_op("linear_fp8", cpu=_linear_scaled_cpu, cuda=_linear_scaled_cuda)
linear_int8_op = define_op("linear_int8", cpu=_linear_scaled_cpu, cuda=_linear_scaled_cuda)
linear_fp8_quantized_op = define_op(
    "linear_fp8_quantized", cpu=_linear_fp8_quantized_cpu, cuda=_linear_fp8_quantized_cuda
)

Activation = Literal["gelu_tanh"] | None


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer with its epilogue: residual + gate * activation(x w^T + bias), with every part but x w^T optional.

    Products are accumulated in float32. The epilogue is computed in float32 and the result is rounded once by our
    kernels; cuBLAS, which is the default in 16 bits, rounds the product first, and GELU.

    Args:
        x: [m, k], float32, float16 or bfloat16. The values of a row are adjacent, rows a multiple of 16 bytes apart.
        w: [n, k], in x's dtype, laid out like x.
        bias: [n], float32, float16 or bfloat16.
        activation: "gelu_tanh", the tanh approximation of GELU, or None.
        gate: float32 [n]; not together with an activation.
        residual: [m, n] in x's dtype. The values of a row are adjacent.

    Returns:
        [m, n] in x's dtype, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    gelu = _is_gelu(activation)
    _check_operand("x", x, ("rows", "columns"), DTYPE_NAMES, x.device)
    _check_operand("w", w, ("outputs", x.shape[1]), (x.dtype,), x.device)
    check_epilogue(x, w, Epilogue(bias, gelu, gate, residual), x.dtype)
    return linear_op(x, w, bias, gelu, gate, residual)


def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear layer of e4m3 operands: residual + gate * activation((x w^T) * x_scale * w_scale + bias).

    Every part but the scaled product is optional. Products are accumulated and the epilogue is computed in float32; the
    result is rounded once. `kernels.layer_norm.quantize_rows` makes e4m3 operands and their scales.

    Args:
        x: float8_e4m3fn [m, k]. The values of a row are adjacent, rows a multiple of 16 bytes apart.
        x_scale: float32 [m], the scale of each row of x, contiguous.
        w: float8_e4m3fn [n, k], laid out like x.
        w_scale: float32 [n], the scale of each row of w, contiguous.
        bias: [n], float32, float16 or bfloat16.
        activation: "gelu_tanh", the tanh approximation of GELU, or None.
        gate: float32 [n]; not together with an activation.
        residual: [m, n] in `dtype`. The values of a row are adjacent.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [m, n] in `dtype`, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    gelu = _is_gelu(activation)
    _check_quantized(x, x_scale, w, w_scale, FP8)
    check_epilogue(x, w, Epilogue(bias, gelu, gate, residual), dtype)
    return linear_fp8_op(x, x_scale, w, w_scale, bias, gelu, gate, residual, dtype)


def linear_int8(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear layer of int8 operands: residual + gate * activation((x w^T) * x_scale * w_scale + bias).

    Every part but the scaled product is optional. Products are summed exactly in int32, then rounded to float32. The
    epilogue is computed in float32, and the result is rounded once. `kernels.layer_norm.quantize_rows_int8` makes
    rotated int8 operands and their scales; either both operands are rotated, or neither.

    Args:
        x: int8 [m, k], k at most 133,144. The values of a row are adjacent, rows a multiple of 16 bytes apart.
        x_scale: float32 [m], the scale of each row of x, contiguous.
        w: int8 [n, k], laid out like x.
        w_scale: float32 [n], the scale of each row of w, contiguous.
        bias: [n], float32, float16 or bfloat16.
        activation: "gelu_tanh", the tanh approximation of GELU, or None.
        gate: float32 [n]; not together with an activation.
        residual: [m, n] in `dtype`. The values of a row are adjacent.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [m, n] in `dtype`, contiguous.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    gelu = _is_gelu(activation)
    _check_quantized(x, x_scale, w, w_scale, torch.int8)
    if x.shape[1] > MAX_INT8_TERMS:
        raise ValueError(f"x: {x.shape[1]} columns, wanted at most {MAX_INT8_TERMS}, of which int32 holds the sum")
    check_epilogue(x, w, Epilogue(bias, gelu, gate, residual), dtype)
    return linear_int8_op(x, x_scale, w, w_scale, bias, gelu, gate, residual, dtype)


def linear_fp8_quantized(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bound: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> tuple[Tensor, Tensor]:
    """A linear layer of e4m3 operands with an e4m3 result: y = activation((x w^T) * x_scale * w_scale + bias).

    The results are y8 = y / y_scale in e4m3 and y_scale[i] = x_scale[i] * bound[0] + bound[1]. With `output_bound`,
    |y| / y_scale is at most 448, so that nothing saturates. Products are accumulated and the epilogue is computed in
    float32. `kernels.layer_norm.quantize_rows` makes e4m3 operands and their scales.

    Args:
        x: float8_e4m3fn [m, k]. The values of a row are adjacent, rows a multiple of 16 bytes apart.
        x_scale: float32 [m], the scale of each row of x, contiguous.
        w: float8_e4m3fn [n, k], laid out like x.
        w_scale: float32 [n], the scale of each row of w, contiguous.
        bound: float32 [2], `output_bound(w, w_scale, bias)`.
        bias: [n], float32, float16 or bfloat16.
        activation: "gelu_tanh", the tanh approximation of GELU, or None.

    Returns:
        y8, float8_e4m3fn [m, n], contiguous; y_scale, float32 [m].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or requires a gradient.
    """
    gelu = _is_gelu(activation)
    _check_quantized(x, x_scale, w, w_scale, FP8)
    check_epilogue(x, w, Epilogue(bias, gelu, bound=bound), FP8)
    return linear_fp8_quantized_op(x, x_scale, w, w_scale, bound, bias, gelu)


def _is_gelu(activation: Activation) -> bool:
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"activation: {activation!r}, wanted 'gelu_tanh' or None")
    return activation is not None


def _check_operand(
    name: str, x: Tensor, shape: Sequence[int | str], dtypes: Collection[torch.dtype], device: torch.device
) -> None:
    """Raises ValueError unless x is such a matrix, with rows that TMA and 16-byte loads can read."""
    check(name, x, shape=shape, dtype=dtypes, device=device)
    if x.stride(1) != 1 or x.stride(0) * x.itemsize % 16:
        raise ValueError(f"{name}: strides {x.stride()}, wanted contiguous rows, a multiple of 16 bytes apart")


def _check_quantized(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless x and w are operands in `dtype` that go together, with a scale for each row."""
    _check_operand("x", x, ("rows", "columns"), (dtype,), x.device)
    _check_operand("w", w, ("outputs", x.shape[1]), (dtype,), x.device)
    for name, scale, rows in (("x_scale", x_scale, len(x)), ("w_scale", w_scale, len(w))):
        check(name, scale, shape=(rows,), dtype=torch.float32, device=x.device, layout="contiguous")
