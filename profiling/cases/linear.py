"""Cases of linear layers, alone and with the operations around them in the student."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, INT8_MAX
from kernels.layer_norm import (
    launch_layer_norm_fp8,
    launch_layer_norm_int8,
    launch_quantize_rows,
    launch_quantize_rows_int8,
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_int8,
    quantize_rows,
    quantize_rows_int8,
)
from kernels.linear import (
    BACKENDS,
    FP32_ACCUM_MIN_K,
    Epilogue,
    dispatch,
    linear,
    linear_fp8,
    linear_fp8_quantized,
    linear_int8,
    output_bound,
)
from kernels.linear_library import TORCHAO, TORCHAO_MODULE
from kernels.rotation import MAX_BLOCK
from kernels.tuning import LaunchConfig, TunedConfig
from profiling import official_baseline
from profiling.cases.case import (
    ANYWHERE,
    CUDA,
    Backend,
    Call,
    Dims,
    InputFactory,
    Operation,
    Output,
    compiled,
    eager_and_compiled,
    no_setup,
    resolve_config,
)


def quantize_library(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as e4m3 and the float32 scale of each row [rows, 1]: x ~ quantised * scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def dequantized(output: tuple[Tensor, Tensor]) -> Tensor:
    """The float32 values that quantised values and the scales of their rows represent."""
    quantised, scale = output
    return quantised.float() * scale.view(-1, 1)


def scaled_mm(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T + bias of row-quantised x [M, K] and w [N, K], in `dtype`."""
    (xq, xs), (wq, ws) = x, w
    fast = xq.is_cuda
    product: Any = torch._scaled_mm  # pyright: ignore  (private, and there is no other)
    return product(xq, wq.t(), scale_a=xs, scale_b=ws.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast)


def prepare_scaled_mm(x: Tensor, w: Tensor, bias: Tensor) -> Call:
    """Only the product is timed: activations and weights are quantised beforehand."""
    xq, wq = quantize_library(x), quantize_library(w)
    return lambda: scaled_mm(xq, wq, bias, x.dtype)


def rotate_library(x: Tensor) -> Tensor:
    """x [rows, columns] with blocks of 128 columns multiplied by a Hadamard matrix, by PyTorch."""
    hadamard = torch.ones(1, 1, device=x.device)
    while len(hadamard) < MAX_BLOCK:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=x.device), hadamard)
    return (x.float().unflatten(1, (-1, MAX_BLOCK)) @ hadamard * MAX_BLOCK**-0.5).flatten(1)


def quantize_int8_library(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns], rotated, as int8 and the float32 scale of each row [rows, 1]."""
    rotated = rotate_library(x)
    scale = rotated.abs().amax(-1, keepdim=True).clamp(min=1e-12) / INT8_MAX
    return (rotated / scale).round().to(torch.int8), scale


def int_mm(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T + bias of row-quantised int8 x [M, K] and w [N, K], in `dtype`."""
    (xq, xs), (wq, ws) = x, w
    product: Any = torch._int_mm  # pyright: ignore  (private, and there is no other)
    return (product(xq, wq.t()).float() * xs * ws.t() + bias).to(dtype)


def prepare_int_mm(x: Tensor, w: Tensor, bias: Tensor) -> Call:
    """cuBLAS's product in int8, with scales and bias in a compiled pass; operands are quantised beforehand."""
    return compiled(int_mm)(quantize_int8_library(x), quantize_int8_library(w), bias, x.dtype)


QUANTIZE = {"fp8": quantize_rows, "int8": quantize_rows_int8}


def empty_operand(dtype: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of `QUANTIZE[dtype](x)`: the audit has no values to quantise."""
    values = torch.empty_like(x, dtype=FP8 if dtype == "fp8" else torch.int8)
    return values, x.new_empty(len(x), dtype=torch.float32)


def linear_backend(name: str, dtype: str) -> Backend:
    """One back-end of kernels/linear.py; in 8 bits, activations and weights are quantised beforehand."""
    eight = dtype in QUANTIZE

    def tuned_linear(x: Tensor, w: Tensor, config: LaunchConfig | None) -> TunedConfig:
        dims = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
        return resolve_config("linear", name, dims, dtype if eight else DTYPE_NAMES[x.dtype], x, config)

    def launch(x: Tensor, w: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
        tuned, epilogue = tuned_linear(x, w, config), Epilogue(bias)
        if not eight:
            return dispatch(x, w, None, epilogue, x.dtype, tuned)[0]
        (x8, x_scale), (w8, w_scale) = empty_operand(dtype, x), empty_operand(dtype, w)
        return dispatch(x8, w8, (x_scale, w_scale), epilogue, x.dtype, tuned)[0]

    def prepare(x: Tensor, w: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Call:
        tuned, epilogue = tuned_linear(x, w, config), Epilogue(bias)
        if not eight:
            return lambda: dispatch(x, w, None, epilogue, x.dtype, tuned)[0]
        (x8, x_scale), (w8, w_scale) = QUANTIZE[dtype](x), QUANTIZE[dtype](w)
        return lambda: dispatch(x8, w8, (x_scale, w_scale), epilogue, x.dtype, tuned)[0]

    configs = {"gluon": partial(linear_configs, dtype), "triton": partial(linear_configs_triton, dtype)}.get(name)
    launcher, needs = (launch if configs else None), (TORCHAO_MODULE if name == TORCHAO else None)
    return Backend(
        name, prepare, ours=True, devices=CUDA, needs=needs, launcher=launcher, configs=configs, gluon=name == "gluon"
    )


def linear_configs(dtype: str, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Hopper kernel; SPLIT_K is tried where the last wave of programs matters."""
    few_tiles = dims["rows"] * dims["outputs"] < 512 * 128 * 256
    fp32_accum = int(dtype == "fp8" and dims["inputs"] >= FP32_ACCUM_MIN_K)  # chosen for accuracy, not for speed
    for (consumers, block_n, stages), width in itertools.product(((2, 256, 3), (2, 128, 5), (3, 128, 4)), (4, 8, 16)):
        for split in (0, 1) if few_tiles else (0,):
            yield {
                "BLOCK_N": block_n, "CONSUMERS": consumers, "STAGES": stages, "GROUP_N": width,
                "FP32_ACCUM": fp32_accum, "SPLIT_K": split,
            }  # fmt: skip


def linear_configs_triton(dtype: str, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Triton kernel; a row of a stage has 128 bytes in 8 bits and in 16.

    Four stages of 128 columns do not fit into the shared memory of a GeForce.
    """
    eight, fp32_accum = dtype in QUANTIZE, int(dtype == "fp8" and dims["inputs"] >= FP32_ACCUM_MIN_K)
    tiles = ((128, 4), (128, 3)) if fp32_accum or not eight else ((128, 4), (128, 3), (256, 3))
    for (block_n, stages), width in itertools.product(tiles, (4, 8, 16)):
        yield {
            "BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128 if eight else 64, "GROUP_N": width,
            "FP32_ACCUM": fp32_accum, "num_warps": 8, "num_stages": stages,
        }  # fmt: skip


LINEAR = Operation(
    name="linear",
    inputs=lambda d, randn: (
        randn(d["rows"], d["inputs"]),
        randn(d["outputs"], d["inputs"], scale=d["inputs"] ** -0.5),
        randn(d["outputs"]),
    ),
    reference=F.linear,
    flops=lambda d: 2.0 * d["rows"] * d["inputs"] * d["outputs"],
    bytes=lambda d, item: (d["rows"] + d["outputs"]) * d["inputs"] * item + d["rows"] * d["outputs"] * max(item, 2.0),
    backends={
        "fp32": (Backend("eager", no_setup(F.linear), ours=True),),
        "bf16": (
            *(linear_backend(name, "bf16") for name in BACKENDS if name != TORCHAO),
            Backend("eager", no_setup(F.linear), ours=True, devices=("cpu",)),
        ),
        "fp8": (
            *(linear_backend(name, "fp8") for name in BACKENDS if name != TORCHAO),
            Backend("scaled-mm-row", prepare_scaled_mm, devices=CUDA),
        ),
        "int8": (
            *(linear_backend(name, "int8") for name in BACKENDS),
            Backend("int-mm", prepare_int_mm, devices=CUDA),
        ),
    },
)


def torchao_linear(w: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """torchao's float8 linear layer: weights are quantised by row beforehand, activations by row in each call."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    layer = torch.nn.Linear(w.shape[1], w.shape[0], device=w.device, dtype=w.dtype)
    layer.weight, layer.bias = torch.nn.Parameter(w, requires_grad=False), torch.nn.Parameter(bias, requires_grad=False)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return layer


EPS = 1e-6  # of every layer norm of the student


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm and modulation by PyTorch, in float32, rounded once."""
    return official_baseline.layer_norm_modulate(x, shift, scale, EPS)


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """LayerNorm, modulation, a linear layer and optionally tanh-GELU, as before attention and in the FFN."""
    y = F.linear(norm_modulate(x, shift, scale), w, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_linear_reference(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """`norm_linear` in the precision of its inputs, without rounding in between."""
    y = (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift) @ w.T + bias
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_scaled_mm(x: Tensor, shift: Tensor, scale: Tensor, wq: Tensor, ws: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """`norm_linear` on e4m3 weights; the activations are quantised by row in a separate pass."""
    y = scaled_mm(quantize_library(norm_modulate(x, shift, scale)), (wq, ws), bias, x.dtype)
    return F.gelu(y, approximate="tanh") if gelu else y


def prepare_norm_scaled_mm(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """Unfused row quantisation, `torch._scaled_mm`, compiled pointwise operations around it."""
    return compiled(norm_scaled_mm)(x, shift, scale, *quantize_library(w), bias, gelu)


def prepare_norm_torchao(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """LayerNorm, modulation and GELU around torchao's layer, compiled as torchao recommends."""
    layer = torchao_linear(w, bias)

    def run(x: Tensor) -> Tensor:
        y = layer(norm_modulate(x, shift, scale))
        return F.gelu(y, approximate="tanh") if gelu else y

    return compiled(run)(x)


def prepare_norm_linear_ours(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """This repository's two operations in 16 bits, with GELU in the second one's epilogue."""
    return lambda: linear(layer_norm_modulate(x, shift, scale, EPS), w, bias, "gelu_tanh" if gelu else None)


def prepare_norm_linear_fp8(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """This repository's two kernels. As in the model, the output of GELU is e4m3 for the next layer."""
    w8, w_scale = quantize_rows(w)
    bound = output_bound(w8, w_scale, bias)

    def run() -> Output:
        x8, x_scale = layer_norm_modulate_fp8(x, shift, scale, EPS)
        if gelu:
            return linear_fp8_quantized(x8, x_scale, w8, w_scale, bound, bias, "gelu_tanh")
        return linear_fp8(x8, x_scale, w8, w_scale, bias, dtype=x.dtype)

    return run


def prepare_norm_linear_int8(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """This repository's two kernels. As in the model, the output of GELU is in the residual stream's dtype."""
    w8, w_scale = quantize_rows_int8(w)

    def run() -> Tensor:
        x8, x_scale = layer_norm_modulate_int8(x, shift, scale, EPS)
        return linear_int8(x8, x_scale, w8, w_scale, bias, "gelu_tanh" if gelu else None, dtype=x.dtype)

    return run


def launch_norm_linear_int8(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Output:
    """The launches of `prepare_norm_linear_int8` on Hopper."""
    x8, x_scale = launch_layer_norm_int8(x, scale, shift, EPS, 1.0)
    w8, w_scale = empty_operand("int8", w)
    return dispatch(x8, w8, (x_scale, w_scale), Epilogue(bias, gelu), x.dtype, TunedConfig("gluon", {}))


def launch_norm_linear(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Output:
    """The launches of `prepare_norm_linear_fp8` on Hopper."""
    x8, x_scale = launch_layer_norm_fp8(x, scale, shift, EPS, 1.0)
    w8, w_scale = empty_operand("fp8", w)
    bound = x_scale.new_empty(2) if gelu else None
    epilogue, dtype = Epilogue(bias, gelu, bound=bound), FP8 if gelu else x.dtype
    return dispatch(x8, w8, (x_scale, w_scale), epilogue, dtype, TunedConfig("gluon", {}))


def prepare_residual_ours(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Call:
    """This repository's operation in 16 bits, with gate and residual in its epilogue."""
    return lambda: linear(y, w, bias, None, gate, x)


def prepare_residual_fp8(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, quantised: bool) -> Call:
    """This repository's kernels; with `quantised`, the previous layer has already made y e4m3."""
    (w8, w_scale), (y8, y_scale) = quantize_rows(w), quantize_rows(y)

    def run() -> Output:
        a, scale = (y8, y_scale) if quantised else quantize_rows(y)
        return linear_fp8(a, scale, w8, w_scale, bias, None, gate, x, x.dtype)

    return run


def launch_residual(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Output:
    """The launches of `prepare_residual_fp8` on Hopper."""
    y8, y_scale = launch_quantize_rows(y)
    w8, w_scale = empty_operand("fp8", w)
    epilogue = Epilogue(bias, False, gate, x)
    return dispatch(y8, w8, (y_scale, w_scale), epilogue, x.dtype, TunedConfig("gluon", {}))


def prepare_residual_int8(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Call:
    """This repository's two kernels; no layer writes int8, so that y is always quantised in a pass of its own."""
    w8, w_scale = quantize_rows_int8(w)
    return lambda: linear_int8(*quantize_rows_int8(y), w8, w_scale, bias, None, gate, x, x.dtype)


def launch_residual_int8(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Output:
    """The launches of `prepare_residual_int8` on Hopper."""
    y8, y_scale = launch_quantize_rows_int8(y)
    w8, w_scale = empty_operand("int8", w)
    return dispatch(y8, w8, (y_scale, w_scale), Epilogue(bias, False, gate, x), x.dtype, TunedConfig("gluon", {}))


def residual_inputs(d: Dims, randn: InputFactory) -> tuple[Any, ...]:
    """y [rows, inputs], w, bias, the residual x [rows, outputs], gate [outputs], and whether y arrives in e4m3.

    Peers ignore the last one and quantise y themselves.
    """
    return (
        *LINEAR.inputs(d, randn),
        randn(d["rows"], d["outputs"]),
        randn(d["outputs"], dtype=torch.float32),
        bool(d["quantised"]),
    )


def linear_residual(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Tensor:
    """x + gate (y w^T + bias), rounded once."""
    return (x.float() + F.linear(y, w, bias).float() * gate).to(x.dtype)


def residual_scaled_mm(y: Tensor, wq: Tensor, ws: Tensor, bias: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`linear_residual` on e4m3 weights."""
    return (x.float() + scaled_mm(quantize_library(y), (wq, ws), bias, x.dtype).float() * gate).to(x.dtype)


def prepare_residual_scaled_mm(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Call:
    """Unfused row quantisation, `torch._scaled_mm`, compiled pointwise operations around it."""
    return compiled(residual_scaled_mm)(y, *quantize_library(w), bias, x, gate)


NORM_LINEAR = Operation(
    name="norm_linear",
    inputs=lambda d, randn: (
        randn(d["rows"], d["inputs"]),
        *(randn(d["inputs"], scale=0.1, dtype=torch.float32) for _ in range(2)),
        *LINEAR.inputs(d, randn)[1:],
        bool(d["gelu"]),
    ),
    reference=norm_linear_reference,
    flops=LINEAR.flops,
    bytes=lambda d, item: d["outputs"] * d["inputs"] * item + d["rows"] * (d["inputs"] + d["outputs"]) * max(item, 2.0),
    backends={
        "fp32": eager_and_compiled(norm_linear),
        "bf16": (
            Backend("ours", prepare_norm_linear_ours, ours=True),
            Backend("torch", no_setup(norm_linear)),
            Backend("torch-compiled", compiled(norm_linear), devices=CUDA),
        ),
        "fp8": (
            Backend("ours", prepare_norm_linear_fp8, ours=True, devices=ANYWHERE, launcher=launch_norm_linear),
            Backend("scaled-mm-row", prepare_norm_scaled_mm, devices=("cuda",)),
            Backend("torchao", prepare_norm_torchao, devices=("cuda",), needs="torchao"),
            Backend("bf16-compiled", compiled(norm_linear), devices=("cuda",)),
        ),
        "int8": (
            Backend("ours", prepare_norm_linear_int8, ours=True, devices=ANYWHERE, launcher=launch_norm_linear_int8),
            Backend("bf16-compiled", compiled(norm_linear), devices=("cuda",)),
        ),
    },
    result=lambda output: dequantized(output) if isinstance(output, tuple) else output,
)

LINEAR_RESIDUAL = Operation(
    name="linear_residual",
    inputs=residual_inputs,
    reference=lambda y, w, bias, x, gate, _: x + gate * (y @ w.T + bias),
    flops=LINEAR.flops,
    bytes=lambda d, item: (
        d["outputs"] * d["inputs"] * item + d["rows"] * (d["inputs"] + 2 * d["outputs"]) * max(item, 2.0)
    ),
    backends={
        "fp32": eager_and_compiled(linear_residual),
        "bf16": (
            Backend("ours", prepare_residual_ours, ours=True),
            Backend("torch", no_setup(linear_residual)),
            Backend("torch-compiled", compiled(linear_residual), devices=CUDA),
        ),
        "fp8": (
            Backend("ours", prepare_residual_fp8, ours=True, devices=ANYWHERE, launcher=launch_residual),
            Backend("scaled-mm-row", prepare_residual_scaled_mm, devices=("cuda",)),
            Backend("bf16-compiled", compiled(linear_residual), devices=("cuda",)),
        ),
        "int8": (
            Backend("ours", prepare_residual_int8, ours=True, devices=ANYWHERE, launcher=launch_residual_int8),
            Backend("bf16-compiled", compiled(linear_residual), devices=("cuda",)),
        ),
    },
)
