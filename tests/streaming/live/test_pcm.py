"""Any rate, any pieces: the same frames of speech and sound."""

import itertools

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.config import ChunkConfig
from streaming.live.pcm import Stretch, check_rate, mono

CHUNK = ChunkConfig()
RATES = [8000, 11025, 16000, 22050, 24000, 44100, 48000, 11111]


def noise(count: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.3 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def converted(samples: NDArray[np.float32], rate: int, cuts: list[int]) -> tuple[NDArray[np.float32], ...]:
    """Speech and sound of samples that come in pieces, cut at these places."""
    stretch, frames = Stretch(rate, CHUNK), []
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(samples)]):
        stretch, more = stretch.push(samples[begin:end])
        frames += more
    frames.append(stretch.rest())
    speech, sound = zip(*frames, strict=True)
    return np.concatenate(speech), np.concatenate(sound)


@pytest.mark.parametrize("rate", RATES)
def test_speech_and_sound_are_what_the_resampler_makes_of_the_whole(rate: int) -> None:
    samples = noise(rate // 2) / np.float32(4)
    speech, sound = converted(samples, rate, [])
    assert len(speech) == (2 * len(samples) * 16000 + rate) // (2 * rate)
    assert len(sound) == 3 * len(speech)
    for got, target in ((speech, 16000), (sound, 48000)):
        wanted = soxr.resample(samples, rate, target)[: len(got)]
        np.testing.assert_allclose(got[:-700], wanted[:-700], atol=2e-6)


@settings(max_examples=30)
@given(st.sampled_from(RATES), st.integers(0, 5000), st.lists(st.integers(0, 5000), max_size=12))
def test_the_pieces_do_not_matter(rate: int, count: int, cuts: list[int]) -> None:
    samples = noise(count)
    whole, cut = converted(samples, rate, []), converted(samples, rate, [min(c, count) for c in cuts])
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_sample_at_a_time() -> None:
    samples = noise(2000)
    for one, other in zip(converted(samples, 24000, []), converted(samples, 24000, list(range(2000))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_kept_does_not_grow() -> None:
    stretch = Stretch(44100, CHUNK)
    for _ in range(200):
        stretch, _ = stretch.push(noise(4410))
        assert len(stretch.kept) < 44100 * 0.11


def test_samples_become_mono() -> None:
    np.testing.assert_array_equal(mono(np.array([-7e9, 2.0])), [-1, 1])
    np.testing.assert_array_equal(mono(np.array([-32768, 16384], np.int16)), [-1, 0.5])
    np.testing.assert_array_equal(mono(np.array([[0.5, 0.0], [1.0, -1.0]])), [0.25, 0])
    assert mono(np.zeros((3, 1), np.float16)).dtype == np.float32


@pytest.mark.parametrize(
    "pcm", [np.zeros((2, 3), np.float32), np.zeros(4, np.int32), np.zeros((1, 1, 1), np.float32), np.zeros(3, bool)]
)
def test_other_arrays_are_refused(pcm: NDArray) -> None:
    with pytest.raises(ValueError, match=r"^pcm: got .* wanted int16 or floating-point"):
        mono(pcm)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^pcm: 1 of 3 samples are not finite; none were taken"):
        mono(np.array([0, value, 0], np.float32))


@pytest.mark.parametrize("rate", [0, -1, 999, 10**7])
def test_other_rates_are_refused(rate: int) -> None:
    with pytest.raises(ValueError, match=r"^rate: got"):
        check_rate(rate)
