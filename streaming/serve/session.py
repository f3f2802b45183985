"""A session that is served: a live session, its viewers, who speaks in it, and who hears of it. Knows no HTTP."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import msgspec
from numpy.typing import NDArray

from model.config import ChunkConfig
from model.errors import UserError
from streaming.live.session import LiveSession
from streaming.live.states import State
from streaming.live.timeline import Event, LagChanged, PlaybackFinished, PlaybackStarted, StateChanged
from streaming.serve.broadcast import Broadcast
from streaming.serve.encoder import MomentEncoder
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Limits
from streaming.serve.messages import (
    Bye,
    Clear,
    ErrorMessage,
    FromServer,
    LagMessage,
    PlaybackFinishedMessage,
    PlaybackStartedMessage,
    Ready,
    StateMessage,
    StatsMessage,
)
from streaming.serve.viewer import Viewer
from streaming.sources import SOUND_RATE

MEASURED = 5  # seconds over which moments are counted

log = logging.getLogger("flashtalk.serve")


class Listener(Protocol):
    """Who hears of a session."""

    viewer: Viewer | None  # its viewer, if it has one

    def put(self, message: FromServer) -> None:
        """Takes a message; soon returns."""
        ...


class Session:
    """A session with viewers, listeners and at most one speaker. All methods are called in the event loop.

    Attributes:
        id: names it.
        key: whoever has it may do everything with this session.
        live: what generates.
        broadcast: what viewers get.
        listeners: who hear of it.
        begun: when it began here, by the monotonic clock.
        ended: why it ended, once it has.
        interrupts: how often speech was interrupted.
    """

    def __init__(
        self,
        identifier: str,
        key: str,
        live: LiveSession,
        chunk: ChunkConfig,
        limits: Limits,
        keep: Callable[["Session"], Awaitable[object]] | None = None,
        resumed: bool = False,
    ) -> None:
        """Takes over a live session; `run` begins.

        Args:
            identifier: names the session.
            key: allows everything with it.
            live: is closed at the end.
            chunk: of `live`.
            limits: of this session.
            keep: is called after the last moment if somebody may want to resume the session.
            resumed: whether somebody has seen what came before, and is about to come back.
        """
        self.id, self.key, self.live, self.chunk, self.limits = identifier, key, live, chunk, limits
        encoder = MomentEncoder(chunk.width, chunk.height, chunk.tgt_fps)
        self.broadcast = Broadcast(
            live.moments(),
            encoder,
            chunk.tgt_fps,
            rests=lambda: live.state == State.IDLE,
            patience=limits.connect if resumed else 0.0,
        )
        self.listeners: set[Listener] = set()
        self.ended: str | None = None
        self._keep = keep
        self.interrupts = self._connections = 0
        self._speaker: object | None = None
        self._now = time.monotonic
        self.begun = self._attended = self._heard = self._now()
        self._positions = deque([(self._now(), live.position)], maxlen=MEASURED + 1)  # of the last seconds
        self._done = asyncio.Event()

    # --- Sound -------------------------------------------------------------------------------------------------------

    def claim(self, speaker: object) -> None:
        """Lets nobody else speak until `release`. Raises `RefusedError` if somebody else speaks."""
        if self._speaker not in (None, speaker):
            raise RefusedError("busy")
        self._speaker = speaker

    def release(self, speaker: object) -> None:
        """Ends the segment of a speaker, and lets others speak."""
        if self._speaker is speaker:
            self._speaker = None
            with suppress(RefusedError):  # the session has ended, which it tells by itself
                self.end_segment()

    def release_all(self) -> None:
        """Ends the segment of whoever speaks: of a connection that is lost, nothing else may tell for a while."""
        if self._speaker is not None:
            self.release(self._speaker)

    async def say(self, pcm: NDArray, rate: int, segment: int | None) -> bool:
        """Adds samples, [n] or [n, channels], to a segment; while the queue is full, waits.

        Returns whether all were taken: what waits when the session is interrupted is discarded. Raises `RefusedError`
        for what cannot be used.
        """
        self._heard, interrupts, taken = self._now(), self.interrupts, 0
        self.broadcast.wake()
        while interrupts == self.interrupts:
            with _refusing():
                taken += self.live.push_audio(pcm[taken:], rate, segment, timeout=0)
            if taken == len(pcm):
                return True
            self.broadcast.wake()
            await self.broadcast.next_ticked()
            self._heard = self._now()
        return False

    def end_segment(self) -> None:
        """The segment that is arriving has ended."""
        with _refusing():
            self.live.end_segment()

    def interrupt(self) -> PlaybackFinished | None:
        """Stops speech at once. Returns what was heard of the segment, None if there was none."""
        with _refusing():
            finished = self.live.interrupt()
        if finished:
            self.interrupts += 1
            self.tell(Clear(self.broadcast.next_tick))
        return finished

    # --- Who is there ------------------------------------------------------------------------------------------------

    def join(self, outlet: str, changed: asyncio.Event | None = None) -> Viewer:
        """A new viewer. Raises `RefusedError` if there are too many."""
        if len(self.broadcast.viewers) >= self.limits.viewers:
            raise RefusedError("limit_viewers")
        return self.broadcast.join(outlet, changed)

    def attend(self) -> None:
        """A connection has come; a session without any ends after `Limits.unattended`."""
        self._connections += 1

    def leave(self) -> None:
        """A connection has gone."""
        self._connections -= 1
        self._attended = self._now()

    def tell(self, message: FromServer) -> None:
        """Tells all listeners."""
        for listener in list(self.listeners):
            listener.put(message)

    def happened(self, event: Event) -> None:
        """Tells all listeners of an event."""
        match event:
            case PlaybackStarted():
                self.tell(PlaybackStartedMessage(event.segment, event.index))
            case PlaybackFinished():
                self.tell(PlaybackFinishedMessage(event.segment, event.position, event.interrupted))
            case StateChanged():
                self.tell(StateMessage(event.after))
            case LagChanged():
                self.tell(LagMessage(event.lagging, event.ratio))

    def ready(self) -> Ready:
        """What a client that begins to listen needs to know."""
        return Ready(
            self.chunk.width, self.chunk.height, self.chunk.tgt_fps, SOUND_RATE, str(self.live.state),
            self.live.position, self.live.next_segment, self.broadcast.mime, self.limits.told(),
        )  # fmt: skip

    @property
    def bye(self) -> Bye | None:
        """What all listeners have been told last; None while there is more to come."""
        return Bye(self.ended or "closed", self.live.position) if self._done.is_set() else None

    # --- Time --------------------------------------------------------------------------------------------------------

    def overdue(self, now: float) -> str | None:
        """Why the session should end by now; None if it should not."""
        if not self._connections and now - self._attended > self.limits.unattended:
            return "unattended"
        if self.live.state in (State.IDLE, State.LISTENING) and now - self._heard > self.limits.idle:
            return "idle"
        return None

    def each_second(self, now: float) -> None:
        """Closes viewers that are stuck, and tells figures."""
        for viewer in list(self.broadcast.viewers):
            if viewer.dropped and now - viewer.moved > self.limits.stuck:
                self.broadcast.leave(viewer)
        self._positions.append((now, self.live.position))
        if self.listeners:
            figures = self.figures()
            for listener in list(self.listeners):
                dropped = listener.viewer.dropped if listener.viewer else 0
                listener.put(msgspec.structs.replace(figures, dropped=dropped))

    def figures(self) -> StatsMessage:
        """What goes on, in figures."""
        stats = self.live.stats(("latency", "chunk"))
        fps, chunk = self.chunk.tgt_fps, stats["chunk"]["p50_s"]
        (then, before), (now, position) = self._positions[0], self._positions[-1]
        return StatsMessage(
            state=stats["state"],
            position=stats["position"],
            fps=round((position - before) / (now - then), 1) if now > then else 0.0,
            latency_p50=stats["latency"]["p50_s"],
            latency_p95=stats["latency"]["p95_s"],
            queue=stats["queued_frames"] / fps,
            made=stats["made_frames"] / fps,
            lagging=stats["lagging"],
            speed=round(self.chunk.new_frames / fps / chunk, 2) if chunk else None,
            held=self.broadcast.held,
            viewers=len(self.broadcast.viewers),
            dropped=0,
        )

    # --- Beginning and end -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the session until it has ended, for whatever reason, and tells everybody."""
        try:
            await self.broadcast.run()
            if self._keep and self.ended not in (None, "closed"):
                await self._keep(self)
        except Exception as error:
            self.ended = "failed"
            log.exception("session %s has failed", self.id, exc_info=error)
            message = str(error) if isinstance(error, UserError | RefusedError) else "generation has failed"
            self.tell(ErrorMessage("failed", message, True))
        finally:
            self.ended = self.ended or "closed"
            try:
                await asyncio.to_thread(self.live.close)
            finally:
                for viewer in list(self.broadcast.viewers):
                    self.broadcast.leave(viewer)
                self.tell(Bye(self.ended, self.live.position))
                self._done.set()

    async def close(self, reason: str) -> None:
        """Hands over no more moments, ends the session, and waits until it has ended.

        The reason "closed" says that nobody will resume it.
        """
        if not self.ended:
            self.ended = reason
            self.broadcast.stop()
        await self._done.wait()


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns what a live session raises into what a client is told."""
    try:
        yield
    except ValueError as error:
        raise RefusedError("bad_audio", str(error)) from error
    except UserError as error:
        raise RefusedError("failed", str(error)) from error
    except RuntimeError as error:
        raise RefusedError("not_found", "the session has ended") from error


def on_event(loop: asyncio.AbstractEventLoop, session: Callable[[], "Session | None"]) -> Callable[[Event], None]:
    """Carries events from the threads of a live session to the event loop."""

    def tell(event: Event) -> None:
        if there := session():
            there.happened(event)

    def carry(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, event)

    return carry
