"""The video VAE of Wan2.1, for streaming: pixels <-> latents that are 4 x 8 x 8 times smaller, one step at a time.

The first frame of a clip is one latent frame, and every further four frames are one more. Every layer is causal in
time, so a clip is encoded or decoded step by step. What a step needs of earlier frames is its *state*: nested tuples of
*caches*, which are the last input frames of a convolution in time. The state is None at the start of a clip.

A step overwrites the state that it is given, because the decoder's caches take 1.6 GB at full size. So a state can be
used once, and is lost if the step fails: copy it to continue from it twice. A state made under
`torch.inference_mode()` can only be used there.

After its step a convolution copies its last input frames into its cache. After `VAE.pair_caches` the decoder's norms
write them there instead, to the second of two buffers (`PastPair`). That moves half the bytes, and takes as much
memory again. It is for GPUs whose table in kernels/tuned/ names it (`writes_past_frames`); none does, as no GPU has run
it.

With `rows`, a rank encodes or decodes its slab of the rows only (model/parallel/rows.py). A convolution that looks at
other rows then has two caches: of the slab, and of the strip around its edges, which is always copied.

State-dict keys and shapes are the official ones. Tensors are [frame, channel, row, column] in channels-last memory, in
the dtype of the parameters; norms and SiLU are computed in float32 or wider. In the shapes below, T is the number of
frames that a layer gets in one step, H x W the size of its input or of a picture, and h x w that of a latent, which is
H x W over `spatial_stride`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.causal_conv3d import causal_conv3d, causal_conv3d_norm, conv3d, quantize_conv_weight
from kernels.chunk_attention import chunk_attention
from kernels.common import FP8
from kernels.resample_conv2d import downsample_conv2d, fold_upsampling, upsample_conv2d
from kernels.rms_norm_silu import fp8_out_scale, rms_norm_silu, tail_is_tuned
from model.config import Config, VAEConfig
from model.parallel.rows import RowSplit

LATENTS_PER_STEP = 2  # decoded in one step once the first frames are out: fewer and larger launches

State: TypeAlias = tuple[Any, ...]  # of caches, which are tensors, and of further such tuples
# The last input frames of a convolution, as a tensor or a `PastPair`; None at the start of a clip; a pair for a slab.
Cache: TypeAlias = Any


class PastPair(NamedTuple):
    """The cache of a convolution whose input frames are kept by the norm that makes them; the two take turns."""

    past: Tensor | None  # what the next step reads; None at the start of a clip
    spare: Tensor  # where the norm of that step writes what the step after it reads


class CausalConv3d(nn.Module):
    """Causal convolution with a kernel of kt x k x k. Its cache is its last kt - 1 input frames."""

    def __init__(self, in_channels: int, out_channels: int, kt: int, k: int) -> None:
        super().__init__()
        bound = (in_channels * kt * k * k) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kt, k, k).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))
        self.in_scale: float | None = None  # in FP8: what its e4m3 input is multiplied by
        self.paired = False  # whether its cache is a `PastPair`
        self.register_buffer("scale", None, persistent=False)  # in FP8: [out channels], undoes all scales

    def quantize(self, in_scale: float) -> None:
        """Makes the weight e4m3. From now on the input must be e4m3, too, and multiplied by `in_scale`."""
        self.weight.data, self.scale = quantize_conv_weight(self.weight.data, in_scale)
        self.in_scale = in_scale

    def forward(
        self, x: Tensor, cache: Cache, residual: Tensor | None = None, rows: RowSplit | None = None
    ) -> tuple[Tensor, Cache]:
        """x [T, C, H, W], cache [kt - 1, C, H, W] -> y [T, O, H, W], plus the residual if any, and the next cache.

        The cache is updated in place. With `rows` there are two of them.
        """

        def convolve(x: Tensor, past: Tensor | None, residual: Tensor | None, _tail: None) -> Tensor:
            return causal_conv3d(x, self.weight, self.bias, past, residual, self.scale)

        return self._run(convolve, x, cache, residual, None, rows)

    def forward_norm(
        self,
        x: Tensor,
        cache: Cache,
        gamma: Tensor,
        out_scale: float | None,
        tail: Tensor | None = None,
        rows: RowSplit | None = None,
    ) -> tuple[Tensor, Cache]:
        """`forward`, then RMS norm and SiLU; the result is e4m3 and multiplied by `out_scale` if there is one.

        `tail`, if there is one, gets the last frames of the result as well.
        """

        def convolve(x: Tensor, past: Tensor | None, _residual: None, tail: Tensor | None) -> Tensor:
            return causal_conv3d_norm(x, self.weight, self.bias, gamma, past, self.scale, out_scale, tail)

        return self._run(convolve, x, cache, None, tail, rows)

    def _run(
        self,
        convolve: Callable[[Tensor, Tensor | None, Any, Any], Tensor],
        x: Tensor,
        cache: Cache,
        residual: Tensor | None,
        tail: Tensor | None,
        rows: RowSplit | None,
    ) -> tuple[Tensor, Cache]:
        """`convolve`, a function of input, past, residual and tail, on the whole picture or on a slab and its strip."""
        if rows is None:
            return convolve(x, _past(cache), residual, tail), self.update_cache(x, cache)
        slab, edges = cache or (None, None)
        halo = rows.start_halo(x)
        y = convolve(x, _past(slab), residual, tail)
        strip = rows.strip(x, halo)
        right = convolve(strip, edges, None if residual is None else rows.repeat_edges(residual), None)
        rows.replace_edges(y, right)
        if tail is not None:
            rows.replace_edges(tail, right[-len(tail) :])
        return y, (self.update_cache(x, slab), self.update_cache(strip, edges))

    def open_cache(self, cache: Cache, x: Tensor, rows: RowSplit | None) -> tuple[Tensor | None, Cache]:
        """The tail for the norm that makes the input, and the cache that the convolution takes after it.

        x [T, any, H, W] has the input's frames, rows and columns. Without `paired` there is no tail. In a step of fewer
        than kt - 1 frames, the tail has no more either, and the frames before them are copied.
        """
        if not self.paired:
            return None, cache
        slab, edges = (cache, None) if rows is None else cache or (None, None)
        pair = slab or PastPair(None, self._buffer(x).zero_())
        keep = len(pair.spare)
        written = min(len(x), keep)
        if pair.past is not None and written < keep:
            pair.spare[: keep - written] = pair.past[written:]
        return pair.spare[keep - written :], pair if rows is None else (pair, edges)

    def _buffer(self, x: Tensor) -> Tensor:
        """Memory for kt - 1 input frames of the rows and columns of x."""
        (_, channels, kt, _, _), (*_, rows, columns) = self.weight.shape, x.shape
        dtype = x.dtype if self.in_scale is None else FP8
        return x.new_empty(kt - 1, rows, columns, channels, dtype=dtype).permute(0, 3, 1, 2)

    def update_cache(self, x: Tensor, cache: Tensor | PastPair | None) -> Tensor | PastPair:
        """The cache after the input x. Overwrites `cache`, or makes one at the start of a clip.

        Of a pair the other buffer is next: the norm that made x has written it.
        """
        if isinstance(cache, PastPair):
            return PastPair(cache.spare, self._buffer(x) if cache.past is None else cache.past)
        keep = self.weight.shape[2] - 1
        if cache is None:
            return torch.cat([_zeros(max(0, keep - len(x)), x), x[-keep:]])
        return cache.copy_(x[-keep:] if len(x) >= keep else torch.cat([cache[len(x) :], x]))


class RMSNorm(nn.Module):
    """RMS norm of a pixel's C channels: y = x / max(||x||, 1e-12) * sqrt(C) * gamma."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C, H, W] -> y [T, C, H, W]."""
        return rms_norm_silu(x, self.gamma, silu=False)


class Head(nn.ModuleDict):
    """The last layers of encoder and decoder: norm, SiLU, causal 3 x 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__({"0": RMSNorm(in_channels), "2": CausalConv3d(in_channels, out_channels, 3, 3)})

    def forward(self, x: Tensor, cache: Cache, emit: bool = True, rows: RowSplit | None = None) -> tuple[Tensor, Cache]:
        """x [T, C, H, W], cache [2, C, H, W] -> y [T, O, H, W], or [0, O, H, W] without `emit`, and the next cache."""
        norm, conv = cast(RMSNorm, self["0"]), cast(CausalConv3d, self["2"])
        tail, cache = conv.open_cache(cache, x, rows)
        x = rms_norm_silu(x, norm.gamma, True, None, tail)
        if emit:
            return conv(x, cache, rows=rows)
        nothing = x.new_empty(0, len(conv.weight), *x.shape[2:])
        if rows is None:
            return nothing, conv.update_cache(x, cache)
        slab, edges = cache or (None, None)
        strip = rows.strip(x, rows.start_halo(x))
        return nothing, (conv.update_cache(x, slab), conv.update_cache(strip, edges))

    def pair_caches(self) -> None:
        """Makes the norm keep the convolution's past frames."""
        cast(CausalConv3d, self["2"]).paired = True


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal 3 x 3 x 3 convolution, twice; plus the input, or a 1 x 1 x 1 convolution of it."""

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
        """Makes both 3 x 3 x 3 convolutions compute in FP8."""
        for norm, conv in zip(*self._layers(), strict=True):
            conv.quantize(fp8_out_scale(norm.gamma))

    def pair_caches(self) -> None:
        """Makes both norms keep the past frames of the convolutions after them."""
        for conv in self._layers()[1]:
            conv.paired = True

    def forward(self, x: Tensor, state: State | None, rows: RowSplit | None = None) -> tuple[Tensor, State]:
        """x [T, C, H, W], state of two caches -> y [T, O, H, W], next state."""
        cache1, cache2 = state or (None, None)
        (norm1, norm2), (conv1, conv2) = self._layers()
        (tail1, cache1), (tail2, cache2) = conv1.open_cache(cache1, x, rows), conv2.open_cache(cache2, x, rows)
        y = rms_norm_silu(x, norm1.gamma, True, conv1.in_scale, tail1)
        y, cache1 = conv1.forward_norm(y, cache1, norm2.gamma, conv2.in_scale, tail2, rows)
        residual = x if self.shortcut is None else conv3d(x, self.shortcut.weight, self.shortcut.bias)
        y, cache2 = conv2(y, cache2, residual, rows)
        return y, (cache1, cache2)

    def _layers(self) -> tuple[tuple[RMSNorm, ...], tuple[CausalConv3d, ...]]:
        """The two norms, and the two convolutions that follow them."""
        norms, convolutions = (self.residual[name] for name in "03"), (self.residual[name] for name in "26")
        return tuple(cast(RMSNorm, norm) for norm in norms), tuple(cast(CausalConv3d, conv) for conv in convolutions)


class AttentionBlock(nn.Module):
    """Self-attention among the pixels of each frame, with one head that has all channels; plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        x: Tensor,
        state: State | None,  # noqa: ARG002
        rows: RowSplit | None = None,
    ) -> tuple[Tensor, State]:
        """x [T, C, H, W] -> y [T, C, H, W]. `state` is unused; it keeps the layer interface uniform."""
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)[:, :, None]  # [T, H * W, 1, 3 * C]
        q, k, v = qkv.chunk(3, dim=-1)
        if rows is not None:  # a slab's pixels attend to those of the whole frame
            k, v = rows.gather(qkv[..., x.shape[1] :], axis=1).chunk(2, dim=-1)
        y = chunk_attention(q, k, v)  # [T, H * W, 1, C]
        y = y[:, :, 0].unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return self.proj(y).add_(x), ()


class Downsample(nn.Module):
    """Halves rows and columns, with zero padding right and below only, and then, if `temporal`, frames.

    In time, the first frame of a clip passes unchanged, and output j >= 1 is a convolution of frames 2j - 2, 2j - 1 and
    2j. The state is the last frame.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, 3, 1) if temporal else None

    def forward(self, x: Tensor, state: State | None, rows: RowSplit | None = None) -> tuple[Tensor, State]:
        """x [T, C, H, W] -> y [T or ceil(T / 2), C, H // 2, W // 2], next state."""
        x = self._halve(x) if rows is None else rows.with_halo_below(self._halve, x)
        if self.time_conv is None:
            return x, ()
        if state is None:
            return x, (x,)
        y = conv3d(torch.cat([state[0], x]), self.time_conv.weight, self.time_conv.bias, stride=2)
        return y, (x[-1:].clone(),)

    def _halve(self, x: Tensor) -> Tensor:
        """Halves rows and columns: x [T, C, H, W] -> y [T, C, H // 2, W // 2]."""
        convolution = cast(nn.Conv2d, self.resample[1])
        return downsample_conv2d(x, convolution.weight, cast(Tensor, convolution.bias))


class Upsample(nn.Module):
    """Doubles frames, if `temporal`, and then rows and columns; halves the channels.

    In time, the first frame of a clip passes unchanged and does not enter the cache. Each later frame becomes two, by a
    causal convolution with 2 C output channels, whose first C are the earlier frame. The second frame of a clip sees
    zeros as the frames before it.

    In space, the official form is a nearest doubling and a 3 x 3 convolution, which `fold_upsampling` turns into four
    2 x 2 convolutions, one for each phase (parity of the output's row and column). With `phases` those four are the
    parameters, [2, 2, C / 2, C, 2, 2]. They can express more, such as giving each phase channels of its own.
    """

    def __init__(self, channels: int, temporal: bool, phases: bool = False) -> None:
        super().__init__()
        self.time_conv = CausalConv3d(channels, 2 * channels, 3, 1) if temporal else None
        if phases:
            bound = (4 * channels) ** -0.5
            weight = torch.empty(2, 2, channels // 2, channels, 2, 2).uniform_(-bound, bound)
            self.phase_weights = nn.Parameter(weight)
            self.phase_bias = nn.Parameter(torch.zeros(channels // 2))
        else:
            convolution = nn.Conv2d(channels, channels // 2, 3, padding=1)
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), convolution)
            self.register_buffer("phase_weights", None, persistent=False)

    def prepare_weights(self) -> None:
        """Folds the doubling of rows and columns into the convolution after it."""
        if self.phase_weights is None:
            self.phase_weights = fold_upsampling(cast(nn.Conv2d, self.resample[1]).weight)

    def forward(self, x: Tensor, state: State | None, rows: RowSplit | None = None) -> tuple[Tensor, State]:
        """x [T, C, H, W] -> y [T or, after the first step, 2 T, C / 2, 2 H, 2 W], next state."""

        def double(x: Tensor) -> Tensor:
            return self._double(x) if rows is None else rows.with_halo(self._double, x)

        if self.time_conv is None:
            return double(x), ()
        if state is None:
            return double(x), (_zeros(2, x),)
        y, cache = self.time_conv(x, state[0])
        y = rearrange(y, "t (two c) h w -> (t two) h w c", two=2).contiguous()
        return double(y.permute(0, 3, 1, 2)), (cache,)

    def _double(self, x: Tensor) -> Tensor:
        """Doubles rows and columns: x [T, C, H, W] -> y [T, C / 2, 2 H, 2 W]."""
        if self.phase_weights is None:
            return self.resample(x).contiguous(memory_format=torch.channels_last)  # it is not where H = W = 1
        bias = self.phase_bias if isinstance(self.phase_weights, nn.Parameter) else self.resample[1].bias
        return upsample_conv2d(x, self.phase_weights, cast(Tensor, bias))


class DecodeStep(NamedTuple):
    """Latent frames of a clip that are decoded in one step, and the pixel frames that they become."""

    latents: slice
    frames: slice
    emit: bool  # whether any of the frames is needed


def decode_schedule(latents: int, warmup_frames: int, stride: int) -> Iterator[DecodeStep]:
    """The steps in which a clip is decoded.

    Steps have one latent until the first frame that is needed is out, so that it is out early, and then
    `LATENTS_PER_STEP`.

    Args:
        latents: latent frames of the clip.
        warmup_frames: frames at the beginning of the clip that are not needed.
        stride: frames per latent frame, other than the first one, which is a single frame.
    """
    done = end = 0
    while done < latents:
        count = min(LATENTS_PER_STEP if end > warmup_frames else 1, latents - done)
        start, end = end, end + (stride * count if done else 1)
        yield DecodeStep(slice(done, done + count), slice(start, end), end > warmup_frames)
        done += count


class Encoder(nn.Module):
    """Pixels -> mean and log-variance of the latent, before the last 1 x 1 x 1 convolution, which is `VAE.conv1`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * mult for mult in (1, *config.dim_mult)]
        self.patch = config.patch
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0], 3, 3)
        self.downsamples = nn.ModuleList()
        for level, width in enumerate(widths[1:]):
            for block in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(width if block else widths[level], width))
            if level < len(config.temperal_downsample):
                self.downsamples.append(Downsample(width, config.temperal_downsample[level]))
        self.middle = _middle(widths[-1])
        self.head = Head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, state: State | None, rows: RowSplit | None = None) -> tuple[Tensor, State]:
        """Pixels [1 or stride, 3, H, W] -> [1, 2 z, h, w], next state."""
        if self.patch > 1:
            x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        return _run_layers((self.conv1, *self.downsamples, *self.middle, self.head), x, state, rows)


class Decoder(nn.Module):
    """Latents, after the first 1 x 1 x 1 convolution, which is `VAE.conv2` -> pixels, not yet clamped."""

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
                self.upsamples.append(Upsample(width, temporal, config.phases))
            inputs = width // 2
        self.head = Head(widths[-1], 3 * config.patch**2)
        self.patch = config.patch
        self.stride = config.temporal_stride
        doubling = (i for i, layer in enumerate(self.upsamples) if isinstance(layer, Upsample) and layer.time_conv)
        self.num_batched = 2 + len(self.middle) + max(doubling, default=-1)  # layers up to the last that doubles frames

    def forward(
        self, x: Tensor, state: State | None, emit: bool = True, rows: RowSplit | None = None
    ) -> tuple[Tensor, State]:
        """Latents [n, z, h, w] -> frames, and the next state.

        Frames are [1, 3, H, W] at the start of a clip, then [temporal_stride n, 3, H, W]; [0, 3, H, W] without `emit`.
        The first `num_batched` layers process all latents at once, the others the frames of one latent after another,
        because frames are large there.
        """
        layers = (self.conv1, *self.middle, *self.upsamples)
        *states, cache = state or (None,)
        x, batched_states = _run_layers(layers[: self.num_batched], x, tuple(states[: self.num_batched]), rows)
        large_states, frames = tuple(states[self.num_batched :]), []
        for part in x.split(len(x) if state is None else self.stride):
            y, large_states = _run_layers(layers[self.num_batched :], part, large_states, rows)
            y, cache = self.head(y, cache, emit, rows)
            frames.append(y)
        x = frames[0] if len(frames) == 1 else torch.cat(frames)
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x, (*batched_states, *large_states, cache)


class VAE(nn.Module):
    """Encoder and decoder with the official parameters, for inference only."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1, 1)
        self.decoder = Decoder(config)
        self.paired = False  # whether `pair_caches` was called
        self._statistics_cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.requires_grad_(False)  # or a state would hold the graph of its whole clip

    def prepare_weights(self) -> None:
        """Prepares the weights for fast convolutions: channels-last memory, and up-sampling folded in.

        To be called once, after loading. Results and state-dict stay the same, but for rounding.
        """
        for weight in self.parameters():
            if weight.ndim in (4, 5):
                last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
                weight.data = weight.data.contiguous(memory_format=last)
        for module in self.decoder.upsamples:
            if isinstance(module, Upsample):
                module.prepare_weights()

    def quantize(self, levels: Collection[int]) -> None:
        """Makes the residual blocks of these levels of the decoder compute in FP8. Level 0 has the latent's size."""
        level = 0
        for module in self.decoder.upsamples:
            if isinstance(module, Upsample):
                level += 1
            elif level in levels:
                cast(ResidualBlock, module).quantize()

    def pair_caches(self) -> None:
        """Makes the decoder's norms keep the past frames of the convolutions after them, in states yet to come.

        Results stay the same. The encoder copies: a chunk's clip has two steps there, and nothing reads the last state.
        """
        for module in self.decoder.modules():
            if isinstance(module, ResidualBlock | Head):
                module.pair_caches()
        self.paired = True

    def encode_step(
        self, frames: Tensor, state: State | None = None, rows: RowSplit | None = None
    ) -> tuple[Tensor, State]:
        """Encodes the frames of one latent frame.

        Args:
            frames: RGB in [-1, 1], [1, 3, H, W] at the start of a clip and [temporal_stride, 3, H, W] after it, in any
                memory format and the parameters' dtype. H and W are multiples of spatial_stride.
            state: None at the start of a clip, or what the step before returned. It is overwritten.
            rows: if given, `frames` are this rank's slab, and so is the result.

        Returns:
            The latent frame [1, z, h, w], which is the normalised mean, and the next state.

        Raises:
            ValueError: an argument has another shape or dtype.
        """
        count, stride = 1 if state is None else self.config.temporal_stride, self.config.spatial_stride
        wrong = frames.ndim != 4 or frames.shape[:2] != (count, 3) or not frames.numel()
        if wrong or frames.shape[2] % stride or frames.shape[3] % stride:
            raise ValueError(
                f"frames: shape {list(frames.shape)}, wanted [{count}, 3, height, width], multiples of {stride}"
            )
        self._check_dtype("frames", frames)
        x, next_state = self.encoder(frames.contiguous(memory_format=torch.channels_last), state, rows)
        z = self.config.z_dim
        mean = conv3d(x, self.conv1.weight[:z], self.conv1.bias[:z])  # the other half would be the log-variance
        shift, scale = self._statistics()
        return (mean - shift) * scale, next_state

    def decode_step(
        self, latent: Tensor, state: State | None = None, emit: bool = True, rows: RowSplit | None = None
    ) -> tuple[Tensor, State]:
        """Decodes the next latent frame, or the next few, to pixel frames.

        Args:
            latent: [n, z, h, w], normalised, in any memory format and the parameters' dtype; n is 1 at the start of a
                clip. Several latents together take fewer and larger launches.
            state: None at the start of a clip, or what the step before returned. It is overwritten.
            emit: whether the frames are needed. Without them the last convolution is skipped.
            rows: if given, `latent` is this rank's slab, and so are the frames.

        Returns:
            RGB frames clamped to [-1, 1], and the next state. Frames are [1, 3, H, W] at the start of a clip,
            [n temporal_stride, 3, H, W] after it, and [0, 3, H, W] without `emit`.

        Raises:
            ValueError: an argument has another shape or dtype.
        """
        fits = state is not None or len(latent) == 1
        if latent.ndim != 4 or latent.shape[1] != self.config.z_dim or not latent.numel() or not fits:
            raise ValueError(f"latent: shape {list(latent.shape)}, wanted [1, {self.config.z_dim}, rows, columns]")
        self._check_dtype("latent", latent)
        shift, scale = self._statistics()
        x = (latent / scale + shift).contiguous(memory_format=torch.channels_last)
        frames, next_state = self.decoder(conv3d(x, self.conv2.weight, self.conv2.bias), state, emit, rows)
        return frames.clamp_(-1, 1), next_state

    def encode(self, frames: Tensor, rows: RowSplit | None = None) -> Iterator[Tensor]:
        """Encodes a whole clip of RGB frames in [-1, 1], [1 + temporal_stride * k, 3, H, W].

        Yields each normalised latent frame [1, z, h, w]. With `rows`, both are this rank's slab. Raises ValueError for
        another shape or dtype.
        """
        stride = self.config.temporal_stride
        if len(frames) % stride != 1 % stride:
            raise ValueError(f"frames: {len(frames)} of them, wanted 1 + a multiple of {stride}")
        state = None
        for end in range(1, len(frames) + 1, stride):
            latent, state = self.encode_step(frames[max(0, end - stride) : end], state, rows)
            yield latent

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decodes a whole clip of normalised latent frames [F, z, h, w], one by one.

        Yields the RGB frames of each, clamped to [-1, 1]: first [1, 3, H, W], then [temporal_stride, 3, H, W].
        Raises ValueError for another shape or dtype.
        """
        state = None
        for latent in latents.split(1):
            frames, state = self.decode_step(latent, state)
            yield frames

    def _check_dtype(self, name: str, x: Tensor) -> None:
        if x.dtype != self.conv1.weight.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, wanted the parameters', {self.conv1.weight.dtype}")

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation of a latent, [z, 1, 1], each rounded to the parameters' dtype.

        They are made once for a device and dtype, because copying them to a GPU synchronises with it.
        """
        like = self.conv1.bias
        key = (like.device, like.dtype)
        if key not in self._statistics_cache:
            shift, deviation = like.new_tensor(self.config.latent_mean), like.new_tensor(self.config.latent_std)
            self._statistics_cache[key] = shift.view(-1, 1, 1), deviation.reciprocal().view(-1, 1, 1)
        return self._statistics_cache[key]


def writes_past_frames(config: Config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a VAE in this dtype on this device is to have its caches in pairs: where that was measured to be faster.

    What decides is the decoder's last level, where most bytes are.
    """
    vae, chunk = config.vae, config.chunk
    rows, columns = (size // vae.patch for size in (chunk.height, chunk.width))
    return tail_is_tuned(vae.temporal_stride, vae.dim, rows, columns, dtype, device)


def _past(cache: Tensor | PastPair | None) -> Tensor | None:
    """The past frames in a cache."""
    return cache.past if isinstance(cache, PastPair) else cache


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def _run_layers(
    layers: Sequence[nn.Module], x: Tensor, state: State | None, rows: RowSplit | None
) -> tuple[Tensor, State]:
    """Runs layers one after another. The state is the tuple of the layers' states."""
    next_state = []
    for layer, layer_state in zip(layers, state or (None,) * len(layers), strict=True):
        x, new_state = layer(x, layer_state, rows=rows)
        next_state.append(new_state)
    return x, tuple(next_state)


def _zeros(frames: int, like: Tensor) -> Tensor:
    """Zero frames [frames, C, H, W] for x `like` [T, C, H, W], in channels-last memory."""
    _, channels, rows, columns = like.shape
    return like.new_zeros(frames, rows, columns, channels).permute(0, 3, 1, 2)
