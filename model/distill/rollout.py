"""Streams that a student generates during its training: chunk after chunk, each on motion frames of its own.

A chunk is generated as the product does it: motion latents are written in before every step, and noise is added again
after it. So what goes wrong in a chunk is in the next one's motion latents, and the student can learn to correct it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from model.config import TINY
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.student_network import Context, velocities
from model.distill.takes import STARTS, STRIDE, Take, join
from model.distill.teacher import BEGINNING, Codec
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, timesteps

STEPS, SHIFT = TINY.chunk.sample_steps, TINY.chunk.sample_shift
LATEST = 5
NEXT = TINY.chunk.new_frames // STRIDE  # how many starts later the next chunk of a take begins


class Chunk(NamedTuple):
    """What the next chunk of each stream is generated from."""

    motion: Tensor  # [B, n, z, h, w]
    portraits: Tensor  # [B, z, h, w]
    audio: Tensor  # [B, frames, window, 1, 6]
    centres: Tensor  # of the mouths, [B, frames, 2], or on average, [B, 1, 2]


class Draw(NamedTuple):
    """The random choices of a step."""

    takes: tuple[int, ...]  # one for each stream
    starts: tuple[int, ...]  # where a chunk begins
    beginning: bool  # whether chunks follow one motion latent


class Source(Protocol):
    """Where the chunks of a training come from. Its state is saved, so that a resumed training has the same ones."""

    def draw(self, rng: np.random.Generator) -> Draw:
        """The random choices of a step."""
        ...

    def next(self, draw: Draw) -> Chunk:
        """What the next chunks are generated from. After it comes `move_on`."""
        ...

    def move_on(self, motion: Tensor) -> None:
        """What the student generated ends with these motion latents [B, n, z, h, w]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continues where `state_dict` was called."""
        ...


class Streams:
    """Streams of people who talk, on the student's own motion latents. After `length` chunks new ones begin.

    A take has two chunks, so after every second one the voice is another take's.
    """

    def __init__(self, takes: Sequence[Take], count: int, length: int) -> None:
        self._takes, self._count, self._length = takes, count, length
        self._state: dict[str, Any] = {"age": 0}

    def draw(self, rng: np.random.Generator) -> Draw:
        """A take for each stream, whatever the streams are at."""
        return Draw(tuple(rng.integers(len(self._takes), size=self._count).tolist()), (0,) * self._count, False)

    def next(self, draw: Draw) -> Chunk:
        """The next chunk of each stream."""
        state, age = self._state, self._state["age"] % self._length
        if age == 0:
            new = join([self._takes[i].chunk(0) for i in draw.takes])
            state |= {
                "motion": new.portraits[:, None],
                "portraits": new.portraits,
                "centres": new.centres.mean(1, keepdim=True),
            }
        if age % 2 == 0:
            state["takes"] = draw.takes
        heard = join([self._takes[i].chunk(NEXT * (age % 2)) for i in state["takes"]])
        return Chunk(state["motion"], state["portraits"], heard.audio, state["centres"])

    def move_on(self, motion: Tensor) -> None:
        """Each stream continues with these motion latents."""
        self._state |= {"motion": motion, "age": self._state["age"] + 1}

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was called."""
        self._state = state


class TrueMotion:
    """Single chunks of takes, which follow the take's own motion latents: two, or one as at a stream's beginning."""

    def __init__(self, takes: Sequence[Take], count: int) -> None:
        self._takes, self._count = takes, count

    def draw(self, rng: np.random.Generator) -> Draw:
        """A take and a start for each chunk."""
        takes, starts = (tuple(rng.integers(n, size=self._count).tolist()) for n in (len(self._takes), STARTS))
        return Draw(takes, starts, bool(rng.random() < BEGINNING))

    def next(self, draw: Draw) -> Chunk:
        """The chunks that were drawn."""
        batch = join([self._takes[i].chunk(start) for i, start in zip(draw.takes, draw.starts, strict=True)])
        if draw.beginning:
            return Chunk(batch.latents[:, :1], batch.latents[:, 0], batch.audio, batch.centres)
        return Chunk(batch.latents[:, :2], batch.portraits, batch.audio, batch.centres)

    def move_on(self, motion: Tensor) -> None:
        """Nothing follows."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a network is given besides noisy latents; `unprompted` is guided away from, where there are prompts."""

    motion: Tensor  # [B, n, z, h, w]
    condition: Tensor  # mask and condition latents, [B, F, 4 + z, h, w]
    audio: Tensor  # [B, frames, window, 1, 6]
    context: Context | None = None
    unprompted: Context | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents, [B, F, z, h, w]."""
        return (*self.condition.shape[:2], *self.motion.shape[2:])

    def with_motion(self, latents: Tensor) -> Tensor:
        """The latents with motion latents at the beginning."""
        return torch.cat((self.motion, latents[:, self.motion.shape[1] :]), 1)


def clean(x: Tensor, level: float | Tensor, v: Tensor) -> Tensor:
    """The latents that a velocity points to, x - level v."""
    return x - level * v


def sampled(
    dit: DiT,
    given: Conditions,
    generator: torch.Generator,
    levels: Sequence[float] = tuple((timesteps(STEPS, SHIFT) / NUM_TIMESTEPS).tolist()),
    exit_step: int | None = None,
    causal: bool = False,
    checkpoints: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Chunks by the product's sampler, with fresh noise after each step.

    Args:
        dit: the student.
        given: what the chunks are generated from.
        generator: of the noise, on the CPU.
        levels: noise levels, from 1 down to 0.
        exit_step: the step whose clean latents are wanted with their gradient.
        causal: whether the student has a causal mask.
        checkpoints: as for `velocities`.

    Returns:
        The latents at the end, without gradient, and the clean latents at the exit step, with it: x - s v(x). Both are
        [B, F, z, h, w].
    """
    device = given.condition.device
    x, kept = torch.randn(given.shape, generator=generator).to(device), None
    for step, (level, following) in enumerate(pairwise(levels)):
        x = given.with_motion(x)
        times = torch.full((len(x),), NUM_TIMESTEPS * level, device=device)
        with torch.set_grad_enabled(step == exit_step):
            v = velocities(dit, x, given.condition, times, given.audio, given.context, causal, checkpoints)
            x = clean(x, level, v)
        if step == exit_step:
            kept, x = x, x.detach()
        x = (1 - following) * x + following * torch.randn(given.shape, generator=generator).to(device)
    return given.with_motion(x), kept


@torch.no_grad()
def next_motion(latents: Tensor, codec: Codec) -> Tensor:
    """The motion latents after a chunk: its last frames, decoded and encoded again.

    The decoder sees the last LATEST latent frames only, which changes these frames by .2 levels of 255 on average (root
    mean square).
    """
    frames = decode_clips(codec.vae, latents[:, -LATEST:].transpose(1, 2)).clamp(-1, 1)
    return encode_clips(codec.vae, frames[:, :, -TINY.chunk.motion_frames_num :]).transpose(1, 2)
