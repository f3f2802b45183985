"""Portraits that are cut to another format keep the face."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model import portrait
from model.image import resize_center_crop
from model.portrait import find_face, keep_face

EXAMPLE = Path(__file__).parents[2] / "examples" / "portrait.jpg"


@pytest.fixture
def photo() -> Image.Image:
    with Image.open(EXAMPLE) as image:
        return image.convert("RGB")


def test_a_face_is_found_where_it_is(photo: Image.Image) -> None:
    face = find_face(photo)
    assert face is not None
    x, y, side = face
    assert 160 < x + side / 2 < 320  # the photograph shows her at column 250, row 180
    assert 120 < y + side / 2 < 230
    assert 100 < side < 250
    assert find_face(Image.new("RGB", (300, 200), "grey")) is None


@pytest.mark.parametrize("size", [(512, 192), (640, 320), (192, 512), (320, 640)])
def test_the_head_stays_in_the_picture_wherever_it_is(photo: Image.Image, size: tuple[int, int]) -> None:
    """The photograph on a large grey canvas, at the edges of which a plain cut of the middle would lose her."""
    for place in ((0, 0), (700, 0), (0, 700), (700, 700)):
        canvas = Image.new("RGB", (1212, 1212), "grey")
        canvas.paste(photo, place)
        cut = resize_center_crop(keep_face(canvas, size[1], size[0]), size[1], size[0])
        face = find_face(Image.fromarray(cut.permute(1, 2, 0).numpy()))
        assert face is not None, place
        assert 0 <= face[0] <= size[0] - face[2]
        assert 0 <= face[1] <= size[1] - face[2]


def test_a_face_that_the_middle_keeps_changes_nothing(photo: Image.Image) -> None:
    """So the published format gives the published pixels."""
    assert keep_face(photo, 448, 448) is photo
    assert keep_face(photo, 768, 448).size == photo.size
    assert keep_face(Image.new("RGB", (900, 300)), 300, 300).size == (900, 300)  # no face at all


@given(
    st.tuples(st.integers(40, 400), st.integers(40, 400)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.floats(0, 0.7), st.floats(0, 0.7), st.floats(0.15, 0.3)),
)
def test_the_cut_holds_the_face_in_any_format(
    size: tuple[int, int], form: tuple[int, int], place: tuple[float, float, float]
) -> None:
    """A marked square stands for the face; the middle that is cut out shows its centre."""
    x, y, side = (round(share * length) for share, length in zip(place, (*size, min(size)), strict=True))
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[y + side // 2, x + side // 2] = 255
    image = Image.fromarray(pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portrait, "find_face", lambda _: (x, y, side))
        kept = keep_face(image, 16 * form[1], 16 * form[0])
    width, height = (min(kept.size[i], kept.size[1 - i] * form[i] / form[1 - i]) for i in (0, 1))
    left, top = (kept.width - width) / 2, (kept.height - height) / 2
    middle = kept.crop((int(left), int(top), int(np.ceil(left + width)), int(np.ceil(top + height))))
    assert np.asarray(middle).any()
