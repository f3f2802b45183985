"""Trains the student: a chunk in four steps, from the teacher's trajectories, on motion frames of its own.

The training plays BATCH streams, a chunk at each step, and starts new ones after some CHUNKS chunks. The student
generates every chunk as the product does, so the motion latents are its own, with its own faults. From there the
teacher, which was trained on true motion, follows its trajectory from noise to latents x0 in many guided steps. At the
four noise levels s of the product's sampler the student must then jump to the same end,

    loss = || x_s - s v(x_s, 1000 s, conditions) - x0 ||^2 / s^2     for x_s on the trajectory.

So it learns what guidance does, sharp pictures at the first steps, and to correct what went wrong in chunks before.
This is trajectory regression, not the paper's distribution matching.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import TINY
from model.distill.codec import as_bytes
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.face import MOUTH
from model.distill.metrics import lip_sync, sharpness
from model.distill.reader import Reader, load_reader
from model.distill.student_network import load_network, save_network, velocities
from model.distill.takes import STRIDE, Batch, Take, join, load_takes
from model.distill.teacher import (
    GUIDANCE,
    SHIFT,
    STAGES,
    Codec,
    conditions,
    mouth_cells,
)
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, timesteps

WEIGHTS = "student.safetensors"
CHUNKS = 8  # of a stream, on average
BATCH = 2
RATE = 4e-4
STEPS = TINY.chunk.sample_steps
TEACHER_STEPS = 2 * STEPS  # every second one is at a level of the student's
MOUTH_WEIGHT = STAGES["streaming"].mouth_weight
EVALUATION_TAKES = 12
LATEST = 5
NEXT = TINY.chunk.new_frames // STRIDE  # how many starts later the next chunk of a take begins


class Draw(NamedTuple):
    """The random choices of a step."""

    renew: bool  # new streams begin
    takes: tuple[int, ...]  # one for each stream that needs a new one


class Chunk(NamedTuple):
    """What the next chunk of each stream is generated from."""

    motion: Tensor  # [B, n, z, h, w]
    portraits: Tensor  # [B, z, h, w]
    audio: Tensor  # [B, frames, window, 1, 6]
    centres: Tensor  # of the mouths, on average, [B, 1, 2]


class Streams:
    """Streams of people who talk. A take has two chunks, so after every second one the voice is another take's.

    What leads to the next chunk is in `state_dict`, so that a resumed training goes on with the same streams.
    """

    def __init__(self, takes: Sequence[Take]) -> None:
        self._takes = takes
        self._state: dict[str, Any] = {}

    def draw(self, rng: np.random.Generator) -> Draw:
        """The random choices of a step, whatever the streams are at."""
        return Draw(rng.random() < 1 / CHUNKS, tuple(rng.integers(len(self._takes), size=BATCH).tolist()))

    def next(self, draw: Draw) -> Chunk:
        """What the next chunk of each stream is generated from. After it comes `move_on`."""
        state = self._state
        if not state or draw.renew:
            new = join([self._takes[i].chunk(0) for i in draw.takes])
            state.update(
                motion=new.portraits[:, None], portraits=new.portraits, centres=new.centres.mean(1, keepdim=True)
            )
        if not state.get("second") or draw.renew:
            state.update(takes=draw.takes, second=False)
        heard = join([self._takes[i].chunk(NEXT if state["second"] else 0) for i in state["takes"]])
        return Chunk(state["motion"], state["portraits"], heard.audio, state["centres"])

    def move_on(self, motion: Tensor) -> None:
        """Each stream continues with these motion latents [B, n, z, h, w]."""
        self._state.update(motion=motion, second=not self._state["second"])

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was called."""
        self._state = state


def clean(x: Tensor, level: float | Tensor, v: Tensor) -> Tensor:
    """The latents that a velocity points to, x - level v."""
    return x - level * v


@torch.no_grad()
def generate(dit: DiT, motion: Tensor, condition: Tensor, audio: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of chunks by the product's sampler, with fresh noise after each step; `motion` [B, n, z, h, w]."""
    levels = (timesteps(STEPS, SHIFT) / NUM_TIMESTEPS).tolist()
    shape, n = (*condition.shape[:2], *motion.shape[2:]), motion.shape[1]
    x = torch.randn(shape, generator=generator)
    for level, following in pairwise(levels):
        x[:, :n] = motion
        v = velocities(dit, x, condition, torch.full((len(x),), NUM_TIMESTEPS * level), audio)
        x = (1 - following) * clean(x, level, v) + following * torch.randn(shape, generator=generator)
    x[:, :n] = motion
    return x


@torch.no_grad()
def next_motion(latents: Tensor, codec: Codec) -> Tensor:
    """The motion latents after a chunk: its last frames, decoded and encoded again.

    The decoder sees the last LATEST latent frames only, which changes these frames by .2 levels of 255 on average (root
    mean square).
    """
    frames = decode_clips(codec.vae, latents[:, -LATEST:].transpose(1, 2)).clamp(-1, 1)
    return encode_clips(codec.vae, frames[:, :, -TINY.chunk.motion_frames_num :]).transpose(1, 2)


@torch.no_grad()
def trajectory(
    teacher: DiT, motion: Tensor, condition: Tensor, audio: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The teacher's latents at each of the student's levels, the noisiest first, and those at the end."""
    levels = (timesteps(TEACHER_STEPS, SHIFT) / NUM_TIMESTEPS).tolist()
    x = torch.randn(*condition.shape[:2], *motion.shape[2:], generator=generator)
    passed, n = [], motion.shape[1]
    both, heard = torch.cat((condition, condition)), torch.cat((audio, torch.zeros_like(audio)))
    for i, (level, following) in enumerate(pairwise(levels)):
        x[:, :n] = motion
        if i % (TEACHER_STEPS // STEPS) == 0:
            passed.append(x.clone())
        times = torch.full((2 * len(x),), NUM_TIMESTEPS * level)
        v, silent = velocities(teacher, torch.cat((x, x)), both, times, heard).chunk(2)
        x = x - (level - following) * (silent + GUIDANCE * (v - silent))
    x[:, :n] = motion
    return passed, x


def student_loss(dit: DiT, teacher: DiT, streams: Streams, draw: Draw, codec: Codec) -> tuple[Tensor, dict[str, float]]:
    """The loss of the next chunk of the streams, at all four levels."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    chunk, frames = streams.next(draw), 1 + (TINY.chunk.frame_num - 1) // STRIDE
    condition = conditions(chunk.portraits, codec.grey, frames)
    streams.move_on(next_motion(generate(dit, chunk.motion, condition, chunk.audio, generator), codec))
    passed, end = trajectory(teacher, chunk.motion, condition, chunk.audio, generator)
    levels = timesteps(STEPS, SHIFT)[:-1] / NUM_TIMESTEPS
    count, n = len(end), chunk.motion.shape[1]
    level = levels.repeat_interleave(count)
    repeated = [torch.cat([part] * STEPS) for part in (condition, chunk.audio, end)]
    x = torch.cat(passed)
    v = velocities(dit, x, repeated[0], NUM_TIMESTEPS * level, repeated[1])
    error = (clean(x, level.view(-1, 1, 1, 1, 1), v) - repeated[2])[:, n:]
    centres = chunk.centres.expand(-1, TINY.chunk.frame_num, -1)
    weight = 1 + (MOUTH_WEIGHT - 1) * mouth_cells(centres, end.shape[-1])[:, n:]
    weight = weight * codec.deviation.view(-1, 1, 1) ** STAGES["streaming"].channel_power
    weight = torch.cat([weight] * STEPS)
    squares = (weight * error.square()).flatten(1).sum(1) / weight.flatten(1).sum(1)
    by_level = squares.view(STEPS, count).mean(1)
    numbers = {f"loss at {s:.3g}": x for s, x in zip(levels.tolist(), by_level.tolist(), strict=True)}
    return (by_level / levels.square()).mean(), numbers


def second_chunks(dit: DiT, takes: Sequence[Take], codec: Codec) -> tuple[Tensor, Batch]:
    """The second chunks of streams of held-out takes, on the student's own motion, and their truth."""
    first, second = (join([take.chunk(start) for take in takes]) for start in (0, NEXT))
    generator = torch.Generator().manual_seed(0)
    condition = conditions(first.portraits, codec.grey, first.latents.shape[1])
    latents = generate(dit, first.portraits[:, None], condition, first.audio, generator)
    return generate(dit, next_motion(latents, codec), condition, second.audio, generator), second


def judged(latents: Tensor, truth: Batch, codec: Codec, eyes: Reader) -> dict[str, float]:
    """How well mouths follow the truth, and how sharp new frames are beside the decoded portrait.

    The head may be elsewhere than in the truth, so the reader finds the mouth.
    """
    clips = [as_bytes(decode_clips(codec.vae, one.transpose(0, 1)[None]))[1 + STRIDE :] for one in latents]
    portraits = [as_bytes(decode_clips(codec.vae, one[None, :, None]))[0] for one in truth.portraits]
    read = [eyes.read(frames).mouth for frames in clips]
    found = lip_sync(read, [mouth.numpy() for mouth in truth.mouths[:, 1 + STRIDE :]], MOUTH)
    sharp = np.mean([sharpness(frames, portrait).mean() for frames, portrait in zip(clips, portraits, strict=True)])
    return {f"r {name}": found[name].r.value for name in ("open", "wide", "close")} | {"sharpness": float(sharp)}


def train(
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    teacher: Path = Path("out/teacher/teacher.safetensors"),
    takes: Path = Path("out/takes"),
    start: Path | None = None,
    codec: Path | None = None,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains a student in `folder`, and writes `student.safetensors` there when the budget is used up.

    Args:
        folder: For the checkpoint, curves and the result, see `model.distill.training.train`.
        budget: How long.
        seed: Of every random choice.
        resume: Continues the training in `folder`.
        teacher: Weights that it learns from and, without `start`, begins with.
        takes: Folder with takes to train on, and held-out ones to measure on.
        start: Weights of a student to begin with.
        codec: Another codec than the shipped one; the one that the takes were made with.
        report: Gets lines of progress.

    Raises:
        UserError: As for `model.distill.training.train`, and if takes, codec or weights cannot be read.
    """
    torch.manual_seed(seed)
    numbers, wise = Codec.load(codec), load_network(teacher)
    dit = load_network(start or teacher)
    training, held_out = load_takes(takes), load_takes(takes, held_out=True)[:EVALUATION_TAKES]
    eyes = load_reader()
    streams = Streams(training)
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    task = Task(
        name="student",
        network=dit,
        optimizer=torch.optim.AdamW(trained, RATE, betas=(0.9, 0.99), weight_decay=0.01),
        batch=streams.draw,
        loss=lambda draw: student_loss(dit, wise, streams, draw, numbers),
        evaluate=lambda _: judged(*second_chunks(dit, held_out, numbers), numbers, eyes),
        state=streams,
    )
    counters = run_training(task, folder, budget, seed, resume, evaluate_every=100, report=report)
    save_network(dit, folder / WEIGHTS)
    return counters
