"""Measures of video on constructed tracks and pictures whose true values are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.distill.metrics import (
    Interval,
    bootstrap,
    box_colours,
    colour_distance,
    corner_drift,
    count_blinks,
    drift_ratio,
    frame_changes,
    identity_distance,
    lab,
    life,
    lip_sync,
    mean_interval,
    psnr,
    relative_sync,
    seam_ratio,
    sharpness,
)


def smooth_tracks(seed: int, clips: int, frames: int, parameters: int = 1) -> NDArray[np.float64]:
    """Random tracks [clips, frames, parameters] of mean 0 and deviation 1 without correlation between clips."""
    noise = np.random.default_rng(seed).normal(size=(clips, frames + 4, parameters))
    return np.stack([noise[:, i : i + frames] for i in range(5)]).sum(0) / math.sqrt(5)


def picture(seed: int, frames: int = 1, size: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


# --- Intervals ------------------------------------------------------------------------------------------------------


def test_intervals_contain_the_true_mean_about_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(300):
        clips = rng.normal(3.0, 1.0, 40)
        frames = [clip + rng.normal(0, 1, 5) for clip in clips]  # frames of a clip share the clip's mean
        interval = mean_interval(frames, seed)
        inside += interval.low <= 3.0 <= interval.high
    assert 0.90 <= inside / 300 <= 0.98


def test_an_interval_resamples_clips_not_frames() -> None:
    clips = np.random.default_rng(1).normal(0, 1, 50)
    repeated = mean_interval([np.full(400, clip) for clip in clips])
    assert repeated.value == pytest.approx(clips.mean())
    standard_error = clips.std() / math.sqrt(50)
    assert repeated.high - repeated.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_intervals_are_reproducible_and_depend_on_the_seed() -> None:
    values = list(np.random.default_rng(2).normal(size=(20, 3)))
    assert mean_interval(values, 7) == mean_interval(values, 7)
    assert mean_interval(values, 7) != mean_interval(values, 8)


def test_a_single_clip_has_a_value_and_no_interval() -> None:
    interval = mean_interval([np.array([1.0, 2.0, 6.0])])
    assert interval.value == 3
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_resamples_without_a_value_are_left_out() -> None:
    sums = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 1.0]])  # a resample of the middle clip alone is 0 / 0

    def ratio(totals: NDArray[np.floating]) -> NDArray[np.floating]:
        with np.errstate(invalid="ignore"):
            return totals[..., 0] / totals[..., 1]

    interval = bootstrap(ratio, sums)
    assert interval == Interval(1.5, 1.0, 2.0)


@pytest.mark.parametrize("values", [[], [np.zeros(3), np.zeros(0)], [np.zeros((2, 2))]])
def test_clips_without_frames_are_refused(values: list[NDArray[np.float64]]) -> None:
    with pytest.raises(ValueError, match="values"):
        mean_interval(values)


# --- Lips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [-6, -2, 0, 1, 5])
def test_a_shifted_track_has_its_lag(late: int) -> None:
    long = smooth_tracks(3, 8, 60)
    truth, read = long[:, 10:50], long[:, 10 - late : 50 - late]  # read[t] is truth[t - late]
    sync = lip_sync(read, truth, ("open",))["open"]
    assert sync.lag == Interval(late, late, late)
    assert sync.by_lag[late + 6] == pytest.approx(1)
    assert int(np.argmax(sync.by_lag)) == late + 6
    assert sync.r.value == pytest.approx(sync.by_lag[6])


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_noise_lowers_the_correlation_as_calculated(noise: float) -> None:
    truth = smooth_tracks(4, 60, 100)
    rng = np.random.default_rng(5)
    read = 0.3 * (truth + noise * rng.normal(size=truth.shape)) + 0.2
    sync = lip_sync(read, truth, ("open",))["open"]
    deviation = math.sqrt(1 + noise**2)
    assert sync.r.value == pytest.approx(1 / deviation, abs=0.02)
    assert sync.r.low <= 1 / deviation + 1e-9
    assert sync.r.high >= 1 / deviation - 1e-9
    assert sync.spread.value == pytest.approx(0.3 * deviation, rel=0.03)
    assert sync.bias.value == pytest.approx(0.2, abs=0.1)
    assert abs(sync.shuffled.value) < 0.1


def test_correlations_equal_those_of_numpy() -> None:
    rng = np.random.default_rng(6)
    truth = [rng.random((frames, 2)) + 5 for frames in (9, 30, 14)]
    read = [track + rng.random(track.shape) for track in truth]
    sync = lip_sync(read, truth, ("open", "wide"))
    for i, name in enumerate(("open", "wide")):
        x, y = (np.concatenate([track[:, i] for track in tracks]) for tracks in (read, truth))
        assert sync[name].r.value == pytest.approx(np.corrcoef(x, y)[0, 1])
        late_x, late_y = (
            np.concatenate([t[part, i] for t in tracks])
            for tracks, part in ((read, slice(2, None)), (truth, slice(None, -2)))
        )
        assert sync[name].by_lag[8] == pytest.approx(np.corrcoef(late_x, late_y)[0, 1])
        other = [truth[1][:9], truth[2], truth[0]]  # the next clip's, as long as both are
        x = np.concatenate([track[: len(t), i] for track, t in zip(read, other, strict=True)])
        assert sync[name].shuffled.value == pytest.approx(np.corrcoef(x, np.concatenate(other)[:, i])[0, 1])


def test_a_constant_track_has_no_correlation() -> None:
    truth = smooth_tracks(7, 4, 20)
    sync = lip_sync(np.full_like(truth, 0.7), truth, ("open",))["open"]
    assert math.isnan(sync.r.value)
    assert math.isnan(sync.lag.value)
    assert np.isnan(sync.by_lag).all()
    assert sync.spread.value == pytest.approx(0, abs=1e-6)
    assert sync.bias.value == pytest.approx(0.7 - truth.mean())
    assert math.isnan(lip_sync(truth, np.full_like(truth, 0.7), ("open",))["open"].spread.value)


def test_a_single_clip_has_no_shuffled_control() -> None:
    truth = smooth_tracks(8, 1, 20)
    sync = lip_sync(truth, truth, ("open",))["open"]
    assert sync.r.value == pytest.approx(1)
    assert math.isnan(sync.r.low)
    assert math.isnan(sync.shuffled.value)


def test_relative_sync_is_the_ratio_of_both_correlations() -> None:
    truth = smooth_tracks(9, 40, 60, 2)
    rng = np.random.default_rng(10)
    ceiling = truth + 0.5 * rng.normal(size=truth.shape)
    read = ceiling + 0.5 * rng.normal(size=truth.shape)
    names = ("open", "close")
    relative = relative_sync(read, ceiling, truth, names)
    best, got = lip_sync(ceiling, truth, names), lip_sync(read, truth, names)
    for name in names:
        assert relative[name].value == pytest.approx(got[name].r.value / best[name].r.value)
        assert relative[name].low < relative[name].value < relative[name].high < 1
    same = relative_sync(ceiling, ceiling, truth, names)["open"]
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("read", "truth", "names"),
    [
        ([], [], ("open",)),
        ([np.zeros((9, 1))], [np.zeros((8, 1))], ("open",)),
        ([np.zeros((9, 1))], [np.zeros((9, 1))] * 2, ("open",)),
        ([np.zeros((9, 1))], [np.zeros((9, 1))], ("open", "wide")),
        ([np.zeros((7, 1))], [np.zeros((7, 1))], ("open",)),
        ([np.zeros(9)], [np.zeros(9)], ("open",)),
    ],
)
def test_tracks_that_do_not_fit_are_refused(
    read: list[NDArray[np.float64]], truth: list[NDArray[np.float64]], names: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"read|names"):
        lip_sync(read, truth, names)


# --- Colour and sharpness -------------------------------------------------------------------------------------------

# Published values for sRGB primaries under D65 (B. Lindbloom's calculator; the CIE's formulas).
PUBLISHED = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (119, 119, 119): (50.03, 0.0, 0.0),
}


@pytest.mark.parametrize("rgb", PUBLISHED)
def test_lab_of_known_colours(rgb: tuple[int, int, int]) -> None:
    expected = pytest.approx(PUBLISHED[rgb], abs=0.02)
    assert tuple(lab(np.array(rgb, np.uint8))) == expected
    assert tuple(lab(np.array(rgb) / 255)) == expected


def test_colours_that_are_not_rgb_are_refused() -> None:
    with pytest.raises(ValueError, match="colours"):
        lab(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="colours"):
        lab(np.zeros((4, 3), np.int64))


def test_box_colours_of_a_picture_of_two_colours() -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[:, :, 4:] = 255
    fixed = np.array([[0, 0, 4, 8], [4, 2, 4, 2], [2, 0, 4, 8], [-3, -3, 5, 5], [8, 0, 4, 4]])
    colours = box_colours(frames, fixed)
    assert colours.shape == (2, 5, 3)
    np.testing.assert_allclose(colours[1, :4, 0], [0, 100, 50, 0], atol=0.01)  # the third box is half white
    assert np.isnan(colours[:, 4]).all()
    moving = np.array([[[0, 0, 2, 2]], [[6, 0, 2, 2]]])
    np.testing.assert_allclose(box_colours(frames, moving)[:, 0, 0], [0, 100], atol=0.01)


def test_colour_distance_follows_the_person() -> None:
    portrait = np.full((8, 8, 3), 119, np.uint8)
    portrait[2:4, 2:4] = (255, 0, 0)
    frames = np.full((2, 8, 8, 3), 119, np.uint8)
    frames[0, 5:7, 5:7] = (255, 0, 0)  # the same patch elsewhere
    frames[1, 5:7, 5:7] = 0  # black instead of red
    boxes = np.array([[5, 5, 2, 2], [0, 0, 2, 2], [20, 0, 2, 2]])  # the last is outside of the picture
    there = np.array([[2, 2, 2, 2], [0, 0, 2, 2], [6, 0, 2, 2]])
    expected = [0, np.linalg.norm(PUBLISHED[255, 0, 0]) / 2]  # one of two boxes differs
    np.testing.assert_allclose(colour_distance(frames, boxes, portrait, there), expected, atol=0.02)


def test_identity_distance_follows_the_mouth() -> None:
    """Grey pictures of 64 pixels with white cheeks and red hair at the places that belong to a mouth's centre."""

    def person(x: int, y: int, hair: tuple[int, int, int]) -> NDArray[np.uint8]:
        drawn = np.full((64, 64, 3), 119, np.uint8)
        for left, top, width, height, color in ((-10, -9, 4, 4, (255, 255, 255)), (6, -9, 4, 4, (255, 255, 255)),
                                                (-5, -38, 10, 4, hair)):  # fmt: skip
            drawn[y + top : y + top + height, x + left : x + left + width] = color
        return drawn

    red, blue = (255, 0, 0), (0, 0, 255)
    frames = np.stack((person(40, 50, red), person(25, 42, blue), person(30, 45, red)))
    frames[2, :8, :8] = 0  # one of both upper corners
    centres = np.array(((40.2, 49.8), (25, 42), (30, 45)))
    distances = identity_distance(frames, centres, person(32, 46, red), np.array((32, 46)))
    changed = float(np.linalg.norm(np.subtract(PUBLISHED[red], PUBLISHED[blue])))
    np.testing.assert_allclose(distances["skin"], [0, 0, 0], atol=1e-3)
    np.testing.assert_allclose(distances["hair"], [0, changed, 0], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(distances["background"], [0, 0, 50.03 / 2], atol=0.02)
    outside = identity_distance(frames[:1], np.array([[200.0, 200.0]]), frames[0], centres[0])
    assert np.isnan(outside["skin"]).all()


def test_corner_drift_tells_mean_from_deviation() -> None:
    portrait = np.full((32, 32, 3), 119, np.uint8)
    frames = np.repeat(portrait[None], 4, 0)
    frames[1] = 255  # everything white
    frames[2, :4, -4:] = 0  # one of both corners black: the mean of L* falls and its deviation rises by half of it
    frames[3, 4:] = 0  # below the corners
    half = 50.03 / 2
    expected = [[0, 0], [49.97, 0], [half, half], [0, 0]]
    np.testing.assert_allclose(corner_drift(frames, portrait), expected, atol=0.02)


def test_sharpness_of_ramps_and_blur() -> None:
    ramp = np.repeat(np.repeat(np.arange(16)[None, :, None] / 32, 12, 0), 3, 2)
    frames = np.stack((ramp, ramp / 2, 1 - ramp, np.full_like(ramp, 0.3)))
    np.testing.assert_allclose(sharpness(frames, ramp), [1, 0.25, 1, 0], atol=1e-6)
    red, green = (np.where(np.arange(3) == channel, ramp, 0) for channel in (0, 1))
    assert sharpness(red[None], green)[0] == pytest.approx((0.299 / 0.587) ** 2)
    noise = picture(11, 1, 96)[0] / 255
    blurred = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))) / 4
    # Neighbouring means of 2 x 2 pixels share two, so their difference has 4 / 16 of a pixel's variance, instead of 2.
    assert sharpness(blurred[None, 1:, 1:], noise[1:, 1:])[0] == pytest.approx(1 / 8, rel=0.1)
    assert np.isnan(sharpness(ramp[None], np.zeros_like(ramp)))


def test_pictures_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="portrait"):
        sharpness(picture(0, 2, 8), picture(0, 1, 16)[0])
    with pytest.raises(ValueError, match="boxes"):
        box_colours(picture(0), np.zeros((1, 5), int))
    with pytest.raises(ValueError, match="different shapes"):
        psnr([picture(0)], [picture(0, 2)])


def test_psnr_of_a_known_error() -> None:
    truth = [np.full((2, 4, 4, 3), value, np.uint8) for value in (50, 100)]
    assert psnr([clip + np.uint8(10) for clip in truth], truth).value == pytest.approx(20 * math.log10(25.5))
    one_of_both = psnr([truth[0] + np.uint8(10), truth[1]], truth)
    assert one_of_both.value == pytest.approx(20 * math.log10(25.5) + 10 * math.log10(2))
    assert one_of_both.low == pytest.approx(20 * math.log10(25.5))
    assert one_of_both.high == math.inf
    assert psnr(truth, truth) == Interval(math.inf, math.inf, math.inf)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_psnr_equals_its_definition(seed: int, clips: int) -> None:
    x, y = ([picture(seed + i + k, 1 + i, 4) for i in range(clips)] for k in (0, 1))
    difference = np.concatenate([(a.astype(float) - b).ravel() for a, b in zip(x, y, strict=True)])
    assert psnr(x, y).value == pytest.approx(10 * np.log10(255**2 / np.mean(difference**2)))


# --- Movement -------------------------------------------------------------------------------------------------------


def test_seam_ratio_of_a_constructed_jump() -> None:
    steps = np.full(11, 2)
    steps[[3, 7]] = 10  # frames 4 and 8 begin chunks
    brightness = np.concatenate(([0], np.cumsum(steps))).astype(np.uint8)
    video = np.broadcast_to(brightness[:, None, None, None], (12, 4, 4, 3))
    changes = frame_changes(video)
    np.testing.assert_allclose(changes, steps / 255, rtol=1e-6)
    np.testing.assert_array_equal(frame_changes(video[::-1]), changes[::-1])  # falling brightness changes as much
    ratio = seam_ratio([changes, changes, changes], (4, 8))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((5, 5, 5))
    assert seam_ratio([changes], (1, 2)).value == pytest.approx(2 / ((7 * 2 + 2 * 10) / 9))


@pytest.mark.parametrize("first_frames", [(), (0,), (4,), (1, 2, 3)])
def test_seams_outside_of_the_stream_are_refused(first_frames: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="first_frames"):
        seam_ratio([np.ones(3)], first_frames)


def test_frozen_video_has_no_seam_ratio() -> None:
    assert math.isnan(seam_ratio([np.zeros(5)], (3,)).value)


def test_blinks_are_counted_once_each() -> None:
    assert count_blinks(np.array([0, 0.6, 1, 0.6, 0, 0, 1, 0])) == 2
    assert count_blinks(np.array([0, 0.6, 0.4, 0.6, 0.3, 0.9, 0.1])) == 1  # noise at the threshold
    assert count_blinks(np.array([1, 1, 0.1, 0.4, 0.4])) == 0  # closed from the start, and half closed
    assert count_blinks(np.array([1, 0.1, 1.0])) == 1


def test_life_of_half_the_blinks_and_a_third_of_the_sway() -> None:
    frames = np.arange(250)
    blink = (frames % 100 == 50).astype(float)  # at 50 and 150: two in ten seconds
    data_blink = (frames % 50 == 25).astype(float)  # five in ten seconds
    pose = np.sin(frames[:, None] * np.array([0.2, 0.3, 0.5]) * 2 * np.pi / 5)
    result = life([blink] * 3, [pose / 3 + 7] * 3, [data_blink] * 2, [pose] * 2)
    assert result.blink_rate.value == pytest.approx(0.2)
    assert result.blinks.value == pytest.approx(2 / 5)
    for axis in result.sway:
        assert (axis.value, axis.low, axis.high) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_sway_is_compared_over_equal_times() -> None:
    drift = np.repeat(np.linspace(0, 1, 200)[:, None], 3, 1)  # moves further the longer it is watched
    short = [drift[i : i + 20] for i in range(0, 200, 20)]
    still = np.zeros(200)
    sway = life([still], [drift], [clip[:, 0] for clip in short], short).sway
    assert [axis.value for axis in sway] == pytest.approx([1, 1, 1])


def test_data_without_blinks_has_no_ratio() -> None:
    still, pose = np.zeros(20), np.ones((20, 3))
    result = life([still], [pose], [still], [pose])
    assert math.isnan(result.blinks.value)
    assert math.isnan(result.sway[0].value)


def test_drift_ratio_of_the_ends() -> None:
    stream = np.array([1, 3, 50, 4, 4.0])
    assert drift_ratio([stream, 2 * stream], 2).value == pytest.approx(2)
    assert drift_ratio([stream, np.concatenate((stream, [9.0]))], 1).value == pytest.approx((4 + 9) / 2)
    assert drift_ratio([stream] * 3, 2) == Interval(2, 2, 2)


@pytest.mark.parametrize("chunks", [0, 3])
def test_drift_ratio_needs_enough_chunks(chunks: int) -> None:
    with pytest.raises(ValueError, match="chunks"):
        drift_ratio([np.ones(5)], chunks)
