"""The values of a session: what one frame hears, what is shown and heard in one moment, and what happened."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.config import ChunkConfig
from streaming.sources import SOUND_RATE


@dataclass(frozen=True, eq=False)
class FrameSound:
    """The sound of one frame, 40 ms at 25 FPS."""

    speech: NDArray[np.float32]  # [frame_samples], mono at `chunk.sample_rate`: what the speech encoder hears
    sound: NDArray[np.float32]  # [SOUND_RATE / fps], mono: what the viewer hears, in [-1, 1]
    segment: int | None = None  # None: filler, silence that nobody sent
    samples: int = 0  # of `speech` that were sent; the last frame of a segment is padded with silence
    received: float | None = None  # when its first sample was received, on the session's clock


def filler(chunk: ChunkConfig) -> FrameSound:
    """The silence of a frame for which nobody has sent sound."""
    return FrameSound(np.zeros(chunk.frame_samples, np.float32), np.zeros(SOUND_RATE // chunk.tgt_fps, np.float32))


@dataclass(frozen=True, eq=False)
class Moment:
    """A frame and the sound that is heard while it is shown: one value, so that the two cannot drift apart.

    Frame `index` is shown at `pts`, and its sound is samples `index * len(sound)` and following of the session. Times
    are seconds on the session's clock; `received` is None where nobody has sent the sound.
    """

    index: int  # from 0, without gaps
    pts: float  # seconds, index / fps
    rgb: NDArray[np.uint8]  # [height, width, 3]
    sound: NDArray[np.float32]  # [SOUND_RATE / fps], mono, in [-1, 1]
    segment: int | None  # that the sound belongs to
    chunk: int  # number of the chunk that the frame was made in
    received: float | None  # when the first sample of its sound was received
    begun: float  # when its chunk was begun
    decoded: float  # when the frame was there
    handed: float  # when it was handed over


@dataclass(frozen=True)
class PlaybackStarted:
    """The first frame of a segment is handed over."""

    segment: int
    index: int  # of the frame
    at: float  # on the session's clock


@dataclass(frozen=True)
class PlaybackFinished:
    """A segment will be heard no further: its last frame is handed over, or it was interrupted. Once a segment."""

    segment: int
    position: float  # seconds of the segment that were handed over
    interrupted: bool


@dataclass(frozen=True)
class StateChanged:
    """The session is in another state."""

    before: str
    after: str


@dataclass(frozen=True)
class LagChanged:
    """Generation has become slower than real time, or fast enough again."""

    lagging: bool
    ratio: float  # seconds that a second of video took, of the last chunks


Event = PlaybackStarted | PlaybackFinished | StateChanged | LagChanged
