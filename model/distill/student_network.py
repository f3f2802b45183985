"""The diffusion transformer in a batch and with gradients: the same parameters and results as `model.dit.DiT`.

The product computes one chunk at a time, by operations without gradients. Training needs batches and gradients, so the
layers are written again here, in PyTorch. A network that `new_student` begins gets nothing from prompt and portrait
features, as its output projections of them are zero. So attention to them is computed only where they are given. Who
the person is comes from the portrait's latents, which every chunk is given.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.config import DiTConfig, from_official
from model.dit import DiT, group_audio
from model.rope import rope_table, rotate
from model.weights.trained import fill, in_8_bits, load_trained, save_trained

UNUSED = ("text_embedding.", "img_emb.", ".cross_attn.", ".norm3.")  # parts of names of parameters


class Context(NamedTuple):
    """What the text and image attention of a batch sees."""

    text: Tensor  # [B, text_len, text_dim], features of the prompts, padded with zeros
    image: Tensor  # [B, img_tokens, img_dim], features of the portraits


class _Modulation(NamedTuple):
    """Shifts, scales and gates of a batch, each [B, 1, D]."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def new_student(config: DiTConfig) -> DiT:
    """A student to be trained. It begins by copying the noise of its input, which is the velocity of pure noise.

    The columns of the patch embedding for the noisy latents are orthonormal, and the head is their transpose, so the
    copy is exact but for the norm before the head. Blocks begin close to the identity, and audio adds nothing at first.
    Raises `ValueError` if the patches of latents have more numbers than the student has channels.
    """
    dit = DiT(config)
    patch = config.patch_size[1] * config.patch_size[2]
    noisy = config.out_dim * patch
    if noisy > config.dim:
        raise ValueError(f"{noisy} numbers of a patch do not fit into {config.dim} channels")
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(config.dim, noisy))[0]
        embedding = dit.patch_embedding.weight.flatten(1)  # [dim, channel x row x column]
        embedding *= 0.3
        embedding[:, :noisy] = basis
        dit.patch_embedding.weight.copy_(embedding.view_as(dit.patch_embedding.weight))
        tied = rearrange(basis, "d (c n) -> (n c) d", n=patch) * (noisy / config.dim) ** 0.5
        dit.head.head.weight.copy_(tied)
        nn.init.zeros_(dit.head.head.bias)
        nn.init.zeros_(dit.head.modulation)
        nn.init.normal_(cast(nn.Linear, dit.time_embedding[2]).weight, std=0.02 / config.dim**0.5)
        nn.init.zeros_(cast(nn.Linear, dit.time_embedding[2]).bias)
        nn.init.zeros_(cast(nn.Linear, dit.time_projection[1]).weight)
        nn.init.zeros_(cast(nn.Linear, dit.time_projection[1]).bias)
        for block in dit._blocks:
            block.modulation.copy_(torch.tensor([0.0, 0, 1, 0, 0, 1]).view(1, 6, 1).expand_as(block.modulation))
            for layer in (block.self_attn.o, block.ffn.down):
                nn.init.normal_(layer.weight, std=0.5 / (2 * config.dim * config.num_layers) ** 0.5)
                nn.init.zeros_(layer.bias)
            for layer in (block.audio_cross_attn.proj, block.cross_attn.o):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(not any(part in name for part in UNUSED))
    return dit


def velocities(
    dit: DiT,
    latents: Tensor,
    condition: Tensor,
    timesteps: Tensor,
    audio: Tensor,
    context: Context | None = None,
    causal: bool = False,
    checkpoints: bool = False,
) -> Tensor:
    """The velocities of a batch of chunks, each as `DiT.forward` gives it.

    Args:
        dit: from `new_student`, or with any parameters if there is a context.
        latents: noisy latents [B, F, z, h, w].
        condition: mask and condition latents [B, F, 4 + z, h, w].
        timesteps: in 0..1000, [B].
        audio: windows of speech [B, video frame, window, layer, channel].
        context: prompts and portraits; without it, attention to them is left out.
        causal: whether the tokens of a latent frame see this frame and those before only. The product has no such mask.
        checkpoints: whether the backward pass computes each block again instead of keeping its numbers.

    Returns:
        [B, F, z, h, w].
    """
    _, p, q = dit.config.patch_size
    frames, _, rows, columns = latents.shape[1:]
    x = rearrange(torch.cat((latents, condition), 2), "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
    x = F.linear(x, dit.patch_embedding.weight.flatten(1), dit.patch_embedding.bias)
    embedded = dit.time_embedding(_sinusoid(timesteps, dit.config.freq_dim))  # [B, D]
    modulation = dit.time_projection(embedded).unflatten(1, (6, -1))
    shared = _Shared(
        rope_table((frames, rows // p, columns // q), dit.config.head_dim, x.device),
        dit.audio_proj(*group_audio(audio, dit.config.vae_scale)),
        context and Context(dit.text_embedding(context.text), dit.img_emb(context.image)),
        _causal_mask(frames, x.shape[1], x.device) if causal else None,
    )
    for block in dit._blocks:
        vectors = _Modulation(*(block.modulation + modulation)[:, :, None].unbind(1))
        if checkpoints:
            x = cast(Tensor, checkpoint(_block, block, x, vectors, shared, use_reentrant=False))
        else:
            x = _block(block, x, vectors, shared)
    shift, scale = (dit.head.modulation + embedded[:, None])[:, :, None].unbind(1)
    x = dit.head.head(_modulated(x, shift, scale, dit.head.eps))
    return rearrange(x, "b (f h w) (p q c) -> b f c (h p) (w q)", f=frames, h=rows // p, p=p, q=q)


class _Shared(NamedTuple):
    """What all blocks are given."""

    rope: Tensor
    audio: Tensor  # tokens [B, F, token, channel]
    context: Context | None  # embedded
    mask: Tensor | None  # which keys a query sees, [S, S]


def _causal_mask(frames: int, tokens: int, device: torch.device) -> Tensor:
    frame = torch.arange(frames, device=device).repeat_interleave(tokens // frames)
    return frame[:, None] >= frame


def _sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).float()


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _block(block: Block, x: Tensor, m: _Modulation, shared: _Shared) -> Tensor:
    """x [B, S, D]."""
    eps = block.config.eps
    x = x + m.gate1 * _self_attention(block, _modulated(x, m.shift1, m.scale1, eps), shared)
    if shared.context is not None:
        x = x + _context_attention(block, block.norm3(x), shared.context)
    x = x + _audio_attention(block, block.norm_x(x), shared.audio)
    up, down = block.ffn.up, block.ffn.down
    hidden = F.gelu(F.linear(_modulated(x, m.shift2, m.scale2, eps), up.weight, up.bias), approximate="tanh")
    return x + m.gate2 * F.linear(hidden, down.weight, down.bias)


def _self_attention(block: Block, h: Tensor, shared: _Shared) -> Tensor:
    attention, heads = block.self_attn, block.config.num_heads
    q, k, v = F.linear(h, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    q, k = _rms_norm(attention.norm_q, q), _rms_norm(attention.norm_k, k)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, shared.rope), rotate(k, shared.rope), v))
    attended = rearrange(_attend(q, k, v, shared.mask), "b h s d -> b s (h d)")
    return F.linear(attended, attention.o.weight, attention.o.bias)


def _rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in float32, which autocast would leave in bfloat16."""
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight, norm.eps)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. PyTorch's fused attention multiplies in float32 on a CPU, at half of bf16's speed."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float()
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)


def _context_attention(block: Block, h: Tensor, context: Context) -> Tensor:
    """The tokens attend to the text and, separately, to the image."""
    attention, heads = block.cross_attn, block.config.num_heads
    q = _rms_norm(attention.norm_q, F.linear(h, attention.q.weight, attention.q.bias))
    q = rearrange(q, "b s (h d) -> b h s d", h=heads)
    attended = torch.zeros_like(q)
    for seen, layer, norm in (
        (context.text, attention.kv, attention.norm_k),
        (context.image, attention.kv_img, attention.norm_k_img),
    ):
        k, v = F.linear(seen, layer.weight, layer.bias).chunk(2, -1)
        k, v = (rearrange(x, "b s (h d) -> b h s d", h=heads) for x in (_rms_norm(norm, k), v))
        attended = attended + F.scaled_dot_product_attention(q, k, v)
    return F.linear(rearrange(attended, "b h s d -> b s (h d)"), attention.o.weight, attention.o.bias)


def _audio_attention(block: Block, h: Tensor, tokens: Tensor) -> Tensor:
    """Each latent frame's tokens attend to its own audio tokens."""
    attention, heads, frames = block.audio_cross_attn, block.config.num_heads, tokens.shape[1]
    q = F.linear(h, attention.q_linear.weight, attention.q_linear.bias)
    q = rearrange(q, "b (f s) (h d) -> (b f) h s d", f=frames, h=heads)
    k, v = rearrange(attention.kv_linear(tokens), "b f t (two h d) -> two (b f) h t d", two=2, h=heads)
    attended = rearrange(F.scaled_dot_product_attention(q, k, v), "(b f) h s d -> b (f s) (h d)", f=frames)
    return F.linear(attended, attention.proj.weight, attention.proj.bias)


def load_student(path: Path) -> DiT:
    """A network that is to be trained at four noise levels only: as `load_network`, with a fixed time embedding.

    Between those levels a trained embedding could become anything, and other numbers of steps would see that.
    """
    dit = load_network(path)
    dit.time_embedding.requires_grad_(False)
    return dit


def trained_parameters(dit: DiT) -> list[nn.Parameter]:
    """What an optimizer of the network gets."""
    return [parameter for parameter in dit.parameters() if parameter.requires_grad]


def save_network(dit: DiT, path: Path) -> None:
    """Writes the trained tensors: matrices in 8 bits, the rest in half precision."""
    tensors: dict[str, Tensor] = {}
    for name, x in dit.named_parameters():
        if not any(part in name for part in UNUSED):
            tensors |= in_8_bits(name, x) if x.ndim > 1 and len(x) > 1 else {name: x.half()}
    save_trained(path, tensors, asdict(dit.config))


def load_network(path: Path) -> DiT:
    """The trained network, float32; what was not trained is 0. Raises `UserError` for another file."""
    tensors, settings = load_trained(path)
    dit = new_student(from_official(DiTConfig, settings))
    fill(dit, tensors)
    return dit
