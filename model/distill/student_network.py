"""The diffusion transformer in a batch and with gradients: the same parameters and results as `model.dit.DiT`.

The product computes one chunk at a time, by operations without gradients. Training needs batches and gradients, so the
layers are written again here, in PyTorch. Text and image attention is left out: a student that is trained here gets
nothing from prompt and portrait features, as its output projections of them are zero (`new_student`). Who the person is
comes from the portrait's latents, which every chunk is given.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import DiTConfig, from_official
from model.dit import Block, DiT, group_audio, rope_table, rotate
from model.weights.trained import fill, in_8_bits, load_trained, save_trained

UNUSED = ("text_embedding.", "img_emb.", ".cross_attn.", ".norm3.")  # parts of names of parameters


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


def velocities(dit: DiT, latents: Tensor, condition: Tensor, timesteps: Tensor, audio: Tensor) -> Tensor:
    """The velocities of a batch of chunks, each as `DiT.forward` gives it for a silent context.

    Args:
        dit: from `new_student`.
        latents: noisy latents [B, F, z, h, w].
        condition: mask and condition latents [B, F, 4 + z, h, w].
        timesteps: in 0..1000, [B].
        audio: windows of speech [B, video frame, window, layer, channel].

    Returns:
        [B, F, z, h, w].
    """
    _, p, q = dit.config.patch_size
    frames, _, rows, columns = latents.shape[1:]
    x = rearrange(torch.cat((latents, condition), 2), "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
    x = F.linear(x, dit.patch_embedding.weight.flatten(1), dit.patch_embedding.bias)
    embedded = dit.time_embedding(_sinusoid(timesteps, dit.config.freq_dim))  # [B, D]
    modulation = dit.time_projection(embedded).unflatten(1, (6, -1))
    rope = rope_table((frames, rows // p, columns // q), dit.config.head_dim, x.device)
    tokens = dit.audio_proj(*group_audio(audio, dit.config.vae_scale))  # [B, F, token, channel]
    for block in dit._blocks:
        x = _block(block, x, _Modulation(*(block.modulation + modulation)[:, :, None].unbind(1)), rope, tokens)
    shift, scale = (dit.head.modulation + embedded[:, None])[:, :, None].unbind(1)
    x = dit.head.head(_modulated(x, shift, scale, dit.head.eps))
    return rearrange(x, "b (f h w) (p q c) -> b f c (h p) (w q)", f=frames, h=rows // p, p=p, q=q)


def _sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).float()


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _block(block: Block, x: Tensor, m: _Modulation, rope: Tensor, tokens: Tensor) -> Tensor:
    """x [B, S, D], audio tokens [B, F, token, channel]."""
    eps = block.config.eps
    x = x + m.gate1 * _self_attention(block, _modulated(x, m.shift1, m.scale1, eps), rope)
    x = x + _audio_attention(block, block.norm_x(x), tokens)
    up, down = block.ffn.up, block.ffn.down
    hidden = F.gelu(F.linear(_modulated(x, m.shift2, m.scale2, eps), up.weight, up.bias), approximate="tanh")
    return x + m.gate2 * F.linear(hidden, down.weight, down.bias)


def _self_attention(block: Block, h: Tensor, rope: Tensor) -> Tensor:
    attention, heads = block.self_attn, block.config.num_heads
    q, k, v = F.linear(h, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    q, k = attention.norm_q(q), attention.norm_k(k)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, rope), rotate(k, rope), v))
    return F.linear(rearrange(_attend(q, k, v), "b h s d -> b s (h d)"), attention.o.weight, attention.o.bias)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. PyTorch's fused attention multiplies in float32 on a CPU, at half of bf16's speed."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _audio_attention(block: Block, h: Tensor, tokens: Tensor) -> Tensor:
    """Each latent frame's tokens attend to its own audio tokens."""
    attention, heads, frames = block.audio_cross_attn, block.config.num_heads, tokens.shape[1]
    q = F.linear(h, attention.q_linear.weight, attention.q_linear.bias)
    q = rearrange(q, "b (f s) (h d) -> (b f) h s d", f=frames, h=heads)
    k, v = rearrange(attention.kv_linear(tokens), "b f t (two h d) -> two (b f) h t d", two=2, h=heads)
    attended = rearrange(F.scaled_dot_product_attention(q, k, v), "(b f) h s d -> b (f s) (h d)", f=frames)
    return F.linear(attended, attention.proj.weight, attention.proj.bias)


def save_network(dit: DiT, path: Path) -> None:
    """Writes the trained tensors: matrices in 8 bits, the rest in half precision."""
    tensors: dict[str, Tensor] = {}
    for name, x in dit.named_parameters():
        if x.requires_grad:
            tensors |= in_8_bits(name, x) if x.ndim > 1 and len(x) > 1 else {name: x.half()}
    save_trained(path, tensors, asdict(dit.config))


def load_network(path: Path) -> DiT:
    """The trained network, float32; what was not trained is 0. Raises `UserError` for another file."""
    tensors, settings = load_trained(path)
    dit = new_student(from_official(DiTConfig, settings))
    fill(dit, tensors)
    return dit
