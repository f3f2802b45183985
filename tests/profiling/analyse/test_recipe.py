"""Recording a chunk from the model: all operations, without values; what is fused, and what runs beside the steps."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

from model.config import PRESETS
from profiling.analyse.calls import EAGER_PASS, FUSED_PASS, MATMUL, Call
from profiling.analyse.recipe import (
    AUDIO,
    BETWEEN,
    COLOR,
    DECODE,
    MOTION,
    STEP,
    Recipe,
    Recorder,
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
    stages = [(work.stage, work.beside) for work in recipe("fp32") if work.stage != BETWEEN]
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


# --- Passes over memory ---------------------------------------------------------------------------------------------


def recorded(function: Callable[..., object], *arguments: Tensor, fused: bool) -> Counter[Call]:
    recorder = Recorder()
    with recorder, torch.inference_mode(), nullcontext():
        recorder.compiled(fused)
        function(*arguments)
    return sum((work.calls for work in recorder.stages()), Counter())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_fused_passes_read_what_comes_from_outside_and_write_what_is_used_outside() -> None:
    x, y, w = empty(1000, 100), empty(1000, 100), empty(100, 50)

    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        inner = (x * 2 + y).relu()  # read by the product
        product = inner @ w
        return product, inner.exp() + 1  # reads inner, writes the result

    calls = recorded(function, x, y, w, fused=True)
    assert sorted(c.bytes for c in calls.elements() if c.operation == FUSED_PASS) == [2 * 400e3, 3 * 400e3]
    (product,) = (c for c in calls if c.operation == MATMUL)
    assert (product.flops, product.dtype, calls[product]) == (2.0 * 1000 * 100 * 50, "fp32", 1)


def test_eager_passes_are_kernels_of_their_own_and_views_are_none() -> None:
    calls = recorded(lambda x: x[:500].T.reshape(-1).view(5, -1) * 2 + 1, empty(1000, 100), fused=False)
    # reshape copies, then two passes
    assert [c.bytes for c in calls.elements()] == [2 * 200e3] * 3


def test_a_copy_reads_only_its_source() -> None:
    calls = recorded(lambda x, y: x.copy_(y), empty(1000), empty(1000, dtype=torch.bfloat16), fused=False)
    assert [c.bytes for c in calls.elements()] == [4e3 + 2e3]


def test_what_happens_on_the_host_is_not_recorded() -> None:
    assert not recorded(lambda x: x + 1, torch.zeros(3), fused=False)
