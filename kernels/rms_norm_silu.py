"""RMSNorm over the channels of each pixel, then SiLU, in one pass over memory: the video VAE's before convolutions.

    y = x / max(||x||, 1e-12) * sqrt(C) * gamma      the norm over the C channels of a pixel
    y = y / (1 + exp(-y))                            SiLU, if asked for

With `out_scale` the result is y * out_scale in e4m3, which the next convolution divides by again. |y| is at most
max |gamma| * sqrt(C), so that an out_scale of 448 over that never saturates (`fp8_out_scale`). The kernel computes in
float32 and rounds once.

With a `tail` the last frames are stored a second time: there the next step of a convolution finds the frames before
its own, which then need not be copied. Whether the VAE asks for that is measured: `tail_is_tuned` says whether
kernels/tuned/ names it. No GPU has run it yet.

Tensors are frames first, [frame, channel, row, column], in channels-last memory. Source: Wan2.1's RMS_norm.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES, FP8, FP8_MAX, check, define_op
from kernels.tuning import LaunchConfig, launch_config, tuned_config

DEFAULT_CONFIG: LaunchConfig = {"PIXELS": 8, "num_warps": 4}
TAIL_BACKENDS = ("fused", "separate")  # of the tail, under `TAIL_OPERATION` in tuned tables: by the kernel, or a copy
TAIL_OPERATION = "rms_norm_silu_tail"


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
def rms_norm_silu_fwd(x, gamma, out, sqrt_channels, out_scale, pixels, channels, tail, tail_start, SILU: tl.constexpr,
                      PIXELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """PIXELS rows of x [pixels, channels], each in registers. BLOCK channels, a power of two, hold a row.

    `tail`, unless it is None, gets the values from the one at `tail_start`, where a row begins, as well.
    """
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
    if tail is not None:
        in_tail = (offs_m * channels >= tail_start)[:, None]
        tl.store(tail - tail_start + offs, (y * out_scale).to(out.dtype.element_ty), mask=mask & in_tail)


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_rms_norm_silu(
    x: Tensor,
    gamma: Tensor,
    silu: bool = True,
    out_scale: float | None = None,
    tail: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`rms_norm_silu` by its kernel."""
    frames, channels, rows, columns = x.shape
    operation, backend = ("rms_norm_silu", "triton") if tail is None else (TAIL_OPERATION, "fused")
    parameters = launch_config(
        operation, {"frames": frames, "channels": channels, "rows": rows, "columns": columns},
        DTYPE_NAMES[x.dtype], x.device, default=DEFAULT_CONFIG, given=config, backend=backend,
    )  # fmt: skip
    out = torch.empty_like(x, dtype=_result_dtype(x, out_scale))
    pixels = frames * rows * columns
    tail_start = None if tail is None else out[: frames - len(tail)].numel()
    rms_norm_silu_fwd[(triton.cdiv(pixels, parameters["PIXELS"]),)](
        x, gamma, out, channels**0.5, out_scale or 1.0, pixels, channels, tail, tail_start, SILU=silu,
        BLOCK=triton.next_power_of_2(channels), **parameters,
    )  # fmt: skip
    return out


def tail_is_tuned(
    frames: int, channels: int, rows: int, columns: int, dtype: torch.dtype, device: str | torch.device
) -> bool:
    """Whether the fastest way to write a tail that was measured on the device, at the nearest shape, is the kernel's.

    Without measurements it is not, and whoever needs the last frames again copies them.
    """
    if (name := DTYPE_NAMES.get(dtype)) is None:
        return False
    dims = {"frames": frames, "channels": channels, "rows": rows, "columns": columns}
    tuned = tuned_config(TAIL_OPERATION, dims, name, device, TAIL_BACKENDS)
    return tuned is not None and tuned.backend == "fused"


# --- Operation ------------------------------------------------------------------------------------------------------


def _rms_norm_silu_cpu(x: Tensor, gamma: Tensor, silu: bool, out_scale: float | None, tail: Tensor | None) -> Tensor:
    return with_tail(reference(x, gamma, silu, out_scale), tail)


def _rms_norm_silu_cuda(x: Tensor, gamma: Tensor, silu: bool, out_scale: float | None, tail: Tensor | None) -> Tensor:
    return launch_rms_norm_silu(x, gamma, silu, out_scale, tail)


rms_norm_silu_op = define_op("rms_norm_silu", cpu=_rms_norm_silu_cpu, cuda=_rms_norm_silu_cuda, mutates_args=("tail",))


def rms_norm_silu(
    x: Tensor, gamma: Tensor, silu: bool = True, out_scale: float | None = None, tail: Tensor | None = None
) -> Tensor:
    """RMSNorm over the channels of every pixel, then SiLU.

    y = x / max(||x||, 1e-12) * sqrt(channels) * gamma, with the norm over a pixel's channels, and then
    y / (1 + exp(-y)). The norm is computed in float32 or wider.

    Args:
        x: [frames, channels, rows, columns] in channels-last memory; any floating-point dtype on a CPU, float32,
            float16 or bfloat16 on a GPU.
        gamma: [channels], which further axes of length 1 may follow; contiguous.
        silu: False leaves SiLU out.
        out_scale: makes the result e4m3, that many times larger; `fp8_out_scale(gamma)` never saturates.
        tail: [n, channels, rows, columns] in channels-last memory, of the result's dtype, is overwritten with the last
            n frames of the result. None if they are wanted once only.

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
    check_tail(tail, x.shape, _result_dtype(x, out_scale), x.device)
    return rms_norm_silu_op(x, gamma, silu, out_scale, tail)


def fp8_out_scale(gamma: Tensor) -> float:
    """The largest `out_scale` with which `rms_norm_silu` saturates for no x: 448 / (max |gamma| * sqrt(channels))."""
    return FP8_MAX / (float(gamma.abs().max()) * gamma.numel() ** 0.5)


def check_gamma(gamma: Tensor, channels: int, device: torch.device) -> None:
    """Raises ValueError unless gamma is [channels], with axes of length 1 behind if any, contiguous, on that device."""
    check("gamma", gamma, shape=(channels, *[1] * (gamma.ndim - 1)), device=device, layout="contiguous")


def check_tail(tail: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless `tail` is None or fits the last frames of a result of that shape and dtype."""
    if tail is None:
        return
    check("tail", tail, shape=("frames", *shape[1:]), dtype=dtype, device=device, layout="channels_last")
    if len(tail) > shape[0]:
        raise ValueError(f"tail: shape {list(tail.shape)}, wanted {shape[0]} frames or fewer")


def with_tail(y: Tensor, tail: Tensor | None) -> Tensor:
    """y, whose last frames are copied to `tail` if there is one: what a kernel with a tail makes in one pass."""
    if tail is not None:
        tail.copy_(y[-len(tail) :])
    return y


def _result_dtype(x: Tensor, out_scale: float | None) -> torch.dtype:
    return x.dtype if out_scale is None else FP8
