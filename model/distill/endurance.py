"""Long streams of a student, of people and voices that no training saw: do lips, person, colours and sharpness remain?

Streams are generated in a batch by the sampler of the training, without colour correction, on the student's own motion
latents. Of each chunk the last frames are looked at, which the next chunk's motion latents are made from anyway. A
stream can be disturbed once, to see whether and how fast the student recovers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.config import TINY
from model.distill.codec import as_bytes
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.face import MOUTH
from model.distill.metrics import Frames, identity_distance, sharpness
from model.distill.reader import Reader, load_reader
from model.distill.rollout import LATEST, NEXT, Conditions, sampled
from model.distill.takes import STRIDE, Batch, Take, join
from model.distill.teacher import FRAMES, Codec, conditions
from model.dit import DiT
from model.errors import UserError
from model.files import replacing

SEEN = 1 + (LATEST - 1) * STRIDE  # frames of a chunk that are looked at
MOTION_FRAMES = TINY.chunk.motion_frames_num
OPEN = MOUTH.index("open")
DISTURBED = 10  # the chunk after which a disturbance comes


def redder(frames: Tensor) -> Tensor:
    """Frames [B, 3, T, H, W] in -1 .. 1 with a tenth of the range more red."""
    shift = torch.tensor([0.2, 0.0, 0.0], device=frames.device).view(1, 3, 1, 1, 1)
    return (frames + shift).clamp(-1, 1)


def blurred(frames: Tensor) -> Tensor:
    """Frames averaged over 5 x 5 pixels."""
    return F.avg_pool3d(F.pad(frames, (2, 2, 2, 2, 0, 0), mode="replicate"), (1, 5, 5), 1)


def noisy(frames: Tensor) -> Tensor:
    """Frames with normal noise of deviation 0.3, of a fixed seed."""
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0)).to(frames.device)
    return (frames + 0.3 * noise).clamp(-1, 1)


DISTURBANCES: dict[str, Callable[[Tensor], Tensor]] = {"red": redder, "blur": blurred, "noise": noisy}


@dataclass(frozen=True)
class Endurance:
    """What was seen of each stream's chunks."""

    identity: list[list[float]]  # [stream][chunk], distance of skin, hair and background to the portrait, Lab
    sharpness: list[list[float]]  # [stream][chunk], over the portrait's
    opening: list[list[list[float]]]  # [stream][chunk][frame], of the mouth, as read
    truth: list[list[list[float]]]  # as `opening`

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        rounded = {name: np.round(value, 4).tolist() for name, value in vars(self).items()}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rounded))

    @classmethod
    def load(cls, path: Path) -> "Endurance":
        """Reads what `save` wrote. Raises `UserError` if it is something else."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not what `endurance` writes ({error})") from error


@torch.no_grad()
def endure(
    student: DiT,
    takes: Sequence[Take],
    codec: Codec,
    streams: int,
    chunks: int,
    disturbance: str = "",
    causal: bool = False,
    filmed: Sequence[int] = (),
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> tuple[Endurance, dict[int, Frames]]:
    """Plays streams of the takes' people, each of whom says what all takes say, one after another.

    Args:
        student: generates.
        takes: at least as many as streams.
        codec: of the takes.
        streams: how many, in a batch.
        chunks: of each stream.
        disturbance: what happens to the motion frames after chunk DISTURBED, a name of `DISTURBANCES`, or nothing.
        causal: whether the student has a causal mask.
        filmed: chunks whose last frames are wanted.
        seed: of the noise.
        report: gets a line every hundred chunks.

    Returns:
        What was seen, and for each filmed chunk the last frame of each stream [streams, 128, 128, 3].
    """
    people, eyes = join([take.chunk(0) for take in takes[:streams]]), load_reader()
    portraits = as_bytes(decode_clips(codec.vae, people.portraits[:, :, None]).transpose(0, 2))
    places = eyes.read(portraits).centre
    condition, motion = conditions(people.portraits, codec.grey, FRAMES), people.portraits[:, None]
    generator, film = torch.Generator().manual_seed(seed), {}
    seen: dict[str, list[list[Any]]] = {field.name: [[] for _ in range(streams)] for field in fields(Endurance)}
    for chunk in range(chunks):
        heard = join([_said(takes, stream, chunk) for stream in range(streams)])
        latents, _ = sampled(student, Conditions(motion, condition, heard.audio), generator, causal=causal)
        frames = decode_clips(codec.vae, latents[:, -LATEST:].transpose(1, 2)).clamp(-1, 1)
        for stream in range(streams):
            numbers = _looked_at(as_bytes(frames[stream : stream + 1]), portraits[stream], places[stream], eyes)
            for name, value in (numbers | {"truth": heard.mouths[stream, -SEEN:, OPEN].tolist()}).items():
                seen[name][stream].append(value)
        if chunk in filmed:
            film[chunk] = as_bytes(frames[:, :, -1:].transpose(0, 2))
        frames = frames[:, :, -MOTION_FRAMES:]
        if disturbance and chunk == DISTURBED:
            frames = DISTURBANCES[disturbance](frames)
        motion = encode_clips(codec.vae, frames).transpose(1, 2)
        if (chunk + 1) % 100 == 0:
            report(f"{chunk + 1}/{chunks} chunks")
    return Endurance(**seen), film


def _said(takes: Sequence[Take], stream: int, chunk: int) -> Batch:
    """What a stream hears: the takes in turn, each of which has two chunks."""
    return takes[(stream + chunk // 2) % len(takes)].chunk(NEXT * (chunk % 2))


def _looked_at(frames: Frames, portrait: Frames, place: NDArray[np.floating], eyes: Reader) -> dict[str, Any]:
    reading = eyes.read(frames)
    distances = identity_distance(frames, reading.centre, portrait, place)
    return {
        "identity": float(np.mean(list(distances.values()))),
        "sharpness": float(sharpness(frames, portrait).mean()),
        "opening": reading.mouth[:, OPEN].tolist(),
    }
