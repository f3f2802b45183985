"""The queue of sound: segments, their frames and ends; a microphone; bounds."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.config import ChunkConfig
from streaming.live.voice import Voice

CHUNK = ChunkConfig()
LIMIT = 50


def noise(count: int, level: float = 0.3) -> NDArray[np.float32]:
    return (level * np.random.default_rng(count).standard_normal(count)).astype(np.float32)


def voice(kind: str = "segments") -> Voice:
    return Voice("microphone" if kind == "microphone" else "segments", CHUNK, LIMIT)


def push(
    queue: Voice, samples: NDArray[np.float32], rate: int = 16000, segment: int | None = None, now: float = 0.0
) -> None:
    number = queue.number_of(segment)
    assert number is not None
    queue.push(samples, rate, number, now)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2000), st.sampled_from([8000, 16000, 24000, 44100])), max_size=10))
def test_every_sample_of_a_segment_is_queued_once_whatever_the_pieces(pieces: list[tuple[int, int]]) -> None:
    queue = voice()
    for count, rate in pieces:
        push(queue, noise(count), rate)
    if not pieces:
        return
    queue.end()
    stretches: list[list[int]] = []
    for count, rate in pieces:
        if stretches and stretches[-1][1] == rate:
            stretches[-1][0] += count
        else:
            stretches.append([count, rate])
    wanted = sum((2 * count * 16000 + rate) // (2 * rate) for count, rate in stretches)
    assert sum(frame.samples for frame in queue.frames) == wanted
    assert queue.segments[0].frames == len(queue.frames) == -(-wanted // 640)
    assert all(len(frame.speech) == 640 and len(frame.sound) == 1920 for frame in queue.frames)


def test_a_frame_knows_when_its_first_sample_came() -> None:
    queue = voice()
    for k in range(20):
        push(queue, noise(320), now=k)
    queue.end()
    assert [frame.received for frame in queue.frames] == list(range(0, 20, 2))


def test_segments_follow_each_other() -> None:
    queue = voice()
    push(queue, noise(1000), segment=3)
    push(queue, noise(700), segment=7)
    assert [s.ended for s in queue.segments.values()] == [True, False]
    queue.end()
    assert [frame.segment for frame in queue.frames] == [3, 3, 7, 7]
    assert [frame.samples for frame in queue.frames] == [640, 360, 640, 60]
    with pytest.raises(ValueError, match=r"^segment: 7 has ended; the next one is 8"):
        queue.number_of(7)
    assert queue.number_of(None) == 8


def test_what_still_comes_for_an_interrupted_segment_belongs_nowhere() -> None:
    queue = voice()
    push(queue, noise(5000), segment=4)
    assert [s.number for s in queue.clear()] == [4]
    assert queue.number_of(4) is None
    assert queue.number_of(5) == queue.number_of(None) == 5
    assert not queue.frames


def test_the_queue_of_segments_has_room_for_its_limit() -> None:
    queue = voice()
    for rate in (44100, 16000):
        while room := queue.room(rate):
            push(queue, noise(min(room, 999)), rate, segment=0)
    assert len(queue.frames) <= LIMIT
    assert queue.room(8000) == 0
    queue.end()
    assert len(queue.frames) <= LIMIT + 1  # a last frame that is filled up
    queue.take(10)
    assert queue.room(16000) >= 9 * 640


def test_a_microphone_loses_the_oldest() -> None:
    queue = voice("microphone")
    for k in range(100):
        push(queue, noise(640), now=k)
    assert len(queue.frames) == LIMIT
    assert queue.dropped == 100 - LIMIT - 1  # one waits for the sound behind it
    assert queue.segments[0].frames == LIMIT


def test_a_microphone_catches_up_in_silence_first() -> None:
    queue = voice("microphone")
    for level in (0.3, 0.3, 0.0, 0.3, 0.0, 0.3):
        push(queue, noise(640, level), 16000)
    queue.end()
    queue.catch_up(3)
    assert [bool(frame.speech.any()) for frame in queue.frames] == [True, True, True]
    assert queue.dropped == 3


@pytest.mark.parametrize(("clock", "wanted"), [("fast", [1, 0, 1]), ("slow", [1, 0, 0, 0, 1]), (None, [1, 0, 0, 1])])
def test_a_clock_is_corrected_in_silence(clock: Literal["fast", "slow"] | None, wanted: list[int]) -> None:
    queue = voice("microphone")
    queue.clock = clock
    for level in (0.3, 0.0, 0.0, 0.3):
        push(queue, noise(640, level), 16000)
    queue.end()
    assert [int(frame.speech.any()) for frame in queue.frames] == wanted
    assert queue.segments[0].frames == len(wanted)
    assert queue.dropped == (clock == "fast")
