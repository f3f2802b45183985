"""What a viewer of the page says it saw: numbers, marks, the time between them, and what a visit makes of it."""

import numpy as np
import pytest

from profiling.measure.viewer import (
    FPS,
    MARKED,
    NUMBERS,
    first_sights,
    mark_offsets,
    number_blocks,
    stamped,
    with_stamps,
)
from profiling.measure.visit import spread, standstills, unwrapped
from profiling.soak import Spread
from streaming.live.timeline import Moment


def moment(index: int) -> Moment:
    return Moment(
        index, index / 25, np.full((64, 64, 3), 90, np.uint8), np.zeros(1920, np.float32), None, 0, None, 0, 0, 0
    )


def shown(*numbers: int, begin: float = 10.0) -> list[tuple[float, int]]:
    return [(begin + number / FPS, number) for number in numbers]


def test_a_moment_is_stamped_with_its_number_and_some_with_a_mark() -> None:
    for index in (0, 1, MARKED, 40_000, NUMBERS + 3):
        plain, made = moment(index), stamped(moment(index), 8)
        np.testing.assert_array_equal(made.rgb[:32, :32], number_blocks(index % NUMBERS, 8))
        np.testing.assert_array_equal(made.rgb[32:], plain.rgb[32:])
        assert (np.abs(made.sound).max() > 0.03) == (index % MARKED == 0)
        assert not plain.sound.any()  # it is nobody else's
        assert not made.sound[960:].any()


def test_the_blocks_are_the_bits_of_the_number() -> None:
    for number in (0, 1, 0x8421, 65_535):
        bits = number_blocks(number, 8)[4::8, 4::8, 0].reshape(-1) > 127
        assert sum(int(bit) << k for k, bit in enumerate(bits)) == number


def test_a_mark_is_compared_with_the_picture_that_it_belongs_to() -> None:
    frames = shown(*range(200))
    marks = [10 + MARKED / FPS + 0.030, 10 + 3 * MARKED / FPS - 0.050]
    assert mark_offsets(frames, marks) == pytest.approx([0.030, -0.050])


def test_a_marked_picture_that_was_not_shown_is_found_by_its_neighbours() -> None:
    frames = shown(*(number for number in range(200) if not MARKED - 3 < number < MARKED + 3))
    assert mark_offsets(frames, [10 + MARKED / FPS + 0.1]) == pytest.approx([0.1])


def test_pictures_that_stand_still_move_the_mark_that_follows() -> None:
    """The mark belongs to the picture, whenever that was shown."""
    frames = shown(*range(40)) + [(at + 1.0, number) for at, number in shown(*range(40, 100))]
    assert mark_offsets(frames, [10 + MARKED / FPS + 1.02]) == pytest.approx([0.02])


def test_a_mark_without_pictures_around_it_says_nothing() -> None:
    assert mark_offsets([], [1.0]) == []
    assert mark_offsets(shown(*range(20)), [50.0]) == []


def test_pictures_that_are_shown_again_are_seen_once() -> None:
    frames = [(0.0, 1), (0.04, 1), (0.08, 2), (0.12, 2), (0.16, 5)]
    assert first_sights(frames) == [(0.0, 1), (0.08, 2), (0.16, 5)]


def test_standing_still_is_told_apart_from_an_interruption() -> None:
    frames = [(0.0, 0), (0.7, 1), (0.74, 2), (1.94, 3), (1.98, 4)]
    alone, after = standstills(frames, interrupts=[0.8])
    assert max(alone) == pytest.approx(0.7)
    assert max(after) == pytest.approx(1.2)
    assert standstills([], []) == ([0.0], [0.0])


def test_numbers_count_on_where_they_begin_anew() -> None:
    numbers = [NUMBERS - 2, NUMBERS - 1, 0, 1, NUMBERS - 1, 2]
    assert unwrapped(numbers) == [NUMBERS - 2, NUMBERS - 1, NUMBERS, NUMBERS + 1, NUMBERS - 1, NUMBERS + 2]
    assert unwrapped([]) == []


def test_a_spread_is_of_sizes() -> None:
    assert spread([-0.03, 0.01, 0.02]) == Spread(3, pytest.approx(0.02), pytest.approx(0.029), 0.03)  # type: ignore[arg-type]
    assert spread([]) == Spread(0, None, None, None)


def test_the_moments_of_a_session_are_stamped_and_all_there() -> None:
    kit = pytest.importorskip("tests.streaming.serve.kit", reason="pip install 'flashtalk-triton[live]'")
    with with_stamps(kit.NumberedPipeline().live, 8)(None) as session:
        moments = session.moments()
        seen = [next(moments) for _ in range(3)]
    assert [m.index for m in seen] == [0, 1, 2]
    for made in seen:
        np.testing.assert_array_equal(made.rgb[:32, :32], number_blocks(made.index, 8))
    assert list(moments) == []
