"""Recording a chunk from the model, alone and as one of several ranks: its operations, exchanges and stages."""

import itertools
import math
from collections import Counter
from functools import cache

import pytest

from model.config import PRESETS
from model.errors import UserError
from model.parallel.ranks import even_borders
from model.parallel.tokens import UNIT
from profiling.analyse.calls import EAGER_PASS, MATMUL, Call
from profiling.analyse.recipe import (
    AUDIO,
    COLOR,
    DECODE,
    MOTION,
    STEP,
    Recipe,
    StageWork,
    busiest_rank,
    meta_models,
    record,
)

TINY = PRESETS["tiny-random"]
DIT = TINY.dit


@cache
def recipe(precision: str) -> Recipe:
    return record(meta_models(TINY, precision))


def count(calls: Counter[Call], operation: str, dtype: str | None = None) -> int:
    return sum(n for call, n in calls.items() if call.operation == operation and dtype in (None, call.dtype))


def test_the_stages_of_a_chunk_are_those_of_the_loop() -> None:
    """The motion latents are decoded beside the steps, one by one; the rest after them, two at a time but the first."""
    stages = [(work.stage, work.beside) for work in recipe("fp32")]
    steps, alone = [(STEP, False)], [(DECODE, False), (COLOR, False)]
    assert stages == [(AUDIO, False), *steps, *[(DECODE, True)] * 2, *steps * 3, *alone * 4, (MOTION, False)]


def test_a_step_has_the_operations_of_all_its_blocks() -> None:
    step = next(work.calls for work in recipe("fp8-attn") if work.stage == STEP)
    layers = DIT.num_layers
    assert count(step, "chunk_attention", "fp8") == layers
    assert count(step, "text_image_attention") == count(step, "audio_layer") == layers
    # qkv, o, cross q and o, up, down; the head and the patches are products of PyTorch
    assert count(step, "linear", "fp8") == 6 * layers
    assert count(step, MATMUL) == 2
    assert count(step, "quantize_rows") == 2 * layers  # the outputs of two attentions
    assert count(step, "layer_norm_modulate", "fp8") == 3 * layers


def test_the_last_block_leaves_out_the_tokens_of_the_motion_latents() -> None:
    step = next(work.calls for work in recipe("fp8-attn") if work.stage == STEP)
    tokens, per_frame = math.prod(TINY.grid), math.prod(TINY.grid[1:])
    queries = Counter({dict(c.dims)["queries"]: n for c, n in step.items() if c.operation == "chunk_attention"})
    assert queries == {tokens: DIT.num_layers - 1, tokens - 2 * per_frame: 1}


def test_the_products_of_a_step_are_those_of_the_architecture() -> None:
    """With all tokens in all blocks, and audio projections absorbed into 32 keys a head and frame."""
    step = next(work.calls for work in recipe("bf16") if work.stage == STEP)
    tokens, per_frame, width = math.prod(TINY.grid), math.prod(TINY.grid[1:]), DIT.dim
    kept = tokens - 2 * per_frame

    def flops(own: int) -> float:
        linear = 2 * (3 * tokens + 3 * own) * width**2 + 4 * own * width * DIT.ffn_dim
        attention = 4 * own * width * (tokens + 21 + DIT.img_tokens)
        audio = 4 * width * DIT.num_heads * DIT.context_tokens * own + 4 * 9 * DIT.context_tokens * width**2
        return float(linear + attention + audio)

    patches = 2 * tokens * 4 * DIT.in_dim * width + 2 * kept * width * 4 * DIT.out_dim
    expected = (DIT.num_layers - 1) * flops(tokens) + flops(kept) + patches
    assert sum(c.flops * n for c, n in step.items() if c.is_matmul) == pytest.approx(expected)


def test_levels_of_the_decoder_are_in_fp8_where_the_precision_says_so() -> None:
    decoded = [work.calls for work in recipe("fp8-vae") if work.stage == DECODE][-1]
    (shape,) = {dict(call.dims)["channels"] for call in decoded if call.dtype == "fp8"}
    assert shape == 2 * TINY.vae.dim
    assert not any(call.dtype == "fp8" for work in recipe("bf16") for call in work.calls)


def test_the_last_step_draws_no_noise() -> None:
    steps = [work.calls for work in recipe("fp32") if work.stage == STEP]
    assert count(steps[-1], EAGER_PASS) < count(steps[1], EAGER_PASS)


# --- Several ranks ----------------------------------------------------------------------------------------------------


@cache
def shares(precision: str, world: int) -> list[Recipe]:
    """The recipes of all ranks."""
    models = meta_models(TINY, precision)
    return [record(models, rank, world) for rank in range(world)]


def exchanged(work: StageWork, group: str) -> float:
    return sum(exchange.bytes * n for exchange, n in work.exchanges.items() if exchange.group == group)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_products_of_a_step(world: int) -> None:
    """Together they compute what one GPU does, and for the motion latents' tokens the whole last block."""
    steps = [next(work for work in recipe if work.stage == STEP) for recipe in shares("bf16", world)]
    together = sum(c.flops * n for work in steps for c, n in work.calls.items() if c.is_matmul)
    one = sum(
        c.flops * n for c, n in next(work.calls for work in recipe("bf16") if work.stage == STEP).items() if c.is_matmul
    )
    assert one < together < 1.15 * one


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_of_self_attention_are_those_of_the_layout(world: int) -> None:
    """q, k and v to the heads' ranks and the output back, in bf16; the ring passes keys and values on."""
    degree = math.gcd(world, DIT.num_heads)
    for rank, recipe in enumerate(shares("bf16", world)):
        step = next(work for work in recipe if work.stage == STEP)
        borders = even_borders(math.prod(TINY.grid), world, UNIT)
        own = borders[rank + 1] - borders[rank]
        group = [b - a for a, b in itertools.pairwise(borders)][rank // degree * degree :][:degree]
        sent, received = own * (degree - 1) / degree, (sum(group) - own) / degree
        heads = DIT.num_layers * DIT.dim * 2 * 4 * max(sent, received)
        assert exchanged(step, "ulysses") == pytest.approx(heads, rel=0.02)
        ring = world // degree
        around = DIT.num_layers * (ring - 1) * 2 * DIT.dim / degree * 2 * math.prod(TINY.grid) / ring
        assert exchanged(step, "ring") == pytest.approx(around, rel=0.02)


def test_in_fp8_half_the_bytes_of_q_k_and_v_travel() -> None:
    """With the float32 scales of the queries; the output is in bf16."""
    for recipe in shares("fp8-attn", 2):
        step = next(work for work in recipe if work.stage == STEP)
        tokens = math.prod(TINY.grid) / 2
        expected = DIT.num_layers * tokens / 2 * (DIT.dim * (3 + 2) + 4 * DIT.num_heads)
        assert exchanged(step, "ulysses") == pytest.approx(expected, rel=0.02)


def test_the_rings_blocks_travel_behind_attention_and_heads_behind_nothing() -> None:
    step = next(work for work in shares("bf16", 4)[0] if work.stage == STEP)
    assert all(not exchange.behind for exchange in step.exchanges if exchange.group == "ulysses")
    for exchange in step.exchanges:
        if exchange.group == "ring":
            assert "chunk_attention" in {call.operation for call in exchange.behind}


def test_rows_of_neighbours_travel_behind_the_slab() -> None:
    decoded = [work for work in shares("bf16", 2)[0] if work.stage == DECODE][-1]
    hidden = [exchange for exchange in decoded.exchanges if exchange.behind]
    assert sum(decoded.exchanges[exchange] for exchange in hidden) >= 2 * 11  # two latents, eleven convolutions each
    assert all(any(call.is_matmul for call in exchange.behind) for exchange in hidden)


def test_the_busiest_rank_has_most_tokens_and_two_neighbours() -> None:
    borders = even_borders(math.prod(TINY.grid), 3, UNIT)
    rank = busiest_rank(TINY, 3)
    assert borders[rank + 1] - borders[rank] == max(b - a for a, b in itertools.pairwise(borders))
    assert busiest_rank(PRESETS["flashtalk-14b"], 8) in (3, 5)
    assert busiest_rank(TINY, 1) == 0


def test_a_picture_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(UserError, match="37 GPUs: a chunk has 576 tokens, too few"):
        busiest_rank(TINY, 37)
    with pytest.raises(UserError, match="17 GPUs: the picture has 16 rows of latents"):
        record(meta_models(TINY, "bf16"), 0, 17)
