"""Trains the student: a chunk in four steps, from the teacher's trajectories, on motion frames of its own.

A sample is the last of up to CHUNKS chunks of a stream. The student generates those before it as the product does, so
the motion latents are its own, with its own faults. From there the teacher, which was trained on true motion, follows
its trajectory from noise to latents x0 in many guided steps. At the four noise levels s of the product's sampler the
student must then jump to the same end,

    loss = || x_s - s v(x_s, 1000 s, conditions) - x0 ||^2     for x_s on the trajectory.

So it learns what guidance does, sharp pictures at the first steps, and to correct what went wrong in chunks before.
This is trajectory regression, not the paper's distribution matching.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import TINY
from model.distill.codec import as_bytes
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.face import MOUTH
from model.distill.metrics import lip_sync
from model.distill.reader import Reader, load_reader
from model.distill.student_network import velocities
from model.distill.takes import STRIDE, Batch, Take, join, load_takes
from model.distill.teacher import (
    GUIDANCE,
    SHIFT,
    STAGES,
    Codec,
    conditions,
    load_teacher,
    mouth_cells,
    save_teacher,
)
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, timesteps

WEIGHTS = "student.safetensors"
CHUNKS = 3
BATCH = 2
RATE = 2e-4
STEPS = TINY.chunk.sample_steps
TEACHER_STEPS = 2 * STEPS  # every second one is at a level of the student's
MOUTH_WEIGHT = STAGES["streaming"].mouth_weight
EVALUATION_TAKES = 12
NEXT = TINY.chunk.new_frames // STRIDE  # how many starts later the next chunk of a take begins


class Stream(NamedTuple):
    """Portraits and what their chunks hear."""

    portraits: Tensor  # [B, z, h, w]
    audio: tuple[Tensor, ...]  # of each chunk, [B, frames, window, 1, 6]
    centres: Tensor  # of the last chunk's true mouths, [B, frames, 2]


def draw(takes: Sequence[Take], rng: np.random.Generator) -> Stream:
    """Streams of up to CHUNKS chunks. After the second, the voice is another take's, as a take has only two."""
    count, streams = int(rng.integers(1, CHUNKS + 1)), []
    for _ in range(BATCH):
        chosen = [takes[int(rng.integers(len(takes)))] for _ in range(-(-count // 2))]
        streams.append([take.chunk(start) for take in chosen for start in (0, NEXT)][:count])
    portraits = torch.cat([chunks[0].portraits for chunks in streams])
    audio = tuple(torch.cat([chunks[i].audio for chunks in streams]) for i in range(count))
    return Stream(portraits, audio, torch.cat([chunks[-1].centres for chunks in streams]))


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
    """The motion latents after a chunk: its last frames, decoded and encoded again."""
    frames = decode_clips(codec.vae, latents.transpose(1, 2)).clamp(-1, 1)
    return encode_clips(codec.vae, frames[:, :, -TINY.chunk.motion_frames_num :]).transpose(1, 2)


@torch.no_grad()
def trajectory(
    teacher: DiT, motion: Tensor, condition: Tensor, audio: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The teacher's latents at each of the student's levels, the noisiest first, and those at the end."""
    levels = (even_timesteps(TEACHER_STEPS) / NUM_TIMESTEPS).tolist()
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


def even_timesteps(count: int) -> Tensor:
    """Timesteps that are even before the shift, [count + 1], the last one 0."""
    u = torch.linspace(1, 0, count + 1)
    return SHIFT * u / (1 + (SHIFT - 1) * u) * NUM_TIMESTEPS


def student_loss(dit: DiT, teacher: DiT, stream: Stream, codec: Codec) -> tuple[Tensor, dict[str, float]]:
    """The loss of the last chunk of streams, at all four levels."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    frames = 1 + (TINY.chunk.frame_num - 1) // STRIDE
    condition = conditions(stream.portraits, codec.grey, frames)
    motion = stream.portraits[:, None]
    for audio in stream.audio[:-1]:
        motion = next_motion(generate(dit, motion, condition, audio, generator), codec)
    passed, end = trajectory(teacher, motion, condition, stream.audio[-1], generator)
    levels = timesteps(STEPS, SHIFT)[:-1] / NUM_TIMESTEPS
    count, n = len(end), motion.shape[1]
    level = levels.repeat_interleave(count)
    repeated = [torch.cat([part] * STEPS) for part in (condition, stream.audio[-1], end)]
    x = torch.cat(passed)
    v = velocities(dit, x, repeated[0], NUM_TIMESTEPS * level, repeated[1])
    error = (clean(x, level.view(-1, 1, 1, 1, 1), v) - repeated[2])[:, n:]
    weight = 1 + (MOUTH_WEIGHT - 1) * mouth_cells(stream.centres, end.shape[-1])[:, n:]
    weight = weight * codec.deviation.view(-1, 1, 1) ** STAGES["streaming"].channel_power
    weight = torch.cat([weight] * STEPS)
    squares = (weight * error.square()).flatten(1).sum(1) / weight.flatten(1).sum(1)
    by_level = squares.detach().view(STEPS, count).mean(1)
    return squares.mean(), {f"loss at {s:.3g}": x for s, x in zip(levels.tolist(), by_level.tolist(), strict=True)}


def second_chunks(dit: DiT, takes: Sequence[Take], codec: Codec) -> tuple[Tensor, Batch]:
    """The second chunks of streams of held-out takes, on the student's own motion, and their truth."""
    first, second = (join([take.chunk(start) for take in takes]) for start in (0, NEXT))
    generator = torch.Generator().manual_seed(0)
    condition = conditions(first.portraits, codec.grey, first.latents.shape[1])
    latents = generate(dit, first.portraits[:, None], condition, first.audio, generator)
    return generate(dit, next_motion(latents, codec), condition, second.audio, generator), second


def followed(latents: Tensor, truth: Batch, codec: Codec, eyes: Reader) -> dict[str, float]:
    """How well mouths follow the truth. The head may be elsewhere than in the truth, so the reader finds the mouth."""
    frames = (as_bytes(decode_clips(codec.vae, one.transpose(0, 1)[None])) for one in latents)
    read = [eyes.read(pictures[1 + STRIDE :]).mouth for pictures in frames]
    found = lip_sync(read, [mouth.numpy() for mouth in truth.mouths[:, 1 + STRIDE :]], MOUTH)
    return {f"r {name}": found[name].r.value for name in ("open", "wide", "close")}


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
    numbers, wise = Codec.load(codec), load_teacher(teacher)
    dit = load_teacher(start or teacher)
    training, held_out = load_takes(takes), load_takes(takes, held_out=True)[:EVALUATION_TAKES]
    eyes = load_reader()
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    task = Task(
        name="student",
        network=dit,
        optimizer=torch.optim.AdamW(trained, RATE, betas=(0.9, 0.99), weight_decay=0.01),
        batch=lambda rng: draw(training, rng),
        loss=lambda stream: student_loss(dit, wise, stream, numbers),
        evaluate=lambda _: followed(*second_chunks(dit, held_out, numbers), numbers, eyes),
    )
    counters = run_training(task, folder, budget, seed, resume, evaluate_every=100, report=report)
    save_teacher(dit, folder / WEIGHTS)
    return counters
