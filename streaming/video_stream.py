"""A video as an iterator over its frames and their sound."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kernels.common import without_autocast
from streaming.session import Group
from streaming.sources import SOUND_RATE, Source
from streaming.writer import check_finite


class NoSound(NamedTuple):
    """The sound of a stream on a rank that gives no frames."""

    rate: int = SOUND_RATE
    channels: int = 1
    duration: float | None = 0.0


class VideoFrames(NamedTuple):
    """Consecutive frames of the video and the sound that is heard while they are shown."""

    rgb: NDArray[np.uint8]  # [n, height, width, 3]
    sound: NDArray[np.float32]  # [samples, channels], in [-1, 1]


class VideoStream:
    """An iterator over the `VideoFrames` of one portrait and one voice, in order, each group as soon as it is decoded.

    Attributes:
        fps: frames a second of the video.
        rate: samples a second of the sound.
        channels: of the sound, 1 or 2.
        duration: of the sound in seconds, None if its end is not known.
        frames: how many were given so far.
    """

    def __init__(
        self, groups: Iterator[Group], source: Source | NoSound, fps: int, release: Callable[[], None]
    ) -> None:
        """Use `TalkingHeadPipeline.stream`."""
        self.fps, self.rate, self.channels, self.duration = fps, source.rate, source.channels, source.duration
        self.frames = 0
        self._groups, self._release = groups, release

    def __iter__(self) -> Self:
        return self

    @without_autocast
    def __next__(self) -> VideoFrames:
        try:
            group = next(self._groups)
            rgb = group.rgb.cpu().numpy()
            check_finite(bool(group.finite), self.frames)
        except BaseException:
            self.close()
            raise
        self.frames += len(rgb)
        return VideoFrames(rgb, group.sound)

    def close(self) -> None:
        """Ends the video and closes its files. Then the pipeline can begin another one."""
        self._groups = iter(())
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
