"""Makes a still photograph talk: the warp of one picture by the numbers of `model.distill.face.MOTION`.

Drawn heads all have the renderer's look. A warped photograph has a photograph's look and a known mouth, so it tests
what a network does to pictures it was not trained on. The head turns by the parallax of an ellipsoid, lips and jaw are
moved, and lids and the inside of the mouth are painted. Gaze, brows, smile and breath are ignored.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from model.distill.face import MOTION

Point = tuple[float, float]


@dataclass(frozen=True)
class Landmarks:
    """Where the parts of a frontal face are, as fractions of the width of a square picture; y points down.

    Attributes:
        face: centre of the face; half its width and half its height are `face_width` and `face_height`.
        mouth: middle between the lips; the corners are `mouth_width` to both sides and `mouth_bend` higher.
        mouth_gap: distance of the lips in the photograph, 0 if the mouth is closed.
        chin: height of the chin.
        eyes: middle of both eyes; half their width is `eye_width`.
    """

    face: Point
    face_width: float
    face_height: float
    mouth: Point
    mouth_width: float
    mouth_bend: float
    mouth_gap: float
    chin: float
    eyes: tuple[Point, Point]
    eye_width: float


def _smoothstep(start: float | Tensor, end: float | Tensor, x: Tensor) -> Tensor:
    """0 up to `start`, 1 from `end` on, smooth between; `start` may be the larger one."""
    t = ((x - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _named(motion: ArrayLike) -> dict[str, Tensor]:
    """Columns of a motion by name, each [T, 1, 1]."""
    numbers = torch.as_tensor(np.asarray(motion, np.float32))
    if numbers.ndim != 2 or numbers.shape[1] != len(MOTION):
        raise ValueError(f"motion: got {tuple(numbers.shape)}, wanted [T, {len(MOTION)}]")
    return {name: numbers[:, i, None, None] for i, name in enumerate(MOTION)}


def _head_shift(marks: Landmarks, motion: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How far the turned head moves the point (x, y) in x and in y.

    Yaw and pitch move it by the parallax of an ellipsoid, roll about the neck; all fade out around the head.
    """
    across, down = (x - marks.face[0]) / marks.face_width, (y - marks.face[1]) / marks.face_height
    depth = (1 - (across / 1.35).square() - (down / 1.3).square()).clamp_min(0).sqrt()
    near = _smoothstep(1.9, 0.9, ((across / 1.5).square() + (down / 1.5).square()).sqrt())
    sine, cosine = motion["roll"].sin(), motion["roll"].cos()
    dx, dy = x - marks.face[0], y - marks.face[1] - marks.face_height
    rolled_x, rolled_y = (cosine - 1) * dx + sine * dy, (cosine - 1) * dy - sine * dx
    shift_x = motion["yaw"] * depth * marks.face_width + (rolled_x + motion["shift_x"] / 2) * near
    shift_y = motion["pitch"] * depth * marks.face_height + (rolled_y - motion["shift_y"] / 2) * near
    return shift_x, shift_y


@dataclass(frozen=True)
class _Mouth:
    """The moved mouth at each sample, all [T, H, W].

    Attributes:
        x, y: the point of the photograph that is seen there.
        across: -1 to 1 from corner to corner.
        below: distance from the upper lip in half widths of the mouth.
        depth: 0 at the upper lip, 1 at the lower.
        inside: share of the painted inside of the mouth.
    """

    x: Tensor
    y: Tensor
    across: Tensor
    below: Tensor
    depth: Tensor
    inside: Tensor


def _move_mouth(marks: Landmarks, motion: dict[str, Tensor], x: Tensor, y: Tensor) -> _Mouth:
    """Moves lips and jaw.

    Above and below the mouth, the photograph follows its own lips; far from it, it stays, and below the lower lip the
    jaw moves as a whole. Between the lips the photograph's own teeth are stretched until the painted mouth covers them.
    """
    free, tuck = 1 - motion["close"], motion["lip_teeth"]
    width = marks.mouth_width * (1 + 0.16 * motion["wide"]) * (1 - 0.30 * motion["round"])
    opened = 0.85 * motion["open"] + 0.25 * motion["round"] + 0.15 * motion["tongue"]
    opened = marks.mouth_width * free * (opened * (1 - 0.8 * tuck) + 0.22 * tuck)

    dx, dy = x - marks.mouth[0], y - marks.mouth[1]
    across = dx / width
    around = _smoothstep(1.9, 0.7, (dx / (1.5 * width)).square() + (dy / (1.1 * marks.mouth_width)).square())
    read_x = marks.mouth[0] + dx * (1 + (marks.mouth_width / width - 1) * around)

    arch = (1 - across.square()).clamp_min(0).sqrt()
    line = marks.mouth[1] - marks.mouth_bend * across.square().clamp_max(1)
    half = marks.mouth_gap / 2
    old_upper, old_lower = line - half * arch, line + half * arch
    upper, lower = line - (half * free + 0.18 * opened) * arch, line + (half * free + 0.82 * opened) * arch
    jaw = _smoothstep(2.6, 0.9, across.abs()) * _smoothstep(0.0, 1.2 * marks.mouth_width, y - lower)
    near = _smoothstep(1.2 * marks.mouth_width, 0.0, dy.abs())
    raised = (upper - old_upper) * near
    dropped = 0.82 * opened * torch.maximum(arch, jaw) * _smoothstep(marks.chin + 0.2, marks.chin, y)
    dropped = dropped - half * (1 - free) * arch * near
    depth = ((y - upper) / (lower - upper).clamp_min(1e-4)).clamp(0, 1)
    between = old_upper + depth * (old_lower - old_upper)
    read_y = torch.where(y > lower, y - dropped, torch.where(y < upper, y - raised, between))

    soft = 0.75 / x.shape[-1]
    inside = _smoothstep(-soft, soft, y - upper) * _smoothstep(-soft, soft, lower - y)
    inside = inside * _smoothstep(1.0, 0.94, across.abs())
    inside = inside * _smoothstep(0.05 * marks.mouth_width, 0.3 * marks.mouth_width, opened)
    return _Mouth(read_x, read_y, across, (y - upper) / marks.mouth_width, depth, inside)


def _color(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor((red, green, blue)).view(1, 3, 1, 1)


def _paint_mouth(frames: Tensor, mouth: _Mouth, motion: dict[str, Tensor]) -> Tensor:
    """Paints teeth, tongue and the dark between them into frames [T, 3, H, W]."""
    reach, lift = mouth.across.abs(), motion["tongue"]
    teeth = _smoothstep(0.24, 0.18, mouth.below) * _smoothstep(1.0, 0.7, reach) * (1 - motion["round"])
    tongue = _smoothstep(0.70 - 0.35 * lift, 0.85 - 0.35 * lift, mouth.depth) * _smoothstep(0.9, 0.5, reach)
    painted = _color(0.25, 0.07, 0.07) * (0.5 + 0.8 * mouth.depth)[:, None]
    painted = torch.lerp(painted, _color(0.62, 0.30, 0.29), (0.85 * tongue)[:, None])
    painted = torch.lerp(painted, _color(0.86, 0.82, 0.77), (teeth * (1 - 0.9 * tongue * lift))[:, None])
    return torch.lerp(frames, painted, mouth.inside[:, None])


def _paint_lids(frames: Tensor, source: Tensor, marks: Landmarks, blink: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Paints lids of the colour of the skin below the eyes, with a line of lashes at their lower edge."""
    height = 0.6 * marks.eye_width
    for eye_x, eye_y in marks.eyes:
        below = torch.tensor((eye_x, eye_y + 2.6 * height)).view(1, 1, 1, 2) * 2 - 1
        skin = F.grid_sample(F.avg_pool2d(source, 5, 1, 2), below, align_corners=False)
        arch = (1 - ((x - eye_x) / (1.2 * marks.eye_width)).square()).clamp_min(0)
        top = eye_y - height * arch
        edge = top + blink * 1.8 * height * arch
        cover = _smoothstep(top - 0.4 * height, top, y) * _smoothstep(edge + 0.2 * height, edge - 0.1 * height, y)
        cover = cover * _smoothstep(0.0, 0.15, arch) * _smoothstep(0.0, 0.3, blink)
        lashes = 0.5 * (-((y - edge) / (0.2 * height)).square()).exp() * cover
        frames = torch.lerp(frames, skin * (1 - lashes[:, None]), cover[:, None])
    return frames


def animate(photo: NDArray[np.uint8], marks: Landmarks, motion: ArrayLike, size: int = 128) -> NDArray[np.uint8]:
    """Warps a square photograph by T frames of motion: uint8 [T, size, size, 3], sRGB.

    `photo` is uint8 [H, H, 3] and best about twice as large as `size`; `motion` is float32 [T, 17] in the order of
    `MOTION`. Raises `ValueError` for other shapes.
    """
    if photo.ndim != 3 or photo.shape[0] != photo.shape[1] or photo.shape[2] != 3:
        raise ValueError(f"photo: got {photo.shape}, wanted [H, H, 3]")
    numbers = _named(motion)
    source = torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)[None]
    steps = (torch.arange(2 * size) + 0.5) / (2 * size)  # each pixel is the mean of 2 x 2 samples
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    shift_x, shift_y = _head_shift(marks, numbers, x, y)
    x, y = x - shift_x, y - shift_y
    mouth = _move_mouth(marks, numbers, x, y)
    grid = torch.stack((mouth.x, mouth.y), -1) * 2 - 1
    frames = F.grid_sample(
        source.expand(len(grid), -1, -1, -1), grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    frames = _paint_mouth(frames, mouth, numbers)
    frames = _paint_lids(frames, source, marks, numbers["blink"], x, y)
    frames = F.avg_pool2d(frames.clamp(0, 1), 2)
    return (frames * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def mouth_centre(marks: Landmarks, motion: ArrayLike, size: int = 128) -> NDArray[np.float32]:
    """The pixel column and row of the mouth's centre in the frames of `animate`, float32 [T, 2]."""
    x, y = (torch.full((1, 1, 1), place) for place in marks.mouth)
    shift_x, shift_y = _head_shift(marks, _named(motion), x, y)
    return (torch.stack((x + shift_x, y + shift_y), -1)[:, 0, 0] * size).numpy()
