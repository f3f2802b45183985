"""Talking heads with known truth: a person, the movement of the head, and sound with the mouth that belongs to it."""

import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image

from model.distill.face import MOTION, MOUTH, Identity, draw_identity, mouth_centre, render
from model.distill.speech import FPS, SAMPLE_RATE, Track, draw_track
from model.errors import UserError
from model.files import replacing

_BLINK = (0.35, 0.9, 1.0, 0.7, 0.35, 0.1)  # how far the lids are shut in the frames of a blink
_LEAD = (3, 3 * FPS)  # frames between the portrait's moment and the clip, at least and at most


@dataclass(frozen=True, eq=False)
class Clip:
    """A person who talks for some frames.

    Attributes:
        seed, index, held_out: what the clip is drawn from, and nothing else.
        identity: who it is.
        motion: float32 [T, 17], in the order of `MOTION`; the mouth is that of `track`.
        reference_motion: float32 [17], the portrait's: a moment before the clip, with a closed mouth in half of the
            clips.
        track: the sound, and the truth of the mouth.
    """

    seed: int
    index: int
    held_out: bool
    identity: Identity
    motion: NDArray[np.float32]
    reference_motion: NDArray[np.float32]
    track: Track

    def frames(self, size: int) -> NDArray[np.uint8]:
        """The pictures, uint8 [T, size, size, 3], sRGB."""
        return render(self.identity, self.motion, size)

    def portrait(self, size: int) -> NDArray[np.uint8]:
        """The picture that shows who it is, uint8 [size, size, 3], sRGB."""
        return render(self.identity, self.reference_motion[None], size)[0]


def draw_clip(seed: int, index: int, frames: int = 33, held_out: bool = False) -> Clip:
    """Draws clip `index` of the endless data of `seed`, in a fixed way.

    `held_out` gives voices and languages that no clip without it has, and other people.

    Raises:
        UserError: it is a clip with speech, and espeak-ng is not installed.
    """
    rng = np.random.default_rng([seed, index, held_out])
    identity = draw_identity(rng)
    lead = int(rng.integers(_LEAD[0], _LEAD[1] + 1))
    track = draw_track(rng, lead + frames, held_out)
    motion = draw_motion(rng, track.mouth)
    reference = motion[0].copy()
    reference[MOTION.index("blink")] = 0
    if rng.random() < 0.5:
        reference[[MOTION.index(name) for name in MOUTH]] = 0
    return Clip(seed, index, held_out, identity, motion[lead:], reference, track.after(lead))


def draw_motion(rng: np.random.Generator, mouth: NDArray[np.float32], liveliness: float = 1.0) -> NDArray[np.float32]:
    """The motion of a head with a given mouth, float32 [T, 6] -> [T, 17]: all but the mouth is independent of it.

    The head turns, nods and shifts by sums of three slow sines, the eyes turn against the head, lids blink at intervals
    of a gamma distribution (about one blink in 3.5 s), brows and smile drift, and the chest breathes. `liveliness`
    scales how far head, eyes, brows and smile move. It has no influence on the lids.
    """
    count = len(mouth)
    time = np.arange(count) / FPS

    def sway(amplitude: float, frequency: float) -> NDArray[np.float64]:
        total = np.zeros(count)
        for k, ratio in enumerate((1.0, 1.9, 3.1)):
            phase = rng.uniform(0, 2 * np.pi)
            total += rng.normal() / (k + 1) * np.sin(2 * np.pi * frequency * ratio * time + phase)
        return liveliness * amplitude / 1.2 * total

    moved: dict[str, NDArray[np.float64]] = {}
    moved["yaw"] = rng.normal() * 0.07 + sway(0.08, 0.13)
    moved["pitch"] = rng.normal() * 0.03 + sway(0.035, 0.17)
    moved["roll"] = rng.normal() * 0.015 + sway(0.022, 0.11)
    moved["shift_x"] = 0.10 * moved["yaw"] + sway(0.010, 0.10)
    moved["shift_y"] = -0.10 * moved["pitch"] + sway(0.006, 0.12)
    moved["blink"] = _draw_blinks(rng, count)
    moved["gaze_x"] = sway(0.25, 0.15) - 1.2 * moved["yaw"]
    moved["gaze_y"] = sway(0.15, 0.13)
    moved["brow"] = np.clip(sway(0.5, 0.2), -0.3, 1)
    moved["smile"] = np.clip(rng.uniform(0, 0.35) + sway(0.12, 0.08), 0, 1)
    moved["breath"] = np.sin(2 * np.pi * 0.25 * time + rng.uniform(0, 2 * np.pi))
    moved |= dict(zip(MOUTH, mouth.T, strict=True))
    return np.stack([moved[name] for name in MOTION], 1).astype(np.float32)


def _draw_blinks(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    blink = np.zeros(count + len(_BLINK))
    start = int(rng.integers(0, 3 * FPS)) - len(_BLINK)
    while start < count:
        if start >= 0:
            blink[start : start + len(_BLINK)] = _BLINK
        start += int(FPS * rng.gamma(4, 0.8)) + 8
    return blink[:count]


def write_clip(clip: Clip, folder: Path, size: int) -> None:
    """Writes a clip to a folder: portrait.png, voice.wav, video.mp4 with the voice in it, and truth.npz.

    truth.npz holds mouth [T, 6], motion [T, 17] and its names, reference_motion [17], mouth_centre [T, 2] in pixels of
    this size, identity (the renderer's numbers), skin_tone (0 lightest to 1 darkest), kind, voice, and the phonemes as
    phoneme_seconds and phoneme_symbols.

    Raises:
        UserError: a file cannot be written.
    """
    frames = clip.frames(size)
    truth = {
        "mouth": clip.track.mouth,
        "motion": clip.motion,
        "motion_names": np.array(MOTION),
        "reference_motion": clip.reference_motion,
        "mouth_centre": mouth_centre(clip.identity, clip.motion, size),
        "identity": clip.identity.values,
        "skin_tone": np.float32(clip.identity.skin_tone),
        "kind": np.array(clip.track.kind),
        "voice": np.array(clip.track.voice),
        "phoneme_seconds": np.array([seconds for seconds, _ in clip.track.phonemes], np.float32),
        "phoneme_symbols": np.array([symbol for _, symbol in clip.track.phonemes], np.str_),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "portrait.png") as path:
            Image.fromarray(clip.portrait(size)).save(path, "png")
        with replacing(folder / "voice.wav") as path:
            soundfile.write(path, clip.track.wave, SAMPLE_RATE, "PCM_16", format="WAV")
        with replacing(folder / "video.mp4") as path:
            _write_video(path, frames, clip.track.wave)
        with replacing(folder / "truth.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, **truth)
    except (OSError, FFmpegError) as error:
        raise UserError(f"cannot write clip {clip.index} to {folder}: {error}") from error


def _write_video(path: Path, frames: NDArray[np.uint8], wave: NDArray[np.float32]) -> None:
    """An MP4 with H.264 at 25 frames per second, and AAC."""
    memory = io.BytesIO()  # PyAV takes the format from a name, and the temporary file has another
    with av.open(memory, "w", format="mp4") as container:
        video = container.add_stream("libx264", FPS, options={"crf": "12", "preset": "veryfast"})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        audio = container.add_stream("aac", SAMPLE_RATE, layout="mono")
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
        sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode())
    path.write_bytes(memory.getvalue())
