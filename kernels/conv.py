"""Causal 3-D convolution of the video VAE.

    y[t] = bias + sum_{i = 0 .. kt-1} conv2d(x[t - (kt-1) + i], weight[:, :, i], padding k // 2)

Frame t sees itself and the kt - 1 frames before it, never a later one; the frames before x[0] are `past`, or zeros at
the start of a clip. So a clip goes through in pieces of any length, each with the last frames of the one before it.

Tensors are frames first, [frame, channel, row, column], in channels-last memory: the same bytes as channels_last_3d of
[1, channel, frame, row, column]. Weights are best in channels-last memory too: elsewhere they are copied in each call.

Forms: `reference` is the definition; on CPUs a 2-D convolution of stacked frames; on GPUs the library's (cuDNN), which
stays until kernels/tuned/ names another: the Triton kernel below, or on Hopper that of kernels/conv_hopper.py.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import conv_hopper
from kernels.attention import NAMES
from kernels.conv_hopper import suits
from kernels.launch import Choice, Launch, gpu, lookup

DEFAULT: Launch = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def reference(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """The definition: one dense convolution over zero-padded frames. Arguments as in `causal_conv3d`."""
    kt, k = weight.shape[2:4]
    if past is None:
        past = x.new_zeros(kt - 1, *x.shape[1:])
    clip = torch.cat([past, x]).transpose(0, 1)[None]  # [1, C, kt - 1 + T, H, W]
    return F.conv3d(clip, weight, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`reference` without its zero frames: x [T, C, H, W] -> [T, O, H, W], in channels-last memory and x's dtype.

    weight [O, C, kt, k, k] with k odd, bias [O]; `past` [kt - 1, C, H, W] are the frames before x, None at the start of
    a clip or where kt = 1. At the start the taps on zero frames are skipped, kt (kt - 1) / 2 of the clip's tap-frames.
    `residual`, like the result, is added to it.

    Raises ValueError if x, `past` or the residual has another shape, dtype or memory format than that.
    """
    kt = weight.shape[2]
    if past is None:
        _check(x, weight, residual, len(x), 1)
        return _conv3d(x, weight, bias, residual, 0)
    if past.shape != (kt - 1, *x.shape[1:]):
        raise ValueError(f"past: shape {list(past.shape)}, wanted {[kt - 1, *x.shape[1:]]}")
    if past.dtype != x.dtype:
        raise ValueError(f"past: dtype {past.dtype}, wanted x's, {x.dtype}")
    return conv3d(torch.cat([past, x]), weight, bias, residual=residual)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, residual: Tensor | None = None) -> Tensor:
    """The same convolution over the frames given and no others, at every `stride`-th place in time.

    x [N, C, H, W] -> [(N - kt) // stride + 1, O, H, W], in channels-last memory and x's dtype; weight [O, C, kt, k, k]
    with k odd, bias [O] or None; `residual`, like the result, is added to it. Raises ValueError if x or the residual
    has another shape, dtype or memory format than that.
    """
    kt = weight.shape[2]
    _check(x, weight, residual, (len(x) - kt) // stride + 1, kt)
    if stride == 1:
        return _conv3d(x, weight, bias, residual, kt - 1)
    y = (_volume if x.is_cuda else _stacked)(x, weight, bias, stride)
    return y if residual is None else y.add_(residual)


def fold_upsampling(weight: Tensor) -> Tensor:
    """Nearest doubling of rows and columns folded into the convolution after it: [O, C, 3, 3] -> [2, 2, O, C, 2, 2].

    The output's rows 2h and 2h + 1 see the same three rows of the doubled image as two of the small one: h - 1, h and
    h, h + 1. So a convolution of 2 x 2 taps for each parity of row and column, with the sums of taps that fall on the
    same pixel, 4/9 of the multiplications, and no doubled image. Exact but for rounding; summed in float32 or wider.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in (2, 4):  # rows, then columns; each time the parity comes in front
        first, second, third = wide.unbind(axis)
        even, odd = torch.stack((first, second + third), axis), torch.stack((first + second, third), axis)
        wide = torch.stack((even, odd))
    return wide.transpose(0, 1).to(weight.dtype).contiguous()


def upsample_conv2d(x: Tensor, phases: Tensor, bias: Tensor) -> Tensor:
    """Doubled rows and columns of x, convolved: [T, C, H, W] -> [T, O, 2 H, 2 W] in channels-last memory.

    `phases` are `fold_upsampling(weight)`, bias [O].
    """
    frames, _, rows, columns = x.shape
    y = x.new_empty(frames, 2 * rows, 2 * columns, phases.shape[2]).permute(0, 3, 1, 2)
    for i, of_row in enumerate(phases):
        for j, weight in enumerate(of_row):
            part = F.conv2d(x, weight, bias, padding=1)  # one row and one column too many
            y[:, :, i::2, j::2] = part[:, :, i : i + rows, j : j + columns]
    return y


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, frames: int, least: int) -> None:
    """Raises ValueError unless x goes along with the weight, and the residual with `frames` of output."""
    if x.ndim != 4 or x.shape[1] != weight.shape[1] or len(x) < least:
        raise ValueError(f"x: shape {list(x.shape)}, wanted [{least} or more, {weight.shape[1]}, rows, columns]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x: dtype {x.dtype}, wanted the weight's, {weight.dtype}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: strides {x.stride()} for shape {list(x.shape)}, wanted channels-last memory")
    if residual is not None:
        wanted = (frames, weight.shape[0], *x.shape[2:])
        if residual.shape != wanted or residual.dtype != x.dtype:
            raise ValueError(f"residual: {residual.dtype} {list(residual.shape)}, wanted {x.dtype} {list(wanted)}")
        if not residual.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"residual: strides {residual.stride()}, wanted channels-last memory")


# --- The library's --------------------------------------------------------------------------------------------------


def launch_library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    before: int,
    launch: Launch | None = None,
) -> Tensor:
    """As `launch`, by PyTorch: cuDNN on a GPU."""
    form, kt = (_volume if x.is_cuda else _stacked), weight.shape[2]
    if before == kt - 1:
        y = form(x, weight, bias, 1)
    else:
        y = form(x, weight[:, :, -1:], bias, 1)
        for lag in range(1, min(kt, len(x))):
            y[lag:] += form(x[:-lag], weight[:, :, kt - 1 - lag : kt - lag], None, 1)
    return y if residual is None else y.add_(residual)


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
    return F.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=k // 2)


# --- Triton kernel --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["before"])
def conv_forward(x, weight, bias, residual, y, before, pixels, rows, columns, channels, outputs, KT: tl.constexpr,
                 K: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """BLOCK_M pixels by BLOCK_N output channels; x [before + frames, rows, columns, channels], weight [o, tap, c]."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own, within = pixel < pixels, output < outputs
    frame, row, column = pixel // (rows * columns), pixel // columns % rows, pixel % columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(KT * K * K):
        f = frame + before + tap // (K * K) - (KT - 1)
        h, w = row + tap // K % K - K // 2, column + tap % K - K // 2
        inside = own & (f >= 0) & (h >= 0) & (h < rows) & (w >= 0) & (w < columns)
        source = ((f.to(tl.int64) * rows + h) * columns + w) * channels
        for start in range(0, channels, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            valid = channel < channels
            a = tl.load(x + source[:, None] + channel[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
            places = (output[:, None] * (KT * K * K) + tap) * channels + channel[None, :]
            b = tl.load(weight + places, mask=within[:, None] & valid[None, :], other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    mask = own[:, None] & within[None, :]
    places = pixel.to(tl.int64)[:, None] * outputs + output[None, :]
    if BIAS:
        acc += tl.load(bias + output, mask=within, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        acc += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + places, acc.to(y.dtype.element_ty), mask=mask)


# --- Launchers ------------------------------------------------------------------------------------------------------


def launch_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    before: int,
    launch: Launch | None = None,
) -> Tensor:
    """As `launch`, by the Triton kernel."""
    total, channels, rows, columns = x.shape
    outputs, _, kt, k, _ = weight.shape
    parameters: dict[str, Any] = {**DEFAULT, **(launch or {})}
    frames = total - before
    y = x.new_empty(frames, rows, columns, outputs).permute(0, 3, 1, 2)
    grid = (triton.cdiv(frames * rows * columns, parameters["BLOCK_M"]), triton.cdiv(outputs, parameters["BLOCK_N"]))
    conv_forward[grid](
        x, weight.permute(0, 2, 3, 4, 1).contiguous(), y if bias is None else bias, y if residual is None else residual,
        y, before, frames * rows * columns, rows, columns, channels, outputs, KT=kt, K=k, BIAS=bias is not None,
        RESIDUAL=residual is not None, **parameters,
    )  # fmt: skip
    return y


def launch_hopper(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    before: int,
    launch: Launch | None = None,
) -> Tensor:
    """As `launch`, by the kernel of kernels/conv_hopper.py."""
    past = x[:before] if before else None
    return conv_hopper.launch_hopper(x[before:], weight, bias, past, residual, launch)


FORMS: Mapping[str, Callable[..., Tensor]] = {
    "gluon": launch_hopper, "triton": launch_triton, "library": launch_library
}  # fmt: skip


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, before: int, choice: Choice | None = None
) -> Tensor:
    """By the form that kernels/tuned/ names for the shape, or `choice`; without one by the library.

    x [before + T, C, H, W]: T frames behind those that the first of them see; what lies before these is zero.
    """
    frames, (_, channels, rows, columns) = len(x) - before, x.shape
    dims = {"frames": frames, "channels": channels, "rows": rows, "columns": columns, "outputs": len(weight)}
    if choice is None and weight.shape[2:] == (3, 3, 3) and x.dtype in NAMES:
        equal = ("channels", "outputs")
        choice = lookup("causal_conv3d", dims, NAMES[x.dtype], x.device, FORMS, equal)
    wanted = choice.backend if choice is not None else "library"
    if wanted == "gluon" and not (gpu(x.device).capability == "9.0" and suits(x, weight, residual)):
        wanted = "triton"
    parameters = choice.launch if choice is not None and choice.backend == wanted else None
    return FORMS[wanted](x, weight, bias, residual, before, parameters)


# --- Operation ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::conv3d", mutates_args=(), device_types="cpu")
def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, before: int) -> Tensor:
    return launch_library(x, weight, bias, residual, before)


@_conv3d.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, before: int) -> Tensor:
    return launch(x, weight, bias, residual, before)


@_conv3d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, before: int) -> Tensor:
    total, _, rows, columns = x.shape
    return x.new_empty(total - before, rows, columns, weight.shape[0]).permute(0, 3, 1, 2)
