"""Measures of talking-head video with known truth: lips, colour, sharpness, seams, life, drift and PSNR.

All functions take numpy arrays and have no state. A *track* is a number per frame, such as the opening of the mouth
that a reader network read from the picture, or its truth. Frames are RGB [frames, height, width, 3] in sRGB, uint8 in
0 .. 255 or floating point in 0 .. 1. Crops of frames, such as a box around the mouth, are frames as well.

Frames of one clip depend on each other, so an interval comes from resampling whole clips (or whole streams): from the
sums of every clip, `bootstrap` draws as many clips as there are, with replacement, and computes the statistic from the
drawn sums; the interval holds the middle 95 % of a thousand such results. A fixed seed makes it reproducible.

A statistic that is undefined is NaN, and resamples in which it is undefined are left out of the interval. With a single
clip nothing is known about the spread, so both ends are NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.lab_transfer import rgb_to_lab
from model.config import ChunkConfig

FPS = ChunkConfig.tgt_fps
LAGS = range(-6, 7)  # frames
RESAMPLES = 1000
LEVEL = 0.95  # share of the resamples inside an interval
CONSTANT = 1e-6  # a track with a smaller standard deviation is constant
BLINK_BEGINS, BLINK_ENDS = 0.5, 0.25  # closure of the lids; two thresholds, so that noise at one cannot count twice

FACE_BOXES = {"skin": ((-20, -18, 8, 8), (12, -18, 8, 8)), "hair": ((-10, -76, 20, 7),)}
"""Both cheeks and the hair above the forehead: x and y from the mouth's centre, width and height, in pixels of 128."""

Array = NDArray[np.floating]
Tracks = Sequence[Array] | Array  # by clip: a list of arrays of any lengths, or one array whose first axis is the clip
Frames = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval. The ends are NaN for a single clip."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LipSync:
    """How one mouth parameter that was read from video follows its truth, over all frames of all clips.

    `r` is Pearson's correlation without a shift. `by_lag` has the correlations of read[t + lag] with truth[t] for the
    lags -6 .. 6, and `lag` is the one of the greatest: it is positive if the picture comes too late. `spread` is the
    standard deviation of what was read over that of the truth, and `bias` is the difference of the means. `shuffled` is
    the correlation with the truth of the next clip, which chance alone explains. Correlations are NaN if either track
    is constant, and so is `lag` if all of `by_lag` are.
    """

    r: Interval
    lag: Interval
    by_lag: tuple[float, ...]
    spread: Interval
    bias: Interval
    shuffled: Interval


@dataclass(frozen=True)
class Life:
    """Blinks and head movement of video, compared with the data's.

    `blink_rate` is in blinks per second and `blinks` is it over the data's. `sway` is the standard deviation of yaw,
    pitch and roll within short pieces of video, over the data's. 1 is as lively as the data, 0 is frozen.
    """

    blink_rate: Interval
    blinks: Interval
    sway: tuple[Interval, ...]


# --- Intervals ------------------------------------------------------------------------------------------------------


def bootstrap(statistic: Callable[..., NDArray[Any]], *sums: Array, seed: int = 0) -> Interval:
    """The percentile interval of a statistic of sums over clips.

    Args:
        statistic: Maps the total of each group, [..., M], to a value [...]. It is called for all resamples at once.
        sums: For each group of clips the sums of its clips, [clips, M]. Groups are resampled independently.
        seed: Of the resampling.

    Raises:
        ValueError: If a group has no clips.
    """
    if any(len(group) == 0 for group in sums):
        raise ValueError("sums: got no clips, wanted at least one")
    rng = np.random.default_rng(seed)
    totals = [_resample(np.asarray(group, np.float64), rng) for group in sums]
    values = np.asarray(statistic(*totals), np.float64)
    value, samples = float(values[0]), np.sort(values[1:][~np.isnan(values[1:])])
    if min(len(group) for group in sums) < 2 or not len(samples) or np.isnan(value):
        return Interval(value, np.nan, np.nan)
    ends = np.quantile(samples, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), method="nearest")  # works for infinite samples
    return Interval(value, float(ends[0]), float(ends[1]))


def _resample(sums: Array, rng: np.random.Generator) -> Array:
    """Totals of the given clips and of the resamples: [clips, ...] -> [1 + resamples, ...]."""
    clips = len(sums)
    counts = rng.multinomial(clips, np.full(clips, 1 / clips), size=RESAMPLES)
    return np.tensordot(np.concatenate((np.ones((1, clips)), counts)), sums, 1)


def mean_interval(values: Tracks, seed: int = 0) -> Interval:
    """The mean over all frames of all clips, whose values are arrays [frames] of any lengths.

    Raises `ValueError` if there are no clips or a clip has no frames.
    """
    _check_tracks("values", values, 1)
    return bootstrap(_ratio, np.array([(np.sum(value, dtype=np.float64), len(value)) for value in values]), seed=seed)


def _ratio(sums: Array) -> Array:
    """Numerator over denominator: [..., 2] -> [...], NaN where the denominator is zero."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] != 0)


def _check_tracks(name: str, tracks: Tracks, dimensions: int) -> None:
    if not len(tracks):
        raise ValueError(f"{name}: got no clips, wanted at least one")
    for track in tracks:
        if np.ndim(track) != dimensions or not len(track):
            raise ValueError(f"{name}: got a clip {np.shape(track)}, wanted {dimensions} dimensions, frames first")


# --- Lips -----------------------------------------------------------------------------------------------------------


def lip_sync(read: Tracks, truth: Tracks, names: Sequence[str], seed: int = 0) -> dict[str, LipSync]:
    """Compares what was read from the video of each clip with its truth, parameter by parameter.

    The ceiling that a codec sets is this function on frames that went through the codec, and what is left of it is
    `relative_sync`.

    Args:
        read: For each clip [frames, parameters].
        truth: As `read`, of the same shapes.
        names: The names of the parameters.
        seed: Of the intervals.

    Raises:
        ValueError: If there are no clips, shapes differ, or a clip has less than 2 + 6 frames.
    """
    _check_sync("read", read, truth)
    if read[0].shape[1] != len(names):
        raise ValueError(f"names: got {len(names)}, wanted one for each of {read[0].shape[1]} parameters")
    return {name: _lip_sync(*_track(read, truth, i), seed) for i, name in enumerate(names)}


def relative_sync(
    read: Tracks, ceiling: Tracks, truth: Tracks, names: Sequence[str], seed: int = 0
) -> dict[str, Interval]:
    """The correlation of `read` with the truth over that of `ceiling`, parameter by parameter, on the same clips.

    `ceiling` is what was read from the best possible frames, such as true ones through the codec. The arguments have
    the shapes of those of `lip_sync`. The value is NaN where a correlation is, or where that of the ceiling is zero.
    """
    _check_sync("read", read, truth)
    _check_sync("ceiling", ceiling, truth)
    relative = {}
    for i, name in enumerate(names):
        pairs = zip(*_track(read, truth, i), *_track(ceiling, truth, i), strict=True)
        sums = np.array([(_moments(x, y), _moments(x_best, y_best)) for x, y, x_best, y_best in pairs])
        relative[name] = bootstrap(lambda s: _ratio(np.stack((_r(s[:, 0]), _r(s[:, 1])), -1)), sums, seed=seed)
    return relative


def _check_sync(name: str, read: Tracks, truth: Tracks) -> None:
    _check_tracks(name, read, 2)
    if [np.shape(track) for track in read] != [np.shape(track) for track in truth]:
        raise ValueError(f"{name} and truth: got different shapes, wanted [frames, parameters] alike for each clip")
    if min(len(track) for track in read) < LAGS[-1] + 2:
        raise ValueError(f"{name}: got a clip with less than {LAGS[-1] + 2} frames")


def _track(read: Tracks, truth: Tracks, parameter: int) -> tuple[list[Array], list[Array]]:
    """One parameter of both, less the mean of the truth, so that differences of squares keep their precision."""
    offset = np.concatenate([clip[:, parameter] for clip in truth]).mean(dtype=np.float64)
    x, y = ([np.asarray(clip[:, parameter], np.float64) - offset for clip in clips] for clips in (read, truth))
    return x, y


def _lip_sync(read: list[Array], truth: list[Array], seed: int) -> LipSync:
    clips = range(len(read))
    shifted = np.array([[_moments(*_overlap(x, y, lag)) for lag in LAGS] for x, y in zip(read, truth, strict=True)])
    unshifted = shifted[:, LAGS.index(0)]
    shuffled = np.array([_moments(*_overlap(read[i], truth[(i + 1) % len(clips)], 0)) for i in clips])
    return LipSync(
        r=bootstrap(_r, unshifted, seed=seed),
        lag=bootstrap(_best_lag, shifted, seed=seed),
        by_lag=tuple(_r(shifted.sum(0)).tolist()),
        spread=bootstrap(_spread, unshifted, seed=seed),
        bias=bootstrap(_bias, unshifted, seed=seed),
        shuffled=bootstrap(_r, shuffled, seed=seed) if len(clips) > 1 else Interval(np.nan, np.nan, np.nan),
    )


def _overlap(x: Array, y: Array, lag: int) -> tuple[Array, Array]:
    """The frames x[t + lag] and y[t] for all t that both have."""
    begin = max(0, -lag)
    frames = min(len(x) - lag, len(y)) - begin
    return x[begin + lag : begin + lag + frames], y[begin : begin + frames]


def _moments(x: Array, y: Array) -> tuple[float, ...]:
    """What correlations and deviations need: the number of frames and the sums of x, y, x^2, y^2 and x y."""
    return len(x), float(x.sum()), float(y.sum()), float(x @ x), float(y @ y), float(x @ y)


def _deviations(moments: Array) -> tuple[Array, Array, Array]:
    """Standard deviations of both tracks and their covariance: [..., 6] -> three arrays [...]."""
    n, x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    x_deviation = np.sqrt(np.maximum(xx / n - (x / n) ** 2, 0))
    y_deviation = np.sqrt(np.maximum(yy / n - (y / n) ** 2, 0))
    return x_deviation, y_deviation, xy / n - x / n * y / n


def _r(moments: Array) -> Array:
    """Pearson's correlation of all frames that went into the moments: [..., 6] -> [...]."""
    x, y, covariance = _deviations(moments)
    varies = (x > CONSTANT) & (y > CONSTANT)
    return np.divide(covariance, x * y, out=np.full(x.shape, np.nan), where=varies)


def _best_lag(moments: Array) -> Array:
    """The lag of the greatest correlation: [..., lags, 6] -> [...]."""
    r = _r(moments)
    best = np.array(LAGS, np.float64)[np.argmax(np.nan_to_num(r, nan=-np.inf), -1)]
    return np.where(np.isnan(r).all(-1), np.nan, best)


def _spread(moments: Array) -> Array:
    x, y, _ = _deviations(moments)
    return np.divide(x, y, out=np.full(x.shape, np.nan), where=y > CONSTANT)


def _bias(moments: Array) -> Array:
    return (moments[..., 1] - moments[..., 2]) / moments[..., 0]


# --- Colour and sharpness -------------------------------------------------------------------------------------------


def lab(rgb: Frames) -> NDArray[np.float32]:
    """CIE L*a*b* of sRGB under D65: uint8 in 0 .. 255 or floating point in 0 .. 1, [..., 3] -> float32 [..., 3].

    L* is 0 .. 100; a* and b* are about -100 .. 100.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(_unit(rgb)).reshape(-1, 3, 1, 1))
    return rgb_to_lab(pixels).numpy().reshape(np.shape(rgb))


def _unit(frames: Frames) -> NDArray[np.float32]:
    """The colours as float32 in 0 .. 1."""
    if frames.shape[-1] != 3 or not (frames.dtype == np.uint8 or np.issubdtype(frames.dtype, np.floating)):
        raise ValueError(f"colours: got {frames.dtype} {frames.shape}, wanted uint8 or floating point [..., 3]")
    return np.divide(frames, 255, dtype=np.float32) if frames.dtype == np.uint8 else frames.astype(np.float32)


def box_colours(frames: Frames, boxes: NDArray[np.integer]) -> NDArray[np.float32]:
    """The mean Lab colour of boxes in each frame.

    Args:
        frames: [frames, height, width, 3].
        boxes: Integers x, y, width, height in pixels, [boxes, 4] for all frames or [frames, boxes, 4] if they follow
            the head. What lies outside of the picture is left out.

    Returns:
        [frames, boxes, 3]. A box entirely outside of the picture is NaN.
    """
    if frames.ndim != 4 or boxes.shape[-1:] != (4,) or boxes.ndim not in (2, 3):
        raise ValueError(f"frames and boxes: got {frames.shape} and {boxes.shape}, wanted [T, H, W, 3] and [(T,) n, 4]")
    boxes = np.broadcast_to(boxes, (len(frames), *boxes.shape[-2:]))
    colours = np.full((*boxes.shape[:2], 3), np.nan, np.float32)
    for t, i in np.ndindex(boxes.shape[:2]):
        x, y, width, height = boxes[t, i]
        crop = frames[t, max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
        if crop.size:
            colours[t, i] = lab(crop).mean((0, 1))
    return colours


def colour_distance(
    frames: Frames, boxes: NDArray[np.integer], portrait: Frames, portrait_boxes: NDArray[np.integer]
) -> NDArray[np.float32]:
    """How far the colours of a person are from the portrait's: the mean over boxes of |mean Lab - portrait's mean Lab|.

    Boxes on skin, hair and background tell whether it is still the same person in the same room. A distance of 2 is
    just visible side by side.

    Args:
        frames: [frames, height, width, 3].
        boxes: [boxes, 4] or [frames, boxes, 4], as for `box_colours`.
        portrait: [height, width, 3].
        portrait_boxes: The same places of the portrait, [boxes, 4].

    Returns:
        [frames]. Boxes outside of the picture are left out; without any box inside it is NaN.
    """
    difference = box_colours(frames, boxes) - box_colours(portrait[None], portrait_boxes)
    distance = np.linalg.norm(difference, axis=-1)
    inside = ~np.isnan(distance)
    return _ratio(np.stack((np.where(inside, distance, 0).sum(1), inside.sum(1)), -1)).astype(np.float32)


def identity_distance(
    frames: Frames, centres: Array, portrait: Frames, portrait_centre: Array
) -> dict[str, NDArray[np.float32]]:
    """`colour_distance` of the skin, the hair and the background to the portrait's.

    The boxes of skin (both cheeks) and hair follow the mouth's centre; those of the background are the upper corners,
    squares of an eighth of the height.

    Args:
        frames: [frames, size, size, 3].
        centres: Column and row of the mouth's centre in pixels, [frames, 2].
        portrait: [size, size, 3].
        portrait_centre: The same of the portrait, [2].

    Returns:
        [frames] for "skin", "hair" and "background".
    """
    _check_portrait(frames, portrait)
    size, corner = portrait.shape[1], max(1, portrait.shape[0] // 8)
    corners = np.array(((0, 0, corner, corner), (size - corner, 0, corner, corner)))
    distances = {"background": colour_distance(frames, corners, portrait, corners)}
    for name, offsets in FACE_BOXES.items():
        boxes = np.array(offsets) * size / 128
        here, there = (
            np.round(boxes + np.pad(np.asarray(centre, np.float64), ((0, 0), (0, 2)))[:, None]).astype(int)
            for centre in (centres, np.asarray(portrait_centre)[None])
        )
        distances[name] = colour_distance(frames, here, portrait, there[0])
    return distances


def corner_drift(frames: Frames, portrait: Frames) -> NDArray[np.float32]:
    """How far the background has drifted in colour and in contrast, in units of Lab.

    The upper two corners, squares of an eighth of the height, show background that does not move. Over the pixels of
    both, it takes the mean Lab colour and the standard deviation of each channel, and for each of the two the Euclidean
    distance to the portrait's.

    Args:
        frames: [frames, height, width, 3].
        portrait: [height, width, 3].

    Returns:
        [frames, 2], the distance of the means and that of the deviations.
    """
    _check_portrait(frames, portrait)
    size = max(1, portrait.shape[0] // 8)

    def statistics(pictures: Frames) -> Array:
        corners = lab(np.concatenate((pictures[:, :size, :size], pictures[:, :size, -size:]), 2))
        return np.stack((corners.mean((1, 2)), corners.std((1, 2))), 1)

    return np.linalg.norm(statistics(frames) - statistics(portrait[None]), axis=-1)


def sharpness(frames: Frames, portrait: Frames) -> NDArray[np.float32]:
    """The gradient energy of each frame over the portrait's: 1 is as sharp, less is blurred, more is noisy.

    The energy is mean((I[y, x+1] - I[y, x])^2) + mean((I[y+1, x] - I[y, x])^2) of the luma I of Rec. 601.

    Args:
        frames: [frames, height, width, 3], or a box of each.
        portrait: [height, width, 3], or the same box of it.

    Returns:
        [frames], NaN if the portrait is of one colour.
    """
    _check_portrait(frames, portrait)
    energy, best = _gradient_energy(frames), _gradient_energy(portrait[None])
    return np.divide(energy, best, out=np.full(energy.shape, np.nan, np.float32), where=best > 0)


def _gradient_energy(frames: Frames) -> NDArray[np.float32]:
    luma = _unit(frames) @ np.array((0.299, 0.587, 0.114), np.float32)
    return np.square(np.diff(luma, axis=1)).mean((1, 2)) + np.square(np.diff(luma, axis=2)).mean((1, 2))


def _check_portrait(frames: Frames, portrait: Frames) -> None:
    if frames.ndim != 4 or frames.shape[1:] != portrait.shape:
        raise ValueError(
            f"got frames {frames.shape} and a portrait {portrait.shape}, wanted [T, H, W, 3] and [H, W, 3]"
        )


def psnr(frames: Sequence[Frames], truth: Sequence[Frames], seed: int = 0) -> Interval:
    """The peak signal-to-noise ratio in dB, 10 log10(1 / mse), of the mean squared error over all pixels of all clips.

    Colours are in 0 .. 1. Equal frames give infinity. For the mouth alone, pass crops of both around its centre.

    Args:
        frames: For each clip [frames, height, width, 3].
        truth: As `frames`, of the same shapes.
        seed: Of the interval.

    Raises:
        ValueError: If there are no clips, or shapes differ.
    """
    if [clip.shape for clip in frames] != [clip.shape for clip in truth]:
        raise ValueError("frames and truth: got different shapes, wanted the same for each clip")
    errors = [np.square(_unit(x) - _unit(y)) for x, y in zip(frames, truth, strict=True)]
    sums = np.array([(error.sum(dtype=np.float64), error.size) for error in errors])

    def decibels(totals: Array) -> Array:
        with np.errstate(divide="ignore"):
            return -10 * np.log10(_ratio(totals))

    return bootstrap(decibels, sums, seed=seed)


# --- Movement -------------------------------------------------------------------------------------------------------


def frame_changes(frames: Frames) -> NDArray[np.float32]:
    """The mean absolute difference of neighbouring frames, [frames, height, width, 3] -> [frames - 1].

    Entry j is mean|frame j+1 - frame j| over all pixels and channels, of colours in 0 .. 1.
    """
    if frames.ndim != 4:
        raise ValueError(f"frames: got {frames.shape}, wanted [frames, height, width, 3]")
    return np.abs(np.diff(_unit(frames), axis=0)).mean((1, 2, 3))


def seam_ratio(changes: Tracks, first_frames: Sequence[int], seed: int = 0) -> Interval:
    """How much more the picture changes at seams between chunks than inside of chunks; 1 is perfect.

    The ratio is the mean change from the last frame of a chunk to the first of the next, over the mean of all other
    changes. It is NaN if nothing else changes.

    Args:
        changes: For each stream `frame_changes` of its shown frames, [frames - 1].
        first_frames: The number of each frame that begins a new chunk, the same in all streams. A chunk with its five
            motion frames is a stream of its own whose only seam is at frame 5.
        seed: Of the interval.

    Raises:
        ValueError: If there are no streams, or a stream has no frame before or after a seam or no other change.
    """
    _check_tracks("changes", changes, 1)
    seams = np.unique(np.asarray(first_frames, np.int64)) - 1  # the change that leads to each first frame
    shortest = min(len(stream) for stream in changes)
    if not len(seams) or seams[0] < 0 or seams[-1] >= shortest or len(seams) >= shortest:
        raise ValueError(f"first_frames: got {list(first_frames)}, wanted some of 1 .. {shortest}, but not all")
    sums = []
    for stream in changes:
        across = stream[seams].sum(dtype=np.float64)
        sums.append((across, len(seams), stream.sum(dtype=np.float64) - across, len(stream) - len(seams)))

    def ratio(totals: Array) -> Array:
        return _ratio(np.stack((_ratio(totals[..., :2]), _ratio(totals[..., 2:])), -1))

    return bootstrap(ratio, np.array(sums), seed=seed)


def count_blinks(blink: Array) -> int:
    """How often the lids close: [frames] of 0 (open) to 1 (closed).

    A blink begins when the track rises to .5 and ends when it falls below .25. Lids that are closed in the first frame
    do not count.
    """
    closed, blinks = bool(blink[0] >= BLINK_BEGINS), 0
    for value in blink[1:]:
        if not closed and value >= BLINK_BEGINS:
            closed, blinks = True, blinks + 1
        elif closed and value < BLINK_ENDS:
            closed = False
    return blinks


def life(
    blink: Tracks,
    pose: Tracks,
    data_blink: Tracks,
    data_pose: Tracks,
    seed: int = 0,
) -> Life:
    """Compares blinks and head movement with those of the data.

    A head moves further in a longer time, so all tracks of the pose are cut into pieces as long as the shortest one of
    any clip, and the standard deviation is taken over the differences to the mean of each piece. Video and data are
    resampled independently. A ratio is NaN where the data's value is zero.

    Args:
        blink: For each clip [frames], 0 (open) to 1 (closed).
        pose: For each clip [frames, 3]: yaw, pitch and roll.
        data_blink: As `blink`, of the data, and best read by the same reader.
        data_pose: As `pose`, of the data.
        seed: Of the intervals.

    Raises:
        ValueError: If there are no clips, or their shapes do not fit.
    """
    for name, tracks, dimensions in (
        ("blink", blink, 1),
        ("data_blink", data_blink, 1),
        ("pose", pose, 2),
        ("data_pose", data_pose, 2),
    ):
        _check_tracks(name, tracks, dimensions)
    blinks, data_blinks = (
        np.array([(count_blinks(clip), len(clip) / FPS) for clip in clips]) for clips in (blink, data_blink)
    )
    piece = min(len(clip) for clip in (*pose, *data_pose))
    moves, data_moves = (np.array([_moved(clip, piece) for clip in clips]) for clips in (pose, data_pose))
    return Life(
        blink_rate=bootstrap(_ratio, blinks, seed=seed),
        blinks=bootstrap(lambda x, y: _ratio(np.stack((_ratio(x), _ratio(y)), -1)), blinks, data_blinks, seed=seed),
        sway=tuple(
            bootstrap(
                lambda x, y: np.sqrt(_ratio(np.stack((_ratio(x), _ratio(y)), -1))),
                moves[:, i],
                data_moves[:, i],
                seed=seed,
            )
            for i in range(moves.shape[1])
        ),
    )


def _moved(pose: Array, piece: int) -> Array:
    """The sum of squared differences to the mean of each piece, and its number of frames: [frames, 3] -> [3, 2]."""
    pieces = np.asarray(pose[: len(pose) // piece * piece], np.float64).reshape(-1, piece, pose.shape[1])
    squares = np.square(pieces - pieces.mean(1, keepdims=True)).sum((0, 1))
    return np.stack((squares, np.full(squares.shape, pieces.shape[0] * piece)), -1)


def drift_ratio(distances: Tracks, chunks: int, seed: int = 0) -> Interval:
    """The mean distance to the portrait in the last `chunks` chunks over that in the first: 1 does not drift.

    Args:
        distances: For each stream a distance for each of its chunks, [stream's chunks], such as the mean of
            `colour_distance` over the chunk's frames.
        chunks: How many at either end.
        seed: Of the interval.

    Raises:
        ValueError: If there are no streams, or one has less than 2 * `chunks` chunks.
    """
    _check_tracks("distances", distances, 1)
    shortest = min(len(stream) for stream in distances)
    if not 0 < 2 * chunks <= shortest:
        raise ValueError(f"chunks: got {chunks}, wanted 1 to {shortest // 2}, as the shortest stream has {shortest}")
    sums = [(stream[-chunks:].sum(dtype=np.float64), stream[:chunks].sum(dtype=np.float64)) for stream in distances]
    return bootstrap(_ratio, np.array(sums), seed=seed)
