"""Takes: talking heads as the student sees them, as latents and heard speech, made once before its training.

A take is a person who talks for FRAMES frames after some seconds of sound. A chunk of a take begins at every fourth
frame. Its latents are that of its first frame alone, and one for every four frames after it. The linear encoder sees no
further than that, so the latents of all chunks are pieces of the same few.

Speech is heard as in a live stream: by the product's encoder, on a ring of eight seconds that ends with the chunk. So
the newest frames are heard without what follows them, and each chunk keeps its own numbers.

People in takes sit still: their heads turn by two or three degrees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.audio import SpeechEncoder, windows
from model.distill.audio import CHUNK, hear, load_audio, ring_at
from model.distill.clips import draw_motion
from model.distill.codec import SIZE, as_clip, load_codec
from model.distill.codec_network import encode_clips
from model.distill.face import MOTION, MOUTH, draw_identity, mouth_centre, render
from model.distill.speech import draw_track
from model.errors import UserError
from model.files import replacing
from model.vae import VAE

STRIDE = 4  # frames per latent frame
LEAD = CHUNK.frame_num - 2  # frames of sound before the first frame that is seen
SLICES = 4
FRAMES = SLICES * CHUNK.new_frames - LEAD  # 81: twenty latent frames after the first one
STARTS = (FRAMES - CHUNK.frame_num) // STRIDE + 1  # chunks of a take
LIVELINESS = 0.25  # of the clips' movement: small networks draw what moves as noise, and what is still in all detail
BEFORE = 2  # frames of heard speech before a chunk, which its first windows reach


class Batch(NamedTuple):
    """Chunks of takes."""

    latents: Tensor  # [B, latent frames, z, h, w], normalised
    portraits: Tensor  # [B, z, h, w], the person at another moment
    audio: Tensor  # [B, frames, window, 1, 6], heard
    centres: Tensor  # [B, frames, 2], column and row of the mouth's centre in pixels
    mouths: Tensor  # [B, frames, 6], true


@dataclass(frozen=True, eq=False)
class Take:
    """One take. Its person and sound follow from seed, index and `held_out` alone."""

    first: NDArray[np.float16]  # [STARTS, z, h, w], each of one frame alone
    later: NDArray[np.float16]  # [20, z, h, w]
    portrait: NDArray[np.float16]  # [z, h, w]
    heard: NDArray[np.float32]  # [STARTS, BEFORE + frame_num, 6]
    centres: NDArray[np.float32]  # [FRAMES, 2]
    motion: NDArray[np.float32]  # [FRAMES, 17]

    def chunk(self, start: int) -> Batch:
        """The chunk that begins at frame STRIDE * `start`, as a batch of one."""
        frames = slice(STRIDE * start, STRIDE * start + CHUNK.frame_num)
        latents = np.concatenate((self.first[start : start + 1], self.later[start : start + CHUNK.frame_num // STRIDE]))
        heard = torch.from_numpy(self.heard[start])[:, None]
        mouth = self.motion[frames, MOTION.index(MOUTH[0]) : MOTION.index(MOUTH[-1]) + 1]
        parts = (latents.astype(np.float32), self.portrait.astype(np.float32), self.centres[frames], mouth)
        latents_, portrait, centres, mouths = (torch.from_numpy(np.ascontiguousarray(part))[None] for part in parts)
        audio = windows(heard, BEFORE, BEFORE + CHUNK.frame_num)[None]
        return Batch(latents_, portrait, audio, centres, mouths)


def draw_take(seed: int, index: int, vae: VAE, encoder: SpeechEncoder, held_out: bool = False) -> Take:
    """Draws take `index` of the endless data of `seed`. Raises `UserError` if it speaks and espeak-ng is missing."""
    rng = np.random.default_rng([seed, index, held_out])
    identity = draw_identity(rng)
    track = draw_track(rng, LEAD + FRAMES, held_out)
    motion = draw_motion(rng, track.mouth, LIVELINESS)
    portrait = motion[int(rng.integers(LEAD - 3))].copy()
    portrait[MOTION.index("blink")] = 0
    if rng.random() < 0.5:
        portrait[[MOTION.index(name) for name in MOUTH]] = 0
    motion = motion[LEAD:]
    frames = as_clip(render(identity, motion, SIZE))
    alone = as_clip(
        np.concatenate(
            (render(identity, motion[: STRIDE * STARTS : STRIDE], SIZE), render(identity, portrait[None], SIZE))
        )
    )
    heard = hear(track)
    ends = [LEAD + STRIDE * start + CHUNK.frame_num for start in range(STARTS)]
    rings = torch.from_numpy(np.stack([ring_at(heard, end)[0] for end in ends]))
    with torch.inference_mode():
        later = encode_clips(vae, frames)[0, :, 1:].transpose(0, 1)
        *first, still = encode_clips(vae, alone.transpose(0, 2))[:, :, 0]
        numbers = encoder.encode(rings, CHUNK.cached_frames)[:, -CHUNK.frame_num - BEFORE :, 0]
    return Take(
        torch.stack(first).half().numpy(),
        later.half().numpy(),
        still.half().numpy(),
        numbers.numpy(),
        mouth_centre(identity, motion, SIZE).astype(np.float32),
        motion,
    )


def make_takes(
    folder: Path,
    count: int,
    seed: int = 0,
    held_out: bool = False,
    codec: Path | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Writes takes to a folder, a file each. Those that are there already are kept, so it can be interrupted.

    Raises:
        UserError: espeak-ng is missing, the codec cannot be read, or a file cannot be written.
    """
    vae = load_codec(codec) if codec else load_codec()
    encoder, _ = load_audio()
    for index in range(count):
        path = folder / f"{seed:04d}-{index:05d}{'-held-out' if held_out else ''}.npz"
        if path.exists():
            continue
        take = draw_take(seed, index, vae, encoder, held_out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **vars(take))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        if (index + 1) % 50 == 0:
            report(f"{index + 1}/{count} takes")


def load_takes(folder: Path, held_out: bool = False) -> list[Take]:
    """The takes of a folder. Raises `UserError` if there are none, or a file is damaged."""
    takes = []
    for path in sorted(folder.glob("*.npz")):
        if path.stem.endswith("-held-out") == held_out:
            try:
                with np.load(path) as arrays:
                    takes.append(Take(**arrays))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path}: not a take ({error})") from error
    if not takes:
        raise UserError(f"{folder}: no {'held-out ' if held_out else ''}takes there; `takes` makes them")
    return takes


def join(chunks: Sequence[Batch]) -> Batch:
    """Chunks in one batch."""
    return Batch(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
