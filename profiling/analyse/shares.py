"""The share of a chunk that the busiest of several GPUs computes, derived from the recipe of one GPU.

Tokens are split in contiguous ranges of multiples of 16, and pictures in slabs of latent rows. Everything that is
neither is repeated on every rank: noise, the sampler, audio keys and values.

    attention       heads are split among U = gcd(world, heads) ranks, by one exchange of q, k and v and one of the
                    output; R = world / U ranks pass keys and values around a ring, behind the attention
    convolutions    a slab at once, while a row from each neighbour travels; then both edges again, as a strip
    the last block  computes all tokens of the busiest rank, as only the first ranks have motion tokens to leave out
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import Config
from profiling.analyse.calls import AUDIO_LAYER, EAGER_PASS, FUSED_PASS, MATMUL, Call, call
from profiling.analyse.recipe import COLOR, STEP, Exchange, Recipe, StageWork
from profiling.analyse.waves import DOWN, UP
from profiling.cases.case import ITEM_BYTES

TOKEN_BLOCK = 16  # ranges of tokens begin at multiples of it
STRIP_ROWS = 6  # of both edges of a slab, which are convolved again with the neighbours' rows
NUM_SAMPLES = 128  # tokens that the ranges of FP8 attention are estimated from


@dataclass(frozen=True)
class Layout:
    """How a world of GPUs splits a chunk; sizes are those of its busiest rank."""

    world: int
    ulysses: int  # ranks that split heads
    tokens: int
    all_tokens: int
    rows: int  # of a latent
    all_rows: int

    @property
    def ring(self) -> int:
        """Ranks that pass keys and values on."""
        return self.world // self.ulysses

    @property
    def others(self) -> float:
        """The share of what is gathered from all ranks that comes from the others."""
        return (self.world - 1) / self.world


def layout(config: Config, world: int) -> Layout:
    """The layout of a chunk on `world` GPUs."""
    tokens, rows = math.prod(config.grid), config.latent_shape[2]
    blocks = -(-tokens // TOKEN_BLOCK)
    share = min(tokens, -(-blocks // world) * TOKEN_BLOCK)
    return Layout(world, math.gcd(world, config.dit.num_heads), share, tokens, -(-rows // world), rows)


def busiest_rank(recipe: Recipe, config: Config, world: int) -> Recipe:
    """What the busiest of `world` GPUs computes and exchanges in the chunk that `recipe` is of one GPU."""
    if world == 1:
        return recipe
    split = layout(config, world)
    return tuple(_stage(work, split, config) for work in recipe)


def _stage(work: StageWork, split: Layout, config: Config) -> StageWork:
    calls: Counter[Call] = Counter()
    exchanges: Counter[Exchange] = Counter()
    share = _student_share if work.stage == STEP else _picture_share
    for whole, count in work.calls.items() if work.stage != "audio" else ():
        for part in share(whole, split):
            if isinstance(part, Call):
                calls[part] += count
            else:
                exchanges[part] += count
    exchanges.update(_stage_exchanges(work.stage, split, config))
    return replace(work, calls=calls or work.calls, exchanges=exchanges)


def _stage_exchanges(stage: str, split: Layout, config: Config) -> Iterator[Exchange]:
    """The exchanges of a stage as a whole."""
    dit, chunk = config.dit, config.chunk
    if stage == "audio":
        window = chunk.frame_num * dit.audio_window * dit.audio_blocks * dit.audio_channels
        yield Exchange("audio window", 4.0 * window)
    elif stage == STEP:
        velocity = 4.0 * split.tokens * dit.out_dim * math.prod(dit.patch_size)
        yield Exchange("velocity", velocity * (split.world - 1))
    elif stage == COLOR:
        yield Exchange("colour statistics", 1.0)
        yield Exchange("frames", 3.0 * chunk.height * chunk.width * config.vae.temporal_stride * split.others)
    elif stage == "motion":
        latents = math.prod(config.latent_shape[1:]) * ((chunk.motion_frames_num - 1) // config.vae.temporal_stride + 1)
        yield Exchange("motion latents", 4.0 * latents * split.others)


def _student_share(whole: Call, split: Layout) -> Iterator[Call | Exchange]:
    dims = dict(whole.dims)
    if whole.operation == "chunk_attention":
        yield from _attention_share(dims, whole.dtype, split)
    elif whole.operation == FUSED_PASS:
        yield replace(whole, bytes=whole.bytes * split.tokens / split.all_tokens)
    elif whole.operation == EAGER_PASS:
        yield whole
    elif whole.operation == MATMUL:
        yield _scaled(whole, split.tokens / split.all_tokens)
    else:
        tokens = next(name for name in ("rows", "tokens", "queries") if name in dims)
        part = call(whole.operation, whole.dtype, **(dims | {tokens: split.tokens}))
        if whole.operation == AUDIO_LAYER:  # a range of tokens begins and ends within frames
            frames = min(split.all_tokens, split.tokens + dims["tokens_per_frame"]) // dims["tokens_per_frame"]
            part = replace(part, flops=call(AUDIO_LAYER, whole.dtype, **dict(part.dims), frames=frames).flops)
        yield part


def _attention_share(dims: dict[str, int], dtype: str, split: Layout) -> Iterator[Call | Exchange]:
    """Attention of one layer: a rank's heads, with the exchanges before and after it and those of the ring."""
    tokens, width, item = split.tokens, dims["heads"] * dims["head_dim"], ITEM_BYTES[dtype]
    sent = tokens * (split.ulysses - 1) / split.ulysses
    if split.ulysses > 1:
        scales = 4 * dims["heads"] if dtype == "fp8" else 0
        yield Exchange("q, k and v", sent * (3 * width * item + scales))
        yield Exchange("attention's output", sent * width * 2)
    if dtype == "fp8":
        yield Exchange("sampled keys and values", 2.0 * NUM_SAMPLES * width * 2 * split.others)
    length = split.all_tokens if split.ring == 1 else tokens * split.ulysses
    heads = dims["heads"] // split.ulysses
    block = call("chunk_attention", dtype, **(dims | {"heads": heads, "queries": length, "keys": length}))
    for i in range(split.ring):
        yield block
        if i:
            yield Exchange("keys and values of the ring", 2.0 * length * heads * dims["head_dim"] * item, block)


def _picture_share(whole: Call, split: Layout) -> Iterator[Call | Exchange]:
    dims, share = dict(whole.dims), split.rows / split.all_rows
    if whole.operation == "chunk_attention":
        kv = 2.0 * dims["keys"] * dims["head_dim"] * ITEM_BYTES[whole.dtype]
        yield Exchange("keys and values of a frame", kv * split.others)
        yield call("chunk_attention", whole.dtype, **(dims | {"queries": math.ceil(dims["queries"] * share)}))
    elif "columns" not in dims or "rows" not in dims or whole.operation == MATMUL:
        yield _scaled(whole, share)
    else:
        part = _with_rows(whole, dims["rows"] * split.rows // split.all_rows)
        yield part
        if whole.operation in (UP, DOWN) or dims.get("k") == 3:
            halo = 2.0 * dims["frames"] * dims["columns"] * dims["channels"] * ITEM_BYTES[whole.dtype]
            yield Exchange("rows of neighbours", halo, part)
            yield _with_rows(whole, STRIP_ROWS)


def _with_rows(whole: Call, rows: int) -> Call:
    """The call on that many rows of the picture."""
    before = dict(whole.dims)["rows"]
    part = call(whole.operation, whole.dtype, **(dict(whole.dims) | {"rows": rows}))
    return replace(part, flops=whole.flops * rows / before)


def _scaled(whole: Call, share: float) -> Call:
    return replace(whole, flops=whole.flops * share, bytes=whole.bytes * share)
