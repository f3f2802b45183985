"""The video VAE's norm and activation, in front of a convolution: one pass over memory.

    y = x / max(||x||, 1e-12) sqrt(C) gamma          the norm over the C channels of a pixel
    y = y / (1 + exp(-y))                            SiLU, if asked for

With `factor`, y comes out as e4m3 of y factor: |y| is at most max |gamma| sqrt(C), so that a factor of 448 over that
never saturates, see `fp8_factor`. Statistics in float32 or wider, rounded once.

Tensors are frames first, [frame, channel, row, column], in channels-last memory. Source: Wan2.1's RMS_norm.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunk_attention import DTYPE_NAMES
from kernels.norm import FP8_MAX
from kernels.sm90 import FP8
from kernels.tuning import LaunchConfig, tuned_config

DEFAULT: LaunchConfig = {"PIXELS": 8, "num_warps": 4}


# --- Definition -----------------------------------------------------------------------------------------------------


def reference(x: Tensor, gamma: Tensor, silu: bool, factor: float | None = None) -> Tensor:
    """Arguments as in `rms_norm_silu`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min_(1e-12)
    y = (x / norm).mul_(gamma.to(dtype).view(-1, 1, 1) * x.shape[1] ** 0.5)
    if factor is None:
        y = y.to(x.dtype)
    y = F.silu(y, inplace=True) if silu else y
    if factor is not None:
        y = y.mul_(factor).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return y


# --- Triton kernel --------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_silu_forward(x, gamma, out, root, factor, pixels, channels, SILU: tl.constexpr, PIXELS: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """PIXELS pixels of [pixels, channels]. root: sqrt(C)."""
    row = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, BLOCK)
    within = column < channels
    mask = (row < pixels)[:, None] & within[None, :]
    places = row[:, None] * channels + column[None, :]
    y = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12)
    scale = tl.load(gamma + column, mask=within, other=0.0).to(tl.float32) * root
    y = y * (1.0 / length)[:, None] * scale[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out + places, (y * factor).to(out.dtype.element_ty), mask=mask)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_rms_norm_silu(
    x: Tensor, gamma: Tensor, silu: bool, factor: float | None = None, config: LaunchConfig | None = None
) -> Tensor:
    """`rms_norm_silu` by its kernel."""
    frames, channels, rows, columns = x.shape
    dims = {"frames": frames, "channels": channels, "rows": rows, "columns": columns}
    tuned = tuned_config("rms_norm_silu", dims, DTYPE_NAMES[x.dtype], x.device, ("triton",))
    parameters: dict[str, Any] = {**DEFAULT, **(config or (tuned.config if tuned else {}))}
    out = torch.empty_like(x, dtype=x.dtype if factor is None else FP8)
    pixels = frames * rows * columns
    rms_norm_silu_forward[(triton.cdiv(pixels, parameters["PIXELS"]),)](
        x, gamma, out, channels**0.5, factor or 1.0, pixels, channels, SILU=silu,
        BLOCK=triton.next_power_of_2(channels), **parameters,
    )  # fmt: skip
    return out


# --- Operation ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::rms_norm_silu", mutates_args=(), device_types="cpu")
def _pixel_norm(x: Tensor, gamma: Tensor, silu: bool, factor: float | None) -> Tensor:
    return reference(x, gamma, silu, factor)


@_pixel_norm.register_kernel("cuda")
def _(x: Tensor, gamma: Tensor, silu: bool, factor: float | None) -> Tensor:
    return launch_rms_norm_silu(x, gamma, silu, factor)


@_pixel_norm.register_fake
def _(x: Tensor, _gamma: Tensor, _silu: bool, factor: float | None) -> Tensor:
    return torch.empty_like(x, dtype=x.dtype if factor is None else FP8)


def fp8_factor(gamma: Tensor) -> float:
    """The largest factor with which no `rms_norm_silu` of any x saturates."""
    return FP8_MAX / (float(gamma.abs().max()) * gamma.numel() ** 0.5)


def check_gamma(gamma: Tensor, channels: int, device: torch.device) -> None:
    """Raises ValueError unless gamma is [channels], or with axes of length 1 behind, contiguous, on that device."""
    if gamma.numel() != channels or gamma.shape[0] != channels or not gamma.is_contiguous():
        raise ValueError(f"gamma: shape {list(gamma.shape)}, wanted [{channels}], contiguous")
    if gamma.device != device:
        raise ValueError(f"gamma: on {gamma.device}, wanted {device}, where x is")


def rms_norm_silu(x: Tensor, gamma: Tensor, silu: bool = False, factor: float | None = None) -> Tensor:
    """The norm of every pixel, SiLU of it if asked for; see the module's first lines.

    Args:
        x: [frames, channels, rows, columns] in channels-last memory; any floating-point dtype on a CPU, float32,
            float16 or bfloat16 on a GPU.
        gamma: [channels], or with axes of length 1 behind; contiguous.
        silu: whether to apply it.
        factor: if there is one, the result is e4m3, that many times larger.

    Returns:
        Like x, in its dtype or e4m3.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"x: shape {list(x.shape)}, wanted [frames, channels, rows, columns], at least 1 of each")
    if x.is_cuda and x.dtype not in DTYPE_NAMES:
        raise ValueError(f"x: {x.dtype}, wanted float32, float16 or bfloat16")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: strides {x.stride()} for shape {list(x.shape)}, wanted channels-last memory")
    check_gamma(gamma, x.shape[1], x.device)
    for name, y in (("x", x), ("gamma", gamma)):
        if y.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")
    return _pixel_norm(x, gamma, silu, factor)
