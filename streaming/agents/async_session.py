"""A live session on an event loop: nothing here blocks the loop, and what happened is told in its thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from streaming.live.session import LiveSession
from streaming.live.timeline import Event, Moment
from streaming.pipeline import Picture, TalkingHeadPipeline

ENDED = (UserError, RuntimeError)  # what a session raises that has ended; `moments` says why
PIECE = 0.2  # seconds of sound after which others have their turn
ROOM = 0.04  # seconds after which a full queue is asked for room again


class AsyncSession:
    """A session that hears the segments of a voice agent. Its methods are for the thread of the loop that opened it.

    Attributes:
        listeners: are called with each event, by `tell`.
    """

    _live: LiveSession

    def __init__(self) -> None:
        """Use `open`."""
        self.listeners: list[Callable[[Event], None]] = []
        self._events: deque[Event] = deque()  # that are still to be told; any thread adds to it
        self._number, self._seconds = 0, 0.0  # of the segment that arrives, and how much of it was pushed
        self._dropped = 0  # segments below this number were interrupted

    @classmethod
    async def open(cls, pipeline: TalkingHeadPipeline, image: Picture, **options: Any) -> Self:
        """Opens a session in a thread of its own, as networks may have to be loaded.

        Args:
            pipeline: makes the face; it is busy until the session is closed.
            image: the portrait.
            options: as in `TalkingHeadPipeline.live`.
        """
        session = cls()
        opening = asyncio.ensure_future(
            asyncio.to_thread(pipeline.live, image, kind="segments", on_event=session._events.append, **options)
        )
        try:
            session._live = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread goes on, and what it opens would keep the pipeline busy
            opening.add_done_callback(_close_opened)
            raise
        return session

    # --- Sound -------------------------------------------------------------------------------------------------------

    @property
    def place(self) -> tuple[int, float]:
        """Where the next sound belongs: number of the segment, and seconds of it that were pushed."""
        return self._number, self._seconds

    async def push(self, pcm: NDArray[np.int16], rate: int) -> None:
        """Adds samples [n, channels] to the segment that arrives, and waits while the queue is full.

        What was not taken before an interruption is discarded. Raises `ValueError` for samples or a rate that no
        session takes.
        """
        number = self._number
        with suppress(*ENDED):
            while len(pcm) and number == self._number:
                piece = pcm[: max(1, round(PIECE * rate))]
                taken = self._live.push_audio(piece, rate, number, timeout=0)
                self._seconds += taken / rate
                pcm = pcm[taken:]
                if len(pcm):
                    await asyncio.sleep(0 if taken == len(piece) else ROOM)

    def end_segment(self) -> None:
        """Ends the segment that arrives. Nothing happens if none of its sound was pushed."""
        if self._seconds:
            self._next_segment()
            with suppress(*ENDED):
                self._live.end_segment()
            self.tell()

    def interrupt(self) -> None:
        """Drops all sound and frames that were not handed over. When this returns, the ends of segments were told."""
        self._next_segment()
        self._dropped = self._number
        with suppress(*ENDED):
            self._live.interrupt()
        self.tell()

    def _next_segment(self) -> None:
        self._number, self._seconds = self._number + 1, 0.0

    # --- Moments -----------------------------------------------------------------------------------------------------

    def moments(self) -> AsyncIterator[Moment]:
        """The moments, each when it is due, until the session is closed. Raises what ended the generation.

        Whoever has shown a moment calls `tell`.
        """
        return self._live.moments()

    def is_interrupted(self, moment: Moment) -> bool:
        """Whether the moment belongs to a segment that was interrupted after the moment had been handed over."""
        return moment.segment is not None and moment.segment < self._dropped

    def tell(self) -> None:
        """Tells the listeners what has happened."""
        while self._events:
            event = self._events.popleft()
            for listener in self.listeners:
                listener(event)

    def stats(self) -> dict[str, Any]:
        """What was counted and measured: `LiveSession.stats`."""
        return self._live.stats()

    async def close(self) -> None:
        """Ends the session. What was not handed over is lost."""
        await asyncio.to_thread(self._live.close)


def pcm_of(sound: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in [-1, 1] as 16-bit ones; those that came in 16 bits at the same rate are the same again."""
    return np.rint(sound * 32768).clip(-32768, 32767).astype(np.int16)


def _close_opened(opening: asyncio.Future[LiveSession]) -> None:
    if not opening.cancelled() and not opening.exception():
        opening.result().close()
