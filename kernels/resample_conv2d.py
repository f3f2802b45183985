"""Convolutions of the VAE that double or halve rows and columns, on Hopper by the kernel of kernels/conv_sm90.py.

    upsample_conv2d      y = conv2d(nearest doubling of x, 3 x 3, padding 1), on the small image
    downsample_conv2d    y = conv2d(x with a row of zeros below and a column to the right, 3 x 3, stride 2)

The doubled image is not made. Tensors are frames first, [frame, channel, row, column], in channels-last memory. Forms:
the library's, everywhere; on Hopper the kernel, where kernels/tuned/ names it, which does not pad either.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import conv_sm90
from kernels.causal_conv3d import tuned
from kernels.conv_sm90 import WHOLE, supports
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of


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
    memory = wide.transpose(0, 1).to(weight.dtype).permute(0, 1, 2, 4, 5, 3).contiguous()
    return memory.permute(0, 1, 2, 5, 3, 4)


def upsample_conv2d(x: Tensor, phases: Tensor, bias: Tensor) -> Tensor:
    """Doubled rows and columns of x, convolved: [T, C, H, W] -> [T, O, 2 H, 2 W], both in channels-last memory.

    `phases` are `fold_upsampling(weight)`, bias [O]. Raises ValueError for another shape, dtype or memory format of x.
    """
    _check(x, phases[0, 0])
    return _upsample_conv2d(x, phases, bias)


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Halved rows and columns: [T, C, H, W] -> [T, O, H // 2, W // 2], both in channels-last memory.

    weight [O, C, 3, 3], bias [O]. Raises ValueError for another shape, dtype or memory format of x.
    """
    _check(x, weight)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x: shape {list(x.shape)}, wanted 2 rows and columns or more")
    return _downsample_conv2d(x, weight, bias)


def _check(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless x goes along with the weight, or that of a phase."""
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: shape {list(x.shape)}, wanted [frames, {weight.shape[1]}, rows, columns]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x: dtype {x.dtype}, wanted the weight's, {weight.dtype}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: strides {x.stride()} for shape {list(x.shape)}, wanted channels-last memory")


# --- Forms ----------------------------------------------------------------------------------------------------------


def upsample_library(x: Tensor, phases: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """As `upsample_conv2d`, by PyTorch."""
    frames, _, rows, columns = x.shape
    y = x.new_empty(frames, 2 * rows, 2 * columns, phases.shape[2]).permute(0, 3, 1, 2)
    for i, of_row in enumerate(phases):
        for j, weight in enumerate(of_row):
            part = F.conv2d(x, weight, bias, padding=1)  # one row and one column too many
            y[:, :, i::2, j::2] = part[:, :, i : i + rows, j : j + columns]
    return y


def downsample_library(x: Tensor, weight: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """As `downsample_conv2d`, by PyTorch."""
    y = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    return y.contiguous(memory_format=torch.channels_last)


def upsample_hopper(x: Tensor, phases: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """As `upsample_conv2d`, by the kernel of kernels/conv_sm90.py: every phase into its pixels."""
    frames, _, rows, columns = x.shape
    y = x.new_empty(frames, 2 * rows, 2 * columns, phases.shape[2]).permute(0, 3, 1, 2)
    for i, of_row in enumerate(phases):
        for j, weight in enumerate(of_row):
            part, reach = y[:, :, i::2, j::2], (i - 1, j - 1)
            conv_sm90.launch_sm90(x, x[:0], weight[:, :, None], None, bias, None, part, reach, config=config)
    return y


def downsample_hopper(x: Tensor, weight: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """As `downsample_conv2d`, by the kernel of kernels/conv_sm90.py, where rows, columns and channels suit it."""
    frames, channels, rows, columns = x.shape
    parameters = {**conv_sm90.default(x.dtype, len(weight), 3), **(config or {}), "REUSE_ROWS": 0}
    if rows % 2 or columns % 2 or channels % parameters["BLOCK_K"]:  # a block would reach into the next pixel
        return downsample_library(x, weight, bias)
    y = x.new_empty(frames, rows // 2, columns // 2, len(weight)).permute(0, 3, 1, 2)
    conv_sm90.launch_sm90(x, x[:0], weight[:, :, None], None, bias, None, y, (0, 0), 2, parameters)
    return y


BACKENDS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "upsample_conv2d": {"gluon": upsample_hopper, "library": upsample_library},
    "downsample_conv2d": {"gluon": downsample_hopper, "library": downsample_library},
}


def launch(operation: str, x: Tensor, weight: Tensor, bias: Tensor, choice: TunedConfig | None = None) -> Tensor:
    """By the form that kernels/tuned/ names for the shape, or `choice`; without one by the library.

    The weight is that of the one operation or the phases of the other.
    """
    forms, one = BACKENDS[operation], weight[0, 0] if weight.ndim == 6 else weight
    choice = choice or tuned(operation, x, len(one), forms)
    suited = gpu_of(x.device).capability == "9.0" and supports(x, x, one) and len(one) % WHOLE == 0
    if choice is None or not suited:
        return forms["library"](x, weight, bias)
    return forms[choice.backend](x, weight, bias, choice.config)


# --- Operations -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::upsample_conv2d", mutates_args=(), device_types="cpu")
def _upsample_conv2d(x: Tensor, phases: Tensor, bias: Tensor) -> Tensor:
    return upsample_library(x, phases, bias)


@_upsample_conv2d.register_kernel("cuda")
def _(x: Tensor, phases: Tensor, bias: Tensor) -> Tensor:
    return launch("upsample_conv2d", x, phases, bias)


@_upsample_conv2d.register_fake
def _(x: Tensor, phases: Tensor, _bias: Tensor) -> Tensor:
    frames, _, rows, columns = x.shape
    return x.new_empty(frames, 2 * rows, 2 * columns, phases.shape[2]).permute(0, 3, 1, 2)


@torch.library.custom_op("flashtalk::downsample_conv2d", mutates_args=(), device_types="cpu")
def _downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return downsample_library(x, weight, bias)


@_downsample_conv2d.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return launch("downsample_conv2d", x, weight, bias)


@_downsample_conv2d.register_fake
def _(x: Tensor, weight: Tensor, _bias: Tensor) -> Tensor:
    frames, _, rows, columns = x.shape
    return x.new_empty(frames, rows // 2, columns // 2, len(weight)).permute(0, 3, 1, 2)
