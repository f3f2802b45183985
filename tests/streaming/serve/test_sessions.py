"""The registry of sessions, without HTTP: room, keys, ends, snapshots that go on exactly."""

import asyncio
import math
import os
import time
from collections.abc import Generator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.errors import UserError
from streaming.live.face import FaceState, Unit
from streaming.serve.encoder import Encoded
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Limits
from streaming.serve.messages import Bye, ErrorMessage, FromServer, SessionOptions
from streaming.serve.session import Session
from streaming.serve.sessions import KEPT, Sessions
from streaming.serve.viewer import Viewer
from tests.streaming.serve.kit import CHUNK, NumberedFace, NumberedPipeline, eventually, number_of, run, speech

PICTURE = Image.new("RGB", (200, 200), (90, 120, 150))


def registry(count: int = 1, folder: Path | None = None) -> Sessions:
    return Sessions([NumberedPipeline() for _ in range(count)], Limits(), folder)


class Ear:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.viewer: Viewer | None = None
        self.heard: list[FromServer] = []

    def put(self, message: FromServer) -> None:
        self.heard.append(message)


def numbers(items: list[Encoded]) -> list[int]:
    """Numbers that the frames show, without those that were held."""
    decoder = av.CodecContext.create("h264", "r")
    found = [frame for item in items for frame in decoder.decode(av.Packet(item.h264))] + decoder.decode(None)
    shown = [number_of(frame.to_ndarray(format="rgb24")) for frame in found]
    return [number for k, number in enumerate(shown) if not k or number != shown[k - 1]]


async def watch(session: Session, count: int) -> list[Encoded]:
    viewer = session.join("test")
    items = []
    while len(items) < count and (item := await viewer.next()):
        items.append(item)
    session.broadcast.leave(viewer)
    return items


def test_there_is_room_for_as_many_sessions_as_pipelines() -> None:
    async def test() -> None:
        sessions = registry(2)
        first = await sessions.create(PICTURE, SessionOptions())
        second = await sessions.create(PICTURE, SessionOptions())
        assert (sessions.capacity, sessions.free) == (2, 0)
        with pytest.raises(RefusedError) as error:
            await sessions.create(PICTURE, SessionOptions())
        assert error.value.code == "limit_sessions"
        await sessions.close(first)
        assert sessions.free == 1
        third = await sessions.create(PICTURE, SessionOptions())
        assert len({first.id, second.id, third.id}) == 3
        await sessions.drain()
        assert not sessions.open

    run(test())


def test_an_id_is_worth_nothing_without_its_key() -> None:
    async def test() -> None:
        sessions = registry(2)
        one, other = [await sessions.create(PICTURE, SessionOptions()) for _ in range(2)]
        assert sessions.find(one.id, one.key) is one
        for identifier, key in (
            (one.id, other.key),
            (one.id, ""),
            ("unknown", one.key),
            (one.id, one.id),
            (one.id, "ü"),
        ):
            with pytest.raises(RefusedError) as error:
                sessions.find(identifier, key)
            assert error.value.code == "unauthorised"
        await sessions.drain()

    run(test())


def test_what_cannot_begin_leaves_the_room_free() -> None:
    async def test() -> None:
        sessions = registry()
        with pytest.raises(RefusedError) as error:
            await sessions.create(PICTURE, SessionOptions(lag="drop"))  # for a microphone only
        assert error.value.code == "bad_request"
        assert sessions.free == 1
        await sessions.close(await sessions.create(PICTURE, SessionOptions(kind="microphone", lag="drop")))

    run(test())


def test_a_session_that_cannot_be_encoded_leaves_the_room_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_codec(*_: int) -> None:
        raise LookupError("libx264")

    async def test() -> None:
        sessions = registry()
        with monkeypatch.context() as patch:
            patch.setattr("streaming.serve.session.MomentEncoder", without_codec)
            with pytest.raises(LookupError):
                await sessions.create(PICTURE, SessionOptions())
        await sessions.close(await sessions.create(PICTURE, SessionOptions()))

    run(test())


def test_a_session_without_connections_or_sound_is_overdue() -> None:
    async def test() -> None:
        sessions = registry()
        session = await sessions.create(PICTURE, SessionOptions())
        begun, limits = session._attended, session.limits
        assert session.overdue(begun + limits.unattended - 1) is None
        assert session.overdue(begun + limits.unattended + 1) == "unattended"
        session.attend()
        assert session.overdue(begun + limits.idle - 1) is None
        assert session.overdue(begun + limits.idle + 1) == "idle"
        await session.say(speech(0.1), 16000, None)
        assert session.live.state == "listening"
        assert session.overdue(session._heard + limits.idle - 1) is None
        assert session.overdue(session._heard + limits.idle + 1) == "idle"  # though its segment has no end
        session.live.end_segment()
        session.leave()
        assert session.overdue(session._attended + limits.unattended + 1) == "unattended"
        await sessions.drain()

    run(test())


def test_the_sweep_ends_what_is_overdue_and_closes_stuck_viewers() -> None:
    async def test() -> None:
        sessions = registry()
        session = await sessions.create(PICTURE, SessionOptions())
        session.attend()
        viewer, ear = session.join("test"), Ear()
        session.listeners.add(ear)
        viewer.dropped = 1
        await sessions.sweep()
        assert not viewer.closed
        viewer.moved -= session.limits.stuck + 1
        await sessions.sweep()
        assert viewer.closed
        assert session.broadcast.lost == 1
        assert {type(message).__name__ for message in ear.heard} == {"StatsMessage"}
        session._heard -= session.limits.idle + 1
        await sessions.sweep()
        assert ear.heard[-1] == Bye("idle", session.live.position)
        assert not sessions.open

    run(test())


def test_nothing_is_generated_while_nobody_watches_or_speaks() -> None:
    async def test() -> None:
        sessions = registry()
        session = await sessions.create(PICTURE, SessionOptions())
        await eventually(lambda: session.live.stats()["made_frames"] >= 2 * CHUNK.new_frames)
        await watch(session, 3)
        position = session.live.position
        await eventually(lambda: session.broadcast._ticks.hold_at == math.inf)  # it rests
        assert session.live.position <= position + 1
        ear = Ear()
        session.listeners.add(ear)
        await session.say(speech(0.2), 16000, None)  # is said though nobody watches
        session.end_segment()
        await eventually(lambda: any(type(m).__name__ == "PlaybackFinishedMessage" for m in ear.heard))
        await sessions.drain()

    run(test())


def test_only_one_speaks_at_a_time() -> None:
    async def test() -> None:
        sessions = registry()
        session = await sessions.create(PICTURE, SessionOptions())
        one, other = object(), object()
        session.claim(one)
        session.claim(one)
        with pytest.raises(RefusedError) as error:
            session.claim(other)
        assert error.value.code == "busy"
        await session.say(speech(0.3), 16000, 5)
        session.release(one)
        session.claim(other)
        assert session.live.next_segment == 6
        assert session.live._director.voice.arriving is None  # what the first had not ended is ended
        await sessions.drain()

    run(test())


def test_sound_that_waits_for_room_is_given_up_when_it_is_interrupted() -> None:
    async def test() -> None:
        sessions = Sessions([NumberedPipeline()], Limits(queue=3.0))
        session = await sessions.create(PICTURE, SessionOptions())
        saying = asyncio.create_task(session.say(speech(20), 16000, None))
        await eventually(lambda: session.live.stats()["queued_frames"] >= 74)
        assert not saying.done()
        assert session.interrupt() is not None
        assert await saying is False
        assert session.live.stats()["queued_frames"] == 0
        assert session.interrupt() is None
        await sessions.drain()

    run(test())


def test_a_resumed_session_shows_the_frame_after_the_last_that_was_seen(tmp_path: Path) -> None:
    """The process ends while the session speaks; another one goes on. No frame is lost, none is shown twice."""

    async def before() -> tuple[str, str, list[int], int]:
        sessions = registry(folder=tmp_path)
        session = await sessions.create(PICTURE, SessionOptions(seed=3))
        await session.say(speech(4), 16000, None)
        watching = asyncio.create_task(watch(session, 10_000))
        await eventually(lambda: session.live.position >= 40)
        ear = Ear()
        session.listeners.add(ear)
        await sessions.drain()
        with pytest.raises(RefusedError) as error:
            await sessions.create(PICTURE, SessionOptions())
        assert error.value.code == "draining"
        items = await watching
        (bye,) = [message for message in ear.heard if isinstance(message, Bye)]
        assert bye.reason == "draining"
        return session.id, session.key, numbers(items), bye.position

    async def after(identifier: str, key: str, position: int) -> list[int]:
        sessions = registry(folder=tmp_path)
        for other, wrong in ((identifier, "wrong"), ("../../etc/passwd", key), ("A" * 16, key)):
            with pytest.raises(RefusedError) as error:
                await sessions.resume(other, wrong)
            assert error.value.code == "not_found"
        session, was_open = await sessions.resume(identifier, key)
        assert not was_open
        assert session.live.position == position
        assert session.live.state == "speaking"
        seen = numbers(await watch(session, 40))
        await sessions.close(session)
        with pytest.raises(RefusedError):
            await sessions.resume(identifier, key)  # its client has closed it
        return seen

    identifier, key, first, position = run(before())
    second = run(after(identifier, key, position))
    assert first == list(range(1, position + 1))
    assert second[:20] == list(range(position + 1, position + 21))
    assert list(tmp_path.iterdir()) == []


def test_what_a_server_that_was_taken_for_dead_still_writes_is_not_read(tmp_path: Path) -> None:
    """Two servers have the same session: the first one hung for a while. The session is what the second one made."""

    async def test() -> None:
        hung, next_one = registry(folder=tmp_path), registry(folder=tmp_path)
        first = await hung.create(PICTURE, SessionOptions())
        await first.say(speech(8), 16000, None)
        seen = numbers(await watch(first, 20))
        second, _ = await next_one.resume(first.id, first.key, position=15)
        begin = second.live.position
        assert begin <= 15
        watching = asyncio.create_task(watch(second, 10_000))
        await eventually(lambda: second.live.position >= 60)
        await next_one.drain()
        seen = seen[:begin] + numbers(await watching)
        await watch(first, 30)
        await hung.drain()  # writes what it has, after the other
        third, _ = await registry(folder=tmp_path).resume(first.id, first.key)
        last = numbers(await watch(third, 10))
        assert last[0] > 60
        seen += last
        assert seen == list(range(1, len(seen) + 1))
        await hung.close(third)
        assert list(tmp_path.iterdir()) == []

    run(test())


def test_two_who_resume_at_once_get_one_session_that_goes_on_when_it_is_resumed_again(tmp_path: Path) -> None:
    async def test() -> None:
        sessions = registry(2, tmp_path)
        begun = await sessions.create(PICTURE, SessionOptions())
        ending = asyncio.create_task(sessions.close(begun, "draining"))  # is not over when the others begin
        results = await asyncio.gather(*(sessions.resume(begun.id, begun.key) for _ in range(3)))
        await ending
        assert [was_open for _, was_open in results] == [False, True, True]
        (session,) = {session for session, _ in results}
        assert session is not begun
        session.claim("a connection that is lost")
        assert await sessions.resume(begun.id, begun.key, position=0) == (session, True)
        session.claim("another one")
        with pytest.raises(RefusedError) as error:
            await sessions.resume(begun.id, "wrong")
        assert error.value.code == "unauthorised"
        await sessions.close(session)
        assert sessions.free == 2
        assert list(tmp_path.iterdir()) == []

    run(test())


def test_files_of_sessions_are_removed_a_day_after_the_last_of_them_was_written(tmp_path: Path) -> None:
    """Many servers share the folder: what another one has open was begun long ago, and is written all the time."""

    async def test() -> None:
        sessions = registry(folder=tmp_path)
        session = await sessions.create(PICTURE, SessionOptions())
        old, new, open_elsewhere, foreign = "A" * 16, "B" * 16, "C" * 16, "notes"
        for name in (old, new, open_elsewhere, foreign):
            (tmp_path / f"{name}.json").write_text("{}")
        for name in (old, open_elsewhere, foreign, session.id):
            os.utime(tmp_path / f"{name}.json", (0, time.time() - KEPT - 10))
        (tmp_path / f"{open_elsewhere}.0.session.journal-1").write_text("")
        (tmp_path / f"{'D' * 16}.json").symlink_to("nothing")  # has no time, as a file that is removed meanwhile
        await sessions.sweep()
        names = {path.stem for path in tmp_path.glob("*.json")}
        assert names == {new, open_elsewhere, foreign, session.id, "D" * 16}
        os.utime(tmp_path / f"{new}.json", (0, time.time() - KEPT - 10))
        await sessions.sweep()  # they are not looked through each second
        assert (tmp_path / f"{new}.json").exists()
        await sessions.drain()

    run(test())


class BreakingFace(NumberedFace):
    """Fails in its second chunk."""

    def generate(self, state: FaceState, speech: NDArray[np.float32], quality: int) -> Generator[Unit, None, None]:
        if state.number == 1:
            raise UserError("frame 28 holds NaN or infinity")
        yield from super().generate(state, speech, quality)


def test_a_session_that_fails_says_so_and_frees_its_place() -> None:
    async def test() -> None:
        sessions = Sessions([NumberedPipeline(BreakingFace)], Limits())
        session = await sessions.create(PICTURE, SessionOptions())
        ear = Ear()
        session.listeners.add(ear)
        items = await watch(session, 10_000)
        assert numbers(items) == list(range(1, 29))
        await eventually(lambda: not sessions.open)
        assert ErrorMessage("failed", "frame 28 holds NaN or infinity", True) in ear.heard
        assert isinstance(ear.heard[-1], Bye)
        assert sessions.free == 1

    run(test())
