"""One block of the student: self-attention, attention to text and image, attention to audio, and the feed-forward.

Matrix products are in the parameters' dtype or in 8 bits (model/linear.py); norms, rotation, modulation and gated
residuals are in float32. There is no batch axis: x [S, D] are the tokens of one chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.absorb_audio_projections import absorb_audio_projections
from kernels.absorb_audio_projections_fp8 import AbsorbedFP8, absorb_audio_projections_fp8
from kernels.absorbed_audio_attention import Sizes, absorbed_audio_attention
from kernels.absorbed_audio_attention_fp8 import absorbed_audio_attention_fp8, is_tuned
from kernels.chunk_attention import chunk_attention
from kernels.chunk_attention_fp8 import chunk_attention_fp8, chunk_attention_fp8_quantized
from kernels.frame_attention import frame_attention
from kernels.layer_norm import layer_norm, layer_norm_fp8
from kernels.rms_norm_rope import rms_norm_rope, rms_norm_rope_fp8
from kernels.text_image_attention import (
    text_image_attention,
    text_image_attention_quantized,
    text_image_bound,
)
from model.config import DiTConfig
from model.linear import Linear, QuantizedRows, norm_for_linear, norm_modulate_for_linear
from model.parallel.tokens import FP8Operands, TokenSplit
from model.rope import audio_rope, rotate


class ContextKV(NamedTuple):
    """Keys and values of the text and image attention of all blocks, each [block, key, head, head_dim].

    The keys are multiplied by the weight of the queries' norm. `num_text_tokens` int32 [1]: the text keys from this one
    on are padding. They are all equal, and are computed as one key with a weight. `o_bound` float32 [block]: no output
    of the attention exceeds it.
    """

    text_k: Tensor
    text_v: Tensor
    image_k: Tensor
    image_v: Tensor
    num_text_tokens: Tensor
    o_bound: Tensor


class AudioKV(NamedTuple):
    """Keys and values of the audio attention of all blocks, each [block, latent frame, key, head, head_dim]."""

    k: Tensor
    v: Tensor


class AbsorbedAudio(NamedTuple):
    """One block's audio keys and values with the layer's projections absorbed into them.

    The results of `kernels.absorb_audio_projections`: G [frame, key of a head, D], g and U^T [frame, D, key of a head].
    """

    keys: Tensor
    key_bias: Tensor
    values: Tensor


Absorbed = AbsorbedAudio | AbsorbedFP8
Audio = AudioKV | tuple[Absorbed, ...]  # of a chunk and all blocks


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
            attended = attended.flatten(1)
        else:
            statistics = None if split is None else split.kv_statistics(k, v, k_weight, rope, self.eps)
            operands = FP8Operands(
                *rms_norm_rope_fp8(q, k, v, q_weight, k_weight, self.k_scale, rope, self.eps, statistics)
            )
            attended = self._attend_fp8(operands, kv_only, x.dtype, split)
            q, k = operands.q, operands.k
            if two_speakers:
                q, k = q.float() * operands.q_scale[..., None], k.float() * operands.k_scale[:, None]
        return self.o(attended, gate=gate, residual=x), q, k

    def _attend_fp8(
        self, operands: FP8Operands, kv_only: int, dtype: torch.dtype, split: TokenSplit | None
    ) -> Tensor | QuantizedRows:
        """The output [n, D] of the queries from number `kv_only` on; in e4m3 if the projection after it is in FP8."""
        if split is not None:
            return split.attend_fp8(operands, dtype).flatten(1)
        q, q_scale, k, k_scale, v, v_scale = operands
        q, q_scale = q[kv_only:], q_scale[kv_only:]
        if not self.o.fp8:
            return chunk_attention_fp8(q, q_scale, k, k_scale, v, v_scale, dtype=dtype).flatten(1)
        o, o_scale = chunk_attention_fp8_quantized(q, q_scale, k, k_scale, v, v_scale)
        return QuantizedRows(o.flatten(1), o_scale)


class CrossAttention(nn.Module):
    """Attention to text and to image: one query, two separate softmaxes, their results added before the projection.

    Queries and keys are RMS-normalised over all channels. The weight of the queries' norm is multiplied into the keys,
    once a session, and 1 / rms of a query is a factor of its logits, so that no normalised queries are written.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        self.q, self.o = (Linear(config.dim, config.dim) for _ in range(2))
        self.kv, self.kv_img = (Linear(config.dim, 2 * config.dim) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_k_img = (nn.RMSNorm(config.dim, config.eps) for _ in range(3))

    def context_modules(self) -> dict[str, nn.Module]:
        """The modules that only `embed` uses."""
        return {name: getattr(self, name) for name in ("kv", "kv_img", "norm_q", "norm_k", "norm_k_img")}

    def embed(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `ContextKV` has of this block: keys and values of text and image, and the bound of the output.

        text [text_len, D] and image [img_tokens, D] are embedded features. Keys and values are [key, head, head_dim].
        """
        (text_k, text_v), (image_k, image_v) = self.kv(text).chunk(2, 1), self.kv_img(image).chunk(2, 1)
        kv = (self._norm_key(text_k, self.norm_k), text_v, self._norm_key(image_k, self.norm_k_img), image_v)
        text_k, text_v, image_k, image_v = (x.unflatten(-1, (self.heads, -1)) for x in kv)
        return text_k, text_v, image_k, image_v, text_image_bound(text_v, image_v)

    def _norm_key(self, k: Tensor, norm: nn.RMSNorm) -> Tensor:
        """k [key, D], normalised and multiplied by the weights of its norm and of the queries', rounded once."""
        weight = norm.weight.float() * self.norm_q.weight.float()
        return F.rms_norm(k.float(), norm.normalized_shape, weight, norm.eps).to(k.dtype)

    def forward(self, h: Tensor | QuantizedRows, x: Tensor, context: ContextKV) -> Tensor:
        """h and x [S, D] -> x + output [S, D]. The text's padding is attended to as well, as in training.

        `context` is that of this block, with an `o_bound` of [].
        """
        q = self.q(h)
        mean_square = torch.linalg.vector_norm(q, dim=1, dtype=torch.float32).square() / q.shape[1]
        q_scale = (mean_square + self.eps).rsqrt()
        q = q.unflatten(1, (self.heads, -1))
        text_k, text_v, image_k, image_v, num_text_tokens, o_bound = context
        if not self.o.fp8:
            o = text_image_attention(q, text_k, text_v, image_k, image_v, num_text_tokens, q_scale)
            return self.o(o.flatten(1), residual=x)
        o, o_scale = text_image_attention_quantized(
            q, text_k, text_v, image_k, image_v, o_bound, num_text_tokens, q_scale
        )
        return self.o(QuantizedRows(o.flatten(1), o_scale), residual=x)


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

    def absorb(self, audio: AudioKV, tokens_per_frame: int) -> Absorbed:
        """The query and output projections absorbed into one speaker's keys and values of this block.

        This is the weight absorption of DeepSeek's MLA, exact but for rounding. The layer then takes a good quarter of
        the operations, the absorption included. The projections' weights may be e4m3. If both are, the results are e4m3
        where that was measured to be faster.
        """
        before, after = self.q_linear, self.proj
        weights = before.weight, before.bias, after.weight
        scales = [layer.weight_scale if layer.fp8 else None for layer in (before, after)]
        if self._absorbs_in_e4m3(len(audio.k), tokens_per_frame):
            return absorb_audio_projections_fp8(*audio, *weights, after.bias, *scales)
        return AbsorbedAudio(*absorb_audio_projections(*audio, *weights, *scales))

    def absorbed_bytes(self, frames: int, tokens_per_frame: int) -> int:
        """Bytes of the result of `absorb` for `frames` latent frames."""
        config, float32 = self.config, 4
        keys = config.num_heads * config.context_tokens
        if self._absorbs_in_e4m3(frames, tokens_per_frame):
            return frames * 2 * (keys * config.dim + float32 * (keys + config.dim))
        return frames * keys * (2 * config.dim * self.proj.bias.itemsize + float32)

    def _absorbs_in_e4m3(self, frames: int, tokens_per_frame: int) -> bool:
        config, device = self.config, self.proj.weight.device
        sizes = Sizes(config.context_tokens, tokens_per_frame)
        quantised = self.q_linear.fp8 and self.proj.fp8
        return quantised and is_tuned(frames * tokens_per_frame, config.dim, config.num_heads, sizes, device)

    def forward(
        self,
        h: Tensor | QuantizedRows,
        x: Tensor,
        audio: AudioKV | Absorbed,
        tokens_per_frame: int,
        first_token: int,
        positions: Tensor | None,
    ) -> Tensor:
        """h and x [n, D] -> x + output [n, D].

        Args:
            h: normalised tokens, with `AbsorbedFP8` in e4m3.
            x: the residual stream.
            audio: keys and values of this block, absorbed or not.
            tokens_per_frame: tokens of one latent frame.
            first_token: index of the first of the n tokens in the chunk.
            positions: with two speakers, the tokens' positions [n] on the audio position axis; None with one speaker.
                Queries are rotated by them, so that the projections of two speakers' layers cannot be absorbed.
        """
        sizes = self.config.context_tokens, tokens_per_frame, first_token
        if isinstance(audio, AbsorbedFP8):
            assert isinstance(h, QuantizedRows)
            return absorbed_audio_attention_fp8(*h, *audio, *sizes, residual=x, dtype=x.dtype)
        assert isinstance(h, Tensor)
        if isinstance(audio, AbsorbedAudio):
            return absorbed_audio_attention(h, *audio, *sizes, bias=self.proj.bias, residual=x)
        q = self.q_linear(h).unflatten(-1, (self.config.num_heads, -1))
        if positions is not None:
            q = rotate(q, audio_rope(positions, self.config.head_dim))
        attended = frame_attention(q, *audio, tokens_per_frame, first_token)
        return self.proj(attended.flatten(1), residual=x)


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
        audio: AudioKV | Absorbed,
        masks: Tensor | None,
        kv_only_tokens: int = 0,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """x [S, D] -> [S - kv_only_tokens, D].

        `modulation` [6, D], `context` and `audio` are those of this block. The first `kv_only_tokens` tokens serve only
        as keys and values of self-attention and are left out of the output. With `split`, the tokens are this rank's
        and the audio is that of the frames that they belong to.
        """
        eps, first_token, tokens_per_frame = self.config.eps, kv_only_tokens, len(x) // len(audio[0])
        if split is not None:
            tokens_per_frame = split.tokens_per_frame
            first_token = split.start - split.frames.start * tokens_per_frame
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = norm_modulate_for_linear(x, shift1, scale1, eps, self.self_attn.qkv)
        x, q, k = self.self_attn(h, x[kv_only_tokens:], gate1, rope, masks is not None, split)
        x = self.cross_attn(norm_for_linear(x, self.norm3, self.cross_attn.q), x, context)
        positions = None if masks is None else speaker_positions(q, k, masks, self.config, split)[kv_only_tokens:]
        norm = x, self.norm_x.weight, self.norm_x.bias, eps
        e4m3 = isinstance(audio, AbsorbedFP8)
        h = QuantizedRows(*layer_norm_fp8(*norm)) if e4m3 else layer_norm(*norm)
        x = self.audio_cross_attn(h, x, audio, tokens_per_frame, first_token, positions)
        return self.ffn(norm_modulate_for_linear(x, shift2, scale2, eps, self.ffn.up), x, gate2)
