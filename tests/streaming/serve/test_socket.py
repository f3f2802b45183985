"""flashtalk.v1 over a WebSocket: what is said is heard, seen, reported once, and interrupted."""

import numpy as np
import pytest

from streaming.serve.messages import (
    KEY,
    MEDIA,
    MEDIA_HEADER,
    Bye,
    Clear,
    ErrorMessage,
    PlaybackFinishedMessage,
    PlaybackStartedMessage,
    Pong,
    Ready,
    StateMessage,
    StatsMessage,
    unpack,
)
from tests.streaming.serve.kit import Talk, bearing, film, run, serving, speech

SOUND = {"rate": 16000}


def test_a_segment_is_said_shown_and_reported_once() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            talk = await serve.socket(facts, audio=SOUND, video="fmp4")
            ready = await talk.until(Ready)
            assert (ready.next_segment, ready.position, ready.state) == (0, 0, "idle")
            assert ready.limits["message_bytes"] == 65536
            await talk.say(0, speech(0.5))
            await talk.tell("end")
            finished = await talk.until(PlaybackFinishedMessage)
            assert (finished.segment, finished.interrupted) == (0, False)
            assert finished.position == pytest.approx(0.5)
            await talk.until(StateMessage, lambda m: m.state == "idle")
            kinds = [type(m) for m in talk.messages]
            assert kinds.count(PlaybackStartedMessage) == kinds.count(PlaybackFinishedMessage) == 1
            assert [m.state for m in talk.messages if isinstance(m, StateMessage)] == ["listening", "speaking", "idle"]
            check_media(talk.media)

    run(test())


def check_media(media: list[bytes]) -> None:
    """A header, then ticks without a gap from a key frame on, which decode to rising numbers and to a tone."""
    header, *rest = [unpack(data) for data in media]
    assert header.kind == MEDIA_HEADER
    assert {message.kind for message in rest} == {MEDIA}
    assert rest[0].flags & KEY
    assert [message.number for message in rest] == list(range(rest[0].number, rest[0].number + len(rest)))
    data = b"".join(bytes(message.body) for message in (header, *rest))
    numbers, heard, _ = film(data)
    assert numbers == sorted(numbers)
    assert len(numbers) == len(rest)
    assert set(range(numbers[0], numbers[-1] + 1)) == set(numbers)
    loud = np.abs(np.fft.rfft(heard)).argmax() * 48_000 / len(heard)
    assert loud == pytest.approx(440, abs=3)


def test_an_interruption_is_reported_once_and_later_sound_of_the_segment_is_not_heard() -> None:
    async def test() -> None:
        async with serving() as serve:
            talk = await serve.socket(await serve.create(), audio=SOUND, video="fmp4")
            await talk.say(7, speech(10))
            await talk.until(PlaybackStartedMessage)
            await talk.read_media(len(talk.media) + 3)
            await talk.tell("interrupt")
            finished = await talk.until(PlaybackFinishedMessage)
            assert (finished.segment, finished.interrupted) == (7, True)
            assert 0 < finished.position < 9
            clear = next((m for m in talk.messages if isinstance(m, Clear)), None) or await talk.until(Clear)
            await talk.say(7, speech(0.5))  # too late
            await talk.say(8, speech(0.2))
            await talk.tell("end")
            last = await talk.until(PlaybackFinishedMessage)
            assert (last.segment, last.interrupted) == (8, False)
            assert [m.segment for m in talk.messages if isinstance(m, PlaybackFinishedMessage)] == [7, 8]
            await talk.read_media(len(talk.media) + 1)
            assert unpack(talk.media[-1]).number >= clear.tick
            check_media(talk.media)

    run(test())


def test_who_listens_hears_figures_and_answers() -> None:
    async def test() -> None:
        async with serving() as serve:
            talk = await serve.socket(await serve.create())
            await talk.tell("ping", t=12.5)
            assert await talk.until(Pong) == Pong(12.5)
            stats = await talk.until(StatsMessage)
            assert (stats.state, stats.viewers, stats.queue) == ("idle", 0, 0)
            assert talk.media == []

    run(test())


def test_a_session_that_is_closed_says_goodbye() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            talk = await serve.socket(facts, video="fmp4")
            await talk.until(Ready)
            await serve.client.delete(f"/v1/sessions/{facts['id']}", headers=bearing(facts["key"]))
            messages = await talk.rest()
            assert isinstance(messages[-1], Bye)
            assert messages[-1].reason == "closed"
            assert talk.socket.close_code == 1000

    run(test())


def test_who_says_hello_after_the_end_is_told_so() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            path, headers = f"/v1/sessions/{facts['id']}", bearing(facts["key"])
            talk = Talk(await serve.client.ws_connect(f"{path}/ws", headers=headers))
            await serve.client.delete(path, headers=headers)
            await talk.tell("hello", video="fmp4")
            (bye,) = await talk.rest()
            assert isinstance(bye, Bye)
            assert bye.reason == "closed"
            assert talk.media == []

    run(test())


@pytest.mark.parametrize(
    ("format", "samples"),
    [
        ({"rate": 8000}, speech(0.4, 8000)),
        ({"rate": 44100, "channels": 2}, speech(0.4, 44100).repeat(2)),
        ({"rate": 48000, "format": "pcm_f32le"}, (speech(0.4, 48000) / 32768).astype("<f4")),
    ],
    ids=["8 kHz", "stereo", "float"],
)
def test_sound_of_other_formats_is_heard_as_long_as_it_is(format: dict, samples: np.ndarray) -> None:  # noqa: A002
    async def test() -> None:
        async with serving() as serve:
            talk = await serve.socket(await serve.create(), audio=format)
            await talk.say(0, samples)
            await talk.tell("end")
            finished = await talk.until(PlaybackFinishedMessage)
            assert finished.position == pytest.approx(0.4, abs=0.001)

    run(test())


@pytest.mark.parametrize(
    "data",
    [np.array([0.1, np.nan, 0.2], "<f4").tobytes(), np.array([np.inf] * 4, "<f4").tobytes(), b"12345"],
    ids=["NaN", "infinity", "cut"],
)
def test_sound_that_cannot_be_used_is_refused_and_what_follows_is_said(data: bytes) -> None:
    async def test() -> None:
        async with serving() as serve:
            talk = await serve.socket(await serve.create(), audio={"rate": 16000, "format": "pcm_f32le"})
            await talk.say(0, (speech(0.2) / 32768).astype("<f4"))
            await talk.say(0, np.frombuffer(data, np.uint8))
            error = await talk.until(ErrorMessage)
            assert (error.code, error.fatal) == ("bad_audio", False)
            await talk.say(0, (speech(0.2) / 32768).astype("<f4"))
            await talk.tell("end")
            assert (await talk.until(PlaybackFinishedMessage)).position == pytest.approx(0.4)

    run(test())


def test_two_who_speak_at_once_are_told_and_the_second_may_follow() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            one, other = [await serve.socket(facts, audio=SOUND) for _ in range(2)]
            await one.say(0, speech(0.1))
            await one.until(StateMessage)
            await other.say(0, speech(0.1))
            assert (await other.until(ErrorMessage)).code == "busy"
            await one.tell("end")
            await one.until(PlaybackFinishedMessage)
            await other.say(1, speech(0.1))
            await other.tell("end")
            assert (await other.until(PlaybackFinishedMessage, lambda m: m.segment == 1)).position == pytest.approx(0.1)

    run(test())


def test_a_speaker_who_vanishes_ends_its_segment() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            talk, watching = await serve.socket(facts, audio=SOUND), await serve.socket(facts)
            await talk.say(0, speech(0.3))
            await watching.until(StateMessage)
            talk.vanish()
            assert (await watching.until(PlaybackFinishedMessage)).position == pytest.approx(0.3)

    run(test())
