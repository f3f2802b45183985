"""RMSNorm over the channels of each pixel, then SiLU, in one pass over memory: the video VAE's before convolutions.

    y = x / max(||x||, 1e-12) * sqrt(C) * gamma      the norm over the C channels of a pixel
    y = y / (1 + exp(-y))                            SiLU, if asked for

With `out_scale` the result is y * out_scale in e4m3, which the next convolution divides by again. |y| is at most
max |gamma| * sqrt(C), so that an out_scale of 448 over that never saturates (`fp8_out_scale`). The kernel computes in
float32 and rounds once.

Tensors are frames first, [frame, channel, row, column], in channels-last memory. Source: Wan2.1's RMS_norm.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, check, define_op
from kernels.tuning import LaunchConfig, launch_config

DEFAULT_CONFIG: LaunchConfig = {"PIXELS": 8, "num_warps": 4}


# --- Reference ------------------------------------------------------------------------------------------------------


def reference(x: Tensor, gamma: Tensor, silu: bool = True, out_scale: float | None = None) -> Tensor:
    """The definition of `rms_norm_silu`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min_(1e-12)
    y = (x / norm).mul_(gamma.to(dtype).view(-1, 1, 1) * x.shape[1] ** 0.5)
    if out_scale is None:
        y = y.to(x.dtype)
    y = F.silu(y, inplace=True) if silu else y
    if out_scale is not None:
        y = y.mul_(out_scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return y


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_silu_fwd(x, gamma, out, sqrt_channels, out_scale, pixels, channels, SILU: tl.constexpr,
                      PIXELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """PIXELS rows of x [pixels, channels], each in registers. BLOCK channels, a power of two, hold a row."""
    offs_m = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    offs_n = tl.arange(0, BLOCK)
    mask_n = offs_n < channels
    mask = (offs_m < pixels)[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * channels + offs_n[None, :]
    y = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12)
    weight = tl.load(gamma + offs_n, mask=mask_n, other=0.0).to(tl.float32) * sqrt_channels
    y = y * (1.0 / norm)[:, None] * weight[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out + offs, (y * out_scale).to(out.dtype.element_ty), mask=mask)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_rms_norm_silu(
    x: Tensor, gamma: Tensor, silu: bool = True, out_scale: float | None = None, config: LaunchConfig | None = None
) -> Tensor:
    """`rms_norm_silu` by its kernel."""
    frames, channels, rows, columns = x.shape
    parameters = launch_config(
        "rms_norm_silu", {"frames": frames, "channels": channels, "rows": rows, "columns": columns},
        DTYPE_NAMES[x.dtype], x.device, default=DEFAULT_CONFIG, given=config,
    )  # fmt: skip
    out = torch.empty_like(x, dtype=x.dtype if out_scale is None else FP8)
    pixels = frames * rows * columns
    rms_norm_silu_fwd[(triton.cdiv(pixels, parameters["PIXELS"]),)](
        x, gamma, out, channels**0.5, out_scale or 1.0, pixels, channels, SILU=silu,
        BLOCK=triton.next_power_of_2(channels), **parameters,
    )  # fmt: skip
    return out


# --- Operation ------------------------------------------------------------------------------------------------------


rms_norm_silu_op = define_op("rms_norm_silu", cpu=reference, cuda=launch_rms_norm_silu)


def rms_norm_silu(x: Tensor, gamma: Tensor, silu: bool = True, out_scale: float | None = None) -> Tensor:
    """RMSNorm over the channels of every pixel, then SiLU.

    y = x / max(||x||, 1e-12) * sqrt(channels) * gamma, with the norm over a pixel's channels, and then
    y / (1 + exp(-y)). The norm is computed in float32 or wider.

    Args:
        x: [frames, channels, rows, columns] in channels-last memory; any floating-point dtype on a CPU, float32,
            float16 or bfloat16 on a GPU.
        gamma: [channels], which further axes of length 1 may follow; contiguous.
        silu: False leaves SiLU out.
        out_scale: makes the result e4m3, that many times larger; `fp8_out_scale(gamma)` never saturates.

    Returns:
        [frames, channels, rows, columns] in channels-last memory, in x's dtype, or e4m3 with `out_scale`.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or requires a gradient.
    """
    check(
        "x", x, shape=("frames", "channels", "rows", "columns"), dtype=DTYPE_NAMES if x.is_cuda else None,
        layout="channels_last",
    )  # fmt: skip
    check_gamma(gamma, x.shape[1], x.device)
    return rms_norm_silu_op(x, gamma, silu, out_scale)


def fp8_out_scale(gamma: Tensor) -> float:
    """The largest `out_scale` with which `rms_norm_silu` saturates for no x: 448 / (max |gamma| * sqrt(channels))."""
    return FP8_MAX / (float(gamma.abs().max()) * gamma.numel() ** 0.5)


def check_gamma(gamma: Tensor, channels: int, device: torch.device) -> None:
    """Raises ValueError unless gamma is [channels], with axes of length 1 behind if any, contiguous, on that device."""
    check("gamma", gamma, shape=(channels, *[1] * (gamma.ndim - 1)), device=device, layout="contiguous")
