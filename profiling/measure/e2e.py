"""Times whole chunks of a preset with random weights, in every way we can run them; the first is the baseline.

A *variant* is a precision, a mode, a number of steps, and whose operations student and VAE run. `bf16-eager` is PyTorch
alone, and `bf16-compiled` is the same under torch.compile, as in the published code (official_baseline.py). The others
are ours: `bf16-ours`, `fp8`, `fp8-attn` (FP8 attention too), `fp8-vae` (an FP8 VAE as well) and `int8-vae` (that with
INT8 linear layers). Their student is compiled, and every stage is recorded as a CUDA graph, except in
`fp8-vae-launched`. `two-steps` is `fp8-vae` with half of the steps. `rank-4-of-8` is the work that rank 4 of 8 would do
of `fp8-vae` (emulated_ranks.py); a rank in the middle has most to exchange, and rank 0 puts the frames together.

A chunk is what `ChunkGenerator.chunk` does from the audio window on: audio K/V, all denoising steps, decoding, colour,
re-encoding of the motion frames. Student and VAE are created directly on the device. The encoders, which run before a
session or beside it, are left out.

The model's modules are imported where they are used. The encoders among them take seconds to import, which a process
that only lists the variants need not wait for.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from kernels.lab_transfer import lab_statistics
from model.config import PRECISIONS, TINY, Config
from profiling.measure.emulated_ranks import emulated_ranks
from profiling.measure.trace import export_trace, summarise
from profiling.official_baseline import official_baseline
from profiling.results import OK, WRONG, VariantResult
from streaming.timers import StageTimer

if TYPE_CHECKING:
    from model.parallel.ranks import Ranks
    from model.weights.checkpoint import Models
    from streaming.generator import Conditions

Moment: TypeAlias = float | torch.cuda.Event
Mode = Literal["eager", "compiled", "student", "graphs"]  # student: only it is compiled; compiled: the VAE too

MIN_CHUNKS, MAX_CHUNKS = 2, 5  # timed chunks; the first chunk, which compiles, is not one of them
PROMPT_TOKENS = 20  # real tokens of a prompt, before its padding


@dataclass(frozen=True)
class Variant:
    """One way of running a chunk."""

    name: str
    precision: str  # of `PRECISIONS`
    mode: Mode
    ours: bool  # whether the operations are ours; on a CPU they are PyTorch's in any case
    seconds: float  # that must be left to begin it
    steps: int = 4
    rank: tuple[int, int] | None = None  # this rank of so many is emulated


RANKS = [(rank, world) for world in (2, 4, 8) for rank in (0, world // 2)]
VARIANTS = {
    "cuda": (
        Variant("bf16-eager", "bf16", "eager", False, 60),
        Variant("bf16-compiled", "bf16", "compiled", False, 120),
        Variant("fp8-vae", "fp8-vae", "graphs", True, 60),
        Variant("two-steps", "fp8-vae", "graphs", True, 60, steps=2),
        Variant("fp8-attn", "fp8-attn", "graphs", True, 60),
        Variant("fp8", "fp8", "graphs", True, 60),
        Variant("int8-vae", "int8-vae", "graphs", True, 60),
        Variant("bf16-ours", "bf16", "graphs", True, 60),
        Variant("fp8-vae-launched", "fp8-vae", "student", True, 60),
        *(Variant(f"rank-{i}-of-{n}", "fp8-vae", "graphs", True, 60, rank=(i, n)) for i, n in RANKS),
    ),
    "cpu": (
        Variant("fp32-eager", "fp32", "eager", True, 10),
        Variant("fp32-compiled", "fp32", "compiled", True, 60),
    ),
}


def chunk_models(config: Config, device: torch.device, precision: str) -> "Models":
    """Student and VAE of `config` with random weights; the encoders, which no chunk runs, are those of `tiny`."""
    from model.weights.checkpoint import random_models

    small = replace(config, text=TINY.text, image=TINY.image, audio=TINY.audio)
    # Nothing is offloaded: moving 9 GB to the host and back would take longer than everything else.
    return replace(random_models(small, device, PRECISIONS[precision], offload_device=device), config=config)


@torch.inference_mode()
def random_conditions(models: "Models", generator: torch.Generator) -> "Conditions":
    """Random conditions, with the shapes and dtypes that `ChunkGenerator.prepare` makes of a portrait and a prompt."""
    from streaming.generator import Conditions, first_frame_mask

    config, dit = models.config, models.dit

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=models.device)

    context = dit.embed_context(
        normal(PROMPT_TOKENS, config.dit.text_dim), normal(config.dit.img_tokens, config.dit.img_dim)
    )
    latents = normal(*config.latent_shape).to(next(models.vae.parameters()).dtype)
    condition = torch.cat((first_frame_mask(latents, config.dit.vae_scale), latents), dim=1)
    portrait = normal(1, 3, config.chunk.height, config.chunk.width).mul(0.3).clamp(-1, 1)
    return Conditions(context, condition, lab_statistics(portrait), latents[:1])


class ChunkRunner:
    """Runs successive chunks of one variant, each from the state that the previous one returned."""

    def __init__(
        self,
        models: "Models",
        seed: int,
        ours: bool = True,
        graphs: bool = False,
        ranks: "Ranks | None" = None,
        spare_bytes: int = 0,
    ) -> None:
        from streaming.cuda_graphs import CudaGraphs
        from streaming.generator import ChunkGenerator

        config, device = models.config, models.device
        self._ours = ours
        self.models, self.timer = models, StageTimer(device)
        new_capture = partial(CudaGraphs, device) if graphs else None
        self._generator = ChunkGenerator(models, self.timer, None, new_capture, ranks, spare_bytes)
        random = torch.Generator(device).manual_seed(seed)
        self._conditions = self._generator.offload(random_conditions(models, random))
        for module in models.dit.offloadable_modules().values():
            module.to("meta")
        self._state = self._generator.start(self._conditions, seed)
        dit = config.dit
        shape = (config.chunk.frame_num, dit.audio_window, dit.audio_blocks, dit.audio_channels)
        self._window = torch.randn(*shape, generator=random, device=device)
        # Per chunk and per group of frames. Read only at the end, since reading waits for the GPU.
        self._first: list[tuple[Moment, Moment]] = []
        self._finite: list[Tensor] = []

    @property
    def finite(self) -> bool:
        """Whether all frames so far are finite."""
        return all(map(bool, self._finite))

    @property
    def first_frames(self) -> list[float]:
        """For each chunk so far, seconds from its beginning until its first frames were ready."""
        return [seconds(begin, first) for begin, first in self._first]

    def chunk(self) -> float:
        """Runs the next chunk and returns the seconds it took."""
        with nullcontext() if self._ours else official_baseline():
            return self._chunk()

    def _chunk(self) -> float:
        begin, start, first = time.perf_counter(), self._moment(), None
        frames = self._generator.chunk(self._conditions, self._state, self._window)
        while True:
            try:
                group = next(frames)
            except StopIteration as done:
                self._state = done.value
                if self.models.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
                return time.perf_counter() - begin
            if first is None:
                first = self._moment()
                self._first.append((start, first))
            self._finite.append(group.pixels.isfinite().all())

    def _moment(self) -> Moment:
        """The present moment: on a CPU the clock, on a GPU an event on the current stream."""
        if self.models.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(begin: Moment, end: Moment) -> float:
    """Seconds between two moments; waits until the later one has come."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    return cast(float, end) - cast(float, begin)


def _spare_bytes(variant: Variant, models: "Models") -> int:
    """What a card has beside the networks, keys and values, and what a chunk computes with."""
    from model.memory import SPARE_BYTES, card_of, memory_plan

    if models.device.type != "cuda":
        return SPARE_BYTES
    graphs, paired = variant.mode == "graphs", models.vae.paired
    plan = memory_plan(models.config, PRECISIONS[variant.precision], graphs, paired=paired)
    return card_of(models.device).free - (plan.running - plan.weights)


def run_variant(variant: Variant, models: "Models", seed: int, deadline: float) -> tuple[VariantResult, ChunkRunner]:
    """Times chunks of a variant until `MAX_CHUNKS` are done or another might end after `deadline` (monotonic).

    `models` are in the variant's precision; a compiled variant compiles them in place. Peak memory is that of steady
    chunks: the first ones, which try algorithms, take more. The returned runner can continue, see `trace_chunk`.
    """
    from model.compile import compile_student, compile_vae

    device, chunk = models.device, models.config.chunk
    torch.compiler.reset()
    if variant.mode != "eager":
        compile_student(models.dit)
    if variant.mode == "compiled":
        compile_vae(models.vae)
    ranks = emulated_ranks(*variant.rank, models.config.dit.num_heads) if variant.rank else None
    spare = _spare_bytes(variant, models)
    runner = ChunkRunner(models, seed, variant.ours, variant.mode == "graphs", ranks, spare)
    first_call = runner.chunk()
    # The second chunk, the first with motion frames, is the last that may compile; the third one is recorded.
    for _ in range(2 if variant.mode == "graphs" else 1):
        runner.chunk()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    calls_before = {name: len(samples) for name, samples in runner.timer.samples().items()}
    times: list[float] = []
    while len(times) < MAX_CHUNKS:
        longest = max(times, default=0.0)
        if len(times) >= MIN_CHUNKS and time.monotonic() + longest > deadline:
            break
        times.append(runner.chunk())
    stages = {name: samples[calls_before.get(name, 0) :] for name, samples in runner.timer.samples().items()}
    result = VariantResult(
        variant.name,
        OK if runner.finite else WRONG,
        detail="" if runner.finite else "frames are NaN or infinite",
        stages=stages if runner.finite else {},
        chunk=tuple(times) if runner.finite else (),
        first_frame=tuple(runner.first_frames[-len(times) :]) if runner.finite else (),
        frames=chunk.new_frames,
        first_call=first_call,
        peak_bytes=peak_memory() if device.type == "cuda" else None,
        weights_bytes=sum(_parameter_bytes(module, device) for module in (models.dit, models.vae)),
    )
    return result, runner


def peak_memory() -> int:
    """Peak bytes of GPU memory in use: tensors, and what recorded graphs reserve for tensors of a replay.

    The rest of the allocator's memory is free, in fragments that the creation of random weights left.
    """
    private = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)]
    kept = sum(segment["total_size"] - segment["allocated_size"] for segment in private)
    return torch.cuda.max_memory_allocated() + kept


def _parameter_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of the module's parameters on the device; offloaded ones are elsewhere."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type == device.type)


def trace_chunk(result: VariantResult, runner: ChunkRunner, path: Path) -> VariantResult:
    """Runs one more chunk under the profiler; returns the result with its trace file, timeline and launch gaps.

    `path` is where the Chrome/Perfetto trace is written. The profiler takes CPU time itself, so the gaps are an upper
    bound.
    """
    with torch.profiler.profile() as profiler:
        runner.chunk()
    summary = summarise(export_trace(profiler, path))
    return replace(result, trace=path.name, timeline=summary.timeline, gaps=summary.gaps)
