"""What a session does when, in virtual time."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.live.states import State
from streaming.live.timeline import LagChanged, Moment, PlaybackFinished, PlaybackStarted
from tests.streaming.live.stage import FRAME, Stage, tone


def check(stage: Stage) -> None:
    """What holds in every session: no frame lost or repeated, each heard sample once, in order, and the seams fit."""
    moments = stage.moments
    assert [m.index for m in moments] == list(range(len(moments)))
    for before, after in itertools.pairwise(moments):
        assert after.pts - before.pts == pytest.approx(FRAME)
        assert after.handed >= before.handed
    for m in moments:
        loud = float(np.abs(m.sound).mean()) * 255
        assert m.rgb.reshape(-1)[3] == pytest.approx(loud, abs=2), "a frame hears what is heard with it"
        assert m.decoded <= m.handed
    ids = [tuple(m.rgb.reshape(-1)[:3]) for m in moments]
    assert len(set(ids)) == len(ids), "a frame was repeated"
    for before, after in itertools.pairwise(moments):
        if after.rgb.reshape(-1)[2] == 0:  # a chunk begins: it goes on from the frame that was shown before it
            assert tuple(after.rgb.reshape(-1)[4:7]) == tuple(before.rgb.reshape(-1)[:3])
    counts = stage.director.stats.counts
    assert counts.most_made_frames <= 2 * 28
    assert counts.most_queued_frames <= stage.limit + 1
    finished = Counter(e.segment for _, e in stage.events if isinstance(e, PlaybackFinished))
    assert all(count == 1 for count in finished.values())


def events(stage: Stage, kind: type) -> list:
    return [event for _, event in stage.events if isinstance(event, kind)]


def spoken(stage: Stage) -> list[Moment]:
    return [m for m in stage.moments if m.segment is not None]


def test_a_face_that_nobody_speaks_to_idles_at_its_pace() -> None:
    stage = Stage()
    stage.run(60)
    check(stage)
    assert len(stage.moments) == pytest.approx(25 * 59.5, abs=25)
    assert stage.director.playback.state == State.IDLE
    assert stage.director.stats.counts.stalls == 0
    assert not spoken(stage)


def test_speech_cuts_the_silence_that_was_made() -> None:
    stage = Stage()
    stage.at(20, lambda: stage.speak(tone(50), speed=10))
    stage.run(30)
    check(stage)
    assert [m.segment for m in spoken(stage)] == [0] * 50
    loud = np.concatenate([m.sound for m in spoken(stage)])
    assert len(loud) == 50 * 1920
    started, finished = events(stage, PlaybackStarted), events(stage, PlaybackFinished)
    assert [e.segment for e in started] == [0]
    assert finished == [PlaybackFinished(0, 2.0, False)]
    latency = stage.director.stats.silence_to_speech.summary()["max_s"]
    first = 3 * stage.step + stage.group
    assert latency < 1.12 / 10 + first + stage.step + 0.08 + 2 * FRAME, "a chunk's time, the sending and the margin"
    assert stage.director.stats.sound_to_frame.longest > 50 * FRAME * 0.9, "the last sound waits for that before it"
    assert stage.director.stats.latency.longest == pytest.approx(latency), "which no latency is"
    assert stage.director.stats.counts.stalls == 0
    assert stage.director.playback.state == State.IDLE


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 4.0),
            st.sampled_from(["speak", "slow", "interrupt", "short"]),
            st.integers(1, 120),
            st.sampled_from([1.2, 3.0, 10.0, 1000.0]),
        ),
        max_size=8,
    )
)
def test_whatever_comes_no_frame_is_lost_or_repeated_and_every_segment_ends_once(script: list) -> None:
    stage = Stage()
    time = 0.0
    for wait, action, frames, speed in script:
        time += wait
        match action:
            case "speak" | "slow":
                stage.at(time, lambda f=frames, s=speed: stage.speak(tone(f), speed=s))
            case "short":
                stage.at(time, lambda f=frames: (stage.push(tone(1)[: 5 * f]), stage.director.end()))
            case _:
                stage.at(time, lambda: stage.director.interrupt(stage.now))
    stage.run(time + 130 * len(script) * FRAME + 10)
    check(stage)
    begun = stage.director.voice.next_number
    assert sorted(e.segment for e in events(stage, PlaybackFinished)) == list(range(begun))
    assert stage.director.playback.state in (State.IDLE, State.INTERRUPTED)
    heard = Counter(m.segment for m in spoken(stage))
    for event in events(stage, PlaybackFinished):
        assert event.position <= heard[event.segment] * FRAME + 1e-9
        if not event.interrupted:
            assert event.position > (heard[event.segment] - 1) * FRAME


def test_an_interruption_takes_effect_at_once() -> None:
    stage = Stage()
    stage.at(10, lambda: stage.speak(tone(200), speed=1000))
    stage.at(13, lambda: (stage.director.interrupt(stage.now), stage.speak(tone(60, 0.9), speed=1000)))
    stage.run(20)
    check(stage)
    finished = events(stage, PlaybackFinished)
    assert [e.interrupted for e in finished] == [True, False]
    shown = [m for m in stage.moments if m.segment == 0]
    assert finished[0].position == pytest.approx(len(shown) * FRAME)
    assert all(m.handed <= 113 for m in shown)
    whole = 3 * stage.step + 7 * stage.group
    assert stage.director.stats.interrupt_to_speech.longest <= whole + 0.1
    after = [m for m in stage.moments if m.segment == 1]
    assert len(after) == 60
    assert after[0].index == shown[-1].index + 1


def test_interrupting_silence_changes_nothing() -> None:
    stage = Stage()
    stage.run(5)
    assert stage.director.interrupt(stage.now) is None
    assert stage.director.playback.state == State.IDLE
    stage.run(5)
    check(stage)
    assert stage.director.stats.counts.abandoned == 0


def test_speech_in_real_time_is_heard_without_gaps() -> None:
    stage = Stage()
    stage.at(5, lambda: stage.speak(tone(500), speed=1.0, piece=0.02))
    stage.run(40)
    check(stage)
    heard = spoken(stage)
    assert len(heard) == 500
    assert [m.index for m in heard] == list(range(heard[0].index, heard[0].index + 500))
    assert stage.director.stats.counts.late_s == 0


def test_sound_that_is_late_is_silence_and_then_goes_on() -> None:
    stage = Stage()
    stage.at(5, lambda: stage.speak(tone(40), speed=1000, end=False))
    stage.at(10, lambda: stage.speak(tone(40), speed=1000))
    stage.run(20)
    check(stage)
    assert len(spoken(stage)) == 80
    assert stage.director.stats.counts.late_s > 2
    assert [e.position for e in events(stage, PlaybackFinished)] == [pytest.approx(3.2)]


def test_a_chunk_that_waits_for_less_sound_speaks_earlier() -> None:
    latencies = []
    for wait_frames in (28, 12):
        stage = Stage(wait_frames=wait_frames, step=0.05, group=0.01)
        stage.at(5, lambda stage=stage: stage.speak(tone(300), speed=1.0, piece=0.02))
        stage.run(25)
        check(stage)
        assert len(spoken(stage)) == 300
        assert stage.director.stats.counts.late_s == 0
        latencies.append(stage.director.stats.silence_to_speech.longest)
    assert latencies[0] - latencies[1] == pytest.approx(16 * FRAME, abs=0.05)


def test_generation_that_is_too_slow_falls_behind_and_says_so() -> None:
    stage = Stage(step=0.4)
    stage.at(2, lambda: stage.speak(tone(300), speed=1000))
    stage.run(60)
    check(stage)
    assert len(spoken(stage)) == 300
    assert [e.lagging for e in events(stage, LagChanged)] == [True]
    assert stage.director.stats.counts.stalled_s > 1


def test_a_smaller_picture_keeps_up() -> None:
    stage = Stage(lag="smaller", step=0.4)
    stage.run(60)
    check(stage)
    assert set(stage.face.drawn[-20:]) == {1}
    assert len(stage.moments) > 50 * 25
    stage = Stage(lag="smaller", step=1.5)
    stage.run(60)
    assert set(stage.face.drawn[-20:]) == {2}


@pytest.mark.parametrize("ppm", [-1000, 0, 1000])
def test_a_microphone_is_heard_without_gaps_whatever_its_clock(ppm: int) -> None:
    """Sound every 40 ms by a clock that is wrong, with a second of silence in every ten: only that is corrected."""
    stage = Stage(kind="microphone", lag="drop")
    delays: list[float] = []
    stage.keep = lambda m: m.received is not None and delays.append(m.handed - m.received) is not None
    piece = tone(1)

    def send(k: int = 0) -> None:
        stage.push(piece * (k % 250 < 225))
        stage.at(0.04 * (1 + ppm * 1e-6), lambda: send(k + 1))

    stage.at(1, send)
    stage.run(500)
    counts = stage.director.stats.counts
    assert max(delays[500:]) < 1.12 + 0.33 + 0.1 + 0.08 + 0.2
    assert counts.dropped_s == pytest.approx(max(0, -ppm * 1e-6 * 500), abs=0.1)
    assert counts.late_s == 0
    assert counts.stalls == 0


def test_a_microphone_that_was_cut_off_is_live_again_at_once() -> None:
    stage = Stage(kind="microphone", lag="drop")

    def send(begin: float, seconds: float) -> None:
        for k in range(round(seconds * 50)):
            stage.at(begin + 0.02 * k, lambda: stage.push(tone(1)[:320]))

    send(1, 10)
    stage.at(14, lambda: stage.push(tone(75)))  # what was held up comes at once
    send(14, 10)
    stage.run(30)
    check(stage)
    late = [m.handed - (m.received or 0) for m in spoken(stage) if m.handed > 118]
    assert max(late) < 2.2
    assert stage.director.stats.counts.dropped_s > 1


def test_nobody_watches() -> None:
    """A session that nobody takes moments from makes two chunks, takes no more sound than fits, and goes on later."""
    stage = Stage(watching=False, limit=100)
    stage.run(20)
    assert stage.director.stats.counts.chunks == 2
    taken = [stage.push(tone(30)) for _ in range(10)]
    assert sum(taken) // 640 == 100
    assert taken[-1] == 0
    stage.director.end()
    assert len(stage.director.made) <= 56
    stage.watching = True
    stage.run(20)
    check(stage)
    assert len(spoken(stage)) == 100


def test_a_consumer_that_comes_back_gets_what_waited_for_it() -> None:
    stage = Stage()
    stage.run(10)
    stage.watching = False
    stage.run(3600)
    stage.watching = True
    stage.at(1, lambda: stage.speak(tone(30)))
    stage.run(10)
    check(stage)
    assert len(spoken(stage)) == 30
    assert stage.director.stats.counts.consumer_late_s == pytest.approx(3600, abs=1)
    assert stage.director.stats.counts.stalls == 0


def test_a_slow_consumer_loses_nothing() -> None:
    stage = Stage(taking=0.06)
    stage.at(1, lambda: stage.speak(tone(100), speed=10))
    stage.run(20)
    check(stage)
    assert len(spoken(stage)) == 100
    assert stage.director.stats.counts.stalls == 0


def test_an_hour_of_silence() -> None:
    stage = Stage()
    stage.keep = lambda moment: moment.index % 1000 == 0
    stage.run(3600)
    assert stage.director.shown == pytest.approx(90000, abs=30)
    assert stage.director.stats.counts.stalls == 0
    assert len(stage.director.chunks) <= 2
    assert stage.director.stats.counts.discarded_frames == 0
