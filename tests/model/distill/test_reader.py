"""Crops around the mouth against slicing and SciPy, and the trained reader on rendered people it has never seen."""

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.distill.clips import Clip, draw_clip
from model.distill.face import MOTION, MOUTH, mouth_centre
from model.distill.reader import (
    FACE,
    POSE,
    WEIGHTS,
    Reader,
    draw_stills,
    evaluate,
    load_reader,
    mouth_crops,
    table,
    train,
)
from model.distill.training import Budget
from model.errors import UserError
from model.weights.trained import load_trained


def noise(frames: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


# --- Crops ----------------------------------------------------------------------------------------------------------


def test_crops_at_whole_numbers_are_slices() -> None:
    frames = noise(2, 60, 70)
    crops = mouth_crops(frames, np.array([[30, 25], [54, 44]]))
    assert crops.dtype == np.float32
    np.testing.assert_array_equal(crops[0], frames[0, 9:41, 14:46].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(crops[1], frames[1, 28:60, 38:70].astype(np.float32) / np.float32(255))


@given(st.integers(0, 1000), st.integers(5, 20), st.integers(5, 20), st.integers(1, 6), st.booleans())
def test_crops_equal_scipys_interpolation(seed: int, height: int, width: int, radius: int, floating: bool) -> None:
    frames = noise(3, height, width, seed)
    centres = np.random.default_rng(seed).uniform(-4, 24, (3, 2))  # some crops reach beyond the picture
    crops = mouth_crops(frames / np.float64(255) if floating else frames, centres, radius)
    assert crops.shape == (3, 2 * radius, 2 * radius, 3)
    for t, (x, y) in enumerate(centres):
        rows, columns = np.mgrid[: 2 * radius, : 2 * radius] + 0.5 - radius  # pixel i covers i .. i + 1
        for channel in range(3):
            expected = scipy.ndimage.map_coordinates(
                frames[t, ..., channel] / 255, (rows + y - 0.5, columns + x - 0.5), order=1, mode="nearest"
            )
            np.testing.assert_allclose(crops[t, ..., channel], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("frames", "centres"),
    [
        (np.zeros((2, 8, 8)), np.zeros((2, 2))),
        (np.zeros((2, 8, 8, 3), np.int64), np.zeros((2, 2))),
        (np.zeros((2, 8, 8, 3)), np.zeros((1, 2))),
        (np.zeros((2, 8, 8, 3)), np.zeros(2)),
    ],
)
def test_crops_refuse_what_does_not_fit(frames: NDArray[np.float64], centres: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match=r"frames|centres"):
        mouth_crops(frames, centres)


# --- The trained reader ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """People and voices that no training has seen."""
    return [draw_clip(20, index, 20, held_out=True) for index in range(8)]


@pytest.fixture(scope="module")
def pictures(clips: list[Clip]) -> list[NDArray[np.uint8]]:
    return [clip.frames(128) for clip in clips]


def correlation(x: list[NDArray[np.floating]], y: list[NDArray[np.floating]]) -> float:
    return float(np.corrcoef(np.concatenate(x), np.concatenate(y))[0, 1])


def test_the_reader_follows_the_truth_of_new_people(
    reader: Reader, clips: list[Clip], pictures: list[NDArray[np.uint8]]
) -> None:
    centres = [mouth_centre(clip.identity, clip.motion) for clip in clips]
    known = [reader.read(*pair) for pair in zip(pictures, centres, strict=True)]
    free = [reader.read(frames) for frames in pictures]
    motion = {name: [clip.motion[:, i] for clip in clips] for i, name in enumerate(MOTION)}
    for i, (name, least) in enumerate({"open": 0.95, "wide": 0.85, "round": 0.92, "close": 0.95}.items()):
        assert name == MOUTH[i]
        assert correlation([reading.mouth[:, i] for reading in known], motion[name]) >= least
    assert correlation([reading.mouth[:, 0] for reading in free], motion["open"]) >= 0.95
    assert correlation([reading.blink for reading in free], motion["blink"]) >= 0.95
    for i, (name, least) in enumerate({"yaw": 0.95, "pitch": 0.7, "roll": 0.85}.items()):
        assert correlation([reading.pose[:, i] for reading in free], motion[name]) >= least
    error = np.concatenate([reading.centre for reading in free]) - np.concatenate(centres)
    assert np.abs(error).mean() < 1


def test_frames_are_read_one_by_one(reader: Reader, pictures: list[NDArray[np.uint8]]) -> None:
    frames = np.concatenate(pictures)[:66]  # more than are computed at once
    together, alone = reader.read(frames), reader.read(frames[65:])
    for name, tolerance in (("mouth", 1e-4), ("blink", 1e-4), ("pose", 1e-4), ("centre", 1e-2)):
        np.testing.assert_allclose(getattr(together, name)[65:], getattr(alone, name), atol=tolerance)


def test_bytes_and_floating_point_frames_read_alike(reader: Reader, pictures: list[NDArray[np.uint8]]) -> None:
    whole, part = reader.read(pictures[0]), reader.read(pictures[0] / 255)
    np.testing.assert_allclose(whole.mouth, part.mouth, atol=1e-4)
    np.testing.assert_allclose(whole.centre, part.centre, atol=1e-2)


def test_no_frames_give_an_empty_reading(reader: Reader) -> None:
    reading = reader.read(np.zeros((0, 128, 128, 3), np.uint8))
    assert (reading.mouth.shape, reading.blink.shape, reading.pose.shape) == ((0, 6), (0,), (0, 3))


def test_pictures_of_other_sizes_are_refused(reader: Reader) -> None:
    for shape in ((2, 64, 64, 3), (2, 128, 128, 4), (128, 128, 3)):
        with pytest.raises(ValueError, match="frames"):
            reader.read(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="squares"):
        reader.read_mouth(np.zeros((1, 16, 16, 3), np.float32))


def test_the_table_has_everyone_and_each_tone_of_skin(
    reader: Reader, clips: list[Clip], pictures: list[NDArray[np.uint8]]
) -> None:
    groups = evaluate(reader, clips, pictures)
    thirds = {("light", "medium", "dark")[min(2, int(clip.identity.skin_tone * 3))] for clip in clips}
    assert set(groups) == {"all", *thirds}
    assert set(groups["all"]) == {*MOUTH, *(f"{name}, free" for name in MOUTH), *FACE}
    blink = [reader.read(frames).blink for frames in pictures]
    truth = [clip.motion[:, MOTION.index("blink")] for clip in clips]
    assert groups["all"]["blink"].r.value == pytest.approx(correlation(blink, truth), abs=1e-5)
    others = evaluate(reader, clips, pictures[::-1])  # the frames that are given are read, not the clips' own
    assert others["all"]["open"].r.value < groups["all"]["open"].r.value
    lines = table(groups).splitlines()
    assert len(lines) == 2 + len(groups["all"])
    assert len({line.count("|") for line in lines}) == 1


def test_the_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000


def test_files_that_are_no_reader_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        load_reader(tmp_path / "nothing.safetensors")


# --- Training -------------------------------------------------------------------------------------------------------


def test_stills_belong_to_their_truth() -> None:
    stills = draw_stills(5, 1)
    assert stills.windows.shape == (24, 48, 48, 3)
    assert stills.pictures.shape == (12, 128, 128, 3)
    assert (stills.mouth.shape, stills.face.shape) == ((24, 6), (12, 6))
    motion = draw_clip(5, 0, 99).motion
    columns = [MOTION.index(name) for name in MOUTH]
    for numbers in stills.mouth:
        assert (np.abs(motion[:, columns] - numbers).max(1) == 0).any()
    columns = [MOTION.index(name) for name in ("blink", *POSE)]
    for numbers in stills.face:
        assert (np.abs(motion[:, columns] - numbers[:4]).max(1) == 0).any()
    assert len({picture.tobytes() for picture in stills.pictures}) >= 8  # four people


def test_a_short_training_begins_with_given_weights_and_writes_a_reader(tmp_path: Path) -> None:
    lines = []
    train(tmp_path, Budget(steps=2), seed=3, start=WEIGHTS, clips=1, report=lines.append)
    before, after = (load_trained(path)[0] for path in (WEIGHTS, tmp_path / WEIGHTS.name))
    weights = [name for name in before if "running" not in name and "tracked" not in name]
    assert all((after[name] - before[name]).abs().max() < 0.01 for name in weights)
    assert any("centre_error" in line for line in lines)
    reading = load_reader(tmp_path / WEIGHTS.name).read(noise(3, 128, 128))
    assert np.isfinite(reading.mouth).all()
    assert np.isfinite(reading.centre).all()
