"""Colour transfer: every frame takes the Lab mean and standard deviation of the portrait, so that colours cannot drift.

    lab'  = (lab - mean(lab)) std_ref / std(lab) + mean_ref          per frame and channel, over all its pixels
    out   = (1 - strength) rgb + strength clamp(RGB(lab'), 0, 1)

Lab is CIE L*a*b* of sRGB under D65 with the usual rounded constants; statistics are population ones, and a deviation
below 1e-8 counts as 1. Pixels are RGB in [-1, 1], float32 [frame, 3, height, width] (frames may lie channels-last).
Frames are independent of each other: correcting some of them gives the same values as correcting all.

Source: E. Reinhard et al., "Color transfer between images", 2001, in CIE Lab instead of l-alpha-beta.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def lab_transfer(pixels: Tensor, mean: Tensor, std: Tensor, strength: float = 1.0) -> Tensor:
    """The frames with the Lab statistics `mean`, `std` [1, 3, 1, 1] of the portrait, blended in by `strength` in 0..1.

    pixels [frame, 3, height, width] in [-1, 1], float32 -> the same; strength 0 returns the input itself.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, want 0..1")
    if strength == 0:
        return pixels
    rgb = (pixels + 1) / 2
    lab = rgb_to_lab(rgb)
    std_own, mean_own = torch.std_mean(lab, dim=(2, 3), correction=0, keepdim=True)
    std_own = torch.where(std_own < 1e-8, 1.0, std_own)
    corrected = lab_to_rgb((lab - mean_own) * (std / std_own) + mean)
    return torch.lerp(rgb, corrected, strength) * 2 - 1
