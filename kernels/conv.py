"""Causal 3-D convolution of the video VAE.

    y[t] = bias + sum_{i = 0 .. kt-1} conv2d(x[t - (kt-1) + i], weight[:, :, i], padding k // 2)

Frame t sees itself and the kt - 1 frames before it, never a later one; the frames before x[0] are `past`, or zeros at
the start of a clip. So a clip goes through in pieces of any length, each with the last frames of the one before it.

Tensors are frames first, [frame, channel, row, column], in channels-last memory: the same bytes as channels_last_3d of
[1, channel, frame, row, column]. `reference` is the definition; `causal_conv3d` computes it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """The definition: one dense convolution over zero-padded frames. Arguments as in `causal_conv3d`."""
    kt, k = weight.shape[2:4]
    if past is None:
        past = x.new_zeros(kt - 1, *x.shape[1:])
    clip = torch.cat([past, x]).transpose(0, 1)[None]  # [1, C, kt - 1 + T, H, W]
    return F.conv3d(clip, weight, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """`reference` without its zero frames: x [T, C, H, W] -> [T, O, H, W], in channels-last memory and x's dtype.

    weight [O, C, kt, k, k] with k odd, bias [O]; `past` [kt - 1, C, H, W] are the frames before x, None at the start of
    a clip or where kt = 1. At the start the taps on zero frames are skipped, kt (kt - 1) / 2 of the clip's tap-frames.

    Raises ValueError if x or `past` has another shape, dtype or memory format than that.
    """
    kt = weight.shape[2]
    if past is not None:
        if past.shape != (kt - 1, *x.shape[1:]):
            raise ValueError(f"past: shape {list(past.shape)}, wanted {[kt - 1, *x.shape[1:]]}")
        if past.dtype != x.dtype:
            raise ValueError(f"past: dtype {past.dtype}, wanted x's, {x.dtype}")
        return conv3d(torch.cat([past, x]), weight, bias)
    y = conv3d(x, weight[:, :, -1:], bias)
    for lag in range(1, min(kt, len(x))):
        y[lag:] += conv3d(x[:-lag], weight[:, :, kt - 1 - lag : kt - lag], None)
    return y


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """The same convolution over the frames given and no others, at every `stride`-th place in time.

    x [N, C, H, W] -> [(N - kt) // stride + 1, O, H, W], in channels-last memory and x's dtype; weight [O, C, kt, k, k]
    with k odd, bias [O] or None. Raises ValueError if x has another shape, dtype or memory format than that.
    """
    kt = weight.shape[2]
    if x.ndim != 4 or x.shape[1] != weight.shape[1] or len(x) < kt:
        raise ValueError(f"x: shape {list(x.shape)}, wanted [{kt} or more, {weight.shape[1]}, rows, columns]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x: dtype {x.dtype}, wanted the weight's, {weight.dtype}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: strides {x.stride()} for shape {list(x.shape)}, wanted channels-last memory")
    return (_volume if x.is_cuda else _stacked)(x, weight, bias, stride)


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
