"""Trains the codec's decoder on what the student gives it.

The student's latents are not those of a picture: where it does not know better they are an average, and some noise is
left in the weak ones. The codec's own training never saw such latents, and draws them as grain and as visible cells of
8 pixels. Here the decoder learns to draw the true picture from both, in equal parts:

clean       latents of the true picture, with the loss of the codec's own training
given       what the student makes of the true latents in its last step or its last two: they get that much noise, and
            it takes it off

Only the decoder is trained, so motion latents and what the student gives stay as they are.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.distill.codec import (
    CODEC,
    MOUTH_WEIGHT,
    SIZE,
    TRIPS,
    WEIGHTS,
    WINDOW,
    as_clip,
    codec_loss,
    load_codec,
    make_optimizer,
    mouth_mask,
    picture_loss,
    save_codec,
)
from model.distill.codec import Batch as Windows
from model.distill.codec_network import decode_clips
from model.distill.face import Identity, render
from model.distill.student import STEPS, clean
from model.distill.student_network import load_network, velocities
from model.distill.takes import STARTS, STRIDE, Batch, Take, join, load_takes, people_of
from model.distill.teacher import SHIFT, Codec, conditions
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, timesteps
from model.vae import VAE

BATCH = 2
LATENTS = 5  # of a chunk, from its beginning: the first two are its motion latents
FRAMES = 1 + STRIDE * (LATENTS - 1)
LAST = 2  # steps of the student, at most
CELLS = WINDOW // CODEC.spatial_stride
EVALUATION_TAKES = 8
GIVEN = "psnr of given latents"


class Batches(NamedTuple):
    """Chunks, and a window of their true picture."""

    chunks: Batch
    corners: list[tuple[int, int]]  # column and row of each window's first cell
    windows: Windows
    steps: int  # of the student


def draw(takes: Sequence[Take], people: Sequence[Identity], rng: np.random.Generator) -> Batches:
    """Random chunks of random takes, and windows of which 60 % are around the mouth."""
    chunks, corners, pictures, weights = [], [], [], []
    for i in rng.integers(len(takes), size=BATCH).tolist():
        start = int(rng.integers(STARTS))
        chunk = takes[i].chunk(start)
        corner = rng.integers(0, SIZE - WINDOW + 1, 2).astype(float)
        if rng.random() < 0.6:
            corner = chunk.centres[0].mean(0).numpy() - WINDOW / 2 + rng.uniform(-14, 14, 2)
        column, row = (int(c) // CODEC.spatial_stride for c in np.clip(corner, 0, SIZE - WINDOW))
        x, y = column * CODEC.spatial_stride, row * CODEC.spatial_stride
        motion = takes[i].motion[STRIDE * start : STRIDE * start + FRAMES]
        mask = mouth_mask(chunk.centres[0, :FRAMES].numpy(), (x, y), WINDOW)
        pictures.append(as_clip(render(people[i], motion, SIZE, window=(x, y, WINDOW))))
        weights.append(_weight(mask))
        chunks.append(chunk)
        corners.append((column, row))
    trips = int(rng.integers(1, TRIPS + 1)) if rng.random() < 0.5 else 0
    return Batches(
        join(chunks), corners, Windows(torch.cat(pictures), torch.cat(weights), trips), int(rng.integers(1, 3))
    )


def _weight(mask: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(1 + (MOUTH_WEIGHT - 1) * mask).float()[None, None]


@torch.no_grad()
def last_steps(student: DiT, chunks: Batch, codec: Codec, steps: int) -> Tensor:
    """What the student makes of true latents in its last steps, [B, LATENTS, z, h, w]."""
    latents, levels = chunks.latents, (timesteps(STEPS, SHIFT)[-steps - 1 :] / NUM_TIMESTEPS).tolist()
    condition, x = conditions(chunks.portraits, codec.grey, latents.shape[1]), latents
    for level in levels[:-1]:
        x = (1 - level) * x + level * torch.randn_like(x)
        x[:, :2] = latents[:, :2]
        times = torch.full((len(x),), NUM_TIMESTEPS * level)
        x = clean(x, level, velocities(student, x, condition, times, chunks.audio))
    x[:, :2] = latents[:, :2]
    return x[:, :LATENTS]


def decoder_loss(vae: VAE, student: DiT, batch: Batches, codec: Codec) -> tuple[Tensor, dict[str, float]]:
    """The loss on clean latents, and that on given ones."""
    loss, numbers = codec_loss(vae, batch.windows)
    given = zip(last_steps(student, batch.chunks, codec, batch.steps), batch.corners, strict=True)
    cut = torch.stack([x[..., row : row + CELLS, column : column + CELLS] for x, (column, row) in given])
    more, quality = picture_loss(decode_clips(vae, cut.transpose(1, 2)), batch.windows.frames, batch.windows.weight)
    return loss + more, numbers | {GIVEN: quality}


def train(
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    student: Path = Path("out/student/student.safetensors"),
    takes: Path = Path("out/takes"),
    start: Path | None = None,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains a decoder in `folder`, and writes the codec with it to `codec.safetensors` there.

    Args:
        folder: For the checkpoint, curves and the result, see `model.distill.training.train`.
        budget: How long.
        seed: Of every random choice.
        resume: Continues the training in `folder`.
        student: Weights of the student.
        takes: Folder with takes to train on, and held-out ones to measure on.
        start: The codec that the takes were made with, if it is not the shipped one.
        report: Gets lines of progress.

    Raises:
        UserError: As for `model.distill.training.train`, and if takes, codec or weights cannot be read.
    """
    torch.manual_seed(seed)
    vae, codec, network = load_codec(start or WEIGHTS), Codec.load(start), load_network(student)
    for part in (vae.conv2, vae.decoder):
        part.requires_grad_(True)
    training, people = load_takes(takes), people_of(takes)
    held_out = load_takes(takes, held_out=True)[:EVALUATION_TAKES], people_of(takes, held_out=True)
    judged = [draw(*held_out, np.random.default_rng(i)) for i in range(EVALUATION_TAKES // BATCH)]

    def evaluate() -> dict[str, float]:
        torch.manual_seed(0)
        found = [decoder_loss(vae, network, batch, codec)[1] for batch in judged]
        return {
            f"held-out {name}": float(np.mean([one[name] for one in found]))
            for name in ("psnr", "psnr of given latents")
        }

    task = Task(
        name="decoder",
        network=vae,
        optimizer=make_optimizer(vae),
        batch=lambda rng: draw(training, people, rng),
        loss=lambda batch: decoder_loss(vae, network, batch, codec),
        evaluate=lambda _: evaluate(),
        mixed=False,  # a latent may move by less than bfloat16 can tell
    )
    counters = run_training(task, folder, budget, seed, resume, report=report)
    save_codec(vae.requires_grad_(False), folder / WEIGHTS.name)
    return counters
