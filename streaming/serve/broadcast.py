"""Takes the moments of a session, encodes each once, and hands it to every viewer."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from streaming.live.timeline import Moment
from streaming.serve.encoder import Encoded, MomentEncoder
from streaming.serve.ticks import Ticks
from streaming.serve.viewer import Viewer
from streaming.sources import SOUND_RATE

FADE = SOUND_RATE // 100  # samples in which the last one before a hold fades away, so that nothing clicks
KEY_SPACING = 12  # ticks between key frames at least, however many viewers come


class Broadcast:
    """One stream of ticks for all viewers of a session.

    Attributes:
        viewers: who get the moments.
        held: ticks that were shown again because no moment had come.
        lost: moments that viewers lost, those included who have gone.
        on_encoded: is called with the seconds that encoding took.
    """

    def __init__(
        self,
        moments: AsyncIterator[Moment],
        encoder: MomentEncoder,
        fps: int,
        rests: Callable[[], bool],
        patience: float = 0.0,
    ) -> None:
        """Prepares; `run` begins.

        Args:
            moments: of the session.
            encoder: of its picture.
            fps: of the session.
            rests: whether the session has nothing to say. While nobody watches either, no moments are taken, so that
                none are generated; `wake` ends that.
            patience: seconds in which no moments are taken before the first viewer has come, so that it misses none.
        """
        self.viewers: set[Viewer] = set()
        self.held = self.lost = 0
        self.header, self.mime = encoder.header, encoder.mime
        self.on_encoded: Callable[[float], None] = lambda _: None
        self._moments, self._encoder, self._rests = moments, encoder, rests
        self._ticks, self._now, self._samples = Ticks(fps), time.monotonic, SOUND_RATE // fps
        self._awaited = self._now() + patience  # until then, or until the first viewer has come
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._wanted, self._ticked, self._stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._key_wanted, self._last_key = False, -KEY_SPACING
        self._rgb: NDArray[np.uint8] | None = None  # of the last moment
        self._moment = 0  # its index
        self._level = np.float32(0)  # of the last sample

    @property
    def next_tick(self) -> int:
        """Number of the next tick."""
        return self._ticks.next

    def join(self, outlet: str, changed: asyncio.Event | None = None) -> Viewer:
        """A new viewer, who gets everything from the next key frame on."""
        viewer = Viewer(outlet, self._request_key, self._now, changed)
        self.viewers.add(viewer)
        self._awaited = -math.inf
        self.wake()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """The viewer gets nothing any more."""
        viewer.close()
        if viewer in self.viewers:
            self.viewers.remove(viewer)
            self.lost += viewer.dropped

    def wake(self) -> None:
        """There is something to say."""
        self._wanted.set()

    def stop(self) -> None:
        """No more moments are taken; `run` ends."""
        self._stopped.set()
        self.wake()

    async def next_ticked(self) -> None:
        """Waits for the next tick."""
        await self._ticked.wait()

    async def run(self) -> None:
        """Until the session is closed, or `stop`. Raises what ended the generation."""
        stopped = asyncio.ensure_future(self._stopped.wait())
        following: asyncio.Future[Moment] | None = None
        try:
            while not self._stopped.is_set():
                if following is None:
                    await self._rest()
                    following = asyncio.ensure_future(anext(self._moments))
                wait = self._ticks.hold_at - self._now()
                timeout = None if math.isinf(wait) else max(0.0, wait)
                await asyncio.wait({following, stopped}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    moment, following = following.result(), None
                    await self._show(moment)
                else:
                    await self._hold()
            if following and following.done():  # it came while a hold was encoded
                await self._show(following.result())
        except StopAsyncIteration:
            return
        finally:
            stopped.cancel()
            if following:
                following.cancel()  # it has not taken a moment, or it would be done
            self._ticked.set()
            self._thread.shutdown(wait=False)

    async def _rest(self) -> None:
        while not self.viewers and not self._stopped.is_set():
            wait = None if self._rests() else self._awaited - self._now()
            if wait is not None and wait <= 0:
                return
            self._ticks.rest()
            self._wanted.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), wait)

    async def _show(self, moment: Moment) -> None:
        tick = self._ticks.moment(self._now())
        self._rgb, self._moment, self._level = moment.rgb, moment.index, moment.sound[-1]
        await self._send(tick, moment.rgb, moment.sound)

    async def _hold(self) -> None:
        for tick in self._ticks.holds(self._now()):
            assert self._rgb is not None, "a hold comes after a moment"
            self.held += 1
            silence = np.zeros(self._samples, np.float32)
            silence[:FADE] = np.linspace(self._level, 0, FADE)
            self._level = np.float32(0)
            await self._send(tick, self._rgb, silence)

    async def _send(self, tick: int, rgb: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        key = self._key_wanted and tick - self._last_key >= KEY_SPACING
        encoded, seconds = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._encode, tick, rgb, sound, key
        )
        if encoded.key:
            self._key_wanted, self._last_key = False, tick
        for viewer in list(self.viewers):
            viewer.offer(encoded)
        self.on_encoded(seconds)
        self._ticked.set()
        self._ticked = asyncio.Event()

    def _encode(
        self, tick: int, rgb: NDArray[np.uint8], sound: NDArray[np.float32], key: bool
    ) -> tuple[Encoded, float]:
        """In the encoder's thread: the moment, and the CPU seconds that it took."""
        begun = time.thread_time()
        encoded = replace(self._encoder.encode(tick, rgb, sound, key), moment=self._moment)
        return encoded, time.thread_time() - begun

    def _request_key(self) -> None:
        self._key_wanted = True
