"""The chunk loop as a function of its state. Its numbers are held by the golden case chunk_loop (tests/parity)."""

import copy
import itertools
import math
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.lab_transfer import to_bytes
from model.block import AudioAttention
from model.compile import compile_models, warm_up
from model.config import PRECISIONS, TINY_RANDOM, ChunkConfig, Config
from model.weights.checkpoint import Models, random_models
from streaming.audio_features import on_stream
from streaming.cuda_graphs import CudaGraphs
from streaming.generator import ChunkGenerator, Conditions, Frames, State
from streaming.sources import Slice
from streaming.timers import StageTimer
from tests.fake_graphs import FakeGraphs
from tests.fake_streams import EveryOrder, FakeStream, MemoryReuse

CPU = torch.device("cpu")
CHUNK = ChunkConfig(height=32, width=48, frame_num=17, motion_frames_num=5, sample_steps=2)
CONFIG = replace(TINY_RANDOM, chunk=CHUNK)
IMAGE = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([40, 50, 60, 1])


@pytest.fixture(scope="module")
def models() -> Models:
    return random_models(CONFIG, CPU, PRECISIONS["fp32"])


@pytest.fixture(scope="module")
def generator(models: Models) -> ChunkGenerator:
    return ChunkGenerator(models, StageTimer(CPU))


@pytest.fixture(scope="module")
def conditions(generator: ChunkGenerator) -> Conditions:
    return generator.prepare(IMAGE, IDS)


def window(seed: int, config: Config = CONFIG) -> Tensor:
    dit = config.dit
    shape = (config.chunk.frame_num, dit.audio_window, dit.audio_blocks, dit.audio_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collect(chunk: Generator[Frames, None, State]) -> tuple[Tensor, State]:
    groups = []
    while True:
        try:
            frames = next(chunk)
        except StopIteration as end:
            return torch.cat(groups), end.value
        groups.append(frames.pixels.clone())


def test_a_chunk_is_a_function_of_its_state(generator: ChunkGenerator, conditions: Conditions) -> None:
    start = generator.start(conditions, seed=7)
    first, after = collect(generator.chunk(conditions, start, window(1)))
    second, _ = collect(generator.chunk(conditions, after, window(2)))
    assert first.shape == second.shape == (CHUNK.new_frames, 3, 32, 48)
    assert (after.seed, after.chunk, after.motion.shape[0]) == (7, 1, 2)
    # Resumed from a copy, after other chunks went through the same generator.
    copy = State(after.seed, after.chunk, after.motion.clone())
    again, _ = collect(generator.chunk(conditions, copy, window(2)))
    assert torch.equal(second, again)
    assert not torch.equal(second, collect(generator.chunk(conditions, replace(after, seed=8), window(2)))[0])
    assert not torch.equal(second, collect(generator.chunk(conditions, after, window(3)))[0])


def with_pairs(models: Models) -> Models:
    """The models with a VAE whose norms write past frames."""
    vae = copy.deepcopy(models.vae)
    vae.pair_caches()
    return replace(models, vae=vae)


@pytest.mark.parametrize(("paired", "frame_num"), [(False, 17), (True, 17), (True, 21)])  # four and five decode steps
def test_recorded_chunks_are_those_that_are_not(models: Models, paired: bool, frame_num: int) -> None:
    """Bit for bit, whatever changes between chunks: state, sound, portrait and prompt, seed, session."""
    models = replace(models, config=replace(CONFIG, chunk=replace(CHUNK, frame_num=frame_num)))
    eager, voice = ChunkGenerator(models, StageTimer(CPU)), partial(window, config=models.config)
    conditions = eager.prepare(IMAGE, IDS)
    recorded = ChunkGenerator(with_pairs(models) if paired else models, StageTimer(CPU), new_capture=FakeGraphs)
    other = eager.prepare(IMAGE.flip(2), IDS[1:])
    state = eager.start(conditions, seed=2**63 + 5)
    states, kept = [state], []
    for c in range(6):
        portrait = other if c > 3 else conditions
        want, after = collect(eager.chunk(portrait, state, voice(c)))
        got, same = collect(recorded.chunk(portrait, state, voice(c)))
        assert torch.equal(got, want)
        kept.append((same.motion, after.motion))
        state = replace(after, seed=8) if c == 2 else after
        states.append(state)
    assert all(torch.equal(*motion) for motion in kept)  # still, as a state is a value
    assert torch.equal(states[1].motion, collect(eager.chunk(conditions, states[0], voice(0)))[1].motion)
    # A session that begins, or stops inside a chunk, leaves what was recorded as it is.
    for c in (0, 0, 0, 5):
        next(recorded.chunk(conditions, states[c], voice(c)))
        want, _ = collect(eager.chunk(conditions, states[c], voice(c)))
        assert torch.equal(collect(recorded.chunk(conditions, states[c], voice(c)))[0], want)


def test_audio_is_absorbed_once_a_chunk_or_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same frames, bit for bit, launched and recorded, here in e4m3."""
    monkeypatch.setattr("model.block.is_tuned", lambda *_: True)
    models, absorb, drawn = random_models(CONFIG, CPU, PRECISIONS["fp8"]), Mock(side_effect=AudioAttention.absorb), []
    monkeypatch.setattr(AudioAttention, "absorb", lambda *args: absorb(*args))
    layers, steps = CONFIG.dit.num_layers, CHUNK.sample_steps
    for once, capture, counts in (
        (False, None, [layers * steps] * 3),
        (True, None, [layers]),
        (True, FakeGraphs, [layers, layers, 0]),  # the third time what was recorded is repeated
    ):
        spare = 2 * models.dit.absorbed_bytes(CONFIG.latent_shape[0], math.prod(CONFIG.grid[1:])) - (not once)
        generator = ChunkGenerator(models, StageTimer(CPU), new_capture=capture, spare_bytes=spare)
        assert bool(generator.absorbed_bytes) == once
        conditions = generator.prepare(IMAGE, IDS)
        state = generator.start(conditions, 1)
        for c, count in enumerate(counts):
            absorb.reset_mock()
            frames, state = collect(generator.chunk(conditions, state, window(c)))
            drawn.append(frames)
            assert absorb.call_count == count
            assert torch.equal(frames, drawn[c])


def drawn_in(chunk: Generator[Frames, None, State]) -> tuple[list[Tensor], State]:
    """A chunk's frames, copied as they come, and the state after it."""
    drawn = []
    while True:
        try:
            frames = next(chunk)
        except StopIteration as end:
            return drawn, end.value
        drawn.append(frames.rgb.clone())


@torch.inference_mode()
@pytest.mark.parametrize("paired", [False, True])
def test_any_order_that_waits_allow_gives_the_same(
    models: Models, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what recorded chunks give to streams, also where the portrait, the seed or the session changes."""
    models = with_pairs(models) if paired else models
    orders = EveryOrder()
    monkeypatch.setattr("streaming.generator.SideStream", orders.new_stream)
    generator = ChunkGenerator(models, StageTimer(CPU), new_capture=FakeGraphs)
    portraits = [generator.prepare(IMAGE, IDS), generator.prepare(IMAGE // 2, IDS[1:])]
    state, voices, drawn = generator.start(portraits[0], 5), [window(c) for c in range(9)], []
    with orders:
        for c, voice in enumerate(voices):
            frames, after = drawn_in(generator.chunk(portraits[c // 4 % 2], state, voice))
            drawn += [*frames, after.motion.clone()]
            state = after if c < 6 else generator.start(portraits[0], c)
    want = [x.clone() for x in drawn]
    for first in itertools.permutations(range(orders.count)):
        for x in drawn:
            x.zero_()
        orders.repeat(first)
        assert all(map(torch.equal, drawn, want)), first


@torch.inference_mode()
@pytest.mark.parametrize("paired", [False, True])
def test_no_memory_is_given_away_while_another_lane_may_read_it(
    models: Models, conditions: Conditions, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stages are launched, not recorded, and sound is heard beside them."""
    models = with_pairs(models) if paired else models
    streams = MemoryReuse()
    monkeypatch.setattr("streaming.generator.SideStream", streams.new_stream)
    generator = ChunkGenerator(models, StageTimer(CPU))
    voices = iter([window(c) for c in range(4)])
    with streams:
        hear = on_stream(lambda _: next(voices) * 2, generator.audio_stream)
        state = generator.start(conditions, 0)
        for _ in range(4):
            _, state = drawn_in(generator.chunk(conditions, state, hear(cast(Slice, None))))


@torch.inference_mode()
def test_a_chunks_audio_waits_for_the_last_chunks_steps_only(
    models: Models, conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, shown = EveryOrder(), []
    decode_step = models.vae.decode_step

    def step(latent: Tensor, past: Any, wanted: bool, _: None) -> Any:
        if wanted:
            shown.append(orders.event())
        return decode_step(latent, past, wanted)

    monkeypatch.setattr("streaming.generator.SideStream", orders.new_stream)
    monkeypatch.setattr(models.vae, "decode_step", step)
    generator = ChunkGenerator(models, StageTimer(CPU))
    with orders:
        _, state = drawn_in(generator.chunk(conditions, generator.start(conditions, 0), window(0)))
        next(generator.chunk(conditions, state, window(1)))
    waits = [entry for entry in orders.given[cast(FakeStream, generator.audio_stream).number] if len(entry) == 2]
    assert waits[0] < waits[1] <= shown[0]


class Waits(TorchDispatchMode):
    """Fails where a GPU would have to be waited for: a value becomes a number, or a shape depends on values."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {str(tag) for tag in func.tags}
        assert not names & {"Tag.data_dependent_output", "Tag.dynamic_output_shape"}, func
        return func(*args, **(kwargs or {}))


def test_the_detector_of_waits_detects() -> None:
    for wait in (torch.Tensor.item, torch.Tensor.nonzero, lambda x: bool((x > 0).all())):
        with pytest.raises(AssertionError), Waits():
            wait(torch.ones(1))


def test_nothing_in_a_chunk_waits_for_its_values(models: Models, conditions: Conditions) -> None:
    generator = ChunkGenerator(models, StageTimer(CPU))
    state = generator.start(conditions, 0)
    for c in range(2):
        with Waits():
            _, state = collect(generator.chunk(conditions, state, window(c)))


@pytest.mark.slow
def test_once_warm_nothing_compiles_any_more(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for 20 chunks, another portrait, prompt, seed or session; another geometry once."""
    compiled = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=count))
    torch.compiler.reset()
    small = replace(models, dit=copy.deepcopy(models.dit), vae=copy.deepcopy(models.vae))
    compile_models(small)
    warm_up(small)
    # The student's block: in general, and as the last one, which drops one known latent in the first chunk and two in
    # later ones. Encoder and decoder at a clip's start and behind it; the decoder with frames, and of two latents, too.
    assert len(compiled) == 9
    generator = ChunkGenerator(small, StageTimer(CPU))
    portraits = [generator.prepare(IMAGE, IDS), generator.prepare(IMAGE.flip(1), IDS[2:])]
    for seed in (1, 2):
        state = generator.start(portraits[0], seed)
        for c in range(10):
            _, state = collect(generator.chunk(portraits[c // 4 % 2], state, window(c)))
    assert len(compiled) == 9
    # One latent is known and one is drawn, so there are two forms of the block, an encoder, and two of the decoder.
    other = replace(small, config=replace(CONFIG, chunk=replace(CHUNK, width=64, frame_num=5, motion_frames_num=1)))
    for again in (other, small, other):
        warm_up(again)
        assert len(compiled) == 14


def test_an_error_inside_a_chunk_leaves_the_generator_usable(
    models: Models, conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory, say, wherever it occurs, and also while stages are recorded."""
    eager = ChunkGenerator(models, StageTimer(CPU))
    state = eager.start(conditions, 1)
    want, after = collect(eager.chunk(conditions, state, window(0)))
    following, _ = collect(eager.chunk(conditions, after, window(1)))
    names = {models.dit: ("forward",), models.vae: ("decode_step", "encode_step")}
    for owner, name in ((owner, name) for owner, names in names.items() for name in names):
        recorded = ChunkGenerator(models, StageTimer(CPU), new_capture=FakeGraphs)
        for generator in (eager, recorded, recorded, recorded):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, Mock(side_effect=torch.OutOfMemoryError("too little")))
                for given, voice in ((state, 0), (after, 1)):
                    with suppress(torch.OutOfMemoryError):
                        collect(generator.chunk(conditions, given, window(voice)))
            assert torch.equal(collect(generator.chunk(conditions, state, window(0)))[0], want)
            assert torch.equal(collect(generator.chunk(conditions, after, window(1)))[0], following)


def test_another_generator_of_the_same_models_agrees(models: Models, conditions: Conditions) -> None:
    one, two = (ChunkGenerator(models, StageTimer(CPU)) for _ in range(2))
    state = one.start(conditions, seed=1)
    first = collect(one.chunk(conditions, state, window(1)))[0]
    assert torch.equal(first, collect(two.chunk(conditions, state, window(1)))[0])


def test_frames_leave_before_the_last_are_decoded(
    models: Models, generator: ChunkGenerator, conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    step, decode_step = models.dit.forward, models.vae.decode_step
    monkeypatch.setattr(models.dit, "forward", lambda *args, **more: done.append("step") or step(*args, **more))
    monkeypatch.setattr(models.vae, "decode_step", lambda z, s, emit, _: done.append(emit) or decode_step(z, s, emit))
    chunk = generator.chunk(conditions, generator.start(conditions, 0), window(1))
    assert next(chunk).pixels.shape == (4, 3, 32, 48)
    # The motion latents first: that of the portrait is known, and decoded beside the steps.
    assert done == ["step", False, "step", False, True]
    rest, after = collect(chunk)
    assert len(rest) == 8
    assert done[5:] == [True]  # the last two latents in one step
    done.clear()
    next(generator.chunk(conditions, after, window(2)))
    assert done == ["step", False, False, "step", True]


def test_conditions_describe_the_portrait(models: Models, generator: ChunkGenerator, conditions: Conditions) -> None:
    frames, _, rows, columns = CONFIG.latent_shape
    assert conditions.condition.shape == (frames, 20, rows, columns)
    assert (conditions.condition[0, :4] == 1).all()
    assert (conditions.condition[1:, :4] == 0).all()
    portrait = (IMAGE.float() / 255 - 0.5) * 2
    with torch.inference_mode():
        alone = next(models.vae.encode(portrait[None]))
    assert torch.equal(conditions.motion, alone)
    assert torch.equal(conditions.condition[:1, 4:], alone)
    with pytest.raises(ValueError, match=r"^image: got"):
        generator.prepare(IMAGE[:, :-1], IDS)


def test_colours_follow_the_portrait(generator: ChunkGenerator, conditions: Conditions) -> None:
    """Random weights draw anything, but its mean colour is pulled to the portrait's in every frame."""
    frames, _ = collect(generator.chunk(conditions, generator.start(conditions, 0), window(1)))
    portrait = (IMAGE.float() / 255 - 0.5) * 2
    assert (frames.mean((2, 3)) - portrait.mean((1, 2))).abs().max() < 0.2


@pytest.mark.parametrize(("frame_num", "motion"), [(9, 5), (9, 1), (13, 9), (5, 1)])
def test_other_geometries(models: Models, frame_num: int, motion: int) -> None:
    """Also with more motion frames than new ones, when some are fed back without being shown."""
    config = replace(CONFIG, chunk=replace(CHUNK, frame_num=frame_num, motion_frames_num=motion))
    generator = ChunkGenerator(replace(models, config=config), StageTimer(CPU))
    conditions = generator.prepare(IMAGE, IDS)
    state = generator.start(conditions, 0)
    for c in range(2):
        frames, state = collect(generator.chunk(conditions, state, window(c, config)))
        assert len(frames) == frame_num - motion
        assert len(state.motion) == (motion - 1) // 4 + 1
        assert frames.isfinite().all()


def test_bytes_are_the_pixels(generator: ChunkGenerator, conditions: Conditions) -> None:
    for frames in generator.chunk(conditions, generator.start(conditions, 0), window(1)):
        assert torch.equal(frames.rgb, to_bytes(frames.pixels))


def test_spans_carry_the_agreed_names(models: Models) -> None:
    timer = StageTimer(CPU)
    generator = ChunkGenerator(models, timer)
    conditions = generator.prepare(IMAGE, IDS)
    collect(generator.chunk(conditions, generator.start(conditions, 0), window(1)))
    counts = {name: stage["count"] for name, stage in timer.summary().items()}
    assert counts == {"audio": 1, "denoise/step": 2, "decode": 4, "color": 2, "motion": 1}
    assert all(stage["total_s"] >= stage["max_s"] >= stage["median_s"] > 0 for stage in timer.summary().values())


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 2e-1), ("fp8", 4e-1), ("fp8-attn", 4e-1)])
def test_gpu_draws_what_the_cpu_draws(
    precision: str, bound: float, conditions: Conditions, generator: ChunkGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative Frobenius error of a chunk's frames against float32 on the CPU, with the same weights and noise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    want, _ = collect(generator.chunk(conditions, generator.start(conditions, 3), window(1)))
    cuda, models = torch.device("cuda"), random_models(CONFIG, CPU, PRECISIONS["fp32"])
    for name, dtype in vars(PRECISIONS[precision]).items():
        if isinstance(dtype, torch.dtype):
            getattr(models, name).to(cuda, dtype)
    if (policy := PRECISIONS[precision].eight_bits) is not None:
        models.dit.quantize(policy)
    if PRECISIONS[precision].fp8_attention:
        models.dit.use_fp8_attention()
    there = ChunkGenerator(replace(models, device=cuda), StageTimer(cuda))
    same = there.prepare(IMAGE, IDS)
    got, _ = collect(there.chunk(same, there.start(same, 3), window(1)))
    assert torch.linalg.norm(got.cpu() - want) < bound * torch.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8-vae"])
def test_gpu_graphs_draw_what_launches_draw(precision: str) -> None:
    """Bit for bit and twice, with the student compiled in both; then without waiting, or memory from the device."""
    cuda = torch.device("cuda")
    torch.compiler.reset()
    models = random_models(CONFIG, cuda, PRECISIONS[precision])
    compile_models(models)
    recording = partial(CudaGraphs, cuda)
    generators = [ChunkGenerator(models, StageTimer(cuda), new_capture=r) for r in (None, recording, recording)]
    portraits = [(g.prepare(IMAGE, IDS), g.prepare(IMAGE.flip(2), IDS[1:])) for g in generators]
    states = [generator.start(both[0], 5) for generator, both in zip(generators, portraits, strict=True)]
    drawn: list[list[Tensor]] = [[], [], []]
    for c in range(6):
        for i, generator in enumerate(generators):
            frames, states[i] = collect(generator.chunk(portraits[i][c // 4], states[i], window(c)))
            drawn[i].append(frames)
    eager, recorded, again = map(torch.cat, drawn)
    assert eager.isfinite().all()
    assert torch.equal(recorded, again)
    assert torch.equal(recorded, eager)

    def taken() -> int:
        return torch.cuda.memory_stats()["num_device_alloc"]

    windows, before = [window(c).pin_memory() for c in range(2)], taken()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for voice in windows:
            _, states[1] = collect(generators[1].chunk(portraits[1][1], states[1], voice))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taken() == before
