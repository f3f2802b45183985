"""The VAE's convolutions in time and space, and its resampling."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import causal_conv3d as conv
from kernels import resample_conv2d as resample_conv
from kernels.causal_conv3d import causal_conv3d
from kernels.causal_conv3d import reference as causal_conv3d_reference
from kernels.resample_conv2d import fold_upsampling
from kernels.rms_norm_silu import fp8_out_scale
from kernels.tuning import LaunchConfig, TunedConfig
from profiling.cases.case import ANYWHERE, CUDA, FP8_MAX, Backend, Call, Dims, Operation, compiled, once
from profiling.cases.elementwise import pixels, rms_norm_silu_library


def conv3d_official(x: Tensor, w: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    """The published form: cached frames concatenated, padded, one library convolution, channels first."""
    k = w.shape[3]
    clip = torch.cat([past, x]).transpose(0, 1)[None].contiguous()
    return F.conv3d(F.pad(clip, [k // 2] * 4), w, bias)[0].transpose(0, 1)


def conv3d_channels_last(x: Tensor, w: Tensor, bias: Tensor, past: Tensor) -> Call:
    """The same library convolution on channels-last memory, weights laid out beforehand."""
    last, k = w.contiguous(memory_format=torch.channels_last_3d), w.shape[3]

    def call() -> Tensor:
        clip = torch.cat([past, x])[None].transpose(1, 2)
        return F.conv3d(clip, last, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)

    return call


def ours_conv(k: int, form: str, fp8: bool = False) -> Backend:
    """One form of kernels/causal_conv3d.py, as it is tuned; FP8 operands are rounded beforehand."""

    def run(
        x: Tensor, past: Tensor, w: Tensor, bias: Tensor, scale: Tensor | None, config: LaunchConfig | None = None
    ) -> Tensor:
        choice = (
            TunedConfig(form, config)
            if config
            else conv.tuned("causal_conv3d", x, len(w), (form,), conv.kernel_size(w)) or TunedConfig(form, {})
        )
        return conv.launch(x, past, w, bias, None, scale, choice)

    def prepare(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, config: LaunchConfig | None = None) -> Call:
        x, past, w, scale = conv_operands(x, past, w, fp8)
        return partial(run, x, past, w, bias, scale, config)

    def launcher(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, config: LaunchConfig | None = None) -> Tensor:
        return run(*conv_shapes(x, past, w, bias, fp8), config)

    space = partial(conv_space, fp8, k) if form == "gluon" else None
    return Backend(form, prepare, True, CUDA, None, launcher if form == "gluon" else None, space)


def conv_operands(x: Tensor, past: Tensor, w: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, past, weights laid out, and their scale in FP8, where all three are rounded."""
    if not fp8:
        return x, past, w.contiguous(memory_format=torch.channels_last_3d), None
    factor = FP8_MAX / float(max(x.abs().max(), past.abs().max()))
    x, past = ((t * factor).to(torch.float8_e4m3fn) for t in (x, past))
    return x, past, *conv.quantize_conv(w, factor)


def conv_shapes(
    x: Tensor, past: Tensor, w: Tensor, bias: Tensor, fp8: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What `conv_operands` makes, and the bias, of tensors without values."""
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    last = torch.empty_like(w, dtype=dtype, memory_format=torch.channels_last_3d)
    scale = w.new_empty(len(w), dtype=torch.float32) if fp8 else None
    return torch.empty_like(x, dtype=dtype), torch.empty_like(past, dtype=dtype), last, bias, scale


def conv_space(fp8: bool, k: int, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for Hopper: tiles that divide the channels, as many stages as shared memory has.

    Rows of channels that reach beyond the last one cost multiplications with zeros, but copies are fewer and longer.
    """
    for left, right, row_bytes, stages, tall, lines in (
        (128, 64, 128, 3, 0, 8), (128, 64, 64, 6, 0, 8), (128, 64, 64, 2, 1, 8), (128, 0, 128, 4, 0, 8),
        (128, 0, 64, 4, 1, 8), (64, 32, 128, 5, 0, 8), (64, 32, 128, 2, 1, 8), (64, 32, 64, 10, 0, 8),
        (64, 32, 64, 5, 1, 8), (64, 32, 32, 11, 1, 8), (64, 32, 64, 3, 1, 16), (64, 32, 64, 5, 0, 16),
        (64, 32, 128, 2, 0, 16), (16, 0, 128, 5, 1, 8), (16, 0, 64, 9, 1, 8), (16, 0, 64, 5, 1, 16),
    ):  # fmt: skip
        block_k, outputs = row_bytes if fp8 else row_bytes // 2, dims["outputs"]
        waste = -dims["channels"] % block_k / dims["channels"]
        if (
            (outputs <= 16) == (left == 16)
            and (left == 16 or outputs % (left + right) == 0)
            and block_k >= 32
            and waste < 0.5
            and (k > 1 or not tall)
        ):
            tile = {"BLOCK_N0": left, "BLOCK_N1": right, "TILE_H": lines}
            yield tile | {"BLOCK_K": block_k, "STAGES": stages, "REUSE_ROWS": tall}


def convolution(k: int) -> Operation:
    """The causal convolution with a kernel of 3 x k x k."""
    taps = 3.0 * k * k
    peers = (
        Backend("conv3d-channels-last", conv3d_channels_last, devices=("cuda",)),
        Backend("conv3d-official", once(conv3d_official)),
    )
    return Operation(
        "causal_conv3d",
        lambda d, draw: (
            pixels(draw, d["frames"], d["channels"], d["rows"], d["columns"]),
            draw(d["outputs"], d["channels"], 3, k, k, scale=(taps * d["channels"]) ** -0.5),
            draw(d["outputs"]),
            pixels(draw, 2, d["channels"], d["rows"], d["columns"]),
        ),
        causal_conv3d_reference,
        lambda d: 2.0 * taps * d["channels"] * d["outputs"] * d["frames"] * d["rows"] * d["columns"],
        lambda d, item: (
            item * (d["rows"] * d["columns"] * ((d["frames"] + 2) * d["channels"] + d["frames"] * d["outputs"]))
            + taps * item * d["channels"] * d["outputs"]
        ),
        {
            "fp32": (Backend("eager", once(causal_conv3d), ours=True), *peers),
            "bf16": (ours_conv(k, "gluon"), ours_conv(k, "library"), *peers),
            "fp8": (ours_conv(k, "gluon", fp8=True), peers[0]),
        },
    )


CAUSAL_CONV3D, TIME_CONV = convolution(3), convolution(1)


def causal_conv3d_norm(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor) -> Tensor:
    """The VAE's norm and SiLU of a causal convolution, in two passes."""
    return rms_norm_silu_library(causal_conv3d_reference(x, w, bias, past), gamma)


def ours_conv_norm(form: str, fp8: bool) -> Backend:
    """The norm on the convolution's way out, or apart; in FP8 the result is e4m3, with what undoes its factor.

    "eager" is the operation as a CPU has it.
    """

    def run(
        x: Tensor, past: Tensor, w: Tensor, bias: Tensor, scale: Tensor | None, gamma: Tensor, factor: float | None,
        config: LaunchConfig | None = None,
    ) -> Tensor:  # fmt: skip
        if form == "eager":
            return causal_conv3d(x, w, bias, past, None, scale, gamma, factor)
        choice = (
            TunedConfig(form, config)
            if config
            else conv.tuned("causal_conv3d_norm", x, len(w), (form,), conv.kernel_size(w)) or TunedConfig(form, {})
        )
        return conv.launch_normed(x, past, w, bias, scale, gamma, factor, choice)

    def prepare(
        x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor, config: LaunchConfig | None = None
    ) -> Call:  # fmt: skip
        x, past, w, scale = conv_operands(x, past, w, fp8)
        factor = fp8_out_scale(gamma) if fp8 else None
        call = partial(run, x, past, w, bias, scale, gamma, factor, config)
        if factor is None:
            return call
        undo = torch.tensor(1 / factor)
        return lambda: (call(), undo)

    def launcher(
        x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor, config: LaunchConfig | None = None
    ) -> Tensor:  # fmt: skip
        return run(*conv_shapes(x, past, w, bias, fp8), gamma, 1.0 if fp8 else None, config)

    if form != "fused":
        return Backend(form, prepare, True, CUDA if form == "apart" else ("cpu",))
    return Backend(form, prepare, True, CUDA, None, launcher, partial(conv_norm_space, fp8))


def conv_norm_space(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """Of `conv_space`, tiles that have all output channels."""
    return (launch for launch in conv_space(fp8, 3, dims) if launch["BLOCK_N0"] + launch["BLOCK_N1"] >= dims["outputs"])


CAUSAL_CONV3D_NORM = replace(
    CAUSAL_CONV3D,
    name="causal_conv3d_norm",
    inputs=lambda d, draw: (*CAUSAL_CONV3D.inputs(d, draw), 1 + draw(d["outputs"], scale=0.1)),
    reference=causal_conv3d_norm,
    backends={
        "bf16": (
            *(ours_conv_norm(form, fp8=False) for form in ("fused", "apart", "eager")),
            Backend("torch-compiled", compiled(causal_conv3d_norm), devices=ANYWHERE),
        ),
        "fp8": tuple(ours_conv_norm(form, fp8=True) for form in ("fused", "apart", "eager")),
    },
    result=lambda output: output if isinstance(output, Tensor) else output[0].float() * output[1],
    tolerances={"fp8": 6e-2},  # of e4m3 in and out
)


def upsample_conv2d(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Nearest 2x up-sampling, then a 3 x 3 convolution: [T, C, H, W] -> [T, O, 2 H, 2 W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), w, bias, padding=1)


def downsample_conv2d(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A row and a column of zeros added, then a 3 x 3 convolution of stride 2: [T, C, H, W] -> [T, O, H / 2, W / 2]."""
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), w, bias, stride=2)


def laid_out(operation: str, w: Tensor) -> Tensor:
    """Weights as the operation takes them: folded, or in channels-last memory."""
    last = torch.channels_last
    return fold_upsampling(w) if operation == "upsample_conv2d" else w.contiguous(memory_format=last)


def ours_resampling(operation: str, form: str) -> Backend:
    """One form of kernels/resample_conv2d.py, as it is tuned; weights are laid out beforehand."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
        choice = (
            TunedConfig(form, config)
            if config
            else conv.tuned(operation, x, len(bias), (form,)) or TunedConfig(form, {})
        )
        return resample_conv.launch(operation, x, weight, bias, choice)

    def prepare(x: Tensor, w: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Call:
        return partial(run, x, laid_out(operation, w), bias, config)

    def prepare_library(x: Tensor, w: Tensor, bias: Tensor) -> Call:
        return partial(resample_conv.BACKENDS[operation][form], x, laid_out(operation, w), bias)

    def launcher(x: Tensor, w: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
        return run(x, laid_out(operation, w), bias, config)

    if form == "library":
        return Backend(form, prepare_library, ours=True)
    return Backend(form, prepare, True, CUDA, None, launcher, partial(resampling_space, operation))


def resampling_space(operation: str, dims: Dims) -> Iterator[dict[str, Any]]:
    """As `conv_space`; blocks of channels end with the pixel where pixels are taken by twos."""
    for launch in conv_space(False, 2, dims):
        if operation == "upsample_conv2d" or (dims["channels"] % launch["BLOCK_K"] == 0 and not launch["REUSE_ROWS"]):
            yield launch


def resampling(operation: str, function: Callable[..., Tensor], taps: float, scale: float) -> Operation:
    """A 3 x 3 convolution that doubles or halves: taps a pixel of x; scale: pixels of y for each."""
    return Operation(
        operation,
        lambda d, draw: (
            pixels(draw, d["frames"], d["channels"], d["rows"], d["columns"]),
            draw(d["outputs"], d["channels"], 3, 3, scale=(9 * d["channels"]) ** -0.5),
            draw(d["outputs"]),
        ),
        function,
        lambda d: 2.0 * taps * d["channels"] * d["outputs"] * d["frames"] * d["rows"] * d["columns"],
        lambda d, item: (
            item * (d["frames"] * d["rows"] * d["columns"] * (d["channels"] + scale * d["outputs"]))
            + 9.0 * item * d["channels"] * d["outputs"]
        ),
        {
            dtype: (
                *((ours_resampling(operation, "gluon"),) if dtype == "bf16" else ()),
                ours_resampling(operation, "library"),
                Backend("torch", once(function)),
                Backend("torch-compiled", compiled(function), devices=CUDA),
            )
            for dtype in ("fp32", "bf16")
        },
    )


# As four phases of 2 x 2 taps on the small image; nine taps on the large one would be 9 / 4 of it.
UPSAMPLE_CONV2D = resampling("upsample_conv2d", upsample_conv2d, 16, 4)
DOWNSAMPLE_CONV2D = resampling("downsample_conv2d", downsample_conv2d, 9 / 4, 1 / 4)
