"""The student: SoulX-FlashTalk's 14B diffusion transformer.

One call predicts the velocity (noise minus data) of a whole chunk. Tokens are 2 x 2 latent patches of all latent
frames, S = frames x rows x columns of them, in this order. Every token attends to every other; there is no causal
structure inside a chunk. There is no batch axis: one chunk of one session is computed at a time.

Inputs that do not change between steps are computed beforehand, by these methods and functions:

    once per prompt and portrait   ContextKV    `embed_context`   keys and values of text and image, all blocks
    once per chunk                 AudioKV      `embed_audio`     keys and values of the audio tokens, all blocks
    once per timestep              Modulation   `modulate`        shift, scale and gate of all blocks and the head
    once per geometry              Tensor       `rope_table`      cosines and sines of the 3-D rotary embedding

Parameters have the names and shapes of the official checkpoint, except that projections of the same input are
concatenated (`DiT.param_map`). Matrix products are in the parameters' dtype or in 8 bits (`DiT.quantize`,
`DiT.use_fp8_attention`); norms, rotation, modulation, gated residuals and the head are in float32. Attention, linear
layers and the operations around them come from kernels/, which runs PyTorch on a CPU and its own kernels on a GPU.

With a `TokenSplit` (model/parallel/tokens.py), a rank computes a range of the tokens. Ranks meet in self-attention, and
at the end, where the velocity is gathered.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.absorbed_audio_attention import absorb_audio_projections, absorbed_audio_attention
from kernels.chunk_attention import chunk_attention
from kernels.chunk_attention_fp8 import chunk_attention_fp8
from kernels.frame_attention import frame_attention
from kernels.layer_norm import layer_norm, layer_norm_modulate
from kernels.rms_norm_rope import key_scale, rms_norm_rope, rms_norm_rope_fp8
from kernels.text_image_attention import text_image_attention
from model.config import DiTConfig, FP8Policy, INT8Policy
from model.linear import DTYPES, Linear, QuantizedRows, norm_for_linear, norm_modulate_for_linear
from model.offload import on_device
from model.parallel.tokens import FP8Operands, TokenSplit
from model.param_map import ParamMapping, joined_map


class ContextKV(NamedTuple):
    """Keys and values of the text and image attention of all blocks, each [block, key, head, head_dim].

    `num_text_tokens` int32 [1]: the text keys from this one on are padding. They are all equal, and are computed as one
    key with a weight.
    """

    text_k: Tensor
    text_v: Tensor
    image_k: Tensor
    image_v: Tensor
    num_text_tokens: Tensor


class AudioKV(NamedTuple):
    """Keys and values of the audio attention of all blocks, each [block, latent frame, key, head, head_dim]."""

    k: Tensor
    v: Tensor


class Modulation(NamedTuple):
    """Modulation vectors of one timestep, float32.

    `blocks` [block, 6, D]: shift, scale and gate of self-attention, then of the feed-forward. `head` [2, D]: shift and
    scale.
    """

    blocks: Tensor
    head: Tensor


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of the rotary angles of every token, float32 [S, head_dim / 2, 2], from float64 angles.

    `grid` is (latent frames, rows, columns) of tokens. Of the c = head_dim / 2 channel pairs, c - 2 (c // 3) rotate by
    the latent frame, c // 3 by the row and c // 3 by the column of a token. Pair j of an axis with n pairs rotates by
    the angle position x 10000^(-j / n). Positions start at 0 in every chunk.
    """
    third = head_dim // 2 // 3
    axes = []
    for length, pairs in zip(grid, (head_dim // 2 - 2 * third, third, third), strict=True):
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        axes.append(torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies))
    frames, rows, columns = axes
    angles = torch.cat(
        [
            frames[:, None, None].expand(*grid, -1),
            rows[None, :, None].expand(*grid, -1),
            columns[None, None, :].expand(*grid, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs: (a, b) -> (a cos - b sin, a sin + b cos), in float32.

    x [..., token, head, head_dim], table [token, head_dim / 2, 2]; the result has x's shape and dtype.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def run_in_float32(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Applies the layers in turn, linear ones in float32 whatever dtype their parameters are stored in.

    Used for the modulation, a few rows that affect every token, and for the head.
    """
    for layer in layers:
        x = F.linear(x, layer.weight.float(), layer.bias.float()) if isinstance(layer, nn.Linear) else layer(x)
    return x


def resize_masks(masks: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Speaker masks at the patches of one latent frame: masks [3, height, width] -> float32 [3, rows x columns].

    The masks are those of person 1, person 2 and background. Nearest-neighbour interpolation, then > 0.
    """
    return (F.interpolate(masks[None].float(), size=grid[1:])[0] > 0).float().flatten(1)


def speaker_positions(
    q: Tensor, k: Tensor, masks: Tensor, config: DiTConfig, split: TokenSplit | None = None
) -> Tensor:
    """Position of each token on the audio position axis, float32 [S]: near speaker 1, near speaker 2, or in the middle.

    q and k [S, head, head_dim] are the rotated queries and keys of self-attention; masks [3, n] are over the n tokens
    of latent frame 0. A token's affinity to a region is the softmax weight that it gives to the region's keys in frame
    0, averaged over heads and divided by the number of the region's tokens. The region with the largest affinity is
    chosen. A speaker's affinity, rescaled to 0..1 by its range over all tokens, becomes a position in the interval at
    that speaker's end of the axis. The background is at the middle of the axis. With `split`, q, k and the result are
    of this rank's tokens.
    """
    first = k[: masks.shape[1]] if split is None else split.gather_first(k, masks.shape[1])
    # The official code averages over two halves of floor(heads / 2) heads, so an odd number leaves out the last head.
    heads = 2 * (q.shape[1] // 2)
    affinity = torch.zeros(q.shape[0], 3, device=q.device)
    for h in range(heads):
        weights = (q[:, h].float() @ first[:, h].float().T / math.sqrt(q.shape[2])).softmax(-1)
        affinity += weights @ masks.T / heads
    affinity = affinity / masks.sum(1)
    speakers = affinity[:, :2]
    low, high = (speakers.amin(0), speakers.amax(0)) if split is None else split.extremes(speakers)
    offsets = torch.tensor([0.0, config.class_range - config.class_interval], device=q.device)
    positions = (speakers - low) / (high - low + 1e-8) * config.class_interval + offsets
    background = torch.full_like(positions[:, :1], config.class_range / 2)
    return torch.cat((positions, background), 1).gather(1, affinity.argmax(1, keepdim=True))[:, 0]


def audio_rope(positions: Tensor, head_dim: int) -> Tensor:
    """Rotary table float32 [n, head_dim / 2, 2] of real-valued positions [n]."""
    frequencies = 1 / 10000.0 ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = torch.outer(positions.float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


class SelfAttention(nn.Module):
    """Full self-attention among the tokens of a chunk. q and k are RMS-normalised over all channels, then rotated."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv, self.o = Linear(config.dim, 3 * config.dim), Linear(config.dim, config.dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(config.dim, config.eps) for _ in range(2))
        self.k_scale: Tensor | None = None  # scale of FP8 keys; None: attention in the parameters' dtype

    def forward(
        self,
        h: Tensor | QuantizedRows,
        x: Tensor,
        gate: Tensor,
        rope: Tensor,
        two_speakers: bool,
        split: TokenSplit | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention with gated residual; returns x + gate * output [n, D], rotated q and k [S, head, head_dim].

        h [S, D] are the normalised tokens; x [n, D] is the residual stream of the last n tokens, the only ones with
        queries. In FP8, q and k are dequantised only for two speakers, who need them for `speaker_positions`. With
        `split`, the tokens are this rank's, n = S, and they attend to those of all ranks.
        """
        q, k, v = self.qkv(h).unflatten(1, (3, self.heads, -1)).unbind(1)
        kv_only = len(q) - len(x)
        q_weight, k_weight = self.norm_q.weight, self.norm_k.weight
        if self.k_scale is None:
            q, k = rms_norm_rope(q, k, q_weight, k_weight, rope, self.eps)
            attended = chunk_attention(q[kv_only:], k, v) if split is None else split.attend(q, k, v)
        else:
            statistics = None if split is None else split.kv_statistics(k, v, k_weight, rope, self.eps)
            operands = rms_norm_rope_fp8(q, k, v, q_weight, k_weight, self.k_scale, rope, self.eps, statistics)
            q, q_scale, k, k_scale, v, v_scale = operands
            if split is None:
                attended = chunk_attention_fp8(q[kv_only:], q_scale[kv_only:], k, k_scale, v, v_scale, dtype=x.dtype)
            else:
                attended = split.attend_fp8(FP8Operands(*operands), x.dtype)
            if two_speakers:
                q, k = q.float() * q_scale[..., None], k.float() * k_scale[:, None]
        return self.o(attended.flatten(1), gate=gate, residual=x), q, k


class CrossAttention(nn.Module):
    """Attention to text and to image: one query, two separate softmaxes, their results added before the projection."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.o = (Linear(config.dim, config.dim) for _ in range(2))
        self.kv, self.kv_img = (Linear(config.dim, 2 * config.dim) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_k_img = (nn.RMSNorm(config.dim, config.eps) for _ in range(3))

    def context_modules(self) -> dict[str, nn.Module]:
        """The modules that only `embed` uses."""
        return {name: getattr(self, name) for name in ("kv", "kv_img", "norm_k", "norm_k_img")}

    def embed(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of text and image in this block, each [key, head, head_dim].

        text [text_len, D] and image [img_tokens, D] are embedded features.
        """
        (text_k, text_v), (image_k, image_v) = self.kv(text).chunk(2, 1), self.kv_img(image).chunk(2, 1)
        kv = (self.norm_k(text_k), text_v, self.norm_k_img(image_k), image_v)
        text_k, text_v, image_k, image_v = (x.unflatten(-1, (self.heads, -1)) for x in kv)
        return text_k, text_v, image_k, image_v

    def forward(self, h: Tensor | QuantizedRows, x: Tensor, context: ContextKV) -> Tensor:
        """h and x [S, D] -> x + output [S, D]. The text's padding is attended to as well, as in training."""
        q = self.norm_q(self.q(h)).unflatten(-1, (self.heads, -1))
        return self.o(text_image_attention(q, *context).flatten(1), residual=x)


class AudioAttention(nn.Module):
    """Attention of each latent frame's tokens to its audio tokens; no norm, and rotation only for two speakers."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.q_linear, self.proj = Linear(config.dim, config.dim), Linear(config.dim, config.dim)
        self.kv_linear = nn.Linear(config.output_dim, 2 * config.dim)

    def embed(self, tokens: Tensor) -> AudioKV:
        """Keys and values [frame, speaker x context_tokens, head, head_dim] of audio tokens.

        tokens [speaker, frame, context_tokens, output_dim]. The keys of two speakers are rotated to the middle of the
        speaker's interval on the audio position axis.
        """
        config, speakers, per_speaker = self.config, tokens.shape[0], tokens.shape[2]
        tokens = rearrange(tokens, "p f n c -> f (p n) c")
        k, v = self.kv_linear(tokens).unflatten(-1, (2, config.num_heads, -1)).unbind(-3)
        if speakers == 2:
            center = config.class_interval / 2
            centers = torch.tensor([center, config.class_range - center], device=k.device)
            k = rotate(k, audio_rope(centers.repeat_interleave(per_speaker), config.head_dim))
        return AudioKV(k, v)

    def forward(
        self, h: Tensor, x: Tensor, audio: AudioKV, tokens_per_frame: int, first_token: int, positions: Tensor | None
    ) -> Tensor:
        """h and x [n, D] -> x + output [n, D].

        Args:
            h: normalised tokens, never quantised.
            x: the residual stream.
            audio: keys and values of this block.
            tokens_per_frame: tokens of one latent frame.
            first_token: index of the first of the n tokens in the chunk.
            positions: with two speakers, the tokens' positions [n] on the audio position axis; None with one speaker.

        With one speaker, the query and output projections are absorbed into keys and values (the weight absorption of
        DeepSeek's MLA). This takes a third of the operations and is exact but for rounding. The projections' weights
        may be e4m3.
        """
        k, v = audio
        before, after = self.q_linear, self.proj
        if positions is None:
            scales = (layer.weight_scale if layer.fp8 else None for layer in (before, after))
            keys, bias, values = absorb_audio_projections(k, v, before.weight, before.bias, after.weight, *scales)
            # One expression, which frees the attention's output before the last addition.
            return x + (
                absorbed_audio_attention(h, keys, bias, values, k.shape[1], tokens_per_frame, first_token) + after.bias
            )
        q = before(h).unflatten(-1, (self.config.num_heads, -1))
        q = rotate(q, audio_rope(positions, self.config.head_dim))
        return after(frame_attention(q, k, v, tokens_per_frame, first_token).flatten(1), residual=x)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-GELU between them. In FP8, the hidden activations are e4m3 as well."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.up, self.down = Linear(config.dim, config.ffn_dim), Linear(config.ffn_dim, config.dim)

    def forward(self, h: Tensor | QuantizedRows, x: Tensor, gate: Tensor) -> Tensor:
        """h and x [S, D] -> x + gate * output [S, D]."""
        if isinstance(h, QuantizedRows) and self.up.fp8 and self.down.fp8:
            hidden = self.up.forward_quantized(h, gelu=True)
        else:
            hidden = self.up(h, gelu=True)
        return self.down(hidden, gate=gate, residual=x)


class Block(nn.Module):
    """Self-attention, text and image attention, audio attention, feed-forward.

    Self-attention and feed-forward are modulated and gated.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm_x = nn.LayerNorm(config.dim, config.eps)
        self.audio_cross_attn = AudioAttention(config)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        context: ContextKV,
        audio: AudioKV,
        masks: Tensor | None,
        kv_only_tokens: int = 0,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """x [S, D] -> [S - kv_only_tokens, D].

        `modulation` [6, D], `context` and `audio` are those of this block. The first `kv_only_tokens` tokens serve only
        as keys and values of self-attention and are left out of the output. With `split`, the tokens are this rank's
        and the audio is that of the frames that they belong to.
        """
        eps, first_token, tokens_per_frame = self.config.eps, kv_only_tokens, len(x) // len(audio.k)
        if split is not None:
            tokens_per_frame = split.tokens_per_frame
            first_token = split.start - split.frames.start * tokens_per_frame
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = norm_modulate_for_linear(x, shift1, scale1, eps, self.self_attn.qkv)
        x, q, k = self.self_attn(h, x[kv_only_tokens:], gate1, rope, masks is not None, split)
        x = self.cross_attn(norm_for_linear(x, self.norm3, self.cross_attn.q), x, context)
        positions = None if masks is None else speaker_positions(q, k, masks, self.config, split)[kv_only_tokens:]
        h = layer_norm(x, self.norm_x.weight, self.norm_x.bias, eps)
        x = self.audio_cross_attn(h, x, audio, tokens_per_frame, first_token, positions)
        return self.ffn(norm_modulate_for_linear(x, shift2, scale2, eps, self.ffn.up), x, gate2)


class Head(nn.Module):
    """Modulated norm and projection of every token to its patch, in float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [S, D], modulation [2, D] -> float32 [S, patch rows x patch columns x out_dim], channels fastest."""
        return run_in_float32([self.head], layer_norm_modulate(x.float(), modulation[0], modulation[1], self.eps))


class AudioProjector(nn.Module):
    """Audio windows -> audio tokens, by an MLP with separate first layers for the first and the later latent frames."""

    def __init__(self, window: int, later_window: int, features: int, hidden: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj1 = nn.Linear(window * features, hidden)
        self.proj1_vf = nn.Linear(later_window * features, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, first: Tensor, later: Tensor) -> Tensor:
        """Audio tokens [P, 1 + n, tokens, dim] of P speakers and 1 + n latent frames.

        `first` [P, 1, window, layer, channel] and `later` [P, n, later window, layer, channel] are from `group_audio`.
        """
        x = torch.cat((self.proj1(first.flatten(2)), self.proj1_vf(later.flatten(2))), dim=1).relu()
        return self.norm(self.proj3(self.proj2(x).relu()).unflatten(-1, (self.tokens, -1)))


def group_audio(audio: Tensor, frames_per_latent: int) -> tuple[Tensor, Tensor]:
    """Groups the windows of video frames [P, frame, window, layer, channel] by latent frame: the first and the rest.

    Latent frame 0 gets the window of video frame 0: [P, 1, window, layer, channel]. A later latent frame covers
    `frames_per_latent` video frames and gets these with window // 2 neighbours on either side: [P, n, window +
    frames_per_latent - 1, layer, channel]. They are the first frame's window up to its centre, the centres of the
    frames between, and the last frame's window from its centre on.
    """
    groups = audio[:, 1:].unflatten(1, (-1, frames_per_latent))  # [P, n, frame in group, window, layer, channel]
    centre = audio.shape[2] // 2
    parts = (groups[:, :, 0, : centre + 1], groups[:, :, 1:-1, centre], groups[:, :, -1, centre:])
    return audio[:, :1], torch.cat(parts, dim=2)


class ImageEmbedding(nn.Module):
    """Embeds image features: exact GELU and norms with eps 1e-5, unlike the rest of the student."""

    def __init__(self, img_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(img_dim), nn.Linear(img_dim, img_dim), nn.GELU(), nn.Linear(img_dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [img_tokens, img_dim] -> [img_tokens, D]."""
        return self.proj(x)


# {our layer of a block: the official layers whose rows it concatenates, in this order}
LAYER_TO_OFFICIAL: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.kv_img": ("cross_attn.k_img", "cross_attn.v_img"),
    "ffn.up": ("ffn.0",),
    "ffn.down": ("ffn.2",),
}


class DiT(nn.Module):
    """The diffusion transformer. `embed_context`, `embed_audio`, `modulate` and `rope_table` prepare its inputs."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.img_emb = ImageEmbedding(config.img_dim, dim)
        self.audio_proj = AudioProjector(
            config.audio_window,
            config.audio_window + config.vae_scale - 1,
            config.audio_blocks * config.audio_channels,
            config.intermediate_dim,
            config.context_tokens,
            config.output_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters that are not quantised."""
        return self.patch_embedding.weight.dtype

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def param_map(self) -> dict[str, ParamMapping]:
        """The map of the official checkpoint's tensors to the parameters of this module."""
        return joined_map(self, LAYER_TO_OFFICIAL)

    def quantize(self, policy: FP8Policy | INT8Policy) -> None:
        """Converts the `Linear` layers that `policy` names to 8 bits and makes the others use the fused kernel."""
        for name, layer in self.named_modules():
            if isinstance(layer, Linear):
                if any(fnmatch.fnmatch(name, pattern) for pattern in policy.layers):
                    layer.quantize(DTYPES[policy.format])
                else:
                    layer.fuse()

    def offloadable_modules(self) -> dict[str, nn.Module]:
        """Modules that only `embed_context` and `modulate` use, by name: a quarter of the parameters.

        They may be in host memory. These two methods copy them to the device while they are needed.
        """
        found = {
            name: getattr(self, name) for name in ("text_embedding", "img_emb", "time_embedding", "time_projection")
        }
        for i, block in enumerate(self._blocks):
            found |= {f"blocks.{i}.cross_attn.{name}": x for name, x in block.cross_attn.context_modules().items()}
        return found

    def use_fp8_attention(self) -> None:
        """Makes self-attention multiply in FP8 from now on. It is faster; its output differs by about 5 %."""
        for block in self._blocks:
            attention = block.self_attn
            attention.k_scale = key_scale(attention.norm_k.weight.detach(), attention.heads)

    def embed_context(self, text: Tensor, image: Tensor) -> ContextKV:
        """Keys and values of prompt and portrait for all blocks.

        text [L, text_dim]: features of the L <= text_len tokens of the prompt; image [img_tokens, img_dim]. The text is
        padded with zero rows to text_len *before* it is embedded, and the padding is attended to like other keys, as in
        the official code. Raises `ValueError` for other shapes.
        """
        config = self.config
        if text.ndim != 2 or text.shape[1] != config.text_dim or not 0 < text.shape[0] <= config.text_len:
            raise ValueError(f"text: got {list(text.shape)}, want [1..{config.text_len}, {config.text_dim}]")
        if image.shape != (config.img_tokens, config.img_dim):
            raise ValueError(f"image: got {list(image.shape)}, want [{config.img_tokens}, {config.img_dim}]")
        padded = F.pad(text.to(self.dtype), (0, 0, 0, config.text_len - text.shape[0]))
        with on_device(padded.device, self.text_embedding, self.img_emb):
            embedded, image = self.text_embedding(padded), self.img_emb(image.to(self.dtype))
        blocks = []
        for attention in (block.cross_attn for block in self._blocks):
            with on_device(padded.device, *attention.context_modules().values()):
                blocks.append(attention.embed(embedded, image))
        num_text_tokens = torch.tensor([len(text)], dtype=torch.int32, device=image.device)
        return ContextKV(*(torch.stack(x) for x in zip(*blocks, strict=True)), num_text_tokens=num_text_tokens)

    def embed_audio(self, audio: Tensor, split: TokenSplit | None = None) -> AudioKV:
        """Keys and values of a chunk's audio windows [speaker, video frame, window, layer, channel] for all blocks.

        With `split`, of those latent frames only that the rank's tokens belong to. Raises `ValueError` for another
        shape, or another number of speakers than one or two.
        """
        config = self.config
        want = (config.audio_window, config.audio_blocks, config.audio_channels)
        if audio.ndim != 5 or audio.shape[2:] != want or audio.shape[0] not in (1, 2):
            raise ValueError(f"audio: got {list(audio.shape)}, want [1 or 2, frames, {', '.join(map(str, want))}]")
        tokens = self.audio_proj(*group_audio(audio.to(self.dtype), config.vae_scale))
        if split is not None:
            tokens = tokens[:, split.frames]
        blocks = [block.audio_cross_attn.embed(tokens) for block in self._blocks]
        return AudioKV(*(torch.stack(x) for x in zip(*blocks, strict=True)))

    def modulate(self, t: float) -> Modulation:
        """The modulation at timestep t in 0..1000.

        e = W2 silu(W1 s(t) + b1) + b2, where s(t) is the sinusoid (cosines first) of t * 10000^(-i / 128), in float64.
        Every block adds its table to the six vectors W silu(e) + b. The head adds its two vectors to e itself.
        """
        half = self.config.freq_dim // 2
        device = self.patch_embedding.weight.device
        angles = t * 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        sinusoid = torch.cat((angles.cos(), angles.sin())).float()
        with on_device(device, self.time_embedding, self.time_projection):
            e = run_in_float32(self.time_embedding, sinusoid)
            e0 = run_in_float32(self.time_projection, e).unflatten(0, (6, -1))
        blocks = torch.stack([block.modulation[0].float() + e0 for block in self._blocks])
        return Modulation(blocks, self.head.modulation[0].float() + e)

    def forward(
        self,
        latent: Tensor,
        condition: Tensor,
        modulation: Modulation,
        rope: Tensor,
        context: ContextKV,
        audio: AudioKV,
        masks: Tensor | None = None,
        num_motion_latents: int = 0,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """The velocity of a chunk at one timestep, float32 [F, out_dim, h, w].

        Args:
            latent: noisy latents [F, 16, h, w].
            condition: mask and condition latents [F, 4 + 16, h, w]; they follow the latents on the channel axis.
            modulation: of the timestep, from `modulate`.
            rope: `rope_table` of the token grid (F, h / 2, w / 2).
            context: from `embed_context`.
            audio: of the chunk, from `embed_audio`.
            masks: with two speakers, `resize_masks` of their regions, float32 [3, tokens per latent frame].
            num_motion_latents: number of motion latents at the beginning. Their velocity is not needed and
                returned as 0, so the last block computes only keys and values for their tokens.
            split: if given, this rank computes its range of the tokens only, and `audio` is that of their frames. The
                other arguments and the result are whole, on every rank.

        Raises `ValueError` if `rope` has another number of tokens, or if there are masks without two speakers or two
        speakers without masks.
        """
        _, p, q = self.config.patch_size
        frames, _, rows, columns = latent.shape
        if rope.shape[0] != frames * (rows // p) * (columns // q):
            raise ValueError(f"rope: got {rope.shape[0]} tokens, want the patches of a latent {list(latent.shape)}")
        if (masks is None) != (audio.k.shape[2] == self.config.context_tokens):
            raise ValueError("masks: wanted if and only if there are two speakers")
        motion_tokens = num_motion_latents * len(rope) // frames
        x = torch.cat((latent.to(self.dtype), condition.to(self.dtype)), dim=1)
        x = rearrange(x, "f c (h p) (w q) -> (f h w) (c p q)", p=p, q=q)
        if split is not None:
            x, rope = x[split.start : split.end], rope[split.start : split.end]
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        for i, block in enumerate(self._blocks):
            keys_values = (y[i] for y in (context.text_k, context.text_v, context.image_k, context.image_v))
            block_context = ContextKV(*keys_values, num_text_tokens=context.num_text_tokens)
            block_audio = AudioKV(audio.k[i], audio.v[i])
            # Among several ranks, motion tokens are those of the first ones, and the others would not be done earlier.
            kv_only_tokens = motion_tokens if split is None and i == len(self._blocks) - 1 else 0
            x = block(x, modulation.blocks[i], rope, block_context, block_audio, masks, kv_only_tokens, split)
        x = self.head(x, modulation.head)
        x = x if split is None else split.gather(x)[motion_tokens:]
        x = F.pad(x, (0, 0, motion_tokens, 0))
        return rearrange(x, "(f h w) (p q c) -> f c (h p) (w q)", f=frames, h=rows // p, p=p, q=q)
