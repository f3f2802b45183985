"""Linear layers in FP8 and in 16 bits, with everything around them inside: y = epilogue(x w^T).

    linear         y = x w^T                                       x [m, k], w [n, k], as nn.Linear has it
    linear_fp8     y = (x8 w8^T) x_scale w_scale                   e4m3, a scale for each row of x and of w
    epilogue       + bias, then tanh-GELU or times gate [n], then + residual [m, n]; each if asked for

Products are summed and the epilogue is computed in float32, and the result is rounded once. Operands are made by
`kernels.norm` (`layer_norm_modulate_fp8`, `layer_norm_fp8`, `quantize_rows`): the scale of a row is its largest value
/ 448, and so is that of a row of w, an output channel.

`linear_fp8_quantized` rounds its output to e4m3 for the layer that follows. The largest value of a row of it is known
only when all its columns are done; the scale is that of a bound known beforehand, so that nothing ever saturates:

    |y[i, j]| <= sum_k |x[i, k]| |w[j, k]| + |bias[j]| <= 448 x_scale[i] max_j |w[j]|_1 + max_j |bias[j]|
    y_scale[i] = x_scale[i] bound[0] + bound[1]                    `output_bound` makes these two of a layer

and GELU makes no value larger. A floating-point format loses nothing by room to spare: e4m3 is exact to 4 bits over
2^15, and the bound lies 2^6 to 2^11 above what a row's largest value is.

Forms: `reference` is the definition; on CPUs that; on GPUs the Triton kernel below, on Hopper also the one of
kernels/linear_sm90.py, or the library (cuBLAS), whichever kernels/tuned/ names for the shape.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import linear_sm90
from kernels.chunk_attention import DTYPE_NAMES
from kernels.linear_sm90 import LONG, supports
from kernels.norm import FP8_MAX, MIN_SCALE, quantize_rows, to_e4m3
from kernels.sm90 import FP8
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, tuned_config

# Of the Triton kernel, where nothing was tuned: in 32 and 16 bits, in FP8, and in FP8 with promoted sums.
WIDE: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
HALF: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
FAST: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
EXACT: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "FP32_ACCUM": 1, "num_warps": 8, "num_stages": 4}
MERGE_ROWS = 16  # of a tile that a program of `merge_linear` merges


class Epilogue(NamedTuple):
    """What becomes of x w^T; what is None or False is left out."""

    bias: Tensor | None = None  # [n]
    gelu: bool = False
    gate: Tensor | None = None  # float32 [n]
    residual: Tensor | None = None  # [m, n], in the output's dtype
    bound: Tensor | None = None  # float32 [2]: makes the output e4m3


Scales = tuple[Tensor, Tensor]  # of x [m] and of w [n], float32


__all__ = ["Epilogue", "dequantize", "linear", "linear_fp8", "linear_fp8_quantized", "output_bound", "quantize_rows"]

# --- Definition -----------------------------------------------------------------------------------------------------


def reference(x: Tensor, w: Tensor, scales: Scales | None, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """y in `dtype`, computed in float32, or in float64 if the scales, or x, are float64; not yet divided by a scale."""
    wide = torch.promote_types(torch.float32, x.dtype if scales is None else scales[0].dtype)
    y = x.to(wide) @ w.to(wide).T
    if scales:
        y = y * scales[0][:, None] * scales[1]
    return _finish(y, epilogue).to(dtype)


def _finish(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Bias, GELU, gate and residual, in y's precision."""
    if epilogue.bias is not None:
        y = y + epilogue.bias
    if epilogue.gelu:
        y = F.gelu(y, approximate="tanh")
    elif epilogue.gate is not None:
        y = y * epilogue.gate
    return y if epilogue.residual is None else y + epilogue.residual


def output_bound(w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The two numbers, float32 [2], that make a row's scale of an e4m3 output; see the module's first lines."""
    longest = w.float().abs().sum(1).mul(w_scale).amax()
    largest = bias.float().abs().amax() / FP8_MAX if bias is not None else torch.zeros_like(longest)
    return torch.stack((longest, largest.clamp_min(MIN_SCALE)))


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """What e4m3 values [rows, columns] and their scales [rows] stand for, in the scales' precision."""
    return values.to(scale.dtype) * scale[:, None]


# --- Triton kernels -------------------------------------------------------------------------------------------------


@triton.jit
def store_output(acc, rows, columns, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, y_row,
                 residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
                 GATED: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """The epilogue of the sums acc [rows, columns], and its output's place."""
    inside, within = rows < m, columns < n
    mask = inside[:, None] & within[None, :]
    rows = rows.to(tl.int64)
    if SCALED:
        factor = tl.load(x_scale + rows, mask=inside, other=0.0)
        acc *= factor[:, None] * tl.load(w_scale + columns, mask=within, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    if GELU:  # 1/2 (1 + tanh(u)) = sigmoid(2 u)
        acc *= tl.sigmoid(1.5957691216057308 * acc * (1.0 + 0.044715 * acc * acc))
    if GATED:
        acc *= tl.load(gate + columns, mask=within, other=0.0)[None, :]
    if RESIDUAL:
        places = residual + rows[:, None] * residual_row + columns[None, :]
        acc += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    places = y + rows[:, None] * y_row + columns[None, :]
    if ROUND:
        scale = factor * tl.load(bound) + tl.load(bound + 1)
        tl.store(y_scale + rows, scale, mask=inside)  # by every tile of the row, the same
        tl.store(places, to_e4m3(acc * (1.0 / scale)[:, None], y), mask=mask)
    else:
        tl.store(places, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "n"])
def linear_forward(x_rows, w_rows, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, m, n, k, y_row,
                   residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
                   GATED: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr, FP32_ACCUM: tl.constexpr):  # fmt: skip
    """One tile. x_rows and w_rows cut boxes out of x and w, beyond whose ends there are zeros.

    GROUP_N columns of tiles are worked off row by row, so that those at work at one time share them in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    place = tl.program_id(0)
    first = place // (GROUP_N * tiles_m) * GROUP_N
    width = tl.minimum(tiles_n - first, GROUP_N)
    place %= GROUP_N * tiles_m
    row, column = place // width * BLOCK_M, (first + place % width) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, k, BLOCK_K):
        a, b = x_rows.load([row, start]), w_rows.load([column, start])
        if FP32_ACCUM:
            acc += tl.dot(a, b.T)
        else:
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
    # One half after the other: the epilogue of a whole tile runs out of registers.
    left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N // 2)
    store_output(left, rows, columns, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, y_row,
                 residual_row, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)  # fmt: skip
    store_output(right, rows, columns + BLOCK_N // 2, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate,
                 y_row, residual_row, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)  # fmt: skip


@triton.jit(do_not_specialize=["m", "n"])
def merge_linear(parts, merges, y, residual, x_scale, w_scale, bound, y_scale, bias, gate, m, n, y_row, residual_row,
                 SCALED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
                 GATED: tl.constexpr, ROUND: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of a tile [TILE, BLOCK_N]: the sums of its parts, in order, and their epilogue."""
    merge = merges + 5 * tl.program_id(0)
    column, row = tl.load(merge) * BLOCK_N, tl.load(merge + 1)
    first, count = tl.load(merge + 3).to(tl.int64), tl.load(merge + 4)
    own, columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(count):
        acc += tl.load(parts + ((first + part) * TILE + own)[:, None] * BLOCK_N + columns[None, :])
    store_output(acc, row + own, column + columns, m, n, y, residual, x_scale, w_scale, bound, y_scale, bias, gate,
                 y_row, residual_row, SCALED, BIAS, GELU, RESIDUAL, GATED, ROUND)  # fmt: skip


# --- Launchers ------------------------------------------------------------------------------------------------------

Output = tuple[Tensor, Tensor]  # y, and its scale, which is empty unless the epilogue rounds


def launch_triton(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """By the Triton kernel."""
    (m, k), n = x.shape, len(w)
    default = WIDE if x.dtype == torch.float32 else HALF if x.dtype != FP8 else EXACT if k >= LONG else FAST
    parameters: dict[str, Any] = {"GROUP_N": 8, "FP32_ACCUM": 0, **(config or default)}
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    y, y_scale = _new_output(x, n, epilogue, dtype)
    x_rows, w_rows = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), [block, block_k])
        for t, block in ((x, block_m), (w, block_n))
    )
    pointers, strides, flags = _arguments(y, y_scale, scales, epilogue)
    linear_forward[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x_rows, w_rows, *pointers, m, n, k, *strides, **flags, **parameters
    )
    return y, y_scale


def launch_sm90(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """By the kernel of kernels/linear_sm90.py; adds up what it left in parts."""
    y, y_scale, schedule, parts = linear_sm90.launch_sm90(x, w, scales, *epilogue, dtype=dtype, config=config)
    if len(schedule.combines):
        pointers, strides, flags = _arguments(y, y_scale, scales, epilogue)
        tile, block_n = len(parts) // schedule.num_partials, parts.shape[1]
        merge_linear[(len(schedule.combines), tile // MERGE_ROWS)](
            parts,
            schedule.combines,
            *pointers,
            *y.shape,
            *strides,
            **flags,
            TILE=tile,
            BLOCK_M=MERGE_ROWS,
            BLOCK_N=block_n,
        )
    return y, y_scale


def launch_library(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Output:
    """By cuBLAS, row-wise scaled in FP8, and an epilogue of PyTorch's operations."""
    bias = epilogue.bias
    if scales:
        product: Any = torch._scaled_mm  # pyright: ignore  (private, and there is no other)
        wide = torch.bfloat16  # all that it gives with a scale for each row
        bias = bias if bias is None else bias.to(wide)
        x_scale, w_scale = scales[0][:, None], scales[1][None]
        fast = x.shape[1] < LONG
        y = product(x, w.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=wide, use_fast_accum=fast)
    else:
        y = F.linear(x, w, bias if bias is None else bias.to(x.dtype))
    y = _finish(y, epilogue._replace(bias=None))
    if epilogue.bound is None:
        return y.to(dtype), y.new_empty(0, dtype=torch.float32)
    assert scales is not None
    y_scale = scales[0] * epilogue.bound[0] + epilogue.bound[1]
    return (y.float() / y_scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), y_scale


def _new_output(x: Tensor, n: int, epilogue: Epilogue, dtype: torch.dtype) -> Output:
    """Memory for y and its scale. The interpreter cannot round to e4m3: on the CPU, such an output stays float32."""
    rounded = epilogue.bound is not None
    y = x.new_empty(len(x), n, dtype=(FP8 if x.is_cuda else torch.float32) if rounded else dtype)
    return y, x.new_empty(len(x) if rounded else 0, dtype=torch.float32)


def _arguments(
    y: Tensor, y_scale: Tensor, scales: Scales | None, epilogue: Epilogue
) -> tuple[list[Tensor], list[int], dict[str, bool]]:
    """Pointers, strides and flags of `store_output`; pointers that no flag asks for are any."""
    bias, gelu, gate, residual, bound = epilogue
    x_scale, w_scale = scales or (None, None)
    pointers = [y if p is None else p for p in (residual, x_scale, w_scale, bound)]
    pointers = [y, *pointers, y_scale, *(y if p is None else p for p in (bias, gate))]
    strides = [y.stride(0), y.stride(0) if residual is None else residual.stride(0)]
    flags = {"SCALED": scales is not None, "BIAS": bias is not None, "GELU": gelu, "RESIDUAL": residual is not None}
    return pointers, strides, flags | {"GATED": gate is not None, "ROUND": bound is not None}


Form = Callable[..., Output]
BACKENDS: Mapping[str, Form] = {"gluon": launch_sm90, "triton": launch_triton, "library": launch_library}


def launch(
    x: Tensor,
    w: Tensor,
    scales: Scales | None,
    epilogue: Epilogue,
    dtype: torch.dtype,
    choice: TunedConfig | None = None,
) -> Output:
    """By the form that kernels/tuned/ names for the shape, or `choice`; without one, of those that a GPU has proven.

    That is the library in 16 bits and the Triton kernel in FP8. What is measured for the table is a product with a
    bias; more than that takes the library several passes over the output, and ours none.
    """
    dims = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
    plain = not epilogue.gelu and epilogue.gate is epilogue.residual is epilogue.bound is None
    backends = [name for name in BACKENDS if plain or name != "library"]
    choice = choice or tuned_config(
        "linear", dims, "fp8" if scales else DTYPE_NAMES[x.dtype], x.device, backends=backends
    )
    wanted = choice.backend if choice is not None else "triton" if scales else "library"
    if wanted == "gluon" and not (gpu_of(x.device).capability == "9.0" and supports(x, w, dtype, epilogue.residual)):
        wanted = "triton"
    parameters = choice.config if choice is not None and choice.backend == wanted else None
    return BACKENDS[wanted](x, w, scales, epilogue, dtype, parameters or None)


# --- Operations -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::linear", mutates_args=(), device_types="cpu")
def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    return reference(x, w, None, Epilogue(bias, gelu, gate, residual), x.dtype)


@_linear.register_kernel("cuda")
def _(x: Tensor, w: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    return launch(x, w, None, Epilogue(bias, gelu, gate, residual), x.dtype)[0]


@_linear.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


Activation = Literal["gelu_tanh"] | None


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gate activation(x w^T + bias) in one pass; see the module's first lines.

    Args:
        x: [m, k], float32, float16 or bfloat16, rows whole 16 bytes apart.
        w: [n, k], like x.
        bias: [n], float32 or like x.
        activation: "gelu_tanh" or None.
        gate: float32 [n]; not with an activation.
        residual: [m, n], like x.

    Returns:
        [m, n] in x's dtype.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    if x.dtype not in DTYPE_NAMES:
        raise ValueError(f"x: {x.dtype}, wanted float32, float16 or bfloat16")
    _check(x, w, Epilogue(bias, _gelu(activation), gate, residual), x.dtype)
    return _linear(x, w, bias, _gelu(activation), gate, residual)


@torch.library.custom_op("flashtalk::linear_fp8", mutates_args=(), device_types="cpu")
def _linear_fp8(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return reference(x, w, (x_scale, w_scale), Epilogue(bias, gelu, gate, residual), dtype)


@_linear_fp8.register_kernel("cuda")
def _(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return launch(x, w, (x_scale, w_scale), Epilogue(bias, gelu, gate, residual), dtype)[0]


@_linear_fp8.register_fake
def _(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


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
    """`linear` of e4m3 operands; see the module's first lines.

    Args:
        x: float8_e4m3fn [m, k], rows whole 16 bytes apart.
        x_scale: float32 [m].
        w: float8_e4m3fn [n, k].
        w_scale: float32 [n].
        bias: [n], float32, float16 or bfloat16.
        activation: "gelu_tanh" or None.
        gate: float32 [n]; not with an activation.
        residual: [m, n] in `dtype`.
        dtype: of the output: float32, float16 or bfloat16.

    Returns:
        [m, n] in `dtype`.

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype: {dtype}, wanted float32, float16 or bfloat16")
    _check_fp8(x, x_scale, w, w_scale)
    _check(x, w, Epilogue(bias, _gelu(activation), gate, residual), dtype)
    return _linear_fp8(x, x_scale, w, w_scale, bias, _gelu(activation), gate, residual, dtype)


@torch.library.custom_op("flashtalk::linear_fp8_quantized", mutates_args=(), device_types="cpu")
def _linear_fp8_quantized(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    y = reference(x, w, (x_scale, w_scale), Epilogue(bias, gelu), torch.float32)
    y_scale = x_scale * bound[0] + bound[1]
    return (y / y_scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), y_scale


@_linear_fp8_quantized.register_kernel("cuda")
def _(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    return launch(x, w, (x_scale, w_scale), Epilogue(bias, gelu, bound=bound), FP8)


@_linear_fp8_quantized.register_fake
def _(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bound: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[0], dtype=FP8), x_scale.new_empty(x.shape[0])


def linear_fp8_quantized(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bound: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> tuple[Tensor, Tensor]:
    """activation(x w^T + bias) as e4m3 and the scale of each row; see the module's first lines.

    Args:
        x: as in `linear_fp8`, like those that follow.
        x_scale: see x.
        w: see x.
        w_scale: see x.
        bound: `output_bound(w, w_scale, bias)`, float32 [2].
        bias: see x.
        activation: see x.

    Returns:
        float8_e4m3fn [m, n], float32 [m].

    Raises:
        ValueError: an argument has another shape, dtype, device or stride, or wants a gradient.
    """
    _check_fp8(x, x_scale, w, w_scale)
    _check(x, w, Epilogue(bias, _gelu(activation), bound=bound), FP8)
    return _linear_fp8_quantized(x, x_scale, w, w_scale, bound, bias, _gelu(activation))


def _gelu(activation: Activation) -> bool:
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"activation: {activation!r}, wanted 'gelu_tanh' or None")
    return activation is not None


def _check_fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> None:
    """Raises ValueError unless operands and scales are those of FP8."""
    for name, y, scale in (("x", x, x_scale), ("w", w, w_scale)):
        if y.dtype != FP8:
            raise ValueError(f"{name}: {y.dtype}, wanted {FP8}")
        if scale.dtype != torch.float32 or scale.shape != y.shape[:1] or not scale.is_contiguous():
            raise ValueError(
                f"{name}_scale: {scale.dtype} {list(scale.shape)}, wanted contiguous torch.float32 {list(y.shape[:1])}"
            )


def _check(x: Tensor, w: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> None:
    """Raises ValueError unless operands and epilogue go together."""
    if epilogue.gelu and epilogue.gate is not None:
        raise ValueError("gate: not with an activation")
    for name, y in (("x", x), ("w", w)):
        if y.ndim != 2 or not y.numel():
            raise ValueError(f"{name}: shape {list(y.shape)}, wanted [rows, columns], at least 1 of each")
        if y.stride(1) != 1 or y.stride(0) * y.itemsize % 16:
            raise ValueError(f"{name}: strides {y.stride()}, wanted rows whole 16 bytes apart, contiguous themselves")
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "w": (w, (w.shape[0], x.shape[1]), (x.dtype,)),
        "bias": (epilogue.bias, (w.shape[0],), tuple(DTYPE_NAMES)),
        "gate": (epilogue.gate, (w.shape[0],), (torch.float32,)),
        "residual": (epilogue.residual, (x.shape[0], w.shape[0]), (dtype,)),
        "bound": (epilogue.bound, (2,), (torch.float32,)),
    }
    for name, (y, shape, dtypes) in {"x": (x, tuple(x.shape), (x.dtype,)), **wanted}.items():
        if y is None:
            continue
        if tuple(y.shape) != shape:
            raise ValueError(f"{name}: shape {list(y.shape)}, wanted {list(shape)}")
        if y.dtype not in dtypes:
            raise ValueError(f"{name}: {y.dtype}, wanted {' or '.join(map(str, dtypes))}")
        if y.device != x.device:
            raise ValueError(f"{name}: on {y.device}, wanted {x.device}, where x is")
        if y.stride(-1) != 1:
            raise ValueError(f"{name}: strides {y.stride()}, wanted 1 along its last axis")
        if y.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")
