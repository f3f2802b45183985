"""Sheets: every picture at its place, and labels below."""

import numpy as np
from PIL import Image

from model.distill.clips import draw_clip
from model.distill.face import MOTION
from model.distill.sheets import LABEL, SHAPES, mouth_shapes, people, save, sentence, sheet
from tests.model.distill.conditions import needs_espeak


def test_pictures_stand_in_rows():
    pictures = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    image = np.asarray(sheet(pictures, 2))
    assert image.shape == (12, 12, 3)
    assert image[::4, ::6, 0].tolist() == [[0, 10], [20, 30], [40, 255]]


def test_labels_stand_below_their_picture():
    image = np.asarray(sheet(np.zeros((2, 8, 40, 3), np.uint8), 2, ("a", "ʃ")))
    assert image.shape == (8 + LABEL, 80, 3)
    dark = image[8:].min(axis=2) < 128
    assert dark[:, :40].any()
    assert dark[:, 40:].any()
    assert not np.array_equal(dark[:, :40], dark[:, 40:])


def test_people_differ_and_shapes_name_known_numbers(tmp_path):
    image = people(count=3, size=32)
    assert image.size == (8 * 32, 32)
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[:, :32] - pixels[:, 32:64]).mean() > 5
    assert {name for shape in SHAPES.values() for name in shape} <= set(MOTION)
    save(mouth_shapes(count=2, size=32), tmp_path / "shapes.jpg")
    assert Image.open(tmp_path / "shapes.jpg").size == (len(SHAPES) * 32, 2 * (32 + LABEL))


@needs_espeak
def test_a_sentence_has_a_row_for_each_version():
    clip = draw_clip(0, 0, 33)
    image = np.asarray(sentence(clip, [lambda frames: frames, lambda frames: 255 - frames], 32, 16))
    assert image.shape == (4 * (32 + LABEL), 8 * 32, 3)
    frames = clip.frames(32)
    step = 32 + LABEL
    np.testing.assert_array_equal(image[:32, 32:64], frames[2])
    np.testing.assert_array_equal(image[step : step + 32, 32:64], 255 - frames[2])
    np.testing.assert_array_equal(image[2 * step : 2 * step + 32, :32], frames[16])
