"""The chunk loop: a state and a window of audio features in, frames out as they are decoded, the next state at the end.

    window -> audio keys and values, computed beside the decoding of the last chunk, and the absorption of the audio
              layers' projections into them, where there is memory for that
           -> 4 denoising steps; the motion latents are written back after each
              beside them, on a second stream: VAE decode of the motion latents, whose frames nobody sees
           -> VAE decode of the other latents -> colour correction -> frames
           -> VAE encode of the last frames -> motion latents of the next state

`State` is everything that changes from chunk to chunk; `Conditions` is everything that is constant for a portrait and a
prompt. The same state, conditions and window give the same frames, whatever ran before, and after a restart too.

What a chunk computes does not depend on values, so on a GPU its stages are CUDA graphs (streaming/cuda_graphs.py). From
the third chunk on nothing is compiled or allocated any more, and the host waits for the GPU nowhere.

Several ranks generate a chunk together: all call the same methods with the same arguments. The student's tokens are
split among them, and so are the rows that the VAE and the colour correction work on. Whole latents are on every rank;
whole frames, as bytes, on rank 0 only.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kernels.lab_transfer import lab_statistics, lab_transfer
from model.block import Audio, ContextKV
from model.image import to_pixels
from model.memory import SPARE_BYTES
from model.offload import on_device
from model.parallel.ranks import Ranks, sizes
from model.parallel.rows import RowSplit
from model.parallel.tokens import TokenSplit
from model.rope import rope_table
from model.sampler import denoise_step, first_latents, normal_noise, timesteps
from model.vae import State as VAECache
from model.vae import decode_schedule
from model.weights.checkpoint import Models
from streaming.cuda_graphs import Capture, GraphPool, StaticInput
from streaming.streams import SideStream
from streaming.timers import StageTimer

Noise = Callable[[int | Tensor, int | Tensor, int], Tensor]  # (seed, chunk, draw) -> standard normal [F, 16, h, w]
T = TypeVar("T")


class Conditions(NamedTuple):
    """What is constant for a portrait and a prompt."""

    context: ContextKV  # keys and values of text and portrait
    condition: Tensor  # mask and condition latents [F, 4 + 16, h, w]
    lab: tuple[Tensor, Tensor]  # mean and standard deviation of the portrait's Lab channels
    motion: Tensor  # motion latents of the first chunk [1, 16, h, w]: the portrait itself


@dataclass(frozen=True)
class State:
    """Everything that one chunk hands to the next."""

    seed: int
    chunk: int  # index of the next chunk
    motion: Tensor  # motion latents that the next chunk begins with [n, 16, h, w]


class Frames(NamedTuple):
    """Consecutive frames of the video, on the device; valid until the next group is asked for."""

    pixels: Tensor  # float32 [n, 3, height, width] in [-1, 1]; among several ranks, the rows of this one
    rgb: Tensor  # the same, uint8 [n, height, width, 3]; among several ranks, whole on rank 0 and empty elsewhere
    finite: Tensor  # bool []: whether what they were made from is free of NaN and infinity


class StepInputs(NamedTuple):
    """What a chunk's denoising steps read."""

    seed: int | Tensor
    chunk: int | Tensor
    motion: Tensor
    conditions: Conditions
    audio: Audio


def first_frame_mask(latents: Tensor, channels: int) -> Tensor:
    """The mask [F, channels, h, w] of latents [F, 16, h, w]: 1 in latent frame 0, where the condition is a picture.

    It is the same in every chunk, also where a chunk begins with several motion latents.
    """
    mask = torch.zeros_like(latents[:, :1]).repeat(1, channels, 1, 1)
    mask[0] = 1
    return mask


class ChunkGenerator:
    """Generates chunks with the networks and the geometry of `models.config`."""

    def __init__(
        self,
        models: Models,
        timer: StageTimer,
        noise: Noise | None = None,
        new_capture: Callable[[], Capture] | None = None,
        ranks: Ranks | None = None,
        spare_bytes: int = SPARE_BYTES,
    ) -> None:
        """Prepares what does not depend on a session.

        Args:
            models: the networks, on one device.
            timer: times the stages.
            noise: replaces the counter-based noise, to follow a recorded run.
            new_capture: makes what captures graphs of one memory pool, such as `CudaGraphs`. It is called for the
                student and for the VAE, which may run at the same time. None: nothing is captured.
            ranks: those that generate together; None if this process does it alone.
            spare_bytes: memory that nothing else wants. Audio projections are absorbed once a chunk where it has room
                for two chunks' results, as the next chunk's are made while the last one's are in use. Else they are
                absorbed in every step, with the same bits.

        Raises `UserError` if the picture is too small for so many ranks.
        """
        config, device = models.config, models.device
        self.models, self.config, self._noise = models, config, noise
        with torch.inference_mode():
            self._times = timesteps(config.chunk.sample_steps, config.chunk.sample_shift)
            self._modulations = [models.dit.modulate(t) for t in self._times[:-1].tolist()]
            self._rope = rope_table(config.grid, config.dit.head_dim, device)
        latents, stride = config.latent_shape[0], config.vae.temporal_stride
        self._tokens = TokenSplit.of_grid(ranks, config.grid, device) if ranks is not None else None
        self._rows = RowSplit.of_rows(ranks, config.latent_shape[2]) if ranks is not None else None
        self._decode_steps = tuple(decode_schedule(latents, config.chunk.warmup_frames, stride))

        student, vae = (GraphPool(timer, new_capture() if new_capture else None) for _ in range(2))
        frames = latents if self._tokens is None else self._tokens.num_frames
        absorbed = 2 * models.dit.absorbed_bytes(frames, math.prod(config.grid[1:]))
        self.absorbed_bytes = absorbed if absorbed <= spare_bytes else 0  # 0: it is done in every step
        self._encode_audio = student.graphed(self._embed_audio, timer="audio")
        self._denoise_step = student.graphed(self._denoise, timer="denoise/step")
        self._decode_step = vae.graphed(self._decode, timer="decode")
        self._correct_color = vae.graphed(self._correct, timer="color")
        self._encode_motion = vae.graphed(self._encode, timer="motion")
        self._captured = new_capture is not None
        self._static_conditions = self._input(constant=True)
        self._static_counters, self._static_window, self._static_motion, self._static_latents = (
            self._input() for _ in range(4)
        )

        self.audio_stream, self._decode_stream = SideStream(device), SideStream(device)
        self._last_step: torch.cuda.Event | None = None  # of the last chunk; its audio K/V may then be overwritten

    @torch.inference_mode()
    def prepare(self, image: Tensor, ids: Tensor) -> Conditions:
        """The conditions of a portrait, uint8 [3, height, width] of the chunk's size, and a prompt's token ids [L]."""
        models, chunk = self.models, self.config.chunk
        if image.shape != (3, chunk.height, chunk.width):
            raise ValueError(f"image: got {list(image.shape)}, want [3, {chunk.height}, {chunk.width}]")
        portrait = to_pixels(image).to(models.device)
        text = models.text(ids)
        with on_device(models.device, models.image):
            features = models.image(portrait)
        context = models.dit.embed_context(text, features)
        # The clip that the condition latents describe: the portrait, then mid grey.
        clip = torch.zeros(chunk.frame_num, *portrait.shape, dtype=self._vae_dtype, device=models.device)
        clip[0] = portrait
        latents = self._encode_rows(clip if self._rows is None else self._rows.own(clip))
        condition = torch.cat((first_frame_mask(latents, self.config.dit.vae_scale), latents), dim=1)
        # The encoder is causal, so the clip's first latent is that of the portrait alone.
        return self.offload(Conditions(context, condition, lab_statistics(portrait[None]), latents[:1]))

    def offload(self, conditions: Conditions) -> Conditions:
        """The conditions in pinned host memory, if graphs have a copy of their own on the device."""
        if not self._captured or self.models.device.type == "cpu":
            return conditions
        return tree_map(lambda x: x.cpu().pin_memory(), conditions)

    def start(self, conditions: Conditions, seed: int) -> State:
        """The state before the first chunk."""
        return State(seed, 0, conditions.motion)

    @torch.inference_mode()
    def chunk(self, conditions: Conditions, state: State, window: Tensor) -> Generator[Frames, None, State]:
        """Yields a chunk's new frames and returns the next state: `state = yield from generator.chunk(...)`.

        Args:
            conditions: from `prepare`.
            state: from `start`, or what the last chunk returned.
            window: speech features around each of the chunk's frames [frame_num, window, layer, channel].

        Frames come in groups, each as soon as it is decoded: the frames of one latent first, then of two at a time.
        """
        return (yield from frames_of(self.stepwise(conditions, state, window)))

    @torch.inference_mode()
    def stepwise(self, conditions: Conditions, state: State, window: Tensor) -> Generator[Frames | None, None, State]:
        """`chunk`, which also yields None between two denoising steps, so that it can be abandoned there.

        On a GPU a step has then been launched, but need not have begun.
        """
        self._decode_stream.join()  # a chunk that was abandoned may have left work there
        conditions, motion = self._static_conditions(conditions), self._static_motion(state.motion)
        audio = self._encode_audio_early(window)
        inputs = StepInputs(*self._counters(state), motion, conditions, audio)

        latents = self._denoise_step(0, None, inputs)
        decoded, cache = self._decode_motion(motion)  # once the student is busy, so that it need not wait for launches
        for i in range(1, len(self._modulations)):
            yield None
            latents = self._denoise_step(i, latents, inputs)
        latents = self._static_latents(latents)  # a copy, as the next chunk's audio takes the student's memory
        self._last_step = self.audio_stream.record_event()
        self._decode_stream.join()

        overlap, last_frames = self.config.chunk.motion_frames_num, []
        for step, group in enumerate(self._decode_steps[decoded:], decoded):
            frames, cache = self._decode_step(step, latents[group.latents], cache)
            if not group.emit:
                continue
            frames, rgb, finite = self._correct_color(step, frames, conditions.lab, latents)
            last_frames.append(frames[max(self.config.chunk.new_frames - group.frames.start, 0) :])
            if group.frames.stop > overlap:
                new = max(overlap - group.frames.start, 0)
                yield Frames(frames[new:], rgb[new:], finite)
        return State(state.seed, state.chunk + 1, self._encode_motion(last_frames).clone())

    @torch.inference_mode()
    def motion_of(self, rgb: Tensor) -> Tensor:
        """The motion latents of frames that were shown, uint8 [motion_frames_num, height, width, 3].

        What a chunk returns is made from its frames before they became bytes; this differs by that rounding only. Bytes
        are truncated, so each stands for the middle of its level.
        """
        pixels = ((rgb.to(self.models.device).float() + 0.5) / 127.5 - 1).clamp(max=1)
        pixels = pixels.permute(0, 3, 1, 2)
        return self._encode([pixels if self._rows is None else self._rows.own(pixels)])

    # --- Stages, as functions of their arguments ---------------------------------------------------------------------

    def _embed_audio(self, window: Tensor) -> Audio:
        """What the steps need of a window of one speaker [1, frame, window, layer, channel]."""
        dit = self.models.dit
        audio = dit.embed_audio(window, self._tokens)
        return dit.absorb_audio(audio, math.prod(self.config.grid[1:])) if self.absorbed_bytes else audio

    def _denoise(self, i: int, latents: Tensor | None, inputs: StepInputs) -> Tensor:
        """The latents after denoising step i. Step 0 takes None, and begins with motion latents followed by noise."""
        seed, chunk, motion, (context, condition, *_), audio = inputs

        def noise(draw: int) -> Tensor:
            if self._noise is not None:
                return self._noise(seed, chunk, draw)
            return normal_noise(self.config.latent_shape, seed, chunk, draw, device=self.models.device)

        def velocity(x: Tensor) -> Tensor:
            dit = self.models.dit
            inputs = x, condition, self._modulations[i], self._rope, context, audio
            return dit(*inputs, num_motion_latents=len(motion), split=self._tokens)

        x = first_latents(noise, motion) if latents is None else latents
        return denoise_step(i, x, velocity, noise, self._times, motion)

    def _decode(self, step: int, latents: Tensor, cache: VAECache | None) -> tuple[Tensor, VAECache]:
        """The frames of one decode step, and the VAE's cache after it; among several ranks, this one's rows."""
        latents = (latents if self._rows is None else self._rows.own(latents)).to(self._vae_dtype)
        return self.models.vae.decode_step(latents, cache, self._decode_steps[step].emit, self._rows)

    def _correct(
        self,
        step: int,  # noqa: ARG002
        frames: Tensor,
        lab: tuple[Tensor, Tensor],
        latents: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The frames of one decode step in the portrait's colours, as pixels and as bytes; whether all was finite.

        A sum is not finite if a term is not. Bytes do not show it, and e4m3 may hide it from the frames.
        """
        strength, rows = self.config.chunk.color_correction_strength, self._rows
        total = frames.sum(dtype=torch.float32) + latents.sum(dtype=torch.float32)
        if rows is None:
            return *lab_transfer(frames, *lab, strength), total.isfinite()
        statistics = self._whole_statistics(frames, rows)
        pixels, rgb = lab_transfer(frames, *lab, strength, statistics)
        return pixels, rows.gather(rgb, axis=1, to=0).contiguous(), (total + statistics.sum()).isfinite()

    def _whole_statistics(self, frames: Tensor, rows: RowSplit) -> Tensor:
        """Mean and deviation of the Lab channels of whole frames, float32 [frame, 3, 2], from those of all slabs.

        Not finite if any slab is not.
        """
        own = torch.cat(lab_statistics(frames.float()), dim=3).squeeze(2)  # [frame, 3, 2]
        means, deviations = rows.ranks.gather(own[None], [1] * rows.ranks.world, group="vae").unbind(
            -1
        )  # [rank, frame, 3] each
        shares = [size / rows.borders[-1] for size in sizes(rows.borders)]

        def average(x: Tensor) -> Tensor:
            return torch.stack([share * y for share, y in zip(shares, x, strict=True)]).sum(0)

        mean = average(means)
        return torch.stack((mean, average(deviations.square() + (means - mean).square()).sqrt()), dim=-1)

    def _encode(self, frames: Sequence[Tensor]) -> Tensor:
        """The motion latents of a chunk's last frames."""
        return self._encode_rows(torch.cat(list(frames)).to(self._vae_dtype))

    def _encode_rows(self, clip: Tensor) -> Tensor:
        """The latents of a clip, whole on every rank; among several ranks, the clip is this one's rows."""
        latents = torch.cat(list(self.models.vae.encode(clip, self._rows)))
        return latents if self._rows is None else self._rows.gather(latents).contiguous()

    # --- What runs beside the current stream -------------------------------------------------------------------------

    def _encode_audio_early(self, window: Tensor) -> Audio:
        """The chunk's audio keys and values, as soon as the last chunk's steps have read theirs.

        If the last chunk was abandoned before its steps were launched, after everything that the current stream has.
        """
        after, self._last_step = self._last_step, None
        with self.audio_stream.fork(after):
            audio = self._encode_audio(self._static_window(window)[None])
        self.audio_stream.join(audio)
        return audio

    def _decode_motion(self, motion: Tensor) -> tuple[int, VAECache | None]:
        """Decodes the motion latents that make whole decode steps, whose frames nobody sees, beside the current stream.

        Returns how many decode steps that were and the VAE's cache after them, for use after `_decode_stream.join()`.
        """
        steps = [g for g in self._decode_steps if g.latents.stop <= len(motion) and not g.emit]
        cache = None
        with self._decode_stream.fork():
            for step, group in enumerate(steps):
                _, cache = self._decode_step(step, motion[group.latents], cache)
        return len(steps), cache

    # --- Inputs of graphs --------------------------------------------------------------------------------------------

    def _input(self, constant: bool = False) -> Callable[[T], T]:
        """What moves inputs to the device: into static memory where stages are captured."""
        device = self.models.device
        if self._captured:
            return StaticInput(device, constant)
        return lambda inputs: tree_map(lambda x: x.to(device), inputs)

    def _counters(self, state: State) -> tuple[Any, Any]:
        """Seed and index of the chunk: numbers, or int64 tensors [] where the noise is part of a graph."""
        if not self._captured:
            return state.seed, state.chunk
        signed = (state.seed + 2**63) % 2**64 - 2**63
        return self._static_counters((torch.tensor(signed), torch.tensor(state.chunk)))

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.models.vae.parameters()).dtype


def frames_of(units: Generator[Frames | None, None, State]) -> Generator[Frames, None, State]:
    """The frames among the units of a chunk, and what they return."""
    while True:
        try:
            unit = next(units)
        except StopIteration as end:
            return end.value
        if unit is not None:
            yield unit
