"""Decides what is generated next, where what was made is cut, and which moment is handed over when.

The director is told the time and does no work itself, so that hours of it pass in seconds of a test. It knows three
kinds of frames: those that were *shown*, that is handed over; those that are *made* and wait; and those of the chunk
*in work*. Frames that no sound was sent for hear *filler*, which is silence. Whatever waits with filler can be thrown
away when sound comes, so a face that idles is made far ahead, and speech does not wait for it.
"""

import math
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming.live.face import Face, FaceState, Finished, Rendered, Unit, cut
from streaming.live.pace import Drift, Durations, Schedule, high
from streaming.live.pcm import check_rate, mono
from streaming.live.playback import Playback
from streaming.live.quality import QualityChoice
from streaming.live.states import Cause, State
from streaming.live.stats import Stats
from streaming.live.timeline import FrameSound, LagChanged, Moment, PlaybackFinished, filler
from streaming.live.voice import Voice

Lag = Literal["wait", "drop", "smaller"]
LAGS = ("wait", "drop", "smaller")
MARGIN = 0.08  # seconds by which a chunk's first frame is wanted before it is due
SETTLED = 0.1  # seconds without sound after which a segment's beginning is generated though more may follow
JITTER = 5  # frames of a microphone that may wait beyond a chunk's, where late ones are dropped
JUDGED = 5  # chunks that decide whether generation lags


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk that has frames which were not shown."""

    before: FaceState
    quality: int
    start: int  # index of its first frame
    sounds: tuple[FrameSound, ...]  # of all its new frames
    kept: int  # frames that are made and will be shown
    whole: bool = False  # whether it was generated to its end, and the next one goes on from what it handed on

    @property
    def speech(self) -> NDArray[np.float32]:
        """What the speech encoder hears."""
        return np.concatenate([sound.speech for sound in self.sounds])


@dataclass(eq=False)
class Work:
    """The chunk in work: `units` is to be advanced, outside of any lock, and what it gives goes to `Director.note`."""

    chunk: Chunk
    units: Generator[Unit, None, None]
    begun: float
    noted: float  # when the last unit was done
    made: int = 0  # frames so far


@dataclass(frozen=True, eq=False)
class Made:
    """A frame that waits to be shown."""

    rgb: NDArray[np.uint8]
    sound: FrameSound
    chunk: int
    begun: float
    decoded: float


class Start(NamedTuple):
    """The next chunk."""

    frame: int  # that it begins with
    at: float  # when it begins; inf: not before something happens
    speaks: bool  # whether it takes sound from the queue


@dataclass(frozen=True)
class Options:
    """How a session behaves.

    Attributes:
        lag: what happens where generation is slower than real time. "wait" falls behind; "drop" drops sound of a
            microphone; "smaller" takes fewer steps and then a smaller picture.
        wait_frames: frames of sound that a chunk waits for while more may come. Fewer than a chunk's make speech start
            earlier, and the rest of the chunk is generated in vain.
    """

    lag: Lag
    wait_frames: int


class Director:
    """The decisions of a session.

    Attributes:
        playback: state and events.
        stats: counts and measures.
        shown: index of the next moment that is handed over.
        work: the chunk in work; None if there is none.
        next_state: what the next chunk goes on from; None while there is a chunk in work.
        next_number: of the next chunk. One that was given up or cut does not give its number back.
        chunks: that have frames which were not shown, without the one in work.
        made: frames that wait to be shown.
        recent: frames shown last.
        last_shown: segment of the last one.
        quality: how chunks are generated.
        durations: how long chunks took.
        lagging: whether the last chunks took longer than they last.
    """

    def __init__(self, face: Face, voice: Voice, options: Options) -> None:
        self.face, self.voice, self.options = face, voice, options
        self.stats = Stats()
        self.playback = Playback(voice, face.chunk, self.stats)
        self.shown = 0
        self.work: Work | None = None
        self.lagging = False
        start = face.start()
        self.next_state: FaceState | None = start
        self.next_number = 0
        self.chunks: deque[Chunk] = deque()
        self.made: deque[Made] = deque()
        self.recent = deque(start.tail, maxlen=len(start.tail))
        self.last_shown: int | None = None
        self._chunk, self._filler = face.chunk, filler(face.chunk)
        self._schedule: Schedule | None = None  # from the first moment on
        self.durations, self._drift = Durations(), Drift()
        self.quality = QualityChoice(face.qualities, face.chunk)
        self._gap = False  # whether an interruption took the frames that were due

    # --- Sound -------------------------------------------------------------------------------------------------------

    def push(self, pcm: NDArray, rate: int, segment: int | None, now: float) -> int:
        """Takes samples for a segment as far as there is room; returns how many.

        Raises `ValueError`, and takes nothing, for samples or a rate that cannot be used, or a segment that has ended.
        """
        samples = mono(pcm)
        check_rate(rate)
        number = self.voice.number_of(segment)
        if number is None:
            self.stats.counts.discarded_s += len(samples) / rate
            return len(samples)
        if self.voice.kind == "segments":
            samples = samples[: self.voice.room(rate)]
        if not len(samples):
            return 0
        if number >= self.voice.next_number:
            self.playback.begin(number)
        dropped = self.voice.dropped
        self.voice.push(samples, rate, number, now)
        self._count_dropped(dropped)
        counts = self.stats.counts
        counts.most_queued_frames = max(counts.most_queued_frames, len(self.voice.frames))
        self.playback.finish_heard()
        return len(samples)

    def end(self) -> None:
        """Ends the segment that is arriving."""
        self.voice.end()
        self.playback.finish_heard()

    def interrupt(self, now: float) -> PlaybackFinished | None:
        """Drops queued sound and unshown frames; returns what was heard of the first segment that was not finished.

        None, and nothing changes, if there is no such segment.
        """
        finished = self.playback.interrupt(now)
        if finished:
            self._cut(self.shown)
            self._gap = True
        return finished

    def close(self) -> None:
        """Ends the session: no chunk is begun any more."""
        self.work = None
        self.playback.change(Cause.CLOSE)

    # --- Generation --------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Work | float:
        """The chunk in work, or the time before which there is none if nothing happens.

        Begins a chunk if it is time to, and cuts what was made if that lets speech start earlier.
        """
        if self.playback.state == State.CLOSED:
            return math.inf
        start = self._next_start(now)
        if start.at <= now:
            self._begin(start, now)
        return self.work or start.at

    def note(self, work: Work, unit: Unit, now: float) -> None:
        """Takes what a chunk in work gave; nothing happens if that was given up meanwhile."""
        if work is not self.work:
            return
        took, work.noted = now - work.noted, now
        if unit is None:
            self.durations.step.append(took)
        elif isinstance(unit, Rendered):
            if not work.made:
                self.durations.first.append(now - work.begun)
                self.stats.begun_to_decoded.add(now - work.begun)
            for rgb, sound in zip(unit.rgb, work.chunk.sounds[work.made :], strict=False):
                self.made.append(Made(rgb, sound, work.chunk.before.number, work.begun, now))
            work.made += len(unit.rgb)
            counts = self.stats.counts
            counts.most_made_frames = max(counts.most_made_frames, len(self.made))
        else:
            self._finish(work, unit, now)

    def _finish(self, work: Work, end: Finished, now: float) -> None:
        self._keep(work, whole=True)
        self.work, self.next_state = None, end.state
        self.stats.counts.chunks += 1
        self.stats.chunk.add(now - work.begun)
        self.stats.distance.append(end.distance)
        self.durations.whole.append(now - work.begun)
        recent = list(self.durations.whole)[-JUDGED:]
        ratio = sum(recent) / len(recent) * self._chunk.tgt_fps / self._chunk.new_frames
        if len(recent) == JUDGED and (ratio > 1) != self.lagging:
            self.lagging = ratio > 1
            self.playback.events.append(LagChanged(self.lagging, ratio))
        if self.options.lag == "smaller" and self.quality.choose(self.durations):
            self.durations.clear()

    def _next_start(self, now: float) -> Start:
        """First sound that waits, in place of filler; then what is in work; then sound that is awaited; then idling."""
        made, sound = self._made_end, self.voice.frames
        whole = len(sound) >= self.options.wait_frames or not self.voice.arriving
        last = self._last_planned
        following = sound[0].segment if sound else self.voice.arriving.number if self.voice.arriving else None
        goes_on = last is not None and last == following
        settled = self.voice.last_push + SETTLED
        if sound and (whole or not goes_on):
            index = max(self._filler_from, min(self.shown + self._lead, made))
            if self.work and index >= min(made + 1, self._planned_end):  # what is in work comes first
                return Start(made, math.inf, True)
            if whole or now >= settled:
                return Start(index, now if self._is_near(index) else math.inf, True)
        if self.work:
            return Start(made, math.inf, False)
        if goes_on and not whole:  # what comes until the last moment is heard without a gap
            return Start(made, self._due(made, now) - self._first - MARGIN, True)
        idle = now if self._is_near(made) else math.inf
        return Start(made, min(idle, settled) if sound and idle > now else idle, False)

    def _begin(self, start: Start, now: float) -> None:
        if self.work or start.frame < self._made_end:
            self._cut(start.frame)
        taken: list[FrameSound] = []
        if start.speaks:
            if self.voice.kind == "microphone":
                self._keep_microphone_live(now)
            taken = self.voice.take(self._chunk.new_frames)
        sounds = (*taken, *[self._filler] * (self._chunk.new_frames - len(taken)))
        if self.next_state is None:
            raise RuntimeError("a chunk was begun while another is in work")
        before = replace(self.next_state, number=self.next_number)
        chunk = Chunk(before, self.quality.index, self._made_end, sounds, 0)
        self.work = Work(chunk, self.face.generate(before, chunk.speech, chunk.quality), now, now)
        self.next_state = None
        self.next_number += 1

    def _keep(self, work: Work, whole: bool) -> None:
        """Keeps the frames that a chunk in work has made."""
        if work.made:
            self.chunks.append(replace(work.chunk, kept=work.made, whole=whole))

    def _cut(self, index: int) -> None:
        """Throws away what was made from frame `index` on, and the chunk in work; the next chunk begins there."""
        counts = self.stats.counts
        if self.work:
            self._keep(self.work, whole=False)
            counts.abandoned += 1
        place = index - self.shown
        tail = [*self.recent, *(frame.rgb for frame in list(self.made)[:place])][-len(self.recent) :]
        if self.work and self.work.chunk.start == index:
            self.next_state = self.work.chunk.before
        self.work = None
        while self.chunks and self.chunks[-1].start >= index:
            self.next_state = self.chunks.pop().before
        if (self.chunks and index < self.chunks[-1].start + self.chunks[-1].kept) or self.next_state is None:
            last = self.chunks.pop()
            kept = index - last.start
            self.next_state = cut(last.before, last.speech, kept, np.stack(tail))
            self.chunks.append(replace(last, kept=kept, whole=False))
            counts.cut += 1
        counts.discarded_frames += len(self.made) - place
        while len(self.made) > place:
            self.made.pop()

    # --- Moments -----------------------------------------------------------------------------------------------------

    def take(self, now: float) -> Moment | float:
        """The next moment, or the time before which there is none if nothing happens."""
        if not self.made or self.playback.state == State.CLOSED:
            return math.inf
        due = self._due(self.shown, now)
        if now < due:
            return due
        before = self._schedule_at(now)
        self._schedule = before.after(self.shown, now)
        self._count_late(self._schedule.origin - before.origin, self.made[0].decoded > due)
        index, frame = self.shown, self._hand_over(now)
        sound = frame.sound
        return Moment(
            index, index / self._chunk.tgt_fps, frame.rgb, sound.sound, sound.segment, frame.chunk, sound.received,
            frame.begun, frame.decoded, now,
        )  # fmt: skip

    def skip_to(self, index: int, now: float) -> None:
        """Counts the frames before `index` as handed over, as far as they are made: somebody has them already."""
        while self.made and self.shown < index:
            self._hand_over(now)

    def _hand_over(self, now: float) -> Made:
        """The next frame that is made, which from now on was shown."""
        frame, index = self.made.popleft(), self.shown
        self.shown += 1
        self.recent.append(frame.rgb)
        self.last_shown = frame.sound.segment
        while self.chunks and self.shown >= self.chunks[0].start + self.chunks[0].kept:
            self.chunks.popleft()
        self.stats.counts.moments += 1
        self.playback.hand_over(frame.sound, index, now)
        return frame

    def _count_late(self, late: float, not_made: bool) -> None:
        counts, gap, self._gap = self.stats.counts, self._gap, False
        if late <= 0 or gap:
            return
        if not_made:
            counts.stalls += 1
            counts.stalled_s += late
        else:
            counts.consumer_late_s += late

    # --- A microphone ------------------------------------------------------------------------------------------------

    def _keep_microphone_live(self, now: float) -> None:
        """Drops sound that has become late, and corrects the drift of the microphone's clock in silence."""
        dropped, frames = self.voice.dropped, self.options.wait_frames
        if self.options.lag == "drop":
            self.voice.catch_up(frames + JITTER)
        needed = self._due(self._made_end, now) - self._first - MARGIN
        spare = needed - now + (len(self.voice.frames) - frames) / self._chunk.tgt_fps
        self.voice.clock = self._drift.note(spare, now) or self.voice.clock
        self._count_dropped(dropped)

    def _count_dropped(self, before: int) -> None:
        self.stats.counts.dropped_s += (self.voice.dropped - before) / self._chunk.tgt_fps

    # --- Places and times --------------------------------------------------------------------------------------------

    @property
    def _made_end(self) -> int:
        return self.shown + len(self.made)

    @property
    def _planned_end(self) -> int:
        return self.shown + len(self._planned)

    @property
    def _planned(self) -> list[FrameSound]:
        """The sound of all frames that are made or in work."""
        in_work = self.work.chunk.sounds[self.work.made :] if self.work else ()
        return list(chain((frame.sound for frame in self.made), in_work))

    @property
    def _last_planned(self) -> int | None:
        planned = self._planned
        return planned[-1].segment if planned else self.last_shown

    @property
    def _filler_from(self) -> int:
        """The frame from which on everything that is made or in work is filler."""
        planned = self._planned
        while planned and planned[-1].segment is None:
            planned.pop()
        return self.shown + len(planned)

    def _is_near(self, index: int) -> bool:
        """Whether a chunk may begin at a frame: at most a chunk's frames wait before it."""
        return index - self.shown <= self._chunk.new_frames

    @property
    def _first(self) -> float:
        """Seconds that a chunk is expected to take until its first frame."""
        return high(self.durations.first, self._chunk.new_frames / self._chunk.tgt_fps / 2)

    @property
    def _lead(self) -> int:
        """Frames that are shown before a chunk that is begun now can follow."""
        step = high(self.durations.step, 0.0)
        return math.ceil((self._first + step + MARGIN) * self._chunk.tgt_fps)

    def _due(self, index: int, now: float) -> float:
        """When a frame is due; before the first one is taken, as if that was now."""
        return self._schedule_at(now).due(index)

    def _schedule_at(self, now: float) -> Schedule:
        return self._schedule or Schedule(self._chunk.tgt_fps, now - self.shown / self._chunk.tgt_fps)
