"""The linear codec inside the video VAE: weights in closed form, so that training starts at a good picture.

A random VAE needs hours to reach what a principal component analysis (PCA) reaches in seconds, and a linear map treats
a photograph as well as a drawing. The VAE can hold such a map almost exactly:

residual branches   end in a convolution of zeros, so a block passes on its input, or its shortcut's linear map of it.
down-sampling       A 3 x 3 convolution of stride 2 turns 2 x 2 positions into their principal components. Then two
                    frames become their mean, and the weakest means give way to the strongest half differences. The
                    first frame of a clip has no partner: it keeps its components.
up-sampling         Phases (`VAEConfig.phases`) give each of the 2 x 2 positions channels of its own.
RMS norm and SiLU   stand in the last layer of the encoder and of the decoder. One channel, the *anchor*, is so large
                    that it alone determines the norm, and the other channels lie around the point where SiLU is
                    straightest.

The encoder is fitted from the pixels upwards. The decoder is fitted from the latents downwards: each convolution is the
ridge regression of what the encoder had at this place on what the decoder has there. Its taps see neighbours in space
and time, which makes it better than the transpose of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.distill.codec_network import double_in_space, double_in_time, encode_clips, norm_silu, run_layers, unshuffle
from model.vae import VAE, AttentionBlock, CausalConv3d, Downsample, ResidualBlock, RMSNorm, Upsample

ANCHOR = 300.0  # a constant channel so large that the norm of a pixel's channels varies by 0.1 % only
BEND = 2.3994  # the zero of SiLU's second derivative
PIXEL_GAIN = 0.5  # of pixels in [-1, 1] around BEND, before the decoder's last layer
LATENT_GAIN = 0.15  # of latents with unit variance around BEND, before the encoder's last layer
POSITIONS = 20_000  # of a clip, at most, that enter a regression


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
class Level:
    """What a clip is at one level of the encoder: after down-sampling in space, and then in time."""

    space: Features
    time: Features


@torch.no_grad()
def start_at_linear_codec(vae: VAE, samples: Sequence[Sample], ridge: float = 1e-5) -> Tensor:
    """Sets all weights of `vae` to the linear codec that is fitted to `samples`. Returns its latents' deviation [z].

    Every level of the VAE must halve frames, rows and columns, with `phases` and one residual block a level. The
    configuration's latent_mean and latent_std must be 0 and 1. The latents of the samples get zero mean, and keep the
    scale of the principal components, which is the scale of pixels. `ridge` is relative to the mean square of a
    feature.
    """
    _silence_branches(vae)
    pixels = [_patched(sample, vae.config.patch) for sample in samples]
    _set_matrix(vae.encoder.conv1, torch.eye(pixels[0].values.shape[1]))
    vae.encoder.conv1.bias[-1] = 1.0  # a constant channel keeps the norm of grey pixels away from zero
    levels = _fit_encoder(vae, pixels)
    deviation = _fit_latents(vae, [level.time for level in levels[-1]])
    _fit_decoder(vae, samples, [pixels, *[[level.time for level in one] for one in levels]], levels, ridge)
    return deviation


def _patched(sample: Sample, patch: int) -> Features:
    return Features(unshuffle(sample.frames, patch), _pool(sample.weight, patch))


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


def _fit_encoder(vae: VAE, pixels: list[Features]) -> list[list[Level]]:
    """Fits all down-sampling layers. Returns the features of every clip at every level."""
    clips, levels = pixels, []
    for layer in vae.encoder.downsamples:
        if isinstance(layer, Downsample):
            space = _fit_space(layer, clips)
            clips = _fit_time(layer, space)
            levels.append([Level(s, t) for s, t in zip(space, clips, strict=True)])
    return levels


def _principal(rows: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Weighted mean [C] of all rows [N, C], and their first `count` principal components [C, count], orthonormal."""
    total = sum(float(w.sum()) for w in weights)
    mean = torch.stack([w @ x for x, w in zip(rows, weights, strict=True)]).sum(0) / total
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for x, w in zip(rows, weights, strict=True):
        covariance += ((x - mean).T @ (w[:, None] * (x - mean))).double()
    basis = torch.linalg.eigh(covariance)[1].flip(1)[:, :count].float()
    return mean, basis * basis.sum(0).sign()  # of the two signs, the one with more positive numbers


def _fit_space(layer: Downsample, clips: list[Features]) -> list[Features]:
    """2 x 2 positions [1, C, T, 2 h, 2 w] become their principal components [1, channels, T, h, w]."""
    convolution = cast(nn.Conv2d, layer.resample[1])
    blocks = [rearrange(clip.values, "1 c t (h i) (w j) -> t h w (c i j)", i=2, j=2) for clip in clips]
    weights = [_pool(clip.weight, 2) for clip in clips]
    count = min(len(convolution.weight), blocks[0].shape[-1])
    mean, basis = _principal([x.flatten(0, 2) for x in blocks], [w.flatten() for w in weights], count)
    _zero(convolution)
    convolution.weight[:count, : clips[0].values.shape[1], :2, :2] = rearrange(basis, "(c i j) o -> o c i j", i=2, j=2)
    cast(Tensor, convolution.bias)[:count] = -(mean @ basis)
    reduced = [rearrange((x - mean) @ basis, "t h w c -> 1 c t h w") for x in blocks]
    return [Features(x, w) for x, w in zip(reduced, weights, strict=True)]


def _fit_time(layer: Downsample, clips: list[Features]) -> list[Features]:
    """Two frames become the mean of each channel. The weakest channels take the strongest half differences instead."""
    conv = cast(CausalConv3d, layer.time_conv)
    used, channels = clips[0].values.shape[1], len(conv.weight)
    weights = [(clip.weight[1::2] + clip.weight[2::2]) / 2 for clip in clips]

    def energy(sign: int) -> Tensor:
        pairs = [(clip.values[0, :, 2::2] + sign * clip.values[0, :, 1::2]) / 2 for clip in clips]
        return torch.stack([(w * x.square()).sum((1, 2, 3)) for x, w in zip(pairs, weights, strict=True)]).sum(0)

    means = F.pad(energy(1), (0, channels - used))
    differences = energy(-1)
    taps = torch.zeros(channels, channels, 3)
    taps[range(used), range(used), 1:] = 0.5
    for weak, strong in zip(means.argsort(), differences.argsort(descending=True), strict=False):
        if differences[strong] > means[weak]:
            taps[weak] = 0
            taps[weak, strong] = torch.tensor([0.0, -0.5, 0.5])
    _zero(conv)
    conv.weight.copy_(taps[..., None, None])
    reduced = []
    for clip, weight in zip(clips, weights, strict=True):
        x = F.pad(clip.values, (0, 0, 0, 0, 0, 0, 0, channels - used))
        x = torch.cat([x[:, :, :1], F.conv3d(x, conv.weight, stride=(2, 1, 1))], 2)
        reduced.append(Features(x, torch.cat([clip.weight[:1], weight])))
    return reduced


def _fit_latents(vae: VAE, clips: list[Features]) -> Tensor:
    """The last shortcut makes the principal components, and the head passes them. Returns their deviation [z]."""
    z = vae.config.z_dim
    rows = [rearrange(clip.values, "1 c t h w -> (t h w) c") for clip in clips]
    mean, basis = _principal(rows, [clip.weight.flatten() for clip in clips], z)
    deviation = torch.cat([(x - mean) @ basis for x in rows]).std(0)
    shortcut = next(block.shortcut for block in reversed(vae.encoder.downsamples) if isinstance(block, ResidualBlock))
    matrix = (basis * (LATENT_GAIN / deviation)).T
    _set_matrix(cast(CausalConv3d, shortcut), matrix, BEND - matrix @ mean)
    cast(CausalConv3d, shortcut).bias[z] = ANCHOR
    for module in (*vae.encoder.middle, vae.encoder.head):
        _undo_norms(module, z)
    value, slope = _silu_at_bend()
    gain = deviation / (LATENT_GAIN * slope)
    _set_matrix(cast(CausalConv3d, vae.encoder.head["2"]), torch.diag(gain), -gain * value)
    _set_matrix(vae.conv1, torch.eye(2 * z))
    _set_matrix(vae.conv2, torch.eye(z))
    return deviation


def _silu_at_bend() -> tuple[float, float]:
    """Value and slope of SiLU(x) = x s(x) at BEND: the slope is s + x s (1 - s)."""
    s = torch.sigmoid(torch.tensor(BEND, dtype=torch.float64)).item()
    return BEND * s, s + BEND * s * (1 - s)


def _undo_norms(module: nn.Module, anchor: int) -> None:
    """Gives all norms in `module` gains that undo the division by the norm, which is that of channel `anchor`."""
    for norm in module.modules():
        if isinstance(norm, RMSNorm):
            root = norm.gamma.numel() ** 0.5
            nn.init.constant_(norm.gamma, ANCHOR / root)
            norm.gamma.view(-1)[anchor] = 1 / root  # the anchor itself becomes 1


# --- Decoder --------------------------------------------------------------------------------------------------------


class _Regression:
    """Weighted ridge regression of targets on the neighbourhood of each position of feature maps."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge
        self.generator = torch.Generator().manual_seed(0)
        self.gram, self.moments = torch.zeros(0), torch.zeros(0)

    def add(self, windows: Tensor, targets: Tensor, weight: Tensor) -> None:
        """windows [T, H, W, K] of inputs, targets [1, O, T, H, W], weight [T, H, W]."""
        flat = weight.flatten()
        chosen = torch.randperm(len(flat), generator=self.generator)[:POSITIONS]
        places = torch.unravel_index(chosen, weight.shape)
        x = F.pad(windows[places].double(), (0, 1), value=1.0)
        y = targets[0].permute(1, 2, 3, 0)[places].double()
        weighted = x.T * flat[chosen].double()
        self.gram = weighted @ x + (self.gram if self.gram.numel() else 0)
        self.moments = weighted @ y + (self.moments if self.moments.numel() else 0)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights [O, K] and bias [O]."""
        penalty = self.gram.diagonal()[:-1].mean() * self.ridge
        diagonal = torch.full_like(self.gram.diagonal(), float(penalty))
        diagonal[-1] = 0
        solution = torch.linalg.solve(self.gram + torch.diag(diagonal), self.moments).float()
        return solution[:-1].T, solution[-1]


def _windows(x: Tensor, kt: int, k: int) -> Tensor:
    """The inputs of a causal kt x k x k convolution at each position: [1, C, T, H, W] -> [T, H, W, C kt k k]."""
    padded = F.pad(x, (k // 2, k // 2, k // 2, k // 2, kt - 1, 0))
    view = padded.unfold(2, kt, 1).unfold(3, k, 1).unfold(4, k, 1)  # [1, C, T, H, W, kt, k, k]
    return rearrange(view, "1 c t h w a i j -> t h w (c a i j)")


def _fit_decoder(
    vae: VAE, samples: Sequence[Sample], channels: list[list[Features]], levels: list[list[Level]], ridge: float
) -> None:
    """Fits all convolutions of the decoder. `channels[l]` are the clips' features at level l, pixels first."""
    decoder = vae.decoder
    clips = [encode_clips(vae, sample.frames) for sample in samples]
    _fit_causal(decoder.conv1, clips, channels[-1], ridge)
    decoder.conv1.bias[-1] = 1.0
    clips = [F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), decoder.conv1.weight, decoder.conv1.bias) for x in clips]
    anchor, level = channels[0][0].values.shape[1], len(levels)
    centred = [Features(clip.values * PIXEL_GAIN + BEND, clip.weight) for clip in channels[0]]
    for layer in (*decoder.middle, *decoder.upsamples):
        if isinstance(layer, Upsample):
            level -= 1
            _fit_doubling_in_time(layer, clips, [one.space for one in levels[level]], ridge)
            clips = [double_in_time(layer, x) for x in clips]
            used = levels[level][0].space.values.shape[1]
            _fit_doubling_in_space(layer, clips, used, channels[level] if level else centred, ridge)
            if level == 0:
                layer.phase_bias[anchor] = ANCHOR
            clips = [double_in_space(layer, x) for x in clips]
        else:
            if level == 0:
                _undo_norms(layer, anchor)
            clips = [run_layers((layer,), x) for x in clips]
    _undo_norms(decoder.head, anchor)
    clips = [norm_silu(cast(RMSNorm, decoder.head["0"]), x) for x in clips]
    _fit_causal(cast(CausalConv3d, decoder.head["2"]), [x[:, :anchor] for x in clips], channels[0], ridge)


def _fit_causal(conv: CausalConv3d, clips: list[Tensor], targets: list[Features], ridge: float) -> None:
    """Fits a causal convolution from the clips' channels to the targets'. Its other channels become zero."""
    kt, k = conv.weight.shape[2:4]
    inputs, outputs = clips[0].shape[1], targets[0].values.shape[1]
    regression = _Regression(ridge)
    for x, target in zip(clips, targets, strict=True):
        regression.add(_windows(x, kt, k), target.values, target.weight)
    weight, bias = regression.solve()
    _zero(conv)
    conv.weight[:outputs, :inputs] = weight.view(outputs, inputs, kt, k, k)
    conv.bias[:outputs] = bias


def _fit_doubling_in_time(layer: Upsample, clips: list[Tensor], targets: list[Features], ridge: float) -> None:
    """Fits the two frames that each frame after the first becomes. The last channel stays 1."""
    conv = cast(CausalConv3d, layer.time_conv)
    inputs, used = conv.weight.shape[1], targets[0].values.shape[1]
    _zero(conv)
    for half in range(2):
        regression = _Regression(ridge)
        for x, target in zip(clips, targets, strict=True):
            y, weight = target.values[:, :, 1 + half :: 2], target.weight[1 + half :: 2]
            regression.add(_windows(x[:, :used, 1:], 3, 1), y, weight)
        weight, bias = regression.solve()
        rows = slice(half * inputs, half * inputs + used)
        conv.weight[rows, :used, :, 0, 0] = weight.view(used, used, 3)
        conv.bias[rows] = bias
        conv.bias[(half + 1) * inputs - 1] = 1.0


def _fit_doubling_in_space(
    layer: Upsample, clips: list[Tensor], used: int, targets: list[Features], ridge: float
) -> None:
    """Fits the phases on the first `used` channels. All phases share a bias, so the last channel, 1, is theirs."""
    phase_weights, outputs = cast(Tensor, layer.phase_weights), targets[0].values.shape[1]
    nn.init.zeros_(phase_weights)
    nn.init.zeros_(layer.phase_bias)
    for i in range(2):
        for j in range(2):
            regression = _Regression(ridge)
            for x, target in zip(clips, targets, strict=True):
                windows = _windows(x[:, :used], 1, 3).unflatten(3, (used, 3, 3))[..., i : i + 2, j : j + 2].flatten(3)
                y = target.values[:, :, :, i::2, j::2]
                regression.add(windows, y, target.weight[:, i::2, j::2])
            weight, bias = regression.solve()
            phase_weights[i, j, :outputs, :used] = weight.view(outputs, used, 2, 2)
            phase_weights[i, j, :outputs, -1, 1 - i, 1 - j] = bias
    layer.phase_bias[-1] = 1.0
