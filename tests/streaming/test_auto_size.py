"""The largest picture in real time: which sizes there are, and that the search finds the best of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.auto_size import SHARE, TRIALS, largest_in_time, sizes_like


@given(
    st.sampled_from([(448, 768), (128, 128), (768, 448), (640, 320), (16, 4096)]),
    st.sampled_from([16, 32]),
    st.integers(64, 2048),
)
def test_sizes_have_the_format_and_grow(size: tuple[int, int], stride: int, largest: int) -> None:
    sizes = sizes_like(*size, stride, largest)
    assert sizes == sorted(set(sizes), key=math.prod)
    for width, height in sizes:
        assert width % stride == height % stride == 0
        assert max(width, height) <= largest
        assert abs(width / size[0] - height / size[1]) * min(size) <= stride


@given(st.floats(1e-3, 1e3), st.floats(0.9, 1.6), st.integers(0, 40))
def test_the_best_size_is_found_or_nearly(speed: float, power: float, first: int) -> None:
    """Of some 60 sizes, with any speed, and any growth of the time between that of the area and nearly its square."""
    sizes = sizes_like(448, 768, 16, 1536)
    measured = []

    def seconds(size: tuple[int, int]) -> float:
        measured.append(size)
        return (math.prod(size) / 1e5) ** power / speed

    size, taken = largest_in_time(seconds, sizes, sizes[first], 1.0)
    fitting = [s for s in sizes if (math.prod(s) / 1e5) ** power / speed <= SHARE]
    assert len(measured) <= TRIALS
    assert size in measured
    assert taken == (math.prod(size) / 1e5) ** power / speed
    if fitting and size in fitting:
        assert sizes.index(fitting[-1]) - sizes.index(size) <= 4
    elif not fitting:
        assert size == min(measured, key=math.prod)


def test_too_little_memory_counts_as_too_slow() -> None:
    sizes = sizes_like(128, 128, 16, 512)
    size, taken = largest_in_time(lambda s: math.inf if math.prod(s) > 40_000 else 0.1, sizes, (512, 512), 1.0)
    assert math.prod(size) <= 40_000
    assert taken == pytest.approx(0.1)
