"""Student and VAE as the published code runs them: PyTorch's operations wherever model/ calls those of kernels/.

This is the baseline for whole chunks. Under torch.compile its norms, rotation and residuals are fused, as anyone would
have them; attention is PyTorch's, and the audio projections are not absorbed. The VAE's convolutions are the library's,
on clips that are concatenated, padded and channels first; up-sampled images are materialised.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rms_norm_silu import with_tail
from model import block, dit, linear, vae
from model.rope import rotate


@contextmanager
def official_baseline() -> Iterator[None]:
    """While the body runs, student and VAE compute with PyTorch's operations only."""
    with ExitStack() as stack:
        for module, functions in _REPLACED.items():
            for function in functions:
                stack.enter_context(patch.object(module, function.__name__, function))
        yield


def rms_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.rms_norm_rope.rms_norm_rope`."""
    q, k = (
        rotate(F.rms_norm(x.flatten(1), weight.shape, weight, eps).unflatten(1, x.shape[1:]), rope)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k


def chunk_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `kernels.chunk_attention.chunk_attention`."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)


def text_image_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    _num_text_tokens: Tensor,
    q_scale: Tensor,
) -> Tensor:
    """As `kernels.text_image_attention.text_image_attention`; all keys, padding too."""
    q = (q * q_scale[:, None, None]).to(q.dtype)
    return chunk_attention(q, text_k, text_v) + chunk_attention(q, image_k, image_v)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int = 0) -> Tensor:
    """As `kernels.frame_attention.frame_attention`: the frames are a batch."""
    q = F.pad(q, (0, 0, 0, 0, first, 0)).unflatten(0, (len(k), per_frame))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[first:]


def absorb(_: block.AudioAttention, audio: block.AudioKV, _tokens_per_frame: int) -> block.AudioKV:
    """In place of `model.block.AudioAttention.absorb`: nothing is absorbed, and the layer computes its projections."""
    return audio


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `kernels.layer_norm.layer_norm`."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As `kernels.layer_norm.layer_norm_modulate`."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def rms_norm_silu(
    x: Tensor, gamma: Tensor, silu: bool = True, out_scale: float | None = None, tail: Tensor | None = None
) -> Tensor:
    """As `kernels.rms_norm_silu.rms_norm_silu`, not in FP8; a tail is copied."""
    assert out_scale is None
    y = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma.view(-1, 1, 1)
    return with_tail(F.silu(y) if silu else y, tail)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """As `kernels.causal_conv3d.conv3d`, not in FP8."""
    assert scale is None
    clip = F.pad(x.transpose(0, 1)[None].contiguous(), [weight.shape[3] // 2] * 4)
    y = F.conv3d(clip, weight.contiguous(), bias, (stride, 1, 1))[0].transpose(0, 1)
    return y if residual is None else y + residual


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """As `kernels.causal_conv3d.causal_conv3d`, not in FP8; zero frames are multiplied too."""
    if past is None:
        past = x.new_zeros(weight.shape[2] - 1, *x.shape[1:])
    return conv3d(torch.cat([past, x]), weight, bias, residual=residual, scale=scale)


def causal_conv3d_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    past: Tensor | None = None,
    scale: Tensor | None = None,
    out_scale: float | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """As `kernels.causal_conv3d.causal_conv3d_norm`, not in FP8."""
    return rms_norm_silu(causal_conv3d(x, weight, bias, past, None, scale), gamma, True, out_scale, tail)


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `kernels.resample_conv2d.downsample_conv2d`."""
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight.contiguous(), bias, stride=2)


def _double(self: vae.Upsample, x: Tensor) -> Tensor:
    """As `model.vae.Upsample._double`, on the doubled image."""
    double, convolution = self.resample
    assert isinstance(convolution, nn.Conv2d)
    return F.conv2d(double.forward(x), convolution.weight.contiguous(), convolution.bias, padding=1)


_REPLACED = {
    block: (
        rms_norm_rope,
        chunk_attention,
        text_image_attention,
        frame_attention,
        layer_norm,
    ),
    block.AudioAttention: (absorb,),
    dit: (layer_norm_modulate,),
    linear: (layer_norm, layer_norm_modulate),
    vae: (rms_norm_silu, conv3d, causal_conv3d, causal_conv3d_norm, downsample_conv2d, chunk_attention),
    vae.Upsample: (_double,),
}
