"""The video VAE's norm and activation, in front of a convolution: one pass over memory.

    y = x / max(||x||, 1e-12) sqrt(C) gamma          the norm over the C channels of a pixel
    y = y / (1 + exp(-y))                            SiLU, if asked for

With `factor`, y comes out as e4m3 of y factor: |y| is at most max |gamma| sqrt(C), so that a factor of 448 over that
never saturates, see `fp8_factor`. With `past`, the frames that a causal convolution sees before x, they come in front:
the convolution reads the result as it is, and nothing is concatenated. Statistics in float32 or wider, rounded once.

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

from kernels.attention import NAMES
from kernels.hopper import FP8
from kernels.launch import Launch, lookup

DEFAULT: Launch = {"PIXELS": 8, "num_warps": 4}
FP8_MAX = 448.0  # the largest e4m3 value


# --- Definition -----------------------------------------------------------------------------------------------------


def reference(x: Tensor, gamma: Tensor, silu: bool, past: Tensor | None, factor: float | None = None) -> Tensor:
    """Arguments as in `pixel_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min_(1e-12)
    y = (x / norm).mul_(gamma.to(dtype).view(-1, 1, 1) * x.shape[1] ** 0.5)
    if factor is None:
        y = y.to(x.dtype)
    y = F.silu(y, inplace=True) if silu else y
    if factor is not None:
        y = y.mul_(factor).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return y if past is None else torch.cat([past, y])


# --- Triton kernel --------------------------------------------------------------------------------------------------


@triton.jit
def pixel_norm_forward(x, past, gamma, out, root, factor, before, pixels, channels, SILU: tl.constexpr,
                       PIXELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """PIXELS pixels of out [pixels, channels], the first `before` of which are copied from past. root: sqrt(C)."""
    row = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, BLOCK)
    within = column < channels
    old, new = row < before, (row >= before) & (row < pixels)
    copied = old[:, None] & within[None, :]
    y = tl.load(
        x + (row - before)[:, None] * channels + column[None, :], mask=new[:, None] & within[None, :], other=0.0
    ).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12)
    scale = tl.load(gamma + column, mask=within, other=0.0).to(tl.float32) * root
    y = y * (1.0 / length)[:, None] * scale[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    y *= factor
    places = row[:, None] * channels + column[None, :]
    kept = tl.load(past + places, mask=copied, other=0.0)
    y = tl.where(copied, kept, y.to(out.dtype.element_ty))
    tl.store(out + places, y, mask=(row < pixels)[:, None] & within[None, :])


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_pixel_norm(
    x: Tensor,
    gamma: Tensor,
    silu: bool,
    past: Tensor | None = None,
    factor: float | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """`pixel_norm` by its kernel."""
    frames, channels, rows, columns = x.shape
    dims = {"frames": frames, "channels": channels, "rows": rows, "columns": columns}
    tuned = lookup("norm_silu", dims, NAMES[x.dtype], x.device, ("triton",), equal=("channels",))
    parameters: dict[str, Any] = {**DEFAULT, **(launch or (tuned.launch if tuned else {}))}
    before = 0 if past is None else len(past)
    out = x.new_empty(before + frames, rows, columns, channels, dtype=x.dtype if factor is None else FP8)
    out = out.permute(0, 3, 1, 2)
    pixels = (before + frames) * rows * columns
    pixel_norm_forward[(triton.cdiv(pixels, parameters["PIXELS"]),)](
        x, x if past is None else past, gamma, out, channels**0.5, factor or 1.0, before * rows * columns, pixels,
        channels, SILU=silu, BLOCK=triton.next_power_of_2(channels), **parameters,
    )  # fmt: skip
    return out


# --- Operation ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flashtalk::pixel_norm", mutates_args=(), device_types="cpu")
def _pixel_norm(x: Tensor, gamma: Tensor, silu: bool, past: Tensor | None, factor: float | None) -> Tensor:
    return reference(x, gamma, silu, past, factor)


@_pixel_norm.register_kernel("cuda")
def _(x: Tensor, gamma: Tensor, silu: bool, past: Tensor | None, factor: float | None) -> Tensor:
    return launch_pixel_norm(x, gamma, silu, past, factor)


@_pixel_norm.register_fake
def _(x: Tensor, gamma: Tensor, silu: bool, past: Tensor | None, factor: float | None) -> Tensor:
    frames, channels, rows, columns = x.shape
    before = 0 if past is None else past.shape[0]
    dtype = x.dtype if factor is None else FP8
    return x.new_empty(before + frames, rows, columns, channels, dtype=dtype).permute(0, 3, 1, 2)


def fp8_factor(gamma: Tensor) -> float:
    """The largest factor with which no `pixel_norm` of any x saturates."""
    return FP8_MAX / (float(gamma.abs().max()) * gamma.numel() ** 0.5)


def pixel_norm(
    x: Tensor, gamma: Tensor, silu: bool = False, past: Tensor | None = None, factor: float | None = None
) -> Tensor:
    """The norm of every pixel, SiLU of it if asked for, behind the frames `past`; see the module's first lines.

    Args:
        x: [frames, channels, rows, columns] in channels-last memory; any floating-point dtype on a CPU, float32,
            float16 or bfloat16 on a GPU.
        gamma: [channels], or with axes of length 1 behind; contiguous.
        silu: whether to apply it.
        past: [frames before, channels, rows, columns], like the result, copied as they are.
        factor: if there is one, the result is e4m3, that many times larger.

    Returns:
        [frames before + frames, channels, rows, columns], in channels-last memory, in x's dtype or e4m3.

    Raises:
        ValueError: an argument has another shape, dtype, device or memory format, or wants a gradient.
    """
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"x: shape {list(x.shape)}, wanted [frames, channels, rows, columns], at least 1 of each")
    if x.is_cuda and x.dtype not in NAMES:
        raise ValueError(f"x: {x.dtype}, wanted float32, float16 or bfloat16")
    if gamma.numel() != x.shape[1] or gamma.shape[0] != x.shape[1] or not gamma.is_contiguous():
        raise ValueError(f"gamma: shape {list(gamma.shape)}, wanted [{x.shape[1]}], contiguous")
    dtype = x.dtype if factor is None else FP8
    if past is not None and (past.ndim != 4 or past.shape[1:] != x.shape[1:] or past.dtype != dtype):
        wanted = ["frames", *x.shape[1:]]
        raise ValueError(f"past: {past.dtype} {list(past.shape)}, wanted {dtype} {wanted}")
    for name, y in (("x", x), ("gamma", gamma), ("past", past)):
        if y is None:
            continue
        if y.device != x.device:
            raise ValueError(f"{name}: on {y.device}, wanted {x.device}, where x is")
        if y.ndim == 4 and name != "gamma" and not y.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name}: strides {y.stride()} for shape {list(y.shape)}, wanted channels-last memory")
        if y.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")
    return _pixel_norm(x, gamma, silu, past, factor)
