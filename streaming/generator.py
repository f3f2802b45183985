"""The chunk loop: a known state and a window of audio in, frames out as they are decoded, the next state at the end.

    window -> audio K/V -> 4 steps of the student over noise, the motion latents written back each time
                           meanwhile, VAE decode of the motion latents, which are known
           -> VAE decode of the others, the first new one alone, then two by two -> colour -> frames
           -> the last motion frames, encoded again -> next state

Everything that varies is in `State`, everything that is constant for a portrait and a prompt in `Conditions`: the same
two and the same window give the same frames, on any machine count and after any restart.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.color import lab_statistics, lab_transfer
from model.checkpoint import Models
from model.dit import ContextKV, rope_table
from model.image import to_pixels
from model.sampler import denoise, normal_noise, timesteps
from model.tensors import visiting
from model.vae import State as VAEState
from streaming.spans import Spans

TOGETHER = 2  # latents decoded in one step, once frames are on their way: larger launches, less often

Noise = Callable[[int, int, int], Tensor]  # (seed, chunk, draw) -> standard normal [F, 16, h, w]


@dataclass(frozen=True)
class Conditions:
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
    """Frames of a video, on the device."""

    pixels: Tensor  # float32 [n, 3, height, width] in [-1, 1]
    rgb: Tensor  # the same, uint8 [n, height, width, 3]


class ChunkGenerator:
    """Generates chunks with the models and geometry of `models.config`; holds constants only."""

    def __init__(self, models: Models, spans: Spans, noise: Noise | None = None) -> None:
        """`noise` replaces the counter-based noise, to follow a recorded run."""
        config = models.config
        self.models, self.config, self._spans = models, config, spans
        with torch.inference_mode():
            self._times = timesteps(config.chunk.sample_steps, config.chunk.sample_shift)
            self._modulations = [models.dit.modulate(t) for t in self._times[:-1].tolist()]
            self._rope = rope_table(config.grid, config.dit.head_dim, models.device)
        self._noise = noise or partial(normal_noise, config.latent_shape, device=models.device)
        self._aside = torch.cuda.Stream(models.device) if models.device.type == "cuda" else None

    @torch.inference_mode()
    def prepare(self, image: Tensor, ids: Tensor) -> Conditions:
        """The conditions of a portrait, uint8 [3, height, width] of the chunk's size, and a prompt's token ids [L]."""
        models, chunk = self.models, self.config.chunk
        if image.shape != (3, chunk.height, chunk.width):
            raise ValueError(f"image: got {list(image.shape)}, want [3, {chunk.height}, {chunk.width}]")
        portrait = to_pixels(image).to(models.device)
        with visiting(models.device, models.text):
            text = models.text(ids.to(models.device))
        with visiting(models.device, models.image):
            features = models.image(portrait)
        context = models.dit.embed_context(text, features)
        # The clip that the condition latents describe: the portrait, then mid grey.
        clip = torch.zeros(chunk.frame_num, *portrait.shape, dtype=self._vae_dtype, device=models.device)
        clip[0] = portrait
        latents = torch.cat(list(models.vae.encode(clip)))
        condition = torch.cat((first_frame_mask(latents, self.config.dit.vae_scale), latents), dim=1)
        # The encoder is causal, so the clip's first latent is that of the portrait alone.
        return Conditions(context, condition, lab_statistics(portrait[None]), latents[:1])

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
        models, chunk, spans = self.models, self.config.chunk, self._spans
        with spans.span("audio"):
            audio = models.dit.embed_audio(window[None].to(models.device))

        first_shown, first_fed_back = chunk.motion_frames_num, chunk.frame_num - chunk.motion_frames_num
        known: list[tuple[int, int, VAEState | None]] = []

        def velocity(i: int, latents: Tensor) -> Tensor:
            with spans.span("denoise/step"):
                out = models.dit(
                    latents, conditions.condition, self._modulations[i], self._rope, conditions.context, audio,
                    known=len(state.motion),
                )  # fmt: skip
            if i == 0:  # once the student is at work, so that it need not wait for these launches
                known.append(self._decode_unseen(state.motion, min(first_shown, first_fed_back)))
            return out

        latents = denoise(velocity, partial(self._noise, state.seed, state.chunk), self._times, state.motion)
        if self._aside is not None:
            torch.cuda.current_stream().wait_stream(self._aside)
        [(done, end, past)], fed_back = known, []
        unseen, stride = min(first_shown, first_fed_back), self.config.vae.temporal_stride
        while done < len(latents):  # one by one until something is shown, so that it comes early
            group = latents[done : done + (1 if end <= unseen else TOGETHER)].to(self._vae_dtype)
            begin, end = end, end + (stride * len(group) if end else 1)
            done, seen = done + len(group), end > unseen
            with spans.span("decode"):
                frames, past = models.vae.decode_step(group, past, seen)
            if not seen:
                continue
            with spans.span("color"):
                frames, rgb = lab_transfer(frames, *conditions.lab, chunk.color_correction_strength)
            fed_back.append(frames[max(first_fed_back - begin, 0) :])
            if end > first_shown:
                shown = max(first_shown - begin, 0)
                yield Frames(frames[shown:], rgb[shown:])
        with spans.span("motion"):
            motion = torch.cat(list(models.vae.encode(torch.cat(fed_back).to(self._vae_dtype))))
        return State(state.seed, state.chunk + 1, motion)

    def _decode_unseen(self, motion: Tensor, frames: int) -> tuple[int, int, VAEState | None]:
        """How many of these latents lie before that frame as a whole, their frames, and the VAE's state after them.

        On a GPU beside what has been launched, and to be waited for.
        """
        done, end, past = 0, 0, None
        with nullcontext() if self._aside is None else self._beside(self._aside):
            for latent in motion.to(self._vae_dtype):
                count = self.config.vae.temporal_stride if done else 1
                if end + count > frames:
                    break
                with self._spans.span("decode"):
                    _, past = self.models.vae.decode_step(latent[None], past, shown=False)
                done, end = done + 1, end + count
        return done, end, past

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
