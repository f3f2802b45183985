"""Trains the student: a chunk in four steps, from the teacher's trajectories, on motion frames of its own.

The training plays BATCH streams, a chunk at each step, and starts new ones after CHUNKS chunks. The student
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

import numpy as np
import torch
from torch import Tensor

from model.distill.codec import as_bytes
from model.distill.codec_network import decode_clips
from model.distill.face import MOUTH
from model.distill.metrics import lip_sync, sharpness
from model.distill.reader import Reader, load_reader
from model.distill.rollout import NEXT, SHIFT, STEPS, Conditions, Draw, Streams, clean, next_motion, sampled
from model.distill.student_network import load_network, load_student, save_network, trained_parameters, velocities
from model.distill.takes import STRIDE, Batch, Take, join, load_takes
from model.distill.teacher import FRAMES, GUIDANCE, STAGES, Codec, conditions, loss_weights
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, timesteps

WEIGHTS = "student.safetensors"
CHUNKS = 8  # of a stream
BATCH = 2
RATE = 4e-4
TEACHER_STEPS = 2 * STEPS  # every second one is at a level of the student's
EVALUATION_TAKES = 12


@torch.no_grad()
def trajectory(teacher: DiT, given: Conditions, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """The teacher's latents at each of the student's levels, the noisiest first, and those at the end."""
    levels = (timesteps(TEACHER_STEPS, SHIFT) / NUM_TIMESTEPS).tolist()
    x, passed = torch.randn(given.shape, generator=generator), []
    both, heard = given.condition.repeat(2, 1, 1, 1, 1), torch.cat((given.audio, torch.zeros_like(given.audio)))
    for i, (level, following) in enumerate(pairwise(levels)):
        x = given.with_motion(x)
        if i % (TEACHER_STEPS // STEPS) == 0:
            passed.append(x)
        times = torch.full((2 * len(x),), NUM_TIMESTEPS * level)
        v, silent = velocities(teacher, torch.cat((x, x)), both, times, heard).chunk(2)
        x = x - (level - following) * (silent + GUIDANCE * (v - silent))
    return passed, given.with_motion(x)


def student_loss(dit: DiT, teacher: DiT, streams: Streams, draw: Draw, codec: Codec) -> tuple[Tensor, dict[str, float]]:
    """The loss of the next chunk of the streams, at all four levels."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    chunk = streams.next(draw)
    given = Conditions(chunk.motion, conditions(chunk.portraits, codec.grey, FRAMES), chunk.audio)
    with torch.no_grad():
        streams.move_on(next_motion(sampled(dit, given, generator)[0], codec))
    passed, end = trajectory(teacher, given, generator)
    levels = timesteps(STEPS, SHIFT)[:-1] / NUM_TIMESTEPS
    count, n = len(end), chunk.motion.shape[1]
    level = levels.repeat_interleave(count)
    repeated = [torch.cat([part] * STEPS) for part in (given.condition, chunk.audio, end)]
    x = torch.cat(passed)
    v = velocities(dit, x, repeated[0], NUM_TIMESTEPS * level, repeated[1])
    error = (clean(x, level.view(-1, 1, 1, 1, 1), v) - repeated[2])[:, n:]
    weight = torch.cat([loss_weights(chunk.centres, codec, STAGES["streaming"])[:, n:]] * STEPS)
    squares = (weight * error.square()).flatten(1).sum(1) / weight.flatten(1).sum(1)
    by_level = squares.view(STEPS, count).mean(1)
    numbers = {f"loss at {s:.3g}": x for s, x in zip(levels.tolist(), by_level.tolist(), strict=True)}
    return (by_level / levels.square()).mean(), numbers


@torch.no_grad()
def second_chunks(dit: DiT, takes: Sequence[Take], codec: Codec, causal: bool = False) -> tuple[Tensor, Batch]:
    """The second chunks of streams of held-out takes, on the student's own motion, and their truth."""
    first, second = (join([take.chunk(start) for take in takes]) for start in (0, NEXT))
    generator = torch.Generator().manual_seed(0)
    condition = conditions(first.portraits, codec.grey, FRAMES)
    given = Conditions(first.portraits[:, None], condition, first.audio)
    motion = next_motion(sampled(dit, given, generator, causal=causal)[0], codec)
    return sampled(dit, Conditions(motion, condition, second.audio), generator, causal=causal)[0], second


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
    dit = load_student(start or teacher)
    training, held_out = load_takes(takes), load_takes(takes, held_out=True)[:EVALUATION_TAKES]
    eyes = load_reader()
    streams = Streams(training, BATCH, CHUNKS)
    task = Task(
        name="student",
        network=dit,
        optimizer=torch.optim.AdamW(trained_parameters(dit), RATE, betas=(0.9, 0.99), weight_decay=0.01),
        batch=streams.draw,
        loss=lambda draw: student_loss(dit, wise, streams, draw, numbers),
        evaluate=lambda _: judged(*second_chunks(dit, held_out, numbers), numbers, eyes),
        write=lambda _: save_network(dit, folder / WEIGHTS),
        state=streams,
    )
    return run_training(task, folder, budget, seed, resume, evaluate_every=100, report=report)
