"""The linear codec inside the video VAE: weights in closed form, so that training starts at a good picture.

A random VAE needs hours to reach what a principal component analysis (PCA) reaches in seconds, and a linear map treats
a photograph as well as a drawing. The VAE can hold such a map almost exactly:

residual branches   end in a convolution of zeros, so a block passes on its input, or its shortcut's linear map of it.
                    Before it, each channel has zero mean and unit variance, so that the branch learns at once.
down-sampling       A 3 x 3 convolution of stride 2 turns 2 x 2 positions into their principal components. Then two
                    frames become their mean, and the weakest means give way to the strongest half differences, which
                    count DIFFERENCE_GAIN times. The first frame of a clip has no partner: it keeps its components.
up-sampling         Phases (`VAEConfig.phases`) give each of the 2 x 2 positions channels of its own.
RMS norm and SiLU   stand in the last layer of the encoder and of the decoder. One channel, the *anchor*, is so large
                    that it alone determines the norm. The others come in pairs, u and -u: SiLU(u) - SiLU(-u) = u.
                    Where channels are too few for that, the weakest latents are made small: SiLU(e u) is about e u / 2.

The decoder is the transpose of the encoder, except that it divides differences by their gain. So together they project
a clip on what the latents can express, and a clip that was decoded survives any number of further round trips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.distill.codec_network import causal, encode_clips, norm_silu, run_layers, unshuffle
from model.vae import VAE, AttentionBlock, CausalConv3d, Downsample, Head, ResidualBlock, RMSNorm, Upsample

ANCHOR = 3000.0  # a constant channel so large that the norm of a pixel's channels varies by less than 1e-5
DIFFERENCE_GAIN = 1.25  # keeps fast lips: against 1, the reader follows their opening at r .911 instead of .885
SMALL = 2.0**-10  # of a latent without a partner, for which SiLU is off by a share of SMALL u / 2
PIXEL_GAIN = 2.0  # of pixels in [-1, 1] in the decoder's last level, where small changes should be small in the picture


@dataclass(frozen=True)
class Sample:
    """A clip to fit to: frames [1, 3, T, H, W] in [-1, 1], and how much the error of a pixel counts, [T, H, W]."""

    frames: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Features:
    """Linear features of a clip at one place of the encoder, [1, C, T, H, W], and how much their error counts."""

    values: Tensor
    weight: Tensor  # [T, H, W]


@dataclass(frozen=True)
class Stage:
    """How a down-sampling layer sees 2 x 2 positions: their mean [C, 2, 2], orthonormal components [S, C, 2, 2]."""

    mean: Tensor
    components: Tensor


@torch.no_grad()
def start_at_linear_codec(vae: VAE, samples: Sequence[Sample]) -> Tensor:
    """Sets all weights of `vae` to the linear codec that is fitted to `samples`. Returns its latents' deviation [z].

    Every level of the VAE must halve frames, rows and columns, with `phases` and one residual block a level. The
    configuration's latent_mean and latent_std must be 0 and 1. The latents of the samples get zero mean, and keep the
    scale of the principal components, which is the scale of pixels.
    """
    _silence_branches(vae)
    clips, stages = [_patched(sample, vae.config.patch) for sample in samples], []
    room = (vae.config.dim * vae.config.dim_mult[0] - 2) // 2  # pairs beside the anchor and the one
    pixels = _principal(*_rows(clips), min(room, clips[0].values.shape[1]))
    _set_matrix(vae.encoder.conv1, torch.eye(clips[0].values.shape[1]))
    vae.encoder.conv1.bias[-1] = 1.0  # a constant channel keeps the norm of grey pixels away from zero
    for layer in vae.encoder.downsamples:
        if isinstance(layer, Downsample):
            space, stage = _fit_space(layer, clips)
            clips = _fit_time(layer, space)
            stages.append(stage)
    mean, basis, deviation = _fit_latents(vae, clips)
    _transpose_encoder(vae, stages, (mean, basis), pixels)
    _standardize_branches(vae, samples[:8])
    return deviation


def _patched(sample: Sample, patch: int) -> Features:
    return Features(unshuffle(sample.frames, patch), _pool(sample.weight, patch))


def _rows(clips: Sequence[Features]) -> tuple[list[Tensor], list[Tensor]]:
    """Features of each position, [N, C], and their weights, [N], for each clip."""
    values = [rearrange(clip.values, "1 c t h w -> (t h w) c") for clip in clips]
    return values, [clip.weight.flatten() for clip in clips]


def _pool(weight: Tensor, factor: int) -> Tensor:
    """[T, H, W] -> [T, H / factor, W / factor], means."""
    return F.avg_pool2d(weight[:, None], factor)[:, 0]


def _silence_branches(vae: VAE) -> None:
    """Makes residual branches and attention add zero, and shortcuts the identity, with a constant channel at the end.

    The constant keeps the norm of pixels that are close to the mean away from zero.
    """
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            _zero(cast(nn.Conv3d, module.residual["6"]))
            if module.shortcut is not None:
                _set_matrix(module.shortcut, torch.eye(*module.shortcut.weight.shape[:2]))
                module.shortcut.bias[-1] = 1.0
        if isinstance(module, AttentionBlock):
            _zero(module.proj)


def _zero(convolution: CausalConv3d | nn.Conv2d | nn.Conv3d) -> None:
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(cast(Tensor, convolution.bias))


def _set_matrix(conv: CausalConv3d, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Makes the convolution a matrix product [out, in] of each pixel's channels, plus [out]; all else becomes zero."""
    _zero(conv)
    outputs, inputs = matrix.shape
    kt, k = conv.weight.shape[2:4]
    conv.weight[:outputs, :inputs, kt - 1, k // 2, k // 2] = matrix
    if bias is not None:
        conv.bias[:outputs] = bias


# --- Encoder --------------------------------------------------------------------------------------------------------


def _principal(rows: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Weighted mean [C] of all rows [N, C], and their first `count` principal components [C, count], orthonormal."""
    total = sum(float(w.sum()) for w in weights)
    mean = torch.stack([w @ x for x, w in zip(rows, weights, strict=True)]).sum(0) / total
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for x, w in zip(rows, weights, strict=True):
        covariance += ((x - mean).T @ (w[:, None] * (x - mean))).double()
    basis = torch.linalg.eigh(covariance)[1].flip(1)[:, :count].float()
    return mean, basis * basis.sum(0).sign()  # of the two signs, the one with more positive numbers


def _fit_space(layer: Downsample, clips: list[Features]) -> tuple[list[Features], Stage]:
    """2 x 2 positions [1, C, T, 2 h, 2 w] become their principal components [1, channels, T, h, w]."""
    convolution = cast(nn.Conv2d, layer.resample[1])
    blocks = [rearrange(clip.values, "1 c t (h i) (w j) -> t h w (c i j)", i=2, j=2) for clip in clips]
    weights = [_pool(clip.weight, 2) for clip in clips]
    count = min(len(convolution.weight), blocks[0].shape[-1])
    mean, basis = _principal([x.flatten(0, 2) for x in blocks], [w.flatten() for w in weights], count)
    _zero(convolution)
    components = rearrange(basis, "(c i j) o -> o c i j", i=2, j=2)
    convolution.weight[:count, : components.shape[1], :2, :2] = components
    cast(Tensor, convolution.bias)[:count] = -(mean @ basis)
    reduced = [rearrange((x - mean) @ basis, "t h w c -> 1 c t h w") for x in blocks]
    stage = Stage(rearrange(mean, "(c i j) -> c i j", i=2, j=2), components)
    return [Features(x, w) for x, w in zip(reduced, weights, strict=True)], stage


def _fit_time(layer: Downsample, clips: list[Features]) -> list[Features]:
    """Two frames become the mean of each channel. The weakest channels take the strongest half differences instead."""
    conv = cast(CausalConv3d, layer.time_conv)
    used, channels = clips[0].values.shape[1], len(conv.weight)
    weights = [(clip.weight[1::2] + clip.weight[2::2]) / 2 for clip in clips]

    def energy(sign: int) -> Tensor:
        pairs = [(clip.values[0, :, 2::2] + sign * clip.values[0, :, 1::2]) / 2 for clip in clips]
        return torch.stack([(w * x.square()).sum((1, 2, 3)) for x, w in zip(pairs, weights, strict=True)]).sum(0)

    means = F.pad(energy(1), (0, channels - used))
    differences = DIFFERENCE_GAIN**2 * energy(-1)
    taps = torch.zeros(channels, channels, 3)
    taps[range(used), range(used), 1:] = 0.5
    for weak, strong in zip(means.argsort(), differences.argsort(descending=True), strict=False):
        if differences[strong] > means[weak]:
            taps[weak] = 0
            taps[weak, strong] = torch.tensor([0.0, -0.5, 0.5]) * DIFFERENCE_GAIN
    _zero(conv)
    conv.weight.copy_(taps[..., None, None])
    reduced = []
    for clip, weight in zip(clips, weights, strict=True):
        x = F.pad(clip.values, (0, 0, 0, 0, 0, 0, 0, channels - used))
        x = torch.cat([x[:, :, :1], F.conv3d(x, conv.weight, stride=(2, 1, 1))], 2)
        reduced.append(Features(x, torch.cat([clip.weight[:1], weight])))
    return reduced


def _fit_latents(vae: VAE, clips: list[Features]) -> tuple[Tensor, Tensor, Tensor]:
    """The last shortcut makes the principal components, and the head passes them.

    Returns the mean [C] of the clips' features, the components [C, z], and the deviation of each [z].
    """
    z = vae.config.z_dim
    rows, weights = _rows(clips)
    mean, basis = _principal(rows, weights, z)
    shortcut = next(block.shortcut for block in reversed(vae.encoder.downsamples) if isinstance(block, ResidualBlock))
    shortcut = cast(CausalConv3d, shortcut)
    paired = min(z, len(shortcut.weight) - 1 - z)  # the strongest latents
    matrix = torch.cat([basis.T, -basis.T[:paired]])
    _set_matrix(shortcut, matrix, -(matrix @ mean))
    shortcut.bias[z + paired] = ANCHOR
    for module in (*vae.encoder.middle, vae.encoder.head):
        _undo_norm(module, z + paired)
    cast(RMSNorm, vae.encoder.head["0"]).gamma.view(-1)[paired:z] *= SMALL
    signs = torch.eye(z)
    signs[range(paired, z), range(paired, z)] = 2 / SMALL
    _set_matrix(cast(CausalConv3d, vae.encoder.head["2"]), torch.cat([signs, -signs[:, :paired]], 1))
    _set_matrix(vae.conv1, torch.eye(2 * z))
    _set_matrix(vae.conv2, torch.eye(z))
    return mean, basis, torch.cat([(x - mean) @ basis for x in rows]).std(0)


def _undo_norm(layer: nn.Module, anchor: int) -> None:
    """Gives the norm at the layer's input gains that undo its division, which is by the size of channel `anchor`."""
    if isinstance(layer, AttentionBlock):
        norm = layer.norm
    else:
        norm = cast(RMSNorm, (layer.residual if isinstance(layer, ResidualBlock) else cast(Head, layer))["0"])
    root = norm.gamma.numel() ** 0.5
    nn.init.constant_(norm.gamma, ANCHOR / root)
    norm.gamma.view(-1)[anchor] = 1 / root  # the anchor itself becomes 1


# --- Decoder --------------------------------------------------------------------------------------------------------


def _transpose_encoder(
    vae: VAE, stages: Sequence[Stage], latents: tuple[Tensor, Tensor], pixels: tuple[Tensor, Tensor]
) -> None:
    """Sets the decoder to the transpose of the encoder, which was fitted. The last channel of every level is 1.

    `latents` and `pixels` are the mean and the components of what latents are made of, and of the pixels of a patch.
    The last level holds the components of patches and their negatives, all but the weakest component, for which there
    is no room.
    """
    decoder = vae.decoder
    _set_matrix(decoder.conv1, latents[1], latents[0])
    decoder.conv1.bias[-1] = 1.0
    mean, basis = pixels
    count, level = basis.shape[1], len(stages)
    pairs = PIXEL_GAIN * torch.cat([basis.T, -basis.T])
    downs = [layer for layer in vae.encoder.downsamples if isinstance(layer, Downsample)]
    for layer in decoder.upsamples:
        if isinstance(layer, Upsample):
            level -= 1
            _set_doubling_in_time(layer, downs[level], len(stages[level].components))
            inputs = stages[level].components.shape[1]
            matrix, shift = (torch.eye(inputs), torch.zeros(inputs)) if level else (pairs, -(pairs @ mean))
            _set_doubling_in_space(layer, stages[level], matrix, shift)
            if level == 0:
                layer.phase_bias[2 * count] = ANCHOR
        elif level == 0:
            _undo_norm(layer, 2 * count)
    _undo_norm(decoder.head, 2 * count)
    _set_matrix(cast(CausalConv3d, decoder.head["2"]), torch.cat([basis, -basis], 1) / PIXEL_GAIN, mean)


def _set_doubling_in_time(layer: Upsample, down: Downsample, used: int) -> None:
    """Two frames from their means and half differences. The last channel stays 1."""
    taps = cast(CausalConv3d, down.time_conv).weight[:, :used, 1:, 0, 0]  # [channels, components, earlier and later]
    inverse = torch.linalg.pinv(rearrange(taps, "c s two -> c (two s)").double()).float()  # [2 components, channels]
    conv = cast(CausalConv3d, layer.time_conv)
    inputs = conv.weight.shape[1]
    _zero(conv)
    for half, rows in enumerate(inverse.chunk(2)):
        conv.weight[half * inputs : half * inputs + used, : len(taps), 2, 0, 0] = rows
        conv.bias[(half + 1) * inputs - 1] = 1.0


def _set_doubling_in_space(layer: Upsample, stage: Stage, matrix: Tensor, shift: Tensor) -> None:
    """`matrix` [O, C] (mean + components) + `shift` [O] at each of the 2 x 2 positions.

    All phases share a bias, so the constants come from the last channel, which is 1.
    """
    phase_weights = cast(Tensor, layer.phase_weights)
    used, outputs = len(stage.components), len(matrix)
    nn.init.zeros_(phase_weights)
    nn.init.zeros_(layer.phase_bias)
    for i in range(2):
        for j in range(2):
            here = phase_weights[i, j, :, :, 1 - i, 1 - j]  # the tap at the pixel itself
            here[:outputs, :used] = matrix @ stage.components[:, :, i, j].T
            here[:outputs, -1] = matrix @ stage.mean[:, i, j] + shift
    layer.phase_bias[-1] = 1.0


def _standardize_branches(vae: VAE, samples: Sequence[Sample]) -> None:
    """Scales and shifts what the first convolution of every residual branch gives to zero mean and unit variance.

    The constant channels are common to all pixels. A branch that mostly sees them first learns to add constants, which
    breaks the start.
    """
    pixels = [unshuffle(sample.frames, vae.config.patch) for sample in samples]
    latents = [encode_clips(vae, sample.frames) for sample in samples]
    for first, layers, clips in (
        (vae.encoder.conv1, (*vae.encoder.downsamples, *vae.encoder.middle), pixels),
        (vae.decoder.conv1, (*vae.decoder.middle, *vae.decoder.upsamples), latents),
    ):
        clips = [causal(first, x) for x in clips]
        for layer in layers:
            if isinstance(layer, ResidualBlock):
                norm, conv = cast(RMSNorm, layer.residual["0"]), cast(CausalConv3d, layer.residual["2"])
                rows = torch.cat([causal(conv, norm_silu(norm, x))[0].flatten(1) for x in clips], 1)
                deviation = rows.std(1)
                conv.bias.copy_((conv.bias - rows.mean(1)) / deviation)
                conv.weight.div_(deviation.view(-1, 1, 1, 1, 1))
            clips = [run_layers((layer,), x) for x in clips]
