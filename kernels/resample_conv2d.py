"""Convolutions of the video VAE that double or halve rows and columns.

    upsample_conv2d      y = conv2d(nearest doubling of x, 3 x 3, padding 1)
    downsample_conv2d    y = conv2d(x with a row of zeros below and a column of zeros to the right, 3 x 3, stride 2)

The doubled image is never made: `fold_upsampling` replaces the convolution on it by four convolutions on the small
image, one for each phase, which is a parity of the output's row and column.

Tensors are frames first, [frame, channel, row, column], in channels-last memory. Backends: "library" is PyTorch.
"gluon" is the Hopper kernel of kernels/conv_sm90.py, where kernels/tuned/ says so; it makes no padded copy of x either.
Source: Resample of Wan2.1's VAE.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import conv_sm90
from kernels.causal_conv3d import tuned_conv_config
from kernels.common import check, define_op
from kernels.conv_sm90 import default_config, supports
from kernels.tuning import LaunchConfig, TunedConfig, gpu_of

BACKENDS = ("gluon", "library")


# --- Reference ------------------------------------------------------------------------------------------------------


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest 2 x up-sampling, then a 3 x 3 convolution. x [T, C, H, W], weight [O, C, 3, 3] -> [T, O, 2 H, 2 W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)


def downsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 x 3 convolution of stride 2 over x, padded below and to the right. Arguments as in `downsample_conv2d`."""
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)


# --- Launcher -------------------------------------------------------------------------------------------------------


def upsample_library(x: Tensor, phase_weights: Tensor, bias: Tensor) -> Tensor:
    """`upsample_conv2d` by PyTorch."""
    frames, _, rows, columns = x.shape
    y = x.new_empty(frames, 2 * rows, 2 * columns, phase_weights.shape[2]).permute(0, 3, 1, 2)
    for i in range(2):
        for j in range(2):
            padded = F.conv2d(x, phase_weights[i, j], bias, padding=1)  # one row and one column too many
            y[:, :, i::2, j::2] = padded[:, :, i : i + rows, j : j + columns]
    return y


def upsample_sm90(x: Tensor, phase_weights: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """`upsample_conv2d` by the Hopper kernel, which writes every phase into its pixels of the result."""
    frames, _, rows, columns = x.shape
    y = x.new_empty(frames, 2 * rows, 2 * columns, phase_weights.shape[2]).permute(0, 3, 1, 2)
    for i in range(2):
        for j in range(2):
            weight, phase = phase_weights[i, j][:, :, None], y[:, :, i::2, j::2]
            conv_sm90.launch_conv(x, weight, bias, x[:0], None, None, phase, (i - 1, j - 1), config=config)
    return y


def dispatch_upsample(x: Tensor, phase_weights: Tensor, bias: Tensor, tuned: TunedConfig | None = None) -> Tensor:
    """`upsample_conv2d` on a GPU: by the kernel where measurements or `tuned` say so, else by the library."""
    weight = phase_weights[0, 0]
    tuned = tuned or tuned_conv_config("upsample_conv2d", x, weight, BACKENDS)
    if tuned is not None and tuned.backend == "gluon" and _suits_kernel(x, weight):
        return upsample_sm90(x, phase_weights, bias, tuned.config)
    return upsample_library(x, phase_weights, bias)


def downsample_library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`downsample_conv2d` by PyTorch."""
    return downsample_conv2d_reference(x, weight, bias).contiguous(memory_format=torch.channels_last)


def downsample_sm90(x: Tensor, weight: Tensor, bias: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """`downsample_conv2d` by the Hopper kernel, or by the library where rows, columns or channels do not suit it."""
    frames, channels, rows, columns = x.shape
    parameters: dict[str, Any] = {**default_config(x.dtype, len(weight), 3), **(config or {}), "REUSE_ROWS": 0}
    if rows % 2 or columns % 2 or channels % parameters["BLOCK_K"]:  # a block would reach into the next pixel
        return downsample_library(x, weight, bias)
    y = x.new_empty(frames, rows // 2, columns // 2, len(weight)).permute(0, 3, 1, 2)
    conv_sm90.launch_conv(x, weight[:, :, None], bias, x[:0], None, None, y, (0, 0), 2, parameters)
    return y


def dispatch_downsample(x: Tensor, weight: Tensor, bias: Tensor, tuned: TunedConfig | None = None) -> Tensor:
    """`downsample_conv2d` on a GPU: by the kernel where measurements or `tuned` say so, else by the library."""
    tuned = tuned or tuned_conv_config("downsample_conv2d", x, weight, BACKENDS)
    if tuned is not None and tuned.backend == "gluon" and _suits_kernel(x, weight):
        return downsample_sm90(x, weight, bias, tuned.config)
    return downsample_library(x, weight, bias)


def _suits_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can run: on Hopper, on suitable operands, with output pixels of a multiple of 16 bytes."""
    return gpu_of(x.device).capability == "9.0" and supports(x, x, weight) and len(weight) * x.itemsize % 16 == 0


# --- Operation ------------------------------------------------------------------------------------------------------

upsample_conv2d_op = define_op("upsample_conv2d", cpu=upsample_library, cuda=dispatch_upsample)
downsample_conv2d_op = define_op("downsample_conv2d", cpu=downsample_library, cuda=dispatch_downsample)


def upsample_conv2d(x: Tensor, phase_weights: Tensor, bias: Tensor) -> Tensor:
    """Nearest doubling of rows and columns, then a 3 x 3 convolution with padding 1, without making the doubled image.

        y[:, :, i::2, j::2] = conv2d(x, phase_weights[i, j]), whose first tap is at row i - 1 and column j - 1

    Args:
        x: [T, C, H, W] in channels-last memory.
        phase_weights: `fold_upsampling(weight)`, [2, 2, O, C, 2, 2] of x's dtype.
        bias: [O].

    Returns:
        y [T, O, 2 H, 2 W] in channels-last memory and x's dtype.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    check("phase_weights", phase_weights, shape=(2, 2, "outputs", "inputs", 2, 2), device=x.device)
    _check(x, phase_weights[0, 0], bias)
    return upsample_conv2d_op(x, phase_weights, bias)


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 x 3 convolution of stride 2 over x with a row of zeros below and a column of zeros to the right.

        y[:, :, h, w] = bias + sum over i, j = 0 .. 2 of weight[:, :, i, j] x[:, :, 2 h + i, 2 w + j]

    Args:
        x: [T, C, H, W] in channels-last memory, H and W at least 2.
        weight: [O, C, 3, 3] of x's dtype. Unless it is in channels-last memory it is copied in every call on a GPU.
        bias: [O].

    Returns:
        y [T, O, H // 2, W // 2] in channels-last memory and x's dtype.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    check("weight", weight, shape=("outputs", "inputs", 3, 3), device=x.device)
    _check(x, weight, bias)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x: shape {list(x.shape)}, wanted 2 rows and columns or more")
    return downsample_conv2d_op(x, weight, bias)


def fold_upsampling(weight: Tensor) -> Tensor:
    """Folds nearest doubling of rows and columns into the convolution after it: [O, C, 3, 3] -> [2, 2, O, C, 2, 2].

    Rows 2h and 2h + 1 of the output see three rows of the doubled image each, which are two rows of the small image:
    h - 1 and h, or h and h + 1. So there is a convolution of 2 x 2 taps for every parity of row and column, whose taps
    are sums of those that fall on the same pixel. This takes 4/9 of the multiplications. It is exact but for rounding;
    sums are in float32 or wider.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in (2, 4):  # rows, then columns; each time the parity comes in front
        first, second, third = wide.unbind(axis)
        even, odd = torch.stack((first, second + third), axis), torch.stack((first + second, third), axis)
        wide = torch.stack((even, odd))
    memory = wide.transpose(0, 1).to(weight.dtype).permute(0, 1, 2, 4, 5, 3).contiguous()
    return memory.permute(0, 1, 2, 5, 3, 4)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError unless x and the bias go along with a weight [O, C, k, k]."""
    shape = ("frames", weight.shape[1], "rows", "columns")
    check("x", x, shape=shape, dtype=weight.dtype, layout="channels_last")
    check("bias", bias, shape=(len(weight),), dtype=x.dtype, device=x.device)
