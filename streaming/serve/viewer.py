"""What waits for one viewer: a short queue, which loses up to the next key frame if its reader is too slow."""

import asyncio
from collections import deque
from collections.abc import Callable

from streaming.serve.encoder import Encoded

WAITING = 12  # moments that may wait, 0.5 s


class Viewer:
    """A queue of encoded moments. Its reader gets all of them, or if it is slow, all from some key frame on.

    Attributes:
        outlet: how the moments leave, such as "webrtc".
        dropped: moments that were lost.
        moved: when something was taken last.
    """

    def __init__(
        self,
        outlet: str,
        request_key: Callable[[], None],
        now: Callable[[], float],
        changed: asyncio.Event | None = None,
    ) -> None:
        """Begins with the next key frame, and requests one.

        Args:
            outlet: a name for metrics.
            request_key: asks the encoder for a key frame.
            now: the clock of `moved`.
            changed: is set when there is something to take, and when the viewer is closed. Default: a new event.
        """
        self.outlet, self.dropped, self.moved = outlet, 0, now()
        self.changed = changed or asyncio.Event()
        self.closed = False
        self._now, self._waiting = now, deque[Encoded]()
        self._begun = self._in_order = False
        request_key()

    def offer(self, item: Encoded) -> None:
        """Adds a moment, or drops it and those that wait if there are too many."""
        if len(self._waiting) >= WAITING:
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self._in_order = False
        self._in_order = self._in_order or item.key
        if self._in_order:
            self._begun = True
            self._waiting.append(item)
            self.changed.set()
        elif self._begun:
            self.dropped += 1

    def take(self) -> Encoded | None:
        """The next moment; None if none waits."""
        if not self._waiting:
            return None
        self.moved = self._now()
        return self._waiting.popleft()

    async def next(self) -> Encoded | None:
        """Waits for the next moment; None when the viewer was closed."""
        while not self.closed:
            self.changed.clear()
            if item := self.take():
                return item
            await self.changed.wait()
        return None

    def close(self) -> None:
        """Ends the queue for its reader."""
        self.closed = True
        self.changed.set()
