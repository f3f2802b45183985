"""What both adapters are tested on: a face that is drawn in no time, and a clock by which every moment is due."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import ChunkConfig
from model.errors import UserError
from streaming.live.director import Director, Options
from streaming.live.face import FaceState, Finished, Rendered, Unit
from streaming.live.session import Clock, LiveSession
from streaming.live.timeline import Event
from streaming.live.voice import Voice
from streaming.pipeline import TalkingHeadPipeline
from tests.streaming.live.stage import DrawnFace

HANGS = 300  # seconds, which no machine takes
RATE = 24_000  # Hz, a usual rate of speech
HEIGHT, WIDTH = 32, 64


class BigFace(DrawnFace):
    """Drawn pictures of a size that encoders take; the left half of the second quarter shows the loudness."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(ChunkConfig(height=HEIGHT, width=WIDTH))
        self.fails_at = fails_at  # number of the chunk that cannot be generated
        self.may_draw = threading.Event()
        self.may_draw.set()

    def start(self) -> FaceState:
        state = super().start()
        return FaceState(state.number, state.motion, _enlarged(state.tail), state.ring)

    def generate(self, state: FaceState, speech: NDArray[np.float32], quality: int) -> Generator[Unit, None, None]:
        if state.number == self.fails_at:
            raise UserError("frame 28 holds NaN or infinity")
        for unit in super().generate(state, speech, quality):
            assert self.may_draw.wait(HANGS)
            if isinstance(unit, Rendered):
                yield Rendered(_enlarged(unit.rgb))
            elif isinstance(unit, Finished):
                last = unit.state
                yield Finished(FaceState(last.number, last.motion, _enlarged(last.tail), last.ring), unit.distance)
            else:
                yield unit


def _enlarged(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pictures.repeat(HEIGHT, 1).repeat(WIDTH // 4, 2)


class FastClock:
    """Time that passes when somebody looks, so that every moment is due as soon as it is made.

    Attributes:
        stands: while it is true no time passes, and no moment becomes due.
    """

    def __init__(self) -> None:
        self.stands = False
        self._time = 0.0

    def now(self) -> float:
        if not self.stands:
            self._time += 0.05
        return self._time

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        condition.wait(min(seconds, HANGS))


class Faces:
    """A pipeline of drawn faces."""

    def __init__(self, face: BigFace | None = None, clock: Clock | None = None, limit: int = 1500) -> None:
        self.face, self.limit = face or BigFace(), limit
        self.config = SimpleNamespace(chunk=self.face.chunk, name="drawn")
        self.clock = clock or FastClock()
        self.asked: dict[str, Any] = {}
        self.session: LiveSession | None = None
        self.open = 0  # sessions

    def live(self, image: object, *, kind: str, on_event: Callable[[Event], None], **options: Any) -> LiveSession:
        self.asked = {"image": image, "kind": kind, **options}
        self.open += 1
        voice = Voice("segments", self.face.chunk, self.limit)
        self.session = LiveSession(
            Director(self.face, voice, Options("wait", 28)),
            {},
            on_event=on_event,
            snapshots=None,
            clock=self.clock,
            release=self._release,
        )
        return self.session

    def load(self) -> None:
        pass

    def _release(self) -> None:
        self.open -= 1

    @property
    def pipeline(self) -> TalkingHeadPipeline:
        """Itself, for whoever insists on a pipeline."""
        return self  # pyright: ignore[reportReturnType]


def speech(seconds: float, rate: int = RATE, level: float = 0.5) -> NDArray[np.int16]:
    """A tone that nothing of which is silent or the same as what is said at another level."""
    times = np.arange(round(seconds * rate)) / rate
    return (level * 32767 * np.sin(2 * np.pi * 220 * times)).astype(np.int16)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test, which fails instead of hanging."""
    asyncio.run(asyncio.wait_for(main, HANGS))
