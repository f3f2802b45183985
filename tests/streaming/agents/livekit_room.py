"""A LiveKit room without a server, and a viewer in place of its synchroniser and its sources.

The viewer sees what would be published, one frame after the other, and can hold one back while it is on its way.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import livekit.rtc as rtc  # pyright: ignore[reportMissingImports]
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.streaming.agents.stage import RATE


class Publication:
    def __init__(self, track: Any) -> None:
        self.kind, self.track = track.kind, track

    async def wait_for_subscription(self) -> None:
        pass


class Participant:
    """The agent in the room."""

    identity = "agent"

    def __init__(self, room: "Room") -> None:
        self._room = room
        self.track_publications: dict[str, Publication] = {}

    async def publish_track(self, track: Any, options: object) -> Publication:  # noqa: ARG002
        publication = Publication(track)
        self.track_publications[str(len(self.track_publications))] = publication
        self._room.emit("local_track_published", publication, track)
        return publication


class Room(rtc.EventEmitter[str]):
    """A room that is connected, with nobody else in it."""

    name = "room"

    def __init__(self) -> None:
        super().__init__()
        self.local_participant = Participant(self)
        self.remote_participants: dict[str, object] = {}

    def isconnected(self) -> bool:
        return True


class Viewer:
    """Takes the place of `rtc.AVSynchronizer`.

    Attributes:
        seen: frames that were pushed, in their order.
        on_its_way: is set while a frame is held back.
        resets: how often the schedule was begun anew.
        cleared: how often what was not shown was dropped.
    """

    def __init__(self, **sources: object) -> None:  # noqa: ARG002
        self.seen: list[rtc.VideoFrame | rtc.AudioFrame] = []
        self.resets = self.cleared = 0
        self.on_its_way = asyncio.Event()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._held: Callable[[], bool] | None = None
        self._changed = asyncio.Event()

    async def push(self, frame: rtc.VideoFrame | rtc.AudioFrame, timestamp: float | None = None) -> None:  # noqa: ARG002
        await asyncio.sleep(0)
        self.seen.append(frame)
        self._changed.set()
        if self._held and self._held():
            self._held = None
            self._goes_on.clear()
            self.on_its_way.set()
            await self._goes_on.wait()

    async def clear_queue(self) -> None:
        self.cleared += 1

    def reset(self) -> None:
        self.resets += 1

    async def aclose(self) -> None:
        pass

    # --- For tests ---------------------------------------------------------------------------------------------------

    def hold(self, condition: Callable[[], bool]) -> None:
        """Holds back the first frame after whose arrival the condition is true, until `go`."""
        self._held = condition
        self.on_its_way.clear()

    def go(self) -> None:
        self._goes_on.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    @property
    def heard(self) -> NDArray[np.int16]:
        """All sound that was pushed."""
        parts = [np.frombuffer(f.data, np.int16) for f in self.seen if isinstance(f, rtc.AudioFrame)]
        return np.concatenate([np.zeros(0, np.int16), *parts])

    @property
    def heard_frames(self) -> int:
        return sum(isinstance(frame, rtc.AudioFrame) for frame in self.seen)


def watch(patch: pytest.MonkeyPatch) -> list[Viewer]:
    """Gives runners a viewer each; the list has those that were made."""
    viewers: list[Viewer] = []

    def viewer(**sources: object) -> Viewer:
        viewers.append(Viewer(**sources))
        return viewers[-1]

    async def aclose() -> None:
        pass

    patch.setattr(rtc, "AVSynchronizer", viewer)
    for name in ("AudioSource", "VideoSource"):
        patch.setattr(rtc, name, lambda **_: SimpleNamespace(aclose=aclose))
    audio, video = rtc.TrackKind.KIND_AUDIO, rtc.TrackKind.KIND_VIDEO
    patch.setattr(rtc.LocalAudioTrack, "create_audio_track", lambda *_: SimpleNamespace(kind=audio))
    patch.setattr(rtc.LocalVideoTrack, "create_video_track", lambda *_: SimpleNamespace(kind=video))
    return viewers


def frames_of(pcm: NDArray[np.int16], rate: int = RATE) -> list[rtc.AudioFrame]:
    """Sound in pieces of 20 ms, as a service of speech gives it."""
    size = rate // 50
    parts = [pcm[k : k + size] for k in range(0, len(pcm), size)]
    return [rtc.AudioFrame(part.tobytes(), rate, 1, len(part)) for part in parts]


async def said(pcm: NDArray[np.int16], rate: int = RATE) -> AsyncIterator[rtc.AudioFrame]:
    """Sound for `AgentSession.say`."""
    for frame in frames_of(pcm, rate):
        yield frame
