"""When frames are due, and how long chunks take."""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

RECENT = 20  # chunks whose times count
WATCHED = 30.0  # seconds over which a microphone's clock is watched
SPARE = (0.02, 0.16)  # seconds that a microphone's sound may come before it is needed, at the least of that time
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


@dataclass
class Drift:
    """Compares a microphone's clock with ours, by how long its sound comes before it is needed.

    One clock in ten thousand is wrong by 0.36 s an hour, so the least of `WATCHED` seconds shows it, whatever the
    jitter.
    """

    spare: deque[tuple[float, float]] = field(default_factory=deque)  # (when, seconds)

    def note(self, spare: float, now: float) -> Literal["fast", "slow"] | None:
        """Notes how long before it was needed a chunk's sound was complete; says what the clock is, once it shows."""
        if not math.isfinite(spare):
            return None
        self.spare.append((now, spare))
        if now - self.spare[0][0] < WATCHED:
            return None
        least = min(value for _, value in self.spare)
        self.spare.popleft()
        if SPARE[0] <= least <= SPARE[1]:
            return None
        self.spare.clear()
        return "slow" if least < SPARE[0] else "fast"
