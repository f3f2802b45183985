"""Sound that waits to be shown: segments of a voice agent, or a microphone, frame by frame.

A *segment* is one utterance of a voice agent. Segments are numbered upwards; they come faster than real time, have an
end, and no sample of them is dropped: a queue that is full takes no more until there is room. A *microphone* is a
segment without an end whose sound is worth something only while it is new: a queue that is full drops the oldest.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from model.config import ChunkConfig
from streaming.live.pcm import Samples, Stretch
from streaming.live.timeline import FrameSound
from streaming.sources import SOUND_RATE

Kind = Literal["segments", "microphone"]
KINDS = ("segments", "microphone")
QUIET = 10 ** (-50 / 20)  # root mean square of a frame that may be dropped or doubled unheard

_NOTHING = np.zeros(0, np.float32)


@dataclass
class Segment:
    """What is known of a segment that is not finished."""

    number: int
    frames: int = 0  # that were queued
    shown: int = 0  # frames that were handed over
    samples: int = 0  # at `chunk.sample_rate`, handed over
    started: bool = False  # whether its first frame was handed over
    ended: bool = False  # nothing will be added


@dataclass
class Arriving:
    """The segment that sound is added to, and its samples that are in no queued frame yet."""

    number: int
    stretch: Stretch  # of the present rate
    speech: Samples = field(default_factory=_NOTHING.copy)  # given by stretches, but no whole frame
    sound: Samples = field(default_factory=_NOTHING.copy)
    received: deque[float] = field(default_factory=deque)  # when the first sample of each frame to be queued came

    @property
    def waiting(self) -> int:
        """Samples at `chunk.sample_rate` that came and are in no queued frame."""
        return len(self.speech) + self.stretch.speech_samples - self.stretch.given * self.stretch.chunk.frame_samples


class Voice:
    """The queue of sound.

    Attributes:
        frames: that wait, the next one first; at most `limit`.
        segments: that are not finished, by their numbers, which rise.
        arriving: what sound is added to; None if every segment has ended.
        last_push: when sound came last, on the session's clock.
        dropped: frames of a microphone that were dropped, in all.
        clock: "fast" or "slow" if the next quiet frame of a microphone is to be dropped or doubled.
        next_number: of the next segment.
        interrupted: segments below this number were interrupted, if they had not ended before.
    """

    def __init__(self, kind: Kind, chunk: ChunkConfig, limit: int) -> None:
        self.kind, self.limit = kind, limit
        self.frames: deque[FrameSound] = deque()
        self.segments: dict[int, Segment] = {}
        self.arriving: Arriving | None = None
        self.last_push = -math.inf
        self.dropped = 0
        self.clock: Literal["fast", "slow"] | None = None
        self.next_number = self.interrupted = 0
        self._chunk, self._factor = chunk, SOUND_RATE // chunk.sample_rate

    # --- Sound comes in ----------------------------------------------------------------------------------------------

    def number_of(self, segment: int | None) -> int | None:
        """The number of the segment that sound for `segment` belongs to, None if that was interrupted.

        None stands for the segment that is arriving, or else for a new one. Raises `ValueError` for a segment that has
        ended.
        """
        arriving = self.arriving.number if self.arriving else None
        if segment is None:
            return self.next_number if arriving is None else arriving
        if segment == arriving or segment >= self.next_number:
            return segment
        if segment < self.interrupted:
            return None
        raise ValueError(f"segment: {segment} has ended; the next one is {self.next_number} or above")

    def room(self, rate: int) -> int:
        """Samples at `rate` that the queue has room for."""
        size = self._chunk.frame_samples
        waiting = len(self.frames) * size + (self.arriving.waiting if self.arriving else 0)
        return max(0, (self.limit * size - waiting) * rate // self._chunk.sample_rate)

    def push(self, samples: Samples, rate: int, number: int, now: float) -> None:
        """Adds samples [n] to the segment `number` of `number_of`; the segment before it ends.

        Of segments, the caller adds no more than `room`. A microphone's queue that is full loses its oldest frames.
        """
        stretch = Stretch(rate, self._chunk)
        if self.arriving is None or self.arriving.number != number:
            self.end()
            self.segments[number] = Segment(number)
            self.arriving = Arriving(number, stretch)
            self.next_number = number + 1
        elif self.arriving.stretch.rate != rate:
            _append(self.arriving, *self.arriving.stretch.rest())
            self.arriving.stretch = stretch
        arriving, self.last_push = self.arriving, now
        arriving.stretch, frames = arriving.stretch.push(samples)
        if frames:
            _append(arriving, *(np.concatenate(parts) for parts in zip(*frames, strict=True)))
        while len(arriving.received) * self._chunk.frame_samples < arriving.waiting:
            arriving.received.append(now)
        self._queue_whole_frames(arriving)
        while len(self.frames) > self.limit:
            self._drop(0)

    def end(self) -> None:
        """Ends the segment that is arriving, if there is one; its last frame is filled up with silence."""
        if (arriving := self.arriving) is None:
            return
        _append(arriving, *arriving.stretch.rest())
        size = self._chunk.frame_samples
        missing = -len(arriving.speech) % size
        _append(arriving, np.zeros(missing, np.float32), np.zeros(missing * self._factor, np.float32))
        self._queue_whole_frames(arriving)
        if missing:
            self.frames[-1] = replace(self.frames[-1], samples=size - missing)
        self.segments[arriving.number].ended = True
        self.arriving = None

    def _queue_whole_frames(self, arriving: Arriving) -> None:
        size, factor = self._chunk.frame_samples, self._factor
        count = len(arriving.speech) // size
        for k in range(count):
            speech = arriving.speech[k * size : (k + 1) * size]
            sound = arriving.sound[k * size * factor : (k + 1) * size * factor]
            received = arriving.received.popleft() if arriving.received else self.last_push
            frame = FrameSound(speech, sound, arriving.number, size, received)
            self._queue(frame, 1 if self.clock is None else self._corrected(frame))
        arriving.speech, arriving.sound = arriving.speech[count * size :], arriving.sound[count * size * factor :]

    def _queue(self, frame: FrameSound, times: int) -> None:
        self.frames.extend([frame] * times)
        self._segment_of(frame).frames += times

    # --- Sound goes out ----------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[FrameSound]:
        """Takes the next frames, at most `count`, from the queue."""
        return [self.frames.popleft() for _ in range(min(count, len(self.frames)))]

    def clear(self) -> list[Segment]:
        """Drops all sound, as an interruption does; what still comes for these segments is discarded.

        Returns the segments that were not finished.
        """
        unfinished = list(self.segments.values())
        self.frames.clear()
        self.segments.clear()
        self.arriving, self.interrupted = None, self.next_number
        return unfinished

    # --- A microphone ------------------------------------------------------------------------------------------------

    def catch_up(self, count: int) -> None:
        """Drops frames until at most `count` wait: quiet ones first, then the oldest."""
        while len(self.frames) > count:
            quiet = self._first_quiet()
            self._drop(0 if quiet is None else quiet)

    def _corrected(self, frame: FrameSound) -> int:
        """How often a frame that came is queued: a quiet one not at all or twice, once for each remark on the clock."""
        if not _is_quiet(frame):
            return 1
        clock, self.clock = self.clock, None
        if clock == "slow":
            return 2
        self.dropped += 1
        return 0

    def _first_quiet(self) -> int | None:
        return next((k for k, frame in enumerate(self.frames) if _is_quiet(frame)), None)

    def _drop(self, place: int) -> None:
        self._segment_of(self.frames[place]).frames -= 1
        del self.frames[place]
        self.dropped += 1

    def _segment_of(self, frame: FrameSound) -> Segment:
        return self.segments[frame.segment if frame.segment is not None else -1]


def _is_quiet(frame: FrameSound) -> bool:
    return float(np.sqrt(np.mean(frame.speech**2))) < QUIET


def _append(arriving: Arriving, speech: Samples, sound: Samples) -> None:
    arriving.speech = np.concatenate((arriving.speech, speech))
    arriving.sound = np.concatenate((arriving.sound, sound))
