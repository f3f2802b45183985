"""Whole chunks by variant, at the size of the golden weights."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partialmethod
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from model import block, linear, vae
from model.compile import compile_student, compile_vae
from model.config import VAEConfig
from profiling.cases.vae import coded, vae_of, vae_size
from profiling.measure import e2e
from profiling.measure.e2e import VARIANTS, ChunkRunner, Variant, chunk_models, run_variant
from profiling.measure.emulated_ranks import EmulatedTransport
from profiling.official_baseline import official_baseline
from profiling.results import OK, WRONG, VariantResult
from tests.small import SMALL

CPU = torch.device("cpu")
EAGER, COMPILED = VARIANTS["cpu"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e, "MAX_CHUNKS", 3)


def run(variant: Variant, seconds: float = 100_000) -> VariantResult:
    models = chunk_models(SMALL, CPU, variant.precision)
    return run_variant(variant, models, 0, time.monotonic() + seconds)[0]


@pytest.mark.usefixtures("few")
def test_every_stage_of_every_chunk_is_timed() -> None:
    result = run(EAGER)
    steps, latents = SMALL.chunk.sample_steps, SMALL.latent_shape[0]
    assert result.status == OK
    assert len(result.chunk) == len(result.first_frame) == 3
    assert all(0 < first < whole for first, whole in zip(result.first_frame, result.chunk, strict=True))
    counts = {name: len(samples) for name, samples in result.stages.items()}
    assert counts["denoise/step"] == 3 * steps
    assert counts["decode"] == 3 * latents
    assert counts["audio"] == counts["motion"] == 3
    assert sum(map(sum, result.stages.values())) < sum(result.chunk)
    assert result.frames == SMALL.chunk.new_frames
    assert result.first_call
    assert result.weights_bytes > 4 * 1e6  # type: ignore[operator]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (0, 3), (1, 3), (3, 4)])
def test_one_rank_of_many_does_its_share(rank: int, world: int) -> None:
    """With one head of attention for each of two ranks, and three or four ranks in a ring."""
    larger = replace(SMALL, chunk=replace(SMALL.chunk, width=64, height=96))
    variant = Variant("rank", "fp32", "eager", True, 10, rank=(rank, world))
    result, _ = run_variant(variant, chunk_models(larger, CPU, "fp32"), 0, time.monotonic() + 100_000)
    assert result.status == OK
    counts = {name: len(samples) for name, samples in result.stages.items()}
    assert counts["denoise/step"] == 3 * SMALL.chunk.sample_steps
    assert counts["decode"] == 3 * SMALL.latent_shape[0]
    assert counts["motion"] == 3


def test_what_a_rank_receives_is_made_of_what_it_sends() -> None:
    transport = EmulatedTransport()
    rows = torch.arange(6.0).view(3, 2)
    assert transport.start(rows, [1, 2], [4, 3], "all").flatten().tolist() == [0, 1, 2, 3, 4, 5] * 2 + [0, 1]
    assert transport.start(rows[:0], [0, 0], [1, 0], "all").tolist() == [[0, 0]]


def test_a_deadline_that_is_near_leaves_two_chunks() -> None:
    assert len(run(EAGER, seconds=0).chunk) == e2e.MIN_CHUNKS


@pytest.mark.usefixtures("few")
def test_compiled_chunks_share_a_graph_among_blocks_and_never_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that keeps the graphs as they are: what is counted is what would be compiled."""
    graphs: list[str] = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(str(graph.graph.find_nodes(op="placeholder")[0]))
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=count))
    models = chunk_models(SMALL, CPU, "fp32")
    result, _ = run_variant(COMPILED, models, 0, time.monotonic() + 100_000)
    assert result.status == OK
    # The student's block: in general, and as the last one, which drops one known frame in the first chunk and two in
    # later ones. Decoder and encoder each at a clip's start and behind it.
    assert len(graphs) == 7
    models = chunk_models(SMALL, CPU, "fp32")
    compile_student(models.dit)
    compile_vae(models.vae)
    eager, compiled = ChunkRunner(chunk_models(SMALL, CPU, "fp32"), 0), ChunkRunner(models, 0)
    for runner in (eager, compiled):
        runner.chunk()
    torch.testing.assert_close(compiled._state.motion, eager._state.motion, rtol=1e-4, atol=1e-4)


def test_frames_that_are_not_numbers_give_no_times() -> None:
    models = chunk_models(SMALL, CPU, "fp32")
    models.vae.conv2.bias.fill_(float("nan"))
    result, _ = run_variant(EAGER, models, 0, time.monotonic())
    assert (result.status, result.chunk, result.stages) == (WRONG, (), {})


def test_the_published_form_is_the_same_model() -> None:
    """Both chunks of two, the second of which has two known latent frames."""
    states = []
    for ours in (True, False):
        runner = ChunkRunner(chunk_models(SMALL, CPU, "fp32"), 0, ours)
        for _ in range(2):
            runner.chunk()
        states.append(runner._state.motion)
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    with official_baseline():
        assert block.chunk_attention.__module__ == linear.layer_norm.__module__ == "profiling.official_baseline"
        assert vae.conv3d.__module__ == vae.rms_norm_silu.__module__ == "profiling.official_baseline"
        assert vae.Upsample._double.__module__ == "profiling.official_baseline"
    assert vae.Upsample._double.__module__ == "model.vae"
    assert block.chunk_attention.__module__ == "kernels.chunk_attention"


@torch.inference_mode()
def test_the_published_vae_is_the_same() -> None:
    """Laid out, where the up-sampling is folded; three steps, the first of which has no past."""
    config, random = VAEConfig(dim=4, num_res_blocks=1), torch.Generator().manual_seed(0)
    coder = vae_of(config, torch.randn(vae_size(config), generator=random, dtype=torch.float64))
    coder.prepare_weights()
    latents, frames = (torch.randn(*n, generator=random, dtype=torch.float64) for n in ((3, 16, 2, 3), (9, 3, 16, 24)))
    ours = coded("decode", coder, latents), coded("encode", coder, frames)
    functions = ("rms_norm_silu", "conv3d", "causal_conv3d", "causal_conv3d_norm")
    forms = (*((vae, name) for name in functions), (vae.Upsample, "_double"))
    with official_baseline(), ExitStack() as stack:
        spies = [
            stack.enter_context(patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)))
            for owner, name in forms
        ]
        theirs = coded("decode", coder, latents), coded("encode", coder, frames)
    assert all(spy.called for spy in spies)
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("precision", ["fp8", "fp8-attn"])
def test_fp8_chunks_compile_without_a_break(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", compiled)
    variant = Variant(precision, precision, "student", True, 60)
    assert run(variant).status == OK
