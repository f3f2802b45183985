"""LiveKit Agents without a server: an `AgentSession` speaks and is interrupted, through LiveKit's own runner."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streaming import TalkingHeadPipeline
from streaming.live.session import MonotonicClock
from streaming.live.timeline import Moment
from tests.streaming.agents.stage import HEIGHT, RATE, WIDTH, BigFace, Faces, FastClock, run, speech

pytest.importorskip("livekit.agents", reason="LiveKit Agents is not installed: pip install -e '.[livekit]'")

import livekit.rtc as rtc  # pyright: ignore[reportMissingImports]
from livekit.agents import Agent, AgentSession  # pyright: ignore[reportMissingImports]
from livekit.agents.voice import avatar as livekit_avatar  # pyright: ignore[reportMissingImports]

from streaming.agents.async_session import AsyncSession
from streaming.agents.livekit import AvatarSession, FaceGenerator, FaceOutput
from tests.streaming.agents.livekit_room import Room, Viewer, frames_of, said, watch

PORTRAIT = Path(__file__).parents[3] / "examples" / "portraits" / "amara.jpg"


class Talk:
    """An agent with an avatar, what is seen, and what the agent was told: "started", or (position, interrupted)."""

    def __init__(self, agent: AgentSession, avatar: AvatarSession, viewer: Viewer) -> None:
        self.agent, self.avatar, self.viewer = agent, avatar, viewer
        self.told: list[object] = []
        self.output.on("playback_started", lambda _: self.told.append("started"))
        self.output.on("playback_finished", lambda e: self.told.append((round(e.playback_position, 4), e.interrupted)))

    @property
    def output(self) -> FaceOutput:
        assert self.avatar._output
        return self.avatar._output

    async def say(self, pcm: np.ndarray, rate: int = RATE) -> None:
        await self.agent.say("words", audio=said(pcm, rate)).wait_for_playout()

    async def capture(self, pcm: np.ndarray) -> None:
        for frame in frames_of(pcm):
            await self.output.capture_frame(frame)


@asynccontextmanager
async def talk(patch: pytest.MonkeyPatch, faces: Faces | None = None) -> AsyncIterator[Talk]:
    viewers, faces = watch(patch), faces or Faces()
    agent, avatar = AgentSession(), AvatarSession(faces.pipeline, "me.jpg", seed=3)
    await avatar.start(agent, Room())  # pyright: ignore[reportArgumentType]
    await agent.start(Agent(instructions="none"))
    assert faces.asked == {"image": "me.jpg", "kind": "segments", "seed": 3}
    yield Talk(agent, avatar, viewers[0])
    await agent.aclose()
    await avatar.aclose()
    await avatar.aclose()
    assert faces.open == 0


def test_what_the_agent_says_is_heard_and_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with talk(monkeypatch) as t:
            await t.avatar.wait_for_join()
            pcm = speech(1.5, 48_000)
            await t.say(pcm, 48_000)
            assert t.told == ["started", (1.5, False)]
            assert t.viewer.heard_frames == 38  # the last one is filled up with silence
            np.testing.assert_array_equal(t.viewer.heard[: len(pcm)], pcm)
            assert not t.viewer.heard[len(pcm) :].any()

    run(main())


def test_each_sound_follows_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame shows how loud its own sound is, which differs from frame to frame."""

    async def main() -> None:
        async with talk(monkeypatch) as t:
            levels = np.repeat(np.linspace(0.1, 0.9, 25), 1920)
            await t.say((levels * speech(1.0, 48_000, 1.0)).astype(np.int16), 48_000)
            pairs = [k for k, frame in enumerate(t.viewer.seen) if isinstance(frame, rtc.AudioFrame)]
            for k in pairs:
                frame, sound = t.viewer.seen[k - 1 : k + 1]
                assert isinstance(frame, rtc.VideoFrame)
                assert (frame.width, frame.height, frame.type) == (WIDTH, HEIGHT, rtc.VideoBufferType.RGB24)
                picture = np.frombuffer(frame.data, np.uint8).reshape(HEIGHT, WIDTH, 3)
                heard = np.abs(np.frombuffer(sound.data, np.int16) / 32768).mean() * 255
                assert picture[0, WIDTH // 4, 0] == pytest.approx(heard, abs=2)

    run(main())


def test_an_interruption_reports_what_was_heard_and_clears_the_synchroniser(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AvatarRunner` itself leaves in the synchroniser what was not shown."""

    async def main() -> None:
        async with talk(monkeypatch) as t:
            t.viewer.hold(lambda: t.viewer.heard_frames == 10)
            handle = t.agent.say("words", audio=said(speech(5.0)))
            await t.viewer.on_its_way.wait()
            t.agent.interrupt()
            await handle.wait_for_playout()
            assert handle.interrupted
            assert t.told == ["started", (0.4, True)]
            t.viewer.go()
            shown = len(t.viewer.seen)
            await t.viewer.until(lambda: len(t.viewer.seen) > shown + 60)
            assert t.viewer.heard_frames == 10
            assert t.viewer.cleared == 1

    run(main())


def test_sound_on_its_way_belongs_to_no_other_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AvatarRunner` itself counts it to the next one: started when nothing is, and 40 ms too long."""

    async def main() -> None:
        async with talk(monkeypatch) as t:
            for _ in range(2):
                t.told.clear()
                before = t.viewer.heard_frames
                t.viewer.hold(lambda before=before: t.viewer.heard_frames == before + 5)
                handle = t.agent.say("words", audio=said(speech(5.0)))
                await t.viewer.on_its_way.wait()
                t.agent.interrupt()
                await handle.wait_for_playout()
                t.viewer.go()
                await t.say(speech(1.0))
                assert t.told == ["started", (0.2, True), "started", (1.0, False)]

    run(main())


def test_the_sound_of_a_picture_on_its_way_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with talk(monkeypatch) as t:
            t.viewer.hold(lambda: t.viewer.heard_frames == 10 and isinstance(t.viewer.seen[-1], rtc.VideoFrame))
            handle = t.agent.say("words", audio=said(speech(5.0)))
            await t.viewer.on_its_way.wait()
            t.agent.interrupt()
            await handle.wait_for_playout()
            t.viewer.go()
            await t.say(speech(0.4))
            assert t.told == ["started", (0.44, True), "started", (0.4, False)]
            assert t.viewer.heard_frames == 20

    run(main())


def test_a_segment_that_nobody_has_heard_of_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AvatarRunner` itself reports no segment of which it has read nothing, and the agent would wait for ever."""

    async def main() -> None:
        async with talk(monkeypatch) as t:
            await t.capture(speech(0.5))
            t.output.clear_buffer()
            await t.capture(speech(0.5))
            t.output.flush()
            t.output.clear_buffer()
            assert t.told == [(0.0, True), (0.0, True)]
            await t.output.wait_for_playout()
            await t.say(speech(0.2))
            assert t.told[2:] == ["started", (0.2, False)]

    run(main())


def test_segments_that_follow_one_another_are_reported_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AvatarRunner` itself forgets a segment that it has read while the one before it was said."""

    async def main() -> None:
        async with talk(monkeypatch) as t:
            for seconds in (0.4, 0.2, 0.3):
                await t.capture(speech(seconds))
                t.output.flush()
            await t.output.wait_for_playout()
            assert t.told == ["started", (0.4, False), "started", (0.2, False), "started", (0.3, False)]
            t.told.clear()
            before = t.viewer.heard_frames
            t.viewer.hold(lambda: t.viewer.heard_frames == before + 13)
            for seconds in (0.4, 2.0, 0.3):
                await t.capture(speech(seconds))
                t.output.flush()
            await t.viewer.on_its_way.wait()
            t.output.clear_buffer()
            t.viewer.go()
            assert t.told == ["started", (0.4, False), "started", (0.12, True), (0.0, True)]

    run(main())


def test_nothing_is_a_segment_without_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with talk(monkeypatch) as t:
            await t.output.capture_frame(rtc.AudioFrame(b"", RATE, 1, 0))
            t.output.flush()
            await t.output.wait_for_playout()
            t.output.clear_buffer()
            assert t.told == []

    run(main())


def test_a_face_that_is_late_tears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing stops in mid-speech while everything that was made is shown."""

    async def main() -> None:
        face = BigFace()
        async with talk(monkeypatch, Faces(face)) as t:
            pcm = speech(3.0, 48_000)
            saying = asyncio.ensure_future(t.say(pcm, 48_000))
            await t.viewer.until(lambda: t.viewer.heard_frames == 20)
            face.may_draw.clear()
            assert t.avatar._session
            while t.avatar.stats()["made_frames"]:
                await asyncio.sleep(0)
            face.may_draw.set()
            await saying
            np.testing.assert_array_equal(t.viewer.heard, pcm)
            assert t.told == ["started", (3.0, False)]

    run(main())


def test_the_synchroniser_begins_anew_after_a_pause() -> None:
    """Else it shows what follows faster than it is heard, to make up for the pause, and warns."""

    class Moments:
        def __init__(self) -> None:
            self.listeners: list[object] = []

        def tell(self) -> None:
            pass

        async def moments(self) -> AsyncIterator[Moment]:
            for k, handed in enumerate((0.0, 0.04, 0.081, 0.5, 0.54, 0.9)):
                rgb, sound = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros(1920, np.float32)
                yield Moment(k, k / 25, rgb, sound, None, 0, None, 0.0, 0.0, handed)

    async def main() -> None:
        generator = FaceGenerator(Moments(), print)  # pyright: ignore[reportArgumentType]
        viewer = Viewer()
        generator.synchroniser = viewer  # pyright: ignore[reportAttributeAccessIssue]
        resets = [viewer.resets async for _ in generator]
        assert resets == [0, 0, 0, 1, 1, 2]

    run(main())


def test_the_generator_alone() -> None:
    """What LiveKit asks of a `VideoGenerator`: no sound in silence, and one end a segment that was not interrupted."""

    async def main() -> None:
        session = await AsyncSession.open(Faces().pipeline, "me.jpg")
        generator = FaceGenerator(session, on_failure=lambda error: pytest.fail(str(error)))
        frames = generator.__aiter__()

        async def until(kind: type, count: int) -> list[Any]:
            got: list[Any] = []
            while sum(isinstance(frame, kind) for frame in got) < count:
                got.append(await anext(frames))
            return got

        for frame in [*frames_of(speech(0.4)), livekit_avatar.AudioSegmentEnd()]:
            await generator.push_audio(frame)
        got = await until(livekit_avatar.AudioSegmentEnd, 1)
        assert sum(isinstance(frame, rtc.AudioFrame) for frame in got) == 10
        assert all(isinstance(a, rtc.VideoFrame) for a, b in pairwise(got) if isinstance(b, rtc.AudioFrame))
        for frame in frames_of(speech(2.0)):
            await generator.push_audio(frame)
        await until(rtc.AudioFrame, 5)
        await generator.clear_buffer()
        got = await until(rtc.VideoFrame, 60)
        assert {type(frame) for frame in got} == {rtc.VideoFrame}
        await session.close()

    run(main())


def test_a_face_that_fails_keeps_no_agent_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with talk(monkeypatch, Faces(BigFace(fails_at=4))) as t:
            handle = t.agent.say("words", audio=said(speech(20.0)))
            await handle.wait_for_playout()
            assert [end for end in t.told if end != "started"] == [(0.0, True)]
            await t.say(speech(1.0))
            t.output.clear_buffer()
            assert t.told[-1] == (0.0, True)
            assert len([end for end in t.told if end != "started"]) == 2

    run(main())
    assert [r.getMessage() for r in caplog.records if r.name.startswith("streaming")] == [
        "the avatar can no longer speak: frame 28 holds NaN or infinity"
    ]


def test_sound_that_no_session_takes_keeps_no_agent_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with talk(monkeypatch) as t:
            await t.output.capture_frame(rtc.AudioFrame(bytes(60), 500, 1, 30))
            t.output.flush()
            await t.output.wait_for_playout()
            assert t.told == [(0.0, True)]

    run(main())


def test_closing_in_mid_speech_ends_the_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with talk(monkeypatch) as t:
            saying = asyncio.ensure_future(t.say(speech(5.0)))
            await t.viewer.until(lambda: t.viewer.heard_frames == 5)
            await t.avatar.aclose()
            await saying
            assert len(t.told) == 2

    run(main())


def test_closing_does_not_remove_the_agent_from_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base class removes the avatar's participant, which is the agent itself."""
    removed: list[object] = []

    async def remove(identity: object) -> None:
        removed.append(identity)

    room = SimpleNamespace(remove_participant=remove)
    job = SimpleNamespace(api=SimpleNamespace(room=room), add_shutdown_callback=lambda _: None)
    monkeypatch.setattr("livekit.agents.voice.avatar._types.get_job_context", lambda required: job)  # noqa: ARG005

    async def main() -> None:
        async with talk(monkeypatch) as t:
            assert (t.avatar.avatar_identity, t.avatar.provider) == ("agent", "flashtalk")

    run(main())
    assert not removed


def test_what_cannot_start_leaves_the_pipeline_free(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        watch(monkeypatch)
        faces = Faces()
        avatar = AvatarSession(faces.pipeline, "me.jpg")
        with pytest.raises(AttributeError):
            await avatar.start(AgentSession(), None)  # pyright: ignore[reportArgumentType]
        assert faces.open == 0

    run(main())


def test_published_tracks_show_and_say_it() -> None:
    """LiveKit's own sources and synchroniser, in real time, read back in this process."""

    async def main() -> None:
        room, faces = Room(), Faces(clock=MonotonicClock())
        agent, avatar = AgentSession(), AvatarSession(faces.pipeline, "me.jpg")
        await avatar.start(agent, room)  # pyright: ignore[reportArgumentType]
        await agent.start(Agent(instructions="none"))
        await avatar.wait_for_join()
        tracks = {p.kind: p.track for p in room.local_participant.track_publications.values()}
        listening = asyncio.ensure_future(loudest(tracks[rtc.TrackKind.KIND_AUDIO]))
        watching = asyncio.ensure_future(sizes(tracks[rtc.TrackKind.KIND_VIDEO], 10))
        await agent.say("words", audio=said(speech(1.0))).wait_for_playout()
        assert await watching == {(WIDTH, HEIGHT)}
        assert await listening > 10_000
        await agent.aclose()
        await avatar.aclose()

    async def loudest(track: Any) -> int:
        """Of the first packet that is loud, so it comes if there is sound at all."""
        stream = rtc.AudioStream(track, sample_rate=48_000, num_channels=1)
        async for event in stream:
            if (loud := int(np.abs(np.frombuffer(event.frame.data, np.int16)).max())) > 10_000:
                await stream.aclose()
                return loud
        return 0

    async def sizes(track: Any, count: int) -> set[tuple[int, int]]:
        stream, seen = rtc.VideoStream.from_track(track=track, format=rtc.VideoBufferType.RGBA), []
        async for event in stream:
            seen.append((event.frame.width, event.frame.height))
            if len(seen) == count:
                await stream.aclose()
                break
        return set(seen)

    run(main())


def test_the_preset_tiny_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        viewers = watch(monkeypatch)
        with TalkingHeadPipeline.from_pretrained("tiny", size=(160, 96), steps=2) as pipeline:
            agent, avatar = AgentSession(), AvatarSession(pipeline, PORTRAIT, clock=FastClock())
            await avatar.start(agent, Room())  # pyright: ignore[reportArgumentType]
            await agent.start(Agent(instructions="none"))
            t = Talk(agent, avatar, viewers[0])
            pcm = speech(1.0, 48_000)
            await t.say(pcm, 48_000)
            t.viewer.hold(lambda: t.viewer.heard_frames == 30)
            handle = agent.say("words", audio=said(speech(3.0)))
            await t.viewer.on_its_way.wait()
            agent.interrupt()
            await handle.wait_for_playout()
            assert t.told == ["started", (1.0, False), "started", (0.2, True)]
            np.testing.assert_array_equal(t.viewer.heard[: len(pcm)], pcm)
            frames = [f for f in t.viewer.seen if isinstance(f, rtc.VideoFrame)]
            assert {(f.width, f.height) for f in frames} == {(160, 96)}
            assert len({bytes(f.data) for f in frames}) > len(frames) // 2  # it moves
            t.viewer.go()
            await agent.aclose()
            await avatar.aclose()
            pipeline.live(PORTRAIT).close()  # it is free again

    run(main())
