"""Which operations a preset runs at a world size, at which shapes, and how often in a chunk."""

import math
from collections.abc import Iterator

from kernels.conv_sm90 import MAX_FUSED_CHANNELS
from model.config import Config
from model.vae import LATENTS_PER_STEP, decode_schedule
from profiling.cases.attention import (
    FRAME_ATTENTION,
    QUANTIZED_ATTENTION,
    SELF_ATTENTION,
    TEXT_IMAGE_ATTENTION,
    TEXT_IMAGE_QUANTIZED,
    VAE_ATTENTION,
)
from profiling.cases.audio import ABSORB, ABSORB_FP8, ABSORBED_AUDIO_ATTENTION, AUDIO_ATTENTION
from profiling.cases.case import Operation, Shape
from profiling.cases.convolution import (
    CAUSAL_CONV3D,
    CAUSAL_CONV3D_NORM,
    CAUSAL_CONV3D_NORM_TAIL,
    DOWNSAMPLE_CONV2D,
    TIME_CONV,
    UPSAMPLE_CONV2D,
)
from profiling.cases.elementwise import (
    LAB_TRANSFER,
    LAYER_NORM_MODULATE,
    NORM_ATTENTION,
    QUANTIZE_ROWS,
    RMS_NORM_ROPE,
    RMS_NORM_ROPE_FP8,
    RMS_NORM_SILU,
    RMS_NORM_SILU_TAIL,
)
from profiling.cases.linear import LINEAR, LINEAR_RESIDUAL, NORM_LINEAR
from profiling.cases.vae import whole_vae

SPACE_TIME, TIME = {"kt": 3, "k": 3}, {"kt": 3, "k": 1}  # kernel sizes of causal convolutions


def tile_grid(world: int, rows: int, columns: int) -> tuple[int, int]:
    """The rows and columns of equal tiles, as square as can be, into which `world` GPUs split a latent."""
    ways = [
        (g, world // g) for g in range(1, world + 1) if world % g == 0 and rows % g == 0 and columns % (world // g) == 0
    ]
    if not ways:
        raise ValueError(f"world: {world} GPUs cannot split {rows} x {columns} evenly")
    return min(ways, key=lambda way: abs(rows / way[0] - columns / way[1]))


def student_shapes(config: Config, world: int, tag: str) -> Iterator[tuple[Operation, Shape]]:
    """The student's operations on one of `world` GPUs, which split heads in self-attention and tokens elsewhere."""
    dit = config.dit
    tokens, per_frame = math.prod(config.grid), math.prod(config.grid[1:])
    rows, layers = tokens // world, dit.num_layers * config.chunk.sample_steps

    def shape(calls: int, suffix: str = "", /, **dims: int) -> Shape:
        return Shape(tag + suffix, dims, world, calls * layers)

    heads = {"heads": dit.num_heads, "head_dim": dit.head_dim}
    yield SELF_ATTENTION, shape(1, queries=tokens, keys=tokens, heads=dit.num_heads // world, head_dim=dit.head_dim)
    if world == 1:  # among several ranks, parts of attention are merged before they are quantised
        yield QUANTIZED_ATTENTION, shape(0, queries=tokens, keys=tokens, **heads)
    text_image = {"queries": rows, "text": dit.text_len, "image": dit.img_tokens, **heads}
    yield TEXT_IMAGE_ATTENTION, shape(0, dedup_padding=0, **text_image)
    yield TEXT_IMAGE_ATTENTION, shape(1, "-prompt", dedup_padding=1, **text_image)
    yield TEXT_IMAGE_QUANTIZED, shape(0, "-prompt", dedup_padding=1, **text_image)
    audio = {"queries": rows, "tokens_per_frame": per_frame, "keys": dit.context_tokens, **heads}
    yield FRAME_ATTENTION, shape(0, **audio)  # of two speakers; for one, the whole layer is a sequence of its own
    yield AUDIO_ATTENTION, shape(1, **audio)
    absorbed = {"tokens_per_frame": per_frame, "keys": dit.context_tokens, "heads": dit.num_heads}
    yield ABSORBED_AUDIO_ATTENTION, shape(0, tokens=rows, width=dit.dim, **absorbed)
    if world == 1:
        for absorb in (ABSORB, ABSORB_FP8):
            yield absorb, shape(0, frames=config.grid[0], keys=dit.context_tokens, **heads)
    wide, narrow = dit.ffn_dim, dit.dim
    # Output projections and queries of two attentions: o; cross q, o.
    for name, calls, inputs, outputs in (
        ("qkv", 1, narrow, 3 * narrow), ("out", 3, narrow, narrow), ("up", 1, narrow, wide), ("down", 1, wide, narrow)
    ):  # fmt: skip
        yield LINEAR, shape(calls, f"-{name}", rows=rows, inputs=inputs, outputs=outputs)
    # Sequences of operations have no calls of their own: the linear layer and the passes around it are counted.
    for name, inputs, outputs, gelu in (("qkv", narrow, 3 * narrow, 0), ("up", narrow, wide, 1)):
        yield NORM_LINEAR, shape(0, f"-{name}", rows=rows, inputs=inputs, outputs=outputs, gelu=gelu)
    for name, inputs, quantised in (("out", narrow, 0), ("down", wide, 1)):
        yield LINEAR_RESIDUAL, shape(0, f"-{name}", rows=rows, inputs=inputs, outputs=narrow, quantised=quantised)
    yield LAYER_NORM_MODULATE, shape(4, rows=rows, columns=narrow)  # two modulated, two affine ones
    yield RMS_NORM_ROPE, shape(1, tokens=rows, **heads)
    yield RMS_NORM_ROPE_FP8, shape(0, tokens=rows, **heads)
    if world == 1:
        yield NORM_ATTENTION, shape(0, tokens=rows, **heads)
    yield QUANTIZE_ROWS, shape(0, "-narrow", rows=rows, columns=narrow)
    yield QUANTIZE_ROWS, shape(0, "-wide", rows=rows, columns=wide)
    if world > 1:  # ring attention: a rank's queries, the keys of all ranks
        yield SELF_ATTENTION, shape(0, "-ring", queries=rows, keys=tokens, **heads)


def vae_shapes(config: Config, world: int, tag: str) -> Iterator[tuple[Operation, Shape]]:
    """The VAE's operations at the decoder's four levels, on one tile of the picture; on one GPU also the whole VAE.

    Calls are those of decoding a chunk and of encoding its motion frames again, together. A level's first convolution,
    which may have other input channels, is counted as if it were like the rest. Where the decoder takes several latents
    at a time, its convolutions have a shape of their own.
    """
    vae, chunk = config.vae, config.chunk
    latents, _, rows, columns = config.latent_shape
    down, right = tile_grid(world, rows, columns)
    frames, scale = 1, 1
    widths = [vae.dim * mult for mult in reversed(vae.dim_mult)]
    temporal = (*reversed(vae.temperal_downsample), False)
    motion = (chunk.motion_frames_num - 1) // vae.temporal_stride
    steps = decode_schedule(latents, chunk.warmup_frames, vae.temporal_stride)
    sizes = [step.latents.stop - step.latents.start for step in steps]
    for level, (width, doubles) in enumerate(zip(widths, temporal, strict=True)):
        decoded, encoded = (1 / frames + latents - 1), (1 / frames + motion)
        middle = 4 if level == 0 else 0
        together = sizes.count(LATENTS_PER_STEP) if any(temporal[level:]) else 0
        convolutions = 2 * (vae.num_res_blocks + 1) + middle
        in_pairs = convolutions * together
        alone = decoded - LATENTS_PER_STEP * together
        convolutions = convolutions * alone + (2 * vae.num_res_blocks + middle) * encoded
        name = f"{tag}-level{level}"
        dims = {"frames": frames, "channels": width, "rows": rows * scale // down, "columns": columns * scale // right}
        yield CAUSAL_CONV3D, Shape(name, dims | SPACE_TIME | {"outputs": width}, world, convolutions)
        if in_pairs:
            pair = dims | SPACE_TIME | {"frames": LATENTS_PER_STEP * frames, "outputs": width}
            yield CAUSAL_CONV3D, Shape(f"{name}-pair", pair, world, in_pairs)
        yield RMS_NORM_SILU, Shape(name, dims, world, convolutions)
        yield RMS_NORM_SILU_TAIL, Shape(name, dims, world)  # in place of the one above, where it was chosen
        if width <= MAX_FUSED_CHANNELS:  # a sequence of two of the above, no calls of its own
            for conv_norm in (CAUSAL_CONV3D_NORM, CAUSAL_CONV3D_NORM_TAIL):
                yield conv_norm, Shape(name, dims | SPACE_TIME | {"outputs": width}, world)
        if level == 0:
            tokens = dims["rows"] * dims["columns"]
            one = {"queries": tokens, "keys": tokens, "heads": 1, "head_dim": width}
            yield VAE_ATTENTION, Shape(name, one, world, decoded + encoded)
        if level + 1 < len(widths):
            frames *= 2 if doubles else 1
            if doubles:
                time = dims | TIME | {"outputs": 2 * width}
                yield TIME_CONV, Shape(f"{name}-time", time, world, latents - 1)
            up = dims | {"frames": frames, "outputs": width // 2}
            yield UPSAMPLE_CONV2D, Shape(name, up, world, 1 / frames + latents - 1)
            scale *= 2
            large = {"frames": frames, "rows": 2 * dims["rows"], "columns": 2 * dims["columns"]}
            own = {"channels": widths[level + 1], "outputs": widths[level + 1]}
            yield DOWNSAMPLE_CONV2D, Shape(name, large | own, world, 1 / frames + motion)
        else:
            ends = {k: v for k, v in dims.items() if k not in ("frames", "channels")}
            yield CAUSAL_CONV3D, Shape(f"{tag}-head", dims | SPACE_TIME | {"outputs": 3}, world, decoded)
            shown = Shape(tag, ends | {"frames": frames}, world, chunk.new_frames / frames)
            yield LAB_TRANSFER, shown
    if world == 1:
        # Three latents: a clip's first, its second, and a third like all that follow.
        yield whole_vae(vae, "decode"), Shape(tag, {"frames": 3, "rows": rows, "columns": columns})
        pictures = {"frames": chunk.motion_frames_num, "rows": chunk.height, "columns": chunk.width}
        yield whole_vae(vae, "encode"), Shape(tag, pictures)
