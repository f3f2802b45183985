"""The chunk loop: a known state and a window of audio in, frames out as they are decoded, the next state at the end.

    window -> audio K/V -> 4 steps of the student over noise, the motion latents written back each time
                           meanwhile, VAE decode of the motion latents, which are known
           -> VAE decode of the others, the first new one alone, then two by two -> colour -> frames
           -> the last motion frames, encoded again -> next state

Everything that varies is in `State`, everything that is constant for a portrait and a prompt in `Conditions`: the same
two and the same window give the same frames, on any machine count and after any restart.

A chunk's work does not depend on its values, so on a GPU each of its stages may be recorded as a CUDA graph: from the
third chunk on nothing is allocated or compiled any more, and the GPU waits for no launch.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kernels.color import lab_statistics, lab_transfer
from model.checkpoint import Models
from model.dit import AudioKV, ContextKV, rope_table
from model.image import to_pixels
from model.sampler import denoise_step, first_latents, normal_noise, timesteps
from model.tensors import visiting
from model.vae import Group, decode_groups
from model.vae import State as VAEState
from streaming.spans import Spans
from streaming.stages import Record, Stages

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
    """All that one chunk hands to the next."""

    seed: int
    chunk: int  # index of the chunk to come
    motion: Tensor  # motion latents it begins with [n, 16, h, w]


def first_frame_mask(latents: Tensor, channels: int) -> Tensor:
    """The mask [F, channels, h, w] of latents [F, 16, h, w]: 1 where the condition is a picture, in latent frame 0.

    It stays so in every chunk, also when several motion latents are given.
    """
    mask = torch.zeros_like(latents[:, :1]).repeat(1, channels, 1, 1)
    mask[0] = 1
    return mask


class Frames(NamedTuple):
    """Frames of a video, on the device; there until the next group is asked for."""

    pixels: Tensor  # float32 [n, 3, height, width] in [-1, 1]
    rgb: Tensor  # the same, uint8 [n, height, width, 3]


class Given(NamedTuple):
    """What a chunk's stages read."""

    seed: int | Tensor
    chunk: int | Tensor
    motion: Tensor
    window: Tensor
    conditions: Conditions


class ChunkGenerator:
    """Generates chunks with the models and geometry of `models.config`, one after the other."""

    def __init__(
        self,
        models: Models,
        spans: Spans,
        noise: Noise | None = None,
        record: Callable[[], Record] | None = None,
    ) -> None:
        """`noise` replaces the counter-based noise, to follow a recorded run.

        `record` makes what records stages, see `streaming.stages`, once for each network, as the two of them may run at
        the same time; None: none is recorded.
        """
        config = models.config
        self.models, self.config, self._spans = models, config, spans
        with torch.inference_mode():
            self._times = timesteps(config.chunk.sample_steps, config.chunk.sample_shift)
            self._modulations = [models.dit.modulate(t) for t in self._times[:-1].tolist()]
            self._rope = rope_table(config.grid, config.dit.head_dim, models.device)
        latents, stride = config.latent_shape[0], config.vae.temporal_stride
        self._groups = tuple(decode_groups(latents, config.chunk.unseen_frames, stride))
        self._noise = noise or partial(normal_noise, config.latent_shape, device=models.device)
        self._aside = torch.cuda.Stream(models.device) if models.device.type == "cuda" else None
        self._student, self._coder = (Stages(record() if record else None) for _ in range(2))

    @torch.inference_mode()
    def prepare(self, image: Tensor, ids: Tensor) -> Conditions:
        """The conditions of a portrait, uint8 [3, height, width] of the chunk's size, and a prompt's token ids [L]."""
        models, chunk = self.models, self.config.chunk
        if image.shape != (3, chunk.height, chunk.width):
            raise ValueError(f"image: got {list(image.shape)}, want [3, {chunk.height}, {chunk.width}]")
        portrait = to_pixels(image).to(models.device)
        text = models.text(ids)
        with visiting(models.device, models.image):
            features = models.image(portrait)
        context = models.dit.embed_context(text, features)
        # The clip that the condition latents describe: the portrait, then mid grey.
        clip = torch.zeros(chunk.frame_num, *portrait.shape, dtype=self._vae_dtype, device=models.device)
        clip[0] = portrait
        latents = torch.cat(list(models.vae.encode(clip)))
        condition = torch.cat((first_frame_mask(latents, self.config.dit.vae_scale), latents), dim=1)
        # The encoder is causal, so the clip's first latent is that of the portrait alone.
        return self.parked(Conditions(context, condition, lab_statistics(portrait[None]), latents[:1]))

    def parked(self, conditions: Conditions) -> Conditions:
        """The conditions in the host's memory, if recorded stages have a place of their own for them on the device."""
        if not self._student.recording or self.models.device.type == "cpu":
            return conditions
        return tree_map(lambda x: x.cpu().pin_memory(), conditions)

    def start(self, conditions: Conditions, seed: int) -> State:
        """The state before the first chunk."""
        return State(seed, 0, conditions.motion)

    @torch.inference_mode()
    def chunk(self, conditions: Conditions, state: State, window: Tensor) -> Generator[Frames, None, State]:
        """Yields a chunk's new frames; returns the next state.

        window [frame_num, window, layer, channel]: the speech features around each of the chunk's frames. Use as
        `state = yield from generator.chunk(...)`. Frames come in groups, each as soon as decoded: those of one latent,
        then of two at a time.
        """
        models, chunk = self.models, self.config.chunk
        given = self._given(conditions, state, window)
        student, coder = (partial(self._stage, stages, len(state.motion)) for stages in (self._student, self._coder))
        audio = student("audio", 0, partial(models.dit.embed_audio, given.window[None]))

        x = student("denoise/step", 0, partial(self._first_step, audio, given))
        # Once the student is at work, so that it need not wait for these launches.
        known, past = self._decode_known(given.motion)
        for i in range(1, len(self._modulations)):
            x = student("denoise/step", i, partial(self._step, i, x, audio, given))
        if self._aside is not None:
            torch.cuda.current_stream().wait_stream(self._aside)

        fed_back: list[Tensor] = []
        for group in self._groups[known:]:
            frames, past = coder("decode", group.latents.start, partial(self._decode, group, x[group.latents], past))
            if not group.shown:
                continue
            frames, rgb = coder("color", group.latents.start, partial(self._correct, frames, given))
            fed_back.append(frames[max(chunk.new_frames - group.frames.start, 0) :])
            if group.frames.stop > chunk.motion_frames_num:
                shown = max(chunk.motion_frames_num - group.frames.start, 0)
                yield Frames(frames[shown:], rgb[shown:])
        motion = coder("motion", 0, partial(self._encode, fed_back))
        return State(state.seed, state.chunk + 1, motion.clone())  # a recorded stage's results do not stay

    def _given(self, conditions: Conditions, state: State, window: Tensor) -> Given:
        """What the chunk's stages read, where they may read it."""
        device, known = self.models.device, len(state.motion)
        if not self._student.recording:
            return Given(state.seed, state.chunk, state.motion, window.to(device), conditions)
        signed = (state.seed + 2**63) % 2**64 - 2**63
        counters = (torch.tensor(number) for number in (signed, state.chunk))
        conditions = self._student.hold("conditions", conditions, device, constant=True)
        seed, chunk, motion, window = self._student.hold(known, (*counters, state.motion, window), device)
        return Given(seed, chunk, motion, window, conditions)

    def _stage(self, stages: Stages, known: int, name: str, number: int, work: Callable[[], T]) -> T:
        """Runs a stage of a chunk that begins with so many known latents; what the number is of, the name says."""
        with self._spans.span(name):
            return stages.run((known, name, number), work)

    def _first_step(self, audio: AudioKV, given: Given) -> Tensor:
        return self._step(0, first_latents(partial(self._noise, given.seed, given.chunk), given.motion), audio, given)

    def _step(self, i: int, x: Tensor, audio: AudioKV, given: Given) -> Tensor:
        """The latents after step i from those before it."""
        dit, (context, condition, *_) = self.models.dit, given.conditions

        def velocity(x: Tensor) -> Tensor:
            known = len(given.motion)
            return dit(x, condition, self._modulations[i], self._rope, context, audio, known=known)

        return denoise_step(i, x, velocity, partial(self._noise, given.seed, given.chunk), self._times, given.motion)

    def _decode(self, group: Group, latents: Tensor, past: VAEState | None) -> tuple[Tensor, VAEState]:
        return self.models.vae.decode_step(latents.to(self._vae_dtype), past, group.shown)

    def _decode_known(self, motion: Tensor) -> tuple[int, VAEState | None]:
        """Decodes the groups of unseen frames that these latents make; how many, and the VAE's state after them.

        On a GPU beside what has been launched, and to be waited for.
        """
        known = sum(group.latents.stop <= len(motion) and not group.shown for group in self._groups)
        past = None
        with nullcontext() if self._aside is None else self._beside(self._aside):
            for group in self._groups[:known]:
                work = partial(self._decode, group, motion[group.latents], past)
                _, past = self._stage(self._coder, len(motion), "decode", group.latents.start, work)
        return known, past

    def _correct(self, frames: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        return lab_transfer(frames, *given.conditions.lab, self.config.chunk.color_correction_strength)

    def _encode(self, frames: list[Tensor]) -> Tensor:
        return torch.cat(list(self.models.vae.encode(torch.cat(frames).to(self._vae_dtype))))

    @contextmanager
    def _beside(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """The body runs on that stream, after what the current one has been given so far.

        So memory that it took there before is free for it: the current stream has seen the last of it.
        """
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.models.vae.parameters()).dtype
