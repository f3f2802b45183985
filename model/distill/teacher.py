"""Trains the teacher: a diffusion transformer that draws a chunk of a talking head in many steps.

It learns by flow matching. With x0 the latents of a chunk, noise e and a noise level s in 0 .. 1,

    x_s = (1 - s) x0 + s e,        loss = || v(x_s, 1000 s, conditions) - (e - x0) ||^2.

The motion latents at the beginning of a chunk stay clean and do not count in the loss. A chunk begins with two of them,
and is given a portrait of the person at another moment. One in seven begins with one, which is also its portrait: so a
stream begins. One in ten is silent, which allows to guide by audio: v = v_silent + g (v - v_silent). In the second
stage one in three has faulty motion latents: each channel is scaled and shifted a little, which blurs and colours the
picture, and has noise. A stream's own motion latents are not perfect either, and it must recover from that.

There are two stages, each of which can start at the weights of the other:

windows     6 x 6 latent cells around the mouth. A step costs a seventh of a whole picture's, and teaches the lips.
streaming   The whole picture, as a stream generates it. This is the paper's first stage, which adapts a video model to
            the small pictures and short chunks of a stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.block import Audio, AudioKV, ContextKV
from model.config import PRECISIONS, TINY, Config, DiTConfig
from model.distill.codec import CODEC, MOUTH_BOX, SIZE, as_bytes, latent_deviation, load_codec
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.face import MOUTH
from model.distill.metrics import lip_sync, psnr
from model.distill.reader import Reader, load_reader, mouth_crops
from model.distill.student_network import load_network, new_student, save_network, trained_parameters, velocities
from model.distill.takes import STARTS, STRIDE, Batch, Take, join, load_takes
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.dit import DiT, Modulation
from model.parallel.tokens import TokenSplit
from model.sampler import NUM_TIMESTEPS, shifted, timesteps
from model.vae import VAE
from model.weights.checkpoint import Models, preset_models
from model.weights.trained import FOLDER, fill, load_trained

CELL = CODEC.spatial_stride  # pixels
FRAMES = 1 + (TINY.chunk.frame_num - 1) // STRIDE  # latent frames of a chunk
CONFIG = TINY.dit
WEIGHTS = "teacher.safetensors"
SHIFT = TINY.chunk.sample_shift  # of noise levels, uniform before it
SILENT = 0.1  # share of chunks
FAULTY = 1 / 3  # share of chunks with faulty motion latents
BEGINNING = 0.15  # share of chunks with one motion latent
GUIDANCE, EVALUATION_STEPS = 2.0, 6
EYES_ABOVE = 32  # pixels from the mouth's centre up to the eyes'
EYES_BOX = (36, 12)  # half width and height in pixels
PROBED_LEVELS = (0.97, 0.6, 0.3)


@dataclass(frozen=True)
class Stage:
    """What a stage of the training sees."""

    cells: int  # rows and columns of latents
    batch: int
    rate: float
    face_weight: float  # of cells in the boxes of mouth and eyes
    channel_power: float  # a latent channel counts as its deviation to this power
    fault: float  # what motion latents lose of a channel, and twice the deviation of shifts and noise, at most
    evaluation_takes: int


STAGES = {
    "windows": Stage(cells=6, batch=4, rate=2e-3, face_weight=3, channel_power=0.25, fault=0, evaluation_takes=32),
    "streaming": Stage(
        cells=SIZE // CELL,
        batch=2,
        rate=7e-4,
        face_weight=4,
        channel_power=0.75,
        fault=0.4,
        evaluation_takes=12,
    ),
}


@dataclass(frozen=True, eq=False)
class Codec:
    """The codec, and what the loss and the conditions need of it."""

    vae: VAE
    grey: Tensor  # latents of mid grey after a first frame, [z]
    deviation: Tensor  # of each latent channel before it was normalised, [z]

    @classmethod
    def load(cls, path: Path | None = None) -> "Codec":
        """The shipped codec, or that of a file."""
        vae = load_codec(path) if path else load_codec()
        with torch.no_grad():
            grey = encode_clips(vae, torch.zeros(1, 3, 1 + STRIDE, CELL, CELL))[0, :, 1, 0, 0]
        return cls(vae, grey, latent_deviation(vae))


def conditions(portraits: Tensor, grey: Tensor, frames: int) -> Tensor:
    """Mask and condition latents of portraits [B, z, h, w]: [B, frames, STRIDE + z, h, w].

    They are those of a clip that shows the portrait and then mid grey. The mask is 1 in the first latent frame.
    """
    batch, z, rows, columns = portraits.shape
    latents = grey.view(1, 1, z, 1, 1).repeat(batch, frames, 1, rows, columns)
    latents[:, 0] = portraits
    mask = portraits.new_zeros(batch, frames, STRIDE, rows, columns)
    mask[:, 0] = 1
    return torch.cat((mask, latents), 2)


def windows_of(batch: Batch, cells: int) -> Batch:
    """The windows of `cells` rows and columns around the mouths, at whole patches of 2 x 2 cells."""
    rows = batch.latents.shape[-1]
    if cells == rows:
        return batch
    middle = batch.centres.mean(1) / CELL - cells / 2  # column and row of the window's corner
    corners = (2 * (middle / 2).round()).long().clamp(0, rows - cells)
    latents, portraits = (
        torch.stack(
            [x[..., row : row + cells, column : column + cells] for x, (column, row) in zip(part, corners, strict=True)]
        )
        for part in (batch.latents, batch.portraits)
    )
    return batch._replace(latents=latents, portraits=portraits, centres=batch.centres - CELL * corners[:, None])


def mouth_cells(centres: Tensor, cells: int) -> Tensor:
    """Which cells are in the mouth's box, [B, latent frames, 1, cells, cells], for centres [B, frames, 2]."""
    return _box_cells(centres, cells, MOUTH_BOX)


def face_cells(centres: Tensor, cells: int) -> Tensor:
    """As `mouth_cells`, for the boxes of mouth and eyes."""
    return mouth_cells(centres, cells).maximum(
        _box_cells(centres - centres.new_tensor([0.0, EYES_ABOVE]), cells, EYES_BOX)
    )


def loss_weights(centres: Tensor, codec: Codec, stage: Stage) -> Tensor:
    """What the squared error of each number of latents counts, [B, latent frames, z, cells, cells].

    `centres` [B, frames, 2] are those of the mouths; one that stands for all frames, [B, 1, 2], will do.
    """
    centres = centres.expand(-1, 1 + (FRAMES - 1) * STRIDE, -1)
    weight = 1 + (stage.face_weight - 1) * face_cells(centres, stage.cells)
    return weight * codec.deviation.view(-1, 1, 1) ** stage.channel_power


def _box_cells(centres: Tensor, cells: int, box: tuple[int, int]) -> Tensor:
    later = centres[:, 1:].unflatten(1, (-1, STRIDE)).mean(2)
    x, y = torch.cat((centres[:, :1], later), 1)[..., None, None].unbind(2)
    places = (torch.arange(cells, device=centres.device) + 0.5) * CELL
    inside = ((places - x).abs() < box[0]) & ((places[:, None] - y).abs() < box[1])
    return inside[:, :, None].float()


def draw(takes: Sequence[Take], stage: Stage, rng: np.random.Generator) -> Batch:
    """Random chunks of random takes."""
    chosen = [takes[int(rng.integers(len(takes)))].chunk(int(rng.integers(STARTS))) for _ in range(stage.batch)]
    return windows_of(join(chosen), stage.cells)


def with_faults(latents: Tensor, fault: Tensor) -> Tensor:
    """Latents [B, F, z, h, w] after each channel lost up to `fault` of its size and was shifted, and with noise."""
    channels = (len(latents), 1, latents.shape[2], 1, 1)
    scale, shift, noise = torch.rand(channels), torch.randn(channels), torch.randn_like(latents)
    return latents * (1 - fault * scale) + fault / 2 * (shift + noise)


def flow_loss(dit: DiT, batch: Batch, codec: Codec, stage: Stage) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, at noise levels that are spread evenly over it."""
    latents, count = batch.latents, len(batch.latents)
    beginning = torch.rand(count) < BEGINNING
    portraits = torch.where(beginning.view(-1, 1, 1, 1), latents[:, 0], batch.portraits)
    audio = batch.audio * (torch.rand(count) >= SILENT).view(-1, 1, 1, 1, 1)
    u = (torch.randperm(count) + torch.rand(count)) / count
    level = shifted(u, SHIFT)
    generated = torch.ones(latents.shape[:2], dtype=torch.bool)
    generated[:, 0], generated[:, 1] = False, beginning
    generated = generated[:, :, None, None, None]
    noise = torch.randn_like(latents)
    faults = stage.fault * torch.rand(count) * (torch.rand(count) < FAULTY)
    motion = with_faults(latents, faults.view(-1, 1, 1, 1, 1))
    noisy = torch.where(generated, latents + level.view(-1, 1, 1, 1, 1) * (noise - latents), motion)
    condition = conditions(portraits, codec.grey, latents.shape[1])
    error = velocities(dit, noisy, condition, NUM_TIMESTEPS * level, audio) - (noise - latents)
    weight = loss_weights(batch.centres, codec, stage) * generated
    loss = (weight * error.square()).sum() / weight.sum()
    plain = (error.detach().square() * generated).sum() / (generated.sum() * error[0, 0].numel())
    return loss, {"velocity": plain.item()}


@torch.no_grad()
def sample(dit: DiT, batch: Batch, codec: Codec, steps: int, guidance: float, seed: int = 0) -> Tensor:
    """Latents of chunks that begin with the batch's two motion latents, by Euler steps, as the batch's latents."""
    x = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed))
    condition = conditions(batch.portraits, codec.grey, x.shape[1])
    levels = (timesteps(steps, SHIFT) / NUM_TIMESTEPS).tolist()
    for level, following in pairwise(levels):
        x[:, :2] = batch.latents[:, :2]
        times = torch.full((len(x),), NUM_TIMESTEPS * level)
        v = velocities(dit, x, condition, times, batch.audio)
        if guidance != 1:
            silent = velocities(dit, x, condition, times, batch.audio * 0)
            v = silent + guidance * (v - silent)
        x = x - (level - following) * v
    x[:, :2] = batch.latents[:, :2]
    return x


class GuidedTeacher(DiT):
    """The teacher where a student is expected: it predicts v_silent + g (v - v_silent), for twice the work.

    Its audio keys and values are those of the chunk's frames and then, as many, those of silence.
    """

    def embed_audio(self, audio: Tensor, split: TokenSplit | None = None) -> AudioKV:
        """As `DiT.embed_audio`, of the audio and of silence."""
        heard, silent = (super(GuidedTeacher, self).embed_audio(x, split) for x in (audio, torch.zeros_like(audio)))
        return AudioKV(torch.cat((heard.k, silent.k), 1), torch.cat((heard.v, silent.v), 1))

    def absorb_audio(self, audio: AudioKV, tokens_per_frame: int) -> Audio:  # noqa: ARG002
        """The keys and values as they are: each of the two calls of `DiT.forward` absorbs its own."""
        return audio

    def forward(
        self,
        latent: Tensor,
        condition: Tensor,
        modulation: Modulation,
        rope: Tensor,
        context: ContextKV,
        audio: Audio,
        masks: Tensor | None = None,
        num_motion_latents: int = 0,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """As `DiT.forward`."""
        assert isinstance(audio, AudioKV)  # as `absorb_audio` leaves them
        v, v_silent = (
            super(GuidedTeacher, self).forward(
                latent, condition, modulation, rope, context, AudioKV(k, v), masks, num_motion_latents, split
            )
            for k, v in zip(audio.k.chunk(2, 1), audio.v.chunk(2, 1), strict=True)
        )
        return v_silent + GUIDANCE * (v - v_silent)


def teacher_models(config: Config, device: torch.device) -> Models:
    """The models of the preset with the shipped teacher in the student's place, float32."""
    models = preset_models(config, device, PRECISIONS["fp32"])
    teacher = GuidedTeacher(config.dit)
    fill(teacher, load_trained(FOLDER / WEIGHTS)[0])
    return replace(models, dit=teacher.to(device).requires_grad_(False).eval())


@torch.no_grad()
def hearing(dit: DiT, batch: Batch, codec: Codec, stage: Stage) -> dict[str, float]:
    """The loss in the mouth's box at three noise levels, and its gain by the own audio over that of another take.

    The gain rises long before lips can be seen to follow.
    """
    latents, box = batch.latents, mouth_cells(batch.centres, stage.cells)[:, 2:]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    condition, numbers = conditions(batch.portraits, codec.grey, latents.shape[1]), {}
    for level in PROBED_LEVELS:
        noisy = latents + level * (noise - latents)
        noisy[:, :2] = latents[:, :2]
        times, losses = torch.full((len(latents),), NUM_TIMESTEPS * level), []
        for audio in (batch.audio, batch.audio.roll(1, 0)):
            error = velocities(dit, noisy, condition, times, audio) - (noise - latents)
            squares = error[:, 2:].square().mean(2, keepdim=True) * box
            losses.append(float(squares.sum() / box.sum()))
        numbers |= {f"held-out loss at {level:g}": losses[0], f"gain at {level:g}": losses[1] - losses[0]}
    return numbers


def lips(latents: Tensor, batch: Batch, codec: Codec, eyes: Reader) -> dict[str, float]:
    """How well the mouths of decoded latents follow the truth, and how close they are to the true latents' picture."""
    read, truth, pictures = [], [], ([], [])
    for i in range(len(latents)):
        for part, one in zip(pictures, (latents[i], batch.latents[i]), strict=True):
            frames = as_bytes(decode_clips(codec.vae, one.transpose(0, 1)[None]))
            part.append(mouth_crops(frames, batch.centres[i].numpy())[1 + STRIDE :])
        read.append(eyes.read_mouth(pictures[0][-1]))
        truth.append(batch.mouths[i, 1 + STRIDE :].numpy())
    found = lip_sync(read, truth, MOUTH)
    bytes_ = [[(255 * squares).astype(np.uint8) for squares in part] for part in pictures]
    return {
        "r open": found["open"].r.value,
        "r close": found["close"].r.value,
        "mouth psnr": psnr(bytes_[0], bytes_[1]).value,
    }


def train(
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    start: Path | None = None,
    takes: Path = Path("out/takes"),
    stage: str = "windows",
    codec: Path | None = None,
    config: DiTConfig = CONFIG,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains a teacher in `folder`, and writes `teacher.safetensors` there when the budget is used up.

    Args:
        folder: For the checkpoint, curves and the result, see `model.distill.training.train`.
        budget: How long.
        seed: Of the weights at the start and of every random choice.
        resume: Continues the training in `folder`.
        start: Weights to begin with, such as those of the other stage.
        takes: Folder with takes to train on, and held-out ones to measure on.
        stage: One of `STAGES`.
        codec: Another codec than the shipped one; the one that the takes were made with.
        config: Of the network.
        report: Gets lines of progress.

    Raises:
        UserError: As for `model.distill.training.train`, and if takes, codec or weights cannot be read.
    """
    torch.manual_seed(seed)
    settings, numbers = STAGES[stage], Codec.load(codec)
    dit = new_student(config)
    if start is not None:
        dit.load_state_dict(load_network(start).state_dict())
    training, held_out = load_takes(takes), load_takes(takes, held_out=True)[: settings.evaluation_takes]
    judged = windows_of(join([take.chunk(STARTS // 2) for take in held_out]), settings.cells)
    eyes = load_reader()

    def evaluate() -> dict[str, float]:
        found = sample(dit, judged, numbers, EVALUATION_STEPS, GUIDANCE)
        return hearing(dit, judged, numbers, settings) | lips(found, judged, numbers, eyes)

    task = Task(
        name="teacher",
        network=dit,
        optimizer=torch.optim.AdamW(trained_parameters(dit), settings.rate, betas=(0.9, 0.99), weight_decay=0.01),
        batch=lambda rng: draw(training, settings, rng),
        loss=lambda batch: flow_loss(dit, batch, numbers, settings),
        evaluate=lambda _: evaluate(),
        write=lambda _: save_network(dit, folder / WEIGHTS),
    )
    return run_training(task, folder, budget, seed, resume, evaluate_every=1000, report=report)
