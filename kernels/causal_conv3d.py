"""Causal 3-D convolution of the video VAE, alone and with the norm and activation that follow it.

    causal_conv3d        y[t] = bias + sum over i = 0 .. kt-1 of conv2d(x[t - (kt-1) + i], weight[:, :, i])
    causal_conv3d_norm   SiLU(RMSNorm(y)), which is the input of the next convolution, in e4m3 if asked for
    conv3d               the same sum over the given frames only, with a stride in time

Frame t sees itself and the kt - 1 frames before it, and never a later one. The frames before x[0] are `past`, or zeros
at the start of a clip. So a clip can be processed in pieces of any length: `past` are the last frames of the piece
before.

Tensors are frames first, [frame, channel, row, column], in channels-last memory: the same bytes as channels_last_3d of
[1, channel, frame, row, column].

Backends: "library" is PyTorch, which is cuDNN on a GPU. "gluon" is the Hopper kernel of kernels/conv_sm90.py: always in
FP8, in 16 bits where kernels/tuned/ says so. On other GPUs the library computes FP8 too, with widened operands.
`causal_conv3d_norm` is "separate", which is two kernels, or "fused", which is the norm in the epilogue of the Hopper
kernel, where kernels/tuned/ says so. With a `tail`, its last frames are stored a second time by the kernel that has the
norm; it is then a choice of its own, `causal_conv3d_norm_tail`. Source: the CausalConv3d of Wan2.1's VAE.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import conv_sm90
from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, MIN_SCALE, check, define_op
from kernels.conv_sm90 import supports
from kernels.rms_norm_silu import check_tail, launch_rms_norm_silu, with_tail
from kernels.rms_norm_silu import reference as rms_norm_silu_reference
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, tuned_config

BACKENDS = ("gluon", "library")  # of causal_conv3d
NORM_BACKENDS = ("fused", "separate")  # of causal_conv3d_norm


# --- Reference ------------------------------------------------------------------------------------------------------


def causal_conv3d_reference(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """One dense convolution over zero-padded frames. Arguments as in `causal_conv3d`."""
    kt, k = weight.shape[2:4]
    if past is None:
        past = x.new_zeros(kt - 1, *x.shape[1:])
    clip = torch.cat([past, x]).transpose(0, 1)[None]  # [1, C, kt - 1 + T, H, W]
    return F.conv3d(clip, weight, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)


def causal_conv3d_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, past: Tensor | None = None, out_scale: float | None = None
) -> Tensor:
    """The dense convolution, then RMS norm and SiLU of every pixel. Arguments as in `causal_conv3d_norm`."""
    return rms_norm_silu_reference(causal_conv3d_reference(x, weight, bias, past), gamma, True, out_scale)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    """`causal_conv3d` by PyTorch, where `past` has any number of frames from 0 to kt - 1. FP8 is widened first."""
    conv, kt = (_conv3d_library if x.is_cuda else _conv3d_stacked), weight.shape[2]
    if scale is not None:
        assert bias is not None
        wide = torch.promote_types(bias.dtype, torch.float32)
        y = launch_library(x.to(wide), weight.to(wide), None, past.to(wide), None, None)
        y = y.mul_(scale.view(-1, 1, 1)).add_(bias.to(wide).view(-1, 1, 1))
        return (y if residual is None else y.add_(residual)).to(bias.dtype)
    if len(past) or kt == 1:
        y = conv(_with_past(x, past, kt - 1), weight, bias, 1)
    else:  # the taps on zero frames are skipped
        y = conv(x, weight[:, :, -1:], bias, 1)
        for lag in range(1, min(kt, len(x))):
            y[lag:] += conv(x[:-lag], weight[:, :, kt - 1 - lag : kt - lag], None, 1)
    return y if residual is None else y.add_(residual)


def _with_past(x: Tensor, past: Tensor, past_frames: int) -> Tensor:
    """x behind `past_frames` frames, which are those of `past` with zeros before them; in channels-last memory."""
    frames, (_, channels, rows, columns) = past_frames - len(past), x.shape
    zeros = x.new_zeros(frames, rows, columns, channels).permute(0, 3, 1, 2)
    parts = [part for part in (zeros, past, x) if len(part)]
    return x if len(parts) == 1 else torch.cat(parts).contiguous(memory_format=torch.channels_last)


def _conv3d_library(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """`conv3d` by the library's 3-D convolution, on the same memory seen as channels_last_3d."""
    k = weight.shape[3]
    clip = x[None].transpose(1, 2)  # [1, C, N, H, W]; in this order, or torch takes the view for channels-first
    y = F.conv3d(clip, weight, bias, (stride, 1, 1), (0, k // 2, k // 2))
    return y[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _conv3d_stacked(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """`conv3d` by a 2-D convolution whose input channels are those of kt frames: on CPUs 2 to 30 times faster."""
    kt, k = weight.shape[2:4]
    span = stride * ((len(x) - kt) // stride) + 1
    taps = [x[i : i + span : stride] for i in range(kt)]
    stacked = torch.cat(taps, dim=1) if kt > 1 else taps[0]  # [T, kt * C, H, W]
    y = F.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=k // 2)
    return y.contiguous(memory_format=torch.channels_last)  # it is not for single frames of unusual strides


def launch_sm90(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    config: LaunchConfig | None = None,
    gamma: Tensor | None = None,
    out_scale: float | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """`causal_conv3d` by the Hopper kernel, where `past` has any number of frames from 0 to kt - 1.

    Output channels are padded to a multiple of 16 bytes. With gamma [O] it is `causal_conv3d_norm`, and the tile of the
    launch parameters must hold all output channels. Where TMA cannot write a `tail`, it is copied.
    """
    frames, _, rows, columns = x.shape
    dtype = FP8 if out_scale is not None else _result_dtype(x, bias)
    outputs, padding = len(weight), -len(weight) % (16 // dtype.itemsize)
    if padding:
        zeros = weight.new_zeros(padding, *weight.shape[1:])
        weight = torch.cat([weight, zeros]).contiguous(memory_format=torch.channels_last_3d)
        bias, scale, gamma = (None if v is None else F.pad(v.flatten(), (0, padding)) for v in (bias, scale, gamma))
        if residual is not None:
            residual = F.pad(residual, (0, 0, 0, 0, 0, padding)).contiguous(memory_format=torch.channels_last)
    y = x.new_empty(frames, rows, columns, len(weight), dtype=dtype).permute(0, 3, 1, 2)
    tap_offset = -(weight.shape[3] // 2)
    norm = None if gamma is None else (gamma, outputs**0.5, out_scale or 1.0)
    stored = tail if tail is not None and not padding and tail.data_ptr() % 16 == 0 else None
    conv_sm90.launch_conv(
        x, weight, bias, past, residual, scale, y, (tap_offset, tap_offset), config=config, norm=norm, tail=stored
    )  # fmt: skip
    y = y[:, :outputs].contiguous(memory_format=torch.channels_last)
    return y if stored is not None else with_tail(y, tail)


def dispatch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    tuned: TunedConfig | None = None,
) -> Tensor:
    """`causal_conv3d` on a GPU: by the backend `tuned`, or else by the fastest measured one.

    For a shape without measurements that is the kernel in FP8, and the library elsewhere. The library also computes
    what the kernel cannot.
    """
    tuned = tuned or tuned_conv_config("causal_conv3d", x, weight, BACKENDS, ("kt", "k"))
    backend = tuned.backend if tuned is not None else "gluon" if x.dtype == FP8 else "library"
    if backend == "gluon" and _on_hopper(x, past, weight, _result_dtype(x, bias)):
        return launch_sm90(x, weight, bias, past, residual, scale, tuned.config if tuned is not None else None)
    return launch_library(x, weight, bias, past, residual, scale)


def dispatch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    past: Tensor,
    scale: Tensor | None,
    out_scale: float | None,
    tail: Tensor | None,
    tuned: TunedConfig | None = None,
) -> Tensor:
    """`causal_conv3d_norm` on a GPU: "fused" where measurements or `tuned` say so, else the two operations."""
    operation = "causal_conv3d_norm" if tail is None else "causal_conv3d_norm_tail"
    tuned = tuned or tuned_conv_config(operation, x, weight, NORM_BACKENDS, ("kt", "k"))
    dtype = FP8 if out_scale is not None else _result_dtype(x, bias)
    if tuned is None or tuned.backend != "fused" or not _on_hopper(x, past, weight, dtype):
        return launch_rms_norm_silu(dispatch(x, weight, bias, past, None, scale), gamma, True, out_scale, tail)
    return launch_sm90(x, weight, bias, past, None, scale, tuned.config, gamma, out_scale, tail)


def _on_hopper(x: Tensor, past: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the GPU is a Hopper whose kernel takes these operands and gives a result in `dtype`."""
    return gpu_of(x.device).capability == "9.0" and dtype != torch.float32 and supports(x, past, weight)


def tuned_conv_config(
    operation: str, x: Tensor, weight: Tensor, backends: Collection[str], kernel_dims: Collection[str] = ()
) -> TunedConfig | None:
    """The fastest measured backend for a convolution of x [T, C, H, W]: that of the nearest measured size.

    Args:
        operation: its public name.
        x: the input.
        weight: [O, C, kt, k, k], or [O, C, k, k]; an entry must have the same number of output channels.
        backends: the ones to choose from.
        kernel_dims: of "kt" and "k", those that are dimensions of the operation's entries; they must be equal, too.
    """
    if (dtype := {**DTYPE_NAMES, FP8: "fp8"}.get(x.dtype)) is None:
        return None
    frames, channels, rows, columns = x.shape
    dims = {"frames": frames, "channels": channels, "rows": rows, "columns": columns, "outputs": len(weight)}
    kernel = {"kt": weight.shape[2], "k": weight.shape[-1]}
    dims |= {name: kernel[name] for name in kernel_dims}
    return tuned_config(operation, dims, dtype, x.device, backends, ("outputs", *kernel_dims))


# --- Operation ------------------------------------------------------------------------------------------------------


def _causal_conv3d_norm_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    past: Tensor,
    scale: Tensor | None,
    out_scale: float | None,
    tail: Tensor | None,
) -> Tensor:
    y = launch_library(x, weight, bias, past, None, scale)
    return with_tail(rms_norm_silu_reference(y, gamma, True, out_scale), tail)


causal_conv3d_op = define_op("causal_conv3d", cpu=launch_library, cuda=dispatch)
causal_conv3d_norm_op = define_op(
    "causal_conv3d_norm", cpu=_causal_conv3d_norm_cpu, cuda=dispatch_norm, mutates_args=("tail",)
)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Convolution in time and space in which no frame sees a later one.

        y[t] = bias + sum over i = 0 .. kt-1 of conv2d(x[t - (kt-1) + i], weight[:, :, i], padding=k // 2)

    x[-1], x[-2], ... are the last frames of `past`, or zeros. `residual`, if there is one, is added to y. In FP8 the
    sum is multiplied by `scale` before bias and residual are added. Source: CausalConv3d of Wan2.1's VAE.

    Args:
        x: [T, C, H, W] in channels-last memory; any floating-point dtype, or e4m3.
        weight: [O, C, kt, k, k] with k odd, of x's dtype. Unless it is in channels-last memory it is copied in every
            call on a GPU.
        bias: [O].
        past: [kt - 1, C, H, W] in channels-last memory, the frames before x. None is the start of a clip, where taps on
            zero frames are skipped.
        residual: [T, O, H, W] in channels-last memory, of the result's dtype, or None.
        scale: float32 [O], with e4m3 operands and only with them: undoes the scales of the weight and of x, as
            `quantize_conv_weight` returns it.

    Returns:
        y [T, O, H, W] in channels-last memory, in x's dtype, or, of e4m3 operands, in the bias's.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    past = _check_operands(x, weight, bias, past, residual, scale, len(x))
    return causal_conv3d_op(x, weight, bias, past, residual, scale)


def causal_conv3d_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    past: Tensor | None = None,
    scale: Tensor | None = None,
    out_scale: float | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """Causal convolution, then RMS norm over the channels of every pixel, then SiLU.

        y[t] = bias + sum over i = 0 .. kt-1 of conv2d(x[t - (kt-1) + i], weight[:, :, i], padding=k // 2)
        z = y / max(||y||, 1e-12) sqrt(O) gamma          the norm over a pixel's O channels
        result = z / (1 + exp(-z))                       times out_scale, as e4m3, if there is an out_scale

    x[-1], x[-2], ... are the last frames of `past`, or zeros. In FP8 the sum is multiplied by `scale` before the bias
    is added. Source: a convolution and what follows it in the ResidualBlock of Wan2.1's VAE.

    Args:
        x: [T, C, H, W] in channels-last memory; any floating-point dtype, or e4m3.
        weight: [O, C, kt, k, k] with k odd, of x's dtype. Unless it is in channels-last memory it is copied in every
            call on a GPU.
        bias: [O].
        gamma: [O], or with axes of length 1 behind; contiguous.
        past: [kt - 1, C, H, W] in channels-last memory, the frames before x. None is the start of a clip, where taps on
            zero frames are skipped.
        scale: float32 [O], with e4m3 operands and only with them: undoes the scales of the weight and of x, as
            `quantize_conv_weight` returns it.
        out_scale: what an e4m3 result is multiplied by; at most 448 / (max |gamma| sqrt(O)), or it may saturate. None
            for a result that is not e4m3.
        tail: [n, O, H, W] in channels-last memory, of the result's dtype, is overwritten with the last n frames of the
            result. None if they are wanted once only.

    Returns:
        [T, O, H, W] in channels-last memory: e4m3 with `out_scale`, else in x's dtype, or, of e4m3 operands, in the
        bias's.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    past = _check_operands(x, weight, bias, past, None, scale, len(x))
    check("gamma", gamma, shape=(len(weight), *[1] * (gamma.ndim - 1)), device=x.device, layout="contiguous")
    dtype = FP8 if out_scale is not None else _result_dtype(x, bias)
    check_tail(tail, (len(x), len(weight), *x.shape[2:]), dtype, x.device)
    return causal_conv3d_norm_op(x, weight, bias, gamma, past, scale, out_scale, tail)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Convolution in time and space without padding in time.

        y[t] = bias + sum over i = 0 .. kt-1 of conv2d(x[stride t + i], weight[:, :, i], padding=k // 2)

    `residual`, if there is one, is added to y. In FP8 the sum is multiplied by `scale` before bias and residual are
    added.

    Args:
        x: [N, C, H, W] in channels-last memory, N at least kt; any floating-point dtype, or e4m3.
        weight: [O, C, kt, k, k] with k odd, of x's dtype.
        bias: [O], or None.
        stride: in time; 1 in FP8.
        residual: in channels-last memory, of the result's shape and dtype, or None.
        scale: float32 [O], with e4m3 operands and a bias, and only with them: undoes the scales of the weight and of x,
            as `quantize_conv_weight` returns it.

    Returns:
        y [(N - kt) // stride + 1, O, H, W] in channels-last memory, in x's dtype, or, of e4m3 operands, in the bias's.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    kt = weight.shape[2]
    if stride < 1:
        raise ValueError(f"stride: {stride}, wanted 1 or more")
    if len(x) < kt:
        raise ValueError(f"x: shape {list(x.shape)}, wanted {kt} frames or more")
    past = _check_operands(x, weight, bias, x[: kt - 1], residual, scale, (len(x) - kt) // stride + 1)
    if stride == 1:
        return causal_conv3d_op(x[kt - 1 :], weight, bias, past, residual, scale)
    if scale is not None:
        raise ValueError(f"stride: {stride}, wanted 1 in FP8")
    y = (_conv3d_library if x.is_cuda else _conv3d_stacked)(x, weight, bias, stride)
    return y if residual is None else y.add_(residual)


def quantize_conv_weight(weight: Tensor, in_scale: float) -> tuple[Tensor, Tensor]:
    """Rounds the weight of a convolution to e4m3, with one scale for each output channel.

    Args:
        weight: [O, C, kt, k, k].
        in_scale: what the convolution's e4m3 input is multiplied by.

    Returns:
        The weight as e4m3 in channels-last memory, every output channel scaled so that its largest element is 448; and
        float32 [O], which undoes that scale and `in_scale`.
    """
    wide = weight.float()
    weight_scale = (wide.abs().amax((1, 2, 3, 4)) / FP8_MAX).clamp_min(MIN_SCALE)
    quantized = (wide / weight_scale.view(-1, 1, 1, 1, 1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantized.contiguous(memory_format=torch.channels_last_3d), weight_scale / in_scale


def _check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out_frames: int,
) -> Tensor:
    """Raises ValueError unless the operands fit each other; returns `past`, which has no frames where it was None."""
    check("weight", weight, shape=("outputs", "inputs", "kt", "k", "k"), device=x.device)
    outputs, channels, kt, k, k_columns = weight.shape
    if k != k_columns or k % 2 == 0:
        raise ValueError(f"weight: shape {list(weight.shape)}, wanted [outputs, inputs, kt, k, k], k odd")
    check("x", x, shape=("frames", channels, "rows", "columns"), dtype=weight.dtype, layout="channels_last")
    if bias is not None:
        check("bias", bias, shape=(outputs,), device=x.device)
    if (x.dtype == FP8) != (scale is not None) or (scale is not None and bias is None):
        raise ValueError(f"scale: wanted with e4m3 and a bias, and only with them; x is {x.dtype}")
    if scale is not None:
        check("scale", scale, shape=(outputs,), dtype=torch.float32, device=x.device)
    if residual is not None:
        out_shape, dtype = (out_frames, outputs, *x.shape[2:]), _result_dtype(x, bias)
        check("residual", residual, shape=out_shape, dtype=dtype, device=x.device, layout="channels_last")
    if past is None:
        return x[:0]
    check("past", past, shape=(kt - 1, *x.shape[1:]), dtype=x.dtype, device=x.device, layout="channels_last")
    return past


def _result_dtype(x: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of a convolution of x, unless its result is to be e4m3."""
    return bias.dtype if x.dtype == FP8 and bias is not None else x.dtype
