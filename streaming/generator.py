"""The chunk loop: a known state and a window of audio in, frames out as they are decoded, the next state at the end.

    window -> audio K/V, beside the last chunk's decoding
           -> 4 steps of the student over noise, the motion latents written back each time
              meanwhile, VAE decode of the motion latents, which are known
           -> VAE decode of the others, the first new one alone, then two by two -> colour -> frames
           -> the last motion frames, encoded again -> next state

Everything that varies is in `State`, everything that is constant for a portrait and a prompt in `Conditions`: the same
two and the same window give the same frames, on any machine count and after any restart.

A chunk's work does not depend on its values, so on a GPU each of its stages may be recorded as a CUDA graph: from the
third chunk on nothing is allocated or compiled any more, and the GPU waits for no launch.
"""

from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kernels.lab_transfer import lab_statistics, lab_transfer
from model.checkpoint import Models
from model.dit import AudioKV, ContextKV, rope_table
from model.image import to_pixels
from model.sampler import denoise_step, first_latents, normal_noise, timesteps
from model.tensors import visiting
from model.vae import Group, decode_groups
from model.vae import State as VAEState
from streaming.spans import Spans
from streaming.stages import Lane, Record, Stages

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
    """What a chunk's steps read."""

    seed: int | Tensor
    chunk: int | Tensor
    motion: Tensor
    conditions: Conditions
    audio: AudioKV


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
        self.early = Lane(models.device)  # for what a chunk needs that does not depend on the chunk before
        self._aside = Lane(models.device)
        self._stepped: torch.cuda.Event | None = None  # the last chunk's last step is done
        self._conditions: Conditions | None = None  # of the last chunk
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
        given = self._given(conditions, state, window)
        student = partial(self._stage, self._student, len(given.motion))
        x = student("denoise/step", 0, partial(self._first_step, given))
        # Once the student is at work, so that it need not wait for these launches.
        known, past = self._decode_known(given.motion)
        for i in range(1, len(self._modulations)):
            x = student("denoise/step", i, partial(self._step, i, x, given))
        x = self._placed(self._coder, "latents", x)  # the student may begin another chunk while they are read
        self._stepped = self.early.mark()
        self._aside.join()
        motion = yield from self._frames(known, x, past, given)
        return State(state.seed, state.chunk + 1, motion)

    def _given(self, conditions: Conditions, state: State, window: Tensor) -> Given:
        """What the chunk's steps read, where they may read it.

        What does not depend on the motion latents is made beside the decoding of the chunk before.
        """
        known, student = len(state.motion), self._student
        if conditions is not self._conditions:
            self._aside.join()  # the last frames may not have been drawn yet, and be the former portrait's
            self._conditions, self._stepped = conditions, None
        conditions = self._placed(student, "conditions", conditions, constant=True)
        with self.early.turn(self._stepped):
            seed, chunk = state.seed, state.chunk
            if student.recording:
                signed = (seed + 2**63) % 2**64 - 2**63
                seed, chunk = self._placed(student, "counters", (torch.tensor(signed), torch.tensor(chunk)))
            window = self._placed(student, "window", window)
            audio = self._stage(student, known, "audio", 0, lambda: self.models.dit.embed_audio(window[None]))
        self.early.join(audio)  # what is heard next does not wait until the steps have read them
        motion = self._placed(student, ("motion", known), state.motion)
        return Given(seed, chunk, motion, conditions, audio)

    def _placed(self, stages: Stages, key: Hashable, inputs: T, constant: bool = False) -> T:
        """Inputs of stages where these may read them in every chunk, on the device."""
        if stages.recording:
            return stages.hold(key, inputs, self.models.device, constant)
        return tree_map(lambda x: x.to(self.models.device), inputs)

    def _stage(self, stages: Stages, known: int, name: str, number: Hashable, work: Callable[[], T]) -> T:
        """Runs a stage of a chunk that begins with so many known latents; what the number is of, the name says."""
        with self._spans.span(name):
            return stages.run((known, name, number), work)

    def _first_step(self, given: Given) -> Tensor:
        return self._step(0, first_latents(partial(self._noise, given.seed, given.chunk), given.motion), given)

    def _step(self, i: int, x: Tensor, given: Given) -> Tensor:
        """The latents after step i from those before it."""
        dit, (context, condition, *_) = self.models.dit, given.conditions

        def velocity(x: Tensor) -> Tensor:
            return dit(x, condition, self._modulations[i], self._rope, context, given.audio, known=len(given.motion))

        return denoise_step(i, x, velocity, partial(self._noise, given.seed, given.chunk), self._times, given.motion)

    def _decode_known(self, motion: Tensor) -> tuple[int, VAEState | None]:
        """Decodes the groups of unseen frames that these latents make; how many, and the VAE's state after them.

        On a GPU beside what has been launched, and to be waited for.
        """
        known = sum(group.latents.stop <= len(motion) and not group.shown for group in self._groups)
        past = None
        with self._aside.turn():
            for group in self._groups[:known]:
                work = partial(self._decode, group, motion[group.latents], past)
                _, past = self._stage(self._coder, len(motion), "decode", group.latents.start, work)
        return known, past

    def _frames(self, known: int, x: Tensor, past: VAEState | None, given: Given) -> Generator[Frames, None, Tensor]:
        """The frames of latents x behind the known groups as they are shown; the next motion latents at the end."""
        chunk, coder = self.config.chunk, partial(self._stage, self._coder, len(given.motion))
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
        return motion.clone()  # a recorded stage's results do not stay

    def _decode(self, group: Group, latents: Tensor, past: VAEState | None) -> tuple[Tensor, VAEState]:
        return self.models.vae.decode_step(latents.to(self._vae_dtype), past, group.shown)

    def _correct(self, frames: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        return lab_transfer(frames, *given.conditions.lab, self.config.chunk.color_correction_strength)

    def _encode(self, frames: list[Tensor]) -> Tensor:
        return torch.cat(list(self.models.vae.encode(torch.cat(frames).to(self._vae_dtype))))

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.models.vae.parameters()).dtype
