"""A session on an event loop: what is pushed, interrupted and told, and what happens where it cannot be opened."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from model.errors import UserError
from streaming.agents.async_session import AsyncSession, pcm_of
from streaming.live.session import LiveSession
from streaming.live.timeline import Event, Moment, PlaybackFinished, PlaybackStarted
from tests.streaming.agents.stage import HANGS, RATE, BigFace, Faces, run, speech


async def opened(faces: Faces) -> tuple[AsyncSession, list[Event]]:
    session, told = await AsyncSession.open(faces.pipeline, "me.jpg", seed=7), list[Event]()
    session.listeners.append(told.append)
    return session, told


async def shown(session: AsyncSession, segment: int, count: int) -> list[Moment]:
    """Shows moments until there were so many of a segment."""
    moments: list[Moment] = []
    async for moment in session.moments():
        moments.append(moment)
        session.tell()
        if sum(m.segment == segment for m in moments) == count:
            break
    return moments


def ends(told: list[Event]) -> list[Any]:
    return [event for event in told if isinstance(event, PlaybackStarted | PlaybackFinished)]


def test_events_are_told_in_the_loop_when_their_moment_was_shown() -> None:
    async def main() -> None:
        faces, here = Faces(), threading.current_thread()
        session, told = await opened(faces)
        threads: set[threading.Thread] = set()
        session.listeners.append(lambda _: threads.add(threading.current_thread()))
        await session.push(speech(1.0)[:, None], RATE)
        session.end_segment()
        moments = await shown(session, 0, 25)
        assert ends(told)[1:] == [PlaybackFinished(0, 1.0, False)]
        assert ends(told)[0] == PlaybackStarted(0, next(m.index for m in moments if m.segment == 0), ends(told)[0].at)
        assert threads == {here}
        assert faces.asked == {"image": "me.jpg", "kind": "segments", "seed": 7}
        await session.close()
        assert faces.open == 0

    run(main())


def test_pushing_waits_for_room_and_the_loop_goes_on() -> None:
    """Sound of 200 frames into a queue of 60, while moments are taken by the same loop."""

    async def main() -> None:
        session, _ = await opened(Faces(limit=60))

        async def say() -> None:
            await session.push(speech(8.0)[:, None], RATE)
            session.end_segment()

        saying = asyncio.create_task(say())
        moments = await shown(session, 0, 200)
        await saying
        sound = np.concatenate([m.sound for m in moments if m.segment == 0])
        assert len(sound) == 8 * 48_000
        assert session.stats()["most_queued_frames"] <= 61
        await session.close()

    run(main())


def test_an_interruption_ends_a_push_that_waits_and_is_told_at_once() -> None:
    async def main() -> None:
        session, told = await opened(Faces(limit=60))
        pushing = asyncio.create_task(session.push(speech(8.0)[:, None], RATE))
        moments = await shown(session, 0, 10)
        session.interrupt()
        assert ends(told)[1:] == [PlaybackFinished(0, 0.4, True)]
        assert session.is_interrupted(moments[-1])
        await pushing
        await session.push(speech(0.2)[:, None], RATE)
        session.end_segment()
        again = await shown(session, 1, 5)
        assert {m.segment for m in again} <= {None, 1}
        assert not session.is_interrupted(again[-1])
        assert ends(told)[-1] == PlaybackFinished(1, 0.2, False)
        await session.close()

    run(main())


def test_places_count_what_was_pushed() -> None:
    async def main() -> None:
        session, _ = await opened(Faces())
        places = [session.place]
        session.end_segment()  # of nothing
        places.append(session.place)
        await session.push(speech(0.5)[:, None], RATE)
        places.append(session.place)
        session.end_segment()
        places.append(session.place)
        session.interrupt()
        places.append(session.place)
        assert places == [(0, 0.0), (0, 0.0), (0, 0.5), (1, 0.0), (2, 0.0)]
        await session.close()

    run(main())


def test_what_no_session_takes_is_refused_and_the_session_goes_on() -> None:
    async def main() -> None:
        session, _ = await opened(Faces())
        with pytest.raises(ValueError, match=r"^pcm: got int16 \[10, 3\]"):
            await session.push(np.zeros((10, 3), np.int16), RATE)
        with pytest.raises(ValueError, match=r"^rate: got 7 Hz"):
            await session.push(np.zeros((10, 1), np.int16), 7)
        await session.push(np.zeros((0, 1), np.int16), RATE)
        assert session.place == (0, 0.0)
        await session.push(speech(0.1, 8_000)[:, None].repeat(2, 1), 8_000)
        session.end_segment()
        await shown(session, 0, 3)
        await session.close()

    run(main())


def test_a_failure_is_raised_by_the_moments_alone() -> None:
    async def main() -> None:
        session, _ = await opened(Faces(BigFace(fails_at=1)))
        moments = aiter(session.moments())
        assert [(await anext(moments)).index for _ in range(28)] == list(range(28))
        with pytest.raises(UserError, match="frame 28 holds NaN"):
            await anext(moments)
        await session.push(speech(0.1)[:, None], RATE)
        session.end_segment()
        session.interrupt()
        await session.close()
        session.interrupt()

    run(main())


def test_opening_that_is_cancelled_leaves_no_session() -> None:
    class SlowFaces(Faces):
        may_open = threading.Event()
        closed = threading.Event()

        def live(self, *arguments: Any, **options: Any) -> LiveSession:
            assert self.may_open.wait(HANGS)
            return super().live(*arguments, **options)

        def _release(self) -> None:
            super()._release()
            self.closed.set()

    async def main() -> None:
        faces = SlowFaces()
        opening = asyncio.create_task(AsyncSession.open(faces.pipeline, "me.jpg"))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        faces.may_open.set()
        assert await asyncio.to_thread(faces.closed.wait, HANGS)
        assert faces.open == 0

    run(main())


def test_samples_of_16_bits_stay_what_they_were() -> None:
    samples = np.array([-32768, -1, 0, 1, 32767], np.int16)
    np.testing.assert_array_equal(pcm_of((samples / 32768).astype(np.float32)), samples)
    np.testing.assert_array_equal(pcm_of(np.array([1.0, -1.0], np.float32)), [32767, -32768])
