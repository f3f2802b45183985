"""A session in virtual time: a face that is drawn in no time and says how long it took, and a director that is told.

Hours pass in seconds, and nothing depends on the machine's load.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.audio import Ring
from model.config import PRECISIONS, ChunkConfig
from model.text import tokenize
from model.weights.checkpoint import random_models
from streaming.generator import ChunkGenerator
from streaming.live.director import Director, Options, Work
from streaming.live.face import FaceState, Finished, PortraitFace, Quality, Rendered, Unit, Way
from streaming.live.timeline import Event, Moment
from streaming.live.voice import Kind, Voice
from streaming.timers import StageTimer
from tests.small import SMALL

CHUNK = ChunkConfig(height=1, width=4)
FRAME = 1 / 25
LETTERS = replace(SMALL, name="letters", text=replace(SMALL.text, vocab_size=384))  # has all letters


class DrawnFace:
    """Frames whose pixels say which they are and what they hear: chunk, frame of the chunk, loudness, frame before."""

    def __init__(self, chunk: ChunkConfig = CHUNK) -> None:
        self.chunk, self.seed = chunk, 0
        self.qualities = (Quality(4, 100, 100), Quality(2, 100, 100), Quality(2, 50, 50))
        self.drawn: list[int] = []  # qualities of the chunks

    def start(self) -> FaceState:
        tail = np.zeros((5, 1, 4, 3), np.uint8)
        return FaceState(0, None, tail, _DeafRing.empty(self.chunk))

    def generate(self, state: FaceState, speech: NDArray[np.float32], quality: int) -> Generator[Unit, None, None]:
        self.drawn.append(quality)
        ring, before, pictures = state.ring.append(speech), state.tail[-1], []
        for _ in range(self.qualities[quality].steps - 1):
            yield None
        for group in _fours():
            pictures += [picture(state.number, k, speech[k * 640 : (k + 1) * 640], before) for k in group]
            before = pictures[-1]
            yield Rendered(np.stack(pictures[-len(group) :]))
        yield Finished(FaceState(state.number + 1, None, np.stack(pictures[-5:]), ring), 0.0)


def _fours() -> list[range]:
    return [range(k, k + 4) for k in range(0, 28, 4)]


class _DeafRing(Ring):
    """A ring that keeps no sound: measuring its loudness would take most of a drawn face's time."""

    def append(self, samples: NDArray[np.float32]) -> Ring:  # noqa: ARG002
        return self

    def without_last(self, count: int, before: Ring) -> Ring:  # noqa: ARG002
        return self


def picture(number: int, k: int, speech: NDArray[np.float32], before: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame: bytes of the chunk's number, its place, how loud it is, and those of the frame before it."""
    loud = int(np.abs(speech).mean() * 255)
    values = [number >> 8, number & 255, k, loud, *before.reshape(-1)[:3], 0, 0, 0, 0, 0]
    return np.array(values, np.uint8).reshape(1, 4, 3)


@dataclass
class Stage:
    """A session, its virtual time, and everything that was handed over.

    Attributes:
        step, group: seconds of a denoising step, and of the decoding of four frames.
        watching: whether somebody takes moments.
        taking: seconds that the consumer needs for a moment.
    """

    kind: Kind = "segments"
    lag: str = "wait"
    wait_frames: int = 28
    limit: int = 1500
    step: float = 0.1
    group: float = 0.03
    watching: bool = True
    taking: float = 0.0
    now: float = 100.0
    moments: list[Moment] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)
    keep: Callable[[Moment], bool] = lambda _: True
    face: Any = field(default_factory=lambda: DrawnFace())

    def __post_init__(self) -> None:
        options = Options(self.lag, self.wait_frames)  # pyright: ignore[reportArgumentType]
        self.director = Director(self.face, Voice(self.kind, self.face.chunk, self.limit), options)
        self._script: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._unit: tuple[float, Work, Unit] | None = None  # in work: when it will be done
        self._free = self.now  # when the consumer takes the next moment

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        """Does something so many seconds from now."""
        heapq.heappush(self._script, (self.now + seconds, next(self._order), action))

    def push(self, pcm: NDArray, rate: int = 16000, segment: int | None = None) -> int:
        return self.director.push(pcm, rate, segment, self.now)

    def speak(self, pcm: NDArray, rate: int = 16000, speed: float = 10.0, piece: float = 0.1, end: bool = True) -> None:
        """Sends a segment, so many times faster than real time, in pieces of so many seconds."""
        size = round(piece * rate)
        for k, begin in enumerate(range(0, len(pcm), size)):
            self.at(k * piece / speed, lambda part=pcm[begin : begin + size]: self.push(part, rate))
        if end:
            self.at(len(pcm) / rate / speed, self.director.end)

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.now + seconds
        while self.now < end:
            self._act()
            shown = self.director.shown
            times = [end, self._work(), self._take(), *[entry[0] for entry in self._script[:1]]]
            if self.director.shown == shown:  # what was taken may have made work
                self.now = max(self.now, min(times))

    def _act(self) -> None:
        while self._script and self._script[0][0] <= self.now:
            heapq.heappop(self._script)[2]()
            self._collect()

    def _work(self) -> float:
        if self._unit and self._unit[0] <= self.now:
            _, work, unit = self._unit
            self._unit = None
            self.director.note(work, unit, self.now)
        planned = self.director.plan(self.now)
        if self._unit:
            return self._unit[0]
        if not isinstance(planned, Work):
            return planned
        unit = next(planned.units)
        cost = self._seconds(planned, unit)
        self._unit = self.now + cost, planned, unit
        return self._unit[0]

    def _seconds(self, work: Work, unit: Unit) -> float:
        scale = self.face.qualities[work.chunk.quality].width / self.face.qualities[0].width
        return (self.step if unit is None else self.group) * scale**2

    def _take(self) -> float:
        while self.watching and self.now >= self._free:
            moment = self.director.take(self.now)
            self._collect()
            if not isinstance(moment, Moment):
                return moment
            self._free = self.now + self.taking
            if self.keep(moment):
                self.moments.append(moment)
        return self._free if self.watching else math.inf

    def _collect(self) -> None:
        self.events += [(self.now, event) for event in self.director.playback.events]
        self.director.playback.events.clear()


def small_face(seed: int = 1) -> PortraitFace:
    """A face of small random networks: chunks of four frames of 48 x 32 pixels."""
    models = random_models(LETTERS, torch.device("cpu"), PRECISIONS["fp32"])
    generator = ChunkGenerator(models, StageTimer(torch.device("cpu")))
    portrait = np.random.default_rng(seed).integers(0, 255, (32, 48, 3)).astype(np.uint8)
    ids = tokenize("AB", LETTERS.text, LETTERS.dit.text_len, None)
    conditions = generator.prepare(torch.from_numpy(portrait).permute(2, 0, 1), ids)
    return PortraitFace([Way(generator, conditions)], models.audio, portrait, seed)


def tone(frames: int, level: float = 0.5) -> NDArray[np.float32]:
    """Sound of so many frames at 16 kHz, each of another loudness."""
    return np.repeat(np.linspace(level / 2, level, frames, dtype=np.float32), 640)
