"""When frames are due, and how long chunks take."""

from collections import deque
from dataclasses import dataclass, field, replace

RECENT = 20  # chunks whose times count
LATE = 0.02  # seconds: a frame that is handed over later than this moves those after it


@dataclass(frozen=True)
class Schedule:
    """Frame n is due at `origin` + n / fps, on a monotonic clock. Immutable."""

    fps: int
    origin: float

    def due(self, index: int) -> float:
        """When the frame is due."""
        return self.origin + index / self.fps

    def after(self, index: int, handed: float) -> "Schedule":
        """The schedule once the frame was handed over: what is late moves all that follows, and nothing is skipped."""
        late = handed - self.due(index)
        return replace(self, origin=self.origin + late) if late > LATE else self


@dataclass
class Durations:
    """Seconds that recent chunks took.

    Attributes:
        first: from the beginning of a chunk to its first frame.
        step: a denoising step.
        whole: a chunk with all of its frames.
    """

    first: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    step: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    whole: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def clear(self) -> None:
        """Forgets them."""
        for times in (self.first, self.step, self.whole):
            times.clear()


def high(times: deque[float], unknown: float) -> float:
    """What nine of ten recent times stayed within; `unknown` before the first one."""
    return sorted(times)[(9 * len(times) - 1) // 10] if times else unknown
