"""Colour transfer: every frame takes the Lab mean and standard deviation of the portrait, so that colours cannot drift.

    lab'  = (lab - mean(lab)) std_ref / std(lab) + mean_ref          per frame and channel, over all its pixels
    out   = (1 - strength) rgb + strength clamp(RGB(lab'), 0, 1)

Lab is CIE L*a*b* of sRGB under D65 with the usual rounded constants; statistics are population ones, and a deviation
below 1e-8 counts as 1. Pixels are RGB in [-1, 1], [frame, 3, height, width] (frames may lie channels-last). Frames are
independent of each other: correcting some of them gives the same values as correcting all.

On a GPU that is two passes over memory: `frame_statistics` reads the frames, `frame_transfer` reads them again, and
writes float32 pixels and, for whoever encodes the video, bytes.

Source: E. Reinhard et al., "Color transfer between images", 2001, in CIE Lab instead of l-alpha-beta.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunk_attention import DTYPE_NAMES
from kernels.tuning import LaunchConfig, tuned_config

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


def _mix(matrix: tuple[tuple[float, float, float], ...], x: Tensor, divisors: Sequence[float] = (1, 1, 1)) -> Tensor:
    """The matrix times the channels of x [frame, 3, height, width], each result over its divisor.

    Constants are numbers, never tensors: a copy to the GPU would wait for it, and no CUDA graph could hold it.
    """
    a, b, c = x.unbind(1)
    rows = zip(matrix, divisors, strict=True)
    return torch.stack([(row[0] * a + row[1] * b + row[2] * c) / divisor for row, divisor in rows], dim=1)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> L* in 0..100, a*, b*; float32 [frame, 3, height, width] both."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    q = _mix(_RGB_TO_XYZ, linear, _WHITE).clamp(1e-8, 1.0)
    x, y, z = torch.where(q > _EPSILON, q ** (1 / 3), (_KAPPA * q + 16) / 116).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """L*, a*, b* -> sRGB clamped to [0, 1]; float32 [frame, 3, height, width] both."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    xz = torch.stack((a / 500 + y, y - b / 200), dim=1)
    x, z = torch.where(xz**3 > _EPSILON, xz**3, (116 * xz - 16) / _KAPPA).unbind(1)
    y = torch.where(lightness > _KAPPA * _EPSILON, y**3, lightness / _KAPPA)
    xyz = torch.stack([part * white for part, white in zip((x, y, z), _WHITE, strict=True)], dim=1)
    linear = _mix(_XYZ_TO_RGB, xyz)
    # The clamp below keeps the power away from negative numbers, where it is NaN; those take the straight line.
    gamma = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, gamma, 12.92 * linear).clamp(0, 1)


def lab_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each frame's Lab channels, [frame, 3, 1, 1] each."""
    std, mean = torch.std_mean(rgb_to_lab((pixels + 1) / 2), dim=(2, 3), correction=0, keepdim=True)
    return mean, std


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels [frame, 3, height, width] in [-1, 1] -> uint8 [frame, height, width, 3]; truncated, as the reference."""
    return (((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reference(pixels: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
    """Arguments as in `lab_transfer`; float32, or wider if the statistics are."""
    rgb = (pixels.to(mean.dtype) + 1) / 2
    lab = rgb_to_lab(rgb)
    std_own, mean_own = torch.std_mean(lab, dim=(2, 3), correction=0, keepdim=True)
    std_own = torch.where(std_own < 1e-8, 1.0, std_own)
    corrected = lab_to_rgb((lab - mean_own) * (std / std_own) + mean)
    return torch.lerp(rgb, corrected, strength) * 2 - 1


# --- Triton kernels -------------------------------------------------------------------------------------------------


@triton.jit
def power(x, exponent):
    """x^exponent of positive numbers."""
    return tl.exp2(exponent * tl.log2(x))


@triton.jit
def to_linear(pixel):
    """An sRGB channel in [-1, 1] as linear light in [0, 1]; also in [0, 1] as it is."""
    rgb = (pixel.to(tl.float32) + 1.0) * 0.5
    return tl.where(rgb > 0.04045, power((tl.maximum(rgb, 0.04045) + 0.055) / 1.055, 2.4), rgb / 12.92), rgb


@triton.jit
def to_root(q):
    """Lab's f of a tristimulus value over white."""
    q = tl.minimum(tl.maximum(q, 1e-8), 1.0)
    return tl.where(q > 0.008856, power(q, 1.0 / 3.0), (903.3 * q + 16.0) / 116.0)


@triton.jit
def load_lab(pixels, places, channel, mask):
    """L*, a*, b* of pixels, and the channels they come from in [0, 1]."""
    r, red = to_linear(tl.load(pixels + places, mask=mask, other=0.0))
    g, green = to_linear(tl.load(pixels + places + channel, mask=mask, other=0.0))
    b, blue = to_linear(tl.load(pixels + places + 2 * channel, mask=mask, other=0.0))
    x = to_root((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047)
    y = to_root(0.2126729 * r + 0.7151522 * g + 0.0721750 * b)
    z = to_root((0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
    return 116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z), red, green, blue


@triton.jit
def store_moments(x, mask, count, out):
    """The mean, and the sum of squares of what differs from it, of the values that count."""
    mean = tl.sum(tl.where(mask, x, 0.0)) / count
    rest = tl.where(mask, x - mean, 0.0)
    tl.store(out, mean)
    tl.store(out + 1, tl.sum(rest * rest))


@triton.jit
def frame_statistics(pixels, moments, size, frame, channel, step, BLOCK: tl.constexpr):
    """Of BLOCK pixels of a frame, into moments [frame, block, 3, 2]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    lightness, a, b, _, _, _ = load_lab(pixels + tl.program_id(1).to(tl.int64) * frame, place * step, channel, mask)
    count = tl.minimum(size - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    out = moments + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 6
    store_moments(lightness, mask, count, out)
    store_moments(a, mask, count, out + 2)
    store_moments(b, mask, count, out + 4)


@triton.jit
def moved(x, moments, mean, std, size, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """x with the reference's mean and deviation in place of its frame's, which come from the moments of its blocks."""
    i = tl.arange(0, BLOCKS)
    within = i < blocks
    count = tl.minimum(size - i * BLOCK, BLOCK).to(tl.float32)
    means = tl.load(moments + 6 * i, mask=within, other=0.0)
    own = tl.sum(tl.where(within, count * means, 0.0)) / size
    squares = tl.load(moments + 6 * i + 1, mask=within, other=0.0) + count * (means - own) * (means - own)
    deviation = tl.sqrt(tl.sum(tl.where(within, squares, 0.0)) / size)
    deviation = tl.where(deviation < 1e-8, 1.0, deviation)
    return (x - own) * (tl.load(std) / deviation) + tl.load(mean)


@triton.jit
def to_light(f):
    """The inverse of Lab's f."""
    cube = f * f * f
    return tl.where(cube > 0.008856, cube, (116.0 * f - 16.0) / 903.3)


@triton.jit
def store_channel(light, own, strength, out, rgb, mask):
    """Linear light as an sRGB channel, blended with the frame's own: as a pixel in [-1, 1], and as a byte."""
    gamma = 1.055 * power(tl.maximum(light, 0.0031308), 1.0 / 2.4) - 0.055
    corrected = tl.minimum(tl.maximum(tl.where(light > 0.0031308, gamma, 12.92 * light), 0.0), 1.0)
    pixel = (own + strength * (corrected - own)) * 2.0 - 1.0
    tl.store(out, pixel, mask=mask)
    tl.store(rgb, (tl.minimum(tl.maximum((pixel + 1.0) * 0.5, 0.0), 1.0) * 255.0).to(tl.uint8), mask=mask)


@triton.jit
def frame_transfer(pixels, moments, mean, std, out, rgb, strength, size, blocks, frame, channel, step,
                   BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """BLOCK pixels of a frame: out [frame, 3, pixel] float32, rgb [frame, pixel, 3] bytes. BLOCKS: a power of two."""
    index = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    lightness, a, b, red, green, blue = load_lab(pixels + index * frame, place * step, channel, mask)
    moments += index * blocks * 6
    lightness = moved(lightness, moments, mean, std, size, blocks, BLOCK, BLOCKS)
    a = moved(a, moments + 2, mean + 1, std + 1, size, blocks, BLOCK, BLOCKS)
    b = moved(b, moments + 4, mean + 2, std + 2, size, blocks, BLOCK, BLOCKS)
    y = (lightness + 16.0) / 116.0
    x, z = to_light(a / 500.0 + y) * 0.95047, to_light(y - b / 200.0) * 1.08883
    y = tl.where(lightness > 7.9996248, y * y * y, lightness / 903.3)
    out += index * 3 * size + place
    rgb += (index * size + place) * 3
    light = 3.2404542 * x - 1.5371385 * y - 0.4985314 * z
    store_channel(light, red, strength, out, rgb, mask)
    light = -0.9692660 * x + 1.8760108 * y + 0.0415560 * z
    store_channel(light, green, strength, out + size, rgb + 1, mask)
    light = 0.0556434 * x - 0.2040259 * y + 1.0572252 * z
    store_channel(light, blue, strength, out + 2 * size, rgb + 2, mask)


# --- Launcher -------------------------------------------------------------------------------------------------------

DEFAULT: LaunchConfig = {"BLOCK": 2048, "num_warps": 8}  # pixels of a program


def launch_transfer(
    pixels: Tensor, mean: Tensor, std: Tensor, strength: float, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """`lab_transfer` by its kernels."""
    frames, _, height, width = pixels.shape
    size, dims = height * width, {"rows": height, "columns": width, "frames": frames}
    tuned = tuned_config("lab_transfer", dims, DTYPE_NAMES[pixels.dtype], pixels.device, ("triton",))
    parameters = {**DEFAULT, **(config or (tuned.config if tuned else {}))}
    blocks = triton.cdiv(size, parameters["BLOCK"])
    moments = pixels.new_empty(frames, blocks, 3, 2, dtype=torch.float32)
    strides = pixels.stride(0), pixels.stride(1), pixels.stride(3)
    frame_statistics[(blocks, frames)](pixels, moments, size, *strides, **parameters)
    out = pixels.new_empty(pixels.shape, dtype=torch.float32)
    rgb = pixels.new_empty(frames, height, width, 3, dtype=torch.uint8)
    frame_transfer[(blocks, frames)](
        pixels, moments, mean, std, out, rgb, strength, size, blocks, *strides,
        BLOCKS=triton.next_power_of_2(blocks), **parameters,
    )  # fmt: skip
    return out, rgb


# --- Operation ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::lab_transfer", mutates_args=(), device_types="cpu")
def _lab_transfer(pixels: Tensor, mean: Tensor, std: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    out = reference(pixels, mean, std, strength).contiguous()
    return out, to_bytes(out)


@_lab_transfer.register_kernel("cuda")
def _(pixels: Tensor, mean: Tensor, std: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    return launch_transfer(pixels, mean, std, strength)


@_lab_transfer.register_fake
def _(pixels: Tensor, mean: Tensor, std: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    frames, channels, height, width = pixels.shape
    return (
        mean.new_empty(frames, channels, height, width),
        pixels.new_empty(frames, height, width, channels, dtype=torch.uint8),
    )


def lab_transfer(pixels: Tensor, mean: Tensor, std: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """The frames with the portrait's Lab statistics, blended in; see the module's first lines.

    Args:
        pixels: [frame, 3, height, width] in [-1, 1], float32, float16 or bfloat16, channels first or last in memory.
        mean: float32 [1, 3, 1, 1], of the portrait (`lab_statistics`), contiguous.
        std: its population standard deviation, likewise.
        strength: 0 .. 1.

    Returns:
        Pixels, float32, contiguous, and the same as bytes, uint8 [frame, height, width, 3], truncated.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or strength is out of its range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, want 0..1")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel() or pixels.dtype not in DTYPE_NAMES:
        raise ValueError(f"pixels: {pixels.dtype} {list(pixels.shape)}, wanted float32 [frame, 3, height, width]")
    if pixels.stride(2) != pixels.shape[3] * pixels.stride(3) and pixels.shape[2] > 1:
        raise ValueError(f"pixels: strides {pixels.stride()}, wanted rows one behind the other")
    for name, x in (("mean", mean), ("std", std)):
        if x.shape != (1, 3, 1, 1) or x.dtype != torch.float32 or not x.is_contiguous() or x.device != pixels.device:
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)} on {x.device}, wanted contiguous torch.float32 [1, 3, 1, 1] on"
                f" {pixels.device}"
            )
    return _lab_transfer(pixels, mean, std, float(strength))
