"""A face for a Pipecat pipeline, between the service that speaks and the transport.

    face = TalkingHeadService(TalkingHeadPipeline.from_pretrained("tiny"), "me.jpg")
    pipeline = Pipeline([transport.input(), stt, user, llm, tts, face, transport.output(), assistant])

The sound comes out later than it goes in, by the time that the face takes. Whatever else comes down the pipeline keeps
its place in the sound, as it does in an output transport: a word is passed on when it has been said, and is dropped
with the sound when that is interrupted.
"""

import asyncio
import math
from collections import deque
from typing import Any

import numpy as np

try:
    from pipecat.frames.frames import (  # pyright: ignore[reportMissingImports]: it is an extra, here and below
        CancelFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        OutputTransportReadyFrame,
        SystemFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup  # pyright: ignore[reportMissingImports]
    from pipecat.services.ai_service import AIService  # pyright: ignore[reportMissingImports]
    from pipecat.services.settings import ServiceSettings  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("Pipecat is not installed: pip install 'flashtalk-triton[pipecat]'") from error

from streaming.agents.async_session import AsyncSession, pcm_of
from streaming.live.timeline import Event, Moment, PlaybackFinished
from streaming.pipeline import Picture, TalkingHeadPipeline
from streaming.sources import SOUND_RATE

Place = tuple[float, float]  # number of a segment, and seconds in it
ROUNDING = 1e-3  # seconds by which places may differ that are the same, since sound was resampled


class TalkingHeadService(AIService):
    """Shows a face that says what a text-to-speech service makes.

    Pushes an `OutputImageRawFrame` for each moment, 25 a second, and behind it 40 ms of sound as a `TTSAudioRawFrame`
    where something is said. Pictures take the way of the sound (`sync_with_audio`), so the transport needs
    `video_out_is_live=False`.
    """

    def __init__(
        self, pipeline: TalkingHeadPipeline, image: Picture, *, name: str | None = None, **options: Any
    ) -> None:
        """Takes a face for a pipeline.

        Args:
            pipeline: makes the face; it is busy while the Pipecat pipeline runs.
            image: the portrait, as in `TalkingHeadPipeline.live`.
            name: of the processor.
            options: as in `TalkingHeadPipeline.live`: prompt, seed, lag, wait_frames, max_queued, snapshots, resume.
        """
        super().__init__(name=name, settings=ServiceSettings(model=pipeline.config.name))
        self._faces, self._image, self._options = pipeline, image, options
        self._session: AsyncSession | None = None
        self._showing: asyncio.Task[None] | None = None
        self._failed = False
        self._order = asyncio.Lock()  # held while a picture and its sound are pushed, or an interruption
        self._held: deque[tuple[Place, Frame]] = deque()  # frames that wait for the sound before them
        self._heard: Place = (0, 0.0)  # the place up to which sound was pushed on
        self._ended = -1  # the segment that was finished last
        self._all_heard = asyncio.Event()
        self._all_heard.set()
        self._lasting = -1  # the last segment that may not be interrupted

    def can_generate_metrics(self) -> bool:
        """The time from the first sound after silence to its first frame."""
        return True

    def stats(self) -> dict[str, Any]:
        """What the live session counted and measured: `LiveSession.stats`. Empty before the pipeline is set up."""
        return self._session.stats() if self._session else {}

    # --- The pipeline begins and ends --------------------------------------------------------------------------------

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Opens the face, while other processors are set up."""
        await super().setup(setup)
        self._session = await AsyncSession.open(self._faces, self._image, **self._options)
        self._session.listeners.append(self._note)

    async def stop(self, frame: EndFrame) -> None:
        """Lets everything be said."""
        await super().stop(frame)
        if self._session and not self._failed:
            self._session.end_segment()
            self._note_progress(self._session)
            await self._all_heard.wait()
        await self._stop_showing()

    async def cancel(self, frame: CancelFrame) -> None:
        """Stops at once."""
        await super().cancel(frame)
        await self._stop_showing()

    async def cleanup(self) -> None:
        """Closes the face."""
        await super().cleanup()
        await self._stop_showing()
        if self._session:
            await self._session.close()

    async def _stop_showing(self) -> None:
        showing, self._showing = self._showing, None
        if showing:
            await self.cancel_task(showing)

    # --- Frames come in ----------------------------------------------------------------------------------------------

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Takes speech out of the stream and passes everything else on, each at its place."""
        await super().process_frame(frame, direction)
        session = None if self._failed else self._session
        if session is None:  # the agent speaks without a face
            await self.push_frame(frame, direction)
        elif isinstance(frame, InterruptionFrame):
            async with self._order:  # not between a picture and its sound
                self._interrupt(session)
                await self.push_frame(frame, direction)
                await self._release()
                self._note_progress(session)
        elif direction == FrameDirection.UPSTREAM or isinstance(frame, SystemFrame):
            await self.push_frame(frame, direction)
            if isinstance(frame, OutputTransportReadyFrame):  # what is pushed before is lost
                self._show(session)
        elif isinstance(frame, TTSAudioRawFrame):
            await self._say(session, frame)
        else:
            await self._pass(session, frame)

    async def _say(self, session: AsyncSession, frame: TTSAudioRawFrame) -> None:
        """Takes sound for the face; waits while the session's queue is full."""
        self._show(session)
        if self._all_heard.is_set():
            await self.start_ttfb_metrics()
        if not frame.interruptible:
            self._lasting = session.place[0]
        await session.push(np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels), frame.sample_rate)
        self._note_progress(session)

    async def _pass(self, session: AsyncSession, frame: Frame) -> None:
        """Passes a frame on, once the sound before it was pushed on."""
        if isinstance(frame, TTSStoppedFrame):
            session.end_segment()
            self._note_progress(session)
        if self._held or not self._is_heard(session.place):
            self._held.append((session.place, frame))
        else:
            await self.push_frame(frame)

    def _interrupt(self, session: AsyncSession) -> None:
        """Drops what was not pushed on, unless some of it must not be interrupted."""
        if self._lasting >= self._heard[0]:
            return
        session.interrupt()
        self._held = deque((place, frame) for place, frame in self._held if not frame.interruptible)
        self._heard = session.place

    # --- Moments go out ----------------------------------------------------------------------------------------------

    def _show(self, session: AsyncSession) -> None:
        if not self._showing:
            self._showing = self.create_task(self._show_moments(session))

    async def _show_moments(self, session: AsyncSession) -> None:
        try:
            async for moment in session.moments():
                async with self._order:
                    await self._show_moment(session, moment)
        except Exception as error:
            await self._fail(error)

    async def _show_moment(self, session: AsyncSession, moment: Moment) -> None:
        height, width = moment.rgb.shape[:2]
        image = OutputImageRawFrame(moment.rgb.tobytes(), (width, height), "RGB")
        image.sync_with_audio = True
        await self.push_frame(image)
        if moment.segment is not None and not session.is_interrupted(moment):
            number, seconds = self._heard
            if number != moment.segment or not seconds:
                seconds = 0.0
                await self.stop_ttfb_metrics()
            await self.push_frame(TTSAudioRawFrame(pcm_of(moment.sound).tobytes(), SOUND_RATE, 1))
            self._heard = moment.segment, seconds + len(moment.sound) / SOUND_RATE
        session.tell()
        if self._ended >= self._heard[0]:
            self._heard = self._ended + 1, 0.0
        await self._release()
        self._note_progress(session)

    async def _release(self) -> None:
        """Passes on what waited for sound that was pushed on."""
        while self._held and self._is_heard(self._held[0][0]):
            held = self._held[0]
            await self.push_frame(held[1])
            self._held.popleft()

    async def _fail(self, error: Exception) -> None:
        """The face cannot go on: from now on everything is passed as it comes, and the agent speaks without a face."""
        self._failed = True
        self._heard = math.inf, 0.0
        async with self._order:
            await self._release()
        self._all_heard.set()
        await self.push_error(str(error), error, force_treat_as_permanent=True)

    def _is_heard(self, place: Place) -> bool:
        number, seconds = self._heard
        return place <= (number, seconds + ROUNDING)

    def _note_progress(self, session: AsyncSession) -> None:
        if self._is_heard(session.place):
            self._all_heard.set()
        else:
            self._all_heard.clear()

    def _note(self, event: Event) -> None:
        if isinstance(event, PlaybackFinished):
            self._ended = max(self._ended, event.segment)
