"""The warped photograph: nothing moves at rest, and each number moves its own part.

astronaut.png is the face of `skimage.data.astronaut` (Eileen Collins, photographed by NASA, public domain), 256 x 256
pixels cut from the file of scikit-image without scaling. No network is trained on it.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.distill.face import MOTION
from model.distill.photo import Landmarks, animate, mouth_centre

ASTRONAUT = np.asarray(Image.open(Path(__file__).with_name("astronaut.png")))
MARKS = Landmarks(
    face=(0.507, 0.438),
    face_width=0.172,
    face_height=0.254,
    mouth=(0.502, 0.571),
    mouth_width=0.075,
    mouth_bend=0.020,
    mouth_gap=0.033,
    chin=0.709,
    eyes=((0.416, 0.395), (0.594, 0.403)),
    eye_width=0.037,
)


def motion(**numbers: float) -> NDArray[np.float32]:
    return np.asarray([[numbers.get(name, 0.0) for name in MOTION]], np.float32)


def changed(**numbers: float) -> NDArray[np.float32]:
    """How much each pixel changes against the photograph at rest, [128, 128]."""
    pictures = animate(ASTRONAUT, MARKS, np.concatenate((motion(), motion(**numbers)))).astype(np.float32)
    return np.abs(pictures[1] - pictures[0]).sum(-1)


def test_rest_is_the_photograph() -> None:
    halved = ASTRONAUT.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(animate(ASTRONAUT, MARKS, motion())[0] - halved).max() <= 1


@pytest.mark.parametrize("name", ["open", "wide", "round", "close", "lip_teeth", "tongue"])
def test_mouth_moves_the_lower_face_only(name: str) -> None:
    weight = changed(**{name: 1.0})
    column, row = np.round(mouth_centre(MARKS, motion())[0]).astype(int)
    assert weight[row - 8 : row + 16, column - 14 : column + 14].mean() > 8
    assert weight[: row - 20].max() <= 3
    assert weight[:, : column - 34].max() <= 3
    assert weight[:, column + 34 :].max() <= 3


def test_open_mouth_is_dark_and_closed_lips_hide_the_teeth() -> None:
    column, row = np.round(mouth_centre(MARKS, motion())[0]).astype(int)
    rest, opened, closed = animate(ASTRONAUT, MARKS, np.concatenate((motion(), motion(open=0.9), motion(close=1.0))))
    below = slice(row + 2, row + 7), slice(column - 3, column + 4)
    assert opened[below].mean() < 0.6 * rest[below].mean()
    teeth = slice(row - 2, row + 2), slice(column - 3, column + 4), 2  # blue is what tells teeth from lips
    assert closed[teeth].mean() < rest[teeth].mean() - 10


def test_blink_changes_the_eyes_only() -> None:
    weight = changed(blink=1.0)
    eyes = np.zeros_like(weight, bool)
    for x, y in MARKS.eyes:
        eyes[int(y * 128) - 6 : int(y * 128) + 7, int(x * 128) - 7 : int(x * 128) + 8] = True
    assert weight[eyes].mean() > 20
    assert weight[~eyes].max() <= 3


@pytest.mark.parametrize(
    "pose", [{"yaw": 0.2}, {"pitch": -0.1}, {"roll": 0.06}, {"shift_x": 0.06, "shift_y": 0.04, "yaw": -0.15}]
)
def test_mouth_centre_follows_the_pose(pose: dict[str, float]) -> None:
    spot = np.zeros_like(ASTRONAUT)
    x, y = (round(place * 256) for place in MARKS.mouth)
    spot[y - 4 : y + 4, x - 4 : x + 4] = 255
    weight = animate(spot, MARKS, motion(**pose))[0].astype(np.float32).sum(-1)
    rows, columns = np.mgrid[:128, :128] + 0.5
    middle = np.asarray(((weight * columns).sum(), (weight * rows).sum())) / weight.sum()
    assert np.abs(middle - mouth_centre(MARKS, motion(**pose))[0]).max() < 1.0
    assert np.abs(middle - mouth_centre(MARKS, motion())[0]).max() > 0.5


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="photo"):
        animate(ASTRONAUT[:100], MARKS, motion())
    with pytest.raises(ValueError, match="motion"):
        animate(ASTRONAUT, MARKS, np.zeros((1, 16)))
