"""Sheets of frames to look at: people, shapes of the mouth, a sentence frame by frame, and the same after a codec."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.distill.clips import Clip
from model.distill.face import MOTION, MOUTH, draw_identity, render
from model.files import replacing

Frames = NDArray[np.uint8]  # [T, H, W, 3]
LABEL = 14  # pixels of height

SHAPES = {
    "rest": {},
    "m b p": {"close": 1.0},
    "a": {"open": 0.9, "wide": 0.15},
    "i": {"open": 0.25, "wide": 0.9},
    "u": {"open": 0.25, "round": 0.95},
    "f v": {"open": 0.12, "lip_teeth": 1.0},
    "l th": {"open": 0.3, "wide": 0.25, "tongue": 1.0},
}


def sheet(pictures: Frames, columns: int, labels: Sequence[str] = ()) -> Image.Image:
    """Pictures [N, H, W, 3] in rows of `columns`, each with its label below, if there are labels."""
    count, height, width, _ = pictures.shape
    step = height + (LABEL if labels else 0)
    image = Image.new("RGB", (columns * width, -(-count // columns) * step), "white")
    draw, font = ImageDraw.Draw(image), _font()
    for i, picture in enumerate(pictures):
        x, y = i % columns * width, i // columns * step
        image.paste(Image.fromarray(picture), (x, y))
        if labels:
            draw.text((x + width / 2, y + height + LABEL / 2), labels[i], "black", font, "mm")
    return image


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, because it has the letters of the phonetic alphabet."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)


def people(seed: int = 0, count: int = 32, size: int = 160) -> Image.Image:
    """Neutral pictures of different people."""
    motion = np.zeros((1, len(MOTION)), np.float32)
    pictures = [render(draw_identity(np.random.default_rng([seed, i])), motion, size)[0] for i in range(count)]
    return sheet(np.stack(pictures), 8)


def mouth_shapes(seed: int = 0, count: int = 4, size: int = 192) -> Image.Image:
    """The mouth at rest and in its six shapes, of some people from light to dark skin."""
    drawn = [draw_identity(np.random.default_rng([seed, i]), textured=False) for i in range(8 * count)]
    chosen = sorted(drawn, key=lambda identity: identity.skin_tone)[4::8]
    pictures = [render(identity, np.stack([_motion(shape) for shape in SHAPES.values()]), size) for identity in chosen]
    return sheet(np.concatenate(pictures), len(SHAPES), list(SHAPES) * count)


def _motion(shape: dict[str, float]) -> NDArray[np.float32]:
    return np.array([shape.get(name, 0.0) for name in MOTION], np.float32)


def sentence(clip: Clip, rows: Sequence[Callable[[Frames], Frames]], size: int = 160, count: int = 16) -> Image.Image:
    """Every second frame of a clip, eight in a row, each row once for each of `rows`.

    `rows` map the clip's frames to frames, such as through a codec. Below each frame stand the phoneme that began last
    before the middle of the frame, and the opening.
    """
    frames, opening = clip.frames(size), clip.motion[:, MOTION.index(MOUTH[0])]
    versions = [row(frames) for row in rows]
    chosen = [range(start, start + 16, 2) for start in range(0, 2 * count, 16)]
    pictures = np.concatenate([version[list(part)] for part in chosen for version in versions])
    labels = [f"{_phoneme(clip, i)}  {opening[i]:.2f}" for part in chosen for _ in rows for i in part]
    return sheet(pictures, 8, labels)


def _phoneme(clip: Clip, frame: int) -> str:
    begun = [name for seconds, name in clip.track.phonemes if seconds <= (frame + 0.5) / 25]
    return begun[-1] if begun else ""


def save(image: Image.Image, path: Path) -> None:
    """Writes a sheet as JPEG, a quarter of a PNG's size, without visible loss."""
    with replacing(path) as temporary:
        image.save(temporary, "JPEG", quality=93, subsampling=0, optimize=True)
