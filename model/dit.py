"""The student: SoulX-FlashTalk's 14B diffusion transformer.

One call predicts the velocity (noise minus data) of a whole chunk. Tokens are 2 x 2 latent patches of all latent
frames, S = frames x rows x columns of them, in this order. Every token attends to every other; there is no causal
structure inside a chunk. There is no batch axis: one chunk of one session is computed at a time.

Inputs that do not change between steps are computed beforehand, by these methods and functions:

    once per prompt and portrait   ContextKV    `embed_context`   keys and values of text and image, all blocks
    once per chunk                 AudioKV      `embed_audio`     keys and values of the audio tokens, all blocks
                                   Audio        `absorb_audio`    if there is memory: projections absorbed into these
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

from kernels.layer_norm import layer_norm_modulate
from kernels.rms_norm_rope import key_scale
from model.block import Absorbed, Audio, AudioKV, Block, ContextKV
from model.config import DiTConfig, FP8Policy, INT8Policy
from model.linear import DTYPES, Linear
from model.offload import on_device
from model.parallel.tokens import TokenSplit
from model.param_map import ParamMapping, joined_map


class Modulation(NamedTuple):
    """Modulation vectors of one timestep, float32.

    `blocks` [block, 6, D]: shift, scale and gate of self-attention, then of the feed-forward. `head` [2, D]: shift and
    scale.
    """

    blocks: Tensor
    head: Tensor


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
        *kv, o_bound = (torch.stack(x) for x in zip(*blocks, strict=True))
        num_text_tokens = torch.tensor([len(text)], dtype=torch.int32, device=image.device)
        return ContextKV(*kv, num_text_tokens=num_text_tokens, o_bound=o_bound)

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

    def absorb_audio(self, audio: AudioKV, tokens_per_frame: int) -> Audio:
        """Keys and values with the projections of their layers absorbed into them, for every block.

        `forward` does this itself, block by block, if it is given keys and values. Done beforehand, it is done once a
        chunk instead of once a step, and what it makes for all blocks is in memory together. The keys and values of two
        speakers are returned as they are.
        """
        if self._speakers(audio) == 2:
            return audio
        return tuple(
            block.audio_cross_attn.absorb(AudioKV(k, v), tokens_per_frame)
            for block, k, v in zip(self._blocks, *audio, strict=True)
        )

    def absorbed_bytes(self, frames: int, tokens_per_frame: int) -> int:
        """Bytes of the result of `absorb_audio` for one speaker and `frames` latent frames."""
        return sum(block.audio_cross_attn.absorbed_bytes(frames, tokens_per_frame) for block in self._blocks)

    def _speakers(self, audio: Audio) -> int:
        return audio.k.shape[2] // self.config.context_tokens if isinstance(audio, AudioKV) else 1

    def _audio_of_block(self, audio: Audio, i: int, tokens_per_frame: int) -> AudioKV | Absorbed:
        """What block i is given: the same operands for one speaker, whoever absorbed them, so that it compiles once."""
        if not isinstance(audio, AudioKV):
            return audio[i]
        own = AudioKV(audio.k[i], audio.v[i])
        return own if self._speakers(audio) == 2 else self._blocks[i].audio_cross_attn.absorb(own, tokens_per_frame)

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
        audio: Audio,
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
            audio: of the chunk, from `embed_audio`, or from `absorb_audio` of that.
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
        if (masks is None) != (self._speakers(audio) == 1):
            raise ValueError("masks: wanted if and only if there are two speakers")
        tokens_per_frame = len(rope) // frames
        motion_tokens = num_motion_latents * tokens_per_frame
        x = torch.cat((latent.to(self.dtype), condition.to(self.dtype)), dim=1)
        x = rearrange(x, "f c (h p) (w q) -> (f h w) (c p q)", p=p, q=q)
        if split is not None:
            x, rope = x[split.start : split.end], rope[split.start : split.end]
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        for i, block in enumerate(self._blocks):
            keys_values = (y[i] for y in (context.text_k, context.text_v, context.image_k, context.image_v))
            block_context = ContextKV(*keys_values, num_text_tokens=context.num_text_tokens, o_bound=context.o_bound[i])
            # Among several ranks, motion tokens are those of the first ones, and the others would not be done earlier.
            kv_only_tokens = motion_tokens if split is None and i == len(self._blocks) - 1 else 0
            block_audio = self._audio_of_block(audio, i, tokens_per_frame)
            x = block(x, modulation.blocks[i], rope, block_context, block_audio, masks, kv_only_tokens, split)
            del block_audio  # before the next block's are made
        x = self.head(x, modulation.head)
        x = x if split is None else split.gather(x)[motion_tokens:]
        x = F.pad(x, (0, 0, motion_tokens, 0))
        return rearrange(x, "(f h w) (p q c) -> f c (h p) (w q)", f=frames, h=rows // p, p=p, q=q)
