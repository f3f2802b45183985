"""Colour transfer: gives every frame the Lab mean and standard deviation of the portrait, so that colours cannot drift.

    lab'  = (lab - mean(lab)) * std_ref / std(lab) + mean_ref        per frame and channel, over all pixels of the frame
    out   = (1 - strength) * rgb + strength * clamp(RGB(lab'), 0, 1)

Lab is CIE L*a*b* of sRGB under D65 with the usual rounded constants. Standard deviations are population ones, and one
below 1e-8 counts as 1. Pixels are RGB in [-1, 1], [frame, 3, height, width], in channels-first or channels-last memory.
Frames are independent of each other: correcting some of them gives the same values as correcting all.

On a GPU this takes two passes over memory: `lab_moments` reads the frames; `lab_transfer_fwd` reads them again and
writes float32 pixels, and bytes for the video encoder.

Source: E. Reinhard et al., "Color transfer between images", 2001, in CIE Lab instead of l-alpha-beta.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES, check, define_op
from kernels.tuning import LaunchConfig, launch_config

DEFAULT_CONFIG: LaunchConfig = {"BLOCK": 2048, "num_warps": 8}  # BLOCK: pixels of a program

_RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_XYZ_TO_RGB = (
    (3.2404542, -1.5371385, -0.4985314),
    (-0.9692660, 1.8760108, 0.0415560),
    (0.0556434, -0.2040259, 1.0572252),
)
_WHITE = (0.95047, 1.0, 1.08883)
_EPSILON, _KAPPA = 0.008856, 903.3  # where Lab's cube root gives way to a straight line, and the line's slope


# --- Reference ------------------------------------------------------------------------------------------------------


def _mix(matrix: tuple[tuple[float, float, float], ...], x: Tensor, divisors: Sequence[float] = (1, 1, 1)) -> Tensor:
    """The matrix times the channels of x [frame, 3, height, width], each resulting channel divided by its divisor.

    Constants are Python numbers, not tensors: copying one to the GPU would synchronise, which breaks a CUDA graph.
    """
    a, b, c = x.unbind(1)
    rows = zip(matrix, divisors, strict=True)
    return torch.stack([(row[0] * a + row[1] * b + row[2] * c) / divisor for row, divisor in rows], dim=1)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Converts sRGB in [0, 1] to L* (0 to 100), a* and b*; both are float32 [frame, 3, height, width]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    q = _mix(_RGB_TO_XYZ, linear, _WHITE).clamp(1e-8, 1.0)
    x, y, z = torch.where(q > _EPSILON, q ** (1 / 3), (_KAPPA * q + 16) / 116).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Converts L*, a* and b* to sRGB, clamped to [0, 1]; both are float32 [frame, 3, height, width]."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    xz = torch.stack((a / 500 + y, y - b / 200), dim=1)
    x, z = torch.where(xz**3 > _EPSILON, xz**3, (116 * xz - 16) / _KAPPA).unbind(1)
    y = torch.where(lightness > _KAPPA * _EPSILON, y**3, lightness / _KAPPA)
    xyz = torch.stack([part * white for part, white in zip((x, y, z), _WHITE, strict=True)], dim=1)
    linear = _mix(_XYZ_TO_RGB, xyz)
    # The power of a negative number is NaN; clamping avoids it, and such values take the straight line anyway.
    gamma = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, gamma, 12.92 * linear).clamp(0, 1)


def lab_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each frame's Lab channels.

    Args:
        pixels: RGB in [-1, 1], float32 [frame, 3, height, width].

    Returns:
        Mean and standard deviation, float32 [frame, 3, 1, 1] each.
    """
    std, mean = torch.std_mean(rgb_to_lab((pixels + 1) / 2), dim=(2, 3), correction=0, keepdim=True)
    return mean, std


def to_bytes(pixels: Tensor) -> Tensor:
    """Converts pixels [frame, 3, height, width] in [-1, 1] to uint8 [frame, height, width, 3], truncating fractions."""
    return (((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reference(pixels: Tensor, mean: Tensor, std: Tensor, strength: float, statistics: Tensor | None = None) -> Tensor:
    """The pixels of `lab_transfer`, in the dtype of the statistics: float32 or wider."""
    rgb = (pixels.to(mean.dtype) + 1) / 2
    lab = rgb_to_lab(rgb)
    if statistics is None:
        frame_std, frame_mean = torch.std_mean(lab, dim=(2, 3), correction=0, keepdim=True)
    else:
        frame_mean, frame_std = statistics[:, :, None, None].to(mean.dtype).unbind(-1)
    frame_std = torch.where(frame_std < 1e-8, 1.0, frame_std)
    corrected = lab_to_rgb((lab - frame_mean) * (std / frame_std) + mean)
    return torch.lerp(rgb, corrected, strength) * 2 - 1


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def power(x, exponent):
    """x^exponent of positive x."""
    return tl.exp2(exponent * tl.log2(x))


@triton.jit
def srgb_to_linear(pixel):
    """Linear light in [0, 1] of an sRGB channel in [-1, 1], and the channel itself in [0, 1]."""
    rgb = (pixel.to(tl.float32) + 1.0) * 0.5
    return tl.where(rgb > 0.04045, power((tl.maximum(rgb, 0.04045) + 0.055) / 1.055, 2.4), rgb / 12.92), rgb


@triton.jit
def lab_f(q):
    """Lab's f of a tristimulus value divided by that of white."""
    q = tl.minimum(tl.maximum(q, 1e-8), 1.0)
    return tl.where(q > 0.008856, power(q, 1.0 / 3.0), (903.3 * q + 16.0) / 116.0)


@triton.jit
def load_lab(pixels, offs, channel_stride, mask):
    """L*, a* and b* of pixels, and their sRGB channels in [0, 1]."""
    r, red = srgb_to_linear(tl.load(pixels + offs, mask=mask, other=0.0))
    g, green = srgb_to_linear(tl.load(pixels + offs + channel_stride, mask=mask, other=0.0))
    b, blue = srgb_to_linear(tl.load(pixels + offs + 2 * channel_stride, mask=mask, other=0.0))
    x = lab_f((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047)
    y = lab_f(0.2126729 * r + 0.7151522 * g + 0.0721750 * b)
    z = lab_f((0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
    return 116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z), red, green, blue


@triton.jit
def store_moments(x, mask, count, out):
    """Stores the mean of the `count` values under the mask, and the sum of their squared deviations from it."""
    mean = tl.sum(tl.where(mask, x, 0.0)) / count
    deviations = tl.where(mask, x - mean, 0.0)
    tl.store(out, mean)
    tl.store(out + 1, tl.sum(deviations * deviations))


@triton.jit
def lab_moments(pixels, moments, size, frame_stride, channel_stride, pixel_stride, BLOCK: tl.constexpr):
    """The moments of the Lab channels of BLOCK pixels of a frame, written to moments [frame, block, 3, 2]."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    frame_ptr = pixels + tl.program_id(1).to(tl.int64) * frame_stride
    lightness, a, b, _, _, _ = load_lab(frame_ptr, offs * pixel_stride, channel_stride, mask)
    count = tl.minimum(size - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    out = moments + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 6
    store_moments(lightness, mask, count, out)
    store_moments(a, mask, count, out + 2)
    store_moments(b, mask, count, out + 4)


@triton.jit
def merge_moments(moments, size, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The mean and the deviation of a frame's channel from the moments of its blocks."""
    i = tl.arange(0, BLOCKS)
    mask = i < blocks
    count = tl.minimum(size - i * BLOCK, BLOCK).to(tl.float32)
    means = tl.load(moments + 6 * i, mask=mask, other=0.0)
    frame_mean = tl.sum(tl.where(mask, count * means, 0.0)) / size
    squares = tl.load(moments + 6 * i + 1, mask=mask, other=0.0) + count * (means - frame_mean) * (means - frame_mean)
    return frame_mean, tl.sqrt(tl.sum(tl.where(mask, squares, 0.0)) / size)


@triton.jit
def match_statistics(x, moments, mean, std, size, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Moves x from the mean and deviation of its frame to `mean` and `std`.

    `moments` are those of the frame's blocks; with BLOCKS 0 they are the mean and deviation themselves.
    """
    if BLOCKS:
        frame_mean, frame_std = merge_moments(moments, size, blocks, BLOCK, BLOCKS)
    else:
        frame_mean, frame_std = tl.load(moments), tl.load(moments + 1)
    frame_std = tl.where(frame_std < 1e-8, 1.0, frame_std)
    return (x - frame_mean) * (tl.load(std) / frame_std) + tl.load(mean)


@triton.jit
def lab_f_inverse(f):
    """The tristimulus value, divided by that of white, whose Lab f is given."""
    cube = f * f * f
    return tl.where(cube > 0.008856, cube, (116.0 * f - 16.0) / 903.3)


@triton.jit
def store_channel(light, original, strength, out, rgb, mask):
    """Blends linear light, as an sRGB channel, into the original one; stores it in [-1, 1] and as a byte."""
    gamma = 1.055 * power(tl.maximum(light, 0.0031308), 1.0 / 2.4) - 0.055
    corrected = tl.minimum(tl.maximum(tl.where(light > 0.0031308, gamma, 12.92 * light), 0.0), 1.0)
    pixel = (original + strength * (corrected - original)) * 2.0 - 1.0
    tl.store(out, pixel, mask=mask)
    tl.store(rgb, (tl.minimum(tl.maximum((pixel + 1.0) * 0.5, 0.0), 1.0) * 255.0).to(tl.uint8), mask=mask)


@triton.jit
def lab_transfer_fwd(pixels, moments, mean, std, out, rgb, strength, size, blocks, frame_stride, channel_stride,
                     pixel_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """BLOCK pixels of a frame: out [frame, 3, pixel] float32, rgb [frame, pixel, 3] bytes.

    BLOCKS: a power of two of at least `blocks`, or 0, where `moments` [frame, 3, 2] are means and deviations.
    """
    frame = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    frame_ptr = pixels + frame * frame_stride
    lightness, a, b, red, green, blue = load_lab(frame_ptr, offs * pixel_stride, channel_stride, mask)
    moments += frame * blocks * 6
    lightness = match_statistics(lightness, moments, mean, std, size, blocks, BLOCK, BLOCKS)
    a = match_statistics(a, moments + 2, mean + 1, std + 1, size, blocks, BLOCK, BLOCKS)
    b = match_statistics(b, moments + 4, mean + 2, std + 2, size, blocks, BLOCK, BLOCKS)
    y = (lightness + 16.0) / 116.0
    x, z = lab_f_inverse(a / 500.0 + y) * 0.95047, lab_f_inverse(y - b / 200.0) * 1.08883
    y = tl.where(lightness > 7.9996248, y * y * y, lightness / 903.3)
    out += frame * 3 * size + offs
    rgb += (frame * size + offs) * 3
    light = 3.2404542 * x - 1.5371385 * y - 0.4985314 * z
    store_channel(light, red, strength, out, rgb, mask)
    light = -0.9692660 * x + 1.8760108 * y + 0.0415560 * z
    store_channel(light, green, strength, out + size, rgb + 1, mask)
    light = 0.0556434 * x - 0.2040259 * y + 1.0572252 * z
    store_channel(light, blue, strength, out + 2 * size, rgb + 2, mask)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_lab_transfer(
    pixels: Tensor,
    mean: Tensor,
    std: Tensor,
    strength: float,
    statistics: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`lab_transfer` by its two kernels, or by the second alone where the frames' statistics are given."""
    frames, _, height, width = pixels.shape
    size = height * width
    parameters = launch_config(
        "lab_transfer", {"rows": height, "columns": width, "frames": frames}, DTYPE_NAMES[pixels.dtype], pixels.device,
        default=DEFAULT_CONFIG, given=config,
    )  # fmt: skip
    blocks = triton.cdiv(size, parameters["BLOCK"])
    strides = pixels.stride(0), pixels.stride(1), pixels.stride(3)
    moments = pixels.new_empty(frames, blocks, 3, 2, dtype=torch.float32) if statistics is None else statistics
    if statistics is None:
        lab_moments[(blocks, frames)](pixels, moments, size, *strides, **parameters)
    out = pixels.new_empty(pixels.shape, dtype=torch.float32)
    rgb = pixels.new_empty(frames, height, width, 3, dtype=torch.uint8)
    lab_transfer_fwd[(blocks, frames)](
        pixels, moments, mean, std, out, rgb, strength, size, blocks if statistics is None else 1, *strides,
        BLOCKS=triton.next_power_of_2(blocks) if statistics is None else 0, **parameters,
    )  # fmt: skip
    return out, rgb


# --- Operation ------------------------------------------------------------------------------------------------------


def _lab_transfer_cpu(
    pixels: Tensor, mean: Tensor, std: Tensor, strength: float, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = reference(pixels, mean, std, strength, statistics).contiguous()
    return out, to_bytes(out)


lab_transfer_op = define_op("lab_transfer", cpu=_lab_transfer_cpu, cuda=launch_lab_transfer)


def lab_transfer(
    pixels: Tensor, mean: Tensor, std: Tensor, strength: float = 1.0, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gives every frame the CIE Lab mean and standard deviation of a reference image, blended with the frame itself.

    lab' = (lab - mean(lab)) * std / std(lab) + mean for each frame and Lab channel, over the frame's pixels, and
    out = (1 - strength) * rgb + strength * clamp(RGB(lab'), 0, 1). Standard deviations are population ones; one below
    1e-8 counts as 1.

    Args:
        pixels: RGB in [-1, 1], [frames, 3, height, width], float32, float16 or bfloat16, in channels-first or
            channels-last memory.
        mean: float32 [1, 3, 1, 1], contiguous, the reference image's mean as of `lab_statistics`.
        std: float32 [1, 3, 1, 1], contiguous, its population standard deviation.
        strength: 0 leaves the frames as they are, 1 replaces them.
        statistics: mean(lab) and std(lab) of each frame, float32 [frames, 3, 2], contiguous, where `pixels` are only
            some rows of the frames, as on one of several GPUs. None computes them of these pixels.

    Returns:
        The pixels in [-1, 1], float32 [frames, 3, height, width], contiguous; and the same as uint8
        [frames, height, width, 3] in 0 to 255, fractions truncated.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format or requires a gradient, or strength is
            not in 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, want 0..1")
    check("pixels", pixels, shape=("frames", 3, "height", "width"), dtype=DTYPE_NAMES)
    if pixels.stride(2) != pixels.shape[3] * pixels.stride(3) and pixels.shape[2] > 1:
        raise ValueError(f"pixels: strides {pixels.stride()}, wanted a frame's rows adjacent in memory")
    for name, statistic in (("mean", mean), ("std", std)):
        check(name, statistic, shape=(1, 3, 1, 1), dtype=torch.float32, device=pixels.device, layout="contiguous")
    if statistics is not None:
        want = (len(pixels), 3, 2)
        check("statistics", statistics, shape=want, dtype=torch.float32, device=pixels.device, layout="contiguous")
    return lab_transfer_op(pixels, mean, std, float(strength), statistics)
