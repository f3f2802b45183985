"""The video VAE of Wan2.1: pixels <-> latents, 4 x 8 x 8 times smaller, streaming with its state passed in and out.

The first frame of a clip makes one latent frame, every further four frames one more, and back. All is causal in time,
so a clip is coded step by step, and what a step must know of the frames before it is its *state*: nested tuples of the
last input frames of every convolution in time, None at the start of a clip. At full size those of the decoder are
1.6 GB, so a step writes the next state over the one that it gets, which is spent, also by a step that fails: to go on
from it twice, copy it. One made under `torch.inference_mode()` stays there. Shapes below are of one step: T frames in,
and T varies by layer.

State-dict keys and shapes are the official ones. Tensors are [frame, channel, row, column] in channels-last memory, in
the dtype of the parameters; norms and SiLU are computed in float32 or wider.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels.causal_conv3d import causal_conv3d, conv3d, quantize_conv
from kernels.chunk_attention import chunk_attention
from kernels.resample_conv2d import downsample_conv2d, fold_upsampling, upsample_conv2d
from kernels.rms_norm_silu import fp8_out_scale, rms_norm_silu
from model.config import VAEConfig

TOGETHER = 2  # latents decoded in one step, once frames are on their way: larger launches, less often

State: TypeAlias = tuple[Any, ...]  # of tensors and further such tuples


class CausalConv3d(nn.Module):
    """Causal convolution of kernel kt x k x k; its state is its last kt - 1 input frames."""

    def __init__(self, in_channels: int, out_channels: int, kt: int, k: int) -> None:
        super().__init__()
        bound = (in_channels * kt * k * k) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kt, k, k).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))
        self.factor: float | None = None  # of the e4m3 input that the norm before it makes, once it is quantised
        self.register_buffer("scale", None, persistent=False)  # [out channels], then: undoes all factors

    def quantize(self, factor: float) -> None:
        """From now on e4m3 weights, each output channel by its largest, and e4m3 inputs that are `factor` too large."""
        self.weight.data, self.scale = quantize_conv(self.weight.data, factor)
        self.factor = factor

    def forward(
        self,
        x: Tensor,
        past: Tensor | None,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        factor: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [T, C, H, W], past [kt - 1, C, H, W] -> y [T, O, H, W], with the residual if there is one, next past.

        With gamma, and a factor or none, y is the input of a next convolution: see `causal_conv3d`. The next past lies
        where the one before lay.
        """
        y = causal_conv3d(x, self.weight, self.bias, past, residual, self.scale, gamma, factor)
        return y, self.follow(x, past)

    def follow(self, x: Tensor, past: Tensor | None) -> Tensor:
        """The next past alone."""
        keep = self.weight.shape[2] - 1
        if past is None:
            return torch.cat([_zeros(max(0, keep - len(x)), x), x[-keep:]])
        return past.copy_(x[-keep:] if len(x) >= keep else torch.cat([past[len(x) :], x]))


class RMSNorm(nn.Module):
    """y = x / max(||x||, 1e-12) * sqrt(C) * gamma, with the norm over a pixel's C channels."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        """A fresh tensor like x [T, C, H, W]."""
        return rms_norm_silu(x, self.gamma, silu=False)


class Head(nn.ModuleDict):
    """Norm, SiLU, causal 3 x 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__({"0": RMSNorm(in_channels), "2": CausalConv3d(in_channels, out_channels, 3, 3)})

    def forward(self, x: Tensor, past: Tensor | None, shown: bool = True) -> tuple[Tensor, Tensor]:
        """x [T, C, H, W], past [2, C, H, W] -> y [T, O, H, W], next past. Not shown, y are no frames [0, O, H, W]."""
        norm, conv = cast(RMSNorm, self["0"]), cast(CausalConv3d, self["2"])
        x = rms_norm_silu(x, norm.gamma)
        return conv(x, past) if shown else (x[:0, : len(conv.weight)], conv.follow(x, past))


class ResidualBlock(nn.Module):
    """Twice (norm, SiLU, causal 3 x 3 x 3 convolution), plus the input or a 1 x 1 x 1 convolution of it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels, 3, 3),
                "3": RMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels, 3, 3),
            }
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1, 1) if in_channels != out_channels else None

    def quantize(self) -> None:
        """From now on both convolutions in FP8."""
        for norm, conv in zip(*self._layers(), strict=True):
            conv.quantize(fp8_out_scale(norm.gamma))

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """x [T, C, H, W], state of two pasts -> y [T, O, H, W], next state."""
        past1, past2 = state or (None, None)
        (norm1, norm2), (conv1, conv2) = self._layers()
        y = rms_norm_silu(x, norm1.gamma, out_scale=conv1.factor)
        y, past1 = conv1(y, past1, None, norm2.gamma, conv2.factor)
        residual = x if self.shortcut is None else conv3d(x, self.shortcut.weight, self.shortcut.bias)
        y, past2 = conv2(y, past2, residual)
        return y, (past1, past2)

    def _layers(self) -> tuple[tuple[RMSNorm, ...], tuple[CausalConv3d, ...]]:
        """The two norms, and the convolutions behind them."""
        norms, convolutions = (self.residual[name] for name in "03"), (self.residual[name] for name in "26")
        return tuple(cast(RMSNorm, norm) for norm in norms), tuple(cast(CausalConv3d, conv) for conv in convolutions)


class AttentionBlock(nn.Module):
    """Self-attention among the pixels of each frame, with one head of all channels, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:  # noqa: ARG002
        """x [T, C, H, W] -> y [T, C, H, W]; the state, there because all layers have one, is empty."""
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)[:, :, None]  # [T, H * W, 1, 3 * C]
        q, k, v = qkv.chunk(3, dim=-1)
        y = chunk_attention(q, k, v)  # [T, H * W, 1, C]
        y = y[:, :, 0].unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return self.proj(y).add_(x), ()


class Downsample(nn.Module):
    """Halves rows and columns (zero padding right and below only), then, if `temporal`, frames.

    In time the clip's first frame passes as it is; output j >= 1 is a convolution of frames 2j - 2, 2j - 1, 2j. The
    state is the last frame.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, 3, 1) if temporal else None

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """x [T, C, H, W] -> y [T or ceil(T / 2), C, H // 2, W // 2], next state."""
        convolution = cast(nn.Conv2d, self.resample[1])
        x = downsample_conv2d(x, convolution.weight, cast(Tensor, convolution.bias))
        if self.time_conv is None:
            return x, ()
        if state is None:
            return x, (x,)
        y = conv3d(torch.cat([state[0], x]), self.time_conv.weight, self.time_conv.bias, stride=2)
        return y, (x[-1:].clone(),)


class Upsample(nn.Module):
    """Doubles frames, if `temporal`, then rows and columns (nearest), halving the channels.

    In time the clip's first frame passes as it is and leaves nothing behind. From the second on, each gives two frames
    by a causal convolution that has zeros as its past at that second frame: channels 0 .. C - 1 are the earlier one.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, 3, 1) if temporal else None
        self.register_buffer("phases", None, persistent=False)  # of the second step's convolution, once it is folded

    def fold(self) -> None:
        """From now on without the doubled image."""
        self.phases = fold_upsampling(cast(nn.Conv2d, self.resample[1]).weight)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """x [T, C, H, W] -> y [T or, after the first step, 2 T, C / 2, 2 H, 2 W], next state."""
        if self.time_conv is None:
            return self._double(x), ()
        if state is None:
            return self._double(x), (_zeros(2, x),)
        y, past = self.time_conv(x, state[0])
        y = rearrange(y, "t (two c) h w -> (t two) h w c", two=2).contiguous()
        return self._double(y.permute(0, 3, 1, 2)), (past,)

    def _double(self, x: Tensor) -> Tensor:
        if self.phases is None:
            return self.resample(x).contiguous(memory_format=torch.channels_last)  # it is not where H = W = 1
        return upsample_conv2d(x, self.phases, cast(Tensor, self.resample[1].bias))


class Group(NamedTuple):
    """Latent frames of a clip that are decoded in one step, and the frames that come of them."""

    latents: slice
    frames: slice
    shown: bool


def decode_groups(latents: int, unseen: int, stride: int) -> Iterator[Group]:
    """How a clip of so many latents is decoded, `stride` frames each but for the first one's single frame.

    One by one until there is something beyond the first `unseen` frames, which nobody looks at, so that it comes early;
    then `TOGETHER` at a time.
    """
    done = end = 0
    while done < latents:
        count = min(TOGETHER if end > unseen else 1, latents - done)
        begin, end = end, end + (stride * count if done else 1)
        yield Group(slice(done, done + count), slice(begin, end), end > unseen)
        done += count


class Encoder(nn.Module):
    """Pixels -> mean and log-variance of the latent, up to the last 1 x 1 x 1 convolution (`VAE.conv1`)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * mult for mult in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], 3, 3)
        self.downsamples = nn.ModuleList()
        for level, width in enumerate(widths[1:]):
            for block in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(width if block else widths[level], width))
            if level < len(config.temperal_downsample):
                self.downsamples.append(Downsample(width, config.temperal_downsample[level]))
        self.middle = _middle(widths[-1])
        self.head = Head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Pixels [1 or 4, 3, H, W] -> [1, 2 z, H / 8, W / 8], next state."""
        return _run((self.conv1, *self.downsamples, *self.middle, self.head), x, state)


class Decoder(nn.Module):
    """Latents, after the first 1 x 1 x 1 convolution (`VAE.conv2`) -> pixels, not yet clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * mult for mult in reversed(config.dim_mult)]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3, 3)
        self.middle = _middle(widths[0])
        self.upsamples = nn.ModuleList()
        inputs = widths[0]
        for width, temporal in zip(widths, (*reversed(config.temperal_downsample), None), strict=True):
            for block in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(width if block else inputs, width))
            if temporal is not None:
                self.upsamples.append(Upsample(width, temporal))
            inputs = width // 2
        self.head = Head(widths[-1], 3)
        self.stride = config.temporal_stride
        doubling = (i for i, layer in enumerate(self.upsamples) if isinstance(layer, Upsample) and layer.time_conv)
        self.cut = 2 + len(self.middle) + max(doubling, default=-1)  # layers up to the last that doubles frames

    def forward(self, x: Tensor, state: State | None, shown: bool = True) -> tuple[Tensor, State]:
        """Latents [n, z, h, w] -> [n times 4, or 1, 3, 8 h, 8 w], or no frames if they are not to be shown; next state.

        From the last doubling of frames on, where they are large, one latent's go through after another's.
        """
        layers = (self.conv1, *self.middle, *self.upsamples)
        *before, past = state or (None,)
        x, small = _run(layers[: self.cut], x, tuple(before[: self.cut]))
        large, frames = tuple(before[self.cut :]), []
        for part in x.split(len(x) if state is None else self.stride):
            y, large = _run(layers[self.cut :], part, large)
            y, past = self.head(y, past, shown)
            frames.append(y)
        return frames[0] if len(frames) == 1 else torch.cat(frames), (*small, *large, past)


class VAE(nn.Module):
    """Encoder and decoder with the official parameters, for inference only."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1, 1)
        self.decoder = Decoder(config)
        self._made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.requires_grad_(False)  # or a state would hold the graph of its whole clip

    def lay_out(self) -> None:
        """Weights as convolutions want them, once and for all: in channels-last memory, and up-sampling folded in."""
        for weight in self.parameters():
            if weight.ndim in (4, 5):
                last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
                weight.data = weight.data.contiguous(memory_format=last)
        for module in self.decoder.upsamples:
            if isinstance(module, Upsample):
                module.fold()

    def quantize(self, levels: Collection[int]) -> None:
        """From now on the residual blocks of these levels of the decoder, 0 being the latent's, multiply in FP8."""
        level = 0
        for module in self.decoder.upsamples:
            if isinstance(module, Upsample):
                level += 1
            elif level in levels:
                cast(ResidualBlock, module).quantize()

    def encode_step(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next latent frame (mean, normalised) and the state after it.

        frames [1, 3, H, W] at the start of a clip, where `state` is None, [temporal_stride, 3, H, W] after it; RGB in
        [-1, 1], H and W multiples of spatial_stride, any memory format. The latent is [1, z, H / 8, W / 8].
        Raises ValueError for another shape or dtype than the parameters'.
        """
        count, stride = 1 if state is None else self.config.temporal_stride, self.config.spatial_stride
        wrong = frames.ndim != 4 or frames.shape[:2] != (count, 3) or not frames.numel()
        if wrong or frames.shape[2] % stride or frames.shape[3] % stride:
            raise ValueError(
                f"frames: shape {list(frames.shape)}, wanted [{count}, 3, height, width], multiples of {stride}"
            )
        self._check_dtype("frames", frames)
        x, after = self.encoder(frames.contiguous(memory_format=torch.channels_last), state)
        z = self.config.z_dim
        mean = conv3d(x, self.conv1.weight[:z], self.conv1.bias[:z])  # the other half would be the log-variance
        shift, scale = self._statistics()
        return (mean - shift) * scale, after

    def decode_step(self, latent: Tensor, state: State | None = None, shown: bool = True) -> tuple[Tensor, State]:
        """The next pixel frames and the state after them.

        latent [1, z, h, w], normalised, any memory format; the frames are [1, 3, 8 h, 8 w] at the start of a clip,
        where `state` is None, [temporal_stride, 3, 8 h, 8 w] after it; RGB clamped to [-1, 1]. After the start several
        latents may come together: as many times the frames, in fewer and larger launches. Frames that are not to be
        `shown` are spared the last convolution, and left out: [0, 3, 8 h, 8 w].
        Raises ValueError for another shape or dtype than the parameters'.
        """
        fits = state is not None or len(latent) == 1
        if latent.ndim != 4 or latent.shape[1] != self.config.z_dim or not latent.numel() or not fits:
            raise ValueError(f"latent: shape {list(latent.shape)}, wanted [1, {self.config.z_dim}, rows, columns]")
        self._check_dtype("latent", latent)
        shift, scale = self._statistics()
        x = (latent / scale + shift).contiguous(memory_format=torch.channels_last)
        frames, after = self.decoder(conv3d(x, self.conv2.weight, self.conv2.bias), state, shown)
        return frames.clamp_(-1, 1), after

    def encode(self, frames: Tensor) -> Iterator[Tensor]:
        """Each latent frame [1, z, H / 8, W / 8] of a clip [1 + temporal_stride * k, 3, H, W], as in `encode_step`."""
        stride = self.config.temporal_stride
        if len(frames) % stride != 1 % stride:
            raise ValueError(f"frames: {len(frames)} of them, wanted 1 + a multiple of {stride}")
        state = None
        for end in range(1, len(frames) + 1, stride):
            latent, state = self.encode_step(frames[max(0, end - stride) : end], state)
            yield latent

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """The pixel frames of each latent frame of a clip [F, z, h, w], as in `decode_step`."""
        state = None
        for latent in latents.split(1):
            frames, state = self.decode_step(latent, state)
            yield frames

    def _check_dtype(self, name: str, x: Tensor) -> None:
        if x.dtype != self.conv1.weight.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, wanted the parameters', {self.conv1.weight.dtype}")

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation of a latent, [z, 1, 1], each rounded to the dtype of the parameters.

        Made once for a device and dtype: a copy to a GPU waits for it.
        """
        like = self.conv1.bias
        place = (like.device, like.dtype)
        if place not in self._made:
            shift, deviation = like.new_tensor(self.config.latent_mean), like.new_tensor(self.config.latent_std)
            self._made[place] = shift.view(-1, 1, 1), deviation.reciprocal().view(-1, 1, 1)
        return self._made[place]


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def _run(layers: Iterable[nn.Module], x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """All layers one after the other; the state is the tuple of theirs."""
    layers = tuple(layers)
    after = []
    for layer, before in zip(layers, state or (None,) * len(layers), strict=True):
        x, new = layer(x, before)
        after.append(new)
    return x, tuple(after)


def _zeros(frames: int, like: Tensor) -> Tensor:
    """Zero frames [frames, C, H, W] for x `like` [T, C, H, W], in channels-last memory."""
    _, channels, rows, columns = like.shape
    return like.new_zeros(frames, rows, columns, channels).permute(0, 3, 1, 2)
