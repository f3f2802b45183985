"""What is measured while a student is distilled, always on the same held-out people and voices.

The loss of distribution matching says nothing of progress. So from time to time the student generates two chunks of
each person, and the second is read: lips, lids, pose, sharpness, the seam between the chunks. Of the critic, its loss
at every noise level is measured, and the cosine of g over two draws of the noise. If g were nothing but noise, it would
be 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import TINY
from model.distill.codec import as_bytes
from model.distill.codec_network import decode_clips
from model.distill.face import MOTION, MOUTH
from model.distill.matching import Generated, Recipe, critic_loss, judged
from model.distill.metrics import BLINK_BEGINS, Frames, frame_changes, lip_sync, seam_ratio, sharpness
from model.distill.reader import load_reader
from model.distill.rollout import NEXT, Conditions, next_motion, sampled
from model.distill.takes import Take, join
from model.distill.teacher import FRAMES, STAGES, Codec, conditions, loss_weights
from model.dit import DiT

PEOPLE = 12
MOTION_FRAMES = TINY.chunk.motion_frames_num


class Instruments:
    """Measures a student, and what teacher and critic make of it, on the first PEOPLE held-out takes."""

    def __init__(self, takes: Sequence[Take], codec: Codec, recipe: Recipe) -> None:
        self._first, self._second = (join([take.chunk(start) for take in takes[:PEOPLE]]) for start in (0, NEXT))
        self._codec, self._recipe, self._reader = codec, recipe, load_reader()
        names = ("blink", "yaw", "pitch", "roll")
        self._life = np.concatenate([take.motion[:, [MOTION.index(name) for name in names]] for take in takes])
        self._portraits = [self._frames(portrait[None])[0] for portrait in self._second.portraits]

    @torch.no_grad()
    def measure(self, student: DiT, teacher: DiT, critic: DiT) -> dict[str, float]:
        """The numbers by name."""
        given, latents = self._second_chunks(student)
        centres = self._second.centres.mean(1, keepdim=True)
        weights = loss_weights(centres, self._codec, STAGES["streaming"])
        numbers = self._seen([self._frames(one) for one in latents])
        for exit_step in range(self._recipe.chunk.sample_steps):
            made = Generated(given, latents, exit_step, weights / weights.mean())
            first, second = (self._direction(made, teacher, critic, seed) for seed in (1, 2))
            level = self._recipe.levels[exit_step]
            numbers[f"cosine of g at {level:.3g}"] = F.cosine_similarity(first, second).mean().item()
            generator = torch.Generator().manual_seed(3)
            numbers[f"critic at {level:.3g}"] = critic_loss(made, critic, self._recipe, generator).item()
        return numbers

    def _second_chunks(self, student: DiT) -> tuple[Conditions, Tensor]:
        generator, recipe = torch.Generator().manual_seed(0), self._recipe
        condition = conditions(self._first.portraits, self._codec.grey, FRAMES)
        given = Conditions(self._first.portraits[:, None], condition, self._first.audio)
        latents, _ = sampled(student, given, generator, recipe.levels, causal=recipe.causal)
        given = Conditions(next_motion(latents, self._codec), condition, self._second.audio)
        return given, sampled(student, given, generator, recipe.levels, causal=recipe.causal)[0]

    def _direction(self, made: Generated, teacher: DiT, critic: DiT, seed: int) -> Tensor:
        """g for one draw of the noise, [B, numbers]."""
        real, fake = judged(made, teacher, critic, self._recipe, torch.Generator().manual_seed(seed))
        return (fake - real)[:, made.given.motion.shape[1] :].flatten(1)

    def _frames(self, latents: Tensor) -> Frames:
        return as_bytes(decode_clips(self._codec.vae, latents.transpose(0, 1)[None]))

    def _seen(self, clips: Sequence[Frames]) -> dict[str, float]:
        """What is read from the frames of each second chunk."""
        new = [clip[MOTION_FRAMES:] for clip in clips]
        read = [self._reader.read(frames) for frames in new]
        truth = self._second.mouths[:, MOTION_FRAMES:].numpy()
        lips = lip_sync([one.mouth for one in read], list(truth), MOUTH)
        open_ = np.stack([one.mouth[:, MOUTH.index("open")] for one in read])
        blinks, poses = np.stack([one.blink for one in read]), np.stack([one.pose for one in read])
        sharp = [sharpness(frames, portrait).mean() for frames, portrait in zip(new, self._portraits, strict=True)]
        changes = [frame_changes(clip[MOTION_FRAMES - 1 :]) for clip in clips]
        numbers = {f"r {name}": lips[name].r.value for name in ("open", "wide", "close")}
        return numbers | {
            "opening on average": float(open_.mean() - truth[..., MOUTH.index("open")].mean()),
            "spread of the opening": lips["open"].spread.value,
            "closed lids": float((blinks > BLINK_BEGINS).mean() / (self._life[:, 0] > BLINK_BEGINS).mean()),
            "sway": float(poses.std(1).mean() / _deviation_in_pieces(self._life[:, 1:], poses.shape[1])),
            "sharpness": float(np.mean(sharp)),
            "seam": seam_ratio(changes, [1]).value,
        }


def _deviation_in_pieces(tracks: np.ndarray, length: int) -> float:
    pieces = tracks[: len(tracks) // length * length].reshape(-1, length, tracks.shape[1])
    return float(pieces.std(1).mean())
