"""A session in threads: who pushes, who takes, what each gets when the other is slow, gone or wrong."""

import asyncio
import math
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.errors import UserError
from streaming.live.director import Director, Options
from streaming.live.face import FaceState, Unit
from streaming.live.session import LiveSession
from streaming.live.timeline import Event, Moment, PlaybackFinished, PlaybackStarted
from streaming.live.voice import Voice
from tests.streaming.live.stage import DrawnFace, tone

HANGS = 600  # seconds, which no machine takes, however busy


class VirtualClock:
    """Time that passes only while everybody waits who ever waited, and then at once."""

    def __init__(self) -> None:
        self.time = 50.0
        self._waiting: dict[threading.Thread, float] = {}
        self._known: set[threading.Thread] = set()

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        me = threading.current_thread()
        self._known = {thread for thread in self._known | {me} if thread.is_alive()}
        self._waiting[me] = self.time + seconds
        next_time = min(self._waiting.values())
        if self._known <= set(self._waiting) and not math.isinf(next_time):
            self.time = max(self.time, next_time)
            self._waiting.clear()
            condition.notify_all()
            if len(self._known) == 1:  # else it would keep the lock from those who have not waited yet
                condition.wait(0.001)
        else:
            condition.wait(0.05)  # one of them may have ended meanwhile
        self._waiting.pop(me, None)


class BrokenFace(DrawnFace):
    """Fails in its third chunk."""

    def generate(self, state: FaceState, speech: NDArray[np.float32], quality: int) -> Generator[Unit, None, None]:
        if state.number == 2:
            raise UserError("frame 56 holds NaN or infinity")
        yield from super().generate(state, speech, quality)


def session(
    face: DrawnFace | None = None,
    kind: str = "segments",
    limit: int = 100,
    events: list[Event] | None = None,
    snapshots: Path | None = None,
) -> LiveSession:
    face = face or DrawnFace()
    voice = Voice("microphone" if kind == "microphone" else "segments", face.chunk, limit)
    told = [] if events is None else events
    return LiveSession(
        Director(face, voice, Options("drop" if kind == "microphone" else "wait", 28)),
        {"portrait": "a"},
        on_event=told.append,
        snapshots=snapshots,
        clock=VirtualClock(),
        release=lambda: None,
    )


def taken(live: LiveSession, count: int) -> list[Moment]:
    moments = live.moments()
    return [next(moments) for _ in range(count)]


def test_a_segment_is_said_and_reported() -> None:
    events: list[Event] = []
    with session(events=events) as live:
        live.push_audio(tone(30), 16000)
        live.end_segment()
        moments = taken(live, 90)
    assert [m.index for m in moments] == list(range(90))
    assert sum(m.segment == 0 for m in moments) == 30
    assert [type(e) for e in events if isinstance(e, PlaybackStarted | PlaybackFinished)] == [
        PlaybackStarted, PlaybackFinished,
    ]  # fmt: skip
    assert [m.handed for m in moments] == pytest.approx([moments[0].handed + k / 25 for k in range(90)])


def test_pushing_waits_for_room_and_loses_nothing() -> None:
    """Ten times as much sound as fits, in one piece and from a thread of its own."""
    with session(limit=60) as live:
        pusher = threading.Thread(target=lambda: (live.push_audio(tone(600), 16000), live.end_segment()))
        pusher.start()
        moments = []
        for moment in live.moments():
            moments.append(moment)
            if not pusher.is_alive() and live.state == "idle":
                break
            if len(moments) == 40:
                assert live.stats()["queued_frames"] <= 61
        pusher.join(HANGS)
        assert live.stats()["most_queued_frames"] <= 61
    heard = np.concatenate([m.sound for m in moments if m.segment == 0])
    assert len(heard) == 600 * 1920


def test_a_push_need_not_wait() -> None:
    with session(limit=60) as live:
        assert live.push_audio(tone(100), 16000, timeout=0) == 60 * 640
        live.push_audio(tone(100), 16000, timeout=0)
        assert live.stats()["most_queued_frames"] <= 61


def test_an_interruption_frees_who_waits_for_room() -> None:
    with session(limit=60) as live:
        pusher = threading.Thread(target=lambda: live.push_audio(tone(600), 16000))
        pusher.start()
        taken_before = taken(live, 60)
        finished = live.interrupt()
        pusher.join(HANGS)
        assert not pusher.is_alive()
        assert finished
        assert finished.interrupted
        assert finished.position == pytest.approx(sum(m.segment == 0 for m in taken_before) / 25)
        assert live.stats()["queued_frames"] == 0


def test_what_cannot_be_used_is_refused_and_the_session_goes_on() -> None:
    with session() as live:
        for pcm, rate, problem in (
            (np.array([np.nan], np.float32), 16000, "pcm: 1 of 1 samples are not finite"),
            (np.array([np.inf], np.float32), 16000, "pcm: 1 of 1 samples are not finite"),
            (np.zeros((2, 5), np.float32), 16000, "pcm: got float32"),
            (tone(1), 0, "rate: got 0"),
        ):
            with pytest.raises(ValueError, match=f"^{problem}"):
                live.push_audio(pcm, rate)
        live.push_audio(tone(3), 16000, segment=4)
        live.end_segment()
        with pytest.raises(ValueError, match=r"^segment: 4 has ended; the next one is 5"):
            live.push_audio(tone(3), 16000, segment=4)
        assert sum(m.segment == 4 for m in taken(live, 70)) == 3


def test_a_failure_comes_after_all_frames_that_were_made() -> None:
    with session(BrokenFace()) as live:
        moments = live.moments()
        assert [next(moments).index for _ in range(56)] == list(range(56))
        with pytest.raises(UserError, match="frame 56 holds NaN"):
            next(moments)
        with pytest.raises(UserError, match="frame 56"):
            live.push_audio(tone(1), 16000)


def test_a_closed_session_ends_its_moments_and_takes_nothing() -> None:
    live = session()
    moments = live.moments()
    next(moments)
    live.close()
    live.close()
    assert list(moments) == []
    for call in (lambda: live.push_audio(tone(1), 16000), live.end_segment, live.interrupt):
        with pytest.raises(RuntimeError, match="the session is closed"):
            call()


def test_two_takers_share_the_moments() -> None:
    with session() as live:
        seen: list[list[int]] = [[], []]

        def take(mine: list[int]) -> None:
            for moment in live.moments():
                mine.append(moment.index)
                if moment.index >= 80:
                    return

        threads = [threading.Thread(target=take, args=(mine,)) for mine in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
    together = sorted(seen[0] + seen[1])
    assert together == list(range(len(together)))


def test_moments_in_a_coroutine() -> None:
    """By a clock on which every moment is due, so that only the generation is waited for."""

    class Hurry(VirtualClock):
        def now(self) -> float:
            self.time += 1.0
            return self.time

        def wait(self, condition: threading.Condition, seconds: float) -> None:
            condition.wait(min(seconds, HANGS))

    async def talk() -> list[Moment]:
        live = session()
        live._clock = Hurry()
        moments: list[Moment] = []
        await asyncio.to_thread(live.push_audio, tone(30), 16000)
        await asyncio.to_thread(live.end_segment)
        async for moment in live.moments():
            moments.append(moment)
            if len(moments) == 100:
                await asyncio.to_thread(live.close)
        return moments

    moments = asyncio.run(asyncio.wait_for(talk(), HANGS))
    assert [m.index for m in moments] == list(range(100))
    assert sum(m.segment == 0 for m in moments) == 30


def test_an_event_may_interrupt() -> None:
    """A callback may call the session that tells it."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, PlaybackStarted):
            live.interrupt()

    live = session()
    live._on_event = on_event
    with live:
        live.push_audio(tone(50), 16000)
        live.end_segment()
        moments = taken(live, 60)
    assert sum(m.segment == 0 for m in moments) == 1
    assert [e for e in events if isinstance(e, PlaybackFinished)] == [PlaybackFinished(0, 0.04, True)]


def test_a_snapshot_is_written_for_every_chunk(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "session"
    with pytest.raises(UserError, match="cannot be written"):
        session(snapshots=path)
    path.parent.mkdir()
    with session(snapshots=path) as live:
        taken(live, 60)
        assert path.stat().st_size > 1000
        path.parent.rename(tmp_path / "gone")
        with pytest.raises(UserError, match="cannot be written"):
            taken(live, 200)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def sound_of(moments: list[Moment]) -> NDArray[np.float32]:
    return np.concatenate([m.sound for m in moments])


def test_a_click_can_be_followed_to_its_frame() -> None:
    pcm = np.zeros(40 * 1920, np.float32)
    pcm[12 * 1920 + 700] = 0.9
    with session() as live:
        live.push_audio(pcm, 48000)
        live.end_segment()
        moments = taken(live, 80)
    first = next(k for k, m in enumerate(moments) if m.segment == 0)
    place = int(sound_of(moments).argmax())
    frame = moments[place // 1920]
    assert frame.index == first + 12
    assert place % 1920 == 700
    assert frame.received is not None
    assert frame.received <= frame.begun <= frame.decoded <= frame.handed
