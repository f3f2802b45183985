"""An avatar for LiveKit Agents, in the agent's own process.

    avatar = AvatarSession(TalkingHeadPipeline.from_pretrained("tiny"), "me.jpg")
    await avatar.start(session, room=ctx.room)
    await session.start(agent=agent, room=ctx.room)

What the agent says goes into `FaceOutput`, from there through LiveKit's `AvatarRunner` into `FaceGenerator`, and comes
back as frames with their sound, which the runner publishes in the room. What was heard of it the agent is told by the
live session itself.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import livekit.rtc as rtc  # pyright: ignore[reportMissingImports]: it is an extra, here and below
    from livekit.agents import AgentSession  # pyright: ignore[reportMissingImports]
    from livekit.agents.voice import avatar  # pyright: ignore[reportMissingImports]
    from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("LiveKit Agents is not installed: pip install 'flashtalk-triton[livekit]'") from error

from streaming.agents.async_session import AsyncSession, pcm_of
from streaming.live.timeline import Event, PlaybackFinished, PlaybackStarted
from streaming.pipeline import Picture, TalkingHeadPipeline
from streaming.sources import SOUND_RATE

logger = logging.getLogger(__name__)

GAP = 0.06  # seconds; a frame that comes later than this after the one before it is late: one and a half frames


class FaceGenerator(avatar.VideoGenerator):
    """The frames of a session, and the sound of its segments, each when it is due.

    Attributes:
        synchroniser: the runner's, if frames are shown through one.
    """

    def __init__(self, session: AsyncSession, on_failure: Callable[[Exception], None]) -> None:
        """Shows a session.

        Args:
            session: hears what is pushed.
            on_failure: is called with the error that ends the session, or of sound that it refuses.
        """
        self.synchroniser: rtc.AVSynchronizer | None = None
        self._session, self._on_failure = session, on_failure
        self._ended = 0  # segments that were heard to their end, and whose `AudioSegmentEnd` is still to come
        session.listeners.append(self._note)

    async def push_audio(self, frame: rtc.AudioFrame | avatar.AudioSegmentEnd) -> None:
        """Takes sound of the segment that arrives, or its end; waits while the session's queue is full."""
        try:
            if isinstance(frame, avatar.AudioSegmentEnd):
                self._session.end_segment()
            else:
                await self._session.push(_samples_of(frame), frame.sample_rate)
        except Exception as error:
            self._on_failure(error)

    async def clear_buffer(self) -> None:
        """Interrupts the session."""
        self._session.interrupt()
        if self.synchroniser:  # the runner does not clear it, and up to 100 ms more would be heard
            await self.synchroniser.clear_queue()

    def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | avatar.AudioSegmentEnd]:
        """A frame for each moment, followed by its sound if that belongs to a segment; at last the segment's end."""
        return self._frames()

    async def _frames(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | avatar.AudioSegmentEnd]:
        last = math.inf
        try:
            async for moment in self._session.moments():
                # After a pause the synchroniser hurries to make up for it, out of step with the sound, and warns.
                if moment.handed - last > GAP and self.synchroniser:
                    self.synchroniser.reset()
                last = moment.handed
                height, width = moment.rgb.shape[:2]
                yield rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, moment.rgb.tobytes())
                if moment.segment is not None and not self._session.is_interrupted(moment):
                    yield rtc.AudioFrame(pcm_of(moment.sound).tobytes(), SOUND_RATE, 1, len(moment.sound))
                self._session.tell()
                while self._ended:
                    self._ended -= 1
                    yield avatar.AudioSegmentEnd()
        except Exception as error:
            self._on_failure(error)

    def _note(self, event: Event) -> None:
        self._ended += isinstance(event, PlaybackFinished) and not event.interrupted


class FaceOutput(AudioOutput, avatar.AudioReceiver):  # pyright: ignore[reportGeneralTypeIssues]
    """What an agent says, on its way to a session, and what was heard of it, on its way back.

    The agent waits until each segment that it captured is reported as finished, and hangs if one never is. So segments
    are reported when the session says that they ended, and those that have not reached it when they are cleared.
    """

    def __init__(self, session: AsyncSession) -> None:
        super().__init__(label="FaceOutput", capabilities=AudioOutputCapabilities(pause=False))
        self._session = session
        self._queue: asyncio.Queue[rtc.AudioFrame | avatar.AudioSegmentEnd] = asyncio.Queue()
        self._capturing = False
        self._silent = False  # whether the face says nothing any more
        session.listeners.append(self._report)

    # --- For the agent -----------------------------------------------------------------------------------------------

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        """Takes sound of any rate, faster than real time."""
        if not frame.samples_per_channel:
            return
        await super().capture_frame(frame)
        self._capturing = True
        self._queue.put_nowait(frame)

    def flush(self) -> None:
        """Ends the segment."""
        super().flush()
        if self._capturing:
            self._queue.put_nowait(avatar.AudioSegmentEnd())
        self._capturing = False
        if self._silent:
            self._drop()

    def clear_buffer(self) -> None:
        """Stops speech at once. All segments were reported when this returns."""
        super().flush()  # what comes now is another segment
        self._capturing = False
        self._session.interrupt()
        self._drop()
        self.emit("clear_buffer")  # pyright: ignore[reportArgumentType]

    def fail(self, error: Exception) -> None:
        """The face cannot go on: says why in the log, and keeps the agent from waiting for it."""
        if not self._silent:
            logger.error("the avatar can no longer speak: %s", error)
            self.silence()

    def silence(self) -> None:
        """Ends all segments, now and in future, without a sound."""
        self._silent = True
        self._drop()

    # --- For the runner ----------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[rtc.AudioFrame | avatar.AudioSegmentEnd]:
        return self._items()

    async def _items(self) -> AsyncIterator[rtc.AudioFrame | avatar.AudioSegmentEnd]:
        while True:
            yield await self._queue.get()

    def notify_playback_started(self) -> None:
        """Ignored: the runner also starts a segment for a frame that was on its way when it was cleared."""

    def notify_playback_finished(self, playback_position: float, interrupted: bool) -> None:
        """Ignored: the runner adds such a frame to the next segment, and forgets a segment that had not reached it."""

    # --- For the session ---------------------------------------------------------------------------------------------

    def _report(self, event: Event) -> None:
        if self._silent:
            return
        if isinstance(event, PlaybackStarted):
            self.on_playback_started(created_at=time.time())
        elif isinstance(event, PlaybackFinished):
            self.on_playback_finished(playback_position=event.position, interrupted=event.interrupted)

    def _drop(self) -> None:
        """Forgets what is on its way to the session, and reports segments of which it has not heard."""
        while not self._queue.empty():
            self._queue.get_nowait()
        while self._pending_playback_count:
            self.on_playback_finished(playback_position=0.0, interrupted=True)


class AvatarSession(avatar.AvatarSession):
    """An avatar that speaks for an `AgentSession`: the agent itself publishes its picture and its sound."""

    def __init__(self, pipeline: TalkingHeadPipeline, image: Picture, **options: Any) -> None:
        """Takes a face for a session.

        Args:
            pipeline: makes the face; it is busy from `start` to `aclose`.
            image: the portrait, as in `TalkingHeadPipeline.live`.
            options: also as there: prompt, seed, lag, wait_frames, max_queued, snapshots, resume.
        """
        super().__init__()
        self._pipeline, self._image, self._options = pipeline, image, options
        self._session: AsyncSession | None = None
        self._output: FaceOutput | None = None
        self._runner: avatar.AvatarRunner | None = None

    @property
    def avatar_identity(self) -> str:
        """The participant who shows the avatar: the agent. Empty before `start`."""
        return self._room.local_participant.identity if self._room else ""

    @property
    def provider(self) -> str:
        """Whose avatar it is."""
        return "flashtalk"

    async def start(self, agent_session: AgentSession, room: rtc.Room) -> None:
        """Opens the face and takes over what the agent says. To be called before `agent_session.start`.

        Raises:
            UserError: The portrait or an option cannot be used.
            RuntimeError: The pipeline is busy.
        """
        self._session = session = await AsyncSession.open(self._pipeline, self._image, **self._options)
        try:
            await super().start(agent_session, room)
            self._output = FaceOutput(session)
            generator = FaceGenerator(session, self._output.fail)
            chunk = self._pipeline.config.chunk
            self._runner = runner = avatar.AvatarRunner(
                room,
                audio_recv=self._output,
                video_gen=generator,
                options=avatar.AvatarOptions(chunk.width, chunk.height, chunk.tgt_fps, SOUND_RATE, 1),
            )
            generator.synchroniser = runner.av_sync
            await runner.start()
            agent_session.output.replace_audio_tail(self._output)
        except BaseException:
            await self.aclose()
            raise

    def stats(self) -> dict[str, Any]:
        """What the live session counted and measured: `LiveSession.stats`. Empty before `start`."""
        return self._session.stats() if self._session else {}

    async def aclose(self) -> None:
        """Ends the avatar, and what it is saying. May be called more than once."""
        if self._output:
            self._output.silence()
        runner, self._runner = self._runner, None
        if runner:
            await runner.aclose()
        if self._session:
            await self._session.close()
        if self._room:  # else the base class would remove the avatar's participant from the room: the agent
            self._room.off("connection_state_changed", self._on_connection_state_changed)
            self._room = None
        await super().aclose()


def _samples_of(frame: rtc.AudioFrame) -> NDArray[np.int16]:
    """Samples [n, channels]."""
    count = frame.samples_per_channel * frame.num_channels
    return np.frombuffer(frame.data, np.int16, count).reshape(-1, frame.num_channels)
