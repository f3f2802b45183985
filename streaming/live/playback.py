"""What is told of a session's playback: its state, the beginning and end of each segment, latencies."""

import math

from model.config import ChunkConfig
from streaming.live.states import Cause, State, next_state
from streaming.live.stats import Stats
from streaming.live.timeline import Event, FrameSound, PlaybackFinished, PlaybackStarted, StateChanged
from streaming.live.voice import Segment, Voice


class Playback:
    """Follows the segments of `voice` while their frames are handed over.

    Attributes:
        state: what the session is doing.
        events: that happened and were not collected.
    """

    def __init__(self, voice: Voice, chunk: ChunkConfig, stats: Stats) -> None:
        self.state = State.IDLE
        self.events: list[Event] = []
        self._voice, self._chunk, self._stats = voice, chunk, stats
        self._interrupted_at: float | None = None  # until speech is shown again
        self._earliest = -math.inf  # when the last frame of sound could have been heard at the earliest
        self._sent_in_silence: int | None = None  # the segment that had nothing before it to be heard

    def change(self, cause: Cause) -> None:
        """Goes to the next state."""
        before, self.state = self.state, next_state(self.state, cause)
        if before != self.state:
            self.events.append(StateChanged(before, self.state))

    def begin(self, segment: int) -> None:
        """A segment's first sound comes."""
        if not self._voice.segments:
            self._sent_in_silence = segment
        self.change(Cause.SOUND)

    def hand_over(self, sound: FrameSound, index: int, now: float) -> None:
        """Frame `index` and its sound are handed over."""
        if sound.segment is None:
            self._hand_over_filler()
            return
        segment = self._voice.segments[sound.segment]
        if not segment.started:
            segment.started = True
            self.events.append(PlaybackStarted(segment.number, index, now))
            self._note_first_frame(sound, now)
        if sound.received is not None:
            self._stats.sound_to_frame.add(now - sound.received)
            # Sound that came faster than it is heard waits for that before it, which no machine could change.
            self._earliest = max(sound.received, self._earliest + 1 / self._chunk.tgt_fps)
            self._stats.latency.add(now - self._earliest)
        segment.shown += 1
        segment.samples += sound.samples
        self.change(Cause.SPEECH_FRAME)
        self.finish_heard()

    def finish_heard(self) -> None:
        """Reports segments that have ended and were handed over."""
        heard = [s for s in self._voice.segments.values() if s.ended and s.shown == s.frames]
        for segment in heard:
            del self._voice.segments[segment.number]
            self.events.append(PlaybackFinished(segment.number, self._position(segment), False))
        if heard and not self._voice.segments:
            self.change(Cause.ALL_HEARD)

    def interrupt(self, now: float) -> PlaybackFinished | None:
        """Ends all segments where they are; returns how far the first was heard, None if there is none."""
        unfinished = self._voice.clear()
        if not unfinished:
            return None
        finished = [PlaybackFinished(segment.number, self._position(segment), True) for segment in unfinished]
        self.events += finished
        self._interrupted_at, self._sent_in_silence = now, None
        self._stats.counts.interrupts += 1
        self.change(Cause.INTERRUPT)
        return finished[0]

    def _hand_over_filler(self) -> None:
        arriving = self._voice.arriving
        if arriving and self._voice.segments[arriving.number].started:
            self._stats.counts.late_s += 1 / self._chunk.tgt_fps
        self.change(Cause.WAITING_FRAME if self._voice.segments else Cause.IDLE_FRAME)

    def _note_first_frame(self, sound: FrameSound, now: float) -> None:
        if sound.received is None:
            return
        if self._interrupted_at is not None:
            self._stats.interrupt_to_speech.add(now - max(self._interrupted_at, sound.received))
        elif sound.segment == self._sent_in_silence:
            self._stats.silence_to_speech.add(now - sound.received)
        self._interrupted_at = None

    def _position(self, segment: Segment) -> float:
        return segment.samples / self._chunk.sample_rate
