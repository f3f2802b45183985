"""What ranks compute in the tests of model/parallel, and what one rank computes: the same functions without ranks."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.chunk_attention import chunk_attention
from kernels.chunk_attention_fp8 import chunk_attention_fp8
from kernels.rms_norm_rope import key_scale, kv_statistics, rms_norm_rope_fp8, sample_tokens
from model.config import PRECISIONS, TINY_RANDOM, Config
from model.dit import resize_masks
from model.parallel.ranks import Group, Ranks, Transport, ulysses_degree
from model.parallel.rows import RowSplit
from model.parallel.tokens import FP8Operands, TokenSplit
from model.rope import rope_table
from model.vae import decode_schedule
from model.weights.checkpoint import Models, random_models

CPU = torch.device("cpu")
# Three heads, which four ranks cannot share; 7 x 11 tokens a latent frame, of which no number of ranks is a divisor.
ODD = dataclasses.replace(
    TINY_RANDOM,
    name="odd",
    dit=dataclasses.replace(TINY_RANDOM.dit, dim=192, num_heads=3, num_layers=2),
    chunk=dataclasses.replace(TINY_RANDOM.chunk, width=112, height=176, frame_num=17),
)
CONFIGS = {"tiny-random": TINY_RANDOM, "odd": ODD}


class CountedTransport:
    """Counts the bytes that a rank sends to others, by group."""

    def __init__(self, transport: Transport, rank: Ranks) -> None:
        self._transport, self._rank = transport, rank
        self.sent: dict[str, int] = {}

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
        to_others = sum(n for n, who in zip(send, self._rank.members(group), strict=True) if who != self._rank.rank)
        row_bytes = rows[:1].numel() * rows.itemsize
        self.sent[group] = self.sent.get(group, 0) + to_others * row_bytes
        return self._transport.start(rows, send, receive, group)

    def wait(self, rows: Tensor) -> Tensor:
        return self._transport.wait(rows)


@functools.cache
def models(name: str, precision: str = "fp32") -> Models:
    return random_models(CONFIGS[name], CPU, PRECISIONS[precision])


def qkv(tokens: int, heads: int, head_dim: int) -> list[Tensor]:
    return list(torch.randn(3, tokens, heads, head_dim, generator=torch.Generator().manual_seed(tokens)))


def split_of(ranks: Ranks, tokens: int) -> TokenSplit:
    return TokenSplit.of_grid(ranks, (1, 1, tokens), CPU)


@torch.inference_mode()
def attention(ranks: Ranks | None, tokens: int, heads: int) -> Tensor:
    """The attention of all tokens, or of the rank's."""
    q, k, v = qkv(tokens, heads, 16)
    if ranks is None:
        return chunk_attention(q, k, v)
    split = split_of(ranks, tokens)
    return split.attend(*(x[split.start : split.end] for x in (q, k, v)))


@torch.inference_mode()
def attention_fp8(ranks: Ranks | None, tokens: int, heads: int) -> tuple[list[Tensor], Tensor]:
    """The operands of FP8 attention and the mean key as bytes, and its result, of all tokens or of the rank's.

    They are made of float32, where the mean key of a sample in another order would differ.
    """
    q, k, v = qkv(tokens, heads, 64)
    weight, rope = torch.ones(heads * 64), rope_table((1, 1, tokens), 64)
    split, chosen = None, sample_tokens(tokens)
    statistics = kv_statistics(k[chosen], v[chosen], weight, rope[chosen], 1e-6)
    if ranks is not None:
        split = split_of(ranks, tokens)
        q, k, v, rope = (x[split.start : split.end] for x in (q, k, v, rope))
        statistics = split.kv_statistics(k, v, weight, rope, 1e-6)
    operands = rms_norm_rope_fp8(q, k, v, weight, weight, key_scale(weight, heads), rope, 1e-6, statistics)
    if split is None:
        attended = chunk_attention_fp8(*operands, dtype=torch.bfloat16)
    else:
        attended = split.attend_fp8(FP8Operands(*operands), torch.bfloat16)
    return [x.contiguous().view(torch.uint8) for x in (*operands, statistics[0])], attended


@torch.inference_mode()
def velocity(ranks: Ranks | None, name: str, speakers: int, precision: str = "fp32") -> Tensor:
    """The student's velocity, whole on every rank."""
    config = CONFIGS[name]
    dit, random = models(name, precision).dit, torch.Generator().manual_seed(speakers)
    frames, _, height, width = config.latent_shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    audio = normal(speakers, config.chunk.frame_num, *_window(config))
    context = dit.embed_context(normal(7, config.dit.text_dim), normal(config.dit.img_tokens, config.dit.img_dim))
    split = None if ranks is None else TokenSplit.of_grid(ranks, config.grid, CPU)
    masks = torch.zeros(3, 8, 8)
    masks[0, :, :3], masks[1, :, 5:], masks[2, :, 3:5] = 1, 1, 1
    return dit(
        normal(*config.latent_shape),
        normal(frames, config.dit.in_dim - config.latent_shape[1], height, width),
        dit.modulate(500.0),
        rope_table(config.grid, config.dit.head_dim),
        context,
        dit.embed_audio(audio, split),
        resize_masks(masks, config.grid) if speakers == 2 else None,
        num_motion_latents=2,
        split=split,
    )


def compiled_velocity(ranks: Ranks, name: str, precision: str) -> Tensor:
    """`velocity` with blocks that are traced as for a compiler, without graph breaks, which would be errors."""
    blocks = models(name, precision).dit.blocks
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    try:
        return velocity(ranks, name, 1, precision)
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _window(config: Config) -> tuple[int, int, int]:
    return config.dit.audio_window, config.dit.audio_blocks, config.dit.audio_channels


@torch.inference_mode()
def decoded(ranks: Ranks | None, name: str, paired: bool = False) -> Tensor:
    """The frames of a chunk, of all rows or of the rank's; with `paired`, norms write the past frames."""
    config, vae, random = CONFIGS[name], models(name).vae, torch.Generator().manual_seed(1)
    if paired:
        vae = copy.deepcopy(vae)
        vae.pair_caches()
    latents = torch.randn(config.latent_shape, generator=random)
    rows = None if ranks is None else RowSplit.of_rows(ranks, config.latent_shape[2])
    state, frames = None, []
    for step in decode_schedule(len(latents), config.chunk.warmup_frames, config.vae.temporal_stride):
        part = latents[step.latents] if rows is None else rows.own(latents[step.latents])
        pixels, state = vae.decode_step(part, state, step.emit, rows)
        frames.append(pixels)
    return torch.cat(frames)


@torch.inference_mode()
def encoded(ranks: Ranks | None, name: str) -> Tensor:
    """The latents of a clip, whole on every rank."""
    chunk, vae, random = CONFIGS[name].chunk, models(name).vae, torch.Generator().manual_seed(2)
    clip = torch.rand(9, 3, chunk.height, chunk.width, generator=random) * 2 - 1
    if ranks is None:
        return torch.cat(list(vae.encode(clip)))
    rows = RowSplit.of_rows(ranks, CONFIGS[name].latent_shape[2])
    return rows.gather(torch.cat(list(vae.encode(rows.own(clip), rows))))


def counted(ranks: Ranks, function: Any, *args: Any) -> tuple[Any, dict[str, int]]:
    """What `function` gives, and the bytes that a rank sends while it runs."""
    transport = CountedTransport(ranks.transport, ranks)
    return function(dataclasses.replace(ranks, transport=transport), *args), transport.sent


def degree(name: str, world: int) -> int:
    return ulysses_degree(world, CONFIGS[name].dit.num_heads)
