"""When viewers get what: a moment each 40 ms, and where none has come, the last picture again, in silence.

A live session hands over nothing after an interruption or while generation stalls. Viewers need something all the same:
a jitter buffer that runs dry stretches the last syllable, and a media element stops. So time goes on in *ticks* of one
frame, and a tick without a moment is a *hold*.
"""

import math

SLACK = 0.08  # seconds by which a moment may be late before its tick becomes a hold: jitter buffers bear it
LONGEST = 1.0  # seconds; a pause of this process that is longer is not filled, but moves what follows


class Ticks:
    """Gives ticks to moments and holds. It is told the time.

    Attributes:
        next: number of the next tick.
    """

    def __init__(self, fps: int) -> None:
        self.next = 0
        self._period = 1 / fps
        self._origin: float | None = None  # when tick 0 was due; None until a moment comes
        self._holding = False

    def rest(self) -> None:
        """Nobody watches: the next moment begins anew, without holds before it."""
        self._origin, self._holding = None, False

    @property
    def hold_at(self) -> float:
        """When the next tick becomes a hold, unless a moment comes before; infinity before the first one."""
        if self._origin is None:
            return math.inf
        return self._origin + self.next * self._period + (0 if self._holding else SLACK)

    def moment(self, now: float) -> int:
        """The tick of a moment that comes now."""
        late = 0.0 if self._origin is None else now - self._origin - self.next * self._period
        if self._origin is None:
            self._origin = now - self.next * self._period
        elif late > LONGEST:
            self._origin += late
        self._holding = False
        return self._take()

    def holds(self, now: float) -> list[int]:
        """The ticks that have become holds by now."""
        ticks = []
        while self.hold_at <= now and len(ticks) * self._period < LONGEST:
            self._holding = True
            ticks.append(self._take())
        return ticks

    def _take(self) -> int:
        self.next += 1
        return self.next - 1
