"""Linear layers in FP8 and in 16 bits with a fused epilogue: y = epilogue(x w^T).

    linear         y = x w^T                                       x [m, k], w [n, k], as in nn.Linear
    linear_fp8     y = (x8 w8^T) * x_scale * w_scale               e4m3, with a scale for each row of x and of w
    epilogue       + bias, then tanh-GELU or * gate [n], then + residual [m, n]; every part is optional

Products are accumulated and the epilogue is computed in float32, and the result is rounded once. FP8 operands come from
`kernels.layer_norm` (`layer_norm_modulate_fp8`, `layer_norm_fp8`, `quantize_rows`): the scale of a row is its largest
magnitude / 448. A row of w is an output channel.

`linear_fp8_quantized` rounds its output to e4m3 for the next layer. The largest value of an output row is known only
when all its columns are done, so the scale comes from an upper bound instead, and nothing ever saturates:

    |y[i, j]| <= sum_k |x[i, k]| |w[j, k]| + |bias[j]| <= 448 x_scale[i] max_j |w[j]|_1 + max_j |bias[j]|
    y_scale[i] = x_scale[i] * bound[0] + bound[1]                  `output_bound` computes the two numbers of a layer

GELU makes no magnitude larger. The unused range costs no precision: e4m3 keeps 4 bits over a range of 2^15, and the
bound is 2^6 to 2^11 above the largest magnitude of a row.

Back-ends: on a CPU `reference`; on a GPU the Triton kernel of this file, the Hopper kernel of kernels/linear_sm90.py,
or the library (cuBLAS), whichever kernels/tuned/ names for the shape.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import linear_sm90
from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, MIN_SCALE, check, define_op, to_e4m3
from kernels.layer_norm import quantize_rows
from kernels.linear_sm90 import supports
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, tuned_config

# Launch parameters of the Triton kernel for shapes that were not tuned.
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
FP8_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
FP8_ACC32_CONFIG: LaunchConfig = {
    "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "FP32_ACCUM": 1, "num_warps": 8, "num_stages": 4
}  # fmt: skip
FP32_ACCUM_MIN_K = 8192  # untuned FP8 products of this many terms or more are accumulated outside of the tensor cores
COMBINE_ROWS = 16  # rows of a tile that a program of `combine_linear_partials` adds up


class Epilogue(NamedTuple):
    """What is applied to x w^T, in this order; None or False leaves a part out."""

    bias: Tensor | None = None  # [n]
    gelu: bool = False
    gate: Tensor | None = None  # float32 [n]
    residual: Tensor | None = None  # [m, n], in the output's dtype
    bound: Tensor | None = None  # float32 [2]: makes the output e4m3


Scales = tuple[Tensor, Tensor]  # of x [m] and of w [n], float32


__all__ = ["Epilogue", "dequantize", "linear", "linear_fp8", "linear_fp8_quantized", "output_bound", "quantize_rows"]

# --- Reference ------------------------------------------------------------------------------------------------------


def reference(x: Tensor, w: Tensor, scales: Scales | None, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """epilogue(x w^T) in `dtype`, ignoring `epilogue.bound`.

    Computed in float32, or in float64 if the scales, or x where there are none, are float64.
    """
    wide = torch.promote_types(torch.float32, x.dtype if scales is None else scales[0].dtype)
    y = x.to(wide) @ w.to(wide).T
    if scales:
        y = y * scales[0][:, None] * scales[1]
    return _apply_epilogue(y, epilogue).to(dtype)


def _apply_epilogue(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Bias, GELU, gate and residual, in y's precision."""
    if epilogue.bias is not None:
        y = y + epilogue.bias
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    elif epilogue.gate is not None:
        y = y * epilogue.gate
    return y if epilogue.residual is None else y + epilogue.residual


def _quantize_output(y: Tensor, x_scale: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """float32 y in e4m3, with the scales that follow from `output_bound`."""
    y_scale = x_scale * bound[0] + bound[1]
    return (y / y_scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), y_scale


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
    """values * scale of e4m3 values [rows, columns] and the scales [rows] of their rows, in the scales' dtype."""
    return values.to(scale.dtype) * scale[:, None]


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def store_tile(acc, offs_m, offs_n, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, y_row,
               residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
               GATED: tl.constexpr, QUANTIZE: tl.constexpr):  # fmt: skip
    """Applies the epilogue to the sums acc [offs_m, offs_n] and stores the result in y."""
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


@triton.jit(do_not_specialize=["m", "n"])
def linear_fwd(x_desc, w_desc, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, m, n, k, y_row,
               residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
               GATED: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr, FP32_ACCUM: tl.constexpr):  # fmt: skip
    """Computes one output tile. The tensor descriptors read zeros beyond the ends of x and w.

    Tiles are ordered row by row within groups of GROUP_N tile columns, so that programs which run at the same time
    share tiles of w in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    first_n = tile // (GROUP_N * tiles_m) * GROUP_N
    group_n = tl.minimum(tiles_n - first_n, GROUP_N)
    tile %= GROUP_N * tiles_m
    start_m, start_n = tile // group_n * BLOCK_M, (first_n + tile % group_n) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in tl.range(0, k, BLOCK_K):
        a, b = x_desc.load([start_m, start_k]), w_desc.load([start_n, start_k])
        if FP32_ACCUM:
            acc += tl.dot(a, b.T)
        else:
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
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

Output = tuple[Tensor, Tensor]  # y, and the scales of its rows, which are empty unless the epilogue has a bound


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
    parameters: dict[str, Any] = {"GROUP_N": 8, "FP32_ACCUM": 0, **(config or _default_config(x.dtype, k))}
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    y, y_scale = _empty_output(x, n, epilogue, dtype)
    x_desc, w_desc = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), [block, block_k])
        for t, block in ((x, block_m), (w, block_n))
    )
    pointers, strides, flags = _epilogue_arguments(y, y_scale, scales, epilogue)
    linear_fwd[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x_desc, w_desc, *pointers, m, n, k, *strides, **flags, **parameters
    )
    return y, y_scale


def _default_config(dtype: torch.dtype, k: int) -> LaunchConfig:
    """Launch parameters of the Triton kernel where nothing was tuned, for operands of a dtype and k terms."""
    if dtype == FP8:
        return FP8_ACC32_CONFIG if k >= FP32_ACCUM_MIN_K else FP8_CONFIG
    return FP32_CONFIG if dtype == torch.float32 else BF16_CONFIG


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
        pointers, strides, flags = _epilogue_arguments(y, y_scale, scales, epilogue)
        tile, block_n = len(partials) // schedule.num_partials, partials.shape[1]
        combine_linear_partials[(len(schedule.combines), tile // COMBINE_ROWS)](
            partials, schedule.combines, *pointers, *y.shape, *strides, **flags, TILE=tile, BLOCK_M=COMBINE_ROWS,
            BLOCK_N=block_n,
        )  # fmt: skip
    return y, y_scale


def launch_library(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """epilogue(x w^T) by cuBLAS, scaled by row in FP8, with the rest of the epilogue by PyTorch."""
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
    y = _apply_epilogue(y, epilogue._replace(bias=None))
    if epilogue.bound is None:
        return y.to(dtype), y.new_empty(0, dtype=torch.float32)
    assert scales is not None
    return _quantize_output(y.float(), scales[0], epilogue.bound)


def _empty_output(x: Tensor, n: int, epilogue: Epilogue, dtype: torch.dtype) -> Output:
    """Memory for y and its scales. On a CPU e4m3 outputs are float32: Triton's interpreter cannot round to e4m3."""
    quantize = epilogue.bound is not None
    y = x.new_empty(len(x), n, dtype=(FP8 if x.is_cuda else torch.float32) if quantize else dtype)
    return y, x.new_empty(len(x) if quantize else 0, dtype=torch.float32)


def _epilogue_arguments(
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


BACKENDS: Mapping[str, Callable[..., Output]] = {
    "gluon": launch_sm90,
    "triton": launch_triton,
    "library": launch_library,
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

    Untuned shapes use the library in 16 bits and the Triton kernel in FP8. Tuning measures products with a bias only;
    other epilogues cost the library further passes over the output, so it is not considered for them.
    """
    dims = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
    only_bias = not epilogue.gelu and epilogue.gate is epilogue.residual is epilogue.bound is None
    backends = [name for name in BACKENDS if only_bias or name != "library"]
    tuned = tuned or tuned_config(
        "linear", dims, "fp8" if scales else DTYPE_NAMES[x.dtype], x.device, backends=backends
    )
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


def _linear_fp8_cpu(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return reference(x, w, (x_scale, w_scale), Epilogue(bias, gelu, gate, residual), dtype)


def _linear_fp8_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dispatch(x, w, (x_scale, w_scale), Epilogue(bias, gelu, gate, residual), dtype)[0]


def _linear_fp8_quantized_cpu(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> Output:
    y = reference(x, w, (x_scale, w_scale), Epilogue(bias, gelu), torch.float32)
    return _quantize_output(y, x_scale, bound)


def _linear_fp8_quantized_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> Output:
    return dispatch(x, w, (x_scale, w_scale), Epilogue(bias, gelu, bound=bound), FP8)


linear_op = define_op("linear", cpu=_linear_cpu, cuda=_linear_cuda)
linear_fp8_op = define_op("linear_fp8", cpu=_linear_fp8_cpu, cuda=_linear_fp8_cuda)
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

    Products are accumulated and the epilogue is computed in float32; the result is rounded once.

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
    _check_epilogue(x, w, Epilogue(bias, gelu, gate, residual), x.dtype)
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
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype: {dtype}, wanted {' or '.join(map(str, DTYPE_NAMES))}")
    gelu = _is_gelu(activation)
    _check_fp8(x, x_scale, w, w_scale)
    _check_epilogue(x, w, Epilogue(bias, gelu, gate, residual), dtype)
    return linear_fp8_op(x, x_scale, w, w_scale, bias, gelu, gate, residual, dtype)


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
    _check_fp8(x, x_scale, w, w_scale)
    _check_epilogue(x, w, Epilogue(bias, gelu, bound=bound), FP8)
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


def _check_fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> None:
    """Raises ValueError unless x and w are e4m3 operands that go together, with a scale for each row."""
    _check_operand("x", x, ("rows", "columns"), (FP8,), x.device)
    _check_operand("w", w, ("outputs", x.shape[1]), (FP8,), x.device)
    for name, scale, rows in (("x_scale", x_scale, len(x)), ("w_scale", w_scale, len(w))):
        check(name, scale, shape=(rows,), dtype=torch.float32, device=x.device, layout="contiguous")


def _check_epilogue(x: Tensor, w: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> None:
    """Raises ValueError unless the epilogue fits the product of x and w, with a result in `dtype`."""
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
