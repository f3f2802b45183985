"""Linear layers, alone and with what is around them in the student."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import chunk_attention as attention
from kernels import linear, norm
from kernels.linear_sm90 import LONG
from kernels.tuning import LaunchConfig, TunedConfig
from profiling import official_baseline
from profiling.cases.case import (
    ANYWHERE,
    CUDA,
    FP8_MAX,
    Backend,
    Call,
    Dims,
    Draw,
    Operation,
    Output,
    choose,
    compiled,
    eager_and_compiled,
    once,
)


def quantize_library(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as e4m3 and the float32 scale of each row [rows, 1]: x ~ quantised * scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def dequantized(output: tuple[Tensor, Tensor]) -> Tensor:
    """What values and the scales of their rows stand for, to be held to what was quantised."""
    quantised, scale = output
    return quantised.float() * scale.view(-1, 1)


def scaled_mm(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T + bias of row-quantised x [M, K] and w [N, K], in `dtype`."""
    (xq, xs), (wq, ws) = x, w
    fast = xq.is_cuda
    product: Any = torch._scaled_mm  # pyright: ignore  (private, and there is no other)
    return product(xq, wq.t(), scale_a=xs, scale_b=ws.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast)


def prepare_scaled_mm(x: Tensor, w: Tensor, bias: Tensor) -> Call:
    """The product alone: activations as well as weights are quantised beforehand."""
    xq, wq = quantize_library(x), quantize_library(w)
    return lambda: scaled_mm(xq, wq, bias, x.dtype)


def ours_linear(form: str, fp8: bool) -> Backend:
    """One form of kernels/linear.py; in FP8, activations as well as weights are quantised beforehand."""

    def choose_linear(x: Tensor, w: Tensor, config: LaunchConfig | None) -> TunedConfig:
        dims = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
        return choose("linear", form, dims, "fp8" if fp8 else attention.DTYPE_NAMES[x.dtype], x, config)

    def launch(x: Tensor, w: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
        choice, epilogue = choose_linear(x, w, config), linear.Epilogue(bias)
        if not fp8:
            return linear.launch(x, w, None, epilogue, x.dtype, choice)[0]
        (x8, x_scale), (w8, w_scale) = operand(x), operand(w)
        return linear.launch(x8, w8, (x_scale, w_scale), epilogue, x.dtype, choice)[0]

    def prepare(x: Tensor, w: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Call:
        choice, epilogue = choose_linear(x, w, config), linear.Epilogue(bias)
        if not fp8:
            return lambda: linear.launch(x, w, None, epilogue, x.dtype, choice)[0]
        (x8, x_scale), (w8, w_scale) = linear.quantize_rows(x), linear.quantize_rows(w)
        return lambda: linear.launch(x8, w8, (x_scale, w_scale), epilogue, x.dtype, choice)[0]

    space = {"gluon": partial(linear_space, fp8), "triton": partial(linear_space_triton, fp8)}.get(form)
    return Backend(form, prepare, True, CUDA, None, launch if space else None, space)


def operand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what `quantize_rows` makes of x: for the audit, whose inputs have no values."""
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)


def linear_space(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for Hopper; tiles are cut where the last round of programs tells."""
    few = dims["rows"] * dims["outputs"] < 512 * 128 * 256
    promoted = int(fp8 and dims["inputs"] >= LONG)  # a matter of accuracy, not of speed
    for (consumers, block_n, stages), width in itertools.product(((2, 256, 3), (2, 128, 5), (3, 128, 4)), (4, 8, 16)):
        for split in (0, 1) if few else (0,):
            yield {
                "BLOCK_N": block_n, "CONSUMERS": consumers, "STAGES": stages, "GROUP_N": width, "FP32_ACCUM": promoted,
                "SPLIT_K": split,
            }  # fmt: skip


def linear_space_triton(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for any GPU: as many bytes of a stage's row in 8 bits as in 16."""
    promoted = int(fp8 and dims["inputs"] >= LONG)
    for block_n, width in itertools.product((128,) if promoted or not fp8 else (128, 256), (4, 8, 16)):
        yield {
            "BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128 if fp8 else 64, "GROUP_N": width, "FP32_ACCUM": promoted,
            "num_warps": 8, "num_stages": 3 if block_n == 256 else 4,
        }  # fmt: skip


LINEAR = Operation(
    "linear",
    lambda d, draw: (
        draw(d["rows"], d["inputs"]),
        draw(d["outputs"], d["inputs"], scale=d["inputs"] ** -0.5),
        draw(d["outputs"]),
    ),
    F.linear,
    lambda d: 2.0 * d["rows"] * d["inputs"] * d["outputs"],
    lambda d, item: (d["rows"] + d["outputs"]) * d["inputs"] * item + d["rows"] * d["outputs"] * max(item, 2.0),
    {
        "fp32": (Backend("eager", once(F.linear), ours=True),),
        "bf16": (
            *(ours_linear(form, fp8=False) for form in linear.BACKENDS),
            Backend("eager", once(F.linear), ours=True, devices=("cpu",)),
        ),
        "fp8": (
            *(ours_linear(form, fp8=True) for form in linear.BACKENDS),
            Backend("scaled-mm-row", prepare_scaled_mm),
        ),
    },
)


def torchao_linear(w: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """torchao's float8 linear layer: weights quantised by row beforehand, activations by row at each call."""
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
    """LayerNorm and modulation by torch, in float32, rounded once."""
    return official_baseline.layer_norm_modulate(x, shift, scale, EPS)


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """LayerNorm, modulation, linear layer, and tanh-GELU if asked for: what comes before attention and in the FFN."""
    y = F.linear(norm_modulate(x, shift, scale), w, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_linear_reference(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """`norm_linear` in the precision of its inputs throughout."""
    y = (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift) @ w.T + bias
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_scaled_mm(x: Tensor, shift: Tensor, scale: Tensor, wq: Tensor, ws: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """`norm_linear` on e4m3 weights, with the activations quantised by row in a pass of their own."""
    y = scaled_mm(quantize_library(norm_modulate(x, shift, scale)), (wq, ws), bias, x.dtype)
    return F.gelu(y, approximate="tanh") if gelu else y


def prepare_norm_scaled_mm(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """Unfused row quantisation, `torch._scaled_mm`, compiled pointwise operations around it."""
    return compiled(norm_scaled_mm)(x, shift, scale, *quantize_library(w), bias, gelu)


def prepare_norm_torchao(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """The same sequence around torchao's layer, compiled as torchao asks for."""
    layer = torchao_linear(w, bias)

    def run(x: Tensor) -> Tensor:
        y = layer(norm_modulate(x, shift, scale))
        return F.gelu(y, approximate="tanh") if gelu else y

    return compiled(run)(x)


def prepare_norm_linear_fp8(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """Ours: two kernels. What GELU makes is handed to the next layer in e4m3, as the model does."""
    w8, w_scale = linear.quantize_rows(w)
    bound = linear.output_bound(w8, w_scale, bias)

    def run() -> Output:
        x8, x_scale = norm.layer_norm_modulate_fp8(x, shift, scale, EPS)
        if gelu:
            return linear.linear_fp8_quantized(x8, x_scale, w8, w_scale, bound, bias, "gelu_tanh")
        return linear.linear_fp8(x8, x_scale, w8, w_scale, bias, dtype=x.dtype)

    return run


def launch_norm_linear(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Output:
    """What it launches, for Hopper."""
    x8, x_scale = norm.launch_rows(x, (scale, shift, EPS, 1.0), fp8=True)
    w8, w_scale = operand(w)
    bound = x_scale.new_empty(2) if gelu else None
    epilogue, dtype = linear.Epilogue(bias, gelu, bound=bound), torch.float8_e4m3fn if gelu else x.dtype
    return linear.launch(x8, w8, (x_scale, w_scale), epilogue, dtype, TunedConfig("gluon", {}))


def prepare_residual_fp8(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, quantised: bool) -> Call:
    """Ours; `quantised`: y comes in e4m3 from the layer before."""
    (w8, w_scale), (y8, y_scale) = linear.quantize_rows(w), linear.quantize_rows(y)

    def run() -> Output:
        a, scale = (y8, y_scale) if quantised else linear.quantize_rows(y)
        return linear.linear_fp8(a, scale, w8, w_scale, bias, None, gate, x, x.dtype)

    return run


def launch_residual(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Output:
    """What it launches, for Hopper."""
    y8, y_scale = norm.launch_rows(y, None, fp8=True)
    w8, w_scale = operand(w)
    epilogue = linear.Epilogue(bias, False, gate, x)
    return linear.launch(y8, w8, (y_scale, w_scale), epilogue, x.dtype, TunedConfig("gluon", {}))


def residual_inputs(d: Dims, draw: Draw) -> tuple[Any, ...]:
    """y [rows, inputs], w, bias, the stream x [rows, outputs] that the result is added to, its gate [outputs].

    At last, whether the layer before hands y over in e4m3: peers quantise it themselves.
    """
    return (
        *LINEAR.inputs(d, draw),
        draw(d["rows"], d["outputs"]),
        draw(d["outputs"], dtype=torch.float32),
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
    "norm_linear",
    lambda d, draw: (
        draw(d["rows"], d["inputs"]),
        *(draw(d["inputs"], scale=0.1, dtype=torch.float32) for _ in range(2)),
        *LINEAR.inputs(d, draw)[1:],
        bool(d["gelu"]),
    ),
    norm_linear_reference,
    LINEAR.flops,
    lambda d, item: d["outputs"] * d["inputs"] * item + d["rows"] * (d["inputs"] + d["outputs"]) * max(item, 2.0),
    {
        "fp32": eager_and_compiled(norm_linear),
        "bf16": eager_and_compiled(norm_linear),
        "fp8": (
            Backend("ours", prepare_norm_linear_fp8, True, ANYWHERE, None, launch_norm_linear),
            Backend("scaled-mm-row", prepare_norm_scaled_mm, devices=("cuda",)),
            Backend("torchao", prepare_norm_torchao, devices=("cuda",), needs="torchao"),
            Backend("bf16-compiled", compiled(norm_linear), devices=("cuda",)),
        ),
    },
    lambda output: dequantized(output) if isinstance(output, tuple) else output,
)

LINEAR_RESIDUAL = Operation(
    "linear_residual",
    residual_inputs,
    lambda y, w, bias, x, gate, _: x + gate * (y @ w.T + bias),
    LINEAR.flops,
    lambda d, item: d["outputs"] * d["inputs"] * item + d["rows"] * (d["inputs"] + 2 * d["outputs"]) * max(item, 2.0),
    {
        "fp32": eager_and_compiled(linear_residual),
        "bf16": eager_and_compiled(linear_residual),
        "fp8": (
            Backend("ours", prepare_residual_fp8, True, ANYWHERE, None, launch_residual),
            Backend("scaled-mm-row", prepare_residual_scaled_mm, devices=("cuda",)),
            Backend("bf16-compiled", compiled(linear_residual), devices=("cuda",)),
        ),
    },
)
