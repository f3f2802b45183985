"""Causal 3-D convolution of the video VAE.

    y[t] = bias + sum_{i = 0 .. kt-1} conv2d(x[t - (kt-1) + i], weight[:, :, i], padding k // 2)

Frame t sees itself and the kt - 1 frames before it, never a later one; the frames before x[0] are `past`, or zeros at
the start of a clip. So a clip goes through in pieces of any length, each with the last frames of the one before it.

Tensors are frames first, [frame, channel, row, column], in channels-last memory: the same bytes as channels_last_3d of
[1, channel, frame, row, column]. Weights are best in channels-last memory too: elsewhere they are copied in each call.
In FP8 (e4m3) x is that of `rms_norm_silu(..., factor)`, `scale` [O] undoes the factor and the weights' own scales, and y
has the dtype of the bias.

With `gamma` [O] the result is SiLU of y's norm instead, as of kernels/rms_norm_silu.py, for the convolution behind it: in
e4m3, `factor` times larger, if there is a factor.

Forms: `reference` is the definition; on CPUs a 2-D convolution of stacked frames; on GPUs the library's (cuDNN). On
Hopper the kernel of kernels/conv_sm90.py computes FP8, and 16 bits where kernels/tuned/ names it. On other GPUs the
library computes FP8 too: operands are widened, which is exact but saves no time.
"""

from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import conv_sm90
from kernels.common import DTYPE_NAMES, FP8_MAX, MIN_SCALE
from kernels.conv_sm90 import WHOLE, supports
from kernels.rms_norm_silu import check_gamma, launch_rms_norm_silu
from kernels.rms_norm_silu import reference as pixel_norm_reference
from kernels.sm90 import FP8
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of, tuned_config


def reference(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """The definition: one dense convolution over zero-padded frames. Arguments as in `causal_conv3d`."""
    kt, k = weight.shape[2:4]
    if past is None:
        past = x.new_zeros(kt - 1, *x.shape[1:])
    clip = torch.cat([past, x]).transpose(0, 1)[None]  # [1, C, kt - 1 + T, H, W]
    return F.conv3d(clip, weight, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    gamma: Tensor | None = None,
    factor: float | None = None,
) -> Tensor:
    """`reference` without its zero frames: x [T, C, H, W] -> [T, O, H, W], in channels-last memory and x's dtype.

    weight [O, C, kt, k, k] with k odd, bias [O]; `past` [kt - 1, C, H, W] are the frames before x, None at the start of
    a clip or where kt = 1. At the start the taps on zero frames are skipped, kt (kt - 1) / 2 of the clip's tap-frames.
    `residual`, like the result, is added to it. In FP8, x, `past` and the weight are e4m3, the sums are multiplied by
    `scale`, float32 [O], and the result has the bias's dtype. With `gamma` [O] and, for a result in e4m3, `factor`, the
    result y, which then takes no residual, is replaced by `rms_norm_silu(y, gamma, True, factor)`.

    Raises ValueError if an argument has another shape, dtype or memory format than that.
    """
    kt = weight.shape[2]
    _check(x, weight, bias, residual, scale, len(x), 1)
    if past is None:
        past = x[:0]
    elif past.shape != (kt - 1, *x.shape[1:]):
        raise ValueError(f"past: shape {list(past.shape)}, wanted {[kt - 1, *x.shape[1:]]}")
    if past.dtype != x.dtype:
        raise ValueError(f"past: dtype {past.dtype}, wanted x's, {x.dtype}")
    if not past.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"past: strides {past.stride()} for shape {list(past.shape)}, wanted channels-last memory")
    if gamma is None:
        return _conv3d(x, past, weight, bias, residual, scale)
    check_gamma(gamma, len(weight), x.device)
    if residual is not None:
        raise ValueError("residual: not together with gamma")
    return _conv3d_norm(x, past, weight, bias, scale, gamma, factor)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The same convolution over the frames given and no others, at every `stride`-th place in time.

    x [N, C, H, W] -> [(N - kt) // stride + 1, O, H, W], in channels-last memory and x's dtype; weight [O, C, kt, k, k]
    with k odd, bias [O] or None; `residual`, like the result, is added to it; FP8 as above. Raises ValueError if an
    argument has another shape, dtype or memory format than that.
    """
    kt = weight.shape[2]
    if stride < 1:
        raise ValueError(f"stride: {stride}, wanted 1 or more")
    _check(x, weight, bias, residual, scale, (len(x) - kt) // stride + 1, kt)
    if stride == 1:
        return _conv3d(x[kt - 1 :], x[: kt - 1], weight, bias, residual, scale)
    if scale is not None:
        raise ValueError(f"stride: {stride}, wanted 1 in FP8")
    y = (_volume if x.is_cuda else _stacked)(x, weight, bias, stride)
    return y if residual is None else y.add_(residual)


def quantize_conv(weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """e4m3 weights [O, C, kt, k, k] in channels-last memory, each output channel by its largest, and `scale` [O].

    The scale undoes the weights' own and that of inputs which are `factor` too large.
    """
    wide = weight.float()
    largest = (wide.abs().amax((1, 2, 3, 4)) / FP8_MAX).clamp_min(MIN_SCALE)
    narrow = (wide / largest.view(-1, 1, 1, 1, 1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return narrow.contiguous(memory_format=torch.channels_last_3d), largest / factor


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    frames: int,
    least: int,
) -> None:
    """Raises ValueError unless x goes along with the weight, and residual and scale with `frames` of output."""
    if weight.shape[3] != weight.shape[4] or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight: shape {list(weight.shape)}, wanted [outputs, inputs, kt, k, k], k odd")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {list(bias.shape)}, wanted {[len(weight)]}")
    if x.ndim != 4 or x.shape[1] != weight.shape[1] or len(x) < least:
        raise ValueError(f"x: shape {list(x.shape)}, wanted [{least} or more, {weight.shape[1]}, rows, columns]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x: dtype {x.dtype}, wanted the weight's, {weight.dtype}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: strides {x.stride()} for shape {list(x.shape)}, wanted channels-last memory")
    if (x.dtype == FP8) != (scale is not None) or (scale is not None and bias is None):
        raise ValueError(f"scale: wanted with e4m3 and a bias, and only with them; x is {x.dtype}")
    if scale is not None and (scale.shape != weight.shape[:1] or scale.dtype != torch.float32):
        raise ValueError(f"scale: {scale.dtype} {list(scale.shape)}, wanted float32 {[len(weight)]}")
    if residual is not None:
        wanted, dtype = (frames, weight.shape[0], *x.shape[2:]), _result(x, bias)
        if residual.shape != wanted or residual.dtype != dtype:
            raise ValueError(f"residual: {residual.dtype} {list(residual.shape)}, wanted {dtype} {list(wanted)}")
        if not residual.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"residual: strides {residual.stride()}, wanted channels-last memory")


def _result(x: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the result."""
    return bias.dtype if x.dtype == FP8 and bias is not None else x.dtype


# --- The library's --------------------------------------------------------------------------------------------------


def launch_library(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """As `launch`, by PyTorch: cuDNN on a GPU. FP8 is widened first, exactly."""
    form, kt = (_volume if x.is_cuda else _stacked), weight.shape[2]
    if scale is not None:
        assert bias is not None
        wide = torch.promote_types(bias.dtype, torch.float32)
        y = launch_library(x.to(wide), past.to(wide), weight.to(wide), None, None)
        y = y.mul_(scale.view(-1, 1, 1)).add_(bias.to(wide).view(-1, 1, 1))
        return (y if residual is None else y.add_(residual)).to(bias.dtype)
    if len(past) or kt == 1:
        y = form(_clip(x, past, kt - 1), weight, bias, 1)
    else:
        y = form(x, weight[:, :, -1:], bias, 1)
        for lag in range(1, min(kt, len(x))):
            y[lag:] += form(x[:-lag], weight[:, :, kt - 1 - lag : kt - lag], None, 1)
    return y if residual is None else y.add_(residual)


def _clip(x: Tensor, past: Tensor, before: int) -> Tensor:
    """x behind `before` frames: those of the past, and zeros before these; in channels-last memory."""
    frames, (_, channels, rows, columns) = before - len(past), x.shape
    zeros = x.new_zeros(frames, rows, columns, channels).permute(0, 3, 1, 2)
    parts = [part for part in (zeros, past, x) if len(part)]
    return x if len(parts) == 1 else torch.cat(parts).contiguous(memory_format=torch.channels_last)


def _volume(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """`conv3d` by the library's own, on the same memory seen as channels_last_3d."""
    k = weight.shape[3]
    clip = x[None].transpose(1, 2)  # [1, C, N, H, W]; in this order, or torch takes the view for channels-first
    y = F.conv3d(clip, weight, bias, (stride, 1, 1), (0, k // 2, k // 2))
    return y[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _stacked(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """`conv3d` in 2-D, the taps in time as further input channels: 2 to 30 times faster in CPU libraries."""
    kt, k = weight.shape[2:4]
    span = stride * ((len(x) - kt) // stride) + 1
    taps = [x[i : i + span : stride] for i in range(kt)]
    stacked = torch.cat(taps, dim=1) if kt > 1 else taps[0]  # [T, kt * C, H, W]
    y = F.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=k // 2)
    return y.contiguous(memory_format=torch.channels_last)  # the library overlooks it in single frames of odd strides


# --- Launchers ------------------------------------------------------------------------------------------------------


def launch_sm90(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    config: LaunchConfig | None = None,
    gamma: Tensor | None = None,
    factor: float | None = None,
) -> Tensor:
    """As `launch`, by the kernel of kernels/conv_sm90.py; output channels that it cannot store alone get company.

    With gamma, as `launch_normed`: a tile of the launch parameters must have room for all output channels.
    """
    outputs, spare = len(weight), -len(weight) % (WHOLE if factor is None else 2 * WHOLE)
    if spare:
        more = weight.new_zeros(spare, *weight.shape[1:])
        weight = torch.cat([weight, more]).contiguous(memory_format=torch.channels_last_3d)
        bias, scale, gamma = (None if v is None else F.pad(v.flatten(), (0, spare)) for v in (bias, scale, gamma))
        if residual is not None:
            residual = F.pad(residual, (0, 0, 0, 0, 0, spare)).contiguous(memory_format=torch.channels_last)
    y, reach = _empty(x, weight, bias, factor), -(weight.shape[3] // 2)
    norm = None if gamma is None else (gamma, outputs**0.5, factor or 1.0)
    conv_sm90.launch_sm90(x, past, weight, scale, bias, residual, y, (reach, reach), config=config, norm=norm)
    return y[:, :outputs].contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float | None = None) -> Tensor:
    """Memory for the result: [T, O, H, W], channels last; in e4m3 with a factor."""
    frames, _, rows, columns = x.shape
    dtype = _result(x, bias) if factor is None else FP8
    return x.new_empty(frames, rows, columns, len(weight), dtype=dtype).permute(0, 3, 1, 2)


BACKENDS: Mapping[str, Callable[..., Tensor]] = {"gluon": launch_sm90, "library": launch_library}


def launch(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    choice: TunedConfig | None = None,
) -> Tensor:
    """By the form that kernels/tuned/ names for the shape, or `choice`; without one by the library, FP8 by the kernel.

    The kernel needs a Hopper GPU and operands that suit it; without these the library takes over, in FP8 too.
    Up to kt - 1 frames `past` [before, C, H, W] lie before x [T, C, H, W]; what lies before these is zero.
    """
    choice = choice or tuned("causal_conv3d", x, len(weight), BACKENDS, kernel_size(weight))
    wanted = choice.backend if choice is not None else "gluon" if x.dtype == FP8 else "library"
    if wanted == "gluon" and not (gpu_of(x.device).capability == "9.0" and supports(x, past, weight)):
        wanted = "library"
    parameters = choice.config if choice is not None and choice.backend == wanted else None
    return BACKENDS[wanted](x, past, weight, bias, residual, scale, parameters)


def launch_normed(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    gamma: Tensor,
    factor: float | None,
    choice: TunedConfig | None = None,
) -> Tensor:
    """`launch`, then norm and SiLU: on the way out of its kernel where kernels/tuned/ or `choice` says "fused"."""
    choice = choice or tuned("causal_conv3d_norm", x, len(weight), ("fused", "apart"), kernel_size(weight))
    fused = choice is not None and choice.backend == "fused"
    if choice is None or not (fused and gpu_of(x.device).capability == "9.0" and supports(x, past, weight)):
        return launch_rms_norm_silu(launch(x, past, weight, bias, None, scale), gamma, True, factor)
    return launch_sm90(x, past, weight, bias, None, scale, choice.config, gamma, factor)


def kernel_size(weight: Tensor) -> dict[str, int]:
    """The kernel's length in time and width in space, as dimensions of a tuned entry; weight [O, C, kt, k, k]."""
    return {"kt": weight.shape[2], "k": weight.shape[3]}


def tuned(
    operation: str, x: Tensor, outputs: int, backends: Collection[str], kernel: Mapping[str, int] | None = None
) -> TunedConfig | None:
    """The tuned back-end of a convolution of x [T, C, H, W] to `outputs` channels, at the nearest measured size.

    The output channels, and the kernel's size where the operation has several, are those of the entry.
    """
    if (dtype := {**DTYPE_NAMES, FP8: "fp8"}.get(x.dtype)) is None:
        return None
    frames, channels, rows, columns = x.shape
    dims = {"frames": frames, "channels": channels, "rows": rows, "columns": columns, "outputs": outputs}
    kernel = kernel or {}
    return tuned_config(operation, {**dims, **kernel}, dtype, x.device, backends, ("outputs", *kernel))


# --- Operation ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::conv3d", mutates_args=(), device_types="cpu")
def _conv3d(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    return launch_library(x, past, weight, bias, residual, scale)


@_conv3d.register_kernel("cuda")
def _(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    return launch(x, past, weight, bias, residual, scale)


@_conv3d.register_fake
def _(
    x: Tensor, _past: Tensor, weight: Tensor, bias: Tensor | None, _residual: Tensor | None, _scale: Tensor | None
) -> Tensor:
    return _empty(x, weight, bias)


@torch.library.custom_op("flashtalk::causal_conv3d_norm", mutates_args=(), device_types="cpu")
def _conv3d_norm(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, gamma: Tensor, factor: float | None
) -> Tensor:
    y = launch_library(x, past, weight, bias, None, scale)
    return pixel_norm_reference(y, gamma, True, factor)


@_conv3d_norm.register_kernel("cuda")
def _(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, gamma: Tensor, factor: float | None
) -> Tensor:
    return launch_normed(x, past, weight, bias, scale, gamma, factor)


@_conv3d_norm.register_fake
def _(
    x: Tensor, _past: Tensor, weight: Tensor, bias: Tensor, _scale: Tensor | None, _gamma: Tensor, factor: float | None
) -> Tensor:
    return _empty(x, weight, bias, factor)
