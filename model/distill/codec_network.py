"""The video VAE on whole clips, in a batch and with gradients: the same parameters and results as `model.vae.VAE`.

The product encodes and decodes step by step, by operations without gradients. Training needs neither steps nor states,
so every layer here sees the whole clip. Clips are [batch, channel, frame, row, column].
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.vae import VAE, AttentionBlock, CausalConv3d, Downsample, Head, ResidualBlock, RMSNorm, Upsample


def encode_clips(vae: VAE, frames: Tensor) -> Tensor:
    """RGB frames in [-1, 1], [B, 3, 1 + k stride, H, W] -> normalised latents [B, z, 1 + k, h, w], with gradients."""
    encoder, z = vae.encoder, vae.config.z_dim
    x = causal(encoder.conv1, unshuffle(frames, vae.config.patch))
    x = _head(encoder.head, run_layers((*encoder.downsamples, *encoder.middle), x))
    mean = F.conv3d(x, vae.conv1.weight[:z], vae.conv1.bias[:z])
    shift, deviation = latent_statistics(vae, mean)
    return (mean - shift) / deviation


def decode_clips(vae: VAE, latents: Tensor) -> Tensor:
    """Normalised latents [B, z, F, h, w] -> RGB frames, not clamped, [B, 3, 1 + (F - 1) stride, H, W]."""
    decoder = vae.decoder
    shift, deviation = latent_statistics(vae, latents)
    x = causal(decoder.conv1, causal(vae.conv2, latents * deviation + shift))
    x = _head(decoder.head, run_layers((*decoder.middle, *decoder.upsamples), x))
    return shuffle(x, vae.config.patch)


def latent_statistics(vae: VAE, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a latent's channels, [z, 1, 1, 1]."""
    shift, deviation = like.new_tensor(vae.config.latent_mean), like.new_tensor(vae.config.latent_std)
    return shift.view(-1, 1, 1, 1), deviation.view(-1, 1, 1, 1)


def unshuffle(x: Tensor, patch: int) -> Tensor:
    """Squares of patch x patch pixels become channels: [B, C, T, H, W] -> [B, C patch^2, T, H / patch, W / patch]."""
    return rearrange(x, "b c t (h i) (w j) -> b (c i j) t h w", i=patch, j=patch)


def shuffle(x: Tensor, patch: int) -> Tensor:
    """The inverse of `unshuffle`."""
    return rearrange(x, "b (c i j) t h w -> b c t (h i) (w j)", i=patch, j=patch)


def run_layers(layers: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    """Layers of the encoder or decoder, one after another, on clips [B, C, T, H, W]."""
    for layer in layers:
        x = _LAYERS[type(layer)](layer, x)
    return x


def causal(conv: CausalConv3d, x: Tensor) -> Tensor:
    """A causal convolution, for clips [B, C, T, H, W]."""
    kt, k = conv.weight.shape[2:4]
    return F.conv3d(F.pad(x, (k // 2, k // 2, k // 2, k // 2, kt - 1, 0)), conv.weight, conv.bias)


def norm_silu(norm: RMSNorm, x: Tensor, silu: bool = True) -> Tensor:
    """RMS norm of each pixel's channels, then SiLU: as `kernels.rms_norm_silu`, for clips."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    y = x / length * (norm.gamma.view(-1, 1, 1, 1) * x.shape[1] ** 0.5)
    return F.silu(y) if silu else y


def _head(head: Head, x: Tensor) -> Tensor:
    return causal(cast(CausalConv3d, head["2"]), norm_silu(cast(RMSNorm, head["0"]), x))


def _residual(block: ResidualBlock, x: Tensor) -> Tensor:
    (norm1, norm2), (conv1, conv2) = block._layers()
    if _is_silent(conv2):
        return x if block.shortcut is None else causal(block.shortcut, x)
    y = causal(conv1, norm_silu(norm1, x))
    y = causal(conv2, norm_silu(norm2, y))
    return y + (x if block.shortcut is None else causal(block.shortcut, x))


def _is_silent(last: nn.Module) -> bool:
    """Whether a branch ends in a layer of zeros that is not trained: then it need not be computed."""
    return not any(parameter.requires_grad or parameter.any() for parameter in last.parameters())


def _attention(block: AttentionBlock, x: Tensor) -> Tensor:
    if _is_silent(block.proj):
        return x
    frames = rearrange(norm_silu(block.norm, x, silu=False), "b c t h w -> (b t) c h w")
    q, k, v = rearrange(block.to_qkv(frames), "n (three c) h w -> three n (h w) c", three=3)
    y = F.scaled_dot_product_attention(q, k, v)
    y = block.proj(rearrange(y, "n (h w) c -> n c h w", h=x.shape[3]))
    return x + rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    convolution = cast(nn.Conv2d, layer.resample[1])
    weight, bias = convolution.weight[:, :, None], convolution.bias
    x = F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))
    if layer.time_conv is None or x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], F.conv3d(x, layer.time_conv.weight, layer.time_conv.bias, stride=(2, 1, 1))], 2)


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    return double_in_space(layer, double_in_time(layer, x))


def double_in_time(layer: Upsample, x: Tensor) -> Tensor:
    """The first half of an up-sampling layer: [B, C, T, H, W] -> [B, C, 2 T - 1, H, W]. The first frame stays one."""
    if layer.time_conv is None or x.shape[2] == 1:
        return x
    later = rearrange(causal(layer.time_conv, x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
    return torch.cat([x[:, :, :1], later], 2)


def double_in_space(layer: Upsample, x: Tensor) -> Tensor:
    """The second half of an up-sampling layer: [B, C, T, H, W] -> [B, C / 2, T, 2 H, 2 W]."""
    if isinstance(layer.phase_weights, nn.Parameter):
        return _double_by_phases(x, layer.phase_weights, layer.phase_bias)
    convolution = cast(nn.Conv2d, layer.resample[1])
    x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    return F.conv3d(F.pad(x, (1, 1, 1, 1)), convolution.weight[:, :, None], convolution.bias)


def _double_by_phases(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """`kernels.resample_conv2d.upsample_conv2d`, for clips, as one convolution with the outputs of all four phases."""
    rows, columns = x.shape[3:]
    merged = rearrange(weights, "i j o c h w -> (i j o) c 1 h w")
    y = F.conv3d(F.pad(x, (1, 1, 1, 1)), merged, bias.repeat(4))  # one row and one column too many
    y = rearrange(y, "b (i j o) t h w -> i j b o t h w", i=2, j=2)
    phases = [y[i, j, :, :, :, i : i + rows, j : j + columns] for i in range(2) for j in range(2)]
    return rearrange(phases, "(i j) b o t h w -> b o t (h i) (w j)", i=2)


_LAYERS = {
    ResidualBlock: _residual,
    AttentionBlock: _attention,
    Downsample: _downsample,
    Upsample: _upsample,
}
