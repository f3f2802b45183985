"""Cases of the VAE's convolutions: causal, with the norm after it, and those that double or halve the picture."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv3d import (
    causal_conv3d,
    causal_conv3d_norm,
    causal_conv3d_reference,
    dispatch,
    dispatch_norm,
    quantize_conv_weight,
    tuned_conv_config,
)
from kernels.common import FP8, FP8_MAX
from kernels.resample_conv2d import (
    dispatch_downsample,
    dispatch_upsample,
    downsample_conv2d_reference,
    downsample_library,
    fold_upsampling,
    upsample_conv2d_reference,
    upsample_library,
)
from kernels.rms_norm_silu import fp8_out_scale
from kernels.tuning import LaunchConfig, TunedConfig
from profiling.cases.case import (
    ANYWHERE,
    CUDA,
    Backend,
    Call,
    Dims,
    Operation,
    Output,
    compiled,
    kernel_backend,
    no_setup,
)
from profiling.cases.elementwise import PAST_FRAMES, pixels, rms_norm_silu_library, with_last_frames


def conv3d_official(x: Tensor, w: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    """As the published code: cached frames concatenated, padding, one convolution of the library, channels first."""
    k = w.shape[3]
    clip = torch.cat([past, x]).transpose(0, 1)[None].contiguous()
    return F.conv3d(F.pad(clip, [k // 2] * 4), w, bias)[0].transpose(0, 1)


def conv3d_channels_last(x: Tensor, w: Tensor, bias: Tensor, past: Tensor) -> Call:
    """The same convolution on channels-last memory, with weights converted beforehand."""
    last, k = w.contiguous(memory_format=torch.channels_last_3d), w.shape[3]

    def call() -> Tensor:
        clip = torch.cat([past, x])[None].transpose(1, 2)
        return F.conv3d(clip, last, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)

    return call


def config_of(
    operation: str, backend: str, x: Tensor, w: Tensor, config: LaunchConfig | None, kernel_dims: Sequence[str] = ()
) -> TunedConfig:
    """One backend of a convolution with those launch parameters, or else with the tuned ones."""
    tuned = None if config else tuned_conv_config(operation, x, w, (backend,), kernel_dims)
    return tuned or TunedConfig(backend, config or {})


def ours_conv(k: int, backend: str, fp8: bool = False) -> Backend:
    """One backend of `causal_conv3d`, as it is tuned; FP8 operands are rounded beforehand."""

    def run(
        x: Tensor, w: Tensor, past: Tensor, scale: Tensor | None, bias: Tensor, config: LaunchConfig | None = None
    ) -> Tensor:
        tuned = config_of("causal_conv3d", backend, x, w, config, ("kt", "k"))
        return dispatch(x, w, bias, past, None, scale, tuned)

    return kernel_backend(
        backend,
        run,
        configs=partial(conv_configs, fp8, k) if backend == "gluon" else None,
        operands=lambda x, w, bias, past: (*conv_operands(x, w, past, fp8), bias),
        empty_operands=lambda x, w, bias, past: (*conv_shapes(x, w, past, fp8), bias),
        audited=backend == "gluon",
    )


def conv_operands(x: Tensor, w: Tensor, past: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, the weight in channels-last memory, past, and the scale of FP8, in which all three are rounded."""
    if not fp8:
        return x, w.contiguous(memory_format=torch.channels_last_3d), past, None
    in_scale = FP8_MAX / float(max(x.abs().max(), past.abs().max()))
    x, past = ((t * in_scale).to(FP8) for t in (x, past))
    w, scale = quantize_conv_weight(w, in_scale)
    return x, w, past, scale


def conv_shapes(x: Tensor, w: Tensor, past: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What `conv_operands` makes, of tensors without values."""
    dtype = FP8 if fp8 else x.dtype
    last = torch.empty_like(w, dtype=dtype, memory_format=torch.channels_last_3d)
    scale = w.new_empty(len(w), dtype=torch.float32) if fp8 else None
    return torch.empty_like(x, dtype=dtype), last, torch.empty_like(past, dtype=dtype), scale


def conv_configs(fp8: bool, k: int, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Hopper kernel: tiles that divide the output channels, and the stages that fit.

    A BLOCK_K that does not divide the input channels multiplies zeros, but makes copies fewer and longer.
    """
    for block_n0, block_n1, row_bytes, stages, reuse_rows, tile_h in (
        (128, 64, 128, 3, 0, 8), (128, 64, 64, 6, 0, 8), (128, 64, 64, 2, 1, 8), (128, 0, 128, 4, 0, 8),
        (128, 0, 64, 4, 1, 8), (64, 32, 128, 5, 0, 8), (64, 32, 128, 2, 1, 8), (64, 32, 64, 10, 0, 8),
        (64, 32, 64, 5, 1, 8), (64, 32, 32, 11, 1, 8), (64, 32, 64, 3, 1, 16), (64, 32, 64, 5, 0, 16),
        (64, 32, 128, 2, 0, 16), (16, 0, 128, 5, 1, 8), (16, 0, 64, 9, 1, 8), (16, 0, 64, 5, 1, 16),
    ):  # fmt: skip
        block_k, outputs = row_bytes if fp8 else row_bytes // 2, dims["outputs"]
        waste = -dims["channels"] % block_k / dims["channels"]
        if (
            (outputs <= 16) == (block_n0 == 16)
            and (block_n0 == 16 or outputs % (block_n0 + block_n1) == 0)
            and block_k >= 32
            and waste < 0.5
            and (k > 1 or not reuse_rows)
        ):
            tile = {"BLOCK_N0": block_n0, "BLOCK_N1": block_n1, "TILE_H": tile_h}
            yield tile | {"BLOCK_K": block_k, "STAGES": stages, "REUSE_ROWS": reuse_rows}


def convolution(k: int) -> Operation:
    """The causal convolution with a kernel of 3 x k x k."""
    taps = 3.0 * k * k
    peers = (
        Backend("conv3d-channels-last", conv3d_channels_last, devices=("cuda",)),
        Backend("conv3d-official", no_setup(conv3d_official)),
    )
    return Operation(
        name="causal_conv3d",
        inputs=lambda d, randn: (
            pixels(randn, d["frames"], d["channels"], d["rows"], d["columns"]),
            randn(d["outputs"], d["channels"], 3, k, k, scale=(taps * d["channels"]) ** -0.5),
            randn(d["outputs"]),
            pixels(randn, 2, d["channels"], d["rows"], d["columns"]),
        ),
        reference=causal_conv3d_reference,
        flops=lambda d: 2.0 * taps * d["channels"] * d["outputs"] * d["frames"] * d["rows"] * d["columns"],
        bytes=lambda d, item: (
            item * (d["rows"] * d["columns"] * ((d["frames"] + 2) * d["channels"] + d["frames"] * d["outputs"]))
            + taps * item * d["channels"] * d["outputs"]
        ),
        backends={
            "fp32": (Backend("eager", no_setup(causal_conv3d), ours=True), *peers),
            "bf16": (ours_conv(k, "gluon"), ours_conv(k, "library"), *peers),
            "fp8": (ours_conv(k, "gluon", fp8=True), peers[0]),
        },
    )


CAUSAL_CONV3D, TIME_CONV = convolution(3), convolution(1)


def conv_then_norm(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor) -> Tensor:
    """A causal convolution, then RMS norm and SiLU, as PyTorch's operations."""
    return rms_norm_silu_library(causal_conv3d_reference(x, w, bias, past), gamma)


def ours_conv_norm(backend: str, fp8: bool, has_tail: bool = False) -> Backend:
    """One backend of `causal_conv3d_norm`; "eager" is the public function, for CPUs.

    With a tail the result comes with its last frames. In FP8 it is e4m3, together with the reciprocal of its scale.
    """

    def run(
        x: Tensor, w: Tensor, bias: Tensor, gamma: Tensor, past: Tensor, scale: Tensor | None, out_scale: float | None,
        tail: Tensor | None, config: LaunchConfig | None = None,
    ) -> Tensor:  # fmt: skip
        if backend == "eager":
            return causal_conv3d_norm(x, w, bias, gamma, past, scale, out_scale, tail)
        operation = CAUSAL_CONV3D_NORM_TAIL if has_tail else CAUSAL_CONV3D_NORM
        tuned = config_of(operation.name, backend, x, w, config, ("kt", "k"))
        return dispatch_norm(x, w, bias, gamma, past, scale, out_scale, tail, tuned)

    def new_tail(x: Tensor, w: Tensor, bias: Tensor) -> Tensor | None:
        frames, _, rows, columns = x.shape
        shape, dtype = (min(PAST_FRAMES, frames), rows, columns, len(w)), FP8 if fp8 else bias.dtype
        return bias.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2) if has_tail else None

    def prepare(
        x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor, config: LaunchConfig | None = None
    ) -> Call:  # fmt: skip
        tail, out_scale = new_tail(x, w, bias), fp8_out_scale(gamma) if fp8 else None
        x, w, past, scale = conv_operands(x, w, past, fp8)
        call = partial(run, x, w, bias, gamma, past, scale, out_scale, tail, config)
        undo = None if out_scale is None else torch.tensor(1 / out_scale)
        more = tuple(value for value in (tail, undo) if value is not None)
        return (lambda: (call(), *more)) if more else call

    def launcher(
        x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor, config: LaunchConfig | None = None
    ) -> Tensor:  # fmt: skip
        tail = new_tail(x, w, bias)
        x, w, past, scale = conv_shapes(x, w, past, fp8)
        return run(x, w, bias, gamma, past, scale, 1.0 if fp8 else None, tail, config)

    if backend != "fused":
        return Backend(backend, prepare, ours=True, devices=CUDA if backend == "separate" else ("cpu",))
    configs = partial(conv_norm_configs, fp8)
    return Backend(backend, prepare, ours=True, devices=CUDA, launcher=launcher, configs=configs, gluon=True)


def conv_norm_configs(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """The tiles of `conv_configs` that hold all output channels."""
    return (
        config for config in conv_configs(fp8, 3, dims) if config["BLOCK_N0"] + config["BLOCK_N1"] >= dims["outputs"]
    )


def without_scale(output: Any) -> Output:
    """The values that the output of a back-end of `ours_conv_norm` stands for."""
    if isinstance(output, Tensor) or output[-1].ndim:
        return output
    y, *tail, undo = output
    values = [value.float() * undo for value in (y, *tail)]
    return tuple(values) if tail else values[0]


CAUSAL_CONV3D_NORM = replace(
    CAUSAL_CONV3D,
    name="causal_conv3d_norm",
    inputs=lambda d, randn: (*CAUSAL_CONV3D.inputs(d, randn), 1 + randn(d["outputs"], scale=0.1)),
    reference=conv_then_norm,
    backends={
        "bf16": (
            *(ours_conv_norm(backend, fp8=False) for backend in ("fused", "separate", "eager")),
            Backend("torch-compiled", compiled(conv_then_norm), devices=ANYWHERE),
        ),
        "fp8": tuple(ours_conv_norm(backend, fp8=True) for backend in ("fused", "separate", "eager")),
    },
    result=without_scale,
    tolerances={"fp8": 6e-2},  # of e4m3 in and out
)

CAUSAL_CONV3D_NORM_TAIL = replace(
    CAUSAL_CONV3D_NORM,
    name="causal_conv3d_norm_tail",
    reference=lambda *inputs: with_last_frames(conv_then_norm(*inputs)),
    backends={
        dtype: tuple(ours_conv_norm(name, dtype == "fp8", has_tail=True) for name in ("fused", "separate", "eager"))
        for dtype in ("bf16", "fp8")
    },
)


def prepare_weight(operation: str, w: Tensor) -> Tensor:
    """The weight as the operation takes it: folded, or in channels-last memory."""
    last = torch.channels_last
    return fold_upsampling(w) if operation == "upsample_conv2d" else w.contiguous(memory_format=last)


def ours_resampling(operation: str, backend: str) -> Backend:
    """One backend of `upsample_conv2d` or `downsample_conv2d`, as it is tuned; weights are prepared beforehand."""
    up = operation == "upsample_conv2d"
    if backend == "library":
        library = upsample_library if up else downsample_library
        return Backend(backend, lambda x, w, bias: partial(library, x, prepare_weight(operation, w), bias), ours=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
        tuned = config_of(operation, backend, x, weight[0, 0] if up else weight, config)
        return (dispatch_upsample if up else dispatch_downsample)(x, weight, bias, tuned)

    return kernel_backend(
        backend,
        run,
        configs=partial(resampling_configs, operation),
        operands=lambda x, w, bias: (x, prepare_weight(operation, w), bias),
    )


def resampling_configs(operation: str, dims: Dims) -> Iterator[dict[str, Any]]:
    """`conv_configs`; with a stride of 2 BLOCK_K must divide the channels, and rows cannot be reused."""
    for config in conv_configs(False, 2, dims):
        if operation == "upsample_conv2d" or (dims["channels"] % config["BLOCK_K"] == 0 and not config["REUSE_ROWS"]):
            yield config


def resampling(operation: str, function: Callable[..., Tensor], taps: float, pixels_out: float) -> Operation:
    """A 3 x 3 convolution that doubles or halves rows and columns: taps per pixel of x, pixels of y per pixel of x."""
    return Operation(
        name=operation,
        inputs=lambda d, randn: (
            pixels(randn, d["frames"], d["channels"], d["rows"], d["columns"]),
            randn(d["outputs"], d["channels"], 3, 3, scale=(9 * d["channels"]) ** -0.5),
            randn(d["outputs"]),
        ),
        reference=function,
        flops=lambda d: 2.0 * taps * d["channels"] * d["outputs"] * d["frames"] * d["rows"] * d["columns"],
        bytes=lambda d, item: (
            item * (d["frames"] * d["rows"] * d["columns"] * (d["channels"] + pixels_out * d["outputs"]))
            + 9.0 * item * d["channels"] * d["outputs"]
        ),
        backends={
            dtype: (
                *((ours_resampling(operation, "gluon"),) if dtype == "bf16" else ()),
                ours_resampling(operation, "library"),
                Backend("torch", no_setup(function)),
                Backend("torch-compiled", compiled(function), devices=CUDA),
            )
            for dtype in ("fp32", "bf16")
        },
    )


# Counted as four phases of 2 x 2 taps on the small image; nine taps on the large one would be 9 / 4 of that.
UPSAMPLE_CONV2D = resampling("upsample_conv2d", upsample_conv2d_reference, 16, 4)
DOWNSAMPLE_CONV2D = resampling("downsample_conv2d", downsample_conv2d_reference, 9 / 4, 1 / 4)
